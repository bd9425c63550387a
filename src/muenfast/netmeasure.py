"""What `muenfast bench net` measures: `muenfast net` between two network namespaces, beside veth, a socat TUN pair and a
pump of one packet per element; the path through a ring alone; sixteen interfaces in one process beside one.

The namespaces have no name: they go with this process, and programs in them are told to end with it. Whatever is of the
near one is on the first CPU (its program, and this process, which receives and pings), whatever is of the far one on the
second (its program, and a child of this process, which sends): the same for every peer.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from muenfast import _bench, _netbench, netns
from muenfast.errors import MuenfastError, UsageError
from muenfast.measure import Pair, Row, die_with
from muenfast.threads import interrupts_held

POLICY = ("near: receiver, ping and near program on the first CPU; far: sender and far program on the second; echoes are "
          "ICMP, 64 bytes, from a raw socket, answered by the kernel, idle ones with 2 ms between; datagrams: as fast as "
          "sendmmsg of 64 goes; memory: one process per CPU, an empty or full ring is looked at again after 128 pauses, "
          "the best of 20 short runs")
MANY = 16  # interfaces of one process
PACKET = 64  # bytes, _bench.pyx
_DATAGRAMS = (18, 1400)  # bytes of payload
_TRIES = 3
_RUNS = 20  # short ones of a sample from memory to memory
_ELEMENTS = 1024  # of a ring in memory, as `muenfast net` makes them of packets of 1500 bytes
_BETWEEN_NS = 2_000_000  # idle ping: from an answer to the next echo
_PATIENCE = 20.0  # seconds until a link has to answer
_LATE_NS = 2_000_000_000  # an echo that takes longer was lost
_GRACE_NS = 2_000_000_000  # a sender ends by itself so long after nobody receives any more
_RECEIVE_BUFFER = 4 << 20
_SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_TOTAL_RETRANS = 100  # offset in struct tcp_info, <linux/tcp.h>
# <linux/sockios.h>, <linux/ethtool.h>: checksums received and sent, TSO, GSO, GRO, as `ethtool -K DEVICE rx off tx off ...`
_SIOCETHTOOL = 0x8946
_OFFLOADS = (0x15, 0x17, 0x1f, 0x24, 0x2c)

OURS, VETH, BARE_VETH = "muenfast net", "veth", "veth without offloads"
SOCAT, PLAIN = "socat TUN pair", "muenfast net --no-offload"


# ------------------------------------------------------------------ programs

class _Program:
    """A program on one CPU, in a namespace if that is given; it ends with this process at the latest.

    What it says on standard error comes to ours when it is closed. fds: descriptors that it inherits. as_before: see
    interrupts_held().
    """

    def __init__(self, words: Sequence[str], cpu: int, namespace: int | None, fds: Sequence[int],
                 as_before: Callable[[], object]) -> None:
        me, libc = os.getpid(), ctypes.CDLL(None, use_errno=True)

        def enter() -> None:
            as_before()
            os.sched_setaffinity(0, {cpu})
            die_with(me, signal.SIGTERM)
            if namespace is not None and libc.setns(namespace, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

        self.errors = tempfile.TemporaryFile()
        self._heard = 0
        try:
            # A session of its own: ^C is for us, and we end it when nobody measures any more.
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors,
                                            bufsize=0, pass_fds=fds, start_new_session=True, preexec_fn=enter)
        except BaseException:
            self.errors.close()
            raise

    def failed(self, until: float) -> str | None:
        """Waits for its line `ready`; why there is none."""
        assert self.process.stdout is not None
        text = b""
        while not text.endswith(b"ready\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return "it is not ready in time"
            if not (piece := os.read(self.process.stdout.fileno(), 4096)):
                self.process.wait()
                return self.why()
            text += piece
        return None

    def said(self) -> str:
        """What it wrote to standard error since the last call."""
        data = os.pread(self.errors.fileno(), 1 << 20, self._heard)     # a seek would be the program's, too
        self._heard += len(data)
        return data.decode(errors="replace")

    def why(self) -> str:
        """Why it has ended: the last line that it wrote. Precondition: it has, and was waited for."""
        lines = self.said().splitlines()
        return lines[-1] if lines else f"it ended with {self.process.returncode}"

    def end(self) -> None:
        """Tells it to end."""
        self.process.terminate()

    def close(self, told: bool = False) -> None:
        """Waits for the end. told: what it said is known."""
        with self.errors:
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            if not told and self.process.returncode not in (-signal.SIGTERM, 128 + signal.SIGTERM):
                print(self.said(), end="", file=sys.stderr)


# ------------------------------------------------------------------ links

@dataclass
class Link:
    """A way between the namespaces: `count` pairs of interfaces, pair k with 10.NUMBER.k.1 near and 10.NUMBER.k.2 far.

    missing: why there is none.
    """

    name: str
    number: int
    count: int = 1
    missing: str | None = None
    programs: list[_Program] = field(default_factory=list)

    def address(self, k: int, far: bool) -> str:
        return f"10.{self.number}.{k}.{2 if far else 1}"


class Spaces:
    """The two namespaces, and what links them. Raises UsageError where that cannot be."""

    def __init__(self, stack: ExitStack) -> None:
        self.pair = Pair()
        self._stack = stack
        self._programs: list[_Program] = []
        try:
            self.near, self.far = (netns.inside_new(self._new) for _ in range(2))
        except PermissionError as error:
            raise UsageError("network namespaces cannot be made without the capability CAP_SYS_ADMIN", option="SUBJECT",
                             value="net", hint="run it as root") from error
        stack.callback(os.close, self.near)
        stack.callback(os.close, self.far)
        stack.callback(self._end)

    @staticmethod
    def _new() -> int:
        for which in ("all", "default"):    # no neighbours to be found, no routers: idle is idle
            switch = Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6")
            if os.access(switch, os.W_OK):  # not in a kernel without IPv6, nor where /proc/sys is read-only
                switch.write_text("1")
        return netns.current()

    def _end(self) -> None:
        for program in self._programs:
            program.end()
        with ExitStack() as all_of_them:
            for program in self._programs:
                all_of_them.callback(program.close)

    def _start(self, link: Link, words: Sequence[str], far: bool, inside: bool = False, fds: Sequence[int] = ()) -> None:
        with interrupts_held() as as_before:
            program = _Program(words, self.pair.far if far else self.pair.near, (self.far if far else self.near) if inside
                               else None, fds, as_before)
            self._programs.append(program)
            link.programs.append(program)

    def drop(self, link: Link) -> None:
        """Ends what was started for it, and hears no more of that: the link's `missing` says it."""
        for program in link.programs:
            program.end()
        for program in link.programs:
            self._programs.remove(program)
            program.close(told=True)

    # -------------------------------------------------------------- kinds of links

    def pumps(self, link: Link, *options: str) -> None:
        """`muenfast net` on both sides, as users start it; all pairs in one process."""
        for far in (False, True):
            self._pump(link, far, options)

    def _pump(self, link: Link, far: bool, options: Sequence[str]) -> None:
        def each(text: Callable[[int], str]) -> str:
            return ",".join(map(text, range(link.count)))

        def channels(to_far: bool) -> str:
            return each(lambda k: f"bench-{os.getpid()}-{link.number}-{k}-{'far' if to_far else 'near'}")

        space = f"/proc/{os.getpid()}/fd/{self.far if far else self.near}"
        self._start(link, [sys.executable, "-m", "muenfast", "net", "--name", each(lambda k: f"pump{link.number}-{k}"),
                           "--in", channels(far), "--out", channels(not far), "--netns", space, "--up",
                           "--addr", each(lambda k: f"{link.address(k, far)}/24"), *options], far)

    def veth(self, link: Link, offloads: bool) -> None:
        """The kernel's own pair."""
        from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

        names = [f"veth{link.number}-{side}" for side in "nf"]
        try:
            netns.inside(self.near, lambda: self._veth(link, names))
            netns.inside(self.far, lambda: self._address(link, names[True], True))
        except NetlinkError as error:
            link.missing = f"the kernel makes no veth: {os.strerror(error.code)}"
            return
        if not offloads:
            try:
                for space, name in zip((self.near, self.far), names, strict=True):
                    netns.inside(space, partial(_plain, name))
            except OSError as error:
                link.missing = f"offloads stay on: {error.strerror}"

    def _veth(self, link: Link, names: Sequence[str]) -> None:
        from pyroute2 import IPRoute  # type: ignore[import-untyped]

        with IPRoute() as route:
            route.link("add", ifname=names[False], kind="veth", peer={"ifname": names[True], "net_ns_fd": self.far})
        self._address(link, names[False], False)

    @staticmethod
    def _address(link: Link, name: str, far: bool) -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            [index] = route.link_lookup(ifname=name)
            route.addr("add", index=index, address=link.address(0, far), prefixlen=24)
            route.link("set", index=index, state="up")

    def socat(self, link: Link) -> None:
        """Two TUN devices, copied by socat(1) over a Unix socket that keeps packets apart (SOCK_SEQPACKET)."""
        if shutil.which("socat") is None:
            link.missing = "socat is not installed (Debian: apt-get install socat)"
            return
        for far, end in enumerate(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)):
            with end:
                device = f"TUN:{link.address(0, bool(far))}/24,tun-name=socat{link.number},iff-no-pi,iff-up"
                self._start(link, ["socat", device, f"FD:{end.fileno()}"], bool(far), inside=True, fds=[end.fileno()])

    def failed(self, link: Link) -> str | None:
        """Waits until every pair of a link answers an echo; why one does not."""
        until = time.monotonic() + _PATIENCE
        for program in link.programs:
            if program.process.args[0] == sys.executable and (reason := program.failed(until)) is not None:  # type: ignore[index]
                return reason
        for k in range(link.count):
            while (reason := self._unanswered(link, k)) is not None:
                ended = [program for program in link.programs if program.process.poll() is not None]
                if ended:
                    return ended[0].why()
                if time.monotonic() > until:
                    return reason
                time.sleep(0.02)
        return None

    def _unanswered(self, link: Link, k: int) -> str | None:
        try:
            with self.echo(link, k) as echo:
                _netbench.ping(echo.fileno(), 1, 0, 100_000_000, array.array("Q", [0]))
        except OSError as error:
            return f"{link.address(k, True)} cannot be reached: {error.strerror or error}"
        return None

    # -------------------------------------------------------------- sockets

    def bare(self, far: bool, kind: int, protocol: int = 0, wait: float = 0.05) -> socket.socket:
        """One of that namespace, for any thread. wait: seconds, at most, of one call."""
        s = netns.inside(self.far if far else self.near, lambda: socket.socket(socket.AF_INET, kind, protocol))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            s.setsockopt(socket.SOL_SOCKET, option, _timeval(wait))
        return s

    def echo(self, link: Link, k: int = 0) -> socket.socket:
        """A raw one of the near side that hears ICMP of the far one's address. Raises OSError."""
        s = self.bare(False, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        try:
            s.connect((link.address(k, True), 0))
        except BaseException:
            s.close()
            raise
        return s


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _plain(name: str) -> None:
    """Switches a device's offloads off. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for command in _OFFLOADS:
            value = array.array("I", [command, 0])      # struct ethtool_value
            fcntl.ioctl(s, _SIOCETHTOOL, struct.pack("16sP16x", name.encode(), value.buffer_info()[0]))


# ------------------------------------------------------------------ samples

class _Load:
    """Samples of one link. scale: of the usual length."""

    def __init__(self, spaces: Spaces, link: Link, scale: float) -> None:
        self.spaces, self.link = spaces, link
        self.warm, self.seconds = max(0.01, 0.2 * scale), max(0.02, 0.8 * scale)
        self.tail = 0.0

    def tcp(self, notes: dict[str, list[float]]) -> float:
        """Gb/s, of one stream for each pair. notes: receives segments that were sent again while it was measured, and
        before."""
        with ExitStack() as stack:
            ends = [self._connect(stack, k) for k in range(self.link.count)]
            start = time.monotonic_ns()
            middle = start + int(self.warm * 1e9)
            end = middle + int(self.seconds * 1e9)

            def send() -> None:
                with ThreadPoolExecutor(len(ends)) as pool:
                    list(pool.map(lambda pair: _netbench.tcp_send(pair[1].fileno(), end + _GRACE_NS), ends))

            def one(pair: tuple[socket.socket, socket.socket]) -> tuple[float, int, int]:
                _netbench.tcp_receive(pair[0].fileno(), middle)
                before = _sent_again(pair[1])
                each = _each_second(partial(_netbench.tcp_receive, pair[0].fileno()), end)
                return each, _sent_again(pair[1]) - before, before

            def receive() -> list[tuple[float, int, int]]:
                try:
                    with ThreadPoolExecutor(len(ends)) as pool:
                        return list(pool.map(one, ends))
                finally:
                    for _, sender in ends:
                        with contextlib.suppress(OSError):  # it is closed already
                            sender.shutdown(socket.SHUT_RDWR)
                    for receiver, _ in ends:
                        receiver.close()

            found = self.spaces.pair.run(send, receive)
            if not all(each for each, _, _ in found):
                raise MuenfastError(f"{self.link.name}: a stream stands still")
            notes.setdefault("retransmits", []).append(sum(again for _, again, _ in found))
            notes.setdefault("retransmits before", []).append(sum(before for _, _, before in found))
            return float(sum(each for each, _, _ in found)) * 8 / 1e9

    def _connect(self, stack: ExitStack, k: int) -> tuple[socket.socket, socket.socket]:
        """The near and the far end of a connection."""
        with self.spaces.bare(False, socket.SOCK_STREAM, wait=2.0) as listener:
            listener.bind((self.link.address(k, False), 0))
            listener.listen()
            sender = stack.enter_context(self.spaces.bare(True, socket.SOCK_STREAM, wait=2.0))
            sender.connect(listener.getsockname())
            receiver = stack.enter_context(listener.accept()[0])
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(0.05))
            return receiver, sender

    def udp(self, size: int, notes: dict[str, list[float]]) -> float:
        """Datagrams received per second. notes: receives those sent per second. Where none came, others had the CPUs."""
        for _ in range(_TRIES):
            if figure := self._udp(size, notes):
                return figure
        raise MuenfastError(f"{self.link.name}: no datagram came, {_TRIES} times; is the machine busy?")

    def _udp(self, size: int, notes: dict[str, list[float]]) -> float:
        near, far = self.spaces.bare(False, socket.SOCK_DGRAM), self.spaces.bare(True, socket.SOCK_DGRAM)
        with near, far, mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory).cast("Q") as words:
            near.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            near.bind((self.link.address(0, False), 0))
            far.connect(near.getsockname())
            begin = time.monotonic_ns()
            middle = begin + int(self.warm / 2 * 1e9)
            end = middle + int(self.seconds * 0.6 * 1e9)

            def send() -> None:
                words[1] = _netbench.udp_send(far.fileno(), size, words, end + _GRACE_NS)
                words[2] = time.monotonic_ns()

            def receive() -> float:
                try:
                    _netbench.udp_receive(near.fileno(), size, middle)
                    return _each_second(partial(_netbench.udp_receive, near.fileno(), size), end)
                finally:
                    words[0] = 1

            figure = float(self.spaces.pair.run(send, receive))
            # What is still on its way is not for who comes next.
            while time.monotonic_ns() < end + _GRACE_NS and \
                    _netbench.udp_receive(near.fileno(), size, time.monotonic_ns() + 20_000_000):
                pass
            if figure:
                notes.setdefault("sent/s", []).append(words[1] / (words[2] - begin) * 1e9)
        return figure

    def ping(self, count: int, between: int) -> float:
        """Median of the round trips in microseconds; `tail` is the 99th percentile then."""
        laps = array.array("Q", bytes(8 * count))
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self.spaces.pair.near})
        try:
            with self.spaces.echo(self.link) as echo:
                _netbench.ping(echo.fileno(), 1, between, _LATE_NS, laps)
        except TimeoutError as error:
            raise MuenfastError(f"{self.link.name}: {error}") from error
        finally:
            os.sched_setaffinity(0, before)
        ordered = sorted(laps)
        self.tail = ordered[count * 99 // 100] / 1e3
        return ordered[count // 2] / 1e3


def _each_second(receive: Callable[[int], int], until: int) -> float:
    """What came per second until then, or until something has come; 0 where nothing does for long."""
    start = time.monotonic_ns()
    last = until + _GRACE_NS // 2
    while not (came := receive(until)) and until < last:
        until = time.monotonic_ns() + 20_000_000
    return came / (time.monotonic_ns() - start) * 1e9


def _sent_again(s: socket.socket) -> int:
    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOTAL_RETRANS + 4)
    return int(struct.unpack_from("I", info, _TOTAL_RETRANS)[0])


def _best(run: Callable[[], float]) -> float:
    """Of several short runs: one in which somebody else had one of the CPUs says how long that was, and no more."""
    return max(run() for _ in range(_RUNS))


def _frames(pair: Pair, size: int, count: int) -> float:
    """Packets per second through a ring, from memory to memory."""
    region = mmap.mmap(-1, _bench.HEADER + size * _ELEMENTS)
    bell, words = mmap.mmap(-1, mmap.PAGESIZE), mmap.mmap(-1, mmap.PAGESIZE)
    seconds, wrong = pair.run(lambda: _bench.packets_write(region, bell, words, size - 8, count),
                              lambda: _bench.packets_read(region, bell, words, size - 8, count))
    if wrong:
        raise MuenfastError(f"{wrong} packets were lost or wrong under flow control")
    return count / float(seconds)


def _slots(pair: Pair, size: int, count: int) -> float:
    memory, words = mmap.mmap(-1, size * _ELEMENTS), mmap.mmap(-1, mmap.PAGESIZE)
    return count / float(pair.run(lambda: _bench.slots_write(memory, words, size, PACKET + 8, count),
                                  lambda: _bench.slots_read(memory, words, size, PACKET + 8, count)))


# ------------------------------------------------------------------ rows

def net_rows(scale: float = 1.0) -> Iterator[list[Row]]:
    """Streams, datagrams and echoes over every link, packets through a ring; a generator that cleans up when it is closed.

    scale: of the usual work per sample. Raises UsageError where there can be no namespaces or TUN devices,
    MuenfastError where `muenfast net` links nothing; another link that cannot be made has rows that say why.
    """
    if not os.path.exists("/dev/net/tun"):
        raise UsageError("there are no TUN devices here", option="SUBJECT", value="net",
                         hint="a kernel with CONFIG_TUN has /dev/net/tun")
    with ExitStack() as stack:
        spaces = Spaces(stack)
        names = (VETH, BARE_VETH, SOCAT, PLAIN, OURS)
        links = [Link(name, number) for number, name in enumerate(names)]
        many = Link(f"{OURS}, {MANY} interfaces", len(links), MANY)
        made: dict[str, Callable[[Link], None]] = {
            VETH: partial(spaces.veth, offloads=True), BARE_VETH: partial(spaces.veth, offloads=False),
            SOCAT: spaces.socat, PLAIN: lambda link: spaces.pumps(link, "--no-offload"), OURS: spaces.pumps,
            many.name: spaces.pumps}
        for link in (*links, many):     # all, before the first is waited for
            made[link.name](link)
        for link in (*links, many):
            if link.missing is None:
                link.missing = spaces.failed(link)
            if link.missing is not None:
                if made[link.name] == spaces.pumps:
                    raise MuenfastError(f"{link.name}: {link.missing}")
                spaces.drop(link)
        yield list(_rows(spaces, links, many, scale))


def _rows(spaces: Spaces, links: Sequence[Link], many: Link, scale: float) -> Iterator[Row]:
    loads = [_Load(spaces, link, scale) for link in links]
    idle, flood = max(5, int(200 * scale)), max(100, int(3000 * scale))

    def row(what: str, load: _Load, unit: str, sample: Callable[[], float], notes: dict[str, list[float]] | None = None,
            less: bool = False) -> Row:
        others = {VETH: (), OURS: (VETH, BARE_VETH, SOCAT, PLAIN)}.get(load.link.name, (VETH,))
        against = [f"{what}: {name}" for name in others]
        return Row(f"{what}: {load.link.name}", unit, sample, limit=against[0] if against else None, less=less,
                   beside=tuple(against[1:]), missing=load.link.missing, notes={} if notes is None else notes,
                   kind="product" if load.link.name in (OURS, PLAIN) else "peer")

    for load in loads:
        notes: dict[str, list[float]] = {}
        yield row("TCP, one stream", load, "Gb/s", partial(load.tcp, notes), notes)
    notes = {}
    yield Row(f"TCP, {MANY} streams: {many.name}", "Gb/s", partial(_Load(spaces, many, scale).tcp, notes),
              limit=f"TCP, one stream: {OURS}", notes=notes)
    for size in _DATAGRAMS:
        for load in loads:
            notes = {}
            yield row(f"UDP received, {size} bytes", load, "packets/s", partial(load.udp, size, notes), notes)
    for load in loads:
        yield row("ping, idle", load, "us", partial(load.ping, idle, _BETWEEN_NS), less=True)
    for load in loads:
        yield row("ping, flood", load, "us", partial(load.ping, flood, 0), less=True)
        yield row("ping, flood, p99", load, "us", partial(_tail, load), less=True)
    for size, count in ((1508, 60_000), (128, 160_000)):
        what = f"memory, {PACKET} bytes in {size}"
        packets = max(1000, int(count * scale))
        yield Row(f"{what}: bare copies", "packets/s", partial(_best, partial(_slots, spaces.pair, size, packets)))
        yield Row(f"{what}: ring", "packets/s", partial(_best, partial(_frames, spaces.pair, size, packets)),
                  limit=f"{what}: bare copies")


def _tail(load: _Load) -> float:
    """Of the echoes of the row before."""
    return load.tail
