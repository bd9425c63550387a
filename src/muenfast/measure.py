"""What `muenfast bench` measures: rings and block I/O between two pinned processes, beside limits of the same run.

Samples of all rows are taken in turns (round by round), so that a disturbance of the machine meets all of them. Every
sample is kept; figures are medians. Each row names the limit it is held against; the ratio is 1 when they are equal.
"""

from __future__ import annotations

import array
import mmap
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from muenfast import _bench
from muenfast.errors import MuenfastError, UsageError

POLICY = ("one process per CPU, pinned; an empty or full ring is looked at again after 128 pauses; round trips look after "
          "one pause; block I/O: the engines' own adaptive spin, then sleep on the bell")
_HEADER = 64
_BLOCK = 4096
RING_SHAPES = ((64, 4096), (1522, 1024), (4120, 512), (131072, 32))  # bytes of an element, elements
BATCHES = (1, 8, 64)
DEPTHS = (1, 8, 32)


@dataclass
class Row:
    """One figure: samples of `unit`, more is better unless `less`, held against the row called `limit`."""

    name: str
    unit: str
    sample: Callable[[], float] = field(repr=False)
    limit: str | None = None
    less: bool = False
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


class Pair:
    """Two CPUs: this process on the first, a forked child on the second for one task at a time."""

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise UsageError("two CPUs are needed", hint="run it where taskset allows two")
        self.near, self.far = cpus[0], cpus[-1]

    def run(self, child: Callable[[], object], parent: Callable[[], Any]) -> Any:
        """Runs both at once; what parent returned. Raises MuenfastError when the child failed."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.sched_setaffinity(0, {self.far})
                child()
                status = 0
            except BaseException as error:
                print(f"muenfast: bench: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self.near})
        try:
            result = parent()
        finally:
            os.sched_setaffinity(0, before)
            _, status = os.waitpid(pid, 0)
        if status != 0:
            raise MuenfastError("the other process of a measurement failed")
        return result


def environment() -> dict[str, Any]:
    """What a figure means nothing without."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cpus": len(os.sched_getaffinity(0)), "kernel": platform.release().split("-")[0],
            "python": platform.python_version(), "load": os.getloadavg()[0], "policy": POLICY}


def _shared(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size)


def _ring(pair: Pair, size: int, elements: int, batch: int, volume: int) -> float:
    """Elements per second through a ring; raises MuenfastError when one was lost."""
    region, words = _shared(_HEADER + size * elements), _shared(4096)
    count = max(1000, min(volume // size, 20_000_000))
    seconds, lost = pair.run(lambda: _bench.ring_write(region, words, size, batch, count),
                             lambda: _bench.ring_read(region, words, size, batch, count))
    if lost:
        raise MuenfastError(f"{lost} elements were lost under flow control")
    return count / float(seconds)


def _queue(pair: Pair, size: int, elements: int, volume: int) -> float:
    memory, words = _shared(size * elements), _shared(4096)
    count = max(1000, min(volume // size, 20_000_000))
    return count / float(pair.run(lambda: _bench.queue_write(memory, words, size, elements, count),
                                  lambda: _bench.queue_read(memory, words, size, elements, count)))


def _copy(pair: Pair, size: int, elements: int, volume: int) -> float:
    """Elements per second that two cores can move through a ring's memory, in chunks of 8 KiB or one element."""
    chunk = max(8192 // size, 1) * size
    memory, words = _shared(size * elements // chunk * chunk), _shared(4096)
    count = max(1000, volume // chunk)
    seconds = pair.run(lambda: _bench.copy_write(memory, words, chunk, count),
                       lambda: _bench.copy_read(memory, words, chunk, count))
    return count * (chunk // size) / float(seconds)


def _ring_bounce(pair: Pair, size: int, count: int) -> float:
    one, other = _shared(_HEADER + size * 64), _shared(_HEADER + size * 64)
    return float(pair.run(lambda: _bench.ring_bounce(other, one, size, count, False),
                          lambda: _bench.ring_bounce(one, other, size, count, True))) / count * 1e9


def _bounce(pair: Pair, call: Callable[[mmap.mmap, int, bool], float], count: int) -> float:
    words = _shared(4096)
    return float(pair.run(lambda: call(words, count, False), lambda: call(words, count, True))) / count * 1e9


def ring_rows(volume: int = 400_000_000) -> list[Row]:
    """Throughput by element size and batch, round trips, wake-ups. volume: bytes moved per sample."""
    pair = Pair()
    rows = []
    for size, elements in RING_SHAPES:
        copy, queue = f"copy {size} B", f"bare queue {size} B"
        rows.append(Row(copy, "elements/s", partial(_copy, pair, size, elements, volume)))
        rows.append(Row(queue, "elements/s", partial(_queue, pair, size, elements, volume), limit=copy))
        for batch in BATCHES:
            if batch <= elements // 4:
                rows.append(Row(f"ring {size} B batch {batch}", "elements/s",
                                partial(_ring, pair, size, elements, batch, volume),
                                limit=queue if batch == 1 else copy))
    rows.append(Row("cache line round trip", "ns", lambda: _bounce(pair, _bench.bounce, 100_000), less=True))
    for size in (64, 4120):
        rows.append(Row(f"ring round trip {size} B", "ns", partial(_ring_bounce, pair, size, 50_000),
                        limit="cache line round trip", less=True))
    rows.append(Row("futex round trip", "ns", lambda: _bounce(pair, _bench.wake_bounce, 2000), less=True))
    return rows


def blk_rows(volume: int = 200_000_000, size: int = 64 << 20) -> Iterator[list[Row]]:
    """Block reads and writes through server and client engines; a generator that cleans up when it is closed.

    size: bytes of the RAM disk.
    """
    from muenfast.blk import BlockDevice, BlockServer, exports_from_lists

    pair = Pair()
    req, resp = f"bench-{os.getpid()}-req", f"bench-{os.getpid()}-resp"
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(done[1])
            os.sched_setaffinity(0, {pair.far})
            with BlockServer(exports_from_lists(req, resp, device=f"ram:{size}")):
                os.write(ready[1], b"r")
                os.read(done[0], 1)
            status = 0
        except BaseException as error:
            print(f"muenfast: bench: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    before = os.sched_getaffinity(0)
    os.close(ready[1])
    try:
        if os.read(ready[0], 1) != b"r":
            raise MuenfastError("the server of the measurement failed")
        os.sched_setaffinity(0, {pair.near})
        with BlockDevice(req, resp) as disk:
            piece = random.Random(1).randbytes(1 << 20)
            for at in range(0, size, len(piece)):
                disk.pwrite(piece, at)
            yield list(_disk_rows(disk, size, volume))
    finally:
        os.sched_setaffinity(0, before)
        os.close(ready[0])
        os.close(done[1])
        os.close(done[0])
        os.waitpid(pid, 0)


def _disk_rows(disk: Any, size: int, volume: int) -> Iterator[Row]:
    chooser = random.Random(2)
    blocks = [chooser.randrange(size // _BLOCK) for _ in range(4096)]
    memory = _shared(size)
    for at in range(0, size, _BLOCK):
        memory[at] = 1

    def copy(unit: int, numbers: list[int]) -> float:
        times = max(1, volume // (unit * len(numbers)))
        return times * len(numbers) / float(_bench.copy_blocks(memory, unit, array.array("Q", numbers), times))

    def moved(unit: int, depth: int, write: bool, sequential: bool) -> float:
        buffer = memoryview(bytearray(unit * depth))
        most = size // unit
        total = max(depth, min(volume // unit, 400_000 if depth > 1 else 40_000)) // depth * depth
        numbers = [(k % most) if sequential else blocks[k % len(blocks)] * _BLOCK // unit % most for k in range(total)]
        lists = [[n * unit for n in numbers[k:k + depth]] for k in range(0, total, depth)]
        call = disk.pwrite_many if write else disk.pread_many
        start = time.perf_counter()
        for offsets in lists:
            call(offsets, buffer)
        return total / (time.perf_counter() - start)

    yield Row("memcpy 4 KiB random", "blocks/s", lambda: copy(_BLOCK, blocks))
    yield Row("memcpy 128 KiB sequential", "pieces/s", lambda: copy(1 << 17, list(range(size >> 17))))
    for depth in DEPTHS:
        for write, word in ((False, "read"), (True, "write")):
            yield Row(f"{word} 4 KiB random depth {depth}", "blocks/s",
                      partial(moved, _BLOCK, depth, write, False), limit="memcpy 4 KiB random")
    for depth in (1, 8):
        for write, word in ((False, "read"), (True, "write")):
            yield Row(f"{word} 128 KiB sequential depth {depth}", "pieces/s",
                      partial(moved, 1 << 17, depth, write, True), limit="memcpy 128 KiB sequential")


def take(rows: list[Row], rounds: int, step: Callable[[int, int], None]) -> None:
    """Takes all samples, round by round. step(done, all) is called after each."""
    for number in range(rounds):
        for k, row in enumerate(rows):
            row.samples.append(row.sample())
            step(number * len(rows) + k + 1, rounds * len(rows))


def ratio(row: Row, rows: list[Row]) -> float | None:
    """The row's median held against its limit's; for a time, limit / figure."""
    limit = next((other for other in rows if other.name == row.limit), None)
    if limit is None:
        return None
    return limit.median / row.median if row.less else row.median / limit.median


def report(what: str, rows: list[Row]) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return {"benchmark": what, "environment": environment(),
            "rows": [{"name": row.name, "unit": row.unit, "median": row.median, "limit": row.limit,
                      "ratio": ratio(row, rows), "samples": row.samples} for row in rows]}


def plot(reports: list[dict[str, Any]]) -> str:
    """An SVG of every ratio, drawn from the JSON."""
    bars = [(r["benchmark"], row) for r in reports for row in r["rows"] if row["ratio"] is not None]
    height = 60 + 22 * len(bars)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" font-family="sans-serif" '
             'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
             '<text x="10" y="22" font-size="15">muenfast / limit of the same run (1 = equal; longer is better)</text>']
    scale = 400 / max(1.2, *(row["ratio"] for _, row in bars))
    for k, (_, row) in enumerate(bars):
        y = 40 + 22 * k
        lines.append(f'<text x="10" y="{y + 13}">{row["name"]}</text>')
        lines.append(f'<rect x="250" y="{y + 2}" width="{row["ratio"] * scale:.1f}" height="15" fill="#4a7ab5"/>')
        lines.append(f'<text x="{256 + row["ratio"] * scale:.1f}" y="{y + 14}">{row["ratio"]:.2f} of {row["limit"]}</text>')
    lines.append(f'<line x1="{250 + scale:.1f}" y1="36" x2="{250 + scale:.1f}" y2="{height - 12}" stroke="#b03030"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"
