"""What a death leaves to others: the next start cleans up after everybody, and each state of a connection is said once."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import block, eventually
from test_device import clean, command, free_name, mounted, stuck, unmounted

from muenfast import BlockDevice, shm
from muenfast.attach import fuse, loop
from muenfast.blk import BlockClients, channels_from_lists

__all__ = ["unmounted"]     # a fixture

Start = Callable[..., Program]

MIB = 1 << 20
needs_fuse = pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")


@pytest.fixture(params=[False, True], ids=["inline", "shm"])
def lists(request: pytest.FixtureRequest) -> list[str]:
    return new_lists(request.param)


def new_lists(shared: bool = False) -> list[str]:
    return ["--req", unique("req"), "--resp", unique("resp"), *(["--shm", unique("shm")] if shared else [])]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(32 * MIB)
    return path


def blockdevice(lists: list[str], **options: Any) -> BlockDevice:
    return BlockDevice(lists[1], lists[3], shm=lists[5] if len(lists) > 4 else None, timeout=20, **options)


def regions(lists: list[str]) -> list[str]:
    """Those of a connection that are there, bells included."""
    return [name for name in os.listdir("/dev/shm") if name.removesuffix(".bell") in lists[1::2]]


def states(program: Program) -> list[str]:
    """As `muenfast stat` shows them."""
    answers = {answer["pid"]: answer for answer in json.loads(run("stat", "--json").stdout)}
    return [entry["state"] for entry in answers[program.pid]["entries"]]


def leftovers(runtime: Path) -> list[str]:
    """Of this test's, as `muenfast doctor` finds them."""
    left = [each["path"] for each in json.loads(run("doctor", "--json").stdout)["leftovers"]]
    return [path for path in left if str(runtime) in path or path.startswith("/dev/shm/mf")]


# ------------------------------------------------------------------ the next start


@needs_fuse
@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.parametrize("next_is", ["server", "client"])
def test_the_next_start_cleans_up_after_everybody(program: Start, runtime: Path, lists: list[str], next_is: str,
                                                  image: Path) -> None:
    """Server, client and watchdog are killed. Somebody else starts, on other names: when it is ready, or (a server) soon
    after, regions, records, sockets, mount, loop device and node of the dead are gone. What lives goes on: its device, its
    regions, its records; a named RAM disk, whose server is dead, keeps its data."""
    kept = unique("kept")
    server = program("blk", *lists, "--device", f"ram:1M:{kept}")
    client = program("blk", "--client", *lists, "--attach", "fuse", "--nbd", f"{runtime.parent}/sock")
    living = [new_lists(), new_lists()]
    server2 = program("blk", *living[0], "--device", str(image))
    client2 = program("blk", "--client", *living[0])
    device, device2 = (each.lines[0].split()[4] for each in (client, client2))
    with open(device, "r+b", buffering=0) as file:
        file.write(block(7))
        os.fsync(file)
    number = loop.loop_of(device)
    assert number is not None
    children = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split()
    for pid in [int(each) for each in children]:
        os.kill(pid, signal.SIGKILL)
    client.end(signal.SIGKILL)
    server.end(signal.SIGKILL)
    dead = {client.pid, server.pid}
    assert loop.is_bound(number) and len(regions(lists)) == len(lists) // 2 + 2     # two bells
    if next_is == "server":
        other = program("blk", *living[1], "--device", "ram:1M")
        eventually(lambda: not leftovers(runtime))
    else:
        other = program("blk", "--client", *living[1], ready=False)
        threading.Thread(target=other.wait_ready).start()
        server3 = program("blk", *living[1], "--device", "ram:1M")
        eventually(lambda: other.lines)
    assert regions(lists) == []
    place = f"{runtime}/mnt/{os.path.basename(device)}-{client.pid}/disk"
    eventually(lambda: loop.backing_file(number) != place)     # its number may be another one's by now
    assert not os.path.lexists(device) or loop.backing_file(loop.loop_of(device) or 0) != place
    books = [path for path in runtime.rglob("*") if not path.is_dir()]
    assert not [path for path in books for pid in dead if re.search(rf"\b{pid}\b", path.name)]
    assert not [path for path in runtime.rglob("mnt/*") if path.name.endswith(f"-{client.pid}")]
    assert not os.path.exists(f"{runtime.parent}/sock")
    assert leftovers(runtime) == []
    # The living notice nothing.
    with open(device2, "r+b", buffering=0) as file:
        file.write(block(8))
        os.fsync(file)
    assert states(client2) == ["ready"] and states(server2) == ["connected"]
    assert Path("/dev/shm", kept).read_bytes()[:4096] == block(7)
    for each in (client2, server2, other, *([server3] if next_is == "client" else [])):
        assert each.end() == (0, "")
    assert run("chan", "rm", kept).returncode == 0


def test_a_region_that_a_plain_peer_has_mapped_stays(program: Start) -> None:
    """It is in nobody's books: whoever returns on these names finds that peer."""
    lists, others = new_lists(), new_lists()
    program("blk", *lists, "--device", "ram:1M").end(signal.SIGKILL)
    with open(f"/dev/shm/{lists[1]}", "r+b") as file, mmap.mmap(file.fileno(), 0):
        inode = os.fstat(file.fileno()).st_ino
        assert program("blk", *others, "--device", "ram:1M").end() == (0, "")
        assert os.stat(f"/dev/shm/{lists[1]}").st_ino == inode
        assert lists[3] not in os.listdir("/dev/shm")
    assert program("blk", *others, "--device", "ram:1M").end() == (0, "")
    assert regions(lists) == []


@needs_fuse
@pytest.mark.root
@pytest.mark.fuse
def test_a_name_that_is_being_cleaned_is_waited_for(program: Start) -> None:
    """Who takes away a dead client's device holds its name for that long; the next client is to have that name all the
    same. One who holds it to use it is passed over."""
    lists = new_lists()
    server = program("blk", *lists, "--device", "ram:1M")
    name = free_name()
    claim = shm.claim(f"name-{name}", f"/dev/{name}", {"cleaning": True})
    timer = threading.Timer(0.5, claim.release)
    with BlockClients(channels_from_lists(lists[1], lists[3])) as clients:
        timer.start()
        assert clients.ready(lambda: True)
        assert clients.disks[0].path == f"/dev/{name}"
    timer.join()
    with shm.claim(f"name-{name}", f"/dev/{name}"), BlockClients(channels_from_lists(lists[1], lists[3])) as clients:
        assert clients.ready(lambda: True)
        assert clients.disks[0].path != f"/dev/{name}"
    assert server.end() == (0, "")


# ------------------------------------------------------------------ states


def test_states_of_a_server(program: Start, lists: list[str]) -> None:
    """waiting, connected, client died, connected, waiting: in stat, and each a line."""
    server = program("blk", *lists, "--device", "ram:1M", "-v")
    assert states(server) == ["waiting"]
    with subprocess.Popen([sys.executable, "-c", "import sys, time; from muenfast import BlockDevice; "
                           "d = BlockDevice(sys.argv[1], sys.argv[2], shm=sys.argv[3] or None); print(flush=True); "
                           "time.sleep(60)", lists[1], lists[3], lists[5] if len(lists) > 4 else ""],
                          stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline() == b"\n"
        assert states(server) == ["connected"]
        client.kill()
    eventually(lambda: states(server) == ["client died"])
    with blockdevice(lists) as device:
        device.pread(4096, 0)
        eventually(lambda: states(server) == ["connected"])
    eventually(lambda: states(server) == ["waiting"])
    status, errors = server.end()
    assert status == 0
    said = re.findall(r": (client \w+)$", errors, re.MULTILINE)
    assert [line for i, line in enumerate(said) if line != said[i - 1 if i else 0] or not i] == \
        ["client connected", "client died", "client connected", "client left"]


def test_a_plain_client_never_died(program: Start) -> None:
    """One that is in nobody's books cannot be seen to die; it is connected for as long as its epoch stands."""
    from peer import InlineClient

    lists = new_lists()
    server = program("blk", *lists, "--device", "ram:1M")
    client = InlineClient(lists[1], lists[3])
    client.connect()
    eventually(lambda: states(server) == ["connected"])
    time.sleep(0.5)
    assert states(server) == ["connected"]
    client.disconnect()
    eventually(lambda: states(server) == ["waiting"])
    client.close()
    assert server.end() == (0, "")


def state_of(device: BlockDevice) -> str:
    return str(device.status()["state"])


def test_states_of_a_client(program: Start, lists: list[str], image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """connecting, ready, lost (killed), ready, lost (ended), failed (another disk): each a line."""
    caplog.set_level("INFO", "muenfast")
    with BlockDevice(channels=channels_from_lists(lists[1], lists[3], buffer=lists[5] if len(lists) > 4 else None)[0],
                     timeout=0) as device:
        assert state_of(device) == "connecting"
        server = program("blk", *lists, "--device", str(image))
        eventually(lambda: state_of(device) == "ready")
        device.pwrite(block(1), 0)
        time.sleep(1.2)     # its claim has been seen; a line a second
        server.end(signal.SIGKILL)
        eventually(lambda: state_of(device) == "lost")
        server = program("blk", *lists, "--device", str(image))
        device.pread(4096, 0)
        eventually(lambda: state_of(device) == "ready")     # the engine answers before its thread has the interpreter
        time.sleep(1.2)
        server.end()
        eventually(lambda: state_of(device) == "lost")
        server = program("blk", *lists, "--device", "ram:32M")
        eventually(lambda: state_of(device) == "failed")
        with pytest.raises(OSError) as caught:
            device.pread(4096, 0)
        assert caught.value.errno == errno.EIO
    assert server.end() == (0, "")
    said = [record.getMessage().partition(": ")[2] for record in caplog.records if record.getMessage().startswith("disk ")]
    found = [re.match(r"connected|the server is gone|the server is back|the server returned", line) for line in said]
    assert [each[0] for each in found if each] == ["connected", "the server is gone", "the server is back",
                                                   "the server is gone", "the server returned"]


def test_a_stopped_server_is_stuck(program: Start, lists: list[str], image: Path,
                                   caplog: pytest.LogCaptureFixture) -> None:
    """It lives, so that only a timeout fails requests; said once, and once more when it is back. Killed, it is lost."""
    server = program("blk", *lists, "--device", str(image))
    with blockdevice(lists, on_peer_loss="timeout:0.5") as device:
        device.pwrite(block(1), 0)
        time.sleep(0.5)     # its claim has been seen
        for end in (signal.SIGCONT, signal.SIGKILL):
            caplog.clear()
            server.process.send_signal(signal.SIGSTOP)
            with pytest.raises(OSError) as caught:
                while True:     # what was on its way is answered
                    device.pread(4096, 0)
            assert caught.value.errno == errno.EIO
            eventually(lambda: state_of(device) == "stuck")
            assert len(re.findall("no answer for 0.5 s", caplog.text)) == 1 and "is gone" not in caplog.text
            if end == signal.SIGCONT:
                server.process.send_signal(end)
                eventually(lambda: state_of(device) == "ready" and "the server is back" in caplog.text)
                assert device.pread(4096, 0) == block(1)
                time.sleep(1.0)     # a line a second
        server.end(signal.SIGKILL)
        eventually(lambda: state_of(device) == "lost" and "the server is gone" in caplog.text)
        server = program("blk", *lists, "--device", str(image))
        eventually(lambda: state_of(device) == "ready")
        assert device.pread(4096, 0) == block(1)
    assert server.end() == (0, "")


@pytest.mark.stress
def test_a_stopped_server_is_said_without_a_timeout(program: Start, lists: list[str], image: Path,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    """By default requests wait for it; after a while the state and a line tell, and another line that it answers again."""
    server = program("blk", *lists, "--device", str(image))
    with blockdevice(lists) as device:
        device.pwrite(block(1), 0)
        server.process.send_signal(signal.SIGSTOP)
        found: set[bytes] = set()
        over = threading.Event()

        def read() -> None:
            while not over.is_set():    # what was on its way is answered: on a busy machine it stops later
                found.add(device.pread(4096, 0))

        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: state_of(device) == "stuck")
        over.set()
        server.process.send_signal(signal.SIGCONT)
        reader.join()
        assert found == {block(1)}
        eventually(lambda: state_of(device) == "ready")
    assert caplog.text.count("no answer for 5 s, requests wait: the server lives") == 1
    assert caplog.text.count("the server answers again") == 1
    assert server.end() == (0, "")


# A client that reads ahead of its own device, when told to.
READS_AHEAD = """
import os, sys, time
from muenfast.blk import BlockClients, channels_from_lists
with BlockClients(channels_from_lists(*sys.argv[1:])) as clients:
    clients.ready(lambda: True)
    fd = os.open(clients.disks[0].path, os.O_RDONLY)
    print(clients.disks[0].path, flush=True)
    sys.stdin.readline()
    os.posix_fadvise(fd, 8 << 20, 1 << 20, os.POSIX_FADV_WILLNEED)
    print(flush=True)
    time.sleep(600)
"""


@needs_fuse
@pytest.mark.root
@pytest.mark.fuse
def test_a_client_killed_with_its_own_reads_under_way(program: Start, runtime: Path, image: Path) -> None:
    """The last of its threads, whichever that is, closes the device and waits for them: it is taken away all the same."""
    lists = new_lists()
    server = program("blk", *lists, "--device", str(image))
    for _ in range(8):
        client = subprocess.Popen([sys.executable, "-c", READS_AHEAD, lists[1], lists[3]], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        assert client.stdin is not None and client.stdout is not None
        device = client.stdout.readline().strip()
        try:
            server.process.send_signal(signal.SIGSTOP)
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "\n"
            client.kill()
            eventually(lambda: not os.path.exists(device))      # noqa: B023
            client.wait(10)
        finally:
            fuse.reclaim_name(runtime, os.path.basename(device))    # of one that is stuck, nobody else would
            server.process.send_signal(signal.SIGCONT)
            client.kill()
            client.communicate()
    again = program("blk", "--client", *lists)
    assert again.lines[0].split()[4] == device
    assert again.end() == server.end() == (0, "")


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "shm"])
def test_a_server_that_is_gone_for_good(shared: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It says so in the bell: what is outstanding fails, the state is "gone"."""
    from muenfast.export import Export, exports_from_lists

    lists = new_lists(shared)
    (config,) = exports_from_lists(lists[1], lists[3], device="ram:1M", buffer=lists[5] if shared else None)
    export = Export(config)
    export.start()
    try:
        with blockdevice(lists) as device:
            device.pwrite(block(1), 0)
            export.stop()
            assert export._ended.wait(20)
            export.server.close(gone=True)
            eventually(lambda: device.gone)
            assert state_of(device) == "gone"
            with pytest.raises(OSError) as caught:
                device.pread(4096, 0)
            assert caught.value.errno == errno.EIO
        assert caplog.text.count("the server destroyed the export") == 1 and "the server is gone" not in caplog.text
    finally:
        export.close()


# ------------------------------------------------------------------ stopped processes under a mount


@needs_fuse
@pytest.mark.root
@pytest.mark.fuse
class TestStopped:
    """SIGSTOP of one side under a mounted ext4."""

    def test_a_server(self, program: Start, tmp_path: Path, image: Path) -> None:
        """Over a shared buffer (inline: test_device.py). Data is dirty: SIGTERM ends the client, detach returns, nobody
        waits uninterruptibly."""
        lists = new_lists(True)
        server = program("blk", *lists, "--device", str(image))
        client = program("blk", "--client", *lists)
        device = client.lines[0].split()[4]
        number = loop.loop_of(device)
        assert number is not None
        command("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt"):
            command("sync", "-f", tmp_path / "mnt")
            server.process.send_signal(signal.SIGSTOP)
            try:
                writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={tmp_path}/mnt/file", "bs=1M", "count=1",
                                           "conv=fsync"], stderr=subprocess.DEVNULL)
                time.sleep(0.2)
                status, errors = client.end(timeout=15)
                assert status == 0 and errors and "Traceback" not in errors
                assert writer.wait(timeout=15) != 0
            finally:
                server.process.send_signal(signal.SIGCONT)
        eventually(lambda: str(tmp_path) not in (loop.backing_file(number) or ""))
        assert stuck(str(tmp_path), lists[1]) == []
        assert server.end() == (0, "")

    @pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
    def test_a_client(self, program: Start, tmp_path: Path, image: Path, end: int) -> None:
        """Users of its device wait. SIGCONT: they go on, nothing has failed. SIGKILL: the watchdog takes the device away,
        they get an I/O error, and the mount can be taken away."""
        lists = new_lists()
        server = program("blk", *lists, "--device", str(image))
        client = program("blk", "--client", *lists)
        device = client.lines[0].split()[4]
        number = loop.loop_of(device)
        assert number is not None
        command("mkfs.ext4", "-q", "-b", "4096", device)
        with mounted(device, tmp_path / "mnt"):
            command("sync", "-f", tmp_path / "mnt")
            client.process.send_signal(signal.SIGSTOP)
            writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={tmp_path}/mnt/file", "bs=1M", "count=1", "conv=fsync"],
                                      stderr=subprocess.DEVNULL)
            time.sleep(0.7)
            assert writer.poll() is None
            if end == signal.SIGKILL:
                client.end(end)
                assert writer.wait(timeout=20) != 0
            else:
                client.process.send_signal(end)
                assert writer.wait(timeout=20) == 0
        if end == signal.SIGKILL:
            eventually(lambda: str(tmp_path) not in (loop.backing_file(number) or ""))
            client = program("blk", "--client", *lists)
            device = client.lines[0].split()[4]
            with mounted(device, tmp_path / "mnt"):     # the journal
                pass
        clean(device)
        assert client.end() == (0, "")
        eventually(lambda: str(tmp_path) not in (loop.backing_file(number) or ""))
        assert stuck(str(tmp_path), lists[1]) == []
        assert server.end() == (0, "")
