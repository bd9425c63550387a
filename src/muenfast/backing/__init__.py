"""What stands behind an export: ram:SIZE[:NAME], null:SIZE, py:MODULE:CLASS[:ARG], or a file, disk or partition."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from muenfast import params
from muenfast._ring import layout
from muenfast._store import Store
from muenfast.errors import UsageError

BLOCK = layout()["block_size"]
SECTOR = 512  # the smaller unit that a transport with a choice may use
DEFAULT_DEVICE = "ram:64M"
DEFAULT_POOL = 4  # threads of a user-space store
DEFAULT_TIMEOUT = 30.0  # seconds; as Linux' SCSI disks have


@dataclass(frozen=True, slots=True)
class Device:
    """One parsed entry of --device; nothing is opened yet.

    kind: "ram", "null", "py" or "file". size: bytes, for ram and null. name: of the region that keeps a RAM disk.
    path: of the file. partition: its partition of that number only, 0: all of it. module, attribute, argument: of a
    user-space store, where its class is, and what that is called with; or made: the object itself.
    """

    text: str
    kind: str
    size: int = 0
    name: str | None = None
    path: str = ""
    partition: int = 0
    module: str = ""
    attribute: str = ""
    argument: str | None = None
    made: object = None

    @classmethod
    def parse(cls, text: str, *, option: str | None = None, index: int | None = None) -> Device:
        """Raises UsageError. A file called ram:x is reached as ./ram:x; one that is called x#2 is that file, and
        partition 2 of x only where there is none."""
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise UsageError("an entry must be encodable as a file name", option=option, index=index, value=text) from None
        kind, colon, rest = text.partition(":")
        if colon and kind in ("ram", "null"):
            size, colon, name = rest.partition(":")
            if colon and (kind == "null" or not name):
                raise UsageError("a RAM disk is ram:SIZE or ram:SIZE:NAME, a null disk null:SIZE",
                                 option=option, index=index, value=text)
            try:
                nbytes = params.size(option, index, size, multiple=BLOCK, least=BLOCK)
            except UsageError as error:
                raise UsageError(error.rule, option=option, index=index, value=text) from None
            return cls(text, kind, size=nbytes, name=name or None)
        if colon and kind == "py":
            module, _, rest = rest.partition(":")
            attribute, colon, argument = rest.partition(":")
            if not module or not attribute:
                raise UsageError("a disk written in Python is py:MODULE:CLASS or py:MODULE:CLASS:ARG", option=option,
                                 index=index, value=text, hint="MODULE is a module's name, or the path of a file x.py")
            return cls(text, kind, module=module, attribute=attribute, argument=argument if colon else None)
        if not text:
            raise UsageError("an entry must not be empty", option=option, index=index, value=text)
        partition = re.fullmatch("(.+)#([0-9]{1,9})", text, re.DOTALL)
        there = os.path.lexists(text) or partition is not None and os.path.lexists(partition[1])
        if colon and kind.isalpha() and "/" not in text and not there:
            raise UsageError(f"there is no kind of device {kind!r}, and no file of that name", option=option, index=index,
                             value=text, hint="kinds are ram:SIZE, ram:SIZE:NAME, null:SIZE and py:MODULE:CLASS; a file is "
                                  f"./{text}")
        if partition is None or os.path.exists(text):
            return cls(text, "file", path=text)
        if int(partition[2]) == 0:
            raise UsageError("partitions are numbered from 1", option=option, index=index, value=text)
        return cls(text, "file", path=partition[1], partition=int(partition[2]))


class Backing:
    """An opened device and the Store that the engine uses; context manager.

    disk: number of the block device that it is or lies on, 0: of none. left_over: bytes at its end, less than a sector,
    that are not in the store.
    """

    store: Store
    disk = 0
    left_over = 0

    def check_resize(self, size: int | None, force: bool) -> bool:
        """Whether resize() would change anything, or may. Raises what it would, as far as that is known before; engines may
        run."""
        if type(self).resize is Backing.resize:
            self.resize(size, force)
        return True

    def resize(self, size: int | None, force: bool) -> None:
        """Gives the disk another size, and `store` anew with the same identity and blocks; no engine may use the old one.

        size: bytes, a multiple of the store's block_size and at least BLOCK; None: what is behind the disk has by now.
        force: it may become smaller, either way. Raises UsageError, OSError; `store` then holds what it did before.
        """
        raise UsageError("this kind of disk keeps its size", hint="destroy the export, and create it with another one")

    def keep(self) -> None:
        """What opening made stays; without this call close() takes it away again."""

    def tell(self) -> None:
        """Logs what has gone wrong behind the disk and no request could say; asked a few times a second."""

    def hasten(self) -> None:
        """The export ends: what is waited for without an engine, in resize(), is not any longer. By any thread."""

    def close(self) -> None:
        """Gives the device back. No engine may still use the store."""
        raise NotImplementedError

    def __enter__(self) -> Backing:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_shrink(old: int, new: int, force: bool, *, found: bool = False) -> None:
    """Raises UsageError where a disk of `old` bytes would lose some without force. found: what is behind it has the new
    size already."""
    if new >= old or force:
        return
    if found:
        raise UsageError(f"what is behind the disk has become shorter: {new} bytes, not {old}",
                         hint="--force takes that over")
    raise UsageError(f"the disk has {old} bytes: what is beyond the new end would be lost", value=new,
                     hint="--force cuts it off")


@contextlib.contextmanager
def lengthening(what: str) -> Iterator[None]:
    """Within, the kernel's refusal of a size is a UsageError. what: of which kind there is none so long."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL, errno.ENOMEM, errno.EOVERFLOW):
            raise
        raise UsageError(f"no {what} of that size is to be had: {error.strerror}") from error


def resized_text(kind: str, size: int) -> str:
    """ram:SIZE or null:SIZE of a disk whose size has changed."""
    power = next(power for power in (30, 20, 10, 0) if size % (1 << power) == 0)
    return f"{kind}:{size >> power}{ {30: 'G', 20: 'M', 10: 'K', 0: ''}[power]}"


def open_device(device: Device, *, read_only: bool = False, option: str | None = None, index: int | None = None,
                pool: int = DEFAULT_POOL, timeout: float = DEFAULT_TIMEOUT) -> Backing:
    """Opens a device, exclusively unless read_only. pool, timeout: threads of a user-space store, and seconds that it has
    for an answer. Raises UsageError, ClaimError, StoreError, OSError."""
    if device.kind == "ram":
        from muenfast.backing.ram import RamBacking

        return RamBacking(device, read_only=read_only)
    if device.kind == "null":
        from muenfast.backing.null import NullBacking

        return NullBacking(device, read_only=read_only)
    if device.kind == "py":
        from muenfast.backing.user import UserBacking

        return UserBacking(device, read_only=read_only, pool=pool, timeout=timeout)
    from muenfast.backing.file import FileBacking

    return FileBacking(device, read_only=read_only, option=option, index=index)
