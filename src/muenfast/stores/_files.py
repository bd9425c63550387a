"""Files under stores: whole reads and writes at an offset, holes, locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time

from muenfast.errors import ClaimError

_LOCK_TIMEOUT = 5.0  # s, as for other disks: a dead server's last I/O may still be under way
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS)
_ZEROS = bytes(1 << 20)

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long     # off_t is a long on 64-bit Linux


class File:
    """An open descriptor, locked with flock as other servers of the package lock their disks; for several threads.

    alone: exclusively, else shared with whoever only reads. A lock that is held is waited for up to 5 s.
    """

    def __init__(self, path: str, flags: int, *, alone: bool, mode: int = 0o600) -> None:
        """Raises OSError, ClaimError."""
        self.path = path
        self.fd = os.open(path, flags | os.O_CLOEXEC, mode)
        try:
            self._lock(alone)
        except BaseException:
            os.close(self.fd)
            raise

    def _lock(self, alone: bool) -> None:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(self.fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ClaimError(self.path, "an open file that is locked", hint="another server, or the last I/O of "
                                     "one that ended; lslocks may tell") from None
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from error
            time.sleep(0.01)

    def read(self, buf: memoryview | bytearray, offset: int) -> None:
        """Fills buf. Raises OSError, EIO where the file ends before that."""
        count = os.preadv(self.fd, [buf], offset)
        if count == len(buf):
            return
        with memoryview(buf) as whole:
            while count < len(buf):
                with whole[count:] as rest:
                    more = os.preadv(self.fd, [rest], offset + count)
                if more == 0:
                    raise OSError(errno.EIO, f"it ends at {offset + count}, before what should be read", self.path)
                count += more

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Writes all of data. Raises OSError."""
        count = os.pwrite(self.fd, data, offset)
        if count == len(data):
            return
        with memoryview(data) as whole:
            while count < len(data):
                with whole[count:] as rest:
                    count += os.pwrite(self.fd, rest, offset + count)

    def clear(self, offset: int, count: int) -> None:
        """Makes a hole, or writes zeros where the file system has no holes. Raises OSError."""
        while _fallocate(self.fd, _KEEP_SIZE | _PUNCH_HOLE, offset, count):
            number = ctypes.get_errno()
            if number in _NO_HOLES:
                break
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), self.path)
        else:
            return
        for start in range(offset, offset + count, len(_ZEROS)):
            self.write(_ZEROS[:offset + count - start], start)

    def sync(self) -> None:
        """What was written before is durable. Raises OSError."""
        os.fdatasync(self.fd)

    def data_from(self, offset: int, end: int) -> int:
        """The first byte from offset on that is in no hole, or end. Raises OSError."""
        try:
            return min(end, os.lseek(self.fd, offset, os.SEEK_DATA))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return end

    def close(self) -> None:
        os.close(self.fd)
