"""Splitting and making super-packets, checksums and the path's MTU (_packets), against packets.py, which shares nothing
with them."""

from __future__ import annotations

import itertools
import mmap
import random
import socket
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import packets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packets import (
    ACCECN,
    ACK,
    CWR,
    DF,
    ECE,
    ECN,
    FIN,
    MF,
    NEEDS_CHECKSUM,
    NONE,
    PSH,
    RST,
    SYN,
    TCP4,
    TCP6,
    UDP,
    UFO,
    URG,
    Packet,
    expand,
    right,
    vnet,
    without_id,
)

from muenfast import UsageError
from muenfast._packets import BURST, FLOWS, RATE, Bucket, Coalescer, Gather, checksum, copy_checksum, pmtu, split

V6 = {"source": "fd00::1", "target": "fd00::2"}
V4: dict[str, Any] = {"id": 0xfffe}
TIMES = bytes([1, 1, 8, 10]) + bytes(range(8))     # two no-operations and a timestamp
DATA = random.Random(6).randbytes(70000)
SUPERS = {
    "tcp4": Packet(**V4, payload=DATA[:5000], flags=ACK | PSH),
    "tcp4 with options": Packet(**V4, payload=DATA[:9001], flags=ACK, options=TIMES, sequence=0xffffff00),
    "tcp4 with IP options": Packet(**V4, payload=DATA[:3000], ip_options=bytes([0x94, 4, 0, 0])),
    "tcp6": Packet(**V6, payload=DATA[:5000], flags=ACK | PSH, options=TIMES, tos=0x0a, label=0x12345),
    "udp4": Packet(**V4, payload=DATA[:5000], protocol=socket.IPPROTO_UDP, fragment=0),
    "udp6": Packet(**V6, payload=DATA[:4999], protocol=socket.IPPROTO_UDP),
    "tcp6 with hop-by-hop and destination options": Packet(
        **V6, payload=DATA[:3000], extension=((0, bytes([0, 5, 2, 0, 0, 1, 0])), (60, bytes([1, 1, 12]) + bytes(12)))),
}


# ---- checksums

@pytest.mark.parametrize(("data", "found"), [
    ("0001f203f4f5f6f7", "220d"),                                   # RFC 1071, 3
    ("45000073000040004011" "0000" "c0a80001c0a800c7", "b861"),     # an IPv4 header
    ("", "ffff"), ("00", "ffff"), ("01", "feff"), ("ffff", "0000"), ("ffffff", "00ff"),
])
def test_checksums_by_hand(data: str, found: str) -> None:
    assert checksum(bytes.fromhex(data)).hex() == found


def test_checksums() -> None:
    """Of any length and from any address on; a copy has the same, and is one."""
    for length in (*range(300), 1447, 1448, 4097, 65534, 65535):
        for at in (0, 1, 7, 33):
            data = DATA[at:at + length]
            found = packets.checksum(data).to_bytes(2, "big")
            view = memoryview(DATA)[at:at + length]
            assert checksum(view) == found
            assert copy_checksum(view) == copy_checksum(view, foreign=True) == (data, found)


@pytest.mark.parametrize("byte", [b"\xff", b"\0"])
def test_a_checksum_that_carries_everywhere(byte: bytes) -> None:
    assert checksum(byte * 65534) == (b"\0\0" if byte == b"\xff" else b"\xff\xff")


# ---- super-packets into packets

@pytest.mark.parametrize("name", SUPERS)
@pytest.mark.parametrize("size", [1, 7, 536, 1400, 1448, 4999, 5000, 9000])
def test_split(name: str, size: int) -> None:
    """The segments are what the RFCs and the kernel's own make of it, to the byte."""
    whole = SUPERS[name]
    if size == 1:
        whole = replace(whole, payload=whole.payload[:300])
    made = split(whole.pack(partial=True), whole.vnet(size), 65535)
    assert made == [one.pack() for one in whole.segments(size)]


def test_a_super_packet_by_hand() -> None:
    """One of 4 bytes of payload in segments of 3: every byte written down."""
    header = bytes.fromhex("01" "01" "2800" "0300" "1400" "1000" if sys.byteorder == "little" else
                           "01" "01" "0028" "0003" "0014" "0010")
    whole = bytes.fromhex("4500002c" "00ff4000" "40060000" "0a000001" "0a000002"      # its own checksum is made anew
                          "04d20050" "ffffffff" "00000001" "50190400" "14210000" "61626364")
    first = bytes.fromhex("4500002b" "00ff4000" "400625cc" "0a000001" "0a000002"
                          "04d20050" "ffffffff" "00000001" "50100400" "ce490000" "616263")
    last = bytes.fromhex("45000029" "01004000" "400625cd" "0a000001" "0a000002"
                         "04d20050" "00000002" "00000001" "50190400" "2ea30000" "64")
    assert split(whole, header, 1500) == [first, last]


def test_flags_of_segments() -> None:
    """PSH and FIN on the last, CWR on the first; with AccECN on each."""
    whole = Packet(payload=DATA[:3000], flags=ACK | PSH | FIN | CWR | ECE)
    made = split(whole.pack(partial=True), whole.vnet(1000, TCP4 | ECN), 1500)
    assert [one[33] for one in made] == [ACK | CWR | ECE, ACK | ECE, ACK | ECE | PSH | FIN]
    assert all(map(right, made))
    made = split(whole.pack(partial=True), whole.vnet(1000, TCP4 | ACCECN), 1500)
    assert [one[33] for one in made] == [ACK | CWR | ECE, ACK | CWR | ECE, ACK | CWR | ECE | PSH | FIN]
    assert all(map(right, made))


def test_a_udp_checksum_is_never_zero() -> None:
    """A datagram whose checksum comes to 0 has 0xffff, where 0 would say that it has none; split or plain."""
    one = Packet(protocol=socket.IPPROTO_UDP, payload=bytes(4))
    at = packets.ones(one.pseudo(12) + one.transport()[:6] + bytes(2)) ^ 0xffff
    whole = replace(one, payload=at.to_bytes(2, "big") + bytes(2) + bytes(2))
    first, second = split(whole.pack(partial=True), whole.vnet(4), 1500)
    assert first[26:28] == b"\xff\xff" and right(first) and right(second)
    plain = replace(whole, payload=whole.payload[:4])
    assert split(plain.pack(partial=True), vnet(NEEDS_CHECKSUM, NONE, 0, 0, 20, 6), 1500) == [plain.pack()] == [first]


@pytest.mark.parametrize("name", SUPERS)
def test_a_plain_packet_gets_its_checksum(name: str) -> None:
    one = replace(SUPERS[name], payload=DATA[:777])
    offset = 6 if one.protocol == socket.IPPROTO_UDP else 16
    made = split(one.pack(partial=True), vnet(NEEDS_CHECKSUM, NONE, 0, 0, one.start(), offset), 1500)
    assert made == [one.pack()]


def test_a_plain_packet_without_a_wish_stays_as_it_is() -> None:
    one = Packet(payload=DATA[:100]).pack()
    broken = one[:-1] + bytes([one[-1] ^ 1])
    assert split(broken, vnet(), len(broken)) == [broken]


@pytest.mark.parametrize("name", ["tcp4", "tcp6"])
def test_a_smaller_mtu_makes_shorter_segments(name: str) -> None:
    whole = SUPERS[name]
    made = split(whole.pack(partial=True), whole.vnet(1400), 576)
    assert made == [one.pack() for one in whole.segments(576 - whole.headers())]
    assert max(map(len, made)) == 576


TCP, DGRAM, SIX = SUPERS["tcp4"], SUPERS["udp4"], SUPERS["tcp6"]


def changed(packet: bytes, at: int, *values: int) -> bytes:
    return packet[:at] + bytes(values) + packet[at + len(values):]


@pytest.mark.parametrize(("packet", "header", "rule"), [
    pytest.param(b"", vnet(), "ends before", id="nothing"),
    pytest.param(changed(TCP.pack(), 0, 0x55), vnet(), "neither", id="version 5"),
    pytest.param(TCP.pack()[:19], vnet(), "ends before", id="half an IPv4 header"),
    pytest.param(changed(TCP.pack(), 0, 0x44), vnet(), "ends before", id="an IPv4 header of 16 bytes"),
    pytest.param(changed(TCP.pack()[:24], 0, 0x4f), vnet(), "ends before", id="options that are not there"),
    pytest.param(SIX.pack()[:39], vnet(), "ends before", id="half an IPv6 header"),
    pytest.param(TCP.pack() + b"x", vnet(), "another length", id="longer than it says"),
    pytest.param(SIX.pack()[:-1], vnet(), "another length", id="shorter than it says"),
    pytest.param(TCP.pack(), vnet(), "longer than the MTU", id="plain and too long"),
    pytest.param(DGRAM.pack(True), DGRAM.vnet(1480), "longer than the MTU", id="datagrams that are too long"),
    pytest.param(TCP.pack(True), TCP.vnet(1000, UFO), "kind", id="UFO"),
    pytest.param(TCP.pack(True), TCP.vnet(1000, 2), "kind", id="kind 2"),
    pytest.param(TCP.pack(True), TCP.vnet(0), "no bytes", id="size 0"),
    pytest.param(TCP.pack(True), vnet(0, TCP4, 40, 1000, 20, 16), "no checksum", id="complete already"),
    pytest.param(TCP.pack(True), vnet(1, TCP4, 40, 1000, 24, 16), "no checksum", id="begins elsewhere"),
    pytest.param(TCP.pack(True), vnet(1, TCP4, 40, 1000, 20, 6), "no checksum", id="stands elsewhere"),
    pytest.param(TCP.pack(True), TCP.vnet(1000, TCP6), "not those of its kind", id="IPv4 as IPv6"),
    pytest.param(SIX.pack(True), SIX.vnet(1000, TCP4), "not those of its kind", id="IPv6 as IPv4"),
    pytest.param(TCP.pack(True), TCP.vnet(1000, UDP), "not those of its kind", id="TCP as UDP"),
    pytest.param(DGRAM.pack(True), DGRAM.vnet(1000, TCP4), "not those of its kind", id="UDP as TCP"),
    pytest.param(changed(TCP.pack(True), 32, 0x40), TCP.vnet(1000), "not those of its kind", id="a TCP header of 16 bytes"),
    pytest.param(replace(TCP, fragment=MF).pack(True), TCP.vnet(1000), "not those of its kind", id="a fragment"),
    pytest.param(replace(TCP, fragment=5).pack(True), TCP.vnet(1000), "not those of its kind", id="a later fragment"),
    pytest.param(replace(SIX, extension=((44, bytes([0, 0, 1, 0, 0, 0, 1])),)).pack(True),
                 vnet(1, TCP6, 80, 1000, 48, 16), "not those of its kind", id="an IPv6 fragment"),
    pytest.param(replace(SIX, extension=((60, bytes([30]) + bytes(246)),)).pack(True),
                 vnet(1, TCP6, 320, 1000, 288, 16), "not those of its kind", id="too many headers"),
    pytest.param(replace(TCP, payload=b"").pack(True), TCP.vnet(1000), "nothing", id="no payload"),
    pytest.param(changed(replace(TCP, payload=b"x").pack(True), 32, 0xf0), TCP.vnet(1000), "ends before",
                 id="TCP options that are not there"),
    pytest.param(changed(DGRAM.pack(True), 24, 0, 9), DGRAM.vnet(1000), "another length", id="UDP's length"),
    pytest.param(changed(replace(SIX, payload=b"").pack(True)[:48], 4, 0, 8), SIX.vnet(1000), "ends before", id="half TCP"),
    pytest.param(changed(changed(SIX.pack(True)[:48], 4, 0, 8, 0), 40, 6, 1), SIX.vnet(1000), "ends before",
                 id="half an extension header"),
    pytest.param(changed(SIX.pack(True)[:40], 4, 0, 0, 0), SIX.vnet(1000), "ends before", id="no extension header"),
    pytest.param(Packet(payload=b"abc").pack(), vnet(1, 0, 0, 0, 16, 16), "no checksum", id="begins inside IP"),
    pytest.param(Packet(payload=b"abc").pack(), vnet(1, 0, 0, 0, 20, 22), "no checksum", id="stands half outside"),
    pytest.param(Packet(payload=b"abc").pack(), vnet(1, 0, 0, 0, 20, 3), "no checksum", id="stands at an odd place"),
    pytest.param(Packet(payload=b"abc").pack(), vnet(1, 0, 0, 0, 65535, 65535), "no checksum", id="stands far outside"),
])
def test_what_is_no_super_packet(packet: bytes, header: bytes, rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        split(packet, header, 1500)


def test_arguments() -> None:
    with pytest.raises(UsageError, match="10 bytes"):
        split(TCP.pack(), b"", 1500)
    for mtu in (0, -1, 65536):
        with pytest.raises(UsageError, match=r"1 \.\. 65535"):
            split(TCP.pack(), vnet(), mtu)
    with pytest.raises(UsageError, match="at most 65535"):
        split(bytes(65536), vnet(), 1500)
    with pytest.raises(UsageError, match="longer than the MTU"):
        split(TCP.pack(True), TCP.vnet(1000), 40)
    with pytest.raises(UsageError, match="tcp4, tcp6, udp"):
        Coalescer(["ufo"])  # type: ignore[list-item]
    for key in (-1, 1 << 64):
        with pytest.raises(UsageError, match="64 bits"):
            Coalescer().add(TCP.pack(), key)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SUPERS)), st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4),
       st.lists(st.tuples(st.integers(0, 9), st.integers(0, 255)), max_size=3), st.integers(1, 2000), st.data())
def test_any_bytes_are_split_or_refused(name: str, marks: list[tuple[int, int]], more: list[tuple[int, int]], mtu: int,
                                        data: st.DataObject) -> None:
    """Whatever header and packet say: no packet is longer than the MTU, and nothing is read beside them (make asan)."""
    whole = SUPERS[name]
    packet, header = bytearray(whole.pack(True)), bytearray(whole.vnet(1000))
    for at, value in marks:
        packet[at] = value
    for at, value in more:
        header[at] = value
    cut = data.draw(st.integers(0, len(packet)) | st.just(len(packet)))
    try:
        made = split(bytes(packet[:cut]), bytes(header), mtu)
    except UsageError:
        return
    assert made and max(map(len, made)) <= mtu


# ---- packets into super-packets

Out = list[tuple[int, bytes, bytes]]


def coalesce(elements: list[tuple[bytes, int]], kinds: Any = ("tcp4", "tcp6", "udp")) -> Out:
    """What comes out, to the end."""
    c = Coalescer(kinds)
    found = [one for element, key in elements for one in c.add(element, key)]
    return found + c.flush()


def expanded(found: Out) -> list[tuple[int, bytes]]:
    return [(key, one) for key, header, packet in found for one in expand(header, packet)]


@pytest.mark.parametrize("name", [name for name in SUPERS if "IP options" not in name and "hop" not in name])
@pytest.mark.parametrize("size", [100, 536, 1448])
def test_what_was_split_is_made_whole(name: str, size: int) -> None:
    whole = SUPERS[name]
    made = coalesce([(one.pack() + b"padding", 9) for one in whole.segments(size)])
    assert made == [(9, whole.vnet(size), whole.pack(partial=True))]


def pair(**first: Any) -> tuple[Packet, Packet]:
    """Two segments of 100 bytes that belong together."""
    one = Packet(payload=DATA[:200], options=TIMES, **first)
    a, b = one.segments(100)
    return a, b


TCP_FIELDS: dict[str, dict[str, Any]] = {
    "source": {"source": "10.7.0.3"}, "target": {"target": "10.7.0.3"}, "ports": {"ports": (4000, 5001)},
    "another port": {"ports": (4001, 5000)}, "tos": {"tos": 4}, "ECN": {"tos": 1}, "ttl": {"ttl": 63},
    "id skips": {"id": 2}, "id goes back": {"id": 0xffff}, "DF": {"fragment": 0},
    "a reserved flag": {"fragment": 0x8000 | DF},
    "MF": {"fragment": MF | DF}, "an offset": {"fragment": DF | 1}, "IP options": {"ip_options": bytes([1, 1, 1, 0])},
    "sequence skips": {"sequence": 1101}, "sequence again": {"sequence": 1000}, "ack": {"ack": 78},
    "window": {"window": 501}, "urgent": {"urgent": 1}, "options": {"options": TIMES[:-1] + b"\xff"},
    "fewer options": {"options": b""}, "more options": {"options": TIMES + bytes(4)},
    "longer": {"payload": DATA[:101]}, "nothing": {"payload": b""},
} | {f"flags {flags:#x}": {"flags": flags} for flags in (
    0, PSH, ACK | FIN, ACK | SYN, ACK | RST, ACK | URG, ACK | ECE, ACK | CWR, ACK | FIN | PSH)}


@pytest.mark.parametrize("name", TCP_FIELDS)
def test_tcp_that_differs_is_not_merged(name: str) -> None:
    a, b = pair()
    other = replace(b, **TCP_FIELDS[name])
    made = coalesce([(a.pack(), 0), (other.pack(), 0)])
    assert sorted(made) == sorted([(0, vnet(), a.pack()), (0, vnet(), other.pack())])
    if not name.startswith(("source", "target", "port", "another")):
        assert [packet for _, _, packet in made] == [a.pack(), other.pack()]
    assert len(coalesce([(a.pack(), 0), (b.pack(), 0)])) == 1


V6_FIELDS: dict[str, dict[str, Any]] = {
    "source": {"source": "fd00::3"}, "target": {"target": "fd00::3"}, "traffic class": {"tos": 4}, "ECN": {"tos": 1},
    "label": {"label": 1}, "hop limit": {"ttl": 63},
    "an extension header": {"extension": ((60, bytes([0, 1, 4, 0, 0, 0, 0])),)},
}


@pytest.mark.parametrize("name", V6_FIELDS)
@pytest.mark.parametrize("protocol", [socket.IPPROTO_TCP, socket.IPPROTO_UDP])
def test_ipv6_that_differs_is_not_merged(name: str, protocol: int) -> None:
    a, b = Packet(**V6, payload=DATA[:200], protocol=protocol).segments(100)
    other = replace(b, **V6_FIELDS[name])
    made = coalesce([(a.pack(), 0), (other.pack(), 0)])
    assert sorted(made) == sorted([(0, vnet(), a.pack()), (0, vnet(), other.pack())])
    assert len(coalesce([(a.pack(), 0), (b.pack(), 0)])) == 1


UDP_FIELDS: dict[str, dict[str, Any]] = {name: TCP_FIELDS[name] for name in (
    "source", "target", "ports", "tos", "ECN", "ttl", "id skips", "DF", "a reserved flag", "MF", "an offset", "IP options",
    "longer", "nothing")}


@pytest.mark.parametrize("name", UDP_FIELDS)
def test_udp_that_differs_is_not_merged(name: str) -> None:
    a, b = Packet(payload=DATA[:200], protocol=socket.IPPROTO_UDP).segments(100)
    other = replace(b, **UDP_FIELDS[name])
    made = coalesce([(a.pack(), 0), (other.pack(), 0)])
    assert sorted(made) == sorted([(0, vnet(), a.pack()), (0, vnet(), other.pack())])


@pytest.mark.parametrize("whole", [
    *(pytest.param(Packet(payload=DATA[:200], flags=flags), id=f"flags {flags:#x}") for flags in (
        0, ACK | FIN, ACK | SYN, ACK | RST, ACK | URG, ACK | ECE, ACK | CWR, *(ACK | 0x100 << k for k in range(4)))),
    pytest.param(Packet(payload=DATA[:200], offset=4), id="a TCP header of 16 bytes"),
    pytest.param(Packet(payload=DATA[:200], offset=15), id="TCP options of 40 bytes that are payload"),
    pytest.param(Packet(payload=DATA[:200], ip_options=bytes([1, 1, 1, 0])), id="IP options"),
    pytest.param(Packet(payload=DATA[:200], fragment=0x8000 | DF), id="a reserved flag of IP"),
    pytest.param(Packet(payload=DATA[:200], fragment=MF), id="MF"),
    pytest.param(Packet(**V6, payload=DATA[:200], extension=((60, bytes([0, 1, 4, 0, 0, 0, 0])),)), id="a header between"),
])
def test_alike_and_still_not_merged(whole: Packet) -> None:
    for more in (100, 104, 60):     # the next sequence number, as the header's length has it
        first, second = whole.segments(100)
        ones = [first.pack(), replace(second, sequence=first.sequence + more).pack()]
        assert coalesce([(one, 0) for one in ones]) == [(0, vnet(), one) for one in ones]


def test_flows_that_have_something_in_common() -> None:
    """The same addresses and ports in TCP and UDP; the same bytes as addresses of IPv4 and IPv6."""
    address = "a07:1:a07:2::"
    for other in (Packet(protocol=socket.IPPROTO_UDP, payload=DATA[:9]),
                  Packet(source=address, target="::", payload=DATA[:9]),
                  Packet(source=address, target="::", protocol=58, payload=DATA[:9]),
                  Packet(source=address, target="::", protocol=58, flags=0)):
        assert (b"\n\x07\0\1\n\x07\0\2" + bytes(24)).startswith(other.addresses())
        a, b = pair()
        c = Coalescer()
        found = [out for one in (a, other, b) for out in c.add(one.pack())] + c.flush()
        assert sorted(len(expand(header, packet)) for _, header, packet in found) == [1, 2]


def test_udp_without_a_checksum_is_not_merged() -> None:
    for at, whole in (26, Packet(payload=DATA[:200], protocol=socket.IPPROTO_UDP)), (46, replace(
            SUPERS["udp6"], payload=DATA[:200])):
        made = [changed(one.pack(), at, 0, 0) for one in whole.segments(100)]
        assert coalesce([(one, 0) for one in made]) == [(0, vnet(), one) for one in made]
    one = Packet(protocol=socket.IPPROTO_UDP, payload=bytes(4))     # where none and the right one are the same number
    one = replace(one, payload=(packets.ones(one.pseudo(12) + one.transport()[:6] + bytes(2)) ^ 0xffff).to_bytes(2, "big") +
                  bytes(2))
    none = changed(one.pack(), 26, 0, 0)
    assert one.pack()[26:28] == b"\xff\xff"
    assert coalesce([(none, 0), (none, 0)]) == [(0, vnet(), none)] * 2
    assert len(coalesce([(one.pack(), 0), (one.pack(), 0)])) == 1


def test_udp_whose_length_is_another() -> None:
    """Bytes behind the datagram, inside IP: nobody's business, whichever of them the checksum is right for."""
    a, b = Packet(payload=DATA[:200], protocol=socket.IPPROTO_UDP).segments(100)
    odd = b.header(110) + b.transport() + b"xx"
    longer = replace(b, payload=b.payload + b"xx")
    carried = bytearray(longer.transport())
    carried[4:8] = (108).to_bytes(2, "big") + bytes(2)
    carried[6:8] = packets.checksum(longer.pseudo(110) + carried).to_bytes(2, "big")
    for packet in odd, b.header(110) + bytes(carried):
        assert coalesce([(a.pack(), 0), (packet, 0)]) == [(0, vnet(), a.pack()), (0, vnet(), packet)]
        assert coalesce([(packet, 0), (packet, 0)]) == [(0, vnet(), packet)] * 2


def test_keys_are_never_merged() -> None:
    a, b = pair()
    assert coalesce([(a.pack(), 1), (b.pack(), 2)]) == [(1, vnet(), a.pack()), (2, vnet(), b.pack())]
    assert [key for key, _, _ in coalesce([(a.pack(), (1 << 64) - 1), (b.pack(), (1 << 64) - 1)])] == [(1 << 64) - 1]


def test_identification() -> None:
    """It counts, or it says nothing and is always the same one: not now this, now that; without DF it counts."""
    def ids(fragment: int, *values: int) -> list[int]:
        one = Packet(payload=DATA[:100 * len(values)], fragment=fragment, protocol=socket.IPPROTO_UDP)
        made = [replace(each, id=value).pack() for each, value in zip(one.segments(100), values, strict=True)]
        found = coalesce([(each, 0) for each in made])
        assert [without_id(each) for _, each in expanded(found)] == [without_id(each) for each in made]
        return [len(expand(header, packet)) for _, header, packet in found]

    assert ids(DF, 5, 6, 7, 8) == [4]
    assert ids(0, 0xffff, 0, 1) == [3]
    assert ids(DF, 5, 5, 5) == [3]
    assert ids(DF, 0, 0, 1) == [2, 1]
    assert ids(DF, 5, 6, 6) == [2, 1]
    assert ids(DF, 5, 6, 5) == [2, 1]
    assert ids(0, 5, 5, 5) == [1, 1, 1]


def test_the_last_one_may_be_shorter() -> None:
    """Then, and behind PSH, nothing more is added; another begins."""
    whole = Packet(payload=DATA[:850], sequence=0)
    ones = whole.segments(100)
    more = replace(whole, payload=DATA[:300], sequence=850, id=whole.id + 9).segments(100)
    found = coalesce([(one.pack(), 0) for one in (*ones, *more)])
    assert [len(packet) for _, _, packet in found] == [40 + 850, 40 + 300]
    ones = [replace(one, flags=ACK | PSH) if k == 4 else one for k, one in enumerate(ones)]
    found = coalesce([(one.pack(), 0) for one in ones])
    assert [len(packet) for _, _, packet in found] == [40 + 500, 40 + 350]
    assert [packet[33] for _, _, packet in found] == [ACK | PSH, ACK]
    assert [one for _, one in expanded(found)] == [one.pack() for one in ones]
    a, b = (replace(one, flags=ACK | PSH) for one in ones[:2])
    c = Coalescer()
    assert c.add(a.pack()) == [(0, vnet(), a.pack())]
    assert c.add(b.pack()) == [(0, vnet(), b.pack())]


@pytest.mark.parametrize(("protocol", "size", "counts"), [
    (socket.IPPROTO_TCP, 10, [128, 128, 44]), (socket.IPPROTO_UDP, 10, [64, 64, 64, 64, 44]),
    (socket.IPPROTO_TCP, 1448, [45, 45, 45, 45, 45, 45, 30]), (socket.IPPROTO_UDP, 1472, [44, 44, 44, 44, 44, 44, 36]),
    (socket.IPPROTO_TCP, 8960, [7, 7, 7, 7, 2]), (socket.IPPROTO_TCP, 40000, [1] * 30),
])
def test_limits(protocol: int, size: int, counts: list[int]) -> None:
    """A super-packet has at most 65535 bytes, 128 segments or 64 datagrams."""
    payload = DATA[:size]
    ones = [Packet(payload=payload, protocol=protocol, id=k, sequence=k * size) for k in range(sum(counts))]
    found = coalesce([(one.pack(), 0) for one in ones])
    assert [len(expand(header, packet)) for _, header, packet in found] == counts
    assert [one for _, one in expanded(found)] == [one.pack() for one in ones]


def test_the_largest_packets() -> None:
    a = Packet(payload=DATA[:32747], id=0)
    b = replace(a, payload=DATA[:32748], id=1, sequence=a.sequence + 32747)
    for first, second, count in (a, replace(b, payload=DATA[:32747]), 1), (a, b, 2):
        assert len(coalesce([(first.pack(), 0), (second.pack(), 0)])) == count
    one = Packet(payload=DATA[:65535 - 40])
    assert coalesce([(one.pack(), 0)]) == [(0, vnet(), one.pack())]
    assert max(len(packet) for _, _, packet in coalesce([(Packet(
        payload=DATA[:819], id=k, sequence=k * 819, options=TIMES[:4]).pack(), 0) for k in range(90)])) <= 65535


def test_a_wrong_checksum_is_nobody_elses() -> None:
    """It stays what it is, in the flow's order, without a word about it; what comes behind is another super-packet."""
    for whole in (SUPERS["tcp4"], SUPERS["udp4"], SUPERS["tcp6"], SUPERS["udp6"]):
        ones = [one.pack() for one in whole.segments(500)]
        for bad in range(len(ones)):
            for at in (len(ones[bad]) - 1, whole.headers(), whole.headers() - 2):
                sent = [changed(one, at, one[at] ^ 0x40) if k == bad else one for k, one in enumerate(ones)]
                c = Coalescer()
                found = [out for one in sent for out in c.add(one)] + c.flush()
                assert (0, vnet(), sent[bad]) in found
                assert [one for _, one in expanded(found)] == sent
                assert c.rejected == 1
                assert c.merged == len(sent) - len(found)
                assert c.supers == sum(header != vnet() for _, header, _ in found)


@pytest.mark.parametrize("name", ["tcp4", "tcp6", "udp4", "udp6"])
def test_any_changed_bit(name: str) -> None:
    """Of the second of three packets: what comes out stands for exactly what went in, in the same order, whatever it
    does to lengths, flows or checksums; where it makes the packet none, the others are as if it had not been there."""
    whole = replace(SUPERS[name], payload=DATA[:270], flags=ACK)
    first, second, third = (one.pack() for one in whole.segments(100))
    for at, bit in itertools.product(range(len(second)), range(8)):
        other = changed(second, at, second[at] ^ 1 << bit)
        c = Coalescer()
        found = c.add(first)
        sent = [first, other, third]
        try:
            found += c.add(other)
        except UsageError:
            sent.remove(other)
        found += c.add(third) + c.flush()
        length = int.from_bytes(other[2:4], "big") if name[3] == "4" else 40 + int.from_bytes(other[4:6], "big")
        expected = [one[:length] if one is other else one for one in sent]
        assert sorted(one for _, one in expanded(found)) == sorted(expected), (at, bit)
        if other in sent:
            assert (0, vnet(), other[:length]) in found, (at, bit)


def test_many_flows() -> None:
    """As many as are held come out whole; of more the oldest leaves early; all leave in the order in which they began."""
    def flow(k: int) -> list[bytes]:
        return [one.pack() for one in replace(TCP, ports=(k, 80)).segments(1000)]

    for count in (FLOWS, FLOWS + 1):
        flows = [flow(k) for k in range(count)]
        found = coalesce([(one, 0) for ones in zip(*flows, strict=True) for one in ones])
        byport: dict[int, list[bytes]] = defaultdict(list)
        for _, one in expanded(found):
            byport[int.from_bytes(one[20:22], "big")].append(one)
        assert list(byport.values()) == flows
        assert len(found) == FLOWS if count == FLOWS else len(found) >= 4 * count
    c = Coalescer()
    held = [one for k in range(FLOWS) for one in c.add(flow(k)[0])]
    assert held == []
    assert [one[20:22] for _, _, one in c.add(flow(99)[0])] == [b"\0\0"]
    assert [int.from_bytes(one[20:22], "big") for _, _, one in c.flush()] == [1, 2, 3, 4, 5, 6, 7, 99]
    assert c.flush() == []


def test_fragments_stay_behind_what_came_before() -> None:
    """Their ports are not to be had: all that is held between their addresses leaves first, and nothing else does."""
    mine = [replace(DGRAM, ports=(k, 9), payload=DATA[:100]) for k in range(3)]
    other = replace(mine[0], target="10.7.0.9")
    for odd in (Packet(fragment=MF, protocol=socket.IPPROTO_UDP, payload=DATA[:64]), Packet(fragment=3, payload=DATA[:64]),
                Packet(protocol=socket.IPPROTO_ICMP, payload=DATA[:64]), replace(mine[0], ip_options=bytes(4)),
                Packet(protocol=132, payload=b"")):
        c = Coalescer()
        assert [out for one in (mine[0], other, *mine[1:]) for out in c.add(one.pack())] == []
        assert c.add(mine[0].pack(), 1) == []
        assert c.add(odd.pack()) == [(0, vnet(), one.pack()) for one in (*mine, odd)]
        assert c.flush() == [(0, vnet(), other.pack()), (1, vnet(), mine[0].pack())]


def test_what_is_to_be_merged_is_chosen() -> None:
    flows = {"tcp4": SUPERS["tcp4"], "tcp6": SUPERS["tcp6"], "udp": SUPERS["udp4"]}
    for kind in flows:
        for name, whole in flows.items():
            ones = [(one.pack(), 0) for one in whole.segments(1000)]
            assert len(coalesce(ones, [kind])) == (1 if kind == name else len(ones))


@pytest.mark.parametrize(("element", "rule"), [
    pytest.param(b"", "length", id="nothing"),
    pytest.param(changed(TCP.pack(), 0, 0x35), "neither", id="version 3"),
    pytest.param(TCP.pack()[:19], "length", id="half an IPv4 header"),
    pytest.param(changed(TCP.pack(), 0, 0x44), "length", id="an IPv4 header of 16 bytes"),
    pytest.param(changed(TCP.pack(), 2, 0, 19), "length", id="shorter than its header"),
    pytest.param(changed(TCP.pack(), 2, 0, 0), "length", id="length 0"),
    pytest.param(changed(TCP.pack(), 2, 255, 255), "length", id="length 65535"),
    pytest.param(TCP.pack()[:-1], "length", id="cut"),
    pytest.param(SIX.pack()[:39], "length", id="half an IPv6 header"),
    pytest.param(changed(SIX.pack(), 4, 255, 255), "length", id="IPv6 beyond its element"),
])
def test_what_is_no_packet(element: bytes, rule: str) -> None:
    """It is told apart, and changes nothing for others."""
    c = Coalescer()
    a, b = pair()
    assert c.add(a.pack()) == []
    with pytest.raises(UsageError, match=rule):
        c.add(element)
    assert c.add(b.pack()) == []
    [(_, header, packet)] = c.flush()
    assert expand(header, packet) == [a.pack(), b.pack()]


@pytest.mark.parametrize("size", [20, 24, 28, 39, 40, 59, 60])
def test_headers_that_are_cut_short(size: int) -> None:
    """A transport's header that its packet has no room for passes as it is."""
    for packet in (Packet(protocol=socket.IPPROTO_TCP), Packet(protocol=socket.IPPROTO_UDP, payload=bytes(50)),
                   Packet(**V6)):
        one = packet.header(size - 20) + bytes(max(size - 20, 0))
        assert coalesce([(one, 0)]) == [(0, vnet(), one)]


flow = st.builds(
    lambda v6, tcp, port, key: (Packet(**(V6 if v6 else {}), protocol=6 if tcp else 17, ports=(port, 80),
                                       options=TIMES if tcp and port % 2 else b""), key),
    st.booleans(), st.booleans(), st.integers(1, 3), st.integers(0, 1))
step = st.tuples(st.integers(0, 5), st.sampled_from([1, 99, 100, 100, 100, 101, 1400]),
                 st.sampled_from(["next"] * 12 + ["push", "again", "skip", "bit", "fin", "fragment", "ttl", "flush"]),
                 st.integers(0, 1 << 30))


@settings(max_examples=300, deadline=None)
@given(st.lists(flow, min_size=1, max_size=6), st.lists(step, max_size=60))
def test_flows_in_any_order(flows: list[tuple[Packet, int]], steps: list[tuple[int, int, str, int]]) -> None:
    """Every packet of every flow comes out once, in its flow's order, with every byte that it had."""
    c = Coalescer()
    found: Out = []
    now = list(flows)
    sent: dict[Any, list[bytes]] = defaultdict(list)
    came: dict[Any, list[bytes]] = defaultdict(list)

    def name(key: int, one: bytes) -> Any:
        start = 20 if one[0] >> 4 == 4 else 40
        addresses = one[12:20] if start == 20 else one[8:40]
        return key, addresses, one[9] if start == 20 else one[6], one[start:start + 4]

    for which, size, what, extra in steps:
        which %= len(flows)
        packet, key = now[which]
        packet = replace(packet, payload=DATA[extra % 60000:][:size])
        if what == "flush":
            found += c.flush()
            continue
        if what == "push" or what == "fin":
            packet = replace(packet, flags=packet.flags | (PSH if what == "push" else FIN))
        elif what == "ttl":
            packet = replace(packet, ttl=extra % 200 + 1)
        elif what == "fragment":
            packet = replace(packet, fragment=MF if not packet.v6 else packet.fragment)
        one = packet.pack()
        if what == "bit":
            at = packet.start() + 4 + extra % (len(one) - packet.start() - 4)   # ports stay: it is this flow's
            one = changed(one, at, one[at] ^ 1 << extra % 8)
        if what != "again":
            more = size if packet.protocol == 6 else 0
            now[which] = replace(now[which][0], id=packet.id + 1, sequence=packet.sequence + more + (what == "skip")), key
        sent[name(key, one)].append(one)
        found += c.add(one + b"?" * (extra % 3), key)
    found += c.flush()
    for key, one in expanded(found):
        came[name(key, one)].append(one)
    assert {key: list(map(without_id, ones)) for key, ones in came.items()} == \
        {key: list(map(without_id, ones)) for key, ones in sent.items()}


TOGGLE = """if True:
    import mmap, sys
    with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as page:
        print(flush=True)
        while True:
            for value in (b"\\0\\1", b"\\0\\0"):       # no number of ones adds up to nothing
                page[40:1440] = value * 700
"""


def test_elements_that_change_meanwhile(tmp_path: Path) -> None:
    """Another process writes the payload that is being read: what was merged is what its checksum was right for."""
    a, b = (one.pack() for one in Packet(payload=bytes(2800)).segments(1400))
    path = tmp_path / "element"
    path.write_bytes(b)
    with subprocess.Popen([sys.executable, "-c", TOGGLE, path], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as page:
                merged = passed = 0
                while merged < 100 or passed < 100:
                    c = Coalescer()
                    c.add(a)
                    found = c.add(page) + c.flush()
                    passed += len(found) == 2
                    if len(found) == 1:
                        merged += 1
                        assert [one[40:] for one in expand(found[0][1], found[0][2])] == [bytes(1400)] * 2
        finally:
            child.kill()


# ---- the path's MTU

def reassembled(fragments: list[bytes]) -> bytes:
    """The payload; that they fit together is checked."""
    found = b""
    start = int.from_bytes(fragments[0][6:8], "big") & 0x1fff
    for k, one in enumerate(fragments):
        word, size = int.from_bytes(one[6:8], "big"), (one[0] & 15) * 4
        assert checksum(one[:size]) == b"\0\0" and int.from_bytes(one[2:4], "big") == len(one)
        assert (word & 0x1fff) == start + len(found) // 8 and len(found) % 8 == 0
        assert bool(word & MF) or k == len(fragments) - 1
        found += one[size:]
    return found


@pytest.mark.parametrize("entry", [68, 69, 75, 76, 576, 1280, 1499])
def test_fragments(entry: int) -> None:
    for length in (1500, 9000, 65515):
        packet = Packet(fragment=0, protocol=socket.IPPROTO_UDP, payload=DATA[:length - 28], id=777, tos=3)
        verdict, made = pmtu(packet.pack(), entry)
        assert verdict == "fragments"
        assert reassembled(made) == packet.pack()[20:]
        assert all(one[4:6] == (777).to_bytes(2, "big") and one[1] == 3 and not one[6] & 0x40 for one in made)
        assert not made[-1][6] & 0x20
        sizes = {len(one) for one in made[:-1]}
        assert sizes == {20 + (entry - 20) // 8 * 8}
        assert len(made[-1]) <= entry


def test_fragments_of_a_fragment() -> None:
    """Offsets go on from its own; that more follow stands on all of them."""
    for more in (MF, 0):
        one = Packet(fragment=more | 100, protocol=socket.IPPROTO_UDP, id=3)
        packet = one.header(800) + DATA[:800]
        verdict, made = pmtu(packet, 300)
        assert verdict == "fragments" and len(made) == 3
        assert [int.from_bytes(piece[6:8], "big") for piece in made] == [MF | 100, MF | 135, more | 170]
        assert b"".join(piece[20:] for piece in made) == DATA[:800]
    beyond = Packet(fragment=8191, protocol=17).header(800) + bytes(800)
    assert pmtu(beyond, 300) == ("nothing", [])


def test_options_of_fragments() -> None:
    """Of the copied flag: with it on all, without it on the first; there is no other length."""
    options = bytes([0x94, 4, 0, 0, 7, 7, 4, 1, 2, 3, 4, 1, 0x82, 3, 9, 0])
    packet = Packet(fragment=0, ip_options=options, protocol=17, payload=DATA[:500])
    _, made = pmtu(packet.pack(), 120)
    assert len(made) > 3
    assert made[0][20:36] == options
    assert {one[20:36] for one in made[1:]} == {bytes([0x94, 4, 0, 0]) + b"\x01" * 8 + bytes([0x82, 3, 9, 0])}
    assert reassembled(made) == packet.pack()[36:]
    for cut in (bytes([7, 0, 0, 0]), bytes([7, 9, 0, 0]), bytes([1, 1, 1, 7]), bytes([7, 1, 0, 0]), b"\1" * 39 + b"\7"):
        _, made = pmtu(replace(packet, ip_options=cut).pack(), 120)
        assert {one[20:20 + len(cut)] for one in made} == {cut}


@pytest.mark.parametrize(("entry", "length", "v6", "limit"), [
    (0, 65535, False, None), (0, 65535, True, None), (1400, 1400, False, None), (1400, 1401, False, 1400),
    (1400, 1400, True, None), (1400, 1401, True, 1400), (1, 68, False, None), (1, 69, False, 68), (67, 69, False, 68),
    (1, 1280, True, None), (1, 1281, True, 1280), (1279, 1281, True, 1280), (0xffffffff, 65535, False, None),
])
def test_entries(entry: int, length: int, v6: bool, limit: int | None) -> None:
    packet = Packet(**(V6 if v6 else {}), payload=DATA[:length - (60 if v6 else 40)]).pack()
    assert len(packet) == length
    verdict, made = pmtu(packet, entry)
    if limit is None:
        assert (verdict, made) == ("fits", [])
        return
    assert verdict == "news"
    [news] = made
    assert int.from_bytes(news[44:48] if v6 else news[26:28], "big") == limit


def test_news_for_ipv4() -> None:
    """ICMP type 3 code 4 from whom it was for, with 576 bytes at most, of which its own beginning is what tells."""
    packet = Packet(payload=DATA[:2000]).pack()
    _, [news] = pmtu(packet, 1400)
    assert right(news) and len(news) == 576
    assert news[9] == 1 and news[12:16] == packet[16:20] and news[16:20] == packet[12:16]
    assert news[20:22] == b"\x03\x04" and news[24:28] == b"\0\0" + (1400).to_bytes(2, "big")
    assert news[28:] == packet[:548]
    _, [news] = pmtu(packet[:2] + (300).to_bytes(2, "big") + packet[4:300], 100)
    assert right(news) and news[28:30] == packet[:2] and len(news) == 328


def test_news_for_ipv6() -> None:
    """ICMPv6 type 2 code 0, with 1280 bytes at most."""
    packet = Packet(**V6, payload=DATA[:2000]).pack()
    _, [news] = pmtu(packet, 1400)
    assert right(news) and len(news) == 1280
    assert news[6] == 58 and news[8:24] == packet[24:40] and news[24:40] == packet[8:24]
    assert news[40:42] == b"\x02\x00" and news[44:48] == (1400).to_bytes(4, "big")
    assert news[48:] == packet[:1232]


ICMP, ICMP6 = socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6
LONG = DATA[:2000]


@pytest.mark.parametrize("packet", [
    pytest.param(Packet(payload=LONG, source="0.0.0.0"), id="from nobody"),
    pytest.param(Packet(payload=LONG, source="127.0.0.1"), id="from oneself"),
    pytest.param(Packet(payload=LONG, source="224.0.0.1"), id="from a group"),
    pytest.param(Packet(payload=LONG, source="255.255.255.255"), id="from all"),
    pytest.param(Packet(payload=LONG, target="239.1.2.3"), id="to a group"),
    pytest.param(Packet(payload=LONG, target="255.255.255.255"), id="to all"),
    pytest.param(Packet(payload=LONG, fragment=DF | 10), id="a later fragment"),
    *(pytest.param(Packet(payload=bytes([kind]) + LONG, protocol=ICMP), id=f"ICMP {kind}") for kind in (
        3, 4, 5, 11, 12, 40)),
    pytest.param(Packet(**V6, payload=LONG, extension=((0, bytes([255]) + bytes(6)),)), id="IPv6 headers that do not end"),
    pytest.param(Packet(**V6, payload=LONG, extension=(
        (44, bytes([0, 0, 8, 0, 0, 0, 7])), (44, bytes([0, 0, 1, 0, 0, 0, 7])))),
                 id="a later IPv6 fragment of what looks like a first one"),
    pytest.param(Packet(**V6 | {"source": "::"}, payload=LONG), id="IPv6 from nobody"),
    pytest.param(Packet(**V6 | {"source": "ff02::1"}, payload=LONG), id="IPv6 from a group"),
    pytest.param(Packet(**V6 | {"target": "ff02::1"}, payload=LONG), id="IPv6 to a group"),
    *(pytest.param(Packet(**V6, payload=bytes([kind]) + LONG, protocol=ICMP6), id=f"ICMPv6 {kind}") for kind in (
        1, 2, 3, 4, 127, 137)),
    pytest.param(Packet(**V6, payload=b"\x01" + LONG, protocol=ICMP6, extension=(
        (0, bytes(7)), (44, bytes([0, 0, 1, 0, 0, 0, 7])))), id="ICMPv6 1 behind other headers"),
    pytest.param(Packet(**V6, payload=LONG, extension=((44, bytes([0, 0, 8, 0, 0, 0, 7])),)), id="a later IPv6 fragment"),
])
def test_who_is_not_told(packet: Packet) -> None:
    assert pmtu(packet.pack(), 1300) == ("nothing", [])


@pytest.mark.parametrize("packet", [
    *(Packet(payload=bytes([kind]) + LONG, protocol=ICMP) for kind in (0, 8, 13)),
    *(Packet(**V6, payload=bytes([kind]) + LONG, protocol=ICMP6) for kind in (128, 129, 135)),
    Packet(payload=LONG, fragment=DF | MF),
    Packet(**V6, payload=LONG, extension=((44, bytes([0, 0, 1, 0, 0, 0, 7])),)),
    Packet(payload=LONG, protocol=132),
])
def test_who_is_told(packet: Packet) -> None:
    verdict, [news] = pmtu(packet.pack(), 1300)
    assert verdict == "news" and right(news)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([Packet(payload=LONG), Packet(**V6, payload=LONG),
                        Packet(payload=LONG, fragment=0, ip_options=bytes(40)),
                        Packet(**V6, payload=LONG, extension=((0, bytes(7)), (60, bytes(7))))]),
       st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), max_size=5), st.integers(0, 2000), st.integers(0, 2100))
def test_any_bytes_have_a_path(packet: Packet, marks: list[tuple[int, int]], entry: int, cut: int) -> None:
    """Nothing is read beside them, and nothing that comes of it is too long."""
    data = bytearray(packet.pack())
    for at, value in marks:
        data[at] = value
    _, made = pmtu(bytes(data[:cut]), entry)
    assert all(len(one) <= max(entry, 1280) for one in made)


def test_news_are_few() -> None:
    """So many at once, and then so many a second; a clock that goes back gives no more than at first."""
    bucket, now = Bucket(), 10**9
    assert [bucket.allowed(now) for _ in range(BURST + 2)] == [True] * BURST + [False] * 2
    each = 10**9 // RATE
    assert not bucket.allowed(now + each - 1)
    assert bucket.allowed(now + each)
    assert not bucket.allowed(now + each)
    assert sum(bucket.allowed(now + 10**9 + k * 1000) for k in range(10**6 // 1000)) == BURST
    count = sum(bucket.allowed(now + 2 * 10**9 + k * 10**5) for k in range(10**4))
    assert BURST + RATE - 2 <= count <= BURST + RATE


class Looks:
    """A sender's looks at its device, in time that is made up: how many packets, and how many looks gathered."""

    def __init__(self) -> None:
        self.gather, self.now, self.packets, self.gathered = Gather(), 10**9, 0, 0

    def last(self, seconds: float, each: float, more: float, *, gathering: float = 150e-6, dialogue: int = 0) -> float:
        """Packets/s of a load for so long. each: seconds between packets; more: what every look costs, besides;
        dialogue: so many at a time, of which none comes before the last ones were seen."""
        begin, before, end = self.now, self.packets, self.now + int(seconds * 1e9)
        gathers = False
        while self.now < end:
            passed = (gathering if gathers else 0.0) + more + max(dialogue, 1) * each
            count = dialogue or int((passed - more) / each)
            self.now += int(passed * 1e9)
            gathers = self.gather.now(count, self.now)
            self.packets += count
            self.gathered += gathers
        return (self.packets - before) / (self.now - begin) * 1e9


def test_packets_gather_where_more_come_that_way() -> None:
    """Of who shares our CPU: a look costs him two packets. It is tried again and again whether that is still so."""
    looks = Looks()
    assert looks.last(1, each=5e-6, more=10e-6) > 0.85 / 5e-6    # and 1 / 15e-6 where none gather
    assert looks.gathered > 1 / 165e-6 * 0.85
    looks.last(1, each=5e-6, more=0)
    count = looks.gathered
    looks.last(1, each=5e-6, more=0)
    assert looks.gathered - count < 1 / 150e-6 * 0.1


@pytest.mark.parametrize("dialogue", [1, 8])
def test_a_dialogue_does_not_wait(dialogue: int) -> None:
    """It would slow down; so it is tried ever less often, and costs next to nothing."""
    looks = Looks()
    plain = dialogue / (dialogue * 2e-6 + 10e-6)
    assert looks.last(4, each=2e-6, more=10e-6, dialogue=dialogue) > plain * 0.97
    count, looks.gathered = looks.gathered, 0
    assert 0 < looks.gathered + count
    looks.last(4, each=2e-6, more=10e-6, dialogue=dialogue)
    assert looks.gathered < 8 * 2e-3 / 150e-6 + 8


def test_packets_that_are_few_do_not_gather() -> None:
    """Nor is it tried; what gathers ceases with its packets, at once."""
    looks = Looks()
    assert looks.last(1, each=30e-6, more=0) > 0.99 / 30e-6 and looks.gathered == 0
    looks.last(1, each=5e-6, more=10e-6)
    looks.now += 150_000
    assert looks.gathered and not looks.gather.now(0, looks.now)
    for pause in (10**4, 10**9, 10**9):     # a break is no slow load
        looks.now += pause
        assert not looks.gather.now(1, looks.now)


def test_a_load_that_slows_down_is_tried_at_once() -> None:
    """What a trial showed holds no longer."""
    looks = Looks()
    looks.last(8, each=5e-6, more=0)    # gathering brings nothing
    looks.gathered = 0
    looks.last(0.01, each=5e-6, more=10e-6)
    assert looks.gathered > 20


def test_a_trial_with_a_break_is_none() -> None:
    """What comes after it is tried anew, at once."""
    looks = Looks()
    while not looks.gathered:
        looks.last(1e-6, each=5e-6, more=10e-6)
    looks.now += 10**7
    assert not looks.gather.now(1, looks.now)
    looks.gathered = 0
    looks.last(0.01, each=5e-6, more=10e-6)
    assert looks.gathered > 20


def test_bursts_are_tried_less_and_less() -> None:
    """Of 100 packets in 200 microseconds, once in each millisecond: a trial ends with a look that finds nothing."""
    looks = Looks()
    for _ in range(2000):
        looks.last(200e-6, each=2e-6, more=0)
        looks.now += 800_000
        looks.gather.now(0, looks.now)
    assert 0 < looks.gathered < 40
