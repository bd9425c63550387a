"""How names and errors stand in a line of text."""

from __future__ import annotations

import os


def word(text: str) -> str:
    """text as one word: white space, control characters and backslashes as \\ooo, the way /proc/mounts does it."""
    return "".join(each if each.isprintable() and each not in " \\" else
                   "".join(f"\\{byte:03o}" for byte in os.fsencode(each)) for each in text)


def describe(error: Exception) -> str:
    """An error in one line; of an OSError what the kernel refused and the path, once, without the number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    path = error.filename
    if path is None or os.fsdecode(path) in error.strerror:
        return error.strerror
    return f"{os.fsdecode(path)}: {error.strerror}"
