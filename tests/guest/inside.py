"""What the tests in tools/guest share: programs, files with checksums, LVM on dm-crypt without udev.

Importing it outside the guest is an error: these tests make device-mapper devices and load modules.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Program, unique
from helpers import eventually

from muenfast.attach import watchdog

with open("/proc/cmdline", encoding="ascii") as file:
    if "muenfast.guest" not in file.read().split():
        raise pytest.UsageError("these tests run inside tools/guest: make test-guest")

Start = Callable[..., Program]
MIB = 1 << 20
# There is no udev: libdevmapper makes the nodes itself.
ENVIRONMENT = os.environ | {"DM_DISABLE_UDEV": "1", "LVM_SUPPRESS_FD_WARNINGS": "1"}
# The least that cryptsetup takes. The passphrase protects nothing here, and emulation is slow.
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


def command(*words: str | os.PathLike[str], given: str | None = None, status: int | None = 0,
            env: dict[str, str] = ENVIRONMENT) -> str:
    """Runs a program; what it printed. status: what it must end with, None: anything."""
    done = subprocess.run([os.fspath(word) for word in words], input=given, capture_output=True, text=True,
                          timeout=300, check=False, env=env)
    assert status in (None, done.returncode), f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    """The device mounted there; unmounted in any case."""
    directory.mkdir(exist_ok=True)
    command("mount", device, directory)
    try:
        yield directory
    finally:
        command("umount", directory)


def fill(directory: Path, seed: int) -> dict[str, str]:
    """Random files, one byte to 8 MiB, on the disk; their digests by name."""
    digests = {}
    for size in (1, 4095, 4096, 100_000, MIB, 8 * MIB):
        data = random.Random(seed + size).randbytes(size)
        (directory / f"{seed}-{size}").write_bytes(data)
        digests[f"{seed}-{size}"] = hashlib.sha256(data).hexdigest()
    command("sync", "-f", directory)
    return digests


@contextlib.contextmanager
def copying(source: Path, target: Path) -> Iterator[None]:
    """Begins to copy a file, durably; afterwards that has succeeded. While the disk has no server it cannot end."""
    copier = subprocess.Popen(["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync", "status=none"])
    try:
        yield
        assert copier.wait(300) == 0
    finally:
        copier.kill()
        copier.wait(300)


def digests_of(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def clean(device: str) -> None:
    """fsck finds nothing, and changes nothing."""
    command("fsck.ext4", "-f", "-n", device)


@pytest.fixture(params=["inline", "buffer"])
def pair(request: pytest.FixtureRequest) -> list[str]:
    """--req and --resp of one connection, and --shm."""
    return ["--req", unique("req"), "--resp", unique("resp"), *(["--shm", unique("buf")] * (request.param == "buffer"))]


def disk(client: Program) -> str:
    """The device of a client's only disk."""
    [line] = client.lines
    return line.split()[4]


def attachments_gone(below: Path) -> None:
    """Soon no node, loop device or mount of an attached disk is left."""
    eventually(lambda: not list(Path("/dev").glob("muendisk*")) and not list(watchdog.loops_below(str(below))) and
               str(below) not in Path("/proc/mounts").read_text(), 60)


@dataclass
class Volume:
    """An ext4 file system on a logical volume, its volume group on dm-crypt on `device`."""

    device: str
    lvm: dict[str, str]
    group: str

    @property
    def crypt(self) -> str:
        return f"{self.group}-crypt"

    @property
    def path(self) -> str:
        return f"/dev/mapper/{self.group}-files"

    def make(self) -> None:
        """New, and open."""
        command("cryptsetup", "luksFormat", "--batch-mode", *CHEAP, self.device, "-", given="secret")
        self.unlock()
        command("pvcreate", f"/dev/mapper/{self.crypt}", env=self.lvm)
        command("vgcreate", self.group, f"/dev/mapper/{self.crypt}", env=self.lvm)
        command("lvcreate", "--yes", "--name", "files", "--extents", "80%FREE", self.group, env=self.lvm)
        command("mkfs.ext4", "-q", self.path)

    def unlock(self) -> None:
        command("cryptsetup", "open", "--key-file", "-", self.device, self.crypt, given="secret")

    def open(self) -> None:
        self.unlock()
        command("vgchange", "--activate", "y", self.group, env=self.lvm)
        assert command("vgs", "--noheadings", "--options", "lv_count", self.group, env=self.lvm).split() == ["1"]

    def close(self) -> None:
        command("vgchange", "--activate", "n", self.group, env=self.lvm)
        command("cryptsetup", "close", self.crypt)

    def remove(self) -> None:
        """Whatever is there of it in the kernel; nothing is read from the device."""
        for name in (f"{self.group}-files", self.crypt):
            if os.path.exists(f"/dev/mapper/{name}"):
                command("dmsetup", "remove", name)


@contextlib.contextmanager
def volume_on(device: str, directory: Path) -> Iterator[Volume]:
    """A Volume to be made. Nothing of it is left in the kernel afterwards."""
    system = directory / "lvm"
    system.mkdir(exist_ok=True)
    (system / "lvm.conf").write_text("""
        devices {
            obtain_device_list_from_udev = 0
            use_devicesfile = 0
            global_filter = [ "a|^/dev/mapper/.*-crypt$|", "r|.*|" ]
        }
        activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }
        global { event_activation = 0 }
    """)
    volume = Volume(device, ENVIRONMENT | {"LVM_SYSTEM_DIR": str(system)}, "g" + directory.name[-12:].replace("-", ""))
    try:
        yield volume
    finally:
        volume.remove()
    assert not [name for name in os.listdir("/dev/mapper") if name.startswith(volume.group)]
    assert volume.group not in command("dmsetup", "ls")
