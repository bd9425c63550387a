"""usage: tools/coverage.py [pytest's options and tests]

Builds the package with line tracing and gcov in a copy of the tree (build/coverage/tree), runs the tests on it, and
prints how many lines of each file they reach: .py and .pyx by coverage.py and Cython's plugin, the headers by gcov.
Exit status 1 where a test fails or a part of muenfast is missing from the figures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "coverage"
TREE = PLACE / "tree"
TESTS = [f"tests/test_{name}.py" for name in (
    "wire", "params", "shm", "ring", "ring_hostile", "ring_model", "blk_server", "blk_client", "blk_group",
    "buffer_client")]
# A signal that arrives while the tracer runs inside a wait without the GIL has its exception swallowed there by
# Cython's tracing: the wait, rightly endless, goes on. For the same reason timeouts are a thread's, not a signal's. And a
# handler runs where there is no Python otherwise. A turn that is traced takes so long that its server leaves the others.
EXCLUDED = [f"--deselect=tests/test_{name}" for name in (
    "ring.py::test_a_signal_ends_a_wait_without_end",
    "ring.py::test_a_signal_handler_that_returns_does_not_end_a_wait",
    "blk_client.py::test_ctrl_c", "buffer_client.py::test_ctrl_c",      # what begins so
    "blk_client.py::test_a_signal_handler_that_closes_the_device",
    "blk_group.py::test_twenty_disks_in_two_threads")]
CONFIG = """
[run]
plugins = Cython.Coverage
core = ctrace
parallel = true
patch = subprocess
data_file = {place}/data
include = {tree}/src/muenfast/*
disable_warnings = no-data-collected
[report]
include = {tree}/src/muenfast/*
"""


def build() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    TREE.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, TREE)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, TREE / name,
                        ignore=shutil.ignore_patterns("*.c", "*.so", "*.egg-info", "__pycache__")
                        if name == "src" else shutil.ignore_patterns("__pycache__"))
    run = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=TREE, text=True,
                         env=os.environ | {"MUENFAST_COVERAGE": "1", "MUENFAST_SANITIZE": ""},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if run.returncode:
        sys.exit(run.stdout)
    (PLACE / "coveragerc").write_text(CONFIG.format(place=PLACE, tree=TREE))


def headers() -> dict[str, tuple[int, int]]:
    """Lines, and lines reached, of each header: those of all compiled modules that include it."""
    lines: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(TREE.glob("build/**/*.gcda")):
        run = subprocess.run([os.environ.get("GCOV", "gcov"), "--json-format", "--stdout", str(data)], cwd=TREE,
                             capture_output=True, text=True, check=True)
        for document in run.stdout.splitlines():
            for file in json.loads(document)["files"]:
                if file["file"].endswith(".h") and file["file"].startswith("src/muenfast/"):
                    for line in file["lines"]:
                        lines[file["file"]][line["line_number"]] += line["count"]
    return {name: (len(found), sum(count > 0 for count in found.values())) for name, found in sorted(lines.items())}


def coverage(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "coverage", *words, f"--rcfile={PLACE / 'coveragerc'}"], cwd=TREE,
                          env=os.environ | {"PYTHONPATH": str(TREE / "src")}, capture_output=True, text=True, check=False)


def main() -> int:
    words = sys.argv[1:]
    tests = [] if any(word.startswith("tests/") for word in words) else TESTS
    print("building with line tracing and gcov", flush=True)
    build()
    status = subprocess.run(
        [sys.executable, "-m", "coverage", "run", f"--rcfile={PLACE / 'coveragerc'}", "-m", "pytest", "-q",
         "-p", "no:cacheprovider", "-o", "timeout=90", "-o", "timeout_method=thread", *EXCLUDED, *tests, *words], cwd=TREE,
        env=os.environ | {"PYTHONPATH": str(TREE / "src"), "COVERAGE_CORE": "ctrace"}, check=False).returncode
    combined = coverage("combine", "--quiet")
    made = coverage("json", "-o", str(PLACE / "figures.json"), "--quiet")
    if combined.returncode or made.returncode:
        sys.exit(combined.stdout + combined.stderr + made.stdout + made.stderr)
    figures = {
        name: (file["summary"]["num_statements"], file["summary"]["covered_lines"])
        for name, file in json.loads((PLACE / "figures.json").read_text())["files"].items()} | headers()
    figures = {name.removeprefix(f"{TREE}/"): value for name, value in figures.items()}
    print(f"\n{'lines':>6} {'reached':>8}")
    for name, (total, reached) in sorted(figures.items()):
        if total:
            print(f"{total:6} {reached / total:8.1%}  {name}")
    expected = {f"src/muenfast/{name}" for name in (
        "_ring.pyx", "_target.pyx", "_store.pyx", "_user.pyx", "_engine.pyx", "_blk.pyx", "_buffer.pyx",
        "_client.pyx", "_bufclient.pyx",
        "_atomics.h", "_copy.h", "_guard.h")}
    cores = [value for name, value in figures.items() if name.endswith((".pyx", ".h")) and "bench" not in name]
    lines = sum(total for total, _ in cores)
    print(f"{lines:6} {sum(reached for _, reached in cores) / lines:8.1%}  all of the compiled ones, headers too")
    missing = sorted(expected - set(figures))
    if missing and tests:
        print(f"no figures for {', '.join(missing)}")
        return 1
    if status:
        print(f"exit status of the tests {status}: figures may lack what ran")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
