"""What a hostile peer on one connection takes from the throughput of another connection of the same process.

    python bench/hostile.py [--rounds N] [--seconds S] [--json FILE] [MODE ...]

A server with two exports on the second CPU. On the first: the neighbour, who reads 4 KiB blocks of one export all the time,
and an attacker (tools/hostile.py, one of its modes). In turns the attacker is at the other export, and at copies of its
regions that nobody serves: then it takes as much of the first CPU, and nothing else. A ratio is of the neighbour's reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers import compiled  # noqa: E402

from muenfast import measure  # noqa: E402
from muenfast.blk import BlockDevice, BlockServer  # noqa: E402
from muenfast.export import exports_from_lists  # noqa: E402
from muenfast.measure import Pair, Row, _Child  # noqa: E402

ATTACK = ROOT / "tools" / "hostile.py"
# Of tools/hostile.py; "stop", "truncate" and what has them are of moments, and make the export begin anew.
MODES = ("header", "counters", "epochs", "elements", "bell", "ring", "flood")
RINGS = "rings"         # and nothing else: tests/c/ringer.c alone
BATCH = 512             # reads in a call
STARTED = 0.7           # s, of a Python program
SHM = Path("/dev/shm")


def rows_of(stack: ExitStack, pair: Pair, mode: str, seconds: float) -> list[Row]:
    """The neighbour's reads while decoys are attacked, and while the server is."""
    prefix = f"bench{os.getpid()}-{mode}"
    near, attacked, decoy = ([f"{prefix}-{what}-{way}" for way in ("req", "resp")] for what in ("near", "far", "decoy"))

    def serve(inner: ExitStack) -> str:
        logging.getLogger("muenfast").addHandler(logging.NullHandler())     # what it says of its peer
        req, resp = zip(near, attacked, strict=True)
        inner.enter_context(BlockServer(exports_from_lists(",".join(req), ",".join(resp), device="ram:16M,ram:1M")))
        return "ready"

    for name in decoy:
        for path in (SHM / name, SHM / f"{name}.bell"):
            stack.callback(path.unlink, missing_ok=True)
    stack.callback(_Child(pair.far, serve).close)
    for name, copy in zip(attacked, decoy, strict=True):
        for ending in ("", ".bell"):
            shutil.copyfile(SHM / f"{name}{ending}", SHM / f"{copy}{ending}")
    disk = stack.enter_context(BlockDevice(*near))
    ringer = compiled("ringer", Path(stack.enter_context(tempfile.TemporaryDirectory())), "-O2") if mode == RINGS else None
    places = [random.randrange(disk.size // 4096) * 4096 for _ in range(BATCH)]
    buffer = bytearray(BATCH * 4096)

    def reads() -> float:
        done, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            disk.pread_many(places, buffer)
            done += BATCH
        return done / passed / 1e3

    def beside(names: list[str]) -> Callable[[], float]:
        def sample() -> float:
            words = [sys.executable, str(ATTACK), "attack", "server", *names, mode, str(seconds + 2 * STARTED),
                     str(random.getrandbits(32)), ""]
            if ringer is not None:
                words = [str(ringer), *(f"{SHM / name}.bell" for name in names)]
            attacker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            try:
                time.sleep(STARTED)
                rate = reads()
                if attacker.poll() is not None:
                    raise SystemExit(f"hostile.py: the attack {mode} ended too soon, with status {attacker.returncode}")
                return rate
            finally:
                attacker.kill()
                attacker.communicate()

        return sample

    return [Row(f"{mode}: at nobody's regions", "thousand reads/s", beside(decoy)),
            Row(f"{mode}: at the server", "thousand reads/s", beside(attacked), limit=f"{mode}: at nobody's regions")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="hostile.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="*", metavar="MODE", help=f"(default: all of {', '.join(MODES)} and {RINGS})")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.7, help="of a sample (default: 0.7)")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    for mode in arguments.mode:
        if mode not in (*MODES, RINGS):
            parser.error(f"{mode}: the modes are {', '.join(MODES)} and {RINGS}")
    pair = Pair()
    rows: list[Row] = []
    os.sched_setaffinity(0, {pair.near})
    for mode in arguments.mode or (*MODES, RINGS):
        with ExitStack() as stack:
            these = rows_of(stack, pair, mode, arguments.seconds)
            measure.take(these, arguments.rounds, lambda done, of: None)
        rows += these
        for row in these:
            share = measure.ratio(row, row.limit, rows)
            print(f"{row.name:<36} {row.median:8.1f} {row.unit}, {min(row.samples):.1f} to {max(row.samples):.1f}"
                  + ("" if share is None else f"   {share:.2f}"), flush=True)
    if arguments.json is not None:
        report = measure.report("hostile", rows, "neighbour and attacker on the first CPU, the server on the second; the "
                                                 "attack at the server and at nobody's regions in turns")
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([report], file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
