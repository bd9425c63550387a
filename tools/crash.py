"""usage: tools/crash.py [--rigs L] [--fsyncs N] [--states N] [--seed S] [--plant P] [--keep DIR]

Crash consistency. ext4 on /dev/muendiskX, with threads that fsync and record what they fsynced; below everything a disk
that logs each write, trim and flush (tools/writelog.py). Then the power is lost at every flush, right before and right
after its end, and at places between: of what the log has up to there, all that the last flush covers, and of the rest what
a disk may have of it: nothing, all, in reversed order, any of it, only the latest, all but one, any version of each block,
writes torn between sectors. Each such state must mount (the journal is replayed), have each file that was fsynced by then,
byte for byte, and satisfy fsck -fn.

Rigs (L: some of their names; default: all), `+shm` over a shared buffer, else inline:
    store, store+shm                the logging disk is the export's; discards and zeroes reach it
    disk, disk+shm                  the export's is another export's /dev/muendiskY, and that one's logs; by io_uring
    file, file+shm                  the export's is a file full of holes, on an ext4 on such a disk
    disk-threads+shm, file-threads+shm, ...     by threads, io_uring being refused to the server

--fsyncs (100): of the load, at least. --states: about so many of each rig, evenly from all (0, the default: all). --plant:
what must be found: `flush-skipped`, a disk that answers flushes and does nothing; `flush-early`, one that flushes before it
does writes that it has answered; `fdatasync`, a server for which fdatasync does nothing (strace; rigs `disk` and `file`).
--keep: where a state that failed is put, as RIG.img. Exit status 0 only where all held.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import multiprocessing
import os
import queue
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import soak
import writelog
from soak import Failed, run, wait
from writelog import BLOCK, SECTOR

from muenfast.attach import loop

RIGS = ("store", "store+shm", "disk", "disk-threads+shm", "file", "file-threads+shm")
KINDS = ("store", "disk", "file", "disk-threads", "file-threads")
PLANTS = (*writelog.PLANTS, "fdatasync")
SIZE = 16 << 20         # bytes of the disk under ext4
BELOW = 24 << 20        # ... and of one with that disk as a file
THREADS = 4
CHECKERS = 2            # states that are looked at together: mount, fsck and a copy take a CPU, hardly more
FIXED_BLOCKS = 24       # of each thread's file that is overwritten in place
RAW_BLOCKS = 64         # behind the file system, which are written, discarded and zeroed without one
MOST_FILES = 12         # that each thread keeps
PROBLEMS = 3            # after so many a rig's other states are not looked at
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F     # linux/fs.h
LO_FLAGS_AUTOCLEAR = 4  # linux/loop.h
EVER = 1 << 62          # a place that no log has

# seccomp refuses io_uring_setup, as the profiles of some containers do: files are served by threads then.
WITHOUT_URING = """
import ctypes, runpy, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(lines), ctypes.addressof(program))), 0, 0) == 0
runpy.run_module("muenfast", run_name="__main__")
"""
WITHOUT_FDATASYNC = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=io_uring_setup,fdatasync",
                     "-e", "inject=io_uring_setup:error=EPERM", "-e", "inject=fdatasync:retval=0"]

libc = ctypes.CDLL(None, use_errno=True)


# ------------------------------------------------------------------ the load

def sector(number: int, version: int) -> bytes:
    """A sector that is overwritten: which, and of which version, in every word."""
    return struct.pack("<Q", (number + 1) << 32 | version) * (SECTOR // 8)


class Overwritten:
    """Blocks that are overwritten in place; of each the places at which a version was begun and was durable, and which
    versions are zeros. Version 0 is nobody's: the blocks have no other contents before their first flush."""

    def __init__(self, name: str, blocks: int) -> None:
        self.name, self.blocks = name, blocks
        self.begun: list[list[int]] = [[] for _ in range(blocks)]       # index: version - 1
        self.durable: list[list[int]] = [[] for _ in range(blocks)]
        self.zeros: list[set[int]] = [set() for _ in range(blocks)]

    def pack(self, i: int, place: int, zeros: bool = False) -> bytes:
        """Block i's next version, which is begun now."""
        self.begun[i].append(place)
        version = len(self.begun[i])
        if zeros:
            self.zeros[i].add(version)
            return bytes(BLOCK)
        return b"".join(sector(i * (BLOCK // SECTOR) + k, version) for k in range(BLOCK // SECTOR))

    def flushed(self, i: int, place: int, version: int) -> None:
        """Block i's is durable from that place on, and all before it."""
        self.durable[i] += [place] * (version - len(self.durable[i]))

    def problem(self, place: int, content: bytes) -> str | None:
        """What is wrong with it after the power was lost there."""
        if len(content) != self.blocks * BLOCK:
            return f"{self.name} has {len(content)} bytes"
        for i in range(self.blocks):
            least, most = (sum(at <= place for at in places[i]) for places in (self.durable, self.begun))
            zeros = any(least <= version <= most for version in self.zeros[i])
            for k in range(BLOCK // SECTOR):
                at, number = i * BLOCK + k * SECTOR, i * (BLOCK // SECTOR) + k
                found = content[at:at + SECTOR]
                if zeros and not any(found):
                    continue
                version = int.from_bytes(found[:4], "little")
                if found != sector(number, version):
                    return f"{self.name}: sector {number} has nothing that was written there lately: {found[:16].hex()}"
                if not least <= version <= most:
                    return f"{self.name}: sector {number} has version {version}; {least} was durable, {most} begun"
        return None


class Written:
    """A file that was fsynced: bytes that it begins with, from a place on, up to one at which its end began."""

    def __init__(self, name: str, data: bytes, since: int, more: bool = False) -> None:
        self.name, self.data, self.since, self.until, self.more = name, data, since, EVER, more

    def problem(self, place: int, directory: Path) -> str | None:
        if not self.since <= place < self.until:
            return None
        try:
            found = (directory / self.name).read_bytes()
        except OSError as error:
            return f"{self.name}, {len(self.data)} bytes, fsynced at {self.since}: {error.strerror}"
        if found[:len(self.data)] != self.data or (len(found) > len(self.data) and not self.more):
            return f"{self.name}, {len(self.data)} bytes, fsynced at {self.since}, has {len(found)} bytes, other ones"
        return None


class Load:
    """Threads that make files, overwrite, append, rename and remove, and fsync; what must be there, from which place on."""

    def __init__(self, directory: Path, node: str, discards: bool, place: writelog.Place, seed: str, fsyncs: int) -> None:
        self.directory, self.place, self.seed, self.fsyncs = directory, place, seed, fsyncs
        self._node, self._discards = node, discards
        self.raw, self.raw_since = Overwritten("behind the file system", RAW_BLOCKS), EVER
        self.written: list[Written] = []
        self.overwritten: list[tuple[int, Overwritten]] = []        # since when it must be there
        self.problems: list[BaseException] = []
        self.counts: Counter[str] = Counter()
        self._done = itertools.count(1)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True)
                         for work in (self._work_raw, *(functools.partial(self._work, k) for k in range(THREADS)))]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(limit := soak.PATIENCE + self.fsyncs)
            if thread.is_alive():
                raise Failed(f"the load did not end in {limit:g} s; it stands in: {soak.standing(os.getpid())}")
        if self.problems:
            raise Failed(f"the load was told of an error: {self.problems[0]!r}")

    def check(self, place: int, directory: Path, disk: int) -> list[str]:
        """What is missing or wrong after the power was lost there. disk: with all of it, behind the file system too."""
        found = [each.problem(place, directory) for each in self.written]
        for since, file in self.overwritten:
            if since <= place:
                try:
                    found.append(file.problem(place, (directory / file.name).read_bytes()))
                except OSError as error:
                    found.append(f"{file.name}: {error.strerror}")
        if self.raw_since <= place:
            found.append(self.raw.problem(place, os.pread(disk, RAW_BLOCKS * BLOCK, SIZE - RAW_BLOCKS * BLOCK)))
        return [each for each in found if each is not None]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.problems.append(error)
            self._over.set()

    def _synced(self, what: str) -> None:
        self.counts[what] += 1
        if next(self._done) >= self.fsyncs:
            self._over.set()

    def _work(self, k: int) -> None:
        dice = random.Random(f"{self.seed} {k}")
        directory = self.directory / f"thread{k}"
        directory.mkdir()
        sync(self.directory)
        file = Overwritten(f"thread{k}/fixed", FIXED_BLOCKS)
        fd = os.open(self.directory / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        buffered = [fd, os.open(self.directory / file.name, os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC)]
        direct = os.open(self.directory / file.name, os.O_WRONLY | os.O_DSYNC | os.O_DIRECT | os.O_CLOEXEC)
        log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        page = mmap.mmap(-1, 8 * BLOCK)
        try:
            os.ftruncate(fd, FIXED_BLOCKS * BLOCK)
            self._overwrite(file, range(FIXED_BLOCKS), lambda data, at: os.pwrite(fd, data, at), fd)
            sync(directory)
            self.overwritten.append((self.place(), file))
            mine: list[Written] = []
            logged: list[bytes] = []
            for n in itertools.count():
                if self._over.is_set():
                    return
                act = dice.random()
                if act < 0.25:
                    self._overwrite(file, dice.sample(range(FIXED_BLOCKS), dice.choice((1, 3, 8))),
                                    lambda data, at: os.pwrite(fd, data, at), fd)
                    self._synced("fdatasync")
                elif act < 0.4:
                    first, size = dice.randrange(FIXED_BLOCKS - 8), dice.choice((1, 2, 8))
                    begin = self.place()
                    page[:size * BLOCK] = b"".join(file.pack(i, begin) for i in range(first, first + size))
                    if dice.random() < 0.5:
                        with memoryview(page) as view, view[:size * BLOCK] as part:
                            os.pwritev(direct, [part], first * BLOCK)
                        self._synced("O_DIRECT | O_DSYNC")
                    else:
                        os.pwrite(buffered[1], page[:size * BLOCK], first * BLOCK)
                        self._synced("O_DSYNC")
                    self._flushed(file, range(first, first + size))
                elif act < 0.5:
                    logged.append(dice.randbytes(dice.choice((10, 600, 5000))))
                    os.write(log, logged[-1])
                    os.fsync(log)
                    sync(directory)
                    self.written.append(Written(f"thread{k}/log", b"".join(logged), self.place(), more=True))
                    self._synced("append")
                elif act < 0.95 or not mine:
                    mine.append(self._make(dice, k, n))
                    self._synced("fsync")
                    if len(mine) > MOST_FILES:
                        self._remove(dice, mine.pop(0))
                else:
                    self._remove(dice, mine.pop(dice.randrange(len(mine))))
        finally:
            for each in (*buffered, direct, log):
                os.close(each)
            page.close()

    def _work_raw(self) -> None:
        """Behind the file system: bursts of writes, discards and zeroes between two flushes."""
        dice, begin = random.Random(f"{self.seed} raw"), SIZE - RAW_BLOCKS * BLOCK
        kinds = ["write", "zeroes", *(["discard"] if self._discards else [])]
        fd = os.open(self._node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        page = mmap.mmap(-1, RAW_BLOCKS * BLOCK)
        try:
            burst: list[tuple[str, int, int]] = [("write", 0, RAW_BLOCKS)]
            while not self._over.is_set():
                for what, first, size in burst:
                    place = self.place()
                    data = b"".join(self.raw.pack(i, place, what != "write") for i in range(first, first + size))
                    if what == "write":
                        page[:len(data)] = data
                        with memoryview(page) as view, view[:len(data)] as part:
                            if os.pwrite(fd, part, begin + first * BLOCK) != len(data):
                                raise Failed("a write to the device is shorter than it was to be")
                    else:
                        fcntl.ioctl(fd, BLKDISCARD if what == "discard" else BLKZEROOUT,
                                    struct.pack("QQ", begin + first * BLOCK, size * BLOCK))
                os.fsync(fd)
                self._flushed(self.raw, range(RAW_BLOCKS))
                self.raw_since = min(self.raw_since, self.place())
                self.counts["flushes of the device"] += 1
                time.sleep(0.02 * dice.random())
                sizes = [dice.choice((1, 1, 3, 12)) for _ in range(dice.randrange(1, 12))]
                burst = [(dice.choice(kinds) if dice.random() < 0.4 else "write", dice.randrange(RAW_BLOCKS - size), size)
                         for size in sizes]
        finally:
            os.close(fd)
            page.close()

    def _overwrite(self, file: Overwritten, blocks: Iterable[int], write: Callable[[bytes, int], Any], fd: int) -> None:
        for i in blocks:
            write(file.pack(i, self.place()), i * BLOCK)
        os.fdatasync(fd)
        self._flushed(file, blocks)

    def _flushed(self, file: Overwritten, blocks: Iterable[int]) -> None:
        end = self.place()
        for i in blocks:
            file.flushed(i, end, len(file.begun[i]))

    def _make(self, dice: random.Random, k: int, n: int) -> Written:
        """A new file: in its place at once, or renamed to there; of some a part was allocated before."""
        name, data = f"thread{k}/file{n}", dice.randbytes(dice.choice((1, 700, 4096, 10_000, 40_000, 120_000)))
        renamed = dice.random() < 0.5
        path = self.directory / (f"{name}.new" if renamed else name)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if dice.random() < 0.4:
                os.posix_fallocate(fd, 0, len(data))
                half = len(data) // 2
                os.pwrite(fd, data[half:], half)
                os.fdatasync(fd)
                data = data if dice.random() < 0.5 else bytes(half) + data[half:]
                os.pwrite(fd, data[:half], 0)
            else:
                os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        if renamed:
            os.rename(path, self.directory / name)
        sync(path.parent)
        file = Written(name, data, self.place())
        self.written.append(file)
        return file

    def _remove(self, dice: random.Random, file: Written) -> None:
        file.until = self.place()
        os.unlink(self.directory / file.name)
        if dice.random() < 0.5:
            sync((self.directory / file.name).parent)
        self.counts["removed"] += 1


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ------------------------------------------------------------------ rigs

class Connection(soak.DeviceRig):
    """A server of that disk, and a client's /dev/muendiskX."""

    def __init__(self, name: str, below: Path, number: int, tally: soak.Tally, device: str, before: list[str]) -> None:
        super().__init__(name, "", below, number, tally)
        self.device, self._before = device, before

    def start_server(self) -> None:
        self.server = soak.Program([*self._before, "blk", *self.lists, "--device", self.device], self.place / "server.log")
        self.programs.append(self.server)

    def wait_client(self) -> None:
        self.wait_device()

    def end(self) -> None:
        self.no_errors()
        for each in (self.client, self.server):
            if (status := each.end(signal.SIGTERM)) != 0:
                raise Failed(f"{each.what} ended with {status}: {each.log.read_text()[-2000:]}")

    def has_uring(self) -> bool:
        with contextlib.suppress(FileNotFoundError):    # a descriptor that is closed meanwhile
            return any("[io_uring]" in os.readlink(fd) for fd in Path(f"/proc/{self.server.pid}/fd").iterdir())
        return self.has_uring()


class Stack:
    """ext4 on a connection's device, on a logging disk: directly, by another connection, or as a file on an ext4 there."""

    def __init__(self, name: str, options: argparse.Namespace, below: Path, number: int, tally: soak.Tally) -> None:
        self.name, self._options, self._tally = name, options, tally
        self.place = below / f"{number}-{name}"
        self.place.mkdir()
        self.kind, _, self._threads = name.removesuffix("+shm").partition("-")
        self.log = self.place / "log"
        self.connections: list[Connection] = []     # the last one that was made first
        self.file = self.kind == "file"
        self.size = BELOW if self.file else SIZE

    def run(self) -> Load:
        plant = self._options.plant
        python = [sys.executable, "-m", "muenfast"]
        before = [*WITHOUT_FDATASYNC, *python] if plant == "fdatasync" else \
            [sys.executable, "-c", WITHOUT_URING] if self._threads else python
        store = f"py:{writelog.__file__}:Disk:{self.size}+{plant if plant in writelog.PLANTS else 'none'}+{self.log}"
        shared = "+shm" if self.name.endswith("+shm") else ""
        with contextlib.ExitStack() as stack:
            if self.kind == "store":
                top = self._connect(f"top{shared}", store, before)
            else:
                low = self._connect("low" if shared else "low+shm", store, python)
                target = low.node
                if self.file:
                    run("mkfs.ext4", "-q", "-b", "4096", target)
                    self._mount(stack, target, "low")
                    target = str(self.place / "low" / "image")
                    with open(target, "wb") as file:
                        file.truncate(SIZE)         # all holes: to be durable, its blocks' places must be, too
                top = self._connect(f"top{shared}", target, before)
                if plant != "fdatasync" and top.has_uring() == bool(self._threads):
                    raise Failed("the server is one by threads, and was not to be" if not self._threads else
                                 "the server has io_uring, which it was refused")
            run("mkfs.ext4", "-q", "-b", "4096", top.node, f"{(SIZE - RAW_BLOCKS * BLOCK) >> 10}k")
            place = writelog.Place(self.log)
            stack.callback(place.close)
            discards = self.kind == "store" and bool(shared)
            with contextlib.ExitStack() as upper:
                directory = self._mount(upper, top.node, "top", "-o",
                                        "discard,nodioread_nolock" if discards else "defaults")
                load = Load(directory, top.node, discards, place, f"{self._options.seed} {self.name}", self._options.fsyncs)
                self.begin = place()
                load.run()
                if discards:
                    run("fstrim", directory)
                self.end = place()
            top.end()
        for connection in self.connections[1:]:
            connection.end()
        return load

    def _mount(self, stack: contextlib.ExitStack, node: str, name: str, *options: str) -> Path:
        """A program of its own does it: what hangs is not waited for."""
        directory = self.place / name
        directory.mkdir()
        run("mount", *options, node, directory)
        stack.callback(run, "umount", directory)
        return directory

    def _connect(self, name: str, device: str, before: list[str]) -> Connection:
        connection = Connection(name, self.place, len(self.connections), self._tally, device, before)
        self.connections.insert(0, connection)
        connection.start_server()
        connection.server.wait_ready()
        connection.start_client()
        connection.wait_client()
        return connection

    def abandon(self) -> None:
        """After a failure: the watchdogs of killed clients take away the devices, before their directory goes."""
        for connection in self.connections:
            connection.abandon()
            with contextlib.suppress(Failed):
                wait(lambda node=connection.node: not node or not os.path.exists(node), "a killed client's node to go",
                     pause=0.01)


# ------------------------------------------------------------------ what is looked at

@contextlib.contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    """By mount(2), ext4."""
    directory.mkdir(exist_ok=True)
    if libc.mount(device.encode(), os.fsencode(directory), b"ext4", ctypes.c_ulong(0), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {os.strerror(number)}", device)
    try:
        yield directory
    finally:
        if libc.umount2(os.fsencode(directory), 0) != 0:
            number = ctypes.get_errno()
            raise Failed(f"umount {directory}: {os.strerror(number)}")


@contextlib.contextmanager
def looped(file: int, name: bytes) -> Iterator[str]:
    """A loop device of that file, which goes with its last user."""
    config = loop.LOOP_CONFIG.pack(file, 512, LO_FLAGS_AUTOCLEAR, name)
    while True:
        with open("/dev/loop-control", "rb") as control:
            number = fcntl.ioctl(control, loop.LOOP_CTL_GET_FREE)
        try:
            fd = os.open(loop.path_of(number), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.ioctl(fd, loop.LOOP_CONFIGURE, config)
            except OSError as error:
                if error.errno != errno.EBUSY:      # another process took it
                    raise
                continue
            yield loop.path_of(number)
            return
        finally:
            os.close(fd)


class Checker:
    """One state at a time, each on a file in memory of its own: whoever had a mount namespace made meanwhile keeps the file
    system mounted there after we unmounted it, and what it writes at its end would be in the next state."""

    def __init__(self, place: Path, file: bool) -> None:
        self.place, self.file = place, file
        self.place.mkdir()

    def check(self, durable: bytearray, sectors: dict[int, bytes], load: Load, place: int) -> list[str]:
        """What is wrong with the state."""
        self.image = os.memfd_create("crash", os.MFD_CLOEXEC)
        try:
            return self._check(durable, sectors, load, place)
        finally:
            os.close(self.image)

    def _check(self, durable: bytearray, sectors: dict[int, bytes], load: Load, place: int) -> list[str]:
        os.pwrite(self.image, durable, 0)
        for offset, data in sectors.items():
            os.pwrite(self.image, data, offset)
        try:
            with contextlib.ExitStack() as stack:
                inner = self.image
                if self.file:
                    low = self._mounted(stack, self.image, "low")
                    inner = os.open(low / "image", os.O_RDWR | os.O_CLOEXEC)
                    stack.callback(os.close, inner)
                with contextlib.ExitStack() as top:
                    found = load.check(place, self._mounted(top, inner, "top"), inner)
                found += self._fsck(inner)
            return found + (self._fsck(self.image) if self.file else [])
        except OSError as error:
            return [f"{error.strerror}: {error.filename}"]

    def _mounted(self, stack: contextlib.ExitStack, file: int, name: str) -> Path:
        device = stack.enter_context(looped(file, os.fsencode(self.place)[-63:]))
        return stack.enter_context(mounted(device, self.place / name))

    def _fsck(self, file: int) -> list[str]:
        done = subprocess.run(["e2fsck", "-f", "-n", f"/proc/self/fd/{file}"], pass_fds=[file], capture_output=True,
                              text=True, timeout=soak.PATIENCE, check=False)
        return [f"fsck: status {done.returncode}: {done.stdout}{done.stderr}"] if done.returncode else []


def places(log: list[writelog.Entry], begin: int, end: int, dice: random.Random) -> list[int]:
    """Right before and behind each flush, and between them."""
    flushes = [i for i in range(begin, end) if log[i].kind == writelog.FLUSH]
    between = [dice.randrange(begin, end) for _ in flushes]
    return sorted({*flushes, *(i + 1 for i in flushes), *between, end})


class Verdict:
    def __init__(self, places: int) -> None:
        self.places = places
        self.states = self.found = self.pending = 0
        self.broken = False
        self.problems: list[str] = []
        self.kinds: Counter[str] = Counter()


def judge(stack: Stack, load: Load, options: argparse.Namespace) -> Verdict:
    """All states, or as many as are asked for, evenly from all. By processes: a program that a thread
    starts has, for a moment, the files open that another thread reads, and their file system is not unmounted then."""
    log = writelog.read(stack.log)
    where = places(log, stack.begin, stack.end, random.Random(f"{options.seed} places"))
    verdict, replay = Verdict(len(where)), writelog.Replay(log, stack.size)
    verdict.pending = max(len(replay.go(place)) for place in where)
    # How many there are is known when they have been made, which is cheap beside looking at them.
    total = sum(1 for _ in states(log, stack.size, where, options.seed)) if options.states else 0
    step = max(1.0, total / options.states) if options.states else 1.0
    forked = multiprocessing.get_context("fork")
    reports, enough = forked.Queue(), forked.Event()

    def work(k: int) -> None:
        """Every CHECKERS-th of the states that are due."""
        status = 1
        try:
            checker = Checker(stack.place / f"check{k}", stack.file)
            due, number = 0.0, 0
            for n, (durable, sectors, place, kind) in enumerate(states(log, stack.size, where, options.seed)):
                if enough.is_set():
                    break
                if n < due:
                    continue
                due, number = due + step, number + 1
                if number % CHECKERS == k:
                    found = checker.check(durable, sectors, load, place)
                    if found and options.keep:
                        keep(options.keep / f"{stack.name}.img", durable, sectors)
                    reports.put((place, kind, found))
            status = 0
        except BaseException as error:
            reports.put((0, "", [repr(error)]))
            raise
        finally:
            reports.put(status)

    workers = [forked.Process(target=work, args=(k,), daemon=True) for k in range(CHECKERS)]
    for worker in workers:
        worker.start()
    try:
        collect(stack.name, len(log), reports, enough, verdict)
    finally:
        enough.set()
        for worker in workers:
            worker.join(soak.PATIENCE)      # it unmounts what it has mounted
    reports.close()
    reports.join_thread()
    return verdict


def collect(name: str, entries: int, reports: Any, enough: Any, verdict: Verdict) -> None:
    """What the processes found, until all have ended. Raises Failed."""
    ended = 0
    while ended < CHECKERS:
        try:
            report = reports.get(timeout=soak.PATIENCE)
        except queue.Empty:
            raise Failed(f"no state was looked at for {soak.PATIENCE:g} s; it stands in: "
                         f"{soak.standing(os.getpid())}") from None
        if isinstance(report, int):
            ended += 1
            verdict.broken |= report != 0
            continue
        place, kind, found = report
        verdict.states += 1
        verdict.kinds[kind] += 1
        if found:
            verdict.found += 1
            verdict.problems.append(f"{name}: {place} of {entries}, {kind}: {found[0]}")
            if verdict.found >= PROBLEMS:
                enough.set()
        progress(f"{name}: {verdict.states} states")
    if verdict.broken:
        raise Failed(f"states could not be looked at: {verdict.problems[-1]}")


def states(log: list[writelog.Entry], size: int, where: list[int], seed: int) -> \
        Iterator[tuple[bytearray, dict[int, bytes], int, str]]:
    """(what is durable, sectors besides, place, kind), each state of a place once."""
    replay, dice = writelog.Replay(log, size), random.Random(f"{seed} states")
    for place in where:
        seen = set()
        pending = replay.go(place)
        for kind, pieces in writelog.states(pending, dice):
            sectors = writelog.outcome(replay.durable, pieces)
            key = frozenset(sectors.items())
            if key not in seen:
                seen.add(key)
                yield replay.durable, sectors, place, kind


def keep(path: Path, durable: bytearray, sectors: dict[int, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = bytearray(durable)
    for offset, data in sectors.items():
        image[offset:offset + len(data)] = data
    path.write_bytes(image)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ main

def one(name: str, options: argparse.Namespace, below: Path, number: int, tally: soak.Tally) -> Verdict:
    start = time.monotonic()
    stack = Stack(name, options, below, number, tally)
    try:
        load = stack.run()
        middle = time.monotonic()
        verdict = judge(stack, load, options)
        soak.nothing_left(below, tally)
    except BaseException:
        stack.abandon()
        raise
    log = writelog.read(stack.log)[stack.begin:stack.end]
    counts = Counter(writelog.NAMES[entry.kind] for entry in log)
    end = time.monotonic()
    progress("")
    print(f"crash: {name}: {sum(n for what, n in load.counts.items() if what != 'removed')} syncs, "
          f"{', '.join(f'{counts[what]} {what}' for what in writelog.NAMES)} in {middle - start:.0f} s; "
          f"{verdict.states} states of {verdict.places} places, with up to {verdict.pending} changes open, in "
          f"{end - middle:.0f} s: "
          + (f"{verdict.found} of them wrong" if verdict.found else "every fsynced file right, fsck clean"), flush=True)
    for problem in verdict.problems[:PROBLEMS]:
        print(f"crash: {problem.strip()}", flush=True)
    shutil.rmtree(stack.place)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rigs", type=lambda text: text.split(","), default=RIGS, metavar="L")
    add("--fsyncs", type=int, default=100, metavar="N")
    add("--states", type=int, default=0, metavar="N")
    add("--seed", type=int, default=1, metavar="S")
    add("--plant", choices=PLANTS, default="none")
    add("--keep", type=Path, metavar="DIR")
    options = parser.parse_args()
    for name in options.rigs:
        if name.removesuffix("+shm") not in KINDS:
            parser.error(f"there is no rig {name!r}: {', '.join(KINDS)}, each with +shm, too")
    if libc.prctl(soak.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tally, verdicts = soak.Tally(), []
    with soak.workplace() as below:
        for number, name in enumerate(options.rigs):
            try:
                verdicts.append(one(name, options, below, number, tally))
            except (Failed, OSError) as error:
                print(f"crash: FAILED: {name}: {error}", flush=True)
                soak.clear(below)
                return 1
            except BaseException:
                soak.clear(below)
                raise
    kinds, wrong = sum((verdict.kinds for verdict in verdicts), Counter()), sum(verdict.found for verdict in verdicts)
    print(f"crash: states: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    print("crash: " + (f"FAILED: {wrong} states are wrong" if wrong else "everything held, nothing was left behind"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
