"""usage: tools/litmus.py [--show] [--herd7 PROGRAM] [--markdown] [NAME ...]

The pairs of docs/memory-model.md as litmus tests, judged by herd7 under two models: RC11 (the C as it is written) and
AArch64 (what an arm64 compiler makes of it: DMB ISH, DMB ISHLD, STLR, LDAPR, SWPAL, LDADDAL). As it is, no test may
have its bad outcome under either; with one fence or ordering removed each must have it under at least one, but for
those that are said to be spare, with the reason. NAME: only tests with that in their names. --show prints the tests
themselves. Exit status 1 where herd7 says otherwise, 2 where there is none.

Beside tests/test_memory_model.py, which runs the C that is built, this has what that machine leaves out: a store that
overtakes an older load of its thread, and stores to one word that take effect against their order.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

LIMIT = 120     # seconds of one test under one model
MODELS = ("RC11", "AArch64")


@dataclass(frozen=True)
class Test:
    """Threads of accesses and fences, one a line, and the outcome that must not be.

    `W word value`, `R word register`, `X word value` (exchange), `A word value` (add), `F`, each with .rel, .acq,
    .acq_rel or .sc behind the letter, and with `# NAME` at its end where it has a name by which it can be removed: a
    fence goes, an access becomes relaxed. Words are 0 in the beginning but for those in `first`.
    """

    name: str
    what: str
    threads: tuple[str, ...]
    bad: str
    first: str = ""
    spare: dict[str, str] | None = None     # removal: why it has no bad outcome

    def parsed(self, removed: str) -> list[list[tuple[str, str, tuple[str, ...]]]]:
        """Operation, order and operands of each line that is left."""
        result = []
        for text in self.threads:
            lines = []
            for line in filter(None, map(str.strip, re.split(r"[;\n]", text))):
                code, _, name = line.partition("#")
                what, *operands = code.split()
                letter, _, order = what.partition(".")
                if removed and name.strip() == removed:
                    if letter == "F":
                        continue
                    order = ""
                lines.append((letter, order, tuple(operands)))
            result.append(lines)
        return result

    def removals(self) -> list[str]:
        found = re.findall(r"#\s*(\w+'?)", "\n".join(self.threads))
        return list(dict.fromkeys(found))

    def words(self) -> list[str]:
        return sorted({operands[0] for thread in self.parsed("") for letter, _, operands in thread if letter != "F"})

    def values(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\w+)", self.first))


ORDERS = {"": "relaxed", "rel": "release", "acq": "acquire", "acq_rel": "acq_rel", "sc": "seq_cst"}


def as_c(test: Test, removed: str) -> str:
    """For RC11."""
    first = test.values()
    words = test.words()
    lines = ["C " + test.name, "{ " + " ".join(f"{word}={first.get(word, '0')};" for word in words) + " }"]
    for number, thread in enumerate(test.parsed(removed)):
        lines.append(f"P{number} (" + ", ".join(f"atomic_int* {word}" for word in words) + ") {")
        for letter, order, operands in thread:
            memory = f"memory_order_{ORDERS[order]}"
            match letter:
                case "F":
                    lines.append(f"  atomic_thread_fence({memory});")
                case "W":
                    lines.append(f"  atomic_store_explicit({operands[0]}, {operands[1]}, {memory});")
                case "R":
                    lines.append(f"  int {operands[1]} = atomic_load_explicit({operands[0]}, {memory});")
                case "X" | "A":
                    what = "exchange" if letter == "X" else "fetch_add"
                    lines.append(f"  int x{len(lines)} = "
                                 f"atomic_{what}_explicit({operands[0]}, {operands[1]}, {memory});")
        lines.append("}")
    return "\n".join([*lines, f"exists ({test.bad})", ""])


def as_arm64(test: Test, removed: str) -> str:
    """For AArch64. Acquire loads are LDAPR, the weakest that a compiler may take."""
    first, words, threads = test.values(), test.words(), test.parsed(removed)
    begin = [f"{word}={first.get(word, '0')};" for word in words]
    columns, bad = [], test.bad
    for number, thread in enumerate(threads):
        begin += [f"{number}:X{20 + words.index(word)}={word};" for word in words]
        column, registers = [], 0
        for letter, order, operands in thread:
            at = f"[X{20 + words.index(operands[0])}]" if operands else ""
            match letter:
                case "F":
                    column.append("DMB ISHLD" if order == "acq" else "DMB ISH")
                case "W":
                    column += [f"MOV W{registers},#{operands[1]}", f"{'STLR' if order else 'STR'} W{registers},{at}"]
                case "R":
                    bad = re.sub(rf"\b{number}:{operands[1]}\b", f"{number}:X{registers}", bad)
                    column.append(f"{'LDAPR' if order else 'LDR'} W{registers},{at}")
                case "X" | "A":
                    column.append(f"MOV W{registers},#{operands[1]}")
                    registers += 1
                    name = "SWP" if letter == "X" else "LDADD"
                    column.append(f"{name}{'AL' if order else ''} W{registers - 1},W{registers},{at}")
            registers += 1 if letter != "F" else 0
        columns.append(column)
    height = max(map(len, columns))
    rows = [[f"P{number}" for number in range(len(columns))]]
    rows += [[column[row] if row < len(column) else "" for column in columns] for row in range(height)]
    width = max(len(cell) for row in rows for cell in row)
    program = "\n".join(" " + " | ".join(cell.ljust(width) for cell in row) + " ;" for row in rows)
    return f"AArch64 {test.name}\n{{ {' '.join(begin)} }}\n{program}\nexists ({bad})\n"


TESTS = (
    Test("publish", "an element below the WC that was loaded is whole",
         ("W slot 1; W.rel wc 1 # S1", "R.acq wc r0 # S1'; R slot r1"), "1:r0=1 /\\ 1:r1=0"),
    Test("overrun", "a copy with a byte of an element that was being written finds it announced",
         ("W wsc 1; F.rel # F1\nW slot 1", "R slot r0; F.acq # F2\nR wsc r1"), "1:r0=1 /\\ 1:r1=0"),
    Test("torn", "two words that are not of one element find it announced",
         ("W wsc 1; F.rel # F1\nW slota 1; W slotb 1; W.rel wc 1", "R slota r0; R slotb r1; F.acq # F2\nR wsc r2"),
         "1:r2=0 /\\ (1:r0=1 \\/ 1:r1=1)"),
    Test("restart", "a copy with a byte of the next life finds that the epoch has moved",
         ("W epoch 0; F.rel # F3\nW slot 9; W.rel epoch 2", "R slot r0; F.acq # F2\nR epoch r1"),
         "1:r0=9 /\\ 1:r1=1", "epoch=1"),
    Test("again", "the same, under the same epoch, finds epoch 0 or WC gone back",
         ("W epoch 0; F.rel # F3\nW slot 9; W wc 0; W.rel epoch 1 # S2",
          "R slot r0; F.acq # F2\nR.acq epoch r1 # intact_acquire\nR wc r2"),
         "1:r0=9 /\\ 1:r1=1 /\\ 1:r2=1", "epoch=1 wc=1"),
    Test("overrun-restart", "a WC of another life comes with its epoch, or the 0 before it",
         ("W epoch 0; F.rel # F3\nW wc 0; W.rel epoch 2; W.rel wc 3 # S1", "R.acq wc r0 # S1'\nR epoch r1"),
         "1:r0=3 /\\ 1:r1=1", "epoch=1 wc=1",
         {"F3": "S1 orders it, too", "S1": "F3 orders it, too"}),
    Test("sync", "geometry is the epoch's",
         ("W epoch 0; F.rel # F3\nW size 8; W.rel epoch 2 # S2",
          "R.acq epoch r0 # L1\nR size r1; F.acq # F4\nR epoch r2"),
         "(1:r0=2 /\\ 1:r1=4) \\/ (1:r0=1 /\\ 1:r1=8 /\\ 1:r2=1)", "epoch=1 size=4"),
    Test("sleep", "who announces a sleep is seen, or sees",
         ("W.rel wc 1; F.sc # F5\nR waiters r0", "W waiters 1; F.sc # F6\nR wc r1"), "0:r0=0 /\\ 1:r1=0"),
    Test("kick", "a sleep that was announced behind a wake-up is not taken back by that",
         ("X.acq_rel waiters 0 # exchange\nA.acq_rel seq 1 # seq\nW.rel wc 2; F.sc # F5\nR waiters r0",
          "R.acq seq r0 # seq_acquire\nW waiters 1; F.sc # F6\nR wc r1"),
         "1:r0=1 /\\ 1:r1=1 /\\ 0:r0=0", "wc=1 waiters=1",
         {"exchange": "the add behind it releases, too", "seq": "F5 is behind it, and the exchange before it acq_rel"}),
    Test("start", "who announces a sleep is seen by a writer that starts, or sees the new epoch",
         ("W ringer 2; W.rel epoch 2 # S2\nF.sc # F5\nR waiters r0", "W waiters 1; F.sc # F6\nR epoch r0"),
         "0:r0=0 /\\ 1:r0=1", "epoch=1 ringer=1", {"S2": "F5 orders it, and the pair is store and load"}),
    Test("issued", "an entry's fields are there before its state, and its answer finds both",
         ("W fields 1; W.rel state 1 # S3", "R.acq state r0 # S3'\nR fields r1"), "1:r0=1 /\\ 1:r1=0"),
    Test("window", "an entry is not filled again before its reaper has done with it",
         ("R fields r0; W.rel tail 1 # tail", "R.acq tail r0 # tail'\nW fields 2"), "0:r0=2 /\\ 1:r0=1", "fields=1"),
    Test("await", "who sleeps until it is done is seen, or sees",
         ("W.rel done 1; F.sc # F7\nR sleepers r0", "W sleepers 1; F.sc # F8\nR.acq done r0"), "0:r0=0 /\\ 1:r0=0"),
    Test("result", "result and payload before the word that says so",
         ("W payload 1; W.rel done 1 # done", "R.acq done r0 # done'\nR payload r1"), "1:r0=1 /\\ 1:r1=0"),
    Test("jobs", "an engine that sleeps is seen by the worker, or sees what is finished",
         ("A.acq_rel finished 1; F.sc # worker\nR waiting r0", "W waiting 1; F.sc # engine\nR.acq finished r0"),
         "0:r0=0 /\\ 1:r0=0"),
    Test("marks", "a child is not taken away from a receiver that has its number",
         ("W.rel turn 1; F.sc # F9\nR entry r0; R child r1; W.rel turn 2 # leave",
          "W entry 0; F.sc # F10\nR.acq turn r0 # settle\nW child 0"),
         "0:r0=1 /\\ 0:r1=0 /\\ (1:r0=0 \\/ 1:r0=2)", "entry=1 child=1"),
)


def outcome(herd7: str, test: Test, removed: str, model: str) -> tuple[bool, str]:
    """Whether the bad outcome is possible, and what herd7 printed. Ends the program where it says nothing."""
    text = as_c(test, removed) if model == "RC11" else as_arm64(test, removed)
    with tempfile.NamedTemporaryFile("w", suffix=".litmus") as file:
        file.write(text)
        file.flush()
        words = [herd7, *(("-model", "rc11.cat") if model == "RC11" else ()), file.name]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT)
    said = re.search(r"^Observation \S+ (Never|Sometimes|Always)", done.stdout, re.MULTILINE)
    if said is None or done.returncode != 0:
        sys.exit(f"{' '.join(words)}: {done.stdout}{done.stderr}\n{text}")
    return said[1] != "Never", done.stdout


def cases(chosen: list[Test]) -> Iterator[tuple[Test, str]]:
    for test in chosen:
        for removed in ("", *test.removals()):
            yield test, removed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/model.md")
    parser.add_argument("--herd7", default="herd7", metavar="PROGRAM")
    arguments = parser.parse_args()
    chosen = [test for test in TESTS if not arguments.names or any(name in test.name for name in arguments.names)]
    if not chosen:
        sys.exit("no test has such a name")
    if arguments.show:
        for test in chosen:
            print(as_c(test, ""), as_arm64(test, ""), sep="\n")
        return 0
    if shutil.which(arguments.herd7) is None:
        print(f"there is no {arguments.herd7}; Debian 14 and later have it (herdtools7), and opam", file=sys.stderr)
        return 2
    began, bad, runs = time.monotonic(), 0, list(cases(chosen))
    with ThreadPoolExecutor(2) as pool:
        found = {(test.name, removed, model): pool.submit(outcome, arguments.herd7, test, removed, model)
                 for test, removed in runs for model in MODELS}
        if arguments.markdown:
            print("| test | removed | " + " | ".join(MODELS) + " |\n|---|---|---|---|")
        for test, removed in runs:
            possible = [found[test.name, removed, model].result()[0] for model in MODELS]
            spare = (test.spare or {}).get(removed)
            good = any(possible) == (removed != "" and spare is None)
            bad += not good
            said = ["possible" if what else "never" for what in possible]
            note = f"spare: {spare}" if spare else ""
            if arguments.markdown:
                what = removed or f"nothing: {test.what}"
                print(f"| {test.name} | {what}{f' ({note})' if note else ''} | {' | '.join(said)} |")
            else:
                print(f"{test.name:16} {removed or 'as it is':16} RC11 {said[0]:9} AArch64 {said[1]:9} "
                      f"{'' if good else 'NOT AS IT HAS TO BE '}{note}".rstrip(), flush=True)
    removals = [removed for _, removed in runs if removed]
    print(f"{len(chosen)} tests, {len(removals)} removals, each under {len(MODELS)} models: "
          f"{bad} not as they have to be, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
