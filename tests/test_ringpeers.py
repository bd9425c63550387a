"""The ring beside its peers (ringpeers.py): rows, floors, what is missing. No figure is judged."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from typing import Any

import pytest

from muenfast import MuenfastError, _bench, measure, ringpeers

OWN = {"pyzmq": "zmq", "faster-fifo": "faster_fifo", "iceoryx2": "iceoryx2"}    # package: module


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    find = ringpeers.find_spec
    monkeypatch.setattr(ringpeers, "find_spec", lambda name: None if name in modules else find(name))


def test_what_needs_no_package_is_measured_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row has a figure, its CPU time and no loss; a floor that has no peer is neither met nor missed."""
    without(monkeypatch, *OWN.values())
    before, segments = os.sched_getaffinity(0), set(os.listdir("/dev/shm"))
    rows = ringpeers.ring_peer_rows(0.002)
    measure.take(rows, 1, lambda done, total: None)
    report = measure.report("ring peers", rows, ringpeers.POLICY)
    for row in report["rows"]:
        if row["missing"] is not None:
            assert any(row["missing"] == f"{module} is not installed: pip install {package}"
                       for package, module in OWN.items())
            assert row["median"] is None and row["samples"] == []
            continue
        assert row["median"] > 0
        assert row["name"].startswith("copy") or row["notes"]["CPU ns each"]["median"] > 0
        assert row["notes"]["lost"]["samples"] == [0]
    names = {row["name"] for row in report["rows"] if row["missing"] is None}
    for size in (64, 1522, 4120):
        for kind in ("multiprocessing.Queue", "multiprocessing.Pipe", "posix_ipc", "plain C, tight", "plain C, polite",
                     "bare queue", "copy", "ring from Python, batches of 64", "engine's loop, batch 64, tight"):
            assert any(name.startswith(kind) and name.endswith(f": {size} B") for name in names), (kind, size)
    found = {(floor["row"], floor["limit"]): floor for floor in ringpeers.floors(report)}
    assert len(found) == len(ringpeers.FLOORS)
    for (name, limit), floor in found.items():
        there = limit in names
        assert (floor["ratio"] is not None) == there and (floor["met"] is not None) == there, (name, limit)
        if there:
            assert floor["met"] == (floor["ratio"] >= floor["floor"])
    assert os.sched_getaffinity(0) == before
    assert not {name for name in set(os.listdir("/dev/shm")) - segments if str(os.getpid()) in name}


@pytest.mark.parametrize("peer", [peer for peer in ringpeers.PEERS if peer.module in OWN.values()],
                         ids=lambda peer: peer.name)
def test_a_peer_that_is_there_is_measured(peer: ringpeers.Peer) -> None:
    """Where the dependency group `peers` is installed; else its rows say how."""
    if peer.missing is not None:
        rows = [row for row in ringpeers.ring_peer_rows(0.002) if row.name.startswith(f"{peer.name}: ")]
        assert len(rows) == 3 and all(row.missing == peer.missing and "pip install" in row.missing for row in rows)
        return
    script = ("import sys; from muenfast import measure, ringpeers\n"
              "[row] = [row for row in ringpeers.ring_peer_rows(0.002) if row.name == sys.argv[1]]\n"
              "measure.take([row], 2, lambda done, total: None)\n"
              "print(len(row.samples), min(row.samples) > 0, *row.notes['lost'])")
    # In a program of its own: faster-fifo's memory is multiprocessing's, which keeps it.
    run = subprocess.run([sys.executable, "-c", script, f"{peer.name}: 1522 B"], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["2", "True", "0", "0"], run.stderr


def test_every_floor_is_between_rows_that_exist() -> None:
    """And it is the product that is held against the peer."""
    rows = {row.name: row for row in ringpeers.ring_peer_rows(0.002)}
    for name, limit, floor in ringpeers.FLOORS:
        assert limit in rows and limit in (rows[name].limit, *rows[name].beside) and floor > 0


def report_of(*samples: tuple[str, list[float], bool, tuple[str, ...]]) -> dict[str, Any]:
    rows = [measure.Row(name, "ns" if less else "elements/s", lambda: 0.0, less=less, samples=seen,
                        limit=limits[0] if limits else None, beside=limits[1:]) for name, seen, less, limits in samples]
    return measure.report("ring peers", rows)


def test_a_floor_is_met_or_missed_by_the_median_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of throughput ours by theirs, of times theirs by ours."""
    monkeypatch.setattr(ringpeers, "FLOORS", (("a", "b", 2.0), ("c", "d", 2.0), ("none", "b", 1.0)))
    report = report_of(("a", [30, 10, 30], False, ("b",)), ("b", [10, 10, 20], False, ()),
                       ("c", [10, 10, 10], True, ("d",)), ("d", [25, 20, 10], True, ()))
    [first, second] = ringpeers.floors(report)
    assert (first["ratio"], first["met"]) == (1.5, False) and (second["ratio"], second["met"]) == (2.0, True)


def test_spread_is_that_of_the_samples() -> None:
    """The furthest below and above the median."""
    [row, empty] = report_of(("a", [80, 100, 150], False, ()), ("b", [], False, ()))["rows"]
    assert ringpeers.spread(row) == "-20 +50 %" and ringpeers.spread(empty) == ""


@pytest.mark.parametrize("size", [1, 64, 1522])
def test_plain_c_and_the_engine_speak_the_same_protocol(size: int) -> None:
    """Either one's reader takes all that the other one's writer puts."""
    pair, elements, count = measure.Pair(), 64, 2000
    for plain_writes in (True, False):
        region, words = mmap.mmap(-1, 64 + size * elements), mmap.mmap(-1, 4096)

        def write(region: mmap.mmap = region, words: mmap.mmap = words, plain_writes: bool = plain_writes) -> None:
            if plain_writes:
                _bench.plain_ring_write(region, words, size, 16, count, 0)
            else:
                _bench.ring_write(region, words, size, 16, 16, count, 0)

        def read(region: mmap.mmap = region, words: mmap.mmap = words, plain_writes: bool = plain_writes) -> Any:
            if plain_writes:
                return _bench.ring_read(region, words, size, 16, 16, count, 0)
            return _bench.plain_ring_read(region, words, size, 16, count, 0)

        seconds, lost = pair.run(write, read)
        assert seconds > 0 and lost == 0


def test_a_message_that_is_not_what_was_sent_is_an_error() -> None:
    """A peer's figure is that of messages that came."""
    with pytest.raises(MuenfastError, match="pyzmq"):
        ringpeers._exact(b"x", b"y", "pyzmq")
