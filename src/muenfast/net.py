"""Network interfaces over channels: several in one process, set up all or none, left without trace.

An interface is a TUN or TAP device, a channel out and a channel in; one of the two may be missing. Each direction has a
thread of its own, without the GIL.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from muenfast import params, pathmtu, shm, tuntap
from muenfast._marks import MarkTable
from muenfast._net import LEAST_MTU, MOST_MTU, Ports, Receiver, Sender, element_size
from muenfast._ring import Watch, layout
from muenfast.bpf import Way
from muenfast.channel import NETWORK_PROTOCOL, End, network_region_size, wanted
from muenfast.connection import CHECKSUM_MODES, MOST_POLL, PATIENCE, blame, place
from muenfast.control import Command
from muenfast.cpus import Cpus, pin
from muenfast.errors import BrokenChannelError, ClaimError, Offences, PeerError, PeerLog, UsageError
from muenfast.lookout import LEAST, UNTOLD, Pace, watching
from muenfast.marks import LEAST_MARKS
from muenfast.ports import Children, Makers, Port
from muenfast.threads import spawn

__all__ = ["MOST_INTERFACES", "InterfaceConfig", "Interfaces", "interfaces_from_lists"]

log = logging.getLogger("muenfast")

MOST_INTERFACES = 32  # the module's limit
DEFAULT_MTU, DEFAULT_PROTOCOL = 1500, NETWORK_PROTOCOL
DEFAULT_FLAGS = "net_hdr"
CARRIERS = ("peer", "up")
# How marks go between packets and net_hdr: what is asked for, and the ways that are tried for it.
MARKS: dict[str, tuple[Way, ...]] = {"auto": tuple(Way), **{way.value: (way,) for way in Way}, "none": ()}
_FLAGS = ("net_hdr", "eth_dev")
_HEADER: int = layout()["header_size"]
_IPV6_MTU = 1280    # RFC 8200


@dataclass(frozen=True, slots=True)
class Options:
    """What the lists are called where the user wrote them; only messages use it."""

    name: str = "--name"
    inp: str = "--in"
    out: str = "--out"
    reader_protocol: str = "--reader-protocol"
    writer_protocol: str = "--writer-protocol"
    mtu: str = "--mtu"
    pmtu: str = "--pmtu"
    flags: str = "--flags"
    poll: str = "--poll"
    netns: str = "--netns"
    size: str = "--size"
    mac: str = "--mac"
    addr: str = "--addr"
    carrier: str = "--carrier"
    marks: str = "--marks"
    checksum: str = "--checksum"


_IN_PYTHON = Options("name", "inp", "out", "reader_protocol", "writer_protocol", "mtu", "pmtu", "flags", "poll", "netns",
                     "size", "mac", "addr", "carrier", "marks", "checksum")


@dataclass(frozen=True, slots=True)
class InterfaceConfig:
    """One interface, entry `index` of the lists.

    inp, out: channels; one of them may be None. framing: one of _net.FRAMINGS. mtu: bytes. netns: as
    netns.named() takes it. poll: microseconds between looks at `inp` where its writer does not ring, None:
    adaptive. bells: False: strict one-way, nothing flows back. size: bytes of channels that are made, None: by the mtu.
    carrier: one of CARRIERS. mac, addresses, up: set once the interface is made. pmtu: the region of path MTUs.
    offload: whether the device gives and takes super-packets, of net_hdr only. marks: one of MARKS. permits: as the regions
    inp, out and pmtu have to be; then none of them is made. patience: rules that the peer may break in a second before it
    is quarantined, 0: any number. checksum: of each element: "off", "auto": where the reader takes them, "require": in both
    directions.
    """

    name: str
    inp: shm.Locator | None
    out: shm.Locator | None
    index: int = 0
    reader_protocol: int = DEFAULT_PROTOCOL
    writer_protocol: int = DEFAULT_PROTOCOL
    mtu: int = DEFAULT_MTU
    framing: str = DEFAULT_FLAGS
    netns: str | None = None
    poll: int | None = None
    bells: bool = True
    size: int | None = None
    carrier: str = "peer"
    mac: str | None = None
    addresses: tuple[str, ...] = ()
    up: bool = False
    options: Options = Options()
    pmtu: shm.Locator | None = None
    offload: bool = True
    marks: str = "auto"
    permits: tuple[shm.Permit | None, shm.Permit | None, shm.Permit | None] = (None, None, None)
    patience: int = PATIENCE
    checksum: str = "off"

    @property
    def unseen(self) -> bool:
        """Whether it only receives, strictly one-way: then it leaves no trace that its peer could see."""
        return self.out is None and not self.bells

    @property
    def element_size(self) -> int:
        """Bytes of an element, the same in both channels."""
        return element_size(self.framing, self.mtu)

    @property
    def region_size(self) -> int:
        """Bytes of a channel that is made."""
        if self.size is not None:
            return self.size
        return network_region_size(self.element_size)

    def wanted(self) -> Iterator[shm.Wanted]:
        """What an interface makes where it is missing, for shm.made_ahead."""
        for locator, permit, writes in ((self.inp, self.permits[0], False), (self.out, self.permits[1], True)):
            if locator is not None:
                yield from wanted(locator, writes=writes, create=self.region_size, bell=self.bells, permit=permit)


# ------------------------------------------------------------------ from lists

def framing_of(text: str, option: str, index: int) -> str:
    """What flags, joined by +, come to: none is raw, and net_hdr wins. Exact names only. Raises UsageError."""
    if not text:
        return "raw"
    given = text.split("+")
    for flag in given:
        if flag not in _FLAGS:
            raise UsageError(f"Invalid flag name found in '{text}': the flags are {' and '.join(_FLAGS)}, joined by +; an "
                             "empty entry is raw", option=option, index=index, value=flag)
    return "net_hdr" if "net_hdr" in given else "eth_dev"


def interfaces_from_lists(name: str, *, inp: str | None = None, out: str | None = None, peer: bool = False,
                          reader_protocol: str | None = None, writer_protocol: str | None = None, mtu: str | None = None,
                          pmtu: str | None = None, flags: str | None = None, poll: int | None = None,
                          netns: str | None = None, size: str | None = None, bells: bool = True,
                          carrier: str | None = None, mac: str | None = None, addr: str | None = None, up: bool = False,
                          offload: bool = True, marks: str = "auto", patience: int = PATIENCE, checksum: str = "off",
                          module: bool = False,
                          options: Options | None = None) -> list[InterfaceConfig]:
    """Pairs comma lists by position; nothing is opened.

    inp, out: channels, an empty entry is none; default NAME_in and NAME_out, the other way round for the peer. Of the
    others an empty entry is the default, of flags none: raw; one entry alone is for all of carrier and netns. patience: as
    InterfaceConfig has it. module:
    lists mean what they mean to the kernel module: they may end early, and there are no default channels, protocols or
    flags.

    Raises UsageError naming option, entry, value and rule.
    """
    called = options or _IN_PYTHON
    names = params.split(called.name, name)
    if len(names) > MOST_INTERFACES:
        raise UsageError(f"at most {MOST_INTERFACES} interfaces", option=called.name, index=MOST_INTERFACES,
                         value=names[MOST_INTERFACES])
    count = len(names)
    given = {called.inp: inp, called.out: out, called.reader_protocol: reader_protocol,
             called.writer_protocol: writer_protocol, called.mtu: mtu, called.pmtu: pmtu, called.flags: flags,
             called.netns: netns, called.size: size, called.mac: mac, called.addr: addr, called.carrier: carrier}
    lists = {option: None if text is None else params.split(option, text, empty=True) for option, text in given.items()}
    for option in (called.netns, called.carrier):
        if (entries := lists[option]) is not None and len(entries) == 1:
            lists[option] = entries * count
    if module:
        lists = {option: None if entries is None else entries + [""] * (count - len(entries))
                 for option, entries in lists.items()}
    params.same_length({called.name: names, **lists})
    if poll is not None and not 1 <= poll <= MOST_POLL:
        raise UsageError(f"a pause in microseconds is a number from 1 to {MOST_POLL}", option=called.poll, value=poll)
    if checksum not in CHECKSUM_MODES:
        raise UsageError(f"is one of {', '.join(CHECKSUM_MODES)}", option=called.checksum, value=checksum)
    if marks not in MARKS:
        raise UsageError(f"marks go one of these ways: {', '.join(MARKS)}", option=called.marks, value=marks)

    def entry(option: str, i: int) -> str:
        entries = lists[option]
        return "" if entries is None else entries[i]

    def channel(option: str, i: int, default: str) -> shm.Locator | None:
        text = default if lists[option] is None and not module else entry(option, i)
        return shm.Locator.parse(text, option=option, index=i) if text else None

    def interface(i: int) -> InterfaceConfig:
        params.interface(called.name, i, names[i])
        if names[i] in names[:i] and entry(called.netns, i) in [entry(called.netns, k) for k in range(i)
                                                               if names[k] == names[i]]:
            raise UsageError("the name is given twice", option=called.name, index=i, value=names[i])
        ends = ("in", "out") if not peer else ("out", "in")
        inner, outer = (channel(option, i, f"{names[i]}_{end}")
                        for option, end in zip((called.inp, called.out), ends, strict=True))
        if inner is None and outer is None:
            raise UsageError(f"no channel specified for '{names[i]}': it has neither {called.inp} nor {called.out}",
                             option=called.name, index=i, value=names[i])
        reads, writes = (_protocol(option, i, entry(option, i), locator, module)
                         for option, locator in ((called.reader_protocol, inner), (called.writer_protocol, outer)))
        framing = framing_of(DEFAULT_FLAGS if lists[called.flags] is None and not module else entry(called.flags, i),
                             called.flags, i)
        text = entry(called.pmtu, i)
        if text and framing != "net_hdr":
            raise UsageError("only packets of net_hdr have marks, and a path MTU is a mark's", option=called.pmtu, index=i,
                             value=text)
        wire = entry(called.carrier, i) or "peer"
        if wire not in CARRIERS:
            raise UsageError(f"a carrier is one of {', '.join(CARRIERS)}", option=called.carrier, index=i, value=wire)
        station = entry(called.mac, i)
        if station and framing != "eth_dev":
            raise UsageError("only an Ethernet device (eth_dev) has a MAC address", option=called.mac, index=i,
                             value=station)
        most = _mtu(called.mtu, i, entry(called.mtu, i), framing)
        room = entry(called.size, i)
        least = _HEADER + element_size(framing, most)
        addresses = entry(called.addr, i)
        if most < _IPV6_MTU and ":" in addresses:
            raise UsageError(f"IPv6 needs an MTU of at least {_IPV6_MTU} bytes, this interface has {most}",
                             option=called.addr, index=i, value=addresses)
        if addresses and framing == "raw":
            raise UsageError("a raw interface carries no IP packets, so it has no addresses", option=called.addr, index=i,
                             value=addresses)
        return InterfaceConfig(
            names[i], inner, outer, i, reads, writes, most, framing, entry(called.netns, i) or None, poll, bells,
            params.size(called.size, i, room, least=least) if room else None, wire,
            tuntap.check_mac(station, called.mac, i) if station else None,
            tuntap.check_addresses(addresses, called.addr, i) if addresses else (), up, called,
            shm.Locator.parse(text, option=called.pmtu, index=i) if text else None, offload and framing == "net_hdr",
            marks, patience=patience, checksum=checksum)

    configs = [interface(i) for i in range(count)]
    if marks not in ("auto", "none") and not any(config.framing == "net_hdr" for config in configs):
        raise UsageError("only packets of net_hdr have marks, and no interface here has that flag", option=called.marks,
                         value=marks)
    params.apart([place(option, config.index, locator) for config in configs
                  for option, locator in ((called.inp, config.inp), (called.out, config.out)) if locator is not None],
                 "one channel serves one direction of one interface")
    shared = {place(called.pmtu, 0, config.pmtu)[3:]: place(called.pmtu, config.index, config.pmtu)
              for config in configs if config.pmtu is not None}     # several interfaces may have the same one
    params.apart([*shared.values(), *(place(option, config.index, locator) for config in configs
                                      for option, locator in ((called.inp, config.inp), (called.out, config.out))
                                      if locator is not None)],
                 "a region is a channel, or has path MTUs")
    return configs


def _protocol(option: str, index: int, text: str, locator: shm.Locator | None, module: bool) -> int:
    """An entry of protocols. locator: of the channel it is for. Raises UsageError, in the module's words."""
    word = option.removeprefix("--").replace("-", "_")
    if not text:
        if module and locator is not None:
            raise UsageError(f"{word} missing: the channel {locator.text} needs one, hexadecimal and not zero",
                             option=option, index=index)
        return DEFAULT_PROTOCOL
    if locator is None and not module:
        raise UsageError("the interface has no such channel", option=option, index=index, value=text)
    try:
        return params.protocol(option, index, text)
    except UsageError as error:
        wrong = "missing" if text.removeprefix("0x").strip("0") == "" else "invalid"
        raise UsageError(f"{word} {wrong}: {error.rule}", option=option, index=index, value=text) from None


def _mtu(option: str, index: int, text: str, framing: str) -> int:
    """An entry of MTUs. Raises UsageError, in the module's words."""
    most = MOST_MTU - (14 if framing == "eth_dev" else 0)   # a length is 16 bits, and counts the Ethernet header
    try:
        return params.number(option, index, text, least=LEAST_MTU, most=most, what="an MTU") if text else DEFAULT_MTU
    except UsageError as error:
        raise UsageError(f"MTU invalid: {error.rule}", option=option, index=index, value=text) from None


# ------------------------------------------------------------------ one interface

class _Half:
    """One direction of an interface: the end of its channel, if it has one, its engine and its thread."""

    def __init__(self, interface: Interface, locator: shm.Locator | None, *, writes: bool) -> None:
        self.interface, self.locator, self.writes = interface, locator, writes
        self.end: End | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._swap = threading.Lock()       # the engine is taken, or made anew
        self._broken = False
        self._batches = -1
        self._progress = 0      # at the last look
        self.cpu = interface.cpus.next()
        self._pace = Pace(interface.paths is None, UNTOLD)
        self._missed = False
        self.writer = 0         # the process that writes what we read, as far as it is known; else 0
        config = interface.config
        self._peer = PeerLog(f"interface {config.name}")
        self._comings = PeerLog(f"interface {config.name}", most=20)
        self._offences = Offences(f"interface {config.name}", "" if locator is None else locator.text)
        self._teller: shm.Claim | None = None   # that our progress is the one that the channel's writer hears of
        if locator is not None:
            self.end = self._open()
        try:
            self.engine = self._engine(self.end)
        except BaseException:
            self._leave()
            raise

    def _open(self) -> End:
        config = self.interface.config
        assert self.locator is not None
        option = config.options.out if self.writes else config.options.inp
        with blame(option, config.index, self.locator.text):
            try:
                return End(self.locator, writes=self.writes, role="muenfast net", create=config.region_size,
                           least=_HEADER + config.element_size, bell=config.bells, permit=config.permits[self.writes])
            except ClaimError as error:
                if error.hint is not None:
                    raise
                raise ClaimError(error.what, error.holder, hint="one of an interface's two ends has --peer, or --in and "
                                                                "--out the other way round") from error

    def _tells(self, end: End) -> bool:
        """Whether the channel's writer is to wait for us: for one reader only."""
        self._teller = None
        if end.bell is None:
            return False
        try:
            self._teller = shm.claim_reader(end.region, "muenfast net")
        except ClaimError as error:
            log.warning("interface %s: the writer of %s waits for another reader (%s), and may overrun this one",
                        self.interface.config.name, end.locator.text, error.holder)
        return self._teller is not None

    def _leave(self) -> None:
        """Leaves the channel."""
        if self._teller is not None:
            self._teller.release()
        if self.end is not None:
            self.end.close()

    def _engine(self, end: End | None) -> Sender | Receiver:
        config, interface = self.interface.config, self.interface
        if self.writes:
            paths = None if interface.paths is None else interface.paths.view
            return Sender(interface.ports, None if end is None else end.view, framing=config.framing, mtu=config.mtu,
                          protocol=config.writer_protocol, bell=None if end is None else end.bell_view, paths=paths,
                          checksum=config.checksum)
        assert end is not None
        engine = Receiver(interface.ports, end.view, framing=config.framing, mtu=config.mtu,
                          protocol=config.reader_protocol, bell=end.bell_view, poll=config.poll,
                          merge=interface.own.device.merges, tells=self._tells(end), checksum=config.checksum,
                          watch=interface.watch)
        engine.conduct.patience = config.patience
        return engine

    # -------------------------------------------------------------- its thread

    def start(self) -> None:
        """Raises OSError where no thread is to be had."""
        way = "out" if self.writes else "in"
        self._thread = spawn(self._run, f"{self.interface.config.name} {way}")

    def _run(self) -> None:
        pin(self.cpu, f"interface {self.interface.config.name}")
        while not self._stop.is_set():
            event = self.engine.run(self._pace.seconds)
            if event == "gone":
                self.interface.removed()
                return
            try:
                if event == "child":    # one of them was removed
                    self.interface.children.look()
                    self._stop.wait(0.001)
                elif event not in ("tick", "stopped"):
                    self._happened(event)
                if event == "tick" and self.writes:
                    self.interface.look_at_paths()
                elif event == "tick" and self.end is not None:
                    self._blame()
                    self.look_at_writer()
                if event in ("tick", "broken") and self._moved():
                    self._follow()
                before, self._progress = self._progress, self._moved_so_far()
                self._pace.looked(event == "tick" and self._progress == before)
            except Exception as error:  # nobody else would hear of it, and the interface goes on
                self._peer.warning("cannot look after its channels: %s", error)
                self._stop.wait(LEAST)

    def _moved_so_far(self) -> int:
        """Grows as packets come, or go."""
        return self.engine.batches if isinstance(self.engine, Receiver) else int(self.engine.counters["tx_packets"])

    def _happened(self, event: str) -> None:
        if event in ("connected", "disconnected", "incompatible"):
            self.interface.set_carrier()
        if event == "connected":
            self._comings.info("its peer is there")
            self.look_at_writer()       # now: it may be killed before the next tick, and then its end was nobody's
        elif event == "disconnected" and isinstance(self.engine, Receiver) and self.engine.conduct.quarantined:
            self._blame()
        elif event == "disconnected":
            self._comings.info("its peer has gone")
        elif event == "overrun":
            self._peer.warning("its peer wrote more than the ring holds: %d packets lost so far",
                               self.engine.counters["lost"]["overrun"])
        elif event == "incompatible":
            self._peer.warning("%s", self._misfit())

    def _blame(self) -> None:
        """Says what the peer gets wrong."""
        if isinstance(self.engine, Receiver):
            self._offences.look(self.engine.conduct)

    def look_at_writer(self) -> None:
        """Says so where the process that writes what we read ended without ending its epoch: our carrier stays."""
        assert self.end is not None
        writer = shm.writer_process(self.end.region)
        lost = self.writer != 0 and writer == 0 and isinstance(self.engine, Receiver) and self.engine.connected
        if lost and not self._missed:   # who leaves in order ends his epoch, then his claim: we may not have looked
            self._missed = True
            return
        if lost:
            self._comings.warning("its peer, process %d, was killed: nothing comes until it is started again", self.writer)
        self.writer, self._missed = writer, False

    def _misfit(self) -> PeerError:
        assert isinstance(self.engine, Receiver) and self.locator is not None
        config = self.interface.config
        protocol, size, elements = self.engine.fault
        if config.checksum == "require" and size == config.element_size:
            return PeerError(self.locator.text, "checksum", "none in its elements", "one in each",
                             hint=f"no carrier until the other end has {config.options.checksum} require, or auto and a "
                                  "bell; with auto here it is done without")
        if config.checksum == "off" and size == config.element_size + 4:
            return PeerError(self.locator.text, "header", f"size {size}: elements with checksums", "elements without",
                             hint=f"no carrier until {config.options.checksum} is auto, or require, here, or off there")
        return PeerError(self.locator.text, "header", f"protocol {protocol:x}, size {size}, elements {elements}",
                         f"protocol {config.reader_protocol:x}, size {config.element_size}, elements that fit",
                         hint="no carrier until mtu, flags and protocols (--reader-protocol, --writer-protocol) are the "
                              "same at both ends")

    def _moved(self) -> bool:
        """Whether the channel's memory is to be followed: a peer may have made it anew, or truncated it."""
        if self.end is None or self.locator is None:
            return False
        if self.engine.broken:
            if not self._broken:
                self._broken = True
                log.error("interface %s: %s", self.interface.config.name, BrokenChannelError(self.locator.text))
            self._stop.wait(LEAST / 10)
            return self.end.replaced() or not self.end.region.truncated()
        if isinstance(self.engine, Receiver):
            before, self._batches = self._batches, self.engine.batches
            if self.engine.connected and self._batches != before:
                return False
        if not self.end.replaced():
            return False
        # Where the name is merely gone, the peer may still be there.
        return os.path.exists(self.locator.path) or isinstance(self.engine, Receiver) and not self.engine.connected

    def _follow(self) -> None:
        """Leaves the channel's old memory for the new one. Raises OSError, UsageError, ClaimError, PeerError; all is as it
        was then."""
        old_end, old = self.end, self.engine
        assert old_end is not None
        if old_end.replaced():
            end = self._open()
        elif old_end.remap():
            end = old_end
        else:
            return
        teller, self._teller = self._teller, None
        if teller is not None:
            teller.release()    # it is claimed anew, perhaps for the same memory
        try:
            new = self._engine(end)
        except BaseException:
            if end is not old_end:
                end.close()
            raise
        with self._swap:
            old.close()
            new.inherit(old)  # type: ignore[arg-type]  # of the same kind
            self.engine, self.end, self._broken = new, end, False
            if self._stop.is_set():
                new.stop()
        if end is not old_end:
            old_end.close()
        self.interface.set_carrier()
        log.info("interface %s: channel %s was made anew", self.interface.config.name, end.locator.text)

    def link(self, up: bool) -> None:
        """The interface went up or down."""
        with self._swap:
            if isinstance(self.engine, Sender):
                self.engine.link(up)

    def stop(self) -> None:
        """Its thread ends soon."""
        self._stop.set()
        with self._swap:
            self.engine.stop()

    def close(self) -> None:
        """Precondition: stop()."""
        if self._thread is not None:
            self._thread.join()
        self.engine.close()
        self._leave()


class Interface:
    """One interface; made by construction, running from start() to close(); see Interfaces.

    Raises UsageError, ClaimError, PeerError, OSError; nothing is left behind then.
    """

    def __init__(self, config: InterfaceConfig, links: tuntap.Links, makers: Makers, watch: Watch | None = None,
                 cpus: Cpus | None = None) -> None:
        self.config, self._makers, self.watch = config, makers, watch
        self.cpus = cpus or Cpus(())
        self.up = False
        self.gone = False
        self._carrier = threading.Lock()    # of what the device was told last
        self._closing = threading.Lock()
        self._end = threading.Lock()        # of `gone`; not that one: who tells of it waits for no child's being made
        self._halves: list[_Half] = []
        with ExitStack() as stack:
            self._namespace: int | None = None
            if config.netns is not None:
                with blame(config.options.netns, config.index, config.netns):
                    self._namespace = makers.namespace(config.netns)
                if self._namespace is not None:
                    stack.callback(os.close, self._namespace)
            self._lost_paths = False
            self.paths: shm.Region | None = None
            if config.pmtu is not None:
                with blame(config.options.pmtu, config.index, config.pmtu.text):
                    self.paths = stack.enter_context(pathmtu.opened(config.pmtu, writable=False, make=True,
                                                                    permit=config.permits[2]))
                    stack.enter_context(shm.apart(config.pmtu, disk=False))     # as long as it is one, it is no disk
            path_mtus = 0 if self.paths is None else pathmtu.entries(self.paths)
            self.ports = Ports(MarkTable(max(LEAST_MARKS, path_mtus)), config.offload)
            stack.callback(self.ports.close)
            self.children = Children(config.name, self.ports, self._child, links, net_hdr=config.framing == "net_hdr",
                                     path_mtus=path_mtus, carrier=lambda: self.carrier)
            with blame(config.options.name, config.index, config.name):
                self.own = self._port(config.name, self._namespace, self.children.answers(config.name), self._told)
            stack.callback(self.own.close)
            self.own.join(self.ports, 0)
            self.sender = _Half(self, config.out, writes=True)
            self._own(stack, self.sender)
            self.receiver: _Half | None = None
            if config.inp is not None:
                self.receiver = _Half(self, config.inp, writes=False)
                self._own(stack, self.receiver)
            self.own.watch(links)
            stack.callback(self.children.close)
            self.set_carrier()
            self.children.open()
            self._stack = stack.pop_all()

    def _port(self, name: str, namespace: int | None, answers: Mapping[str, Command],
              told: Callable[[bool | None], None]) -> Port:
        config = self.config
        return Port(name, config.framing, config.mtu, namespace=namespace, offload=config.offload, ways=MARKS[config.marks],
                    answers=answers, told=told, makers=self._makers)

    def _child(self, name: str, answers: Mapping[str, Command], told: Callable[[bool | None], None]) -> Port:
        """The port of a new child, in the network namespace where the interface is now."""
        with self.own.device.place() as namespace:
            return self._port(name, namespace, answers, told)

    def _own(self, stack: ExitStack, half: _Half) -> None:
        self._halves.append(half)
        stack.callback(half.close)
        stack.callback(half.stop)

    def start(self) -> None:
        """Begins to carry packets, then sets what the configuration asks for. Raises OSError."""
        for half in self._halves:
            half.start()
        config = self.config
        with blame(*((config.options.addr, config.index, "+".join(config.addresses)) if config.addresses
                     else (config.options.name, config.index, config.name))):
            self.own.device.configure(namespace=self._namespace, addresses=config.addresses, mac=config.mac, up=config.up)

    def _told(self, state: bool | None) -> None:
        if state is None:
            self.removed()
            return
        self.up = state
        self.sender.link(state)

    def look_at_paths(self) -> None:
        """Says so where the region of path MTUs is not what its name means any more."""
        paths = self.paths
        if paths is None or self._lost_paths or not (paths.truncated() or paths.replaced()):
            return
        self._lost_paths = True
        log.error("interface %s: its region of path MTUs was taken away: the limits of %s count no longer, or as they last "
                  "were; start it anew", self.config.name, paths.locator.text)

    def removed(self) -> None:
        """The device is no more: nor are its children, and both channels are left."""
        with self._end:
            before, self.gone = self.gone, True
        if not before:
            log.error("interface %s: was removed", self.config.name)
            spawn(self.close, f"{self.config.name} removed")    # another thread, for we may be one that it waits for

    def set_carrier(self) -> None:
        """There is one while the peer's channel has an epoch; always where nobody is to be heard, or it was asked for."""
        with self._carrier:
            with contextlib.suppress(OSError):  # the device is gone, which is told elsewhere
                self.own.device.set_carrier(self.carrier)
            self.children.set_carrier(self.carrier)

    @property
    def carrier(self) -> bool:
        """Whether somebody is at the other end."""
        if self.gone:
            return False
        if self.receiver is None or self.config.carrier == "up":
            return True
        engine = self.receiver.engine
        return isinstance(engine, Receiver) and engine.connected

    def status(self) -> dict[str, Any]:
        """The module's fields and counters, and what this one knows besides (docs/operations.md)."""
        config, sender = self.config, self.sender.engine
        assert isinstance(sender, Sender)
        incoming = None if self.receiver is None else self.receiver.engine
        sent = sender.counters
        received = {} if incoming is None else incoming.counters
        flat = {**_NO_RECEIVER, **{name: value for name, value in received.items() if name in _NO_RECEIVER},
                **{name: sent[name] for name in ("tx_packets", "tx_bytes", "tx_dropped")}}
        return {"name": self.own.device.rename(), "in": None if config.inp is None else config.inp.text,
                "out": None if config.out is None else config.out.text, "mtu": config.mtu,
                "flags": "" if config.framing == "raw" else config.framing, "netns": config.netns, "poll": config.poll,
                "pmtu": None if config.pmtu is None else config.pmtu.text, "offload": config.offload,
                "marks": None if self.own.attached is None else self.own.attached.way.value,
                "cpus": [half.cpu for half in self._halves if half.cpu is not None],
                "state": "gone" if self.gone else "up" if self.up else "down", "carrier": self.carrier,
                "peer": None if self.receiver is None else self.receiver.writer or None,
                "writer": {"enabled": config.out is not None, "active": sender.active,
                           "element_size": 0 if config.out is None else sender.size, "elements": sender.elements,
                           "protocol": config.writer_protocol, "checksum": sender.checksum},
                "reader": {"enabled": incoming is not None, "active": isinstance(incoming, Receiver) and incoming.connected,
                           "element_size": 0 if incoming is None else incoming.size, "protocol": config.reader_protocol,
                           "checksum": incoming.checksum if isinstance(incoming, Receiver) else "off"},
                "counters": flat,
                "interface": {**self.ports.counters(0), "queue_drops": self._queue_drops(), "lost": self.own.dropped()},
                "children": self.children.status(),
                "sent": {name: value for name, value in sent.items() if name not in flat},
                "offences": incoming.conduct.offences if isinstance(incoming, Receiver) else {},
                "received": {name: value for name, value in received.items() if name not in flat}}

    def _queue_drops(self) -> int | None:
        """None: it cannot be told."""
        if self.gone:
            return None
        try:
            return self.own.device.queue_drops()
        except OSError:
            return None

    def stop(self) -> None:
        """Its threads end soon."""
        for half in self._halves:
            half.stop()

    def close(self) -> None:
        """The interface goes, and both channels are left; may be called twice, and by several threads."""
        with self._closing:
            self.stop()
            self._stack.close()


_NO_RECEIVER = dict.fromkeys(("rx_packets", "rx_bytes", "rx_errors", "rx_over_errors", "rx_frame_errors", "rx_dropped"), 0)


# ------------------------------------------------------------------ all of a process

class Interfaces:
    """Several interfaces in one process, carrying packets from construction to close(); context manager.

        with muenfast.Interfaces(muenfast.interfaces_from_lists("net0,net1")) as interfaces:
            interfaces.wait()

    makers: of what takes privileges, None: this process does it. cpus: the threads of all, two for each interface, are
    pinned to them in turn; none: they are not. Raises UsageError, ClaimError, PeerError, OSError (EPERM
    without CAP_NET_ADMIN).
    """

    def __init__(self, configs: Sequence[InterfaceConfig], makers: Makers | None = None, *,
                 cpus: Sequence[int] = ()) -> None:
        if isinstance(configs, str) or not all(isinstance(config, InterfaceConfig) for config in configs):
            raise UsageError("interfaces are a list of InterfaceConfig, as interfaces_from_lists() returns", value=configs)
        self._process = os.getpid()
        self._ended = threading.Event()
        self.interfaces: list[Interface] = []
        given = Cpus(cpus)
        with ExitStack() as stack:
            links = stack.enter_context(tuntap.Links())
            watch = None if len(configs) < 2 else watching(stack)   # one thread polls for all while they are idle
            with shm.made_ahead([region for config in configs for region in config.wanted()]):
                for config in configs:
                    interface = Interface(config, links, Makers() if makers is None else makers, watch, given)
                    stack.callback(interface.close)
                    self.interfaces.append(interface)
            for interface in self.interfaces:
                interface.start()
            stack.callback(self._stop)      # all, before the first is waited for
            self._stack = stack.pop_all()

    def _stop(self) -> None:
        self._ended.set()
        for interface in self.interfaces:
            interface.stop()

    @property
    def gone(self) -> bool:
        """Whether somebody removed all of the interfaces."""
        return all(interface.gone for interface in self.interfaces)

    def wait(self, timeout: float | None = None) -> bool:
        """Returns once it is closed, by another thread or a signal's handler, or all interfaces were removed, or after
        `timeout` seconds; whether one of the first two happened."""
        end = None if timeout is None else time.monotonic() + timeout
        # In pieces: a signal may reach another thread than the one that waits.
        while not self._ended.is_set() and not self.gone:
            left = 0.2 if end is None else min(0.2, end - time.monotonic())
            if left <= 0:
                return False
            self._ended.wait(left)
        return True

    def status(self) -> list[dict[str, Any]]:
        """One entry per interface."""
        return [interface.status() for interface in self.interfaces]

    def close(self) -> None:
        """Takes all interfaces away. In a child of fork(), where they are the parent's, nothing happens."""
        if os.getpid() == self._process:
            self._stack.close()

    def __enter__(self) -> Interfaces:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()
