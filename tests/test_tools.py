"""What the tools under tools/ rest on in the sources."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # its dataclasses look for their module
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
