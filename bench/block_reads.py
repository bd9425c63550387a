"""4 KiB random reads from a RAM disk across two channels, beside what the machine can do, in one run.

Timed: whole calls of BlockDevice.pread_many with `depth` reads in flight, until all data stands in the caller's
buffer. Not timed: set-up, choosing the blocks. Beside it, on the same random blocks of a disk of the same size:
`copy`, numpy.take, one thread's memcpy without any transport (the limit); `file`, os.preadv on a file in /dev/shm, one
system call per block. Client and server are pinned to one CPU each (the others run on the client's); rounds are
interleaved; every sample is kept. Waiting: both sides spin up to 50 us after a batch, then sleep on the bell.

    python bench/block_reads.py [--json FILE] [--depth N] [--size SIZE] [--rounds N] [--seconds S]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy

from muenfast import BlockDevice, params

BLOCK = 4096


def pin(pid: int, cpu: int) -> None:
    """All threads of a process to one CPU."""
    for tid in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(tid), {cpu})


def rate(step: Callable[[], int], seconds: float) -> float:
    """Blocks per second of step(), which returns how many it moved."""
    done, start = 0, time.perf_counter()
    end = start + seconds
    while (now := time.perf_counter()) < end:
        done += step()
    return done / (now - start)


def environment(cpus: list[int]) -> dict[str, object]:
    """What a figure means nothing without."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    return {"cpu": model, "cpus": cpus, "kernel": platform.release(), "python": platform.python_version(),
            "numpy": numpy.__version__}


def main() -> int:
    """Runs all rounds, prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--size", default="64M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    size, depth = params.size("--size", None, arguments.size, multiple=BLOCK), arguments.depth
    cpus = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {cpus[0]})
    req, resp = f"bench-{os.getpid()}-req", f"bench-{os.getpid()}-resp"
    server = subprocess.Popen([sys.executable, "-m", "muenfast", "blk", "--req", req, "--resp", resp,
                               "--device", f"ram:{size}"], stdout=subprocess.PIPE)
    path = f"/dev/shm/bench-{os.getpid()}-file"
    try:
        assert server.stdout is not None
        while server.stdout.readline() not in (b"ready\n", b""):
            pass
        pin(server.pid, cpus[-1])
        content = numpy.frombuffer(random.Random(1).randbytes(size), dtype=numpy.uint8).reshape(-1, BLOCK)
        with BlockDevice(req=req, resp=resp) as disk, open(path, "w+b", buffering=0) as file:
            file.write(content)
            for at in range(0, size, 1 << 20):
                disk.pwrite(content.reshape(-1)[at:at + (1 << 20)], at)
            chooser = random.Random(2)
            lists = [[chooser.randrange(size // BLOCK) for _ in range(depth)] for _ in range(4096)]
            offsets = [[block * BLOCK for block in blocks] for blocks in lists]
            indices = [numpy.array(blocks) for blocks in lists]
            buffer = numpy.empty((depth, BLOCK), dtype=numpy.uint8)
            flat = memoryview(buffer.reshape(-1))
            pieces = [[flat[i * BLOCK:(i + 1) * BLOCK]] for i in range(depth)]
            at = 0

            def product() -> int:
                nonlocal at
                at = (at + 1) % len(lists)
                disk.pread_many(offsets[at], flat)
                return depth

            def copy() -> int:
                nonlocal at
                at = (at + 1) % len(lists)
                numpy.take(content, indices[at], axis=0, out=buffer, mode="clip")
                return depth

            def tmpfs() -> int:
                nonlocal at
                at = (at + 1) % len(lists)
                for offset, piece in zip(offsets[at], pieces, strict=True):
                    os.preadv(file.fileno(), piece, offset)
                return depth

            steps = {"product": product, "copy": copy, "file": tmpfs}
            for step in steps.values():
                step()
                assert numpy.array_equal(buffer, content[lists[at]]), "wrong data"
            samples: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(arguments.rounds):
                for name, step in steps.items():
                    samples[name].append(rate(step, arguments.seconds))
            lost = disk.status()["counters"]["overruns"]
    finally:
        server.terminate()
        server.wait()
        if os.path.exists(path):
            os.unlink(path)
    median = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {name: median["product"] / median[name] for name in ("copy", "file")}
    print(f"4 KiB random reads, depth {depth}, {arguments.size} RAM disk, medians of {arguments.rounds}:")
    for name, what in (("product", "muenfast, pread_many"), ("copy", "one thread's memcpy"),
                       ("file", "os.preadv on /dev/shm")):
        print(f"  {what:<24} {median[name] / 1e3:8.0f} k/s" + (f"   muenfast / this = {ratios[name]:.2f}"
                                                                 if name in ratios else ""))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as out:
            json.dump({"benchmark": "block_reads", "depth": depth, "size": size, "unit": "blocks/s", "median": median,
                       "ratios": ratios, "overruns": lost, "samples": samples, "environment": environment(cpus)},
                      out, indent=2)
            out.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
