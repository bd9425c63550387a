"""How long `ctl` operations take while two exports of the same process run at full load.

    python bench/control.py [--rounds N]

Server on one CPU, the two clients and the one that asks on the other one. Times are from asking over the control socket to
the answer. Everything that is made goes with the run.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import threading
import time
from contextlib import ExitStack
from typing import Any

from muenfast import control
from muenfast.blk import BlockDevice
from muenfast.control import ControlServer
from muenfast.export import exports_from_lists
from muenfast.measure import Pair, _Child
from muenfast.serving import ControlledServer


def main() -> int:
    parser = argparse.ArgumentParser(prog="control.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    pair, prefix = Pair(), f"control-{os.getpid()}"
    req, resp = ([f"{prefix}-{way}{number}" for number in range(2)] for way in ("a", "c"))
    taken: dict[str, list[float]] = {}

    def serve(stack: ExitStack) -> str:
        server = stack.enter_context(ControlledServer(exports_from_lists(",".join(req), ",".join(resp))))
        stack.callback(ControlServer(server.commands()).close)
        return str(os.getpid())

    with ExitStack() as stack:
        child = _Child(pair.far, serve)
        stack.callback(child.close)
        pid = int(child.said)

        def ask(command: str, **fields: Any) -> None:
            start = time.perf_counter()
            answer = control.ask(pid, {"command": command, **fields}, timeout=None)
            taken.setdefault(command, []).append(1e3 * (time.perf_counter() - start))
            if not answer["ok"]:
                raise SystemExit(f"control.py: {command}: {answer['error']}")

        os.sched_setaffinity(0, {pair.near})
        over = threading.Event()
        stack.callback(over.set)
        moved = [0, 0]

        def load(number: int, disk: BlockDevice) -> None:
            places = [random.randrange(disk.size // 4096) * 4096 for _ in range(2048)]
            buffer = bytearray(2048 * 4096)
            while not over.is_set():
                disk.pread_many(places, buffer)
                moved[number] += 2048

        threads = []
        for number in range(2):
            disk = stack.enter_context(BlockDevice(req[number], resp[number]))
            threads.append(threading.Thread(target=load, args=(number, disk)))
            threads[-1].start()
            stack.callback(threads[-1].join)
            stack.callback(over.set)
        start = time.monotonic()
        for turn in range(rounds):
            name = f"{prefix}-{turn}"[:31]
            ask("create", name=name)
            ask("resize", name=name, size="128M")
            ask("list")
            ask("show", name=name)
            ask("destroy", name=name)
        passed = time.monotonic() - start
        print(f"load meanwhile: {sum(moved) / passed / 1e3:.0f} thousand 4 KiB reads/s")
    for command, times in taken.items():
        print(f"{command:<8} median {statistics.median(times):6.2f} ms   worst {max(times):6.2f} ms   of {len(times)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
