"""Partitions of /dev/muendiska in a kernel that parses tables itself: they are the kernel's, with nodes of our names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Program, unique
from helpers import eventually
from inside import MIB, Start, attachments_gone, clean, command, digests_of, disk, fill, mounted

TABLES = {"gpt": "label: gpt\n,24M\n,16M\n", "dos": "label: dos\n,24M,83\n,16M,83\n"}


@pytest.fixture
def pair() -> list[str]:
    return ["--req", unique("req"), "--resp", unique("resp")]


def kernels(client: Program) -> dict[str, int]:
    """The partitions that the kernel has of the client's disk, by its own name: their sizes."""
    loop = f"loop{os.minor(os.stat(disk(client)).st_rdev)}"
    found = Path(f"/sys/block/{loop}").glob(f"{loop}p*")
    return {path.name: int((path / "size").read_text()) * 512 for path in found}


def nodes(client: Program) -> dict[str, str]:
    """The nodes of partitions beside the disk's; the kernel's own name of each."""
    found = {}
    for path in Path("/dev").glob(f"{Path(disk(client)).name}[0-9]*"):
        number = path.stat().st_rdev
        entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        found[path.name] = entry.resolve().name
    return found


@pytest.mark.parametrize("label", TABLES)
def test_partitions(program: Start, pair: list[str], tmp_path: Path, label: str) -> None:
    """A table that is written to the device: /dev/loopNp1 and /dev/muendiska1 appear, the same device; they are there
    for the next client before it is ready, with their files; they go with the client, and with the table."""
    server = program("blk", *pair, "--device", "ram:64M")
    client = program("blk", "--client", *pair)
    assert kernels(client) == nodes(client) == {}
    command("sfdisk", "--quiet", disk(client), given=TABLES[label])
    eventually(lambda: len(nodes(client)) == 2)
    loop = f"loop{os.minor(os.stat(disk(client)).st_rdev)}"
    assert nodes(client) == {"muendiska1": f"{loop}p1", "muendiska2": f"{loop}p2"}
    assert kernels(client) == {f"{loop}p1": 24 * MIB, f"{loop}p2": 16 * MIB}
    assert Path(f"/dev/{loop}p1").is_block_device()
    command("mkfs.ext4", "-q", "/dev/muendiska2")
    with mounted("/dev/muendiska2", tmp_path / "mnt") as directory:
        digests = fill(directory, 1)
    assert client.end() == (0, "")
    attachments_gone(tmp_path)

    client = program("blk", "--client", *pair)
    assert sorted(nodes(client)) == ["muendiska1", "muendiska2"]
    with mounted("/dev/muendiska2", tmp_path / "mnt") as directory:
        assert digests_of(directory) == digests
    clean("/dev/muendiska2")
    command("sfdisk", "--quiet", "--delete", disk(client), "2")
    eventually(lambda: sorted(nodes(client)) == ["muendiska1"] and len(kernels(client)) == 1)
    command("wipefs", "--quiet", "--all", disk(client))
    command("blockdev", "--rereadpt", disk(client))
    eventually(lambda: nodes(client) == {} and kernels(client) == {})
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_image(program: Start, pair: list[str], tmp_path: Path) -> None:
    """A disk image whose GPT was written to the file, in sectors of 512 bytes, which this kernel does not find on a
    disk of 4096: its partitions have nodes all the same, of the sizes that the table says."""
    image = tmp_path / "image"
    image.write_bytes(bytes(64 * MIB))
    command("sfdisk", "--quiet", str(image), given=TABLES["gpt"])
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    assert sorted(nodes(client)) == ["muendiska1", "muendiska2"]
    assert sorted(kernels(client).values()) == [16 * MIB, 24 * MIB]
    assert client.end() == (0, "")
    assert server.end() == (0, "")
