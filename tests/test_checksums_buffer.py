"""CRC-32C beside a shared buffer: as test_checksums.py has it inline."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import block, eventually
from peer import (
    BLOCK_BYTES,
    BLOCK_LENGTH,
    BUFFER_READ,
    BUFFER_REQUEST_BYTES,
    BUFFER_WRITE,
    DISCARD,
    HEADER_BYTES,
    MAX_BLOCKS_COUNT,
    MAX_DEVICES,
    MEDIA_BLOCKS,
    RESET,
    SYNC,
    BufferClient,
    BufferRequest,
    BufferResponse,
    BufferServer,
    channel_path,
)
from sums import (
    SummedBufferClient,
    SummedBufferServer,
    accepting,
    flip,
    mistaken,
    request_sum,
    reset_offer,
    response_sum,
)

from muenfast import BlockDevice, BlockServer, exports_from_lists
from muenfast.errors import PeerError

TRIES = 4
BAD = errno.ECOMM
SIZE = 1 << 16


class Place:
    """Three names, and what was opened there."""

    def __init__(self, names: Callable[[str], str]) -> None:
        self.req, self.resp, self.shm = names("req"), names("resp"), names("shm")
        self.stack = ExitStack()

    def serve(self, device: str = "ram:64K", **more: Any) -> BlockServer:
        server = BlockServer(exports_from_lists(self.req, self.resp, buffer=self.shm, device=device, poll=100,
                                                buffer_size="1M", **more))
        self.stack.callback(server.close)
        return server

    def open(self, **more: Any) -> BlockDevice:
        return BlockDevice(self.req, self.resp, shm=self.shm, **more)

    def by_hand(self) -> SummedBufferClient:
        client = SummedBufferClient(self.req, self.resp, self.shm, timeout=20)
        self.stack.callback(client.close)
        return client

    def close(self) -> None:
        self.stack.close()
        for name in (self.req, self.resp, self.shm):
            for path in (channel_path(name), channel_path(name) + ".bell"):
                Path(path).unlink(missing_ok=True)


@pytest.fixture
def place(names: Callable[[str], str]) -> Iterator[Place]:
    place = Place(names)
    yield place
    place.close()


@pytest.fixture(params=["memory", "file"])
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return "ram:64K"
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return str(path)


def offences(entry: Any) -> Any:
    return entry.status()[0]["offences"] if hasattr(entry, "exports") else entry.status()["offences"]


@pytest.mark.parametrize("here", ["off", "auto", "require"])
@pytest.mark.parametrize("there", ["off", "auto", "require"])
def test_what_two_ends_come_to(place: Place, backing: str, here: str, there: str) -> None:
    server = place.serve(backing, checksum=there)
    if here == "require" and there == "off":
        with pytest.raises(PeerError, match="checksum is the server has no checksums.*checksum auto does without"):
            place.open(checksum=here)
        return
    if here == "off" and there == "require":
        with pytest.raises(PeerError, match="the server requires checksums .*checksum auto, or require, offers them"):
            place.open(checksum=here, timeout=1)
        return
    with place.open(checksum=here) as disk:
        data = random.Random(1).randbytes(SIZE)
        disk.pwrite(data, 0)
        disk.flush()
        disk.discard(BLOCK_BYTES, BLOCK_BYTES)
        disk.pwrite(data[BLOCK_BYTES:3 * BLOCK_BYTES], BLOCK_BYTES)
        assert disk.pread(SIZE, 0) == data
        both = "off" not in (here, there)
        assert disk.status()["checksum"] == ("off" if here == "off" else "agreed" if both else "plain")
        assert server.status()[0]["checksum"] == ("off" if there == "off" else "agreed" if both else "plain")
        assert not any(offences(server).values()) and not any(offences(disk).values())
        assert disk.size == SIZE


def test_what_stands_in_the_channels(place: Place, backing: str) -> None:
    """The bytes are those that docs/protocol.md has, as an independent reader finds them."""
    with place.serve(backing, checksum="auto"), place.open(checksum="require") as disk:
        disk.pwrite(block(1) * 2, 5 * BLOCK_BYTES)
        assert disk.pread(BLOCK_BYTES, 6 * BLOCK_BYTES) == block(1)
        disk.flush()
        request, response = (Path(channel_path(name)).read_bytes() for name in (place.req, place.resp))
        buffer = Path(channel_path(place.shm)).read_bytes()
    epochs = [int.from_bytes(each[8:16], "little") for each in (request, response)]
    counts = [int.from_bytes(each[56:64], "little") for each in (request, response)]
    requests = [BufferRequest.unpack(request[HEADER_BYTES + 32 * k:HEADER_BYTES + 32 * k + 32]) for k in range(counts[0])]
    answers = [BufferResponse.unpack(response[HEADER_BYTES + 16 * k:HEADER_BYTES + 16 * k + 16]) for k in range(counts[1])]
    first = requests[0]
    assert first == reset_offer(first.tag, epochs[0], first.device_offset)
    assert answers[0] == accepting(first.tag, first.device_offset, 0, epochs[1])
    for number, each in enumerate(requests[1:], 1):
        plain = each._replace(length=each.length & 0xFFFFFFFF)
        data = buffer[each.buffer_offset:each.buffer_offset + plain.length] if each.kind == BUFFER_WRITE else b""
        assert each.length >> 32 == request_sum(plain, number, epochs[0], data)
    media = [each.status & 0xFFFFFFFF for each in answers if each.kind == MEDIA_BLOCKS]
    assert sorted(media) == [0, 16]
    for number, answer in enumerate(answers[1:], 1):
        if answer.kind not in (BUFFER_READ, BUFFER_WRITE):
            assert answer.status >> 32 == response_sum(answer, number, epochs[1]), number


def test_a_plain_client_sees_no_other_byte(place: Place) -> None:
    answers = []
    for there in ("off", "auto"):
        with place.serve(checksum=there):
            client = BufferClient(place.req, place.resp, place.shm, timeout=20)
            try:
                client.connect()
                client.write(0, 0, block(3), 8192)
                wanted = [BufferRequest(kind, 0, kind) for kind in (RESET, MEDIA_BLOCKS, BLOCK_LENGTH, MAX_BLOCKS_COUNT,
                                                                   MAX_DEVICES, SYNC, 99)]
                wanted.append(BufferRequest(BUFFER_READ, 0, 50, BLOCK_BYTES, 0, 0))
                client.send(*wanted)
                answers.append((client.answers(len(wanted)), bytes(client.buffer[:BLOCK_BYTES])))
                client.disconnect()
            finally:
                client.close()
    assert answers[0] == answers[1] and answers[0][1] == block(3)


def test_a_plain_server_serves_us(place: Place) -> None:
    server = BufferServer(place.req, place.resp, place.shm, [bytearray(SIZE)])
    with server.running():
        with place.open(checksum="auto", same_store=True) as disk:
            disk.pwrite(block(1), 0)
            assert disk.pread(BLOCK_BYTES, 0) == block(1)
            disk.flush()
            assert disk.status()["checksum"] == "plain"
        reset, *others = server.requests
        assert reset.kind == RESET and all(each.length < 1 << 32 for each in others)
    server.close()


def test_who_requires_them_serves_no_plain_client(place: Place, backing: str, caplog: pytest.LogCaptureFixture) -> None:
    with place.serve(backing, checksum="require", patience=3) as server:
        client = BufferClient(place.req, place.resp, place.shm, timeout=20)
        try:
            assert client.connect() == []       # Max_Devices is 0
            kinds = (BUFFER_READ, BUFFER_WRITE, DISCARD, SYNC, RESET)
            wanted = [BufferRequest(kind, 0, 1, BLOCK_BYTES, 0, 0) for kind in kinds]
            client.send(*wanted)
            assert [answer.status for answer in client.answers(5)] == [errno.EPROTONOSUPPORT] * 5
            assert server.status()[0]["checksum"] == "refused" and not any(offences(server).values())
            eventually(lambda: any("the client offers no checksums" in line for line in caplog.messages))
        finally:
            client.close()


def test_no_byte_of_a_request_can_change(place: Place, backing: str) -> None:
    """Nor any of the block that it writes."""
    with place.serve(backing, checksum="auto", patience=0) as server:
        client = place.by_hand()
        client.offer()
        client.buffer[:BLOCK_BYTES] = block(1)
        [done] = client.ask(BufferRequest(BUFFER_WRITE, 0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES, 0))
        assert done.status == 0
        data = block(2)
        client.buffer[:BLOCK_BYTES] = data
        sent = 0
        for request in (BufferRequest(BUFFER_WRITE, 0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES, 0),
                        BufferRequest(BUFFER_READ, 0, 1, BLOCK_BYTES, 3 * BLOCK_BYTES, 8192),
                        BufferRequest(DISCARD, 0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES), BufferRequest(SYNC, 0, 1),
                        BufferRequest(MEDIA_BLOCKS, 0, 1), BufferRequest(RESET, 0, 1)):
            client.ring.write_many([flip(client.summed(request, at).pack(), at) for at in range(BUFFER_REQUEST_BYTES)])
            sent += BUFFER_REQUEST_BYTES
            answers = client.answers(BUFFER_REQUEST_BYTES)
            assert [answer.status & 0xFFFFFFFF for answer in answers] == [BAD] * BUFFER_REQUEST_BYTES, request
        write = BufferRequest(BUFFER_WRITE, 0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES, 0)
        for at in range(BLOCK_BYTES):
            raw = client.summed(write).pack()
            client.buffer[at] ^= 0x5A
            client.ring.write(raw)
            [answer] = client.answers(1)
            assert answer.status & 0xFFFFFFFF == BAD, at
            client.buffer[at] ^= 0x5A
            sent += 1
        assert offences(server) == dict.fromkeys(("kind", "device", "length", "device_offset", "buffer_offset"), 0) | {
            "checksum": sent}
        counters = server.status()[0]["counters"]
        assert (counters["writes"], counters["reads"], counters["syncs"], counters["discards"]) == (1, 0, 0, 0)
        read = BufferRequest(BUFFER_READ, 0, 9, BLOCK_BYTES, 2 * BLOCK_BYTES, 8192)
        assert client.ask(read)[0].status == 0 and bytes(client.buffer[8192:8192 + BLOCK_BYTES]) == block(1)
        assert client.ask(write)[0].status == 0 and client.ask(read)[0].status == 0
        assert bytes(client.buffer[8192:8192 + BLOCK_BYTES]) == data


def test_neighbours_of_a_wrong_request_are_executed(place: Place, backing: str) -> None:
    """Of what would be one operation the wrong one alone is refused."""
    with place.serve(backing, checksum="auto"):
        client = place.by_hand()
        client.offer()
        for number in range(16):
            client.buffer[number * BLOCK_BYTES:(number + 1) * BLOCK_BYTES] = block(number + 1)
        requests = [BufferRequest(BUFFER_WRITE, 0, number, BLOCK_BYTES, number * BLOCK_BYTES, number * BLOCK_BYTES)
                    for number in range(16)]
        wrong = (0, 5, 6, 15)
        raws = [client.summed(each, number) for number, each in enumerate(requests)]
        for number in wrong:
            client.buffer[number * BLOCK_BYTES + 77] ^= 1
        client.send(*raws)
        answers = {answer.tag: answer.status for answer in client.verified(requests)}
        assert answers == {number: BAD if number in wrong else 0 for number in range(16)}
        reads = [BufferRequest(BUFFER_READ, 0, number, BLOCK_BYTES, number * BLOCK_BYTES, SIZE + number * BLOCK_BYTES)
                 for number in range(16)]
        assert all(answer.status == 0 for answer in client.ask(*reads))
        for number in range(16):
            at = SIZE + number * BLOCK_BYTES
            expected = bytes(BLOCK_BYTES) if number in wrong else block(number + 1)
            assert bytes(client.buffer[at:at + BLOCK_BYTES]) == expected


def test_what_is_whole_but_not_in_its_place(place: Place) -> None:
    """A request of another round, of another epoch, and one without a checksum."""
    with place.serve(checksum="auto") as server:
        client = place.by_hand()
        client.offer()
        sync = BufferRequest(SYNC, 0, 1)
        old = client.summed(sync)
        client.send(old)
        assert client.verified([sync])[0].status == 0
        client.send(old, sync)
        assert [answer.status & 0xFFFFFFFF for answer in client.answers(2)] == [BAD] * 2
        again, number = client.summed(sync), client.ring.wc
        client.offer()
        for _ in range(number - 1):
            client.ask(sync)
        assert client.ring.wc == number
        client.send(again)
        assert client.answers(1)[0].status & 0xFFFFFFFF == BAD
        assert offences(server)["checksum"] == 3


def test_no_byte_of_an_offer_can_change(place: Place) -> None:
    """Of what has a sign of one nothing is executed, and nothing is agreed upon."""
    with place.serve(checksum="auto", patience=0) as server:
        client = place.by_hand()
        client.offer()
        for at in range(BUFFER_REQUEST_BYTES):
            epoch = client.ring.activate()
            client.ring.write(flip(reset_offer(77, epoch, 1234567).pack(), at))
            [answer] = client.answers(1)
            assert answer.status == (1 if at < 2 else BAD), at     # of another kind, or device, it is none
            assert server.status()[0]["checksum"] == "plain"


@pytest.mark.parametrize("kinds", [(BUFFER_READ,), (BUFFER_WRITE,), (SYNC,)])
def test_no_byte_of_an_answer_can_change(place: Place, kinds: tuple[int, ...]) -> None:
    """The request is sent again, and what is delivered is right; likewise where what was read changes in the buffer."""
    turn: dict[str, int | None] = {"raw": None, "data": None}
    data = random.Random(2).randbytes(SIZE)

    def garble(raw: bytes, answer: BufferResponse) -> bytes:
        at = turn["raw"]
        if at is None or answer.kind not in kinds:
            return raw
        turn["raw"] = None
        return flip(raw, at)

    def spoil(request: BufferRequest) -> int | None:
        at, turn["data"] = turn["data"], None
        return at

    server = SummedBufferServer(place.req, place.resp, place.shm, [bytearray(data)], garble=garble, spoil=spoil)
    with server.running(), place.open(checksum="require", same_store=True) as disk:
        disk.client.conduct.patience = 0
        count = 0
        for at in range(16):
            turn["raw"] = at
            if kinds == (BUFFER_READ,):
                assert disk.pread(BLOCK_BYTES, BLOCK_BYTES) == data[BLOCK_BYTES:2 * BLOCK_BYTES]
            elif kinds == (BUFFER_WRITE,):
                disk.pwrite(data[:BLOCK_BYTES], 0)
            else:
                disk.flush()
            count += 1
        if kinds == (BUFFER_READ,):
            for at in range(0, BLOCK_BYTES, 3):
                turn["data"] = at
                assert disk.pread(BLOCK_BYTES, BLOCK_BYTES) == data[BLOCK_BYTES:2 * BLOCK_BYTES], at
                count += 1
        status = disk.status()
        assert status["offences"] == {"tag": 0, "checksum": count}
        assert status["counters"]["reissued"] == count and status["counters"]["errors"] == 0
        assert status["counters"]["lives"] == 1
    server.close()
    assert server.wrong == 0 and bytes(server.disks[0]) == data


def test_what_is_wrong_for_good_is_an_error(place: Place) -> None:
    broken = {3 * BLOCK_BYTES}
    server = SummedBufferServer(place.req, place.resp, place.shm, [bytearray(b"".join(block(k) for k in range(16)))],
                                spoil=lambda request: 9 if request.device_offset in broken else None)
    with server.running(), place.open(checksum="auto", same_store=True) as disk:
        with pytest.raises(OSError) as failed:
            disk.pread(BLOCK_BYTES, 3 * BLOCK_BYTES)
        assert failed.value.errno == errno.EIO and offences(disk)["checksum"] == TRIES
        assert disk.pread(BLOCK_BYTES, 4 * BLOCK_BYTES) == block(4)
        broken.clear()
        assert disk.pread(BLOCK_BYTES, 3 * BLOCK_BYTES) == block(3)
    server.close()


def test_under_load_nothing_wrong_is_delivered(place: Place) -> None:
    """Answers in any order, one in twenty wrong, several threads; each place in the buffer is free again in the end."""
    dice = random.Random(4)

    def garble(raw: bytes, answer: BufferResponse) -> bytes:
        return flip(raw, dice.randrange(16)) if answer.kind == BUFFER_READ and dice.random() < 0.05 else raw

    def spoil(request: BufferRequest) -> int | None:
        return dice.randrange(request.length) if dice.random() < 0.03 else None

    server = SummedBufferServer(place.req, place.resp, place.shm, [bytearray(b"".join(block(k) for k in range(64)))],
                                garble=garble, spoil=spoil, shuffle=6, buffer_size=1 << 16)
    with server.running(), place.open(checksum="require", same_store=True) as disk:
        disk.client.conduct.patience = 0
        assert mistaken(disk.pread, 64, 4, 40) == []
        status = disk.status()
        assert status["offences"]["checksum"] > 5 and status["counters"]["lives"] == 1
        assert disk.pread(16 * BLOCK_BYTES, 0) == b"".join(block(number) for number in range(16))
    server.close()


def test_in_shared_memory(place: Place, backing: str) -> None:
    """Bytes of the buffer change all the time: right bytes, or an I/O error."""
    with place.serve(backing, checksum="auto") as server, place.open(checksum="require") as disk:
        disk.client.conduct.patience = 0
        server.exports[0].server.conduct.patience = 0
        stop, dice = threading.Event(), random.Random(3)

        def garble() -> None:
            with open(channel_path(place.shm), "r+b", buffering=0) as file:
                while not stop.is_set():
                    file.seek(dice.randrange(16 * BLOCK_BYTES))
                    file.write(dice.randbytes(2))
                    time.sleep(0.0002)

        thread = threading.Thread(target=garble)
        thread.start()
        number = failed = 0
        known: int | None = None        # what stands there: of a write that failed nobody knows

        def found() -> int:
            return offences(server)["checksum"] + offences(disk)["checksum"]

        try:
            begin = time.monotonic()
            while (passed := time.monotonic() - begin) < 0.7 or passed < 20 and not found():
                number += 1
                try:
                    known = None
                    disk.pwrite(block(number) * 4, 0)
                    known = number
                except OSError as error:
                    assert error.errno == errno.EIO
                    failed += 1
                try:
                    data = disk.pread(4 * BLOCK_BYTES, 0)
                except OSError:
                    failed += 1
                    continue
                assert known is None or data == block(known) * 4
        finally:
            stop.set()
            thread.join()
        assert found() > 0 and failed < number


def test_a_large_disk(place: Place) -> None:
    """Whose number of blocks has more than 32 bits, as both halves of it are asked for."""
    blocks = (5 << 32) + 7
    server = SummedBufferServer(place.req, place.resp, place.shm, [bytearray(SIZE)], lies={MEDIA_BLOCKS: blocks})
    with server.running(), place.open(checksum="require", same_store=True) as disk:
        assert disk.size == blocks * BLOCK_BYTES
    server.close()


def test_each_life_agrees_anew(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with place.serve(str(path), checksum="auto"):
        disk = place.open(checksum="auto")
        disk.pwrite(block(1), 0)
        assert disk.status()["checksum"] == "agreed"
    for there, word in (("off", "plain"), ("require", "agreed"), ("off", "plain")):
        with place.serve(str(path), checksum=there) as server:
            assert disk.pread(BLOCK_BYTES, 0) == block(1)
            assert disk.status()["checksum"] == word
            assert not any(offences(server).values()) and not any(offences(disk).values())
    disk.close()
    with place.serve(str(path), checksum="auto"):
        disk = place.open(checksum="require")
        assert disk.pread(BLOCK_BYTES, 0) == block(1)
    with place.serve(str(path), checksum="off"):
        with pytest.raises(OSError):
            disk.pread(BLOCK_BYTES, 0)
        assert disk.connection.failure == "the server returned without checksums, which are required"
    disk.close()


def test_each_client_agrees_anew(place: Place) -> None:
    with place.serve(checksum="auto") as server:
        for here, word in (("auto", "agreed"), ("off", "plain"), ("require", "agreed"), ("off", "plain")):
            with place.open(checksum=here) as disk:
                disk.pwrite(block(1), 0)
                assert disk.pread(BLOCK_BYTES, 0) == block(1)
                assert server.status()[0]["checksum"] == word
            eventually(lambda: server.status()[0]["checksum"] == "idle")
        assert not any(offences(server).values())


@pytest.mark.parametrize("at", [8, 9, 12, 13, 15])
def test_an_answer_to_an_offer_that_comes_wrong(place: Place, at: int) -> None:
    """Is asked for again; nobody takes it for a plain one."""
    left = [1]

    def garble(raw: bytes, answer: BufferResponse) -> bytes:
        if answer.kind == RESET and left:
            left.pop()
            return flip(raw, at)
        return raw

    server = SummedBufferServer(place.req, place.resp, place.shm, [bytearray(SIZE)], garble=garble)
    with server.running(), place.open(checksum="auto", same_store=True) as disk:
        disk.pwrite(block(1), 0)
        assert disk.status()["checksum"] == "agreed" and offences(disk)["checksum"] == 1
    server.close()
    assert server.wrong == 0
