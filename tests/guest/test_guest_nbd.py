"""/dev/nbd0, attached by nbd-client to the client's socket: a file system, LVM on dm-crypt, and a killed client."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Program
from helpers import eventually
from inside import MIB, Start, clean, command, copying, digests_of, fill, mounted, pair, volume_on

__all__ = ["pair"]      # a fixture
DEVICE = "/dev/nbd0"


@pytest.fixture(scope="module", autouse=True)
def driver() -> None:
    command("modprobe", "nbd", "nbds_max=2")


def connected() -> bool:
    return Path("/sys/block/nbd0/pid").exists()


@contextlib.contextmanager
def attached(client: Program) -> Iterator[str]:
    """DEVICE, connected to the client's socket; disconnected in any case."""
    [line] = client.lines
    command("nbd-client", "-unix", line.split()[5], DEVICE, "-block-size", "4096")
    try:
        eventually(lambda: connected() and int(command("blockdev", "--getsize64", DEVICE)) > 0)
        yield DEVICE
    finally:
        command("nbd-client", "-d", DEVICE)
        eventually(lambda: not connected())


@pytest.fixture
def words(pair: list[str], tmp_path: Path) -> tuple[list[str], list[str]]:
    """What server and client are called with."""
    return ["blk", *pair], ["blk", "--client", *pair, "--attach", "none", "--nbd", str(tmp_path / "socket")]


def test_volume(program: Start, words: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """Files on a volume are there after it was closed, and opened by another client, and the device's size is the
    disk's; no block device of the client's own appears."""
    serve, use = words
    image = tmp_path / "image"
    image.write_bytes(bytes(128 * MIB))
    source = tmp_path / "source"
    source.write_bytes(random.Random(5).randbytes(4 * MIB))
    server = program(*serve, "--device", str(image))
    client = program(*use)
    assert not list(Path("/dev").glob("muendisk*"))
    with attached(client) as device, volume_on(device, tmp_path) as volume:
        assert command("blockdev", "--getsize64", device).split() == [str(128 * MIB)]
        volume.make()
        with mounted(volume.path, tmp_path / "mnt") as directory:
            digests = fill(directory, 1)
        volume.close()
    assert client.end() == (0, "")
    assert not (tmp_path / "socket").exists()

    client = program(*use)
    with attached(client) as device, volume_on(device, tmp_path) as volume:
        volume.open()
        clean(volume.path)
        with mounted(volume.path, tmp_path / "mnt") as directory:
            assert digests_of(directory) == digests
            server.end(signal.SIGKILL)
            with copying(source, directory / "meanwhile"):
                server = program(*serve, "--device", str(image))
            digests = digests_of(directory) | fill(directory, 2)
            assert (directory / "meanwhile").read_bytes() == source.read_bytes()
        with mounted(volume.path, tmp_path / "mnt") as directory:
            assert digests_of(directory) == digests
        clean(volume.path)
        volume.close()
    status, said = client.end()
    assert status == 0 and (not said or "the server is gone" in said)
    assert server.end() == (0, "")


def test_killed_client(program: Start, words: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """kill -9 of the client under a mounted file system: the device is let go, the next client takes the socket's
    place, and what was synced is there."""
    serve, use = words
    server = program(*serve, "--device", "ram:64M")
    client = program(*use)
    with attached(client) as device:
        command("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt") as directory:
            digests = fill(directory, 3)
            client.end(signal.SIGKILL)
    client = program(*use)
    with attached(client) as device:
        with mounted(device, tmp_path / "mnt") as directory:
            assert digests_of(directory) == digests
        clean(device)
    assert client.end() == (0, "")
    assert server.end() == (0, "")
