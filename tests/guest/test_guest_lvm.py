"""LVM on dm-crypt on /dev/muendiska: data survives closing, another client, a killed server; a killed client lets go."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from inside import MIB, Start, attachments_gone, clean, copying, digests_of, disk, fill, mounted, pair, volume_on

__all__ = ["pair"]     # a fixture


def test_volume(program: Start, pair: list[str], tmp_path: Path) -> None:
    """Files on a volume are there after it was closed, and opened on another client's device; also those that were
    written while the server was killed and came back."""
    image = tmp_path / "image"
    image.write_bytes(bytes(128 * MIB))
    source = tmp_path / "source"
    source.write_bytes(random.Random(5).randbytes(4 * MIB))
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    with volume_on(disk(client), tmp_path) as volume:
        volume.make()
        with mounted(volume.path, tmp_path / "mnt") as directory:
            digests = fill(directory, 1)
        volume.close()
        assert client.end() == (0, "")
        attachments_gone(tmp_path)

        client = program("blk", "--client", *pair)
        assert disk(client) == volume.device
        volume.open()
        clean(volume.path)
        with mounted(volume.path, tmp_path / "mnt") as directory:
            assert digests_of(directory) == digests
            server.end(signal.SIGKILL)
            with copying(source, directory / "meanwhile"):
                server = program("blk", *pair, "--device", str(image))
            digests = digests_of(directory) | fill(directory, 2)
            assert (directory / "meanwhile").read_bytes() == source.read_bytes()
        with mounted(volume.path, tmp_path / "mnt") as directory:
            assert digests_of(directory) == digests
        clean(volume.path)
        volume.close()
    status, said = client.end()
    assert status == 0 and (not said or "the server is gone" in said)
    assert server.end() == (0, "")


def test_killed_client(program: Start, pair: list[str], tmp_path: Path) -> None:
    """kill -9 of the client below an active volume with a mounted file system: unmounting and removing the
    device-mapper devices ends, and then nothing is left; what was synced is there for the next client."""
    server = program("blk", *pair, "--device", "ram:96M")
    client = program("blk", "--client", *pair)
    with volume_on(disk(client), tmp_path) as volume:
        volume.make()
        with mounted(volume.path, tmp_path / "mnt") as directory:
            digests = fill(directory, 3)
            client.end(signal.SIGKILL)
        volume.remove()
        attachments_gone(tmp_path)

        client = program("blk", "--client", *pair)
        assert disk(client) == volume.device
        volume.open()
        with mounted(volume.path, tmp_path / "mnt") as directory:
            assert digests_of(directory) == digests
        clean(volume.path)
        volume.close()
    assert client.end() == (0, "")
    assert server.end() == (0, "")
