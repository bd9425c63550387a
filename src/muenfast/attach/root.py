"""What takes privileges for /dev/muendiskX: claims on names, mounts, loop devices, nodes, the watchdog; by this process.

All by the device's name, and only of what was made here under that name. broker/disks.py has the same for a process without
privileges: there a Root does it in another one, for a client that it does not trust, whose file system it mounts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from muenfast import shm
from muenfast.attach import block, fuseuring, loop, nbdkernel, partitions, watchdog
from muenfast.attach.leash import Leash
from muenfast.errors import ClaimError

CLEANING = 5.0  # seconds for a process that cleans up after a dead client to give its name back
_DISK = "disk"  # the one file of a mount


@dataclass(frozen=True, slots=True)
class Mount:
    """A FUSE file system that nobody serves yet. fd: /dev/fuse, connection, abort: as FuseDisk has them; the receiver's.
    ring: whether the kernel may offer FUSE over io_uring."""

    mountpoint: str
    fd: int
    connection: int
    abort: int
    ring: bool


@dataclass(slots=True)
class _Held:
    """What was made for a device. loop: its number, -1: none."""

    mountpoint: str
    offer: contextlib.ExitStack     # of FUSE over io_uring
    loop: int = -1


class Root:
    """See above. runtime_dir: the private mount points are runtime_dir/mnt/NAME-PID. All raise OSError (filename set)."""

    def __init__(self, runtime_dir: str | os.PathLike[str]) -> None:
        self.runtime_dir = os.path.abspath(runtime_dir)
        self._held: dict[str, _Held] = {}
        self._offers = threading.Lock()

    def available(self) -> str | None:
        """fuse.available()."""
        from muenfast.attach import fuse

        return fuse.available()

    # -------------------------------------------------------------- names

    def claim(self, name: str) -> shm.Claim | None:
        """The claim on a name; None where it is somebody's. One who only cleans up after a dead client is waited for."""
        end = time.monotonic() + CLEANING
        while True:
            try:
                return shm.claim(f"name-{name}", f"/dev/{name}")
            except ClaimError:
                holder = shm.holder(f"name-{name}")
                if holder is not None and not holder.get("cleaning") or time.monotonic() > end:
                    return None
            time.sleep(0.01)

    def reclaim(self, name: str) -> list[str]:
        """Takes away what a dead client left under a name; sentences on what could not be. Precondition: claimed."""
        from muenfast.attach import fuse

        return fuse.reclaim_name(self.runtime_dir, name) + nbdkernel.reclaim_name(self.runtime_dir, name)

    # -------------------------------------------------------------- the mount

    def mount(self, name: str, *, read_only: bool, max_io: int, uring: str) -> Mount:
        """A file system at a mount point of its own; mounted() is due. uring: see fuseuring.offered()."""
        from muenfast.attach import fuse
        from muenfast.attach._fuse import mount

        directory = Path(self.runtime_dir, "mnt", f"{name}-{os.getpid()}")
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.exists():      # an earlier process of this number, for the name is claimed
            fuse.release(str(directory), name)
        with contextlib.ExitStack() as undo:
            directory.mkdir(mode=0o700)
            undo.callback(directory.rmdir)
            offer = undo.enter_context(contextlib.ExitStack())
            ring = offer.enter_context(fuseuring.offered(self.runtime_dir, uring))
            made = Mount(str(directory), *mount(str(directory), read_only, max_io), ring)
            undo.pop_all()
        self._held[name] = _Held(made.mountpoint, offer)
        return made

    def mounted(self, name: str) -> None:
        """It is served, or is not going to be: until then the kernel offers FUSE over io_uring. Idempotent."""
        if (held := self._held.get(name)) is not None:
            with self._offers:
                held.offer.close()

    def mountpoint(self, name: str) -> str:
        """Where it was mounted."""
        return self._held[name].mountpoint

    def unmount(self, name: str, force: bool) -> None:
        """Takes the mount out of the tree (lazily); force: and aborts its connection. Nothing where it is gone."""
        watchdog.umount(self._held[name].mountpoint, watchdog.MNT_DETACH | (watchdog.MNT_FORCE if force else 0))

    def rmdir(self, name: str) -> None:
        """The last that is left of it. Raises FileNotFoundError where the watchdog was faster."""
        try:
            os.rmdir(self._held[name].mountpoint)
        except FileNotFoundError:
            del self._held[name]
            raise
        del self._held[name]

    def resize_file(self, name: str, size: int, read_only: bool) -> None:
        """The file is told its size, for that has the kernel take it over. May wait for writes under way."""
        path = f"{self._held[name].mountpoint}/{_DISK}"
        if read_only:
            os.stat(path, follow_symlinks=False)
            return
        fd = loop.open_file(path, os.O_RDWR)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    # -------------------------------------------------------------- the watchdog

    def watch(self, name: str, thread: int, abort: int) -> Leash:
        """Has a watchdog look after it. thread: one of this process that receives. abort: Mount.abort."""
        return Leash("fuse", thread, [str(abort), self._held[name].mountpoint, f"/dev/{name}"],
                     [abort] if abort >= 0 else [])

    # -------------------------------------------------------------- the loop device

    def loop(self, name: str, *, read_only: bool, max_io: int, block_size: int, discard: bool) -> int:
        """loop.attach() to the mount's file."""
        held = self._held[name]
        held.loop = loop.attach(f"{held.mountpoint}/{_DISK}", read_only=read_only, max_io=max_io, block_size=block_size,
                                discard=discard)
        return held.loop

    def owns(self, name: str) -> bool:
        """Whether the loop device still has that file."""
        held = self._held.get(name)
        return held is not None and held.loop >= 0 and loop.backing_file(held.loop) == f"{held.mountpoint}/{_DISK}"

    def free_loop(self, name: str, timeout: float = 1.0) -> bool:
        """loop.detach()."""
        held = self._held.get(name)
        return held is None or held.loop < 0 or loop.detach(held.loop, timeout, f"{held.mountpoint}/{_DISK}")

    def resize_loop(self, name: str, size: int) -> None:
        """loop.resized()."""
        if self.owns(name):
            loop.resized(self._held[name].loop, size)

    def open(self, name: str) -> int:
        """The loop device, to be read, and flushed."""
        return os.open(loop.path_of(self._number(name)), os.O_RDONLY | os.O_CLOEXEC)

    def sync(self, name: str) -> list[str]:
        """block.sync_mounts()."""
        return block.sync_mounts(os.makedev(loop.LOOP_MAJOR, self._number(name)))

    def users(self, name: str, but: int | None) -> list[str]:
        """block.users_of()."""
        return block.users_of(os.makedev(loop.LOOP_MAJOR, self._number(name)), f"/dev/{name}", but=but)

    def make_node(self, name: str) -> None:
        """loop.make_node()."""
        loop.make_node(name, self._number(name))

    def remove_node(self, name: str) -> None:
        """Nothing where it is another's, or gone."""
        block.remove_node(f"/dev/{name}", os.makedev(loop.LOOP_MAJOR, self._number(name)))

    def partitions(self, name: str) -> partitions.Acts:
        """What its partitions need."""
        number = self._number(name)
        return partitions.Acts(name, f"loop{number}", loop.path_of(number))

    def _number(self, name: str) -> int:
        number = self._held[name].loop
        if number < 0:
            raise OSError(errno.ENODEV, "it has no loop device", f"/dev/{name}")
        return number
