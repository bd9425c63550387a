"""A model of throughput and latency, its costs measured, held against measured curves (docs/scaling.md).

    python bench/scaling.py [--rounds N] [--scale F] [--json FILE] [--write docs/scaling.md]
    python bench/scaling.py --from FILE [--write docs/scaling.md]

Measures, in turns, what single things cost, and curves: the ring over size and batch, its round trip over size, block
requests over size and depth; start-up and memory over exports and interfaces are taken from a run of `muenfast bench start`
(--start FILE). Each point of a curve is predicted from a fit to the other points of that curve alone. Exit status 1 where
one is further off than a fifth (--limit).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from muenfast import measure
from muenfast.blk import BlockDevice
from muenfast.measure import (
    BATCHES,
    Pair,
    Row,
    _bounce,
    _Child,
    _copy,
    _Laps,
    _ring,
    _ring_bounce,
    _serve,
    _shared,
    _wake_bounce,
)

RING = 2 << 20          # bytes of a ring: one that fits the second-level caches moves a third as much (docs/scaling.md)
SIZES = (64, 128, 256, 512, 1522, 4120, 16384)      # bytes of an element
TRIPS = (64, 128, 256, 512, 1024, 1522, 2048, 4120)
SLOTS = 64              # elements of a round trip's rings
BEFORE = 512            # bytes until a core that reads lines in their order has the next ones fetched ahead
FOOTPRINTS = (128, 256, 512, 1024, 2048, 4096)      # KiB
DEPTHS = (1, 2, 3, 4, 8, 16, 32, 64)
UNITS = {"inline": (4096, 16384), "buffer": (4096, 16384, 65536)}
TURN = 16384            # bytes that an engine takes at once (docs/decisions/003)
REQUEST = 4096          # bytes of an inline request
DISK = 64 << 20
POLICY = ("one process per CPU, pinned; rings of 2 MiB, the producer at most 256 KiB ahead, 128 pauses between two looks; "
          "block: the engines' own adaptive spin; the server on the last CPU")


# ------------------------------------------------------------------ the model

@dataclass(frozen=True)
class Point:
    """A measured point of a curve: how many of each cost one operation has, by the cost's name, and its time in `unit`."""

    name: str
    counts: dict[str, float]
    measured: float


@dataclass(frozen=True)
class Fit:
    """costs: what explains a curve best, none below 0. Of each point the prediction by a fit to the others."""

    costs: dict[str, float]
    predicted: list[float]


def fitted(points: Sequence[Point]) -> dict[str, float]:
    """The costs, none below 0, with the least sum of squared relative errors.

    There are a handful of costs: of each choice of those that are above 0 the least squares are known, and the best that
    has none below 0 is the answer (the active sets of non-negative least squares, all of them).
    """
    names = list(dict.fromkeys(name for point in points for name in point.counts))
    rows = numpy.array([[point.counts.get(name, 0.0) / point.measured for name in names] for point in points])
    best, least = [0.0] * len(names), float(len(points))
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            some = numpy.linalg.lstsq(rows[:, chosen], numpy.ones(len(points)), rcond=None)[0]
            error = float(((rows[:, chosen] @ some - 1) ** 2).sum())
            if some.min() >= 0 and error < least:
                least, best = error, [0.0] * len(names)
                for place, value in zip(chosen, some, strict=True):
                    best[place] = float(value)
    return dict(zip(names, best, strict=True))


def predicted(costs: dict[str, float], counts: dict[str, float]) -> float:
    return sum(costs.get(name, 0.0) * count for name, count in counts.items())


def fit(points: Sequence[Point]) -> Fit:
    """Raises ValueError where a point alone says what a cost is: no other could predict it."""
    for name in {name for point in points for name in point.counts}:
        if sum(name in point.counts for point in points) < 2:
            raise ValueError(f"one point only has the cost {name!r}")
    others = [fitted([other for other in points if other is not point]) for point in points]
    return Fit(fitted(points), [predicted(costs, point.counts) for costs, point in zip(others, points, strict=True)])


def of_ring(size: int, batch: int) -> dict[str, float]:
    """An element: itself, its bytes, its share of a hand-over, with the header's line there and back."""
    return {"element": 1, "byte": size, "hand-over": 1 / batch}


def of_trip(size: int) -> dict[str, float]:
    """A round trip: two hand-overs with nothing beside them, the bytes twice; the first of them are not fetched ahead."""
    return {"turn": 2, "early byte": 2 * min(size, BEFORE), "byte": 2 * max(0, size - BEFORE)}


def of_blocks(size: int, depth: int, most: int) -> dict[str, float]:
    """A request of at most `most` bytes, of a load that has depth times size in flight.

    Up to TURN bytes in flight (or one request) both ends work one after the other: each request pays for both, and for its
    share of a way there and back. From twice that they work side by side, and the slower one counts.
    """
    requests, bytes_of = depth * max(1, size // most), min(size, most)
    if min(requests, requests * bytes_of // TURN) < 2:
        return {"request, both ends": 1, "byte, both ends": bytes_of, "there and back": 1 / requests}
    return {"request": 1, "byte": bytes_of}


def of_parts(count: int, each: bool) -> dict[str, float]:
    """What a process has once, and once for each of `count` exports or interfaces; each: its share of that."""
    return {"process": 1 / count, "part": 1} if each else {"process": 1, "part": count}


# ------------------------------------------------------------------ curves

@dataclass(frozen=True)
class Curve:
    """Rows of one name and their counts. rate: what is measured is operations/s, and what is predicted is ns for each."""

    name: str
    rows: list[tuple[str, dict[str, float]]]
    unit: str = "ns"
    rate: bool = True


def curves() -> list[Curve]:
    return [
        Curve("ring, one element", [(_ring_name(size, batch), of_ring(size, batch))
                                    for size in SIZES for batch in _batches(RING // size)]),
        Curve("ring, round trip, both looking", [(_trip_name(size), of_trip(size)) for size in TRIPS], rate=False),
        *(Curve(f"{way}, {word}", [(_block_name(way, word, unit, depth), _of_unit(way, unit, depth))
                                   for unit in UNITS[way] for depth in DEPTHS])
          for way in UNITS for word in ("read", "write"))]


def start_curves(rows: dict[str, dict[str, Any]]) -> list[Curve]:
    """Of a run of `bench start`: those curves that have three points."""
    found = []
    lines = (("command to ready", "ms", False), ("memory of each", "KiB", True))
    for scale, (line, unit, each) in itertools.product(("exports", "interfaces"), lines):
        points = [(row["name"], of_parts(row["at"][scale], each)) for row in rows.values()
                  if scale in row["at"] and row["line"] == line and row["samples"]]
        if len(points) >= 3:
            found.append(Curve(f"{scale}: {line}", points, unit, rate=False))
    return found


def _ring_name(size: int, batch: int) -> str:
    return f"ring {size} B batch {batch}"


def _trip_name(size: int) -> str:
    return f"ring round trip {size} B"


def _block_name(way: str, word: str, unit: int, depth: int) -> str:
    return f"{way}: {word} {unit // 1024} KiB depth {depth}"


def _batches(elements: int) -> Iterator[int]:
    return (batch for batch in BATCHES if batch <= elements // 4)


def _of_unit(way: str, unit: int, depth: int) -> dict[str, float]:
    """Of `unit` bytes, which are several requests where they go inline, each of the same bytes, which are no cost apart."""
    if way == "buffer":
        return of_blocks(unit, depth, unit)
    counts = of_blocks(unit, depth, REQUEST)
    return {name: count * (unit // REQUEST) for name, count in counts.items() if not name.startswith("byte")}


# ------------------------------------------------------------------ measuring

def cost_rows(pair: Pair, scale: float) -> Iterator[Row]:
    """What single things cost: names are those of `muenfast bench ring` and `wake`."""
    polled, slept = max(100, int(20_000 * scale)), max(100, int(2000 * scale))

    yield Row("cache line round trip", "ns", _Laps(partial(_bounce, pair, 0, 1), polled).mean, less=True, kind="limit")
    yield Row("futex round trip", "ns", _Laps(partial(_wake_bounce, pair), slept).half, less=True, kind="limit")
    asleep = _Laps(partial(_ring_bounce, pair, 64, SLOTS, True), slept)
    yield Row("ring round trip 64 B, both asleep", "ns", asleep.half, less=True)
    for kib in FOOTPRINTS:
        yield Row(f"copy through {kib} KiB", "ns for 4 KiB", partial(_copied, pair, kib, scale), less=True, kind="limit")


def _volume(scale: float) -> int:
    return max(1 << 16, int(60_000_000 * scale))


def _copied(pair: Pair, kib: int, scale: float) -> float:
    return 1e9 / _copy(pair, 4096, kib // 4, _volume(scale))


def ring_rows(pair: Pair, scale: float) -> Iterator[Row]:
    for size in SIZES:
        elements = RING // size
        for batch in _batches(elements):
            yield Row(_ring_name(size, batch), "elements/s", partial(_ring, pair, size, elements, batch, _volume(scale)))
    for size in TRIPS:
        laps = _Laps(partial(_ring_bounce, pair, size, SLOTS, False), max(100, int(20_000 * scale)))
        yield Row(_trip_name(size), "ns", laps.mean, less=True)


def block_rows(stack: ExitStack, pair: Pair, scale: float) -> Iterator[Row]:
    """Requests from this process, pinned by whoever calls, to servers of RAM disks on the other CPU."""
    room = memoryview(_shared(DISK))
    chooser = random.Random(3)
    for way, units in UNITS.items():
        req, resp, buffer = (f"bench-{os.getpid()}-{way}-{end}" for end in ("req", "resp", "buffer"))
        shared = buffer if way == "buffer" else None
        stack.callback(_Child(pair.far, partial(_serve, req, resp, DISK, buffer=shared)).close)
        disk = stack.enter_context(BlockDevice(req, resp, shm=shared))
        disk.pwrite(room, 0)        # so that each of its pages is there

        def moved(disk: BlockDevice, unit: int, depth: int, word: str) -> float:
            count = max(2 * depth, int(min(8000 * min(depth, 4), (48 << 20) // unit) * scale))
            places = [chooser.randrange(DISK // unit) * unit for _ in range(count)]
            disk.client.depth = depth * max(1, unit // REQUEST if disk.channels.buffer is None else 1)
            call: Callable[..., object] = disk.pwrite_many if word == "write" else disk.pread_many
            start = time.perf_counter()
            if depth > 1:
                call(places, room[:count * unit])
            else:
                for place in places:
                    call([place], room[:unit])
            return count / (time.perf_counter() - start)

        for unit, word, depth in itertools.product(units, ("read", "write"), DEPTHS):
            yield Row(_block_name(way, word, unit, depth), "operations/s", partial(moved, disk, unit, depth, word))


def measured(rounds: int, scale: float) -> list[dict[str, Any]]:
    pair = Pair()
    before = os.sched_getaffinity(0)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, before)
        os.sched_setaffinity(0, {pair.near})
        rows = [*cost_rows(pair, scale), *ring_rows(pair, scale), *block_rows(stack, pair, scale)]

        def step(done: int, of: int) -> None:
            if sys.stderr.isatty():
                print(f"\r{done} of {of}", end="" if done < of else "\n", file=sys.stderr, flush=True)

        measure.take(rows, rounds, step)
        return [measure.report("scaling", rows, POLICY)]


# ------------------------------------------------------------------ what comes of it

def quick(row: dict[str, Any]) -> float:
    """The sample that a quarter of them betters (of four or fewer the best): costs and curves alike are those of a machine
    that nobody else uses meanwhile, and yet no sample's luck."""
    samples = sorted(row["samples"], reverse=row["unit"].endswith("/s"))
    return float(samples[(len(samples) - 1) // 4])


def points_of(curve: Curve, rows: dict[str, dict[str, Any]]) -> list[Point]:
    found = []
    for name, counts in curve.rows:
        value = quick(rows[name])
        found.append(Point(name, counts, 1e9 / value if curve.rate else value))
    return found


@dataclass(frozen=True)
class Model:
    """fits: of each curve, by its name, with its points. single: what was measured alone, by its row's name, in ns."""

    fits: dict[str, tuple[Curve, list[Point], Fit]]
    single: dict[str, float]
    environment: dict[str, Any]

    @property
    def asleep(self) -> Point:
        """A round trip of which both sides sleep is one of a bare futex and one that finds both awake: no fit to it."""
        return Point("ring round trip 64 B, both asleep", {}, self.single["ring round trip 64 B, both asleep"])

    @property
    def asleep_predicted(self) -> float:
        return self.single["futex round trip"] + predicted(self.costs("ring, round trip, both looking"), of_trip(64))

    def costs(self, name: str) -> dict[str, float]:
        return self.fits[name][2].costs

    def errors(self) -> Iterator[tuple[str, str, float, float]]:
        """(curve, point, measured, predicted)."""
        for name, (_, points, fit) in self.fits.items():
            for point, said in zip(points, fit.predicted, strict=True):
                yield name, point.name, point.measured, said
        yield "ring, round trip, both asleep", self.asleep.name, self.asleep.measured, self.asleep_predicted


def model_of(reports: Sequence[dict[str, Any]]) -> Model:
    """Raises ValueError where a row is missing."""
    by_name = {report["benchmark"]: report for report in reports}
    if "scaling" not in by_name:
        raise ValueError("no report of bench/scaling.py")
    rows = {row["name"]: row for row in by_name["scaling"]["rows"]}
    started = {row["name"]: row for row in by_name.get("start", {"rows": []})["rows"]}
    fits = {}
    for curve, these in [*((curve, rows) for curve in curves()), *((curve, started) for curve in start_curves(started))]:
        if absent := [name for name, _ in curve.rows if not these.get(name, {}).get("samples")]:
            raise ValueError(f"{curve.name}: not measured: {', '.join(absent)}")
        points = points_of(curve, these)
        fits[curve.name] = curve, points, fit(points)
    single = {name: quick(row) for name, row in rows.items() if row["unit"].startswith("ns")}
    wakes = rows["ring round trip 64 B, both asleep"]["notes"][measure.CPU]["samples"]
    return Model(fits, single | {"CPU time of it": min(wakes)}, by_name["scaling"]["environment"])


def _figure(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def tables(model: Model) -> str:
    """Markdown: costs, predictions of each curve, larger machines."""
    lines = ["| cost | ns |", "|---|--:|"]
    lines += [f"| {name} | {_figure(value)} |" for name, value in model.single.items()]
    lines += ["", "| curve | unit | costs | points | worst | half of them within |", "|---|---|---|--:|--:|--:|"]
    for name, (curve, points, fit) in model.fits.items():
        wrong = sorted(abs(said / point.measured - 1) for point, said in zip(points, fit.predicted, strict=True))
        costs = ", ".join(f"{cost} {_figure(value)}" for cost, value in fit.costs.items())
        lines.append(f"| {name} | {curve.unit} | {costs} | {len(points)} | {wrong[-1]:.0%} "
                     f"| {wrong[len(wrong) // 2]:.0%} |")
    off = model.asleep_predicted / model.asleep.measured - 1
    lines += [f"| ring, round trip, both asleep | ns | futex round trip, round trip | 1 | {abs(off):.0%} | |",
              "", "| point | measured | predicted by the others | off |", "|---|--:|--:|--:|"]
    lines += [f"| {point} | {_figure(found)} | {_figure(said)} | {said / found - 1:+.0%} |"
              for _, point, found, said in model.errors()]
    return "\n".join([*lines, "", *larger(model)])


def larger(model: Model) -> list[str]:
    """What the costs say of machines that are not this one."""
    read = model.costs("buffer, read")
    one = read["request"] + read["byte"] * REQUEST
    both = read["request, both ends"] + read["byte, both ends"] * REQUEST
    if one == 0 or both == 0:
        raise ValueError("a request comes to no time at all: these samples are too short")
    machines = (2, 16, 64)

    def line_of(name: str, of: Callable[[int], float], digits: int) -> str:
        return f"| {name} | " + " | ".join(f"{of(cpus):.{digits}f}" for cpus in machines) + " |"

    lines = ["| 4 KiB reads over a buffer | 2 CPUs | 16 | 64 |", "|---|--:|--:|--:|",
             line_of("two CPUs for each connection, million/s", lambda cpus: cpus / 2 * 1e3 / one, 1),
             line_of("more connections than CPUs, million/s", lambda cpus: cpus * 1e3 / both, 1),
             line_of("bytes read and written for the former, GB/s", lambda cpus: cpus / 2 / one * 4 * REQUEST, 0)]
    line, ring = model.single["cache line round trip"], model.costs("ring, one element")
    lines += ["", "| a line there and back, ns | 64 B one by one, million/s | batches of 64 | 1522 B, batches of 64 |",
              "|--:|--:|--:|--:|"]
    for times in (1, 2, 4):
        far = ring | {name: ring[name] * times for name in ("hand-over", "byte")}
        rates = (1e3 / predicted(far, of_ring(*shape)) for shape in ((64, 1), (64, 64), (1522, 64)))
        lines.append(f"| {line * times:.0f} | " + " | ".join(f"{rate:.1f}" for rate in rates) + " |")
    wake = model.single["CPU time of it"] / 1e9
    lines += ["", "| guests, each with a disk | requests/s of each | CPUs busy with waking | with requests |",
              "|--:|--:|--:|--:|"]
    for guests, rate in ((100, 100), (300, 100), (300, 1000), (1000, 1000)):
        lines.append(f"| {guests} | {rate} | {guests * rate * wake:.2f} | {guests * rate * both / 1e9:.2f} |")
    return lines


def written(path: Path, text: str) -> None:
    """Puts the tables between the marks in that file. Raises ValueError where they are missing."""
    before, mark, rest = path.read_text(encoding="utf-8").partition("<!-- bench/scaling.py -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (mark and end):
        raise ValueError(f"{path}: there is no line <!-- bench/scaling.py --> with an <!-- end --> behind it")
    path.write_text(f"{before}{mark}{text}\n{end}{after}", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="of the usual work of a sample (default: 1)")
    parser.add_argument("--start", metavar="FILE", help="JSON of `muenfast bench start`: its curves, too")
    parser.add_argument("--json", metavar="FILE", help="everything that was measured")
    parser.add_argument("--from", dest="old", metavar="FILE", help="measures nothing: of what --json had written")
    parser.add_argument("--write", metavar="FILE.md", help="puts the tables between the marks there")
    parser.add_argument("--limit", type=float, default=0.2, help="how far off a point may be (default: 0.2)")
    arguments = parser.parse_args(words)
    if arguments.rounds < 1 or not arguments.scale > 0:
        parser.error("--rounds and --scale are above 0")
    try:
        reports = json.loads(Path(arguments.old).read_text(encoding="utf-8")) if arguments.old else \
            measured(arguments.rounds, arguments.scale)
        if arguments.start:
            others = json.loads(Path(arguments.start).read_text(encoding="utf-8"))
            reports = [*(report for report in reports if report["benchmark"] != "start"),
                       *(report for report in others if report["benchmark"] == "start")]
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
        model = model_of(reports)
        text = tables(model)
        print(text)
        if arguments.write:
            written(Path(arguments.write), text)
    except (OSError, ValueError, KeyError) as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        return 2
    off = [f"{curve}: {point}: {said / found - 1:+.0%}" for curve, point, found, said in model.errors()
           if abs(said / found - 1) > arguments.limit]
    for line in off:
        print(f"more than {arguments.limit:.0%} off: {line}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
