"""Model-based tests: Writers and Readers against a deque, and readers against a writer that stops between any two stores.

Rings are tiny, so that a few steps wrap, fill and overrun them.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from muenfast import Reader, Result, UsageError, Writer

TRANSPORT, PROTOCOL = 0x487312B6B79A9B6D, 0xABCD
TRANSPORT_WORD, EPOCH, PROTOCOL_WORD, SIZE, ELEMENTS, RESERVED, WSC, WC = range(8)
U64 = 1 << 64
QUIET = {"deadline": None, "database": None, "derandomize": True,
         "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@dataclass
class Channel:
    """What a channel is, seen from outside: one life after the other, each a row of elements."""

    elements: int
    life: int = 0               # 0: none yet; each activation is a new one
    active: bool = False
    epoch: int = 0
    written: int = 0
    kept: deque[bytes] = field(default_factory=deque)


@dataclass
class Follower:
    """What one reader knows: the epoch it is in, and how far it is in which life."""

    reader: Reader
    epoch: int = 0
    rc: int = 0
    seen: int = 0               # WC when it last looked: elements seen together are read without looking again
    lost: int = 0
    delivered: int = 0


class Ring(RuleBasedStateMachine):
    """One Writer, up to three Readers that come at any time, and every call in any order."""

    followers = Bundle("followers")

    @initialize(elements=st.integers(1, 5), size=st.integers(1, 9), rest=st.integers(0, 8))
    def make(self, elements: int, size: int, rest: int) -> None:
        self.size = size
        self.memory = bytearray(64 + elements * size + rest % size)
        self.channel = Channel(elements, life=1, active=True, epoch=1, kept=deque(maxlen=elements))
        self.writer = Writer(self.memory, size=size, protocol=PROTOCOL, epoch=1)
        self.count = 0
        self.everyone: list[Follower] = []

    def item(self) -> bytes:
        """An element unlike those before it, as far as its few bytes allow."""
        self.count += 1
        return (self.count % (1 << 8 * min(self.size, 8))).to_bytes(self.size, "little")

    @rule(target=followers, any_size=st.booleans())
    def reader_comes(self, any_size: bool) -> Follower:
        follower = Follower(Reader(self.memory, protocol=PROTOCOL, size=None if any_size else self.size))
        self.everyone.append(follower)
        return follower

    @rule(count=st.integers(0, 12), contiguous=st.booleans(), one=st.booleans())
    def write(self, count: int, contiguous: bool, one: bool) -> None:
        items = [self.item() for _ in range(count)]
        try:
            if one:
                for item in items:
                    self.writer.write(item)
            else:
                assert self.writer.write_many(b"".join(items) if contiguous else items) == count
        except UsageError:
            assert not self.channel.active
            return
        assert self.channel.active or (not items and (one or not contiguous))
        self.channel.kept.extend(items)
        self.channel.written += count

    @rule(data=st.binary(max_size=8))
    def write_short(self, data: bytes) -> None:
        if self.channel.active and len(data) <= self.size:
            self.writer.write(data)
            self.channel.kept.append(data + bytes(self.size - len(data)))
            self.channel.written += 1

    @rule(same=st.booleans())
    def activate(self, same: bool) -> None:
        """A new epoch, or the old one again after every reader saw that it had ended."""
        if same and not self.channel.active:
            for follower in self.everyone:
                assert (follower.reader.read(), follower.reader.result) == (None, Result.INACTIVE)
                follower.epoch = 0
            epoch = self.channel.epoch
        else:
            epoch = self.channel.epoch + 1
        self.writer.activate(epoch)
        self.begin(epoch)

    @precondition(lambda self: self.channel.active)
    @rule()
    def restart_under_the_same_epoch(self) -> None:
        """WC is 0 again, and every reader looks before it gets as far as the reader was."""
        self.writer.activate(self.channel.epoch)
        self.begin(self.channel.epoch)
        for follower in self.everyone:
            if follower.epoch == self.channel.epoch:
                if follower.rc > 0:
                    assert (follower.reader.read(), follower.reader.result) == (None, Result.EPOCH_CHANGED)
                follower.rc = follower.seen = 0

    @rule()
    def deactivate(self) -> None:
        self.writer.deactivate()
        self.channel.active = False

    def begin(self, epoch: int) -> None:
        self.channel.life += 1
        self.channel.active, self.channel.epoch, self.channel.written = True, epoch, 0
        self.channel.kept.clear()

    def expected(self, follower: Follower) -> tuple[Result, int]:
        """What the next read must say, and how many elements there are to read. Moves the follower for all but data."""
        channel = self.channel
        if not channel.active:
            follower.epoch = 0
            return Result.INACTIVE, 0
        if follower.epoch != channel.epoch:
            follower.epoch, follower.rc, follower.seen = channel.epoch, 0, 0
            return Result.EPOCH_CHANGED, 0
        behind = channel.written - follower.rc
        if behind == 0:
            return Result.NO_DATA, 0
        if behind > channel.elements:
            follower.rc = follower.seen = channel.written
            follower.lost += behind
            return Result.OVERRUN_DETECTED, 0
        if follower.seen == follower.rc:
            follower.seen = channel.written
        return Result.SUCCESS, follower.seen - follower.rc

    def take(self, follower: Follower, count: int) -> list[bytes]:
        """The elements that a successful read of `count` must give."""
        first = len(self.channel.kept) - (self.channel.written - follower.rc)
        follower.rc += count
        follower.delivered += count
        return [self.channel.kept[first + k] for k in range(count)]

    @rule(follower=followers)
    def read(self, follower: Follower) -> None:
        result, _ = self.expected(follower)
        data = follower.reader.read()
        assert follower.reader.result is result
        assert data == (self.take(follower, 1)[0] if result is Result.SUCCESS else None)

    @rule(follower=followers, room=st.integers(1, 8), extra=st.integers(0, 8))
    def read_many(self, follower: Follower, room: int, extra: int) -> None:
        result, available = self.expected(follower)
        target = bytearray(room * self.size + extra % self.size)
        count = follower.reader.read_many_into(target)
        assert (follower.reader.result, count) == (result, min(available, room))
        assert bytes(target[:count * self.size]) == b"".join(self.take(follower, count))
        if result is Result.SUCCESS:    # after an overrun, what was copied before it was seen stands there
            assert not any(target[count * self.size:])

    @rule(follower=followers)
    def drain(self, follower: Follower) -> None:
        follower.reader.drain()
        follower.epoch = self.channel.epoch if self.channel.active else 0
        if self.channel.active:
            follower.rc = follower.seen = self.channel.written

    @rule(follower=followers)
    def wait(self, follower: Follower) -> None:
        """True exactly when a read would say something else than that there is nothing new."""
        current = self.channel.epoch if self.channel.active else 0
        news = follower.epoch != current or (current != 0 and follower.rc != self.channel.written)
        assert follower.reader.wait(0) is news

    @rule(follower=followers)
    def close(self, follower: Follower) -> None:
        follower.reader.close()
        follower.reader.close()
        follower.reader = Reader(self.memory, protocol=PROTOCOL)
        follower.epoch = follower.rc = follower.seen = follower.lost = follower.delivered = 0

    @invariant()
    def counters_agree(self) -> None:
        if not hasattr(self, "everyone"):
            return
        assert self.writer.written == self.channel.written
        for follower in self.everyone:
            counters = follower.reader.counters
            assert (counters["elements"], counters["lost"]) == (follower.delivered, follower.lost)
            if follower.epoch:
                assert (follower.reader.epoch, follower.reader.position) == (follower.epoch, follower.rc)

    def teardown(self) -> None:
        if hasattr(self, "everyone"):
            for follower in self.everyone:
                follower.reader.close()
            self.writer.close()
            self.memory.append(0)   # nobody holds a buffer of it any more


TestRing = Ring.TestCase
TestRing.settings = settings(max_examples=500, stateful_step_count=50, **QUIET)


# ------------------------------------------------------------------ a writer that stops between two stores

class Stepwise:
    """A writer as the protocol prescribes it, one store at a time."""

    def __init__(self, elements: int, size: int, epochs: list[int], batches: list[int], counter: int) -> None:
        self.elements, self.size, self.epochs, self.batches, self.counter = elements, size, epochs, batches, counter
        self.memory = bytearray(64 + elements * size)
        self.life = -1
        self.wc = 0
        self.fresh = False                      # active, and nothing written yet
        self.serial = 0
        self.content: dict[int, bytes] = {}     # of this life, complete and published

    def store(self, word: int, value: int) -> None:
        struct.pack_into("=Q", self.memory, 8 * word, value % U64)

    def steps(self):
        """Yields after each store."""
        for life, epoch in enumerate(self.epochs):
            self.store(EPOCH, 0)
            self.life, self.content = life, {}
            yield
            for at in range(64, len(self.memory)):
                self.memory[at] = 0
                if at % 3 == 0:
                    yield
            start = self.counter if life == 0 else 0
            for word, value in ((TRANSPORT_WORD, TRANSPORT), (PROTOCOL_WORD, PROTOCOL), (SIZE, self.size),
                                (ELEMENTS, self.elements), (RESERVED, 0), (WSC, start), (WC, start)):
                self.store(word, value)
                yield
            self.wc = start
            self.store(EPOCH, epoch)
            self.fresh = True
            yield
            self.fresh = False
            for batch in self.batches:
                n = min(batch, self.elements)
                self.store(WSC, self.wc + n)
                yield
                items = {}
                for k in range(n):
                    self.serial += 1
                    items[(self.wc + k) % U64] = data = bytes([self.serial % 255 + 1]) * self.size
                    at = 64 + (self.wc + k) % U64 % self.elements * self.size
                    for i in range(self.size):
                        self.memory[at + i] = data[i]
                        yield
                self.content.update(items)
                self.wc += n
                self.store(WC, self.wc)
                yield


@settings(max_examples=1000, **QUIET)
@given(elements=st.sampled_from([1, 2, 4, 8]), size=st.integers(1, 4),
       epochs=st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=3),
       batches=st.lists(st.integers(1, 8), min_size=1, max_size=6), high=st.booleans(), data=st.data())
def test_only_what_was_completely_published_is_delivered(elements: int, size: int, epochs: list[int],
                                                         batches: list[int], high: bool, data: st.DataObject) -> None:
    """Between any two stores of the writer three readers of different diligence look.

    What they get was published in the present life under that number, and is whole; what they report as lost is exactly
    the distance to WC; and together the two account for every element up to where they stand. Counters start near 2^64
    in some of the runs. (A life under the same epoch is noticed when WC is below RC, so each reader looks once then.)
    """
    if high:    # one life: behind 2^64 another one could not be told from the wrap
        del epochs[1:]
    writer = Stepwise(elements, size, epochs, batches, U64 - 3 if high else 0)
    readers = [Reader(writer.memory, protocol=PROTOCOL) for _ in range(3)]
    target = bytearray(size * 8)
    # By reader: the life that it reads, the counter it began with, what it got and lost since.
    life, got, lost = [-1] * 3, [0] * 3, [0] * 3

    def look(k: int, many: bool) -> Result:
        reader = readers[k]
        before = reader.position
        if many:
            count = reader.read_many_into(target)
            items = [bytes(target[size * i:size * (i + 1)]) for i in range(count)]
        else:
            item = reader.read()
            items = [] if item is None else [item]
        if reader.result is Result.SUCCESS:
            assert life[k] == writer.life, "an element of a former life"
            for i, item in enumerate(items):
                assert writer.content[(before + i) % U64] == item
            got[k] += len(items)
        elif reader.result is Result.OVERRUN_DETECTED:
            assert reader.lost == (writer.wc - before) % U64
            assert reader.position == writer.wc % U64
            lost[k] += reader.lost
        elif reader.result is Result.EPOCH_CHANGED:
            life[k], got[k], lost[k] = writer.life, 0, 0
            assert reader.position == 0
        elif reader.result is Result.NO_DATA:
            assert reader.position == writer.wc % U64
            if writer.wc == 0:      # a life that has begun where another stands that went no further is the same to it
                life[k], got[k], lost[k] = writer.life, 0, 0
        else:
            assert reader.result is Result.INACTIVE
        if reader.epoch:
            assert (got[k] + lost[k]) % U64 == reader.position
        return reader.result

    pace = [1, data.draw(st.integers(2, 7), label="pace"), data.draw(st.integers(8, 60), label="slow pace")]
    for step, _ in enumerate(writer.steps()):
        for k in range(3):
            fresh = life[k] != writer.life and writer.fresh
            if step % pace[k] == 0 or fresh:
                look(k, many=(step // pace[k]) % 2 == 0)
    for k in range(3):      # the writer stopped for good: what is there is read, and then there is silence
        while look(k, many=False) not in (Result.NO_DATA, Result.INACTIVE):
            pass
        assert readers[k].position == writer.wc % U64
        readers[k].close()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("start", range(4))
def test_every_crash_point_of_one_batch(start: int, batch: int) -> None:
    """A writer dies after each single store of a write into a full ring of four: per point, who reads what.

    A reader at distance d from WC keeps its element until WSC says that the slot goes; never one byte of the new ones
    before WC says so.
    """
    point = 0
    while True:
        writer = Stepwise(4, 3, [7], [1] * (4 + start) + [batch], 0)
        steps = writer.steps()
        total = 1
        while writer.wc < 4 + start:
            next(steps)
            total += 1
        readers = {rc: Reader(writer.memory, protocol=PROTOCOL) for rc in range(start, 5 + start)}
        for rc, reader in readers.items():     # placed by showing WC = RC
            writer.store(WSC, rc)
            writer.store(WC, rc)
            reader.drain()
        writer.store(WSC, writer.wc)
        writer.store(WC, writer.wc)
        old = dict(writer.content)
        done = False
        for _ in range(point):
            done = next(steps, "end") == "end"
        wsc, wc = struct.unpack_from("=QQ", writer.memory, 48)
        for rc, reader in readers.items():
            data = reader.read()
            if rc == wc:
                assert (data, reader.result) == (None, Result.NO_DATA)
            elif wsc - rc > 4:
                assert (data, reader.result, reader.lost) == (None, Result.OVERRUN_DETECTED, wc - rc)
            else:
                assert data == (old | writer.content)[rc]
            reader.close()
        if done:
            assert point == 2 + 3 * batch + 1
            return
        point += 1
