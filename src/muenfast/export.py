"""The serving side: one disk behind one block connection."""

from __future__ import annotations

import logging
import math
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from muenfast import params, shm
from muenfast._blk import Server
from muenfast._ring import Watch
from muenfast.backing import DEFAULT_DEVICE, Backing, Device, open_device
from muenfast.channel import End
from muenfast.connection import BLOCK, Channels, Options, blame, channels_from_lists, place
from muenfast.errors import BrokenChannelError, PeerLog

log = logging.getLogger("muenfast")

_TICK = 0.2  # seconds between looks at names


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
        self._broken = False
        self._peer = PeerLog(f"export {self.name}")
        self._thread = threading.Thread(target=self._serve, name=f"export {config.channels.name}", daemon=True)

    @property
    def name(self) -> str:
        return self.config.channels.name

    @property
    def size(self) -> int:
        """Bytes a client can use."""
        return int(self.backing.store.nblocks) * BLOCK

    def start(self) -> None:
        """Begins to serve, in a thread of its own."""
        self.backing.keep()
        self._thread.start()

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
        batches = -1
        while not self._stop.is_set():
            event = self.server.run(_TICK)
            if event == "tick":
                before, batches = batches, self.server.counters["batches"]
                try:
                    self._look(idle=not self.server.connected or batches == before)
                except Exception as error:  # nobody else would hear of it, and the export goes on
                    self._peer.warning("cannot look after its channels: %s", error)
                    self._stop.wait(_TICK)
            elif event == "connected":
                log.info("export %s: client connected", self.name)
            elif event == "disconnected":
                log.info("export %s: client left", self.name)
            elif event == "overrun":
                self._peer.warning("the client wrote more than the ring holds: %d requests lost so far, reconnecting",
                               self.server.counters["lost"])
            elif event == "incompatible":
                self._peer.warning("%s", self.config.channels.misfit(True, self.server.fault))

    def _look(self, idle: bool) -> None:
        """Follows the channels' memory: a peer may have made them anew, or truncated one and given it its size back.

        An active request channel may be a dead client's: where nothing comes from it and a name means another region
        by now, we follow; where the name is merely gone, its client may still be there, unless the memory is gone too.
        """
        broken = self.server.broken
        if broken and not self._broken:
            self._broken = True
            log.error("export %s: %s", self.name, BrokenChannelError(self._ends[broken == "response"].locator.text))
        stale = [end for end in self._ends if end.replaced()]
        if broken:
            if not stale and any(end.region.truncated() for end in self._ends):
                return
        elif not idle or not stale:
            return
        elif self.server.connected and not any(os.path.exists(end.locator.path) for end in stale):
            return
        # An end whose name is as it was is kept, for a plain peer that is in nobody's books would be left alone there.
        old = self.server
        old.close()
        complaint = ""
        while not self._stop.is_set():
            try:
                if broken and not all(end.replaced() or end.remap() for end in self._ends):
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
        if self._thread.ident is not None:
            while self._thread.is_alive():
                self.server.stop()
                self._thread.join(0.05)
        self._stack.close()
