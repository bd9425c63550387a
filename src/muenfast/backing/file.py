"""A file, disk or partition as a disk; or one partition of a file or disk, by its own table."""

from __future__ import annotations

import array
import errno
import fcntl
import glob
import hashlib
import logging
import mmap
import os
import pwd
import stat
import time
from contextlib import ExitStack
from pathlib import Path

from muenfast import partition, shm
from muenfast._store import Store
from muenfast.backing import BLOCK, SECTOR, Backing, Device, check_shrink, lengthening
from muenfast.errors import ClaimError, UsageError

log = logging.getLogger("muenfast")

_FS_IOC_GETVERSION = 0x80087601  # linux/fs.h: _IOR('v', 1, long), the inode's generation
_BLKSSZGET = 0x1268  # linux/fs.h: the size of a block device's sectors
_ALONE_TIMEOUT = 1.0  # s: another server may be at _alone(), too


class FileBacking(Backing):
    """Opens with an exclusive lock (shared when read_only); a block device also with O_EXCL, so never a mounted one.

    Of a partition by number, only its bytes are locked: others of the disk may be served beside it, the whole may not.
    A size that is no multiple of 4096 loses its tail: the transport has no smaller unit.
    """

    def __init__(self, device: Device, *, read_only: bool, option: str | None, index: int | None) -> None:
        with ExitStack() as stack:
            try:
                offset = 0
                if device.partition:
                    fd, direct, offset, size, identity = _partition(device, read_only, stack)
                else:
                    fd = _open(device.path, read_only, stack)
                    direct = _claim(fd, device.path, read_only, stack)
                    size, identity = os.lseek(fd, 0, os.SEEK_END), _identity(fd)
            except _Refused as refused:
                error = refused.error
                raise UsageError(f"it cannot be opened {'for reading' if read_only else 'for reading and writing'}: "
                                 f"{os.strerror(error.errno or 0)}", option=option, index=index, value=device.text,
                                 hint=_next_step(error.errno, device)) from error
            except UsageError as error:
                raise UsageError(error.rule, option=option, index=index, value=device.text, hint=error.hint) from error
            if size < BLOCK:
                raise UsageError(f"a disk has at least {BLOCK} bytes, this has {size}",
                                 option=option, index=index, value=device.text)
            self._fd, self._direct, self._device = fd, direct, device
            if direct is not None and not _takes(direct, offset, SECTOR if size % BLOCK else BLOCK):
                direct = None
            info = os.fstat(fd)
            self.disk = info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev
            self.store = Store.in_file(fd, size, direct=direct, offset=offset, read_only=read_only, identity=identity)
            self.left_over = size - self.store.size
            stack.callback(lambda: self.store.close())
            self._stack = stack.pop_all()

    def check_resize(self, size: int | None, force: bool) -> bool:
        if self._device.partition:
            raise UsageError("a partition that is exported by its number is its bytes: they are its identity",
                             hint="destroy the export, change the table, and create it anew")
        now = os.lseek(self._fd, 0, os.SEEK_END)
        if size is None:
            if now < BLOCK:
                raise UsageError(f"a disk has at least {BLOCK} bytes, this has {now}", value=self._device.text)
            whole = now // self.store.block_size * self.store.block_size
            check_shrink(self.store.size, whole, force, found=True)
            return whole != self.store.size
        if stat.S_ISBLK(os.fstat(self._fd).st_mode):
            raise UsageError("a block device or partition has the size that it has",
                             hint="change that; without a SIZE the export takes it over")
        if self.store.read_only:
            raise UsageError("the export is read-only, and so is its file", hint="without a SIZE the export takes over the "
                             "file's present size")
        check_shrink(max(self.store.size, now), size, force)    # the file may have changed since
        return size != self.store.size or size != now

    def resize(self, size: int | None, force: bool) -> None:
        """A file grows by a hole. Without a size nothing is cut off: that has happened."""
        self.check_resize(size, force)
        old = self.store
        if size is not None:
            with lengthening("file"):
                os.ftruncate(self._fd, size)
        now = os.lseek(self._fd, 0, os.SEEK_END)
        direct = self._direct
        if direct is not None and not _takes(direct, 0, old.block_size):
            direct = None
        self.store = Store.in_file(self._fd, now, direct=direct, block_size=old.block_size, read_only=old.read_only,
                                   identity=old.identity)
        self.left_over = now - self.store.size
        old.close()

    def close(self) -> None:
        self._stack.close()


def _claim(fd: int, name: str, read_only: bool, stack: ExitStack, span: tuple[int, int] | None = None) -> int | None:
    """Claims the file or its span; another descriptor of it, past the page cache, closed by stack, where that is to be had.

    Locked is the open file that direct I/O goes through: a process that is killed ends before requests of that to a device
    do, and they alone keep the lock from its successor then. What goes through the page cache, the kernel awaits.
    """
    direct = None
    try:
        direct = os.open(f"/proc/self/fd/{fd}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC)
        stack.callback(os.close, direct)
    except OSError as error:
        log.info("no direct I/O: %s", error.strerror)
    stack.enter_context(shm.claim_backing(fd if direct is None else direct, name, shared=read_only, span=span))
    return direct


def _takes(direct: int, offset: int, unit: int) -> bool:
    """Whether direct I/O is to be had in pieces of `unit` bytes, from byte `offset` on."""
    with mmap.mmap(-1, 2 * unit) as pages, memoryview(pages) as memory:
        try:
            with memory[unit:] as piece:
                os.preadv(direct, [piece], offset + unit if unit < BLOCK else offset)
        except OSError as error:
            if error.errno == errno.EINVAL:     # else the disk's own error: whoever reads there will be told
                log.info("no direct I/O in pieces of %d bytes", unit)
                return False
    return True


class _Refused(Exception):
    """What open() said."""

    def __init__(self, error: OSError) -> None:
        self.error = error


def _open(path: str, read_only: bool, stack: ExitStack, *, alone: bool = True) -> int:
    """The descriptor, closed by stack. alone: of a block device that is written, O_EXCL."""
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise UsageError("a device is a file, a disk, a partition, ram:SIZE or null:SIZE")
        if stat.S_ISREG(kind) and not read_only and (loop := shm.loop_on(path)) is not None:
            raise ClaimError(f"disk {path}", f"the loop device {loop}", hint=f"losetup -d {loop} frees it")
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if stat.S_ISBLK(kind) and not read_only and alone:
            flags |= os.O_EXCL
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ClaimError(f"disk {path}", "a mount or another user of the device") from error
        raise _Refused(error) from error
    stack.callback(os.close, fd)
    return fd


def _partition(device: Device, read_only: bool, stack: ExitStack) -> tuple[int, int | None, int, int, bytes]:
    """(descriptor, the one of _claim, offset in them, size, identity) of one partition, claimed.

    The kernel's own device for these bytes is taken where it has one: then it knows, too, who uses what. Else O_EXCL is
    only tried, because it would shut out the other partitions of the disk.
    """
    fd = _open(device.path, read_only, stack, alone=False)
    part, notes = _find(fd, device)
    for note in notes:
        log.warning("%s: %s", device.text, note)
    identity = _identity(fd, f"#{part.start}+{part.size}")
    node = _kernels_own(fd, part)
    if node is not None:
        own = _open(node, read_only, stack)
        direct = _claim(own, device.text, read_only, stack)
        offset = 0
    else:
        if stat.S_ISBLK(os.fstat(fd).st_mode) and not read_only:
            _alone(device.path)
        direct = _claim(fd, device.text, read_only, stack, (part.start, part.end))
        own, offset = fd, part.start
    if _find(fd, device)[0] != part:
        raise UsageError("its partition table changes at this moment", hint="try again")
    return own, direct, offset, part.size, identity


def _find(fd: int, device: Device) -> tuple[partition.Partition, list[str]]:
    """The partition, and what else is wrong with the table."""
    def read(offset: int, length: int) -> bytes:
        data = os.pread(fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, "it was cut short while it was read", device.path)
        return data

    sectors: tuple[int, ...] = partition.SECTOR_SIZES
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        size = array.array("i", [0])
        fcntl.ioctl(fd, _BLKSSZGET, size)
        sectors = tuple(sorted(sectors, key=lambda each: each != size[0]))
    table = partition.read_table(read, os.lseek(fd, 0, os.SEEK_END), sectors)
    return partition.find(table, device.partition), table.notes if table else []


def _kernels_own(fd: int, part: partition.Partition) -> str | None:
    """The node of the kernel's partition with exactly these bytes of the block device fd, if there is one."""
    info = os.fstat(fd)
    if not stat.S_ISBLK(info.st_mode):
        return None
    for entry in glob.glob(f"/sys/dev/block/{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}/*/partition"):
        place = Path(entry).parent
        try:
            span = tuple(int((place / each).read_text()) * 512 for each in ("start", "size"))
            major, _, minor = (place / "dev").read_text().strip().partition(":")
            node = f"/dev/{place.name.replace('!', '/')}"
            if span == (part.start, part.size) and os.stat(node).st_rdev == os.makedev(int(major), int(minor)):
                return node
        except FileNotFoundError:  # deleted while we looked, or without a node
            continue
    return None


def _alone(path: str) -> None:
    """Raises ClaimError where somebody has the block device for himself, as a mount has."""
    end = time.monotonic() + _ALONE_TIMEOUT
    while True:
        with ExitStack() as stack:
            try:
                _open(path, False, stack)
                return
            except ClaimError:
                if time.monotonic() >= end:
                    raise
        time.sleep(0.01)


def _identity(fd: int, part: str = "") -> bytes:
    """16 bytes that stay with the file or device: its numbers, the generation that tells a reused inode apart, and the
    part that is meant."""
    info = os.fstat(fd)
    generation = array.array("l", [0])
    try:
        fcntl.ioctl(fd, _FS_IOC_GETVERSION, generation)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    where = f"{info.st_rdev}" if stat.S_ISBLK(info.st_mode) else f"{info.st_dev}:{info.st_ino}:{generation[0]}"
    return hashlib.blake2b(f"file:{where}{part}".encode(), digest_size=16).digest()


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


def _next_step(number: int | None, device: Device) -> str | None:
    if device.path in ("ram", "null"):
        return f"{device.path} wants a size, like {device.path}:64M"
    if number == errno.ENOENT and device.partition:
        return f"there is no file of that name, so partition {device.partition} of {device.path} is meant, which is not " \
               "there either"
    if number == errno.EACCES:
        return f"it, and each folder before it, has to let in {_user()}, as whom this process runs"
    if number != errno.ENOENT:
        return None
    disk, mark, word = device.path.rpartition("#")
    if mark and os.path.exists(disk):
        return f"a partition of {disk} is a number from 1, not {word!r}"
    if not os.path.isdir(os.path.dirname(device.path) or "."):
        return f"make its directory, {os.path.dirname(device.path)}, first"
    return f"make it first, for example: truncate -s 64M {device.path}"
