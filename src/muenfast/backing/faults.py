"""Faults that an export is to show: `--inject`."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from muenfast import params
from muenfast._store import FAULTS, KINDS
from muenfast.errors import UsageError

_RULE = "a fault is error[=ERRNO], delay=TIME, late or corrupt; behind one stand rate=0.01 and on=read/write/flush/discard"
_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s)\Z")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_MOST_DELAY = 3600.0  # seconds
_MOST = 8  # FAULTS_MOST of _faults.h


@dataclass(frozen=True, slots=True)
class Fault:
    """what: one of FAULTS. kinds: operations that it befalls. rate: how often, 0 to 1. error: the positive errno of an
    "error". delay: seconds of a "delay"."""

    what: str
    kinds: tuple[str, ...] = KINDS
    rate: float = 1.0
    error: int = errno.EIO
    delay: float = 0.0

    @property
    def plan(self) -> tuple[str, tuple[str, ...], float, int, float]:
        """As Store.inject() takes it."""
        return self.what, self.kinds, self.rate, self.error, self.delay


def faults_from_list(option: str, text: str) -> list[tuple[Fault, ...]]:
    """The entries of a list, one per export: faults joined by `+`, an empty entry has none. A modifier belongs to the fault
    before it, whether `,` or `+` stands between. Raises UsageError."""
    entries: list[str] = []
    for part in params.split(option, text, empty=True):
        if entries and entries[-1] and part.partition("=")[0] in ("rate", "on"):
            entries[-1] += "," + part
        else:
            entries.append(part)
    return [_entry(option, index, entry) for index, entry in enumerate(entries)]


def _entry(option: str, index: int, text: str) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    given: set[str] = set()     # of the last one's modifiers
    if not text:
        return ()

    def wrong(rule: str) -> UsageError:
        return UsageError(rule, option=option, index=index, value=text)

    for word in re.split("[+,]", text):
        key, equals, value = word.partition("=")
        if key in ("rate", "on"):
            if not faults:
                raise wrong(f"{key} belongs to the fault before it, and there is none")
            if key in given:
                raise wrong(f"{key} stands twice behind one fault")
            given.add(key)
            last = faults.pop()
            faults.append(Fault(last.what, _kinds(value, last.what, wrong) if key == "on" else last.kinds,
                                _rate(value, wrong) if key == "rate" else last.rate, last.error, last.delay))
            continue
        given.clear()
        if key == "error":
            faults.append(Fault("error", error=_errno(value, wrong) if equals else errno.EIO))
        elif key == "delay":
            match = _TIME.fullmatch(value)
            seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
            if not 0 < seconds <= _MOST_DELAY:
                raise wrong(f"a delay is a time above 0 and up to {_MOST_DELAY:g}s with its unit, as 10ms, 500us, 2s")
            faults.append(Fault("delay", delay=seconds))
        elif key in FAULTS and not equals:
            faults.append(Fault(key, KINDS if key == "late" else ("read",)))
        else:
            raise wrong(_RULE)
    if len(faults) > _MOST:
        raise wrong(f"an export has up to {_MOST} faults")
    return tuple(faults)


def _kinds(text: str, what: str, wrong: Callable[[str], UsageError]) -> tuple[str, ...]:
    kinds = tuple(text.split("/"))
    if not set(kinds) <= set(KINDS):
        raise wrong(f"on= names operations, joined by /: {', '.join(KINDS)}")
    if what == "corrupt" and kinds != ("read",):
        raise wrong("what is read is corrupted, and nothing else")
    return kinds


def _rate(text: str, wrong: Callable[[str], UsageError]) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 1:
        raise wrong("a rate is a number above 0 and up to 1")
    return rate


def _errno(text: str, wrong: Callable[[str], UsageError]) -> int:
    number = getattr(errno, text, None) if re.fullmatch("E[A-Z0-9]+", text) else None
    if not isinstance(number, int):
        raise wrong(f"an error is named as in errno(3): EIO ({os.strerror(errno.EIO)}), ENOSPC, ...")
    return number
