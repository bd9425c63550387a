"""/dev/muendiskX under `muenfast ctl`: it goes with its export, and takes another size while it is used."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Program, run, unique
from helpers import eventually
from nbd_client import Connection, connect
from test_ctl import ending  # noqa: F401
from test_device import clean, command, digests_of, mounted, unmounted  # noqa: F401

from muenfast import control
from muenfast.attach import fuse

pytestmark = [pytest.mark.root, pytest.mark.fuse,
              pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]

Start = Callable[..., Program]
MIB = 1 << 20
CAP_SYS_RESOURCE = 24
ONLINE = bool(int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16) >> CAP_SYS_RESOURCE & 1)


def ctl(*words: str) -> str:
    done = run("ctl", *words)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def disks(client: Program) -> list[str]:
    return [line.split()[4] for line in client.lines]


def stands(device: str, number: int) -> bool:
    """Whether the node is that device's still: another test run may take a free name at once."""
    try:
        return os.stat(device).st_rdev == number
    except FileNotFoundError:
        return False


def size_of(device: str) -> int:
    return int(command("blockdev", "--getsize64", device))


def in_use(device: str) -> bool:
    """Whether somebody holds it for himself, as a mount does."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        assert error.errno == errno.EBUSY
        return True
    return False


@pytest.fixture
def server(program: Start) -> Program:
    return program("blk", "--control")


def attach(program: Start, *names: str, more: tuple[str, ...] = ()) -> Program:
    return program("blk", "--client", "--attach", "fuse", "--req", ",".join(f"{name}_req" for name in names),
                   "--resp", ",".join(f"{name}_resp" for name in names), *more)


def test_a_device_goes_with_its_export(server: Program, program: Start) -> None:
    """Destroyed under an unmounted device: node and loop device go, the client ends with 0."""
    name = unique("d")
    ctl("create", name)
    client = attach(program, name)
    [device] = disks(client)
    number = os.stat(device).st_rdev
    command("mkfs.ext4", "-q", device)
    ctl("destroy", name, "--force")
    client.process.wait(20)
    assert client.end()[0] == 0 and not stands(device, number)


def test_a_mounted_device_goes_with_its_export(server: Program, program: Start, tmp_path: Path) -> None:
    """Its users get I/O errors; the client ends with 0, and the loop device goes once it is unmounted."""
    name = unique("d")
    ctl("create", name)
    client = attach(program, name)
    [device] = disks(client)
    number = os.stat(device).st_rdev
    command("mkfs.ext4", "-q", device)
    with mounted(device, tmp_path / "mnt") as directory:
        (directory / "file").write_bytes(os.urandom(MIB))
        ctl("destroy", name, "--force")
        client.process.wait(20)
        assert client.end()[0] == 0 and not stands(device, number)
        with pytest.raises(OSError):
            (directory / "more").write_bytes(os.urandom(MIB))
            os.sync()
            fd = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def test_one_of_two_devices_goes(server: Program, program: Start, tmp_path: Path) -> None:
    """The other one stays mounted and is written on; the process ends 0 with that."""
    one, two = unique("one"), unique("two")
    for name in (one, two):
        ctl("create", name, "--device", "ram:64M")
    client = attach(program, one, two)
    first, second = disks(client)
    numbers = [os.stat(device).st_rdev for device in (first, second)]
    for device in (first, second):
        command("mkfs.ext4", "-q", device)
    with mounted(second, tmp_path / "mnt") as directory:
        ctl("destroy", one, "--force")
        eventually(lambda: not stands(first, numbers[0]))
        eventually(lambda: not any(one in name for name in os.listdir("/dev/shm")))
        digests = fill_small(directory)
        assert digests_of(directory) == digests
        entries = control.ask(client.pid, {"command": "status"})["entries"]
        assert [entry["device"] for entry in entries] == ["-", second]
    clean(second)
    ctl("destroy", two, "--force")
    client.process.wait(20)
    assert client.end()[0] == 0 and not stands(second, numbers[1])


def fill_small(directory: Path) -> dict[str, str]:
    digests = {}
    for number in range(8):
        data = os.urandom(MIB + number)
        (directory / f"file{number}").write_bytes(data)
        digests[f"file{number}"] = hashlib.sha256(data).hexdigest()
    command("sync", "-f", str(directory))
    return digests


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_a_mounted_file_system_grows(server: Program, program: Start, tmp_path: Path, shared: bool) -> None:
    """A file's disk grows under a mounted ext4 that is being written; resize2fs takes it, online where this process may
    (CAP_SYS_RESOURCE; tests/guest may), and all files are right."""
    name, image, buffer = unique("d"), tmp_path / "image", unique("shm")
    with open(image, "wb") as file:
        file.truncate(128 * MIB)
    ctl("create", name, "--device", str(image), *(["--shm", buffer] if shared else []))
    client = attach(program, name, more=("--shm", buffer) if shared else ())
    device = client.lines[0].split()[4]
    command("mkfs.ext4", "-q", "-b", "4096", device)
    digests: dict[str, str] = {}
    failures: list[BaseException] = []
    with mounted(device, tmp_path / "mnt") as directory:
        over = threading.Event()

        def write() -> None:
            number = 0
            try:
                while not over.is_set():
                    number = number % 6 + 1
                    data = os.urandom(4 * MIB)
                    path = directory / f"busy{number}"
                    with open(path, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    digests[path.name] = hashlib.sha256(data).hexdigest()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for mib in (160, 256, 512):
                ctl("resize", name, f"{mib}M")
                eventually(lambda: size_of(device) == mib * MIB)
                if ONLINE:
                    command("resize2fs", device)
        finally:
            over.set()
            thread.join()
        assert not failures
        assert digests_of(directory) == digests
    clean(device)
    eventually(lambda: not in_use(device))      # as long as another process's mount namespace has a copy of the mount
    if not ONLINE:
        command("e2fsck", "-f", "-p", device)
        command("resize2fs", device)
    with mounted(device, tmp_path / "mnt") as directory:
        free = os.statvfs(directory)
        assert free.f_blocks * free.f_frsize > 400 * MIB
        (directory / "large").write_bytes(bytes(200 * MIB))     # more than there was room for
        digests["large"] = hashlib.sha256(bytes(200 * MIB)).hexdigest()
        command("sync", "-f", str(directory))
        assert digests_of(directory) == digests
    clean(device)
    assert client.end()[0] == 0
    clean(image)


def test_a_device_shrinks(server: Program, program: Start) -> None:
    """What is beyond its new end cannot be read any more, the rest can; the partition table is looked at again."""
    name = unique("d")
    ctl("create", name, "--device", "ram:64M")
    client = attach(program, name)
    [device] = disks(client)
    with open(device, "r+b", buffering=0) as file:
        file.write(b"x" * 4096)
    ctl("resize", name, "16M", "--force")
    eventually(lambda: size_of(device) == 16 * MIB)
    with open(device, "rb", buffering=0) as file:
        assert file.read(4096) == b"x" * 4096
        file.seek(16 * MIB)
        assert file.read(4096) == b""
    subprocess.run(["sfdisk", "-q", device], input=b"label: dos\n,4M\n,\n", check=True, timeout=60, capture_output=True)
    eventually(lambda: os.path.exists(f"{device}2"))
    ctl("resize", name, "32M")
    eventually(lambda: size_of(device) == 32 * MIB)
    assert os.path.exists(f"{device}1")
    assert client.end()[0] == 0


def test_a_read_only_device_grows(program: Start, tmp_path: Path) -> None:
    """Its file was made longer by somebody else; `resize` without a size, or the server's restart, takes that over."""
    name, image = unique("d"), tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    words = ["blk", "--req", f"{name}_req", "--resp", f"{name}_resp", "--device", str(image), "--read-only"]
    server = program(*words)
    client = attach(program, name)
    [device] = disks(client)
    assert size_of(device) == 16 * MIB
    os.truncate(image, 32 * MIB)
    ctl("resize", f"{name}_req")
    eventually(lambda: size_of(device) == 32 * MIB)
    assert server.end()[0] == 0
    os.truncate(image, 64 * MIB)
    program(*words)
    eventually(lambda: size_of(device) == 64 * MIB)
    with open(device, "rb", buffering=0) as file:
        file.seek(64 * MIB - 4096)
        assert file.read(4096) == bytes(4096)
    assert client.end()[0] == 0


def test_an_nbd_socket_takes_another_size(server: Program, program: Start, tmp_path: Path) -> None:
    """New NBD clients see it, beside a device on the same disk."""
    name, path = unique("d"), str(tmp_path / "socket")
    ctl("create", name, "--device", "ram:16M")
    client = attach(program, name, more=("--nbd", path))
    device = client.lines[0].split()[4]
    with connect(path) as before:
        ctl("resize", name, "32M")
        eventually(lambda: size_of(device) == 32 * MIB)
        with Connection(path) as after:
            after.greet()
            assert struct.unpack(">Q", after.go()[0][:8]) == (32 * MIB,)
            after.write(32 * MIB - 4096, b"y" * 4096)
        assert before.read(32 * MIB - 4096, 4096) == b"y" * 4096    # the server knows, whoever asks
    assert client.end()[0] == 0
