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
import time
from collections.abc import Iterator
from pathlib import Path

from muenfast.errors import UsageError

log = logging.getLogger(__name__)

PARAMETER = "/sys/module/fuse/parameters/enable_uring"
WHEN = ("auto", "kernel", "off")
PATIENCE = 1.0      # seconds for others to make their mounts; each takes milliseconds
TRIED = (6, 18)     # kernels from here on have been through our tests with it; before, it is the administrator's choice


def check(when: str) -> None:
    """Raises UsageError where *when* is none of WHEN."""
    if when not in WHEN:
        raise UsageError(f"is one of {', '.join(WHEN)}", option="--fuse-uring", value=when)


def tried() -> bool:
    """Whether this kernel is one of TRIED."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= TRIED


@contextlib.contextmanager
def _locked() -> Iterator[int]:
    """The parameter, open and ours alone. Raises OSError, BlockingIOError after PATIENCE."""
    fd = os.open(PARAMETER, os.O_RDWR | os.O_CLOEXEC)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.002)
        yield fd
    finally:
        os.close(fd)


def _value(fd: int) -> str:
    return os.pread(fd, 8, 0).decode().strip()


@contextlib.contextmanager
def _on(fd: int, record: Path) -> Iterator[None]:
    """While this lasts the parameter is on; *record* says that it is to be off, as one that is there already does."""
    record.write_text("N")
    try:
        os.pwrite(fd, b"Y", 0)
    except OSError:
        record.unlink(missing_ok=True)
        raise
    try:
        yield
    finally:
        try:
            os.pwrite(fd, b"N", 0)
            record.unlink(missing_ok=True)
        except OSError as problem:
            log.warning("%s stays on: %s; echo N > %s", PARAMETER, problem.strerror, PARAMETER)


@contextlib.contextmanager
def offered(runtime_dir: str | os.PathLike[str], when: str = "auto") -> Iterator[bool]:
    """Whether FuseDisk is to take it where the kernel offers it; meanwhile the kernel does, where that is for us to have.

    when: "auto": also where the parameter is off, if the kernel is one of TRIED and lets us; "kernel": as the parameter
    says; "off": not at all. What keeps it from being offered is not an error: there is a way without.
    """
    if when != "auto" or not tried():
        yield when != "off"
        return
    record = Path(runtime_dir, "fuse-uring")
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(_locked())
            if record.exists() or _value(fd) == "N":
                stack.enter_context(_on(fd, record))
        except OSError as problem:
            log.debug("%s: %s", PARAMETER, problem)
        yield True
