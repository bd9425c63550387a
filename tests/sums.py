"""Checksums as docs/protocol.md has them, from that text alone: CRC-32C by a table, inline events, peers that have them.

They share no code with muenfast.
"""

from __future__ import annotations

import errno
import functools
import random
import struct
import threading
from collections.abc import Callable
from typing import Any

from helpers import block
from peer import (
    BLOCK_BYTES,
    BUFFER_READ,
    BUFFER_WRITE,
    COMMAND,
    COMMAND_SIZE,
    EVENT_BYTES,
    HEADER_BYTES,
    MEDIA_BLOCKS,
    READ,
    RESET,
    WRITE,
    BufferClient,
    BufferRequest,
    BufferResponse,
    BufferServer,
    Event,
    InlineServer,
)
from test_blk_server import Raw

OFFER, ACCEPT = (int.from_bytes(text, "little") for text in (b"MunBCRC?", b"MunBCRC!"))
OFFER_AGAIN, ACCEPT_AGAIN = (int.from_bytes(text, "little") for text in (b"OFER", b"AYES"))
_OFFER = struct.Struct("<QQQII")
_COVER = struct.Struct("<IiQIIQQ")
EPOCH = 1   # of a channel's words
MASK = (1 << 64) - 1


def _column(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_column(byte) for byte in range(256)]


def more(state: int, data: bytes) -> int:
    """The register behind data."""
    table = _TABLE
    for byte in data:
        state = state >> 8 ^ table[(state ^ byte) & 0xFF]
    return state


@functools.lru_cache(256)
def behind(block: bytes) -> int:
    """The register behind a block, or several."""
    return more(0xFFFFFFFF, block)


def crc32c(data: bytes) -> int:
    return more(0xFFFFFFFF, data) ^ 0xFFFFFFFF


def carries(event: Event, answer: bool) -> bool:
    """Whether its checksum covers its block."""
    if event.kind == READ:
        return answer and event.error == 0
    if event.kind == WRITE:
        return not answer
    return answer and event.id == COMMAND_SIZE and event.error == 0


def event_sum(event: Event, number: int, epoch: int, answer: bool, state: int | None = None) -> int:
    """state: behind its block, where that is known."""
    if state is None:
        state = behind(event.data.ljust(BLOCK_BYTES, b"\0")) if carries(event, answer) else 0xFFFFFFFF
    tail = _COVER.pack(event.kind, event.error, event.id, 0, event.priv, number, epoch)
    return more(state, tail) ^ 0xFFFFFFFF


def offer(priv: int, epoch: int, nonce: int) -> Event:
    """The first request of an epoch."""
    request = Event(COMMAND, 0, COMMAND_SIZE, 1, priv)
    without = _OFFER.pack(0, OFFER, nonce, 0, OFFER_AGAIN)
    tail = _COVER.pack(COMMAND, 0, COMMAND_SIZE, 0, priv, 0, epoch)
    return request._replace(data=_OFFER.pack(0, OFFER, nonce, crc32c(without + tail), OFFER_AGAIN))


def offered(request: Event, epoch: int) -> int | None:
    """The nonce of an offer that is right, else None."""
    _, _, nonce, _, _ = _OFFER.unpack(request.data[:_OFFER.size])
    return nonce if offer(request.priv, epoch, nonce).data == request.data[:_OFFER.size] else None


class SummedRaw(Raw):
    """A client with checksums, by hand. Its answers are verified as they are read."""

    sums = False

    def offer(self) -> Event:
        """Begins an epoch with an offer; the answer to that."""
        self.epoch = self.writer.activate()
        nonce = random.getrandbits(64)
        self.sums = False
        self.send(offer(77, self.epoch, nonce))
        self.sums = True
        [answer] = self.answers(1)
        _, magic, complement, zero, again = _OFFER.unpack(answer.data[:_OFFER.size])
        assert (magic, complement, zero, again) == (ACCEPT, nonce ^ MASK, 0, ACCEPT_AGAIN)
        return answer

    def summed(self, event: Event, ahead: int = 0, state: int | None = None) -> Event:
        """With its checksum, as the `ahead`-th of those that are sent next."""
        return event._replace(valid=event_sum(event, self.writer.wc + ahead, self.epoch, False, state))

    def read(self) -> Any:
        result, event = super().read()
        if event is not None and self.sums:
            assert self.reader is not None
            assert event.valid == event_sum(event, self.reader.rc - 1, self.reader._epoch, True)
        return result, event

    def ask(self, *events: Event) -> list[Event]:
        """Sends them with checksums, together; their answers."""
        self.send(*[self.summed(event, ahead) for ahead, event in enumerate(events)])
        return self.answers(len(events))


class SummedServer(InlineServer):
    """A plain server that has learnt checksums. garble: what becomes of the bytes of an answer, by its number in this
    epoch; the size's is 0. lie: leaves the requests' checksums alone."""

    def __init__(self, *args: Any, garble: Callable[[bytes, int, Event], bytes] | None = None, lie: bool = False,
                 **more: Any) -> None:
        super().__init__(*args, **more)
        self.sums = False
        self.wrong = 0
        self._garble, self._lie = garble, lie

    def _connected(self) -> None:
        super()._connected()
        self.sums = False

    def _handle(self, request: Event, position: int) -> None:
        assert self._req is not None
        epoch = self._req._epoch
        if position == 0 and (nonce := offered(request, epoch)) is not None:
            self.sums = True
            answer = self._execute(request)
            answer = answer._replace(data=_OFFER.pack(int.from_bytes(answer.data[:8], "little"), ACCEPT, nonce ^ MASK, 0,
                                                      ACCEPT_AGAIN))
            self._send(answer)
            return
        if self.sums:
            if not self._lie and request.valid != event_sum(request, position, epoch, False):
                self.wrong += 1
                self._send(request._replace(error=-errno.ECOMM))
                return
            request = request._replace(valid=1)
        super()._handle(request, position)

    def _send(self, answer: Event) -> None:
        number = self._resp.wc
        if self.sums:
            answer = answer._replace(valid=event_sum(answer, number, self._resp._words[EPOCH], True))
        raw = answer.pack()
        if self._garble is not None:
            raw = self._garble(raw, number, answer)
        self._resp.write(raw)
        self.answered.append(answer._replace(data=b""))


def flip(raw: bytes, at: int, bits: int = 0x5A) -> bytes:
    """With one byte changed."""
    return raw[:at] + bytes([raw[at] ^ bits]) + raw[at + 1:]


def mistaken(read: Callable[[int, int], bytes], blocks: int, most: int, rounds: int) -> list[int]:
    """Where four threads got anything but block(0), block(1), ... or an I/O error: the first numbers. read(length, offset);
    up to `most` blocks at a time, of so many."""
    wrong: list[int] = []

    def use(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(rounds):
            count = own.randrange(1, most + 1)
            first = own.randrange(blocks - count)
            try:
                data = read(count * BLOCK_BYTES, first * BLOCK_BYTES)
            except OSError:
                continue
            if data != b"".join(block(number) for number in range(first, first + count)):
                wrong.append(first)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def element(number: int, elements: int) -> slice:
    """Where it stands in an inline channel."""
    at = HEADER_BYTES + number % elements * EVENT_BYTES
    return slice(at, at + EVENT_BYTES)


# ------------------------------------------------------------------ beside a shared buffer

_PLACE = struct.Struct("<QQ")
LOW = 0xFFFFFFFF


def request_sum(request: BufferRequest, number: int, epoch: int, data: bytes = b"") -> int:
    """data: that it writes."""
    whole = request._replace(length=request.length & LOW).pack() + _PLACE.pack(number, epoch)
    return more(behind(data) if data else LOW, whole) ^ LOW


def response_sum(response: BufferResponse, number: int, epoch: int, state: int = LOW) -> int:
    """state: behind what was read."""
    return more(state, response._replace(status=response.status & LOW).pack() + _PLACE.pack(number, epoch)) ^ LOW


def reset_offer(tag: int, epoch: int, nonce: int) -> BufferRequest:
    """The first request of an epoch."""
    request = BufferRequest(RESET, 0, tag, OFFER, nonce, OFFER_AGAIN << 32)
    return request._replace(buffer_offset=OFFER_AGAIN << 32 | crc32c(request.pack() + _PLACE.pack(0, epoch)))


def accepting(tag: int, nonce: int, number: int, epoch: int) -> BufferResponse:
    """What answers that."""
    answer = BufferResponse(RESET, 0, tag, ACCEPT_AGAIN)
    state = more(LOW, struct.pack("<Q", nonce))
    return answer._replace(status=ACCEPT_AGAIN | response_sum(answer, number, epoch, state) << 32)


class SummedBufferClient(BufferClient):
    """With checksums, by hand. Requests' lengths are below 2^32; its answers are verified as they are read."""

    def offer(self) -> None:
        """Begins an epoch with an offer, and takes the answer."""
        self.sums = False
        if self._resp is None:
            self.connect()      # plain: for the response channel
            self.disconnect()
        self.epoch = self._req.activate()
        assert self._resp is not None
        self._resp.drain()
        tag, nonce = self.tag(), random.getrandbits(64)
        self.send(reset_offer(tag, self.epoch, nonce))
        [answer] = self.answers(1)
        assert answer == accepting(tag, nonce, self._resp.rc - 1, self._resp._epoch)
        self.sums = True

    def summed(self, request: BufferRequest, ahead: int = 0) -> BufferRequest:
        """With its checksum, as the `ahead`-th of those that are sent next; what it writes stands in the buffer."""
        data = b""
        if request.kind == BUFFER_WRITE:
            data = bytes(self.buffer[request.buffer_offset:request.buffer_offset + request.length])
        return request._replace(length=request.length | request_sum(request, self._req.wc + ahead, self.epoch, data) << 32)

    def ask(self, *requests: BufferRequest) -> list[BufferResponse]:
        """Sends them with checksums, together; their answers, verified, without those."""
        self.send(*[self.summed(request, ahead) for ahead, request in enumerate(requests)])
        return self.verified(requests)

    def verified(self, requests: Any) -> list[BufferResponse]:
        """The answers to these, in any order, verified, without their checksums."""
        assert self._resp is not None
        number = self._resp.rc
        found = []
        places = {request.tag: request for request in requests}
        for ahead, answer in enumerate(self.answers(len(requests))):
            state, request = LOW, places[answer.tag]
            if answer.kind == BUFFER_READ and answer.status & LOW == 0:
                state = behind(bytes(self.buffer[request.buffer_offset:request.buffer_offset + request.length]))
            assert answer.status >> 32 == response_sum(answer, number + ahead, self._resp._epoch, state)
            found.append(answer._replace(status=answer.status & LOW))
        return found


class SummedBufferServer(BufferServer):
    """A plain server that has learnt checksums. garble: what becomes of the bytes of an answer. spoil: which byte of what
    was read changes in the buffer after it was summed, None: none."""

    def __init__(self, *args: Any, garble: Callable[[bytes, BufferResponse], bytes] | None = None,
                 spoil: Callable[[BufferRequest], int | None] | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.sums = False
        self.wrong = 0
        self._garble, self._spoil = garble, spoil
        self._asked: dict[int, BufferRequest] = {}
        self._accept: tuple[int, int] | None = None

    def _handle(self, request: BufferRequest, position: int) -> None:
        assert self._req is not None
        epoch = self._req._epoch
        if position == 0:
            self.sums, self._accept = False, None
            if request.kind == RESET and request == reset_offer(request.tag, epoch, request.device_offset):
                self.sums, self._accept = True, (request.tag, request.device_offset)
                request = request._replace(length=0, device_offset=0, buffer_offset=0)
        elif self.sums:
            found, request = request.length >> 32, request._replace(length=request.length & LOW)
            data = b""
            if request.kind == BUFFER_WRITE:
                data = bytes(self.buffer[request.buffer_offset:request.buffer_offset + request.length])
            if found != request_sum(request, position, epoch, data):
                self.wrong += 1
                self._send(BufferResponse(*request[:3], errno.ECOMM))
                return
        self._asked[request.tag] = request
        super()._handle(request, position)

    def _execute(self, request: BufferRequest) -> int:
        status = super()._execute(request)
        if self.sums and request.kind >= MEDIA_BLOCKS and request.kind != RESET:
            status = status >> 32 if request.device_offset == 1 else status & LOW
        return status

    def _send(self, answer: BufferResponse) -> None:
        number, epoch = self._resp.wc, self._resp._words[EPOCH]
        if self.sums and self._accept is not None and self._accept[0] == answer.tag:
            answer = accepting(answer.tag, self._accept[1], number, epoch)
        elif self.sums:
            state, request = LOW, self._asked.get(answer.tag)
            if answer.kind == BUFFER_READ and answer.status == 0 and request is not None:
                place = slice(request.buffer_offset, request.buffer_offset + request.length)
                state = behind(bytes(self.buffer[place]))
                at = self._spoil(request) if self._spoil is not None else None
                if at is not None:
                    self.buffer[request.buffer_offset + at] ^= 0x5A
            answer = answer._replace(status=answer.status | response_sum(answer, number, epoch, state) << 32)
        raw = answer.pack()
        self._resp.write(raw if self._garble is None else self._garble(raw, answer))
