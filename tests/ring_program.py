"""A program for test_ring_stress: the writing end of a channel, in a process of its own.

    ring_program.py muenfast|peer NAME SIZE REGION COUNT BATCH BELL EPOCH

Prints `ready` once active, writes COUNT elements (0: without end) after a line on standard input, prints `done`, and
closes when standard input does. Each element carries its number and the checksum of all its other bytes.
"""

from __future__ import annotations

import itertools
import struct
import sys
import zlib
from collections.abc import Callable

PROTOCOL = 0x5712E55


def element(number: int, size: int) -> bytes:
    """Number, bytes that depend on it, checksum of both."""
    filler = (number * 0x9E3779B97F4A7C15 & (1 << 64) - 1).to_bytes(8, "little")
    body = struct.pack("=Q", number) + (filler * (size // 8 + 1))[:size - 12]
    return body + struct.pack("=I", zlib.crc32(body))


def number_of(data: bytes | memoryview) -> int:
    """The number of an element that is whole."""
    number = struct.unpack_from("=Q", data)[0]
    assert struct.unpack_from("=I", data, len(data) - 4)[0] == zlib.crc32(data[:-4]), f"element {number} is torn"
    return number


def main(kind: str, name: str, *words: str) -> None:
    size, region, count, batch, bell, epoch = map(int, words)
    write: Callable[[list[bytes]], object]
    if kind == "muenfast":
        from muenfast import open_writer

        writer = open_writer(name, size=size, protocol=PROTOCOL, region_size=region, bell=bool(bell),
                             epoch=epoch or None)
        write = (lambda items: writer.write(items[0])) if batch == 1 else (lambda items: writer.write_many(b"".join(items)))
    else:
        from peer import ChannelWriter

        writer = ChannelWriter(name, size, PROTOCOL, region, epoch or None)
        writer.activate()
        batch = min(batch, writer.elements)
        write = writer.write_many
    print("ready", flush=True)
    sys.stdin.readline()
    for first in itertools.count(0, batch) if count == 0 else range(0, count, batch):
        last = first + batch if count == 0 else min(first + batch, count)
        write([element(number, size) for number in range(first, last)])
    print("done", flush=True)
    sys.stdin.read()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
