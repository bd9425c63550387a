"""ram:SIZE lives as long as its server; ram:SIZE:NAME lives in a named region and is adopted by the next server."""

from __future__ import annotations

import contextlib
import errno
import mmap
from contextlib import ExitStack

from muenfast import shm
from muenfast._store import Store
from muenfast.backing import Backing, Device, check_shrink, lengthening
from muenfast.errors import ClaimError, UsageError

_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; the mmap module names it from Python 3.13 on


class RamBacking(Backing):
    """A RAM disk. A named one is a POSIX region of exactly its size, kept until `chan rm NAME`."""

    def __init__(self, device: Device, *, read_only: bool) -> None:
        self._made: shm.Locator | None = None
        self._name = device.name
        self._memory: mmap.mmap | None = None
        with ExitStack() as stack:
            if device.name is None:
                # Private and not reserved: pages come with the first write to them.
                memory = mmap.mmap(-1, device.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
                stack.callback(memory.close)
                self._memory = memory
                self.store = Store.in_memory(memory, read_only=read_only, anonymous=True)
            else:
                locator = shm.Locator.parse(device.name)
                try:
                    shm.make_region(locator, device.size)
                    self._made = locator
                    stack.callback(self._unmake)
                except FileExistsError:
                    pass
                region = stack.enter_context(shm.Region.open(locator, writable=True))
                if len(region.view) != device.size:
                    raise UsageError(f"the region {device.name} has {len(region.view)} bytes, not {device.size}",
                                     hint="name its size, or remove it with `muenfast chan rm`")
                stack.enter_context(shm.apart(locator, disk=True, timeout=5.0))
                stack.enter_context(shm.claim(f"ram-{region.device}-{region.inode}", f"RAM disk {device.name}"))
                from hashlib import blake2b  # takes longer to load than a disk without a name to make

                identity = blake2b(f"ram:{region.device}:{region.inode}:{_boot()}".encode(), digest_size=16)
                self.store = Store.in_memory(region.view, read_only=read_only, identity=identity.digest())
            stack.callback(lambda: self.store.close())
            self._stack = stack.pop_all()

    def check_resize(self, size: int | None, force: bool) -> bool:
        if self._name is not None:
            raise UsageError(f"the region {self._name} is never resized: other processes may have it mapped",
                             hint="destroy the export, `muenfast chan rm` the region, and create it anew")
        if size is None:
            raise UsageError("nothing is behind a RAM disk whose size it could take over", hint="name a SIZE")
        check_shrink(self.store.size, size, force)
        return size != self.store.size

    def resize(self, size: int | None, force: bool) -> None:
        self.check_resize(size, force)
        assert size is not None and self._memory is not None
        old = self.store
        old.close()     # mremap(2) moves what nobody holds: data stays, and is not copied
        try:
            with lengthening("memory"):
                self._memory.resize(size)
        finally:
            self.store = Store.in_memory(self._memory, read_only=old.read_only, identity=old.identity, anonymous=True)

    def keep(self) -> None:
        self._made = None

    def _unmake(self) -> None:
        if self._made is not None:
            with contextlib.suppress(ClaimError, FileNotFoundError):  # somebody uses it, or took it away
                shm.remove_region(self._made)

    def close(self) -> None:
        self._stack.close()


def _boot() -> str:
    """The boot's id: inode numbers of /dev/shm start anew with each."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES):
            raise
        return ""
