"""Disks written in Python: what they are given, what becomes of their answers, errors and delays."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import eventually
from test_cli import one_line

import muenfast
from muenfast.backing import Device
from muenfast.blk import channels_from_lists
from muenfast.errors import StoreError, UsageError
from muenfast.export import ExportConfig

BLOCK = 4096
Start = Callable[..., Program]


class Ram:
    """As much of a store as most tests need; notes what is called."""

    def __init__(self, nblocks: int = 64) -> None:
        self.data = bytearray(nblocks * BLOCK)
        self.called: list[tuple[Any, ...]] = []

    def get_size(self) -> int:
        return len(self.data)

    def pread(self, buf: memoryview, offset: int) -> None:
        self.called.append(("pread", offset, len(buf)))
        buf[:] = self.data[offset:offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int) -> None:
        self.called.append(("pwrite", offset, len(buf)))
        self.data[offset:offset + len(buf)] = buf

    def flush(self) -> None:
        self.called.append(("flush",))

    def close(self) -> None:
        self.called.append(("close",))


class Stuck(Ram):
    """Calls for block 1 wait until `go` is set."""

    def __init__(self, nblocks: int = 64) -> None:
        super().__init__(nblocks)
        self.go, self.inside = threading.Event(), threading.Semaphore(0)

    def pread(self, buf: memoryview, offset: int) -> None:
        self._wait(offset)
        super().pread(buf, offset)

    def pwrite(self, buf: memoryview, offset: int) -> None:
        self._wait(offset)
        super().pwrite(buf, offset)

    def _wait(self, offset: int) -> None:
        if offset == BLOCK:
            self.inside.release()
            self.go.wait(60)


@pytest.fixture(params=["inline", "buffer"])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Channels of either transport, as serve() and BlockDevice take them."""
    return {"req": unique("a"), "resp": unique("c"), "shm": unique("e") if request.param == "buffer" else None}


def failing(call: Callable[[], object]) -> int | None:
    """The errno that a call fails with."""
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


# ------------------------------------------------------------------ data

def test_what_is_written_is_read(where: dict[str, Any]) -> None:
    """Against a model; every call is within the disk, in whole blocks, and no larger than the engine's stage."""
    store, dice = Ram(300), random.Random(7)
    model = bytearray(store.data)
    with muenfast.serve(store, **where) as server, muenfast.BlockDevice(**where) as disk:
        assert disk.size == len(model) and not disk.read_only
        for _ in range(300):
            offset = dice.randrange(len(model))
            length = min(dice.choice([1, 512, BLOCK, 70_000, 1 << 20]), len(model) - offset)
            if dice.random() < 0.5:
                data = dice.randbytes(length)
                assert disk.pwrite(data, offset) == length
                model[offset:offset + length] = data
            else:
                assert disk.pread(length, offset) == model[offset:offset + length]
        offsets = dice.sample(range(0, len(model), BLOCK), 200)
        data = dice.randbytes(200 * BLOCK)
        disk.pwrite_many(offsets, data)
        for at, offset in enumerate(offsets):
            model[offset:offset + BLOCK] = data[at * BLOCK:(at + 1) * BLOCK]
        assert disk.pread(len(model), 0) == model
        disk.flush()
        status = server.status()[0]
        assert status["store"]["calls"] == len(store.called) and status["store"]["late"] == 0
    assert store.data == model
    assert store.called.count(("flush",)) == 1 and store.called[-1] == ("close",)
    moves = [call for call in store.called if call[0] in ("pread", "pwrite")]
    assert all(offset % BLOCK == 0 and length % BLOCK == 0 and 0 < length <= 256 << 10
               and offset + length <= len(model) for _, offset, length in moves)


def test_neighbours_are_one_call(where: dict[str, Any]) -> None:
    store = Ram()
    with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
        disk.pwrite(bytes(64 * BLOCK), 0)
    assert sum(call[0] == "pwrite" for call in store.called) < 64


def test_a_largest_call_is_respected(where: dict[str, Any]) -> None:
    """block_size() of nbdkit: (minimum, preferred, maximum)."""
    store = Ram()
    store.block_size = lambda: (512, 4096, 10_000)  # type: ignore[attr-defined]
    with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
        disk.pwrite(bytes(64 * BLOCK), 0)
        disk.pread(64 * BLOCK, 0)
    assert {call[2] for call in store.called if call[0] in ("pread", "pwrite")} <= {BLOCK, 2 * BLOCK}


def test_discards() -> None:
    """Go to trim(), without one to zero(), without either they fail; what is said to read as zeros does."""
    where = {"req": unique("a"), "resp": unique("c"), "shm": unique("e")}

    class Trims(Ram):
        def trim(self, count: int, offset: int) -> None:
            self.called.append(("trim", count, offset))
            self.data[offset:offset + count] = b"\1" * count

    class Zeroes(Ram):
        def zero(self, count: int, offset: int) -> None:
            self.called.append(("zero", count, offset))
            self.data[offset:offset + count] = bytes(count)

    class Both(Trims, Zeroes):
        def trims_to_zero(self) -> bool:
            return False

    for store, call, promised in ((Trims(), "trim", False), (Zeroes(), "zero", True), (Both(), "trim", False)):
        store.data[:] = b"\7" * len(store.data)
        with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
            disk.discard(BLOCK, 2 * BLOCK)
            assert (call, 2 * BLOCK, BLOCK) in store.called
            assert disk.pread(BLOCK, BLOCK) == (bytes(BLOCK) if call == "zero" else b"\1" * BLOCK)
            store.called.clear()
            disk.discard(0, BLOCK, zero=True)
            assert disk.pread(BLOCK, 0) == bytes(BLOCK)
            assert any(call[0] in ("trim", "zero") for call in store.called) == promised
    with muenfast.serve(Ram(), **where), muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.discard(0, BLOCK)) == errno.EOPNOTSUPP


def test_nbdkits_flags() -> None:
    """Callbacks that take nbdkit's last argument get it: no flag. open() may take readonly or nothing."""

    class Flags:
        def __init__(self) -> None:
            self.data, self.called = bytearray(16 * BLOCK), []

        def open(self, readonly: bool) -> None:
            self.called.append(("open", readonly))

        def get_size(self) -> int:
            return len(self.data)

        def pread(self, buf: memoryview, offset: int, flags: int) -> None:
            self.called.append(("pread", flags))
            buf[:] = self.data[offset:offset + len(buf)]

        def pwrite(self, buf: memoryview, offset: int, flags: int) -> None:
            self.called.append(("pwrite", flags))
            self.data[offset:offset + len(buf)] = buf

        def flush(self, flags: int) -> None:
            self.called.append(("flush", flags))

        def trim(self, count: int, offset: int, flags: int = 0) -> None:
            self.called.append(("trim", flags))

    where = {"req": unique("a"), "resp": unique("c"), "shm": unique("e")}
    store = Flags()
    with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
        disk.pwrite(b"x" * BLOCK, 0)
        assert disk.pread(BLOCK, 0) == b"x" * BLOCK
        disk.flush()
        disk.discard(0, BLOCK)
    assert [call for call in store.called if call[0] != "pread"] == \
        [("open", False), ("pwrite", 0), ("flush", 0), ("trim", 0)]
    assert ("pread", 0) in store.called


@pytest.mark.parametrize("how", ["no pwrite", "can_write", "asked for"])
def test_read_only(where: dict[str, Any], how: str) -> None:
    class Fixed:
        opened: bool | None = None

        def open(self, readonly: bool) -> None:
            self.opened = readonly

        def get_size(self) -> int:
            return 4 * BLOCK

        def pread(self, buf: memoryview, offset: int) -> None:
            buf[:] = b"f" * len(buf)

    class Writable(Fixed):
        def pwrite(self, buf: memoryview, offset: int) -> None:
            raise AssertionError("written to")

        def can_write(self) -> bool:
            return how == "asked for"

    store = Fixed() if how == "no pwrite" else Writable()
    with muenfast.serve(store, read_only=how == "asked for", **where) as server, muenfast.BlockDevice(**where) as disk:
        assert disk.read_only and server.status()[0]["read_only"]
        assert failing(lambda: disk.pwrite(bytes(BLOCK), 0)) == errno.EROFS
        assert disk.pread(BLOCK, 0) == b"f" * BLOCK
        disk.flush()
    assert store.opened is (how == "asked for")


def test_sectors_of_512() -> None:
    """A size that is no multiple of 4096 is served to its last sector over a buffer, in blocks inline."""
    store = Ram()
    store.data = bytearray(os.urandom(9 * 512 + 100))
    where = {"req": unique("a"), "resp": unique("c")}
    with muenfast.serve(store, **where, shm=unique("e")) as server, \
            muenfast.BlockDevice(**where, shm=server.exports[0].config.channels.buffer.text) as disk:
        assert (disk.size, disk.block_size) == (9 * 512, 512)
        assert disk.pread(9 * 512, 0) == store.data[:9 * 512]
    with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
        assert disk.size == BLOCK


def test_several_disks_of_one_connection(tmp_path: Path) -> None:
    """A slow one holds up no other one."""
    where = {"req": unique("a"), "resp": unique("c"), "shm": unique("e")}
    slow, quick = Stuck(), Ram()
    with muenfast.serve([slow, quick], **where), muenfast.BlockDevice(**where) as first:
        second = muenfast.BlockDevice(connection=first.connection, device=1)
        writer = in_background(lambda: first.pwrite(b"1" * BLOCK, BLOCK))
        assert slow.inside.acquire(timeout=20)
        for number in range(64):
            second.pwrite(b"2" * BLOCK, number * BLOCK)
        second.flush()
        slow.go.set()
        writer.join()
        assert first.pread(BLOCK, BLOCK) == b"1" * BLOCK and second.pread(BLOCK, BLOCK) == b"2" * BLOCK


def test_beside_other_kinds_on_one_connection(tmp_path: Path) -> None:
    """A disk in Python, a file, RAM and RAM with faults: each has its own data, whatever the others are at."""
    (tmp_path / "disk").write_bytes(bytes(64 * BLOCK))
    lists = {"req": unique("a"), "resp": unique("c")}
    [channels] = channels_from_lists(**lists, buffer=unique("e"))
    store, dice = Stuck(), random.Random(3)
    devices = [Device("py:test:Stuck", "py", made=store),
               *(Device.parse(text) for text in (str(tmp_path / "disk"), "ram:256K", "null:256K"))]
    with muenfast.BlockServer([ExportConfig(channels, devices[0], further=tuple(devices[1:]))]), \
            muenfast.BlockDevice(channels=channels) as first:
        disks = [first, *(muenfast.BlockDevice(connection=first.connection, device=number) for number in (1, 2, 3))]
        writer = in_background(lambda: first.pwrite(b"1" * BLOCK, BLOCK))
        assert store.inside.acquire(timeout=20)
        models = [bytearray(disk.size) for disk in disks]
        for _ in range(400):
            number = dice.randrange(4)
            at = dice.randrange(2, 64) * BLOCK
            if dice.random() < 0.6:
                data = dice.randbytes(BLOCK)
                disks[number].pwrite(data, at)
                models[number][at:at + BLOCK] = data if number < 3 else bytes(BLOCK)
            else:
                assert disks[number].pread(BLOCK, at) == models[number][at:at + BLOCK]
            if dice.random() < 0.05:
                disks[number].flush() if number else None    # of the first one, the stuck write would have to end first
        store.go.set()
        writer.join()
        models[0][BLOCK:2 * BLOCK] = b"1" * BLOCK
        assert [disk.pread(disk.size, 0) for disk in disks] == models


# ------------------------------------------------------------------ memory

def test_a_view_that_is_kept_is_dead(where: dict[str, Any]) -> None:
    kept: list[memoryview] = []

    class Keeps(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            super().pread(buf, offset)
            kept.append(buf)

        def pwrite(self, buf: memoryview, offset: int) -> None:
            assert buf.readonly and buf.format == "B" and buf.ndim == 1
            super().pwrite(buf, offset)
            kept.append(buf)

    with muenfast.serve(Keeps(), **where), muenfast.BlockDevice(**where) as disk:
        disk.pwrite(b"w" * BLOCK, 0)
        assert disk.pread(BLOCK, 0) == b"w" * BLOCK
    assert kept
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0]


def test_a_part_that_is_kept_is_nobody_elses(where: dict[str, Any]) -> None:
    """A slice, or another kind of view, cannot be taken back; but what it shows is not used again, and what is written
    through it reaches nobody."""
    kept: list[Any] = []

    class Keeps(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            super().pread(buf, offset)
            for part in kept:
                part[:] = bytes(len(part))  # late writes to answered memory, once this call's is filled
            kept.append(buf[:100])

    store = Keeps()
    store.data[:] = os.urandom(len(store.data))
    with muenfast.serve(store, pool=1, **where), muenfast.BlockDevice(**where) as disk:
        for number in range(64):
            assert disk.pread(BLOCK, number * BLOCK) == store.data[number * BLOCK:(number + 1) * BLOCK]
    kept.clear()


def test_what_a_view_is_made_of_gives_no_other_view(where: dict[str, Any]) -> None:
    kept: list[Any] = []

    class Keeps(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            super().pread(buf, offset)
            kept.append(buf.obj)

    with muenfast.serve(Keeps(), pool=1, **where), muenfast.BlockDevice(**where) as disk:
        for number in range(8):
            assert disk.pread(BLOCK, number * BLOCK) == bytes(BLOCK)
            for each in kept:
                with pytest.raises(BufferError, match="beyond its call"):
                    memoryview(each)


# ------------------------------------------------------------------ order and time

def test_answers_come_as_they_are_ready(where: dict[str, Any]) -> None:
    """What waits in the store holds up its own thread only; what overlaps it waits for it."""
    store = Stuck()
    with muenfast.serve(store, pool=2, **where), muenfast.BlockDevice(**where) as disk:
        writer = in_background(lambda: disk.pwrite(b"1" * BLOCK, BLOCK))
        assert store.inside.acquire(timeout=20)
        for number in range(2, 64):
            disk.pwrite(bytes([number]) * BLOCK, number * BLOCK)
        assert writer.is_alive()
        store.go.set()
        writer.join()
        assert disk.pread(BLOCK, BLOCK) == b"1" * BLOCK


@pytest.mark.parametrize("pool", [1, 3])
def test_as_many_calls_at_a_time_as_threads(where: dict[str, Any], pool: int) -> None:
    class Counts(Ram):
        now = most = 0
        begun = False
        lock, full = threading.Lock(), threading.Event()

        def pread(self, buf: memoryview, offset: int) -> None:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
                if self.now == pool:
                    self.full.set()
            if self.begun:      # the client's first look at its buffer comes alone
                self.full.wait(20)
            super().pread(buf, offset)
            with self.lock:
                self.now -= 1

    store = Counts()
    with muenfast.serve(store, pool=pool, **where), muenfast.BlockDevice(**where, depth=32) as disk:
        store.begun = True
        disk.pread_many(range(0, 64 * BLOCK, 2 * BLOCK), bytearray(32 * BLOCK))
    assert store.most == pool


def test_a_late_answer_is_an_error_for_its_request(where: dict[str, Any]) -> None:
    """Counted; the disk lives on; the late call ends up in its own memory; what it may yet change is not written to."""
    store = Stuck()
    store.data[:] = os.urandom(len(store.data))
    with muenfast.serve(store, pool=2, timeout=1.0, **where) as server, muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pwrite(b"L" * BLOCK, BLOCK)) == errno.EIO
        assert failing(lambda: disk.pwrite(b"x" * BLOCK, BLOCK)) == errno.EIO    # at once: it could be undone
        assert server.status()[0]["store"]["late"] == 1
        for number in range(2, 64):
            disk.pwrite(bytes([number]) * BLOCK, number * BLOCK)
        disk.flush()
        store.go.set()
        eventually(lambda: server.status()[0]["store"]["returned"] == 1)
        disk.pwrite(b"n" * BLOCK, BLOCK)
        assert disk.pread(2 * BLOCK, BLOCK) == b"n" * BLOCK + b"\2" * BLOCK
        assert server.status()[0]["counters"]["failed"] == 2


def test_a_late_read_writes_to_nobodys_memory(where: dict[str, Any]) -> None:
    class Spoils(Stuck):
        def pread(self, buf: memoryview, offset: int) -> None:
            late = offset == BLOCK
            super().pread(buf, offset)
            if late:
                buf[:] = b"!" * len(buf)

    store = Spoils()
    store.data[:] = os.urandom(len(store.data))
    with muenfast.serve(store, pool=2, timeout=1.0, **where) as server, muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pread(BLOCK, BLOCK)) == errno.EIO
        got = bytearray(62 * BLOCK)
        for turn in range(20):
            if turn == 10:
                store.go.set()
                eventually(lambda: server.status()[0]["store"]["returned"] == 1)
            disk.pread_many(range(2 * BLOCK, 64 * BLOCK, BLOCK), got)
            assert got == store.data[2 * BLOCK:]
        assert disk.pread(BLOCK, BLOCK) == b"!" * BLOCK     # in time now


def test_what_waits_for_a_thread_is_late_too(where: dict[str, Any]) -> None:
    """It is answered, and never begun."""
    store = Stuck()
    with muenfast.serve(store, pool=1, timeout=1.0, **where), muenfast.BlockDevice(**where) as disk:
        first = in_background(lambda: failing(lambda: disk.pread(BLOCK, BLOCK)))
        assert store.inside.acquire(timeout=20)
        assert failing(lambda: disk.pwrite(b"x" * BLOCK, 5 * BLOCK)) == errno.EIO
        first.join()
        store.go.set()
        assert eventually(lambda: disk.pread(BLOCK, 5 * BLOCK)) == bytes(BLOCK)
    assert not any(call[0] == "pwrite" for call in store.called)


def test_what_is_late_is_said(where: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    store = Stuck()
    with muenfast.serve(store, pool=1, timeout=1.0, **where), muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pwrite(b"x" * BLOCK, BLOCK)) == errno.EIO
        eventually(lambda: f"pwrite() of {BLOCK} bytes at {BLOCK} has not answered within 1 s: I/O error; writes there "
                           "fail until it returns" in caplog.text)
        assert failing(lambda: disk.pread(BLOCK, 5 * BLOCK)) == errno.EIO
        eventually(lambda: f"no thread of its pool was free for pread() of {BLOCK} bytes at {5 * BLOCK} within 1 s" in
                           caplog.text)
        store.go.set()


def test_no_new_size_beside_a_late_call(where: dict[str, Any]) -> None:
    class Grows(Stuck):
        def resize(self, size: int) -> None:
            self.data.extend(bytes(size - len(self.data)))

    store = Grows()
    with muenfast.serve(store, pool=2, timeout=1.0, **where) as server, muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pread(BLOCK, BLOCK)) == errno.EIO
        with pytest.raises(UsageError, match="1 of its calls were late and have not returned"):
            server.exports[0].resize(0, 128 * BLOCK)
        disk.pwrite(b"x" * BLOCK, 2 * BLOCK)
        store.go.set()
        eventually(lambda: server.status()[0]["store"]["returned"] == 1)
        assert server.exports[0].resize(0, 128 * BLOCK)
        eventually(lambda: disk.size == 128 * BLOCK)
        assert disk.pread(BLOCK, 2 * BLOCK) == b"x" * BLOCK


def test_one_server_for_one_object(where: dict[str, Any]) -> None:
    """Unless nothing writes; and none where a late call of an earlier server's could undo what the next one answers."""
    store = Stuck()
    other = {key: unique(key[0]) for key in where}
    with muenfast.serve(store, pool=1, timeout=1.0, **where):
        for more in ({}, {"read_only": True}):
            with pytest.raises(UsageError, match="served already"):
                muenfast.serve(store, **more, **other)
    with muenfast.serve(store, read_only=True, **where), muenfast.serve(store, read_only=True, **other), \
            muenfast.BlockDevice(**other) as disk:
        assert disk.pread(BLOCK, 0) == bytes(BLOCK)
    with muenfast.serve(store, pool=1, timeout=1.0, **where), muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pwrite(b"x" * BLOCK, BLOCK)) == errno.EIO
    with pytest.raises(UsageError, match="have not returned"):
        muenfast.serve(store, **where)
    store.go.set()
    eventually(lambda: not any(thread.name.startswith("py:") for thread in threading.enumerate()))
    with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
        disk.pwrite(b"y" * BLOCK, BLOCK)
        assert disk.pread(BLOCK, BLOCK) == b"y" * BLOCK


def test_the_end_waits_a_while(where: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """For calls that are under way; what does not come back is left alone, and close() is not called into it."""
    store = Stuck()
    server = muenfast.serve(store, pool=1, timeout=1200, **where)
    with muenfast.BlockDevice(**where) as disk:
        reader = in_background(lambda: failing(lambda: disk.pread(BLOCK, BLOCK)))
        assert store.inside.acquire(timeout=20)
        server.close()
        assert "have not returned" in caplog.text and ("close",) not in store.called
        assert reader.is_alive()    # the server may be back
        disk.fail("the end of the test")
        reader.join()
    store.go.set()
    eventually(lambda: not any(thread.name.startswith("py:") for thread in threading.enumerate()))


def test_a_new_size_waits_for_calls(where: dict[str, Any]) -> None:
    """A store that grows: what is under way ends before, however long it takes; the client goes on with the new size."""
    class Grows(Stuck):
        def resize(self, size: int) -> None:
            self.data.extend(bytes(size - len(self.data)))

    store = Grows()
    with muenfast.serve(store, **where) as server, muenfast.BlockDevice(**where) as disk:
        writer = in_background(lambda: disk.pwrite(b"1" * BLOCK, BLOCK))
        assert store.inside.acquire(timeout=20)
        resizer = in_background(lambda: server.exports[0].resize(0, 128 * BLOCK))
        resizer.join(4.5)       # longer than the end of a server waits for calls
        assert resizer.is_alive() and writer.is_alive()
        store.go.set()
        resizer.join()
        writer.join()
        eventually(lambda: disk.size == 128 * BLOCK)
        assert disk.pread(BLOCK, BLOCK) == b"1" * BLOCK
        disk.pwrite(b"2" * BLOCK, 127 * BLOCK)
        store.data.extend(bytes(BLOCK))
        assert server.exports[0].resize(0, None)
        eventually(lambda: disk.size == 129 * BLOCK)
        del store.data[-BLOCK:]
        with pytest.raises(UsageError, match="has become shorter"):
            server.exports[0].resize(0, None)
        assert server.exports[0].resize(0, None, force=True)
        eventually(lambda: disk.size == 128 * BLOCK)


def test_a_resize_that_hangs_is_the_only_one(where: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """It fails, the disk goes on as it was; no other one begins beside it; and it holds no end up."""
    class Hangs(Ram):
        def __init__(self) -> None:
            super().__init__()
            self.go, self.begun = threading.Event(), 0

        def resize(self, size: int) -> None:
            self.begun += 1
            self.go.wait(60)

    store = Hangs()
    with muenfast.serve(store, timeout=1.0, **where) as server, muenfast.BlockDevice(**where) as disk:
        with pytest.raises(StoreError, match=r"resize\(\) did not return within 1 s"):
            server.exports[0].resize(0, 128 * BLOCK)
        with pytest.raises(UsageError, match="1 of its calls were late and have not returned"):
            server.exports[0].resize(0, 128 * BLOCK)
        disk.pwrite(b"x" * BLOCK, 0)
        assert disk.pread(BLOCK, 0) == b"x" * BLOCK and disk.size == 64 * BLOCK
        store.go.set()
    assert store.begun == 1
    store = Hangs()
    server = muenfast.serve(store, timeout=1200.0, **where)
    errors: list[Exception] = []

    def resize() -> None:
        try:
            server.exports[0].resize(0, 128 * BLOCK)
        except StoreError as error:
            errors.append(error)

    resizer = in_background(resize)
    eventually(lambda: store.begun == 1)
    server.close()
    resizer.join()
    assert "resize() had not returned when the server was told to end" in str(errors[0])
    assert "1 calls have not returned, so its close() is not called" in caplog.text and ("close",) not in store.called
    store.go.set()


def test_a_smaller_size_than_was_asked_for_is_refused(where: dict[str, Any]) -> None:
    """What it cuts off, nobody has agreed to."""
    class Shrinks(Ram):
        def resize(self, size: int) -> None:
            del self.data[4 * BLOCK:]

    with muenfast.serve(Shrinks(), **where) as server, muenfast.BlockDevice(**where) as disk:
        with pytest.raises(StoreError, match=rf"get_size\(\) returned {4 * BLOCK} after resize\({128 * BLOCK}\)"):
            server.exports[0].resize(0, 128 * BLOCK)
        disk.pwrite(b"x" * BLOCK, 3 * BLOCK)
        assert disk.size == server.exports[0].size == 64 * BLOCK
        assert server.exports[0].resize(0, None, force=True)
        eventually(lambda: disk.size == 4 * BLOCK)


def test_a_call_that_ends_its_own_server(where: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """It is waited for as any other, and by nobody in vain; then the object can be served again."""
    class Ends(Ram):
        server: muenfast.BlockServer | None = None

        def flush(self) -> None:
            if self.server is not None:
                self.server.close()

    store = Ends()
    store.server = server = muenfast.serve(store, timeout=1.0, **where)
    disk = muenfast.BlockDevice(on_peer_loss="fail", **where)
    assert failing(disk.flush) == errno.EIO
    disk.close()
    eventually(lambda: "1 calls have not returned, so its close() is not called" in caplog.text)
    server.close()
    store.server = None
    eventually(lambda: not any(thread.name.startswith("py:") and thread.is_alive() for thread in threading.enumerate()))
    with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
        disk.flush()


def test_a_disk_without_resize_keeps_its_size(where: dict[str, Any]) -> None:
    with muenfast.serve(Ram(), **where) as server:
        with pytest.raises(UsageError, match="no method resize"):
            server.exports[0].resize(0, 128 * BLOCK)
        assert not server.exports[0].resize(0, None)


@pytest.mark.parametrize(("buffer", "which"), [
    (False, "req"), (False, "resp"), (True, "req"), (True, "resp"), (True, "shm")])
def test_a_channel_that_is_cut_off_fails_requests(buffer: bool, which: str) -> None:
    """on_peer_loss "fail" holds for a server that lives and cannot be reached, too; channels made anew are followed."""
    where = {"req": unique("a"), "resp": unique("c"), **({"shm": unique("e")} if buffer else {})}
    with muenfast.serve(Ram(), **where), muenfast.BlockDevice(on_peer_loss="fail", **where) as disk:
        disk.pwrite(b"x" * BLOCK, 0)
        os.truncate(f"/dev/shm/{where[which]}", 0)
        assert failing(lambda: disk.pread(BLOCK, 0)) == errno.EIO
        os.unlink(f"/dev/shm/{where[which]}")

        def reads() -> bool:
            try:
                return disk.pread(BLOCK, 0) == b"x" * BLOCK
            except OSError:
                return False
        eventually(reads)


# ------------------------------------------------------------------ errors

def test_exceptions_are_errors(where: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """OSError's number, else EIO; each kind is told once, with its traceback; nothing ends."""
    class Raises(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            match offset // BLOCK:
                case 1:
                    raise OSError(errno.ENOSPC, "full")
                case 2:
                    raise ValueError("never mind")
                case 3:
                    raise OSError("without a number")
                case 4:
                    raise OSError(123456, "no such error")
                case 5:
                    sys.exit(3)
                case 6:
                    buf[0:2 * len(buf)] = bytes(2 * len(buf))
            super().pread(buf, offset)

    with muenfast.serve(Raises(), pool=2, **where) as server, muenfast.BlockDevice(**where) as disk:
        for _ in range(3):
            assert [failing(lambda n=n: disk.pread(BLOCK, n * BLOCK)) for n in range(1, 7)] == \
                [errno.ENOSPC, *[errno.EIO] * 5]
            assert disk.pread(BLOCK, 0) == bytes(BLOCK)
        assert server.status()[0]["counters"]["failed"] == 18
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 6 and all(record.exc_info for record in told)


def test_a_failure_that_cannot_be_told_is_one_all_the_same(where: dict[str, Any]) -> None:
    """A handler of the program's that raises makes no success of it."""
    class Raises(Ram):
        def pwrite(self, buf: memoryview, offset: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        def flush(self) -> None:
            raise ValueError("never mind")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no place for it")

    handler, log = Handler(level=logging.ERROR), logging.getLogger("muenfast")
    log.addHandler(handler)
    try:
        with muenfast.serve(Raises(), **where), muenfast.BlockDevice(**where) as disk:
            assert failing(lambda: disk.pwrite(b"x" * BLOCK, 0)) == errno.EIO
            assert failing(disk.flush) == errno.EIO
    finally:
        log.removeHandler(handler)


def test_what_a_store_does_not_fill_is_zeros(where: dict[str, Any]) -> None:
    """And never what another request had there."""
    class Short(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            if offset == 0:
                super().pread(buf, 0)

    with muenfast.serve(Short(), pool=1, **where), muenfast.BlockDevice(**where) as disk:
        for number in range(64):
            disk.pwrite(b"secret" * 682 + b"....", number * BLOCK)
        assert disk.pread(BLOCK, 0).startswith(b"secret")
        assert disk.pread(BLOCK, 5 * BLOCK) == bytes(BLOCK)


def test_a_module_that_hangs_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    done = run("blk", "--req", unique("a"), "--resp", unique("c"), "--device", f"py:{tmp_path}/hangs.py:X",
               "--timeout", "1")
    assert done.returncode == 1 and "its module did not return within 1 s" in one_line(done.stderr)


def test_an_open_that_hangs_ends_with_the_process(program: Start, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(
        "import pathlib, time\n"
        "class X:\n"
        "    def open(self):\n"
        "        (pathlib.Path(__file__).parent / 'inside').touch()\n"
        "        time.sleep(60)\n"
        "    def get_size(self):\n"
        "        return 1 << 20\n"
        "    pread = None.__init__\n")
    server = program("blk", "--req", unique("a"), "--resp", unique("c"), "--device", f"py:{tmp_path}/hangs.py:X",
                     "--timeout", "1200", ready=False)
    eventually((tmp_path / "inside").exists)
    status, errors = server.end(signal.SIGTERM)
    assert status == 1 and "open() had not returned when the process was told to end" in one_line(errors)


def test_bytes_that_are_returned_are_an_error(where: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """As of nbdkit's first API version: the buffer was not filled."""
    class First(Ram):
        def pread(self, count: Any, offset: int) -> bytes:  # type: ignore[override]
            return bytes(self.data[offset:offset + len(count)])

    with muenfast.serve(First(), **where), muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pread(BLOCK, 0)) == errno.EIO
    assert "pread() returned bytes: it is to fill buf instead" in caplog.text


@pytest.mark.parametrize(("name", "result", "message"), [
    ("pwrite", 10, "pwrite() returned 10, of 4096 bytes: it is to do all of them"), ("pwrite", -1, "pwrite() returned -1"),
    ("pwrite", 0, "pwrite() returned 0"), ("pwrite", False, "pwrite() returned False"),
    ("pread", 4095, "pread() returned 4095, of 4096 bytes"), ("pread", "error", "pread() returned str"),
    ("flush", False, "flush() returned False"), ("flush", -1, "flush() returned -1"),
    ("flush", (k for k in ()), "flush() returned generator"),
    ("pwrite", 4096, None), ("pread", 4096, None), ("pwrite", True, None), ("flush", 0, None), ("flush", object(), None)])
def test_results(name: str, result: object, message: str | None, where: dict[str, Any],
                 caplog: pytest.LogCaptureFixture) -> None:
    """What says that not all was done is an I/O error, and told; nothing, and the number of bytes, say that it was."""
    store = Ram()
    setattr(store, name, lambda *_: result)
    with muenfast.serve(store, **where), muenfast.BlockDevice(**where) as disk:
        call = {"pread": lambda: disk.pread(BLOCK, 0), "pwrite": lambda: disk.pwrite(bytes(BLOCK), 0),
                "flush": disk.flush}[name]
        if message is None:
            call()
        else:
            assert failing(call) == errno.EIO
    assert message is None or message in caplog.text


@pytest.mark.parametrize("code", ["async def pwrite(self, buf, offset): pass", "async def flush(self): pass",
                                  "async def get_size(self): pass", "def pread(self, buf, offset): yield",
                                  "async def close(self): yield"])
def test_what_a_call_would_not_run_is_refused(code: str, where: dict[str, Any]) -> None:
    methods: dict[str, Any] = {}
    exec(code, methods)
    methods.pop("__builtins__")
    with pytest.raises(UsageError, match=f"method {next(iter(methods))}\\(\\) is a.* of which a call runs nothing"):
        muenfast.serve(type("Odd", (Ram,), methods)(), **where)


def test_misspelt_methods_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Misspelt(Ram):
        def flsh(self) -> None:
            pass

        def discard(self, count: int, offset: int) -> None:
            pass

        def write(self, data: bytes) -> None:   # a helper of pwrite's
            pass

    Misspelt.flush = None   # type: ignore[assignment, method-assign]
    muenfast.serve(Misspelt(), unique("a"), unique("c")).close()
    told = [record.getMessage() for record in caplog.records if "nothing calls" in record.getMessage()]
    assert len(told) == 2 and "discard(); is it meant to be trim()" in told[0] and "flsh()" in told[1]


def test_a_child_that_a_store_forks_is_no_server(where: dict[str, Any]) -> None:
    """Whether it returns or raises."""
    class Forks(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            super().pread(buf, offset)
            child = os.fork()
            if child == 0:
                if offset == 0:
                    return
                if offset == 3 * BLOCK:
                    sys.stderr = open(os.devnull)   # nothing can be said there
                sys.exit(3) if offset == BLOCK else os.close(-1)
            children.append((offset, child))

    children: list[tuple[int, int]] = []
    with muenfast.serve(Forks(), pool=2, **where), muenfast.BlockDevice(**where) as disk:
        for number in (0, 1, 2, 3, 0):
            assert disk.pread(BLOCK, number * BLOCK) == bytes(BLOCK)
    statuses = {(offset, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for offset, child in children}
    assert statuses == {(0, 0), (BLOCK, 3), (2 * BLOCK, 1), (3 * BLOCK, 1)}


def test_one_bad_block_fails_alone(where: dict[str, Any]) -> None:
    """Of neighbours that were one call."""
    class Bad(Ram):
        def pread(self, buf: memoryview, offset: int) -> None:
            if offset <= 7 * BLOCK < offset + len(buf):
                raise OSError(errno.EIO, "bad")
            super().pread(buf, offset)

    with muenfast.serve(Bad(), **where), muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pread(16 * BLOCK, 0)) == errno.EIO
        for number in (*range(7), *range(8, 16)):
            assert disk.pread(BLOCK, number * BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize(("attributes", "kind", "words"), [
    ({"pread": None}, UsageError, "no method pread"),
    ({"get_size": None}, UsageError, "no method get_size"),
    ({"get_size": lambda: 100}, UsageError, "at least 4096 bytes, this has 100"),
    ({"get_size": lambda: "1M"}, StoreError, "returned '1M'"),
    ({"get_size": lambda: -1}, StoreError, "returned -1"),
    ({"get_size": lambda: 1 << 63}, StoreError, "below 2\\^63"),
    ({"get_size": lambda: 1 // 0}, StoreError, "get_size\\(\\) raised ZeroDivisionError"),
    ({"block_size": lambda: 5}, StoreError, "block_size\\(\\) returned 5"),
    ({"block_size": lambda: (65536, 65536, 65536)}, StoreError, "minimum 65536"),
    ({"block_size": lambda: (3, 4096, 65536)}, StoreError, "minimum 3"),
    ({"block_size": lambda: (512, 512, 512)}, StoreError, "maximum 512"),
    ({"identity": lambda: 5}, StoreError, "identity\\(\\) returned 5"),
    ({"open": lambda readonly: open("/nonexistent/x")}, StoreError, "open\\(\\) raised FileNotFoundError"),
])
def test_stores_that_cannot_be_served(attributes: dict[str, Any], kind: type[Exception], words: str) -> None:
    """Said, and nothing is left."""
    store = Ram()
    for name, value in attributes.items():
        setattr(store, name, value)
    with pytest.raises(kind, match=words):
        muenfast.serve(store, unique("a"), unique("c"))


@pytest.mark.parametrize("method", ["open", "get_size", "close"])
def test_what_hangs_at_either_end_is_left_alone(method: str, caplog: pytest.LogCaptureFixture) -> None:
    go, store = threading.Event(), Ram()
    setattr(store, method, lambda *_: go.wait(60))
    try:
        if method == "close":
            muenfast.serve(store, unique("a"), unique("c"), timeout=1.0).close()
            assert "close() did not return within 1 s" in caplog.text
            store = Ram()
            store.close = lambda: go.wait(60)       # type: ignore[method-assign, assignment, return-value]
            muenfast.serve(store, unique("a"), unique("c"), timeout=1200.0).close()
            assert "close() did not return within 4 s" in caplog.text
        else:
            with pytest.raises(StoreError, match=rf"{method}\(\) did not return within 1 s"):
                muenfast.serve(store, unique("a"), unique("c"), timeout=1.0)
    finally:
        go.set()


@pytest.mark.parametrize(("more", "words"), [
    ({"pool": 0}, "1 to 64 threads"), ({"pool": 65}, "1 to 64 threads"), ({"timeout": 0.5}, "1 to 1200 seconds"),
    ({"timeout": 1201}, "1 to 1200 seconds"), ({"inject": "error,error"}, "one list of faults"),
    ({"req": "a,b", "resp": "c,d"}, "one connection")])
def test_serve_refuses(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        muenfast.serve(Ram(), **{"req": unique("a"), "resp": unique("c"), **more})
    with pytest.raises(UsageError, match="not its class"):
        muenfast.serve(Ram, unique("a"), unique("c"))
    with pytest.raises(UsageError, match="over a shared buffer"):
        muenfast.serve([Ram(), Ram()], unique("a"), unique("c"))


def test_wait_ends_with_the_server() -> None:
    server = muenfast.serve(Ram(), unique("a"), unique("c"))
    assert not server.wait(0.01)
    waiter = in_background(server.wait)
    server.close()
    waiter.join(20)
    assert not waiter.is_alive() and server.wait()


# ------------------------------------------------------------------ the command line

SOURCE = '''
import time

class Disk:
    def __init__(self, arg="16"):
        self.data = bytearray(int(arg) * 4096)
    def get_size(self):
        return len(self.data)
    def pread(self, buf, offset):
        buf[:] = self.data[offset:offset + len(buf)]
    def pwrite(self, buf, offset):
        self.data[offset:offset + len(buf)] = buf

class Hangs(Disk):
    def pread(self, buf, offset):
        if offset == 4096 * 9:
            open("inside", "w").close()
            time.sleep(600)
        super().pread(buf, offset)

class Named(Disk):
    """Lives on in a file, and says so."""
    def __init__(self, path):
        self.file = open(path, "r+b", buffering=0)
    def identity(self):
        return "named " + self.file.name
    def get_size(self):
        return self.file.seek(0, 2)
    def pread(self, buf, offset):
        import os
        assert os.preadv(self.file.fileno(), [buf], offset) == len(buf)
    def pwrite(self, buf, offset):
        import os
        assert os.pwrite(self.file.fileno(), buf, offset) == len(buf)

class Needs:
    def __init__(self, arg):
        raise RuntimeError("no luck")
'''


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A directory with the module `mydisk`, as a user would have it."""
    (tmp_path / "mydisk.py").write_text(SOURCE)
    yield tmp_path


@pytest.mark.parametrize("device", ["py:mydisk:Disk", "py:mydisk:Disk:32", "py:{tmp}/mydisk.py:Disk:32"])
def test_a_module_of_the_users(program: Start, source: Path, device: str) -> None:
    device = device.format(tmp=source)
    req, resp = unique("a"), unique("c")
    server = program("blk", "--req", req, "--resp", resp, "--device", device, "--pool", "2", "--timeout", "5",
                     cwd=str(source))
    size = 4096 * (32 if device.endswith("32") else 16)
    assert server.lines == [f"export {req} {resp} {size} {device}"]
    with muenfast.BlockDevice(req, resp) as disk:
        disk.pwrite(b"hello", 5)
        assert disk.pread(5, 5) == b"hello"
    assert server.end() == (0, "")


@pytest.mark.parametrize(("words", "status", "expected"), [
    (["--device", "py:"], 2, "a disk written in Python is py:MODULE:CLASS"),
    (["--device", "py:mydisk"], 2, "a disk written in Python is py:MODULE:CLASS"),
    (["--device", "py:nosuchdisk:Disk"], 2, "there is no module nosuchdisk"),
    (["--device", "py:./nosuch.py:Disk"], 2, "there is no file ./nosuch.py"),
    (["--device", "py:mydisk:Nothing"], 2, "module mydisk has no class Nothing"),
    (["--device", "py:mydisk:Needs"], 2, "Needs wants an argument"),
    (["--device", "py:mydisk:Needs:x"], 1, "Needs() raised RuntimeError: no luck"),
    (["--device", "py:bad:Disk"], 1, "its module could not be imported: SyntaxError"),
    (["--device", "py:imports:Disk"], 1, "its module could not be imported: No module named 'nosuchthing'"),
    (["--device", "py:mydisk:Disk", "--timeout", "0"], 2, "--timeout, entry 0 '0': a timeout has 1 to 1200 seconds"),
    (["--device", "py:mydisk:Disk", "--pool", "65"], 2, "--pool, entry 0 '65': a number of threads is"),
    (["--device", "ram:1M", "--pool", "2"], 2, "--pool, entry 0 '2': only a disk written in Python"),
    (["--device", "ram:1M", "--timeout", "2"], 2, "--timeout, entry 0 '2': only a disk written in Python"),
    (["--device", "py:mydisk:Disk", "--pool", "1,2"], 2, "--pool"),
])
def test_what_is_wrong_is_said(source: Path, tmp_path: Path, words: list[str], status: int, expected: str) -> None:
    """In one line with option, entry, value and rule; nothing is left."""
    (source / "bad.py").write_text("class Disk(:\n")
    (source / "imports.py").write_text("import nosuchthing\n")
    done = subprocess.run([sys.executable, "-m", "muenfast", "blk", "--req", unique("a"), "--resp", unique("c"), *words],
                          capture_output=True, text=True, timeout=60, cwd=source, check=False)
    assert done.returncode == status and done.stdout == ""
    line = one_line(done.stderr)
    assert expected in line
    assert "--device, entry 0" in line or status == 1 or not expected.startswith(("there", "module", "a disk", "Needs"))


def test_a_store_that_hangs_ends_in_seconds(program: Start, source: Path) -> None:
    """SIGTERM ends its server although a call does not come back."""
    req, resp = unique("a"), unique("c")
    server = program("blk", "--req", req, "--resp", resp, "--device", "py:mydisk:Hangs", "--timeout", "1200",
                     cwd=str(source))
    with muenfast.BlockDevice(req, resp) as disk:
        reader = in_background(lambda: failing(lambda: disk.pread(BLOCK, 9 * BLOCK)))
        eventually((source / "inside").exists)
        status, errors = server.end(signal.SIGTERM)
        assert status == 0 and "have not returned" in errors
        disk.fail("the end of the test")
        reader.join()


@pytest.mark.parametrize("known", [True, False])
def test_identity(program: Start, source: Path, known: bool) -> None:
    """A store that names its data is the same one after its server's death; another one fails its client."""
    (source / "image").write_bytes(bytes(16 * BLOCK))
    req, resp = unique("a"), unique("c")
    words = ["blk", "--req", req, "--resp", resp, "--device", "py:mydisk:Named:image" if known else "py:mydisk:Disk"]
    server = program(*words, cwd=str(source))
    with muenfast.BlockDevice(req, resp) as disk:
        disk.pwrite(b"before", 0)
        server.process.kill()
        server.process.communicate()
        server = program(*words, cwd=str(source))
        if known:
            disk.pwrite(b"after", 10)
            assert disk.pread(15, 0) == b"before\0\0\0\0after"
        else:
            assert failing(lambda: disk.pread(BLOCK, 0)) == errno.EIO
            assert disk.failure == "the server returned with another store"
    assert server.end() == (0, "")


def command(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@contextlib.contextmanager
def mounted(device: str, place: Path, *options: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    command("mount", *options, device, place)
    try:
        yield place
    finally:
        command("umount", place)


def files(seed: int) -> dict[str, bytes]:
    dice = random.Random(seed)
    return {f"{seed}-{number}": dice.randbytes(dice.randrange(200_000)) for number in range(40)}


def read_back(place: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in names}


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("sample", ["mine", "Ram", "Overlay"])
def test_file_systems(program: Start, source: Path, tmp_path: Path, sample: str, buffer: bool) -> None:
    """ext4 on disks written in Python, the samples among them: files come back, fsck finds nothing."""
    lists = ["--req", unique("a"), "--resp", unique("c"), *(["--shm", unique("e")] if buffer else [])]
    (tmp_path / "base").write_bytes(bytes(32 << 20))
    device = {"mine": "py:mydisk:Disk:8192", "Ram": "py:muenfast.stores:Ram:32M",
              "Overlay": "py:muenfast.stores:Overlay:base+over"}[sample]
    server = program("blk", *lists, "--device", device, cwd=str(source))
    client = program("blk", "--client", *lists)
    disk, data = client.lines[0].split()[4], files(1)
    command("mkfs.ext4", "-q", disk)
    with mounted(disk, tmp_path / "mnt") as place:
        for name, content in data.items():
            (place / name).write_bytes(content)
        if buffer and sample != "mine":
            command("fstrim", place)
    command("e2fsck", "-f", "-n", disk)
    with mounted(disk, tmp_path / "mnt", "-o", "ro") as place:
        assert read_back(place, data) == data
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    assert (tmp_path / "base").read_bytes() == bytes(32 << 20)


@pytest.mark.root
@pytest.mark.fuse
def test_an_overlay_survives_its_server(program: Start, tmp_path: Path) -> None:
    """kill -9 below a mounted ext4: it goes on, and everything is there; the base is as it was."""
    image, data = tmp_path / "base", files(2)
    image.write_bytes(bytes(32 << 20))
    command("mkfs.ext4", "-q", "-b", "4096", image)
    before = image.read_bytes()
    lists = ["--req", unique("a"), "--resp", unique("c")]
    words = ["blk", *lists, "--device", f"py:muenfast.stores:Overlay:{image}+{tmp_path}/over"]
    server = program(*words)
    client = program("blk", "--client", *lists)
    disk = client.lines[0].split()[4]
    with mounted(disk, tmp_path / "mnt") as place:
        for number, (name, content) in enumerate(data.items()):
            if number % 10 == 5:
                server.process.kill()
                server.process.communicate()
                server = program(*words)
            with open(place / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    command("e2fsck", "-f", "-n", disk)
    with mounted(disk, tmp_path / "mnt", "-o", "ro") as place:
        assert read_back(place, data) == data
    assert client.end()[0] == 0
    assert server.end() == (0, "")
    assert image.read_bytes() == before


@pytest.mark.root
@pytest.mark.fuse
def test_parts_under_ext4(program: Start, tmp_path: Path) -> None:
    """A split image is a read-only disk that mounts."""
    image, data, parts = tmp_path / "image", files(3), tmp_path / "parts"
    image.write_bytes(bytes(32 << 20))
    command("mkfs.ext4", "-q", "-b", "4096", "-d", _directory(tmp_path / "tree", data), image)
    parts.mkdir()
    whole = image.read_bytes()
    for number, at in enumerate(range(0, len(whole), 5 << 20)):     # as split(1) does, which AddressSanitizer stops
        (parts / f"part.{number:03}").write_bytes(whole[at:at + (5 << 20)])
    lists = ["--req", unique("a"), "--resp", unique("c")]
    server = program("blk", *lists, "--device", f"py:muenfast.stores:Parts:{parts}")
    assert server.lines[0].endswith(" read-only")
    client = program("blk", "--client", *lists)
    disk = client.lines[0].split()[4]
    assert command("blockdev", "--getro", disk) == "1\n"
    with mounted(disk, tmp_path / "mnt", "-o", "ro,noload") as place:
        assert read_back(place, data) == data
    assert client.end() == (0, "")
    assert server.end() == (0, "")


def _directory(path: Path, data: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, content in data.items():
        (path / name).write_bytes(content)
    return path


def test_help_and_hint_name_it() -> None:
    assert "py:MODULE:CLASS" in run("blk", "--help").stdout
    assert "py:MODULE:CLASS" in run("blk", "--req", unique("a"), "--resp", unique("c"), "--device", "nokind:x").stderr


def test_time_of_the_end_is_bounded_by_the_timeout(where: dict[str, Any]) -> None:
    """A client that leaves while its request is in the store is followed by the next one once that is answered."""
    store = Stuck()
    with muenfast.serve(store, pool=1, timeout=1.0, **where):
        with muenfast.BlockDevice(**where) as disk:
            reader = in_background(lambda: failing(lambda: disk.pread(BLOCK, BLOCK)))
            assert store.inside.acquire(timeout=20)
        reader.join()
        with muenfast.BlockDevice(**where) as disk:
            store.go.set()
            assert disk.pread(BLOCK, 0) == bytes(BLOCK)
