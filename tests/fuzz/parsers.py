"""The fuzz targets in Python: partition tables, policies, requests to control sockets and to a broker, NBD's negotiation.

usage: parsers.py TARGET [libFuzzer's options and folders]: explores, by Atheris, which has to be installed.

Each target takes bytes, and raises where what comes of them is not what it may be: its oracle. tests/fuzzing.py replays
them without Atheris.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import sys
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
            "muenfast.attach.nbd",
            "tomllib",
            "json",
        ]
    )
else:
    _instrumented = contextlib.nullcontext()

with _instrumented:
    from muenfast import broker, control, flowgraph, partition, policy
    from muenfast.attach import nbd
    from muenfast.errors import UsageError

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


def broker_requests(data: bytes) -> None:
    """Who was taken over, and asks. There is an answer, it is counted, and an operation sees what its table says."""
    calls: list[tuple[str, dict[str, Any]]] = []
    service = broker.Service()

    def operation(name: str, /, **kinds: broker.Kind) -> None:
        def run(**fields: Any) -> broker.Answer:
            calls.append((name, fields))
            return broker.Answer({"done": True})

        service.operations[name] = broker.Operation(run, kinds)

    operation("disk", name=broker.word(r"muendisk[a-z]{1,8}"), number=broker.number(1, 255), force=broker.flag)
    operation("path", path=broker.word(r"/[!-~]{1,200}"))
    operation("none")
    take = Input(data)
    strange = take.u8() == 77
    line = _request(
        take,
        "do",
        ("disk", "path", "none", "counts"),
        {
            "name": ("muendiska", "muendiskb1", "xmuendiska", "muendiska\n", "muendisk"),
            "number": (1, 255, 0, 256, True, 1.0),
            "force": (True, False, 0),
            "path": (),
            "other": (),
        },
    )[: broker.MOST_BYTES]
    answer = service.answer(line, strange)
    json.dumps(answer.values)
    assert service.requests == 1 and service._under_way == 0
    if answer.values["ok"]:
        request = json.loads(line)
        assert not strange and service.refused == 0
        assert (
            calls == []
            if request["do"] == "counts"
            else calls == [(request["do"], {name: value for name, value in request.items() if name != "do"})]
        ), calls
        for name, fields in calls:
            if name == "disk":
                assert type(fields["number"]) is int and 1 <= fields["number"] <= 255 and type(fields["force"]) is bool
                assert (
                    9 <= len(fields["name"]) <= 16
                    and fields["name"].startswith("muendisk")
                    and all("a" <= letter <= "z" for letter in fields["name"])
                ), fields
            elif name == "path":
                assert fields["path"][0] == "/" and 2 <= len(fields["path"]) <= 201 and fields["path"].isascii(), fields
    else:
        assert not calls and answer.values["kind"] == "refused" and service.refused == 1, answer


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
    "negotiation": negotiation,
}


def main() -> None:
    logging.disable(logging.CRITICAL)
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
