"""A disk's block device where the kernel has neither ublk nor nbd: FUSE file, loop device, node, watchdog.

Who may wait for whom: only the receive threads (and the target) answer I/O, and they touch neither the
mount nor the loop device. Every call here that may wait for an answer of theirs (open of the file,
fsync, LOOP_CLR_FD, last close) runs without the GIL, and in detach() on a thread of its own that is
waited for with a limit; the abort of the FUSE connection frees it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from muenfast.attach import loop, partitions, watchdog
from muenfast.attach.leash import AFTER_ABORT, Leash
from muenfast.attach.root import Root
from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast.attach._fuse import Target

try:
    from muenfast.attach._fuse import FuseDisk
except ImportError as error:
    FuseDisk = None  # type: ignore[assignment,misc]
    _missing = str(error)

CAP_SYS_ADMIN = 21      # uapi/linux/capability.h
GRACE = 1.0             # seconds for short users of the device (a probe, a last close) before it counts as busy
ATTACH_LIMIT = 10.0     # seconds the kernel has to make the loop device


class Info(TypedDict):
    """An attachment's record, as the claim on its name keeps it."""

    pid: int
    name: str
    device: str
    mountpoint: str
    loop: int
    connection: int
    watchdog: int


def unbuilt() -> str | None:
    """None where the compiled front end loads, else why not, with the next step."""
    if FuseDisk is None:
        return f"muenfast was built without it ({_missing}): install libfuse3-dev and build again"
    return None


def available() -> str | None:
    """None where this front end works, else the reason why not, with the next step."""
    if reason := unbuilt():
        return reason
    for path, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not os.path.exists(path):
            return f"{path} is missing: modprobe {module}"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1:
            return "mounting and making device nodes need CAP_SYS_ADMIN: run as root"
    return None


class FuseAttachment:
    """The block device /dev/NAME of a Target, from attach() to detach().

    device: its path. loop: number of the loop device behind it. disk: the FUSE session (counters).
    """

    def __init__(self, name: str, mountpoint: str, root: Root) -> None:
        """For attach() only."""
        self.name, self.mountpoint, self._root = name, mountpoint, root
        self.device = f"/dev/{name}"
        self.disk: FuseDisk
        self.loop: int
        self.partitions: partitions.Partitions
        self._status: list[int] = []
        self._threads: list[threading.Thread] = []
        self._leash: Leash
        self._attached = False

    @classmethod
    def attach(cls, target: Target, name: str, runtime_dir: str | os.PathLike[str], *, read_only: bool = False,
               threads: int = 1, depth: int = 64, max_io: int = 131072, plain: bool = False,
               uring: str = "auto", root: Root | None = None) -> FuseAttachment:
        """Make *target* appear as /dev/*name*; all or nothing.

        The caller holds the claim on *name* and stores info() in it. runtime_dir: the private mount point
        becomes runtime_dir/mnt/NAME-PID. read_only: also where the target could be written. threads: receive
        threads. depth, max_io, plain: see FuseDisk. uring: when to take FUSE over io_uring, see fuseuring.offered(). root:
        of what takes privileges, None: this process does it.
        Raises UsageError where available() says why not, OSError (filename set) for what the kernel refuses.
        """
        if root is None:
            root = Root(runtime_dir)
        if reason := root.available():
            raise UsageError("the FUSE front end is not to be had here", option="--attach", value="fuse",
                             hint=reason)
        read_only = read_only or target.read_only
        with contextlib.ExitStack() as undo:
            made = root.mount(name, read_only=read_only, max_io=max_io, uring=uring)
            undo.callback(root.rmdir, name)
            undo.callback(root.unmount, name, True)
            new = cls(name, made.mountpoint, root)
            try:
                new.disk = FuseDisk(target, new.mountpoint, read_only=read_only, depth=depth, max_io=max_io, plain=plain,
                                    ring=made.ring, mounted=(made.fd, made.connection, made.abort),
                                    unmount=functools.partial(root.unmount, name),
                                    resize=functools.partial(root.resize_file, name))
            finally:
                root.mounted(name)
            undo.callback(new._end_session)
            for number in range(threads):
                thread = threading.Thread(target=new._receive, name=f"fuse-{name}-{number}", daemon=True)
                thread.start()
                new._threads.append(thread)
            new._leash = root.watch(name, new._threads[0].native_id or 0, new.disk.abort_fd)
            undo.callback(new._leash.end)
            # Nothing here may wait without end for a target that does not answer, as udev's probe of the device does.
            limit = threading.Timer(ATTACH_LIMIT, new.disk.abort)
            limit.daemon = True
            limit.start()
            undo.callback(limit.join)
            undo.callback(limit.cancel)
            new.disk.attaching = True
            new.loop = root.loop(name, read_only=new.disk.read_only, max_io=max_io, block_size=target.block_size,
                                 discard=target.discards and target.zeroes)
            undo.callback(root.free_loop, name)
            root.make_node(name)
            undo.callback(root.remove_node, name)
            new.disk.attaching = False
            new.partitions = partitions.Partitions(name, f"loop{new.loop}", loop.path_of(new.loop),
                                                   block=target.block_size, watch=new.disk.watch,
                                                   event=new.disk.watch_fd, acts=root.partitions(name))
            undo.callback(new.partitions.stop, AFTER_ABORT)
            new.partitions.start()
            if limit.finished.is_set():
                raise TimeoutError(errno.ETIMEDOUT, f"no loop device within {ATTACH_LIMIT:g} s", new.device)
            limit.cancel()
            limit.join()
            undo.pop_all()
        new._attached = True
        return new

    def info(self) -> Info:
        """What reclaim() needs should this process die; fit for JSON."""
        return {"pid": os.getpid(), "name": self.name, "device": self.device, "mountpoint": self.mountpoint,
                "loop": self.loop, "connection": self.disk.connection, "watchdog": self._leash.pid}

    def resized(self) -> None:
        """Gives the device the target's size, whoever uses it. May wait for the target. Raises OSError (filename set)."""
        self.disk.resized()
        if self._owns_loop():
            self._root.resize_loop(self.name, self.disk.target.nblocks * self.disk.target.block_size)
        self.partitions.look()

    @property
    def failed(self) -> bool:
        """Whether the session ended by itself (somebody aborted it): the device only fails from then on."""
        return self._attached and not all(thread.is_alive() for thread in self._threads)

    def detach(self, timeout: float = 5.0, moving: Callable[[], bool] | None = None) -> list[str]:
        """Remove the device; returns within *timeout* and little more, whatever the target does.

        Dirty data is written first, while the target still answers; the timeout counts anew while moving() says so.
        Returns sentences on what was still in use or could not be finished; empty: nothing is left. A device in use loses
        its node, goes to autoclear and has its FUSE connection aborted: its users get EIO, and the kernel frees the loop
        device with its last close. Idempotent.
        """
        if not self._attached:
            return []
        self._attached = False
        end = time.monotonic() + timeout
        left: list[str] = []
        freed: list[bool] = []
        if not self._leash.tell(f"detaching {timeout + AFTER_ABORT:.3f}"):
            left.append(f"the watchdog of {self.device} had ended before")

        def take_down() -> None:
            try:
                self._root.remove_node(self.name)
                opened = self.partitions.open_all()
                try:
                    self.partitions.stop(min(GRACE, timeout / 2))
                    if not self._owns_loop():
                        freed.append(True)      # the watchdog or an administrator was faster
                        return
                    opened.append(self._root.open(self.name))
                    left.extend(self._root.sync(self.name))
                    for fd in opened:
                        os.fsync(fd)
                except OSError as problem:      # a disk that fails is taken down all the same
                    if self.disk.unflushed or not all(thread.is_alive() for thread in self._threads):
                        left.append(f"{self.device}: the last flush failed ({problem.strerror}): what was written since "
                                    "the last successful one may be lost")
                finally:
                    for fd in opened:
                        os.close(fd)
                freed.append(self._root.free_loop(self.name, min(GRACE, timeout / 2)))
            except OSError as problem:
                left.append(f"{self.device}: {problem}")

        worker = threading.Thread(target=take_down, name=f"detach-{self.name}", daemon=True)
        worker.start()
        self._leash.join(worker, timeout, moving)
        if worker.is_alive():
            left.append(f"{self.device} did not answer for {timeout:g} s: its outstanding requests failed")
        if freed != [True]:
            left += self._root.users(self.name, os.getpid() if worker.is_alive() else None)
            left += self._try(self.disk.exit)
            worker.join(AFTER_ABORT)
        if not self.partitions.stop(AFTER_ABORT):
            left.append(f"{self.device}: the thread that reads its partition table did not end")
        left += self._try(self._end_session, max(AFTER_ABORT, end - time.monotonic()))
        left += self._try(self._root.rmdir, self.name)
        left += self._try(self._leash.end)
        return left

    def _owns_loop(self) -> bool:
        return self._root.owns(self.name)

    def _receive(self) -> None:
        self._status.append(self.disk.run())

    def _end_session(self, timeout: float = AFTER_ABORT) -> None:
        """Unmount and free. Where that alone does not end the session, abort it: the loop device may keep it."""
        self.disk.unmount()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(min(GRACE, timeout / 2))
            if thread.is_alive():
                self.disk.exit()
                thread.join(max(0.1, end - time.monotonic()))
        self.disk.close(max(0.1, end - time.monotonic()))
        if bad := [status for status in self._status if status]:
            raise OSError(-bad[0], os.strerror(-bad[0]), "/dev/fuse")

    @staticmethod
    def _try(action: Callable[..., object], *arguments: object) -> list[str]:
        try:
            action(*arguments)
        except FileNotFoundError:
            return []       # the watchdog was faster
        except OSError as problem:
            return [f"{action.__name__.strip('_').replace('_', ' ')}: {problem}"]
        return []


def release(mountpoint: str, name: str) -> list[str]:
    """What is left of an attachment of that name; sentences on what could not be taken away."""
    return watchdog.release(mountpoint, f"/dev/{name}")


def reclaim(info: Info) -> list[str]:
    """Clean what a dead process left of an attachment: connection, loop device, mount, directory, node.

    info: what its info() was. Precondition: that process is dead (its claim was free). The loop device is
    only detached if its backing file lies below the recorded mount point, the node only removed if it is
    that loop device's. Returns sentences on what could not be cleaned; cleaning twice does no harm.
    Raises ValueError where *info* is none of ours.
    """
    name, mountpoint = info["name"], info["mountpoint"]
    if "/" in name or not os.path.isabs(mountpoint) or os.path.basename(mountpoint) != f"{name}-{info['pid']}":
        raise ValueError(f"not the record of an attachment: {info!r}")
    return release(mountpoint, name)


def reclaim_name(runtime_dir: str | os.PathLike[str], name: str) -> list[str]:
    """reclaim() for whatever dead processes left under *name*, whether or not their record survives.

    Precondition: the caller holds the claim on the name, so nobody alive uses it.
    """
    left: list[str] = []
    for mountpoint, owner, _ in mountpoints(runtime_dir):
        if owner == name:
            left += release(mountpoint, name)
    return left


def mountpoints(runtime_dir: str | os.PathLike[str]) -> list[tuple[str, str, int]]:
    """(path, name, process) of each attachment that has, or left, a mount point; the file systems are not touched."""
    parent = Path(os.path.abspath(runtime_dir), "mnt")
    found = []
    for entry in sorted(os.listdir(parent)) if parent.is_dir() else []:
        name, _, pid = entry.rpartition("-")
        if name and pid.isdecimal():
            found.append((str(parent / entry), name, int(pid)))
    return found
