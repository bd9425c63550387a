"""null:SIZE reads zeros and forgets writes."""

from __future__ import annotations

from muenfast._store import Store
from muenfast.backing import Backing, Device


class NullBacking(Backing):
    """A disk for measuring everything but the disk."""

    def __init__(self, device: Device) -> None:
        self.store = Store.null(device.size)

    def close(self) -> None:
        self.store.close()
