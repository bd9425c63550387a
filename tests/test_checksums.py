"""CRC-32C of block messages: the sums themselves, how two ends agree upon them, that nothing wrong gets through, and that
an end that has none notices nothing."""

from __future__ import annotations

import errno
import itertools
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from helpers import block, compiled, eventually
from peer import (
    BLOCK_BYTES,
    COMMAND,
    COMMAND_SIZE,
    COMMAND_SYNC,
    EVENT_BYTES,
    READ,
    WRITE,
    Event,
    InlineServer,
    channel_path,
)
from sums import SummedRaw, SummedServer, behind, crc32c, element, event_sum, flip, mistaken, offer, offered
from test_blk_server import Link

from muenfast import BlockDevice, UsageError
from muenfast.errors import PeerError

HEADER, TRIES = 24, 4   # bytes of an event's; times that a request is sent at most
BAD = -errno.ECOMM


@pytest.fixture
def link(names: Callable[[str], str], program: Any) -> Iterator[Link]:
    with closing(Link(names, program)) as link:
        yield link


@pytest.fixture
def raw(link: Link) -> Iterator[SummedRaw]:
    raw = SummedRaw(link.req, link.resp)
    yield raw
    raw.close()


@pytest.fixture(params=["memory", "file"])
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Two engines: what is memory is served at once, of a file operations are under way."""
    if request.param == "memory":
        return "ram:64K"
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 16))
    return str(path)


def offences(entry: Any) -> Any:
    return entry.status()[0]["offences"] if hasattr(entry, "exports") else entry.status()["offences"]


# ------------------------------------------------------------------ the sums


def test_known_sums(tmp_path: Path) -> None:
    """RFC 3720, B.4; and every form of _crc32c.h gives, for each length and place, what the tables here do."""
    vectors = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E,
               bytes(reversed(range(32))): 0x113FDB5C, b"123456789": 0xE3069283}
    assert {data: crc32c(data) for data in vectors} == vectors
    program = compiled("crc32c", tmp_path, "-O2")
    data = random.Random(1).randbytes(20000)
    for source in (*vectors, data):
        done = subprocess.run([program, "sums"], input=source, capture_output=True, timeout=60, check=True)
        lines = [line.split() for line in done.stdout.decode().splitlines()]
        for length, found in lines[::61] if source is data else lines:
            assert int(found, 16) == crc32c(source[:int(length)]), length


# ------------------------------------------------------------------ agreement


@pytest.mark.parametrize("here", ["off", "auto", "require"])
@pytest.mark.parametrize("there", ["off", "auto", "require"])
def test_what_two_ends_come_to(link: Link, here: str, there: str) -> None:
    """Both have to have them; who requires them is served, or serves, only then."""
    server = link.serve("ram:64K", checksum=there)
    if here == "require" and there == "off":
        with pytest.raises(PeerError, match="checksum is the server has no checksums.*checksum auto does without"):
            BlockDevice(link.req, link.resp, checksum=here)
        return
    if here == "off" and there == "require":
        with pytest.raises(PeerError, match="the server requires checksums .*checksum auto, or require, offers them"):
            BlockDevice(link.req, link.resp, checksum=here, timeout=1)
        assert server.status()[0]["checksum"] in ("refused", "idle")
        return
    with BlockDevice(link.req, link.resp, checksum=here) as disk:
        disk.pwrite(block(7) * 3, BLOCK_BYTES)
        disk.flush()
        assert disk.pread(2 * BLOCK_BYTES, BLOCK_BYTES * 2) == block(7) * 2
        both = "off" not in (here, there)
        assert disk.status()["checksum"] == ("off" if here == "off" else "agreed" if both else "plain")
        assert server.status()[0]["checksum"] == ("off" if there == "off" else "agreed" if both else "plain")
        assert not any(offences(server).values()) and not any(offences(disk).values())


def test_what_stands_in_the_channels(link: Link, backing: str) -> None:
    """Between two ends of ours: the bytes are those that docs/protocol.md has, as an independent reader finds them."""
    with link.serve(backing, checksum="auto"), BlockDevice(link.req, link.resp, checksum="require") as disk:
        disk.pwrite(block(1), 5 * BLOCK_BYTES)
        assert disk.pread(BLOCK_BYTES, 5 * BLOCK_BYTES) == block(1)
        disk.flush()
        regions = [Path(channel_path(name)).read_bytes() for name in (link.req, link.resp)]
    for region, answer in zip(regions, (False, True), strict=True):
        words = [int.from_bytes(region[at:at + 8], "little") for at in range(0, 64, 8)]
        epoch, elements, count = words[1], words[4], words[7]
        assert count == 4
        events = [Event.unpack(region[element(number, elements)]) for number in range(count)]
        assert [(event.kind, event.id) for event in events] == [(COMMAND, COMMAND_SIZE), (WRITE, 5), (READ, 5),
                                                                (COMMAND, COMMAND_SYNC)]
        for number, event in enumerate(events):
            if number == 0 and not answer:
                assert event.valid == 1 and offered(event, epoch) is not None and event.data[32:] == bytes(4064)
            else:
                assert event.valid == event_sum(event, number, epoch, answer), event.kind


def test_a_plain_client_sees_no_other_byte(link: Link) -> None:
    """Of a server that would have checksums it gets what one that has none sends."""
    answers = []
    for there in ("off", "auto"):
        with link.serve("ram:64K", checksum=there) as server:
            client = link.raw()
            client.connect()
            client.send(Event(COMMAND, 0, COMMAND_SIZE, 1, 5), Event(WRITE, 0, 3, 1, 6, block(3)), Event(READ, 0, 3, 1, 7),
                        Event(COMMAND, 0, COMMAND_SYNC, 1, 8), Event(READ, 0, 99, 1, 9), Event(READ, 0, 3, 0, 10))
            found = [event if event.kind != WRITE else event._replace(data=b"") for event in client.answers(6)]
            answers.append(found)
            assert server.status()[0]["checksum"] == ("off" if there == "off" else "plain")
            client.writer.deactivate()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("echoes", [False, True])
def test_a_plain_server_serves_us(link: Link, echoes: bool) -> None:
    """It gets plain requests but for the offer, in bytes that it does not look at; and may leave those in its answer."""
    seen: list[Event] = []

    class Server(InlineServer):
        def _handle(self, request: Event, position: int) -> None:
            seen.append(request)
            super()._handle(request, position)

        def _execute(self, request: Event) -> Event:
            answer = super()._execute(request)
            if echoes and (request.kind, request.id) == (COMMAND, COMMAND_SIZE):
                answer = answer._replace(data=answer.data[:8] + request.data[8:])
            return answer

    link.make()
    server = Server(link.req, link.resp, bytearray(1 << 16))
    with server.running():
        with BlockDevice(link.req, link.resp, checksum="auto") as disk:
            disk.pwrite(block(1), 0)
            assert disk.pread(BLOCK_BYTES, 0) == block(1)
            disk.flush()
            assert disk.status()["checksum"] == "plain"
        with pytest.raises(PeerError, match="the server has no checksums"):
            BlockDevice(link.req, link.resp, checksum="require")
    server.close()
    assert all(event.valid == 1 for event in seen)
    first, *others = seen[:4]
    assert first.data[:8] == bytes(8) and first.data[8:32] != bytes(24) and first.data[32:] == bytes(4064)
    assert [event.data for event in others] == [block(1), bytes(BLOCK_BYTES), bytes(BLOCK_BYTES)]


def test_who_requires_them_serves_no_plain_client(link: Link, backing: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it asks is refused, which is said; it is no offence, and it does not count towards a quarantine."""
    with link.serve(backing, checksum="require", patience=3) as server:
        client = link.raw()
        client.writer.activate()
        size = Event(COMMAND, 0, COMMAND_SIZE, 1, 1)
        client.send(size)
        answers = client.answers(1)
        wanted = [size, Event(WRITE, 0, 0, 1, 2, block(1)), Event(READ, 0, 0, 1, 3), Event(COMMAND, 0, COMMAND_SYNC, 1, 4),
                  Event(READ, 0, 0, 1, 5)]
        client.send(*wanted)
        answers += client.answers(len(wanted))
        assert all(answer.error == -errno.EPROTONOSUPPORT and answer.valid == 1 for answer in answers)
        assert all(answer.data == bytes(BLOCK_BYTES) for answer in answers if answer.kind != WRITE)
        assert server.status()[0]["checksum"] == "refused" and not any(offences(server).values())
        eventually(lambda: any("the client offers no checksums" in line for line in caplog.messages))
        assert server.status()[0]["counters"]["writes"] == server.status()[0]["counters"]["reads"] == 0
        client.writer.deactivate()
    summed = SummedRaw(link.req, link.resp)
    with link.serve(backing, checksum="require") as server:
        summed.offer()
        [answer] = summed.ask(Event(READ, 0, 0, 1, 3))
        assert answer.error == 0 and answer.data == bytes(BLOCK_BYTES)
        assert server.status()[0]["checksum"] == "agreed"
    summed.close()


# ------------------------------------------------------------------ wrong requests


def test_no_byte_of_a_request_can_change(link: Link, raw: SummedRaw, backing: str) -> None:
    """Each one of a write, of a read and of a sync: nothing is executed, and the answer is to send it again; each is
    counted; the disk is as it was, and what is right is executed."""
    with link.serve(backing, checksum="auto", patience=0) as server:
        raw.offer()
        [done] = raw.ask(Event(WRITE, 0, 2, 1, 1, block(1)))
        assert done.error == 0
        write = Event(WRITE, 0, 2, 1, 9, block(2))
        sent = 0
        for first in range(0, EVENT_BYTES, 100):
            places = range(first, min(first + 100, EVENT_BYTES))
            raw.writer.write_many([flip(raw.summed(write, ahead, behind(write.data)).pack(), at)
                                   for ahead, at in enumerate(places)])
            answers = raw.answers(len(places))
            assert [answer.error for answer in answers] == [BAD] * len(places), first
            sent += len(places)
        for event in (Event(READ, 0, 3, 1, 9), Event(COMMAND, 0, COMMAND_SYNC, 1, 9)):
            raw.writer.write_many([flip(raw.summed(event, at).pack(), at) for at in range(HEADER)])
            assert [answer.error for answer in raw.answers(HEADER)] == [BAD] * HEADER
            sent += HEADER
        assert offences(server) == {"valid": 0, "kind": 0, "id": 0, "checksum": sent}
        counters = server.status()[0]["counters"]
        assert (counters["writes"], counters["reads"], counters["syncs"]) == (1, 0, 0)
        good = raw.ask(Event(READ, 0, 2, 1, 1), Event(WRITE, 0, 2, 1, 2, block(5)), Event(READ, 0, 2, 1, 3))
        assert [answer.error for answer in good] == [0, 0, 0]
        assert (good[0].data, good[2].data) == (block(1), block(5))


def test_neighbours_of_a_wrong_request_are_executed(link: Link, raw: SummedRaw, backing: str) -> None:
    """Of writes that follow each other on the disk, and would be one operation, the wrong one alone is refused."""
    with link.serve(backing, checksum="auto"):
        raw.offer()
        events = [raw.summed(Event(WRITE, 0, number, 1, number, block(number)), number).pack() for number in range(16)]
        wrong = (0, 5, 6, 15)
        raw.writer.write_many([flip(event, 2000) if number in wrong else event for number, event in enumerate(events)])
        answers = {answer.id: answer.error for answer in raw.answers(16)}
        assert answers == {number: BAD if number in wrong else 0 for number in range(16)}
        for number in range(16):
            [answer] = raw.ask(Event(READ, 0, number, 1, 99))
            assert answer.data == (bytes(BLOCK_BYTES) if number in wrong else block(number))


def test_what_is_whole_but_not_in_its_place(link: Link, raw: SummedRaw, backing: str) -> None:
    """An element of another round, of another epoch, and one without a checksum are refused."""
    with link.serve(backing, checksum="auto") as server:
        raw.offer()
        old = raw.summed(Event(WRITE, 0, 1, 1, 1, block(1))).pack()
        raw.writer.write(old)
        assert raw.answers(1)[0].error == 0
        raw.writer.write_many([old, Event(WRITE, 0, 1, 1, 2, block(2)).pack(),
                               raw.summed(Event(WRITE, 0, 1, 1, 3, block(3)), 3).pack()])
        assert [answer.error for answer in raw.answers(3)] == [BAD] * 3
        again = raw.summed(Event(WRITE, 0, 1, 1, 1, block(9))).pack()
        number = raw.writer.wc
        raw.offer()
        for _ in range(number - 1):
            raw.ask(Event(READ, 0, 0, 1, 1))
        assert raw.writer.wc == number
        raw.writer.write(again)
        assert raw.answers(1)[0].error == BAD
        assert offences(server)["checksum"] == 4
        [answer] = raw.ask(Event(READ, 0, 1, 1, 4))
        assert answer.data == block(1)


def test_no_byte_of_an_offer_can_change(link: Link, raw: SummedRaw) -> None:
    """It is no offer any more, or one that is refused; never agreed upon, and no plain service for one that has a sign of
    one."""
    with link.serve("ram:64K", checksum="auto", patience=0) as server:
        raw.connect()       # what it finds as it begins may be a predecessor's
        for at in range(HEADER + 32):
            raw.epoch = raw.writer.activate()
            raw.writer.write(flip(offer(77, raw.epoch, 1234567).pack(), at))
            [answer] = raw.answers(1)
            # A request that is none for the size makes no offer.
            assert answer.error == (-errno.EINVAL if at in (*range(4), *range(8, 20)) else BAD), at
            assert answer.data == bytes(BLOCK_BYTES)
            assert server.status()[0]["checksum"] == "plain"
        assert offences(server)["checksum"] == HEADER + 32 - 16


def test_an_offer_is_made_first_or_not_at_all(link: Link, raw: SummedRaw) -> None:
    """Later it is a plain request for the size; and nobody who agreed goes back within an epoch."""
    with link.serve("ram:64K", checksum="auto") as server:
        epoch = raw.writer.activate()
        raw.send(Event(COMMAND, 0, COMMAND_SIZE, 1, 1))
        raw.answers(1)
        raw.send(offer(77, epoch, 5))
        [answer] = raw.answers(1)
        assert answer.valid == 1 and answer.data[8:] == bytes(4088) and answer.error == 0
        assert server.status()[0]["checksum"] == "plain"
        raw.offer()
        raw.send(Event(COMMAND, 0, COMMAND_SIZE, 1, 1))
        assert raw.answers(1)[0].error == BAD
        assert server.status()[0]["checksum"] == "agreed"


# ------------------------------------------------------------------ wrong answers


def test_no_byte_of_an_answer_can_change(link: Link) -> None:
    """Each one of what a read is answered with: the request is sent again, and what is delivered is right; likewise of a
    write's and a sync's headers, whatever request they then seem to answer."""
    data = random.Random(2).randbytes(BLOCK_BYTES)
    places = itertools.count()
    turn = {"at": -1}

    def garble(raw: bytes, number: int, answer: Event) -> bytes:
        if number == 0 or turn["at"] < 0:
            return raw
        at, turn["at"] = turn["at"], -1
        return flip(raw, at)

    server = SummedServer(link.req, link.resp, bytearray(data * 4), garble=garble)
    with server.running(), BlockDevice(link.req, link.resp, checksum="require") as disk:
        disk.client.conduct.patience = 0
        for at in itertools.islice(places, EVENT_BYTES):
            turn["at"] = at
            assert disk.pread(BLOCK_BYTES, at % 4 * BLOCK_BYTES) == data, at
        for at in range(HEADER):
            turn["at"] = at
            disk.pwrite(data, BLOCK_BYTES)
            turn["at"] = at
            disk.flush()
        status = disk.status()
        assert status["offences"] == {"priv": 0, "checksum": EVENT_BYTES + 2 * HEADER}
        assert status["counters"]["reissued"] == EVENT_BYTES + 2 * HEADER
        assert status["counters"]["errors"] == 0 and status["counters"]["lives"] == 1
        assert sum(status["devices"][0]["directions"]["read"]["errors"].values()) == 0
    server.close()
    assert server.wrong == 0


@pytest.mark.parametrize("at", [HEADER + 100, 20])
def test_what_is_wrong_for_good_is_an_error(link: Link, at: int, caplog: pytest.LogCaptureFixture) -> None:
    """After TRIES times; never delivered; the next request is as ever; a line names channel and field."""
    broken = {3}

    def garble(raw: bytes, number: int, answer: Event) -> bytes:
        return flip(raw, at) if answer.kind == READ and answer.id in broken else raw

    server = SummedServer(link.req, link.resp, bytearray(b"".join(block(number) for number in range(16))), garble=garble)
    with server.running(), BlockDevice(link.req, link.resp, checksum="auto") as disk:
        with pytest.raises(OSError) as failed:
            disk.pread(BLOCK_BYTES, 3 * BLOCK_BYTES)
        assert failed.value.errno == errno.EIO
        with pytest.raises(OSError):
            disk.pread(16 * BLOCK_BYTES, 0)
        assert disk.pread(BLOCK_BYTES, 4 * BLOCK_BYTES) == block(4)
        broken.clear()
        assert disk.pread(BLOCK_BYTES, 3 * BLOCK_BYTES) == block(3)
        status = disk.status()
        assert status["offences"]["checksum"] == 2 * TRIES and status["counters"]["errors"] == 2
        assert status["counters"]["lives"] == 1
        eventually(lambda: any(f"channel {link.resp}: field checksum" in line for line in caplog.messages))
    server.close()


def test_a_request_that_comes_wrong_is_sent_again(link: Link) -> None:
    """In shared memory, under a server of ours: bytes of what stands there change before it looks."""
    with link.serve("ram:64K", checksum="auto") as server:
        garbler = Path(channel_path(link.req))
        with BlockDevice(link.req, link.resp, checksum="require") as disk:
            stop, dice = threading.Event(), random.Random(3)

            def garble() -> None:
                with open(garbler, "r+b", buffering=0) as file:
                    while not stop.is_set():
                        file.seek(dice.randrange(64, 64 + 40 * EVENT_BYTES))
                        file.write(dice.randbytes(8))

            disk.client.conduct.patience = 0
            thread = threading.Thread(target=garble)
            thread.start()
            wrong = failed = 0
            try:
                end = time.monotonic() + 0.7
                number = 0
                while time.monotonic() < end:
                    number += 1
                    try:
                        disk.pwrite(block(number) * 16, 0)
                        if disk.pread(16 * BLOCK_BYTES, 0) != block(number) * 16:
                            wrong += 1
                    except OSError as error:
                        assert error.errno == errno.EIO
                        failed += 1
            finally:
                stop.set()
                thread.join()
            assert wrong == 0
            assert offences(server)["checksum"] > 0 and offences(server)["id"] == offences(server)["kind"] == 0
            assert disk.status()["counters"]["reissued"] > 0 and failed < number


def test_under_load_nothing_wrong_is_delivered(link: Link) -> None:
    """Answers in any order, one in twenty with a byte changed anywhere, several threads: right bytes or an I/O error."""
    dice = random.Random(4)

    def garble(raw: bytes, number: int, answer: Event) -> bytes:
        if number == 0 or dice.random() > 0.05:
            return raw
        return flip(raw, dice.randrange(HEADER) if dice.random() < 0.5 else dice.randrange(EVENT_BYTES))

    server = SummedServer(link.req, link.resp, bytearray(b"".join(block(number) for number in range(64))), garble=garble,
                          shuffle=8)
    with server.running(), BlockDevice(link.req, link.resp, checksum="require") as disk:
        disk.client.conduct.patience = 0
        assert mistaken(disk.pread, 64, 8, 60) == []
        status = disk.status()
        assert status["offences"]["checksum"] > 20 and status["counters"]["lives"] == 1
        assert status["counters"]["reads"] > 200
    server.close()


@pytest.mark.parametrize("at", [HEADER, HEADER + 8, HEADER + 16, HEADER + 28, 4, 16, 20])
def test_an_answer_to_an_offer_that_comes_wrong(link: Link, at: int) -> None:
    """Is asked for again; nobody takes it for a plain one."""
    left = [1]

    def garble(raw: bytes, number: int, answer: Event) -> bytes:
        if number == 0 and left:
            left.pop()
            return flip(raw, at)
        return raw

    server = SummedServer(link.req, link.resp, bytearray(1 << 16), garble=garble)
    with server.running(), BlockDevice(link.req, link.resp, checksum="auto") as disk:
        disk.pwrite(block(1), 0)
        assert disk.status()["checksum"] == "agreed"
        assert offences(disk)["checksum"] == (0 if at == 20 else 1)
    server.close()
    assert server.wrong == 0


def test_a_server_that_lies(link: Link) -> None:
    """That says yes and sends plain answers, or verifies nothing: of the first nothing is delivered, the second does no
    harm to who asks."""
    def plain(raw: bytes, number: int, answer: Event) -> bytes:
        return raw if number == 0 else answer._replace(valid=1).pack()

    server = SummedServer(link.req, link.resp, bytearray(1 << 16), garble=plain)
    with server.running(), BlockDevice(link.req, link.resp, checksum="auto") as disk:
        with pytest.raises(OSError):
            disk.pread(BLOCK_BYTES, 0)
        with pytest.raises(OSError):
            disk.pwrite(block(1), 0)
        assert offences(disk)["checksum"] == 2 * TRIES
    server.close()
    server = SummedServer(link.req, link.resp, bytearray(1 << 16), lie=True)
    with server.running(), BlockDevice(link.req, link.resp, checksum="auto") as disk:
        disk.pwrite(block(1), 0)
        assert disk.pread(BLOCK_BYTES, 0) == block(1)
    server.close()


def test_answers_that_nobody_asked_for_do_not_stop_us(link: Link) -> None:
    """With right checksums, more than there are requests: some of those are sent again, all end."""
    server: SummedServer

    def twice(raw: bytes, number: int, answer: Event) -> bytes:
        if number and number % 3 == 0:
            again = answer._replace(priv=answer.priv ^ 0x40000000)
            epoch = server._resp._words[1]
            server._resp.write(again._replace(valid=event_sum(again, number, epoch, True)).pack())
            return answer._replace(valid=event_sum(answer, number + 1, epoch, True)).pack()
        return raw

    server = SummedServer(link.req, link.resp, bytearray(block(3) * 16), garble=twice)
    with server.running(), BlockDevice(link.req, link.resp, checksum="auto") as disk:
        for _ in range(20):
            try:
                assert disk.pread(16 * BLOCK_BYTES, 0) == block(3) * 16
            except OSError as error:
                assert error.errno == errno.EIO
        assert offences(disk)["priv"] > 0 and disk.status()["counters"]["lives"] == 1
    server.close()


# ------------------------------------------------------------------ lives


def test_each_life_agrees_anew(link: Link, tmp_path: Path) -> None:
    """A server returns without checksums and with them again, under a client that would have them: it goes on; under one
    that requires them it ends."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 16))
    with link.serve(str(path), checksum="auto"):
        disk = BlockDevice(link.req, link.resp, checksum="auto")
        disk.pwrite(block(1), 0)
        assert disk.status()["checksum"] == "agreed"
    for there, word in (("off", "plain"), ("require", "agreed"), ("off", "plain")):
        with link.serve(str(path), checksum=there) as server:
            assert disk.pread(BLOCK_BYTES, 0) == block(1)
            assert disk.status()["checksum"] == word
            assert not any(offences(server).values()) and not any(offences(disk).values())
    disk.close()
    with link.serve(str(path), checksum="auto"):
        disk = BlockDevice(link.req, link.resp, checksum="require")
        assert disk.pread(BLOCK_BYTES, 0) == block(1)
    with link.serve(str(path), checksum="off"):
        with pytest.raises(OSError):
            disk.pread(BLOCK_BYTES, 0)
        assert disk.connection.failure == "the server returned without checksums, which are required"
    disk.close()


def test_each_client_agrees_anew(link: Link) -> None:
    """With and without, one after the other, at one server."""
    with link.serve("ram:64K", checksum="auto") as server:
        for here, word in (("auto", "agreed"), ("off", "plain"), ("require", "agreed"), ("off", "plain")):
            with BlockDevice(link.req, link.resp, checksum=here) as disk:
                disk.pwrite(block(1), 0)
                assert disk.pread(BLOCK_BYTES, 0) == block(1)
                assert server.status()[0]["checksum"] == word
            eventually(lambda: server.status()[0]["checksum"] == "idle")
        assert not any(offences(server).values())


def test_without_a_bell(link: Link) -> None:
    """Nothing but the channels is needed to agree."""
    with link.serve("ram:64K", checksum="auto", bells=False), \
            BlockDevice(link.req, link.resp, checksum="require", bells=False) as disk:
        disk.pwrite(block(1), 0)
        assert disk.pread(BLOCK_BYTES, 0) == block(1)


def test_a_server_that_was_killed(link: Link, tmp_path: Path) -> None:
    """Its successor finds the client's epoch, whose first request is an offer; what was in flight is executed by it."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    server = link.program(str(path), "--checksum", "require")
    with BlockDevice(link.req, link.resp, checksum="require") as disk:
        disk.pwrite(block(1) * 16, 0)
        server.end(9)
        done: list[bytes] = []
        thread = threading.Thread(target=lambda: done.append(disk.pread(16 * BLOCK_BYTES, 0)))
        thread.start()
        server = link.program(str(path), "--checksum", "require")
        thread.join(20)
        assert done == [block(1) * 16]
        [found] = [answer for answer in json.loads(run("stat", "--json").stdout) if answer["pid"] == server.pid]
        assert found["entries"][0]["checksum"] == "agreed"
        assert "checksums agreed" in run("stat").stdout


# ------------------------------------------------------------------ how it is asked for


def test_words_that_are_none(names: Callable[[str], str]) -> None:
    with pytest.raises(UsageError, match="--checksum 'yes': is one of off, auto, require"):
        from muenfast.connection import Options, channels_from_lists
        channels_from_lists("a", "b", checksum="yes", options=Options())
    found = run("blk", "--req", names("a"), "--resp", names("b"), "--checksum", "maybe")
    assert found.returncode == 2 and "--checksum 'maybe': is one of off, auto, require" in found.stderr


def test_a_policy_says_so(tmp_path: Path) -> None:
    """Each connection by itself."""
    from muenfast.policy import load
    text = """version = 1
[subjects.a]
user = "root"
[subjects.b]
user = "nobody"
[channels.q]
writer = "a"
reader = "b"
[channels.p]
writer = "b"
reader = "a"
[connections.d]
client = "a"
server = "b"
request = "q"
response = "p"
checksum = "%s"
"""
    path = tmp_path / "policy.toml"
    path.write_text(text % "require")
    policy, findings = load(str(path))
    assert policy.connections["d"].checksum == "require" and not [each for each in findings if "checksum" in str(each)]
    path.write_text(text % "sometimes")
    _, findings = load(str(path))
    assert any("checksum = 'sometimes': off, auto, require" in str(each) for each in findings)
