"""Whether a request takes more of a process that serves confined by its policy (a filter of system calls, Landlock) than of
one with --no-sandbox: system calls, each one counted (strace), and instructions in user space, each one counted, too: by
ptrace, which steps through the serving thread, for which a machine needs no counters.

    python bench/confined.py [--requests N] [--json FILE] [--users SERVER,CLIENT]

As root; needs strace, taskset and nm; the processes are those of bench/sandbox.py. One request of 4 KiB at a time. Left out
is what the scheduler decides about: calls that wait (of a block device's client io_uring_enter, too, by which it waits for
the kernel), and all instructions outside of the step that answers a request: a look at the ring, the request executed, its
answer published. Of that step the clock's are left out, whose loop in the vdso begins anew where it is interrupted.
Instructions are those of writes to a RAM disk: how a read is copied depends on how far from each other the two CPUs were
found to be. Exit status 1 where one takes more than the other.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from sandbox import SIZE, WAITS, WAYS, Measured, as_found, kinds, made

from muenfast import _blk, _ring
from muenfast.measure import Pair, environment

STEPPED = 64    # requests of a run whose instructions are counted
_LEFT_OUT = {"ram": (), "file": (), "device": ("io_uring_enter",)}
_INTERRUPT, _SEIZE, _SINGLESTEP, _PEEKUSER, _DETACH = 0x4207, 0x4206, 9, 3, 17  # sys/ptrace.h
_RIP, _RSP = 16 * 8, 19 * 8     # struct user_regs_struct, x86-64
_WALL = 0x40000000              # __WALL: threads, too
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    result = int(_libc.ptrace(request, thread, address, data))
    if result == -1 and ctypes.get_errno() != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result & (1 << 64) - 1


def mapped(pid: int, name: str) -> tuple[int, int]:
    """Where a process has a file, or the kernel's "[vdso]"."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if line.endswith(name)]
    if not ends:
        raise SystemExit(f"confined.py: {pid} has no {name}")
    return min(first for first, _ in ends), max(end for _, end in ends)


def address_of(pid: int, module: str, function: str) -> int:
    """Where a process has a function of a compiled module, by the file's table of symbols."""
    text = subprocess.run(["nm", module], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"^([0-9a-f]+) t __pyx_f_\w*_{function}$", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"confined.py: {module} has no {function}")
    return mapped(pid, module)[0] + int(found[1], 16)


def serving_thread(process: Measured) -> int:
    """The thread that runs while requests are answered."""
    def times() -> dict[int, int]:
        return {int(task.name): int((task / "schedstat").read_text().split()[0])
                for task in Path(f"/proc/{process.pid}/task").iterdir()}

    before = times()
    for _ in range(2000):
        process.read(0)
    return max(times().items(), key=lambda item: item[1] - before.get(item[0], 0))[0]


def instructions(process: Measured) -> list[int]:
    """Of each step of the engine that published an answer to a write, the clock's aside."""
    disk, data = process.disk, bytes(4096)
    assert disk is not None
    thread = serving_thread(process)
    step = address_of(process.pid, _blk.__file__, "server_step")
    publish = address_of(process.pid, _ring.__file__, "writer_publish")
    clock, clock_end = mapped(process.pid, "[vdso]")
    writer = threading.Thread(target=lambda: [disk.pwrite(data, number * 4096) for number in range(STEPPED)])
    found, count, answered, top = [], 0, False, 0
    _ptrace(_SEIZE, thread)
    _ptrace(_INTERRUPT, thread)
    os.waitpid(thread, _WALL)
    writer.start()
    while writer.is_alive():
        at = _ptrace(_PEEKUSER, thread, _RIP)
        if top == 0 and at == step:     # where it returns to is on top
            top, count, answered = _ptrace(_PEEKUSER, thread, _RSP), 0, False
        elif top != 0 and _ptrace(_PEEKUSER, thread, _RSP) > top:
            if answered:
                found.append(count)
            top = 0
        count += not clock <= at < clock_end
        answered = answered or at == publish
        _ptrace(_SINGLESTEP, thread)
        _, status = os.waitpid(thread, _WALL)
        if not os.WIFSTOPPED(status):
            raise SystemExit(f"confined.py: the server ended: {status:#x}")
    _ptrace(_DETACH, thread)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="confined.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--users", default="backup,list")
    arguments = parser.parse_args()
    users, pair, status, reports = arguments.users.split(","), Pair(), 0, []
    for tool in ("strace", "taskset", "nm"):
        if shutil.which(tool) is None:
            raise SystemExit(f"confined.py: {tool} is not installed")
    os.sched_setaffinity(0, {pair.near})
    with as_found(users):
        for kind in _LEFT_OUT:
            calls: dict[str, dict[str, int]] = {}
            steps: dict[str, list[tuple[int, int]]] = {}
            for way in WAYS:
                with ExitStack() as stack:
                    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muenfast-confined-")))
                    place.chmod(0o755)
                    process = made(stack, pair, place, users, kind, way)
                    process.load()

                    def reads(process: Measured = process) -> int:
                        for number in range(arguments.requests):
                            process.read(number * 4096 % SIZE)
                        return arguments.requests

                    calls[way] = kinds(process.pid, reads)
                    if kind == "ram":
                        steps[way] = sorted(Counter(instructions(process)).items())
                told = ", ".join(f"{name} {count}" for name, count in sorted(calls[way].items()))
                print(f"{kind}, {way}: {arguments.requests} reads, one at a time: {told or 'no call'}", flush=True)
                if steps:
                    told = ", ".join(f"{count} ({times} times)" for count, times in steps[way])
                    print(f"{kind}, {way}: instructions of a step that answers a write: {told}", flush=True)
            # What is not made for each request is made by time: prctl and stat once a second.
            each = {way: {name: round(count / arguments.requests, 1) for name, count in found.items()
                          if name not in (*WAITS, *_LEFT_OUT[kind]) and count >= arguments.requests / 2}
                    for way, found in calls.items()}
            # Of most steps: some begin a ring anew.
            usual = {way: max(found, key=lambda item: item[1])[0] for way, found in steps.items()}
            alike = all(len(set(map(str, both))) <= 1 for both in (each.values(), usual.values()))
            status = status if alike else 1
            told = ", ".join(f"{name} {count}" for name, count in each["confined"].items())
            print(f"{kind}: {'alike' if alike else 'NOT alike'}; calls for each request: {told or 'none'}", flush=True)
            reports.append({"kind": kind, "requests": arguments.requests, "calls": calls, "each": each,
                            "instructions": steps})
    if arguments.json is not None:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"environment": environment(), "reports": reports}, file, indent=1)
            file.write("\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
