"""How names and errors stand in a line of text."""

from __future__ import annotations

import os
from collections.abc import Iterable

from muenfast.errors import describe

__all__ = ["describe", "export_line", "word"]


def word(text: str) -> str:
    """text as one word: white space, control characters and backslashes as \\ooo, the way /proc/mounts does it."""
    return "".join(each if each.isprintable() and each not in " \\" else
                   "".join(f"\\{byte:03o}" for byte in os.fsencode(each)) for each in text)


def export_line(req: str, resp: str, disks: Iterable[tuple[int, str]], *, read_only: bool, buffer: str | None) -> str:
    """`export REQ RESP SIZE DEVICE [SIZE DEVICE ...] [read-only] [shm BUFFER]`."""
    return " ".join(["export", word(req), word(resp), *(f"{size} {word(device)}" for size, device in disks),
                     *(["read-only"] if read_only else []), *(["shm", word(buffer)] if buffer is not None else [])])
