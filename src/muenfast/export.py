"""The serving side: one disk behind one block connection."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from muenfast import params, shm
from muenfast._blk import Group, Server
from muenfast._ring import Watch
from muenfast.backing import DEFAULT_DEVICE, Backing, Device, open_device
from muenfast.channel import End
from muenfast.connection import BLOCK, Channels, Options, blame, channels_from_lists, place
from muenfast.errors import BrokenChannelError, PeerLog

log = logging.getLogger("muenfast")

_TICK = 0.2  # seconds between looks at names
_SHARED_REGION = 4 << 20  # bytes; zeroing a ring of that size takes a millisecond at most


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """One export: its channels and what stands behind them."""

    channels: Channels
    device: Device
    read_only: bool = False


def exports_from_lists(req: str, resp: str, *, device: str | None = None, read_only: str | None = None,
                       options: Options | None = None, **lists: Any) -> list[ExportConfig]:
    """The server's lists (see channels_from_lists). device: default ram:64M each. read_only: "yes,no,...", or one
    entry for all. Raises UsageError."""
    called = options or Options()
    devices = None if device is None else params.split(called.device, device)
    flags = None if read_only is None else params.split(called.read_only, read_only)
    more = {called.device: devices, called.read_only: flags if flags is not None and len(flags) > 1 else None}
    channels = channels_from_lists(req, resp, more=more, options=called, **lists)
    parsed = [Device.parse(text, option=called.device, index=i)
              for i, text in enumerate(devices or [DEFAULT_DEVICE] * len(channels))]
    flagged = [params.flag(called.read_only, i, text) for i, text in enumerate(flags or ["no"])]
    if len(flagged) == 1:
        flagged *= len(channels)
    paths = [shm.Locator.parse(d.name, option=called.device, index=i).path if d.name else d.path
             for i, d in enumerate(parsed)]
    stores = [(called.device, i, parsed[i].text, os.path.realpath(path), 0, math.inf)
              for i, path in enumerate(paths) if path]
    # Partitions by their numbers: where they are, and whether they overlap after all, is seen once they are opened.
    parts = [(option, i, text, path, parsed[i].partition, parsed[i].partition + 1 if parsed[i].partition else math.inf)
             for option, i, text, path, _, _ in stores]
    params.apart([span for span in parts if not flagged[span[1]] or parsed[span[1]].kind != "file"],
                 "a disk that is written has one export")
    for entry in channels:
        for option, locator in ((called.req, entry.req), (called.resp, entry.resp)):
            for store in stores:
                params.apart([place(option, entry.index, locator), store], "a disk is no channel")
    return [ExportConfig(*entry) for entry in zip(channels, parsed, flagged, strict=True)]


class Export:
    """One disk served over one pair of channels; open from construction to close().

    watch: polls for it while it is idle. Raises UsageError, ClaimError, PeerError, OSError; nothing is left behind then.
    """

    def __init__(self, config: ExportConfig, *, watch: Watch | None = None) -> None:
        self.config = config
        self._watch = watch
        self._stack = ExitStack()
        with ExitStack() as stack:
            option = config.channels.options.device
            with blame(option, config.channels.index, config.device.text):
                self.backing: Backing = stack.enter_context(open_device(
                    config.device, read_only=config.read_only, option=option, index=config.channels.index))
            self._open()
            stack.callback(self._leave)
            self._stack = stack.pop_all()
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._ended.set()
        self._broken = False
        self._batches = -1
        self._peer = PeerLog(f"export {self.name}")

    @property
    def name(self) -> str:
        return self.config.channels.name

    @property
    def size(self) -> int:
        """Bytes a client can use."""
        return int(self.backing.store.nblocks) * BLOCK

    @property
    def shares(self) -> bool:
        """Whether it may share a thread with others: its disk makes no system calls, and its channels are memory, not
        files that a file system may be slow to write, and soon zeroed."""
        return not self.backing.store.waits and all(
            end.locator.posix and len(end.view) <= _SHARED_REGION for end in self._ends)

    def start(self) -> None:
        """Begins to serve, in a thread of its own."""
        self.backing.keep()
        served = not self._ended.is_set()
        self._ended.clear()
        try:
            threading.Thread(target=self._serve, name=f"export {self.name}", daemon=True).start()
        except BaseException:  # no more threads are to be had: close() must not wait for one
            if not served:
                self._ended.set()
            raise

    def _open(self, old: tuple[End, End] | None = None) -> None:
        """old: ends to keep where their name still means the same region; closed where it does not, once this returns.
        """
        channels = self.config.channels
        with ExitStack() as undo:
            ends = channels.open(serving=True, old=old)
            for end in ends:
                if old is None or end not in old:
                    undo.callback(end.close)
            self.server = Server(
                ends[0].view, ends[1].view, self.backing.store, request_protocol=channels.req_protocol,
                response_protocol=channels.resp_protocol, request_bell=ends[0].bell_view,
                response_bell=ends[1].bell_view, poll=channels.poll, watch=self._watch)
            undo.pop_all()
        self._ends = ends
        for end in old or ():
            if end not in ends:
                end.close()

    def _close_ends(self) -> None:
        for end in self._ends:
            end.close()

    def _leave(self) -> None:
        self.server.close()
        self._close_ends()

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                event = self.server.run(_TICK)
                if event != "tick":
                    self._happened(event)
                    continue
                try:
                    if self._moved():
                        self._follow()
                except Exception as error:  # nobody else would hear of it, and the export goes on
                    self._peer.warning("cannot look after its channels: %s", error)
                    self._stop.wait(_TICK)
        finally:
            self._ended.set()

    def _happened(self, event: str) -> None:
        if event == "connected":
            log.info("export %s: client connected", self.name)
        elif event == "disconnected":
            log.info("export %s: client left", self.name)
        elif event == "overrun":
            self._peer.warning("the client wrote more than the ring holds: %d requests lost so far, reconnecting",
                               self.server.counters["lost"])
        elif event == "incompatible":
            self._peer.warning("%s", self.config.channels.misfit(True, self.server.fault))

    def _moved(self) -> bool:
        """Whether the channels' memory is to be followed: a peer may have made them anew, or truncated one.

        An active request channel may be a dead client's: where nothing comes from it and a name means another region
        by now, we follow; where the name is merely gone, its client may still be there, unless the memory is gone too.
        """
        before, self._batches = self._batches, self.server.counters["batches"]
        broken = self.server.broken
        if broken and not self._broken:
            self._broken = True
            log.error("export %s: %s", self.name, BrokenChannelError(self._ends[broken == "response"].locator.text))
        stale = [end for end in self._ends if end.replaced()]
        if broken:
            return bool(stale) or not any(end.region.truncated() for end in self._ends)
        if not stale or self.server.connected and self._batches != before:
            return False
        return not self.server.connected or any(os.path.exists(end.locator.path) for end in stale)

    def _follow(self) -> None:
        """Leaves the channels' old memory for the new one, as soon as that can be had."""
        # An end whose name is as it was is kept, for a plain peer that is in nobody's books would be left alone there.
        old = self.server
        old.close()
        complaint = ""
        while not self._stop.is_set():
            try:
                if self._broken and not all(end.replaced() or end.remap() for end in self._ends):
                    self._stop.wait(_TICK)
                    continue
                self._open(self._ends)
                self.server.inherit(old)
                self._broken = False
                log.info("export %s: channels were made anew", self.name)
                return
            except Exception as error:
                if str(error) != complaint:
                    complaint = str(error)
                    log.warning("export %s: waiting for its channels: %s", self.name, error)
                self._stop.wait(_TICK)

    def status(self) -> dict[str, Any]:
        """What `muenfast stat` shows."""
        channels = self.config.channels
        return {"role": "export", "req": channels.req.text, "resp": channels.resp.text,
                "device": self.config.device.text, "size": self.size, "read_only": self.config.read_only,
                "state": "connected" if self.server.connected else "waiting", "counters": self.server.counters}

    def close(self) -> None:
        """Finishes what is executing, tells the client "back later", leaves the channels, frees the device."""
        self._stop.set()
        self.server.stop()
        while not self._ended.wait(0.05):
            self.server.stop()
        self._stack.close()


class Crew:
    """One thread for several exports that share it (`Export.shares`), by turns.

    What would make the others wait leaves for a thread of its own: channels to be made anew, a client that overruns its
    ring, takes its counters back, makes turns take long or starts anew more than MOST_EVENTS times a second. It does not
    come back.
    """

    MOST = 128  # FUTEX_WAITV_MAX
    MOST_EVENTS = 20

    def __init__(self, exports: Sequence[Export]) -> None:
        self._exports = list(exports)
        self._events = dict.fromkeys(self._exports, 0)
        self._group = Group()
        self._thread = threading.Thread(target=self._serve, name=f"exports {self._exports[0].name} ...", daemon=True)

    def start(self) -> None:
        """Begins to serve all."""
        for export in self._exports:
            export.backing.keep()
            export._ended.clear()
        try:
            self._thread.start()
        except BaseException:
            for export in self._exports:
                export._ended.set()
            raise

    def _serve(self) -> None:
        try:
            for export in self._exports:
                self._group.add(export.server)
            self._serve_all()
        except Exception:
            log.exception("the thread of %d exports", len(self._exports))
        for server in self._group.servers:
            self._group.remove(server)
        for export in self._exports:
            try:
                export.start()
            except Exception:
                export._ended.set()
                log.exception("export %s is not served any more", export.name)

    def _serve_all(self) -> None:
        looked = time.monotonic()
        while self._exports:
            owners = {id(export.server): export for export in self._exports}
            for server, event in self._group.run(_TICK):
                if owners[id(server)] in self._exports:     # not gone by what happened just before
                    self._happened(owners[id(server)], event)
            now = time.monotonic()
            if now - looked >= _TICK:
                looked = now
                for export in list(self._exports):
                    self._look(export)

    def _happened(self, export: Export, event: str) -> None:
        if event == "stopped":
            self._part(export)
            export._ended.set()
            return
        export._happened(event)
        self._events[export] += 1
        if event in ("overrun", "unruly") or self._events[export] > self.MOST_EVENTS * _TICK:
            self._alone(export, "its client makes others wait")

    def _look(self, export: Export) -> None:
        self._events[export] = 0
        try:
            if export._moved():
                self._alone(export, "its channels are to be followed")
        except Exception as error:  # nobody else would hear of it, and the export goes on
            export._peer.warning("cannot look after its channels: %s", error)

    def _part(self, export: Export) -> None:
        self._exports.remove(export)
        self._group.remove(export.server)

    def _alone(self, export: Export, why: str) -> None:
        """Where no thread is to be had, it stays, and the next occasion comes."""
        self._part(export)
        try:
            export.start()
        except Exception as error:
            self._group.add(export.server)
            self._exports.append(export)
            export._peer.warning("%s, but it gets no thread of its own: %s", why, error)
        else:
            log.info("export %s: %s: it has a thread of its own from now on", export.name, why)
