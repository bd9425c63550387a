"""/dev/muendiska by FUSE and loop in Debian's kernel: file systems, and a client that is killed under one."""

from __future__ import annotations

import signal
from pathlib import Path

from inside import MIB, Start, attachments_gone, clean, command, digests_of, disk, fill, mounted, pair

__all__ = ["pair"]     # a fixture


def test_file_system(program: Start, pair: list[str], tmp_path: Path) -> None:
    """ext4 keeps files over unmounting and over another client; the image stands on its own afterwards."""
    image = tmp_path / "image"
    image.write_bytes(bytes(96 * MIB))
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    device = disk(client)
    assert device == "/dev/muendiska"
    assert command("blockdev", "--getsize64", "--getss", device).split() == [str(96 * MIB), "4096"]
    command("mkfs.ext4", "-q", device)
    with mounted(device, tmp_path / "mnt") as directory:
        digests = fill(directory, 1)
    with mounted(device, tmp_path / "mnt") as directory:
        assert digests_of(directory) == digests
        digests |= fill(directory, 2)
        command("fstrim", directory, status=0 if "--shm" in pair else None)
    assert client.end() == (0, "")
    attachments_gone(tmp_path)
    client = program("blk", "--client", *pair)
    clean(disk(client))
    with mounted(disk(client), tmp_path / "mnt") as directory:
        assert digests_of(directory) == digests
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    clean(str(image))


def test_killed_client(program: Start, pair: list[str], tmp_path: Path) -> None:
    """kill -9 of a client, idle and under a mounted file system: its node, mounts and loop device go by themselves,
    and what was synced is there for the next client."""
    server = program("blk", *pair, "--device", "ram:64M")
    client = program("blk", "--client", *pair)
    command("mkfs.ext4", "-q", disk(client))
    client.end(signal.SIGKILL)
    attachments_gone(tmp_path)

    client = program("blk", "--client", *pair)
    with mounted(disk(client), tmp_path / "mnt") as directory:
        digests = fill(directory, 3)
        client.end(signal.SIGKILL)
    attachments_gone(tmp_path)

    client = program("blk", "--client", *pair)
    with mounted(disk(client), tmp_path / "mnt") as directory:
        assert digests_of(directory) == digests
    clean(disk(client))
    assert client.end() == (0, "")
    assert server.end() == (0, "")
