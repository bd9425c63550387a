"""Files of Unix sockets: made for one process alone, replaced and removed when that is dead.

sockets/ in the runtime directory has a record of each, which outlives its process; the claim on its path does not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import stat
import time

from muenfast import params, shm
from muenfast.errors import ClaimError, UsageError

log = logging.getLogger("muenfast")

MOST_PATH = 107  # bytes: sun_path of unix(7) with its NUL has 108
_IN_THE_MAKING = 1.0  # seconds: a record without contents that is younger may be being written


def paths_from_list(option: str, text: str) -> list[str]:
    """The entries of a list of sockets, each a path of its own. Raises UsageError; nothing is opened."""
    entries = params.split(option, text)
    spans = []
    for index, entry in enumerate(entries):
        _check_path(entry, option, index)
        spans.append((option, index, entry, _real(entry), 0, 1.0))
    params.apart(spans, "a socket serves one disk")
    return entries


def _check_path(path: str, option: str | None = None, index: int | None = None) -> None:
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise UsageError("a socket's path must be encodable as a file name", option=option, index=index,
                         value=path) from None
    if "\0" in path or path.endswith("/") or os.path.basename(path) in ("", ".", ".."):
        raise UsageError("a socket is a path that names a file", option=option, index=index, value=path)
    if length > MOST_PATH:
        raise UsageError(f"a socket's path has at most {MOST_PATH} bytes, this one has {length}", option=option,
                         index=index, value=path, hint="a path relative to the working directory may be shorter")


def _real(path: str) -> str:
    """What names the file whatever the working directory is later; the last component is not followed."""
    return os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))


def key_of(real: str) -> str:
    """Of the claim on a socket's path."""
    return f"socket-{real}"


def _listens(real: str) -> bool:
    """Whether somebody listens on a socket, whose path may be longer than MOST_PATH. Raises FileNotFoundError, OSError.
    """
    directory = os.open(os.path.dirname(real), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, directory)
        probe = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{directory}/{os.path.basename(real)}")
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # so many wait there that somebody must be
            return True
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:  # a socket of another type
                return True
            error.filename = real
            raise
    return True


class Listener:
    """A Unix socket's file, mode 0600 from its first moment on, from construction to close(); clients are refused until
    listen().

    What a dead process left at this path is replaced. Raises UsageError (the path), ClaimError (somebody listens
    there), FileExistsError (something else is there), OSError with the path.
    """

    def __init__(self, path: str) -> None:
        _check_path(path)
        self.path, self._path = path, _real(path)
        for record, left, _ in records(shm.runtime_dir()):
            if left != self._path:
                try:
                    remove_dead(record, left)
                except OSError as error:  # somebody else's affair: doctor tells
                    log.info("%s: %s", left, error.strerror or error)
        with contextlib.ExitStack() as undo:
            claim = shm.claim(key_of(self._path), f"the socket {path}", {"socket": self._path})
            undo.callback(claim.release)
            self._make_room()
            self._record = _note(self._path)
            undo.callback(_forget, self._record)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            undo.callback(self.socket.close)
            self.socket.setblocking(False)
            os.fchmod(self.socket.fileno(), 0o600)  # bind(2) gives the file this mode, less the umask
            try:
                self.socket.bind(path)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from error
            seen = os.lstat(self._path)
            self._inode = seen.st_dev, seen.st_ino
            undo.callback(self._unlink)
            self._undo = undo.pop_all()

    def _make_room(self) -> None:
        try:
            seen = os.lstat(self._path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(seen.st_mode):
            raise FileExistsError(errno.EEXIST, "something else than a socket is there", self.path)
        with contextlib.suppress(FileNotFoundError):
            if _listens(self._path):
                raise ClaimError(f"the socket {self.path}", "a process that listens there",
                                 hint="fuser tells which one")
            os.unlink(self._path)

    def _unlink(self) -> None:
        try:
            seen = os.lstat(self._path)
        except FileNotFoundError:
            log.warning("%s had been removed", self.path)
            return
        if (seen.st_dev, seen.st_ino) == self._inode:
            os.unlink(self._path)
        else:
            log.warning("%s had been replaced, and stays", self.path)

    def listen(self, backlog: int) -> None:
        """Lets clients connect."""
        self.socket.listen(backlog)

    def close(self) -> None:
        """Removes the file; idempotent."""
        self._undo.close()


def _note(real: str) -> str:
    """Says in the books that this process makes a socket there, for those who clean up. Precondition: claimed."""
    room = os.path.join(shm.runtime_dir(), "sockets")
    with contextlib.suppress(FileExistsError):
        os.mkdir(room, 0o700)
    record = os.path.join(room, hashlib.sha256(os.fsencode(real)).hexdigest())
    fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump({"socket": real, "pid": os.getpid()}, file)
    return record


def _forget(record: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(record)


def records(runtime_dir: str | os.PathLike[str]) -> list[tuple[str, str, int]]:
    """(record, path of the socket, process) of every socket in the books, a living process's too; nothing is made.

    A record without contents, of a process that died as it wrote it, has "" and 0.
    """
    room = os.path.join(runtime_dir, "sockets")
    found = []
    for name in sorted(os.listdir(room)) if os.path.isdir(room) else ():
        record = os.path.join(room, name)
        try:
            with open(record, encoding="utf-8") as file:
                state = json.load(file)
            found.append((record, str(state["socket"]), int(state["pid"])))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):    # of the last two: Infinity, too deep
            found.append((record, "", 0))
    return found


def remove_dead(record: str, path: str) -> bool:
    """Removes a socket that its dead process left, and its record; False when somebody lives there. Raises OSError."""
    if not path:
        try:
            if time.time() - os.stat(record).st_mtime > _IN_THE_MAKING:  # not one that is being written now
                _forget(record)
        except FileNotFoundError:
            pass
        return not os.path.lexists(record)
    try:
        claim = shm.claim(key_of(path), path)
    except ClaimError:
        return False
    with claim:
        try:
            seen = os.lstat(path)
            if stat.S_ISSOCK(seen.st_mode) and seen.st_uid == os.geteuid():
                if _listens(path):  # another program's by now
                    _forget(record)
                    return True
                os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        _forget(record)
    return True
