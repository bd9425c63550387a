"""What --cpus does for one connection: its two ends on one CPU, on two, and where the scheduler puts them, in turns.

    python bench/pinning.py [--rounds N] [--json FILE]

A server with a RAM disk of 64 MiB, as users start it, and a client's engine in another process; 4 KiB reads and writes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from workers import in_turns, started

SIZE, BLOCK = 64 << 20, 4096
SLICE = 0.1     # seconds of one sample, at least
ROWS = {f"{what} 4 KiB, depth {depth}": (what, depth) for depth in (1, 8, 32) for what in ("read", "write")}


def work(cpu: str, req: str, resp: str) -> None:
    """For each line of standard input, which names a row, prints blocks per second."""
    from muenfast import BlockDevice

    if cpu:
        os.sched_setaffinity(0, {int(cpu)})
    with BlockDevice(req, resp, timeout=20) as disk:
        piece = random.Random(1).randbytes(1 << 20)
        for at in range(0, SIZE, len(piece)):
            disk.pwrite(piece, at)
        memory = memoryview(bytearray(piece))
        dice = random.Random(2)
        places = [dice.randrange(SIZE // BLOCK) * BLOCK for _ in range(len(memory) // BLOCK)]
        print("ready", flush=True)
        for line in sys.stdin:
            what, depth = ROWS[line.rstrip("\n")]
            call: Callable[..., object] = disk.pread_many if what == "read" else disk.pwrite_many
            disk.client.depth = depth
            done, start, passed = 0, time.perf_counter(), 0.0
            while passed < SLICE:
                call(places, memory)
                done += len(places)
                passed = time.perf_counter() - start
            print(done / passed, flush=True)


def main() -> None:
    """Prints medians and quartiles, and the medians of each round's ratios to the first way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: two at least, of which there is a spread")
    if arguments.work:
        work(*arguments.work)
        return
    cpus = sorted(os.sched_getaffinity(0))
    ways = {"anywhere": ("", ""), "one CPU": (str(cpus[0]), str(cpus[0])), "two CPUs": (str(cpus[0]), str(cpus[-1]))}
    with ExitStack() as stack:
        workers = {}
        for number, (way, (near, far)) in enumerate(ways.items()):
            req, resp = (f"bench-{os.getpid()}-{number}-{word}" for word in ("req", "resp"))
            server = stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "muenfast", "blk", "--req", req, "--resp", resp, "--device", f"ram:{SIZE}",
                 *(["--cpus", far] if far else [])], stdout=subprocess.PIPE, text=True))
            stack.callback(server.terminate)
            assert server.stdout is not None
            if "ready\n" not in server.stdout:
                sys.exit("the server is not ready")
            workers[way] = started(stack, [sys.executable, __file__, "--work", near, req, resp])
        taken = in_turns(workers, list(ROWS), arguments.rounds)
    for row in ROWS:
        print(row)
        for way in ways:
            values = taken[way][row]
            beside = statistics.median(mine / other for mine, other in zip(values, taken["anywhere"][row], strict=True))
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"    {way:9} {middle / 1e3:8.1f} ({low / 1e3:.1f} to {high / 1e3:.1f}) thousand/s, "
                  f"{beside:.2f} of anywhere")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(taken, file, indent=1)


if __name__ == "__main__":
    main()
