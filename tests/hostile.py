"""A program for test_ring_hostile: a ring end whose peer rewrites all that is shared, at full speed.

    hostile.py reader|writer|overread|overwrite SECONDS SEED

The memory is mapped twice, read-only for the reader, and every mapping and target buffer lies between two pages
without access: a byte too far ends the process with SIGSEGV. The attacker is a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import struct
import sys
import time

from muenfast import Reader, Result, UsageError, Writer
from muenfast._ring import bell_state, newest

PAGE = mmap.PAGESIZE
LENGTH = 3 * PAGE
TRANSPORT, PROTOCOL = 0x487312B6B79A9B6D, 0x1234
U64 = (1 << 64) - 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
MAP_FIXED = 0x10


def fenced(length: int, fd: int = -1, writable: bool = True) -> memoryview:
    """`length` bytes (whole pages) of fd, or of nothing, between two pages without access; for this process's life."""
    base = libc.mmap(None, length + 2 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    kind = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(base + PAGE, length, protection, kind | MAP_FIXED, fd, 0)
    assert start == base + PAGE, os.strerror(ctypes.get_errno())
    view = memoryview((ctypes.c_ubyte * length).from_address(start)).cast("B")
    return view if writable else view.toreadonly()


def attack(memory: memoryview, bell: memoryview, seed: int) -> None:
    """Never returns. Now and then the header is a good one, so that the victim gets further than its checks."""
    chance = random.Random(seed)
    words, rings = memory.cast("Q"), bell[:128].cast("Q")
    capacity = len(memory) - 64
    edges = [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1 << 31, 1 << 32, (1 << 32) - 1, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63,
             (1 << 63) + 1, U64 - 8, U64 - 1, U64, capacity, capacity + 1, capacity - 1, len(memory), PAGE, -PAGE & U64]
    while True:
        size = chance.choice((1, 2, 3, 7, 8, 64, 1000, 4096, capacity // 2, capacity))
        elements = capacity // size
        turn = chance.randrange(4)
        if turn:
            words[1] = 0
            words[0], words[2], words[3], words[4] = TRANSPORT, PROTOCOL, size, elements
            words[6] = words[7] = chance.choice((0, 1, elements, U64 - 2, chance.getrandbits(64)))
            words[1] = chance.choice((1, 1, 2, chance.getrandbits(64)))
        for _ in range(chance.randrange(200)):
            kind = chance.randrange(8)
            if kind < 3:    # an honest step, so that there is data
                n = chance.randrange(1, 5)
                words[6] = words[6] + n & U64
                words[7] = words[7] + n & U64
            elif kind < 5:
                words[chance.choice((6, 7))] = chance.choice(edges)
            elif kind < 6:
                words[chance.randrange(8)] = chance.choice((chance.choice(edges), chance.getrandbits(64), size, elements,
                                                            elements + 1, elements - 1))
            elif kind < 7:
                words[8 + chance.randrange(capacity // 8)] = chance.getrandbits(64)
            else:
                rings[chance.randrange(16)] = chance.choice((chance.choice(edges), words[1], chance.getrandbits(64)))


def read(reader: Reader, memory: memoryview, bell: memoryview, end: float, chance: random.Random) -> None:
    """Every call of a Reader, any number of times; what it says must be possible."""
    capacity = len(memory) - 64
    targets = [fenced(PAGE), fenced(LENGTH)]
    seen = dict.fromkeys(Result, 0)
    while time.monotonic() < end:
        for _ in range(100):
            turn = chance.randrange(12)
            if turn < 5:
                size = reader.size
                data = reader.read()
                seen[reader.result] += 1
                assert (data is not None) == (reader.result is Result.SUCCESS)
                assert data is None or len(data) == size
            elif turn < 8:
                try:
                    target = targets[turn % 2]
                    count = reader.read_many_into(target)
                    seen[reader.result] += 1
                    assert count * max(reader.size, 1) <= len(target) and count <= max(reader.elements, 1)
                    assert (count > 0) == (reader.result is Result.SUCCESS)
                except UsageError as error:
                    assert "holds no element" in str(error)
            elif turn < 9:
                reader.drain()
            elif turn < 10:
                reader.wait(chance.choice((0, 1e-5, 1e-3)))
            elif turn < 11:
                assert 0 <= reader.pending <= U64
            elif chance.randrange(20) == 0:
                found, state = newest(memory, chance.choice((0, 1, 5)))
                assert len(found) <= 5 and state in ("active", "inactive", "incompatible")
                bell_state(bell)
            assert reader.size * reader.elements <= capacity
    print(*(f"{result.name}={count}" for result, count in seen.items()), f"epochs={reader.counters['epochs']}")


def write(writer: Writer, end: float, chance: random.Random) -> None:
    """A Writer follows its own counters, whatever stands in the region."""
    size, elements = writer.size, writer.elements
    written = 0
    while time.monotonic() < end:
        for _ in range(100):
            turn = chance.randrange(100)
            if turn < 60:
                writer.write(bytes(chance.randrange(size + 1)))
                written += 1
            elif turn < 98:
                written += writer.write_many(bytes(size * chance.randrange(2 * elements)))
            elif turn < 99:
                writer.activate(1)
                written = 0
            else:
                writer.deactivate()
                writer.activate()
                written = 0
            assert (writer.written, writer.size, writer.elements) == (written, size, elements)
    print(f"written={written}")


def main(mode: str, seconds: str, seed: str) -> None:
    fd, page = os.memfd_create("region"), os.memfd_create("bell")
    os.ftruncate(fd, LENGTH)
    os.ftruncate(page, PAGE)
    chance = random.Random(int(seed))
    bell = fenced(PAGE, page)
    memory = fenced(LENGTH, fd, writable=mode != "reader")
    if mode.startswith("over"):     # proof that a byte too far is noticed
        struct.pack_into("=8Q", fenced(LENGTH, fd), 0, TRANSPORT, 1, PROTOCOL, 8, 1, 0, 1, 1)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
        if mode == "overread":
            ctypes.string_at(address + LENGTH, 1)
        else:
            ctypes.memset(address - 1, 0, 1)
        return
    parent = os.getpid()
    attacker = os.fork()
    if attacker == 0:
        libc.prctl(1, signal.SIGKILL)   # PR_SET_PDEATHSIG: gone with its victim, however that ends
        if os.getppid() == parent:
            attack(fenced(LENGTH, fd), bell, int(seed))
        os._exit(1)
    end = time.monotonic() + float(seconds)
    try:
        if mode == "reader":
            protocol = chance.choice((None, PROTOCOL))
            with Reader(memory, protocol=protocol, bell=bell) as reader:
                read(reader, memory, bell, end, chance)
        else:
            with Writer(memory, size=chance.choice((1, 8, 24, 1000, 4096)), protocol=PROTOCOL, bell=bell) as writer:
                write(writer, end, chance)
    finally:
        os.kill(attacker, signal.SIGKILL)
        _, status = os.waitpid(attacker, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the attacker did not last"


if __name__ == "__main__":
    main(*sys.argv[1:])
