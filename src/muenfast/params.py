"""Comma lists as kernel modules take them: split, paired by position, each entry checked where it stands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from muenfast.errors import UsageError

MOST_NAME = 15  # bytes of an interface's name: IFNAMSIZ - 1 of linux/if.h
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]{1,20}|[0-9]{1,20})(?:([KMGTkmgt])(?:i?B)?)?\Z")
_UNIT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_YES, _NO = frozenset(("1", "y", "yes", "true", "on")), frozenset(("0", "n", "no", "false", "off"))


def split(option: str, text: str, *, empty: bool = False) -> list[str]:
    """The entries of a comma list. empty: whether an entry may be empty. Raises UsageError."""
    if not isinstance(text, str):
        raise UsageError("a list is one text, its entries joined by commas", option=option, value=text)
    entries = [entry.strip() for entry in text.split(",")]
    if not empty:
        for index, entry in enumerate(entries):
            if not entry:
                raise UsageError(f"an entry must not be empty (the list is {text!r})", option=option, index=index,
                                 value=entry)
    return entries


def same_length(lists: Mapping[str, Sequence[object] | None]) -> int:
    """The common length of all given lists (None: not given); raises UsageError naming the odd one."""
    given = [(option, entries) for option, entries in lists.items() if entries is not None]
    first_option, first = given[0]
    for option, entries in given[1:]:
        if len(entries) != len(first):
            index = min(len(entries), len(first))
            more = len(entries) > len(first)
            what = f"has no partner in {first_option}" if more else "is missing"
            raise UsageError(f"lists are paired by position: entry {index} (counted from 0) {what}, there are "
                             f"{len(entries)} here and {len(first)} in {first_option}", option=option, index=index,
                             value=entries[index] if more else None)
    return len(first)


def apart(spans: Sequence[tuple[str, int, str, str, int, float]], rule: str) -> None:
    """Raises UsageError for the second of two (option, index, text, path, start, end) that share a byte of a file."""
    for i, (option, index, text, path, start, end) in enumerate(spans):
        for first_option, first_index, _, first_path, first_start, first_end in spans[:i]:
            if path == first_path and start < first_end and first_start < end:
                same = (first_option, first_index) == (option, index)
                other = "another one of the same entry" if same else f"{first_option}, entry {first_index}"
                raise UsageError(f"{rule}; this overlaps {other}",
                                 option=option, index=index, value=text)


def size(option: str | None, index: int | None, text: str, *, multiple: int = 1, least: int = 1) -> int:
    """Bytes from "4096", "0x8000", "64M", "64m", "64MiB" (K, M, G, T are powers of 1024). Raises UsageError."""
    match = _SIZE.match(text)
    if match is None:
        raise UsageError("a size is a number of bytes, with K, M, G or T for powers of 1024, like 64M",
                         option=option, index=index, value=text)
    value = int(match[1], 16 if match[1][:2] in ("0x", "0X") else 10) << _UNIT[(match[2] or "").upper()]
    if value < least or value % multiple or value >= 1 << 62:
        rule = f"a size here is at least {least} bytes" if value < 1 << 62 else "a size here is below 2^62 bytes"
        if multiple > 1:
            rule += f" and a multiple of {multiple}"
        raise UsageError(rule, option=option, index=index, value=text)
    return value


def protocol(option: str | None, index: int | None, text: str) -> int:
    """A protocol id: hexadecimal, with or without 0x, 64 bits, not zero. Raises UsageError."""
    if not re.fullmatch(r"(0[xX])?[0-9a-fA-F]{1,16}", text) or int(text, 16) == 0:
        raise UsageError("a protocol is a non-zero hexadecimal number of at most 64 bits",
                         option=option, index=index, value=text)
    return int(text, 16)


def number(option: str | None, index: int | None, text: str, *, least: int, most: int, what: str) -> int:
    """A decimal number of `what` ("a pause in microseconds") from least to most. Raises UsageError."""
    if not re.fullmatch("[0-9]{1,20}", text) or not least <= int(text) <= most:
        raise UsageError(f"{what} is a number from {least} to {most}", option=option, index=index, value=text)
    return int(text)


def flag(option: str | None, index: int | None, text: str) -> bool:
    """yes/no, true/false, on/off, y/n, 1/0. Raises UsageError."""
    if text.lower() in _YES:
        return True
    if text.lower() in _NO:
        return False
    raise UsageError("an entry is yes or no", option=option, index=index, value=text)


def interface(option: str | None, index: int | None, text: str) -> str:
    """An interface's name as the kernel takes it (dev_valid_name; of a % it would make a number). Raises UsageError."""
    if len(text.encode(errors="surrogatepass")) > MOST_NAME:
        raise UsageError(f"interface name too long: a name has at most {MOST_NAME} bytes", option=option, index=index,
                         value=text)
    if text in ("", ".", "..") or not text.isprintable() or set(text) & set("/: %"):
        raise UsageError("an interface's name has no blanks, control characters, '/', ':' or '%', and is neither . nor ..",
                         option=option, index=index, value=text)
    return text
