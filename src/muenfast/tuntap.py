"""TUN and TAP devices: made in any network namespace, gone with their descriptor; whether they are up, and set up.

A device is made, and watched, by system calls alone; pyroute2 is loaded where addresses, a MAC or `up` are asked for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from muenfast import netns
from muenfast.errors import UsageError
from muenfast.threads import spawn

log = logging.getLogger("muenfast")

_TUN = "/dev/net/tun"

# <linux/if_tun.h>
_IFF_TUN, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x1, 0x2, 0x1000, 0x4000, 0x8000
_TUNSETIFF, _TUNGETIFF, _TUNSETCARRIER, _TUNGETDEVNETNS = 0x400454CA, 0x800454D2, 0x400454E2, 0x54E3
_TUNSETOFFLOAD = 0x400454D0
_CSUM, _TSO4, _TSO6, _TSO_ECN, _USO4, _USO6 = 0x1, 0x2, 0x4, 0x8, 0x20, 0x40
# <linux/sockios.h>, <linux/if.h>
_SIOCGIFFLAGS, _SIOCSIFMTU, _SIOCGIFINDEX, _SIOCSIFTXQLEN = 0x8913, 0x8922, 0x8933, 0x8943
_IFF_UP = 0x1
# <linux/rtnetlink.h>: the header of a message, that of a link's, and that of a queueing discipline's
_RTMGRP_LINK, _NLMSG_ERROR, _RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_NEWQDISC = 0x1, 2, 16, 17, 18, 36
_NLMSG, _IFINFO, _TCMSG = struct.Struct("IHHII"), struct.Struct("BxHiII"), struct.Struct("B3xiIII")
_REQUEST, _ACK, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400     # NLM_F_..., <linux/netlink.h>
_TCA_KIND, _TC_H_ROOT = 1, 0xFFFFFFFF
_EBADFD = 77
# Packets that wait for us in the kernel: bursts of a window's length find room while a full ring holds us back.
_QUEUE = 4096
_AGAIN = 0.05    # seconds after which somebody is told again

_MODES = {"net_hdr": _IFF_TUN | _IFF_NO_PI, "eth_dev": _IFF_TAP | _IFF_NO_PI, "raw": _IFF_TUN}


def check_mac(text: str, option: str, index: int) -> str:
    """A MAC address of one station. Raises UsageError."""
    if not re.fullmatch("([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", text):
        raise UsageError("a MAC address is six hexadecimal bytes, like 02:00:00:00:00:01", option=option, index=index,
                         value=text)
    if int(text[:2], 16) & 1 or not int(text.replace(":", ""), 16):
        raise UsageError("a station's MAC address has an even first byte and is not zero", option=option, index=index,
                         value=text)
    return text.lower()


def check_addresses(text: str, option: str, index: int) -> tuple[str, ...]:
    """The addresses of one interface, joined by +, each ADDRESS/BITS. Raises UsageError."""
    found = []
    for each in text.split("+"):
        try:
            if "/" not in each:
                raise ValueError(f"{each} has no bits")
            found.append(str(ipaddress.ip_interface(each)))
            if found[-1] in found[:-1]:
                raise ValueError(f"{each} is given twice")
        except ValueError as error:
            raise UsageError(f"an address is IPv4 or IPv6 with the bits of its network, like 10.0.0.1/24 or fd00::1/64, "
                             f"several of one interface joined by +: {error}", option=option, index=index,
                             value=text) from None
    return tuple(found)


def _news() -> socket.socket:
    """A socket that tells of links in this thread's namespace, and takes requests about them."""
    news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        news.bind((0, _RTMGRP_LINK))
    except BaseException:
        news.close()
        raise
    return news


def _request(s: socket.socket, number: int, name: str, value: int = 0) -> int:
    """An ioctl(2) with a struct ifreq that holds one int; the int afterwards."""
    filled = struct.pack("16si20x", os.fsencode(name), value)
    return int(struct.unpack_from("i", fcntl.ioctl(s, number, filled), 16)[0])


def _pass_at_once(index: int) -> None:
    """Packets of a device come straight to our queue in the kernel, as a veth's come to the peer. The discipline that a TUN
    device has by default never holds one back, for the device takes whatever comes, and costs the sender a tenth of a
    microsecond each. Whoever shapes traffic puts another one there (tc qdisc replace).

    Raises OSError; it stays as it is in a kernel that has no disciplines.
    """
    kind = struct.pack("HH8s", 12, _TCA_KIND, b"noqueue")
    message = _TCMSG.pack(socket.AF_UNSPEC, index, 0, _TC_H_ROOT, 0) + kind
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as route:
        flags = _REQUEST | _ACK | _CREATE | _REPLACE
        route.send(_NLMSG.pack(_NLMSG.size + len(message), _RTM_NEWQDISC, flags, 1, 0) + message)
        answer = route.recv(4096)
    error = -int(struct.unpack_from("i", answer, _NLMSG.size)[0])
    if error and error != errno.EOPNOTSUPP:
        raise OSError(error, f"its queueing discipline: {os.strerror(error)}")


# ------------------------------------------------------------------ devices

class Device:
    """A TUN or TAP device with one queue; it goes with close(), or with the process.

    framing: one of _net.FRAMINGS: "eth_dev" is a TAP, the others are TUN; "raw" has packet information before each packet.
    offload: a virtio_net_hdr stands before each packet, and packets may be super-packets: see `merges`. fd: non-blocking.
    It is down, and without carrier, at first. moves: how often it was found in another namespace.

    Raises UsageError, OSError; EPERM says which capability is missing.
    """

    def __init__(self, name: str, framing: str, mtu: int, *, namespace: int | None, offload: bool = False) -> None:
        self.name, self.framing, self.mtu, self.offload = name, framing, mtu, offload
        self.merges: tuple[str, ...] = ()   # what it takes as super-packets, of _net.MERGES
        self.fd = -1
        self.index = self.moves = 0
        self.news: socket.socket | None = None
        try:
            netns.inside(namespace, self._make)
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        # The socket first: whatever becomes of the device from its first moment on is told there.
        self.news = _news()
        try:
            self.fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", self.name.encode(),
                                                         _MODES[self.framing] | _IFF_TUN_EXCL
                                                         | (_IFF_VNET_HDR if self.offload else 0)))
        except OSError as error:
            if error.errno == errno.EACCES and self.fd < 0:
                raise PermissionError(error.errno, "may not be opened by this user (chmod, or a group, may grant it)",
                                      _TUN) from error
            if error.errno in (errno.EPERM, errno.EACCES):
                raise PermissionError(error.errno, f"the interface {self.name} cannot be made without the capability "
                                      "CAP_NET_ADMIN (run as root, or grant it)", _TUN) from error
            if error.errno == errno.EBUSY:
                raise FileExistsError(errno.EEXIST, f"there is an interface {self.name} already: name another one",
                                      self.name) from error
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                raise OSError(error.errno, "this kernel has no TUN devices, or no node for them", _TUN) from error
            raise OSError(error.errno, f"the interface {self.name} cannot be made: {error.strerror}", _TUN) from error
        self.index = _request(self.news, _SIOCGIFINDEX, self.name)
        _request(self.news, _SIOCSIFMTU, self.name, self.mtu)
        _request(self.news, _SIOCSIFTXQLEN, self.name, _QUEUE)
        _pass_at_once(self.index)
        self.set_carrier(False)
        if self.offload:
            self._set_offload()

    def _set_offload(self) -> None:
        """Asks for super-packets of TCP, and of UDP where the kernel has them (Linux 6.2)."""
        tcp = _CSUM | _TSO4 | _TSO6 | _TSO_ECN
        try:
            fcntl.ioctl(self.fd, _TUNSETOFFLOAD, tcp | _USO4 | _USO6)
            self.merges = ("tcp4", "tcp6", "udp")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fcntl.ioctl(self.fd, _TUNSETOFFLOAD, tcp)
            self.merges = ("tcp4", "tcp6")

    def namespace(self) -> int:
        """A descriptor of the namespace that it is in now. Raises OSError."""
        return fcntl.ioctl(self.fd, _TUNGETDEVNETNS)

    @contextlib.contextmanager
    def place(self) -> Iterator[int | None]:
        """namespace(), as long as this lasts. None: the device is another process's, which knows by itself. Raises OSError.
        """
        namespace = self.namespace()
        try:
            yield namespace
        finally:
            os.close(namespace)

    def exists(self) -> bool:
        """Whether nobody removed it."""
        try:
            self._named()
        except OSError:
            return False
        return True

    def queue_drops(self) -> int:
        """Packets that the kernel threw away before they could be read: its queue was full, or there was no carrier. Of the
        namespace's /proc/net/dev. Raises OSError; 0 where the device has gone there."""
        def read() -> int:
            with open("/proc/thread-self/net/dev", encoding="ascii", errors="replace") as file:
                for line in file:
                    name, colon, values = line.partition(":")
                    if colon and name.strip() == self.name:
                        return int(values.split()[11])     # after 8 of what is received: bytes, packets, errs, drop
            return 0

        namespace = self.namespace()
        try:
            self.rename()
            return netns.inside(namespace, read)
        finally:
            os.close(namespace)

    def set_carrier(self, on: bool) -> None:
        """Whether there is somebody at the other end, as the kernel is to see it. OSError where the device is gone."""
        if self.fd < 0:
            raise OSError(errno.EBADF, "the device was closed", self.name)
        fcntl.ioctl(self.fd, _TUNSETCARRIER, struct.pack("i", on))

    def configure(self, *, namespace: int | None, addresses: Sequence[str] = (), mac: str | None = None,
                  up: bool = False) -> None:
        """What `ip link set` and `ip addr add` would do. Raises OSError."""
        if addresses or mac is not None or up:
            netns.inside(namespace, lambda: self._configure(addresses, mac, up))

    def _configure(self, addresses: Sequence[str], mac: str | None, up: bool) -> None:
        from pyroute2 import IPRoute  # type: ignore[import-untyped]
        from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

        with IPRoute() as route:
            def ask(what: str, call: Callable[..., Any], *words: str, **fields: Any) -> None:
                try:
                    call(*words, index=self.index, **fields)
                except NetlinkError as error:
                    raise OSError(error.code, f"{what}: {os.strerror(error.code)}", self.name) from error

            if mac is not None:
                ask(f"MAC address {mac}", route.link, "set", address=mac)
            for each in addresses:
                address, _, bits = each.partition("/")
                ask(f"address {each}", route.addr, "add", address=address, prefixlen=int(bits))
            if up:
                ask("up", route.link, "set", state="up")

    def rename(self) -> str:
        """What it is called by now: somebody may have given it another name."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # it is gone
                self.name = self._named()
        return self.name

    def _named(self) -> str:
        return os.fsdecode(fcntl.ioctl(self.fd, _TUNGETIFF, bytes(40))[:16].partition(b"\0")[0])

    def follow(self) -> bool | None:
        """After its namespace told that it is not there any more: looks for it in another; whether it is up there, None:
        it is nowhere."""
        try:
            namespace = self.namespace()
        except OSError:
            return None
        try:
            news = netns.inside(namespace, _news)
            name = self._named()
            try:
                self.index = _request(news, _SIOCGIFINDEX, name)
                netns.inside(namespace, partial(_pass_at_once, self.index))
                flags = _request(news, _SIOCGIFFLAGS, name)
            except BaseException:
                news.close()
                raise
        finally:
            os.close(namespace)
        self.moves += 1
        old, self.news, self.name = self.news, news, name
        if old is not None:
            old.close()
        return bool(flags & _IFF_UP)

    def states(self) -> list[bool | None]:
        """What was told of the device since the last call, in order: whether it is up, None: it went away, or elsewhere.
        """
        found: list[bool | None] = []
        missed = False
        assert self.news is not None
        while True:
            try:
                data = self.news.recv(65536)
            except BlockingIOError:
                if not missed:
                    return found
                # Something was not told: asked for, it is told once more. Before all was taken there is no room for that.
                missed = False
                self.news.send(_NLMSG.pack(_NLMSG.size + _IFINFO.size, _RTM_GETLINK, 1, 0, 0)
                               + _IFINFO.pack(0, 0, self.index, 0, 0))
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                missed = True
                continue
            at = 0
            while at + _NLMSG.size + _IFINFO.size <= len(data):
                length, kind, *_ = _NLMSG.unpack_from(data, at)
                if kind == _NLMSG_ERROR:    # asked for, it was not there
                    found.append(None)
                elif kind in (_RTM_NEWLINK, _RTM_DELLINK):
                    family, _, index, flags, _ = _IFINFO.unpack_from(data, at + _NLMSG.size)
                    if index == self.index and family == socket.AF_UNSPEC:  # else of a bridge's port
                        found.append(None if kind == _RTM_DELLINK else bool(flags & _IFF_UP))
                at += max(_NLMSG.size, length + 3 & ~3)

    def close(self) -> None:
        """The device goes."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        news, self.news = self.news, None
        if news is not None:
            news.close()


class Links:
    """A thread that looks whether devices are up, and tells; context manager.

    Each device's `told` is called by that thread: True up, False down, None: the device is no more. Where it returns False
    it is told the same once more, soon.
    """

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._read, select.EPOLLIN)
        self._books = threading.Lock()
        self._watched: dict[int, tuple[Device, Callable[[bool | None], bool]]] = {}     # by the socket's descriptor
        self._again: dict[Device, tuple[Callable[[bool | None], bool], bool]] = {}      # what they are told again
        try:
            self._thread = spawn(self._run, "links")
        except BaseException:
            self._leave()
            raise

    def add(self, device: Device, told: Callable[[bool | None], bool]) -> None:
        """Tells of that device from its making on, until remove()."""
        assert device.news is not None
        with self._books:
            fd = device.news.fileno()
            self._watched[fd] = device, told
            self._poll.register(fd, select.EPOLLIN)

    def remove(self, device: Device) -> None:
        """Once it returns nothing is told of the device, which may be closed then."""
        with self._books:
            self._forget(device)

    def _forget(self, device: Device) -> None:
        self._again.pop(device, None)
        for fd in [fd for fd, (each, _) in self._watched.items() if each is device]:
            del self._watched[fd]
            self._poll.unregister(fd)

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll(_AGAIN if self._again else None):
                if fd == self._read:
                    return
                with self._books:
                    if fd in self._watched:
                        device, told = self._watched[fd]
                        self._try(device, partial(self._look, device, told))
            with self._books:
                for device, (told, state) in list(self._again.items()):
                    self._try(device, partial(self._tell, device, told, state))

    def _try(self, device: Device, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # nobody else would hear of it, and the others go on
            log.error("interface %s: cannot see whether it is up: %s", device.name, error)
            self._forget(device)

    def _tell(self, device: Device, told: Callable[[bool | None], bool], state: bool) -> None:
        if told(state):
            self._again.pop(device, None)
        else:
            self._again[device] = told, state

    def _look(self, device: Device, told: Callable[[bool | None], bool]) -> None:
        for state in device.states():
            if state is not None:
                self._tell(device, told, state)
                continue
            self._forget(device)
            told(False)
            now = device.follow()
            if now is None:
                told(None)
                return
            log.info("interface %s: is in another network namespace now", device.name)
            assert device.news is not None
            self._watched[device.news.fileno()] = device, told
            self._poll.register(device.news.fileno(), select.EPOLLIN)
            self._tell(device, told, now)

    def _leave(self) -> None:
        self._poll.close()
        for fd in (self._read, self._write):
            os.close(fd)

    def close(self) -> None:
        """Ends the thread."""
        with contextlib.suppress(BlockingIOError):  # full of such words
            os.write(self._write, b"x")
        self._thread.join()
        self._leave()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
