"""Block devices whoever drives them: names, nodes, file systems mounted from them, users."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import stat
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


def is_driven(device: int) -> bool:
    """Whether a loop or nbd device has something behind it; one of another driver always has."""
    entry = _DRIVEN.get(os.major(device))
    return entry is None or (sysfs(device) / entry).exists()


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


def partitions_of(device: int) -> list[int]:
    """The device numbers of the partitions that the kernel knows of a disk."""
    found = []
    for entry in sysfs(device).glob("*/partition"):
        major, minor = (entry.parent / "dev").read_text().split(":")
        found.append(os.makedev(int(major), int(minor)))
    return found


def mounts_of(device: int) -> list[tuple[str, str]]:
    """(directory, file system type) of each mount of a disk or one of its partitions in this namespace."""
    found = []
    numbers = {f"{os.major(each)}:{os.minor(each)}" for each in [device, *partitions_of(device)]}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        fields = left.split(" ")
        if fields[2] in numbers:
            directory = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            found.append((directory, right.split(" ")[0]))
    return found


def flush(fd: int, device: int, left: list[str]) -> None:
    """Write down what is dirty: file systems mounted from a disk or its partitions, then its own cache; fd: of it, open.

    Adds a sentence to *left* for each file system that could not be written. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for directory, _ in mounts_of(device):
        mounted = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.syncfs(mounted) != 0:
                left.append(f"{directory}: not all data was written: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(mounted)
    os.fsync(fd)


def users_of(device: int, path: str, kernel_path: str, but: int | None = None) -> list[str]:
    """Who has a device in use, as sentences, leaving out process *but*. path, kernel_path: its nodes.

    Only names are compared: asking the files could wait for them.
    """
    found = [f"{path} is still mounted on {directory} ({kind})" for directory, kind in mounts_of(device)]
    paths = {path, kernel_path, *(f"/dev/{os.path.basename(os.path.realpath(sysfs(each)))}"
                                  for each in partitions_of(device))}
    names = paths | {f"{each} (deleted)" for each in paths}
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        if line.split()[0].replace("\\040", " ") in names:
            found.append(f"{path} is still used as swap space")
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) not in names:
                continue
            pid = link.split("/")[2]
            if pid == str(but):
                continue
            sentence = f"process {pid} ({Path('/proc', pid, 'comm').read_text().strip()}) still has {path} open"
        except OSError:
            continue        # ended, or closed the descriptor, while we looked
        if sentence not in found:
            found.append(sentence)
    holders = sysfs(device) / "holders"
    found += [f"{path} is still part of /dev/{holder}" for holder in (os.listdir(holders) if holders.is_dir() else ())]
    return found or [f"{path} is still in use (by the kernel, or in another mount namespace)"]
