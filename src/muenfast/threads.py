"""Threads, and what to say where there are no more."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable


def spawn(target: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread that runs. Raises OSError (EAGAIN) where no more are to be had."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"no thread for `{name}`: the limit of this user (ulimit -u) or of its control "
                      "group (pids.max) is reached") from error
    return thread
