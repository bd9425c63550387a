"""--inject: errors, delays, late answers and corrupted data on any export, as asked for and counted."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import eventually
from test_cli import one_line
from test_user import BLOCK, Ram, failing

import muenfast
from muenfast.backing.faults import Fault, faults_from_list
from muenfast.errors import UsageError

Start = Callable[..., Program]


# ------------------------------------------------------------------ the list

@pytest.mark.parametrize(("text", "expected"), [
    ("error", [(Fault("error"),)]),
    ("error=EIO,rate=0.01", [(Fault("error", rate=0.01),)]),
    ("error=ENOSPC,rate=0.5,on=write", [(Fault("error", ("write",), 0.5, errno.ENOSPC),)]),
    ("delay=10ms", [(Fault("delay", delay=0.01),)]),
    ("delay=1.5s", [(Fault("delay", delay=1.5),)]),
    ("delay=500us,on=read/flush", [(Fault("delay", ("read", "flush"), delay=0.0005),)]),
    ("late", [(Fault("late"),)]),
    ("corrupt", [(Fault("corrupt", ("read",)),)]),
    ("error,delay=1s", [(Fault("error"),), (Fault("delay", delay=1.0),)]),
    ("error+delay=1s", [(Fault("error"), Fault("delay", delay=1.0))]),
    ("error=EIO,rate=0.1+delay=1s,rate=1,,corrupt", [
        (Fault("error", rate=0.1), Fault("delay", delay=1.0)), (), (Fault("corrupt", ("read",)),)]),
    ("", [()]),
    (",late", [(), (Fault("late"),)]),
])
def test_lists(text: str, expected: list[tuple[Fault, ...]]) -> None:
    """One entry per export; a modifier belongs to the fault before it."""
    assert faults_from_list("--inject", text) == expected


@pytest.mark.parametrize(("text", "words"), [
    ("eror", "a fault is error"), ("error=5", "named as in errno"), ("error=EBOGUS", "named as in errno"),
    ("error=", "named as in errno"), ("delay", "a delay is a time"), ("delay=10", "with its unit"),
    ("delay=0ms", "above 0"),
    ("delay=7200s", "up to 3600"), ("late=1s", "a fault is"), ("corrupt=1", "a fault is"), ("rate=0.1", "before it"),
    ("error,rate=0", "above 0 and up to 1"), ("error,rate=2", "above 0 and up to 1"),
    ("error,rate=x", "above 0 and up to 1"),
    ("error,rate=nan", "above 0 and up to 1"), ("error,on=fsync", "on= names"), ("error,on=", "on= names"),
    ("corrupt,on=write", "what is read"), ("+".join(["late"] * 9), "up to 8"), ("error+", "a fault is"),
    (",on=read", "before it")])
def test_bad_lists(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        faults_from_list("--inject", text)
    assert caught.value.option == "--inject" and caught.value.index is not None
    assert caught.value.value == text.removeprefix(",")     # as it was written


def test_the_command_line(tmp_path: Path) -> None:
    """As any list: lengths agree, bad entries are named, only the server has it."""
    both = ["--req", f"{unique('a')},{unique('b')}", "--resp", f"{unique('c')},{unique('d')}"]
    for words, expected in ((["--inject", "late,late,late"], "--inject"), (["--inject", "late,x"], "--inject, entry 1 'x'"),
                            (["--client", "--inject", "late"], "--inject: is an option of the server")):
        done = run("blk", *both, *words)
        assert done.returncode == 2 and expected in one_line(done.stderr) and done.stdout == ""


# ------------------------------------------------------------------ what happens

@pytest.fixture(params=["ram", "null", "file", "py"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """What is exported: a text for --device, or an object."""
    if request.param == "py":
        return Ram(256)
    if request.param == "file":
        (tmp_path / "disk").write_bytes(bytes(256 * BLOCK))
        return str(tmp_path / "disk")
    return f"{request.param}:1M"


@pytest.fixture(params=["inline", "buffer"])
def export(request: pytest.FixtureRequest, device: Any) -> Callable[..., Any]:
    """Serves the device: (server, disk)."""
    where = {"req": unique("a"), "resp": unique("c"), "shm": unique("e") if request.param == "buffer" else None}

    def start(inject: str, timeout: float = 1.0) -> tuple[muenfast.BlockServer, Callable[[], muenfast.BlockDevice]]:
        if isinstance(device, str):
            late = "late" in inject
            server = muenfast.BlockServer(muenfast.exports_from_lists(
                where["req"], where["resp"], device=device, buffer=where["shm"], inject=inject,
                timeout=str(timeout) if late else None))
        else:
            server = muenfast.serve(device, **where, inject=inject, timeout=timeout)
        return server, lambda: muenfast.BlockDevice(**where)

    return start


def injected(server: muenfast.BlockServer) -> dict[str, int]:
    found: dict[str, int] = server.status()[0]["injected"]
    return found


def test_errors(export: Callable[..., Any]) -> None:
    """As often as asked, each counted, none tried again; the disk lives on, and nothing else fails."""
    server, client = export("error=ENOSPC,on=write,rate=0.25")
    with server, client() as disk:
        failed = 0
        for number in range(400):
            try:
                disk.pwrite(bytes(BLOCK), number % 256 * BLOCK)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failed += 1
        assert 40 < failed < 180        # 100 expected; 7 standard deviations
        assert injected(server) == {"error": failed, "delay": 0, "late": 0, "corrupt": 0}
        assert server.status()[0]["counters"]["failed"] == failed
        for number in range(256):
            disk.pread(BLOCK, number * BLOCK)
        disk.flush()


def test_an_error_is_that_of_neighbours_that_were_merged(export: Callable[..., Any], device: Any) -> None:
    """Requests that became one operation are not tried one by one: it was asked for so many errors, and no more."""
    server, client = export("error,on=write")
    with server, client() as disk:
        def merged() -> int:
            assert failing(lambda: disk.pwrite(bytes(128 * BLOCK), 0)) == errno.EIO
            counters = server.status()[0]["counters"]
            assert injected(server)["error"] + counters["merged"] == counters["failed"] == counters["writes"]
            return int(counters["merged"])

        if isinstance(device, str):
            eventually(merged)
        else:
            merged()


def test_errors_of_flushes(export: Callable[..., Any]) -> None:
    server, client = export("error,on=flush")
    with server, client() as disk:
        disk.pwrite(bytes(BLOCK), 0)
        assert failing(disk.flush) == errno.EIO
        assert failing(disk.flush) == errno.EIO
        assert injected(server)["error"] == 2


def test_an_error_keeps_its_write_away(export: Callable[..., Any], device: Any) -> None:
    """A request that fails so was not executed."""
    server, client = export("error,on=write")
    with server, client() as disk:
        assert failing(lambda: disk.pwrite(b"x" * BLOCK, 0)) == errno.EIO
        assert disk.pread(BLOCK, 0) == bytes(BLOCK)


def test_delays(export: Callable[..., Any]) -> None:
    """No answer comes before its time, and requests wait side by side: data is right."""
    server, client = export("delay=50ms,on=read/write")
    with server, client() as disk:
        data = os.urandom(BLOCK)
        start = time.monotonic()
        disk.pwrite(data, 0)
        assert time.monotonic() - start >= 0.05
        start = time.monotonic()
        got = disk.pread(BLOCK, 0)
        assert time.monotonic() - start >= 0.05
        assert got in (data, bytes(BLOCK) if server.exports[0].config.device.kind == "null" else data)
        disk.pread_many(range(0, 256 * BLOCK, BLOCK), bytearray(256 * BLOCK))
        assert injected(server)["delay"] >= 3


def test_late_answers(export: Callable[..., Any]) -> None:
    """An I/O error once the time is over, and the disk lives on."""
    server, client = export("late,on=write,rate=1")
    with server, client() as disk:
        start = time.monotonic()
        assert failing(lambda: disk.pwrite(b"x" * BLOCK, 0)) == errno.EIO
        assert time.monotonic() - start >= 1.0
        assert disk.pread(BLOCK, 0) == bytes(BLOCK)
        assert injected(server)["late"] == 1


def test_corruption(export: Callable[..., Any], device: Any) -> None:
    """One bit of what is read, and nothing of what is there."""
    server, client = export("corrupt,rate=0.999999")
    with server, client() as disk:
        data = bytes(BLOCK) if device == "null:1M" else os.urandom(BLOCK)
        disk.pwrite(data, 0)
        before = injected(server)["corrupt"]
        for turn in range(20):
            got = disk.pread(BLOCK, 0)
            assert sum((a ^ b).bit_count() for a, b in zip(got, data, strict=True)) == 1
            assert injected(server)["corrupt"] == before + turn + 1


def test_the_end_does_not_wait_for_what_is_withheld(program: Start) -> None:
    """A server whose answers come in an hour ends in seconds."""
    where = {"req": unique("a"), "resp": unique("c")}
    server = program("blk", "--req", where["req"], "--resp", where["resp"], "--inject", "delay=3600s,on=write")
    with muenfast.BlockDevice(**where, on_peer_loss="fail") as disk:
        start = time.monotonic()
        ended: list[object] = []

        def write() -> None:
            try:
                ended.append(disk.pwrite(bytes(BLOCK), 0))
            except OSError as error:    # its server was gone before
                ended.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        eventually(lambda: disk.status()["in_flight"])
        assert server.end()[0] == 0
        writer.join()
        assert ended and time.monotonic() - start < 60


def test_a_new_size_keeps_the_faults() -> None:
    where = {"req": unique("a"), "resp": unique("c")}
    with muenfast.BlockServer(muenfast.exports_from_lists(**where, device="ram:1M", inject="error,on=write")) as server, \
            muenfast.BlockDevice(**where) as disk:
        assert failing(lambda: disk.pwrite(bytes(BLOCK), 0)) == errno.EIO
        assert server.exports[0].resize(0, 2 << 20)
        eventually(lambda: disk.size == 2 << 20)
        assert failing(lambda: disk.pwrite(bytes(BLOCK), 0)) == errno.EIO
        assert injected(server)["error"] == 2


def test_only_the_export_that_is_named(tmp_path: Path) -> None:
    """Its neighbour is as it was, and shares a thread as before."""
    names = [unique(word) for word in "abcd"]
    configs = muenfast.exports_from_lists(",".join(names[:2]), ",".join(names[2:]), device="ram:1M,ram:1M", inject=",error")
    with muenfast.BlockServer(configs) as server, muenfast.BlockDevice(names[0], names[2]) as good, \
            muenfast.BlockDevice(names[1], names[3]) as bad:
        assert [export.shares for export in server.exports] == [True, False]
        good.pwrite(b"x" * BLOCK, 0)
        assert good.pread(BLOCK, 0) == b"x" * BLOCK
        assert failing(lambda: bad.pread(BLOCK, 0)) == errno.EIO
        assert "injected" not in server.status()[0]
