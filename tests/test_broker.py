"""Brokers: what takes privileges is done for a process that has none, as the policy declares it, and nothing else.

The subjects' users are ones that Debian has, which own nothing and run nothing.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PREFIX, Program, run, unique
from helpers import block, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_policy import alone, status_of

from muenfast import broker
from muenfast.attach import fuse, loop, partitions
from muenfast.broker import disks as disks_by_broker
from muenfast.broker import net as net_by_broker
from muenfast.net import interfaces_from_lists
from muenfast.privileges import CAPABILITIES as CAPABILITIES_OF

__all__ = ["alone"]     # fixtures

CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
pytestmark = pytest.mark.root
TWO = """
version = 1
[subjects.storage]
user = "backup"
[subjects.linux]
user = "list"
[channels.req]
writer = "linux"
reader = "storage"
region = "NAMEreq"
[channels.resp]
writer = "storage"
reader = "linux"
region = "NAMEresp"
"""
DISK = TWO + """
[buffers.buf]
users = ["linux", "storage"]
region = "NAMEbuf"
size = "1M"
[connections.disk]
client = "linux"
server = "storage"
request = "req"
response = "resp"
buffer = "buf"
device = ["DEVICE", "ram:8M"]
"""
NET = """
version = 1
[subjects.left]
user = "list"
[subjects.right]
user = "irc"
[channels.ab]
writer = "left"
reader = "right"
region = "NAMEab"
[channels.ba]
writer = "right"
reader = "left"
region = "NAMEba"
[interfaces.net0]
subject = "left"
in = "ba"
out = "ab"
netns = "LEFT"
addr = "10.9.0.1/24"
up = true
children = ["child1"]
[interfaces.net1]
subject = "right"
in = "ab"
out = "ba"
netns = "RIGHT"
addr = "10.9.0.2/24"
up = true
"""


@pytest.fixture
def prefix() -> Iterator[str]:
    """What the names of this test's regions begin with; they go with it."""
    name = unique("broker-")
    yield name
    for path in Path("/dev/shm").glob(f"{name}*"):
        path.unlink()


def policy(tmp_path: Path, prefix: str, text: str, **words: str) -> str:
    """A policy's file, which was applied."""
    for word, value in {"NAME": prefix, **words}.items():
        text = text.replace(word, value)
    path = tmp_path / "policy.toml"
    path.write_text(text)
    done = run("policy", "apply", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return str(path)


def children(pid: int) -> list[int]:
    return [int(each) for task in Path(f"/proc/{pid}/task").iterdir() for each in (task / "children").read_text().split()]


def broker_of(pid: int) -> int:
    """The broker's process, which is root's."""
    [found] = [each for each in children(pid) if Path(f"/proc/{each}/comm").read_text() == "muenfast-broker\n"]
    assert status_of(found)["Uid"].split()[1] == "0"
    return found


def has_broker(pid: int) -> bool:
    """It may be about to begin."""
    return any(Path(f"/proc/{each}/comm").read_text() == "muenfast-broker\n" for each in children(pid))


def without_privileges(pid: int, user: str) -> bool:
    seen, entry = status_of(pid), pwd.getpwnam(user)
    return (seen["Uid"].split() == [str(entry.pw_uid)] * 4 and seen["NoNewPrivs"] == "1"
            and {seen[name].strip("0") for name in CAPABILITIES} == {""})


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


# Asks a server, as its user, for another size. Modules first: only root may be able to read them.
RESIZE = """if True:
    import os, sys
    from muenfast import control
    os.setresuid(*[int(sys.argv[1])] * 3)
    print(control.ask(int(sys.argv[2]), {"command": "resize", "name": sys.argv[3], "size": "32M"}, timeout=30))
"""


COUNTS = """if True:
    import os, sys
    from muenfast import control
    os.setresuid(*[int(sys.argv[1])] * 3)
    print(control.ask(int(sys.argv[2]), {"command": "status"})["broker"])
"""


# What `muenfast stat` shows that user.
STAT = """if True:
    import argparse, os, sys
    import muenfast.control, muenfast.counts
    from muenfast.cli import stat
    os.setresuid(*[int(sys.argv[1])] * 3)
    stat.run(argparse.Namespace(names=[], watch=None, json=False))
"""


def stat_of(user: str) -> str:
    done = subprocess.run([sys.executable, "-c", STAT, str(pwd.getpwnam(user).pw_uid)], text=True, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def disks_left() -> list[str]:
    """Mounts, loop devices and nodes that are of clients which are no more."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split()[4] for line in file if "/mnt/muendisk" in line]
    dead = [path for path in mounts if gone(int(path.rpartition("-")[2]))]
    return dead + [str(node) for node in Path("/dev").glob("muendisk*")
                   if (number := loop.loop_of(str(node))) is not None and not loop.is_bound(number)]


def has_open(pid: int, path: str) -> bool:
    return any(os.path.realpath(each) == path for each in Path(f"/proc/{pid}/fd").iterdir())


def told(process: Program) -> str:
    """The next line that it writes to standard error."""
    assert process.process.stderr is not None
    return process.process.stderr.readline()


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that the users may enter."""
    path = Path(tempfile.mkdtemp(prefix="muenfast-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


# ------------------------------------------------------------------ block devices

@pytest.fixture
def disks(program: Callable[..., Program], tmp_path: Path, prefix: str,
          alone: None) -> Callable[..., tuple[Program, Program]]:
    """Server and client of DISK, each its subject's user."""
    def start(device: str = "ram:16M") -> tuple[Program, Program]:
        path = policy(tmp_path, prefix, DISK, DEVICE=device)
        server = program("blk", "--policy", path, "--subject", "storage")
        return server, program("blk", "--client", "--policy", path, "--subject", "linux", "--same-store")

    return start


needs_fuse = pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")


@needs_fuse
class TestDevices:
    def test_a_file_system_of_a_user_without_privileges(self, disks: Callable[..., tuple[Program, Program]],
                                                        tmp_path: Path) -> None:
        """Both disks are block devices; ext4 on one holds what it is given; all is gone in the end."""
        server, client = disks()
        assert without_privileges(client.pid, "list") and without_privileges(server.pid, "backup")
        keeper = broker_of(client.pid)
        nodes = [line.split()[4] for line in client.lines]
        numbers = [loop.loop_of(node) for node in nodes]
        assert None not in numbers and len(set(numbers)) == 2
        kept = status_of(keeper)
        assert kept["NoNewPrivs"] == "1" and int(kept["CapBnd"], 16) == int(kept["CapPrm"], 16) == sum(
            1 << CAPABILITIES_OF[name] for name in disks_by_broker._CAPABILITIES)
        watchdogs = children(keeper)
        assert len(watchdogs) == 2 and {status_of(each)["CapPrm"] for each in watchdogs} == {kept["CapPrm"]}
        # PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE, linux/sched.h: PR_SET_IO_FLUSHER, which a root with CAP_SYS_RESOURCE may
        allowed = int(status_of(os.getpid())["CapEff"], 16) >> CAPABILITIES_OF["CAP_SYS_RESOURCE"] & 1
        assert {int((task / "stat").read_text().rpartition(")")[2].split()[6]) & 0x180000
                for task in Path(f"/proc/{client.pid}/task").iterdir()} == {0x180000 * allowed}
        assert re.search(rf"broker: process {keeper}, \d+ requests, 0 refused", stat_of("list"))
        assert subprocess.run(["mkfs.ext4", "-q", nodes[0]], check=False).returncode == 0
        place = tmp_path / "mnt"
        place.mkdir()
        subprocess.run(["mount", nodes[0], place], check=True)
        try:
            (place / "file").write_bytes(b"".join(map(block, range(64))))
            os.sync()
        finally:
            subprocess.run(["umount", place], check=True)
        assert subprocess.run(["fsck.ext4", "-fn", nodes[0]], capture_output=True, check=False).returncode == 0
        status, said = client.end()
        assert (status, said) == (0, "") and gone(keeper)
        assert not any(map(os.path.lexists, nodes)) and not any(map(loop.is_bound, numbers))  # type: ignore[arg-type]
        assert server.end()[0] == 0

    def test_killed_it_leaves_nothing(self, disks: Callable[..., tuple[Program, Program]], tmp_path: Path,
                                      program: Callable[..., Program]) -> None:
        """At once: the broker, and the watchdog, see to it; the next client has the same names."""
        server, client = disks()
        keeper, nodes = broker_of(client.pid), [line.split()[4] for line in client.lines]
        numbers = [loop.loop_of(node) for node in nodes]
        client.process.kill()
        client.process.communicate()
        eventually(lambda: gone(keeper))
        assert not any(map(os.path.lexists, nodes))
        eventually(lambda: not any(map(loop.is_bound, numbers)))  # type: ignore[arg-type]
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            mounts = file.read()
        assert not any(f"{Path(node).name}-{keeper}" in mounts for node in nodes)
        again = program("blk", "--client", "--policy", str(tmp_path / "policy.toml"), "--subject", "linux", "--same-store")
        assert [line.split()[4] for line in again.lines] == nodes
        assert again.end()[0] == 0 and server.end()[0] == 0

    def test_killed_broker(self, disks: Callable[..., tuple[Program, Program]]) -> None:
        """That is said at once, and in stat; the disks go on; the watchdog takes away what is left as the client ends."""
        server, client = disks()
        keeper, nodes = broker_of(client.pid), [line.split()[4] for line in client.lines]
        numbers = [loop.loop_of(node) for node in nodes]
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: gone(keeper) or status_of(keeper)["State"].startswith("Z"))
        assert f"(broker, {keeper}) has ended: the disks go on" in told(client)
        assert f"broker: process {keeper}, it has ended" in stat_of("list")
        with open(nodes[1], "r+b", buffering=0) as disk:
            disk.write(block(7))
            os.fsync(disk.fileno())
            os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            disk.seek(0)
            assert disk.read(4096) == block(7)
        _, said = client.end()
        assert "the process that kept privileges for this one has ended" in said
        eventually(lambda: not any(map(os.path.lexists, nodes)))
        eventually(lambda: not any(map(loop.is_bound, numbers)))  # type: ignore[arg-type]
        assert server.end()[0] == 0

    def test_killed_at_any_moment(self, disks: Callable[..., tuple[Program, Program]], tmp_path: Path,
                                  program: Callable[..., Program]) -> None:
        """While devices are made, too: the broker ends, and nothing is left."""
        server, client = disks()
        dice = random.Random(7)
        for turn in range(8):
            keeper = broker_of(client.pid)
            if turn:    # the first one was ready
                time.sleep(dice.uniform(0.0, 0.3))
            client.process.kill()
            client.process.communicate()
            eventually(lambda keeper=keeper: gone(keeper), 40)
            eventually(lambda: not disks_left())
            client = program("blk", "--client", "--policy", str(tmp_path / "policy.toml"), "--subject", "linux",
                             "--same-store", ready=turn == 7)
            if turn < 7:
                eventually(lambda client=client: has_broker(client.pid))
        assert client.end()[0] == 0 and server.end()[0] == 0

    def test_partitions(self, disks: Callable[..., tuple[Program, Program]]) -> None:
        """Of a table that is written while the device is there."""
        server, client = disks()
        node = client.lines[0].split()[4]
        table = "label: gpt\nstart=256, size=256\nstart=512, size=512\n"
        done = subprocess.run(["sfdisk", "--no-reread", "--no-tell-kernel", node], input=table, text=True,
                              capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        eventually(lambda: os.path.exists(f"{node}1") and os.path.exists(f"{node}2"))
        number = loop.loop_of(node)
        assert len(partitions.of_kernel(f"loop{number}")) == 2
        with open(f"{node}2", "r+b", buffering=0) as part:
            part.write(block(5))
            os.fsync(part.fileno())
            part.seek(0)
            assert part.read(4096) == block(5)
        assert client.end()[0] == 0 and server.end()[0] == 0
        assert not os.path.lexists(f"{node}1") and not os.path.lexists(f"{node}2")


    def test_another_size(self, disks: Callable[..., tuple[Program, Program]], prefix: str, outside: Path) -> None:
        """A file's disk grows, as its server's user asks for; the block device takes that over."""
        image = outside / "image"
        image.touch()
        os.truncate(image, 16 << 20)
        os.chown(image, pwd.getpwnam("backup").pw_uid, -1)
        server, client = disks(str(image))
        node = client.lines[0].split()[4]
        done = subprocess.run([sys.executable, "-c", RESIZE, str(pwd.getpwnam("backup").pw_uid), str(server.pid),
                               f"{prefix}req"], text=True, capture_output=True, check=False)
        assert "'ok': True" in done.stdout, done.stdout + done.stderr

        def size() -> int:
            with open(node, "rb") as disk:
                return disk.seek(0, os.SEEK_END)

        eventually(lambda: size() == 32 << 20)
        status, said = client.end()
        assert status == 0 and "new size 33554432 bytes" in said and len(said.splitlines()) == 1
        assert server.end()[0] == 0

    @pytest.mark.parametrize("killed", [True, False])
    def test_a_server_that_stands_still(self, disks: Callable[..., tuple[Program, Program]], killed: bool, tmp_path: Path,
                                        program: Callable[..., Program]) -> None:
        """A client that waits for it with requests under way is killed, or told to end: either way all is taken away."""
        server, client = disks()
        keeper, nodes = broker_of(client.pid), [line.split()[4] for line in client.lines]
        numbers = [loop.loop_of(node) for node in nodes]
        server.process.send_signal(signal.SIGSTOP)
        with subprocess.Popen(["dd", f"if={nodes[0]}", "of=/dev/null", "bs=4096", "count=64", "iflag=direct"],
                              stderr=subprocess.PIPE) as reader:
            eventually(lambda: has_open(reader.pid, nodes[0]) and status_of(reader.pid)["State"].startswith("D"))
            if killed:
                client.process.kill()
                client.process.communicate()
            else:
                assert client.end(timeout=60)[0] == 0
            eventually(lambda: gone(keeper), 40)
            assert b"rror" in reader.communicate(timeout=30)[1]
        eventually(lambda: not any(map(os.path.lexists, nodes)))
        eventually(lambda: not any(map(loop.is_bound, numbers)))  # type: ignore[arg-type]
        server.process.send_signal(signal.SIGCONT)
        if killed:  # takes away what the killed one left
            again = program("blk", "--client", "--policy", str(tmp_path / "policy.toml"), "--subject", "linux",
                            "--same-store")
            assert again.end()[0] == 0
        assert server.end()[0] == 0


# ------------------------------------------------------------------ interfaces

@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    names = [f"{PREFIX}b{side}" for side in "lr"]
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


def within(name: str, *words: str) -> str:
    done = subprocess.run(["ip", "netns", "exec", name, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Asks for a child, as that user: only root may be able to read the modules.
ASK = """if True:
    import os, sys
    from muenfast import names
    os.setresuid(*[int(sys.argv[1])] * 3)
    print(names.ask(*names.request(*sys.argv[2:], *[None] * (5 - len(sys.argv)))))
"""


class TestInterfaces:
    def test_two_subjects(self, program: Callable[..., Program], tmp_path: Path, prefix: str, alone: None,
                          namespaces: list[str]) -> None:
        """Packets cross between two processes without any capability; a declared child is made, another one refused."""
        path = policy(tmp_path, prefix, NET, LEFT=namespaces[0], RIGHT=namespaces[1])
        two = [program("net", "--policy", path, "--subject", subject) for subject in ("left", "right")]
        brokers = [broker_of(each.pid) for each in two]
        for each, user in zip(two, ("list", "irc"), strict=True):
            assert without_privileges(each.pid, user)
        within(namespaces[0], "ping", "-c", "3", "-i", "0.05", "-W", "5", "10.9.0.2")
        def asked(*words: str) -> str:
            return within(namespaces[0], sys.executable, "-c", ASK, str(pwd.getpwnam("list").pw_uid), *words)

        assert "'ok': True" in asked("add_child", "net0", "child1")
        assert "child1" in within(namespaces[0], "ip", "-o", "link")
        asking = subprocess.run([sys.executable, "-c", COUNTS, str(pwd.getpwnam("list").pw_uid), str(two[0].pid)],
                                text=True, capture_output=True, check=False)
        assert "'refused': 0}" in asking.stdout, asking.stderr
        refused = asked("add_child", "net0", "child2")
        asking = subprocess.run(asking.args, text=True, capture_output=True, check=False)
        assert "'refused': 1}" in asking.stdout, asking.stderr
        assert "'ok': False" in refused and "the policy declares no interface" in refused
        assert "'ok': True" in asked("add_mark", "child1", "5") and "'ok': True" in asked("del_child", "child1")
        assert "'ok': True" in asked("add_child", "net0", "child1")
        within(namespaces[0], "ip", "link", "set", "net0", "name", "other")
        eventually(lambda: "'ok': True" in within(namespaces[0], sys.executable, "-c", ASK,
                                                  str(pwd.getpwnam("list").pw_uid), "del_child", "child1"))
        within(namespaces[0], "ip", "link", "set", "other", "up")
        assert two[0].end()[0] == 0
        two[1].process.kill()
        two[1].process.communicate()
        for each in brokers:
            eventually(lambda each=each: gone(each))
        for name in namespaces:
            assert "net" not in within(name, "ip", "-o", "link") and "other" not in within(name, "ip", "-o", "link")
        # Takes away what the killed one left.
        assert program("net", "--policy", path, "--subject", "right").end()[0] == 0

    def test_killed_broker(self, program: Callable[..., Program], tmp_path: Path, prefix: str, alone: None,
                           namespaces: list[str]) -> None:
        """It is said at once; marks went with it, and so does the process: it ends, and nothing is left."""
        path = policy(tmp_path, prefix, NET, LEFT=namespaces[0], RIGHT=namespaces[1])
        one = program("net", "--policy", path, "--subject", "left")
        keeper = broker_of(one.pid)
        os.kill(keeper, signal.SIGKILL)
        status, said = one.process.wait(20), one.end()[1]
        assert status == 1 and f"(broker, {keeper}) has ended: the marks of its interfaces went with it" in said
        assert "net0" not in within(namespaces[0], "ip", "-o", "link")
        assert program("net", "--policy", path, "--subject", "left").end()[0] == 0

    def test_a_device_that_moves(self, program: Callable[..., Program], tmp_path: Path, prefix: str, alone: None,
                                 namespaces: list[str]) -> None:
        """It is followed into another namespace, and asked for there."""
        path = policy(tmp_path, prefix, NET, LEFT=namespaces[0], RIGHT=namespaces[1])
        one = program("net", "--policy", path, "--subject", "left")
        within(namespaces[0], "ip", "link", "set", "net0", "netns", namespaces[1])
        within(namespaces[1], "ip", "link", "set", "net0", "up")
        words = (sys.executable, "-c", ASK, str(pwd.getpwnam("list").pw_uid), "add_child", "net0", "child1")
        eventually(lambda: "'ok': True" in subprocess.run(["ip", "netns", "exec", namespaces[1], *words], text=True,
                                                          capture_output=True, check=False).stdout)
        assert "child1" in within(namespaces[1], "ip", "-o", "link")
        assert one.end()[0] == 0


# ------------------------------------------------------------------ requests of all kinds

def sent(lane: socket.socket, data: bytes, fds: list[int] | None = None) -> dict[str, object]:
    """What a broker answers."""
    socket.send_fds(lane, [data], fds or [])
    answer, given, _, _ = socket.recv_fds(lane, 1 << 16, 4)
    for fd in given:
        os.close(fd)
    found = json.loads(answer)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def brokers(prefix: str) -> Iterator[list[broker.Broker]]:
    """One of each kind; of the interfaces none can be made, for their namespace is not there."""
    config = interfaces_from_lists(f"{PREFIX[:8]}n", netns="/nowhere/namespace")
    found = [broker.start(lambda: disks_by_broker.DiskService(os.getppid(), 2), 2, ("CAP_SYS_ADMIN",)),
             broker.start(lambda: net_by_broker.NetService(config, {"child1": config[0].name}), 2, ("CAP_NET_ADMIN",))]
    yield found
    for each in found:
        each.close()


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-1 << 70, 1 << 70), st.floats(), st.text(max_size=30),
                   st.sampled_from(["muendiska", "muendiskzzz", "loop0", "../../etc", "auto", "lo", "child1", 1, 4096,
                                    512]),
                   st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
FIELDS = ("name", "number", "device", "thread", "size", "start", "operation", "read_only", "max_io", "uring", "force",
          "milliseconds", "block_size", "discard", "but")
OPERATIONS = ("counts", "release", "mount", "unmount", "rmdir", "resize file", "watch", "unwatch", "mounted", "loop",
              "free loop", "resize loop", "open", "sync", "users", "make node", "remove node", "open part", "reread",
              "change", "make part", "remove part", "device", "marks", "follow marks", "name", "follow", "configure",
              "drops", "lost", "unmark", "close", "fork", "__init__")      # not "claim" and "uevents", which give something
REQUESTS = st.one_of(
    st.binary(min_size=1, max_size=5000),
    st.builds(lambda operation, fields: json.dumps({"do": operation, **fields}).encode(), st.sampled_from(OPERATIONS),
              st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)))


def state() -> tuple[set[str], set[str], set[str]]:
    """Of the machine, as far as a broker may change it for names of these tests."""
    nodes = {each for each in os.listdir("/dev") if each.startswith(("muendiskzzz", "muendiska"))}
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = {line for line in file if "muendisk" in line}
    return nodes, mounts, {each for each in os.listdir("/sys/class/net") if each.startswith(("child", PREFIX[:8]))}


class TestRequests:
    def test_one_that_stands_still(self, brokers: list[broker.Broker], monkeypatch: pytest.MonkeyPatch,
                                   caplog: pytest.LogCaptureFixture) -> None:
        """Who asks for its counts is told so, soon, and has them again once it goes on; who leaves waits for a while."""
        disks, net = brokers
        assert disks.counts() == {"pid": disks.pid, "ended": False, "requests": 1, "refused": 0}
        for each in brokers:
            os.kill(each.pid, signal.SIGSTOP)
        try:
            eventually(lambda: all(status_of(each.pid)["State"].startswith("T") for each in brokers))
            for _ in range(2):
                assert disks.counts() == {"pid": disks.pid, "ended": False}
            with monkeypatch.context() as patch:
                patch.setattr(broker, "_LEAVING", 0.1)
                patch.setattr(broker, "_LATE", 0.1)
                net.close()
            assert f"({net.pid}) does not end" in caplog.text
        finally:
            for each in brokers:
                os.kill(each.pid, signal.SIGCONT)
        eventually(lambda: disks.counts().get("requests", 0) >= 4)
        disks.close()
        assert disks.counts() == {"pid": disks.pid, "ended": True}
        assert os.waitpid(net.pid, 0)[1] == 0

    def test_nobody_waits_for_one_that_stands_still(self, brokers: list[broker.Broker],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
        """An operation may take its time while the process lives; else it fails, the next one soon, and the answers that
        come in the end are not taken for those of later requests."""
        disks, _ = brokers
        monkeypatch.setattr(broker, "_LOOK", 100)
        monkeypatch.setattr(broker, "_LOOKS", 3)
        monkeypatch.setattr(broker, "_PROMPT", 100)
        os.kill(disks.pid, signal.SIGSTOP)
        try:
            eventually(lambda: status_of(disks.pid)["State"].startswith("T"))
            lanes = len(disks._lanes) - 1
            took = []
            for _ in range(lanes + 1):      # so that one lane is used twice
                began = time.monotonic()
                with pytest.raises(TimeoutError, match=rf"\({disks.pid}\) stands still"):
                    disks.call("claim", name="muendiskzzz")
                took.append(time.monotonic() - began)
            assert took[0] > 0.5 > max(took[1:])
        finally:
            os.kill(disks.pid, signal.SIGCONT)
        for _ in range(lanes + 1):
            assert disks.ask("counts").keys() == {"requests", "refused"}
        disks.ask("release", name="muendiskzzz")    # once was it claimed, and late
        with pytest.raises(PermissionError, match="was not claimed here"):
            disks.ask("release", name="muendiskzzz")

    def test_an_operation_that_takes_long_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Longer than a process may stand still, as one does that waits for a disk."""
        class Slow(broker.Service):
            def __init__(self) -> None:
                super().__init__()
                self.operations["slow"] = broker.Operation(self._slow)

            def _slow(self) -> broker.Answer:
                time.sleep(1)
                return broker.Answer({"slept": True})

        monkeypatch.setattr(broker, "_LOOK", 50)
        monkeypatch.setattr(broker, "_LOOKS", 2)
        with broker.start(Slow, 1, ()) as slow:
            assert slow.ask("slow") == {"slept": True}
            assert slow.counts()["requests"] > 5

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=REQUESTS, with_fd=st.booleans())
    def test_whatever_comes_is_answered(self, brokers: list[broker.Broker], data: bytes, with_fd: bool) -> None:
        """Bytes, JSON, descriptors: nothing is done, nothing is kept, and the broker lives."""
        before = state()
        for each in brokers:
            lane = each._lanes[0]
            open_there = len(os.listdir(f"/proc/{each.pid}/fd"))
            counts = each.ask("counts")
            answer = sent(lane, data, [0] if with_fd else None)
            after = each.ask("counts")
            if not answer["ok"] and answer["kind"] == "refused":
                assert after["refused"] == counts["refused"] + 1
            else:
                assert not answer["ok"] or json.loads(data)["do"] == "counts", (data, answer)
            assert after["requests"] == counts["requests"] + 2
            assert len(os.listdir(f"/proc/{each.pid}/fd")) == open_there
        assert state() == before

    @pytest.mark.parametrize("request_", [
        {"do": "open", "name": "muendiska"}, {"do": "make node", "name": "muendiska"}, {"do": "unmount", "name": "loop0",
                                                                                       "force": True},
        {"do": "claim", "name": "../etc"}, {"do": "claim", "name": "muendiska\n"}, {"do": "claim", "name": "muendisk1"},
        {"do": "change", "name": "muendiska", "operation": 1, "number": 1, "start": 0, "size": 1 << 20},
        {"do": "watch", "name": "muendiska", "thread": 1, "bystander": 1},
        {"do": "free loop", "name": "muendiska", "milliseconds": 1},
        {"do": "mount", "name": "muendiska", "read_only": False, "max_io": 4097, "uring": "auto"},
        {"do": "rmdir", "name": "muendiska"}, {"do": "device", "name": "lo"}, {"do": "device", "name": "child1"},
        {"do": "configure", "device": 1}, {"do": "name", "device": True}, {"do": "close", "device": 1, "more": 1}])
    def test_what_is_not_its_own(self, brokers: list[broker.Broker], request_: dict[str, object]) -> None:
        """Refused by both of them, one of which does not know it at all."""
        for each in brokers:
            answer = sent(each._lanes[0], json.dumps(request_).encode())
            assert (answer["ok"], answer["kind"]) == (False, "refused")
