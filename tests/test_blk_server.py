"""muenfast's block server against the independent plain client, hostile ones, and what may stand behind an export."""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import queue
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, run
from helpers import TornWords, block, eventually
from peer import (
    BLOCK_BYTES,
    COMMAND,
    COMMAND_SIZE,
    COMMAND_SYNC,
    EVENT_BYTES,
    HEADER_BYTES,
    READ,
    REQUEST_PROTOCOL,
    RESPONSE_PROTOCOL,
    TRANSPORT_ID,
    WRITE,
    WSC,
    ChannelReader,
    ChannelWriter,
    Event,
    InlineClient,
    Result,
    channel_path,
)
from vectors_loader import EventVector, event_vectors

from muenfast import BlockServer, ClaimError, UsageError
from muenfast._ring import newest
from muenfast.blk import exports_from_lists

HOSTILE = str(Path(__file__).with_name("hostile_peer.py"))
REGION, ELEMENTS = 0x100000, 254  # the customary ones


class Raw:
    """A client by hand: a request writer, a response reader, nothing that waits or retries by itself."""

    def __init__(self, req: str, resp: str, epoch: int | None = None) -> None:
        self.writer = ChannelWriter(req, EVENT_BYTES, REQUEST_PROTOCOL, epoch=epoch)
        self.resp = resp
        self.reader: ChannelReader | None = None

    def send(self, *events: Event) -> None:
        self.writer.write_many([event.pack() for event in events])

    def read(self) -> tuple[Result, Event | None]:
        if self.reader is None:
            self.reader = ChannelReader(self.resp, RESPONSE_PROTOCOL, EVENT_BYTES, timeout=10)
        result, raw = self.reader.read()
        return result, None if raw is None else Event.unpack(raw)

    def answers(self, count: int, seconds: float = 20) -> list[Event]:
        """The next `count` answers; fails when the server restarts its channel in between."""
        found: list[Event] = []
        end = time.monotonic() + seconds
        while len(found) < count:
            result, event = self.read()
            if event is not None:
                found.append(event)
                continue
            assert result is not Result.OVERRUN_DETECTED
            assert not found or result is Result.NO_DATA, result
            assert time.monotonic() < end, f"{len(found)} of {count} answers, then {result}"
        return found

    def connect(self) -> int:
        """Begins a new epoch, waits for the answer to `size`; the sectors."""
        self.writer.activate()
        mark = random.getrandbits(32)
        self.send(Event(COMMAND, 0, COMMAND_SIZE, 1, mark))
        end = time.monotonic() + 20
        while True:
            _, event = self.read()
            if event is not None and (event.kind, event.id, event.priv) == (COMMAND, COMMAND_SIZE, mark):
                return int.from_bytes(event.data[:8], "little")
            assert time.monotonic() < end, "no answer to `size`"

    def close(self) -> None:
        self.writer.close()
        if self.reader is not None:
            self.reader.close()


class Link:
    """A pair of channel names, and everything that was opened on them. shared: an export shares its thread with another
    one, where its disk lets it."""

    def __init__(self, names: Callable[[str], str], program: Callable[..., Program], shared: bool = False) -> None:
        self.req, self.resp = names("req"), names("resp")
        self._other = (names("other-req"), names("other-resp")) if shared else None
        self._program = program
        self._stack = ExitStack()

    def serve(self, device: str = "ram:1M", **lists: Any) -> BlockServer:
        """A server in this process; its first export is the one of these channels."""
        req, resp = self.req, self.resp
        if self._other is not None:
            req, resp, device = f"{req},{self._other[0]}", f"{resp},{self._other[1]}", f"{device},ram:1M"
            lists = {name: f"{value},{value}" if isinstance(value, str) else value for name, value in lists.items()}
        server = BlockServer(exports_from_lists(req, resp, device=device, **{"poll": 100, **lists}), threads=1)
        self._stack.callback(server.close)
        return server

    def program(self, device: str, *more: str) -> Program:
        """A server in a process of its own."""
        server = self._program("blk", "--req", self.req, "--resp", self.resp, "--device", device, "--poll", "100", *more)
        self._stack.callback(server.end)
        return server

    def client(self, **options: Any) -> InlineClient:
        client = InlineClient(self.req, self.resp, **{"timeout": 20, **options})
        self._stack.callback(client.close)
        return client

    def raw(self, epoch: int | None = None) -> Raw:
        raw = Raw(self.req, self.resp, epoch)
        self._stack.callback(raw.close)
        return raw

    def make(self) -> None:
        """Makes the channels, which then stay whoever leaves: plain peers are in nobody's books."""
        for name in (self.req, self.resp):
            with open(channel_path(name), "xb") as file:
                file.truncate(REGION)

    def close(self) -> None:
        self._stack.close()
        for name in (self.req, self.resp):  # those that a plain peer made stay, and their bells where a kill left one
            for path in (channel_path(name), channel_path(name) + ".bell"):
                if os.path.exists(path):
                    os.unlink(path)


@pytest.fixture
def new_link(names: Callable[[str], str], program: Callable[..., Program]) -> Iterator[Callable[..., Link]]:
    """Makes Links, closed at the end."""
    with ExitStack() as stack:
        def make(shared: bool = False) -> Link:
            link = Link(names, program, shared)
            stack.callback(link.close)
            return link

        yield make


@pytest.fixture(params=[False, True], ids=["alone", "shared"])
def link(new_link: Callable[..., Link], request: pytest.FixtureRequest) -> Link:
    """With a thread of its own, and with one that serves another export, too."""
    return new_link(request.param)


def counters(server: BlockServer | Program) -> dict[str, int]:
    """Of the first export."""
    if isinstance(server, BlockServer):
        return server.exports[0].server.counters
    answers = json.loads(run("stat", "--json").stdout)
    (answer,) = [a for a in answers if a["pid"] == server.pid]
    return answer["entries"][0]["counters"]  # type: ignore[no-any-return]


# ------------------------------------------------------------------ good requests


def test_a_plain_client_reads_back_what_it_wrote(link: Link) -> None:
    """size tells the disk's sectors; blocks are zero, then what was written; sync is answered; all are counted."""
    server, client = link.serve("ram:64K"), link.client()
    assert client.connect() == 64 * 1024 // 512
    assert client.read(15) == bytes(BLOCK_BYTES)
    for i in range(16):
        client.write(i, block(i + 1))
    client.sync()
    assert [client.read(i) for i in range(16)] == [block(i + 1) for i in range(16)]
    n = counters(server)
    assert (n["reads"], n["writes"], n["syncs"], n["sizes"], n["rejected"]) == (17, 16, 1, 1, 0)
    assert (n["bytes_read"], n["bytes_written"]) == (17 * BLOCK_BYTES, 16 * BLOCK_BYTES)


@pytest.mark.parametrize("vector", event_vectors(), ids=lambda v: v.name)
def test_event_vectors(link: Link, vector: EventVector) -> None:
    """The bytes of each hand-written request get the hand-written answer."""
    link.serve(f"ram:{vector.blocks * BLOCK_BYTES}")
    client = link.raw()
    assert client.connect() == vector.blocks * 8
    client.send(*(Event(WRITE, 0, i, 1, i, bytes([vector.fill]) * BLOCK_BYTES) for i in range(vector.blocks)))
    client.answers(vector.blocks)
    client.writer.write(vector.request)
    (answer,) = client.answers(1)
    expected = Event.unpack(vector.response)
    assert answer[:5] == expected[:5]
    if answer.kind == READ or (answer.kind, answer.id) == (COMMAND, COMMAND_SIZE):
        assert answer.data == expected.data
    if answer.kind == WRITE:
        client.send(Event(READ, 0, answer.id, 1, 77))
        assert client.answers(1)[0].data == Event.unpack(vector.request).data


@pytest.mark.parametrize("store", ["ram", "file"])
@pytest.mark.parametrize("seed", range(3))
def test_batches_of_mixed_kinds_keep_their_order(link: Link, tmp_path: Path, store: str, seed: int) -> None:
    """Reads, writes and syncs of one batch that overlap see each other in the order in which they were written."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8 * BLOCK_BYTES))
    link.serve("ram:32K" if store == "ram" else str(disk))
    client, dice = link.raw(), random.Random(seed)
    client.connect()
    model, priv = [bytes(BLOCK_BYTES)] * 8, 0
    for _ in range(12):
        events, expected = [], []
        at = dice.randrange(8)
        for _ in range(dice.randrange(1, ELEMENTS + 1)):
            at = dice.choice([at, (at + 1) % 8, (at + 1) % 8, dice.randrange(8)])
            kind = dice.choice([READ, WRITE, WRITE, READ, COMMAND] if dice.random() < 0.1 else [READ, WRITE])
            priv += 1
            data = block(priv) if kind == WRITE else b""
            events.append(Event(kind, 0, COMMAND_SYNC if kind == COMMAND else at, 1, priv, data))
            if kind == WRITE:
                model[at] = data
            expected.append(model[at] if kind == READ else None)
        client.send(*events)
        answers = sorted(client.answers(len(events)), key=lambda answer: answer.priv)   # a file answers out of order
        for event, answer, data in zip(events, answers, expected, strict=True):
            assert answer[:5] == event[:5]
            assert data is None or answer.data == data


@pytest.mark.parametrize("epoch", [77, None], ids=["the same epoch", "many epochs"])
def test_counters_that_contradict_each_other(link: Link, epoch: int | None) -> None:
    """A header with WSC below WC looks like a start at every look: it is looked at a hundred times a second, no more;
    an honest client that comes then is served."""
    server = link.serve("ram:1M").exports[0]
    with open(channel_path(link.req), "r+b") as file, mmap.mmap(file.fileno(), 64) as header:
        elements = (os.path.getsize(channel_path(link.req)) - 64) // EVENT_BYTES
        struct.pack_into("<8Q", header, 0, TRANSPORT_ID, 0, REQUEST_PROTOCOL, EVENT_BYTES, elements, 0, 0, 10)
        struct.pack_into("<Q", header, 8, 77)
        eventually(lambda: server.server.counters["connections"] > 3)
        before, end = server.server.counters["connections"], time.monotonic() + 0.5
        if epoch is None:
            while time.monotonic() < end:
                struct.pack_into("<Q", header, 8, random.randrange(1, 1 << 63))
        else:
            time.sleep(0.5)
            assert server.server.counters["connections"] - before < 100
    client = link.raw()
    client.connect()
    client.send(Event(WRITE, 0, 3, 1, 1, block(3)), Event(READ, 0, 3, 1, 2))
    assert [answer.data for answer in client.answers(2)][1] == block(3)


def test_neighbours_are_merged(link: Link, tmp_path: Path) -> None:
    """Consecutive blocks of one batch are one operation on the store, each with an answer of its own; a gap, another
    kind or the same block again ends the run."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(64 * BLOCK_BYTES))
    server, client = link.serve(str(disk)), link.raw()
    client.connect()
    client.send(*(Event(WRITE, 0, i, 1, i, block(i)) for i in range(64)))
    assert [answer.priv for answer in client.answers(64)] == list(range(64))
    assert counters(server)["merged"] == 63
    client.send(*(Event(READ, 0, i, 1, p, b"") for p, i in enumerate([1, 1, 2, 4, 5])))
    answers = {answer.priv: answer.data for answer in client.answers(5)}    # of three runs, in any order
    assert answers == {p: block(i) for p, i in enumerate([1, 1, 2, 4, 5])}
    assert counters(server)["merged"] == 65
    assert disk.read_bytes() == b"".join(block(i) for i in range(64))


def test_a_response_ring_smaller_than_the_request_ring(link: Link) -> None:
    """A batch is never larger than what the response ring holds."""
    for elements in (1, 5):
        with open(channel_path(link.resp), "wb") as file:
            file.truncate(HEADER_BYTES + elements * EVENT_BYTES)
        server, client = link.serve(), link.raw()
        client.connect()
        for round_ in range(40):
            priv = round_ * elements
            client.send(*(Event(WRITE, 0, i, 1, priv + i, block(priv + i)) for i in range(elements)))
            assert [a.priv for a in client.answers(elements)] == list(range(priv, priv + elements))
            client.send(*(Event(READ, 0, i, 1, i) for i in range(elements)))
            assert [a.data for a in client.answers(elements)] == [block(priv + i) for i in range(elements)]
        client.close()
        server.close()


@pytest.mark.parametrize("ram", [True, False])
def test_more_requests_at_once_than_the_response_ring_holds(new_link: Callable[..., Link], tmp_path: Path,
                                                            ram: bool) -> None:
    """They are executed in rounds, each answered within the ring: a client that does not keep up misses answers. (Rounds
    of a file are longer than those of a RAM disk, and than this ring.)"""
    link, disk = new_link(), tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with open(channel_path(link.resp), "wb") as file:
        file.truncate(HEADER_BYTES + 5 * EVENT_BYTES)
    server, client = link.program("ram:1M" if ram else str(disk)), link.raw()
    client.connect()
    client.send(*(Event(WRITE, 0, i, 1, i, block(i)) for i in range(64)))

    def last() -> list[tuple[int, int]]:
        found, _ = newest(bytearray(Path(channel_path(link.resp)).read_bytes()), 5)
        return [(number, Event.unpack(raw).priv) for number, raw in found]

    eventually(lambda: last() == [(60 + k, 59 + k) for k in range(5)])  # the answer to `size` was number 0
    client.connect()
    for i in (0, 31, 63):
        client.send(Event(READ, 0, i, 1, i))
        assert client.answers(1)[0].data == block(i)
    assert server.end()[0] == 0


def test_one_process_several_exports(new_link: Callable[[], Link], tmp_path: Path) -> None:
    """Each pair of channels has a disk of its own."""
    links, disks = [new_link() for _ in range(3)], []
    for i in range(3):
        disks.append(tmp_path / f"disk{i}")
        disks[i].write_bytes(bytes((i + 1) * BLOCK_BYTES))
    with BlockServer(exports_from_lists(",".join(l.req for l in links), ",".join(l.resp for l in links),
                                        device=",".join(map(str, disks)))) as server:
        clients = [one.client() for one in links]
        assert [client.connect() for client in clients] == [8, 16, 24]
        for i, client in enumerate(clients):
            client.write(i, block(i + 7))
        assert [disk.read_bytes()[-BLOCK_BYTES:] for disk in disks] == [block(7), block(8), block(9)]
        assert [entry["state"] for entry in server.status()] == ["connected"] * 3


# ------------------------------------------------------------------ nonsense


NONSENSE = [
    *(Event(kind, 0, 0, 1, 0) for kind in (3, 4, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
    *(Event(kind, 0, 0, valid, 0) for kind in (READ, WRITE, COMMAND) for valid in (0, 2, 0xFFFFFFFF)),
    *(Event(kind, 0, block_, 1, 0) for kind in (READ, WRITE)
      for block_ in (16, 17, 1 << 32, 1 << 52, (1 << 52) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)),
    *(Event(COMMAND, 0, command, 1, 0) for command in (2, 3, 1 << 32, 1 << 63, (1 << 64) - 1)),
]


def test_nonsense_is_answered_with_an_error(link: Link) -> None:
    """A request that breaks a rule gets its own answer, an error, and is counted; its neighbours in the batch are
    executed, and the disk is as it was."""
    server, client, dice = link.serve("ram:64K"), link.raw(), random.Random(7)
    client.connect()
    client.send(*(Event(WRITE, 0, i, 1, i, block(i)) for i in range(16)))
    client.answers(16)
    for _ in range(20):
        events = [event._replace(priv=i, data=block(0xBAD)) for i, event in enumerate(NONSENSE)]
        events += [Event(READ, 0, i % 16, 1, len(NONSENSE) + i) for i in range(32)]
        dice.shuffle(events)
        client.send(*events)
        for event, answer in zip(events, client.answers(len(events)), strict=True):
            assert (answer.kind, answer.id, answer.priv) == (event.kind, event.id, event.priv)
            if event.priv < len(NONSENSE):
                assert answer.error == -errno.EINVAL
                assert answer.data == bytes(BLOCK_BYTES)
            else:
                assert (answer.error, answer.data) == (0, block(event.id))
    assert counters(server)["rejected"] == 20 * len(NONSENSE)


def test_read_only(link: Link) -> None:
    """A read-only export refuses writes with EROFS and reads and syncs on."""
    server, client = link.serve("ram:64K", read_only="yes"), link.client()
    client.connect()
    with pytest.raises(OSError) as caught:
        client.write(3, block(1))
    assert caught.value.errno == errno.EROFS
    client.sync()
    assert client.read(3) == bytes(BLOCK_BYTES)
    assert (counters(server)["rejected"], counters(server)["writes"]) == (1, 0)


# ------------------------------------------------------------------ coming and going


def test_a_client_that_comes_back_at_once_a_thousand_times(link: Link) -> None:
    """New epochs, one on the heels of the other, with requests of the last life unread: each life gets its own
    right answers and sees what earlier ones wrote."""
    server, client = link.serve("ram:64K"), link.client()
    for life in range(1000):
        client.connect()
        if life:
            assert client.read((life - 1) % 16) == block(life - 1)
        client.write(life % 16, block(life))
        if life % 3 == 0:
            client.request(READ, 5)  # nobody waits for this one
    assert counters(server)["connections"] >= 1000
    assert counters(server)["rejected"] == 0


def test_a_client_with_epoch_1_that_comes_back_a_thousand_times(link: Link) -> None:
    """Always the same epoch, as Muen's peers have it: told apart by the response channel going inactive."""
    server, client = link.serve("ram:64K"), link.client(epoch=1)
    for life in range(1000):
        client.connect()
        if life:
            assert client.read((life - 1) % 16) == block(life - 1)
        client.write(life % 16, block(life))
        client.disconnect()
        assert client._resp is not None
        eventually(lambda: not client._resp.active)
    assert counters(server)["connections"] == 1000


def test_a_client_with_epoch_1_that_only_asks_the_size_and_comes_back_at_once(link: Link) -> None:
    """The server may see neither the inactive moment nor a lower counter: it has one request of each life."""
    server, client = link.serve("ram:64K"), link.client(epoch=1)
    for _ in range(200):
        client.connect()
    assert counters(server)["connections"] == 200


def test_requests_of_an_earlier_life_are_void(link: Link) -> None:
    """A server that finds requests in its first epoch answers `size` alone, wherever it stands, and executes what
    is written afterwards: a predecessor may have done the rest."""
    client = link.raw()
    client.writer.activate()
    client.send(Event(WRITE, 0, 0, 1, 1, block(1)), Event(COMMAND, 0, COMMAND_SIZE, 1, 2), Event(READ, 0, 0, 1, 3),
                Event(COMMAND, 0, COMMAND_SYNC, 1, 4), Event(COMMAND, 0, COMMAND_SIZE, 1, 5))
    server = link.serve("ram:64K")
    assert [(a.priv, a.error) for a in client.answers(2)] == [(2, 0), (5, 0)]
    client.send(Event(READ, 0, 0, 1, 6))
    (answer,) = client.answers(1)
    assert (answer.priv, answer.data) == (6, bytes(BLOCK_BYTES))
    assert counters(server)["voided"] == 3
    client.connect()  # an epoch of this life: everything counts
    client.send(Event(WRITE, 0, 0, 1, 7, block(7)), Event(READ, 0, 0, 1, 8))
    assert client.answers(2)[1].data == block(7)
    assert counters(server)["voided"] == 3


def test_a_ring_that_went_round_before_the_server_came_is_no_overrun(link: Link) -> None:
    """What a predecessor answered is void, however much it was, and also where its client is just writing the next one:
    neither an overrun nor lost."""
    client = link.raw()
    client.writer.activate()
    for number in range(3 * ELEMENTS):
        client.send(Event(READ, 0, 0, 1, number))
    server = link.serve("ram:64K")
    eventually(lambda: counters(server)["connections"])
    client.send(Event(WRITE, 0, 3, 1, 7, block(7)), Event(READ, 0, 3, 1, 8))
    assert [(a.priv, a.error) for a in client.answers(2)] == [(7, 0), (8, 0)]
    n = counters(server)
    assert (n["overruns"], n["lost"], n["voided"], n["reads"], n["writes"]) == (0, 0, 3 * ELEMENTS, 1, 1)


def test_a_ring_that_goes_round_as_the_server_comes_is_no_overrun(tmp_path: Path) -> None:
    """What is written behind what a predecessor answered is executed, and the client did not overrun anybody."""
    from muenfast._blk import Server
    from muenfast._store import Store

    writer = ChannelWriter(str(tmp_path / "req"), EVENT_BYTES, REQUEST_PROTOCOL, REGION)
    with (tmp_path / "req").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        writer.activate()
        for number in range(2 * ELEMENTS):
            writer.write(Event(WRITE, 0, 0, 1, number).pack())
        server = Server(memory, bytearray(REGION), Store.null(1 << 20))
        assert server.run(0) == "connected"
        for number in range(10):
            writer.write(Event(READ, 0, 0, 1, number).pack())
        assert server.run(0.01) == "tick"
        n = server.counters
        assert (n["overruns"], n["lost"], n["voided"], n["reads"], n["writes"]) == (0, 0, 2 * ELEMENTS, 10, 0)
        server.close()
        writer.close()


def test_void_requests_that_are_being_overwritten_are_no_overrun(link: Link) -> None:
    """The first synchronisation misses them, and nobody waits for them."""
    client = link.raw()
    client.writer.activate()
    client.send(*(Event(READ, 0, 0, 1, number) for number in range(3)))
    client.writer._words[WSC] = 3 + ELEMENTS
    server = link.serve("ram:64K")
    eventually(lambda: counters(server)["voided"])
    client.send(Event(READ, 0, 3, 1, 8))
    assert [(a.priv, a.error) for a in client.answers(1)] == [(8, 0)]
    n = counters(server)
    assert (n["overruns"], n["lost"], n["voided"], n["reads"]) == (0, 0, 3, 1)


def test_a_client_that_connected_before_its_server(link: Link) -> None:
    """The known client writes `size` once and waits: a server that starts later answers it."""
    client = link.client()
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(client.connect(timeout=30)))
    thread.start()
    time.sleep(0.05)
    link.serve("ram:64K")
    thread.join()
    assert done == [128]
    client.write(1, block(1))
    assert client.read(1) == block(1)


def test_a_server_that_restarts_under_its_client(link: Link, tmp_path: Path) -> None:
    """The client sees the response channel go; after it connected again its data is there."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 * BLOCK_BYTES))
    link.make()
    client = link.client()
    for life in range(5):
        server = link.serve(str(disk))
        client.connect()
        assert life == 0 or client.read(life - 1) == block(life)
        client.write(life, block(life + 1))
        server.close()
        with pytest.raises(ConnectionResetError):
            client.read(0)


def test_the_answers_to_an_abandoned_epoch_are_withheld(link: Link) -> None:
    """A client with few tags that begins anew never gets an answer of its last life in the new response epoch."""
    link.serve("ram:1M")
    client = link.raw()
    client.connect()
    for life in range(200):
        client.send(*(Event(WRITE, 0, i, 1, i, block(life)) for i in range(64)))
        if life % 2:
            time.sleep(0.0002)
        client.writer.activate()
        client.send(Event(READ, 0, life % 7, 1, 1000 + life))
        end = time.monotonic() + 20
        epoch_seen = False
        while True:  # first whatever was published in the old epoch
            result, event = client.read()
            epoch_seen = epoch_seen or result is Result.EPOCH_CHANGED
            if event is not None and epoch_seen:
                assert event.priv >= 1000, "an answer of the earlier life"
            if event is not None and event.priv == 1000 + life:
                assert epoch_seen
                break
            assert time.monotonic() < end


def test_a_request_ring_that_overran(link: Link, tmp_path: Path) -> None:
    """What a client wrote beyond the ring is counted as lost; the response channel's epoch changes, which tells the
    client; service goes on."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 * BLOCK_BYTES))
    server, client = link.program(str(disk)), link.raw()
    client.connect()
    assert client.reader is not None
    os.kill(server.pid, signal.SIGSTOP)
    stat = Path(f"/proc/{server.pid}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    try:
        for _ in range(3):
            client.send(*(Event(READ, 0, i % 16, 1, i) for i in range(ELEMENTS)))
    finally:
        os.kill(server.pid, signal.SIGCONT)
    eventually(lambda: client.read()[0] is Result.EPOCH_CHANGED)
    found = counters(server)
    assert found["overruns"] == 1, found
    assert found["lost"] + found["reads"] == 3 * ELEMENTS
    client.connect()
    client.send(Event(WRITE, 0, 1, 1, 9, block(9)), Event(READ, 0, 1, 1, 10))
    assert client.answers(2)[1].data == block(9)
    assert server.end()[0] == 0


@pytest.mark.parametrize("wrong", ["protocol", "size"])
def test_a_channel_that_does_not_fit_is_ignored(link: Link, caplog: pytest.LogCaptureFixture, wrong: str) -> None:
    """Another protocol or element size: one line in the log that names both, no answer, and service as soon as the
    channel is right - under the same epoch, and again when it is wrong again."""
    caplog.set_level(logging.WARNING, "muenfast")
    server = link.serve("ram:64K")
    for round_ in range(2):
        caplog.clear()
        size = EVENT_BYTES if wrong == "protocol" else EVENT_BYTES // 2
        foreign = ChannelWriter(link.req, size, 0xABC if wrong == "protocol" else REQUEST_PROTOCOL, epoch=1)
        foreign.activate()
        foreign.write(bytes(size))
        eventually(lambda: "abc" in caplog.text if wrong == "protocol" else "size 2060" in caplog.text)
        assert link.req in caplog.text
        assert server.status()[0]["state"] == "waiting"
        foreign.deactivate()
        foreign.close()
        client = link.client(epoch=1)
        client.connect()
        client.write(1, block(round_ + 1))
        assert client.read(1) == block(round_ + 1)
        client.close()  # without leaving: what is wrong follows what was right
        time.sleep(1.1)  # warnings are at least a second apart


# ------------------------------------------------------------------ hostile ones


def _hostile(path: str, protocol: int, seconds: float, seed: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, HOSTILE, path, f"{protocol:x}", str(seconds), str(seed)])


@pytest.mark.stress
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_hostile_writer_harms_nobody_else(new_link: Callable[[], Link], program: Callable[..., Program],
                                            threads: str) -> None:
    """Header and slots of one request channel change at full speed for 5 s: the other export's client gets right
    answers meanwhile, the log stays short, and after that an honest client is served on the channel."""
    bad, good = new_link(), new_link()
    server = program("blk", "--req", f"{bad.req},{good.req}", "--resp", f"{bad.resp},{good.resp}",
                     "--device", "ram:64K,ram:1M", "--threads", threads)
    attacker = _hostile(channel_path(bad.req), REQUEST_PROTOCOL, 5, 1)
    client, dice, model = good.client(), random.Random(1), [bytes(BLOCK_BYTES)] * 256
    client.connect()
    while attacker.poll() is None:
        i = dice.randrange(256)
        assert client.read(i) == model[i]
        model[i] = block(dice.getrandbits(64))
        client.write(i, model[i])
    assert attacker.returncode == 0
    honest = bad.client()
    assert honest.connect(timeout=20) == 128
    honest.write(1, block(1))
    assert honest.read(1) == block(1)
    status, errors = server.end()
    assert status == 0
    assert len(errors.splitlines()) < 40


_LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from peer import *
client = InlineClient(sys.argv[2], sys.argv[3])
client.connect()
while True:
    for i in range(64):
        client.request(WRITE, i, b"x" * BLOCK_BYTES)
    for i in range(64):
        client.wait_response()
"""


@pytest.mark.parametrize("which", ["req", "resp"])
def test_a_channel_truncated_under_load(new_link: Callable[[], Link], program: Callable[..., Program],
                                        which: str) -> None:
    """The server lives, its other exports serve on, and the channel works again once it was made anew."""
    bad, good = new_link(), new_link()
    server = program("blk", "--req", f"{bad.req},{good.req}", "--resp", f"{bad.resp},{good.resp}",
                     "--device", "ram:1M,ram:1M", "--poll", "100")
    client = good.client()
    client.connect()
    load = subprocess.Popen([sys.executable, "-c", _LOAD, str(Path(__file__).parent), bad.req, bad.resp],
                            stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: counters(server)["writes"] > 500)
        os.truncate(channel_path(getattr(bad, which)), 4096)
        client.write(3, block(3))
        assert client.read(3) == block(3)
    finally:
        load.kill()
        load.wait()
    os.unlink(channel_path(getattr(bad, which)))
    fresh = bad.client()
    eventually(lambda: _connects(fresh))
    fresh.write(5, block(5))
    assert fresh.read(5) == block(5)
    assert server.end()[0] == 0


def _connects(client: InlineClient) -> bool:
    """Tries once, quickly. A reader of a region that was replaced would wait for ever, so it is opened anew."""
    if client._resp is not None:
        client._resp.close()
        client._resp = None
    try:
        client.connect(timeout=1)
    except (TimeoutError, ConnectionResetError):
        return False
    return True


@pytest.mark.parametrize("client_stays", [False, True])
def test_channels_removed_and_made_anew(link: Link, client_stays: bool) -> None:
    """Names are followed while nothing happens: also where a client that was killed left its channel active."""
    server = link.serve("ram:64K")
    first = link.client()
    first.connect()
    first.write(2, block(2))
    if not client_stays:
        first.disconnect()
        eventually(lambda: server.status()[0]["state"] == "waiting")
    for name in (link.req, link.resp):
        os.unlink(channel_path(name))
    second = link.client()
    eventually(lambda: _connects(second))
    assert second.read(2) == block(2)
    assert counters(server)["writes"] == 1


# ------------------------------------------------------------------ what stands behind


def test_null(link: Link) -> None:
    """A null disk has a size, forgets writes and reads zeros."""
    link.serve("null:1G")
    client = link.client()
    assert client.connect() == (1 << 30) // 512
    client.write(1000, block(1))
    client.sync()
    assert client.read(1000) == bytes(BLOCK_BYTES)


def test_a_file(link: Link, tmp_path: Path) -> None:
    """What was written and synced is in the file when the answer is there, at its place and nowhere else."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"".join(block(i) for i in range(32)))
    server = link.program(str(disk))
    client = link.client()
    assert client.connect() == 256
    assert client.read(31) == block(31)
    client.write(17, block(1717))
    client.sync()
    assert disk.read_bytes() == b"".join(block(1717 if i == 17 else i) for i in range(32))
    assert server.end()[0] == 0


def test_a_file_of_an_odd_size(link: Link, tmp_path: Path) -> None:
    """A tail that is no whole block is no part of the disk and is left alone."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(3 * BLOCK_BYTES) + b"tail" * 100)
    link.serve(str(disk))
    client = link.client()
    assert client.connect() == 24
    client.write(2, block(2))
    with pytest.raises(OSError):
        client.write(3, block(3))
    assert disk.read_bytes() == bytes(2 * BLOCK_BYTES) + block(2) + b"tail" * 100


def test_a_file_that_shrinks(link: Link, tmp_path: Path) -> None:
    """A file cut short behind the server's back answers with an error, and nothing of an earlier answer leaks."""
    disk = tmp_path / "disk"
    disk.write_bytes(block(1) * 16)
    server, client = link.serve(str(disk)), link.raw()
    client.connect()
    client.send(*(Event(READ, 0, i, 1, i) for i in range(16)))
    client.answers(16)
    os.truncate(disk, 8 * BLOCK_BYTES)
    for _ in range(16):  # all slots have held data by now
        client.send(*(Event(READ, 0, 8 + i % 8, 1, i) for i in range(16)))
        assert {(a.error, a.data) for a in client.answers(16)} == {(-errno.EIO, bytes(BLOCK_BYTES))}
    client.send(Event(READ, 0, 7, 1, 99))
    assert client.answers(1)[0].data == block(1)
    assert counters(server)["failed"] == 256


def test_a_ram_disk_that_is_taken_away(link: Link, names: Callable[[str], str]) -> None:
    """A named RAM disk truncated by somebody: no block of it is answered with success any more, the zeros that stand
    there now least of all."""
    name = names("disk")
    server, client = link.serve(f"ram:64K:{name}"), link.raw()
    client.connect()
    client.send(Event(WRITE, 0, 3, 1, 1, block(3)), Event(READ, 0, 3, 1, 2))
    assert client.answers(2)[1].data == block(3)
    os.truncate(channel_path(name), 0)
    for priv in range(3):
        client.send(Event(READ, 0, 3, 1, priv), Event(WRITE, 0, 4, 1, priv, block(4)))
        assert [(a.error, a.data) for a in client.answers(2)][0] == (-errno.EIO, bytes(BLOCK_BYTES))
    client.send(Event(WRITE, 0, 4, 1, 9, block(4)))
    assert client.answers(1)[0].error == -errno.EIO
    server.close()
    os.unlink(channel_path(name))


def test_a_read_only_file(link: Link, tmp_path: Path) -> None:
    """A read-only export takes a file that may not be written, shared with other readers, and leaves it as it is."""
    disk = tmp_path / "disk"
    disk.write_bytes(block(5) * 4)
    disk.chmod(0o400)
    link.serve(str(disk), read_only="yes")
    client = link.client()
    client.connect()
    assert client.read(3) == block(5)
    with pytest.raises(OSError) as caught:
        client.write(3, block(1))
    assert caught.value.errno == errno.EROFS
    client.sync()
    assert disk.read_bytes() == block(5) * 4


def test_a_file_has_one_writer(new_link: Callable[[], Link], tmp_path: Path, names: Callable[[str], str]) -> None:
    """A file or named RAM disk is exported once: not twice by one process, nor by two; readers share."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 * BLOCK_BYTES))
    first, second = new_link(), new_link()
    with pytest.raises(UsageError) as twice:
        exports_from_lists(f"{first.req},{second.req}", f"{first.resp},{second.resp}", device=f"{disk},{disk}")
    assert "entry 1" in str(twice.value)
    server = first.program(str(disk))
    with pytest.raises(ClaimError) as caught:
        second.serve(str(disk))
    assert str(server.pid) in str(caught.value)
    with pytest.raises(ClaimError):
        second.serve(str(disk), read_only="yes")
    assert server.end()[0] == 0
    with BlockServer(exports_from_lists(f"{first.req},{second.req}", f"{first.resp},{second.resp}",
                                        device=f"{disk},{disk}", read_only="yes")):
        pass
    kept = names("disk")
    with pytest.raises(UsageError):
        exports_from_lists(f"{first.req},{second.req}", f"{first.resp},{second.resp}",
                           device=f"ram:64K:{kept},ram:64K:{kept}")


def test_a_channel_has_one_server(link: Link, new_link: Callable[[], Link]) -> None:
    """A second server on a response channel is refused by name of the first."""
    server = link.program("ram:64K")
    with pytest.raises(ClaimError) as caught:
        link.serve("ram:64K")
    assert str(server.pid) in str(caught.value)
    assert "resp, entry 0" in str(caught.value) and "--" not in str(caught.value)


@pytest.mark.parametrize("device", ["missing", "directory", "short"])
def test_no_disk(link: Link, tmp_path: Path, device: str) -> None:
    """A file that is missing, no file or too short is refused by option, entry and value; nothing is left."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "short").write_bytes(bytes(BLOCK_BYTES - 1))
    path = str(tmp_path / device)
    with pytest.raises(UsageError) as caught:
        link.serve(path)
    assert (caught.value.option, caught.value.index, caught.value.value) == ("device", 0, path)
    ended = run("blk", "--req", link.req, "--resp", link.resp, "--device", path)
    assert ended.returncode == 2
    assert path in ended.stderr
    assert not os.path.exists(channel_path(link.req))


@pytest.mark.root
def test_a_block_device(link: Link, new_link: Callable[[], Link], tmp_path: Path) -> None:
    """A disk is exported as a file is, and by one server only; the kernel, too, sees it taken."""
    if os.geteuid() != 0:
        pytest.skip("needs root: loop devices")
    image = tmp_path / "image"
    image.write_bytes(block(3) * 64)
    made = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        server = link.program(device)
        client = link.client()
        assert client.connect() == 512
        assert client.read(63) == block(3)
        client.write(5, block(55))
        client.sync()
        with pytest.raises(ClaimError):
            new_link().serve(device)
        with pytest.raises(OSError) as caught:
            os.close(os.open(device, os.O_RDWR | os.O_EXCL))
        assert caught.value.errno == errno.EBUSY
        assert server.end()[0] == 0
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert image.read_bytes()[5 * BLOCK_BYTES:6 * BLOCK_BYTES] == block(55)


@pytest.mark.root
def test_a_file_behind_a_loop_device(link: Link, tmp_path: Path) -> None:
    """Somebody may have mounted that: it is served read-only, or not at all."""
    image = tmp_path / "image"
    image.write_bytes(block(3) * 64)
    device = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True,
                            check=True).stdout.strip()
    try:
        with pytest.raises(ClaimError, match=f"already held by the loop device {device}"):
            link.serve(str(image))
        with link.serve(str(image), read_only="yes"):
            pass
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    with link.serve(str(image)):
        pass


def test_a_client_that_stores_its_counters_in_pieces(link: Link) -> None:
    """A plain peer in Python: half-stored counters are no restart, nothing is executed twice or lost."""
    client = link.client()
    with link.serve() as server:
        client._req._words = TornWords(client._req._words)
        client.connect()
        for number in range(3000):
            client.write(number % 7, block(number))
            if number % 3 == 0:
                assert client.read(number % 7) == block(number)
        counters = server.status()[0]["counters"]
    assert (counters["writes"], counters["reads"], counters["sizes"]) == (3000, 1000, 1)
    assert (counters["torn"], counters["overruns"], counters["rejected"]) == (0, 0, 0)


# ---- idle


def test_a_watch_wakes_engines_that_are_idle() -> None:
    """Two idle engines without bells, asked to sleep for a minute, see a client that comes, and stop(), at once."""
    from muenfast._blk import Server
    from muenfast._ring import Watch, Writer
    from muenfast._store import Store

    watch = Watch()
    servers, requests = [], []
    for _ in range(2):
        request, response = mmap.mmap(-1, 1 << 16), mmap.mmap(-1, 1 << 16)
        requests.append(request)
        servers.append(Server(request, response, Store.null(4096), watch=watch))
    events: queue.Queue[tuple[int, str]] = queue.Queue()

    def serve(number: int) -> None:
        event = ""
        while event != "stopped":
            event = servers[number].run(60)
            events.put((number, event))

    threads = [threading.Thread(target=serve, args=[number]) for number in range(2)]
    watching = threading.Thread(target=watch.run)
    for thread in (*threads, watching):
        thread.start()
    try:
        time.sleep(0.1)  # both asleep
        with Writer(requests[1], size=4120, protocol=0x9570208dca77db19):
            assert events.get(timeout=10) == (1, "connected")
            with pytest.raises(UsageError, match="another thread"):
                watch.run()
        assert events.get(timeout=10) == (1, "disconnected")
    finally:
        for server in servers:
            server.stop()
        for thread in threads:
            thread.join(10)
        watch.stop()
        watching.join(10)
    assert not any(thread.is_alive() for thread in (*threads, watching))
    assert {events.get(timeout=1), events.get(timeout=1)} == {(0, "stopped"), (1, "stopped")}
    for server in servers:
        server.close()
