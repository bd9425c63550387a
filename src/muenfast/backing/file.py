"""A file, disk or partition as a disk."""

from __future__ import annotations

import array
import errno
import fcntl
import hashlib
import os
import stat
from contextlib import ExitStack

from muenfast import shm
from muenfast._store import Store
from muenfast.backing import BLOCK, Backing, Device
from muenfast.errors import ClaimError, UsageError

_FS_IOC_GETVERSION = 0x80087601  # linux/fs.h: _IOR('v', 1, long), the inode's generation


class FileBacking(Backing):
    """Opens with an exclusive lock (shared when read_only); a block device also with O_EXCL, so never a mounted one.

    A size that is no multiple of 4096 loses its tail: the transport has no smaller unit.
    """

    def __init__(self, device: Device, *, read_only: bool, option: str | None, index: int | None) -> None:
        path = device.path
        with ExitStack() as stack:
            try:
                kind = os.stat(path).st_mode
                if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                    raise UsageError("a device is a file, a disk, a partition, ram:SIZE or null:SIZE",
                                     option=option, index=index, value=path)
                flags = os.O_RDONLY if read_only else os.O_RDWR
                if stat.S_ISBLK(kind) and not read_only:
                    flags |= os.O_EXCL
                fd = os.open(path, flags | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise ClaimError(f"disk {path}", "a mount or another user of the device") from error
                raise UsageError(f"it cannot be opened {'for reading' if read_only else 'for reading and writing'}: "
                                 f"{os.strerror(error.errno or 0)}", option=option, index=index, value=path,
                                 hint=_next_step(error.errno, path)) from error
            stack.callback(os.close, fd)
            stack.enter_context(shm.claim_backing(fd, path, shared=read_only))
            size = os.lseek(fd, 0, os.SEEK_END)
            if size < BLOCK:
                raise UsageError(f"a disk has at least {BLOCK} bytes, this has {size}",
                                 option=option, index=index, value=path)
            self.store = Store.in_file(fd, size, read_only=read_only, identity=_identity(fd))
            stack.callback(self.store.close)
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


def _identity(fd: int) -> bytes:
    """16 bytes that stay with the file or device: its numbers, and the generation that tells a reused inode apart."""
    info = os.fstat(fd)
    generation = array.array("l", [0])
    try:
        fcntl.ioctl(fd, _FS_IOC_GETVERSION, generation)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    where = f"{info.st_rdev}" if stat.S_ISBLK(info.st_mode) else f"{info.st_dev}:{info.st_ino}:{generation[0]}"
    return hashlib.blake2b(f"file:{where}".encode(), digest_size=16).digest()


def _next_step(number: int | None, path: str) -> str | None:
    if path in ("ram", "null"):
        return f"{path} wants a size, like {path}:64M"
    return f"make it first, for example: truncate -s 64M {path}" if number == errno.ENOENT else None
