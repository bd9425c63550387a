"""Plain SHMStream v2 peers, block peers inline and with a shared buffer, from the protocol text alone.

They share no code with muenfast, so that agreement between the two means something. Header
fields are read and written through a native 64-bit view: one access each, in program order, which
x86-64 keeps.
All timeouts are seconds; all sizes and offsets are bytes unless a name says otherwise.
"""

from __future__ import annotations

import abc
import enum
import errno
import mmap
import os
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

TRANSPORT_ID = 0x487312B6B79A9B6D
HEADER_BYTES = 64
U64 = (1 << 64) - 1
POLL_SECONDS = 0.0002

# Header fields as indices of 64-bit words.
TRANSPORT, EPOCH, PROTOCOL, SIZE, ELEMENTS, RESERVED, WSC, WC = range(8)

REQUEST_PROTOCOL = 0x9570208DCA77DB19
RESPONSE_PROTOCOL = 0x9851BE3282FEF0DC
INLINE_REGION_BYTES = 0x100000
BLOCK_BYTES = 4096
SECTOR_BYTES = 512

READ, WRITE, COMMAND = 0, 1, 2
COMMAND_SYNC, COMMAND_SIZE = 0, 1

BUFFER_PROTOCOL = 0x5155684453516F3D
BUFFER_REQUEST_REGION_BYTES = 0x8000
BUFFER_RESPONSE_REGION_BYTES = 0x4000
BUFFER_BYTES = 16 << 20

# Kinds of requests beside a shared buffer.
NONE, BUFFER_READ, BUFFER_WRITE, DISCARD, SYNC, GET_SMART = range(6)
MEDIA_BLOCKS, BLOCK_LENGTH = 0x10, 0x11
MAX_REQUESTS, MAX_BLOCKS_COUNT, MAX_DEVICES = 0x19, 0x1A, 0x1B
RESET = 0x1F


class Result(str, enum.Enum):
    """What one read of a channel found; members equal their names as strings."""

    INACTIVE = "INACTIVE"
    INCOMPATIBLE_INTERFACE = "INCOMPATIBLE_INTERFACE"
    EPOCH_CHANGED = "EPOCH_CHANGED"
    NO_DATA = "NO_DATA"
    OVERRUN_DETECTED = "OVERRUN_DETECTED"
    SUCCESS = "SUCCESS"


def channel_path(path_or_name: str) -> str:
    """Path of a channel: anything with a slash is a path already, else a shared memory name."""
    return path_or_name if "/" in path_or_name else f"/dev/shm/{path_or_name}"


def _expired(deadline: float) -> bool:
    return time.monotonic() >= deadline


class _Mapping:
    """A mapped region with its header as 64-bit words."""

    def __init__(self, fd: int, prot: int) -> None:
        self._map = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=prot)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[:HEADER_BYTES].cast("Q")

    @property
    def region_size(self) -> int:
        return len(self._map)

    def close(self) -> None:
        """Unmap; the header stays as it is, like that of a peer that died."""
        self._words.release()
        self._bytes.release()
        self._map.close()


class ChannelWriter(_Mapping):
    """The writing end of a channel of `size`-byte packets; inactive until activate().

    A missing or empty region is given `region_size` bytes; an existing one keeps its own size.
    `epoch` fixes the epoch of every activation (Muen's peers use 1); None takes a random one.
    """

    def __init__(
        self,
        path_or_name: str,
        size: int,
        protocol: int,
        region_size: int = INLINE_REGION_BYTES,
        epoch: int | None = None,
    ) -> None:
        fd = os.open(channel_path(path_or_name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size == 0:
                os.ftruncate(fd, region_size)
            super().__init__(fd, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        self.size = size
        self.elements = (self.region_size - HEADER_BYTES) // size
        self.protocol = protocol
        self.wc = 0
        self._epoch = epoch
        self._last_epoch = self._words[EPOCH]
        if self.elements < 1:
            self.close()
            raise ValueError(f"no {size}-byte packet fits {path_or_name}")

    @property
    def active(self) -> bool:
        """Whether the region is active, be it by this writer or a predecessor."""
        return self._words[EPOCH] != 0

    def activate(self, epoch: int | None = None) -> int:
        """Start (or restart) the channel empty; returns the epoch it got."""
        if epoch is None:
            epoch = self._epoch
        while epoch is None:
            choice = random.randint(1, U64)
            epoch = choice if choice != self._last_epoch else None
        if epoch == 0:
            raise ValueError("epoch 0 means inactive")
        words = self._words
        words[EPOCH] = 0
        self._bytes[HEADER_BYTES:] = bytes(self.region_size - HEADER_BYTES)
        words[TRANSPORT] = TRANSPORT_ID
        words[PROTOCOL] = self.protocol
        words[SIZE] = self.size
        words[ELEMENTS] = self.elements
        words[RESERVED] = 0
        words[WSC] = words[WC] = self.wc = 0
        words[EPOCH] = self._last_epoch = epoch
        return epoch

    def deactivate(self) -> None:
        self._words[EPOCH] = 0

    def write(self, packet: bytes) -> None:
        self.write_many([packet])

    def write_many(self, packets: Sequence[bytes]) -> None:
        """Publish all packets at once; at most `elements` of them, each exactly `size` bytes."""
        if not self.active:
            raise RuntimeError("write to an inactive channel")
        if not 1 <= len(packets) <= self.elements or any(len(p) != self.size for p in packets):
            raise ValueError("wrong number or size of packets")
        target = (self.wc + len(packets)) & U64
        self._words[WSC] = target
        for i, packet in enumerate(packets):
            slot = HEADER_BYTES + ((self.wc + i) & U64) % self.elements * self.size
            self._bytes[slot : slot + self.size] = packet
        self._words[WC] = self.wc = target


class ChannelReader(_Mapping):
    """A reading end: maps read-only and trusts no field of the header twice.

    Opening waits up to `timeout` for a region that can hold a header. `size`, when given, is the
    only packet size accepted. `lost` counts the packets that overruns cost.
    """

    def __init__(
        self, name: str, protocol: int, size: int | None = None, *, timeout: float = 5.0
    ) -> None:
        fd = self._open(channel_path(name), timeout)
        try:
            super().__init__(fd, mmap.PROT_READ)
        finally:
            os.close(fd)
        self.protocol = protocol
        self.expected_size = size
        self.rc = 0
        self.lost = 0
        self.synced_wc = 0  # WC found by the last synchronisation
        self._epoch = 0  # 0: not synchronised
        self._size = 0
        self._elements = 0

    @staticmethod
    def _open(path: str, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                pass
            else:
                if os.fstat(fd).st_size >= HEADER_BYTES:
                    return fd
                os.close(fd)
            if _expired(deadline):
                raise TimeoutError(f"no channel at {path}")
            time.sleep(POLL_SECONDS)

    @property
    def active(self) -> bool:
        return self._words[EPOCH] != 0

    @property
    def synchronised(self) -> bool:
        return self._epoch != 0

    def _synchronise(self) -> Result:
        words = self._words
        self._epoch = 0
        epoch = words[EPOCH]
        if epoch == 0:
            return Result.INACTIVE
        transport, protocol = words[TRANSPORT], words[PROTOCOL]
        size, elements = words[SIZE], words[ELEMENTS]
        synced_wc = words[WC]
        if words[EPOCH] != epoch:
            return Result.EPOCH_CHANGED  # still unsynchronised: the next read tries again
        if (
            transport != TRANSPORT_ID
            or protocol != self.protocol
            or not size
            or not elements
            or self.expected_size not in (None, size)
            or HEADER_BYTES + size * elements > self.region_size
        ):
            return Result.INCOMPATIBLE_INTERFACE
        self._epoch, self._size, self._elements = epoch, size, elements
        self.rc, self.synced_wc = 0, synced_wc
        return Result.EPOCH_CHANGED

    def _overrun(self) -> tuple[Result, None]:
        wc = self._words[WC]
        if self._words[EPOCH] != self._epoch or wc < self.rc:
            return self._synchronise(), None
        self.lost += wc - self.rc
        self.rc = wc
        return Result.OVERRUN_DETECTED, None

    def read(self) -> tuple[Result, bytes | None]:
        """The next packet, or why there is none; never blocks."""
        words = self._words
        if self._epoch == 0 or words[EPOCH] != self._epoch:
            return self._synchronise(), None
        wc = words[WC]
        if wc < self.rc:
            return self._synchronise(), None
        if wc == self.rc:
            return Result.NO_DATA, None
        if wc - self.rc > self._elements:
            return self._overrun()
        slot = HEADER_BYTES + self.rc % self._elements * self._size
        packet = bytes(self._bytes[slot : slot + self._size])
        if (words[WSC] - self.rc) & U64 > self._elements:
            return self._overrun()
        if words[EPOCH] != self._epoch:
            return self._synchronise(), None
        self.rc = (self.rc + 1) & U64
        return Result.SUCCESS, packet

    def drain(self) -> None:
        """Skip to WC, synchronising first where needed; skipped packets are not lost ones."""
        if self._epoch == 0 or self._words[EPOCH] != self._epoch:
            self._synchronise()
        if self._epoch:
            self.rc = self._words[WC]


class Event(NamedTuple):
    """One inline block event; the same 4120 bytes are a request and a response."""

    kind: int
    error: int
    id: int
    valid: int
    priv: int
    data: bytes = b""

    def pack(self) -> bytes:
        if len(self.data) > BLOCK_BYTES:
            raise ValueError("an event carries at most one block")
        return _EVENT.pack(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> Event:
        return cls(*_EVENT.unpack(raw))


_EVENT = struct.Struct("<IiQII4096s")  # short data is zero-padded
EVENT_BYTES = _EVENT.size
_SIZE_DATA = struct.Struct("<Q")


class InlineClient:
    """A first-generation block client.

    Keeping at most `elements` (254) requests outstanding is up to the caller: the channels do not.
    """

    def __init__(
        self,
        req: str,
        resp: str,
        req_protocol: int = REQUEST_PROTOCOL,
        resp_protocol: int = RESPONSE_PROTOCOL,
        *,
        region_size: int = INLINE_REGION_BYTES,
        epoch: int | None = None,
        timeout: float = 5.0,
    ) -> None:
        self.size_sectors = 0
        self.timeout = timeout  # of the convenience calls
        self._resp_name = resp
        self._resp_protocol = resp_protocol
        self._resp: ChannelReader | None = None
        self._req = ChannelWriter(req, EVENT_BYTES, req_protocol, region_size, epoch)
        self._next_priv = random.getrandbits(32)
        self._backlog: deque[Event] = deque()

    def connect(self, timeout: float = 5.0) -> int:
        """Activate, ask for the size and wait for it; returns `size_sectors` (of 512 bytes)."""
        deadline = time.monotonic() + timeout
        self._backlog.clear()
        self._req.activate()
        priv = self.request(COMMAND, COMMAND_SIZE)
        if self._resp is None:
            self._resp = ChannelReader(
                self._resp_name, self._resp_protocol, EVENT_BYTES, timeout=timeout
            )
        while True:
            result, raw = self._resp.read()
            if raw is not None:
                answer = Event.unpack(raw)
                if (answer.kind, answer.id, answer.priv) == (COMMAND, COMMAND_SIZE, priv):
                    return self._take_size(answer)
            if _expired(deadline):
                raise TimeoutError(f"no size from the server ({result.value})")
            if result is not Result.SUCCESS:
                time.sleep(POLL_SECONDS)

    def request(
        self, kind: int, id: int, data: bytes = b"", valid: int = 1, priv: int | None = None
    ) -> int:
        """Send one request without waiting; returns its priv (a fresh one unless given)."""
        if priv is None:
            priv = self._next_priv
            self._next_priv = (priv + 1) & 0xFFFFFFFF
        self._req.write(Event(kind, 0, id, valid, priv, data).pack())
        return priv

    def wait_response(self, timeout: float = 5.0) -> Event:
        """The next response, whatever it answers, in the order of arrival.

        Raises TimeoutError, ConnectionResetError when the server went or restarted, and
        RuntimeError when responses were overwritten before they were read.
        """
        if self._backlog:
            return self._backlog.popleft()
        return self._receive(time.monotonic() + timeout)

    def read(self, block: int) -> bytes:
        return self._call(READ, block).data

    def write(self, block: int, data: bytes) -> None:
        if len(data) != BLOCK_BYTES:
            raise ValueError("a write takes exactly one block")
        self._call(WRITE, block, data)

    def sync(self) -> None:
        self._call(COMMAND, COMMAND_SYNC)

    def size(self) -> int:
        """Ask for the device size again, in 512-byte sectors."""
        return self._take_size(self._call(COMMAND, COMMAND_SIZE))

    def disconnect(self) -> None:
        self._req.deactivate()

    def close(self) -> None:
        """Unmap without disconnecting, like a client that died; call disconnect() to be polite."""
        self._req.close()
        if self._resp is not None:
            self._resp.close()

    def _receive(self, deadline: float) -> Event:
        if self._resp is None:
            raise RuntimeError("not connected")
        while True:
            result, raw = self._resp.read()
            if raw is not None:
                return Event.unpack(raw)
            if result is Result.OVERRUN_DETECTED:
                raise RuntimeError(f"{self._resp.lost} responses lost")
            if result is not Result.NO_DATA:
                raise ConnectionResetError(f"the server has gone ({result.value})")
            if _expired(deadline):
                raise TimeoutError("no response")
            time.sleep(POLL_SECONDS)

    def _call(self, kind: int, id: int, data: bytes = b"") -> Event:
        """One request and its own answer; answers to others wait for wait_response()."""
        deadline = time.monotonic() + self.timeout
        priv = self.request(kind, id, data)
        while True:
            answer = self._receive(deadline)
            if (answer.kind, answer.id, answer.priv) != (kind, id, priv):
                self._backlog.append(answer)
                if _expired(deadline):
                    raise TimeoutError("no response among many others")
                continue
            if answer.error:
                code = abs(answer.error)
                raise OSError(code, os.strerror(code))
            return answer

    def _take_size(self, answer: Event) -> int:
        if answer.error:
            raise OSError(abs(answer.error), "the server refused to tell its size")
        self.size_sectors = _SIZE_DATA.unpack_from(answer.data)[0]
        return self.size_sectors


class _Served(abc.ABC):
    """What a server that is driven by step() can do besides."""

    _resp: ChannelWriter

    @abc.abstractmethod
    def step(self) -> bool:
        """Handles what is there now; False when idle."""

    def serve(self, stop: threading.Event) -> None:
        """step() until `stop` is set, then deactivate."""
        while not stop.is_set():
            if not self.step():
                time.sleep(POLL_SECONDS)
        self._resp.deactivate()

    @contextmanager
    def running(self) -> Iterator[Self]:
        """serve() in a thread for the length of the block."""
        stop = threading.Event()
        thread = threading.Thread(target=self.serve, args=(stop,), name=type(self).__name__)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()


class InlineServer(_Served):
    """A first-generation block server on `disk`, one connection state per step().

    shuffle: answers held back and released in random order (0: in order); `seed` decides.
    fail_blocks: error by block for its reads and writes, which then do nothing.
    fixed_epoch: every activation has epoch 1, as Muen's peers do it.
    unknown: that many answers per connection with a priv nobody used, each before a genuine one.
    stale: that many answers per connection are sent twice; the client must not reuse privs at once.
    """

    def __init__(
        self,
        req: str,
        resp: str,
        disk: bytearray,
        req_protocol: int = REQUEST_PROTOCOL,
        resp_protocol: int = RESPONSE_PROTOCOL,
        *,
        region_size: int = INLINE_REGION_BYTES,
        shuffle: int = 0,
        seed: int = 0,
        fail_blocks: Mapping[int, int] | None = None,
        fixed_epoch: bool = False,
        unknown: int = 0,
        stale: int = 0,
    ) -> None:
        self.disk = disk
        self.blocks = len(disk) // BLOCK_BYTES
        self.fail_blocks = dict(fail_blocks or {})
        self.syncs = 0
        self.answered: list[Event] = []  # genuine answers in the order sent, without their data
        self._req_name = req
        self._req_protocol = req_protocol
        self._req: ChannelReader | None = None
        self._resp = ChannelWriter(
            resp, EVENT_BYTES, resp_protocol, region_size, 1 if fixed_epoch else None
        )
        self._random = random.Random(seed)
        self._shuffle = shuffle
        self._unknown = unknown
        self._stale = stale
        self._unknown_left = 0
        self._stale_left = 0
        self._window: list[Event] = []
        self._privs: set[int] = set()
        # Requests below _void may have been done by a predecessor. That cannot be once this server
        # has seen the request channel idle or start anew.
        self._watched = False
        self._void = 0

    def step(self) -> bool:
        """Handle what is there now, at most one ring of requests; False when idle."""
        if self._req is None and not self._open_request():
            self._request_gone()
            return False
        assert self._req is not None
        for count in range(self._resp.elements):
            position = self._req.rc
            result, raw = self._req.read()
            if raw is not None:
                self._handle(Event.unpack(raw), position)
            elif result is Result.EPOCH_CHANGED:
                if self._req.synchronised:
                    self._connected()
            elif result is Result.OVERRUN_DETECTED:
                continue
            elif result is Result.NO_DATA:
                self._release(0)
                return count > 0
            else:
                self._request_gone()
                return False
        return True

    @property
    def connected(self) -> bool:
        return self._resp.active

    def close(self) -> None:
        """Unmap without deactivating, like a server that died; serve() deactivates at its end."""
        self._resp.close()
        if self._req is not None:
            self._req.close()

    def _open_request(self) -> bool:
        try:
            self._req = ChannelReader(self._req_name, self._req_protocol, EVENT_BYTES, timeout=0)
        except TimeoutError:
            return False
        return True

    def _request_gone(self) -> None:
        self._watched = True
        self._window.clear()
        if self._resp.active:
            self._resp.deactivate()

    def _connected(self) -> None:
        """A new request epoch: forget the old one's work and begin a response epoch."""
        assert self._req is not None
        self._void = 0 if self._watched else self._req.synced_wc
        self._watched = True
        self._window.clear()
        self._privs.clear()
        self._unknown_left, self._stale_left = self._unknown, self._stale
        self._resp.activate()

    def _handle(self, request: Event, position: int) -> None:
        self._privs.add(request.priv)
        if position < self._void and (request.kind, request.id) != (COMMAND, COMMAND_SIZE):
            return
        self._window.append(self._execute(request))
        self._release(self._shuffle)

    def _execute(self, request: Event) -> Event:
        if request.valid != 1:
            return request._replace(error=-errno.EINVAL)
        if request.kind == COMMAND:
            if request.id == COMMAND_SIZE:
                sectors = self.blocks * (BLOCK_BYTES // SECTOR_BYTES)
                return request._replace(error=0, data=_SIZE_DATA.pack(sectors))
            if request.id == COMMAND_SYNC:
                self.syncs += 1
                return request._replace(error=0)
            return request._replace(error=-errno.EINVAL)
        if request.kind not in (READ, WRITE):
            return request._replace(error=-errno.EINVAL)
        if request.id in self.fail_blocks:
            return request._replace(error=self.fail_blocks[request.id])
        if request.id >= self.blocks:
            return request._replace(error=-errno.EIO)
        at = slice(request.id * BLOCK_BYTES, (request.id + 1) * BLOCK_BYTES)
        if request.kind == READ:
            return request._replace(error=0, data=bytes(self.disk[at]))
        self.disk[at] = request.data
        return request._replace(error=0)

    def _release(self, keep: int) -> None:
        """Send answers until at most `keep` are held back."""
        while len(self._window) > keep:
            which = self._random.randrange(len(self._window)) if self._shuffle else 0
            self._send(self._window.pop(which))

    def _send(self, answer: Event) -> None:
        if self._unknown_left:
            self._unknown_left -= 1
            priv = self._random.getrandbits(32)
            while priv in self._privs:
                priv = self._random.getrandbits(32)
            self._resp.write(answer._replace(priv=priv, data=b"\xee" * BLOCK_BYTES).pack())
        raw = answer.pack()
        self._resp.write(raw)
        if self._stale_left:
            self._stale_left -= 1
            self._resp.write(raw)
        self.answered.append(answer._replace(data=b""))


class BufferRequest(NamedTuple):
    """One request of the shared-buffer transport."""

    kind: int
    device: int = 0
    tag: int = 0
    length: int = 0
    device_offset: int = 0
    buffer_offset: int = 0

    def pack(self) -> bytes:
        return _BUFFER_REQUEST.pack(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> BufferRequest:
        return cls(*_BUFFER_REQUEST.unpack(raw))


class BufferResponse(NamedTuple):
    """Its answer."""

    kind: int
    device: int
    tag: int
    status: int

    def pack(self) -> bytes:
        return _BUFFER_RESPONSE.pack(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> BufferResponse:
        return cls(*_BUFFER_RESPONSE.unpack(raw))


class BufferDevice(NamedTuple):
    """What a device of a connection says of itself."""

    blocks: int
    block_length: int
    max_blocks: int


_BUFFER_REQUEST = struct.Struct("<HHIQQQ")
_BUFFER_RESPONSE = struct.Struct("<HHIQ")
BUFFER_REQUEST_BYTES = _BUFFER_REQUEST.size
BUFFER_RESPONSE_BYTES = _BUFFER_RESPONSE.size


def _map_buffer(path_or_name: str, size: int) -> mmap.mmap:
    """A buffer; a missing or empty one is given `size` bytes."""
    fd = os.open(channel_path(path_or_name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, size)
        return mmap.mmap(fd, 0)
    finally:
        os.close(fd)


class BufferClient:
    """A second-generation block client, starting up as Muen's does.

    Keeping at most as many requests outstanding as either ring holds is up to the caller, and so
    is which part of `buffer` belongs to which of them. `idle` is called while waiting.
    """

    def __init__(
        self,
        req: str,
        resp: str,
        buffer: str,
        req_protocol: int = BUFFER_PROTOCOL,
        resp_protocol: int = BUFFER_PROTOCOL,
        *,
        request_region: int = BUFFER_REQUEST_REGION_BYTES,
        buffer_size: int = BUFFER_BYTES,
        epoch: int | None = None,
        timeout: float = 5.0,
        idle: Callable[[], object] = lambda: time.sleep(POLL_SECONDS),
    ) -> None:
        self.timeout = timeout
        self.devices: list[BufferDevice] = []
        self._idle = idle
        self._resp_name = resp
        self._resp_protocol = resp_protocol
        self._resp: ChannelReader | None = None
        self._map = _map_buffer(buffer, buffer_size)
        self.buffer = memoryview(self._map)
        self._req = ChannelWriter(req, BUFFER_REQUEST_BYTES, req_protocol, request_region, epoch)
        self._next_tag = random.getrandbits(32)

    @property
    def ring(self) -> ChannelWriter:
        """The request channel."""
        return self._req

    def connect(self) -> list[BufferDevice]:
        """A life's beginning: activate, drain, wait, Reset, ask for every device's geometry."""
        deadline = time.monotonic() + self.timeout
        self._req.activate()
        if self._resp is None:
            self._resp = ChannelReader(
                self._resp_name, self._resp_protocol, BUFFER_RESPONSE_BYTES, timeout=self.timeout
            )
        while True:
            self._resp.drain()
            if self._resp.synchronised:
                break
            if _expired(deadline):
                raise TimeoutError("the response channel stays inactive")
            self._idle()
        self.call(RESET)
        count = self.call(MAX_DEVICES)
        self.devices = [
            BufferDevice(
                self.call(MEDIA_BLOCKS, device),
                self.call(BLOCK_LENGTH, device),
                self.call(MAX_BLOCKS_COUNT, device),
            )
            for device in range(count)
        ]
        return self.devices

    def tag(self) -> int:
        """A tag of its own."""
        self._next_tag = (self._next_tag + 1) & 0xFFFFFFFF
        return self._next_tag

    def send(self, *requests: BufferRequest) -> None:
        """Publish all requests at once, as they are."""
        self._req.write_many([request.pack() for request in requests])

    def poll(self) -> BufferResponse | None:
        """The next response that is there, whatever it answers.

        Raises ConnectionResetError when the server went or restarted, and RuntimeError when
        responses were overwritten before they were read.
        """
        if self._resp is None:
            raise RuntimeError("not connected")
        result, raw = self._resp.read()
        if raw is not None:
            return BufferResponse.unpack(raw)
        if result is Result.OVERRUN_DETECTED:
            raise RuntimeError(f"{self._resp.lost} responses lost")
        if result is not Result.NO_DATA:
            raise ConnectionResetError(f"the server has gone ({result.value})")
        return None

    def answers(self, count: int) -> list[BufferResponse]:
        """The next `count` responses; raises TimeoutError, and what poll() raises."""
        deadline = time.monotonic() + self.timeout
        found: list[BufferResponse] = []
        while len(found) < count:
            answer = self.poll()
            if answer is not None:
                found.append(answer)
                continue
            if _expired(deadline):
                raise TimeoutError(f"{len(found)} of {count} responses")
            self._idle()
        return found

    def call(
        self,
        kind: int,
        device: int = 0,
        length: int = 0,
        device_offset: int = 0,
        buffer_offset: int = 0,
    ) -> int:
        """The status that answers one request; answers to others are dropped."""
        request = BufferRequest(kind, device, self.tag(), length, device_offset, buffer_offset)
        self.send(request)
        while True:
            (answer,) = self.answers(1)
            if answer[:3] == request[:3]:
                return answer.status

    def read(self, device: int, device_offset: int, length: int, at: int = 0) -> bytes:
        """Through the buffer's bytes from `at` on."""
        self._succeed(self.call(BUFFER_READ, device, length, device_offset, at))
        return bytes(self.buffer[at : at + length])

    def write(self, device: int, device_offset: int, data: bytes, at: int = 0) -> None:
        self.buffer[at : at + len(data)] = data
        self._succeed(self.call(BUFFER_WRITE, device, len(data), device_offset, at))

    def discard(self, device: int, device_offset: int, length: int) -> None:
        self._succeed(self.call(DISCARD, device, length, device_offset))

    def sync(self, device: int) -> None:
        self._succeed(self.call(SYNC, device))

    def disconnect(self) -> None:
        self._req.deactivate()

    def close(self) -> None:
        """Unmap without disconnecting, like a client that died; call disconnect() to be polite."""
        self._req.close()
        if self._resp is not None:
            self._resp.close()
        self.buffer.release()
        self._map.close()

    @staticmethod
    def _succeed(status: int) -> None:
        if status:
            raise OSError(status, f"status {status}")


class BufferServer(_Served):
    """A server of the shared-buffer transport on `disks`, device 0 first; one look per step().

    block_length: of every device. silent: kinds that get no answer, as Muen's server leaves None and
    Max_Requests. shuffle: answers held back and released in random order (0: in order); `seed`
    decides. fail_blocks: status by (device, block) for reads and writes that touch it. unknown: that
    many answers with a tag nobody used, each before a genuine one. stale: that many answers are sent
    twice. fixed_epoch: epoch 1. lies: answers to queries, by kind. The response channel keeps its
    epoch while clients come and go.
    """

    def __init__(
        self,
        req: str,
        resp: str,
        buffer: str,
        disks: Sequence[bytearray],
        req_protocol: int = BUFFER_PROTOCOL,
        resp_protocol: int = BUFFER_PROTOCOL,
        *,
        buffer_size: int = BUFFER_BYTES,
        block_length: int = BLOCK_BYTES,
        max_blocks: int = 256,
        silent: Sequence[int] = (NONE, MAX_REQUESTS),
        shuffle: int = 0,
        seed: int = 0,
        fail_blocks: Mapping[tuple[int, int], int] | None = None,
        unknown: int = 0,
        stale: int = 0,
        fixed_epoch: bool = False,
        lies: Mapping[int, int] | None = None,
    ) -> None:
        self._lies = dict(lies or {})
        self.disks = disks
        self._map = _map_buffer(buffer, buffer_size)
        self.buffer = memoryview(self._map)
        self.block_length = block_length
        self.max_blocks = max_blocks
        self.fail_blocks = dict(fail_blocks or {})
        self.requests: list[BufferRequest] = []  # in the order in which they were handled
        self.syncs = self.resets = 0
        self.hold = False  # whether reads, writes, discards and syncs are neither done nor answered
        self._req_name = req
        self._req_protocol = req_protocol
        self._req: ChannelReader | None = None
        self._silent = frozenset(silent)
        self._random = random.Random(seed)
        self._shuffle = shuffle
        self._unknown = unknown
        self._stale = stale
        self._window: list[BufferResponse] = []
        self._held: list[BufferRequest] = []
        self._tags: set[int] = set()
        self._watched = False
        self._void = 0
        self._restart = False
        self._strays: list[BufferResponse] = []
        self._resp = ChannelWriter(
            resp,
            BUFFER_RESPONSE_BYTES,
            resp_protocol,
            BUFFER_RESPONSE_REGION_BYTES,
            1 if fixed_epoch else None,
        )
        self._resp.activate()

    def step(self) -> bool:
        """Handle what is there now, at most one ring of requests; False when idle."""
        if self._restart:
            self._begin_anew()
        if self._req is None and not self._open_request():
            self._watched = True
            return False
        assert self._req is not None
        if not self.hold and self._held:
            held, self._held = self._held, []
            for request in held:
                self._answer(request)
        for count in range(self._resp.elements):
            position = self._req.rc
            result, raw = self._req.read()
            if raw is not None:
                self._handle(BufferRequest.unpack(raw), position)
            elif result is Result.EPOCH_CHANGED:
                if self._req.synchronised:
                    self._void = 0 if self._watched else self._req.synced_wc
                    self._watched = True
                    self._window.clear()
                    self._held.clear()
            elif result is Result.OVERRUN_DETECTED:
                continue
            elif result is Result.NO_DATA:
                self._release(0)
                return count > 0
            else:
                self._watched = True
                self._window.clear()
                self._held.clear()
                return False
        return True

    def restart(self, *strays: BufferResponse) -> None:
        """Before its next look, as another life of the server would begin: a new response epoch,
        nothing known of requests. The answers `strays` come after that to Reset."""
        self._strays = list(strays)
        self._restart = True

    def _begin_anew(self) -> None:
        self._restart = False
        self._window.clear()
        self._held.clear()
        self._watched = False
        if self._req is not None:
            self._req.close()
            self._req = None
        self._resp.activate()

    def close(self) -> None:
        """Unmap without deactivating, like a server that died; serve() deactivates at its end."""
        self._resp.close()
        self.buffer.release()
        self._map.close()
        if self._req is not None:
            self._req.close()

    def _open_request(self) -> bool:
        try:
            self._req = ChannelReader(self._req_name, self._req_protocol, BUFFER_REQUEST_BYTES, timeout=0)
        except TimeoutError:
            return False
        return True

    def _handle(self, request: BufferRequest, position: int) -> None:
        self._tags.add(request.tag)
        if position < self._void and request.kind < MEDIA_BLOCKS:
            return
        if request.kind == RESET:
            self._window.clear()
            self._held.clear()
        if self.hold and request.kind <= SYNC:
            self._held.append(request)
            return
        self._answer(request)

    def _answer(self, request: BufferRequest) -> None:
        self.requests.append(request)
        if request.kind in self._silent:
            return
        self._window.append(BufferResponse(*request[:3], self._execute(request)))
        self._release(self._shuffle)
        if request.kind == RESET:
            for stray in self._strays:
                self._resp.write(stray.pack())

    def _execute(self, request: BufferRequest) -> int:
        if request.kind in self._lies:
            return self._lies[request.kind]
        exists = request.device < len(self.disks)
        if request.kind == RESET:
            self.resets += 1
        if request.kind == SYNC:
            self.syncs += 1
        if request.kind in (RESET, NONE, SYNC):
            return 0 if exists else 1
        if not exists:
            return 0 if request.kind >= GET_SMART else 1
        disk = self.disks[request.device]
        answers = {
            GET_SMART: 0,
            MEDIA_BLOCKS: len(disk) // self.block_length,
            BLOCK_LENGTH: self.block_length,
            MAX_REQUESTS: self._resp.elements,
            MAX_BLOCKS_COUNT: self.max_blocks,
            MAX_DEVICES: len(self.disks),
        }
        if request.kind in answers:
            return answers[request.kind]
        if request.kind not in (BUFFER_READ, BUFFER_WRITE, DISCARD):
            return 1
        at, length, place = request.device_offset, request.length, request.buffer_offset
        if (at | length) % self.block_length or not 0 < length <= self.max_blocks * self.block_length:
            return 1
        if at + length > len(disk):
            return 1
        first = at // self.block_length
        for block in range(first, first + length // self.block_length):
            if (request.device, block) in self.fail_blocks:
                return self.fail_blocks[request.device, block]
        if request.kind == DISCARD:
            disk[at : at + length] = bytes(length)
            return 0
        if place % self.block_length or place + length > len(self.buffer):
            return 1
        if request.kind == BUFFER_READ:
            self.buffer[place : place + length] = disk[at : at + length]
        else:
            disk[at : at + length] = self.buffer[place : place + length]
        return 0

    def _release(self, keep: int) -> None:
        """Send answers until at most `keep` are held back."""
        while len(self._window) > keep:
            which = self._random.randrange(len(self._window)) if self._shuffle else 0
            self._send(self._window.pop(which))

    def _send(self, answer: BufferResponse) -> None:
        if self._unknown:
            self._unknown -= 1
            tag = self._random.getrandbits(32)
            while tag in self._tags:
                tag = self._random.getrandbits(32)
            self._resp.write(answer._replace(tag=tag).pack())
        raw = answer.pack()
        self._resp.write(raw)
        if self._stale:
            self._stale -= 1
            self._resp.write(raw)
