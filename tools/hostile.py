"""usage: tools/hostile.py [--minutes N] [--seed S] [--role server|client|both] [--shm] [--phase SECONDS] [--within SECONDS]

A hostile peer against muenfast's block server and against its client, for N (10) minutes, both at once. Phase by phase
it does one thing that no protocol allows, or all of them, at full speed and for about SECONDS (5), or rings both bells as
fast as a program in C can meanwhile (tests/c/ringer.c); then it becomes honest, and service has to be back within a
second. The peer shares no code with muenfast (tests/peer.py).

Hostile to the server: `muenfast blk` with two exports, of RAM, or with an odd seed one of a file; the peer is the client
of that, a BlockDevice uses the other all the time and must notice nothing. Hostile to the client: a process with four
threads that call a BlockDevice; one that the hostile peer has driven to fail for good (another size: docs/operations.md)
is replaced by a new one, as a user would. The peer writes to its own region and to both bells.

With --shm all that over a shared buffer, to which the peer writes and which it truncates, too. The hostile export has
two disks then, of which with an odd seed the second one is the file.

Checked: no process ends or stands still, resident memory and descriptors stay bounded, service is back in time (from
the first store of the honest peer to the first block that was written and read back), everything honest was
executed once and reads back after every later attack, and every request and answer is found in the counters of who
got it. The seed decides what is done in which order; the moments are the machine's. Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import peer  # noqa: E402
from helpers import compiled  # noqa: E402

from muenfast import BlockDevice, MuenfastError, UsageError, control  # noqa: E402

BLOCK = peer.BLOCK_BYTES
U64 = (1 << 64) - 1
BLOCKS = 256
OURS = range(1, 128)    # blocks of the honest phases: no hostile request names one (0 is what zeroed slots name)
HEAD = struct.Struct("<IiQII")
REQUEST, RESPONSE = struct.Struct("<HHIQQQ"), struct.Struct("<HHIQ")
MODES = ("header", "counters", "epochs", "elements", "bell", "ring", "flood", "truncate", "stop", "everything")
BUFFER_MODES = (*MODES, "buffer")
PATIENCE = 30.0         # seconds for an answer of our own programs
MORE_MEMORY = 24 << 20  # bytes that a process may grow by after its first two phases
MORE_FILES = 8


class Failed(Exception):
    """A check."""


# Protocol, bytes of an element, bytes of the region: of the request channel, and of the response channel.
Wire = tuple[tuple[int, int, int], tuple[int, int, int]]
INLINE: Wire = ((peer.REQUEST_PROTOCOL, peer.EVENT_BYTES, peer.INLINE_REGION_BYTES),
                (peer.RESPONSE_PROTOCOL, peer.EVENT_BYTES, peer.INLINE_REGION_BYTES))
SHARED: Wire = ((peer.BUFFER_PROTOCOL, peer.BUFFER_REQUEST_BYTES, peer.BUFFER_REQUEST_REGION_BYTES),
                (peer.BUFFER_PROTOCOL, peer.BUFFER_RESPONSE_BYTES, peer.BUFFER_RESPONSE_REGION_BYTES))


# ------------------------------------------------------------------ the attack, a process of its own

@contextlib.contextmanager
def ringing(*bells: str) -> Iterator[None]:
    """Meanwhile tests/c/ringer.c rings these files. It ends with us, in whatever way."""
    with tempfile.TemporaryDirectory() as place:    # gone as soon as it runs: we may be killed
        ringer = subprocess.Popen([compiled("ringer", Path(place), "-O2"), *bells], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        assert ringer.stdout is not None
        begun = ringer.stdout.readline()
    try:
        if begun != "ready\n":
            raise Failed("the ringer does not ring")
        yield
        if int(ringer.communicate(timeout=PATIENCE)[0]) == 0:
            raise Failed("the ringer did not ring")
    finally:
        ringer.kill()
        ringer.communicate()


class Attack:
    """What the peer does to its own region and the bells. Every act is short; none returns anything."""

    def __init__(self, role: str, req: str, resp: str, seed: int, wire: Wire) -> None:
        self.role, self.dice = role, random.Random(seed)
        self.own = req if role == "server" else resp
        self.protocol, self.size, self.region = wire[self.own == resp]
        self.count = (self.region - peer.HEADER_BYTES) // self.size
        self.fd = os.open(peer.channel_path(self.own), os.O_RDWR)
        self.memory = mmap.mmap(self.fd, 0)
        self.view = memoryview(self.memory)
        self.words = self.view[:64].cast("Q")
        self.bell_paths = [peer.channel_path(name) + ".bell" for name in (req, resp)]
        self.bell_fds = [os.open(path, os.O_RDWR) for path in self.bell_paths]
        self.bells = [mmap.mmap(fd, 4096) for fd in self.bell_fds]
        self.requests = mmap.mmap(os.open(peer.channel_path(req), os.O_RDONLY), 0, prot=mmap.PROT_READ)
        self.cuts = [(self.fd, self.region), (self.fd, self.region), *((fd, 4096) for fd in self.bell_fds)]
        n, size = self.count, self.size
        self.odd = [0, 1, 2, n - 1, n, n + 1, size - 1, size, size + 1, 1 << 31, 1 << 32, 1 << 52, (1 << 63) - 1, 1 << 63,
                    U64 - 1, U64]
        self.published = 0
        # What an honest client left in the slots would be executed again, rightly, once a counter says that it is new.
        self.words[peer.EPOCH] = 0
        self.clear()

    def clear(self) -> None:
        """Slots that ask for nothing."""
        self.view[64:] = bytes(self.region - 64)

    def any64(self) -> int:
        return self.dice.choice(self.odd) if self.dice.random() < 0.5 else self.dice.getrandbits(64)

    def start(self, epoch: int) -> None:
        """An epoch as it should be, from its first element on."""
        w = self.words
        w[peer.EPOCH] = 0
        w[peer.TRANSPORT], w[peer.PROTOCOL], w[peer.SIZE], w[peer.ELEMENTS] = (
            peer.TRANSPORT_ID, self.protocol, self.size, self.count)
        w[peer.RESERVED] = w[peer.WSC] = w[peer.WC] = 0
        w[peer.EPOCH] = epoch
        self.published = 0

    def event(self) -> bytes:
        """A header: at times a good one. No read or write of one of OURS."""
        dice = self.dice
        if self.role == "client" and dice.random() < 0.7:      # an answer to what was asked lately
            (wc,) = struct.unpack_from("<Q", self.requests, 8 * peer.WC)
            at = 64 + (wc - dice.randint(1, 16)) % self.count * self.size
            kind, _, number, valid, priv = HEAD.unpack_from(self.requests, at)
            return HEAD.pack(kind, dice.choice((0, 0, 0, -5, 7)), number, valid,
                             priv + dice.choice((0, 0, 1, 5)) & 0xFFFFFFFF)
        kind = dice.choice((0, 0, 1, 1, 2, 2, 3, 0xFFFFFFFF))
        number = dice.choice((dice.randrange(128, BLOCKS), dice.randrange(128, BLOCKS), BLOCKS, 1 << 62, U64))
        if kind == 2:
            number = dice.choice((0, 1, 1, 2, U64))
        return HEAD.pack(kind, dice.choice((0, 0, -5, 5, -(1 << 31))), number, dice.choice((1, 1, 1, 0, 2)),
                         dice.choice((0, 1, dice.getrandbits(32))))

    def slot(self, number: int) -> None:
        at = 64 + number % self.count * self.size
        self.view[at:at + HEAD.size] = event = self.event()
        if self.dice.random() < 0.02:
            self.view[at + 24:at + 32] = self.any64().to_bytes(8, "little")
        elif event[:4] == b"\2\0\0\0":       # so that a client goes on to where it sends requests
            self.view[at + 24:at + 32] = (BLOCKS * BLOCK // peer.SECTOR_BYTES).to_bytes(8, "little")

    def publish(self, n: int) -> None:
        """n elements as they should be published, whatever stands in them."""
        self.words[peer.WSC] = self.published + n & U64
        for k in range(min(n, self.count)):
            self.slot(self.published + k)
        self.published = self.published + n & U64
        self.words[peer.WC] = self.published

    # -------------------------------------------------------------- one act of each mode

    def header(self) -> None:
        if self.dice.random() < 0.05:
            self.start(self.dice.choice((1, 2, self.dice.getrandbits(64) or 1)))
        self.words[self.dice.randrange(8)] = self.any64()

    def counters(self) -> None:
        w, dice = self.words, self.dice
        if dice.random() < 0.02 or w[peer.EPOCH] == 0:
            self.start(dice.choice((1, 1, 2, dice.getrandbits(64) or 1)))
        act = dice.random()
        if act < 0.5:
            w[peer.WSC] = w[peer.WC] = w[peer.WC] + dice.choice((1, 1, 2, 64, self.count, self.count + 1, U64,
                                                                          U64 - 3)) & U64
            self.slot(w[peer.WC])
        else:
            w[dice.choice((peer.WSC, peer.WC))] = self.any64()

    def epochs(self) -> None:
        dice = self.dice
        self.words[peer.EPOCH] = dice.choice((0, 1, 1, 2, dice.getrandbits(64)))
        if dice.random() < 0.3:
            self.start(dice.choice((1, 2, dice.getrandbits(64) or 1)))
            self.publish(dice.randrange(1, 8))

    def elements(self) -> None:
        if self.words[peer.EPOCH] == 0 or self.dice.random() < 0.001:
            self.start(self.dice.getrandbits(64) or 1)
        self.publish(self.dice.randrange(1, 20))
        for _ in range(20):     # what was published is changed under the eyes of its reader
            self.slot(self.published - self.dice.randrange(1, 30))

    def bell(self) -> None:
        if self.words[peer.EPOCH] == 0:
            self.start(self.dice.getrandbits(64) or 1)
        for page in self.bells:
            for _ in range(20):
                value = self.dice.choice((self.any64(), self.words[peer.EPOCH]))
                struct.pack_into("<Q", page, 8 * self.dice.randrange(16), value)
        self.publish(self.dice.randrange(1, 4))

    def flood(self) -> None:
        if self.words[peer.EPOCH] == 0:
            self.start(self.dice.getrandbits(64) or 1)
        self.publish(self.dice.choice((1, 1, 2, 5, 20, 60)))

    def truncate(self) -> None:
        """Never touches its own mapping while that is short."""
        dice = self.dice
        fd, length = dice.choice(self.cuts)
        os.ftruncate(fd, dice.choice((0, 0, 4096, 65536)) % length)
        time.sleep(dice.choice((0, 0.001, 0.05, 0.3)))
        os.ftruncate(fd, length)
        self.start(dice.getrandbits(64) or 1)
        end = time.monotonic() + dice.choice((0.01, 0.3))
        while time.monotonic() < end:
            self.publish(dice.randrange(1, 5))
            time.sleep(0.001)

    def ring(self) -> None:
        """While the ringer is at it, see run()."""
        getattr(self, self.dice.choice(self.mixed))()

    mixed: tuple[str, ...] = ("header", "counters", "epochs", "elements", "bell", "flood")
    stop = elements     # and who watches over us sends SIGSTOP at any moment

    def everything(self) -> None:
        getattr(self, self.dice.choice(self.mixed))()
        if self.dice.random() < 0.001:
            self.truncate()

    def run(self, mode: str, seconds: float) -> None:
        if mode == "ring":
            with ringing(*self.bell_paths):
                self.play(mode, seconds)
        else:
            self.play(mode, seconds)
        print(self.published, flush=True)

    def play(self, mode: str, seconds: float) -> None:
        act = getattr(self, mode)
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            paced = int(now * 10) % 3 > 0   # in two of three tenths of a second the victim can keep up
            for _ in range(20):
                act()
                if paced:
                    time.sleep(0.0005)


class BufferAttack(Attack):
    """The same over a shared buffer, to which the peer may write at any time.

    No mixture of two hostile requests, nor of one and an empty slot, names one of OURS: all begin behind them.
    """

    # The lower halves of offsets beyond the disk are beyond OURS, too: no mixture of two words is anything else.
    FAR = (BLOCKS * BLOCK, 1 << 31, 1 << 32 | 1 << 31, 1 << 63 | 1 << 31, U64 - BLOCK + 1, U64)

    def __init__(self, role: str, req: str, resp: str, seed: int, wire: Wire, buffer: str) -> None:
        self.exact = False      # each request in one counter only
        super().__init__(role, req, resp, seed, wire)
        self.buffer_fd = os.open(peer.channel_path(buffer), os.O_RDWR)
        self.payload = memoryview(mmap.mmap(self.buffer_fd, 0))
        self.cuts += [(self.buffer_fd, len(self.payload))] * 2

    def clear(self) -> None:
        if self.role == "server":
            self.view[64:] = REQUEST.pack(0, 0, 0, 0, OURS.stop * BLOCK, 0) * self.count
        else:
            super().clear()

    def slot(self, number: int) -> None:
        at = 64 + number % self.count * self.size
        self.view[at:at + self.size] = self.request() if self.role == "server" else self.answer()

    def request(self) -> bytes:
        """At times a good one."""
        dice = self.dice
        kind = dice.choice((1, 1, 1, 2, 2, 2, 3, 4, 5, 0, 0x10, 0x11, 0x19, 0x1A, 0x1B, 0x1F, 6, 0xFFFF))
        device = dice.choice((0, 0, 1, 1, 2, 0xFFFF))
        length = dice.choice((BLOCK, BLOCK, 2 * BLOCK, 16 * BLOCK, 128 * BLOCK, 0, 1, BLOCK - 1, self.any64()))
        inside = dice.randrange(OURS.stop, BLOCKS) * BLOCK
        start = dice.choice((inside, inside, inside, inside + 1, dice.choice(self.FAR)))
        place = dice.choice((dice.randrange(64) * BLOCK, dice.randrange(4096) * BLOCK, 1, self.any64()))
        if self.exact and kind == peer.SYNC:
            device &= 1
        elif self.exact and kind == peer.GET_SMART:
            length = place = 0
        return REQUEST.pack(kind, device, dice.choice((0, 1, dice.getrandbits(32))), length, start, place)

    def answer(self) -> bytes:
        """To what was asked lately, at times as an honest server would, so that the client goes on."""
        dice = self.dice
        (wc,) = struct.unpack_from("<Q", self.requests, 8 * peer.WC)
        kind, device, tag, *_ = REQUEST.unpack_from(self.requests,
                                                    64 + (wc - dice.randint(1, 16)) % self.asked * REQUEST.size)
        status = {peer.MEDIA_BLOCKS: BLOCKS, peer.BLOCK_LENGTH: BLOCK, peer.MAX_REQUESTS: self.count,
                  peer.MAX_BLOCKS_COUNT: 8, peer.MAX_DEVICES: 1}.get(kind, dice.choice((0, 0, 0, 1, 5, 4095, 4096, U64)))
        turn = dice.random()
        if turn < 0.02:
            status = self.any64()
        elif turn < 0.04:
            kind, device, tag = dice.getrandbits(16), dice.getrandbits(16), dice.getrandbits(32)
        elif turn < 0.2:
            tag = tag + dice.choice((1, 5, U64)) & 0xFFFFFFFF
        return RESPONSE.pack(kind, device, tag, status)

    @property
    def asked(self) -> int:
        """Elements of the request channel."""
        return (len(self.requests) - peer.HEADER_BYTES) // REQUEST.size

    def buffer(self) -> None:
        if self.words[peer.EPOCH] == 0:
            self.start(self.dice.getrandbits(64) or 1)
        self.publish(self.dice.randrange(1, 8))
        for _ in range(20):
            length = self.dice.choice((1, 8, 4096, 40000))
            at = self.dice.randrange(self.dice.choice((1 << 18, len(self.payload))) - length)
            self.payload[at:at + length] = self.dice.randbytes(8)[:1] * length

    def run(self, mode: str, seconds: float) -> None:
        self.exact = mode == "flood"
        super().run(mode, seconds)

    mixed = (*Attack.mixed, "buffer")


# ------------------------------------------------------------------ the user of a client, a process of its own

class User:
    """Threads that write and read through a BlockDevice; obeys lines of JSON on standard input."""

    THREADS = 4

    def __init__(self, req: str, resp: str, buffer: str = "") -> None:
        self.names, self.buffer = (req, resp), buffer or None
        self.device: BlockDevice | None = None
        self.mode, self.phase = "pause", 0
        self.calls = self.errors = self.given_up = 0
        self.past = dict.fromkeys(("stale", "lost", "overruns", "progress"), 0)    # of devices that were given up
        self.wrong: list[str] = []
        self.acknowledged: dict[int, str] = {}
        self.good: dict[int, float] = {}    # by thread: when it first read back what it wrote, in this phase
        self.busy: dict[int, float] = {}    # by thread: since when it has been in a call
        self.quit = False

    def open(self) -> None:
        """Keeps a device open as long as it is any good."""
        while not self.quit:
            device = self.device
            if device is None or device.failure is not None:
                if device is not None:
                    self.given_up += 1
                    self.device = None
                    for name, value in self.counters(device).items():
                        self.past[name] += value
                    device.close()
                with contextlib.suppress(MuenfastError, OSError):   # a truncated region cannot be mapped
                    self.device = BlockDevice(*self.names, shm=self.buffer, timeout=0, same_store=True)
            time.sleep(0.005)

    @staticmethod
    def counters(device: BlockDevice) -> dict[str, int]:
        counters = device.client.counters
        return {"progress": device.client.progress, **{name: counters[name] for name in ("stale", "lost", "overruns")}}

    def work(self, who: int) -> None:
        dice = random.Random(who)
        serial = 0
        while not self.quit:
            mode, phase, device = self.mode, self.phase, self.device
            if mode == "pause" or device is None or device.size != BLOCKS * BLOCK and mode == "honest":
                time.sleep(0.002)
                continue
            i = dice.randrange(who, BLOCKS, self.THREADS)
            serial += 1
            data = struct.pack("<IIII", who, serial, phase, os.getpid()) * (BLOCK // 16)
            self.calls += 1
            self.busy[who] = time.monotonic()
            try:
                device.pwrite(data, i * BLOCK)
                found = device.pread(BLOCK, i * BLOCK)
            except (OSError, UsageError):   # UsageError: beyond a disk that was lied about, or closed meanwhile
                self.errors += 1
                time.sleep(0.002)
                continue
            finally:
                del self.busy[who]
            if mode != "honest" or self.phase != phase:
                continue
            if found == data:
                self.good.setdefault(who, time.monotonic())
                self.acknowledged[i] = data[:16].hex()
            elif who in self.good:
                self.wrong.append(f"block {i}: {found[:16].hex()} instead of {data[:16].hex()}")

    def report(self) -> dict[str, Any]:
        now = time.monotonic()
        device = self.device
        own = self.past if device is None else {name: value + self.past[name]
                                                for name, value in self.counters(device).items()}
        return {"calls": self.calls, "errors": self.errors, "given_up": self.given_up, "wrong": self.wrong,
                "good": self.good, "busy": max([now - since for since in list(self.busy.values())], default=0.0),
                "counters": own, "acknowledged": self.acknowledged, "failure": device and device.failure}

    def run(self) -> None:
        threads = [threading.Thread(target=self.work, args=(who,)) for who in range(self.THREADS)]
        threads.append(threading.Thread(target=self.open))
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            order = line.strip()
            if order == "honest":
                self.phase += 1
                self.acknowledged, self.good = {}, {}
                self.mode = order
            elif order in ("hostile", "pause"):
                self.mode = order
            print(json.dumps(self.report()), flush=True)
        self.quit = True
        if self.device is not None:
            self.device.fail("the end")
        for thread in threads:
            thread.join()
        if self.device is not None:
            self.device.close()


# ------------------------------------------------------------------ the honest server

class HonestServer(peer.InlineServer):
    """Sends `junk` answers nobody asked for when told, and counts them."""

    junk = 0

    def _send(self, answer: peer.Event) -> None:
        if self.junk:
            self.junk -= 1
            self._resp.write(answer._replace(priv=answer.priv ^ 0x80000000, data=b"\xee" * BLOCK).pack())
        super()._send(answer)


class HonestBufferServer(peer.BufferServer):
    """The same over a shared buffer."""

    junk = 0

    def _send(self, answer: peer.BufferResponse) -> None:
        if self.junk:
            self.junk -= 1
            self._resp.write(answer._replace(tag=answer.tag ^ 0x80000000).pack())
        super()._send(answer)


# ------------------------------------------------------------------ phases

def resident(pid: int) -> int:
    """Bytes of memory that are the process's own."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise Failed(f"process {pid} is gone")


def _size(name: str) -> int | None:
    """Bytes of a region; None: none, for a client that gave up its disk is about to make it anew."""
    try:
        return os.stat(peer.channel_path(name)).st_size
    except FileNotFoundError:
        return None


def until(true: Callable[[], Any], what: str | Callable[[], str], seconds: float = PATIENCE, pause: float = 0.001) -> Any:
    end = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > end:
            raise Failed(what() if callable(what) else what)
        time.sleep(pause)
    return value


@dataclass
class Row:
    """What all phases of one mode came to."""

    phases: int = 0
    hostile: float = 0.0
    back: list[float] = field(default_factory=list)
    verified: int = 0
    counted: int = 0


class Victim:
    """A process of muenfast's, the names of its channels, and what is watched all the time."""

    role = ""

    def __init__(self, within: float, shared: bool) -> None:
        self.within = within
        self.req, self.resp = f"hostile{os.getpid()}-req", f"hostile{os.getpid()}-resp"
        self.buffer = f"hostile{os.getpid()}-buffer" if shared else ""
        self.memory: list[int] = []
        self.files: list[int] = []
        self.errors = tempfile.TemporaryFile()
        self.born = time.monotonic()

    process: subprocess.Popen[str]

    def spawn(self, *words: str) -> None:
        self.process = subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True)

    def alive(self) -> None:
        if self.process.poll() is not None:
            raise Failed(f"the {self.role} ended with status {self.process.returncode}")

    def attack(self, mode: str, seconds: float, seed: int) -> int:
        """Lets the hostile process loose; how many elements it published last, in its last epoch."""
        attacker = subprocess.Popen([sys.executable, __file__, "attack", self.role, self.req, self.resp, mode, str(seconds),
                                     str(seed), self.buffer], stdout=subprocess.PIPE, text=True)
        dice = random.Random(seed)
        try:
            if mode == "stop":
                while attacker.poll() is None:
                    time.sleep(dice.uniform(0, 0.2))
                    attacker.send_signal(signal.SIGSTOP)
                    time.sleep(dice.uniform(0, 0.5))
                    attacker.send_signal(signal.SIGCONT)
            said, _ = attacker.communicate(timeout=seconds + PATIENCE)
        finally:
            attacker.kill()
            attacker.wait()
        if attacker.returncode != 0:
            raise Failed(f"the attack itself ended with status {attacker.returncode}")
        lengths = {self.buffer: peer.BUFFER_BYTES} if self.buffer else {}
        for name, (_, _, length) in zip((self.req, self.resp), SHARED if self.buffer else INLINE, strict=True):
            lengths |= {name: length, name + ".bell": 4096}
        for name, length in lengths.items():
            if until(lambda name=name: _size(name), f"{name} is not there") != length:
                raise Failed(f"{name} was left with another size")
        return int(said)

    def watch(self) -> None:
        """Memory and descriptors stay what they were after the first two phases; the log has about a line a second."""
        self.alive()
        self.errors.seek(0)
        lines = sum(1 for _ in self.errors)
        if lines > time.monotonic() - self.born + 5 * (len(self.memory) + 2):
            raise Failed(f"{lines} lines of log in {time.monotonic() - self.born:.0f} s")
        self.memory.append(resident(self.process.pid))
        self.files.append(len(os.listdir(f"/proc/{self.process.pid}/fd")))
        if len(self.memory) > 2:
            if self.memory[-1] > max(self.memory[:2]) + MORE_MEMORY:
                raise Failed(f"resident memory grew from {self.memory[1]} to {self.memory[-1]} bytes")
            if self.files[-1] > max(self.files[:2]) + MORE_FILES:
                raise Failed(f"descriptors grew from {self.files[1]} to {self.files[-1]}")

    def said(self) -> int:
        """Bytes on its standard error."""
        return self.errors.seek(0, os.SEEK_END)

    def in_time(self, begin: float) -> float:
        back = time.monotonic() - begin
        if back > self.within:
            raise Failed(f"service was back after {back:.3f} s only")
        return back

    def last_words(self) -> str:
        self.errors.seek(max(0, self.said() - 2000))
        return self.errors.read().decode(errors="replace")

    def phase(self, mode: str, seconds: float, seed: int, row: Row) -> str:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.errors.close()
        for name in os.listdir("/dev/shm"):
            if name.startswith(f"hostile{os.getpid()}-"):
                os.unlink(f"/dev/shm/{name}")


class HonestClient:
    """A plain client of a ServerVictim; blocks are those of its one disk, 0."""

    def __init__(self, victim: Victim) -> None:
        self.peer = peer.InlineClient(victim.req, victim.resp)

    def connect(self) -> None:
        self.peer.connect(timeout=PATIENCE)

    def read(self, device: int, i: int) -> bytes:
        return self.peer.read(i)

    def write(self, device: int, i: int, data: bytes) -> None:
        self.peer.write(i, data)

    def sync(self, device: int) -> None:
        self.peer.sync()

    def disconnect(self) -> None:
        self.peer.disconnect()

    def close(self) -> None:
        self.peer.close()


class HonestBufferClient:
    """The same over a shared buffer, with any disk, each time through another part of the buffer."""

    def __init__(self, victim: Victim) -> None:
        self.peer = peer.BufferClient(victim.req, victim.resp, victim.buffer, timeout=PATIENCE)
        self.turn = 0

    def place(self) -> int:
        self.turn = (self.turn + 37 * BLOCK) % len(self.peer.buffer)
        return self.turn

    def connect(self) -> None:
        """A server that leaves truncated memory begins a new life, perhaps just now: then so does its client."""
        def connected() -> bool:
            with contextlib.suppress(ConnectionResetError):
                self.peer.connect()
                return True
            return False

        until(connected, "the server stays away")
        if self.peer.devices != [peer.BufferDevice(BLOCKS, BLOCK, self.peer.devices[0].max_blocks)] * 2:
            raise Failed(f"the server's disks are {self.peer.devices}")

    def read(self, device: int, i: int) -> bytes:
        return self.peer.read(device, i * BLOCK, BLOCK, self.place())

    def write(self, device: int, i: int, data: bytes) -> None:
        self.peer.write(device, i * BLOCK, data, self.place())

    def sync(self, device: int) -> None:
        self.peer.sync(device)

    def disconnect(self) -> None:
        self.peer.disconnect()

    def close(self) -> None:
        self.peer.close()


Honest = HonestClient | HonestBufferClient


class ServerVictim(Victim):
    """`muenfast blk`: one export for the hostile peer, one for somebody else."""

    role = "server"

    def __init__(self, within: float, shared: bool, file: Path | None) -> None:
        """file: in place of the disk in RAM, with a buffer of the second one."""
        super().__init__(within, shared)
        self.content = {(device, i): bytes(BLOCK) for device in range(1 + shared) for i in OURS}
        if file is not None:
            file.write_bytes(bytes(BLOCKS * BLOCK))
        if shared:
            self.spawn("-m", "muenfast", "modprobe", "muenblock-server",
                       f"connections=a:{self.req}:{self.resp}:{self.buffer},b:{self.req}2:{self.resp}2:{self.buffer}2",
                       f"device=ram:1M:a,{file or 'ram:1M'}:a,ram:1M:b")
        else:
            self.spawn("-m", "muenfast", "blk", "--req", f"{self.req},{self.req}2", "--resp",
                       f"{self.resp},{self.resp}2", "--device", f"{file or 'ram:1M'},ram:1M")
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                break
        self.alive()
        self.bystander = BlockDevice(self.req + "2", self.resp + "2", shm=self.buffer + "2" if shared else None,
                                     on_peer_loss="fail")
        self.over, self.wrong, self.served = threading.Event(), [""], 0
        self.thread = threading.Thread(target=self._stand_by)
        self.thread.start()

    def _stand_by(self) -> None:
        dice = random.Random(0)
        content = {}
        try:
            while not self.over.wait(0.002):
                i = dice.randrange(BLOCKS)
                if i in content and self.bystander.pread(BLOCK, i * BLOCK) != content[i]:
                    raise Failed(f"block {i} of the other export is another")
                content[i] = dice.randbytes(BLOCK)
                self.bystander.pwrite(content[i], i * BLOCK)
                self.served += 1
        except BaseException as error:
            self.wrong.append(f"the other export's client: {error!r}")

    def counters(self) -> dict[str, int]:
        answer = control.ask(self.process.pid, {"command": "status"})
        return dict(answer["entries"][0]["counters"])

    def executed(self) -> int:
        counters = self.counters()
        more = ("discards", "queries", "resets", "cancelled") if self.buffer else ("sizes",)
        return sum(counters[name] for name in ("reads", "writes", "syncs", "rejected", "voided", "lost", *more))

    def phase(self, mode: str, seconds: float, seed: int, row: Row) -> str:
        before, served, first = self.executed(), self.served, self.counters()
        published = self.attack(mode, seconds, seed)
        if mode == "flood":
            def alone() -> bool:
                """Whether so many of them broke a rule within a second that the others were not looked at."""
                return self.counters()["quarantines"] > first["quarantines"]

            until(lambda: self.executed() - before >= published or alone(), "requests of the flood are in no counter")
            if (counted := self.executed() - before) != published and not (alone() and counted < published):
                raise Failed(f"{published} requests of the flood are {counted} in the counters")
            row.counted += counted
        counters, dice = self.counters(), random.Random(seed)
        begin = time.monotonic()
        client: Honest = HonestBufferClient(self) if self.buffer else HonestClient(self)
        try:
            client.connect()
            first_one = next(iter(self.content))
            data = dice.randbytes(BLOCK)
            client.write(*first_one, data)
            if client.read(*first_one) != data:
                raise Failed("what was written is not what is read")
            row.back.append(self.in_time(begin))
            self.content[first_one] = data
            for place, data in self.content.items():
                if client.read(*place) != data:
                    raise Failed(f"disk and block {place}, written in an honest phase, hold something else")
            base, asked = self.executed(), 0
            for _ in range(200):
                place = dice.choice(list(self.content))
                if dice.random() < 0.5:
                    self.content[place] = dice.randbytes(BLOCK)
                    client.write(*place, self.content[place])
                elif dice.random() < 0.9:
                    if client.read(*place) != self.content[place]:
                        raise Failed(f"disk and block {place} hold something else")
                else:
                    client.sync(place[0])
                asked += 1
            if self.executed() - base != asked:
                raise Failed(f"{asked} honest requests are {self.executed() - base} in the counters")
            client.disconnect()
        finally:
            client.close()
        if self.wrong[-1] or self.served == served:
            raise Failed(self.wrong[-1] or "the other export stood still")
        self.watch()
        row.verified += asked + len(self.content)
        return " ".join(f"{name}+{counters[name] - first[name] & U64}"
                        for name in ("connections", "rejected", "torn", "voided", "cancelled", "failed", "overruns", "lost")
                        if name in counters)

    def end(self) -> None:
        self.over.set()
        self.thread.join(PATIENCE)
        self.bystander.close()
        self.process.terminate()
        if self.process.wait(PATIENCE) != 0:
            raise Failed(f"the server ended with status {self.process.returncode}")

    def remove(self) -> None:
        self.over.set()
        self.thread.join(PATIENCE)
        with contextlib.suppress(Exception):
            self.bystander.close()
        super().remove()


class ClientVictim(Victim):
    """A process whose threads use a BlockDevice."""

    role = "client"

    def __init__(self, within: float, shared: bool) -> None:
        super().__init__(within, shared)
        self.disk = bytearray(BLOCKS * BLOCK)
        self.spawn(__file__, "user", self.req, self.resp, self.buffer)
        until(lambda: self.order("pause")["failure"] is None and os.path.exists(peer.channel_path(self.resp) + ".bell"),
              "the client made no channels", pause=0.02)

    def order(self, what: str) -> dict[str, Any]:
        self.alive()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(PATIENCE)
            self.alive()
        return dict(json.loads(line))

    def phase(self, mode: str, seconds: float, seed: int, row: Row) -> str:
        first = self.order("hostile")
        self.attack(mode, seconds, seed)
        attacked = self.order("hostile")
        begin = time.monotonic()
        self.order("honest")
        while (report := self._served(begin, row)) is None:
            pass
        if report["wrong"]:
            raise Failed(f"{len(report['wrong'])} blocks were not read as written: {report['wrong'][0]}")
        for i, token in report["acknowledged"].items():
            if self.disk[int(i) * BLOCK:][:16].hex() != token:
                raise Failed(f"block {i}: an acknowledged write is not in the disk")
        self.watch()
        row.verified += len(report["acknowledged"])
        row.counted += 100
        changes = {name: attacked["counters"][name] - first["counters"][name] & U64
                   for name in ("stale", "overruns", "lost")}
        return " ".join(f"{name}+{value}" for name, value in
                        {**changes, "errors": attacked["errors"] - first["errors"],
                         "given-up": report["given_up"] - first["given_up"]}.items())

    def _served(self, begin: float, row: Row) -> dict[str, Any] | None:
        """What the client says after an honest server's time; None: it gave up its disk after all, by an answer of the
        attack that it found then only, and its user's next one has made the channels anew."""
        self.in_time(begin)
        until(self._channels, "the client has no channels")
        made = self._channels()
        with contextlib.ExitStack() as stack:
            try:
                server: HonestServer | HonestBufferServer = (
                    HonestBufferServer(self.req, self.resp, self.buffer, [self.disk]) if self.buffer else
                    HonestServer(self.req, self.resp, self.disk))
            except FileNotFoundError:
                return None
            stack.callback(server.close)
            stack.enter_context(server.running())
            until(lambda: self._back(User.THREADS) or self._channels() != made,
                  lambda: f"service is not back: {self._found()}", pause=0.002)
            report = self._back(User.THREADS)
            if report is None:
                return None
            row.back.append(self.in_time(begin))
            until(lambda: self.order("")["calls"] > report["calls"] + 400, "no call returns any more")
            self._count_junk(server, 100)
            self.order("pause")
            until(lambda: self.order("")["busy"] == 0, "a call hangs")
            return self.order("")

    def _channels(self) -> tuple[int, ...] | None:
        """Which files the client's regions are, None: not all are there."""
        try:
            return tuple(os.stat(peer.channel_path(name)).st_ino
                         for name in (self.req, self.req + ".bell", *([self.buffer] if self.buffer else [])))
        except FileNotFoundError:
            return None

    def _back(self, threads: int) -> dict[str, Any] | None:
        report = self.order("")
        return report if len(report["good"]) == threads else None

    def _found(self) -> dict[str, Any]:
        """What there is to say of a client that gets nowhere."""
        return {name: value for name, value in self.order("").items() if name != "acknowledged"}

    def _count_junk(self, server: HonestServer | HonestBufferServer, n: int) -> None:
        """Answers that nobody asked for are all counted, and cost nothing else."""
        before = self.order("")["counters"]
        server.junk = n
        until(lambda: server.junk == 0, "the server is not asked any more")
        until(lambda: self.order("")["counters"]["stale"] - before["stale"] >= n, "stale answers are not counted")
        after = self.order("")["counters"]
        if (after["stale"] - before["stale"], after["lost"], after["overruns"]) != (n, before["lost"], before["overruns"]):
            raise Failed(f"{n} answers that nobody asked for: counters went from {before} to {after}")

    def end(self) -> None:
        self.process.communicate(timeout=PATIENCE)
        if self.process.returncode != 0:
            raise Failed(f"the client ended with status {self.process.returncode}")


def attack_all(role: str, minutes: float, seed: int, phase: float, within: float, shared: bool) -> int:
    """Phases until the time is over, each mode at least once; the exit status."""
    dice = random.Random(f"{role} {seed}")
    modes = BUFFER_MODES if shared else MODES
    rows = {mode: Row() for mode in modes}
    begin = time.monotonic()
    victim: Victim | None = None
    turn, left, mode = 0, [], "start"
    with tempfile.TemporaryDirectory() as place:
        os.environ.setdefault("MUENFAST_RUNTIME_DIR", place)
        try:
            if role == "server":
                victim = ServerVictim(within, shared, Path(place, "disk") if seed % 2 else None)
            else:
                victim = ClientVictim(within, shared)
            while time.monotonic() - begin < 60 * minutes or turn < len(modes):
                left = left or dice.sample(modes, len(modes))
                mode = left.pop()
                row = rows[mode]
                seconds = phase * dice.uniform(0.5, 1.5)
                turn += 1
                told = victim.phase(mode, seconds, dice.getrandbits(32), row)
                row.phases += 1
                row.hostile += seconds
                print(f"{time.monotonic() - begin:7.1f} s  {role} {turn:4} {mode:10} hostile {seconds:4.1f} s, back in "
                      f"{row.back[-1]:.3f} s, {victim.memory[-1] / 1e6:.1f} MB  {told}", flush=True)
            victim.end()
        except (Failed, OSError, ValueError, subprocess.TimeoutExpired) as error:
            print(f"{role}: phase {turn}, {mode}, seed {seed}: {type(error).__name__}: {error}", flush=True)
            if victim is not None:
                print(victim.last_words(), flush=True)
            return 1
        finally:
            if victim is not None:
                memory, files, said = victim.memory, victim.files, victim.said()
                victim.remove()
    print(f"\n{role}: {'mode':10} {'phases':>6} {'hostile s':>9} {'back, worst':>11} {'median':>7} {'verified':>9} "
          f"{'counted':>9}")
    for mode, row in rows.items():
        print(f"{role}: {mode:10} {row.phases:6} {row.hostile:9.1f} {max(row.back):10.3f}s "
              f"{sorted(row.back)[len(row.back) // 2]:6.3f}s {row.verified:9} {row.counted:9}")
    print(f"{role}: {turn} phases in {time.monotonic() - begin:.0f} s, seed {seed}: nothing ended, stood still or was lost;"
          f" memory {min(memory) / 1e6:.1f} to {max(memory) / 1e6:.1f} MB, at most {max(files)} descriptors, "
          f"{said} bytes of log", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A hostile peer against muenfast's block server and client.")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="(default: 10)")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--role", choices=("server", "client", "both"), default="both", help="who is attacked")
    parser.add_argument("--shm", action="store_true", help="over a shared buffer (default: inline)")
    parser.add_argument("--phase", type=float, default=5.0, metavar="SECONDS", help="of one attack, about (default: 5)")
    parser.add_argument("--within", type=float, default=1.0, metavar="SECONDS",
                        help="in which service has to be back (default: 1)")
    a = parser.parse_args()
    if a.role != "both":
        return attack_all(a.role, a.minutes, a.seed, a.phase, a.within, a.shm)
    both = [subprocess.Popen([sys.executable, __file__, "--role", role, "--minutes", str(a.minutes), "--seed", str(a.seed),
                              "--phase", str(a.phase), "--within", str(a.within), *["--shm"] * a.shm])
            for role in ("server", "client")]
    try:
        return max(abs(process.wait()) for process in both)
    finally:
        for process in both:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["attack"]:
        role_, req_, resp_, mode_, seconds_, seed_, buffer_ = sys.argv[2:]
        attack = (BufferAttack(role_, req_, resp_, int(seed_), SHARED, buffer_) if buffer_ else
                  Attack(role_, req_, resp_, int(seed_), INLINE))
        attack.run(mode_, float(seconds_))
    elif sys.argv[1:2] == ["user"]:
        User(*sys.argv[2:]).run()
    else:
        sys.exit(main())
