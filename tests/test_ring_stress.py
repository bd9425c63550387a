"""Two processes and one channel: every element is whole, in order, once, and delivered + lost == written.

Rings of a few elements make overruns the rule, normal ones the exception. Lost elements are those that the reader
counts, so what lies between its last overrun and the end is in the sum.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peer
import pytest
from ring_program import PROTOCOL, number_of

from muenfast import Reader, Result, open_reader, open_writer

pytestmark = pytest.mark.stress

PROGRAM = Path(__file__).with_name("ring_program.py")
SIZES = [64, 1522, 4120]
NORMAL = 1 << 20


class Writing:
    """The writing process."""

    def __init__(self, kind: str, name: str, size: int, region: int, count: int, batch: int = 1, bell: bool = True,
                 epoch: int = 0) -> None:
        words = [kind, name, *(str(int(word)) for word in (size, region, count, batch, bell, epoch))]
        self.process = subprocess.Popen([sys.executable, str(PROGRAM), *words], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.expect("ready")

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> None:
        """Lets it close; it must end well."""
        self.expect("done")
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def writing(*words: object, **options: object) -> Iterator[Writing]:
    one = Writing(*words, **options)
    try:
        yield one
    finally:
        one.kill()


def follow(reader: Reader, count: int, batch: int, size: int) -> int:
    """Reads up to element `count`; how many were delivered."""
    delivered, next_ = 0, 0
    target = memoryview(bytearray(size * batch))
    while reader.position < count:
        assert reader.wait(30), f"nothing more after {reader.position} of {count}"
        if batch == 1:
            data = reader.read()
            got = [] if data is None else [data]
        else:
            got = [target[size * k:size * (k + 1)] for k in range(reader.read_many_into(target))]
        assert reader.result in (Result.SUCCESS, Result.OVERRUN_DETECTED)
        for k, data in enumerate(got):
            assert number_of(data) == reader.position - len(got) + k >= next_, "an element came twice, or out of order"
            next_ = reader.position - len(got) + k + 1
            delivered += 1
        assert next_ <= reader.position == delivered + reader.counters["lost"]
    return delivered


@pytest.mark.parametrize("bell", [False, True], ids=["polling", "bell"])
@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("elements", [1, 5, 0], ids=["one", "tiny", "normal"])
@pytest.mark.parametrize("size", SIZES)
def test_every_element_is_delivered_whole_or_counted_as_lost(names: Callable[[str], str], size: int, elements: int,
                                                             batch: int, bell: bool) -> None:
    """Over POSIX names, one or many at a time, with and without a bell."""
    name, count = names("stress"), 40_000
    region = 64 + size * elements if elements else NORMAL
    with writing("muenfast", name, size, region, count, batch, bell) as writer, \
            open_reader(name, protocol=PROTOCOL, bell=bell) as reader:
        assert reader.read() is None
        assert reader.result is Result.EPOCH_CHANGED
        writer.go()
        delivered = follow(reader, count, batch, size)
        assert delivered + reader.counters["lost"] == count
        assert delivered == reader.counters["elements"]
        assert (reader.read(), reader.result) == (None, Result.NO_DATA)
        writer.finish()
        assert (reader.read(), reader.result) == (None, Result.INACTIVE)


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("elements", [5, 0], ids=["tiny", "normal"])
@pytest.mark.parametrize("size", SIZES)
def test_reading_from_a_plain_peer(names: Callable[[str], str], size: int, elements: int, batch: int) -> None:
    """The same of a writer that shares no code with muenfast and rings no bell."""
    name, count = names("peer"), 10_000
    path = Path(peer.channel_path(name))
    try:
        with writing("peer", name, size, 64 + size * elements if elements else NORMAL, count, batch) as writer, \
                open_reader(name, protocol=PROTOCOL) as reader:
            reader.read()
            writer.go()
            delivered = follow(reader, count, batch, size)
            assert delivered + reader.counters["lost"] == count
            writer.finish()
    finally:
        path.unlink()


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("elements", [5, 0], ids=["tiny", "normal"])
@pytest.mark.parametrize("size", SIZES)
def test_writing_to_a_plain_peer(names: Callable[[str], str], size: int, elements: int, batch: int) -> None:
    """A reader that shares no code with muenfast finds the same: whole, in order, all accounted for."""
    name, count = names("peer"), 10_000
    with writing("muenfast", name, size, 64 + size * elements if elements else NORMAL, count, batch) as writer:
        reader = peer.ChannelReader(name, PROTOCOL, size)
        try:
            assert reader.read() == (peer.Result.EPOCH_CHANGED, None)
            writer.go()
            delivered, next_, end = 0, 0, time.monotonic() + 60
            while reader.rc < count:
                result, data = reader.read()
                assert result in ("SUCCESS", "NO_DATA", "OVERRUN_DETECTED")
                if data is not None:
                    assert number_of(data) == reader.rc - 1 >= next_
                    next_, delivered = reader.rc, delivered + 1
                assert time.monotonic() < end, f"nothing more after {reader.rc} of {count}"
            assert delivered + reader.lost == count
            writer.finish()
        finally:
            reader.close()


@pytest.mark.parametrize("kind", ["muenfast", "peer"])
@pytest.mark.parametrize("epoch", [0, 1], ids=["random epochs", "always epoch 1"])
def test_a_writer_killed_at_any_moment_is_followed_by_the_next(names: Callable[[str], str], kind: str,
                                                               epoch: int) -> None:
    """kill -9 in the middle of anything: what was published is whole, the next life is announced and read on."""
    name, size, batch = names("kill"), 1522, 20
    chance = random.Random()
    target = memoryview(bytearray(size * batch))
    # The region outlives its users here, as one that a policy made.
    path = Path(peer.channel_path(name))
    path.write_bytes(bytes(64 + size * 50))
    try:
        with open_reader(name, protocol=PROTOCOL) as reader:
            for life in range(8):
                with writing(kind, name, size, 64 + size * 50, 0, chance.choice((1, 3, batch)), epoch=epoch) as writer:
                    results = []
                    while reader.wait(0):
                        reader.read_many_into(target)
                        results.append(reader.result)
                    assert results[-1] is Result.EPOCH_CHANGED, f"life {life}: {results}"
                    writer.go()
                    next_, left = 0, chance.randrange(1, 300)
                    while True:
                        if not reader.wait(0 if left <= 0 else 30):
                            break
                        got = reader.read_many_into(target)
                        assert reader.result in (Result.SUCCESS, Result.OVERRUN_DETECTED)
                        for k in range(got):
                            number = number_of(target[size * k:size * (k + 1)])
                            assert number == reader.position - got + k >= next_
                            next_ = number + 1
                        left -= 1
                        if left == 0:
                            os.kill(writer.process.pid, signal.SIGKILL)
                            writer.process.wait()
                    assert reader.result in (Result.SUCCESS, Result.OVERRUN_DETECTED)
                    assert (reader.read(), reader.result, reader.pending) == (None, Result.NO_DATA, 0)
            with open_writer(name, size=size, protocol=PROTOCOL) as last:   # takes a dead one's claim, and gives it back
                assert (reader.read(), reader.result, reader.epoch) == (None, Result.EPOCH_CHANGED, last.epoch)
            assert reader.counters["epochs"] == 9
    finally:
        path.unlink()
