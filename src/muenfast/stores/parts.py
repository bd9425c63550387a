"""A read-only disk made of the files of a directory, one behind the other: what split(1) made of an image, for example."""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import os
import stat
import time

from muenfast.errors import UsageError
from muenfast.stores._files import File

SECTOR = 512

_TICK = 0.02  # s: a kernel's clock for files may stand still for half of that


class Parts:
    """py:muenfast.stores:Parts:DIRECTORY.

    All files of it in the order of their names (code point by code point: number them with leading zeros), but those whose
    names begin with a dot; each holds whole sectors of 512 bytes, at least one. Anything else there is refused, so that
    nothing is left out unnoticed. A part that is touched in any way while it is served (its change time tells) gives EIO
    from then on, never other data than it had.
    """

    def __init__(self, arg: str = "") -> None:
        """Raises UsageError."""
        if not arg:
            raise UsageError("a disk of parts is the directory that they are in", value=arg)
        self._folder = os.path.abspath(arg)

    def open(self, readonly: bool) -> None:
        """Opens every part. Raises UsageError, ClaimError, OSError."""
        self._files: list[File] = []
        self._starts: list[int] = []
        self._seen: list[os.stat_result] = []
        size = 0
        with contextlib.ExitStack() as stack:
            for name in sorted(name for name in os.listdir(self._folder) if not name.startswith(".")):
                path = os.path.join(self._folder, name)
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise UsageError("a directory of parts holds files only", value=path, hint="move it elsewhere, or give "
                                     "it a name that begins with a dot")
                file = File(path, os.O_RDONLY, alone=False)
                stack.callback(file.close)
                info = os.fstat(file.fd)
                if info.st_size == 0 or info.st_size % SECTOR:
                    raise UsageError(f"a part has a multiple of {SECTOR} bytes, and not none; this has {info.st_size}",
                                     value=path, hint=f"truncate -s %{SECTOR} adds zeros, where it is not just incomplete")
                self._files.append(file)
                self._starts.append(size)
                self._seen.append(info)
                size += info.st_size
            if not size:
                raise UsageError("there is no part in this directory", value=self._folder)
            # A part that is written within the tick of its last change would look as before.
            while (age := time.time() - max(info.st_ctime for info in self._seen)) < _TICK and age > -_TICK:
                time.sleep(_TICK)
            for index in range(len(self._files)):
                self._check(index)
            self._size = size
            self._stack = stack.pop_all()

    def get_size(self) -> int:
        return self._size

    def identity(self) -> bytes:
        """Of the parts' names, and of all that tells whether they were touched."""
        identity = hashlib.blake2b(digest_size=16)
        for file, info in zip(self._files, self._seen, strict=True):
            name = os.fsencode(os.path.basename(file.path))
            identity.update(b"%d:%s %d %d %d %d %d;" % (len(name), name, *_marks(info)))
        return identity.digest()

    def pread(self, buf: memoryview, offset: int) -> None:
        index = bisect.bisect_right(self._starts, offset) - 1
        done = 0
        while done < len(buf):
            within = offset + done - self._starts[index]
            stop = min(len(buf), done + self._seen[index].st_size - within)
            with buf[done:stop] as piece:
                self._files[index].read(piece, within)
            self._check(index)
            done = stop
            index += 1

    def _check(self, index: int) -> None:
        """Raises EIO where a part is no longer what was opened, and what was read of it just now may not be, either."""
        path = self._files[index].path
        try:
            now = os.stat(path)
        except OSError as error:
            raise OSError(errno.EIO, f"this part is gone: {error.strerror}", path) from error
        if _marks(now) != _marks(self._seen[index]):
            raise OSError(errno.EIO, "this part was changed or replaced while it was served", path)

    def close(self) -> None:
        self._stack.close()


def _marks(info: os.stat_result) -> tuple[int, int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
