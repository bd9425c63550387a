"""The front end's FUSE session by itself, without a loop device: what the mount shows, what it refuses, how it ends."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import eventually, no_ring

from muenfast._target import Memory, Target
from muenfast.attach import fuse, fuseuring

try:
    from muenfast.attach._fuse import mount
except ImportError:
    pass

pytestmark = [pytest.mark.root, pytest.mark.fuse,
              pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]

BLOCKS = 64
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16    # uapi/linux/falloc.h
WAYS = {"plain": {"plain": True}, "pump": {"ring": False}, "ring": {}}
Start = Callable[..., Any]


@pytest.fixture(params=WAYS)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """A session of that target in tmp_path/mnt, served, each way of taking requests; ended in the end."""
    if request.param == "ring" and (reason := no_ring()):
        pytest.skip(reason)
    (tmp_path / "mnt").mkdir()
    with ExitStack() as stack:
        def started(target: Target, mounted: Callable[[], tuple[int, int, int]] | None = None, **options: Any) -> Any:
            with fuseuring.offered(tmp_path):
                disk = fuse.FuseDisk(target, str(tmp_path / "mnt"), mounted=mounted and mounted(), **WAYS[request.param],
                                     **options)
            thread = threading.Thread(target=disk.run, name="session")
            thread.start()

            def end() -> None:
                if thread.is_alive():
                    disk.unmount()
                    disk.exit()
                thread.join(20)
                assert not thread.is_alive()
                disk.close()
                assert os.listdir(tmp_path / "mnt") == []

            stack.callback(end)
            assert disk.ring == (request.param == "ring") and not disk.attaching
            return disk

        yield started


def refused(number: int, call: Callable[..., object], *words: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*words)
    assert caught.value.errno == number


def contents(path: Path) -> bytes:
    """Reads of whole blocks, which read_bytes() does not make."""
    with open(path, "rb", buffering=0) as file:
        return file.read(BLOCKS * 4096)


def fallocate(fd: int, mode: int, start: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_int64(start), ctypes.c_int64(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_a_folder_with_one_file(start: Start, tmp_path: Path) -> None:
    """Nothing else is there, can be made, or changes."""
    start(Memory(BLOCKS))
    folder, disk = tmp_path / "mnt", tmp_path / "mnt/disk"
    assert os.listdir(folder) == ["disk"]
    there = os.stat(folder)
    assert stat.S_ISDIR(there.st_mode) and stat.S_IMODE(there.st_mode) == 0o500
    there = os.stat(disk)
    assert (stat.S_ISREG(there.st_mode), stat.S_IMODE(there.st_mode), there.st_size) == (True, 0o600, BLOCKS * 4096)
    assert not (folder / "other").exists()
    refused(errno.EPERM, os.chmod, disk, 0o666)
    refused(errno.EPERM, os.truncate, disk, 4096)
    refused(errno.ENOSYS, os.mkdir, folder / "more")


def test_zeros_and_holes(start: Start, tmp_path: Path) -> None:
    start(Memory(BLOCKS, discards=True))
    fd = os.open(tmp_path / "mnt/disk", os.O_RDWR)
    try:
        assert os.pwrite(fd, b"x" * 16384, 0) == 16384
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096)
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, 8192, 4096)
        assert os.pread(fd, 16384, 0) == (bytes(4096) + b"x" * 4096) * 2
        refused(errno.EOPNOTSUPP, fallocate, fd, 0, 0, 4096)
        refused(errno.EINVAL, fallocate, fd, ZERO_RANGE | KEEP_SIZE, 0, 512)
        refused(errno.EIO, fallocate, fd, ZERO_RANGE | KEEP_SIZE, BLOCKS * 4096, 4096)
        assert os.pread(fd, 4096, BLOCKS * 4096) == b""
        refused(errno.EINVAL, os.pwrite, fd, b"x", 0)
        refused(errno.EIO, os.pwrite, fd, bytes(4096), BLOCKS * 4096)
    finally:
        os.close(fd)


def test_only_read(start: Start, tmp_path: Path) -> None:
    """By the mount, and by the session where the mount would take a writer: somebody else made it."""
    disk = start(Memory(BLOCKS), read_only=True)
    refused(errno.EROFS, os.open, tmp_path / "mnt/disk", os.O_RDWR)
    disk.resized()
    assert os.stat(tmp_path / "mnt/disk").st_size == BLOCKS * 4096


def test_only_read_whatever_the_mount_says(start: Start, tmp_path: Path) -> None:
    start(Memory(BLOCKS), lambda: mount(str(tmp_path / "mnt"), False, 131072), read_only=True)
    refused(errno.EROFS, os.open, tmp_path / "mnt/disk", os.O_RDWR)
    assert contents(tmp_path / "mnt/disk") == bytes(BLOCKS * 4096)


def test_a_session_without_an_abort_file(start: Start, tmp_path: Path) -> None:
    """As where fusectl is not mounted: it is ended by taking the mount away."""
    def mounted() -> tuple[int, int, int]:
        fd, number, abort = mount(str(tmp_path / "mnt"), False, 131072)
        if abort >= 0:
            os.close(abort)
        return fd, number, -1

    disk = start(Memory(BLOCKS), mounted)
    disk.abort()
    assert os.listdir(tmp_path / "mnt") == []


def test_the_life_of_a_session(start: Start, tmp_path: Path) -> None:
    """What is under way is told; there is no closing it before it ended, and no use of it behind that."""
    disk = start(Memory(BLOCKS))
    assert contents(tmp_path / "mnt/disk") == bytes(BLOCKS * 4096)
    eventually(lambda: disk.in_flight == 0)     # an answer is there before its object is back
    assert disk.counters["reads"] > 0 and not disk.unflushed
    with pytest.raises(TimeoutError, match=r"1 receive threads and 0 requests are still out after 0\.1 s"):
        disk.close(0.1)
    with pytest.raises(TypeError):
        disk.watch([(0, 4), ("x", 9)])
    disk.watch([(0, 4), (3, 9), (20, 21), (5, 5)])
    fd = os.open(tmp_path / "mnt/disk", os.O_WRONLY)
    os.pwrite(fd, bytes(4096), 10 * 4096)
    refused(errno.EAGAIN, os.read, disk.watch_fd, 8)
    os.pwrite(fd, bytes(4096), 8 * 4096)
    assert os.read(disk.watch_fd, 8)
    os.close(fd)
    disk.unmount()
    disk.exit()
    eventually(lambda: "session" not in {thread.name for thread in threading.enumerate()})
    disk.close()
    disk.close()
    assert disk.in_flight == 0
    with pytest.raises(ValueError, match="closed"):
        assert disk.counters


def test_what_it_does_not_take(tmp_path: Path) -> None:
    """Nothing is mounted or open then."""
    def opened(target: Target, **options: Any) -> Callable[[], object]:
        return lambda: fuse.FuseDisk(target, str(tmp_path), **options)

    memory = Memory(BLOCKS)
    for call, what in ((opened(memory, depth=0), "depth is 0: 1 to 4096"),
                       (opened(memory, max_io=6000), "max_io is 6000: a multiple of 4096"),
                       (opened(Target()), "the target has 0 blocks"),
                       (opened(memory, depth=4097, mounted=(os.open("/dev/null", os.O_RDWR), 0, -1)), "depth is 4097")):
        with pytest.raises(ValueError, match=what):
            call()
    refused(errno.ENOENT, lambda: fuse.FuseDisk(memory, str(tmp_path / "missing")))
    with pytest.raises(OSError, match="FUSE INIT failed"):      # nobody mounted that
        opened(memory, mounted=(os.open("/dev/null", os.O_RDWR), 0, -1))()
