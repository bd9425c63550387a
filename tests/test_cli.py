"""The command line as its user meets it: misuse, `ready`, signals, chan, stat. No test here needs root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Program, leftovers, run, unique

from muenfast import BlockDevice
from muenfast.cli import stat

Start = Callable[..., Program]

REQUEST, RESPONSE = 0x9570208DCA77DB19, 0x9851BE3282FEF0DC  # docs/protocol.md: block requests and responses, inline
SETPRIV = shutil.which("setpriv")


def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Waits for it; a limit against hanging, no measurement."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def traces(tmp_path: Path) -> dict[str, set[str]]:
    """What is on the machine of ours; nodes are looked at by the fixture after the test."""
    found = leftovers(tmp_path)
    del found["nodes"]
    return found


def one_line(errors: str) -> str:
    """The only line of standard error."""
    assert errors.startswith("muenfast: "), errors
    assert errors.endswith("\n") and errors.count("\n") == 1, errors
    return errors.removeprefix("muenfast: ").rstrip("\n")


@pytest.fixture
def four() -> dict[str, str]:
    """Names of two pairs of channels, by letter."""
    return {letter: unique(letter) for letter in "abcd"}


@pytest.fixture
def live(program: Start, four: dict[str, str]) -> Iterator[tuple[dict[str, str], Program, Program]]:
    """Two RAM disks exported by one server to one client, both ready."""
    lists = ["--req", f"{four['a']},{four['b']}", "--resp", f"{four['c']},{four['d']}"]
    server = program("blk", *lists, "--device", "ram:8M,ram:16M")
    client = program("blk", "--client", "--attach", "none", *lists)
    yield four, server, client
    for each in (client, server):
        each.end()


def held(program: Start, *words: str) -> Program:
    """A process whose channels are open; it need not become ready."""
    new = program("blk", *words, ready=False)
    until(lambda: all(Path("/dev/shm", name).exists() for name in words if name.startswith("mf")))
    return new


# ---- misuse

PAIR = "--req {a} --resp {c}"
NONE = "there is no such channel; `muenfast chan list` shows what there is"
EXISTS = "it exists already; `muenfast chan show` tells what it is"
TWO = "--req {a},{b} --resp {c},{d}"
MISUSE = {
    # lists
    "unequal": ("--req {a},{b} --resp {c}", ["--resp, entry 1", "paired by position", "is missing", "2 in --req"]),
    "twice in a list": ("--req {a},{a} --resp {c},{d}", ["--req, entry 1", "{a}", "one direction", "--req, entry 0"]),
    "both directions": ("--req {a} --resp {a}", ["--resp, entry 0", "{a}", "--req, entry 0"]),
    "two spellings of one name": ("--req {a} --resp /dev//shm/{a}", ["--resp, entry 0", "--req, entry 0"]),
    "overlapping slices": ("--req {tmp}/file@0+64K --resp {tmp}/file@4096+64K", ["--resp, entry 0", "overlaps"]),
    "empty entry": ("--req {a}, --resp {c},{d}", ["--req, entry 1", "{a},", "must not be empty"]),
    "empty list": ("--req {a} --resp =", ["--resp, entry 0", "must not be empty"]),
    "devices": (TWO + " --device ram:4096", ["--device, entry 1", "is missing", "2 in --req"]),
    "unknown kind": (PAIR + " --device ramm:1M", ["--device, entry 0 'ramm:1M'", "no kind of device 'ramm'", "./ramm:1M"]),
    "sizes": (PAIR + " --size 1M,1M", ["--size, entry 1", "no partner in --req", "2 here and 1"]),
    "protocols": (TWO + " --resp-protocol 1,2,3", ["--resp-protocol, entry 2", "no partner"]),
    # names
    "slash": ("--req {a},x/y --resp {c},{d}", ["--req, entry 1", "'x/y'", "must not contain '/'"]),
    "dots": ("--req {a} --resp ..", ["--resp, entry 0", "'..'", "not names"]),
    "bell": ("--req {a} --resp {c}.bell", ["--resp, entry 0", "{c}.bell", "reserved"]),
    "bell of a path": ("--req {tmp}/file.bell --resp {c}", ["--req, entry 0", "reserved"]),
    "long": ("--req {long} --resp {c}", ["--req, entry 0", "{long}", "240 bytes"]),
    "bad slice": ("--req {tmp}/file@1 --resp {c}", ["--req, entry 0", "/path@OFFSET+SIZE"]),
    "empty slice": ("--req {tmp}/file@0+0 --resp {c}", ["--req, entry 0", "must not be empty"]),
    "slice beyond the file": ("--req {a},{tmp}/file@1M+1M --resp {c},{d}", ["--req, entry 1", "beyond"]),
    "small file": ("--req {tmp}/small --resp {c}", ["--req, entry 0", "100 bytes", "at least"]),
    # protocols
    "letters": (PAIR + " --req-protocol xyz", ["--req-protocol, entry 0", "'xyz'", "hexadecimal", "64 bits"]),
    "zero": (PAIR + " --resp-protocol 0", ["--resp-protocol, entry 0", "'0'", "non-zero"]),
    "17 digits": (TWO + " --req-protocol 1,12345678901234567", ["--req-protocol, entry 1", "64 bits"]),
    # devices
    "no size": (PAIR + " --device ram:banana", ["--device, entry 0", "'ram:banana'", "like 64M"]),
    "size 0": (PAIR + " --device ram:0", ["--device, entry 0", "'ram:0'", "at least 4096"]),
    "size 5000": (TWO + " --device ram:4096,ram:5000", ["--device, entry 1", "'ram:5000'", "multiple of 4096"]),
    "size of 5000 digits": (PAIR + " --device ram:{digits}", ["--device, entry 0", "like 64M"]),
    "missing file": (TWO + " --device ram:4096,{tmp}/none", ["--device, entry 1", "{tmp}/none", "No such file"]),
    "missing after a named one": (TWO + " --device ram:4096:{e},{tmp}/none", ["--device, entry 1", "No such file"]),
    "directory": (TWO + " --device ram:4096,{tmp}", ["--device, entry 1", "'{tmp}'", "a file, a disk, a partition"]),
    "character device": (PAIR + " --device /dev/null", ["--device, entry 0", "'/dev/null'", "a file, a disk"]),
    "tiny file": (PAIR + " --device {tmp}/small", ["--device, entry 0", "{tmp}/small", "at least 4096"]),
    "name of a null disk": (PAIR + " --device null:4096:x", ["--device, entry 0", "null:SIZE"]),
    "RAM disk's name": (PAIR + " --device ram:4096:x/y", ["--device, entry 0", "must not contain '/'"]),
    "one file twice": (TWO + " --device {tmp}/file,{tmp}/./file", ["--device, entry 1", "one export",
                                                                 "--device, entry 0"]),
    "one RAM disk twice": (TWO + " --device ram:4096:{e},ram:4096:{e}", ["--device, entry 1", "one export"]),
    "disk and channel in one": (PAIR + " --device ram:1M:{a}", ["--device, entry 0", "no channel", "--req, entry 0"]),
    # other options
    "read-only words": (TWO + " --read-only yes,maybe", ["--read-only, entry 1", "'maybe'", "yes or no"]),
    "read-only length": (TWO + " --read-only yes,no,yes", ["--read-only, entry 2", "no partner"]),
    "poll": (PAIR + " --poll x", ["--poll 'x'", "microseconds", "from 1 to"]),
    "poll 0": (PAIR + " --poll 0", ["--poll '0'", "from 1 to"]),
    "poll in other digits": (PAIR + " --poll ٣", ["--poll", "from 1 to"]),
    "size of a channel": (PAIR + " --size 10", ["--size, entry 0", "'10'", "at least"]),
    "front end": ("--client --attach banana " + PAIR, ["--attach 'banana'", "auto", "fuse", "none"]),
    "on-peer-loss": ("--client --attach none --on-peer-loss bogus " + PAIR, ["--on-peer-loss 'bogus'", "queue",
                                                                           "timeout:SECONDS"]),
    "timeout": ("--client --attach none --on-peer-loss timeout:0 " + PAIR, ["--on-peer-loss 'timeout:0'", "SECONDS"]),
    "device of a client": ("--client --device ram:4096 " + PAIR, ["--device", "option of the server"]),
    "read-only of a client": ("--client --read-only " + PAIR, ["--read-only", "option of the server"]),
    "attach of a server": ("--attach fuse " + PAIR, ["--attach", "option of the client"]),
    # what argparse finds
    "no list": ("", ["--req, --resp", "blk --help"]),
    "half a list": ("--req {a}", ["--resp", "required"]),
    "option without a value": ("--resp {c} --req -x", ["--req", "expected one argument"]),
    "option twice": ("--req {a} --req {b} --resp {c}", ["--req", "twice"]),
    "unknown option": (PAIR + " --bogus 3", ["--bogus"]),
    "shortened option": ("--re {a} --resp {c}", ["--re"]),
    "more words": (PAIR + " {b}", ["{b}"]),
}


def test_help_loads_no_command() -> None:
    """Nor does one command load another."""
    text = ("import sys\nfrom muenfast.cli import main\nassert main(sys.argv[1:]) == 0\n"
            "print(sorted(name for name in sys.modules if name.startswith('muenfast.cli.') and '._' not in name))")
    for words, loaded in ((["--help"], "[]"), (["blk", "--help"], "['muenfast.cli.blk']")):
        done = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == loaded


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told_in_one_line_and_undone(case: str, four: dict[str, str], tmp_path: Path) -> None:
    """Status 2; the line names option, entry, value and rule; nothing was made, also where the second entry failed."""
    words, expected = MISUSE[case]
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    (tmp_path / "small").write_bytes(bytes(100))
    values = {**four, "e": unique("e"), "tmp": str(tmp_path), "long": unique("l") + "x" * 240, "digits": "9" * 5000}
    before = traces(tmp_path)
    done = run("blk", *("" if word == "=" else word.format(**values) for word in words.split()))
    line = one_line(done.stderr)
    assert done.returncode == 2, line
    for part in expected:
        assert part.format(**values) in line
    assert done.stdout == ""
    assert traces(tmp_path) == before


REFUSED = {
    "missing path": ("--req {a},{tmp}/none --resp {c},{d}", ["--req, entry 1 '{tmp}/none'", "No such file", "truncate -s"]),
    "missing path, second list": (TWO.replace("{d}", "{tmp}/none"), ["--resp, entry 1 '{tmp}/none'", "No such file"]),
    "directory as a channel": ("--req {tmp} --resp {c}", ["--req, entry 0 '{tmp}'", "not a file that can be mapped"]),
    "a size without end": (PAIR + " --device ram:1000000T", ["--device, entry 0 'ram:1000000T'", "memory"]),
    "a channel larger than memory": (TWO + " --size 1M,1000T", ["--req, entry 1", "cannot allocate"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_machine_refuses_is_told_in_one_line_and_undone(case: str, four: dict[str, str],
                                                                 tmp_path: Path) -> None:
    """Status 1; the line names option, entry and value, has no error number and the path only once."""
    words, expected = REFUSED[case]
    values = {**four, "tmp": str(tmp_path)}
    before = traces(tmp_path)
    done = run("blk", *(word.format(**values) for word in words.split()))
    line = one_line(done.stderr)
    assert done.returncode == 1
    for part in expected:
        assert part.format(**values) in line
    assert "Errno" not in line and line.count(str(tmp_path)) <= 1
    assert done.stdout == ""
    assert traces(tmp_path) == before


@pytest.mark.parametrize(("role", "words", "place"), [
    ("server", "--req {x} --resp {c}", "--resp, entry 0 '{c}'"),
    ("server", "--req {x},{y} --resp {z},{d}", "--resp, entry 1 '{d}'"),
    ("client", "--client --attach none --req {a} --resp {x}", "--req, entry 0 '{a}'"),
    ("client", "--client --attach none --req {x},{b} --resp {y},{z}", "--req, entry 1 '{b}'"),
    ("server", "--client --attach none --req {c} --resp {a}", "--req, entry 0 '{c}'")])
def test_a_second_writer_is_refused(live: tuple[dict[str, str], Program, Program], tmp_path: Path, role: str,
                                    words: str, place: str) -> None:
    """Status 1, naming entry and holder; the entries before it are undone, and the holder works on."""
    four, server, client = live
    values = {**four, **{letter: unique(letter) for letter in "xyz"}}
    before = traces(tmp_path)
    done = run("blk", *(word.format(**values) for word in words.split()))
    line = one_line(done.stderr)
    assert done.returncode == 1
    holder = server if role == "server" else client
    assert place.format(**values) in line and f"held by process {holder.pid} (muenfast blk {role}" in line
    assert traces(tmp_path) == before
    assert [entry["state"] for answer in json.loads(run("stat", "--json").stdout) for entry in answer["entries"]] == \
        ["connected", "connected", "ready", "ready"]


def test_a_held_disk_is_refused(program: Start, four: dict[str, str], tmp_path: Path) -> None:
    """A file that is exported for writing has no second server, whatever its channels; readers share."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    server = program("blk", "--req", four["a"], "--resp", four["c"], "--device", str(image))
    for words in ([], ["--read-only"]):
        done = run("blk", "--req", four["b"], "--resp", four["d"], "--device", str(image), *words)
        assert done.returncode == 1
        line = one_line(done.stderr)
        assert f"--device, entry 0 '{image}'" in line and f"held by process {server.pid}" in line
    assert server.end()[0] == 0
    lists = ["--req", f"{four['a']},{four['b']}", "--resp", f"{four['c']},{four['d']}"]
    readers = program("blk", *lists, "--device", f"{image},{image}", "--read-only")
    assert readers.lines == [f"export {four['a']} {four['c']} 1048576 {image} read-only",
                             f"export {four['b']} {four['d']} 1048576 {image} read-only"]
    assert readers.end() == (0, "")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or SETPRIV is None, reason="needs root and setpriv to take capabilities away")
def test_a_region_that_may_not_be_read(four: dict[str, str], tmp_path: Path) -> None:
    """Status 1, one line with option, entry, value and the kernel's reason."""
    region = tmp_path / "secret"
    region.write_bytes(bytes(1 << 20))
    region.chmod(0)
    assert SETPRIV is not None
    done = subprocess.run([SETPRIV, "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-m", "muenfast",
                           "blk", "--req", f"{four['a']},{region}", "--resp", f"{four['c']},{four['d']}"],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert one_line(done.stderr) == f"--req, entry 1 '{region}': Permission denied"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or SETPRIV is None, reason="needs root and setpriv to take capabilities away")
def test_no_front_end_is_said_with_the_next_step(four: dict[str, str], tmp_path: Path) -> None:
    """A client that could never make a device appear says so at once, instead of waiting for its server."""
    before = traces(tmp_path)
    assert SETPRIV is not None
    done = subprocess.run([SETPRIV, "--bounding-set=-sys_admin", sys.executable, "-m", "muenfast", "blk", "--client",
                           "--req", four["a"], "--resp", four["c"]],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert line.startswith("--attach 'auto': ") and line.endswith(")")
    assert traces(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "open to others", "below a file"])
def test_a_runtime_directory_that_is_no_place_for_claims(kind: str, four: dict[str, str], tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with its path, whichever command asks; no claim is ever kept where others could write."""
    place = tmp_path / "place"
    if kind == "open to others":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.write_text("")
    if kind == "below a file":
        place = place / "run"
    monkeypatch.setenv("MUENFAST_RUNTIME_DIR", str(place))
    for words in (["stat"], ["chan", "list"], ["blk", "--req", four["a"], "--resp", four["c"]]):
        done = run(*words)
        assert done.returncode == 1
        assert str(place.parent) in one_line(done.stderr)


# ---- help, and the output's other end


@pytest.mark.parametrize("words", [[], ["blk"], ["chan"], ["chan", "list"], ["chan", "show"], ["chan", "create"],
                                   ["chan", "rm"], ["chan", "dump"], ["modprobe"], ["modinfo"],
                                   ["stat"], ["doctor"], ["demo"]], ids=" ".join)
def test_help(words: list[str]) -> None:
    """Status 0, usage and every option on standard output."""
    done = run(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["usage: muenfast", *words]))


def test_help_of_blk_tells_every_default() -> None:
    """What happens without an option stands beside it."""
    text = run("blk", "--help").stdout
    for default in (f"{REQUEST:x}", f"{RESPONSE:x}", "ram:64M", "1M", "auto", "queue"):
        assert f"default: {default}" in text.replace("\n", " ") or default in text


def test_muenfast_alone_shows_its_commands() -> None:
    """Somebody who knows nothing yet gets the list of commands, not a complaint; no output, status 2."""
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    for command in ("blk", "modprobe", "modinfo", "chan", "stat", "doctor", "demo"):
        assert f"\n    {command} " in done.stderr


@pytest.mark.parametrize(("words", "part"), [(["bogus"], "'bogus'"), (["--bogus"], "--bogus"), (["stat", "x"], "x"),
                                             (["chan"], "ACTION"), (["chan", "bogus"], "'bogus'"),
                                             (["chan", "show"], "CHANNEL"), (["demo", "--size", "x"], "--size 'x'"),
                                             (["demo", "--tree", "/none"], "--tree '/none'"),
                                             (["demo", "--size", "16M", "--tree", os.path.dirname(os.__file__)],
                                              "--size '16M'")], ids=lambda words: " ".join(words))
def test_misuse_of_the_other_commands(words: list[str], part: str) -> None:
    """The same: status 2 and one line."""
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in one_line(done.stderr)


def test_version() -> None:
    """One line, the package's own."""
    import muenfast

    assert run("--version").stdout == f"muenfast {muenfast.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["blk", "--help"], ["chan", "list", "--all"], ["stat", "--json"],
                                   ["blk", "--req", "{a}", "--resp", "{c}"]], ids=" ".join)
def test_a_reader_that_has_gone(words: list[str], four: dict[str, str]) -> None:
    """`| head -0` ends the command quietly: no traceback, no "Exception ignored", nothing left."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-m", "muenfast", *(word.format(**four) for word in words)],
                              stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writing)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_a_full_disk_behind_the_output(four: dict[str, str]) -> None:
    """A serving command whose lines cannot be written ends with one line and status 1."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "muenfast", "blk", "--req", four["a"], "--resp", four["c"]],
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert one_line(done.stderr) == "No space left on device"


# ---- ready, and the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ready_and_leaving(program: Start, four: dict[str, str], tmp_path: Path, number: int) -> None:
    """A line per export and per disk in the order of the lists, then `ready`, all before any end; status 0, silence,
    and nothing left after either signal."""
    before = traces(tmp_path)
    lists = ["--req", f"{four['a']}, {four['b']}", "--resp", f"{four['c']},\t{four['d']}"]
    server = program("blk", *lists, "--device", "ram:0x800000,null:16m")
    assert server.lines == [f"export {four['a']} {four['c']} 8388608 ram:0x800000",
                            f"export {four['b']} {four['d']} 16777216 null:16m"]
    client = program("blk", "--client", "--attach", "none", *lists)
    assert client.lines == [f"disk {four['a']} {four['c']} 8388608 -", f"disk {four['b']} {four['d']} 16777216 -"]
    assert client.end(number) == (0, "")
    assert server.end(number) == (0, "")
    assert traces(tmp_path) == before


def test_the_server_may_leave_first(program: Start, four: dict[str, str], tmp_path: Path) -> None:
    """Either order leaves nothing; the client says that its server is gone, and still ends with 0."""
    before = traces(tmp_path)
    lists = ["--req", four["a"], "--resp", four["c"]]
    server, client = program("blk", *lists), program("blk", "--client", "--attach", "none", *lists)
    assert server.end() == (0, "")
    status, errors = client.end()
    assert status == 0
    assert errors == "" or "the server is gone" in one_line(errors)
    assert traces(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_client_that_waits_can_be_ended(program: Start, four: dict[str, str], tmp_path: Path, number: int) -> None:
    """No server, no `ready`; the signal ends the wait with status 0 and nothing left."""
    before = traces(tmp_path)
    client = held(program, "--client", "--attach", "none", "--req", four["a"], "--resp", four["c"])
    status, errors = client.end(number)
    assert (status, errors) == (0, "")
    assert client.process.stdout is not None and client.lines == []
    assert traces(tmp_path) == before


def test_a_client_says_that_it_waits(program: Start, four: dict[str, str]) -> None:
    """Whoever sees no `ready` is told what is missing, once; the server that comes later is found."""
    lists = ["--req", four["a"], "--resp", four["c"]]
    client = program("blk", "--client", "--attach", "none", *lists, ready=False)
    assert client.process.stderr is not None
    line = client.process.stderr.readline()
    assert line == (f"muenfast: disk {four['a']}/{four['c']}: waiting: no server answered within 2 s: is `muenfast blk` "
                    "running there, without --shm?\n")
    server = program("blk", *lists, "--device", "ram:4096")
    assert client.wait_ready() == [f"disk {four['a']} {four['c']} 4096 -"]
    assert client.end() == (0, "")
    assert server.end() == (0, "")


@pytest.mark.parametrize(("option", "expected"), [("--resp-protocol", RESPONSE), ("--req-protocol", 0x1234)])
def test_a_peer_of_another_protocol_is_said(program: Start, four: dict[str, str], option: str, expected: int) -> None:
    """Whoever reads the channel says what stands in it and what it expects, once, and goes on waiting."""
    lists = ["--req", four["a"], "--resp", four["c"]]
    server = program("blk", *lists, option, "1234")
    client = program("blk", "--client", "--attach", "none", *lists, ready=False)
    reader, channel = (client, four["c"]) if option == "--resp-protocol" else (server, four["a"])
    assert reader.process.stderr is not None
    line = reader.process.stderr.readline()
    assert f"channel {channel}: header is protocol" in line and f"expected protocol {expected:x}" in line
    assert client.end()[0] == server.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_of_the_start(four: dict[str, str], tmp_path: Path, number: int) -> None:
    """Before there is a handler the signal ends the process, afterwards it leaves with 0: nothing is left either way.

    The start is the program's: what the interpreter does with a signal before it runs the first line is not ours.
    """
    before = traces(tmp_path)
    program = "import sys; print('first line', flush=True); from muenfast.cli import main; sys.exit(main())"
    for delay in range(0, 240, 8):
        process = subprocess.Popen([sys.executable, "-c", program, "blk", "--req", f"{four['a']},{four['b']}",
                                    "--resp", f"{four['c']},{four['d']}"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "first line\n"
        time.sleep(delay / 1000)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode in (0, 1, 130, -number)
        assert traces(tmp_path) == before, f"after {delay} ms, status {process.returncode}"


def test_names_stay_words(program: Start, tmp_path: Path) -> None:
    """White space and bytes that are no text are escaped as in /proc/mounts: lines are words, whatever the names."""
    image = tmp_path / "my disk\\1"
    image.write_bytes(bytes(4096))
    request, response = unique("a b\nc"), os.fsdecode(os.fsencode(unique("é")) + b"\xff")
    server = program("blk", "--req", request, "--resp", response, "--device", str(image))
    (line,) = server.lines
    escaped = request.replace(" ", "\\040").replace("\n", "\\012")
    assert line.split(" ") == ["export", escaped, response[:-1] + "\\377", "4096",
                               f"{tmp_path}/my\\040disk\\1341"]
    rows = run("chan", "list").stdout.splitlines()
    assert [row for row in rows if row.startswith(escaped + " ")]
    assert server.end() == (0, "")


# ---- systemd


def notified(path: str) -> socket.socket:
    """A socket as systemd has it."""
    new = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    new.bind(path)
    new.settimeout(20)
    return new


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(program: Start, four: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         abstract: bool) -> None:
    """READY=1 once everything serves, STOPPING=1 on the way out, over a path or an abstract socket."""
    name = unique("notify") if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
    with notified(f"\0{name}" if abstract else name) as systemd:
        server = program("blk", "--req", four["a"], "--resp", four["c"])
        assert systemd.recv(100) == b"READY=1"
        assert server.end() == (0, "")
        assert systemd.recv(100) == b"STOPPING=1"


def test_systemd_is_not_told_too_early(program: Start, four: dict[str, str], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without its server is not ready."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with notified(str(tmp_path / "notify")) as systemd:
        client = held(program, "--client", "--attach", "none", "--req", four["a"], "--resp", four["c"])
        assert client.end() == (0, "")
        assert systemd.recv(100) == b"STOPPING=1"


def test_a_notify_socket_out_of_reach(program: Start, four: dict[str, str], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """An inherited variable that leads nowhere is said, and the disk serves all the same."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    server = program("blk", "--req", four["a"], "--resp", four["c"])
    status, errors = server.end()
    assert status == 0
    assert errors.splitlines() == [f"muenfast: NOTIFY_SOCKET {tmp_path}/none: No such file or directory"] * 2


# ---- life after death


def test_a_killed_server_is_followed_at_once(program: Start, four: dict[str, str], tmp_path: Path) -> None:
    """kill -9: the next server adopts the channels, serves the waiting client, and its clean leave removes all."""
    before = traces(tmp_path)
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    lists = ["--req", four["a"], "--resp", four["c"]]
    server = program("blk", *lists, "--device", str(image))
    with BlockDevice(req=four["a"], resp=four["c"]) as disk:
        disk.pwrite(b"before", 0)
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        server = program("blk", *lists, "--device", str(image))
        assert disk.pread(6, 0) == b"before"
        disk.pwrite(b"after!", 4096)
    assert server.end() == (0, "")
    assert image.read_bytes()[4096:4102] == b"after!"
    assert traces(tmp_path) == before


def test_everybody_killed(program: Start, four: dict[str, str], tmp_path: Path) -> None:
    """What a dead server and a dead client left serves the next ones, whose leave removes it, sockets included."""
    before = traces(tmp_path)
    lists = ["--req", four["a"], "--resp", four["c"]]
    for _ in range(2):
        server, client = program("blk", *lists), program("blk", "--client", "--attach", "none", *lists)
        for each in (client, server):
            assert each.end(signal.SIGKILL)[0] == -signal.SIGKILL
    server, client = program("blk", *lists), program("blk", "--client", "--attach", "none", *lists)
    assert client.end() == (0, "")
    assert server.end() == (0, "")
    assert traces(tmp_path) == before


def test_a_named_ram_disk_outlives_its_server(program: Start, four: dict[str, str]) -> None:
    """ram:SIZE:NAME stays until it is removed, and the next server finds its data; another size is refused."""
    lists, name = ["--req", four["a"], "--resp", four["c"]], unique("ram")
    for data in (bytes(5), b"hello"):
        server = program("blk", *lists, "--device", f"ram:64K:{name}")
        with BlockDevice(req=four["a"], resp=four["c"]) as disk:
            assert disk.pread(5, 4096) == data
            disk.pwrite(b"hello", 4096)
        assert server.end() == (0, "")
    done = run("blk", *lists, "--device", f"ram:128K:{name}")
    assert done.returncode == 2
    assert f"--device, entry 0 'ram:128K:{name}'" in one_line(done.stderr)
    assert run("chan", "rm", name).returncode == 0


def test_a_server_without_the_named_region_of_another_size_keeps_it(four: dict[str, str]) -> None:
    """Only what a failing set-up made itself goes: a region that stood before stays."""
    name = unique("ram")
    assert run("chan", "create", name, "--size", "64K").returncode == 0
    lists = ["--req", f"{four['a']},{four['b']}", "--resp", f"{four['c']},{four['d']}"]
    assert run("blk", *lists, "--device", f"ram:64K:{name},/none").returncode == 2
    assert Path("/dev/shm", name).stat().st_size == 65536
    assert run("chan", "rm", name).returncode == 0


# ---- chan


def shown(channel: str) -> dict[str, object]:
    done = run("chan", "show", channel, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def listed(*words: str) -> dict[str, dict[str, object]]:
    return {entry["name"]: entry for entry in json.loads(run("chan", "list", "--json", *words).stdout)}


def test_chan_create_show_and_rm(four: dict[str, str]) -> None:
    """A made channel has its size and mode, is never active, used by nobody (whoever looks does not count), and goes
    when it is removed; its bell goes along."""
    name = four["a"]
    done = run("chan", "create", name, "--size", "0x10000", "--mode", "640")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = Path("/dev/shm", name).stat()
    assert (found.st_size, found.st_mode & 0o777) == (65536, 0o640)
    for entry in (shown(name), listed()[name]):
        assert (entry["bytes"], entry["users"], entry["writer"], entry["channel"]) == (65536, [], None, False)
        assert (entry["bell"], entry["epoch"]) == (None, 0)
    text = run("chan", "show", name).stdout
    assert text.startswith(f"{name}: 65536 bytes, never active\n") and "user " not in text
    (row,) = [row for row in run("chan", "list").stdout.splitlines() if row.startswith(name)]
    assert row.split() == [name, "65536", "never", "active", "-", "-", "-", "-", "-", "0", "-"]
    Path("/dev/shm", name + ".bell").write_bytes(bytes(4096))
    assert run("chan", "rm", name).returncode == 0
    assert not any(Path("/dev/shm", each).exists() for each in (name, name + ".bell"))


def test_chan_create_is_all_or_nothing(four: dict[str, str]) -> None:
    """One that exists: status 1, one line that names it, and those made before it are gone again."""
    assert run("chan", "create", four["b"]).returncode == 0
    done = run("chan", "create", four["a"], four["b"], four["c"])
    assert (done.returncode, one_line(done.stderr)) == (1, f"/dev/shm/{four['b']}: {EXISTS}")
    assert not Path("/dev/shm", four["a"]).exists() and not Path("/dev/shm", four["c"]).exists()
    assert run("chan", "rm", four["b"]).returncode == 0


@pytest.mark.parametrize(("words", "parts"), [
    (["create", "{a}", "x/y"], ["CHANNEL, entry 1 'x/y'"]),
    (["create", "{a}", "{a}"], ["CHANNEL, entry 1", "made once"]),
    (["create", "{a}", "--size", "0"], ["--size '0'", "at least"]),
    (["create", "{a}", "--mode", "888"], ["--mode '888'", "octal"]),
    (["create", "{a}", "--mode", "4777"], ["--mode '4777'", "octal"]),
    (["create", "/dev/shm/{a}@0+4096"], ["/dev/shm/{a}@0+4096", "slice"]),
    (["rm", "/dev/shm/{a}@0+4096"], ["/dev/shm/{a}@0+4096", "slice"]),
    (["rm", "{a}.bell"], ["CHANNEL, entry 0", "reserved"]),
    (["dump", "{a}", "-n", "0"], ["above 0"]),
    (["dump", "{a}", "-n", "x"], ["-n"])])
def test_chan_misuse(words: list[str], parts: list[str], four: dict[str, str]) -> None:
    """Status 2, one line, nothing made or removed."""
    done = run("chan", *(word.format(**four) for word in words))
    line = one_line(done.stderr)
    assert done.returncode == 2, line
    for part in parts:
        assert part.format(**four) in line
    assert not Path("/dev/shm", four["a"]).exists()


@pytest.mark.parametrize("action", ["show", "dump", "rm"])
def test_chan_of_what_is_not_there(action: str, four: dict[str, str]) -> None:
    """Status 1 and the path that was looked for."""
    done = run("chan", action, four["a"])
    assert (done.returncode, one_line(done.stderr)) == (1, f"/dev/shm/{four['a']}: {NONE}")


def test_chan_rm_goes_on_after_one_that_fails(four: dict[str, str]) -> None:
    """As rm(1): what can go goes, each failure has its line, the status says that there was one."""
    assert run("chan", "create", four["b"], four["d"]).returncode == 0
    done = run("chan", "rm", four["a"], four["b"], four["c"], four["d"])
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"muenfast: /dev/shm/{four[letter]}: {NONE}" for letter in "ac"]


def test_chan_of_a_live_connection(live: tuple[dict[str, str], Program, Program]) -> None:
    """Writers and users by process, protocol, geometry, counters and lag, as text and as JSON."""
    four, server, client = live
    for name, writer, role, protocol in ((four["a"], client, "client", REQUEST), (four["c"], server, "server",
                                                                                RESPONSE)):
        entry = shown(name)
        assert (entry["protocol"], entry["size"], entry["elements"], entry["channel"], entry["fits"]) == \
            (protocol, 4120, 254, True, True)
        assert isinstance(entry["writer"], dict) and isinstance(entry["users"], list)
        assert (entry["writer"]["pid"], entry["writer"]["role"]) == (writer.pid, f"muenfast blk {role}")
        assert {user["pid"]: user["writable"] for user in entry["users"]} == \
            {server.pid: writer is server, client.pid: writer is client}
        assert entry["wc"] == entry["wsc"] == 1 and entry["lag"] == 0
        text = run("chan", "show", name).stdout
        assert text.startswith(f"{name}: 1048576 bytes, active\n")
        assert f"  protocol   {protocol:#x}\n" in text and f"  writer     {writer.pid} (muenfast blk {role})\n" in text
        assert "  bell       rings, reader at 1, lag 0" in text
        (row,) = [row for row in run("chan", "list").stdout.splitlines() if row.startswith(name)]
        assert row.split() == [name, "1048576", "active", f"{protocol:x}", "4120", "254", "1", "0", "2",
                               str(writer.pid), "(muenfast", "blk", f"{role})"]


def test_chan_rm_of_a_live_connection(live: tuple[dict[str, str], Program, Program]) -> None:
    """In use means refused, naming a user; --force takes the names away, and both ends still leave with 0."""
    four, server, client = live
    done = run("chan", "rm", four["a"])
    assert done.returncode == 1
    assert f"region {four['a']} is already held by process {server.pid}" in one_line(done.stderr)
    assert run("chan", "rm", "--force", four["a"], four["c"]).returncode == 0
    assert client.end()[0] == 0
    assert server.end()[0] == 0


def test_chan_of_a_dead_connection(program: Start, four: dict[str, str], tmp_path: Path) -> None:
    """After kill -9 the header stands as it was, the writer is gone, the elements are still to be read; rm removes all
    that is left."""
    before = traces(tmp_path)
    lists = ["--req", four["a"], "--resp", four["c"]]
    server, client = program("blk", *lists), program("blk", "--client", "--attach", "none", *lists)
    for each in (client, server):
        each.end(signal.SIGKILL)
    entry = shown(four["a"])
    assert entry["epoch"] != 0 and (entry["users"], entry["writer"]) == ([], None)
    assert listed()[four["a"]]["users"] == []
    assert run("chan", "dump", four["a"]).stdout.startswith(f"{four['a']}: active, 1 elements\nelement 0, 4120 bytes\n")
    assert Path("/dev/shm", four["a"]).exists(), "who looks is no leaver"
    assert run("chan", "rm", four["a"], four["c"]).returncode == 0
    assert run("stat").returncode == 0
    # The records of the dead go with the next process that looks there.
    assert run("chan", "list").returncode == 0
    assert traces(tmp_path) == before


def test_chan_dump(live: tuple[dict[str, str], Program, Program]) -> None:
    """The newest elements first, numbered, whole in JSON and shortened in text."""
    four, server, client = live
    client.end()
    with BlockDevice(req=four["a"], resp=four["c"]) as disk:
        for number in range(3):
            disk.pwrite(bytes([0x41 + number]) * 4096, number * 4096)
        dumped = json.loads(run("chan", "dump", four["a"], "-n", "2", "--json").stdout)
        text = run("chan", "dump", four["a"], "-n", "2", "--bytes", "48").stdout
    assert (dumped["name"], dumped["state"]) == (four["a"], "active")
    numbers = [element["number"] for element in dumped["elements"]]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 2
    newest = bytes.fromhex(dumped["elements"][0]["hex"])
    assert len(newest) == 4120 and newest[24:] == b"C" * 4096
    assert text.splitlines()[0] == f"{four['a']}: active, 2 elements"
    assert "CCCCCCCC" in text and text.count("\n") == 1 + 2 * (1 + 3)
    assert "inactive, 0 elements" in run("chan", "dump", four["a"]).stdout


def test_chan_list_leaves_out_what_is_no_channel(four: dict[str, str]) -> None:
    """Foreign memory shows with --all only; a file too small for a header is no channel."""
    for letter, data in (("a", b"\x01" * 4096), ("b", b"\x01")):
        Path("/dev/shm", four[letter]).write_bytes(data)
    try:
        assert not {four["a"], four["b"]} & set(listed())
        assert {four["a"], four["b"]} <= set(listed("--all"))
        assert run("chan", "show", four["a"]).stdout.startswith(f"{four['a']}: 4096 bytes, no channel\n")
        assert run("chan", "show", four["b"]).stdout.startswith(f"{four['b']}: 1 bytes, no channel\n")
        assert run("chan", "dump", four["b"]).returncode == 2
    finally:
        for letter in "ab":
            Path("/dev/shm", four[letter]).unlink()


@pytest.mark.parametrize("header", [b"\xff" * 64, bytes(8) + b"\xff" * 56], ids=["all ones", "no transport"])
def test_chan_survives_any_header(header: bytes, four: dict[str, str]) -> None:
    """A hostile writer's numbers are shown, never believed."""
    transport = 0x487312B6B79A9B6D  # docs/protocol.md: SHMStream v2
    region = Path("/dev/shm", four["a"])
    region.write_bytes(transport.to_bytes(8, "little") + header[8:] + bytes(4096))
    try:
        text = run("chan", "show", four["a"]).stdout
        assert "geometry does not fit" in text and str((1 << 64) - 1) in text
        for words in (["dump", four["a"]], ["dump", four["a"], "--json"], ["list"], ["list", "--json"]):
            done = run("chan", *words)
            assert done.returncode in (0, 1)
            assert "Traceback" not in done.stderr
    finally:
        region.unlink()


# ---- stat


def test_stat(live: tuple[dict[str, str], Program, Program]) -> None:
    """A block per process, a line per export and disk, and the counters that are not 0."""
    four, server, client = live
    done = run("stat")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for expected in (f"process {server.pid}: muenfast blk",
                     f"  export {four['a']} {four['c']} ram:8M 8388608 bytes: connected",
                     f"  export {four['b']} {four['d']} ram:16M 16777216 bytes: connected",
                     f"process {client.pid}: muenfast blk --client",
                     f"  client {four['a']} {four['c']} - 8388608 bytes: ready"):
        assert expected in lines
    answers = {answer["pid"]: answer for answer in json.loads(run("stat", "--json").stdout)}
    assert answers.keys() == {server.pid, client.pid}
    first = answers[server.pid]["entries"][0]
    assert answers[server.pid]["ok"] and first["counters"]["connections"] == 1
    assert (first["role"], first["read_only"], first["state"]) == ("export", False, "connected")


def test_stat_counts(live: tuple[dict[str, str], Program, Program]) -> None:
    """What went through is what the server counted."""
    four, server, client = live
    client.end()
    with BlockDevice(req=four["a"], resp=four["c"]) as disk:
        disk.pwrite(bytes(64 << 10), 0)
        disk.pread(8 << 10, 0)
        disk.flush()
        (answer,) = json.loads(run("stat", "--json").stdout)
    counters = answer["entries"][0]["counters"]
    assert (counters["bytes_written"], counters["bytes_read"], counters["syncs"]) == (65536, 8192, 1)
    assert counters["failed"] == counters["rejected"] == 0


def test_stat_without_anything() -> None:
    """Nothing serves: that is said, and is no error."""
    done = run("stat")
    assert (done.returncode, done.stdout) == (0, "nothing of this user is serving\n")
    assert json.loads(run("stat", "--json").stdout) == []


def test_stat_forgets_the_dead(live: tuple[dict[str, str], Program, Program], runtime: Path) -> None:
    """The socket of a killed process is removed; the others are shown, status 0."""
    four, server, client = live
    client.end(signal.SIGKILL)
    done = run("stat")
    assert done.returncode == 0
    assert f"process {server.pid}" in done.stdout and str(client.pid) not in done.stdout
    assert [path.name for path in (runtime / "control").iterdir()] == [f"{server.pid}.sock"]
    assert run("chan", "show", four["a"]).returncode == 0  # whoever opens a region sweeps the claims of the dead


def test_stat_of_a_stopped_process(live: tuple[dict[str, str], Program, Program]) -> None:
    """No answer is said after a bounded time, with status 1; the others are shown."""
    _, server, client = live
    client.process.send_signal(signal.SIGSTOP)
    try:
        done = run("stat", timeout=20)
        assert done.returncode == 1
        assert (f"process {client.pid}: no answer: it is stopped (SIGSTOP); `kill -CONT {client.pid}` has it go on\n"
                in done.stdout)
        assert f"process {server.pid}: muenfast blk\n" in done.stdout
        assert {answer["pid"]: answer["ok"] for answer in json.loads(run("stat", "--json", timeout=20).stdout)} == \
            {server.pid: True, client.pid: False}
    finally:
        client.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("request_line", [b"", b"\n", b"nonsense\n", b"[]\n", b'{"command": "destroy"}\n', b"\xff\n",
                                          b"[" * 100000 + b"\n", b"x" * (1 << 17)])
def test_the_control_socket_survives_any_request(live: tuple[dict[str, str], Program, Program], runtime: Path,
                                                 request_line: bytes) -> None:
    """Whatever is sent there, the next one who asks properly is answered."""
    _, server, _ = live
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
        asker.settimeout(20)
        asker.connect(os.path.relpath(runtime / "control" / f"{server.pid}.sock"))
        try:
            asker.sendall(request_line)
            asker.shutdown(socket.SHUT_WR)
            while asker.recv(4096):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass  # hung up on
    assert f"process {server.pid}: muenfast blk\n" in run("stat").stdout


def test_a_silent_asker_does_not_hold_up_the_end(live: tuple[dict[str, str], Program, Program],
                                                 runtime: Path) -> None:
    """Somebody who connects and says nothing is dropped in a bounded time."""
    _, server, _ = live
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
        asker.connect(os.path.relpath(runtime / "control" / f"{server.pid}.sock"))
        assert server.end(timeout=20)[0] == 0


WAIT = """
import os, signal, sys
from muenfast.cli._serving import Stop

def trace(frame, event, arg):
    global seen
    if event == "line":
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGTERM)
    return trace

point, seen = 0, 0
while seen == point or not point:
    point, seen, looks = point + 1, 0, [None] * 2
    with Stop() as stop:
        sys.settrace(trace)
        stop.wait(lambda: not looks or looks.pop())
        sys.settrace(None)
        assert stop.is_set() == (seen >= point), point
    seen = min(seen, point)
print(point)
"""


def test_a_signal_at_any_line_of_the_wait_ends_it() -> None:
    """Whatever lock the wait may hold at that moment, the handler does not want it."""
    done = subprocess.run([sys.executable, "-c", WAIT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_server_in_the_background_of_a_script_ends_by_signal(number: int, four: dict[str, str], tmp_path: Path) -> None:
    """A shell's & has SIGINT ignored; the server leaves all the same, with 0 and nothing left."""
    script = (f': > ready\n"$0" -m muenfast blk --req {four["a"]} --resp {four["c"]} --device ram:64K > ready & server=$!\n'
              f'while ! grep -q ready ready; do sleep 0.05; done\nkill -{number:d} $server\nwait $server')
    done = subprocess.run(["sh", "-c", script, sys.executable], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_partition_that_is_no_number(four: dict[str, str], tmp_path: Path) -> None:
    """The file is there: what follows its name is at fault."""
    (tmp_path / "disk").write_bytes(bytes(8192))
    ended = run("blk", "--req", four["a"], "--resp", four["c"], "--device", f"{tmp_path}/disk#x")
    assert ended.returncode == 2
    assert f"a partition of {tmp_path}/disk is a number from 1, not 'x'" in ended.stderr
    ended = run("blk", "--req", four["a"], "--resp", four["c"], "--device", f"{tmp_path}/nowhere/disk")
    assert f"make its directory, {tmp_path}/nowhere, first" in ended.stderr


def test_stat_tells_what_is_in_flight(capsys: pytest.CaptureFixture[str]) -> None:
    """And says nothing of it where there is nothing."""
    entry = {"role": "client", "req": "a", "resp": "c", "size": 4096, "state": "ready", "failure": None, "in_flight": 3,
             "counters": {"reads": 7, "writes": 0}}
    stat._show(entry)
    assert "    in flight 3, reads 7\n" in capsys.readouterr().out
    stat._show(entry | {"in_flight": 0})
    assert "    reads 7\n" in capsys.readouterr().out
