"""Reader and Writer in one process: what each call does, refuses and leaves behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vectors_loader import ChannelVector, Read, channel_vectors

import muenfast
from muenfast import BrokenChannelError, Reader, Result, UsageError, Writer
from muenfast._ring import newest

PROTOCOL = 0x1234
TRANSPORT = 0x487312B6B79A9B6D
U64 = 1 << 64
FIELDS = ("transport", "epoch", "protocol", "size", "elements", "reserved", "wsc", "wc")
BIG = 20_000  # bytes of an element whose copying releases the GIL


def region(elements: int, size: int = 8) -> bytearray:
    return bytearray(64 + elements * size)


def number(n: int, size: int = 8) -> bytes:
    """Element number n."""
    return (n % U64).to_bytes(8, "little") * (size // 8)


class Hand:
    """A channel that is written with struct alone: any header, any counters, any order of stores."""

    def __init__(self, elements: int = 8, size: int = 8, epoch: int = 5, counter: int = 0) -> None:
        self.elements, self.size = elements, size
        self.memory = region(elements, size)
        self.set(transport=TRANSPORT, epoch=epoch, protocol=PROTOCOL, size=size, elements=elements, wsc=counter,
                 wc=counter)

    def set(self, **fields: int) -> None:
        for name, value in fields.items():
            struct.pack_into("=Q", self.memory, 8 * FIELDS.index(name), value % U64)

    def get(self, name: str) -> int:
        return struct.unpack_from("=Q", self.memory, 8 * FIELDS.index(name))[0]

    def push(self, n: int = 1) -> None:
        """Publishes n elements, each holding its own number."""
        first = self.get("wc")
        self.set(wsc=first + n)
        for k in range(first, first + n):
            at = 64 + k % U64 % self.elements * self.size
            self.memory[at:at + self.size] = number(k, self.size)
        self.set(wc=first + n)

    def reader(self, **options: object) -> Reader:
        """A reader that has synchronised and stands at WC."""
        reader = Reader(self.memory, protocol=PROTOCOL, **options)
        reader.drain()
        return reader


@pytest.fixture
def pair() -> Callable[..., tuple[Writer, Reader]]:
    """A Writer and a synchronised Reader of one channel of `elements` elements."""

    def make(elements: int = 8, size: int = 8, **options: object) -> tuple[Writer, Reader]:
        memory = region(elements, size)
        writer = Writer(memory, size=size, protocol=PROTOCOL, **options)
        reader = Reader(memory, protocol=PROTOCOL, **options)
        assert reader.read() is None
        assert reader.result is Result.EPOCH_CHANGED
        return writer, reader

    return make


@contextlib.contextmanager
def running(target: Callable[[], object]) -> Iterator[threading.Thread]:
    """A thread that is over when the block is left."""
    thread = threading.Thread(target=target)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for what must come; a minute is no measurement, it ends a test that would hang."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)


# ------------------------------------------------------------------ vectors

VECTORS = channel_vectors()


def placeable(vector: ChannelVector, read: Read) -> bool:
    """Whether a reader can be brought to where the read begins: only an intact channel takes a reader in."""
    return read.rc is None or 64 + vector.header["size"] * vector.header["elements"] <= len(vector.region)


CASES = [pytest.param(vector, read, id=f"{vector.name}-{k}")
         for vector in VECTORS for k, read in enumerate(vector.reads) if placeable(vector, read)]


def test_every_vector_is_run() -> None:
    """No vector is without a read that can be made."""
    assert {case.values[0].name for case in CASES} == {vector.name for vector in VECTORS}


@pytest.mark.parametrize("how", ["read", "read_into", "read_many_into"])
@pytest.mark.parametrize(("vector", "read"), CASES)
def test_vector(vector: ChannelVector, read: Read, how: str) -> None:
    """The result, the data, the loss and the position are those that were worked out by hand from the protocol."""
    memory = bytearray(vector.region)
    reader = Reader(memory, protocol=vector.reader_protocol)
    if read.rc is not None:
        struct.pack_into("=QQ", memory, 48, read.rc, read.rc)
        reader.drain()
        assert (reader.position, reader.epoch) == (read.rc, vector.header["epoch"])
        memory[:] = vector.region
    if how == "read":
        data = reader.read()
    else:
        buffer = bytearray(vector.header["size"] or 1)
        got = getattr(reader, how)(buffer)
        assert got == (reader.result if how == "read_into" else int(reader.result is Result.SUCCESS))
        data = bytes(buffer) if reader.result is Result.SUCCESS else None
    assert (reader.result.name, data) == (read.result, read.data)
    assert reader.lost == read.lost == reader.counters["lost"]
    if read.rc_after is None:
        assert reader.epoch == 0
    else:
        assert (reader.epoch, reader.position) == (vector.header["epoch"], read.rc_after)


# ------------------------------------------------------------------ the six results

def test_the_six_results_and_their_numbers() -> None:
    """The names of the SHMStream specification, in its order."""
    assert {result.name: result.value for result in Result} == {
        "INACTIVE": 0, "INCOMPATIBLE_INTERFACE": 1, "EPOCH_CHANGED": 2, "NO_DATA": 3, "OVERRUN_DETECTED": 4,
        "SUCCESS": 5}
    assert muenfast.Result is Result


def test_a_life_of_a_channel_through_all_six_results() -> None:
    """A blank region is inactive; activation, data, silence, overrun, a foreign protocol and the end each say so."""
    memory = region(4)
    reader = Reader(memory, protocol=PROTOCOL)
    assert (reader.read(), reader.result) == (None, Result.INACTIVE)
    writer = Writer(memory, size=8, protocol=PROTOCOL)
    assert (reader.read(), reader.result) == (None, Result.EPOCH_CHANGED)
    assert (reader.read(), reader.result) == (None, Result.NO_DATA)
    writer.write(b"one")
    assert (reader.read(), reader.result) == (b"one\0\0\0\0\0", Result.SUCCESS)
    for _ in range(5):
        writer.write(b"many")
    assert (reader.read(), reader.result, reader.lost) == (None, Result.OVERRUN_DETECTED, 5)
    assert (reader.read(), reader.result) == (None, Result.NO_DATA)
    writer.close()
    assert (reader.read(), reader.result) == (None, Result.INACTIVE)
    with Writer(memory, size=8, protocol=PROTOCOL + 1):
        assert (reader.read(), reader.result) == (None, Result.INCOMPATIBLE_INTERFACE)


CORRUPTED = [
    ("transport", 0, Result.INCOMPATIBLE_INTERFACE), ("transport", TRANSPORT ^ 1, Result.INCOMPATIBLE_INTERFACE),
    ("transport", TRANSPORT ^ 1 << 63, Result.INCOMPATIBLE_INTERFACE),
    ("epoch", 0, Result.INACTIVE), ("epoch", 6, Result.EPOCH_CHANGED), ("epoch", U64 - 1, Result.EPOCH_CHANGED),
    ("protocol", 0, Result.INCOMPATIBLE_INTERFACE), ("protocol", PROTOCOL ^ 1 << 63, Result.INCOMPATIBLE_INTERFACE),
    ("size", 0, Result.INCOMPATIBLE_INTERFACE), ("size", 9, Result.INCOMPATIBLE_INTERFACE),
    ("size", U64 - 1, Result.INCOMPATIBLE_INTERFACE), ("size", 1 << 61, Result.INCOMPATIBLE_INTERFACE),
    ("elements", 0, Result.INCOMPATIBLE_INTERFACE), ("elements", 9, Result.INCOMPATIBLE_INTERFACE),
    ("elements", 1 << 61, Result.INCOMPATIBLE_INTERFACE), ("elements", U64 - 1, Result.INCOMPATIBLE_INTERFACE),
    ("reserved", U64 - 1, Result.EPOCH_CHANGED), ("wsc", U64 - 1, Result.EPOCH_CHANGED),
    ("wc", U64 - 1, Result.EPOCH_CHANGED),
]


@pytest.mark.parametrize(("field", "value", "result"), CORRUPTED)
def test_a_corrupted_field_gives_the_named_result_to_a_new_reader(field: str, value: int, result: Result) -> None:
    """Synchronising looks at the epoch, then at transport, protocol, size and elements, and at nothing else."""
    hand = Hand()
    hand.set(**{field: value})
    reader = Reader(hand.memory, protocol=PROTOCOL)
    assert (reader.read(), reader.result) == (None, result)
    assert (reader.epoch != 0) is (result is Result.EPOCH_CHANGED)
    assert reader.read_into(bytearray(64)) in (result, Result.SUCCESS, Result.NO_DATA, Result.OVERRUN_DETECTED)


@pytest.mark.parametrize("field", ["transport", "protocol", "size", "elements", "reserved"])
@pytest.mark.parametrize("value", [0, 1, 9, 1 << 63, U64 - 1])
def test_a_synchronised_reader_uses_its_copies_of_the_geometry(field: str, value: int) -> None:
    """Once checked, no field of the geometry is looked at again: a writer cannot move it under a reader."""
    hand = Hand()
    reader = hand.reader()
    hand.push(3)
    hand.set(**{field: value})
    assert [reader.read() for _ in range(3)] == [number(k) for k in range(3)]
    assert (reader.size, reader.elements) == (8, 8)


@pytest.mark.parametrize(("fields", "result", "lost"), [
    ({"wc": 9}, Result.OVERRUN_DETECTED, 9), ({"wc": (1 << 63) - 1}, Result.OVERRUN_DETECTED, (1 << 63) - 1),
    ({"wsc": 9}, Result.OVERRUN_DETECTED, 4), ({"wsc": U64 - 1}, Result.OVERRUN_DETECTED, 4),
    ({"wsc": 8}, Result.SUCCESS, 0), ({"epoch": 0}, Result.INACTIVE, 0), ({"epoch": 6}, Result.EPOCH_CHANGED, 0),
])
def test_corrupted_counters_and_epochs_meet_a_synchronised_reader(fields: dict[str, int], result: Result,
                                                                  lost: int) -> None:
    """An impossible distance is an overrun, a new epoch a new beginning; neither delivers anything."""
    hand = Hand()
    reader = hand.reader()
    hand.push(4)
    hand.set(**fields)
    data = reader.read()
    assert (reader.result, reader.lost) == (result, lost)
    assert data == (number(0) if result is Result.SUCCESS else None)


def test_any_protocol_and_size_are_taken_where_none_is_asked_for() -> None:
    """None accepts what stands there, except a protocol of 0."""
    hand = Hand()
    reader = Reader(hand.memory)
    reader.read()
    assert (reader.result, reader.size) == (Result.EPOCH_CHANGED, 8)
    assert Reader(hand.memory, size=16).read_into(bytearray(16)) is Result.INCOMPATIBLE_INTERFACE
    hand.set(protocol=0)
    assert Reader(hand.memory).read_into(bytearray(16)) is Result.INCOMPATIBLE_INTERFACE


def test_a_region_of_a_header_alone_holds_no_element() -> None:
    """64 bytes are enough to look at, and never to read from."""
    hand = Hand(elements=1)
    reader = Reader(hand.memory[:64], protocol=PROTOCOL)
    assert (reader.read(), reader.result) == (None, Result.INCOMPATIBLE_INTERFACE)


# ------------------------------------------------------------------ writing

@pytest.mark.parametrize("size", [8, BIG])
def test_a_short_element_is_padded_with_zeros(pair: Callable[..., tuple[Writer, Reader]], size: int) -> None:
    """What an older element left in the slot never goes out behind a shorter one."""
    writer, reader = pair(elements=1, size=size)
    for data in (b"\xff" * size, b"abc", b"", b"\xff" * (size - 1)):
        writer.write(data)
        assert reader.read() == data + bytes(size - len(data))


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda data: array("Q", data)],
                         ids=["bytes", "bytearray", "memoryview", "array"])
@pytest.mark.parametrize("size", [8, BIG])
def test_write_takes_any_contiguous_buffer(pair: Callable[..., tuple[Writer, Reader]], size: int,
                                           make: Callable[[bytes], object]) -> None:
    """One element from whatever offers its bytes."""
    writer, reader = pair(elements=2, size=size)
    writer.write(make(number(0x0102030405060708, size)))
    assert reader.read() == number(0x0102030405060708, size)


@pytest.mark.parametrize("size", [8, BIG])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 23])
def test_write_many_publishes_each_element_in_order(count: int, size: int) -> None:
    """Contiguous or iterable: the same elements in the same slots, wrapped or not; more than the ring keeps the last."""
    for data in (b"".join(number(k, size) for k in range(count)), [number(k, size) for k in range(count)],
                 (number(k, size) for k in range(count))):
        memory = region(8, size)
        with Writer(memory, size=size, protocol=PROTOCOL) as writer:
            assert writer.write_many(data) == count == writer.written
            assert newest(memory, 100)[0] == [(k, number(k, size)) for k in range(max(0, count - 8), count)]


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_batches_wrap_at_every_position(pair: Callable[..., tuple[Writer, Reader]], start: int, count: int) -> None:
    """A batch that crosses the end of the ring is cut there on both sides and put together again."""
    writer, reader = pair(elements=8)
    writer.write_many([b"."] * start)
    reader.drain()
    writer.write_many(b"".join(number(k) for k in range(count)))
    buffer = bytearray(8 * 8)
    assert reader.read_many_into(buffer) == count
    assert bytes(buffer[:8 * count]) == b"".join(number(k) for k in range(count))
    assert reader.position == start + count


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5])
def test_a_batch_is_at_most_a_quarter_of_the_ring(elements: int) -> None:
    """A contiguous buffer goes out in batches that leave a reader a head start; a ring of one works, too."""
    with Writer(region(elements), size=8, protocol=PROTOCOL) as writer:
        assert writer.write_many(bytes(8 * 7)) == 7
        assert writer.counters["batches"] == 7


@pytest.mark.parametrize("data", [b"123456789", bytes(9)])
def test_an_element_that_does_not_fit_is_refused_and_nothing_written(pair: Callable[..., tuple[Writer, Reader]],
                                                                     data: bytes) -> None:
    """Too long, or no whole number of elements: UsageError, and neither a counter nor a byte has changed."""
    writer, reader = pair()
    source = bytearray(data)
    with pytest.raises(UsageError, match="9 bytes"):
        writer.write(source)
    with pytest.raises(UsageError, match="9 bytes"):
        writer.write_many(source)
    source.append(0)  # no buffer of it is held any more
    assert (writer.written, reader.read(), reader.result) == (0, None, Result.NO_DATA)
    writer.write(b"still")
    assert reader.read() == b"still\0\0\0"


def test_what_an_iterable_raised_leaves_what_was_written_before(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """write_many of an iterable is one write after the other: an error in the middle comes through."""
    writer, reader = pair()

    def items() -> Iterator[bytes]:
        yield b"first"
        raise LookupError("no more")

    with pytest.raises(LookupError):
        writer.write_many(items())
    assert (reader.read(), reader.read()) == (b"first\0\0\0", None)
    with pytest.raises(UsageError):
        writer.write_many([b"second", bytes(9)])
    assert (reader.read(), reader.read()) == (b"second\0\0", None)


@pytest.mark.parametrize("bad", [None, 3, "text", memoryview(bytes(16))[::2]], ids=["none", "int", "str", "strided"])
def test_what_is_no_contiguous_buffer_is_refused(pair: Callable[..., tuple[Writer, Reader]], bad: object) -> None:
    """TypeError or BufferError as everywhere in Python, and the Writer lives on."""
    writer, reader = pair()
    with pytest.raises((TypeError, BufferError)):
        writer.write(bad)
    with pytest.raises((TypeError, BufferError)):
        writer.write_many(bad)
    writer.write(b"on")
    assert reader.read() == b"on" + bytes(6)


def test_an_inactive_writer_refuses_to_write_until_activated(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """deactivate() ends the epoch, activate() starts another: zeroed, counters from 0, unread elements gone."""
    writer, reader = pair()
    writer.write(b"unread")
    writer.deactivate()
    assert writer.epoch == 0
    for call in (lambda: writer.write(b"x"), lambda: writer.write_many(b"12345678")):
        with pytest.raises(UsageError, match=r"activate\(\)"):
            call()
    assert (reader.read(), reader.result, reader.epoch) == (None, Result.INACTIVE, 0)
    writer.deactivate()
    writer.activate(9)
    assert (writer.epoch, writer.written) == (9, 0)
    assert (reader.read(), reader.result, reader.epoch) == (None, Result.EPOCH_CHANGED, 9)
    assert (reader.read(), reader.result) == (None, Result.NO_DATA)
    writer.write(b"new")
    assert reader.read() == b"new" + bytes(5)


def test_starting_zeroes_the_region_to_its_end() -> None:
    """Memory after the last element is zero: what a former life with another element size left there goes, too."""
    memory = bytearray(b"\xff" * (64 + 3 * 8 + 7))
    with Writer(memory, size=8, protocol=PROTOCOL):
        assert memory[64:] == bytes(3 * 8 + 7)


@pytest.mark.parametrize("epoch", [0, -1, U64])
def test_an_epoch_is_a_non_zero_64_bit_number(epoch: int) -> None:
    """0 would mean inactive."""
    with pytest.raises(UsageError, match="epoch"):
        Writer(region(2), size=8, protocol=PROTOCOL, epoch=epoch)
    with Writer(region(2), size=8, protocol=PROTOCOL) as writer:
        with pytest.raises(UsageError, match="epoch"):
            writer.activate(epoch)
        assert writer.epoch != 0


def test_epochs_are_random_unless_given() -> None:
    """Two starts are told apart without anybody keeping count."""
    memory = region(2)
    seen = set()
    for _ in range(50):
        with Writer(memory, size=8, protocol=PROTOCOL) as writer:
            seen.add(writer.epoch)
            writer.activate()
            seen.add(writer.epoch)
    assert len(seen) == 100
    assert all(0 < epoch < U64 for epoch in seen)


# ------------------------------------------------------------------ reading

TARGETS = {"bytearray": bytearray, "array-B": lambda n: array("B", bytes(n)), "array-Q": lambda n: array("Q", bytes(n)),
           "memoryview": lambda n: memoryview(bytearray(n)),
           "shaped": lambda n: memoryview(bytearray(n)).cast("B", (n // 8, 8))}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("size", [8, BIG])
def test_reading_into_any_writable_buffer(pair: Callable[..., tuple[Writer, Reader]], kind: str, size: int) -> None:
    """One or many elements land at the start of the buffer; nothing behind them is touched."""
    writer, reader = pair(elements=4, size=size)
    writer.write_many(b"".join(number(k, size) for k in range(1, 4)))
    target = TARGETS[kind](size + 16)
    assert reader.read_into(target) is Result.SUCCESS
    assert bytes(target) == number(1, size) + bytes(16)
    target = TARGETS[kind](3 * size)
    assert reader.read_many_into(target) == 2
    assert bytes(target) == number(2, size) + number(3, size) + bytes(size)
    assert reader.read_many_into(target) == 0
    assert reader.result is Result.NO_DATA


def test_a_buffer_takes_as_many_whole_elements_as_fit(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """What does not fit waits for the next call."""
    writer, reader = pair()
    writer.write_many(b"".join(number(k) for k in range(5)))
    buffer = bytearray(8 * 2 + 7)
    counts = [reader.read_many_into(buffer) for _ in range(4)]
    assert counts == [2, 2, 1, 0]
    assert reader.position == 5


@pytest.mark.parametrize("length", [0, 7])
def test_a_buffer_too_small_is_refused_and_the_element_kept(pair: Callable[..., tuple[Writer, Reader]],
                                                            length: int) -> None:
    """UsageError names both sizes; the buffer is let go of and the element still there."""
    writer, reader = pair()
    writer.write(b"kept")
    for call in (reader.read_into, reader.read_many_into):
        small = bytearray(length)
        with pytest.raises(UsageError, match=f"{length} bytes holds no element of 8"):
            call(small)
        small.append(0)
    assert reader.read() == b"kept" + bytes(4)


@pytest.mark.parametrize("bad", [b"readonly", None, memoryview(bytearray(32))[::2]], ids=["bytes", "none", "strided"])
def test_a_target_that_cannot_be_written_is_refused(pair: Callable[..., tuple[Writer, Reader]], bad: object) -> None:
    """BufferError or TypeError as everywhere in Python, and the Reader lives on."""
    writer, reader = pair()
    writer.write(b"kept")
    for call in (reader.read_into, reader.read_many_into):
        with pytest.raises((TypeError, BufferError)):
            call(bad)
    assert reader.read() == b"kept" + bytes(4)


def test_drain_skips_to_what_comes_next(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """Skipped elements are neither delivered nor lost; draining synchronises where that is due."""
    writer, reader = pair()
    for count in (3, 8, 20):
        writer.write_many([b"old"] * count)
        reader.drain()
        assert (reader.read(), reader.result) == (None, Result.NO_DATA)
        writer.write(b"new")
        assert reader.read() == b"new" + bytes(5)
    assert reader.counters["lost"] == reader.counters["overruns"] == 0
    writer.activate()
    writer.write(b"skipped")
    reader.drain()
    assert (reader.epoch, reader.position) == (writer.epoch, 1)
    writer.deactivate()
    reader.drain()
    assert reader.epoch == 0


def test_an_overrun_costs_what_it_says_and_goes_on_at_wc(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """`lost` is that of the last overrun, the counter is their sum; a full ring is no overrun, one more is."""
    writer, reader = pair(elements=4)
    writer.write_many([number(k) for k in range(4)])
    assert reader.pending == 4
    assert [reader.read() for _ in range(4)] == [number(k) for k in range(4)]
    for count in (5, 50):
        writer.write_many([b"gone"] * count)
        assert reader.pending == count
        assert (reader.read(), reader.result, reader.lost) == (None, Result.OVERRUN_DETECTED, count)
        assert (reader.pending, reader.position) == (0, writer.written)
        writer.write(b"kept")
        assert reader.read() == b"kept" + bytes(4)
        assert reader.lost == count
    assert (reader.counters["overruns"], reader.counters["lost"]) == (2, 55)


def test_an_overrun_between_two_reads_of_what_was_seen_together(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """A reader that once saw three elements looks again after each copy: the overwritten ones are lost, not torn."""
    writer, reader = pair(elements=4)
    writer.write_many([number(k) for k in range(3)])
    assert reader.read() == number(0)
    writer.write_many([number(k) for k in range(3, 8)])
    assert (reader.read(), reader.result, reader.lost) == (None, Result.OVERRUN_DETECTED, 7)


def test_readers_are_independent_of_each_other(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """Each has its own position; a slow one's overrun is its own."""
    memory = region(4)
    writer = Writer(memory, size=8, protocol=PROTOCOL)
    readers = [Reader(memory) for _ in range(3)]
    for reader in readers:
        reader.read()
    for k in range(10):
        writer.write(number(k))
        assert readers[0].read() == number(k)
        if k % 2:
            assert [readers[1].read(), readers[1].read()] == [number(k - 1), number(k)]
    assert (readers[2].read(), readers[2].lost) == (None, 10)


def test_an_epoch_change_is_told_once_and_discards_the_old(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """After a restart nothing of the former life is delivered, seen before or not."""
    writer, reader = pair()
    writer.write_many([b"a", b"b", b"c"])
    assert reader.read() == b"a" + bytes(7)
    writer.activate()
    writer.write(b"new")
    assert (reader.read(), reader.result, reader.epoch) == (None, Result.EPOCH_CHANGED, writer.epoch)
    assert [reader.read(), reader.read()] == [b"new" + bytes(5), None]
    assert reader.counters["epochs"] == 2


def test_a_restart_with_another_geometry_is_followed() -> None:
    """A reader that asked for none takes the new size and number; the buffers follow."""
    memory = bytearray(64 + 64)
    reader = Reader(memory)
    for size in (8, 16, 64, 1):
        with Writer(memory, size=size, protocol=PROTOCOL) as writer:
            reader.read()
            assert (reader.result, reader.size, reader.elements) == (Result.EPOCH_CHANGED, size, 64 // size)
            writer.write(b"\xaa" * size)
            assert reader.read() == b"\xaa" * size


def test_a_restart_under_the_same_epoch_is_an_epoch_change(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """Muen's own peers always use epoch 1: WC below RC tells."""
    memory = region(8)
    writer = Writer(memory, size=8, protocol=PROTOCOL, epoch=1)
    reader = Reader(memory)
    reader.read()
    writer.write_many([number(k) for k in range(5)])
    assert [reader.read() for _ in range(5)] == [number(k) for k in range(5)]
    writer.activate(1)
    writer.write(b"again")
    assert (reader.read(), reader.result, reader.position) == (None, Result.EPOCH_CHANGED, 0)
    assert reader.read() == b"again" + bytes(3)


@pytest.mark.parametrize(("wsc", "wc"), [(0, 3), (0, 0), (1, 0), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("many", [False, True])
def test_a_restart_under_the_same_epoch_takes_back_what_was_seen(wsc: int, wc: int, many: bool) -> None:
    """Of three elements that a reader saw together it read one; then the writer starts anew, in the same epoch.

    The slots are zero or half written again: WSC below the WC that was seen says so, and nothing of them is delivered.
    """
    hand = Hand(epoch=1)
    reader = hand.reader()
    hand.push(3)
    assert reader.read() == number(0)
    hand.memory[64:] = bytes(64)
    hand.set(wsc=wsc, wc=wc)
    data = reader.read_many_into(bytearray(64)) if many else reader.read()
    assert (data or None, reader.result, reader.position) == (None, Result.EPOCH_CHANGED, 0)
    assert reader.counters["lost"] == 0


def test_draining_notices_a_restart_under_the_same_epoch() -> None:
    """Skipping to WC of another life takes that life's geometry, too."""
    hand = Hand(epoch=1)
    reader = hand.reader()
    hand.push(5)
    reader.drain()
    with Writer(hand.memory, size=16, protocol=PROTOCOL, epoch=1) as writer:
        assert reader.pending == 0
        writer.write(b"skipped")
        reader.drain()
        assert (reader.size, reader.elements, reader.position) == (16, 4, 1)
        writer.write(b"read")
        assert reader.read() == b"read" + bytes(12)


def test_nothing_is_pending_of_another_life() -> None:
    """What stands in the header counts for a reader that has synchronised with it."""
    hand = Hand()
    reader = Reader(hand.memory)
    hand.push(2)
    assert reader.pending == 0
    reader.read()
    assert reader.pending == 2
    assert reader.read() == number(0)
    assert reader.pending == 1
    hand.set(epoch=6)
    assert reader.pending == 0
    hand.set(epoch=5, wsc=0, wc=0)
    assert reader.pending == 0


# ------------------------------------------------------------------ counters near 2^64

@pytest.mark.parametrize("elements", [8, 4, 1])
def test_counters_pass_two_to_the_sixty_fourth(elements: int) -> None:
    """Distances are modulo 2^64: elements on both sides of the wrap are delivered, one by one."""
    hand = Hand(elements=elements, counter=U64 - 3)
    reader = hand.reader()
    assert reader.position == U64 - 3
    for k in range(U64 - 3, U64 + 20):
        hand.push()
        assert reader.read() == number(k)
        assert reader.position == (k + 1) % U64
    assert (reader.read(), reader.result) == (None, Result.NO_DATA)
    assert reader.counters["lost"] == 0


@pytest.mark.parametrize("elements", [3, 5, 7])
def test_the_slot_is_the_counter_modulo_elements_also_behind_the_wrap(elements: int) -> None:
    """2^64 is no multiple of 3: behind the wrap the slots do not go on where they stopped."""
    hand = Hand(elements=elements, counter=U64 - 3)
    reader = hand.reader()
    for k in range(U64 - 3, U64 + 2 * elements):
        hand.push()
        assert reader.read() == number(k)


@pytest.mark.parametrize("before", range(9))
def test_a_batch_across_the_wrap(before: int) -> None:
    """Eight elements of which the first `before` lie below 2^64 come complete and in order, in at most two batches."""
    hand = Hand(counter=U64 - before)
    reader = hand.reader()
    hand.push(8)
    got, buffer = b"", bytearray(64)
    for _ in range(2):
        got += bytes(buffer[:8 * reader.read_many_into(buffer)])
    assert got == b"".join(number(k) for k in range(U64 - before, U64 - before + 8))
    assert reader.position == 8 - before


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 2), (2, 1), (4, 0)])
def test_a_batch_ends_where_the_slots_jump(before: int, after: int) -> None:
    """With six elements slot 3 is followed by slot 0 at the wrap: a batch does not run on into slot 4."""
    hand = Hand(elements=6, counter=U64 - before)
    reader = hand.reader()
    hand.push(before + after)
    buffer = bytearray(8 * 6)
    got = b""
    for count in (before, after):
        assert reader.read_many_into(buffer) == count
        got += bytes(buffer[:8 * count])
    assert got == b"".join(number(k) for k in range(U64 - before, U64 + after))


def test_an_overrun_across_the_wrap() -> None:
    """The loss is a distance modulo 2^64 and the reader goes on behind the wrap."""
    hand = Hand(counter=U64 - 3)
    reader = hand.reader()
    hand.push(9)
    assert (reader.read(), reader.result, reader.lost, reader.position) == (None, Result.OVERRUN_DETECTED, 9, 6)
    hand.push()
    assert reader.read() == number(6)


# ------------------------------------------------------------------ waiting

def test_wait_without_a_channel_or_data_ends_at_the_timeout() -> None:
    """False: a read would tell nothing new, be the channel blank, silent, or refused."""
    memory = region(4)
    with Reader(memory, protocol=PROTOCOL) as reader:
        assert reader.wait(0) is False
        assert reader.wait(timeout=0.01) is False
        with Writer(memory, size=8, protocol=PROTOCOL + 1):
            assert reader.wait(0.01) is True
            reader.read()
            assert reader.result is Result.INCOMPATIBLE_INTERFACE
            assert reader.wait(0.01) is False
        assert reader.wait(0.01) is True  # that it went inactive is news
        reader.read()
        assert reader.result is Result.INACTIVE
        assert reader.wait(0.01) is False


def test_wait_notices_a_good_header_under_a_refused_epoch() -> None:
    """Muen's peers always use epoch 1: one with the wrong protocol may be followed by the right one, unseen between."""
    hand = Hand(epoch=1)
    hand.set(protocol=PROTOCOL + 1)
    reader = Reader(hand.memory, protocol=PROTOCOL)
    assert (reader.read(), reader.result) == (None, Result.INCOMPATIBLE_INTERFACE)
    assert reader.wait(0.01) is False
    hand.set(protocol=PROTOCOL)
    assert reader.wait(0.01) is True
    assert (reader.read(), reader.result) == (None, Result.EPOCH_CHANGED)


def test_wait_is_true_for_data_and_for_every_change(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """Data, another epoch and the end of one are worth a read; it stays true until that read is made."""
    writer, reader = pair()
    assert reader.wait(0) is False
    for change in (lambda: writer.write(b"x"), writer.activate, writer.deactivate, writer.activate):
        change()
        assert reader.wait(0) is reader.wait(None) is True
        while reader.wait(0):
            reader.read()


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_a_timeout_is_a_number_of_seconds(pair: Callable[..., tuple[Writer, Reader]], timeout: float) -> None:
    """What is none is refused, and the reader lives on."""
    writer, reader = pair()
    with pytest.raises(UsageError, match="timeout"):
        reader.wait(timeout)
    with pytest.raises(TypeError):
        reader.wait("1")
    writer.write(b"x")
    assert reader.wait(float("inf")) is True


@pytest.mark.parametrize("poll", [None, 1, 200, 5000])
@pytest.mark.parametrize("bell", [False, True], ids=["polling", "bell"])
def test_wait_ends_when_the_writer_writes(bell: bool, poll: int | None) -> None:
    """Asleep or polling, whatever the pause: every element is seen, one wait after the other."""
    memory, page = region(4), bytearray(128) if bell else None
    writer = Writer(memory, size=8, protocol=PROTOCOL, bell=page)
    reader = Reader(memory, bell=page, poll=poll)
    assert reader.ringing is writer.ringing is bell
    reader.read()
    seen: list[bytes | None] = []

    def follow() -> None:
        while len(seen) < 20 and reader.wait(60):
            seen.append(reader.read())

    with running(follow):
        for k in range(20):
            before = reader.counters["sleeps"]
            if k % 2:
                until(lambda before=before: reader.counters["sleeps"] > before, "the reader does not sleep")
            writer.write(number(k))
            until(lambda k=k: len(seen) > k, f"element {k} was not seen")
    assert seen == [number(k) for k in range(20)]
    if bell:
        assert 1 <= writer.counters["wakes"] <= 20
    else:
        assert writer.counters["wakes"] == 0


def test_ringing_takes_the_announcement_back_and_moves_the_sequence() -> None:
    """Once per announcement: a reader between its last look and its sleep finds the sequence moved and does not sleep."""
    page = bytearray(128)
    with Writer(region(4), size=8, protocol=PROTOCOL, bell=page) as writer:
        for rung, waiters in enumerate((0, 1, 1, U64 >> 33), start=-1):
            struct.pack_into("=I", page, 12, waiters)
            for _ in range(3):      # only the first finds it announced
                writer.write(b"x")
                assert struct.unpack_from("=II", page, 8) == (rung + 1, 0)
                assert writer.counters["wakes"] == rung + 1


@pytest.mark.parametrize("change", ["activate", "deactivate", "close"])
def test_a_sleeper_is_woken_by_the_end_and_the_beginning_of_an_epoch(change: str) -> None:
    """Not data alone rings the bell."""
    memory, page = region(4), bytearray(128)
    writer = Writer(memory, size=8, protocol=PROTOCOL, bell=page)
    reader = Reader(memory, bell=page)
    reader.read()
    results: list[bool] = []
    with running(lambda: results.append(reader.wait())):
        until(lambda: reader.counters["sleeps"] > 0, "the reader does not sleep")
        getattr(writer, change)()
    assert results == [True]


@pytest.mark.parametrize("silence", ["never rings", "stopped ringing", "other epoch", "no bell at all"])
def test_a_bell_that_does_not_ring_costs_a_pause_and_no_element(silence: str) -> None:
    """The reader believes that the bell rings, sleeps on it, and looks for itself all the same."""
    memory, page = region(4), bytearray(128)
    writer = Writer(memory, size=8, protocol=PROTOCOL, epoch=77)
    reader = Reader(memory, bell=page)
    if silence == "no bell at all":
        reader = Reader(memory)
    elif silence != "other epoch":
        struct.pack_into("=Q", page, 16, 77)
    else:
        struct.pack_into("=Q", page, 16, 78)
    reader.read()
    results: list[bool] = []
    for k in range(3):
        with running(lambda: results.append(reader.wait())):
            before = reader.counters["sleeps"]
            until(lambda before=before: reader.counters["sleeps"] > before, "the reader does not sleep")
            writer.write(number(k))
        assert reader.read() == number(k)
    assert results == [True] * 3


def test_a_reader_sleeps_on_a_bell_only_while_the_current_epoch_stands_in_it() -> None:
    """Whoever wrote there before rings no more: the reader polls, a thousand times more often than it would wake."""
    sleeps = {}
    for ringer in (77, 78):
        memory, page = region(4), bytearray(128)
        with Writer(memory, size=8, protocol=PROTOCOL, epoch=77), Reader(memory, bell=page, poll=1) as reader:
            reader.read()
            struct.pack_into("=Q", page, 16, ringer)
            assert reader.wait(0.5) is False
            sleeps[ringer] = reader.counters["sleeps"]
    assert sleeps[77] < 50 < sleeps[78]


def test_all_readers_on_one_bell_are_woken() -> None:
    """Readers that share a bell do not take each other's ring away."""
    memory, page = region(64), bytearray(128)
    writer = Writer(memory, size=8, protocol=PROTOCOL, bell=page)
    readers = [Reader(memory, bell=page) for _ in range(4)]
    seen: list[list[bytes]] = [[] for _ in readers]

    def follow(reader: Reader, found: list[bytes]) -> None:
        while len(found) < 30 and reader.wait(60):
            if (data := reader.read()) is not None:
                found.append(data)

    with contextlib.ExitStack() as stack:
        for reader, found in zip(readers, seen, strict=True):
            reader.read()
            stack.enter_context(running(lambda reader=reader, found=found: follow(reader, found)))
        for k in range(30):
            writer.write(number(k))
            until(lambda k=k: all(len(found) > k for found in seen), f"a reader missed element {k}")
    assert seen == [[number(k) for k in range(30)]] * 4


@pytest.mark.parametrize("bell", [False, True], ids=["polling", "bell"])
@pytest.mark.parametrize("active", [False, True])
def test_a_signal_ends_a_wait_without_end(bell: bool, active: bool) -> None:
    """Ctrl-C while waiting for ever raises KeyboardInterrupt, and the reader can be used and closed afterwards."""
    memory, page = region(4), bytearray(128) if bell else None
    writer = Writer(memory, size=8, protocol=PROTOCOL, bell=page)
    if not active:
        writer.deactivate()
    reader = Reader(memory, bell=page)
    reader.read()
    main = threading.main_thread().ident
    assert main is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def interrupt() -> None:
        until(lambda: reader.counters["sleeps"] > 2, "the reader does not sleep")
        signal.pthread_kill(main, signal.SIGINT)

    with running(interrupt):
        with pytest.raises(KeyboardInterrupt):
            reader.wait()
    writer.activate()
    assert reader.wait(0) is True
    reader.read()
    assert reader.result is Result.EPOCH_CHANGED
    reader.close()


def test_a_signal_handler_that_returns_does_not_end_a_wait(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """A handled signal is handled at once and the waiting goes on."""
    writer, reader = pair()
    calls: list[int] = []

    def handle(number_: int, frame: object) -> None:
        calls.append(number_)

    previous = signal.signal(signal.SIGUSR1, handle)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        until(lambda: reader.counters["sleeps"] > 2, "the reader does not sleep")
        signal.pthread_kill(main, signal.SIGUSR1)
        until(lambda: bool(calls), "the handler did not run while the reader waited")
        writer.write(b"x")

    try:
        with running(interrupt):
            assert reader.wait() is True
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert calls == [signal.SIGUSR1]


# ------------------------------------------------------------------ memory taken away

@pytest.fixture
def truncated(tmp_path: Path) -> Iterator[tuple[mmap.mmap, Callable[[], None]]]:
    """A mapped file of three pages, and what takes its memory away."""
    path = tmp_path / "region"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        yield memory, lambda: os.truncate(path, 0)


@pytest.mark.parametrize("size", [8, 4096])
@pytest.mark.parametrize("call", ["write", "write_many", "iterable", "activate"])
def test_a_call_whose_bytes_went_nowhere_says_so(truncated: tuple[mmap.mmap, Callable[[], None]], call: str,
                                                 size: int) -> None:
    """The very call that meets the truncated region raises BrokenChannelError: no element is lost in silence."""
    memory, truncate = truncated
    with Writer(memory, size=size, protocol=PROTOCOL, name="mychannel") as writer, Reader(memory) as reader:
        reader.read()
        truncate()
        calls = {"write": lambda: writer.write(b"x"), "write_many": lambda: writer.write_many(bytes(size)),
                 "iterable": lambda: writer.write_many([b"x"]), "activate": writer.activate}
        for _ in range(2):
            with pytest.raises(BrokenChannelError, match="mychannel"):
                calls[call]()
        assert writer.broken
        assert (reader.read(), reader.result) == (None, Result.INACTIVE)
        assert reader.broken


def test_a_bell_that_was_truncated_breaks_no_channel(truncated: tuple[mmap.mmap, Callable[[], None]]) -> None:
    """Without its bell a channel goes on: the reader polls."""
    page, truncate = truncated
    memory = region(8)
    with Writer(memory, size=8, protocol=PROTOCOL, bell=page) as writer, Reader(memory, bell=page) as reader:
        reader.read()
        truncate()
        results: list[bool] = []
        for k in range(3):
            with running(lambda: results.append(reader.wait())):
                before = reader.counters["sleeps"]
                until(lambda before=before: reader.counters["sleeps"] > before, "the reader does not sleep")
                writer.write(number(k))
            assert reader.read() == number(k)
        assert results == [True] * 3
        assert not writer.broken and not reader.broken


# ------------------------------------------------------------------ counters

def test_counters_say_what_happened() -> None:
    """Each side counts its own elements, batches, epochs, overruns."""
    memory = region(8)
    writer = Writer(memory, size=8, protocol=PROTOCOL)
    reader = Reader(memory)
    zero = {"elements": 0, "batches": 0, "overruns": 0, "lost": 0, "epochs": 0, "sleeps": 0}
    assert reader.counters == zero
    reader.read()
    writer.write_many(bytes(8 * 6))  # batches of 2
    writer.write(b"x")
    assert writer.counters == {"elements": 7, "batches": 4, "wakes": 0, "epochs": 1}
    reader.read()
    reader.read_many_into(bytearray(8 * 4))
    assert reader.counters == zero | {"elements": 5, "batches": 2, "epochs": 1}
    writer.write_many(bytes(8 * 9))
    reader.read()
    assert reader.counters == zero | {"elements": 5, "batches": 2, "epochs": 1, "overruns": 1, "lost": 11}
    writer.activate()
    reader.read()
    assert writer.counters["elements"] == 0
    assert (writer.counters["epochs"], reader.counters["epochs"], reader.counters["elements"]) == (2, 2, 5)


# ------------------------------------------------------------------ threads

def test_a_second_thread_in_a_reader_is_refused_and_the_first_goes_on(
        pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """While one thread waits, every call of another is a UsageError, close() too; nothing else happens to either."""
    writer, reader = pair()
    results: list[bool] = []
    with running(lambda: results.append(reader.wait())):
        until(lambda: reader.counters["sleeps"] > 0, "the reader does not sleep")
        for call in (reader.read, reader.drain, reader.close, lambda: reader.wait(0), lambda: reader.pending,
                     lambda: reader.read_into(bytearray(8)), lambda: reader.read_many_into(bytearray(8))):
            with pytest.raises(UsageError, match="another thread"):
                call()
        assert not reader.closed
        writer.write(b"for it")
    assert results == [True]
    assert reader.read() == b"for it\0\0"
    reader.close()


def test_a_second_thread_in_a_writer_is_refused_and_the_first_goes_on() -> None:
    """While one thread copies a large element, a write, activate() or close() of another is a UsageError."""
    size = 16 << 20
    memory = region(1, size)
    writer = Writer(memory, size=size, protocol=PROTOCOL)
    refused: set[str] = set()
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        data = bytes(size)
        try:
            while not done.is_set():
                with contextlib.suppress(UsageError):  # the other one may be inside just now
                    writer.write(data)
        except BaseException as error:
            failures.append(error)

    calls = {"write": lambda: writer.write(b""), "write_many": lambda: writer.write_many(b""),
             "activate": writer.activate, "deactivate": lambda: (writer.deactivate(), writer.activate())}
    with running(write):
        end = time.monotonic() + 60
        while len(refused) < len(calls) and time.monotonic() < end:
            for name, call in calls.items():
                try:
                    call()
                except UsageError as error:
                    if "another thread" in str(error):
                        refused.add(name)
        done.set()
    assert (refused, failures) == (set(calls), [])
    writer.write(b"lives on")
    assert memory[64:72] == b"lives on"
    writer.close()
    assert writer.closed


def test_reader_and_writer_of_one_channel_may_have_a_thread_each() -> None:
    """The rule is one thread per object, not per channel; 20000 elements arrive in order, lost ones are counted."""
    memory, count = region(64), 20_000
    writer = Writer(memory, size=8, protocol=PROTOCOL)
    reader = Reader(memory)
    reader.read()
    last, got = -1, 0

    def write() -> None:
        for k in range(count):
            writer.write(number(k))

    with running(write):
        while got + reader.counters["lost"] < count and reader.wait(60):
            if (data := reader.read()) is not None:
                value = int.from_bytes(data, "little")
                assert value > last
                last, got = value, got + 1
    assert got + reader.counters["lost"] == count


# ------------------------------------------------------------------ objects

def test_closed_objects_refuse_and_may_be_closed_again(pair: Callable[..., tuple[Writer, Reader]]) -> None:
    """Every call says that it is closed; facts of the past can still be asked for."""
    writer, reader = pair()
    writer.write(b"x")
    reader.read()
    for one in (writer, reader):
        assert not one.closed
        one.close()
        one.close()
        assert one.closed and not one.broken and not one.ringing
    for call in (lambda: writer.write(b"x"), lambda: writer.write_many(b"12345678"), lambda: writer.write_many([b"x"]),
                 writer.activate, writer.deactivate, reader.read, reader.drain, lambda: reader.wait(0),
                 lambda: reader.pending, lambda: reader.read_into(bytearray(8)),
                 lambda: reader.read_many_into(bytearray(8))):
        with pytest.raises(UsageError, match="is closed"):
            call()
    assert (reader.counters["elements"], reader.position, writer.written) == (1, 1, 1)


def test_context_managers_close_also_after_an_error() -> None:
    """Leaving the block ends the epoch and lets go of the memory."""
    memory = region(4)
    with pytest.raises(LookupError):
        with Writer(memory, size=8, protocol=PROTOCOL) as writer, Reader(memory) as reader:
            reader.read()
            raise LookupError
    assert writer.closed and reader.closed
    assert memory[8:16] == bytes(8)
    memory.append(0)  # no buffer of it is held any more


def test_an_object_that_is_forgotten_ends_its_epoch_and_lets_go() -> None:
    """A Writer that is garbage is no writer."""
    memory, page = region(4), bytearray(128)
    writer = Writer(memory, size=8, protocol=PROTOCOL, bell=page)
    reader = Reader(memory, bell=page)
    with pytest.raises(BufferError):
        memory.append(0)
    del writer, reader
    assert memory[8:16] == bytes(8)
    memory.append(0)
    page.append(0)


def test_close_closes_the_owner() -> None:
    """What stands behind the memory goes with the object, once, and after it let go."""
    memory = region(4)
    calls: list[int] = []

    class Owner:
        def close(self) -> None:
            memory.append(0)
            calls.append(1)

    writer = Writer(memory, size=8, protocol=PROTOCOL)
    writer.owner = Owner()
    writer.close()
    writer.close()
    reader = Reader(memory)
    reader.owner = Owner()
    reader.close()
    assert calls == [1, 1]


@pytest.mark.parametrize("options", [
    {"size": 0}, {"size": -1}, {"size": 1 << 62}, {"protocol": 0}, {"protocol": U64}, {"protocol": -1}, {"epoch": 0},
    {"size": 33},
], ids=str)
def test_a_writer_refuses_impossible_parameters(options: dict[str, int]) -> None:
    """UsageError before anything of the region is touched, and no buffer is kept."""
    memory = region(4)
    with pytest.raises(UsageError):
        Writer(memory, **{"size": 8, "protocol": PROTOCOL} | options)
    assert not any(memory)
    memory.append(0)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": U64}, {"protocol": 0}, {"protocol": U64}, {"poll": 0},
                                     {"poll": -1}, {"poll": 10_000_001}], ids=str)
def test_a_reader_refuses_impossible_parameters(options: dict[str, int]) -> None:
    """UsageError, and no buffer is kept."""
    memory = region(4)
    with pytest.raises(UsageError):
        Reader(memory, **options)
    memory.append(0)


def test_memory_that_cannot_be_a_channel_is_refused() -> None:
    """Too small, odd or read-only memory, and such bells, are refused; no buffer is kept."""
    memory, page = bytearray(256), bytearray(160)
    with pytest.raises(UsageError, match="63 bytes"):
        Reader(memory[:63])
    with memoryview(memory) as view, memoryview(page) as bell:
        for make in (lambda view, bell: Reader(view, bell=bell),
                     lambda view, bell: Writer(view, size=8, protocol=1, bell=bell)):
            with view[1:] as odd, pytest.raises(UsageError, match="multiple of 8"):
                make(odd, None)
            with bell[1:] as odd, pytest.raises(UsageError, match="multiple of 8"):
                make(view, odd)
            with bell[:120] as short, pytest.raises(UsageError, match="120 bytes"):
                make(view, short)
            with pytest.raises((BufferError, TypeError)):
                make(view, bytes(128))
            with pytest.raises(TypeError):
                make(None, bell)
        with pytest.raises(BufferError):
            Writer(bytes(256), size=8, protocol=1)
    assert not any(memory)
    memory.append(0)
    page.append(0)


def test_what_is_no_bell_is_left_alone() -> None:
    """A page that holds something else is neither written nor used: the channel works without a bell."""
    memory, page = region(4), bytearray(b"not a bell, thank you") + bytes(107)
    before = bytes(page)
    with Writer(memory, size=8, protocol=PROTOCOL, bell=page) as writer, Reader(memory, bell=page) as reader:
        assert not writer.ringing and not reader.ringing
        reader.read()
        writer.write(b"x")
        assert reader.wait(0) and reader.read() == b"x" + bytes(7)
    assert page == before


def test_an_object_is_initialised_once() -> None:
    """A second __init__ would pull the memory away from under the first."""
    memory = region(4)
    with Writer(memory, size=8, protocol=PROTOCOL, epoch=3) as writer, Reader(memory) as reader:
        with pytest.raises(UsageError):
            writer.__init__(region(4), size=8, protocol=PROTOCOL)
        with pytest.raises(UsageError):
            reader.__init__(region(4))
        assert (reader.read(), reader.epoch) == (None, 3)


@pytest.mark.parametrize("kind", [Reader, Writer])
def test_an_object_without_init_is_a_closed_one(kind: type) -> None:
    """What __new__ alone made refuses everything and crashes nothing."""
    one = kind.__new__(kind)
    assert one.closed and not one.broken and not one.ringing
    one.close()
    for call in ("read", "drain") if kind is Reader else ("activate", "deactivate"):
        with pytest.raises(UsageError, match="closed"):
            getattr(one, call)()


@pytest.mark.parametrize("bell", [b"\0" * 128, bytearray(8), 3], ids=["read-only", "short", "no buffer"])
def test_an_object_whose_init_failed_is_a_closed_one(bell: object) -> None:
    """A bell that is refused leaves nothing half made: calls say closed, and do not go through a null pointer."""
    memory = region(4)
    reader, writer = Reader.__new__(Reader), Writer.__new__(Writer)
    with pytest.raises((UsageError, BufferError, TypeError)):
        reader.__init__(memory, bell=bell)
    with pytest.raises((UsageError, BufferError, TypeError)):
        writer.__init__(memory, size=8, protocol=PROTOCOL, bell=bell)
    memory.append(0)
    for call in (reader.read, reader.drain, writer.activate, lambda: writer.write(b"x")):
        with pytest.raises(UsageError, match="closed"):
            call()


# ------------------------------------------------------------------ looking at a channel

@pytest.mark.parametrize("most", [0, 1, 3, 8, 100])
def test_newest_gives_the_last_elements_with_their_numbers(most: int) -> None:
    """Oldest first, at most as many as the ring holds, whoever has read them."""
    hand = Hand()
    assert newest(hand.memory, most) == ([], "active")
    hand.push(5)
    assert newest(hand.memory, most)[0] == [(k, number(k)) for k in range(max(0, 5 - most), 5)]
    for _ in range(4):
        hand.push(5)
    kept = min(most, 8)
    assert newest(hand.memory, most)[0] == [(k, number(k)) for k in range(25 - kept, 25)]
    hand.set(wsc=27)  # two are being written: the two oldest are void
    assert newest(hand.memory, 100)[0] == [(k, number(k)) for k in range(19, 25)]
    hand.set(epoch=0)
    assert newest(hand.memory, most) == ([], "inactive")
    hand.set(epoch=1, elements=9)
    assert newest(hand.memory, most) == ([], "incompatible")


# ---- reading ahead


def streaming(elements: int = 256) -> tuple[mmap.mmap, Writer, Reader]:
    """A ring whose reader has taken 100 elements one by one without a pause, and 50 more that it has not taken."""
    memory = mmap.mmap(-1, -(-(64 + elements * 16) // mmap.PAGESIZE) * mmap.PAGESIZE)
    writer = Writer(memory, size=16, protocol=1)
    reader = Reader(memory, protocol=1)
    assert reader.read() is None
    assert reader.result == Result.EPOCH_CHANGED
    for n in range(150):
        writer.write(n.to_bytes(16, "little"))
    assert [reader.read() for _ in range(100)] == [n.to_bytes(16, "little") for n in range(100)]
    return memory, writer, reader


def test_what_was_read_ahead_is_delivered_whatever_happens() -> None:
    """An overrun and a restart cost what was still in the ring, and are told after what was taken out of it."""
    memory, writer, reader = streaming()
    for _ in range(3 * writer.elements):
        writer.write(b"later")
    ahead = []
    while (element := reader.read()) is not None:
        ahead.append(element)
    assert ahead, "nothing was read ahead"
    assert ahead == [n.to_bytes(16, "little") for n in range(100, 100 + len(ahead))]
    assert reader.result == Result.OVERRUN_DETECTED
    assert reader.position == writer.written == 100 + len(ahead) + reader.lost
    assert reader.counters["elements"] == 100 + len(ahead)

    memory, writer, reader = streaming()
    writer.activate()
    assert reader.wait(0)
    assert [reader.read() for _ in ahead] == ahead
    assert reader.read() is None
    assert reader.result == Result.EPOCH_CHANGED


def test_reading_ahead_shows_in_no_number() -> None:
    """position, pending, counters and every way of reading count what was delivered, not what was taken ahead."""
    memory, writer, reader = streaming()
    buffer = bytearray(16)
    for n in range(100, 150):
        assert (reader.position, reader.pending, reader.counters["elements"]) == (n, 150 - n, n)
        assert reader.wait(0)
        if n % 3 == 0:
            assert reader.read_many_into(buffer) == 1
        elif n % 3 == 1:
            assert reader.read_into(buffer) == Result.SUCCESS
        else:
            element = reader.read()
            assert element is not None
            buffer[:] = element
        assert buffer == n.to_bytes(16, "little")
    assert not reader.wait(0)
    assert reader.read() is None
    assert reader.result == Result.NO_DATA


def test_draining_drops_what_was_read_ahead() -> None:
    memory, writer, reader = streaming()
    reader.drain()
    assert (reader.position, reader.pending) == (150, 0)
    writer.write(b"next")
    assert reader.read() == b"next".ljust(16, b"\0")
