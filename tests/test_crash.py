"""tools/crash.py in short: power that is lost under ext4, in the worst order; and that each lie about a flush is found."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from test_durable import needs_strace

from muenfast.attach import fuse

TOOLS = Path(__file__).resolve().parent.parent / "tools"
needs_devices = [pytest.mark.root, pytest.mark.fuse, pytest.mark.stress,
                 pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOLS / "crash.py", *words], capture_output=True, text=True, timeout=170,
                          check=False, env=os.environ | {"TMPDIR": str(tmp_path)})


class TestPowerLoss:
    pytestmark = needs_devices

    @pytest.mark.parametrize("rig", ["store", "store+shm", "disk", "file-threads+shm"])
    def test_nothing_that_was_fsynced_is_lost(self, tmp_path: Path, rig: str) -> None:
        """In forty states of a load's disk: a store in Python, inline and over a shared buffer; another disk by io_uring; a
        file full of holes by threads. make crash has the rest."""
        done = run(tmp_path, "--rigs", rig, "--fsyncs", "25", "--states", "40", "--seed", "5")
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        said = re.match(rf"crash: {re.escape(rig)}: (\d+) syncs, (\d+) writes, (\d+) trims, (\d+) flushes in \d+ s; "
                        r"(\d+) states", done.stdout)
        assert said is not None, done.stdout
        syncs, writes, trims, flushes, states = map(int, said.groups())
        assert syncs >= 25 and writes > 25 and flushes >= 25 and 35 <= states <= 41
        assert (trims > 0) == (rig == "store+shm")

    @pytest.mark.parametrize(("rig", "plant"), [
        ("store", "flush-skipped"), ("store+shm", "flush-early"), pytest.param("disk", "fdatasync", marks=needs_strace)])
    def test_a_flush_that_is_none_is_noticed(self, tmp_path: Path, rig: str, plant: str) -> None:
        """The control: a disk that answers flushes and does nothing, one that answers them before it did the writes that it
        had answered, and a server whose fdatasync does nothing."""
        kept = str(tmp_path / "kept")
        done = run(tmp_path, "--rigs", rig, "--fsyncs", "25", "--seed", "6", "--plant", plant, "--keep", kept)
        assert (done.returncode, done.stderr) == (1, ""), done.stdout
        assert re.search(r"crash: FAILED: \d+ states are wrong\n$", done.stdout)
        assert (tmp_path / "kept" / f"{rig}.img").stat().st_size == 16 << 20


# ------------------------------------------------------------------ what may be there


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """crash, writelog."""
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("crash", TOOLS / "crash.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "crash", module)
    spec.loader.exec_module(module)
    yield module, sys.modules["writelog"]
    for name in set(sys.modules) & {"soak", "writelog"} - before:
        del sys.modules[name]


def data(value: int, blocks: int = 1) -> bytes:
    return bytes([value]) * (4096 * blocks)


def test_the_log_says_what_was_done_and_when(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """Each entry when its call returns, with how many there were when it began; the disk itself is as any."""
    _, writelog = tools
    disk = writelog.Disk(f"65536+none+{tmp_path / 'log'}")
    disk.open(False)
    place = writelog.Place(tmp_path / "log")
    disk.pwrite(memoryview(data(1, 2)), 4096)
    assert place() == 1
    disk.flush()
    disk.trim(4096, 8192)
    assert place() == 3
    found = bytearray(3 * 4096)
    disk.pread(memoryview(found), 4096)
    assert found == data(1) + bytes(8192)
    place.close()
    disk.close()
    assert writelog.read(tmp_path / "log") == [(writelog.WRITE, 0, 4096, data(1, 2)), (writelog.FLUSH, 1, 0, b""),
                                               (writelog.TRIM, 2, 8192, bytes(4096))]


def test_a_flush_covers_what_ended_before_it_began(tools: tuple[ModuleType, ModuleType]) -> None:
    """Not what ended while it ran; and what is under way may be there."""
    _, writelog = tools
    first, during = writelog.Entry(writelog.WRITE, 0, 0, data(1)), writelog.Entry(writelog.WRITE, 0, 4096, data(2))
    flush, late = writelog.Entry(writelog.FLUSH, 1, 0, b""), writelog.Entry(writelog.WRITE, 2, 8192, data(3))
    replay = writelog.Replay([first, during, flush, late], 4 * 4096)
    assert replay.go(0) == [first, during]
    assert replay.go(2) == [first, during, late] and not any(replay.durable)
    assert replay.go(3) == [during, late]
    assert replay.durable == data(1) + bytes(3 * 4096)
    with pytest.raises(ValueError, match="does not go back"):
        replay.go(2)


def test_states_are_the_worst_of_what_may_be_there(tools: tuple[ModuleType, ModuleType]) -> None:
    """Each kind is what its name says; of few changes every subset is there; a block is whole, more are torn at sectors,
    but for a superblock."""
    _, writelog = tools
    whole = [writelog.Entry(writelog.WRITE, 0, 4096 * i, data(value)) for i, value in ((0, 1), (1, 2), (0, 3))]
    found: dict[str, set[tuple[int, int]]] = {}
    for seed in range(40):
        for kind, pieces in writelog.states(whole, random.Random(seed)):
            content = bytearray(8192)
            for offset, sector in writelog.outcome(content, pieces).items():
                content[offset:offset + 512] = sector
            assert content == data(content[0]) + data(content[4096])
            found.setdefault(kind, set()).add((content[0], content[4096]))
    assert found["none"] == {(0, 0)} and found["all"] == {(3, 2)} and found["reversed"] == {(1, 2)}
    assert found["some"] == {(1, 0), (0, 2), (3, 0), (1, 2), (3, 2)}
    assert found["latest"] == {(3, 0), (3, 2), (1, 2)} and found["one"] == {(1, 0), (0, 2), (3, 0)}
    assert found["all but one"] == {(1, 2), (3, 0), (3, 2)}
    assert found["blocks"] == {(a, b) for a in (0, 1, 3) for b in (0, 2)}
    assert "torn" not in found

    superblock = bytearray(data(5))
    superblock[1080:1082] = b"\x53\xef"
    cuts, halves = set(), set()
    for seed in range(200):
        states = dict(writelog.states([writelog.Entry(writelog.WRITE, 0, 0, data(4) + superblock)], random.Random(seed)))
        sectors = writelog.outcome(bytearray(8192), states["torn"])
        cuts.add(sum(offset < 4096 for offset in sectors))
        halves.add(sum(offset >= 4096 for offset in sectors))
    assert cuts == set(range(9)) and halves == {0, 8}


def test_what_is_not_as_recorded(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """Older than what was durable at that place, younger than what had begun, of somewhere else; a file that is not there,
    or another, from its fsync until its removal."""
    crash, _ = tools
    file = crash.Overwritten("file", 2)
    versions = [file.pack(0, 10), file.pack(0, 20), file.pack(0, 30, zeros=True)]
    other = file.pack(1, 10)
    file.flushed(0, 15, 1)
    file.flushed(0, 25, 2)
    file.flushed(1, 15, 1)
    assert file.problem(15, versions[0] + other) is None and file.problem(24, versions[1] + other) is None
    assert file.problem(20, versions[0][:512] + versions[1][512:] + other) is None
    assert file.problem(30, versions[2] + other) is None
    assert "sector 0 has version 1; 2 was durable, 2 begun" in file.problem(25, versions[0] + other)
    torn = versions[0][:512] + versions[1][512:]
    assert "sector 1 has version 2; 1 was durable, 1 begun" in file.problem(19, torn + other)
    assert "nothing that was written" in file.problem(29, versions[2] + other)
    assert "nothing that was written" in file.problem(25, other * 2)
    assert "4096 bytes" in file.problem(25, other)

    made = crash.Written("made", b"contents", since=5)
    made.until = 9
    assert made.problem(4, tmp_path) is None and made.problem(9, tmp_path) is None
    assert "No such file" in made.problem(5, tmp_path)
    (tmp_path / "made").write_bytes(b"contents")
    assert made.problem(8, tmp_path) is None
    (tmp_path / "made").write_bytes(b"contents, more")
    assert "other ones" in made.problem(8, tmp_path)
    assert crash.Written("made", b"contents", since=5, more=True).problem(8, tmp_path) is None
    (tmp_path / "made").write_bytes(b"content")
    assert "other ones" in made.problem(8, tmp_path)
