"""Packets for tests: written and read field by field from the RFCs, with a checksum of their own; nothing of muenfast."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, replace

NEEDS_CHECKSUM = 1
NONE, TCP4, UFO, TCP6, UDP, ACCECN, ECN = 0, 1, 3, 4, 5, 0x10, 0x80   # gso_type of linux/virtio_net.h
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128
DF, MF = 0x4000, 0x2000


def ones(data: bytes) -> int:
    """The one's complement sum of RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[:len(data) & ~1])) + (data[-1] << 8 if len(data) % 2 else 0)
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return ones(data) ^ 0xffff


@dataclass(frozen=True)
class Packet:
    """A TCP segment, a UDP datagram or anything else in IPv4 or IPv6; checksums are made when it is packed."""
    source: str = "10.7.0.1"
    target: str = "10.7.0.2"
    protocol: int = socket.IPPROTO_TCP
    payload: bytes = b""
    tos: int = 0
    ttl: int = 64
    id: int = 0             # IPv4
    fragment: int = DF      # IPv4: flags and offset
    ip_options: bytes = b""
    label: int = 0          # IPv6
    extension: tuple[tuple[int, bytes], ...] = ()   # IPv6: (kind, header but for its first byte)
    ports: tuple[int, int] = (4000, 5000)
    sequence: int = 1000
    ack: int = 77
    flags: int = ACK        # and above them the four bits that are reserved
    offset: int | None = None   # of TCP's payload in words, where it is not the right one
    window: int = 500
    urgent: int = 0
    options: bytes = b""

    @property
    def v6(self) -> bool:
        return ":" in self.source

    def addresses(self) -> bytes:
        family = socket.AF_INET6 if self.v6 else socket.AF_INET
        return socket.inet_pton(family, self.source) + socket.inet_pton(family, self.target)

    def pseudo(self, length: int) -> bytes:
        if self.v6:
            return self.addresses() + struct.pack("!II", length, self.protocol)
        return self.addresses() + struct.pack("!HH", self.protocol, length)

    def transport(self, partial: bool = False) -> bytes:
        """Header and payload. partial: with the pseudo-header's sum for a checksum."""
        if self.protocol == socket.IPPROTO_TCP:
            made = struct.pack("!HHIIBBHHH", *self.ports, self.sequence & 0xffffffff, self.ack,
                               (self.offset or 5 + len(self.options) // 4) << 4 | self.flags >> 8, self.flags & 0xff,
                               self.window, 0, self.urgent) + self.options
            at = 16
        elif self.protocol == socket.IPPROTO_UDP:
            made, at = struct.pack("!HHHH", *self.ports, 8 + len(self.payload), 0), 6
        else:
            return self.payload
        made += self.payload
        pseudo = self.pseudo(len(made))
        value = ones(pseudo) if partial else checksum(pseudo + made)
        if self.protocol == socket.IPPROTO_UDP and not partial:
            value = value or 0xffff
        return made[:at] + value.to_bytes(2, "big") + made[at + 2:]

    def header(self, length: int) -> bytes:
        """All before the transport's, for so many bytes of it."""
        if self.v6:
            kinds = [kind for kind, _ in self.extension] + [self.protocol]
            more = b"".join(bytes([following]) + rest for following, (_, rest)
                            in zip(kinds[1:], self.extension, strict=True))
            return struct.pack("!IHBB", 6 << 28 | self.tos << 20 | self.label, len(more) + length, kinds[0],
                               self.ttl) + self.addresses() + more
        size = 20 + len(self.ip_options)
        made = struct.pack("!BBHHHBBH", 0x40 | size // 4, self.tos, size + length, self.id & 0xffff, self.fragment,
                           self.ttl, self.protocol, 0) + self.addresses() + self.ip_options
        return made[:10] + checksum(made).to_bytes(2, "big") + made[12:]

    def pack(self, partial: bool = False) -> bytes:
        carried = self.transport(partial)
        return self.header(len(carried)) + carried

    def start(self) -> int:
        """Where the transport's header begins."""
        return len(self.header(0))

    def headers(self) -> int:
        """Bytes before the payload."""
        return len(self.pack()) - len(self.payload)

    def vnet(self, size: int, kind: int | None = None) -> bytes:
        """The virtio_net_hdr of a super-packet of this."""
        tcp = self.protocol == socket.IPPROTO_TCP
        if kind is None:
            kind = UDP if not tcp else TCP6 if self.v6 else TCP4
        return vnet(NEEDS_CHECKSUM, kind, self.headers(), size, self.start(), 16 if tcp else 6)

    def segments(self, size: int, every: bool = False) -> list[Packet]:
        """What a super-packet of this is to become."""
        made = []
        tcp = self.protocol == socket.IPPROTO_TCP
        for number, at in enumerate(range(0, len(self.payload), size)):
            flags = self.flags
            if at + size < len(self.payload):
                flags &= ~(PSH | FIN)
            if at and not every:
                flags &= ~CWR
            made.append(replace(self, payload=self.payload[at:at + size], id=self.id + number,
                                flags=flags, sequence=self.sequence + at if tcp else self.sequence))
        return made


def vnet(flags: int = 0, kind: int = 0, headers: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("=BBHHHH", flags, kind, headers, size, start, offset)


def right(packet: bytes) -> bool:
    """Whether all checksums of a packet without IPv6 extension headers are complete and right, its lengths, too."""
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        protocol, pseudo = packet[9], packet[12:20]
        if checksum(packet[:size]) or int.from_bytes(packet[2:4], "big") != len(packet):
            return False
    else:
        size, protocol, pseudo = 40, packet[6], packet[8:40]
        if int.from_bytes(packet[4:6], "big") != len(packet) - 40:
            return False
    carried = packet[size:]
    if protocol == socket.IPPROTO_UDP and int.from_bytes(carried[4:6], "big") != len(carried):
        return False
    if protocol == socket.IPPROTO_ICMP:
        return checksum(carried) == 0
    return checksum(pseudo + struct.pack("!II", len(carried), protocol) + carried) == 0


def expand(header: bytes, packet: bytes) -> list[bytes]:
    """The packets that a super-packet stands for; a plain one itself."""
    flags, kind, headers, size, start, offset = struct.unpack("=BBHHHH", header)
    if not flags:
        assert header == bytes(10)
        return [packet]
    assert flags == NEEDS_CHECKSUM and kind in (TCP4, TCP6, UDP) and len(packet) > headers + size
    v4, tcp = packet[0] >> 4 == 4, kind != UDP
    assert start == (20 if v4 else 40)
    assert offset == (16 if tcp else 6)
    assert headers == start + ((packet[start + 12] >> 4) * 4 if tcp else 8)
    protocol = packet[9] if v4 else packet[6]
    assert protocol == (socket.IPPROTO_TCP if tcp else socket.IPPROTO_UDP)
    pseudo = packet[12:20] if v4 else packet[8:40]
    if v4:
        assert checksum(packet[:20]) == 0 and int.from_bytes(packet[2:4], "big") == len(packet)
    else:
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
    if not tcp:
        assert int.from_bytes(packet[44 if not v4 else 24:][:2], "big") == len(packet) - start
    partial = ones(pseudo + struct.pack("!II", len(packet) - start, protocol))
    assert int.from_bytes(packet[start + offset:][:2], "big") == partial
    made = []
    for number, at in enumerate(range(headers, len(packet), size)):
        one = bytearray(packet[:headers] + packet[at:at + size])
        if v4:
            one[2:4] = len(one).to_bytes(2, "big")
            one[4:6] = ((int.from_bytes(packet[4:6], "big") + number) & 0xffff).to_bytes(2, "big")
            one[10:12] = bytes(2)
            one[10:12] = checksum(one[:20]).to_bytes(2, "big")
        else:
            one[4:6] = (len(one) - 40).to_bytes(2, "big")
        if tcp:
            sequence = int.from_bytes(packet[start + 4:start + 8], "big") + at - headers
            one[start + 4:start + 8] = (sequence & 0xffffffff).to_bytes(4, "big")
            if at + size < len(packet):
                one[start + 13] &= ~PSH
        else:
            one[start + 4:start + 6] = (len(one) - start).to_bytes(2, "big")
        one[start + offset:start + offset + 2] = bytes(2)
        value = checksum(pseudo + struct.pack("!II", len(one) - start, protocol) + one[start:])
        one[start + offset:start + offset + 2] = (value if tcp else value or 0xffff).to_bytes(2, "big")
        made.append(bytes(one))
    return made


def without_id(packet: bytes) -> bytes:
    """An IPv4 packet that is never fragmented, without its identification, which says nothing then (RFC 6864)."""
    if packet[0] != 0x45 or packet[6:8] != b"\x40\0" or checksum(packet[:20]):
        return packet
    bare = packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:20]
    return bare[:10] + checksum(bare).to_bytes(2, "big") + bare[12:] + packet[20:]
