"""What this machine offers to muenfast, and what dead processes left on it.

checks() and leftovers() only look. A left-over is something that this user's books (the runtime directory) account for
and no living process holds, or a /dev/muendiskX whose loop device is free. remove() looks again before it acts. Not
seen: processes of another PID namespace that have a region mapped and keep no books here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import importlib
import logging
import os
import platform
import re
import resource
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muenfast import __version__, bpf, control, shm
from muenfast.attach import block, fuse, fuseuring, loop, nbdkernel, sockets, watchdog
from muenfast.errors import ClaimError

log = logging.getLogger("muenfast")

OK, LIMITED, MISSING = "ok", "limited", "missing"

SWEEP_LIMIT = 2.0  # seconds that a start waits for the kernel to take away what dead processes left

DEV = "/dev"  # where the nodes are

_MIB = 1 << 20
_CONNECTION = 2 * (_MIB + 4096)  # bytes of /dev/shm that one takes: two channels and their bells
_DESCRIPTORS = 16  # of one connection: channels, bells, records, store or front end
_LEAST_FILES = 1024
_LEAST_LOCKED = 8 * _MIB
_LEAST_SHM = 16 * _CONNECTION
_IO_URING_SETUP = 425  # the same on every architecture but alpha
_TMPFS = 0x01021994  # linux/magic.h
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": fuse.CAP_SYS_ADMIN, "CAP_SYS_RESOURCE": 24, "CAP_MKNOD": 27}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the machine offers or not.

    state: "ok", "limited" or "missing". text: what was found. lost: what one has to do without, one sentence; next:
    the command (or step) that helps; both "" when ok. needed: no /dev/muendiskX without it.
    """

    name: str
    state: str
    text: str
    lost: str = ""
    next: str = ""
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Leftover:
    """What dead processes left. kind: claim, user, note, region, bell, temporary, socket, mount, loop, device or node.

    path: what goes. text: one sentence.
    """

    kind: str
    path: str
    text: str
    _remove: Callable[[], str | None] = field(repr=False, compare=False)


# ---- small tools


def _text(path: str) -> str:
    """A file of /proc or /sys, stripped; "" where there is none."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _chosen(path: str) -> str:
    """The word in brackets of a sysfs choice, or the only one."""
    text = _text(path)
    found = re.search(r"\[([^]]+)]", text)
    return found[1] if found else text


def _modules(kind: str) -> str:
    return _text(f"/lib/modules/{platform.release()}/modules.{kind}")


def _load(module: str, option: str) -> str:
    """How to get a driver that the kernel does not show."""
    if re.search(rf"/{module}\.ko", _modules("dep")):
        return f"modprobe {module}"
    return f"boot a kernel with {option} (y or m)"


def _node(path: str, misc: str, module: str, option: str) -> str:
    """How to get a missing node of a misc device."""
    for line in _text("/proc/misc").splitlines():
        minor, _, name = line.strip().partition(" ")
        if name == misc:  # the driver is there, only its node is not: a container
            return f"mkdir -p {os.path.dirname(path)} && mknod -m 600 {path} c 10 {minor}"
    return _load(module, option)


def _opens(path: str) -> OSError | None:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error
    return None


def _capable(number: int) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text("/proc/self/status"), re.MULTILINE)
    return bool(found and int(found[1], 16) >> number & 1)


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", _MIB), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes} bytes"


def _more(option: str) -> str:
    """How one becomes more than one is."""
    if os.geteuid():
        return "sudo muenfast doctor"
    return f"start the container with --cap-add {option.removeprefix('CAP_')}"


# ---- checks


def checks() -> list[Check]:
    """What this machine offers, in the order in which a lack of it hurts. Opens devices, changes nothing."""
    return [found for each in (_versions, _shared_memory, _runtime, _fuse, _loop, _capabilities, _cpus, _limits,
                               _huge_pages, _drivers, _marks, _io_uring, _schedulers) for found in each()]


def _versions() -> Iterator[Check]:
    kernel = platform.release()
    numbers = tuple(int(part) for part in re.findall(r"\d+", kernel)[:2])
    if numbers >= (5, 8):
        yield Check("kernel", OK, f"Linux {kernel}, {platform.machine()}", needed=True)
    else:
        yield Check("kernel", MISSING, f"Linux {kernel}", "no block device: LOOP_CONFIGURE came with Linux 5.8.",
                    "boot Linux 5.8 or later", needed=True)
    yield Check("python", OK, f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})")
    broken = []
    for module in ("muenfast._ring", "muenfast._blk", "muenfast._target", "muenfast._client"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            broken.append(str(error))
    if broken:
        yield Check("muenfast", MISSING, f"{__version__}, {'; '.join(broken)}", "nothing can be exported or attached.",
                    "pip install --force-reinstall .", needed=True)
    else:
        yield Check("muenfast", OK, f"{__version__}, compiled modules loaded", needed=True)


def _shared_memory() -> Iterator[Check]:
    def result(state: str, text: str, lost: str = "", step: str = "") -> Check:
        return Check("/dev/shm", state, text, lost, step, needed=True)

    try:
        space = os.statvfs("/dev/shm")
    except OSError as error:
        yield result(MISSING, error.strerror or str(error), "channels have no place but files (/path locators).",
                     "mkdir -p -m 1777 /dev/shm && mount -t tmpfs -o mode=1777 tmpfs /dev/shm")
        return
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    text = f"{_size(total)}, {_size(free)} free: {free // _CONNECTION} connections of default size"
    if not os.access("/dev/shm", os.W_OK | os.X_OK, effective_ids=True):
        yield result(MISSING, "not writable", "channels have no place but files (/path locators).",
                     "chmod 1777 /dev/shm")
    elif free < _LEAST_SHM:
        state = MISSING if free < _CONNECTION else LIMITED
        yield result(state, text, f"a connection takes {_size(_CONNECTION)}, a ram:SIZE:NAME disk its size; what does "
                     "not fit is refused when it is made.", f"mount -o remount,size={max(2 * total, 1 << 30) >> 20}M "
                     "/dev/shm")
    elif shm.filesystem("/dev/shm") != "tmpfs":
        yield result(LIMITED, f"{text}; on {shm.filesystem('/dev/shm')}, not on tmpfs",
                     "the kernel writes channels to a disk now and then.",
                     "mount -t tmpfs -o mode=1777 tmpfs /dev/shm")
    else:
        yield result(OK, text)


def _runtime() -> Iterator[Check]:
    name, lost = "runtime directory", "claims, presence and control sockets have no place: nothing starts."
    try:
        path = shm.runtime_dir(make=False)
    except FileNotFoundError as error:
        path = os.fsdecode(error.filename)
        above = os.path.dirname(path)
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if os.access(above, os.W_OK | os.X_OK, effective_ids=True):
            yield Check(name, OK, f"{path}: not there yet, made by the first process", needed=True)
        else:
            yield Check(name, MISSING, f"{path} is not there, and {above} is not writable", lost,
                        "export MUENFAST_RUNTIME_DIR=$HOME/.muenfast", needed=True)
    except OSError as error:
        path = os.fsdecode(error.filename or "")
        step = f"chmod 700 {path}" if error.errno == errno.EPERM and "write" in str(error.strerror) else \
            "export MUENFAST_RUNTIME_DIR=$HOME/.muenfast"
        yield Check(name, MISSING, f"{path}: {error.strerror}", lost, step, needed=True)
    else:
        mode = stat.S_IMODE(os.lstat(path).st_mode)
        yield Check(name, OK, f"{path}, mode {mode:o}, {len(_claims())} live claims", needed=True)


def _fuse() -> Iterator[Check]:
    lost = "no /dev/muendiskX; `muenfast blk --client --attach none` and muenfast.BlockDevice work."
    problem = _opens("/dev/fuse")
    if unbuilt := fuse.unbuilt():
        yield Check("FUSE", MISSING, unbuilt, lost,
                    "apt-get install libfuse3-dev pkg-config && pip install --force-reinstall .", needed=True)
    elif isinstance(problem, FileNotFoundError):
        yield Check("FUSE", MISSING, "/dev/fuse is missing", lost,
                    _node("/dev/fuse", "fuse", "fuse", "CONFIG_FUSE_FS"), needed=True)
    elif problem is not None:
        step = "sudo muenfast doctor" if os.geteuid() else "start the container with --device /dev/fuse"
        yield Check("FUSE", MISSING, f"/dev/fuse: {problem.strerror}", lost, step, needed=True)
    else:
        yield Check("FUSE", OK, "/dev/fuse opens, the compiled front end loads", needed=True)
        yield _fuse_uring()
    # The front end mounts its own (fsopen), so the kernel must know it, and nobody need have mounted it.
    if "fusectl" in _text("/proc/filesystems").split():
        yield Check("fusectl", OK, "known to the kernel")
    else:
        yield Check("fusectl", LIMITED if problem is None else MISSING, "unknown to the kernel",
                    "a dead client's connection is ended by a forced unmount, which other mount namespaces can defeat.",
                    _load("fuse", "CONFIG_FUSE_FS"))


def _fuse_uring() -> Check:
    name, value = "FUSE over io_uring", _text(fuseuring.PARAMETER)
    if value == "Y":
        return Check(name, OK, f"{fuseuring.PARAMETER} is Y")
    lost = "a block device does a tenth less 4 KiB requests per second."
    if not value:
        return Check(name, LIMITED, "unknown to the kernel", lost, "boot Linux 6.14 or newer, with CONFIG_FUSE_IO_URING=y")
    if fuseuring.tried() and os.access(fuseuring.PARAMETER, os.W_OK):
        return Check(name, OK, f"{fuseuring.PARAMETER} is {value}; a client switches it on while it makes a device")
    return Check(name, LIMITED, f"{fuseuring.PARAMETER} is {value}", lost, f"echo Y > {fuseuring.PARAMETER}")


def _loop() -> Iterator[Check]:
    lost = "no /dev/muendiskX; `muenfast blk --client --attach none` and muenfast.BlockDevice work."
    problem = _opens("/dev/loop-control")
    if problem is not None:
        if isinstance(problem, FileNotFoundError):
            step = _node("/dev/loop-control", "loop-control", "loop", "CONFIG_BLK_DEV_LOOP")
        else:
            step = "sudo muenfast doctor" if os.geteuid() else "start the container with --device /dev/loop-control"
        yield Check("loop", MISSING, f"/dev/loop-control: {problem.strerror}", lost, step, needed=True)
        return
    numbers = loop.numbers()
    free = [number for number in numbers if not loop.is_bound(number)]
    # What LOOP_CTL_GET_FREE would say, without making a device of it.
    following = min(free) if free else max(numbers, default=-1) + 1
    text = f"{len(free)} of {len(numbers)} devices are free, the kernel makes more"
    if not os.path.exists(loop.path_of(following)) and (free or shm.filesystem("/dev") != "devtmpfs"):
        yield Check("loop", MISSING, f"{text}; the next one, {loop.path_of(following)}, has no node",
                    "the next disk cannot be attached: nobody makes nodes here.",
                    f"mknod -m 660 {loop.path_of(following)} b {loop.LOOP_MAJOR} {following}", needed=True)
    else:
        yield Check("loop", OK, text, needed=True)


def _capabilities() -> Iterator[Check]:
    for name, needed, lost in (
            ("CAP_SYS_ADMIN", True, "no /dev/muendiskX: mounting and loop devices are refused."),
            ("CAP_MKNOD", True, "no /dev/muendiskX: the node cannot be made."),
            ("CAP_NET_ADMIN", False, "no network interfaces (`muenfast net`)."),
            ("CAP_SYS_RESOURCE", False, "hard limits (descriptors, locked memory) stay as they are.")):
        if _capable(_CAPABILITIES[name]):
            yield Check(name, OK, "effective", needed=needed)
        else:
            yield Check(name, MISSING, f"user {os.geteuid()} does not have it", lost, _more(name), needed=needed)


def _cpus() -> Iterator[Check]:
    online, mine = os.cpu_count() or 1, sorted(os.sched_getaffinity(0))
    text = f"{online} online ({_text('/sys/devices/system/cpu/online') or '?'}), {len(mine)} allowed here"
    if len(mine) > 1:
        yield Check("CPUs", OK, text)
    else:
        yield Check("CPUs", LIMITED, text, "server and client take turns on one CPU: each request costs two switches.",
                    f"taskset -pc 0-{online - 1} $$" if online > 1 else "give this machine a second CPU")


def _limits() -> Iterator[Check]:
    def show(value: int) -> str:
        return "unlimited" if value == resource.RLIM_INFINITY else str(value)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES
    text = f"{show(soft)} (hard {show(hard)})"
    if enough:
        yield Check("RLIMIT_NOFILE", OK, text)
    else:
        raisable = hard == resource.RLIM_INFINITY or hard >= _LEAST_FILES
        yield Check("RLIMIT_NOFILE", LIMITED, text, f"a process can hold about {soft // _DESCRIPTORS} connections.",
                    f"ulimit -n {_LEAST_FILES}" if raisable else
                    f"sudo prlimit --nofile={_LEAST_FILES}:{_LEAST_FILES} --pid $$")
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_LOCKED:
        yield Check("RLIMIT_MEMLOCK", OK, f"{show(soft)} bytes")
    else:
        yield Check("RLIMIT_MEMLOCK", LIMITED, f"{show(soft)} bytes (hard {show(hard)})",
                    "nothing in this version, which locks no memory.", f"sudo prlimit --memlock={_LEAST_LOCKED} --pid $$")


def _huge_pages() -> Iterator[Check]:
    below = "/sys/kernel/mm/transparent_hugepage"
    mode, shared = _chosen(f"{below}/enabled"), _chosen(f"{below}/shmem_enabled")
    lost = "RAM disks stand on small pages: random access misses the TLB more often."
    if mode == "always":
        yield Check("transparent huge pages", OK, f"{mode}, in shared memory {shared or 'none'}")
    elif mode:
        yield Check("transparent huge pages", LIMITED, f"{mode}, in shared memory {shared or 'none'}", lost,
                    f"echo always > {below}/enabled")
    else:
        yield Check("transparent huge pages", MISSING, "unknown to the kernel", lost,
                    "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    info = dict(re.findall(r"^(\w+):\s+(\d+)", _text("/proc/meminfo"), re.MULTILINE))
    lost = "no channels on huge pages (as files of a hugetlbfs); nothing else of muenfast uses them."
    if "HugePages_Total" not in info:
        yield Check("hugetlbfs", MISSING, "unknown to the kernel", lost, "boot a kernel with CONFIG_HUGETLBFS")
        return
    total, page = int(info["HugePages_Total"]), _size(int(info.get("Hugepagesize", 0)) << 10)
    places = re.findall(r"^\S+ (\S+) hugetlbfs ", _text("/proc/self/mounts"), re.MULTILINE)
    text = f"{info['HugePages_Free']} of {total} pages of {page} are free, mounted on {' '.join(places) or 'nothing'}"
    if total and places:
        yield Check("hugetlbfs", OK, text)
    else:
        step = [] if total else ["sysctl vm.nr_hugepages=16"]
        if not places:
            step.append("mkdir -p /dev/hugepages && mount -t hugetlbfs none /dev/hugepages")
        yield Check("hugetlbfs", LIMITED if total or places else MISSING, text, lost, " && ".join(step))


def _drivers() -> Iterator[Check]:
    """Drivers that one can do without, and those that later versions may use; said because people ask."""
    for name, path, lost, step in (
            ("TUN", "/dev/net/tun", "no network interfaces (`muenfast net`).",
             _node("/dev/net/tun", "tun", "tun", "CONFIG_TUN")),
            ("nbd", "/sys/module/nbd", "no `muenfast blk --client --attach nbd`; FUSE and loop do the same.",
             _load("nbd", "CONFIG_BLK_DEV_NBD")),
            ("ublk", "/dev/ublk-control", "nothing in this version: disks are attached through FUSE and loop.",
             _node("/dev/ublk-control", "ublk-control", "ublk_drv", "CONFIG_BLK_DEV_UBLK"))):
        problem = _opens(path) if name != "nbd" else (None if os.path.exists(path) else
                                                      OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
        if problem is None:
            yield Check(name, OK, path)
        elif problem.errno == errno.EBUSY:
            yield Check(name, OK, f"{path}, in use")
        elif problem.errno in (errno.EACCES, errno.EPERM):
            yield Check(name, LIMITED, f"{path}: {problem.strerror}", lost, _more("CAP_NET_ADMIN" if name == "TUN"
                                                                                  else "CAP_SYS_ADMIN"))
        else:
            yield Check(name, MISSING, f"{path}: {problem.strerror}", lost, step)


def _marks() -> Iterator[Check]:
    """How network interfaces can carry netfilter marks. Tried in a network namespace that goes at once."""
    problems = bpf.problems()
    way = next((way for way, problem in problems.items() if problem is None), None)
    text = "; ".join(f"no {each.value}: {problem}" for each, problem in problems.items() if problem is not None)
    if way is bpf.Way.TCX:
        yield Check("netfilter marks", OK, "tcx: the kernel takes the eBPF programs")
        return
    if not _capable(_CAPABILITIES["CAP_NET_ADMIN"]):
        step = _more("CAP_NET_ADMIN")
    elif "not permitted" in (problems[bpf.Way.TCX] or ""):
        step = _more("CAP_BPF")
    else:
        step = "boot Linux 6.6 or later, with CONFIG_BPF_SYSCALL and CONFIG_NET_XGRESS"
    if way is None:
        yield Check("netfilter marks", MISSING, text, "network interfaces send mark 0, and set none.", step)
    else:
        yield Check("netfilter marks", LIMITED, f"{way.value}; {text}", bpf.LOST[way], step)


def _io_uring() -> Iterator[Check]:
    lost = "files and disks are served by threads, and /dev/muendiskX has two: more CPU time for each request."
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_IO_URING_SETUP, 0, None)  # never succeeds: no parameters
    number = ctypes.get_errno()
    disabled = _text("/proc/sys/kernel/io_uring_disabled")
    if number == errno.ENOSYS:
        yield Check("io_uring", MISSING, "not compiled into this kernel", lost, "boot a kernel with CONFIG_IO_URING")
    elif number == errno.EPERM:
        by = f"kernel.io_uring_disabled is {disabled}" if disabled not in ("", "0") else "a seccomp filter refuses it"
        yield Check("io_uring", LIMITED, f"compiled in, but {by}", lost, "sysctl kernel.io_uring_disabled=0"
                    if disabled not in ("", "0") else "start the container with a seccomp profile that allows it")
    else:
        yield Check("io_uring", OK, f"compiled in, kernel.io_uring_disabled is {disabled or 'unknown to it'}")


def _schedulers() -> Iterator[Check]:
    """I/O schedulers below what this user's processes export, and of the disks that they attached."""
    try:
        base = shm.runtime_dir(make=False)
        answers = control.ask_all({"command": "status"}, sweep=False) if os.path.isdir(f"{base}/control") else []
    except OSError:
        return
    queues: dict[str, tuple[str, bool]] = {}
    for answer in answers:
        for entry in answer.get("entries", ()):
            client = entry.get("role") == "client"
            below = dict(entry.get("disks", {}))
            if client and entry["device"] != "-":
                with contextlib.suppress(OSError):
                    number = os.stat(entry["device"]).st_rdev
                    below[entry["device"]] = f"{os.major(number)}:{os.minor(number)}"
            for device, number in below.items():
                queue = _queue(number)
                if queue is not None:
                    queues.setdefault(queue, (device, client))
    for queue, (device, client) in sorted(queues.items()):
        scheduler, disk = _chosen(f"{queue}/scheduler"), queue.split("/")[-2]
        text = f"{scheduler} on {disk}, for {device}"
        if scheduler == "none":
            yield Check("scheduler", OK, text)
        else:   # `rotational` is what a virtual disk says of itself as well, where its host does not know better
            turns = not client and _text(f"{queue}/rotational") == "1"
            yield Check("scheduler", LIMITED, text, "requests are sorted twice: they come merged and in order already.",
                        f"echo none > /sys/block/{disk}/queue/scheduler"
                        f"{' (unless it is a disk that really turns)' if turns else ''}")


def _queue(number: str) -> str | None:
    """The sysfs queue of the block device MAJOR:MINOR or of the disk that it is a part of; None: no disk is known below
    it."""
    place = os.path.realpath(f"/sys/dev/block/{number}")
    for queue in (f"{place}/queue", f"{os.path.dirname(place)}/queue"):
        if os.path.exists(f"{queue}/scheduler"):
            return queue
    return None


# ---- left-overs


def _claims() -> list[dict[str, Any]]:
    """Live claims; [] where there are no books."""
    try:
        return shm.claims(sweep=False) if os.path.isdir(f"{shm.runtime_dir(make=False)}/claims") else []
    except FileNotFoundError:
        return []


def leftovers() -> list[Leftover]:
    """What dead processes left, in the order in which it should go; changes nothing. Raises OSError.

    [] where the runtime directory is no place for books: a check says so.
    """
    try:
        base = shm.runtime_dir(make=False)
    except FileNotFoundError:
        base = ""
    except OSError:
        return []
    holders = {str(claim.get("key")): claim.get("pid") for claim in _claims()}
    found: list[Leftover] = []
    if base:
        found += _mounts(base, holders)
        found += _devices(base, holders)
    orphans = _orphans(base, holders)
    found += orphans.values()
    found += _nodes(holders, orphans.keys())
    if base:
        if os.path.isdir(f"{base}/control"):
            found += [Leftover("socket", control.path_of(pid), f"of process {pid}, which is dead", _Socket(pid))
                      for pid in control.dead()]
        found += _sockets(base, holders)
        stale = shm.stale()
        if any(left.kind in ("region", "bell") for left in stale):
            stale = shm.stale(_mapped())
        found += [Leftover(left.kind, left.path, left.text, _Stale(left)) for left in stale]
    return found


def sweep(seconds: float = SWEEP_LIMIT) -> None:
    """Removes all left-overs, whoever's they were, as a serving command does when it starts; each is a line of the log.

    Returns after that time at the latest: a thread goes on then with what the kernel takes its time for.
    """
    def work() -> None:
        try:
            for left in leftovers():
                problem = remove(left)
                log.info("left over: %s %s (%s): %s", left.kind, left.path, left.text, problem or "removed")
        except Exception as error:  # whatever it is: serving is what was asked for, and `muenfast doctor` tells
            log.warning("cannot remove what dead processes left: %s", error)

    thread = threading.Thread(target=work, name="sweep", daemon=True)
    thread.start()
    thread.join(seconds)


def _cleaning(name: str) -> shm.Claim:
    """The claim on a disk's name; who wants a name waits for this one."""
    return shm.claim(f"name-{name}", f"/dev/{name}", {"cleaning": True})


def remove(left: Leftover) -> str | None:
    """Removes a left-over; None, or one sentence on why it is still there. Once more does no harm."""
    try:
        return left._remove()
    except ClaimError as error:
        return f"in use again, by {error.holder}"
    except OSError as error:
        return f"{os.fsdecode(error.filename or left.path)}: {error.strerror}"


@dataclass(frozen=True, slots=True)
class _Stale:
    left: shm.Stale

    def __call__(self) -> str | None:
        return None if shm.remove_stale(self.left) else "in use again"


@dataclass(frozen=True, slots=True)
class _Socket:
    pid: int

    def __call__(self) -> str | None:
        control.remove_dead(self.pid)
        return "in use again" if os.path.lexists(control.path_of(self.pid)) else None


def _sockets(base: str, holders: dict[str, Any]) -> Iterator[Leftover]:
    """NBD sockets of clients that died."""
    for record, path, pid in sockets.records(base):
        if sockets.key_of(path) not in holders:
            there = os.path.lexists(path)
            yield Leftover("socket", path if there else record,
                           f"{'an NBD socket' if there else 'the record of one'} of process {pid}, which is dead",
                           _NbdSocket(record, path))


@dataclass(frozen=True, slots=True)
class _NbdSocket:
    record: str
    path: str

    def __call__(self) -> str | None:
        return None if sockets.remove_dead(self.record, self.path) else "in use again"


def _mapped() -> set[tuple[int, int]]:
    """(device, inode) of every file that a process, as far as we may look, has mapped."""
    found = set()
    for place in glob.iglob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):
            found |= {key for key, _ in shm.mapped_by(place)}
    return found


def _mounts(base: str, holders: dict[str, Any]) -> Iterator[Leftover]:
    """Attachments whose name nobody alive claims."""
    mounted = _text("/proc/self/mountinfo")
    for path, name, pid in fuse.mountpoints(base):
        if f"name-{name}" not in holders:
            # Of a client that died: a mount, loop devices on the file in it, the node; or the bare directory.
            parts = [f"a FUSE mount of process {pid}, which is dead" if f" {path} " in mounted else
                     f"a mount point of process {pid}, which is dead"]
            parts += [f"{loop.path_of(number)} on it" for number in watchdog.loops_below(path)]
            yield Leftover("mount", path, ", ".join(parts), _Mount(base, name, path))


@dataclass(frozen=True, slots=True)
class _Mount:
    base: str
    name: str
    path: str

    def __call__(self) -> str | None:
        with _cleaning(self.name):
            complaints = fuse.reclaim_name(self.base, self.name)
        return "; ".join(complaints) or None


def _devices(base: str, holders: dict[str, Any]) -> Iterator[Leftover]:
    """Devices of the nbd driver whose name nobody alive claims."""
    for number, name, pid, _ in nbdkernel.left_devices(base):
        if f"name-{name}" not in holders:
            yield Leftover("device", f"/dev/nbd{number}", f"attached as /dev/{name} by process {pid}, which is dead",
                           _Device(base, name))


@dataclass(frozen=True, slots=True)
class _Device:
    base: str
    name: str

    def __call__(self) -> str | None:
        with _cleaning(self.name):
            return "; ".join(nbdkernel.reclaim_name(self.base, self.name)) or None


def _orphans(base: str, holders: dict[str, Any]) -> dict[int, Leftover]:
    """Loop devices on a file in a mount of ours that has gone, of a process that is dead."""
    found: dict[int, Leftover] = {}
    for number, given in loop.orphans().items() if base else ():
        name, _, pid = os.path.basename(os.path.dirname(os.fsdecode(given))).rpartition("-")
        # The kernel keeps the end of a path only; should that fit another directory's, too, its process must be dead.
        if name and pid.isdecimal() and given == loop.given_name(f"{base}/mnt/{name}-{pid}/disk") and \
                f"name-{name}" not in holders and not os.path.exists(f"/proc/{pid}"):
            text = f"bound to a file in a mount that is gone, by process {pid}, which is dead"
            found[number] = Leftover("loop", loop.path_of(number), text, _Orphan(number))
    return found


@dataclass(frozen=True, slots=True)
class _Orphan:
    number: int

    def __call__(self) -> str | None:
        if self.number not in loop.orphans():
            return None
        if loop.detach(self.number):
            return None
        return "still open, goes with its last user: " + ", ".join(
            block.users_of(os.makedev(loop.LOOP_MAJOR, self.number), f"loop{self.number}"))


def _nodes(holders: dict[str, Any], orphans: Any) -> Iterator[Leftover]:
    """Nodes without a device behind them. A node is made after its device, and goes with it, by whom claims its disk's
    name."""
    for path in sorted(glob.glob(f"{DEV}/{loop.PREFIX}*")):
        disk = os.path.basename(path).rstrip("0123456789")
        text = _dead(path, disk, orphans) if f"name-{disk}" not in holders else None
        if text is not None:
            yield Leftover("node", path, text, _Node(path, disk, frozenset(orphans)))


def _dead(path: str, disk: str, orphans: Any) -> str | None:
    """Why a node that nobody claims has nothing behind it: of a loop or nbd device that is free or an orphan, of a
    partition that is gone or another disk's. None: it has, or is not ours."""
    whole = os.path.basename(path) == disk
    node = block.number_of(path)
    if node is None:
        return None
    try:
        device = node if whole else block.disk_of(node)
    except FileNotFoundError:       # it goes at this moment
        device = node
    if not whole and not block.sysfs(node).exists():
        return None if _is_followed(f"{DEV}/{disk}", orphans) else "its partition is gone"
    driver = {block.LOOP_MAJOR: "loop", block.NBD_MAJOR: "nbd"}.get(os.major(device))
    if driver is None:
        return None
    name = block.kernel_name(device).removeprefix(driver)
    if driver == "loop" and os.minor(device) in orphans:
        return f"its loop device {name} has lost its mount"
    if not block.is_driven(device):
        return f"its {driver} device {name} is free"
    if not whole and block.number_of(f"{DEV}/{disk}") != device:
        return f"its device is a partition of {driver}{name} by now"
    return None


def _is_followed(path: str, orphans: Any) -> bool:
    """Whether the disk of that node is attached: its client takes away nodes of partitions itself, or makes the partitions
    anew. Who it is may stand in books that are not ours."""
    device = block.number_of(path)
    return device is not None and block.is_driven(device) and not (
        os.major(device) == block.LOOP_MAJOR and os.minor(device) in orphans)


@dataclass(frozen=True, slots=True)
class _Node:
    path: str
    disk: str
    orphans: frozenset[int]

    def __call__(self) -> str | None:
        with _cleaning(self.disk):
            still = {number for number in self.orphans if loop.backing_file(number) == "/disk"}
            if _dead(self.path, self.disk, still) is None:
                return "its device is in use again" if os.path.lexists(self.path) else None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        return None
