"""Namespaces (namespaces.py) with TUN devices whose packets come, and go, behind a virtio_net_hdr."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import time
from collections.abc import Callable
from types import TracebackType

from namespaces import IFF_NO_PI, IFF_TUN, IFF_VNET_HDR, TUNSETIFF, TUNSETOFFLOAD, VNET, Namespace


class Space(Namespace):
    """A namespace and its devices; context manager."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[Tun] = []

    def ip(self, *commands: str) -> None:
        for words in commands:
            self.run(f"ip {words}")

    def sysctl(self, name: str, value: int) -> None:
        self.write(f"/proc/sys/net/{name}", str(value))

    def tun(self, name: str, offloads: int) -> Tun:
        """One that is up."""
        made = self.do(lambda: Tun(name, offloads))
        self._open.append(made)
        self.ip(f"link set {name} up")
        return made

    def __enter__(self) -> Space:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for one in self._open:
            one.close()
        self.close()


class Tun:
    def __init__(self, name: str, offloads: int) -> None:
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, offloads)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def write(self, header: bytes, packet: bytes) -> None:
        assert os.write(self.fd, header + packet) == len(header) + len(packet)

    def read(self) -> tuple[bytes, bytes] | None:
        """(header, packet), or None where there is none now."""
        try:
            data = os.read(self.fd, 65535 + VNET)
        except BlockingIOError:
            return None
        return data[:VNET], data[VNET:]

    def packets(self, count: int, wanted: Callable[[bytes], bool], seconds: float = 20) -> list[tuple[bytes, bytes]]:
        """The next ones that are wanted; the kernel has other news, too. Fewer, where no more came in time."""
        found: list[tuple[bytes, bytes]] = []
        end = time.monotonic() + seconds
        while len(found) < count and time.monotonic() < end:
            select.select([self.fd], [], [], 0.1)
            while (one := self.read()) is not None:
                if wanted(one[1]):
                    found.append(one)
        return found
