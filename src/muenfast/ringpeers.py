"""The ring beside what else moves messages between two processes, in one run: plain C of the same protocol, a bare queue,
multiprocessing, POSIX message queues, and, where they are installed, pyzmq, faster-fifo and iceoryx2.

Rows as in measure.py, taken in turns. The sender is a forked process on the last CPU, the receiver this one on the first.
Rows have notes: CPU time of both sides for each operation, and how many messages were lost.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from muenfast import _bench, measure
from muenfast.errors import MuenfastError
from muenfast.measure import Pair, Row

POLICY = ("one process per CPU, pinned, the sender on the last one; rings and the bare queue: producers at most 256 KiB "
          "ahead; polite: 128 pauses between two looks at an empty or full ring, tight: none; the ring from Python looks "
          "again at once; round trips: C looks after one pause, Python at once; what peers do stands in their names")
SHAPES = ((64, 4096), (1522, 1024), (4120, 512))  # bytes of a message, elements of a ring
# As large as the others: out of one of 256 KiB everything comes from the writer's second-level cache, at a third of that.
LARGE = (64, 32768)
BATCH = 64
PAUSES = {"polite": 128, "tight": 0}
_TRIP = 64  # bytes of a round trip's message
_SLOTS = 64  # elements of a round trip's rings

Send = Callable[[int, Callable[[], None]], None]  # messages, ready(): waits for the receiver
Receive = Callable[[int, Callable[[], None]], int]  # messages, start(): lets the sender begin; how many came


@dataclass(frozen=True)
class Peer:
    """open(stack, size) makes what both sides need, before the fork. rate: messages/s that it is about to reach, for the
    length of a sample. module: what has to be installed, and package, where that has another name."""

    name: str
    open: Callable[[ExitStack, int], tuple[Send, Receive]]
    rate: int
    module: str | None = None
    package: str | None = None

    @property
    def missing(self) -> str | None:
        """Why there can be no figures, with the command that helps."""
        if self.module is None or find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed: pip install {self.package or self.module}"


def _message(size: int) -> bytes:
    return bytes(range(64)) * (size // 64) + bytes(size % 64)


def _exact(last: bytes | None, data: bytes, peer: str) -> None:
    if last != data:
        raise MuenfastError(f"{peer}: the last message is not what was sent")


def _pipe(stack: ExitStack, size: int) -> tuple[Send, Receive]:
    from multiprocessing import Pipe

    far, near = (stack.enter_context(end) for end in reversed(Pipe(duplex=False)))
    data = _message(size)

    def send(count: int, ready: Callable[[], None]) -> None:
        put = far.send_bytes
        ready()
        for _ in range(count):
            put(data)

    def receive(count: int, start: Callable[[], None]) -> int:
        take, last = near.recv_bytes, None
        start()
        for _ in range(count):
            last = take()
        _exact(last, data, "multiprocessing.Pipe")
        return count

    return send, receive


def _mp_queue(stack: ExitStack, size: int) -> tuple[Send, Receive]:
    from multiprocessing import get_context

    queue: Any = get_context("fork").Queue()
    stack.callback(queue.close)
    data = _message(size)

    def send(count: int, ready: Callable[[], None]) -> None:
        ready()
        for _ in range(count):
            queue.put(data)
        queue.close()
        queue.join_thread()

    def receive(count: int, start: Callable[[], None]) -> int:
        last = None
        start()
        for _ in range(count):
            last = queue.get()
        _exact(last, data, "multiprocessing.Queue")
        return count

    return send, receive


def _posix(stack: ExitStack, size: int) -> tuple[Send, Receive]:
    import posix_ipc  # type: ignore[import-not-found,unused-ignore]

    name = f"/muenfast-bench-{os.getpid()}"
    queue = posix_ipc.MessageQueue(name, posix_ipc.O_CREX, max_messages=10, max_message_size=size)
    stack.callback(queue.close)
    queue.unlink()
    data = _message(size)

    def send(count: int, ready: Callable[[], None]) -> None:
        ready()
        for _ in range(count):
            queue.send(data)

    def receive(count: int, start: Callable[[], None]) -> int:
        last = None
        start()
        for _ in range(count):
            last = queue.receive()[0]
        _exact(last, data, "posix_ipc")
        return count

    return send, receive


def _zmq(stack: ExitStack, size: int) -> tuple[Send, Receive]:
    import zmq  # type: ignore[import-not-found,unused-ignore]

    place = f"ipc://{stack.enter_context(tempfile.TemporaryDirectory(prefix='muenfast-bench-'))}/s"
    data = _message(size)

    def send(count: int, ready: Callable[[], None]) -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            ready()
            socket.connect(place)
            put = socket.send
            for _ in range(count):
                put(data)

    def receive(count: int, start: Callable[[], None]) -> int:
        last = None
        with zmq.Context() as context, context.socket(zmq.PULL) as socket:
            socket.bind(place)
            start()
            take = socket.recv
            for _ in range(count):
                last = take()
        _exact(last, data, "pyzmq")
        return count

    return send, receive


def _fifo(stack: ExitStack, size: int, many: bool) -> tuple[Send, Receive]:
    from faster_fifo import Queue  # type: ignore[import-not-found,unused-ignore]

    queue: Any = Queue(max_size_bytes=1 << 20, loads=bytes, dumps=lambda message: message)
    stack.callback(queue.close)
    data = _message(size)

    def send(count: int, ready: Callable[[], None]) -> None:
        messages = [data] * BATCH
        ready()
        if many:
            for _ in range(count // BATCH):
                queue.put_many(messages)
        else:
            for _ in range(count):
                queue.put(data)

    def receive(count: int, start: Callable[[], None]) -> int:
        last, got = None, 0
        start()
        if many:
            while got < count:
                messages = queue.get_many(max_messages_to_get=BATCH)
                got, last = got + len(messages), messages[-1]
        else:
            for got in range(1, count + 1):  # noqa: B007
                last = queue.get()
        _exact(last, data, "faster-fifo")
        return got

    return send, receive


class _Iceoryx:
    """A service of iceoryx2 for messages of one size; each side makes its own node after the fork. Nothing is discarded:
    the publisher tries again until there is room."""

    DEEP = 256

    def __init__(self, name: str, size: int) -> None:
        import ctypes

        import iceoryx2  # type: ignore[import-not-found,import-untyped,unused-ignore]

        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)

        class Message(ctypes.Structure):
            _fields_ = [("data", ctypes.c_uint8 * size)]

            @staticmethod
            def type_name() -> str:
                return f"Message{size}"

        self.kind, self._i = Message, iceoryx2
        self.node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)
        self.service = (self.node.service_builder(iceoryx2.ServiceName.new(name)).publish_subscribe(Message)
                        .enable_safe_overflow(False).subscriber_max_buffer_size(self.DEEP).open_or_create())

    def publisher(self) -> Any:
        return self.service.publisher_builder().backpressure_strategy(
            self._i.BackpressureStrategy.RetryUntilDelivered).create()

    def subscriber(self) -> Any:
        return self.service.subscriber_builder().buffer_size(self.DEEP).create()


def _iceoryx(stack: ExitStack, size: int) -> tuple[Send, Receive]:
    import ctypes

    name = f"muenfast-bench-{os.getpid()}-{time.monotonic_ns()}"
    data = _message(size)
    gone = stack.enter_context(_Signal())

    def send(count: int, ready: Callable[[], None]) -> None:
        end = _Iceoryx(name, size)
        publisher, message = end.publisher(), end.kind.from_buffer_copy(data)
        put = publisher.send_copy
        ready()
        for _ in range(count):
            put(message)
        gone.wait()     # what it has sent goes with the publisher

    def receive(count: int, start: Callable[[], None]) -> int:
        subscriber = _Iceoryx(name, size).subscriber()
        take, read, last, got = subscriber.receive, ctypes.string_at, None, 0
        start()
        while got < count:
            sample = take()
            if sample is not None:
                last = read(sample.payload_ptr, size)
                got += 1
        gone.set()
        _exact(last, data, "iceoryx2")
        return got

    return send, receive


class _Signal:
    """One side waits, asleep, for the other; made before the fork."""

    def __enter__(self) -> _Signal:
        self._ends = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            os.close(end)

    def set(self) -> None:
        os.write(self._ends[1], b"x")

    def wait(self) -> None:
        os.read(self._ends[0], 1)


PEERS = (
    Peer("multiprocessing.Queue (blocks)", _mp_queue, 180_000),
    Peer("multiprocessing.Pipe, bytes (blocks)", _pipe, 600_000),
    Peer("pyzmq PUSH/PULL ipc (blocks)", _zmq, 1_000_000, "zmq", "pyzmq"),
    Peer("faster-fifo, bytes (blocks)", partial(_fifo, many=False), 400_000, "faster_fifo", "faster-fifo"),
    Peer("faster-fifo, bytes, put_many/get_many of 64 (blocks)", partial(_fifo, many=True), 1_100_000, "faster_fifo",
         "faster-fifo"),
    Peer("iceoryx2 publish-subscribe (looks again at once)", _iceoryx, 500_000, "iceoryx2"),
    Peer("posix_ipc message queue of 10 (blocks)", _posix, 180_000, "posix_ipc"),
)
QUEUE, PIPE, ZMQ, FIFO, MANY, ICEORYX, POSIX = (peer.name for peer in PEERS)


def _python(size: int, batch: int) -> str:
    return f"ring from Python, {'one by one' if batch == 1 else f'batches of {batch}'}: {size} B"


def _engine(size: int, batch: int, polling: str, where: str = "") -> str:
    return f"engine's loop, batch {batch}, {polling}: {size} B{where}"


def _plain(size: int, polling: str, where: str = "") -> str:
    return f"plain C, {polling}: {size} B{where}"


IN_LARGE = " in 2 MiB"


TRIP = "round trip of 64 B, both looking: "

# (row, held against, least ratio). The engine's loop and plain C poll equally.
FLOORS: tuple[tuple[str, str, float], ...] = (
    (_python(64, 1), f"{FIFO}: 64 B", 10), (_python(64, 1), f"{ICEORYX}: 64 B", 8), (_python(64, 1), f"{ZMQ}: 64 B", 2.5),
    (_python(64, 1), f"{PIPE}: 64 B", 5),
    (_python(64, 64), f"{MANY}: 64 B", 100), (_python(1522, 64), f"{MANY}: 1522 B", 9),
    (_python(4120, 64), f"{MANY}: 4120 B", 4),
    (f"{TRIP}ring from Python", f"{TRIP}iceoryx2", 8),
    *((_engine(64, 64, polling, where), _plain(64, polling, where), 4.0) for where in ("", IN_LARGE) for polling in PAUSES),
    *((_engine(1522, 1, polling), _plain(1522, polling), 1.6) for polling in PAUSES),
    *((_engine(4120, 1, polling), _plain(4120, polling), 1.4) for polling in PAUSES),
    (_engine(64, 64, "polite"), "copy: 64 B", 0.7), (_engine(64, 64, "polite", IN_LARGE), f"copy: 64 B{IN_LARGE}", 0.7),
    (_engine(1522, 64, "polite"), "copy: 1522 B", 0.88), (_engine(4120, 64, "polite"), "copy: 4120 B", 0.88))


def floors(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a report of these rows: every ratio that has a floor, as row, limit, ratio (None: one of the two is missing),
    floor and met (None where there is no ratio)."""
    rows = {row["name"]: row for row in report["rows"]}

    def entry(name: str, limit: str, floor: float) -> dict[str, Any]:
        ratio = rows[name]["ratios"].get(limit)
        return {"row": name, "limit": limit, "ratio": ratio, "floor": floor,
                "met": None if ratio is None else ratio >= floor}

    return [entry(*floor) for floor in FLOORS if floor[0] in rows]


def spread(row: dict[str, Any]) -> str:
    """Of a report's row: the furthest that a sample is from the median, each way, in percent."""
    if not row["samples"] or not row["median"]:
        return ""
    low, high = (100 * seen / row["median"] - 100 for seen in (min(row["samples"]), max(row["samples"])))
    return f"{low:+.0f} {high:+.0f} %"


def _cpu() -> float:
    """Seconds of CPU that this process and its children which have ended took."""
    return sum(usage.ru_utime + usage.ru_stime
               for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def _row(name: str, count: int, call: Callable[[], tuple[float, int]], trip: bool = False, missing: str | None = None,
         limits: tuple[str, ...] = (), cost: bool = True) -> Row:
    """call(): the seconds that `count` operations took, and how many of them were lost. cost: whether it did nothing else.
    """
    row = Row(name, "ns" if trip else "elements/s", lambda: 0.0, limit=limits[0] if limits else None, beside=limits[1:],
              less=trip, missing=missing)

    def sample() -> float:
        before = _cpu()
        seconds, lost = call()
        if cost:
            row.notes.setdefault("CPU ns each", []).append((_cpu() - before) / count * 1e9)
        row.notes.setdefault("lost", []).append(lost)
        return seconds / count * 1e9 if trip else (count - lost) / seconds

    row.sample = sample
    return row


def _seconds(rate: Callable[[], float], count: int) -> tuple[float, int]:
    """Of a measurement of measure.py, which tells operations per second and raises where one is lost."""
    return count / rate(), 0


def _transfer(pair: Pair, peer: Peer, size: int, count: int) -> tuple[float, int]:
    with ExitStack() as stack:
        send, receive = peer.open(stack, size)
        go = stack.enter_context(_Signal())
        begin = 0.0

        def start() -> None:
            nonlocal begin
            go.set()
            begin = time.perf_counter()

        def take() -> tuple[float, int]:
            got = receive(count, start)
            return time.perf_counter() - begin, count - got

        seconds, lost = pair.run(lambda: send(count, go.wait), take)
        return float(seconds), int(lost)


def _c_ring(pair: Pair, size: int, elements: int, batch: int, pauses: int, count: int, plain: bool) -> tuple[float, int]:
    region, words, area = measure._shared(measure._HEADER + size * elements), measure._shared(4096), measure._area(elements)
    if plain:
        seconds, lost = pair.run(lambda: _bench.plain_ring_write(region, words, size, area, count, pauses),
                                 lambda: _bench.plain_ring_read(region, words, size, area, count, pauses))
    else:
        seconds, lost = pair.run(lambda: _bench.ring_write(region, words, size, batch, area, count, pauses),
                                 lambda: _bench.ring_read(region, words, size, batch, area, count, pauses))
    if lost:
        raise MuenfastError(f"{lost} elements were lost under flow control")
    return seconds, lost


def _trip(pair: Pair, call: Callable[[Any, Any, int, int, bool], float], count: int) -> tuple[float, int]:
    ends = [measure._shared(measure._HEADER + _TRIP * _SLOTS) for _ in range(2)]
    return measure._both(pair, lambda leads: call(ends[leads], ends[not leads], _TRIP, count, leads)), 0


def _python_bounce(out: Any, back: Any, size: int, count: int, leads: bool) -> float:
    """Round trips by Writer.write and Reader.read; seconds."""
    from muenfast import Reader, Writer

    data = bytes(size)
    with Writer(out, size=size, protocol=1) as writer, Reader(back, protocol=1) as reader:
        write, read = writer.write, reader.read
        while reader.epoch == 0:
            read()
        start = time.perf_counter()
        if leads:
            for _ in range(count):
                write(data)
                while read() is None:
                    pass
        else:
            for _ in range(count):
                while read() is None:
                    pass
                write(data)
        return time.perf_counter() - start


def _iceoryx_trip(pair: Pair, count: int) -> tuple[float, int]:
    import ctypes

    data = bytes(_TRIP)
    names = [f"muenfast-bench-{os.getpid()}-{time.monotonic_ns()}-{k}" for k in range(2)]
    with _Signal() as there, _Signal() as go, _Signal() as done:
        def bounce(leads: bool) -> float:
            out, back = _Iceoryx(names[leads], _TRIP), _Iceoryx(names[not leads], _TRIP)
            put, take, read = out.publisher().send_copy, back.subscriber().receive, ctypes.string_at
            message = out.kind.from_buffer_copy(data)
            (there.wait if leads else there.set)()
            (go.set if leads else go.wait)()
            start = time.perf_counter()
            for _ in range(count):
                if leads:
                    put(message)
                while (sample := take()) is None:
                    pass
                read(sample.payload_ptr, _TRIP)
                if not leads:
                    put(message)
            passed = time.perf_counter() - start
            (done.set if leads else done.wait)()
            return passed

        return measure._both(pair, bounce), 0


def ring_peer_rows(scale: float = 1.0) -> list[Row]:
    """The ring from Python and its engine's loop beside their peers, by the size of a message. A peer that is not installed
    is a row with `missing`. scale: of the usual work per sample.
    """
    return list(_rows(Pair(), scale))


def _c_rows(pair: Pair, size: int, elements: int, volume: int, where: str = "") -> Iterator[Row]:
    """The engine's loop beside plain C, a bare queue and copies. where: what tells these rows from others of that size."""
    copy, queue = f"copy: {size} B{where}", f"bare queue, one by one, polite: {size} B{where}"
    count = max(1000, min(volume // size, 20_000_000))
    yield _row(copy, count, partial(_seconds, partial(measure._copy, pair, size, elements, volume), count),
               cost=False)  # the best of several
    yield _row(queue, count, partial(_seconds, partial(measure._queue, pair, size, elements, volume), count),
               limits=(copy,))
    for polling, pauses in PAUSES.items():
        c_ring = partial(_c_ring, pair, size, elements, pauses=pauses, count=count)
        yield _row(_plain(size, polling, where), count, partial(c_ring, batch=1, plain=True))
        for batch in (1, BATCH):
            name = _engine(size, batch, polling, where)
            own = (_plain(size, polling, where), *((copy,) if polling == "polite" and batch > 1 else ()),
                   *((queue,) if polling == "polite" and batch == 1 else ()))
            yield _row(name, count, partial(c_ring, batch=batch, plain=False), limits=own)


def _rows(pair: Pair, scale: float) -> Iterator[Row]:
    def limits(name: str) -> tuple[str, ...]:
        return tuple(limit for row, limit, _ in FLOORS if row == name)

    def many(number: float) -> int:
        return max(BATCH, int(number * scale) // BATCH * BATCH)

    volume = max(4096, int(400_000_000 * scale))
    for size, elements in SHAPES:
        for batch, count in ((1, many(1_000_000)), (BATCH, many(min(1e9 / size, 1e7)))):
            name = _python(size, batch)
            some = [f"{peer.name}: {size} B" for peer in PEERS if (peer.name == MANY) == (batch > 1)]
            python = partial(measure._python_ring, pair, size, elements, batch, count)
            yield _row(name, count, partial(_seconds, python, count),
                       limits=(*limits(name), *(peer for peer in some if peer not in limits(name))))
        for peer in PEERS:
            count = many(peer.rate / 4)
            yield _row(f"{peer.name}: {size} B", count, partial(_transfer, pair, peer, size, count), missing=peer.missing)
        yield from _c_rows(pair, size, elements, volume)
    yield from _c_rows(pair, *LARGE, volume, IN_LARGE)
    count = many(50_000)
    yield _row(f"{TRIP}plain C", count, partial(_trip, pair, _bench.plain_bounce, count), trip=True)
    yield _row(f"{TRIP}engine's loop", count, partial(_trip, pair, partial(_bench.ring_bounce, laps=None), count),
               trip=True, limits=(f"{TRIP}plain C",))
    yield _row(f"{TRIP}ring from Python", count, partial(_trip, pair, _python_bounce, count), trip=True,
               limits=(f"{TRIP}iceoryx2",))
    iceoryx = next(peer for peer in PEERS if peer.name == ICEORYX)
    few = many(10_000)
    yield _row(f"{TRIP}iceoryx2", few, partial(_iceoryx_trip, pair, few), trip=True, missing=iceoryx.missing)
