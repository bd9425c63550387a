"""How to find and ask serving processes: one Unix socket each, below the claims' directory.

A request and its answer are one line of JSON each. Only root and the process's own user are answered.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from muenfast import shm

log = logging.getLogger("muenfast")

_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_LINE = 1 << 16  # bytes of a request
_ANSWER_TIMEOUT = 2.0  # seconds


def _directory() -> str:
    path = os.path.join(shm.runtime_dir(), "control")
    os.makedirs(path, mode=0o700, exist_ok=True)
    return path


class _At:
    """A short path to a name in the control directory: sun_path holds 108 bytes, a runtime directory may be longer."""

    def __init__(self, name: str) -> None:
        self._fd = os.open(_directory(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}/{name}"

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


class ControlServer:
    """Answers {"command": "status"} with what `status()` returns (JSON-able); open until close()."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status
        self._path = os.path.join(_directory(), f"{os.getpid()}.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            for pid in dead():
                remove_dead(pid)
            with _At(f"{os.getpid()}.sock") as at:
                try:
                    self._socket.bind(at)
                except OSError as error:  # left by a dead process that had our number
                    if error.errno != errno.EADDRINUSE:
                        raise
                    os.unlink(self._path)
                    self._socket.bind(at)
            os.chmod(self._path, 0o600)
            self._socket.listen(8)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EBADF):
                    return  # close() shut the socket down
                log.warning("control: %s", error.strerror)  # out of descriptors, say: that may pass
                time.sleep(1.0)
                continue
            with connection:
                connection.settimeout(_ANSWER_TIMEOUT)
                try:
                    self._answer(connection)
                except (OSError, ValueError, RecursionError) as error:  # of the last: JSON nested too deep
                    log.warning("control: a request was not answered: %s", error)

    def _answer(self, connection: socket.socket) -> None:
        _, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        if uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, f"user {uid} may not ask")
        with connection.makefile("rwb") as stream:
            request = json.loads(stream.readline(_LINE))
            if isinstance(request, dict) and request.get("command") == "status":
                answer = {"ok": True, "pid": os.getpid(), "monotonic": time.monotonic(), **self._status()}
            else:
                answer = {"ok": False, "error": "the commands are: status"}
            stream.write(json.dumps(answer).encode() + b"\n")

    def close(self) -> None:
        """Stops answering and removes the socket."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            log.warning("control: %s had been removed", self._path)


def ask(pid: int, request: dict[str, Any]) -> dict[str, Any]:
    """One request to the serving process `pid`. Raises OSError, ValueError."""
    with _At(f"{pid}.sock") as at, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as s:
        s.settimeout(_ANSWER_TIMEOUT)
        s.connect(at)
        with s.makefile("rwb") as stream:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            answer = json.loads(stream.readline())
    if not isinstance(answer, dict):
        raise ValueError(f"process {pid} answered {answer!r}")
    return answer


def ask_all(request: dict[str, Any], *, sweep: bool = True) -> list[dict[str, Any]]:
    """The answers of all serving processes of this user; sockets of dead ones are removed (if sweep), silent ones are
    said."""
    answers = []
    for pid in _pids():
        try:
            answers.append(ask(pid, request))
        except (ConnectionRefusedError, FileNotFoundError):
            if sweep:
                remove_dead(pid)
        except (OSError, ValueError) as error:
            answers.append({"ok": False, "pid": pid, "error": str(error)})
    return answers


def _pids() -> list[int]:
    stems = [name.removesuffix(".sock") for name in os.listdir(_directory())]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def remove_dead(pid: int) -> None:
    """Removes a socket that nobody listens on, unless its process lives: that one may be about to listen."""
    if not os.path.exists(f"/proc/{pid}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path_of(pid))


def path_of(pid: int) -> str:
    """The socket of process `pid`, there or not."""
    return os.path.join(_directory(), f"{pid}.sock")


def dead() -> list[int]:
    """Process numbers of the dead whose sockets are still there."""
    found = []
    for pid in _pids():
        if os.path.exists(f"/proc/{pid}"):
            continue
        with _At(f"{pid}.sock") as at, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as s:
            s.setblocking(False)
            try:
                s.connect(at)  # it lives in another process namespace
            except ConnectionRefusedError:
                found.append(pid)
            except (FileNotFoundError, BlockingIOError):
                continue  # gone meanwhile; so busy that it must live
    return found
