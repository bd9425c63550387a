"""Regions of shared memory by name, who uses them, and claims on what may have one holder only.

Book-keeping, in runtime_dir() (private to one user; nothing in it is a peer's word):

    regions/DEV-INO             JSON {"name", "path", "auto": true, "boot"}: muenfast made this inode by itself, and
                                its last clean leaver unlinks it. Absent: made by `chan create` or by somebody else.
    regions/DEV-INO~PID-RANDOM  one per open Region, its JSON says who; flocked by that Region
    claims/KEY                  one per exclusive claim, flocked by its holder
    claims/KEY~PID-RANDOM       one per claim that is shared or of a part ("span"), flocked by its holder

A record is a name of a file that its process keeps locked: up to 256 records of a directory are names of one file, in which
each has a line, NAME JSON; a line is written before its name is there. A note is such a name, too, and is read only.
A record counts only while it is locked, so the kernel ends those of a dead process. Invariant: records are made,
probed and swept only under an exclusive flock on the directory they are in; so a probe is never mistaken for a holder,
and nobody sweeps a record between its making and its locking. Dropping one's own record needs no such lock.
Whoever holds the directory's lock does no more than a few system calls, or a few for each of 16 regions (made_ahead), and
others wait for it for 5 s at most.

A region that was opened unseen (strict one-way readers) has no record at all: nothing here knows of it.

Fork: an flock belongs to the open file, which a forked child shares. A child that goes on without exec therefore keeps
those of its parent's records that were made before it alive until it ends too, or has let go of all: close() and release()
in such a child let go of its own copies only.
Threads: a Region or Claim may be used and closed from any thread. All sizes and offsets are in bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import mmap
import os
import re
import stat
import struct
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import posix_ipc  # type: ignore[import-not-found]

from muenfast.errors import ClaimError, PeerError, UsageError
from muenfast.inodes import DIRECTORY as DIRECTORY
from muenfast.inodes import LEAST, Stock

_RUN = "/run/muenfast"
_TEMPORARY = ".muenfast-"
_LOT = 16   # regions that are made under one lock of the books
_MODE = 0o600  # of a region, where nothing says otherwise
_NAME_MAX = 240  # leaves room for ".bell" and the temporary prefix below NAME_MAX of 255

_MUTEX_TIMEOUT = 5.0  # s: for the lock of a book-keeping directory
_REPLACED_TIMEOUT = 5.0  # s: for a name that means another inode whenever we look
_EMPTY_TIMEOUT = 1.0  # s: for a foreign peer between shm_open and ftruncate

_POPULATE_READ = 22  # MADV_POPULATE_READ, asm-generic/mman-common.h, Linux 5.14
_FILLED_BY_LOOKS = ("tmpfs", "devtmpfs")  # file systems where a look at a hole of a mapped file allocates it

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock, bits/fcntl.h: type, whence, start, length, pid

_SIZE = r"(0[xX][0-9a-fA-F]{1,20}|[0-9]{1,20})([KkMmGg]?)"
_SLICE = re.compile(rf"{_SIZE}\+{_SIZE}")
_UNIT = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


# ---- locators


def _bytes(digits: str, unit: str) -> int:
    value = int(digits, 16) if digits[:2] in ("0x", "0X") else int(digits)
    return value * _UNIT[unit.lower()]


@dataclass(frozen=True, slots=True)
class Locator:
    """The name of a region: NAME (POSIX shared memory), /path, or /path@OFFSET+SIZE (a slice).

    text: as given. path: the file that it means. posix: it was a NAME. offset, size: of the slice; size None is all.
    """

    text: str
    path: str
    posix: bool
    offset: int = 0
    size: int | None = None

    @classmethod
    def parse(cls, text: str, *, option: str | None = None, index: int | None = None) -> Locator:
        """OFFSET and SIZE are decimal or 0x hexadecimal, with K, M or G (powers of 1024). Raises UsageError.

        The last "@" in the last component of a path begins a slice, always. option and index only serve the message.
        """

        def check(good: bool, rule: str) -> None:
            if not good:
                raise UsageError(rule, option=option, index=index, value=text)

        check(text != "", "a locator must not be empty")
        check("\0" not in text, "a locator must not contain NUL")
        try:
            encoded = os.fsencode(text)
        except UnicodeEncodeError:
            check(False, "a locator must be encodable as a file name")
        check(not text.endswith(".bell"), "the ending .bell is reserved for the bell beside a region")
        if not text.startswith("/"):
            check("/" not in text, "a name must not contain '/'; a path must be absolute")
            check(text not in (".", ".."), "'.' and '..' are not names")
            check(len(encoded) <= _NAME_MAX, f"a name must not be longer than {_NAME_MAX} bytes")
            check(not text.startswith(_TEMPORARY), f"names that begin with {_TEMPORARY} are reserved")
            return cls(text, DIRECTORY + text, True)
        check(not text.endswith("/"), "a path must name a file")
        directory, _, last = text.rpartition("/")
        name, at, numbers = last.rpartition("@")
        if not at:
            return cls(text, text, False)
        found = _SLICE.fullmatch(numbers) if name else None
        if found is None:
            raise UsageError("a slice is /path@OFFSET+SIZE", option=option, index=index, value=text)
        offset, size = _bytes(found[1], found[2]), _bytes(found[3], found[4])
        check(size > 0, "a slice must not be empty")
        check(offset + size < 1 << 63, "a slice must end below 2^63")
        return cls(text, f"{directory}/{name}", False, offset, size)

    @property
    def bell(self) -> Locator | None:
        """The bell beside it; None where nothing can be made (sysfs, muenfs), and for a bell."""
        clean = os.path.normpath("/" + self.path.lstrip("/")) + "/"
        if clean.startswith(("/sys/", "/muenfs/")) or self.path.endswith(".bell"):
            return None
        if self.posix:
            return Locator(self.text + ".bell", self.path + ".bell", True)
        path = f"{self.path}.bell" if self.size is None else f"{self.path}@{self.offset}.bell"
        return Locator(path, path, False)


@dataclass(frozen=True, slots=True)
class Permit:
    """To whom a region has to belong, and with which mode, where a policy says so: no other one is taken in its place.

    by: what says so, for messages. Whoever owns a region may remove its name and make it anew, as it likes.
    """

    uid: int
    gid: int
    mode: int
    by: str = "the policy"

    def difference(self, seen: os.stat_result) -> str | None:
        """What is different, in words."""
        found, expected = ((uid, gid, f"{mode:03o}") for uid, gid, mode in (
            (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)), (self.uid, self.gid, self.mode)))
        if found == expected:
            return None
        return "has user {}, group {}, mode {}, instead of user {}, group {}, mode {}".format(*found, *expected)

    def check(self, fd: int, path: str) -> None:
        """Raises PermissionError unless the file open at fd is as it has to be."""
        difference = self.difference(os.fstat(fd))
        if difference is None and has_acl(fd):
            difference = "has an access control list, which may let others in"
        if difference is not None:
            raise PermissionError(errno.EPERM, f"{difference}, as {self.by} has it (`muenfast policy audit` tells more)",
                                  path)


def has_acl(file: int | str) -> bool:
    """Whether more than owner, group and mode say who may open a file."""
    try:
        os.getxattr(file, "system.posix_acl_access")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise
    return True


# ---- small tools


@contextlib.contextmanager
def _named(path: str, text: str | None = None) -> Iterator[None]:
    """Gives an OSError of the block the path that it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, text or error.strerror, path) from error


def _unlink(path: str, only: os.stat_result | None = None) -> None:
    """Gone is fine. only: unless path names another inode than this."""
    with contextlib.suppress(FileNotFoundError):
        if only is None or _means(path, only.st_dev, only.st_ino, follow=False):
            os.unlink(path)


def _means(path: str, device: int, inode: int, *, follow: bool = True) -> bool:
    """path names this very inode now."""
    try:
        now = os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (now.st_dev, now.st_ino) == (device, inode)


def _read(fd: int, name: str) -> dict[str, Any]:
    """What the record or note of that name says, the last of its lines; {} when there is none (its writer died)."""
    data = b"\n" + os.pread(fd, os.fstat(fd).st_size, 0)
    if data.startswith(b"\n{"):      # one of its own, as they were once
        line = data
    else:
        _, _, line = data[:data.rfind(b"\n") + 1].rpartition(b"\n" + os.fsencode(name) + b" ")
        line = line.partition(b"\n")[0]
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):    # of the last: nested too deep
        return {}
    return value if isinstance(value, dict) else {}


@functools.cache
def _boot() -> str:
    """Inode numbers of a tmpfs start again with each boot, files of /tmp may outlive it."""
    with contextlib.suppress(FileNotFoundError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def _identity(what: str, extra: dict[str, Any] | None) -> dict[str, Any]:
    program, *arguments = sys.argv or [""]
    if os.path.basename(program) == "__main__.py":
        program = os.path.dirname(program)
    role = os.path.basename(program)
    if role in ("", "-", "-c", "-m"):
        role = "python"
    if arguments and re.fullmatch("[a-z][a-z-]*", arguments[0]):
        role += " " + arguments[0]
    pid = os.getpid()
    return {"role": role, **(extra or {}), "pid": pid, "comm": _comm(pid), "what": what, "since": time.time()}


@functools.cache
def _comm(pid: int) -> str:
    """Our own, as it was first asked for."""
    with open("/proc/self/comm", errors="replace") as file:
        return file.read().strip()


def _describe(info: dict[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(info["since"]))
    return f"process {info['pid']} ({info['role']}, since {since})"


# ---- the runtime directory and its records


def runtime_dir(*, make: bool = True) -> str:
    """The directory of claims, presence and control sockets of this user, made when missing (mode 0700) unless not make.

    $MUENFAST_RUNTIME_DIR, else /run/muenfast for root, else /run/muenfast-UID where that is (give_runtime_dir() makes it),
    else $XDG_RUNTIME_DIR/muenfast, else /tmp/muenfast-UID.
    Raises PermissionError when it is somebody else's or others may write to it, OSError when it cannot be made, and
    without make FileNotFoundError (its path in filename) when it is not there.
    """
    uid = os.geteuid()
    path = runtime_dir_of(uid)
    try:
        seen = os.lstat(path)
    except FileNotFoundError:
        if not make:
            raise
        os.makedirs(path, 0o700, exist_ok=True)
        seen = os.lstat(path)
    if not stat.S_ISDIR(seen.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    if seen.st_uid != uid:
        raise PermissionError(errno.EPERM, f"runtime directory belongs to user {seen.st_uid}, not to {uid}", path)
    if seen.st_mode & 0o022:
        raise PermissionError(errno.EPERM, f"others may write here (mode {seen.st_mode & 0o7777:o})", path)
    return path


def runtime_dir_of(uid: int) -> str:
    """Where runtime_dir() is for a user with this environment."""
    if given := os.environ.get("MUENFAST_RUNTIME_DIR"):
        return os.path.abspath(given)
    if uid == 0:
        return _RUN
    if os.path.lexists(f"{_RUN}-{uid}"):
        return f"{_RUN}-{uid}"
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(os.path.abspath(given), "muenfast")
    return f"/tmp/muenfast-{uid}"


def give_runtime_dir(uid: int, gid: int) -> None:
    """As root makes the directory of a user who can make none in /run. Raises OSError; what stands there in its place is
    not touched."""
    path = f"{_RUN}-{uid}"
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        seen = os.lstat(path)
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid not in (0, uid):
            raise OSError(errno.EEXIST, f"is to be user {uid}'s runtime directory, and is something else", path) from None
    seen = os.lstat(path)
    if (seen.st_uid, seen.st_gid) != (uid, gid):    # else nobody sees that we looked
        os.chown(path, uid, gid, follow_symlinks=False)


def _room(name: str) -> str:
    path = os.path.join(runtime_dir(), name)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    return path


@contextlib.contextmanager
def _mutex(room: str) -> Iterator[None]:
    """Alone in room, among all processes and threads of this user. Not recursive.

    Raises TimeoutError after _MUTEX_TIMEOUT: its holder was stopped in the middle.
    """
    fd = os.open(room, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _MUTEX_TIMEOUT
        while True:
            with contextlib.suppress(BlockingIOError), _named(room):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "a process that was stopped holds the book-keeping", room)
            time.sleep(0.0005)
        yield
    finally:
        # Unlock, not only close: another thread may have forked, and the child has the descriptor too.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


# Paths of records from locking to drop(), and the process whose they are: to that one they live. A forked child looks, for
# it is not told when its parent drops one.
_held: dict[str, int] = {}


class _File:
    """The locked file whose names are records, of one process in one room: making a name is cheaper than making a file, and
    on an ext4 from which many were just deleted by far. open until its last record is dropped."""

    __slots__ = ("_end", "_fd", "_inode", "_lines", "_paths", "pid")

    MOST = 256  # lines: who reads one reads them all, 50 KB or so

    def __init__(self, path: str, line: bytes) -> None:
        """path: its first record."""
        self.pid, self._paths, self._lines, self._end = os.getpid(), {path}, 0, 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            seen = os.fstat(self._fd)
            self._inode = seen.st_dev, seen.st_ino
            with _named(path):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._append(line)
        except BaseException:
            self.drop(path)
            raise

    def _append(self, line: bytes) -> None:
        if os.pwrite(self._fd, line, self._end) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)
        self._lines += 1

    def write(self, lines: Sequence[bytes]) -> bool:
        """For names that link() gives it. False: that needs another file. Raises OSError."""
        if self._fd < 0 or self._lines + len(lines) > self.MOST:
            return False
        self._append(b"".join(lines))
        self._lines += len(lines) - 1
        return True

    def add(self, path: str, line: bytes, *, record: bool) -> bool:
        """Gives it one more name; False: that needs another file. record: not a note. Raises FileExistsError."""
        with contextlib.suppress(OSError), _named(path):
            return self.write([line]) and self.link(path, record=record)
        return False

    def link(self, path: str, *, record: bool) -> bool:
        """As add(), of a line that is written."""
        if not self._paths:
            return False
        with contextlib.suppress(OSError):
            source = next(iter(self._paths))
            try:
                os.link(source, path)
            except FileExistsError:
                raise _Stands(path) from None
            # A random number in its name: that one never is another file.
            if "~" in source or _means(path, *self._inode, follow=False):
                if record:
                    self._paths.add(path)
                return True
            os.unlink(path)     # somebody tidied up, and another one has the name that we linked
        return False

    def drop(self, path: str) -> None:
        """Takes a record's name away, unless in a child of fork(), where it is the parent's."""
        self._paths.discard(path)
        try:
            if self.pid == os.getpid() and _means(path, *self._inode, follow=False):
                _unlink(path)
        finally:
            if not self._paths:
                fd, self._fd = self._fd, -1
                os.close(fd)


_files: dict[str, _File] = {}  # room -> that which takes the next record
_files_lock = threading.Lock()  # of these, and what they hold


def _forked_parent() -> None:
    """What is made from now on goes into new files: the child, which shares the locks of those that there are, would keep
    it alive behind us."""
    _files.clear()
    _files_lock.release()


# Held meanwhile: no thread is in the middle of a record, here or in the child.
os.register_at_fork(before=_files_lock.acquire, after_in_parent=_forked_parent, after_in_child=_files_lock.release)


class _Stands(Exception):
    """A name is taken."""


def _line(name: str, info: dict[str, Any]) -> bytes:
    return os.fsencode(name) + b" " + json.dumps(info).encode() + b"\n"


def _enter(path: str, info: dict[str, Any], *, record: bool) -> _File | None:
    """Makes a record or (None) a note. Precondition: the room's mutex is held. Raises FileExistsError, OSError."""
    room, _, name = path.rpartition("/")
    line = _line(name, info)
    with _files_lock:
        file = _files.get(room)
        try:
            if file is not None and file.pid == os.getpid() and file.add(path, line, record=record):
                return file
        except _Stands:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        if record:
            file = _files[room] = _File(path, line)
            return file
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with _named(path):
            if os.pwrite(fd, line, 0) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)
    return None


def _written(room: str, lines: Sequence[bytes]) -> _File | None:
    """The file that takes the next records of room, with these lines in it. None: there is none with room for them.
    Precondition: the room's mutex is held."""
    with _files_lock:
        file = _files.get(room)
        with contextlib.suppress(OSError):
            if file is not None and file.pid == os.getpid() and file.write(lines):
                return file
    return None


def _link_written(file: _File, path: str, *, record: bool) -> bool:
    """Whether a name of which file has the line was made. Not where we were forked meanwhile: the child has it, too.
    Precondition: the room's mutex is held. Raises FileExistsError."""
    with _files_lock:
        try:
            return _files.get(path.rpartition("/")[0]) is file and file.link(path, record=record)
        except _Stands:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None


class _Record:
    """A name that says who we are, and that we live: of a locked file until drop() or our end."""

    __slots__ = ("_file", "_path", "pid")

    def __init__(self, path: str, info: dict[str, Any], file: _File | None = None) -> None:
        """file: that has its line. Precondition: the room's mutex is held, and no file stands at path."""
        self._path, self.pid = path, os.getpid()
        if file is None or not _link_written(file, path, record=True):
            file = _enter(path, info, record=True)
        self._file = file
        _held[path] = self.pid

    def drop(self) -> None:
        """Idempotent. Its name goes before its lock may: a free name never carries our lock."""
        with _files_lock:
            file, self._file = self._file, None
            if file is not None:
                _held.pop(self._path, None)
                file.drop(self._path)


def _probe(path: str, sweep: bool = True) -> dict[str, Any] | None:
    """Info of a record's live holder; a dead one's file is removed (if sweep). Precondition: the room's mutex is held.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        with _named(path):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        name = os.path.basename(path)
        return {"key": name, "role": "unknown", "what": "unknown", "pid": 0, "since": 0.0, **_read(fd, name)}
    else:
        if sweep:
            _unlink(path)
        return None
    finally:
        os.close(fd)


def _live(room: str, name: str | None = None, sweep: bool = True) -> list[dict[str, Any]]:
    """Live records of one name (or all), oldest first. Precondition: the room's mutex is held."""
    found = []
    for entry in os.listdir(room):
        stem, tilde, _ = entry.partition("~")
        if name in (None, stem) and (tilde or os.path.basename(room) == "claims"):
            info = _probe(os.path.join(room, entry), sweep)
            if info is not None:
                found.append(info)
    return sorted(found, key=lambda info: float(info["since"]))


_swept: set[str] = set()


def _sweep() -> None:
    """Once per process: what dead processes left, about inodes whose name no longer means them."""
    if runtime_dir_of(os.geteuid()) in _swept:
        return
    _swept.add(runtime_dir())
    claimed, room = _room("claims"), _room("regions")
    with _mutex(claimed):
        _live(claimed)
    with _mutex(room):
        _live(room)
        for entry in os.listdir(room):
            if "~" not in entry:
                _auto(room, entry)
        for path in _temporaries():
            with contextlib.suppress(OSError):
                _probe(path)


def _temporaries() -> list[str]:
    """This user's temporary files below /dev/shm, a living maker's too."""
    found = []
    for entry in sorted(os.listdir(DIRECTORY)) if os.path.isdir(DIRECTORY) else ():
        if entry.startswith(_TEMPORARY):
            with contextlib.suppress(FileNotFoundError):
                seen = os.lstat(DIRECTORY + entry)
                if stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid():
                    found.append(DIRECTORY + entry)
    return found


# ---- who uses a region


def _key(device: int, inode: int) -> str:
    return f"{device}-{inode}"


def _auto(room: str, key: str, sweep: bool = True) -> str | None:
    """The path of an automatic region while it still means the inode of key, else None; a stale note is removed (if
    sweep).

    Precondition: the room's mutex is held. A note is made before the link and under the same mutex, so one whose path
    means something else is stale, whoever uses that inode.
    """
    note = os.path.join(room, key)
    try:
        fd = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        state = _read(fd, key)
    finally:
        os.close(fd)
    path = state.get("path")
    device, _, inode = key.partition("-")
    if isinstance(path, str) and state.get("auto") is True and state.get("boot") == _boot():
        if _means(path, int(device), int(inode), follow=False):
            return path
    if sweep:
        _unlink(note)
    return None


class _Draft:
    """What is to be a record that one Region uses an inode, and a note that it is an automatic one."""

    __slots__ = ("info", "key", "locator", "name")

    def __init__(self, seen: os.stat_result, locator: Locator, writable: bool) -> None:
        self.key, self.locator = _key(seen.st_dev, seen.st_ino), locator
        self.name = f"{self.key}~{os.getpid()}-{os.urandom(8).hex()}"
        self.info = _identity(f"region {locator.text}", {"name": locator.text, "writable": writable})
        self.info["key"] = self.key

    @property
    def note(self) -> dict[str, Any]:
        return {"name": self.locator.text, "path": self.locator.path, "auto": True, "boot": _boot()}

    @property
    def lines(self) -> tuple[bytes, bytes]:
        return _line(self.name, self.info), _line(self.key, self.note)


class _Presence:
    """That one Region uses an inode. Precondition of making one: the room's mutex is held."""

    __slots__ = ("_key", "_record", "_room")

    def __init__(self, room: str, draft: _Draft, file: _File | None = None) -> None:
        """file: that has the draft's line."""
        self._room, self._key = room, draft.key
        self._record = _Record(f"{room}/{draft.name}", draft.info, file)

    def drop(self) -> None:
        """Leaves without looking whether somebody else is still there. Idempotent."""
        self._record.drop()

    def leave(self, keep: bool = False) -> None:
        """A clean leave: the last one takes an automatic region's name away, unless keep."""
        try:
            if keep or self._record.pid != os.getpid():
                return
            with contextlib.suppress(FileNotFoundError), _mutex(self._room):  # the book-keeping was removed: not ours
                self.drop()
                if _live(self._room, self._key):
                    return
                path = _auto(self._room, self._key)
                if path is not None:
                    _unlink(path)
                    _unlink(os.path.join(self._room, self._key))
        finally:
            self.drop()


# ---- making a region


def _make_inode(stack: contextlib.ExitStack, path: str, size: int, mode: int,
                owner: tuple[int, int] | None = None) -> tuple[int, str]:
    """A new inode beside path, allocated in full: its descriptor (read-write) and a name for _link; stack owns both.

    It has no name at all where O_TMPFILE exists. Elsewhere its temporary one is locked while its maker lives (_sweep).
    """
    directory = os.path.dirname(path)
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(directory, flags | os.O_TMPFILE, 0o600)
        stack.callback(os.close, fd)
        source = f"/proc/self/fd/{fd}"
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise OSError(error.errno, error.strerror, path) from error
        while True:
            source = os.path.join(directory, f"{_TEMPORARY}{os.getpid()}-{os.urandom(8).hex()}")
            with _named(path):
                fd = os.open(source, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                stack.callback(os.close, fd)
                stack.callback(_unlink, source)
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.fstat(fd).st_nlink:  # else swept before we had the lock
                    break
    with _named(path, f"cannot allocate {size} bytes for the region"):
        os.posix_fallocate(fd, 0, size)
    with _named(path):
        if owner is not None:
            os.fchown(fd, *owner)
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:  # may be refused to a process that serves by a policy
            os.fchmod(fd, mode)
    return fd, source


def _link(fd: int, source: str, path: str) -> None:
    with _named(path):
        # A directory descriptor makes Python call linkat, with AT_SYMLINK_FOLLOW; source is absolute, so any will do.
        os.link(source, path, src_dir_fd=fd, follow_symlinks=True)


def _create(locator: Locator, size: int, mode: int, writable: bool) -> tuple[int, _Presence] | None:
    """Makes an automatic region and uses it: descriptor and presence. None when somebody else was faster."""
    with contextlib.ExitStack() as stack:
        room = _room("regions")
        fd, source = _make_inode(stack, locator.path, size, mode)
        seen = os.fstat(fd)
        with _mutex(room):
            presence = _linked(room, fd, source, seen, _Draft(seen, locator, writable))
        if presence is None:
            return None
        with contextlib.ExitStack() as undo:
            undo.callback(presence.leave)
            # By its name: read-only for a reader, and the name is what /proc/PID/maps shows.
            try:
                own = _open(locator, writable)
            except FileNotFoundError:
                return None
            undo.callback(os.close, own)
            again = os.fstat(own)
            if (again.st_dev, again.st_ino) != (seen.st_dev, seen.st_ino):
                return None
            undo.pop_all()
            return own, presence


def _linked(room: str, fd: int, source: str, seen: os.stat_result, draft: _Draft,
            file: _File | None = None) -> _Presence | None:
    """Gives a new inode its name, as an automatic region that we use. None when somebody else was faster. file: that has
    the draft's lines. Precondition: the room's mutex is held. Raises OSError."""
    locator, note = draft.locator, f"{room}/{draft.key}"
    presence = _Presence(room, draft, file)
    try:
        # Before the link: whenever the maker dies, the name is either not there or known as automatic.
        with _named(note):
            _note(note, draft, file)
        _link(fd, source, locator.path)
    except BaseException as error:
        with contextlib.ExitStack() as undo:
            undo.callback(presence.drop)
            undo.callback(_unlink, note)
            undo.callback(_unlink, locator.path, seen)
        if isinstance(error, FileExistsError) and error.filename == locator.path:
            return None
        raise
    return presence


def _note(path: str, draft: _Draft, file: _File | None) -> None:
    for _ in range(2):
        try:
            if file is None or not _link_written(file, path, record=False):
                _enter(path, draft.note, record=False)
            return
        except FileExistsError:     # about an inode that is no more: we have just been given its number
            _unlink(path)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


# A region that is to be opened: its name, bytes where it is missing, whether to write.
Wanted = tuple[Locator, int, bool]


class _Ahead:
    """Missing regions of one start, made a lot at a time for the first of them that is opened.

    Their inodes are allocated by a thread meanwhile, for to clear that memory takes as long as all that the interpreter has
    to do for them. Invariant: a region gets its name only once it is allocated in full, as everywhere. What cannot be had
    here is not made here: Region.open() tries by itself, and tells why it fails.
    """

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        """wanted: of POSIX names."""
        there = set(os.listdir(DIRECTORY))
        missing = [each for each in wanted if each[0].text not in there]
        self._lots = [missing[k:k + _LOT] for k in range(0, len(missing), _LOT)]
        self._stock = None if len(missing) < LEAST else Stock([[size for _, size, _ in lot] for lot in self._lots])
        self._to_come = set() if self._stock is None else {locator.path for locator, _, _ in missing}
        self._made: dict[str, tuple[int, bool, os.stat_result, _Presence]] = {}
        self._making = threading.Lock()     # of all above

    def take(self, locator: Locator, size: int, writable: bool) -> tuple[os.stat_result, _Presence] | None:
        """A region that was made for this, and our record there. None: it is not made here. Raises OSError."""
        with self._making:
            while locator.path in self._to_come:
                assert self._stock is not None
                lot = self._lots.pop(0)
                self._to_come -= {each.path for each, _, _ in lot}
                self._make(lot, self._stock.take())
            found = self._made.get(locator.path)
            if found is None or found[:2] != (size, writable):
                return None
            del self._made[locator.path]
            return found[2:]

    def _make(self, lot: Sequence[Wanted], inodes: list[int]) -> None:
        """Takes the inodes over. Raises OSError of the book-keeping."""
        with contextlib.ExitStack() as stack:
            for fd in inodes:
                stack.callback(os.close, fd)
            room = _room("regions")
            drafts = []
            for (locator, _, writable), fd in zip(lot, inodes, strict=False):
                seen = os.fstat(fd)
                if stat.S_IMODE(seen.st_mode) != _MODE:
                    os.fchmod(fd, _MODE)
                drafts.append((seen, _Draft(seen, locator, writable)))
            with _mutex(room):
                file = _written(room, [line for _, draft in drafts for line in draft.lines])
                for (locator, size, writable), fd, (seen, draft) in zip(lot, inodes, drafts, strict=False):
                    presence = _linked(room, fd, f"/proc/self/fd/{fd}", seen, draft, file)
                    if presence is not None:
                        self._made[locator.path] = size, writable, seen, presence

    def close(self) -> None:
        """Leaves what was not taken."""
        with contextlib.ExitStack() as stack:
            for _, _, _, presence in self._made.values():
                stack.callback(presence.leave)
            if self._stock is not None:
                stack.callback(self._stock.close)


_aheads: tuple[_Ahead, ...] = ()
_aheads_lock = threading.Lock()


@contextlib.contextmanager
def made_ahead(wanted: Sequence[Wanted]) -> Iterator[None]:
    """Within, Region.open() is faster with those of `wanted` (POSIX names) that it would make, where they are many.

    In any thread; nothing else about it differs, but that regions are there earlier. Those that were not opened by the end
    are left again.
    """
    global _aheads
    if len(wanted) < LEAST:     # nor does one look whether they are there
        yield
        return
    ahead = _Ahead(wanted)
    with _aheads_lock:
        _aheads += ahead,
    try:
        yield
    finally:
        with _aheads_lock:
            _aheads = tuple(other for other in _aheads if other is not ahead)
        ahead.close()


def _taken_ahead(locator: Locator, size: int, writable: bool) -> tuple[os.stat_result, _Presence] | None:
    for ahead in _aheads:
        if (found := ahead.take(locator, size, writable)) is not None:
            return found
    return None


def _open(locator: Locator, writable: bool) -> int:
    if not locator.posix:
        access = os.O_RDWR if writable else os.O_RDONLY
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        return os.open(locator.path, access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        return int(posix_ipc.SharedMemory(locator.path[len(DIRECTORY) - 1:], read_only=not writable).fd)
    except posix_ipc.ExistentialError:
        number = errno.ENOENT
    except posix_ipc.PermissionsError:
        number = errno.EACCES
    except OSError as error:
        number = error.errno or errno.EIO
    raise OSError(number, os.strerror(number), locator.path)


def _open_unseen(locator: Locator) -> int:
    """A descriptor to read, by one open() and without an access time that changes: neither the file's, where it is our
    own or we may (O_NOATIME), nor that of a symbolic link, which is refused. Raises UsageError, OSError."""
    with _named(locator.path):
        if not locator.posix:
            parts = os.path.normpath(locator.path).split("/")
            for place in ("/".join(parts[:n]) for n in range(2, len(parts) + 1)):
                if stat.S_ISLNK(os.lstat(place).st_mode):
                    raise SeenError(f"{place} is a symbolic link, and following one leaves an access time: strict one-way "
                                    "needs a path without", value=locator.text)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            try:
                return os.open(locator.path, flags | os.O_NOATIME)
            except PermissionError as error:
                if error.errno != errno.EPERM:  # EPERM: somebody else's, of which nothing was opened yet
                    raise
            return os.open(locator.path, flags)
        except BlockingIOError as error:
            raise OSError(error.errno, "its owner holds a lease on it (F_SETLEASE)", locator.path) from error


def _hollow(fd: int, locator: Locator) -> bool:
    """Whether the region has holes, in a file of a tmpfs. Of a slice where others have some: also what is allocated and was
    never touched, which the kernel does not tell from one there."""
    seen = os.fstat(fd)
    if seen.st_blocks * 512 >= seen.st_size:
        return False
    end = seen.st_size if locator.size is None else min(locator.offset + locator.size, seen.st_size)
    return locator.offset < end and os.lseek(fd, locator.offset, os.SEEK_HOLE) < end


# ---- regions


class SeenError(UsageError):
    """Reading this region leaves something that who writes it sees."""


class Region:
    """One mapping of a region (or slice), and the note that this process uses it; a context manager.

    size: bytes mapped. device, inode: what the name meant. created: this process made it. unseen: there is no such note,
    and nothing else that who writes the region could see; then it is never writable, nor opened again.
    view: exactly the region or slice; read-only unless writable. Dead after close(), but a buffer taken from it before
    keeps the mapping until it is released itself.
    """

    __slots__ = ("_fd", "_lock", "_mmap", "_presence", "_solid", "created", "device", "inode", "locator", "size", "unseen",
                 "view", "writable")

    def __init__(self, locator: Locator, writable: bool, created: bool, fd: int, seen: os.stat_result,
                 presence: _Presence | None, solid: bool = False) -> None:
        """Use Region.open or Region.open_unseen. Takes fd and presence over unless it raises. solid: with holes it is as if
        it were truncated."""
        regular = stat.S_ISREG(seen.st_mode)
        end = seen.st_size if regular else 1 << 63
        if locator.size is not None:
            size = locator.size
            if locator.offset + size > end:
                raise UsageError(f"the slice ends at {locator.offset + size}, beyond the file's {end} bytes",
                                 value=locator.text)
        elif regular:
            size = end
        else:
            raise UsageError("a device needs a slice, /path@OFFSET+SIZE", value=locator.text)
        within = locator.offset % mmap.ALLOCATIONGRANULARITY
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            with _named(locator.path):
                self._mmap = mmap.mmap(fd, within + size, mmap.MAP_SHARED, protection, offset=locator.offset - within)
        except (ValueError, OverflowError) as error:
            raise PeerError(locator.text, "size", os.fstat(fd).st_size, f"{end}, as it was before mapping") from error
        with memoryview(self._mmap) as whole:
            self.view = whole[within:within + size]
        self._lock = threading.Lock()
        self.locator, self.size, self.writable, self.created = locator, size, writable, created
        self.device, self.inode = seen.st_dev, seen.st_ino
        self.unseen, self._solid = presence is None, solid
        self._fd, self._presence = fd, presence

    @classmethod
    def open(cls, locator: Locator, *, writable: bool, create: int | None = None, mode: int = _MODE,
             permit: Permit | None = None) -> Region:
        """Maps what locator names; with create, makes it of that many bytes and of that mode when it is missing.

        permit: as what exists must be. It is taken as large as it is. One that create made is automatic: the last process
        to close() it unlinks it. Raises UsageError (slice beyond the file), PeerError (still empty after 1 s), OSError.
        """
        if create is not None and create <= 0:
            raise UsageError("a region's size must be above 0", value=create)
        _sweep()
        deadline = time.monotonic() + _REPLACED_TIMEOUT
        empty = 0.0
        while True:
            with contextlib.ExitStack() as undo:
                made = False
                ahead = None if create is None or mode != _MODE else _taken_ahead(locator, create, writable)
                if ahead is not None:
                    undo.callback(ahead[1].leave)
                try:
                    fd = _open(locator, writable)
                except FileNotFoundError:
                    if create is None:
                        raise
                    if ahead is not None:   # removed meanwhile: once more
                        continue
                    own = _create(locator, create, mode, writable)
                    if own is None:
                        _expire(deadline, locator.path)
                        continue
                    made, fd, presence = True, *own
                    undo.callback(presence.leave)
                undo.callback(os.close, fd)
                seen = os.fstat(fd)
                if ahead is not None:
                    if (seen.st_dev, seen.st_ino) != (ahead[0].st_dev, ahead[0].st_ino):
                        continue
                    made, presence = True, ahead[1]
                if permit is not None:
                    permit.check(fd, locator.path)
                if stat.S_ISREG(seen.st_mode) and seen.st_size == 0:
                    empty = empty or time.monotonic()
                    if time.monotonic() - empty > _EMPTY_TIMEOUT:
                        raise PeerError(locator.text, "size", 0, "above 0", hint="is its maker still at work?")
                    time.sleep(0.005)
                    continue
                if not any(kind(seen.st_mode) for kind in (stat.S_ISREG, stat.S_ISCHR, stat.S_ISBLK)):
                    raise OSError(errno.ENODEV, "not a file that can be mapped", locator.path)
                if not made:
                    room = _room("regions")
                    with _mutex(room):
                        presence = _Presence(room, _Draft(seen, locator, writable))
                        undo.callback(presence.leave)
                    # From here on no leaver takes the name away. If one did before, we start over.
                    if not _means(locator.path, seen.st_dev, seen.st_ino, follow=not locator.posix):
                        _expire(deadline, locator.path)
                        continue
                region = cls(locator, writable, made, fd, seen, presence)
                undo.pop_all()
                return region

    @classmethod
    def open_unseen(cls, locator: Locator, *, permit: Permit | None = None) -> Region:
        """Maps what exists, read-only, so that who writes it sees no more of that than what the kernel shows of any file
        that is open (docs/security.md): opened once, no record, no lock, and nothing but this file looked at.

        permit: as what exists must be. On a tmpfs it must have no holes, which looks would fill, and is mapped in full
        at once: its writer can see which pages are. Raises UsageError (a slice beyond the file, holes, a symbolic link on
        the way), PeerError (still empty after 1 s, or truncated meanwhile), OSError.
        """
        fd = _open_unseen(locator)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            if permit is not None:
                permit.check(fd, locator.path)
            deadline = time.monotonic() + _EMPTY_TIMEOUT
            while stat.S_ISREG((seen := os.fstat(fd)).st_mode) and seen.st_size == 0:
                if time.monotonic() > deadline:
                    raise PeerError(locator.text, "size", 0, "above 0", hint="is its maker still at work?")
                time.sleep(0.005)
            if not any(kind(seen.st_mode) for kind in (stat.S_ISREG, stat.S_ISCHR, stat.S_ISBLK)):
                raise OSError(errno.ENODEV, "not a file that can be mapped", locator.path)
            solid = stat.S_ISREG(seen.st_mode) and filesystem(os.path.dirname(locator.path)) in _FILLED_BY_LOOKS
            if solid and _hollow(fd, locator):
                raise SeenError(f"has holes ({seen.st_blocks * 512} of {seen.st_size} bytes of its file are allocated), "
                                "and a look at one fills it, which its writer sees: strict one-way needs a region without",
                                value=locator.text, hint="`muenfast chan create` makes such ones, and `fallocate -l "
                                f"{seen.st_size} {locator.path}` fills these")
            region = cls._mapped_unseen(locator, fd, seen, solid)
            undo.pop_all()
            return region

    @classmethod
    def _mapped_unseen(cls, locator: Locator, fd: int, seen: os.stat_result, solid: bool) -> Region:
        region = cls(locator, False, False, fd, seen, None, solid)
        if solid:
            try:
                region._mmap.madvise(_POPULATE_READ)
            except OSError as error:
                region._let_go()
                if error.errno == errno.EINVAL:     # before Linux 5.14: its writer sees the first look at each page
                    return cls(locator, False, False, fd, seen, None, solid)
                if error.errno == errno.EFAULT:
                    raise PeerError(locator.text, "size", os.fstat(fd).st_size, f"{seen.st_size}, as it was before "
                                    "mapping") from error
                raise OSError(error.errno, error.strerror, locator.path) from error
        return region

    def again(self) -> Region:
        """The same file mapped anew without opening it, where this one is unseen. Raises UsageError, PeerError, OSError;
        ValueError after close()."""
        with self._lock:
            if self._fd < 0:
                raise ValueError("region is closed")
            fd = os.dup(self._fd)
        try:
            return self._mapped_unseen(self.locator, fd, os.fstat(fd), self._solid)
        except BaseException:
            os.close(fd)
            raise

    def replaced(self) -> bool:
        """The name is gone, or means another inode now. Raises OSError when that cannot be seen.

        Where we are unseen no name is looked up, which a peer could let lead through links of its own: only a region
        that has no name any more is seen.
        """
        if self.unseen:
            with self._lock:
                return self._fd >= 0 and os.fstat(self._fd).st_nlink == 0
        return not _means(self.locator.path, self.device, self.inode, follow=not self.locator.posix)

    def truncated(self) -> bool:
        """The file is shorter than what is mapped: an access beyond its end is a SIGBUS. Or it has holes again, that we
        must not fill. ValueError after close()."""
        with self._lock:
            if self._fd < 0:
                raise ValueError("region is closed")
            now = os.fstat(self._fd)
            short = stat.S_ISREG(now.st_mode) and now.st_size < self.locator.offset + self.size
            return short or self._solid and _hollow(self._fd, self.locator)

    def close(self, *, keep: bool = False) -> None:
        """Leaves; idempotent. The last leaver of an automatic region unlinks it, unless keep.

        A mere observer passes keep: it may be the last one left where a killed peer is about to come back.
        Raises OSError when the name could not be seen to; the region is left, unmapped and closed all the same.
        """
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            with contextlib.ExitStack() as stack:
                if self._presence is not None:
                    stack.callback(self._presence.leave, keep)
                stack.callback(os.close, fd)
                self._let_go()

    def _let_go(self) -> None:
        with contextlib.suppress(BufferError):  # somebody's buffer owns the mapping now
            self.view.release()
            self._mmap.close()
        self.view = memoryview(b"")
        self.view.release()
        del self._mmap

    def __enter__(self) -> Region:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Region {self.locator.text} {self.size} bytes{'' if self._fd >= 0 else ', closed'}>"


def _expire(deadline: float, path: str) -> None:
    if time.monotonic() > deadline:
        raise OSError(errno.EBUSY, "the name means another region whenever it is opened", path)


def filesystem(directory: str) -> str:
    """Type of the file system mounted last on the nearest directory above; "?" where /proc does not tell."""
    best, kind = "", "?"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return kind
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4]
        if (directory + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, right.split(" ")[0]
    return kind


def users(region_or_locator: Region | Locator) -> list[dict[str, Any]]:
    """Live users of a region, oldest first: pid, role, comm, name, writable, since; none that is unseen. [] when there is
    no such region."""
    if isinstance(region_or_locator, Region):
        key = _key(region_or_locator.device, region_or_locator.inode)
    else:
        try:
            seen = os.stat(region_or_locator.path, follow_symlinks=not region_or_locator.posix)
        except (FileNotFoundError, NotADirectoryError):
            return []
        key = _key(seen.st_dev, seen.st_ino)
    room = _room("regions")
    with _mutex(room):
        return _live(room, key)


def make_region(locator: Locator, size: int, mode: int = _MODE, owner: tuple[int, int] | None = None) -> None:
    """Makes a region that stays until remove_region. owner: user and group whose it is from the first moment, None: ours.
    Raises FileExistsError, OSError, UsageError."""
    if size <= 0:
        raise UsageError("a region's size must be above 0", value=size)
    if locator.size is not None:
        raise UsageError("a slice cannot be made, only the file that it is in", value=locator.text)
    room = _room("regions")
    with contextlib.ExitStack() as stack:
        fd, source = _make_inode(stack, locator.path, size, mode, owner)
        seen = os.fstat(fd)
        with _mutex(room):
            _unlink(os.path.join(room, _key(seen.st_dev, seen.st_ino)))  # about an inode that is no more
            _link(fd, source, locator.path)


def remove_region(locator: Locator, *, force: bool = False) -> None:
    """Removes a region and its bell. Users keep what they have mapped, and see replaced().

    Raises ClaimError when it is in use, by others than unseen readers, and not force, UsageError for a slice,
    FileNotFoundError, OSError.
    """
    if locator.size is not None:
        raise UsageError("a slice cannot be removed, only the file that it is in", value=locator.text)
    room = _room("regions")
    with _mutex(room):
        found = []
        for each in (locator, locator.bell):
            if each is not None:
                with contextlib.suppress(FileNotFoundError):
                    seen = os.stat(each.path, follow_symlinks=not each.posix)
                    found.append((each, _key(seen.st_dev, seen.st_ino)))
        for _, key in found:
            live = _live(room, key)
            if live and not force:
                raise ClaimError(f"region {locator.text}", _describe(live[0]))
        for each, key in found:
            _unlink(each.path)
            _unlink(os.path.join(room, key))
    if locator not in (each for each, _ in found):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), locator.path)


def list_regions() -> list[dict[str, Any]]:
    """POSIX regions that this user can read, without bells: name, size, device, inode, mtime (s), auto, users (count).

    auto and users are as far as this user's own book-keeping knows.
    """
    found: list[dict[str, Any]] = []
    room = _room("regions")
    with _mutex(room):
        for name in sorted(os.listdir(DIRECTORY)):
            try:
                path = Locator.parse(name).path
                seen = os.lstat(path)
            except (UsageError, FileNotFoundError):
                continue
            if stat.S_ISREG(seen.st_mode) and os.access(path, os.R_OK, effective_ids=True):
                key = _key(seen.st_dev, seen.st_ino)
                found.append({"name": name, "size": seen.st_size, "device": seen.st_dev, "inode": seen.st_ino,
                              "mtime": seen.st_mtime, "auto": _auto(room, key) is not None,
                              "users": len(_live(room, key))})
    return found


def mapped_by(process: str) -> Iterator[tuple[tuple[int, int], bool]]:
    """(device, inode) of each file that a process has mapped, and whether its writes reach that. process: /proc/PID. Raises
    OSError."""
    with open(f"{process}/maps", errors="replace") as file:
        for line in file:
            _, mode, _, device, inode, *_ = line.split(None, 5)
            if inode != "0":
                major, _, minor = device.partition(":")
                yield (os.makedev(int(major, 16), int(minor, 16)), int(inode)), "w" in mode and "s" in mode


# ---- claims


class Claim:
    """What one process (or thread) holds until release() or its end; a context manager. info: what others see."""

    __slots__ = ("_fd", "_lock", "_record", "info")

    def __init__(self, record: _Record, info: dict[str, Any]) -> None:
        """Use claim, claim_writer or claim_backing."""
        self._record, self.info, self._fd, self._lock = record, info, -1, threading.Lock()

    def release(self) -> None:
        """Idempotent. What claim_backing locked stays locked until its descriptors are closed and its I/O has ended."""
        with self._lock:
            fd, self._fd = self._fd, -1
        try:
            if fd >= 0:
                os.close(fd)
        finally:
            self._record.drop()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.release()


_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")  # a key that stands for itself


def _file_name(key: str) -> str:
    """Injective, without '~' and '/'."""
    if not key:
        raise UsageError("a claim's key must not be empty")
    if _PLAIN.fullmatch(key):
        return key
    from urllib.parse import quote  # takes longer to load than most claims to make, as does hashlib

    name = quote(key, safe="", errors="surrogateescape").replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) <= 200:
        return name
    from hashlib import sha256

    return f"{name[:100]}%{sha256(name.encode()).hexdigest()}"


def _claim(key: str, what: str, info: dict[str, Any] | None, shared: bool,
           span: tuple[int, int | None] = (0, None), alone: bool = False) -> Claim:
    """span: the part that is claimed, in bytes, its end excluded (None: all that follows). alone: nobody ever shares this
    key, or claims a part: one record is looked at, not the whole room."""
    name = _file_name(key)
    _sweep()
    full = {**_identity(what, info), "key": key, "shared": shared}
    part = span != (0, None)
    if part:
        full["span"] = span
    room = _room("claims")
    with _mutex(room):
        for other in filter(None, [_probe(os.path.join(room, name))]) if alone else _live(room, name):
            start, end = other.get("span", (0, None))
            if (end is None or span[0] < end) and (span[1] is None or start < span[1]) and \
                    not (shared and other.get("shared")):
                raise ClaimError(what, _describe(other))
        suffix = f"~{os.getpid()}-{os.urandom(8).hex()}" if shared or part else ""
        return Claim(_Record(os.path.join(room, name + suffix), full), full)


def claim(key: str, what: str, info: dict[str, Any] | None = None) -> Claim:
    """Claims key for this process alone; info is added to what others see (JSON values). Raises ClaimError, OSError."""
    return _claim(key, what, info, False)


def claim_writer(region: Region, role: str, more: dict[str, Any] | None = None) -> Claim:
    """Claims the writer's side of a channel: its device, inode and offset. more: for the record. Raises ClaimError,
    OSError."""
    info = {"role": role, **(more or {})}
    return _claim(_writer_key(region), f"the writer's side of channel {region.locator.text}", info, False,
                  alone=True)


def claim_buffer(region: Region, side: str, role: str) -> Claim:
    """Claims one side ("server" or "client") of a buffer: its bytes of device and inode. Raises ClaimError, OSError."""
    start = region.locator.offset
    return _claim(f"buffer-{side}-{region.device}-{region.inode}", f"the {side}'s side of buffer {region.locator.text}",
                  {"role": role}, False, (start, start + len(region.view)))


def claim_reader(region: Region, role: str) -> Claim:
    """Claims to be the reader of a channel for whom its writer waits; there may be others. Raises ClaimError, OSError."""
    return _claim(f"reader-{_writer_key(region).partition('-')[2]}", f"the reader's side of channel {region.locator.text}",
                  {"role": role}, False)


def writer_holder(region: Region) -> dict[str, Any] | None:
    """Who has claimed the writer's side of a channel, as holder() tells it; None: nobody."""
    return holder(_writer_key(region))


def writer_process(region: Region) -> int:
    """Number of the process that claimed the writer's side of a channel and seems to live; 0: nobody's.

    No lock is taken or waited for, so that an engine's thread may ask: a hint, of a process that we see.
    """
    try:
        with open(os.path.join(runtime_dir(), "claims", _file_name(_writer_key(region))), "rb") as file:
            info = _read(file.fileno(), os.path.basename(file.name))
        pid = int(info["pid"])
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return pid if file.read().strip() == info["comm"] else 0
    except (OSError, KeyError, TypeError, ValueError, OverflowError):  # no record, not yet written, of one that has ended
        return 0


def _writer_key(region: Region) -> str:
    return f"writer-{region.device}-{region.inode}-{region.locator.offset}"


def claim_backing(fd: int, path: str, *, shared: bool, span: tuple[int, int] | None = None,
                  timeout: float = 5.0) -> Claim:
    """Claims a disk image or block device, open at fd: alone, or (shared) among those who only read.

    span: the bytes of it that are claimed, None: all. A block device that is a partition is that part of its disk.
    fd's open file is locked as well: the kernel keeps that lock until a dead holder's last I/O through it has ended, and
    other users' processes see it. For that one we wait up to timeout seconds.
    Raises ClaimError, OSError.
    """
    with _named(path):
        seen = os.fstat(fd)
    # A block device is itself whatever node names it; no file has inode 0.
    if stat.S_ISBLK(seen.st_mode):
        disk, first, end = _of_disk(seen.st_rdev)
        key = f"backing-{disk}-0"
    else:
        first, end, key = 0, None, f"backing-{seen.st_dev}-{seen.st_ino}"
    part = (first, end) if span is None else (first + span[0], first + span[1])
    with contextlib.ExitStack() as undo:
        held = _claim(key, path, {"path": path}, shared, part)
        undo.callback(held.release)
        with _named(path):
            held._fd = os.dup(fd)  # the same open file: the caller may close fd first
        deadline = time.monotonic() + timeout
        while True:
            try:
                _lock(held._fd, shared, span)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ClaimError(path, "an open file that is locked", hint="the last I/O of a server that ended, "
                                     "or another program or user; lslocks may tell") from None
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from error
            time.sleep(0.01)
        undo.pop_all()
        return held


@contextlib.contextmanager
def apart(locator: Locator, *, disk: bool, timeout: float = 0.2) -> Iterator[None]:
    """Keeps a region from being a disk and a channel or buffer at the same time, in whatever processes: its file is locked,
    alone or (a channel, a buffer) among its like. claim_backing takes that lock on disks that are files.

    A dead holder's lock is waited for up to timeout seconds. One whose name was removed since it was opened is nobody
    else's any more. Raises ClaimError, OSError.
    """
    try:
        with _named(locator.path):
            fd = os.open(locator.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if disk else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ClaimError(locator.text, "those who use it as a channel or buffer" if disk else
                                     "a server, as a disk", hint="name another region") from None
            except OSError as error:    # a file system without locks
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise OSError(error.errno, error.strerror, locator.path) from error
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def loop_on(path: str) -> str | None:
    """The loop device whose file this is, as far as names tell: to ask the files could wait for a dead file system."""
    from glob import glob

    name = os.path.realpath(path)
    for entry in glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError), open(entry) as file:     # freed meanwhile
            if file.read().rstrip("\n") == name:
                return "/dev/" + entry.split("/")[3]
    return None


def _lock(fd: int, shared: bool, span: tuple[int, int] | None) -> None:
    """Locks an open file, or a part of it: raises BlockingIOError where another open file's lock is in the way.

    Two locks, which do not see each other: flock, which other programs take, too, on the whole, shared where only a
    part is meant; and a lock on the bytes, which tells parts from each other and from the whole.
    """
    fcntl.flock(fd, (fcntl.LOCK_SH if shared or span is not None else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    start, length = (0, 0) if span is None else (span[0], span[1] - span[0])  # length 0: to the end, wherever that is
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, os.SEEK_SET, start,
                                                   length, 0))


def _of_disk(number: int) -> tuple[int, int, int | None]:
    """(disk, start, end) of a block device: of a partition, its disk's number and its bytes there."""
    place = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    try:
        with open(f"{place}/start") as file:
            start = int(file.read()) * 512
        with open(f"{place}/size") as file:
            size = int(file.read()) * 512
        with open(f"{os.path.realpath(place)}/../dev") as file:
            major, _, minor = file.read().strip().partition(":")
    except (FileNotFoundError, NotADirectoryError):  # a whole disk, or no sysfs
        return number, 0, None
    return os.makedev(int(major), int(minor)), start, start + size


def holder(key: str) -> dict[str, Any] | None:
    """Who holds key: pid, role, comm, what, since (s since 1970), key, shared. None when nobody lives who does.

    Never waits for a holder and never takes the claim.
    """
    name, room = _file_name(key), _room("claims")
    with _mutex(room):
        live = _live(room, name)
    return live[0] if live else None


def claims(*, sweep: bool = True) -> list[dict[str, Any]]:
    """All live claims of this user, oldest first, each as holder() tells it; dead ones' records go, if sweep."""
    room = _room("claims")
    with _mutex(room):
        return _live(room, sweep=sweep)


# ---- what dead processes left


@dataclass(frozen=True, slots=True)
class Stale:
    """Something in this user's books that no living process accounts for.

    kind: "claim" or "user" (a dead process's record), "region" or "bell" (automatic, without a user), "note" (about an
    automatic region that is no more), "temporary" (a region whose making was cut short). path: the file that goes.
    text: one sentence. key: of a region, bell or note in the books.
    """

    kind: str
    path: str
    text: str
    key: str = ""


def stale(mapped: Collection[tuple[int, int]] = ()) -> list[Stale]:
    """What dead processes left; nothing is made or removed. mapped: (device, inode) of regions that are in use all
    the same, by peers that keep no books. Raises OSError as runtime_dir(make=False) does.
    """
    base = runtime_dir(make=False)
    found: list[Stale] = []
    for name, kind in (("claims", "claim"), ("regions", "user")):
        room = os.path.join(base, name)
        if not os.path.isdir(room):
            continue
        with _mutex(room):
            entries = sorted(os.listdir(room))
            lives = {entry for entry in entries if (kind == "claim" or "~" in entry) and _lives(os.path.join(room, entry))}
            used = {entry.partition("~")[0] for entry in lives}
            for entry in entries:
                if kind == "user" and "~" not in entry:
                    found += _stale_note(room, entry, entry in used, mapped)
                elif entry not in lives:
                    found.append(Stale(kind, os.path.join(room, entry), _whose(os.path.join(room, entry))))
    for path in _temporaries():
        with contextlib.suppress(OSError):
            if _probe(path, sweep=False) is None:
                found.append(Stale("temporary", path, "the making of a region was cut short"))
    return found


def _lives(path: str) -> bool:
    """Whether a record has a live holder; of our own that needs no look. Precondition: as _probe()."""
    return _held.get(path) == os.getpid() or _probe(path, sweep=False) is not None


def _stale_note(room: str, key: str, used: bool, mapped: Collection[tuple[int, int]]) -> list[Stale]:
    path = _auto(room, key, sweep=False)
    if path is None:
        return [Stale("note", os.path.join(room, key), "about an automatic region that is no more", key)]
    device, _, inode = key.partition("-")
    if used or (int(device), int(inode)) in mapped:
        return []
    return [Stale("bell" if path.endswith(".bell") else "region", path, "made automatically, its users are dead", key)]


def _whose(path: str) -> str:
    """Of a dead process's record: whose it was."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return "gone meanwhile"
    try:
        info = _read(fd, os.path.basename(path))
    finally:
        os.close(fd)
    return f"of {info.get('what', 'something')}, by process {info.get('pid', 'unknown')}, which is dead"


def remove_stale(left: Stale) -> bool:
    """Removes what stale() found, after another look: False when somebody uses it by now. Gone already is fine.

    Raises OSError.
    """
    room = _room("claims" if left.kind == "claim" else "regions")
    with _mutex(room):
        if left.kind in ("claim", "user", "temporary"):
            return _probe(left.path) is None
        if _live(room, left.key):
            return False
        path = _auto(room, left.key)  # which removes the note of a region that is no more
        if path is not None:
            if left.kind == "note":
                return False
            _unlink(path)
            _unlink(os.path.join(room, left.key))
        return True
