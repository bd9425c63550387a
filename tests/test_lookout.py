"""Names that change are told of, and what is idle looks seldom without being late."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import unique
from helpers import block, eventually

from muenfast import BlockDevice, BlockServer, export, lookout, shm
from muenfast.blk import exports_from_lists
from muenfast.lookout import LEAST, MOST, Lookout, Pace
from muenfast.shm import Locator


@pytest.fixture
def names() -> list[Locator]:
    return [Locator.parse(unique(f"name{k}")) for k in range(2)]


def test_who_is_told(names: list[Locator]) -> None:
    """Of its own names, made, truncated and removed, and of no other; nobody after remove(), nor close()."""
    found: list[list[str]] = [[], []]
    tell: list[Callable[[], None]] = [lambda: found[0].append("0"), lambda: found[1].append("1")]
    watch = Lookout()
    for k in range(2):
        watch.add([names[k]], tell[k])
    with open(names[0].path, "wb") as file:
        eventually(lambda: found[0])
        for _ in range(2):      # what one change is told twice for may come late: the second is behind it
            found[0].clear()
            file.truncate(4096 + len(found[0]))
            os.utime(names[0].path)
            eventually(lambda: found[0])
    found[0].clear()
    os.unlink(names[0].path)
    eventually(lambda: found[0])
    assert not found[1]
    watch.remove([names[0]], tell[0])
    found[0].clear()
    for locator in names:
        Path(locator.path).touch()
    eventually(lambda: found[1])
    assert not found[0]
    watch.close()
    for locator in names:
        os.unlink(locator.path)
    assert "names" not in [thread.name for thread in threading.enumerate()]


def test_what_a_queue_says() -> None:
    """Names, and everybody where it has run over."""
    def event(mask: int, name: bytes) -> bytes:
        padded = name.ljust(-(-(len(name) + 1) // 16) * 16, b"\0") if name else b""
        return lookout._EVENT.pack(1, mask, 0, len(padded)) + padded

    assert Lookout._changed(event(0x100, b"a") + event(0x200, b"b" * 16) + event(0x2, b"a")) == {"a", "b" * 16}
    assert Lookout._changed(event(0x100, b"a") + event(0x4000, b"")) is None


def test_a_directory_that_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[Locator]) -> None:
    """Everybody is told, once, and close() has nothing to end."""
    place, told = tmp_path / "names", threading.Event()
    place.mkdir()
    monkeypatch.setattr(shm, "DIRECTORY", str(place))
    watch = Lookout()
    watch.add(names, told.set)
    place.rmdir()
    assert told.wait(10)
    watch.close()
    assert "names" not in [thread.name for thread in threading.enumerate()]


def test_one_that_is_told_and_fails(names: list[Locator], caplog: pytest.LogCaptureFixture) -> None:
    """The others are told all the same."""
    said = threading.Event()

    def fails() -> None:
        raise ValueError("planted")

    watch = Lookout()
    watch.add(names, fails)
    watch.add(names, said.set)
    Path(names[1].path).touch()
    assert said.wait(10)
    os.unlink(names[1].path)
    watch.close()
    assert "planted" in caplog.text


def test_pace() -> None:
    """Looks become seldom while nothing happens, down to a limit, and frequent at once."""
    told, untold = Pace(True), Pace(False)
    for _ in range(20):
        told.looked(True)
        untold.looked(True)
    assert (told.seconds, untold.seconds) == (MOST, LEAST)
    told.looked(False)
    assert told.seconds == LEAST
    told.looked(True)
    told.hurry()
    assert told.seconds == LEAST < Pace(True, 1.0).seconds * 2
    slow = Pace(True, 1.0)
    for _ in range(20):
        slow.looked(True)
    assert slow.seconds == 1.0


def test_without_a_lookout(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be had costs looks, nothing else."""
    def refuse(directory: bytes) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "inotify_init1")

    monkeypatch.setattr(lookout, "watch_names", refuse)
    lists = [unique("req"), unique("req")], [unique("resp"), unique("resp")]
    with BlockServer(exports_from_lists(*(",".join(each) for each in lists), device="ram:1M,ram:1M")) as server:
        assert [each._pace.told for each in server.exports] == [False, False]
        for locator in (each.config.channels.req for each in server.exports):
            shm.remove_region(locator, force=True)
        for pair in zip(*lists, strict=True):
            with BlockDevice(*pair, timeout=20) as device:
                device.pwrite(block(3), 0)


@pytest.mark.parametrize(("threads", "bells"), [(1, False), (2, True)])
def test_who_is_idle_is_there_at_once(monkeypatch: pytest.MonkeyPatch, threads: int, bells: bool) -> None:
    """Exports that look every hundred seconds, alone or by turns: a client comes, with a bell or without; its channel's
    name is made anew, and one comes there; it leaves."""
    for module in (lookout, export):
        monkeypatch.setattr(module, "LEAST", 100.0)
    lists = [unique("req"), unique("req")], [unique("resp"), unique("resp")]
    with ExitStack() as stack:
        server = stack.enter_context(BlockServer(exports_from_lists(*(",".join(each) for each in lists),
                                                                    device="ram:1M,ram:1M", bells=bells), threads=threads))
        assert all(each._pace.seconds == 100 for each in server.exports)
        idle = threading.Event()
        for round in range(2):
            idle.wait(0 if round else 1.3)      # IDLE_AFTER_NS: from then on the watch polls
            with BlockDevice(lists[0][0], lists[1][0], timeout=20, bells=bells) as device:
                device.pwrite(block(round), 0)
                idle.wait(1.3 if round else 0)
                assert device.pread(4096, 0) == block(round)
                assert server.exports[0].state == "connected"
            eventually(lambda: server.exports[0].state == "waiting")
            assert server.exports[1].state == "waiting"
            with suppress(FileNotFoundError):   # a strict one-way server is no user, and the last one removes it
                shm.remove_region(server.exports[0].config.channels.req, force=True)
