"""The models in tests/model: they name what is in the sources, and spin verifies a part of what `make model` does."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests/model"
# Steps of the models that are no functions of the cores.
OWN = {"again", "sync", "nothing", "answer", "drain", "skip_to", "end_", "end_asleep", "take", "writer", "reader"}


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model", ROOT / "tools/model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module       # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_models_name_what_there_is(model: ModuleType) -> None:
    """Functions in the sources, fences in docs/memory-model.md, and no removal that no model knows."""
    sources = "".join(path.read_text() for name in ("_ring.pyx", "_blk.pyx", "_atomics.h")
                      for path in [ROOT / "src/muenfast" / name])
    memory = (ROOT / "docs/memory-model.md").read_text()
    found = set()
    for path in (MODELS / "ring.pml", MODELS / "bell.pml"):
        text = path.read_text()
        found |= set(re.findall(r"^(\w+):", text, re.MULTILINE)) | set(re.findall(r"^inline ((?:reader|bell|futex_wake|any)_\w+|ring)\(",
                                                                                  text, re.MULTILINE))
        for fence in re.findall(r"^#ifdef NO_([FSL]\d)$", text, re.MULTILINE):
            assert f"**{fence}**" in memory or f"**{fence}" in memory or f"{fence} " in memory, fence
        known = set(re.findall(r"\b(?:NO|REACH)_\w+|SWAPPED|PEEK_FORGETS|DRAIN_TWICE|LATE_SEQ|KICK_SWAPPED", text))
        used = {name for run in model.RUNS if f"{run.model}.pml" == path.name for name in run.defines if "=" not in name}
        assert {name for name in known if name not in ("NO_DATA", "NO_READY_ACQUIRE") and name not in used} == set()
    names = found - OWN
    assert {"writer_start", "writer_reserve", "reader_peek", "reader_intact", "server_intact", "reader_wait", "ring"} <= names
    for name in sorted(names):
        assert re.search(rf"\b{name}\(", sources), name


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "sizes"), [
    ("ring: two lives", {"LIVES": 2, "PUTS": 1, "CALLS": 1}), ("bell", {"OPS": 1, "WAITS": 2}),
    ("ring NO_F1", {}), ("ring NO_S1", {}), ("bell NO_F5", {}), ("reach ring OVERRUN", {}),
])
def test_spin_finds_what_it_has_to(model: ModuleType, name: str, sizes: dict[str, int]) -> None:
    """`make test` installs spin: where it is missing this fails."""
    assert shutil.which("spin"), "there is no spin: apt-get install spin"
    [run] = [run for run in model.RUNS if run.name == name]
    defines = tuple(f"{key}={value}" for key, value in sizes.items()) + tuple(
        word for word in run.defines if word.partition("=")[0] not in sizes)
    run = model.Run(run.name, run.model, defines, run.fails, run.spare)
    good, line = model.judge(run, model.verify(run, False))
    assert good, line
