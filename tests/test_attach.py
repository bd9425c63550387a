"""The FUSE + loop front end on a disk in plain memory: what a user, a mount and a kill see.

Each test leaves no loop device, mount, node or process behind: the `place` fixture checks it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import no_ring

from muenfast.attach import fuse, loop, watchdog
from muenfast.errors import UsageError

REASON = fuse.available()
needs_fuse = [pytest.mark.root, pytest.mark.fuse,
              pytest.mark.skipif(REASON is not None, reason=str(REASON))]
MIB = 1 << 20
BLKGETSIZE64, BLKSSZGET, BLKROGET = 0x80081272, 0x1268, 0x125E    # uapi/linux/fs.h

CLIENT = """
import json, os, sys, threading, time, mmap
from muenfast._target import Memory
from muenfast.attach.fuse import FuseAttachment
attachment = FuseAttachment.attach(Memory(4096), sys.argv[1], sys.argv[2], threads=2)
def hammer():
    fd, page = os.open(attachment.device, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
    while True:
        os.preadv(fd, [page], 0)
for _ in range(int(sys.argv[3])):
    threading.Thread(target=hammer, daemon=True).start()
print(json.dumps(attachment.info()), flush=True)
time.sleep(600)
"""


class Place(NamedTuple):
    name: str
    runtime_dir: Path

    @property
    def device(self) -> str:
        return f"/dev/{self.name}"


def tool(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*words: object) -> str:
    result = subprocess.run([tool(str(words[0])), *map(str, words[1:])], capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


def eventually(condition, seconds: float = 2.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def ours(directory: Path) -> list[str]:
    """What of an attachment below *directory* is still there."""
    found = [f"loop{number}" for number in watchdog.loops_below(str(directory))]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(directory) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in command:
            found.append(f"process {process.name}: {command!r}")
    mounts = directory / "mnt"
    return found + (os.listdir(mounts) if mounts.is_dir() else [])


@pytest.fixture
def place(tmp_path):
    name = next(name for name in loop.device_names() if not os.path.exists(f"/dev/{name}"))
    place = Place(name, tmp_path / "run")
    yield place
    assert eventually(lambda: not ours(place.runtime_dir)), ours(place.runtime_dir)
    assert not os.path.exists(place.device)


@pytest.fixture(params=["ring", "pump", "plain"])
def attach(place, request):
    """attach(nblocks, **options) on `place`; detached at the end, which then has nothing to report."""
    blk = pytest.importorskip("muenfast._target")
    made = []
    if request.param == "ring" and (reason := no_ring()):
        pytest.skip(reason)

    def make(nblocks=16384, **options):
        made.append(fuse.FuseAttachment.attach(blk.Memory(nblocks), place.name, place.runtime_dir,
                                               plain=request.param == "plain",
                                               uring="auto" if request.param == "ring" else "off", **options))
        assert made[-1].disk.ring == (request.param == "ring")
        return made[-1]
    yield make
    for attachment in made:
        assert attachment.detach() == []


def ioctl_int(device: str, request: int, form: str) -> int:
    fd = os.open(device, os.O_RDONLY)
    try:
        return struct.unpack(form, fcntl.ioctl(fd, request, bytes(struct.calcsize(form))))[0]
    finally:
        os.close(fd)


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for init to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def start_client(place: Place, hammers: int = 0) -> tuple[subprocess.Popen[str], dict]:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, place.name, str(place.runtime_dir), str(hammers)],
                              stdout=subprocess.PIPE, text=True)
    return client, json.loads(client.stdout.readline())


def end_client(client: subprocess.Popen[str]) -> None:
    client.kill()
    client.wait(5)
    client.stdout.close()


def test_names():
    assert list(itertools.islice(loop.device_names(), 2)) == ["muendiska", "muendiskb"]
    assert [loop.name_of(i) for i in (25, 26, 27, 51, 52, 701, 702)] == [
        "muendisk" + x for x in ("z", "aa", "ab", "az", "ba", "zz", "aaa")]
    with pytest.raises(ValueError):
        loop.name_of(-1)


def test_loop_config_size():
    assert loop.LOOP_CONFIG.size == 304     # sizeof(struct loop_config), uapi/linux/loop.h


def test_refused_where_not_available(monkeypatch, tmp_path):
    monkeypatch.setattr(fuse, "available", lambda: "no /dev/fuse here: modprobe fuse")
    with pytest.raises(UsageError, match="modprobe fuse"):
        fuse.FuseAttachment.attach(None, "muendiska", tmp_path)


@pytest.mark.parametrize("change", [{"mountpoint": "/"}, {"name": "../x"}, {"mountpoint": "run/muendiska-1"}])
def test_reclaim_refuses_foreign_records(change):
    info = {"pid": 1, "name": "muendiska", "mountpoint": "/run/muenfast/mnt/muendiska-1", **change}
    with pytest.raises(ValueError):
        fuse.reclaim(info)


class TestDevice:
    pytestmark = needs_fuse

    def test_appears_with_its_geometry(self, attach, place):
        attachment = attach(1000)
        status = os.stat(place.device)
        assert stat.S_ISBLK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
        assert ioctl_int(place.device, BLKGETSIZE64, "Q") == 1000 * 4096
        assert ioctl_int(place.device, BLKSSZGET, "I") == 4096
        assert ioctl_int(place.device, BLKROGET, "I") == 0
        assert json.loads(json.dumps(attachment.info()))["device"] == place.device
        assert not attachment.failed
        assert attachment.detach() == [] and attachment.detach() == []

    def test_file_is_aligned_and_bounded(self, attach):
        disk = f"{attach(8).mountpoint}/disk"
        fd = os.open(disk, os.O_RDWR)
        try:
            assert os.pwrite(fd, b"x" * 8192, 6 * 4096) == 8192
            assert os.pread(fd, 16384, 6 * 4096) == b"x" * 8192     # short at the end
            assert os.pread(fd, 4096, 8 * 4096) == b""
            for offset, data in ((1, b"x" * 4096), (0, b"x" * 100), (8 * 4096, b"x" * 4096), (7 * 4096, b"x" * 8192)):
                with pytest.raises(OSError):
                    os.pwrite(fd, data, offset)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            with pytest.raises(OSError):
                os.posix_fallocate(fd, 0, 65536)
        finally:
            os.close(fd)

    def test_read_only(self, attach, place):
        attachment = attach(64, read_only=True)
        assert ioctl_int(place.device, BLKROGET, "I") == 1
        with pytest.raises(OSError):
            os.open(f"{attachment.mountpoint}/disk", os.O_RDWR)
        fd = os.open(place.device, os.O_RDWR)       # root may open, not write
        try:
            with pytest.raises(OSError):
                os.pwrite(fd, b"x" * 4096, 0)
            assert os.pread(fd, 4096, 0) == bytes(4096)
        finally:
            os.close(fd)
        assert attachment.disk.counters["writes"] == 0

    def test_scattered_unaligned_memory(self, attach, place):
        """O_DIRECT from fragments of 512 bytes: no request may be cut inside a block on its way."""
        attach(1024)
        memory = mmap.mmap(-1, 2 * MIB)
        memory[:] = random.Random(1).randbytes(2 * MIB)
        view = memoryview(memory)
        odd = [view[i * 4096 + 512:i * 4096 + 1024] for i in range(256)]        # 128 KiB in 256 pages
        shifted = [view[512:MIB + 512]]
        try:
            fd = os.open(place.device, os.O_RDWR | os.O_DIRECT)
            for pieces in (odd, shifted):
                size = sum(map(len, pieces))
                assert os.pwritev(fd, pieces, 4096) == size
                page = mmap.mmap(-1, size)
                assert os.preadv(fd, [page], 4096) == size
                assert page[:] == b"".join(pieces)
                page.close()
            os.close(fd)
        finally:
            for piece in odd + shifted:
                piece.release()
            view.release()
            memory.close()

    def test_fsync_is_one_sync(self, attach, place):
        attachment = attach()
        fd = os.open(place.device, os.O_RDWR)
        os.pwrite(fd, b"y" * 4096, 0)
        before = attachment.disk.counters
        os.fsync(fd)
        after = attachment.disk.counters
        os.close(fd)
        assert after["syncs"] > before["syncs"] and after["writes"] > before["writes"]

    def test_depth_of_one(self, attach, place):
        """With a single request object everything still goes through, one after the other."""
        attach(2048, depth=1, threads=2)
        data = random.Random(2).randbytes(4 * MIB)
        with open(place.device, "wb") as device:
            device.write(data)
            os.fsync(device.fileno())
        run("blockdev", "--flushbufs", place.device)
        assert Path(place.device).read_bytes()[:len(data)] == data

    def test_fio_verify(self, attach, place, tmp_path):
        attach(threads=2)
        run("fio", "--name=v", f"--filename={place.device}", "--rw=randrw", "--verify=crc32c", "--direct=1",
            "--ioengine=libaio", "--iodepth=16", "--bsrange=4k-256k", "--size=64M", "--runtime=5", "--time_based",
            "--verify_fatal=1", f"--aux-path={tmp_path}", "--allow_mounted_write=0")

    def test_file_system(self, attach, place, tmp_path):
        attach(16384, threads=2)
        run("mkfs.ext4", "-q", place.device)
        target, chance, sums = tmp_path / "fs", random.Random(3), {}
        target.mkdir()
        run("mount", place.device, target)
        try:
            for number in range(40):
                data = chance.randbytes(chance.randrange(1, 500_000))
                (target / str(number)).write_bytes(data)
                sums[str(number)] = hashlib.sha256(data).hexdigest()
        finally:
            run("umount", target)
        run("fsck.ext4", "-fn", place.device)
        run("mount", place.device, target)
        try:
            assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                    for p in target.iterdir() if p.is_file()} == sums
        finally:
            run("umount", target)


class TestEnd:
    pytestmark = needs_fuse

    def test_a_flush_before_any_write_waits_for_no_server_while_attaching(self, tmp_path):
        """LOOP_CONFIGURE flushes while it holds locks of the whole machine: it must not hang on a dead server."""
        blk = pytest.importorskip("muenfast.blk")
        names = [f"{tmp_path.name}-{os.getpid()}-{end}" for end in ("req", "resp")]
        with blk.BlockServer(blk.exports_from_lists(*names, device="ram:64K")) as server:
            device = blk.BlockDevice(*names)
            device.client.background = True
            server.close()
        disk = fuse.FuseDisk(device.target, str(tmp_path))
        receiver = threading.Thread(target=disk.run)
        receiver.start()
        try:
            fd = os.open(tmp_path / "disk", os.O_RDWR)
            flushed = []

            def flush():
                try:
                    flushed.append(os.fsync(fd))
                except OSError as error:
                    flushed.append(error.errno)

            disk.attaching = True
            for _ in range(2):      # the second one waits for the server that is not there
                flusher = threading.Thread(target=flush, daemon=True)
                flusher.start()
                flusher.join(1.0)
                disk.attaching = False
            assert flushed == [None]
            device.fail("the end of the test")
            flusher.join(5.0)
            assert flushed == [None, errno.EIO]
            os.close(fd)
        finally:
            disk.unmount()
            disk.exit()
            receiver.join()
            device.close()
            disk.close()

    def test_detach_while_mounted(self, attach, place, tmp_path):
        attachment = attach()
        run("mkfs.ext4", "-q", place.device)
        target = tmp_path / "fs"
        target.mkdir()
        run("mount", place.device, target)
        try:
            (target / "file").write_bytes(b"z" * MIB)
            start = time.monotonic()
            left = attachment.detach(timeout=2.0)
            assert time.monotonic() - start < 4
            assert any(str(target) in sentence for sentence in left), left
            assert not os.path.exists(place.device)
            assert loop.is_bound(attachment.loop)
        finally:
            run("umount", target)
        assert loop.wait_free(attachment.loop, 2)

    def test_detach_with_the_device_open(self, attach, place):
        attachment = attach()
        fd = os.open(place.device, os.O_RDONLY)
        left = attachment.detach(timeout=1.0)
        os.close(fd)
        assert any(f"process {os.getpid()} " in sentence for sentence in left), left
        assert loop.wait_free(attachment.loop, 2)

    def test_aborted_by_somebody(self, attach, place):
        attachment = attach()
        attachment.disk.abort()
        assert eventually(lambda: attachment.failed)
        assert eventually(lambda: not os.path.exists(place.device))     # the watchdog acts
        assert eventually(lambda: ended(attachment.info()["watchdog"]))
        assert len(attachment.detach()) == 1        # says so
        with pytest.raises(ValueError, match="closed"):
            attachment.disk.run()

    @pytest.mark.parametrize("hammers", [0, 8], ids=["idle", "own threads wait for the device"])
    def test_kill(self, place, hammers):
        client, info = start_client(place, hammers)
        try:
            assert os.path.exists(place.device)
            time.sleep(0.2)
            client.send_signal(signal.SIGKILL)
            client.wait(2)
            assert eventually(lambda: not ours(place.runtime_dir) and not os.path.exists(place.device))
            assert eventually(lambda: ended(info["watchdog"]))
        finally:
            end_client(client)

    def test_kill_while_mounted(self, place, tmp_path):
        client, info = start_client(place)
        target = tmp_path / "fs"
        target.mkdir()
        try:
            run("mkfs.ext4", "-q", place.device)
            run("mount", place.device, target)
            try:
                end_client(client)
                assert eventually(lambda: not os.path.exists(place.device))
                with pytest.raises(OSError):
                    with open(target / "file", "wb") as file:
                        file.write(b"z" * MIB)
                        os.fsync(file.fileno())
            finally:
                run("umount", target)
            assert loop.wait_free(info["loop"], 2)
        finally:
            end_client(client)

    def test_reclaim_without_watchdog(self, place):
        client, info = start_client(place)
        os.kill(info["watchdog"], signal.SIGKILL)
        end_client(client)
        assert os.path.exists(place.device) and ours(place.runtime_dir)
        assert fuse.reclaim(info) == []
        assert not os.path.exists(place.device)
        assert fuse.reclaim(info) == []

    def test_reclaim_by_name(self, place):
        client, info = start_client(place)
        os.kill(info["watchdog"], signal.SIGKILL)
        end_client(client)
        assert fuse.reclaim_name(place.runtime_dir, place.name + "x") == [] and os.path.exists(place.device)
        assert fuse.reclaim_name(place.runtime_dir, place.name) == []
        assert not os.path.exists(place.device)

    def test_watchdog_ignores_the_terminals_signals(self, attach):
        attachment = attach()
        dog = attachment.info()["watchdog"]
        def ignored():      # SIGPIPE is, by Python itself, before any of these
            (mask,) = re.findall(r"SigIgn:\t(\w+)", Path(f"/proc/{dog}/status").read_text())
            return all(int(mask, 16) >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM))
        assert eventually(ignored)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(dog, number)
        time.sleep(0.1)
        assert os.getsid(dog) == dog and os.path.exists(f"/proc/{dog}")
        assert not any("/dev/fuse" in os.readlink(f) or "/dev/loop" in os.readlink(f)
                       for f in Path(f"/proc/{dog}/fd").iterdir())

    def test_set_up_is_all_or_nothing(self, place, monkeypatch):
        blk = pytest.importorskip("muenfast._target")

        def refuse(*arguments):
            raise OSError(28, "no room", place.device)
        monkeypatch.setattr(loop, "make_node", refuse)
        with pytest.raises(OSError, match="no room"):
            fuse.FuseAttachment.attach(blk.Memory(64), place.name, place.runtime_dir)
        assert not ours(place.runtime_dir)

    def test_foreign_node_stays(self, place):
        blk = pytest.importorskip("muenfast._target")
        Path(place.device).touch()
        try:
            with pytest.raises(FileExistsError):
                fuse.FuseAttachment.attach(blk.Memory(64), place.name, place.runtime_dir)
            assert os.path.exists(place.device) and not ours(place.runtime_dir)
        finally:
            os.unlink(place.device)
