"""A plain NBD client for tests, written from doc/proto.md: negotiation by hand, requests in any number at once."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

NBDMAGIC, IHAVEOPT, REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT = 1, 2, 3, 5, 6, 7, 8, 9
ACK, SERVER, REP_INFO = 1, 2, 3
UNSUP, INVALID, UNKNOWN, TOO_BIG = (0x80000000 + n for n in (1, 3, 6, 9))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << n for n in range(5))
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95
REQUEST_MAGIC, SIMPLE, STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF


class Closed(Exception):
    """The server closed the connection."""


class Answer(NamedTuple):
    """An answer to a request; text: what a structured error says."""

    error: int
    data: bytes
    text: str


class Connection:
    """A connection to a socket, a path or connected already; reads never wait longer than `timeout` seconds."""

    def __init__(self, where: str | socket.socket, timeout: float = 20) -> None:
        if isinstance(where, str):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.connect(where)
        else:
            self.socket = where
        self.socket.settimeout(timeout)
        self.structured = False
        self._cookie = 0
        self._answers: dict[int, Answer] = {}
        self._reads: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises Closed."""
        data = bytearray()
        while len(data) < size:
            try:
                piece = self.socket.recv(size - len(data))
            except ConnectionResetError as error:
                raise Closed from error
            if not piece:
                raise Closed
            data += piece
        return bytes(data)

    # ---- negotiation

    def greet(self, flags: int = 3) -> None:
        assert struct.unpack(">QQH", self.take(18)) == (NBDMAGIC, IHAVEOPT, 3)
        self.send(struct.pack(">I", flags))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """(type, data) of all replies to an option, the last one final."""
        self.send(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)
        replies = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, echoed) == (REPLY_MAGIC, option)
            replies.append((kind, self.take(length)))
            if kind == ACK or kind & 0x80000000:
                return replies

    def go(self, name: bytes = b"", *, structured: bool = False, option: int = GO,
           infos: tuple[int, ...] = (3,)) -> dict[int, bytes]:
        """What an export says of itself, by information type."""
        if structured:
            assert self.option(STRUCTURED_REPLY) == [(ACK, b"")]
            self.structured = True
        *found, last = self.option(option, struct.pack(">I", len(name)) + name + struct.pack(
            f">H{len(infos)}H", len(infos), *infos))
        assert last == (ACK, b"") and all(kind == REP_INFO for kind, _ in found)
        return {struct.unpack(">H", data[:2])[0]: data[2:] for _, data in found}

    # ---- transmission

    def submit(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """Sends a request; its cookie."""
        self._cookie += 1
        self._reads[self._cookie] = (kind, length)
        self.send(struct.pack(">IHHQQI", REQUEST_MAGIC, flags, kind, self._cookie, offset, length) + data)
        return self._cookie

    def answer(self, cookie: int) -> Answer:
        """The answer to a request, whatever comes before it."""
        while cookie not in self._answers:
            self._receive()
        return self._answers.pop(cookie)

    def _receive(self) -> None:
        magic, = struct.unpack(">I", self.take(4))
        if magic == SIMPLE:
            error, cookie = struct.unpack(">IQ", self.take(12))
            kind, length = self._reads.pop(cookie)
            assert not (self.structured and kind == READ), "a read's answer is structured, once that was negotiated"
            self._answers[cookie] = Answer(error, self.take(length) if kind == READ and not error else b"", "")
            return
        assert magic == STRUCTURED and self.structured
        flags, kind, cookie, size = struct.unpack(">HHQI", self.take(16))
        assert flags == 1, "one chunk answers a request here"
        asked, length = self._reads.pop(cookie)
        payload = self.take(size)
        if kind == 0x8001:
            error, characters = struct.unpack(">IH", payload[:6])
            assert len(payload) == 6 + characters and error
            self._answers[cookie] = Answer(error, b"", payload[6:].decode())
        elif kind == 1:
            assert asked == READ and size == length + 8 and length
            self._answers[cookie] = Answer(0, payload[8:], "")
        else:
            assert kind == 0 and size == 0 and length == 0
            self._answers[cookie] = Answer(0, b"", "")

    def call(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> Answer:
        return self.answer(self.submit(kind, offset, length, data, flags))

    def read(self, offset: int, length: int) -> bytes:
        answer = self.call(READ, offset, length)
        assert answer.error == 0
        return answer.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        assert self.call(WRITE, offset, len(data), data, flags).error == 0

    def closed(self) -> bool:
        """Whether the server closes the connection, whatever it sends before."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True


def connect(path: str, *, structured: bool = False, name: bytes = b"", timeout: float = 20) -> Connection:
    """A connection in the transmission phase."""
    new = Connection(path, timeout)
    new.greet()
    new.go(name, structured=structured)
    return new
