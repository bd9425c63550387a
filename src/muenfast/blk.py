"""Block exports and block clients: configuration and life cycle around the engines of _blk.

A server (BlockServer) runs one Export per pair of channels; a client is a BlockDevice, used from Python or through
a front end (attach/) as /dev/muendiskX. Set-up is all or nothing; leaving removes what was made.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from muenfast import params, shm
from muenfast._blk import Client, Server
from muenfast._ring import layout
from muenfast.backing import DEFAULT_DEVICE, Backing, Device, open_device
from muenfast.channel import End
from muenfast.errors import BrokenChannelError, ClaimError, MuenfastError, PeerError, UsageError

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger("muenfast")

_LAYOUT = layout()
BLOCK: int = _LAYOUT["block_size"]
REQUEST_PROTOCOL: int = _LAYOUT["request_protocol"]
RESPONSE_PROTOCOL: int = _LAYOUT["response_protocol"]
REGION_SIZE = 0x100000  # PROTOCOLS: the known peer's inline regions, 254 elements
_LEAST = _LAYOUT["header_size"] + _LAYOUT["event_size"]
MOST_POLL = 10_000_000  # microseconds: a channel is looked at once in 10 s at least
_TICK = 0.2  # seconds between looks at names, claims and policies
_QUIET = 1.0  # seconds between two lines of the log that a peer can cause at will


@dataclass(frozen=True, slots=True)
class Channels:
    """One connection: a request and a response channel, from entry `index` of the lists.

    size: bytes of a region that is made. poll: microseconds between polls, None: adaptive. bells: False: strict
    one-way, nothing flows back.
    """

    req: shm.Locator
    resp: shm.Locator
    index: int = 0
    req_protocol: int = REQUEST_PROTOCOL
    resp_protocol: int = RESPONSE_PROTOCOL
    size: int = REGION_SIZE
    poll: int | None = None
    bells: bool = True

    @property
    def name(self) -> str:
        return f"{self.req.text}/{self.resp.text}"

    def open(self, serving: bool, old: tuple[End, End] | None = None) -> tuple[End, End]:
        """Both ends (request, response), claimed for the server or the client; errors name option and entry.

        old: ends to keep where their name still means the same region.
        """
        with ExitStack() as stack:
            role = "muenfast blk server" if serving else "muenfast blk client"
            ends: list[End] = []
            for i, (option, locator, writes) in enumerate((("--req", self.req, not serving),
                                                           ("--resp", self.resp, serving))):
                if old is not None and not old[i].replaced():
                    ends.append(old[i])
                    continue
                with blame(option, self.index, locator.text):
                    ends.append(stack.enter_context(End(locator, writes=writes, role=role, create=self.size,
                                                        least=_LEAST, bell=self.bells)))
            stack.pop_all()
            return ends[0], ends[1]


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """One export: its channels and what stands behind them."""

    channels: Channels
    device: Device
    read_only: bool = False


@contextmanager
def blame(option: str, index: int, value: str) -> Iterator[None]:
    """Errors from within name the list entry they belong to."""
    try:
        yield
    except UsageError as error:
        if error.option is not None:
            raise
        raise UsageError(error.rule, option=option, index=index, value=value, hint=error.hint) from error
    except ClaimError as error:
        raise ClaimError(f"{option}, entry {index} {value!r}: {error.what}", error.holder, hint=error.hint) from error
    except OSError as error:
        raise OSError(error.errno, f"{option}, entry {index} {value!r}: {error.strerror}", error.filename) from error


def channels_from_lists(req: str, resp: str, *, req_protocol: str | None = None, resp_protocol: str | None = None,
                        size: str | None = None, poll: int | None = None, bells: bool = True,
                        more: dict[str, list[str] | None] | None = None) -> list[Channels]:
    """Pairs comma lists by position; nothing is opened. more: further lists whose lengths must agree.

    Raises UsageError naming option, entry, value and rule.
    """
    lists: dict[str, list[str] | None] = {"--req": params.split("--req", req), "--resp": params.split("--resp", resp)}
    for option, text in (("--req-protocol", req_protocol), ("--resp-protocol", resp_protocol), ("--size", size)):
        lists[option] = None if text is None else params.split(option, text)
    count = params.same_length({**lists, **(more or {})})
    locators = {option: [shm.Locator.parse(text, option=option, index=i) for i, text in enumerate(lists[option] or ())]
                for option in ("--req", "--resp")}
    params.apart([_place(option, i, locator) for option, entries in locators.items()
                  for i, locator in enumerate(entries)], "a channel carries one direction of one connection")
    if poll is not None and not 1 <= poll <= MOST_POLL:
        raise UsageError(f"a pause in microseconds is a number from 1 to {MOST_POLL}", option="--poll", value=poll)

    def each(option: str, parse: Callable[[str, int, str], int], default: int) -> list[int]:
        texts = lists[option]
        return [default] * count if texts is None else [parse(option, i, text) for i, text in enumerate(texts)]

    req_ids = each("--req-protocol", params.protocol, REQUEST_PROTOCOL)
    resp_ids = each("--resp-protocol", params.protocol, RESPONSE_PROTOCOL)
    sizes = each("--size", lambda o, i, t: params.size(o, i, t, least=_LEAST), REGION_SIZE)
    return [Channels(locators["--req"][i], locators["--resp"][i], i, req_ids[i], resp_ids[i], sizes[i], poll, bells)
            for i in range(count)]


def _place(option: str, index: int, locator: shm.Locator) -> tuple[str, int, str, str, int, float]:
    """What params.apart compares: two names of one file are one."""
    end = math.inf if locator.size is None else locator.offset + locator.size
    return option, index, locator.text, os.path.realpath(locator.path), locator.offset, end


def exports_from_lists(req: str, resp: str, *, device: str | None = None, read_only: str | None = None,
                       **lists: Any) -> list[ExportConfig]:
    """The server's lists (see channels_from_lists). device: default ram:64M each. read_only: "yes,no,...", or one
    entry for all. Raises UsageError."""
    devices = None if device is None else params.split("--device", device)
    flags = None if read_only is None else params.split("--read-only", read_only)
    more = {"--device": devices, "--read-only": flags if flags is not None and len(flags) > 1 else None}
    channels = channels_from_lists(req, resp, more=more, **lists)
    parsed = [Device.parse(text, option="--device", index=i)
              for i, text in enumerate(devices or [DEFAULT_DEVICE] * len(channels))]
    flagged = [params.flag("--read-only", i, text) for i, text in enumerate(flags or ["no"])]
    if len(flagged) == 1:
        flagged *= len(channels)
    paths = [shm.Locator.parse(d.name, option="--device", index=i).path if d.name else d.path
             for i, d in enumerate(parsed)]
    stores = [("--device", i, parsed[i].text, os.path.realpath(path), 0, math.inf)
              for i, path in enumerate(paths) if path]
    params.apart([span for span in stores if not flagged[span[1]] or parsed[span[1]].kind != "file"],
                 "a disk that is written has one export")
    for entry in channels:
        for option, locator in (("--req", entry.req), ("--resp", entry.resp)):
            for store in stores:
                params.apart([_place(option, entry.index, locator), store], "a disk is no channel")
    return [ExportConfig(*entry) for entry in zip(channels, parsed, flagged, strict=True)]


# ------------------------------------------------------------------ server


class Export:
    """One disk served over one pair of channels; open from construction to close().

    Raises UsageError, ClaimError, PeerError, OSError; nothing is left behind then.
    """

    def __init__(self, config: ExportConfig) -> None:
        self.config = config
        self._stack = ExitStack()
        with ExitStack() as stack:
            with blame("--device", config.channels.index, config.device.text):
                self.backing: Backing = stack.enter_context(open_device(
                    config.device, read_only=config.read_only, option="--device", index=config.channels.index))
            self._open()
            stack.callback(self._leave)
            self._stack = stack.pop_all()
        self._stop = threading.Event()
        self._broken = False
        self._complained, self._swallowed = -_QUIET, 0
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
                response_bell=ends[1].bell_view, poll=channels.poll)
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
                    self._complain("cannot look after its channels: %s", error)
                    self._stop.wait(_TICK)
            elif event == "connected":
                log.info("export %s: client connected", self.name)
            elif event == "disconnected":
                log.info("export %s: client left", self.name)
            elif event == "overrun":
                self._complain("the client wrote more than the ring holds: %d requests lost so far, reconnecting",
                               self.server.counters["lost"])
            elif event == "incompatible":
                protocol, size, elements = self.server.fault
                self._complain("%s", PeerError(
                    self.config.channels.req.text, "header",
                    f"protocol {protocol:x}, size {size}, elements {elements}",
                    f"protocol {self.config.channels.req_protocol:x}, size {_LAYOUT['event_size']}, elements that fit"))

    def _complain(self, text: str, *values: object) -> None:
        """A warning about a peer, who shall not fill our log."""
        now = time.monotonic()
        if now - self._complained < _QUIET:
            self._swallowed += 1
            return
        more = f" ({self._swallowed} warnings more were left out)" if self._swallowed else ""
        log.warning("export %s: " + text + "%s", self.name, *values, more)
        self._complained, self._swallowed = now, 0

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


class _Group:
    """Parts that are opened in order, all or none, and closed in reverse; context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def close(self) -> None:
        """Closes all parts, the last first."""
        self._stack.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


class BlockServer(_Group):
    """Several exports in one process; serving from construction to close()."""

    def __init__(self, configs: Sequence[ExportConfig]) -> None:
        super().__init__()
        self.exports: list[Export] = []
        with ExitStack() as stack:
            for config in configs:
                export = Export(config)
                stack.callback(export.close)
                self.exports.append(export)
            for export in self.exports:
                export.start()
            self._stack = stack.pop_all()

    def status(self) -> list[dict[str, Any]]:
        """One entry per export."""
        return [export.status() for export in self.exports]


# ------------------------------------------------------------------ client


@dataclass(frozen=True, slots=True)
class OnPeerLoss:
    """What happens to requests while the server is gone: "queue" (wait), "fail", or "timeout" after `seconds`."""

    mode: str = "queue"
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str = "--on-peer-loss") -> OnPeerLoss:
        """queue | fail | timeout:SECONDS. Raises UsageError."""
        mode, _, rest = text.partition(":")
        if text in ("queue", "fail"):
            return cls(text)
        try:
            seconds = float(rest)
        except ValueError:
            seconds = -1.0
        if mode != "timeout" or not 0 < seconds < 1e6:
            raise UsageError("what to do without a server is queue, fail or timeout:SECONDS",
                             option=option, value=text)
        return cls("timeout", seconds)


class BlockDevice:
    """A disk at the other side of two channels.

        with muenfast.BlockDevice(req="a", resp="c") as disk:
            disk.pwrite(b"hello", 0)
            disk.flush()
            assert disk.pread(5, 0) == b"hello"

    req, resp: locators (or channels: a parsed Channels). timeout: seconds to wait for the server, None: no end.
    on_peer_loss: "queue" (requests wait for the server's return), "fail" or "timeout:SECONDS". same_store: believe
    that a server which announces no or another identity still has the same data.

    All methods may be called from any number of threads; requests of several threads are in flight together.
    Raises TimeoutError when no server answers, PeerError when what answers is none, ClaimError, UsageError, OSError.
    """

    block_size = BLOCK

    def __init__(self, req: str | None = None, resp: str | None = None, *, channels: Channels | None = None,
                 timeout: float | None = 10.0, on_peer_loss: str | OnPeerLoss = "queue",
                 same_store: bool = False, **lists: Any) -> None:
        if channels is None:
            if req is None or resp is None:
                raise UsageError("a block device needs a request and a response channel")
            (channels,) = channels_from_lists(req, resp, **lists)
        self.channels = channels
        self._policy = OnPeerLoss.parse(on_peer_loss, "on_peer_loss") if isinstance(on_peer_loss, str) else on_peer_loss
        self._same_store = same_store
        self._store: bytes | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._gone = False
        self._failure: str | None = None
        self._rmw = threading.Lock()
        self._complaint = ""
        self._broken = False
        self._known = False  # whether the server's claim was ever seen held
        self._open()
        self._thread = threading.Thread(target=self._run, name=f"disk {channels.name}", daemon=True)
        self._thread.start()
        try:
            if timeout != 0 and not self.wait_ready(timeout):
                if self._failure is not None:
                    raise PeerError(channels.resp.text, "size", self._failure, "a disk")
                if (wrong := self._incompatible()) is not None:
                    raise wrong
                raise TimeoutError(errno.ETIMEDOUT, f"no server answered on channels {channels.name} within "
                                                    f"{timeout:g} s; is `muenfast blk` running there?")
        except BaseException:
            self.close()
            raise

    # -------------------------------------------------------------- life

    def _open(self) -> None:
        channels = self.channels
        self._ends = channels.open(serving=False)
        try:
            self.client = Client(
                self._ends[0].view, self._ends[1].view, request_protocol=channels.req_protocol,
                response_protocol=channels.resp_protocol, request_bell=self._ends[0].bell_view,
                response_bell=self._ends[1].bell_view, poll=channels.poll, fail_fast=self._policy.mode == "fail")
        except BaseException:
            self._close_ends()
            raise

    def _close_ends(self) -> None:
        for end in self._ends:
            end.close()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Waits until the server answered, seconds or without end; whether it did. False at once when the device is
        closed or has failed."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._ready.is_set():
            left = 0.05 if end is None else min(0.05, end - time.monotonic())
            if left <= 0 or self._stop.is_set() or self._failure is not None:
                return False
            self._ready.wait(left)
        return True

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:  # without this thread every request would wait for ever
            log.exception("disk %s", self.channels.name)
            self._give_up(f"its thread ended: {error!r}")

    def _follow(self) -> None:
        lost_since = stuck_since = 0.0
        progress = -1
        while not self._stop.is_set():
            state = self.client.run(_TICK)
            now = time.monotonic()
            if state == "answered":
                if self._answered():
                    lost_since = 0.0
            elif state == "lost":
                if not lost_since:
                    lost_since = now
                    log.warning("disk %s: the server is gone%s", self.channels.name, self._meanwhile())
                    if self._policy.mode == "fail":
                        self.client.fail(forever=False)
                if self.client.server_state == "gone":
                    self._gone = True
                    self._give_up("the server ended the export for good")
                elif self._policy.mode == "timeout" and now - lost_since > self._policy.seconds:
                    self.client.fail(forever=False)
                    lost_since = now
            elif state == "ready":
                before, progress = progress, self.client.progress
                if progress != before:
                    stuck_since = 0.0
                    continue
                self._look(gone=False)
                if self._policy.mode == "queue" or self.client.state != "ready":
                    continue
                if self._server_died():
                    self.client.fail(forever=False)
                elif self._policy.mode == "timeout" and self.client.in_flight:
                    stuck_since = stuck_since or now
                    if now - stuck_since > self._policy.seconds:
                        log.warning("disk %s: no answer for %g s", self.channels.name, self._policy.seconds)
                        self.client.fail(forever=False)
                        stuck_since = 0.0
                else:
                    stuck_since = 0.0
            if state in ("connecting", "lost") or self.client.broken:
                if (wrong := self._incompatible()) is not None:
                    self._complain(str(wrong))
                self._look(gone=not self.client.server_active)

    def _incompatible(self) -> PeerError | None:
        """What is wrong with a response channel that was refused."""
        if self.client.incompatible is None:
            return None
        protocol, size, elements = self.client.incompatible
        return PeerError(self.channels.resp.text, "header", f"protocol {protocol:x}, size {size}, elements {elements}",
                         f"protocol {self.channels.resp_protocol:x}, size {_LAYOUT['event_size']}, elements that fit")

    def _complain(self, text: str) -> None:
        """Says once what stands in the way of a connection."""
        if text != self._complaint:
            self._complaint = text
            log.warning("disk %s: waiting: %s", self.channels.name, text)

    def _answered(self) -> bool:
        """The server named a size: issue again if it is the same disk, else fail for good.

        False when it has gone meanwhile.
        """
        blocks, store = int(self.client.answered_blocks), self.client.store
        if not self._ready.is_set():
            if blocks == 0:
                self._give_up("the server's disk has no block")
                return True
            if not self.client.resume():
                return False
            self._store = store
            self.read_only = bool(self.client.read_only)
            self._ready.set()
            log.info("disk %s: connected, %d bytes", self.channels.name, blocks * BLOCK)
            return True
        same = self._same_store or (store is not None and store == self._store)
        if blocks != self.client.nblocks:
            self._give_up(f"the server returned with {blocks} blocks instead of {self.client.nblocks}")
        elif not same:
            self._give_up("the server returned with another store" if store is not None else
                          "the server that returned does not say which store it has (--same-store trusts it)")
        else:
            before = self.client.counters["reissued"]
            if not self.client.resume():
                return False
            log.info("disk %s: the server is back, %d requests issued again", self.channels.name,
                     self.client.counters["reissued"] - before)
        return True

    def _give_up(self, why: str) -> None:
        self._failure = why
        log.error("disk %s: %s: every request fails from now on", self.channels.name, why)
        self.client.fail(forever=True)

    def _meanwhile(self) -> str:
        return {"queue": ", requests wait for its return", "fail": ", requests fail until it returns",
                "timeout": f", requests fail after {self._policy.seconds:g} s"}[self._policy.mode]

    def _server_died(self) -> bool:
        """Whether the writer's claim on the response channel is free although it once was held."""
        try:
            held = shm.writer_holder(self._ends[1].region) is not None
        except OSError as error:
            self._complain(f"cannot see whether its server lives: {error}")
            return False
        self._known = self._known or held
        return self._known and not held

    def _look(self, gone: bool) -> None:
        """Follows the channels' memory, as Export._look does. gone: whether no server is there; an active response
        channel may be a dead server's: then we follow only where a name means another region by now."""
        broken = self.client.broken
        if broken and not self._broken:
            self._broken = True
            log.error("disk %s: %s", self.channels.name,
                      BrokenChannelError(self._ends[broken == "response"].locator.text))
        try:
            stale = [end for end in self._ends if end.replaced()]
            if broken and not stale:
                if all(end.remap() for end in self._ends):
                    self.client.rebind(self._ends[0].view, self._ends[1].view, self._ends[0].bell_view,
                                       self._ends[1].bell_view)
                    self._broken = False
                    log.info("disk %s: channel memory is back", self.channels.name)
                return
            if not stale or not gone and not broken and not any(os.path.exists(end.locator.path) for end in stale):
                return
            with ExitStack() as undo:
                fresh = self.channels.open(serving=False, old=self._ends)
                for end in fresh:
                    if end not in self._ends:
                        undo.callback(end.close)
                self.client.rebind(fresh[0].view, fresh[1].view, fresh[0].bell_view, fresh[1].bell_view)
                undo.pop_all()
            old, self._ends = self._ends, fresh
            for end in old:
                if end not in fresh:
                    end.close()
        except (OSError, MuenfastError) as error:
            self._complain(str(error))
            return
        self._complaint, self._broken = "", False
        log.info("disk %s: channels were made anew", self.channels.name)

    # -------------------------------------------------------------- use

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return int(self.client.nblocks) * BLOCK

    @property
    def gone(self) -> bool:
        """Whether the server ended this export for good."""
        return self._gone

    @property
    def failure(self) -> str | None:
        """Why every request fails, None while the device works."""
        return self._failure

    def _span(self, offset: int, length: int) -> None:
        if self._stop.is_set():
            raise UsageError("this device is closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UsageError(f"bytes {offset} to {offset + length} reach beyond the disk's {self.size}")

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from byte `offset` on. Raises UsageError (beyond the disk), OSError."""
        self._span(offset, length)
        data = bytearray(length)
        self.pread_into(data, offset)
        return bytes(data)

    def pread_into(self, buffer: Any, offset: int) -> int:
        """Fills a writable buffer from byte `offset` on; returns its length. Whole blocks are not copied twice."""
        with memoryview(buffer) as raw, raw.cast("B") as view:
            self._span(offset, len(view))
            head = -offset % BLOCK
            if head == 0 and len(view) % BLOCK == 0:
                self.client.read_blocks(offset // BLOCK, view)
            elif len(view):
                first, last = offset // BLOCK, (offset + len(view) - 1) // BLOCK
                whole = bytearray((last - first + 1) * BLOCK)
                self.client.read_blocks(first, whole)
                start = offset - first * BLOCK
                view[:] = memoryview(whole)[start:start + len(view)]
            return len(view)

    def pwrite(self, data: Any, offset: int) -> int:
        """Writes a buffer from byte `offset` on; returns its length. On return the server's store has it; flush()
        makes it durable. Blocks written in part are read first; such writes of one BlockDevice do not mix.

        Raises UsageError (beyond the disk), OSError.
        """
        with memoryview(data) as raw, raw.cast("B") as view:
            length = len(view)
            self._span(offset, length)
            if offset % BLOCK == 0 and length % BLOCK == 0:
                self.client.write_blocks(offset // BLOCK, view)
            elif length:
                first, last = offset // BLOCK, (offset + length - 1) // BLOCK
                whole = bytearray((last - first + 1) * BLOCK)
                with self._rmw, memoryview(whole) as target:
                    self.client.read_blocks(first, target[:BLOCK])
                    if last != first:
                        self.client.read_blocks(last, target[-BLOCK:])
                    start = offset - first * BLOCK
                    target[start:start + length] = view
                    self.client.write_blocks(first, target)
            return length

    def pread_many(self, offsets: Sequence[int], buffer: Any) -> int:
        """Reads one piece per byte offset, all in flight together; the buffer's equal pieces receive them in order.

        Offsets and pieces are multiples of 4096 bytes. Returns the bytes read. Raises UsageError, OSError.
        """
        return self._many(False, offsets, buffer)

    def pwrite_many(self, offsets: Sequence[int], data: Any) -> int:
        """Writes one piece per byte offset, all in flight together, in no order among themselves; see pread_many."""
        return self._many(True, offsets, data)

    def _many(self, write: bool, offsets: Sequence[int], buffer: Any) -> int:
        self._span(0, 0)
        if any(offset % BLOCK for offset in offsets):
            raise UsageError(f"an offset is a multiple of {BLOCK} here", value=[o for o in offsets if o % BLOCK][0])
        with memoryview(buffer) as raw, raw.cast("B") as view:
            self.client.scattered(write, [offset // BLOCK for offset in offsets], view)
            return len(view)

    def flush(self) -> None:
        """Returns when every write that returned before is durable in the store. Raises OSError."""
        self._span(0, 0)
        self.client.sync()

    def status(self) -> dict[str, Any]:
        """What `muenfast stat` shows."""
        return {"role": "client", "req": self.channels.req.text, "resp": self.channels.resp.text, "size": self.size,
                "state": self.client.state, "failure": self._failure, "in_flight": self.client.in_flight,
                "counters": self.client.counters}

    def fail(self, why: str) -> None:
        """Ends the device for good: everything outstanding and to come fails with EIO (a front end must go)."""
        if self._failure is None:
            self._give_up(why)

    def close(self) -> None:
        """Leaves: outstanding requests of other threads fail. No front end may still stand on it."""
        self._stop.set()
        while self._thread.is_alive():
            self.client.stop()
            self._thread.join(0.05)
        self.client.close()
        self._close_ends()

    def __enter__(self) -> BlockDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BlockDevice {self.channels.name} {self.client.state} {os.getpid()}>"


class AttachedDisk:
    """A BlockDevice and the front end on top; made by BlockClients."""

    def __init__(self, device: BlockDevice, attach: str) -> None:
        self.device = device
        self.front: Any = None
        self.attach = attach

    @property
    def path(self) -> str:
        """The device node, "-" without a front end."""
        return "-" if self.front is None else str(self.front.device)


ATTACHMENTS = ("auto", "fuse", "none")


class BlockClients(_Group):
    """Several disks in one process, as /dev/muendiskX in the order of the list; attached when ready() returns True."""

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
        self.disks: list[AttachedDisk] = []
        with ExitStack() as stack:
            for entry in channels:
                device = BlockDevice(channels=entry, timeout=0, on_peer_loss=on_peer_loss or OnPeerLoss(),
                                     same_store=same_store)
                stack.callback(device.close)
                self.disks.append(AttachedDisk(device, attach))
            self._stack = stack.pop_all()

    def ready(self, wait: Callable[[], bool]) -> bool:
        """Waits for every server, then makes all devices appear. wait: called while waiting, False gives up.

        Raises UsageError, ClaimError, OSError, PeerError; devices made by then are taken away by close().
        """
        patience = time.monotonic() + _WAIT_SILENTLY
        for disk in self.disks:
            while not disk.device.wait_ready(0.1):
                if time.monotonic() > patience:
                    patience = math.inf
                    log.warning("disk %s: waiting for the server", disk.device.channels.name)
                if disk.device.failure is not None:
                    raise PeerError(disk.device.channels.resp.text, "size", disk.device.failure, "a disk")
                if not wait():
                    return False
        if self.attach != "none":
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
                disk.front = fuse.FuseAttachment.attach(disk.device.client, name, shm.runtime_dir())
            except FileExistsError:  # a device of somebody else, of the kernel's own module perhaps
                claim.release()
                continue
            except BaseException:
                claim.release()
                raise
            break
        self._stack.callback(claim.release)
        self._stack.callback(self._detach, disk)
        log.info("disk %s: attached as %s", disk.device.channels.name, disk.front.device)

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

    def finished(self) -> bool:
        """Whether every server ended its export for good."""
        return all(disk.device.gone for disk in self.disks)

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


_WAIT_SILENTLY = 2.0  # seconds for a server to answer before the wait is said
_DETACH_PATIENCE = 2.0  # seconds a server has to take what is still dirty
_DETACH_LIMIT = 4.0
