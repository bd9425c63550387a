"""The stores that come with the package, called as a server calls them: against a bytearray, by threads, killed, after
crashes that drop, tear and reorder what was not flushed, with files that are wrong."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muenfast.errors import ClaimError, UsageError
from muenfast.stores import Overlay, Parts, Ram, _files, overlay

BLOCK, SECTOR = 4096, 512
QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
SIZES = (4096, 4608, 5 * 4096, 6 * 4096 + 1536)
MAP = 8192      # where an overlay's map begins; the disk's data begins a page later on these small ones


def read(store: Ram | Overlay | Parts, offset: int = 0, count: int | None = None) -> bytes:
    buffer = bytearray(b"\xee" * (store.get_size() - offset if count is None else count))
    with memoryview(buffer) as view:
        store.pread(view, offset)
    return bytes(buffer)


def write(store: Ram | Overlay, offset: int, data: bytes) -> None:
    with memoryview(data) as view:
        store.pwrite(view, offset)


# What a test does to a disk: (word, offset, count, number), as far as the disk has so many bytes.
Step = tuple[str, int, int, int]


def steps(*words: str) -> st.SearchStrategy[list[Step]]:
    edges = st.sampled_from(sorted({each + more for each in range(0, 7 * 4096, 2048) for more in (-512, 0, 512, 7)
                                    if each + more >= 0}))
    counts = st.one_of(st.sampled_from((512, 4096, 8192)), st.integers(1, 3 * 4096))
    return st.lists(st.tuples(st.sampled_from(words), edges, counts, st.integers(1, 255)), max_size=25)


def content(number: int, count: int) -> bytes:
    """Data unlike any other step's, and unlike the next sector's."""
    return random.Random(number).randbytes(count)


def apply(store: Ram | Overlay, step: Step, model: bytearray) -> tuple[int, int]:
    """Does a write, zero, trim or read to store and model, and tells its range."""
    word, offset, count, number = step
    offset %= len(model)
    count = min(count, len(model) - offset)
    if word == "write":
        data = content(number, count)
        model[offset:offset + count] = data
        write(store, offset, data)
    elif word == "read":
        assert read(store, offset, count) == model[offset:offset + count]
    else:
        model[offset:offset + count] = bytes(count)
        getattr(store, word)(count, offset)
    return offset, count


# Ram


@settings(max_examples=150, **QUIET)
@given(size=st.sampled_from(SIZES), todo=steps("write", "write", "read", "zero", "trim"))
def test_ram_is_what_was_written(size: int, todo: list[Step]) -> None:
    store, model = Ram(str(size)), bytearray(size)
    try:
        assert store.get_size() == size
        for step in todo:
            apply(store, step, model)
        assert read(store) == model
    finally:
        store.close()


def resident(store: Ram) -> set[int]:
    """The pages that it has memory for."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(store._memory))
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(start // BLOCK * 8)
        words = memoryview(file.read(-(-store.get_size() // BLOCK) * 8)).cast("Q")
    return {page for page, word in enumerate(words) if word & (1 << 62 | 1 << 56)}     # swapped, or nobody else's: no zeros


def test_ram_takes_memory_for_what_is_written_and_gives_it_back() -> None:
    store = Ram("1M")
    try:
        write(store, 10 * BLOCK, bytes(range(256)) * 16 * 8)
        write(store, 1 << 19, b"x")
        assert resident(store) == {*range(10, 18), 128}
        store.zero(100, 200 * BLOCK + 5)        # zeros over a hole
        read(store, 50 * BLOCK, 1)
        assert not resident(store) & set(range(150, 256))
        store.trim(3 * BLOCK + 100, 10 * BLOCK - 50)      # a hole's end, three pages, the beginning of a fourth
        assert not resident(store) & {10, 11, 12}
        assert read(store, 13 * BLOCK, BLOCK) == (bytes(50) + (bytes(range(256)) * 16)[50:])
        store.zero(store.get_size(), 0)
        assert not resident(store)
        assert read(store) == bytes(1 << 20)
    finally:
        store.close()


def test_ram_has_room_for_more_than_there_is_memory() -> None:
    store = Ram("1T")
    try:
        write(store, (1 << 40) - 5, b"at it")
        assert read(store, (1 << 40) - 8, 8) == b"\0\0\0at it"
        store.trim(1 << 40, 0)
        assert read(store, (1 << 40) - 8, 8) == bytes(8)
    finally:
        store.close()


@pytest.mark.parametrize("arg", ["", "0", "513", "4095", "64Q", "-4096", "5000"])
def test_ram_refuses_a_size_that_no_disk_has(arg: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(arg))):
        Ram(arg)


def test_ram_has_a_size_by_itself() -> None:
    store = Ram()
    assert store.get_size() == 64 << 20
    store.close()


# Overlay


@dataclass
class Place:
    """A folder with a base, and overlays of it."""

    folder: Path
    data: bytes

    @property
    def base(self) -> Path:
        return self.folder / "base.img"

    @property
    def cow(self) -> Path:
        return self.folder / "over.cow"

    @property
    def arg(self) -> str:
        return f"{self.base}+{self.cow}"

    def open(self, *, readonly: bool = False) -> Overlay:
        store = Overlay(self.arg)
        store.open(readonly)
        return store


@contextlib.contextmanager
def place(size: int) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        made = Place(Path(folder), random.Random(size).randbytes(size))
        made.base.write_bytes(made.data)
        yield made


@pytest.fixture
def disk() -> Iterator[Place]:
    with place(SIZES[-1]) as made:
        yield made


@contextlib.contextmanager
def booted(number: int) -> Iterator[None]:
    """The machine's boot with that number."""
    with mock.patch.object(overlay, "_boot", lambda: number.to_bytes(16, "little")):
        yield


def killed(store: Overlay) -> None:
    """What kill -9 leaves of it: descriptors are closed, and that is all."""
    store._stack.close()


@settings(max_examples=150, **QUIET)
@given(size=st.sampled_from(SIZES),
       todo=steps("write", "write", "read", "zero", "trim", "flush", "restart", "kill", "reboot", "look"))
def test_an_overlay_is_its_base_and_what_was_written(size: int, todo: list[Step]) -> None:
    with place(size) as made, mock.patch.object(os, "fdatasync"), mock.patch.object(os, "fsync"):
        before = os.stat(made.base)
        model = bytearray(made.data)
        with booted(0):
            store = made.open()
        identity = store.identity()
        boot = 0
        for step in todo:
            if step[0] in ("restart", "kill", "reboot", "look"):
                store.close() if step[0] != "kill" else killed(store)
                boot += step[0] == "reboot"
                if step[0] == "look":
                    with booted(boot):
                        looking = made.open(readonly=True)
                    assert not looking.can_write()
                    assert read(looking) == model
                    looking.close()
                with booted(boot):
                    store = made.open()
                assert store.identity() == identity
                assert store.get_size() == size
            elif step[0] == "flush":
                store.flush()
            else:
                apply(store, step, model)
        assert read(store) == model
        store.close()
        after = os.stat(made.base)
        assert made.base.read_bytes() == made.data
        assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


@dataclass
class Log:
    """The system calls that change a file, in order, instead of the crash that they are for."""

    calls: list[tuple[str, int, bytes | int]] = field(default_factory=list)

    @contextlib.contextmanager
    def of(self, path: Path) -> Iterator[None]:
        """Records what is done to the file at path; syncs are recorded only."""
        pwrite, truncate, fallocate = os.pwrite, os.ftruncate, _files._fallocate

        def ours(fd: int) -> bool:
            return os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path))

        def logged_pwrite(fd: int, data: bytes, offset: int) -> int:
            count = pwrite(fd, data, offset)
            if ours(fd):
                self.calls.append(("write", offset, bytes(data[:count])))
            return count

        def logged_truncate(fd: int, size: int) -> None:
            truncate(fd, size)
            assert ours(fd)
            self.calls.append(("size", 0, size))

        def logged_fallocate(fd: int, mode: int, offset: int, count: int) -> int:
            assert ours(fd) and mode == 3
            self.calls.append(("clear", offset, count))
            return fallocate(fd, mode, offset, count)

        def logged_sync(fd: int) -> None:
            if ours(fd):
                self.calls.append(("sync", 0, 0))

        with mock.patch.object(os, "pwrite", logged_pwrite), mock.patch.object(os, "ftruncate", logged_truncate), \
                mock.patch.object(_files, "_fallocate", logged_fallocate), \
                mock.patch.object(os, "fdatasync", logged_sync), mock.patch.object(os, "fsync", logged_sync):
            yield

    def crashed(self, image: bytes, choice: random.Random | None) -> bytes:
        """The file, image before the calls, as the end of the machine leaves it: what a sync covered, and of the rest any
        sectors in any order, each as the page cache had it at some moment. No choice: that of the process only.

        A write that makes the file longer is there or not: a file system does not show what it has not written.
        """
        synced = max((i for i, call in enumerate(self.calls) if call[0] == "sync"), default=0)
        file = bytearray(image)
        for call in self.calls if choice is None else self.calls[:synced]:
            self._do(file, call)
        if choice is None:
            return bytes(file)
        cache, pieces = bytearray(file), []
        for word, offset, what in self.calls[synced:]:
            end = offset + (len(what) if isinstance(what, bytes) else what)
            longer = word != "sync" and end > len(cache)
            self._do(cache, (word, offset, what))
            if longer:
                if end > len(file) and choice.random() < 0.5:
                    file.extend(cache[len(file):] if word == "write" else bytes(end - len(file)))
            elif word != "sync":
                pieces += [(i, bytes(cache[i:i + SECTOR])) for i in range(offset // SECTOR * SECTOR, end, SECTOR)]
        share = choice.choice((0.1, 0.5, 0.9, 1.0))
        if choice.random() < 0.8:
            choice.shuffle(pieces)
        for offset, piece in pieces:
            if choice.random() < share and offset < len(file):
                file[offset:offset + SECTOR] = piece
        return bytes(file)

    @staticmethod
    def _do(file: bytearray, call: tuple[str, int, bytes | int]) -> None:
        word, offset, what = call
        if isinstance(what, bytes):
            file.extend(bytes(max(0, offset + len(what) - len(file))))
            file[offset:offset + len(what)] = what
        elif word == "size":
            file.extend(bytes(what - len(file)))
        elif word == "clear":
            file[offset:offset + what] = bytes(what)


Versions = list[set[bytes]]


def sectors(data: bytes | bytearray) -> list[bytes]:
    return [bytes(data[i:i + SECTOR]) for i in range(0, len(data), SECTOR)]


LIFE = steps("write", "write", "write", "zero", "trim", "flush", "flush", "kill")


@settings(max_examples=250, **QUIET)
@given(size=st.sampled_from(SIZES[1:]), seed=st.integers(0, 1 << 30),
       lives=st.lists(st.tuples(LIFE, st.floats(0, 1), st.booleans()), min_size=1, max_size=5))
def test_a_crash_leaves_what_was_flushed_and_mixes_nothing(size: int, seed: int,
                                                           lives: list[tuple[list[Step], float, bool]]) -> None:
    """Each life ends between two of its system calls: by kill -9, after which each sector has what was answered last, or
    with the machine, after which it has what the last flush saw or something that was written since, as on a plain disk."""
    choice = random.Random(seed)
    with place(size) as made:
        image, log, boot = b"", Log(), 0
        now = sectors(made.data)
        allowed: Versions = [{each} for each in now]
        for todo, point, power in lives:
            first = len(log.calls)
            model = bytearray().join(now)
            events: list[tuple[int, int, int, bytes]] = []      # calls before and after it; sectors it wrote; none: a flush
            with booted(boot), log.of(made.cow):
                store = made.open()
                assert read(store) == model
                for step in todo:
                    begun = len(log.calls)
                    if step[0] == "kill":
                        killed(store)
                        store = made.open()
                    elif step[0] == "flush":
                        store.flush()
                        events.append((begun, len(log.calls), 0, b""))
                    else:
                        offset, count = apply(store, step, model)
                        start, end = offset // SECTOR, -(-(offset + count) // SECTOR)
                        events.append((begun, len(log.calls), start, bytes(model[start * SECTOR:end * SECTOR])))
                killed(store)
            crash = first + round(point * (len(log.calls) - first))
            del log.calls[crash:]
            possible: Versions = [{each} for each in now]
            for begun, ended, start, data in events:
                if begun >= crash:
                    break
                for i, each in enumerate(sectors(data), start):
                    allowed[i].add(each)
                    possible[i] = {each} if ended <= crash else possible[i] | {each}
                    now[i] = each
                if not data and ended <= crash:
                    allowed = [{each} for each in now]
            if power:
                image, log, boot, possible = log.crashed(image, choice), Log(), boot + 1, allowed
            left = log.crashed(image, None)
            made.cow.write_bytes(left)
            with booted(boot), mock.patch.object(os, "fdatasync"), mock.patch.object(os, "fsync"):
                store = made.open()
                now = sectors(read(store))
                killed(store)
            assert [i for i, each in enumerate(now) if each not in possible[i]] == []
            made.cow.write_bytes(left)      # the next life opens what this one left, and may end in that
            if power:
                allowed = [{each} for each in now]


def test_kill_9_while_a_crash_is_made_up_for(disk: Place) -> None:
    """What the crash undid stays undone, wherever the next boot's first server ends."""
    with booted(1):
        store = disk.open()
        write(store, 0, b"x" * len(disk.data))
        killed(store)
    before, log = disk.cow.read_bytes(), Log()
    with booted(2):
        with log.of(disk.cow):
            killed(disk.open())
        assert len(log.calls) == 2
        for count in range(3):
            disk.cow.write_bytes(Log(log.calls[:count]).crashed(before, None))
            store = disk.open()
            assert read(store) == disk.data
            killed(store)


def test_reading_only_changes_nothing_and_sees_what_counts(disk: Place) -> None:
    with booted(1):
        store = disk.open()
        write(store, BLOCK, b"x" * BLOCK)
        killed(store)
    before = disk.cow.read_bytes()
    for boot, expected in ((1, b"x" * BLOCK), (2, disk.data[BLOCK:2 * BLOCK])):
        with booted(boot):
            looking = disk.open(readonly=True)
        assert read(looking, BLOCK, BLOCK) == expected
        looking.flush()
        looking.close()
        assert disk.cow.read_bytes() == before


def test_a_flush_is_data_then_map_and_the_next_one_data_only(disk: Place) -> None:
    log = Log()
    with log.of(disk.cow):
        store = disk.open()
        del log.calls[:]
        write(store, BLOCK, b"x" * BLOCK)
        store.flush()
        write(store, BLOCK, b"y" * BLOCK)
        store.flush()
        killed(store)
    data = MAP + BLOCK + BLOCK
    assert log.calls == [
        ("write", data, b"x" * BLOCK), ("write", MAP + 1, b"\1"),
        ("sync", 0, 0), ("write", MAP, b"\0\2" + bytes(5)), ("sync", 0, 0),
        ("write", data, b"y" * BLOCK), ("sync", 0, 0)]


def test_what_is_written_while_a_flush_runs_is_the_next_ones(disk: Place) -> None:
    store = disk.open()
    write(store, 0, b"a" * BLOCK)
    syncs = 0

    def sync(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs == 1:
            write(store, BLOCK, b"b" * BLOCK)

    with mock.patch.object(os, "fdatasync", sync):
        store.flush()
        assert disk.cow.read_bytes()[MAP:MAP + 3] == b"\2\1\0"
        store.flush()
        assert disk.cow.read_bytes()[MAP:MAP + 3] == b"\2\2\0"
        store.flush()
        assert syncs == 5
        store.close()


def test_after_a_flush_that_failed_every_flush_fails(disk: Place) -> None:
    store = disk.open()
    write(store, 0, b"a" * BLOCK)
    with mock.patch.object(os, "fdatasync", side_effect=OSError(errno.ENOSPC, "full")), \
            pytest.raises(OSError, match="full"):
        store.flush()
    write(store, BLOCK, b"b" * BLOCK)
    for call in store.flush, store.close:
        with pytest.raises(OSError, match="an earlier flush failed") as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
    assert disk.cow.read_bytes()[MAP:MAP + 2] == b"\1\1", "what the disk may not have is not called durable"
    store = disk.open()
    assert read(store, 0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
    store.close()


def test_a_map_of_many_pages(tmp_path: Path) -> None:
    """A disk of 40 MiB has three of them; blocks of all, also after kill -9, flushed and not, and a reboot."""
    made = Place(tmp_path, b"")
    with open(made.base, "wb") as file:
        file.truncate(40 << 20)
        file.seek(22 << 20)
        file.write(b"base" * 1024)
    places = [0, (16 << 20) - BLOCK, 16 << 20, (20 << 20) + BLOCK, 33 << 20, (40 << 20) - BLOCK]
    with booted(1):
        store = made.open()
        for offset in places:
            write(store, offset, offset.to_bytes(8, "big") * 512)
        killed(store)
        store = made.open()
        for offset in places:
            assert read(store, offset, BLOCK) == offset.to_bytes(8, "big") * 512
        assert read(store, 22 << 20, BLOCK) == b"base" * 1024
        store.flush()
        store.trim(2 << 20, 21 << 20)
        killed(store)
    with booted(2):
        store = made.open()
        for offset in places:
            assert read(store, offset, BLOCK) == offset.to_bytes(8, "big") * 512
        assert read(store, 22 << 20, BLOCK) == b"base" * 1024, "the trim was not flushed: the map does not know it"
        store.trim(20 << 20, 10 << 20)
        assert read(store, 10 << 20, 20 << 20) == bytes(20 << 20)
        store.close()
    with booted(3):
        store = made.open()
        assert read(store, 10 << 20, 20 << 20) == bytes(20 << 20)
        assert read(store, 33 << 20, BLOCK) == (33 << 20).to_bytes(8, "big") * 512
        store.close()
    assert made.cow.stat().st_blocks * 512 < 1 << 20


def test_threads_share_blocks(tmp_path: Path) -> None:
    """Four writers, each of its own sectors of every block, beside one that flushes; then kill -9 and a look."""
    size = 64 * BLOCK + 3 * SECTOR
    made = Place(tmp_path, random.Random(1).randbytes(size))
    made.base.write_bytes(made.data)
    for make in (lambda: made.open(), lambda: Ram(str(size))):
        store = make()
        model = bytearray(size) if isinstance(store, Ram) else bytearray(made.data)
        failed: list[BaseException] = []
        done = threading.Event()

        def writer(number: int, store: Ram | Overlay, model: bytearray, failed: list[BaseException]) -> None:
            choice = random.Random(number)
            try:
                for turn in range(1500):
                    sector = choice.randrange(size // SECTOR // 4) * 4 + number
                    if sector * SECTOR >= size:
                        continue
                    start = sector * SECTOR
                    data = bytes(SECTOR) if turn % 5 == 0 else choice.randbytes(SECTOR)
                    if turn % 5:
                        write(store, start, data)
                    else:
                        store.zero(SECTOR, start)
                    model[start:start + SECTOR] = data
                    assert read(store, start, SECTOR) == data
            except BaseException as error:
                failed.append(error)

        def flusher(store: Ram | Overlay, failed: list[BaseException], done: threading.Event) -> None:
            try:
                while isinstance(store, Overlay) and not done.is_set():
                    store.flush()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=writer, args=(i, store, model, failed)) for i in range(4)]
        beside = threading.Thread(target=flusher, args=(store, failed, done))
        for each in (beside, *threads):
            each.start()
        for each in threads:
            each.join()
        done.set()
        beside.join()
        assert failed == []
        assert read(store) == model
        if isinstance(store, Overlay):
            killed(store)
            store = made.open()
            assert read(store) == model
        store.close()


def test_two_that_take_one_block_from_the_base_both_write_it(disk: Place) -> None:
    arrived = threading.Semaphore(0)

    class Door:
        """A lock that tells who comes."""

        lock = threading.Lock()

        def __enter__(self) -> None:
            arrived.release()
            self.lock.acquire()

        def __exit__(self, *exc: object) -> None:
            self.lock.release()

    store = disk.open()
    store._copying = Door()     # type: ignore[assignment]
    with Door.lock:
        threads = [threading.Thread(target=write, args=(store, BLOCK + i * SECTOR, bytes([i]) * SECTOR)) for i in (1, 5)]
        for each in threads:
            each.start()
        for _ in threads:
            assert arrived.acquire(timeout=60)      # all of them have seen that the base has the block
    for each in threads:
        each.join()
    expected = bytearray(disk.data)
    for i in (1, 5):
        expected[BLOCK + i * SECTOR:BLOCK + (i + 1) * SECTOR] = bytes([i]) * SECTOR
    assert read(store) == expected
    store.close()


KILLED = """if True:
    import random, sys
    from muenfast.stores import Overlay
    store = Overlay(sys.argv[1])
    store.open(False)
    choice = random.Random(int(sys.argv[2]))
    while True:
        sector, turn = choice.randrange(store.get_size() // 512), choice.randrange(1, 256)
        print("about", sector, turn, flush=True)
        store.pwrite(memoryview(bytes([turn]) * 512), sector * 512)
        print("did", sector, turn, flush=True)
        if turn < 8:
            store.flush()
"""


def test_kill_9_loses_nothing_that_was_answered(disk: Place) -> None:
    """Flushed or not: a client does not send again what was answered, and goes on with what it knows of the disk."""
    model = bytearray(disk.data)
    identity = None
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", KILLED, disk.arg, str(turn)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            for _ in range(30 + 97 * turn):
                assert process.stdout.readline(), "it ended by itself"
        finally:
            process.send_signal(signal.SIGKILL)
            told, _ = process.communicate()
        # What the loop above took is the same that a generator of the same seed makes.
        choice, begun, finished = random.Random(turn), None, 0
        lines = 30 + 97 * turn + told.count(b"\n")
        while finished * 2 < lines:
            sector, value = choice.randrange(disk.base.stat().st_size // 512), choice.randrange(1, 256)
            finished += 1
            if finished * 2 <= lines:
                model[sector * 512:sector * 512 + 512] = bytes([value]) * 512
            else:
                begun = sector, bytes([value]) * 512
        store = disk.open()
        assert identity in (None, store.identity())
        identity = store.identity()
        found = bytearray(read(store))
        store.close()
        if begun is not None and found[begun[0] * 512:begun[0] * 512 + 512] == begun[1]:
            model[begun[0] * 512:begun[0] * 512 + 512] = begun[1]
        assert found == model


def test_trim_gives_the_file_system_its_blocks_back(tmp_path: Path) -> None:
    made = Place(tmp_path, b"")
    made.base.write_bytes(b"b" * (1 << 20))
    store = made.open()
    write(store, 0, b"x" * (1 << 20))
    store.flush()
    full = os.fstat(store._file.fd).st_blocks
    store.trim((1 << 20) - 8192, 4096)
    store.flush()
    assert os.fstat(store._file.fd).st_blocks <= full - ((1 << 20) - 3 * 8192) // 512
    store.close()


def test_a_file_system_without_holes_gets_zeros(disk: Place) -> None:
    def refuse(fd: int, mode: int, offset: int, count: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    store = disk.open()
    write(store, 0, b"x" * len(disk.data))
    with mock.patch.object(_files, "_fallocate", refuse), mock.patch.object(_files, "_ZEROS", bytes(5000)):
        store.trim(3 * BLOCK, BLOCK)
    assert read(store) == b"x" * BLOCK + bytes(3 * BLOCK) + b"x" * (len(disk.data) - 4 * BLOCK)
    store.close()


def test_a_full_disk_is_the_writers_error_and_the_map_knows(disk: Place) -> None:
    store = disk.open()
    pwrite = os.pwrite
    for limit, still in ((MAP, b"base"), (1 << 30, b"base")):

        def full(fd: int, data: bytes, offset: int, limit: int = limit) -> int:
            if offset >= MAP + BLOCK and limit == MAP or offset < MAP + BLOCK and limit != MAP:
                raise OSError(errno.ENOSPC, "full")
            return pwrite(fd, data, offset)

        with mock.patch.object(os, "pwrite", full), pytest.raises(OSError, match="full") as caught:
            write(store, 0, b"x" * BLOCK)
        assert caught.value.errno == errno.ENOSPC
        assert read(store) == disk.data, still
    write(store, 0, b"x" * BLOCK)
    killed(store)
    store = disk.open()
    assert read(store) == b"x" * BLOCK + disk.data[BLOCK:]
    store.close()


def test_short_reads_and_writes_are_gone_on_with(disk: Place) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    with mock.patch.object(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data[:1000]), offset)), \
            mock.patch.object(os, "preadv", lambda fd, bufs, offset: preadv(fd, [memoryview(bufs[0])[:700]], offset)):
        store = disk.open()
        write(store, 0, b"y" * 5000)
        assert read(store) == b"y" * 5000 + disk.data[5000:]
        store.close()


def test_an_overlay_has_one_user_and_its_base_no_writer(disk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_LOCK_TIMEOUT", 0.05)
    store = disk.open()
    for readonly in False, True:
        with pytest.raises(ClaimError, match=f"{re.escape(str(disk.cow))} is already held"):
            disk.open(readonly=readonly)
    with pytest.raises(ClaimError, match=re.escape(str(disk.base))):
        _files.File(str(disk.base), os.O_RDWR, alone=True)
    second = Overlay(f"{disk.base}+{disk.folder / 'second.cow'}")
    second.open(False)
    assert second.identity() != store.identity()
    write(second, 0, b"2" * BLOCK)
    assert read(store) == disk.data
    second.close()
    store.close()
    looking = [disk.open(readonly=True) for _ in range(2)]
    with pytest.raises(ClaimError):
        disk.open()
    for each in looking:
        each.close()
    disk.open().close()


def test_a_lock_that_goes_is_waited_for(disk: Place) -> None:
    store = disk.open()
    timer = threading.Timer(0.1, store.close)
    timer.start()
    disk.open().close()
    timer.join()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def resealed(path: Path, offset: int, data: bytes) -> None:
    """Writes to the header, and makes its checksum right."""
    overwrite(path, offset, data)
    overwrite(path, 4092, zlib.crc32(path.read_bytes()[:4092]).to_bytes(4, "little"))


def later(path: Path) -> None:
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


def same_time(path: Path, change: Callable[[Path], object]) -> None:
    info = path.stat()
    change(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize(("spoil", "rule"), [
    (lambda made: overwrite(made.cow, 0, b"X"), "this is no overlay"),
    (lambda made: made.cow.write_bytes(b"short"), "this is no overlay"),
    (lambda made: made.cow.write_bytes(bytes(1 << 20)), "this is no overlay"),
    (lambda made: overwrite(made.cow, 8, b"\2"), "this overlay has version 2 of the format, not 1"),
    (lambda made: overwrite(made.cow, 41, b"Z"), "its checksum is wrong"),
    (lambda made: resealed(made.cow, 13, b"\x20"), "this overlay's layout is not that of version 1"),
    (lambda made: os.truncate(made.cow, 20000), r"this overlay was cut short: it has 20000 of \d+ bytes"),
    (lambda made: overwrite(made.cow, MAP + 3, b"\7"), "the map of this overlay is damaged: 7 stands for block 3"),
    (lambda made: os.truncate(made.base, 4 * BLOCK), r"belongs to a base of 26112 bytes, .*base.img has 16384"),
    (lambda made: same_time(made.base, lambda path: overwrite(path, 9000, b"!")), "has other contents"),
    (lambda made: later(made.base), r"base.img was written since .*touch -d @\d+\.\d{9} .*base.img"),
    (lambda made: os.truncate(made.base, 26000), "a base has at least 4096 bytes and a multiple of 512, this has 26000"),
    (lambda made: os.truncate(made.base, 512), "a base has at least 4096 bytes and a multiple of 512, this has 512"),
])
def test_a_wrong_overlay_is_refused_and_left_alone(disk: Place, spoil: Callable[[Place], object], rule: str) -> None:
    store = disk.open()
    write(store, 0, b"x" * BLOCK)
    store.close()
    spoil(disk)
    before = disk.cow.read_bytes(), disk.base.read_bytes()
    for readonly in False, True:
        with pytest.raises(UsageError, match=rule):
            disk.open(readonly=readonly)
    assert (disk.cow.read_bytes(), disk.base.read_bytes()) == before


def test_a_base_that_only_seems_written_is_taken_again_as_the_message_says(disk: Place) -> None:
    disk.open().close()
    later(disk.base)
    with pytest.raises(UsageError) as caught:
        disk.open()
    found = re.search(r"touch -d (\S+) (\S+)\)", str(caught.value))
    assert found is not None
    subprocess.run(["touch", "-d", found[1], found[2]], check=True)
    disk.open().close()


@pytest.mark.parametrize("arg", ["", "base", "+", "base+", "+over"])
def test_an_overlay_is_two_paths(arg: str) -> None:
    with pytest.raises(UsageError, match="BASE\\+OVERLAY, two paths"):
        Overlay(arg)


def test_what_is_no_file_is_no_overlay(disk: Place) -> None:
    with pytest.raises(UsageError, match="same file"):
        Overlay(f"{disk.base}+{disk.base}").open(False)
    with pytest.raises(UsageError, match="a base is a file or block device"):
        Overlay(f"{disk.folder}+{disk.cow}").open(False)
    with pytest.raises(UsageError, match="an overlay is a file"):
        Overlay(f"{disk.base}+{disk.folder}").open(False)
    with pytest.raises(FileNotFoundError, match=re.escape(str(disk.cow))):
        disk.open(readonly=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Overlay(f"{disk.folder}/nowhere+{disk.cow}").open(False)
    assert os.listdir(disk.folder) == ["base.img"], "what fails makes nothing"


@pytest.mark.parametrize("left", [0, 4096])
def test_an_overlay_whose_making_was_interrupted_is_made(disk: Place, left: int) -> None:
    disk.open().close()
    os.truncate(disk.cow, left)
    store = disk.open()
    write(store, 0, b"x" * BLOCK)
    store.close()
    store = disk.open()
    assert read(store) == b"x" * BLOCK + disk.data[BLOCK:]
    store.close()
    assert stat.S_IMODE(disk.cow.stat().st_mode) == 0o600


def test_a_base_that_is_cut_short_while_it_is_used_gives_eio(disk: Place) -> None:
    store = disk.open()
    os.truncate(disk.base, BLOCK)
    with pytest.raises(OSError, match="it ends at 4096") as caught:
        read(store)
    assert caught.value.errno == errno.EIO
    assert read(store, 0, BLOCK) == disk.data[:BLOCK]
    store.close()


def test_the_format_is_the_documented_one(disk: Place) -> None:
    """docs/stores.md, by hand."""
    store = disk.open()
    write(store, 5 * BLOCK, b"5" * BLOCK)
    store.flush()
    store.zero(10, 8192)
    identity = store.identity()
    killed(store)
    file = disk.cow.read_bytes()
    u32, u64 = (lambda at, n=n: int.from_bytes(file[at:at + n], "little") for n in (4, 8))
    assert file[:8] == b"muenfcow"
    assert (u32(8), u32(12), u64(16), u64(24), u64(32)) == (1, 4096, len(disk.data), 8192, 12288)
    assert file[40:56] == identity
    assert u64(56) == disk.base.stat().st_mtime_ns
    assert file[80:4092] == bytes(4012)
    assert u32(4092) == zlib.crc32(file[:4092])
    boot = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    assert file[4096:8192] == boot + zlib.crc32(boot).to_bytes(4, "little") + bytes(4076)
    assert file[8192:12288] == bytes((0, 0, 1, 0, 0, 2)) + bytes(4090)
    assert file[12288 + 5 * BLOCK:12288 + 6 * BLOCK] == b"5" * BLOCK
    assert file[12288 + 2 * BLOCK:12288 + 3 * BLOCK] == bytes(10) + disk.data[8202:12288]
    assert len(file) == 12288 + len(disk.data)


# Parts


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, count in enumerate((8, 1, 16, 3)):
        (folder / f"part.{number:03}").write_bytes(random.Random(number).randbytes(count * SECTOR))
    (folder / ".note").write_text("not of the disk")
    return folder


def opened(folder: Path) -> Parts:
    store = Parts(str(folder))
    store.open(True)
    return store


def test_parts_are_one_disk(parts: Path) -> None:
    whole = b"".join((parts / f"part.{number:03}").read_bytes() for number in range(4))
    store = opened(parts)
    assert store.get_size() == len(whole) == 28 * SECTOR
    assert read(store) == whole
    for offset in range(0, len(whole), 257):
        for count in 1, 511, 513, 5000:
            count = min(count, len(whole) - offset)
            assert read(store, offset, count) == whole[offset:offset + count]
    assert not hasattr(store, "pwrite"), "read-only: it has no way to write"
    identity = store.identity()
    store.close()
    again = opened(parts)
    assert again.identity() == identity
    again.close()


def swap(path: Path, data: bytes) -> None:
    """Another file in its place, with its times."""
    info = path.stat()
    other = path.with_name(".new")
    other.write_bytes(data)
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    os.rename(other, path)


@pytest.mark.parametrize("spoil", [
    lambda part: os.truncate(part, SECTOR),
    lambda part: os.truncate(part, 0),
    lambda part: os.truncate(part, 17 * SECTOR),
    lambda part: part.unlink(),
    lambda part: part.rename(part.with_name("elsewhere")),
    lambda part: swap(part, bytes(16 * SECTOR)),
    lambda part: overwrite(part, 5, b"!"),
    lambda part: same_time(part, lambda path: overwrite(path, 5, b"!")),
], ids=["cut", "emptied", "grown", "removed", "moved", "replaced", "written", "written, same time"])
def test_a_part_that_is_touched_gives_eio_and_the_others_go_on(parts: Path, spoil: Callable[[Path], object]) -> None:
    first, part = (parts / "part.000").read_bytes(), parts / "part.002"
    store = opened(parts)
    identity = store.identity()
    assert read(store, 0, SECTOR) == first[:SECTOR]
    spoil(part)
    for offset, count in ((9 * SECTOR, SECTOR), (24 * SECTOR, SECTOR), (0, 28 * SECTOR)):
        with pytest.raises(OSError, match="part.002") as caught:
            read(store, offset, count)
        assert caught.value.errno == errno.EIO
    assert read(store, 0, len(first)) == first
    assert read(store, 25 * SECTOR, SECTOR) == (parts / "part.003").read_bytes()[:SECTOR]
    store.close()
    try:
        again = opened(parts)
    except UsageError:
        return
    assert again.identity() != identity
    again.close()


def test_a_directory_that_is_replaced_gives_eio(parts: Path, tmp_path: Path) -> None:
    store = opened(parts)
    parts.rename(tmp_path / "old")
    parts.mkdir()
    for number, count in enumerate((8, 1, 16, 3)):
        (parts / f"part.{number:03}").write_bytes(bytes(count * SECTOR))
    with pytest.raises(OSError, match="changed or replaced"):
        read(store)
    store.close()


def test_a_part_written_in_the_moment_of_its_opening_is_noticed(parts: Path) -> None:
    """Its times would be the same within one tick of the kernel's clock, were that not waited for."""
    for turn in range(20):
        overwrite(parts / "part.001", 0, bytes([turn]))
        store = opened(parts)
        overwrite(parts / "part.001", 0, bytes([turn + 1]))
        with pytest.raises(OSError, match="part.001"):
            read(store, 8 * SECTOR, SECTOR)
        store.close()


@pytest.mark.parametrize(("spoil", "rule"), [
    (lambda folder: (folder / "part.001").write_bytes(b"x" * 700), "part.001': a part has a multiple of 512 bytes.* 700"),
    (lambda folder: (folder / "part.003").write_bytes(b"x" * 700), "part.003': a part has a multiple of 512 bytes.* 700"),
    (lambda folder: (folder / "part.004").write_bytes(b""), "part.004': a part has .* not none; this has 0"),
    (lambda folder: (folder / "more").mkdir(), "more': a directory of parts holds files only"),
    (lambda folder: os.mkfifo(folder / "fifo"), "fifo': a directory of parts holds files only"),
    (lambda folder: [path.unlink() for path in folder.glob("part.*")], "parts': there is no part in this directory"),
])
def test_wrong_parts_are_refused(parts: Path, spoil: Callable[[Path], object], rule: str) -> None:
    spoil(parts)
    with pytest.raises(UsageError, match=rule):
        opened(parts)


def test_a_directory_that_is_none_is_named(parts: Path) -> None:
    with pytest.raises(UsageError, match="the directory"):
        Parts("")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        opened(parts / "nowhere")
    with pytest.raises(NotADirectoryError, match="part.000"):
        opened(parts / "part.000")


def test_a_part_has_no_writer(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_LOCK_TIMEOUT", 0.05)
    writer = _files.File(str(parts / "part.001"), os.O_RDWR, alone=True)
    with pytest.raises(ClaimError, match="part.001"):
        opened(parts)
    writer.close()
    both = opened(parts), opened(parts)
    for each in both:
        each.close()


# The guide


def test_the_guides_store_works() -> None:
    """The store that docs/stores.md begins with, as it stands there."""
    guide = (Path(__file__).resolve().parent.parent / "docs/stores.md").read_text()
    found = re.search(r"```python\n(.*?)```", guide, re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) <= 25
    names: dict[str, object] = {"__name__": "mystore"}
    exec(compile(found[1], "docs/stores.md", "exec"), names)
    [made] = [each for each in names.values() if isinstance(each, type)]
    store, model = made("1"), bytearray(1 << 20)
    assert store.get_size() == len(model)
    least, preferred, most = store.block_size()
    assert least & least - 1 == 0 and least <= BLOCK and least <= preferred <= most
    choice = random.Random(3)
    for number in range(100):
        first, last = sorted(choice.sample(range(len(model) // least), 2))
        apply(store, (choice.choice(("write", "read")), first * least, (last - first) * least, number), model)
    assert read(store) == model
