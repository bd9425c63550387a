"""Loop devices by ioctl, and the /dev/muendiskX nodes that name them.

Constants and structs: include/uapi/linux/loop.h. There is no udev to rely on: names come from mknod.

Nothing here keeps a descriptor of a loop device or of its backing file: a process that answers a
device's I/O and dies with the device open would wait for its own answers in the last close.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import string
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from muenfast.attach import block

LOOP_MAJOR = 7
_RENEWALS = 16                  # most devices that are made anew for one that discards: then it does without
LOOP_CLR_FD = 0x4C01
LOOP_GET_STATUS64 = 0x4C05
LOOP_SET_CAPACITY = 0x4C07
LOOP_CONFIGURE = 0x4C0A         # Linux 5.8
LOOP_CTL_REMOVE = 0x4C81
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_PARTSCAN = 8           # partitions may be added, and go when the device is freed
LO_FLAGS_DIRECT_IO = 16
# struct loop_config: fd, block_size, struct loop_info64 (lo_flags and lo_file_name set), reserved
LOOP_CONFIG = struct.Struct("=II 52xI 64s 112x 64x")
# struct loop_info64: lo_file_name only
LOOP_INFO64 = struct.Struct("=56x 64s 112x")

PREFIX = "muendisk"


def name_of(index: int) -> str:
    """The device name of position *index*: muendiska, ..., muendiskz, muendiskaa, ... (as sda, sdb)."""
    if index < 0:
        raise ValueError(f"index is {index}: counted from 0")
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = string.ascii_lowercase[digit] + letters
    return PREFIX + letters


def device_names() -> Iterator[str]:
    """All device names, in order, without end."""
    return map(name_of, itertools.count())


def _sysfs(number: int, entry: str) -> Path:
    return Path(f"/sys/block/loop{number}", entry)


def path_of(number: int) -> str:
    return f"/dev/loop{number}"


def is_bound(number: int) -> bool:
    """Whether the loop device has a backing file."""
    return _sysfs(number, "loop").exists()


def backing_file(number: int) -> str | None:
    """Path of the backing file as the kernel sees it, or None for a free device."""
    try:
        return _sysfs(number, "loop/backing_file").read_text().rstrip("\n")
    except FileNotFoundError:
        return None


def numbers() -> list[int]:
    """Numbers of all loop devices there are, bound or free."""
    found = [entry[4:] for entry in os.listdir("/sys/block") if entry.startswith("loop")]
    return sorted(int(number) for number in found if number.isdecimal())


def given_name(backing: str) -> bytes:
    """What attach() leaves in the device of its backing file: the end of the path tells whose it is."""
    return os.fsencode(backing)[-63:]


def orphans() -> dict[int, bytes]:
    """Loop devices that look like attach()'s, but whose mount has gone and that nobody told to go with its last user.

    Each with its given_name(). One that we may not open is left out.
    """
    found: dict[int, bytes] = {}
    for number in numbers():
        # What attach() sets; the path of a file in a mount that is gone begins at that mount.
        marks = (("loop/backing_file", ("/disk",)), ("loop/autoclear", ("0",)), ("loop/dio", ("1",)),
                 ("queue/logical_block_size", ("512", "4096")))
        try:
            if any(_sysfs(number, entry).read_text().strip() not in values for entry, values in marks):
                continue
            device = os.open(path_of(number), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            # It asks the file for its inode: from the cache, for our file's attributes stand for ever.
            info = LOOP_INFO64.unpack(fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(LOOP_INFO64.size)))
        except OSError:
            continue    # FUSE without a connection and without that cache, or freed meanwhile
        else:
            found[number] = info[0].split(b"\0")[0]
        finally:
            os.close(device)
    return found


def open_file(path: str, mode: int) -> int:
    """A regular file; nothing that its name only leads to: who answers for the file system may be less than we are. Raises
    OSError (filename set)."""
    fd = os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is no regular file", path)
    return fd


def attach(backing: str, *, read_only: bool = False, max_io: int = 131072, block_size: int = 4096,
           discard: bool = False, attempts: int = 64) -> int:
    """Bind a free loop device to *backing* with direct I/O and sectors of block_size bytes; returns its number.

    max_io: bytes the device may send at once. discard: whether the file can punch holes. Another process may
    take the free device first: then the next one is tried, *attempts* times. Raises OSError (filename set);
    EINVAL where direct I/O is not to be had: without it everything would be cached twice and written late.
    """
    flags = LO_FLAGS_DIRECT_IO | LO_FLAGS_PARTSCAN | (LO_FLAGS_READ_ONLY if read_only else 0)
    mode = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    file = open_file(backing, mode)
    try:
        # Buffered here: the file system decides (FOPEN_DIRECT_IO); the flag below makes loop submit directly.
        config = LOOP_CONFIG.pack(file, block_size, flags, given_name(backing))
        number = _configure(config, mode, attempts)
        for _ in range(_RENEWALS if discard else 0):
            if not _without_discards(number):
                break
            _renew(number)
            number = _configure(config, mode, attempts)
    finally:
        os.close(file)
    try:
        if _sysfs(number, "loop/dio").read_text().strip() != "1":
            raise OSError(errno.EINVAL, "the loop device refuses direct I/O", path_of(number))
        _tune(number, max_io)
    except BaseException:
        detach(number)
        raise
    return number


def _configure(config: bytes, mode: int, attempts: int) -> int:
    gone: OSError | None = None
    for _ in range(attempts):
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        finally:
            os.close(control)
        try:
            device = os.open(path_of(number), mode)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                raise
            gone = error        # another process removes it, as _renew() does; or nobody makes nodes here
            continue
        try:
            fcntl.ioctl(device, LOOP_CONFIGURE, config)
            return number
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENXIO, errno.ENODEV):
                error.filename = path_of(number)
                raise
        finally:
            os.close(device)
    if gone is not None:
        raise gone
    raise OSError(errno.EBUSY, f"other processes took the free loop device {attempts} times", "/dev/loop-control")


def _without_discards(number: int) -> bool:
    """Whether somebody once switched off this device's discards, whatever file it had: that outlives the file, and the
    kernel takes no other limit afterwards (block/blk-sysfs.c: none is a multiple of a granularity that is 0)."""
    try:
        limit, hardware = (int(_sysfs(number, f"queue/discard_{name}_bytes").read_text()) for name in ("max", "max_hw"))
    except FileNotFoundError:
        return False
    return limit == 0 and hardware > 0


def _renew(number: int) -> None:
    """Frees a device of ours and removes it, so that the next of that number begins with the kernel's settings. What
    another process has opened meanwhile stays, and is freed with its last close. Raises OSError."""
    if not detach(number):
        return
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, LOOP_CTL_REMOVE, number)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENODEV):  # another process opened or removed it
            raise
    finally:
        os.close(control)


def _tune(number: int, max_io: int) -> None:
    """Queue settings. max_sectors_kb is a must: a request that FUSE has to cut may be cut inside a block.

    No scheduler: the far side merges. Discards are left alone: what the file refuses, the kernel learns at once.
    """
    queue = _sysfs(number, "queue")
    (queue / "max_sectors_kb").write_text(str(max_io // 1024))
    try:
        (queue / "scheduler").write_text("none")
    except (FileNotFoundError, PermissionError):
        pass        # this kernel has no such setting, and then nothing to switch off
    except OSError as error:
        if error.errno != errno.EINVAL:     # EINVAL: built without that scheduler's switch
            raise


def resized(number: int, size: int) -> None:
    """The device takes over its file's size, which is `size` bytes by now; whoever has it open keeps it.

    May wait for the device's outstanding writes. Raises OSError (filename set).
    """
    device = os.open(path_of(number), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, LOOP_SET_CAPACITY)
        if (has := os.lseek(device, 0, os.SEEK_END)) != size:
            raise OSError(errno.EAGAIN, f"the kernel gives the device {has} bytes instead of {size}", path_of(number))
    except OSError as error:
        error.filename = path_of(number)
        raise
    finally:
        os.close(device)


def detach(number: int, timeout: float = 1.0, backing: str | None = None) -> bool:
    """Free the device: True once it really is free, False when somebody still has it open.

    backing: only where it has that file; another one's is left alone. Busy after *timeout* seconds means that the kernel
    frees it with the last close (autoclear). The call may wait for the device's outstanding writes. Raises OSError
    (filename set).
    """
    try:
        device = os.open(path_of(number), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if backing is not None and backing_file(number) != backing:     # asked while it is open: now it cannot change
            return True
        fcntl.ioctl(device, LOOP_CLR_FD)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True     # nothing bound, or another's LOOP_CLR_FD is under way
        error.filename = path_of(number)
        raise
    finally:
        os.close(device)
    return wait_free(number, timeout)


def wait_free(number: int, timeout: float) -> bool:
    """Wait until the device has no backing file any more; False after *timeout* seconds."""
    end = time.monotonic() + timeout
    while is_bound(number):
        if time.monotonic() >= end:
            return False
        time.sleep(0.002)
    return True


def loop_of(node: str) -> int | None:
    """Number of the loop device behind a node, or None where *node* is missing or something else."""
    try:
        status = os.stat(node, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISBLK(status.st_mode) or os.major(status.st_rdev) != LOOP_MAJOR:
        return None
    return os.minor(status.st_rdev)


def make_node(name: str, number: int) -> str:
    """Make /dev/*name* the node of loop device *number*; see block.make_node."""
    return block.make_node(name, os.makedev(LOOP_MAJOR, number))
