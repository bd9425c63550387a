"""Flushes: none is answered before the disk's own, and one that fails fails. Lost power: test_crash."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Program, unique
from helpers import block, eventually
from peer import BLOCK_BYTES

from muenfast import BlockDevice


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
