"""muenfast bench: rings, block I/O and network interfaces, beside what the machine and its peers can do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any

from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast.measure import Row

SUBJECTS = ("ring", "blk", "shm", "disk", "net", "wake", "start", "peers")
WORSE = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, how often, where to put it."""
    parser.add_argument("subject", nargs="*", metavar="|".join((*SUBJECTS, "all")),
                        help="what to measure (default: ring and blk; shm: blk over a shared buffer; disk: a node, as "
                             "root; net: interfaces between two namespaces, beside veth and socat, as root; wake: what "
                             "sleeping and waking costs; start: how long programs take to be there, what many exports "
                             "cost; peers: nbdkit, fio, nbdfuse, the kernel's loop device; all: everything, what cannot be "
                             "had with the reason)")
    parser.add_argument("--rounds", type=int, help="samples of each figure, taken in turns (default: 5)")
    parser.add_argument("--scale", type=float,
                        help="work per sample, of the usual: 0.01 is quick and rough (default: 1)")
    parser.add_argument("--from", dest="source", metavar="FILE",
                        help="measure nothing: take the samples that --json wrote to FILE")
    parser.add_argument("--json", metavar="FILE", help="write all samples and the environment to FILE (-: print)")
    parser.add_argument("--compare", metavar="FILE",
                        help="say what differs from the samples that --json wrote to FILE by more than the noise of both "
                             f"(docs/benchmarks.md); exit status {WORSE} where something is worse")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw the figures over sizes, batches, depths, exports and "
                                                           "interfaces, percentiles, and the ratios")
    parser.add_argument("--tables", metavar="FILE.md",
                        help="put the tables between the marks <!-- bench NAME --> and <!-- /bench --> of FILE")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints figure, limit and ratio of each row."""
    from muenfast import benchreport

    subjects = arguments.subject or ["ring", "blk"]
    for index, subject in enumerate(subjects):
        if subject not in (*SUBJECTS, "all"):
            raise UsageError(f"a subject is one of {', '.join((*SUBJECTS, 'all'))}", option="SUBJECT", index=index,
                             value=subject)
    rounds: int = 5 if arguments.rounds is None else arguments.rounds
    scale: float = 1.0 if arguments.scale is None else arguments.scale
    if not 1 <= rounds <= 1000:
        raise UsageError("rounds are 1 to 1000", option="--rounds", value=rounds)
    if not 0 < scale <= 100:
        raise UsageError("a scale is above 0, at most 100", option="--scale", value=scale)
    for option, value in (("--plot", arguments.plot), ("--tables", arguments.tables)):
        if value == "-":
            raise UsageError("is written to a file", option=option, value=value)
    old = None if arguments.compare is None else benchreport.load(arguments.compare, "--compare")
    known = None
    if arguments.source is not None:
        for option, given in (("SUBJECT", arguments.subject or None), ("--rounds", arguments.rounds),
                              ("--scale", arguments.scale)):
            if given is not None:
                raise UsageError("is of a run, and --from takes one that was", option=option, value=given)
        known = benchreport.load(arguments.source, "--from")
    text = None
    if arguments.tables is not None:
        try:
            with open(arguments.tables, encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", option="--tables", value=arguments.tables) from error
        benchreport.filled(text, [])
    with ExitStack() as stack:
        files = {option: _opened(stack, option, path) for option, path in (("--json", arguments.json),
                 ("--plot", arguments.plot), ("--tables", arguments.tables))
                 if path is not None and (option, path) != ("--json", "-")}
        _apart(files)
        quiet = arguments.json == "-"
        reports = _measured(subjects, rounds, scale, quiet) if known is None else known
        output = json.dumps(reports, indent=2) + "\n"
        if quiet:
            print(output, end="")
        if "--json" in files:
            _write(files["--json"], output)
        if "--plot" in files:
            _write(files["--plot"], benchreport.plot(reports))
        if text is not None:
            _write(files["--tables"], benchreport.filled(text, reports))
        if old is None:
            return 0
        return _compared(old, reports, sys.stderr if quiet else sys.stdout)


def _apart(files: dict[str, IO[str]]) -> None:
    """Raises UsageError where two options name one file."""
    seen: list[tuple[str, IO[str]]] = []
    for option, file in files.items():
        for other, theirs in seen:
            if os.path.sameopenfile(file.fileno(), theirs.fileno()):
                raise UsageError(f"that is the file of {other}", option=option, value=file.name)
        seen.append((option, file))


def _measured(subjects: list[str], rounds: int, scale: float, quiet: bool) -> list[dict[str, Any]]:
    from muenfast import measure

    everything = "all" in subjects
    reports = []
    for subject in SUBJECTS if everything else dict.fromkeys(subjects):
        for name, policy, session in _sessions(subject, scale):
            try:
                try:
                    rows = next(session)
                except UsageError as error:     # of what is asked for by its name that is an error
                    if not everything:
                        raise
                    rows = [measure.missing(f"everything of {name}", str(error))]
                measure.take(rows, rounds, _stepper(name))
                reports.append(measure.report(name, rows, policy))
            finally:
                session.close()  # type: ignore[attr-defined]
            _step(1, 1)
            if not quiet:
                _show(reports[-1])
    return reports


def _sessions(subject: str, scale: float) -> Iterator[tuple[str, str, Iterator[list[Row]]]]:
    """Name, polling policy and rows of each part of a subject; the rows' generators clean up when they are closed."""
    from muenfast import measure

    if subject == "peers":
        from muenfast import peermeasure, ringpeers

        yield "ring peers", ringpeers.POLICY, _at_once(lambda: ringpeers.ring_peer_rows(scale))
        for name in peermeasure.SUBJECTS:
            yield name, peermeasure.POLICY, peermeasure.session(name, max(0.02, 0.5 * scale))
        return
    if subject == "net":
        from muenfast import netmeasure

        yield subject, netmeasure.POLICY, netmeasure.net_rows(scale)
    elif subject == "wake":
        from muenfast import wakemeasure

        yield subject, wakemeasure.POLICY, wakemeasure.wake_rows(scale)
    elif subject == "start":
        from muenfast import startmeasure

        yield subject, startmeasure.POLICY, startmeasure.start_rows(scale)
    elif subject == "disk":
        yield subject, measure.POLICY, measure.device_rows(scale)
    elif subject == "ring":
        yield subject, measure.POLICY, _at_once(lambda: measure.ring_rows(scale))
    else:
        yield subject, measure.POLICY, measure.blk_rows(scale, shared=subject == "shm")


def _at_once(rows: Callable[[], list[Row]]) -> Iterator[list[Row]]:
    """Rows that leave nothing to clean up."""
    yield rows()


def _compared(old: list[dict[str, Any]], new: list[dict[str, Any]], out: IO[str]) -> int:
    """Says what has changed; the exit status."""
    from muenfast import benchreport

    found = benchreport.compare(old, new)
    for change in found.changes:
        if change.verdict in ("better", "worse"):
            print(f"{change.verdict:<8}{change.name}: {benchreport.figure(change.old, change.unit)} -> "
                  f"{benchreport.figure(change.new, change.unit)} ({100 * change.change:+.1f} %, noise "
                  f"{100 * change.noise:.1f} %)", file=out)
    for word, names in (("gone", found.gone), ("new", found.added),
                        ("unsure", [each.name for each in found.changes if each.verdict == "unsure"])):
        for name in names:
            why = f": fewer than {benchreport.LEAST_SAMPLES} samples" if word == "unsure" else ""
            print(f"{word:<8}{name}{why}", file=out)
    same = sum(each.verdict == "same" for each in found.changes)
    print(f"{same} of {len(found.changes)} rows are the same within the noise of both", file=out)
    return WORSE if found.worse else 0


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


def _stepper(name: str) -> Callable[[int, int], None]:
    return lambda done, total: _step(done, total, f"{name} ")


def _step(done: int, total: int, what: str = "") -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K" if done == total else f"\r{what}{done}/{total}", end="", file=sys.stderr, flush=True)


def _show(report: dict[str, Any]) -> None:
    from muenfast import benchreport

    environment = report["environment"]
    print(f"{report['benchmark']}: {environment['cpu']}, {environment['cpus']} CPUs; {environment['policy']}")
    for row in report["rows"]:
        if row["missing"] is not None:
            print(f"  {row['name']:<49} missing: {row['missing']}")
            continue
        figure = (f"{row['median']:12.1f} {row['unit']}" if row["unit"] in benchreport.WHOLE
                  else f"{row['median'] / 1e3:12.1f} k{row['unit']}")
        # Of what is to be small, the other one's figure by ours: more is better, as everywhere.
        of = "times as good as" if row["unit"] in benchreport.LESS else "of"
        against = ", ".join(f"{ratio:5.2f} {of} {limit}" for ratio, limit in benchreport.ratios(row))
        notes = "; ".join(f"{name} {note['median']:.0f}" for name, note in row["notes"].items())
        print(f"  {row['name']:<50}{figure:<26}  {against}{f' ({notes})' if notes else ''}".rstrip())
