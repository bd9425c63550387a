"""muenfast chan: channels as they stand in memory, decoded."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import struct
from collections.abc import Iterator
from typing import Any

from muenfast.cli._text import describe, word
from muenfast.errors import ClaimError, UsageError

log = logging.getLogger("muenfast")

_HEADER = struct.Struct("<8Q")
_LOCATOR = "NAME (POSIX shared memory), /path, /path@OFFSET+SIZE"
_UNSEEN = "Readers that are strict one-way are in nobody's books: they are no users here"
_FIELDS = ("transport", "epoch", "protocol", "size", "elements", "reserved", "wsc", "wc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """list, show, create, rm, dump."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, allow_abbrev=False,
                                  description=text[0].upper() + text[1:] + "." + (f" {more}." if more else ""))

    sub = action("list", "regions of POSIX shared memory that hold a channel, or may: unused ones", _UNSEEN)
    sub.add_argument("--json", action="store_true", help="print everything as JSON")
    sub.add_argument("--all", action="store_true", help="other regions of shared memory, too")
    sub = action("show", "one channel's header, counters and holders", _UNSEEN)
    sub.add_argument("channel", metavar="CHANNEL", help=_LOCATOR)
    sub.add_argument("--json", action="store_true", help="print everything as JSON")
    sub = action("create", "make regions that stay until they are removed")
    sub.add_argument("channel", metavar="CHANNEL", nargs="+", help=_LOCATOR)
    sub.add_argument("--size", default="1M", help="bytes, like 1M (default)")
    sub.add_argument("--mode", default="600", help="octal permissions (default: 600)")
    sub = action("rm", "remove regions and their bells; of paths only channels", _UNSEEN + "; they read nothing new then")
    sub.add_argument("channel", metavar="CHANNEL", nargs="+", help=_LOCATOR)
    sub.add_argument("--force", action="store_true", help="even while it is in use")
    sub = action("dump", "the readable elements of an active channel, the last ones first")
    sub.add_argument("channel", metavar="CHANNEL", help=_LOCATOR)
    sub.add_argument("-n", "--number", type=int, default=4, help="how many elements (default: 4)")
    sub.add_argument("--bytes", type=int, default=64, help="bytes of each (default: 64)")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs one action."""
    try:
        return int(globals()["_" + arguments.action](arguments))
    except (FileNotFoundError, FileExistsError) as error:
        raise _in_our_words(error) from error


def _in_our_words(error: Exception) -> Exception:
    """What the lack or the presence of a region means to somebody who named a channel."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(error.errno, "there is no such channel; `muenfast chan list` shows what there is",
                                 error.filename)
    if isinstance(error, FileExistsError):
        return FileExistsError(error.errno, "it exists already; `muenfast chan show` tells what it is", error.filename)
    return error


def look(channel: str) -> dict[str, Any]:
    """What stands in a channel's header and bell, who uses it; every value is as found, checked for nothing."""
    from muenfast import shm
    from muenfast._ring import bell_state, layout

    locator = shm.Locator.parse(channel)
    with _observe(locator) as region:
        size = len(region.view)
        users = [user for user in shm.users(region) if user["pid"] != os.getpid()]  # we only look
        found: dict[str, Any] = {"name": channel, "bytes": size, "users": users, "writer": shm.writer_holder(region)}
        if size >= _HEADER.size:
            found.update(zip(_FIELDS, _HEADER.unpack(region.view[:_HEADER.size]), strict=True))
            found["channel"] = found["transport"] == layout()["transport"]
            found["fits"] = bool(found["size"] and found["elements"]
                                 and found["size"] * found["elements"] <= size - _HEADER.size)
        else:
            found["channel"] = False
    found["bell"] = None
    bell = locator.bell
    if bell is not None:
        try:
            with _observe(bell) as region:
                if len(region.view) >= layout()["bell_size"]:
                    found["bell"] = bell_state(region.view)
        except FileNotFoundError:
            pass
    state = found["bell"]
    if found.get("epoch") and state and state["reader_epoch"] == found["epoch"]:
        found["lag"] = max(0, found["wc"] - state["reader_rc"])
    return found


class _observe:
    """A region mapped read-only by somebody who only looks: leaving never removes it."""

    def __init__(self, locator: Any) -> None:
        from muenfast import shm

        self._region = shm.Region.open(locator, writable=False)

    def __enter__(self) -> Any:
        return self._region

    def __exit__(self, *exc: object) -> None:
        self._region.close(keep=True)


def _state(found: dict[str, Any]) -> str:
    if not found["channel"]:
        return "never active" if found.get("transport") == 0 else "no channel"
    return "active" if found["epoch"] else "inactive"


def _holder(found: dict[str, Any]) -> str:
    writer = found["writer"]
    return f"{writer['pid']} ({writer.get('role') or writer.get('comm')})" if writer else "-"


def _channels(every: bool) -> Iterator[dict[str, Any]]:
    from muenfast import shm

    for region in shm.list_regions():
        try:
            found = look(region["name"])
        except (OSError, UsageError):
            continue  # gone, or taken from us, since the list was made
        if every or found["users"] or _state(found) != "no channel":
            yield {**found, "auto": region["auto"]}


def _list(arguments: argparse.Namespace) -> int:
    found = list(_channels(arguments.all))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("NAME", "BYTES", "STATE", "PROTOCOL", "SIZE", "ELEMENTS", "WC", "LAG", "USERS", "WRITER")]
    for c in found:
        rows.append((word(c["name"]), str(c["bytes"]), _state(c),
                     *((f"{c['protocol']:x}", str(c["size"]), str(c["elements"]), str(c["wc"])) if c["channel"]
                       else ("-", "-", "-", "-")), str(c.get("lag", "-")), str(len(c["users"])), _holder(c)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _show(arguments: argparse.Namespace) -> int:
    found = look(arguments.channel)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{word(found['name'])}: {found['bytes']} bytes, {_state(found)}")
    if "transport" in found:
        for field in _FIELDS:
            value = found[field]
            print(f"  {field:<10} {value:#018x}" if field in ("transport", "epoch", "protocol")
                  else f"  {field:<10} {value}")
        if found["channel"] and not found["fits"]:
            print("  the geometry does not fit the region")
    print(f"  writer     {_holder(found)}")
    for user in found["users"]:
        print(f"  user       {user['pid']} ({user.get('comm')}, {'writes' if user.get('writable') else 'reads'})")
    bell = found["bell"]
    if bell is None:
        print("  bell       none")
        print("  unseen     strict one-way readers, if there are any")
    else:
        rings = "rings" if found.get("epoch") and bell["ringer"] == found["epoch"] else "does not ring"
        print(f"  bell       {rings}, reader at {bell['reader_rc']}"
              + (f", lag {found['lag']}" if "lag" in found else "") + f", store {bell['store']}")
    return 0


def _create(arguments: argparse.Namespace) -> int:
    from muenfast import params, shm
    from muenfast._ring import layout

    size = params.size("--size", None, arguments.size, least=layout()["header_size"] + 1)
    try:
        mode = int(arguments.mode, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError("permissions are an octal number, like 640", option="--mode", value=arguments.mode)
    locators = [shm.Locator.parse(name, option="CHANNEL", index=i) for i, name in enumerate(arguments.channel)]
    params.apart([("CHANNEL", i, each.text, os.path.realpath(each.path), 0, math.inf)
                  for i, each in enumerate(locators)], "a region is made once")
    made = []
    try:
        for locator in locators:
            shm.make_region(locator, size, mode)
            made.append(locator)
    except BaseException:
        for locator in made:
            shm.remove_region(locator)
        raise
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    from muenfast import channel, shm

    failed: Exception | None = None
    for locator in [shm.Locator.parse(name, option="CHANNEL", index=i) for i, name in enumerate(arguments.channel)]:
        try:
            channel.remove(locator, force=arguments.force)
        except (ClaimError, OSError, UsageError) as error:  # like rm(1): the others go all the same
            if failed is not None:
                log.error("%s", describe(_in_our_words(failed)))
            failed = error
    if failed is not None:
        raise failed
    return 0


def _dump(arguments: argparse.Namespace) -> int:
    from muenfast import shm
    from muenfast._ring import newest

    if arguments.number < 1 or arguments.bytes < 1:
        raise UsageError("numbers of elements and bytes are above 0")
    with _observe(shm.Locator.parse(arguments.channel)) as region:
        elements, reason = newest(region.view, arguments.number)
    elements.reverse()
    if arguments.json:
        print(json.dumps({"name": arguments.channel, "state": reason,
                          "elements": [{"number": n, "hex": data.hex()} for n, data in elements]}, indent=2))
    else:
        print(f"{word(arguments.channel)}: {reason}, {len(elements)} elements")
        for n, data in elements:
            print(f"element {n}, {len(data)} bytes")
            for at in range(0, min(len(data), arguments.bytes), 16):
                row = data[at:at + 16]
                text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
                print(f"  {at:08x}  {row.hex(' '):<47}  {text}")
    return 0
