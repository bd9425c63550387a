"""FUSE over io_uring: whether the kernel offers it to a mount that is made now.

The kernel (Linux 6.14) offers it where its parameter enable_uring says so, which is off by default. It is asked when a
mount is made and never again: a connection that has it keeps it (fs/fuse/dev_uring.c, fuse_uring_cmd()). It belongs to the
whole machine; so it is on for as long as a mount takes, and then what it was before, after a kill once the next has gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import re
from collections.abc import Iterator

from muenfast.errors import UsageError

log = logging.getLogger(__name__)

PARAMETER = "/sys/module/fuse/parameters/enable_uring"
WHEN = ("auto", "kernel", "off")
TRIED = (6, 18)     # kernels from here on have been through our tests with it; before, it is the administrator's choice


def check(when: str) -> None:
    """Raises UsageError where *when* is none of WHEN."""
    if when not in WHEN:
        raise UsageError(f"is one of {', '.join(WHEN)}", option="--fuse-uring", value=when)


def tried() -> bool:
    """Whether this kernel is one of TRIED."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= TRIED


def _read() -> str:
    with open(PARAMETER) as file:
        return file.read().strip()


def _write(value: str) -> None:
    with open(PARAMETER, "w") as file:
        file.write(value)


def _put_back(value: str) -> None:
    try:
        if _read() != value:        # else it was not to be switched on, as where /sys is read-only
            _write(value)
    except OSError as problem:
        log.warning("%s stays on: %s; echo %s > it", PARAMETER, problem.strerror, value)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """The file at *path*, ours alone; it is gone afterwards."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink == 0:      # of the one before us, who took it away
                continue
            try:
                yield fd
            finally:
                with contextlib.suppress(FileNotFoundError):    # somebody cleaned up; what was done in here stays done
                    os.unlink(path)
            return
        finally:
            os.close(fd)


@contextlib.contextmanager
def offered(runtime_dir: str | os.PathLike[str], when: str = "auto") -> Iterator[bool]:
    """Whether FuseDisk is to take it where the kernel offers it; meanwhile the kernel does, where that is for us to have.

    when: "auto": also where the parameter is off, if the kernel is one of TRIED and lets us; "kernel": as the parameter
    says; "off": not at all. What keeps it from being offered is not an error: there is a way without.
    """
    if when != "auto" or not tried():
        yield when != "off"
        return
    with contextlib.ExitStack() as undo:
        try:
            fd = undo.enter_context(_locked(os.path.join(runtime_dir, "fuse-uring")))
            before = os.pread(fd, 8, 0).decode() or _read()     # in the file: of somebody who was killed in here
            if before == "N":
                os.pwrite(fd, before.encode(), 0)
                undo.callback(_put_back, before)
                _write("Y")
        except OSError as problem:
            log.debug("FUSE over io_uring is not to be had: %s", problem)
        yield True
