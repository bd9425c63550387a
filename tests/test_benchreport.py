"""What becomes of the JSON of `muenfast bench`: verdicts on made-up runs, what a plot draws, tables. Nothing measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import run

from muenfast import benchreport

SVG = "{http://www.w3.org/2000/svg}"


def row(name: str, samples: list[float], unit: str = "blocks/s", **more: Any) -> dict[str, Any]:
    median = sorted(samples)[len(samples) // 2] if samples else None
    return {"name": name, "unit": unit, "samples": samples, "median": median, "limit": None, "ratio": None, "ratios": {},
            "missing": None if samples else "no such tool", "notes": {}, "kind": "product", "at": {}, "line": None, **more}


def report(*rows: dict[str, Any], what: str = "blk") -> dict[str, Any]:
    return {"benchmark": what, "environment": {"cpu": "A CPU", "cpus": 2, "kernel": "6.1", "policy": "spins"},
            "rows": list(rows)}


@pytest.mark.parametrize(("old", "new", "unit", "verdict"), [
    ([100, 101, 99, 100, 100], [120, 121, 119, 120, 120], "blocks/s", "better"),
    ([100, 101, 99, 100, 100], [80, 81, 79, 80, 80], "blocks/s", "worse"),
    ([100, 101, 99, 100, 100], [80, 81, 79, 80, 80], "ns", "better"),
    ([100, 101, 99, 100, 100], [120, 121, 119, 120, 120], "per batch", "worse"),
    ([100, 100, 100, 100, 100], [102, 102, 102, 102, 102], "ns", "same"),           # below 3 %
    ([80, 90, 100, 110, 120], [90, 100, 110, 120, 130], "blocks/s", "same"),        # within the noise
    ([100, 101, 99, 100, 900], [120, 121, 119, 120, 5], "blocks/s", "better"),      # one disturbed sample is no noise
    ([100, 101], [200, 201, 202], "blocks/s", "unsure"),
    ([0, 0, 0], [0, 0, 0], "%", "same"), ([0, 0, 0], [1, 1, 1], "%", "worse")])
def test_verdicts(old: list[float], new: list[float], unit: str, verdict: str) -> None:
    """A median has changed where it differs by more than both spreads, and by 3 %."""
    found = benchreport.compare([report(row("read", old, unit))], [report(row("read", new, unit))])
    assert [each.verdict for each in found.changes] == [verdict]
    assert found.worse == (verdict == "worse") and found.gone == found.added == []


def test_rows_of_one_run_are_listed() -> None:
    """A row that is missing, or counts something else, is not compared."""
    old = report(row("a", [1, 1, 1]), row("b", [1, 1, 1]), row("c", [1, 1, 1]))
    new = report(row("a", [1, 1, 1]), row("b", []), row("c", [1, 1, 1], "ns"), row("d", [2, 2, 2]))
    found = benchreport.compare([old], [new])
    assert [each.name for each in found.changes] == ["blk: a"]
    assert found.gone == ["blk: b", "blk: c"] and found.added == ["blk: c", "blk: d"]


def written(path: Path, *reports: dict[str, Any]) -> str:
    path.write_text(json.dumps(reports))
    return str(path)


def test_the_command_compares_two_files(tmp_path: Path) -> None:
    """Names what has changed, 3 where something is worse, 0 else; nothing is measured."""
    old = written(tmp_path / "old", report(row("read", [100e3] * 3), row("gone", [1] * 3), row("write", [50e3] * 3)))
    new = written(tmp_path / "new", report(row("read", [80e3] * 3), row("added", [1] * 3), row("write", [50e3] * 3)))
    done = run("bench", "--from", new, "--compare", old)
    assert done.returncode == 3 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "worse   blk: read: 100.0 kblocks/s -> 80.0 kblocks/s (-20.0 %, noise 0.0 %)", "gone    blk: gone",
        "new     blk: added", "1 of 2 rows are the same within the noise of both"]
    back = run("bench", "--from", old, "--compare", new)
    assert back.returncode == 0 and back.stdout.startswith("better  blk: read")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"benchmark": "x"}]',
                                  '[{"benchmark": "x", "environment": {}, "rows": [{"name": "a", "unit": "s", "samples": '
                                  '["1"]}]}]'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").write_text(text)
    for option in ("--compare", "--from"):
        done = run("bench", option, str(tmp_path / "bad"))
        assert done.returncode == 2 and option in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [("ring",), ("--rounds", "2"), ("--scale", "1")])
def test_an_old_run_takes_no_options_of_a_new_one(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run("bench", *words, "--from", written(tmp_path / "old", report(row("a", [1]))))
    assert done.returncode == 2 and done.stdout == "" and "--from" in done.stderr


def drawn(*reports: dict[str, Any]) -> ElementTree.Element:
    return ElementTree.fromstring(benchreport.plot(reports))


def panels(root: ElementTree.Element) -> dict[str, tuple[list[str], int]]:
    """Title -> names of its lines, points."""
    found = {}
    for panel in root.iter(f"{SVG}g"):
        if panel.get("class") == "panel":
            texts = [text.text or "" for text in panel.iter(f"{SVG}text")]
            names = [text.text or "" for text in panel.iter(f"{SVG}text") if text.get("font-size") == "10"]
            points = sum(circle.get("r") == "3" for circle in panel.iter(f"{SVG}circle"))
            assert len(list(panel.iter(f"{SVG}polyline"))) == len(names)
            found[texts[0]] = names, points
    return found


def test_a_plot_has_what_was_measured_and_no_more() -> None:
    """Throughput over size, batch and depth, scaling over exports and interfaces, percentiles, ratios."""
    ring = report(*(row(f"ring {size} B batch {batch}", [1e6, 2e6, 3e6], "elements/s", at={"bytes": size, "batch": batch},
                        line="ring") for size in (64, 4120) for batch in (1, 8)),
                  row("alone", [1.0], at={"bytes": 64}, line="alone"),
                  row("trip, p99", [900.0], "ns", notes={"p50": {"median": 300.0}, "p90": {"median": 500.0}}),
                  row("missing", [], at={"bytes": 4120}, line="alone"), what="ring")
    disks = report(*(row(f"read {depth}", [5e4], at={"depth": depth}, line="read") for depth in (1, 8, 32)))
    start = report(*(row(f"idle {count}", [value], "%", at={"exports": count}, line="idle CPU")
                     for count, value in ((1, 0.0), (8, 0.5))),
                   *(row(f"ready {count}", [100.0], "ms", at={"interfaces": count}, line="ready") for count in (1, 8)),
                   what="start")
    assert panels(drawn(ring, disks, start)) == {
        "ring: throughput over size": (["ring batch 1", "ring batch 8"], 4),
        "ring: throughput over batch": (["ring bytes 64", "ring bytes 4120"], 4),
        "blk: throughput over depth": (["read"], 3), "start: scaling over exports": (["idle CPU"], 2),
        "start: scaling over interfaces": (["ready"], 2), "ring: round trips, percentiles": (["trip"], 3)}


def test_a_plot_is_legible_on_dark_and_light_and_has_every_ratio() -> None:
    """The paper is drawn, and its colour goes with the reader's; names are escaped."""
    root = drawn(report(row("a <b>", [1.0], ratios={"c & d": 0.5, "e": None}), row("f", [], ratios={"e": 2.0})))
    assert "prefers-color-scheme: dark" in (root.find(f"{SVG}style").text or "")  # type: ignore[union-attr]
    assert [rect.get("class") for rect in root.iter(f"{SVG}rect")] == ["paper", "bar"]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "blk: a <b>" in texts and "0.50 of c & d" in texts
    assert panels(drawn(report())) == {} and panels(drawn()) == {}


def test_tables_go_between_their_marks(tmp_path: Path) -> None:
    """What stands elsewhere stays, as does the table of what was not measured; a second time changes nothing."""
    text = "head\n<!-- bench blk -->\nold\n<!-- /bench -->\nmiddle\n<!-- bench net -->\nkept\n<!-- /bench -->\nend\n"
    page = tmp_path / "page.md"
    page.write_text(text)
    source = written(tmp_path / "run", report(row("read", [1e5, 2e5, 3e5], ratios={"memcpy": 0.5}), row("write", [])))
    for _ in range(2):
        done = run("bench", "--from", source, "--tables", str(page))
        assert done.returncode == 0, done.stderr
        found = page.read_text()
        assert found.startswith("head\n<!-- bench blk -->\nA CPU, 2 CPUs, Linux 6.1, medians of 3.\n\n| row |")
        assert ("| read | 200.0 kblocks/s | 50 % | 0.50 of memcpy |\n| write | missing: no such tool | | |\n<!-- /bench -->"
                in found)
        assert found.endswith("<!-- /bench -->\nmiddle\n<!-- bench net -->\nkept\n<!-- /bench -->\nend\n")
    page.write_text("no marks")
    done = run("bench", "--from", source, "--tables", str(page))
    assert done.returncode == 2 and "--tables" in done.stderr and page.read_text() == "no marks"
