"""null:SIZE reads zeros and forgets writes."""

from __future__ import annotations

from muenfast._store import Store
from muenfast.backing import Backing, Device, check_shrink
from muenfast.errors import UsageError


class NullBacking(Backing):
    """A disk for measuring everything but the disk."""

    def __init__(self, device: Device, *, read_only: bool) -> None:
        self.store = Store.null(device.size, read_only=read_only)

    def check_resize(self, size: int | None, force: bool) -> bool:
        if size is None:
            raise UsageError("nothing is behind a null disk whose size it could take over", hint="name a SIZE")
        check_shrink(self.store.size, size, force)
        return size != self.store.size

    def resize(self, size: int | None, force: bool) -> None:
        self.check_resize(size, force)
        assert size is not None
        old = self.store
        self.store = Store.null(size, read_only=old.read_only, identity=old.identity)
        old.close()

    def close(self) -> None:
        self.store.close()
