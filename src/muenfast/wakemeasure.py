"""What `muenfast bench wake` measures: round trips in which both sides sleep, beside those of a bare futex, and how
many system calls to wake the other side a batch costs, as the writers and the engines count them themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from muenfast import _bench, control
from muenfast.disk import BlockDevice
from muenfast.errors import MuenfastError
from muenfast.measure import Pair, Row, _Laps, _ring_bounce, _shared, _wake_bounce
from muenfast.startmeasure import Program, lists

POLICY = ("one process per CPU, pinned; both sides sleep as soon as there is nothing to read; of the engines: their own "
          "adaptive spin, then sleep on the bell")
_BATCHES = (1, 8, 64)
_DEPTHS = (1, 32)
_SIZE = 64  # bytes of an element
_BLOCK = 4096
_SLOTS = 256  # of a ring


def wake_rows(scale: float = 1.0) -> Iterator[list[Row]]:
    """A generator that cleans up when it is closed. scale: of the usual round trips of a sample."""
    pair = Pair()
    with ExitStack() as stack:
        yield list(_rows(stack, pair, scale))


def _rows(stack: ExitStack, pair: Pair, scale: float) -> Iterator[Row]:
    slept = max(100, int(2000 * scale))

    # Medians and no means: one of a thousand is disturbed by milliseconds, which is not what waking costs.
    bare = _Laps(partial(_wake_bounce, pair), slept)
    ours = _Laps(partial(_ring_bounce, pair, _SIZE, _SLOTS, True), slept)
    names = [f"{name}, median" for name in ("futex round trip", f"ring round trip {_SIZE} B, both asleep")]
    yield Row(names[0], "ns", bare.half, less=True, kind="limit", notes=bare.notes)
    yield Row(names[1], "ns", ours.half, limit=names[0], less=True, notes=ours.notes)
    for batch in _BATCHES:
        for way in ("there", "back"):
            yield Row(f"ring, wake-ups of batches of {batch}, {way}", "per batch",
                      partial(_per_batch, pair, batch, max(50, slept // 4), way == "there"), less=True, at={"batch": batch},
                      line=f"wake-ups {way}")
    req, resp = lists(1)
    program = Program(["blk", "--req", req, "--resp", resp, "--device", "ram:1M"], pair.far)
    stack.callback(program.close)
    disk = stack.enter_context(BlockDevice(req, resp))
    for depth in _DEPTHS:
        for way in ("requests", "answers"):
            yield Row(f"engines, wake-ups of {way}, depth {depth}", "per batch",
                      partial(_of_engines, program, disk, depth, max(64, int(20_000 * scale)), way), less=True,
                      at={"depth": depth}, line=f"wake-ups of {way}")


def _per_batch(pair: Pair, batch: int, count: int, there: bool) -> float:
    """Of the side that leads, or of the other one. Raises MuenfastError where not each batch was published at once."""
    ends = [_shared(_bench.HEADER + _SIZE * _SLOTS) for _ in range(2)]
    bells = [_shared(4096) for _ in range(2)]
    seen = memoryview(_shared(4096)).cast("Q")

    def run(leads: bool) -> None:
        _, batches, wakes = _bench.ring_batches(ends[leads], ends[not leads], _SIZE, batch, count, leads, bells[leads],
                                                bells[not leads])
        if leads == there:
            seen[0], seen[1] = batches, wakes

    pair.run(lambda: run(False), lambda: run(True))
    if seen[0] != count:
        raise MuenfastError(f"{seen[0]} batches were published instead of {count}")
    return seen[1] / count


def _of_engines(program: Program, disk: BlockDevice, depth: int, count: int, way: str) -> float:
    """System calls to wake the other engine for each batch that it took."""
    def now() -> tuple[int, int]:
        [entry] = control.ask(program.process.pid, {"command": "status"})["entries"]
        theirs, ours = entry["counters"], disk.client.counters
        return (ours["wakes"], theirs["batches"]) if way == "requests" else (theirs["wakes"], ours["batches"])

    places = [k % 256 * _BLOCK for k in range(256)]
    disk.client.depth = depth
    before = now()
    room = bytearray(_BLOCK * len(places))
    done = 0
    while done < count:
        if depth == 1:
            for place in places[:64]:
                disk.pread_many([place], memoryview(room)[:_BLOCK])
            done += 64
        else:
            disk.pread_many(places, room)
            done += len(places)
    after = now()
    return (after[0] - before[0]) / max(1, after[1] - before[1])
