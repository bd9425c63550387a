"""A peer that rings a bell as fast as it can, a million times a second, by itself: what sleeps there soon listens no more,
and looks a thousand times a second or two; it works for its honest neighbours meanwhile, loses nothing, and rings nobody
else's bell for it.

Counts are compared: sleeps with the time that they had and what was published, and the sequences of other bells with what
was published there.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import block, compiled, eventually
from net_peer import PROTOCOL, ipv4, net_element, udp
from peer import channel_path
from test_net_frames import BELL, Device, Files, device, files, region, running

from muenfast import BlockDevice, BlockServer, exports_from_lists
from muenfast._net import Receiver, Sender, element_size
from muenfast._ring import bell_state

__all__ = ["device", "files"]   # fixtures

pytestmark = pytest.mark.stress
BLOCK, ROUNDS = 4096, 150
ENOUGH = 2000       # rings
STORM = 0.5         # s without work
IN_VAIN = 100       # rings in a tenth of a second that wake somebody for nothing (docs/decisions/023)
A4, B4 = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))


@pytest.fixture(scope="module")
def ringer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("ringer", tmp_path_factory.mktemp("ringer"), "-O2")


@dataclass
class Storm:
    """What came of one, once it is over. rings: by the ringer. looks: most that there may have been without data: wake-ups
    in vain, and sleeps that ended by themselves, each of which lasts a millisecond or more, but for some in the first
    millisecond behind data."""

    rings: int = 0
    looks: int = 0


@contextmanager
def storm(program: Path, bell: str) -> Iterator[Storm]:
    """While the block runs, and for STORM behind it."""
    found, begin = Storm(), time.monotonic()
    process = subprocess.Popen([program, bell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield found
        time.sleep(STORM)       # who had work had no reason to sleep
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    found.rings = int(said)
    found.looks = int((1000 + 10 * IN_VAIN) * (time.monotonic() - begin)) + 1000
    assert found.rings >= ENOUGH, found


def rung(path: str) -> int:
    """How often a bell was rung."""
    state = bell_state(Path(path).read_bytes())
    assert state is not None
    return int(state["sequence"])


class Pair:
    """A server with two exports in one thread, and a client of each."""

    def __init__(self, names: Callable[[str], str], stack: ExitStack) -> None:
        self.req, self.resp = [names("a-req"), names("b-req")], [names("a-resp"), names("b-resp")]
        self.server = BlockServer(exports_from_lists(",".join(self.req), ",".join(self.resp), device="ram:1M,ram:1M"),
                                  threads=1)
        stack.callback(self.server.close)
        self.clients = [BlockDevice(req, resp, on_peer_loss="fail") for req, resp in zip(self.req, self.resp, strict=True)]
        for client in self.clients:
            stack.callback(client.close)

    def work(self) -> None:
        """Each client's data comes back, in an order in which each waits for its server and the other one."""
        for number in range(ROUNDS):
            for who, client in enumerate(self.clients):
                i = (number * 7 + who) % 256
                client.pwrite(block(number * 2 + who), i * BLOCK)
                assert client.pread(BLOCK, i * BLOCK) == block(number * 2 + who)

    def bells(self) -> dict[str, int]:
        return {name: rung(channel_path(name) + ".bell") for name in self.req + self.resp}

    def counted(self, what: str) -> list[int]:
        """Of the server's exports, then of the clients."""
        return [*(int(entry["counters"][what]) for entry in self.server.status()),
                *(int(client.client.counters[what]) for client in self.clients)]


@pytest.mark.parametrize("side", ["request", "response"])
def test_a_bell_of_a_block_connection(names: Callable[[str], str], ringer: Path, side: str) -> None:
    """The first connection's, at its server or its client; the other one is its neighbour, and at the server in one thread
    with it."""
    with ExitStack() as stack:
        pair = Pair(names, stack)
        pair.work()
        attacked, victims = (pair.req[0], (0, 1)) if side == "request" else (pair.resp[0], (2,))
        sleeps, wakes, reads, writes = (pair.counted(what) for what in ("sleeps", "wakes", "reads", "writes"))
        bells = pair.bells()
        with storm(ringer, channel_path(attacked) + ".bell") as over:
            pair.work()
        after = pair.bells()
        done = [reads, writes]
        for before, now in zip(done, [pair.counted("reads"), pair.counted("writes")], strict=True):
            assert [b - a for a, b in zip(before, now, strict=True)] == [ROUNDS] * 4
        assert pair.counted("lost") == pair.counted("overruns") == [0] * 4
        # Nobody is rung more often than something was published for him.
        rang = [b - a for a, b in zip(wakes, pair.counted("wakes"), strict=True)]
        assert all(count <= 2 * ROUNDS for count in rang), rang
        for name in bells:
            assert after[name] - bells[name] <= 2 * ROUNDS + (over.rings if name == attacked else 0), name
        # Nor does anybody look more often than for data, for what he still listens to, or having lain down by himself.
        slept = [b - a for a, b in zip(sleeps, pair.counted("sleeps"), strict=True)]
        assert all(count <= over.looks + 4 * 2 * ROUNDS for count in slept), (slept, over)
        assert all(slept[who] > IN_VAIN for who in victims), (slept, over)


def test_a_bell_of_a_channel_that_is_not_active(names: Callable[[str], str], ringer: Path, tmp_path: Path) -> None:
    """An export with a thread of its own, which has a watch, and nobody has ever written its requests: the ringer alone is
    there. Nothing says that this bell is rung in earnest."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    req, resp = [names("a-req"), names("b-req")], [names("a-resp"), names("b-resp")]
    devices = ",".join(str(tmp_path / name) for name in ("a", "b"))
    with BlockServer(exports_from_lists(",".join(req), ",".join(resp), device=devices)) as server:
        before = [int(entry["counters"]["sleeps"]) for entry in server.status()]
        with storm(ringer, channel_path(req[0]) + ".bell") as over:
            pass
        slept = [int(entry["counters"]["sleeps"]) - then for entry, then in zip(server.status(), before, strict=True)]
    assert all(count <= over.looks for count in slept), (slept, over)


def test_a_bell_of_a_network_interface(device: Device, files: Callable[[str, int], Files], ringer: Path) -> None:
    """At the receiver; and its interface's own sender rings nobody for it."""
    size, mtu = element_size("net_hdr", 200), 200
    inward, outward = files("in", region(size, 512)), files("out", region(size, 64))
    bell, other = files("in.bell", BELL), files("out.bell", BELL)
    far = Device()
    try:
        sender = Sender(far.ports, inward.map(region(size, 512), writable=True), framing="net_hdr", mtu=mtu,
                        protocol=PROTOCOL, bell=bell.map(BELL, writable=True))
        back = Sender(device.ports, outward.map(region(size, 64), writable=True), framing="net_hdr", mtu=mtu,
                      protocol=PROTOCOL, bell=other.map(BELL, writable=True))
        receiver = Receiver(device.ports, inward.map(region(size, 512), writable=False), framing="net_hdr", mtu=mtu,
                            protocol=PROTOCOL, bell=bell.map(BELL, writable=True))
        for each in (sender, back):
            each.link(True)
        with running(sender), running(back), running(receiver) as events:
            eventually(lambda: sender.active and back.active and receiver.connected)
            sleeps, wakes, quiet = receiver.counters["sleeps"], sender.counters["wakes"], rung(other.path)
            with storm(ringer, bell.path) as over:
                for number in range(ROUNDS):
                    packet = ipv4(A4, B4, 17, udp(7, 7, number.to_bytes(4, "big")))
                    assert net_element(packet, size)[8:8 + len(packet)] == packet
                    far.ours.send(packet)
                    assert device.got() == packet
            counters = eventually(lambda: receiver.counters["rx_packets"] == ROUNDS and receiver.counters)
            assert counters["rx_errors"] == counters["rx_dropped"] == 0 and sum(counters["lost"].values()) == 0
            assert IN_VAIN < counters["sleeps"] - sleeps <= over.looks + 4 * ROUNDS, (counters, over)
            assert sender.counters["wakes"] - wakes <= ROUNDS and sender.counters["tx_packets"] == ROUNDS
            assert rung(other.path) == quiet and back.counters["tx_packets"] == 0
        assert events == ["connected"]
    finally:
        far.close()
