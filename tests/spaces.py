"""Network namespaces without a name, each of one thread, and TUN devices in them: gone with their last user."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454ca, 0x400454d0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x1, 0x1000, 0x4000
CSUM, TSO4, TSO6, TSO_ECN, USO4, USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40


def why_not() -> str | None:
    """Why there can be no namespace with a TUN device here."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    return None


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


class Space:
    """A namespace; do() runs something in it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=_unshare)
        self._open: list[Tun] = []
        self.do(self.ip, "link set lo up")

    def do(self, what: Callable[..., T], *values: Any) -> T:
        return self._thread.submit(what, *values).result(60)

    def ip(self, words: str) -> None:
        """Only by do()."""
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, timeout=60)

    def run(self, *commands: str) -> None:
        for words in commands:
            self.do(self.ip, words)

    def sysctl(self, name: str, value: int) -> None:
        self.do(Path("/proc/sys/net", name).write_text, str(value))

    def tun(self, name: str, offloads: int) -> Tun:
        """A TUN device with virtio_net_hdr, up."""
        made = self.do(Tun, name, offloads)
        self._open.append(made)
        self.run(f"link set {name} up")
        return made

    def __enter__(self) -> Space:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for one in self._open:
            one.close()
        self._thread.shutdown()


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
            data = os.read(self.fd, 65535 + 10)
        except BlockingIOError:
            return None
        return data[:10], data[10:]

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
