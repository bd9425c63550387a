"""Calls in another network namespace, from a thread of its own: nobody else's namespace changes."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

_CLONE_NEWNET = 0x40000000  # linux/sched.h

T = TypeVar("T")


def current() -> int:
    """A descriptor of the calling thread's network namespace, which lives as long as that is open. Raises OSError."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


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
            if getattr(ctypes.CDLL(None, use_errno=True), enter)(*arguments):
                number = ctypes.get_errno()
                raise OSError(number, f"{enter} to a network namespace: {os.strerror(number)}")
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="in a namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
