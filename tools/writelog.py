"""A disk that logs what is done to it, served as `py:tools/writelog.py:Disk:SIZE+PLANT+LOG`, and what such a disk may hold
after it lost power.

A log is a file: a page with two words, the number of entries and the end of the last one, then the entries. An entry is
made when its operation ends, before it is answered, and tells how many there were when it began. A place is a number of
entries. Somebody who was answered looks at the number, and has the place from which on that answer must be kept.

The disk's model: a flush makes durable what had ended before it began, nothing else. Of the rest, and of what has begun and
not ended, each write may be there, in any order; one of one block (4096 bytes, the sectors of /dev/muendiskX) is there or
not, a longer one may be torn between any two sectors of 512 bytes.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 4096
SECTOR = 512
FLUSH_SECONDS = 0.003       # who does not wait for a flush is ahead of it
HEAD = struct.Struct("<QQQQ")       # kind, entries when it began, offset, length; of a write its data follow
WRITE, TRIM, FLUSH = range(3)
NAMES = ("writes", "trims", "flushes")       # zeroes come as trims: the transport has no word of its own for them
PLANTS = ("none", "flush-skipped", "flush-early")
FIRST = 4096                # offset of the first entry
MOST_HELD = 64              # writes that a disk with `flush-early` is behind
MOST_SUBSETS = 4            # changes of which every subset is a state of its own
EXT4_MAGIC = slice(1080, 1082), b"\x53\xef"       # of a block with a superblock: where, what


class Disk:
    """The store. PLANT: `none`; `flush-skipped`, which answers a flush and does nothing; `flush-early`, which answers
    writes that it has not done yet, and flushes before it does them."""

    def __init__(self, arg: str) -> None:
        size, self._plant, self._path = arg.split("+", 2)
        if self._plant not in PLANTS:
            raise ValueError(f"PLANT is {self._plant!r}: one of {', '.join(PLANTS)}")
        self._content = bytearray(int(size))
        self._held: list[tuple[int, int, int, bytes]] = []
        self._lock = threading.Lock()

    def open(self, readonly: bool) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, FIRST)
        self._map = mmap.mmap(self._fd, FIRST)
        self._words = memoryview(self._map).cast("Q")
        self._words[1] = FIRST

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self._fd)

    def get_size(self) -> int:
        return len(self._content)

    def block_size(self) -> tuple[int, int, int]:
        return BLOCK, BLOCK, 1 << 20

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = self._content[offset:offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int) -> None:
        began = self._words[0]
        self._content[offset:offset + len(buf)] = buf
        self._changed(WRITE, began, offset, len(buf), bytes(buf))

    def trim(self, count: int, offset: int) -> None:
        began = self._words[0]
        self._content[offset:offset + count] = bytes(count)
        self._changed(TRIM, began, offset, count, b"")

    def trims_to_zero(self) -> bool:
        return True

    def flush(self) -> None:
        began = self._words[0]
        time.sleep(FLUSH_SECONDS)
        if self._plant != "flush-skipped":
            with self._lock:
                self._append(FLUSH, began, 0, 0)
                self._let_go()

    def _changed(self, kind: int, began: int, offset: int, length: int, data: bytes) -> None:
        with self._lock:
            if self._plant == "flush-early":
                self._held.append((kind, offset, length, data))
                if len(self._held) > MOST_HELD:
                    self._let_go()
            else:
                self._append(kind, began, offset, length, data)

    def _let_go(self) -> None:
        """Precondition: the lock is held."""
        for kind, offset, length, data in self._held:
            self._append(kind, self._words[0], offset, length, data)
        self._held.clear()

    def _append(self, kind: int, began: int, offset: int, length: int, data: bytes = b"") -> None:
        """Precondition: the lock is held. The entry is whole before the number counts it."""
        entry = HEAD.pack(kind, began, offset, length) + data
        end = self._words[1]
        if os.pwrite(self._fd, entry, end) != len(entry):
            raise OSError(f"{self._path}: no room for an entry")
        self._words[1] = end + len(entry)
        self._words[0] += 1


class Place:
    """Tells the place of a log that is being written."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), FIRST, prot=mmap.PROT_READ)
        self._words = memoryview(self._map).cast("Q")

    def __call__(self) -> int:
        return self._words[0]

    def close(self) -> None:
        self._words.release()
        self._map.close()


class Entry(NamedTuple):
    kind: int
    began: int
    offset: int
    data: bytes


def read(path: Path) -> list[Entry]:
    """The log of a disk that has ended."""
    raw = path.read_bytes()
    count, _ = struct.unpack_from("<QQ", raw)
    found, at = [], FIRST
    for _ in range(count):
        kind, began, offset, length = HEAD.unpack_from(raw, at)
        at += HEAD.size
        if kind == WRITE:
            found.append(Entry(kind, began, offset, raw[at:at + length]))
            at += length
        else:
            found.append(Entry(kind, began, offset, bytes(length)))
    return found


# ------------------------------------------------------------------ what there is after the power was lost

Piece = tuple[int, bytes]       # offset, what stands there


class Replay:
    """Goes through a log, place after place: what is durable, and what may be there besides."""

    def __init__(self, log: list[Entry], size: int) -> None:
        self.log, self.durable = log, bytearray(size)
        self._covered = self._at = 0
        self._reach = max((i - entry.began for i, entry in enumerate(log)), default=0)

    def go(self, place: int) -> list[Entry]:
        """The power is lost when there are that many entries, no fewer than the last time: the changes that are not
        durable, in the order in which they ended. `durable` has all others."""
        if place < self._at:
            raise ValueError(f"place is {place}, after {self._at}: a replay does not go back")
        covered = max((entry.began for entry in self.log[self._at:place] if entry.kind == FLUSH), default=0)
        for entry in self.log[self._covered:max(covered, self._covered)]:
            self.durable[entry.offset:entry.offset + len(entry.data)] = entry.data
        self._covered, self._at = max(covered, self._covered), place
        under_way = [entry for entry in self.log[place:place + self._reach + 1] if entry.began <= place]
        return [entry for entry in (*self.log[self._covered:place], *under_way) if entry.kind != FLUSH]


def states(pending: list[Entry], dice: random.Random) -> Iterator[tuple[str, list[Piece]]]:
    """What may have been written of those, as kinds of the worst, and what to write for each, in that order."""
    whole = [(entry.offset, entry.data) for entry in pending]
    yield "none", []
    if not whole:
        return
    yield "all", whole                      # where they overlap, the last
    yield "reversed", whole[::-1]           # ... the first
    if len(whole) > 1:
        if len(whole) <= MOST_SUBSETS:
            for taken in range(1, (1 << len(whole)) - 1):
                yield "some", [piece for i, piece in enumerate(whole) if taken >> i & 1]
        else:
            yield "some", [piece for piece in whole if dice.random() < 0.5]
        shuffled = [piece for piece in whole if dice.random() < 0.7]
        dice.shuffle(shuffled)
        yield "shuffled", shuffled
        yield "latest", whole[dice.randrange(len(whole)):][::-1]
        missing = dice.randrange(len(whole))
        yield "all but one", whole[:missing] + whole[missing + 1:]
        yield "one", [dice.choice(whole)]
        yield "blocks", list(_any_version(whole, dice))
    if any(len(data) > BLOCK for _, data in whole):
        yield "torn", [part for piece in whole for part in _torn(piece, dice)]


def _any_version(whole: list[Piece], dice: random.Random) -> Iterator[Piece]:
    """Of each block any of its versions, the durable one too: the first, the last, one between."""
    versions: dict[int, list[bytes]] = {}
    for offset, data in whole:
        for at in range(0, len(data), BLOCK):
            versions.setdefault(offset + at, []).append(data[at:at + BLOCK])
    for offset, found in versions.items():
        chosen = dice.randrange(-1, len(found))
        if chosen >= 0:
            yield offset, found[chosen]


def _torn(piece: Piece, dice: random.Random) -> Iterator[Piece]:
    """A block, or not; of several the sectors up to one, from one on, or any. ext4's superblock has its checksum in another
    sector than what it sums, and nothing to mend it by: it is whole, as on any disk that ext4 is to survive on."""
    offset, data = piece
    blocks = [data[at:at + BLOCK] for at in range(0, len(data), BLOCK)]
    how, cut = dice.randrange(3), dice.randrange(0, len(data), SECTOR)
    for i, block in enumerate(blocks):
        where, magic = EXT4_MAGIC
        unit = BLOCK if len(blocks) == 1 or block[where] == magic else SECTOR
        for at in range(0, len(block), unit):
            here = i * BLOCK + at
            if here < cut if how == 0 else here >= cut if how == 1 else dice.random() < 0.5:
                yield offset + here, block[at:at + unit]


def outcome(durable: bytearray, pieces: list[Piece]) -> dict[int, bytes]:
    """The sectors that these change, by offset."""
    sectors: dict[int, bytes] = {}
    for offset, data in pieces:
        for at in range(0, len(data), SECTOR):
            sectors[offset + at] = data[at:at + SECTOR]
    return {offset: data for offset, data in sectors.items() if durable[offset:offset + SECTOR] != data}
