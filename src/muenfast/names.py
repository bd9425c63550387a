"""Finding the process that serves a network interface by that interface's name, as muennet_cfg does.

Each interface, parent or child, has an abstract Unix socket of its name in its own network namespace: equal names in two
namespaces are two sockets. Trust: such a name has no owner and no mode, anybody in the namespace may take one first
or connect to it. So a server answers only root and its own user (SO_PEERCRED), a client asks only a server that is root's
or its own user's, and a name that is taken is an error when the interface is set up, never silence.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from muenfast import marks, netns, params
from muenfast.control import Command, ControlServer
from muenfast.errors import ClaimError, MuenfastError

_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_MOST_ANSWER = 1 << 16  # bytes
_ANSWER_TIMEOUT = 10.0  # seconds: a child's interface is made or taken away meanwhile


def address(interface: str) -> bytes:
    """The abstract socket of an interface's name."""
    return b"\0muenfast/interface/" + os.fsencode(interface)


def bound_to(interface: str, namespace: int | None) -> socket.socket:
    """A socket that has that name in a namespace (None: the calling thread's). Raises ClaimError: it is taken, OSError."""
    # A socket belongs for ever to the namespace in which it was made.
    new = netns.inside(namespace, lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    try:
        new.bind(address(interface))
    except OSError as error:
        new.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise ClaimError(f"the interface name {interface}", netns.inside(namespace, lambda: _holder(interface))) from None
    return new


class NameSocket(ControlServer):
    """What may be asked of one interface, from within its network namespace, until close().

    namespace: a descriptor of that, None: the calling thread's; not needed afterwards. bound: makes its socket
    (makers: ports.py), None: this process by itself. Raises ClaimError where the name is taken, OSError.
    """

    def __init__(self, interface: str, commands: Mapping[str, Command], *, namespace: int | None = None,
                 bound: Callable[[], socket.socket] | None = None) -> None:
        self.interface = interface
        self._bound = partial(bound_to, interface, namespace) if bound is None else bound
        self._stopped = False
        super().__init__(commands)

    def _listen(self) -> socket.socket:
        listening = self._bound()
        try:
            listening.listen(64)    # who calls this is whom clients see (SO_PEERCRED)
        except BaseException:
            listening.close()
            raise
        return listening

    def _forget(self) -> None:
        """Nothing: the name goes with its socket."""

    def stop(self) -> None:
        """Gives the name up; what was asked before is still answered. Of a command of its own (del_child), too, and with
        locks held for which others wait: it waits for none of them."""
        with self._books:
            if self._stopped:
                return
            self._stopped = self._closing = True
            for connection in self._reading:    # who has not asked yet, will not
                connection.shutdown(socket.SHUT_RD)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def close(self) -> None:
        """stop(), and the end of what is under way, that of the caller aside."""
        self.stop()
        while True:
            with self._books:
                others = self._answering - {threading.current_thread()}
            if not others:
                break
            others.pop().join()


def _connected(interface: str, timeout: float) -> tuple[socket.socket, int, int]:
    """A connection to who has that name here; process number and user. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout)
        connection.connect(address(interface))
        pid, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    except BaseException:
        connection.close()
        raise
    return connection, pid, uid


def _holder(interface: str) -> str:
    try:
        connection, pid, uid = _connected(interface, 1.0)
    except OSError:
        return "a process that does not answer"
    connection.close()
    return f"process {pid} of user {uid}"


def ask(interface: str, request: dict[str, Any], *, timeout: float = _ANSWER_TIMEOUT) -> dict[str, Any]:
    """One request to the process that serves the interface of that name in the calling thread's network namespace; its
    answer. timeout: seconds, of all of it. Raises MuenfastError where nobody is to be asked, or nothing sensible comes."""
    end = time.monotonic() + timeout
    try:
        connection, pid, uid = _connected(interface, timeout)
    except ConnectionRefusedError:
        raise MuenfastError(f"no muenfast process serves an interface {interface} in this network namespace") from None
    except OSError as error:
        raise MuenfastError(f"the process that serves {interface} is not to be reached: {error}") from error
    with connection:
        if uid not in (0, os.geteuid()):
            raise MuenfastError(f"process {pid}, which answers for {interface}, is user {uid}'s, neither root's nor yours: "
                                "it is not asked (where it should be, ask as that user, for example by `setpriv --reuid "
                                f"{uid} --clear-groups COMMAND`)")
        if os.geteuid() not in (0, uid):
            raise MuenfastError(f"{interface} is served by process {pid} of user {uid}, who answers only root and itself")
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = bytearray()
            while not line.endswith(b"\n") and len(line) < _MOST_ANSWER:
                connection.settimeout(max(end - time.monotonic(), 1e-3))
                piece = connection.recv(_MOST_ANSWER - len(line))
                if not piece:
                    break
                line += piece
            answer = json.loads(line)
        except TimeoutError as error:
            raise MuenfastError(f"process {pid}, which serves {interface}, gave no answer in {timeout:g} s: what was asked "
                                f"for may be done yet, as `muenfast net show {interface}` tells") from error
        except (OSError, ValueError) as error:
            raise MuenfastError(f"process {pid}, which serves {interface}, gave no answer: {error}") from error
    if not isinstance(answer, dict):
        raise MuenfastError(f"process {pid}, which serves {interface}, answered {answer!r:.80}")
    return answer


class Operations(Protocol):
    """What a process does with its interfaces in one namespace; each makes it real, or raises and leaves all as it was.
    From several threads at once."""

    def add_child(self, parent: str, child: str) -> None: ...

    def del_child(self, child: str) -> None: ...

    def add_mark(self, child: str, mark: int) -> None: ...

    def del_mark(self, child: str, mark: int) -> None: ...


def commands(interface: str, operations: Operations) -> dict[str, Command]:
    """What a NameSocket of that interface answers: it is the PARENT or CHILD of what is asked for."""
    def nothing(call: Callable[..., None]) -> Callable[..., dict[str, Any]]:
        def run(**fields: Any) -> dict[str, Any]:
            call(interface, **fields)
            return {}
        return run

    mark: dict[str, Any] = {"fields": {"mark": "number"}, "required": frozenset(("mark",))}
    return {
        "add_child": Command(nothing(operations.add_child), {"child": "text"}, frozenset(("child",)), quick=False),
        "del_child": Command(nothing(operations.del_child), quick=False),
        "add_mark": Command(nothing(operations.add_mark), **mark),
        "del_mark": Command(nothing(operations.del_mark), **mark)}


def request(operation: str, name: str, value: str | None) -> tuple[str, dict[str, Any]]:
    """Whom to ask what for `OPERATION NAME [VALUE]`. Raises UsageError."""
    params.interface("PARENT" if operation == "add_child" else "CHILD", None, name)
    if operation == "add_child":
        return name, {"command": operation, "child": params.interface("CHILD", None, value or "")}
    if operation == "del_child":
        return name, {"command": operation}
    return name, {"command": operation, "mark": marks.check_mark(value or "")}
