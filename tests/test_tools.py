"""What the tools under tools/ rest on in the sources."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)      # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_the_sanitizers_run_what_exercises_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of tests is one of theirs, or left out by name, for a reason."""
    sanitize = tool("sanitize", monkeypatch)
    named = Counter([*sanitize.NAMES, *(name for names in sanitize.LEFT_OUT.values() for name in names)])
    assert named == Counter(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))


def test_every_mutation_still_has_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fence and re-check that `make mutants` removes stands where the table says, and its tests exist."""
    mutants = tool("mutants", monkeypatch)
    names = [mutation.name for mutation in mutants.MUTATIONS]
    assert len(names) > 100 and len(set(names)) == len(names)
    for mutation in mutants.MUTATIONS:
        path, text = mutants.mutated(ROOT, mutation)
        assert text != path.read_text(), mutation.name
        assert mutation.tests or mutation.model or mutation.spare, mutation.name
        for test in mutation.tests:
            assert (ROOT / test.partition("::")[0]).is_file(), (mutation.name, test)


def test_no_test_hides_another_one() -> None:
    """By having its name; ruff looks away there, for fixtures of other files are imported and asked for by name."""
    for path in sorted((ROOT / "tests").glob("**/*.py")):
        tree = ast.parse(path.read_text())
        for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
            names = Counter(node.name for node in scope.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                            if not isinstance(node, ast.FunctionDef) or not node.decorator_list
                            or node.name.startswith("test"))
            assert [name for name, count in names.items() if count > 1] == [], path.name


# In the parent, in a child that leaves by os._exit's way, in one that is killed; and not reached.
COUNTED = """\
#include <signal.h>
#include <sys/wait.h>
static void leave(int how) {
    if (how == 0)
        _exit(0);
    if (how == 1)
        kill(getpid(), SIGKILL);
    if (how == 2)
        abort();
}
int main(void) {
    for (int how = 0; how < 2; how++)
        if (!fork())
            leave(how);
    while (wait(NULL) > 0) ;
    return 0;
}
"""


def test_whatever_way_a_process_ends_what_it_reached_counts(tmp_path: Path) -> None:
    """`make coverage`: counters are shared, and written out by one process that is asked to."""
    (tmp_path / "counted.c").write_text(COUNTED)
    options = ["-O0", "--coverage", "-fno-builtin-fork", "-fdata-sections"]

    def build(*words: str) -> None:
        subprocess.run(["gcc", *options, *words], cwd=tmp_path, check=True)

    build("-include", str(ROOT / "tools/counters.h"), f'-DMUENFAST_COUNTERS="{tmp_path}/counters"', "-c", "counted.c")
    build("-Wl,--wrap=__gcov_exit", f"-Wl,-T,{ROOT}/tools/counters.ld", "-o", "counted", "counted.o")
    (tmp_path / "counters").mkdir()
    for _ in range(2):
        subprocess.run([tmp_path / "counted"], check=True, timeout=60)
    assert list(tmp_path.glob("*.gcda")) == []
    subprocess.run([tmp_path / "counted"], check=True, timeout=60, env={"MUENFAST_COUNTERS_DUMP": "1"})
    done = subprocess.run(["gcov", "--json-format", "--stdout", "counted.gcda"], cwd=tmp_path, capture_output=True,
                          check=True)
    [file] = (each for each in json.loads(done.stdout)["files"] if each["file"] == "counted.c")
    counts = {line["line_number"]: line["count"] for line in file["lines"]}
    assert [counts[number] for number in (5, 7, 9, 16)] == [3, 3, 0, 3]


def test_a_line_directive_of_cythons_holds_for_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And constants that are made at import count for no line."""
    coverage = tool("coverage", monkeypatch)
    code = """\
#line 7 "muenfast/_ring.pyx"
one
utility
static int __Pyx_InitCachedConstants(state *s) {
#line 9 "muenfast/_ring.pyx"
two
}
#line 9 "muenfast/_ring.pyx"
#line 11 "muenfast/_ring.pyx"
three
four"""
    assert coverage.directives(code, "_ring.c") == """\
#line 7 "muenfast/_ring.pyx"
one
#line 4 "_ring.c"
utility
static int __Pyx_InitCachedConstants(state *s) {

two
}
#line 9 "muenfast/_ring.pyx"
#line 11 "muenfast/_ring.pyx"
#line 12 "_ring.c"
three
#line 14 "_ring.c"
four"""
    assert coverage.ranges([1, 3, 4, 5, 9]) == "1, 3-5, 9"
