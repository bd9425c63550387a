"""The fuzz targets, in short: kept corpora and mutations of them through every parser, by the compiler that there is.

`make attack` explores with libFuzzer and sanitizers; docs/attack.md.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fuzzing
import pytest
from fuzzing import TARGETS, Builder

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(300)  # of which the compiler takes most


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def attack() -> Iterator[ModuleType]:
    """tools/attack.py."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("attack", ROOT / "tools" / "attack.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["attack"] = module  # its dataclasses look for their module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["attack"]
        sys.path[:] = before


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(builder: Builder, name: str) -> None:
    """Neither in what was found to matter, nor in mutations of it, always the same ones: as many of 8000 as a second
    allows, and 256 in any case."""
    kept = len(fuzzing.unpack(fuzzing.corpus(name).read_bytes()))
    if TARGETS[name].python:
        assert kept >= 3 and fuzzing.replay_python(name, 2000, 1, 1.0) == ""
        return
    done = fuzzing.replay(builder.program(name), name, "-n", "8000", "-s", "1", "-t", "1")
    assert done.returncode == 0, done.stderr
    count = re.search(r"(\d+) executions", done.stdout)
    assert count is not None and int(count[1]) >= kept + 256 and kept > 50


def test_each_planted_bug_still_has_its_text(attack: ModuleType) -> None:
    names = [plant.name for plant in attack.PLANTS]
    assert len(names) == len(set(names)) > 10
    for plant in attack.PLANTS:
        assert plant.target in TARGETS, plant.name
        if plant.file:
            assert (ROOT / "src/muenfast" / plant.file).read_text().count(plant.old) == 1, plant.name
            continue
        path, text = attack.mutants.mutated(ROOT, plant.mutation)
        assert text != path.read_text(), plant.name


@pytest.mark.parametrize(
    "name", ["coalesce: a checksum is verified", "frame: the packet's own length", "broker: a text as a whole"]
)
def test_a_planted_bug_is_noticed(
    attack: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make attack ARGS=--plants` has all of them."""
    monkeypatch.setattr(attack, "PLACE", tmp_path)
    [plant] = [plant for plant in attack.PLANTS if plant.name == name]
    assert attack.noticed(plant)


def test_the_document_has_the_tables(attack: ModuleType) -> None:
    """And every target has been run, and recorded."""
    text = attack.DOCUMENT.read_text()
    assert attack.documented(text) == text, "tools/attack.py --write"
    assert set(attack.json.loads(attack.RECORD.read_text())) == set(TARGETS)
