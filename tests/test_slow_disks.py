"""Disks that stand still, are cut short or die with requests under way: a frozen file system holds writes, those of a loop
device on it, too, until it is thawed."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Program, run
from helpers import block, compiled, eventually
from peer import (
    BUFFER_READ,
    BUFFER_WRITE,
    DISCARD,
    EPOCH,
    EVENT_BYTES,
    MAX_DEVICES,
    READ,
    REQUEST_PROTOCOL,
    RESPONSE_PROTOCOL,
    SYNC,
    WC,
    WRITE,
    BufferRequest,
    Event,
)
from test_blk_buffer import Rig, loop_device, rig, statuses
from test_buffer_client import Link, link

from muenfast import BlockDevice, ClaimError, shm
from muenfast._blk import Server
from muenfast._ring import Reader, Writer
from muenfast._store import Store
from muenfast._target import Completions
from muenfast.backing import Device, open_device

__all__ = ["link", "loop_device", "rig"]     # fixtures

BLOCK = 4096
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h


class Held:
    """A file system whose writes wait while it is frozen, for 20 seconds at most: a test that cannot thaw it has to end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._limit: threading.Timer | None = None

    def freeze(self) -> None:
        fcntl.ioctl(self._fd, FIFREEZE, 0)
        self._limit = threading.Timer(20, self._thaw)
        self._limit.start()

    def _thaw(self) -> None:
        with self._lock:
            if self._limit is not None:
                self._limit = None
                fcntl.ioctl(self._fd, FITHAW, 0)

    def thaw(self) -> None:
        """What was to happen before has not waited for the limit."""
        assert self._limit is not None
        self._limit.cancel()
        self._limit.join()
        self._thaw()

    def disk(self, blocks: int = 64) -> Path:
        """A new file of that many blocks of zeros."""
        path = self.path / f"disk{len(list(self.path.iterdir()))}"
        path.write_bytes(bytes(blocks * BLOCK))
        return path

    def close(self) -> None:
        if self._limit is not None:
            self.thaw()
        os.close(self._fd)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    image, place = tmp_path / "image", tmp_path / "held"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        one = Held(place)
        try:
            yield one
        finally:
            one.close()
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture(params=[False, True], ids=["io_uring", "threads"])
def threads(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class Inline:
    """A plain client of the first generation and its server, which runs only when told."""

    def __init__(self, store: Store, threads: bool, elements: int = 254) -> None:
        self.req, self.resp = (mmap.mmap(-1, 64 + elements * EVENT_BYTES) for _ in range(2))
        self.server = Server(self.req, self.resp, store, threads=threads)
        self.server.run(0)
        self.reader = Reader(self.resp, size=EVENT_BYTES, protocol=RESPONSE_PROTOCOL)
        self.begin()

    def begin(self) -> None:
        """A new life."""
        self.writer = Writer(self.req, size=EVENT_BYTES, protocol=REQUEST_PROTOCOL)
        eventually(lambda: self.server.run(0) == "connected")

    @property
    def epoch(self) -> int:
        """The response channel's."""
        return int(memoryview(self.resp).cast("Q")[EPOCH])

    def send(self, *events: Event) -> None:
        self.writer.write_many(b"".join(event.pack().ljust(EVENT_BYTES, b"\0") for event in events))

    def answers(self, count: int) -> dict[int, Event]:
        """All that comes until there are `count`, by priv."""
        found: dict[int, Event] = {}

        def enough() -> bool:
            self.server.run(0.01)
            while (element := self.reader.read()) is not None:
                answer = Event.unpack(element)
                assert answer.priv not in found
                found[answer.priv] = answer
            return len(found) >= count

        eventually(enough)
        return found

    def close(self) -> None:
        self.server.close()
        self.writer.close()
        self.reader.close()


@pytest.fixture
def inline(threads: bool) -> Iterator[Callable[..., Inline]]:
    with ExitStack() as stack:
        def make(path: Path, **more: int) -> Inline:
            backing = stack.enter_context(open_device(Device.parse(str(path))))
            client = Inline(backing.store, threads, **more)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def stores() -> Iterator[Callable[[Path | str], Store]]:
    """Opens disks, which are closed at the end."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(open_device(Device.parse(str(path)))).store


# ------------------------------------------------------------------ one connection


@pytest.mark.root
def test_what_waits_for_a_slow_write_is_slept_through(held: Held, inline: Callable[..., Inline]) -> None:
    """A request that overlaps one under way is not looked at over and over, and run() returns in time."""
    client = inline(held.disk())
    held.freeze()
    client.send(*(Event(WRITE, 0, 3, 1, priv, block(priv)) for priv in (1, 2)))
    for _ in range(3):
        assert client.server.run(0.05) == "tick"
    assert client.server.counters["batches"] <= 2
    held.thaw()
    assert {priv: answer.error for priv, answer in client.answers(2).items()} == {1: 0, 2: 0}


@pytest.mark.root
def test_what_waits_over_a_buffer_is_slept_through(held: Held, rig: Rig, stores: Callable[[Path], Store],
                                                   threads: bool) -> None:
    """The same of a sync, a reset and an overlapping write."""
    server = rig.serve(stores(held.disk()), threads=threads)
    client = rig.client()
    before = server.counters["batches"]
    held.freeze()
    client.send(BufferRequest(BUFFER_WRITE, 0, 1, BLOCK, 0, 0), BufferRequest(BUFFER_WRITE, 0, 2, BLOCK, 0, BLOCK),
                BufferRequest(SYNC, 0, 3))
    for _ in range(3):
        assert server.run(0.05) == "tick"
    assert server.counters["batches"] <= before + 2
    held.thaw()
    assert statuses(client.answers(3)) == [(1, 0), (2, 0), (3, 0)]


@pytest.mark.root
def test_nobody_gets_the_answers_of_a_life_that_ended(held: Held, inline: Callable[..., Inline]) -> None:
    """A client begins anew while its writes are held: the response channel keeps its epoch, and nothing is answered, until
    they are done; the new one has the new life's answers only."""
    client = inline(held.disk())
    client.send(Event(READ, 0, 0, 1, 1))
    client.answers(1)
    held.freeze()
    client.send(*(Event(WRITE, 0, 2 * i, 1, 100 + i, block(i)) for i in range(8)))
    eventually(lambda: client.server.run(0.01) and client.server.counters["batches"] >= 2)
    old = client.epoch
    client.writer.close()
    client.writer = Writer(client.req, size=EVENT_BYTES, protocol=REQUEST_PROTOCOL)
    client.send(*(Event(READ, 0, 2 * i, 1, 200 + i) for i in range(8)))
    for _ in range(5):
        client.server.run(0.01)
    assert client.epoch == old and client.reader.read() is None
    held.thaw()
    eventually(lambda: client.server.run(0.01) and client.epoch not in (0, old))
    assert client.reader.read() is None     # says that the epoch changed, and begins with it
    found = client.answers(8)
    assert {priv: answer.data for priv, answer in found.items()} == {200 + i: block(i) for i in range(8)}


def test_answers_of_a_life_that_ended_are_not_written_at_all() -> None:
    """A pipe instead of a file: a read of it ends when there is something in it. One of the old life's reads ends while
    another one is under way: the response channel does not change until both have."""
    source, sink = os.pipe()
    client = Inline(Store.in_file(source, 64 * BLOCK, read_only=True), threads=False)
    header = memoryview(client.resp).cast("Q")[:8]

    def end_one(reads: int) -> None:
        os.write(sink, block(reads))
        eventually(lambda: client.server.run(0.01) and client.server.counters["reads"] == reads)

    try:
        client.send(*(Event(READ, 0, 2 * i, 1, i) for i in range(3)))
        end_one(1)
        assert header[WC] == 1
        client.writer.close()
        client.writer = Writer(client.req, size=EVENT_BYTES, protocol=REQUEST_PROTOCOL)
        client.send(Event(READ, 0, 9, 1, 100))
        client.server.run(0.01)     # knows of it from now on
        old = header.tolist()
        end_one(2)
        assert header.tolist() == old
        end_one(3)
        eventually(lambda: client.server.run(0.01) and header[EPOCH] not in (0, old[EPOCH]))
        assert client.reader.read() is None
        end_one(4)
        assert client.answers(1)[100].data == block(4)
    finally:
        for _ in range(4):
            os.write(sink, bytes(BLOCK))
        client.close()
        header.release()
        os.close(source)
        os.close(sink)


@pytest.mark.root
def test_an_overrun_leaves_what_was_taken_its_answer(held: Held, rig: Rig, stores: Callable[[Path], Store],
                                                     threads: bool) -> None:
    """A client that writes more than the ring holds while a write is held loses what it overwrote, no more."""
    server = rig.serve(stores(held.disk()), request=64 + 16 * 32, threads=threads)
    client = rig.client()
    held.freeze()
    client.send(BufferRequest(BUFFER_WRITE, 0, 7, BLOCK, 0, 0))
    assert server.run(0.01) == "tick"
    for tag in range(20):
        client.send(BufferRequest(BUFFER_READ, 0, 100 + tag, BLOCK, BLOCK, BLOCK))
    assert server.run(0.01) == "overrun"
    held.thaw()
    assert statuses(client.answers(1)) == [(7, 0)]
    assert client.call(MAX_DEVICES) == 1 and server.counters["cancelled"] == 0


# ------------------------------------------------------------------ two disks of a connection


@pytest.mark.root
def test_a_held_write_takes_one_place(held: Held, rig: Rig, stores: Callable[[Path], Store], threads: bool,
                                      tmp_path: Path) -> None:
    """The other disk of its connection goes on, however many requests it has."""
    other = tmp_path / "other"
    other.write_bytes(b"o" * 64 * BLOCK)
    rig.serve(stores(held.disk()), stores(other), threads=threads)
    client = rig.client()
    held.freeze()
    client.send(BufferRequest(BUFFER_WRITE, 0, 7, BLOCK, 0, 0))
    for turn in range(10):
        client.send(*(BufferRequest(BUFFER_READ, 1, 100 * turn + i, BLOCK, i % 64 * BLOCK, BLOCK * (1 + i % 32))
                      for i in range(100)))
        assert all(answer.device == 1 and answer.status == 0 for answer in client.answers(100))
    held.thaw()
    assert statuses(client.answers(1)) == [(7, 0)]


@pytest.mark.root
def test_many_held_writes_leave_the_other_disk_threads(held: Held, rig: Rig, stores: Callable[[Path], Store],
                                                       threads: bool, tmp_path: Path) -> None:
    """What does its I/O, the kernel's workers or a pool, is not all taken by the disk that hangs."""
    other = tmp_path / "other"
    other.write_bytes(bytes(64 * BLOCK))
    rig.serve(stores(held.disk(256)), stores(other), threads=threads)
    client = rig.client()
    held.freeze()
    client.send(*(BufferRequest(BUFFER_WRITE, 0, i, BLOCK, 2 * i * BLOCK, 0) for i in range(100)))
    for i in range(20):
        client.write(1, i * BLOCK, block(i), BLOCK)
        client.sync(1)
        assert other.read_bytes()[i * BLOCK:(i + 1) * BLOCK] == block(i)
    held.thaw()
    assert sorted(statuses(client.answers(100))) == [(i, 0) for i in range(100)]


@pytest.mark.root
def test_a_held_discard_of_a_device(held: Held, rig: Rig, stores: Callable[[Path | str], Store], threads: bool,
                                    loop_device: Callable[[Path], str]) -> None:
    """BLKDISCARD that stands behind a write is not waited for by the thread that serves."""
    path = held.disk(256)
    path.write_bytes(b"h" * 256 * BLOCK)
    server = rig.serve(stores(loop_device(path)), stores("ram:64K"), threads=threads)
    client = rig.client()
    for _ in range(5):      # Linux 6.18 does one in 400 discards all the same, of plain pwrite and ioctl, too
        held.freeze()
        client.send(BufferRequest(BUFFER_WRITE, 0, 6, BLOCK, 100 * BLOCK, BLOCK))
        rig.step()
        client.send(BufferRequest(DISCARD, 0, 7, 32 * BLOCK, 0))
        rig.step()
        client.send(BufferRequest(BUFFER_READ, 1, 8, BLOCK, 0, 0))
        found = statuses(client.answers(1))
        stood = server.directions[0]["write"]["depth"] == server.directions[0]["discard"]["depth"] == 1
        assert server.directions[0]["write"]["depth"] == 1
        held.thaw()
        found += statuses(client.answers(2))
        assert sorted(found) == [(6, 0), (7, 0), (8, 0)]
        if stood:
            assert found[0] == (8, 0)
            break
    assert stood
    assert client.read(0, 31 * BLOCK, 2 * BLOCK) == bytes(BLOCK) + b"h" * BLOCK


def test_the_pool_has_a_thread_for_each_operation(tmp_path: Path) -> None:
    """Where io_uring is not to be had: one that was woken for a disk that stands still is nobody else's, though it has yet
    to begin (tests/c/pool.c)."""
    program = compiled("pool", tmp_path, "-O1", "-D_GNU_SOURCE")
    assert subprocess.run([program, "20"], check=True, capture_output=True, text=True).stdout == "20\n"


@pytest.mark.root
def test_a_disk_that_stands_still_leaves_the_other_its_share(held: Held, link: Link) -> None:
    """Client and server: hundreds of writes to a disk that hangs, queued and in flight; the other disk of the connection
    reads, writes and syncs; afterwards all of them are done."""
    path = held.disk(256)
    link.serve(str(path), "ram:1M")
    with link.device() as disk, BlockDevice(connection=disk.connection, device=1) as other:
        disk.client.background = True
        done = Completions(disk.target)
        data = bytes(block(9))
        held.freeze()
        for i in range(256):
            done.submit("write", i, data)
        for i in range(100):
            assert other.pwrite(block(i) * 16, i % 16 * 16 * BLOCK) == 16 * BLOCK
            assert other.pread(16 * BLOCK, i % 16 * 16 * BLOCK) == block(i) * 16
            other.flush()
        held.thaw()
        ended: list[tuple[int, int]] = []
        eventually(lambda: ended.extend(done.collect()) or len(ended) == 256)
        assert {error for _, error in ended} == {0}
        done.close()
    assert path.read_bytes() == block(9) * 256


@pytest.mark.parametrize("buffer", [16 << 10, 64 << 10, 128 << 10])
def test_small_buffers_are_shared(link: Link, buffer: int) -> None:
    """Long requests of one disk and short ones of another have a buffer between them that holds little of either."""
    link.serve("ram:1M", "ram:1M", buffer_size=str(buffer))
    with link.device(shm_size=str(buffer), depth=256) as disk, BlockDevice(connection=disk.connection, device=1) as other:
        jobs = [link.start(lambda disk=disk, n=n: [disk.pwrite(block(n + i) * n, 0) and disk.pread(n * BLOCK, 0) for i in
                                                   range(60)][-1]) for disk, n in ((disk, 256), (other, 1))]
        assert jobs[0].result(60) == block(256 + 59) * 256 and jobs[1].result(60) == block(60)


# ------------------------------------------------------------------ files that change, servers that die


@pytest.mark.parametrize("size", [8 * BLOCK, 8 * BLOCK + 1000], ids=["between blocks", "within a sector"])
def test_of_neighbours_only_what_is_missing_fails(inline: Callable[..., Inline], tmp_path: Path, size: int) -> None:
    """Reads that became one operation are done one by one where it fails."""
    path = tmp_path / "disk"
    path.write_bytes(b"".join(map(block, range(64))))
    client = inline(path)
    os.truncate(path, size)
    client.send(*(Event(READ, 0, i, 1, i) for i in range(16)))
    found = client.answers(16)
    assert [found[i].error for i in range(16)] == 8 * [0] + 8 * [-errno.EIO]
    assert [found[i].data for i in range(16)] == [*map(block, range(8)), *[bytes(BLOCK)] * 8]
    assert client.server.counters["failed"] == 8


def test_a_buffer_that_was_made_short_and_long_again(names: Callable[[str], str], tmp_path: Path, threads: bool,
                                                     stores: Callable[[Path], Store]) -> None:
    """Its pages are others now: what the client puts there is what the disk gets."""
    path = tmp_path / "disk"
    path.write_bytes(b"o" * 16 * BLOCK)
    place = Path("/dev/shm") / names("place")    # pages that io_uring could keep
    place.mkdir()
    rig = Rig(place)
    try:
        with rig.stack:
            rig.serve(stores(path), threads=threads)
            client = rig.client()
            assert client.read(0, 0, BLOCK) == b"o" * BLOCK
            os.truncate(place / "buf", 0)
            os.truncate(place / "buf", 256 << 10)
            client.write(0, BLOCK, b"n" * BLOCK)
            assert client.read(0, 0, 2 * BLOCK, 2 * BLOCK) == b"o" * BLOCK + b"n" * BLOCK
        assert path.read_bytes() == b"o" * BLOCK + b"n" * BLOCK + b"o" * 14 * BLOCK
    finally:
        for each in place.iterdir():
            each.unlink()
        place.rmdir()


def stuck_write(held: Held, device: BlockDevice) -> Completions:
    """A write of block(2) over block(1), under way while the disk stands still."""
    device.pwrite(block(1), 0)
    device.client.background = True
    done = Completions(device.target)
    held.freeze()
    done.submit("write", 0, bytes(block(2)))
    eventually(lambda: device.client.in_flight == 1)
    return done


@pytest.mark.root
def test_a_dead_servers_last_write_is_waited_for(held: Held, link: Link, program: Callable[..., Program],
                                                 loop_device: Callable[[Path], str]) -> None:
    """A server is killed while the disk is at its write, which nobody can take back: nobody else gets the disk before that
    is done, for it would come after theirs."""
    disk = loop_device(held.disk(256))
    server = link.program(disk)
    with link.device() as device:
        done = stuck_write(held, device)
        eventually(lambda: Path(f"/sys/block/{Path(disk).name}/inflight").read_text().split() != ["0", "0"])
        server.process.kill()
        server.process.wait(20)
        fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
        try:
            with pytest.raises(ClaimError):
                shm.claim_backing(fd, disk, shared=False, timeout=0.2)
            held.thaw()
            shm.claim_backing(fd, disk, shared=False).release()
        finally:
            os.close(fd)
        link.program(disk)
        ended: list[tuple[int, int]] = []
        eventually(lambda: ended.extend(done.collect()) or len(ended) == 1)
        assert ended[0][1] == 0 and device.pread(BLOCK, 0) == block(2)
        done.close()


@pytest.mark.root
def test_an_end_that_waits_for_its_disk_says_so(held: Held, link: Link) -> None:
    """A server that is told to end while its disk stands still names the export, and ends once the disk is done."""
    server = link.program(str(held.disk()))
    with link.device() as device:
        done = stuck_write(held, device)
        eventually(lambda: any(entry["in_flight"] == 1 for answer in json.loads(run("stat", "--json").stdout)
                               if answer["pid"] == server.pid for entry in answer["entries"]))   # the server has it
        server.process.terminate()
        assert server.process.stderr is not None
        eventually(lambda: f"export {link.req}/{link.resp}: waiting for its disk" in server.process.stderr.readline())
        assert server.process.poll() is None
        held.thaw()
        status, _ = server.end()
        assert status == 0
        device.connection.fail("the test is over")
        eventually(lambda: len(done.collect()) == 1)
        done.close()


@pytest.mark.root
def test_a_child_of_fork_waits_for_nothing(held: Held, inline: Callable[..., Inline]) -> None:
    """Nor takes what is its parent's: operations, their answers, threads; the parent goes on."""
    client = inline(held.disk())
    client.send(Event(WRITE, 0, 1, 1, 1, block(1)))
    assert client.answers(1)[1].error == 0
    held.freeze()
    client.send(Event(WRITE, 0, 2, 1, 2, block(2)))
    eventually(lambda: client.server.run(0) == "tick" and client.server.counters["batches"] >= 2)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            client.server.close()
            del client.server       # the last reference: what it holds is let go
            status = 0
        finally:
            os._exit(status)
    ended: list[tuple[int, int]] = []
    eventually(lambda: (one := os.waitpid(child, os.WNOHANG))[0] and not ended.append(one))
    assert ended == [(child, 0)]
    held.thaw()
    assert client.answers(1)[2].error == 0
