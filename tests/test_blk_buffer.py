"""The shared-buffer server's engine against the independent plain client, step by step and without threads where order
matters."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hostile import fenced
from peer import (
    BLOCK_LENGTH,
    BUFFER_PROTOCOL,
    BUFFER_READ,
    BUFFER_REQUEST_BYTES,
    BUFFER_RESPONSE_BYTES,
    BUFFER_WRITE,
    DISCARD,
    EPOCH,
    GET_SMART,
    HEADER_BYTES,
    MAX_BLOCKS_COUNT,
    MAX_DEVICES,
    MAX_REQUESTS,
    MEDIA_BLOCKS,
    NONE,
    RESET,
    SYNC,
    WC,
    WSC,
    BufferClient,
    BufferDevice,
    BufferRequest,
    BufferResponse,
    ChannelWriter,
    Event,
)
from vectors_loader import BufferVector, buffer_vectors

from muenfast import UsageError
from muenfast._buffer import BufferServer, identity_of
from muenfast._ring import bell_state
from muenfast._store import Store

KIB, U64 = 1024, (1 << 64) - 1
Status = tuple[int, int]  # tag, status


class Rig:
    """A server over memory of files, which runs only when told; its clients."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.stack = ExitStack()
        self.events: list[str] = []
        self.server: BufferServer | None = None
        self.clients = 0

    def memory(self, name: str, size: int) -> mmap.mmap:
        """A region of that name, made where it is missing."""
        fd = os.open(self.place / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size == 0:
                os.ftruncate(fd, size)
            return mmap.mmap(fd, 0)
        finally:
            os.close(fd)

    def serve(self, *stores: Store, request: int = 0x8000, response: int = 0x4000, buffer: int = 256 * KIB,
              **more: Any) -> BufferServer:
        """Begins a server's life; an earlier one has been closed, or died."""
        memory = [self.memory(name, size) for name, size in (("req", request), ("resp", response), ("buf", buffer))]
        server = BufferServer(*memory, stores, **more)
        self.server = server
        self.stack.callback(server.close)
        return server

    def step(self) -> None:
        """The server does all that there is to do."""
        assert self.server is not None
        while (event := self.server.run(0)) != "tick":
            self.events.append(event)

    def client(self, connect: bool = True, **more: Any) -> BufferClient:
        client = BufferClient(*(str(self.place / name) for name in ("req", "resp", "buf")), idle=self.step,
                              **{"timeout": 20, **more})
        self.stack.callback(client.close)
        if connect:
            client.connect()
        return client

    def epoch(self) -> int:
        """The response channel's."""
        with open(self.place / "resp", "rb") as file:
            return struct.unpack("<8Q", file.read(64))[EPOCH]  # type: ignore[no-any-return]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    place = tmp_path / "regions"
    place.mkdir()
    rig = Rig(place)
    with rig.stack:
        yield rig


def ram(size: int, fill: int = 0) -> tuple[Store, bytearray]:
    """A RAM disk, and its bytes."""
    memory = bytearray([fill]) * size
    return Store.in_memory(memory), memory


@pytest.fixture
def new_file(tmp_path: Path) -> Iterator[Callable[..., tuple[Store, Path]]]:
    """Makes stores in files of random bytes, which are closed at the end."""
    with ExitStack() as stack:
        def make(size: int, *, read_only: bool = False, **more: Any) -> tuple[Store, Path]:
            path = tmp_path / f"disk{random.getrandbits(64):x}"
            path.write_bytes(random.randbytes(size))
            fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return Store.in_file(fd, size, read_only=read_only, **more), path

        yield make


def statuses(answers: Sequence[BufferResponse]) -> list[Status]:
    return [(answer.tag, answer.status) for answer in answers]


# ------------------------------------------------------------------ good requests


@pytest.mark.parametrize("vector", buffer_vectors(), ids=lambda v: v.name)
def test_buffer_vectors(rig: Rig, vector: BufferVector) -> None:
    """The bytes of each hand-written request get the hand-written answer, and change what they say and nothing else."""
    disks = [bytearray(content) for content in vector.devices]
    rig.serve(*map(Store.in_memory, disks), buffer=len(vector.buffer))
    client = rig.client(buffer_size=len(vector.buffer))
    client.buffer[:] = vector.buffer
    request = BufferRequest(*struct.unpack("<HHIQQQ", vector.request))
    assert (request._asdict(), request.pack()) == (vector.request_fields, vector.request)
    client.send(request)
    (answer,) = client.answers(1)
    assert answer._asdict() == vector.response_fields
    assert answer == BufferResponse.unpack(vector.response)
    expected = [bytearray(content) for content in vector.devices]
    buffer = bytearray(vector.buffer)
    for effect in vector.effects:
        target = buffer if effect.where == "buffer" else expected[int(effect.where.removeprefix("device "))]
        target[effect.offset:effect.offset + effect.bytes] = bytes([effect.fill]) * effect.bytes
    assert (disks, bytes(client.buffer)) == (expected, bytes(buffer))


def test_a_client_like_muens_learns_every_device(rig: Rig, new_file: Callable[..., tuple[Store, Path]]) -> None:
    """Start-up gives each device's geometry: 512-byte blocks where 4096 do not fit, none beyond the end."""
    rig.serve(ram(64 * KIB)[0], new_file(9 * 512)[0], Store.null(1 << 40), new_file(64 * KIB, block_size=512)[0])
    assert rig.client(connect=False).connect() == [
        BufferDevice(16, 4096, 64), BufferDevice(9, 512, 512), BufferDevice(1 << 28, 4096, 64),
        BufferDevice(128, 512, 512)]
    assert rig.events == ["connected"]


@pytest.mark.parametrize("seed", range(3))
def test_every_byte_is_where_a_model_has_it(rig: Rig, new_file: Callable[..., tuple[Store, Path]], seed: int) -> None:
    """Batches of random requests, merged or not, overlapping or not, on RAM and files: disks and buffer hold after each
    batch, byte for byte, what executing them one by one would have left."""
    dice = random.Random(seed)
    memory = bytearray(dice.randbytes(128 * KIB))
    file, path = new_file(100 * 512)
    server = rig.serve(Store.in_memory(memory), file, buffer=64 * KIB)
    client = rig.client()
    models, blocks = [bytearray(memory), bytearray(path.read_bytes())], [4096, 512]
    buffer = bytearray(dice.randbytes(64 * KIB))
    client.buffer[:] = buffer
    for _ in range(150):
        requests: list[BufferRequest] = []
        for tag in range(dice.randrange(1, 80)):
            unit = blocks[device := dice.randrange(2)]
            length = unit * dice.choice((1, 1, 1, 2, 7))
            last = requests[-1] if requests else None
            if last is not None and dice.random() < 0.6:     # a neighbour, where there is room
                device, unit = last.device, blocks[last.device]
                length = unit
                at, into = last.device_offset + last.length, last.buffer_offset + last.length
                if at + length <= len(models[device]) and into + length <= len(buffer):
                    requests.append(BufferRequest(last.kind, device, tag, length, at, into))
                    continue
            at = unit * dice.randrange((len(models[device]) - length) // unit + 1)
            into = unit * dice.randrange((len(buffer) - length) // unit + 1)
            kind = dice.choice((BUFFER_READ, BUFFER_READ, BUFFER_WRITE, BUFFER_WRITE, DISCARD, SYNC))
            requests.append(BufferRequest(kind, device, tag, length, at, into))
        client.send(*requests)
        assert sorted(statuses(client.answers(len(requests)))) == [(r.tag, 0) for r in requests]
        for r in requests:
            disk = slice(r.device_offset, r.device_offset + r.length)
            part = slice(r.buffer_offset, r.buffer_offset + r.length)
            if r.kind == BUFFER_READ:
                buffer[part] = models[r.device][disk]
            elif r.kind == BUFFER_WRITE:
                models[r.device][disk] = buffer[part]
            elif r.kind == DISCARD:
                models[r.device][disk] = bytes(r.length)
        assert bytes(client.buffer) == bytes(buffer)
        assert [bytes(memory), path.read_bytes()] == [bytes(model) for model in models]
    assert server.counters["merged"] > 100 and server.counters["rejected"] == server.counters["failed"] == 0


def test_neighbours_become_one_operation(rig: Rig, new_file: Callable[..., tuple[Store, Path]]) -> None:
    """64 requests that continue one another on disk and in the buffer are one, of RAM those of 16 KiB; a step of either
    ends the run."""
    server = rig.serve(new_file(1 << 20)[0], ram(1 << 20)[0], buffer=1 << 20)
    client = rig.client()

    def merged(*requests: BufferRequest) -> int:
        before = server.counters
        client.send(*requests)
        assert sorted(statuses(client.answers(len(requests)))) == [(r.tag, 0) for r in requests]
        after = server.counters
        assert after["batches"] == before["batches"] + 1
        return after["merged"] - before["merged"]

    def run(kind: int, count: int, device: int = 0, disk: int = 4096, buffer: int = 4096) -> list[BufferRequest]:
        return [BufferRequest(kind, device, i, 4096, i * disk, i * buffer) for i in range(count)]

    for device, joined in ((0, 63), (1, 48)):
        assert merged(*run(BUFFER_READ, 64, device)) == joined
        assert merged(*run(BUFFER_WRITE, 64, device)) == joined
        assert merged(*run(BUFFER_READ, 20, device, disk=8192)) == 0
        assert merged(*run(BUFFER_READ, 20, device, buffer=8192)) == 0
        assert merged(*run(BUFFER_WRITE, 20, device, buffer=-4096 & U64)[:1]) == 0
        assert merged(*run(DISCARD, 20, device, buffer=12345)) == 19
    assert merged(BufferRequest(BUFFER_READ, 0, 0, 4096, 0, 0), BufferRequest(BUFFER_READ, 1, 1, 4096, 4096, 4096)) == 0
    assert merged(BufferRequest(BUFFER_READ, 0, 0, 4096, 0, 0), BufferRequest(BUFFER_WRITE, 0, 1, 4096, 4096, 4096)) == 0


def test_a_wrong_request_among_neighbours_is_answered_alone(rig: Rig) -> None:
    """One that runs over the end of the disk does not spoil those before it."""
    disk = ram(64 * KIB, 7)
    rig.serve(disk[0])
    client = rig.client()
    client.send(*(BufferRequest(BUFFER_READ, 0, i, 4096, 56 * KIB + i * 4096, i * 4096) for i in range(4)))
    assert statuses(client.answers(4)) == [(0, 0), (1, 0), (2, errno.EINVAL), (3, errno.EINVAL)]
    assert bytes(client.buffer[:12 * KIB]) == b"\7" * 8 * KIB + bytes(4 * KIB)


def test_what_cannot_be_done_together_is_done_one_by_one(rig: Rig, tmp_path: Path) -> None:
    """A file that was cut short behind the server's back: only the requests that miss their bytes fail."""
    path = tmp_path / "short"
    path.write_bytes(b"x" * 64 * KIB)
    with path.open("r+b") as file:
        server = rig.serve(Store.in_file(file.fileno(), 64 * KIB))
        client = rig.client()
        os.truncate(path, 8 * KIB)
        client.send(*(BufferRequest(BUFFER_READ, 0, i, 4096, i * 4096, i * 4096) for i in range(4)))
        assert statuses(client.answers(4)) == [(0, 0), (1, 0), (2, errno.EIO), (3, errno.EIO)]
        assert bytes(client.buffer[:8 * KIB]) == b"x" * 8 * KIB
        assert server.counters["failed"] == 2


def test_equal_tags_are_all_answered(rig: Rig) -> None:
    """A tag is the client's business: the same one ten times gets ten answers."""
    rig.serve(ram(64 * KIB)[0])
    client = rig.client()
    client.send(*[BufferRequest(BUFFER_READ, 0, 5, 4096, 0, 4096)] * 5, *[BufferRequest(BLOCK_LENGTH, 0, 5)] * 5)
    assert statuses(client.answers(10)) == [(5, 0)] * 5 + [(5, 4096)] * 5
    rig.step()
    assert client.poll() is None


def test_a_full_response_ring_is_not_overrun(rig: Rig) -> None:
    """A client that keeps at most Max_Requests in flight loses no answer, although the request ring holds more."""
    rig.serve(ram(64 * KIB)[0], response=HEADER_BYTES + 8 * BUFFER_RESPONSE_BYTES)
    client = rig.client()
    assert client.call(MAX_REQUESTS) == 8
    for start in range(0, 800, 8):
        client.send(*(BufferRequest(BUFFER_READ, 0, start + i, 4096, 4096 * i, 0) for i in range(8)))
        rig.step()
        assert statuses(client.answers(8)) == [(start + i, 0) for i in range(8)]


def test_discarded_bytes_are_zero_and_freed(rig: Rig, new_file: Callable[..., tuple[Store, Path]]) -> None:
    """RAM gives its pages back, a file gets a hole; both read as zeros there, and keep what is around it."""
    size = 4 << 20
    anonymous = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anonymous[:] = b"a" * size
    file, path = new_file(size)
    before, content = path.stat().st_blocks, path.read_bytes()
    rig.serve(Store.in_memory(anonymous, anonymous=True), file, buffer=size)
    client = rig.client()
    for device in (0, 1):
        client.discard(device, 8192, size - 12288)
    resident = resident_pages(anonymous)
    assert bytes(anonymous) == b"a" * 8192 + bytes(size - 12288) + b"a" * 4096
    assert path.read_bytes() == content[:8192] + bytes(size - 12288) + content[-4096:]
    assert resident <= 4 and path.stat().st_blocks < before // 2


def resident_pages(memory: mmap.mmap) -> int:
    """Pages of private memory that are backed by some."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        entries = struct.unpack(f"<{len(memory) // mmap.PAGESIZE}Q", file.read(len(memory) // mmap.PAGESIZE * 8))
    return sum(entry >> 62 != 0 for entry in entries)


def test_a_discard_between_pages_zeroes_just_its_bytes(rig: Rig) -> None:
    """Blocks of 512 bytes in memory that can be given back by pages only."""
    size = 16 * 4096 + 512
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rig.serve(Store.in_memory(memory, anonymous=True))
    client = rig.client()
    for start, length in ((512, 512), (512, 4096), (3584, 512), (3584, 1024), (4096, 4096), (3584, 9216), (512, 65536)):
        memory[:] = b"m" * size
        client.discard(0, start, length)
        assert memory[:] == b"m" * start + bytes(length) + b"m" * (size - start - length)


@pytest.mark.root
def test_a_block_device_is_asked_to_discard(rig: Rig, tmp_path: Path, loop_device: Callable[[Path], str]) -> None:
    """A loop device of a kernel that can makes a hole in its file; one that cannot says so, and nothing is lost. It has no
    SMART data."""
    path = tmp_path / "image"
    path.write_bytes(b"i" * (1 << 20))
    name = loop_device(path)
    able = int(Path(f"/sys/block/{Path(name).name}/queue/discard_max_bytes").read_text()) != 0
    fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    try:
        rig.serve(Store.in_file(fd, 1 << 20))
        client = rig.client()
        assert client.call(GET_SMART, 0, 0, 0, 4096) == 0
        assert not any(client.buffer)
        assert client.call(DISCARD, 0, 131072, 65536) == (0 if able else errno.EOPNOTSUPP)
        gone = bytes(131072) if able else b"i" * 131072
        assert client.read(0, 61440, 139264) == b"i" * 4096 + gone + b"i" * 4096
        client.sync(0)
    finally:
        os.close(fd)


@pytest.fixture
def loop_device() -> Iterator[Callable[[Path], str]]:
    """Attaches loop devices to files; detached at the end."""
    with ExitStack() as stack:
        def attach(path: Path) -> str:
            name = subprocess.run(["losetup", "--find", "--show", path], check=True, capture_output=True, text=True)
            stack.callback(subprocess.run, ["losetup", "--detach", name.stdout.strip()], check=True)
            return name.stdout.strip()

        yield attach


def test_where_nothing_can_be_discarded_it_is_an_error(rig: Rig) -> None:
    """A file whose contents are sealed refuses holes, writes and nothing else."""
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, b"s" * 64 * KIB)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        server = rig.serve(Store.in_file(fd, 64 * KIB))
        client = rig.client()
        assert client.call(DISCARD, 0, 4096) == errno.EPERM
        assert client.call(BUFFER_WRITE, 0, 4096) == errno.EPERM
        assert client.read(0, 0, 4096) == b"s" * 4096
        assert server.counters["failed"] == 2
    finally:
        os.close(fd)


def test_a_sync_that_fails_says_so(rig: Rig) -> None:
    """Status 1, for the device whose flush failed only."""
    read_end, write_end = os.pipe()
    try:
        rig.serve(Store.in_file(write_end, 64 * KIB), ram(64 * KIB)[0])     # a pipe cannot be synchronised
        client = rig.client()
        assert [client.call(SYNC, device) for device in (0, 1, 2)] == [1, 0, 1]
    finally:
        os.close(read_end)
        os.close(write_end)


def test_read_only_and_null_disks(rig: Rig, new_file: Callable[..., tuple[Store, Path]]) -> None:
    """A read-only device refuses writes and discards and is read; a null disk reads zeros and forgets."""
    file, path = new_file(64 * KIB, read_only=True)
    rig.serve(Store.in_memory(bytes(64 * KIB), read_only=True), file, Store.null(64 * KIB))
    client = rig.client()
    for device in (0, 1):
        assert client.call(BUFFER_WRITE, device, 4096) == client.call(DISCARD, device, 4096) == errno.EROFS
        assert client.call(SYNC, device) == 0
    assert client.read(1, 4096, 8192) == path.read_bytes()[4096:12288]
    client.write(2, 0, b"n" * 4096)
    client.discard(2, 0, 4096)
    assert client.read(2, 0, 4096) == bytes(4096)


# ------------------------------------------------------------------ wrong requests

DISK, BUFFER = 64 * KIB, 256 * KIB


@pytest.mark.parametrize("kind", [BUFFER_READ, BUFFER_WRITE, DISCARD])
@pytest.mark.parametrize(("length", "device_offset", "buffer_offset"), [
    (0, 0, 0), (0, DISK, BUFFER), (1, 0, 0), (4095, 0, 0), (4097, 0, 0), (512, 0, 0), (4096, 1, 0), (4096, 512, 0),
    (4096, DISK, 0), (8192, DISK - 4096, 0), (DISK + 4096, 0, 0), (4096, U64 - 4095, 0), (8192, U64 - 4095, 0),
    (U64 - 4095, 4096, 4096), (U64 - 4095, 8192, 8192), (1 << 63, 1 << 63, 0), (4096, 1 << 63, 0), (BUFFER + 4096, 0, 0),
    (U64, 0, 0), (4096, U64, 0), (4096, DISK + 4096, 0)])
def test_ranges_outside_the_device_are_refused(rig: Rig, kind: int, length: int, device_offset: int,
                                               buffer_offset: int) -> None:
    """Whatever is not whole blocks of the device: EINVAL with its tag, and no byte changes anywhere."""
    disk = ram(DISK, 1)
    server = rig.serve(disk[0], buffer=BUFFER)
    client = rig.client()
    client.buffer[:] = b"\2" * BUFFER
    assert client.call(kind, 0, length, device_offset, buffer_offset) == errno.EINVAL
    assert (bytes(disk[1]), bytes(client.buffer)) == (b"\1" * DISK, b"\2" * BUFFER)
    assert server.counters["rejected"] == 1


@pytest.mark.parametrize("kind", [BUFFER_READ, BUFFER_WRITE])
@pytest.mark.parametrize(("length", "buffer_offset"), [
    (4096, 1), (4096, 512), (4096, BUFFER), (8192, BUFFER - 4096), (4096, U64 - 4095), (8192, U64 - 4095),
    (4096, 1 << 63), (4096, U64), (4096, BUFFER + 4096)])
def test_ranges_outside_the_buffer_are_refused(rig: Rig, kind: int, length: int, buffer_offset: int) -> None:
    """The same for the buffer, of which a discard needs nothing."""
    disk = ram(DISK, 1)
    rig.serve(disk[0], buffer=BUFFER)
    client = rig.client()
    client.buffer[:] = b"\2" * BUFFER
    assert client.call(kind, 0, length, 0, buffer_offset) == errno.EINVAL
    assert (bytes(disk[1]), bytes(client.buffer)) == (b"\1" * DISK, b"\2" * BUFFER)
    assert client.call(DISCARD, 0, length, 0, buffer_offset) == 0


@pytest.mark.parametrize(("length", "buffer_offset"), [
    (0, 1), (0, 512), (0, BUFFER), (0, U64 - 4095), (511, 0), (1, 0), (0, 1 << 63)])
def test_smart_data_that_has_no_place_is_not_available(rig: Rig, length: int, buffer_offset: int) -> None:
    """Get_SMART is a query: 0, and nothing is written."""
    server = rig.serve(ram(DISK)[0])
    client = rig.client()
    assert client.call(GET_SMART, 0, length, 0, buffer_offset) == 0
    assert server.counters["rejected"] == 1
    assert not any(client.buffer)


@pytest.mark.parametrize("device", [2, 3, 255, 256, 65535])
def test_devices_that_do_not_exist(rig: Rig, device: int) -> None:
    """1 for what acts, 0 for the queries, and no other device is touched."""
    disks = [ram(DISK, 1), ram(DISK, 1)]
    rig.serve(*(disk[0] for disk in disks))
    client = rig.client()
    for kind in (NONE, BUFFER_READ, BUFFER_WRITE, DISCARD, SYNC, RESET):
        assert client.call(kind, device, 4096) == 1
    for kind in (GET_SMART, MEDIA_BLOCKS, BLOCK_LENGTH, MAX_REQUESTS, MAX_BLOCKS_COUNT, MAX_DEVICES):
        assert client.call(kind, device, 4096) == 0
    assert all(bytes(disk[1]) == b"\1" * DISK for disk in disks)
    assert not any(client.buffer)


def test_unknown_kinds_are_answered(rig: Rig) -> None:
    """Every kind that the table does not have: 1, with kind, device and tag as they were."""
    server = rig.serve(ram(DISK)[0])
    client = rig.client()
    known = {*range(6), 0x10, 0x11, 0x19, 0x1A, 0x1B, 0x1F}
    kinds = [kind for kind in (*range(64), 0x100, 0x101, 0x8001, 0xFFFF) if kind not in known]
    for device in (0, 7):
        client.send(*(BufferRequest(kind, device, kind << 8, U64, U64, U64) for kind in kinds))
        assert client.answers(len(kinds)) == [BufferResponse(kind, device, kind << 8, 1) for kind in kinds]
    assert server.counters["rejected"] == 2 * len(kinds)


# ------------------------------------------------------------------ lives


def test_a_thousand_lives_on_one_response_epoch(rig: Rig) -> None:
    """Clients come and go, politely or not, with new epochs or always the same: each is served, and the response channel
    keeps its epoch."""
    server = rig.serve(ram(DISK)[0])
    rig.step()
    epoch = rig.epoch()
    assert epoch != 0
    for life in range(1000):
        with ExitStack() as stack:
            client = BufferClient(*(str(rig.place / name) for name in ("req", "resp", "buf")), idle=rig.step,
                                  timeout=20, epoch=1 if life % 3 == 0 else None)
            stack.callback(client.close)
            client.connect()
            client.write(0, life % 16 * 4096, struct.pack("<Q", life) * 512)
            assert client.read(0, life % 16 * 4096, 4096, 8192) == struct.pack("<Q", life) * 512
            if life % 2:
                client.send(*(BufferRequest(BUFFER_READ, 0, 1, 4096) for _ in range(life % 7 + 1)))   # never read
            if life % 5 == 0:
                client.disconnect()
                rig.step()
    assert rig.epoch() == epoch
    assert server.counters["connections"] == 1000 and server.counters["rejected"] == 0


def test_the_same_epoch_again_is_another_life(rig: Rig) -> None:
    """A client that always uses epoch 1 dies, and its successor writes just as many requests before the server looks."""
    disk = ram(DISK)
    server = rig.serve(disk[0])
    client = rig.client(epoch=1)
    done = client.ring.wc
    for kind in (BUFFER_WRITE, BUFFER_READ):
        client.ring.activate()
        client.buffer[:4096] = bytes([kind]) * 4096
        client.send(*(BufferRequest(kind, 0, 100 * kind + i, 4096, 0, 0) for i in range(done)))
        assert statuses(client.answers(done)) == [(100 * kind + i, 0) for i in range(done)]
    assert server.counters["connections"] == 3


def test_work_of_an_ended_life_is_dropped(rig: Rig) -> None:
    """A client begins anew before the server saw its last requests: they are neither executed nor answered."""
    disk = ram(DISK, 1)
    rig.serve(disk[0])
    client = rig.client()
    client.send(*(BufferRequest(BUFFER_WRITE, 0, i, 4096, i * 4096, 0) for i in range(16)))
    client.ring.activate()
    assert client.call(MEDIA_BLOCKS) == 16
    assert client.poll() is None
    assert bytes(disk[1]) == b"\1" * DISK


@pytest.mark.parametrize("connect", [False, True], ids=["idle", "behind a polite one"])
def test_what_a_predecessor_may_have_done_is_void(rig: Rig, connect: bool) -> None:
    """A new server finds requests of an unknown past: it answers queries and Reset, and leaves the rest alone; what comes
    after them it executes."""
    disk = ram(DISK, 1)
    rig.serve(disk[0])
    client = rig.client()
    if connect:
        client.disconnect()
        rig.step()
        client.connect()
    assert rig.server is not None
    rig.server.close()
    client.send(*(BufferRequest(kind, 0, 50 + kind, 4096, 0, 0)
                  for kind in (BUFFER_WRITE, NONE, BUFFER_READ, DISCARD, SYNC, GET_SMART, MEDIA_BLOCKS, RESET)))
    server = rig.serve(disk[0])
    rig.step()
    with pytest.raises(ConnectionResetError):
        client.poll()
    assert [answer.kind for answer in client.answers(5)] == [RESET, MAX_DEVICES, MEDIA_BLOCKS, BLOCK_LENGTH,
                                                             MAX_BLOCKS_COUNT]
    assert statuses(client.answers(2)) == [(50 + MEDIA_BLOCKS, 16), (50 + RESET, 0)]
    assert bytes(disk[1]) == b"\1" * DISK
    client.write(0, 0, b"\3" * 4096)
    assert bytes(disk[1][:4096]) == b"\3" * 4096
    assert server.counters["voided"] >= 6


def test_a_predecessors_ring_that_has_gone_round_is_void_at_once(rig: Rig) -> None:
    """More requests than the ring holds were there before the server: it goes on behind them without an overrun, and its
    response epoch begins after that, so that a Reset in reaction to it is answered."""
    elements = 8
    region = HEADER_BYTES + elements * BUFFER_REQUEST_BYTES
    writer = ChannelWriter(str(rig.place / "req"), BUFFER_REQUEST_BYTES, BUFFER_PROTOCOL, region)
    rig.stack.callback(writer.close)
    writer.activate()
    for tag in range(5 * elements + 3):
        writer.write(BufferRequest(BUFFER_WRITE, 0, tag, 4096).pack())
    disk = ram(DISK, 1)
    server = rig.serve(disk[0], request=region)
    assert server.run(0) == "connected"
    assert rig.epoch() != 0
    writer.write(BufferRequest(RESET, 0, 99).pack())
    rig.step()
    with open(rig.place / "resp", "rb") as file:
        raw = file.read()
    assert struct.unpack_from("<8Q", raw)[WC] == 1
    assert BufferResponse.unpack(raw[64:80]) == BufferResponse(RESET, 0, 99, 0)
    assert (rig.events, server.counters["overruns"], server.counters["voided"]) == ([], 0, 43)
    assert bytes(disk[1]) == b"\1" * DISK


def test_void_requests_that_are_being_overwritten_are_no_overrun(rig: Rig) -> None:
    """A predecessor's client writes on over what it had answered: nothing is lost of what anybody waits for."""
    elements = 8
    region = HEADER_BYTES + elements * BUFFER_REQUEST_BYTES
    writer = ChannelWriter(str(rig.place / "req"), BUFFER_REQUEST_BYTES, BUFFER_PROTOCOL, region)
    rig.stack.callback(writer.close)
    writer.activate()
    for tag in range(3):
        writer.write(BufferRequest(BUFFER_WRITE, 0, tag, 4096).pack())
    writer._words[WSC] = 3 + elements
    disk = ram(DISK, 1)
    server = rig.serve(disk[0], request=region)
    rig.step()
    n = server.counters
    assert (rig.events, n["overruns"], n["lost"], n["voided"]) == (["connected"], 0, 0, 3)


def test_an_epoch_watched_from_its_beginning_is_executed(rig: Rig) -> None:
    """A server that saw the channel inactive executes everything in the epoch that comes."""
    disk = ram(DISK, 1)
    rig.serve(disk[0])
    rig.step()
    client = rig.client(connect=False)
    client.ring.activate()
    client.send(BufferRequest(BUFFER_WRITE, 0, 1, 4096, 0, 0))
    rig.step()
    assert bytes(disk[1][:4096]) == bytes(4096)


def test_an_overrun_is_counted_and_reset_recovers(rig: Rig) -> None:
    """A client that writes more than its ring holds loses requests, is told by nobody but the log, and goes on after a
    Reset; the response epoch stays."""
    disk = ram(DISK)
    server = rig.serve(disk[0], request=HEADER_BYTES + 8 * BUFFER_REQUEST_BYTES)
    client = rig.client()
    epoch = rig.epoch()
    for tag in range(20):
        client.send(BufferRequest(MEDIA_BLOCKS, 0, tag))
    rig.step()
    assert rig.events == ["connected", "overrun"]
    assert (server.counters["overruns"], server.counters["lost"]) == (1, 20)
    assert client.call(RESET) == 0
    assert client.read(0, 0, 4096) == bytes(4096)
    assert rig.epoch() == epoch


def test_events_of_a_life(rig: Rig) -> None:
    """Coming, going, a channel that does not fit, stopping."""
    server = rig.serve(ram(DISK)[0])
    client = rig.client()
    assert server.connected and server.attached
    client.disconnect()
    assert server.connected and not server.attached     # before the server has looked
    rig.step()
    assert not server.connected and not server.attached
    other = ChannelWriter(str(rig.place / "req"), 16, BUFFER_PROTOCOL)
    rig.stack.callback(other.close)
    other.activate()
    rig.step()
    assert server.fault == (BUFFER_PROTOCOL, 16, (0x8000 - 64) // 16)
    assert rig.events == ["connected", "disconnected", "incompatible"]
    client.connect()
    server.stop()
    assert server.run() == server.run() == "stopped"
    server.close()
    assert rig.epoch() == 0
    with pytest.raises(UsageError, match="closed"):
        server.run()


def test_bells_tell_what_is_served(rig: Rig) -> None:
    """State, identity and read-only devices stand in the bell; one store's identity is its own."""
    bell = bytearray(128)
    stores = [Store.in_memory(bytes(DISK), read_only=True), ram(DISK)[0], Store.in_memory(bytes(DISK), read_only=True)]
    server = rig.serve(*stores, response_bell=bell)
    state = bell_state(bell)
    assert state is not None
    assert (state["state"], state["flags"], state["store"]) == (1, 0b101, identity_of([s.identity for s in stores]).hex())
    assert identity_of([stores[1].identity]) == stores[1].identity
    assert identity_of([stores[0].identity, stores[1].identity]) != identity_of([stores[1].identity, stores[0].identity])
    server.close(gone=True)
    state = bell_state(bell)
    assert state is not None and state["state"] == 3


@pytest.mark.parametrize(("stores", "rule"), [((), "1 to 65536 devices"), ((None,), "Store")])
def test_wrong_stores(rig: Rig, stores: tuple[Any, ...], rule: str) -> None:
    """No device, or what is none."""
    with pytest.raises((UsageError, TypeError), match=rule):
        rig.serve(*stores)


# ------------------------------------------------------------------ hostile clients


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_a_buffer_that_is_taken_away(rig: Rig, new_file: Callable[..., tuple[Store, Path]], kind: str) -> None:
    """Its region is truncated: requests that need what is gone get EIO, the process lives, other requests are answered."""
    store = ram(DISK, 1)[0] if kind == "ram" else new_file(DISK)[0]
    server = rig.serve(store)
    client = rig.client()
    os.truncate(rig.place / "buf", 4096)
    assert client.call(BUFFER_READ, 0, 8192, 0, 8192) == errno.EIO
    assert client.call(BUFFER_WRITE, 0, 8192, 0, 8192) == errno.EIO
    assert client.call(MEDIA_BLOCKS) == 16
    assert server.broken == ("buffer" if kind == "ram" else None)


def test_no_byte_outside_is_touched_whatever_is_asked(rig: Rig) -> None:
    """Random and extreme fields in every request, with disk and buffer between pages without access: every request is
    answered once, and what was in range and went well is all that changed."""
    dice = random.Random(11)
    fd = os.memfd_create("buffer")
    os.ftruncate(fd, 64 * KIB)
    shared = mmap.mmap(fd, 0)
    disks = [fenced(64 * KIB), fenced(32 * KIB)]
    server = BufferServer(rig.memory("req", 0x8000), rig.memory("resp", 0x4000), fenced(64 * KIB, fd),
                          [Store.in_memory(disk) for disk in disks])
    os.close(fd)
    rig.server = server
    rig.stack.callback(server.close)
    client = rig.client()
    models, buffer = [bytearray(64 * KIB), bytearray(32 * KIB)], bytearray(64 * KIB)
    edges = [0, 1, 511, 512, 4095, 4096, 8192, 28 * KIB, 32 * KIB, 60 * KIB, 64 * KIB, 68 * KIB, 1 << 31, 1 << 32, 1 << 63,
             (1 << 63) - 4096, U64, U64 - 4095, U64 - 8191, U64 - 32 * KIB + 1, U64 - 64 * KIB + 1]
    for _ in range(300):
        requests = [BufferRequest(dice.choice((1, 1, 1, 2, 2, 2, 3, 4, 5, 0x1F, dice.getrandbits(16))),
                                  dice.choice((0, 0, 1, 1, 2, 65535)), tag, *(dice.choice(edges) for _ in range(3)))
                    for tag in range(dice.randrange(1, 200))]
        shared[:] = buffer[:] = dice.randbytes(64 * KIB)
        client.send(*requests)
        answers = client.answers(len(requests))
        assert [answer[:3] for answer in answers] == [request[:3] for request in requests]
        for request, answer in zip(requests, answers, strict=True):
            kind, device, _, length, at, into = request
            good = kind in (1, 2, 3) and device < 2 and length % 4096 == at % 4096 == 0 and 0 < length <= 64 * KIB \
                and at + length <= len(models[device]) \
                and (kind == 3 or into % 4096 == 0 and into + length <= 64 * KIB)
            if kind in (1, 2, 3):
                assert (answer.status == 0) == good, request
            if good and kind == 1:
                buffer[into:into + length] = models[device][at:at + length]
            elif good and kind == 2:
                models[device][at:at + length] = buffer[into:into + length]
            elif good:
                models[device][at:at + length] = bytes(length)
        assert shared[:] == bytes(buffer)
        assert [bytes(disk) for disk in disks] == [bytes(model) for model in models]
    shared.close()


@pytest.mark.parametrize("threads", [False, True], ids=["io_uring", "threads"])
def test_files_of_both_blocks_whatever_is_asked(rig: Rig, new_file: Callable[..., tuple[Store, Path]],
                                                threads: bool) -> None:
    """Files in blocks of 4096 and 512 bytes and RAM, neighbours and overlaps among the requests, tags twice, every limit
    exceeded by each field alone: statuses, buffer and disks are those of a model that does one after the other."""
    dice, size, sizes = random.Random(23), 64 * KIB, (128 * KIB, 32 * KIB + 512, 64 * KIB)
    (first, at_first), (second, at_second) = new_file(sizes[0]), new_file(sizes[1] + 100)
    memory, content = ram(sizes[2])
    rig.serve(first, second, memory, buffer=size, threads=threads)
    client = rig.client()
    units = [each.block_length for each in client.devices]
    assert units == [4096, 512, 4096]
    models, buffer = [bytearray(path.read_bytes()) for path in (at_first, at_second)] + [bytearray(sizes[2])], bytearray()
    for _ in range(120):
        buffer[:] = client.buffer[:] = dice.randbytes(size)
        requests: list[BufferRequest] = []
        expected: list[BufferResponse] = []
        for tag in range(dice.randrange(1, 150)):
            number = dice.randrange(3)
            unit = units[number]
            fields = [dice.randrange(1, 9) * unit, dice.randrange(sizes[number] // unit + 1) * unit,
                      dice.randrange(size // unit + 1) * unit]
            request = BufferRequest(dice.choice((1, 1, 2, 2, 3)), number, dice.choice((7, tag)), *fields)
            if requests and dice.random() < 0.5:
                last = requests[-1]
                request = last._replace(device_offset=last.device_offset + last.length & U64,
                                        buffer_offset=last.buffer_offset + last.length & U64)
            elif dice.random() < 0.15:
                field = dice.choice(("length", "device_offset", "buffer_offset"))
                request = request._replace(**{field: dice.choice((0, 1, unit // 2, size, U64, U64 - unit + 1, 1 << 63))})
            kind, number, _, length, at, into = request
            good = length % units[number] == at % units[number] == 0 < length <= size and at + length <= sizes[number] \
                and (kind == DISCARD or into % units[number] == 0 and into + length <= size)
            if good and kind == BUFFER_READ:
                buffer[into:into + length] = models[number][at:at + length]
            elif good:
                models[number][at:at + length] = buffer[into:into + length] if kind == BUFFER_WRITE else bytes(length)
            requests.append(request)
            expected.append(BufferResponse(*request[:3], 0 if good else errno.EINVAL))
        client.send(*requests)
        assert sorted(client.answers(len(requests))) == sorted(expected)
        assert client.poll() is None and bytes(client.buffer) == bytes(buffer)
        assert [at_first.read_bytes(), at_second.read_bytes(), bytes(content)] == [bytes(model) for model in models]


def test_a_client_that_rewrites_everything_meanwhile(rig: Rig) -> None:
    """Another thread scribbles over request ring and buffer while the server runs: nothing crashes, nothing beside disk and
    buffer changes, and an honest client is served afterwards."""
    fd = os.memfd_create("buffer")
    os.ftruncate(fd, 64 * KIB)
    shared, disk = mmap.mmap(fd, 0), fenced(64 * KIB)
    words = memoryview(rig.memory("req", 0x8000)).cast("Q")
    server = BufferServer(rig.memory("req", 0x8000), rig.memory("resp", 0x4000), fenced(64 * KIB, fd),
                          [Store.in_memory(disk)])
    os.close(fd)
    rig.server = server
    rig.stack.callback(server.close)
    rig.client()
    good = [words[i] for i in range(6)]
    dice, stop = random.Random(5), threading.Event()

    def serve() -> None:
        while not stop.is_set():
            server.run(0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    edges = [0, 1, 4096, 8192, 64 * KIB, U64, U64 - 4095, 1 << 63]
    for _ in range(200000):
        turn = dice.randrange(20)
        if turn < 8:
            words[WSC] = words[WC] = words[WC] + dice.randrange(1, 70) & U64
        elif turn < 18:
            slot = 8 + 4 * dice.randrange(1022)
            words[slot] = dice.randrange(1, 4) | dice.randrange(2) << 16 | dice.getrandbits(32) << 32
            for field in (1, 2, 3):
                words[slot + field] = dice.choice(edges)
        elif turn < 19:
            shared[(at := dice.randrange(64 * KIB)):at + 1] = b"!"
        else:
            which = dice.randrange(8)
            words[which] = dice.choice((good[which] if which < 6 else 0, dice.getrandbits(64), 0))
            words[:6] = memoryview(struct.pack("<6Q", *good)).cast("Q")
    stop.set()
    thread.join()
    assert server.counters["reads"] + server.counters["writes"] > 0
    shared[:4096] = b"h" * 4096
    assert rig.client().call(BUFFER_WRITE, 0, 4096, 8192, 0) == 0
    assert disk[8192:12288].tobytes() == b"h" * 4096
    shared.close()


def test_messages_are_not_inline_events() -> None:
    """The two transports cannot be taken for each other: their elements differ in size."""
    assert len({BUFFER_REQUEST_BYTES, BUFFER_RESPONSE_BYTES, len(Event(0, 0, 0, 1, 0).pack())}) == 3
