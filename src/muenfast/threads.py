"""Threads, and what to say where there are no more; how a process that is to end says so, and how a forked one ends."""

from __future__ import annotations

import errno
import os
import sys
import threading
import traceback
from collections.abc import Callable
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
