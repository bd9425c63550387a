"""usage: tools/soak.py [--kills N] [--minutes M] [--seed S] [--rigs L] [--episode N] [--within MS]
       tools/soak.py --every SECONDS [--minutes M] [--seed S] [--rigs L] [--within MS]

kill -9 at random moments under load, N (1000) times or for M minutes, in episodes of about 12: each sets up a rig anew,
kills what the seed says, and must end without a trace. A kill takes the server, the client, or both; between them servers
are restarted by SIGTERM, or stopped (SIGSTOP) for a while. Some servers are killed while they start.

Rigs (L: some of their names; default: all but `lost`), `+shm` over a shared buffer, else inline; a file, or ram:SIZE:NAME:
    raw, raw+shm, raw-ram, raw-ram+shm      threads that call a BlockDevice and record what was acknowledged, in a process
                                            that is killed as a client
    ext4, ext4+shm, ext4-ram, ext4-ram+shm  /dev/muendiskX, mounted, with writers that record what they fsynced; when the
                                            client is killed: unmounted, attached anew, the journal replayed, all checked
    fio, fio+shm                            fio --verify=crc32c on /dev/muendiskX; only servers are killed
    lost, lost+shm                          ext4 on ram:SIZE, which dies with its server: I/O errors, never wrong data

With --every SECONDS servers only are killed, at that pace, for M (1) minutes a rig: ext4, ext4+shm, lost, lost+shm.

Checked: each block and each file is what the record allows. A write that was acknowledged and a file that was fsynced are
there, whoever died; what was in flight is old or new, never anything else. (Each word of it is, where memory is the disk: a
server that is killed in the middle of a copy leaves half of one, and nobody sends it again when the client dies too. The
next client tells how many such blocks it found, and writes them.) No request failed while the client lived. fsck finds
nothing. No step takes longer than a minute: it is named then, with the kernel functions in which it stands. After each
episode no region, record, socket, mount, loop device, node, process or FUSE connection is left. Service resumes within MS
(500; 0: not checked) of the server's return: from what it first does in its channel, its `ready`, or SIGCONT, to the first
answer that the load gets. Exit status 0 only where all of it held. The seed decides who dies, in which order and how long
after the load got going; the rest is the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 4096
DISK = 64 << 20         # bytes of every disk
RAW_BLOCKS = 1024       # of it that the raw load uses
THREADS = 4             # of a load
PATIENCE = 60.0         # seconds for any single step
FIXED_BLOCKS = 64       # of each thread's file that is overwritten in place
MOST_FILES = 24         # that each thread keeps
PR_SET_CHILD_SUBREAPER = 36     # linux/prctl.h
ME = os.path.abspath(__file__)
RIGS = ("raw", "raw+shm", "ext4", "ext4+shm", "raw-ram", "raw-ram+shm", "fio", "ext4-ram", "ext4-ram+shm", "fio+shm")
SHOWN = ("ext4", "ext4+shm", "lost", "lost+shm")
ACTS = {"server": 45, "client": 20, "both": 15, "restart": 10, "stop": 10}


class Failed(Exception):
    """A check."""


# ------------------------------------------------------------------ the record, which survives whoever writes it

class Record:
    """A file that all map: per block the last version that was sent, acknowledged and flushed; per thread a count of what
    was done. Block i of version v says `i << 32 | v` over and over.

    Invariant: what block i says lies between done[i] and sent[i]; flushed[i] <= done[i]. A word is stored whole.
    """

    def __init__(self, path: Path, blocks: int) -> None:
        size = 8 * (3 * blocks + THREADS + 2)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.words = memoryview(self._map).cast("Q")
        self.sent, self.done, self.flushed = (self.words[k * blocks:(k + 1) * blocks] for k in range(3))
        self.counts = self.words[3 * blocks:3 * blocks + THREADS]
        self.flushes = self.words[-2:]      # calls of flush or fsync that returned; calls of write
        self.blocks = blocks

    def progress(self) -> int:
        return sum(self.counts)

    def problem(self, i: int, found: bytes) -> str | None:
        """What is wrong with the contents of block i."""
        value = int.from_bytes(found[:8], "little")
        if found != struct.pack("<Q", value) * (BLOCK // 8):
            return f"block {i} is torn: {self.words_of(found)}"
        if value and value >> 32 != i:
            return f"block {i} holds what was written to block {value >> 32}"
        version = value & 0xFFFFFFFF
        if not self.done[i] <= version <= self.sent[i]:
            return (f"block {i} has version {version}; {self.done[i]} was acknowledged, {self.flushed[i]} flushed, "
                    f"{self.sent[i]} sent")
        return None

    @staticmethod
    def words_of(found: bytes) -> str:
        """Which words of a block are of which version."""
        said, last = [], -1
        for at, word in enumerate(memoryview(found).cast("Q")):
            if word != last:
                said.append(f"from word {at} version {word & 0xFFFFFFFF} of block {word >> 32}")
                last = word
        return ", ".join(said[:8]) + (f", and {len(said) - 8} more" if len(said) > 8 else "")

    def check(self, read: Callable[[int, int], bytes], write: Callable[[bytes, int], Any] | None = None) -> int:
        """All blocks, as read(length, offset) gives them; what was in flight is known from then on.

        With write(data, offset) a block may be a mixture of what was in flight: it is written anew. Returns how many were.
        """
        content = read(self.blocks * BLOCK, 0)
        mixed = 0
        for i in range(self.blocks):
            found = content[i * BLOCK:(i + 1) * BLOCK]
            if (wrong := self.problem(i, found)) is None:
                self.done[i] = int.from_bytes(found[:8], "little") & 0xFFFFFFFF
                continue
            words = memoryview(found).cast("Q")
            if write is None or any(self.problem(i, words[k:k + 1].tobytes() * (BLOCK // 8)) for k in range(BLOCK // 8)):
                raise Failed(wrong)
            write(self.pack(i), i * BLOCK)
            self.done[i] = self.sent[i]
            mixed += 1
        return mixed

    def pack(self, i: int) -> bytes:
        """The next version of block i; it counts as sent."""
        self.sent[i] += 1
        return struct.pack("<Q", i << 32 | self.sent[i]) * (BLOCK // 8)


class Books:
    """What fs_load() wrote: lines `+ ID SIZE` behind the fsync, `- ID` before the file is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def say(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def read(self) -> tuple[dict[int, int], int]:
        """(sizes by number of the files that must be there, how many were fsynced in all)."""
        live: dict[int, int] = {}
        count = 0
        for line in self.path.read_text().splitlines():
            sign, number, *size = line.split()
            if sign == "+":
                live[int(number)] = int(size[0])
                count += 1
            else:
                live.pop(int(number), None)
        return live, count

    def close(self) -> None:
        os.close(self._fd)


def contents(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


# ------------------------------------------------------------------ loads: processes of their own

def say_error(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text + "\n")


def raw_load(where: dict[str, Any]) -> None:
    """The client of a raw rig, until it is killed or told to end. Every thread has blocks of its own."""
    from muenfast import BlockDevice

    record = Record(Path(where["record"]), RAW_BLOCKS)
    with BlockDevice(where["req"], where["resp"], shm=where["shm"], timeout=PATIENCE) as device:
        mixed = record.check(device.pread, device.pwrite if where["memory"] else None)
        print(f"mixed {mixed}\nready", flush=True)
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())

        def work(k: int) -> None:
            share = RAW_BLOCKS // THREADS
            first, dice = k * share, random.Random(f"{where['seed']} {k}")
            while not stop.is_set():
                act = dice.random()
                if act < 0.4:                       # a run of blocks
                    n = dice.choice((1, 1, 2, 4, 16))
                    i = first + dice.randrange(share - n)
                    device.pwrite(b"".join(record.pack(j) for j in range(i, i + n)), i * BLOCK)
                    written = list(range(i, i + n))
                elif act < 0.65:                    # blocks here and there, all in flight
                    written = sorted(dice.sample(range(first, first + share), dice.choice((1, 8, 24))))
                    device.pwrite_many([i * BLOCK for i in written], b"".join(map(record.pack, written)))
                elif act < 0.93:
                    n = dice.choice((1, 4, 16))
                    i = first + dice.randrange(share - n)
                    found, written = device.pread(n * BLOCK, i * BLOCK), []
                    for j in range(n):
                        if (wrong := record.problem(i + j, found[j * BLOCK:(j + 1) * BLOCK])) is not None:
                            raise Failed(f"read: {wrong}")
                else:
                    before, written = record.done[first:first + share].tolist(), []
                    device.flush()
                    record.flushes[0] += 1
                    for j, version in enumerate(before):
                        record.flushed[first + j] = version
                for i in written:
                    record.done[i] = record.sent[i]
                record.flushes[1] += bool(written)
                record.counts[k] += 1

        run_threads(work, where["errors"], stop)


def run_threads(work: Callable[[int], None], errors: str, stop: threading.Event) -> None:
    """work(k) in THREADS threads, until all have returned; what one raises is noted, and all end."""
    def guarded(k: int) -> None:
        try:
            work(k)
        except BaseException as error:
            say_error(errors, f"thread {k}: {error!r}")
            stop.set()

    threads = [threading.Thread(target=guarded, args=(k,), daemon=True) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)


def fs_load(where: dict[str, Any]) -> None:
    """Writes files below a directory until it is killed or told to end: new ones, and one per thread in place."""
    directory, record, books = Path(where["directory"]), Record(Path(where["record"]), THREADS * FIXED_BLOCKS), \
        Books(Path(where["books"]))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    former = sorted(books.read()[0])    # of earlier lives: removed in their turn, or they would fill the disk
    print("ready", flush=True)

    def work(k: int) -> None:
        dice = random.Random(f"{where['seed']} {k}")
        numbers = itertools.count((where["life"] * THREADS + k) << 20)
        mine = [number for number in former if (number >> 20) % THREADS == k]
        fixed = os.open(directory / f"fixed{k}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fixed, FIXED_BLOCKS * BLOCK)
        os.fsync(fixed)
        os.fsync(parent)
        while not stop.is_set():
            if dice.random() < 0.5:
                chosen = dice.sample(range(FIXED_BLOCKS), dice.choice((1, 4, 16)))
                for i in chosen:
                    os.pwrite(fixed, record.pack(k * FIXED_BLOCKS + i), i * BLOCK)
                os.fdatasync(fixed)
                for i in (k * FIXED_BLOCKS + i for i in chosen):
                    record.done[i] = record.flushed[i] = record.sent[i]
                record.flushes[1] += len(chosen)
            else:
                number, size = next(numbers), dice.choice((1, 700, 4096, 20_000, 100_000, 250_000))
                fd = os.open(directory / f"new{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    os.write(fd, contents(number, size))
                    os.fsync(fd)
                    os.rename(directory / f"new{number}", directory / f"file{number}")
                    os.fsync(parent)
                    os.fsync(fd)    # of a directory ext4 says 0 when the commit has failed already; this flushes the device
                finally:
                    os.close(fd)
                books.say(f"+ {number} {size}")
                mine.append(number)
                while len(mine) > MOST_FILES:
                    books.say(f"- {mine[0]}")
                    os.unlink(directory / f"file{mine.pop(0)}")
            record.flushes[0] += 1
            record.counts[k] += 1

    run_threads(work, where["errors"], stop)


# ------------------------------------------------------------------ processes and steps, never waited for without a limit

def standing(pid: int) -> str:
    """Where the threads of a process and of its children stand."""
    said = []
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            state = re.sub(r".*\) (.).*", r"\1", (task / "stat").read_text().strip())
            wchan = (task / "wchan").read_text()
            said.append(f"{(task / 'comm').read_text().strip()}/{task.name} {state} {wchan}")
            for child in (task / "children").read_text().split():
                said.append(standing(int(child)))
    return "; ".join(said)


class Program:
    """A process of the soak, with its messages in a file."""

    def __init__(self, words: list[str], log: Path) -> None:
        with open(log, "ab") as file:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file,
                                            start_new_session=True, env=os.environ | {"PYTHONFAULTHANDLER": "1"})
        self.what, self.log = " ".join(words[1:5]), log
        self._said = b""
        self.ready = False
        self.expected = False   # to end
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    @property
    def pid(self) -> int:
        return self.process.pid

    def look(self, seconds: float) -> bool:
        """Takes what it says within that time; whether it is ready. Raises Failed when it ended."""
        out = self.process.stdout
        assert out is not None
        if not self.ready and select.select([out], [], [], seconds)[0]:
            more = out.read()
            self._said += more or b""
            self.ready = b"ready\n" in self._said
            if more == b"" and not self.ready:
                raise Failed(f"{self.what} ended with {self.wait()}: {self.log.read_text()[-2000:]}")
        return self.ready

    @property
    def lines(self) -> list[str]:
        return self._said.decode().split("ready\n")[0].splitlines()

    def wait_ready(self) -> None:
        wait(lambda: self.look(0.02), f"{self.what} to be ready", self.pid)

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.what} did not end; it stands in: {standing(self.pid)}") from None

    def end(self, number: int) -> int:
        self.expected = True
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


def wait(true: Callable[[], Any], what: str, pid: int | None = None, *, pause: float = 0.0) -> None:
    """Until true(). Raises Failed after PATIENCE, saying what was waited for and where pid stands."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise Failed(f"waited {PATIENCE:g} s for {what}" + (f"; it stands in: {standing(pid)}" if pid else ""))
        if pause:
            time.sleep(pause)


def run(*words: str | Path, status: int | None = 0) -> str:
    """A program to its end; what it printed. A child that cannot be killed is not waited for."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            where = standing(process.pid)
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            raise Failed(f"{' '.join(map(str, words))} took longer than {PATIENCE:g} s; it stands in: {where}") from None
        output.seek(0)
        said = output.read().decode(errors="replace")
    if status not in (None, process.returncode):
        raise Failed(f"{' '.join(map(str, words))} ended with {process.returncode}: {said}")
    return said


# ------------------------------------------------------------------ rigs

class Rig:
    """A server, a client, a load, and what they are checked by; in a directory of their own."""

    def __init__(self, name: str, seed: str, below: Path, number: int, tally: Tally) -> None:
        self.name, self.dice, self.place, self.tally = name, random.Random(seed), below / f"{number}-{name}", tally
        self.seed = seed
        self.place.mkdir()
        prefix = f"soak{os.getpid()}-{number}"
        self.req, self.resp, self.buffer, self.region = (f"{prefix}-{word}" for word in ("req", "resp", "shm", "disk"))
        self.shared = name.endswith("+shm")
        kind = name.removesuffix("+shm")
        self.lists = ["--req", self.req, "--resp", self.resp, *(["--shm", self.buffer] if self.shared else [])]
        self.image = self.place / "image"
        self.named = kind.endswith("-ram")
        self.device = f"ram:{DISK}:{self.region}" if self.named else str(self.image)
        self.errors = self.place / "errors"
        self.server: Program
        self.client: Program
        self.programs: list[Program] = []
        self.life = 0

    # what kinds of rigs do differently

    def progress(self) -> int:
        """Goes up whenever a request of the load is answered."""
        raise NotImplementedError

    def start_client(self) -> None:
        """The process; wait_client() follows."""
        raise NotImplementedError

    def wait_client(self) -> None:
        """It is there, all is as the record says, and the load goes on."""
        raise NotImplementedError

    def lose_client(self) -> None:
        """It was killed: what was built on it goes."""

    def end_client(self) -> None:
        """Cleanly, with all checks that take a client."""
        raise NotImplementedError

    def check_disk(self, path: Path) -> None:
        """The bytes themselves, when all have ended."""

    # what is common

    @property
    def bytes(self) -> Path:
        return Path("/dev/shm", self.region) if self.named else self.image

    def program(self, *words: str, log: str) -> Program:
        program = Program([sys.executable, *words], self.place / log)
        self.programs = [each for each in self.programs if each.process.poll() is None]
        self.programs.append(program)
        return program

    def start_server(self) -> None:
        self.server = self.program("-m", "muenfast", "blk", *self.lists, "--device", self.device, log="server.log")

    def load(self, role: str, **more: Any) -> Program:
        self.life += 1
        where = {"req": self.req, "resp": self.resp, "shm": self.buffer if self.shared else None, "life": self.life,
                 "seed": f"{self.seed} {self.life}", "record": str(self.place / "record"),
                 "books": str(self.place / "books"), "errors": str(self.errors), "memory": self.named, **more}
        return self.program(ME, "--role", role, json.dumps(where), log=f"{role}.log")

    def begin(self) -> None:
        if not self.named:
            with open(self.image, "wb") as file:
                file.truncate(DISK)
        self.start_server()
        self.server.wait_ready()
        self.start_client()
        self.wait_client()

    def no_errors(self) -> None:
        if self.errors.exists():
            raise Failed(f"the load was told of errors: {self.errors.read_text().strip()}")
        for each in self.programs:
            if not each.expected and each.process.poll() is not None:
                raise Failed(f"{each.what} ended with {each.process.returncode} by itself: "
                             f"{each.log.read_text()[-2000:]}")

    def settle(self) -> None:
        """The load is at work again; then some time passes."""
        seen = self.progress()
        self.wait_progress(seen + 5)
        time.sleep(self.dice.random() ** 2 * 0.4)

    def wait_progress(self, least: int) -> None:
        def going() -> bool:
            self.no_errors()
            return self.progress() >= least

        wait(going, "the load to be answered", self.client.pid, pause=0.0005)

    def kill_server(self) -> None:
        self.tally.kill("server")
        self.server.end(signal.SIGKILL)

    def comeback(self, kind: str) -> None:
        """A server again; a few are killed while they start. How long service takes from its return on is noted."""
        while True:
            self.start_server()
            if self.dice.random() > 0.12:
                break
            time.sleep(self.dice.random() * 0.6)
            self.kill_server()
        time.sleep(0.02)    # what the dead one answered has been taken: a server takes longer than that to start
        before, old = self.progress(), self.epoch()
        returned = resumed = 0.0

        def going() -> bool:
            nonlocal returned, resumed
            ready = self.server.look(0.0005)
            if not returned and (ready or self.epoch() != old):
                returned = time.monotonic()
            if not resumed and self.progress() != before:
                resumed = time.monotonic()
            return ready

        wait(going, "a server to start", self.server.pid)
        self.wait_progress(before + 1)
        self.tally.resumed(kind, max(0.0, (resumed or time.monotonic()) - returned))

    def epoch(self) -> int:
        """Of the response channel: a server that has returned changes it before it answers anything."""
        with open(f"/dev/shm/{self.resp}", "rb") as file:
            return int.from_bytes(os.pread(file.fileno(), 8, 8), "little")

    def act(self, what: str) -> None:
        if what == "server":
            self.kill_server()
            if self.dice.random() < 0.3:
                time.sleep(self.dice.random() * 0.3)
            self.comeback("kill")
        elif what == "restart":
            self.tally.others["planned restarts"] += 1
            if (status := self.server.end(signal.SIGTERM)) != 0:
                raise Failed(f"a server that was told to end did so with {status}")
            self.comeback("restart")
        elif what == "stop":
            self.tally.others["stops"] += 1
            self.server.process.send_signal(signal.SIGSTOP)
            time.sleep(0.05 + self.dice.random())
            before = self.progress()
            self.server.process.send_signal(signal.SIGCONT)
            start = time.monotonic()
            self.wait_progress(before + 1)
            self.tally.resumed("stop", time.monotonic() - start)
        elif what == "client":
            self.tally.kill("client")
            self.client.end(signal.SIGKILL)
            self.lose_client()
            self.start_client()
            self.wait_client()
        else:
            self.tally.kill("both")
            both = [self.server, self.client]
            self.dice.shuffle(both)
            for each in both:
                each.expected = True
                each.process.kill()
            for each in both:
                each.end(signal.SIGKILL)
            first = self.dice.random() < 0.5
            if first:
                self.start_server()
            self.lose_client()
            self.start_client()
            if not first:
                time.sleep(self.dice.random() * 0.3)
                self.start_server()
            self.server.wait_ready()
            self.wait_client()

    def finish(self) -> None:
        self.settle()
        self.end_client()
        self.no_errors()
        if (status := self.server.end(signal.SIGTERM)) != 0:
            raise Failed(f"the server ended with {status}")
        self.check_disk(self.bytes)
        if self.named:
            run(sys.executable, "-m", "muenfast", "chan", "rm", self.region)
        for log in self.place.glob("*.log"):
            if "Traceback" in (text := log.read_text()):
                raise Failed(f"{log.name}: {text[-2000:]}")

    def abandon(self) -> None:
        """After a failure: nothing of ours stays on the machine, as far as that can be had without waiting."""
        for each in self.programs:
            with contextlib.suppress(OSError):
                each.process.send_signal(signal.SIGCONT)
                each.process.kill()

    acts = ACTS


class RawRig(Rig):
    """A BlockDevice in a process that is killed as a client."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.record = Record(self.place / "record", RAW_BLOCKS)

    def progress(self) -> int:
        return self.record.progress()

    def start_client(self) -> None:
        self.client = self.load("raw")

    def wait_client(self) -> None:
        def going() -> bool:
            self.no_errors()
            return self.client.look(0.02)

        wait(going, "a client to be ready", self.client.pid)
        self.tally.mixed(int(self.client.lines[0].split()[1]))

    def end_client(self) -> None:
        if (status := self.client.end(signal.SIGTERM)) != 0:
            raise Failed(f"the client ended with {status}: {self.client.log.read_text()[-2000:]}")
        self.tally.count(flushes=self.record.flushes[0], writes=self.record.flushes[1])

    def check_disk(self, path: Path) -> None:
        with open(path, "rb") as file:
            self.record.check(lambda length, offset: os.pread(file.fileno(), length, offset))


class DeviceRig(Rig):
    """/dev/muendiskX."""

    node = ""
    connections: set[int]

    def start_client(self) -> None:
        self.client = self.program("-m", "muenfast", "blk", "--client", *self.lists, log="client.log")

    def wait_device(self) -> None:
        """Known from then on: its node, and the loop device and FUSE connection behind it."""
        self.client.wait_ready()
        self.node = self.client.lines[0].split()[4]
        self.number = os.stat(self.node).st_rdev
        with open("/proc/self/mountinfo") as file:
            for line in file:
                words = line.split()
                if words[4].startswith(f"{os.environ['MUENFAST_RUNTIME_DIR']}/mnt/"):
                    self.tally.connections.add(int(words[2].partition(":")[2]))

    def backing_file(self) -> str:
        """Of the loop device that was behind the node; "" where that is free."""
        try:
            return Path(f"/sys/block/loop{os.minor(self.number)}/loop/backing_file").read_text()
        except OSError:
            return ""

    def wait_device_gone(self, backing: str) -> None:
        """backing: of its loop device when it was alive."""
        wait(lambda: not os.path.exists(self.node) or os.stat(self.node).st_rdev != self.number,
             f"{self.node} of the killed client to go", pause=0.01)
        wait(lambda: self.backing_file() not in (backing, "/disk\n"), f"loop{os.minor(self.number)} to be free", pause=0.01)


class Ext4Rig(DeviceRig):
    """A mounted ext4, and writers that fsync and record."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.record = Record(self.place / "record", THREADS * FIXED_BLOCKS)
        self.books = Books(self.place / "books")
        self.directory = self.place / "mnt"
        self.directory.mkdir()
        self.writers: Program
        self.made = False

    def progress(self) -> int:
        return self.record.progress()

    def wait_client(self) -> None:
        self.wait_device()
        if not self.made:
            run("mkfs.ext4", "-q", "-b", "4096", self.node)
            self.made = True
        else:       # the client was killed: the journal first, as any machine that went down
            run("mount", self.node, self.directory)
            self.check_files(self.directory, mend=self.named)
            run("umount", self.directory)
            run("fsck.ext4", "-f", "-n", self.node)
        run("mount", self.node, self.directory)
        self.backing = self.backing_file()
        self.writers = self.load("fs", directory=str(self.directory))
        self.writers.wait_ready()

    def check_files(self, directory: Path, *, mend: bool = False) -> None:
        """Every fsynced file, byte for byte; every block of those that are overwritten, as Record.check()."""
        live, _ = self.books.read()
        for number, size in live.items():
            try:
                found = (directory / f"file{number}").read_bytes()
            except OSError as error:
                raise Failed(f"a file that was fsynced, {size} bytes: {error}") from None
            if found != contents(number, size):
                raise Failed(f"file{number} was fsynced, and is another now")
        paths = [directory / f"fixed{k}" for k in range(THREADS)]
        content = b"".join((path.read_bytes() if path.exists() else b"").ljust(FIXED_BLOCKS * BLOCK, b"\0")
                           for path in paths)

        def write(data: bytes, offset: int) -> None:
            with open(paths[offset // (FIXED_BLOCKS * BLOCK)], "r+b") as file:
                os.pwrite(file.fileno(), data, offset % (FIXED_BLOCKS * BLOCK))
                os.fsync(file.fileno())

        try:
            self.tally.mixed(self.record.check(lambda length, offset: content, write if mend else None))
        except Failed as error:
            raise Failed(f"in the files fixed*, {FIXED_BLOCKS} blocks each: {error}") from None

    def lose_client(self) -> None:
        """The writers get I/O errors, and end by that or by a kill; the mount can be taken away."""
        self.writers.end(signal.SIGKILL)
        self.errors.unlink(missing_ok=True)     # what the dead device told them
        run("umount", self.directory)
        self.wait_device_gone(self.backing)

    def stop_writers(self) -> None:
        if (status := self.writers.end(signal.SIGTERM)) != 0:
            raise Failed(f"the writers ended with {status}")
        self.no_errors()

    def end_client(self) -> None:
        self.stop_writers()
        run("umount", self.directory)
        run("fsck.ext4", "-f", "-n", self.node)
        run("blockdev", "--flushbufs", self.node)
        run("mount", "-o", "ro", self.node, self.directory)
        self.check_files(self.directory)
        run("umount", self.directory)
        if (status := self.client.end(signal.SIGTERM)) != 0:
            raise Failed(f"the client ended with {status}")
        self.tally.count(flushes=self.record.flushes[0], writes=self.record.flushes[1], files=self.books.read()[1])
        self.books.close()

    def check_disk(self, path: Path) -> None:
        run("fsck.ext4", "-f", "-n", path)
        run("mount", "-o", "loop,ro", path, self.directory)
        try:
            self.check_files(self.directory)
        finally:
            run("umount", self.directory)


class FioRig(DeviceRig):
    """fio, which checks what it reads back, on the device itself."""

    acts = {"server": 70, "restart": 15, "stop": 15}

    def progress(self) -> int:
        """Requests that the loop device has completed."""
        words = Path(f"/sys/dev/block/{os.major(self.number)}:{os.minor(self.number)}/stat").read_text().split()
        return int(words[0]) + int(words[4])

    def wait_client(self) -> None:
        self.wait_device()
        self.json = self.place / "fio.json"
        self.fio = Program(["fio", "--name=soak", f"--filename={self.node}", "--rw=randrw", "--verify=crc32c", "--direct=1",
                            "--ioengine=libaio", "--iodepth=16", "--bs=4k", "--runtime=3600", "--time_based",
                            "--verify_fatal=1", "--verify_backlog=512", "--fsync=64", "--verify_state_save=0", "--thread",
                            "--allow_mounted_write=1",      # a dead client's mount may be listed with the same name
                            "--output-format=json", f"--output={self.json}", f"--aux-path={self.place}",
                            f"--randseed={self.dice.randrange(1 << 30)}"], self.place / "fio.log")
        self.programs.append(self.fio)

    def end_client(self) -> None:
        if (status := self.fio.end(signal.SIGINT)) not in (0, 128):     # 128: it was told to end
            raise Failed(f"fio ended with {status}: {self.fio.log.read_text()[-1000:]}")
        text = self.json.read_text()
        (job,) = json.loads(text[text.index("{"):])["jobs"]
        if job["error"]:
            raise Failed(f"fio found error {job['error']}: {self.fio.log.read_text()[-1000:]}")
        if (status := self.client.end(signal.SIGTERM)) != 0:
            raise Failed(f"the client ended with {status}")
        self.tally.count(writes=job["write"]["total_ios"], verified=job["read"]["total_ios"])


class LostRig(Ext4Rig):
    """ram:SIZE under ext4: after the first kill every request fails, nothing wrong is read, nothing is written to the disk
    that the next server has."""

    acts = {"server": 1}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.device = f"ram:{DISK}"
        self.died = False

    def begin(self) -> None:
        self.start_server()
        self.server.wait_ready()
        self.start_client()
        self.wait_client()

    def settle(self) -> None:
        if not self.died:
            super().settle()

    def act(self, what: str) -> None:
        self.kill_server()
        self.start_server()
        self.server.wait_ready()
        if not self.died:
            self.died = True
            wait(self.errors.exists, "the writers to be told of errors", self.client.pid, pause=0.01)
            self.writers.end(signal.SIGKILL)
            told = self.errors.read_text()
            if not re.search(r"OSError\((5|30),", told):    # EIO; EROFS from an ext4 that has given up
                raise Failed(f"the writers were told: {told}")
            self.tally.others["disks lost"] += 1
        self.errors.unlink(missing_ok=True)
        fd = os.open(self.node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, BLOCK) as page:
                for action in (lambda: os.preadv(fd, [page], 0), lambda: os.pwrite(fd, page, BLOCK)):
                    try:
                        action()
                    except OSError as error:
                        if error.errno != 5:
                            raise Failed(f"{self.node}: {error}, not EIO") from None
                    else:
                        raise Failed(f"{self.node} goes on with another disk")
        finally:
            os.close(fd)
        run("sh", "-c", "echo 1 > /proc/sys/vm/drop_caches")
        live, _ = self.books.read()
        for number, size in live.items():
            with contextlib.suppress(OSError):      # as it must be; or it is in memory still, and then right
                if (self.directory / f"file{number}").read_bytes() != contents(number, size):
                    raise Failed(f"file{number} is read with other contents than were written")

    def finish(self) -> None:
        run("umount", self.directory)
        if (status := self.client.end(signal.SIGTERM)) != 0:
            raise Failed(f"the client ended with {status}")
        if self.died:
            from muenfast import BlockDevice

            with BlockDevice(self.req, self.resp, shm=self.buffer if self.shared else None, timeout=PATIENCE) as disk:
                for offset in range(0, DISK, 1 << 20):
                    if any(disk.pread(1 << 20, offset)):
                        raise Failed("something was written to the next server's disk")
        if (status := self.server.end(signal.SIGTERM)) != 0:
            raise Failed(f"the server ended with {status}")
        self.books.close()


def make_rig(name: str, *arguments: Any) -> Rig:
    kind = name.removesuffix("+shm").removesuffix("-ram")
    return {"raw": RawRig, "ext4": Ext4Rig, "fio": FioRig, "lost": LostRig}[kind](name, *arguments)


# ------------------------------------------------------------------ what was done and found

class Tally:
    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.resumes: dict[str, list[float]] = {}
        self.connections: set[int] = set()      # of FUSE
        self.start = time.monotonic()
        self.episodes = 0
        self.rig = ""
        self.worst = (0.0, "")

    def kill(self, what: str) -> None:
        self.kills[what] += 1
        self.show()

    def count(self, **more: int) -> None:
        self.counts.update(more)

    def mixed(self, blocks: int) -> None:
        if blocks:
            self.counts["blocks half written"] += blocks

    def resumed(self, kind: str, seconds: float) -> None:
        self.resumes.setdefault(kind, []).append(seconds)
        self.worst = max(self.worst, (seconds, f"{kind} {self.kills.total()}, {self.rig}"))

    def show(self) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{self.kills.total()} kills, {self.episodes} episodes, {time.monotonic() - self.start:.0f} s, "
                  f"worst resume {self.worst[0] * 1000:.0f} ms: {self.rig}", end="", file=sys.stderr, flush=True)

    def report(self, seed: int) -> None:
        kills = ", ".join(f"{what} {n}" for what, n in self.kills.items())
        others = "".join(f", {n} {what}" for what, n in self.others.items())
        print(f"soak: seed {seed}: {self.kills.total()} times kill -9 ({kills}){others}; {self.episodes} episodes, "
              f"{time.monotonic() - self.start:.0f} s")
        print("soak: " + (", ".join(f"{n} {what}" for what, n in self.counts.items()) or "nothing counted"))
        for kind, found in self.resumes.items():
            found = sorted(1000 * each for each in found)
            cuts = [found[min(len(found) - 1, int(len(found) * part))] for part in (0.9, 0.99)]
            print(f"soak: service after {kind}: median {statistics.median(found):.1f} ms, 90 % {cuts[0]:.1f}, 99 % "
                  f"{cuts[1]:.1f}, worst {found[-1]:.1f} (of {len(found)})")


def leftovers(below: Path, tally: Tally) -> dict[str, list[str]]:
    """What is still on the machine of ours, by kind."""
    prefix = f"soak{os.getpid()}-"
    mounts, devices = [], set()
    with open("/proc/self/mountinfo") as file:
        for words in map(str.split, file):
            devices.add(int(words[2].partition(":")[2]))
            if words[4].startswith(str(below)):
                mounts.append(words[4])
    loops = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(below) in (text := entry.read_text()) or prefix in text:
                loops.append(entry.parts[3])
    nodes = []
    for node in Path("/dev").glob("muendisk*"):
        with contextlib.suppress(OSError):
            info = node.stat()
            if stat.S_ISBLK(info.st_mode) and os.major(info.st_rdev) == 7 and \
                    not os.path.exists(f"/sys/block/loop{os.minor(info.st_rdev)}/loop"):
                nodes.append(str(node))
    # A number that is a mount's by now is somebody else's.
    connections = [str(number) for number in tally.connections - devices
                   if os.path.exists(f"/sys/fs/fuse/connections/{number}")]
    processes = []
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            processes.append(f"{child} " + Path(f"/proc/{child}/cmdline").read_text().replace("\0", " "))
    found = {"shared memory": sorted(name for name in os.listdir("/dev/shm") if prefix in name),
             "records and sockets": [str(path) for path in (below / "run").rglob("*") if not path.is_dir()],
             "mounts": mounts, "loop devices": loops, "nodes": nodes, "FUSE connections": connections,
             "processes": processes}
    return {kind: each for kind, each in found.items() if each}


def reap() -> None:
    """Orphans of our programs, which have become ours."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def nothing_left(below: Path, tally: Tally) -> None:
    end = time.monotonic() + 10
    while True:
        reap()
        left = leftovers(below, tally)
        if not left:
            return
        if time.monotonic() > end:
            raise Failed(f"left behind: {left}")
        time.sleep(0.05)


def clear(below: Path) -> None:
    """After a failure: takes away what can be taken."""
    for _ in range(3):
        with open("/proc/self/mountinfo") as file:
            places = [words[4] for words in map(str.split, file) if words[4].startswith(str(below))]
        for place in reversed(places):
            subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-m", "muenfast", "doctor", "--fix"], check=False, stdout=subprocess.DEVNULL,
                   timeout=PATIENCE)
    for name in os.listdir("/dev/shm"):
        if name.startswith(f"soak{os.getpid()}-"):
            with contextlib.suppress(OSError):
                os.unlink(f"/dev/shm/{name}")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    below = Path(tempfile.mkdtemp(prefix="muenfast-soak-"))
    os.environ["MUENFAST_RUNTIME_DIR"] = str(below / "run")
    try:
        yield below
    finally:
        shutil.rmtree(below, ignore_errors=True)


def episode(rig: Rig, kills: Callable[[], bool], between: Callable[[], None] | None = None) -> None:
    """Sets up, kills for as long as kills() says, ends."""
    rig.begin()
    names, weights = list(rig.acts), list(rig.acts.values())
    while kills():
        if between is None:
            rig.settle()
        else:
            between()
        rig.act(rig.dice.choices(names, weights)[0])
    rig.finish()


def soak(options: argparse.Namespace, below: Path, tally: Tally) -> None:
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    rigs = options.rigs or RIGS

    def over() -> bool:
        return tally.kills.total() >= options.kills or time.monotonic() > end

    for number in itertools.count():
        if over():
            return
        rig = make_rig(rigs[number % len(rigs)], f"{options.seed} {number}", below, number, tally)
        upto = tally.kills.total() + options.episode
        one(rig, below, tally, lambda upto=upto: not over() and tally.kills.total() < upto)


def one(rig: Rig, below: Path, tally: Tally, kills: Callable[[], bool],
        between: Callable[[], None] | None = None) -> None:
    tally.rig = f"{rig.name}, seed {rig.seed!r}"
    tally.show()
    try:
        episode(rig, kills, between)
        nothing_left(below, tally)
    except BaseException:
        rig.abandon()
        raise
    tally.episodes += 1
    shutil.rmtree(rig.place)


def shown(options: argparse.Namespace, below: Path, tally: Tally) -> None:
    """Servers only, one every so many seconds."""
    for number, name in enumerate(options.rigs or SHOWN):
        rig = make_rig(name, f"{options.seed} {number}", below, number, tally)
        rig.acts = {"server": 1}
        before, clock = tally.kills.total(), [0.0, 0.0]

        def kills(clock: list[float] = clock) -> bool:
            if not clock[1]:
                clock[0] = time.monotonic()
                clock[1] = clock[0] + 60 * (options.minutes or 1.0)
            return time.monotonic() < clock[1]

        def between(clock: list[float] = clock, rig: Rig = rig) -> None:
            """What a comeback took is part of the second."""
            clock[0] = max(clock[0] + options.every, time.monotonic())
            time.sleep(max(0.0, clock[0] - time.monotonic()))
            if not isinstance(rig, LostRig):
                rig.no_errors()

        one(rig, below, tally, kills, between)
        lost = isinstance(rig, LostRig)
        print(f"soak: {name}: {tally.kills.total() - before} kills of the server, " +
              ("I/O errors at the first, never wrong data" if lost else
               "no I/O error, every fsynced file right, fsck clean"), flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--role"]:
        {"raw": raw_load, "fs": fs_load}[sys.argv[2]](json.loads(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=1000, metavar="N")
    add("--minutes", type=float, default=0.0, metavar="M")
    add("--seed", type=int, default=1, metavar="S")
    add("--rigs", type=lambda text: text.split(","), metavar="L")
    add("--within", type=float, default=500.0, metavar="MS")
    add("--every", type=float, default=0.0, metavar="SECONDS")
    add("--episode", type=int, default=12, metavar="N", help="kills of one rig, before the next is set up")
    options = parser.parse_args()
    for name in options.rigs or ():
        if name not in (*RIGS, *SHOWN):
            parser.error(f"there is no rig {name!r}: {', '.join((*RIGS, 'lost', 'lost+shm'))}")
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    tally = Tally()
    status = 0
    with workplace() as below:
        try:
            (shown if options.every else soak)(options, below, tally)
        except KeyboardInterrupt:
            print("soak: interrupted", flush=True)
            status = 130
            clear(below)
        except (Failed, OSError) as error:
            if sys.stderr.isatty():
                print(file=sys.stderr)
            print(f"soak: FAILED: {tally.rig}: {error}", flush=True)
            status = 1
            clear(below)
        except BaseException:
            clear(below)
            raise
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    tally.report(options.seed)
    worst, where = 1000 * tally.worst[0], tally.worst[1]
    if options.within and worst > options.within:
        print(f"soak: FAILED: service took {worst:.0f} ms to resume, not {options.within:g}: after {where}")
        status = 1
    if status == 0:
        print("soak: everything held, nothing was left behind")
    return status


if __name__ == "__main__":
    sys.exit(main())
