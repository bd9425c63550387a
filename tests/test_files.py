"""Files and disks behind an export: many operations at a time, by io_uring or by threads."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import block, eventually
from peer import COMMAND, COMMAND_SYNC, EVENT_BYTES, READ, REQUEST_PROTOCOL, RESPONSE_PROTOCOL, WRITE, Event

from muenfast import Result
from muenfast._blk import Server
from muenfast._ring import Reader, Writer
from muenfast._store import Store
from muenfast.backing import Device, open_device

BLOCK = 4096
REGION = 64 + 254 * EVENT_BYTES


class Client:
    """A plain client in this process, over plain memory, and its server in a thread."""

    def __init__(self, store: Store, *, threads: bool, bells: bool = True, region: int = REGION) -> None:
        self.req, self.resp = (mmap.mmap(-1, region) for _ in range(2))
        self.bells = [mmap.mmap(-1, BLOCK) if bells else None for _ in range(2)]
        self.server = Server(self.req, self.resp, store, request_bell=self.bells[0], response_bell=self.bells[1],
                             threads=threads)
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.begin()
        eventually(lambda: self.server.connected)   # what a server finds there in its first moment is a predecessor's

    def _run(self) -> None:
        while not self.end.is_set() and self.server.run(0.2) != "stopped":
            pass

    def begin(self) -> None:
        """A new life."""
        self.writer = Writer(self.req, size=EVENT_BYTES, protocol=REQUEST_PROTOCOL, bell=self.bells[0])
        self.reader = Reader(self.resp, size=EVENT_BYTES, protocol=RESPONSE_PROTOCOL, bell=self.bells[1])

    def send(self, *events: Event) -> None:
        self.writer.write_many(b"".join(event.pack().ljust(EVENT_BYTES, b"\0") for event in events))

    def answers(self, count: int) -> dict[int, Event]:
        """The next answers, by priv."""
        found: dict[int, Event] = {}
        while len(found) < count:
            assert self.reader.wait(20.0), f"{len(found)} of {count} answers"
            element = self.reader.read()
            if element is None:
                assert self.reader.result != Result.OVERRUN_DETECTED
                continue
            answer = Event.unpack(element)
            assert answer.priv not in found
            found[answer.priv] = answer
        return found

    def close(self) -> None:
        self.end.set()
        self.server.stop()
        if self.thread.is_alive():
            self.thread.join()
        self.writer.close()
        self.reader.close()
        self.server.close()


@pytest.fixture(params=[False, True], ids=["io_uring", "threads"])
def threads(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def serve(tmp_path: Path, threads: bool) -> Iterator[Callable[..., Client]]:
    """A client of a new disk of so many blocks of zeros, in tmp_path/disk."""
    with ExitStack() as stack:
        def make(blocks: int = 64, **more: Any) -> Client:
            path = tmp_path / "disk"
            path.write_bytes(bytes(blocks * BLOCK))
            backing = stack.enter_context(open_device(Device.parse(str(path))))
            client = Client(backing.store, threads=threads, **more)
            stack.callback(client.close)
            return client

        yield make


@pytest.mark.parametrize("bells", [True, False], ids=["bells", "polling"])
def test_out_of_order_but_as_if_one_by_one(serve: Callable[..., Client], tmp_path: Path, bells: bool) -> None:
    """Random reads, writes and syncs, 1 to 200 in flight, overlapping or neighbours: every read gives what the writes
    before it left, the file holds what all of them did."""
    client, dice = serve(bells=bells), random.Random(7)
    model, priv = [bytes(BLOCK)] * 64, 0
    for _ in range(40):
        events: list[Event] = []
        expected: dict[int, bytes | None] = {}
        at = 0
        for _ in range(dice.randrange(1, 200)):
            at = dice.choice([at, (at + 1) % 64, (at + 1) % 64, dice.randrange(64)])
            kind = dice.choice([READ, WRITE]) if dice.random() < 0.97 else COMMAND
            priv += 1
            data = block(priv) if kind == WRITE else b""
            events.append(Event(kind, 0, COMMAND_SYNC if kind == COMMAND else at, 1, priv, data))
            if kind == WRITE:
                model[at] = data
            expected[priv] = model[at] if kind == READ else None
        client.send(*events)
        answers = client.answers(len(events))
        for event in events:
            answer = answers[event.priv]
            assert answer[:5] == event[:5]
            assert expected[event.priv] is None or answer.data == expected[event.priv]
        assert (tmp_path / "disk").read_bytes() == b"".join(model)
    counters = client.server.counters
    assert counters["merged"] > 200 and counters["failed"] == counters["torn"] == counters["rejected"] == 0


def test_a_life_that_ends_gets_no_answer(serve: Callable[..., Client]) -> None:
    """Whatever was under way when a client began anew is done before the new life's first request, and answered to
    nobody; the new life's own come."""
    client = serve(256, region=64 + 24 * EVENT_BYTES)   # small: a new life is there at once
    dice = random.Random(3)
    client.send(Event(READ, 0, 0, 1, 1))
    client.answers(1)
    for life in range(1, 151):
        old = [Event(dice.choice([READ, WRITE]), 0, dice.randrange(256), 1, 1000 * life + i, block(life))
               for i in range(dice.randrange(1, 25))]
        batches = client.server.counters["batches"]
        client.send(*old)
        while client.server.counters["batches"] == batches:     # it has begun some of it, and hardly ended any
            pass
        client.writer.close()
        client.reader.close()
        client.begin()
        new = {10 ** 6 + 1000 * life + i for i in range(8)}
        client.send(*(Event(READ, 0, priv % 8, 1, priv) for priv in new))
        found: set[int] = set()     # in one epoch of the server's; what it answers before it knows is in the one before
        while not new <= found:
            assert client.reader.wait(20.0), (life, found)
            element = client.reader.read()
            if element is not None:
                found.add(Event.unpack(element).priv)
            elif client.reader.result == Result.EPOCH_CHANGED:
                found.clear()
        assert found == new, life
    assert client.server.counters["connections"] == 151


def foreign_threads() -> int:
    """Threads of this process that Python knows nothing of, the kernel's workers among them."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def test_closing_lets_what_is_under_way_end(serve: Callable[..., Client], tmp_path: Path) -> None:
    """A server that is stopped with requests in flight leaves whole blocks, each old or new, and no thread."""
    others = foreign_threads()      # numpy's, where another test has imported it
    client = serve(256)
    client.send(*(Event(WRITE, 0, i * 3 % 256, 1, i, block(i + 1)) for i in range(200)))
    eventually(lambda: client.server.counters["batches"] > 0)
    client.close()
    content = (tmp_path / "disk").read_bytes()
    for i in range(200):
        at = i * 3 % 256 * BLOCK
        assert content[at:at + BLOCK] in (bytes(BLOCK), block(i + 1))
    eventually(lambda: foreign_threads() <= others)


def test_a_file_that_is_cut_short(serve: Callable[..., Client], tmp_path: Path) -> None:
    """What is missing is EIO for whoever asks for it, zeros in its place, and nobody else's trouble."""
    client = serve(64)
    os.truncate(tmp_path / "disk", 8 * BLOCK)
    client.send(*(Event(READ, 0, i, 1, i) for i in (3, 20, 63)), Event(WRITE, 0, 5, 1, 100, block(5)))
    answers = client.answers(4)
    assert [answers[i].error for i in (3, 20, 63, 100)] == [0, -errno.EIO, -errno.EIO, 0]
    assert answers[20].data == bytes(BLOCK)


def test_what_the_kernel_refuses_is_an_error(threads: bool, tmp_path: Path) -> None:
    """Of that request; here a descriptor that is not open for writing."""
    (tmp_path / "disk").write_bytes(b"x" * (8 * BLOCK))
    with open(tmp_path / "disk", "rb") as file:
        client = Client(Store.in_file(file.fileno(), 8 * BLOCK), threads=threads)
        try:
            client.send(Event(WRITE, 0, 0, 1, 1, block(1)), Event(READ, 0, 1, 1, 2))
            answers = client.answers(2)
        finally:
            client.close()
    assert answers[1].error == -errno.EBADF
    assert answers[2].error == 0 and answers[2].data == b"x" * BLOCK


def test_direct_io(tmp_path: Path) -> None:
    """Files are read and written past the page cache where their file system lets them be, in the store's own unit."""
    for size in (1 << 20, (1 << 20) + 512):
        path = tmp_path / f"disk{size}"
        path.write_bytes(os.urandom(size))
        with open_device(Device.parse(str(path))) as backing:
            flags = [int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
                     for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
                     and os.readlink(f"/proc/self/fd/{fd}") == str(path)]
            assert {bool(each & os.O_DIRECT) for each in flags} == {False, True}
            client = Client(backing.store, threads=False)
            try:
                client.send(Event(READ, 0, 7, 1, 1), Event(WRITE, 0, 9, 1, 2, block(9)))
                assert client.answers(2)[1].data == path.read_bytes()[7 * BLOCK:8 * BLOCK]
            finally:
                client.close()
        assert path.read_bytes()[9 * BLOCK:10 * BLOCK] == block(9)


def test_a_file_system_without_direct_io(tmp_path: Path) -> None:
    """The page cache, then."""
    memory = os.memfd_create("disk")
    try:
        os.ftruncate(memory, 1 << 20)
        store = Store.in_file(memory, 1 << 20)
        client = Client(store, threads=False)
        try:
            client.send(Event(WRITE, 0, 9, 1, 2, block(9)))
            client.answers(1)
            assert os.pread(memory, BLOCK, 9 * BLOCK) == block(9)
        finally:
            client.close()
    finally:
        os.close(memory)


WITHOUT = """
import ctypes, os, struct, sys
sys.path.insert(0, sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
# seccomp: io_uring_setup (425) is refused as podman's profile does, everything else allowed
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
loaded = Program(len(lines), ctypes.addressof(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(loaded), 0, 0) == 0
from pathlib import Path
from test_files import BLOCK, Client, Event, READ, WRITE, block
from muenfast.backing import Device, open_device
path = Path(sys.argv[2])
with open_device(Device.parse(str(path))) as backing:
    client = Client(backing.store, threads=False)
    client.send(*(Event(WRITE, 0, i, 1, i, block(i)) for i in range(0, 64, 2)))
    client.answers(32)
    print(any("[io_uring]" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
              if os.path.lexists(f"/proc/self/fd/{fd}")), len(os.listdir("/proc/self/task")) > 2)
    client.close()
assert all(path.read_bytes()[i * BLOCK:(i + 1) * BLOCK] == block(i) for i in range(0, 64, 2))
"""


def test_where_io_uring_is_refused_threads_do_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 * BLOCK))
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(Path(__file__).parent), str(path)], capture_output=True,
                          text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr
