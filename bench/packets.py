"""What a packet costs where super-packets are split into packets of 1500 bytes and made of them, in one thread's memory,
held against memcpy of the same bytes between the same places; a checksum of 64 KiB.

    python bench/packets.py [--json FILE]

Needs a C compiler: packets.c is compiled with the package's own headers and flags, and pinned to one CPU. Split, merge and
both copies take turns, 20 super-packets each, 101 rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from muenfast import measure
from muenfast.measure import Row

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=gnu11", "-O2"]   # setup.py's


def rows(program: str, kind: str) -> list[Row]:
    """One kind's figures, with all their samples."""
    run = subprocess.run([program, kind, "1500"], capture_output=True, text=True, check=True)
    first, *lines = run.stdout.splitlines()
    count, length = int(first.split()[0]), int(first.split()[3])
    into, split, out, merge, checksum, copy = zip(*(map(int, line.split()) for line in lines), strict=True)

    def row(name: str, values: tuple[int, ...], limit: str | None = None) -> Row:
        return Row(f"{kind}: {name}", "ns/packet", lambda: 0.0, limit and f"{kind}: {limit}", True,
                   [value / count for value in values])

    def speed(name: str, values: tuple[int, ...], limit: str | None = None) -> Row:
        return Row(f"{kind}: {name}", "GB/s", lambda: 0.0, limit and f"{kind}: {limit}", False,
                   [length / value for value in values])

    return [row("memcpy into slots", into), row("split", split, "memcpy into slots"),
            row("memcpy out of slots", out), row("merge", merge, "memcpy out of slots"),
            speed("memcpy of 64 KiB", copy), speed("checksum of 64 KiB", checksum, "memcpy of 64 KiB")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="packets.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc").split()
    reports = []
    with tempfile.TemporaryDirectory(prefix="muenfast-packets-") as place:
        program = f"{place}/packets"
        subprocess.run([*compiler, *FLAGS, f"-I{HERE.parent / 'src/muenfast'}", "-o", program, HERE / "packets.c"],
                       check=True)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        for kind in ("tcp", "udp"):
            reports.append(measure.report(f"packets {kind}", rows(program, kind)))
    print(reports[0]["environment"]["cpu"])
    for report in reports:
        for row in report["rows"]:
            against = "" if row["ratio"] is None else f"{row['ratio']:8.2f} of {row['limit']}"
            print(f"  {row['name']:<30}{row['median']:10.1f} {row['unit']:<10}{against}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
