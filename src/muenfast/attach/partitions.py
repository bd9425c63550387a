"""Partitions of an attached disk: /dev/muendiskaN beside /dev/muendiska, for as long as the disk is attached.

The kernel has a partition as a device of its own once it is told of it: by its own parser, where it has one, by tools
(BLKPG, linux/blkpg.h), or else by us. The nodes follow the kernel. Where it has no parser for the table, its partitions
follow the table, too: whenever the table's blocks were written (the front end tells) or the kernel's partitions changed
(a uevent tells), the table is read again through the device, and the differences are applied. A partition that is open
cannot be deleted; it stays until it is free.

Who may wait for whom: reading the table waits for those who answer the disk's I/O. That is done on a thread of its own,
which stop() waits for with a limit only; the abort of the front end's connection frees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from muenfast import partition
from muenfast.attach import block
from muenfast.errors import PeerLog, UsageError

log = logging.getLogger("muenfast")

BLKRRPART = 0x125F              # uapi/linux/fs.h
BLKPG = 0x1269                  # uapi/linux/blkpg.h, with the next four
ADD, DELETE, RESIZE = 1, 2, 3
_ARGUMENT = struct.Struct("@iiiP")          # struct blkpg_ioctl_arg: op, flags, datalen, data
_PARTITION = struct.Struct("@qqi64s64s4x")  # struct blkpg_partition: start, length, pno, devname, volname
_NETLINK_KOBJECT_UEVENT = 15    # uapi/linux/netlink.h
_KERNEL_EVENTS = 1              # its multicast group, as bits
_BLOCK = 4096                   # largest unit of a table

_QUIET, _MOST_NOISE = 0.03, 0.5     # seconds: a tool writes a table in several steps; it is read once they are over
_RETRY = 0.5                        # seconds between tries while something is in use
_COMPLAINTS = 4                     # most of one look in one line
_MOST_READS = 3                     # a table that moves while it is read is told to have been written
_LOOK = 2.0                         # seconds between looks where there are no uevents to be had


@dataclass(frozen=True, slots=True)
class Device:
    """A partition that the kernel has. start, size: bytes. number: of its device."""

    start: int
    size: int
    number: int


def of_kernel(disk: str) -> dict[int, Device]:
    """The partitions of a disk (loop3, nbd0) that the kernel has, by their number."""
    found: dict[int, Device] = {}
    for place in Path("/sys/block", disk).glob(f"{disk}p*"):
        try:
            major, _, minor = (place / "dev").read_text().strip().partition(":")
            found[int((place / "partition").read_text())] = Device(
                int((place / "start").read_text()) * 512, int((place / "size").read_text()) * 512,
                os.makedev(int(major), int(minor)))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):     # deleted while we looked
                raise
    return found


def _blkpg(fd: int, operation: int, number: int, start: int = 0, size: int = 0) -> None:
    data = ctypes.create_string_buffer(_PARTITION.pack(start, size, number, b"", b""), _PARTITION.size)
    fcntl.ioctl(fd, BLKPG, _ARGUMENT.pack(operation, 0, _PARTITION.size, ctypes.addressof(data)))


def delete_all(fd: int, disk: str) -> None:
    """Has the kernel forget a disk's partitions, those that are in use left out: some drivers' devices keep them without
    a disk. fd: of the disk. Raises OSError."""
    for number in of_kernel(disk):
        try:
            _blkpg(fd, DELETE, number)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENXIO):
                raise


class Acts:
    """What of a disk's partitions takes privileges, done by this process; broker/disks.py has the same for one without.
    name, disk, path: as Partitions has them. All raise OSError."""

    def __init__(self, name: str, disk: str, path: str) -> None:
        self.name, self.disk, self.path = name, disk, path

    def open(self) -> int:
        """The disk, to be read."""
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def open_part(self, number: int) -> int:
        """A partition, by its node."""
        return os.open(f"/dev/{self.name}{number}", os.O_RDONLY | os.O_CLOEXEC)

    def reread(self, fd: int) -> None:
        """Has the kernel parse the table of the disk that is open there."""
        fcntl.ioctl(fd, BLKRRPART)

    def change(self, fd: int, operation: int, number: int, start: int, size: int) -> None:
        """ADD, DELETE or RESIZE of a partition of that disk. start, size: bytes."""
        _blkpg(fd, operation, number, start, size)

    def make_node(self, number: int, device: int) -> bool:
        """The node of a partition, which has that device number. False: somebody else's is there, and stays."""
        path = f"/dev/{self.name}{number}"
        for _ in range(2):
            try:
                os.mknod(path, stat.S_IFBLK | 0o600, device)
                return True
            except FileExistsError:
                if not block.is_left(path):
                    break
                os.unlink(path)
        return False

    def remove_node(self, number: int, device: int) -> None:
        """Nothing where it is another's, or gone."""
        block.remove_node(f"/dev/{self.name}{number}", device)

    def uevents(self) -> socket.socket:
        """Where the kernel tells of block devices; non-blocking."""
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                             _NETLINK_KOBJECT_UEVENT)
        try:
            made.bind((0, _KERNEL_EVENTS))
        except BaseException:
            made.close()
            raise
        return made


class Partitions:
    """The partitions and nodes of one disk, from start() to stop().

    name: of the disk's node, to which the numbers are appended. disk: what the kernel calls it; path: a node of it. block:
    bytes of its sectors. watch: told the (first block, end) of the blocks whose writes matter; event: readable once one was
    written. Without them only the kernel's uevents tell of a table that changed. acts: what takes privileges, None: this
    process does it.
    """

    def __init__(self, name: str, disk: str, path: str, *, block: int,
                 watch: Callable[[list[tuple[int, int]]], None] = lambda _: None, event: int = -1,
                 acts: Acts | None = None) -> None:
        self._acts = Acts(name, disk, path) if acts is None else acts
        self.name, self.disk, self.path, self.block = name, disk, path, block
        self._watch, self._given, self._event = watch, event, -1
        self._spans: list[tuple[int, int]] = []     # where the table stood at the last look
        self._nodes: dict[int, int] = {}        # number of the partition: of the device that we made a node for
        self._by_kernel: dict[str, bool] = {}   # scheme: whether the kernel parses it by itself
        self._said: dict[str, None] = {}        # complaints of the look before this one
        self._now: dict[str, None] = {}         # and of this one
        self._peer = PeerLog(f"/dev/{name}")
        self._stopping = False
        self._wake = (-1, -1)
        self._uevents: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Makes what the table says now, then follows it. What cannot be read or made is only said, and tried again.
        Raises OSError."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop, 0.0)
            self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            if self._given >= 0:
                self._event = os.dup(self._given)   # open for as long as the thread may live
            self._listen()
            busy = self._try()
            thread = threading.Thread(target=self._follow, args=(busy,), name=f"partitions-{self.name}", daemon=True)
            thread.start()
            self._thread = thread
            undo.pop_all()

    def stop(self, timeout: float) -> bool:
        """Ends the thread and removes the nodes; the partitions go with the device. False: the thread waits for
        the disk's I/O and needs another call, after an abort. Idempotent."""
        self._stopping = True
        if self._wake[1] >= 0:
            os.write(self._wake[1], b"s")
        alive = False
        if self._thread is not None:
            self._thread.join(timeout)
            alive = self._thread.is_alive()
        for number in list(self._nodes):
            self._remove(number)
        if alive:
            return False
        self._thread = None
        if self._uevents is not None:
            self._uevents.close()
            self._uevents = None
        for fd in (*self._wake, self._event):
            if fd >= 0:
                os.close(fd)
        self._wake, self._event = (-1, -1), -1
        return True

    def look(self) -> None:
        """Has the thread look again, soon: the disk has another size, say."""
        if not self._stopping and self._wake[1] >= 0:
            os.write(self._wake[1], b"l")

    def open_all(self) -> list[int]:
        """Descriptors of all partitions, by our nodes, for whoever has to flush them."""
        found = []
        for number, device in list(self._nodes.items()):
            with contextlib.suppress(OSError):      # it has gone, or its node has
                fd = self._acts.open_part(number)
                if os.fstat(fd).st_rdev == device:
                    found.append(fd)
                else:
                    os.close(fd)
        return found

    # ---- the thread

    def _listen(self) -> None:
        try:
            self._uevents = self._acts.uevents()
        except OSError as error:    # a namespace without them: we look now and then
            log.info("/dev/%s: no uevents (%s)", self.name, error.strerror)

    def _follow(self, busy: bool) -> None:
        poller = select.poll()
        poller.register(self._wake[0], select.POLLIN)
        if self._event >= 0:
            poller.register(self._event, select.POLLIN)
        if self._uevents is not None:
            poller.register(self._uevents, select.POLLIN)
        while not self._stopping:
            wait = _RETRY if busy else None if self._uevents is not None else _LOOK
            if self._news(poller, wait):
                end = time.monotonic() + _MOST_NOISE
                while not self._stopping and time.monotonic() < end and self._news(poller, _QUIET):
                    continue
            elif not busy and self._uevents is not None:
                continue    # other disks' uevents
            if not self._stopping:
                busy = self._try()

    def _news(self, poller: select.poll, wait: float | None) -> bool:
        """Waits; whether something happened to this disk."""
        news = False
        for fd, _ in poller.poll(None if wait is None else wait * 1000):
            if self._uevents is not None and fd == self._uevents.fileno():
                news |= self._drain()
            else:
                news = True
                if not self._stopping:      # what stop() wrote stays: there is nothing more to wait for
                    with contextlib.suppress(BlockingIOError):
                        os.read(fd, 8)
        return news

    def _drain(self) -> bool:
        """Reads all uevents; whether one was about this disk."""
        ours, pattern = False, re.compile(rb"[a-z]+@.*/block/%s(/|$)" % self.disk.encode())
        assert self._uevents is not None
        while True:
            try:
                ours |= pattern.match(self._uevents.recv(8192).partition(b"\0")[0]) is not None
            except BlockingIOError:
                return ours
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                ours = True     # some were lost

    def _say(self, text: str) -> None:
        """Notes a complaint of this look."""
        self._now.setdefault(text)

    def _report(self) -> None:
        """Logs, in one line, what this look complained of and the last one did not: the disk's contents are its peer's.
        """
        new = [text for text in self._now if text not in self._said]
        if new:
            more = f"; and {len(new) - _COMPLAINTS} more" if len(new) > _COMPLAINTS else ""
            self._peer.warning("%s%s", "; ".join(new[:_COMPLAINTS]), more)

    # ---- one look

    def _try(self) -> bool:
        """_look(), with its complaints; True where it failed."""
        self._said, self._now = self._now, {}
        try:
            return self._look()
        except Exception as error:      # nobody else would hear of it, and the disk goes on
            if not self._stopping:
                self._say(f"its partitions cannot be looked after: {error}")
            return True
        finally:
            self._report()

    def _look(self) -> bool:
        """Table to kernel, kernel to nodes. True: something is in use, and it is worth trying again."""
        fd = self._acts.open()
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            table, usable = self._read(fd)
            if self._stopping:
                return False
            busy = usable and self._apply(fd, table)
        finally:
            os.close(fd)
        self._follow_nodes()
        return busy

    def _read(self, fd: int) -> tuple[partition.Table | None, bool]:
        """The table (None: there is none), and whether it can be used at all."""
        size = os.lseek(fd, 0, os.SEEK_END)
        block = self.block
        sectors = (block, *(each for each in partition.SECTOR_SIZES if each != block))
        usual = [(0, 2 * _BLOCK), (max(0, size - _BLOCK), size)]    # where a table may appear, in either unit
        table, usable = None, True
        for _ in range(_MOST_READS):
            # Watched before it is read: what is written from here on is told.
            self._watch([(start // block, -(-end // block)) for start, end in usual + self._spans])
            try:
                table = partition.read_table(lambda offset, length: _pread(fd, length, offset), size, sectors)
            except UsageError as error:
                self._say(f"{error}; its partitions stay as they are")
                usable = False
            spans = table.spans if table else []
            if set(spans) <= set(self._spans):
                break
            self._spans = spans
        for note in table.notes if table else ():
            self._say(note)
        return table, usable

    def _wanted(self, table: partition.Table | None) -> dict[int, tuple[int, int]]:
        """(start, size) by number, of those that the kernel can have."""
        found: dict[int, tuple[int, int]] = {}
        if table is None:
            return found
        for number in sorted({*table.partitions, *table.faults} - table.containers):
            try:
                part = partition.find(table, number)
            except UsageError as error:
                self._say(str(error))
                continue
            size = part.size // self.block * self.block
            if part.start % self.block or not size:
                self._say(f"partition {number} does not begin at one of the disk's blocks of {self.block} bytes: it is "
                          f"left out; the server can export it by itself, as #{number}")
                continue
            found[number] = (part.start, size)
        return found

    def _apply(self, fd: int, table: partition.Table | None) -> bool:
        wanted = self._wanted(table)
        scheme = table.scheme if table else ""
        if wanted and scheme not in self._by_kernel:
            seen = []
            try:
                # A kernel with a parser has partitions then, the same ones each time. Whoever wrote the table may add some
                # by himself right behind that, but each of them once.
                for _ in range(2):
                    self._acts.reread(fd)
                    seen.append({(number, one.start, one.size) for number, one in of_kernel(self.disk).items()})
            except OSError as error:
                if error.errno == errno.EBUSY:
                    return True
                if error.errno not in (errno.EINVAL, errno.ENOTTY):
                    raise
                seen = []
            self._by_kernel[scheme] = len(seen) == 2 and bool(seen[0]) and seen[0] == seen[1]
        if self._by_kernel.get(scheme, any(self._by_kernel.values())):
            return False
        return self._change(fd, wanted)

    def _change(self, fd: int, wanted: dict[int, tuple[int, int]]) -> bool:
        """Makes the kernel's partitions those; deleting comes first, and shrinking before growing, to make room."""
        has = of_kernel(self.disk)
        busy = False
        steps: list[tuple[int, int, int, int]] = []
        for number, device in has.items():
            start, size = wanted.get(number, (-1, 0))
            if start != device.start:
                steps.append((DELETE, number, 0, 0))
            elif size != device.size:
                steps.append((RESIZE, number, start, size))
        steps.sort(key=lambda step: (step[0], step[0] == RESIZE and step[3] > has[step[1]].size))
        steps += [(ADD, number, *wanted[number]) for number in sorted(wanted)
                  if number not in has or has[number].start != wanted[number][0]]
        for operation, number, start, size in steps:
            if self._stopping:
                return False
            try:
                self._acts.change(fd, operation, number, start, size)
                if operation == DELETE:     # at once: the number of its device may soon be another partition's
                    self._remove(number)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    self._say(f"partition {number} or one that it overlaps is in use: it stays as it is until it is "
                              "free")
                    busy = True
                elif error.errno != errno.ENXIO:    # deleted by somebody else meanwhile
                    self._say(f"partition {number} is refused: {error.strerror}")
        return busy

    def _follow_nodes(self) -> None:
        wanted = {number: device.number for number, device in of_kernel(self.disk).items()}
        for number in [number for number, device in self._nodes.items()
                       if not wanted.get(number) == device == block.number_of(f"/dev/{self.name}{number}")]:
            self._remove(number)    # or what is left of it in our books: somebody may have removed a node
        for number, device in wanted.items():
            if number not in self._nodes and not self._stopping:
                self._make(number, device)

    def _make(self, number: int, device: int) -> None:
        if self._acts.make_node(number, device):
            self._nodes[number] = device
        else:
            self._say(f"/dev/{self.name}{number} is somebody else's and stays")

    def _remove(self, number: int) -> None:
        device = self._nodes.pop(number, None)
        if device is not None:
            self._acts.remove_node(number, device)


def _pread(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise OSError(errno.EIO, "the disk ended while its table was read")
    return data
