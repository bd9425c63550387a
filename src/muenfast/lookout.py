"""Who looks for others while they are idle: at names in /dev/shm, which may mean something else, and at channels that are
polled."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from muenfast import shm
from muenfast._inodes import end_watch, watch_names
from muenfast._ring import Watch
from muenfast.threads import spawn

log = logging.getLogger("muenfast")

_EVENT = struct.Struct("@iIII")     # struct inotify_event: watch, mask, cookie, length of the name that follows
_OVERFLOW, _IGNORED = 0x4000, 0x8000    # IN_Q_OVERFLOW, IN_IGNORED, linux/inotify.h
_PAUSE = 0.02       # seconds between two looks at the queue: who changes names all the time costs us fifty looks a second
_BYTES = 1 << 16
LEAST = 0.2         # seconds between looks at names, where something happens or nobody tells of them
MOST = 5.0          # seconds, of what is idle and is told
UNTOLD = 1.0        # seconds, of what is idle and is not, where it may be that late


class Pace:
    """How often one looks at names and the like: LEAST seconds apart, and up to `most` while nothing happens, unless it is
    not `told`."""

    __slots__ = ("_most", "seconds", "told")

    def __init__(self, told: bool, most: float = MOST) -> None:
        self.seconds, self.told, self._most = LEAST, told, most

    def looked(self, quiet: bool) -> None:
        """quiet: nothing has happened since the last look."""
        self.seconds = min(self._most, self.seconds * 2) if quiet and self.told else LEAST

    def hurry(self) -> None:
        self.seconds = LEAST


class Lookout:
    """One thread that sleeps until names in /dev/shm change; open from construction to close().

    A hint: what it tells may be nothing, and it may tell late or, once its queue has run over, everybody. Raises OSError
    where there is no thread, or no inotify(7) to be had: then one looks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()       # of what follows
        self._told: dict[str, list[Callable[[], None]]] = {}
        self._over = False
        self._fd, self._watch = watch_names(os.fsencode(shm.DIRECTORY))
        try:
            self._thread = spawn(self._run, "names")
        except BaseException:
            os.close(self._fd)
            raise

    @staticmethod
    def covers(locators: Iterable[shm.Locator]) -> bool:
        """Whether it tells of all of them."""
        return all(locator.posix for locator in locators)

    def add(self, locators: Iterable[shm.Locator], tell: Callable[[], None]) -> None:
        """tell: called by its thread, and soon done."""
        with self._lock:
            for locator in locators:
                self._told.setdefault(locator.text, []).append(tell)

    def remove(self, locators: Iterable[shm.Locator], tell: Callable[[], None]) -> None:
        with self._lock:
            for locator in locators:
                self._told[locator.text].remove(tell)
                if not self._told[locator.text]:
                    del self._told[locator.text]

    def _run(self) -> None:
        while not self._over:
            queue = os.read(self._fd, _BYTES)
            names = self._changed(queue)
            # The last one: of close(), or the directory was unmounted.
            self._over = self._over or any(mask & _IGNORED for mask, _ in self._events(queue))
            with self._lock:
                told = [self._told.get(name, ()) for name in (self._told if names is None else names)]
                for tell in {tell for each in told for tell in each}:
                    try:
                        tell()
                    except Exception:   # the others are to hear of theirs
                        log.exception("names")
            time.sleep(_PAUSE)

    @staticmethod
    def _events(queue: bytes) -> Iterator[tuple[int, str]]:
        """(mask, name) of each."""
        at = 0
        while at < len(queue):
            _, mask, _, length = _EVENT.unpack_from(queue, at)
            at += _EVENT.size
            yield mask, os.fsdecode(queue[at:at + length].partition(b"\0")[0])
            at += length

    @staticmethod
    def _changed(queue: bytes) -> set[str] | None:
        """None: any may have."""
        found = set()
        for mask, name in Lookout._events(queue):
            if mask & (_OVERFLOW | _IGNORED):
                return None
            found.add(name)
        return found

    def close(self) -> None:
        self._over = True
        with contextlib.suppress(OSError):      # EINVAL: the kernel ended it, and the thread with it
            end_watch(self._fd, self._watch)
        self._thread.join()
        os.close(self._fd)


def lookout() -> Lookout | None:
    """None where none is to be had, which costs CPU time only."""
    try:
        return Lookout()
    except OSError as error:
        log.info("nobody tells when names in /dev/shm change (%s): one looks", error.strerror)
        return None


def watching(stack: ExitStack, name: str = "watch") -> Watch:
    """A thread of that name that polls for whoever is given it and is idle, until the stack is left. Raises OSError."""
    watch = Watch()
    thread = spawn(watch.run, name)
    stack.callback(thread.join)
    stack.callback(watch.stop)
    return watch
