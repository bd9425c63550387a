"""The models in tests/model and the tests of tools/litmus.py: they name what is in the sources and in
docs/memory-model.md, and spin verifies a part of what `make model` does."""

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


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module      # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> ModuleType:
    return tool("model")


@pytest.fixture(scope="module")
def litmus() -> ModuleType:
    return tool("litmus")


def test_models_name_what_there_is(model: ModuleType) -> None:
    """Functions in the sources, fences in docs/memory-model.md, and no removal that no model knows."""
    sources = "".join(path.read_text() for name in ("_ring.pyx", "_blk.pyx", "_atomics.h")
                      for path in [ROOT / "src/muenfast" / name])
    memory = (ROOT / "docs/memory-model.md").read_text()
    found = set()
    for path in (MODELS / "ring.pml", MODELS / "bell.pml"):
        text = path.read_text()
        found |= set(re.findall(r"^(\w+):", text, re.MULTILINE))
        found |= set(re.findall(r"^inline ((?:reader|server|bell|futex_wake|any)_\w+|ring)\(", text, re.MULTILINE))
        for fence in re.findall(r"^#ifdef NO_([FSL]\d)$", text, re.MULTILINE):
            assert f"**{fence}**" in memory or f"**{fence}" in memory or f"{fence} " in memory, fence
        known = set(re.findall(r"\b(?:NO|REACH)_\w+|SWAPPED|PEEK_FORGETS|DRAIN_TWICE|LATE_SEQ|KICK_SWAPPED", text))
        used = {name for run in model.RUNS if run.model == path.stem for name in run.defines if "=" not in name}
        assert {name for name in known if name not in ("NO_DATA", "NO_READY_ACQUIRE") and name not in used} == set()
    names = found - OWN
    assert {"writer_start", "writer_reserve", "reader_peek", "reader_intact", "server_life", "ring"} <= names
    for name in sorted(names):
        assert re.search(rf"\b{name}\(", sources), name


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "sizes"), [
    ("ring: two lives", {"LIVES": 2, "PUTS": 1, "CALLS": 1}), ("bell", {"OPS": 1, "WAITS": 2}),
    ("ring NO_F1", {}), ("server NO_SERVER_GONE", {}), ("bell NO_F5", {}), ("reach ring OVERRUN", {}),
])
def test_spin_finds_what_it_has_to(model: ModuleType, name: str, sizes: dict[str, int]) -> None:
    """`make test` installs spin: where it is missing this fails."""
    assert shutil.which("spin"), "there is no spin: apt-get install spin"
    [run] = [run for run in model.RUNS if run.name == name]
    defines = tuple(f"{key}={value}" for key, value in sizes.items()) + tuple(
        word for word in run.defines if word.partition("=")[0] not in sizes)
    run = model.Run(run.name, run.model, defines, run.fails, run.spare)
    result = model.verify(run, False)
    good, line = model.judge(run, result)
    assert good, line
    assert result.steps or not run.fails


def test_litmus_tests_have_every_pair(litmus: ModuleType) -> None:
    """Each fence and ordering that docs/memory-model.md names in bold can be removed from one of them."""
    named = set(re.findall(r"\*\*([FSL]\d+)\b", (ROOT / "docs/memory-model.md").read_text()))
    removable = {name for test in litmus.TESTS for name in test.removals()}
    assert named <= removable
    for test in litmus.TESTS:
        assert set(test.spare or ()) <= set(test.removals()), test.name


def test_a_litmus_test_is_what_the_compiler_makes(litmus: ModuleType) -> None:
    """Text written by hand, for herd7."""
    [kick] = [test for test in litmus.TESTS if test.name == "kick"]
    assert litmus.as_c(kick, "F5") == """\
C kick
{ seq=0; waiters=1; wc=1; }
P0 (atomic_int* seq, atomic_int* waiters, atomic_int* wc) {
  int x3 = atomic_exchange_explicit(waiters, 0, memory_order_acq_rel);
  int x4 = atomic_fetch_add_explicit(seq, 1, memory_order_acq_rel);
  atomic_store_explicit(wc, 2, memory_order_release);
  int r0 = atomic_load_explicit(waiters, memory_order_relaxed);
}
P1 (atomic_int* seq, atomic_int* waiters, atomic_int* wc) {
  int r0 = atomic_load_explicit(seq, memory_order_acquire);
  atomic_store_explicit(waiters, 1, memory_order_relaxed);
  atomic_thread_fence(memory_order_seq_cst);
  int r1 = atomic_load_explicit(wc, memory_order_relaxed);
}
exists (1:r0=1 /\\ 1:r1=1 /\\ 0:r0=0)
"""
    rows = litmus.as_arm64(kick, "seq_acquire").splitlines()[3:9]
    assert [row.split("|")[1].split(";")[0].split() for row in rows] == [
        ["LDR", "W0,[X20]"], ["MOV", "W1,#1"], ["STR", "W1,[X21]"], ["DMB", "ISH"], ["LDR", "W2,[X22]"], []]
