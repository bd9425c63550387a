"""Block devices by a broker: it mounts, and makes loop devices and nodes, for a user's client that answers the disks' I/O.

What it is asked for is by a device's name, muendiskX, which it claimed itself first; of other names, other loop devices and
other mounts it does nothing. It trusts nothing of the file system that it mounts: it opens one regular file of it, for the
loop device, and waits for that with a limit. Partition tables are parsed by the client: here are only numbers and offsets,
which the kernel checks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from muenfast import shm
from muenfast.attach import fuse, loop, partitions, watchdog
from muenfast.attach.leash import Bystander, Leash
from muenfast.attach.root import Mount, Root
from muenfast.broker import Answer, Broker, Kind, Operation, Refused, Service, flag, number, start, word
from muenfast.errors import describe

__all__ = ["Brokered", "DiskService", "of_disks"]

log = logging.getLogger("muenfast")

_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE")
_LANES = 4              # besides two for each disk, which may wait for it
_LIMIT = 15.0           # seconds for the client to answer what the kernel asks as the loop device is made
_OFFER = 5.0            # seconds in which the client answers the kernel's first request
_NAME = {"name": word(r"muendisk[a-z]{1,3}")}
_BYTES = number(0, (1 << 63) - 1)
_PART = number(1, 256)
_TID = number(1, 1 << 22)
_LONGEST = 60_000       # milliseconds
_LOOPS = 4              # loop devices for each disk: those that somebody keeps open go later


@dataclass(slots=True)
class _Disk:
    """What is held for a name. busy: its mount or its loop device is being made; neither goes meanwhile. mounted, looped:
    they were made; unmounted: the mount is leaving the tree, and gets no loop device. offer: see Root.mounted()."""

    claim: shm.Claim
    abort: int = -1
    busy: bool = False
    looped: bool = False
    mounted: bool = False
    unmounted: bool = False
    offer: threading.Timer | None = None
    leash: Leash | None = None
    parts: partitions.Acts | None = None
    nodes: dict[int, int] = field(default_factory=dict)


class DiskService(Service):
    """client: the process that it works for. most: disks that that may have."""

    def __init__(self, client: int, most: int) -> None:
        super().__init__()
        self._client, self._most = client, most
        self._root = Root(shm.runtime_dir())
        self._disks: dict[str, _Disk] = {}
        self._state = threading.Lock()      # of what _disks holds; nothing that may wait for the client is done with it
        self._loops: set[int] = set()       # that were made, and may be bound yet
        uring = Kind("auto, kernel or off", lambda value: type(value) is str and value in ("auto", "kernel", "off"))
        blocks = Kind("512 or 4096", lambda value: type(value) is int and value in (512, 4096))
        io = Kind("a multiple of 4096, at most 1048576", lambda value: type(value) is int and 4096 <= value <= 1 << 20
                  and value % 4096 == 0)
        part = {**_NAME, "number": _PART}
        self.operations |= {
            "claim": Operation(self._claim, _NAME), "release": Operation(self._release, _NAME),
            "mount": Operation(self._mount, {**_NAME, "read_only": flag, "max_io": io, "uring": uring}),
            "mounted": Operation(self._served, _NAME), "unmount": Operation(self._unmount, {**_NAME, "force": flag}),
            "rmdir": Operation(self._rmdir, _NAME),
            "resize file": Operation(self._resize_file, {**_NAME, "size": _BYTES, "read_only": flag}),
            "watch": Operation(self._watch, {**_NAME, "thread": _TID, "bystander": _TID}),
            "unwatch": Operation(self._unwatch, _NAME),
            "loop": Operation(self._loop, {**_NAME, "read_only": flag, "max_io": io, "block_size": blocks,
                                           "discard": flag}),
            "free loop": Operation(self._free_loop, {**_NAME, "milliseconds": number(0, _LONGEST)}),
            "resize loop": Operation(self._resize_loop, {**_NAME, "size": _BYTES}),
            "open": Operation(self._open, _NAME), "sync": Operation(self._sync, _NAME),
            "users": Operation(self._users, {**_NAME, "but": number(0, 1 << 22)}),
            "make node": Operation(self._make_node, _NAME), "remove node": Operation(self._remove_node, _NAME),
            "open part": Operation(self._open_part, part), "reread": Operation(self._reread, _NAME),
            "change": Operation(self._change, {**part, "operation": number(partitions.ADD, partitions.RESIZE),
                                               "start": _BYTES, "size": _BYTES}),
            "make part": Operation(self._make_part, part), "remove part": Operation(self._remove_part, part),
            "uevents": Operation(self._uevents)}

    # -------------------------------------------------------------- whose is what

    def _of(self, name: str) -> _Disk:
        found = self._disks.get(name)
        if found is None:
            raise Refused(f"{name} was not claimed here")
        return found

    def _mounted(self, name: str) -> _Disk:
        found = self._of(name)
        if not found.mounted:
            raise Refused(f"{name} has no mount")
        return found

    def _looped(self, name: str) -> _Disk:
        """With a loop device that is still ours."""
        found = self._mounted(name)
        if not found.looped or not self._root.owns(name):
            raise Refused(f"{name} has no loop device")
        return found

    # -------------------------------------------------------------- names and mounts

    def _claim(self, name: str) -> Answer:
        with self._state:
            if name in self._disks:
                return Answer({"held": False, "complaints": []})
            if len(self._disks) >= self._most:
                raise Refused(f"the policy declares {self._most} disks of this client")
        claim = self._root.claim(name)
        if claim is None:
            return Answer({"held": False, "complaints": []})
        try:
            complaints = self._root.reclaim(name)
            with self._state:
                if name in self._disks or len(self._disks) >= self._most:
                    raise Refused(f"{name} was claimed at the same time")
                self._disks[name] = _Disk(claim)
        except BaseException:
            claim.release()
            raise
        return Answer({"held": True, "complaints": complaints})

    def _release(self, name: str) -> Answer:
        with self._state:
            disk = self._of(name)
            if disk.busy or disk.mounted or disk.leash is not None:
                raise Refused(f"{name} is still there")
            del self._disks[name]
        disk.claim.release()
        return Answer()

    @contextlib.contextmanager
    def _making(self, name: str) -> Iterator[_Disk]:
        """While it is busy."""
        with self._state:
            disk = self._of(name)
            if disk.busy:
                raise Refused(f"{name} is being made")
            disk.busy = True
        try:
            yield disk
        finally:
            disk.busy = False

    def _mount(self, name: str, read_only: bool, max_io: int, uring: str) -> Answer:
        with self._making(name) as disk:
            if disk.mounted:
                raise Refused(f"{name} is mounted already")
            made = self._root.mount(name, read_only=read_only, max_io=max_io, uring=uring)
            disk.offer = threading.Timer(_OFFER, self._root.mounted, [name])    # others wait for it
            disk.offer.daemon = True
            disk.offer.start()
            disk.abort, disk.unmounted, disk.mounted = made.abort, False, True
            fds = (made.fd,) if made.abort < 0 else (made.fd, os.dup(made.abort))
        return Answer({"mountpoint": made.mountpoint, "connection": made.connection, "ring": made.ring}, fds)

    def _served(self, name: str) -> Answer:
        disk = self._mounted(name)
        if disk.offer is not None:
            disk.offer.cancel()
        self._root.mounted(name)
        return Answer()

    def _unmount(self, name: str, force: bool) -> Answer:
        with self._state:
            disk = self._mounted(name)
            disk.unmounted, looped = True, disk.looped
        if looped and self._root.owns(name):    # who has it open would keep it for ever
            self._root.free_loop(name, 0.0)
        self._root.unmount(name, force)
        return Answer()

    def _rmdir(self, name: str) -> Answer:
        self._served(name)      # the offer would outlive what it is for
        with self._state:
            disk = self._mounted(name)
            if disk.busy:       # who makes the loop device may have to abort the connection
                raise Refused(f"{name} is being made")
            for part, device in disk.nodes.items():
                assert disk.parts is not None
                disk.parts.remove_node(part, device)
            disk.nodes.clear()
            if disk.looped:
                self._root.remove_node(name)
            gone: FileNotFoundError | None = None
            try:
                self._root.rmdir(name)      # EBUSY: it was not unmounted
            except FileNotFoundError as error:
                gone = error
            disk.mounted = disk.looped = False
            abort, disk.abort, disk.parts = disk.abort, -1, None
        if abort >= 0:
            os.close(abort)
        if gone is not None:
            raise gone
        return Answer()

    def _resize_file(self, name: str, size: int, read_only: bool) -> Answer:
        self._mounted(name)
        self._root.resize_file(name, size, read_only)
        return Answer()

    # -------------------------------------------------------------- the watchdog

    def _watch(self, name: str, thread: int, bystander: int) -> Answer:
        for each in (thread, bystander):
            if not os.path.exists(f"/proc/{self._client}/task/{each}"):
                raise Refused(f"{each} is no thread of process {self._client}")
        with self._state:
            disk = self._mounted(name)
            if disk.leash is not None:
                raise Refused(f"{name} is watched already")
            abort = [disk.abort] if disk.abort >= 0 else []
            disk.leash = Leash("fuse", thread, [str(disk.abort), self._root.mountpoint(name), f"/dev/{name}"], abort,
                               (self._client, bystander))
        return Answer({"pid": disk.leash.pid}, (disk.leash.give(),))

    def _unwatch(self, name: str) -> Answer:
        with self._state:
            disk = self._of(name)
            leash, disk.leash = disk.leash, None
        if leash is None:
            raise Refused(f"{name} is not watched")
        leash.wait()
        return Answer()

    # -------------------------------------------------------------- the loop device

    @contextlib.contextmanager
    def _limited(self, disk: _Disk) -> Iterator[None]:
        """A client that does not answer is not waited for: the kernel holds locks meanwhile that others need. Precondition:
        busy, so that the descriptor stays."""
        timer = threading.Timer(_LIMIT, os.write, [disk.abort, b"1"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _loop(self, name: str, read_only: bool, max_io: int, block_size: int, discard: bool) -> Answer:
        with self._making(name) as disk:
            if disk.unmounted or not disk.mounted:
                raise Refused(f"{name} has no mount")
            if disk.looped:
                raise Refused(f"{name} has a loop device already")
            if disk.abort < 0:
                raise Refused("without fusectl nobody could end a client that does not answer")
            self._loops = {number for number in self._loops if loop.is_bound(number)}
            if len(self._loops) >= _LOOPS * self._most:
                raise Refused(f"{len(self._loops)} loop devices that were made before have users yet")
            with self._limited(disk):
                made = self._root.loop(name, read_only=read_only, max_io=max_io, block_size=block_size, discard=discard)
            self._loops.add(made)
            with self._state:
                disk.looped = not disk.unmounted
            if not disk.looped:     # what is asked for by the mount's path would not find it
                loop.detach(made, 0.0)
                raise OSError(errno.ENODEV, "its mount has gone meanwhile", f"/dev/{name}")
            disk.parts = self._root.partitions(name)
        return Answer({"loop": made})

    def _free_loop(self, name: str, milliseconds: int) -> Answer:
        self._mounted(name)
        return Answer({"free": self._root.free_loop(name, milliseconds / 1000)})

    def _resize_loop(self, name: str, size: int) -> Answer:
        self._looped(name)
        self._root.resize_loop(name, size)
        return Answer()

    def _opened(self, name: str, opens: Callable[[], int]) -> int:
        """A descriptor of the loop device, or of a partition of it. As long as that is open the device keeps its file:
        looked at before, it could be another's by now."""
        self._looped(name)
        fd = opens()
        try:
            self._looped(name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open(self, name: str) -> Answer:
        return Answer(fds=(self._opened(name, lambda: self._root.open(name)),))

    def _sync(self, name: str) -> Answer:
        self._looped(name)
        return Answer({"left": self._root.sync(name)})

    def _users(self, name: str, but: int) -> Answer:
        if not self._mounted(name).looped:
            raise Refused(f"{name} has no loop device")
        return Answer({"users": self._root.users(name, but or None)})

    def _make_node(self, name: str) -> Answer:
        with self._state:
            self._looped(name)
            self._root.make_node(name)
        return Answer()

    def _remove_node(self, name: str) -> Answer:
        with self._state:
            if self._mounted(name).looped:
                self._root.remove_node(name)
        return Answer()

    # -------------------------------------------------------------- partitions

    def _parts(self, name: str) -> tuple[_Disk, partitions.Acts]:
        disk = self._looped(name)
        if disk.parts is None:
            raise Refused(f"{name} has no loop device")
        return disk, disk.parts

    def _open_part(self, name: str, number: int) -> Answer:
        disk, parts = self._parts(name)
        device = disk.nodes.get(number)
        if device is None:
            raise Refused(f"{name}{number} was not made here")
        fd = self._opened(name, lambda: parts.open_part(number))
        # Of a partition that went its number may be another disk's; of one that is open it is not.
        found = partitions.of_kernel(parts.disk).get(number)
        if found is None or found.number != device or os.fstat(fd).st_rdev != device:
            os.close(fd)
            raise Refused(f"{name}{number} is not there any more")
        return Answer(fds=(fd,))

    def _reread(self, name: str) -> Answer:
        _, parts = self._parts(name)
        fd = self._opened(name, parts.open)
        try:
            parts.reread(fd)
        finally:
            os.close(fd)
        return Answer()

    def _change(self, name: str, operation: int, number: int, start: int, size: int) -> Answer:
        _, parts = self._parts(name)
        fd = self._opened(name, parts.open)
        try:
            parts.change(fd, operation, number, start, size)
        finally:
            os.close(fd)
        return Answer()

    def _make_part(self, name: str, number: int) -> Answer:
        with self._state:
            disk, parts = self._parts(name)
            found = partitions.of_kernel(parts.disk).get(number)
            if found is None:
                raise Refused(f"the kernel has no partition {number} of {name}")
            made = parts.make_node(number, found.number)
            if made:
                disk.nodes[number] = found.number
        return Answer({"made": made, "major": os.major(found.number), "minor": os.minor(found.number)})

    def _remove_part(self, name: str, number: int) -> Answer:
        with self._state:
            disk = self._mounted(name)
            device = disk.nodes.pop(number, None)
            if device is None or disk.parts is None:
                raise Refused(f"{name}{number} was not made here")
            disk.parts.remove_node(number, device)
        return Answer()

    def _uevents(self) -> Answer:
        return Answer(fds=(partitions.Acts("", "", "").uevents().detach(),))

    # -------------------------------------------------------------- the end

    def free(self) -> None:
        """Connections are aborted: nothing waits for the client any more."""
        with self._state:
            for name, disk in self._disks.items():
                if disk.abort >= 0:
                    try:
                        os.write(disk.abort, b"1")
                    except OSError as error:
                        log.warning("/dev/%s: its connection is not aborted: %s", name, error.strerror)

    def undo(self) -> None:
        """Nodes, loop devices and mounts go; each whatever became of the others."""
        for name, disk in list(self._disks.items()):
            try:
                self._take_away(name, disk)
            except OSError as error:
                log.warning("/dev/%s: %s", name, describe(error))

    def _take_away(self, name: str, disk: _Disk) -> None:
        if disk.mounted:
            self._root.mounted(name)
            for problem in watchdog.release(self._root.mountpoint(name), f"/dev/{name}", disk.abort):
                log.warning("/dev/%s: %s", name, problem)
        if disk.leash is not None:      # it does the same, or sees that it is done
            disk.leash.wait()
        disk.claim.release()


def of_disks(most: int) -> Broker:
    """A broker for a client of so many disks; see start()."""
    client = os.getpid()
    return start(lambda: DiskService(client, most), _LANES + 2 * most, _CAPABILITIES)


# ------------------------------------------------------------------ the process without privileges

class _Claim:
    """As shm.Claim, of a name that the broker holds."""

    def __init__(self, broker: Broker, name: str) -> None:
        self._broker, self._name = broker, name

    def release(self) -> None:
        self._broker.ask("release", name=self._name)


class _Leash(Leash):
    """A watchdog that the broker started."""

    def __init__(self, broker: Broker, name: str, thread: int) -> None:
        self._broker, self._name = broker, name
        self._bystander = Bystander()
        try:
            answer, [self._control] = broker.call("watch", name=name, thread=thread, bystander=self._bystander.number)
        except BaseException:
            self._end_bystander()
            raise
        self._pid = int(answer["pid"])

    @property
    def pid(self) -> int:
        return self._pid

    def wait(self) -> None:
        self._broker.ask("unwatch", name=self._name)


class _Acts(partitions.Acts):
    """Of a disk that the broker has."""

    def __init__(self, broker: Broker, name: str, number: int) -> None:
        super().__init__(name, f"loop{number}", loop.path_of(number))
        self._broker = broker

    def open(self) -> int:
        return _one(self._broker.call("open", name=self.name)[1])

    def open_part(self, number: int) -> int:
        return _one(self._broker.call("open part", name=self.name, number=number)[1])

    def reread(self, fd: int) -> None:
        self._broker.ask("reread", name=self.name)

    def change(self, fd: int, operation: int, number: int, start: int, size: int) -> None:
        self._broker.ask("change", name=self.name, operation=operation, number=number, start=start, size=size)

    def make_node(self, number: int, device: int) -> bool:
        answer = self._broker.ask("make part", name=self.name, number=number)
        return bool(answer["made"]) and os.makedev(answer["major"], answer["minor"]) == device

    def remove_node(self, number: int, device: int) -> None:
        self._broker.ask("remove part", name=self.name, number=number)

    def uevents(self) -> socket.socket:
        made = socket.socket(fileno=_one(self._broker.call("uevents")[1]))
        made.setblocking(False)
        return made


def _one(fds: list[int]) -> int:
    [fd] = fds
    return fd


class Brokered(Root):
    """What a broker does of it."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._places: dict[str, tuple[str, int]] = {}   # mount point and loop device by name
        self._complaints: dict[str, list[str]] = {}

    def available(self) -> str | None:
        """None where the front end was built: the broker has what it takes."""
        return fuse.unbuilt()

    def claim(self, name: str) -> shm.Claim | None:
        answer = self._broker.ask("claim", name=name)
        self._complaints[name] = answer["complaints"]
        return _Claim(self._broker, name) if answer["held"] else None  # type: ignore[return-value]

    def reclaim(self, name: str) -> list[str]:
        """What came of it: claim() has done it."""
        return self._complaints.pop(name, [])

    def mount(self, name: str, *, read_only: bool, max_io: int, uring: str) -> Mount:
        answer, fds = self._broker.call("mount", name=name, read_only=read_only, max_io=max_io, uring=uring)
        self._places[name] = answer["mountpoint"], -1
        return Mount(answer["mountpoint"], fds[0], answer["connection"], fds[1] if len(fds) > 1 else -1, answer["ring"])

    def mounted(self, name: str) -> None:
        self._broker.ask("mounted", name=name)

    def unmount(self, name: str, force: bool) -> None:
        self._broker.ask("unmount", name=name, force=force)

    def rmdir(self, name: str) -> None:
        self._broker.ask("rmdir", name=name)

    def resize_file(self, name: str, size: int, read_only: bool) -> None:
        self._broker.ask("resize file", name=name, size=size, read_only=read_only)

    def watch(self, name: str, thread: int, abort: int) -> Leash:
        return _Leash(self._broker, name, thread)

    def loop(self, name: str, *, read_only: bool, max_io: int, block_size: int, discard: bool) -> int:
        made = int(self._broker.ask("loop", name=name, read_only=read_only, max_io=max_io, block_size=block_size,
                                    discard=discard)["loop"])
        self._places[name] = self._places[name][0], made
        return made

    def owns(self, name: str) -> bool:
        place, made = self._places.get(name, ("", -1))
        return made >= 0 and loop.backing_file(made) == f"{place}/disk"

    def free_loop(self, name: str, timeout: float = 1.0) -> bool:
        return bool(self._broker.ask("free loop", name=name, milliseconds=int(timeout * 1000))["free"])

    def resize_loop(self, name: str, size: int) -> None:
        self._broker.ask("resize loop", name=name, size=size)

    def open(self, name: str) -> int:
        return _one(self._broker.call("open", name=name)[1])

    def sync(self, name: str) -> list[str]:
        return list(self._broker.ask("sync", name=name)["left"])

    def users(self, name: str, but: int | None) -> list[str]:
        return list(self._broker.ask("users", name=name, but=but or 0)["users"])

    def make_node(self, name: str) -> None:
        self._broker.ask("make node", name=name)

    def remove_node(self, name: str) -> None:
        self._broker.ask("remove node", name=name)

    def partitions(self, name: str) -> partitions.Acts:
        return _Acts(self._broker, name, self._places[name][1])
