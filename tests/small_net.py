"""A small process that serves one net_hdr interface, for tests of what such a process is asked for: NAME DESCRIPTOR WAY.

Elements go as datagrams over the socket DESCRIPTOR; the interface and its children, which are real, are made in the
process' own network namespace. Prints `ready`; ends when the other end of the socket is closed, or by SIGTERM.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass

from namespaces import IFF_NO_PI, IFF_TUN, TUNSETIFF

from muenfast import bpf
from muenfast._marks import MarkTable, prefix
from muenfast.bpf import Attached, Way
from muenfast.marks import Family
from muenfast.names import NameSocket, commands

_WAIT = 5.0  # seconds


@dataclass
class Interface:
    fd: int
    attached: Attached
    name: NameSocket


class Server:
    def __init__(self, name: str, wire: socket.socket, way: Way) -> None:
        self.wire, self.way = wire, way
        self.table = MarkTable(100)
        self.family = Family()
        self.family.add_parent(name, net_hdr=True, set_mark=self.table.set)
        self.lock = threading.Lock()
        self.interfaces: dict[int, Interface] = {0: self.make(name)}    # by number
        self.waker, self.wake = os.pipe()   # has the sender look again which interfaces there are
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self.send, self.receive)]

    def make(self, name: str) -> Interface:
        """A new interface with marks, and its name socket; all or nothing."""
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
            attached = bpf.attach(socket.if_nametoindex(name), ways=(self.way,))
            try:
                return Interface(fd, attached, NameSocket(name, commands(name, self)))
            except BaseException:
                attached.close()
                raise
        except BaseException:
            os.close(fd)
            raise

    # ---- muenfast.names.Operations

    def add_child(self, parent: str, child: str) -> None:
        with self.lock:
            made = self.family.add_child(parent, child)
            try:
                self.interfaces = self.interfaces | {made.number: self.make(child)}
            except BaseException:
                self.family.del_child(child)
                raise
            os.write(self.wake, b"x")

    def del_child(self, child: str) -> None:
        with self.lock:
            number = self.family.del_child(child).number
            gone = self.interfaces[number]
            gone.name.stop()
            assert self.table.settle(_WAIT)
            self.interfaces = {each: one for each, one in self.interfaces.items() if each != number}
            os.write(self.wake, b"x")
            os.close(gone.fd)
            gone.attached.close()

    def add_mark(self, child: str, mark: int) -> None:
        with self.lock:
            self.family.add_mark(child, mark)

    def del_mark(self, child: str, mark: int) -> None:
        with self.lock:
            self.family.del_mark(child, mark)

    # ---- packets

    def send(self) -> None:
        while True:
            interfaces = self.interfaces
            try:
                ready, _, _ = select.select([self.waker, *(one.fd for one in interfaces.values())], [], [])
            except (OSError, ValueError):   # one was closed meanwhile
                continue
            if self.waker in ready:
                os.read(self.waker, 100)
                continue
            for one in interfaces.values():
                if one.fd in ready:
                    try:
                        data = os.read(one.fd, 1 << 16)
                        self.wire.send(data)
                    except OSError:         # down, closed, or nobody there
                        continue

    def receive(self) -> None:
        while True:
            element = self.wire.recv(1 << 16)
            if not element:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            mark, packet = struct.unpack_from("=I", element)[0], element[8:]
            self.table.enter()
            try:
                os.write(self.interfaces[self.table.get(mark)].fd, (prefix(packet[0], mark) if mark else b"") + packet)
            except OSError:                 # down
                pass
            self.table.leave()


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    name, descriptor, way = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    server = Server(name, socket.socket(fileno=int(descriptor)), Way(way))
    for thread in server.threads:
        thread.start()
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
    for one in server.interfaces.values():
        one.name.close()
        os.close(one.fd)
        one.attached.close()


if __name__ == "__main__":
    main()
