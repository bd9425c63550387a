"""/dev/muendiskX as its user meets it: file systems, real files, fio, and every way to die under a mount."""

from __future__ import annotations

import contextlib
import errno
import glob
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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Program, leftovers, unique

from muenfast.attach import fuse, loop

pytestmark = [pytest.mark.root, pytest.mark.fuse,
              pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]

Start = Callable[..., Program]

MIB = 1 << 20
SIZES = [512, 1024, 2048, 4096, 4097, MIB, 4 * MIB, 10 * MIB, 25 * MIB, 40 * MIB]


def command(*words: str | os.PathLike[str], timeout: float = 60, status: int | None = 0) -> str:
    """Runs a program; what it printed. status: what it must end with, None: anything."""
    done = subprocess.run([os.fspath(word) for word in words], capture_output=True, text=True, timeout=timeout,
                          check=False)
    assert status in (None, done.returncode), f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def until(condition: Callable[[], bool], what: str, seconds: float = 15) -> None:
    """Waits for it; a limit against hanging, no measurement."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def mounted(device: str | Path, directory: Path, *options: str) -> Iterator[Path]:
    """The device mounted there; unmounted in any case."""
    directory.mkdir(exist_ok=True)
    command("mount", *options, device, directory)
    try:
        yield directory
    finally:
        command("umount", directory)


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    """Whatever a failed test left mounted goes, or each later test would fail too."""
    yield
    for directory in leftovers(tmp_path)["mounts"]:
        command("umount", "-l", directory, status=None)


def fill(directory: Path, seed: int) -> dict[str, str]:
    """Random files of all SIZES; their digests by name."""
    digests = {}
    for size in SIZES:
        data = random.Random(seed + size).randbytes(size)
        (directory / f"file{size}").write_bytes(data)
        digests[f"file{size}"] = hashlib.sha256(data).hexdigest()
    command("sync", "-f", directory)
    return digests


def digests_of(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def clean(device: str | Path) -> None:
    """fsck finds nothing, and changes nothing."""
    command("fsck", "-f", "-n", device)


def disks(client: Program) -> list[str]:
    """The devices that a client named, in order."""
    return [line.split()[-1] for line in client.lines]


def free_name() -> str:
    """The name that the next client takes: the first without a node."""
    return next(name for name in loop.device_names() if not os.path.lexists(f"/dev/{name}"))


def position(device: str) -> int:
    name = device.removeprefix("/dev/")
    return next(i for i, each in enumerate(itertools.islice(loop.device_names(), 10000)) if each == name)


@pytest.fixture
def pair() -> list[str]:
    """--req and --resp of one connection."""
    return ["--req", unique("req"), "--resp", unique("resp")]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk image, all holes."""
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(256 * MIB)
    return path


def test_two_disks_with_file_systems(program: Start, tmp_path: Path, image: Path) -> None:
    """A file and a RAM disk appear in the order of the lists; ext4 and ext2 on them keep files of every size over
    unmounting, over another client, and the file's file system stands on its own afterwards."""
    others = {node for node in glob.glob("/dev/muendisk*")}
    lists = ["--req", f"{unique('a')},{unique('b')}", "--resp", f"{unique('c')},{unique('d')}"]
    server = program("blk", *lists, "--device", f"{image},ram:256M")
    client = program("blk", "--client", *lists)
    first, second = disks(client)
    assert position(first) < position(second)
    if not others and set(glob.glob("/dev/muendisk*")) == {first, second}:
        assert (first, second) == ("/dev/muendiska", "/dev/muendiskb")
    for device in (first, second):
        assert stat.S_ISBLK(os.stat(device).st_mode)
        assert command("blockdev", "--getsize64", "--getss", "--getro", device).split() == [str(256 * MIB), "4096", "0"]
    command("mkfs.ext4", "-q", first)
    command("mkfs.ext2", "-q", second)
    places = [(first, tmp_path / "one"), (second, tmp_path / "two")]
    written = []
    for seed, (device, directory) in enumerate(places):
        with mounted(device, directory):
            written.append(fill(directory, seed))
    for (device, directory), digests in zip(places, written, strict=True):
        with mounted(device, directory):
            assert digests_of(directory) == digests
        clean(device)
    assert client.end() == (0, "")
    assert not os.path.lexists(first) and not os.path.lexists(second)

    client = program("blk", "--client", *lists)
    assert disks(client) == [first, second] or others
    for device, (_, directory), digests in zip(disks(client), places, written, strict=True):
        with mounted(device, directory):
            assert digests_of(directory) == digests
        clean(device)
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    with mounted(image, tmp_path / "one", "-o", "loop,ro"):
        assert digests_of(tmp_path / "one") == written[0]
    clean(image)


def test_a_read_only_export(program: Start, tmp_path: Path, image: Path, pair: list[str]) -> None:
    """The device says that it is read-only, mounts so, refuses to be written, and the file does not change."""
    command("mkfs.ext4", "-q", "-F", "-b", "4096", image)  # of a file it would choose less than the disk's sectors
    with mounted(image, tmp_path / "mnt", "-o", "loop"):
        digests = fill(tmp_path / "mnt", 7)
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    server = program("blk", *pair, "--device", str(image), "--read-only")
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    assert command("blockdev", "--getro", device) == "1\n"
    with mounted(device, tmp_path / "mnt", "-o", "ro"):
        assert digests_of(tmp_path / "mnt") == digests
        with pytest.raises(OSError) as refused:
            (tmp_path / "mnt" / "more").write_text("more")
        assert refused.value.errno == errno.EROFS
    said = command("dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "conv=fsync", status=1)
    assert "not permitted" in said or "Read-only" in said
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before


@pytest.mark.stress
@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_random_traffic_is_verified(program: Start, pair: list[str], tmp_path: Path) -> None:
    """Direct reads and writes in random order, 32 at a time, each block with a checksum: fio finds no error."""
    server = program("blk", *pair, "--device", "ram:128M")
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    said = command("fio", "--name=verify", f"--filename={device}", "--rw=randrw", "--verify=crc32c", "--direct=1",
                   "--ioengine=libaio", "--iodepth=32", "--bs=4k", "--runtime=8", "--time_based", "--verify_fatal=1",
                   "--verify_backlog=4096", "--output-format=json", f"--output={tmp_path}/fio.json",
                   f"--aux-path={tmp_path}", "--verify_state_save=0")
    (job,) = json.loads((tmp_path / "fio.json").read_text())["jobs"]
    assert job["error"] == 0, said
    assert job["read"]["total_ios"] > 0 and job["write"]["total_ios"] > 0
    (answer,) = [entry for entry in json.loads(command(sys.executable, "-m", "muenfast", "stat", "--json"))
                 if entry["command"] == "blk --client"]
    assert answer["entries"][0]["counters"]["errors"] == 0
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def test_names_in_use_are_skipped(program: Start) -> None:
    """Two clients at once have two devices, and a name that was given back is the next one's."""
    pairs = [["--req", unique("req"), "--resp", unique("resp")] for _ in range(2)]
    servers = [program("blk", *each, "--device", "ram:4096") for each in pairs]
    clients = [program("blk", "--client", *each) for each in pairs]
    (first,), (second,) = map(disks, clients)
    assert first != second
    assert clients[0].end() == (0, "")
    third = program("blk", "--client", *pairs[0])
    assert disks(third) != [second] and position(disks(third)[0]) <= position(second) + 1
    for each in (third, clients[1], *servers):
        assert each.end() == (0, "")


def test_no_device_is_asked_for(program: Start, pair: list[str]) -> None:
    """--attach none: the connection stands, and no node, loop device or mount is made."""
    nodes = set(glob.glob("/dev/muendisk*"))
    server = program("blk", *pair, "--device", "ram:4096")
    client = program("blk", "--client", "--attach", "none", *pair)
    assert disks(client) == ["-"]
    for node in set(glob.glob("/dev/muendisk*")) - nodes:  # somebody else's, then
        assert f"-{client.pid}/" not in (loop.backing_file(loop.loop_of(node) or 0) or "")
    assert client.end() == (0, "")
    assert server.end() == (0, "")


# ---- nodes that others made


@contextlib.contextmanager
def node(make: Callable[[str], None]) -> Iterator[str]:
    path = f"/dev/{free_name()}"
    make(path)
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def test_a_stale_node_is_replaced(program: Start, pair: list[str]) -> None:
    """A node of a loop device that nobody uses was left behind: its name is taken again."""
    server = program("blk", *pair, "--device", "ram:1M")
    unused = next(number for number in range(200, 256) if not loop.is_bound(number))
    with node(lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, unused))) as path:
        client = program("blk", "--client", *pair)
        assert disks(client) == [path]
        assert loop.loop_of(path) != unused
        assert client.end() == (0, "")
        assert not os.path.lexists(path)
    assert server.end() == (0, "")


@pytest.mark.parametrize("kind", ["used loop device", "other block device", "file", "symbolic link"])
def test_a_foreign_node_is_left_alone(program: Start, pair: list[str], tmp_path: Path, kind: str) -> None:
    """What somebody else put there, the kernel's own module perhaps, stays; the next name is taken."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(MIB))
    used = command("losetup", "--find", "--show", backing).strip()
    make: dict[str, Callable[[str], None]] = {
        "used loop device": lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.stat(used).st_rdev),
        "other block device": lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(259, 77)),
        "file": lambda path: Path(path).write_text("mine"),
        "symbolic link": lambda path: os.symlink("nowhere", path)}
    server = program("blk", *pair, "--device", "ram:1M")
    try:
        with node(make[kind]) as path:
            before = os.lstat(path)[:4]  # mode, inode, device, links: a look changes the time of access
            client = program("blk", "--client", *pair)
            (device,) = disks(client)
            assert position(device) > position(path)
            assert client.end() == (0, "")
            assert os.lstat(path)[:4] == before and not os.path.lexists(device)
    finally:
        command("losetup", "--detach", used)
    assert server.end() == (0, "")


# ---- leaving and dying under a mounted file system


def stuck(*words: str) -> list[str]:
    """Processes whose command line has one of these words and that cannot be killed, however long one looks."""
    found: set[str] | None = None
    for _ in range(10):
        now = set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and re.search(r"\) D ", (entry / "stat").read_text()) and \
                        any(word in (entry / "cmdline").read_text() for word in words):
                    now.add(entry.name)
        found = now if found is None else found & now
        time.sleep(0.05)
    return sorted(found or ())


def test_a_client_leaves_while_mounted(program: Start, tmp_path: Path, image: Path, pair: list[str]) -> None:
    """It ends in bounded time, with status 0 and a warning that names the mount; what was written is on the disk, the
    mount can be taken away, and then the loop device is free."""
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    number = loop.loop_of(device)
    assert number is not None
    command("mkfs.ext4", "-q", device)
    directory = tmp_path / "mnt"
    with mounted(device, directory):
        (directory / "file").write_bytes(b"written, not synced" * 1000)
        status, errors = client.end(timeout=30)
        assert status == 0
        assert f"muenfast: {device} is still mounted on {directory} (ext4)\n" in errors
        assert "Traceback" not in errors
        assert not os.path.lexists(device)
    until(lambda: not loop.is_bound(number), f"loop{number} free")
    assert server.end() == (0, "")
    command("fsck.ext4", "-f", "-y", image, status=None)
    with mounted(image, directory, "-o", "loop,ro"):
        assert (directory / "file").read_bytes() == b"written, not synced" * 1000


def test_a_client_is_killed_while_mounted(program: Start, tmp_path: Path, image: Path, pair: list[str]) -> None:
    """kill -9: node and claim are gone within seconds, the mount can be taken away, the next client has the same name
    and finds what was synced."""
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    number = loop.loop_of(device)
    assert number is not None
    command("mkfs.ext4", "-q", device)
    directory = tmp_path / "mnt"
    with mounted(device, directory):
        digests = fill(directory, 3)
        (directory / "late").write_bytes(bytes(MIB))  # dirty when its disk dies
        assert client.end(signal.SIGKILL)[0] == -signal.SIGKILL
        until(lambda: loop.loop_of(device) != number, f"{device} gone")
    until(lambda: not loop.is_bound(number), f"loop{number} free")
    again = program("blk", "--client", *pair)
    assert position(disks(again)[0]) <= position(device)
    command("fsck.ext4", "-f", "-y", disks(again)[0], status=None)
    with mounted(disks(again)[0], directory):
        assert digests_of(directory).items() >= digests.items()
    clean(disks(again)[0])
    assert again.end() == (0, "")
    assert server.end() == (0, "")


def test_a_killed_client_does_not_hold_up_the_next(program: Start, tmp_path: Path, pair: list[str]) -> None:
    """The next client starts at once, without anybody cleaning up or unmounting, and works."""
    server = program("blk", *pair, "--device", "ram:64M")
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    command("mkfs.ext4", "-q", device)
    with mounted(device, tmp_path / "mnt"):
        assert client.end(signal.SIGKILL)[0] == -signal.SIGKILL
        again = program("blk", "--client", *pair)
        clean_device = disks(again)[0]
        assert command("blockdev", "--getsize64", clean_device) == f"{64 * MIB}\n"
        assert again.end() == (0, "")
    assert server.end() == (0, "")


def test_a_server_is_killed_while_mounted(program: Start, tmp_path: Path, image: Path, pair: list[str]) -> None:
    """kill -9 in the middle of writing and a new server: the file system goes on without an error and nothing is
    lost."""
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    command("mkfs.ext4", "-q", device)
    directory, source = tmp_path / "mnt", tmp_path / "source"
    source.mkdir()
    digests = fill(source, 11)
    with mounted(device, directory):
        for turn in range(3):
            into = directory / str(turn)
            into.mkdir()
            copy = subprocess.Popen(["sh", "-c", f"cp {source}/* {into} && sync -f {into}"], stderr=subprocess.PIPE)
            time.sleep(0.03 * turn)
            assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
            time.sleep(0.3)
            server = program("blk", *pair, "--device", str(image))
            _, errors = copy.communicate(timeout=60)
            assert (copy.returncode, errors) == (0, b"")
            if turn:
                shutil.rmtree(directory / str(turn - 1))
        command("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches", status=None)
        assert digests_of(directory / "2") == digests
    clean(device)
    status, errors = client.end()
    assert status == 0
    assert 1 <= errors.count("the server is gone") <= 3   # at most one line a second; the others are counted
    assert server.end() == (0, "")
    clean(image)


def test_another_store_is_not_mistaken_for_the_first(program: Start, pair: list[str]) -> None:
    """A RAM disk dies with its server: the next server's is another one, so the device fails, for good, and says so."""
    server = program("blk", *pair, "--device", "ram:1M")
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    server.end(signal.SIGKILL)
    server = program("blk", *pair, "--device", "ram:1M")
    said = command("dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", status=1)
    assert "Input/output error" in said
    status, errors = client.end()
    assert status == 0
    assert "the server returned with another store: every request fails from now on" in errors
    assert server.end() == (0, "")


def test_fail_instead_of_waiting(program: Start, image: Path, pair: list[str]) -> None:
    """--on-peer-loss fail: without a server requests fail at once; once it is back, the device works again."""
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", "--on-peer-loss", "fail", *pair)
    (device,) = disks(client)
    read = ["dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]
    command(*read)
    assert server.end() == (0, "")
    until(lambda: "Input/output error" in command(*read, status=None), "failing reads")
    server = program("blk", *pair, "--device", str(image))
    until(lambda: "1+0 records in" in command(*read, status=None), "reads again")
    status, errors = client.end()
    assert status == 0 and "requests fail until it returns" in errors
    assert server.end() == (0, "")


def test_a_stopped_server_does_not_hold_the_client(program: Start, tmp_path: Path, image: Path,
                                                  pair: list[str]) -> None:
    """The server hangs, data is dirty: SIGTERM still ends the client within 15 s, the mount can be taken away, and
    nobody waits uninterruptibly."""
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    number = loop.loop_of(device)
    assert number is not None
    command("mkfs.ext4", "-q", device)
    directory = tmp_path / "mnt"
    with mounted(device, directory):
        command("sync", "-f", directory)
        server.process.send_signal(signal.SIGSTOP)
        try:
            # In a process of its own: it waits for blocks that nobody delivers.
            writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={directory}/file", "bs=1M", "count=1"],
                                      stderr=subprocess.DEVNULL)
            time.sleep(0.2)
            status, errors = client.end(timeout=15)
            assert status == 0
            assert errors and "Traceback" not in errors
            assert not os.path.lexists(device)
            writer.wait(timeout=15)
        finally:
            server.process.send_signal(signal.SIGCONT)
    until(lambda: not loop.is_bound(number), f"loop{number} free")
    assert stuck(str(tmp_path), pair[1], f"loop{number}") == []
    assert server.end() == (0, "")


def test_a_stopped_server_does_not_hold_an_unused_device(program: Start, pair: list[str]) -> None:
    """The same without a mount or a request."""
    server = program("blk", *pair, "--device", "ram:1M")
    client = program("blk", "--client", *pair)
    server.process.send_signal(signal.SIGSTOP)
    try:
        assert client.end(timeout=15)[0] == 0
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert server.end() == (0, "")


def test_a_slow_disk_gets_what_is_dirty(program: Start, tmp_path: Path) -> None:
    """A client that ends gives its server all the time that it takes, for as long as that goes on answering."""
    image = tmp_path / "image"
    image.write_bytes(bytes(3 * MIB))
    lists = ["--req", unique("a"), "--resp", unique("c")]
    server = program("blk", *lists, "--device", str(image), "--inject", "delay=250ms,on=write")
    client = program("blk", "--client", *lists)
    data = os.urandom(3 * MIB)
    with open(client.lines[0].split()[4], "wb", buffering=0) as disk:   # into the page cache; the last close would write it
        assert disk.write(data) == len(data)
        status, errors = client.end(timeout=60)
        assert status == 0 and "lost" not in errors and "fail" not in errors
    assert server.end() == (0, "")
    assert image.read_bytes() == data


# ---- demo


def said_by_demo(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tree: ") and lines[-1].startswith("demo: everything came back")
    assert [line for line in lines if re.fullmatch(r"sha256: \d+ files equal", line)]
    assert "fsck.ext4 -f -n: clean" in lines
    (server,) = [line for line in lines if line.startswith("server: export ")]
    assert server.split()[4] == str(64 * MIB)
    for name in server.split()[2:4]:
        assert not os.path.exists(f"/dev/shm/{name}") and not os.path.exists(f"/dev/shm/{name}.bell")
    return done.stdout


def tree(below: Path) -> Path:
    """Some files, two directories deep, an empty one among them."""
    top = below / "tree"
    (top / "deep" / "deeper").mkdir(parents=True)
    for number, size in enumerate((0, 1, 4096, 100_000, 3 * MIB)):
        (top / ("deep/deeper" if number % 2 else "deep") / f"file {number}").write_bytes(os.urandom(size))
    return top


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root: a real device, a mounted ext4, the files' digests; said step by step, and nothing is left."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    done = subprocess.run([sys.executable, "-m", "muenfast", "demo", "--tree", str(tree(tmp_path)), "--size", "64M"],
                          capture_output=True, text=True, timeout=120, check=False)
    said = said_by_demo(done)
    (device,) = re.findall(r"^client: disk .* (/dev/muendisk[a-z]+)$", said, re.MULTILINE)
    assert f"mkfs.ext4 {device}" in said
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_demo_without_root(tmp_path: Path) -> None:
    """As a user who may not mount: the same through the Python API, and the reason why is said."""
    home = tmp_path / "home"
    for directory in (home, home / "tmp", home / "run"):
        directory.mkdir(mode=0o700)
        os.chown(directory, 65534, 65534)
    files = tree(tmp_path)
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"),
                   "MUENFAST_RUNTIME_DIR": str(home / "run"), "PYTHONDONTWRITEBYTECODE": "1"}
    # The interpreter and the sources may lie where that user may not look: reading is all that is added.
    done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                           "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
                           "--bounding-set=-all,+dac_read_search", sys.executable, "-m", "muenfast", "demo",
                           "--tree", str(files), "--size", "64M"],
                          env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = said_by_demo(done)
    assert "no block device here (" in said and "CAP_SYS_ADMIN" in said
    assert "write through the channels: 67.1 MB" in said
    assert list((home / "tmp").iterdir()) == []
    assert [path for path in (home / "run").rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("written", [False, True], ids=["nothing since", "something since"])
def test_a_client_ends_after_its_server(program: Start, pair: list[str], written: bool) -> None:
    """A flush that fails is worth a warning only where something was written since the last good one."""
    server = program("blk", *pair, "--device", "ram:8M")
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    with open(device, "r+b", buffering=0) as file:
        file.write(bytes(MIB))
        os.fsync(file)
    if written:
        fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
        with mmap.mmap(-1, 4096) as page:
            os.pwrite(fd, page, 0)
        os.close(fd)
    assert server.end() == (0, "")
    status, errors = client.end(timeout=30)
    assert status == 0
    assert ("the last flush failed" in errors) == written
