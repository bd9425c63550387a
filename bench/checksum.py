"""What checksums of block messages cost: a RAM disk with them, without them, and without them in another build, in turns.

    python bench/checksum.py [--rounds N] [--json FILE] [--shm] [--other PYTHON]

Server and client are pinned to one CPU each; every sample is a pair of processes of its own. --shm: over a shared buffer.
--other: the Python of an environment with a build that has none, which tells what they cost where they are off.
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
from contextlib import ExitStack
from functools import partial

SIZE, BLOCK = 64 << 20, 4096
SECONDS = 1.0
# name: bytes of a piece, pieces in flight, whether they are written
ROWS = {"read 4 KiB, depth 32": (BLOCK, 32, False), "write 4 KiB, depth 32": (BLOCK, 32, True),
        "read 4 KiB, depth 1": (BLOCK, 1, False), "write 4 KiB, depth 1": (BLOCK, 1, True),
        "read 128 KiB, depth 8": (1 << 17, 8, False), "write 128 KiB, depth 8": (1 << 17, 8, True)}


def _serve(req: str, resp: str, buffer: str | None, more: dict[str, str], stack: ExitStack) -> str:
    from muenfast.blk import BlockServer, exports_from_lists

    stack.enter_context(BlockServer(exports_from_lists(req, resp, device=f"ram:{SIZE}", buffer=buffer, **more)))
    return "serving"


def sample(shared: bool, mode: str) -> dict[str, float]:
    """Pieces per second of each row."""
    from muenfast.blk import BlockDevice
    from muenfast.measure import Pair, _Child

    pair = Pair()
    req, resp, name = (f"bench-{os.getpid()}-{word}" for word in ("req", "resp", "shm"))
    buffer = name if shared else None
    more = {} if mode == "none" else {"checksum": mode}
    server = _Child(pair.far, partial(_serve, req, resp, buffer, more))
    found = {}
    try:
        os.sched_setaffinity(0, {pair.near})
        with BlockDevice(req, resp, shm=buffer, **more) as disk:
            piece = random.Random(1).randbytes(1 << 20)
            for at in range(0, SIZE, len(piece)):
                disk.pwrite(piece, at)
            for row, (unit, depth, write) in ROWS.items():
                places = [random.Random(2).randrange(SIZE // unit) * unit for _ in range(2048 * BLOCK // unit)]
                memory = memoryview(bytearray(random.Random(3).randbytes(1 << 20) * 8))[:len(places) * unit]
                call = disk.pwrite_many if write else disk.pread_many
                disk.client.depth = min(1024, depth * (1 if shared else unit // BLOCK))
                done, start, passed = 0, time.perf_counter(), 0.0
                while passed < SECONDS / 2:
                    if depth == 1:
                        for place in places:
                            call([place], memory[:unit])
                    else:
                        call(places, memory)
                    done += len(places)
                    passed = time.perf_counter() - start
                found[row] = done / passed
    finally:
        server.close()
    return found


def main() -> None:
    """Prints medians, least and most, and the ratios to the first column."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--shm", action="store_true")
    parser.add_argument("--other", metavar="PYTHON")
    parser.add_argument("--sample", metavar="MODE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sample:
        print(json.dumps(sample(arguments.shm, arguments.sample)))
        return
    ways = {"off": (sys.executable, "off"), "auto": (sys.executable, "auto")}
    if arguments.other:
        ways = {"other build": (arguments.other, "none"), **ways}
    taken: dict[str, dict[str, list[float]]] = {way: {row: [] for row in ROWS} for way in ways}
    for _ in range(arguments.rounds):
        for way, (python, mode) in ways.items():
            words = [python, __file__, "--sample", mode, *(["--shm"] if arguments.shm else [])]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            for row, value in json.loads(done.stdout).items():
                taken[way][row].append(value)
    first = next(iter(ways))
    for row in ROWS:
        print(row)
        for way in ways:
            values = taken[way][row]
            middle = statistics.median(values)
            print(f"    {way:12} {middle / 1e3:9.1f} ({min(values) / 1e3:.1f} to {max(values) / 1e3:.1f}) thousand/s, "
                  f"{middle / statistics.median(taken[first][row]):.3f} of {first}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(taken, file, indent=1)


if __name__ == "__main__":
    main()
