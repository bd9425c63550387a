"""The devices of one interface: its own and its children's, each with its marks and the name by which it is asked for.

Names are those of the devices, and of the network namespace where they are, whatever becomes of them: who renames or
moves a device finds it there.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from muenfast import bpf, netns
from muenfast._net import Ports
from muenfast.bpf import Way
from muenfast.control import Command
from muenfast.errors import ClaimError, MuenfastError, UsageError, describe
from muenfast.marks import Child, Family
from muenfast.names import NameSocket, bound_to, commands
from muenfast.threads import spawn
from muenfast.tuntap import Device, Links

__all__ = ["Children", "Makers", "Port"]

log = logging.getLogger("muenfast")

_IN_USE = 10.0  # seconds within which an engine's turn has ended, or a name that was left is free


class Makers:
    """What takes privileges of a port, by this process itself; broker/net.py has others. Namespaces are descriptors, None:
    the calling thread's. All raise OSError, and what else the function that does it says."""

    def namespace(self, text: str) -> int | None:
        """As the user names it, open."""
        return netns.named(text)

    def device(self, name: str, framing: str, mtu: int, *, namespace: int | None, offload: bool) -> Device:
        """As Device."""
        return Device(name, framing, mtu, namespace=namespace, offload=offload)

    def marks(self, device: Device, namespace: int | None, ways: Sequence[Way]) -> bpf.Attached:
        """bpf.attach() where the device is."""
        return netns.inside(namespace, lambda: bpf.attach(device.index, ways=ways, vnet=device.offload))

    def follow(self, attached: bpf.Attached, device: Device, namespace: int | None) -> None:
        """attached.follow() where the device is now."""
        netns.inside(namespace, lambda: attached.follow(device.index))

    def name(self, device: Device, namespace: int | None) -> socket.socket:
        """names.bound_to() the device's name."""
        return bound_to(device.name, namespace)


class Port:
    """A device with its marks, and what may be asked of it by name.

    ways: in which packets of net_hdr may have their marks, the first that is to be had counts; a single one is a must.
    answers: what it answers to. told: as tuntap.Links has it, from watch() on. makers: of what takes privileges. Raises
    UsageError, ClaimError, OSError; nothing is left behind then.
    """

    def __init__(self, name: str, framing: str, mtu: int, *, namespace: int | None, offload: bool, ways: Sequence[Way],
                 answers: Mapping[str, Command], told: Callable[[bool | None], None], makers: Makers) -> None:
        self._answers, self._told, self._makers = answers, told, makers
        self._names: NameSocket | None = None
        self.attached: bpf.Attached | None = None
        with ExitStack() as stack:
            # From the marks' beginning to the device's end: it would give packets with net_hdr to who expects none.
            stack.callback(self._detach)
            self.device = makers.device(name, framing, mtu, namespace=namespace, offload=offload)
            stack.callback(self.device.close)
            if framing == "net_hdr" and ways:
                self._attach(namespace, ways)
            self._names = self._name(namespace)
            self._named = name, 0
            self._since, self._given_up = 0.0, False    # when it was called so; whether that cannot be asked for
            stack.callback(self._unname)
            self._stack = stack.pop_all()

    def _attach(self, namespace: int | None, ways: Sequence[Way]) -> None:
        try:
            self.attached = self._makers.marks(self.device, namespace, ways)
        except (OSError, MuenfastError) as error:
            if len(ways) == 1:  # asked for
                raise
            log.warning("interface %s: its packets go out without their marks, and come in without: %s (`muenfast doctor` "
                        "tells more)", self.device.name, describe(error))

    def _name(self, namespace: int | None) -> NameSocket:
        return NameSocket(self.device.name, self._answers, bound=lambda: self._makers.name(self.device, namespace))

    @property
    def way(self) -> str:
        """As _net.Ports takes it."""
        if self.attached is None:
            return ""
        return "tap" if self.attached.way is Way.TAP else "front"

    def join(self, ports: Ports, number: int) -> None:
        """Becomes a port of that number."""
        tap = None if self.attached is None else self.attached.tap
        ports.add(number, self.device.fd, self.way, -1 if tap is None else tap.fileno())

    def watch(self, links: Links) -> None:
        """From here on `told` is told, of what has happened, too."""
        links.add(self.device, self._look)
        self._stack.callback(links.remove, self.device)

    def _look(self, state: bool | None) -> bool:
        """From the thread of Links, which must not wait for anybody here; False: it is to be told again."""
        done = state is None or self._follow()
        self._told(state)
        return done

    def _follow(self) -> bool:
        """Is asked for by another name, or elsewhere, if that is where the device is now; so do its marks go along. False:
        the name is somebody else's, who may be about to give it up: another device that was renamed, or removed."""
        now = self.device.rename(), self.device.moves
        if now == self._named and (self._names is not None or self._given_up):
            return True
        before, self._named = self._named, now
        if now != before:
            self._since, self._given_up = time.monotonic(), False
        self._unname()
        with ExitStack() as stack:
            try:
                namespace = stack.enter_context(self.device.place())
            except OSError:     # it is gone, which is told next
                return True
            try:
                if now[1] != before[1]:
                    self._take_marks(namespace)
                self._names = self._name(namespace)
            except (OSError, MuenfastError) as error:
                if isinstance(error, ClaimError) and time.monotonic() - self._since < _IN_USE:
                    return False
                self._given_up = True
                log.error("interface %s: muennet_cfg does not reach it by that name: %s", self.device.name, describe(error))
        return True

    def _take_marks(self, namespace: int | None) -> None:
        """The device is in that namespace now."""
        attached = self.attached
        if attached is None:
            return
        try:
            self._makers.follow(attached, self.device, namespace)
        except (OSError, MuenfastError) as error:
            log.error("interface %s: its marks were not moved with it, and its packets do not go out: %s", self.device.name,
                      describe(error))

    def _unname(self) -> None:
        names, self._names = self._names, None
        if names is not None:
            names.stop()

    def _detach(self) -> None:
        if self.attached is not None:
            self.attached.close()

    def dropped(self) -> dict[str, int]:
        """Packets that were lost for their marks' sake, by bpf.DROPPED."""
        return {} if self.attached is None else self.attached.dropped()

    def close(self) -> None:
        """The device goes. Precondition: no engine uses it."""
        self._stack.close()


class _Called:
    """A child, whatever it is called by now, as who asks for it by name means it (names.Operations)."""

    def __init__(self, children: Children, child: Child) -> None:
        self._children, self._child = children, child

    def _do(self, operation: Callable[..., None], *words: str | int) -> None:
        with self._children.lock:
            self._children.follow_names()
            if self._children.family.children.get(self._child.name) is not self._child:
                raise UsageError("there is no such child", option="CHILD", value=self._child.name)
            operation(self._child.name, *words)

    def add_child(self, parent: str, child: str) -> None:
        self._do(self._children.add_child, child)

    def del_child(self, child: str) -> None:
        self._do(self._children.del_child)

    def add_mark(self, child: str, mark: int) -> None:
        self._do(self._children.add_mark, mark)

    def del_mark(self, child: str, mark: int) -> None:
        self._do(self._children.del_mark, mark)


class Children:
    """The children of one interface, as muennet_cfg asks for them (names.Operations).

    key: what the interface is called in messages, for life. make: makes the port of a child of that name, which is told and
    asked as given; its device begins without carrier. carrier: whether there is one now. Of close() and of what is asked
    only one goes on at a time (lock); before open() all is refused.
    """

    def __init__(self, key: str, ports: Ports, make: Callable[..., Port], links: Links, *, net_hdr: bool, path_mtus: int,
                 carrier: Callable[[], bool]) -> None:
        self._key, self._all, self._make, self._links, self._carrier = key, ports, make, links, carrier
        self.lock = threading.RLock()
        self._ports: dict[int, Port] = {}
        self._closed = True
        self.family = Family()
        self.family.add_parent(key, net_hdr=net_hdr, path_mtus=path_mtus, set_mark=ports.marks.set)

    def answers(self, name: str) -> dict[str, Command]:
        """What the interface's own port answers to."""
        return commands(name, self)

    def follow_names(self) -> None:
        """Takes notice of what children are called by now. Precondition: lock."""
        self.family.rename({child.name: self._ports[child.number].device.rename()
                            for child in self.family.children.values() if child.number in self._ports})

    def open(self) -> None:
        """From here on children may be asked for; close() is due."""
        with self.lock:
            self._closed = False

    def _open(self) -> None:
        if self._closed:
            raise UsageError(f"the interface {self._key} is being made, or taken away")

    # -------------------------------------------------------------- names.Operations

    def add_child(self, parent: str, child: str) -> None:
        """Raises UsageError, ClaimError, OSError."""
        with self.lock:
            self._open()
            self.follow_names()
            new = self.family.add_child(parent, child)
            number = new.number
            with ExitStack() as undo:
                undo.callback(self.family.del_child, child)
                port = self._make(child, commands(child, _Called(self, new)), lambda state: self._told(new, state))
                undo.callback(port.close)
                port.watch(self._links)
                undo.pop_all()
            self._ports[number] = port
            port.join(self._all, number)
            with contextlib.suppress(OSError):  # somebody removed it: we are told
                port.device.set_carrier(self._carrier())
        log.info("interface %s: child %s", self._key, child)

    def del_child(self, child: str) -> None:
        """Raises UsageError."""
        with self.lock:
            self._open()
            self._remove(child)
        log.info("interface %s: child %s was taken away", self._key, child)

    def add_mark(self, child: str, mark: int) -> None:
        """Raises UsageError."""
        with self.lock:
            self._open()
            self.family.add_mark(child, mark)

    def del_mark(self, child: str, mark: int) -> None:
        """Raises UsageError."""
        with self.lock:
            self._open()
            self.family.del_mark(child, mark)

    # -------------------------------------------------------------- their life

    def _remove(self, child: str) -> None:
        number = self.family.del_child(child).number    # its marks are the parent's from here on
        port = self._ports.pop(number)
        while not self._all.remove(number, _IN_USE):
            log.warning("interface %s: still uses its child %s after %g s", self._key, child, _IN_USE)
        port.close()

    def _told(self, child: Child, state: bool | None) -> None:
        if state is None:   # another thread: what is asked for may wait for the one that tells
            spawn(lambda: self._gone(child), f"{child.name} gone")

    def look(self) -> None:
        """One of them is no more, as an engine found, and we may not be told of. That engine's thread waits for nobody."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            gone = [child for child in self.family.children.values() if not self._ports[child.number].device.exists()]
        finally:
            self.lock.release()
        for child in gone:
            self._told(child, None)

    def _gone(self, child: Child) -> None:
        with self.lock:
            self.follow_names()
            name = child.name
            if (self._closed or self.family.children.get(name) is not child or child.number not in self._ports
                    or self._ports[child.number].device.exists()):
                return
            self._remove(name)
        log.error("interface %s: its child %s was removed; its marks are the parent's", self._key, name)

    def set_carrier(self, on: bool) -> None:
        """Of all children."""
        with self.lock:
            for port in self._ports.values():
                with contextlib.suppress(OSError):  # is gone: we are told
                    port.device.set_carrier(on)

    def status(self) -> list[dict[str, Any]]:
        """Name, marks and counters of each child, the eldest first."""
        with self.lock:
            return [{"name": self._ports[child.number].device.rename(), "marks": sorted(child.marks),
                     "counters": self._all.counters(child.number), "lost": self._ports[child.number].dropped()}
                    for child in self.family.children.values()]

    def close(self) -> None:
        """Takes all children away."""
        with self.lock:
            self._closed = True
            for child in list(self.family.children):
                self._remove(child)
