"""The network engines with super-packets, marks, children and path MTUs, on socket pairs in place of devices.

What the far side sees is looked at by code that shares none with muenfast (net_peer.py). No test here needs root.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from helpers import eventually
from net_peer import PROTOCOL, checked, checksum, ipv4, ipv6, net_element, udp
from peer import ChannelReader, ChannelWriter
from test_net_frames import A4, A6, B4, B6, Device, Files, files, region, running

from muenfast._marks import prefix
from muenfast._net import MERGES, Ports, Receiver, Sender, element_size
from muenfast._ring import Writer

__all__ = ["files"]     # the fixture

MTU = 576
SIZE = element_size("net_hdr", MTU)
ALL = tuple(MERGES)
NONE, TCP4, TCP6, UDP_L4 = 0, 1, 4, 5     # virtio_net_hdr's kinds

Made = Callable[..., tuple[Device, Sender, ChannelReader]]
Tapped = Callable[[Device, int, Ports], socket.socket]


def vnet(kind: int = NONE, headers: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("=BBHHHH", 1 if offset else 0, kind, headers, size, start, offset)


def pseudo(version: int, protocol: int, length: int) -> int:
    """The sum of a pseudo-header, not inverted, as the kernel leaves it in a checksum that is to be completed."""
    addresses = A4 + B4 if version == 4 else A6 + B6
    return ~checksum(addresses + struct.pack(">II", length, protocol)) & 0xFFFF


def tcp(version: int, payload: bytes, *, sequence: int = 1000, flags: int = 0x18, whole: bool = False) -> bytes:
    """A TCP packet from A to B; its checksum is complete or (whole False) the pseudo-header's sum."""
    head = struct.pack(">HHIIBBHHH", 80, 90, sequence, 7, 5 << 4, flags, 512, 0, 0)
    body = head + payload
    total = pseudo(version, 6, len(body))
    if whole:
        addresses = A4 + B4 if version == 4 else A6 + B6
        total = checksum(addresses + struct.pack(">II", len(body), 6) + body)
    body = body[:16] + struct.pack(">H", total) + body[18:]
    return ipv4(A4, B4, 6, body) if version == 4 else ipv6(A6, B6, 6, body)


def super_packet(version: int, payload: bytes, mss: int) -> bytes:
    header = 40 if version == 4 else 60
    return vnet(TCP4 if version == 4 else TCP6, header, mss, header - 20, 16) + tcp(version, payload)


@pytest.fixture
def sending(files: Callable[[str, int], Files]) -> Iterator[Made]:
    """A sender of a device with offloads that runs, and a plain reader of its channel."""
    opened: list[Callable[[], object]] = []

    def make(device: Device, *, elements: int = 512, mtu: int = MTU, paths: bytes | None = None,
             bell: object = None) -> tuple[Device, Sender, ChannelReader]:
        size = element_size("net_hdr", mtu)
        file = files("out", region(size, elements))
        memory = None
        if paths is not None:
            memory = files("paths", len(paths)).map(len(paths), writable=True)
            memory[:] = paths
        sender = Sender(device.ports, file.map(region(size, elements), writable=True), framing="net_hdr", mtu=mtu,
                        protocol=PROTOCOL, paths=memory)
        sender.link(True)
        context = running(sender)
        context.__enter__()
        opened.append(device.close)
        opened.append(lambda: context.__exit__(None, None, None))
        eventually(lambda: sender.active)
        reader = ChannelReader(file.path, PROTOCOL, size)
        reader.read()
        opened.append(reader.close)
        return device, sender, reader

    yield make
    for close in reversed(opened):
        close()


def packets(reader: ChannelReader, count: int) -> list[bytes]:
    """The next packets that come, each in an element whose header is right and whose rest is zero."""
    found = []
    end = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < end
        _, element = reader.read()
        if element is None:
            continue
        mark, length, protocol, qos = struct.unpack_from("<IHBB", element)
        packet = element[8:8 + length]
        assert element == net_element(packet, len(element), mark)
        found.append(packet)
    return found


# ---- out: super-packets become ordinary ones

@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("length", [1, 500, 501, 1000, 20_000, 60_000])
def test_a_super_packet_is_split(sending: Made, version: int, length: int) -> None:
    """Into packets with full checksums that carry the same bytes; longer than the MTU is none of them."""
    device, sender, reader = sending(Device(offload=True))
    payload = bytes(k * 7 & 0xFF for k in range(length))
    device.ours.send(super_packet(version, payload, 500))
    header = 40 if version == 4 else 60
    found = packets(reader, -(-length // 500))
    assert b"".join(packet[header:] for packet in found) == payload
    assert all(checked(packet) and len(packet) <= MTU for packet in found)
    assert [int.from_bytes(packet[header - 16:header - 12], "big") for packet in found] == \
        [1000 + 500 * k for k in range(len(found))]
    counters = eventually(lambda: sender.counters["tx_packets"] == len(found) and sender.counters)
    assert counters["tx_bytes"] == sum(map(len, found)) and counters["tx_dropped"] == 0
    assert counters["split"] == {"supers": 1, "segments": len(found)}
    assert device.ports.counters(0)["tx_packets"] == 1


def test_a_super_packet_longer_than_the_ring(sending: Made) -> None:
    """Goes out in pieces as long as nobody is waited for; what a slow reader misses is an overrun, nothing else."""
    device, sender, reader = sending(Device(offload=True), elements=8)
    device.ours.send(super_packet(4, bytes(60_000), 500))
    eventually(lambda: sender.counters["tx_packets"] == 120)
    device.ours.send(vnet() + ipv4(A4, B4, 17, udp(1, 2, b"after")))
    eventually(lambda: sender.counters["tx_packets"] == 121)
    reader.close()


def test_a_checksum_is_completed(sending: Made) -> None:
    """Where the packet stands, of a packet that stays whole; one that has its checksum is left alone."""
    device, _, reader = sending(Device(offload=True))
    for version, start in ((4, 20), (6, 40)):
        device.ours.send(vnet(start=start, offset=16) + tcp(version, b"data"))
        assert packets(reader, 1) == [tcp(version, b"data", whole=True)]
        device.ours.send(vnet() + tcp(version, b"data", whole=True))
        assert packets(reader, 1) == [tcp(version, b"data", whole=True)]


def test_what_is_no_super_packet_is_dropped(sending: Made) -> None:
    device, sender, reader = sending(Device(offload=True))
    good = ipv4(A4, B4, 17, udp(1, 2, b"good"))
    for bad, cause in ((vnet(TCP4, 40, 0, 20, 16) + tcp(4, bytes(2000)), "malformed"),      # segments of nothing
                       (vnet(7, 40, 500, 20, 16) + tcp(4, bytes(2000)), "malformed"),       # of no kind
                       (vnet(TCP4, 40, 500, 20, 60000) + tcp(4, bytes(2000)), "malformed"),  # a checksum beyond the end
                       (vnet(start=60000, offset=16) + tcp(4, b"x"), "malformed"),
                       (vnet(TCP4, 40, 500, 20, 16) + b"\x55" * 2000, "not_ip"),
                       (vnet(UDP_L4, 28, 1000, 20, 6) + ipv4(A4, B4, 17, udp(1, 2, bytes(4000))), "oversize"),
                       (vnet() + tcp(4, bytes(2000)), "oversize"), (vnet(), "not_ip"), (b"\0\0\0", "not_ip")):
        before = sender.counters["lost"][cause]
        device.ours.send(bad)
        eventually(lambda: sender.counters["lost"][cause] == before + 1)
    device.ours.send(vnet() + good)
    assert packets(reader, 1) == [good]
    assert sender.counters["tx_packets"] == 1


def test_marks_of_a_super_packet(sending: Made) -> None:
    """Each packet of it has the mark; what virtio_net_hdr says counts the net_hdr that the kernel put in front."""
    device, _, reader = sending(Device(offload=True, way="front"))
    header = struct.pack("<IHBB", 0xDEADBEEF, 9, 4, 0)
    device.ours.send(vnet(TCP4, 48, 500, 28, 16) + header + tcp(4, bytes(1200)))
    for _ in range(3):
        element = eventually(lambda: reader.read()[1])
        assert struct.unpack_from("<I", element)[0] == 0xDEADBEEF
        assert checked(element[8:8 + struct.unpack_from("<H", element, 4)[0]])


@pytest.fixture
def tapped() -> Iterator[Tapped]:
    """Makes a port of a device whose packets come from a packet socket; the end that gives those."""
    ends: list[socket.socket] = []

    def make(device: Device, number: int, ports: Ports) -> socket.socket:
        given, taken = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.extend((given, taken))
        given.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        taken.setblocking(False)
        ports.add(number, device.fd, "tap", taken.fileno())
        return given

    yield make
    for end in ends:
        end.close()


def test_a_pending_super_packet_and_what_a_tap_doubles(sending: Made, tapped: Tapped) -> None:
    """The device has the same once more: that is thrown away, and what goes out are the bytes of the packet socket."""
    device = Device(offload=True)
    assert device.ports.remove(0)
    given = tapped(device, 0, device.ports)
    _, sender, reader = sending(device)
    payload = bytes(k * 7 & 0xFF for k in range(60_000))
    packet = super_packet(4, payload, 500)
    device.ours.send(packet)
    given.send(packet)
    found = packets(reader, 120)
    assert b"".join(each[40:] for each in found) == payload
    assert all(map(checked, found))


@pytest.mark.parametrize("how", ["close", "down"])
def test_what_is_pending_at_the_end_is_counted(how: str, files: Callable[[str, int], Files]) -> None:
    """Of a super-packet of which elements were yet to be made: what went out, and what did not, is all of it. None of it
    goes out in a later epoch."""
    device, other = Device(offload=True), Device(offload=True)
    file, bell = files("out", region(SIZE, 64)), files("bell", 4096)
    sender = Sender(device.ports, file.map(region(SIZE, 64), writable=True), framing="net_hdr", mtu=MTU, protocol=PROTOCOL,
                    bell=bell.map(4096, writable=True))
    receiver = Receiver(other.ports, file.map(region(SIZE, 64), writable=False), framing="net_hdr", mtu=MTU,
                        protocol=PROTOCOL, bell=bell.map(4096, writable=True))
    sender.link(True)
    assert sender.run(5) == "up" and receiver.run(5) == "connected"     # and takes nothing, so that it is waited for
    device.ours.send(super_packet(4, bytes(60_000), 500))
    sender.run(0.01)
    sent = sender.counters["tx_packets"]
    assert sender.counters["waits"] == 1 and sent < 64
    if how == "down":
        for up in (False, True):
            sender.link(up)
            assert sender.run(5) == ("up" if up else "down")
        sender.run(0.01)
    for each in (sender, receiver, device, other):
        each.close()
    counters = sender.counters
    assert counters["tx_packets"] == sent and counters["split"] == {"supers": 1, "segments": sent}
    assert counters["lost"]["down" if how == "down" else "no_peer"] == 120 - sent


def test_a_port_is_removed_once_nobody_uses_it() -> None:
    """A sender that waits for its packets has its turn until it was woken."""
    device = Device(offload=True)
    sender = Sender(device.ports, bytearray(region(SIZE, 64)), framing="net_hdr", mtu=MTU, protocol=PROTOCOL)
    thread = threading.Thread(target=lambda: [None for _ in iter(lambda: sender.run(20), "stopped")])
    thread.start()
    try:
        at_once, end = [], time.monotonic() + 20
        while len(at_once) < 100 or (all(at_once) and time.monotonic() < end):
            device.ports.add(1, device.fd)
            time.sleep(0.001)   # it may have been woken, and be done, before we look; or not wait yet
            at_once.append(device.ports.remove(1, 0))
            assert at_once[-1] or device.ports.remove(1)
        assert not all(at_once)
    finally:
        sender.stop()
        thread.join()
        sender.close()
        device.close()


def test_going_down_ends_where_packets_do_not(files: Callable[[str, int], Files]) -> None:
    """A child that is up sends on while its parent goes down."""
    device = Device()
    file = files("out", region(SIZE, 64))
    sender = Sender(device.ports, file.map(region(SIZE, 64), writable=True), framing="net_hdr", mtu=MTU, protocol=PROTOCOL)
    events: list[str] = []
    with open("/dev/zero", "rb", buffering=0) as endless:
        device.ports.add(1, endless.fileno())
        sender.link(True)
        assert sender.run(5) == "up"
        sender.link(False)
        thread = threading.Thread(target=lambda: events.append(sender.run(5)), daemon=True)
        thread.start()
        eventually(lambda: events)
        assert events == ["down"] and sender.counters["lost"]["down"] >= 4096
        assert device.ports.remove(1)
    sender.close()
    device.close()


def test_what_a_tap_missed_is_thrown_away_whole(sending: Made, tapped: Tapped) -> None:
    """However much that is: else the device would be full in the end."""
    device, child = Device(offload=True), Device(offload=True)
    given = tapped(child, 1, device.ports)
    _, _, reader = sending(device)
    good = vnet() + ipv4(A4, B4, 17, udp(1, 2, b"good"))
    for _ in range(200):
        child.ours.send(good)
    given.send(good)
    packets(reader, 1)

    def empty() -> bool:
        try:
            return not child.theirs.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True

    eventually(empty)
    assert device.ports.remove(1)
    child.close()


def test_several_ports_send(sending: Made) -> None:
    """A child's packets go the same way; once it is removed, its device is left alone."""
    device, sender, reader = sending(Device(offload=True))
    child = Device(offload=True)
    good = ipv4(A4, B4, 17, udp(1, 2, b"good"))
    device.ports.add(3, child.fd)
    device.ours.send(vnet() + good)     # that it looks again
    packets(reader, 1)
    for _ in range(3):
        child.ours.send(vnet() + good)
    assert packets(reader, 3) == [good] * 3
    assert device.ports.counters(3)["tx_packets"] == 3 and device.ports.counters(0)["tx_packets"] == 1
    assert device.ports.remove(3)
    child.ours.send(vnet() + good)
    device.ours.send(vnet() + good)
    packets(reader, 1)
    assert len(child.theirs.recv(100)) == 10 + len(good)
    child.close()


# ---- out: the path's MTU

def entries(**limits: int) -> bytes:
    words = [0] * 100
    for mark, limit in limits.items():
        words[int(mark[1:]) - 1] = limit
    return struct.pack("=100I", *words)


def marked(packet: bytes, mark: int) -> bytes:
    return vnet() + struct.pack("<IHBB", mark, 0, 4, 0) + packet


def test_a_path_mtu_fragments(sending: Made) -> None:
    """IPv4 without DF; packets of other marks, and those that fit, are left alone."""
    device, sender, reader = sending(Device(offload=True, way="front"), mtu=1500, paths=entries(m7=300))
    packet = ipv4(A4, B4, 17, udp(1, 2, bytes(range(250)) * 4))
    for mark in (0, 8, 200, 0xFFFFFFFF):
        device.ours.send(marked(packet, mark))
        assert packets(reader, 1) == [packet]
    small = ipv4(A4, B4, 17, udp(1, 2, bytes(272)))
    device.ours.send(marked(small, 7))
    assert packets(reader, 1) == [small]
    device.ours.send(marked(packet, 7))
    found = packets(reader, 4)
    assert all(len(each) <= 300 and checked(each) for each in found)
    assert b"".join(each[20:] for each in found) == packet[20:]
    offsets = [int.from_bytes(each[6:8], "big") for each in found]
    assert [each & 0x1FFF for each in offsets] == [0, 35, 70, 105] and [each >> 13 for each in offsets] == [1, 1, 1, 0]
    assert sender.counters["path_mtu"] == {"fragmented": 1, "fragments": 4, "news": 0}
    assert sender.counters["tx_dropped"] == 0


def test_segments_below_a_path_mtu_go_out_whole(sending: Made) -> None:
    """A super-packet of a mark with a limit: split as without it where each of its segments is below."""
    device, sender, reader = sending(Device(offload=True, way="front"), mtu=1500, paths=entries(m7=600))
    payload = bytes(k * 11 & 0xFF for k in range(5000))
    device.ours.send(vnet(TCP4, 48, 500, 28, 16) + struct.pack("<IHBB", 7, 0, 4, 0) + tcp(4, payload))
    found = packets(reader, 10)
    assert b"".join(packet[40:] for packet in found) == payload
    assert all(checked(packet) for packet in found)
    counters = eventually(lambda: sender.counters["tx_packets"] == 10 and sender.counters)
    assert counters["split"] == {"supers": 1, "segments": 10} and counters["tx_dropped"] == 0
    assert counters["path_mtu"] == {"fragmented": 0, "fragments": 0, "news": 0}


@pytest.mark.parametrize("version", [4, 6])
def test_a_path_mtu_is_told(sending: Made, version: int) -> None:
    """IPv4 with DF and IPv6: the packet goes nowhere, and its sender hears of the limit; of a super-packet once."""
    limit = 700 if version == 4 else 1300
    device, sender, reader = sending(Device(offload=True, way="front"), mtu=1500, paths=entries(m1=limit))
    header = 20 if version == 4 else 40
    packet = tcp(version, bytes(1400), whole=True)
    if version == 4:    # with DF
        packet = packet[:6] + b"\x40\0" + b"\x40\x06\0\0" + packet[12:]
        packet = packet[:10] + struct.pack(">H", checksum(packet[:20])) + packet[12:]
    device.ours.send(marked(packet, 1))
    news = device.got()
    assert news[:10] == bytes(10) and checked(news[10:])
    news = news[10:]
    kind = news[header:header + 2]
    assert kind == (b"\x03\x04" if version == 4 else b"\x02\x00")
    told = struct.unpack_from(">H", news, header + 6)[0] if version == 4 else struct.unpack_from(">I", news, header + 4)[0]
    assert told == limit and packet.startswith(news[header + 8:])
    body = super_packet(version, bytes(42_000), 1400)
    raw = bytearray(body[10:])
    if version == 4:
        raw[6:8] = b"\x40\0"
    start = header + 8
    device.ours.send(vnet(TCP4 if version == 4 else TCP6, start + 20, 1400, start, 16) + struct.pack("<IHBB", 1, 0, 4, 0)
                     + bytes(raw))
    device.got()
    eventually(lambda: sender.counters["lost"]["path_mtu"] == 31)
    assert device.nothing() and reader.read()[1] is None
    assert sender.counters["path_mtu"]["news"] == 2
    assert device.ports.counters(0)["rx_packets"] == 2      # as the kernel has it
    assert device.ports.counters(0)["rx_bytes"] == 2 * len(news)


def test_news_are_few(sending: Made) -> None:
    """However many packets are too long, the sender is not flooded."""
    device, sender, _ = sending(Device(offload=True, way="front"), mtu=1500, paths=entries(m1=1300))
    stop = threading.Event()

    def swallow() -> None:
        while not stop.is_set():
            try:
                device.ours.recv(2000)
            except TimeoutError:
                return

    device.ours.settimeout(0.5)
    thread = threading.Thread(target=swallow)
    thread.start()
    packet = marked(tcp(6, bytes(1400), whole=True), 1)
    begin = time.monotonic()
    for _ in range(5000):
        device.ours.send(packet)
    eventually(lambda: sender.counters["lost"]["path_mtu"] == 5000)
    assert 0 < sender.counters["path_mtu"]["news"] <= 50 + 1000 * (time.monotonic() - begin) + 1
    stop.set()
    thread.join()


# ---- in: ordinary packets become super-packets

Take = Callable[..., tuple[Device, Receiver, ChannelWriter]]


@pytest.fixture
def receiving(files: Callable[[str, int], Files]) -> Iterator[Take]:
    opened: list[Callable[[], object]] = []

    def make(device: Device, *, elements: int = 512, merge: tuple[str, ...] = ALL
             ) -> tuple[Device, Receiver, ChannelWriter]:
        file = files("in", region(SIZE, elements))
        writer = ChannelWriter(file.path, SIZE, PROTOCOL, region(SIZE, elements))
        receiver = Receiver(device.ports, file.map(region(SIZE, elements), writable=False), framing="net_hdr", mtu=MTU,
                            protocol=PROTOCOL, merge=merge)
        writer.activate()
        assert receiver.run(5) == "connected"
        opened.extend((device.close, writer.close, receiver.close))
        return device, receiver, writer

    yield make
    for close in reversed(opened):
        close()


def segments(version: int, count: int, *, size: int = 500) -> list[bytes]:
    """Packets of one TCP stream; IPv4's with DF, so that their identification says nothing."""
    found = []
    for k in range(count):
        packet = bytearray(tcp(version, bytes([k]) * size, sequence=1000 + k * size, flags=0x10, whole=True))
        if version == 4:
            packet[6:8] = b"\x40\0"
            packet[10:12] = b"\0\0"
            packet[10:12] = struct.pack(">H", checksum(bytes(packet[:20])))
        found.append(bytes(packet))
    return found


def given(device: Device, receiver: Receiver) -> list[bytes]:
    """What the device gets of what is in the ring by now."""
    receiver.run(0)
    found = []
    device.ours.setblocking(False)
    while True:
        try:
            found.append(device.ours.recv(1 << 17))
        except BlockingIOError:
            return found


@pytest.mark.parametrize("version", [4, 6])
def test_packets_are_merged(receiving: Take, version: int) -> None:
    """To one super-packet, which says how to split it again."""
    device, receiver, writer = receiving(Device(offload=True))
    stream = segments(version, 20)
    for packet in stream:
        writer.write(net_element(packet, SIZE))
    [merged] = given(device, receiver)
    header = 40 if version == 4 else 60
    assert merged[:10] == vnet(TCP4 if version == 4 else TCP6, header, 500, header - 20, 16)
    assert merged[10 + header:] == b"".join(packet[header:] for packet in stream)
    counters = receiver.counters
    assert counters["rx_packets"] == 20 and counters["rx_bytes"] == sum(map(len, stream))
    assert counters["merged"] == {"supers": 1, "segments": 20, "bad_checksums": 0}
    assert device.ports.counters(0)["rx_packets"] == 1


def test_nothing_is_merged_across_marks_or_bad_checksums(receiving: Take) -> None:
    """A bad checksum never becomes a good one; what is odd goes on as it came, in order."""
    device, receiver, writer = receiving(Device(offload=True))
    stream = segments(4, 6)
    for k, packet in enumerate(stream):
        writer.write(net_element(packet, SIZE, mark=k // 2))
    found = given(device, receiver)
    assert [len(each) for each in found] == [10 + 40 + 1000] * 3
    wrong = bytearray(stream[1])
    wrong[-1] ^= 1
    for each in (stream[0], bytes(wrong), stream[2]):
        writer.write(net_element(each, SIZE))
    assert given(device, receiver) == [bytes(10) + each for each in (stream[0], bytes(wrong), stream[2])]
    assert receiver.counters["merged"]["bad_checksums"] == 1


def test_marks_come_in_before_a_packet(receiving: Take) -> None:
    """As a prefix, which virtio_net_hdr counts; without a mark there is none."""
    device, receiver, writer = receiving(Device(offload=True, way="front"))
    stream = segments(4, 3)
    for packet in stream:
        writer.write(net_element(packet, SIZE, mark=0xFFFFFFFF))
    [merged] = given(device, receiver)
    assert merged[:10] == vnet(TCP4, 48, 500, 28, 16) and merged[10:18] == prefix(0x45, 0xFFFFFFFF)
    writer.write(net_element(stream[0], SIZE))
    assert given(device, receiver) == [bytes(10) + stream[0]]
    lone = ipv6(A6, B6, 17, udp(1, 2, b"x"))
    writer.write(net_element(lone, SIZE, mark=5))
    assert given(device, receiver) == [bytes(10) + prefix(0x60, 5) + lone]


def test_a_mark_of_a_child_is_its_packet(receiving: Take) -> None:
    """With and without merging; packets of parent and child are never one, and the parent's again once it has gone."""
    device, receiver, writer = receiving(Device(offload=True))
    child = Device(offload=True)
    device.ports.add(1, child.fd)
    device.ports.marks.set(24, 1)
    stream = segments(4, 4)
    for packet in stream[:2]:
        writer.write(net_element(packet, SIZE, mark=24))
    for packet in stream[2:]:
        writer.write(net_element(packet, SIZE, mark=25))
    [own] = given(device, receiver)
    assert own[50:] == stream[2][40:] + stream[3][40:]
    assert child.got()[50:] == stream[0][40:] + stream[1][40:]
    device.ports.marks.set(24, 0)
    assert device.ports.remove(1)
    writer.write(net_element(stream[0], SIZE, mark=24))
    assert given(device, receiver) == [bytes(10) + stream[0]]
    assert child.nothing()
    assert device.ports.counters(1)["rx_packets"] == 1 and device.ports.counters(0)["rx_packets"] == 2
    child.close()


def test_hostile_elements_between_good_ones(receiving: Take) -> None:
    """Each is counted and dropped; those around it are merged as if it had not been."""
    device, receiver, writer = receiving(Device(offload=True))
    stream = segments(4, 4)
    bad = [(bytes(SIZE), "protocol"), (b"\xff" * SIZE, "protocol"),
           (struct.pack("<IHBB", 0, 40, 41, 0) + stream[0].ljust(SIZE - 8, b"\0"), "protocol"),
           (struct.pack("<IHBB", 0, 40, 4, 0) + (b"\x45\0\xff\xff" + bytes(16)).ljust(SIZE - 8, b"\0"), "length"),
           (struct.pack("<IHBB", 0, 40, 4, 0) + (b"\x45\0\0\x05" + bytes(16)).ljust(SIZE - 8, b"\0"), "length"),
           (struct.pack("<IHBB", 0, 40, 4, 0) + (b"\x41\0\0\x20" + bytes(16)).ljust(SIZE - 8, b"\0"), "length"),
           (struct.pack("<IHBB", 0, 0, 41, 0) + (b"\x60\0\0\0\xff\xff" + bytes(34)).ljust(SIZE - 8, b"\0"), "length")]
    for packet in stream:
        writer.write(net_element(packet, SIZE))
        for element, _ in bad:
            writer.write(element)
    [merged] = given(device, receiver)
    assert merged[50:] == b"".join(each[40:] for each in stream)
    lost = receiver.counters["lost"]
    assert lost["protocol"] == 4 * sum(cause == "protocol" for _, cause in bad)
    assert lost["length"] == 4 * sum(cause == "length" for _, cause in bad)
    assert receiver.counters["rx_frame_errors"] == lost["protocol"] + lost["length"]


def test_an_overrun_is_counted_once_and_whole(receiving: Take) -> None:
    device, receiver, writer = receiving(Device(offload=True), elements=16)
    stream = segments(4, 40)
    for packet in stream:
        writer.write(net_element(packet, SIZE))
    assert receiver.run(0) == "overrun"
    lost = receiver.counters["lost"]["overrun"]
    assert receiver.counters["rx_over_errors"] == 1 and lost >= 24
    found = given(device, receiver)
    assert receiver.counters["rx_packets"] == 40 - lost
    assert b"".join(each[50:] for each in found) == b"".join(each[40:] for each in stream[lost:])


def test_a_packet_for_a_device_that_is_down_is_counted(receiving: Take) -> None:
    device, receiver, writer = receiving(Device(offload=True))
    device.ours.close()     # EPIPE: refused
    for packet in segments(4, 5):
        writer.write(net_element(packet, SIZE))
    receiver.run(0)
    assert receiver.counters["rx_dropped"] == 5 and receiver.counters["rx_packets"] == 0


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="needs TUN devices")
def test_a_packet_for_a_device_that_was_removed_is_counted(receiving: Take) -> None:
    """As any other that the kernel does not take."""
    device, receiver, writer = receiving(Device(offload=True))
    with open("/dev/net/tun", "r+b", buffering=0) as gone:      # of no device: EBADFD, as of one that was removed
        device.ports.add(1, gone.fileno())
        device.ports.marks.set(24, 1)
        for packet in segments(4, 5):
            writer.write(net_element(packet, SIZE, mark=24))
        assert receiver.run(5) == "child"
        assert receiver.counters["lost"]["refused"] == 5 and receiver.counters["rx_packets"] == 0
        device.ports.marks.set(24, 0)
        assert device.ports.remove(1)


def test_two_engines_with_offloads_carry_everything(files: Callable[[str, int], Files]) -> None:
    """Super-packets in, super-packets out, packets of the plain format between them: every byte, in order."""
    one, other = Device(offload=True), Device(offload=True)
    size, elements = element_size("net_hdr", 1500), 64
    file, bell = files("out", region(size, elements)), files("bell", 4096)
    sender = Sender(one.ports, file.map(region(size, elements), writable=True), framing="net_hdr", mtu=1500,
                    protocol=PROTOCOL, bell=bell.map(4096, writable=True))
    receiver = Receiver(other.ports, file.map(region(size, elements), writable=False), framing="net_hdr", mtu=1500,
                        protocol=PROTOCOL, bell=bell.map(4096, writable=True), merge=ALL)
    sender.link(True)
    rounds, length = 60, 40_000
    sent = [bytes([k]) * length for k in range(rounds)]

    def feed() -> None:
        for k, payload in enumerate(sent):
            one.ours.send(vnet(TCP4, 40, 1448, 20, 16) + tcp(4, payload, sequence=k * length))

    with running(receiver), running(sender):
        eventually(lambda: receiver.connected)
        feeder = threading.Thread(target=feed)
        feeder.start()
        found = bytearray()
        while len(found) < rounds * length:
            merged = other.got()
            assert struct.unpack_from("=B", merged, 1)[0] in (NONE, TCP4)
            found += merged[50:]
        feeder.join()
        assert found == b"".join(sent)
        eventually(lambda: receiver.counters["rx_packets"] == sender.counters["tx_packets"])
        assert receiver.counters["lost"]["overrun"] == 0
        assert other.ports.counters(0)["rx_packets"] < receiver.counters["rx_packets"] / 4
    one.close()
    other.close()


@pytest.mark.parametrize("merge", [ALL, ()])
def test_no_torn_packet_reaches_a_device(merge: tuple[str, ...], files: Callable[[str, int], Files]) -> None:
    """However often a writer overruns a reader that is amid an element: what is given on is one packet, whole."""
    mtu, elements = 65000, 3
    size = element_size("net_hdr", mtu)
    file = files("in", region(size, elements))
    device = Device(offload=bool(merge))
    receiver = Receiver(device.ports, file.map(region(size, elements), writable=False), framing="net_hdr", mtu=mtu,
                        protocol=PROTOCOL, merge=merge)
    sent = [net_element(ipv4(A4, B4, 17, udp(1, 2, bytes([k]) * 64000)), size) for k in range(16)]
    stop = threading.Event()

    def overrun() -> None:
        with Writer(file.map(region(size, elements), writable=True), size=size, protocol=PROTOCOL) as writer:
            while not stop.is_set():
                for element in sent:
                    writer.write(element)

    thread = threading.Thread(target=overrun)
    with running(receiver):
        thread.start()
        try:
            for _ in range(400):
                packet = device.got()[10 if merge else 0:]
                assert len(packet) == 64028 and checked(packet)
                assert packet.count(packet[28:29], 28) == 64000
        finally:
            stop.set()
            thread.join()
        assert receiver.counters["lost"]["overrun"] > 0
    device.close()


def test_the_socket_pair_keeps_packets_apart() -> None:
    """What all the others rest on."""
    device = Device()
    device.ours.send(b"one")
    device.ours.send(b"two")
    assert [device.theirs.recv(10, socket.MSG_DONTWAIT) for _ in range(2)] == [b"one", b"two"]
    device.close()
