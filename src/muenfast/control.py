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
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from muenfast import shm
from muenfast.errors import MuenfastError, PeerLog, UsageError, describe
from muenfast.threads import spawn

log = logging.getLogger("muenfast")

_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_LINE = 1 << 16  # bytes of a request
_TEXT, _TEXTS = 4096, 256  # characters of a field; texts in a list
_ANSWER_TIMEOUT = 2.0  # seconds, of a whole request, and of a whole answer
MOST_SLOW = 16  # operations under way in one process


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


@dataclass(frozen=True, slots=True)
class Command:
    """One thing that may be asked for.

    run: called with the request's fields by name; what it returns (JSON-able) is the answer. fields: kind of each, one of
    KINDS; required: those that must be there. quick: it waits for nothing; of the others MOST_SLOW may be under way.
    """

    run: Callable[..., dict[str, Any]]
    fields: Mapping[str, str] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    quick: bool = True

    def take(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request's fields, checked; null is the same as none. Raises UsageError."""
        found = {name: value for name, value in request.items() if name != "command" and value is not None}
        for name, value in found.items():
            if name not in self.fields:
                raise UsageError(f"this command has no such field, but {', '.join(self.fields) or 'none'}", option="field",
                                 value=name)
            what, good = KINDS[self.fields[name]]
            if not good(value):
                raise UsageError(f"the field {name} is {what}", value=json.dumps(value)[:80])
        for name in self.required:
            if name not in found:
                raise UsageError("the field is missing", option="field", value=name)
        return found


def _is_text(value: object) -> bool:
    if type(value) is not str or len(value) > _TEXT or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


# What a field may hold, for messages and as a test.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": (f"a string of at most {_TEXT} characters, encodable as a file name", _is_text),
    "texts": (f"a list of 1 to {_TEXTS} such strings",
              lambda value: type(value) is list and 0 < len(value) <= _TEXTS and all(map(_is_text, value))),
    "number": ("a whole number from 0 to 2^62", lambda value: type(value) is int and 0 <= value <= 1 << 62),
    "flag": ("true or false", lambda value: type(value) is bool),
}


class ControlServer:
    """Answers {"command": NAME, FIELD: VALUE, ...} with what that command returns; open until close().

    commands: all there are. The answer has "ok"; where that is false "error", one line, and "status", as the command line
    ends with it: 2 for what nobody could have done, 1 for what failed.
    """

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = dict(commands)
        self._slow = threading.BoundedSemaphore(MOST_SLOW)
        self._answering: set[threading.Thread] = set()
        self._reading: set[socket.socket] = set()   # whose request has not come yet
        self._closing = False
        self._strangers = PeerLog("control")
        self._books = threading.Lock()  # of these four
        self._socket = self._listen()
        try:
            self._thread = spawn(self._serve, "control")
        except BaseException:
            self._socket.close()
            self._forget()
            raise

    def _listen(self) -> socket.socket:
        """Where this process is asked. Raises OSError."""
        self._path = os.path.join(_directory(), f"{os.getpid()}.sock")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            for pid in dead():
                remove_dead(pid)
            with _At(f"{os.getpid()}.sock") as at:
                try:
                    listening.bind(at)
                except OSError as error:  # left by a dead process that had our number
                    if error.errno != errno.EADDRINUSE:
                        raise
                    os.unlink(self._path)
                    listening.bind(at)
            if stat.S_IMODE(os.lstat(self._path).st_mode) & 0o077:     # as the umask left it
                os.chmod(self._path, 0o600)
            listening.listen(64)
        except BaseException:
            listening.close()
            raise
        return listening

    def _forget(self) -> None:
        """Takes away what _listen() left in the file system."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            log.warning("control: %s had been removed", self._path)

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
            # One thread each: who sends nothing, or asks for what takes long, keeps nobody waiting.
            thread = threading.Thread(target=self._attend, args=(connection,), name="control of one", daemon=True)
            with self._books:
                self._answering.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads are to be had
                with self._books:
                    self._answering.discard(thread)
                self._attend(connection)

    def _attend(self, connection: socket.socket) -> None:
        try:
            with connection:
                try:
                    self._answer(connection)
                except PermissionError as error:    # whom a name in an abstract namespace keeps from nothing but this
                    with self._books:
                        self._strangers.warning("a request was not answered: %s", error.strerror)
                except OSError as error:    # who asked has gone, or is slow: nobody else's business
                    log.info("control: a request was not answered: %s", error.strerror or error)
        finally:
            with self._books:
                self._answering.discard(threading.current_thread())

    def _answer(self, connection: socket.socket) -> None:
        _, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        if uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, f"user {uid} may not ask")
        with self._read(connection):
            line = _line(connection, time.monotonic() + _ANSWER_TIMEOUT)
        answer = self._execute(line)
        connection.settimeout(_ANSWER_TIMEOUT)  # of all that is sent
        connection.sendall(json.dumps(answer).encode() + b"\n")

    @contextlib.contextmanager
    def _read(self, connection: socket.socket) -> Iterator[None]:
        """Within, close() ends what is read: what has come by then is there, and nothing is waited for."""
        with self._books:
            self._reading.add(connection)
            if self._closing:
                connection.shutdown(socket.SHUT_RD)
        try:
            yield
        finally:
            with self._books:
                self._reading.discard(connection)

    def _execute(self, line: bytes) -> dict[str, Any]:
        try:
            try:
                request = json.loads(line)
            except (ValueError, RecursionError) as error:  # of the last: JSON nested too deep
                raise UsageError(f"a request is one line of JSON of at most {_LINE} bytes") from error
            name = request.get("command") if isinstance(request, dict) else None
            command = self._commands.get(name) if isinstance(name, str) else None
            if command is None:
                raise UsageError(f"the commands are: {', '.join(sorted(self._commands))}")
            fields = command.take(request)
            if not command.quick and not self._slow.acquire(blocking=False):
                raise BlockingIOError(errno.EAGAIN, f"{MOST_SLOW} operations are under way: try again later")
            try:
                return {"ok": True, "pid": os.getpid(), "monotonic": time.monotonic(), **command.run(**fields)}
            finally:
                if not command.quick:
                    self._slow.release()
        except UsageError as error:
            log.info("control: refused: %s", error)
            return {"ok": False, "pid": os.getpid(), "error": str(error), "status": 2}
        except (MuenfastError, OSError) as error:
            return {"ok": False, "pid": os.getpid(), "error": describe(error), "status": 1}
        except Exception as error:
            log.exception("control: a request failed")
            return {"ok": False, "pid": os.getpid(), "error": f"{type(error).__name__}: {error}", "status": 1}

    def close(self) -> None:
        """Stops answering, once what is under way is done, and removes the socket. Nobody is waited for who has not asked
        yet, and for an answer to be taken 2 s at most."""
        with self._books:
            self._closing = True
            for connection in self._reading:
                connection.shutdown(socket.SHUT_RD)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        while True:
            with self._books:
                if not self._answering:
                    break
                thread = next(iter(self._answering))
            thread.join()
        self._socket.close()
        self._forget()


def _line(connection: socket.socket, until: float) -> bytes:
    """What is sent up to the end of a line, of the sending, or of _LINE bytes. Raises TimeoutError, OSError."""
    found = bytearray()
    while len(found) < _LINE:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"it did not come within {_ANSWER_TIMEOUT:g} s")
        connection.settimeout(left)
        piece = connection.recv(_LINE - len(found))
        found += piece
        if not piece or b"\n" in piece:
            break
    return bytes(found.partition(b"\n")[0])


def ask(pid: int, request: dict[str, Any], *, timeout: float | None = _ANSWER_TIMEOUT) -> dict[str, Any]:
    """One request to the serving process `pid`. timeout: seconds to wait for its answer, None: no end, unless the process
    is stopped. Raises OSError, ValueError."""
    with _At(f"{pid}.sock") as at, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as s:
        s.settimeout(_ANSWER_TIMEOUT if timeout is None else timeout)
        found = bytearray()
        try:
            s.connect(at)
            s.sendall(json.dumps(request).encode() + b"\n")
            end = None if timeout is None else time.monotonic() + timeout
            while not found.endswith(b"\n"):
                if end is not None:
                    s.settimeout(max(end - time.monotonic(), 1e-3))
                try:
                    piece = s.recv(1 << 20)
                except TimeoutError:
                    if end is None and not stopped(pid):
                        continue
                    raise
                if not piece:
                    break
                found += piece
        except (TimeoutError, BlockingIOError):     # of the last: more wait to be accepted than may
            raise TimeoutError(errno.ETIMEDOUT, silence(pid)) from None
    if not found:
        raise ConnectionResetError(errno.ECONNRESET, "it ended the connection, perhaps itself")
    answer = json.loads(found)
    if not isinstance(answer, dict):
        raise ValueError(f"process {pid} answered {answer!r}")
    return answer


def stopped(pid: int) -> bool:
    """Whether that process is stopped, by SIGSTOP or the like."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):   # gone meanwhile
        return False


def silence(pid: int) -> str:
    """Why that process gives no answer, and what to do about it."""
    if stopped(pid):
        return f"it is stopped (SIGSTOP); `kill -CONT {pid}` has it go on"
    return "it lives, and is busy or hangs"


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
            why = error.strerror if isinstance(error, OSError) else None
            answers.append({"ok": False, "pid": pid, "error": why or str(error)})
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
