"""Network namespaces: named as users name them; calls in another one, from a thread of its own: nobody else's changes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import TypeVar

from muenfast.threads import spawn

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_NS_GET_NSTYPE = 0xB703     # linux/nsfs.h
_NAMED = "/run/netns"  # where `ip netns add` has them

T = TypeVar("T")


def current() -> int:
    """A descriptor of the calling thread's network namespace, which lives as long as that is open. Raises OSError."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def named(text: str) -> int:
    """A descriptor of a network namespace: a name of `ip netns`, a path, or a process's number. Raises OSError."""
    if text.isdecimal():
        path = f"/proc/{text}/ns/net"
    else:
        path = text if text.startswith("/") else f"{_NAMED}/{text}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "no such network namespace (`ip netns add NAME` makes one; a number is a "
                                "process's, a path may name any)", path) from error
    try:    # no device is asked for what may mean something else to it
        kind = fcntl.ioctl(descriptor, _NS_GET_NSTYPE) if stat.S_ISREG(os.fstat(descriptor).st_mode) else 0
    except OSError:
        kind = 0
    if kind != _CLONE_NEWNET:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a network namespace (a name of `ip netns`, a process's number or a path as "
                      "/proc/PID/ns/net names one)", path)
    return descriptor


def inside(namespace: int | None, call: Callable[[], T]) -> T:
    """What `call` returns in the network namespace of that descriptor (None: the calling thread's). What it raises, too,
    and OSError where the namespace cannot be entered: that takes CAP_SYS_ADMIN."""
    return call() if namespace is None else _apart(call, "setns", namespace, _CLONE_NEWNET)


def inside_new(call: Callable[[], T]) -> T:
    """As inside(), in a new network namespace that goes with what `call` leaves open there."""
    return _apart(call, "unshare", _CLONE_NEWNET)


def _apart(call: Callable[[], T], enter: str, *arguments: int) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            # os.setns() and os.unshare() came with Python 3.12.
            if getattr(ctypes.CDLL(None, use_errno=True), enter)(*arguments):
                number = ctypes.get_errno()
                what = "not without the capability CAP_SYS_ADMIN" if number == errno.EPERM else os.strerror(number)
                raise OSError(number, f"a network namespace cannot be entered ({enter}): {what}")
            results.append(call())
        except BaseException as error:
            errors.append(error)

    spawn(run, "in a network namespace").join()
    if errors:
        raise errors[0]
    return results[0]
