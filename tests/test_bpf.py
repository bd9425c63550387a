"""Marks of real packets on TUN devices, in all three ways: what read(2) returns, and what mark a written packet gets."""

from __future__ import annotations

import hashlib
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from helpers import eventually
from namespaces import ALL_OFFLOADS, VNET, Namespace, Tun, udp

from muenfast import bpf
from muenfast._marks import prefix, vnet_in, vnet_out
from muenfast.bpf import Attached, Way

pytestmark = [pytest.mark.root, pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun")]

MARKS = [0, 1, 24, 100, 101, 0x80000000, 0xFFFFFFFF]
BPF = [Way.TCX, Way.CLSACT]
HERE, THERE = {4: "10.9.0.1", 6: "fd00:9::1"}, {4: "10.9.0.2", 6: "fd00:9::2"}
ADDRESSES = ("10.9.0.1/24", "fd00:9::1/64")
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
UDP_SEGMENT = 103  # linux/udp.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
IP_HEADER = {4: 20, 6: 40}


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def marked(namespace: Namespace) -> Iterator[Callable[..., tuple[Tun, Attached]]]:
    """Makes a TUN device whose marks go one of the ways, up and with addresses."""
    made: list[tuple[Tun, Attached]] = []

    def make(way: Way, *, name: str = "net0", mtu: int = 1500, addresses: tuple[str, ...] = ADDRESSES, vnet: bool = False,
             offloads: int = 0, inside: Namespace = namespace) -> tuple[Tun, Attached]:
        tun = Tun(inside, name, vnet=vnet, offloads=offloads)
        try:
            attached = inside.do(lambda: bpf.attach(tun.index, ways=(way,), vnet=vnet))
        except BaseException:
            tun.close()
            raise
        made.append((tun, attached))
        assert attached.way is way
        tun.up(*addresses, mtu=mtu)
        tun.read()
        return made[-1]

    yield make
    for tun, attached in made:
        tun.close()
        attached.close()    # the interface has gone: no error


def sent(tun: Tun, version: int, payload: bytes, *, mark: int = 0, tos: int = 0) -> list[bytes]:
    """What is to be read after a datagram was sent out."""
    with tun.namespace.socket(FAMILY[version], socket.SOCK_DGRAM, mark=mark) as out:
        if version == 4:
            out.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        else:
            out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
        out.sendto(payload, (THERE[version], 7))
    return tun.read()


def header(data: bytes) -> tuple[int, int, int, int]:
    """mark, length, protocol, qos."""
    fields: tuple[int, int, int, int] = struct.unpack_from("=IHBB", data)
    return fields


# ---- outgoing

@pytest.mark.parametrize("way", BPF)
@pytest.mark.parametrize("version", [4, 6])
def test_a_packet_is_read_with_its_net_hdr(marked: Callable[..., tuple[Tun, Attached]], way: Way, version: int) -> None:
    tun, attached = marked(way)
    for mark in MARKS:
        [data] = sent(tun, version, b"payload", mark=mark, tos=46 << 2)
        packet = data[8:]
        assert header(data) == (mark, len(packet), {4: 4, 6: 41}[version], 46)
        assert packet[0] >> 4 == version and len(packet) == IP_HEADER[version] + 8 + 7 and packet.endswith(b"payload")
        assert socket.inet_pton(FAMILY[version], THERE[version]) in packet[:40]
    assert not any(attached.dropped().values())


@pytest.mark.parametrize("version", [4, 6])
def test_qos_is_the_traffic_class_without_its_last_two_bits(marked: Callable[..., tuple[Tun, Attached]],
                                                            version: int) -> None:
    tun, _ = marked(Way.TCX)
    for dscp in range(64):
        [data] = sent(tun, version, b"x", tos=dscp << 2 | dscp & 2)     # ECT(0) now and then: not the kernel's to change
        assert header(data)[3] == dscp
        traffic_class = data[9] if version == 4 else (data[8] & 15) << 4 | data[9] >> 4
        assert traffic_class == dscp << 2 | dscp & 2


@pytest.mark.parametrize("way", BPF)
@pytest.mark.parametrize("version", [4, 6])
def test_packets_of_any_length_get_it(marked: Callable[..., tuple[Tun, Attached]], way: Way, version: int) -> None:
    """A program may make a packet longer than 16 KiB only by a detour."""
    tun, attached = marked(way, mtu=65000)
    most = 65000 - IP_HEADER[version] - 8
    for length in [0, 1, 1400, 9000, *range(15900, 16400, 20), 20000, 40000, most - 1, most]:
        payload = os.urandom(length)
        [data] = sent(tun, version, payload, mark=0xDEADBEEF, tos=8)
        packet = data[8:]
        assert header(data) == (0xDEADBEEF, len(packet), {4: 4, 6: 41}[version], 2)
        assert packet[0] >> 4 == version and packet.endswith(payload)
        assert len(packet) == IP_HEADER[version] + 8 + length
        # What left through the detour is as right as all others: the kernel takes it back.
        assert packet[IP_HEADER[version]:][:6] == packet[IP_HEADER[version]:][:2] + struct.pack("!2H", 7, 8 + length)
    assert not any(attached.dropped().values())


def test_where_the_kernel_lacks_the_detour_for_ipv6_its_packets_are_counted(
        marked: Callable[..., tuple[Tun, Attached]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.5, which has clsact only."""
    monkeypatch.setattr(bpf, "_DECAP_L3_IPV4", 1 << 20)     # a flag that no kernel knows
    tun, attached = marked(Way.CLSACT, mtu=65000)
    for version, number in ((4, 1), (6, 0)):
        assert len(sent(tun, version, bytes(40000))) == number
        assert len(sent(tun, version, bytes(1000))) == 1
    assert attached.dropped() == {"not_ip": 0, "malformed": 0, "no_room": 1, "unmarked": 0, "tap": 0}


@pytest.mark.parametrize("way", BPF)
def test_marks_of_iptables_go_out(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace, way: Way) -> None:
    tun, _ = marked(way)
    namespace.run(f"iptables -t mangle -A OUTPUT -s {HERE[4]}/32 -j MARK --set-mark 24")
    namespace.run(f"ip6tables -t mangle -A OUTPUT -d {THERE[6]} -j MARK --set-mark 0xffffffff")
    assert header(sent(tun, 4, b"x")[0])[0] == 24
    assert header(sent(tun, 6, b"x")[0])[0] == 0xFFFFFFFF


def send_raw(tun: Tun, protocol: int, data: bytes) -> None:
    """Out of the interface, with an ethertype of one's own."""
    with tun.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
        try:
            out.sendto(data, (tun.name, protocol, 0, 0))
        except OSError as error:    # the program's verdict
            assert error.errno == 105


@pytest.mark.parametrize("way", BPF)
def test_what_is_no_ip_is_dropped_and_counted(marked: Callable[..., tuple[Tun, Attached]], way: Way) -> None:
    tun, attached = marked(way)
    good = {version: udp(HERE[version], THERE[version], 7, b"good") for version in (4, 6)}
    for protocol in (0x0806, 0x88B5, 0x8100):
        send_raw(tun, protocol, good[4])
    assert attached.dropped() == {"not_ip": 3, "malformed": 0, "no_room": 0, "unmarked": 0, "tap": 0}
    for protocol, data in ((0x0800, good[6]), (0x86DD, good[4] + bytes(40)), (0x0800, good[4][:19]), (0x86DD, good[6][:39]),
                           (0x0800, b"\x14" + bytes(60)), (0x86DD, b"\x76" + bytes(60))):
        send_raw(tun, protocol, data)
    assert attached.dropped() == {"not_ip": 3, "malformed": 6, "no_room": 0, "unmarked": 0, "tap": 0}
    assert tun.read() == []
    for version, protocol in ((4, 0x0800), (6, 0x86DD)):
        send_raw(tun, protocol, good[version])
        [data] = tun.read()
        assert header(data)[1:3] == (len(good[version]), {4: 4, 6: 41}[version]) and data[8:] == good[version]


# ---- super-packets

def segments(tun: Tun, version: int, payload: bytes, size: int) -> list[bytes]:
    """What is to be read after a datagram that the kernel is to cut was sent with mark 7."""
    with tun.namespace.socket(FAMILY[version], socket.SOCK_DGRAM, mark=7) as out:
        out.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        out.sendto(payload, (THERE[version], 7))
    return tun.read()


@pytest.mark.parametrize("way", BPF)
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("vnet", [False, True])
def test_what_the_kernel_cuts_has_its_net_hdr_in_each_piece(
        marked: Callable[..., tuple[Tun, Attached]], way: Way, version: int, vnet: bool) -> None:
    tun, _ = marked(way, vnet=vnet)
    payload = os.urandom(30000)
    start = VNET if vnet else 0
    pieces = [data[start:] for data in segments(tun, version, payload, 1400)]
    assert len(pieces) == 22
    for data in pieces:
        mark, length, protocol, _ = header(data)
        assert (mark, protocol) == (7, {4: 4, 6: 41}[version])
        # The one thing that is stale: the reader makes it what it read.
        assert length == IP_HEADER[version] + 8 + 30000
        assert len(data) - 8 == (struct.unpack_from("!H", data, 10)[0] if version == 4 else
                                 40 + struct.unpack_from("!H", data, 12)[0])
    assert b"".join(data[8 + IP_HEADER[version] + 8:] for data in pieces) == payload


@pytest.mark.parametrize("way", BPF)
@pytest.mark.parametrize("version", [4, 6])
def test_a_super_packet_is_read_whole_and_its_offsets_count_net_hdr(
        marked: Callable[..., tuple[Tun, Attached]], way: Way, version: int) -> None:
    tun, _ = marked(way, vnet=True, offloads=ALL_OFFLOADS)
    payload = os.urandom(30000)
    [data] = segments(tun, version, payload, 1400)
    packet = data[VNET + 8:]
    assert header(data[VNET:])[:3] == (7, len(packet), {4: 4, 6: 41}[version]) and packet.endswith(payload)
    flags, kind, head, size, start, offset = struct.unpack("=BB4H", data[:VNET])
    assert (flags & 1, kind, size, start, offset) == (1, 5, 1400, 8 + IP_HEADER[version], 6)    # 5: GSO_UDP_L4
    moved = struct.unpack("=BB4H", vnet_out(data[:VNET]))
    assert moved == (flags, kind, head - 8, size, IP_HEADER[version], offset)
    assert vnet_in(vnet_out(data[:VNET])) == data[:VNET]


def test_offsets_move_only_where_they_mean_something() -> None:
    for move in (vnet_in, vnet_out):
        assert move(bytes(10)) == bytes(10)
        with pytest.raises(ValueError, match="has 10 bytes"):
            move(bytes(12))
    only_sum = struct.pack("=BB4H", 1, 0, 0, 0, 20, 6)
    assert vnet_in(only_sum) == struct.pack("=BB4H", 1, 0, 0, 0, 28, 6)
    # Neither of what a TUN device wrote nor of what came from elsewhere becomes a huge offset.
    assert vnet_out(struct.pack("=BB4H", 1, 1, 3, 0, 7, 6)) == struct.pack("=BB4H", 1, 1, 0, 0, 0, 6)
    assert vnet_in(struct.pack("=BB4H", 1, 1, 65530, 0, 65535, 6)) == struct.pack("=BB4H", 1, 1, 65535, 0, 65535, 6)


class Crossing:
    """Carries packets between two TUN devices with vnet_hdr, net_hdr out and prefix in, in a thread."""

    def __init__(self, one: Tun, other: Tun) -> None:
        self.tuns = one, other
        self.largest = 0
        self.marks: set[int] = set()
        self._stop, self._stopping = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self.tuns[0].fd, self.tuns[1].fd, self._stop], [], [], 20)
            if self._stop in ready or not ready:
                return
            for a, b in (self.tuns, self.tuns[::-1]):
                for data in a.read():
                    mark, packet = header(data[VNET:])[0], data[VNET + 8:]
                    self.largest = max(self.largest, len(packet))
                    self.marks.add(mark)
                    vnet = vnet_out(data[:VNET])
                    b.write(vnet_in(vnet) + prefix(packet[0], mark) + packet if mark else vnet + packet)

    def close(self) -> None:
        os.close(self._stopping)
        self._thread.join()
        os.close(self._stop)


@pytest.mark.parametrize("way", BPF)
@pytest.mark.parametrize("version", [4, 6])
def test_tcp_in_super_packets_keeps_its_marks(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace, way: Way,
                                              version: int) -> None:
    other = Namespace()
    there = crossing = None
    try:
        here, _ = marked(way, vnet=True, offloads=ALL_OFFLOADS)
        there, _ = marked(way, vnet=True, offloads=ALL_OFFLOADS, inside=other,
                          addresses=("10.9.0.2/24", "fd00:9::2/64"))
        tables = "iptables" if version == 4 else "ip6tables"
        other.run(f"{tables} -t mangle -A PREROUTING -p tcp -m mark --mark 0x89abcdef; "
                  f"{tables} -t mangle -A PREROUTING -p tcp -m mark ! --mark 0x89abcdef")
        crossing = Crossing(here, there)
        data = os.urandom(1 << 20) * 8
        found = hashlib.sha256()
        with other.socket(FAMILY[version], socket.SOCK_STREAM) as listening, \
                namespace.socket(FAMILY[version], socket.SOCK_STREAM, mark=0x89ABCDEF) as out:
            out.settimeout(60)
            listening.settimeout(60)
            listening.bind((THERE[version], 7777))
            listening.listen()
            sender = threading.Thread(target=lambda: (out.connect((THERE[version], 7777)), out.sendall(data),
                                                      out.shutdown(socket.SHUT_WR)))
            sender.start()
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(60)
                while piece := connection.recv(1 << 20):
                    found.update(piece)
            sender.join()
        assert found.digest() == hashlib.sha256(data).digest()
        assert crossing.largest > 1500 and 0x89ABCDEF in crossing.marks
        right, wrong = (int(line.split()[0]) for line in
                        other.run(f"{tables} -t mangle -nvxL PREROUTING").splitlines()[2:])
        assert right > 100 and wrong == 0
    finally:
        if crossing is not None:
            crossing.close()
        other.close()


# ---- incoming

def receiver(namespace: Namespace, version: int) -> tuple[socket.socket, int]:
    made = namespace.socket(FAMILY[version], socket.SOCK_DGRAM, receive_marks=True)
    made.bind((HERE[version], 0))
    return made, made.getsockname()[1]


def received(inbound: socket.socket) -> tuple[bytes, int]:
    """Payload and mark."""
    data, [(_, _, mark)], _, _ = inbound.recvmsg(1 << 17, 64)
    return data, struct.unpack("=I", mark)[0]


@pytest.mark.parametrize("way", BPF)
@pytest.mark.parametrize("version", [4, 6])
def test_a_prefix_is_taken_off_and_gives_the_mark(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace,
                                                  way: Way, version: int) -> None:
    tun, attached = marked(way, mtu=65000)
    inbound, port = receiver(namespace, version)
    with inbound:
        for length in (0, 1, 18, 1400, 16350, 60000):
            payload = os.urandom(length)
            for tos in (0, 0xFF):
                packet = udp(THERE[version], HERE[version], port, payload, tos)
                tun.write(packet)
                assert received(inbound) == (payload, 0)
                for mark in MARKS:
                    tun.write(prefix(packet[0], mark) + packet)
                    assert received(inbound) == (payload, mark)
    assert not any(attached.dropped().values())


def test_the_prefix_to_the_byte() -> None:
    assert prefix(0x45, 0x12345678) == b"\x40\0" + struct.pack("=H", 0x5678) + b"\xff\xff" + struct.pack("=H", 0x1234)
    assert prefix(0x6F, 1) == b"\x60\0" + struct.pack("=H", 1) + b"\xff\xff" + struct.pack("=H", 0)


@pytest.mark.parametrize("way", BPF)
def test_what_only_resembles_a_prefix_is_left_alone(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace,
                                                    way: Way) -> None:
    tun, attached = marked(way)
    inbound, port = receiver(namespace, 6)
    with inbound:
        packet = udp(THERE[6], HERE[6], port, b"x" * 65, 0)
        assert packet[:2] == b"\x60\0"
        tun.write(packet)
        assert received(inbound) == (b"x" * 65, 0)
        # A prefix and nothing, or not enough, behind it; and less than a prefix.
        for data in (prefix(0x45, 5), prefix(0x45, 5) + b"\x45", prefix(0x60, 5) + packet[:39], b"\x45\0\0", b"\x60"):
            tun.write(data)
        tun.write(prefix(0x60, 9) + packet)
        assert received(inbound) == (b"x" * 65, 9)
    assert attached.dropped()["unmarked"] == 3


def test_marks_are_right_when_other_cpus_take_the_packets(marked: Callable[..., tuple[Tun, Attached]],
                                                          namespace: Namespace) -> None:
    """RPS: write(2) returns before the program has run."""
    tun, _ = marked(Way.TCX)
    namespace.run("unshare --mount sh -c 'mount -t sysfs sysfs /sys && echo 3 >/sys/class/net/net0/queues/rx-0/rps_cpus'")
    inbound, port = receiver(namespace, 4)
    with inbound:
        inbound.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        for number in range(2000):
            packet = udp(THERE[4], HERE[4], port, struct.pack("=I", number))
            tun.write(prefix(packet[0], number) + packet if number % 3 else packet)
        for _ in range(2000):
            data, mark = received(inbound)
            number = struct.unpack("=I", data)[0]
            assert mark == (number if number % 3 else 0)


@pytest.mark.parametrize("way", BPF)
def test_iptables_sees_the_mark(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace, way: Way) -> None:
    tun, _ = marked(way)
    namespace.run("iptables -t mangle -A PREROUTING -i net0 -m mark --mark 24; nft add table ip t; "
                  "nft 'add chain ip t c { type filter hook input priority 0; }'; nft add rule ip t c meta mark 24 counter")
    packet = udp(THERE[4], HERE[4], 9, b"x")
    for mark in (24, 24, 25, 0):
        tun.write(prefix(packet[0], mark) + packet if mark else packet)
    assert namespace.run("iptables -t mangle -nvxL PREROUTING").splitlines()[2].split()[0] == "2"
    assert "counter packets 2 " in namespace.run("nft list table ip t")


# ---- packets whose first bytes the kernel does not have in one piece

@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("linear", [1, 2, 7, 8, 9, 27])
def test_a_prefix_in_pieces(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace, version: int,
                            linear: int) -> None:
    tun, attached = marked(Way.TCX, mtu=9000, vnet=True)
    inbound, port = receiver(namespace, version)
    with inbound:
        payload = os.urandom(8000)      # more than a page, or hdr_len decides nothing
        packet = udp(THERE[version], HERE[version], port, payload)
        for mark in MARKS:
            tun.write(struct.pack("=BB4H", 0, 0, linear, 0, 0, 0) + prefix(packet[0], mark) + packet)
            assert received(inbound) == (payload, mark)
        tun.write(struct.pack("=BB4H", 0, 0, linear, 0, 0, 0) + packet)
        assert received(inbound) == (payload, 0)
    assert not any(attached.dropped().values())


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("linear", [0, 1, 2, 19])
def test_an_outgoing_header_in_pieces(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace, version: int,
                                      linear: int) -> None:
    tun, attached = marked(Way.TCX, mtu=9000)
    packet = udp(HERE[version], THERE[version], 7, os.urandom(8000), tos=0xB8)
    with namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, mark=5) as out:
        out.setsockopt(263, 15, 1)      # SOL_PACKET, PACKET_VNET_HDR
        out.sendto(struct.pack("=BB4H", 0, 0, linear, 0, 0, 0) + packet,
                   (tun.name, {4: 0x0800, 6: 0x86DD}[version], 0, 0))
    [data] = tun.read()
    assert header(data) == (5, len(packet), {4: 4, 6: 41}[version], 46) and data[8:] == packet
    assert not any(attached.dropped().values())


# ---- life

@pytest.mark.parametrize("way", BPF)
def test_closing_leaves_the_interface_as_it_was(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace,
                                                way: Way) -> None:
    tun, attached = marked(way)
    attached.close()
    [data] = sent(tun, 4, b"x", mark=3)
    assert data[0] == 0x45
    assert "clsact" not in namespace.run("tc qdisc show dev net0")
    again = namespace.do(lambda: bpf.attach(tun.index, ways=(way,)))
    assert header(sent(tun, 4, b"x", mark=3)[0])[0] == 3
    again.close()


@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_filters_of_others_stay(namespace: Namespace, whose: str) -> None:
    tun = Tun(namespace)
    try:
        if whose == "another's":
            namespace.run("tc qdisc add dev net0 clsact")
        attached = namespace.do(lambda: bpf.attach(tun.index, ways=(Way.CLSACT,)))
        tun.up(*ADDRESSES)
        for where in ("ingress", "egress"):
            namespace.run(f"tc filter add dev net0 {where} prio 7 protocol all bpf da bytecode '1,6 0 0 4294967295'")
        tun.read()
        assert header(sent(tun, 4, b"x", mark=3)[0])[0] == 3
        attached.close()
        for where in ("ingress", "egress"):
            filters = namespace.run(f"tc filter show dev net0 {where}")
            assert "mf_" not in filters and "pref 7 " in filters
            namespace.run(f"tc filter del dev net0 {where}")
        with namespace.do(lambda: bpf.attach(tun.index, ways=(Way.CLSACT,))):
            pass
        assert "clsact" in namespace.run("tc qdisc show dev net0")     # not made by this one
    finally:
        tun.close()


@pytest.mark.parametrize("way", Way)
def test_an_interface_that_is_not_in_the_callers_namespace(namespace: Namespace, way: Way) -> None:
    other = Namespace()
    try:
        for number in range(8):
            namespace.run(f"ip link add v{number} type veth peer name w{number}")
        tun = Tun(namespace)
        with pytest.raises(OSError, match="No such device|no index"):
            other.do(lambda: bpf.attach(tun.index, ways=(way,)))
        tun.close()
    finally:
        other.close()


@pytest.mark.parametrize("way", BPF)
def test_an_interface_that_goes_to_another_namespace(namespace: Namespace, way: Way) -> None:
    """The program stays with it, a filter does not."""
    other = Namespace()
    tun = Tun(namespace)
    try:
        attached = namespace.do(lambda: bpf.attach(tun.index, ways=(way,)))
        namespace.run(f"ip link set net0 netns /proc/{os.getpid()}/fd/{other.fd}")
        tun.namespace = other
        tun.up(*ADDRESSES[:1])
        tun.read()
        [data] = sent(tun, 4, b"x", mark=7)
        assert (header(data)[0] == 7) == (way is Way.TCX) == (data[0] != 0x45)
        attached.close()
        [data] = sent(tun, 4, b"x", mark=7)
        assert data[0] == 0x45
    finally:
        tun.close()
        other.close()


@pytest.mark.parametrize("way", Way)
def test_down_and_up_change_nothing(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace, way: Way) -> None:
    tun, attached = marked(way, addresses=ADDRESSES[:1])
    inbound, port = receiver(namespace, 4)
    with inbound:
        packet = udp(THERE[4], HERE[4], port, b"x")
        for number in range(1, 20):
            namespace.run("ip link set net0 down; ip link set net0 up")
            tun.read()
            if attached.tap is not None:
                with pytest.raises(OSError, match="Network is down"):   # once
                    attached.tap.recv(1)
                with pytest.raises(BlockingIOError):
                    attached.tap.recv(1)
            [data] = sent(tun, 4, b"x", mark=number)
            if attached.tap is None:
                assert header(data)[0] == number
                tun.write(prefix(packet[0], number) + packet)
                assert received(inbound) == (b"x", number)
            else:
                assert struct.unpack("=I", attached.tap.recvmsg(100, 64)[1][0][2])[0] == number


def test_the_first_way_that_is_to_be_had(namespace: Namespace, monkeypatch: pytest.MonkeyPatch,
                                         caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tun = Tun(namespace)
    try:
        def way() -> Way:
            with namespace.do(lambda: bpf.attach(tun.index)) as attached:
                assert attached.incoming == (attached.way is not Way.TAP)
                return attached.way

        assert way() is Way.TCX and bpf.problems() == {Way.TCX: None}
        with monkeypatch.context() as patch:
            patch.setattr(bpf, "_TCX_EGRESS", 4711)     # as on a kernel that does not know it
            assert way() is Way.CLSACT
            assert "no tcx: the kernel has no tcx, which came with Linux 6.6" in caplog.text
            problems = bpf.problems()
            assert list(problems) == [Way.TCX, Way.CLSACT] and "Linux 6.6" in str(problems[Way.TCX])
        with monkeypatch.context() as patch:
            patch.setattr(bpf, "_SYSCALL", {})
            assert way() is Way.TAP
            assert list(bpf.problems()) == list(Way) and bpf.problems()[Way.TAP] is None
            patch.setattr(bpf, "_SO_RCVMARK", 4711)
            with pytest.raises(OSError, match="Protocol not available"):
                way()
            assert None not in bpf.problems().values()
    finally:
        tun.close()


def test_a_program_that_the_kernel_does_not_take_is_refused_with_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    code = struct.pack("=BBhi", 0xBF, 0 | 3 << 4, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)   # r0 = r3; exit
    with pytest.raises(bpf.VerifierError, match="the eBPF program bad: Permission denied: R3 !read_ok") as caught:
        bpf.load("bad", code)
    assert "R3 !read_ok" in caught.value.log and caught.value.program == "bad" and caught.value.log.strip() in caplog.text


# ---- the packet socket

@pytest.mark.parametrize("vnet", [False, True])
def test_a_tap_has_what_goes_out_with_its_mark(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace,
                                               vnet: bool) -> None:
    tun, attached = marked(Way.TAP, vnet=vnet, offloads=ALL_OFFLOADS)
    assert attached.tap is not None and not attached.incoming
    inbound, port = receiver(namespace, 4)
    with inbound:       # what comes in is not taken for what goes out
        tun.write((bytes(VNET) if vnet else b"") + udp(THERE[4], HERE[4], port, b"in"))
        assert received(inbound) == (b"in", 0)
    for version in (4, 6):
        for mark in MARKS:
            assert len(sent(tun, version, b"out", mark=mark)) == 1
            data, [(_, _, found)], _, address = attached.tap.recvmsg(1 << 17, 64)
            assert struct.unpack("=I", found)[0] == mark and address[2] == socket.PACKET_OUTGOING
            assert data[VNET if vnet else 0] >> 4 == version and data.endswith(b"out")
    if vnet:
        segments(tun, 4, bytes(30000), 1400)
        data, _, _, _ = attached.tap.recvmsg(1 << 17, 64)
        assert len(data) == VNET + 28 + 30000 and struct.unpack("=BB4H", data[:VNET])[1:2] == (5,)
    with pytest.raises(BlockingIOError):
        attached.tap.recv(1)


def test_what_a_tap_has_no_room_for_is_counted(marked: Callable[..., tuple[Tun, Attached]], namespace: Namespace) -> None:
    tun, attached = marked(Way.TAP)
    assert attached.tap is not None
    attached.tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        for _ in range(100):
            out.sendto(bytes(1400), (THERE[4], 7))
            tun.read()
    got = 0
    while True:
        try:
            attached.tap.recv(1 << 17)
        except BlockingIOError:
            break
        got += 1
    assert 0 < got < 100
    assert eventually(lambda: attached.dropped()["tap"]) == 100 - got
    assert attached.dropped()["tap"] == 100 - got
