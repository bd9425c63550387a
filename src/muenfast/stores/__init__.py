"""Disks written in Python, to use and to read: `--device py:muenfast.stores:Ram:64M`. docs/stores.md has the rules."""

from __future__ import annotations

from muenfast.stores.overlay import Overlay
from muenfast.stores.parts import Parts
from muenfast.stores.ram import Ram

__all__ = ["Overlay", "Parts", "Ram"]
