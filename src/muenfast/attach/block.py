"""Block devices whoever drives them: names, nodes, file systems mounted from them, users."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

LOOP_MAJOR, NBD_MAJOR = 7, 43  # uapi/linux/major.h
_DRIVEN = {LOOP_MAJOR: "loop", NBD_MAJOR: "pid"}  # what a device has in sysfs while something stands behind it


def number_of(node: str) -> int | None:
    """The device number of a block device's node; None where *node* is missing or something else."""
    try:
        status = os.stat(node, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


def sysfs(device: int) -> Path:
    """The directory of a block device, which may not be there."""
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def kernel_name(device: int) -> str:
    """What the kernel calls a block device, as loop3; MAJOR:MINOR where it has none of that number."""
    return os.path.basename(os.path.realpath(sysfs(device)))


def disk_of(device: int) -> int:
    """The disk that a device is a partition of, or is itself."""
    place = sysfs(device).resolve()
    if not (place / "partition").exists():
        return device
    return _number_in(place.parent)


def _number_in(place: Path) -> int:
    major, _, minor = (place / "dev").read_text().strip().partition(":")
    return os.makedev(int(major), int(minor))


def is_driven(device: int) -> bool:
    """Whether a loop or nbd device has something behind it; one of another driver always has."""
    entry = _DRIVEN.get(os.major(device))
    return entry is None or (sysfs(device) / entry).exists()


def is_left(node: str) -> bool:
    """Whether *node* is one of a block device that the kernel does not have (any more), or of a partition of a loop or
    nbd device that is free."""
    device = number_of(node)
    if device is None:
        return False
    try:
        return not sysfs(device).exists() or (disk := disk_of(device)) != device and not is_driven(disk)
    except FileNotFoundError:       # it goes at this moment
        return True


def make_node(name: str, device: int) -> str:
    """Make /dev/*name* the node of a block device (mode 0600, owner root); returns its path.

    The caller holds the claim on the name. A node that was left behind (its loop or nbd device is free) is replaced;
    anything else there raises FileExistsError.
    """
    path = f"/dev/{name}"
    for _ in range(2):
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, device)
            return path
        except FileExistsError:
            old = number_of(path)
            if old is None or (old != device and is_driven(old)):
                raise
            os.unlink(path)
    raise FileExistsError(errno.EEXIST, "somebody else makes this node at the same time", path)


def remove_node(path: str, device: int) -> None:
    """Removes *path* if it is a node of that device."""
    if number_of(path) == device:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def partitions_of(device: int) -> dict[str, int]:
    """The device numbers of the partitions that the kernel knows of a disk, by their numbers."""
    found = {}
    for entry in sysfs(device).glob("*/partition"):
        with contextlib.suppress(FileNotFoundError):        # deleted while we looked
            found[entry.read_text().strip()] = _number_in(entry.parent)
    return found


def mounts_of(device: int) -> list[tuple[str, str, str]]:
    """(directory, file system type, "" or the partition's number) of each mount of a disk in this namespace."""
    numbers = {device: "", **{number: part for part, number in partitions_of(device).items()}}
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        fields = left.split(" ")
        major, _, minor = fields[2].partition(":")
        part = numbers.get(os.makedev(int(major), int(minor)))
        if part is not None:
            directory = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            found.append((directory, right.split(" ")[0], part))
    return found


def flush(device: int, fds: Iterable[int], left: list[str]) -> None:
    """Write down what is dirty: file systems mounted from a disk or its partitions, then the caches of those that are
    open at *fds*: partitions, last the disk.

    Adds a sentence to *left* for each file system that could not be written. Raises OSError.
    """
    left += sync_mounts(device)
    for fd in fds:
        os.fsync(fd)


def sync_mounts(device: int) -> list[str]:
    """Write down what is dirty of file systems mounted from a disk or its partitions; a sentence for each that could not be
    written. Raises OSError."""
    left = []
    libc = ctypes.CDLL(None, use_errno=True)
    for directory, _, _ in mounts_of(device):
        mounted = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.syncfs(mounted) != 0:
                left.append(f"{directory}: not all data was written: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(mounted)
    return left


def users_of(device: int, path: str, but: int | None = None) -> list[str]:
    """Who has a disk, called *path*, or one of its partitions in use, as sentences, leaving out process *but*.

    Only names are compared: asking the files could wait for them.
    """
    found = [f"{path}{part} is still mounted on {directory} ({kind})" for directory, kind, part in mounts_of(device)]
    names = {path: path, f"/dev/{kernel_name(device)}": path}
    for part, number in partitions_of(device).items():
        names |= {f"{path}{part}": f"{path}{part}", f"/dev/{kernel_name(number)}": f"{path}{part}"}
    names |= {f"{name} (deleted)": shown for name, shown in names.items()}
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        if shown := names.get(line.split()[0].replace("\\040", " ")):
            found.append(f"{shown} is still used as swap space")
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            shown = names.get(os.readlink(link))
            if shown is None:
                continue
            pid = link.split("/")[2]
            if pid == str(but):
                continue
            sentence = f"process {pid} ({Path('/proc', pid, 'comm').read_text().strip()}) still has {shown} open"
        except OSError:
            continue        # ended, or closed the descriptor, while we looked
        if sentence not in found:
            found.append(sentence)
    holders = sysfs(device) / "holders"
    found += [f"{path} is still part of /dev/{holder}" for holder in (os.listdir(holders) if holders.is_dir() else ())]
    return found or [f"{path} is still in use (by the kernel, or in another mount namespace)"]
