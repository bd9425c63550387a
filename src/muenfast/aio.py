"""A disk at the other end of a block connection, for asyncio: no thread per request, none blocked."""

from __future__ import annotations

import asyncio
import os
from types import TracebackType
from typing import Any

from muenfast._target import Completions
from muenfast.disk import BlockDevice
from muenfast.errors import UsageError


class AsyncBlockDevice:
    """A BlockDevice whose calls are awaited; its arguments are BlockDevice's.

        async with muenfast.AsyncBlockDevice(req="a", resp="c") as disk:
            await disk.pwrite(b"hello", 0)
            await disk.flush()
            assert await disk.pread(5, 0) == b"hello"

    Requests of any number of tasks are in flight together. One event loop. A cancelled call goes on in the engine: its
    buffer must not be touched before the device is closed. Whole blocks (block_size) in the caller's buffer are not
    copied here.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._arguments, self._named = arguments, named
        self._device: BlockDevice | None = None
        self._calls: dict[int, asyncio.Future[int]] = {}
        self._rmw = asyncio.Lock()

    async def __aenter__(self) -> AsyncBlockDevice:
        if self._device is not None:
            raise UsageError("an AsyncBlockDevice is entered once")
        self._process = os.getpid()
        self._device = await asyncio.to_thread(BlockDevice, *self._arguments, **self._named)
        self._device.client.background = True
        self._completions = Completions(self._device.target)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._completions.fileno(), self._collect)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.close()

    @property
    def block_size(self) -> int:
        """Bytes of a block of the disk."""
        return self._open().block_size

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._open().size

    def _open(self) -> BlockDevice:
        if self._device is None:
            raise UsageError("this device is not open; use it as `async with AsyncBlockDevice(...) as disk`")
        if os.getpid() != self._process:
            raise UsageError("this device belongs to the process that was forked; open one of your own")
        return self._device

    def _collect(self) -> None:
        for key, error in self._completions.collect():
            call = self._calls.pop(key)
            if not call.done():
                call.set_result(error)

    async def _run(self, kind: str, block: int, buffer: Any = None, *, nblocks: int = 0) -> None:
        self._open()
        key = self._completions.submit(kind, block, buffer, nblocks=nblocks)
        call = self._calls[key] = self._loop.create_future()
        error = await call
        if error:
            raise OSError(-error, os.strerror(-error))

    def _span(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UsageError(f"bytes {offset} to {offset + length} reach beyond the disk's {self.size}")

    async def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from byte `offset` on. Raises UsageError (beyond the disk), OSError."""
        self._span(offset, length)
        data = bytearray(length)
        await self.pread_into(data, offset)
        return bytes(data)

    async def pread_into(self, buffer: Any, offset: int) -> int:
        """Fills a writable buffer from byte `offset` on; returns its length."""
        # Views are left to the collector: one of a cancelled call is in use until its answer has come.
        view = memoryview(buffer).cast("B")
        length = len(view)
        self._span(offset, length)
        size = self.block_size
        if offset % size == 0 and length % size == 0:
            if length:
                await self._run("read", offset // size, view)
        elif length:
            first, last = offset // size, (offset + length - 1) // size
            whole = bytearray((last - first + 1) * size)
            await self._run("read", first, whole)
            start = offset - first * size
            view[:] = memoryview(whole)[start:start + length]
        return length

    async def pwrite(self, data: Any, offset: int) -> int:
        """Writes a buffer from byte `offset` on; returns its length. See BlockDevice.pwrite."""
        view = memoryview(data).cast("B")
        length = len(view)
        self._span(offset, length)
        size = self.block_size
        if offset % size == 0 and length % size == 0:
            if length:
                await self._run("write", offset // size, view)
        elif length:
            first, last = offset // size, (offset + length - 1) // size
            whole = bytearray((last - first + 1) * size)
            async with self._rmw:
                await self._run("read", first, whole)
                start = offset - first * size
                whole[start:start + length] = view
                await self._run("write", first, whole)
        return length

    async def discard(self, offset: int, length: int, *, zero: bool = False) -> None:
        """Frees `length` bytes from byte `offset` on; see BlockDevice.discard."""
        self._span(offset, length)
        disk, size = self._open().target, self.block_size
        if not disk.discards:
            raise UsageError("inline channels cannot express a discard",
                             hint="a connection with a shared buffer (shm) can")
        if offset % size or length % size:
            raise UsageError(f"what is discarded is made of blocks of {size} bytes",
                             value=f"{length} bytes from {offset} on")
        block, end = offset // size, (offset + length) // size
        while block != end:
            count = min(end - block, 0xffffffff)
            await self._run("zero" if zero and not disk.zeroes else "discard", block, nblocks=count)
            block += count

    async def flush(self) -> None:
        """Returns when every write that returned before is durable in the store. Raises OSError."""
        await self._run("sync", 0)

    async def close(self) -> None:
        """Leaves; what is outstanding fails. May be called twice."""
        device, self._device = self._device, None
        if device is None:
            return
        await asyncio.to_thread(device.close)
        self._loop.remove_reader(self._completions.fileno())
        self._collect()
        self._completions.close()
