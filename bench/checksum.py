"""What checksums of block messages cost: a RAM disk with them, without them, and without them in another build, in turns.

    python bench/checksum.py [--rounds N] [--json FILE] [--shm] [--other PYTHON]

Server and client are pinned to one CPU each. All pairs stand at once, and one after the other works for a moment: what else
the machine does meets all alike. --shm: over a shared buffer.
--other: the Python of an environment with a build that has none, which tells what they cost where they are off.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial

from workers import in_turns, started

SIZE, BLOCK = 64 << 20, 4096
SLICE = 0.03     # seconds of one sample, at least
# name: bytes of a piece, pieces in flight, whether they are written
ROWS = {"read 4 KiB, depth 32": (BLOCK, 32, False), "write 4 KiB, depth 32": (BLOCK, 32, True),
        "read 4 KiB, depth 1": (BLOCK, 1, False), "write 4 KiB, depth 1": (BLOCK, 1, True),
        "read 128 KiB, depth 8": (1 << 17, 8, False), "write 128 KiB, depth 8": (1 << 17, 8, True)}


def _serve(req: str, resp: str, buffer: str | None, more: dict[str, str], stack: ExitStack) -> str:
    from muenfast.blk import BlockServer, exports_from_lists

    stack.enter_context(BlockServer(exports_from_lists(req, resp, device=f"ram:{SIZE}", buffer=buffer, **more)))
    return "serving"


def work(shared: bool, mode: str) -> None:
    """For each line of standard input, which names a row, prints pieces per second."""
    from muenfast.blk import BlockDevice
    from muenfast.measure import Pair, _Child

    pair = Pair()
    req, resp, name = (f"bench-{os.getpid()}-{word}" for word in ("req", "resp", "shm"))
    buffer = name if shared else None
    more = {} if mode == "none" else {"checksum": mode}
    server = _Child(pair.far, partial(_serve, req, resp, buffer, more))
    try:
        os.sched_setaffinity(0, {pair.near})
        with BlockDevice(req, resp, shm=buffer, **more) as disk:
            piece = random.Random(1).randbytes(1 << 20)
            for at in range(0, SIZE, len(piece)):
                disk.pwrite(piece, at)
            memory = memoryview(bytearray(piece * 8))
            dice = random.Random(2)
            places = {unit: [dice.randrange(SIZE // unit) * unit for _ in range(len(memory) // unit)]
                      for unit, _, _ in ROWS.values()}
            print("ready", flush=True)
            for line in sys.stdin:
                unit, depth, write = ROWS[line.rstrip("\n")]
                call = disk.pwrite_many if write else disk.pread_many
                disk.client.depth = min(1024, depth * (1 if shared else unit // BLOCK))
                done, start, passed = 0, time.perf_counter(), 0.0
                while passed < SLICE:
                    if depth == 1:
                        for place in places[unit]:
                            call([place], memory[:unit])
                    else:
                        call(places[unit], memory)
                    done += len(places[unit])
                    passed = time.perf_counter() - start
                print(done / passed, flush=True)
    finally:
        server.close()


def main() -> None:
    """Prints medians and quartiles, and the medians of each round's ratios to the first way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json")
    parser.add_argument("--shm", action="store_true")
    parser.add_argument("--other", metavar="PYTHON")
    parser.add_argument("--work", metavar="MODE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: two at least, of which there is a spread")
    if arguments.work:
        work(arguments.shm, arguments.work)
        return
    ways = {"off": (sys.executable, "off"), "auto": (sys.executable, "auto")}
    if arguments.other:
        ways = {"other build": (arguments.other, "none"), **ways}
    with ExitStack() as stack:
        workers = {}
        for way, (python, mode) in ways.items():
            words = [python, __file__, "--work", mode, *(["--shm"] if arguments.shm else [])]
            workers[way] = started(stack, words)
        taken = in_turns(workers, list(ROWS), arguments.rounds)
    first = next(iter(ways))
    for row in ROWS:
        print(row)
        for way in ways:
            values = taken[way][row]
            beside = statistics.median(mine / other for mine, other in zip(values, taken[first][row], strict=True))
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"    {way:12} {middle / 1e3:9.1f} ({low / 1e3:.1f} to {high / 1e3:.1f}) thousand/s, "
                  f"{beside:.3f} of {first}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(taken, file, indent=1)


if __name__ == "__main__":
    main()
