"""The using side: disks at the other end of a block connection."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from muenfast import shm
from muenfast._bufclient import BufferClient
from muenfast._client import Client, Disk
from muenfast._ring import Watch
from muenfast.channel import End
from muenfast.connection import BLOCK, IN_PYTHON, Channels, channels_from_lists
from muenfast.cpus import pin
from muenfast.errors import BrokenChannelError, MuenfastError, Offences, PeerError, PeerLog, UsageError
from muenfast.lookout import UNTOLD, Pace

log = logging.getLogger("muenfast")

_CLAIM = 0.9  # seconds between looks at the server's claim while nothing is asked
_SILENCE = 5.0  # seconds without an answer before that is said, where no policy names another time
_BACK_AT_ONCE = 1.0  # seconds that a server has for another size, or to begin, before its absence is said
_ENDS = ("request", "response", "buffer")  # what Channels.open returns, and engines call them

# Connection.state, as `muenfast stat` shows it (docs/operations.md).
STATES = ("connecting", "ready", "lost", "stuck", "failed", "gone", "closed")


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
            raise UsageError("what to do without a server is queue, fail or timeout:SECONDS, more than 0 and below a "
                             "million", option=option, value=text)
        return cls("timeout", seconds)


class Connection:
    """The using side of one connection, and the thread that looks after it. Its disks are BlockDevices.

    channels: where. wants: number of a disk that must be there. cpu: its thread is pinned to. The rest: as BlockDevice,
    which most programs need only.
    resized: called by its thread once disks have another size; must not wait.
    """

    client: Client | BufferClient

    def __init__(self, channels: Channels, *, timeout: float | None = 10.0, on_peer_loss: OnPeerLoss | None = None,
                 same_store: bool = False, depth: int | None = None, watch: Watch | None = None,
                 wants: int = 0, cpu: int | None = None) -> None:
        self.channels, self.cpu = channels, cpu
        self._policy = on_peer_loss or OnPeerLoss()
        self._same_store = same_store
        self._watch = watch
        self._depth = depth
        self._wants = wants
        self.resized: Callable[[], None] | None = None
        self._geometry: tuple[tuple[int, int], ...] = ()
        self._store: bytes | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._gone = False
        self._failure: str | None = None
        self._complaint = ""
        self._peer = PeerLog(f"disk {self.channels.name}")
        self._returns = PeerLog(f"disk {self.channels.name}")   # a loss just before does not keep one of them back
        self._silence = PeerLog(f"disk {self.channels.name}")
        self._offences = Offences(f"disk {self.channels.name}", self.channels.resp.text)
        self._broken = False
        self._closing = threading.RLock()
        self._closed = False
        self._dead = False  # whether the server died without a word: its claim is free, its epoch stands
        self._known = False  # whether the server's claim was ever seen held
        self._holder: tuple[Any, Any] | None = None  # by whom it was when last looked at: process, and since when
        self._answerer: tuple[Any, Any] | None = None  # and when it answered last
        self._stuck = False  # whether a server that lives gives no answer
        self._untold = ""  # what a lost server says of itself, while that is believed and not said
        self._told = False  # whether it was said that the server is gone
        self._open()
        self._thread = threading.Thread(target=self._run, name=f"disk {channels.name}", daemon=True)
        try:
            self._thread.start()
            if timeout != 0 and not self.wait_ready(timeout):
                if self._failure is not None:
                    raise self.refused()
                if (wrong := self._incompatible()) is not None:
                    raise wrong
                raise TimeoutError(errno.ETIMEDOUT, f"disk {channels.name}: {self.unanswered(timeout or 0.0)}")
        except BaseException:
            self.close()
            raise

    # -------------------------------------------------------------- life

    def _open(self) -> None:
        channels = self.channels
        self._ends = channels.open(serving=False)
        options: dict[str, Any] = {
            "request_protocol": channels.req_protocol, "response_protocol": channels.resp_protocol,
            "request_bell": self._ends[0].bell_view, "response_bell": self._ends[1].bell_view, "poll": channels.poll,
            "fail_fast": self._policy.mode == "fail", "watch": self._watch, "checksum": channels.checksum}
        try:
            if channels.buffer is None:
                self.client = Client(self._ends[0].view, self._ends[1].view, **options)
            else:
                self.client = BufferClient(*(end.view for end in self._ends), **options)
            self.client.conduct.patience = channels.patience
            if self._depth is not None:
                self.client.depth = self._depth
        except BaseException:
            self._close_ends()
            raise

    def _rebind(self, ends: Sequence[End]) -> None:
        """Goes on in the memory of other ends."""
        bells = {"request_bell": ends[0].bell_view, "response_bell": ends[1].bell_view}
        if isinstance(self.client, Client):
            self.client.rebind(ends[0].view, ends[1].view, **bells)
        else:
            self.client.rebind(ends[0].view, ends[1].view, ends[2].view, **bells)

    def _close_ends(self) -> None:
        for end in self._ends:
            end.close()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Waits until the server answered, seconds or without end; whether it did. False at once when the connection is
        closed or has failed."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._ready.is_set():
            left = 0.05 if end is None else min(0.05, end - time.monotonic())
            if left <= 0 or self._stop.is_set() or self._failure is not None:
                return False
            self._ready.wait(left)
        return True

    def unanswered(self, seconds: float) -> str:
        """What to say where no server answered for so long. Raises OSError."""
        return self.channels.unanswered(seconds, shm.writer_holder(self._ends[1].region))

    def _run(self) -> None:
        try:
            pin(self.cpu, f"disk {self.channels.name}")
            self._follow()
        except BaseException as error:  # without this thread every request would wait for ever
            log.exception("disk %s", self.channels.name)
            self._give_up(f"its thread ended: {error!r}")

    def _follow(self) -> None:
        lost_since = stuck_since = 0.0
        progress = -1
        looked = 0.0
        pace = Pace(True, UNTOLD)
        while not self._stop.is_set():
            state = self.client.run(pace.seconds)
            pace.looked(state == "ready" and not self.client.in_flight and self.client.progress == progress)
            now = time.monotonic()
            self._offences.look(self.client.conduct)
            if state == "answered":
                if self._answered():
                    lost_since, self._dead, self._stuck = 0.0, False, False
            elif state == "lost":
                if self._stuck and (self._server_died() or not self._known and not self.client.server_active):
                    self._stuck, lost_since = False, 0.0
                if not lost_since:
                    lost_since = now
                    if not self._dead and not self._stuck:
                        self._untold = self._tells()
                        if not self._untold:
                            self._warn_gone()
                    if self._policy.mode == "fail":
                        self.client.fail(forever=False)
                elif self._untold and (now - lost_since > _BACK_AT_ONCE or self._server_died()):
                    self._say_gone()
                if self.client.server_state == "gone":
                    self._gone, self._untold = True, ""
                    self._give_up("the server destroyed the export")
                elif self._policy.mode == "timeout" and now - lost_since > self._policy.seconds:
                    self.client.fail(forever=False)
                    lost_since = now
            elif state == "ready":
                before, progress = progress, self.client.progress
                if progress != before:
                    if self._stuck:
                        self._returns.warning("the server answers again")
                    stuck_since, self._dead, self._stuck = 0.0, False, False
                    continue
                self._look(gone=False)
                if self.client.state != "ready" or not self.client.in_flight and now - looked < _CLAIM:
                    continue
                looked = now
                if self.client.in_flight:
                    stuck_since = stuck_since or now
                else:
                    stuck_since, self._stuck = 0.0, False
                if self._server_died():
                    if not self._dead:
                        self._dead, self._stuck = True, False
                        self._warn_gone()
                    if self._policy.mode == "fail":
                        self.client.fail(forever=False)
                elif self._policy.mode == "fail" and self.client.broken:    # it lives, and cannot hear us, or we it
                    self.client.fail(forever=False)
                silent = now - stuck_since if stuck_since else 0.0
                if self._policy.mode == "timeout":
                    if silent > self._policy.seconds:
                        if not self._dead:
                            self._stuck = True
                            self._silence.warning("no answer for %g s: requests fail until the server answers",
                                                  self._policy.seconds)
                        self.client.fail(forever=False)
                        stuck_since = 0.0
                elif silent > _SILENCE and not self._stuck and not self._dead:
                    self._stuck = True
                    self._silence.warning("no answer for %g s, requests wait: the server lives", _SILENCE)
            if state in ("connecting", "lost") or self.client.broken:
                if (wrong := self._incompatible()) is not None:
                    self._complain(str(wrong))
                self._look(gone=not self.client.server_active)

    def _incompatible(self) -> PeerError | None:
        """What is wrong with a response channel that was refused, or with us."""
        if self.checksum == "refused":
            return self.channels.demanded()
        header = self.client.incompatible
        return None if header is None else self.channels.misfit(False, header)

    @property
    def checksum(self) -> str:
        """Whether requests and answers have checksums: CHECKSUM of _engine."""
        return self.client.checksum

    @property
    def _unchecked(self) -> bool:
        """Whether the server that answered has no checksums, which are required."""
        return self.channels.checksum == "require" and self.checksum != "agreed"

    def _complain(self, text: str) -> None:
        """Says once what stands in the way of a connection."""
        if text != self._complaint:
            self._complaint = text
            self._peer.warning("waiting: %s", text)

    def refused(self) -> PeerError:
        """What to raise where what answered is no disk that can be used. Precondition: there is a `failure`."""
        buffer = self.channels.buffer
        if buffer is not None and self._foreign():
            return PeerError(buffer.text, "content", "what this side left there",
                             f"what the server reads: name the same buffer on both sides ({self.channels.options.buffer})")
        if self._unchecked:
            return PeerError(self.channels.resp.text, "checksum", self._failure, "one in each answer",
                             hint=f"{self.channels.options.checksum} auto does without where the server has none")
        field, expected = ("size", "a disk") if buffer is None else ("geometry", "disks")
        return PeerError(self.channels.resp.text, field, self._failure, expected)

    def _foreign(self) -> bool:
        """Whether the server that answered uses another buffer than this side."""
        return isinstance(self.client, BufferClient) and self.client.foreign

    def _misshapen(self) -> str | None:
        """What is wrong with the geometry that was answered."""
        geometry = self.client.geometry
        if not geometry and isinstance(self.client, BufferClient):
            return f"the server's connection has {self.client.devices} disks, not 1 to 256"
        for number, (blocks, length) in enumerate(geometry):
            which = "the server's disk" if len(geometry) == 1 else f"the server's disk {number}"
            if length not in (512, BLOCK):
                return f"{which} has blocks of {length} bytes, not of 512 or {BLOCK}"
            if blocks == 0:
                return f"{which} has no block"
            if blocks >= (1 << 63) // length:
                return f"{which} has {blocks} blocks of {length} bytes, which nothing can address"
        if self._wants >= len(geometry):
            return f"the connection has no disk number {self._wants}: they are 0 to {len(geometry) - 1}"
        return None

    def _answered(self) -> bool:
        """The server named its disks: issue again if they are the same, else fail for good.

        False when it has gone meanwhile.
        """
        geometry, store = self.client.geometry, self.client.store
        unchecked = "the server has no checksums" if self._unchecked else None
        if not self._ready.is_set():
            wrong = unchecked or self._misshapen() or ("the server uses another buffer" if self._foreign() else None)
            if wrong is not None:
                self._give_up(wrong)
                return True
            if not self.client.resume():
                return False
            self._server_died()  # sees who holds its claim, if it is one that claims
            self._answerer = self._holder
            self._store, self._geometry = store, geometry
            self._ready.set()
            log.info("disk %s: connected, %s bytes", self.channels.name,
                     ", ".join(str(blocks * length) for blocks, length in geometry))
            return True
        proven = store is not None and store == self._store
        same = self._same_store or proven
        resized = geometry != self._geometry
        wrong = None
        if unchecked is not None:
            wrong = "the server returned without checksums, which are required"
        elif resized and not (proven and self._grown(geometry)):
            wrong = f"the server returned with {_described(geometry)} instead of {_described(self._geometry)}"
        elif self._foreign():
            wrong = "the server returned with another buffer: name the same one on both sides"
        elif not same:
            wrong = ("the server returned with another store" if store is not None else
                     "the server that returned does not say which store it has (--same-store trusts it)")
        if wrong is not None:
            self._say_gone()
            self._give_up(wrong)
            return True
        before = self.client.counters["reissued"]
        if not self.client.resume(resized=resized):
            return False
        again, old, self._geometry = self.client.counters["reissued"] - before, self._geometry, geometry
        self._server_died()
        stayed = self._holder is not None and self._holder == self._answerer    # it was away for a size only, or two
        self._answerer = self._holder
        if not resized and not stayed:
            self._say_gone()
        if self._told or self._stuck or not resized and not stayed:
            self._returns.warning("the server is back, %d requests issued again", again)
        self._told, self._untold = False, ""
        if resized:
            self._say_sizes(old)
            if self.resized is not None:
                self.resized()
        return True

    def _grown(self, geometry: tuple[tuple[int, int], ...]) -> bool:
        """Whether that can be the same disks with other numbers of blocks."""
        return (self._misshapen() is None
                and [length for _, length in geometry] == [length for _, length in self._geometry])

    def _give_up(self, why: str) -> None:
        self._failure = why
        log.error("disk %s: %s: every request fails from now on", self.channels.name, why)
        self.client.fail(forever=True)

    def _tells(self) -> str:
        """What a server that has left says of itself, where it lives and is back at once ("resizing"), is there again
        already ("serving"), or is away for good ("gone"); else ""."""
        state = self.client.server_state
        return state if state == "gone" or state in ("serving", "resizing") and not self._server_died() else ""

    def _say_gone(self) -> None:
        """Says what was kept back, for nothing else tells it."""
        if self._untold:
            self._untold = ""
            self._warn_gone()

    def _warn_gone(self) -> None:
        self._told = True
        self._peer.warning("the server is gone%s", self._meanwhile())

    def _say_sizes(self, before: tuple[tuple[int, int], ...]) -> None:
        """Says each new size: somebody wanted it, and it is not limited as what a peer provokes."""
        for number, (now, old) in enumerate(zip(self._geometry, before, strict=True)):
            if now != old:
                log.warning("disk %s%s: new size %d bytes", self.channels.name,
                            "" if len(before) == 1 else f", number {number}", now[0] * now[1])

    def _meanwhile(self) -> str:
        return {"queue": ", requests wait for its return", "fail": ", requests fail until it returns",
                "timeout": f", requests fail after {self._policy.seconds:g} s"}[self._policy.mode]

    def _server_died(self) -> bool:
        """Whether the writer's claim on the response channel is free although it once was held."""
        try:
            holder = shm.writer_holder(self._ends[1].region)
        except OSError as error:
            self._complain(f"cannot see whether its server lives: {error}")
            return False
        self._holder = None if holder is None else (holder["pid"], holder["since"])
        self._known = self._known or holder is not None
        return self._known and holder is None

    def _look(self, gone: bool) -> None:
        """Follows the channels' memory, as Export._look does. gone: whether no server is there; an active response
        channel may be a dead server's: then we follow only where a name means another region by now."""
        broken = self.client.broken
        if broken and not self._broken:
            self._broken = True
            self._peer.warning("%s", BrokenChannelError(self._ends[_ENDS.index(broken)].locator.text))
        try:
            stale = [end for end in self._ends if end.replaced()]
            if broken and not stale:
                if all(end.remap() for end in self._ends):
                    self._rebind(self._ends)
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
                self._rebind(fresh)
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
    def ready(self) -> bool:
        """Whether the server answered once, and could be used."""
        return self._ready.is_set()

    @property
    def gone(self) -> bool:
        """Whether the server ended this export for good."""
        return self._gone

    @property
    def failure(self) -> str | None:
        """Why every request fails, None while the connection works."""
        return self._failure

    @property
    def state(self) -> str:
        """One of STATES. "lost": the server is gone, or dead by its claim; "stuck": it lives and does not answer; "failed"
        or "gone": for good."""
        state = self.client.state
        if state == "failed" and self._gone:
            return "gone"
        if state in ("ready", "lost") and (self._dead or self._stuck):
            return "lost" if self._dead else "stuck"
        return state

    def fail(self, why: str) -> None:
        """Ends the disks for good: everything outstanding and to come fails with EIO (a front end must go)."""
        if self._failure is None:
            self._give_up(why)

    def close(self) -> None:
        """Leaves: outstanding requests of other threads fail. No front end may still stand on a disk."""
        self._stop.set()
        with self._closing:     # the second thread that closes it waits for the first
            if self._closed:
                return
            while self._thread.is_alive():
                self.client.stop()
                self._thread.join(0.05)
            self.client.close()
            self._close_ends()
            self._closed = True


def _described(geometry: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{blocks} blocks of {length} bytes" for blocks, length in geometry) or "no disk"


_CALLED = replace(IN_PYTHON, buffer="shm", buffer_size="shm_size")


class BlockDevice:
    """A disk at the other side of two channels.

        with muenfast.BlockDevice(req="a", resp="c") as disk:
            disk.pwrite(b"hello", 0)
            disk.flush()
            assert disk.pread(5, 0) == b"hello"

    req, resp: locators (or channels: a parsed Channels). shm: of the buffer, for a connection with a shared buffer.
    device: number of the disk there. timeout: seconds to wait for the server, None: no end.
    on_peer_loss: "queue" (requests wait for the server's return), "fail" or "timeout:SECONDS". same_store: believe
    that a server which announces no or another identity still has the same data. depth: most requests of one disk in
    flight (inline: of one block each), 1 to 1024; None: it adapts. watch: polls for this disk while it is idle.
    connection: another disk's `connection`, which stays that one's; what it was made with counts, and device.
    req_protocol to checksum: as `channels_from_lists`.

    All methods may be called from any number of threads; requests of several threads are in flight together.
    Raises TimeoutError when no server answers, PeerError when what answers is none, ClaimError, UsageError, OSError.
    """

    def __init__(self, req: str | None = None, resp: str | None = None, *, channels: Channels | None = None,
                 timeout: float | None = 10.0, on_peer_loss: str | OnPeerLoss = "queue",
                 same_store: bool = False, depth: int | None = None, watch: Watch | None = None,
                 req_protocol: str | None = None, resp_protocol: str | None = None, size: str | None = None,
                 poll: int | None = None, bells: bool = True, shm: str | None = None, shm_size: str | None = None,
                 checksum: str = "off", device: int = 0, connection: Connection | None = None) -> None:
        if not isinstance(device, int) or device < 0:
            raise UsageError("disks of a connection are numbered from 0", option="device", value=device)
        self.device = device
        self._disk: Disk | None = None
        self._own = connection is None
        self._rmw = threading.Lock()
        if connection is None:
            if channels is None:
                if req is None or resp is None:
                    raise UsageError("a block device needs a request and a response channel", hint="BlockDevice(req, resp)")
                (channels,) = channels_from_lists(req, resp, req_protocol=req_protocol, resp_protocol=resp_protocol,
                                                  size=size, poll=poll, bells=bells, buffer=shm, buffer_size=shm_size,
                                                  checksum=checksum, options=_CALLED)
            if isinstance(on_peer_loss, str):
                on_peer_loss = OnPeerLoss.parse(on_peer_loss, "on_peer_loss")
            if device and channels.buffer is None:
                raise UsageError("inline channels carry one disk, number 0", option="device", value=device)
            connection = Connection(channels, timeout=timeout, on_peer_loss=on_peer_loss, same_store=same_store,
                                    depth=depth, watch=watch, wants=device)
        elif any(given is not None for given in (req, resp, channels, shm)):
            raise UsageError("a connection that stands has its channels already", option="connection", value=connection)
        elif connection.ready and device >= len(connection.client.disks):
            raise UsageError(f"the connection has no disk number {device}: they are 0 to "
                             f"{len(connection.client.disks) - 1}", option="device", value=device)
        self.connection = connection

    # -------------------------------------------------------------- life

    @property
    def channels(self) -> Channels:
        """Where its connection is."""
        return self.connection.channels

    @property
    def client(self) -> Client | BufferClient:
        """The connection's engine."""
        return self.connection.client

    @property
    def target(self) -> Disk:
        """What front ends stand on. Raises UsageError where it is not known yet, before the server's first answer; OSError
        where there will be none."""
        disks = self.connection.client.disks
        if self.device >= len(disks):
            if self.failure is not None:
                raise OSError(errno.EIO, self.failure)
            raise UsageError(f"the server of {self.channels.name} has not answered: no disk number {self.device} is known")
        self._disk = disks[self.device]
        return self._disk

    @property
    def block_size(self) -> int:
        """Bytes of a block: what begins and ends at multiples of it moves without a copy of its own."""
        return int((self._disk or self.target).block_size)

    @property
    def read_only(self) -> bool:
        """Whether the server says that it refuses writes."""
        return bool((self._disk or self.target).read_only)

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Waits until the server has answered, for `timeout` seconds or (None) without end; whether it did. False at once
        where the device is closed or has failed."""
        return self.connection.wait_ready(timeout)

    # -------------------------------------------------------------- use

    @property
    def size(self) -> int:
        """Bytes of the disk, 0 before the server answered."""
        disks = self.client.disks
        return int(disks[self.device].nblocks * disks[self.device].block_size) if self.device < len(disks) else 0

    @property
    def gone(self) -> bool:
        """Whether the server ended this export for good."""
        return self.connection.gone

    @property
    def failure(self) -> str | None:
        """Why every request fails, None while the device works."""
        return self.connection.failure

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from byte `offset` on. Raises UsageError (beyond the disk), OSError."""
        data: bytes | None = (self._disk or self.target).read(length, offset)
        return self._around(length, offset) if data is None else data

    def pread_into(self, buffer: Any, offset: int) -> int:
        """Fills a writable buffer from byte `offset` on; returns its length. Whole blocks are not copied twice."""
        moved = int((self._disk or self.target).move(False, offset, buffer))
        if moved < 0:
            with memoryview(buffer) as raw, raw.cast("B") as view:
                moved = len(view)
                view[:] = self._around(moved, offset)
        return moved

    def _around(self, length: int, offset: int) -> bytes:
        """By way of the whole blocks that hold them."""
        length, offset, size = index(length), index(offset), self.block_size    # numpy's numbers wrap
        first, last = offset // size, (offset + length - 1) // size
        whole = bytearray((last - first + 1) * size)
        self.target.move(False, first * size, whole)
        with memoryview(whole) as view:
            return bytes(view[offset - first * size:][:length])

    def pwrite(self, data: Any, offset: int) -> int:
        """Writes a buffer from byte `offset` on; returns its length. On return the server's store has it; flush()
        makes it durable. Blocks written in part are read first; such writes of one BlockDevice do not mix.

        Raises UsageError (beyond the disk), OSError.
        """
        disk = self._disk or self.target
        moved = int(disk.move(True, offset, data))
        if moved < 0:
            with memoryview(data) as raw, raw.cast("B") as view:
                moved, offset, size = len(view), index(offset), int(disk.block_size)
                first, last = offset // size, (offset + moved - 1) // size
                whole = bytearray((last - first + 1) * size)
                with self._rmw, memoryview(whole) as target:
                    disk.move(False, first * size, target[:size])
                    if last != first:
                        disk.move(False, last * size, target[-size:])
                    start = offset - first * size
                    target[start:start + moved] = view
                    disk.move(True, first * size, target)
        return moved

    def pread_many(self, offsets: Sequence[int], buffer: Any) -> int:
        """Reads one piece per byte offset, all in flight together; the buffer's equal pieces receive them in order.

        Offsets and pieces are multiples of block_size. Returns the bytes read. Raises UsageError, OSError.
        """
        return int((self._disk or self.target).scattered(False, offsets, buffer))

    def pwrite_many(self, offsets: Sequence[int], data: Any) -> int:
        """Writes one piece per byte offset, all in flight together, in no order among themselves; see pread_many."""
        return int((self._disk or self.target).scattered(True, offsets, data))

    def discard(self, offset: int, length: int, *, zero: bool = False) -> None:
        """Frees `length` bytes from byte `offset` on, multiples of block_size: their contents no longer matter; zero: they
        read as zeros from then on. Raises UsageError (inline channels cannot express it), OSError (the store cannot)."""
        (self._disk or self.target).discard(length, offset, zero=zero)

    def flush(self) -> None:
        """Returns when every write that returned before is durable in the store. Raises OSError, UsageError (closed)."""
        (self._disk or self.target).sync()

    def status(self) -> dict[str, Any]:
        """What `muenfast stat` shows."""
        channels, disks = self.channels, self.client.disks
        disk = disks[self.device] if self.device < len(disks) else None
        found: dict[str, Any] = {
            "role": "client", "req": channels.req.text, "resp": channels.resp.text, "size": self.size,
            "state": self.connection.state, "cpu": self.connection.cpu,
            "read_only": disk is not None and self.read_only, "failure": self.failure,
            "in_flight": 0 if disk is None else disk.in_flight,
            "checksum": self.connection.checksum, "offences": self.client.conduct.offences,
            "counters": self.client.counters | (disk.counters if disk is not None else {}),
            "devices": [] if disk is None else [
                {"number": self.device, "size": self.size, "block_size": disk.block_size, "directions": disk.directions}]}
        if channels.buffer is not None:
            found |= {"shm": channels.buffer.text, "number": self.device,
                      "block_size": None if disk is None else disk.block_size}
        return found

    def fail(self, why: str) -> None:
        """Ends the device for good, and every other one of its connection: all requests, outstanding or to come, fail with
        EIO. why: what `failure` says from then on."""
        self.connection.fail(why)

    def close(self) -> None:
        """Leaves, where the connection is its own: outstanding requests of other threads fail, and no front end may still
        stand on it."""
        if self._own:
            self.connection.close()

    def __enter__(self) -> BlockDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BlockDevice {self.channels.name} {self.client.state} {os.getpid()}>"
