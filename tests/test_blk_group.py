"""Exports that share a thread: everybody is served, and who makes others wait leaves."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Program, run
from helpers import block, eventually
from peer import EVENT_BYTES, HEADER_BYTES, READ, REQUEST_PROTOCOL, ChannelWriter, Event, channel_path

from muenfast import BlockDevice, BlockServer, UsageError
from muenfast._blk import Group, Server
from muenfast._ring import Writer
from muenfast._store import Store
from muenfast.blk import exports_from_lists
from muenfast.export import Crew

BLOCK_BYTES = 4096
SMALL = "0x10000"   # bytes of a channel: 15 elements


class Exports:
    """Channels of several exports, the server in this process."""

    def __init__(self, names: Callable[[str], str]) -> None:
        self._names = names
        self._stack = ExitStack()

    def serve(self, count: int, threads: int | None, device: str = "ram:1M", **lists: str) -> BlockServer:
        self.req = [self._names(f"req{i}") for i in range(count)]
        self.resp = [self._names(f"resp{i}") for i in range(count)]
        configs = exports_from_lists(",".join(self.req), ",".join(self.resp), device=",".join([device] * count),
                                     size=",".join([SMALL] * count), **lists)
        server = BlockServer(configs, threads=threads)
        self._stack.callback(server.close)
        return server

    def device(self, i: int, **options: object) -> BlockDevice:
        device = BlockDevice(self.req[i], self.resp[i], **{"timeout": 20, "size": SMALL, **options})
        self._stack.callback(device.close)
        return device

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def exports(names: Callable[[str], str]) -> Iterator[Exports]:
    exports = Exports(names)
    yield exports
    exports.close()


def serving() -> list[str]:
    """Names of the threads of this process that serve."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("export"))


def forge(name: str, counter: int) -> None:
    """Both write counters of a channel."""
    with open(channel_path(name), "r+b") as file:
        file.seek(48)
        file.write(struct.pack("<QQ", counter, counter))


@pytest.mark.parametrize(("count", "threads", "expected"), [(6, 2, 2), (6, 6, 6), (3, 9, 3), (130, 1, 2), (5, 1, 1)])
def test_exports_share_the_threads_there_are(exports: Exports, count: int, threads: int, expected: int) -> None:
    """No more threads than asked for, but as many as 128 exports each need; a disk for each that works."""
    exports.serve(count, threads)
    assert len(serving()) == expected
    for i in random.Random(count).sample(range(count), min(count, 5)):
        device = exports.device(i)
        device.pwrite(block(i), 0)
        assert device.pread(BLOCK_BYTES, 0) == block(i)
    exports.close()
    eventually(lambda: serving() == [])


def test_a_disk_that_may_wait_shares_with_nobody(exports: Exports, tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"disk{i}").write_bytes(bytes(1 << 16))
    req, resp = [exports._names(f"r{i}") for i in range(4)], [exports._names(f"s{i}") for i in range(4)]
    configs = exports_from_lists(",".join(req), ",".join(resp),
                                 device=f"ram:64K,{tmp_path}/disk0,null:64K,{tmp_path}/disk1")
    with BlockServer(configs, threads=1):
        assert len(serving()) == 3
    with pytest.raises(UsageError, match="thread of its own"), FileServer(tmp_path) as server:
        Group().add(server)


class FileServer:
    """A Server over a file, in plain memory."""

    def __init__(self, place: Path) -> None:
        self._file = open(place / "disk0", "r+b")

    def __enter__(self) -> Server:
        self._server = Server(bytearray(1 << 16), bytearray(1 << 16), Store.in_file(self._file.fileno(), 1 << 16))
        return self._server

    def __exit__(self, *exc: object) -> None:
        self._server.close()
        self._file.close()


def test_twenty_disks_in_two_threads(exports: Exports) -> None:
    """Reads, writes and flushes of all at once, each compared with a model of its own."""
    exports.serve(20, 2, "ram:256K")
    devices = [exports.device(i) for i in range(20)]

    def use(i: int) -> None:
        dice, model = random.Random(i), bytearray(64 * BLOCK_BYTES)
        for _ in range(150):
            first = dice.randrange(64)
            length = dice.randint(1, min(8, 64 - first)) * BLOCK_BYTES
            at = first * BLOCK_BYTES
            if dice.random() < 0.5:
                model[at:at + length] = dice.randbytes(length)
                devices[i].pwrite(model[at:at + length], at)
            else:
                assert devices[i].pread(length, at) == model[at:at + length]
        devices[i].flush()
        assert devices[i].pread(len(model), 0) == model

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(use, range(20)))
    assert len(serving()) == 2


def test_a_client_that_overruns_leaves_the_thread(exports: Exports, caplog: pytest.LogCaptureFixture) -> None:
    """It is served by a thread of its own from then on; the others go on where they are."""
    caplog.set_level(logging.INFO, "muenfast")
    server = exports.serve(3, 1)
    neighbour = exports.device(1)
    assert len(serving()) == 1
    writer = ChannelWriter(exports.req[0], EVENT_BYTES, REQUEST_PROTOCOL)
    try:
        writer.activate()
        eventually(lambda: server.exports[0].server.connected)
        forge(exports.req[0], 40)
        eventually(lambda: len(serving()) == 2)
        neighbour.pwrite(block(7), 0)
        assert neighbour.pread(BLOCK_BYTES, 0) == block(7)
        assert "thread of its own" in caplog.text
    finally:
        writer.deactivate()
        writer.close()
    eventually(lambda: not server.exports[0].server.connected)
    again = exports.device(0)
    again.pwrite(block(9), 0)
    assert again.pread(BLOCK_BYTES, 0) == block(9)


def test_a_client_that_takes_its_counters_back_leaves_the_thread(exports: Exports) -> None:
    server = exports.serve(2, 1)
    neighbour = exports.device(1)
    writer = ChannelWriter(exports.req[0], EVENT_BYTES, REQUEST_PROTOCOL)
    try:
        writer.activate()
        eventually(lambda: server.exports[0].server.connected)
        writer.write(Event(READ, 0, 0, 1, 1).pack())
        eventually(lambda: server.exports[0].server.counters["reads"] == 1)
        forge(exports.req[0], 0)
        eventually(lambda: len(serving()) == 2)
        neighbour.pwrite(block(3), 0)
        assert neighbour.pread(BLOCK_BYTES, 0) == block(3)
    finally:
        writer.close()


def test_a_client_that_starts_anew_all_the_time_leaves_the_thread(exports: Exports) -> None:
    server = exports.serve(2, 1)
    writer = ChannelWriter(exports.req[0], EVENT_BYTES, REQUEST_PROTOCOL)
    try:
        def anew() -> bool:
            before = server.exports[0].server.counters["connections"]
            writer.activate()
            eventually(lambda: server.exports[0].server.counters["connections"] > before)
            return len(serving()) == 2

        eventually(anew)
    finally:
        writer.deactivate()
        writer.close()


def test_a_large_ring_is_not_shared(exports: Exports) -> None:
    """Zeroing it for a new epoch would hold up the others."""
    exports.req, exports.resp = [exports._names(f"q{i}") for i in range(3)], [exports._names(f"p{i}") for i in range(3)]
    configs = exports_from_lists(",".join(exports.req), ",".join(exports.resp), size="1M,8M,1M",
                                 device="ram:64K,ram:64K,ram:64K")
    with BlockServer(configs, threads=1):
        assert len(serving()) == 2


def refuse(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """No more threads of that name are to be had."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith(prefix):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)


@pytest.mark.parametrize(("threads", "prefix"), [(3, "export "), (1, "exports ")])
def test_no_thread_to_begin_with(exports: Exports, monkeypatch: pytest.MonkeyPatch, threads: int, prefix: str) -> None:
    """It is said, and nothing is left."""
    refuse(monkeypatch, prefix)
    with pytest.raises(OSError, match="no thread for `export.*ulimit -u") as error:
        exports.serve(3, threads)
    assert error.value.errno == errno.EAGAIN
    assert serving() == []


def test_no_thread_for_one_that_is_to_leave(exports: Exports, monkeypatch: pytest.MonkeyPatch,
                                            caplog: pytest.LogCaptureFixture) -> None:
    """It stays, which is said, everybody is served on, and it leaves at the next occasion."""
    server = exports.serve(3, 1)
    neighbour = exports.device(1)
    writer = ChannelWriter(exports.req[0], EVENT_BYTES, REQUEST_PROTOCOL)
    try:
        with monkeypatch.context() as patched:
            refuse(patched, "export ")
            writer.activate()
            eventually(lambda: server.exports[0].server.connected)
            forge(exports.req[0], 40)
            eventually(lambda: server.exports[0].server.counters["overruns"] == 1)
            eventually(lambda: "makes others wait, but stays: no thread for `export" in caplog.text)
            neighbour.pwrite(block(7), 0)
            assert neighbour.pread(BLOCK_BYTES, 0) == block(7)
            assert len(serving()) == 1
        forge(exports.req[0], 80)
        eventually(lambda: len(serving()) == 2)
    finally:
        writer.deactivate()
        writer.close()
    assert neighbour.pread(BLOCK_BYTES, 0) == block(7)


def test_who_starts_anew_too_often(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than four times between two looks at names that were due; that a client has left is no start."""
    export = exports.serve(1, 1).exports[0]
    sent: list[str] = []
    monkeypatch.setattr(Crew, "_alone", lambda _self, _export, why: sent.append(why))
    crew = Crew([export])
    for _ in range(2):
        for event in ("connected", "disconnected") * 4:
            crew._happened(export, event)
        assert sent == []
        crew._look(export)
    for event in ("connected", "disconnected") * 2 + ("tick",) + ("incompatible",) * 2:
        crew._happened(export, event)
    assert sent == []
    crew._happened(export, "connected")
    assert sent == ["its client makes others wait"]


def test_what_may_wait_for_a_file_shares_with_nobody(exports: Exports, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a channel or of a RAM disk in a file is read from a disk when it is touched, so are /dev/shm's where
    that is no tmpfs; a large ring is zeroed for each client."""
    req, resp = [exports._names(f"r{i}") for i in range(6)], [exports._names(f"s{i}") for i in range(6)]
    for i in (0, 1):
        (tmp_path / f"channel{i}").write_bytes(bytes(1 << 16))
    req[0], resp[1] = str(tmp_path / "channel0"), str(tmp_path / "channel1")
    configs = exports_from_lists(",".join(req), ",".join(resp),
                                 device=f"ram:64K,ram:64K,ram:64K:{tmp_path}/disk,ram:64K,null:64K,ram:64K",
                                 size="64K,64K,64K,5M,64K,64K")
    with BlockServer(configs, threads=1) as server:
        assert [export.shares for export in server.exports] == [False] * 4 + [True] * 2
        assert len(serving()) == 5
        monkeypatch.setattr("muenfast.shm.filesystem", lambda _: "ext4")
        assert not any(export.shares for export in server.exports)


def test_channels_made_anew_are_followed_in_a_thread_of_their_own(exports: Exports) -> None:
    server = exports.serve(3, 1)
    neighbour = exports.device(1)
    neighbour.pwrite(block(5), 0)
    for name in (exports.req[0], exports.resp[0]):
        Path(channel_path(name)).unlink()
    device = exports.device(0)  # makes them
    device.pwrite(block(6), 0)
    assert device.pread(BLOCK_BYTES, 0) == block(6)
    assert neighbour.pread(BLOCK_BYTES, 0) == block(5)
    assert len(serving()) == 2
    assert server.status()[0]["state"] == "connected"


@pytest.mark.parametrize("bells", [True, False])
def test_a_group_that_slept_wakes_up(exports: Exports, bells: bool) -> None:
    """For whichever of its clients asks, with bells and without."""
    exports.serve(4, 1, bells=bells)  # type: ignore[arg-type]
    devices = [exports.device(i, bells=bells) for i in range(4)]
    for _ in range(2):
        for i, device in enumerate(devices):
            device.pwrite(block(i), 4096)
        eventually(lambda: all(device.client.in_flight == 0 for device in devices))
        for i, device in enumerate(devices):
            assert device.pread(BLOCK_BYTES, 4096) == block(i)


WITHOUT = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
X86, ARM = 0xc000003e, 0xc00000b7     # AUDIT_ARCH_*; futex_waitv has one number on both
program = b"".join(struct.pack("=HBBI", *line) for line in (
    (0x20, 0, 0, 0),                  # load the number of the system call
    (0x15, 0, 1, 449),                # futex_waitv?
    (0x06, 0, 0, 0x00050000 | int(sys.argv[1])),
    (0x06, 0, 0, 0x7fff0000)))        # allow
lines = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
loaded = Program(len(program) // 8, ctypes.addressof(lines))
assert libc.prctl(38, 1, 0, 0, 0) == 0                          # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(loaded), 0, 0) == 0       # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
assert libc.syscall(449, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == int(sys.argv[1])
from muenfast._blk import Group, Server
from muenfast._store import Store
from muenfast._ring import Writer, layout
group, req = Group(), [bytearray(1 << 16) for _ in range(3)]
bells = [bytearray(4096) for _ in range(3)]
for i in range(3):
    group.add(Server(req[i], bytearray(1 << 16), Store.null(4096), request_bell=bells[i]))
writers = [Writer(req[i], size=4120, protocol=layout()["request_protocol"], bell=bells[i]) for i in range(3)]
events = []
while len(events) < 3:
    events += [event for _, event in group.run(1.0)]
assert events == ["connected"] * 3, events
before = group.sleeps
assert group.run(0.3) == []
assert 0 < group.sleeps - before < 2000, group.sleeps - before
writers[2].close()
while not events[3:]:
    events += [event for _, event in group.run(1.0)]
assert events[3:] == ["disconnected"], events
print(group.polls)
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EFAULT])
def test_without_futex_waitv_a_group_polls(number: int) -> None:
    """Before Linux 5.16; where a filter of system calls does not know it; with a bad bell it tries again. It is no busy
    loop: its first pause has 20 us, each later one twice that, up to 1 ms."""
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(number)], capture_output=True, text=True, timeout=60,
                          check=False)
    assert (done.returncode, done.stdout) == (0, f"{number != errno.EFAULT}\n"), done.stderr


class Memory:
    """Servers of one group and their clients' writers, in plain memory."""

    def __init__(self, count: int, bells: bool) -> None:
        self.group = Group()
        self.req = [bytearray(1 << 16) for _ in range(count)]
        self.resp = [bytearray(1 << 16) for _ in range(count)]
        self.bells = [bytearray(4096) if bells else None for _ in range(count)]
        self.servers = [Server(req, resp, Store.null(1 << 20), request_bell=bell)
                        for req, resp, bell in zip(self.req, self.resp, self.bells, strict=True)]
        for server in self.servers:
            self.group.add(server)

    def connect(self, i: int) -> Writer:
        """A client's writer, which its server has seen."""
        writer = Writer(self.req[i], size=EVENT_BYTES, protocol=REQUEST_PROTOCOL, bell=self.bells[i])
        eventually(lambda: (self.servers[i], "connected") in self.group.run(0.1))
        return writer

    def ask(self, i: int, writer: Writer, number: int = 1) -> None:
        """One read, answered."""
        before = self.servers[i].counters["reads"]
        writer.write(Event(READ, 0, 0, 1, number).pack())
        eventually(lambda: self.group.run(0.0) or self.servers[i].counters["reads"] > before)


def test_an_idle_group_sleeps() -> None:
    """On all bells for up to 100 ms; nobody's first client is waited for more often than every 10 ms."""
    memory = Memory(20, bells=True)
    writers = [memory.connect(i) for i in range(20)]
    memory.ask(7, writers[7])
    before, sleeps = memory.group.sleeps, memory.servers[3].counters["sleeps"]
    for _ in range(4):
        assert memory.group.run(0.5) == []
    assert 0 < memory.group.sleeps - before <= 4 * 7
    assert memory.servers[3].counters["sleeps"] - sleeps == memory.group.sleeps - before
    waiting = Memory(20, bells=False)
    for _ in range(4):
        assert waiting.group.run(0.25) == []
    assert 0 < waiting.group.sleeps <= 4 * 28


def test_a_restart_under_the_same_epoch_is_noticed_in_a_sleep() -> None:
    """A client without a bell that began anew, with as many requests as before: only the last one's bytes differ."""
    memory = Memory(2, bells=False)
    writer = memory.connect(0)
    memory.ask(0, writer)
    found: list[tuple[Server, str]] = []
    thread = threading.Thread(target=lambda: found.extend(memory.group.run(3600)))
    sleeps = memory.group.sleeps
    thread.start()
    try:
        eventually(lambda: memory.group.sleeps > sleeps)
        memory.req[0][HEADER_BYTES + 16:HEADER_BYTES + 24] = bytes(8)
        eventually(lambda: found)
    finally:
        memory.servers[1].stop()
        thread.join()
    assert found == [(memory.servers[0], "connected")]


def test_the_grace_after_an_overrun_holds_up_nobody() -> None:
    """While the answers already given can be read, 10 ms, the group goes on."""
    memory = Memory(2, bells=True)
    writers = [memory.connect(i) for i in range(2)]
    turns = []
    for number in range(1, 21):
        memory.ask(0, writers[0], number)
        epoch = memory.resp[0][8:16]
        forged = 1 << 20 | number << 8
        memory.req[0][48:64] = struct.pack("<QQ", forged, forged)
        eventually(lambda: (memory.servers[0], "overrun") in memory.group.run(0.0))
        turns.append(0)
        while memory.resp[0][8:16] == epoch:
            memory.ask(1, writers[1], number)
            turns[-1] += 1
        writers[0].close()
        eventually(lambda: (memory.servers[0], "disconnected") in memory.group.run(0.1))
        writers[0] = memory.connect(0)
    assert max(turns) > 1


def test_one_export_ends_while_the_others_go_on(exports: Exports) -> None:
    server = exports.serve(3, 1)
    devices = [exports.device(i) for i in (0, 2)]
    gone = server.exports[1]
    gone.close()
    for i, device in enumerate(devices):
        device.pwrite(block(i), 0)
        assert device.pread(BLOCK_BYTES, 0) == block(i)
    assert not gone.server.connected
    assert len(serving()) == 1


CLIENT = """
import sys
from muenfast import BlockDevice
device = BlockDevice(sys.argv[1], sys.argv[2], timeout=20, size="0x10000")
print("connected", flush=True)
i = 0
while True:
    i += 1
    device.pwrite(i.to_bytes(8, "little") * 512, i % 64 * 4096)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_is_killed_or_stops(exports: Exports, number: int) -> None:
    """In the midst of its writes: the others' goes on, and the next client is served where it was."""
    server = exports.serve(3, 1)
    neighbour = exports.device(1)
    for round_ in range(3):
        client = subprocess.Popen([sys.executable, "-c", CLIENT, exports.req[0], exports.resp[0]],
                                  stdout=subprocess.PIPE, text=True)
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "connected\n"
            writes = server.exports[0].server.counters["writes"]
            eventually(lambda writes=writes: server.exports[0].server.counters["writes"] > writes + 20)
            client.send_signal(number)
            neighbour.pwrite(block(round_), 4096)
            assert neighbour.pread(BLOCK_BYTES, 4096) == block(round_)
        finally:
            client.kill()
            client.communicate()
    device = exports.device(0)
    device.pwrite(block(5), 0)
    assert device.pread(BLOCK_BYTES, 0) == block(5)
    for i in range(1, 64):      # a block is whole, or was never written
        data = device.pread(BLOCK_BYTES, i * BLOCK_BYTES)
        assert data == data[:8] * 512
    exports.close()
    assert run("stat").returncode == 0      # and what the killed left in the books goes


def test_a_server_belongs_to_one_thread(exports: Exports) -> None:
    """Of a group or by itself."""
    group = Group()
    server = Server(bytearray(1 << 16), bytearray(1 << 16), Store.null(4096))
    assert group.run(0.0) == []
    group.add(server)
    for call in (lambda: group.add(server), lambda: server.run(0.0), server.close, lambda: Group().add(server)):
        with pytest.raises(UsageError, match=r"another thread|stop this Server"):
            call()
    assert len(group) == 1
    server.stop()
    assert group.run(5.0) == [(server, "stopped")]
    group.remove(server)
    with pytest.raises(ValueError, match="not in list"):
        group.remove(server)
    server.close()
    with pytest.raises(UsageError, match="closed"):
        group.add(server)


def test_the_option(names: Callable[[str], str], program: Callable[..., Program]) -> None:
    """--threads 1 serves all disks; a wrong number is named; the client has no such option."""
    req, resp = [names(f"req{i}") for i in range(3)], [names(f"resp{i}") for i in range(3)]
    lists = ("--req", ",".join(req), "--resp", ",".join(resp))
    for value in ("0", "x", "1025", "-1"):
        done = run("blk", *lists, "--threads", value)
        assert done.returncode == 2
        assert "--threads" in done.stderr
    assert run("blk", "--client", *lists, "--threads", "2").returncode == 2
    server = program("blk", *lists, "--threads", "1")

    def threads() -> int:
        return len(os.listdir(f"/proc/{server.pid}/task"))

    eventually(lambda: threads() == 5)      # main, control, watch, names, the crew; one that sweeps may end after `ready`
    with ExitStack() as stack:
        for i in range(3):
            device = stack.enter_context(BlockDevice(req[i], resp[i], timeout=20))
            device.pwrite(block(i), 0)
            assert device.pread(BLOCK_BYTES, 0) == block(i)
    assert threads() == 5
    assert server.end()[0] == 0
