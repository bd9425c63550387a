"""NBD exports: negotiation and commands by hand, hostile clients, sockets' files, the tools that people use; and what
of the kernel's driver can be tested without it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, leftovers, run, unique
from helpers import eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_client import (
    ABORT,
    ACK,
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EPERM,
    EXPORT_NAME,
    FAST_ZERO,
    FLUSH,
    FUA,
    IHAVEOPT,
    INFO,
    INVALID,
    LIST,
    LIST_META_CONTEXT,
    NO_HOLE,
    READ,
    REQ_ONE,
    REQUEST_MAGIC,
    SERVER,
    STARTTLS,
    STRUCTURED_REPLY,
    TOO_BIG,
    TRIM,
    UNKNOWN,
    UNSUP,
    WRITE,
    WRITE_ZEROES,
    Answer,
    Closed,
    Connection,
    connect,
)
from peer import INLINE_REGION_BYTES, InlineServer, channel_path

from muenfast import BlockDevice, ClaimError, UsageError, doctor, shm
from muenfast._target import Memory
from muenfast.attach import block, fuse, nbd, nbdkernel, sockets, watchdog
from muenfast.attach.leash import Leash

Start = Callable[..., Program]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
MOST = 32 * MIB


class Export:
    """An NbdServer on a socket of its own."""

    def __init__(self, path: Path, target: Any, **options: Any) -> None:
        self.path = str(path)
        self.server = nbd.NbdServer(target, "disk", description="of a test", **options)
        try:
            self.server.listen(sockets.Listener(self.path))
        except BaseException:
            self.server.close()
            raise

    def connect(self, **options: Any) -> Connection:
        return connect(self.path, **options)

    @property
    def counters(self) -> dict[str, int]:
        return self.server.counters


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Export]]:
    """serve(target): an Export; at the end nothing is left to complain about."""
    made: list[Export] = []

    def make(target: Any = None, **options: Any) -> Export:
        made.append(Export(tmp_path / f"socket{len(made)}", target or Memory(SIZE // 4096), **options))
        return made[-1]

    yield make
    for each in made:
        assert each.server.close() == []
        assert not os.path.lexists(each.path)


@pytest.fixture
def export(serve: Callable[..., Export]) -> Export:
    """A disk of 4 MiB in plain memory."""
    return serve()


@contextlib.contextmanager
def over_channels(disk: bytearray, **options: Any) -> Iterator[tuple[BlockDevice, InlineServer]]:
    """A BlockDevice whose plain server answers as `options` of InlineServer say."""
    req, resp = unique("req"), unique("resp")
    for name in (req, resp):
        with open(channel_path(name), "xb") as file:
            file.truncate(INLINE_REGION_BYTES)
    try:
        server = InlineServer(req, resp, disk, **options)
        try:
            with server.running(), BlockDevice(req, resp, timeout=20, poll=100) as device:
                device.client.background = True
                yield device, server
        finally:
            server.close()
    finally:
        for name in (req, resp):
            for path in (channel_path(name), channel_path(name) + ".bell"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


# ---- negotiation


def test_what_an_export_says_of_itself(serve: Callable[..., Export]) -> None:
    """Size, transmission flags, name, description, block sizes; with INFO as with GO, by default as by name."""
    for target, options, flags in (
            (Memory(16), {}, 0b1001_0100_1101), (Memory(16), {"read_only": True}, 0b0001_0000_1111),
            (Memory(128, block_size=512, discards=True), {}, 0b1001_0110_1101)):
        export = serve(target, **options)
        for structured in (False, True):
            for name in (b"", b"disk"):
                with Connection(export.path) as c:
                    c.greet()
                    wanted = (1, 2, 3, 77)
                    said = c.go(name, structured=structured, option=INFO, infos=wanted)
                    assert said == c.go(name, infos=wanted)
                    assert said == {0: struct.pack(">QH", 65536, flags | (0x80 if structured else 0)), 1: b"disk",
                                    2: b"of a test", 3: struct.pack(">III", 1, 4096, MOST)}
                    assert c.read(0, 10) == bytes(10)


def test_a_list_names_the_export(export: Export) -> None:
    with Connection(export.path) as c:
        c.greet()
        assert c.option(LIST) == [(SERVER, struct.pack(">I", 4) + b"diskof a test"), (ACK, b"")]
        assert [kind for kind, _ in c.option(LIST, b"x")] == [INVALID]


@pytest.mark.parametrize("zeroes", [0, 124])
def test_the_old_way_to_choose(export: Export, zeroes: int) -> None:
    """EXPORT_NAME, with and without its 124 zeros; then requests are taken."""
    with Connection(export.path) as c:
        c.greet(1 if zeroes else 3)
        c.send(struct.pack(">QII", IHAVEOPT, EXPORT_NAME, 4) + b"disk")
        assert c.take(10 + zeroes) == struct.pack(">QH", SIZE, 0b1001_0100_1101) + bytes(zeroes)
        c.write(5, b"hello")
        assert c.read(4, 7) == b"\0hello\0"


def test_options_that_are_refused_leave_the_negotiation_going(export: Export) -> None:
    """Unknown ones, TLS, metadata, wrong lengths, unknown names, too much data: an error each, then GO works."""
    def choice(name: bytes, claimed: int | None = None, infos: bytes = b"\0\0") -> bytes:
        return struct.pack(">I", len(name) if claimed is None else claimed) + name + infos

    with Connection(export.path) as c:
        c.greet()
        for option, data, expected in (
                (4, b"", UNSUP), (99, b"data", UNSUP), (0xFFFFFFFF, b"", UNSUP), (STARTTLS, b"", UNSUP),
                (LIST_META_CONTEXT, bytes(12), UNSUP), (STRUCTURED_REPLY, b"x", INVALID), (INFO, b"", INVALID),
                (nbd_go := 7, b"\0\0\0", INVALID), (nbd_go, choice(b"disk", 5), INVALID),
                (nbd_go, choice(b"disk", 0xFFFFFFFF), INVALID), (nbd_go, choice(b"", infos=b"\0\1"), INVALID),
                (nbd_go, choice(b"disk") + b"x", INVALID), (nbd_go, choice(b"other"), UNKNOWN),
                (INFO, choice(b"disk\0"), UNKNOWN), (nbd_go, choice(b"d" * 4096), UNKNOWN),
                (nbd_go, bytes(16385), TOO_BIG), (55, bytes(1 << 20), TOO_BIG)):
            assert [kind for kind, _ in c.option(option, data)] == [expected], (option, data[:20])
        c.go(b"disk", structured=True)
        assert c.read(0, 1) == b"\0"
    assert export.counters["refused"] == 0


def test_a_polite_end(export: Export) -> None:
    """ABORT is acknowledged, its data ignored; nothing is said about it, nor about a client that only looked."""
    with Connection(export.path) as c:
        c.greet()
        assert c.option(ABORT, b"ignored") == [(ACK, b"")]
        assert c.closed()
    with Connection(export.path) as c:
        c.take(18)
    assert export.counters["refused"] == export.counters["violations"] == 0


MALFORMED = {
    "unknown flags": (struct.pack(">I", 4 | 3), "flags are 0x7"),
    "no magic": (struct.pack(">IQII", 3, 1, 7, 0), "begins with 0x0000000000000001"),
    "a name without end": (struct.pack(">IQII", 3, IHAVEOPT, EXPORT_NAME, 4097), "option 1 has 4097 bytes"),
    "an option without end": (struct.pack(">IQII", 3, IHAVEOPT, 7, 0xFFFFFFFF), "option 7 has 4294967295 bytes"),
    "an unknown name": (struct.pack(">IQII", 3, IHAVEOPT, EXPORT_NAME, 3) + b"xyz", "no export b'xyz'"),
    "options without end": (struct.pack(">I", 3) + struct.pack(">QII", IHAVEOPT, LIST, 0) * 64, "64 options"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_negotiation_ends_the_connection(case: str, export: Export,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    """It is counted and said, in one line a second at most; the next client is served."""
    data, text = MALFORMED[case]
    with caplog.at_level(logging.WARNING, "muenfast"):
        for _ in range(5):
            with Connection(export.path) as c:
                c.send(data)
                assert c.closed()
        eventually(lambda: export.counters["refused"] == 5)
        assert 1 <= len(caplog.records) <= 3 and text in caplog.text and "NBD disk" in caplog.text
    with export.connect() as c:
        assert c.read(0, 3) == bytes(3)


def test_a_slow_client_chooses_byte_by_byte_while_others_work(export: Export) -> None:
    with Connection(export.path) as slow, export.connect() as c:
        slow.take(18)
        for byte in struct.pack(">IQIIIH", 3, IHAVEOPT, 7, 6, 0, 0) + struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 0, 9, 0, 2):
            slow.send(bytes([byte]))
            c.write(7, bytes([byte]))
        assert slow.take(20 + 12 + 20 + 14 + 20 + 16 + 2)[-10:] == struct.pack(">Q", 9) + bytes(2)


def test_a_client_that_chooses_nothing_is_turned_away(export: Export, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(nbd, "NEGOTIATION", 0.1)
    with Connection(export.path) as c:
        assert c.closed()
    eventually(lambda: export.counters["refused"] == 1)
    assert "chose no export" in caplog.text


def test_the_limit_of_connections(export: Export, caplog: pytest.LogCaptureFixture) -> None:
    """64 are served; one more is turned away with a line in the log, until one of them has gone."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(export.connect()) for _ in range(nbd.CONNECTIONS)]
        with Connection(export.path) as c:
            assert c.closed()
        eventually(lambda: "64 connections are open" in caplog.text)
        for i, c in enumerate(clients):
            c.write(i * 4096, bytes([i]) * 4096)
        clients[0].submit(DISC)
        assert clients[0].closed()
        eventually(lambda: export.counters["open"] == nbd.CONNECTIONS - 1)
        with export.connect() as c:
            assert c.read(0, 64 * 4096) == b"".join(bytes([i]) * 4096 for i in range(64))


# ---- commands


@pytest.mark.parametrize("structured", [False, True])
def test_what_breaks_a_rule_is_answered(serve: Callable[..., Export], structured: bool) -> None:
    """The error that the protocol names, with a text where replies are structured; the stream stays in step."""
    export, fixed = serve(), serve(Memory(16), read_only=True)
    discards, vague = serve(Memory(16, discards=True)), serve(Memory(16, discards=True, zeroes=False))
    cases = [
        (export, READ, SIZE - 1, 2, b"", 0, EINVAL), (export, READ, SIZE + 1, 0, b"", 0, EINVAL),
        (export, READ, 1 << 63, 1 << 31, b"", 0, EINVAL), (export, READ, (1 << 64) - 1, 1, b"", 0, EINVAL),
        (export, READ, 0, MOST + 1, b"", 0, EINVAL), (export, READ, 0, 1, b"", NO_HOLE, EINVAL),
        (export, READ, 0, 1, b"", 1 << 15, EINVAL), (export, READ, 0, 1, b"", DF, 0 if structured else EINVAL),
        (export, WRITE, SIZE - 1, 2, b"xy", 0, ENOSPC), (export, WRITE, 1 << 62, 9, b"123456789", FUA, ENOSPC),
        (export, WRITE, 0, 3, b"abc", DF, EINVAL), (export, WRITE, 0, MOST + 4096, bytes(MOST + 4096), 0, EINVAL),
        (export, FLUSH, 1, 0, b"", 0, EINVAL), (export, FLUSH, 0, 1, b"", 0, EINVAL),
        (export, TRIM, 0, 4096, b"", 0, EINVAL), (export, CACHE, 0, 4096, b"", 0, EINVAL),
        (export, BLOCK_STATUS, 0, 4096, b"", REQ_ONE, EINVAL), (export, 8, 0, 0, b"", 0, EINVAL),
        (export, 0xFFFF, 5, 0xFFFFFFFF, b"", 0, EINVAL),
        (export, WRITE_ZEROES, SIZE, 1, b"", 0, ENOSPC), (export, WRITE_ZEROES, 0, 1, b"", DF, EINVAL),
        (export, WRITE_ZEROES, 0, 4096, b"", FAST_ZERO, ENOTSUP),
        (fixed, WRITE, 0, 5, b"hello", 0, EPERM), (fixed, WRITE_ZEROES, 0, 4096, b"", 0, EPERM),
        (fixed, TRIM, 0, 4096, b"", 0, EPERM), (fixed, FLUSH, 0, 0, b"", 0, 0), (fixed, READ, 1, 2, b"", FUA, 0),
        (discards, TRIM, 65536, 1, b"", 0, EINVAL), (discards, TRIM, 1, 65535, b"", FUA, 0),
        (discards, WRITE_ZEROES, 0, 65536, b"", FAST_ZERO, 0),
        (discards, WRITE_ZEROES, 0, 65536, b"", FAST_ZERO | NO_HOLE, ENOTSUP),
        (vague, TRIM, 0, 65536, b"", 0, 0), (vague, WRITE_ZEROES, 0, 65536, b"", 0, 0),
        (vague, WRITE_ZEROES, 0, 65536, b"", FAST_ZERO, ENOTSUP),
        (export, READ, 0, 0, b"", 0, 0), (export, WRITE, 5, 0, b"", FUA, 0), (export, WRITE_ZEROES, SIZE, 0, b"", 0, 0),
    ]
    exports = (export, fixed, discards, vague)
    for where, kind, offset, length, data, flags, expected in cases:
        with where.connect(structured=structured) as c:
            got = c.call(kind, offset, length, data, flags)
            assert got.error == expected, (kind, offset, length, flags)
            assert bool(got.text) == (structured and expected != 0)
            assert c.read(0, 5) == bytes(5)
    assert sum(each.counters["rejected"] for each in exports) == len([1 for case in cases if case[-1]])
    assert sum(each.counters["errors"] + each.counters["violations"] for each in exports) == 0


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize(("discards", "zeroes"), [(False, False), (True, False), (True, True)])
def test_any_offset_and_length(serve: Callable[..., Export], block_size: int, discards: bool, zeroes: bool) -> None:
    """Reads, writes, zeros and trims of any place and size do what they do to a bytearray; beyond pieces of 128 KiB,
    too; trims clear whole blocks at most."""
    size = 3 * 131072 + 9 * block_size
    export = serve(Memory(size // block_size, block_size=block_size, discards=discards, zeroes=zeroes))
    model, dice = bytearray(size), random.Random(block_size + discards + zeroes)
    edges = [0, 1, block_size, block_size - 1, 131072, 131072 + 1, 262144 - 7, size - 1, size]
    with export.connect() as one, export.connect(structured=True) as two:
        for _ in range(1500):
            c = dice.choice((one, two))
            low, high = sorted(dice.choice(edges) if dice.random() < 0.4 else dice.randrange(size + 1) for _ in "ab")
            if dice.random() < 0.5:
                high = min(high, low + dice.randrange(3 * block_size))
            kind, flags = dice.choice((READ, WRITE, WRITE, WRITE_ZEROES, TRIM)), dice.choice((0, 0, FUA))
            if kind == WRITE_ZEROES:
                flags |= dice.choice((0, NO_HOLE))
            if kind == TRIM and not discards:
                continue
            data = dice.randbytes(high - low) if kind == WRITE else b""
            answer = c.call(kind, low, high - low, data, flags)
            assert answer.error == 0
            if kind == READ:
                assert answer.data == model[low:high]
            elif kind == WRITE:
                model[low:high] = data
            else:
                if kind == TRIM:
                    low, high = -(-low // block_size) * block_size, high // block_size * block_size
                model[low:max(low, high)] = bytes(max(0, high - low))
        assert one.read(0, size) == model


def test_the_longest_requests(serve: Callable[..., Export]) -> None:
    """32 MiB from an odd place: written, read back, zeroed beyond 4 GiB of address space never needed."""
    size = 40 * MIB
    export = serve(Memory(size // 4096))
    data = random.Random(1).randbytes(MOST)
    with export.connect() as c, export.connect(structured=True) as s:
        c.write(4097, data)
        assert s.read(4097, MOST) == data
        assert s.call(READ, 1, MOST, flags=DF) == Answer(0, bytes(4096) + data[:-4096], "")
        cookies = [c.submit(READ, 4097 + i, MOST - 10) for i in range(4)]   # more than its buffers hold at once
        for i, cookie in enumerate(cookies):
            assert c.answer(cookie).data == data[i:MOST - 10 + i]
        assert c.call(WRITE_ZEROES, 3, size - 3).error == 0
        assert s.read(0, MOST) == bytes(MOST)
    assert export.counters["waits"] > 0


def test_requests_in_one_stream_of_bytes(export: Export) -> None:
    """However the bytes of many requests are cut: each is executed and answered once, by its cookie."""
    dice = random.Random(3)
    with export.connect() as c:
        raw, expected = bytearray(), {}
        for cookie in range(1, 600):
            offset, length = cookie * 5000, dice.randrange(1, 5000)
            data = dice.randbytes(length)
            raw += struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, cookie, offset, length) + data
            expected[offset] = data
        sender = threading.Thread(target=lambda: [c.socket.sendall(raw[at:at + 7777]) for at in range(0, len(raw), 7777)])
        sender.start()
        answered = [struct.unpack(">IIQ", c.take(16)) for _ in expected]
        sender.join()
        assert sorted(cookie for _, _, cookie in answered) == list(range(1, 600))
        assert all(error == 0 for _, error, _ in answered)
        for offset, data in expected.items():
            assert c.read(offset, len(data)) == data


@pytest.mark.parametrize("shuffle", [0, 40])
def test_many_clients_over_channels(serve: Callable[..., Export], shuffle: int) -> None:
    """8 connections at once, blocks answered out of order: each connection owns 512 bytes of every block of a part they
    share, and a part of its own; all find what they wrote last, although every write of the first kind is a part of a
    block."""
    disk = bytearray(256 * 4096)
    with over_channels(disk, shuffle=shuffle, seed=5) as (device, server):
        export = serve(device.target)
        problems: list[str] = []

        def work(which: int) -> None:
            dice, written = random.Random(which), {}
            with export.connect(structured=which % 2 == 0) as c:
                for _ in range(12):
                    waiting = []
                    for _ in range(12):
                        if dice.random() < 0.5:
                            offset, length = dice.randrange(16) * 4096 + which * 512, 512
                        else:
                            offset = (64 + which * 16 + dice.randrange(8)) * 4096 + dice.randrange(4096)
                            length = dice.randrange(1, 9000)
                        if any(offset < o + n and o < offset + length for o, n, _ in waiting):
                            continue
                        data = dice.randbytes(length)
                        waiting.append((offset, length, c.submit(WRITE, offset, length, data, dice.choice((0, FUA)))))
                        for at in [o for o, d in written.items() if o < offset + length and offset < o + len(d)]:
                            del written[at]
                        written[offset] = data
                    if any(c.answer(cookie).error for _, _, cookie in waiting):
                        problems.append(f"{which}: a write failed")
                    for offset, data in written.items():
                        if c.read(offset, len(data)) != data:
                            problems.append(f"{which}: {offset} + {len(data)} reads otherwise")
                c.submit(DISC)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        assert server.syncs > 0
        assert export.server.close() == []


def test_a_flush_reaches_the_store_before_its_answer(serve: Callable[..., Export]) -> None:
    """FLUSH, and FUA on each kind of write; a write that failed is not synced, and says so."""
    with over_channels(bytearray(64 * 4096), fail_blocks={7: -errno.ENOSPC, 9: -errno.EBADMSG}) as (device, server):
        export = serve(device.target)
        with export.connect(structured=True) as c:
            for count, (kind, offset, length, data, flags) in enumerate((
                    (FLUSH, 0, 0, b"", 0), (WRITE, 5, 3, b"abc", FUA), (WRITE, 0, 4096, bytes(4096), FUA),
                    (WRITE_ZEROES, 1, 9000, b"", FUA), (FLUSH, 0, 0, b"", FUA)), start=1):
                assert c.call(kind, offset, length, data, flags).error == 0
                assert server.syncs == count
            with export.connect() as other:     # what one connection wrote, another one's flush covers
                c.write(20 * 4096, b"w" * 4096)
                assert other.call(FLUSH).error == 0 and server.syncs == 6
                assert server.disk[20 * 4096:21 * 4096] == b"w" * 4096
            assert c.call(WRITE, 6 * 4096, 8192, bytes(8192), FUA).error == ENOSPC
            assert c.call(READ, 9 * 4096 + 5, 5).error == EIO
            assert c.call(WRITE, 9 * 4096 + 5, 5, b"12345").error == EIO
            assert c.call(WRITE_ZEROES, 9 * 4096 + 5, 5).error == EIO
            assert c.call(WRITE_ZEROES, 0, 64 * 4096, flags=FUA).error in (EIO, ENOSPC)
            assert server.syncs == 6
            assert c.call(READ, 0, 4096).error == 0
        assert export.counters["errors"] == 5
        assert export.server.close() == []


# ---- clients that behave badly


def test_a_client_that_reads_no_answer_hinders_nobody(export: Export) -> None:
    """It asks for far more than sockets and buffers hold; others go on, and it gets everything once it reads."""
    with export.connect() as c:
        c.write(0, data := random.Random(2).randbytes(MIB))
        with export.connect() as stuck:
            cookies = []
            sender = threading.Thread(target=lambda: cookies.extend(stuck.submit(READ, 0, MIB) for _ in range(100)))
            sender.start()
            eventually(lambda: export.counters["waits"] > 0)
            for i in range(200):
                c.write(2 * MIB + i * 4096, bytes([i]) * 4096)
                assert c.read(2 * MIB + i * 4096, 4096) == bytes([i]) * 4096
            digest = hashlib.sha256(data).digest()
            sender.join()
            assert all(hashlib.sha256(stuck.answer(cookie).data).digest() == digest for cookie in cookies)


def test_a_client_that_leaves_without_reading(export: Export) -> None:
    """Its requests come back; what it had sent in full is executed."""
    with export.connect() as gone:
        for i in range(20):
            gone.submit(READ, 0, MIB)
            gone.submit(WRITE, 2 * MIB + i * 4096, 4096, bytes([i + 1]) * 4096)
    eventually(lambda: export.counters["open"] == 0)
    assert export.counters["unsent"] > 0
    assert export.server.disk.in_flight == 0
    with export.connect() as c:
        assert c.read(2 * MIB, 20 * 4096) == b"".join(bytes([i + 1]) * 4096 for i in range(20))


def test_a_connection_cut_in_the_middle_of_a_request(export: Export, caplog: pytest.LogCaptureFixture) -> None:
    """In a header, in a payload received, in one that is skipped: counted, said, and nothing of the payload is written."""
    for data in (b"\x25", struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 0, 300000) + b"x" * 200000,
                 struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, SIZE, 300000) + b"x" * 200000):
        with export.connect() as c:
            c.send(data)
    eventually(lambda: export.counters["cut"] == 3 and export.counters["open"] == 0)
    eventually(lambda: "in the middle of a request" in caplog.text)
    with export.connect() as c:
        assert c.read(0, 300000) == bytes(300000)


def test_a_connection_cut_after_any_byte(export: Export) -> None:
    """Of a write, a refused write and a read, one after the other: what was whole is executed, in that order; else
    nothing is, and every connection goes."""
    payload = b"0123456789"
    wire = b"".join((struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 4090, 10), payload,
                     struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 2, (1 << 64) - 5, 10), payload,
                     struct.pack(">IHHQQI", REQUEST_MAGIC, 0, READ, 3, 4090, 10)))
    whole = (0, 38, 76, 104)
    for end in range(len(wire) + 1):
        ours, theirs = socket.socketpair()
        export.server.add(theirs)
        with ours:
            ours.sendall(wire[:end])
            ours.shutdown(socket.SHUT_WR)
            ours.settimeout(20)
            answers = b"".join(iter(lambda: ours.recv(4096), b""))
        done = [(0, 1, b""), (ENOSPC, 2, b""), (0, 3, payload)][:sum(end >= each for each in whole[1:])]
        assert sorted(parse(answers)) == sorted(done)
        eventually(lambda: export.counters["open"] == 0)
        assert export.server.disk.in_flight == 0
        with export.connect() as c:
            assert c.read(4090, 10) == (payload if end >= 38 else bytes(10))
            c.write(4090, bytes(10))
    eventually(lambda: export.counters["open"] == 0)
    assert export.counters["cut"] == len(wire) + 1 - len(whole) and export.counters["violations"] == 0


def parse(answers: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(error, cookie, data) of simple replies; a read of 10 bytes has cookie 3."""
    while answers:
        magic, error, cookie = struct.unpack_from(">IIQ", answers)
        assert magic == 0x67446698
        size = 10 if cookie == 3 and not error else 0
        yield error, cookie, answers[16:16 + size]
        answers = answers[16 + size:]


def test_requests_in_flight_when_their_client_leaves(serve: Callable[..., Export]) -> None:
    """The target has them still: their connection and its buffers stay until it let go of the last, and then go."""
    disk = bytearray(random.Random(9).randbytes(64 * 4096))
    with over_channels(disk) as (device, server):
        export = serve(device.target)
        release, server._release = server._release, lambda keep: None  # type: ignore[method-assign]
        with export.connect() as c:
            for i in range(8):
                c.submit(READ, i * 4096, 4096)
                c.submit(WRITE, (32 + i) * 4096, 4096, bytes([i + 1]) * 4096)
                c.submit(WRITE, (48 + i) * 4096 + 5, 3, b"abc")
            eventually(lambda: export.server.disk.in_flight == 24)
        with export.connect() as other:     # its thread has seen that the first one left
            eventually(lambda: export.counters["connections"] == 2)
            assert other.call(WRITE, 64 * 4096, 1, b"x").error == ENOSPC
            eventually(lambda: export.server.disk.in_flight == 24)  # the other's own is given back after its answer
            assert export.counters["open"] == 2
            server._release = release  # type: ignore[method-assign]
            eventually(lambda: export.counters["open"] == 1 and export.server.disk.in_flight == 0)
            assert other.read(32 * 4096, 8 * 4096) == b"".join(bytes([i + 1]) * 4096 for i in range(8))
            assert [other.read((48 + i) * 4096 + 5, 3) for i in range(8)] == [b"abc"] * 8
        assert export.server.close() == []


@pytest.mark.parametrize("first", [0, 1])
def test_threads_that_cannot_be_started(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and what was started ends."""
    start, starts = threading.Thread.start, []

    def refused(thread: threading.Thread) -> None:
        starts.append(thread)
        if len(starts) > first:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(BlockingIOError, match="no thread for `nbd .*the limit of this user"):
            nbd.NbdServer(Memory(16), "disk")
    assert not any(thread.is_alive() for thread in starts[:first])
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_request_ends_the_connection(export: Export, caplog: pytest.LogCaptureFixture) -> None:
    """After the answers to what came before it."""
    with export.connect() as c:
        first = c.submit(WRITE, 0, 5, b"hello")
        c.send(struct.pack(">IHHQQI", REQUEST_MAGIC + 1, 0, READ, 2, 0, 5))
        assert c.answer(first).error == 0
        assert c.closed()
    assert export.counters["violations"] == 1
    eventually(lambda: "0x25609514" in caplog.text)
    with export.connect() as c:
        assert c.read(0, 5) == b"hello"


def test_a_disconnect_is_polite(serve: Callable[..., Export]) -> None:
    """DISC: what was asked before is answered, what follows is not looked at."""
    with over_channels(bytearray(64 * 4096), shuffle=10) as (device, _):
        export = serve(device.target)
        with export.connect() as c:
            cookies = [c.submit(WRITE, i * 4096, 4096, bytes([i]) * 4096) for i in range(32)]
            c.submit(DISC)
            c.submit(WRITE, 0, 4096, bytes(4096))
            assert [c.answer(cookie).error for cookie in cookies] == [0] * 32
            with pytest.raises(Closed):
                c.take(1)
        with export.connect() as c:
            assert c.read(0, 32 * 4096) == b"".join(bytes([i]) * 4096 for i in range(32))
        assert export.server.close() == []


def test_the_end_answers_what_was_asked(serve: Callable[..., Export]) -> None:
    """close() while requests are with the target: they are answered, then the clients see the end."""
    with over_channels(bytearray(64 * 4096)) as (device, server):
        export = serve(device.target)
        with export.connect() as c:
            release, server._release = server._release, lambda keep: None  # type: ignore[method-assign]
            cookies = [c.submit(WRITE, i * 4096, 4096, bytes([i]) * 4096) for i in range(40)]
            eventually(lambda: export.server.disk.in_flight == 40)
            said: list[str] = []
            end = threading.Thread(target=lambda: said.extend(export.server.close(20)))
            end.start()
            eventually(lambda: not os.path.exists(export.path))
            server._release = release  # type: ignore[method-assign]
            assert [c.answer(cookie).error for cookie in cookies] == [0] * 40
            assert c.closed()
            end.join()
            assert said == [] and export.counters["writes"] == 40
    assert not os.path.exists(export.path)


def test_the_end_waits_for_no_client(serve: Callable[..., Export]) -> None:
    """One that reads nothing is given its time, then cut off, and that is said; one that idles is no matter."""
    export = serve()
    with export.connect() as stuck, export.connect() as idle, Connection(export.path) as new:
        new.take(18)
        for _ in range(8):
            stuck.submit(READ, 0, MIB)
        eventually(lambda: export.counters["reads"] == 8)
        said = export.server.close(0.2)
        assert len(said) == 1 and "were not answered in 0.2 s" in said[0]
        assert idle.closed() and new.closed()
    assert export.server.close() == []


def test_the_end_waits_for_the_target_no_longer_than_it_is_told(tmp_path: Path) -> None:
    """A target that answers nothing: close() returns and says so; what it answers later does no harm."""
    with over_channels(bytearray(64 * 4096)) as (device, server):
        export = Export(tmp_path / "s", device.target)
        with export.connect() as c:
            release, server._release = server._release, lambda keep: None  # type: ignore[method-assign]
            c.submit(READ, 0, 5)
            eventually(lambda: server._window)
            for _ in range(2):
                said = export.server.close(0.2)
                assert len(said) == 2 and "not answered in 0.2 s" in said[0] and "still has requests" in said[1]
            server._release = release  # type: ignore[method-assign]
            assert export.server.close() == []


settings.register_profile("nbd", deadline=None, max_examples=150,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

HEADERS = st.builds(
    lambda magic, flags, kind, offset, length: struct.pack(">IHHQQI", magic, flags, kind, 1, offset, length),
    st.sampled_from([REQUEST_MAGIC] * 9 + [0]), st.sampled_from([0, FUA, NO_HOLE, FAST_ZERO, 255]),
    st.sampled_from([READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, DISC, 77]),
    st.one_of(st.integers(0, SIZE + 10), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 9000), st.integers(0, (1 << 32) - 1)))
OPTIONS = st.builds(
    lambda magic, option, claimed, data: struct.pack(">QII", magic, option, len(data) if claimed is None else claimed)
    + data,
    st.sampled_from([IHAVEOPT] * 9 + [0]), st.one_of(st.integers(0, 12), st.integers(0, (1 << 32) - 1)),
    st.one_of(st.none(), st.none(), st.integers(0, (1 << 32) - 1)), st.binary(max_size=40))


@pytest.fixture
def attacked(export: Export) -> Iterator[Export]:
    """After whatever was sent to it, it serves, and has let go of everything."""
    yield export
    eventually(lambda: export.counters["open"] == 0)
    assert export.server.disk.in_flight == 0
    with export.connect(structured=True) as c:
        c.write(1, b"still here")
        assert c.read(0, 12) == b"\0still here" + c.read(11, 1)


def throw(path: str, data: bytes, opening: bytes) -> None:
    """Sends bytes, reads whatever comes, and leaves."""
    with Connection(path) as c:
        c.take(18)
        c.socket.settimeout(0.05)
        with contextlib.suppress(Closed, TimeoutError):
            c.send(opening + data)
            while True:
                c.take(1)


@settings(settings.get_profile("nbd"))
@given(st.lists(st.one_of(OPTIONS, st.binary(max_size=30)), max_size=6), st.integers(0, 8))
def test_hostile_negotiations(attacked: Export, pieces: list[bytes], flags: int) -> None:
    """Any bytes instead of options: no crash, no hang, no leak."""
    throw(attacked.path, b"".join(pieces), struct.pack(">I", flags))


@settings(settings.get_profile("nbd"))
@given(st.lists(st.one_of(HEADERS, HEADERS, st.binary(max_size=5000)), max_size=12), st.booleans())
def test_hostile_requests(attacked: Export, pieces: list[bytes], structured: bool) -> None:
    """Any bytes instead of requests."""
    opening = struct.pack(">I", 3) + (struct.pack(">QII", IHAVEOPT, STRUCTURED_REPLY, 0) if structured else b"")
    throw(attacked.path, b"".join(pieces), opening + struct.pack(">QIIIH", IHAVEOPT, 7, 6, 0, 0))


# ---- the sockets' files


def test_its_file(tmp_path: Path, runtime: Path) -> None:
    """Mode 0600 whatever the umask; its record and itself go with close(); clients are refused before listen()."""
    path = tmp_path / "s"
    old = os.umask(0)
    try:
        listener = sockets.Listener(str(path))
    finally:
        os.umask(old)
    assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [(left, pid) for _, left, pid in sockets.records(runtime)] == [(str(path), os.getpid())]
    with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
        early.connect(str(path))
    with pytest.raises(ClaimError, match="already held by process"):
        sockets.Listener(str(tmp_path / ".." / tmp_path.name / "s"))
    listener.close()
    listener.close()
    assert not path.exists() and sockets.records(runtime) == []


def test_what_stands_at_the_path(tmp_path: Path) -> None:
    """A dead socket is replaced; one that is listened on, a file, a link and a directory are refused and stay."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(ClaimError, match="a process that listens there"):
            sockets.Listener(str(path))
        assert path.is_socket()
    inode = path.stat().st_ino
    sockets.Listener(str(path)).close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(ClaimError):
            sockets.Listener(str(path))
    path.unlink()
    assert inode
    for make in (lambda: path.write_text("mine"), lambda: path.symlink_to("elsewhere"), path.mkdir):
        make()
        with pytest.raises(FileExistsError, match="something else than a socket"):
            sockets.Listener(str(path))
        assert path.is_symlink() or path.exists()
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError):
        sockets.Listener(str(tmp_path / "none" / "s"))


def test_a_file_that_was_taken_away_or_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody else's file is removed at the end."""
    path = tmp_path / "s"
    listener = sockets.Listener(str(path))
    path.unlink()
    listener.close()
    assert "had been removed" in caplog.text
    listener = sockets.Listener(str(path))
    path.unlink()
    path.write_text("mine")
    listener.close()
    assert "had been replaced" in caplog.text and path.read_text() == "mine"


def test_paths_that_a_socket_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """107 bytes at most, as given; relative ones count as they are and stay valid where the process goes."""
    deep = tmp_path / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    listener = sockets.Listener("s")
    monkeypatch.chdir("/")
    assert (deep / "s").is_socket()
    listener.close()
    assert not (deep / "s").exists()
    assert sockets.paths_from_list("--nbd", "/a," + "/" + "b" * 106) == ["/a", "/" + "b" * 106]
    for text, rule in (("/a,/" + "b" * 107, "entry 1.*at most 107 bytes.*has 108"), ("/" + "ä" * 54, "has 109"),
                       ("/a,", "entry 1.*must not be empty"), ("/a/", "names a file"), ("/a,/b/..", "names a file"),
                       ("/a,/./a", "entry 1.*serves one disk.*entry 0"), ("/a\0b", "names a file"),
                       ("\udfff\ud800", "encodable")):
        with pytest.raises(UsageError, match=rule):
            sockets.paths_from_list("--nbd", text)


def test_sockets_of_dead_clients(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They and their records are left-overs while nobody claims them; the next one made cleans up, too."""
    def die(path: Path) -> None:
        script = ("import os, sys\nfrom muenfast.attach.sockets import Listener\nl = Listener(sys.argv[1])\n"
                  "l.listen(1)\nos._exit(0)")
        subprocess.run([sys.executable, "-c", script, path], check=True)

    def found() -> list[doctor.Leftover]:
        return [left for left in doctor.leftovers() if left.kind == "socket"]

    first, second = tmp_path / "first", tmp_path / "second"
    die(first)
    (left,) = found()
    assert left.path == str(first) and "an NBD socket of process" in left.text
    with shm.claim(sockets.key_of(str(first)), "the socket"):
        assert found() == [] and doctor.remove(left) == "in use again"
    assert first.is_socket()
    assert doctor.remove(left) is None and doctor.remove(left) is None
    assert not first.exists() and found() == []
    die(first)
    first.unlink()
    first.write_text("somebody else's")
    (left,) = found()
    assert doctor.remove(left) is None and first.read_text() == "somebody else's" and found() == []
    first.unlink()
    die(first)
    with socket.socket(socket.AF_UNIX) as other:
        first.unlink()
        other.bind(str(first))
        other.listen(1)
        assert [doctor.remove(left) for left in found()] == [None] and first.is_socket()
    first.unlink()
    die(first)
    sockets.Listener(str(second)).close()
    assert not first.exists() and found() == [] and sockets.records(runtime) == []
    die(second)
    sockets.Listener(str(second)).close()
    assert not second.exists()
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.chdir(deep)
    die(Path("s"))
    (left,) = found()
    assert left.path == str(deep / "s") and len(left.path) > sockets.MOST_PATH
    assert doctor.remove(left) is None and os.listdir(deep) == []
    for claim in doctor.leftovers():
        assert doctor.remove(claim) is None


# ---- the program


@pytest.fixture
def lists() -> list[str]:
    """--req and --resp of one connection."""
    return ["--req", unique("req"), "--resp", unique("resp")]


def uri(path: Path, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={path}"


def tool(*words: object, timeout: float = 120, status: int = 0) -> str:
    """Runs a program from Debian's packages; what it printed."""
    name = str(words[0])
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == status, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def disk(program: Start, lists: list[str], tmp_path: Path) -> Iterator[Path]:
    """The socket of a client whose server exports a RAM disk of 64 MiB."""
    server = program("blk", *lists, "--device", "ram:64M")
    path = tmp_path / "nbd.sock"
    client = program("blk", "--client", *lists, "--nbd", str(path))
    assert client.lines == [f"disk {lists[1]} {lists[3]} {64 * MIB} - {path}"]
    yield path
    (status, said), (server_status, server_said) = client.end(), server.end()
    assert (status, server_status, server_said) == (0, 0, "") and not path.exists()
    # What a tool that was killed gives cause to.
    assert all("in the middle of a request" in line for line in said.splitlines()), said


def test_nbdinfo(disk: Path, lists: list[str]) -> None:
    (said,) = json.loads(tool("nbdinfo", "--json", uri(disk)))["exports"]
    assert (said["export-name"], said["export-size"]) == (lists[1], 64 * MIB)
    assert said["description"] == f"muenfast disk over the channels {lists[1]}/{lists[3]}"
    assert [said[key] for key in ("is_read_only", "can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero",
                                  "can_fast_zero", "can_df")] == [False, True, True, True, False, True, True, True]
    assert [said[f"block_size_{key}"] for key in ("minimum", "preferred", "maximum")] == [1, 4096, MOST]
    assert lists[1] in tool("nbdinfo", "--list", uri(disk))
    assert "nope" in tool("nbdinfo", uri(disk, "nope"), status=1)


def test_nbdcopy_and_qemu_img(disk: Path, tmp_path: Path) -> None:
    """An image goes in by the one and comes out by the other, and by itself; qemu finds both equal."""
    image, back, qcow = tmp_path / "image", tmp_path / "back", tmp_path / "qcow2"
    data = bytearray(random.Random(4).randbytes(64 * MIB))
    data[5 * MIB:30 * MIB] = bytes(25 * MIB)
    image.write_bytes(data)
    tool("nbdcopy", "--destination-is-zero", image, uri(disk))
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", image, f"nbd:unix:{disk}")
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(disk), qcow)
    tool("qemu-io", "-f", "raw", "-c", "write -z 0 64M", "-c", "read -P 0 0 64M", "-c", "flush", uri(disk))
    tool("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, uri(disk))
    tool("nbdcopy", uri(disk), back)
    assert back.read_bytes() == data


def test_qemu_io(disk: Path) -> None:
    """Odd offsets and lengths, FUA, zeros with and without holes, flushes, and a pattern checked after each."""
    said = tool("qemu-io", "-f", "raw", "-c", "write -P 0x11 0 1M", "-c", "write -f -P 0x22 513 7000",
                "-c", "read -P 0x11 0 513", "-c", "read -P 0x22 513 7000", "-c", "read -P 0x11 7513 4096",
                "-c", "write -z 600 100", "-c", "read -P 0 600 100", "-c", "write -z -u 4000 300000",
                "-c", "read -P 0 4000 300000", "-c", "flush", "-c", "aio_write -P 0x33 1M 8M", "-c", "aio_flush",
                "-c", "read -P 0x33 1M 8M", "-c", "discard 0 1M", uri(disk))
    assert "verification failed" not in said and "ailed" not in said


def held(path: Path) -> int:
    """Bytes of a file that are no holes."""
    total = end = 0
    with open(path, "rb") as file, contextlib.suppress(OSError):     # ENXIO: only a hole is left
        while True:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            total += end - start
    return total


@pytest.mark.parametrize("silent", [False, True])
def test_holes_over_a_buffer(program: Start, lists: list[str], tmp_path: Path, silent: bool) -> None:
    """Two disks of one connection, a socket for each, in their order: trims, and zeros that may be holes, free what they
    cover in the server's file, and that one only; zeros that may not be are written. silent: with a server that says
    nothing of its disks zeros are written, and never called fast."""
    images, paths, buffer = [tmp_path / "a", tmp_path / "b"], [tmp_path / "x", tmp_path / "y"], unique("buf")
    data = random.Random(6).randbytes(16 * MIB)
    for image in images:
        image.write_bytes(data)
    server = program("modprobe", "muenblock-server", f"connections=0:{lists[1]}:{lists[3]}:{buffer}",
                     f"device={images[0]}:0,{images[1]}:0")
    client = program("blk", "--client", *lists, "--shm", buffer, "--nbd", ",".join(map(str, paths)),
                     *(["--strict-oneway", "--same-store"] if silent else []))
    assert [line.split()[5] for line in client.lines] == [str(path) for path in paths]

    def taken() -> list[float]:
        return [held(image) / MIB for image in images]

    with (connect(str(paths[0]), name=f"{lists[1]}.0".encode()) as a,
          connect(str(paths[1]), name=f"{lists[1]}.1".encode()) as b):
        assert taken() == [16, 16]
        assert a.call(TRIM, MIB, 4 * MIB).error == 0
        assert taken() == [12, 16]
        assert b.call(WRITE_ZEROES, MIB, 2 * MIB, flags=NO_HOLE).error == 0
        assert taken() == [12, 16]
        assert b.call(WRITE_ZEROES, 4 * MIB - 5, 8 * MIB + 10).error == 0
        assert taken() == [12, 16 if silent else 8]
        assert b.call(WRITE_ZEROES, 13 * MIB, MIB, flags=FAST_ZERO).error == (ENOTSUP if silent else 0)
        assert taken() == [12, 16 if silent else 7]
        assert a.call(FLUSH).error == b.call(FLUSH).error == 0
        assert a.read(0, 16 * MIB) == data[:MIB] + bytes(4 * MIB) + data[5 * MIB:]
        expected = bytearray(data)
        for low, high in (MIB, 3 * MIB), (4 * MIB - 5, 12 * MIB + 5), *([] if silent else [(13 * MIB, 14 * MIB)]):
            expected[low:high] = bytes(high - low)
        assert b.read(0, 16 * MIB) == expected
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    assert images[1].read_bytes() == expected


@pytest.mark.stress
def test_fio_verifies(disk: Path, tmp_path: Path) -> None:
    """Random reads and writes through fio's NBD engine, 32 at a time on 4 connections, each block with a checksum."""
    tool("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri(disk)}", "--rw=randrw", "--verify=crc32c", "--iodepth=32",
         "--bs=4k", "--numjobs=4", "--size=16M", "--offset_increment=16M", "--io_size=24M", "--verify_fatal=1",
         "--verify_state_save=0", f"--aux-path={tmp_path}", "--output-format=json", f"--output={tmp_path}/fio.json")
    jobs = json.loads((tmp_path / "fio.json").read_text())["jobs"]
    assert len(jobs) == 4
    for job in jobs:
        assert job["error"] == 0 and job["read"]["total_ios"] > 0 and job["write"]["total_ios"] > 0
    (client,) = [entry for answer in json.loads(run("stat", "--json").stdout) for entry in answer["entries"]
                 if entry["role"] == "client"]
    assert client["nbd"]["socket"] == str(disk) and client["nbd"]["counters"]["writes"] > 0
    assert f"NBD {disk}: reads" in run("stat").stdout


def test_a_tool_killed_at_work(disk: Path, tmp_path: Path) -> None:
    """kill -9 of a client with requests out: the next one finds everything in order."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    for _ in range(3):
        before = json.loads(run("stat", "--json").stdout)
        (count,) = [entry["nbd"]["counters"].get("writes", 0) for answer in before for entry in answer["entries"]
                    if entry["role"] == "client"]
        load = subprocess.Popen(["fio", "--name=w", "--ioengine=nbd", f"--uri={uri(disk)}", "--rw=randwrite", "--bs=64k",
                                 "--iodepth=32", "--size=64M", "--runtime=60", "--time_based", "--thread",
                                 f"--aux-path={tmp_path}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(str(disk)) as c:
                eventually(lambda: any(
                    entry["nbd"]["counters"].get("writes", 0) > count + 100  # noqa: B023
                    for answer in json.loads(run("stat", "--json").stdout) for entry in answer["entries"]
                    if entry["role"] == "client"))
                assert len(c.read(0, 4096)) == 4096
        finally:
            load.kill()
            load.wait()

    def settled() -> bool:
        return all(entry["nbd"]["counters"].get("open", 0) == 0 for answer in json.loads(run("stat", "--json").stdout)
                   for entry in answer["entries"] if entry["role"] == "client")

    eventually(settled)
    with connect(str(disk)) as c:
        data = random.Random(8).randbytes(MIB)
        c.write(12345, data)
        assert c.read(12345, MIB) == data


def test_a_server_killed_and_back(program: Start, lists: list[str], tmp_path: Path) -> None:
    """Outstanding NBD requests wait for it (policy queue), and all are answered by the next server."""
    image, path = tmp_path / "image", tmp_path / "s"
    image.write_bytes(bytes(16 * MIB))
    server = program("blk", *lists, "--device", str(image))
    client = program("blk", "--client", *lists, "--nbd", str(path))
    dice, model = random.Random(6), bytearray(16 * MIB)
    with connect(str(path)) as c:
        for life in range(3):
            cookies = []
            for i in range(400):
                offset, data = i * 40000 + life * 7, dice.randbytes(dice.randrange(1, 40000 - life * 7))
                cookies.append(c.submit(WRITE, offset, len(data), data, FUA if i % 50 == 0 else 0))
                model[offset:offset + len(data)] = data
                if i == 200:    # fewer than a connection may have in flight, or nothing more would be received
                    assert [c.answer(cookie).error for cookie in cookies[:170]] == [0] * 170
                    del cookies[:170]
                    server.end(signal.SIGKILL)
                if i == 240:
                    server = program("blk", *lists, "--device", str(image))
            assert [c.answer(cookie).error for cookie in cookies] == [0] * 230
        assert c.call(FLUSH).error == 0
        assert c.read(0, 16 * MIB) == model
    assert client.end()[0] == 0
    assert server.end() == (0, "")
    assert image.read_bytes() == model


def test_a_server_that_is_gone_for_good_or_away_at_the_end(program: Start, lists: list[str], tmp_path: Path) -> None:
    """SIGTERM of the client while requests wait for a server: they are answered with an error, and it ends with 0."""
    path = tmp_path / "s"
    server = program("blk", *lists, "--device", "ram:1M")
    client = program("blk", "--client", *lists, "--nbd", str(path))
    with connect(str(path)) as c:
        c.write(0, b"data")
        server.end(signal.SIGKILL)
        cookies = [c.submit(READ, i * 4096, 4096) for i in range(10)]
        client.process.send_signal(signal.SIGTERM)
        assert [c.answer(cookie).error for cookie in cookies] == [EIO] * 10
        assert c.closed()
    status, _ = client.end()
    assert status == 0 and not path.exists()
    run("doctor", "--fix")


def test_a_read_only_export(program: Start, lists: list[str], tmp_path: Path) -> None:
    """It says so, writes are refused, and the file does not change."""
    image, path = tmp_path / "image", tmp_path / "s"
    image.write_bytes(random.Random(7).randbytes(MIB))
    before = image.read_bytes()
    server = program("blk", *lists, "--device", str(image), "--read-only")
    client = program("blk", "--client", *lists, "--nbd", str(path))
    assert json.loads(tool("nbdinfo", "--json", uri(path)))["exports"][0]["is_read_only"] is True
    tool("nbdcopy", uri(path), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == before
    with connect(str(path)) as c:
        assert [c.call(WRITE, 0, 3, b"abc").error, c.call(WRITE_ZEROES, 0, 4096).error] == [EPERM, EPERM]
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    assert image.read_bytes() == before


def test_two_disks_and_a_name_to_be_quoted(program: Start, tmp_path: Path) -> None:
    """Sockets are paired with disks by position; a path with a space is one word of the line."""
    names = ["--req", f"{unique('a')},{unique('b')}", "--resp", f"{unique('c')},{unique('d')}"]
    server = program("blk", *names, "--device", "ram:1M,ram:2M")
    one, two = tmp_path / "one", tmp_path / "t w o"
    client = program("blk", "--client", *names, "--nbd", f"{one},{two}", "--attach", "none")
    assert [line.split()[3:] for line in client.lines] == [[str(MIB), "-", str(one)],
                                                           [str(2 * MIB), "-", f"{tmp_path}/t\\040w\\040o"]]
    for path, size in ((one, MIB), (two, 2 * MIB)):
        with connect(str(path)) as c:
            c.write(size - 3, b"end")
            assert c.read(size - 4, 4) == b"\0end"
    assert client.end() == (0, "")
    assert server.end() == (0, "")


MISUSE = {
    "of a server": ("--nbd {tmp}/s", 2, ["--nbd", "option of the client"]),
    "length of the list": ("--client --nbd {tmp}/s,{tmp}/t", 2, ["--nbd, entry 1", "no partner in --req"]),
    "an empty entry": ("--client --nbd ,", 2, ["--nbd, entry 0", "must not be empty"]),
    "a long path": ("--client --nbd /{long}", 2, ["--nbd, entry 0", "107 bytes"]),
    "a directory that is not there": ("--client --nbd {tmp}/none/s", 1, ["--nbd, entry 0", "No such file"]),
    "something else there": ("--client --nbd {tmp}/file", 1, ["--nbd, entry 0", "else than a socket"]),
    "another's socket": ("--client --nbd {tmp}/live", 1, ["--nbd, entry 0", "a process that listens there"]),
}


def traces(tmp_path: Path) -> dict[str, set[str]]:
    """What is on the machine of ours; nodes may be others'."""
    found = leftovers(tmp_path)
    del found["nodes"]
    return found


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told_in_one_line_and_undone(case: str, lists: list[str], tmp_path: Path) -> None:
    """Before anything is waited for; nothing is made, nothing of others' is touched."""
    words, status, expected = MISUSE[case]
    (tmp_path / "file").write_text("mine")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(tmp_path / "live"))
        live.listen(1)
        before = traces(tmp_path)
        done = run("blk", *lists, *(word.format(tmp=tmp_path, long="l" * 107) for word in words.split()))
        assert done.returncode == status, done.stderr
        assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("muenfast: ")
        for part in expected:
            assert part in done.stderr
        assert traces(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) in (["file", "live"], ["file", "live", "run"])


def test_a_client_killed_leaves_a_socket_that_goes(program: Start, lists: list[str], tmp_path: Path,
                                                   runtime: Path) -> None:
    """The next client on that path replaces it; doctor --fix removes it."""
    path = tmp_path / "s"
    server = program("blk", *lists, "--device", "ram:1M")
    client = program("blk", "--client", *lists, "--nbd", str(path))
    assert f"socket {path}" not in run("doctor").stdout
    client.end(signal.SIGKILL)
    assert path.is_socket()
    client = program("blk", "--client", *lists, "--nbd", str(path))
    with connect(str(path)) as c:
        assert c.read(0, 5) == bytes(5)
    client.end(signal.SIGKILL)
    assert str(path) in run("doctor").stdout
    fixed = run("doctor", "--fix").stdout
    assert f"removed: socket {path} (an NBD socket of process {client.pid}, which is dead)" in fixed
    assert not path.exists() and sockets.records(runtime) == []
    assert server.end()[0] == 0
    run("doctor", "--fix")


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")
def test_beside_a_block_device(program: Start, lists: list[str], tmp_path: Path) -> None:
    """--attach auto --nbd: both front ends of one disk; what one wrote and flushed the other reads."""
    path = tmp_path / "s"
    server = program("blk", *lists, "--device", "ram:16M")
    client = program("blk", "--client", *lists, "--nbd", str(path), "--attach", "auto")
    *_, device, there = client.lines[0].split()
    assert device.startswith("/dev/muendisk") and there == str(path)
    data = random.Random(9).randbytes(MIB)
    with connect(str(path)) as c:
        c.write(4096, data)
        with open(device, "r+b", buffering=0) as file:
            file.seek(4096)
            assert file.read(MIB) == data
            file.seek(8 * MIB)
            file.write(data)
            os.fsync(file)
        assert c.read(8 * MIB, MIB) == data
    assert client.end() == (0, "")
    assert not path.exists() and not os.path.lexists(device)
    assert server.end() == (0, "")


def test_the_time_that_a_record_needs(runtime: Path, tmp_path: Path) -> None:
    """A record without contents counts as being written while it is young; later it is a left-over."""
    sockets.Listener(str(tmp_path / "s")).close()
    record = runtime / "sockets" / "empty"
    record.touch()
    assert sockets.remove_dead(str(record), "") is False and record.exists()
    os.utime(record, (time.time() - 60,) * 2)
    assert sockets.remove_dead(str(record), "") is True and not record.exists()


# ---- the kernel's driver, which this machine need not have: tests/nbd_kernel.py is for one that does


class Driver:
    """Stands in for the nbd driver: takes the netlink command, and is the other end of the socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: dict[int, bytes] = {}
        self.connection: Connection | None = None
        self.devices: list[tuple[int, str]] = []
        self.said: list[str] = []
        monkeypatch.setattr(watchdog, "nbd_call", self.call)
        monkeypatch.setattr(watchdog, "nbd_devices", lambda known_by=None: [
            each for each in self.devices if known_by in (None, each[1])])
        monkeypatch.setattr(nbdkernel, "available", lambda: None)
        monkeypatch.setattr(nbdkernel.NbdAttachment, "_tune", lambda attachment: None)
        monkeypatch.setattr(nbdkernel, "_device_of", lambda number: os.makedev(43, number << 5))
        monkeypatch.setattr(block, "make_node", lambda name, device: self.said.append(f"node {name}"))

    def call(self, command: int, data: bytes) -> dict[int, bytes]:
        if command == watchdog.NBD_CMD_DISCONNECT:
            assert watchdog.attributes(data) == {1: struct.pack("=I", 7)}
            self.said.append("disconnect")
            self.devices.clear()
            assert self.connection is not None
            self.connection.socket.close()
            return {}
        self.settings = watchdog.attributes(data)
        item, = watchdog.attributes(self.settings[7]).values()
        fd, = struct.unpack("=I", watchdog.attributes(item)[1])
        self.connection = Connection(socket.socket(fileno=os.dup(fd)))
        self.devices.append((7, self.settings[10].rstrip(b"\0").decode()))
        return {1: struct.pack("=I", 7)}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


@pytest.mark.parametrize("options", [{}, {"block_size": 512, "discards": True}, {"read_only": True}])
def test_what_the_driver_is_told(kernel: Driver, runtime: Path, options: dict[str, Any]) -> None:
    """Size, block size, flags it knows, no timeouts, whose it is; then it is served without negotiation."""
    read_only = options.pop("read_only", False)
    server = nbd.NbdServer(Memory(1024, **options), "disk", read_only=read_only)
    attachment = nbdkernel.NbdAttachment.attach(server, "muendiskx", runtime)
    size = options.get("block_size", 4096)
    flags = 0b0000_1111 if read_only else 0b0110_1101 if options else 0b0100_1101
    numbers = {kind: struct.unpack("=Q", kernel.settings[kind])[0] for kind in (2, 3, 4, 5, 6, 8)}
    assert numbers == {2: 1024 * size, 3: size, 4: 0, 5: flags, 6: 0, 8: 0}
    assert kernel.devices == [(7, f"muenfast:muendiskx-{os.getpid()}:{runtime}")]
    assert nbdkernel.left_devices(runtime) == [(7, "muendiskx", os.getpid(), kernel.devices[0][1])]
    assert nbdkernel.left_devices(runtime.parent) == []
    assert nbdkernel.reclaim_name(runtime, "muendisky") == [] and kernel.said == ["node muendiskx"]
    assert attachment.device == "/dev/muendiskx" and not attachment.failed and kernel.said == ["node muendiskx"]
    assert kernel.connection is not None
    if not read_only:
        kernel.connection.write(4096, b"data" * 1024, FUA)
        assert kernel.connection.read(4096, 4096) == b"data" * 1024
    assert attachment.detach() == [] and attachment.detach() == []
    assert kernel.said == ["node muendiskx", "disconnect"]
    assert server.close() == []


def test_attaching_is_all_or_nothing(kernel: Driver, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the node cannot be made, the device is disconnected and the watchdog ended; where the driver refuses, too."""
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no room", "/dev/muendiskx")

    server = nbd.NbdServer(Memory(16), "disk")
    with monkeypatch.context() as patch:
        patch.setattr(block, "make_node", refuse)
        with pytest.raises(OSError, match="no room"):
            nbdkernel.NbdAttachment.attach(server, "muendiskx", runtime)
    assert kernel.said == ["disconnect"] and kernel.devices == []
    monkeypatch.setattr(watchdog, "nbd_call", refuse)
    with pytest.raises(OSError, match="no room"):
        nbdkernel.NbdAttachment.attach(server, "muendiskx", runtime)
    eventually(lambda: server.disk.connections == 0)
    assert server.close() == []


def test_a_disconnect_that_waits(kernel: Driver, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that waits for an answer that does not come: detach() shuts its socket down, and returns."""
    server = nbd.NbdServer(Memory(16), "disk")
    attachment = nbdkernel.NbdAttachment.attach(server, "muendiskx", runtime)
    assert kernel.connection is not None
    real = kernel.call

    def waits(command: int, data: bytes) -> dict[int, bytes]:
        assert kernel.connection is not None
        with contextlib.suppress(OSError):
            kernel.connection.socket.recv(1)
        return real(command, data)

    monkeypatch.setattr(watchdog, "nbd_call", waits)
    said = attachment.detach(0.2)
    assert len(said) == 1 and "did not answer for 0.2 s" in said[0]
    assert kernel.devices == []
    assert server.close() == []


@pytest.mark.parametrize("how", ["killed", "stuck", "done"])
def test_the_watchdog_of_the_driver(tmp_path: Path, how: str) -> None:
    """It ends the connection when its client dies or is late in detaching, and not when that is done."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sleeper = subprocess.Popen(["sleep", "600"])
        try:
            leash = Leash("nbd", sleeper.pid, [str(ours.fileno()), "muenfast:nobody-1:/none", str(tmp_path / "node")],
                          [ours.fileno()])
            theirs.settimeout(20)
            if how == "killed":
                sleeper.kill()
                sleeper.wait()
                assert theirs.recv(1) == b""
                assert leash._process.wait(20) == 1
            elif how == "stuck":
                assert leash.tell("detaching 0.1")
                assert theirs.recv(1) == b""
            leash.end()
            assert leash._process.returncode == (1 if how == "killed" else 0)
            theirs.setblocking(False)
            if how == "done":
                with pytest.raises(BlockingIOError):
                    theirs.recv(1)
        finally:
            sleeper.kill()
            sleeper.wait()


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this kernel has the driver: see tests/nbd_kernel.py")
def test_a_kernel_without_the_driver(lists: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--attach nbd says so at once, with the next step; netlink says that there is none."""
    done = run("blk", "--client", *lists, "--attach", "nbd")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("muenfast: --attach 'nbd': no front end for block devices is to be had here "
                                  "(the kernel has no nbd driver: ")
    assert "modprobe nbd" in done.stderr or "CONFIG_BLK_DEV_NBD" in done.stderr
    with pytest.raises(FileNotFoundError):
        watchdog.nbd_disconnect(0)
    assert watchdog.nbd_devices() == [] and watchdog.nbd_number("/dev/null") is None
    assert watchdog.nbd_release("muenfast:nobody-1:/none", "/dev/none") == []
    with pytest.raises(UsageError, match="nbd driver"):
        nbdkernel.NbdAttachment.attach(None, "muendiskx", "/none")  # type: ignore[arg-type]
    monkeypatch.setattr("platform.release", lambda: "5.13.1-x")
    assert nbdkernel.available() == "Linux 5.13.1-x is too old: boot 5.14 or later"
    monkeypatch.setattr(fuse, "available", lambda: "no FUSE either")
    from muenfast import blk

    with pytest.raises(UsageError, match=r"--attach 'auto': .*\(fuse: no FUSE either; nbd: Linux 5.13.1-x is too old"):
        blk.BlockClients([], attach="auto")


def test_attributes_of_netlink() -> None:
    """They are padded to four bytes, nest, and what is cut off ends the list."""
    data = watchdog.attribute(1, b"abc") + watchdog.attribute(2, b"") + watchdog.attribute(3, b"12345678")
    assert data == b"\7\0\1\0abc\0" + b"\4\0\2\0" + b"\x0c\0\3\0" + b"12345678"
    assert watchdog.attributes(data) == {1: b"abc", 2: b"", 3: b"12345678"}
    assert watchdog.attributes(data + b"\1\0\4\0") == {1: b"abc", 2: b"", 3: b"12345678"}


@pytest.mark.parametrize("text", ['{"socket": "/tmp/x", "pid": Infinity}', '{"socket": "/tmp/x", "pid": -1e999}',
                                  "[" * 100000, "[]", '{"socket": 7}', '{"socket": "/tmp/x", "pid": "many"}', ""])
def test_a_record_of_a_socket_that_is_none(tmp_path: Path, text: str) -> None:
    """Whatever stands in the books is read, or taken for a record without contents; doctor goes on."""
    room = tmp_path / "sockets"
    room.mkdir()
    (room / "1").write_text(text)
    assert sockets.records(tmp_path) == [(str(room / "1"), "", 0)]
