"""Any buffer goes in and out, and its bytes are not copied on the way: numpy arrays, memoryview, mmap, ctypes, array.

That there is no copy is seen twice: Python's allocator was not asked for anything of that size, and the process does
not need memory for it either (resident peak), while 64 MiB move.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import gc
import mmap
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

from muenfast import AsyncBlockDevice, BlockDevice, BlockServer, Reader, Result, Writer, exports_from_lists

SIZE = 1 << 20
PROTOCOL = 0xB0FFE4

DTYPES = ["u1", "i2", "<u4", ">u4", "i8", "f2", "f4", "f8", ">f8", "c8", "c16", "?", "S7", "U3", "V9", "g",
          [("a", "<u2"), ("b", ">f8"), ("c", "S5")]]


def shaped(dtype: Any) -> numpy.ndarray:
    """48 KiB or a little more, in whole blocks, contiguous, of that type, with some content."""
    item = numpy.dtype(dtype).itemsize
    count = next(n for n in range(1, 100_000) if n * item % 4096 == 0 and n * item >= 49152)
    data = numpy.frombuffer(bytes(i * 7 % 251 for i in range(count * item)), dtype=numpy.dtype(dtype)).copy()
    return data.reshape(2, -1) if count % 2 == 0 else data


def raw(data: Any) -> bytes:
    return data.tobytes() if isinstance(data, (numpy.ndarray, memoryview)) else bytes(data)


WRITABLE: dict[str, Callable[[bytes], Any]] = {
    "bytearray": bytearray,
    "memoryview": lambda data: memoryview(bytearray(data)),
    "slice": lambda data: memoryview(bytearray(b"x" * 24 + data + b"x" * 8))[24:-8],
    "shaped": lambda data: memoryview(bytearray(data)).cast("B", (2, len(data) // 16, 8)),
    "mmap": lambda data: filled(mmap.mmap(-1, len(data)), data),
    "ctypes": lambda data: (ctypes.c_uint16 * (len(data) // 2)).from_buffer_copy(data),
    "struct": lambda data: (_Pair * (len(data) // ctypes.sizeof(_Pair))).from_buffer_copy(data),
    "array": lambda data: array.array("d", data),
    "numpy": lambda data: numpy.frombuffer(data, ">i4").copy(),
}
READABLE = {"bytes": bytes, "read-only numpy": lambda data: numpy.frombuffer(data, "c16"), **WRITABLE}


class _Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_char * 12))


def filled(area: mmap.mmap, data: bytes) -> mmap.mmap:
    area[:] = data
    return area


@pytest.fixture
def disk(names: Callable[[str], str], request: pytest.FixtureRequest) -> Iterator[BlockDevice]:
    """A device with a RAM disk behind it, in this process; of 1 MiB unless the test says otherwise."""
    req, resp = names("req"), names("resp")
    size = getattr(request, "param", "1M")
    with BlockServer(exports_from_lists(req, resp, device=f"ram:{size}")), BlockDevice(req, resp) as device:
        yield device


# ------------------------------------------------------------------ blocks

@pytest.mark.parametrize("offset", [0, 4096, 1000], ids=["first", "block", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_every_type_go_to_disk_and_back(disk: BlockDevice, dtype: Any, offset: int) -> None:
    """Byte for byte, in whole blocks and at odd offsets."""
    data = shaped(dtype)
    assert disk.pwrite(data, offset) == data.nbytes
    assert disk.pread(data.nbytes, offset) == raw(data)
    target = numpy.zeros_like(data)
    assert disk.pread_into(target, offset) == data.nbytes
    assert raw(target) == raw(data)


@pytest.mark.parametrize("kind", READABLE)
def test_every_buffer_is_written(disk: BlockDevice, kind: str) -> None:
    """What offers contiguous bytes is taken as it is, by every call that writes."""
    data = os.urandom(16384)
    for length in (16384, 1600):
        source = READABLE[kind](data[:length])
        assert disk.pwrite(source, 8192) == length
        assert disk.pread(length, 8192) == data[:length]
    source = READABLE[kind](data)
    assert disk.pwrite_many([40960, 0, 20480, 8192], source) == 16384
    assert disk.pread(4096, 20480) == data[8192:12288]


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_buffer_is_filled(disk: BlockDevice, kind: str) -> None:
    """So is a target, by every call that reads; nothing beside it is touched."""
    data = os.urandom(16384)
    disk.pwrite(data, 8192)
    for length in (16384, 1600):
        target = WRITABLE[kind](bytes(length))
        assert disk.pread_into(target, 8192) == length
        assert raw(target) == data[:length]
        if kind == "slice":
            assert bytes(target.obj[:24]) == b"x" * 24 and bytes(target.obj[-8:]) == b"x" * 8
    target = WRITABLE[kind](bytes(16384))
    assert disk.pread_many([20480, 16384, 12288, 8192], target) == 16384
    assert raw(target) == b"".join(data[at:at + 4096] for at in (12288, 8192, 4096, 0))


STRIDED = {"numpy": lambda: numpy.zeros(8192, "u1")[::2], "columns": lambda: numpy.zeros((64, 128), "u1")[:, :64],
           "transposed": lambda: numpy.zeros((64, 64), "u1").reshape(32, 128).T,
           "memoryview": lambda: memoryview(bytearray(8192))[::2]}


@pytest.mark.parametrize("kind", STRIDED)
def test_what_is_not_contiguous_is_refused(disk: BlockDevice, kind: str) -> None:
    """The error says so, and nothing was read or written."""
    before = disk.pread(8192, 0)
    for call in (disk.pwrite, disk.pread_into, lambda data, offset: disk.pwrite_many([offset], data),
                 lambda data, offset: disk.pread_many([offset], data)):
        with pytest.raises((TypeError, ValueError, BufferError), match="contiguous"):
            call(STRIDED[kind](), 0)
    assert disk.pread(8192, 0) == before


def test_a_target_that_is_read_only_is_refused(disk: BlockDevice) -> None:
    """Whole blocks or not, one or many; the error says so."""
    for length in (4096, 100):
        for target in (bytes(length), numpy.frombuffer(bytes(length), "u1"), memoryview(bytes(length)),
                       mmap.mmap(-1, 4096, prot=mmap.PROT_READ)):
            with pytest.raises((TypeError, ValueError, BufferError), match="read-?only|not writable"):
                disk.pread_into(target, 0)
    with pytest.raises((TypeError, ValueError, BufferError), match="read-?only|not writable"):
        disk.pread_many([0], numpy.frombuffer(bytes(4096), "u1"))


@pytest.mark.parametrize("bad", [None, 5, "text", [1, 2]], ids=["none", "int", "str", "list"])
def test_what_is_no_buffer_is_refused(disk: BlockDevice, bad: object) -> None:
    """A TypeError as everywhere in Python."""
    for call in (disk.pwrite, disk.pread_into):
        with pytest.raises(TypeError):
            call(bad, 0)


def test_the_same_for_asyncio(names: Callable[[str], str]) -> None:
    """AsyncBlockDevice takes what BlockDevice takes and refuses what that refuses."""
    req, resp = names("req"), names("resp")

    async def work() -> None:
        async with AsyncBlockDevice(req, resp) as device:
            for dtype in DTYPES:
                data = shaped(dtype)
                for offset in (4096, 1000):
                    target = numpy.zeros_like(data)
                    assert await device.pwrite(data, offset) == await device.pread_into(target, offset) == data.nbytes
                    assert raw(target) == raw(data)
            data = os.urandom(8192)
            for make in WRITABLE.values():
                assert await device.pwrite(make(data), 0) == 8192
                target = make(bytes(8192))
                assert await device.pread_into(target, 0) == 8192
                assert raw(target) == data
            for bad in STRIDED.values():
                for call in (device.pwrite, device.pread_into):
                    with pytest.raises((TypeError, ValueError, BufferError), match="contiguous"):
                        await call(bad(), 0)
            for length in (4096, 100):
                with pytest.raises((TypeError, ValueError, BufferError), match="read-?only|not writable"):
                    await device.pread_into(numpy.frombuffer(bytes(length), "u1"), 0)

    with BlockServer(exports_from_lists(req, resp, device="ram:1M")):
        asyncio.run(work())


# ------------------------------------------------------------------ no copies

MOST = 1 << 20  # bytes that a call may ask for while it moves 64 MiB


@pytest.fixture
def allocated() -> Iterator[Callable[[Callable[[], object]], int]]:
    """The most that Python's allocators held at once, more than before, during a call."""
    def peak(call: Callable[[], object]) -> int:
        gc.collect()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    yield peak
    tracemalloc.stop()


@pytest.mark.parametrize("disk", ["64M"], indirect=True)
def test_64_mib_of_blocks_without_a_copy(disk: BlockDevice, allocated: Callable[[Callable[[], object]], int]) -> None:
    """Neither pwrite nor pread_into nor their many forms allocates; pread does, which shows that this would be seen."""
    data = numpy.arange(8 << 20, dtype="<u8")
    target = numpy.zeros_like(data)
    offsets = list(range(0, data.nbytes, SIZE))
    assert allocated(lambda: disk.pwrite(data, 0)) < MOST
    assert allocated(lambda: disk.pread_into(target, 0)) < MOST
    assert numpy.array_equal(target, data)
    assert allocated(lambda: disk.pwrite_many(offsets, data)) < MOST
    target[:] = 0
    assert allocated(lambda: disk.pread_many(offsets, target)) < MOST
    assert numpy.array_equal(target, data)
    assert allocated(lambda: disk.pread(data.nbytes, 0)) >= data.nbytes


def test_64_mib_of_elements_without_a_copy(allocated: Callable[[Callable[[], object]], int]) -> None:
    """write, write_many, read_into and read_many_into move bytes between the caller's memory and the ring's only."""
    each = 64 * SIZE
    memory = mmap.mmap(-1, 64 + each)
    data = numpy.arange(each // 8, dtype="<u8")
    target = numpy.zeros_like(data)
    for size in (each, SIZE):
        with Writer(memory, size=size, protocol=PROTOCOL) as writer, Reader(memory) as reader:
            reader.read()
            assert allocated(lambda: writer.write_many(data)) < MOST
            target[:] = 0
            assert allocated(lambda: reader.read_many_into(target)) < MOST
            assert reader.result is Result.SUCCESS and numpy.array_equal(target, data)
            assert allocated(lambda: writer.write(data[:size // 8])) < MOST
            target[:] = 0
            assert allocated(lambda: reader.read_into(target)) < MOST
            assert numpy.array_equal(target[:size // 8], data[:size // 8])
            writer.write(data[:size // 8])
            assert allocated(reader.read) >= size
    memory.close()


_RESIDENT = """
import mmap, sys
from muenfast import BlockDevice
device = BlockDevice(sys.argv[1], sys.argv[2])
area = mmap.mmap(-1, 64 << 20)
for at in range(0, len(area), 4096):
    area[at] = at >> 12 & 255
device.pread(4096, 0)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
before = peak()
device.pwrite(area, 0)
device.pread_into(area, 0)
device.pread_many(range(0, 64 << 20, 1 << 20), area)
device.pwrite_many(range(0, 64 << 20, 1 << 20), area)
print(peak() - before)
assert all(area[at] == at >> 12 & 255 for at in range(0, len(area), 4096))
copy = device.pread(64 << 20, 0)
print(peak() - before)
device.close()
"""


def test_the_process_needs_no_memory_for_a_copy(names: Callable[[str], str]) -> None:
    """Peak resident memory of a process that moves 64 MiB four times: that of the buffer, and of the rings it maps."""
    req, resp = names("req"), names("resp")
    with BlockServer(exports_from_lists(req, resp, device="ram:64M")):
        run = subprocess.run([sys.executable, "-c", _RESIDENT, req, resp], capture_output=True, text=True, timeout=120,
                             check=False)
    assert (run.returncode, run.stderr) == (0, "")
    moved, copied = map(int, run.stdout.split())
    assert moved < 8 << 20
    assert copied > 60 << 20


# ------------------------------------------------------------------ rings

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_every_type_cross_a_ring(dtype: Any) -> None:
    """As one element and as many, out of any contiguous array and into one."""
    data = shaped(dtype)
    memory = bytearray(64 + 4 * data.nbytes)
    for size in (data.nbytes, data.nbytes // 8):
        with Writer(memory, size=size, protocol=PROTOCOL) as writer, Reader(memory) as reader:
            reader.read()
            assert writer.write_many(data) == data.nbytes // size
            target = numpy.zeros_like(data)
            assert reader.read_many_into(target) == data.nbytes // size
            assert raw(target) == raw(data)
            if size == data.nbytes:
                writer.write(data)
                assert reader.read_into(target) is Result.SUCCESS and raw(target) == raw(data)


@pytest.mark.parametrize("kind", READABLE)
def test_every_buffer_crosses_a_ring(kind: str) -> None:
    """Into write and write_many; those that are writable out of read_into and read_many_into, too."""
    data = os.urandom(4096)
    memory = bytearray(64 + 16 * 1024)
    with Writer(memory, size=1024, protocol=PROTOCOL) as writer, Reader(memory) as reader:
        reader.read()
        writer.write_many(READABLE[kind](data))
        writer.write(READABLE[kind](data[:1024]))
        if kind in WRITABLE:
            target = WRITABLE[kind](bytes(4096))
            assert reader.read_many_into(target) == 4 and raw(target) == data
            target = WRITABLE[kind](bytes(1024))
            assert reader.read_into(target) is Result.SUCCESS and raw(target) == data[:1024]
        else:
            assert b"".join(iter(reader.read, None)) == data + data[:1024]


@pytest.mark.parametrize("kind", STRIDED)
def test_a_ring_refuses_what_is_not_contiguous(kind: str) -> None:
    """Nothing is published or consumed, and the object is free for the next call."""
    memory = bytearray(64 + 8 * 4096)
    with Writer(memory, size=4096, protocol=PROTOCOL) as writer, Reader(memory) as reader:
        reader.read()
        for put in (writer.write, writer.write_many):
            with pytest.raises((TypeError, ValueError, BufferError), match="contiguous"):
                put(STRIDED[kind]())
        assert writer.written == 0
        writer.write(b"kept")
        for take in (reader.read_into, reader.read_many_into):
            with pytest.raises((TypeError, ValueError, BufferError), match="contiguous"):
                take(STRIDED[kind]())
            with pytest.raises((TypeError, ValueError, BufferError), match="read-?only|not writable"):
                take(numpy.frombuffer(bytes(4096), "u1"))
        assert reader.read()[:4] == b"kept"
