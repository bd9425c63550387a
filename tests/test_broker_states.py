"""A broker's requests in every order: what is done to the machine is a model's, so that all of it can be looked at."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muenfast import broker
from muenfast.attach import loop, partitions, watchdog
from muenfast.attach.root import Mount, Root
from muenfast.broker import disks

NAMES = ("muendiska", "muendiskb", "muendiskc")
MOST = 2


class Machine(Root):
    """In place of a Root: mounts, loop devices, claims are entries. waits: what an operation of that name does first."""

    def __init__(self) -> None:
        self.claims: set[str] = set()
        self.mounts: dict[str, dict[str, Any]] = {}     # loop: its number; tree: whether it is in the tree
        self.bound: dict[int, str] = {}                 # loop devices, and whose file they have
        self.nodes: set[str] = set()
        self.offers: set[str] = set()
        self.fails = False
        self.waits: dict[str, Callable[[], None]] = {}
        self.last = 0

    def does(self, what: str) -> None:
        self.waits.get(what, lambda: None)()
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO), what)

    def claim(self, name: str) -> Any:
        self.does("claim")
        if name in self.claims:
            return None
        self.claims.add(name)
        return SimpleNamespace(release=lambda: self.claims.remove(name))

    def reclaim(self, name: str) -> list[str]:
        return []

    def mount(self, name: str, *, read_only: bool, max_io: int, uring: str) -> Mount:
        self.does("mount")
        assert name not in self.mounts
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.mounts[name] = {"loop": -1, "tree": True, "abort": read}
        self.offers.add(name)
        return Mount(f"/mnt/{name}", os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), 1, write, False)

    def aborted(self, name: str) -> bool:
        try:
            return bool(os.read(self.mounts[name]["abort"], 1))
        except BlockingIOError:
            return False

    def gone(self, name: str) -> None:
        os.close(self.mounts.pop(name)["abort"])

    def mounted(self, name: str) -> None:
        if name in self.mounts:
            self.offers.discard(name)

    def mountpoint(self, name: str) -> str:
        assert name in self.mounts
        return f"/mnt/{name}"

    def unmount(self, name: str, force: bool) -> None:
        self.mounts[name]["tree"] = False

    def rmdir(self, name: str) -> None:
        if self.mounts[name]["tree"]:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self.gone(name)

    def resize_file(self, name: str, size: int, read_only: bool) -> None:
        self.does(self.mountpoint(name))

    def loop(self, name: str, *, read_only: bool, max_io: int, block_size: int, discard: bool) -> int:
        self.does("loop")
        self.last += 1
        self.mounts[name]["loop"] = self.last
        self.bound[self.last] = name
        return self.last

    def owns(self, name: str) -> bool:
        mount = self.mounts.get(name)
        return mount is not None and mount["tree"] and self.bound.get(mount["loop"]) == name

    def free_loop(self, name: str, timeout: float = 1.0) -> bool:
        if self.owns(name):
            self.does("free loop")
            del self.bound[self.mounts[name]["loop"]]
        return True

    def resize_loop(self, name: str, size: int) -> None:
        assert self.owns(name)

    def open(self, name: str) -> int:
        assert self.owns(name)
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def sync(self, name: str) -> list[str]:
        return []

    def users(self, name: str, but: int | None) -> list[str]:
        return []

    def make_node(self, name: str) -> None:
        self.does("make node")
        self.nodes.add(name)

    def remove_node(self, name: str) -> None:
        self.nodes.discard(name)

    def partitions(self, name: str) -> Any:
        return SimpleNamespace(
            disk="loop1", open=lambda: self.open(name),
            open_part=lambda number: os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), reread=lambda fd: None,
            change=lambda fd, *what: self.does("change"), make_node=lambda number, device: True,
            remove_node=lambda number, device: None)

    def release(self, mountpoint: str, node: str, abort: int) -> list[str]:
        """watchdog.release()."""
        name = os.path.basename(mountpoint)
        os.write(abort, b"1")
        if self.mounts[name]["tree"]:   # they are found by its path
            self.bound = {number: whose for number, whose in self.bound.items() if whose != name}
        self.nodes.discard(name)
        self.gone(name)
        return []


class Leash:
    def __init__(self, *what: object) -> None:
        self.pid = 1

    def give(self) -> int:
        return os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)

    def wait(self) -> None:
        pass


class Asked:
    """A service of two disks on a model's machine, and its answers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.machine = Machine()
        self.service = disks.DiskService(os.getpid(), MOST)
        self.service._root = self.machine
        patch.setattr(disks, "Leash", Leash)
        patch.setattr(watchdog, "release", self.machine.release)
        patch.setattr(loop, "is_bound", lambda number: number in self.machine.bound)
        patch.setattr(loop, "detach", lambda number, timeout: self.machine.bound.pop(number))
        patch.setattr(partitions, "of_kernel", lambda disk: {1: SimpleNamespace(number=os.makedev(259, 1))})

    def __call__(self, operation: str, name: str = NAMES[0], /, **fields: object) -> str:
        """"ok", or of what kind the error is."""
        answer = self.service.answer(json.dumps({"do": operation, "name": name, **fields}).encode())
        for fd in answer.fds:
            os.close(fd)
        return "ok" if answer.values["ok"] else answer.values["kind"]

    def mount(self, name: str = NAMES[0]) -> str:
        return self("mount", name, read_only=False, max_io=4096, uring="auto")

    def loop(self, name: str = NAMES[0]) -> str:
        return self("loop", name, read_only=False, max_io=4096, block_size=512, discard=True)

    def end(self) -> None:
        """Nothing is left of anything."""
        aborts = [disk.abort for disk in self.service._disks.values() if disk.abort >= 0]
        self.service.end()
        for fd in aborts:
            os.close(fd)
        for disk in self.service._disks.values():
            if disk.offer is not None:
                disk.offer.cancel()
                disk.offer.join()
        machine = self.machine
        assert (machine.claims, machine.mounts, machine.bound) == (set(), {}, {})
        assert not machine.nodes and not machine.offers


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    monkeypatch.setattr(disks, "_OFFER", 0.2)
    new = Asked(monkeypatch)
    yield new
    new.machine.fails = False
    new.machine.waits.clear()
    new.end()


def started(ask: Callable[[], str]) -> tuple[threading.Thread, list[str]]:
    """In a lane of its own."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    return thread, found


class Held:
    """Has an operation of the machine wait."""

    def __init__(self, machine: Machine, operation: str) -> None:
        self._there, self._go = threading.Event(), threading.Event()
        machine.waits[operation] = self._wait

    def _wait(self) -> None:
        self._there.set()
        assert self._go.wait(20)

    def reached(self) -> None:
        assert self._there.wait(20)

    def go(self) -> None:
        self._go.set()


REQUESTS = st.tuples(st.one_of(
    st.sampled_from([("claim", {}), ("release", {}), ("mounted", {}), ("rmdir", {}), ("unwatch", {}), ("open", {}),
                     ("sync", {}), ("make node", {}), ("remove node", {}), ("reread", {})]),
    st.just(("mount", {"read_only": False, "max_io": 4096, "uring": "off"})),
    st.just(("loop", {"read_only": False, "max_io": 4096, "block_size": 512, "discard": False})),
    st.just(("unmount", {"force": True})), st.just(("watch", {"thread": os.getpid(), "bystander": os.getpid()})),
    st.just(("free loop", {"milliseconds": 0})), st.just(("users", {"but": 0})),
    st.just(("resize loop", {"size": 1})), st.just(("resize file", {"size": 1, "read_only": False})),
    st.sampled_from([("open part", {"number": 1}), ("make part", {"number": 1}), ("make part", {"number": 2}),
                     ("remove part", {"number": 1}),
                     ("change", {"number": 1, "operation": partitions.ADD, "start": 0, "size": 1})])),
    st.sampled_from(NAMES), st.booleans())


class TestOrders:
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(requests=st.lists(REQUESTS, max_size=40), begun=st.integers(0, 4))
    def test_any_order(self, monkeypatch: pytest.MonkeyPatch, requests: list[Any], begun: int) -> None:
        """Each request is done, refused, or fails as the machine did; never as nobody thought of. Nothing is left."""
        with monkeypatch.context() as patch:
            asked = Asked(patch)
            for step in (lambda: asked("claim"), asked.mount, asked.loop, lambda: asked("unmount", force=False))[:begun]:
                assert step() == "ok"
            for (operation, fields), name, fails in requests:
                asked.machine.fails = fails
                assert asked(operation, name, **fields) in ("ok", "refused", "os"), (operation, name, fails)
                assert len(asked.machine.claims) <= MOST and len(asked.machine.bound) <= 4 * MOST
            asked.machine.fails = False
            asked.end()

    def test_while_its_mount_is_made(self, asked: Asked) -> None:
        """It is neither used nor taken away."""
        assert asked("claim") == "ok"
        held = Held(asked.machine, "mount")
        thread, found = started(asked.mount)
        held.reached()
        for ask in (asked.mount, asked.loop, lambda: asked("unmount", force=True), lambda: asked("rmdir"),
                    lambda: asked("release")):
            assert ask() == "refused"
        held.go()
        thread.join()
        assert found == ["ok"]

    def test_a_client_that_does_not_answer(self, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its connection is aborted, also where it has the mount taken away meanwhile; the loop device goes with it."""
        monkeypatch.setattr(disks, "_LIMIT", 0.3)
        assert (asked("claim"), asked.mount()) == ("ok", "ok")
        machine = asked.machine
        machine.waits["loop"] = lambda: eventually(lambda: machine.aborted(NAMES[0]))
        thread, found = started(asked.loop)
        eventually(lambda: asked.service._disks[NAMES[0]].busy)
        assert asked("unmount", force=False) == "ok"
        assert (asked("rmdir"), asked("release")) == ("refused", "refused")
        thread.join()
        assert found == ["os"] and not machine.bound
        assert (asked.loop(), asked("rmdir"), asked("release")) == ("refused", "ok", "ok")

    def test_loop_devices_that_are_kept_open(self, asked: Asked) -> None:
        """They go with their last user; of them there are not more and more."""
        made = 0
        for _ in range(20):
            assert (asked("claim"), asked.mount()) == ("ok", "ok")
            made += asked.loop() == "ok"
            asked.machine.waits["free loop"] = lambda: setattr(asked.machine, "fails", True)    # it stays, with autoclear
            asked("unmount", force=False)
            asked("unmount", force=False)
            asked.machine.fails = False
            asked.machine.mounts[NAMES[0]]["tree"] = False
            assert (asked("rmdir"), asked("release")) == ("ok", "ok")
        assert made == 4 * MOST == len(asked.machine.bound)
        asked.machine.bound.clear()
        assert (asked("claim"), asked.mount(), asked.loop()) == ("ok", "ok", "ok")

    def test_a_device_that_becomes_somebody_elses(self, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
        """Freed by another lane as it is opened: nobody is given it, and nothing is done to it."""
        assert (asked("claim"), asked.mount(), asked.loop()) == ("ok", "ok", "ok")
        part = {"number": 1, "operation": partitions.DELETE, "start": 0, "size": 0}
        assert asked("open") == asked("reread") == asked("change", **part) == "ok"
        machine = asked.machine

        def freed(name: str) -> int:
            machine.bound.clear()
            return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

        monkeypatch.setattr(machine, "open", freed)
        for ask in (lambda: asked("open"), lambda: asked("reread"), lambda: asked("change", **part)):
            machine.bound[machine.last] = NAMES[0]
            assert ask() == "refused"

    def test_a_partition_that_becomes_somebody_elses(self, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its number is another disk's once it was deleted: nobody is given that."""
        there = {1: SimpleNamespace(number=os.stat("/dev/null").st_rdev)}
        monkeypatch.setattr(partitions, "of_kernel", lambda disk: there)
        assert (asked("claim"), asked.mount(), asked.loop()) == ("ok", "ok", "ok")
        assert asked("open part", number=1) == "refused"
        assert asked("make part", number=1) == asked("open part", number=1) == "ok"
        del there[1]
        assert asked("open part", number=1) == "refused"
        there[1] = SimpleNamespace(number=os.makedev(259, 7))
        assert asked("open part", number=1) == "refused"

    def test_an_offer_ends_with_its_mount(self, asked: Asked) -> None:
        """Others wait for it: FUSE over io_uring is the kernel's."""
        assert (asked("claim"), asked.mount()) == ("ok", "ok")
        assert asked.machine.offers == {NAMES[0]}
        assert (asked("unmount", force=False), asked("rmdir")) == ("ok", "ok")
        assert not asked.machine.offers
        assert asked.mount() == "ok"
        eventually(lambda: not asked.machine.offers)    # nobody says that it is served

    @pytest.mark.parametrize("operation", ["claim", "mount", "loop"])
    def test_its_client_dies_meanwhile(self, asked: Asked, operation: str) -> None:
        """What is under way ends first, then it is undone as well; whatever comes afterwards is answered, and not done."""
        steps = {"claim": lambda: asked("claim"), "mount": asked.mount, "loop": asked.loop}
        for name, step in steps.items():
            if name == operation:
                break
            assert step() == "ok"
        held = Held(asked.machine, operation)
        thread, found = started(steps[operation])
        held.reached()
        ending = threading.Thread(target=asked.service.end)
        ending.start()
        if operation == "loop":
            eventually(lambda: asked.machine.aborted(NAMES[0]))
        else:
            eventually(lambda: asked.service._ended)
        assert asked("claim", NAMES[1]) == "other" and ending.is_alive()
        held.go()
        thread.join()
        ending.join()
        assert found == ["ok"]
        machine = asked.machine
        assert (machine.claims, machine.mounts, machine.bound, machine.offers) == (set(), {}, {}, set())
        for disk in asked.service._disks.values():
            if disk.abort >= 0:
                os.close(disk.abort)
        asked.service._disks.clear()


# ------------------------------------------------------------------ lanes

@pytest.fixture
def lane() -> Iterator[socket.socket]:
    """The asker's end; the other one is attended."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    thread = threading.Thread(target=broker._attend, args=(broker.Service(), theirs))
    thread.start()
    yield ours
    ours.close()
    thread.join()
    theirs.close()


class TestLanes:
    def test_nobody_waits_on_one_that_is_not_attended(self, lane: socket.socket) -> None:
        """An empty request is one of nobody's: the lane is closed."""
        lane.send(b"")
        assert lane.recv(100) == b""

    def test_nor_on_one_that_failed(self, lane: socket.socket, monkeypatch: pytest.MonkeyPatch,
                                    caplog: pytest.LogCaptureFixture) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

        monkeypatch.setattr(socket, "send_fds", full)
        lane.send(b"{}")
        assert lane.recv(100) == b"" and "a lane is closed" in caplog.text

    def test_a_flood_is_counted_and_told_in_few_lines(self, lane: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
        """One a second, without what a terminal would take as its own."""
        for _ in range(500):
            lane.send(json.dumps({"do": "\x1b[2J", "x": 1}).encode())
            assert json.loads(lane.recv(1000))["kind"] == "refused"
        lane.send(b'{"do": "counts"}')
        assert json.loads(lane.recv(1000)) == {"ok": True, "requests": 501, "refused": 500}
        lines = [line for line in caplog.messages if "refused so far" in line]
        assert 1 <= len(lines) < 50 and lines[0].startswith("broker: 1 requests refused so far")
        assert "\x1b" not in caplog.text


# ------------------------------------------------------------------ the watchdog, which a client that was taken over tells

@pytest.mark.parametrize("said", [b"detaching inf\n", b"detaching nan\n", b"detaching -1\n", b"detaching 1e300\n"])
def test_a_watchdog_waits_for_no_longer_than_it_may(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is told: then it aborts the connection, and acts."""
    monkeypatch.setattr(watchdog, "LONGEST", 0.2)
    monkeypatch.setattr(watchdog, "AFTERMATH", 0.2)
    read, write = os.pipe()
    aborted: list[None] = []
    thread = watchdog.Thread(os.getpid(), os.getpid())
    try:
        os.write(write, said)
        assert watchdog.watch(read, [thread], lambda: aborted.append(None)) is False and aborted
    finally:
        for fd in (read, write, *([thread.fd] if thread.fd >= 0 else [])):
            os.close(fd)


def test_a_watchdog_keeps_no_endless_message() -> None:
    read, write = os.pipe()
    thread = watchdog.Thread(os.getpid(), os.getpid())
    try:
        os.write(write, b"d" * 4000)
        with pytest.raises(ValueError, match="without an end"):
            watchdog.watch(read, [thread], lambda: None)
    finally:
        for fd in (read, write, *([thread.fd] if thread.fd >= 0 else [])):
            os.close(fd)


# ------------------------------------------------------------------ loop devices

def test_another_ones_loop_device_is_not_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that got its number meanwhile: looked at once it is open, when it cannot change any more."""
    real = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags: real("/dev/null", flags))     # which knows no LOOP_CLR_FD
        patch.setattr(loop, "backing_file", lambda number: "/theirs")
        assert loop.detach(5, 0.0, "/mine")
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            loop.detach(5, 0.0, "/theirs")
        patch.setattr(watchdog, "loops_below", lambda directory: [6])
        watchdog.clear_loop(5, "/mine")
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            watchdog.clear_loop(6, "/mine")
