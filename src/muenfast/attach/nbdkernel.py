"""A disk's block device through the kernel's nbd driver: a socket pair between it and an NbdServer, node, watchdog.

One connection. The driver moves requests that take longer than 30 s to another one where there are several, whatever
timeout it was given (nbd_xmit_timeout in drivers/block/nbd.c): with several, a disk that waits for its server would
lose them all. With one and no timeout they wait.

Partitions: the driver's devices can have them (unless its parameter max_part is 0), and the kernel parses tables by
itself; partitions.py makes the nodes and does what the kernel's parsers do not.

Who may wait for whom: as in fuse.py. What may wait for I/O (flush, disconnect) runs in detach() on a thread of its own,
waited for with a limit; shutting the socket down frees it, and whoever reads the partition table.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from muenfast.attach import block, partitions, watchdog
from muenfast.attach.leash import AFTER_ABORT, Leash
from muenfast.attach.nbd import CAN_MULTI_CONN, SEND_FAST_ZERO, NbdServer
from muenfast.errors import UsageError

CAP_SYS_ADMIN = 21  # uapi/linux/capability.h
ATTACH_LIMIT = 10.0  # seconds in which the device has to come up
GRACE = 1.0  # seconds for short users of the device (a probe, a last close) before it counts as busy
_LEAST_KERNEL = (5, 14)  # NBD_ATTR_BACKEND_IDENTIFIER: by which a dead client's device is known

# uapi/linux/nbd-netlink.h
_SIZE_BYTES, _BLOCK_SIZE_BYTES, _TIMEOUT, _SERVER_FLAGS, _CLIENT_FLAGS, _SOCKETS, _DEAD_CONN_TIMEOUT = 2, 3, 4, 5, 6, 7, 8
_BACKEND_IDENTIFIER = 10
_SOCK_ITEM = _SOCK_FD = 1


def available() -> str | None:
    """None where this front end works, else the reason why not, with the next step."""
    release = platform.release()
    if tuple(int(part) for part in re.findall(r"\d+", release)[:2]) < _LEAST_KERNEL:
        return f"Linux {release} is too old: boot {'.'.join(map(str, _LEAST_KERNEL))} or later"
    if not Path("/sys/module/nbd").is_dir():
        try:
            known = Path(f"/lib/modules/{release}/modules.dep").read_text(errors="replace")
        except OSError:
            known = ""
        return "the kernel has no nbd driver: " + (
            "modprobe nbd" if "/nbd.ko" in known else "boot a kernel with CONFIG_BLK_DEV_NBD (y or m)")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1:
            return "attaching and making device nodes need CAP_SYS_ADMIN: run as root"
    return None


def identifier(runtime_dir: str | os.PathLike[str], name: str, pid: int) -> str:
    """What a device is known by, in /sys/block/nbdN/backend."""
    return f"muenfast:{name}-{pid}:{os.path.abspath(runtime_dir)}"


def _path_of(number: int) -> str:
    return f"/dev/nbd{number}"


def _device_of(number: int) -> int:
    major, minor = Path(f"/sys/block/nbd{number}/dev").read_text().split(":")
    return os.makedev(int(major), int(minor))


class NbdAttachment:
    """The block device /dev/NAME of an NbdServer's disk, from attach() to detach().

    device: its path. number: of the nbd device. disk: the server (counters).
    """

    def __init__(self, server: NbdServer, name: str, known_by: str) -> None:
        """For attach() only."""
        self.name, self.disk, self.identifier = name, server, known_by
        self.device = f"/dev/{name}"
        self.number: int
        self.partitions: partitions.Partitions
        self._device: int
        self._socket = -1
        self._leash: Leash
        self._attached = False

    @classmethod
    def attach(cls, server: NbdServer, name: str, runtime_dir: str | os.PathLike[str]) -> NbdAttachment:
        """Make the disk of *server* appear as /dev/*name*; all or nothing.

        The caller holds the claim on *name*; runtime_dir only tells whose device it is. Raises UsageError where
        available() says why not, OSError (filename set) for what the kernel refuses.
        """
        if reason := available():
            raise UsageError("the nbd driver is not to be had here", option="--attach", value="nbd", hint=reason)
        new = cls(server, name, identifier(runtime_dir, name, os.getpid()))
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            undo.callback(ours.close)
            try:
                new._socket = os.dup(ours.fileno())
                undo.callback(os.close, new._socket)
                new._leash = Leash("nbd", server.thread, [str(new._socket), new.identifier, new.device], [new._socket])
                undo.callback(new._leash.end)
                server.add(ours)
                undo.callback(watchdog.shut_down, new._socket)
                new._connect(theirs)
            finally:
                theirs.close()      # the driver has its own reference
            undo.callback(new._disconnect)
            new._tune()
            new._device = _device_of(new.number)
            block.make_node(name, new._device)
            undo.callback(block.remove_node, new.device, new._device)
            # Reading the table waits for the disk.
            limit = threading.Timer(ATTACH_LIMIT, watchdog.shut_down, [new._socket])
            limit.daemon = True
            limit.start()
            undo.callback(limit.join)
            undo.callback(limit.cancel)
            new.partitions = partitions.Partitions(name, f"nbd{new.number}", new.device, block=server.target.block_size)
            undo.callback(new.partitions.stop, AFTER_ABORT)
            new.partitions.start()
            if limit.finished.is_set():
                raise TimeoutError(errno.ETIMEDOUT, f"its partition table was not read within {ATTACH_LIMIT:g} s",
                                   new.device)
            limit.cancel()
            limit.join()
            undo.pop_all()
        new._attached = True
        return new

    def _connect(self, theirs: socket.socket) -> None:
        def number(kind: int, value: int) -> bytes:
            return watchdog.attribute(kind, struct.pack("=Q", value))

        fd = watchdog.attribute(_SOCK_FD, struct.pack("=I", theirs.fileno()))
        reply = watchdog.nbd_call(watchdog.NBD_CMD_CONNECT, b"".join((
            number(_SIZE_BYTES, self.disk.size), number(_BLOCK_SIZE_BYTES, self.disk.target.block_size),
            number(_SERVER_FLAGS, self.disk.transmission_flags & ~(CAN_MULTI_CONN | SEND_FAST_ZERO)),
            number(_CLIENT_FLAGS, 0),
            # No timeouts: what is outstanding waits as long as the disk has it; a dead process' socket fails at once.
            number(_TIMEOUT, 0), number(_DEAD_CONN_TIMEOUT, 0),
            watchdog.attribute(_BACKEND_IDENTIFIER, self.identifier.encode("utf-8", "surrogateescape") + b"\0"),
            watchdog.attribute(_SOCKETS, watchdog.attribute(_SOCK_ITEM, fd)))))
        self.number, = struct.unpack("=I", reply[watchdog.NBD_ATTR_INDEX])

    def resized(self) -> None:
        """Gives the device the target's size, whoever uses it. Raises OSError."""
        self.disk.resized()
        if self._is_ours():
            watchdog.nbd_call(watchdog.NBD_CMD_RECONFIGURE, b"".join((
                watchdog.attribute(watchdog.NBD_ATTR_INDEX, struct.pack("=I", self.number)),
                watchdog.attribute(_SIZE_BYTES, struct.pack("=Q", self.disk.size)),
                watchdog.attribute(_BACKEND_IDENTIFIER, self.identifier.encode("utf-8", "surrogateescape") + b"\0"))))
        self.partitions.look()

    def _tune(self) -> None:
        """No scheduler: the far side merges."""
        try:
            Path(f"/sys/block/nbd{self.number}/queue/scheduler").write_text("none")
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EACCES):  # built without schedulers' switch
                raise

    def _is_ours(self) -> bool:
        return (self.number, self.identifier) in watchdog.nbd_devices(self.identifier)

    def _disconnect(self) -> None:
        if self._is_ours():
            watchdog.nbd_disconnect(self.number)

    @property
    def failed(self) -> bool:
        """Whether somebody else disconnected it: the device only fails from then on."""
        return self._attached and not self._is_ours()

    def detach(self, timeout: float = 5.0, moving: Callable[[], bool] | None = None) -> list[str]:
        """Remove the device; returns within *timeout* and little more, whatever the disk does.

        Dirty data is written first, while the disk still answers; the timeout counts anew while moving() says so.
        Returns sentences on what was still in use or could not be finished; empty: nothing is left. A device in use loses
        its node and its connection: its users get EIO, and the kernel frees it with its last close. Idempotent.
        """
        if not self._attached:
            return []
        self._attached = False
        left: list[str] = []
        if not self._leash.tell(f"detaching {timeout + AFTER_ABORT:.3f}"):
            left.append(f"the watchdog of {self.device} had ended before")

        def take_down() -> None:
            try:
                opened = self.partitions.open_all()
                disk = -1
                try:
                    if not self._is_ours():
                        return      # the watchdog or an administrator was faster
                    if block.number_of(self.device) == self._device:
                        disk = os.open(self.device, os.O_RDONLY | os.O_CLOEXEC)
                        os.unlink(self.device)
                    self.partitions.stop(min(GRACE, timeout / 2))
                    block.flush(self._device, [*opened, *([disk] if disk >= 0 else [])], left)
                    while opened:
                        os.close(opened.pop())
                    if disk >= 0:
                        partitions.delete_all(disk, f"nbd{self.number}")
                except OSError as problem:      # a disk that fails is taken down all the same
                    left.append(f"{self.device}: the last flush failed ({problem.strerror}): what was written since the "
                                "last successful one may be lost")
                finally:
                    for fd in (*opened, *([disk] if disk >= 0 else [])):
                        os.close(fd)
                self._disconnect()
            except OSError as problem:
                left.append(f"{self.device}: {problem}")

        worker = threading.Thread(target=take_down, name=f"detach-{self.name}", daemon=True)
        worker.start()
        self._leash.join(worker, timeout, moving)
        late = worker.is_alive()
        if late:
            left.append(f"{self.device} did not answer for {timeout:g} s: its outstanding requests failed")
            left += self._try(watchdog.shut_down, self._socket)
            left += self._try(self._disconnect)
            worker.join(AFTER_ABORT)
        left += self._try(block.remove_node, self.device, self._device)
        if not self._wait_free():
            left += block.users_of(self._device, self.device, but=os.getpid() if worker.is_alive() else None)
        left += self._try(watchdog.shut_down, self._socket)
        if not self.partitions.stop(AFTER_ABORT):
            left.append(f"{self.device}: the thread that reads its partition table did not end")
        os.close(self._socket)
        left += self._try(self._leash.end)
        return left

    def _wait_free(self) -> bool:
        """Whether the driver lets the device go within GRACE seconds: nobody has it open any more."""
        end = time.monotonic() + GRACE
        while block.is_driven(self._device) and self._is_ours():
            if time.monotonic() >= end:
                return False
            time.sleep(0.002)
        return True

    @staticmethod
    def _try(action: object, *arguments: object) -> list[str]:
        try:
            action(*arguments)  # type: ignore[operator]
        except FileNotFoundError:
            return []       # the watchdog was faster
        except OSError as problem:
            return [f"{getattr(action, '__name__', '').strip('_').replace('_', ' ')}: {problem}"]
        return []


def left_devices(runtime_dir: str | os.PathLike[str]) -> list[tuple[int, str, int, str]]:
    """(number, name, process, identifier) of every device that was attached for this runtime directory, a living
    process's too."""
    found = []
    for number, known_by in watchdog.nbd_devices():
        match = re.fullmatch(r"muenfast:([^:]*)-(\d+):(.*)", known_by)
        if match and match[3] == os.path.abspath(runtime_dir):
            found.append((number, match[1], int(match[2]), known_by))
    return found


def reclaim_name(runtime_dir: str | os.PathLike[str], name: str) -> list[str]:
    """Takes down whatever dead processes left of attachments called *name*; sentences on what could not be.

    Precondition: the caller holds the claim on the name, so nobody alive uses it.
    """
    left: list[str] = []
    for number, owner, _, known_by in left_devices(runtime_dir):
        if owner == name:
            left += watchdog.nbd_release(known_by, f"/dev/{name}")
            if (number, known_by) in watchdog.nbd_devices(known_by):
                left += block.users_of(_device_of(number), _path_of(number))
    return left
