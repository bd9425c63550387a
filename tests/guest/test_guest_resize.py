"""`muenfast ctl resize` under a mounted ext4 in Debian's kernel: resize2fs takes the new size online;
and `ctl destroy`, which ends the client."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import run
from helpers import eventually
from inside import MIB, Start, attachments_gone, clean, command, digests_of, disk, fill, mounted, pair

__all__ = ["pair"]     # a fixture


@pytest.mark.parametrize("front", ["fuse", "nbd"])
def test_mounted_file_system_grows(program: Start, pair: list[str], tmp_path: Path, front: str) -> None:
    """Files of before and after, on a file's disk that became four times as large meanwhile; the image is clean."""
    if front == "nbd":
        command("modprobe", "nbd")
    image = tmp_path / "image"
    image.write_bytes(bytes(32 * MIB))
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", "--attach", front, *pair)
    device = disk(client)
    command("mkfs.ext4", "-q", "-b", "4096", device)
    with mounted(device, tmp_path / "mnt") as directory:
        digests = fill(directory, 1)
        done = run("ctl", "resize", pair[1], "128M", timeout=300)
        assert done.returncode == 0, done.stderr
        eventually(lambda: int(command("blockdev", "--getsize64", device)) == 128 * MIB, 60)
        command("resize2fs", device)
        space = os.statvfs(directory)
        assert space.f_blocks * space.f_frsize > 100 * MIB
        for seed in range(2, 6):
            digests |= fill(directory, seed)
        assert digests_of(directory) == digests
    clean(device)
    done = run("ctl", "destroy", pair[1], "--force", timeout=300)
    assert done.returncode == 0, done.stderr
    client.process.wait(300)
    assert client.end()[0] == 0
    attachments_gone(tmp_path)
    status, said = server.end()
    assert status == 0 and [line.rpartition(": ")[2] for line in said.splitlines()] == [
        f"new size {128 * MIB} bytes", f"{pair[1]} is destroyed, though it has its client, process {client.pid}, attached"]
    clean(str(image))
