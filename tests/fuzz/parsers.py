"""The fuzz targets in Python: partition tables, policies, requests to control sockets and to a broker, regions of path
MTUs, NBD's negotiation.

usage: parsers.py TARGET [libFuzzer's options and folders]: explores, by Atheris, which has to be installed.

Each target takes bytes, and raises where what comes of them is not what it may be: its oracle. tests/fuzzing.py replays
them without Atheris.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    import atheris

    _instrumented: Any = atheris.instrument_imports(
        include=[
            "muenfast.partition",
            "muenfast.policy",
            "muenfast.control",
            "muenfast.broker",
            "muenfast.broker.disks",
            "muenfast.broker.net",
            "muenfast.pathmtu",
            "muenfast.attach.nbd",
            "tomllib",
            "json",
        ]
    )
else:
    _instrumented = contextlib.nullcontext()

with _instrumented:
    from muenfast import control, flowgraph, partition, pathmtu, policy
    from muenfast.attach import nbd, root
    from muenfast.broker import disks
    from muenfast.broker import net as broker_net
    from muenfast.errors import ClaimError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Input:
    """What is taken from the front of the bytes; zeros behind their end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def bytes(self, n: int) -> bytes:
        piece = self.data[self.at : self.at + n]
        self.at += n
        return piece + bytes(n - len(piece))

    def u8(self) -> int:
        return self.bytes(1)[0]

    def number(self, n: int) -> int:
        return int.from_bytes(self.bytes(n), "little")

    def odd(self, size: int) -> int:
        """Of 32 or 64 bits: small, close to size, or anything."""
        kind = self.u8()
        if kind < 128:
            return kind
        if kind < 192:
            return max(0, size + kind - 160)
        if kind < 208:
            return (1 << self.u8() % 65) - self.u8() % 3 & 0xFFFFFFFFFFFFFFFF
        return self.number(8 if kind & 1 else 4)


# ------------------------------------------------------------------ partition tables


def _mbr_sector(take: Input, sectors: int) -> bytes:
    entries = b""
    for _ in range(4):
        kind = (0, 0x83, 0x05, 0x0F, 0xEE, 0x83, 0x85, take.u8())[take.u8() % 8]
        flag = 0x80 if take.u8() == 7 else 0
        entries += struct.pack("<B3xB3xII", flag, kind, take.odd(sectors) & 0xFFFFFFFF, take.odd(sectors) & 0xFFFFFFFF)
    return bytes(446) + entries + (b"\x55\xaa" if take.u8() != 255 else b"\0\0")


def _gpt_sectors(take: Input, sectors: int, unit: int) -> dict[int, bytes]:
    """A header and its entries, with right checksums mostly, by their sectors."""
    count, each = take.u8() % 20, (128, 128, 256, 4096, 64, 127)[take.u8() % 6]
    entries = b""
    for _ in range(min(count, 8)):
        kind = bytes([take.u8() & 1]) * 16
        entries += struct.pack("<16s16sQQ", kind, bytes(16), take.odd(sectors), take.odd(sectors)) + bytes(
            max(0, each - 48)
        )
    entries = entries[: count * each].ljust(count * each, b"\0")
    own = sectors - 1 if take.u8() & 1 else 1
    first = 2 if own == 1 else max(2, sectors - 1 - (len(entries) + unit - 1) // unit)
    fields = [
        b"EFI PART",
        b"\0\0\1\0",
        92,
        0,
        0,
        own,
        sectors - own,
        34,
        max(34, sectors - 34),
        bytes(16),
        first,
        count,
        each,
        zlib.crc32(entries),
    ]
    changed = take.u8()
    if changed < 14 and changed not in (0, 1, 9):
        fields[changed] = take.odd(sectors) & (0xFFFFFFFF if changed in (2, 3, 4, 11, 12, 13) else 0xFFFFFFFFFFFFFFFF)
    header = struct.pack("<8s4sIIIQQQQ16sQIII", *fields)
    header = header.ljust(unit, b"\0")
    length = min(max(fields[2], 20), unit)
    if changed != 3:
        crc = zlib.crc32(header[:16] + bytes(4) + header[20:length])
        header = header[:16] + struct.pack("<I", crc) + header[20:]
    return {own * unit: header, first * unit: entries}


def partitions(data: bytes) -> None:
    """Whoever wrote a disk. Nothing outside it is read, not much of it, and every partition is inside it."""
    take = Input(data)
    unit = (512, 4096)[take.u8() & 1]
    size = (1 << 16) * (1 + take.u8()) + take.u8() * 512
    pieces: dict[int, bytes] = {0: _mbr_sector(take, size // unit)}
    while take and len(pieces) < 40:
        what = take.u8() % 4
        if what == 0:
            pieces.update(_gpt_sectors(take, size // unit, unit))
        elif what == 1:
            pieces[take.odd(size // unit) % (size // unit) * unit] = _mbr_sector(take, size // unit)
        else:
            pieces[take.odd(size // 512) % (size // 512) * 512] = take.bytes(take.u8())
    reads = total = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal reads, total
        assert 0 <= offset and 0 <= length and offset + length <= size, (offset, length, size)
        reads, total = reads + 1, total + length
        assert reads <= 2000 and total <= 16 << 20, (reads, total)
        found = bytearray(length)
        for at, piece in pieces.items():
            begin, end = max(at, offset), min(at + len(piece), offset + length)
            if begin < end:
                found[begin - offset : end - offset] = piece[begin - at : end - at]
        return bytes(found)

    partition.contents(read(0, 4096))
    partition.image(read(0, 4096), size)
    try:
        table = partition.read_table(read, size)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    if table is None:
        return
    assert table.scheme in ("mbr", "gpt") and table.sector in (512, 4096)
    assert not table.partitions.keys() & table.faults.keys() and table.containers <= table.faults.keys()
    for number, each in table.partitions.items():
        assert number == each.number >= 1 and (table.scheme == "gpt" or number < 256), number
        assert 0 <= each.start < each.end <= size and each.start % table.sector == 0, each
        if table.scheme == "mbr" and number <= 4:  # by the four numbers of the specification, once more
            _, kind, first, count = struct.unpack_from("<B3xB3xII", read(0, 512), 446 + 16 * (number - 1))
            assert (
                each.start == first * table.sector and each.size <= count * table.sector and int(each.type, 16) == kind
            )
            assert each.size == count * table.sector or each.end == size and count * table.sector - each.size < 4096
    for start, end in table.spans:
        assert 0 <= start < end <= size, (start, end)
    chains = max(1, len(table.containers))  # each extended partition's is followed by itself
    assert table.scheme == "gpt" or all(table.spans.count(span) <= chains for span in table.spans), "a chain came back"
    pairs = set(table.overlaps())
    found = sorted(table.partitions.values(), key=lambda each: each.start)
    assert bool(pairs) == any(a.end > b.start for a, b in zip(found, found[1:], strict=False))
    for number in [*table.partitions, *table.faults, 0, 999]:
        try:
            one = partition.find(table, number)
        except UsageError:
            continue
        assert one is table.partitions[number]
        assert all(one.end <= other.start or other.end <= one.start for other in found if other is not one), number


# ------------------------------------------------------------------ policies

_TABLES = ("subjects", "channels", "buffers", "path_mtus", "connections", "interfaces")
_KEYS = (
    "user",
    "group",
    "writer",
    "reader",
    "region",
    "size",
    "protocol",
    "element",
    "bell",
    "users",
    "client",
    "server",
    "request",
    "response",
    "buffer",
    "device",
    "read_only",
    "poll",
    "pool",
    "timeout",
    "paths",
    "subject",
    "in",
    "out",
    "mtu",
    "flags",
    "pmtu",
    "netns",
    "carrier",
    "mac",
    "addr",
    "marks",
    "up",
    "offload",
    "children",
)
_NAMES = ("a", "b", "c", "req", "resp", "buf", "p", "net0", "net1")
_VALUES: tuple[Any, ...] = (
    True,
    False,
    0,
    1,
    4096,
    "1M",
    "64K",
    "root",
    "u1",
    "u2",
    "u3",
    "7ade5c54",
    "eth_dev",
    "net_hdr",
    "",
    "ram:1M",
    "/srv/x",
    "/dev/shm/req",
    "up",
    -1,
    1 << 70,
    1.5,
    [],
    ["a", "b"],
    ["/tmp/x"],
    {},
    "x\0y",
    "é",
    "a/b",
    "/\0",
    ["/srv\0"],
)


def _structured(take: Input) -> dict[str, Any]:
    """A policy's content: tables with keys that there are, mostly of the kind that they should be."""
    content: dict[str, Any] = {"version": 1 if take.u8() != 9 else take.u8()}
    for name, user in (("a", "u1"), ("b", "u2"), ("c", "u3")):
        content.setdefault("subjects", {})[name] = {"user": user}
    if take.u8() & 1:
        content["channels"] = {"req": {"writer": "a", "reader": "b"}, "resp": {"writer": "b", "reader": "a"}}
        content["connections"] = {"disk": {"client": "a", "server": "b", "request": "req", "response": "resp"}}
    for _ in range(12):
        if not take:
            break
        section = _TABLES[take.u8() % len(_TABLES)]
        table = content.setdefault(section, {})
        if not isinstance(table, dict):
            continue
        what = take.u8()
        one = table.setdefault(_NAMES[what % len(_NAMES)], {})
        if not isinstance(one, dict):
            continue
        key, kind = _KEYS[take.u8() % len(_KEYS)], take.u8()
        if kind < 120:
            one[key] = _NAMES[kind % len(_NAMES)]
        elif kind < 230:
            one[key] = _VALUES[kind % len(_VALUES)]
        elif kind < 245:
            one.pop(key, None)
        else:
            one[key] = take.bytes(take.u8() % 20).decode("utf-8", "replace")
    return content


def policies(data: bytes) -> None:
    """An operator's file, perhaps by somebody else. It is refused in words, or what it declares holds together."""
    take = Input(data)
    findings: list[policy.Finding] = []
    if take.u8() & 1:
        content = _structured(take)
    else:
        try:
            content = tomllib.loads(data[1:].decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError):
            return
    found = policy._policy("policy.toml", content, findings)
    if not findings:
        findings += policy._validated(found)
    for finding in findings:
        assert finding.where and finding.rule, finding
    if findings:
        return
    for name, region in found.regions.items():
        table = content[{"channel": "channels", "buffer": "buffers", "path MTUs": "path_mtus"}[region.kind]][name]
        assert all(user in found.subjects for user in region.users), region
        assert region.size > 0 and region.mode in (0o600, 0o640, 0o660), region
        if region.kind == "channel":
            assert len(region.writers) == len(region.readers) == 1 and region.writers != region.readers, region
            assert region.mode != 0o660, region
            assert region.element is None or region.size >= 64 + region.element, region
            assert table["writer"] in (region.writers[0], [region.writers[0]])
    users = [subject.user for subject in found.subjects.values()]
    assert len(set(users)) == len(users) and not {"root", "0"} & set(users), users
    places = [str(each.locator) for each in found.objects()]
    assert len(set(places)) == len(places), places
    declared = {(flow.source, flow.target) for flow in found.flows()}
    for source, target in declared:
        assert (source in found.subjects or source == policy.OPERATOR) and target in found.subjects and source != target
    for each in found.connections.values():
        assert found.regions[each.request].writers == (each.client,) == found.regions[each.response].readers, each
        assert found.regions[each.response].writers == (each.server,) == found.regions[each.request].readers, each
    flowgraph.text(found)
    flowgraph.svg(found)


# ------------------------------------------------------------------ requests: control sockets, a broker


class _Called(Exception):
    """What an operation was called with."""


def _value(take: Input, depth: int = 0) -> Any:
    kind = take.u8()
    if kind < 60:
        return ("x", "disk", "", "a\0b", "\ud800", "é" * 10, "a" * 300, "/dev/muendiska", "-1", "0", "muendiska1")[
            kind % 11
        ]
    if kind < 100:
        return (0, 1, -1, 1 << 62, (1 << 62) + 1, 1 << 100, 4096, 2)[kind % 8]
    if kind < 150:
        return (True, False, None, 1.5, float("inf"), 1e308)[kind % 6]
    if kind < 190 and depth < 3:
        return [_value(take, depth + 1) for _ in range(take.u8() % 5)]
    if kind < 220 and depth < 3:
        return {str(_value(take, depth + 1)): _value(take, depth + 1) for _ in range(take.u8() % 3)}
    return take.bytes(take.u8() % 40).decode("utf-8", "surrogateescape" if kind & 1 else "replace")


def _request(take: Input, verb: str, names: tuple[str, ...], fields: dict[str, tuple[Any, ...]]) -> bytes:
    """One line: anything, or JSON. fields: values that each may have, or nearly."""
    kind = take.u8()
    if kind % 4 == 3:
        return take.data[take.at :]
    if kind % 4 == 2:  # all of them, nearly right
        number = take.u8()
        return json.dumps(
            {
                verb: names[number % len(names)],
                **{
                    name: values[take.u8() % len(values)]
                    for name, values in fields.items()
                    if take.u8() < 250 and values
                },
            }
        ).encode()
    request = {verb: names[take.u8() % len(names)] if take.u8() != 3 else _value(take)}
    for _ in range(take.u8() % 6):
        request[list(fields)[take.u8() % len(fields)]] = _value(take)
    return json.dumps(request).encode("utf-8", "surrogatepass")


def _is(kind: str, value: Any) -> bool:
    """Whether a field's value is of that kind, by the words of docs/policy.md and `Command`."""
    if kind == "text":
        return isinstance(value, str) and len(value) <= 4096 and "\0" not in value and os.fsencode(value) is not None
    if kind == "texts":
        return isinstance(value, list) and 1 <= len(value) <= 256 and all(_is("text", each) for each in value)
    if kind == "number":
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**62
    return value is True or value is False


def control_requests(data: bytes) -> None:
    """Whoever may ask a control socket. There is an answer, and a command sees fields of its own, of their kinds, alone."""
    kinds = {"name": "text", "names": "texts", "size": "number", "force": "flag"}
    calls: list[dict[str, Any]] = []

    def run(**fields: Any) -> dict[str, Any]:
        calls.append(fields)
        return {"done": len(fields)}

    server = control.ControlServer.__new__(control.ControlServer)
    server._commands = {
        "one": control.Command(run, kinds, frozenset({"name"})),
        "two": control.Command(run, kinds, quick=False),
        "none": control.Command(run),
    }
    server._slow = control.threading.BoundedSemaphore(1)
    line = _request(
        Input(data),
        "command",
        ("one", "two", "none"),
        {
            "name": ("x", "a" * 4096, "a" * 4097, 1),
            "names": (["x"], ["x"] * 256, ["x"] * 257, []),
            "size": (0, 1 << 62, True, -1),
            "force": (True, False, 1, None),
            "other": (),
        },
    )
    answer = server._execute(line.partition(b"\n")[0])
    json.dumps(answer)
    assert answer["ok"] is (len(calls) == 1), answer
    assert server._slow.acquire(blocking=False), "a place for slow operations is not given back"
    if not answer["ok"]:
        assert answer["status"] == 2 and answer["error"], answer
        return
    request = json.loads(line.partition(b"\n")[0])
    fields = {} if request["command"] == "none" else kinds
    assert set(calls[0]) <= set(fields) and ("name" in calls[0] or request["command"] != "one"), calls
    for name, value in calls[0].items():
        assert _is(fields[name], value) and request[name] == value, (name, value)
    assert all(value is None or name in calls[0] for name, value in request.items() if name != "command"), request


# The product's operations and their fields, once more: what broker/disks.py and broker/net.py are asked for.
_DISK_NAME = re.compile(r"muendisk[a-z]{1,3}")
_NUMBERS: dict[str, tuple[int, int]] = {
    "size": (0, 2**63 - 1),
    "start": (0, 2**63 - 1),
    "number": (1, 256),
    "thread": (1, 2**22),
    "bystander": (1, 2**22),
    "milliseconds": (0, 60000),
    "but": (0, 2**22),
    "device": (1, 2**31),
}
_DISK_OPERATIONS = {
    "counts": (),
    "claim": ("name",),
    "release": ("name",),
    "mount": ("name", "read_only", "max_io", "uring"),
    "mounted": ("name",),
    "unmount": ("name", "force"),
    "rmdir": ("name",),
    "resize file": ("name", "size", "read_only"),
    "watch": ("name", "thread", "bystander"),
    "unwatch": ("name",),
    "loop": ("name", "read_only", "max_io", "block_size", "discard"),
    "free loop": ("name", "milliseconds"),
    "resize loop": ("name", "size"),
    "open": ("name",),
    "sync": ("name",),
    "users": ("name", "but"),
    "make node": ("name",),
    "remove node": ("name",),
    "open part": ("name", "number"),
    "reread": ("name",),
    "change": ("name", "number", "operation", "start", "size"),
    "make part": ("name", "number"),
    "remove part": ("name", "number"),
    "uevents": (),
}
_NET_OPERATIONS = {
    "counts": (),
    "device": ("name",),
    **{
        name: ("device",)
        for name in ("marks", "follow marks", "name", "follow", "configure", "drops", "lost", "unmark", "close")
    },
}
_GOOD: dict[str, tuple[Any, ...]] = {
    "name": ("muendiska", "muendiskb", "muendiskc", "net0", "net1", "net0.5"),
    "read_only": (True, False),
    "force": (True, False),
    "discard": (True, False),
    "max_io": (4096, 131072, 1 << 20),
    "uring": ("auto", "kernel", "off"),
    "block_size": (512, 4096),
    "operation": (1, 2, 3),
    "size": (0, 4096, 1 << 20),
    "start": (0, 1 << 20),
    "number": (1, 2, 256),
    "thread": (os.getpid(),),
    "bystander": (os.getpid(),),
    "milliseconds": (0, 60000),
    "but": (0, 1),
    "device": (1, 2, 3),
}
_BAD: tuple[Any, ...] = (
    "muendiska\n", "muendisk", "muendiskA", "xmuendiska", "muendiskaaaa", "../muendiska", "", 0, -1, 257, 1 << 63, True,
    False, 1.0, None, [], {}, 4097, 1 << 21, "Auto", 60001, "net0\n", "net/0", "a" * 16, "net9",
)  # fmt: skip


def _admissible(field: str, value: Any, net_names: bool) -> bool:
    """Whether a field may hold that."""
    if field == "name":
        if type(value) is not str:
            return False
        if net_names:
            return 1 <= len(value) <= 15 and not any(letter in "/:" or letter in " \t\n\r\f\v" for letter in value)
        return _DISK_NAME.fullmatch(value) is not None
    if field in ("read_only", "force", "discard"):
        return value is True or value is False
    if field == "uring":
        return value in ("auto", "kernel", "off") and type(value) is str
    if type(value) is not int:
        return False
    if field == "block_size":
        return value in (512, 4096)
    if field == "max_io":
        return value % 4096 == 0 and 4096 <= value <= 1 << 20
    if field == "operation":
        return value in (1, 2, 3)
    least, most = _NUMBERS[field]
    return least <= value <= most


class _Handle:
    """Something that is made, and has to be given back, once. `open`: all of those that were not."""

    def __init__(self, books: set[_Handle], what: str) -> None:
        self.books, self.what = books, what
        books.add(self)

    def back(self) -> None:
        assert self in self.books, f"{self.what} is given back twice"
        self.books.remove(self)


class _FakeRoot:
    """As attach.root.Root, of nothing: asserts that what it is told to do may be done just then."""

    def __init__(self, books: set[_Handle], take: Input) -> None:
        self.books, self.take, self.null = books, take, os.open("/dev/null", os.O_RDWR)
        self.claims: dict[str, _Handle] = {}
        self.mounts: dict[str, dict[str, Any]] = {}
        self.loops = 0

    def fail(self) -> None:
        """At times the kernel says no."""
        if self.take.u8() > 240:
            raise OSError(errno.EIO, "by chance", "fake")

    def claim(self, name: str) -> Any:
        assert _DISK_NAME.fullmatch(name), name
        if name == "muendiskc" or name in self.claims:
            return None
        self.claims[name] = handle = _Handle(self.books, name)

        def release() -> None:
            assert name not in self.mounts, f"{name} is released, and mounted"
            handle.back()
            del self.claims[name]

        return _Stub(release=release)

    def reclaim(self, name: str) -> list[str]:
        assert name in self.claims
        self.fail()
        return []

    def mount(self, name: str, *, read_only: bool, max_io: int, uring: str) -> Any:
        assert name in self.claims and name not in self.mounts, f"{name} is mounted twice, or without a claim"
        self.fail()
        abort = os.dup(self.null) if self.take.u8() & 3 else -1
        self.mounts[name] = {"abort": abort, "loop": -1, "node": False, "tree": True, "parts": set()}
        return root.Mount(f"/fake/{name}", os.dup(self.null), 1, abort, False)

    def of(self, name: str) -> dict[str, Any]:
        assert name in self.mounts, f"{name} is not mounted"
        return self.mounts[name]

    def looped(self, name: str) -> dict[str, Any]:
        found = self.of(name)
        assert found["loop"] >= 0, f"{name} has no loop device"
        return found

    def mounted(self, name: str) -> None:
        if name in self.mounts:
            self.fail()

    def mountpoint(self, name: str) -> str:
        self.of(name)
        return f"/fake/{name}"

    def unmount(self, name: str, force: bool) -> None:
        self.of(name)["tree"] = False

    def rmdir(self, name: str) -> None:
        found = self.of(name)
        if found["tree"]:
            raise OSError(errno.EBUSY, "busy", name)
        assert not found["node"] and not found["parts"], f"{name} goes, its nodes do not"
        del self.mounts[name]

    def resize_file(self, name: str, size: int, read_only: bool) -> None:
        self.of(name)

    def loop(self, name: str, **how: Any) -> int:
        found = self.of(name)
        assert found["abort"] >= 0, "a client that does not answer could not be ended"
        assert found["loop"] < 0 and found["tree"], f"{name} gets a second loop device, or one after its mount"
        assert how["block_size"] in (512, 4096)
        self.fail()
        self.loops += 1
        found["loop"] = self.loops
        return self.loops

    def owns(self, name: str) -> bool:
        return self.of(name)["loop"] >= 0 and self.take.u8() < 250

    def free_loop(self, name: str, timeout: float) -> bool:
        self.of(name)["loop"] = -1
        return True

    def resize_loop(self, name: str, size: int) -> None:
        self.looped(name)

    def open(self, name: str) -> int:
        self.looped(name)
        return os.dup(self.null)

    def sync(self, name: str) -> list[str]:
        self.looped(name)
        return []

    def users(self, name: str, but: int | None) -> list[str]:
        self.of(name)
        return []

    def make_node(self, name: str) -> None:
        self.looped(name)["node"] = True

    def remove_node(self, name: str) -> None:
        self.of(name)["node"] = False

    def partitions(self, name: str) -> Any:
        found = self.looped(name)

        def node(number: int, device: int) -> bool:
            assert 1 <= number <= 256 and device == 77 + number
            found["parts"].add(number)
            return True

        def remove(number: int, device: int) -> None:
            assert number in found["parts"] and device == 77 + number, f"partition {number} was not made here"
            found["parts"].remove(number)

        return _Stub(
            disk=name, open=lambda: os.dup(self.null), open_part=lambda number: os.dup(self.null), reread=lambda fd: None,
            change=self.change, make_node=node, remove_node=remove,
        )  # fmt: skip

    def change(self, fd: int, operation: int, number: int, start: int, size: int) -> None:
        assert operation in (1, 2, 3) and 1 <= number <= 256 and 0 <= min(start, size) <= max(start, size) < 1 << 63
        self.fail()

    def end(self) -> None:
        for found in self.mounts.values():
            if found["abort"] >= 0:
                os.close(found["abort"])
        os.close(self.null)


class _Timer:
    """As threading.Timer, that never fires."""

    def __init__(self, seconds: float, what: Any, arguments: Any = ()) -> None:
        assert seconds > 0

    def start(self) -> None:
        pass

    cancel = join = start


@contextlib.contextmanager
def _disk_service(take: Input, books: set[_Handle]) -> Iterator[Any]:
    """A DiskService for two disks, on nothing."""
    fake = _FakeRoot(books, take)

    def leash(kind: str, thread: int, arguments: list[str], fds: list[int], other: tuple[int, int]) -> Any:
        assert kind == "fuse" and other[0] == os.getpid() and len(fds) <= 1
        handle = _Handle(books, "a watchdog")
        return _Stub(pid=1, give=lambda: os.dup(fake.null), wait=handle.back)

    def release(mountpoint: str, device: str, abort: int) -> list[str]:
        name = device.removeprefix("/dev/")
        assert mountpoint == f"/fake/{name}" and name in fake.mounts
        found = fake.mounts.pop(name)
        assert abort in (-1, found["abort"])
        if found["abort"] >= 0:
            os.close(found["abort"])
        return []

    class Uevents:
        def __init__(self, *words: str) -> None:
            pass

        def uevents(self) -> Any:
            return _Stub(detach=lambda: os.dup(fake.null))

    changed = {
        "Root": lambda where: fake,
        "Leash": leash,
        "watchdog": _Stub(release=release),
        "threading": _Stub(Timer=_Timer, Lock=threading.Lock),
        "loop": _Stub(is_bound=lambda number: True, detach=lambda number, timeout: None),
        "partitions": _Stub(
            of_kernel=lambda disk: {number: _Stub(number=77 + number) for number in (1, 2, 256)}, Acts=Uevents,
            ADD=disks.partitions.ADD, RESIZE=disks.partitions.RESIZE,
        ),
    }  # fmt: skip
    with _replaced(disks, changed):
        try:
            yield disks.DiskService(os.getpid(), 2)
        finally:
            fake.end()


@contextlib.contextmanager
def _replaced(module: Any, changed: dict[str, Any]) -> Iterator[None]:
    """A module with other names in it."""
    before = {name: getattr(module, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _net_service(take: Input, books: set[_Handle]) -> Iterator[Any]:
    """A NetService for an interface with two children, and one without any."""
    null = os.open("/dev/null", os.O_RDWR)
    configs = [
        _Stub(
            name=name, framing="net_hdr", mtu=1400 + k, netns=None, offload=False, marks="auto", addresses=(), mac=None,
            up=True,
        )
        for k, name in enumerate(("net0", "net1"))
    ]  # fmt: skip
    there: dict[str, Any] = {}

    class Device:
        def __init__(self, name: str, framing: str, mtu: int, *, namespace: int | None, offload: bool) -> None:
            assert framing == "net_hdr" and (name, mtu) in (("net0", 1400), ("net0.5", 1400), ("net1", 1401))
            assert name not in there, f"{name} is made twice"
            assert name != "net0.5" or "net0" in there, "a child without its parent"
            if take.u8() > 240:
                raise OSError(errno.EIO, "by chance", name)
            self.name, self.index, self.merges, self.offload, self.fd = name, 5, (), offload, null
            self.news = _Stub(fileno=lambda: null)
            self.handle = _Handle(books, name)
            there[name] = self

        @contextlib.contextmanager
        def place(self) -> Iterator[int]:
            assert self.handle in books, f"{self.name} was closed"
            yield null

        def rename(self) -> None:
            assert self.handle in books

        def follow(self) -> bool | None:
            assert self.handle in books
            return (None, True, False)[take.u8() % 3]

        def configure(self, *, namespace: int | None, addresses: Any, mac: Any, up: bool) -> None:
            assert self.handle in books and self.name != "net0.5" and up and addresses == ()

        def queue_drops(self) -> int:
            assert self.handle in books
            return 3

        def close(self) -> None:
            if self.handle in books:
                self.handle.back()
                there.pop(self.name, None)

    def attach(index: int, *, ways: Any, vnet: bool) -> Any:
        if take.u8() > 240:
            raise OSError(errno.EIO, "by chance", "bpf")
        handle = _Handle(books, "marks")

        def close() -> None:
            if handle in books:
                handle.back()

        return _Stub(way=_Stub(value="tcx"), tap=None, follow=lambda index: None, dropped=lambda: {"x": 1}, close=close)

    changed = {
        "Device": Device,
        "bpf": _Stub(attach=attach),
        "netns": _Stub(inside=lambda namespace, what: what()),
        "Makers": lambda: _Stub(name=lambda device, namespace: _Stub(detach=lambda: os.dup(null))),
    }
    with _replaced(broker_net, changed):
        try:
            yield broker_net.NetService(configs, {"net0.5": "net0"})
        finally:
            os.close(null)


def _lowest_free() -> int:
    """The lowest descriptor that there is not: it is the same again once all that were made after it are closed."""
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


def _asked(take: Input, operations: dict[str, tuple[str, ...]]) -> bytes:
    """One request: of the table, mostly right."""
    what = take.u8()
    if what > 250:
        return take.bytes(take.u8() % 40)
    name = list(operations)[what % len(operations)]
    request: dict[str, Any] = {"do": name}
    for field in operations[name]:
        kind = take.u8()
        request[field] = _BAD[kind % len(_BAD)] if kind > 225 else _GOOD[field][kind % len(_GOOD[field])]
    kind = take.u8()
    if kind > 245:
        request["other"] = 1
    elif kind > 235 and len(request) > 1:
        request.popitem()
    elif kind > 230:
        request["do"] = _value(take)
    return json.dumps(request).encode("utf-8", "surrogatepass")


def broker_requests(data: bytes) -> None:
    """Who was taken over, and asks. The product's own operations, on devices that are not there: each request is answered
    and counted, those whose fields are not what the table says are refused, and so are those of what was not made here;
    what is done is what may be done just then; in the end everything was given back."""
    take, books = Input(data), set[_Handle]()
    of_disks = not take.u8() & 1
    operations = _DISK_OPERATIONS if of_disks else _NET_OPERATIONS
    files = _lowest_free()
    with _disk_service(take, books) if of_disks else _net_service(take, books) as service:
        assert service.operations.keys() == operations.keys()
        refused = requests = 0
        while take and requests < 40:
            line = _asked(take, operations)
            strange = take.u8() == 77
            answer = service.answer(line, strange)
            requests += 1
            assert len(json.dumps(answer.values)) < 1 << 16
            if answer.own:
                for fd in answer.fds:
                    os.close(fd)
            assert service.requests == requests and service._under_way == 0
            try:
                request = json.loads(line)
            except ValueError:
                request = None
            right = (
                not strange
                and isinstance(request, dict)
                and isinstance(request.get("do"), str)
                and request["do"] in operations
                and request.keys() - {"do"} == set(operations[request["do"]])
                and all(_admissible(field, value, not of_disks) for field, value in request.items() if field != "do")
            )
            if answer.values["ok"]:
                assert right, line
            else:
                refused += answer.values["kind"] == "refused"
                # "other" is what nobody thought of
                assert answer.values["kind"] in (("refused", "os") if right else ("refused",)), (line, answer.values)
            assert service.refused == refused
        claims = sum(handle.what in ("muendiska", "muendiskb", "muendiskc") for handle in books)
        assert claims <= 2, "more disks than the policy declares"
        service.end()
        assert service.answer(b'{"do": "counts"}').values["kind"] == "other"
        assert not books, [handle.what for handle in books]
    assert _lowest_free() == files, "a descriptor is left"


# ------------------------------------------------------------------ regions of path MTUs


def path_mtus(data: bytes) -> None:
    """Whoever may write such a region. It is refused as none, or its limits are the words that are not 0; one is set, no
    other."""
    take = Input(data)
    start, kind = take.u8() % 6, take.u8()
    memory = bytearray(take.bytes(take.u8() % 64))
    if kind & 1:  # what such a region holds
        memory[1::2] = bytes(len(memory[1::2]))
        for at in range(2, len(memory), 4):
            memory[at : at + 2] = bytes(len(memory[at : at + 2]))
    if kind & 2 and len(memory) >= 8:
        at = take.u8() % (len(memory) // 4) * 4
        memory[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\1\0", b"\xff\xff\0\0", b"\0\0\0\x80")[take.u8() & 3]
    region: Any = _Stub(size=len(memory), view=memoryview(memory), locator=_Stub(text="fake"))
    words = list(struct.unpack_from(f"={len(memory) // 4}I", memory))
    with _replaced(pathmtu.shm, {"writer_holder": lambda region: {"pid": 1} if kind & 64 else None}):
        try:
            pathmtu._check(region)
        except ClaimError:
            assert kind & 64
            return
        except UsageError as error:
            assert str(error) and (len(memory) < 4 or any(65535 < word < 0xFFFFFFFF for word in words)), words
            return
    assert words and not kind & 64 and all(word <= 65535 or word == 0xFFFFFFFF for word in words), words
    assert pathmtu.entries(region) == len(words)
    for mark in (0, 1, len(words), len(words) + 1, -1, start):
        assert pathmtu.get(region) == {m: word for m, word in enumerate(words, 1) if word}
        limit = take.number(2)
        try:
            pathmtu.put(region, mark, limit)
        except UsageError:
            assert not 1 <= mark <= len(words)
            continue
        assert 1 <= mark <= len(words), f"mark {mark} of {len(words)}"
        words[mark - 1] = limit
    assert struct.unpack_from(f"={len(words)}I", memory) == tuple(words)
    text = take.bytes(take.u8() % 8).decode("latin-1")
    try:
        value = pathmtu.check("--mtu", text)
    except UsageError:
        return
    assert 0 <= value <= 65535 and int(text) == value, (text, value)


# ------------------------------------------------------------------ NBD's negotiation


class _Stub:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def _options(take: Input, name: bytes) -> bytes:
    stream = struct.pack(">I", take.u8() & 3 if take.u8() != 1 else take.number(4))
    for _ in range(80):
        if not take:
            break
        option = (1, 2, 3, 5, 6, 7, 8, 7, take.number(2))[take.u8() % 9]
        what = take.u8()
        data = b""
        if option in (6, 7):
            asked = (name, b"", b"other", take.bytes(take.u8() % 8))[what & 3]
            infos = [take.u8() % 5 for _ in range(what >> 2 & 3)]
            data = struct.pack(">I", len(asked)) + asked + struct.pack(f">H{len(infos)}H", len(infos), *infos)
            if what & 64:
                data = data[: take.u8()] + take.bytes(take.u8() % 4)
        elif option == 1:
            data = (name, b"", b"no", bytes(4097))[what & 3]
        elif what & 16:
            data = bytes((1, 20, 16385, 70000)[what & 3])
        length = len(data) if what & 128 == 0 or take.u8() & 7 else take.number(4)
        stream += struct.pack(">QII", 0x49484156454F5054 ^ (what == 255), option & 0xFFFFFFFF, length) + data
    return stream


def _replies(out: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at < len(out):
        magic, option, kind, length = struct.unpack_from(">QIII", out, at)
        assert magic == 0x3E889045565A9 and at + 20 + length <= len(out), (hex(magic), length)
        yield option, kind, out[at + 20 : at + 20 + length]
        at += 20 + length


def negotiation(data: bytes) -> None:
    """An NBD client that chooses its export. It gets one by its name only; what it is sent is well-formed."""
    take = Input(data)
    server = nbd.NbdServer.__new__(nbd.NbdServer)
    server.name, server._name, server._description = "disk", b"disk", b"for people"
    server.target = _Stub(nblocks=4096, block_size=512, discards=bool(take.u8() & 1))
    server.disk = _Stub(read_only=bool(take.u8() & 1))
    step = 1 + take.u8() * 16
    stream = _options(take, b"disk")
    peer = nbd._Peer(None, server._choose)
    at = 0
    try:
        while peer.through is None and at < len(stream):
            piece = stream[at : at + min(step, peer.want - len(peer.got))]
            assert piece and peer.want <= 1 << 17, (peer.want, len(peer.got))
            at += len(piece)
            peer.feed(piece)
    except nbd._Malformed as error:
        assert str(error) and peer.through is None
        return
    # once more, by doc/proto.md
    (flags,) = struct.unpack_from(">I", stream.ljust(4, b"\0"))
    out, place, left, structured = bytes(peer.out), 4, None, False
    options: list[tuple[int, bytes]] = []
    while at >= 4 and left is None and len(stream) >= place + 16 and at >= place + 16:
        magic, option, length = struct.unpack_from(">QII", stream, place)
        if at < place + 16 + length:
            break
        options.append((option, stream[place + 16 : place + 16 + length]))
        place += 16 + length
        assert magic == 0x49484156454F5054
        if option == 1:
            left = True
        elif length > nbd.MOST_DATA:
            pass  # refused, whatever it is
        elif option == 2:
            left = False
        elif option == 7:
            body = options[-1][1]
            size = int.from_bytes(body[:4], "big")
            name, rest = body[4 : 4 + size], body[4 + size :]
            if (
                len(body) >= 6 + size
                and len(rest) == 2 + 2 * int.from_bytes(rest[:2], "big")
                and name in (b"", b"disk")
            ):
                left = True
    assert peer.through is left, (peer.through, left)
    assert out[:18] == struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3) and len(out) < 1 << 20
    rest = out[18:]
    if options and options[-1][0] == 1 and left:
        assert options[-1][1] in (b"", b"disk")
        tail = 10 if flags & 2 else 134
        assert struct.unpack_from(">Q", rest, len(rest) - tail)[0] == 4096 * 512
        rest = rest[: len(rest) - tail]
        options.pop()
    answers = list(_replies(rest))
    finals = [(option, kind) for option, kind, _ in answers if kind not in (2, 3)]
    assert [option for option, _ in finals] == [option for option, _ in options], (finals, options)
    for (option, kind), (_, body) in zip(finals, options, strict=True):
        structured = structured or (option == 8 and kind == 1)
        assert kind == 1 or kind & 1 << 31, kind
        if kind == 1:
            assert option in (2, 3, 6, 7, 8) and len(body) <= nbd.MOST_DATA
    assert peer.structured is structured


TARGETS: dict[str, Callable[[bytes], None]] = {
    "partitions": partitions,
    "policies": policies,
    "control": control_requests,
    "broker": broker_requests,
    "pathmtus": path_mtus,
    "negotiation": negotiation,
}


def main() -> None:
    logging.disable(logging.CRITICAL)
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
