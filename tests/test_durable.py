"""Flushes: none is answered before the disk's own, and a disk that loses power then keeps every file that was fsynced."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import Program, unique
from helpers import block, eventually
from peer import BLOCK_BYTES, COMMAND, COMMAND_SYNC, WRITE, Event, InlineServer
from test_device import command, mounted, unmounted

from muenfast import BlockDevice
from muenfast.attach import fuse

__all__ = ["unmounted"]     # a fixture

Start = Callable[..., Program]

# seccomp refuses io_uring_setup, as the profiles of some containers do: files are served by threads then.
THREADS = """
import ctypes, runpy, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(lines), ctypes.addressof(program))), 0, 0) == 0
runpy.run_module("muenfast", run_name="__main__")
"""


class Wrapped(Program):
    """A `muenfast` process started by way of other words."""

    def __init__(self, *words: str, before: list[str]) -> None:
        self.process = subprocess.Popen([*before, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        start_new_session=True)
        self.lines = []
        self.wait_ready()


@pytest.fixture
def wrapped() -> Iterator[Callable[..., Wrapped]]:
    started: list[Wrapped] = []

    def start(*words: str, before: list[str]) -> Wrapped:
        new = Wrapped.__new__(Wrapped)
        started.append(new)
        new.__init__(*words, before=before)  # type: ignore[misc]
        return new

    yield start
    for one in reversed(started):
        if hasattr(one, "process") and one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.fixture(params=[False, True], ids=["inline", "shm"])
def lists(request: pytest.FixtureRequest) -> list[str]:
    return ["--req", unique("req"), "--resp", unique("resp"), *(["--shm", unique("shm")] if request.param else [])]


def device(lists: list[str]) -> BlockDevice:
    return BlockDevice(lists[1], lists[3], shm=lists[5] if len(lists) > 4 else None, timeout=20)


# ------------------------------------------------------------------ system calls


def traced(log: Path, *inject: str) -> list[str]:
    """strace of the server's disk I/O; without io_uring, for that leaves no calls to see."""
    return ["strace", "-D", "-f", "-qq", "-y", "-o", str(log), "-e", "trace=io_uring_setup,pwrite64,fdatasync",
            "-e", "inject=io_uring_setup:error=EPERM", *(word for each in inject for word in ("-e", f"inject={each}")),
            sys.executable, "-m", "muenfast"]


@contextmanager
def traceable(log: Path) -> Iterator[None]:
    """Until the tracer, which belongs to nobody, has ended as well."""
    yield
    needle = str(log).encode()
    eventually(lambda: not any(needle in cmdline for cmdline in _cmdlines()))


def _cmdlines() -> Iterator[bytes]:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield entry.read_bytes()
        except OSError:
            continue


def _can_trace() -> bool:
    return shutil.which("strace") is not None and subprocess.run(
        ["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


needs_strace = pytest.mark.skipif(not _can_trace(), reason="needs strace, and ptrace")


def calls(log: Path, image: Path) -> list[str]:
    """What was done to the image, by name, in order: "fdatasync" where it began, "fdatasync done" where it returned."""
    found, waiting = [], {}
    for line in log.read_text().splitlines():
        pid, _, text = line.partition(" ")
        text = text.strip()
        if text.startswith("<... "):
            name = text.split()[1]
            if waiting.pop(pid, False) and re.search(r"= \d+", text):
                found.append(f"{name} done")
        elif f"<{image}>" in text:
            name = text.partition("(")[0]
            found.append(name)
            if "<unfinished" in text:
                waiting[pid] = True
            elif re.search(r"\) += \d+", text):
                found.append(f"{name} done")
    return found


@needs_strace
def test_a_flush_is_answered_behind_fdatasync(wrapped: Callable[..., Wrapped], tmp_path: Path, lists: list[str]) -> None:
    """fdatasync is held up before it begins: when flush() returns, it has returned; and it began behind every write."""
    image, log = tmp_path / "image", tmp_path / "log"
    image.write_bytes(bytes(64 * BLOCK_BYTES))
    with traceable(log):
        server = wrapped("blk", *lists, "--device", str(image), before=traced(log, "fdatasync:delay_enter=150000"))
        with device(lists) as disk:
            for turn in range(1, 5):
                disk.pwrite_many([2 * i * BLOCK_BYTES for i in range(8)], block(turn) * 8)
                disk.flush()
                done = calls(log, image)
                assert done.count("fdatasync done") == turn, done
                last = max(i for i, name in enumerate(done) if name == "fdatasync")
                assert "pwrite64" in done[:last] and "pwrite64" not in done[last:]
                assert done[:last].count("pwrite64 done") == done[:last].count("pwrite64")
        assert server.end()[0] == 0


@needs_strace
def test_a_flush_that_fails_is_not_answered_as_done(wrapped: Callable[..., Wrapped], tmp_path: Path,
                                                    lists: list[str]) -> None:
    """fdatasync that returns EIO is EIO to whoever flushed, each time; what comes later is as it should be."""
    image, log = tmp_path / "image", tmp_path / "log"
    image.write_bytes(bytes(64 * BLOCK_BYTES))
    with traceable(log):
        server = wrapped("blk", *lists, "--device", str(image), before=traced(log, "fdatasync:error=EIO:when=1..2"))
        with device(lists) as disk:
            disk.pwrite(block(1), 0)
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    disk.flush()
                assert caught.value.errno == errno.EIO
            disk.flush()
        assert server.end()[0] == 0


# ------------------------------------------------------------------ power


class Log(InlineServer):
    """A disk that logs what is done to it, and takes its time for a flush. The log: (block, data), or None for a flush that
    is done, so that all before it is durable."""

    def __init__(self, req: str, resp: str, blocks: int) -> None:
        super().__init__(req, resp, bytearray(blocks * BLOCK_BYTES))
        self.log: list[tuple[int, bytes] | None] = []

    def _execute(self, request: Event) -> Event:
        answer = super()._execute(request)
        if request.kind == WRITE and answer.error == 0:
            self.log.append((request.id, request.data))
        elif (request.kind, request.id) == (COMMAND, COMMAND_SYNC):
            time.sleep(0.004)
            self.log.append(None)
        return answer

    def after_power_loss(self, at: int, dice: random.Random) -> bytearray:
        """What such a disk holds when power goes at that place of the log: all up to the last flush, and of what was
        written later some."""
        durable = max((i for i in range(at) if self.log[i] is None), default=0)
        content = bytearray(self.blocks * BLOCK_BYTES)
        for i, entry in enumerate(self.log[:at]):
            if entry is not None and (i < durable or dice.random() < 0.5):
                content[entry[0] * BLOCK_BYTES:(entry[0] + 1) * BLOCK_BYTES] = entry[1]
        return content


@contextmanager
def logging_disk(lists: list[str], size: int) -> Iterator[Log]:
    """Served by a plain peer, which is in nobody's books."""
    disk = Log(lists[1], lists[3], size // BLOCK_BYTES)
    try:
        with disk.running():
            yield disk
    finally:
        disk.close()
        for name in (lists[1], lists[3]):
            if os.path.exists(f"/dev/shm/{name}"):
                os.unlink(f"/dev/shm/{name}")


class Writers:
    """Threads that write files and fsync them. saved: (place of the log behind the fsync, name, contents)."""

    def __init__(self, directory: Path, disk: Log) -> None:
        self.saved: list[tuple[int, str, bytes]] = []
        self.problems: list[BaseException] = []
        self._directory, self._disk, self._stop = directory, disk, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(k,)) for k in range(3)]
        for thread in self._threads:
            thread.start()

    def _run(self, k: int) -> None:
        dice = random.Random(k)
        try:
            for n in range(1000):
                if self._stop.is_set():
                    return
                name, data = f"file{k}-{n}", dice.randbytes(dice.choice((1, 4096, 10_000, 40_000)))
                with open(self._directory / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                fd = os.open(self._directory, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
                self.saved.append((len(self._disk.log), name, data))
        except BaseException as error:
            self.problems.append(error)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not self.problems


needs_devices = [pytest.mark.root, pytest.mark.fuse, pytest.mark.stress,
                 pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]


class Stack:
    """ext4 on a client's device, on an export, on another client's device (or a file on an ext4 there), on a Log."""

    def __init__(self, program: Start, place: Path) -> None:
        self._program, self._place = program, place

    def run(self, start: Callable[..., Program], lists: list[str], below: str) -> None:
        """start: of the export in the middle."""
        under = ["--req", unique("lowreq"), "--resp", unique("lowresp")]
        with logging_disk(under, 24 << 20) as self.disk:
            low = self._program("blk", "--client", *under)
            target = low.lines[0].split()[4]
            with ExitStack() as stack:
                if below == "file":
                    command("mkfs.ext4", "-q", target)
                    stack.enter_context(mounted(target, self._place / "low"))
                    target = str(self._place / "low" / "image")
                    with open(target, "wb") as file:
                        file.truncate(14 << 20)     # all holes: to be durable, its blocks' places must be, too
                server = start("blk", *lists, "--device", target)
                self.uring = any("[io_uring]" in os.readlink(fd) for fd in Path(f"/proc/{server.pid}/fd").iterdir()
                                 if os.path.lexists(fd))
                client = self._program("blk", "--client", *lists)
                node = client.lines[0].split()[4]
                command("mkfs.ext4", "-q", "-b", "4096", node)
                with mounted(node, self._place / "top"):
                    writers, self.begin = Writers(self._place / "top", self.disk), len(self.disk.log)
                    eventually(lambda: len(writers.saved) >= 45 or writers.problems, 60)
                    writers.end()
                assert client.end()[0] == 0
                assert server.end()[0] == 0
            assert low.end()[0] == 0
        self.saved = sorted(writers.saved)

    def lost(self, below: str, at: int, dice: random.Random) -> list[str]:
        """Files that were fsynced before power went at that place of the log, and are not there, or not so. Raises
        AssertionError where a file system cannot be mounted or fsck finds something."""
        image = self._place / "lost"
        image.write_bytes(self.disk.after_power_loss(at, dice))
        with ExitStack() as stack:
            inner = image
            if below == "file":
                stack.enter_context(mounted(image, self._place / "lostlow", "-o", "loop"))
                inner = self._place / "lostlow" / "image"
            with mounted(inner, self._place / "losttop", "-o", "loop") as top:
                found = [name for since, name, data in self.saved
                         if since <= at and (not (top / name).exists() or (top / name).read_bytes() != data)]
            command("fsck.ext4", "-f", "-n", inner)
        if below == "file":
            command("fsck.ext4", "-f", "-n", image)
        return found


class TestPowerLoss:
    """A disk that loses, with power, what was not flushed."""

    pytestmark = needs_devices

    @pytest.mark.parametrize("below", ["disk", "file"])
    @pytest.mark.parametrize("threads", [False, True], ids=["io_uring", "threads"])
    def test_nothing_that_was_fsynced_is_lost(self, program: Start, wrapped: Callable[..., Wrapped], tmp_path: Path,
                                              threads: bool, below: str) -> None:
        """At each moment the journal makes the file system whole, fsck finds nothing, and every file whose fsync had
        returned is there. By io_uring inline, by threads over a shared buffer: each engine has both ways, in one place."""
        lists = ["--req", unique("req"), "--resp", unique("resp"), *(["--shm", unique("shm")] if threads else [])]
        start = functools.partial(wrapped, before=[sys.executable, "-c", THREADS]) if threads else program
        stack, dice = Stack(program, tmp_path), random.Random(5)
        stack.run(start, lists, below)
        assert stack.uring != threads
        for at in moments(stack, dice):
            assert stack.lost(below, at, dice) == [], at

    @needs_strace
    def test_a_flush_that_is_skipped_is_noticed(self, program: Start, wrapped: Callable[..., Wrapped],
                                                tmp_path: Path) -> None:
        """The control: a server whose fdatasync does nothing."""
        lists, stack, dice = ["--req", unique("req"), "--resp", unique("resp")], Stack(program, tmp_path), random.Random(6)
        with traceable(tmp_path / "log"):
            stack.run(functools.partial(wrapped, before=traced(tmp_path / "log", "fdatasync:retval=0")), lists, "disk")
        found = []
        for at in moments(stack, dice):
            try:
                found += stack.lost("disk", at, dice)
            except (AssertionError, OSError) as broken:     # it does not mount; what is there cannot be read
                found.append(str(broken))
        assert found


def moments(stack: Stack, dice: random.Random) -> list[int]:
    """Places in the log: right behind some fsyncs, and any."""
    return [*(at for at, _, _ in dice.sample(stack.saved, 5)),
            *(dice.randrange(stack.begin, len(stack.disk.log)) for _ in range(4))]
