"""usage: tools/coverage.py [--keep] [--missing] [pytest's options and tests]

Builds the package for gcov in a copy of the tree and installs it into an environment of its own (build/coverage), runs the
tests on it, all of them where none is named, and prints how many lines of each .pyx, .pxd and .h they reach, in whatever
process. --keep: the build, and what was counted on it before, stays, and is added to; without more words, only the figures.
--missing: which lines were not reached. Exit status 1 where a test fails or less than 95 % of a core's lines are reached.

Lines are those of which there is machine code. What Cython makes of an argument, a type or an error's way out belongs to
the line that asks for it. Inline functions that nobody calls count, too. What is left out stands in LEFT_OUT.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "coverage"
TREE = PLACE / "tree"
COUNTERS = PLACE / "counters"       # what all processes count in: tools/counters.h
PROGRAMS = PLACE / "programs"       # what the tests' own programs of C reach, by gcov's usual ways: tests/helpers.py
PYTHON = PLACE / "venv/bin/python"
THRESHOLD = 0.95
MEASURING = {"_bench.pyx", "_netbench.pyx", "_plain.h"}     # loops of `muenfast bench`: with figures, but no cores
# Files, lines in them that no test can be asked to reach, and why.
LEFT_OUT = [
    (r".*\.pyx", r"raise MemoryError(\(\))?", "there is memory"),
    (r".*/_fuse_uring\.h", r"return -EPROTO;", "libfuse's answer to INIT is as long as the kernel's headers say"),
    (r".*/_guard\.h", r"goto out;|out:", "sigaction() takes SIGBUS")]
_SOURCE = re.compile(rf"^({ROOT}/|build/cython/)?(src/)?muenfast/")
_DIRECTIVE = re.compile(r'#line \d+ "')
_CONSTANTS = re.compile(r"static int __Pyx_InitCachedConstants\(.*\{")


def directives(code: str, name: str) -> str:
    """Cython's C, of a file of that name, in which each #line holds for one line of C: what follows, its utilities, is not
    the .pyx file's next lines. That a module makes the constants of a line as it is imported is not that line reached."""
    lines: list[str] = []
    directive = constants = False
    for line in code.split("\n"):
        constants = _CONSTANTS.match(line) is not None or constants and line != "}"
        found = _DIRECTIVE.match(line) is not None
        lines.append("" if constants and found else line)
        if directive:
            lines.append(f'#line {len(lines) + 2} "{name}"')
        directive = found and not constants
    return "\n".join(lines)


def modules() -> list[str]:
    return sorted(str(path.relative_to(TREE / "src").with_suffix("")).replace("/", ".")
                  for path in (TREE / "src/muenfast").rglob("*.pyx"))


def build() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    for place in (COUNTERS, PROGRAMS, TREE):
        place.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, TREE)
    for name in ("src", "tools"):
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    venv.create(PLACE / "venv", symlinks=True)
    [site] = (PLACE / "venv").glob("lib/*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = os.environ | {"MUENFAST_COVERAGE": str(COUNTERS), "MUENFAST_SANITIZE": ""}
    for step, words in enumerate((["setup.py", "--version"],    # which makes the C
                                  ["-m", "pip", "--disable-pip-version-check", "install", "-v", "--no-build-isolation",
                                   "--no-deps", "--ignore-installed", "."])):
        run = subprocess.run([PYTHON, *words], cwd=TREE, text=True, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, check=False)
        if run.returncode:
            sys.exit(run.stdout)
        if step == 0:
            for path in (TREE / "build/cython").rglob("*.c"):
                path.write_text(directives(path.read_text(), str(path.relative_to(TREE))))
    imported()


def imported(**more: str) -> None:
    """Imports every module, in a process that counts as any other, or (dump) writes down what all have counted."""
    script = "".join(f"import {module}\n" for module in modules())
    run = subprocess.run([PYTHON, "-c", script], cwd=TREE, capture_output=True, text=True, env=os.environ | more,
                         check=False)
    if run.returncode or run.stderr:
        sys.exit(f"{run.stdout}{run.stderr}")


def counted(data: Path) -> Iterator[tuple[str, int, int]]:
    """File, line and how often it was executed, of a .gcda file."""
    run = subprocess.run([os.environ.get("GCOV", "gcov"), "--json-format", "--stdout", str(data)], cwd=TREE,
                         capture_output=True, text=True, check=True)
    for document in run.stdout.splitlines():
        for file in json.loads(document)["files"]:
            name = _SOURCE.sub("src/muenfast/", file["file"])
            if name.startswith("src/muenfast/") and name.endswith((".pyx", ".pxd", ".h")):
                for line in file["lines"]:
                    yield name, line["line_number"], line["count"]


def figures() -> dict[str, dict[int, int]]:
    """How often each line was executed, by file; a header's in all modules that include it, and in the tests' programs,
    where those have no other lines."""
    for data in TREE.glob("build/temp*/**/*.gcda"):
        data.unlink()
    imported(MUENFAST_COUNTERS_DUMP="1")
    lines: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    written = sorted(TREE.glob("build/temp*/**/*.gcda"))
    if len(written) != len(modules()):
        sys.exit(f"counts of {len(written)} modules, not {len(modules())}")
    for data in written:
        for name, number, count in counted(data):
            lines[name][number] += count
    for data in PROGRAMS.glob("*.gcda"):
        for name, number, count in counted(data):
            if number in lines[name]:
                lines[name][number] += count
    return {name: found for name, found in lines.items() if found}


def ranges(numbers: list[int]) -> str:
    """1, 3-5"""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, each)) for each in found)


def left_out(found: dict[str, dict[int, int]]) -> set[tuple[str, int]]:
    """Files and numbers of the lines of LEFT_OUT. Ends where one of those is nowhere."""
    lines = {(name, number): (TREE / name).read_text().splitlines()[number - 1].strip() for name, numbers in found.items()
             for number in numbers}
    out = set()
    for file, line, why in LEFT_OUT:
        these = {key for key, text in lines.items() if re.fullmatch(file, key[0]) and re.fullmatch(line, text)}
        if not these:
            sys.exit(f"LEFT_OUT: there is no such line: {file}, {line} ({why})")
        out |= these
    return out


def main() -> int:
    words = sys.argv[1:]
    keep, missing = "--keep" in words, "--missing" in words
    words = [word for word in words if word not in ("--keep", "--missing")]
    if not keep:
        print("building for gcov", flush=True)
        build()
    status = 0
    if words or not keep:
        # -O0 and counting take time: no test fails for that alone.
        status = subprocess.run([PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600", *words],
                                cwd=ROOT, env=os.environ | {"MUENFAST_COVERAGE_PROGRAMS": str(PROGRAMS)},
                                check=False).returncode
    print(f"\n{'lines':>6} {'reached':>8}")
    total = reached = 0
    below = []
    found = figures()
    out = left_out(found)
    for name, lines in sorted(found.items()):
        lines = {number: value for number, value in lines.items() if (name, number) not in out}
        count = sum(value > 0 for value in lines.values())
        print(f"{len(lines):6} {count / len(lines):8.1%}  {name}")
        if missing and count < len(lines):
            print(f"{'':17}{ranges(sorted(number for number, value in lines.items() if not value))}")
        if Path(name).name not in MEASURING:
            total, reached = total + len(lines), reached + count
            if count < THRESHOLD * len(lines):
                below.append(name)
    print(f"{total:6} {reached / total:8.1%}  all cores ({len(out)} lines left out)")
    if below:
        print(f"below {THRESHOLD:.0%}: {', '.join(below)}")
    if status:
        print(f"exit status of the tests {status}: figures may lack what ran")
    return 1 if status or below else 0


if __name__ == "__main__":
    sys.exit(main())
