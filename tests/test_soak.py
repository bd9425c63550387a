"""tools/soak.py in short: twenty kills, and that it notices what it is there for."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from muenfast.attach import fuse

TOOL = Path(__file__).resolve().parent.parent / "tools" / "soak.py"
needs_fuse = pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("soak", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)
    spec.loader.exec_module(module)
    yield module


def run(tmp_path: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, TOOL, "--within", "0", *words], capture_output=True, text=True, timeout=170,
                          check=False, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("soak: everything held, nothing was left behind\n")
    return done.stdout


@needs_fuse
@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.stress
def test_twenty_kills(tmp_path: Path) -> None:
    """Of any side at any moment, inline and over a shared buffer, on a file and a named RAM disk."""
    said = run(tmp_path, "--kills", "20", "--episode", "5", "--seed", "5", "--rigs", "raw+shm,ext4,raw-ram,ext4-ram+shm")
    assert re.search(r"seed 5: 2\d times kill -9 \(.*server \d", said)


@needs_fuse
@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.stress
def test_a_ram_disk_is_lost(tmp_path: Path) -> None:
    """I/O errors from the first kill on, never other data, and nothing written to the next server's disk."""
    said = run(tmp_path, "--kills", "4", "--episode", "2", "--seed", "5", "--rigs", "lost,lost+shm")
    assert "2 disks lost" in said


def test_a_block_that_is_not_as_recorded(soak: ModuleType, tmp_path: Path) -> None:
    """Older than what was acknowledged, of the future, another's, torn: each is named; what was in flight may be either."""
    record = soak.Record(tmp_path / "record", 8)
    content = [record.pack(3), record.pack(3), record.pack(3)]
    record.done[3] = 2
    assert record.problem(3, content[1]) is None and record.problem(3, content[2]) is None
    assert "version 1; 2 was acknowledged" in record.problem(3, content[0])
    assert "version 0; 2 was acknowledged" in record.problem(3, bytes(4096))
    assert "version 9" in record.problem(3, struct.pack("<Q", 3 << 32 | 9) * 512)
    assert "block 4" in record.problem(3, struct.pack("<Q", 4 << 32 | 2) * 512)
    assert "torn" in record.problem(3, content[1][:2048] + content[2][2048:])
    with pytest.raises(soak.Failed, match="2 was acknowledged"):
        record.check(lambda length, offset: bytes(8 * 4096))


def test_a_block_of_memory_that_is_half_written(soak: ModuleType, tmp_path: Path) -> None:
    """Words of what was in flight are written anew, where they may be; any other word is a failure there too."""
    record = soak.Record(tmp_path / "record", 8)
    content = [record.pack(3), record.pack(3), record.pack(3)]
    record.done[3] = 2
    written = []

    def disk(block: bytes) -> Callable[[int, int], bytes]:
        return lambda length, offset: bytes(3 * 4096) + block + bytes(4 * 4096)

    half = content[2][:1184] + content[1][1184:]
    with pytest.raises(soak.Failed, match="block 3 is torn: from word 0 version 3 of block 3, from word 148 version 2 of"):
        record.check(disk(half))
    assert record.check(disk(content[1]), lambda *what: written.append(what)) == 0
    assert record.check(disk(half), lambda *what: written.append(what)) == 1
    assert written == [(struct.pack("<Q", 3 << 32 | 4) * 512, 3 * 4096)]
    assert record.done[3] == record.sent[3] == 4
    record.done[3] = 2
    for wrong in (content[0], bytes(4096), struct.pack("<Q", 3 << 32 | 5) * 512, struct.pack("<Q", 4 << 32 | 2) * 512):
        with pytest.raises(soak.Failed, match="block 3 is torn"):
            record.check(disk(content[2][:4088] + wrong[:8]), lambda *what: written.append(what))
    assert len(written) == 1


def test_a_step_that_does_not_end(soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, with where it stands, and no longer waited for."""
    monkeypatch.setattr(soak, "PATIENCE", 0.2)
    with pytest.raises(soak.Failed, match=r"sleep 60 took longer than 0.2 s; it stands in: sleep/\d+ [SR] "):
        soak.run("sleep", "60")
    with pytest.raises(soak.Failed, match="waited 0.2 s for nothing"):
        soak.wait(lambda: False, "nothing", pause=0.01)


def test_files_that_are_not_as_recorded(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was fsynced and has gone, or has other contents; one that was being removed need not be there."""
    monkeypatch.setenv("MUENFAST_RUNTIME_DIR", str(tmp_path / "run"))
    rig = soak.make_rig("ext4", "1 0", tmp_path, 0, soak.Tally())
    directory = tmp_path / "files"
    directory.mkdir()
    for number in (1, 2):
        (directory / f"file{number}").write_bytes(soak.contents(number, 700))
        rig.books.say(f"+ {number} 700")
    rig.books.say("+ 3 1")
    rig.books.say("- 3")
    rig.check_files(directory)
    (directory / "file2").write_bytes(soak.contents(1, 700))
    with pytest.raises(soak.Failed, match="file2 was fsynced, and is another now"):
        rig.check_files(directory)
    (directory / "file2").unlink()
    with pytest.raises(soak.Failed, match="a file that was fsynced, 700 bytes"):
        rig.check_files(directory)
    rig.books.close()
