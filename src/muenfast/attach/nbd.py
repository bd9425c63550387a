"""A disk as an NBD export on Unix sockets: negotiation and life cycle; data moves in _nbd.pyx.

Names and numbers are those of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md). Negotiation is fixed newstyle,
without TLS. One thread per disk negotiates with any number of clients side by side, and never waits for one; one
serves those that are through.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from muenfast.attach._nbd import NbdDisk
from muenfast.attach.sockets import Listener
from muenfast.errors import PeerLog, UsageError
from muenfast.threads import spawn

if TYPE_CHECKING:
    from muenfast._target import Target

log = logging.getLogger("muenfast")

CONNECTIONS = 64  # of one disk at a time, those that negotiate included
NEGOTIATION = 30.0  # seconds a client may take to choose its export
MOST_OPTIONS = 64  # that it may send until then
MOST_DATA = 16384  # bytes of one option; a name has 4096 at most
MOST_SKIPPED = 1 << 20  # bytes of an option that is refused as too big; beyond that the client is
_NAME_MAX = 4096  # bytes of a string
PREFERRED = 4096  # bytes: smaller or unaligned writes read blocks first
MAX_LENGTH: int = NbdDisk.max_length
_PAUSE = 1.0  # seconds without accept() while there is no descriptor for another connection
_AFTER_STOP = 1.0  # seconds for what must end by itself once nobody is waited for

_INIT_PASSWD, _IHAVEOPT, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_FLAG_FIXED_NEWSTYLE, _FLAG_NO_ZEROES = 1, 2
_OPT_EXPORT_NAME, _OPT_ABORT, _OPT_LIST, _OPT_STARTTLS, _OPT_INFO, _OPT_GO, _OPT_STRUCTURED_REPLY = 1, 2, 3, 5, 6, 7, 8
_REP_ACK, _REP_SERVER, _REP_INFO = 1, 2, 3
_ERR = 1 << 31
_ERR_UNSUP, _ERR_INVALID, _ERR_UNKNOWN, _ERR_TOO_BIG = _ERR + 1, _ERR + 3, _ERR + 6, _ERR + 9
_INFO_EXPORT, _INFO_NAME, _INFO_DESCRIPTION, _INFO_BLOCK_SIZE = 0, 1, 2, 3
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1 << 0, 1 << 1, 1 << 2, 1 << 3
SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF = 1 << 5, 1 << 6, 1 << 7
CAN_MULTI_CONN, SEND_FAST_ZERO = 1 << 8, 1 << 11


# ---- negotiation


class _Malformed(Exception):
    """What a client sent ends the negotiation; its text says why."""


class _Peer:
    """A client in negotiation: `steps` yields how many bytes it wants next and is sent them."""

    __slots__ = ("deadline", "got", "out", "socket", "steps", "structured", "through", "want")

    def __init__(self, connection: socket.socket, negotiate: Callable[[_Peer], Generator[int, bytes, bool]]) -> None:
        self.socket = connection
        self.deadline = time.monotonic() + NEGOTIATION
        self.out, self.got = bytearray(), bytearray()
        self.structured = False
        self.through: bool | None = None  # True: go to transmission; False: it left
        self.steps = negotiate(self)
        self.want = next(self.steps)

    def feed(self, data: bytes) -> None:
        """Raises _Malformed."""
        self.got += data
        while self.through is None and len(self.got) >= self.want:
            piece = bytes(self.got[:self.want])
            del self.got[:self.want]
            try:
                self.want = self.steps.send(piece)
            except StopIteration as end:
                self.through = end.value


class NbdServer:
    """A *target* as an NBD export: on Unix sockets (listen()), and on sockets that need no negotiation (add()).

    name: of the export, beside "", the default. description: for people. read_only: also where the target could be
    written. Two threads from construction to close(). Raises ValueError as NbdDisk does, OSError.
    """

    def __init__(self, target: Target, name: str, *, description: str = "", read_only: bool = False) -> None:
        self.name, self._name = name, name.encode("utf-8", "backslashreplace")[:_NAME_MAX]
        self._description = description.encode("utf-8", "backslashreplace")[:_NAME_MAX]
        self.target = target
        self.listeners: list[Listener] = []
        self._log = PeerLog(f"NBD {name}")
        self._refused = 0
        self._peers: set[_Peer] = set()
        self._resume = math.inf  # when accept() is tried again, while that is paused
        self._stopped = self._closed = False
        self._last: dict[str, int] = {}
        self.disk = NbdDisk(target, read_only=read_only, connections=CONNECTIONS)
        with contextlib.ExitStack() as undo:
            undo.callback(self.disk.close)
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._wake, wake = socket.socketpair()
            undo.callback(self._wake.close)
            self._woken = undo.enter_context(wake)
            self._selector.register(self._woken, selectors.EVENT_READ, self._wakened)
            self._selector.register(self.disk, selectors.EVENT_READ, self._violations)
            self._serving = spawn(self._serve, f"nbd {name}")
            undo.callback(self._serving.join)
            undo.callback(self.disk.stop)
            self._negotiating = spawn(self._negotiate, f"nbd clients of {name}")
            self._undo = undo.pop_all()

    # -------------------------------------------------------------- life

    def listen(self, listener: Listener) -> None:
        """Serves the clients of a socket from now on; close() closes it."""
        self.listeners.append(listener)
        listener.listen(CONNECTIONS)
        self._wake.send(b"l")

    def add(self, connection: socket.socket, *, structured: bool = False) -> None:
        """Serves a connected socket that is in the transmission phase; it is ours from then on.

        Raises UsageError (too many connections), OSError; then it is still the caller's.
        """
        self.disk.add(connection.fileno(), structured)
        connection.detach()

    def close(self, timeout: float = 5.0) -> list[str]:
        """Ends within *timeout* seconds and little more, whatever clients and target do; idempotent.

        What was received is answered first, if the target answers it in time. Returns sentences on what was not; where
        the target still has requests, another close() may end what this one could not.
        """
        if self._closed:
            return []
        if not self._stopped:
            self._stopped = True
            self._wake.send(b"s")
            self._negotiating.join()
        left: list[str] = []
        for listener in self.listeners:
            try:
                listener.close()
            except OSError as error:
                left.append(f"{listener.path}: {error.strerror}")
        self.disk.stop()
        self._serving.join(timeout)
        if self._serving.is_alive():
            left.append(f"NBD {self.name}: {self.disk.in_flight} requests of {self.disk.connections} clients were not "
                        f"answered in {timeout:g} s")
            self.disk.stop(now=True)
            self._serving.join(_AFTER_STOP)
        if self._serving.is_alive():  # the target has not let go: what it will touch is left to the process
            left.append(f"NBD {self.name}: the disk still has requests")
        else:
            self._last, self._closed = self.counters, True
            self._undo.close()
        return left

    @property
    def thread(self) -> int:
        """The receiving thread, as the kernel numbers it."""
        return self._serving.native_id or 0

    @property
    def transmission_flags(self) -> int:
        """What is offered; structured replies add SEND_DF.

        CAN_MULTI_CONN holds because all connections share one target, whose sync covers every write answered before.
        """
        flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN
        if self.disk.read_only:
            return flags | READ_ONLY
        return flags | SEND_WRITE_ZEROES | SEND_FAST_ZERO | (SEND_TRIM if self.target.discards else 0)

    def resized(self) -> None:
        """Takes over the target's size. Clients that are there do not learn of it; those to come do."""
        self.disk.resized()

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return self.target.nblocks * self.target.block_size

    @property
    def counters(self) -> dict[str, int]:
        """Those of NbdDisk; refused: clients that got no export; open: connections there are now."""
        if self._closed:
            return self._last
        return {**self.disk.counters, "refused": self._refused, "open": self.disk.connections}

    def _serve(self) -> None:
        status = self.disk.run()
        if status:
            log.error("NBD %s: nothing is received any more: %s", self.name, os.strerror(-status))

    # -------------------------------------------------------------- the negotiating thread

    def _negotiate(self) -> None:
        try:
            while not self._stopped:
                now = time.monotonic()
                wait = min([peer.deadline for peer in self._peers] + [self._resume]) - now
                for key, _ in self._selector.select(None if wait == math.inf else max(0.0, wait)):
                    key.data()
                now = time.monotonic()
                for peer in [peer for peer in self._peers if peer.deadline <= now]:
                    self._refuse(f"a client chose no export within {NEGOTIATION:g} s", peer)
                if self._resume <= now:
                    self._resume = math.inf
                    self._watch_listeners()
        except BaseException:
            log.exception("NBD %s: no further clients", self.name)
            for listener in self.listeners:
                listener.socket.close()
        finally:
            for peer in list(self._peers):
                self._drop(peer)

    def _wakened(self) -> None:
        self._woken.recv(16)
        if self._resume == math.inf:
            self._watch_listeners()

    def _watch_listeners(self) -> None:
        known = self._selector.get_map()
        for listener in list(self.listeners):
            if listener.socket not in known:
                self._selector.register(listener.socket, selectors.EVENT_READ,
                                        functools.partial(self._accept, listener))

    def _violations(self) -> None:
        for text in self.disk.violations():
            self._log.warning("a connection was closed: %s", text)

    def _refuse(self, why: str, peer: _Peer | None = None) -> None:
        self._refused += 1
        self._log.warning("%s", why)
        if peer is not None:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.socket)
        self._peers.discard(peer)
        peer.socket.close()

    def _accept(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors, no memory: that may pass
            self._log.warning("clients have to wait: %s", error.strerror)
            for each in self.listeners:
                if each.socket in self._selector.get_map():
                    self._selector.unregister(each.socket)
            self._resume = time.monotonic() + _PAUSE
            return
        if len(self._peers) + self.disk.connections >= CONNECTIONS:
            connection.close()
            self._refuse(f"a client was turned away: {CONNECTIONS} connections are open")
            return
        connection.setblocking(False)
        peer = _Peer(connection, self._choose)
        self._peers.add(peer)
        self._selector.register(connection, selectors.EVENT_WRITE, functools.partial(self._step, peer))

    def _step(self, peer: _Peer) -> None:
        """Goes on with a client as far as it goes without waiting: either it owes us something, or we owe it."""
        try:
            if not peer.out:
                data = peer.socket.recv(min(peer.want - len(peer.got), 65536))
                if not data:
                    self._drop(peer)
                    return
                peer.feed(data)
            if peer.out:
                del peer.out[:peer.socket.send(peer.out)]
        except (BlockingIOError, InterruptedError):
            return
        except _Malformed as error:
            self._refuse(f"a client was turned away: {error}", peer)
            return
        except OSError:  # it has gone
            self._drop(peer)
            return
        if peer.out or peer.through is None:
            event = selectors.EVENT_WRITE if peer.out else selectors.EVENT_READ
            self._selector.modify(peer.socket, event, functools.partial(self._step, peer))
        elif peer.through:
            self._selector.unregister(peer.socket)
            self._peers.discard(peer)
            try:
                self.add(peer.socket, structured=peer.structured)
            except (UsageError, OSError, MemoryError) as error:
                peer.socket.close()
                self._refuse(f"a client was turned away: {error}")
        else:
            self._drop(peer)

    def _choose(self, peer: _Peer) -> Generator[int, bytes, bool]:
        """The whole of a negotiation; True: its client goes on to transmission. Raises _Malformed."""
        peer.out += struct.pack(">QQH", _INIT_PASSWD, _IHAVEOPT, _FLAG_FIXED_NEWSTYLE | _FLAG_NO_ZEROES)
        flags, = struct.unpack(">I", (yield 4))
        if flags & ~(_FLAG_FIXED_NEWSTYLE | _FLAG_NO_ZEROES):
            raise _Malformed(f"its flags are {flags:#x}, those known are 0x3")
        for _ in range(MOST_OPTIONS):
            magic, option, length = struct.unpack(">QII", (yield 16))
            if magic != _IHAVEOPT:
                raise _Malformed(f"an option begins with {magic:#018x} instead of {_IHAVEOPT:#018x}")
            if length > (_NAME_MAX if option == _OPT_EXPORT_NAME else MOST_SKIPPED):
                raise _Malformed(f"option {option} has {length} bytes")
            if length > MOST_DATA:
                while length:
                    length -= len((yield min(length, MOST_DATA)))
                self._reply(peer, option, _ERR_TOO_BIG, b"an option has at most %d bytes here" % MOST_DATA)
                continue
            data = (yield length) if length else b""
            if option == _OPT_EXPORT_NAME:
                if not self._is_ours(data):
                    raise _Malformed(f"there is no export {data[:64]!r}, only {self.name!r}")
                peer.out += struct.pack(">QH", self.size, self._flags(peer))
                peer.out += b"" if flags & _FLAG_NO_ZEROES else bytes(124)
                return True
            if option == _OPT_ABORT:
                self._reply(peer, option, _REP_ACK)
                return False
            if option in (_OPT_INFO, _OPT_GO):
                if self._inform(peer, option, data) and option == _OPT_GO:
                    return True
            elif option not in (_OPT_LIST, _OPT_STRUCTURED_REPLY):
                self._reply(peer, option, _ERR_UNSUP, b"no TLS here: the socket's file mode guards it"
                            if option == _OPT_STARTTLS else b"")
            elif data:
                self._reply(peer, option, _ERR_INVALID, b"the option has no data")
            else:
                if option == _OPT_LIST:
                    self._reply(peer, option, _REP_SERVER,
                                struct.pack(">I", len(self._name)) + self._name + self._description)
                else:
                    peer.structured = True
                self._reply(peer, option, _REP_ACK)
        raise _Malformed(f"it sent {MOST_OPTIONS} options and chose no export")

    def _is_ours(self, name: bytes) -> bool:
        return name in (b"", self._name)

    def _flags(self, peer: _Peer) -> int:
        return self.transmission_flags | (SEND_DF if peer.structured else 0)

    @staticmethod
    def _reply(peer: _Peer, option: int, kind: int, data: bytes = b"") -> None:
        peer.out += struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data

    def _inform(self, peer: _Peer, option: int, data: bytes) -> bool:
        """Answers INFO and GO; whether the export is ours."""
        try:
            length, = struct.unpack_from(">I", data)
            name = data[4:4 + length]
            count, = struct.unpack_from(">H", data, 4 + length)
            wanted = struct.unpack_from(f">{count}H", data, 6 + length)
            good = len(data) == 6 + length + 2 * count
        except struct.error:
            good = False
        if not good:
            self._reply(peer, option, _ERR_INVALID, b"the lengths do not fit the option's")
            return False
        if not self._is_ours(name):
            self._reply(peer, option, _ERR_UNKNOWN, b"the exports here are \"\" and " + self._name)
            return False
        self._reply(peer, option, _REP_INFO, struct.pack(">HQH", _INFO_EXPORT, self.size, self._flags(peer)))
        # Always: who asked for it or not, that is what holds.
        self._reply(peer, option, _REP_INFO, struct.pack(">HIII", _INFO_BLOCK_SIZE, 1,
                                                         max(PREFERRED, self.target.block_size), MAX_LENGTH))
        if _INFO_NAME in wanted:
            self._reply(peer, option, _REP_INFO, struct.pack(">H", _INFO_NAME) + self._name)
        if _INFO_DESCRIPTION in wanted:
            self._reply(peer, option, _REP_INFO, struct.pack(">H", _INFO_DESCRIPTION) + self._description)
        self._reply(peer, option, _REP_ACK)
        return True
