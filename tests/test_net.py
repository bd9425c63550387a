"""`muenfast net` as its user meets it: interfaces in network namespaces of the test's own, and all that may happen to them.

Needs root, TUN devices and iproute2.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import PREFIX, Program, leftovers, run, unique
from helpers import eventually
from net_peer import MAC, SOLO5, Endpoint, checked, ipv4, net_element, udp
from peer import ChannelReader, Result

import muenfast
from muenfast import tuntap
from muenfast.errors import UsageError
from muenfast.names import ask
from muenfast.netns import inside, named

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="needs TUN devices"),
    pytest.mark.skipif(shutil.which("ip") is None or shutil.which("ping") is None, reason="needs ip (iproute2) and ping"),
]

Start = Callable[..., Program]
HERE = Path(__file__).parent
_numbers = itertools.count()
_LEAST = 68     # bytes: the smallest MTU of a TUN device


class Space:
    """A network namespace."""

    def __init__(self) -> None:
        self.name = f"{PREFIX}{next(_numbers)}"
        self._started: list[subprocess.Popen[str]] = []
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.ip("link", "set", "lo", "up")

    def ip(self, *words: str) -> str:
        return subprocess.run(["ip", "-n", self.name, *words], capture_output=True, text=True, check=True).stdout

    def link(self, name: str = "net0") -> dict[str, Any] | None:
        """What `ip` says of an interface, None: it is not there."""
        done = subprocess.run(["ip", "-n", self.name, "-j", "-s", "link", "show", "dev", name], capture_output=True,
                              text=True, check=False)
        return json.loads(done.stdout)[0] if done.returncode == 0 else None

    def carrier(self, name: str = "net0") -> bool:
        found = self.link(name)
        assert found is not None
        return "UP" in found["flags"] and "NO-CARRIER" not in found["flags"]

    def inside(self, *words: str) -> list[str]:
        """A command of that namespace. By `ip netns exec` it would get a copy of all mounts, too, and keep other tests'
        devices busy until its end."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        self._started.append(subprocess.Popen(self.inside(*words), stdout=subprocess.PIPE, text=True))
        return self._started[-1]

    def ping(self, address: str, *words: str, count: int = 1, wait: float = 5) -> bool:
        return subprocess.run(self.inside("ping", "-n", "-q", "-c", str(count), "-i", "0.05", "-W", str(wait), *words,
                                          address), stdout=subprocess.DEVNULL, check=False).returncode == 0

    def program(self, *words: str) -> subprocess.Popen[str]:
        """net_program.py, once it is ready."""
        started = self.start(sys.executable, str(HERE / "net_program.py"), *words)
        assert started.stdout is not None and started.stdout.readline() == "ready\n"
        return started

    def close(self) -> None:
        for each in self._started:
            each.kill()
            each.wait()
            assert each.stdout is not None
            each.stdout.close()
        subprocess.run(["ip", "netns", "del", self.name], check=True)


def told(process: subprocess.Popen[str]) -> str:
    """What a program printed at its end."""
    assert process.stdout is not None
    out = process.stdout.read()     # communicate() would miss what came with the line before
    assert process.wait(60) == 0
    return out.strip()


@pytest.fixture
def spaces() -> Iterator[Callable[[], Space]]:
    made: list[Space] = []

    def make() -> Space:
        made.append(Space())
        return made[-1]

    yield make
    for space in made:
        space.close()


class Pair:
    """Two namespaces joined by `muenfast net` on both sides: net0 has 10.9.0.1 and fd09::1 on side 0, .2 on side 1."""

    def __init__(self, program: Start, spaces: Callable[[], Space], *words: str) -> None:
        self.spaces = spaces(), spaces()
        self.channels = unique("there"), unique("back")
        self.words = words
        self.start = program
        self.programs: list[Program | None] = [None, None]

    def run(self, side: int, *words: str) -> Program:
        inp, out = self.channels if side else self.channels[::-1]
        self.programs[side] = one = self.start("net", "--name", "net0", "--in", inp, "--out", out, "--netns",
                                               self.spaces[side].name, *self.addresses(side), "--up", *self.words, *words)
        return one

    def addresses(self, side: int) -> list[str]:
        """IPv6 wants an MTU of 1280; a raw interface has no addresses."""
        if "" in self.words:
            return []
        return ["--addr", f"10.9.0.{side + 1}/24" + ("" if "576" in self.words else f"+fd09::{side + 1}/64")]

    def both(self) -> Pair:
        self.run(0)
        self.run(1)
        eventually(lambda: all(space.carrier() for space in self.spaces))
        return self

    def answers(self, seconds: float = 20) -> None:
        """Traffic flows, soon."""
        eventually(lambda: self.spaces[0].ping("10.9.0.2", wait=0.2), seconds)

    def end(self, *, killed: Mapping[int, Sequence[int]] | None = None) -> None:
        """killed: processes that a side's program is to have warned of, in order."""
        for side, one in enumerate(self.programs):
            assert one is not None
            status, said = one.end()
            assert (status, said.splitlines()) == (0, [
                f"muenfast: interface net0: its peer, process {pid}, was killed: nothing comes until it is started again"
                for pid in (killed or {}).get(side, ())])

    def kill(self, side: int) -> int:
        """The other side, which keeps its carrier, misses it; its process."""
        one, other = self.programs[side], self.programs[1 - side]
        assert one is not None and other is not None
        one.end(signal.SIGKILL)
        eventually(lambda: [entry["peer"] for entry in shown() if entry["pid"] == other.pid] == [None])
        assert self.spaces[1 - side].carrier()
        return one.pid


@pytest.fixture
def pair(program: Start, spaces: Callable[[], Space]) -> Callable[..., Pair]:
    return lambda *words: Pair(program, spaces, *words)


def shown(name: str = "net0") -> list[dict[str, Any]]:
    done = run("net", "show", "--json", name)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


# ---- the two of them


def test_two_namespaces_are_joined(pair: Callable[..., Pair], tmp_path: Path) -> None:
    """IPv4 and IPv6, both ways; counters agree with the kernel's; nothing is left."""
    before = leftovers(tmp_path)
    two = pair().both()
    here, there = two.spaces
    for one, space, (inp, out) in zip(two.programs, two.spaces, (two.channels[::-1], two.channels), strict=True):
        assert one is not None and one.lines == [f"interface net0 {inp} {out} 1508 net_hdr 1500 netns {space.name}"]
    assert here.ping("10.9.0.2", count=5) and there.ping("10.9.0.1", count=5)
    assert here.ping("fd09::2") and there.ping("fd09::1")
    assert here.ping("10.9.0.2", "-s", "1472", "-M", "do") and not here.ping("10.9.0.2", "-s", "1473", "-M", "do", wait=1)
    assert here.ping("10.9.0.2", "-s", "60000") and here.ping("fd09::2", "-s", "60000")
    entries = {entry["pid"]: entry for entry in shown()}
    for one, space in zip(two.programs, two.spaces, strict=True):
        assert one is not None
        entry, link = entries[one.pid], space.link()
        assert link is not None and link["mtu"] == 1500
        assert set(link["flags"]) >= {"POINTOPOINT", "NOARP", "MULTICAST", "UP"}
        counters, kernel = entry["counters"], link["stats64"]
        assert (counters["rx_packets"], counters["rx_bytes"]) == (kernel["rx"]["packets"], kernel["rx"]["bytes"])
        # The kernel counts what it hands out: net_hdr, too.
        assert (counters["tx_packets"], counters["tx_bytes"] + 8 * counters["tx_packets"]) == \
            (kernel["tx"]["packets"], kernel["tx"]["bytes"])
        assert not any(counters[name] for name in ("rx_errors", "rx_over_errors", "rx_frame_errors", "rx_dropped",
                                                   "tx_dropped"))
        assert (entry["state"], entry["carrier"], entry["flags"]) == ("up", True, "net_hdr")
        assert entry["writer"]["active"] and entry["reader"]["active"] and entry["writer"]["elements"] >= 256
    two.end()
    assert here.link() is None and there.link() is None
    left = leftovers(tmp_path)
    assert left["shared memory"] == before["shared memory"] and left["book-keeping"] == before["book-keeping"]


def test_what_answers_at_once_is_sent_by_who_brought_it(pair: Callable[..., Pair]) -> None:
    """Echoes in quick succession both ways: none is lost, doubled or counted twice, whichever thread sent them; then the
    interfaces go down and up under that, and go on."""
    two = pair().both()
    here, there = two.spaces

    def shell(space: Space, line: str) -> str:
        return subprocess.run(space.inside("sh", "-c", line), capture_output=True, text=True, timeout=60,
                              check=False).stdout

    for _ in range(3):
        assert "3000 received" in shell(here, "ping -f -q -c 3000 10.9.0.2") and here.ping("10.9.0.2")
        assert "1000 received" in shell(there, "ping -f -q -c 1000 fd09::1")
    for one, entry in ((space, entry) for entry in shown() for program, space in zip(two.programs, two.spaces, strict=True)
                       if program is not None and program.pid == entry["pid"]):
        link = one.link()
        assert link is not None and entry["counters"]["tx_packets"] == link["stats64"]["tx"]["packets"]
        assert entry["counters"]["rx_packets"] == link["stats64"]["rx"]["packets"]
        assert sum(entry["sent"]["lost"].values()) == 0
    assert any(entry["sent"]["echoes"] > 100 for entry in shown())
    with here.start("timeout", "10", "ping", "-f", "-q", "10.9.0.2") as ping:
        for _ in range(8):
            time.sleep(0.1)
            there.ip("link", "set", "net0", "down")
            there.ip("link", "set", "net0", "up")
        ping.terminate()
        ping.communicate()
    eventually(lambda: here.ping("10.9.0.2", wait=1))
    two.end()


def test_what_show_says(pair: Callable[..., Pair]) -> None:
    """The fields of the module's info file; with -s its counters and the causes of losses."""
    two = pair().both()
    text = run("net", "show", "net0").stdout
    for part in ("net0: up, carrier", "  in/out: ", "  mtu: 1500", "  flags: net_hdr", "  poll: adaptive",
                 "  writer is enabled", "  writer.element_size: 1508", "  reader is enabled",
                 "  reader.element_size: 1508"):
        assert text.count(part) == 2, part
    assert "stats." not in text
    text = run("net", "show", "-s").stdout
    for part in ("  stats.rx_packets: ", "  stats.rx_over_errors: 0", "  stats.rx_frame_errors: 0", "  stats.tx_bytes: ",
                 "  sent.lost.oversize: 0", "  received.lost.overrun: 0"):
        assert text.count(part) == 2, part
    assert run("stat", "--json").returncode == 0 and run("stat").returncode == 0
    two.end()


@pytest.mark.parametrize("mtu", [576, 1500, 9000, 65000])
def test_tcp_and_fragments_of_any_mtu(mtu: int, pair: Callable[..., Pair]) -> None:
    """A stream arrives as it was sent, and datagrams longer than an element do; nothing is overrun, with bells."""
    two = pair("--mtu", str(mtu)).both()
    here, there = two.spaces
    addresses = ["10.9.0.2"] if mtu < 1280 else ["10.9.0.2", "fd09::2"]     # IPv6 needs 1280
    for address in addresses:
        server = there.program("serve", address, "5001")
        client = here.program("send", address, "5001", str(16 << 20), "7")
        assert told(client) == told(server)
        hearer = there.program("hear", address, "5002")
        assert told(here.program("say", address, "5002", "40000", "8")) == told(hearer)
    for entry in shown():
        assert entry["counters"]["rx_errors"] == entry["counters"]["tx_dropped"] == 0
    two.end()


def test_elements_on_the_wire_are_ordinary_packets(pair: Callable[..., Pair]) -> None:
    """What a third party reads of the channel under TCP: one packet each, padded with zeros, its checksums right."""
    two = pair("--size", "16M").both()    # more elements than there will be packets
    here, there = two.spaces
    reader = ChannelReader(two.channels[0], 2, 1508)
    server = there.program("serve", "10.9.0.2", "5001")
    client = here.program("send", "10.9.0.2", "5001", str(4 << 20), "7")
    assert told(client) == told(server)
    packets = 0
    while (found := reader.read())[0] != Result.NO_DATA:
        result, element = found
        assert result in (Result.EPOCH_CHANGED, Result.SUCCESS)
        if element is None:
            continue
        length, protocol = int.from_bytes(element[4:6], "little"), element[6]
        packet = element[8:8 + length]
        assert protocol == {4: 4, 6: 41}[packet[0] >> 4] and checked(packet)
        assert element[:4] == bytes(4) and element[7] == packet[1] >> 2 and not any(element[8 + length:])
        packets += 1
    assert packets > (4 << 20) // 1500
    reader.close()
    two.end()


# ---- coming and going


def test_down_and_up_at_random(pair: Callable[..., Pair]) -> None:
    """Down is no epoch and no carrier at the other side, up a new one; whatever the order, traffic flows afterwards."""
    two = pair().both()
    dice = random.Random(3)
    load = two.spaces[0].start("ping", "-q", "-i", "0.002", "10.9.0.2")
    state = [True, True]
    for _ in range(40):
        side = dice.randrange(2)
        state[side] = not state[side]
        two.spaces[side].ip("link", "set", "net0", "up" if state[side] else "down")
        time.sleep(dice.random() * 0.02)
    two.spaces[0].ip("link", "set", "net0", "down")
    two.spaces[1].ip("link", "set", "net0", "up")
    eventually(lambda: not two.spaces[1].carrier())
    assert [entry["carrier"] for entry in shown() if entry["netns"] == two.spaces[1].name] == [False]
    two.spaces[0].ip("link", "set", "net0", "up")
    two.spaces[0].ip("addr", "replace", "10.9.0.1/24", "dev", "net0")
    two.answers()
    load.send_signal(signal.SIGINT)
    load.communicate(timeout=20)
    two.end()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_either_side_may_end_and_return(side: int, number: int, pair: Callable[..., Pair]) -> None:
    """Killed or ended; the other one keeps its interface, and traffic flows again."""
    two = pair().both()
    two.answers()
    killed = []
    for _ in range(3):
        one, other = two.programs[side], two.programs[1 - side]
        assert one is not None and other is not None
        assert [entry["peer"] for entry in shown() if entry["pid"] == other.pid] == [one.pid]
        if number == signal.SIGTERM:
            one.end(number)
            eventually(lambda: not two.spaces[1 - side].carrier())
        else:
            killed.append(two.kill(side))
            assert "no process that is known here writes" in run("net", "show").stdout
        assert two.spaces[side].link() is None
        two.run(side)
        two.answers()
        eventually(lambda: all(entry["peer"] for entry in shown()))
    two.end(killed={1 - side: killed})


def test_a_peer_may_be_late(pair: Callable[..., Pair]) -> None:
    """No carrier until it is there, unless that was asked for."""
    two = pair()
    two.run(0)
    eventually(lambda: shown()[0]["state"] == "up")
    assert not two.spaces[0].carrier() and shown()[0]["writer"]["active"]
    assert not two.spaces[0].ping("10.9.0.2", wait=0.2)     # the kernel drops what there is no carrier for
    link = two.spaces[0].link()
    assert link is not None and shown()[0]["interface"]["queue_drops"] == link["stats64"]["tx"]["dropped"] > 0
    two.run(1, "--carrier", "up")
    two.answers()
    one = two.programs[0]
    assert one is not None and one.end() == (0, "")
    eventually(lambda: not [entry for entry in shown() if entry["reader"]["active"]])
    assert two.spaces[1].carrier()
    two.run(0)
    two.answers()
    two.end()


def test_who_joins_loses_nothing_that_was_others(pair: Callable[..., Pair]) -> None:
    """After a kill it goes on where the one before it was; beside another reader it is not waited for, and says so."""
    two = pair().both()
    assert two.spaces[0].ping("10.9.0.2", "-s", "1400", count=40, wait=5)
    serving = two.spaces[1].program("serve", "10.9.0.2", "5000")
    sending = two.spaces[0].program("send", "10.9.0.2", "5000", str(4 << 20), "5")
    assert told(serving) == told(sending)
    killed = two.kill(1)
    two.run(1)
    two.answers()
    [entry] = [entry for entry in shown() if two.programs[1] is not None and entry["pid"] == two.programs[1].pid]
    assert entry["received"]["lost"]["overrun"] < 50 and entry["counters"]["rx_over_errors"] == 0
    spy = two.start("net", "--name", "spy", "--in", two.channels[0], "--out", "", "--netns", two.spaces[1].name, "--up")
    serving = two.spaces[1].program("serve", "10.9.0.2", "5001")
    sending = two.spaces[0].program("send", "10.9.0.2", "5001", str(8 << 20), "6")
    assert told(serving) == told(sending)
    [entry] = [entry for entry in shown() if two.programs[1] is not None and entry["pid"] == two.programs[1].pid]
    assert entry["received"]["lost"]["overrun"] < 50
    status, errors = spy.end()
    assert status == 0 and "waits for another reader" in errors
    two.end(killed={0: [killed]})


def test_channels_that_were_made_anew_are_followed(pair: Callable[..., Pair]) -> None:
    """One side ends, its channels are removed, and it comes back with new ones of that name."""
    two = pair().both()
    killed = two.kill(1)
    for name in two.channels:
        assert run("chan", "rm", "--force", name).returncode == 0
    two.run(1)
    two.answers()
    two.end(killed={0: [killed]})


def test_a_stopped_peer_holds_nothing_up(pair: Callable[..., Pair]) -> None:
    """Its interface's other end goes on: what it does not take is lost, and counted by it."""
    two = pair("--size", "64K").both()
    two.answers()
    one = two.programs[1]
    assert one is not None
    os.kill(one.pid, signal.SIGSTOP)
    try:
        sender = two.spaces[0].start("ping", "-q", "-f", "10.9.0.2")
        eventually(lambda: [entry for entry in _asked(two.programs[0]) if entry["sent"]["given_up"]])
        sender.kill()
        sender.communicate()
    finally:
        os.kill(one.pid, signal.SIGCONT)
    two.answers()
    assert [entry for entry in shown() if entry["pid"] == one.pid][0]["counters"]["rx_over_errors"] == 1
    two.programs[0].end()   # type: ignore[union-attr]
    status, errors = one.end()
    assert status == 0 and "wrote more than the ring holds" in errors


def _asked(one: Program | None) -> list[dict[str, Any]]:
    from muenfast import control

    assert one is not None
    found: list[dict[str, Any]] = control.ask(one.pid, {"command": "status"})["interfaces"]
    return found


def test_a_strict_oneway_pair(pair: Callable[..., Pair]) -> None:
    """Nothing but the two channels is used, which are made before: no page that stands where a bell would; it polls."""
    two = pair("--strict-oneway", "--poll", "500")
    assert run("chan", "create", *two.channels, "--size", "2M").returncode == 0
    bells = [Path(f"/dev/shm/{name}.bell") for name in two.channels]
    try:
        for bell in bells:
            bell.write_bytes(bytes(4096))
        two.both()
        two.answers()
        for one in two.programs:
            assert one is not None
            mapped = {line.split()[-1]: line.split()[1] for line in Path(f"/proc/{one.pid}/maps").read_text().splitlines()
                      if line.split()[-1].removesuffix(".bell").removeprefix("/dev/shm/") in two.channels}
            assert sorted(mapped) == sorted(f"/dev/shm/{name}" for name in two.channels)
            assert sorted(mapped.values()) == ["r--s", "rw-s"]
        assert {entry["poll"] for entry in shown()} == {500}
        two.end()
        assert all(bell.read_bytes() == bytes(4096) for bell in bells)
    finally:
        assert run("chan", "rm", "--force", *two.channels).returncode == 0


# ---- the other framings


def test_ethernet(pair: Callable[..., Pair]) -> None:
    """ARP, multicast (neighbour discovery), a MAC that was given and one that changes, promiscuous mode, a bridge."""
    two = pair("--flags", "eth_dev")
    two.run(0, "--mac", "02:00:00:00:00:01")
    two.run(1)
    two.answers()
    here, there = two.spaces
    link = here.link()
    assert link is not None and link["address"] == "02:00:00:00:00:01" and link["link_type"] == "ether"
    other = there.link()
    assert other is not None and int(other["address"][:2], 16) & 3 == 2     # random, of a station, local
    eventually(lambda: here.ping("fd09::2", wait=0.5))
    assert here.ping("10.9.0.2", "-s", "1472", "-M", "do")
    there.ip("link", "set", "net0", "address", "02:00:00:00:00:77")
    here.ip("neigh", "flush", "dev", "net0")
    two.answers()
    there.ip("link", "set", "net0", "promisc", "on")
    there.ip("addr", "del", "10.9.0.2/24", "dev", "net0")
    there.ip("link", "add", "br0", "type", "bridge")
    there.ip("link", "set", "net0", "master", "br0")
    there.ip("addr", "add", "10.9.0.2/24", "dev", "br0")
    there.ip("link", "set", "br0", "up")
    two.answers()
    there.ip("link", "set", "net0", "nomaster")     # a port that left is no interface that was removed
    assert {entry["state"] for entry in shown()} == {"up"}
    two.end()


def test_raw(pair: Callable[..., Pair]) -> None:
    """Exactly mtu bytes of anything; shorter ones are padded with zeros."""
    two = pair("--flags", "").both()
    here, there = two.spaces
    for packet in (bytes(range(256)) * 5 + b"\x99" * 220, b"short"):
        sniffer = there.program("sniff", "net0", packet[:4].hex())
        told(here.program("raw", "net0", packet.hex()))
        assert told(sniffer) == packet.ljust(1500, b"\0").hex()
    two.end()


@pytest.mark.parametrize("flags", ["net_hdr", "eth_dev", "raw"])
def test_a_plain_endpoint(flags: str, program: Start, spaces: Callable[[], Space]) -> None:
    """One that knows the protocol only: answers ICMP, or ARP and ICMP, or sends everything back."""
    space = spaces()
    inp, out = unique("in"), unique("out")
    protocols = ["--reader-protocol", f"{SOLO5:x}", "--writer-protocol", f"{SOLO5:x}"] if flags == "eth_dev" else []
    one = program("net", "--name", "net0", "--in", inp, "--out", out, "--netns", space.name, "--up",
                  "--flags", flags if flags != "raw" else "", *protocols,
                  *(["--addr", "10.9.0.1/24" + ("+fd09::1/64" if flags == "net_hdr" else "")] if flags != "raw" else []))
    assert not space.carrier()
    with Endpoint(out, inp, flags, protocol=SOLO5 if flags == "eth_dev" else 2, address="10.9.0.2") as end, end.running():
        eventually(space.carrier)
        if flags == "raw":
            packet = b"what?" * 200
            sniffer = space.program("sniff", "net0", packet[:4].hex())
            told(space.program("raw", "net0", packet.hex()))
            assert told(sniffer) == packet.ljust(1500, b"\0").hex()
        else:
            assert space.ping("10.9.0.2", count=3)
            assert space.ping("10.9.0.2", "-s", "1400")
            if flags == "net_hdr":
                assert space.ping("fd09::2")
                assert space.ping("10.9.0.2", "-Q", "0xb8")
                assert end.seen[-1][7] == 46
            else:
                assert MAC.hex(":") in space.ip("neigh", "show", "dev", "net0")
    eventually(lambda: not space.carrier())
    assert one.end() == (0, "")


# ---- one way


def test_one_way_interfaces(program: Start, spaces: Callable[[], Space]) -> None:
    """One that only sends has a carrier always; one that only receives drops what is sent on it, and counts it."""
    space = spaces()
    out, inp = unique("out"), unique("in")
    one = program("net", "--name", "tx0,rx0", "--in", f",{inp}", "--out", f"{out},", "--netns", space.name, "--up",
                  "--addr", "10.1.0.1/24,10.2.0.1/24")
    assert [line.split()[:4] for line in one.lines] == [["interface", "tx0", "-", out], ["interface", "rx0", inp, "-"]]
    eventually(lambda: space.carrier("tx0"))
    assert not space.carrier("rx0")
    with Endpoint(out, inp, "net_hdr") as end:
        eventually(lambda: space.carrier("rx0"))
        assert not space.ping("10.1.0.2", wait=0.2)
        end.until(lambda: any(element[6] == 4 and element[8 + 9] == 1 for element in end.seen))
        hearer = space.program("hear", "10.2.0.1", "5001")
        packet = ipv4(bytes((10, 2, 0, 2)), bytes((10, 2, 0, 1)), 17, udp(9, 5001, b"one way"))
        assert end.writer is not None
        end.writer.write(net_element(packet, 1508))
        assert told(hearer).endswith(" 7")
        before = shown("rx0")[0]["counters"]["tx_dropped"]
        space.ping("10.2.0.2", count=2, wait=0.2)
        entry = eventually(lambda: (found := shown("rx0")[0])["counters"]["tx_dropped"] >= before + 2 and found)
        assert entry["sent"]["lost"]["no_peer"] == entry["counters"]["tx_dropped"] and not entry["writer"]["enabled"]
        assert shown("tx0")[0]["reader"] == {"enabled": False, "active": False, "element_size": 0, "protocol": 2,
                                              "checksum": "off"}
    assert one.end() == (0, "")


# ---- many, and what goes wrong


def test_many_interfaces_of_one_process(program: Start, spaces: Callable[[], Space]) -> None:
    """32, of which each finds its own peer."""
    here, there = spaces(), spaces()
    names = [f"n{k}" for k in range(32)]
    a, b = ([unique(f"{way}{k}") for k in range(32)] for way in "ab")
    started = []
    for space, inp, out, last in ((here, a, b, 1), (there, b, a, 2)):
        started.append(program(
            "net", "--name", ",".join(names), "--in", ",".join(inp), "--out", ",".join(out), "--netns", space.name, "--up",
            "--size", ",".join(["64K"] * 32), "--addr", ",".join(f"10.{k}.0.{last}/24" for k in range(32))))
    eventually(lambda: all(here.carrier(name) for name in names))
    for k in (0, 13, 31):
        assert here.ping(f"10.{k}.0.2")
    assert [one.end() for one in started] == [(0, "")] * 2


def test_it_is_all_or_nothing(program: Start, spaces: Callable[[], Space], tmp_path: Path) -> None:
    """A name that is taken, a channel that is held, a namespace that is not there: nothing stays of the others."""
    space = spaces()
    space.ip("link", "add", "net1", "type", "bridge")
    held = unique("held")
    writer = muenfast.open_writer(held, size=1508, protocol=2, region_size=1 << 19)
    before = leftovers(tmp_path)["shared memory"]
    inp, out = f"{unique('i')},{unique('j')}", f"{unique('o')},{unique('p')}"
    for called, namespace, there, expected in (
            ("net0,net1", space.name, out, ["--name, entry 1 'net1'", "already"]),
            ("net0,net2", space.name, f"{unique('o')},{held}", [f"--out, entry 1 '{held}'", "held by"]),
            ("net0,net2", f"{space.name},{PREFIX}none", out, ["--netns, entry 1", "no such network namespace"]),
            ("net0,net2", f"{space.name},/proc/self/ns/uts", out, ["--netns, entry 1", "not a network namespace"]),
            ("net0,net2", f"{space.name},/dev/zero", out, ["--netns, entry 1", "not a network namespace"])):
        done = run("net", "--name", called, "--netns", namespace, "--in", inp, "--out", there)
        assert (done.returncode, done.stdout) == (1, "")
        for part in expected:
            assert part in done.stderr
        assert space.link("net0") is None and leftovers(tmp_path)["shared memory"] == before
    writer.close()


def test_an_address_that_cannot_be_set_undoes_it(program: Start, spaces: Callable[[], Space], tmp_path: Path) -> None:
    """The kernel takes no group for an address."""
    space = spaces()
    done = run("net", "--name", "net0", "--in", unique("i"), "--out", unique("o"), "--netns", space.name, "--addr",
               "10.0.0.1/24+ff02::1/64")
    assert done.returncode == 1 and space.link() is None
    assert "--addr, entry 0" in done.stderr and "address ff02::1/64" in done.stderr


def test_without_the_capability_it_is_named(spaces: Callable[[], Space]) -> None:
    drop = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    done = subprocess.run([*drop, sys.executable, "-m", "muenfast", "net", "--name", "net0", "--in", unique("a"), "--out",
                           unique("b")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "CAP_NET_ADMIN" in done.stderr and done.stderr.count("\n") == 1


def test_a_namespace_by_path_and_by_process(program: Start, spaces: Callable[[], Space]) -> None:
    space = spaces()
    sleeper = space.start("sleep", "60")
    try:
        one = program("net", "--name", "a0,b0", "--in", f"{unique('a')},{unique('b')}",
                      "--out", f"{unique('c')},{unique('d')}", "--netns", f"/run/netns/{space.name},{sleeper.pid}")
        assert space.link("a0") is not None and space.link("b0") is not None
        assert one.end() == (0, "")
    finally:
        sleeper.kill()
        sleeper.communicate()


def test_an_interface_that_is_removed_or_moved(pair: Callable[..., Pair], spaces: Callable[[], Space]) -> None:
    """One that gets another name, or goes to another namespace, works; once it is removed its process ends, with status 1.
    """
    two = pair().both()
    two.spaces[0].ip("link", "set", "net0", "down")
    two.spaces[0].ip("link", "set", "net0", "name", "other0")
    two.spaces[0].ip("link", "set", "other0", "up")
    two.answers()
    assert [entry["netns"] for entry in shown("other0")] == [two.spaces[0].name]
    third = spaces()
    two.spaces[1].ip("link", "set", "net0", "netns", third.name)
    third.ip("addr", "add", "10.9.0.2/24", "dev", "net0")
    eventually(lambda: not two.spaces[0].carrier("other0"))
    third.ip("link", "set", "net0", "up")
    two.answers()
    assert (found := third.link()) is not None and found["qdisc"] == "noqueue"
    third.ip("link", "del", "net0")
    one, other = two.programs
    assert other is not None and other.process.wait(20) == 1
    assert "net0: was removed" in other.end()[1]
    assert one is not None and one.end() == (0, "")


def test_an_mtu_that_was_raised(pair: Callable[..., Pair]) -> None:
    """Packets that no element holds are dropped and counted; others go on."""
    two = pair().both()
    two.spaces[0].ip("link", "set", "net0", "mtu", "3000")
    assert not two.spaces[0].ping("10.9.0.2", "-s", "2000", "-M", "do", wait=0.5)
    two.answers()
    assert max(entry["sent"]["lost"]["oversize"] for entry in shown()) == 1
    two.end()


def test_modprobe_muennet(program: Start, spaces: Callable[[], Space]) -> None:
    """The module's parameters, and its defaults: raw without a flag."""
    space = spaces()
    a, b, c, d = (unique(letter) for letter in "abcd")
    words = ["modprobe", "muennet", "name=net0,net1", f"in={a},{c}", f"out={b},{d}", "reader_protocol=2,3",
             "writer_protocol=0x2,3", "flags=net_hdr,", "mtu=,576", "poll=1"]
    started = subprocess.Popen(space.inside(sys.executable, "-m", "muenfast", *words), stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    try:
        assert [started.stdout.readline() for _ in range(3)] == [
            f"interface net0 {a} {b} 1508 net_hdr 1500\n", f"interface net1 {c} {d} 576 raw 576\n", "ready\n"]
        assert [entry["poll"] for entry in shown("net0") + shown("net1")] == [1000, 1000]
        space.ip("addr", "add", "10.9.0.1/24", "dev", "net0")
        space.ip("link", "set", "net0", "up")
        with Endpoint(b, a, "net_hdr") as end, end.running():
            eventually(lambda: space.ping("10.9.0.2", wait=0.5))
    finally:
        started.terminate()
        assert started.wait(20) == 0
        started.stdout.close()


def made(space: Space, *, up: bool = False) -> list[muenfast.InterfaceConfig]:
    """net0 in that namespace, which nobody is at the other end of."""
    return muenfast.interfaces_from_lists("net0", inp=unique("in"), out=unique("out"), netns=space.name, up=up)


def asked(space: Space, name: str, **request: object) -> bool:
    """Whether who serves an interface of that namespace did what was asked for."""
    namespace = named(space.name)
    try:
        return bool(inside(namespace, lambda: ask(name, request))["ok"])
    finally:
        os.close(namespace)


def test_a_child_that_is_asked_for_too_early(spaces: Callable[[], Space], monkeypatch: pytest.MonkeyPatch) -> None:
    """An interface that is still being made refuses, and leaves nothing where that fails."""
    space, answers = spaces(), []

    def fail(*_: object, **__: object) -> None:
        answers.append(asked(space, "net0", command="add_child", child="child1"))
        raise UsageError("no channel")

    monkeypatch.setattr("muenfast.net._Half", fail)
    with pytest.raises(UsageError, match="no channel"):
        muenfast.Interfaces(made(space))
    assert answers == [False] and space.link() is None and space.link("child1") is None


def test_an_interface_that_is_removed_while_children_are_busy(spaces: Callable[[], Space]) -> None:
    """Who watches all interfaces waits for nobody who may wait for him."""
    space = spaces()
    with muenfast.Interfaces(made(space)) as interfaces:
        [one] = interfaces.interfaces
        assert asked(space, "net0", command="add_child", child="child1")
        with one.children.lock:    # as adding and removing one has it
            teller = threading.Thread(target=one.set_carrier)   # as the engine's thread, of a peer that came
            teller.start()
            eventually(one._carrier.locked)
            space.ip("link", "del", "net0")
            eventually(lambda: one.gone)
        teller.join()


def test_a_child_of_which_nothing_is_told_any_more(spaces: Callable[[], Space], monkeypatch: pytest.MonkeyPatch) -> None:
    """Because it went where we may not look, say: once it is removed the engines see that."""
    space = spaces()

    def follow(_: object) -> None:
        raise PermissionError(errno.EPERM, "a network namespace cannot be entered")

    monkeypatch.setattr(tuntap.Device, "follow", follow)
    with muenfast.Interfaces(made(space, up=True)) as interfaces:
        assert asked(space, "net0", command="add_child", child="child1")
        space.ip("link", "del", "child1")
        eventually(lambda: not interfaces.status()[0]["children"])


def test_a_region_of_path_mtus_begins_as_all_do(spaces: Callable[[], Space], tmp_path: Path) -> None:
    (tmp_path / "paths").write_bytes(bytes(4096))
    with pytest.raises(UsageError, match=r"^pmtu, entry 0 .*multiple of 8"):
        muenfast.Interfaces(muenfast.interfaces_from_lists("net0", inp=unique("in"), out="", netns=spaces().name,
                                                           pmtu=f"{tmp_path}/paths@4+400"))


@pytest.mark.parametrize("taken", ["truncated", "replaced"])
def test_a_region_of_path_mtus_that_is_taken_away(taken: str, spaces: Callable[[], Space], tmp_path: Path,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    """Is said, once; packets go on."""
    paths = tmp_path / "paths"
    paths.write_bytes(bytes(4096))
    here, there, a, b = spaces(), spaces(), unique("a"), unique("b")
    configs = [*muenfast.interfaces_from_lists("net0", inp=a, out=b, netns=here.name, addr="10.9.0.1/24", up=True,
                                               pmtu=str(paths)),
               *muenfast.interfaces_from_lists("net0", inp=b, out=a, netns=there.name, addr="10.9.0.2/24", up=True)]
    with muenfast.Interfaces(configs) as interfaces:
        if taken == "truncated":
            os.truncate(paths, 0)
        else:
            (tmp_path / "other").write_bytes(bytes(4096))
            (tmp_path / "other").rename(paths)
        eventually(lambda: "its region of path MTUs was taken away" in caplog.text)
        eventually(lambda: all(entry["carrier"] for entry in interfaces.status()))
        for _ in range(3):
            assert here.ping("10.9.0.2", "-m", "7")
        assert caplog.text.count("was taken away") == 1


@pytest.fixture
def device(spaces: Callable[[], Space]) -> Iterator[tuple[Space, tuntap.Device]]:
    space = spaces()
    namespace = named(space.name)
    one = tuntap.Device("net0", "net_hdr", 1500, namespace=namespace)
    os.close(namespace)
    yield space, one
    one.close()


def test_more_news_of_links_than_there_is_room_for(device: tuple[Space, tuntap.Device]) -> None:
    """What an interface came to is known all the same: up, or gone."""
    space, one = device
    assert one.news is not None
    one.news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for end in (True, None):
        for state in ("down", "up", "down", "up", "down", "up"):
            space.ip("link", "set", "net0", state)
        if end is None:
            space.ip("link", "del", "net0")
        assert one.states()[-1] is end


def test_packets_come_to_the_device_at_once(device: tuple[Space, tuntap.Device]) -> None:
    """It has no queueing discipline that costs every sender something; whoever gives it one keeps that."""
    space, _ = device

    def discipline() -> str:
        for state in ("up", "down", "up"):
            space.ip("link", "set", "net0", state)
        found = space.link()
        assert found is not None
        return str(found["qdisc"])

    assert discipline() == "noqueue"
    subprocess.run(space.inside("tc", "qdisc", "replace", "dev", "net0", "root", "pfifo", "limit", "7"), check=True)
    assert discipline() == "pfifo"


def test_what_is_said_of_a_discipline_that_is_refused(device: tuple[Space, tuntap.Device]) -> None:
    with pytest.raises(OSError, match="its queueing discipline: No such device"):
        tuntap._pass_at_once(1 << 30)


def test_a_name_of_any_bytes(device: tuple[Space, tuntap.Device]) -> None:
    space, one = device
    name = os.fsdecode(b"net\xff")
    space.ip("link", "set", "net0", "name", name)
    assert one.rename() == name


def test_from_python(spaces: Callable[[], Space]) -> None:
    """Interfaces of both ends in one process."""
    here, there = spaces(), spaces()
    a, b = unique("a"), unique("b")
    configs = [*muenfast.interfaces_from_lists("net0", inp=a, out=b, netns=here.name, addr="10.9.0.1/24", up=True),
               *muenfast.interfaces_from_lists("net0", inp=b, out=a, netns=there.name, addr="10.9.0.2/24", up=True)]
    with muenfast.Interfaces(configs) as interfaces:
        eventually(lambda: all(entry["carrier"] for entry in interfaces.status()))
        assert here.ping("10.9.0.2") and not interfaces.wait(0)
        closer = threading.Timer(0.1, interfaces.close)
        closer.start()
        assert interfaces.wait(20)
        closer.join()
    assert here.link() is None
    with pytest.raises(UsageError):
        muenfast.interfaces_from_lists("net0", mtu=str(_LEAST - 1))
    with muenfast.Interfaces(configs[:1]) as interfaces:
        remover = threading.Timer(0.1, lambda: here.ip("link", "del", "net0"))
        remover.start()
        assert interfaces.wait(20) and interfaces.gone
        assert interfaces.status()[0]["interface"]["queue_drops"] is None
        remover.join()
