"""muenfast beside its peers, by itself: as `muenfast bench peers`, with the directory for the file, and fewer parts.

    python bench/peers.py [ring nbd python file device] [--rounds N] [--scale F] [--seconds S] [--directory DIR]
        [--json FILE]

`ring` takes what is there of the dependency group `peers` (pip install --group peers); --scale is its work per sample,
and it prints its floors, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys

from muenfast import benchreport, measure, peermeasure, ringpeers
from muenfast.errors import MuenfastError


def ring(rounds: int, scale: float) -> dict[str, object]:
    """The rings' report, printed: figure, furthest samples, what both sides cost, ratios, and the floors."""
    rows = ringpeers.ring_peer_rows(scale)
    measure.take(rows, rounds, lambda done, count: print(f"\r{done}/{count} ", end="", file=sys.stderr))
    report = measure.report("ring peers", rows, ringpeers.POLICY)
    report["floors"] = ringpeers.floors(report)
    print(f"\rring: {report['environment']['cpu']}; {ringpeers.POLICY}")
    for row in report["rows"]:
        if row["missing"] is not None:
            print(f"  {row['name']:<70}missing: {row['missing']}")
            continue
        figure = f"{row['median']:10.0f} ns " if row["unit"] == "ns" else f"{row['median'] / 1e3:10.1f} k/s"
        against = ", ".join(f"{value:.2f} of {limit}" for value, limit in benchreport.ratios(row))
        cost = f"{row['notes']['CPU ns each']['median']:8.0f} ns CPU, " if "CPU ns each" in row["notes"] else " " * 17
        print(f"  {row['name']:<70}{figure}  {ringpeers.spread(row):<12}{cost}"
              f"lost {sum(row['notes']['lost']['samples']):.0f}  {against}".rstrip())
    for floor in report["floors"]:
        said = "missing" if floor["ratio"] is None else f"{floor['ratio']:.2f} {'met' if floor['met'] else 'MISSED'}"
        print(f"  at least {floor['floor']:6.2f}: {said:<14} {floor['row']} / {floor['limit']}")
    return report


def main() -> int:
    names = ("ring", *peermeasure.SUBJECTS)
    parser = argparse.ArgumentParser(prog="peers.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", nargs="*", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of `ring`: work per sample, of the usual (default: 1)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each sample (default: 1)")
    parser.add_argument("--directory", default=".", help="where the file is made (default: here)")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    for subject in arguments.subject:
        if subject not in names:
            parser.error(f"a subject is one of {', '.join(names)}, not {subject}")
    if not 0 < arguments.scale <= 100:
        parser.error(f"a scale is above 0, at most 100, not {arguments.scale}")
    reports: list[dict[str, object]] = []
    for subject in arguments.subject or names:
        if subject == "ring":
            reports.append(ring(arguments.rounds, arguments.scale))
            continue
        session = peermeasure.session(subject, arguments.seconds, arguments.directory)
        try:
            rows = next(session)
            measure.take(rows, arguments.rounds, lambda done, count: print(f"\r{done}/{count} ", end="", file=sys.stderr))
            report = measure.report(subject, rows, peermeasure.POLICY)
        finally:
            session.close()  # type: ignore[attr-defined]
        reports.append(report)
        print(f"\r{subject}: {report['environment']['cpu']}")
        for row in report["rows"]:
            if row["missing"] is not None:
                print(f"  {row['name']:<66}missing: {row['missing']}")
                continue
            against = "" if row["ratio"] is None else f"{row['ratio']:8.2f} of {row['limit']}"
            print(f"  {row['name']:<66}{row['median'] / 1e3:10.1f} k/s {against}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(reports, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        try:
            sys.exit(main())
        except (MuenfastError, OSError, subprocess.SubprocessError) as error:
            sys.exit(f"peers.py: {error}")
