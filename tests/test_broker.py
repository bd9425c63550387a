"""Brokers: what takes privileges is done for a process that has none, as the policy declares it, and nothing else.

The subjects' users are ones that Debian has, which own nothing and run nothing.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PREFIX, Program, run, unique
from helpers import block, eventually
from test_policy import alone, status_of

from muenfast.attach import fuse, loop, partitions

__all__ = ["alone"]     # fixtures

CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
pytestmark = pytest.mark.root
DISK = """
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


def without_privileges(pid: int, user: str) -> bool:
    seen, entry = status_of(pid), pwd.getpwnam(user)
    return (seen["Uid"].split() == [str(entry.pw_uid)] * 4 and seen["NoNewPrivs"] == "1"
            and {seen[name].strip("0") for name in CAPABILITIES} == {""})


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


# ------------------------------------------------------------------ block devices

@pytest.fixture
def disks(program: Callable[..., Program], tmp_path: Path, prefix: str, alone: None) -> Callable[..., tuple[Program, Program]]:
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
        broker = broker_of(client.pid)
        nodes = [line.split()[4] for line in client.lines]
        numbers = [loop.loop_of(node) for node in nodes]
        assert None not in numbers and len(set(numbers)) == 2
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
        assert (status, said) == (0, "") and gone(broker)
        assert not any(map(os.path.lexists, nodes)) and not any(map(loop.is_bound, numbers))  # type: ignore[arg-type]
        assert server.end()[0] == 0

    def test_killed_it_leaves_nothing(self, disks: Callable[..., tuple[Program, Program]], tmp_path: Path,
                                      program: Callable[..., Program]) -> None:
        """At once: the broker, and the watchdog, see to it; the next client has the same names."""
        server, client = disks()
        broker, nodes = broker_of(client.pid), [line.split()[4] for line in client.lines]
        numbers = [loop.loop_of(node) for node in nodes]
        client.process.kill()
        client.process.communicate()
        eventually(lambda: gone(broker))
        assert not any(map(os.path.lexists, nodes))
        eventually(lambda: not any(map(loop.is_bound, numbers)))  # type: ignore[arg-type]
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            mounts = file.read()
        assert not any(f"{Path(node).name}-{broker}" in mounts for node in nodes)
        again = program("blk", "--client", "--policy", str(tmp_path / "policy.toml"), "--subject", "linux", "--same-store")
        assert [line.split()[4] for line in again.lines] == nodes
        assert again.end()[0] == 0 and server.end()[0] == 0

    def test_killed_broker(self, disks: Callable[..., tuple[Program, Program]]) -> None:
        """The client ends and says so; what is left is taken away by the watchdog."""
        server, client = disks()
        broker, nodes = broker_of(client.pid), [line.split()[4] for line in client.lines]
        numbers = [loop.loop_of(node) for node in nodes]
        os.kill(broker, signal.SIGKILL)
        eventually(lambda: gone(broker) or status_of(broker)["State"].startswith("Z"))
        _, said = client.end()
        assert "the process that kept privileges for this one has ended" in said
        eventually(lambda: not any(map(os.path.lexists, nodes)))
        eventually(lambda: not any(map(loop.is_bound, numbers)))  # type: ignore[arg-type]
        assert server.end()[0] == 0

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
        refused = asked("add_child", "net0", "child2")
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
        for broker in brokers:
            eventually(lambda broker=broker: gone(broker))
        for name in namespaces:
            assert "net" not in within(name, "ip", "-o", "link") and "other" not in within(name, "ip", "-o", "link")
        assert program("net", "--policy", path, "--subject", "right").end()[0] == 0     # takes away what the killed one left

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
