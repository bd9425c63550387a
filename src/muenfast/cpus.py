"""CPUs that engine threads are pinned to."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from muenfast.errors import UsageError

log = logging.getLogger("muenfast")

_PRESENT = "/sys/devices/system/cpu/present"


def _spans(cpus: Iterable[int]) -> str:
    """As the kernel writes lists of CPUs: 0-3,5."""
    found: list[list[int]] = []
    for cpu in sorted(cpus):
        if found and found[-1][1] == cpu - 1:
            found[-1][1] = cpu
        else:
            found.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _numbers(text: str) -> range | None:
    match = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        return None
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _present() -> set[int] | None:
    """None where the kernel does not tell."""
    try:
        with open(_PRESENT, encoding="ascii") as file:
            spans = [_numbers(span) for span in file.read().strip().split(",")]
    except OSError:
        return None
    return {cpu for span in spans if span is not None for cpu in span}


def cpus_from_list(option: str, text: str) -> tuple[int, ...]:
    """`N,N-M,...`, each CPU once, in that order. Raises UsageError where one is not there, or not for this process."""
    found: list[int] = []
    present, allowed = _present(), os.sched_getaffinity(0)
    for index, entry in enumerate(text.split(",")):
        numbers = _numbers(entry)
        if numbers is None:
            raise UsageError("an entry is the number of a CPU, or N-M", option=option, index=index, value=entry,
                             hint=f"this process may run on {_spans(allowed)}")
        for cpu in numbers:
            if present is not None and cpu not in present:
                raise UsageError(f"there is no CPU {cpu} here: they are {_spans(present)}", option=option, index=index,
                                 value=entry, hint="`lscpu -e` lists them")
            if cpu not in allowed:
                raise UsageError(f"this process may not run on CPU {cpu}: it is offline, or kept from it by taskset or a "
                                 "cpuset", option=option, index=index, value=entry,
                                 hint=f"choose among {_spans(allowed)}, or start it where it may")
            if cpu in found:
                raise UsageError(f"CPU {cpu} is named twice", option=option, index=index, value=entry,
                                 hint="threads take them in turn, each as often as the others")
            found.append(cpu)
    return tuple(found)


class Cpus:
    """Gives threads their CPUs, in turn. Raises UsageError for what is no number of a CPU that this process may run on."""

    def __init__(self, cpus: Iterable[int]) -> None:
        self._cpus = tuple(cpus)
        allowed = os.sched_getaffinity(0) if self._cpus else set()
        for index, cpu in enumerate(self._cpus):
            if cpu not in allowed:
                raise UsageError("an entry is the number of a CPU that this process may run on", option="cpus", index=index,
                                 value=cpu, hint=f"choose among {_spans(allowed)}")
        self._given = 0
        self._lock = threading.Lock()

    def next(self) -> int | None:
        """None: there are none, and no thread is pinned."""
        if not self._cpus:
            return None
        with self._lock:
            self._given += 1
            return self._cpus[(self._given - 1) % len(self._cpus)]


def pin(cpu: int | None, what: str) -> None:
    """Pins the calling thread; None: leaves it alone. One whose CPU has gone since runs anywhere, which is said."""
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:
            log.warning("%s is not pinned to CPU %d: %s", what, cpu, error.strerror)


@contextmanager
def inherited(cpu: int | None, what: str) -> Iterator[None]:
    """Threads and processes that the calling thread starts within are pinned."""
    before = os.sched_getaffinity(0)
    pin(cpu, what)
    try:
        yield
    finally:
        if cpu is not None:
            os.sched_setaffinity(0, before)
