"""The model of docs/scaling.md (bench/scaling.py): it finds the costs behind made-up curves, and it can be wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "bench" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module     # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


COSTS = {"element": 2.0, "byte": 0.03, "hand-over": 30.0, "turn": 50.0, "early byte": 0.2, "request": 300.0,
         "request, both ends": 700.0, "byte, both ends": 0.1, "there and back": 900.0}


def made_up(scaling: Any, **wrong: float) -> list[dict[str, Any]]:
    """A run in which everything comes from COSTS, but that a row whose name is in `wrong` has another figure."""
    rows = []
    for curve in scaling.curves():
        for name, counts in curve.rows:
            ns = scaling.predicted(COSTS, counts) * wrong.get(name, 1.0)
            rows.append({"name": name, "unit": "operations/s" if curve.rate else "ns",
                         "samples": [1e9 / ns * part if curve.rate else ns / part for part in (0.5, 1.0, 0.9)]})
    for name, ns in (("cache line round trip", 80.0), ("futex round trip", 40_000.0),
                     ("ring round trip 64 B, both asleep", 40_125.6 * wrong.get("asleep", 1.0))):
        rows.append({"name": name, "unit": "ns", "samples": [ns], "notes": {scaling.measure.CPU: {"samples": [9000.0]}}})
    return [{"benchmark": "scaling", "environment": {}, "rows": rows}]


def told(scaling: Any, tmp_path: Path, reports: list[dict[str, Any]], *words: str) -> int:
    (tmp_path / "run.json").write_text(json.dumps(reports))
    return int(scaling.main(["--from", str(tmp_path / "run.json"), *words]))


def test_costs_are_found(scaling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those behind exact curves, whatever is disturbed in the other samples; tables come where the marks are."""
    model = scaling.model_of(made_up(scaling))
    for name, (_, points, fit) in model.fits.items():
        assert fit.costs == pytest.approx({cost: COSTS[cost] for cost in fit.costs}), name
        assert fit.predicted == pytest.approx([point.measured for point in points])
    text = tmp_path / "text.md"
    text.write_text("before\n<!-- bench/scaling.py -->\nold\n<!-- end -->\nafter\n")
    assert told(scaling, tmp_path, made_up(scaling), "--write", str(text)) == 0
    said = text.read_text()
    assert said.startswith("before\n<!-- bench/scaling.py -->\n| cost | ns |") and said.endswith("<!-- end -->\nafter\n")
    assert "old" not in said and capsys.readouterr().out in said


def test_a_point_that_is_off_is_told(scaling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "ring 512 B batch 8"
    assert told(scaling, tmp_path, made_up(scaling, **{name: 2.0})) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"more than 20% off: ring, one element: {name}: -") for line in lines)
    assert told(scaling, tmp_path, made_up(scaling, asleep=1.5)) == 1
    assert "both asleep" in capsys.readouterr().err
    assert told(scaling, tmp_path, made_up(scaling, asleep=1.5), "--limit", "0.5") == 0


def test_no_point_predicts_itself(scaling: Any) -> None:
    """A cost that only one point has could come out as anything."""
    one = scaling.Point("a", {"element": 1.0, "byte": 64.0}, 5.0)
    with pytest.raises(ValueError, match="one point only has the cost 'hand-over'"):
        scaling.fit([one, one, scaling.Point("b", {"element": 1.0, "byte": 1.0, "hand-over": 1.0}, 9.0)])
    points = [scaling.Point(str(size), {"element": 1.0, "byte": size}, 10.0 + size) for size in (1, 10, 100)]
    points[1] = scaling.Point("10", points[1].counts, 1000.0)
    assert scaling.fit(points).predicted[1] == pytest.approx(20.0)


def test_no_cost_is_below_nothing(scaling: Any) -> None:
    costs = scaling.fitted([scaling.Point("", {"element": 1.0, "byte": size}, 100.0 / size) for size in (1, 2, 4, 8)])
    assert costs["byte"] == 0.0 and costs["element"] > 0


def test_a_run_without_a_row_is_refused(scaling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = made_up(scaling)
    reports[0]["rows"] = [row for row in reports[0]["rows"] if row["name"] != "ring 512 B batch 8"]
    assert told(scaling, tmp_path, reports) == 2
    assert "ring, one element: not measured: ring 512 B batch 8" in capsys.readouterr().err
    (tmp_path / "text.md").write_text("no marks")
    assert told(scaling, tmp_path, made_up(scaling), "--write", str(tmp_path / "text.md")) == 2
    assert (tmp_path / "text.md").read_text() == "no marks"


def test_every_row_can_be_had(scaling: Any, tmp_path: Path) -> None:
    """With samples too short to mean anything."""
    reports = scaling.measured(1, 0.001)
    assert {row["name"] for row in reports[0]["rows"]} >= {name for curve in scaling.curves() for name, _ in curve.rows}
    assert len(list(scaling.model_of(reports).errors())) == sum(len(curve.rows) for curve in scaling.curves()) + 1
