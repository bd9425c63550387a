"""--shm as its user meets it: /dev/muendiskX over a shared buffer, file systems, holes, sectors of 512 bytes, deaths."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import Program, run, unique
from test_device import MIB, Start, clean, command, digests_of, fill, image, mounted, unmounted, until

from muenfast.attach import fuse

__all__ = ["image", "unmounted"]    # fixtures

pytestmark = [pytest.mark.root, pytest.mark.fuse,
              pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]


def disks(client: Program) -> list[str]:
    """The devices that a client named, in order."""
    return [line.split()[4] for line in client.lines]


@pytest.fixture
def lists() -> list[str]:
    """The regions of one connection, as options."""
    return ["--req", unique("req"), "--resp", unique("resp"), "--shm", unique("buf")]


def test_a_file_system_over_a_buffer(program: Start, tmp_path: Path, image: Path, lists: list[str]) -> None:
    """mkfs discards the whole disk; files of every size survive unmounting, another client, a dead server under the
    mount, and stand in the image afterwards; what is trimmed is a hole there; nothing is left behind."""
    server = program("blk", *lists, "--device", str(image), "--shm-size", "2M")
    assert server.lines == [f"export {lists[1]} {lists[3]} {256 * MIB} {image} shm {lists[5]}"]
    client = program("blk", "--client", *lists)
    (device,) = disks(client)
    assert client.lines == [f"disk {lists[1]} {lists[3]} {256 * MIB} {device} shm {lists[5]}"]
    assert command("blockdev", "--getsize64", "--getss", "--getro", device).split() == [str(256 * MIB), "4096", "0"]
    command("mkfs.ext4", "-q", "-E", "discard", device)
    with mounted(device, tmp_path / "mnt") as directory:
        digests = fill(directory, 1)
        server.end(signal.SIGKILL)
        server = program("blk", *lists, "--device", str(image))
        digests |= {name + "x": digest for name, digest in digests.items()}
        for name in list(digests):
            if not name.endswith("x"):
                (directory / (name + "x")).write_bytes((directory / name).read_bytes())
        command("sync", "-f", directory)
        assert digests_of(directory) == digests
        before = os.stat(image).st_blocks
        for path in directory.glob("*x"):
            path.unlink()
            del digests[path.name]
        command("sync", "-f", directory)
        assert "trimmed" in command("fstrim", "-v", directory)
        assert os.stat(image).st_blocks < before - 100_000
    clean(device)
    answers = json.loads(run("stat", "--json").stdout)
    entries = {answer["command"]: answer["entries"][0] for answer in answers}
    assert entries["blk"]["counters"]["discards"] > 0
    assert entries["blk --client"]["front"]["discards"] > 0
    assert entries["blk"]["shm"] == entries["blk --client"]["shm"] == lists[5]
    assert run("stat").returncode == run("doctor").returncode == 0
    status, said = client.end()
    # How many is the kernel's choice: what it was writing back as the server was killed.
    assert (status, [re.sub(r"\d+", "N", line.rpartition(": ")[2]) for line in said.splitlines()]) == (
        0, ["the server is gone, requests wait for its return", "the server is back, N requests issued again"])
    client = program("blk", "--client", *lists)
    with mounted(disks(client)[0], tmp_path / "mnt") as directory:
        assert digests_of(directory) == digests
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    with mounted(image, tmp_path / "mnt", "-o", "loop,ro") as directory:
        assert digests_of(directory) == digests
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(lists[5])]


def test_holes_and_zeros_of_the_device(program: Start, tmp_path: Path, image: Path, lists: list[str]) -> None:
    """blkdiscard frees and reads as zeros; blkdiscard --zeroout reads as zeros; neighbours stay."""
    image.write_bytes(b"\xaa" * (8 * MIB))
    server = program("blk", *lists, "--device", str(image))
    client = program("blk", "--client", *lists)
    (device,) = disks(client)
    command("blkdiscard", "-o", str(1 * MIB), "-l", str(2 * MIB), device)
    command("blkdiscard", "--zeroout", "-o", str(5 * MIB), "-l", str(1 * MIB), device)
    with open(device, "rb") as file:
        data = file.read()
    expected = bytearray(b"\xaa" * (8 * MIB))
    expected[MIB:3 * MIB], expected[5 * MIB:6 * MIB] = bytes(2 * MIB), bytes(MIB)
    assert data == expected
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    assert image.read_bytes() == expected


def test_sectors_of_512_bytes(program: Start, tmp_path: Path, image: Path, lists: list[str]) -> None:
    """A disk whose size is no multiple of 4096 keeps its tail: its sectors have 512 bytes, and so has a partition table's
    and a file system's smallest unit."""
    with open(image, "r+b") as file:
        file.truncate(64 * MIB + 512)
    server = program("blk", *lists, "--device", str(image))
    client = program("blk", "--client", *lists)
    (device,) = disks(client)
    assert command("blockdev", "--getsize64", "--getss", device).split() == [str(64 * MIB + 512), "512"]
    last = os.urandom(512)
    subprocess.run(["dd", f"of={device}", "bs=512", f"seek={64 * MIB // 512}", "oflag=direct", "status=none"], input=last,
                   check=True)
    command("mkfs.ext4", "-q", "-b", "1024", device, str(64 * 1024))
    with mounted(device, tmp_path / "mnt") as directory:
        for size in (1, 511, 512, 513, 100_001):
            (directory / str(size)).write_bytes(os.urandom(size))
        digests = digests_of(directory)
    with mounted(device, tmp_path / "mnt") as directory:
        assert digests_of(directory) == digests
    clean(device)
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    assert image.read_bytes()[-512:] == last


def test_disks_of_several_connections(program: Start, tmp_path: Path, image: Path) -> None:
    """They appear in the order of the list, and on a connection in that of their numbers: modprobe on both sides, disks of
    all kinds; each is its own."""
    names = [[unique(word) for word in ("req", "resp", "buf")] for _ in range(2)]
    with open(tmp_path / "odd", "wb") as file:
        file.truncate(4 * MIB + 512)
    connections = ",".join(f"c{n}:{':'.join(each)}" for n, each in enumerate(names))
    server = program("modprobe", "muenblock-server", f"connections={connections}",
                     f"device=ram:8M:c1,{image}:c0,{tmp_path}/odd:c1")
    client = program("modprobe", "muenblock-client", f"connections={connections}")
    assert [line.split()[3] for line in client.lines] == [str(256 * MIB), str(8 * MIB), str(4 * MIB + 512)]
    devices = disks(client)
    # In the order of their names, too, where nobody else takes or frees one meanwhile.
    assert [int(command("blockdev", "--getsize64", device)) for device in devices] == [256 * MIB, 8 * MIB, 4 * MIB + 512]
    assert len(set(devices)) == 3
    assert [command("blockdev", "--getss", device).strip() for device in devices] == ["4096", "4096", "512"]
    digests = []
    for device in devices:
        command("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt") as directory:
            (directory / "which").write_text(device)
            digests.append(digests_of(directory))
        clean(device)
    assert len({str(each) for each in digests}) == 3
    for device, digest in zip(devices, digests, strict=True):
        with mounted(device, tmp_path / "mnt") as directory:
            assert digests_of(directory) == digest
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_inline_beside_a_buffer(program: Start, tmp_path: Path, lists: list[str]) -> None:
    """An empty entry of --shm is an inline connection."""
    words = ["--req", f"{lists[1]},{unique('req')}", "--resp", f"{lists[3]},{unique('resp')}", "--shm", f"{lists[5]},"]
    server = program("blk", *words, "--device", "ram:8M,ram:16M")
    client = program("blk", "--client", *words)
    first, second = disks(client)
    assert [line.split()[5:] for line in client.lines] == [["shm", lists[5]], []]
    for device, size in ((first, 8 * MIB), (second, 16 * MIB)):
        data = os.urandom(size)
        subprocess.run(["dd", f"of={device}", "bs=1M", "oflag=direct", "status=none"], input=data, check=True)
        assert Path(device).read_bytes() == data
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_read_only_disks(program: Start, image: Path, lists: list[str]) -> None:
    server = program("blk", *lists, "--device", str(image), "--read-only")
    client = program("blk", "--client", *lists)
    (device,) = disks(client)
    assert command("blockdev", "--getro", device).strip() == "1"
    with pytest.raises(OSError), open(device, "wb", buffering=0) as file:
        file.write(bytes(4096))
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_partitions_in_sectors_of_512_bytes(program: Start, tmp_path: Path, image: Path, lists: list[str]) -> None:
    """A table in 512-byte sectors on a disk that has them: partitions at any sector, which appear and go with the table."""
    with open(image, "r+b") as file:
        file.truncate(64 * MIB + 512)
    server = program("blk", *lists, "--device", str(image))
    client = program("blk", "--client", *lists)
    (device,) = disks(client)
    subprocess.run(["sfdisk", "-q", "--no-reread", device], check=True, text=True,
                   input="label: dos\nstart=63, size=20001\nstart=40007, size=60000\n", stdout=subprocess.DEVNULL)
    until(lambda: all(os.path.exists(f"{device}{n}") for n in (1, 2)), "the partitions appear")
    assert command("blockdev", "--getsize64", f"{device}1").strip() == str(20001 * 512)
    data = os.urandom(60000 * 512)
    subprocess.run(["dd", f"of={device}2", "bs=512K", "oflag=direct", "iflag=fullblock", "status=none"], input=data,
                   check=True)
    assert image.read_bytes()[40007 * 512:100007 * 512] == data
    command("blkdiscard", "-f", "-o", "0", "-l", "4096", device)
    until(lambda: not os.path.exists(f"{device}1"), "the partitions go with their table")
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_a_server_that_never_answers_lets_the_device_go(program: Start, lists: list[str]) -> None:
    """SIGTERM of a client whose server was stopped ends in bounded time, with writes outstanding."""
    server = program("blk", *lists, "--device", "ram:16M")
    client = program("blk", "--client", *lists)
    (device,) = disks(client)
    server.process.send_signal(signal.SIGSTOP)
    try:
        writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={device}", "bs=64K", "count=4", "oflag=direct"],
                                  stderr=subprocess.DEVNULL)
        number = os.minor(os.stat(device).st_rdev)
        until(lambda: any(map(int, Path(f"/sys/block/loop{number}/inflight").read_text().split())), "a write is under way")
        assert client.end()[0] == 0
        assert writer.wait(20) != 0
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert server.end()[0] == 0


def test_a_loop_device_whose_discards_were_switched_off(program: Start, image: Path, lists: list[str]) -> None:
    """The kernel keeps that, whatever the file, and lets nobody undo it: the device is made anew. An inline client has no
    discards: nothing is lost where one is asked for."""
    loops = []
    for _ in range(2):
        found = command("losetup", "--find", "--show", image).strip()
        loops.append(found)
        Path(f"/sys/block/{Path(found).name}/queue/discard_max_bytes").write_text("0")
    for each in loops:
        command("losetup", "--detach", each)
    server = program("blk", *lists, "--device", str(image))
    client = program("blk", "--client", *lists)
    command("blkdiscard", disks(client)[0])
    assert client.end() == (0, "")
    inline = ["--req", unique("req"), "--resp", unique("resp")]
    other = program("blk", *inline, "--device", "ram:8M")
    client = program("blk", "--client", *inline)
    (device,) = disks(client)
    data = os.urandom(MIB)
    Path(device).write_bytes(data)
    command("blkdiscard", device, status=None)      # to the kernel a hint that nobody takes is no error
    with open(device, "rb") as file:
        assert file.read(MIB) == data
    command("mkfs.ext4", "-q", device)
    assert client.end() == (0, "")
    assert other.end() == server.end() == (0, "")
