"""CRC-32C of the elements of network channels: as test_checksums.py has it for blocks. No test here needs root."""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import compiled, eventually
from net_peer import PROTOCOL, checked, eth_element, ipv4, net_element, udp
from peer import EPOCH, RESERVED, ChannelReader, ChannelWriter, Result
from sums import ACCEPT, crc32c, flip
from test_net_frames import A4, B4, Device, Files, device, files, region, running
from test_net_offload import super_packet

from muenfast import UsageError
from muenfast._net import Receiver, Sender, element_size
from muenfast.net import interfaces_from_lists

__all__ = ["device", "files"]   # fixtures

GOOD = ipv4(A4, B4, 17, udp(1, 2, b"data"))
MTU = 100
SUM = 4     # bytes
BELL = 4096
READER_RC, READER_EPOCH, READER_SUMS = 64, 72, 80


def sealed(element: bytes, covered: int, number: int, epoch: int) -> bytes:
    """With its checksum: of so many bytes of it, and then of that number, its own and the epoch."""
    return element + struct.pack("<I", crc32c(element[:covered] + struct.pack("<QQQ", covered, number, epoch)))


class SummedWriter(ChannelWriter):
    """Writes elements of 4 bytes more, and says so in the header."""

    def activate(self, epoch: int | None = None) -> int:
        found = super().activate(epoch)
        self._words[EPOCH] = 0
        self._words[RESERVED] = ACCEPT
        self._words[EPOCH] = found
        return found


def framed(framing: str, packet: bytes) -> tuple[bytes, int]:
    """An element, and how much of it counts."""
    if framing == "net_hdr":
        return net_element(packet, MTU + 8), 8 + len(packet)
    if framing == "eth_dev":
        return eth_element(packet, MTU + 16), len(packet)
    return packet.ljust(MTU, b"\0"), MTU


def delivered(framing: str, packet: bytes) -> bytes:
    """What a device gets."""
    return bytes(4) + packet.ljust(MTU, b"\0") if framing == "raw" else packet


@contextmanager
def receiving(device: Device, file: Files, length: int, framing: str, mode: str, *, merge: tuple[str, ...] = (),
              bell: mmap.mmap | None = None) -> Iterator[Receiver]:
    receiver = Receiver(device.ports, file.map(length, writable=False), framing=framing, mtu=MTU, protocol=PROTOCOL,
                        checksum=mode, merge=merge, bell=bell)
    with running(receiver):
        yield receiver


@pytest.fixture
def bell() -> Iterator[mmap.mmap]:
    page = mmap.mmap(-1, BELL)
    page[:8] = b"MuenBELL"
    yield page
    page.close()


def sums_of(bell: mmap.mmap) -> int:
    return int.from_bytes(bell[READER_SUMS:READER_SUMS + 4], "little")


@pytest.mark.parametrize("framing", ["net_hdr", "eth_dev", "raw"])
def test_an_element_with_its_checksum(framing: str, device: Device, files: Callable[[str, int], Files]) -> None:
    """The bytes are those that docs/protocol.md has, element after element."""
    size = element_size(framing, MTU) + SUM
    length = region(size, 16)
    file = files("out", length)
    sender = Sender(device.ports, file.map(length, writable=True), framing=framing, mtu=MTU, protocol=PROTOCOL,
                    checksum="require")
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        assert sender.checksum == "agreed" and sender.elements == 16
        reader = ChannelReader(file.path, PROTOCOL, size)
        reader.read()
        assert reader._words[RESERVED] == ACCEPT
        for number in range(40):
            packet = ipv4(A4, B4, 17, udp(1, 2, bytes([number]) * (number % 60)))
            device.ours.send(bytes(4) + packet if framing == "raw" else packet)
            element, covered = framed(framing, packet)
            assert eventually(lambda: reader.read()[1]) == sealed(element, covered, number, reader._epoch)
        reader.close()


def test_each_segment_of_a_super_packet_has_its_own(files: Callable[[str, int], Files]) -> None:
    size = element_size("net_hdr", 576) + SUM
    length = region(size, 16)
    file, device, payload = files("out", length), Device(offload=True), bytes(range(250)) * 10
    sender = Sender(device.ports, file.map(length, writable=True), framing="net_hdr", mtu=576, protocol=PROTOCOL,
                    checksum="require")
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        reader = ChannelReader(file.path, PROTOCOL, size)
        reader.read()
        device.ours.send(super_packet(4, payload, 500))
        found = b""
        for number in range(5):
            element = eventually(lambda: reader.read()[1])
            packet = element[8:8 + int.from_bytes(element[4:6], "little")]
            assert element == sealed(net_element(packet, size - SUM), 8 + len(packet), number, reader._epoch)
            assert checked(packet)
            found += packet[40:]
        assert found == payload
        reader.close()
    device.close()


@pytest.mark.parametrize(("framing", "merge"), [("net_hdr", ()), ("net_hdr", ("udp", "tcp4")), ("eth_dev", ()),
                                                ("raw", ())])
def test_no_byte_of_an_element_can_change(framing: str, merge: tuple[str, ...],
                                          files: Callable[[str, int], Files]) -> None:
    """Each that is wrong is dropped and counted by what is found; those beside it come through."""
    size = element_size(framing, MTU) + SUM
    length = region(size, 16)
    file = files("in", length)
    device = Device(offload=bool(merge))
    head = 10 if merge else 0   # virtio_net_hdr, of the device
    writer = SummedWriter(file.path, size, PROTOCOL, length)
    with receiving(device, file, length, framing, "auto", merge=merge) as receiver:
        receiver.conduct.patience = 0
        epoch = writer.activate()
        eventually(lambda: receiver.connected)
        assert receiver.checksum == "agreed"
        element, covered = framed(framing, GOOD)
        places = [*range(covered), *range(size - SUM, size)]
        if framing == "eth_dev":
            places += range(size - SUM - 2, size - SUM)
        for at in places:
            writer.write_many([flip(sealed(element, covered, writer.wc, epoch), at),
                               sealed(element, covered, writer.wc + 1, epoch)])
            assert device.got()[head:] == delivered(framing, GOOD), at
        assert device.nothing()
        counters = eventually(lambda: receiver.counters["rx_packets"] == len(places) and receiver.counters)
        lost = counters["lost"]
        assert lost["checksum"] + lost["length"] + lost["protocol"] == len(places) == counters["rx_frame_errors"]
        assert lost["checksum"] >= len(places) - 8
        assert receiver.conduct.offences == {name: lost[name] for name in ("length", "protocol", "checksum")}
    writer.close()
    device.close()


def test_what_is_whole_but_not_in_its_place(device: Device, files: Callable[[str, int], Files]) -> None:
    """Elements of another number, of another epoch, and with no checksum at all."""
    size = element_size("net_hdr", MTU) + SUM
    length = region(size, 16)
    file = files("in", length)
    writer = SummedWriter(file.path, size, PROTOCOL, length)
    with receiving(device, file, length, "net_hdr", "require") as receiver:
        old = writer.activate()
        element, covered = framed("net_hdr", GOOD)
        eventually(lambda: receiver.connected)
        writer.write(sealed(element, covered, 1, old))
        writer.write(sealed(element, covered, 1, old ^ 1))
        writer.write(element + bytes(4))
        eventually(lambda: receiver.counters["lost"]["checksum"] == 3)
        writer.write(sealed(element, covered, 3, old))
        assert device.got() == GOOD and device.nothing()
    writer.close()


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_a_plain_writer_is_heard(mode: str, device: Device, files: Callable[[str, int], Files]) -> None:
    size = element_size("net_hdr", MTU)
    length = region(size, 16)
    file = files("in", length)
    writer = ChannelWriter(file.path, size, PROTOCOL, length)
    with receiving(device, file, length, "net_hdr", mode) as receiver:
        writer.activate()
        eventually(lambda: receiver.connected)
        writer.write(net_element(GOOD, size))
        assert device.got() == GOOD
        assert receiver.checksum == ("off" if mode == "off" else "plain")
    writer.close()


@pytest.mark.parametrize(("mode", "writer"), [("require", ChannelWriter), ("off", SummedWriter), ("auto", "unsaid")])
def test_a_channel_that_is_not_taken(mode: str, writer: type[ChannelWriter] | str, device: Device,
                                     files: Callable[[str, int], Files]) -> None:
    """A plain one where they are required; one with checksums where there are none; one of that size that says nothing."""
    size = element_size("net_hdr", MTU) + (0 if writer is ChannelWriter else SUM)
    length = region(size, 16)
    file = files("in", length)
    one = (ChannelWriter if isinstance(writer, str) else writer)(file.path, size, PROTOCOL, length)
    with receiving(device, file, length, "net_hdr", mode) as receiver:
        one.activate()
        eventually(lambda: receiver.fault[1] == size and (mode != "require" or receiver.checksum == "refused"))
        one.write(bytes(size))
        time.sleep(0.1)
        assert not receiver.connected and receiver.counters["rx_frame_errors"] == 0
    one.close()


def test_a_plain_reader_sees_no_other_byte(device: Device, files: Callable[[str, int], Files], bell: mmap.mmap) -> None:
    """Whose bell says nothing, or that has none."""
    size = element_size("net_hdr", MTU)
    length = region(size, 16)
    regions = []
    for mode, page in (("off", bell), ("auto", bell), ("auto", None)):
        file = files(f"out-{mode}-{page is None}", length)
        sender = Sender(device.ports, file.map(length, writable=True), framing="net_hdr", mtu=MTU, protocol=PROTOCOL,
                        checksum=mode, bell=page)
        sender.link(True)
        with running(sender):
            eventually(lambda sender=sender: sender.active)
            reader = ChannelReader(file.path, PROTOCOL, size)
            reader.read()
            for number in range(20):
                device.ours.send(ipv4(A4, B4, 17, udp(1, 2, bytes([number]))))
                eventually(lambda reader=reader: reader.read()[0] == Result.SUCCESS)
            with open(file.path, "rb") as whole:
                data = whole.read()
            regions.append(data[:8] + data[16:])
            reader.close()
    assert regions[0] == regions[1] == regions[2]


def test_two_of_ours_agree(files: Callable[[str, int], Files], bell: mmap.mmap) -> None:
    """By the bell: as soon as a reader that takes them is there; no longer once it has gone; anew with the next one."""
    length = region(element_size("net_hdr", MTU), 64)
    file = files("ring", length)
    here, there = Device(), Device()
    sender = Sender(here.ports, file.map(length, writable=True), framing="net_hdr", mtu=MTU, protocol=PROTOCOL, bell=bell,
                    checksum="auto")
    sender.link(True)

    def through() -> bool:
        here.ours.send(GOOD)
        there.ours.settimeout(0.2)
        try:
            return there.got() == GOOD
        except TimeoutError:
            return False

    with running(sender):
        eventually(lambda: sender.active)
        assert sender.checksum == "plain"
        for mode, word in (("auto", "agreed"), ("off", "plain"), ("require", "agreed"), ("auto", "agreed")):
            with receiving(there, file, length, "net_hdr", mode, bell=bell) as receiver:
                eventually(lambda word=word: sender.checksum == word)
                eventually(through)
                for _ in range(5):
                    assert through()
                if mode != "off":
                    assert receiver.checksum == word
                assert not any(receiver.conduct.offences.values())
            assert sums_of(bell) == 0
    here.close()
    there.close()


def test_a_plain_reader_after_one_that_was_killed(device: Device, files: Callable[[str, int], Files],
                                                  bell: mmap.mmap) -> None:
    """What that left in the bell is believed for a second; then it is plain."""
    size = element_size("net_hdr", MTU)
    length = region(size, 16)
    file = files("out", length)
    bell[READER_SUMS] = 1
    sender = Sender(device.ports, file.map(length, writable=True), framing="net_hdr", mtu=MTU, protocol=PROTOCOL, bell=bell,
                    checksum="auto")
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        assert sender.checksum == "agreed"
        eventually(lambda: sender.checksum == "plain", 5)
        assert sums_of(bell) == 0
        reader = ChannelReader(file.path, PROTOCOL, size)
        reader.read()
        device.ours.send(GOOD)
        assert eventually(lambda: reader.read()[1]) == net_element(GOOD, size)
        reader.close()


def test_a_reader_that_says_now_this_now_that(device: Device, files: Callable[[str, int], Files], bell: mmap.mmap) -> None:
    """Costs itself an epoch each, few in a second."""
    length = region(element_size("net_hdr", MTU), 16)
    file = files("out", length)
    sender = Sender(device.ports, file.map(length, writable=True), framing="net_hdr", mtu=MTU, protocol=PROTOCOL, bell=bell,
                    checksum="auto")
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        dice, end = random.Random(1), time.monotonic() + 1
        while time.monotonic() < end:
            bell[READER_SUMS:READER_SUMS + 4] = struct.pack("<I", dice.choice((0, 1, 2, 0xFFFFFFFF)))
            device.ours.send(GOOD)
            time.sleep(0.0005)
        assert 1 < sender.counters["epochs"] < 10
        assert sender.counters["tx_packets"] > 100


def test_a_region_that_is_too_small(device: Device, files: Callable[[str, int], Files], bell: mmap.mmap) -> None:
    """For an element with a checksum: required, that is refused; else it is done without."""
    length = region(element_size("net_hdr", MTU), 1)
    file = files("out", length)
    bell[READER_SUMS] = 1
    options = {"framing": "net_hdr", "mtu": MTU, "protocol": PROTOCOL, "bell": bell}
    with pytest.raises(UsageError, match="too small"):
        Sender(device.ports, file.map(length, writable=True), checksum="require", **options)
    sender = Sender(device.ports, file.map(length, writable=True), checksum="auto", **options)
    sender.link(True)
    with running(sender):
        eventually(lambda: sender.active)
        assert sender.checksum == "plain" and sender.elements == 1


def test_how_it_is_asked_for() -> None:
    [config] = interfaces_from_lists("net9", checksum="require")
    assert config.checksum == "require"
    with pytest.raises(UsageError, match="checksum 'maybe': is one of off, auto, require"):
        interfaces_from_lists("net9", checksum="maybe")


def test_what_stands_in_the_slot_is_not_believed(tmp_path: Path) -> None:
    """A length that changed between the look at it and the checksum: nothing beyond the element is read."""
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}     # of `make ubsan`
    run = subprocess.run([compiled("frames", tmp_path, "-O1", "-g", "-fsanitize=address,undefined")], capture_output=True,
                         text=True, check=False, env=alone)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
