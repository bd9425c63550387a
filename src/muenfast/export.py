"""The serving side: the disk, or disks, behind one block connection."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from muenfast import params, shm
from muenfast._blk import Group, Server
from muenfast._buffer import BufferServer
from muenfast._ring import Watch
from muenfast.backing import DEFAULT_DEVICE, DEFAULT_POOL, DEFAULT_TIMEOUT, Backing, Device, open_device, resized_text
from muenfast.backing.faults import Fault, faults_from_list
from muenfast.channel import End
from muenfast.connection import BLOCK, IN_PYTHON, PATIENCE, Channels, Options, blame, channels_from_lists, place
from muenfast.cpus import pin
from muenfast.errors import BrokenChannelError, Offences, PeerLog, UsageError
from muenfast.lookout import LEAST, Lookout, Pace
from muenfast.threads import spawn

log = logging.getLogger("muenfast")

_PATIENCE = 2.0  # seconds before a wait for a disk is said
LEAST_TIMEOUT, MOST_TIMEOUT = 1, 1200  # seconds, of a user-space store
MOST_POOL = 64  # JOBS_WORKERS of _jobs.h
_SHARED_REGION = 4 << 20  # bytes; zeroing a ring of that size takes a millisecond at most
_T = TypeVar("_T")

# Export.state, as `muenfast stat` shows it (docs/operations.md).
STATES = ("waiting", "connected", "client died", "quarantined")


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """One export: its channels and what stands behind them.

    device: its first, or only, disk. read_only: of all its disks. further: disks 1, 2, ... of a connection with a buffer.
    entries: where each disk stands in its list, for messages; default: at the channels' index. pool, timeout: threads of
    each user-space store, and seconds that it has for an answer. faults: what is to go wrong, with each disk.
    """

    channels: Channels
    device: Device
    read_only: bool = False
    further: tuple[Device, ...] = ()
    entries: tuple[int, ...] = ()
    pool: int = DEFAULT_POOL
    timeout: float = DEFAULT_TIMEOUT
    faults: tuple[Fault, ...] = ()

    @property
    def devices(self) -> tuple[Device, ...]:
        """In the order of their numbers on the wire."""
        return self.device, *self.further

    def entry(self, number: int) -> int:
        """Where disk `number` stands in its list."""
        return self.entries[number] if self.entries else self.channels.index


def exports_from_lists(req: str, resp: str, *, device: str | None = None, read_only: str | None = None,
                       pool: str | None = None, timeout: str | None = None, inject: str | None = None,
                       req_protocol: str | None = None, resp_protocol: str | None = None, size: str | None = None,
                       poll: int | None = None, bells: bool = True, buffer: str | None = None,
                       buffer_size: str | None = None, patience: int = PATIENCE, checksum: str = "off",
                       options: Options | None = None) -> list[ExportConfig]:
    """The server's lists (see channels_from_lists). device: default ram:64M each. read_only: "yes,no,...". pool, timeout:
    of user-space stores, default 4 threads, 30 seconds. inject: faults. Of the last four one entry is for all. Raises
    UsageError."""
    called = options or IN_PYTHON
    devices = None if device is None else params.split(called.device, device)
    flags = None if read_only is None else params.split(called.read_only, read_only)
    pools, timeouts = (None if text is None else params.split(option, text, empty=True)
                       for option, text in ((called.pool, pool), (called.timeout, timeout)))
    faults = None if inject is None else faults_from_list(called.inject, inject)
    if faults is not None and len(faults) not in (1, len(params.split(called.req, req))):
        raise UsageError(f"it has {len(faults)} entries, one for each export: several faults of one are joined by +",
                         option=called.inject, value=inject)
    more = {called.device: devices}
    more |= {option: [""] * len(entries) for option, entries in
             ((called.read_only, flags), (called.pool, pools), (called.timeout, timeouts), (called.inject, faults))
             if entries is not None and len(entries) > 1}
    channels = channels_from_lists(req, resp, more=more, options=called, req_protocol=req_protocol,
                                   resp_protocol=resp_protocol, size=size, poll=poll, bells=bells, buffer=buffer,
                                   buffer_size=buffer_size, patience=patience, checksum=checksum)
    parsed = [Device.parse(text, option=called.device, index=i)
              for i, text in enumerate(devices or [DEFAULT_DEVICE] * len(channels))]
    flagged = [params.flag(called.read_only, i, text) for i, text in enumerate(flags or ["no"])]
    if len(flagged) == 1:
        flagged *= len(channels)
    count = len(channels)
    threads = _of_all(pools, count, DEFAULT_POOL, lambda i, text: _threads(called.pool, i, text))
    seconds = _of_all(timeouts, count, DEFAULT_TIMEOUT, lambda i, text: _seconds(called.timeout, i, text))
    _check_user(called, pools, timeouts, parsed, faults)
    planned = (faults or [()]) * (count if faults is None or len(faults) == 1 else 1)
    configs = [ExportConfig(*three, pool=workers, timeout=limit, faults=plan) for three, workers, limit, plan in zip(
        zip(channels, parsed, flagged, strict=True), threads, seconds, planned, strict=True)]
    check_devices(configs)
    return configs


def of_store(devices: Sequence[Device], called: Options, *, pool: str | None = None, timeout: str | None = None,
             inject: str | None = None) -> tuple[int, float, tuple[Fault, ...]]:
    """What one export has for all its disks: threads, seconds and faults. Raises UsageError."""
    faults = [()] if inject is None else faults_from_list(called.inject, inject)
    if len(faults) != 1:
        raise UsageError("one export has one list of faults, joined by +", option=called.inject, value=inject)
    threads = _threads(called.pool, 0, pool) if pool else DEFAULT_POOL
    seconds = _seconds(called.timeout, 0, timeout) if timeout else DEFAULT_TIMEOUT
    _check_user(called, [pool or ""], [timeout or ""], devices, faults)
    return threads, seconds, faults[0]


def _of_all(texts: list[str] | None, count: int, default: _T, parse: Callable[[int, str], _T]) -> list[_T]:
    """One value per export: of its own entry, or of the only one; `default` where that is empty."""
    values = [parse(i, text) if text else default for i, text in enumerate(texts or [""])]
    return values * count if len(values) == 1 else values


def _check_user(called: Options, pools: list[str] | None, timeouts: list[str] | None, devices: Sequence[Device],
                faults: Sequence[Sequence[Fault]] | None) -> None:
    """Raises UsageError where an entry is about a disk that has no threads, or no timeout: only what is Python's has
    threads, and that or what is to be late a timeout."""
    for option, texts in ((called.pool, pools), (called.timeout, timeouts)):
        for i, text in enumerate(texts or ()):
            if not text:
                continue
            meant = range(len(devices)) if len(texts or ()) == 1 else [i]
            if any(devices[each].kind == "py" for each in meant):
                continue
            other = ""
            if option == called.timeout:
                if any(fault.what == "late" for each in meant for fault in _faults_of(faults, each)):
                    continue
                other = f", or one with {called.inject} late,"
            raise UsageError(f"only a disk written in Python (py:MODULE:CLASS){other} has one", option=option, index=i,
                             value=text)


def _faults_of(faults: Sequence[Sequence[Fault]] | None, index: int) -> Sequence[Fault]:
    """Of the export `index`; one entry is for all."""
    return () if not faults else faults[index if len(faults) > 1 else 0]


def _threads(option: str, index: int, text: str) -> int:
    """The size of a pool. Raises UsageError."""
    return params.number(option, index, text, least=1, most=MOST_POOL, what="a number of threads")


def _seconds(option: str, index: int, text: str) -> float:
    """A timeout, within the bounds of kmod-dblock (1 to 1200 s). Raises UsageError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_TIMEOUT <= seconds <= MOST_TIMEOUT:
        raise UsageError(f"a timeout has {LEAST_TIMEOUT} to {MOST_TIMEOUT} seconds", option=option, index=index, value=text)
    return seconds


def check_devices(configs: Sequence[ExportConfig]) -> None:
    """Raises UsageError where a disk that is written has two exports, or a disk is a region of a connection."""
    stores, parts = [], []
    for config in configs:
        option = config.channels.options.device
        for number, device in enumerate(config.devices):
            index = config.entry(number)
            path = shm.Locator.parse(device.name, option=option, index=index).path if device.name else device.path
            if not path:
                continue
            stores.append((option, index, device.text, os.path.realpath(path), 0, math.inf))
            # Partitions by numbers: where they are, and whether they overlap after all, is seen once they are opened.
            if not config.read_only or device.kind != "file":
                parts.append((*stores[-1][:4], device.partition, device.partition + 1 if device.partition else math.inf))
    params.apart(parts, "a disk that is written has one export")
    for config in configs:
        for option, locator in config.channels.regions:
            for store in stores:
                params.apart([place(option, config.channels.index, locator), store], "a disk is no channel")


class _Change:
    """Something to be done while an export's engine is closed. done: it was, or failed with `error`, and the engine is open
    again, or waits for its channels."""

    def __init__(self, what: Callable[[], None]) -> None:
        self.what = what
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self.what()
        except BaseException as error:
            self.error = error


class Export:
    """What is served over one pair of channels: a disk, or with a buffer any number; open from construction to close().

    watch: polls for it while it is idle. cpu: its thread is pinned to. Raises UsageError, ClaimError, PeerError, OSError;
    nothing is left behind then.
    """

    def __init__(self, config: ExportConfig, *, watch: Watch | None = None, cpu: int | None = None) -> None:
        self.config = config
        self.cpu = cpu
        self._watch = watch
        self._pace = Pace(False)
        self._quiet = False     # nothing was found by the last look
        self._stack = ExitStack()
        with ExitStack() as stack:
            option = config.channels.options.device
            self.backings: list[Backing] = []
            for number, device in enumerate(config.devices):
                with blame(option, config.entry(number), device.text):
                    self.backings.append(stack.enter_context(open_device(
                        device, read_only=config.read_only, option=option, index=config.entry(number), pool=config.pool,
                        timeout=config.timeout)))
                    if config.faults:
                        self.backings[-1].store.inject([fault.plan for fault in config.faults], timeout=config.timeout)
            self._sizes = self._measured()
            self._open()
            stack.callback(self._leave)
            self._stack = stack.pop_all()
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._ended.set()
        self._broken = False
        self._gone = False              # close() is for good
        self._closed = False            # the engine is, until _reopened()
        self._changing = threading.Lock()   # `_change`, and stopping the engine for it
        self._change: _Change | None = None
        self._client = 0    # its process, while it is connected and lives, where it keeps books that we see
        self._died = False  # whether that ended without a word
        self._batches = -1
        self._peer = PeerLog(f"export {self.name}")
        self._comings = PeerLog(f"export {self.name}", most=20)
        self._offences = Offences(f"export {self.name}", config.channels.req.text)
        self._refusing = False  # whether the client has no checksums and is refused for that
        for number in range(len(self.backings)):
            self._say_tail(number)

    @property
    def name(self) -> str:
        return self.config.channels.name

    @property
    def read_only(self) -> bool:
        """Whether writes to all its disks are refused: asked for, or by a store that takes none."""
        return all(backing.store.read_only for backing in self.backings)

    @property
    def size(self) -> int:
        """Bytes a client can use, on all its disks."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Bytes a client can use on each disk. Inline events know blocks of 4096 bytes only."""
        return self._sizes

    def _measured(self) -> list[int]:
        stores = [backing.store for backing in self.backings]
        return [store.nblocks * BLOCK if self.config.channels.buffer is None else store.size for store in stores]

    def _say_tail(self, number: int) -> None:
        backing = self.backings[number]
        if (tail := backing.store.size + backing.left_over - self.sizes[number]) > 0:
            unit = BLOCK if self.config.channels.buffer is None else backing.store.block_size
            log.warning("export %s: the last %d bytes of %s are no whole block of %d, and are not exported", self.name,
                        tail, self.config.devices[number].text, unit)

    @property
    def could_share(self) -> bool:
        """Whether it may share a thread with others: its disk makes no system calls, its disk and channels are memory,
        not files, pages of which wait for a disk or (FUSE) somebody's process, and the channels are soon zeroed. One
        request beside a buffer may be as long as that. All that differs between exports; `shares` has what does not."""
        name = self.config.device.name
        return (self.config.channels.buffer is None and not self.backings[0].store.waits
                and (name is None or shm.Locator.parse(name).posix)
                and all(end.locator.posix and len(end.view) <= _SHARED_REGION for end in self._ends))

    @property
    def shares(self) -> bool:
        """could_share, and POSIX shared memory is memory here."""
        return self.could_share and shm.filesystem("/dev/shm") in ("tmpfs", "ramfs")

    def heed(self, lookout: Lookout | None) -> None:
        """Has it tell of the channels' names. Precondition: nobody serves yet: what has changed before is seen by the first
        looks."""
        locators = [locator for _, locator in self.config.channels.regions]
        if lookout is None or not lookout.covers(locators):
            return
        # Somebody's Python may be late with what it was told long ago, which is looked for.
        self._pace = Pace(all(device.kind != "py" for device in self.config.devices))
        lookout.add(locators, self._nudge)
        self._stack.callback(lookout.remove, locators, self._nudge)

    def start(self) -> None:
        """Begins to serve, in a thread of its own. Raises OSError where none is to be had."""
        self._ended.clear()
        try:
            self._spawn()
        except BaseException:   # close() must not wait for it
            self._ended.set()
            raise
        self._keep()

    def _spawn(self) -> None:
        spawn(self._serve, f"export {self.name}")

    def _keep(self) -> None:
        for backing in self.backings:
            backing.keep()

    def _open(self, old: tuple[End, ...] | None = None) -> None:
        """old: ends to keep where their name still means the same region; closed where it does not, once this returns.
        """
        channels = self.config.channels
        with ExitStack() as undo:
            ends = channels.open(serving=True, old=old)
            for end in ends:
                if old is None or end not in old:
                    undo.callback(end.close)
            self.server = self._engine(*ends)
            self.server.conduct.patience = channels.patience
            undo.pop_all()
        self._ends = ends
        for end in old or ():
            if end not in ends:
                end.close()

    def _engine(self, request: End, response: End, buffer: End | None = None) -> Server | BufferServer:
        channels = self.config.channels
        stores = [backing.store for backing in self.backings]
        more: dict[str, Any] = {
            "request_protocol": channels.req_protocol, "response_protocol": channels.resp_protocol,
            "request_bell": request.bell_view, "response_bell": response.bell_view, "poll": channels.poll,
            "watch": self._watch, "checksum": channels.checksum}
        if buffer is None:
            [store] = stores
            return Server(request.view, response.view, store, **more)
        return BufferServer(request.view, response.view, buffer.view, stores, **more)

    def _close_ends(self) -> None:
        for end in self._ends:
            end.close()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Says so where closing an engine takes long: what a disk has been told to do cannot be taken back, and is waited
        for."""
        timer = threading.Timer(_PATIENCE, log.warning, [
            "export %s: waiting for its disk, which has not finished what it was told", self.name])
        timer.daemon = True
        waits = any(backing.store.waits for backing in self.backings)
        with contextlib.suppress(RuntimeError):     # no thread is to be had: it is waited for in silence
            if waits:
                timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _leave(self) -> None:
        with self._waiting():
            self.server.close(gone=self._gone)
        self._close_ends()

    def _serve(self) -> None:
        try:
            pin(self.cpu, f"export {self.name}")
            while not self._stop.is_set():
                if self._closed:
                    self._follow()
                    continue
                event = self.server.run(self._pace.seconds)
                if event != "tick":
                    self._pace.hurry()
                if event == "stopped":
                    self._follow()      # unless it ends
                    continue
                if event != "tick":
                    self._happened(event)
                    continue
                try:
                    if self._moved():
                        self._follow()
                except Exception as error:  # nobody else would hear of it, and the export goes on
                    self._peer.warning("cannot look after its channels: %s", error)
                    self._stop.wait(LEAST)
                self._pace.looked(self._quiet)
        finally:
            self._ended.set()
            self._refuse()

    def _happened(self, event: str) -> None:
        if event == "connected":
            self._client, self._died = shm.writer_process(self._ends[0].region), False
            self._comings.info("client connected")
        elif event == "disconnected" and self.server.conduct.quarantined:
            self._client, self._died = 0, False
            self._blame()
        elif event == "disconnected":
            if not self._died:      # else the next one begins, and takes the dead one's epoch back
                self._comings.info("client left")
            self._client, self._died = 0, False
        elif event == "overrun":
            self._peer.warning("the client wrote more than the ring holds: %d requests lost so far, %s",
                               self.server.counters["lost"], "reconnecting" if self.config.channels.buffer is None
                               else "it has to reset the connection")
        elif event == "incompatible":
            self._peer.warning("%s", self.config.channels.misfit(True, self.server.fault))

    def _nudge(self) -> None:
        """One of its names may mean something else."""
        self._pace.hurry()
        self.server.nudge()

    def _blame(self) -> None:
        """Says what the client gets wrong, or lacks."""
        self._offences.look(self.server.conduct)
        before, self._refusing = self._refusing, self.checksum == "refused"
        if self._refusing and not before:
            self._peer.warning("the client offers no checksums: every request of it is refused (%s auto serves it all the "
                               "same)", self.config.channels.options.checksum)

    @property
    def checksum(self) -> str:
        """Whether requests and answers have checksums: CHECKSUM of _engine."""
        return self.server.checksum

    def _moved(self) -> bool:
        """Whether the channels' memory is to be followed: a peer may have made them anew, or truncated one.

        An active request channel may be a dead client's: where nothing comes from it and a name means another region
        by now, we follow; where the name is merely gone, its client may still be there, unless the memory is gone too.
        """
        self._quiet = False
        for backing in self.backings:
            backing.tell()
        self._blame()
        if self._client and not os.path.exists(f"/proc/{self._client}"):
            self._client, self._died = 0, True
            self._comings.info("client died")
        before, self._batches = self._batches, self.server.batches
        broken = self.server.broken
        if broken and not self._broken:
            self._broken = True
            log.error("export %s: %s", self.name, BrokenChannelError(
                self._ends[("request", "response", "buffer").index(broken)].locator.text))
        stale = [end for end in self._ends if end.replaced()]
        self._quiet = not broken and not stale and self._batches == before
        if broken:
            return bool(stale) or not any(end.region.truncated() for end in self._ends)
        if not stale or self.server.connected and self._batches != before:
            return False
        return not self.server.connected or any(os.path.exists(end.locator.path) for end in stale)

    def _follow(self) -> None:
        """Leaves the channels' old memory for the new one, as soon as that can be had; does what change() wants meanwhile.
        """
        complaint = ""
        while not self._stop.is_set():
            try:
                if self._reopened():
                    return
            except Exception as error:
                if str(error) != complaint:
                    complaint = str(error)
                    log.warning("export %s: waiting for its channels: %s", self.name, error)
            self._stop.wait(LEAST)

    def _reopened(self) -> bool:
        """Closes the engine, does what change() wants, and opens another one, in the channels' memory of now; False where
        that cannot be had yet. Raises OSError, UsageError, ClaimError, PeerError likewise. The serving thread's."""
        # An end whose name is as it was is kept, for a plain peer that is in nobody's books would be left alone there.
        old = self.server
        with self._changing:            # nobody stops another engine on its account
            change, self._change = self._change, None
        if not self._closed:
            with self._waiting():
                old.close(resizing=change is not None)
            self._closed = True
        if change is not None:
            change.run()
        try:
            if self._broken and not all(end.replaced() or end.remap() for end in self._ends):
                return False
            before, anew = self._ends, self._broken
            self._open(self._ends)
            self.server.inherit(old)  # type: ignore[arg-type]  # an export has engines of one kind
            self._broken = self._closed = False
            if anew or self._ends != before:
                log.info("export %s: channels were made anew", self.name)
            return True
        finally:
            if change is not None:
                change.done.set()

    def _refuse(self) -> None:
        """Ends a change that nobody will make any more."""
        with self._changing:
            change, self._change = self._change, None
        if change is not None:
            change.error = UsageError("the export has ended")
            change.done.set()

    def change(self, what: Callable[[], None]) -> None:
        """Runs what() while no engine uses the stores, and goes on serving: to the client that is a restart. Raises what
        what() does; UsageError where the export is not served any more. One at a time."""
        change = _Change(what)
        self._change = change
        while not change.done.is_set():
            with self._changing:
                if self._change is change:
                    self.server.stop()
            if self._ended.is_set():
                self._refuse()
            change.done.wait(0.05)
        if change.error is not None:
            raise change.error

    def resize(self, number: int, size: int | None, *, force: bool = False) -> bool:
        """Gives disk `number` another size, None: the one that what is behind it has by now; whether that is another.

        The client keeps the disk. force: it may become smaller. Raises UsageError, OSError; the disk is as it was then.
        """
        backing = self.backings[number]
        if not backing.check_resize(size, force):
            return False
        before = self.sizes

        def resize() -> None:
            old = backing.store
            try:
                backing.resize(size, force)
            finally:
                backing.store.inherit(old)
            device = self.config.devices[number]
            if device.kind in ("ram", "null"):
                size_now = backing.store.size
                device = replace(device, text=resized_text(device.kind, size_now), size=size_now)
            devices = [*self.config.devices]
            devices[number] = device
            self.config = replace(self.config, device=devices[0], further=tuple(devices[1:]))
            self._sizes = self._measured()

        self.change(resize)
        self._say_tail(number)
        if self.sizes == before:
            return False
        log.warning("export %s%s: new size %d bytes", self.name, "" if len(before) == 1 else f", number {number}",
                    self.sizes[number])
        return True

    @property
    def state(self) -> str:
        """One of STATES. "waiting": for a client; "client died": without a word, and none has come since; "quarantined": it
        broke more rules than it may, and has not begun another epoch."""
        if self.server.conduct.quarantined:
            return "quarantined"
        return "waiting" if not self.server.connected else "client died" if self._died else "connected"

    def status(self) -> dict[str, Any]:
        """What `muenfast stat` shows."""
        channels = self.config.channels
        devices: list[dict[str, Any]] = [
            {"device": device.text, "size": size, "directions": directions,
             "block_size": BLOCK if channels.buffer is None else backing.store.block_size}
            for device, size, backing, directions in zip(self.config.devices, self.sizes, self.backings,
                                                         self.server.directions, strict=True)]
        waiting = self.server.waiting
        found = {"role": "export", "req": channels.req.text, "resp": channels.resp.text,
                 "device": ",".join(device.text for device in self.config.devices), "size": self.size,
                 "disks": {device.text: f"{os.major(backing.disk)}:{os.minor(backing.disk)}"
                           for device, backing in zip(self.config.devices, self.backings, strict=True) if backing.disk},
                 "read_only": self.read_only, "state": self.state, "cpu": self.cpu,
                 "checksum": self.checksum, "counters": self.server.counters, "offences": self.server.conduct.offences,
                 "waiting": waiting, "devices": devices,
                 "in_flight": waiting + sum(way["depth"] for each in devices for way in each["directions"].values())}
        for key, of in (("injected", "injected"), ("store", "counters")):
            if entries := [each for backing in self.backings if (each := getattr(backing.store, of, None))]:
                found[key] = {name: sum(each[name] for each in entries) for name in entries[0]}
        if channels.buffer is not None:
            found["shm"] = channels.buffer.text
        return found

    def stop(self) -> None:
        """Makes it end soon; close() waits for that."""
        self._stop.set()
        for backing in self.backings:
            backing.hasten()
        self.server.stop(now=True)

    def close(self, *, gone: bool = False) -> None:
        """Finishes what is executing, tells the client "back later", or (gone) that this was for good, leaves the channels,
        frees the device."""
        self._gone = self._gone or gone
        self.stop()
        while not self._ended.wait(0.05):
            self.server.stop(now=True)
        self._stack.close()


class Crew:
    """One thread for several exports that share it (`Export.shares`), by turns.

    What would make the others wait leaves for a thread of its own: channels to be made anew, a client that overruns its
    ring, takes its counters back, makes turns take long or starts anew more than MOST_STARTS times between two looks.
    It does not come back.
    """

    MOST = 128  # FUTEX_WAITV_MAX
    MOST_STARTS = 4
    LOOKS = 8  # at names, some system calls each, before everybody has a turn

    def __init__(self, exports: Sequence[Export], cpu: int | None = None) -> None:
        """cpu: its thread is pinned to, and that of each export that leaves it."""
        self._cpu = cpu
        for export in exports:
            export.cpu = cpu
        self._exports: dict[Server | BufferServer, Export] = {export.server: export for export in exports}
        self._starts = dict.fromkeys(exports, 0)
        self._group = Group()
        self._name = f"exports {exports[0].name} ..."
        self._pace = Pace(all(export._pace.told for export in exports))
        self._said = PeerLog(self._name)

    def start(self) -> None:
        """Begins to serve all. Raises OSError where no thread is to be had."""
        exports = list(self._exports.values())
        for export in exports:
            export._ended.clear()
        try:
            spawn(self._serve, self._name)
        except BaseException:
            for export in exports:
                export._ended.set()
            raise
        for export in exports:
            export._keep()

    def _serve(self) -> None:
        try:
            pin(self._cpu, self._name)
            for server in self._exports:
                assert isinstance(server, Server)
                self._group.add(server)
            self._serve_all()
        except Exception:
            log.exception("the thread of %d exports", len(self._exports))
        for server in self._group.servers:
            self._group.remove(server)
        for export in self._exports.values():
            try:
                export._spawn()
            except Exception:
                export._ended.set()
                log.exception("export %s is not served any more", export.name)

    def _serve_all(self) -> None:
        looked = time.monotonic()
        while self._exports:
            self._run(self._pace.seconds)
            now = time.monotonic()
            if now - looked < self._pace.seconds:
                continue
            looked = now
            quiet = True
            for k, export in enumerate(list(self._exports.values()), 1):
                if export.server in self._exports:      # not gone by what happened just before
                    self._look(export)
                    quiet = quiet and export._quiet
                if k % self.LOOKS == 0:
                    self._run(0.0)
            self._pace.looked(quiet)

    def _run(self, seconds: float) -> None:
        for server, event in self._group.run(seconds):
            if server in self._exports:
                self._happened(self._exports[server], event)

    def _happened(self, export: Export, event: str) -> None:
        self._pace.hurry()
        if event == "tick":     # it was nudged, which its client can bring about
            self._look(export, nudged=True)
            return
        if event == "stopped":
            self._part(export)
            if export._stop.is_set():
                export._ended.set()
                export._refuse()
            else:
                self._change(export)
            return
        export._happened(event)
        self._starts[export] += event in ("connected", "incompatible")
        if event in ("overrun", "unruly") or self._starts[export] > self.MOST_STARTS:
            self._alone(export, "its client makes others wait")

    def _change(self, export: Export) -> None:
        """Does what Export.change() wants of one that has parted."""
        try:
            if export._reopened():
                assert isinstance(export.server, Server)
                self._group.add(export.server)
                self._exports[export.server] = export
                return
        except Exception as error:
            log.warning("export %s: waiting for its channels: %s", export.name, error)
        try:
            export._spawn()     # which waits for them
        except OSError as error:
            export._ended.set()
            log.error("export %s is not served any more: %s", export.name, error.strerror)

    def _look(self, export: Export, *, nudged: bool = False) -> None:
        if not nudged:
            self._starts[export] = 0
        try:
            if export._moved():
                self._alone(export, "its channels are to be followed")
                if export.server not in self._exports:
                    export._nudge()     # its thread follows them at once
        except Exception as error:  # nobody else would hear of it, and the export goes on
            export._peer.warning("cannot look after its channels: %s", error)

    def _part(self, export: Export) -> None:
        assert isinstance(export.server, Server)
        del self._exports[export.server]
        self._group.remove(export.server)

    def _alone(self, export: Export, why: str) -> None:
        """Where no thread is to be had, it stays, and the next occasion comes."""
        self._part(export)
        try:
            export._spawn()
        except BaseException as error:
            assert isinstance(export.server, Server)
            self._group.add(export.server)
            self._exports[export.server] = export
            if not isinstance(error, OSError):
                raise
            # By itself: among the export's warnings, one a second, it would be lost.
            self._said.warning("%s: %s, but stays: %s", export.name, why, error.strerror)
        else:
            log.info("export %s: %s: it has a thread of its own from now on", export.name, why)
