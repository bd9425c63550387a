"""The exception tree, split by whose fault it is, and warnings about peers; OS failures stay OSError with the path set.

Results of a ring operation (no data, overrun, ...) are not errors: see muenfast.Result.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Protocol

log = logging.getLogger("muenfast")

_QUIET = 1.0  # seconds between two lines of a PeerLog
_AGAIN = 10.0  # seconds between two of the same kind of Offences

class MuenfastError(Exception):
    """Root of everything muenfast raises on its own account."""


class UsageError(MuenfastError, ValueError):
    """The caller asked for something that no peer and no machine could make right.

    option: the option or parameter at fault ("--req"), or None outside a command line.
    index: position in a comma list, counted from 0, or None.
    value: the text that was given. rule: what holds for it. hint: the next step, or None.
    """

    def __init__(self, rule: str, *, option: str | None = None, index: int | None = None,
                 value: object = None, hint: str | None = None) -> None:
        self.option, self.index, self.value, self.rule, self.hint = option, index, value, rule, hint
        where = option or ""
        if option and index is not None:
            where += f", entry {index}"
        if value is not None:
            where += f"{' ' if where else ''}{str(value)!r}"
        text = f"{where}: {rule}" if where else rule
        super().__init__(f"{text} ({hint})" if hint else text)


class PeerError(MuenfastError):
    """What stands in a channel is not what the protocol allows.

    channel: its locator. field: the header or message field. seen, expected: its value and the rule.
    """

    def __init__(self, channel: str, field: str, seen: object, expected: object, *,
                 hint: str | None = None) -> None:
        self.channel, self.field, self.seen, self.expected, self.hint = channel, field, seen, expected, hint
        text = f"channel {channel}: {field} is {seen}, expected {expected}"
        super().__init__(f"{text} ({hint})" if hint else text)


class ClaimError(MuenfastError):
    """Somebody else holds what may have one holder only: a channel's writer side, a disk, a device name.

    what: the thing claimed. holder: who has it, as far as is known ("process 4711 (muenfast blk)").
    """

    def __init__(self, what: str, holder: str, *, hint: str | None = None) -> None:
        self.what, self.holder, self.hint = what, holder, hint
        text = f"{what} is already held by {holder}"
        super().__init__(f"{text} ({hint})" if hint else text)


class StoreError(MuenfastError):
    """A user-space store failed where it was to be opened: code that is not muenfast's.

    store: what it is called. method: the callback at fault. problem: what it did.
    """

    def __init__(self, store: str, method: str, problem: str) -> None:
        self.store, self.method, self.problem = store, method, problem
        super().__init__(f"store {store}: {method} {problem}")


class BrokenChannelError(MuenfastError):
    """The owner of a region truncated or took away its memory while it was mapped here."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        super().__init__(f"channel {channel}: its memory was taken away (the region was truncated); "
                         f"make it anew and start again")


def describe(error: BaseException) -> str:
    """An error in one line; of an OSError what the kernel refused and the path, once, without the number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    path = error.filename
    if path is None or isinstance(path, int) or os.fsdecode(path) in error.strerror:    # int: of a call on a descriptor
        return error.strerror
    return f"{os.fsdecode(path)}: {error.strerror}"


class _Conduct(Protocol):
    """What Offences needs of one."""

    @property
    def offences(self) -> Mapping[str, int]: ...
    @property
    def quarantines(self) -> int: ...
    @property
    def patience(self) -> int: ...


class Offences:
    """Tells which rules a peer's elements break: a line in ten seconds for each field, at most.

    prefix: what stands before each line. channel: its locator.
    """

    def __init__(self, prefix: str, channel: str) -> None:
        self._prefix, self._channel = prefix, channel
        self._told: dict[str, int] = {}
        self._when: dict[str, float] = {}

    def look(self, conduct: _Conduct) -> None:
        """conduct: a Conduct of _ring."""
        for field, count in conduct.offences.items():
            if self._is_due(field, count):
                log.warning("%s: channel %s: field %s: %d elements so far break its rule", self._prefix, self._channel,
                            field, count)
        if self._is_due("", conduct.quarantines):
            log.warning("%s: channel %s: more than %d elements in a second broke a rule: nothing is taken from it until "
                        "its writer begins another epoch (%d times so far)", self._prefix, self._channel, conduct.patience,
                        conduct.quarantines)

    def _is_due(self, what: str, count: int) -> bool:
        if count <= self._told.get(what, 0):
            return False
        now = time.monotonic()
        if now - self._when.get(what, -_AGAIN) < _AGAIN:
            return False
        self._told[what], self._when[what] = count, now
        return True


class PeerLog:
    """Lines that a peer can cause at will: `most` a second; those left out are counted in the next one.

    prefix: what stands before each line. For one thread.
    """

    def __init__(self, prefix: str, most: int = 1) -> None:
        self._prefix, self._most = prefix, most
        self._since, self._written, self._left_out = -_QUIET, 0, 0

    def warning(self, text: str, *values: object) -> None:
        """Logs `text` with `values` filled in, or counts it."""
        self._line(logging.WARNING, text, *values)

    def info(self, text: str, *values: object) -> None:
        """As warning()."""
        self._line(logging.INFO, text, *values)

    def _line(self, level: int, text: str, *values: object) -> None:
        now = time.monotonic()
        if now - self._since >= _QUIET:
            self._since, self._written = now, 0
        if self._written >= self._most:
            self._left_out += 1
            return
        what = "warnings" if level == logging.WARNING else "lines"
        more = f" ({self._left_out} {what} more were left out)" if self._left_out else ""
        log.log(level, "%s: " + text + "%s", self._prefix, *values, more)
        self._written += 1
        self._left_out = 0
