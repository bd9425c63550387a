"""The network engines on a socket pair in place of a device: the three framings to the byte, and hostile elements.

Elements that stand here as text were typed by hand from docs/protocol.md. No test here needs root.
"""

from __future__ import annotations

import mmap
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from helpers import eventually
from net_peer import PROTOCOL, SOLO5, Endpoint, eth_element, ipv4, ipv6, net_element, udp
from peer import ChannelReader, ChannelWriter, Result

from muenfast._marks import MarkTable
from muenfast._net import FRAMINGS, Ports, Receiver, Sender, element_size, packet_room
from muenfast.errors import UsageError

BELL = 4096
A4, B4 = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
A6, B6 = bytes.fromhex("fd00" + "0" * 27 + "1"), bytes.fromhex("fd00" + "0" * 27 + "2")


class Device:
    """One end of a socket pair that keeps packets apart stands in for a TUN device; the test has the other one."""

    def __init__(self, *, offload: bool = False, way: str = "", entries: int = 100) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.ours, self.theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.theirs.setblocking(False)
        self.ours.settimeout(20)
        self.ports = Ports(MarkTable(entries), offload)
        self.ports.add(0, self.fd, way)

    @property
    def fd(self) -> int:
        return self.theirs.fileno()

    def got(self) -> bytes:
        return self.ours.recv(1 << 17)

    def nothing(self) -> bool:
        self.ours.setblocking(False)
        try:
            self.ours.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.ours.settimeout(20)
        return False

    def close(self) -> None:
        self.ports.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def device() -> Iterator[Device]:
    one = Device()
    yield one
    one.close()


class Files:
    """Regions that are plain files: for both engines and plain peers."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._open: list[mmap.mmap] = []

    def map(self, size: int, *, writable: bool) -> mmap.mmap:
        with open(self.path, "r+b" if writable else "rb") as file:
            one = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        self._open.append(one)
        return one


@pytest.fixture
def files(tmp_path: object) -> Iterator[Callable[[str, int], Files]]:
    made: list[Files] = []

    def make(name: str, size: int) -> Files:
        path = f"{tmp_path}/{name}"
        with open(path, "wb") as file:
            file.truncate(size)
        made.append(Files(path))
        return made[-1]

    yield make
    for each in made:
        for one in each._open:
            one.close()


@contextmanager
def running(engine: Sender | Receiver) -> Iterator[list[str]]:
    """The engine in a thread of its own; its events but ticks."""
    events: list[str] = []

    def run() -> None:
        while (event := engine.run(0.05)) != "stopped":
            if event != "tick":
                events.append(event)
            if event in ("broken", "gone"):
                time.sleep(0.01)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield events
    finally:
        engine.stop()
        thread.join()
        engine.close()


def region(size: int, elements: int) -> int:
    return 64 + size * elements


# ---- sizes

@pytest.mark.parametrize(("framing", "mtu", "size", "room"), [
    ("raw", 1500, 1500, 1500), ("net_hdr", 1500, 1508, 1500), ("eth_dev", 1500, 1516, 1514),
    ("raw", 68, 68, 68), ("net_hdr", 65535, 65543, 65535), ("eth_dev", 9000, 9016, 9014)])
def test_sizes_of_elements(framing: str, mtu: int, size: int, room: int) -> None:
    """Origin: docs/protocol.md: mtu, mtu + 8, mtu + 14 + 2; Solo5's 1516."""
    assert element_size(framing, mtu) == size and packet_room(framing, mtu) == room


# ---- the framings, to the byte

# Origin of each: the table of net_hdr (mark u32, length u16, protocol u8, qos u8, little-endian), the packet, zeros.
IPV4 = ("45 b8 00 1c  00 01 00 00  40 11 00 00  0a 00 00 01  0a 00 00 02"     # TOS 0xb8: DSCP 46; 28 bytes in all
        "00 07 00 07 00 08 00 00")                                           # UDP without data
IPV6 = ("6b 80 00 00  00 08 11 40  fd 00 00 00 00 00 00 00 00 00 00 00 00 00 00 01"     # traffic class 0xb8
        "fd 00 00 00 00 00 00 00 00 00 00 00 00 00 00 02  00 07 00 07 00 08 00 00")
FRAME = "ff ff ff ff ff ff  02 00 00 00 00 01  08 06  00 01 08 00 06 04 00 01"     # the beginning of an ARP request
ELEMENTS = {
    # framing, mtu, what the device has, the element
    "net_hdr IPv4": ("net_hdr", 68, IPV4, "00 00 00 00  1c 00  04  2e" + IPV4 + "00" * 40),
    "net_hdr IPv6": ("net_hdr", 68, IPV6, "00 00 00 00  30 00  29  2e" + IPV6 + "00" * 20),
    "eth_dev": ("eth_dev", 68, FRAME, FRAME + "00" * 60 + "16 00"),
    "raw, short": ("raw", 68, "00 00 88 b5" + "01 02 03", "01 02 03" + "00" * 65),
    "raw, all of it": ("raw", 68, "00 00 88 b5" + "ab" * 68, "ab" * 68),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_packet_becomes_an_element(name: str, device: Device, files: Callable[[str, int], Files]) -> None:
    framing, mtu, packet, element = ELEMENTS[name]
    size = element_size(framing, mtu)
    file = files("out", region(size, 16))
    sender = Sender(device.ports, file.map(region(size, 16), writable=True), framing=framing, mtu=mtu, protocol=PROTOCOL)
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        reader = ChannelReader(file.path, PROTOCOL, size)
        assert reader.read()[0] == Result.EPOCH_CHANGED
        device.ours.send(bytes.fromhex(packet))
        assert eventually(lambda: reader.read()[1]) == bytes.fromhex(element)
        length = len(bytes.fromhex(packet)) - (4 if framing == "raw" else 0)
        counters = eventually(lambda: sender.counters["tx_packets"] and sender.counters)
        assert (counters["tx_packets"], counters["tx_bytes"], counters["tx_dropped"]) == (1, length, 0)
        reader.close()


@pytest.mark.parametrize("name", ELEMENTS)
def test_an_element_becomes_a_packet(name: str, device: Device, files: Callable[[str, int], Files]) -> None:
    framing, mtu, packet, element = ELEMENTS[name]
    size = element_size(framing, mtu)
    file = files("in", region(size, 16))
    writer = ChannelWriter(file.path, size, PROTOCOL)
    receiver = Receiver(device.ports, file.map(region(size, 16), writable=False), framing=framing, mtu=mtu,
                        protocol=PROTOCOL)
    with running(receiver) as events:
        writer.activate()
        eventually(lambda: receiver.connected)
        writer.write(bytes.fromhex(element))
        expected = bytes.fromhex(packet) if framing != "raw" else bytes(4) + bytes.fromhex(element)
        assert device.got() == expected
        eventually(lambda: receiver.counters["rx_packets"] == 1)
        writer.deactivate()
        eventually(lambda: not receiver.connected)
    assert events == ["connected", "disconnected"]
    writer.close()


def test_what_is_no_ip_is_dropped_and_counted(device: Device, files: Callable[[str, int], Files]) -> None:
    """Also what is cut short before a header's end, and what is longer than an element; others go on."""
    size = element_size("net_hdr", 100)
    file = files("out", region(size, 16))
    sender = Sender(device.ports, file.map(region(size, 16), writable=True), framing="net_hdr", mtu=100, protocol=PROTOCOL)
    sender.link(True)
    good = ipv4(A4, B4, 17, udp(1, 2, b"good"))
    with running(sender):
        eventually(lambda: sender.active)
        reader = ChannelReader(file.path, PROTOCOL, size)
        reader.read()
        for packet in (b"\x50" * 40, b"\x45", b"\x45" + bytes(18), b"\x60" + bytes(38), good + bytes(101 - len(good)),
                       bytes.fromhex("45") + bytes(9000), good):
            device.ours.send(packet)
        assert eventually(lambda: reader.read()[1]) == net_element(good, size)
        counters = eventually(lambda: sender.counters["tx_packets"] and sender.counters)
        assert counters["tx_packets"] == 1 and counters["tx_dropped"] == 6
        assert counters["lost"] == {"oversize": 2, "not_ip": 4, "malformed": 0, "path_mtu": 0, "no_peer": 0, "down": 0,
                                      "untaken": 0}
        reader.close()


def test_no_byte_of_an_earlier_packet_goes_out(device: Device, files: Callable[[str, int], Files]) -> None:
    """The ring's slots are used again and again, by long packets and by short ones."""
    size = element_size("net_hdr", 1000)
    file = files("out", region(size, 8))
    sender = Sender(device.ports, file.map(region(size, 8), writable=True), framing="net_hdr", mtu=1000, protocol=PROTOCOL)
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        reader = ChannelReader(file.path, PROTOCOL, size)
        reader.read()
        for turn in range(40):
            packet = ipv4(A4, B4, 17, udp(1, 2, bytes([turn]) * (960 if turn % 3 else turn)))
            device.ours.send(packet)
            assert eventually(lambda: reader.read()[1]) == net_element(packet, size)
        reader.close()


def test_a_mark_that_stands_there_is_kept(files: Callable[[str, int], Files]) -> None:
    """The kernel prepended net_hdr: its mark is the packet's; all else is as the packet says, its stale length, too."""
    size = element_size("net_hdr", 100)
    file = files("out", region(size, 16))
    device = Device(way="front")
    sender = Sender(device.ports, file.map(region(size, 16), writable=True), framing="net_hdr", mtu=100, protocol=PROTOCOL)
    sender.link(True)
    packet = ipv4(A4, B4, 17, udp(1, 2, b"x"), tos=0x84)
    with running(sender):
        eventually(lambda: sender.active)
        reader = ChannelReader(file.path, PROTOCOL, size)
        reader.read()
        device.ours.send(struct.pack("<IHBB", 0xFFFFFFFE, 64000, 4, 33) + packet)
        element = eventually(lambda: reader.read()[1])
        assert element == struct.pack("<IHBB", 0xFFFFFFFE, len(packet), 4, 33) + packet + bytes(100 - len(packet))
        device.ours.send(bytes(8) + bytes(100))     # no IP, behind a header that says nothing
        device.ours.send(b"\0\0\0")
        device.ours.send(bytes(8) + packet[:-1])    # cut short
        eventually(lambda: sender.counters["lost"]["malformed"] == 1)
        assert sender.counters["lost"]["not_ip"] == 2
        reader.close()
    device.close()


# ---- hostile elements

def _net(mark: int = 0, length: int = 28, protocol: int = 4, packet: bytes = b"") -> bytes:
    return (struct.pack("<IHBB", mark, length, protocol, 0) + packet).ljust(108, b"\xee")


GOOD = ipv4(A4, B4, 17, udp(1, 2, b""))
FULL = ipv4(A4, B4, 17, udp(1, 2, bytes(72)))
HOSTILE_NET = {
    # an element, and what counts it
    "nothing at all": (bytes(108), "protocol"),
    "IPv4 of length 0": (_net(packet=b"\x45\0\0\0" + GOOD[4:]), "length"),
    "IPv4 of length 19": (_net(packet=b"\x45\0\0\x13" + GOOD[4:]), "length"),
    "IPv4 of length 65535": (_net(packet=b"\x45\0\xff\xff" + GOOD[4:]), "length"),
    "IPv4 one byte beyond the element": (_net(packet=b"\x45\0\0\x65" + GOOD[4:]), "length"),
    "IPv4 whose header is cut short": (_net(packet=b"\x44" + GOOD[1:]), "length"),
    "IPv4 whose header is longer than it is": (_net(packet=b"\x4f" + GOOD[1:]), "length"),
    "IPv6 one byte beyond the element": (_net(protocol=41, packet=ipv6(A6, B6, 17, b"")[:4] + b"\0\x3d" +
                                              ipv6(A6, B6, 17, b"")[6:]), "length"),
    "IPv6 of length 65535": (_net(protocol=41, packet=ipv6(A6, B6, 17, b"")[:4] + b"\xff\xff" +
                                  ipv6(A6, B6, 17, b"")[6:]), "length"),
    "IPv4 said to be IPv6": (_net(protocol=41, packet=GOOD), "protocol"),
    "IPv6 said to be IPv4": (_net(protocol=4, packet=ipv6(A6, B6, 17, b"")), "protocol"),
    "IP of version 5": (_net(packet=b"\x55" + GOOD[1:]), "protocol"),
    "protocol 0": (_net(protocol=0, packet=GOOD), "protocol"),
}


@pytest.mark.parametrize("name", HOSTILE_NET)
def test_a_malformed_packet_is_counted_and_goes_nowhere(name: str, device: Device,
                                                        files: Callable[[str, int], Files]) -> None:
    element, cause = HOSTILE_NET[name]
    file = files("in", region(108, 16))
    writer = ChannelWriter(file.path, 108, PROTOCOL)
    writer.activate()
    receiver = Receiver(device.ports, file.map(region(108, 16), writable=False), framing="net_hdr", mtu=100,
                        protocol=PROTOCOL)
    with running(receiver):
        eventually(lambda: receiver.connected)
        writer.write_many([element, net_element(GOOD, 108), element, net_element(FULL, 108)])
        assert device.got() == GOOD and device.got() == FULL
        assert device.nothing()
        counters = eventually(lambda: receiver.counters["rx_packets"] == 2 and receiver.counters)
        assert counters["rx_frame_errors"] == counters["rx_errors"] == counters["lost"][cause] == 2
        assert counters["rx_bytes"] == len(GOOD) + len(FULL)
    writer.close()


@pytest.mark.parametrize("length", [0, 29, 64000, 65535])
def test_the_packets_own_header_tells_its_length(length: int, device: Device, files: Callable[[str, int], Files]) -> None:
    """What net_hdr says of it is not looked at."""
    file = files("in", region(108, 16))
    writer = ChannelWriter(file.path, 108, PROTOCOL)
    writer.activate()
    receiver = Receiver(device.ports, file.map(region(108, 16), writable=False), framing="net_hdr", mtu=100,
                        protocol=PROTOCOL)
    with running(receiver):
        eventually(lambda: receiver.connected)
        writer.write(_net(length=length, packet=GOOD))
        assert device.got() == GOOD
    writer.close()


@pytest.mark.parametrize("length", [0, 13, 115, 116, 65535])
def test_a_frame_of_impossible_length_is_counted(length: int, device: Device, files: Callable[[str, int], Files]) -> None:
    file = files("in", region(116, 16))
    writer = ChannelWriter(file.path, 116, SOLO5)
    writer.activate()
    receiver = Receiver(device.ports, file.map(region(116, 16), writable=False), framing="eth_dev", mtu=100, protocol=SOLO5)
    frames = [bytes(range(14)), bytes(range(114))]
    with running(receiver):
        eventually(lambda: receiver.connected)
        writer.write(b"\xaa" * 114 + struct.pack("<H", length))
        writer.write_many([eth_element(frame, 116) for frame in frames])
        assert [device.got(), device.got()] == frames
        assert receiver.counters["rx_frame_errors"] == 1
    writer.close()


def test_a_header_of_another_kind_is_refused(device: Device, files: Callable[[str, int], Files]) -> None:
    """Another MTU, another protocol; once it fits, packets come."""
    file = files("in", region(116, 16))
    receiver = Receiver(device.ports, file.map(region(116, 16), writable=False), framing="net_hdr", mtu=100,
                        protocol=PROTOCOL)
    with running(receiver) as events:
        for size, protocol in ((107, PROTOCOL), (108, 3)):
            writer = ChannelWriter(file.path, size, protocol)
            writer.activate()
            eventually(lambda: events.count("incompatible") >= (1 if size == 107 else 2))
            assert receiver.fault[:2] == (protocol, size) and not receiver.connected
            writer.close()
        writer = ChannelWriter(file.path, 108, PROTOCOL)
        writer.activate()
        eventually(lambda: receiver.connected)
        writer.write(net_element(GOOD, 108))
        assert device.got() == GOOD
        writer.close()


def test_an_overrun_is_counted_and_survived(device: Device, files: Callable[[str, int], Files]) -> None:
    file = files("in", region(108, 8))
    writer = ChannelWriter(file.path, 108, PROTOCOL)
    writer.activate()
    receiver = Receiver(device.ports, file.map(region(108, 8), writable=False), framing="net_hdr", mtu=100,
                        protocol=PROTOCOL)
    assert receiver.run(0) == "connected"
    for _ in range(5):
        writer.write_many([net_element(GOOD, 108)] * 4)
    assert receiver.run(0) == "overrun"
    assert (receiver.counters["rx_over_errors"], receiver.counters["lost"]["overrun"]) == (1, 20)
    writer.write(net_element(GOOD, 108))
    with running(receiver):
        assert device.got() == GOOD
    writer.close()


def test_a_truncated_region_is_survived(device: Device, files: Callable[[str, int], Files]) -> None:
    """Both directions end with "broken" where the memory is taken away, and never the process."""
    size = region(4096, 16)
    file = files("x", size)
    sender = Sender(device.ports, file.map(size, writable=True), framing="net_hdr", mtu=4088, protocol=PROTOCOL)
    receiver = Receiver(device.ports, file.map(size, writable=False), framing="net_hdr", mtu=4088, protocol=PROTOCOL)
    sender.link(True)
    with running(sender) as sent, running(receiver) as received:
        eventually(lambda: receiver.connected)
        with open(file.path, "r+b") as region_file:
            region_file.truncate(0)
        device.ours.send(GOOD)
        eventually(lambda: "broken" in sent and "broken" in received)
        assert sender.broken and receiver.broken
        with open(file.path, "r+b") as region_file:     # for what is unmapped later
            region_file.truncate(size)


# ---- the link

def test_each_time_up_is_an_epoch_of_its_own(device: Device, files: Callable[[str, int], Files]) -> None:
    """Down is epoch 0; what the device still had then is counted; down and up at once is a new epoch all the same."""
    file = files("out", region(108, 16))
    sender = Sender(device.ports, file.map(region(108, 16), writable=True), framing="net_hdr", mtu=100, protocol=PROTOCOL)
    with running(sender) as events, Endpoint(file.path, None, "net_hdr", 100) as end:
        assert not sender.active
        device.ours.send(GOOD)      # kept: it is for the epoch to come
        sender.link(True)
        end.until(lambda: len(end.seen) == 1)
        sender.link(False)
        end.until(lambda: end.results[-1] == Result.INACTIVE)
        eventually(lambda: events[-1] == "down")
        sender.link(True)
        end.until(lambda: end.results[-1] == Result.EPOCH_CHANGED)
        for _ in range(3):
            sender.link(False)
            sender.link(True)
        eventually(lambda: sender.counters["epochs"] >= 3 and events[-1] == "up")
        device.ours.send(GOOD)
        end.until(lambda: len(end.seen) == 2)
        assert end.seen == [net_element(GOOD, 108)] * 2
        sender.link(True)           # no news
        assert sender.counters["tx_packets"] == 2
    assert not sender.active


def test_without_a_channel_all_is_dropped_and_counted(device: Device) -> None:
    sender = Sender(device.ports, None, framing="net_hdr", mtu=100)
    sender.link(True)
    with running(sender):
        for _ in range(3):
            device.ours.send(GOOD)
        eventually(lambda: sender.counters["lost"]["no_peer"] == 3)
        assert sender.counters["tx_dropped"] == 3 and not sender.active and sender.elements == 0


# ---- the reader's progress

class Bell:
    """The words of a bell that a reader writes: docs/protocol.md."""

    RC, EPOCH = 8, 9    # of 64 bits

    def __init__(self, memory: mmap.mmap) -> None:
        self.words = memoryview(memory).cast("Q")

    def __setitem__(self, word: int, value: int) -> None:
        self.words[word] = value

    def close(self) -> None:
        self.words.release()


@contextmanager
def told(device: Device, files: Callable[[str, int], Files]) -> Iterator[tuple[Sender, Bell, int]]:
    """A sender of 16 elements that runs, the bell by which its reader tells that it is at the first one, and the epoch."""
    file, bell_file = files("out", region(108, 16)), files("bell", BELL)
    bell_map = bell_file.map(BELL, writable=True)
    sender = Sender(device.ports, file.map(region(108, 16), writable=True), framing="net_hdr", mtu=100, protocol=PROTOCOL,
                    bell=bell_map)
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        bell = Bell(bell_map)
        with open(file.path, "rb") as header:
            epoch = struct.unpack_from("<Q", header.read(64), 8)[0]
        bell[Bell.RC], bell[Bell.EPOCH] = 0, epoch
        yield sender, bell, epoch
        bell.close()


def test_a_reader_that_tells_is_waited_for(device: Device, files: Callable[[str, int], Files]) -> None:
    """Nothing is overrun then; a reader that takes nothing is given up, one that tells nonsense is not waited for."""
    with told(device, files) as (sender, bell, _):
        for _ in range(40):
            device.ours.send(GOOD)
        eventually(lambda: sender.counters["waits"] >= 1)
        assert 12 <= sender.counters["tx_packets"] < 16
        bell[Bell.RC] = 8
        eventually(lambda: 16 < sender.counters["tx_packets"] < 24)
        assert sender.counters["given_up"] == 0
        eventually(lambda: sender.counters["given_up"] == 1)    # nothing moves for a while
        eventually(lambda: sender.counters["tx_packets"] == 40)
        bell[Bell.RC] = 1 << 63
        for _ in range(40):
            device.ours.send(GOOD)
        eventually(lambda: sender.counters["tx_packets"] == 80)
        assert sender.counters["given_up"] == 1


def test_what_a_reader_took_back_is_not_news(device: Device, files: Callable[[str, int], Files]) -> None:
    """One that goes to and fro is given up as one that stands; one that comes to where another one stood has its time."""
    with told(device, files) as (sender, bell, epoch):
        for _ in range(15):
            device.ours.send(GOOD)
        eventually(lambda: sender.counters["waits"] == 1)
        bell[Bell.EPOCH] = epoch ^ 1    # it leaves, and nothing is sent for longer than it would have been waited for
        time.sleep(0.4)
        before, begin = sender.counters["given_up"], time.monotonic()
        bell[Bell.EPOCH] = epoch
        eventually(lambda: sender.counters["given_up"] == before + 1)
        assert time.monotonic() - begin >= 0.3 and sender.counters["tx_packets"] == 15
        bell[Bell.RC] = 4               # one that takes something is waited for again, and goes back
        for _ in range(25):
            device.ours.send(GOOD)

        def to_and_fro() -> bool:
            bell[Bell.RC] = 3
            time.sleep(0.002)
            bell[Bell.RC] = 4
            return sender.counters["given_up"] == before + 2

        eventually(to_and_fro)
        eventually(lambda: sender.counters["tx_packets"] == 40)
        assert sender.counters["given_up"] == before + 2


def test_what_is_not_taken_at_the_end_is_counted(device: Device, files: Callable[[str, int], Files]) -> None:
    """Of a reader that tells how far it is, after a moment in which it may still take it; nothing of any other."""
    file, bell_file = files("out", region(108, 64)), files("bell", BELL)
    bell_map = bell_file.map(BELL, writable=True)
    sender = Sender(device.ports, file.map(region(108, 64), writable=True), framing="net_hdr", mtu=100, protocol=PROTOCOL,
                    bell=bell_map)
    bell = Bell(bell_map)
    with running(sender):
        for turn, (tells, taken, untaken) in enumerate(((True, 0, 10), (True, 7, 13), (True, 10, 13), (False, 0, 13),
                                                        (True, 11, 13), (True, 1 << 63, 13))):
            sender.link(True)
            eventually(lambda: sender.active)
            with open(file.path, "rb") as header:
                epoch = struct.unpack_from("<Q", header.read(64), 8)[0]
            bell[Bell.RC], bell[Bell.EPOCH] = taken, epoch if tells else epoch ^ 1
            for _ in range(10):
                device.ours.send(GOOD)
            eventually(lambda: sender.counters["tx_packets"] == 10 * (turn + 1))
            sender.link(False)
            eventually(lambda: not sender.active)
            eventually(lambda: sender.counters["lost"]["untaken"] == untaken)
    bell.close()


def test_a_reader_may_go_unheard(device: Device, files: Callable[[str, int], Files]) -> None:
    file, bell_file = files("out", region(108, 16)), files("bell", BELL)
    bell_map = bell_file.map(BELL, writable=True)
    sender = Sender(device.ports, file.map(region(108, 16), writable=True), framing="net_hdr", mtu=100, protocol=PROTOCOL,
                    bell=bell_map, pressed=False)
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        bell = Bell(bell_map)
        with open(file.path, "rb") as header:
            bell[Bell.EPOCH] = struct.unpack_from("<Q", header.read(64), 8)[0]
        for _ in range(40):
            device.ours.send(GOOD)
        eventually(lambda: sender.counters["tx_packets"] == 40)
        assert sender.counters["waits"] == 0
        bell.close()


def test_two_engines_carry_everything(device: Device, files: Callable[[str, int], Files]) -> None:
    """Through a small ring, with a bell: every packet, in order."""
    other = Device()
    file, bell_file = files("out", region(108, 16)), files("bell", BELL)
    sender = Sender(device.ports, file.map(region(108, 16), writable=True), framing="net_hdr", mtu=100, protocol=PROTOCOL,
                    bell=bell_file.map(BELL, writable=True))
    receiver = Receiver(other.ports, file.map(region(108, 16), writable=False), framing="net_hdr", mtu=100,
                        protocol=PROTOCOL, bell=bell_file.map(BELL, writable=True))
    sender.link(True)
    try:
        with running(receiver), running(sender):
            eventually(lambda: receiver.connected)
            for number in range(2000):
                packet = ipv4(A4, B4, 17, udp(1, 2, struct.pack("<I", number)))
                device.ours.send(packet)
                if number % 4 == 3:     # the socket pair holds a few only
                    for k in range(number - 3, number + 1):
                        assert other.got()[28:] == struct.pack("<I", k)
            eventually(lambda: receiver.counters["rx_packets"] == sender.counters["tx_packets"] == 2000)
            assert sum(receiver.counters["batches"]) <= 2000 and receiver.counters["rx_errors"] == 0
    finally:
        other.close()


# ---- misuse

def test_misuse_is_refused(device: Device, files: Callable[[str, int], Files]) -> None:
    file = files("x", region(108, 2))
    memory = file.map(region(108, 2), writable=True)
    other = Device(offload=True)
    for more in ({"framing": "net", "mtu": 100}, {"framing": "net_hdr", "mtu": 67}, {"framing": "raw", "mtu": 65536},
                 {"framing": "eth_dev", "mtu": 100, "ports": other.ports}, {"framing": "net_hdr", "mtu": 1000}):
        with pytest.raises(UsageError):
            Sender(more.pop("ports", device.ports), memory, protocol=PROTOCOL, **more)    # type: ignore[arg-type]
    sender = Sender(device.ports, memory, framing="net_hdr", mtu=100, protocol=PROTOCOL)
    with pytest.raises(UsageError, match="once"):
        Sender.__init__(sender, device.ports, memory, framing="net_hdr", mtu=100, protocol=PROTOCOL)
    sender.close()
    sender.close()
    with pytest.raises(UsageError, match="closed"):
        sender.run(0)
    other.close()
    assert set(FRAMINGS) == {"raw", "net_hdr", "eth_dev"}
