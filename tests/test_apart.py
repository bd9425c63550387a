"""A region or file is a disk, or a channel or buffer: never both at a time, and no data is overwritten by accident."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Program, run
from helpers import block

from muenfast import BlockDevice, BlockServer, ClaimError, UsageError, open_writer
from muenfast.blk import exports_from_lists

Start = Callable[..., Program]


def serve(req: str, resp: str, **lists: str) -> BlockServer:
    return BlockServer(exports_from_lists(req, resp, **lists))


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_a_disk_that_is_served_is_no_channel(names: Callable[[str], str], program: Start, tmp_path: Path,
                                              kind: str) -> None:
    """Of any kind, in another process or in this one; not a byte of it changes. Afterwards it may be."""
    disk = names("disk") if kind == "ram" else str(tmp_path / "disk")
    path = Path("/dev/shm", disk)
    if kind == "file":
        path.write_bytes(bytes(1 << 20))
    pair = [names("req"), names("resp")]
    server = program("blk", "--req", pair[0], "--resp", pair[1], "--device", f"ram:1M:{disk}" if kind == "ram" else disk)
    with BlockDevice(*pair) as device:
        for at in range(0, 1 << 20, 4096):
            device.pwrite(block(at), at)
        device.flush()
        before = path.read_bytes()
        other = names("other")
        for call in (lambda: serve(other, disk, device="ram:64K"), lambda: serve(disk, other, device="ram:64K"),
                     lambda: serve(other, names("more"), device="ram:64K", buffer=disk),
                     lambda: open_writer(disk, size=64, protocol=9), lambda: BlockDevice(other, disk, timeout=0)):
            with pytest.raises(ClaimError, match="already held by a server, as a disk"):
                call()
        assert path.read_bytes() == before
    assert server.end() == (0, "")
    if kind == "ram":
        assert run("chan", "rm", disk).returncode == 0


def test_a_channel_in_use_is_no_disk(names: Callable[[str], str]) -> None:
    name = names("channel")
    with open_writer(name, size=64, protocol=9, region_size=1 << 16) as writer:
        writer.write(b"one")
        for device in (f"ram:64K:{name}", f"/dev/shm/{name}"):
            with pytest.raises(ClaimError):
                serve(names("req"), names("resp"), device=device)
        writer.write(b"two")


@pytest.mark.parametrize("what", ["ext4", "table"])
def test_an_image_is_no_channel(names: Callable[[str], str], tmp_path: Path, what: str) -> None:
    """Nobody has it open: its contents tell."""
    image = tmp_path / "image"
    image.write_bytes(bytes(2 << 20))
    if what == "ext4":
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    else:
        subprocess.run(["sfdisk", "-q", image], input="label: dos\nsize=1MiB\n", text=True, check=True)
    before = image.read_bytes()
    done = run("blk", "--req", names("req"), "--resp", str(image))
    assert done.returncode == 2
    assert f"--resp, entry 0 '{image}'" in done.stderr and "would be overwritten" in done.stderr
    with pytest.raises(UsageError, match="would be overwritten"):
        open_writer(str(image), size=64, protocol=9)
    assert image.read_bytes() == before


def test_a_buffer_may_hold_a_file_system(names: Callable[[str], str], tmp_path: Path) -> None:
    """Blocks of the disk that went through it: a server that comes back takes it as it is."""
    image, buffer = tmp_path / "image", names("buffer")
    image.write_bytes(bytes(4 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    assert run("chan", "create", buffer, "--size", "1M").returncode == 0
    Path("/dev/shm", buffer).write_bytes(image.read_bytes()[:1 << 20])
    pair = [names("req"), names("resp")]
    for _ in range(2):
        serve(*pair, device=str(image), buffer=buffer).close()
    assert run("chan", "rm", buffer).returncode == 0


@pytest.mark.parametrize("what", ["ext4", "ext2", "gpt"])
def test_an_image_is_no_buffer(names: Callable[[str], str], tmp_path: Path, what: str) -> None:
    """One whose marks say that it has just that size."""
    image = tmp_path / "image"
    image.write_bytes(bytes(8 << 20))
    if what == "gpt":
        subprocess.run(["sfdisk", "-q", image], input="label: gpt\nsize=1MiB\n", text=True, check=True)
    else:
        subprocess.run([f"mkfs.{what}", "-q", "-F", image], check=True)
    before = image.read_bytes()
    for words in (["--device", "ram:64K"], ["--client", "--attach", "none"]):
        done = run("blk", "--req", names("req"), "--resp", names("resp"), "--shm", str(image), *words)
        assert done.returncode == 2
        assert f"--shm, entry 0 '{image}'" in done.stderr and "would be overwritten" in done.stderr
    assert image.read_bytes() == before
    with image.open("r+b") as file:      # a buffer through which a disk of that kind went
        file.truncate(4 << 20)
    serve(names("req"), names("resp"), device="ram:64K", buffer=str(image)).close()


@pytest.mark.root
def test_a_file_under_a_loop_device_is_no_region(names: Callable[[str], str], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4 << 20))
    loop = subprocess.run(["losetup", "-f", "--show", image], check=True, capture_output=True, text=True).stdout.strip()
    try:
        for words in (["--resp", str(image)], ["--resp", names("resp"), "--shm", str(image)]):
            done = run("blk", "--req", names("req"), *words, "--device", "ram:64K")
            assert done.returncode == 1
            assert loop in done.stderr and str(image) in done.stderr
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


class TestRemoving:
    """`chan rm PATH` removes channels, and what may become one."""

    @pytest.mark.parametrize("content", [b"text", bytes(1024) + b"\1", b"\xff" * 4096], ids=["text", "later", "random"])
    def test_what_is_no_channel_stays(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file"
        path.write_bytes(content)
        for words in ([], ["--force"]):
            done = run("chan", "rm", *words, str(path))
            assert (done.returncode, path.read_bytes()) == (2, content)
            assert str(path) in done.stderr and "no channel" in done.stderr

    def test_no_nodes_and_links(self, tmp_path: Path) -> None:
        fifo, link = tmp_path / "fifo", tmp_path / "link"
        os.mkfifo(fifo)
        link.symlink_to(fifo)
        for path in (fifo, link):
            assert run("chan", "rm", str(path)).returncode == 2
            assert os.path.lexists(path)

    def test_no_disk_that_is_served(self, names: Callable[[str], str], tmp_path: Path) -> None:
        image = tmp_path / "image"
        image.write_bytes(bytes(1 << 20))
        export = serve(names("req"), names("resp"), device=str(image))
        try:
            done = run("chan", "rm", "--force", str(image))
            assert (done.returncode, image.exists()) == (1, True)
            assert "a server, as a disk" in done.stderr
        finally:
            export.close()

    def test_channels_go(self, tmp_path: Path) -> None:
        used, new = tmp_path / "used", tmp_path / "new"
        for path in (used, new):
            path.write_bytes(bytes(1 << 16))
        with open_writer(str(used), size=64, protocol=9) as writer:
            writer.write(b"one")
        assert run("chan", "rm", str(used), str(new)).returncode == 0
        assert not used.exists() and not new.exists()


def test_a_time_limit_begins_with_the_loss(names: Callable[[str], str], program: Start) -> None:
    """timeout:2 gives the request that finds its server killed two seconds, not less; a server that is back in that time
    answers it."""
    disk, pair = names("disk"), [names("req"), names("resp")]
    words = ["blk", "--req", pair[0], "--resp", pair[1], "--device", f"ram:64K:{disk}"]
    server = program(*words)
    with BlockDevice(*pair, on_peer_loss="timeout:2") as device:
        device.pwrite(block(1), 0)
        os.kill(server.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(OSError):
            device.pread(4096, 0)
        assert time.monotonic() - start > 1.5
        server.end()
        server = program(*words)
        assert device.pread(4096, 0) == block(1)
    assert server.end() == (0, "")
    assert run("chan", "rm", disk).returncode == 0
