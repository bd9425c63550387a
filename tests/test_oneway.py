"""Strict one-way: who writes a channel sees nothing of its reader but what the kernel shows of any file that is open.

docs/security.md, "Strict one-way", names what that is; whatever else differs between a reader and none fails here.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import eventually
from oneway_program import SIZE, Watches

from muenfast import BlockDevice, open_reader, open_writer, shm
from muenfast.channel import End
from muenfast.errors import PeerError, UsageError

PROTOCOL = 7
DECLARED = shm.Permit(os.getuid(), os.getgid(), 0o600, "a test")   # as a policy's region
PLAY = Path(__file__).with_name("oneway_program.py")
STEPS = ["before", "again", "start", "read", "overrun", "killed", "second start", "epoch", "cut", "hollow", "filled",
         "gone on", "punched", "filled again", "leave", "replaced", "stopped"]
AB = "/dev/shm/ab"


@pytest.fixture
def channel() -> Iterator[Callable[..., str]]:
    """Makes regions of SIZE bytes that stay; they go with the test, under whatever name's file."""
    made: list[str] = []

    def make(word: str, size: int = SIZE) -> str:
        made.append(unique(word))
        shm.make_region(shm.Locator.parse(made[-1]), size)
        return made[-1]
    yield make
    for name in made:
        for path in (f"/dev/shm/{name}", f"/dev/shm/{name}.bell"):
            Path(path).unlink(missing_ok=True)


# ------------------------------------------------------------------ all that the writer sees


def played(kind: str, who: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--mount-proc", sys.executable, PLAY,
                           kind, who], capture_output=True, text=True, timeout=60, check=False,
                          env={name: value for name, value in os.environ.items() if name != "MUENFAST_RUNTIME_DIR"})
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [name for name, _, _ in record] == STEPS
    if who == "reader":     # it is one
        taken = {name: int(said) for name, _, said in record if said}
        if kind == "library":
            assert taken["read"] == taken["epoch"] == taken["filled"] == taken["gone on"] == taken["filled again"] == 10
        else:
            assert taken["overrun"] > taken["read"] >= 10 and taken["gone on"] >= taken["filled"] + 10
    return {name: seen for name, seen, _ in record}


def differences(alone: dict[str, Any], read: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is other than with nobody; of events those more and less."""
    found = {key: (alone.get(key), read.get(key)) for key in alone.keys() | read.keys() if alone.get(key) != read.get(key)}
    if "events:" in found:
        before, after = (Counter(events) for events in found["events:"])
        found["events:"] = (dict(before - after), dict(after - before))
    return found


# The kernel tells of an open file: to the directory's watch, and to its own.
OPENED = {"events:": ({}, {f"open {AB}": 2}), f"atime:{AB}": (False, True)}
CLOSED = {"events:": ({}, {f"close_nowrite {AB}": 2})}
# And of memory that is mapped: all of it from the first moment, however far the reader is.
MAPPED = {"pages:": ({"ours alone": SIZE // 4096}, {"shared": SIZE // 4096})}
REMOVED = {f"delete_self {AB}": 1, f"ignored {AB}": 1}
NAMED: dict[str, dict[str, tuple[Any, Any]]] = {
    "start": {**OPENED, **MAPPED}, "read": MAPPED, "overrun": MAPPED, "killed": CLOSED,
    "second start": {**OPENED, **MAPPED}, "epoch": MAPPED, "filled": MAPPED, "gone on": MAPPED,
    "leave": {"lease:": ("nobody has it open", "somebody has it open")}}


@pytest.mark.root
@pytest.mark.parametrize("kind", ["library", "net"])
def test_the_writer_sees_what_it_would_see_without_a_reader(kind: str) -> None:
    """Every byte, every file's metadata, events, locks, kernel lists, and attacks on its own region: reader or none is the
    same to it, but for what is named. library: a reader of open_reader(); net: an interface of a policy that only
    receives."""
    alone, read = played(kind, "nobody"), played(kind, "reader")
    for step in STEPS:
        found = differences(alone[step], read[step])
        if step == "punched":           # a look at a hole of its making fills that, unless it met no file at all
            assert found.keys() <= {f"stat:{AB}", "space:"}, found
            blocks = [seen[step][f"stat:{AB}"][5] for seen in (alone, read)]
            assert blocks[0] == 0 and blocks[1] in (0, 8)
        elif step == "filled again":    # it looked at some pages of what was made anew
            assert found.keys() <= {"pages:"}, found
        elif step == "replaced":        # what it removed is still held: its end comes later, and its space
            assert found.keys() == {"events:", "space:"} and found["events:"] == (REMOVED, {}), found
        elif step == "stopped":
            assert found.keys() - {"space:"} == {"events:"}, found
            assert found["events:"] == ({}, {**REMOVED, f"close_nowrite {AB}": 2})
        else:
            assert found == NAMED.get(step, {}), step


# ------------------------------------------------------------------ the reader


def test_the_reader_cannot_write(channel: Callable[..., str]) -> None:
    """Its only descriptor is read-only, its only mapping cannot be made writable, nor can its view."""
    name = channel("readonly")
    path = f"/dev/shm/{name}"
    with open_reader(name, bell=False) as reader:
        held = [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == path]
        assert held
        for fd in held:
            flags = next(line.split()[1] for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
                         if line.startswith("flags:"))
            assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
            with pytest.raises(PermissionError):
                mmap.mmap(int(fd), SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        [line] = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
        assert line[1] == "r--s"
        start, end = (int(number, 16) for number in line[0].split("-"))
        assert end - start == SIZE
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(SIZE), mmap.PROT_READ | mmap.PROT_WRITE) == -1
        view = reader.owner.view
        assert view.readonly and reader.owner.bell_view is None and reader.owner.claim is None
        with pytest.raises(TypeError):
            view[0] = 1


def test_nobody_keeps_books_of_the_reader(channel: Callable[..., str], runtime: Path) -> None:
    """No record, no directory for one, no lock on the region, and no user in lists."""
    name = channel("books")
    before = sorted(runtime.rglob("*"))
    with open_reader(name, bell=False) as reader:
        assert reader.owner.region.unseen and sorted(runtime.rglob("*")) == before
        seen = os.stat(f"/dev/shm/{name}")
        assert f":{seen.st_ino} " not in "".join(line for line in Path("/proc/locks").read_text().splitlines(True)
                                                 if f" {os.getpid()} " in line)
        assert shm.users(reader.owner.region) == []
        done = run("chan", "show", name)
        assert done.returncode == 0 and "unseen     strict one-way readers, if there are any" in done.stdout
    for action in ("list", "rm"):
        said = " ".join(run("chan", action, "--help").stdout.split())
        assert "Readers that are strict one-way are in nobody's books" in said


def test_it_opens_once(channel: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever becomes of the region: what takes its place is left alone, and that is said once."""
    name = channel("once")
    path = f"/dev/shm/{name}"
    watches = Watches()
    try:
        with End(name, writes=False, role="test", bell=False, permit=DECLARED) as end:
            watches.add(path)
            assert not end.replaced()
            os.truncate(path, 0)
            assert end.region.truncated() and not end.remap()
            os.truncate(path, SIZE)
            assert end.region.truncated() and not end.remap() and os.stat(path).st_blocks == 0
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, SIZE)
                file.write(b"new")
            assert not end.region.truncated() and end.remap() and bytes(end.view[:3]) == b"new"
            seen = [event for event in watches.taken() if event.split()[0] not in ("modify", "attrib")]
            assert seen == [f"open {path}", f"close_write {path}"]      # those of who filled it
            os.rename(path, f"{path}.bell")
            os.unlink(f"{path}.bell")
            shm.make_region(shm.Locator.parse(name), SIZE)
            watches.add(path)
            assert not end.replaced() and not end.replaced() and end.remap() and bytes(end.view[:3]) == b"new"
            assert [event for event in watches.taken() if event.startswith(("open", "access", "close"))] == []
        assert caplog.text.count("hears no more; start it again") == 1
    finally:
        os.close(watches.fd)


def test_what_a_policy_refuses(channel: Callable[..., str], tmp_path: Path) -> None:
    """Regions that are missing, are not made; holes, that looks would fill; links, whose access times would tell."""
    def strict(name: str, writes: bool = False, declared: shm.Permit = DECLARED) -> End:
        return End(name, writes=writes, role="test", create=SIZE, bell=False, permit=declared)

    missing = unique("missing")
    for writes in (False, True):
        with pytest.raises(FileNotFoundError, match="`muenfast policy apply` makes it"):
            strict(missing, writes)
    assert not os.path.exists(f"/dev/shm/{missing}")
    name = channel("holes")
    os.truncate(f"/dev/shm/{name}", 0)
    with pytest.raises(PeerError, match="size"):
        strict(name)
    os.truncate(f"/dev/shm/{name}", SIZE)
    with pytest.raises(UsageError, match=rf"has holes \(0 of {SIZE} bytes .*`fallocate -l {SIZE} /dev/shm"):
        strict(name)
    assert os.stat(f"/dev/shm/{name}").st_blocks == 0
    part = f"/dev/shm/{name}@{SIZE // 2}+{SIZE // 4}"
    with open_writer(part, size=8, protocol=1, bell=False), strict(part) as end:   # the others' holes are nothing to it
        assert end.region.unseen and os.stat(f"/dev/shm/{name}").st_blocks * 512 == SIZE // 4
    file = tmp_path / "folder" / "channel"
    file.parent.mkdir()
    file.write_bytes(bytes(SIZE))
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "way").symlink_to(file.parent)
    for path in (tmp_path / "link", tmp_path / "way" / "channel"):
        with pytest.raises(UsageError, match="is a symbolic link, and following one leaves an access time"):
            strict(str(path))
    with strict(str(file)) as end:
        assert end.region.size == SIZE and end.region.unseen


def test_without_a_policy_it_goes_on_and_says_that_it_is_seen(channel: Callable[..., str], tmp_path: Path,
                                                             caplog: pytest.LogCaptureFixture) -> None:
    """As readers without a bell did ever: regions come and go with who writes them."""
    def told() -> str:
        text = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return text

    missing = unique("missing")
    with open_reader(missing, bell=False) as reader:
        assert not reader.owner.region.unseen
        assert f"channel {missing}: its writer sees this reader" in (said := told()) and "`muenfast chan create`" in said
        with open_writer(missing, size=8, protocol=1, bell=False) as writer, open_reader(missing, bell=False) as other:
            assert other.owner.region.unseen and not told()
            writer.write(b"a")
            assert [each.read() for each in (reader, other) for _ in range(2)] == [None, b"a".ljust(8, b"\0")] * 2
    assert not os.path.exists(f"/dev/shm/{missing}")
    holes = channel("holes")
    os.truncate(f"/dev/shm/{holes}", 0)
    os.truncate(f"/dev/shm/{holes}", SIZE)
    (tmp_path / "file").write_bytes(bytes(SIZE))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, why in ((holes, "has holes"), (str(tmp_path / "link"), "is a symbolic link")):
        with open_reader(name, bell=False) as reader:
            assert not reader.owner.region.unseen and why in told()
    name = channel("anew")
    with End(name, writes=False, role="test", bell=False) as end:
        os.unlink(f"/dev/shm/{name}")
        assert end.region.unseen and end.replaced() and not told()


def test_a_lease_is_not_waited_for(channel: Callable[..., str]) -> None:
    """The owner of a file may hold one, and would see how long we wait."""
    name = channel("lease")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with open(f"/dev/shm/{name}", "r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            with pytest.raises(BlockingIOError, match="its owner holds a lease on it"):
                open_reader(name, bell=False)
    finally:
        signal.signal(signal.SIGIO, before)


def test_access_times_of_its_own_files_stay(channel: Callable[..., str]) -> None:
    """Where it may say so (its own, or as root)."""
    name = channel("atime")
    path = f"/dev/shm/{name}"
    os.utime(path, ns=(1, os.stat(path).st_mtime_ns))
    with open_reader(name, bell=False):
        assert os.stat(path).st_atime_ns == 1
    assert os.stat(path).st_atime_ns == 1


# ------------------------------------------------------------------ the writer


def test_the_writer_takes_no_advice(channel: Callable[..., str]) -> None:
    """A page that stands where a bell would is neither opened nor mapped nor written, whatever it says."""
    name = channel("advice")
    bell = Path(f"/dev/shm/{name}.bell")
    with open_writer(name, size=8, protocol=PROTOCOL) as writer:     # one with a bell, to have a true page
        assert writer.owner.bell is not None
        page = bell.read_bytes()
    bell.write_bytes(page)
    assert any(page)
    watches = Watches()
    try:
        watches.add(str(bell))
        with open_writer(name, size=8, protocol=PROTOCOL, bell=False) as writer, \
                open_reader(name, protocol=PROTOCOL, bell=False) as reader:
            assert writer.owner.bell is None and not writer.ringing and not reader.ringing
            for number in range(2 * writer.elements):   # nobody is waited for
                writer.write(number.to_bytes(8, "little"))
            assert str(bell) not in Path("/proc/self/maps").read_text()
            reader.wait(0.1)
        assert watches.taken() == []
    finally:
        os.close(watches.fd)
    assert bell.read_bytes() == page


def test_a_block_connection(channel: Callable[..., str], program: Callable[..., Program]) -> None:
    """Two one-way channels: each side opens the one that it reads once, in its life, and takes no lock on it."""
    req, resp = channel("req"), channel("resp")
    watches = Watches()
    try:
        watches.add(f"/dev/shm/{req}")
        server = program("blk", "--req", req, "--resp", resp, "--device", "ram:1M", "--strict-oneway")
        assert watches.taken() == [f"open /dev/shm/{req}"]
        with BlockDevice(req, resp, bells=False) as device:
            device.pwrite(b"x" * 4096, 0)
            assert device.pread(4096, 0) == b"x" * 4096
            watches.taken()     # the client's, which is the writer
            os.kill(server.pid, signal.SIGKILL)
            server.end(signal.SIGKILL)
            assert eventually(watches.taken) == [f"close_nowrite /dev/shm/{req}"]
        watches.taken()
        server = program("blk", "--req", req, "--resp", resp, "--device", "ram:1M", "--strict-oneway")
        inode = os.stat(f"/dev/shm/{req}").st_ino
        assert not [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line]
        assert server.end()[0] == 0
        assert watches.taken() == [f"open /dev/shm/{req}", f"close_nowrite /dev/shm/{req}"]
        assert not list(Path("/dev/shm").glob(f"{req}.bell")) and not list(Path("/dev/shm").glob(f"{resp}.bell"))
    finally:
        os.close(watches.fd)
