"""muenfast bench: rings, block I/O and network interfaces, beside what the machine and its peers can do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from typing import IO

from muenfast.errors import UsageError

SUBJECTS = ("ring", "blk", "shm", "disk", "net")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, how often, where to put it."""
    parser.add_argument("subject", nargs="*", metavar="ring|blk|shm|disk|net",
                        help="what to measure (default: ring and blk; shm: blk over a shared buffer; disk: a node, as "
                             "root; net: interfaces between two namespaces, beside veth and socat, as root)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each figure, taken in turns (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="work per sample, of the usual: 0.01 is quick and rough (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write all samples and the environment to FILE (-: print)")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw the ratios")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints figure, limit and ratio of each row."""
    subjects = arguments.subject or ["ring", "blk"]
    for index, subject in enumerate(subjects):
        if subject not in SUBJECTS:
            raise UsageError(f"a subject is one of {', '.join(SUBJECTS)}", option="SUBJECT", index=index, value=subject)
    if not 1 <= arguments.rounds <= 1000:
        raise UsageError("rounds are 1 to 1000", option="--rounds", value=arguments.rounds)
    if not 0 < arguments.scale <= 100:
        raise UsageError("a scale is above 0, at most 100", option="--scale", value=arguments.scale)
    if arguments.plot == "-":
        raise UsageError("a plot is written to a file", option="--plot", value="-")
    with ExitStack() as stack:
        files = {option: _opened(stack, option, path) for option, path in (("--json", arguments.json),
                 ("--plot", arguments.plot)) if path is not None and (option, path) != ("--json", "-")}
        if len(files) == 2 and os.path.sameopenfile(*(file.fileno() for file in files.values())):
            raise UsageError("that is the file of --json", option="--plot", value=arguments.plot)
        return _measured(arguments, subjects, files)


def _measured(arguments: argparse.Namespace, subjects: list[str], files: dict[str, IO[str]]) -> int:
    from muenfast import measure

    reports = []
    quiet = arguments.json == "-"
    for subject in dict.fromkeys(subjects):
        policy = measure.POLICY
        if subject == "ring":
            rows = measure.ring_rows(arguments.scale)
            measure.take(rows, arguments.rounds, _step)
        else:
            if subject == "net":
                from muenfast import netmeasure

                policy, session = netmeasure.POLICY, netmeasure.net_rows(arguments.scale)
            elif subject == "disk":
                session = measure.device_rows(arguments.scale)
            else:
                session = measure.blk_rows(arguments.scale, shared=subject == "shm")
            rows = next(session)
            try:
                measure.take(rows, arguments.rounds, _step)
            finally:
                session.close()  # type: ignore[attr-defined]
        _step(1, 1)
        reports.append(measure.report(subject, rows, policy))
        if not quiet:
            _show(reports[-1])
    text = json.dumps(reports, indent=2) + "\n"
    if quiet:
        print(text, end="")
    if "--json" in files:
        _write(files["--json"], text)
    if "--plot" in files:
        _write(files["--plot"], measure.plot(reports))
    return 0


def _write(file: IO[str], text: str) -> None:
    try:
        if os.path.isfile(file.name):
            file.truncate(0)
        file.write(text)
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _opened(stack: ExitStack, option: str, path: str) -> IO[str]:
    """Opened now, not after minutes of measuring; what stands in it stays until there is something better. A file that was
    made goes again if it gets nothing. Raises UsageError."""
    new = not os.path.lexists(path)
    try:
        file = stack.enter_context(open(path, "a", encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"no file can be written there: {error.strerror}", option=option, value=path,
                         hint="name a file in a directory that exists and may be written") from error

    def clean() -> None:
        if new and os.fstat(file.fileno()).st_size == 0:
            os.unlink(path)

    stack.callback(clean)
    return file


def _step(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K" if done == total else f"\r{done}/{total}", end="", file=sys.stderr, flush=True)


def _show(report: dict[str, object]) -> None:
    from muenfast import measure

    rows = report["rows"]
    assert isinstance(rows, list)
    environment = report["environment"]
    assert isinstance(environment, dict)
    print(f"{report['benchmark']}: {environment['cpu']}, {environment['cpus']} CPUs; {environment['policy']}")
    for row in rows:
        if row["missing"] is not None:
            print(f"  {row['name']:<50}missing: {row['missing']}")
            continue
        figure = (f"{row['median']:12.1f} {row['unit']}" if row["unit"] in measure.WHOLE
                  else f"{row['median'] / 1e3:12.1f} k{row['unit']}")
        # Of what is to be small, the other one's figure by ours: more is better, as everywhere.
        of = "times as good as" if row["unit"] in measure.UNITS else "of"
        against = ", ".join(f"{ratio:5.2f} {of} {limit}" for ratio, limit in measure.ratios(row))
        notes = "; ".join(f"{name} {note['median']:.0f}" for name, note in row["notes"].items())
        print(f"  {row['name']:<50}{figure:<26}  {against}{f' ({notes})' if notes else ''}".rstrip())
