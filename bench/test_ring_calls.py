"""What one Python call on a ring costs (pytest-benchmark): same thread, writer and reader on private memory.

Timed: the call alone, warm. Needs the dependency group `bench`. Run: python -m pytest bench --benchmark-only
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest

from muenfast import Reader, Writer

PROTOCOL = 0x1234
ELEMENTS = 1024


@pytest.fixture(params=[64, 1522, 4120])
def ring(request: pytest.FixtureRequest) -> Any:
    """(writer, reader, one element) of one size."""
    size = request.param
    memory = mmap.mmap(-1, 64 + size * ELEMENTS)
    writer, reader = Writer(memory, size=size, protocol=PROTOCOL), Reader(memory, protocol=PROTOCOL)
    reader.read()
    yield writer, reader, bytes(size)
    writer.close()
    reader.close()
    memory.close()


def test_write(benchmark: Callable[..., Any], ring: Any) -> None:
    """Publishing one element; nobody reads."""
    writer, _, element = ring
    benchmark(writer.write, element)


def test_write_and_read(benchmark: Callable[..., Any], ring: Any) -> None:
    """Publishing one element and reading it back as bytes."""
    writer, reader, element = ring

    def both() -> bytes | None:
        writer.write(element)
        return reader.read()

    assert benchmark(both) == element


def test_write_many_and_read_many(benchmark: Callable[..., Any], ring: Any) -> None:
    """64 contiguous elements, published together, read back together."""
    writer, reader, element = ring
    data, buffer = element * 64, bytearray(len(element) * 64)

    def both() -> int:
        writer.write_many(data)
        return reader.read_many_into(buffer)

    assert benchmark(both) == 64
