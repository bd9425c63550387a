"""A block device's front end with one thread for both sides: who takes the answers, and that nobody is left waiting."""

from __future__ import annotations

import functools
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import no_ring

from muenfast.attach import fuse, loop
from muenfast.blk import BlockClients, channels_from_lists

pytestmark = [pytest.mark.root, pytest.mark.fuse,
              pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")]

BLOCK, MIB = 4096, 1 << 20

IDLE = 1.0      # seconds after which the front end leaves the answers to the client's own thread


@pytest.fixture(autouse=True)
def other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that nobody else takes: these tests run beside those of conftest.MACHINE."""
    monkeypatch.setattr(loop, "PREFIX", "muendiskpump")


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Traffic:
    """Random writes and reads of a device, in threads, which check what they read; each block belongs to one thread."""

    def __init__(self, device: str, threads: int = 8, blocks: int = 64) -> None:
        self.done = [0] * threads
        self.problems: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(device, number, threads, blocks))
                         for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, device: str, number: int, threads: int, blocks: int) -> None:
        chooser = random.Random(number)
        expected: dict[int, bytes] = {}
        fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, BLOCK) as page:
                while not self._stop.is_set():
                    place = chooser.randrange(blocks) * threads + number
                    if place in expected and chooser.random() < 0.5:
                        assert os.preadv(fd, [page], place * BLOCK) == BLOCK
                        if page[:] != expected[place]:
                            self.problems.append(f"block {place}")
                    else:
                        page[:] = expected[place] = chooser.randbytes(16) * (BLOCK // 16)
                        assert os.pwritev(fd, [page], place * BLOCK) == BLOCK
                    self.done[number] += 1
        except (OSError, AssertionError) as error:
            self.problems.append(repr(error))
        finally:
            os.close(fd)

    def moves_on(self, seconds: float = 10.0) -> None:
        """Waits until every thread has done something more."""
        before = list(self.done)
        eventually(lambda: all(now > then + 1 for now, then in zip(self.done, before, strict=True)), seconds)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self._threads)
        assert self.problems == []


class Clients:
    """BlockClients in this process; its servers are others. uring: as fuse_uring; plain: their front ends are no pumps."""

    def __init__(self, stack: ExitStack, uring: str, lists: dict[str, str], *, plain: bool = False) -> None:
        self.clients = stack.enter_context(BlockClients(channels_from_lists(**lists), fuse_uring=uring))
        self.clients.ready(lambda: True)
        disk = self.clients.disks[0].front.disk
        assert disk.ring == (uring == "auto" and not plain)
        pumps = disk.pumps
        assert not (plain and pumps)
        if not (plain or pumps):
            pytest.skip("needs liburing, and a kernel whose io_uring waits for futexes (Linux 6.7)")
        self.engine = self.clients.disks[0].device.client
        self.devices = [str(disk.path) for disk in self.clients.disks]


class Turns:
    """A client's engine that counts the turns of its thread."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.n = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, seconds: float) -> str:
        self.n += 1
        return str(self._engine.run(seconds))


class Paced:
    """Reads one after the other, with a pause before each: whoever waits for an answer has gone to sleep."""

    def __init__(self, made: Clients, reads: int, pause: float = 0.001) -> None:
        self._device, self._reads, self._pause = made.devices[0], reads, pause
        self.left = reads

    def run(self) -> None:
        """To be done with all in 10 s: fails where each waits for a sleep to end by itself."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            eventually(lambda: self.left == 0)
        finally:
            self._reads = 0
            thread.join(20)

    def _run(self) -> None:
        fd = os.open(self._device, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, BLOCK) as page:
                for number in range(self._reads):
                    if self._reads == 0:
                        return
                    time.sleep(self._pause)
                    assert os.preadv(fd, [page], number % 2048 * BLOCK) == BLOCK
                    self.left -= 1
        finally:
            os.close(fd)


@pytest.fixture(params=["inline", "shm"])
def lists(request: pytest.FixtureRequest) -> dict[str, str]:
    names = {"req": unique("req"), "resp": unique("resp")}
    return names if request.param == "inline" else names | {"buffer": unique("buf")}


Serve = Callable[..., Program]
Attach = Callable[..., Clients]


@pytest.fixture
def start(program: Callable[..., Program]) -> Iterator[Callable[..., Program]]:
    """As program(), for servers, which end after the clients."""
    servers = []

    def begin(*words: str) -> Program:
        servers.append(program(*words))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            assert server.end()[0] == 0


@pytest.fixture
def serve(start: Callable[..., Program]) -> Serve:
    """serve(lists, device): a server."""
    def begin(lists: dict[str, str], device: str) -> Program:
        shared = ["--shm", lists["buffer"]] if "buffer" in lists else []
        return start("blk", "--req", lists["req"], "--resp", lists["resp"], *shared, "--device", device)

    return begin


@pytest.fixture(params=["auto", "off"], ids=["ring", "read"])
def clients(start: Callable[..., Program], request: pytest.FixtureRequest) -> Iterator[Attach]:
    if request.param == "auto" and (reason := no_ring()):
        pytest.skip(reason)
    with ExitStack() as stack:
        yield functools.partial(Clients, stack, request.param)


def test_the_front_end_takes_answers_while_there_are_any(serve: Serve, lists: dict[str, str],
                                                         clients: Attach) -> None:
    """And leaves them to the client's own thread afterwards, again and again."""
    serve(lists, "ram:8M")
    made = clients(lists)
    for _ in range(2):
        traffic = Traffic(made.devices[0])
        eventually(lambda: made.engine.attended)
        traffic.moves_on()
        assert made.engine.attended
        traffic.end()
        eventually(lambda: not made.engine.attended, 2 * IDLE + 1)
    assert made.engine.in_flight == 0


def test_plain(serve: Serve, lists: dict[str, str], clients: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel cannot wait for both sides at once: the client's own thread takes all answers."""
    front_end = fuse.FuseDisk
    monkeypatch.setattr(fuse, "FuseDisk", lambda *words, **options: front_end(*words, **options | {"plain": True}))
    serve(lists, "ram:8M")
    made = clients(lists, plain=True)
    traffic = Traffic(made.devices[0])
    for _ in range(3):
        traffic.moves_on()
        assert not made.engine.attended
    traffic.end()


def test_calls_beside_a_device_get_their_answers(serve: Serve, lists: dict[str, str], clients: Attach) -> None:
    """From whoever takes them: with traffic, and when that has just ended."""
    serve(lists, "ram:8M")
    made = clients(lists)
    disk = made.clients.disks[0].device
    traffic = Traffic(made.devices[0])
    eventually(lambda: made.engine.attended)
    for _ in range(200):
        disk.pwrite(bytes(BLOCK), 7 * MIB)
        assert disk.pread(BLOCK, 7 * MIB) == bytes(BLOCK)
    traffic.end()
    for _ in range(200):
        assert disk.pread(BLOCK, 7 * MIB) == bytes(BLOCK)


def test_two_disks_of_one_connection(start: Callable[..., Program], clients: Attach) -> None:
    """One front end takes the answers for both; the other goes on when that one has gone."""
    lists = {"req": unique("req"), "resp": unique("resp"), "buffer": unique("buf")}
    start("modprobe", "muenblock-server", f"connections=1:{':'.join(lists.values())}", "device=ram:8M:1,ram:8M:1")
    made = clients(lists)
    assert len(made.devices) == 2
    first, second = (Traffic(device, 4) for device in made.devices)
    first.moves_on()
    second.moves_on()
    assert made.engine.attended
    first.end()
    made.clients._detach(made.clients.disks[0])
    made.clients.disks = made.clients.disks[1:]
    for _ in range(3):
        second.moves_on(2.0)
    second.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_a_server_that_comes_back(serve: Serve, lists: dict[str, str], clients: Attach, number: signal.Signals,
                                  tmp_path: object) -> None:
    """Under traffic, five times: nothing is lost, nobody fails, the front end takes the answers of each life."""
    image = f"{tmp_path}/image"
    with open(image, "wb") as file:
        file.truncate(8 * MIB)
    server = serve(lists, image)
    made = clients(lists)
    traffic = Traffic(made.devices[0])
    for _ in range(5):
        eventually(lambda: made.engine.attended)
        traffic.moves_on()
        server.end(number)
        server = serve(lists, image)
        traffic.moves_on(20.0)
    traffic.end()


def test_channels_that_are_made_anew(serve: Serve, lists: dict[str, str], clients: Attach, tmp_path: object) -> None:
    """Twice, without traffic in between: the bell's next memory may stand where the first one's did, and is waited for."""
    image = f"{tmp_path}/image"
    with open(image, "wb") as file:
        file.truncate(8 * MIB)
    server = serve(lists, image)
    made = clients(lists)
    Paced(made, 50).run()
    for life in range(2, 4):
        eventually(lambda: not made.engine.attended)
        server.end(signal.SIGKILL)
        for name in lists.values():
            for path in (f"/dev/shm/{name}", f"/dev/shm/{name}.bell"):
                if os.path.exists(path):
                    os.unlink(path)
        server = serve(lists, image)
        eventually(lambda life=life: made.engine.counters["lives"] == life)  # type: ignore[misc]
    Paced(made, 400).run()


@pytest.fixture
def strict_lists() -> Iterator[dict[str, str]]:
    """Channels that are there, as strict one-way needs them."""
    lists = {"req": unique("req"), "resp": unique("resp")}
    assert run("chan", "create", *lists.values()).returncode == 0
    yield lists
    assert run("chan", "rm", *lists.values()).returncode == 0


def test_a_server_that_does_not_ring(strict_lists: dict[str, str], start: Callable[..., Program], clients: Attach) -> None:
    """Its answers are the client's own thread's, which is not asked away from them for each request."""
    lists = strict_lists
    start("blk", "--req", lists["req"], "--resp", lists["resp"], "--device", "ram:8M", "--strict-oneway")
    attached = clients(lists)
    connection = attached.clients.disks[0].device.connection
    turns = connection.client = Turns(attached.engine)
    try:
        Paced(attached, 50).run()       # from then on all turns are counted
        before = turns.n
        Paced(attached, 500, 0).run()
        assert not attached.engine.attended
        assert turns.n - before < 250   # one for each tick, not two for each request
    finally:
        connection.client = attached.engine


def test_waits_are_counted(serve: Serve, lists: dict[str, str], clients: Attach) -> None:
    """Those for one of the request objects, all of which a server that stands still has; and all go on afterwards."""
    server = serve(lists, "ram:8M")
    made = clients(lists)
    disk = made.clients.disks[0].front.disk
    before = disk.counters["waits"]     # now: the one that the stop meets may have begun
    traffic = Traffic(made.devices[0], 80, 16)
    try:
        eventually(lambda: made.engine.attended)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            eventually(lambda: disk.in_flight == 64)
            eventually(lambda: disk.counters["waits"] > before)
            assert made.engine.attended
        finally:
            os.kill(server.pid, signal.SIGCONT)
        traffic.moves_on()
    finally:
        traffic.end()


def test_an_end_is_not_held_up(serve: Serve, lists: dict[str, str], clients: Attach) -> None:
    """The device's users get errors, soon, when its connection fails while the front end takes the answers and a server
    that stands still gives none."""
    server = serve(lists, "ram:8M")
    made = clients(lists)
    traffic = Traffic(made.devices[0])
    eventually(lambda: made.engine.attended)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        eventually(lambda: made.engine.in_flight > 0)
        start = time.monotonic()
        made.clients.disks[0].device.fail("the test says so")
        assert time.monotonic() - start < 1.0
        eventually(lambda: len(traffic.problems) == len(traffic.done), 5.0)
        assert all("EIO" in problem or "Input/output error" in problem for problem in traffic.problems)
        traffic.problems.clear()
        traffic.end()
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_an_aborted_front_end_under_traffic(serve: Serve, lists: dict[str, str], clients: Attach) -> None:
    """Its thread ends, with answers of the server's still to come, and the answers are the client's own again."""
    serve(lists, "ram:8M")
    made = clients(lists)
    traffic = Traffic(made.devices[0])
    eventually(lambda: made.engine.attended)
    front = made.clients.disks[0].front
    front.disk.abort()
    eventually(lambda: front.failed)
    eventually(lambda: len(traffic.problems) == len(traffic.done))
    traffic.problems.clear()
    traffic.end()
    eventually(lambda: not made.engine.attended and front.disk.in_flight == 0)
    assert made.clients.disks[0].device.pread(BLOCK, 0) is not None


def test_what_no_flush_covers(serve: Serve, lists: dict[str, str], clients: Attach) -> None:
    """A flush that fails costs somebody's data only where a change was answered since the last good one, or is under way:
    a read that the server has, or the flush's own answer on its way, is none."""
    server = serve(lists, "ram:8M")
    made = clients(lists)
    disk = made.clients.disks[0].front.disk
    fd = os.open(made.devices[0], os.O_RDWR | os.O_DIRECT)

    def begin(call: Callable[[int, list[mmap.mmap], int], int]) -> threading.Thread:
        def run() -> None:
            with mmap.mmap(-1, BLOCK) as page:
                assert call(fd, [page], 4 * MIB) == BLOCK
        before = disk.in_flight
        thread = threading.Thread(target=run)
        thread.start()
        eventually(lambda: disk.in_flight == before + 1)
        return thread

    threads = []
    try:
        with mmap.mmap(-1, BLOCK) as page:
            os.pwritev(fd, [page], 0)
        assert disk.unflushed
        os.fsync(fd)
        assert not disk.unflushed
        os.kill(server.pid, signal.SIGSTOP)
        threads.append(begin(os.preadv))
        assert not disk.unflushed
        threads.append(begin(os.pwritev))
        assert disk.unflushed
    finally:
        os.kill(server.pid, signal.SIGCONT)
        for thread in threads:
            thread.join(20)
        os.close(fd)
    assert not any(thread.is_alive() for thread in threads)
    assert disk.unflushed
