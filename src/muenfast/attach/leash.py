"""The watchdog of an attachment, as its client holds it: started, told, ended."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from muenfast.attach import watchdog
from muenfast.threads import spawn

AFTER_ABORT = 1.0   # seconds for each thing that the end of a connection sets free
LONGEST = 300.0     # seconds that taking a device down takes, however much the disk goes on
LOOK = 0.1          # seconds between looks whether it does
AFTER_DONE = 5.0    # seconds the watchdog has to end; on a busy machine it may only just be starting


class Bystander:
    """A thread that does nothing, and has nothing open: for a watchdog to see its end. number: its TID. Raises OSError."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = spawn(self._wait, "bystander")
        self.number = self._thread.native_id or 0

    def _wait(self) -> None:
        self._over.wait()

    def end(self) -> None:
        self._over.set()
        self._thread.join()


class Leash:
    """A watchdog process of its own, which cleans up should this one die; see watchdog.py.

    kind, arguments: what it watches over. thread: one that sleeps interruptibly only. fds: descriptors passed on. other:
    another process to watch, by its number and that of its bystander; None: this one.
    """

    _bystander: Bystander | None = None     # of this process, if it is the one

    def __init__(self, kind: str, thread: int, arguments: Sequence[str], fds: Sequence[int],
                 other: tuple[int, int] | None = None) -> None:
        control, self._control = os.pipe()      # both close-on-exec; one is passed on
        try:
            if other is None:
                self._bystander = Bystander()
                other = os.getpid(), self._bystander.number
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", watchdog.__file__, kind, str(control), str(other[0]),
                 f"{thread},{other[1]}", *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=[control, *fds], start_new_session=True, cwd="/")
        except BaseException:
            os.close(self._control)
            self._end_bystander()
            raise
        finally:
            os.close(control)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, message: str) -> bool:
        """False: it had ended before."""
        try:
            os.write(self._control, message.encode() + b"\n")
        except BrokenPipeError:
            return False
        return True

    def join(self, worker: threading.Thread, timeout: float, moving: Callable[[], bool] | None = None) -> None:
        """Waits for a thread that takes the device down: `timeout` seconds, and anew while moving() says that the disk
        goes on, LONGEST in all; the watchdog is told."""
        start = told = time.monotonic()
        worker.join(timeout if moving is None else min(timeout, LOOK))
        while moving is not None and worker.is_alive():
            now = time.monotonic()
            if now - start >= LONGEST or now - told >= timeout:
                break
            if moving():
                told = now
                self.tell(f"detaching {timeout + AFTER_ABORT:.3f}")
            worker.join(LOOK)

    def end(self) -> None:
        """Nothing is left to do for it. Raises TimeoutError when it had to be killed."""
        self.tell("done")
        os.close(self._control)
        try:
            self.wait()
        finally:
            self._end_bystander()

    def _end_bystander(self) -> None:
        if self._bystander is not None:
            self._bystander.end()

    def give(self) -> int:
        """What it is told through: another process's from here on, to which only wait() is left."""
        control, self._control = self._control, -1
        return control

    def wait(self) -> None:
        """It was told that nothing is left to do, or sees that there is nobody. Raises TimeoutError."""
        try:
            self._process.wait(AFTER_DONE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise TimeoutError(errno.ETIMEDOUT, "the watchdog did not end and was killed") from None
