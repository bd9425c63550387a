"""What `muenfast bench` measures: rings and block I/O between two pinned processes, beside limits of the same run.

Samples of all rows are taken in turns (round by round), so that a disturbance of the machine meets all of them. Every
sample is kept; figures are medians. Each row names the limit it is held against; the ratio is 1 when they are equal.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import mmap
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from muenfast import __version__, _bench
from muenfast.errors import MuenfastError, UsageError
from muenfast.threads import interrupts_held

POLICY = ("one process per CPU, pinned; producers at most 256 KiB ahead; an empty or full ring is looked at again after "
          "128 pauses, from Python at once; round trips look after one pause; block I/O: the engines' own adaptive spin, "
          "then sleep on the bell; devices: server and load on one CPU, front end on the other")
_HEADER = 64
_BLOCK = 4096
_PIECE = 65536  # _bufclient.pyx, PIECE_BYTES
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_CPUS = len(os.sched_getaffinity(0))  # before this process is pinned
RING_SHAPES = ((64, 4096), (1522, 1024), (4120, 512), (131072, 32))  # bytes of an element, elements
BATCHES = (1, 8, 64)
DEPTHS = (1, 8, 32)


@dataclass
class Row:
    """One figure: samples of `unit`, more is better unless `less`, held against the row called `limit`, and those of
    `beside`.

    missing: why there can be no samples. notes: what was seen beside each sample, by name. kind: "product", "limit"
    (what the machine can do) or "peer" (another program that does the same). at: where it lies on scales, by name of
    the scale; line: of which points it is one there.
    """

    name: str
    unit: str
    sample: Callable[[], float] = field(repr=False)
    limit: str | None = None
    less: bool = False
    samples: list[float] = field(default_factory=list)
    beside: tuple[str, ...] = ()
    missing: str | None = None
    notes: dict[str, list[float]] = field(default_factory=dict)
    kind: str = "product"
    at: dict[str, int] = field(default_factory=dict)
    line: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None


class Pair:
    """Two CPUs: this process on the first, a forked child on the second for one task at a time."""

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise UsageError("two CPUs are needed", hint="run it where taskset allows two")
        self.near, self.far = cpus[0], cpus[-1]

    def run(self, child: Callable[[], object], parent: Callable[[], Any]) -> Any:
        """Runs both at once; what parent returned. Raises MuenfastError when the child failed.

        The child is gone when this returns, or raises; and when this process dies. An interrupt is the parent's: of two
        that look at each other's memory, one alone would never end.
        """
        me, held = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                die_with(me, signal.SIGKILL)
                os.sched_setaffinity(0, {self.far})
                child()
                status = 0
            except BaseException as error:
                print(f"muenfast: bench: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        before = os.sched_getaffinity(0)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            os.sched_setaffinity(0, {self.near})
            result = parent()
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            os.sched_setaffinity(0, before)
            _, status = os.waitpid(pid, 0)
        if status != 0:
            raise MuenfastError("the other process of a measurement failed")
        return result


def die_with(parent: int, number: int) -> None:
    """This process, just forked by that one, gets signal `number` when its parent (the thread that forked) ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def _first_line(path: str) -> str | None:
    """None: there is no such file, or it may not be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return None


def environment() -> dict[str, Any]:
    """What a figure means nothing without: the machine, the versions, how all was built, and the command line, its program
    without a path."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    bad = "/sys/devices/system/cpu/vulnerabilities"
    return {"cpu": model, "cpus": _CPUS, "kernel": platform.release().split("-")[0],
            "python": platform.python_version(), "load": os.getloadavg()[0], "muenfast": __version__,
            "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "none to be seen",
            "mitigations": {name: _first_line(f"{bad}/{name}") for name in sorted(os.listdir(bad) if os.path.isdir(bad)
            else ())}, "libc": " ".join(platform.libc_ver()), "compiler": _bench.COMPILER, "flags": _bench.FLAGS,
            "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]]}


def _descendants(pid: int) -> Iterator[int]:
    """The living processes that a process, or one of them, has started."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in (_first_line(f"/proc/{pid}/task/{task}/children") or "").split():
                yield int(child)
                yield from _descendants(int(child))


def _cpu_seconds() -> float:
    """CPU time of this process and of all that it has started, living or waited for."""
    total = sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF,
                                                                                   resource.RUSAGE_CHILDREN)))
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                total += int((_first_line(f"/proc/{pid}/task/{task}/schedstat") or "0").split()[0]) / 1e9
    return total


def memory() -> float:
    """MiB resident in this process and those that it has started, what they share counted once."""
    total = 0
    for pid in (os.getpid(), *_descendants(os.getpid())):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


def _shared(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size)


def _area(elements: int) -> int:
    """Elements of private memory that each side of a throughput row uses in turns: those of the largest batch."""
    return max(batch for batch in BATCHES if batch <= elements // 4)


def _ring(pair: Pair, size: int, elements: int, batch: int, volume: int) -> float:
    """Elements per second through a ring; raises MuenfastError when one was lost."""
    region, words = _shared(_HEADER + size * elements), _shared(4096)
    count, area = max(1000, min(volume // size, 20_000_000)), _area(elements)
    seconds, lost = pair.run(lambda: _bench.ring_write(region, words, size, batch, area, count),
                             lambda: _bench.ring_read(region, words, size, batch, area, count))
    if lost:
        raise MuenfastError(f"{lost} elements were lost under flow control")
    return count / float(seconds)


def _queue(pair: Pair, size: int, elements: int, volume: int) -> float:
    memory, words = _shared(size * elements), _shared(4096)
    count, area = max(1000, min(volume // size, 20_000_000)), _area(elements)
    return count / float(pair.run(lambda: _bench.queue_write(memory, words, size, elements, area, count),
                                  lambda: _bench.queue_read(memory, words, size, elements, area, count)))


def _copy(pair: Pair, size: int, elements: int, volume: int) -> float:
    """Elements per second that two cores can move through a ring's memory: the best of chunks of one element, 4, 12
    and 32 KiB."""
    best = 0.0
    private = _area(elements) * size
    for chunk in (size, 4096, 12288, 32768):
        chunks, count = size * elements // chunk, max(1000, min(volume // 4 // chunk, 20_000_000))
        for ahead in sorted({_bench.AHEAD, max(_bench.AHEAD, 2 * private)}):  # as window() has it for a ring's batches
            memory, words = _shared(chunks * chunk), _shared(4096)
            area = max(1, private // chunk)
            seconds = pair.run(
                partial(_bench.copy_write, memory, words, chunk, area, min(chunks, max(2, ahead // chunk)), count),
                partial(_bench.copy_read, memory, words, chunk, area, count))
            best = max(best, count * chunk / size / float(seconds))
    return best


class _Laps:
    """Round trips: mean() in one go, tail() the 99th percentile, each with a look at the clock; nanoseconds."""

    def __init__(self, measure: Callable[[int, mmap.mmap | None], float], count: int) -> None:
        self._measure, self._count = measure, count
        self.notes: dict[str, list[float]] = {}

    def mean(self) -> float:
        return self._measure(self._count, None) / self._count * 1e9

    def half(self) -> float:
        """Half of them were faster; the rest is in the notes."""
        self.tail()
        return self.notes["p50"][-1]

    def tail(self) -> float:
        laps = _shared(8 * self._count)
        self._measure(self._count, laps)
        ordered = sorted(memoryview(laps).cast("Q")[:self._count])
        for name, part in (("p50", 500), ("p90", 900), ("p99", 990), ("p99.9", 999)):
            self.notes.setdefault(name, []).append(float(ordered[self._count * part // 1000]))
        return float(ordered[self._count * 99 // 100])


def _lap_rows(name: str, laps: _Laps, limit: str | None = None, kind: str = "product") -> list[Row]:
    return [Row(name, "ns", laps.mean, limit=limit, less=True, kind=kind),
            Row(f"{name}, p99", "ns", laps.tail, limit=limit and f"{limit}, p99", less=True, kind=kind, notes=laps.notes)]


def _both(pair: Pair, call: Callable[[bool], float]) -> float:
    """call(leads) on both sides at once; what the leading one returned."""
    return float(pair.run(lambda: call(False), lambda: call(True)))


def _bounce(pair: Pair, size: int, slots: int, count: int, laps: mmap.mmap | None) -> float:
    words = _shared(4096 + 2 * (size * slots + _HEADER))
    return _both(pair, lambda leads: _bench.bounce(words, size, slots, count, leads, laps))


def _ring_bounce(pair: Pair, size: int, slots: int, bells: bool, count: int, laps: mmap.mmap | None) -> float:
    ends = [_shared(_HEADER + size * slots) for _ in range(2)]
    rings = [_shared(4096) if bells else None for _ in range(2)]
    return _both(pair, lambda leads: _bench.ring_bounce(ends[leads], ends[not leads], size, count, leads, laps,
                                                        rings[leads], rings[not leads]))


def _wake_bounce(pair: Pair, count: int, laps: mmap.mmap | None) -> float:
    words = _shared(4096)
    return _both(pair, lambda leads: _bench.wake_bounce(words, count, leads, laps))


def _round_trips(pair: Pair, scale: float) -> Iterator[Row]:
    polled, slept = max(100, int(50_000 * scale)), max(100, int(2000 * scale))

    bounce, ring, wake = (partial(each, pair) for each in (_bounce, _ring_bounce, _wake_bounce))
    yield from _lap_rows("cache line round trip", _Laps(partial(bounce, 0, 1), polled), kind="limit")
    for size in (64, 4120):
        for slots, word in ((1, "1 slot"), (64, "64 slots")):
            bare = f"bare round trip {size} B, {word}"
            yield from _lap_rows(bare, _Laps(partial(bounce, size, slots), polled), kind="limit")
            yield from _lap_rows(f"ring round trip {size} B, {word}", _Laps(partial(ring, size, slots, False), polled),
                                 limit=bare)
    yield from _lap_rows("futex round trip", _Laps(wake, slept), kind="limit")
    yield from _lap_rows("ring round trip 64 B, both asleep", _Laps(partial(ring, 64, 64, True), slept),
                         limit="futex round trip")


def _publish(size: int, elements: int, count: int) -> float:
    """Nanoseconds that publishing an element takes on top of copying it, nobody asleep."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        region = _shared(_HEADER + size * elements)
        copy = min(_bench.copy_slots(region, size, count) for _ in range(3))
        return max(0.0, min(_bench.publish(region, _shared(4096), size, count) for _ in range(3)) - copy) / count * 1e9
    finally:
        os.sched_setaffinity(0, before)


def _python_ring(pair: Pair, size: int, elements: int, batch: int, count: int) -> float:
    """Elements per second from Writer to Reader: one by one, or in contiguous batches."""
    from muenfast import Reader, Writer

    region, shared = _shared(_HEADER + size * elements), _shared(4096)
    words = memoryview(shared).cast("Q")    # 0: the reader is there; 8: elements it has taken
    room = min(elements // 2, max(_bench.AHEAD // size, 2 * batch))
    step = batch if batch > 1 else min(64, room)
    count = count // step * step

    def write() -> None:
        element = bytes(size)
        many = bytes(size * batch)
        with Writer(region, size=size, protocol=1) as writer:
            while not words[0]:
                pass
            for put in range(0, count, step):
                while put + step - words[8] > room:
                    pass
                if batch > 1:
                    writer.write_many(many)
                else:
                    for _ in range(step):
                        writer.write(element)
            while words[8] < count:
                pass

    def read() -> float:
        with Reader(region, protocol=1) as reader:
            while reader.epoch == 0:
                reader.read()
            words[0] = 1
            buffer = bytearray(size * batch)
            taken, told = 0, 0
            start = time.perf_counter()
            while taken < count:
                if batch > 1:
                    taken += reader.read_many_into(buffer)
                elif reader.read() is not None:
                    taken += 1
                if taken - told >= step:
                    words[8] = told = taken
            passed = time.perf_counter() - start
            words[8] = count
            if reader.counters["lost"]:
                raise MuenfastError("elements were lost under flow control")
            return passed

    return count / float(pair.run(write, read))


def ring_rows(scale: float = 1.0) -> list[Row]:
    """Throughput by element size and batch, from Python too, round trips, wake-ups. scale: of the usual work per sample.
    """
    pair = Pair()
    volume = max(4096, int(400_000_000 * scale))
    rows = []
    for size, elements in RING_SHAPES:
        copy, queue = f"copy {size} B", f"bare queue {size} B"
        rows.append(Row(copy, "elements/s", partial(_copy, pair, size, elements, volume), kind="limit",
                        at={"bytes": size}, line="copy"))
        rows.append(Row(queue, "elements/s", partial(_queue, pair, size, elements, volume), limit=copy, kind="limit",
                        at={"bytes": size}, line="bare queue"))
        for batch in BATCHES:
            if batch <= elements // 4:
                rows.append(Row(f"ring {size} B batch {batch}", "elements/s",
                                partial(_ring, pair, size, elements, batch, volume),
                                limit=queue if batch == 1 else copy, at={"bytes": size, "batch": batch}, line="ring"))
        if size < 8192:
            rows.append(Row(f"Python {size} B one by one", "elements/s",
                            partial(_python_ring, pair, size, elements, 1, min(volume // size, 500_000)),
                            limit=f"ring {size} B batch 1", at={"bytes": size, "batch": 1}, line="Python"))
            rows.append(Row(f"Python {size} B batch 64", "elements/s",
                            partial(_python_ring, pair, size, elements, 64, min(volume // size, 10_000_000)),
                            limit=f"ring {size} B batch 64", at={"bytes": size, "batch": 64}, line="Python"))
    rows.append(Row("publish 64 B, beyond the copy", "ns", partial(_publish, 64, 4096, 1_000_000), less=True))
    return [*rows, *_round_trips(pair, scale)]


class _Child:
    """A forked process pinned to one CPU that runs enter() and stays until close(); raises MuenfastError."""

    def __init__(self, cpu: int, enter: Callable[[ExitStack], object]) -> None:
        ready, done = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(done[1])
                os.sched_setaffinity(0, {cpu})
                with ExitStack() as stack:
                    os.write(ready[1], str(enter(stack)).encode())
                    os.close(ready[1])
                    os.read(done[0], 1)
                status = 0
            except BaseException as error:
                print(f"muenfast: bench: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        os.close(ready[1])
        os.close(done[0])
        self._done = done[1]
        with open(ready[0], encoding="utf-8") as file:
            self.said = file.read()
        if not self.said:
            self.close()
            raise MuenfastError("a process of the measurement failed")

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        with open(f"/proc/{self.pid}/stat", encoding="utf-8") as file:
            words = file.read().rpartition(") ")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self._done >= 0:
            os.close(self._done)
            self._done = -1
            os.waitpid(self.pid, 0)


def _serve(req: str, resp: str, size: int, stack: ExitStack, buffer: str | None = None) -> str:
    from muenfast.blk import BlockServer, exports_from_lists

    stack.enter_context(BlockServer(exports_from_lists(req, resp, device=f"ram:{size}", buffer=buffer)))
    return "serving"


def blk_rows(scale: float = 1.0, size: int = 64 << 20, *, shared: bool = False) -> Iterator[list[Row]]:
    """Block reads and writes through server and client engines; a generator that cleans up when it is closed.

    scale: of the usual work per sample. size: bytes of the RAM disk. shared: over a shared buffer, not inline.
    """
    from muenfast.blk import BlockDevice

    pair = Pair()
    req, resp = f"bench-{os.getpid()}-req", f"bench-{os.getpid()}-resp"
    buffer = f"bench-{os.getpid()}-buffer" if shared else None
    before = os.sched_getaffinity(0)
    server = _Child(pair.far, partial(_serve, req, resp, size, buffer=buffer))
    try:
        os.sched_setaffinity(0, {pair.near})
        with BlockDevice(req, resp, shm=buffer) as disk:
            piece = random.Random(1).randbytes(1 << 20)
            for at in range(0, size, len(piece)):
                disk.pwrite(piece, at)
            yield list(_disk_rows(disk, size, max(_BLOCK, int(200_000_000 * scale))))
    finally:
        os.sched_setaffinity(0, before)
        server.close()


def device_rows(scale: float = 1.0, size: int = 64 << 20) -> Iterator[list[Row]]:
    """/dev/muendiskX beside the same front end over plain memory, 4 KiB with O_DIRECT, and what both processes cost while
    nothing is asked of them; a generator that cleans up when it is closed.

    scale: of the usual work per sample. size: bytes of the disks. Raises UsageError where block devices cannot be made.
    """
    from muenfast import shm
    from muenfast._target import Memory
    from muenfast.attach import fuse
    from muenfast.blk import BlockClients, channels_from_lists

    if (reason := fuse.available()) is not None:
        raise UsageError("no front end for block devices is to be had here", option="SUBJECT", value="disk", hint=reason)
    pair = Pair()
    req, resp = f"bench-{os.getpid()}-req", f"bench-{os.getpid()}-resp"

    def attach(stack: ExitStack) -> str:
        clients = stack.enter_context(BlockClients(channels_from_lists(req, resp)))
        clients.ready(lambda: True)
        return str(clients.disks[0].path)

    def attach_memory(stack: ExitStack) -> str:
        attachment = fuse.FuseAttachment.attach(Memory(size // _BLOCK), f"muenbench-{os.getpid()}", shm.runtime_dir())
        stack.callback(attachment.detach)
        return str(attachment.device)

    before = os.sched_getaffinity(0)
    with ExitStack() as stack:
        server = _Child(pair.far, partial(_serve, req, resp, size))
        stack.callback(server.close)
        client = _Child(pair.near, attach)
        stack.callback(client.close)
        memory = _Child(pair.near, attach_memory)
        stack.callback(memory.close)
        os.sched_setaffinity(0, {pair.far})
        stack.callback(os.sched_setaffinity, 0, before)
        yield list(_device_rows(server, client, memory, max(100, int(40_000 * scale)), size, 3.0 * scale))


def _device_rows(server: _Child, client: _Child, memory: _Child, count: int, size: int, idle: float) -> Iterator[Row]:
    chooser = random.Random(3)
    numbers = array.array("Q", [chooser.randrange(size // _BLOCK) for _ in range(4096)])

    def load(path: str, depth: int, write: bool) -> float:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with ThreadPoolExecutor(depth) as pool:
                start = time.perf_counter()
                ends = [pool.submit(_bench.device_loop, fd, numbers[k * 64:] + numbers[:k * 64], write, count // depth)
                        for k in range(depth)]
                for end in ends:
                    end.result()
                return count // depth * depth / (time.perf_counter() - start)
        finally:
            os.close(fd)

    def cost(child: _Child) -> float:
        start = child.cpu_seconds()
        time.sleep(idle)
        return (child.cpu_seconds() - start) / idle * 100

    for depth in DEPTHS:
        for write, word in ((False, "read"), (True, "write")):
            limit = f"memory, {word} 4 KiB depth {depth}"
            yield Row(limit, "blocks/s", partial(load, memory.said, depth, write), kind="limit", at={"depth": depth},
                      line=f"memory, {word} 4 KiB")
            yield Row(f"device, {word} 4 KiB depth {depth}", "blocks/s", partial(load, client.said, depth, write),
                      limit=limit, at={"depth": depth}, line=f"device, {word} 4 KiB")
    for child, word in ((server, "server"), (client, "client with device")):
        yield Row(f"idle {word}, CPU", "%", partial(cost, child), less=True)
    for of_client, word in ((False, "server"), (True, "client with device")):
        yield Row(f"memory of a {word}, without regions", "MiB", partial(_resident, of_client), less=True)


def _resident(of_client: bool) -> float:
    """MiB resident in `muenfast blk`, or its client, once it is ready: programs, libraries and heap, but no shared memory
    and nothing of the disk, which nobody has touched."""
    lists = ["--req", f"bench-{os.getpid()}-m-req", "--resp", f"bench-{os.getpid()}-m-resp"]
    with ExitStack() as stack:
        for role in ([], ["--client"])[:2 if of_client else 1]:
            with interrupts_held() as as_before:
                program = stack.enter_context(subprocess.Popen([sys.executable, "-m", "muenfast", "blk", *role, *lists],
                                                               stdout=subprocess.PIPE, text=True, preexec_fn=as_before))
                stack.callback(program.terminate)
            assert program.stdout is not None
            if "ready\n" not in program.stdout:
                raise MuenfastError("a process of the measurement failed")
        total = 0
        for pid in (program.pid, *_children(program.pid)):
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
                fields = {line.split(":")[0]: int(line.split()[1]) for line in file if line.endswith(" kB\n")}
            total += fields["Rss"] - fields["Pss_Shmem"]
        return total / 1024


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def _disk_rows(disk: Any, size: int, volume: int) -> Iterator[Row]:
    chooser = random.Random(2)
    blocks = [chooser.randrange(size // _BLOCK) for _ in range(4096)]
    memory = _shared(size)
    for at in range(0, size, _BLOCK):
        memory[at] = 1

    def copy(unit: int, numbers: list[int], places: int) -> float:
        times = max(1, volume // (unit * len(numbers)))
        return times * len(numbers) / float(_bench.copy_blocks(memory, unit, array.array("Q", numbers), places, times))

    offsets = {_BLOCK: [n * _BLOCK for n in blocks], 1 << 17: list(range(0, size, 1 << 17))}
    buffer = memoryview(_shared(max(size, len(blocks) * _BLOCK)))
    most = _BLOCK if disk.channels.buffer is None else _PIECE     # bytes of one request

    def moved(unit: int, depth: int, write: bool) -> float:
        """Pieces per second: one call each at depth 1, else one call for all with `depth` of them in flight."""
        places = offsets[unit]
        call = disk.pwrite_many if write else disk.pread_many
        count = min(volume // unit, 400_000 if depth > 1 else 40_000)
        times = max(1, count // len(places))
        places = places[:max(depth, count)]
        disk.client.depth = min(1024, depth * max(1, unit // most))
        start = time.perf_counter()
        for _ in range(times):
            if depth > 1:
                call(places, buffer[:len(places) * unit])
            else:
                for place in places:
                    call([place], buffer[:unit])
        return times * len(places) / (time.perf_counter() - start)

    def lap(count: int, laps: mmap.mmap | None) -> float:
        piece, times = buffer[:_BLOCK], None if laps is None else memoryview(laps).cast("Q")
        start = before = time.perf_counter_ns()
        for k in range(count):
            disk.pread_many([blocks[k % len(blocks)] * _BLOCK], piece)
            if times is not None:
                now = time.perf_counter_ns()
                times[k], before = now - before, now
        return (time.perf_counter_ns() - start) / 1e9

    yield Row("memcpy 4 KiB random", "blocks/s", lambda: copy(_BLOCK, blocks, len(blocks)), kind="limit")
    yield Row("memcpy 4 KiB random, into 128 KiB", "blocks/s", lambda: copy(_BLOCK, blocks, 32), kind="limit")
    yield Row("memcpy 128 KiB sequential", "pieces/s", lambda: copy(1 << 17, list(range(size >> 17)), size >> 17),
              kind="limit")
    for depth in DEPTHS:
        for write, word in ((False, "read"), (True, "write")):
            yield Row(f"{word} 4 KiB random depth {depth}", "blocks/s",
                      partial(moved, _BLOCK, depth, write), limit="memcpy 4 KiB random", at={"depth": depth},
                      line=f"{word} 4 KiB random")
    yield from _lap_rows("read 4 KiB random, one call", _Laps(lap, max(100, volume // 10_000)))
    for depth in DEPTHS:
        for write, word in ((False, "read"), (True, "write")):
            yield Row(f"{word} 128 KiB sequential depth {depth}", "pieces/s",
                      partial(moved, 1 << 17, depth, write), limit="memcpy 128 KiB sequential", at={"depth": depth},
                      line=f"{word} 128 KiB sequential")


_OPERATIONS = ("elements/s", "blocks/s", "pieces/s", "packets/s", "operations/s")
CPU = "CPU ns per operation"


def take(rows: list[Row], rounds: int, step: Callable[[int, int], None]) -> None:
    """Takes all samples, round by round. step(done, all) is called after each. Beside what counts operations, or is
    their time, it notes the CPU time of all processes of a sample, its preparation included, as if all of it were
    operations."""
    rows = [row for row in rows if row.missing is None]
    for number in range(rounds):
        for k, row in enumerate(rows):
            before, start = _cpu_seconds(), time.perf_counter()
            value = row.sample()
            used = (_cpu_seconds() - before) / (time.perf_counter() - start)
            row.samples.append(value)
            if value > 0 and (row.unit in _OPERATIONS or row.unit == "ns"):
                row.notes.setdefault(CPU, []).append(used * (value if row.unit == "ns" else 1e9 / value))
            step(number * len(rows) + k + 1, rounds * len(rows))


def missing(name: str, reason: str) -> Row:
    """In place of rows that cannot be had."""
    return Row(name, "", lambda: 0.0, missing=reason)


def ratio(row: Row, limit: str | None, rows: list[Row]) -> float | None:
    """The row held against the one of that name, for a time that / figure: the median of the ratios within each round, for
    a machine that is slower for some rounds is so for both. None where one of the two is missing."""
    other = next((other for other in rows if other.name == limit), None)
    if other is None or not row.samples or not other.samples:
        return None
    pairs = zip(row.samples, other.samples, strict=True)
    return statistics.median(most / mine if row.less else mine / most for mine, most in pairs)


def report(what: str, rows: list[Row], policy: str = POLICY) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    def entry(row: Row) -> dict[str, Any]:
        against = ([] if row.limit is None else [row.limit]) + list(row.beside)
        return {"name": row.name, "unit": row.unit, "median": row.median, "limit": row.limit,
                "ratio": ratio(row, row.limit, rows), "ratios": {name: ratio(row, name, rows) for name in against},
                "missing": row.missing, "samples": row.samples, "kind": row.kind, "at": row.at, "line": row.line,
                "notes": {name: {"median": statistics.median(seen), "samples": seen} for name, seen in row.notes.items()}}

    return {"benchmark": what, "environment": {**environment(), "policy": policy, "memory": round(memory(), 1)},
            "rows": [entry(row) for row in rows]}
