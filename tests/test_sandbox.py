"""What a process that serves by a policy can do: tried from within, by a disk in Python, which tells by what it reads."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd_client
import pytest
from conftest import Program, run, unique
from test_broker import TWO, policy
from test_cli import notified
from test_policy import alone, status_of

from muenfast import sandbox
from muenfast.errors import MuenfastError

__all__ = ["alone"]     # fixtures

# Tries what is forbidden, and what is not, as it is asked for its size; the disk holds what became of it.
STORE = '''
import ctypes, json, os, socket, threading

class Probe:
    def __init__(self, place):
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, *arguments):
            if getattr(libc, name)(*arguments) < 0:
                raise OSError(ctypes.get_errno(), name)
        def thread():
            t = threading.Thread(target=lambda: None)
            t.start()
            t.join()
        own = os.open(place + "/own", os.O_RDWR)
        tries = {
            "chmod": lambda: os.chmod(place + "/own", 0o666), "fchmod": lambda: os.fchmod(own, 0o666),
            "fchown": lambda: os.fchown(own, os.getuid(), os.getgid()), "setuid": lambda: os.setuid(0),
            "ptrace": lambda: call("ptrace", 16, os.getppid(), 0, 0), "execve": lambda: os.execv("/bin/true", ["true"]),
            "fork": os.fork, "mount": lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
            "unshare": lambda: call("unshare", 0x10000000), "kill": lambda: os.kill(os.getppid(), 0),
            "xattr": lambda: os.setxattr(place + "/own", "user.x", b"y"),
            "internet": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
            "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
            "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
            "io_uring": lambda: call("syscall", 425, 1, ctypes.create_string_buffer(120)),
            "another file": lambda: open(os.path.dirname(place) + "/other").read(),
            "another folder": lambda: os.listdir(os.path.dirname(place)),
            "a region of others": lambda: os.open("/dev/shm/REGION", os.O_RDONLY),
            "own file": lambda: os.pwrite(own, b"x", 0), "a new file": lambda: open(place + "/new", "w").write("x"),
            "thread": thread, "timer slack": lambda: call("prctl", 29, 1000, 0, 0, 0),
            "dumpable": lambda: call("prctl", 4, 1, 0, 0, 0),
            "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)}
        found = {}
        for name, attempt in tries.items():
            try:
                attempt()
                found[name] = 0
            except OSError as error:
                found[name] = error.errno
        self.data = json.dumps(found).encode().ljust(1 << 16)

    def get_size(self):
        return len(self.data)

    def pread(self, buf, offset):
        buf[:] = self.data[offset:offset + len(buf)]
'''
POLICY = TWO + """
[connections.disk]
client = "linux"
server = "storage"
request = "req"
response = "resp"
device = "py:probe_store:Probe:PLACE"
paths = ["PLACE"]
"""
ALLOWED = {"own file", "a new file", "thread", "timer slack", "unix"}
# What the users' permissions allow anyway: refused by the sandbox only.
ONLY_SANDBOXED = {"chmod", "dumpable", "fchmod", "fork", "xattr", "internet", "another file", "another folder",
                  "a region of others"}


@pytest.fixture
def prefix() -> Iterator[str]:
    name = unique("sandbox-")
    yield name
    for path in Path("/dev/shm").glob(f"{name}*"):
        path.unlink()


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that the users may enter."""
    path = Path(tempfile.mkdtemp(prefix="muenfast-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def tried(program: Callable[..., Program], tmp_path: Path, outside: Path, prefix: str, monkeypatch: pytest.MonkeyPatch,
          *words: str) -> tuple[dict[str, int], str]:
    """What became of each; and how the server is held ("2": filtered)."""
    place, modules = outside / "place", outside / "modules"
    place.mkdir()
    modules.mkdir()
    modules.chmod(0o755)
    (place / "own").touch()
    (outside / "other").write_text("secret")
    for path in (place, place / "own"):
        os.chown(path, pwd.getpwnam("backup").pw_uid, -1)
    region = Path("/dev/shm", f"{prefix}other")
    region.touch(0o644)
    region.chmod(0o644)
    (modules / "probe_store.py").write_text(STORE.replace("REGION", region.name))
    (modules / "probe_store.py").chmod(0o644)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    path = policy(tmp_path, prefix, POLICY, PLACE=str(place))
    server = program("blk", "--policy", path, "--subject", "storage", *words)
    held = status_of(server.pid)["Seccomp"]
    socket = outside / "nbd"
    client = program("blk", "--client", "--req", f"{prefix}req", "--resp", f"{prefix}resp", "--attach", "none", "--nbd",
                     str(socket), "--same-store")
    with nbd_client.connect(str(socket)) as connection:
        found = json.loads(connection.read(0, 1 << 16))
    assert client.end()[0] == 0 and server.end()[0] == 0
    return found, held


@pytest.mark.root
class TestWithin:
    def test_a_module_by_its_path(self, program: Callable[..., Program], tmp_path: Path, outside: Path, prefix: str,
                                  alone: None) -> None:
        """A disk's own module is found where the policy says that it is, without a word on its folder."""
        (outside / "probe_store.py").write_text(
            "class Probe:\n    def __init__(self, place): pass\n    def get_size(self): return 4096\n"
            "    def pread(self, buf, offset): pass\n")
        (outside / "probe_store.py").chmod(0o644)
        text = POLICY.replace("py:probe_store:Probe:PLACE", f"py:{outside}/probe_store.py:Probe:PLACE").replace(
            'paths = ["PLACE"]', "")
        server = program("blk", "--policy", policy(tmp_path, prefix, text, PLACE=str(outside)), "--subject", "storage")
        assert status_of(server.pid)["Seccomp"] == "2" and server.end()[0] == 0

    def test_what_is_forbidden(self, program: Callable[..., Program], tmp_path: Path, outside: Path, prefix: str,
                               monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
        """A store that goes astray reaches its own files, threads and Unix sockets; nothing else."""
        found, held = tried(program, tmp_path, outside, prefix, monkeypatch)
        assert held == "2"
        landlock = sandbox.Landlock(sandbox.Files())
        landlock.close()
        if not landlock.version:
            for name in ("another file", "another folder", "a region of others"):
                del found[name]
        assert {name for name, number in found.items() if number == 0} == ALLOWED

    def test_systemd_is_told(self, program: Callable[..., Program], tmp_path: Path, outside: Path, prefix: str,
                             monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
        """From within, as the subject's user: READY=1, once it serves, and STOPPING=1."""
        path = policy(tmp_path, prefix, POLICY.replace("py:probe_store:Probe:PLACE", "ram:1M").replace(
            'paths = ["PLACE"]', ""))
        monkeypatch.setenv("NOTIFY_SOCKET", str(outside / "notify"))
        with notified(str(outside / "notify")) as systemd:
            (outside / "notify").chmod(0o666)
            server = program("blk", "--policy", path, "--subject", "storage")
            assert systemd.recv(100) == b"READY=1"
            client = program("blk", "--client", "--policy", path, "--subject", "linux", "--attach", "none", "--same-store")
            assert systemd.recv(100) == b"READY=1"
            for each in (client, server):
                assert status_of(each.pid)["Seccomp"] == "2"
                assert each.end()[0] == 0 and systemd.recv(100) == b"STOPPING=1"

    def test_without(self, program: Callable[..., Program], tmp_path: Path, outside: Path, prefix: str,
                     monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
        """--no-sandbox: then permissions alone count, so that the other test tests something."""
        harmless = STORE.replace('"fork": os.fork', '"fork": lambda: os.wait() if os.fork() else os._exit(0)')
        harmless = harmless.replace('os.execv("/bin/true", ["true"])', 'open("/none")')
        monkeypatch.setattr("test_sandbox.STORE", harmless)
        found, held = tried(program, tmp_path, outside, prefix, monkeypatch, "--no-sandbox")
        assert held == "0"
        allowed = {name for name, number in found.items() if number == 0}
        assert allowed >= ALLOWED | ONLY_SANDBOXED - {"xattr"} and not allowed & {"setuid", "mount", "packet"}


def test_other_machines() -> None:
    """The filter is made for their numbers; where those are not known, that is said."""
    assert len(sandbox.compiled(sandbox.CALLS, "aarch64")) > 1000
    with pytest.raises(MuenfastError, match="--no-sandbox"):
        sandbox.compiled(sandbox.CALLS, "sparc")
    assert run("blk", "--no-sandbox", "--req", "a", "--resp", "b").returncode == 2
