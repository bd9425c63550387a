"""Checksums as docs/protocol.md has them, from that text alone: CRC-32C by a table, inline events, peers that have them.

They share no code with muenfast.
"""

from __future__ import annotations

import errno
import functools
import random
import struct
from collections.abc import Callable
from typing import Any

from peer import BLOCK_BYTES, COMMAND, COMMAND_SIZE, EVENT_BYTES, HEADER_BYTES, READ, WRITE, Event, InlineServer
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
    """The register behind a block."""
    return more(0xFFFFFFFF, block.ljust(BLOCK_BYTES, b"\0"))


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
        state = behind(event.data) if carries(event, answer) else 0xFFFFFFFF
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


def element(number: int, elements: int) -> slice:
    """Where it stands in an inline channel."""
    at = HEADER_BYTES + number % elements * EVENT_BYTES
    return slice(at, at + EVENT_BYTES)
