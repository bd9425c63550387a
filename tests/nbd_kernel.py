"""/dev/muendiskX through the kernel's nbd driver, as its user meets it. Not collected by itself: it takes a kernel with
that driver, root, and no other user of it: `modprobe nbd; make test ARGS=tests/nbd_kernel.py`."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Program, leftovers, run, unique
from helpers import eventually
from nbd_client import connect

from muenfast.attach import block, fuse, nbdkernel, watchdog

Start = Callable[..., Program]
MIB = 1 << 20

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def driver(tmp_path: Path) -> Iterator[None]:
    """After each test no device of the driver is connected and no node or mount is left."""
    assert nbdkernel.available() is None, nbdkernel.available()
    yield
    for directory in leftovers(tmp_path)["mounts"]:
        subprocess.run(["umount", "-l", directory], check=False)
    eventually(lambda: not glob.glob("/sys/block/nbd*/pid"), 30)
    assert not glob.glob("/dev/muendisk*") and watchdog.nbd_devices() == []


@pytest.fixture
def lists() -> list[str]:
    return ["--req", unique("req"), "--resp", unique("resp")]


def command(*words: object, status: int = 0) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def mounted(device: str, directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    command("mount", *options, device, directory)
    try:
        yield directory
    finally:
        command("umount", directory)


def device_of(client: Program) -> str:
    return client.lines[0].split()[4]


def client_of(program: Start, lists: list[str], *words: str, **options: object) -> Program:
    return program("blk", "--client", *lists, "--attach", "nbd", *words, **options)


def dog_of(client: Program) -> int:
    children = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split()
    (dog,) = [int(pid) for pid in children if "watchdog" in Path(f"/proc/{pid}/cmdline").read_text()]
    return dog


def direct(device: str, offset: int) -> bytes:
    """A block, not out of a cache. Raises OSError."""
    return subprocess.run(["dd", f"if={device}", "iflag=direct", "bs=4096", "count=1", f"skip={offset // 4096}"],
                          capture_output=True, check=True).stdout


def repair(device: str) -> None:
    """fsck replays the journal; what it cannot mend by itself it tells with a status above 1."""
    done = subprocess.run(["fsck.ext4", "-f", "-p", device], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode <= 1, done.stdout + done.stderr


def test_file_systems(program: Start, lists: list[str], tmp_path: Path) -> None:
    """ext4: files come back over unmounting and over another client; fsck finds nothing; geometry is as it should be."""
    image = tmp_path / "image"
    image.write_bytes(bytes(128 * MIB))
    server = program("blk", *lists, "--device", str(image))
    digests = {}
    for life in range(2):
        client = client_of(program, lists)
        device = device_of(client)
        assert command("blockdev", "--getsize64", "--getss", "--getro", device).split() == [str(128 * MIB), "4096", "0"]
        if life == 0:
            command("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt") as directory:
            for name, digest in digests.items():
                assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
            for size in (1, 4096, 5 * MIB, 20 * MIB):
                data = random.Random(size + life).randbytes(size)
                (directory / f"{life}-{size}").write_bytes(data)
                digests[f"{life}-{size}"] = hashlib.sha256(data).hexdigest()
        with mounted(device, tmp_path / "mnt") as directory:
            assert {p.name for p in directory.iterdir()} == {*digests, "lost+found"}
            for name, digest in digests.items():
                assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
        command("fsck.ext4", "-f", "-n", device)
        assert client.end() == (0, "")
        assert not os.path.lexists(device)
    assert server.end() == (0, "")
    command("fsck.ext4", "-f", "-n", image)


def test_direct_io_zeros_and_the_socket_beside_it(program: Start, lists: list[str], tmp_path: Path) -> None:
    """--attach nbd --nbd: one engine serves the driver and the socket's clients."""
    server = program("blk", *lists, "--device", "ram:64M")
    client = client_of(program, lists, "--nbd", str(tmp_path / "s"))
    device = device_of(client)
    assert client.lines[0].split()[5] == str(tmp_path / "s")
    data = random.Random(1).randbytes(32 * MIB)
    (tmp_path / "data").write_bytes(data)
    command("dd", f"if={tmp_path}/data", f"of={device}", "bs=1M", "oflag=direct", "conv=fsync")
    with connect(str(tmp_path / "s")) as c:
        assert c.read(1 << 12, 31 * MIB) == data[4096:4096 + 31 * MIB]
        command("blkdiscard", "-f", "-z", "-o", MIB, "-l", 8 * MIB, device)
        assert c.read(0, 10 * MIB) == data[:MIB] + bytes(8 * MIB) + data[9 * MIB:10 * MIB]
        c.write(20 * MIB, b"x" * 4096)
    assert direct(device, 20 * MIB) == b"x" * 4096
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_partitions(program: Start, lists: list[str], tmp_path: Path) -> None:
    """Nodes are there before `ready`, follow a tool, take a file system, and go, with the kernel's, at the end."""
    image = tmp_path / "image"
    image.write_bytes(bytes(96 * MIB))
    subprocess.run(["sfdisk", "-q", image], input="label: gpt\nsize=16MiB\nsize=16MiB\n", text=True, check=True)
    server = program("blk", *lists, "--device", str(image))
    client = client_of(program, lists)
    device = device_of(client)
    for part in (1, 2):
        assert command("blockdev", "--getsize64", f"{device}{part}") == f"{16 * MIB}\n"
    command("mkfs.ext4", "-q", f"{device}1")
    with mounted(f"{device}1", tmp_path / "mnt") as directory:
        (directory / "file").write_bytes(data := random.Random(4).randbytes(MIB))
    starts = "".join(f"start={start * 256}, size={size * 256}\n" for start, size in ((1, 16), (40, 8), (64, 8)))    # blocks
    subprocess.run(["sfdisk", "-q", "--no-tell-kernel", device], input="label: gpt\n" + starts, text=True, check=True)
    command("blockdev", "--rereadpt", device)
    eventually(lambda: os.path.exists(f"{device}3") and command("blockdev", "--getsize64", f"{device}2") ==
               f"{8 * MIB}\n", 60)
    with mounted(f"{device}1", tmp_path / "mnt"):
        status, said = client.end()
        assert status == 0 and f"{device}1 is still mounted on {tmp_path}/mnt (ext4)" in said
        assert not glob.glob(f"{device}*")
    eventually(lambda: not glob.glob("/sys/block/nbd*/pid"), 30)
    client = client_of(program, lists)
    device = device_of(client)
    with mounted(f"{device}1", tmp_path / "mnt") as directory:
        assert (directory / "file").read_bytes() == data
    assert sorted(glob.glob(f"{device}*")) == [device, *(f"{device}{part}" for part in (1, 2, 3))]
    client.end(signal.SIGKILL)
    eventually(lambda: not glob.glob(f"{device}*") and watchdog.nbd_devices() == [], 60)
    client = client_of(program, lists)
    device = device_of(client)
    assert os.path.exists(f"{device}3")
    disk = block.kernel_name(os.stat(device).st_rdev)
    assert client.end() == (0, "")
    assert not glob.glob(f"/sys/block/{disk}/{disk}p*")
    assert server.end() == (0, "")


def test_two_disks_one_read_only(program: Start, tmp_path: Path) -> None:
    names = ["--req", f"{unique('a')},{unique('b')}", "--resp", f"{unique('c')},{unique('d')}"]
    server = program("blk", *names, "--device", "ram:16M,ram:32M", "--read-only", "no,yes")
    client = client_of(program, names)
    one, two = (line.split()[4] for line in client.lines)
    assert (one, two) == ("/dev/muendiska", "/dev/muendiskb")
    assert command("blockdev", "--getsize64", "--getro", one).split() == [str(16 * MIB), "0"]
    assert command("blockdev", "--getsize64", "--getro", two).split() == [str(32 * MIB), "1"]
    command("dd", "if=/dev/zero", f"of={two}", "bs=4096", "count=1", "oflag=direct", status=1)
    assert client.end() == (0, "")
    assert server.end() == (0, "")


@pytest.mark.parametrize("busy", [False, True])
def test_a_client_killed(program: Start, lists: list[str], tmp_path: Path, busy: bool) -> None:
    """The watchdog takes device and node away; who uses a mounted file system gets errors, and nothing hangs."""
    server = program("blk", *lists, "--device", "ram:64M")
    client = client_of(program, lists)
    device = device_of(client)
    if busy:
        command("mkfs.ext4", "-q", device)
        command("mkdir", "-p", tmp_path / "mnt")
        command("mount", device, tmp_path / "mnt")
        load = subprocess.Popen(["dd", "if=/dev/zero", f"of={tmp_path}/mnt/file", "bs=64k", "count=100000", "oflag=direct"],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file = tmp_path / "mnt" / "file"
        eventually(lambda: file.exists() and file.stat().st_size > MIB, 60)
    client.end(signal.SIGKILL)
    eventually(lambda: not os.path.lexists(device), 30)
    eventually(lambda: watchdog.nbd_devices() == [] or busy, 30)
    if busy:
        assert load.wait(60) != 0
        with pytest.raises(OSError), open(tmp_path / "mnt" / "more", "wb") as more:
            more.write(b"x" * MIB)
            os.fsync(more)
        command("umount", tmp_path / "mnt")
    run("doctor", "--fix")
    client = client_of(program, lists)
    if busy:
        repair(device_of(client))
    assert client.end() == (0, "")
    assert server.end()[0] == 0


@pytest.mark.parametrize("by", ["doctor", "the next client"])
def test_client_and_watchdog_killed(program: Start, lists: list[str], by: str) -> None:
    """Nobody cleans up at once: doctor names device and node, and removes them, and so does the next client."""
    server = program("blk", *lists, "--device", "ram:16M")
    client = client_of(program, lists)
    device = device_of(client)
    os.kill(dog_of(client), signal.SIGKILL)
    client.end(signal.SIGKILL)
    assert os.path.lexists(device) and len(watchdog.nbd_devices()) == 1
    if by == "doctor":
        said = run("doctor", "--fix").stdout
        assert f"removed: device /dev/nbd0 (attached as {device} by process {client.pid}, which is dead)" in said
        assert not os.path.lexists(device) and watchdog.nbd_devices() == []
    else:
        again = client_of(program, lists)
        assert device_of(again) == device and len(watchdog.nbd_devices()) == 1
        assert direct(device, 0) == bytes(4096)
        assert again.end() == (0, "")
    run("doctor", "--fix")
    assert server.end()[0] == 0


def test_a_node_whose_device_is_free(program: Start, lists: list[str]) -> None:
    """It is named and removed, and replaced by a client."""
    os.mknod("/dev/muendiska", 0o60600, os.makedev(43, 0))
    assert "removed: node /dev/muendiska (its nbd device 0 is free)" in run("doctor", "--fix").stdout
    os.mknod("/dev/muendiska", 0o60600, os.makedev(43, 0))
    server = program("blk", *lists, "--device", "ram:16M")
    client = client_of(program, lists)
    assert device_of(client) == "/dev/muendiska"
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_a_device_in_use_at_the_end(program: Start, lists: list[str], tmp_path: Path) -> None:
    """Its data is written, its users are told, the node goes at once, and the rest with its last user."""
    server = program("blk", *lists, "--device", "ram:64M")
    client = client_of(program, lists)
    device = device_of(client)
    command("mkfs.ext4", "-q", device)
    (tmp_path / "mnt").mkdir()
    command("mount", device, tmp_path / "mnt")
    (tmp_path / "mnt" / "file").write_bytes(data := random.Random(2).randbytes(MIB))
    status, said = client.end()
    assert status == 0 and f"{device} is still mounted on {tmp_path}/mnt (ext4)" in said
    assert not os.path.lexists(device)
    with pytest.raises(OSError):
        (tmp_path / "mnt" / "more").write_bytes(data)
        os.sync()
        (tmp_path / "mnt" / "still more").write_bytes(data)
    command("umount", tmp_path / "mnt")
    client = client_of(program, lists)
    repair(device_of(client))
    with mounted(device_of(client), tmp_path / "mnt") as directory:
        assert (directory / "file").read_bytes() == data
    assert client.end() == (0, "")
    assert server.end() == (0, "")


@pytest.mark.parametrize("then", ["SIGTERM", "SIGTERM, SIGKILL"])
def test_the_end_while_the_server_is_away(program: Start, lists: list[str], then: str) -> None:
    """Dirty data and no server: the end comes in time and is clean, also for a client killed in the middle of it."""
    server = program("blk", *lists, "--device", "ram:16M")
    client = client_of(program, lists)
    device = device_of(client)
    with open(device, "r+b", buffering=0) as file:  # which reads the partition table
        server.process.send_signal(signal.SIGSTOP)
        file.write(b"d" * MIB)
        client.process.send_signal(signal.SIGTERM)
        if then == "SIGTERM, SIGKILL":
            eventually(lambda: not os.path.lexists(device))
            client.process.kill()
        status, said = client.end(timeout=60)
        eventually(lambda: not os.path.lexists(device))
        with pytest.raises(OSError):
            os.fsync(file)
    if then == "SIGTERM":
        assert status == 0 and "may be lost" in said
    eventually(lambda: watchdog.nbd_devices() == [], 60)
    server.process.send_signal(signal.SIGCONT)
    run("doctor", "--fix")
    assert server.end()[0] == 0
    run("doctor", "--fix")


def test_a_server_away_for_longer_than_the_driver_likes(program: Start, lists: list[str], tmp_path: Path) -> None:
    """Requests wait for it for more than the driver's 30 seconds, and are answered by the next one."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 * MIB))
    server = program("blk", *lists, "--device", str(image))
    client = client_of(program, lists)
    device = device_of(client)
    server.end(signal.SIGKILL)
    writer = subprocess.Popen(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "oflag=direct"],
                              stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(70)
    server = program("blk", *lists, "--device", str(image))
    assert writer.wait(60) == 0
    writer.communicate()
    assert command("cmp", "-n", 8 * MIB, device, image) == ""
    assert client.end()[0] == 0
    assert server.end()[0] == 0
    assert image.read_bytes()[:8 * MIB].count(0) < MIB


def test_a_client_stopped_for_a_while(program: Start, lists: list[str]) -> None:
    """SIGSTOP, SIGCONT: requests wait meanwhile."""
    server = program("blk", *lists, "--device", "ram:16M")
    client = client_of(program, lists)
    device = device_of(client)
    client.process.send_signal(signal.SIGSTOP)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(direct(device, 4096)))
    reader.start()
    reader.join(1)
    assert got == []
    client.process.send_signal(signal.SIGCONT)
    reader.join(60)
    assert got == [bytes(4096)]
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_somebody_else_disconnects_it(program: Start, lists: list[str]) -> None:
    """The client notices nothing, and its end is clean."""
    server = program("blk", *lists, "--device", "ram:16M")
    client = client_of(program, lists)
    device = device_of(client)
    watchdog.nbd_disconnect(0)
    assert command("blockdev", "--getsize64", device) == "0\n"
    assert client.end()[0] == 0
    assert server.end()[0] == 0


def test_auto_takes_it_where_there_is_no_fuse(program: Start, lists: list[str]) -> None:
    server = program("blk", *lists, "--device", "ram:16M")
    client = program("blk", "--client", *lists)
    assert (os.major(os.stat(device_of(client)).st_rdev) == 43) == (fuse.available() is not None)
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_more_disks_than_the_driver_has_devices(program: Start) -> None:
    """It makes another one."""
    count = len(glob.glob("/sys/block/nbd*")) + 1
    names = ["--req", ",".join(unique("a") for _ in range(count)), "--resp", ",".join(unique("b") for _ in range(count))]
    server = program("blk", *names, "--device", ",".join(["ram:1M"] * count))
    client = client_of(program, names)
    devices = [line.split()[4] for line in client.lines]
    assert len({os.stat(device).st_rdev for device in devices}) == count
    assert direct(devices[-1], 0) == bytes(4096)
    assert client.end() == (0, "")
    assert server.end() == (0, "")


@pytest.mark.parametrize("words", [[], ["-block-size", "4096"], ["-C", "2"]], ids=["512", "4096", "two connections"])
def test_nbd_client(program: Start, lists: list[str], tmp_path: Path, words: list[str]) -> None:
    """The driver's own tool on the socket: sectors of 512 bytes, too, which are written by reading first."""
    path, data = tmp_path / "s", random.Random(3).randbytes(MIB)
    server = program("blk", *lists, "--device", "ram:64M")
    client = program("blk", "--client", *lists, "--nbd", str(path))
    command("nbd-client", "-unix", path, "/dev/nbd3", *words)
    try:
        (tmp_path / "data").write_bytes(data)
        step = 4096 if "4096" in words else 512
        command("dd", f"if={tmp_path}/data", "of=/dev/nbd3", f"bs={step}", f"seek={5 * MIB // step + 1}", "oflag=direct",
                "conv=fsync", f"count={MIB // step if step == 4096 else 300}")
        command("mkfs.ext4", "-q", "-b", "1024" if step == 512 else "4096", "/dev/nbd3", "4M")
        command("fsck.ext4", "-f", "-n", "/dev/nbd3")
    finally:
        command("nbd-client", "-d", "/dev/nbd3")
    with connect(str(path)) as c:
        length = MIB if step == 4096 else 300 * 512
        assert c.read(5 * MIB + step, length) == data[:length]
    assert client.end() == (0, "")
    assert server.end() == (0, "")
