"""Partition tables (muenfast.partition): as sfdisk writes them, damaged, hostile, and as servers export their parts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Program, run, unique
from hypothesis import example, given, settings
from hypothesis import strategies as st

from muenfast import BlockDevice, ClaimError, UsageError, partition, shm
from muenfast._store import Store
from muenfast.backing import Device, open_device
from muenfast.partition import Partition, Table

Start = Callable[..., Program]

MIB = 1 << 20
SFDISK = shutil.which("sfdisk", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
needs_sfdisk = pytest.mark.skipif(SFDISK is None, reason="needs sfdisk")
needs_root = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root (loop devices)")]


def table_of(disk: bytes | bytearray, sectors: tuple[int, ...] = (512, 4096)) -> Table | None:
    """read_table on bytes; what it asks for must lie inside."""
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset and 0 < length and offset + length <= len(disk)
        return bytes(disk[offset:offset + length])

    return partition.read_table(read, len(disk), sectors)


def ranges(table: Table | None) -> dict[int, tuple[int, int]]:
    assert table is not None
    return {number: (each.start, each.size) for number, each in table.partitions.items()}


def tool(name: str, *words: str, stdin: str = "") -> str:
    """Runs a program of the system's; what it printed."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert path is not None, name
    done = subprocess.run([path, *words], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def loop_on(path: Path | str, sector: int) -> Iterator[str]:
    node = tool("losetup", "--find", "--show", "--sector-size", str(sector), str(path)).strip()
    try:
        yield node
    finally:
        tool("losetup", "--detach", node)


def sfdisk(path: Path | str, script: str, sector: int = 512) -> dict[int, tuple[int, int]]:
    """Writes a table, and returns (start, size) in bytes of each partition as sfdisk itself sees them.

    sector: of a file 512; 4096 through a loop device, which needs root.
    """
    if sector != 512:
        if os.geteuid() != 0:
            pytest.skip("needs root (loop devices)")
        with loop_on(path, sector) as node:
            return _sfdisk(node, script, sector)
    return _sfdisk(str(path), script, sector)


def _sfdisk(path: str, script: str, sector: int) -> dict[int, tuple[int, int]]:
    tool("sfdisk", "--no-reread", "--no-tell-kernel", path, stdin=script)
    told = json.loads(tool("sfdisk", "--json", path))["partitiontable"]
    assert told["sectorsize"] == sector
    return {int(re.findall("[0-9]+$", each["node"])[0]): (each["start"] * sector, each["size"] * sector)
            for each in told["partitions"]
            if told["label"] == "gpt" or each["type"] not in ("5", "f", "85")}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    return path


# ---- as sfdisk writes them

MBR = "label: dos\nstart=1MiB, size=10MiB\nsize=10MiB\nsize=3MiB\n"
LOGICAL = "label: dos\nsize=5MiB\nsize=40MiB, type=5\nsize=5MiB\nsize=4MiB\nsize=3MiB\nsize=2MiB\n"
GPT = "label: gpt\nsize=10MiB\nsize=10MiB\nsize=3MiB\n"
ODD = "label: gpt\nfirst-lba: 34\nstart=35, size=20001\nstart=30001, size=999\n"


@needs_sfdisk
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("script", [MBR, LOGICAL, GPT, ODD], ids=["mbr", "logical", "gpt", "odd"])
def test_tables_are_seen_as_sfdisk_sees_them(image: Path, script: str, sector: int) -> None:
    """Every number and range, in both units, whichever is thought likelier where the table tells."""
    if sector == 4096 and script is ODD:
        script = "label: gpt\nstart=300, size=2001\nstart=5001, size=99\n"
    told = sfdisk(image, script, sector)
    disk = image.read_bytes()
    table = table_of(disk, (sector, 512 + 4096 - sector))
    assert ranges(table) == told and table is not None
    assert (table.scheme, table.sector) == ("gpt" if "gpt" in script else "mbr", sector)
    assert table.notes == [] and all("extended" in reason for reason in table.faults.values())
    assert ranges(table_of(disk, (512 + 4096 - sector, sector))) == told


@needs_sfdisk
def test_partitions_with_gaps_in_their_numbers(image: Path) -> None:
    """A GPT's numbers are places, not ranks."""
    told = sfdisk(image, "label: gpt\nsize=1MiB\nsize=1MiB\nsize=1MiB\n")
    tool("sfdisk", "--no-reread", "--delete", str(image), "2")
    del told[2]
    assert ranges(table_of(image.read_bytes())) == told


def gpt_places(disk: bytes, unit: int) -> tuple[int, int]:
    """Where the two headers are."""
    return unit, (len(disk) // unit - 1) * unit


@needs_sfdisk
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("at", [0, 8, 16, 24, 40, 72, 80, 84, 88, 91, "entries"])
def test_a_bad_primary_gpt_is_replaced_by_the_backup(image: Path, sector: int, at: int | str) -> None:
    """One byte anywhere in the header or its entries: the checksums see it, the backup is used, and that is said."""
    told = sfdisk(image, GPT, sector)
    disk = bytearray(image.read_bytes())
    place = 2 * sector + 40 if at == "entries" else sector + int(at)
    disk[place] ^= 1
    table = table_of(disk)
    assert ranges(table) == told and table is not None
    [note] = table.notes
    assert "the primary GPT is bad" in note


@needs_sfdisk
def test_a_gpt_that_is_bad_twice_is_refused(image: Path) -> None:
    """Never guessed at: no protective entry is taken for a partition."""
    sfdisk(image, GPT)
    disk = bytearray(image.read_bytes())
    for place in gpt_places(disk, 512):
        disk[place + 50] ^= 1
    with pytest.raises(UsageError, match="the GPT is damaged, the backup, too: .*checksum"):
        table_of(disk)
    for place in gpt_places(disk, 512):
        disk[place:place + 512] = bytes(512)
    with pytest.raises(UsageError, match="there is no header"):
        table_of(disk)


@needs_sfdisk
@pytest.mark.parametrize("lost", [1, 511, 4095])
def test_a_disk_without_its_last_bytes(image: Path, lost: int) -> None:
    """Less than 4096 bytes at the end may be gone: a partition that reached there ends with the disk."""
    told = sfdisk(image, "label: dos\nstart=1MiB, size=10MiB\n,\n")
    disk = image.read_bytes()[:-lost]
    table = table_of(disk)
    assert ranges(table) == {**told, 2: (told[2][0], told[2][1] - lost)}
    with pytest.raises(UsageError, match="beyond the disk"):
        partition.find(table_of(disk[:-8192]), 2)


@needs_sfdisk
def test_the_unit_of_an_mbr(image: Path) -> None:
    """It does not say so itself: what is impossible, then where file systems begin, then whole MiB decide."""
    told = sfdisk(image, "label: dos\nsize=2MiB\n", 4096)
    disk = bytearray(image.read_bytes())
    assert ranges(table_of(disk)) == told  # in 512 the first one would begin at 128 KiB
    told = sfdisk(image, "label: dos\nstart=2048, size=2MiB\n")
    disk = bytearray(image.read_bytes())
    assert ranges(table_of(disk)) == told  # both are possible
    assert ranges(table_of(disk, (4096, 512))) == {1: (8 * MIB, 16 * MIB)}
    disk[MIB + 1080:MIB + 1082] = b"\x53\xef"
    assert ranges(table_of(disk, (4096, 512))) == told
    told = sfdisk(image, "label: dos\nstart=2048, size=30MiB\n")
    assert ranges(table_of(bytearray(image.read_bytes()), (4096, 512))) == told  # in 4096 it would leave the disk


# ---- garbage


def mbr(*entries: tuple[int, int, int], size: int = 4 * MIB, at: int = 0, disk: bytearray | None = None) -> bytearray:
    """A disk with an MBR (or extended record) of (type, start, count) at a sector."""
    disk = bytearray(size) if disk is None else disk
    for index, (kind, start, count) in enumerate(entries):
        struct.pack_into("<B3xB3xII", disk, at * 512 + 446 + 16 * index, 0, kind, start, count)
    disk[at * 512 + 510:at * 512 + 512] = b"\x55\xaa"
    return disk


@pytest.mark.parametrize("disk", [b"", bytes(100), bytes(511), bytes(512), bytes(8192), b"\xff" * 8192,
                                  os.urandom(510) + b"\x00\x00" + bytes(8000)], ids=len)
def test_what_is_no_table(disk: bytes) -> None:
    assert table_of(disk) is None
    with pytest.raises(UsageError, match="there is no partition table"):
        partition.find(table_of(disk), 1)


def test_a_fat_is_no_table() -> None:
    """Its boot sector ends as an MBR does; what stands where the entries would be is code."""
    disk = bytearray(MIB)
    disk[:3], disk[510:512] = b"\xeb\x3c\x90", b"\x55\xaa"
    disk[446:510] = b"This is not a bootable disk.  Please insert a bootable floppy..."
    assert table_of(disk) is None


def test_an_mbr_without_entries() -> None:
    """A table without partitions is a table."""
    table = table_of(mbr())
    assert table is not None and table.partitions == {}
    with pytest.raises(UsageError, match="there is no partition 1; there is none"):
        partition.find(table, 1)


@pytest.mark.parametrize(("entries", "number", "message"), [
    ([(0x83, 8192, 1)], 1, "beyond the disk"), ([(0x83, 8191, 9)], 1, "beyond the disk"),
    ([(0x83, 1, 0xFFFFFFFF)], 1, "beyond the disk"), ([(0x83, 0xFFFFFFFF, 0xFFFFFFFF)], 1, "beyond the disk"),
    ([(0x83, 100, 100), (0x83, 150, 10)], 1, "partitions 1 and 2 overlap"),
    ([(0x83, 100, 100), (0x83, 150, 10)], 2, "partitions 1 and 2 overlap"),
    ([(0x83, 100, 100), (0x83, 110, 10), (0x83, 130, 10)], 3, "partitions 1 and 3 overlap"),
    ([(5, 100, 100)], 1, "it is the extended partition"), ([(5, 0, 100)], 1, "begins at byte 0"),
    ([(5, 9000, 100)], 1, "begins at byte"), ([(0x83, 100, 100)], 2, "there is no partition 2; there is 1, 4"),
    ([(0x83, 100, 100)], 0, "there is no partition 0"), ([(0, 100, 100)], 1, "no partition 1; there is 4"),
    ([(0x83, 100, 0)], 1, "no partition 1; there is 4")])
def test_a_partition_that_cannot_be_used(entries: list[tuple[int, int, int]], number: int, message: str) -> None:
    """It is named with the reason; one beside it that is good stays good."""
    entries = [*entries, *[(0, 0, 0)] * (3 - len(entries)), (0x83, 4000, 8)]
    table = table_of(mbr(*entries), (512,))
    with pytest.raises(UsageError, match=message):
        partition.find(table, number)
    assert partition.find(table, 4) == Partition(4, 4000 * 512, 4096, "83")


def test_a_chain_of_logical_partitions_that_comes_back_ends() -> None:
    """Each record is read once; the partitions up to there are there."""
    disk = mbr((5, 100, 4000))
    mbr((0x83, 1, 10), (5, 50, 100), at=100, disk=disk)
    mbr((0x83, 1, 10), (5, 0, 100), at=150, disk=disk)  # back to the first
    table = table_of(disk, (512,))
    assert ranges(table) == {5: (101 * 512, 5120), 6: (151 * 512, 5120)} and table is not None
    assert table.notes == ["the chain of logical partitions comes back to itself after 2"]


def test_a_chain_of_logical_partitions_that_leaves_the_disk_ends() -> None:
    """So does one that leads to something else, and one that is too long for Linux's numbers."""
    disk = mbr((5, 100, 4000))
    mbr((0x83, 1, 10), (5, 0xFFFFFF, 100), at=100, disk=disk)
    table = table_of(disk, (512,))
    assert list(ranges(table)) == [5] and table is not None and "leaves the disk" in table.notes[0]
    mbr((0x83, 1, 10), (5, 7, 100), at=100, disk=disk)
    table = table_of(disk, (512,))
    assert list(ranges(table)) == [5] and table is not None and "no record of a logical" in table.notes[0]
    for index in range(300):
        mbr((0x83, 1, 1), (5, 2 * index + 2, 2), at=100 + 2 * index, disk=disk)
    table = table_of(disk, (512,))
    assert list(ranges(table)) == list(range(5, 256)) and table is not None and "too long" in table.notes[0]


def test_each_extended_partition_is_followed() -> None:
    """Numbers go on in the second one, as Linux counts."""
    disk = mbr((5, 100, 100), (0x83, 20, 5), (0x0F, 300, 100))
    mbr((0x83, 1, 10), at=100, disk=disk)
    mbr((0x82, 1, 10), at=300, disk=disk)
    assert ranges(table_of(disk, (512,))) == {2: (10240, 2560), 5: (101 * 512, 5120), 6: (301 * 512, 5120)}


def gpt(size: int, partitions: list[tuple[int, int]], *, unit: int = 512, count: int = 128, each: int = 128,
        **fields: int) -> bytearray:
    """A disk with a primary GPT, its checksums right whatever its fields say; no backup."""
    disk = mbr((0xEE, 1, 0xFFFFFFFF), size=size)
    entries = bytearray(count * each)
    for index, (first, last) in enumerate(partitions):
        struct.pack_into("<16s16sQQ", entries, index * each, uuid.UUID(int=index + 1).bytes_le, b"u" * 16, first, last)
    disk[2 * unit:2 * unit + len(entries)] = entries
    header = {"length": 92, "own": 1, "alternate": size // unit - 1, "first": 6, "last": size // unit - 6, "entries": 2,
              "count": count, "each": each, **fields}
    raw = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, header["length"], 0, 0, header["own"],
                      header["alternate"], header["first"], header["last"], b"d" * 16, header["entries"],
                      header["count"], header["each"], zlib.crc32(entries))
    disk[unit:unit + 92] = raw
    struct.pack_into("<I", disk, unit + 16, zlib.crc32(bytes(disk[unit:unit + min(header["length"], unit)])))
    return disk


@pytest.mark.parametrize("fields", [
    {"length": 0}, {"length": 91}, {"length": 513}, {"length": 0xFFFFFFFF}, {"own": 2}, {"first": 100, "last": 50},
    {"first": 1 << 60, "last": 1 << 61}, {"entries": 1}, {"entries": 0}, {"entries": 1 << 63}, {"entries": 8191},
    {"count": 0}, {"count": 0xFFFFFFFF}, {"each": 0}, {"each": 64}, {"each": 192}, {"each": 1 << 31},
    {"count": 0xFFFFFFFF, "each": 4096}])
def test_a_header_whose_checksum_is_right_is_not_believed(fields: dict[str, int]) -> None:
    """Its author may be hostile: each field is checked before it is used."""
    options = {"count": 128, "each": 128}
    disk = gpt(4 * MIB, [(100, 200)])
    bad = gpt(4 * MIB, [(100, 200)], **{k: v for k, v in fields.items() if k not in options})
    for name, at in (("count", 80), ("each", 84)):
        if name in fields:
            struct.pack_into("<I", bad, 512 + at, fields[name])
            struct.pack_into("<I", bad, 512 + 16, 0)
            struct.pack_into("<I", bad, 512 + 16, zlib.crc32(bytes(bad[512:512 + 92])))
    assert ranges(table_of(disk)) == {1: (51200, 101 * 512)}
    with pytest.raises(UsageError, match="the GPT is damaged"):
        table_of(bad)


@pytest.mark.parametrize(("first", "last"), [(100, 99), (100, 0), (0, (1 << 64) - 1), (1 << 63, (1 << 63) + 1),
                                             (8192, 8200), ((1 << 64) - 1, 5)])
def test_an_entry_whose_checksum_is_right_is_not_believed(first: int, last: int) -> None:
    """It is left out with a reason, its neighbours are not."""
    table = table_of(gpt(4 * MIB, [(100, 200), (first, last), (300, 300)]))
    assert table is not None and list(ranges(table)) == [1, 3] and list(table.faults) == [2]


@pytest.mark.parametrize(("count", "each"), [(4, 128), (128, 256), (8, 4096)])
def test_other_sizes_of_entries(count: int, each: int) -> None:
    """UEFI lets them be any power of two from 128 on."""
    assert ranges(table_of(gpt(4 * MIB, [(200, 300)], count=count, each=each))) == {1: (102400, 51712)}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600), st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 5, 0xF, 0x83, 0xEE]),
                                                   st.integers(0, 40) | st.integers(0, 0xFFFFFFFF),
                                                   st.integers(0, 40) | st.integers(0, 0xFFFFFFFF)), max_size=8),
       st.integers(0, 32 * 1024))
@example(b"", [(0, 5, 1, 40), (0, 5, 1, 40), (0, 5, 0, 40), (0, 5, 0, 40)], 32768)
def test_no_bytes_are_more_than_a_usage_error(head: bytes, records: list[tuple[int, int, int, int]], size: int) -> None:
    """Random heads and random chains of records: nothing outside the disk is read or returned, and it ends."""
    disk = bytearray(size)
    disk[:len(head)] = head[:size]
    for index, (flag, kind, start, count) in enumerate(records):  # entry by entry over sectors 0, 1, ...
        at = index // 2 * 512 + 446 + index % 2 * 16
        if at + 66 <= size:
            struct.pack_into("<B3xB3xII", disk, at, flag * 0x80, kind, start, count)
            disk[index // 2 * 512 + 510:index // 2 * 512 + 512] = b"\x55\xaa"
    check_any(disk)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([512, 4096]), st.dictionaries(
    st.sampled_from(["length", "own", "alternate", "first", "last", "entries"]), st.integers(0, 64)), st.lists(
        st.tuples(st.integers(0, 100) | st.integers(0, (1 << 64) - 1), st.integers(0, 100) |
                  st.integers(0, (1 << 64) - 1)), max_size=4), st.binary(max_size=40), st.integers(0, 9000))
def test_no_gpt_is_more_than_a_usage_error(unit: int, fields: dict[str, int], partitions: list[tuple[int, int]],
                                           noise: bytes, at: int) -> None:
    """The same of GPTs whose checksums are right, and of the same with noise somewhere."""
    disk = gpt(96 * 1024, partitions, unit=unit, count=4, **fields)
    check_any(disk)
    disk[at:at + len(noise)] = noise
    check_any(disk)


def check_any(disk: bytearray) -> None:
    try:
        table = table_of(disk)
    except UsageError:
        return
    for number, each in (table.partitions if table else {}).items():
        assert each.number == number and 0 <= each.start < each.end <= len(disk)
    for start, end in table.spans if table else ():
        assert 0 <= start < end <= len(disk)


# ---- a server of partitions


def content(number: int, size: int) -> bytes:
    return hashlib.shake_128(bytes([number])).digest(size)


@pytest.fixture
def parted(image: Path) -> tuple[Path, dict[int, tuple[int, int]]]:
    """An image with the primaries 1 and 3, of which 3 begins and ends at no block, and the logicals 5 and 6; each is
    full of its own bytes."""
    if SFDISK is None:
        pytest.skip("needs sfdisk")
    told = sfdisk(image, "label: dos\nx1: size=5MiB\nx2: size=30MiB, type=5\nx3: start=80001, size=2049\n"
                         "x5: size=3MiB\nx6: size=2MiB\n")
    with open(image, "r+b") as file:
        for number, (start, size) in told.items():
            file.seek(start)
            file.write(content(number, size))
    return image, told


def opened(path: object, *, read_only: bool = False) -> object:
    return open_device(Device.parse(str(path)), read_only=read_only)


def test_partitions_are_served_each_by_itself(program: Start, parted: tuple[Path, dict[int, tuple[int, int]]]) -> None:
    """Every one has its own bytes and size (without a tail that is no block); what is written to one changes nothing
    else on the disk."""
    path, told = parted
    assert set(told) == {1, 3, 5, 6}
    before = path.read_bytes()
    names = {number: (unique("q"), unique("s")) for number in told}
    server = program("blk", "--req", ",".join(q for q, _ in names.values()),
                     "--resp", ",".join(s for _, s in names.values()),
                     "--device", ",".join(f"{path}#{number}" for number in told))
    for line, (number, (_, size)) in zip(server.lines, told.items(), strict=True):
        assert line.split()[3:] == [str(size // 4096 * 4096), f"{path}#{number}"]
    expected = bytearray(before)
    for number, (start, size) in told.items():
        with BlockDevice(*names[number]) as device:
            assert device.pread(device.size, 0) == content(number, size)[:device.size]
            for offset in (0, device.size - 4096):
                device.pwrite(b"w" * 4096, offset)
                expected[start + offset:start + offset + 4096] = b"w" * 4096
            device.flush()
    status, errors = server.end()
    assert status == 0
    assert all("no whole block of 4096, and are not exported" in line for line in errors.splitlines())
    assert path.read_bytes() == expected


def test_identities_are_stable_and_all_different(parted: tuple[Path, dict[int, tuple[int, int]]],
                                                 tmp_path: Path) -> None:
    """The same partition is the same store, by another name, too; no other one is, nor is the disk."""
    path, told = parted
    os.symlink(path, tmp_path / "link")
    seen = []
    for text in (str(path), *(f"{path}#{number}" for number in told), f"{path}#5", f"{tmp_path}/link#5"):
        with open_device(Device.parse(text)) as backing:
            seen.append(backing.store.identity)
    assert len(set(seen)) == 1 + len(told)
    assert seen[-1] == seen[-2] == seen[1 + list(told).index(5)]


@pytest.mark.parametrize(("offset", "size"), [(-1, 8192), (1 << 63, 4096), ((1 << 63) - 4096, 4096)])
def test_a_store_is_within_what_the_kernel_can_address(image: Path, offset: int, size: int) -> None:
    """No sum of offset and block runs over."""
    with open(image, "rb") as file, pytest.raises(UsageError, match="below 2\\^63"):
        Store.in_file(file.fileno(), size, offset=offset)


@pytest.mark.parametrize(("first", "second", "read_only", "good"), [
    ("#1", "#3", (False, False), True), ("#1", "#5", (False, True), True), ("#1", "#1", (False, False), False),
    ("#1", "#1", (True, False), False), ("#1", "#1", (False, True), False), ("#1", "#1", (True, True), True),
    ("", "#1", (False, False), False), ("#1", "", (False, False), False), ("", "#1", (True, False), False),
    ("#1", "", (False, True), False), ("#1", "", (True, False), False), ("", "#1", (True, True), True)])
def test_who_may_be_served_beside_whom(parted: tuple[Path, dict[int, tuple[int, int]]], first: str, second: str,
                                       read_only: tuple[bool, bool], good: bool) -> None:
    """Partitions that are apart; the same one, or the whole beside a part, only where nobody writes."""
    path, _ = parted
    with open_device(Device.parse(f"{path}{first}"), read_only=read_only[0]):
        if good:
            open_device(Device.parse(f"{path}{second}"), read_only=read_only[1]).close()
        else:
            with pytest.raises(ClaimError, match=f"process {os.getpid()}"):
                open_device(Device.parse(f"{path}{second}"), read_only=read_only[1])
    open_device(Device.parse(f"{path}{second}")).close()


@pytest.mark.parametrize(("first", "second", "shared", "good"), [
    ((0, 10), (10, 20), (False, False), True), ((0, 10), (9, 20), (False, False), False),
    ((0, 10), (9, 20), (True, True), True), ((0, 10), (9, 20), (True, False), False),
    (None, (9, 20), (True, False), False), ((9, 20), None, (False, True), False), (None, (9, 20), (True, True), True)])
def test_other_users_see_the_locks(image: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[int, int] | None,
                                   second: tuple[int, int] | None, shared: tuple[bool, bool], good: bool,
                                   tmp_path: Path) -> None:
    """Who keeps other books is told from the kernel's locks on the bytes."""
    with open(image, "r+b") as one, open(image, "r+b") as two, \
            shm.claim_backing(one.fileno(), "one", shared=shared[0], span=first):
        monkeypatch.setenv("MUENFAST_RUNTIME_DIR", str(tmp_path / "other"))
        if good:
            shm.claim_backing(two.fileno(), "two", shared=shared[1], span=second, timeout=0).release()
        else:
            with pytest.raises(ClaimError, match="an open file that is locked"):
                shm.claim_backing(two.fileno(), "two", shared=shared[1], span=second, timeout=0)


@pytest.mark.parametrize(("text", "parts"), [
    ("{image}#4", ["there is no partition 4; there is 1, 3, 5, 6"]), ("{image}#2", ["the extended partition"]),
    ("{image}#0", ["numbered from 1"]), ("{image}#x", ["No such file"]), ("{image}#", ["No such file"]),
    ("{tmp}/none#1", ["No such file", "partition 1 of {tmp}/none is meant"]), ("{tmp}#1", ["a file, a disk"]),
    ("{tmp}/plain#1", ["there is no partition table"]), ("{image}#1,{image}#1", ["entry 1", "one export"]),
    ("{image}#1,{image}", ["entry 1", "one export"]), ("{image},{tmp}/./disk.img#3", ["entry 1", "one export"])])
def test_misuse(parted: tuple[Path, dict[int, tuple[int, int]]], tmp_path: Path, text: str, parts: list[str]) -> None:
    """Status 2, one line with option, entry, value and rule."""
    (tmp_path / "plain").write_bytes(bytes(MIB))
    values = {"image": str(parted[0]), "tmp": str(tmp_path)}
    devices = text.format(**values)
    count = devices.count(",") + 1
    done = run("blk", "--req", ",".join(unique("q") for _ in range(count)),
               "--resp", ",".join(unique("s") for _ in range(count)), "--device", devices)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert f"--device, entry {count - 1} '{devices.split(',')[-1]}'" in done.stderr
    for part in parts:
        assert part.format(**values) in done.stderr


def test_a_file_whose_name_holds_a_number_sign(parted: tuple[Path, dict[int, tuple[int, int]]]) -> None:
    """What exists is meant; its own partitions are reached by one more."""
    path, told = parted
    other = path.with_name("disk.img#1")
    shutil.copyfile(path, other)
    with open_device(Device.parse(f"{path}#1")) as backing:
        assert backing.store.nblocks * 4096 == 64 * MIB
    with open_device(Device.parse(f"{other}#5")) as backing:
        assert backing.store.nblocks == told[5][1] // 4096
    with open_device(Device.parse(f"{path}#3")) as backing:
        assert backing.store.nblocks == told[3][1] // 4096


def test_a_killed_server_leaves_its_partition_to_the_next(program: Start,
                                                          parted: tuple[Path, dict[int, tuple[int, int]]]) -> None:
    """kill -9: its claim ends with it; the client goes on with the same store."""
    path, _ = parted
    pair = ["--req", unique("q"), "--resp", unique("s")]
    server = program("blk", *pair, "--device", f"{path}#3")
    with BlockDevice(pair[1], pair[3]) as device:
        device.pwrite(b"1" * 4096, 0)
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        server = program("blk", *pair, "--device", f"{path}#3")
        assert device.pread(4096, 0) == b"1" * 4096
    status, errors = server.end()
    assert status == 0
    assert f"the last 512 bytes of {path}#3 are no whole block of 4096, and are not exported" in errors


# ---- block devices


@pytest.fixture
def loop_disk(parted: tuple[Path, dict[int, tuple[int, int]]]) -> Iterator[str]:
    """A loop device with the image, without partitions of the kernel's."""
    with loop_on(parted[0], 512) as node:
        yield node


class TestBlockDevice:
    pytestmark = needs_root

    def test_by_number_and_by_node(self, loop_disk: str, parted: tuple[Path, dict[int, tuple[int, int]]]) -> None:
        """The kernel's own device is taken where there is one; either way the bytes and what excludes what are the
        same."""
        _, told = parted
        for kernels in (False, True):
            if kernels and not os.path.exists(f"{loop_disk}p3"):
                tool("partx", "--add", "--nr", "3", loop_disk)
            with open_device(Device.parse(f"{loop_disk}#3")) as backing:
                assert backing.store.nblocks == told[3][1] // 4096
                for other in (f"{loop_disk}#3", loop_disk, *([f"{loop_disk}p3"] if kernels else [])):
                    with pytest.raises(ClaimError):
                        open_device(Device.parse(other))
                    with pytest.raises(ClaimError):
                        open_device(Device.parse(other), read_only=True)
            identity = backing.store.identity
        with open_device(Device.parse(f"{loop_disk}#3"), read_only=True) as backing:
            assert backing.store.identity == identity
            with pytest.raises(ClaimError):
                open_device(Device.parse(f"{loop_disk}p3"))
        with open_device(Device.parse(f"{loop_disk}p3")):
            with pytest.raises(ClaimError):
                open_device(Device.parse(f"{loop_disk}#3"), read_only=True)
        tool("partx", "--delete", "--nr", "3", loop_disk)

    def test_others_beside_it(self, loop_disk: str) -> None:
        """Two partitions of one disk are served side by side."""
        with open_device(Device.parse(f"{loop_disk}#1")), open_device(Device.parse(f"{loop_disk}#5")):
            pass

    def test_a_disk_in_use(self, loop_disk: str) -> None:
        """Somebody who has the disk for himself, as a mount has, shuts its partitions out."""
        fd = os.open(loop_disk, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(ClaimError, match="a mount or another user"):
                open_device(Device.parse(f"{loop_disk}#1"))
        finally:
            os.close(fd)
