"""Network namespaces without a name, and TUN devices in them: nothing of either outlives its descriptor."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from typing import TypeVar

from helpers import eventually

from muenfast import netns

T = TypeVar("T")

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
ALL_OFFLOADS = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40  # CSUM, TSO4, TSO6, TSO_ECN, USO4, USO6
SO_MARK, SO_RCVMARK = 36, 75
VNET = 10  # bytes of struct virtio_net_hdr


class Namespace:
    """One network namespace, loopback up, without addresses that the kernel makes by itself."""

    def __init__(self) -> None:
        self.fd: int = netns.inside_new(netns.current)
        self.run("ip link set lo up")
        self.write("/proc/sys/net/ipv6/conf/default/addr_gen_mode", "1")
        self.write("/proc/sys/net/ipv6/conf/default/router_solicitations", "0")

    def do(self, call: Callable[[], T]) -> T:
        return netns.inside(self.fd, call)

    def words(self, *words: str) -> list[str]:
        """A command line that runs `words` in here."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.fd}", *words]

    def run(self, line: str, check: bool = True) -> str:
        """What a shell command prints."""
        done = subprocess.run(self.words("sh", "-c", line), capture_output=True, text=True, timeout=30, check=False)
        assert not check or done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        def write() -> None:
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
        self.do(write)

    def socket(self, family: int, kind: int, *, mark: int | None = None, receive_marks: bool = False) -> socket.socket:
        made = self.do(lambda: socket.socket(family, kind))
        made.settimeout(10)
        if mark is not None:
            made.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
        if receive_marks:
            made.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
        return made

    def close(self) -> None:
        os.close(self.fd)


class Tun:
    """A TUN device as the pump has it: without packet information, and with vnet_hdr where that is asked for."""

    def __init__(self, namespace: Namespace, name: str = "net0", *, vnet: bool = False, offloads: int = 0) -> None:
        self.namespace, self.name, self.vnet = namespace, name, vnet
        self.fd = namespace.do(lambda: os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        flags = IFF_TUN | IFF_NO_PI | (IFF_VNET_HDR if vnet else 0)
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if vnet:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, offloads)
        self.index: int = namespace.do(lambda: socket.if_nametoindex(name))

    def up(self, *addresses: str, mtu: int = 1500) -> None:
        lines = [f"ip addr add {each} dev {self.name}{' nodad' if ':' in each else ''}" for each in addresses]
        self.namespace.run("; ".join([f"ip link set {self.name} mtu {mtu}", *lines, f"ip link set {self.name} up"]))
        # Also without duplicate address detection an IPv6 address is tentative for a moment.
        eventually(lambda: not self.namespace.run(f"ip -6 addr show dev {self.name} tentative"))
        # And the kernel takes packets to it in only once it has a route, a moment after that.
        for each in (address.partition("/")[0] for address in addresses if ":" in address):
            eventually(lambda each=each: f"local {each} " in self.namespace.run("ip -6 route show table local"))

    def read(self) -> list[bytes]:
        """Everything that waits to be read."""
        found = []
        while True:
            try:
                found.append(os.read(self.fd, 1 << 17))
            except BlockingIOError:
                return found

    def write(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    def close(self) -> None:
        os.close(self.fd)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp(source: str, target: str, port: int, payload: bytes, tos: int = 0) -> bytes:
    """A UDP packet, IPv4 or IPv6, with right checksums."""
    version = 6 if ":" in target else 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    a, b = socket.inet_pton(family, source), socket.inet_pton(family, target)
    length = 8 + len(payload)
    head = struct.pack("!3H", 9, port, length)
    pseudo = a + b + (struct.pack("!II", length, 17) if version == 6 else struct.pack("!BBH", 0, 17, length))
    body = head + struct.pack("!H", checksum(pseudo + head + b"\0\0" + payload)) + payload
    if version == 6:
        return struct.pack("!IHBB", 6 << 28 | tos << 20, length, 17, 64) + a + b + body
    ip = struct.pack("!BBHHHBBH", 0x45, tos, 20 + length, 1, 0, 64, 17, 0) + a + b
    return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + body
