"""A program for test_oneway: what the writer of a strict one-way channel can see, step by step, with a reader or without.

    unshare --mount --pid --net --ipc --fork --mount-proc oneway_program.py library|net reader|nobody

Alone in namespaces of its own, with an empty /dev/shm, /run and /tmp, it plays a piece between user `list`, who writes the
channel, looks at everything and attacks, and user `irc`, who reads it, or nobody. Prints JSON: one object per step, of what
the writer saw, as "kind:place" and a value.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import pwd
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from muenfast import Reader, control, open_reader, open_writer, shm
from muenfast.net import element_size

NAME = "ab"
PATH = f"/dev/shm/{NAME}"
POLICY_FILE = "/tmp/root/policy.toml"
POLICY = f"""
version = 1
[subjects.a]
user = "list"
[subjects.b]
user = "irc"
[channels.{NAME}]
writer = "a"
reader = "b"
bell = false
size = "1M"
[interfaces.net0]
subject = "b"
in = "{NAME}"
up = true
"""
A, B = pwd.getpwnam("list"), pwd.getpwnam("irc")
PROTOCOL, SIZE = 2, 1 << 20
ROOTS = ("/dev/shm", "/run", "/tmp", "/dev/mqueue")
# Of its namespaces: what tells of the whole machine (/proc/cgroups, /proc/swaps) changes with what others do there.
TEXTS = ("/proc/net/unix", "/proc/net/dev", "/proc/net/packet", "/proc/sysvipc/shm", "/proc/sysvipc/sem",
         "/proc/sysvipc/msg", "/proc/self/mountinfo")
IN_ALL_EVENTS, IN_NONBLOCK = 0xFFF, 0o4000
CLONE_NEWNET = 0x40000000
PR_SET_DUMPABLE = 4
EVENTS = {1: "access", 2: "modify", 4: "attrib", 8: "close_write", 16: "close_nowrite", 32: "open", 64: "moved_from",
          128: "moved_to", 256: "create", 512: "delete", 1024: "delete_self", 2048: "move_self", 1 << 15: "ignored"}
libc = ctypes.CDLL(None, use_errno=True)


def become(user: pwd.struct_passwd) -> None:
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    assert libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0     # as a program that is started as this user: it sees its pages


def played(call: Callable[[int, int], None]) -> tuple[int, int, int]:
    """A child that runs call(from us, to us): (process, to it, from it)."""
    (theirs, out), (back, mine) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        os.close(mine)
        return pid, out, back
    os.close(out)
    os.close(back)
    try:
        call(theirs, mine)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def asked(to: int, back: int, word: str) -> str:
    os.write(to, word.encode() + b"\n")
    said = bytearray()
    while not said.endswith(b"\n"):
        piece = os.read(back, 1 << 20)
        assert piece, f"{word}: a player is gone"
        said += piece
    return said.decode().rstrip("\n")


def orders(inp: int, out: int, obey: Callable[[str], str]) -> None:
    with os.fdopen(inp) as lines:
        for line in lines:
            os.write(out, obey(line.strip()).encode() + b"\n")


# ------------------------------------------------------------------ user a: writes, looks, attacks


class Watches:
    """inotify on all that this user may watch."""

    def __init__(self) -> None:
        self.fd = libc.inotify_init1(IN_NONBLOCK)
        self.places: dict[int, str] = {}
        self.refused: list[str] = []

    def add(self, place: str) -> None:
        number = libc.inotify_add_watch(self.fd, place.encode(), IN_ALL_EVENTS)
        if number >= 0:
            self.places[number] = place
        else:
            self.refused.append(f"{place} {errno.errorcode[ctypes.get_errno()]}")

    def taken(self) -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, at = os.read(self.fd, 1 << 16), 0
                while at < len(data):
                    number, mask, _, length = struct.unpack_from("iIII", data, at)
                    name = data[at + 16:at + 16 + length].rstrip(b"\0").decode()
                    what = "+".join(word for bit, word in EVENTS.items() if mask & bit)
                    assert not mask & 1 << 14, "events were lost"
                    found.append(f"{what} {self.places[number]}{f'/{name}' if name else ''}")
                    at += 16 + length
        return found


class Watcher:
    """The writer, and all that it can see."""

    def __init__(self) -> None:
        become(A)
        self.size = element_size("net_hdr", 1500)
        self.epoch = 100
        self.writer = self.activate()
        self.gone = False       # we have nothing of it open
        self.blind = False      # our looks at its pages would fill holes
        self.before: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.watches = Watches()
        for place in (PATH, *ROOTS, f"/run/muenfast-{B.pw_uid}", f"/run/muenfast-{B.pw_uid}/claims",
                      f"/run/muenfast-{B.pw_uid}/regions", f"/run/muenfast-{B.pw_uid}/control"):
            self.watches.add(place)
        self.locks: set[str] = set()
        self.sampling = threading.Thread(target=self.sample, daemon=True)
        self.sampling.start()

    def activate(self) -> Any:
        self.epoch += 1
        return open_writer(NAME, size=self.size, protocol=PROTOCOL, epoch=self.epoch, bell=False)

    def sample(self) -> None:
        """Locks of others, as often as it goes: most are held for a moment only. Those on open files have no process's
        number, and those of other namespaces' are there, too: they count where the file is in here."""
        own = os.getpid()
        here = {f"{os.major(device):02x}:{os.minor(device):02x}"
                for device in (os.stat(root).st_dev for root in ROOTS if os.path.exists(root))}
        while True:
            with open("/proc/locks") as file:
                for line in file:
                    words = line.replace("-> ", "").split()
                    pid, (device, _, _) = int(words[4]), words[5].rpartition(":")
                    if pid != own and (pid > 0 or device in here):
                        self.locks.add(" ".join((*words[1:4], words[5])))
            time.sleep(0)

    def obey(self, order: str) -> str:
        if order != "look":
            getattr(self, order)()
            return ""
        return json.dumps(self.look())

    # ---- what it does

    def write(self) -> None:
        for number in range(10):
            self.writer.write(number.to_bytes(8, "little").ljust(self.size, b"\0"))

    def overrun(self) -> None:
        for number in range(3 * self.writer.elements):
            self.writer.write(number.to_bytes(8, "little").ljust(self.size, b"\0"))

    def restart(self) -> None:
        self.writer.close()
        self.writer = self.activate()
        self.write()

    def cut(self) -> None:
        """Takes all of it away."""
        self.blind = True
        os.truncate(PATH, 0)

    def hollow(self) -> None:
        """Gives it back, with holes."""
        os.truncate(PATH, SIZE)

    def punch(self) -> None:
        self.cut()
        self.hollow()

    def fill(self) -> None:
        fd = os.open(PATH, os.O_RDWR)
        os.posix_fallocate(fd, 0, SIZE)
        os.close(fd)
        self.blind = False
        self.restart()

    def replace(self) -> None:
        """The same name is another file, which has been there before."""
        self.writer.close()
        os.unlink(PATH)
        fd = os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.posix_fallocate(fd, 0, SIZE)
        os.fchmod(fd, 0o640)
        os.close(fd)
        self.watches.add(PATH)
        self.writer = self.activate()
        self.write()

    def leave(self) -> None:
        """Nothing of ours is open: then the kernel says whether it is of others."""
        self.writer.close()
        self.gone = True

    # ---- what it sees

    def look(self) -> dict[str, Any]:
        seen: dict[str, Any] = {"events:": self.watches.taken(), "unwatched:": self.watches.refused}
        for root in ROOTS:
            self.below(root, seen)
        for path in TEXTS:
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                text = file.read()
                before = self.texts.get(path, text)
                # A mount that others of the machine had goes here, too, when they remove its mount point.
                seen[f"changed:{path}"] = not set(text.splitlines()) <= set(before.splitlines()) if "mountinfo" in path \
                    else text != before
                self.texts[path] = text
        self.locks, locks = set(), self.locks
        seen["locks:"] = sorted(locks)
        if self.gone:
            seen["lease:"] = self.lease()
        elif not self.blind:
            self.pages(seen)
        seen["space:"] = os.statvfs("/dev/shm").f_bfree, os.statvfs("/dev/shm").f_ffree
        with contextlib.suppress(FileNotFoundError):    # the next one who maps it sets a new access time
            os.utime(PATH, ns=(1, os.stat(PATH).st_mtime_ns))
            self.before[f"atime:{PATH}"] = 1
            self.before[f"ctime:{PATH}"] = os.stat(PATH).st_ctime_ns
        return seen

    def below(self, path: str, seen: dict[str, Any]) -> None:
        """All metadata, whether times changed since the last look, and every byte that may be read."""
        try:
            now = os.lstat(path)
        except OSError as error:
            seen[f"refused:{path}"] = errno.errorcode[error.errno or 0]
            return
        seen[f"stat:{path}"] = [now.st_mode, now.st_uid, now.st_gid, now.st_nlink, now.st_size, now.st_blocks]
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            key, value = f"{name[3:8]}:{path}", getattr(now, name)
            seen[key] = self.before.get(key) != value
            self.before[key] = value
        try:
            if stat.S_ISDIR(now.st_mode) and not (now.st_uid == os.geteuid() and path.startswith("/run/")):  # our own books
                for name in sorted(os.listdir(path)):
                    self.below(f"{path}/{name}", seen)
            elif stat.S_ISREG(now.st_mode):
                flags = os.O_RDONLY | (os.O_NOATIME if now.st_uid == os.geteuid() else 0)
                fd = os.open(path, flags)
                with os.fdopen(fd, "rb") as file:
                    data = file.read()
                seen[f"bytes:{path}"] = hashlib.sha256(data).hexdigest()
        except OSError as error:
            seen[f"refused:{path}"] = errno.errorcode[error.errno or 0]

    def pages(self, seen: dict[str, Any]) -> None:
        """Of our mapping: which pages are there, and which are nobody else's."""
        view = self.writer.owner.view
        sum(view[::4096])       # all of it in our page tables
        with open("/proc/self/maps") as file:
            [at] = [int(line.partition("-")[0], 16) for line in file if line.rstrip("\n").endswith(PATH)]
        n = len(view) // 4096
        with open("/proc/self/pagemap", "rb") as memory:
            memory.seek(at // 4096 * 8)
            words = struct.unpack(f"{n}Q", memory.read(8 * n))
        found: collections.Counter[str] = collections.Counter()
        for word in words:
            found["absent" if not word >> 63 & 1 else "ours alone" if word >> 56 & 1 else "shared"] += 1
        seen["pages:"] = dict(found)
        resident = (ctypes.c_ubyte * n)()
        assert libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(len(view)), resident) == 0
        seen["resident:"] = sum(each & 1 for each in resident)

    def lease(self) -> str:
        fd = os.open(PATH, os.O_RDWR)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return "nobody has it open"
        except BlockingIOError:
            return "somebody has it open"
        finally:
            os.close(fd)


# ------------------------------------------------------------------ user b: reads


class Library:
    """muenfast.open_reader, in a process of its own."""

    def start(self) -> None:
        self.pid, self.to, self.back = played(self.run)
        asked(self.to, self.back, "look")

    def run(self, inp: int, out: int) -> None:
        become(B)
        reader = open_reader(NAME, protocol=PROTOCOL, bell=False)
        buffer = bytearray(1 << 20)

        def obey(order: str) -> str:
            nonlocal reader
            taken = 0
            reader.owner.replaced()     # a look that nobody sees, either
            for _ in range(20):
                reader.wait(0.001)
                taken += reader.read_many_into(buffer)
                if reader.broken and reader.owner.remap():
                    old, end = reader, reader.owner
                    reader = Reader(end.view, protocol=PROTOCOL)
                    reader.owner, old.owner = end, None
                    old.close()
            return str(taken)
        orders(inp, out, obey)
        reader.close()

    def read(self) -> str:
        """How many elements it has taken now."""
        return asked(self.to, self.back, "read")

    catch_up = read

    def end(self, how: int | None) -> None:
        if how is not None:
            os.kill(self.pid, how)
        os.close(self.to)
        os.close(self.back)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert status == (0 if how is None else -how), status


class Net:
    """muenfast net by a policy, an interface that only receives."""

    def start(self) -> None:
        self.seen = 0
        self.process = subprocess.Popen([sys.executable, "-m", "muenfast", "net", "--policy", POLICY_FILE, "--subject",
                                         "b"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("ready"):
            assert line, "it does not serve"

    def read(self) -> str:
        """How many elements it has looked at, or missed, since its start; a tick of its threads is within that time."""
        time.sleep(0.25)
        return str(self.count())

    def catch_up(self) -> str:
        """Likewise, once there are some more."""
        before, end = self.seen, time.monotonic() + 20
        time.sleep(0.25)
        while self.count() == before and time.monotonic() < end:
            time.sleep(0.05)
        return str(self.seen)

    def count(self) -> int:
        pid, to, back = played(self.ask)    # as its own user, whom it answers
        self.seen = int(asked(to, back, "look"))
        os.close(to)
        os.close(back)
        assert os.waitpid(pid, 0)[1] == 0
        return self.seen

    def ask(self, inp: int, out: int) -> None:
        become(B)
        os.environ["MUENFAST_RUNTIME_DIR"] = f"/run/muenfast-{B.pw_uid}"
        [entry] = control.ask(self.process.pid, {"command": "status"})["interfaces"]
        # What comes is no packet.
        orders(inp, out, lambda _: str(sum(entry["offences"].values()) + entry["received"]["lost"]["overrun"]))

    def end(self, how: int | None) -> None:
        self.process.send_signal(how or signal.SIGTERM)
        self.process.communicate(timeout=20)
        assert self.process.returncode == (0 if how is None else -how), self.process.returncode


# ------------------------------------------------------------------ the piece


def main(kind: str, who: str) -> None:
    for place in ("/dev/shm", "/run", "/tmp"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", place], check=True)
    os.mkdir(os.path.dirname(POLICY_FILE), 0o700)
    with open(POLICY_FILE, "w") as file:
        file.write(POLICY)
    subprocess.run([sys.executable, "-m", "muenfast", "policy", "apply", POLICY_FILE], check=True,
                   stdout=subprocess.DEVNULL)
    for user in (A, B):
        shm.give_runtime_dir(user.pw_uid, user.pw_gid)
        for room in ("claims", "regions", "control"):
            os.mkdir(f"/run/muenfast-{user.pw_uid}/{room}", 0o700)
            os.chown(f"/run/muenfast-{user.pw_uid}/{room}", user.pw_uid, user.pw_gid)

    def writer(inp: int, out: int) -> None:
        if kind == "net":       # whose interfaces and sockets are in another one
            assert libc.unshare(CLONE_NEWNET) == 0
        orders(inp, out, Watcher().obey)
    pid, to, back = played(writer)
    reader = {"library": Library, "net": Net}[kind]() if who == "reader" else None
    record: list[tuple[str, dict[str, Any], str]] = []

    def step(name: str, order: str | None, of_reader: Callable[[Any], Any] | None) -> None:
        if order is not None:
            asked(to, back, order)
        said = "" if reader is None or of_reader is None else of_reader(reader)
        record.append((name, json.loads(asked(to, back, "look")), said or ""))

    step("before", None, None)
    step("again", None, None)       # what looking itself changes
    step("start", None, lambda one: one.start())
    step("read", "write", lambda one: one.catch_up())
    step("overrun", "overrun", lambda one: one.catch_up())
    step("killed", None, lambda one: one.end(signal.SIGKILL))
    step("second start", None, lambda one: one.start())
    step("epoch", "restart", lambda one: one.catch_up())
    step("cut", "cut", lambda one: one.read())
    step("hollow", "hollow", lambda one: one.read())
    step("filled", "fill", lambda one: one.catch_up())
    step("gone on", "write", lambda one: one.catch_up())
    step("punched", "punch", lambda one: one.read())
    step("filled again", "fill", lambda one: one.catch_up())
    step("leave", "leave", None)
    step("replaced", "replace", lambda one: one.read())
    step("stopped", None, lambda one: one.end(None))
    print(json.dumps(record))
    os.close(to)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
