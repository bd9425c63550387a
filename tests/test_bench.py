"""muenfast bench: what it prints and writes. No figure is judged."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import run

from muenfast import benchreport, measure, peermeasure, startmeasure
from muenfast.cli import bench


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
                assert row["ratio"] == pytest.approx(1 / expected if row["unit"] in benchreport.LESS else expected)
    bars = [each for each in ElementTree.parse(tmp_path / "b.svg").iter("{http://www.w3.org/2000/svg}rect")
            if each.get("class") == "bar"]
    assert len(bars) == sum(row["ratio"] is not None for report in reports for row in report["rows"])
    names = {row["name"] for report in reports for row in report["rows"]}
    for said in ("Python 64 B one by one", "Python 4120 B batch 64", "publish 64 B", "asleep, p99",
                 "device, write 4 KiB depth 32", "idle server, CPU", "idle client with device, CPU", "memory of a client"):
        assert any(said in name for name in names), said
    for place in ("/dev/shm", "/dev"):  # of another one that runs now nothing is said
        found = [name for name in os.listdir(place) if (match := re.match(r"(muen)?bench-(\d+)", name))
                 and not os.path.exists(f"/proc/{match[2]}")]
        assert not found, place


@pytest.mark.stress
def test_start_and_wake_have_their_rows(tmp_path: Path) -> None:
    """Times to `ready`, memory, idle CPU and throughput by exports; no batch costs more than a wake-up."""
    done = run("bench", "start", "wake", "--rounds", "1", "--scale", "0.01", "--json", f"{tmp_path}/b.json", timeout=120)
    assert done.returncode == 0, done.stderr
    start, wake = json.loads((tmp_path / "b.json").read_text())
    rows = {row["name"]: row for row in start["rows"]}
    assert {"import muenfast", "muenfast --help", "python -c pass"} <= rows.keys()
    for count in (1, 8):
        for what in ("command to ready", "memory of each", "one in use, 4 KiB reads", "all in use, 4 KiB reads of each"):
            row = rows[f"exports: {what}, {count}"]
            assert row["median"] > 0 and row["at"] == {"exports": count}
        assert rows[f"exports: idle CPU, {count}"]["median"] >= 0
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        assert rows["interfaces: idle CPU, 1"]["missing"]
    else:
        assert rows["interfaces: command to ready, 1"]["median"] > 0
    woken = [row for row in wake["rows"] if row["unit"] == "per batch"]
    assert len(woken) == 10 and all(0 <= row["median"] <= 1 for row in woken)
    asleep = next(row for row in wake["rows"] if row["name"].endswith("both asleep, median"))
    assert asleep["limit"] == "futex round trip, median" and {"p90", "p99", "p99.9"} < asleep["notes"].keys()
    assert asleep["notes"][measure.CPU]["median"] > 0
    assert {"governor", "mitigations", "flags", "compiler", "command", "memory", "muenfast"} <= wake["environment"].keys()


def test_what_cannot_be_had_is_missing_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a peer the command that installs it; muenfast's rows are there. Without root interfaces say so."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    session = peermeasure.session("nbd", 0.02)
    rows = next(session)
    measure.take(rows, 1, lambda done, total: None)
    session.close()  # type: ignore[attr-defined]
    for row in rows:
        if row.kind == "peer" or "null engine" in row.name:
            assert row.missing and "apt-get install" in row.missing and "fio" in row.missing and not row.samples
        else:
            assert row.missing is None and row.samples[0] > 0
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert startmeasure._no_interfaces() is not None


def test_all_goes_on_where_a_subject_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name it is an error."""
    def none(scale: float) -> Iterator[list[measure.Row]]:
        raise measure.UsageError("no way here", hint="run it as root")
        yield []

    ready = measure.Row("a", "ms", lambda: 1.0)
    monkeypatch.setattr(bench, "_sessions", lambda subject, scale: iter(
        [(subject, "spins", none(scale) if subject == "net" else iter_of(ready))]))
    reports = bench._measured(["all"], 1, 1.0, True)
    assert [report["benchmark"] for report in reports] == list(bench.SUBJECTS)
    [row] = reports[bench.SUBJECTS.index("net")]["rows"]
    assert row["missing"] == "no way here (run it as root)" and row["samples"] == []
    with pytest.raises(measure.UsageError):
        bench._measured(["net"], 1, 1.0, True)


def iter_of(row: measure.Row) -> Iterator[list[measure.Row]]:
    yield [measure.Row(row.name, row.unit, row.sample)]


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
