"""FUSE over io_uring: when the kernel is asked to offer it, and what a front end does with it only.

What both ways have in common is in test_attach.py and test_pump.py.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Program, unique
from helpers import no_ring

from muenfast.attach import fuse, fuseuring
from muenfast.errors import UsageError

BLOCK, MIB = 4096, 1 << 20

root = [pytest.mark.root, pytest.mark.fuse,
        pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]


@pytest.fixture
def parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the kernel's; off."""
    path = tmp_path / "enable_uring"
    path.write_text("N\n")
    monkeypatch.setattr(fuseuring, "PARAMETER", str(path))
    monkeypatch.setattr(fuseuring, "TRIED", (0, 0))
    return path


class TestParameter:
    def test_is_on_meanwhile(self, parameter: Path, tmp_path: Path) -> None:
        with fuseuring.offered(tmp_path) as wanted:
            assert wanted
            assert parameter.read_text().strip() == "Y"
        assert parameter.read_text().strip() == "N"
        assert os.listdir(tmp_path) == ["enable_uring"]

    def test_is_put_back_after_a_failure(self, parameter: Path, tmp_path: Path) -> None:
        with pytest.raises(KeyError), fuseuring.offered(tmp_path):
            raise KeyError
        assert parameter.read_text().strip() == "N"
        assert os.listdir(tmp_path) == ["enable_uring"]

    def test_stays_on_where_the_administrator_has_it_on(self, parameter: Path, tmp_path: Path) -> None:
        parameter.write_text("Y\n")
        with fuseuring.offered(tmp_path):
            assert parameter.read_text() == "Y\n"
        assert parameter.read_text() == "Y\n"

    @pytest.mark.parametrize(("when", "wanted"), [("kernel", True), ("off", False)])
    def test_is_left_alone_on_request(self, parameter: Path, tmp_path: Path, when: str, wanted: bool) -> None:
        parameter.chmod(0o400)
        with fuseuring.offered(tmp_path, when) as answer:
            assert answer == wanted
            assert parameter.read_text() == "N\n"

    def test_is_left_alone_in_kernels_that_nobody_tried(self, parameter: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fuseuring, "TRIED", (999, 0))
        with fuseuring.offered(tmp_path) as wanted:
            assert wanted
            assert parameter.read_text() == "N\n"

    @pytest.mark.parametrize(("release", "tried"), [("6.17.9-generic", False), ("6.18.0", True), ("6.18-rc1", True),
                                                    ("7.0", True), ("5.99", False), ("odd", False)])
    def test_kernels(self, monkeypatch: pytest.MonkeyPatch, release: str, tried: bool) -> None:
        monkeypatch.setattr("platform.release", lambda: release)
        assert fuseuring.tried() == tried

    def test_one_that_is_missing_is_no_error(self, parameter: Path, tmp_path: Path) -> None:
        parameter.unlink()
        with fuseuring.offered(tmp_path) as wanted:
            assert wanted
        assert os.listdir(tmp_path) == []

    def test_one_that_we_may_not_write_is_said_to_stay_as_it_is(self, parameter: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                caplog: pytest.LogCaptureFixture) -> None:
        """As in a container, where /sys is read-only: nothing stays on that was never on."""
        def refuse(fd: int, data: bytes, offset: int) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(parameter))

        monkeypatch.setattr(os, "pwrite", refuse)
        with fuseuring.offered(tmp_path) as wanted:
            assert wanted
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
        assert os.listdir(tmp_path) == ["enable_uring"]

    def test_a_record_that_somebody_removed(self, parameter: Path, tmp_path: Path) -> None:
        with fuseuring.offered(tmp_path):
            (tmp_path / "fuse-uring").unlink()
        assert parameter.read_text().strip() == "N"

    def test_is_put_back_by_the_next_after_a_kill(self, parameter: Path, tmp_path: Path) -> None:
        code = ("import sys, time\nfrom muenfast.attach import fuseuring\n"
                "fuseuring.PARAMETER, fuseuring.TRIED = sys.argv[1], (0, 0)\n"
                "with fuseuring.offered(sys.argv[2]):\n    print('in', flush=True)\n    time.sleep(60)\n")
        process = subprocess.Popen([sys.executable, "-c", code, str(parameter), str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert parameter.read_text().strip() == "Y"
        with fuseuring.offered(tmp_path):
            assert parameter.read_text().strip() == "Y"
        assert parameter.read_text().strip() == "N"
        assert os.listdir(tmp_path) == ["enable_uring"]

    def test_two_at_once(self, parameter: Path, tmp_path: Path) -> None:
        """Whatever their directories, the second waits, and so takes nobody's Y for the administrator's."""
        seen: list[str] = []
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()

        def other() -> None:
            with fuseuring.offered(elsewhere):
                seen.append(parameter.read_text().strip())

        thread = threading.Thread(target=other)
        with fuseuring.offered(tmp_path):
            thread.start()
            thread.join(0.2)
            assert seen == []
        thread.join(10)
        assert seen == ["Y"]
        assert parameter.read_text().strip() == "N"
        assert os.listdir(elsewhere) == []
        assert sorted(os.listdir(tmp_path)) == ["elsewhere", "enable_uring"]

    def test_one_who_keeps_it_is_not_waited_for_without_end(self, parameter: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that was stopped in there, say: its client goes on without."""
        monkeypatch.setattr(fuseuring, "PATIENCE", 0.05)
        with open(parameter, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with fuseuring.offered(tmp_path) as wanted:
                assert wanted
                assert parameter.read_text() == "N\n"
        assert os.listdir(tmp_path) == ["enable_uring"]

    def test_a_word_that_is_none(self) -> None:
        with pytest.raises(UsageError, match="auto, kernel, off"):
            fuseuring.check("on")


Attach = Callable[..., fuse.FuseAttachment]


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Attach]:
    """attach(nblocks, **options): a device of plain memory whose requests come this way."""
    from muenfast._target import Memory

    made: list[fuse.FuseAttachment] = []
    if reason := no_ring():
        pytest.skip(reason)

    def make(nblocks: int = 2048, **options: int) -> fuse.FuseAttachment:
        made.append(fuse.FuseAttachment.attach(Memory(nblocks), unique("dev"), tmp_path / "run", **options))
        assert made[-1].disk.ring
        return made[-1]

    yield make
    for attachment in made:
        assert attachment.detach() == []


class TestFrontEnd:
    pytestmark = root

    def test_the_kernels_parameter_stays_as_it_was(self, attach: Attach) -> None:
        before = Path(fuseuring.PARAMETER).read_text()
        attach()
        assert Path(fuseuring.PARAMETER).read_text() == before

    def test_more_at_once_than_the_target_takes(self, attach: Attach) -> None:
        """The kernel bounds what comes from the loop device, not what comes from those who read the file themselves."""
        attachment = attach(depth=2)
        problems: list[str] = []
        with open(attachment.device, "r+b", buffering=0) as device:
            for number in range(64):
                device.write(bytes([number]) * BLOCK)
            os.fsync(device.fileno())

        def read() -> None:
            fd = os.open(f"{attachment.mountpoint}/disk", os.O_RDONLY)
            try:
                for number in 4 * list(range(64)):
                    if os.pread(fd, BLOCK, number * BLOCK) != bytes([number]) * BLOCK:
                        problems.append(str(number))
            except OSError as error:
                problems.append(repr(error))
            finally:
                os.close(fd)

        threads = [threading.Thread(target=read) for _ in range(16)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, attachment.disk.in_flight)
        for thread in threads:
            thread.join()
        assert problems == []
        assert most <= 2
        assert attachment.disk.in_flight == 0

    def test_each_queue_has_its_own_entries(self, attach: Attach) -> None:
        """Requests of every CPU, more of each than entries of one, small and large, read back."""
        attachment = attach(depth=4)
        cpus = sorted(os.sched_getaffinity(0))
        problems: list[str] = []

        def work(cpu: int, place: int) -> None:
            os.sched_setaffinity(0, {cpu})
            fd = os.open(attachment.device, os.O_RDWR | os.O_DIRECT)
            try:
                with mmap.mmap(-1, 32 * BLOCK) as pages:
                    for turn in range(50):
                        size = (1, 32)[turn % 2] * BLOCK
                        data = bytes([place + 1, turn]) * (size // 2)
                        pages[:size] = data
                        with memoryview(pages)[:size] as part:
                            assert os.pwritev(fd, [part], place * MIB // 2) == size
                            pages[:size] = bytes(size)
                            assert os.preadv(fd, [part], place * MIB // 2) == size
                        if pages[:size] != data:
                            problems.append(f"{place} {turn}")
            except (OSError, AssertionError) as error:
                problems.append(repr(error))
            finally:
                os.close(fd)

        threads = [threading.Thread(target=work, args=(cpus[place % len(cpus)], place)) for place in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []

    def test_refusals_are_answers(self, attach: Attach) -> None:
        """What is no I/O for the target: past the end, not whole blocks; what libfuse answers; the device goes on."""
        attachment = attach()
        fd = os.open(f"{attachment.mountpoint}/disk", os.O_RDWR)
        try:
            assert os.pread(fd, BLOCK, 2048 * BLOCK) == b""
            with pytest.raises(OSError, match="Invalid argument"):
                os.pread(fd, 100, 0)
            with pytest.raises(OSError, match="Invalid argument"):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(OSError, match="Input/output error"):
                os.pwrite(fd, bytes(BLOCK), 2048 * BLOCK)
            with pytest.raises(OSError, match="not permitted"):
                os.ftruncate(fd, 0)
            assert os.listdir(attachment.mountpoint) == ["disk"]
            assert os.statvfs(attachment.mountpoint).f_blocks == 2048
            with pytest.raises(FileNotFoundError):
                os.stat(f"{attachment.mountpoint}/{'x' * 200}")
            assert os.pwrite(fd, b"y" * BLOCK, 0) == BLOCK
            os.fsync(fd)
            assert os.pread(fd, BLOCK, 0) == b"y" * BLOCK
        finally:
            os.close(fd)

    @pytest.mark.parametrize("size", [256 * BLOCK, 192 * BLOCK])
    def test_large_requests(self, attach: Attach, size: int) -> None:
        """As large as the kernel makes them, where the target takes them."""
        attachment = attach(max_io=256 * BLOCK)
        data = os.urandom(size)
        fd = os.open(f"{attachment.mountpoint}/disk", os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, size) as pages:
                pages[:] = data
                assert os.pwritev(fd, [pages], 64 * BLOCK) == size
                pages[:] = bytes(size)
                assert os.preadv(fd, [pages], 64 * BLOCK) == size
                assert pages[:] == data
        finally:
            os.close(fd)

    def test_an_interrupted_reader_is_no_trouble(self, program: Callable[..., Program]) -> None:
        """Readers of a server that stands still are killed; what they had asked for is answered into the void, and the
        device goes on."""
        req, resp = unique("req"), unique("resp")
        server = program("blk", "--req", req, "--resp", resp, "--device", "ram:8M")
        client = program("blk", "--client", "--req", req, "--resp", resp)
        device = next(word for word in client.lines[0].split() if word.startswith("/dev/"))
        os.kill(server.pid, signal.SIGSTOP)
        try:
            readers = [subprocess.Popen(["dd", f"if={device}", "of=/dev/null", f"bs={BLOCK}", "count=1", "iflag=direct",
                                         f"skip={place}"], stderr=subprocess.DEVNULL) for place in range(8)]
            time.sleep(0.3)
            assert all(reader.poll() is None for reader in readers)
            for reader in readers:
                reader.kill()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        for reader in readers:
            assert reader.wait(10) == -signal.SIGKILL
        assert subprocess.run(["dd", f"if={device}", "of=/dev/null", "bs=1M", "iflag=direct"], capture_output=True,
                              timeout=20, check=False).returncode == 0
        assert client.end()[0] == 0
        assert server.end()[0] == 0

    def test_a_kill_with_readers_of_its_own(self, tmp_path: Path) -> None:
        """Threads of the client wait for its own device, as for its partition table and its last flush; requests come on
        while it dies. (Where this fails, the process cannot be ended any more.)"""
        if reason := no_ring():
            pytest.skip(reason)
        code = ("import mmap, os, sys, threading\nfrom muenfast._target import Memory\nfrom muenfast.attach import fuse\n"
                "attachment = fuse.FuseAttachment.attach(Memory(64), sys.argv[1], sys.argv[2])\n"
                "assert attachment.disk.ring\n"
                "turns = [0] * 8\n"
                "def read(place):\n"
                "    fd, page = os.open(attachment.device, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)\n"
                "    while True:\n        os.preadv(fd, [page], place * 4096)\n        turns[place] += 1\n"
                "        if place == 0 and turns[0] == 500:\n            print('in', flush=True)\n"
                "for place in range(8):\n    threading.Thread(target=read, args=(place,)).start()\n")
        for _ in range(4):
            name = unique("dev")
            process = subprocess.Popen([sys.executable, "-c", code, name, str(tmp_path / "run")], stdout=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stdout.readline() == b"in\n"
            process.kill()
            assert process.wait(20) == -signal.SIGKILL
            process.stdout.close()
            assert fuse.reclaim_name(tmp_path / "run", name) == []

    def test_close_waits_for_the_pump(self, tmp_path: Path) -> None:
        """close() frees what the thread inside run() works with; where it was still closing its ring, that stayed open."""
        if reason := no_ring():
            pytest.skip(reason)
        code = ("import os, sys, threading\nfrom muenfast._target import Memory\nfrom muenfast.attach import fuseuring\n"
                "from muenfast.attach._fuse import FuseDisk\n"
                "for _ in range(600):\n"
                "    with fuseuring.offered(sys.argv[1]) as ring:\n"
                "        disk = FuseDisk(Memory(64), sys.argv[1] + '/mnt', ring=ring)\n"
                "    assert disk.ring\n"
                "    thread = threading.Thread(target=disk.run)\n    thread.start()\n"
                "    os.close(os.open(sys.argv[1] + '/mnt/disk', os.O_RDONLY))\n"
                "    disk.unmount()\n    disk.exit()\n    disk.close()\n    thread.join()\n"
                "open_now = [os.readlink(entry) for entry in os.scandir('/proc/self/fd') if os.path.islink(entry)]\n"
                "print(sum('io_uring' in each for each in open_now))\n")
        (tmp_path / "mnt").mkdir()
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"MALLOC_PERTURB_": "170"},
                              capture_output=True, text=True, timeout=40, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
