"""The independent peers against the hand-written vectors, and against each other."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import peer
import pytest
from peer import (
    BLOCK_BYTES,
    COMMAND,
    COMMAND_SIZE,
    COMMAND_SYNC,
    EVENT_BYTES,
    READ,
    WRITE,
    ChannelReader,
    ChannelWriter,
    Event,
    InlineClient,
    InlineServer,
    Result,
)
from vectors_loader import ChannelVector, EventVector, Read, channel_vectors, event_vectors

PROTOCOL = 0xBEEFBEEFBEEF
_serial = itertools.count()


@pytest.fixture
def new_name() -> Iterator[Callable[[], str]]:
    """Makes shared memory names that no other run uses and unlinks what came of them."""
    names: list[str] = []

    def make() -> str:
        names.append(f"mfpeer-{os.getpid()}-{next(_serial)}")
        return names[-1]

    yield make
    for name in names:
        try:
            os.unlink(peer.channel_path(name))
        except FileNotFoundError:
            pass


class Link:
    """Names of a connection's two channels, and the peers to be closed with it."""

    def __init__(self, new_name: Callable[[], str]) -> None:
        self.req, self.resp = new_name(), new_name()
        self._peers: list[InlineClient | InlineServer] = []

    def client(self, **options: Any) -> InlineClient:
        client = InlineClient(self.req, self.resp, **options)
        self._peers.append(client)
        return client

    def server(self, disk: bytearray, **options: Any) -> InlineServer:
        server = InlineServer(self.req, self.resp, disk, **options)
        self._peers.append(server)
        return server

    def close(self) -> None:
        for one in self._peers:
            one.close()


@pytest.fixture
def link(new_name: Callable[[], str]) -> Iterator[Link]:
    with closing(Link(new_name)) as link:
        yield link


def _disk(blocks: int) -> bytearray:
    """A disk whose blocks all differ."""
    return bytearray(b"".join(bytes([i % 251]) * BLOCK_BYTES for i in range(blocks)))


# Vectors


def _reader_cases() -> list[Any]:
    return [
        pytest.param(vector, read, id=f"{vector.name}-rc={read.rc}")
        for vector in channel_vectors()
        for read in vector.reads
    ]


@pytest.mark.parametrize("vector", channel_vectors(), ids=lambda vector: vector.name)
def test_vector_header_means_what_it_says(vector: ChannelVector) -> None:
    fields = struct.unpack_from("<8Q", vector.region)
    names = ("transport", "epoch", "protocol", "size", "elements", "reserved", "wsc", "wc")
    assert dict(zip(names, fields, strict=True)) == {**vector.header, "reserved": 0}


@pytest.mark.parametrize(("vector", "expected"), _reader_cases())
def test_reader_follows_the_vectors(
    vector: ChannelVector, expected: Read, new_name: Callable[[], str]
) -> None:
    name = new_name()
    with open(peer.channel_path(name), "w+b", buffering=0) as file:
        file.write(vector.region)
        with closing(ChannelReader(name, vector.reader_protocol)) as reader:
            if expected.rc is not None:
                os.pwrite(file.fileno(), struct.pack("<2Q", expected.rc, expected.rc), 48)
                assert reader.read() == ("EPOCH_CHANGED", None)
                reader.drain()
                os.pwrite(file.fileno(), vector.region, 0)
            assert reader.read() == (expected.result, expected.data)
            assert reader.lost == expected.lost
            assert reader.synchronised == (expected.rc_after is not None)
            if expected.rc_after is not None:
                assert reader.rc == expected.rc_after


def test_writer_reproduces_the_example(new_name: Callable[[], str]) -> None:
    (example,) = (vector for vector in channel_vectors() if vector.name == "example")
    path = peer.channel_path(new_name())
    with closing(ChannelWriter(path, 2, PROTOCOL, len(example.region), epoch=1)) as writer:
        writer.activate()
        for packet in range(1, 10):
            writer.write(bytes([packet, packet]))
        with open(path, "rb") as file:
            written = bytearray(file.read())
    # The example catches packet 10 half way: WSC is raised and slot 1 half overwritten.
    written[48] += 1
    written[66] = 0x0A
    assert bytes(written) == example.region


@pytest.mark.parametrize("vector", event_vectors(), ids=lambda vector: vector.name)
def test_event_vectors(vector: EventVector, link: Link) -> None:
    for raw, fields in (
        (vector.request, vector.request_fields),
        (vector.response, vector.response_fields),
    ):
        event = Event.unpack(raw)
        assert {name: getattr(event, name) for name in fields} == fields
        assert event.data == raw[24:]
        assert event.pack() == raw

    server = link.server(bytearray([vector.fill]) * (vector.blocks * BLOCK_BYTES))
    server.step()
    with (
        closing(ChannelWriter(link.req, EVENT_BYTES, peer.REQUEST_PROTOCOL)) as requests,
        closing(ChannelReader(link.resp, peer.RESPONSE_PROTOCOL)) as responses,
    ):
        requests.activate()
        requests.write(vector.request)
        server.step()
        assert responses.read() == ("EPOCH_CHANGED", None)
        assert responses.read() == ("SUCCESS", vector.response)
        assert responses.read() == ("NO_DATA", None)
    if vector.request_fields["kind"] == WRITE:
        at = vector.request_fields["id"] * BLOCK_BYTES
        assert server.disk[at : at + BLOCK_BYTES] == vector.request[24:]


def test_event_layout_of_an_error() -> None:
    raw = Event(READ, -errno.EIO, 1 << 40, 1, 7).pack()
    assert len(raw) == 4120
    assert raw[:24] == bytes.fromhex(
        "00 00 00 00  FB FF FF FF  00 00 00 00 00 01 00 00  01 00 00 00  07 00 00 00"
    )


# Channels


def test_geometry_of_the_customary_region(new_name: Callable[[], str]) -> None:
    name = new_name()
    with closing(ChannelWriter(name, EVENT_BYTES, PROTOCOL)) as writer:
        assert writer.elements == 254
    with closing(ChannelWriter(name, 32, PROTOCOL, region_size=0x8000)) as writer:
        assert writer.region_size == 0x100000  # an existing region keeps its size


def test_reader_sees_the_life_of_a_writer(new_name: Callable[[], str]) -> None:
    name = new_name()
    with (
        closing(ChannelWriter(name, 8, PROTOCOL, region_size=64 + 4 * 8)) as writer,
        closing(ChannelReader(name, PROTOCOL, 8)) as reader,
    ):
        packets = [bytes([i]) * 8 for i in range(10)]
        assert reader.read() == ("INACTIVE", None)
        first = writer.activate()
        writer.write_many(packets[:4])
        assert writer.wc == 4
        assert reader.read() == ("EPOCH_CHANGED", None)
        assert [reader.read() for _ in range(5)] == [
            *((Result.SUCCESS, packet) for packet in packets[:4]),
            (Result.NO_DATA, None),
        ]
        for packet in packets[4:9]:
            writer.write(packet)
        assert reader.read() == ("OVERRUN_DETECTED", None)
        assert reader.lost == 5
        writer.write(packets[9])
        reader.drain()
        assert reader.read() == ("NO_DATA", None)
        assert writer.activate() != first
        assert reader.read() == ("EPOCH_CHANGED", None)
        writer.deactivate()
        assert reader.read() == ("INACTIVE", None)
        assert reader.lost == 5


def test_reader_expects_its_packet_size(new_name: Callable[[], str]) -> None:
    name = new_name()
    with (
        closing(ChannelWriter(name, 8, PROTOCOL)) as writer,
        closing(ChannelReader(name, PROTOCOL, 16)) as reader,
    ):
        writer.activate()
        assert reader.read() == ("INCOMPATIBLE_INTERFACE", None)


def test_drain_synchronises(new_name: Callable[[], str]) -> None:
    name = new_name()
    with (
        closing(ChannelWriter(name, 8, PROTOCOL, epoch=1)) as writer,
        closing(ChannelReader(name, PROTOCOL)) as reader,
    ):
        writer.activate()
        writer.write(bytes(8))
        reader.drain()
        assert reader.read() == ("NO_DATA", None)


def test_reader_notices_a_pause_between_equal_epochs(new_name: Callable[[], str]) -> None:
    name = new_name()
    with (
        closing(ChannelWriter(name, 8, PROTOCOL)) as writer,
        closing(ChannelReader(name, PROTOCOL)) as reader,
    ):
        assert writer.activate(1) == writer.activate(1) == 1
        assert reader.read() == ("EPOCH_CHANGED", None)
        writer.deactivate()
        assert reader.read() == ("INACTIVE", None)
        writer.activate(1)
        assert reader.read() == ("EPOCH_CHANGED", None)


def test_opening_waits_for_a_region_but_not_for_ever(new_name: Callable[[], str]) -> None:
    name = new_name()
    with pytest.raises(TimeoutError):
        ChannelReader(name, PROTOCOL, timeout=0.02)
    made: list[ChannelWriter] = []
    timer = threading.Timer(0.02, lambda: made.append(ChannelWriter(name, 8, PROTOCOL)))
    timer.start()
    with closing(ChannelReader(name, PROTOCOL)) as reader:
        assert reader.read() == ("INACTIVE", None)
    timer.join()
    made[0].close()


def test_writer_refuses_misuse(new_name: Callable[[], str]) -> None:
    with closing(ChannelWriter(new_name(), 8, PROTOCOL, region_size=64 + 8)) as writer:
        with pytest.raises(RuntimeError):
            writer.write(bytes(8))
        with pytest.raises(ValueError):
            writer.activate(0)
        writer.activate()
        for packets in ([], [bytes(8)] * 2, [bytes(7)]):
            with pytest.raises(ValueError):
                writer.write_many(packets)
    with pytest.raises(ValueError):
        ChannelWriter(new_name(), 8, PROTOCOL, region_size=64 + 7)


PRODUCER = """
import struct, sys, time
from peer import ChannelWriter
name, protocol, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
writer = ChannelWriter(name, size, protocol)
writer.activate()
end = time.monotonic() + 30
while time.monotonic() < end:
    writer.write(struct.pack("<Q", writer.wc) * (size // 8))
"""


def test_reads_of_another_process_are_never_torn(new_name: Callable[[], str]) -> None:
    name, size = new_name(), 4096
    ChannelWriter(name, size, PROTOCOL, region_size=64 + 4 * size).close()
    with closing(ChannelReader(name, PROTOCOL, size)) as reader:
        command = [sys.executable, "-c", PRODUCER, name, str(PROTOCOL), str(size)]
        with subprocess.Popen(command, cwd=Path(__file__).parent) as producer:
            try:
                newest, got = -1, 0
                while got < 5000:
                    result, packet = reader.read()
                    if packet is None:
                        assert result is not Result.INCOMPATIBLE_INTERFACE
                        assert producer.poll() is None, "the producer ended before the reader"
                        continue
                    first = packet[:8]
                    assert packet == first * (size // 8)
                    assert newest < (newest := int.from_bytes(first, "little"))
                    got += 1
            finally:
                producer.kill()


# Inline block connections


SERVER_OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"shuffle": 8, "seed": 3}, id="shuffle"),
    pytest.param({"fixed_epoch": True}, id="epoch-1"),
    pytest.param({"unknown": 5, "stale": 5}, id="strays"),
]


@pytest.mark.parametrize("options", SERVER_OPTIONS)
def test_client_and_server(link: Link, options: dict[str, Any]) -> None:
    disk = _disk(16) + bytearray(512)  # the tail is no whole block
    client = link.client()
    with link.server(disk, **options).running() as server:
        assert client.connect() == client.size_sectors == 16 * 8
        assert client.size() == 16 * 8
        block = os.urandom(BLOCK_BYTES)
        assert client.read(15) == bytes([15]) * BLOCK_BYTES
        client.write(3, block)
        client.sync()
        assert client.read(3) == block
        assert server.syncs == 1
        with pytest.raises(OSError) as caught:
            client.read(16)
        assert caught.value.errno == errno.EIO
    assert disk[3 * BLOCK_BYTES : 4 * BLOCK_BYTES] == block


def test_shuffled_answers_are_all_there(link: Link) -> None:
    client = link.client()
    with link.server(_disk(64), shuffle=16, seed=1).running() as server:
        client.connect()
        asked = {client.request(READ, block): block for block in range(64)}
        answers = [client.wait_response() for _ in asked]
        assert [answer.priv for answer in answers] != list(asked)
        assert [answer.priv for answer in answers] == [a.priv for a in server.answered[1:]]
        for answer in answers:
            block = asked.pop(answer.priv)
            assert answer == Event(READ, 0, block, 1, answer.priv, bytes([block]) * BLOCK_BYTES)
    assert not asked


def test_strays_and_failures(link: Link) -> None:
    client = link.client()
    server = link.server(_disk(4), unknown=3, stale=2, fail_blocks={2: -errno.ENOSPC})
    with server.running():
        client.connect()  # sees one unknown and one genuine answer; its stale copy follows
        for block in (1, 2):
            client.request(READ, block, priv=block)
        seen = [client.wait_response() for _ in range(6)]
    size, unknown_1, read_1, stale_1, unknown_2, read_2 = seen
    assert (size.kind, size.id) == (COMMAND, COMMAND_SIZE)
    assert {unknown_1.priv, unknown_2.priv}.isdisjoint({1, 2, size.priv})
    assert read_1 == stale_1 == Event(READ, 0, 1, 1, 1, bytes([1]) * BLOCK_BYTES)
    assert (read_2.priv, read_2.error) == (2, -errno.ENOSPC)


@pytest.mark.parametrize("event", [(3, 0, 1), (COMMAND, 9, 1), (READ, 0, 0)])
def test_unknown_requests_are_refused(link: Link, event: tuple[int, int, int]) -> None:
    client = link.client()
    kind, id, valid = event
    with link.server(_disk(1)).running():
        client.connect()
        priv = client.request(kind, id, valid=valid)
        answer = client.wait_response()
    assert (answer.priv, answer.error) == (priv, -errno.EINVAL)


def test_calls_keep_the_answers_of_others(link: Link) -> None:
    client = link.client()
    with link.server(_disk(4)).running():
        client.connect()
        priv = client.request(READ, 2)
        assert client.read(1) == bytes([1]) * BLOCK_BYTES
        assert client.wait_response().priv == priv


def test_connection_states(link: Link) -> None:
    server = link.server(_disk(1))
    assert not server.step() and not server.connected  # neither
    with (
        closing(ChannelWriter(link.req, EVENT_BYTES, peer.REQUEST_PROTOCOL, epoch=1)) as requests,
        closing(ChannelReader(link.resp, peer.RESPONSE_PROTOCOL)) as responses,
    ):
        server.step()
        assert responses.read() == ("INACTIVE", None)
        requests.activate()  # request only
        server.step()
        assert server.connected
        assert responses.read() == ("EPOCH_CHANGED", None)
        requests.deactivate()  # response only
        server.step()
        assert not server.connected
        assert responses.read() == ("INACTIVE", None)
        requests.activate()  # again, under the same epoch
        requests.write(Event(COMMAND, 0, COMMAND_SYNC, 1, 0).pack())
        server.step()
        assert server.syncs == 1
        requests.activate(2)  # without a pause: a new response epoch
        server.step()
        assert responses.read() == ("EPOCH_CHANGED", None)
        assert responses.read() == ("NO_DATA", None)


def test_remains_of_a_dead_server_are_deactivated(link: Link) -> None:
    with closing(ChannelWriter(link.resp, EVENT_BYTES, peer.RESPONSE_PROTOCOL)) as dead:
        dead.activate()
    server = link.server(_disk(1))
    assert server.connected
    server.step()
    assert not server.connected


def test_a_late_server_answers_the_size_only(link: Link) -> None:
    disk = _disk(2)
    with (
        closing(ChannelWriter(link.req, EVENT_BYTES, peer.REQUEST_PROTOCOL)) as requests,
        closing(link.server(disk)) as server,
        closing(ChannelReader(link.resp, peer.RESPONSE_PROTOCOL)) as responses,
    ):
        requests.activate()
        requests.write(Event(COMMAND, 0, COMMAND_SIZE, 1, 1).pack())
        requests.write(Event(WRITE, 0, 0, 1, 2, b"\xff" * BLOCK_BYTES).pack())
        requests.write(Event(COMMAND, 0, COMMAND_SYNC, 1, 3).pack())
        server.step()
        requests.write(Event(READ, 0, 0, 1, 4).pack())
        server.step()
        assert responses.read() == ("EPOCH_CHANGED", None)
        answers = [raw and Event.unpack(raw).priv for _, raw in (responses.read() for _ in "123")]
        assert answers == [1, 4, None]
    assert disk == _disk(2)


def test_client_finds_a_server_that_starts_later(link: Link) -> None:
    client = link.client()
    stop = threading.Event()
    server = link.server(_disk(2))

    def late() -> None:
        time.sleep(0.02)
        server.serve(stop)

    thread = threading.Thread(target=late)
    thread.start()
    try:
        assert client.connect() == 16
    finally:
        stop.set()
        thread.join()


def test_reconnecting(link: Link) -> None:
    disk = _disk(4)
    with link.server(disk).running() as server:
        for number in range(3):
            client = link.client()
            client.connect()
            client.write(0, bytes([number]) * BLOCK_BYTES)
            if number:
                client.disconnect()  # the first one dies instead
        deadline = time.monotonic() + 5
        while server.connected and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not server.connected
    assert disk[0] == 2


def test_client_notices_that_the_server_went(link: Link) -> None:
    client = link.client()
    with link.server(_disk(1)).running():
        client.connect()
    with pytest.raises(ConnectionResetError):
        client.read(0)
    with link.server(_disk(1)).running():
        client.connect()
        assert client.read(0) == bytes(BLOCK_BYTES)


def test_waits_are_bounded(link: Link) -> None:
    client = link.client()
    with pytest.raises(TimeoutError):
        client.connect(timeout=0.02)  # no response channel at all
    server = link.server(_disk(1))
    with pytest.raises(TimeoutError):
        client.connect(timeout=0.02)  # nobody answers
    with server.running():
        client.connect()
        with pytest.raises(TimeoutError):
            client.wait_response(timeout=0.02)
