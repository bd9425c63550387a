"""What being confined costs a process that serves by a policy: system calls and CPU time for each request, with the
filter of system calls and Landlock, and with --no-sandbox, in turns within one run.

    python bench/sandbox.py [--rounds N] [--json FILE] [--users SERVER,CLIENT]

As root; needs perf (its tracepoint raw_syscalls:sys_enter counts, without slowing the calls down) and strace (which kinds
of calls there are, in a run of its own). Servers of a RAM disk and of a file, and clients that have a block device of a RAM
disk: those that are looked at on the second CPU, who asks on the first. Everything that is made goes with the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from muenfast import measure, sandbox
from muenfast.blk import BlockDevice
from muenfast.measure import Pair, Row
from muenfast.privileges import no_new

SIZE = 16 << 20
BATCH = 2048    # requests
# Calls that wait, or look whether they have to: how many there are is the scheduler's affair.
WAITS = ("futex", "sched_yield", "clock_nanosleep", "pselect6", "ppoll", "poll", "epoll_wait")
CALLS = 5_000       # of a turn
WAYS = {"confined": (), "--no-sandbox": ("--no-sandbox",)}
POLICY = """
version = 1
[subjects.server]
user = "{server}"
[subjects.client]
user = "{client}"
[channels.req]
writer = "client"
reader = "server"
region = "{name}-req"
[channels.resp]
writer = "server"
reader = "client"
region = "{name}-resp"
[connections.disk]
client = "client"
server = "server"
request = "req"
response = "resp"
device = "{device}"
"""


def muenfast(*words: str) -> list[str]:
    return [sys.executable, "-m", "muenfast", *words]


def started(stack: ExitStack, cpu: int, *words: str) -> tuple[int, list[str]]:
    """A serving process on that CPU, which ends with the stack: its number and its lines."""
    process = subprocess.Popen(["taskset", "-c", str(cpu), *muenfast(*words)], stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if line == "ready\n":
            return process.pid, lines
        lines.append(line.rstrip("\n"))
    raise SystemExit(f"sandbox.py: muenfast {' '.join(words)} is not ready")


class Counter:
    """System calls of a process, of all of its threads, while the block runs. calls, waits: afterwards."""

    def __init__(self, pid: int) -> None:
        self._pid, self.calls, self.waits = pid, 0, 0

    def __enter__(self) -> Counter:
        (there, self._tell), (self._told, back) = os.pipe(), os.pipe()
        events = ["raw_syscalls:sys_enter", *(f"syscalls:sys_enter_{each}" for each in WAITS)]
        self._perf = subprocess.Popen(
            ["perf", "stat", "-x,", "-e", ",".join(events), "-p", str(self._pid), "--delay=-1",
             f"--control=fd:{there},{back}"], stderr=subprocess.PIPE, text=True, pass_fds=(there, back))
        os.close(there)
        os.close(back)
        self._say(b"enable\n")
        return self

    def _say(self, what: bytes) -> None:
        os.write(self._tell, what)
        if not os.read(self._told, 16).startswith(b"ack"):
            raise SystemExit(f"sandbox.py: perf: {self._perf.communicate()[1]}")

    def __exit__(self, *exc: object) -> None:
        self._say(b"disable\n")
        self._perf.send_signal(signal.SIGINT)
        _, text = self._perf.communicate()
        os.close(self._tell)
        os.close(self._told)
        self.calls, *waits = (int(line.split(",")[0]) for line in text.splitlines() if ":sys_enter" in line)
        self.waits = sum(waits)


def cpu_time(pid: int) -> int:
    """Nanoseconds that its threads ran."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def kinds(pid: int, load: Callable[[], int]) -> dict[str, int]:
    """System calls by name, of some of the load."""
    with tempfile.NamedTemporaryFile("r") as file:
        with subprocess.Popen(["strace", "-f", "-c", "-U", "name,calls", "-o", file.name, "-p", str(pid)],
                              stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            tracer.stderr.readline()    # it is attached
            load()
            tracer.send_signal(signal.SIGINT)
            tracer.communicate()
        rows = [line.split() for line in file.read().splitlines()[2:] if not line.startswith("-")]
    return {name: int(count) for name, count in rows if name != "total"}


class Measured:
    """One process, and what it is asked for: load() makes that many requests, read() one at that byte; disk: who asks,
    where there is no device."""

    def __init__(self, kind: str, way: str, pid: int, load: Callable[[], int], times: int,
                 read: Callable[[int], object], disk: BlockDevice | None = None) -> None:
        self.kind, self.way, self.pid, self.load, self.times = kind, way, pid, load, times
        self.read, self.disk = read, disk
        beside = None if way == "--no-sandbox" else f"{kind}, --no-sandbox"
        self.calls, self.work = (
            Row(f"{kind}, {way}: {what}", "calls/1000 requests", lambda: 0.0, beside and f"{beside}: {what}", True)
            for what in ("system calls", "those that do not wait"))
        self.cpu = Row(f"{kind}, {way}: CPU time", "ns/request", lambda: 0.0, beside and f"{beside}: CPU time", True)

    def sample(self) -> None:
        with Counter(self.pid) as counter:
            before, count = cpu_time(self.pid), 0
            for _ in range(self.times):
                count += self.load()
            taken = cpu_time(self.pid) - before
        self.calls.samples.append(1e3 * counter.calls / count)
        self.work.samples.append(1e3 * (counter.calls - counter.waits) / count)
        self.cpu.samples.append(taken / count)

    @property
    def rows(self) -> list[Row]:
        return [self.calls, self.work, self.cpu]


class Caller:
    """A process that makes calls in turns, behind the filter or not."""

    def __init__(self, cpu: int, confined: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                ours.close()
                os.sched_setaffinity(0, {cpu})
                fd = os.open("/dev/zero", os.O_RDONLY)
                calls = {"getppid": os.getppid, "pread of /dev/zero": lambda: os.pread(fd, 1, 0)}
                if confined:
                    no_new()
                    sandbox.install(sandbox.CALLS)
                while name := theirs.recv(100).decode():
                    call = calls[name]
                    start = time.perf_counter_ns()
                    for _ in range(CALLS):
                        call()
                    theirs.send(str((time.perf_counter_ns() - start) / CALLS).encode())
            finally:
                os._exit(0)
        theirs.close()
        self._end = ours

    def nanoseconds(self, name: str) -> float:
        """Of one such call."""
        self._end.send(name.encode())
        return float(self._end.recv(100))

    def close(self) -> None:
        self._end.send(b"")     # the other one may have our end, too
        os.waitpid(self._pid, 0)
        self._end.close()


def calls_behind(rounds: int, cpu: int) -> list[Row]:
    """What one call costs with the filter and without."""
    rows, callers = [], {"no filter": Caller(cpu, False), "behind the filter": Caller(cpu, True)}
    for name in ("getppid", "pread of /dev/zero"):
        both = [Row(f"{name}: {way}", "ns/call", lambda: 0.0, None if way == "no filter" else f"{name}: no filter", True)
                for way in callers]
        for turn in range(rounds):
            pairs = list(zip(both, callers.values(), strict=True))
            for row, caller in pairs if turn % 2 else pairs[::-1]:
                row.samples.append(caller.nanoseconds(name))
        rows += both
    for caller in callers.values():
        caller.close()
    return rows


def reads_of(disk: BlockDevice) -> Callable[[], int]:
    places = [random.randrange(SIZE // 4096) * 4096 for _ in range(BATCH)]
    buffer = bytearray(BATCH * 4096)

    def load() -> int:
        disk.pread_many(places, buffer)
        return BATCH

    return load


def reads_of_node(stack: ExitStack, node: str) -> tuple[Callable[[], int], Callable[[int], object]]:
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
    stack.callback(os.close, fd)
    buffer = mmap.mmap(-1, 4096)

    def load() -> int:
        for _ in range(BATCH):
            os.preadv(fd, [buffer], random.randrange(SIZE // 4096) * 4096)
        return BATCH

    return load, lambda at: os.preadv(fd, [buffer], at)


def made(stack: ExitStack, pair: Pair, place: Path, users: list[str], kind: str, way: str) -> Measured:
    """Processes of one kind, held that way."""
    name = f"sandbox-{os.getpid()}-{kind.split()[0]}{len(WAYS[way])}"
    device = f"ram:{SIZE}"
    if kind == "file":
        device = str(place / name)
        with open(device, "wb") as file:
            file.write(random.randbytes(SIZE))
        os.chown(device, pwd.getpwnam(users[0]).pw_uid, -1)
    policy = place / f"{name}.toml"
    policy.write_text(POLICY.format(server=users[0], client=users[1], name=name, device=device))

    def removed() -> None:
        for path in Path("/dev/shm").glob(f"{name}-*"):
            path.unlink()

    stack.callback(removed)
    subprocess.run(muenfast("policy", "apply", str(policy)), check=True, stdout=subprocess.DEVNULL)
    common = ("--policy", str(policy), "--subject")
    if kind == "device":
        started(stack, pair.near, "blk", *common, "server")
        pid, lines = started(stack, pair.far, "blk", "--client", *common, "client", "--same-store", *WAYS[way])
        load, read = reads_of_node(stack, lines[0].split()[4])
        return Measured(kind, way, pid, load, 4, read)
    pid, _ = started(stack, pair.far, "blk", *common, "server", *WAYS[way])
    disk = stack.enter_context(BlockDevice(f"{name}-req", f"{name}-resp"))
    return Measured(kind, way, pid, reads_of(disk), 100 if kind == "ram" else 20, lambda at: disk.pread(4096, at), disk)


@contextlib.contextmanager
def as_found(users: list[str]) -> Iterator[None]:
    """What muenfast makes in /run for users who had nothing there goes afterwards."""
    rooms = [Path(f"/run/muenfast-{pwd.getpwnam(user).pw_uid}") for user in users]
    new = [room for room in rooms if not room.exists()]
    try:
        yield
    finally:
        for room in new:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(room)


def show(rows: list[Row]) -> None:
    for row in rows:
        print(f"{row.name:<45} {row.median:10.1f} {row.unit}, {min(row.samples):.1f} to {max(row.samples):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="sandbox.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--users", default="backup,list")
    arguments = parser.parse_args()
    users, pair, reports, tables = arguments.users.split(","), Pair(), [], {}
    for tool in ("perf", "strace", "taskset"):
        if shutil.which(tool) is None:
            raise SystemExit(f"sandbox.py: {tool} is not installed")
    os.sched_setaffinity(0, {pair.near})
    with as_found(users):
        for kind in ("ram", "file", "device"):
            with ExitStack() as stack:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muenfast-sandbox-")))
                place.chmod(0o755)
                both = [made(stack, pair, place, users, kind, way) for way in WAYS]
                for each in both:
                    each.load()
                time.sleep(1)
                for turn in range(arguments.rounds):
                    for each in both if turn % 2 else both[::-1]:
                        each.sample()
                tables[kind] = {each.way: kinds(each.pid, each.load) for each in both}
            reports.append(measure.report(f"sandbox {kind}", [row for each in both for row in each.rows],
                                          "who asks on the first CPU, what is looked at on the second; 4 KiB reads, of a "
                                          "device one at a time, else 2048 in a call; --no-sandbox and confined in turns"))
            show([row for each in both for row in each.rows])
            only = sorted(tables[kind]["confined"].keys() - tables[kind]["--no-sandbox"].keys())
            print(f"{kind}: kinds of calls of the confined one only: {', '.join(only) or 'none'}", flush=True)
    rows = calls_behind(40 * arguments.rounds, pair.far)
    show(rows)
    reports.append(measure.report("sandbox calls", rows, "two processes on the second CPU, from Python, 5000 calls "
                                                         "in turns"))
    if arguments.json is not None:
        for report in reports:
            report["calls"] = tables.get(report["benchmark"].split()[1], {})
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(reports, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
