"""Network interfaces by a broker: the devices that the policy declares, with their marks, where it says; no others.

The broker's process has a Device and its marks for each; the process that it works for has the same descriptors, asks for
what takes privileges, and decides nothing: framing, MTU, namespace, addresses are the policy's, by the device's name.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from muenfast import bpf, netns
from muenfast.bpf import Way
from muenfast.broker import Answer, Broker, Operation, Refused, Service, number, start, word
from muenfast.errors import describe
from muenfast.net import MARKS, InterfaceConfig
from muenfast.ports import Makers
from muenfast.tuntap import Device

__all__ = ["Brokered", "NetService", "of_interfaces"]

log = logging.getLogger("muenfast")

_LANES = 4
_CAPABILITIES = ("CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_BPF")
_NAME = word(r"[^\s/:]{1,15}")
_DEVICE = {"device": number(1, 1 << 31)}


class _Held:
    """A device that was made. declared: what it is called in the policy."""

    def __init__(self, declared: str, config: InterfaceConfig, device: Device) -> None:
        self.declared, self.config, self.device = declared, config, device
        self.attached: bpf.Attached | None = None
        self.open = True


class NetService(Service):
    """configs: the interfaces. children: names of interfaces by those of children that they may have."""

    def __init__(self, configs: Sequence[InterfaceConfig], children: Mapping[str, str]) -> None:
        super().__init__()
        self._configs = {config.name: config for config in configs}
        self._children = dict(children)
        self._held: dict[int, _Held] = {}
        self._last = 0
        self._lock = threading.Lock()   # one operation at a time: they wait for nobody
        self.operations |= {
            "device": Operation(self._make, {"name": _NAME}), "marks": Operation(self._marks, _DEVICE),
            "follow marks": Operation(self._follow_marks, _DEVICE), "name": Operation(self._name, _DEVICE),
            "follow": Operation(self._follow, _DEVICE), "configure": Operation(self._configure, _DEVICE),
            "drops": Operation(self._drops, _DEVICE), "lost": Operation(self._lost, _DEVICE),
            "unmark": Operation(self._unmark, _DEVICE), "close": Operation(self._close, _DEVICE)}

    def _of(self, device: int) -> _Held:
        found = self._held.get(device)
        if found is None:
            raise Refused(f"there is no device number {device}")
        return found

    def _open(self, device: int) -> _Held:
        found = self._of(device)
        if not found.open:
            raise Refused(f"device number {device} was closed")
        return found

    @contextmanager
    def _where(self, name: str) -> Iterator[tuple[InterfaceConfig, int | None]]:
        """The configuration for a device of that name, and where it is to be made."""
        if (config := self._configs.get(name)) is not None:
            with ExitStack() as stack:
                namespace = None if config.netns is None else netns.named(config.netns)
                if namespace is not None:
                    stack.callback(os.close, namespace)
                yield config, namespace
            return
        parent = self._children.get(name)
        if parent is None:
            raise Refused(f"the policy declares no interface, and no child of one, that is called {name!r}")
        for held in self._held.values():
            if held.declared == parent and held.open:
                with held.device.place() as namespace:
                    yield held.config, namespace
                return
        raise Refused(f"{name} is a child of {parent}, which is not there")

    def _make(self, name: str) -> Answer:
        with self._lock:
            if any(held.declared == name for held in self._held.values()):
                raise Refused(f"{name} is there already")
            with self._where(name) as (config, namespace):
                device = Device(name, config.framing, config.mtu, namespace=namespace, offload=config.offload)
            self._last += 1
            self._held[self._last] = _Held(name, config, device)
            assert device.news is not None
            return Answer({"device": self._last, "index": device.index, "merges": device.merges, "framing": config.framing,
                           "mtu": config.mtu, "offload": config.offload}, (device.fd, device.news.fileno()), own=False)

    def _marks(self, device: int) -> Answer:
        with self._lock:
            held = self._open(device)
            if held.attached is not None:
                raise Refused("it has its marks already")
            with held.device.place() as namespace:
                held.attached = netns.inside(namespace, lambda: bpf.attach(
                    held.device.index, ways=MARKS[held.config.marks], vnet=held.device.offload))
            return self._way(held.attached)

    @staticmethod
    def _way(attached: bpf.Attached) -> Answer:
        return Answer({"way": attached.way.value}, () if attached.tap is None else (attached.tap.fileno(),), own=False)

    def _follow_marks(self, device: int) -> Answer:
        with self._lock:
            held = self._open(device)
            attached = held.attached
            if attached is None:
                raise Refused("it has no marks")
            with held.device.place() as namespace:
                netns.inside(namespace, lambda: attached.follow(held.device.index))
            return self._way(attached)

    def _name(self, device: int) -> Answer:
        with self._lock:
            held = self._open(device)
            held.device.rename()
            with held.device.place() as namespace:
                return Answer(fds=(Makers().name(held.device, namespace).detach(),))

    def _follow(self, device: int) -> Answer:
        with self._lock:
            held = self._open(device)
            up = held.device.follow()
            if up is None:
                return Answer({"up": None})
            assert held.device.news is not None
            return Answer({"up": up, "index": held.device.index, "name": held.device.name},
                          (held.device.news.fileno(),), own=False)

    def _configure(self, device: int) -> Answer:
        with self._lock:
            held = self._open(device)
            config = held.config
            if held.declared != config.name:
                raise Refused("a child has no addresses of the policy's")
            with held.device.place() as namespace:
                held.device.configure(namespace=namespace, addresses=config.addresses, mac=config.mac, up=config.up)
            return Answer()

    def _drops(self, device: int) -> Answer:
        with self._lock:
            return Answer({"packets": self._open(device).device.queue_drops()})

    def _lost(self, device: int) -> Answer:
        with self._lock:
            attached = self._of(device).attached
            return Answer({"packets": {} if attached is None else attached.dropped()})

    def _unmark(self, device: int) -> Answer:
        with self._lock:
            held = self._of(device)
            attached, held.attached = held.attached, None
            if attached is None:
                raise Refused("it has no marks")
            attached.close()
            self._forget(device, held)
            return Answer({"packets": attached.dropped()})

    def _close(self, device: int) -> Answer:
        with self._lock:
            held = self._open(device)
            held.open = False
            held.device.close()
            self._forget(device, held)
            return Answer()

    def _forget(self, device: int, held: _Held) -> None:
        """Marks go after their device: it would give packets with net_hdr to who expects none."""
        if not held.open and held.attached is None:
            del self._held[device]

    def undo(self) -> None:
        """Devices, then their marks; each whatever became of the others."""
        with self._lock:
            for held in self._held.values():
                for made in (held.device, held.attached):
                    try:
                        if made is not None:
                            made.close()
                    except OSError as error:
                        log.warning("interface %s: %s", held.declared, describe(error))


def of_interfaces(configs: Sequence[InterfaceConfig], children: Mapping[str, str]) -> Broker:
    """A broker for these; see start()."""
    return start(lambda: NetService(configs, children), _LANES, _CAPABILITIES)


# ------------------------------------------------------------------ the process without privileges

class Brokered(Makers):
    """What a broker makes. Names and namespaces are given for messages only: it knows them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def namespace(self, text: str) -> None:
        """None: it opens it itself."""

    def device(self, name: str, framing: str, mtu: int, *, namespace: int | None, offload: bool) -> Device:
        return _Device(self._broker, name)

    def marks(self, device: Device, namespace: int | None, ways: Sequence[Way]) -> bpf.Attached:
        assert isinstance(device, _Device)
        return _Marks(self._broker, device.number)

    def follow(self, attached: bpf.Attached, device: Device, namespace: int | None) -> None:
        assert isinstance(attached, _Marks)
        attached.moved()

    def name(self, device: Device, namespace: int | None) -> socket.socket:
        assert isinstance(device, _Device)
        _, [fd] = self._broker.call("name", device=device.number)
        return socket.socket(fileno=fd)


class _Device(Device):
    """A device that the broker has, too. number: what it calls it."""

    def __init__(self, broker: Broker, name: str) -> None:
        self._broker = broker
        answer, (self.fd, news) = broker.call("device", name=name)
        self.news = socket.socket(fileno=news)
        self.number: int = answer["device"]
        self.name, self.framing, self.mtu, self.offload = name, answer["framing"], answer["mtu"], answer["offload"]
        self.merges, self.index, self.moves = tuple(answer["merges"]), answer["index"], 0

    def namespace(self) -> int:
        """Raises PermissionError: that takes privileges."""
        raise PermissionError("the namespace of a device is its broker's affair")

    @contextmanager
    def place(self) -> Iterator[None]:
        """None; OSError where the device has gone."""
        self._named()
        yield None

    def queue_drops(self) -> int:
        return int(self._broker.ask("drops", device=self.number)["packets"])

    def configure(self, *, namespace: int | None, addresses: Sequence[str] = (), mac: str | None = None,
                  up: bool = False) -> None:
        """As the policy says."""
        if addresses or mac is not None or up:
            self._broker.ask("configure", device=self.number)

    def follow(self) -> bool | None:
        answer, fds = self._broker.call("follow", device=self.number)
        if answer["up"] is None:
            return None
        old, self.news = self.news, socket.socket(fileno=fds[0])
        self.index, self.name = answer["index"], answer["name"]
        self.moves += 1
        if old is not None:
            old.close()
        return bool(answer["up"])

    def close(self) -> None:
        here = self.fd >= 0
        super().close()
        if here:
            self._broker.ask("close", device=self.number)


class _Marks(bpf.Attached):
    """The marks of a device that the broker has."""

    def __init__(self, broker: Broker, number: int) -> None:
        self._broker, self._number = broker, number
        answer, fds = broker.call("marks", device=number)
        self.way = Way(answer["way"])
        self.tap = socket.socket(fileno=fds[0]) if fds else None
        self._last: dict[str, int] | None = None

    def dropped(self) -> dict[str, int]:
        return self._broker.ask("lost", device=self._number)["packets"] if self._last is None else dict(self._last)

    def moved(self) -> None:
        """The device is in another namespace now; `tap` has the same descriptor."""
        _, fds = self._broker.call("follow marks", device=self._number)
        for fd in fds:
            assert self.tap is not None
            os.dup2(fd, self.tap.fileno(), inheritable=False)
            os.close(fd)

    def close(self) -> None:
        if self._last is None:
            self._last = self._broker.ask("unmark", device=self._number)["packets"]
            if self.tap is not None:
                self.tap.close()
