"""How names and errors stand in a line of text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from muenfast.errors import describe

__all__ = ["describe", "export_line", "user_lines", "word"]


def word(text: str) -> str:
    """text as one word: white space, control characters and backslashes as \\ooo, the way /proc/mounts does it."""
    return "".join(each if each.isprintable() and each not in " \\" else
                   "".join(f"\\{byte:03o}" for byte in os.fsencode(each)) for each in text)


def export_line(req: str, resp: str, disks: Iterable[tuple[int, str]], *, read_only: bool, buffer: str | None) -> str:
    """`export REQ RESP SIZE DEVICE [SIZE DEVICE ...] [read-only] [shm BUFFER]`."""
    return " ".join(["export", word(req), word(resp), *(f"{size} {word(device)}" for size, device in disks),
                     *(["read-only"] if read_only else []), *(["shm", word(buffer)] if buffer is not None else [])])


def user_lines(entry: Mapping[str, object]) -> Iterator[str]:
    """Of an export's status: the calls of its disks written in Python, the faults that were injected; where it has such."""
    for key, text in (("store", "its calls"), ("injected", "injected")):
        counters = entry.get(key)
        if isinstance(counters, dict):
            yield f"    {text}: {', '.join(f'{name} {value}' for name, value in counters.items())}"
