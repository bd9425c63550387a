"""`muenfast modprobe` and `muenfast modinfo` as their user meets them. No test here needs root but the last one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Program, leftovers, run, unique

from muenfast import BlockDevice, modules
from muenfast.attach import fuse

Start = Callable[..., Program]


def traces(tmp_path: Path) -> dict[str, set[str]]:
    """What is on the machine of ours; nodes are looked at by the fixture after the test."""
    found = leftovers(tmp_path)
    del found["nodes"]
    return found


def one_line(errors: str) -> str:
    assert errors.startswith("muenfast: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
    return errors.removeprefix("muenfast: ").rstrip("\n")


@pytest.fixture
def four() -> dict[str, str]:
    """Names of two pairs of channels, by letter."""
    return {letter: unique(letter) for letter in "abcd"}


# ---- serving


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_modules_serve_as_blk_does(program: Start, four: dict[str, str], tmp_path: Path, number: int) -> None:
    """The same lines, the same end; data crosses; dashes and quotes are as for the kernel; nothing is left."""
    before = traces(tmp_path)
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    names = [f"req_shm_name={four['a']},{four['b']}", f'resp-shm-name="{four["c"]},{four["d"]}"']
    protocols = ["req_shm_protocol=abc,9570208dca77db19", "resp_shm_protocol=def,9851BE3282FEF0DC"]
    server = program("modprobe", "muenblock-server", *names, f"device_name={tmp_path}/image,ram:8M", *protocols)
    assert server.lines == [f"export {four['a']} {four['c']} 1048576 {tmp_path}/image",
                            f"export {four['b']} {four['d']} 8388608 ram:8M"]
    client = program("modprobe", "--attach", "none", "muenblock_client", *names, *protocols)
    assert client.lines == [f"disk {four['a']} {four['c']} 1048576 -", f"disk {four['b']} {four['d']} 8388608 -"]
    states = [entry["state"] for answer in json.loads(run("stat", "--json").stdout) for entry in answer["entries"]]
    assert states == ["connected", "connected", "ready", "ready"]
    assert client.end(number) == (0, "")
    with BlockDevice(four["a"], four["c"], req_protocol="abc", resp_protocol="def") as device:
        device.pwrite(b"m" * 4096, 0)
        device.flush()
    assert server.end(number) == (0, "")
    assert (tmp_path / "image").read_bytes()[:4097] == b"m" * 4096 + b"\0"
    assert traces(tmp_path) == before


def test_blk_and_modprobe_are_peers(program: Start, four: dict[str, str]) -> None:
    """Protocols and region sizes that are not given are the same."""
    server = program("modprobe", "muenblock-server", f"req_shm_name={four['a']}", f"resp_shm_name={four['c']}",
                     "device_name=ram:1M")
    client = program("blk", "--client", "--attach", "none", "--req", four["a"], "--resp", four["c"])
    assert client.lines == [f"disk {four['a']} {four['c']} 1048576 -"]
    assert client.end() == (0, "") and server.end() == (0, "")


# ---- misuse

NAMES = "req_shm_name={a} resp_shm_name={c}"
TWO = "req_shm_name={a},{b} resp_shm_name={c},{d}"
MISUSE = {
    "module": ("foo req_shm_name={a}", ["Module foo not found", "muenblock-client, muenblock-server"]),
    "no module": ("", ["MODULE"]),
    "unknown": ("muenblock-server size=3 " + NAMES, ["muenblock_server: unknown parameter 'size'", "device_name",
                                                    "modinfo muenblock-server"]),
    "no value": ("muenblock-client req_shm_name", ["muenblock_client: `' invalid for parameter `req_shm_name'"]),
    "missing": ("muenblock-server " + NAMES, ["muenblock_server: required and not given: device_name"]),
    "nothing": ("muenblock-client", ["req_shm_name and resp_shm_name, or connections"]),
    "twice": ("muenblock-client req_shm_name={a} " + NAMES, ["req_shm_name", "given twice"]),
    "generations": ("muenblock-client connections=1:a:b:c " + NAMES, ["different generations"]),
    "empty list": ("muenblock-client req_shm_name= resp_shm_name={c}", ["req_shm_name, entry 0", "empty"]),
    "empty entry": ("muenblock-client req_shm_name={a}, resp_shm_name={c},{d}", ["req_shm_name, entry 1", "empty"]),
    "unequal": ("muenblock-client req_shm_name={a},{b} resp_shm_name={c}", ["resp_shm_name, entry 1", "is missing",
                                                                          "2 in req_shm_name"]),
    "unequal devices": ("muenblock-server device_name=ram:1M " + TWO, ["device_name, entry 1", "2 in req_shm_name"]),
    "one channel twice": ("muenblock-client req_shm_name={a} resp_shm_name={a}", ["resp_shm_name, entry 0",
                                                                                "req_shm_name, entry 0"]),
    "name": ("muenblock-client req_shm_name=x/y resp_shm_name={c}", ["req_shm_name, entry 0 'x/y'"]),
    "protocol": ("muenblock-client req_shm_protocol=xyz " + NAMES, ["req_shm_protocol, entry 0 'xyz'", "hexadecimal"]),
    "second protocol": ("muenblock-client resp_shm_protocol=1,0 " + TWO, ["resp_shm_protocol, entry 1 '0'"]),
    "device": ("muenblock-server device_name=ram:1M,{tmp}/none " + TWO, ["device_name, entry 1 '{tmp}/none'",
                                                                        "No such file"]),
    "device as a channel": ("muenblock-server device_name=ram:1M:{a} " + NAMES, ["device_name, entry 0", "no channel",
                                                                                "req_shm_name, entry 0"]),
    "client's option": ("--attach none muenblock-server device_name=ram:1M " + NAMES, ["--attach", "muenblock-client"]),
    "poll": ("--poll 0 muenblock-client " + NAMES, ["--poll '0'"]),
    "connections": ("muenblock-server connections=1:{a}:{b} device=/x:1", ["connections, entry 0", "BUFFER is missing"]),
    "its devices": ("muenblock-server connections=1:{a}:{b}:{c} devices=/x:2", ["devices, entry 0 '/x:2'",
                                                                               "no connection has the ID '2'"]),
    "its connections": ("muenblock-client connections=1:{a}:{b}:{c},1:{b}:{c}:{d}", ["connections, entry 1",
                                                                                     "ID '1' is that of entry 0"]),
    "client's devices": ("muenblock-client connections=1:{a}:{b}:{c} device=/x:1", ["unknown parameter"]),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told_in_one_line_and_undone(case: str, four: dict[str, str], tmp_path: Path) -> None:
    """Status 2; the line names parameter, entry, value and rule; nothing was made."""
    words, expected = MISUSE[case]
    values = {**four, "tmp": str(tmp_path)}
    before = traces(tmp_path)
    done = run("modprobe", *(word.format(**values) for word in words.split()))
    line = one_line(done.stderr)
    assert done.returncode == 2, line
    for part in expected:
        assert part.format(**values) in line
    assert done.stdout == ""
    assert traces(tmp_path) == before


def test_a_held_channel_names_the_parameter(program: Start, four: dict[str, str]) -> None:
    """Errors of opening name it, too: status 1, with the holder."""
    server = program("blk", "--req", four["a"], "--resp", four["c"], "--device", "ram:1M")
    done = run("modprobe", "muenblock-server", f"req_shm_name={four['b']}", f"resp_shm_name={four['c']}",
               "device_name=ram:1M")
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert line.startswith(f"resp_shm_name, entry 0 '{four['c']}': ") and f"process {server.pid}" in line
    assert server.end() == (0, "")


# ---- modinfo


def test_modinfo_alone_names_the_modules() -> None:
    done = run("modinfo")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["muenblock-client", "muenblock-server", "muennet"]


@pytest.mark.parametrize("name", ["muenblock-server", "muenblock_client"])
def test_modinfo_prints_as_modinfo_does(name: str) -> None:
    """`key:` in 16 columns; a parameter is name:description (type); every one of the table is there, once."""
    done = run("modinfo", name)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [(line[:16].rstrip(), line[16:]) for line in done.stdout.splitlines()]
    assert lines[0] == ("name:", name.replace("-", "_")) and lines[1][0] == "description:"
    listed = [text for key, text in lines if key == "parm:"]
    assert all(text.endswith(" (array of charp)") for text in listed)
    module = modules.find(name)
    assert [text.partition(":")[0] for text in listed] == [p.name for group in module.generations for p in group]


def test_modinfo_as_json() -> None:
    """What is required of which generation, and other spellings, can be told only here."""
    told = json.loads(run("modinfo", "--json", "muenblock-server").stdout)
    assert told["name"] == "muenblock_server"
    by_name = {each["name"]: each for each in told["parameters"]}
    assert by_name["device"]["aliases"] == ["devices"] and by_name["device"]["generation"] == 2
    assert by_name["req_shm_name"]["required"] and not by_name["req_shm_protocol"]["required"]


@pytest.mark.parametrize("words", [["modinfo", "--json"], ["modinfo", "x"], ["modinfo", "muenblock-server", "y"]],
                         ids=" ".join)
def test_modinfo_misused(words: list[str]) -> None:
    """Status 2, one line."""
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr)


# ---- a device


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.skipif(fuse.available() is not None, reason=f"no front end: {fuse.available()}")
def test_the_client_makes_a_device_appear(program: Start, four: dict[str, str]) -> None:
    """/dev/muendiskX with the exported size, gone again afterwards."""
    names = [f"req_shm_name={four['a']}", f"resp_shm_name={four['c']}"]
    server = program("modprobe", "muenblock-server", *names, "device_name=ram:1M")
    client = program("modprobe", "muenblock-client", *names)
    [line] = client.lines
    device = line.split()[-1]
    assert device.startswith("/dev/muendisk") and stat.S_ISBLK(os.stat(device).st_mode)
    blockdev = shutil.which("blockdev", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert blockdev is not None
    assert subprocess.run([blockdev, "--getsize64", device], capture_output=True, text=True,
                          check=True).stdout == "1048576\n"
    assert client.end() == (0, "") and server.end() == (0, "")
    assert not os.path.lexists(device)


def test_options_may_stand_among_the_parameters() -> None:
    """What is wrong is said of the parameter, not of where it stands; an option that there is none of stays unknown."""
    among = run("modprobe", "muenblock-client", "--attach", "none", "connections=1:a:a:e")
    assert among.returncode == 2
    assert "connections, entry 0 'a'" in among.stderr and "overlaps another one of the same entry" in among.stderr
    unknown = run("modprobe", "muenblock-client", "connections=1:a:c:e", "--bogus")
    assert unknown.returncode == 2
    assert unknown.stderr == "muenfast: unrecognized arguments: --bogus (muenfast modprobe --help tells more)\n"
