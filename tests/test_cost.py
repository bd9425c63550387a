"""tools/cost.py: what it makes of callgrind's file, when it fails and what it says then, and the record that is kept."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost", ROOT / "tools/cost.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost"] = module        # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


cost = _loaded()
HERE = cost.Environment("x86_64", "gcc (Debian 12.2.0-14) 12.2.0", "-O2 -fPIC", "2.36", "sse4.2 avx2")
ROWS = {"ring write 64 B, batch 1": 100.0, "ring read 64 B, batch 1": 200.0}


def _counts(environment: object = HERE, **changed: float) -> object:
    return cost.Counts(environment, ROWS | {f"ring {way} 64 B, batch 1": value for way, value in changed.items()},
                       {"valgrind": "valgrind-3.19.0"})


def _part(name: str, total: int) -> str:
    return (f"part: 1\ndesc: Timerange: Basic block 0 - 9\ndesc: Trigger: Client Request: {name}\nevents: Ir\n"
            f"summary: {total}\nfn=(1) main\n0 {total}\ntotals: {total}\n\n")


def test_instructions_of_an_element_are_the_difference() -> None:
    """What is done once per row is in both parts, and what comes before the first in none."""
    text = "".join(("version: 1\n", _part("before", 999999), _part("ring /1", 5000 + 1024 * 7),
                    _part("ring /2", 5000 + 2048 * 7), _part("before", 5), _part("disk, batch 8 /1", 2560),
                    _part("disk, batch 8 /2", 4160), "desc: Trigger: Program termination\ntotals: 12\n"))
    assert cost.parse_dumps(text, 1024) == {"ring": 7.0, "disk, batch 8": 1.56}


@pytest.mark.parametrize("text", [
    "", _part("ring /1", 10), _part("ring /2", 10), _part("ring /1", 10) + _part("ring /2", 10),
    _part("ring /1", 10) + _part("ring /1", 10) + _part("ring /2", 20), _part("ring /1", 0) + _part("before", 7)])
def test_what_callgrind_did_not_count_is_no_row(text: str) -> None:
    with pytest.raises(ValueError):
        cost.parse_dumps(text, 1024)


def test_flags_that_decide_about_the_code() -> None:
    """Neither warnings nor places of this machine stand in the record."""
    words = ["-Wall", "-g", "-O3", "-fwrapv", "-ffile-prefix-map=/build/x=.", "-I/usr/include", "-DNDEBUG", "-fPIC",
             "-std=gnu11", "-march=native", "-O2"]
    assert cost.code_flags(words) == "-O3 -fwrapv -DNDEBUG -fPIC -std=gnu11 -march=native -O2"


@pytest.mark.parametrize("now, status", [(100.0, 0), (103.0, 0), (103.01, 1), (97.0, 0), (96.99, 0)])
def test_three_percent(now: float, status: int) -> None:
    """More fails, and says which row, before, after and how to accept it; less is told, so that it is kept."""
    said, found = cost.judge(_counts(), [], _counts(write=now))
    text = "\n".join(said)
    assert found == status
    if now in (100.0, 103.0, 97.0):
        assert said == ["2 rows, none differs by more than 3%"]
    elif now > 100:
        assert "MORE: ring write 64 B, batch 1: 100.00 -> 103.01 instructions, +3.0%" in text and "1 of 2 rows" in text
    else:
        assert "less: ring write 64 B, batch 1: 100.00 -> 96.99 instructions, -3.0%" in text and "unseen" in text
    assert ("make check-cost ARGS=--write" in text) == (not 97 <= now <= 103)


def test_a_row_that_is_new_or_gone_fails() -> None:
    """Else one that nobody counts any more would pass for good."""
    less = replace(_counts(), rows={"ring read 64 B, batch 1": 200.0})
    for kept, counts, word in ((less, _counts(), "nothing is kept"), (_counts(), less, "was not counted")):
        said, status = cost.judge(kept, [], counts)
        assert status == 1 and word in said[0] and "ring write 64 B, batch 1" in said[0]


@pytest.mark.parametrize("field, other", [
    ("compiler", "gcc 14.2.0"), ("libc", "2.41"), ("cpu", "sse4.2"), ("machine", "aarch64"), ("flags", "-O3")])
def test_another_compiler_is_never_compared(field: str, other: str) -> None:
    """Its counts say nothing, so that it neither passes nor fails as a row does; its record does not replace this one."""
    counts = _counts(replace(HERE, **{field: other}), write=10000.0)
    records = [_counts()]
    assert cost.kept_of(records, counts.environment) is None
    said, status = cost.judge(None, records, counts)
    assert status == 2
    assert f"{field} {other}, kept {getattr(HERE, field)}" in said[1] and "--against" in said[2] and "--write" in said[2]
    both = cost.replaced(records, counts)
    assert both == [_counts(), counts] and cost.parse_record(cost.format_record(both)) == both
    again = replace(counts, rows={"ring read 64 B, batch 1": 1.0})
    assert cost.replaced(both, again) == [_counts(), again]


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"records": [{"rows": []}]}',
    '{"records": [{"environment": {"machine": "x"}, "rows": {}, "tools": {}}]}'])
def test_a_record_that_is_none(text: str, tmp_path: Path) -> None:
    (path := tmp_path / "cost.json").write_text(text)
    with pytest.raises(SystemExit, match="--write"):
        cost.read_record(path)
    assert cost.read_record(tmp_path / "none") == []


def test_what_is_kept_has_every_row() -> None:
    """Of each compiler; a request's instructions grow neither with the batch nor without end."""
    records = cost.read_record()
    assert records and len({each.environment for each in records}) == len(records)
    for each in records:
        assert sorted(each.rows) == sorted(cost.every_row())
        assert all(each.tools.get(tool) for tool in ("cython", "valgrind"))
        assert all(vars(each.environment)[name] for name in ("machine", "compiler", "flags", "libc"))
        assert "/" not in each.environment.flags
        for name, value in each.rows.items():
            assert 1 < value < 20000, name
            row = name.rpartition(", batch ")[0]
            assert value <= each.rows.get(f"{row}, batch 1", value), name


def test_every_row_has_a_program() -> None:
    """Its source, and the module whose C it includes, are there."""
    assert len(set(cost.every_row())) == len(cost.every_row())
    assert {cost.program_of(name) for name in cost.every_row()} == set(cost.PROGRAMS)
    for name, (core, units) in cost.PROGRAMS.items():
        assert (ROOT / f"bench/cost/{name}.c").is_file()
        assert all((ROOT / f"src/muenfast/{module}.pyx").is_file() for module in (core, *units))
