"""muenfast bench: what it prints and writes. No figure is judged."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import run

from muenfast import measure


@pytest.mark.stress
def test_bench_writes_every_sample_its_limit_and_the_environment(tmp_path: Path) -> None:
    """JSON holds all samples and the conditions, ratios are those within a round, the plot is drawn from it."""
    done = run("bench", "ring", "blk", "shm", "disk", "--rounds", "1", "--scale", "0.02", "--json", f"{tmp_path}/b.json",
               "--plot", f"{tmp_path}/b.svg", timeout=240)
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "b.json").read_text())
    assert [report["benchmark"] for report in reports] == ["ring", "blk", "shm", "disk"]
    for report in reports:
        assert {"cpu", "cpus", "kernel", "python", "policy"} <= report["environment"].keys()
        medians = {row["name"]: row["median"] for row in report["rows"]}
        for row in report["rows"]:
            assert len(row["samples"]) == 1
            assert row["median"] > 0 or row["unit"] == "%" or "beyond" in row["name"]
            assert row["name"] in done.stdout
            if row["limit"] is not None:
                expected = row["median"] / medians[row["limit"]]
                assert row["ratio"] == pytest.approx(1 / expected if row["unit"] in measure.UNITS else expected)
    bars = ElementTree.parse(tmp_path / "b.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + sum(row["ratio"] is not None for report in reports for row in report["rows"])
    names = {row["name"] for report in reports for row in report["rows"]}
    for said in ("Python 64 B one by one", "Python 4120 B batch 64", "publish 64 B", "asleep, p99",
                 "device, write 4 KiB depth 32", "idle server, CPU", "idle client with device, CPU", "memory of a client"):
        assert any(said in name for name in names), said
    for place in ("/dev/shm", "/dev"):  # of another one that runs now nothing is said
        found = [name for name in os.listdir(place) if (match := re.match(r"(muen)?bench-(\d+)", name))
                 and not os.path.exists(f"/proc/{match[2]}")]
        assert not found, place


def test_rows_are_sampled_in_turns() -> None:
    """A disturbance of one moment meets all figures alike."""
    order: list[str] = []

    def sample(name: str) -> float:
        order.append(name)
        return 1.0

    rows = [measure.Row(name, "x/s", lambda name=name: sample(name)) for name in "abc"]
    measure.take(rows, 3, lambda done, total: None)
    assert "".join(order) == "abcabcabc" and all(len(row.samples) == 3 for row in rows)


@pytest.mark.parametrize("words", [("bench", "net2"), ("bench", "ring", "--rounds", "0"), ("bench", "--scale", "0"),
                                   ("bench", "ring", "--json", "/none/b.json"), ("bench", "ring", "--plot", "/tmp"),
                                   ("bench", "ring", "--plot", "-"), ("bench", "ring", "--json", "/proc/none"),
                                   ("bench", "ring", "--json", "/dev/null", "--plot", "/dev/null")])
def test_a_wrong_subject_or_number_is_a_usage_error(words: tuple[str, ...]) -> None:
    """Status 2 and the rule, nothing measured."""
    done = run(*words)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_a_child_that_fails_is_reported() -> None:
    """The measuring process does not wait for one that died."""
    def child() -> None:
        raise ValueError("no")

    with pytest.raises(measure.MuenfastError):
        measure.Pair().run(child, lambda: 1)
