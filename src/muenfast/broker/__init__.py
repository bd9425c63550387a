"""A small process that stays root for one that does not: it does what takes privileges later, of a closed list.

It is forked before the other one gives its privileges up, and ends when that one has gone, having undone what is left. What
it may be asked for is a table of operations, each with typed, bounded fields; whatever else comes is answered with an
error and counted. Operations check what they are asked for against what the policy declares and against what they did
themselves: the process that asks is not trusted. No request carries descriptors; answers may.

On the wire: several Unix sockets (SOCK_SEQPACKET), lanes, on each of which one request at a time is made: a JSON object,
{"do": NAME, FIELD: VALUE, ...}, and answered: {"ok": true, ...} or {"ok": false, "kind": ..., ...}. So requests of several
threads go on side by side, and none waits for one that waits for a disk. A lane on which something goes wrong is closed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muenfast.errors import ClaimError, MuenfastError, PeerLog
from muenfast.privileges import bound, keep, no_new
from muenfast.threads import spawn

__all__ = ["Answer", "Broker", "Kind", "Operation", "Refused", "Service", "flag", "number", "start", "word"]

log = logging.getLogger("muenfast")

MOST_BYTES = 4096       # of a request
_MOST_ANSWER = 1 << 16  # bytes
_MOST_FDS = 4           # descriptors of an answer
_LEAVING = 60           # seconds that undoing may take: then it is ended as it is
_LATE = 10.0            # seconds more that it is waited for
_QUIET = 20.0           # of those, for operations under way
_PROMPT = 1000          # milliseconds for an answer that waits for nothing
_LOOK = 5000            # milliseconds from one look at whether who owes an answer still lives to the next
_LOOKS = 10             # in a row without a sign of it: it stands still
_WORD = 256             # characters of a text
_GONE = "the process that kept privileges for this one has ended"


class Refused(MuenfastError):
    """What was asked for is not what the policy declares, or not the asker's."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field holds. what: for messages."""

    what: str
    good: Callable[[Any], bool]


def number(least: int, most: int) -> Kind:
    """A whole number."""
    return Kind(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def word(pattern: str) -> Kind:
    """A text that the pattern matches as a whole."""
    return Kind(f"a text like {pattern}", lambda value: type(value) is str and len(value) <= _WORD
                and re.fullmatch(pattern, value, re.ASCII) is not None)


flag = Kind("true or false", lambda value: type(value) is bool)


@dataclass(frozen=True, slots=True)
class Answer:
    """values: JSON-able. fds: descriptors that go along; own: they are closed once they were sent."""

    values: Mapping[str, Any] = field(default_factory=dict)
    fds: tuple[int, ...] = ()
    own: bool = True


@dataclass(frozen=True, slots=True)
class Operation:
    """run: called with the fields by name, all of which must be there. It raises Refused, MuenfastError, OSError."""

    run: Callable[..., Answer]
    fields: Mapping[str, Kind] = field(default_factory=dict)

    def take(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, checked. Raises Refused."""
        found = {name: value for name, value in request.items() if name != "do"}
        if found.keys() != self.fields.keys():
            raise Refused(f"its fields are {', '.join(self.fields) or 'none'}")
        for name, value in found.items():
            if not self.fields[name].good(value):
                raise Refused(f"the field {name} is {self.fields[name].what}")
        return found


class Service:
    """What a broker does: operations by name, and in the end undo(). One object in its process, used by many threads."""

    def __init__(self) -> None:
        self.operations: dict[str, Operation] = {"counts": Operation(self._counts)}
        self.requests = self.refused = 0
        self._books = threading.Lock()
        self._refusals, self._telling = PeerLog("broker"), threading.Lock()
        self._under_way = 0
        self._idle = threading.Condition(self._books)
        self._ended = False

    def free(self) -> None:
        """Nobody asks any more: ends what operations under way may wait for."""

    def undo(self) -> None:
        """Takes away what is left. No operation is under way, unless one takes too long."""

    def end(self) -> None:
        """free() and undo(), and no operation from here on."""
        with self._idle:
            self._ended = True
        self.free()
        with self._idle:
            if not self._idle.wait_for(lambda: not self._under_way, _QUIET):
                log.warning("broker: %d operations did not end", self._under_way)
        self.undo()

    def _counts(self) -> Answer:
        return Answer({"requests": self.requests, "refused": self.refused})

    def answer(self, data: bytes, strange: bool = False) -> Answer:
        """What is sent back for a request, whatever it holds. strange: it came with descriptors, or was too long."""
        with self._idle:
            self.requests += 1
            if self._ended:
                return Answer({"ok": False, "kind": "other", "text": "the broker is ending"})
            self._under_way += 1
        try:
            return self._answer(data, strange)
        finally:
            with self._idle:
                self._under_way -= 1
                self._idle.notify_all()

    def _answer(self, data: bytes, strange: bool) -> Answer:
        try:
            if strange:
                raise Refused(f"a request has at most {MOST_BYTES} bytes, and no descriptors")
            try:
                request = json.loads(data)
            except (ValueError, RecursionError):
                raise Refused("a request is a JSON object") from None
            name = request.get("do") if isinstance(request, dict) else None
            operation = self.operations.get(name) if isinstance(name, str) else None
            if operation is None:
                raise Refused("there is no such operation")
            done = operation.run(**operation.take(request))
            return Answer({**done.values, "ok": True}, done.fds, done.own)
        except Refused as error:
            with self._books:
                self.refused += 1
                so_far = self.refused
            with self._telling:
                self._refusals.warning("%d requests refused so far, the last because %s", so_far, error)
            return Answer({"ok": False, "kind": "refused", "text": str(error)})
        except ClaimError as error:
            return Answer({"ok": False, "kind": "claim", "what": error.what, "holder": error.holder, "hint": error.hint})
        except OSError as error:
            path = None if error.filename is None else os.fsdecode(error.filename)
            return Answer({"ok": False, "kind": "os", "number": error.errno or errno.EIO,
                           "text": error.strerror or str(error), "path": path})
        except MuenfastError as error:
            return Answer({"ok": False, "kind": "other", "text": str(error)})
        except Exception as error:
            with self._telling:
                self._refusals.warning("a request failed in a way that nobody thought of: %r", error)
            return Answer({"ok": False, "kind": "other", "text": f"{type(error).__name__}: {error}"})


# ------------------------------------------------------------------ its process

def _attend(service: Service, lane: socket.socket) -> None:
    """Answers one lane until its other end is closed, or it fails; then nobody waits there."""
    try:
        while _attended(service, lane):
            pass
    except Exception:
        log.exception("broker: a lane is closed")
    finally:
        lane.shutdown(socket.SHUT_RDWR)


def _attended(service: Service, lane: socket.socket) -> bool:
    """One request; False: there are no more. Raises OSError."""
    try:
        data, ancillary, flags, _ = lane.recvmsg(MOST_BYTES, socket.CMSG_SPACE(4 * _MOST_FDS), socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ECONNRESET:
            return False
        raise
    strange = bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))
    for level, kind, raw in ancillary:
        strange = True
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            for at in range(0, len(raw) - len(raw) % 4, 4):
                os.close(int.from_bytes(raw[at:at + 4], sys.byteorder))
    if not data and not strange:
        return False
    answer = service.answer(data, strange)
    text = json.dumps(answer.values).encode()
    if len(text) > _MOST_ANSWER:    # of whoever uses a device, say
        text = json.dumps({"ok": False, "kind": "other", "text": "the answer is too long"}).encode()
    try:
        socket.send_fds(lane, [text], list(answer.fds), socket.MSG_NOSIGNAL)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            raise
        return False
    finally:
        if answer.own:
            for fd in answer.fds:
                os.close(fd)
    return True


def _serve(lanes: Sequence[socket.socket], make: Callable[[], Service], capabilities: Collection[str]) -> None:
    """The process's life."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(each, signal.SIG_IGN)     # it ends with the other one
    os.setsid()
    os.chdir("/")
    with open("/proc/self/comm", "w") as comm:
        comm.write("muenfast-broker")
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    used = sorted(lane.fileno() for lane in lanes)
    for low, high in zip([2, *used], [*used, os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(low + 1, high)    # the other one's affair
    service = make()
    bound(capabilities)     # the watchdogs that it starts have no more than it
    no_new()
    keep(capabilities)
    open_lanes = {lane.fileno(): lane for lane in lanes}
    poller = select.poll()
    for fd, lane in open_lanes.items():
        poller.register(fd, 0)          # the end of the other side is told all the same
        spawn(lambda lane=lane: _attend(service, lane), "lane")  # type: ignore[misc]
    while open_lanes:
        for fd, _ in poller.poll():
            poller.unregister(fd)
            del open_lanes[fd]
    signal.alarm(_LEAVING)
    service.end()


class Broker:
    """The other process, as the one that asks it has it; see start(). pid: its number. The first lane is counts()'s own."""

    def __init__(self, pid: int, lanes: Sequence[socket.socket]) -> None:
        self.pid = pid
        self._lanes = list(lanes)
        self._free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._process = os.getpid()
        self._counting = threading.Lock()
        self._owing: set[socket.socket] = set()     # an answer that nobody waits for may come yet
        self._still = False
        for lane in lanes[1:]:
            self._free.put(lane)

    @property
    def ended(self) -> bool:
        """Whether the process is no more: what takes privileges fails from here on."""
        if not self._lanes:
            return True
        poller = select.poll()
        poller.register(self._lanes[0], 0)
        return bool(poller.poll(0))

    def counts(self) -> dict[str, Any]:
        """Its number, how many requests it had and how many of them it refused; without these where it does not answer at
        once, with `ended` where it is no more. Waits for no lane."""
        with self._counting:
            answer = None if self.ended else self._counted(self._lanes[0])
            if answer is None:
                return {"pid": self.pid, "ended": self.ended}
        return {"pid": self.pid, "ended": False, "requests": answer["requests"], "refused": answer["refused"]}

    @staticmethod
    def _counted(lane: socket.socket) -> dict[str, Any] | None:
        """None: no answer."""
        poller = select.poll()
        poller.register(lane, select.POLLIN)
        try:
            while poller.poll(0) and lane.recv(_MOST_ANSWER):   # answers that came too late
                pass
            lane.send(b'{"do": "counts"}', socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            data = lane.recv(_MOST_ANSWER) if poller.poll(_PROMPT) else b""
        except OSError:     # it ended meanwhile, or has not answered for so long that no request fits in
            return None
        return json.loads(data) if data else None

    def call(self, operation: str, /, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """What it answers: values and descriptors. Waits for a lane first, and then for as long as the operation takes: of
        some that is as long as a disk takes.

        Raises PermissionError for what it refuses, TimeoutError where the process stands still (it may do what it was asked
        for yet), OSError, ClaimError, MuenfastError: what the operation met there.
        """
        lane = self._free.get()
        try:
            try:
                if lane in self._owing:
                    for fd in self._answered(lane)[1]:
                        os.close(fd)
                    self._owing.discard(lane)
                lane.sendall(json.dumps({"do": operation, **fields}).encode())
                data, fds = self._answered(lane)
            except TimeoutError:
                self._owing.add(lane)
                raise
            except (OSError, ValueError) as error:      # ValueError: closed meanwhile
                raise OSError(errno.EPIPE, _GONE, "broker") from error
            if not data:
                raise OSError(errno.EPIPE, _GONE, "broker")
        finally:
            self._free.put(lane)
        answer = json.loads(data)
        if answer.pop("ok"):
            return answer, fds
        kind = answer["kind"]
        if kind == "os":
            raise OSError(answer["number"], answer["text"], answer["path"])
        if kind == "claim":
            raise ClaimError(answer["what"], answer["holder"], hint=answer["hint"])
        if kind == "refused":
            raise PermissionError(errno.EPERM, f"{operation} was refused: {answer['text']}", "broker")
        raise MuenfastError(answer["text"])

    def _answered(self, lane: socket.socket) -> tuple[bytes, list[int]]:
        """The next answer on a lane. While it does not come, the process is asked for its counts, which it always gives at
        once: where it does not, time after time, it stands still, and then one time is enough, until an answer comes."""
        poller = select.poll()
        poller.register(lane, select.POLLIN)
        left = 1 if self._still else _LOOKS
        while not poller.poll(_LOOK):
            if "requests" in self.counts():
                self._still, left = False, _LOOKS
                continue
            left -= 1
            if not left:
                self._still = True
                raise TimeoutError(errno.ETIMEDOUT, f"the process that keeps privileges for this one ({self.pid}) stands "
                                   "still", "broker")
        self._still = False
        data, fds, _, _ = socket.recv_fds(lane, _MOST_ANSWER, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        return data, fds

    def ask(self, operation: str, /, **fields: Any) -> dict[str, Any]:
        """As call(), of an operation that gives no descriptors."""
        answer, fds = self.call(operation, **fields)
        for fd in fds:
            os.close(fd)
        return answer

    def close(self) -> None:
        """It undoes what is left, and has ended on return, unless it stands still. Idempotent; nothing in a fork()'s child.
        """
        if os.getpid() != self._process or not self._lanes:
            return
        with self._counting:
            for lane in self._lanes:
                lane.shutdown(socket.SHUT_RDWR)     # a thread may wait on it, which keeps it open
                lane.close()
            self._lanes.clear()
        with contextlib.suppress(ChildProcessError):
            end = time.monotonic() + _LEAVING + _LATE
            while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    log.warning("the process that kept privileges for this one (%d) does not end", self.pid)
                    return
                time.sleep(0.005)
            if status := found[1]:
                log.warning("the process that kept privileges for this one ended with status %d",
                            os.waitstatus_to_exitcode(status))

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def start(make: Callable[[], Service], lanes: int, capabilities: Collection[str]) -> Broker:
    """Forks it. make: its service, called there. lanes: most requests at a time, besides counts(). capabilities: those that
    it keeps.

    Precondition: this is the only thread, and still has the privileges. Raises OSError.
    """
    if threading.active_count() > 1:
        raise RuntimeError("there are other threads, which a forked process would not have")
    pairs: list[tuple[socket.socket, socket.socket]] = []
    try:
        for _ in range(1 + lanes):
            pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
        pid = os.fork()
    except BaseException:
        for pair in pairs:
            for end in pair:
                end.close()
        raise
    if pid == 0:
        status = 1
        try:
            for ours, _ in pairs:
                ours.close()
            _serve([theirs for _, theirs in pairs], make, capabilities)
            status = 0
        except BaseException:   # nothing of the other process's may be cleaned up here
            log.exception("broker")
        finally:
            os._exit(status)
    for _, theirs in pairs:
        theirs.close()
    return Broker(pid, [ours for ours, _ in pairs])
