"""Either side is stopped between two of its memory accesses, goes on from there, is stopped there again and killed.

While it stands, the other side runs on; when it goes on, and when another takes its place, service resumes, and what
was lost in between is what was counted. The points are those of docs/protocol.md and docs/memory-model.md; see stops.py
for how a process comes to stand there.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import peer
import pytest
import stops
from conftest import Program, run
from helpers import eventually
from ring_program import PROTOCOL, element, number_of
from stops import ACCESS, WRITE
from test_blk_life import BLOCKS, Link, Load, _holds

from muenfast import Reader, control, open_reader, open_writer

REASON = stops.available()
pytestmark = [pytest.mark.stress, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

SIZE, ELEMENTS = 1520, 32
REGION = 64 + SIZE * ELEMENTS
EPOCH, WSC, WC = 8, 48, 56
SEQ, WAITERS = 8, 12    # in the bell
PAUSE = 0.03            # seconds that the other side runs while one stands


def child(code: str, *words: str) -> subprocess.Popen[str]:
    """A Python program, once it has said `ready`."""
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, cwd=Path(__file__).parent)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def over(process: subprocess.Popen[str]) -> str:
    """Lets a program that waits for the end of its standard input end; what it said."""
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return said


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=30)


# ------------------------------------------------------------------ a writer

_WRITER = f"""
import signal, sys, time
from ring_program import PROTOCOL, element
from muenfast import open_writer
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with open_writer(sys.argv[1], size={SIZE}, protocol=PROTOCOL, region_size={REGION}) as writer:
    print("ready", flush=True)
    while not stopped:
        for first in range(0, 90, 9):
            writer.write(element(writer.written, {SIZE}))
            writer.write_many(b"".join(element(writer.written + k, {SIZE}) for k in range(8)))
        if not stopped and sys.argv[2] == "lives":
            time.sleep(0.001)   # readers come to the end of this life
            writer.activate()
    print(writer.written, flush=True)
    sys.stdin.read()
"""


class Follower:
    """A reader's books, per epoch of the writer: each element whole and in its place, the others lost."""

    def __init__(self, read: Callable[[], tuple[str, bytes | None, int, int]]) -> None:
        self._read = read   # (result, element, position, lost so far) of one read
        self.delivered = self.lost = self._before = self.total = self.epochs = 0

    def step(self) -> str:
        result, data, position, lost = self._read()
        if result == "SUCCESS":
            assert data is not None and number_of(data) == position - 1, "an element of another place or life"
            self.delivered += 1
            self.total += 1
        elif result == "OVERRUN_DETECTED":
            self.lost = lost - self._before
        elif result == "EPOCH_CHANGED":
            self.delivered = self.lost = 0
            self._before = lost
            self.epochs += 1
        else:
            assert result in ("NO_DATA", "INACTIVE")
        if result in ("SUCCESS", "OVERRUN_DETECTED"):
            assert self.delivered + self.lost == position, "losses that nobody counted"
        return result

    def settle(self) -> None:
        """Reads until there is nothing more; a writer that stands comes to that within one ring."""
        for _ in range(4 * ELEMENTS):
            if self.step() in ("NO_DATA", "INACTIVE"):
                return
        raise AssertionError("a writer that stands still delivers on and on")


def of_muenfast(reader: Reader) -> Follower:
    def read() -> tuple[str, bytes | None, int, int]:
        data = reader.read()
        return reader.result.name, data, reader.position, reader.counters["lost"]

    return Follower(read)


def of_peer(reader: peer.ChannelReader) -> Follower:
    def read() -> tuple[str, bytes | None, int, int]:
        result, data = reader.read()
        if result == "EPOCH_CHANGED" and not reader.synchronised:
            return "INACTIVE", None, 0, reader.lost     # the epoch moved under its eyes: it looks again
        return result.value, data, reader.rc, reader.lost

    return Follower(read)


@contextmanager
def sleeper(path: str) -> Iterator[None]:
    """A reader that has announced its sleep, again and again: the writer rings."""
    over = threading.Event()

    def announce() -> None:
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as page, memoryview(page) as view, \
                view[:16].cast("I") as words:
            while not over.wait(0.0005):
                words[WAITERS // 4] = 1

    thread = threading.Thread(target=announce)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# By name: part (region or bell), offset, bytes, which access counts, whether the writer starts anew time and again.
WRITER_POINTS = {
    "WSC raised": ("", WSC, 8, 1, False),
    "amid the copy": ("", 64 + 9 * SIZE + SIZE // 2, 8, 1, False),
    "WC raised, before the bell": ("", WC, 8, 1, False),
    "waiters taken back, before seq": (".bell", WAITERS, 4, 1, False),
    "seq raised, before the wake-up": (".bell", SEQ, 4, 1, False),
    "epoch 0, before the zeroing": ("", EPOCH, 8, 1, True),
    "amid the zeroing": ("", 64 + (ELEMENTS - 1) * SIZE, 8, 3, True),
    "header written, before the epoch": ("", WC, 8, 91, True),
    "new epoch, before the bell": ("", EPOCH, 8, 2, True),
}


@pytest.mark.parametrize("point", WRITER_POINTS)
def test_a_writer_that_stands(names: Callable[[str], str], point: str) -> None:
    """Readers of both kinds read what was complete, then find nothing, and never wait for it; after SIGCONT and after
    kill -9 and another writer they read on, and every element of each life was delivered or counted."""
    part, offset, length, nth, lives = WRITER_POINTS[point]
    name, mode = names("writer"), "lives" if lives else "one"
    path = f"/dev/shm/{name}"
    with ExitStack() as stack:
        reader = stack.enter_context(open_reader(name, protocol=PROTOCOL, region_size=REGION))
        process = child(_WRITER, name, mode)
        stack.callback(lambda: killed(process))
        stack.enter_context(sleeper(path + ".bell"))
        plain = peer.ChannelReader(name, PROTOCOL, SIZE)
        stack.callback(plain.close)
        followers = [of_muenfast(reader), of_peer(plain)]

        def go_on(least: int = 50) -> None:
            before, end = [one.total for one in followers], time.monotonic() + 90
            while any(one.total - was < least for one, was in zip(followers, before, strict=True)):
                assert time.monotonic() < end, "nothing more is delivered"
                for one in followers:
                    one.step()

        def stands() -> contextlib.AbstractContextManager[None]:
            return stops.caught(process.pid, stops.mapped(process.pid, path + part) + offset, length, WRITE, nth)

        go_on()
        for fate in (signal.SIGCONT, signal.SIGKILL):
            with stands():
                for one in followers:
                    one.settle()
                before = time.monotonic()
                assert reader.wait(PAUSE) is False and time.monotonic() - before < 10
                assert [one.step() for one in followers] in (["NO_DATA"] * 2, ["INACTIVE"] * 2)
                if fate == signal.SIGKILL:
                    killed(process)
                    for one in followers:
                        one.settle()
            if fate == signal.SIGKILL:
                epochs = [one.epochs for one in followers]
                process = child(_WRITER, name, "one")
            go_on()
        assert all(one.epochs > before for one, before in zip(followers, epochs, strict=True))
        process.terminate()
        assert process.stdout is not None
        written = int(process.stdout.readline())
        for one in followers:
            eventually(lambda: one.step() == "NO_DATA")
            assert one.delivered + one.lost == written
        over(process)


# ------------------------------------------------------------------ a reader

_READER = """
import select, sys
from ring_program import PROTOCOL, number_of
from muenfast import Result, open_reader
room = memoryview(bytearray(4 * 1520))
delivered = lost = 0
with open_reader(sys.argv[1], protocol=PROTOCOL) as reader:
    reader.read()
    assert reader.result is Result.EPOCH_CHANGED
    reader.drain()
    skipped = reader.position
    print("ready", flush=True)
    while True:
        reader.wait(0.05)
        last = bool(select.select([0], [], [], 0)[0])
        count = reader.read_many_into(room)
        if reader.result is Result.SUCCESS:
            for k in range(count):
                assert number_of(room[k * 1520:(k + 1) * 1520]) == reader.position - count + k
            delivered += count
        elif reader.result is Result.OVERRUN_DETECTED:
            lost += reader.lost
        elif last:
            break
    assert reader.result is Result.NO_DATA and lost == reader.counters["lost"]
    print(skipped, delivered, lost, flush=True)
"""

# By name: part, offset, bytes, kind, which access counts.
READER_POINTS = {
    "WC loaded": ("", WC, 8, ACCESS, 1),
    "amid the copy": ("", 64 + 9 * SIZE + SIZE // 2, 8, ACCESS, 1),
    "copied, WSC loaded": ("", WSC, 8, ACCESS, 1),
    "epoch loaded": ("", EPOCH, 8, ACCESS, 3),
    "waiters set, before the sleep": (".bell", WAITERS, 4, WRITE, 1),
    "its read counter told": (".bell", 64, 8, WRITE, 1),
}


@pytest.mark.parametrize("point", READER_POINTS)
def test_a_reader_that_stands(names: Callable[[str], str], point: str) -> None:
    """The writer never waits for it: it overwrites all the reader has not read, and the reader, let go on, counts that
    to the element. A killed one's successor reads on, and the writer has noticed nothing."""
    part, offset, length, kind, nth = READER_POINTS[point]
    name = names("reader")
    path = f"/dev/shm/{name}"
    pause, ended = threading.Lock(), threading.Event()
    with open_writer(name, size=SIZE, protocol=PROTOCOL, region_size=REGION) as writer, ExitStack() as stack:
        def write() -> None:
            while not ended.wait(0.0003):
                with pause:
                    writer.write(element(writer.written, SIZE))

        thread = threading.Thread(target=write)
        processes = [child(_READER, name)]
        stack.callback(lambda: [killed(one) for one in processes])
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)

        def stands() -> contextlib.AbstractContextManager[None]:
            pid = processes[-1].pid
            return stops.caught(pid, stops.mapped(pid, path + part) + offset, length, kind, nth)

        def overwrite() -> None:
            with pause:
                before = writer.written
                for _ in range(3 * ELEMENTS):
                    writer.write(element(writer.written, SIZE))
                assert writer.written == before + 3 * ELEMENTS

        with stands():
            overwrite()
        time.sleep(PAUSE)
        with stands():
            overwrite()
            processes.append(child(_READER, name))
            killed(processes[0])
        with stands():      # its successor: the first one's claim on `waiters` or place in the ring is nobody's
            overwrite()
        time.sleep(PAUSE)
        processes.append(child(_READER, name))
        with stands():
            overwrite()
        ended.set()
        thread.join()
        for process in processes[1:]:   # what stood still until now finds elements, too
            eventually(lambda: stops.state(process.pid) != "T")
        writer.write_many([element(writer.written + k, SIZE) for k in range(ELEMENTS // 4)])
        written = writer.written
        for process in processes[1:]:
            skipped, delivered, lost = map(int, over(process).split())
            assert skipped + delivered + lost == written
            assert lost >= 2 * ELEMENTS


# ------------------------------------------------------------------ a block server

EVENT = 4120
SLOT = 64 + 5 * EVENT   # of either ring; the window goes through all of them

# By name: channel (req or resp, or its bell), offset, bytes, kind, which access counts, whether a client connects.
SERVER_POINTS = {
    "request's header read": ("req", SLOT, 8, ACCESS, 1, False),
    "WSC of the requests loaded": ("req", WSC, 8, ACCESS, 2, False),
    "amid a write's data": ("req", SLOT + 24 + 2048, 8, ACCESS, 1, False),
    "WSC raised": ("resp", WSC, 8, WRITE, 1, False),
    "amid a read's data": ("resp", SLOT + 24 + 2048, 8, WRITE, 1, False),
    "answer's header stored": ("resp", SLOT, 8, WRITE, 1, False),
    "WC raised, before the bell": ("resp", WC, 8, WRITE, 1, False),
    "waiters taken back, before seq": ("resp.bell", WAITERS, 4, WRITE, 1, False),
    "waiters set, before the sleep": ("req.bell", WAITERS, 4, WRITE, 1, False),
    "inactive after its client": ("resp", EPOCH, 8, WRITE, 1, True),
    "new epoch, before the bell": ("resp", EPOCH, 8, WRITE, 3, True),
}


@pytest.fixture
def link(names: Callable[[str], str], program: Callable[..., Program]) -> Iterator[Link]:
    link = Link(names, program)
    yield link
    link.close()


def another_epoch(link: Link) -> None:
    """Makes the client connect anew: it finds that the server's epoch is not the one it knew."""
    with open(f"/dev/shm/{link.resp}", "r+b") as file, mmap.mmap(file.fileno(), 0) as page:
        struct.pack_into("=Q", page, EPOCH, 1)


def watching(pid: int, link: Link, point: tuple[str, int, int, int, int, bool]
             ) -> contextlib.AbstractContextManager[None]:
    channel, offset, length, kind, nth, connects = point
    path = f"/dev/shm/{channel.replace('req', link.req).replace('resp', link.resp)}"
    return stops.caught(pid, stops.mapped(pid, path) + offset, length, kind, nth,
                        provoke=(lambda: another_epoch(link)) if connects else None)


@pytest.mark.parametrize("point", SERVER_POINTS)
def test_a_server_that_stands(link: Link, names: Callable[[str], str], point: str) -> None:
    """Its client waits, and goes on when the server does, or another with the same disk: every call returns without
    error, nothing acknowledged is lost, nothing is torn."""
    where = SERVER_POINTS[point]
    store = f"ram:{BLOCKS * 4096}:{names('disk')}"
    server, device = link.server(store), link.device()
    load = Load(device)
    for fate in (signal.SIGCONT, signal.SIGKILL):
        seen = load.progress()
        eventually(lambda: load.progress() > seen + 100)
        with watching(server.pid, link, where):
            time.sleep(PAUSE)
            status = device.status()
            assert status["failure"] is None and not load.errors
            if fate == signal.SIGKILL:
                server.process.kill()
                server.end()
                server = link.server(store)
    seen = load.progress()
    eventually(lambda: load.progress() > seen + 100)
    load.end()
    assert not load.errors
    load.verify(device.pread(device.size, 0))
    counters = device.status()["counters"]
    assert counters["lives"] > 1 and counters["lost"] == counters["overruns"] == 0
    device.close()
    assert server.end()[0] == 0
    assert run("chan", "rm", store.rpartition(":")[2]).returncode == 0


# ------------------------------------------------------------------ a block client

_CLIENT = """
import os, random, struct, sys, threading
from muenfast import BlockDevice
device = BlockDevice(sys.argv[1], sys.argv[2], timeout=30)
os.write(1, b"ready\\n")
def work(first, version):
    dice, mine = random.Random(first), {}
    while True:
        i = dice.randrange(first, 256, 4)
        if dice.random() < 0.5:
            version += 1
            data = struct.pack("<Q", i << 32 | version) * 512
            device.pwrite(data, i * 4096)
            mine[i] = data
            os.write(1, struct.pack("<II", i, version))
        elif i in mine and device.pread(4096, i * 4096) != mine[i]:
            os._exit(3)
for first in range(4):
    threading.Thread(target=work, args=(first, int(sys.argv[3]))).start()
"""


class Client:
    """A client process under load, and what was acknowledged to it so far."""

    def __init__(self, link: Link, life: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", _CLIENT, link.req, link.resp, str(life << 24)],
                                        stdout=subprocess.PIPE, bufsize=0)
        self.acknowledged: dict[int, int] = {}
        self.count = 0
        out = self.process.stdout
        assert out is not None and out.read(6) == b"ready\n"
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        while data := self.process.stdout.read(1 << 16):
            rest += data
            whole = len(rest) // 8 * 8
            self.acknowledged.update(struct.iter_unpack("<II", rest[:whole]))
            self.count += whole // 8
            rest = rest[whole:]

    def busy(self, least: int = 50) -> None:
        """Until `least` writes more were acknowledged."""
        before = self.count
        eventually(lambda: self.process.poll() is not None or self.count >= before + least)
        assert self.process.poll() is None, "it found what it had not written"

    def kill(self) -> dict[int, int]:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self._thread.join()
        self.process.stdout.close()
        return self.acknowledged


CLIENT_POINTS = {
    "WSC raised": ("req", WSC, 8, WRITE, 1, False),
    "request's header stored": ("req", SLOT, 8, WRITE, 1, False),
    "amid a write's data": ("req", SLOT + 24 + 2048, 8, WRITE, 1, False),
    "WC raised, before the bell": ("req", WC, 8, WRITE, 1, False),
    "waiters taken back, before seq": ("req.bell", WAITERS, 4, WRITE, 1, False),
    "waiters set, before the sleep": ("resp.bell", WAITERS, 4, WRITE, 1, False),
    "answer's header read": ("resp", SLOT, 8, ACCESS, 1, False),
    "amid a read's data": ("resp", SLOT + 24 + 2048, 8, ACCESS, 1, False),
    "WSC of the answers loaded": ("resp", WSC, 8, ACCESS, 1, False),
    "read counter told": ("resp.bell", 64, 8, WRITE, 1, False),
    "epoch 0, before the server follows": ("req", EPOCH, 8, WRITE, 1, True),
    "epoch 0, before the zeroing": ("req", EPOCH, 8, WRITE, 2, True),
    "new epoch, before `size`": ("req", EPOCH, 8, WRITE, 3, True),
}


@pytest.mark.parametrize("point", CLIENT_POINTS)
def test_a_client_that_stands(link: Link, names: Callable[[str], str], point: str) -> None:
    """The server answers whoever asks for its state, and goes on when the client does; after its death the next client
    is served at once: no write that was acknowledged is lost, no block is torn."""
    where = CLIENT_POINTS[point]
    store = f"ram:{BLOCKS * 4096}:{names('disk')}"
    server, client = link.server(store), Client(link, 0)
    try:
        for fate in (signal.SIGCONT, signal.SIGKILL):
            client.busy()
            with watching(client.process.pid, link, where):
                time.sleep(PAUSE)
                [entry] = control.ask(server.pid, {"command": "status"})["entries"]
                assert entry["counters"]["overruns"] == entry["counters"]["lost"] == 0
                # A client that begins anew takes back what the server may be executing: up to 4 requests, twice.
                assert entry["counters"]["torn"] <= (8 if where[-1] else 0)
                if fate == signal.SIGKILL:
                    client.kill()
        acknowledged = dict(client.acknowledged)
        client = Client(link, 1)
        client.busy()
        acknowledged |= client.kill()
    finally:
        client.kill()
    device = link.device()
    _holds(device.pread(device.size, 0), acknowledged)
    device.close()
    assert server.end()[0] == 0
    assert run("chan", "rm", store.rpartition(":")[2]).returncode == 0
