"""Stops a process between two of its memory accesses: right after it has stored to, or touched, a given word.

The code that is stopped is the code that is shipped: the CPU's debug registers watch the word (ptrace, x86-64). What
is caught is left as after SIGSTOP, by nobody traced: SIGCONT lets it go on, SIGKILL ends it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WRITE, ACCESS = 1, 3    # kinds of watchpoints, as DR7 has them: a load alone cannot be told from a store

_CONT, _DETACH, _SEIZE, _INTERRUPT, _PEEKUSER, _POKEUSER = 7, 17, 0x4206, 0x4207, 3, 6
_EVENT_STOP = 128
_WALL = 0x40000000
_DEBUGREG = 848         # offsetof(struct user, u_debugreg), x86-64
_LENGTH = {1: 0, 2: 1, 4: 3, 8: 2}

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    value = int(libc.ptrace(request, tid, address, data))
    if value == -1 and (error := ctypes.get_errno()):
        raise OSError(error, os.strerror(error))
    return value


def mapped(pid: int, path: str) -> int:
    """Where the process has mapped a file."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if words[-1] == path:
            return int(words[0].partition("-")[0], 16) - int(words[2], 16)
    raise AssertionError(f"{path} is not mapped by {pid}")


def state(pid: int) -> str:
    """R, S, T, ... of a process; X when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


class _Ended(AssertionError):
    """A thread that is watched is no more."""


class _Watch:
    """All threads of a process, traced and watching one word."""

    def __init__(self, pid: int, address: int, length: int, kind: int) -> None:
        self.pid, self._address = pid, address
        self._dr7 = 1 | kind << 16 | _LENGTH[length] << 18
        self.threads: list[int] = []
        for name in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):   # ended meanwhile, as that which sweeps does
                _ptrace(_SEIZE, int(name))
                self.threads.append(int(name))

    def _poke(self, tid: int, register: int, value: int) -> None:
        _ptrace(_POKEUSER, tid, _DEBUGREG + 8 * register, value)

    def arm(self) -> None:
        for tid in list(self.threads):
            try:
                _ptrace(_INTERRUPT, tid)
                while self._wait(tid)[1] != _EVENT_STOP:
                    _ptrace(_CONT, tid)
            except (ProcessLookupError, _Ended):
                self.threads.remove(tid)
                continue
            self._poke(tid, 0, self._address)
            self._poke(tid, 7, self._dr7)
            _ptrace(_CONT, tid)

    @staticmethod
    def _wait(tid: int, flags: int = 0) -> tuple[int, int]:
        """(signal, event) of a thread that stopped, (0, 0) for none. Raises _Ended."""
        found, status = os.waitpid(tid, _WALL | flags)
        if found == 0:
            return 0, 0
        if not os.WIFSTOPPED(status):
            raise _Ended(f"thread {tid} ended: {status:#x}")
        return os.WSTOPSIG(status), status >> 16

    def _look(self, tid: int) -> tuple[int, int]:
        """As _wait(), at once. A thread that has ended, as that which sweeps does, is dropped; not the first one."""
        try:
            return self._wait(tid, os.WNOHANG)
        except _Ended:
            if tid == self.pid:
                raise
            self.threads.remove(tid)
            return 0, 0

    def hit(self, seconds: float) -> int:
        """The thread that touched the word; it stands right behind that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for tid in list(self.threads):
                number, event = self._look(tid)
                if number == signal.SIGTRAP and event == 0 and _ptrace(_PEEKUSER, tid, _DEBUGREG + 48) & 1:
                    self._poke(tid, 6, 0)
                    return tid
                if number:
                    _ptrace(_CONT, tid, 0, 0 if event else number)
            time.sleep(0.0002)
        raise AssertionError(f"process {self.pid} did not come to this point within {seconds} s")

    def freeze(self, caught: int) -> None:
        """Turns the trace into a SIGSTOP that `caught` obeys before its next instruction."""
        os.kill(self.pid, signal.SIGSTOP)
        others = [tid for tid in self.threads if tid != caught]
        while others:       # any of them may be the one that takes the signal, and the rest stops only after that
            for tid in list(others):
                number, event = self._look(tid)
                if tid not in self.threads:
                    others.remove(tid)
                elif event == _EVENT_STOP:
                    others.remove(tid)
                    self._release(tid)
                elif number:
                    _ptrace(_CONT, tid, 0, 0 if number == signal.SIGTRAP else number)
            time.sleep(0.0002)
        self._release(caught)

    def abandon(self) -> None:
        """Kills the process: a thread that is traced would keep its parent waiting for ever."""
        os.kill(self.pid, signal.SIGKILL)
        for tid in self.threads:
            if tid != self.pid:
                with contextlib.suppress(ChildProcessError):
                    while os.WIFSTOPPED(os.waitpid(tid, _WALL)[1]):
                        pass

    def _release(self, tid: int) -> None:
        self._poke(tid, 7, 0)
        _ptrace(_DETACH, tid)
        self.threads.remove(tid)


@contextmanager
def caught(pid: int, address: int, length: int, kind: int, nth: int = 1, *, provoke: Callable[[], object] | None = None,
           seconds: float = 40) -> Iterator[None]:
    """While the block runs the process stands right behind its nth access to the word; afterwards it goes on.

    provoke: called once the word is watched.
    """
    watch = _Watch(pid, address, length, kind)
    try:
        watch.arm()
        if provoke is not None:
            provoke()
        tid = watch.hit(seconds)
        for _ in range(nth - 1):
            _ptrace(_CONT, tid)
            tid = watch.hit(seconds)
        watch.freeze(tid)
    except BaseException:
        watch.abandon()
        raise
    end = time.monotonic() + seconds
    while state(pid) != "T":
        assert time.monotonic() < end, f"process {pid} is not stopped"
        time.sleep(0.0005)
    try:
        yield
    finally:
        if state(pid) == "T":
            os.kill(pid, signal.SIGCONT)


def available() -> str | None:
    """Why a process cannot be stopped here; None: it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "debug registers are used as x86-64 has them"
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        _Watch(child, 4096, 8, WRITE).arm()
    except (OSError, AssertionError) as error:
        return f"no debug registers here: {error}"
    finally:
        os.kill(child, signal.SIGKILL)
        while not os.WIFSIGNALED(os.waitpid(child, _WALL)[1]):
            pass
    return None
