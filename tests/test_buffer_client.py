"""muenfast's block client of the shared-buffer transport against the independent plain server, and against muenfast's."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, unique
from helpers import block, eventually
from peer import (
    BLOCK_LENGTH,
    BUFFER_PROTOCOL,
    BUFFER_REQUEST_BYTES,
    BUFFER_REQUEST_REGION_BYTES,
    BUFFER_RESPONSE_REGION_BYTES,
    BUFFER_WRITE,
    DISCARD,
    HEADER_BYTES,
    MAX_BLOCKS_COUNT,
    MAX_DEVICES,
    MAX_REQUESTS,
    MEDIA_BLOCKS,
    RESET,
    TRANSPORT_ID,
    WC,
    WSC,
    BufferResponse,
    channel_path,
)
from peer import BufferServer as PlainServer

from muenfast import AsyncBlockDevice, BlockDevice, BlockServer, PeerError, UsageError
from muenfast._client import Disk
from muenfast.backing import Device
from muenfast.blk import BlockClients, Connection, channels_from_lists, exports_from_lists

BLOCK = 4096
SIZE = 64 * BLOCK


class Link:
    """A connection's names, plain servers and devices on it."""

    def __init__(self, names: Callable[[str], str], program: Callable[..., Program]) -> None:
        self.req, self.resp, self.shm = names("req"), names("resp"), names("buf")
        self.stack = ExitStack()
        self._program = program
        self._pool = self.stack.enter_context(ThreadPoolExecutor(64))

    def make(self, buffer_size: int = 1 << 20) -> None:
        """Makes the regions, which then stay whoever leaves."""
        for name, size in ((self.req, BUFFER_REQUEST_REGION_BYTES), (self.resp, BUFFER_RESPONSE_REGION_BYTES),
                           (self.shm, buffer_size)):
            with open(channel_path(name), "xb") as file:
                file.truncate(size)

    def plain(self, *disks: bytearray, **options: Any) -> PlainServer:
        """A plain server that nobody runs yet."""
        server = PlainServer(self.req, self.resp, self.shm, disks or [bytearray(SIZE)], **options)
        self.stack.callback(server.close)
        return server

    def running(self, *disks: bytearray, **options: Any) -> PlainServer:
        server = self.plain(*disks, **options)
        self.stack.enter_context(server.running())
        return server

    def serve(self, *devices: str, **lists: Any) -> BlockServer:
        """muenfast's server in this process; device 0 and further ones."""
        first, *further = devices or ("ram:256K",)
        (config,) = exports_from_lists(self.req, self.resp, buffer=self.shm, device=first,
                                       **{"poll": 100, "buffer_size": "1M", **lists})
        more = tuple(Device.parse(text) for text in further)
        server = BlockServer([replace(config, further=more, entries=tuple(range(1 + len(more))))])
        self.stack.callback(server.close)
        return server

    def program(self, device: str, *more: str) -> Program:
        """muenfast's server in a process of its own."""
        server = self._program("blk", "--req", self.req, "--resp", self.resp, "--shm", self.shm, "--shm-size", "1M",
                               "--device", device, "--poll", "100", *more)
        self.stack.callback(server.end)
        return server

    def device(self, **options: Any) -> BlockDevice:
        device = BlockDevice(self.req, self.resp, shm=self.shm, **{"poll": 100, "timeout": 20, "shm_size": "1M", **options})
        self.stack.callback(device.close)
        return device

    def start(self, call: Callable[[], Any]) -> Future[Any]:
        """Runs call() in a thread."""
        return self._pool.submit(call)

    def close(self) -> None:
        self.stack.close()
        for name in (self.req, self.resp, self.shm):
            for path in (channel_path(name), channel_path(name) + ".bell"):
                if os.path.exists(path):
                    os.unlink(path)


@pytest.fixture
def link(names: Callable[[str], str], program: Callable[..., Program]) -> Iterator[Link]:
    one = Link(names, program)
    yield one
    one.close()


# ------------------------------------------------------------------ use


@pytest.mark.parametrize("options", [{}, {"shuffle": 40, "seed": 3}, {"unknown": 200, "stale": 200},
                                     {"fixed_epoch": True}, {"silent": ()}, {"max_blocks": 1}, {"max_blocks": 3},
                                     {"block_length": 512, "max_blocks": 65}], ids=str)
def test_any_plain_server(link: Link, options: dict[str, Any]) -> None:
    """Whatever the order of answers, strays among them, a server that leaves Max_Requests unanswered, small limits and
    small blocks: what is read is what was written, and only what was asked is on the disk."""
    disk, dice = bytearray(SIZE), random.Random(1)
    server = link.running(disk, **options)
    device = link.device()
    assert (device.size, device.block_size) == (SIZE, options.get("block_length", 4096))
    model = bytearray(SIZE)
    for n in range(60):
        offset = dice.randrange(SIZE)
        length = dice.randrange(1, SIZE - offset + 1)
        if n % 3:
            data = dice.randbytes(length)
            assert device.pwrite(data, offset) == length
            model[offset:offset + length] = data
        else:
            assert device.pread(length, offset) == model[offset:offset + length]
    device.flush()
    assert disk == model
    assert server.syncs == 1
    counters = device.client.counters
    assert counters["lives"] == 1
    assert (counters["stale"] > 300) == ("stale" in options)       # a few came while it connected


def test_many_threads(link: Link) -> None:
    """Requests of several threads are in flight together, in pieces, and each gets its own data."""
    disk = bytearray(4 << 20)
    link.running(disk, shuffle=8)
    device = link.device(depth=64)

    def work(number: int) -> None:
        dice, base = random.Random(number), number << 19
        model = bytearray(1 << 19)
        for _ in range(25):
            offset = dice.randrange(128) * BLOCK
            length = dice.randrange(1, 129 - offset // BLOCK) * BLOCK
            if dice.random() < 0.6:
                data = dice.randbytes(length)
                device.pwrite(data, base + offset)
                model[offset:offset + length] = data
            else:
                assert device.pread(length, base + offset) == model[offset:offset + length]

    for call in [link.start(lambda n=n: work(n)) for n in range(8)]:
        call.result()
    assert device.client.in_flight == 0


def test_neighbours_are_neighbours_in_the_buffer(link: Link) -> None:
    """What continues on the disk continues in the buffer, so that a server may join it."""
    server = link.running(bytearray(1 << 20))
    device = link.device()
    device.pwrite(bytes(1 << 20), 0)
    writes = [request for request in server.requests if request.kind == BUFFER_WRITE]
    assert len(writes) > 1
    gaps = sum(b.device_offset == a.device_offset + a.length and b.buffer_offset != a.buffer_offset + a.length
               for a, b in zip(writes, writes[1:], strict=False))
    assert gaps <= 1    # the end of the buffer


@pytest.mark.parametrize("buffer", [BLOCK, 3 * BLOCK, 5 * BLOCK + 512])
def test_a_small_buffer(link: Link, buffer: int) -> None:
    """Less room than one request would take, or no multiple of anything."""
    link.make(buffer)
    disk = bytearray(SIZE)
    link.running(disk, buffer_size=buffer)
    device = link.device()
    data = os.urandom(SIZE)
    device.pwrite(data, 0)
    assert disk == data
    assert device.pread(SIZE, 0) == data
    calls = [link.start(lambda n=n: device.pwrite(block(n), n * BLOCK)) for n in range(64)]
    for call in calls:
        call.result()
    assert disk == b"".join(block(n) for n in range(64))


def test_neither_ring_nor_buffer_overruns(link: Link) -> None:
    """At most what both rings hold is in flight, whatever the depth, and no two requests share a byte of the buffer."""
    link.make(1 << 20)
    for name, size in ((link.req, HEADER_BYTES + 24 * BUFFER_REQUEST_BYTES), (link.resp, HEADER_BYTES + 40 * 16)):
        os.truncate(channel_path(name), size)
    server = link.running(bytearray(SIZE))
    device = link.device(depth=1024)
    server.hold = True
    calls = [link.start(lambda n=n: device.pread(BLOCK, n % 64 * BLOCK)) for n in range(24)]
    eventually(lambda: device.client.in_flight == 16)
    eventually(lambda: len(server._held) == 16)
    spans = sorted((request.buffer_offset, request.length) for request in server._held)
    assert all(a + length <= b for (a, length), (b, _) in zip(spans, spans[1:], strict=False))
    server.hold = False
    for call in calls:
        assert call.result() == bytes(BLOCK)


def test_errors_are_those_of_the_request(link: Link) -> None:
    """1 is EIO, another small status an errno, anything else EIO; the neighbours succeed."""
    statuses = {(0, 3): 1, (0, 5): errno.ENOSPC, (0, 7): 1 << 40, (0, 9): 4096}
    link.running(bytearray(SIZE), fail_blocks=statuses)
    device = link.device()
    for number in range(10):
        if (0, number) not in statuses:
            assert device.pread(BLOCK, number * BLOCK) == bytes(BLOCK)
            continue
        with pytest.raises(OSError) as caught:
            device.pread(BLOCK, number * BLOCK)
        assert caught.value.errno == (errno.ENOSPC if number == 5 else errno.EIO)
    with pytest.raises(OSError):
        device.pwrite(bytes(SIZE), 0)


def test_discards_and_zeros(link: Link) -> None:
    disk = bytearray(b"\xaa" * SIZE)
    server = link.running(disk, max_blocks=8)
    device = link.device()
    device.discard(4 * BLOCK, 20 * BLOCK)
    device.discard(40 * BLOCK, 10 * BLOCK, zero=True)
    expected = bytearray(b"\xaa" * SIZE)
    expected[4 * BLOCK:24 * BLOCK], expected[40 * BLOCK:50 * BLOCK] = bytes(20 * BLOCK), bytes(10 * BLOCK)
    assert disk == expected
    assert [r.length // BLOCK for r in server.requests if r.kind == DISCARD] == [8, 8, 4]
    for offset, length in ((1, BLOCK), (0, 100), (SIZE, BLOCK), (SIZE - BLOCK, 2 * BLOCK)):
        with pytest.raises(UsageError):
            device.discard(offset, length)


def test_two_disks_on_one_connection(link: Link) -> None:
    """Each has its own size, and its requests reach it and no other."""
    disks = [bytearray(SIZE), bytearray(2 * SIZE)]
    link.running(*disks)
    connection = Connection(channels_from_lists(link.req, link.resp, buffer=link.shm, buffer_size="1M")[0], timeout=20)
    link.stack.callback(connection.close)
    devices = [BlockDevice(connection=connection, device=number) for number in (0, 1)]
    assert [device.size for device in devices] == [SIZE, 2 * SIZE]
    calls = [link.start(lambda n=n, m=m: devices[m].pwrite(block(2 * n + m), n * BLOCK)) for n in range(40) for m in (0, 1)]
    for call in calls:
        call.result()
    for m in (0, 1):
        assert disks[m][:40 * BLOCK] == b"".join(block(2 * n + m) for n in range(40))
        assert not any(disks[m][40 * BLOCK:])
    with pytest.raises(UsageError, match="no disk number 2"):
        BlockDevice(connection=connection, device=2)
    with pytest.raises(UsageError, match="has its channels already"):
        BlockDevice(link.req, link.resp, connection=connection)
    devices[1].close()      # the connection is not its own
    assert (devices[0].pread(1, 0), devices[1].pread(1, 0)) == (b"\0", b"\1")


def test_blocks_of_both_sizes_share_a_buffer(link: Link, tmp_path: Path) -> None:
    """A place of one block of 512 bytes does not move those of 4096 bytes from their multiples: a server insists on these,
    and whatever the pattern of places, no two overlap."""
    path = tmp_path / "odd"
    path.write_bytes(bytes(1025 * 512))
    link.make(5 * BLOCK)
    server = link.serve("ram:512K", str(path))
    large = link.device(depth=64)
    small = BlockDevice(connection=large.connection, device=1)
    assert (large.block_size, small.block_size, small.size) == (4096, 512, 1025 * 512)

    def work(number: int) -> None:
        dice, device = random.Random(number), (large, small)[number % 2]
        size, base = device.block_size, number // 2 * (1 << 17)
        model = bytearray(1 << 17)
        for _ in range(60):
            at = dice.randrange((1 << 17) // size) * size
            length = min((1 << 17) - at, dice.randrange(1, 12) * size)
            data = dice.randbytes(length)
            device.pwrite(data, base + at)
            model[at:at + length] = data
            assert device.pread(length, base + at) == data
        assert device.pread(1 << 17, base) == model

    for call in [link.start(lambda n=n: work(n)) for n in range(8)]:
        call.result()
    assert server.exports[0].server.counters["rejected"] == 0


def test_a_disk_that_is_not_there(link: Link) -> None:
    link.running(bytearray(SIZE))
    with pytest.raises(PeerError, match="no disk number 1"):
        link.device(device=1)


@pytest.mark.parametrize(("lies", "what"), [
    ({BLOCK_LENGTH: 1024}, "1024"), ({BLOCK_LENGTH: 8192}, "8192"), ({BLOCK_LENGTH: 0}, "0 bytes"),
    ({BLOCK_LENGTH: (1 << 32) + 512}, "4294967808"), ({MEDIA_BLOCKS: 0}, "no block"),
    ({MEDIA_BLOCKS: 1 << 51}, "nothing can address"), ({MEDIA_BLOCKS: (1 << 52) + 4}, "nothing can address"),
    ({MEDIA_BLOCKS: (1 << 64) - 1}, "nothing can address"), ({MAX_DEVICES: 0}, "0 disks"), ({MAX_DEVICES: 257}, "257"),
    ({MAX_DEVICES: (1 << 64) - 1}, "not 1 to 256"), ({MAX_DEVICES: (1 << 32) + 1}, "4294967297")], ids=str)
def test_geometry_that_cannot_be(link: Link, lies: dict[int, int], what: str) -> None:
    """Sizes that wrap, odd blocks, no disk or too many: refused by name, before anything is asked of it."""
    server = link.running(bytearray(SIZE), lies=lies)
    with pytest.raises(PeerError, match=what):
        link.device()
    assert all(request.kind >= MEDIA_BLOCKS for request in server.requests)


def test_limits_that_are_none(link: Link) -> None:
    """A server that takes no block at a time, and no request, is given one of each."""
    disk = bytearray(SIZE)
    server = link.running(disk, lies={MAX_BLOCKS_COUNT: 0, MAX_REQUESTS: 1}, silent=())
    device = link.device()
    device.pwrite(bytes(range(256)) * 64, 0)
    assert disk[:256 * 64] == bytes(range(256)) * 64
    assert {request.length for request in server.requests if request.kind == BUFFER_WRITE} == {BLOCK}
    assert device.client.depth == 32
    server.hold = True
    calls = [link.start(lambda n=n: device.pread(BLOCK, n * BLOCK)) for n in range(4)]
    eventually(lambda: server._held)
    assert device.client.in_flight == 1
    server.hold = False
    assert [call.result()[:1] for call in calls] == [b"\0"] * 4


def test_asyncio(link: Link) -> None:
    import asyncio

    disk = bytearray(SIZE)
    link.running(disk, block_length=512)

    async def main() -> None:
        async with AsyncBlockDevice(link.req, link.resp, shm=link.shm, timeout=20) as device:
            assert device.block_size == 512
            await asyncio.gather(*(device.pwrite(bytes([n]) * 700, n * 1024) for n in range(20)))
            await device.flush()
            assert await device.pread(700, 1024 * 7) == b"\x07" * 700

    asyncio.run(main())
    assert all(disk[n * 1024:n * 1024 + 700] == bytes([n]) * 700 for n in range(20))


# ------------------------------------------------------------------ lives


def test_nothing_is_asked_before_reset_is_answered(link: Link) -> None:
    """A server that is busy gets Reset again, in a new epoch, and nothing else; the buffer is not touched meanwhile."""
    link.make()
    server = link.plain(bytearray(SIZE))
    with open(channel_path(link.shm), "r+b") as file, mmap.mmap(file.fileno(), 0) as buffer:
        buffer[:] = b"\x77" * len(buffer)
        opening = link.start(link.device)
        epochs = set()
        with open(channel_path(link.req), "rb", buffering=0) as raw:
            def another() -> bool:
                raw.seek(0)
                header = struct.unpack("<8Q", raw.read(64))
                epochs.add(header[1])
                assert header[7] <= 1
                return len(epochs - {0}) >= 3
            eventually(another)
        assert buffer[:] == b"\x77" * len(buffer)
        link.stack.enter_context(server.running())
        device = opening.result()
        assert [request.kind for request in server.requests][0] == RESET
        assert device.pread(BLOCK, 0) == bytes(BLOCK)


def test_a_server_that_returns_is_given_what_it_did_not_answer(link: Link) -> None:
    """Everything in flight is issued again, in its order, under new tags, after Reset; the caller sees nothing of it."""
    disk = bytearray(SIZE)
    server = link.running(disk)
    device = link.device(same_store=True)
    server.hold = True
    writes = [link.start(lambda n=n: device.pwrite(block(n + 1), n * BLOCK)) for n in range(20)]
    eventually(lambda: device.client.in_flight == 20)
    tags = {request.tag for request in server._held}
    reading = link.start(lambda: device.pread(3 * BLOCK, 40 * BLOCK))
    eventually(lambda: device.client.in_flight == 21)
    server.requests.clear()
    server.hold = False
    server.restart()
    for call in writes:
        call.result()
    assert reading.result() == bytes(3 * BLOCK)
    assert disk[:20 * BLOCK] == b"".join(block(n + 1) for n in range(20))
    assert server.requests[0].kind == RESET
    assert not tags & {request.tag for request in server.requests}
    assert device.client.counters["reissued"] >= 1
    assert device.client.counters["lives"] == 2


def test_late_answers_of_a_dead_life_are_ignored(link: Link) -> None:
    """Answers with the old tags, before and after Reset's, end nobody's request."""
    disk = bytearray(b"\x11" * SIZE)
    server = link.running(disk)
    device = link.device(same_store=True)
    server.hold = True
    reading = link.start(lambda: device.pread(BLOCK, 0))
    eventually(lambda: server._held)
    (old,) = server._held
    server.hold = False
    server.restart(*[BufferResponse(old.kind, old.device, old.tag, 0)] * 3)
    assert reading.result() == b"\x11" * BLOCK
    assert device.client.counters["lives"] == 2


def test_another_buffer_is_refused(link: Link) -> None:
    """Nobody says which buffer is meant: what a server reads has to appear in this side's."""
    disk = bytearray(b"\x11" * SIZE)
    link.running(disk)
    other = unique("other")
    with pytest.raises(PeerError, match=f"channel {other}: content is what this side left there") as caught:
        BlockDevice(link.req, link.resp, shm=other, timeout=20)
    assert "name the same buffer on both sides (shm)" in str(caught.value)
    assert disk == b"\x11" * SIZE


def test_a_server_that_returns_with_another_buffer(link: Link) -> None:
    """Is no server of these disks any more: nothing is written, everything fails."""
    disk = bytearray(b"\x11" * SIZE)
    server = link.running(disk)
    device = link.device(same_store=True)
    assert device.pread(BLOCK, 0) == b"\x11" * BLOCK
    server.buffer = memoryview(bytearray(len(server.buffer)))
    server.restart()
    eventually(lambda: device.failure)      # what is sent before it has restarted, that server takes
    with pytest.raises(OSError):
        device.pwrite(block(1), 0)
    assert device.failure is not None and "another buffer" in device.failure
    assert disk == b"\x11" * SIZE


def test_a_first_block_that_cannot_be_read(link: Link) -> None:
    """Tells nothing of the buffer: the next disk is asked, and with none left the server is believed."""
    link.make()
    good = bytearray(b"\x22" * SIZE)
    server = link.running(bytearray(SIZE), good, fail_blocks={(0, 0): errno.EIO})
    with BlockDevice(link.req, link.resp, shm=link.shm, device=1) as device:
        assert device.pread(BLOCK, 0) == b"\x22" * BLOCK
    server.fail_blocks[1, 0] = errno.EIO
    with BlockDevice(link.req, link.resp, shm=link.shm, device=1) as device:
        device.pwrite(block(1), BLOCK)
        assert good[BLOCK:2 * BLOCK] == block(1)


@pytest.mark.parametrize("same", [True, False])
def test_another_disk_is_not_taken_for_the_first(link: Link, same: bool) -> None:
    """A server that proves nothing, or has another geometry: everything fails, nothing is written."""
    disk = bytearray(SIZE)
    server = link.running(disk)
    device = link.device(same_store=same)
    server.disks = [bytearray(SIZE)] if not same else [bytearray(SIZE), bytearray(SIZE)]
    server.restart()
    with pytest.raises(OSError):
        device.pwrite(block(1), 0)
    assert device.failure is not None
    assert ("which store" if not same else "instead of") in device.failure
    assert not any(any(one) for one in server.disks)


def test_a_server_that_goes_while_policies_say_fail(link: Link) -> None:
    """fail: at once, also what is in flight; after its return the device works again, with the buffer all free."""
    disk = bytearray(SIZE)
    server = link.plain(disk)
    with server.running():
        device = link.device(on_peer_loss="fail", same_store=True)
        server.hold = True
        calls = [link.start(lambda n=n: device.pread(BLOCK, n * BLOCK)) for n in range(10)]
        eventually(lambda: device.client.in_flight == 10)
    for call in calls:
        with pytest.raises(OSError):
            call.result()
    server.hold = False
    server.restart()
    link.stack.enter_context(server.running())

    def works() -> bool:
        try:
            return device.pwrite(block(9), 0) == BLOCK
        except OSError:
            return False
    eventually(works)
    assert device.pread(BLOCK, 0) == block(9)


def test_a_server_that_stands_still_is_given_up_after_a_time(link: Link) -> None:
    """timeout: what is not answered fails, the connection begins anew, and no part of the buffer that the old life may
    still fill is used before that life has answered Reset."""
    server = link.running(bytearray(SIZE))
    device = link.device(on_peer_loss="timeout:0.3", same_store=True)
    server.hold = True
    with pytest.raises(OSError):
        device.pread(BLOCK, 0)
    server.hold = False
    eventually(lambda: device.client.state == "ready" and server.resets == 2)
    assert device.pread(BLOCK, 0) == bytes(BLOCK)


def test_ctrl_c_leaves_its_place_in_the_buffer_to_the_request(link: Link) -> None:
    """An interrupted call's memory is let go of; its part of the buffer is not, until it was answered."""
    server = link.running(bytearray(b"\x22" * SIZE))
    device = link.device()
    server.hold = True
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        device.pread(BLOCK, 0)
    timer.join()
    assert device.client.in_flight == 1
    (old,) = server._held
    other = link.start(lambda: device.pread(BLOCK, BLOCK))
    eventually(lambda: len(server._held) == 2)
    assert server._held[1].buffer_offset != old.buffer_offset
    server.hold = False
    assert other.result() == b"\x22" * BLOCK
    eventually(lambda: device.client.in_flight == 0)


def test_answers_that_fit_half(link: Link) -> None:
    """The right tag with another kind or device, other tags, and answers twice: all are counted, none is believed."""

    class Liar(PlainServer):
        def _send(self, answer: BufferResponse) -> None:
            for change in ({"kind": answer.kind ^ 1}, {"kind": 0xFFFF}, {"device": 1}, {"device": 0xFFFF},
                           {"tag": answer.tag ^ 0x80000000}, {"tag": answer.tag + 512 & 0xFFFFFFFF}):
                self._resp.write(answer._replace(status=5, **change).pack())
            super()._send(answer)
            self._resp.write(answer._replace(status=5).pack())

    disk = bytearray(os.urandom(SIZE))
    server = Liar(link.req, link.resp, link.shm, [disk], seed=7, shuffle=5)
    link.stack.callback(server.close)
    link.stack.enter_context(server.running())
    device = link.device(depth=16)
    assert device.pread(SIZE, 0) == disk
    calls = [link.start(lambda n=n: device.pwrite(block(n), n * BLOCK)) for n in range(64)]
    for call in calls:
        call.result()
    assert disk == b"".join(block(n) for n in range(64))
    # 64 KiB are one request; a tag that is no longer in use and one that is in use twice, with other contents. What comes
    # after the last answer is taken by the client's own thread.
    eventually(lambda: device.client.counters["stale"] >= 7 * 68)
    assert device.client.counters["lives"] == 1


def test_a_server_that_does_anything(link: Link) -> None:
    """Headers, answers to what was asked with any status, the buffer: all rewritten at full speed, while threads read and
    write. No byte outside of what they read into changes, every call ends, and an honest server is served afterwards."""
    link.make()
    dice = random.Random(11)
    stop, wrong, calls = threading.Event(), [], [0] * 3
    devices: list[BlockDevice] = []

    def work(number: int) -> None:
        mine = random.Random(number)
        while not stop.is_set():
            if not devices:
                continue
            memory = bytearray(b"\xc5" * (6 * BLOCK))
            length = mine.randrange(1, 5) * BLOCK
            with contextlib.suppress(OSError, UsageError):      # UsageError: closed, for another takes its place
                if mine.random() < 0.5:
                    devices[-1].pread_into(memoryview(memory)[BLOCK:BLOCK + length], mine.randrange(60) * BLOCK)
                else:
                    devices[-1].pwrite(memoryview(memory)[:length], mine.randrange(60) * BLOCK)
            if memory[:BLOCK] + memory[BLOCK + length:] != b"\xc5" * (6 * BLOCK - length):
                wrong.append(bytes(memory))
            calls[number] += 1

    with contextlib.ExitStack() as stack:
        def mapped(name: str) -> memoryview:
            with open(channel_path(name), "r+b") as file:
                return stack.enter_context(memoryview(stack.enter_context(mmap.mmap(file.fileno(), 0))))

        requests, answers, buffer = mapped(link.req), mapped(link.resp), mapped(link.shm)
        words, asked = stack.enter_context(answers[:64].cast("Q")), stack.enter_context(requests[:64].cast("Q"))
        elements, u64 = (len(answers) - 64) // 16, (1 << 64) - 1
        odd = [0, 1, 2, 15, 16, 17, 512, 4096, 1 << 31, 1 << 32, 1 << 52, 1 << 63, u64]
        good = {0: TRANSPORT_ID, 1: 1, 2: BUFFER_PROTOCOL, 3: 16, 4: elements, 5: 0}
        truth = {RESET: 0, MAX_DEVICES: 1, MEDIA_BLOCKS: 64, BLOCK_LENGTH: BLOCK, MAX_BLOCKS_COUNT: 16, MAX_REQUESTS: 64}

        def attack() -> None:
            """As a server does it, but for what it does in between."""
            done = 0
            words[1] = 0
            for field, value in good.items():
                words[field] = value
            words[6] = words[7] = 0
            end = time.monotonic() + 3
            while time.monotonic() < end:
                if dice.random() < 0.001:
                    words[dice.randrange(8)] = dice.choice(odd)
                if dice.random() < 0.002:
                    words[6] = words[7] = 0
                    for field, value in good.items():
                        words[field] = value if field != 1 else dice.getrandbits(63) | 1
                wc = asked[7]
                if done > wc or wc - done > 1022:
                    done = wc
                while done < wc:
                    kind, which, tag = struct.unpack_from("<HHI", requests, 64 + done % 1022 * 32)
                    done += 1
                    status = truth.get(kind, 0)
                    if dice.random() < 0.1:
                        status = dice.choice((1, 5, 28, dice.choice(odd), dice.getrandbits(64)))
                    for _ in range(dice.choice((0, 1, 1, 1, 1, 1, 2))):
                        at = words[7] % elements
                        struct.pack_into("<HHIQ", answers, 64 + at * 16, kind, which, tag ^ (dice.random() < 0.01), status)
                        words[6] = words[7] = (words[7] + 1) & u64
                at = dice.randrange(len(buffer) - 8)
                buffer[at:at + 8] = dice.randbytes(8)
            words[1] = 0

        threads = [link.start(lambda n=n: work(n)) for n in range(3)]
        attacker = link.start(attack)
        given_up = 0
        while not attacker.done():
            if not devices or devices[-1].failure is not None:
                given_up += bool(devices)
                for device in devices:
                    device.close()
                devices.append(link.device(timeout=0, same_store=True, on_peer_loss="timeout:0.2"))
            attacker.done() or time.sleep(0.005)
        attacker.result()
    disk = bytearray(SIZE)
    link.running(disk)
    if devices[-1].failure is not None:
        devices[-1].close()
        devices.append(link.device(timeout=0, same_store=True))
    assert devices[-1].wait_ready(20)
    stop.set()
    for thread in threads:
        thread.result(timeout=20)
    eventually(lambda: devices[-1].client.state == "ready")
    devices[-1].pwrite(block(77), 5 * BLOCK)
    assert devices[-1].pread(BLOCK, 5 * BLOCK) == disk[5 * BLOCK:6 * BLOCK] == block(77)
    assert not wrong and all(count > 10 for count in calls)


def test_lost_answers(link: Link) -> None:
    """Answers that were overwritten before they were read: Reset, and what they would have answered is asked again."""
    disk = bytearray(os.urandom(SIZE))
    server = link.running(disk)
    device = link.device(same_store=True)
    server.hold = True
    calls = [link.start(lambda n=n: device.pread(BLOCK, n * BLOCK)) for n in range(8)]
    eventually(lambda: len(server._held) == 8)
    lost = device.client.counters["overruns"]
    words = server._resp._words
    words[WSC] = words[WC] = server._resp.wc = server._resp.wc + 5000
    eventually(lambda: device.client.counters["overruns"] > lost)
    server.hold = False
    assert [call.result() for call in calls] == [bytes(disk[n * BLOCK:(n + 1) * BLOCK]) for n in range(8)]
    assert device.client.counters["lives"] == 2


# ------------------------------------------------------------------ against muenfast's own server


def test_both_ends_are_muenfast(link: Link, tmp_path: Path) -> None:
    """Geometry, identity and read-only disks come through the bell; the status of both ends tells the buffer."""
    path = tmp_path / "odd"
    path.write_bytes(os.urandom(9 * 512))
    server = link.serve("ram:256K", str(path))
    connection = Connection(channels_from_lists(link.req, link.resp, buffer=link.shm)[0], timeout=20)
    link.stack.callback(connection.close)
    first, second = (BlockDevice(connection=connection, device=number) for number in (0, 1))
    assert [(d.size, d.block_size) for d in (first, second)] == [(256 << 10, 4096), (9 * 512, 512)]
    assert connection.client.store is not None
    second.pwrite(b"end", 9 * 512 - 3)
    second.flush()
    assert path.read_bytes()[-3:] == b"end"
    (entry,) = server.status()
    assert [d["block_size"] for d in entry["devices"]] == [4096, 512]
    assert (entry["shm"], second.status()["shm"], second.status()["number"]) == (link.shm, link.shm, 1)


def test_a_read_only_disk(link: Link, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    link.serve(str(path), read_only="yes")
    device = link.device()
    assert device.read_only
    with pytest.raises(OSError) as caught:
        device.pwrite(block(1), 0)
    assert caught.value.errno == errno.EROFS


def test_kill_9_of_the_server_under_load(link: Link, tmp_path: Path) -> None:
    """It comes back, several times; every write that returned is on the disk, and none of it twice at the wrong time."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    server = link.program(str(disk))
    device = link.device(depth=64)
    stop, done = threading.Event(), [0] * 4

    def work(number: int) -> None:
        dice = random.Random(number)
        at = {}
        while not stop.is_set():
            where = dice.randrange(16) * 4 + number
            value = dice.getrandbits(63)
            device.pwrite(block(value), where * BLOCK)
            at[where] = value
            assert device.pread(BLOCK, where * BLOCK) == block(value)
            done[number] += 1
        device.flush()
        for where, value in at.items():
            assert disk.read_bytes()[where * BLOCK:(where + 1) * BLOCK] == block(value)

    calls = [link.start(lambda n=n: work(n)) for n in range(4)]
    for _ in range(5):
        before = list(done)
        eventually(lambda: all(a > b + 20 for a, b in zip(done, before, strict=True)))
        server.end(signal.SIGKILL)
        server = link.program(str(disk))
    before = list(done)
    eventually(lambda: all(a > b + 20 for a, b in zip(done, before, strict=True)))
    stop.set()
    for call in calls:
        call.result()
    assert device.client.counters["lives"] == 6
    assert device.client.in_flight == 0


def test_the_buffer_is_truncated_and_given_back(link: Link) -> None:
    """Both sides see it, wait for the memory, map it anew, and everything goes on with what it was to be."""
    link.make()
    link.serve("ram:256K")
    device = link.device()
    device.pwrite(block(1), 0)
    os.truncate(channel_path(link.shm), 0)
    call = link.start(lambda: [device.pwrite(block(n), n * BLOCK) for n in range(8)])
    eventually(lambda: device.client.broken == "buffer")
    os.truncate(channel_path(link.shm), 1 << 20)
    try:
        call.result(timeout=20)
    except OSError as error:    # the server found it broken first, and said so
        assert error.errno == errno.EIO
    eventually(lambda: device.client.broken is None and device.client.state == "ready", 30)
    device.pwrite(block(7), 7 * BLOCK)
    assert device.pread(BLOCK, 7 * BLOCK) == block(7)


def test_inline_and_buffer_side_by_side(link: Link, names: Callable[[str], str]) -> None:
    req, resp = names("inline"), names("inline")
    lists = {"buffer": f",{link.shm}", "buffer_size": ",1M"}
    with BlockServer(exports_from_lists(f"{req},{link.req}", f"{resp},{link.resp}", device="ram:64K,ram:128K", **lists)), \
            BlockClients(channels_from_lists(f"{req},{link.req}", f"{resp},{link.resp}", **lists),
                         attach="none") as clients:
        assert clients.ready(lambda: True)
        assert [disk.device.size for disk in clients.disks] == [64 << 10, 128 << 10]
        for disk in clients.disks:
            disk.device.pwrite(b"hello", 4090)
            assert disk.device.pread(5, 4090) == b"hello"
        with pytest.raises(UsageError):
            clients.disks[0].device.discard(0, BLOCK)


def test_a_disk_without_a_client() -> None:
    """What Python can make of the type is none, and says so."""
    none = Disk()
    for call in (none.sync, lambda: none.read(0, 0), lambda: none.move(True, 0, b""), lambda: none.discard(0, 0)):
        with pytest.raises(UsageError, match="made by its client"):
            call()


def test_numbers_of_disks(names: Callable[[str], str]) -> None:
    """Inline channels have one; a number is none that is negative or no number."""
    with pytest.raises(UsageError, match="number 0"):
        BlockDevice(names("a"), names("b"), device=1)
    for number in (-1, "0", 0.5):
        with pytest.raises(UsageError, match="numbered from 0"):
            BlockDevice(names("a"), names("b"), device=number)  # type: ignore[arg-type]


def test_the_server_joins_what_is_neighbours(link: Link, tmp_path: Path) -> None:
    """Pieces that continue each other on the disk do so in the buffer: the server makes one operation of them."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    server = link.serve(str(path))
    device = link.device(depth=64)
    data = os.urandom(1 << 20)
    offsets = [n * BLOCK for n in range(256)]
    for _ in range(20):
        device.pwrite_many(offsets, data)
        found = bytearray(1 << 20)
        device.pread_many(offsets, found)
        assert found == data
    assert path.read_bytes() == data
    counters = server.exports[0].server.counters
    assert counters["reads"] - 1 == counters["writes"] == 20 * 256     # one to see that the buffer is the same
    assert counters["merged"] > 20 * 256        # of twice as many


def test_another_store_is_not_taken_for_the_first(link: Link) -> None:
    """Several disks have one identity: of other ones nothing is written."""
    server = link.serve("ram:256K", "ram:64K")
    first = link.device()
    second = BlockDevice(connection=first.connection, device=1)
    second.pwrite(block(3), 0)
    server.close()
    link.serve("ram:256K", "ram:64K")
    with pytest.raises(OSError):
        second.pwrite(block(4), 0)
    assert "another store" in (second.failure or "")
    with pytest.raises(OSError):
        first.pread(1, 0)


def test_discards_reach_the_store(link: Link, tmp_path: Path) -> None:
    """A discard is one, and where the store's read as zeros, so are zeros; of a kind that promises nothing they are
    written; a read-only disk refuses."""
    path = tmp_path / "disk"
    path.write_bytes(b"\xaa" * (1 << 20))
    server = link.serve(str(path))
    device = link.device()
    before = os.stat(path).st_blocks
    device.discard(0, 1 << 19)
    device.discard(1 << 19, 1 << 18, zero=True)
    assert os.stat(path).st_blocks <= before - (3 << 18) // 512
    assert device.pread(1 << 20, 0) == bytes(3 << 18) + b"\xaa" * (1 << 18)
    counters = server.exports[0].server.counters
    assert counters["discards"] == 2 and counters["writes"] == 0
    assert device.target.zeroes and device.target.discards
    device.close()
    with pytest.raises(UsageError, match="closed"):
        device.discard(0, BLOCK)


def test_a_promise_of_zeros_is_kept(link: Link) -> None:
    """What was discarded of the first server's disk read as zeros. A later one promises nothing: zeros are written."""
    link.make()
    link.serve("ram:256K").close()
    server = link.serve("ram:256K")
    device = link.device(same_store=True)
    device.pwrite(b"\xaa" * SIZE, 0)
    assert device.target.zeroes
    server.close()
    disk = bytearray(b"\xaa" * SIZE)
    plain = link.running(disk)
    device.discard(BLOCK, 2 * BLOCK, zero=True)
    device.discard(5 * BLOCK, BLOCK)
    assert disk == b"\xaa" * BLOCK + bytes(2 * BLOCK) + b"\xaa" * (2 * BLOCK) + bytes(BLOCK) + b"\xaa" * (SIZE - 6 * BLOCK)
    assert not any(request.kind == DISCARD for request in plain.requests)
