"""Block servers and block clients: several exports or disks in one process, set up all or none, left without trace.

A server runs one Export per pair of channels; a client makes a BlockDevice of each, and front ends (attach/) make it
/dev/muendiskX and an NBD export on a Unix socket.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from muenfast import shm
from muenfast._ring import Watch
from muenfast.backing import DEFAULT_POOL, DEFAULT_TIMEOUT, Device
from muenfast.connection import IN_PYTHON, MOST_POLL, Channels, blame, channels_from_lists
from muenfast.cpus import Cpus, inherited
from muenfast.disk import BlockDevice, Connection, OnPeerLoss
from muenfast.errors import UsageError
from muenfast.export import LEAST_TIMEOUT, MOST_TIMEOUT, Crew, Export, ExportConfig, exports_from_lists, of_store
from muenfast.lookout import Lookout, lookout, watching
from muenfast.threads import spawn

if TYPE_CHECKING:
    from muenfast.attach.root import Root

__all__ = ["ATTACHMENTS", "MOST_POLL", "AttachedDisk", "BlockClients", "BlockDevice", "BlockServer", "Channels",
           "Connection", "Export", "ExportConfig", "OnPeerLoss", "channels_from_lists", "exports_from_lists", "serve"]

log = logging.getLogger("muenfast")

ATTACHMENTS = ("auto", "fuse", "nbd", "none")
_THREADS_PER_CPU = 4  # docs/decisions/006
_WAIT_SILENTLY = 2.0  # seconds for a server to answer before the wait is said, and between looks for another reason
_DETACH_PATIENCE = 2.0  # seconds without an answer until what is still dirty is given up
_DETACH_LIMIT = 4.0  # seconds a device has to go away, once its disk stands still
_DETACH_LOOK = 0.1  # seconds between looks whether it does


class _Group:
    """Parts that are opened in order, all or none, and closed in reverse; context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._process = os.getpid()

    @staticmethod
    def _watch(stack: ExitStack, parts: int) -> Watch | None:
        """One thread that polls for all parts while they are idle; a single part polls itself."""
        return None if parts < 2 else watching(stack)

    @staticmethod
    def _lookout(stack: ExitStack, parts: int) -> Lookout | None:
        """One thread that tells all parts of their names; a single part looks itself."""
        found = None if parts < 2 else lookout()
        if found is not None:
            stack.callback(found.close)
        return found

    def close(self) -> None:
        """Closes all parts, the last first. In a child of fork(), where they are the parent's, nothing happens."""
        if os.getpid() == self._process:
            self._stack.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


class BlockServer(_Group):
    """Several exports in one process; serving from construction to close().

    threads: most threads for exports in RAM (`Export.shares`); the others have one each. None: four for each CPU it may
    run on. More exports than that share them, at most 128 one thread. cpus: that these threads are
    pinned to, in turn; none: none is.

    Raises UsageError, ClaimError, PeerError, OSError.
    """

    def __init__(self, configs: Sequence[ExportConfig], *, threads: int | None = None,
                 cpus: Sequence[int] = ()) -> None:
        super().__init__()
        self._cpus = Cpus(cpus)
        if threads is None:
            threads = _THREADS_PER_CPU * len(os.sched_getaffinity(0))
        elif threads < 1:
            raise UsageError("at least one thread is needed", value=threads)
        self.exports: list[Export] = []
        self._ended = threading.Event()
        with ExitStack() as stack:
            watch = self._watch(stack, len(configs))
            with shm.made_ahead([region for config in configs for region in config.channels.wanted(serving=True)]):
                for config in configs:
                    export = Export(config, watch=watch)
                    stack.callback(export.close)
                    self.exports.append(export)
            names = self._lookout(stack, len(configs))      # not before: it would tell of all that was just made
            for export in self.exports:
                export.heed(names)
            sharing = [export for export in self.exports if export.could_share]
            if sharing and not sharing[0].shares:   # which is asked once: it reads the table of mounts
                sharing = []
            count = min(len(sharing), max(threads, math.ceil(len(sharing) / Crew.MOST)))
            crews = [crew for k in range(count) if len(crew := sharing[k::count]) > 1]
            alone = set(self.exports).difference(*crews)
            for export in filter(alone.__contains__, self.exports):
                export.cpu = self._cpus.next()
                export.start()
            for exports in crews:
                Crew(exports, self._cpus.next()).start()
            stack.callback(self._stop)      # all, before the first is waited for
            self._stack = stack.pop_all()

    def __repr__(self) -> str:
        shown = [f"{export.name} {','.join(device.text for device in export.config.devices)} {export.state}"
                 for export in self.exports[:3]]
        more = [] if len(self.exports) <= 3 else [f"{len(self.exports) - 3} more"]
        state = ["closed"] if self._ended.is_set() else shown + more or ["no exports"]
        return f"<{type(self).__name__} {'; '.join(state)}>"

    def _stop(self) -> None:
        self._ended.set()
        for export in self.exports:
            export.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Returns once it is closed, by another thread or a signal's handler, or after `timeout` seconds; whether it is."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._ended.is_set():     # in pieces: a signal may reach another thread than the one that waits
            left = 0.2 if end is None else min(0.2, end - time.monotonic())
            if left <= 0:
                return False
            self._ended.wait(left)
        return True

    def status(self) -> list[dict[str, Any]]:
        """One entry per export."""
        return [export.status() for export in self.exports]


def serve(store: object, req: str, resp: str, *, shm: str | None = None, read_only: bool = False, pool: int = DEFAULT_POOL,
          timeout: float = DEFAULT_TIMEOUT, inject: str | None = None, req_protocol: str | None = None,
          resp_protocol: str | None = None, size: str | None = None, buffer_size: str | None = None,
          poll: int | None = None, bells: bool = True, checksum: str = "off") -> BlockServer:
    """Exports a disk whose data Python code keeps (docs/stores.md) over two channels, until close().

        with muenfast.serve(MyStore(), req="a", resp="c") as server:
            server.wait()

    store: an object with the callbacks get_size, pread, ...; over a shared buffer perhaps a list of them, the disks of
    one connection. req, resp, shm: locators. pool: threads that call it, 1 to 64. timeout: seconds that it has for an
    answer, 1 to 1200. inject: faults, as --inject. req_protocol to checksum: as `channels_from_lists`.

    Raises UsageError, StoreError, ClaimError, OSError.
    """
    stores = list(store) if isinstance(store, (list, tuple)) else [store]
    called = replace(IN_PYTHON, device="store", buffer="shm")
    for number, each in enumerate(stores):
        index = number if len(stores) > 1 else None
        if isinstance(each, type):
            raise UsageError("a store is an object, not its class", option="store", index=index, value=each.__qualname__,
                             hint="call it first")
        if lacking := [name for name in ("get_size", "pread") if not callable(getattr(each, name, None))]:
            raise UsageError("a store is an object with the methods get_size and pread: there is no method "
                             f"{' and no method '.join(lacking)}", option="store", index=index, value=repr(each)[:80],
                             hint="docs/stores.md shows one; exports_from_lists and BlockServer serve files and RAM")
    found = channels_from_lists(req, resp, buffer=shm, options=called, req_protocol=req_protocol,
                                resp_protocol=resp_protocol, size=size, buffer_size=buffer_size, poll=poll, bells=bells,
                                checksum=checksum)
    if len(found) != 1:
        raise UsageError("one store has one connection", option="req", value=req)
    if not stores or len(stores) > 1 and shm is None:
        raise UsageError("a connection has one disk, over a shared buffer (shm) one or more", option="store",
                         value=len(stores))
    if not LEAST_TIMEOUT <= timeout <= MOST_TIMEOUT:
        raise UsageError(f"a timeout has {LEAST_TIMEOUT} to {MOST_TIMEOUT} seconds", option="timeout", value=timeout)
    devices = [Device(f"py:{type(each).__module__}:{type(each).__qualname__}", "py", made=each) for each in stores]
    _, _, faults = of_store(devices, called, inject=inject)
    return BlockServer([ExportConfig(found[0], devices[0], read_only, tuple(devices[1:]), pool=pool, timeout=timeout,
                                     faults=faults)])


def _front_end(attach: str, root: Root | None) -> str:
    """Which front end makes the block devices: "fuse", "nbd" or "none". root: another process's. Raises UsageError."""
    if attach not in ATTACHMENTS:
        raise UsageError(f"a front end is one of {', '.join(ATTACHMENTS)}", option="--attach", value=attach)
    if attach == "none":
        return attach
    from muenfast.attach import fuse, nbdkernel

    if root is not None:
        if attach == "nbd":
            raise UsageError("another process makes block devices by FUSE only", option="--attach", value=attach)
        if (why := root.available()) is None:
            return "fuse"
        raise UsageError("no front end for block devices is to be had here", option="--attach", value=attach, hint=why)
    reasons = []
    for name, reason in (("fuse", fuse.available), ("nbd", nbdkernel.available)):
        if attach in ("auto", name):
            if (why := reason()) is None:
                return name
            reasons.append(why if attach == name else f"{name}: {why}")
    raise UsageError("no front end for block devices is to be had here", option="--attach", value=attach,
                     hint="; ".join(reasons))


def _check_sockets(paths: list[str], count: int | None) -> None:
    if count is not None and len(paths) != count:
        raise UsageError(f"there is one socket for each disk: {count}", option="--nbd", value=",".join(paths))


class AttachedDisk:
    """A BlockDevice and the front ends on top; made by BlockClients.

    front: what makes it a block device, or None. listener: of the socket it is served on, or None; nbd: the server.
    """

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.front: Any = None
        self.claim: Any = None
        self.listener: Any = None
        self.nbd: Any = None
        self.detached = False

    @property
    def path(self) -> str:
        """The device node, "-" without one."""
        return "-" if self.front is None else str(self.front.device)

    @property
    def socket(self) -> str | None:
        """The path of the NBD socket."""
        return None if self.listener is None else str(self.listener.path)


def _moving(connection: Connection) -> Callable[[], bool]:
    """A function that tells whether the connection has answered anything since its last call, or has nothing to answer."""
    seen = -1

    def moving() -> bool:
        nonlocal seen
        before, seen = seen, connection.client.progress
        return seen != before or connection.state == "ready" and connection.client.in_flight == 0

    return moving


class BlockClients(_Group):
    """The disks of several connections in one process, as /dev/muendiskX in the order of the list, and of their numbers
    on a connection; attached when ready() returns True.

    disks: one for each connection until ready() knows how many each has. attach: one of ATTACHMENTS, afterwards what
    "auto" came to. nbd: paths of Unix sockets, one per disk: each is an NBD export from then on, too. fuse_uring: when
    the device's requests come by FUSE over io_uring: "auto", "kernel" (where its parameter says so) or "off". root: of
    what takes privileges for block devices, None: this process does it. cpus: the threads of each connection, and of its
    front ends, are pinned to one of them, in turn; none: they are not.
    """

    def __init__(self, channels: Sequence[Channels], *, attach: str = "auto", nbd: Sequence[str] | None = None,
                 on_peer_loss: OnPeerLoss | None = None, same_store: bool = False, fuse_uring: str = "auto",
                 root: Root | None = None, cpus: Sequence[int] = ()) -> None:
        super().__init__()
        given = Cpus(cpus)
        self.attach = _front_end(attach, root)
        self._root = root
        self._fuse_uring = fuse_uring
        if fuse_uring != "auto":
            from muenfast.attach import fuseuring

            fuseuring.check(fuse_uring)
        self.connections: list[Connection] = []
        self.disks: list[AttachedDisk] = []
        self._books = threading.Lock()          # of what follows
        self._attached = False
        self._ended = False                     # close() detaches
        self._grown: set[Connection] = set()    # whose disks have another size than their front ends may know
        self._resizing: dict[Connection, threading.Thread] = {}
        self._leaving: dict[Connection, threading.Thread] = {}     # whose server ended for good
        with ExitStack() as stack:
            one_each = all(each.buffer is None for each in channels)
            self._listeners = self._listen(stack, nbd, len(channels) if one_each else None)
            watch = self._watch(stack, len(channels))
            with shm.made_ahead([region for entry in channels for region in entry.wanted(serving=False)]):
                for entry in channels:
                    connection = Connection(entry, timeout=0, on_peer_loss=on_peer_loss, same_store=same_store, watch=watch,
                                            cpu=given.next())
                    stack.callback(connection.close)
                    connection.resized = functools.partial(self._resized, connection)
                    self.connections.append(connection)
                    self.disks.append(AttachedDisk(BlockDevice(connection=connection)))
            self._stack = stack.pop_all()

    @staticmethod
    def _listen(stack: ExitStack, paths: Sequence[str] | None, count: int | None) -> list[Any] | None:
        """Sockets whose paths are ours, and refuse clients so far; None where none are wanted. count: of disks, where that
        is known before their servers answer."""
        if paths is None:
            return None
        _check_sockets([*paths], count)
        from muenfast.attach.sockets import Listener

        listeners: list[Any] = []
        for index, path in enumerate(paths):
            with blame("--nbd", index, path):
                listeners.append(Listener(path))
            stack.callback(listeners[-1].close)
        return listeners

    def ready(self, wait: Callable[[], bool]) -> bool:
        """Waits for every server, then makes all devices and exports appear. wait: called while waiting, False gives up.

        Raises UsageError, ClaimError, OSError, PeerError; devices made by then are taken away by close().
        """
        patience = time.monotonic() + _WAIT_SILENTLY
        for connection in self.connections:
            said = ""
            while not connection.wait_ready(0.1):
                if time.monotonic() > patience and connection.client.incompatible is None \
                        and connection.checksum != "refused":  # else that is said
                    patience = time.monotonic() + _WAIT_SILENTLY
                    text = connection.unanswered(_WAIT_SILENTLY)
                    if text != said:
                        said = text
                        log.warning("disk %s: waiting: %s", connection.channels.name, text)
                if connection.failure is not None:
                    raise connection.refused()
                if not wait():
                    return False
        disks = [AttachedDisk(BlockDevice(connection=connection, device=number))
                 for connection in self.connections for number in range(len(connection.client.disks))]
        if self._listeners is not None:
            _check_sockets([listener.path for listener in self._listeners], len(disks))
            for disk, listener in zip(disks, self._listeners, strict=True):
                disk.listener = listener
        self.disks = disks
        self._stack.callback(self._detach_all)
        for disk in self.disks:
            with inherited(disk.device.connection.cpu, f"disk {disk.device.channels.name}"):
                if self.attach != "none":
                    self._attach(disk)
                if disk.listener is not None:
                    self._nbd(disk).listen(disk.listener)
        with self._books:
            self._attached = True
            self._start_resizing()
        return True

    # -------------------------------------------------------------- other sizes, fewer disks

    def _resized(self, connection: Connection) -> None:
        """Its thread calls this, which takes answers: whoever waits for some is another."""
        with self._books:
            self._grown.add(connection)
            self._start_resizing()

    def _start_resizing(self) -> None:
        """A thread for each of _grown that has none. Precondition: _books is held."""
        if not self._attached or self._ended:
            return
        for connection in self._grown - self._resizing.keys():
            try:
                self._resizing[connection] = spawn(functools.partial(self._resize, connection),
                                                   f"resize {connection.channels.name}")
            except OSError as error:
                log.error("disk %s: its front ends keep the old size: %s", connection.channels.name, error.strerror)

    def _resize(self, connection: Connection) -> None:
        while True:
            with self._books:
                if connection not in self._grown:
                    del self._resizing[connection]
                    return
                self._grown.discard(connection)
            for disk in self.disks:
                if disk.device.connection is not connection:
                    continue
                for end in (disk.nbd, disk.front):
                    try:
                        if end is not None and not disk.detached:
                            end.resized()
                    except Exception as error:  # nobody else would hear of it
                        if not disk.detached:
                            log.error("disk %s: its front end keeps the old size: %s", connection.channels.name, error)

    def _leave(self, connection: Connection) -> None:
        """Takes away what stands on a connection whose server ended for good, while the others go on."""
        try:
            for disk in self.disks:
                if disk.device.connection is connection:
                    self._detach(disk)
            connection.close()
            log.info("disk %s: detached, the others go on", connection.channels.name)
        except Exception as error:
            log.error("disk %s: %s", connection.channels.name, error)

    @staticmethod
    def _nbd(disk: AttachedDisk) -> Any:
        """The disk's NBD server."""
        from muenfast.attach import nbd

        if disk.nbd is None:
            disk.device.client.background = True
            channels, number = disk.device.channels, disk.device.target.device
            name = channels.req.text if channels.buffer is None else f"{channels.req.text}.{number}"
            disk.nbd = nbd.NbdServer(disk.device.target, name,
                                     description=f"muenfast disk over the channels {channels.name}")
        return disk.nbd

    def _attach(self, disk: AttachedDisk) -> None:
        from muenfast.attach import fuse, loop, nbdkernel
        from muenfast.attach.root import Root

        disk.device.client.background = True
        directory = shm.runtime_dir()
        root = self._root or Root(directory)
        for name in loop.device_names():
            # A name is free when nobody alive claims it; what a dead client left under it goes first.
            claim = root.claim(name)
            if claim is None:
                continue
            try:
                for complaint in root.reclaim(name):
                    log.warning("/dev/%s: %s", name, complaint)
                if self.attach == "fuse":
                    disk.front = fuse.FuseAttachment.attach(disk.device.target, name, directory, uring=self._fuse_uring,
                                                            root=root)
                else:
                    disk.front = nbdkernel.NbdAttachment.attach(self._nbd(disk), name, directory)
            except FileExistsError:  # a device of somebody else, of the kernel's own module perhaps
                claim.release()
                continue
            except BaseException:
                claim.release()
                raise
            break
        disk.claim = claim
        log.info("disk %s: attached as %s", disk.device.channels.name, disk.front.device)

    def _detach_all(self) -> None:
        """Side by side: each may have to wait for its server, and for the kernel to write what is dirty."""
        with self._books:
            self._ended = True
            leaving = list(self._leaving.values())
        for thread in leaving:
            thread.join()
        attached = [disk for disk in self.disks if disk.front is not None or disk.nbd is not None]
        if not attached:
            return
        from concurrent.futures import ThreadPoolExecutor  # no server needs it

        with ThreadPoolExecutor(len(attached)) as pool:
            ends = [pool.submit(self._detach, disk) for disk in attached]
        failures = [error for error in (end.exception() for end in ends) if error is not None]
        for error in failures[1:]:
            log.error("%s", error)
        if failures:
            raise failures[0]

    def _detach(self, disk: AttachedDisk) -> None:
        # A server that does not answer must not hold up the end; one that does is given what is dirty, however slow it is.
        front, nbd, disk.detached = disk.front, disk.nbd, True
        moving, detached = _moving(disk.device.connection), threading.Event()
        thread = spawn(lambda: self._give_up(disk, detached), "detach")
        with ExitStack() as stack:
            if disk.claim is not None:
                stack.callback(disk.claim.release)
            stack.callback(thread.join)
            stack.callback(detached.set)
            with self._books:
                resizing = self._resizing.get(disk.device.connection)
            if resizing is not None:    # it may wait for answers of a server that has gone: then the detach frees it
                stack.callback(resizing.join)
                resizing.join(_DETACH_PATIENCE)
            if nbd is not None:         # the last one first
                stack.callback(lambda: self._complain(nbd.close(_DETACH_LIMIT)))
            if front is not None:
                stack.callback(lambda: self._complain(front.detach(_DETACH_LIMIT, moving)))
            if self._leaving.get(disk.device.connection) is not None:
                disk.front = disk.nbd = disk.listener = None

    @staticmethod
    def _give_up(disk: AttachedDisk, detached: threading.Event) -> None:
        """Fails the disk once it stands still."""
        moving, since = _moving(disk.device.connection), time.monotonic()
        while not detached.wait(_DETACH_LOOK):
            if moving():
                since = time.monotonic()
            elif time.monotonic() - since > _DETACH_PATIENCE:
                disk.device.fail("no answer while detaching")
                return

    @staticmethod
    def _complain(complaints: list[str]) -> None:
        for complaint in complaints:
            log.warning("%s", complaint)

    def finished(self) -> bool:
        """Whether every server ended its export for good. What stood on one that did goes, sooner or later; to be asked
        again and again."""
        gone = [connection for connection in self.connections if connection.gone]
        if len(gone) == len(self.connections):
            return True
        with self._books:
            for connection in gone:
                if connection not in self._leaving and not self._ended:
                    with contextlib.suppress(OSError):      # no thread is to be had: asked again, it may be
                        self._leaving[connection] = spawn(functools.partial(self._leave, connection),
                                                          f"leave {connection.channels.name}")
        return False

    def status(self) -> list[dict[str, Any]]:
        """One entry per disk."""
        entries = []
        for disk in self.disks:
            entry, front, nbd, listener = disk.device.status(), disk.front, disk.nbd, disk.listener
            for each in (entry, *entry["devices"]):
                each["device"] = "-" if front is None else str(front.device)
            try:
                if front is not None:
                    entry["attach"], entry["front"] = self.attach, dict(front.disk.counters)
                    if self.attach == "fuse":
                        entry["fuse_uring"] = front.disk.ring
                if listener is not None:
                    entry["nbd"] = {"socket": str(listener.path), "counters": {} if nbd is None else nbd.counters}
            except ValueError:      # closed at this moment
                if not disk.detached:
                    raise
            entries.append(entry)
        return entries


