"""usage: tools/model.py [--list] [--jobs N] [--table FILE] [--trace] [NAME ...]

Verifies tests/model/*.pml with spin: every execution that C11 allows of the ring's and the bell's protocol, for small
sizes. NAME: only runs with that in their names. --table: writes the runs as docs/model.md has them. --trace: prints
what was found access by access.

Three kinds of runs. `complete`: the protocol as it is, which has to be verified exhaustively: nothing wrong, no limit
of depth or memory reached. `reach`: an assertion that something does not happen which the models are about; it has to
fail, or what was verified says nothing. The rest have one fence, ordering or look less and have to fail, but for those
that are said to be spare, with the reason; these have to be verified as the complete ones. What fails has to be a claim
of the models (`/*: what */` beside an assertion), not one of their bounds. Exit status 1 where a run ends otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests" / "model"
MEMORY = 3500       # megabytes
DEPTH = 100_000
LIMIT = 600         # seconds of one run
# Exact storage: -DCOLLAPSE packs states without loss.
COMPILER = ("-DSAFETY", "-DNOREDUCE", "-DCOLLAPSE", f"-DMEMLIM={MEMORY}", "-w")


@dataclass(frozen=True)
class Run:
    """A model, its sizes and removals (-D), and what the checker has to say."""

    name: str
    model: str
    defines: tuple[str, ...] = ()
    fails: bool = True
    spare: str = ""        # why nothing is found without it

    @property
    def kind(self) -> str:
        if not self.fails and not self.spare:
            return "complete"
        return "reach" if self.name.startswith("reach") else "removed"


@dataclass(frozen=True)
class Result:
    """What pan printed."""

    errors: int
    states: int
    depth: int
    seconds: float
    complete: bool          # the search came to its end within its limits
    found: str              # the assertion that failed
    claim: str              # what the model says of it
    steps: tuple[str, ...]  # accesses up to there
    output: str


RING = ("LIVES=2", "PUTS=3", "CALLS=3")         # 2 slots of 2 words
SMALL = ("LIVES=2", "PUTS=2", "CALLS=2")
DEEP = ("LIVES=1", "PUTS=4", "CALLS=3")
SERVER = ("SERVER", "LIVES=2", "PUTS=3", "CALLS=2")
BELL = ("OPS=2", "WAITS=2")
BELLS = ("CHANNELS=2", "OPS=1", "WAITS=2")
PLAIN = ("PLAIN", "OPS=2", "WAITS=2")


def title(model: str, sizes: tuple[str, ...]) -> str:
    return "server" if "SERVER" in sizes else "bells" if "CHANNELS=2" in sizes else model


def removed(model: str, sizes: tuple[str, ...], *names: str) -> Iterator[Run]:
    for name in names:
        yield Run(f"{title(model, sizes)} {name}", model, (*sizes, name))


def spare(model: str, sizes: tuple[str, ...], name: str, reason: str) -> Run:
    return Run(f"{model} {name}", model, (*sizes, name), False, reason)


def reach(model: str, sizes: tuple[str, ...], *names: str) -> Iterator[Run]:
    for name in names:
        yield Run(f"reach {title(model, sizes)} {name}", model, (*sizes, f"REACH_{name}"))


RUNS = [
    Run("ring: two lives", "ring", RING, False),
    Run("ring: three lives", "ring", ("LIVES=3", "PUTS=2", "CALLS=2", "WORDS=1"), False),
    Run("ring: three slots", "ring", ("SLOTS=3", "LIVES=1", "PUTS=5", "CALLS=3", "WORDS=1"), False),
    Run("ring: one life", "ring", DEEP, False),
    Run("ring: side by side", "ring", ("TOGETHER", "LIVES=2", "PUTS=1", "CALLS=2", "WORDS=1"), False),
    Run("server", "ring", SERVER, False),
    Run("bell", "bell", BELL, False),
    Run("bell: two readers", "bell", ("READERS=2", "OPS=1", "WAITS=1"), False),
    Run("bell: two channels", "bell", BELLS, False),
    Run("bell: a writer without one", "bell", PLAIN, False),
    *reach("ring", RING, "OVERRUN", "EPOCH", "RESTART", "BATCH", "STAGE", "SPOILT", "STOP", "SECOND_LOOK", "UNTOLD"),
    *reach("ring", SERVER, "TORN"),
    *reach("bell", BELL, "SLEEP", "WAKE", "COMPARE", "LAST_LOOK"),
    *reach("bell", BELLS, "SLEEP", "WAKE"),
    *removed("ring", RING, "NO_F1", "NO_F2", "NO_F3", "NO_F4", "NO_S1", "NO_S1_ACQUIRE", "NO_S2", "NO_L1", "NO_EPOCH_0",
             "NO_SECOND_LOOK", "NO_WSC", "NO_INTACT_ACQUIRE", "NO_INTACT_EPOCH", "NO_INTACT_WSC", "NO_INTACT_RESTART",
             "NO_INTACT_WC", "NO_PEEK_EPOCH", "NO_PEEK_RESTART", "NO_PEEK_OVERRUN", "NO_RECOVER_EPOCH",
             "NO_OVERRUN_EPOCH", "NO_OVERRUN_RESTART", "NO_DRAIN_EPOCH", "NO_DRAIN_RESTART",
             "NO_STAGE_FIRST", "NO_SETTLED_EPOCH"),
    *removed("ring", DEEP, "NO_WSC_KEPT"),
    # What the code once had: the counters before the epoch, WC loaded twice, WSC alone behind a copy (NO_INTACT_WC).
    *removed("ring", RING, "SWAPPED", "PEEK_FORGETS", "DRAIN_TWICE"),
    *removed("ring", SERVER, "SWAPPED", "NO_F2_SERVER", "NO_SERVER_ACQUIRE", "NO_SERVER_INTACT_WSC",
             "NO_SERVER_GONE", "NO_SERVER_LIFE_EPOCH", "NO_SERVER_LIFE_RESTART", "NO_SERVER_LIFE_WC"),
    spare("ring", SMALL, "NO_PEEK_ACQUIRE",
          "equal to the epoch synchronised with it orders nothing; another one is loaded again"),
    *removed("ring", SMALL, "NO_RECOVER_ACQUIRE"),
    spare("ring", SMALL, "NO_STOP_RELEASE", "what an ended epoch published is S1's"),
    spare("ring", SMALL, "NO_RECOVER_RESTART",
          "reader_overrun looks itself, but for a writer that starts without epoch 0"),
    *removed("bell", BELL, "NO_F5", "NO_F6", "NO_ANNOUNCE", "NO_LAST_LOOK", "NO_COMPARE", "NO_SEQ", "LATE_SEQ",
             "NO_SEQ_ACQUIRE", "NO_EXCHANGE", "KICK_SWAPPED", "NO_WAKE", "NO_RING_PUBLISH", "NO_RING_START",
             "NO_RING_STOP", "NO_READY_EPOCH", "NO_READY_WC"),
    *removed("bell", BELLS, "NO_F5", "NO_F6", "NO_ANNOUNCE", "NO_LAST_LOOK", "NO_COMPARE"),
    *removed("bell", PLAIN, "NO_RINGER"),
    spare("bell", BELL, "NO_READY_ACQUIRE", "F6 is in front of the look that counts; what it finds is looked at again"),
    spare("bell", BELL, "NO_S1", "for waking F5 orders it; NO_S1 of the ring is found"),
    spare("bell", BELL, "NO_S2", "for waking F5 orders it; NO_S2 of the ring is found"),
    spare("bell", BELL, "NO_STOP_RELEASE", "for waking F5 orders it"),
]


def number(pattern: str, output: str) -> float:
    found = re.search(pattern, output)
    return float(found[1]) if found else -1


WORDS = {"ring": {0: "epoch", 1: "size", 2: "WSC", 3: "WC"},
         "bell": {0: "epoch", 1: "WC", 2: "ringer", 3: "waiters", 4: "seq"}}


def access(run: Run, line: str) -> str:
    """One line of what memory.pml prints, with the names that docs/memory-model.md has."""
    found = re.fullmatch(r"\s*(\d+) (loads|stores) word (\d+): (\d+)(?:, (\d+) behind)?\s*", line)
    if not found:
        return ""
    who, what, word, value, behind = int(found[1]), found[2], int(found[3]), int(found[4]), int(found[5] or 0)
    sizes = {key: int(value) for key, value in (define.split("=") for define in run.defines if "=" in define)}
    if run.model == "bell":
        channels = sizes.get("CHANNELS", 1)
        name = WORDS["bell"][word % 5] + (f" {word // 5}" if channels > 1 else "")
        thread = "writer" if who < channels else "reader"
        said = str(value)
    else:
        thread = ("writer", "reader")[who]
        slot, part = divmod(word - 4, sizes.get("WORDS", 2))
        name = WORDS["ring"].get(word) or f"slot {slot} word {part}"
        said = str(value)
        if name == "epoch":
            said = "0" if value % 4 == 0 else f"{value % 4} (life {value // 4})"
        elif word >= 4:
            said = f"{f'element {value % 16 - 1}' if value % 16 else 'zeros'} (life {value // 16})"
    old = f", {behind} older than the newest" if behind else ""
    return f"{thread:6} {name} {':=' if what == 'stores' else '->'} {said}{old}"


def replay(run: Run, place: str) -> tuple[str, tuple[str, ...]]:
    """Which claim the trail that is there breaks, and the accesses on the way."""
    source = MODELS / f"{run.model}.pml"
    words = ("spin", "-t", "-k", f"{run.model}.pml.trail", *(f"-D{name}" for name in run.defines), str(source))
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    claim = ""
    if found := re.search(rf"{run.model}\.pml:(\d+), Error: assertion violated", done.stdout):
        lines = source.read_text().splitlines()
        for line in reversed(lines[max(0, int(found[1]) - 2):int(found[1])]):
            if said := re.search(r"/\*: (.*?) \*/", line):
                claim = said[1]
                break
    return claim, tuple(filter(None, (access(run, line) for line in done.stdout.splitlines())))


def verify(run: Run, optimise: bool | None = None) -> Result:
    """Makes the checker and runs it, in a place of its own. Ends the program where there is none."""
    if optimise is None:
        optimise = run.kind == "complete"
    with tempfile.TemporaryDirectory(prefix="muenfast-model") as place:
        began = time.monotonic()
        for words in (("spin", "-a", *(f"-D{name}" for name in run.defines), str(MODELS / f"{run.model}.pml")),
                      (os.environ.get("CC") or "gcc", "-O2" if optimise else "-O0", *COMPILER, "-o", "pan", "pan.c")):
            done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode != 0 or "Error" in done.stdout:
                sys.exit(f"{run.name}: {' '.join(words)}: {done.stdout}{done.stderr}")
        try:
            output = subprocess.run(["./pan", f"-m{DEPTH}"], cwd=place, capture_output=True, text=True, check=False,
                                    timeout=LIMIT).stdout
        except subprocess.TimeoutExpired:
            output = f"no end within {LIMIT} s"
        seconds = time.monotonic() - began
        claim, steps = replay(run, place) if (Path(place) / f"{run.model}.pml.trail").exists() else ("", ())
    errors = int(number(r"errors: (\d+)", output))
    found = re.search(r"^pan:\d+: (?:assertion violated +)?(.*?) \(at depth \d+\)$", output, re.MULTILINE)
    # Depth, memory, or a search that somehow was given up; bit-state hashing is not compiled in.
    limits = r"max search depth too small|Search not completed|MEMLIM|Bit statespace|hash-compact"
    return Result(errors, int(number(r"(\d+) states, stored", output)), int(number(r"depth reached (\d+)", output)),
                  seconds, errors == 0 and not re.search(limits, output), found[1] if found else "", claim, steps,
                  output)


def judge(run: Run, result: Result) -> tuple[bool, str]:
    """Whether it is as it has to be, and a line that says so."""
    figures = f"{result.states:>9} states, depth {result.depth:>5}, {result.seconds:6.1f} s"
    if run.fails:
        good = result.errors == 1 and result.found != "" and (result.claim != "") == (run.kind == "removed")
        said = f"found: {result.claim}" if good else f"NO CLAIM: {result.found}" if result.found else "NOTHING FOUND"
        if run.kind == "reach":
            said = "reached" if good else "NOT REACHED"
    else:
        good = result.complete
        said = "verified" if good else f"FAILED: {result.found or result.output[-200:]}"
        if run.spare:
            said = f"spare: {run.spare}" if good else said
    return good, f"{run.name:30} | {figures} | {said}"


def table(results: list[tuple[Run, Result]]) -> str:
    """The runs in Markdown: what was verified, what was reached, what each removal leads to."""
    sizes = {run.name: ", ".join(run.defines) for run, _ in results}
    lines = ["| complete | sizes | states | depth | s |", "|---|---|--:|--:|--:|"]
    lines += [f"| {run.name} | {sizes[run.name]} | {result.states:,} | {result.depth} | {result.seconds:.0f} |"
              for run, result in results if run.kind == "complete"]
    reached = [f"{run.name.removeprefix('reach ')} ({result.depth})" for run, result in results if run.kind == "reach"]
    lines += ["", f"Reached, at depth: {', '.join(reached)}.", ""]
    lines += ["| removed | accesses | the counterexample |", "|---|--:|---|"]
    lines += [f"| {run.name} | {len(result.steps)} | {result.claim} |" for run, result in results
              if run.kind == "removed" and not run.spare]
    lines += ["", "| spare | states | why |", "|---|--:|---|"]
    lines += [f"| {run.name} | {result.states:,} | {run.spare} |" for run, result in results if run.spare]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help=f"runs at a time; each may take up to {MEMORY} MB")
    arguments = parser.parse_args()
    chosen = [run for run in RUNS if not arguments.names or any(name in run.name for name in arguments.names)]
    if not chosen:
        sys.exit("no run has such a name")
    if arguments.list:
        for run in chosen:
            print(f"{run.kind:8} {run.name:30} {run.model}.pml {' '.join(run.defines)}")
        return 0
    if shutil.which("spin") is None:
        sys.exit("there is no spin; on Debian: apt-get install spin")
    began, bad, results = time.monotonic(), 0, list[tuple[Run, Result]]()
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        for run, result in zip(chosen, pool.map(verify, chosen), strict=True):
            good, line = judge(run, result)
            bad += not good
            print(line, flush=True)
            if arguments.trace:
                print(*(f"    {step}" for step in result.steps), sep="\n")
            results.append((run, result))
    if arguments.table:
        arguments.table.write_text(table(results))
    kinds = [run.kind for run in chosen]
    print(f"{kinds.count('complete')} complete models, {kinds.count('reach')} reached, "
          f"{kinds.count('removed')} removals, of which {sum(run.spare != '' for run in chosen)} are spare: "
          f"{bad} not as they have to be, "
          f"{time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
