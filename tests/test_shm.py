"""Regions, presence and claims (muenfast.shm), across processes that race, fork and are killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
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

from muenfast import inodes, shm
from muenfast.errors import ClaimError, PeerError, UsageError
from muenfast.shm import Locator, Region

PAGE = mmap.PAGESIZE
OURS = (f"muenfast-test-{os.getpid()}-", f".muenfast-{os.getpid()}-")
SOURCES = str(Path(shm.__file__).parents[1])


def entries() -> set[str]:
    """Ours: other test runs may use the same /dev/shm."""
    return {each for each in os.listdir("/dev/shm") if each.startswith(OURS)}


def books(runtime: Path) -> list[str]:
    return sorted(str(each.relative_to(runtime)) for each in runtime.rglob("*") if not each.is_dir())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of its own; afterwards no region, record, mapping or descriptor may be left."""
    path = tmp_path / "run"
    monkeypatch.setenv("MUENFAST_RUNTIME_DIR", str(path))
    before, open_before = entries(), descriptors()
    yield path
    gc.collect()
    assert entries() == before
    assert books(path) == []
    assert descriptors() == open_before


@pytest.fixture
def name() -> Iterator[Locator]:
    locator = Locator.parse(f"muenfast-test-{os.getpid()}-{time.monotonic_ns()}")
    yield locator
    for each in (locator.path, locator.path + ".bell"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(code, *arguments): a Python process with shm, Region and Locator; its stdin and stdout are pipes."""
    running: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str) -> subprocess.Popen[str]:
        head = ("import contextlib, os, sys\nfrom muenfast import shm\nfrom muenfast.errors import ClaimError\n"
                "from muenfast.shm import Locator, Region\n")
        process = subprocess.Popen([sys.executable, "-c", head + code, *arguments], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": SOURCES})
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


OPENER = """
region = Region.open(Locator.parse(sys.argv[1]), writable=True, create=4096)
print(region.device, region.inode, region.created, flush=True)
sys.stdin.readline()
region.close(keep="keep" in sys.argv)
"""


# ---- locators


def test_locator_forms() -> None:
    plain = Locator.parse("chan")
    assert (plain.path, plain.posix, plain.offset, plain.size) == ("/dev/shm/chan", True, 0, None)
    assert Locator.parse("/a/b") == Locator("/a/b", "/a/b", False)
    piece = Locator.parse("/a/b@0x1000+2K")
    assert piece == Locator("/a/b@0x1000+2K", "/a/b", False, 4096, 2048)
    assert Locator.parse("/a/b@1G+1m").offset == 1 << 30
    assert Locator.parse("/a@b/c").path == "/a@b/c"
    assert Locator.parse("/a/b@c@0+1").path == "/a/b@c"
    assert Locator.parse("at@sign").path == "/dev/shm/at@sign"
    assert Locator.parse("n" * 240).posix


@pytest.mark.parametrize("text", ["", "a/b", "./a", ".", "..", "n" * 241, "\u00e9" * 121, "x.bell", "/a/x.bell", "a\0b",
                                  "/", "/a/", "\ud812", ".muenfast-1", "/a@", "/a@1", "/a@1+", "/a@+1",
                                  "/a@1+1T", "/a@0x+1", "/a@1_0+1", "/a@1 +1", "/a@\u0661+1", "/@1+1",
                                  "/a@1+0", "/a@-1+1",
                                  "/a@0x7fffffffffffffff+1", "/a@" + "9" * 5000 + "+1"])
def test_locator_refusals(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Locator.parse(text, option="--req", index=3)
    assert caught.value.option == "--req" and caught.value.index == 3 and caught.value.value == text


@pytest.mark.parametrize("text, bell", [
    ("chan", "/dev/shm/chan.bell"), ("/a/b", "/a/b.bell"), ("/a/b@4K+0x10", "/a/b@4096.bell"),
    ("/sys/bus/pci/devices/0000:00:03.0/resource2", None), ("/sys/x@0+4K", None), ("/muenfs/a", None),
    ("//muenfs/./a", None), ("/muenfsx/a", "/muenfsx/a.bell")])
def test_bell(text: str, bell: str | None) -> None:
    found = Locator.parse(text).bell
    assert (found and found.path) == bell
    if found is not None:
        assert found.posix is (not text.startswith("/")) and found.size is None and found.bell is None


# ---- one region


def test_missing(name: Locator, tmp_path: Path) -> None:
    for locator in (name, Locator.parse(str(tmp_path / "none"))):
        with pytest.raises(FileNotFoundError) as caught:
            Region.open(locator, writable=False)
        assert caught.value.filename == locator.path


@pytest.mark.parametrize("place", ["posix", "file"])
def test_made_used_and_removed(name: Locator, tmp_path: Path, place: str) -> None:
    locator = name if place == "posix" else Locator.parse(str(tmp_path / "file"))
    with Region.open(locator, writable=True, create=10000, mode=0o640) as writer:
        seen = os.stat(locator.path)
        assert (seen.st_mode & 0o7777, seen.st_size, seen.st_nlink) == (0o640, 10000, 1)
        assert seen.st_blocks * 512 >= 10000
        assert (writer.created, writer.size, writer.writable) == (True, 10000, True)
        assert (writer.device, writer.inode) == (seen.st_dev, seen.st_ino)
        assert len(writer.view) == 10000 and not writer.view.readonly
        writer.view[:5] = b"hello"
        with Region.open(locator, writable=False, create=4096) as reader:
            assert (reader.created, reader.size) == (False, 10000)
            assert bytes(reader.view[:5]) == b"hello"
        assert os.path.exists(locator.path)
        assert not writer.replaced() and not writer.truncated()
    assert not os.path.exists(locator.path)
    writer.close()
    with pytest.raises(ValueError):
        writer.view[0]
    with pytest.raises(ValueError):
        writer.truncated()
    assert writer.replaced()


@pytest.mark.parametrize("made_by_reader", [False, True])
def test_reader_cannot_write(name: Locator, made_by_reader: bool) -> None:
    first = Region.open(name, writable=not made_by_reader, create=PAGE)
    with first, Region.open(name, writable=False) as second:
        reader = first if made_by_reader else second
        with pytest.raises(TypeError):
            reader.view[0] = 1
        assert fcntl.fcntl(reader._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        maps = [each.split() for each in Path("/proc/self/maps").read_text().splitlines() if name.path in each]
        assert sorted(each[1] for each in maps) == (["r--s", "r--s"] if made_by_reader else ["r--s", "rw-s"])


def test_descriptors_close_on_exec(name: Locator) -> None:
    with Region.open(name, writable=True, create=PAGE), shm.claim("k", "a key"):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/self/fd/{fd}").startswith(("/dev/shm", os.environ["MUENFAST_RUNTIME_DIR"])):
                    assert not os.get_inheritable(int(fd))


def test_buffer_outlives_close(name: Locator) -> None:
    with Region.open(name, writable=True, create=PAGE) as region:
        region.view[7] = 9
        piece = region.view[7:8]
    assert piece[0] == 9
    assert not os.path.exists(name.path)
    del piece


@pytest.mark.parametrize("offset, size", [(0, PAGE), (1, 1), (100, 5000), (PAGE, PAGE), (PAGE + 8, 3 * PAGE - 8)])
def test_slice(tmp_path: Path, offset: int, size: int) -> None:
    data = os.urandom(4 * PAGE)
    path = tmp_path / "file"
    path.write_bytes(data)
    with Region.open(Locator.parse(f"{path}@{offset}+{size}"), writable=True) as region:
        assert bytes(region.view) == data[offset:offset + size]
        region.view[:] = bytes(size)
    assert path.read_bytes() == data[:offset] + bytes(size) + data[offset + size:]


def test_slice_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    for numbers in ("0+101", "100+1", "1M+1"):
        with pytest.raises(UsageError):
            Region.open(Locator.parse(f"{path}@{numbers}"), writable=False)
    with pytest.raises(UsageError):
        Region.open(Locator.parse(str(path)), writable=False, create=0)


def test_what_cannot_be_mapped(tmp_path: Path, name: Locator) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(OSError) as caught:
            Region.open(Locator.parse(str(path)), writable=False)
        assert caught.value.filename == str(path)
    with pytest.raises(UsageError):
        Region.open(Locator.parse("/dev/zero"), writable=False)
    with Region.open(Locator.parse("/dev/zero@0+4K"), writable=False) as zero:
        assert zero.size == 4096 and not zero.truncated()
    os.symlink("/etc/hostname", name.path)
    with pytest.raises(OSError) as caught:
        Region.open(name, writable=False)
    assert caught.value.errno == errno.ELOOP and caught.value.filename == name.path


def test_replaced_and_truncated(name: Locator) -> None:
    shm.make_region(name, 2 * PAGE)
    with Region.open(name, writable=True) as region:
        os.truncate(name.path, PAGE)
        assert region.truncated() and not region.replaced()
        os.unlink(name.path)
        assert region.replaced()
        shm.make_region(name, PAGE)
        assert region.replaced()
    shm.remove_region(name)


def test_empty_region_of_a_foreign_peer(name: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_EMPTY_TIMEOUT", 0.05)
    Path(name.path).touch()
    with pytest.raises(PeerError) as caught:
        Region.open(name, writable=False, create=PAGE)
    assert (caught.value.field, caught.value.seen) == ("size", 0)
    monkeypatch.setattr(shm, "_EMPTY_TIMEOUT", 5.0)
    later = threading.Timer(0.05, os.truncate, (name.path, 3 * PAGE))
    later.start()
    with Region.open(name, writable=False, create=PAGE) as region:
        assert region.size == 3 * PAGE and not region.created
    later.join()
    assert os.path.exists(name.path)  # not ours


@pytest.mark.parametrize("tmpfile", [True, False])
def test_no_space(name: Locator, monkeypatch: pytest.MonkeyPatch, tmpfile: bool) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if not tmpfile:
        monkeypatch.setattr(os, "open", without_tmpfile(os.open))
    monkeypatch.setattr(os, "posix_fallocate", full)
    for make in (lambda: Region.open(name, writable=True, create=12345), lambda: shm.make_region(name, 12345)):
        with pytest.raises(OSError) as caught:
            make()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, name.path)
        assert "12345 bytes" in str(caught.value)
        assert not [each for each in entries() if each.startswith(".muenfast-")]


def without_tmpfile(real: Callable[..., int]) -> Callable[..., int]:
    def fake(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real(path, flags, *rest, **more)
    return fake


def test_without_tmpfile(name: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", without_tmpfile(os.open))
    with Region.open(name, writable=True, create=PAGE) as region:
        assert region.created and not region.replaced()
        assert not [each for each in entries() if each.startswith(".muenfast-")]
        with pytest.raises(FileExistsError):
            shm.make_region(name, PAGE)


def test_temporary_of_a_dead_maker_is_swept(name: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = f"/dev/shm/.muenfast-{os.getpid()}-dead", f"/dev/shm/.muenfast-{os.getpid()}-alive"
    Path(dead).touch()
    with open(alive, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with Region.open(name, writable=True, create=PAGE):
            assert not os.path.exists(dead) and os.path.exists(alive)
    os.unlink(alive)


@pytest.mark.parametrize("step", ["fchmod", "link", "mmap", "json"])
@pytest.mark.parametrize("writable", [True, False])
def test_nothing_left_when_a_step_fails(name: Locator, monkeypatch: pytest.MonkeyPatch, step: str,
                                        writable: bool) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    owner = {"mmap": shm.mmap}.get(step, os)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "pwrite" if step == "json" else step, fail)
        with pytest.raises(OSError) as caught:
            Region.open(name, writable=writable, create=PAGE, mode=0o640 if step == "fchmod" else 0o600)
    assert caught.value.errno == errno.EIO and caught.value.filename
    assert not os.path.exists(name.path)  # descriptors and book-keeping: the fixture


def test_faster_peer_wins(name: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.posix_fallocate

    def slow(fd: int, offset: int, size: int) -> None:
        real(fd, offset, size)
        if not os.path.exists(name.path):
            Path(name.path).write_bytes(b"theirs")

    monkeypatch.setattr(os, "posix_fallocate", slow)
    with Region.open(name, writable=True, create=PAGE) as region:
        assert bytes(region.view) == b"theirs" and not region.created
    assert os.path.exists(name.path)


def test_newcomer_starts_over_when_the_name_moved(name: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last leaver unlinks between the newcomer's open and its joining."""
    leaver = Region.open(name, writable=True, create=PAGE)
    real, opened = shm._open, []

    def stalled(locator: Locator, writable: bool) -> int:
        fd = real(locator, writable)
        opened.append(os.fstat(fd).st_ino)
        leaver.close()
        return fd

    monkeypatch.setattr(shm, "_open", stalled)
    with Region.open(name, writable=True, create=PAGE) as region:
        assert opened[0] == leaver.inode
        assert region.created and not region.replaced() and region.inode != leaver.inode


# ---- presence


def test_two_users(name: Locator, start: Start) -> None:
    with Region.open(name, writable=True, create=PAGE) as region:
        other = start(OPENER, name.text)
        assert line(other) == f"{region.device} {region.inode} False"
        live = shm.users(name)
        assert {each["pid"] for each in live} == {os.getpid(), other.pid} and shm.users(region) == live
        assert {"pid", "role", "comm", "what", "since", "name"} <= set(live[0])
        kill(other)
        assert [each["pid"] for each in shm.users(name)] == [os.getpid()]
        with Region.open(name, writable=False):
            assert len(shm.users(name)) == 2
    assert shm.users(name) == []


def test_killed_maker(name: Locator, start: Start, runtime: Path) -> None:
    other = start(OPENER, name.text)
    device, inode, created = line(other).split()
    assert created == "True"
    kill(other)
    assert os.path.exists(name.path)
    with Region.open(name, writable=True, create=PAGE) as region:
        assert (str(region.device), str(region.inode), region.created) == (device, inode, False)
        assert [each["pid"] for each in shm.users(region)] == [os.getpid()]
    assert not os.path.exists(name.path)


def test_keep(name: Locator) -> None:
    Region.open(name, writable=True, create=PAGE).close(keep=True)
    assert os.path.exists(name.path)
    Region.open(name, writable=True).close()
    assert not os.path.exists(name.path)


def test_leaver_spares_the_name_of_another(name: Locator) -> None:
    with Region.open(name, writable=True, create=PAGE):
        os.unlink(name.path)
        shm.make_region(name, PAGE)
    shm.remove_region(name)


def test_made_on_purpose_stays(name: Locator) -> None:
    shm.make_region(name, 3 * PAGE, 0o600)
    with pytest.raises(FileExistsError) as caught:
        shm.make_region(name, PAGE)
    assert caught.value.filename == name.path
    Region.open(name, writable=True, create=PAGE).close()
    assert os.path.getsize(name.path) == 3 * PAGE
    shm.remove_region(name)
    with pytest.raises(FileNotFoundError):
        shm.remove_region(name)


def test_remove_region(name: Locator) -> None:
    bell = name.bell
    assert bell is not None
    with Region.open(name, writable=True, create=PAGE) as region, Region.open(bell, writable=True, create=PAGE):
        with pytest.raises(ClaimError) as caught:
            shm.remove_region(name)
        assert str(os.getpid()) in caught.value.holder
        region.close()
        shm.make_region(name, PAGE)
        with pytest.raises(ClaimError):  # its bell is still in use
            shm.remove_region(name)
        shm.remove_region(name, force=True)
        assert not os.path.exists(name.path) and not os.path.exists(bell.path)
    with pytest.raises(UsageError):
        shm.remove_region(Locator.parse("/a@0+1"))


def test_list_regions(name: Locator) -> None:
    def listed() -> list[dict[str, object]]:
        return [each for each in shm.list_regions() if each["name"] == name.text]

    bell = name.bell
    assert bell is not None
    with Region.open(name, writable=True, create=PAGE) as region, Region.open(bell, writable=True, create=PAGE):
        assert listed() == [{"name": name.text, "size": PAGE, "device": region.device, "inode": region.inode,
                             "mtime": os.stat(name.path).st_mtime, "auto": True, "users": 1}]
        assert bell.text not in {each["name"] for each in shm.list_regions()}
    shm.make_region(name, PAGE)
    assert [(each["auto"], each["users"]) for each in listed()] == [(False, 0)]
    shm.remove_region(name)


def many(count: int = 40) -> list[Locator]:
    return [Locator.parse(f"muenfast-test-{os.getpid()}-many{k}-{time.monotonic_ns()}") for k in range(count)]


def test_made_ahead(runtime: Path) -> None:
    """Regions of many names are as they always are: allocated in full before they have a name, ours, automatic; what was
    there is not touched, and what is not opened goes."""
    locators = many()
    there = Region.open(locators[3], writable=True, create=PAGE)
    there.view[:4] = b"here"
    wanted = [(locator, (k % 3 + 1) * PAGE, k % 2 == 0) for k, locator in enumerate(locators)]
    opened = []
    with shm.made_ahead(wanted):
        for locator, size, writable in wanted[:30]:
            opened.append(Region.open(locator, writable=writable, create=size))
        with Region.open(locators[39], writable=True, create=7 * PAGE) as other:    # another size than was said before
            assert other.size == PAGE and not other.created
    for k, region in enumerate(opened):
        seen = os.stat(region.locator.path)
        assert region.created == (k != 3) and region.writable == (k % 2 == 0)
        assert region.size == seen.st_size == (PAGE if k == 3 else (k % 3 + 1) * PAGE)
        assert seen.st_blocks * 512 == seen.st_size and seen.st_mode & 0o777 == 0o600
        assert [user["pid"] for user in shm.users(region)] == [os.getpid()] * (2 if k == 3 else 1)
        assert region.locator.path in Path(f"/proc/{os.getpid()}/maps").read_text()
    assert bytes(opened[3].view[:4]) == b"here"
    assert {each["name"]: each["auto"] for each in shm.list_regions() if each["name"].startswith(OURS[0] + "many")} == {
        locator.text: True for locator in locators[:30]}
    for region in [*opened, there]:
        region.close()


def test_made_ahead_where_others_are_faster() -> None:
    """Names that are taken, or taken away, while they are made."""
    locators = many()
    with shm.made_ahead([(locator, PAGE, True) for locator in locators]):
        taken = Region.open(locators[5], writable=True, create=PAGE, mode=0o640)
        first = Region.open(locators[0], writable=True, create=PAGE)    # and with it all of its lot
        os.unlink(locators[1].path)
        os.unlink(locators[2].path)
        other = os.open(locators[2].path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.truncate(other, 3 * PAGE)
        regions = [Region.open(locator, writable=True, create=PAGE) for locator in locators[1:5]]
    os.close(other)
    assert [region.size for region in regions] == [PAGE, 3 * PAGE, PAGE, PAGE]
    assert [region.created for region in regions] == [True, False, True, True]
    for region in (taken, first, *regions):
        region.close()
    os.unlink(locators[2].path)


@pytest.mark.parametrize("what", ["no memory", "no thread"])
def test_made_ahead_without(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be had, regions are made one by one, and who makes them tells why that fails."""
    if what == "no memory":
        monkeypatch.setattr(inodes, "allocate", lambda directory, sizes: [])
    else:
        def refuse(target: Callable[[], None], name: str) -> threading.Thread:
            raise OSError(errno.EAGAIN, "no thread")

        monkeypatch.setattr(inodes, "spawn", refuse)
    locators = many()
    with shm.made_ahead([(locator, PAGE, True) for locator in locators]):
        regions = [Region.open(locator, writable=True, create=PAGE) for locator in locators]
        with pytest.raises(OSError, match="cannot allocate"):
            Region.open(Locator.parse(locators[0].text + "x"), writable=True, create=1 << 50)
    assert all(region.created for region in regions)
    for region in regions:
        region.close()


def test_stock() -> None:
    """Lots in order, each allocated in full; what was not taken goes."""
    before = descriptors()
    stock = inodes.Stock([[PAGE, 2 * PAGE], [3 * PAGE], [1 << 50], [PAGE]])
    for sizes in ([PAGE, 2 * PAGE], [3 * PAGE], [], []):    # the third is more than there is, and the last one behind it
        lot = stock.take()
        assert [os.fstat(fd).st_size for fd in lot] == sizes
        for fd in lot:
            os.close(fd)
    stock.close()
    inodes.Stock([[PAGE] * 4] * 4).close()
    assert descriptors() == before


def test_inodes(tmp_path: Path) -> None:
    """As many as can be had, in order, allocated in full."""
    before = descriptors()
    found = inodes.allocate(b"/dev/shm", [PAGE, 3 * PAGE, 1 << 50, PAGE])
    assert [(os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512, os.fstat(fd).st_nlink) for fd in found] == [
        (PAGE, PAGE, 0), (3 * PAGE, 3 * PAGE, 0)]
    for fd in found:
        os.close(fd)
    assert inodes.allocate(os.fsencode(tmp_path / "none"), [PAGE]) == []
    assert descriptors() == before


def test_sweep(runtime: Path, name: Locator, start: Start) -> None:
    """A killed process's notes go at the next first opening; what is still meant or locked stays."""
    dying = [start(OPENER, name.text + "-gone"), start(OPENER, name.text),
             start("held = shm.claim('dead', 'x')\nprint(flush=True)\nsys.stdin.readline()")]
    ended = [line(each) for each in dying]
    for each in dying:
        kill(each)
    os.unlink(name.path + "-gone")
    assert len(books(runtime)) == 5
    shm.claim("fresh", "x").release()
    assert books(runtime) == [f"regions/{ended[1].rpartition(' ')[0].replace(' ', '-')}"]
    Region.open(name, writable=True).close()


def test_note_of_another_boot_is_not_believed(runtime: Path, name: Locator) -> None:
    shm.make_region(name, PAGE)
    seen = os.stat(name.path)
    (runtime / "regions" / f"{seen.st_dev}-{seen.st_ino}").write_text(
        json.dumps({"name": name.text, "path": name.path, "auto": True, "boot": "another"}))
    Region.open(name, writable=True).close()
    assert os.path.exists(name.path)


def test_records_are_names_of_few_files(runtime: Path, name: Locator) -> None:
    """A process's records and notes in a room share one file, and each says its own, the last that was said."""
    with contextlib.ExitStack() as stack:
        regions = [stack.enter_context(Region.open(Locator.parse(f"{name.text}-{k}"), writable=bool(k % 2), create=PAGE))
                   for k in range(9)]
        claims = [stack.enter_context(shm.claim(f"k{k}", f"thing {k}")) for k in range(5)]
        for room in ("regions", "claims"):
            assert len({os.stat(each).st_ino for each in (runtime / room).iterdir()}) == 1
        for k, region in enumerate(regions):
            [user] = shm.users(region)
            assert (user["name"], user["writable"], user["pid"]) == (f"{name.text}-{k}", bool(k % 2), os.getpid())
        claims[3].release()
        assert shm.holder("k3") is None
        with shm.claim("k3", "another thing"):
            found = {each["key"]: each["what"] for each in shm.claims()}
            assert found == {f"k{k}": f"thing {k}" if k != 3 else "another thing" for k in range(5)}
        assert shm.stale() == []


def test_a_file_of_records_is_followed_by_another(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads a record reads no more than so many lines."""
    monkeypatch.setattr(shm._File, "MOST", 3)
    with contextlib.ExitStack() as stack:
        for k in range(8):
            stack.enter_context(shm.claim(f"k{k}", f"thing {k}"))
        assert len({os.stat(each).st_ino for each in (runtime / "claims").iterdir()}) == 3
        assert len({each["what"] for each in shm.claims()}) == 8


def test_without_links_each_record_has_a_file(runtime: Path, name: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without hard links."""
    real = os.link

    def refused(source: str, path: str, **more: object) -> None:
        if path.startswith(str(runtime)):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)
        real(source, path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", refused)
    with Region.open(name, writable=True, create=PAGE) as region, shm.claim("a", "x"), shm.claim("b", "y"):
        assert len(books(runtime)) == len({os.stat(runtime / each).st_ino for each in books(runtime)}) == 4
        assert [each["what"] for each in shm.claims()] == ["x", "y"] and len(shm.users(region)) == 1


def test_a_look_for_what_the_dead_left_reads_the_room_once(name: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many regions there are; and our own records need no look."""
    looks: list[str] = []
    real = os.listdir
    with contextlib.ExitStack() as stack:
        for k in range(6):
            stack.enter_context(Region.open(Locator.parse(f"{name.text}-{k}"), writable=True, create=PAGE))
        monkeypatch.setattr(os, "listdir", lambda path: looks.append(path) or real(path))  # type: ignore[func-returns-value]
        monkeypatch.setattr(shm, "_probe", lambda *path, **more: pytest.fail("a look"))
        assert shm.stale() == []
        assert len([path for path in looks if path.endswith("regions")]) == 1


def test_book_keeping_taken_away(runtime: Path, name: Locator) -> None:
    region, held = Region.open(name, writable=True, create=PAGE), shm.claim("k", "x")
    for each in books(runtime):
        os.unlink(runtime / each)
    os.rmdir(runtime / "regions")
    region.close()
    with shm.claim("k", "somebody else's now"):
        held.release()
        assert shm.holder("k") is not None
    assert os.path.exists(name.path)  # nothing says any more that it was automatic


CYCLES = """
locator = Locator.parse(sys.argv[1])
sys.stdin.readline()
made = 0
for turn in range(int(sys.argv[2])):
    with Region.open(locator, writable=bool(turn % 3), create=4096) as region:
        made += region.created
        # We are a user: nobody may have taken the name away, nor given it to another inode.
        assert not region.replaced(), (turn, region.inode, os.stat(locator.path))
        if region.writable:
            region.view[0] = 1
        assert any(each["pid"] == os.getpid() for each in shm.users(region))
        assert not region.replaced()
print("good", made, flush=True)
"""


def test_races_of_many(name: Locator, start: Start) -> None:
    workers = [start(CYCLES, name.text, "60") for _ in range(8)]
    for each in workers:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    results = [line(each) for each in workers]
    assert all(each.startswith("good") for each in results), results
    assert sum(int(each.split()[1]) for each in results) > 0
    assert not os.path.exists(name.path)


def test_races_of_threads(name: Locator) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(40):
                with Region.open(name, writable=True, create=PAGE) as region:
                    assert not region.replaced()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []


def test_kills_at_any_moment(name: Locator, start: Start) -> None:
    """Whatever a process dies in, the next one opens, and its clean leave takes everything away."""
    code = """
print(flush=True)
while True:
    with Region.open(Locator.parse(sys.argv[1]), writable=True, create=4096):
        with contextlib.suppress(ClaimError):
            shm.claim('k', 'x').release()
"""
    for turn in range(4):
        workers = [start(code, name.text) for _ in range(3)]
        for each in workers:
            line(each)
        time.sleep(0.03 + 0.007 * turn)
        for each in workers:
            kill(each)
        with shm.claim("k", "x"), Region.open(name, writable=True, create=PAGE) as region:
            assert not region.replaced() and len(shm.users(region)) == 1
        assert not os.path.exists(name.path)
        shm._swept.clear()
        shm._sweep()


# Claims "before", forks a child that goes on without exec, claims "after", and waits to be killed.
FORKS = """if True:
    import os, time
    from muenfast import shm
    before = shm.claim("before", "a thing")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    after = shm.claim("after", "a thing")
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_forked_child_keeps_nothing_that_came_after_it(runtime: Path) -> None:
    """Of a parent that was killed: what the child shares is held until it ends, what was made behind it is free."""
    parent = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        shm.claim("after", "a thing").release()
        with pytest.raises(ClaimError):
            shm.claim("before", "a thing")
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.read()        # until the child has gone, too
        parent.stdout.close()
    shm.claim("before", "a thing").release()


def test_forked_child_leaves_its_parents_things_alone(name: Locator) -> None:
    with Region.open(name, writable=True, create=PAGE) as region, shm.claim("k", "x") as held:
        child = os.fork()
        if child == 0:
            region.close()
            held.release()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert not region.replaced() and len(shm.users(region)) == 1
        holder = shm.holder("k")
        assert holder is not None and holder["pid"] == os.getpid()


# ---- the runtime directory


def test_runtime_dir_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: Path) -> None:
    assert shm.runtime_dir() == str(runtime)
    assert runtime.stat().st_mode & 0o7777 == 0o700
    with monkeypatch.context() as patch:
        patch.setenv("MUENFAST_RUNTIME_DIR", "")
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        patch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(PermissionError):  # made by our real user
            shm.runtime_dir()
        assert (tmp_path / "muenfast").is_dir()


def test_runtime_dir_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    for mode in (0o770, 0o702, 0o1777):
        runtime.chmod(mode)
        with pytest.raises(PermissionError) as caught:
            shm.claim("k", "x")
        assert caught.value.filename == str(runtime)
    runtime.chmod(0o755)
    shm.runtime_dir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(PermissionError):
            shm.runtime_dir()
    os.symlink(runtime, tmp_path / "link")
    (tmp_path / "file").touch()
    for path in (tmp_path / "link", tmp_path / "file"):
        monkeypatch.setenv("MUENFAST_RUNTIME_DIR", str(path))
        with pytest.raises(NotADirectoryError):
            shm.runtime_dir()


def test_stopped_holder_of_the_book_keeping(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    monkeypatch.setattr(shm, "_MUTEX_TIMEOUT", 0.05)
    room = shm._room("claims")
    with shm._mutex(room), pytest.raises(TimeoutError) as caught:
        shm.claim("k", "x")
    assert caught.value.filename == room


# ---- claims


CLAIMER = """
held = shm.claim(sys.argv[1], "the thing", {"role": "muenfast blk", "port": 7})
print(flush=True)
sys.stdin.readline()
held.release()
"""


def test_claim(start: Start, runtime: Path) -> None:
    key = "a/key ~ with \u00e9\udc80"
    other = start(CLAIMER, key)
    line(other)
    with pytest.raises(ClaimError) as caught:
        shm.claim(key, "the thing")
    assert caught.value.what == "the thing"
    assert caught.value.holder.startswith(f"process {other.pid} (muenfast blk, since ")
    found = shm.holder(key)
    assert found is not None and found in shm.claims()
    assert (found["pid"], found["role"], found["what"], found["port"]) == (other.pid, "muenfast blk", "the thing", 7)
    assert {"comm", "since", "key"} <= set(found)
    kill(other)
    assert shm.holder(key) is None and shm.claims() == []
    with shm.claim(key, "the thing") as mine:
        assert shm.claims() == [mine.info] and mine.info["pid"] == os.getpid() and mine.info["key"] == key
        with pytest.raises(ClaimError):
            shm.claim(key, "the thing")
        with shm.claim(key + "2", "another thing"):
            assert len(shm.claims()) == 2
        assert shm.holder("a") is None
    mine.release()
    shm.claim(key, "the thing").release()


def test_long_keys_and_dots() -> None:
    with shm.claim("k" * 5000, "x"), shm.claim("k" * 5001, "x"), shm.claim("..", "x"), shm.claim(".", "x"):
        assert {each["key"] for each in shm.claims()} == {"k" * 5000, "k" * 5001, "..", "."}
    with pytest.raises(UsageError):
        shm.claim("", "x")


def test_claim_leaves_nothing_when_its_info_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        shm.claim("k", "x", {"what?": object()})
    shm.claim("k", "x").release()


EXCLUSION = """
sys.stdin.readline()
won = 0
while won < 20:
    try:
        with shm.claim("race", "x"):
            os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL))
            os.unlink(sys.argv[1])
            won += 1
    except ClaimError:
        pass
print("good", flush=True)
"""


def test_claims_exclude(start: Start, tmp_path: Path) -> None:
    workers = [start(EXCLUSION, str(tmp_path / "inside")) for _ in range(5)]
    for each in workers:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    while any(each.poll() is None for each in workers):  # probes must never be taken for a holder
        shm.holder("race")
        shm.claims()
    assert [line(each) for each in workers] == ["good"] * 5


def test_probes_never_refuse_a_claim() -> None:
    stop = threading.Event()

    def probe() -> None:
        while not stop.is_set():
            shm.holder("k")

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        for _ in range(100):
            shm.claim("k", "x").release()
    finally:
        stop.set()
        prober.join()


def test_claim_writer(name: Locator, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    low, high = (Locator.parse(f"{path}@{offset}+100") for offset in (0, 100))
    with Region.open(low, writable=True) as first, Region.open(high, writable=True) as second:
        with shm.claim_writer(first, "muenfast net") as held, shm.claim_writer(second, "muenfast net"):
            assert held.info["key"] == f"writer-{first.device}-{first.inode}-0"
            assert held.info["role"] == "muenfast net"
            with pytest.raises(ClaimError) as caught:
                shm.claim_writer(first, "muenfast net")
            assert low.text in caught.value.what


def backing(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def test_claim_backing(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    with contextlib.ExitStack() as stack:
        first, second, third = (backing(path) for _ in range(3))
        for fd in (first, second, third):
            stack.callback(os.close, fd)
        seen = path.stat()
        with shm.claim_backing(first, str(path), shared=True) as one:
            assert one.info["key"] == f"backing-{seen.st_dev}-{seen.st_ino}"
            with shm.claim_backing(second, str(path), shared=True):
                assert len(shm.claims()) == 2
                began = time.monotonic()
                with pytest.raises(ClaimError) as caught:
                    shm.claim_backing(third, str(path), shared=False)
                assert time.monotonic() - began < 2 and str(os.getpid()) in caught.value.holder
            one.release()
            assert shm.claims() == []
            with pytest.raises(ClaimError):  # both descriptors are still open: their I/O may be
                shm.claim_backing(third, str(path), shared=False, timeout=0.03)
            assert shm.claims() == []
    fd = backing(path)
    with shm.claim_backing(fd, str(path), shared=False):
        os.close(fd)  # the claim holds the open file
        other = backing(path, os.O_RDONLY)
        with pytest.raises(ClaimError):
            shm.claim_backing(other, str(path), shared=True)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with shm.claim_backing(other, str(path), shared=True, timeout=0):
        pass
    os.close(other)


def test_claim_backing_waits_for_the_last_io(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    dead, fd = backing(path), backing(path)
    fcntl.flock(dead, fcntl.LOCK_EX)
    later = threading.Timer(0.1, os.close, (dead,))
    later.start()
    began = time.monotonic()
    with shm.claim_backing(fd, str(path), shared=False):
        assert time.monotonic() - began > 0.08
    later.join()
    os.close(fd)


def test_claim_of_a_killed_server_is_free(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    other = start("held = shm.claim_backing(os.open(sys.argv[1], os.O_RDWR), sys.argv[1], shared=False)\n"
                  "print(flush=True)\nsys.stdin.readline()", str(path))
    line(other)
    fd = backing(path)
    with pytest.raises(ClaimError):
        shm.claim_backing(fd, str(path), shared=True)
    kill(other)
    shm.claim_backing(fd, str(path), shared=False, timeout=0).release()
    os.close(fd)
