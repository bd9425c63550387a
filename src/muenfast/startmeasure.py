"""What `muenfast bench start` measures: how long programs take to be there, and what many exports or interfaces in one
process cost: time to `ready`, memory, CPU time while nothing is asked of them, throughput.

Programs are started as users start them. Their servers are on the second CPU; the load, or who waits for them, on the
first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

from muenfast import netns
from muenfast.errors import MuenfastError
from muenfast.measure import Pair, Row, die_with
from muenfast.threads import interrupts_held

POLICY = ("programs on the second CPU while they are measured, load on the first; the engines' own adaptive spin, "
          "then sleep on the bell; start-up: both CPUs, the time from fork() to the line `ready`, or to the end")
EXPORTS = (1, 8, 64, 256)
INTERFACES = (1, 8, 32)
_DISK = "ram:64M"
_BLOCK = 4096
_DEPTH = 8  # requests of a connection in flight, where all are in use
_PATIENCE = 60.0  # seconds until a program has to be ready
_PERMITTED = 12  # CAP_NET_ADMIN, <linux/capability.h>


class Program:
    """A `muenfast` that serves, from `ready` until close(); it ends with this process at the latest.

    seconds: from its start to `ready`. cpu: which it is pinned to, None: it may run on all. Raises MuenfastError.
    """

    def __init__(self, words: Sequence[str], cpu: int | None = None) -> None:
        me = os.getpid()
        with interrupts_held() as as_before:
            def enter() -> None:
                as_before()
                if cpu is not None:
                    os.sched_setaffinity(0, {cpu})
                die_with(me, 15)

            start = time.perf_counter()
            self.process = subprocess.Popen([sys.executable, "-m", "muenfast", *words], stdout=subprocess.PIPE,
                                            stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=enter)
        try:
            late = threading.Timer(_PATIENCE, self.process.kill)
            late.start()
            try:
                assert self.process.stdout is not None
                found = any(line == "ready\n" for line in self.process.stdout)
                self.seconds = time.perf_counter() - start
            finally:
                late.cancel()
            if not found:
                assert self.process.stderr is not None
                raise MuenfastError(f"`muenfast {words[0]}` is not ready: {self.process.stderr.read().strip()[-300:]}")
        except BaseException:
            self.close()
            raise

    def memory(self) -> float:
        """Its share of what is resident, regions included, in MiB."""
        with open(f"/proc/{self.process.pid}/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far, to the nanosecond."""
        total = 0
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            with open(f"/proc/{self.process.pid}/task/{task}/schedstat", encoding="ascii") as file:
                total += int(file.read().split()[0])
        return total / 1e9

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise MuenfastError(f"a `muenfast` of the measurement did not end in {_PATIENCE:g} s, and was killed") from None


def _timed(words: Sequence[str]) -> float:
    """Milliseconds of a program from its start to its end. Raises MuenfastError."""
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise MuenfastError(f"{words[0]} failed: {done.stderr.strip()[-300:]}")
    return (time.perf_counter() - start) * 1e3


def lists(count: int) -> tuple[str, str]:
    """Request and response channels of as many connections."""
    req, resp = (",".join(f"bench-{os.getpid()}-{count}-{k}-{way}" for k in range(count)) for way in ("req", "resp"))
    return req, resp


def _exports(count: int) -> list[str]:
    req, resp = lists(count)
    return ["blk", "--req", req, "--resp", resp, "--device", ",".join([_DISK] * count)]


def _interfaces(count: int, space: str) -> list[str]:
    return ["net", "--name", ",".join(f"bench{count}-{k}" for k in range(count)), "--netns", space,
            "--in", ",".join(f"bench-{os.getpid()}-n{count}-{k}-in" for k in range(count)),
            "--out", ",".join(f"bench-{os.getpid()}-n{count}-{k}-out" for k in range(count))]


def _ready(words: Sequence[str]) -> float:
    program = Program(words)
    program.close()
    return program.seconds * 1e3


class _Standing:
    """The program of several rows: started by the first of them in a round, and ended by the last, so that no other's
    samples have it beside them."""

    def __init__(self, stack: ExitStack, words: Sequence[str], cpu: int, parts: int) -> None:
        self._words, self._cpu, self.parts, self._program = words, cpu, parts, None  # type: Sequence[str], int, int, Program | None
        stack.callback(self.end)

    def there(self) -> Program:
        if self._program is None:
            self._program = Program(self._words, self._cpu)
        return self._program

    def end(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None

    def each(self) -> float:
        """Memory in KiB, per part."""
        return self.there().memory() * 1024 / self.parts

    def idle(self, seconds: float) -> float:
        """Per cent of a CPU."""
        program = self.there()
        time.sleep(min(0.3, seconds))       # what it does after `ready`
        before, start = program.cpu_seconds(), time.perf_counter()
        time.sleep(seconds)
        return (program.cpu_seconds() - before) / (time.perf_counter() - start) * 100


def _throughput(standing: _Standing, cpu: int, used: int, seconds: float, last: bool) -> float:
    """Blocks per second and connection, of `used` connections at once. last: of this program's rows."""
    from muenfast.disk import BlockDevice

    standing.there()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        with ExitStack() as stack:
            pairs = list(zip(*(text.split(",") for text in lists(standing.parts)), strict=True))[:used]
            disks = [stack.enter_context(BlockDevice(*pair)) for pair in pairs]
            done = [0] * used
            places = [k * _BLOCK for k in range(64)]

            def load(k: int) -> None:
                disks[k].client.depth = _DEPTH
                room = bytearray(len(places) * _BLOCK)
                while time.perf_counter() < end:
                    disks[k].pread_many(places, room)
                    done[k] += len(places)

            start = time.perf_counter()
            end = start + seconds
            threads = [threading.Thread(target=load, args=(k,)) for k in range(used)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sum(done) / used / (time.perf_counter() - start)
    finally:
        os.sched_setaffinity(0, before)
        if last:
            standing.end()


def _last(standing: _Standing, sample: Callable[[], float]) -> float:
    try:
        return sample()
    finally:
        standing.end()


def start_rows(scale: float = 1.0) -> Iterator[list[Row]]:
    """A generator that cleans up when it is closed. scale: of the usual seconds for each sample; below 0.1 the largest
    counts are left out."""
    pair = Pair()
    with ExitStack() as stack:
        yield list(_rows(stack, pair, scale))


def _rows(stack: ExitStack, pair: Pair, scale: float) -> Iterator[Row]:
    idle, load = max(0.1, 2.0 * scale), max(0.05, 0.5 * scale)
    small = scale < 0.1
    bare = "python -c pass"
    yield Row(bare, "ms", partial(_timed, [sys.executable, "-c", "pass"]), less=True, kind="limit")
    yield Row("import muenfast", "ms", partial(_timed, [sys.executable, "-c", "import muenfast"]), limit=bare, less=True)
    yield Row("muenfast --help", "ms", partial(_timed, [sys.executable, "-m", "muenfast", "--help"]), limit=bare, less=True)
    for count in EXPORTS[:2] if small else EXPORTS:
        yield Row(f"exports: command to ready, {count}", "ms", partial(_ready, _exports(count)), limit=bare, less=True,
                  at={"exports": count}, line="command to ready")
    for count in EXPORTS[:2] if small else EXPORTS:
        standing = _Standing(stack, _exports(count), pair.far, count)
        yield Row(f"exports: memory of each, {count}", "KiB", standing.each, less=True, at={"exports": count},
                  line="memory of each")
        yield Row(f"exports: idle CPU, {count}", "%", partial(standing.idle, idle), less=True, at={"exports": count},
                  line="idle CPU")
        yield Row(f"exports: one in use, 4 KiB reads, {count}", "blocks/s",
                  partial(_throughput, standing, pair.near, 1, load, False),
                  limit=None if count == 1 else "exports: one in use, 4 KiB reads, 1", at={"exports": count},
                  line="one in use")
        yield Row(f"exports: all in use, 4 KiB reads of each, {count}", "blocks/s",
                  partial(_throughput, standing, pair.near, count, load, True), at={"exports": count},
                  line="all in use, each")
    why = _no_interfaces()
    space = "-"
    if why is None:
        try:
            descriptor = netns.inside_new(netns.current)
        except OSError as error:
            why = f"no network namespace can be made: {error.strerror}"
        else:
            stack.callback(os.close, descriptor)
            space = f"/proc/{os.getpid()}/fd/{descriptor}"
    for count in INTERFACES[:1] if small else INTERFACES:
        words = _interfaces(count, space)
        yield Row(f"interfaces: command to ready, {count}", "ms", partial(_ready, words), less=True, missing=why,
                  at={"interfaces": count}, line="command to ready")
        standing = _Standing(stack, words, pair.far, count)
        yield Row(f"interfaces: memory of each, {count}", "KiB", standing.each, less=True, missing=why,
                  at={"interfaces": count}, line="memory of each")
        yield Row(f"interfaces: idle CPU, {count}", "%", partial(_last, standing, partial(standing.idle, idle)), less=True,
                  missing=why, at={"interfaces": count}, line="idle CPU")


def _no_interfaces() -> str | None:
    """Why there can be no network interfaces."""
    if not os.path.exists("/dev/net/tun"):
        return "there are no TUN devices here: a kernel with CONFIG_TUN has /dev/net/tun"
    return None if os.geteuid() == 0 else "interfaces take root (CAP_NET_ADMIN): sudo muenfast bench start"
