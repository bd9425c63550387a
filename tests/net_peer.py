"""A plain network endpoint, from docs/protocol.md and the RFCs alone: elements in, elements out, no device, no kernel.

It shares no code with muenfast. An endpoint is stepped by the test, or runs in a thread of its own.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peer import ChannelReader, ChannelWriter, Result

if TYPE_CHECKING:
    from typing_extensions import Self

PROTOCOL = 2
SOLO5 = 0x7ADE5C549B08E814
MAC = bytes.fromhex("020000000042")


def checksum(data: bytes) -> int:
    """RFC 1071, over 16-bit big-endian words."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: bytes, target: bytes, protocol: int, payload: bytes, tos: int = 0) -> bytes:
    """A packet with a right header checksum."""
    header = struct.pack(">BBHHHBBH4s4s", 0x45, tos, 20 + len(payload), 1, 0, 64, protocol, 0, source, target)
    return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + payload


def ipv6(source: bytes, target: bytes, protocol: int, payload: bytes, traffic_class: int = 0) -> bytes:
    return struct.pack(">IHBB16s16s", 6 << 28 | traffic_class << 20, len(payload), protocol, 64, source, target) + payload


def udp(source: int, target: int, payload: bytes) -> bytes:
    """A datagram for IPv4 without a checksum, which 0 says."""
    return struct.pack(">HHHH", source, target, 8 + len(payload), 0) + payload


def checked(packet: bytes) -> bool:
    """Whether an IPv4 or IPv6 packet's checksums are all right, as far as it is TCP, UDP, ICMP or ICMPv6."""
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        if checksum(packet[:size]) != 0 or int.from_bytes(packet[2:4], "big") != len(packet):
            return False
        protocol, addresses, payload = packet[9], packet[12:20], packet[size:]
        if int.from_bytes(packet[6:8], "big") & 0x3FFF:
            return True     # a fragment
        if protocol == 1:
            return checksum(payload) == 0
    else:
        protocol, addresses, payload = packet[6], packet[8:40], packet[40:]
        if int.from_bytes(packet[4:6], "big") != len(payload):
            return False
    if protocol == 17 and payload[6:8] == b"\0\0":
        return packet[0] >> 4 == 4
    if protocol not in (6, 17, 58):
        return True
    return checksum(addresses + struct.pack(">II", len(payload), protocol) + payload) == 0


def echo_reply(packet: bytes) -> bytes | None:
    """The answer to an ICMP or ICMPv6 echo request, None to anything else."""
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        if packet[9] != 1 or packet[size] != 8:
            return None
        body = b"\0\0\0\0" + packet[size + 4:]
        body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
        return ipv4(packet[16:20], packet[12:16], 1, body)
    if packet[6] != 58 or packet[40] != 128:
        return None
    source, target = packet[24:40], packet[8:24]
    body = b"\x81\0\0\0" + packet[44:]
    pseudo = source + target + struct.pack(">II", len(body), 58)
    return ipv6(source, target, 58, body[:2] + struct.pack(">H", checksum(pseudo + body)) + body[4:])


def net_element(packet: bytes, size: int, mark: int = 0) -> bytes:
    """net_hdr and the packet, padded to `size`."""
    if packet[0] >> 4 == 4:
        protocol, qos = 4, packet[1] >> 2
    else:
        protocol, qos = 41, (int.from_bytes(packet[:2], "big") >> 4 & 0xFF) >> 2
    return struct.pack("<IHBB", mark, len(packet), protocol, qos) + packet + bytes(size - 8 - len(packet))


def eth_element(frame: bytes, size: int) -> bytes:
    """The frame, padding, and its length in the last two bytes."""
    return frame + bytes(size - 2 - len(frame)) + struct.pack("<H", len(frame))


class Endpoint:
    """The other end of an interface: reads `incoming`, writes `outgoing`, either may be None.

    framing: "net_hdr", "eth_dev" or "raw". Everything that was read stands in `seen`; what answer() returns is sent.
    """

    def __init__(self, incoming: str | None, outgoing: str | None, framing: str, mtu: int = 1500, *,
                 protocol: int = PROTOCOL, region: int = 1 << 20, address: str = "") -> None:
        self.framing = framing
        self.size = mtu + {"net_hdr": 8, "eth_dev": 16, "raw": 0}[framing]
        self.address = bytes(map(int, address.split("."))) if address else b""
        self.seen: list[bytes] = []
        self.results: list[Result] = []
        self.writer = None if outgoing is None else ChannelWriter(outgoing, self.size, protocol, region)
        self.reader = None if incoming is None else ChannelReader(incoming, protocol, self.size)
        if self.writer is not None:
            self.writer.activate()

    def step(self) -> bool:
        """One look; whether something was read."""
        assert self.reader is not None
        result, element = self.reader.read()
        if result != Result.SUCCESS:
            if result != Result.NO_DATA and self.results[-1:] != [result]:
                self.results.append(result)
            return False
        assert element is not None
        self.seen.append(element)
        if self.writer is not None and (answer := self.answer(element)) is not None:
            self.writer.write(answer)
        return True

    def answer(self, element: bytes) -> bytes | None:
        """To an echo request or ARP request; in raw mode to everything."""
        if self.framing == "raw":
            return element
        if self.framing == "net_hdr":
            mark, length, protocol, _ = struct.unpack_from("<IHBB", element)
            packet = element[8:8 + length]
            assert protocol == {4: 4, 6: 41}[packet[0] >> 4]
            reply = echo_reply(packet)
            return None if reply is None else net_element(reply, self.size, mark)
        length = int.from_bytes(element[-2:], "little")
        frame = element[:length]
        target, source, kind = frame[:6], frame[6:12], frame[12:14]
        if kind == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == self.address:
            body = frame[14:20] + b"\0\2" + MAC + self.address + frame[22:32]
            return eth_element(source + MAC + kind + body, self.size)
        if kind == b"\x08\0" and target == MAC and (reply := echo_reply(frame[14:])) is not None:
            return eth_element(source + MAC + kind + reply, self.size)
        return None

    def until(self, true: Callable[[], bool], seconds: float = 20) -> None:
        """Steps until that is so."""
        end = time.monotonic() + seconds
        while not true():
            if not self.step():
                assert time.monotonic() < end, "waited in vain"
                time.sleep(0.0005)

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Steps in a thread of its own."""
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                if not self.step():
                    time.sleep(0.0005)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        """Leaves as a peer that ends."""
        if self.writer is not None:
            self.writer.deactivate()
            self.writer.close()
        if self.reader is not None:
            self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
