"""Threads, and what to say where there are no more; how a process that is to end says so, and how a forked one ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn


class Ending:
    """Whether this process was told to end; plain, for a signal's handler sets it and may interrupt any code."""

    told = False


ending = Ending()


def spawn(target: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread that runs. Raises OSError (EAGAIN) where no more are to be had."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"no thread for `{name}`: the limit of this user (ulimit -u) or of its control "
                      "group (pids.max) is reached") from error
    return thread


@contextmanager
def interrupts_held() -> Iterator[Callable[[], object]]:
    """SIGINT and SIGTERM wait while the only thread starts a process and writes down how that is to be ended.

    It gives what the child calls before it runs a program, so that this one can be interrupted.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    restore = partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # may raise what came just before
        yield restore
    finally:
        restore()


def leave_child(error: BaseException | None) -> NoReturn:
    """Ends a child of fork() that a user's code made and let return, or leave by an exception, into a server's thread: as
    the interpreter would end, but nothing of the server's is cleaned up."""
    status = 0 if error is None else 1
    try:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        elif error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:    # also where there is nowhere to write to
        os._exit(status & 0xff)
