"""muenfast.BlockDevice against the independent plain server: honest, slow, wrong and hostile ones."""

from __future__ import annotations

import _thread
import errno
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from helpers import TornWords, block, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer import (
    BLOCK_BYTES,
    COMMAND,
    COMMAND_SIZE,
    EVENT_BYTES,
    INLINE_REGION_BYTES,
    READ,
    REQUEST_PROTOCOL,
    RESPONSE_PROTOCOL,
    SECTOR_BYTES,
    WRITE,
    ChannelReader,
    ChannelWriter,
    Event,
    InlineServer,
    channel_path,
)

from muenfast import BlockDevice, BlockServer, PeerError, UsageError
from muenfast.blk import exports_from_lists

HOSTILE = str(Path(__file__).with_name("hostile_peer.py"))
BLOCKS = 64


class Link:
    """A pair of channels that exist, and what was opened on them."""

    def __init__(self, names: Callable[[str], str]) -> None:
        self.req, self.resp = names("req"), names("resp")
        self._stack = ExitStack()
        for name in (self.req, self.resp):
            with open(channel_path(name), "xb") as file:
                file.truncate(INLINE_REGION_BYTES)

    @contextmanager
    def server(self, disk: bytearray, **options: Any) -> Iterator[InlineServer]:
        """A plain server that runs for the length of the block, and leaves politely."""
        server = InlineServer(self.req, self.resp, disk, **options)
        try:
            with server.running():
                yield server
        finally:
            server.close()

    def device(self, **options: Any) -> BlockDevice:
        """poll: a plain server has no bell; the adaptive pauses are for idle disks."""
        device = BlockDevice(self.req, self.resp, **{"timeout": 20, "poll": 100, **options})
        self._stack.callback(device.close)
        return device

    def close(self) -> None:
        self._stack.close()
        for name in (self.req, self.resp):
            for path in (channel_path(name), channel_path(name) + ".bell"):
                if os.path.exists(path):
                    os.unlink(path)


@pytest.fixture
def link(names: Callable[[str], str]) -> Iterator[Link]:
    link = Link(names)
    yield link
    link.close()


class Hand:
    """A server by hand: every answer is the test's own."""

    def __init__(self, link: Link) -> None:
        self.reader = ChannelReader(link.req, REQUEST_PROTOCOL, EVENT_BYTES)
        self.writer = ChannelWriter(link.resp, EVENT_BYTES, RESPONSE_PROTOCOL)

    def take(self, seconds: float = 20) -> Event:
        """The next request."""
        end = time.monotonic() + seconds
        while True:
            _, raw = self.reader.read()
            if raw is not None:
                return Event.unpack(raw)
            assert time.monotonic() < end, "no request"
            time.sleep(0.0002)

    def answer(self, request: Event, error: int = 0, data: bytes = b"") -> None:
        self.writer.write(request._replace(error=error, data=data).pack())

    def welcome(self, blocks: int = BLOCKS) -> None:
        """Takes a client's `size` and answers it in a new epoch."""
        request = self.take()
        assert (request.kind, request.id) == (COMMAND, COMMAND_SIZE)
        self.writer.activate()
        self.answer(request, data=struct.pack("<Q", blocks * (BLOCK_BYTES // SECTOR_BYTES)))

    def close(self) -> None:
        self.writer.deactivate()
        self.writer.close()
        self.reader.close()


@pytest.fixture
def hand(link: Link) -> Iterator[Hand]:
    """Closed before the link is."""
    hand = Hand(link)
    yield hand
    hand.close()


class Worker(threading.Thread):
    """Runs one call; result() returns what it returned or raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self, seconds: float = 30) -> Any:
        self.join(seconds)
        assert not self.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._value


# ------------------------------------------------------------------ honest servers


@pytest.mark.parametrize("options", [
    {}, {"fixed_epoch": True}, {"shuffle": 20, "seed": 3}, {"unknown": 50, "stale": 50},
    {"shuffle": 7, "unknown": 20, "stale": 20, "fixed_epoch": True, "seed": 5},
], ids=["plain", "epoch 1", "shuffled", "stale and unknown answers", "all of it"])
def test_what_is_written_is_read_back(link: Link, options: dict[str, Any]) -> None:
    """In whatever order answers come, with answers in between that are nobody's or come twice: each call gets its
    own data; strange answers are counted."""
    disk = bytearray(BLOCKS * BLOCK_BYTES)
    with link.server(disk, **options) as server, link.device() as device:
        assert device.size == len(disk)
        dice, model = random.Random(1), bytearray(disk)
        for _ in range(60):
            at, n = dice.randrange(BLOCKS), dice.randrange(1, 20)
            n = min(n, BLOCKS - at)
            if dice.random() < 0.5:
                data = dice.randbytes(n * BLOCK_BYTES)
                assert device.pwrite(data, at * BLOCK_BYTES) == len(data)
                model[at * BLOCK_BYTES:(at + n) * BLOCK_BYTES] = data
            else:
                assert device.pread(n * BLOCK_BYTES, at * BLOCK_BYTES) == model[at * BLOCK_BYTES:(at + n) * BLOCK_BYTES]
        device.flush()
        assert server.syncs == 1
        assert disk == model
        assert (device.status()["counters"]["stale"] > 0) == ("unknown" in options)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8 * BLOCK_BYTES), st.integers(0, 3 * BLOCK_BYTES + 1)),
                max_size=12), st.randoms(use_true_random=False))
def test_any_offset_and_length(shared_device: tuple[BlockDevice, bytearray], acts: list[tuple[bool, int, int]],
                               dice: random.Random) -> None:
    """pread and pwrite at any offset and length agree with a bytearray; what was not written stays as it was."""
    device, disk = shared_device
    model = bytearray(disk)
    for write, offset, length in acts:
        length = min(length, len(model) - offset)
        if write:
            data = dice.randbytes(length)
            assert device.pwrite(data, offset) == length
            model[offset:offset + length] = data
        else:
            assert device.pread(length, offset) == model[offset:offset + length]
    assert disk == model


@pytest.fixture
def shared_device(link: Link) -> Iterator[tuple[BlockDevice, bytearray]]:
    disk = bytearray(random.Random(2).randbytes(8 * BLOCK_BYTES))
    with link.server(disk), link.device() as device:
        yield device, disk


def test_many_at_once(link: Link) -> None:
    """pread_many and pwrite_many put one piece per offset in flight, more than the window holds; pieces may be
    several blocks and the list long."""
    disk = bytearray(1024 * BLOCK_BYTES)
    with link.server(disk, shuffle=9), link.device() as device:
        order = list(range(0, 1024, 2))
        random.Random(3).shuffle(order)
        data = b"".join(block(i) + block(i + 1) for i in order)
        assert device.pwrite_many([i * BLOCK_BYTES for i in order], data) == len(data)
        assert disk == b"".join(block(i) for i in range(1024))
        into = bytearray(1024 * BLOCK_BYTES)
        assert device.pread_many([i * BLOCK_BYTES for i in reversed(range(1024))], into) == len(into)
        assert into == b"".join(block(i) for i in reversed(range(1024)))
        assert device.pread_many([], bytearray()) == 0


def test_threads_at_once(link: Link) -> None:
    """Eight threads, each with a region of its own: their requests are in flight together and do not mix."""
    disk = bytearray(8 * 16 * BLOCK_BYTES)
    with link.server(disk, shuffle=5), link.device() as device:
        def work(number: int) -> bytearray:
            dice, base = random.Random(number), number * 16 * BLOCK_BYTES
            model = bytearray(16 * BLOCK_BYTES)
            for _ in range(60):
                at = dice.randrange(len(model))
                n = dice.randrange(len(model) - at)
                act = dice.random()
                if act < 0.45:
                    model[at:at + n] = data = dice.randbytes(n)
                    device.pwrite(data, base + at)
                elif act < 0.95:
                    assert device.pread(n, base + at) == model[at:at + n]
                else:
                    device.flush()
            return model

        workers = [Worker(lambda i=i: work(i)) for i in range(8)]  # type: ignore[misc]
        assert b"".join(worker.result(60) for worker in workers) == disk


# ------------------------------------------------------------------ errors


def test_an_error_belongs_to_its_request(link: Link) -> None:
    """What the server answers with an errno is an OSError with that errno, for the calls that touch the block and no
    others; an errno that is none is EIO."""
    disk = bytearray(BLOCKS * BLOCK_BYTES)
    bad = {5: -errno.ENOSPC, 9: -errno.EROFS, 20: 5, 21: -5000, 22: -(1 << 31)}
    with link.server(disk, fail_blocks=bad), link.device() as device:
        for at, number in ((5, errno.ENOSPC), (9, errno.EROFS), (20, errno.EIO), (21, errno.EIO), (22, errno.EIO)):
            for call in (lambda: device.pread(BLOCK_BYTES, at * BLOCK_BYTES),
                         lambda: device.pwrite(block(1), at * BLOCK_BYTES),
                         lambda: device.pwrite(b"x", at * BLOCK_BYTES + 7)):
                with pytest.raises(OSError) as caught:
                    call()
                assert caught.value.errno == number
        with pytest.raises(OSError) as caught:
            device.pread(8 * BLOCK_BYTES, 0)
        assert caught.value.errno == errno.ENOSPC
        assert device.pread(5 * BLOCK_BYTES, 0) == bytes(5 * BLOCK_BYTES)
        assert device.status()["state"] == "ready"


def test_wrong_offsets_and_lengths(link: Link) -> None:
    """What reaches beyond the disk, is negative or no multiple where it must be is a UsageError that costs no
    request, and no memory."""
    with link.server(bytearray(BLOCKS * BLOCK_BYTES)) as server, link.device() as device:
        end = BLOCKS * BLOCK_BYTES
        asked = len(server.answered)
        for call in (
            lambda: device.pread(1, end), lambda: device.pread(end + 1, 0), lambda: device.pread(1, -1),
            lambda: device.pread(-1, 0), lambda: device.pread(1 << 62, 0), lambda: device.pread(0, 1 << 70),
            lambda: device.pwrite(b"x", end), lambda: device.pwrite(b"x", -1),
            lambda: device.pread_many([end], bytearray(BLOCK_BYTES)),
            lambda: device.pread_many([-BLOCK_BYTES], bytearray(BLOCK_BYTES)),
            lambda: device.pwrite_many([-BLOCK_BYTES], bytes(BLOCK_BYTES)),
            lambda: device.pread_many([1 << 80], bytearray(BLOCK_BYTES)),
            lambda: device.pread_many([1], bytearray(BLOCK_BYTES)),
            lambda: device.pread_many([0, BLOCK_BYTES], bytearray(BLOCK_BYTES)),
            lambda: device.pread_many([0], bytearray(BLOCK_BYTES + 1)),
            lambda: device.pread_many([0], bytearray()),
            lambda: device.pread_many([], bytearray(BLOCK_BYTES)),
        ):
            with pytest.raises(UsageError):
                call()
        assert len(server.answered) == asked
        assert device.pread(0, end) == b""
        assert device.pwrite(b"", 0) == 0
    for call in (lambda: device.pread(1, 0), device.flush, lambda: device.pwrite(b"x", 0),
                 lambda: device.pread_many([0], bytearray(BLOCK_BYTES))):
        with pytest.raises(UsageError):
            call()
    assert not device.client.server_active
    assert device.client.incompatible is None
    device.close()


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (BLOCKS, 1), (BLOCKS - 1, 2), (0, BLOCKS + 1), (1 << 64, 1)])
def test_the_engine_sends_no_block_beyond_the_disk(link: Link, first: int, count: int) -> None:
    """It is refused here, not left to the server."""
    with link.server(bytearray(BLOCKS * BLOCK_BYTES)), link.device() as device:
        for write in (False, True):
            with pytest.raises(UsageError, match="beyond the disk"):
                device.target.move(write, first * BLOCK_BYTES, bytearray(count * BLOCK_BYTES))
            with pytest.raises(UsageError, match="beyond the disk"):
                device.target.scattered(write, [first * BLOCK_BYTES], bytearray(count * BLOCK_BYTES))
        with pytest.raises(UsageError, match="beyond the disk"):
            device.target.read(count * BLOCK_BYTES, first * BLOCK_BYTES)


def test_numbers_that_wrap(link: Link) -> None:
    """numpy's narrow integers are taken as numbers, whole blocks or not."""
    with link.server(bytearray(b"z" * 32 * BLOCK_BYTES)), link.device() as device:
        assert len(device.pread(65000, numpy.uint16(5000))) == 65000
        assert len(device.pread(numpy.uint16(65000), 5000)) == 65000
        assert device.pwrite(b"y" * 65000, numpy.uint16(5000)) == 65000
        assert device.pread(65000, 5000) == b"y" * 65000 and device.pread(8, numpy.uint8(250)) == b"z" * 8


def test_a_piece_that_is_too_large(names: Callable[[str], str]) -> None:
    """2^32 blocks and more in one call are refused, one piece or several; no byte of it is moved."""
    req, resp = names("req"), names("resp")
    with (BlockServer(exports_from_lists(req, resp, device="null:32T")), BlockDevice(req, resp) as device,
          mmap.mmap(-1, (1 << 44) + BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) as memory):
        for length in (1 << 44, (1 << 44) + BLOCK_BYTES):
            with memoryview(memory) as whole, whole[:length] as piece:
                with pytest.raises(UsageError, match="too many for one"):
                    device.pread_many([0], piece)
                with pytest.raises(UsageError, match="too many for one"):
                    device.pread_into(piece, 0)
        assert device.client.counters["reads"] == 0


MAP_NORESERVE = 0x4000     # uapi/asm-generic/mman.h

FORKED = """
import os, sys
from muenfast import AsyncBlockDevice, BlockDevice, BlockServer, UsageError, open_reader, open_writer
from muenfast.blk import exports_from_lists
req, resp, name = sys.argv[1:]
with (BlockServer(exports_from_lists(req, resp, device="ram:64K")) as server, BlockDevice(req, resp) as device,
      open_writer(name, size=64, protocol=1) as writer, open_reader(name, protocol=1) as reader):
    device.pwrite(b"P" * 4096, 0)
    writer.write(b"one")
    child = os.fork()
    if child == 0:
        for call in (lambda: device.pwrite(b"C" * 4096, 0), lambda: device.pread(1, 0), device.flush,
                     lambda: device.pread_many([0], bytearray(4096)), lambda: writer.write(b"two"), reader.read):
            try:
                call()
                os._exit(1)
            except UsageError as error:
                if "forked" not in str(error):
                    os._exit(2)
        for each in (device, writer, reader, server):
            each.close()
        del device, writer, reader, server
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert device.pread(4096, 0) == b"P" * 4096
    device.pwrite(b"Q" * 4096, 0)
    writer.write(b"three")
    found = []
    while len(found) < 2:
        if (element := reader.read()):
            found.append(element.rstrip(bytes(1)))
    print(found, device.pread(1, 0))
"""


def test_a_child_of_fork_leaves_it_alone(names: Callable[[str], str]) -> None:
    """It is told so at every call; closing and collecting change nothing for the parent."""
    done = subprocess.run([sys.executable, "-c", FORKED, names("req"), names("resp"), names("ring")], capture_output=True,
                          text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[b'one', b'three'] b'Q'\n"), done.stderr


HANDLER = """
import signal, sys, threading
from muenfast import BlockDevice, BlockServer
from muenfast.blk import exports_from_lists
server = BlockServer(exports_from_lists(*sys.argv[1:], device="ram:64K"))
device = BlockDevice(*sys.argv[1:])
server.close()
def close(*_):
    device.close()
    print("closed", flush=True)
signal.signal(signal.SIGALRM, close)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    device.pread(4096, 0)
except OSError as error:
    print(error.errno)
"""


def test_a_signal_handler_that_closes_the_device(names: Callable[[str], str]) -> None:
    """The call that it interrupts, which waits for a server that is gone, fails with EIO."""
    done = subprocess.run([sys.executable, "-c", HANDLER, names("req"), names("resp")], capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n5\n"), done.stderr


def test_several_threads_close_one_device(link: Link) -> None:
    with link.server(bytearray(BLOCKS * BLOCK_BYTES)):
        for _ in range(20):
            device = link.device()
            closers = [Worker(device.close) for _ in range(3)]
            for closer in closers:
                closer.result()


def test_before_the_first_answer(link: Link) -> None:
    """It is said; nothing is made of a disk without a size."""
    with link.device(timeout=0) as device:
        assert device.read_only is False
        for call in (lambda: device.pread(4096, 0), lambda: device.pwrite(b"x", 0), lambda: device.pread(0, 0)):
            with pytest.raises(UsageError, match="no server has answered yet"):
                call()
        device.fail("a test")
        for call in (lambda: device.pread(4096, 0), lambda: device.pwrite(b"x", 0), device.flush):
            with pytest.raises(OSError) as error:
                call()
            assert error.value.errno == errno.EIO


def test_numbers_that_are_none(link: Link) -> None:
    """Neither a fraction nor a negative length is rounded; unaligned or not, nothing is moved."""
    with link.server(bytearray(b"z" * BLOCKS * BLOCK_BYTES)), link.device() as device:
        for offset in (0.0, 1.5, "0", None):
            for call in (lambda: device.pread(BLOCK_BYTES, offset), lambda: device.pwrite(block(1), offset),
                         lambda: device.pread_into(bytearray(8), offset), lambda: device.pwrite_many([offset], block(1))):
                with pytest.raises(TypeError):
                    call()
        for length in (-1, 1 << 63, 1 << 70):
            with pytest.raises(UsageError):
                device.pread(length, 0)
        with pytest.raises(TypeError):
            device.pread(1.0, 0)
        writes = device.client.counters["writes"]
        for offset in (0, 5, BLOCKS * BLOCK_BYTES):
            assert device.pread(0, offset) == b"" and device.pwrite(b"", offset) == 0
        assert device.client.counters["writes"] == writes
        assert device.pread(BLOCKS * BLOCK_BYTES, 0) == b"z" * BLOCKS * BLOCK_BYTES


def test_no_server(link: Link) -> None:
    """TimeoutError after the timeout; nothing is left."""
    with pytest.raises(TimeoutError):
        link.device(timeout=0.3)


def test_a_server_that_speaks_otherwise(link: Link) -> None:
    """PeerError that names the channel, what stands there and what is expected."""
    other = ChannelWriter(link.resp, 64, 0xABC)
    other.activate()
    with pytest.raises(PeerError) as caught:
        link.device(timeout=0.5)
    other.deactivate()
    other.close()
    assert link.resp in str(caught.value)
    assert "abc" in str(caught.value)


def test_a_disk_without_blocks(link: Link, hand: Hand) -> None:
    """A server whose disk has no block is told apart from none, at once and without end to the waiting."""
    opening = Worker(lambda: link.device(timeout=None))
    hand.welcome(blocks=0)
    with pytest.raises(PeerError) as caught:
        opening.result()
    assert "no block" in str(caught.value)


# ------------------------------------------------------------------ servers that come and go


def test_a_server_that_comes_late(link: Link) -> None:
    """The device waits for it."""
    opening = Worker(link.device)
    time.sleep(0.1)
    disk = bytearray(BLOCKS * BLOCK_BYTES)
    with link.server(disk), opening.result() as device:
        device.pwrite(b"late", 0)
        assert disk[:4] == b"late"


def test_a_server_that_returns_and_is_trusted(link: Link) -> None:
    """same_store: requests wait for a server that names no identity, and are issued again to its next life."""
    disk = bytearray(BLOCKS * BLOCK_BYTES)
    with link.server(disk):
        device = link.device(same_store=True)
        device.pwrite(block(1), 0)
    for life in range(3):
        call = Worker(lambda: device.pwrite(block(life), BLOCK_BYTES) and device.pread(BLOCK_BYTES, 0))
        time.sleep(0.05)
        with link.server(disk, fixed_epoch=True):
            assert call.result() == block(1)
        assert disk[BLOCK_BYTES:2 * BLOCK_BYTES] == block(life)
    assert device.status()["counters"]["lives"] == 4


def test_a_server_that_returns_without_proof(link: Link) -> None:
    """Without an identity the store may be any: everything fails, nothing is written to the stranger."""
    with link.server(bytearray(BLOCKS * BLOCK_BYTES)):
        device = link.device()
    call = Worker(lambda: device.pwrite(block(1), 0))
    time.sleep(0.05)
    stranger = bytearray(BLOCKS * BLOCK_BYTES)
    with link.server(stranger):
        with pytest.raises(OSError) as caught:
            call.result()
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError):
            device.pread(1, 0)
    assert device.failure is not None
    assert stranger == bytes(len(stranger))


def test_a_predecessors_bell_vouches_for_nobody(link: Link) -> None:
    """The identity that a muenfast server left in the bell when it was killed is not that of a plain server that
    follows it on the channel."""
    from muenfast import BlockServer
    from muenfast.blk import exports_from_lists

    with BlockServer(exports_from_lists(link.req, link.resp, device="ram:256K")):
        device = link.device()
        device.pwrite(block(1), 0)
        assert device.client.store is not None
    # The bell stays (the device has it), and says what it said.
    stranger = bytearray(BLOCKS * BLOCK_BYTES)
    with link.server(stranger):
        with pytest.raises(OSError):
            Worker(lambda: device.pwrite(block(2), 0)).result()
    assert "does not say which store" in str(device.failure)
    assert stranger == bytes(len(stranger))


def test_a_server_that_returns_with_another_size(link: Link) -> None:
    """Another geometry is another disk, whatever same_store says."""
    with link.server(bytearray(BLOCKS * BLOCK_BYTES)):
        device = link.device(same_store=True)
    with link.server(bytearray(2 * BLOCKS * BLOCK_BYTES)):
        with pytest.raises(OSError):
            Worker(lambda: device.pread(1, 0)).result()
    assert "blocks" in str(device.failure)


def test_the_engine_issues_nothing_to_a_server_that_was_not_checked(link: Link, hand: Hand) -> None:
    """Nothing is written under another response epoch than that of the answer to `size`, noticed or not."""
    from muenfast import shm
    from muenfast._client import Client

    with (shm.Region.open(shm.Locator.parse(link.req), writable=True) as req,
          shm.Region.open(shm.Locator.parse(link.resp), writable=False) as resp):
        client = Client(req.view, resp.view, poll=100)
        welcome = Worker(hand.welcome)
        eventually(lambda: client.run(0.05) == "answered")
        welcome.result()
        assert client.resume()
        hand.writer.activate()  # another server; nobody has looked since
        call = Worker(lambda: client.disks[0].move(True, 0, block(1)))
        eventually(lambda: client.state == "lost")
        assert hand.reader.read()[1] is None
        client.fail()
        with pytest.raises(OSError):
            call.result()
        client.close()


def test_the_engine_takes_another_size_only_where_it_is_told_to(link: Link, hand: Hand) -> None:
    """resume() refuses it, resume(resized=True) takes it, and one that cannot be never."""
    from muenfast import shm
    from muenfast._client import Client

    with (shm.Region.open(shm.Locator.parse(link.req), writable=True) as req,
          shm.Region.open(shm.Locator.parse(link.resp), writable=False) as resp):
        client = Client(req.view, resp.view, poll=100)

        def answered(blocks: int) -> None:
            hand.writer.activate()
            eventually(lambda: client.run(0.05) in ("lost", "connecting"))
            welcome = Worker(lambda: hand.welcome(blocks))
            eventually(lambda: client.run(0.05) == "answered")
            welcome.result()

        answered(BLOCKS)
        assert client.resume()
        answered(2 * BLOCKS)
        with pytest.raises(UsageError, match="another geometry"):
            client.resume()
        assert client.disks[0].nblocks == BLOCKS
        assert client.resume(resized=True) and client.disks[0].nblocks == 2 * BLOCKS
        answered(0)
        with pytest.raises(UsageError, match="another geometry"):
            client.resume(resized=True)
        assert client.disks[0].nblocks == 2 * BLOCKS
        client.close()


def test_the_engine_does_not_resume_with_another_server_than_answered(link: Link, hand: Hand) -> None:
    """What is in flight is not issued to one that has taken over since the answer to `size`."""
    from muenfast import shm
    from muenfast._client import Client

    with (shm.Region.open(shm.Locator.parse(link.req), writable=True) as req,
          shm.Region.open(shm.Locator.parse(link.resp), writable=False) as resp):
        client = Client(req.view, resp.view, poll=100)
        welcome = Worker(hand.welcome)
        eventually(lambda: client.run(0.05) == "answered")
        welcome.result()
        hand.writer.activate()  # another server
        assert client.resume() is False
        assert client.state == "connecting"
        welcome = Worker(lambda: hand.welcome(BLOCKS - 1))  # which has a disk of its own
        eventually(lambda: client.run(0.05) == "answered")
        welcome.result()
        assert client.resume() is True
        assert client.disks[0].nblocks == BLOCKS - 1
        client.close()


def test_nothing_is_issued_to_a_server_that_was_not_checked(link: Link, hand: Hand) -> None:
    """A request submitted in the moment in which another server has taken over is not written for it to execute."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    hand.writer.deactivate()
    hand.writer.activate()  # the other one; the device has had no time to see it
    call = Worker(lambda: device.pwrite(block(1), 0))
    eventually(lambda: not hand.reader.active)
    hand.writer.deactivate()
    hand.welcome()  # so the next request is a `size` in a new epoch, not the write
    with pytest.raises(OSError):
        call.result()


# ------------------------------------------------------------------ depth


def test_a_depth_bounds_what_is_in_flight(link: Link, hand: Hand) -> None:
    """With depth=3 the fourth of ten requests is written once the first is answered, and so on, until all are."""
    with pytest.raises(UsageError, match="depth"):
        link.device(depth=1025)
    with pytest.raises(UsageError, match="depth"):
        link.device(depth=1.5)
    opening = Worker(lambda: link.device(depth=3))
    hand.welcome()
    device = opening.result()
    buffer = bytearray(10 * BLOCK_BYTES)
    call = Worker(lambda: device.pread_many([n * BLOCK_BYTES for n in range(10)], buffer))
    waiting = [hand.take() for _ in range(3)]
    for n in range(10):
        assert hand.reader.read()[1] is None, "more than three in flight"
        hand.answer(waiting.pop(0), data=block(n))
        if n < 7:
            waiting.append(hand.take())
    assert call.result() == len(buffer)
    assert buffer == b"".join(block(n) for n in range(10))
    with pytest.raises(UsageError, match="depth"):
        device.client.depth = 0


def test_a_request_that_takes_long_is_not_lapped(link: Link, hand: Hand) -> None:
    """Whatever overtakes it: rings of 254 elements hold 128 requests from the oldest on, and its answer finds it there."""
    opening = Worker(lambda: link.device(depth=1024))
    hand.welcome()
    device = opening.result()
    buffer = bytearray(300 * BLOCK_BYTES)
    call = Worker(lambda: device.pread_many([n % BLOCKS * BLOCK_BYTES for n in range(300)], buffer))
    oldest = hand.take()
    before = device.client.progress
    for n in range(1, 128):
        hand.answer(hand.take(), data=block(n))
    eventually(lambda: device.client.progress == before + 127)
    assert device.client.in_flight == 1
    assert hand.reader.read()[1] is None, "more than the rings hold"
    hand.answer(oldest, data=block(0))
    for n in range(128, 300):
        hand.answer(hand.take(), data=block(n))
    assert call.result() == len(buffer)
    assert buffer == b"".join(block(n) for n in range(300))


@pytest.mark.parametrize(("each", "depth"), [(128, 128), (16, 16)], ids=["all of them", "some"])
def test_the_depth_adapts_to_the_server(link: Link, hand: Hand, each: int, depth: int) -> None:
    """A server answers `each` of its requests every 2 ms: where these are all, the depth grows as far as the rings allow;
    where more in flight only wait longer, it shrinks to the least."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    assert device.client.depth == 32
    buffer, offsets = bytearray(2048 * BLOCK_BYTES), [n % BLOCKS * BLOCK_BYTES for n in range(2048)]
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            device.pread_many(offsets, buffer)

    def serve() -> None:
        waiting: list[Event] = []
        while calls.is_alive():
            time.sleep(0.002)
            while (raw := hand.reader.read()[1]) is not None:
                waiting.append(Event.unpack(raw))
            for request in waiting[:each]:
                hand.answer(request, data=block(request.id))
            del waiting[:each]

    calls = Worker(load)
    server = Worker(serve)
    try:
        assert eventually(lambda: device.client.depth == depth, 60), device.client.depth
    finally:
        done.set()
    calls.result()
    server.result()
    assert buffer == b"".join(block(n % BLOCKS) for n in range(2048))
    device.client.depth = 5
    assert device.client.depth == 5
    device.client.depth = None
    assert device.client.depth == 32


# ------------------------------------------------------------------ interruption


def test_ctrl_c_ends_a_call_that_gets_no_answer(link: Link, hand: Hand) -> None:
    """KeyboardInterrupt is raised soon; the buffer is not touched by the answer that comes after all; the device
    lives on."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    into = bytearray(3 * BLOCK_BYTES)
    requests: list[Event] = []

    def interrupt() -> None:
        requests.extend(hand.take() for _ in range(3))
        time.sleep(0.05)
        _thread.interrupt_main(signal.SIGINT)

    helper = Worker(interrupt)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        device.pread_into(into, 0)
    assert time.monotonic() - begin < 10
    helper.result()
    into[:] = b"\x11" * len(into)
    for request in requests:
        hand.answer(request, data=block(0xBAD))
    call = Worker(lambda: device.pread(BLOCK_BYTES, 5 * BLOCK_BYTES))
    request = hand.take()
    assert (request.kind, request.id) == (READ, 5)
    hand.answer(request, data=block(5))
    assert call.result() == block(5)
    assert into == b"\x11" * len(into)
    assert device.client.in_flight == 0


def test_ctrl_c_among_waiting_threads(link: Link, hand: Hand) -> None:
    """An interrupted call is not kept by others that wait for answers, too."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    others = [Worker(lambda i=i: device.pread(BLOCK_BYTES, i * BLOCK_BYTES)) for i in range(8)]  # type: ignore[misc]
    requests = [hand.take() for _ in range(8)]
    for _ in range(5):
        timer = threading.Timer(0.05, _thread.interrupt_main, [signal.SIGINT])
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            device.pread(BLOCK_BYTES, 60 * BLOCK_BYTES)
        assert time.monotonic() - begin < 10
        timer.join()
    for request in requests:
        hand.answer(request, data=block(request.id))
    assert [other.result() for other in others] == [block(i) for i in range(8)]


def test_close_while_others_wait(link: Link, hand: Hand) -> None:
    """close() returns, and every call that waits for an answer fails."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    calls = [Worker(lambda i=i: device.pwrite(block(i), i * BLOCK_BYTES)) for i in range(8)]  # type: ignore[misc]
    for _ in range(8):
        assert hand.take().kind == WRITE
    Worker(device.close).result(20)
    for call in calls:
        with pytest.raises((OSError, UsageError)):
            call.result(10)


# ------------------------------------------------------------------ hostile servers


@pytest.mark.parametrize("wrong", [{"kind": WRITE}, {"kind": COMMAND}, {"id": 4}, {"priv": 1 << 31}, {"priv": 1 << 20}],
                         ids="-".join)
def test_an_answer_that_matches_in_part_is_none(link: Link, hand: Hand, wrong: dict[str, int]) -> None:
    """Kind, block and tag have to be those of a request in flight; what is not is stale, and the request waits on."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    call = Worker(lambda: device.pread(BLOCK_BYTES, 3 * BLOCK_BYTES))
    request = hand.take()
    if "priv" in wrong:     # the same entry of the client's table
        wrong = {"priv": request.priv ^ wrong["priv"]}
    hand.answer(request._replace(**wrong), data=block(1))
    hand.answer(request, data=block(2))
    assert call.result() == block(2)
    assert device.status()["counters"]["stale"] == 1
    device.close()


def test_an_answer_twice_in_one_batch(link: Link, hand: Hand) -> None:
    """The second is stale: it does not stand for another block of the same call."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    call = Worker(lambda: device.pread(2 * BLOCK_BYTES, 0))
    first, second = hand.take(), hand.take()
    answer = first._replace(error=0, data=block(1)).pack()
    hand.writer.write_many([answer, answer])
    eventually(lambda: device.status()["counters"]["stale"] == 1)
    hand.answer(second, data=block(2))
    assert call.result() == block(1) + block(2)
    device.close()


class Announcing:
    """Stands in for a plain writer's header: WSC says that the whole ring is being written again."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value + self._words[4] if index == 6 else value

    def release(self) -> None:
        self._words.release()


def test_an_answer_that_is_being_overwritten(link: Link, hand: Hand) -> None:
    """It is not taken: the channel has overrun, and the client begins anew."""
    opening = Worker(link.device)
    hand.welcome()
    device = opening.result()
    call = Worker(lambda: device.pread(BLOCK_BYTES, 0))
    request = hand.take()
    words = hand.writer._words
    hand.writer._words = Announcing(words)
    hand.answer(request, data=block(1))
    hand.writer._words = words
    eventually(lambda: device.status()["counters"]["overruns"] == 1)
    assert device.status()["counters"]["reads"] == 0
    device.close()
    with pytest.raises((OSError, UsageError)):
        call.result()


@pytest.mark.parametrize("wrong", [{"kind": READ}, {"id": 0}, {"id": 2}, {"priv": 1}, {"error": -errno.EIO}, {"error": 1}],
                         ids="-".join)
def test_an_answer_to_something_else_tells_no_size(link: Link, hand: Hand, wrong: dict[str, int]) -> None:
    """Of several answers the one to this client's `size` counts, and only without an error."""
    opening = Worker(link.device)
    request = hand.take()
    if "priv" in wrong:
        wrong = {"priv": request.priv ^ 1}
    hand.writer.activate()
    hand.writer.write_many([request._replace(data=struct.pack("<Q", BLOCKS * 8)).pack(),
                            request._replace(data=struct.pack("<Q", 99 * 8))._replace(**wrong).pack()])
    device = opening.result()
    assert device.size == BLOCKS * BLOCK_BYTES
    device.close()


def test_a_size_that_is_being_overwritten(link: Link, hand: Hand) -> None:
    """It is not taken; the next answer is."""
    opening = Worker(link.device)
    request = hand.take()
    hand.writer.activate()
    words = hand.writer._words
    hand.writer._words = Announcing(words)
    hand.answer(request, data=struct.pack("<Q", 99 * 8))
    hand.writer._words = words
    time.sleep(0.1)     # seen by now, or not: it must not count in either case
    hand.answer(request, data=struct.pack("<Q", BLOCKS * 8))
    device = opening.result()
    assert device.size == BLOCKS * BLOCK_BYTES
    device.close()


def test_an_answer_before_its_request(link: Link, hand: Hand) -> None:
    """A server that foresees tags and answers what it was not asked yet, over and over: the
    process lives, and all calls end with the device at the latest."""
    opening = Worker(link.device)
    request = hand.take()
    hand.writer.activate()
    hand.answer(request, data=struct.pack("<Q", BLOCKS * 8))
    device = opening.result()
    stop = threading.Event()
    base = request.priv + 1

    def foresee() -> None:
        while not stop.is_set():
            head = device.client.counters["reads"]
            hand.writer.write_many([Event(READ, 0, k % 8, 1, (base + head + k - head % 8) & 0xFFFFFFFF,
                                          block(k)).pack() for k in range(128)])

    answers = Worker(foresee)
    calls = [Worker(lambda: [device.pread(8 * BLOCK_BYTES, 0) for _ in range(200)]) for _ in range(4)]
    try:
        time.sleep(3)
    finally:
        stop.set()
        answers.result()
        device.close()
        for call in calls:
            call.join(10)
            assert not call.is_alive()


@pytest.mark.stress
def test_a_hostile_writer(link: Link) -> None:
    """Header and slots of the response channel change at full speed for 5 s under calls in several threads: no
    crash, no hang; afterwards an honest server is served right."""
    disk = bytearray(16 * BLOCK_BYTES)
    with link.server(disk):
        device = link.device(same_store=True, on_peer_loss="timeout:0.3")
    attacker = subprocess.Popen([sys.executable, HOSTILE, channel_path(link.resp), f"{RESPONSE_PROTOCOL:x}", "5", "2"])
    stop = threading.Event()

    def work(number: int) -> int:
        calls, dice = 0, random.Random(number)
        while not stop.is_set() and device.failure is None:
            calls += 1
            try:
                if dice.random() < 0.5:
                    device.pread(3 * BLOCK_BYTES, dice.randrange(13) * BLOCK_BYTES)
                else:
                    device.pwrite(block(calls), dice.randrange(16) * BLOCK_BYTES)
            except OSError:
                continue
        return calls

    workers = [Worker(lambda i=i: work(i)) for i in range(4)]  # type: ignore[misc]
    try:
        assert attacker.wait(60) == 0
    finally:
        stop.set()
        for worker in workers:
            assert worker.result(60) > 0
    if device.failure is not None:  # it may have named another size, once: that ends a device for good
        device.close()
        device = None  # type: ignore[assignment]
    with link.server(disk):
        if device is None:
            device = link.device()
        eventually(lambda: device.status()["state"] == "ready")
        device.pwrite(block(7), 7 * BLOCK_BYTES)
        assert device.pread(BLOCK_BYTES, 7 * BLOCK_BYTES) == block(7)
        assert disk[7 * BLOCK_BYTES:8 * BLOCK_BYTES] == block(7)
        device.close()


def test_a_server_that_stores_its_counters_in_pieces(link: Link) -> None:
    """A plain peer in Python: half-stored counters are no restart, so the device stays what it is."""
    disk = bytearray(BLOCKS * BLOCK_BYTES)
    with link.server(disk) as server:
        with link.device() as device:
            server._resp._words = TornWords(server._resp._words)
            for number in range(3000):
                device.pwrite(block(number), number % BLOCKS * BLOCK_BYTES)
                assert device.pread(BLOCK_BYTES, number % BLOCKS * BLOCK_BYTES) == block(number)
            counters = device.status()["counters"]
            assert (counters["lives"], counters["stale"], counters["errors"]) == (1, 0, 0)
