"""Partitions of an attached disk: /dev/muendiskaN as its user meets them, while tables change and processes die."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import logging
import os
import random
import select
import shutil
import signal
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Program, leftovers, run, unique
from test_device import clean, command, digests_of, disks, fill, free_name, mounted, until

from muenfast import doctor
from muenfast.attach import fuse, loop, partitions, watchdog

pytestmark = [pytest.mark.root, pytest.mark.fuse,
              pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}"),
              pytest.mark.skipif(shutil.which("sfdisk", path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None,
                                 reason="needs sfdisk")]

Start = Callable[..., Program]

MIB = 1 << 20


def sfdisk(path: str | Path, script: str, *options: str) -> str:
    done = subprocess.run(["sfdisk", "--quiet", *options, str(path)], input=script, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def parts(device: str) -> dict[int, tuple[int, int]]:
    """(start, size) in bytes of the partitions that have a node, each of which is that of the right device."""
    number = loop.loop_of(device)
    assert number is not None
    kernels = partitions.of_kernel(f"loop{number}")
    found = {}
    for node in glob.glob(f"{device}[0-9]*"):
        each = int(node.removeprefix(device))
        status = os.stat(node)
        if each not in kernels or status.st_rdev != kernels[each].number:
            continue  # on its way
        assert stat.S_ISBLK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
        found[each] = (kernels[each].start, kernels[each].size)
    return found


def become(device: str, expected: dict[int, tuple[int, int]]) -> None:
    """Nodes and partitions are these, soon, and no others."""
    number = loop.loop_of(device)
    assert number is not None
    until(lambda: parts(device) == expected and len(glob.glob(f"{device}[0-9]*")) == len(expected) ==
          len(partitions.of_kernel(f"loop{number}")), f"partitions {expected} of {device}, which has {parts(device)}")


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    """Whatever a failed test left mounted goes, or each later test would fail too."""
    yield
    for directory in leftovers(tmp_path)["mounts"]:
        command("umount", "-l", directory, status=None)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(400 * MIB)
    return path


@pytest.fixture
def pair() -> list[str]:
    """--req and --resp of one connection."""
    return ["--req", unique("req"), "--resp", unique("resp")]


@pytest.fixture
def attached(program: Start, image: Path, pair: list[str]) -> Iterator[tuple[str, Program, Program]]:
    """The image, attached: device, client, server; both end well."""
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    yield disks(client)[0], client, server
    for each in (client, server):
        if each.process.returncode is None:
            assert each.end()[0] == 0


# ---- a disk with file systems


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_file_systems_on_partitions(program: Start, tmp_path: Path, image: Path, pair: list[str], label: str) -> None:
    """Two file systems and raw bytes on three partitions, made on the file, keep what is written to them over the
    device of the whole disk and over devices of single partitions, with both ways in turn, and fsck agrees."""
    sfdisk(image, f"label: {label}\nsize=180MiB\nsize=180MiB\nsize=10MiB\n")
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    assert client.lines[0].split() == ["disk", pair[1], pair[3], str(400 * MIB), device]
    assert parts(device) == {1: (MIB, 180 * MIB), 2: (181 * MIB, 180 * MIB), 3: (361 * MIB, 10 * MIB)}  # by `ready`
    command("mkfs.ext4", "-q", f"{device}1")
    command("mkfs.ext2", "-q", f"{device}2")
    written = {}
    for number in (1, 2):
        with mounted(f"{device}{number}", tmp_path / "mnt"):
            assert f"{device}{number} {tmp_path}/mnt " in Path("/proc/mounts").read_text()
            written[number] = fill(tmp_path / "mnt", number)
        clean(f"{device}{number}")
    raw = random.Random(3).randbytes(10 * MIB)
    Path(f"{device}3").write_bytes(raw)
    assert client.end() == (0, "") and server.end() == (0, "")
    assert not glob.glob(f"{device}*")
    assert image.read_bytes()[361 * MIB:371 * MIB] == raw

    names = [unique("part") for _ in range(6)]
    lists = ["--req", ",".join(names[:3]), "--resp", ",".join(names[3:])]
    server = program("blk", *lists, "--device", ",".join(f"{image}#{number}" for number in (1, 2, 3)))
    client = program("blk", "--client", *lists)
    single = disks(client)
    for number in (1, 2):
        clean(single[number - 1])
        with mounted(single[number - 1], tmp_path / "mnt"):
            assert digests_of(tmp_path / "mnt") == written[number]
            (tmp_path / "mnt" / "more").write_bytes(b"more")
            written[number]["more"] = hashlib.sha256(b"more").hexdigest()
    with open(single[2], "r+b") as file:
        assert file.read() == raw
        file.seek(0)
        file.write(b"new" * 4096)
    raw = b"new" * 4096 + raw[3 * 4096:]
    assert client.end() == (0, "") and server.end() == (0, "")

    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    for number in (1, 2):
        clean(f"{device}{number}")
        with mounted(f"{device}{number}", tmp_path / "mnt", "-o", "ro"):
            assert digests_of(tmp_path / "mnt") == written[number]
    assert Path(f"{device}3").read_bytes() == raw
    assert client.end() == (0, "") and server.end() == (0, "")


def test_a_read_only_disk_has_partitions_too(program: Start, image: Path, pair: list[str]) -> None:
    """They are as read-only as the disk."""
    sfdisk(image, "label: gpt\nsize=10MiB\n")
    server = program("blk", *pair, "--device", str(image), "--read-only")
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    assert list(parts(device)) == [1]
    assert command("blockdev", "--getro", f"{device}1") == "1\n"
    assert client.end() == (0, "") and server.end() == (0, "")


# ---- tables that change


def test_a_table_is_rewritten(attached: tuple[str, Program, Program]) -> None:
    """By sfdisk on the device, which counts in its 4096-byte sectors, in any label: the nodes follow, and end with the
    table."""
    device, client, _ = attached
    assert parts(device) == {}
    sfdisk(device, "label: dos\nsize=10MiB\nsize=300MiB, type=5\nsize=20MiB\nsize=30MiB\n")
    until(lambda: len(parts(device)) == 3, "three partitions")
    before = parts(device)
    assert before[1] == (MIB, 10 * MIB) and set(before) == {1, 3, 4}
    sfdisk(device, "label: dos\nx1: size=10MiB\nx2: size=300MiB, type=5\nx5: size=20MiB\nx6: size=30MiB\n", "--wipe=always")
    until(lambda: set(parts(device)) == {1, 5, 6}, "logical partitions")
    assert [parts(device)[number][1] for number in (1, 5, 6)] == [10 * MIB, 20 * MIB, 30 * MIB]
    sfdisk(device, "label: gpt\nsize=10MiB\nsize=20MiB\nsize=30MiB\n")
    become(device, {1: (MIB, 10 * MIB), 2: (11 * MIB, 20 * MIB), 3: (31 * MIB, 30 * MIB)})
    command("sfdisk", "--delete", device, "2")
    become(device, {1: (MIB, 10 * MIB), 3: (31 * MIB, 30 * MIB)})
    sfdisk(device, ",20M\n", "--append")
    until(lambda: len(parts(device)) == 3, "a third one again")
    command("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=1", "conv=fsync")
    command("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=1", "seek=399", "conv=fsync")
    become(device, {})
    assert client.end() == (0, "")


def test_a_table_is_copied_there(attached: tuple[str, Program, Program], tmp_path: Path) -> None:
    """Nobody tells the kernel: that its blocks were written is enough, also of one logical partition's record; direct
    writes count as others do."""
    device, _, _ = attached
    other = tmp_path / "other"
    with open(other, "wb") as file:
        file.truncate(400 * MIB)
    sfdisk(other, "label: dos\nx1: start=1MiB, size=90MiB\nx2: start=100MiB, size=290MiB, type=5\n"
                  "x5: start=101MiB, size=20MiB\nx6: start=131MiB, size=20MiB\n")
    told = {1: (MIB, 90 * MIB), 5: (101 * MIB, 20 * MIB), 6: (131 * MIB, 20 * MIB)}
    command("dd", f"if={other}", f"of={device}", "bs=1M", "conv=fsync")
    become(device, told)
    record = bytearray(other.read_bytes()[100 * MIB:100 * MIB + 4096])
    struct.pack_into("<I", record, 446 + 12, 10 * MIB // 512)     # the first logical one's size
    (tmp_path / "record").write_bytes(record)
    command("dd", f"if={tmp_path}/record", f"of={device}", "bs=4096", f"seek={100 * MIB // 4096}", "oflag=direct")
    become(device, {**told, 5: (101 * MIB, 10 * MIB)})


@pytest.mark.parametrize("ask", ["--rereadpt", "partx"])
def test_partitions_taken_from_the_kernel_come_back(attached: tuple[str, Program, Program], ask: str) -> None:
    """Where the kernel has no parser, its re-reading leaves none, and partx can delete them; the table still has
    them."""
    device, _, _ = attached
    sfdisk(device, "label: gpt\nsize=10MiB\nsize=10MiB\n")
    told = {1: (MIB, 10 * MIB), 2: (11 * MIB, 10 * MIB)}
    become(device, told)
    for _ in range(3):
        if ask == "partx":
            command("partx", "--delete", loop.path_of(loop.loop_of(device) or 0))
        else:
            command("blockdev", ask, device, status=None)
        become(device, told)


def test_nodes_of_a_living_client_are_nobodys_leftovers(attached: tuple[str, Program, Program], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """While its partitions are gone for a moment others, which have other books, clean up; and what somebody removes all
    the same is made anew with the next look."""
    device, _, _ = attached
    sfdisk(device, "label: gpt\nsize=10MiB\nsize=10MiB\n")
    told = {1: (MIB, 10 * MIB), 2: (11 * MIB, 10 * MIB)}
    become(device, told)
    take = ("partx", "--delete", loop.path_of(loop.loop_of(device) or 0))
    monkeypatch.setenv("MUENFAST_RUNTIME_DIR", str(tmp_path / "elsewhere"))
    stop, found = threading.Event(), []

    def clean_up() -> None:
        while not stop.is_set():
            for left in doctor.leftovers():
                if left.path.startswith(device):
                    found.append(left)
                    doctor.remove(left)

    cleaner = threading.Thread(target=clean_up)
    cleaner.start()
    try:
        for _ in range(10):
            command(*take)
            become(device, told)
    finally:
        stop.set()
        cleaner.join()
    assert not found
    os.unlink(f"{device}2")
    command(*take)
    become(device, told)


def test_a_partition_in_use_stays_until_it_is_free(attached: tuple[str, Program, Program], tmp_path: Path) -> None:
    """What is mounted is not taken away, nor its node; the others change at once; it follows with the unmounting."""
    device, client, _ = attached
    sfdisk(device, "label: gpt\nsize=100MiB\nsize=10MiB\n")
    become(device, {1: (MIB, 100 * MIB), 2: (101 * MIB, 10 * MIB)})
    command("mkfs.ext4", "-q", f"{device}1")
    with mounted(f"{device}1", tmp_path / "mnt"):
        node = os.stat(f"{device}1")
        sfdisk(device, "label: gpt\nstart=50MiB, size=20MiB\nstart=200MiB, size=20MiB\nstart=300MiB, size=10MiB\n",
               "--force", "--no-reread", "--wipe-partitions=never")
        become(device, {1: (MIB, 100 * MIB), 2: (200 * MIB, 20 * MIB), 3: (300 * MIB, 10 * MIB)})
        again = os.stat(f"{device}1")
        assert (again.st_ino, again.st_rdev) == (node.st_ino, node.st_rdev)
        (tmp_path / "mnt" / "file").write_bytes(bytes(MIB))
        command("sync", "-f", tmp_path / "mnt")
    become(device, {1: (50 * MIB, 20 * MIB), 2: (200 * MIB, 20 * MIB), 3: (300 * MIB, 10 * MIB)})
    status, errors = client.end()
    assert status == 0 and errors.count("is in use: it stays as it is until it is free") == 1


def test_growing_a_mounted_partition(attached: tuple[str, Program, Program], tmp_path: Path) -> None:
    """Its end may move while it is mounted, and the file system be grown into it afterwards."""
    device, client, _ = attached
    sfdisk(device, "label: gpt\nsize=100MiB\n")
    become(device, {1: (MIB, 100 * MIB)})
    command("mkfs.ext4", "-q", f"{device}1")
    with mounted(f"{device}1", tmp_path / "mnt"):
        sfdisk(device, ",300M\n", "-N1", "--force", "--no-reread")
        become(device, {1: (MIB, 300 * MIB)})
        (tmp_path / "mnt" / "file").write_bytes(bytes(MIB))
    clean(f"{device}1")
    command("e2fsck", "-f", "-p", f"{device}1")     # resize2fs wants one that wrote its time down
    command("resize2fs", f"{device}1")
    with mounted(f"{device}1", tmp_path / "mnt"):
        digests = fill(tmp_path / "mnt", 5)
    clean(f"{device}1")
    with mounted(f"{device}1", tmp_path / "mnt"):
        assert digests_of(tmp_path / "mnt").items() > digests.items()
    assert client.end() == (0, "")


# ---- tables that are none


def test_a_gpt_without_its_primary(program: Start, image: Path, pair: list[str]) -> None:
    """The backup is used, which is said."""
    sfdisk(image, "label: gpt\nsize=10MiB\n")
    with open(image, "r+b") as file:
        file.seek(512 + 60)
        file.write(b"x")
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    assert parts(device) == {1: (MIB, 10 * MIB)}
    status, errors = client.end()
    assert status == 0 and f"{device}: the primary GPT is bad" in errors
    assert server.end() == (0, "")


@pytest.mark.parametrize("kind", ["noise", "damaged", "odd", "hostile"])
def test_a_table_that_cannot_be_used(program: Start, image: Path, pair: list[str], kind: str) -> None:
    """The disk is there all the same, without those partitions, and the reason is said where there is a table."""
    said = {"noise": "", "damaged": "the GPT is damaged", "odd": "partition 1 does not begin at one of the disk's blocks",
            "hostile": "overlap"}[kind]
    with open(image, "r+b") as file:
        if kind == "noise":
            file.write(random.Random(1).randbytes(510) + b"\x55\xaa")
        elif kind == "hostile":
            entries = [(0x83, 1, 50), (0x83, 3, 50), (5, 5, 0xFFFFFFFF), (0x83, 0xFFFFFFFF, 0xFFFFFFFF)]
            file.seek(446)
            file.write(b"".join(struct.pack("<B3xB3xII", 0, *each) for each in entries) + b"\x55\xaa")
    if kind in ("damaged", "odd"):
        sfdisk(image, "label: gpt\nfirst-lba: 34\nstart=35, size=20001\nstart=40000, size=8001\n")
    if kind == "damaged":
        with open(image, "r+b") as file:
            for place in (512, 400 * MIB - 512):
                file.seek(place + 60)
                file.write(b"x")
    server = program("blk", *pair, "--device", str(image))
    client = program("blk", "--client", *pair)
    (device,) = disks(client)
    assert parts(device) == ({2: (40000 * 512, 8000 * 512)} if kind == "odd" else {})
    status, errors = client.end()
    assert status == 0 and said in errors and (said or not errors)
    assert server.end() == (0, "")


# ---- leaving and dying


def test_a_client_leaves_while_a_partition_is_mounted(attached: tuple[str, Program, Program], tmp_path: Path,
                                                      image: Path) -> None:
    """All nodes go, the warning names partition and mount, what was written is on the disk, and the loop device is free
    after the unmounting."""
    device, client, server = attached
    number = loop.loop_of(device)
    assert number is not None
    sfdisk(device, "label: gpt\nsize=200MiB\nsize=10MiB\n")
    become(device, {1: (MIB, 200 * MIB), 2: (201 * MIB, 10 * MIB)})
    command("mkfs.ext4", "-q", f"{device}1")
    with open(f"{device}2", "r+b") as file, mounted(f"{device}1", tmp_path / "mnt"):
        (tmp_path / "mnt" / "file").write_bytes(b"written, not synced" * 1000)
        file.write(b"raw" * 4096)
        file.flush()
        status, errors = client.end(timeout=30)
        assert status == 0
        assert f"muenfast: {device}1 is still mounted on {tmp_path}/mnt (ext4)\n" in errors
        assert f"process {os.getpid()} " in errors and f"still has {device}2 open" in errors
        assert not glob.glob(f"{device}*")
    until(lambda: not loop.is_bound(number) and not partitions.of_kernel(f"loop{number}"), f"loop{number} free")
    assert server.end() == (0, "")
    with open(image, "rb") as file:
        file.seek(201 * MIB)
        assert file.read(3 * 4096) == b"raw" * 4096
    with open(tmp_path / "one", "wb") as file:
        file.write(image.read_bytes()[MIB:201 * MIB])
    command("fsck.ext4", "-f", "-y", tmp_path / "one", status=None)
    with mounted(tmp_path / "one", tmp_path / "mnt", "-o", "loop,ro"):
        assert (tmp_path / "mnt" / "file").read_bytes() == b"written, not synced" * 1000


@pytest.mark.parametrize("use", [False, True], ids=["unused", "mounted"])
def test_a_client_is_killed(attached: tuple[str, Program, Program], program: Start, pair: list[str], tmp_path: Path,
                            use: bool) -> None:
    """kill -9: all nodes are gone within seconds, the partitions with their last user, and the next client has them."""
    device, client, _ = attached
    number = loop.loop_of(device)
    assert number is not None
    sfdisk(device, "label: gpt\nsize=200MiB\nsize=10MiB\n")
    told = {1: (MIB, 200 * MIB), 2: (201 * MIB, 10 * MIB)}
    become(device, told)
    command("mkfs.ext4", "-q", f"{device}1")
    with mounted(f"{device}1", tmp_path / "mnt") if use else contextlib.nullcontext():
        assert client.end(signal.SIGKILL)[0] == -signal.SIGKILL
        until(lambda: not glob.glob(f"{device}[0-9]*"), "no node of a partition")
    until(lambda: not loop.is_bound(number) and not partitions.of_kernel(f"loop{number}"), f"loop{number} free")
    again = program("blk", "--client", *pair)
    assert parts(disks(again)[0]) == told
    command("fsck.ext4", "-f", "-y", f"{disks(again)[0]}1", status=None)
    assert again.end() == (0, "")


def test_doctor_removes_what_nobody_else_did(attached: tuple[str, Program, Program]) -> None:
    """Client and watchdog are both killed: doctor names the nodes and removes them; once more it finds nothing."""
    device, client, _ = attached
    sfdisk(device, "label: gpt\nsize=200MiB\nsize=10MiB\n")
    until(lambda: len(parts(device)) == 2, "two partitions")
    [dog] = [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and _is_watchdog(pid, device)]
    os.kill(dog, signal.SIGKILL)
    assert client.end(signal.SIGKILL)[0] == -signal.SIGKILL
    # A dead client's thread may have the device open: only the end of its connection lets go of it.
    assert glob.glob(f"{device}[0-9]*")
    run("doctor", "--fix")
    assert not glob.glob(f"{device}*")
    again = run("doctor", "--fix")
    assert device not in again.stdout


def _is_watchdog(pid: str, device: str) -> bool:
    try:
        words = Path("/proc", pid, "cmdline").read_text().split("\0")
    except OSError:
        return False
    return watchdog.__file__ in words and device in words


def test_doctor_finds_nodes_of_partitions_that_are_gone() -> None:
    """A node without a device behind it, of a name that nobody claims."""
    path = f"/dev/{free_name()}7"
    dead = next(minor for minor in range(5000, 6000) if not os.path.exists(f"/sys/dev/block/259:{minor}"))
    try:
        for _ in range(20):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(259, dead))
            told = run("doctor").stdout
            if os.path.lexists(path):
                break       # or a server that another worker started has removed it
        assert f"left over: node {path} (its partition is gone)" in told
        run("doctor", "--fix")
        assert not os.path.lexists(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def test_a_foreign_node_is_left_alone(program: Start, image: Path, pair: list[str]) -> None:
    """What somebody else put where a partition's node belongs stays, which is said; the others are made."""
    sfdisk(image, "label: gpt\nsize=10MiB\nsize=10MiB\n")
    foreign = Path(f"/dev/{free_name()}1")
    foreign.write_text("mine")
    try:
        server = program("blk", *pair, "--device", str(image))
        client = program("blk", "--client", *pair)
        (device,) = disks(client)
        assert str(foreign) == f"{device}1" and os.path.exists(f"{device}2")
        status, errors = client.end()
        assert status == 0 and f"{device}1 is somebody else's and stays" in errors
        assert foreign.read_text() == "mine" and not os.path.exists(f"{device}2")
        assert server.end() == (0, "")
    finally:
        foreign.unlink()


def test_a_server_that_hangs_while_a_table_is_read(attached: tuple[str, Program, Program]) -> None:
    """The thread that reads it waits without end; the client leaves all the same, and nothing is left."""
    device, client, server = attached
    number = loop.loop_of(device)
    assert number is not None
    sfdisk(device, "label: gpt\nsize=10MiB\n")
    become(device, {1: (MIB, 10 * MIB)})
    command("blockdev", "--flushbufs", device)
    server.process.send_signal(signal.SIGSTOP)
    try:
        fd = os.open(device, os.O_RDONLY)
        try:
            partitions._blkpg(fd, partitions.DELETE, 1)   # the uevent makes the client look
        finally:
            os.close(fd)
        until(lambda: int(Path(f"/sys/block/loop{number}/inflight").read_text().split()[0]) > 0, "a read on its way")
        status, errors = client.end(timeout=15)
        assert status == 0 and "Traceback" not in errors
    finally:
        server.process.send_signal(signal.SIGCONT)
    until(lambda: not loop.is_bound(number), f"loop{number} free")


# ---- other kernels


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[..., fuse.FuseAttachment]]:
    """attach(table script) of a disk in plain memory in this process; detached at the end."""
    from muenfast._target import Memory

    made = []

    def attach(script: str) -> fuse.FuseAttachment:
        new = fuse.FuseAttachment.attach(Memory(16384), free_name(), tmp_path / "run")
        made.append(new)
        if script:
            sfdisk(new.device, script)
        return new

    yield attach
    for each in made:
        assert each.detach() == []


def write_table(attachment: fuse.FuseAttachment) -> None:
    """One partition of 1 MiB at 1 MiB, by the FUSE file: sfdisk would ask the real kernel to re-read."""
    with open(f"{attachment.mountpoint}/disk", "r+b", buffering=0) as file:
        block = bytearray(4096)
        struct.pack_into("<B3xB3xII", block, 446, 0, 0x83, 256, 256)
        block[510:512] = b"\x55\xaa"
        file.write(block)


@pytest.mark.parametrize("behind", [{1: 1}, {2: 1}, {1: 1, 2: 2}])
def test_who_writes_a_table_may_add_its_partitions(place: Callable[..., fuse.FuseAttachment],
                                                   monkeypatch: pytest.MonkeyPatch, behind: dict[int, int]) -> None:
    """Right behind our requests for a re-reading, as sfdisk may, each of them once: that is not taken for the kernel's own
    doing, which would leave the partitions to it from then on. behind: which request, and the partition's number."""
    real, calls = fcntl.ioctl, []

    def ioctl(fd: int, request: int, *arguments: object) -> object:
        result = real(fd, request, *arguments)  # type: ignore[arg-type]
        if request == partitions.BLKRRPART:
            calls.append(request)
            if (number := behind.get(len(calls))) is not None:
                partitions._blkpg(fd, partitions.ADD, number, number * MIB, MIB)
        return result

    monkeypatch.setattr(partitions.fcntl, "ioctl", ioctl)
    attachment = place("")
    write_table(attachment)
    become(attachment.device, {1: (MIB, MIB)})
    until(lambda: len(calls) == 2, "both re-readings")
    command("partx", "--delete", loop.path_of(attachment.loop))
    become(attachment.device, {1: (MIB, MIB)})


def test_a_kernel_that_parses_is_believed(place: Callable[..., fuse.FuseAttachment],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its re-reading makes partitions, those are shown, whatever we think of the table, and none is changed."""
    real, calls = fcntl.ioctl, []

    def ioctl(fd: int, request: int, *arguments: object) -> object:
        calls.append(request)
        if request == partitions.BLKRRPART:
            with contextlib.suppress(OSError):      # there already
                partitions._blkpg(fd, partitions.ADD, 9, 8 * MIB, MIB)
            return 0
        return real(fd, request, *arguments)   # type: ignore[arg-type]

    monkeypatch.setattr(partitions.fcntl, "ioctl", ioctl)
    attachment = place("")
    write_table(attachment)
    until(lambda: os.path.exists(f"{attachment.device}9"), "the kernel's partition")
    assert parts(attachment.device) == {9: (8 * MIB, MIB)}
    assert calls.count(partitions.BLKRRPART) == 2
    fd = os.open(attachment.device, os.O_RDONLY)
    partitions._blkpg(fd, partitions.ADD, 10, 16 * MIB, MIB)
    partitions._blkpg(fd, partitions.DELETE, 9)
    os.close(fd)
    become(attachment.device, {10: (16 * MIB, MIB)})


def test_a_machine_without_uevents(place: Callable[..., fuse.FuseAttachment], monkeypatch: pytest.MonkeyPatch,
                                   caplog: pytest.LogCaptureFixture) -> None:
    """It is looked now and then."""
    class Refusing:
        def __init__(self, *arguments: object) -> None:
            raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(partitions.socket, "socket", Refusing)
        attachment = place("label: gpt\nsize=10MiB\n")
        become(attachment.device, {1: (MIB, 10 * MIB)})
    assert "no uevents" in caplog.text
    command("partx", "--delete", loop.path_of(attachment.loop))
    become(attachment.device, {1: (MIB, 10 * MIB)})


def test_a_failure_at_the_last_moment_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All or nothing: neither node nor loop device, whatever fails."""
    from muenfast._target import Memory

    def refuse(self: partitions.Partitions) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(partitions.Partitions, "start", refuse)
    name = free_name()
    with pytest.raises(OSError, match="Too many open files"):
        fuse.FuseAttachment.attach(Memory(64), name, tmp_path / "run")
    assert not os.path.lexists(f"/dev/{name}") and watchdog.loops_below(str(tmp_path)) == []


def test_watched_blocks(place: Callable[..., fuse.FuseAttachment]) -> None:
    """Exactly writes that touch a watched range are told, however the ranges lie."""
    attachment = place("")
    attachment.partitions.stop(5)
    disk, dice = attachment.disk, random.Random(8)

    def told() -> bool:
        if not select.select([disk.watch_fd], [], [], 0)[0]:
            return False
        os.read(disk.watch_fd, 8)
        return True

    with open(f"{attachment.mountpoint}/disk", "r+b", buffering=0) as file:
        for count in (0, 1, 2, 3, 17, 100):
            ranges = [(first, first + dice.randrange(5)) for first in dice.choices(range(200), k=count)]
            disk.watch(ranges)
            told()
            for _ in range(100):
                block, size = dice.randrange(210), dice.randrange(1, 4)
                file.seek(block * 4096)
                file.write(bytes(size * 4096))
                assert told() == any(first < block + size and block < end and first < end for first, end in ranges)
    for bad in ([(-5, 3)], [(0, 1 << 64)], [(0, 1), ("a", 2)]):
        with pytest.raises((OverflowError, TypeError)):
            disk.watch(bad)
