"""What the compiled parts do not take from whoever embeds them, and what they say of themselves around their life."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import eventually

from muenfast._blk import Group, Server
from muenfast._bufclient import BufferClient
from muenfast._buffer import BufferServer
from muenfast._client import Client, ClientEngine
from muenfast._engine import ServerEngine
from muenfast._marks import MarkTable
from muenfast._net import Ports, Receiver, Sender
from muenfast._ring import Conduct, Reader
from muenfast._store import Store
from muenfast._target import Completions, Memory
from muenfast._user import UserStore
from muenfast.attach._nbd import NbdDisk
from muenfast.errors import UsageError

SIZE = 1 << 16


def memory() -> bytearray:
    return bytearray(SIZE)


@contextmanager
def refused(text: str) -> Iterator[None]:
    with pytest.raises(UsageError, match=text):
        yield


class Turning:
    """An engine inside run(), in another thread, for as long as the block lasts."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._end = engine, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._end.is_set():
            self._engine.run(0.2)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(20)


def busy(call: Callable[[], object], text: str) -> None:
    """Refused, or the other thread happened to be between two turns: again."""
    def is_refused() -> bool:
        try:
            call()
        except UsageError as error:
            assert text in str(error)
            return True
        return False

    eventually(is_refused)


def test_stores() -> None:
    store = Store.null(SIZE)
    for plan in ([], [("error", ("read",), 1.0, 5, 0.0)] * 9):
        with refused("a store has 1 to 8 faults"):
            store.inject(plan)
    store.inject([("error", ("read",), 1.0, 5, 0.0)])
    with refused("a store's faults are given once"):
        store.inject([("error", ("read",), 1.0, 5, 0.0)])
    with refused("a store's identity has 16 bytes"):
        Store.null(SIZE, identity=b"short")
    with refused("a disk has at least one block of 4096 bytes"):
        Store.null(4095)
    with open("/dev/null", "rb") as file:
        with refused("a block has 512 or 4096 bytes"):
            Store.in_file(file.fileno(), SIZE, block_size=1024)
        with refused(r"a store ends below 2\^63"):
            Store.in_file(file.fileno(), SIZE, offset=(1 << 63) - SIZE)
    assert Store.in_memory(memory(), anonymous=True).zeroes


def test_stores_in_python() -> None:
    def user(**more: Any) -> UserStore:
        return UserStore(SIZE, **{"pread": lambda *_: None, "pwrite": None, "flush": None, "trim": None, "zero": None,
                                  "bare": (), "failed": lambda *_: 5, "most": 4096, "timeout": 1.0, **more})

    with refused("one read or write has at least 4096 bytes"):
        user(most=512)
    with refused("a UserStore is initialised once"):
        user().__init__(SIZE, pread=None, pwrite=None, flush=None, trim=None,  # type: ignore[misc,arg-type]
                        zero=None, bare=(), failed=lambda *_: 5, most=4096, timeout=1.0)
    assert user().abandoned == 0


def test_targets() -> None:
    with refused("a block has 512 or 4096 bytes"):
        Memory(1, block_size=1024)
    disk = Memory(4)
    completions = Completions(disk)
    assert completions.target is disk
    for call, text in ((lambda: completions.submit("discard", 0, nblocks=1), "this disk takes no discards"),
                       (lambda: completions.submit("erase", 0), "a request is one of read, write"),
                       (lambda: completions.submit("read", 4, bytearray(4096)), "reach beyond the disk's 4")):
        with refused(text):
            call()
    number = Completions(disk).fileno()     # nothing is outstanding: its descriptor goes with it
    with pytest.raises(OSError):
        os.fstat(number)
    completions.close()


def test_a_server() -> None:
    store = Store.null(SIZE)
    with refused("checksums are one of off, auto, require"):
        Server(memory(), memory(), store, checksum="some")
    server = Server(memory(), memory(), store)
    assert server.store is store and server.fault[0] == 0 and not server.attached
    with refused("a Server is initialised once"):
        server.__init__(memory(), memory(), store)  # type: ignore[misc]
    with Turning(server):
        busy(lambda: server.run(0), "another thread runs this Server")
    server.close()
    server.close()
    assert server.fault == (0, 0, 0)
    with refused("this Server is closed"):
        server.run(0)
    server = BufferServer(memory(), memory(), memory(), (store,))
    assert server.stores == (store,)
    with refused("a BufferServer is initialised once"):
        server.__init__(memory(), memory(), memory(), (store,))  # type: ignore[misc]
    server.close()


def test_a_group_has_as_many_as_it_can_sleep_on() -> None:
    group = Group()
    servers = [Server(memory(), memory(), Store.null(SIZE)) for _ in range(129)]
    for server in servers[:128]:
        group.add(server)
    with refused("one thread serves at most 128 connections"):
        group.add(servers[128])
    for server in servers[:128]:
        group.remove(server)
    for server in servers:
        server.close()


def test_engines_of_the_base_class() -> None:
    """They are for isinstance()."""
    server = ServerEngine()
    server.stop()
    assert (server.fault, server.batches, server.waiting) == ((0, 0, 0), 0, 0)
    with refused("this ServerEngine is closed"):
        server.run(0)
    with refused("a ServerEngine has no reader"):
        assert server.conduct
    with pytest.raises(TypeError, match="a Conduct is an engine's"):
        Conduct()
    assert ClientEngine().geometry == ()


def test_a_client() -> None:
    client = Client(memory(), memory())
    assert (client.background, client.attended, client.conduct.patience) == (False, False, 0)
    with refused("a Client is initialised once"):
        client.__init__(memory(), memory())  # type: ignore[misc]
    with Turning(client):
        busy(lambda: client.run(0), "another thread runs this Client")
    client.fail()
    with refused("this device has failed or is closed"):
        client.rebind(memory(), memory())
    with refused(r"a length is a number of bytes, 0 to 2\^63 - 1"):
        client.disks[0].discard(-1, 0)
    client.close()
    client.close()
    client = BufferClient(memory(), memory(), memory())
    with refused("a BufferClient is initialised once"):
        client.__init__(memory(), memory(), memory())  # type: ignore[misc]
    client.close()


def test_interfaces() -> None:
    ports = Ports(MarkTable(1))
    with open("/dev/null", "r+b", buffering=0) as file:
        ports.add(0, file.fileno())
        with refused("a port's number is below .* and not in use"):
            ports.add(0, file.fileno())
        with refused("a way is one of"):
            ports.add(1, file.fileno(), "around")
        with refused("only a device with offloads takes what was merged"):
            Receiver(ports, memory(), framing="net_hdr", mtu=1500, protocol=0, merge=("tcp4",))
        receiver = Receiver(ports, memory(), framing="net_hdr", mtu=1500, protocol=0)
        assert receiver.ports is ports and receiver.framing == "net_hdr" and receiver.fault[0] == 0
        with refused("a Receiver is initialised once"):
            receiver.__init__(ports, memory(), framing="raw", mtu=1500, protocol=0)  # type: ignore[misc]
        receiver.close()
        receiver.close()
        assert receiver.fault == (0, 0, 0)
        sender = Sender(ports, memory(), framing="net_hdr", mtu=1500)
        sender.link(True)
        sender.close()
        after = Sender(ports, memory(), framing="net_hdr", mtu=1500)
        after.inherit(sender)
        assert after.counters["epochs"] == sender.counters["epochs"]
        after.close()
        ports.remove(0)
    ports.close()
    assert not ports.offload


def test_a_network_disk() -> None:
    for call, text in ((lambda: NbdDisk(Memory(4), connections=0), "connections is 0: 1 to 1024"),
                       (lambda: NbdDisk(Memory(4), connections=1025), "connections is 1025")):
        with pytest.raises(ValueError, match=text):
            call()
    target = Memory(4)
    disk = NbdDisk(target)
    assert disk.target is target
    disk.close()
    disk.close()
    with pytest.raises(ValueError, match="operation on a closed NbdDisk"):
        disk.run()


def test_a_reader_with_nothing_to_read_is_not_waited_for() -> None:
    reader = Reader(memory(), size=8)
    assert reader.read() is None and not reader.wait(0)
    reader.close()
