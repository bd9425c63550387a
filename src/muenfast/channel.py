"""One process's end of a channel: its region, its bell and, on the writing side, the claim on it."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from muenfast import partition, shm
from muenfast._ring import Reader, Writer, layout
from muenfast.errors import ClaimError, UsageError

log = logging.getLogger("muenfast")

_HEADER: int = layout()["header_size"]
_TRANSPORT: int = layout()["transport"]
BELL = 4096  # bytes of a bell region: one page
NETWORK_PROTOCOL = 2  # of an interface's channels where none is named
# Elements of an interface's channel that is made because it is missing: a window of long packets, as far as that stays in
# caches.
_LEAST_ELEMENTS, _MOST_ELEMENTS, _REGION_BYTES = 256, 1024, 4 << 20
# What the making of a bell may fail with where the channel is no place for one: a file system that takes no new
# files (muenfs, sysfs), a directory or a peer's bell that we may not write. Then both sides poll.
_NO_BELL = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTSUP, errno.EINVAL,
                      errno.ENAMETOOLONG))


def remove(locator: shm.Locator, *, force: bool = False) -> None:
    """shm.remove_region(), where a path names a channel, or what may become one: no other file goes by mistake.

    Raises UsageError and ClaimError, too, where it is anything else or a disk that is served.
    """
    if locator.posix or locator.size is not None:
        shm.remove_region(locator, force=force)
        return
    seen = os.lstat(locator.path)
    if not stat.S_ISREG(seen.st_mode):
        raise UsageError("is no regular file, so no channel", value=locator.text, hint="rm removes it")
    with open(locator.path, "rb") as file:
        head = file.read(4096)
    if int.from_bytes(head[:8], sys.byteorder) != _TRANSPORT and head.strip(b"\0"):
        raise UsageError("is no channel, by its first bytes", value=locator.text, hint="rm removes it")
    with shm.apart(locator, disk=False):
        shm.remove_region(locator, force=force)


def network_region_size(element: int) -> int:
    """Bytes of an interface's channel that is made, of elements of so many bytes."""
    elements = min(_MOST_ELEMENTS, max(_LEAST_ELEMENTS, _REGION_BYTES // element))
    return -(-(_HEADER + elements * element) // BELL) * BELL


def _contents(view: memoryview) -> str | None:
    """What a region that is no channel holds, as far as it has a mark."""
    head = bytes(view[:4096])
    if int.from_bytes(head[:8], sys.byteorder) == _TRANSPORT:
        return None
    return partition.contents(head)


def wanted(locator: shm.Locator, *, writes: bool, create: int, bell: bool, permit: shm.Permit | None = None,
           buffer: bool = False) -> Iterator[shm.Wanted]:
    """What an End of these would make, for shm.made_ahead. Without what a strict one-way reader looks at first."""
    if permit is not None or not locator.posix or not (writes or bell):
        return
    yield locator, create, writes
    where = locator.bell if bell and not buffer else None
    if where is not None:
        yield where, BELL, True


class End:
    """The end of one channel; a context manager.

    locator: what names the region. writes: whether this is the writing end, of which there is one: claimed in the
    name of `role`, with `more` in the record of the claim. buffer: no channel, but a plain region that both sides write,
    of one connection: "server" or "client" claims that side of it. create: bytes of the region when a POSIX name is
    missing, None: it must exist. least: bytes it must have. bell: False: none is made or used (strict one-way), and the
    reader of a region that exists leaves no trace that its writer could see (shm.Region.open_unseen). Where that cannot be
    (missing, holes, links, made anew) it is told, and goes on as any reader; with `permit` it is refused, and a region that
    was made anew is not followed. permit: as the region has to be, and its bell, but that its group writes, too; both must
    be there then.

    Raises UsageError, ClaimError, PeerError, OSError; nothing is left behind then.
    """

    def __init__(self, locator: str | shm.Locator, *, writes: bool, role: str, create: int | None = None,
                 least: int = _HEADER + 1, bell: bool = True, buffer: str | None = None,
                 more: dict[str, Any] | None = None, permit: shm.Permit | None = None) -> None:
        self.locator = shm.Locator.parse(locator) if isinstance(locator, str) else locator
        self.claim: shm.Claim | None = None
        self.permit = permit
        self._process = os.getpid()
        if permit is not None or not self.locator.posix:
            create = None
        self._told = False
        self.bell: shm.Region | None = None
        what = "channel" if buffer is None else "buffer"
        if self.locator.offset % 8:
            raise UsageError(f"a {what} starts at a multiple of 8 bytes", value=self.locator.text)
        with ExitStack() as stack:
            try:
                region = None if bell or writes or buffer is not None else self._unseen(missing=create is not None)
                if region is None:
                    region = shm.Region.open(self.locator, writable=writes, create=create, permit=permit)
                self.region = region
            except FileNotFoundError as error:
                if error.filename != self.locator.path:     # of the book-keeping
                    raise
                if permit is not None:
                    raise FileNotFoundError(error.errno, f"{error.strerror} (`muenfast policy apply` makes it)",
                                            error.filename) from error
                how = "`muenfast chan create`" if self.locator.posix else "`truncate -s 1M`, for example"
                raise FileNotFoundError(error.errno, f"{error.strerror} (make it first, with {how})",
                                        error.filename) from error
            stack.callback(lambda: self.region.close())
            if not self.region.unseen:
                stack.enter_context(shm.apart(self.locator, disk=False))
            if writes:
                self._spare(what, channel=buffer is None)
            if len(self.region.view) < least:
                step = "remove it" if self.locator.posix else "make it longer"
                raise UsageError(f"{what} {self.locator.text} has {len(self.region.view)} bytes, at least {least} are "
                                 "needed", hint=f"{step}, or name another")
            if buffer is not None:
                self.claim = stack.enter_context(shm.claim_buffer(self.region, buffer, role))
            elif writes:
                self.claim = stack.enter_context(shm.claim_writer(self.region, role, more))
            where = self.locator.bell if bell else None
            if where is not None and permit is not None:
                self.bell = stack.enter_context(shm.Region.open(where, writable=True, permit=dataclasses.replace(
                    permit, mode=permit.mode | (permit.mode & 0o040) >> 1)))
            elif where is not None:
                try:
                    self.bell = stack.enter_context(shm.Region.open(where, writable=True, create=BELL))
                except OSError as error:
                    if error.errno not in _NO_BELL:
                        raise
                    log.info("channel %s: no bell (%s), waiting means polling", self.locator.text, error.strerror)
            self._stack = stack.pop_all()

    def _unseen(self, missing: bool) -> shm.Region | None:
        """The region of a strict one-way reader. None: it cannot be unseen, which is told, or refused by a policy. missing:
        that it does not exist is such a case."""
        try:
            return shm.Region.open_unseen(self.locator, permit=self.permit)
        except shm.SeenError as error:
            if self.permit is not None:
                raise
            reason = f"{error.rule} ({error.hint})" if error.hint else error.rule
        except FileNotFoundError:
            if not missing:
                raise
            reason = "it does not exist, and is made here (`muenfast chan create` makes it before)"
        log.warning("channel %s: its writer sees this reader, strict one-way or not: %s", self.locator.text, reason)
        return None

    def _spare(self, what: str, *, channel: bool) -> None:
        """Raises UsageError, ClaimError where the region is somebody's disk."""
        # A buffer may rightly begin with blocks of a disk that went through it, but that disk has another size.
        found = _contents(self.region.view) if channel else None
        if not channel and not self.locator.posix:
            found = partition.image(bytes(self.region.view[:4096]), os.stat(self.locator.path).st_size)
        if found is not None:
            raise UsageError(f"{what} {self.locator.text} holds {found}, which would be overwritten",
                             hint="name another, or remove it")
        if not self.locator.posix and (loop := shm.loop_on(self.locator.path)) is not None:
            raise ClaimError(f"{what} {self.locator.text}", f"the loop device {loop}", hint="name another file")

    @property
    def view(self) -> memoryview:
        """The region's memory."""
        return self.region.view

    @property
    def bell_view(self) -> memoryview | None:
        """The bell's memory, None without one."""
        return None if self.bell is None else self.bell.view

    def replaced(self) -> bool:
        """Whether the channel's name means another region now, or none. To the strict one-way reader of a policy it never
        does: it opens one once, and says that."""
        if not self.region.replaced():
            return False
        once = self.region.unseen and self.permit is not None
        if once and not self._told:
            self._told = True
            log.error("channel %s was removed, or made anew: a strict one-way reader, which opens it once, hears no more; "
                      "start it again", self.locator.text)
        return not once

    def remap(self) -> bool:
        """Maps the same region anew, after a peer truncated it and gave it its size back; whether it could.

        An engine that still holds the old view keeps that memory mapped until it lets go. Raises OSError, PeerError.
        """
        if self.region.truncated():
            return False
        fresh = self.region.again() if self.region.unseen else \
            shm.Region.open(self.locator, writable=self.region.writable, permit=self.permit)
        if (fresh.device, fresh.inode) != (self.region.device, self.region.inode) or \
                len(fresh.view) < len(self.region.view):
            fresh.close(keep=True)
            return False
        # Opened before the old one is left: we stay a user of the region all the time.
        self.region.close(keep=True)
        self.region = fresh
        return True

    def close(self) -> None:
        """Leaves the channel; the last clean leaver removes what was made automatically. In a child of fork(), where it is
        the parent's, nothing happens."""
        if os.getpid() == self._process:
            self._stack.close()

    def __enter__(self) -> End:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_writer(name: str, *, size: int, protocol: int, region_size: int = 1 << 20, epoch: int | None = None,
                bell: bool = True) -> Writer:
    """Claims the writing side of the channel `name` (made with region_size bytes if missing) and activates it.

    size: bytes of an element. bell: False: strict one-way. Raises UsageError, ClaimError, PeerError, OSError.
    """
    end = End(name, writes=True, role="writer", create=region_size, least=_HEADER + size, bell=bell)
    try:
        writer = Writer(end.view, size=size, protocol=protocol, epoch=epoch, bell=end.bell_view, name=name)
    except BaseException:
        end.close()
        raise
    writer.owner = end
    return writer


def open_reader(name: str, *, protocol: int | None = None, size: int | None = None, region_size: int = 1 << 20,
                bell: bool = True, poll: int | None = None) -> Reader:
    """A reader of the channel `name` (made with region_size bytes if missing), mapped read-only.

    protocol, size: what the channel must have, None accepts any. bell: False: strict one-way: of a region that exists (on a
    tmpfs without holes) its writer sees nothing of us that the kernel does not show (docs/security.md); a log line says so
    where it is another. Raises UsageError, PeerError, OSError.
    """
    end = End(name, writes=False, role="reader", create=region_size, bell=bell)
    try:
        reader = Reader(end.view, protocol=protocol, size=size, bell=end.bell_view, poll=poll, name=name)
    except BaseException:
        end.close()
        raise
    reader.owner = end
    return reader
