"""Splitting, merging and fragments beside the kernel's own (_packets): TUN devices in namespaces of the tests' own.

    what is written to `in` ---> [in] the kernel forwards, a hop less [out] ---> what is read from `out`

`out` has no offloads: whatever is larger than its MTU, or without checksum, the kernel itself has to finish.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from namespaces import ALL_OFFLOADS
from packets import ACK, CWR, ECE, ECN, FIN, NEEDS_CHECKSUM, NONE, PSH, TCP4, Packet, right, vnet, without_id
from spaces import Space, Tun

from muenfast._packets import Coalescer, pmtu, split

pytestmark = [pytest.mark.root, pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun")]

IP_MTU_DISCOVER, IP_MTU, IPV6_MTU_DISCOVER, IPV6_MTU, PMTUDISC_DO = 10, 14, 23, 24, 2
UDP_SEGMENT = 103
DATA = random.Random(7).randbytes(65535)
TIMES = bytes([1, 1, 8, 10]) + bytes(range(8))
UDP = socket.IPPROTO_UDP
V4: dict[str, Any] = {"source": "10.7.0.1", "target": "10.8.0.1"}
V6: dict[str, Any] = {"source": "fd07::1", "target": "fd08::1"}


class Router:
    def __init__(self, space: Space) -> None:
        self.space = space
        self.inside, self.outside = space.tun("in", ALL_OFFLOADS), space.tun("out", 0)
        space.ip("link set out txqueuelen 10000", "addr add 10.7.0.254/24 dev in", "addr add 10.8.0.254/24 dev out",
                  "addr add fd07::fe/64 dev in nodad", "addr add fd08::fe/64 dev out nodad")
        space.sysctl("ipv4/ip_forward", 1)
        space.sysctl("ipv6/conf/all/forwarding", 1)
        for one in Packet(**V4, protocol=UDP), Packet(**V6, protocol=UDP):      # links and addresses take their time
            for _ in range(100):
                self.inside.write(vnet(), one.pack())
                if self.outside.packets(1, lambda found: one.addresses() in (found[12:20], found[8:40]), 0.2):
                    break
            else:
                raise AssertionError("nothing is forwarded")
        self.outside.packets(100, lambda found: True, 0.3)

    def forward(self, ones: list[tuple[bytes, bytes]], count: int) -> list[bytes]:
        """What comes of (header, packet): count packets, and not more; one hop more than they have then."""
        target = ones[0][1][16:20] if ones[0][1][0] >> 4 == 4 else ones[0][1][24:40]
        for header, packet in ones:
            self.inside.write(header, packet)
        found = self.outside.packets(count, lambda one: target in (one[16:20], one[24:40]))
        found += self.outside.packets(1, lambda one: target in (one[16:20], one[24:40]), 0.05)
        assert all(header == bytes(10) for header, _ in found)
        return [packet for _, packet in found]


@pytest.fixture(scope="module")
def machine() -> Iterator[Router]:
    with Space() as space:
        yield Router(space)


def farther(packet: Packet) -> Packet:
    return replace(packet, ttl=packet.ttl + 1)


SUPERS = {
    "tcp4": Packet(**V4, payload=DATA[:9000], flags=ACK | PSH | FIN, id=0xfffe),
    "tcp4 of 65535 bytes": Packet(**V4, payload=DATA[:65535 - 52], options=TIMES, sequence=0xffffff00),
    "tcp4 without DF": Packet(**V4, payload=DATA[:5000], fragment=0, tos=0x2a),
    "tcp6": Packet(**V6, payload=DATA[:9000], flags=ACK | PSH, options=TIMES, label=0x12345, tos=0x02),
    "tcp6 of 65535 bytes": Packet(**V6, payload=DATA[:65535 - 60]),
    "tcp6 with destination options": Packet(**V6, payload=DATA[:5000], extension=((60, bytes([0, 1, 4, 0, 0, 0, 0])),)),
    "udp4": Packet(**V4, payload=DATA[:9001], protocol=UDP, id=7),
    "udp4 without DF": Packet(**V4, payload=DATA[:9001], protocol=UDP, id=0xffff, fragment=0),
    "udp6": Packet(**V6, payload=DATA[:9001], protocol=UDP),
}


@pytest.mark.parametrize("size", [536, 1200, 1400])
@pytest.mark.parametrize("name", SUPERS)
def test_split_as_the_kernel_does(machine: Router, name: str, size: int) -> None:
    """The kernel's own segments of the same super-packet are the same, to the byte."""
    whole = SUPERS[name]
    mine = split(whole.pack(partial=True), whole.vnet(size), 1500)
    if whole.protocol == UDP and len(mine) > 64:
        pytest.skip("the kernel makes no more datagrams of one")
    assert machine.forward([(whole.vnet(size), farther(whole).pack(partial=True))], len(mine)) == mine


def test_ecn_as_the_kernel_does(machine: Router) -> None:
    whole = Packet(**V4, payload=DATA[:4000], flags=ACK | CWR | ECE | PSH | FIN)
    header = whole.vnet(1000, TCP4 | ECN)
    mine = split(whole.pack(partial=True), header, 1500)
    assert machine.forward([(header, farther(whole).pack(partial=True))], 4) == mine


@pytest.mark.parametrize("name", SUPERS)
def test_checksums_as_the_kernel_does(machine: Router, name: str) -> None:
    one = replace(SUPERS[name], payload=DATA[:1001])
    header = vnet(NEEDS_CHECKSUM, NONE, 0, 0, one.start(), 6 if one.protocol == UDP else 16)
    assert machine.forward([(header, farther(one).pack(partial=True))], 1) == split(one.pack(partial=True), header, 1500)


@pytest.mark.parametrize("size", [8, 100, 536, 1400])
@pytest.mark.parametrize("name", [name for name in SUPERS if "options" not in name])
def test_the_kernel_takes_back_what_was_merged(machine: Router, name: str, size: int) -> None:
    """It accepts every super-packet that is made, and segments it into what came in."""
    whole = replace(SUPERS[name], flags=ACK | PSH)
    ones = whole.segments(size)
    c = Coalescer()
    ready = [out for one in ones for out in c.add(farther(one).pack())] + c.flush()
    assert len(ready) < len(ones) / 20 + 3 and c.merged == len(ones) - len(ready)
    found = machine.forward([(header, packet) for _, header, packet in ready], len(ones))
    assert found == [one.pack() for one in ones]


def test_a_constant_identification(machine: Router) -> None:
    """With DF it says nothing: such packets are merged, and the kernel numbers them."""
    ones = [replace(one, id=0).pack() for one in farther(SUPERS["udp4"]).segments(1000)]
    c = Coalescer()
    ready = [out for one in ones for out in c.add(one)] + c.flush()
    assert len(ready) == 1
    found = machine.forward([(header, packet) for _, header, packet in ready], len(ones))
    nearer = [replace(one, id=0).pack() for one in SUPERS["udp4"].segments(1000)]
    assert [without_id(one) for one in found] == [without_id(one) for one in nearer]


@pytest.fixture
def narrow(machine: Router) -> Iterator[Router]:
    machine.space.ip("link set out mtu 700")
    yield machine
    machine.space.ip("link set out mtu 1500", "addr replace fd08::fe/64 dev out nodad")


@pytest.mark.parametrize("options", [b"", bytes([0x9e, 4, 1, 2, 0x1e, 7, 1, 2, 3, 4, 5, 0])])
@pytest.mark.parametrize("length", [701, 1040, 1048, 1361, 1499])
def test_fragments_as_the_kernel_makes_them(narrow: Router, length: int, options: bytes) -> None:
    one = Packet(**V4, protocol=UDP, fragment=0, id=4711, ip_options=options, payload=DATA[:length - 28 - len(options)])
    verdict, mine = pmtu(one.pack(), 700)
    assert verdict == "fragments"
    assert narrow.forward([(vnet(), farther(one).pack())], len(mine)) == mine


def test_datagrams_arrive(machine: Router) -> None:
    """Merged, they are the socket's one by one; one whose checksum is wrong, in between, is the kernel's to drop."""
    whole = Packet(source="10.7.0.1", target="10.7.0.254", protocol=UDP, ports=(9, 4000), payload=DATA[:30 * 999 + 5])
    ones = [one.pack() for one in whole.segments(999)]
    bad = bytearray(ones[11])
    bad[500] ^= 4
    errors = wrong_checksums(machine.space)
    c = Coalescer()
    ready = [out for one in (*ones[:11], bytes(bad), *ones[12:]) for out in c.add(one)] + c.flush()
    assert len(ready) == 3
    with machine.space.socket(socket.AF_INET, socket.SOCK_DGRAM) as taker:
        taker.bind(("10.7.0.254", 4000))
        taker.settimeout(20)
        for _, header, packet in ready:
            machine.inside.write(header, packet)
        assert [taker.recv(2000) for _ in range(30)] == [one[28:] for k, one in enumerate(ones) if k != 11]
    assert wrong_checksums(machine.space) == errors + 1


def wrong_checksums(space: Space) -> int:
    def read() -> int:
        with open("/proc/thread-self/net/snmp", encoding="ascii") as file:
            names, values = [line.split() for line in file if line.startswith("Udp:")]
        return int(values[names.index("InCsumErrors")])

    return space.do(read)


@pytest.mark.parametrize(("family", "target", "limit"), [
    (socket.AF_INET, "10.8.0.77", 1000), (socket.AF_INET, "10.8.0.78", 576), (socket.AF_INET6, "fd08::77", 1300),
    (socket.AF_INET6, "fd08::78", 1280)])
def test_the_kernel_believes_the_news(machine: Router, family: socket.AddressFamily, target: str, limit: int) -> None:
    """A socket that never fragments learns the path's MTU from them."""
    v4 = family == socket.AF_INET
    level, get = (socket.IPPROTO_IP, IP_MTU) if v4 else (socket.IPPROTO_IPV6, IPV6_MTU)
    with machine.space.socket(family, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(level, IP_MTU_DISCOVER if v4 else IPV6_MTU_DISCOVER, PMTUDISC_DO)
        sender.connect((target, 4242))
        assert sender.getsockopt(level, get) == 1500
        sender.send(bytes(1400))
        wanted = socket.inet_pton(family, target)
        [(header, packet)] = machine.outside.packets(1, lambda one: wanted in (one[16:20], one[24:40]))
        assert header == bytes(10) and right(packet)
        verdict, [news] = pmtu(packet, limit)
        assert verdict == "news"
        machine.outside.write(vnet(), news)
        assert sender.getsockopt(level, get) == limit


class Cable(threading.Thread):
    """Carries everything between two devices, both ways, as plain packets of at most mtu bytes: split here, merged there.
    One in `spoil` has a bit changed behind its addresses and ports."""

    def __init__(self, ends: tuple[Tun, Tun], mtu: int, spoil: int = 0) -> None:
        super().__init__()
        self.ends, self.mtu, self.spoil = ends, mtu, spoil
        self.random = random.Random(spoil)
        self.made = (Coalescer(), Coalescer())
        self.supers = self.packets = self.spoiled = 0
        self.ending = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.ending:
                ready, _, _ = select.select([end.fd for end in self.ends], [], [], 0.05)
                for k in (0, 1):
                    if self.ends[k].fd in ready:
                        self.carry(self.ends[k], self.ends[1 - k], self.made[k])
        except BaseException as error:
            self.failure = error

    def carry(self, giver: Tun, taker: Tun, c: Coalescer) -> None:
        found = []
        for _ in range(16):
            one = giver.read()
            if one is None:
                break
            header, packet = one
            elements = split(packet, header, self.mtu)
            self.supers += header[1] != NONE
            self.packets += len(elements)
            for element in elements:
                assert len(element) <= self.mtu
                if self.spoil and len(element) > 100 and self.random.randrange(self.spoil) == 0:
                    at = self.random.randrange(44, len(element))
                    element = element[:at] + bytes([element[at] ^ 1 << self.random.randrange(8)]) + element[at + 1:]
                    self.spoiled += 1
                found += c.add(element)
        found += c.flush()
        for _, header, packet in found:
            taker.write(header, packet)

    def __enter__(self) -> Cable:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending = True
        self.join()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def pair() -> Iterator[tuple[Space, Space]]:
    with Space() as left, Space() as right:
        yield left, right


def lay(pair: tuple[Space, Space], mtu: int, spoil: int = 0) -> Cable:
    ends = []
    for k, space in enumerate(pair, 1):
        end = space.tun("net0", ALL_OFFLOADS)
        space.ip(f"link set net0 mtu {mtu}", f"addr add 10.9.0.{k}/24 dev net0")
        if mtu >= 1280:
            space.ip(f"addr add fd09::{k}/64 dev net0 nodad")
        ends.append(end)
    return Cable((ends[0], ends[1]), mtu, spoil)


@pytest.mark.parametrize(("family", "target", "mtu", "spoil"), [
    (socket.AF_INET, "10.9.0.2", 1500, 0), (socket.AF_INET6, "fd09::2", 1500, 0), (socket.AF_INET, "10.9.0.2", 576, 0),
    (socket.AF_INET, "10.9.0.2", 9000, 0), (socket.AF_INET, "10.9.0.2", 65000, 0), (socket.AF_INET6, "fd09::2", 1280, 0),
    (socket.AF_INET, "10.9.0.2", 1500, 300), (socket.AF_INET6, "fd09::2", 1500, 300)])
def test_a_tcp_stream(pair: tuple[Space, Space], family: socket.AddressFamily, target: str, mtu: int, spoil: int) -> None:
    """16 MiB each way arrive as they were sent, by super-packets on both sides; also where packets are spoilt on the way:
    no checksum of theirs becomes right."""
    data = random.Random(1).randbytes(1 << 20) * (2 if spoil else 16)
    found: dict[str, str] = {}

    def take(name: str, end: socket.socket) -> None:
        digest, left = hashlib.sha256(), len(data)
        while left and (piece := end.recv(1 << 18)):
            digest.update(piece)
            left -= len(piece)
        found[name] = digest.hexdigest()

    with (lay(pair, mtu, spoil) as cable, pair[0].socket(family, socket.SOCK_STREAM) as dialler,
          pair[1].do(lambda: socket.create_server((target, 5001), family=family)) as listener):
        dialler.settimeout(60)
        listener.settimeout(60)
        dialler.connect((target, 5001))
        answerer, _ = listener.accept()
        with answerer:
            answerer.settimeout(60)
            threads = [threading.Thread(target=take, args=("there", answerer)),
                       threading.Thread(target=take, args=("back", dialler)),
                       threading.Thread(target=answerer.sendall, args=(data,))]
            for thread in threads:
                thread.start()
            dialler.sendall(data)
            for thread in threads:
                thread.join()
    digest = hashlib.sha256(data).hexdigest()
    assert found == {"there": digest, "back": digest}
    if spoil:
        assert cable.spoiled > 5
        assert cable.made[0].rejected + cable.made[1].rejected > 0
    elif mtu < 60000:
        assert cable.supers > 0 and cable.packets > cable.supers
        assert cable.made[0].supers > 0 and cable.made[0].merged > 0
        assert cable.made[0].rejected == cable.made[1].rejected == 0


@pytest.mark.parametrize(("family", "target"), [(socket.AF_INET, "10.9.0.2"), (socket.AF_INET6, "fd09::2")])
def test_udp_in_super_packets(pair: tuple[Space, Space], family: socket.AddressFamily, target: str) -> None:
    """A sender's UDP_SEGMENT (USO), datagram by datagram; ordinary ones between."""
    with (lay(pair, 1500) as cable, pair[0].socket(family, socket.SOCK_DGRAM) as giver,
          pair[1].socket(family, socket.SOCK_DGRAM) as taker):
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        taker.bind((target, 5002))
        taker.settimeout(0.2)
        for _ in range(100):        # links and addresses take their time
            giver.connect((target, 5002))
            giver.send(b"ready?")
            with contextlib.suppress(TimeoutError):
                taker.recv(2000)
                break
        with contextlib.suppress(TimeoutError):
            while taker.recv(2000) == b"ready?":
                pass
        taker.settimeout(20)
        for k in range(20):
            giver.setsockopt(UDP, UDP_SEGMENT, 1200)
            giver.send(DATA[k:k + 24000 + k])
            giver.setsockopt(UDP, UDP_SEGMENT, 0)
            giver.send(DATA[:k])
            got = [taker.recv(2000) for _ in range(20 + (k > 0) + 1)]
            assert got == [DATA[k:k + 24000 + k][at:at + 1200] for at in range(0, 24000 + k, 1200)] + [DATA[:k]]
    assert cable.supers == 20
    assert cable.made[0].merged >= 20 * 19
