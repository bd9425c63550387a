"""What all tests share: names of their own, a runtime directory of their own, and a look for left-overs after each.

Only what belongs to this test run is looked at (names carry our process number, paths lie below our temporary
directory), so that several runs may share a machine.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# A shell's & has SIGINT ignored, nohup SIGHUP, and children inherit that: the tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests that make /dev/muendiskX, look at all that there are, or have runtime directories of this machine's users, one after
# the other in one worker: files, classes, tests.
MACHINE = {"test_attach", "test_broker", "test_buffer_device", "test_crash", "test_ctl_device", "test_device",
           "test_doctor", "test_fuse_uring::TestFrontEnd", "test_modprobe::test_the_client_makes_a_device_appear",
           "test_nbd::test_beside_a_block_device", "test_partitioned", "test_policy::test_a_disk_between_two_users",
           "test_policy::test_only_what_is_declared", "test_recovery", "test_sandbox::TestWithin", "test_soak",
           "test_units::test_systemd_runs_them",
           "test_user::test_an_overlay_survives_its_server", "test_user::test_file_systems",
           "test_user::test_parts_under_ext4"}
# What takes longest begins first, so that no worker is left with it in the end: scopes, and files that have several.
FIRST = ["machine", "test_packaging", "test_memory_model", "test_hostile", "test_torn"]

PREFIX = f"mf{os.getpid()}-"
_numbers = itertools.count()


def unique(word: str = "x") -> str:
    """A name for shared memory that nobody else uses."""
    return f"{PREFIX}{next(_numbers)}-{word}"


def scope(nodeid: str) -> str:
    """What a test goes to a worker with: all of MACHINE, or the tests of its file."""
    path, *names = nodeid.partition("[")[0].split("::")
    file = Path(path).stem
    return "machine" if {file, f"{file}::{names[0] if names else ''}"} & MACHINE else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each scope's tests go to one worker, in the order in which they are collected."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False
    return ByScope(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FIRST, then the files with most tests."""
    size = Counter(scope(item.nodeid) for item in items)
    items.sort(key=lambda item: (FIRST.index(scope(item.nodeid)) if scope(item.nodeid) in FIRST else len(FIRST),
                                 -size[scope(item.nodeid)]))


def pytest_collection_finish() -> None:
    """What is there by now lives to the end: the collections after each test need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def names() -> Callable[[str], str]:
    """unique(word)."""
    return unique


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of the test's own, for this process and its children."""
    path = tmp_path / "run"
    monkeypatch.setenv("MUENFAST_RUNTIME_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, tmp_path: Path, runtime: Path) -> Iterator[None]:
    """After the test there is no region, claim, node, loop device, mount, process, thread or descriptor more."""
    attaches = scope(request.node.nodeid) in ("machine", "test_pump")
    before = leftovers(tmp_path, attaches)
    threads, descriptors = threading.active_count(), _descriptors()
    yield
    end = time.monotonic() + 5
    while True:
        gc.collect()
        left = {kind: sorted(found - before[kind]) for kind, found in leftovers(tmp_path, attaches).items()}
        left = {kind: found for kind, found in left.items() if found}
        if threading.active_count() > threads:
            left["threads"] = [thread.name for thread in threading.enumerate()]
        if _descriptors() > descriptors:
            left["descriptors"] = _open_files()
        if not left or time.monotonic() > end:
            break
        time.sleep(0.02)  # a process that was told to end, a mount that is being torn down
    for pid in left.get("processes", ()):
        os.kill(int(pid.split()[0]), signal.SIGKILL)
    for name in left.get("shared memory", ()):  # tests after this one are not to fail for it, too
        Path("/dev/shm", name).unlink(missing_ok=True)
    assert not left, f"{request.node.name} left behind: {left}"


def leftovers(below: Path, attaches: bool = False) -> dict[str, set[str]]:
    """What a test may leave on the machine, by kind. attaches: it makes block devices, and one whose mount has gone may be
    its own; to others it is another worker's."""
    books = {str(path) for path in (below / "run").rglob("*") if not path.is_dir()}
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = {line.split()[4] for line in file if str(below) in line}
    loops = set()
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = entry.read_text().rstrip("\n")
        except OSError:  # detached while we looked
            continue
        if str(below) in backing or attaches and backing == "/disk":  # /disk: the mount it came from has gone
            loops.add(entry.parts[3])
    spaces = Path("/run/netns")
    namespaces = {each.name for each in spaces.iterdir() if PREFIX in each.name} if spaces.exists() else set()
    return {"network namespaces": namespaces, "shared memory": {name for name in os.listdir("/dev/shm") if PREFIX in name},
            "book-keeping": books, "mounts": mounts, "loop devices": loops, "nodes": _nodes(),
            "processes": set(_children())}


def _nodes() -> set[str]:
    """Nodes of disks whose loop device is free, and of partitions that are gone: those of a client that lives are
    somebody's."""
    found = set()
    for node in Path("/dev").glob("muendisk*"):
        try:
            info = node.stat()
        except OSError:
            continue
        major, minor = os.major(info.st_rdev), os.minor(info.st_rdev)
        behind = Path(f"/sys/block/loop{minor}/loop" if major == 7 else f"/sys/dev/block/{major}:{minor}")
        if stat.S_ISBLK(info.st_mode) and not behind.exists():
            found.add(str(node))
    return found


def _children() -> Iterator[str]:
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue
        for pid in pids:
            try:
                yield f"{pid} {Path(f'/proc/{pid}/cmdline').read_text().replace(chr(0), ' ')}"
            except OSError:
                continue


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def guest_is_small(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the guest files are in its memory: those of a test go with it, a failed one's too, or the next ones would fail."""
    place = request.getfixturevalue("tmp_path") if request.path.parent.name == "guest" else None
    yield
    if place is not None:
        shutil.rmtree(place)


class Program:
    """A `muenfast` process: started, waited for until ready, ended by signal; always gone at the end."""

    def __init__(self, *words: str, ready: bool = True, cwd: str | None = None, within: Sequence[str] = ()) -> None:
        """within: words of a program that becomes this one, elsewhere."""
        self.process = subprocess.Popen([*within, sys.executable, "-m", "muenfast", *words], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True,
                                        env=os.environ | {"PYTHONFAULTHANDLER": "1"})
        self.lines: list[str] = []
        if ready:
            self.wait_ready()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> list[str]:
        """The lines before `ready`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                return self.lines
            self.lines.append(line.rstrip("\n"))
        _, errors = self.process.communicate(timeout=10)
        raise AssertionError(f"not ready, status {self.process.returncode}: {errors}")

    def end(self, number: int = signal.SIGTERM, timeout: float = 20) -> tuple[int, str]:
        """Status and what it wrote to standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            _, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)    # faulthandler: where its threads are
            _, errors = self.process.communicate(timeout=timeout)
            raise AssertionError(f"did not end by signal {number} within {timeout:g} s:\n{errors}") from None
        return self.process.returncode, errors


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Iterator[Callable[..., Program]]:
    """Starts Programs; each one still running at the end is killed. One that made /dev/muendiskX beside other workers
    fails a test that is none of MACHINE."""
    started: list[Program] = []

    def start(*words: str, **options: object) -> Program:
        new = Program.__new__(Program)
        started.append(new)
        new.__init__(*words, **options)  # type: ignore[misc]
        return new

    yield start
    for one in reversed(started):
        if hasattr(one, "process") and one.process.poll() is None:
            one.process.kill()
            one.process.communicate()
    if hasattr(request.config, "workerinput") and scope(request.node.nodeid) != "machine":
        assert "/dev/muendisk" not in str([line for one in started for line in one.lines]), "to be one of conftest.MACHINE"


def run(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs `muenfast WORDS` to its end."""
    return subprocess.run([sys.executable, "-m", "muenfast", *words], capture_output=True, text=True,
                          timeout=timeout, check=False)
