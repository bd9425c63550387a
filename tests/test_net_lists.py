"""Interfaces from lists: defaults, and what is refused before anything is opened. No test here needs root."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import leftovers, run, unique

from muenfast.errors import UsageError
from muenfast.net import InterfaceConfig, Interfaces, Options, interfaces_from_lists


def ends(config: InterfaceConfig) -> tuple[str | None, str | None]:
    return (None if config.inp is None else config.inp.text, None if config.out is None else config.out.text)


# ---- what lists mean


def test_two_commands_meet() -> None:
    """`--name net0,net1`, and the same with `--peer`, talk at once: net_hdr, MTU 1500, protocol 2."""
    here, there = (interfaces_from_lists("net0,net1", peer=peer) for peer in (False, True))
    assert [ends(each) for each in here] == [("net0_in", "net0_out"), ("net1_in", "net1_out")]
    assert [ends(each) for each in there] == [("net0_out", "net0_in"), ("net1_out", "net1_in")]
    for each in (*here, *there):
        assert (each.framing, each.mtu, each.element_size) == ("net_hdr", 1500, 1508)
        assert (each.reader_protocol, each.writer_protocol) == (2, 2)
        assert (each.poll, each.bells, each.netns, each.up) == (None, True, None, False)


@pytest.mark.parametrize(("mtu", "least", "most"), [(68, 1024, 1100), (1500, 1024, 1030), (9000, 465, 467),
                                                    (65535, 256, 257)])
def test_a_region_holds_at_least_256_elements(mtu: int, least: int, most: int) -> None:
    [config] = interfaces_from_lists("net0", mtu=str(mtu))
    elements = (config.region_size - 64) // config.element_size
    assert least <= elements <= most and config.region_size % 4096 == 0


def test_every_list() -> None:
    """An empty entry is the default, of a channel none; one entry alone is for all of netns and carrier."""
    one, two, three = interfaces_from_lists(
        "a,b,c", inp="x,,/z@64+8192", out=",y,w", reader_protocol="7ade5c549b08e814,,0x3", writer_protocol=",4,",
        mtu="576,,68", flags="eth_dev,net_hdr+eth_dev,", netns="space", size="1M,,", carrier="up",
        mac="02:00:00:00:00:0A,,", addr="10.0.0.1/24+10.2.0.1/16,,", poll=7, bells=False, up=True)
    assert [ends(each) for each in (one, two, three)] == [("x", None), (None, "y"), ("/z@64+8192", "w")]
    assert [each.framing for each in (one, two, three)] == ["eth_dev", "net_hdr", "raw"]
    assert [each.mtu for each in (one, two, three)] == [576, 1500, 68]
    assert [each.element_size for each in (one, two, three)] == [592, 1508, 68]
    assert (one.reader_protocol, two.writer_protocol, three.reader_protocol) == (0x7ADE5C549B08E814, 4, 3)
    assert (one.region_size, one.mac, one.addresses) == (1 << 20, "02:00:00:00:00:0a", ("10.0.0.1/24", "10.2.0.1/16"))
    [last] = interfaces_from_lists("net0", addr="10.1.0.1/32+fd00::1/64")
    assert last.addresses == ("10.1.0.1/32", "fd00::1/64") and three.addresses == ()
    for each in (one, two, three):
        assert (each.netns, each.carrier, each.poll, each.bells, each.up) == ("space", "up", 7, False, True)


def test_the_modules_lists() -> None:
    """No flag is raw, a list may end early, there are no default channels."""
    one, two = interfaces_from_lists("a,b", inp="x,y", out="w", reader_protocol="1,2", writer_protocol="3", module=True)
    assert ends(one) == ("x", "w") and ends(two) == ("y", None)
    assert (one.framing, one.element_size, two.reader_protocol) == ("raw", 1500, 2)
    [none] = interfaces_from_lists("a", inp="x", reader_protocol="1", flags="", module=True)
    assert none.framing == "raw"


def test_the_same_name_in_two_namespaces() -> None:
    one, two = interfaces_from_lists("net0,net0", inp="a,b", out="c,d", netns="x,y")
    assert (one.name, two.name) == ("net0", "net0") and (one.netns, two.netns) == ("x", "y")


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no channel": ({"inp": "", "out": ""}, ["no channel specified for 'net0'", "--name, entry 0"]),
    "MTU no number": ({"mtu": "x"}, ["MTU invalid", "--mtu, entry 0 'x'", "68 to 65535"]),
    "MTU hexadecimal": ({"mtu": "0x100"}, ["MTU invalid"]),
    "MTU too small": ({"mtu": "67"}, ["MTU invalid"]),
    "MTU too large": ({"mtu": "65536"}, ["MTU invalid"]),
    "MTU too large for Ethernet": ({"mtu": "65522", "flags": "eth_dev"}, ["MTU invalid", "65521"]),
    "unknown flag": ({"flags": "net"}, ["Invalid flag name found in 'net'", "--flags, entry 0"]),
    "flag cut short": ({"flags": "e"}, ["Invalid flag name found in 'e'"]),
    "flag in capitals": ({"flags": "NET_HDR"}, ["Invalid flag name found"]),
    "empty flag": ({"flags": "net_hdr+"}, ["Invalid flag name found in 'net_hdr+'"]),
    "reader protocol": ({"reader_protocol": "xyz"}, ["reader_protocol invalid", "hexadecimal"]),
    "reader protocol 0": ({"reader_protocol": "0"}, ["reader_protocol missing"]),
    "writer protocol": ({"writer_protocol": "12345678123456781"}, ["writer_protocol invalid"]),
    "protocol of no channel": ({"inp": "", "reader_protocol": "2"}, ["--reader-protocol, entry 0", "no such channel"]),
    "path MTUs": ({"pmtu": "x", "flags": "eth_dev"}, ["--pmtu, entry 0 'x'", "only packets of net_hdr have marks"]),
    "path MTUs in a channel": ({"inp": "x", "pmtu": "x"},
                               ["--in, entry 0 'x'", "a region is a channel, or has path MTUs", "--pmtu, entry 0"]),
    "one channel both ways": ({"inp": "a", "out": "a"}, ["--out, entry 0 'a'", "overlaps --in, entry 0"]),
    "name too long": ({"name": "a234567890123456"}, ["interface name too long", "entry 0"]),
    "name too long in bytes": ({"name": "ä" * 8}, ["interface name too long"]),
    "name": ({"name": "a/b"}, ["--name, entry 0 'a/b'"]),
    "name with a number to come": ({"name": "net%d"}, ["--name, entry 0"]),
    "no name": ({"name": "a,"}, ["--name, entry 1", "empty"]),
    "name twice": ({"name": "a,a"}, ["--name, entry 1 'a'", "twice"]),
    "33 names": ({"name": ",".join(f"n{k}" for k in range(33))}, ["at most 32 interfaces"]),
    "unequal": ({"name": "a,b", "mtu": "1500"}, ["--mtu, entry 1", "is missing", "2 in --name"]),
    "too many": ({"mtu": "1500,1500"}, ["--mtu, entry 1", "has no partner in --name"]),
    "poll": ({"poll": 0}, ["--poll '0'"]),
    "carrier": ({"carrier": "down"}, ["--carrier, entry 0 'down'", "peer, up"]),
    "MAC of an IP interface": ({"mac": "02:00:00:00:00:01"}, ["--mac, entry 0", "eth_dev"]),
    "MAC of a group": ({"mac": "03:00:00:00:00:01", "flags": "eth_dev"}, ["even first byte"]),
    "MAC": ({"mac": "02-00-00-00-00-01", "flags": "eth_dev"}, ["six hexadecimal bytes"]),
    "address": ({"addr": "10.0.0.256/24"}, ["--addr, entry 0", "10.0.0.1/24"]),
    "IPv6 and a small MTU": ({"addr": "fd00::1/64", "mtu": "1279"}, ["--addr, entry 0", "at least 1280 bytes"]),
    "address without bits": ({"addr": "10.0.0.1"}, ["--addr, entry 0 '10.0.0.1'", "10.0.0.1 has no bits"]),
    "address twice": ({"addr": "10.0.0.1/24+10.0.0.1/24"}, ["--addr, entry 0", "given twice"]),
    "address of a raw interface": ({"addr": "10.0.0.1/24", "flags": ""}, ["--addr, entry 0", "carries no IP"]),
    "no address": ({"addr": "10.0.0.1/24+"}, ["--addr, entry 0"]),
    "size": ({"size": "1000"}, ["--size, entry 0 '1000'", "1572"]),
    "channel": ({"inp": "x/y"}, ["--in, entry 0 'x/y'"]),
    "way of no marks": ({"flags": "eth_dev", "marks": "tap"}, ["--marks 'tap'", "only packets of net_hdr have marks"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(case: str) -> None:
    lists, expected = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        interfaces_from_lists(**{"name": "net0", "options": Options(), **lists})
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(("name", "lists", "said"), [
    ("net0", {"mtu": "9"}, "mtu, entry 0 '9'"), ("net0", {"inp": "x/y"}, "inp, entry 0 'x/y'"),
    ("net0", {"mtu": 1500}, "mtu '1500': a list is one text"), (["net0"], {}, "name \"['net0']\": a list is one text")])
def test_python_hears_of_arguments(name: Any, lists: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        interfaces_from_lists(name, **lists)


def test_interfaces_are_made_of_their_configurations() -> None:
    for wrong in ("net0", ["net0"]):
        with pytest.raises(UsageError, match=r"interfaces_from_lists\(\)"):
            Interfaces(wrong)   # type: ignore[arg-type]


# ---- the command line


MISUSE = {
    "no name": ("", ["--name", "required"]),
    "unknown word": ("list", ["'list'", "show"]),
    "show with an option": ("show --mtu 1500", ["--mtu", "does not go with show"]),
    "show of two": ("show a b", ["'b'", "one name"]),
    "json": ("--name x --json", ["--json", "show"]),
    "poll": ("--name x --poll 0", ["--poll '0'"]),
    "pmtu": ("--name x --pmtu y --flags eth_dev", ["--pmtu, entry 0 'y'", "only packets of net_hdr"]),
    "twice": ("--name x --name y", ["given twice"]),
}
MODULE_MISUSE = {
    "nothing": ("", ["no parameter is given", "name"]),
    "no channel": ("name=net0", ["no channel specified for 'net0'"]),
    "no reader protocol": ("name=net0 in={a}", ["reader_protocol missing", "reader_protocol, entry 0"]),
    "no writer protocol": ("name=net0 out={a}", ["writer_protocol missing"]),
    "its second": ("name=net0,net1 in={a},{b} reader_protocol=2", ["reader_protocol, entry 1", "reader_protocol missing"]),
    "invalid protocol": ("name=net0 in={a} reader_protocol=nine", ["reader_protocol invalid"]),
    "MTU": ("name=net0 in={a} reader_protocol=2 mtu=1500x", ["MTU invalid", "mtu, entry 0"]),
    "name": ("name=averyverylongname in={a} reader_protocol=2", ["interface name too long"]),
    "flags": ("name=net0 in={a} reader_protocol=2 flags=net_hdr+vlan", ["Invalid flag name found in 'net_hdr+vlan'"]),
    "pmtu": ("name=net0 out={a} writer_protocol=2 pmtu={b}", ["pmtu, entry 0", "only packets of net_hdr"]),
    "poll": ("name=net0 in={a} reader_protocol=2 poll=x", ["poll 'x'", "milliseconds"]),
    "unknown": ("name=net0 inn={a}", ["muennet: unknown parameter 'inn'"]),
    "client's option": ("--attach none name=net0 in={a} reader_protocol=2", ["--attach", "muenblock-client"]),
    "too many": ("name=net0 in={a},{b} reader_protocol=2", ["in, entry 1", "has no partner"]),
    "--poll": ("--poll 5 name=net0 in={a} reader_protocol=2", ["--poll", "poll=MILLISECONDS"]),
}


@pytest.mark.parametrize("words", [f"net {words}|{name}" for name, (words, _) in MISUSE.items()]
                         + [f"modprobe muennet {words}|{name}" for name, (words, _) in MODULE_MISUSE.items()])
def test_misuse_is_told_in_one_line(words: str, tmp_path: Path) -> None:
    """Status 2, and nothing was made."""
    line, _, name = words.partition("|")
    expected = (MISUSE if line.startswith("net") else MODULE_MISUSE)[name][1]
    before = leftovers(tmp_path)["shared memory"]
    done = run(*line.format(a=unique("a"), b=unique("b")).split())
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("muenfast: ") and done.stderr.count("\n") == 1
    for part in expected:
        assert part in done.stderr
    assert leftovers(tmp_path)["shared memory"] == before


def test_modinfo_of_muennet() -> None:
    lines = run("modinfo", "muennet").stdout.splitlines()
    listed = [line[16:].partition(":")[0] for line in lines if line.startswith("parm:")]
    assert listed == ["name", "in", "out", "pmtu", "mtu", "writer_protocol", "reader_protocol", "flags", "poll"]
    assert lines[0] == "name:           muennet" and lines[-1].endswith(" (uint)")


def test_show_without_any() -> None:
    done = run("net", "show")
    assert (done.returncode, done.stdout, done.stderr) == (0, "no process of this user serves an interface\n", "")
    assert run("net", "show", "--json").stdout == "[]\n"
    done = run("net", "show", "net0")
    assert done.returncode == 1 and "net0" in done.stderr


def test_without_the_capability_it_is_named() -> None:
    words = [sys.executable, "-m", "muenfast", "net", "--name", "net0", "--in", unique("a"), "--out", unique("b")]
    if os.geteuid() == 0:
        words = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin", *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1 and "CAP_NET_ADMIN" in done.stderr
