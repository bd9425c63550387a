"""Disks and networks across the one-way channels of the Muen separation kernel, in user space.

Importing opens nothing and loads nothing compiled; names come when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muenfast._ring import Reader, Result, Writer
    from muenfast.aio import AsyncBlockDevice
    from muenfast.blk import BlockServer, serve
    from muenfast.channel import open_reader, open_writer
    from muenfast.disk import BlockDevice
    from muenfast.errors import BrokenChannelError, ClaimError, MuenfastError, PeerError, StoreError, UsageError
    from muenfast.export import ExportConfig, exports_from_lists
    from muenfast.net import InterfaceConfig, Interfaces, interfaces_from_lists

__version__ = "0.1.0"

_HOME = {
    "Reader": "_ring", "Result": "_ring", "Writer": "_ring", "open_reader": "channel", "open_writer": "channel",
    "AsyncBlockDevice": "aio", "BlockDevice": "disk", "BlockServer": "blk", "ExportConfig": "export",
    "exports_from_lists": "export", "serve": "blk",
    "InterfaceConfig": "net", "Interfaces": "net", "interfaces_from_lists": "net",
    "BrokenChannelError": "errors", "ClaimError": "errors", "MuenfastError": "errors", "PeerError": "errors",
    "StoreError": "errors", "UsageError": "errors",
}

__all__ = ["AsyncBlockDevice", "BlockDevice", "BlockServer", "BrokenChannelError", "ClaimError", "ExportConfig",
           "InterfaceConfig", "Interfaces", "MuenfastError", "PeerError", "Reader", "Result", "StoreError", "UsageError",
           "Writer", "exports_from_lists", "interfaces_from_lists", "open_reader", "open_writer", "serve"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
