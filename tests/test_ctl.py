"""`muenfast ctl`: exports that are created, destroyed and resized while others run, and what their clients see."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import PREFIX, Program, run, unique
from helpers import block, eventually

from muenfast import BlockDevice, BlockServer, control, exports_from_lists
from muenfast.errors import UsageError
from muenfast.serving import check_name

Start = Callable[..., Program]
MIB = 1 << 20


def ctl(*words: str | int | os.PathLike[str], status: int = 0) -> str:
    """Runs `muenfast ctl`; what it printed, on standard error where it is to fail."""
    done = run("ctl", *(os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in words))
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout if status == 0 else done.stderr


def ask(server: Program, **request: Any) -> dict[str, Any]:
    return control.ask(server.pid, request, timeout=30)


def regions() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if PREFIX in name}


def short(word: str = "x") -> str:
    """A name for an export, whose channels nobody else uses."""
    name = unique(word)
    assert len(name) <= 31
    return name


@pytest.fixture(name="program")
def ending(program: Start) -> Iterator[Start]:
    """As conftest's, but what still runs at the end is told to end, and has to do so cleanly."""
    started: list[Program] = []

    def start(*words: str, **options: Any) -> Program:
        started.append(program(*words, **options))
        return started[-1]

    yield start
    for one in reversed(started):
        if one.process.poll() is None:
            assert one.end()[0] == 0


@pytest.fixture
def server(program: Start) -> Program:
    """One without exports."""
    started = program("blk", "--control")
    assert started.lines == []
    return started


@contextlib.contextmanager
def client_of(name: str, **options: Any) -> Iterator[BlockDevice]:
    with BlockDevice(f"{name}_req", f"{name}_resp", **options) as disk:
        yield disk


# -------------------------------------------------------------- create, list, destroy

def test_an_export_comes_and_goes(server: Program) -> None:
    """Created, it serves with the defaults; listed, with an ID that is not used again; destroyed, nothing is left of it."""
    name = short()
    assert ctl("create", name) == f"export {name}_req {name}_resp 67108864 ram:64M\n"
    with client_of(name) as disk:
        disk.pwrite(block(7), 8192)
        assert disk.pread(4096, 8192) == block(7) and disk.size == 64 * MIB
        eventually(lambda: "connected" in ctl("list"))
        assert ctl("list") == f"1 {name} {name}_req {name}_resp 67108864 ram:64M connected\n"
        assert re.fullmatch(rf"1 {name} .*\n    reads \d+, writes 1, .*\n", ctl("status", name))
    eventually(lambda: ctl("list").endswith("waiting\n"))
    assert ctl("destroy", "1") == f"destroyed 1 {name}\n"
    assert ctl("list") == "" and not regions()
    ctl("create", name, "--device", "null:8M", "--read-only")
    assert ctl("list") == f"2 {name} {name}_req {name}_resp 8388608 null:8M waiting read-only\n"
    assert re.fullmatch(rf"process {server.pid}: muenfast \S+, up \d+ s, exports: 1\n", ctl("ping"))
    assert server.end() == (0, "")
    assert not regions()


def test_answers_as_json(server: Program) -> None:
    """Each subcommand's, with what a program needs."""
    name = short()
    made = json.loads(ctl("create", name, "--device", "ram:4M", "--json"))
    assert made["ok"] and made["pid"] == server.pid
    assert made["export"] == {
        "id": 1, "name": name, "req": f"{name}_req", "resp": f"{name}_resp", "shm": None, "read_only": False,
        "size": 4 * MIB, "device": "ram:4M", "disks": [{"device": "ram:4M", "size": 4 * MIB}], "state": "waiting"}
    assert json.loads(ctl("list", "--json"))["exports"] == [made["export"]]
    assert json.loads(ctl("status", name, "--json"))["exports"][0]["counters"]["writes"] == 0
    ping = json.loads(ctl("ping", "--json"))
    assert (ping["pid"], ping["exports"]) == (server.pid, 1) and ping["uptime"] > 0 and ping["version"]
    assert json.loads(ctl("resize", name, "8M", "--json"))["export"]["size"] == 8 * MIB
    assert json.loads(ctl("destroy", "--all", "--json"))["exports"][0]["name"] == name
    done = run("ctl", "destroy", name, "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["ok"] is False and "no export of that name" in done.stderr


@pytest.mark.parametrize(("words", "text"), [
    (["destroy"], "NAME|ID: either the export's name or --all"),
    (["resize", "x", "1M", "--disk", "y"], "--disk 'y': a disk's number is a number from 0"),
    (["create", "x", "--poll", "0"], "--poll '0': a pause in microseconds is a number"),
    (["create", "x", "--device", "rom:1M"], "--device, entry 0 'rom:1M': there is no kind of device"),
    (["list", "--pid", "x"], "--pid 'x': a process' number"),
    (["resize"], "the following arguments are required: NAME|ID (muenfast ctl resize --help tells more)"),
    (["list", "--foo"], "unrecognized arguments: --foo (muenfast ctl list --help tells more)"),
    (["list"], "no `muenfast blk` of this user is serving")])
def test_errors_as_json(words: list[str], text: str) -> None:
    """Whoever finds it, an error is an object on standard output, and a line on standard error; the same without --json but
    for the object."""
    done = run("ctl", *words, "--json")
    answer = json.loads(done.stdout)
    assert set(answer) == {"ok", "error", "status"} and answer["ok"] is False
    assert text in answer["error"] and answer["status"] == done.returncode == (1 if words == ["list"] else 2)
    assert done.stderr == f"muenfast: {answer['error']}\n"
    plain = run("ctl", *words)
    assert (plain.stdout, plain.stderr, plain.returncode) == ("", done.stderr, done.returncode)


def test_exports_of_the_command_line_have_names_too(program: Start) -> None:
    """The request channel's, or exportN where that is too long, a number, or taken; `stat` shows them, too."""
    long, name = unique("x" * 40), short()
    program("blk", "--req", f"{long},{name}", "--resp", f"{unique()},{unique()}", "--device", "ram:1M,null:1M")
    assert [line.split()[:2] for line in ctl("list").splitlines()] == [["1", "export1"], ["2", name]]
    entries = json.loads(run("stat", "--json").stdout)[0]["entries"]
    assert [(entry["id"], entry["name"]) for entry in entries] == [(1, "export1"), (2, name)]
    ctl("destroy", name)
    assert [line.split()[1] for line in ctl("list").splitlines()] == ["export1"]


def test_over_a_buffer_one_export_has_several_disks(server: Program, tmp_path: Path) -> None:
    """--device takes a list there; a path is meant from where ctl was called."""
    name, buffer = short(), unique("shm")
    (tmp_path / "image").write_bytes(bytes(2 * MIB))
    done = subprocess.run([sys.executable, "-m", "muenfast", "ctl", "create", name, "--shm", buffer, "--shm-size", "1M",
                           "--device", "ram:4M,image"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (
        f"export {name}_req {name}_resp 4194304 ram:4M 2097152 {tmp_path}/image shm {buffer}\n", "")
    with client_of(name, shm=buffer, device=1) as disk:
        disk.pwrite(block(3), 4096)
        disk.flush()
    assert (tmp_path / "image").read_bytes()[4096:8192] == block(3)
    assert ctl("list").split()[4:6] == [str(6 * MIB), f"ram:4M,{tmp_path}/image"]


def test_a_store_that_hangs_holds_up_no_other(program: Start, tmp_path: Path) -> None:
    """Neither where it is opened, nor where it is given another size; --force ends the latter."""
    (tmp_path / "hangs.py").write_text(
        "import pathlib, time\n"
        "HERE = pathlib.Path(__file__).parent\n"
        "class X:\n"
        "    def __init__(self, what):\n"
        "        self.what = what\n"
        "    def wait(self, where):\n"
        "        if where == self.what:\n"
        "            (HERE / where).touch()\n"
        "            while not (HERE / 'go').exists():\n"
        "                time.sleep(0.01)\n"
        "    def open(self):\n"
        "        self.wait('open')\n"
        "    def resize(self, size):\n"
        "        self.wait('resize')\n"
        "    def get_size(self):\n"
        "        return 1 << 20\n"
        "    def pread(self, buf, offset):\n"
        "        pass\n")
    server = program("blk", "--control")
    store = f"py:{tmp_path}/hangs.py:X"
    opened, sized, other = short("o"), short("s"), short("x")
    with ThreadPoolExecutor(2) as pool:
        opening = pool.submit(ask, server, command="create", name=opened, device=[f"{store}:open"], timeout="1200")
        eventually((tmp_path / "open").exists)
        ctl("create", sized, "--device", f"{store}:resize", "--timeout", 1200, "--pid", server.pid)
        assert "there is an export of that name" in ctl("create", opened, "--pid", server.pid, status=2)
        resizing = pool.submit(ask, server, command="resize", name=sized, size="2M")
        eventually((tmp_path / "resize").exists)
        ctl("create", other, "--device", "ram:1M", "--pid", server.pid)
        ctl("resize", other, "2M", "--pid", server.pid)
        ctl("destroy", other, "--pid", server.pid)
        ctl("destroy", sized, "--force", "--pid", server.pid)
        assert "resize() had not returned" in resizing.result()["error"]
        assert not opening.done()
        (tmp_path / "go").touch()
        assert opening.result()["ok"]
    assert ctl("list", "--pid", server.pid).split()[1] == opened


@pytest.mark.parametrize(("name", "rule"), [
    ("", "1 to 31 characters"), ("x" * 32, "1 to 31 characters, this has 32"), ("a b", "no blanks"), ("a\tb", "no blanks"),
    ("17", "would be an ID")])
def test_names(server: Program, name: str, rule: str) -> None:
    assert rule in ctl("create", name, status=2)
    with pytest.raises(UsageError, match="31 characters|no blanks|an ID"):
        check_name(name)


def test_a_name_of_31_characters_is_one(server: Program) -> None:
    name = unique("x" * 40)[:31]
    ctl("create", name, "--device", "null:1M")
    assert ctl("list").split()[1] == name


def test_what_cannot_be_created_leaves_nothing(server: Program, tmp_path: Path) -> None:
    """Errors as precise as `muenfast blk` has them, status 2 or 1, and no region, claim or entry afterwards."""
    name, other = short(), short()
    ctl("create", other, "--device", "ram:1M")
    before = regions()
    taken = tmp_path / "taken"
    taken.write_bytes(bytes(MIB))
    ctl("create", "file", "--req", unique(), "--resp", unique(), "--device", taken)
    before |= regions()
    for words, status, text in [
            (["--device", "rom:4M"], 2, "--device, entry 0 'rom:4M': there is no kind of device 'rom'"),
            (["--device", "ram:5000"], 2, "--device, entry 0 'ram:5000': a size here is at least 4096 bytes"),
            (["--device", tmp_path / "missing"], 2, "it cannot be opened for reading and writing: No such file"),
            (["--device", "ram:1M,ram:1M"], 2, "--device, entry 1 'ram:1M': inline channels carry one disk"),
            (["--device", taken], 1, f"{taken} is already held by process"),
            (["--req", f"{other}_req"], 2, f"export {other} has it"),
            (["--resp", f"{other}_req"], 2, f"export {other} has it"),
            (["--req", f"{name}_resp"], 2, "a channel carries one direction of one connection"),
            (["--req", "a,b"], 2, "one export has one entry here"),
            (["--req-protocol", "xyz"], 2, "--req-protocol, entry 0 'xyz': a protocol is a non-zero hexadecimal number"),
            (["--size", "17"], 2, "--size, entry 0 '17'"), (["--poll", "0"], 2, "--poll '0'"),
            (["--shm-size", "1M"], 2, "names no buffer for this entry")]:
        assert text in ctl("create", name, *words, status=status), words
    assert "there is an export of that name" in ctl("create", other, status=2)
    assert regions() == before and [line.split()[1] for line in ctl("list").splitlines()] == [other, "file"]
    ctl("create", name, "--device", "ram:1M")   # nothing stands in its way
    assert server.end() == (0, "")


def test_what_is_asked_is_checked(server: Program) -> None:
    """A request of another form, a field that is unknown, missing or of another type: an error, status 2, and nothing
    happens."""
    name = short()
    for request, text in [
            ({"command": "creat"}, "the commands are: create, destroy, list, ping, resize, show, status"),
            ({"command": ["create"]}, "the commands are"), ({}, "the commands are"),
            ({"command": "create"}, "field 'name': the field is missing"),
            ({"command": "create", "name": 5}, "the field name is a string"),
            ({"command": "create", "name": "a\0b"}, "the field name is a string"),
            ({"command": "create", "name": name, "device": ["\ud800"]}, "the field device is a list"),
            *(({"command": "create", "name": name, field: "\ud800"}, f"the field {field} is a string") for field in
              ("req", "resp", "shm", "size", "shm_size", "req_protocol", "resp_protocol", "pool", "timeout", "inject")),
            *(({"command": command, "name": "\ud800"}, "the field name is a string") for command in
              ("create", "destroy", "resize", "show")),
            ({"command": "resize", "name": name, "size": "\ud800"}, "the field size is a string"),
            ({"command": "\ud800"}, "the commands are"), ({"command": "list", "\ud800": 1}, "no such field"),
            ({"command": "create", "name": name, "device": "ram:1M"}, "the field device is a list"),
            ({"command": "create", "name": name, "device": []}, "the field device is a list"),
            ({"command": "create", "name": name, "device": ["ram:1M", 1]}, "the field device is a list"),
            ({"command": "create", "name": name, "read_only": 1}, "the field read_only is true or false"),
            ({"command": "create", "name": name, "poll": True}, "the field poll is a whole number"),
            ({"command": "create", "name": name, "poll": 10**8}, "--poll"),
            ({"command": "create", "name": name, "options": {}}, "no such field"),
            ({"command": "destroy"}, "--all"), ({"command": "destroy", "name": "x", "every": True}, "--all"),
            ({"command": "resize", "name": "x", "disk": -1}, "the field disk is a whole number"),
            ({"command": "show", "name": "nobody"}, "no export of that name or number")]:
        answer = ask(server, **request)
        assert not answer["ok"] and answer["status"] == 2 and text in answer["error"], (request, answer)
    for line in (b"{", b"[" * 60000, b"\xff\n", b"null\n", b'{"command": "list"' + b" " * 70000 + b"}\n"):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(10)
            s.connect(control.path_of(server.pid))
            s.sendall(line)
            s.shutdown(socket.SHUT_WR)
            assert json.loads(s.makefile().readline())["status"] == 2, line[:20]
    assert ask(server, command="list")["exports"] == []
    assert server.end() == (0, "")


def test_what_is_refused_is_logged(program: Start) -> None:
    """With -v, one line each, however odd the text: no traceback."""
    server = program("blk", "--control", "-v")
    for device in ("\ud800", "rom:\udcff"):
        assert ask(server, command="create", name=short(), device=[device])["status"] == 2
    said = [line for line in server.end()[1].splitlines() if "control:" in line]
    assert len(said) == 2 and all(line.startswith("muenfast: control: refused: ") for line in said), said


@pytest.mark.parametrize("text", ["\ud800", "ram:1M\ud800", "py:\ud800:Disk", "x\ud800#1"])
def test_a_device_that_no_file_name_can_be(text: str) -> None:
    with pytest.raises(UsageError, match="device, entry 0 .*encodable as a file name"):
        exports_from_lists("a", "b", device=text)


def test_who_sends_nothing_keeps_nobody_waiting(server: Program) -> None:
    """Connections that stay silent do not stall others."""
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX))
            silent.connect(control.path_of(server.pid))
        started = time.monotonic()
        assert ask(server, command="ping")["ok"]
        assert time.monotonic() - started < 1.5     # a silent one is given up after two seconds
    assert server.end()[0] == 0


def test_slow_askers_do_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends his request in drips, or nothing: a whole request has one deadline, and close() waits for none."""
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        server = control.ControlServer({})
        closing = stack.enter_context(contextlib.ExitStack())
        closing.callback(server.close)

        def connect(drips: bool) -> threading.Event:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(control.path_of(os.getpid()))
            ended = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    while not over.wait(0.05):
                        connection.sendall(b" ")
                ended.set()

            if drips:
                thread = threading.Thread(target=drip)
                thread.start()
                stack.callback(thread.join)
                stack.callback(over.set)
            return ended

        assert connect(True).wait(20)       # each drip came in time, the request did not
        monkeypatch.setattr(control, "_ANSWER_TIMEOUT", 3600.0)
        connect(False)
        ended = connect(True)
        eventually(lambda: len(server._reading) == 2)
        closing.close()
        assert ended.wait(20) and not server._answering


def test_close_answers_what_has_come() -> None:
    """What is executing when the server closes is answered; what has come as well."""
    begun, go = threading.Event(), threading.Event()

    def wait() -> dict[str, Any]:
        begun.set()
        assert go.wait(20)
        return {"done": True}

    server = control.ControlServer({"wait": control.Command(wait, quick=False)})
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(control.ask(os.getpid(), {"command": "wait"}, timeout=None)))
    asking.start()
    assert begun.wait(20)
    closing = threading.Thread(target=server.close)
    closing.start()
    go.set()
    for thread in (asking, closing):
        thread.join()
    assert answers[0]["done"]


def test_who_does_not_wait_for_his_answer_is_no_warning(program: Start) -> None:
    """Only with -v: it is nobody else's business."""
    for more in ([], ["-v"]):
        server = program("blk", "--control", *more)
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(control.path_of(server.pid))
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(control.path_of(server.pid))
            s.sendall(b'{"command": "list"}\n')
        assert ask(server, command="ping")["ok"]
        eventually(lambda server=server: len(os.listdir(f"/proc/{server.pid}/task")) <= 2)
        status, said = server.end()
        assert status == 0 and (more or not said)


def test_a_stopped_server(program: Start) -> None:
    """`stat` and `ctl` say that it is stopped, and how it goes on."""
    server = program("blk", "--control")
    ctl("create", short())
    server.process.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: control.stopped(server.pid))
        step = f"it is stopped (SIGSTOP); `kill -CONT {server.pid}` has it go on"
        done = run("stat")
        assert (done.returncode, done.stdout) == (1, f"process {server.pid}: no answer: {step}\n")
        for words in (["list"], ["list", "--pid", server.pid], ["destroy", "--all", "--pid", server.pid]):
            assert ctl(*words, status=1) == f"muenfast: process {server.pid} gave no answer: {step}\n"
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert len(ctl("list").splitlines()) == 1
    assert server.end() == (0, "")


def test_a_server_that_is_stopped_meanwhile(server: Program) -> None:
    """An operation that is under way has no end of its own, but who asked is not left alone."""
    with socket.socket(socket.AF_UNIX):
        server.process.send_signal(signal.SIGSTOP)
        try:
            eventually(lambda: control.stopped(server.pid))
            with pytest.raises(TimeoutError, match="it is stopped"):
                control.ask(server.pid, {"command": "create", "name": "x"}, timeout=None)
        finally:
            server.process.send_signal(signal.SIGCONT)
    ctl("destroy", "--all")


def test_one_process_is_meant(program: Start, tmp_path: Path) -> None:
    """None, one, several: by NAME, by --pid, or named in the error."""
    assert "no `muenfast blk` of this user is serving" in ctl("list", status=1)
    first, second = program("blk", "--control"), program("blk", "--control")
    for server, name in ((first, "one"), (second, "two")):
        ctl("create", name, "--pid", server.pid, "--req", unique(), "--resp", unique(), "--device", "null:1M")
    error = ctl("list", status=2)
    assert error == ("muenfast: --pid: several processes serve, of which one is meant (type `muenfast ctl list --pid PID`, "
                     f"where PID is {first.pid} (one) or {second.pid} (two))\n")
    assert "several processes serve" in (error := ctl("create", "three", status=2)) and "ctl create NAME --pid PID" in error
    assert "type `muenfast ctl resize three --pid PID`" in ctl("resize", "three", "1M", status=2)
    assert ctl("status", "two").split()[1] == "two"
    assert ctl("destroy", "one") == "destroyed 1 one\n"
    assert ctl("list", "--pid", second.pid).split()[1] == "two"
    assert "serves nothing" in ctl("list", "--pid", os.getpid(), status=1)
    assert "a number from 1" in ctl("list", "--pid", "x", status=2)
    client = program("blk", "--client", "--attach", "none", "--req", unique(), "--resp", unique(), ready=False)
    eventually(lambda: os.path.exists(control.path_of(client.pid)))
    for words in (["list"], ["create", "x"], ["destroy", "--all"], ["status"], ["resize", "x", "1M"]):
        assert ctl(*words, "--pid", client.pid, status=2) == (
            f"muenfast: --pid '{client.pid}': that process is a client (`muenfast blk --client`), and exports nothing "
            f"(`muenfast stat {client.pid}` shows its disks; PID is that of a `muenfast blk`)\n")
    assert re.fullmatch(rf"process {client.pid}: muenfast \S+, a client, disks: 1\n", ctl("ping", "--pid", client.pid))
    client.end()


def test_control_goes_with_the_server_only() -> None:
    """--control begins without channels; half of the channels, or a list without them, is an error."""
    assert "--req, --resp: required" in run("blk").stderr and "--control" in run("blk").stderr
    assert "--resp: required" in run("blk", "--control", "--req", "x").stderr
    assert run("blk", "--control", "--read-only", "--device", "ram:1M").stderr == (
        "muenfast: --device: belongs to an export, and with --control, but without --req and --resp, there is none to "
        "begin with (give --req and --resp, too, or later `muenfast ctl create NAME --device ...`)\n")
    assert "begins without" not in run("blk", "--control", "--req", "x").stderr
    assert "--control: is an option of the server" in run("blk", "--client", "--control").stderr


# -------------------------------------------------------------- destroyed under a client

def test_a_client_in_the_way(server: Program) -> None:
    """Refused with its process, unless forced; then its requests fail, and the ring is inactive."""
    name = short()
    ctl("create", name)
    with client_of(name) as disk:
        disk.pwrite(block(1), 0)
        assert ctl("destroy", name, status=1) == (
            f"muenfast: export {name} has its client, process {os.getpid()}, attached (--force ends it all the same)\n")
        assert ctl("destroy", "--all", status=1)
        assert disk.pread(4096, 0) == block(1)
        assert ctl("destroy", name, "--force") == f"destroyed 1 {name}\n"
        with pytest.raises(OSError, match="Input/output error"):
            disk.pread(4096, 0)
        eventually(lambda: disk.gone)
        assert disk.failure == "the server destroyed the export"
    assert not regions()


def test_a_client_process_ends_with_its_only_export(server: Program, program: Start, tmp_path: Path) -> None:
    """Without a device and with an NBD socket: status 0, and the socket's file goes."""
    name = short()
    for more in (["--attach", "none"], ["--nbd", str(tmp_path / "socket")]):
        ctl("create", name)
        client = program("blk", "--client", "--req", f"{name}_req", "--resp", f"{name}_resp", *more)
        eventually(lambda: "connected" in ctl("list"))
        ctl("destroy", name, "--force")
        client.process.wait(20)
        assert client.end()[0] == 0
        assert not (tmp_path / "socket").exists() and not regions()


def test_one_of_two_connections_goes(server: Program, program: Start, tmp_path: Path) -> None:
    """Its socket, channels and claims go; the process serves the other one, and ends with that."""
    one, two = short("one"), short("two")
    for name in (one, two):
        ctl("create", name, "--device", "ram:4M")
    sockets = [tmp_path / "one", tmp_path / "two"]
    client = program("blk", "--client", "--req", f"{one}_req,{two}_req", "--resp", f"{one}_resp,{two}_resp",
                     "--nbd", f"{sockets[0]},{sockets[1]}")
    eventually(lambda: ctl("list").count("connected") == 2)
    ctl("destroy", one, "--force")
    eventually(lambda: not sockets[0].exists() and not any(one in name for name in regions()))
    assert client.process.poll() is None and sockets[1].exists()
    gone, there = control.ask(client.pid, {"command": "status"})["entries"]
    assert gone["failure"] == "the server destroyed the export" and there["state"] == "ready"
    ctl("create", one, "--device", "ram:4M")    # its channels are free for another client
    with client_of(one) as disk:
        disk.pwrite(block(1), 0)
    ctl("destroy", two, "--force")
    client.process.wait(20)
    assert client.end()[0] == 0 and not sockets[1].exists()


# -------------------------------------------------------------- other sizes

@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_a_ram_disk_grows_and_shrinks(server: Program, shared: bool) -> None:
    """Data stays, what is new reads as zeros, the client goes on; a shrink is to be forced, and what is beyond is gone."""
    name, buffer = short(), unique("shm")
    ctl("create", name, "--device", "ram:4M", *(["--shm", buffer] if shared else []))
    with client_of(name, shm=buffer if shared else None) as disk:
        disk.pwrite(block(5), 4 * MIB - 4096)
        assert ctl("resize", name, "8M").split()[3:5] == [str(8 * MIB), "ram:8M"]
        eventually(lambda: disk.size == 8 * MIB)
        assert disk.pread(8192, 4 * MIB - 4096) == block(5) + bytes(4096)
        disk.pwrite(block(6), 8 * MIB - 4096)
        assert ctl("resize", name, "8M").endswith("unchanged\n")
        assert "--force cuts it off" in ctl("resize", name, "1M", status=2)
        assert disk.pread(4096, 8 * MIB - 4096) == block(6)
        ctl("resize", name, "1M", "--force")
        eventually(lambda: disk.size == MIB)
        with pytest.raises(UsageError, match="beyond the disk's"):
            disk.pread(4096, MIB)
        ctl("resize", name, "4M")
        eventually(lambda: disk.size == 4 * MIB)
        assert disk.pread(4096, 4 * MIB - 4096) == bytes(4096)    # cut off is gone
        assert ctl("list").split()[4:6] == [str(4 * MIB), "ram:4M"]
        assert disk.failure is None


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_a_new_size_is_one_line(server: Program, program: Start, shared: bool) -> None:
    """On either side, each of several in a row; nobody is called gone, and a destroyed export is one line as well."""
    name, buffer = short(), unique("shm")
    lists = ["--req", f"{name}_req", "--resp", f"{name}_resp", *(["--shm", buffer] if shared else [])]
    ctl("create", name, "--device", "ram:4M,ram:1M" if shared else "ram:4M", *lists[4:])
    client = program("blk", "--client", "--attach", "none", *lists)
    for size in (5, 6, 7):
        assert ask(server, command="resize", name=name, size=f"{size}M")["ok"]
        eventually(lambda size=size: control.ask(client.pid, {"command": "status"})["entries"][0]["size"] == size * MIB)
    channels, which = f"{name}_req/{name}_resp", ", number 0" if shared else ""
    ctl("destroy", name, "--force")
    client.process.wait(20)
    sizes = [f"{channels}{which}: new size {size * MIB} bytes" for size in (5, 6, 7)]
    status, said = client.end()
    assert status == 0 and said.splitlines() == [
        *(f"muenfast: disk {line}" for line in sizes),
        f"muenfast: disk {channels}: the server destroyed the export: every request fails from now on"]
    status, said = server.end()
    assert status == 0 and said.splitlines() == [
        *(f"muenfast: export {line}" for line in sizes),
        f"muenfast: export {channels}: {name} is destroyed, though it has its client, process {client.pid}, attached"]


def test_a_server_killed_amid_a_resize_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """It said that it would be back at once; the client does not believe that for long."""
    req, resp = unique(), unique()
    with BlockServer(exports_from_lists(req, resp, device="ram:1M")) as server, BlockDevice(req, resp) as disk:
        export = server.exports[0]
        export.stop()
        assert export._ended.wait(20)
        export.server.close(resizing=True)
        eventually(lambda: disk.connection.state == "lost")
        assert "gone" not in caplog.text
        eventually(lambda: "the server is gone, requests wait for its return" in caplog.text)


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_an_engine_that_is_opened_anew_is_no_loss(shared: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A server that stayed, and has the size that it had (two resizes, of which a client sees one), was never gone."""
    req, resp, buffer = unique(), unique(), unique() if shared else None
    with BlockServer(exports_from_lists(req, resp, device="ram:1M", buffer=buffer)) as server, \
            BlockDevice(req, resp, shm=buffer) as disk:
        for number in range(20):
            server.exports[0].change(lambda: None)
            disk.pwrite(block(number), 0)
            assert disk.pread(4096, 0) == block(number)
        assert disk.client.counters["lives"] > 1
    assert not caplog.records


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_a_size_that_is_not_to_be_had(server: Program, tmp_path: Path, kind: str) -> None:
    """What is wrong with which SIZE; the disk goes on as it was."""
    name, path = short(), tmp_path / "image"
    path.write_bytes(bytes(MIB))
    ctl("create", name, "--device", path if kind == "file" else "ram:1M")
    with client_of(name) as disk:
        disk.pwrite(block(1), 0)
        said = ctl("resize", name, "99999T", status=2)
        assert re.fullmatch(r"muenfast: SIZE '99999T': no (file|memory) of that size is to be had: .+\n", said), said
        assert "SIZE '8K': the disk has 1048576 bytes" in ctl("resize", name, "8K", status=2)
        disk.pwrite(block(2), 4096)
        assert (disk.pread(4096, 0), disk.pread(4096, 4096), disk.size) == (block(1), block(2), MIB)
    assert path.stat().st_size == MIB


def test_a_file_that_became_shorter(server: Program, tmp_path: Path) -> None:
    """Without SIZE the export takes that over where it is forced to."""
    name, path = short(), tmp_path / "image"
    path.write_bytes(bytes(4 * MIB))
    ctl("create", name, "--device", path)
    os.truncate(path, MIB)
    assert ctl("resize", name, status=2) == (
        f"muenfast: NAME '{name}': what is behind the disk has become shorter: {MIB} bytes, not {4 * MIB} "
        "(--force takes that over)\n")
    assert ctl("list").split()[4] == str(4 * MIB)
    ctl("resize", name, "--force")
    assert ctl("list").split()[4] == str(MIB) and path.stat().st_size == MIB


def test_a_file_grows_and_shrinks(server: Program, tmp_path: Path) -> None:
    """By ftruncate, sparse; without SIZE the file's own; both ends of it in the data of the file."""
    name, path = short(), tmp_path / "image"
    path.write_bytes(bytes(4 * MIB))
    ctl("create", name, "--device", path)
    with client_of(name) as disk:
        disk.pwrite(block(1), 0)
        ctl("resize", name, "1G")
        eventually(lambda: disk.size == 1 << 30)
        disk.pwrite(block(2), (1 << 30) - 4096)
        disk.flush()
        assert path.stat().st_size == 1 << 30 and path.stat().st_blocks * 512 < 8 * MIB
        assert "--force" in ctl("resize", name, "8M", status=2)
        ctl("resize", name, "8M", "--force")
        eventually(lambda: disk.size == 8 * MIB)
        os.truncate(path, 16 * MIB + 100)
        assert disk.size == 8 * MIB
        ctl("resize", name)
        eventually(lambda: disk.size == 16 * MIB)
        assert disk.pread(4096, 0) == block(1)
    assert path.stat().st_size == 16 * MIB + 100


def test_sizes_that_are_refused(server: Program, tmp_path: Path) -> None:
    """Each with its reason; the export goes on as it was."""
    name, region, path = short(), unique("ram"), tmp_path / "image"
    path.write_bytes(bytes(4 * MIB))
    for device, more, size, text in [
            (f"ram:4M:{region}", [], "8M", f"the region {region} is never resized"),
            ("ram:4M", [], None, "nothing is behind a RAM disk whose size it could take over"),
            ("ram:4M", [], "5000", "SIZE '5000': a size here is at least 4096 bytes and a multiple of 4096"),
            ("ram:4M", [], "much", "SIZE 'much': a size is a number of bytes"),
            ("ram:4M", ["--disk", "1"], "8M", "has no disk of that number"),
            ("null:4M", [], "1M", "--force"),
            (str(path), ["read-only"], "8M", "the export is read-only")]:
        read_only = [f"--{word}" for word in more if word == "read-only"]
        ctl("create", name, "--device", device, *read_only)
        words = [word for word in more if word != "read-only"]
        assert text in ctl("resize", name, *([size] if size else []), *words, status=2), device
        assert ctl("list").split()[4] == str(4 * MIB)
        ctl("destroy", name)
    assert path.stat().st_size == 4 * MIB
    assert run("chan", "rm", region).returncode == 0


def test_one_disk_of_several(server: Program, tmp_path: Path) -> None:
    """--disk names it; the others keep size and data."""
    name, buffer, path = short(), unique("shm"), tmp_path / "image"
    path.write_bytes(bytes(4 * MIB + 512))
    ctl("create", name, "--shm", buffer, "--device", f"ram:4M,{path},null:4M")
    with client_of(name, shm=buffer) as first, BlockDevice(connection=first.connection, device=1) as second, \
            BlockDevice(connection=first.connection, device=2) as third:
        first.pwrite(block(1), 0)
        ctl("resize", name, "8389120", "--disk", "1")       # 8 MiB and a block of 512
        eventually(lambda: second.size == 8 * MIB + 512)
        ctl("resize", name, "2M", "--disk", "2", "--force")
        eventually(lambda: third.size == 2 * MIB)
        assert (first.size, second.block_size, first.pread(4096, 0)) == (4 * MIB, 512, block(1))
        assert ctl("list").split()[5] == f"ram:4M,{path},null:2M"


def test_requests_in_flight_meet_another_size(server: Program, caplog: pytest.LogCaptureFixture) -> None:
    """What is outstanding is issued again; nothing fails, is lost or counted so while a disk grows under load, and the new
    sizes are all that is said."""
    name, count = short(), 40
    ctl("create", name, "--device", "ram:4M")
    failures: list[str] = []
    with client_of(name) as disk:
        over = threading.Event()

        def write(place: int) -> None:
            value = 0
            while not over.is_set():
                value += 1
                disk.pwrite(block(value), place * 4096)
                if disk.pread(4096, place * 4096) != block(value):
                    failures.append(f"block {place}: not {value}")

        def guarded(place: int) -> None:
            try:
                write(place)
            except Exception as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=guarded, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for step in range(count):
            assert ask(server, command="resize", name=name, size=f"{4 + step % 7}M", force=True)["ok"]
        over.set()
        for thread in threads:
            thread.join()
        assert not failures and disk.failure is None
        assert disk.client.counters["lives"] > 1
        [found] = ask(server, command="show")["exports"]
        assert (found["counters"]["overruns"], found["counters"]["lost"]) == (0, 0)
    said = [record.getMessage() for record in caplog.records]
    assert said and all(re.search(r": new size \d+ bytes$", line) for line in said), said


def test_a_disk_that_shares_its_thread(program: Start) -> None:
    """With --threads 1 one is resized, one destroyed, and the others go on."""
    names = [short() for _ in range(4)]
    server = program("blk", "--threads", "1", "--req", ",".join(f"{name}_req" for name in names),
                     "--resp", ",".join(f"{name}_resp" for name in names), "--device", ",".join(["ram:1M"] * 4))
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(client_of(name)) for name in names]
        for number, disk in enumerate(disks):
            disk.pwrite(block(number), 0)
        for size in ("2M", "3M"):
            ctl("resize", "2", size)
        eventually(lambda: disks[1].size == 3 * MIB)
        ctl("destroy", "3", "--force")
        for number in (0, 1, 3):
            assert disks[number].pread(4096, 0) == block(number)
        threads = {Path(task, "comm").read_text() for task in Path(f"/proc/{server.pid}/task").iterdir()}
        assert threads
    assert server.end()[0] == 0


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_a_file_that_grew_while_its_server_was_away(program: Start, tmp_path: Path, shared: bool) -> None:
    """The same store with another size: its client goes on; one with other blocks it does not."""
    path = tmp_path / "image"
    path.write_bytes(bytes(4 * MIB))
    pair = ["--req", unique(), "--resp", unique(), *(["--shm", unique()] if shared else [])]
    first = program("blk", *pair, "--device", str(path))
    with BlockDevice(pair[1], pair[3], shm=pair[5] if shared else None) as disk:
        disk.pwrite(block(1), 0)
        assert first.end()[0] == 0
        os.truncate(path, 8 * MIB)
        second = program("blk", *pair, "--device", str(path))
        eventually(lambda: disk.size == 8 * MIB)
        assert disk.pread(4096, 0) == block(1) and disk.pread(4096, 8 * MIB - 4096) == bytes(4096)
        assert second.end()[0] == 0
        if shared:
            os.truncate(path, 8 * MIB + 512)
            program("blk", *pair, "--device", str(path))
            eventually(lambda: disk.failure is not None)
            assert "the server returned with 16385 blocks of 512 bytes instead of 2048 blocks of 4096" in str(disk.failure)


# -------------------------------------------------------------- many

def churn(server: Program, count: int, seconds: float, seed: int) -> int:
    """Exports created and destroyed at random, by number `count` at a time, beside one under load that must not notice;
    how many operations that were."""
    dice, there, failures, done = random.Random(seed), {}, [], 0
    steady = short("steady")
    assert ask(server, command="create", name=steady, device=["ram:4M"], size="128K")["ok"]
    over = threading.Event()

    def load(disk: BlockDevice) -> None:
        value = 0
        try:
            while not over.is_set():
                value += 1
                disk.pwrite(block(value), 4096 * (value % 16))
                if disk.pread(4096, 4096 * (value % 16)) != block(value):
                    failures.append("wrong data")
        except Exception as error:
            failures.append(repr(error))

    def look() -> None:
        while not over.is_set():
            answer = ask(server, command="status")
            if not answer["ok"]:
                failures.append(answer["error"])

    with client_of(steady) as disk:
        threads = [threading.Thread(target=load, args=(disk,)), threading.Thread(target=look)]
        for thread in threads:
            thread.start()
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end or len(there) < count:
                done += 1
                if not there or len(there) < count and dice.random() < 0.7:
                    name = short("c")
                    request = {"device": [dice.choice(["ram:1M", "null:1M", "ram:64M"])], "size": "64K"}
                    if dice.random() < 0.2:
                        request |= {"shm": f"{name}_shm", "shm_size": "64K", "device": ["ram:1M", "ram:2M"]}
                    there[name] = request.get("shm")
                    answer = ask(server, command="create", name=name, **request)
                else:
                    name = dice.choice(list(there))
                    force = dice.random() < 0.3
                    if force:
                        with contextlib.suppress(OSError), client_of(name, shm=there[name]) as other:
                            answer = ask(server, command="resize", name=name, size="3M", force=True)
                            assert answer["ok"], answer
                            other.pwrite(block(1), 0)
                    del there[name]
                    answer = ask(server, command="destroy", name=name, force=True)
                assert answer["ok"], answer
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert not failures, failures[:3]
    assert ask(server, command="destroy", every=True, force=True)["ok"]
    return done


def holdings(pid: int) -> dict[str, int]:
    """What a process has: descriptors, mappings, threads."""
    return {"descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task")),
            "shared mappings": Path(f"/proc/{pid}/maps").read_text().count("/dev/shm/")}


@pytest.mark.stress
def test_many_exports_come_and_go(server: Program, runtime: Path) -> None:
    """More than 50 at a time, at random, beside one under load: afterwards the process has what it had, and no region or
    claim is left."""
    assert churn(server, 3, 0.5, 1)                 # what is made once: the polling thread
    time.sleep(0.5)                                 # the last answer's connection and thread are no part of it
    before = holdings(server.pid)
    assert churn(server, 60, 4.0, 2) > 60
    eventually(lambda: holdings(server.pid) == before)
    assert not regions() and not list((runtime / "claims").iterdir())
    status, said = server.end()
    assert status == 0
    assert [line for line in said.splitlines() if ": new size 3145728 bytes" not in line] == []


def test_a_signal_amid_operations(program: Start) -> None:
    """Whatever is under way when SIGTERM comes is finished or undone: nothing is left, and the status is 0."""
    for delay in (0.0, 0.01, 0.03):
        server = program("blk", "--control")
        names = [short() for _ in range(30)]

        def create(server: Program = server, names: list[str] = names) -> None:
            with contextlib.suppress(OSError, ValueError):  # it ends meanwhile
                for name in names:
                    control.ask(server.pid, {"command": "create", "name": name, "device": ["ram:1M"], "size": "64K"})

        thread = threading.Thread(target=create)
        thread.start()
        time.sleep(delay)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert server.end()[0] == 0
        assert not regions()
