"""Peers that break rules: which ones is said and counted by field, and who breaks too many is left alone until it begins
anew, while others are served."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import pytest
from helpers import block, eventually
from net_peer import PROTOCOL, net_element
from peer import (
    BLOCK_BYTES,
    BUFFER_READ,
    COMMAND,
    READ,
    WRITE,
    BufferClient,
    BufferRequest,
    ChannelWriter,
    Event,
    InlineClient,
    InlineServer,
)
from test_blk_server import Link
from test_net_frames import GOOD, Device, Files, device, files, region, running

from muenfast import BlockDevice, BlockServer, exports_from_lists
from muenfast._net import Receiver
from muenfast.blk import channels_from_lists
from muenfast.errors import Offences

__all__ = ["device", "files"]   # fixtures

PATIENCE, FEW = 50, 5
BAD = Event(READ, 0, 1 << 40, 1, 7)


@pytest.fixture
def link(names: Callable[[str], str], program: Any) -> Iterator[Link]:
    with closing(Link(names, program)) as link:
        yield link


class Told(NamedTuple):
    """A Conduct."""

    offences: dict[str, int]
    quarantines: int
    patience: int


def state(server: BlockServer) -> str:
    return str(server.status()[0]["state"])


def test_each_field_is_counted_and_told(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    """One counter and one line for each, with channel and field; what is read-only is no offence."""
    server, client = link.serve("ram:64K", patience=0, read_only="yes"), link.raw()
    client.connect()
    wrong = [Event(READ, 0, 0, 0, 1), Event(READ, 0, 0, 2, 1), Event(9, 0, 0, 1, 2), Event(WRITE, 0, 16, 1, 3, block(1)),
             Event(COMMAND, 0, 77, 1, 4), Event(READ, 0, 1 << 63, 1, 5)]
    client.send(*wrong, Event(WRITE, 0, 0, 1, 6, block(1)))
    assert [answer.error for answer in client.answers(7)] == [-errno.EINVAL] * 6 + [-errno.EROFS]
    assert server.status()[0]["offences"] == {"valid": 2, "kind": 1, "id": 3, "checksum": 0}
    lines = eventually(lambda: len(caplog.messages) == 3 and caplog.messages)
    for field, count in (("valid", 2), ("kind", 1), ("id", 3)):
        assert any(f"channel {link.req}: field {field}: {count} elements so far break its rule" in line for line in lines)


def test_a_flood_is_told_in_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """One in ten seconds for each field, whatever comes."""
    offences = Offences("export x", "req")
    for count in range(1000):
        offences.look(Told({"id": count, "kind": count // 2}, count // 100, 10))
    lines = [line for line in caplog.messages if "field id" in line]
    assert len(lines) == 1 and "1 elements so far" in lines[0]
    assert len(caplog.messages) == 3


def test_who_breaks_too_many_rules_is_left_alone(link: Link, names: Callable[[str], str],
                                                 caplog: pytest.LogCaptureFixture) -> None:
    """All that came before is answered; then nothing is, until another epoch; its neighbour notices nothing."""
    caplog.set_level(logging.INFO)
    other = names("other-req"), names("other-resp")
    with BlockServer(exports_from_lists(f"{link.req},{other[0]}", f"{link.resp},{other[1]}", device="ram:64K,ram:64K",
                                        poll=100, patience=PATIENCE), threads=1) as server, ExitStack() as stack:
        neighbour = InlineClient(*other, timeout=20)
        stack.callback(neighbour.close)
        neighbour.connect()
        client = link.raw()
        client.connect()
        for number in range(5):
            client.send(*[BAD] * 10, Event(READ, 0, 0, 1, number))
            assert len(client.answers(11)) == 11
        assert state(server) == "connected"         # as many as it may
        client.send(BAD)
        eventually(lambda: state(server) == "quarantined")
        status = server.status()[0]
        assert status["counters"]["quarantines"] == 1 and status["offences"]["id"] == PATIENCE + 1
        done = status["counters"]["reads"]
        client.send(Event(READ, 0, 0, 1, 99), *[BAD] * 100)
        neighbour.write(3, block(3))
        assert neighbour.read(3) == block(3)
        time.sleep(0.3)
        asleep, status = status["counters"]["sleeps"], server.status()[0]
        assert status["counters"]["sleeps"] > asleep    # what lies there unread keeps nobody awake
        assert status["counters"]["reads"] == done and status["offences"]["id"] == PATIENCE + 1
        assert status["state"] == "quarantined"
        assert server.status()[1]["state"] == "connected"
        said = f"channel {link.req}: more than {PATIENCE} elements in a second broke a rule"
        eventually(lambda: any(said in line for line in caplog.messages))
        client.connect()                            # which begins another epoch
        assert state(server) == "connected"
        client.send(Event(WRITE, 0, 5, 1, 1, block(5)), Event(READ, 0, 5, 1, 2))
        assert client.answers(2)[1].data == block(5)
        assert neighbour.read(3) == block(3)


def test_few_offences_in_a_long_time_are_none(link: Link) -> None:
    """What counts is how many there are in a second."""
    server, client = link.serve("ram:64K", patience=5), link.raw()
    client.connect()
    for _ in range(3):
        client.send(*[BAD] * 5)
        client.answers(5)
        time.sleep(1.1)
    assert server.status()[0]["offences"]["id"] == 15 and state(server) == "connected"


def test_any_number_where_that_is_asked_for(link: Link) -> None:
    server, client = link.serve("ram:64K", patience=0), link.raw()
    client.connect()
    for _ in range(200):
        client.send(*[BAD] * 100)
        client.answers(100)
    assert state(server) == "connected" and server.status()[0]["counters"]["quarantines"] == 0


def test_over_a_buffer(names: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    """By field; then alone until another epoch; the blocks are as they were."""
    req, resp, shm = names("req"), names("resp"), names("shm")
    with BlockServer(exports_from_lists(req, resp, buffer=shm, device="ram:64K", poll=100, patience=PATIENCE)) as server:
        client = BufferClient(req, resp, shm, timeout=20)
        try:
            client.connect()
            client.write(0, 0, block(1))
            wrong = [BufferRequest(99), BufferRequest(BUFFER_READ, 7, 1, 4096), BufferRequest(BUFFER_READ, 0, 2, 4097),
                     BufferRequest(BUFFER_READ, 0, 3, 4096, 1 << 40), BufferRequest(BUFFER_READ, 0, 4, 4096, 0, 1 << 40)]
            client.send(*wrong)
            assert all(answer.status != 0 for answer in client.answers(len(wrong)))
            assert server.status()[0]["offences"] == dict.fromkeys(
                ("kind", "device", "length", "device_offset", "buffer_offset"), 1) | {"checksum": 0}
            client.send(*[wrong[-1]] * (PATIENCE + 1))
            eventually(lambda: state(server) == "quarantined")
            eventually(lambda: any("field buffer_offset" in line for line in caplog.messages))
            client.connect()
            assert client.read(0, 0, BLOCK_BYTES) == block(1)
        finally:
            client.close()


def test_a_server_that_answers_what_nobody_asked(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    """Its epoch is as if it had ended: requests wait for another one, and none is lost."""
    disk = bytearray(16 * BLOCK_BYTES)
    server = InlineServer(link.req, link.resp, disk, unknown=FEW + 2)   # the first one before the answer to `size`
    try:
        with server.running():
            [channels] = channels_from_lists(link.req, link.resp, patience=FEW)
            with BlockDevice(channels=channels, same_store=True) as device:
                for number in range(2 * FEW):     # each answer has one before it that is none
                    device.pwrite(block(number), number % 16 * BLOCK_BYTES)
                    assert device.pread(BLOCK_BYTES, number % 16 * BLOCK_BYTES) == block(number)
                status = eventually(lambda: device.status()["counters"]["quarantines"] and device.status())
                assert status["offences"]["priv"] > FEW and status["counters"]["lives"] > 1
                eventually(lambda: any("field priv" in line for line in caplog.messages))
                eventually(lambda: any(f"more than {FEW} elements" in line for line in caplog.messages))
    finally:
        server.close()


def test_an_interface_leaves_its_peer_alone(device: Device, files: Callable[[str, int], Files]) -> None:
    """Packets of the next epoch come through."""
    file = files("in", region(108, 16))
    writer = ChannelWriter(file.path, 108, PROTOCOL)
    writer.activate()
    receiver = Receiver(device.ports, file.map(region(108, 16), writable=False), framing="net_hdr", mtu=100,
                        protocol=PROTOCOL)
    receiver.conduct.patience = PATIENCE
    with running(receiver) as events:
        eventually(lambda: receiver.connected)
        for _ in range(PATIENCE // 5):
            writer.write_many([bytes(108)] * 5)
            writer.write(net_element(GOOD, 108))
            assert device.got() == GOOD
        writer.write(bytes(108))
        eventually(lambda: receiver.conduct.quarantined)
        eventually(lambda: not receiver.connected and "disconnected" in events)
        writer.write(net_element(GOOD, 108))
        assert device.nothing()
        assert sum(receiver.conduct.offences.values()) == PATIENCE + 1 and receiver.conduct.quarantines == 1
        writer.activate()
        eventually(lambda: receiver.connected)
        writer.write(net_element(GOOD, 108))
        assert device.got() == GOOD
    receiver.close()
    writer.close()
