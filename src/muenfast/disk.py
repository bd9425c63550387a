"""The using side: a disk at the other end of a block connection."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import index
from typing import Any

from muenfast import shm
from muenfast._client import Client
from muenfast._ring import Watch
from muenfast.connection import BLOCK, Channels, channels_from_lists
from muenfast.errors import BrokenChannelError, MuenfastError, PeerError, PeerLog, UsageError

log = logging.getLogger("muenfast")

_TICK = 0.2  # seconds between looks at names, claims and policies
_PER_LOOK = 5  # ticks between looks at the server's claim while nothing is asked


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
    that a server which announces no or another identity still has the same data. depth: most blocks in flight, 1 to
    1024; None: it adapts. watch: polls for this disk while it is idle. req_protocol to bells: as `channels_from_lists`.

    All methods may be called from any number of threads; requests of several threads are in flight together.
    Raises TimeoutError when no server answers, PeerError when what answers is none, ClaimError, UsageError, OSError.
    """

    block_size = BLOCK

    def __init__(self, req: str | None = None, resp: str | None = None, *, channels: Channels | None = None,
                 timeout: float | None = 10.0, on_peer_loss: str | OnPeerLoss = "queue",
                 same_store: bool = False, depth: int | None = None, watch: Watch | None = None,
                 req_protocol: str | None = None, resp_protocol: str | None = None, size: str | None = None,
                 poll: int | None = None, bells: bool = True) -> None:
        if channels is None:
            if req is None or resp is None:
                raise UsageError("a block device needs a request and a response channel")
            (channels,) = channels_from_lists(req, resp, req_protocol=req_protocol, resp_protocol=resp_protocol,
                                              size=size, poll=poll, bells=bells)
        self.channels = channels
        self._policy = OnPeerLoss.parse(on_peer_loss, "on_peer_loss") if isinstance(on_peer_loss, str) else on_peer_loss
        self._same_store = same_store
        self._watch = watch
        self._depth = depth
        self._store: bytes | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._gone = False
        self._failure: str | None = None
        self._rmw = threading.Lock()
        self._complaint = ""
        self._peer = PeerLog(f"disk {self.channels.name}")
        self._returns = PeerLog(f"disk {self.channels.name}")   # a loss just before does not keep one of them back
        self._broken = False
        self.read_only = False  # as the server says, once it has answered
        self._closing = threading.RLock()
        self._closed = False
        self._dead = False  # whether the server died without a word: its claim is free, its epoch stands
        self._known = False  # whether the server's claim was ever seen held
        self._open()
        self._thread = threading.Thread(target=self._run, name=f"disk {channels.name}", daemon=True)
        try:
            self._thread.start()
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
                response_bell=self._ends[1].bell_view, poll=channels.poll, fail_fast=self._policy.mode == "fail",
                watch=self._watch)
            if self._depth is not None:
                self.client.depth = self._depth
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
        ticks = 0
        while not self._stop.is_set():
            state = self.client.run(_TICK)
            now = time.monotonic()
            if state == "answered":
                if self._answered():
                    lost_since, self._dead = 0.0, False
            elif state == "lost":
                if not lost_since:
                    lost_since = now
                    if not self._dead:
                        self._peer.warning("the server is gone%s", self._meanwhile())
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
                    stuck_since, self._dead = 0.0, False
                    continue
                self._look(gone=False)
                ticks += 1
                if self.client.state != "ready" or (ticks % _PER_LOOK and not self.client.in_flight):
                    continue
                if self._server_died():
                    if not self._dead:
                        self._dead = True
                        self._peer.warning("the server is gone%s", self._meanwhile())
                    if self._policy.mode == "fail":
                        self.client.fail(forever=False)
                    elif self._policy.mode == "timeout":
                        stuck_since = (stuck_since or now) if self.client.in_flight else 0.0
                        if stuck_since and now - stuck_since > self._policy.seconds:
                            self.client.fail(forever=False)
                            stuck_since = 0.0
                elif self._policy.mode == "queue":
                    continue
                elif self._policy.mode == "timeout" and self.client.in_flight:
                    stuck_since = stuck_since or now
                    if now - stuck_since > self._policy.seconds:
                        self._peer.warning("no answer for %g s", self._policy.seconds)
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
        header = self.client.incompatible
        return None if header is None else self.channels.misfit(False, header)

    def _complain(self, text: str) -> None:
        """Says once what stands in the way of a connection."""
        if text != self._complaint:
            self._complaint = text
            self._peer.warning("waiting: %s", text)

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
            self._server_died()  # sees that its claim is held, if it is one that claims
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
            self._returns.warning("the server is back, %d requests issued again",
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
            self._peer.warning("%s", BrokenChannelError(self._ends[broken == "response"].locator.text))
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

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from byte `offset` on. Raises UsageError (beyond the disk), OSError."""
        data: bytes | None = self.client.read(length, offset)
        return self._around(length, offset) if data is None else data

    def pread_into(self, buffer: Any, offset: int) -> int:
        """Fills a writable buffer from byte `offset` on; returns its length. Whole blocks are not copied twice."""
        moved = int(self.client.move(False, offset, buffer))
        if moved < 0:
            with memoryview(buffer) as raw, raw.cast("B") as view:
                moved = len(view)
                view[:] = self._around(moved, offset)
        return moved

    def _around(self, length: int, offset: int) -> bytes:
        """By way of the whole blocks that hold them."""
        length, offset = index(length), index(offset)   # numpy's numbers wrap
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        whole = bytearray((last - first + 1) * BLOCK)
        self.client.move(False, first * BLOCK, whole)
        with memoryview(whole) as view:
            return bytes(view[offset - first * BLOCK:][:length])

    def pwrite(self, data: Any, offset: int) -> int:
        """Writes a buffer from byte `offset` on; returns its length. On return the server's store has it; flush()
        makes it durable. Blocks written in part are read first; such writes of one BlockDevice do not mix.

        Raises UsageError (beyond the disk), OSError.
        """
        moved = int(self.client.move(True, offset, data))
        if moved < 0:
            with memoryview(data) as raw, raw.cast("B") as view:
                moved, offset = len(view), index(offset)
                first, last = offset // BLOCK, (offset + moved - 1) // BLOCK
                whole = bytearray((last - first + 1) * BLOCK)
                with self._rmw, memoryview(whole) as target:
                    self.client.move(False, first * BLOCK, target[:BLOCK])
                    if last != first:
                        self.client.move(False, last * BLOCK, target[-BLOCK:])
                    start = offset - first * BLOCK
                    target[start:start + moved] = view
                    self.client.move(True, first * BLOCK, target)
        return moved

    def pread_many(self, offsets: Sequence[int], buffer: Any) -> int:
        """Reads one piece per byte offset, all in flight together; the buffer's equal pieces receive them in order.

        Offsets and pieces are multiples of 4096 bytes. Returns the bytes read. Raises UsageError, OSError.
        """
        return int(self.client.scattered(False, offsets, buffer))

    def pwrite_many(self, offsets: Sequence[int], data: Any) -> int:
        """Writes one piece per byte offset, all in flight together, in no order among themselves; see pread_many."""
        return int(self.client.scattered(True, offsets, data))

    def flush(self) -> None:
        """Returns when every write that returned before is durable in the store. Raises OSError, UsageError (closed)."""
        self.client.sync()

    def status(self) -> dict[str, Any]:
        """What `muenfast stat` shows."""
        return {"role": "client", "req": self.channels.req.text, "resp": self.channels.resp.text, "size": self.size,
                "state": "lost" if self._dead and self.client.state == "ready" else self.client.state,
                "read_only": bool(self.client.read_only), "failure": self._failure, "in_flight": self.client.in_flight,
                "counters": self.client.counters}

    def fail(self, why: str) -> None:
        """Ends the device for good: everything outstanding and to come fails with EIO (a front end must go)."""
        if self._failure is None:
            self._give_up(why)

    def close(self) -> None:
        """Leaves: outstanding requests of other threads fail. No front end may still stand on it."""
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

    def __enter__(self) -> BlockDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BlockDevice {self.channels.name} {self.client.state} {os.getpid()}>"
