"""usage: tools/hostile.py [--minutes N] [--seed S] [--role server|client|both] [--phase SECONDS] [--within SECONDS]

A hostile peer against muenfast's block server and against its client, for N (10) minutes, both at once. Phase by phase
it does one thing that no protocol allows, or all of them, at full speed and for about SECONDS (5); then it becomes
honest, and service has to be back within a second. The peer shares no code with muenfast (tests/peer.py).

Hostile to the server: `muenfast blk` with two exports; the peer is the client of one, a BlockDevice uses the other all
the time and must notice nothing. Hostile to the client: a process with four threads that call a BlockDevice; one that
the hostile peer has driven to fail for good (another size: docs/operations.md) is replaced by a new one, as a user
would. The peer writes to its own region and to both bells.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import peer  # noqa: E402

from muenfast import BlockDevice, MuenfastError, UsageError, control  # noqa: E402

BLOCK, EVENT_BYTES, REGION = peer.BLOCK_BYTES, peer.EVENT_BYTES, peer.INLINE_REGION_BYTES
ELEMENTS = (REGION - peer.HEADER_BYTES) // EVENT_BYTES
U64 = (1 << 64) - 1
BLOCKS = 256
OURS = range(1, 128)    # blocks of the honest phases: no hostile request names one (0 is what zeroed slots name)
HEAD = struct.Struct("<IiQII")
MODES = ("header", "counters", "epochs", "elements", "bell", "flood", "truncate", "stop", "everything")
PATIENCE = 30.0         # seconds for an answer of our own programs
MORE_MEMORY = 24 << 20  # bytes that a process may grow by after its first two phases
MORE_FILES = 8


class Failed(Exception):
    """A check."""


# ------------------------------------------------------------------ the attack, a process of its own

class Attack:
    """What the peer does to its own region and the bells. Every act is short; none returns anything."""

    def __init__(self, role: str, req: str, resp: str, seed: int) -> None:
        self.role, self.dice = role, random.Random(seed)
        self.own, self.protocol = (req, peer.REQUEST_PROTOCOL) if role == "server" else (resp, peer.RESPONSE_PROTOCOL)
        self.fd = os.open(peer.channel_path(self.own), os.O_RDWR)
        self.memory = mmap.mmap(self.fd, 0)
        self.view = memoryview(self.memory)
        self.words = self.view[:64].cast("Q")
        self.bell_fds = [os.open(peer.channel_path(name) + ".bell", os.O_RDWR) for name in (req, resp)]
        self.bells = [mmap.mmap(fd, 4096) for fd in self.bell_fds]
        self.requests = mmap.mmap(os.open(peer.channel_path(req), os.O_RDONLY), 0, prot=mmap.PROT_READ)
        self.odd = [0, 1, 2, 253, 254, 255, 4119, 4120, 4121, 1 << 31, 1 << 32, 1 << 52, (1 << 63) - 1, 1 << 63, U64 - 1,
                    U64]
        self.published = 0
        # What an honest client left in the slots would be executed again, rightly, once a counter says that it is new.
        self.words[peer.EPOCH] = 0
        self.view[64:] = bytes(REGION - 64)

    def any64(self) -> int:
        return self.dice.choice(self.odd) if self.dice.random() < 0.5 else self.dice.getrandbits(64)

    def start(self, epoch: int) -> None:
        """An epoch as it should be, from its first element on."""
        w = self.words
        w[peer.EPOCH] = 0
        w[peer.TRANSPORT], w[peer.PROTOCOL], w[peer.SIZE], w[peer.ELEMENTS] = (
            peer.TRANSPORT_ID, self.protocol, EVENT_BYTES, ELEMENTS)
        w[peer.RESERVED] = w[peer.WSC] = w[peer.WC] = 0
        w[peer.EPOCH] = epoch
        self.published = 0

    def event(self) -> bytes:
        """A header: at times a good one. No read or write of one of OURS."""
        dice = self.dice
        if self.role == "client" and dice.random() < 0.7:      # an answer to what was asked lately
            (wc,) = struct.unpack_from("<Q", self.requests, 8 * peer.WC)
            at = 64 + (wc - dice.randint(1, 16)) % ELEMENTS * EVENT_BYTES
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
        at = 64 + number % ELEMENTS * EVENT_BYTES
        self.view[at:at + HEAD.size] = event = self.event()
        if self.dice.random() < 0.02:
            self.view[at + 24:at + 32] = self.any64().to_bytes(8, "little")
        elif event[:4] == b"\2\0\0\0":       # so that a client goes on to where it sends requests
            self.view[at + 24:at + 32] = (BLOCKS * BLOCK // peer.SECTOR_BYTES).to_bytes(8, "little")

    def publish(self, n: int) -> None:
        """n elements as they should be published, whatever stands in them."""
        self.words[peer.WSC] = self.published + n & U64
        for k in range(min(n, ELEMENTS)):
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
            w[peer.WSC] = w[peer.WC] = w[peer.WC] + dice.choice((1, 1, 2, 64, ELEMENTS, ELEMENTS + 1, U64, U64 - 3)) & U64
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
        fd, length = dice.choice(((self.fd, REGION), (self.fd, REGION), (self.bell_fds[0], 4096), (self.bell_fds[1], 4096)))
        os.ftruncate(fd, dice.choice((0, 0, 4096, 65536)) % length)
        time.sleep(dice.choice((0, 0.001, 0.05, 0.3)))
        os.ftruncate(fd, length)
        self.start(dice.getrandbits(64) or 1)
        end = time.monotonic() + dice.choice((0.01, 0.3))
        while time.monotonic() < end:
            self.publish(dice.randrange(1, 5))
            time.sleep(0.001)

    stop = elements     # and who watches over us sends SIGSTOP at any moment

    def everything(self) -> None:
        getattr(self, self.dice.choice(("header", "counters", "epochs", "elements", "bell", "flood")))()
        if self.dice.random() < 0.001:
            self.truncate()

    def run(self, mode: str, seconds: float) -> None:
        act = getattr(self, mode)
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            paced = int(now * 10) % 3 > 0   # in two of three tenths of a second the victim can keep up
            for _ in range(20):
                act()
                if paced:
                    time.sleep(0.0005)
        print(self.published, flush=True)


# ------------------------------------------------------------------ the user of a client, a process of its own

class User:
    """Threads that write and read through a BlockDevice; obeys lines of JSON on standard input."""

    THREADS = 4

    def __init__(self, req: str, resp: str) -> None:
        self.names = req, resp
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
                    self.device = BlockDevice(*self.names, timeout=0, same_store=True)
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


# ------------------------------------------------------------------ phases

def resident(pid: int) -> int:
    """Bytes of memory that are the process's own."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise Failed(f"process {pid} is gone")


def until(true: Callable[[], Any], what: str, seconds: float = PATIENCE, pause: float = 0.001) -> Any:
    end = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > end:
            raise Failed(what)
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

    def __init__(self, within: float) -> None:
        self.within = within
        self.req, self.resp = f"hostile{os.getpid()}-req", f"hostile{os.getpid()}-resp"
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
                                     str(seed)], stdout=subprocess.PIPE, text=True)
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
        for name in (self.req, self.resp):
            for part, length in ((name, REGION), (name + ".bell", 4096)):
                if os.stat(peer.channel_path(part)).st_size != length:
                    raise Failed(f"{part} was left with another size")
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


class ServerVictim(Victim):
    """`muenfast blk`: one export for the hostile peer, one for somebody else."""

    role = "server"

    def __init__(self, within: float) -> None:
        super().__init__(within)
        self.content = {i: bytes(BLOCK) for i in OURS}
        self.spawn("-m", "muenfast", "blk", "--req", f"{self.req},{self.req}2", "--resp", f"{self.resp},{self.resp}2",
                   "--device", "ram:1M,ram:1M")
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                break
        self.alive()
        self.bystander = BlockDevice(self.req + "2", self.resp + "2", on_peer_loss="fail")
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
        return sum(counters[name] for name in ("reads", "writes", "syncs", "sizes", "rejected", "voided", "lost"))

    def phase(self, mode: str, seconds: float, seed: int, row: Row) -> str:
        before, served, first = self.executed(), self.served, self.counters()
        published = self.attack(mode, seconds, seed)
        if mode == "flood":
            until(lambda: self.executed() - before >= published, "requests of the flood are in no counter")
            if (counted := self.executed() - before) != published:
                raise Failed(f"{published} requests of the flood are {counted} in the counters")
            row.counted += published
        counters, dice = self.counters(), random.Random(seed)
        begin = time.monotonic()
        client = peer.InlineClient(self.req, self.resp)
        try:
            client.connect(timeout=PATIENCE)
            data = dice.randbytes(BLOCK)
            client.write(1, data)
            if client.read(1) != data:
                raise Failed("what was written is not what is read")
            row.back.append(self.in_time(begin))
            self.content[1] = data
            for i, data in self.content.items():
                if client.read(i) != data:
                    raise Failed(f"block {i}, written in an honest phase, holds something else")
            base, asked = self.executed(), 0
            for _ in range(200):
                i = dice.choice(OURS)
                if dice.random() < 0.5:
                    self.content[i] = dice.randbytes(BLOCK)
                    client.write(i, self.content[i])
                elif dice.random() < 0.9:
                    if client.read(i) != self.content[i]:
                        raise Failed(f"block {i} holds something else")
                else:
                    client.sync()
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
        return " ".join(f"{name}+{counters[name] - first[name]}"
                        for name in ("connections", "rejected", "torn", "voided", "overruns", "lost"))

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

    def __init__(self, within: float) -> None:
        super().__init__(within)
        self.disk = bytearray(BLOCKS * BLOCK)
        self.spawn(__file__, "user", self.req, self.resp)
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
        server = HonestServer(self.req, self.resp, self.disk)
        try:
            with server.running():
                self.order("honest")
                report = until(lambda: self._back(User.THREADS), "service is not back", pause=0.002)
                row.back.append(self.in_time(begin))
                until(lambda: self.order("")["calls"] > report["calls"] + 400, "no call returns any more")
                self._count_junk(server, 100)
                report = self.order("pause")
                until(lambda: self.order("")["busy"] == 0, "a call hangs")
                report = self.order("")
        finally:
            server.close()
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

    def _back(self, threads: int) -> dict[str, Any] | None:
        report = self.order("")
        return report if len(report["good"]) == threads else None

    def _count_junk(self, server: HonestServer, n: int) -> None:
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


def attack_all(role: str, minutes: float, seed: int, phase: float, within: float) -> int:
    """Phases until the time is over, each mode at least once; the exit status."""
    dice = random.Random(f"{role} {seed}")
    rows = {mode: Row() for mode in MODES}
    begin = time.monotonic()
    victim: Victim | None = None
    turn, left, mode = 0, [], "start"
    with tempfile.TemporaryDirectory() as place:
        os.environ.setdefault("MUENFAST_RUNTIME_DIR", place)
        try:
            victim = ServerVictim(within) if role == "server" else ClientVictim(within)
            while time.monotonic() - begin < 60 * minutes or turn < len(MODES):
                left = left or dice.sample(MODES, len(MODES))
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
    parser.add_argument("--phase", type=float, default=5.0, metavar="SECONDS", help="of one attack, about (default: 5)")
    parser.add_argument("--within", type=float, default=1.0, metavar="SECONDS",
                        help="in which service has to be back (default: 1)")
    a = parser.parse_args()
    if a.role != "both":
        return attack_all(a.role, a.minutes, a.seed, a.phase, a.within)
    both = [subprocess.Popen([sys.executable, __file__, "--role", role, "--minutes", str(a.minutes), "--seed", str(a.seed),
                              "--phase", str(a.phase), "--within", str(a.within)]) for role in ("server", "client")]
    try:
        return max(abs(process.wait()) for process in both)
    finally:
        for process in both:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["attack"]:
        role_, req_, resp_, mode_, seconds_, seed_ = sys.argv[2:]
        Attack(role_, req_, resp_, int(seed_)).run(mode_, float(seconds_))
    elif sys.argv[1:2] == ["user"]:
        User(*sys.argv[2:]).run()
    else:
        sys.exit(main())
