"""muenfast bench net: what it prints, and that nothing of it stays. No figure is judged."""

from __future__ import annotations

import array
import fcntl
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import run

from muenfast import _netbench, netmeasure, netns

pytestmark = [pytest.mark.root, pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun")]

LINKS = ("veth", "veth without offloads", "socat TUN pair", "muenfast net --no-offload", "muenfast net")
WHATS = {"TCP, one stream": "Gb/s", "UDP received, 18 bytes": "packets/s", "UDP received, 1400 bytes": "packets/s",
         "ping, idle": "us", "ping, flood": "us", "ping, flood, p99": "us"}
MEMORY = ("memory, 64 bytes in 1508", "memory, 64 bytes in 128")


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "muenfast", "bench", "net", "--json", "-", *words],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def left(pid: int) -> list[str]:
    """What there is of a bench: its channels, and the programs that it started (in its namespaces, by name or by lists)."""
    found = [name for name in os.listdir("/dev/shm") if name.startswith(f"bench-{pid}-")]
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace")
                parent = int((process / "stat").read_text().rpartition(") ")[2].split()[1])
            except OSError:
                continue
            if f"bench-{pid}-" in words or parent == pid:
                found.append(words.replace("\0", " "))
    return found


@pytest.mark.stress
def test_every_link_has_a_row_of_every_kind_with_its_ratios_and_nothing_stays() -> None:
    """All samples in JSON, ratios that they give, why a link is missing; channels and programs are gone."""
    bench = start("--rounds", "2", "--scale", "0.01")
    out, errors = bench.communicate(timeout=120)
    assert bench.returncode == 0, errors
    [report] = json.loads(out)
    assert report["benchmark"] == "net" and "first CPU" in report["environment"]["policy"]
    rows = {row["name"]: row for row in report["rows"]}
    expected = {f"{what}: {link}": unit for what, unit in WHATS.items() for link in LINKS}
    expected["TCP, 16 streams: muenfast net, 16 interfaces"] = "Gb/s"
    expected |= {f"{what}: {how}": "packets/s" for what in MEMORY for how in ("ring", "bare copies")}
    assert {name: row["unit"] for name, row in rows.items()} == expected
    options = run("net", "--help").stdout
    can_be_missing = {"socat TUN pair": shutil.which("socat") is None,
                      "muenfast net --no-offload": "--no-offload" not in options}
    for name, row in rows.items():
        what, link = name.split(": ")
        if can_be_missing.get(link):
            assert row["samples"] == [] and row["median"] is None and row["ratio"] is None
            assert "socat is not installed" in row["missing"] or "--no-offload" in row["missing"]
            continue
        assert row["missing"] is None and len(row["samples"]) == 2 and min(row["samples"]) > 0
        assert row["median"] == statistics.median(row["samples"])
        for limit, ratio in row["ratios"].items():
            others = rows[limit]["samples"]
            if not others:
                assert ratio is None
                continue
            pairs = [(b / a if row["unit"] == "us" else a / b) for a, b in zip(row["samples"], others, strict=True)]
            assert ratio == pytest.approx(statistics.median(pairs))
        if link in LINKS:
            against = {"veth": [], "muenfast net": LINKS[:4]}.get(link, ["veth"])
            assert list(row["ratios"]) == [f"{what}: {each}" for each in against]
        if what.startswith("TCP"):
            assert {"retransmits", "retransmits before"} == row["notes"].keys()
            assert all(len(note["samples"]) == 2 for note in row["notes"].values())
        elif what.startswith("UDP"):
            assert row["notes"]["sent/s"]["median"] > 0
    for link in LINKS:
        if not can_be_missing.get(link):
            half, most = (rows[f"{what}: {link}"]["samples"] for what in ("ping, flood", "ping, flood, p99"))
            assert all(a <= b for a, b in zip(half, most, strict=True))
    assert rows["TCP, 16 streams: muenfast net, 16 interfaces"]["limit"] == "TCP, one stream: muenfast net"
    assert left(bench.pid) == []


def test_an_interrupt_leaves_nothing() -> None:
    """^C while it measures: status 130, no word, channels and programs are gone."""
    bench = start("--rounds", "1000", "--scale", "0.01")
    end = time.monotonic() + 60
    while not any(" bench net " in each for each in left(bench.pid)):   # the child that sends
        assert time.monotonic() < end and bench.poll() is None
        time.sleep(0.02)
    os.killpg(bench.pid, signal.SIGINT)
    out, errors = bench.communicate(timeout=60)
    assert (bench.returncode, out, errors) == (130, "", "")
    assert left(bench.pid) == []


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_without_the_capability_it_is_named() -> None:
    """Status 2, one line, nothing measured."""
    done = subprocess.run(["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable, "-m",
                           "muenfast", "bench", "net"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "CAP_SYS_ADMIN" in done.stderr and "root" in done.stderr


def feature(space: int, name: str, command: int) -> int:
    """What ETHTOOL_G... says of a device."""
    def ask() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            value = array.array("I", [command, 0])
            fcntl.ioctl(s, 0x8946, struct.pack("16sP16x", name.encode(), value.buffer_info()[0]))
            return value[1]

    return netns.inside(space, ask)


def test_veth_without_offloads_has_none_and_an_echo_that_nobody_answers_is_told() -> None:
    """Checksums, TSO, GSO and GRO, at both ends; with offloads there are some. A ping does not wait for good, and takes no
    other's answer for its own."""
    with ExitStack() as stack:
        spaces = netmeasure.Spaces(stack)
        with_them, without = netmeasure.Link("veth", 0), netmeasure.Link("veth without offloads", 1)
        spaces.veth(with_them, offloads=True)
        spaces.veth(without, offloads=False)
        for link in (with_them, without):
            assert link.missing is None and spaces.failed(link) is None
        for space, side in ((spaces.near, "n"), (spaces.far, "f")):
            for command in (0x14, 0x16, 0x1e, 0x23, 0x2b):     # rx, tx, TSO, GSO, GRO
                assert feature(space, f"veth1-{side}", command) == 0
            assert feature(space, f"veth0-{side}", 0x1e) == feature(space, f"veth0-{side}", 0x16) == 1
        with spaces.echo(with_them) as one, spaces.echo(with_them) as other:
            laps = array.array("Q", [0] * 20)
            _netbench.ping(one.fileno(), 1, 0, 10**9, laps)
            assert all(laps)
            _netbench.ping(other.fileno(), 2, 0, 10**9, laps)   # twenty answers to the first one are before its own
        with spaces.bare(False, socket.SOCK_RAW, socket.IPPROTO_ICMP) as nobody:
            nobody.connect(("10.0.0.77", 0))
            start = time.monotonic()
            with pytest.raises(TimeoutError, match="echo 0"):
                _netbench.ping(nobody.fileno(), 1, 0, 10**8, array.array("Q", [0]))
            assert time.monotonic() - start < 10


def test_without_socat_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is missing, nothing is started."""
    monkeypatch.setenv("PATH", "/none")
    with ExitStack() as stack:
        link = netmeasure.Link("socat TUN pair", 0)
        netmeasure.Spaces(stack).socat(link)
    assert link.missing == "socat is not installed (Debian: apt-get install socat)" and not link.programs
