"""--cpus: threads of engines run where they are told to, and what cannot be is refused before anything is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Program, run, unique
from helpers import block

from muenfast import BlockDevice, BlockServer, UsageError, cpus
from muenfast.blk import BlockClients, channels_from_lists, exports_from_lists
from muenfast.cpus import Cpus, cpus_from_list, inherited, pin

ALLOWED = sorted(os.sched_getaffinity(0))


def test_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and ranges, in their order."""
    monkeypatch.setattr(cpus, "_present", lambda: set(range(8)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 5})
    assert cpus_from_list("--cpus", "3") == (3,)
    assert cpus_from_list("--cpus", "5,0-2") == (5, 0, 1, 2)
    for text, index, rule in (("", 0, "number of a CPU"), ("1,x", 1, "number of a CPU"), ("2-1", 0, "number of a CPU"),
                              ("0,-1", 1, "number of a CPU"), ("0,8", 1, "no CPU 8 here: they are 0-7"),
                              ("0-4", 0, "may not run on CPU 4"), ("1,0-2", 1, "CPU 1 is named twice")):
        with pytest.raises(UsageError, match=rule) as caught:
            cpus_from_list("--cpus", text)
        assert (caught.value.option, caught.value.index, caught.value.value) == ("--cpus", index, text.split(",")[index])
        assert caught.value.hint
    monkeypatch.setattr(cpus, "_present", lambda: None)
    with pytest.raises(UsageError, match=r"may not run on CPU 9.*choose among 0-3,5"):
        cpus_from_list("--cpus", "9")


def test_what_the_kernel_says() -> None:
    present = cpus._present()
    assert present is not None and present >= os.sched_getaffinity(0)


def test_in_turn() -> None:
    given = Cpus((ALLOWED[-1], ALLOWED[0]))
    assert [given.next() for _ in range(3)] == [ALLOWED[-1], ALLOWED[0], ALLOWED[-1]]
    assert Cpus(()).next() is None
    for number in (-1, 1 << 14, 1 << 80):
        with pytest.raises(UsageError, match=f"cpus, entry 1 '{number}'"):
            Cpus((ALLOWED[0], number))


def test_pinned_and_back(caplog: pytest.LogCaptureFixture) -> None:
    """A CPU that has gone is said, and changes nothing."""
    before = os.sched_getaffinity(0)
    with inherited(ALLOWED[0], "it"):
        assert os.sched_getaffinity(0) == {ALLOWED[0]}
    assert os.sched_getaffinity(0) == before
    pin(1 << 14, "it")
    assert "it is not pinned to CPU 16384" in caplog.text
    assert os.sched_getaffinity(0) == before


def affinities(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{pid}/task")]


@pytest.mark.parametrize("threads", [1, 3])
def test_exports_and_their_clients(program: Callable[..., Program], threads: int) -> None:
    """Each thread of an engine is on one of them; nothing else is pinned; `stat` says where."""
    names = [[unique(word) for _ in range(3)] for word in ("req", "resp")]
    lists = ("--req", ",".join(names[0]), "--resp", ",".join(names[1]))
    where = ",".join(map(str, ALLOWED[:2]))
    server = program("blk", *lists, "--cpus", where, "--threads", str(threads))
    pinned = [each for each in affinities(server.pid) if each != set(ALLOWED)] if len(ALLOWED) > 1 else []
    if len(ALLOWED) > 1:
        assert sorted(map(sorted, pinned)) == sorted([ALLOWED[k % 2]] for k in range(threads))
    client = program("blk", "--client", *lists, "--attach", "none", "--cpus", str(ALLOWED[-1]))
    answers = {each["pid"]: each["entries"] for each in json.loads(run("stat", "--json").stdout)}
    assert [each["cpu"] for each in answers[server.pid]] == [ALLOWED[k % threads % min(2, len(ALLOWED))] for k in range(3)]
    assert [each["cpu"] for each in answers[client.pid]] == [ALLOWED[-1]] * 3
    assert f"on CPU {ALLOWED[-1]}" in run("stat").stdout
    for each in (client, server):
        assert each.end() == (0, "")


def test_what_is_refused(program: Callable[..., Program], tmp_path: Path) -> None:
    """Before anything is opened, by every serving command."""
    lists = ("--req", unique("req"), "--resp", unique("resp"))
    for words in (("blk", *lists), ("blk", "--client", *lists, "--attach", "none"), ("blk", "--control"),
                  ("net", "--name", "mfcpus0")):
        done = run(*words, "--cpus", "0,70000")
        assert done.returncode == 2
        assert "--cpus, entry 1" in done.stderr and "70000" in done.stderr and "lscpu" in done.stderr
    assert not os.path.exists(f"/dev/shm/{lists[1]}")


def test_from_python() -> None:
    """And those that have none given run anywhere."""
    lists = [unique("req"), unique("req")], [unique("resp"), unique("resp")]
    joined = [",".join(each) for each in lists]
    with ExitStack() as stack:
        server = stack.enter_context(BlockServer(exports_from_lists(*joined), cpus=[ALLOWED[0]]))
        assert [each.cpu for each in server.exports] == [ALLOWED[0]] * 2
        clients = stack.enter_context(BlockClients(channels_from_lists(*joined), attach="none", cpus=[ALLOWED[-1]]))
        assert clients.ready(lambda: True)
        assert [each["cpu"] for each in clients.status()] == [ALLOWED[-1]] * 2
    with BlockServer(exports_from_lists(*joined)) as server, BlockDevice(lists[0][0], lists[1][0], timeout=20) as device:
        assert [each["cpu"] for each in server.status()] == [None, None]
        device.pwrite(block(1), 0)
