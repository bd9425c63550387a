"""usage: tools/torn.py [--bytes N] [--seed S]

Torn reads: a writer at full speed, in a process of its own, overruns a reader that checks every byte it is given. What
is delivered comes to N (10^9) bytes, over elements of 64, 1522 and 4120 bytes (1, 12 and 19 parts of it: small ones take
longer for as many bytes) and rings of 4, 16 and 64 elements (1, 3 and 12 parts). Each element carries its number, which
must be that of the reader's position, and a checksum of all its other bytes; what was delivered and what was reported
lost must add up to what was written. The two have a CPU each, which others may use, too: on one they would take turns.

A control copies slots of the same ring without asking whether they stayed intact: it has to find torn elements, or the
run proves nothing. Exit status 1 where anything is not as it must be.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from muenfast import Reader, Result, Writer

SOURCE = Path(__file__).resolve().parent.parent / "tests" / "c" / "elements.c"
SIZES = {64: 1, 1522: 12, 4120: 19}   # bytes of an element, and the share of what is delivered
RINGS = {4: 1, 16: 3, 64: 12}   # elements, and the share of that
CPUS = sorted(os.sched_getaffinity(0))
HEADER = 64
BEFORE = 24         # bytes before the region: no element, not even one of 64 bytes, lies in one cache line
PROTOCOL = 0x70121
PATIENCE = 60.0     # seconds without one element, or for the writer's end
CONTROL = 20.0      # seconds that the control may need to see a torn element


class Torn(Exception):
    """Something was delivered, or counted, that must not be."""


class Elements:
    """A buffer of `count` elements of `size` bytes, and what tests/c/elements.c does with it."""

    def __init__(self, library: str, size: int, count: int) -> None:
        lib = ctypes.CDLL(library)
        for call in (lib.fill, lib.whole):
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64]
        lib.fill.restype, lib.whole.restype = None, ctypes.c_uint64
        self._lib, self.size, self.count = lib, size, count
        self.buffer = bytearray(count * size)
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self.buffer))

    def fill(self, first: int, count: int) -> memoryview:
        """Elements first, first + 1, ..., in the buffer."""
        self._lib.fill(self._address, self.size, first, count)
        return memoryview(self.buffer)[:count * self.size]

    def whole(self, first: int, count: int) -> int:
        """How many of the first `count` are whole and bear the numbers first, first + 1, ..., up to one that is not."""
        return int(self._lib.whole(self._address, self.size, first, count))


def build(place: str) -> str:
    library = f"{place}/elements.so"
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc").split()
    subprocess.run([*compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library,
                    str(SOURCE)], check=True)
    return library


def write(library: str, fd: str, size: str, ring: str, seed: str) -> None:
    """The writing process: without regard for anybody until SIGTERM; says how much that was, leaves after a line."""
    chance = random.Random(int(seed))
    elements = Elements(library, int(size), 4 * int(ring))
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    with mmap.mmap(int(fd), 0) as page, memoryview(page)[BEFORE:] as memory, \
            Writer(memory, size=int(size), protocol=PROTOCOL) as writer:
        print("ready", flush=True)
        while not stopped:
            writer.write_many(elements.fill(writer.written, chance.randint(1, elements.count)))
        print(writer.written, flush=True)
        sys.stdin.readline()


@contextmanager
def writing(library: str, fd: int, size: int, ring: int, seed: int) -> Iterator[subprocess.Popen[str]]:
    """The writing process, ready."""
    process = subprocess.Popen([sys.executable, __file__, "write", library, *map(str, (fd, size, ring, seed))],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd])
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise Torn("the writer did not start")
        if len(CPUS) > 1:
            os.sched_setaffinity(0, {CPUS[0]})
            os.sched_setaffinity(process.pid, {CPUS[1]})
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass
class Books:
    """What one run came to."""

    elements: int = 0
    lost: int = 0
    overruns: int = 0
    control: int = 0    # torn elements that the control saw
    seconds: float = 0.0


def read(reader: Reader, process: subprocess.Popen[str], elements: Elements, wanted: int) -> Books:
    """Reads `wanted` elements or more, stops the writer, and reads what is left."""
    assert process.stdout is not None and process.stdin is not None
    begin = alive = time.monotonic()
    delivered, written = 0, -1
    while written < 0 or reader.position < written:
        count = reader.read_many_into(elements.buffer)
        if count:
            first = reader.position - count
            if (whole := elements.whole(first, count)) != count:
                raise Torn(f"element {first + whole} is torn, or another one was delivered under its number")
            delivered += count
            alive = time.monotonic()
            if written < 0 and delivered >= wanted:
                process.terminate()
                written = int(process.stdout.readline())
        elif reader.result is Result.NO_DATA:
            os.sched_yield()    # the writer may be waiting for this very CPU
        elif reader.result is not Result.OVERRUN_DETECTED:
            raise Torn(f"{reader.result.name} in the middle of an epoch")
        if not count and time.monotonic() - alive > PATIENCE:
            raise Torn(f"nothing more after {delivered} elements")
    seconds = time.monotonic() - begin
    counters = reader.counters
    if delivered + counters["lost"] != written or counters["elements"] != delivered:
        raise Torn(f"{delivered} delivered and {counters['lost']} lost are not {written} written: {counters}")
    process.stdin.write("\n")
    process.stdin.flush()
    if process.wait(PATIENCE) != 0:
        raise Torn(f"the writer ended with status {process.returncode}")
    return Books(delivered, counters["lost"], counters["overruns"], 0, seconds)


def control(memory: memoryview, elements: Elements, ring: int) -> int:
    """How many of the oldest elements are torn when they are just copied; ends with the tenth."""
    torn, end, size = 0, time.monotonic() + CONTROL, elements.size
    with memory[:HEADER].cast("Q") as words:
        while torn < 10 and time.monotonic() < end:
            at = HEADER + words[7] % ring * size
            elements.buffer[:size] = memory[at:at + size]
            (number,) = struct.unpack_from("=Q", elements.buffer)
            torn += elements.whole(number, 1) == 0
    return torn


def run(library: str, size: int, ring: int, wanted: int, seed: int) -> Books:
    """One element size and one ring. Raises Torn."""
    fd = os.memfd_create("torn")
    try:
        os.ftruncate(fd, BEFORE + HEADER + ring * size)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as page, memoryview(page)[BEFORE:] as memory, \
                Reader(memory, protocol=PROTOCOL) as reader, writing(library, fd, size, ring, seed) as process:
            reader.read()
            if reader.result is not Result.EPOCH_CHANGED:
                raise Torn(f"{reader.result.name} instead of an epoch")
            elements = Elements(library, size, ring)
            torn = control(memory, elements, ring)
            if torn == 0:
                raise Torn("the control saw no torn element: this run would prove nothing")
            books = read(reader, process, elements, wanted)
            books.control = torn
            if books.overruns == 0:
                raise Torn("the reader was never overrun: this run would prove nothing")
            return books
    finally:
        os.close(fd)


def main() -> int:
    parser = argparse.ArgumentParser(description="Torn reads: full-element checksums under overruns.")
    parser.add_argument("--bytes", type=int, default=10**9, metavar="N", help="to be delivered (default: 10^9)")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    arguments = parser.parse_args()
    total = 0
    print(f"{'size':>5} {'ring':>4} {'delivered':>12} {'bytes':>14} {'lost':>12} {'overruns':>10} {'control':>7} {'s':>6}")
    with tempfile.TemporaryDirectory() as place:
        library = build(place)
        part = -(-arguments.bytes // (sum(SIZES.values()) * sum(RINGS.values())))
        for size, share in SIZES.items():
            for ring, parts in RINGS.items():
                try:
                    books = run(library, size, ring, -(-part * share * parts // size), arguments.seed)
                except Torn as error:
                    print(f"elements of {size} bytes in a ring of {ring}: {error}")
                    return 1
                total += books.elements * size
                print(f"{size:5} {ring:4} {books.elements:12} {books.elements * size:14} {books.lost:12} "
                      f"{books.overruns:10} {books.control:7} {books.seconds:6.1f}", flush=True)
    print(f"{total} bytes delivered and checked, none torn, none unaccounted for")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(*sys.argv[2:])
    else:
        sys.exit(main())
