"""muenfast.AsyncBlockDevice: the awaitable calls, against muenfast's server in the same process."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator

import pytest

from muenfast import AsyncBlockDevice, BlockServer, UsageError, exports_from_lists
from muenfast._target import Completions, Memory

SIZE = 1 << 20


@pytest.fixture
def pair(names: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Names of the channels of a served RAM disk."""
    req, resp = names("req"), names("resp")
    with BlockServer(exports_from_lists(req, resp, device=f"ram:{SIZE}")):
        yield req, resp


def test_calls_of_many_tasks_are_in_flight_together(pair: tuple[str, str]) -> None:
    """200 tasks write and read their own ranges at odd offsets; each finds what it wrote."""
    async def work() -> None:
        async with AsyncBlockDevice(*pair) as disk:
            assert disk.size == SIZE
            dice = random.Random(1)
            pieces = [(i * 5000, dice.randbytes(5000)) for i in range(200)]
            await asyncio.gather(*(disk.pwrite(data, at) for at, data in pieces))
            await disk.flush()
            found = await asyncio.gather(*(disk.pread(5000, at) for at, _ in pieces))
            assert found == [data for _, data in pieces]

    asyncio.run(work())


def test_whole_blocks_land_in_the_callers_buffer(pair: tuple[str, str]) -> None:
    """pread_into fills a slice of a larger buffer and nothing else of it."""
    async def work() -> None:
        async with AsyncBlockDevice(*pair) as disk:
            data = os.urandom(16384)
            assert await disk.pwrite(data, 8192) == 16384
            buffer = bytearray(b"x" * 32768)
            assert await disk.pread_into(memoryview(buffer)[4096:20480], 8192) == 16384
            assert buffer == b"x" * 4096 + data + b"x" * 12288
            assert await disk.pread(0, 5) == b""

    asyncio.run(work())


def test_a_child_of_fork_leaves_it_alone(pair: tuple[str, str]) -> None:
    async def work() -> None:
        async with AsyncBlockDevice(*pair) as disk:
            await disk.pwrite(b"P" * 4096, 0)
            child = os.fork()
            if child == 0:
                try:
                    disk.pwrite(b"C" * 4096, 0).send(None)
                    os._exit(1)
                except UsageError as error:
                    os._exit(0 if "forked" in str(error) else 2)
            assert os.waitpid(child, 0)[1] == 0
            assert await disk.pread(4096, 0) == b"P" * 4096

    asyncio.run(work())


def test_a_request_beyond_the_disk_is_a_usage_error(pair: tuple[str, str]) -> None:
    """And so is a device that was closed or never entered."""
    async def work() -> None:
        disk = AsyncBlockDevice(*pair)
        with pytest.raises(UsageError):
            await disk.pread(1, 0)
        async with disk:
            for offset, length in ((SIZE, 1), (-1, 1), (0, SIZE + 1)):
                with pytest.raises(UsageError):
                    await disk.pread(length, offset)
            assert await disk.pread(1, SIZE - 1) == b"\0"
        with pytest.raises(UsageError):
            await disk.flush()

    asyncio.run(work())


def test_what_is_outstanding_at_the_end_fails(names: Callable[[str], str]) -> None:
    """The server has gone; requests wait for it until the device is closed, then they fail with EIO."""
    req, resp = names("req"), names("resp")

    async def work() -> None:
        server = BlockServer(exports_from_lists(req, resp, device=f"ram:{SIZE}"))
        async with AsyncBlockDevice(req, resp) as disk:
            await disk.pwrite(b"1", 0)
            await asyncio.to_thread(server.close)
            calls = [asyncio.create_task(disk.pread(4096, i * 4096)) for i in range(50)]
            done, _ = await asyncio.wait(calls, timeout=0.3)
            assert not done
        for call in calls:
            with pytest.raises(OSError):
                await call

    asyncio.run(work())


def test_a_cancelled_call_leaves_the_device_usable(names: Callable[[str], str]) -> None:
    """Its answer comes later and is dropped."""
    req, resp = names("req"), names("resp")

    async def work() -> None:
        server = BlockServer(exports_from_lists(req, resp, device=f"null:{SIZE}"))
        async with AsyncBlockDevice(req, resp, same_store=True) as disk:
            await asyncio.to_thread(server.close)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.pread(4096, 0), 0.2)
            again = await asyncio.to_thread(BlockServer, exports_from_lists(req, resp, device=f"null:{SIZE}"))
            assert await asyncio.wait_for(disk.pread(4096, 4096), 20) == bytes(4096)
            await asyncio.to_thread(again.close)

    asyncio.run(work())


def test_completions_hold_the_buffer_until_they_are_collected() -> None:
    """A bytearray in flight cannot be resized; afterwards it can."""
    memory = Memory(16)
    queue = Completions(memory)
    data = bytearray(b"a" * 4096)
    key = queue.submit("write", 3, data)
    with pytest.raises(BufferError):
        data.append(1)
    with pytest.raises(UsageError):
        queue.close()
    assert queue.collect() == [(key, 0)] and queue.outstanding == 0
    data.append(1)
    found = bytearray(8192)
    keys = [queue.submit("read", 3, memoryview(found)[:4096]), queue.submit("sync", 0),
            queue.submit("read", 3, memoryview(found)[4096:])]
    end = time.monotonic() + 5
    ended: list[tuple[int, int]] = []
    while len(ended) < 3 and time.monotonic() < end:
        ended += queue.collect()
    assert ended == [(key, 0) for key in keys] and found == b"a" * 8192
    for block, buffer in ((16, bytes(4096)), (-1, bytes(4096)), (0, bytes(4095)), (0, b"")):
        with pytest.raises(UsageError):
            queue.submit("write", block, buffer)
    queue.close()
    with pytest.raises(UsageError):
        queue.submit("sync", 0)


def test_discards(names: Callable[[str], str]) -> None:
    """Of whole blocks, over a buffer only; zeros are read afterwards where they were asked for."""
    async def work() -> None:
        async with AsyncBlockDevice(*lists, shm=buffer) as disk:
            await disk.pwrite(b"\xaa" * SIZE, 0)
            await asyncio.gather(disk.discard(0, 8 * 4096), disk.discard(SIZE // 2, 4096, zero=True))
            await disk.discard(4096, 0)
            content = await disk.pread(SIZE, 0)
            assert content == (bytes(8 * 4096) + b"\xaa" * (SIZE // 2 - 8 * 4096) + bytes(4096)
                               + b"\xaa" * (SIZE // 2 - 4096))
            for offset, length in ((1, 4096), (0, 4095), (SIZE, 4096), (-4096, 4096)):
                with pytest.raises(UsageError):
                    await disk.discard(offset, length)
        async with AsyncBlockDevice(*inline) as disk:
            with pytest.raises(UsageError, match="inline"):
                await disk.discard(0, 4096)

    lists, buffer, inline = (names("req"), names("resp")), names("buffer"), (names("req2"), names("resp2"))
    with BlockServer(exports_from_lists(*(f"{a},{b}" for a, b in zip(lists, inline, strict=True)), buffer=f"{buffer},",
                                        device=f"ram:{SIZE},ram:{SIZE}")):
        asyncio.run(work())


def test_a_request_is_of_a_known_kind() -> None:
    """A word that means nothing begins nothing."""
    completions = Completions(Memory(16))
    for kind, more in (("trim", {}), ("", {}), ("read", {"buffer": bytearray(100)}), ("write", {"buffer": b""})):
        with pytest.raises(UsageError):
            completions.submit(kind, 0, **more)
    assert completions.outstanding == 0
    completions.close()
