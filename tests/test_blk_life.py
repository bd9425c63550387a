"""muenfast on both sides: processes that end and are killed at any time, and what is left of the data."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import PREFIX, Program, run
from helpers import block, eventually

from muenfast import BlockDevice

BLOCK_BYTES = 4096
BLOCKS = 256


class Link:
    """A pair of channel names, its servers (processes) and its devices (in this process)."""

    def __init__(self, names: Callable[[str], str], program: Callable[..., Program]) -> None:
        self.req, self.resp = names("req"), names("resp")
        self._program = program
        self._stack = ExitStack()

    def server(self, device: str, *more: str) -> Program:
        server = self._program("blk", "--req", self.req, "--resp", self.resp, "--device", device, *more)
        self._stack.callback(server.end)
        return server

    def device(self, **options: Any) -> BlockDevice:
        device = BlockDevice(self.req, self.resp, **{"timeout": 20, **options})
        self._stack.callback(device.close)
        return device

    def close(self) -> None:
        """Cleanly: what a killed process left in the books goes with the next look at them."""
        self._stack.close()
        run("stat")


@pytest.fixture
def link(names: Callable[[str], str], program: Callable[..., Program]) -> Iterator[Link]:
    link = Link(names, program)
    yield link
    link.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk image of zeros."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    return path


class Load:
    """Threads that write and flush, each in blocks of its own. Every write says block and version.

    Invariant: sent[i] >= what block i says >= flushed[i], whatever happens to the server.
    """

    def __init__(self, device: BlockDevice, threads: int = 4) -> None:
        self.sent, self.done, self.flushed = [0] * BLOCKS, [0] * BLOCKS, [0] * BLOCKS
        self.errors: list[OSError] = []
        self.unexpected: list[BaseException] = []
        self._device, self._stop = device, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(range(i, BLOCKS, threads), i), daemon=True)
                         for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, mine: range, seed: int) -> None:
        dice = random.Random(seed)
        while not self._stop.is_set():
            try:
                act = dice.random()
                i = dice.choice(mine)
                if act < 0.7:
                    self.sent[i] += 1
                    self._device.pwrite(block(i << 32 | self.sent[i]), i * BLOCK_BYTES)
                    self.done[i] = self.sent[i]
                elif act < 0.95:
                    found = self._device.pread(BLOCK_BYTES, i * BLOCK_BYTES)
                    self.check(i, found, self.done[i])
                else:
                    before = [self.done[i] for i in mine]
                    self._device.flush()
                    for i, version in zip(mine, before, strict=True):
                        self.flushed[i] = version
            except OSError as error:
                self.errors.append(error)
                time.sleep(0.005)
            except BaseException as error:
                self.unexpected.append(error)
                return

    def check(self, i: int, found: bytes, least: int) -> None:
        """Block i is whole, its own, and neither older than `least` nor of the future."""
        value = int.from_bytes(found[:8], "little")
        assert found == block(value), f"block {i} is torn"
        assert value == 0 or value >> 32 == i, f"block {i} holds another's data"
        version = value & 0xFFFFFFFF
        assert least <= version <= self.sent[i], f"block {i} has version {version}, not {least} to {self.sent[i]}"

    def progress(self) -> int:
        return sum(self.done)

    def end(self) -> None:
        """Every call returns, and none raised what it must not."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a request hangs"
        assert not self.unexpected, self.unexpected

    def verify(self, content: bytes) -> None:
        """All that was acknowledged is in the disk: a server's end costs what it had not answered, at most."""
        for i in range(BLOCKS):
            self.check(i, content[i * BLOCK_BYTES:(i + 1) * BLOCK_BYTES], max(self.flushed[i], self.done[i]))


# ------------------------------------------------------------------ the server goes


def test_a_killed_server_with_a_file(link: Link, disk: Path) -> None:
    """Requests wait for the next server, all complete, and everything acknowledged is there."""
    server, device = link.server(str(disk)), link.device()
    load = Load(device)
    for _ in range(3):
        seen = load.progress()
        eventually(lambda: load.progress() > seen + 200)  # noqa: B023
        server.end(signal.SIGKILL)
        seen = load.progress()
        server = link.server(str(disk))
        eventually(lambda: load.progress() > seen + 200)  # noqa: B023
    load.end()
    assert not load.errors
    assert device.status()["counters"]["lives"] == 4
    load.verify(device.pread(device.size, 0))
    load.verify(disk.read_bytes())


def test_a_killed_server_with_a_ram_disk(link: Link) -> None:
    """Its data died with it: everything fails with EIO from then on, and nobody is shown an empty disk."""
    server, device = link.server("ram:1M"), link.device()
    load = Load(device)
    eventually(lambda: load.progress() > 200)
    server.end(signal.SIGKILL)
    link.server("ram:1M")
    eventually(lambda: device.failure is not None)
    load.end()
    assert {error.errno for error in load.errors} == {errno.EIO}
    with pytest.raises(OSError) as caught:
        device.pread(1, 0)
    assert caught.value.errno == errno.EIO
    device.close()
    assert link.device().pread(1, 0) == b"\0"  # a new device may have the new disk


def test_a_named_ram_disk_survives(link: Link, names: Callable[[str], str]) -> None:
    """ram:SIZE:NAME is adopted by the next server with all it holds, after a kill and after an end."""
    name = names("disk")
    device_text = f"ram:1M:{name}"
    server, device = link.server(device_text), link.device()
    load = Load(device)
    for number in (signal.SIGKILL, signal.SIGTERM):
        seen = load.progress()
        eventually(lambda: load.progress() > seen + 200)  # noqa: B023
        server.end(number)
        server = link.server(device_text)
    seen = load.progress()
    eventually(lambda: load.progress() > seen + 200)
    load.end()
    assert not load.errors
    load.verify(device.pread(device.size, 0))
    device.close()
    assert server.end()[0] == 0
    assert run("chan", "rm", name).returncode == 0


def test_a_server_that_ends_and_returns(link: Link, disk: Path) -> None:
    """SIGTERM means "back later": status 0, and the device goes on with the next server."""
    server, device = link.server(str(disk)), link.device()
    load = Load(device)
    for _ in range(3):
        seen = load.progress()
        eventually(lambda: load.progress() > seen + 200)  # noqa: B023
        assert server.end(signal.SIGTERM)[0] == 0
        server = link.server(str(disk))
    seen = load.progress()
    eventually(lambda: load.progress() > seen + 200)
    load.end()
    assert not load.errors
    load.verify(device.pread(device.size, 0))


def test_another_disk_at_the_old_place(link: Link, disk: Path, tmp_path: Path) -> None:
    """A server that returns with another file of the same size is given nothing."""
    other = tmp_path / "other"
    other.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    server, device = link.server(str(disk)), link.device()
    load = Load(device)
    eventually(lambda: load.progress() > 200)
    server.end(signal.SIGKILL)
    link.server(str(other))
    eventually(lambda: device.failure is not None)
    load.end()
    assert other.read_bytes() == bytes(BLOCKS * BLOCK_BYTES)
    load.verify(disk.read_bytes())


def test_peer_loss_fail(link: Link, disk: Path) -> None:
    """on_peer_loss="fail": requests fail soon after the server died, those that come while it is away at once, and
    succeed when it is back."""
    server, device = link.server(str(disk)), link.device(on_peer_loss="fail")
    device.pwrite(block(1), 0)
    time.sleep(0.5)  # so that its claim was seen
    server.end(signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(OSError) as caught:
        device.pwrite(block(2), 0)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        device.pread(1, 0)
    assert time.monotonic() - begin < 20
    link.server(str(disk))
    eventually(lambda: device.status()["state"] == "ready")
    device.pwrite(block(3), 0)
    assert device.pread(BLOCK_BYTES, 0) == block(3)


def test_peer_loss_timeout(link: Link, disk: Path) -> None:
    """on_peer_loss="timeout:SECONDS": requests fail after that time, whether the server died or merely stands still;
    a device that was not asked anything has lost nothing."""
    server, device = link.server(str(disk)), link.device(on_peer_loss="timeout:0.5")
    device.pwrite(block(1), 0)
    os.kill(server.pid, signal.SIGSTOP)
    stat = Path(f"/proc/{server.pid}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    with pytest.raises(OSError) as caught:
        device.pwrite(block(2), BLOCK_BYTES)
    assert caught.value.errno == errno.EIO
    os.kill(server.pid, signal.SIGCONT)
    eventually(lambda: device.status()["state"] == "ready")
    assert device.pread(BLOCK_BYTES, 0) == block(1)
    server.end(signal.SIGKILL)
    with pytest.raises(OSError):
        device.pread(BLOCK_BYTES, 0)
    link.server(str(disk))
    eventually(lambda: device.status()["state"] == "ready")
    assert device.pread(BLOCK_BYTES, 0) == block(1)


def test_channels_made_anew_under_both(link: Link, disk: Path) -> None:
    """Names removed by force and made anew: both sides follow, once nothing is said any more."""
    server, device = link.server(str(disk)), link.device()
    device.pwrite(block(1), 0)
    assert run("chan", "rm", "--force", link.req, link.resp).returncode == 0
    assert device.pread(BLOCK_BYTES, 0) == block(1)  # the memory is still there
    assert run("chan", "create", link.req, link.resp).returncode == 0
    inodes = {os.stat(f"/dev/shm/{name}").st_ino for name in (link.req, link.resp)}
    eventually(lambda: {device.connection._ends[0].region.inode, device.connection._ends[1].region.inode} == inodes)
    assert device.pread(BLOCK_BYTES, 0) == block(1)
    device.pwrite(block(2), 0)
    assert device.pread(BLOCK_BYTES, 0) == block(2)
    device.close()
    assert server.end()[0] == 0
    assert run("chan", "rm", link.req, link.resp).returncode == 0


# ------------------------------------------------------------------ the client goes


_CLIENT = """
import os, struct, sys, threading
from muenfast import BlockDevice
req, resp, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = BlockDevice(req, resp, timeout=30)
lock = threading.Lock()
def work(first):
    i, version = first, seed
    while True:
        version += 1
        device.pwrite(struct.pack("<Q", i << 32 | version) * 512, i * 4096)
        with lock:
            os.write(1, struct.pack("<II", i, version))
        i = (i + 4) % 256
for first in range(4):
    threading.Thread(target=work, args=(first,)).start()
"""


class Writer:
    """A client process that writes all the time and says what was acknowledged, until it is killed."""

    def __init__(self, link: Link, seed: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", _CLIENT, link.req, link.resp, str(seed)],
                                        stdout=subprocess.PIPE)

    def wait_busy(self, least: int = 100) -> None:
        """Until it has had `least` answers; they still count."""
        assert self.process.stdout is not None
        self._first = self.process.stdout.read(8 * least)
        assert len(self._first) == 8 * least

    def kill(self) -> dict[int, int]:
        """The last acknowledged version of each block."""
        self.process.kill()
        assert self.process.stdout is not None
        said = self._first + self.process.stdout.read()
        self.process.stdout.close()
        self.process.wait()
        return {i: v for i, v in struct.iter_unpack("<II", said[:len(said) // 8 * 8])}


def _holds(content: bytes, acknowledged: dict[int, int]) -> None:
    """Each block is whole and not older than what was acknowledged."""
    for i in range(BLOCKS):
        found = content[i * BLOCK_BYTES:(i + 1) * BLOCK_BYTES]
        value = int.from_bytes(found[:8], "little")
        assert found == block(value), f"block {i} is torn"
        assert value == 0 or value >> 32 == i
        assert value & 0xFFFFFFFF >= acknowledged.get(i, 0), f"block {i} lost an acknowledged write"


def test_killed_clients_follow_each_other(link: Link, disk: Path) -> None:
    """A client is killed amid its writes, the next connects at once: no write that was acknowledged is lost, no block
    is torn, and nothing of the dead one's lands on top of the new one's."""
    server = link.server(str(disk))
    acknowledged: dict[int, int] = {}
    for life in range(5):
        writer = Writer(link, life << 24)
        try:
            writer.wait_busy()
        finally:
            said = writer.kill()
        acknowledged.update(said)
        device = link.device()
        _holds(device.pread(device.size, 0), acknowledged)
        device.close()
    assert server.end()[0] == 0
    _holds(disk.read_bytes(), acknowledged)


def test_both_killed(link: Link, disk: Path) -> None:
    """Neither finds more than what is in memory and file, in whatever order they return."""
    acknowledged: dict[int, int] = {}
    for life in range(4):
        server = link.server(str(disk))
        writer = Writer(link, life << 24)
        try:
            writer.wait_busy()
            if life % 2:
                server.process.kill()
        finally:
            acknowledged.update(writer.kill())
        server.end(signal.SIGKILL)
    server = link.server(str(disk))
    device = link.device()
    _holds(device.pread(device.size, 0), acknowledged)
    device.close()
    assert server.end()[0] == 0


@pytest.mark.stress
def test_twenty_kills(link: Link, disk: Path) -> None:
    """Server or its connection ends at random moments, by kill or by signal, under a load that flushes: every call
    returns, what was flushed is there, what was read was right at any time."""
    dice = random.Random(20)
    server, device = link.server(str(disk)), link.device()
    load = Load(device)
    for round_ in range(20):
        time.sleep(dice.random() * 0.1)
        server.end(signal.SIGTERM if round_ % 4 == 3 else signal.SIGKILL)
        if dice.random() < 0.3:
            time.sleep(dice.random() * 0.3)
        server = link.server(str(disk))
    seen = load.progress()
    eventually(lambda: load.progress() > seen + 100)
    load.end()
    assert not load.errors
    load.verify(device.pread(device.size, 0))
    device.close()
    assert server.end()[0] == 0
    load.verify(disk.read_bytes())


def test_nothing_is_left(link: Link) -> None:
    """After clean ends, in either order, no region and no bell of the connection exists."""
    for first in ("server", "device"):
        server, device = link.server("ram:1M"), link.device()
        device.pwrite(b"x", 0)
        assert any(PREFIX in name for name in os.listdir("/dev/shm"))
        if first == "server":
            assert server.end()[0] == 0
            device.close()
        else:
            device.close()
            assert server.end()[0] == 0
        assert not any(PREFIX in name for name in os.listdir("/dev/shm"))
