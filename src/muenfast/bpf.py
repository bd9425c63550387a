"""Netfilter marks of a TUN interface's packets, by two small eBPF programs, assembled here and loaded with bpf(2).

Out: read(2) on the TUN device returns net_hdr (mark, length, protocol, qos: docs/protocol.md) and the packet. What is
neither IPv4 nor IPv6 is dropped and counted. The kernel may cut what it calls one packet into several after the program
ran, so that net_hdr.length is what the reader makes it: bytes read less 8. Offsets in a struct virtio_net_hdr count
net_hdr, too (_marks.h: marks_vnet_out).

In: a packet with a mark is written with a prefix of 8 bytes in front (_marks.h; in a copy of an element: where its net_hdr
was); the program takes the prefix off and gives the packet its mark. A packet without mark is written as it is. The
mark travels with its packet, so that neither RPS nor a second writer can mistake it; but taps (tcpdump) see the packet
before the program has run, as they see outgoing ones after it has.

Three ways, of which attach() takes the first that is to be had: TCX, whose links go with their descriptors (Linux 6.6);
CLSACT, filters of a qdisc, which go with the interface or by close(); TAP, a packet socket that sees outgoing packets
with their marks, while what read(2) returns is thrown away. DROPPED and LOST say what each costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import platform
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

from muenfast import netns
from muenfast.errors import MuenfastError, describe

log = logging.getLogger("muenfast")

HEADER = 8  # bytes of net_hdr, and of the prefix

# linux/bpf.h
_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_MAP_CREATE, _PROG_LOAD, _LINK_CREATE = 0, 5, 28
_MAP_ARRAY, _MMAPABLE = 2, 1 << 10
_SCHED_CLS = 3
_TCX_INGRESS, _TCX_EGRESS = 46, 47
_BEFORE = 1 << 3
_LOAD_BYTES, _STORE_BYTES, _CHANGE_PROTO, _CHANGE_HEAD, _ADJUST_ROOM = 26, 9, 31, 43, 50    # helpers
_ADJ_ROOM_MAC, _FIXED_GSO, _NO_CSUM_RESET, _DECAP_L3_IPV4 = 1, 1 << 0, 1 << 5, 1 << 7
_NEXT, _SHOT = -1, 2  # the same for tcx and for a filter with direct action
_LEN, _MARK, _PROTOCOL, _DATA, _DATA_END = 0, 8, 16, 76, 80  # offsets in struct __sk_buff
_LOG_BYTES = 1 << 18

_LOOPBACK, _NO_INTERFACE = 1, 0x7FFFFFFF  # its number in every namespace; that of none
_FIRST, _LAST = 1, 0xFFF0  # preferences of our filters: the first to see what comes in, the last for what goes out

# linux/if_ether.h, linux/pkt_sched.h, asm-generic/socket.h, linux/if_packet.h
_ETH_P_ALL, _ETH_P_IP, _ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_SO_RCVMARK, _SOL_PACKET, _PACKET_VNET_HDR, _PACKET_STATISTICS = 75, 263, 15, 6
_SO_ATTACH_FILTER, _PACKET_OUTGOING, _SKF_AD_PKTTYPE, _SKF_AD_PROTOCOL = 26, 4, 0xFFFFF000 + 4, 0xFFFFF000

# What the programs count, in the order in which it stands in their map.
DROPPED = {
    "not_ip": "outgoing packets that are neither IPv4 nor IPv6",
    "malformed": "outgoing packets whose first bytes are not those of their protocol",
    "no_room": "outgoing packets that the kernel could not make longer",
    "unmarked": "incoming packets whose prefix the kernel could not take off",
}
_NOT_IP, _MALFORMED, _NO_ROOM, _UNMARKED = range(len(DROPPED))


class Way(str, Enum):
    """How marks go between packets and net_hdr."""

    TCX = "tcx"
    CLSACT = "clsact"
    TAP = "tap"


# What one does without in each way, one sentence.
LOST = {
    Way.TCX: "",
    Way.CLSACT: "who takes filters from an interface (`tc filter del`, `tc qdisc del`) takes its marks, too, and its "
                "outgoing packets are dropped from then on.",
    Way.TAP: "incoming packets get no mark (children get theirs all the same), outgoing ones are copied once more, and are "
             "lost, not held back, while the other side is behind.",
}


class VerifierError(MuenfastError):
    """The kernel does not take a program. program: its name; log: all that the verifier wrote."""

    def __init__(self, program: str, log: str, reason: str) -> None:
        self.program, self.log = program, log
        lines = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
        super().__init__(f"the kernel does not take the eBPF program {program}: {reason}"
                         + (f": {lines[-1]}" if lines else ""))


# ---- the assembler

_R0, _R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8, _R9, _FP = range(11)
_BYTE, _HALF, _WORD = 0x10, 0x08, 0x00
_ALU = {"add": 0x07, "or": 0x47, "and": 0x57, "lsh": 0x67, "rsh": 0x77, "mov": 0xB7}
_JUMP = {"always": 0x05, "eq": 0x15, "ne": 0x55, "lt": 0xA5, "above": 0x2D}     # the last one: of two registers


class _Code:
    """Instructions in machine order; jumps to labels are filled in by done()."""

    def __init__(self, counters: int) -> None:
        self._counters = counters   # descriptor of the map
        self._code: list[tuple[int, int, int, int]] = []
        self._labels: dict[str, int] = {}
        self._jumps: dict[int, str] = {}

    def put(self, opcode: int, registers: int, offset: int = 0, value: int = 0) -> None:
        self._code.append((opcode, registers, offset, value))

    def alu(self, what: str, target: int, value: int) -> None:
        self.put(_ALU[what], target, 0, value)

    def move(self, target: int, source: int) -> None:
        self.put(0xBF, target | source << 4)

    def merge(self, target: int, source: int) -> None:
        self.put(0x4F, target | source << 4)

    def load(self, size: int, target: int, source: int, offset: int) -> None:
        self.put(0x61 | size, target | source << 4, offset)

    def store(self, size: int, target: int, offset: int, source: int) -> None:
        self.put(0x63 | size, target | source << 4, offset)

    def jump(self, label: str, when: str = "always", register: int = 0, value: int = 0) -> None:
        self._jumps[len(self._code)] = label
        self.put(_JUMP[when], register, 0, value)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def call(self, helper: int, *arguments: int) -> None:
        """A helper on the packet (kept in R6) with constant arguments; those of `None` are there already."""
        self.move(_R1, _R6)
        for register, value in enumerate(arguments, _R2):
            self.alu("mov", register, value)
        self.put(0x85, 0, 0, helper)

    def bytes_of(self, helper: int, offset: int, stack: int, length: int, *more: int) -> None:
        """Packet bytes from or to the stack."""
        self.move(_R1, _R6)
        self.alu("mov", _R2, offset)
        self.move(_R3, _FP)
        self.alu("add", _R3, stack)
        for register, value in enumerate((length, *more), _R4):
            self.alu("mov", register, value)
        self.put(0x85, 0, 0, helper)

    def first_bytes(self, length: int, missing: str, *loads: tuple[int, int, int]) -> None:
        """Loads (size, register from R5 on, offset) from the packet's first bytes, at most 8: from where they lie, which
        costs nothing, or, where not all of them are in one piece, by way of the stack at -8. To `missing` if there are not
        so many."""
        self.load(_WORD, _R2, _R6, _DATA)
        self.load(_WORD, _R3, _R6, _DATA_END)
        self.move(_R4, _R2)
        self.alu("add", _R4, length)
        self.jump("in pieces", "above", _R4 | _R3 << 4)
        for size, register, offset in loads:
            self.load(size, register, _R2, offset)
        self.jump("loaded")
        self.label("in pieces")
        self.bytes_of(_LOAD_BYTES, 0, -8, length)
        self.jump(missing, "ne", _R0, 0)
        for size, register, offset in loads:
            self.load(size, register, _FP, offset - 8)
        self.label("loaded")

    def drop(self, label: str, counter: int) -> None:
        self.label(label)
        self.put(0x18, _R1 | 2 << 4, 0, self._counters)     # BPF_PSEUDO_MAP_VALUE: its address ...
        self.put(0, 0, 0, counter * 8)                      # ... plus this
        self.alu("mov", _R2, 1)
        self.put(0xDB, _R1 | _R2 << 4)                      # atomic add
        self.end(_SHOT)

    def end(self, verdict: int) -> None:
        self.alu("mov", _R0, verdict)
        self.put(0x95, 0)

    def done(self) -> bytes:
        for at, label in self._jumps.items():
            opcode, registers, _, value = self._code[at]
            self._code[at] = (opcode, registers, self._labels[label] - at - 1, value)
        return b"".join(struct.pack("=BBhi", *each) for each in self._code)


def egress(counters: int) -> bytes:
    """net_hdr in front of a packet. R6 packet, R7 its protocol's first nibble, R8 protocol number, R9 qos.

    Longer than about 16 KiB (SKB_MAX_ALLOC) a packet may not become by bpf_skb_change_head, unless it is one that the
    kernel is to cut. It is made 12 bytes shorter then and, as if IPv4 became IPv6, 20 bytes longer, for which there is no
    such limit; for IPv6 that takes a kernel with BPF_F_ADJ_ROOM_DECAP_L3_IPV4 (Linux 6.5). The stack has net_hdr at -28 and
    those 12 bytes behind it.
    """
    code = _Code(counters)
    code.move(_R6, _R1)
    code.first_bytes(2, "not ip", (_BYTE, _R7, 0), (_BYTE, _R9, 1))
    code.load(_WORD, _R2, _R6, _PROTOCOL)
    code.load(_WORD, _R3, _R6, _LEN)
    code.jump("ipv6", "eq", _R2, socket.htons(_ETH_P_IPV6))
    code.jump("not ip", "ne", _R2, socket.htons(_ETH_P_IP))
    code.alu("rsh", _R7, 4)
    code.jump("malformed", "ne", _R7, 4)
    code.jump("malformed", "lt", _R3, 20)
    code.alu("mov", _R8, 4)
    code.alu("rsh", _R9, 2)
    code.jump("header")
    code.label("ipv6")
    code.jump("malformed", "lt", _R3, 40)
    code.alu("rsh", _R9, 6)
    code.move(_R2, _R7)
    code.alu("and", _R2, 15)
    code.alu("lsh", _R2, 2)
    code.merge(_R9, _R2)
    code.alu("rsh", _R7, 4)
    code.jump("malformed", "ne", _R7, 6)
    code.alu("mov", _R8, 41)
    code.label("header")
    code.load(_WORD, _R2, _R6, _MARK)
    code.store(_WORD, _FP, -28, _R2)
    code.store(_HALF, _FP, -24, _R3)
    code.store(_BYTE, _FP, -22, _R8)
    code.store(_BYTE, _FP, -21, _R9)
    code.call(_CHANGE_HEAD, HEADER, 0)
    code.jump("long", "ne", _R0, 0)
    code.bytes_of(_STORE_BYTES, 0, -28, HEADER, 0)
    code.jump("no room", "ne", _R0, 0)
    code.end(_NEXT)
    code.label("long")
    code.bytes_of(_LOAD_BYTES, 0, -20, 12)
    code.jump("no room", "ne", _R0, 0)
    code.jump("long ipv6", "eq", _R7, 6)
    code.call(_ADJUST_ROOM, -12, _ADJ_ROOM_MAC, _NO_CSUM_RESET)
    code.jump("longer")
    code.label("long ipv6")
    code.call(_ADJUST_ROOM, -12, _ADJ_ROOM_MAC, _NO_CSUM_RESET | _DECAP_L3_IPV4)
    code.label("longer")
    code.jump("no room", "ne", _R0, 0)
    code.call(_CHANGE_PROTO, socket.htons(_ETH_P_IPV6), 0)
    code.jump("no room", "ne", _R0, 0)
    code.bytes_of(_STORE_BYTES, 0, -28, HEADER + 12, 0)
    code.jump("no room", "ne", _R0, 0)
    code.end(_NEXT)
    code.drop("not ip", _NOT_IP)
    code.drop("malformed", _MALFORMED)
    code.drop("no room", _NO_ROOM)
    return code.done()


def ingress(counters: int) -> bytes:
    """The mark out of a prefix, which _marks.h describes: 0x40 or 0x60, 0, mark's lower half, 0xffff, upper half."""
    code = _Code(counters)
    code.move(_R6, _R1)
    code.first_bytes(HEADER, "plain", (_HALF, _R7, 0), (_HALF, _R8, 2), (_HALF, _R9, 4), (_HALF, _R5, 6))
    code.alu("and", _R7, struct.unpack("=H", b"\xdf\xff")[0])
    code.jump("plain", "ne", _R7, struct.unpack("=H", b"\x40\0")[0])
    code.jump("plain", "ne", _R9, 0xFFFF)
    code.alu("lsh", _R5, 16)
    code.merge(_R8, _R5)
    code.store(_WORD, _R6, _MARK, _R8)
    code.call(_ADJUST_ROOM, -HEADER, _ADJ_ROOM_MAC, _FIXED_GSO | _NO_CSUM_RESET)
    code.jump("unmarked", "ne", _R0, 0)
    code.label("plain")
    code.end(_NEXT)
    code.drop("unmarked", _UNMARKED)
    return code.done()


# ---- bpf(2)

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytes) -> int:
    """bpf(2); raises OSError."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) has no known number on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(ctypes.c_long(number), ctypes.c_long(command), buffer, ctypes.c_long(len(attributes)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf: {os.strerror(number)}")
    return result


def _map(name: bytes) -> int:
    """A map of one value, the counters, that can be mapped into memory; its descriptor."""
    return _bpf(_MAP_CREATE, struct.pack("=5I8x16s", _MAP_ARRAY, 4, 8 * len(DROPPED), 1, _MMAPABLE, name))


def load(name: str, code: bytes) -> int:
    """Loads a program of type sched_cls; its descriptor. Raises VerifierError, with the whole log, or OSError."""
    instructions = ctypes.create_string_buffer(code, len(code))
    text = ctypes.create_string_buffer(_LOG_BYTES)
    license_ = ctypes.create_string_buffer(b"Apache-2.0")

    def attempt(level: int) -> int:
        return _bpf(_PROG_LOAD, struct.pack(
            "=2I2Q2IQ2I16s", _SCHED_CLS, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(license_),
            level, _LOG_BYTES if level else 0, ctypes.addressof(text) if level else 0, 0, 0, name.encode()[:15]))

    try:
        return attempt(0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
    try:
        return attempt(1)
    except OSError as error:
        found = text.value.decode(errors="replace")
        if not found:
            raise
        log.info("%s: the verifier's log:\n%s", name, found.rstrip())
        raise VerifierError(name, found, os.strerror(error.errno or 0)) from error


def _link(program: int, interface: int, kind: int, flags: int) -> int:
    return _bpf(_LINK_CREATE, struct.pack("=4IIIQ", program, interface, kind, flags, 0, 0, 0))


# ---- the ways


class Attached:
    """The marks of one interface, until close(). way: which of the three.

    tap: the packet socket of Way.TAP, or None. recvmsg(2) on it, which does not block, gives a packet and its mark
    (SO_MARK), and once ENETDOWN after the interface went down.
    """

    def __init__(self, way: Way, stack: contextlib.ExitStack, counters: mmap.mmap | None, tap: socket.socket | None = None,
                 filters: contextlib.ExitStack | None = None, vnet: bool = False) -> None:
        self.way, self.tap = way, tap
        self._stack, self._counters, self._vnet = stack, counters, vnet
        self._filters = filters or contextlib.ExitStack()   # what is to be taken from the interface itself
        self._earlier = dict.fromkeys((*DROPPED, "tap"), 0)     # counted before follow(), or close()
        self._closed = False
        self._books = threading.Lock()

    @property
    def incoming(self) -> bool:
        """Whether a prefix on a packet that is written becomes its mark; where not, none may be written."""
        return self.way is not Way.TAP

    def dropped(self) -> dict[str, int]:
        """Packets by DROPPED, and `tap`: those that the packet socket had no room for. From attach() to close(), and as of
        then afterwards."""
        with self._books:
            return dict(self._earlier) if self._closed else self._dropped()

    def _dropped(self) -> dict[str, int]:
        if self.tap is not None:
            _, lost = struct.unpack("=2I", self.tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))  # since last asked
            self._earlier["tap"] += lost
        values = struct.unpack_from(f"={len(DROPPED)}Q", self._counters) if self._counters else (0,) * len(DROPPED)
        return {name: self._earlier[name] + value for name, value in zip((*DROPPED, "tap"), (*values, 0), strict=True)}

    def follow(self, interface: int) -> None:
        """After the interface went to the calling thread's network namespace, where that is its number: the same there. It
        has to be down still, or packets are lost; `tap` has the same descriptor. Raises OSError, VerifierError."""
        if self.way is Way.TCX:     # its links went along
            return
        new = _ATTACH[self.way](interface, self._vnet)
        with self._books:
            self._earlier = self._dropped()
            if self.tap is not None and new.tap is not None:
                os.dup2(new.tap.fileno(), self.tap.fileno(), inheritable=False)
                new.close()
                return
            old = self._stack
            self._filters.pop_all()     # they are gone; by now another interface may have that number there
            self._stack, self._filters, self._counters = new._stack, new._filters, new._counters
        old.close()

    def close(self) -> None:
        """Detaches; may be called twice. The interface may have gone before."""
        with self._books:
            if self._closed:
                return
            self._earlier, self._closed = self._dropped(), True
        self._filters.close()
        self._stack.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def attach(interface: int, *, ways: Sequence[Way] = tuple(Way), vnet: bool = False) -> Attached:
    """Marks for the interface of that number in the calling thread's network namespace, by the first of `ways` that is to
    be had. vnet: a tap is to give struct virtio_net_hdr, too.

    An interface must be down until this has returned, and go down or away before close(): read(2) has net_hdr in front
    from here on, and no longer. Raises what the last of `ways` met: OSError, VerifierError.
    """
    met: list[tuple[Way, Exception]] = []
    for way in ways:
        try:
            attached = _ATTACH[way](interface, vnet)
        except (OSError, VerifierError) as error:
            met.append((way, error))
            continue
        for before, problem in met:
            log.info("interface %d: no %s: %s", interface, before.value, describe(problem))
        return attached
    raise met[-1][1]


def problems() -> dict[Way, str | None]:
    """The ways up to the first that this process can have, with why not, and None for that one. Tried in a network
    namespace of its own, or, where none may be made, as far as that goes without an interface."""
    try:
        return netns.inside_new(lambda: _problems(_LOOPBACK))
    except PermissionError:
        return _problems(_NO_INTERFACE)


def _problems(interface: int) -> dict[Way, str | None]:
    found: dict[Way, str | None] = {}
    for way in Way:
        try:
            attach(interface, ways=(way,)).close()
        except (OSError, VerifierError) as error:
            there = isinstance(error, OSError) and error.errno in (errno.ENODEV, errno.ENXIO) and interface == _NO_INTERFACE
            found[way] = None if there else describe(error)
        else:
            found[way] = None
        if found[way] is None:
            break
    return found


@contextlib.contextmanager
def _programs() -> Iterator[tuple[contextlib.ExitStack, int, int, mmap.mmap]]:
    """A stack that closes what the way keeps, unless it fails; descriptors of egress and ingress, closed at the end, for
    what they are attached to holds them; the counters."""
    with contextlib.ExitStack() as kept, contextlib.ExitStack() as here:
        table = _map(b"mf_dropped")
        here.callback(os.close, table)
        out, into = (_held(here, load(f"mf_{make.__name__}", make(table))) for make in (egress, ingress))
        counters = mmap.mmap(table, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        kept.callback(counters.close)
        yield kept, out, into, counters


def _held(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _attach_tcx(interface: int, vnet: bool) -> Attached:
    with _programs() as (stack, out, into, counters):
        # Ours is the last to see what goes out and the first to see what comes in: others see plain packets.
        try:
            _held(stack, _link(out, interface, _TCX_EGRESS, 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise OSError(errno.EINVAL, "the kernel has no tcx, which came with Linux 6.6 (CONFIG_NET_XGRESS)") from error
        _held(stack, _link(into, interface, _TCX_INGRESS, _BEFORE))
        return Attached(Way.TCX, stack.pop_all(), counters)


class _Netlink:
    """Traffic control by netlink, in the calling thread's namespace; errors of the kernel are OSError."""

    def __init__(self) -> None:
        from pyroute2 import IPRoute  # type: ignore[import-untyped]
        from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

        self._error, self._netlink = NetlinkError, IPRoute()

    def __enter__(self) -> _Netlink:
        return self

    def __exit__(self, *exc: object) -> None:
        self._netlink.close()

    def tc(self, *what: Any, **fields: Any) -> None:
        with self._os_errors(f"tc {' '.join(map(str, what))}"):
            self._netlink.tc(*what, **fields)

    def has_filters(self, interface: int, parent: int) -> bool:
        with self._os_errors("tc filters"):
            return any(True for _ in self._netlink.get_filters(interface, parent=parent))

    @contextlib.contextmanager
    def _os_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise OSError(error.code, f"netlink: {what}: {os.strerror(error.code)}") from error


def _attach_clsact(interface: int, vnet: bool) -> Attached:
    with _programs() as (stack, out, into, counters), contextlib.ExitStack() as filters, _Netlink() as netlink:
        namespace = _held(stack, netns.current())
        made = True
        try:
            netlink.tc("add", "clsact", interface)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            made = False
        filters.callback(netns.inside, namespace, lambda: _detach_clsact(interface, made))
        for parent, priority, program, name in ((_EGRESS, _LAST, out, "mf_egress"), (_INGRESS, _FIRST, into, "mf_ingress")):
            netlink.tc("add-filter", "bpf", interface, 1, fd=program, name=name, parent=parent, prio=priority,
                       protocol=_ETH_P_ALL, classid=1, direct_action=True)
        return Attached(Way.CLSACT, stack.pop_all(), counters, filters=filters.pop_all(), vnet=vnet)


def _detach_clsact(interface: int, made: bool) -> None:
    """Takes our filters away, and the qdisc if we made it and nobody else has filters there. Gone already: so be it."""
    with _Netlink() as netlink:
        for parent, priority in ((_EGRESS, _LAST), (_INGRESS, _FIRST)):
            with _gone():
                netlink.tc("del-filter", "bpf", interface, 1, parent=parent, prio=priority, protocol=_ETH_P_ALL)
        with _gone():
            if made and not netlink.has_filters(interface, _EGRESS) and not netlink.has_filters(interface, _INGRESS):
                netlink.tc("del", "clsact", interface)


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """No error where the filter, the interface or the qdisc is not there any more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
            raise


def _attach_tap(interface: int, vnet: bool) -> Attached:
    with contextlib.ExitStack() as stack:
        tap = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0))
        tap.setblocking(False)
        tap.setsockopt(socket.SOL_SOCKET, _SO_RCVMARK, 1)
        if vnet:
            tap.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        # What comes in is seen by it, too: ld [pkttype]; jeq #PACKET_OUTGOING, 0, 1; ret #-1; ret #0
        only = ctypes.create_string_buffer(struct.pack(
            "=HBBIHBBIHBBIHBBI", 0x28, 0, 0, _SKF_AD_PKTTYPE, 0x15, 0, 1, _PACKET_OUTGOING, 0x06, 0, 0, 0xFFFFFFFF,
            0x06, 0, 0, 0))
        tap.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(only)))
        tap.bind((socket.if_indextoname(interface), _ETH_P_ALL))
        tap.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # that the interface is down is no news
        return Attached(Way.TAP, stack.pop_all(), None, tap, vnet=vnet)


_ATTACH: dict[Way, Callable[[int, bool], Attached]] = {
    Way.TCX: _attach_tcx, Way.CLSACT: _attach_clsact, Way.TAP: _attach_tap}
