"""Marks, children and path MTUs of `muenfast net`, between two network namespaces.

Needs root, TUN devices and iproute2.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Program, run, unique
from helpers import eventually
from namespaces import SO_MARK, SO_RCVMARK, Namespace
from net_peer import Endpoint, checked
from test_net import Pair, Space, pair, shown, spaces, told
from test_net import pytestmark as pytestmark

import muenfast
from muenfast import bpf, names, netns
from muenfast._marks import MarkTable
from muenfast._net import Ports, Sender
from muenfast.errors import MuenfastError
from muenfast.tuntap import Device

__all__ = ["pair", "spaces"]    # fixtures

Pairs = Callable[..., Pair]
Start = Callable[..., Program]
MARKS = [0, 1, 100, 101, 0xFFFFFFFF]


def in_space(space: Space, kind: int = socket.SOCK_DGRAM, family: int = socket.AF_INET) -> socket.socket:
    """A socket of that namespace."""
    namespace = netns.named(space.name)
    try:
        made = netns.inside(namespace, lambda: socket.socket(family, kind))
    finally:
        os.close(namespace)
    made.settimeout(20)
    return made


def asked(space: Space, *words: str) -> str:
    """What muennet_cfg asks for there; what is wrong, "": it was done."""
    namespace = netns.named(space.name)
    try:
        interface, request = names.request(words[0], words[1], words[2] if len(words) > 2 else None)
        answer = netns.inside(namespace, lambda: names.ask(interface, request))
        return "" if answer["ok"] else str(answer["error"])
    except MuenfastError as error:
        return str(error)
    finally:
        os.close(namespace)


def cfg(space: Space, *words: str) -> bool:
    """Whether it was done."""
    return not asked(space, *words)


def received(target: socket.socket) -> tuple[bytes, int]:
    data, ancillary, _, _ = target.recvmsg(1 << 16, 64)
    [mark] = [struct.unpack("=I", value)[0] for level, kind, value in ancillary
              if (level, kind) == (socket.SOL_SOCKET, SO_MARK)]
    return data, mark


@pytest.mark.parametrize("words", [("--marks", "tcx"), ("--marks", "clsact"), ("--marks", "tcx", "--no-offload"),
                                   ("--marks", "tap"), ("--marks", "none")])
def test_marks_cross(words: tuple[str, ...], pair: Pairs) -> None:
    """All 32 bits, of single packets and of what the kernel cuts; a tap has them go out only, and none has none."""
    two = pair(*words).both()
    with in_space(two.spaces[0]) as source, in_space(two.spaces[1]) as target:
        target.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
        target.bind(("10.9.0.2", 700))
        for mark in MARKS:
            source.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
            for data in (b"x" * 18, b"y" * 1400, b"z" * 9000):
                source.sendto(data, ("10.9.0.2", 700))
                assert received(target) == (data, mark if words[1] in ("tcx", "clsact") else 0)
    [way] = {entry["marks"] for entry in shown()}
    assert way == (None if words[1] == "none" else words[1])
    assert all(not any(entry["interface"]["lost"].values()) for entry in shown())
    two.end()


@pytest.mark.parametrize("words", [("--marks", "tcx"), ("--marks", "tap"), ("--marks", "tap", "--no-offload")])
def test_marks_of_elements(words: tuple[str, ...], program: Start, spaces: Callable[[], Space]) -> None:
    """What stands in them, of TCP's super-packets, too: each is one ordinary packet."""
    space, out = spaces(), unique("out")
    one = program("net", "--name", "net0", "--in", "", "--out", out, "--netns", space.name, "--addr", "10.9.0.1/24", "--up",
                  *words)
    with Endpoint(out, None, "net_hdr") as endpoint, in_space(space) as source:
        endpoint.until(lambda: endpoint.reader is not None and endpoint.reader.synchronised)
        for number, mark in enumerate(MARKS):
            source.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
            source.sendto(b"0123456789" * (number + 1), ("10.9.0.2", 700))
            endpoint.until(lambda: sum(element[17] == 17 for element in endpoint.seen) == number + 1)
            [*_, element] = (element for element in endpoint.seen if element[17] == 17)
            length = struct.unpack_from("<H", element, 4)[0]
            assert struct.unpack_from("<I", element)[0] == mark and checked(element[8:8 + length])
            assert element[8 + length:] == bytes(len(element) - 8 - length)
        source.setsockopt(socket.SOL_UDP, 103, 1000)    # UDP_SEGMENT
        before = len(endpoint.seen)
        source.sendto(bytes(5500), ("10.9.0.2", 700))
        endpoint.until(lambda: len(endpoint.seen) >= before + 6)
        for element in endpoint.seen[before:]:
            length = struct.unpack_from("<H", element, 4)[0]
            assert struct.unpack_from("<I", element)[0] == MARKS[-1] and checked(element[8:8 + length])
    assert one.end() == (0, "")


def test_a_marked_stream(pair: Pairs) -> None:
    """A megabyte each way through children, behind marks on both sides; the parent sees none of it."""
    two = pair().both()
    for number, space in enumerate(two.spaces, 1):
        for words in (("add_child", "net0", "child1"), ("add_mark", "child1", "24"), ("add_mark", "child1", "25")):
            assert cfg(space, *words)
        space.ip("addr", "add", f"10.8.0.{number}/24", "dev", "child1")
        space.ip("link", "set", "child1", "up")
        subprocess.run(space.inside("iptables", "-t", "mangle", "-A", "OUTPUT", "-o", "child1", "-j", "MARK", "--set-mark",
                                    str(23 + number)), check=True)
    for here, there, address in ((0, 1, "10.8.0.2"), (1, 0, "10.8.0.1")):
        serving = two.spaces[there].program("serve", address, "5000")
        sending = two.spaces[here].program("send", address, "5000", str(1 << 20), "1")
        assert told(serving) == told(sending)
    for entry in shown():
        [child] = entry["children"]
        assert child["name"] == "child1" and child["marks"] == [24, 25]
        assert child["counters"]["rx_packets"] > 20 and child["counters"]["tx_packets"] > 20
        assert entry["interface"]["rx_packets"] < 20    # of IPv6's own
    two.end()


def test_a_child_that_is_removed(pair: Pairs) -> None:
    """By `ip link del`: its marks are the parent's, its name may be another's. One that is renamed or moved is found."""
    two = pair().both()
    space, other = two.spaces
    for words in (("add_child", "net0", "child1"), ("add_mark", "child1", "24")):
        assert cfg(space, *words)
    space.ip("link", "del", "child1")
    eventually(lambda: not shown()[0]["children"] and not shown()[-1]["children"])
    for words in (("add_child", "net0", "child1"), ("add_mark", "child1", "24")):
        assert eventually(lambda: cfg(space, *words))
    space.ip("link", "set", "child1", "name", "other1")
    assert eventually(lambda: cfg(space, "add_mark", "other1", "25"))
    assert not cfg(space, "add_mark", "child1", "26")
    space.ip("link", "set", "other1", "netns", other.name)
    assert eventually(lambda: cfg(other, "del_mark", "other1", "25"))
    assert not cfg(space, "add_mark", "other1", "26")
    assert cfg(other, "del_child", "other1")
    assert other.link("other1") is None
    for one in two.programs:
        assert one is not None
        status, errors = one.end()
        assert status == 0 and errors.count("\n") <= 1


def test_children_that_take_each_others_names(pair: Pairs) -> None:
    """However late the process hears of it: each is asked for by its name as it is by then."""
    two = pair().both()
    space, one = two.spaces[0], two.programs[0]
    assert one is not None
    for child in ("child1", "child2"):
        assert cfg(space, "add_child", "net0", child)
    assert cfg(space, "add_mark", "child1", "24")
    os.kill(one.pid, signal.SIGSTOP)
    for before, after in (("child1", "child3"), ("child2", "child1"), ("child3", "child2")):
        space.ip("link", "set", "dev", before, "name", after)
    os.kill(one.pid, signal.SIGCONT)
    assert eventually(lambda: cfg(space, "del_mark", "child2", "24"))
    assert eventually(lambda: cfg(space, "add_mark", "child1", "25"))
    os.kill(one.pid, signal.SIGSTOP)
    space.ip("link", "del", "child1")
    space.ip("link", "set", "dev", "child2", "name", "child1")
    os.kill(one.pid, signal.SIGCONT)
    eventually(lambda: [child["name"] for child in shown()[0]["children"] + shown()[1]["children"]] == ["child1"])
    assert eventually(lambda: cfg(space, "del_child", "child1"))
    found = [each.end() for each in two.programs if each is not None]
    errors = "".join(each for _, each in found)
    assert [status for status, _ in found] == [0, 0] and errors.count("\n") == 1 and "was removed; its marks" in errors


def test_a_renamed_child_is_called_so_everywhere(pair: Pairs) -> None:
    """In rules and in what is said; its old name is another child's."""
    two = pair().both()
    space, one = two.spaces[0], two.programs[0]
    assert one is not None
    assert cfg(space, "add_child", "net0", "child1") and cfg(space, "add_mark", "child1", "5")
    space.ip("link", "set", "dev", "child1", "name", "child9")
    eventually(lambda: cfg(space, "add_child", "net0", "child1"))
    assert cfg(space, "add_mark", "child1", "6")
    for words, expected in (("add_mark child1 5", "child9 has it already"), ("add_mark child9 6", "child1 has it already"),
                            ("add_child child9 x", "PARENT 'child9': it is a child itself"),
                            ("add_child net0 child9", "there is an interface of that name")):
        assert expected in asked(space, *words.split())
    assert [(child["name"], child["marks"]) for entry in shown() for child in entry["children"]] == [
        ("child9", [5]), ("child1", [6])]
    space.ip("link", "del", "child9")
    eventually(lambda: len([child for entry in shown() for child in entry["children"]]) == 1)
    assert cfg(space, "add_mark", "child1", "5") and cfg(space, "del_child", "child1")
    status, said = one.end()
    assert status == 0 and "its child child9 was removed" in said
    two.programs[0] = two.programs[1]
    assert two.programs[1] is not None and two.programs[1].end() == (0, "")


def test_children_go_with_their_parent(program: Start, spaces: Callable[[], Space]) -> None:
    """Which somebody removes; other interfaces of that process, and theirs, stay. Its channel and its name are free."""
    space = spaces()
    inp, out = unique("in"), unique("out")
    one = program("net", "--name", "net0,net1", "--in", f"{inp},{unique()}", "--out", f"{out},{unique()}",
                  "--netns", space.name)
    space.ip("link", "set", "net0", "up")
    peer = program("net", "--name", "net0", "--in", out, "--out", inp, "--netns", spaces().name)
    eventually(lambda: next(entry for entry in shown() if entry["pid"] == peer.pid)["carrier"])
    for number in (0, 1):
        assert cfg(space, "add_child", f"net{number}", f"child{number}")
    space.ip("link", "del", "net0")
    eventually(lambda: space.link("child0") is None)
    assert not cfg(space, "add_child", "net0", "child2") and not cfg(space, "add_mark", "child0", "1")
    assert cfg(space, "add_mark", "child1", "1") and space.link("child1") is not None
    eventually(lambda: not next(entry for entry in shown() if entry["pid"] == peer.pid)["carrier"])
    [gone] = [entry for entry in shown() if entry["pid"] == one.pid]
    assert (gone["state"], gone["carrier"], gone["writer"]["active"]) == ("gone", False, False)
    again = program("net", "--name", "net0", "--in", inp, "--out", out, "--netns", space.name, "--up")
    eventually(lambda: next(entry for entry in shown() if entry["pid"] == peer.pid)["carrier"])
    assert again.end() == peer.end() == (0, "")
    assert one.end()[0] == 0


def test_a_parent_that_is_moved_makes_children_there(pair: Pairs, spaces: Callable[[], Space]) -> None:
    two = pair().both()
    third = spaces()
    two.spaces[0].ip("link", "set", "net0", "netns", third.name)
    assert eventually(lambda: cfg(third, "add_child", "net0", "child1"))
    assert third.link("child1") is not None and not cfg(two.spaces[0], "del_child", "child1")
    third.ip("link", "set", "net0", "name", "net9")
    assert eventually(lambda: cfg(third, "add_child", "net9", "child2"))
    assert cfg(third, "del_child", "child1") and cfg(third, "del_child", "child2")
    two.end()


@pytest.mark.parametrize("way", ["tcx", "clsact", "tap"])
def test_an_interface_that_is_moved_takes_its_marks_along(way: str, pair: Pairs, spaces: Callable[[], Space]) -> None:
    """There, too, packets go out with them, and come in with them as far as the way has that; so it is with a child."""
    two = pair("--marks", way).both()
    third, (here, there) = spaces(), two.spaces
    for space in two.spaces:
        assert cfg(space, "add_child", "net0", "child1") and cfg(space, "add_mark", "child1", "24")
    there.ip("addr", "add", "10.8.0.2/24", "dev", "child1")
    there.ip("link", "set", "child1", "up")
    for name, address, request in (("net0", "10.9.0.1/24", ("add_child", "net0", "child2")),
                                   ("child1", "10.8.0.1/24", ("add_mark", "child1", "25"))):
        here.ip("link", "set", name, "netns", third.name)
        assert eventually(partial(cfg, third, *request))
        third.ip("addr", "add", address, "dev", name)
        third.ip("link", "set", name, "up")
    eventually(lambda: third.carrier() and third.carrier("child1"))
    for address, mark in (("10.9.0.2", 7), ("10.8.0.2", 24)):
        with in_space(third) as source, in_space(there) as target:
            target.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
            target.bind((address, 700))
            source.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
            source.sendto(b"z" * 9000, (address, 700))
            assert received(target) == (b"z" * 9000, 0 if way == "tap" else mark)
    assert all(not any(entry["interface"]["lost"].values()) for entry in shown())
    two.end()


def test_what_waits_in_a_tap_goes_out_in_no_later_epoch() -> None:
    """An error stands before it, of the interface's having gone down."""
    space = Namespace()
    device = Device("net0", "net_hdr", 1500, namespace=space.fd)
    attached = space.do(lambda: bpf.attach(device.index, ways=(bpf.Way.TAP,)))
    assert attached.tap is not None
    ports = Ports(MarkTable(100))
    ports.add(0, device.fd, "tap", attached.tap.fileno())
    sender = Sender(ports, bytearray(1 << 16), framing="net_hdr", mtu=1500, protocol=2)
    device.set_carrier(True)
    space.run("ip addr add 10.9.0.1/24 dev net0; ip link set net0 up")
    with space.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
        sender.link(True)
        assert sender.run(5) == "up"
        for number in range(20):
            source.sendto(b"%d" % number, ("10.9.0.2", 700))
    space.run("ip link set net0 down")
    for up in (False, True):
        sender.link(up)
        assert sender.run(5) == ("up" if up else "down")
    sender.run(0.01)
    sender.close()
    assert ports.counters(0)["tx_packets"] >= 20        # IPv6 has something to say, too
    assert (sender.counters["tx_packets"], sender.counters["lost"]["down"]) == (0, ports.counters(0)["tx_packets"])
    attached.close()
    device.close()
    ports.close()
    space.close()


def test_children_come_and_go_under_traffic(pair: Pairs) -> None:
    """Nothing stands still, nothing is left, and what is the parent's arrives."""
    two = pair().both()
    serving = two.spaces[1].program("serve", "10.9.0.2", "5000")
    sending = two.spaces[0].program("send", "10.9.0.2", "5000", str(20 << 20), "2")
    for turn in range(8):
        for space in two.spaces:
            assert cfg(space, "add_child", "net0", f"c{turn % 2}")
            assert cfg(space, "add_mark", f"c{turn % 2}", str(turn + 1))
            space.ip("link", "set", f"c{turn % 2}", "up")
            assert cfg(space, "del_child", f"c{turn % 2}")
    assert told(serving) == told(sending)
    assert all(not entry["children"] for entry in shown())
    two.end()


@pytest.mark.parametrize("words", [(), ("--no-offload",)])
def test_counters_agree_with_the_kernels(words: tuple[str, ...], pair: Pairs) -> None:
    """Packets of the interface always; those of the wire are the same ones where nothing is split or merged."""
    two = pair(*words).both()
    serving = two.spaces[1].program("serve", "10.9.0.2", "5000")
    sending = two.spaces[0].program("send", "10.9.0.2", "5000", str(4 << 20), "3")
    assert told(serving) == told(sending)

    def agree() -> bool:
        entries = {entry["pid"]: entry for entry in shown()}
        for one, space in zip(two.programs, two.spaces, strict=True):
            link = space.link()
            assert one is not None and link is not None
            entry, kernel = entries[one.pid], link["stats64"]
            real = entry["interface"]
            if (real["rx_packets"], real["tx_packets"]) != (kernel["rx"]["packets"], kernel["tx"]["packets"]):
                return False
            wire = entry["counters"]
            if words and (wire["rx_packets"], wire["tx_packets"]) != (real["rx_packets"], real["tx_packets"]):
                return False
        return True

    eventually(agree)
    one, other = sorted(shown(), key=lambda entry: int(entry["sent"]["split"]["segments"]))
    assert one["offload"] is (not words)
    if not words:
        assert other["sent"]["split"]["segments"] > other["sent"]["split"]["supers"] > 0
        assert other["counters"]["tx_packets"] > other["interface"]["tx_packets"]
        assert one["received"]["merged"]["segments"] > one["received"]["merged"]["supers"] > 0
    two.end()


def test_a_path_mtu(pair: Pairs) -> None:
    """A sender hears of it and sends smaller packets; without DF they are fragmented. It may change at any time."""
    region = unique("paths")
    two = pair("--pmtu", region).both()
    here, there = two.spaces
    assert json.loads(run("net", "pmtu", "show", region, "--json").stdout) == {"region": region, "entries": 1024,
                                                                               "limits": {}}
    done = run("blk", "--req", unique("a"), "--resp", unique("b"), "--device", f"/dev/shm/{region}")
    assert done.returncode == 1 and "already held by" in done.stderr     # nor is it anybody's disk meanwhile
    assert run("net", "pmtu", "set", region, "1024", "700").returncode == 0
    assert run("net", "pmtu", "set", region, "7", "900").returncode == 0
    assert run("net", "pmtu", "show", region).stdout == f"{region}: 2 of 1024 marks have a limit\n  mark 7: 900\n" \
                                                         "  mark 1024: 700\n"
    with in_space(here) as source, in_space(there) as target:
        target.bind(("10.9.0.2", 700))
        source.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", 7))
        source.setsockopt(socket.IPPROTO_IP, 10, 0)     # IP_MTU_DISCOVER, IP_PMTUDISC_DONT: no DF
        source.sendto(b"a" * 1400, ("10.9.0.2", 700))
        assert target.recv(2000) == b"a" * 1400
        source.setsockopt(socket.IPPROTO_IP, 10, 2)     # IP_PMTUDISC_DO
        source.connect(("10.9.0.2", 700))
        source.send(b"b" * 1400)

        def smaller() -> bool:
            try:
                source.send(b"c" * 1400)
            except OSError:     # EMSGSIZE, of the news and from then on
                return source.getsockopt(socket.IPPROTO_IP, 14) == 900      # IP_MTU
            return False

        def fits() -> bool:     # further news of what was sent before are told by further errors
            try:
                return source.send(b"d" * (900 - 28)) > 0
            except OSError:
                return False

        eventually(smaller)
        eventually(fits)
        assert target.recv(2000) == b"d" * (900 - 28)
    entry = next(entry for entry in shown() if entry["sent"]["path_mtu"]["news"])
    assert entry["sent"]["path_mtu"]["fragmented"] == 1 and entry["sent"]["path_mtu"]["fragments"] == 2
    assert entry["sent"]["lost"]["path_mtu"] >= 1 and entry["pmtu"] == region
    # Marks beyond 100, for the region has words for them.
    for words in (("add_child", "net0", "child1"), ("add_mark", "child1", "1024")):
        assert cfg(here, *words)
    assert not cfg(here, "add_mark", "child1", "1025")
    # TCP goes through, by what the news tell it: MSS clamping is nobody's business here.
    subprocess.run(here.inside("iptables", "-t", "mangle", "-A", "OUTPUT", "-p", "tcp", "-j", "MARK", "--set-mark", "7"),
                   check=True)
    here.ip("route", "flush", "cache")
    serving = there.program("serve", "10.9.0.2", "5000")
    sending = here.program("send", "10.9.0.2", "5000", str(1 << 20), "4")
    assert told(serving) == told(sending)
    two.end()


def test_limits_outlive_who_set_them(program: Start, spaces: Callable[[], Space]) -> None:
    """Also while the interface's process was killed and has not come back: who sets and shows them is no user."""
    space, region = spaces(), unique("paths")
    words = ("net", "--name", "net0", "--in", "", "--out", unique("out"), "--netns", space.name, "--pmtu", region)
    program(*words).end(signal.SIGKILL)
    assert run("net", "pmtu", "set", region, "7", "900").returncode == 0

    def limits() -> dict[str, int]:
        found: dict[str, int] = json.loads(run("net", "pmtu", "show", region, "--json").stdout)["limits"]
        return found

    assert limits() == limits() == {"7": 900}
    eventually(lambda: space.link() is None)
    one = program(*words)
    assert limits() == {"7": 900}
    assert one.end() == (0, "") and not os.path.exists(f"/dev/shm/{region}")


@pytest.mark.parametrize(("words", "status", "parts"), [
    (("pmtu",), 2, ["pmtu show REGION", "pmtu set REGION MARK BYTES"]),
    (("pmtu", "set", "x", "1"), 2, ["pmtu set REGION MARK BYTES"]),
    (("pmtu", "show", "{missing}"), 1, ["there is no such region", "muenfast chan create"]),
    (("pmtu", "set", "{region}", "0", "1500"), 2, ["MARK '0'", "1 to 1024"]),
    (("pmtu", "set", "{region}", "1025", "1500"), 2, ["MARK '1025'", "1 to 1024"]),
    (("pmtu", "set", "{region}", "1", "65536"), 2, ["BYTES '65536'", "0 to 65535"]),
    (("pmtu", "set", "{region}", "x", "1500"), 2, ["MARK 'x'"]),
    (("pmtu", "show", "{region}", "--name", "net0"), 2, ["--name", "does not go with pmtu"]),
    (("--name", "net0", "--marks", "bpf"), 2, ["--marks 'bpf'", "auto, tcx, clsact, tap, none"])])
def test_misuse(words: tuple[str, ...], status: int, parts: list[str]) -> None:
    region, missing = unique("paths"), unique("missing")
    assert run("chan", "create", "--size", "4096", region).returncode == 0
    try:
        done = run("net", *(word.format(region=region, missing=missing) for word in words))
        assert (done.returncode, done.stdout) == (status, "") and done.stderr.count("\n") == 1, done.stderr
        for part in parts:
            assert part in done.stderr
        assert json.loads(run("net", "pmtu", "show", region, "--json").stdout)["limits"] == {}
    finally:
        assert run("chan", "rm", region).returncode == 0


def test_what_is_no_region_of_path_mtus_is_left_alone(tmp_path: Path, program: Start) -> None:
    """Files with something in them, channels and disks that are served: nothing tells such a region but what it is not."""
    text, disk, zeros = tmp_path / "text", tmp_path / "disk", tmp_path / "zeros"
    text.write_bytes(b"important text in a file of mine")
    disk.write_bytes(bytes(1 << 20))
    zeros.write_bytes(bytes(64))
    req, resp, ram = unique("a"), unique("b"), unique("ram")
    server = program("blk", "--req", f"{req},{unique('c')}", "--resp", f"{resp},{unique('d')}", "--device",
                     f"{disk},ram:1M:{ram}")
    channel = unique("x")
    writer = muenfast.open_writer(channel, size=1508, protocol=2, region_size=1 << 19)
    for place, expected in ((str(text), "is no region of path MTUs"), (str(disk), "a server, as a disk"),
                            (ram, "a server, as a disk"), (resp, "held by process"), (channel, "held by process")):
        for words in (("pmtu", "set", place, "2", "1280"), ("pmtu", "show", place),
                      ("--name", "net0", "--in", unique("y"), "--out", "", "--pmtu", place)):
            done = run("net", *words)
            assert done.returncode in (1, 2) and done.stdout == "" and expected in done.stderr, done.stderr
    writer.close()
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(1 << 26)
    done = run("net", "pmtu", "show", str(large))
    assert done.returncode == 2 and "at most 16777215 marks" in done.stderr
    assert run("net", "pmtu", "set", str(zeros), "16", "1280").returncode == 0
    assert text.read_bytes() == b"important text in a file of mine" and disk.read_bytes() == bytes(1 << 20)
    assert zeros.read_bytes() == bytes(60) + struct.pack("=I", 1280)
    assert server.end() == (0, "") and run("chan", "rm", ram).returncode == 0
