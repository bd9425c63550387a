"""Partition tables: MBR with logical partitions, and GPT, as Linux reads them (block/partitions/msdos.c, efi.c).

Everything read here is somebody else's. What comes out are byte ranges inside the disk, whatever stands on it; a
partition that cannot be is left out, with the reason. Offsets and sizes are in bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from muenfast.errors import UsageError

SECTOR_SIZES = (512, 4096)

_TAIL = 4096  # a disk may have lost less than this of its end: the transport has no smaller unit
_EXTENDED = frozenset((0x05, 0x0F, 0x85))
_PROTECTIVE = 0xEE
_FIRST_LOGICAL = 5
_LOGICALS = 251  # most of them: Linux numbers at most 255 partitions of a disk
_GPT_HEADER = struct.Struct("<8s4sIII QQQQ 16s QIII")  # UEFI 2.10, 5.3.2
_GPT_ENTRY = struct.Struct("<16s16sQQ")  # UEFI 2.10, 5.3.3: attributes and name follow
_GPT_ENTRIES = 1 << 20  # most bytes of all entries; usual are 16 KiB

Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: bytes start to start + size of the disk, never outside it. type: of the table's own kind."""

    number: int
    start: int
    size: int
    type: str

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(slots=True)
class Table:
    """A table. scheme: "mbr" or "gpt". sector: the unit in which it counts. spans: the (start, end) where it stands.

    faults: by number, why a partition cannot be used. containers: of these, the extended ones, where nothing is wrong.
    notes: what else is wrong with the table.
    """

    scheme: str
    sector: int
    partitions: dict[int, Partition] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    containers: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, number: int, start: int, count: int, kind: str, size: int) -> None:
        """start, count: in sectors, untrusted. size: of the disk."""
        begin, end = start * self.sector, (start + count) * self.sector
        if begin >= size or end - size >= _TAIL:
            self.faults[number] = f"it ends at byte {end}, beyond the disk's {size}"
        elif count <= 0:
            self.faults[number] = "it ends before it begins"
        else:
            self.partitions[number] = Partition(number, begin, min(end, size) - begin, kind)

    def overlaps(self) -> Iterator[tuple[int, int]]:
        """Pairs of partitions that share bytes."""
        order = sorted(self.partitions.values(), key=lambda each: each.start)
        last: Partition | None = None  # of those so far the one that reaches farthest
        for each in order:
            if last is not None and each.start < last.end:
                yield last.number, each.number
            if last is None or each.end > last.end:
                last = each


def read_table(read: Read, size: int, sectors: Sequence[int] = SECTOR_SIZES) -> Table | None:
    """The table of a disk of `size` bytes; None: there is none. sectors: units in which it may count, likelier first.

    read(offset, length) returns exactly these bytes of the disk; it is asked for nothing outside. A GPT says its unit
    itself. An MBR is read in the one that leaves fewer partitions impossible, then in the one in which more of them
    begin with a file system, then more at whole MiB, as all tools have placed them since 2010; then in the likelier.
    Raises UsageError (a GPT that is damaged twice), and what read raises.
    """
    if size < 512:
        return None
    sector = read(0, 512)
    entries = list(_mbr_entries(sector))
    if sector[510:] != b"\x55\xaa" or any(flag not in (0, 0x80) for flag, _, _, _ in entries):
        return None  # the second is how Linux tells the boot sector of a FAT
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        return _gpt(read, size, sectors)
    tables = [_mbr(read, size, unit) for unit in sectors]
    return max(tables, key=lambda table: _likely(table, read, size))  # the first of equals


def find(table: Table | None, number: int) -> Partition:
    """One partition. Raises UsageError saying why not, and which there are."""
    if table is None:
        raise UsageError("there is no partition table")
    if number in table.faults:
        raise UsageError(f"partition {number}: {table.faults[number]}")
    if number not in table.partitions:
        there = ", ".join(map(str, sorted(table.partitions))) or "none"
        raise UsageError(f"there is no partition {number}; there is {there}")
    found = table.partitions[number]
    for pair in table.overlaps():
        if number in pair:
            raise UsageError(f"partitions {pair[0]} and {pair[1]} overlap: the table is damaged")
    return found


# ---- MBR


def _mbr_entries(sector: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(boot flag, type, start, count) of the four entries."""
    for at in range(446, 510, 16):
        flag, kind, start, count = struct.unpack_from("<B3xB3xII", sector, at)
        yield flag, kind, start, count


def _mbr(read: Read, size: int, unit: int) -> Table:
    table = Table("mbr", unit, spans=[(0, 512)])
    logical = _FIRST_LOGICAL
    for number, (_, kind, start, count) in enumerate(_mbr_entries(read(0, 512)), 1):
        if kind == 0 or count == 0:
            continue
        if kind not in _EXTENDED:
            table.add(number, start, count, f"{kind:02x}", size)
        elif start == 0 or start * unit >= size:
            table.faults[number] = f"the extended partition begins at byte {start * unit} of the disk's {size}"
        else:
            table.faults[number] = "it is the extended partition, which only holds the logical ones"
            table.containers.add(number)
            logical = _logical(table, read, size, start, logical)
    return table


def _logical(table: Table, read: Read, size: int, first: int, number: int) -> int:
    """Follows a chain of extended boot records; the next free number.

    A record's partition counts from that record, its link from the first one. Each record is read once, so that a chain
    that comes back ends.
    """
    seen: set[int] = set()
    at: int | None = first
    while at is not None:
        begin = at * table.sector
        if at in seen or begin + 512 > size or number >= _FIRST_LOGICAL + _LOGICALS:
            reason = "comes back to itself" if at in seen else "leaves the disk" if begin + 512 > size else "is too long"
            table.notes.append(f"the chain of logical partitions {reason} after {number - _FIRST_LOGICAL}")
            break
        seen.add(at)
        sector = read(begin, 512)
        if sector[510:] != b"\x55\xaa":
            table.notes.append(f"at byte {begin} there is no record of a logical partition")
            break
        table.spans.append((begin, begin + 512))
        here, at = at, None
        for _, kind, start, count in _mbr_entries(sector):
            if kind == 0 or count == 0:
                continue
            if kind in _EXTENDED:
                at = first + start if at is None else at
            elif number < _FIRST_LOGICAL + _LOGICALS:
                table.add(number, here + start, count, f"{kind:02x}", size)
                number += 1
    return number


def _likely(table: Table, read: Read, size: int) -> tuple[int, int, int]:
    """How likely an MBR is in its unit, for comparison."""
    wrong = len(table.faults) - len(table.containers) + len(table.notes) + len(list(table.overlaps()))
    starts = [each.start for each in table.partitions.values()]
    return (-wrong, sum(_file_system(read, size, start) for start in starts),
            sum(start % (1 << 20) == 0 for start in starts))


def contents(head: bytes) -> str | None:
    """What begins with these 4096 bytes, as far as it has a mark there: a file system, or a partition table."""
    if _marked(head):
        return "a file system"
    if head[510:512] == b"\x55\xaa":
        return "a partition table"
    return None


def image(head: bytes, size: int) -> str | None:
    """What these 4096 bytes say they are the beginning of, if that has just `size` bytes: ext2 to ext4, XFS, a GPT disk."""
    blocks = unit = 0
    if head[1080:1082] == b"\x53\xef":     # s_blocks_count_lo, s_log_block_size; s_blocks_count_hi with INCOMPAT_64BIT
        (blocks,), (log,), (wide,) = (struct.unpack_from("<I", head, 1024 + at) for at in (0x04, 0x18, 0x60))
        if wide & 0x80:
            blocks |= struct.unpack_from("<I", head, 1024 + 0x150)[0] << 32
        unit = 1024 << min(log, 6)
    elif head[:4] == b"XFSB":               # sb_blocksize, sb_dblocks
        unit, blocks = struct.unpack_from(">IQ", head, 4)
    if blocks and blocks * unit <= size < (blocks + 1) * unit:
        return "a file system of its size"
    if head[512:520] == b"EFI PART" and (struct.unpack_from("<Q", head, 512 + 32)[0] + 1) * 512 == size:
        return "a partition table of its size"
    return None


def _file_system(read: Read, size: int, start: int) -> bool:
    """Whether something begins there that has a mark in its first 4096 bytes."""
    return start + 4096 <= size and _marked(read(start, 4096))


def _marked(head: bytes) -> bool:
    return (head[1080:1082] == b"\x53\xef"  # ext2, ext3, ext4: s_magic at 56 of the superblock
            or head[:4] in (b"XFSB", b"hsqs") or head[:6] == b"LUKS\xba\xbe"
            or head[4086:] == b"SWAPSPACE2" or head[512:520] == b"LABELONE"  # LVM
            or head[510:512] == b"\x55\xaa" and head[0] in (0xEB, 0xE9))  # FAT, NTFS: a jump


# ---- GPT


@dataclass(frozen=True, slots=True)
class _Header:
    entries: int  # its first sector
    count: int
    bytes_each: int
    crc: int
    alternate: int


def _gpt(read: Read, size: int, sectors: Sequence[int]) -> Table:
    """From the primary header, else from the backup. Raises UsageError."""
    reasons: list[str] = []
    for backup in (False, True):
        for unit in sectors:
            last = size // unit - 1
            if last < 2:
                continue
            places = [last] if backup else [1]
            if backup:
                header = _gpt_header(read, size, unit, 1)
                if isinstance(header, _Header) and 1 < header.alternate < last:
                    places.insert(0, header.alternate)  # the disk has grown; only the primary's entries are bad
            for place in places:
                header = _gpt_header(read, size, unit, place)
                table = _gpt_table(read, size, unit, place, header) if isinstance(header, _Header) else header
                if isinstance(table, Table):
                    if backup:
                        table.notes.append(f"the primary GPT is bad ({'; '.join(reasons) or 'none'}): the backup is used")
                    return table
                if table:
                    reasons.append(table)
    raise UsageError(f"the GPT is damaged, the backup, too: {'; '.join(reasons) or 'there is no header'}",
                     hint="gdisk may recover it")


def _gpt_header(read: Read, size: int, unit: int, place: int) -> _Header | str:
    """The header in sector `place`, or what is wrong with it; "" where there is none."""
    sector = read(place * unit, unit)
    (mark, _, length, crc, _, own, alternate, first, last, _, entries, count, bytes_each,
     entries_crc) = _GPT_HEADER.unpack_from(sector)
    where = f"header at byte {place * unit}"
    if mark != b"EFI PART":
        return ""
    if not _GPT_HEADER.size <= length <= unit:
        return f"{where}: its length is {length}"
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:length]) != crc:
        return f"{where}: its checksum is wrong"
    if own != place:
        return f"{where}: it says that it is in sector {own}"
    if first > last or first * unit >= size:
        return f"{where}: the usable sectors are {first} to {last}"
    if bytes_each < 128 or bytes_each > 4096 or bytes_each & (bytes_each - 1) or not 0 < count * bytes_each <= _GPT_ENTRIES:
        return f"{where}: {count} entries of {bytes_each} bytes"
    if entries < 2 or entries * unit + count * bytes_each > size:
        return f"{where}: its entries leave the disk"
    return _Header(entries, count, bytes_each, entries_crc, alternate)


def _gpt_table(read: Read, size: int, unit: int, place: int, header: _Header) -> Table | str:
    begin, length = header.entries * unit, header.count * header.bytes_each
    entries = read(begin, length)
    if zlib.crc32(entries) != header.crc:
        return f"header at byte {place * unit}: the checksum of its entries is wrong"
    table = Table("gpt", unit, spans=[(0, 512), (place * unit, (place + 1) * unit), (begin, begin + length)])
    for index in range(header.count):
        kind, _, first, last = _GPT_ENTRY.unpack_from(entries, index * header.bytes_each)
        if any(kind):
            table.add(index + 1, first, last - first + 1, _guid(kind), size)
    return table


def _guid(raw: bytes) -> str:
    a, b, c = struct.unpack_from("<IHH", raw)
    return f"{a:08X}-{b:04X}-{c:04X}-{raw[8:10].hex().upper()}-{raw[10:].hex().upper()}"
