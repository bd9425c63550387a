"""Memory of regions that are to be made, got ready by a thread while others do what takes the interpreter."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial

from muenfast._inodes import allocate
from muenfast.threads import spawn

DIRECTORY = "/dev/shm/"  # of POSIX shared memory
LEAST = 8   # regions, below which it gains nothing


class Stock:
    """New inodes in /dev/shm, without names and allocated in full, lot by lot.

    A lot may be short, and so is every one behind it: what cannot be had ahead is to be made, or refused, by whoever wants
    it. Until close() what was not taken stays allocated.
    """

    def __init__(self, lots: Sequence[Sequence[int]]) -> None:
        """lots: bytes of each inode of each."""
        self._news = threading.Condition(threading.Lock())  # of what follows
        self._ready: list[list[int]] = []
        self._over = False
        self._thread: threading.Thread | None = None
        try:
            self._thread = spawn(partial(self._allocate, tuple(lots)), "regions")
        except OSError:         # no thread is to be had: whoever needs one will say so
            self._over = True

    def _allocate(self, lots: Sequence[Sequence[int]]) -> None:
        directory = os.fsencode(DIRECTORY)
        try:
            for lot in lots:
                if self._over:
                    break
                inodes = allocate(directory, list(lot))
                with self._news:
                    self._ready.append(inodes)
                    self._news.notify_all()
                if len(inodes) < len(lot):
                    break
        finally:
            with self._news:
                self._over = True
                self._news.notify_all()

    def take(self) -> list[int]:
        """Descriptors of the next lot, which are the caller's then; waits for it."""
        with self._news:
            while not (self._ready or self._over):
                self._news.wait()
            return self._ready.pop(0) if self._ready else []

    def close(self) -> None:
        """Idempotent."""
        with self._news:
            self._over = True
        if self._thread is not None:
            self._thread.join()
        while self._ready:
            for fd in self._ready.pop():
                os.close(fd)
