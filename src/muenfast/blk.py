"""Block servers and block clients: several exports or disks in one process, set up all or none, left without trace.

A server runs one Export per pair of channels; a client makes a BlockDevice of each, and front ends (attach/) make it
/dev/muendiskX and an NBD export on a Unix socket.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from muenfast import shm
from muenfast._ring import Watch
from muenfast.connection import MOST_POLL, Channels, blame, channels_from_lists
from muenfast.disk import BlockDevice, Connection, OnPeerLoss
from muenfast.errors import ClaimError, UsageError
from muenfast.export import Crew, Export, ExportConfig, exports_from_lists
from muenfast.threads import spawn

__all__ = ["ATTACHMENTS", "MOST_POLL", "AttachedDisk", "BlockClients", "BlockDevice", "BlockServer", "Channels",
           "Connection", "Export", "ExportConfig", "OnPeerLoss", "channels_from_lists", "exports_from_lists"]

log = logging.getLogger("muenfast")

ATTACHMENTS = ("auto", "fuse", "nbd", "none")
_THREADS_PER_CPU = 4  # docs/decisions/006
_WAIT_SILENTLY = 2.0  # seconds for a server to answer before the wait is said
_DETACH_PATIENCE = 2.0  # seconds a server has to take what is still dirty
_CLEANING = 5.0  # seconds for a process that cleans up after a dead client to give its name back
_DETACH_LIMIT = 4.0  # seconds a device has to go away


class _Group:
    """Parts that are opened in order, all or none, and closed in reverse; context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._process = os.getpid()

    @staticmethod
    def _watch(stack: ExitStack, parts: int) -> Watch | None:
        """One thread that polls for all parts while they are idle; a single part polls itself."""
        if parts < 2:
            return None
        watch = Watch()
        thread = spawn(watch.run, "watch")
        stack.callback(thread.join)
        stack.callback(watch.stop)
        return watch

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
    run on. More exports than that share them, at most 128 one thread.

    Raises UsageError, ClaimError, PeerError, OSError.
    """

    def __init__(self, configs: Sequence[ExportConfig], *, threads: int | None = None) -> None:
        super().__init__()
        if threads is None:
            threads = _THREADS_PER_CPU * len(os.sched_getaffinity(0))
        elif threads < 1:
            raise UsageError("at least one thread is needed", value=threads)
        self.exports: list[Export] = []
        with ExitStack() as stack:
            watch = self._watch(stack, len(configs))
            for config in configs:
                export = Export(config, watch=watch)
                stack.callback(export.close)
                self.exports.append(export)
            sharing = [export for export in self.exports if export.shares]
            count = min(len(sharing), max(threads, math.ceil(len(sharing) / Crew.MOST)))
            crews = [crew for k in range(count) if len(crew := sharing[k::count]) > 1]
            for export in set(self.exports).difference(*crews):
                export.start()
            for exports in crews:
                Crew(exports).start()
            stack.callback(self._stop)      # all, before the first is waited for
            self._stack = stack.pop_all()

    def _stop(self) -> None:
        for export in self.exports:
            export.stop()

    def status(self) -> list[dict[str, Any]]:
        """One entry per export."""
        return [export.status() for export in self.exports]


def _front_end(attach: str) -> str:
    """Which front end makes the block devices: "fuse", "nbd" or "none". Raises UsageError."""
    if attach not in ATTACHMENTS:
        raise UsageError(f"a front end is one of {', '.join(ATTACHMENTS)}", option="--attach", value=attach)
    if attach == "none":
        return attach
    from muenfast.attach import fuse, nbdkernel

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


def _claim_name(name: str) -> shm.Claim | None:
    """The claim on a disk's name; None where it is somebody's. One who only cleans up after a dead client is waited for."""
    end = time.monotonic() + _CLEANING
    while True:
        try:
            return shm.claim(f"name-{name}", f"/dev/{name}")
        except ClaimError:
            holder = shm.holder(f"name-{name}")
            if holder is not None and not holder.get("cleaning") or time.monotonic() > end:
                return None
        time.sleep(0.01)


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

    @property
    def path(self) -> str:
        """The device node, "-" without one."""
        return "-" if self.front is None else str(self.front.device)

    @property
    def socket(self) -> str | None:
        """The path of the NBD socket."""
        return None if self.listener is None else str(self.listener.path)


class BlockClients(_Group):
    """The disks of several connections in one process, as /dev/muendiskX in the order of the list, and of their numbers
    on a connection; attached when ready() returns True.

    disks: one for each connection until ready() knows how many each has. attach: one of ATTACHMENTS, afterwards what
    "auto" came to. nbd: paths of Unix sockets, one per disk: each is an NBD export from then on, too. fuse_uring: when
    the device's requests come by FUSE over io_uring: "auto", "kernel" (where its parameter says so) or "off".
    """

    def __init__(self, channels: Sequence[Channels], *, attach: str = "auto", nbd: Sequence[str] | None = None,
                 on_peer_loss: OnPeerLoss | None = None, same_store: bool = False, fuse_uring: str = "auto") -> None:
        super().__init__()
        self.attach = _front_end(attach)
        self._fuse_uring = fuse_uring
        if fuse_uring != "auto":
            from muenfast.attach import fuseuring

            fuseuring.check(fuse_uring)
        self.connections: list[Connection] = []
        self.disks: list[AttachedDisk] = []
        with ExitStack() as stack:
            one_each = all(each.buffer is None for each in channels)
            self._listeners = self._listen(stack, nbd, len(channels) if one_each else None)
            watch = self._watch(stack, len(channels))
            for entry in channels:
                connection = Connection(entry, timeout=0, on_peer_loss=on_peer_loss, same_store=same_store, watch=watch)
                stack.callback(connection.close)
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
            while not connection.wait_ready(0.1):
                if time.monotonic() > patience:
                    patience = math.inf
                    log.warning("disk %s: waiting for the server", connection.channels.name)
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
            if self.attach != "none":
                self._attach(disk)
            if disk.listener is not None:
                self._nbd(disk).listen(disk.listener)
        return True

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

        disk.device.client.background = True
        directory = shm.runtime_dir()
        for name in loop.device_names():
            # A name is free when nobody alive claims it; what a dead client left under it goes first.
            claim = _claim_name(name)
            if claim is None:
                continue
            try:
                for complaint in fuse.reclaim_name(directory, name) + nbdkernel.reclaim_name(directory, name):
                    log.warning("/dev/%s: %s", name, complaint)
                if self.attach == "fuse":
                    disk.front = fuse.FuseAttachment.attach(disk.device.target, name, directory, uring=self._fuse_uring)
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
        attached = [disk for disk in self.disks if disk.front is not None or disk.nbd is not None]
        if not attached:
            return
        with ThreadPoolExecutor(len(attached)) as pool:
            ends = [pool.submit(self._detach, disk) for disk in attached]
        failures = [error for error in (end.exception() for end in ends) if error is not None]
        for error in failures[1:]:
            log.error("%s", error)
        if failures:
            raise failures[0]

    def _detach(self, disk: AttachedDisk) -> None:
        # A server that does not answer must not hold up the end: its requests fail once the deadline is near.
        timer = threading.Timer(_DETACH_PATIENCE, disk.device.fail, ["no answer while detaching"])
        timer.start()
        with ExitStack() as stack:
            if disk.claim is not None:
                stack.callback(disk.claim.release)
            stack.callback(timer.join)
            stack.callback(timer.cancel)
            for end in (disk.nbd and disk.nbd.close, disk.front and disk.front.detach):  # the last one first
                if end is not None:
                    stack.callback(self._end, end)

    @staticmethod
    def _end(end: Callable[[float], list[str]]) -> None:
        for complaint in end(_DETACH_LIMIT):
            log.warning("%s", complaint)

    def finished(self) -> bool:
        """Whether every server ended its export for good."""
        return all(connection.gone for connection in self.connections)

    def status(self) -> list[dict[str, Any]]:
        """One entry per disk."""
        entries = []
        for disk in self.disks:
            entry = disk.device.status()
            entry["device"] = disk.path
            if disk.front is not None:
                entry["attach"], entry["front"] = self.attach, dict(disk.front.disk.counters)
                if self.attach == "fuse":
                    entry["fuse_uring"] = disk.front.disk.ring
            if disk.listener is not None:
                entry["nbd"] = {"socket": disk.socket, "counters": {} if disk.nbd is None else disk.nbd.counters}
            entries.append(entry)
        return entries


