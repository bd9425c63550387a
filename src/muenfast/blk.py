"""Block servers and block clients: several exports or disks in one process, set up all or none, left without trace.

A server runs one Export per pair of channels; a client makes a BlockDevice of each, and a front end (attach/) makes
it /dev/muendiskX.
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
from muenfast.connection import MOST_POLL, Channels, channels_from_lists
from muenfast.disk import BlockDevice, Connection, OnPeerLoss
from muenfast.errors import ClaimError, UsageError
from muenfast.export import Crew, Export, ExportConfig, exports_from_lists, spawn

__all__ = ["ATTACHMENTS", "MOST_POLL", "AttachedDisk", "BlockClients", "BlockDevice", "BlockServer", "Channels",
           "Connection", "Export", "ExportConfig", "OnPeerLoss", "channels_from_lists", "exports_from_lists"]

log = logging.getLogger("muenfast")

ATTACHMENTS = ("auto", "fuse", "none")
_THREADS_PER_CPU = 4  # docs/decisions/006
_WAIT_SILENTLY = 2.0  # seconds for a server to answer before the wait is said
_DETACH_PATIENCE = 2.0  # seconds a server has to take what is still dirty
_DETACH_LIMIT = 4.0  # seconds a device has to go away


class _Group:
    """Parts that are opened in order, all or none, and closed in reverse; context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()

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
        """Closes all parts, the last first."""
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


class AttachedDisk:
    """A BlockDevice and the front end on top; made by BlockClients."""

    def __init__(self, device: BlockDevice, attach: str) -> None:
        self.device = device
        self.front: Any = None
        self.claim: Any = None
        self.attach = attach

    @property
    def path(self) -> str:
        """The device node, "-" without a front end."""
        return "-" if self.front is None else str(self.front.device)


class BlockClients(_Group):
    """The disks of several connections in one process, as /dev/muendiskX in the order of the list, and of their numbers
    on a connection; attached when ready() returns True.

    disks: one for each connection until ready() knows how many each has.
    """

    def __init__(self, channels: Sequence[Channels], *, attach: str = "auto", on_peer_loss: OnPeerLoss | None = None,
                 same_store: bool = False) -> None:
        super().__init__()
        if attach not in ATTACHMENTS:
            raise UsageError(f"a front end is one of {', '.join(ATTACHMENTS)}", option="--attach", value=attach)
        if attach != "none":
            from muenfast.attach import fuse

            reason = fuse.available()
            if reason is not None:
                raise UsageError("no front end for block devices is to be had here", option="--attach", value=attach,
                                 hint=reason)
        self.attach = attach
        self.connections: list[Connection] = []
        self.disks: list[AttachedDisk] = []
        with ExitStack() as stack:
            watch = self._watch(stack, len(channels))
            for entry in channels:
                connection = Connection(entry, timeout=0, on_peer_loss=on_peer_loss, same_store=same_store, watch=watch)
                stack.callback(connection.close)
                self.connections.append(connection)
                self.disks.append(AttachedDisk(BlockDevice(connection=connection), attach))
            self._stack = stack.pop_all()

    def ready(self, wait: Callable[[], bool]) -> bool:
        """Waits for every server, then makes all devices appear. wait: called while waiting, False gives up.

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
        self.disks = [AttachedDisk(BlockDevice(connection=connection, device=number), self.attach)
                      for connection in self.connections for number in range(len(connection.client.disks))]
        if self.attach != "none":
            self._stack.callback(self._detach_all)
            for disk in self.disks:
                self._attach(disk)
        return True

    def _attach(self, disk: AttachedDisk) -> None:
        from muenfast.attach import fuse, loop

        disk.device.client.background = True
        for name in loop.device_names():
            # A name is free when nobody alive claims it; what a dead client left under it goes first.
            try:
                claim = shm.claim(f"name-{name}", f"/dev/{name}")
            except ClaimError:
                continue
            try:
                for complaint in fuse.reclaim_name(shm.runtime_dir(), name):
                    log.warning("/dev/%s: %s", name, complaint)
                disk.front = fuse.FuseAttachment.attach(disk.device.target, name, shm.runtime_dir())
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
        attached = [disk for disk in self.disks if disk.front is not None]
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
        try:
            for complaint in disk.front.detach(_DETACH_LIMIT):
                log.warning("%s", complaint)
        finally:
            timer.cancel()
            timer.join()
            disk.claim.release()

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
                entry["front"] = dict(disk.front.disk.counters)
            entries.append(entry)
        return entries


