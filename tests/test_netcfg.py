"""muennet_cfg and `muenfast net-cfg`, against processes that serve interfaces of the same names in two namespaces."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import eventually
from namespaces import Namespace

from muenfast import names
from muenfast.bpf import Way
from muenfast.control import Command
from muenfast.errors import ClaimError, MuenfastError, UsageError
from muenfast.names import NameSocket

pytestmark = [pytest.mark.root, pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun")]

PROGRAM = f"{sysconfig.get_path('scripts')}/muennet_cfg"
# The interpreter may lie where that user may not look: reading is all that is added.
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
             "--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search")


def program(namespace: Namespace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(namespace.words(PROGRAM, *words), capture_output=True, text=True, timeout=30, check=False)


class End:
    """A namespace with a `muenfast net` in it that serves net0."""

    def __init__(self, way: Way, *channels: str) -> None:
        self.namespace = Namespace()
        self.process: Program | None = None
        self._way, self._channels = way, channels

    def start(self) -> None:
        inp, out = self._channels
        self.process = Program("net", "--name", "net0", "--in", inp, "--out", out, "--marks", self._way.value,
                               within=self.namespace.words())

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        return program(self.namespace, *words)

    def done(self, *words: str) -> None:
        answer = self.ask(*words)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", ""), words

    def refused(self, *words: str) -> str:
        """What it says of why."""
        answer = self.ask(*words)
        assert answer.returncode == 1 and answer.stdout == "", words
        first, last = answer.stderr.splitlines()
        assert last == "Command failed" and first.startswith("muennet_cfg: ")
        return first.removeprefix("muennet_cfg: ")

    def packets(self, interface: str) -> tuple[int, int]:
        """Received and sent."""
        [entry] = json.loads(self.namespace.run(f"ip -j -s link show dev {interface}"))
        return entry["stats64"]["rx"]["packets"], entry["stats64"]["tx"]["packets"]

    def interfaces(self) -> set[str]:
        return {entry["ifname"] for entry in json.loads(self.namespace.run("ip -j link"))} - {"lo"}

    def close(self) -> None:
        if self.process is not None:
            assert self.process.end() == (0, "")
        self.namespace.close()


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    """Two ends of one channel, both with an interface net0."""
    way = getattr(request, "param", Way.TCX)
    channels = unique("there"), unique("back")
    with ExitStack() as stack:
        made = []
        for pair in (channels, channels[::-1]):
            end = End(way, *pair)
            stack.callback(end.close)
            end.start()
            made.append(end)
        yield made[0], made[1]


def addresses(ends: tuple[End, End], interface: str, net: int) -> None:
    for number, end in enumerate(ends, 1):
        end.namespace.run(f"ip addr add 10.7.{net}.{number}/24 dev {interface}; ip link set {interface} up")


def ping(end: End, interface: str, target: str) -> None:
    end.namespace.run(f"ping -q -c 3 -i 0.05 -W 5 -I {interface} {target}")


# ---- the module's public integration test

@pytest.mark.parametrize("ends", [Way.TCX, Way.CLSACT], indirect=True)
def test_a_child_and_its_mark(ends: tuple[End, End]) -> None:
    addresses(ends, "net0", 0)
    for end in ends:
        end.done("add_child", "net0", "child1")
        end.done("add_mark", "child1", "24")
        for name in ("net0", "child1"):
            answer = [entry for entry in json.loads(run("net", "show", "--json", name).stdout)
                      if end.process is not None and entry["pid"] == end.process.pid]
            assert [(entry["name"], [(child["name"], child["marks"]) for child in entry["children"]])
                    for entry in answer] == [("net0", [("child1", [24])])]
    addresses(ends, "child1", 1)
    for number, end in enumerate(ends, 1):
        end.namespace.run(f"iptables -t mangle -A OUTPUT -s 10.7.1.{number}/32 -j MARK --set-mark 24; "
                          "iptables -t mangle -A INPUT -i child1 -m mark --mark 24; "
                          "iptables -t mangle -A INPUT -i net0 -m mark ! --mark 0")
    ping(ends[0], "child1", "10.7.1.2")
    for end in ends:
        assert end.packets("child1") == (3, 3) and end.packets("net0") == (0, 0)
    ping(ends[1], "net0", "10.7.0.1")
    for end in ends:
        assert end.packets("child1") == (3, 3) and end.packets("net0") == (3, 3)
        counts = [line.split()[0] for line in end.namespace.run("iptables -t mangle -nvxL INPUT").splitlines()[2:]]
        assert counts == ["3", "0"]
    # Without its mark what comes in is the parent's.
    ends[1].done("del_mark", "child1", "24")
    ends[0].namespace.run("ping -q -c 1 -W 1 -I child1 10.7.1.2", check=False)
    assert ends[1].packets("child1")[0] == 3 and eventually(lambda: ends[1].packets("net0")[0] == 4)
    ends[1].done("add_mark", "child1", "24")
    ping(ends[0], "child1", "10.7.1.2")
    for end in ends:
        end.done("del_mark", "child1", "24")
        end.done("del_child", "child1")
        assert end.interfaces() == {"net0"}
    ping(ends[0], "net0", "10.7.0.2")


def test_the_marks_of_a_child_that_goes_are_the_parents(ends: tuple[End, End]) -> None:
    end = ends[0]
    for child in ("child1", "child2"):
        end.done("add_child", "net0", child)
    end.done("add_mark", "child1", "24")
    assert "child1 has it already" in end.refused("add_mark", "child2", "24")
    end.done("del_child", "child1")
    end.done("add_mark", "child2", "24")
    assert end.interfaces() == {"net0", "child2"}
    for _ in range(20):     # under the same name and number, again and again
        end.done("add_child", "net0", "child1")
        end.done("add_mark", "child1", "25")
        end.done("del_child", "child1")


def test_what_is_refused(ends: tuple[End, End]) -> None:
    end = ends[0]
    end.done("add_child", "net0", "child1")
    for mark in ("1", "100"):
        end.done("add_mark", "child1", mark)
    for mark in ("0", "101", "0xffffffff", "4294967295"):
        assert "a mark for a child of net0 is 1 to 100" in end.refused("add_mark", "child1", mark)
    for mark in ("-1", "x", "4294967296", "99999999999999999999", ""):
        assert "a mark is a number of 32 bits" in end.refused("add_mark", "child1", mark)
    assert "it is a child itself, of net0" in end.refused("add_child", "child1", "child2")
    assert "there is an interface of that name" in end.refused("add_child", "net0", "child1")
    assert "child1 has it already" in end.refused("add_mark", "child1", "1")
    assert "child1 does not have it" in end.refused("del_mark", "child1", "24")
    assert "it is no child, but has channels" in end.refused("del_child", "net0")
    assert "it is no child, but has channels" in end.refused("add_mark", "net0", "5")
    for words in (("add_child", "net9", "x"), ("del_child", "child9"), ("add_mark", "child9", "1"),
                  ("del_mark", "lo", "1")):
        assert "no muenfast process serves an interface" in end.refused(*words)
    for name in ("sixteen-bytes-xx", "a b", "a/b", "", ".."):
        assert "interface" in end.refused("add_child", "net0", name)
    # A name that is somebody else's: whoever has it keeps it, and nothing of the child is left.
    end.namespace.run("ip link add veth0 type veth peer name veth1")
    for _ in range(2):
        end.refused("add_child", "net0", "veth0")
    end.namespace.run("ip link del veth0")
    end.done("add_child", "net0", "veth0")
    assert end.interfaces() == {"net0", "child1", "veth0"}


def test_equal_names_in_two_namespaces_are_two_interfaces(ends: tuple[End, End]) -> None:
    ends[0].done("add_child", "net0", "child1")
    assert ends[0].interfaces() == {"net0", "child1"} and ends[1].interfaces() == {"net0"}
    assert "no muenfast process serves" in ends[1].refused("add_mark", "child1", "24")
    ends[1].done("add_child", "net0", "child1")
    ends[0].done("add_mark", "child1", "24")
    assert "does not have it" in ends[1].refused("del_mark", "child1", "24")
    ends[1].done("del_child", "child1")
    ends[0].done("del_mark", "child1", "24")
    third = Namespace()
    try:
        run = program(third, "add_child", "net0", "x")
        assert run.returncode == 1 and "no muenfast process serves an interface net0" in run.stderr
    finally:
        third.close()


def test_net_cfg_is_the_same(ends: tuple[End, End]) -> None:
    end = ends[0]

    def ask(*words: str) -> tuple[int, str]:
        run = subprocess.run(end.namespace.words(sys.executable, "-m", "muenfast", "net-cfg", *words), capture_output=True,
                             text=True, timeout=30, check=False)
        assert run.stdout == ""
        return run.returncode, run.stderr

    assert ask("add_child", "net0", "child1") == (0, "")
    assert ask("add_mark", "child1", "0x18") == (0, "")
    assert ask("add_mark", "child1", "24") == (1, "muenfast: MARK '24': child1 has it already\nCommand failed\n")
    assert ask("add_mark", "child1", "zero")[0] == 2
    assert ask("del_mark", "child1", "24") == (0, "")
    assert ask("del_child", "child1") == (0, "")
    status, text = ask("del_child")
    assert status == 2 and "required: CHILD" in text
    status, text = ask("no_such")
    assert status == 2 and "invalid choice" in text


@pytest.mark.parametrize("words", [[], ["add_child"], ["add_child", "net0"], ["del_child"], ["del_child", "a", "b"],
                                   ["add_mark", "a", "1", "2"], ["nonsense", "a", "b"], ["--help", "me"]])
def test_usage(words: list[str]) -> None:
    run = subprocess.run([PROGRAM, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.splitlines() == ["usage: muennet_cfg add_child PARENT CHILD", "       muennet_cfg del_child CHILD",
                                       "       muennet_cfg add_mark CHILD MARK", "       muennet_cfg del_mark CHILD MARK"]


def test_help() -> None:
    run = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.startswith("usage: muennet_cfg add_child PARENT CHILD\n") and run.stderr == ""


# ---- who asks, and who answers

@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def serve(namespace: Namespace) -> Iterator[Callable[..., NameSocket]]:
    made: list[NameSocket] = []

    def start(commands: dict[str, Command], name: str = "net0") -> NameSocket:
        made.append(NameSocket(name, commands, namespace=namespace.fd))
        return made[-1]

    yield start
    for one in made:
        one.close()


PING = {"ping": Command(dict)}


def ask(namespace: Namespace, request: Any, name: str = "net0", **options: Any) -> dict[str, Any]:
    answer: dict[str, Any] = namespace.do(lambda: names.ask(name, request, **options))
    return answer


def connect(namespace: Namespace, name: str = "net0") -> socket.socket:
    made = namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.connect(names.address(name))
    return made


def test_a_name_belongs_to_one(namespace: Namespace, serve: Callable[..., NameSocket]) -> None:
    one = serve(PING)
    with pytest.raises(ClaimError, match=f"interface name net0 is already held by process {os.getpid()} of user 0"):
        serve(PING)
    serve(PING, "net1")
    assert ask(namespace, {"command": "ping"})["ok"]
    one.close()
    one.close()
    with pytest.raises(MuenfastError, match="no muenfast process serves an interface net0 in this network namespace"):
        ask(namespace, {"command": "ping"})
    serve(PING)
    assert ask(namespace, {"command": "ping"})["ok"]


def test_a_name_for_which_there_is_no_thread_is_free(namespace: Namespace, serve: Callable[..., NameSocket],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """An error as any other, which leaves nothing."""
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name == "control":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        with pytest.raises(OSError, match="no thread"):
            serve(PING)
    serve(PING)
    assert ask(namespace, {"command": "ping"})["ok"]


def test_the_name_is_in_its_namespace_only(namespace: Namespace, serve: Callable[..., NameSocket]) -> None:
    serve(PING)
    other = Namespace()
    try:
        with pytest.raises(MuenfastError, match="no muenfast process serves"):
            ask(other, {"command": "ping"})
        with other.do(lambda: socket.socket(socket.AF_UNIX)) as squatter:
            squatter.bind(names.address("net0"))    # what is done there is no obstacle here
            assert ask(namespace, {"command": "ping"})["ok"]
    finally:
        other.close()


def test_who_sends_nothing_or_too_much_keeps_nobody_waiting(namespace: Namespace, serve: Callable[..., NameSocket]) -> None:
    serve(PING)
    silent = [connect(namespace) for _ in range(20)]
    try:
        assert ask(namespace, {"command": "ping"})["ok"]
        with connect(namespace) as long:
            try:
                long.sendall(b'{"command": "' + b"x" * (1 << 20))
            except OSError:     # it does not read on
                pass
            try:
                answer = json.loads(long.makefile("rb").readline())
            except OSError:
                answer = {"ok": False, "error": "at most 65536 bytes"}
            assert not answer["ok"] and "at most 65536 bytes" in answer["error"]
        for line in (b"\n", b"[]\n", b"\xff\xfe\n", b"{}\n", b'{"command": 1}\n', b'{"command": "ping", "x": 1}\n',
                     b"[" * 60000):
            with connect(namespace) as odd:
                odd.sendall(line)
                odd.shutdown(socket.SHUT_WR)
                assert json.loads(odd.makefile("rb").readline())["status"] == 2
        with connect(namespace) as gone:
            gone.sendall(b'{"command": "ping"}\n')
        assert ask(namespace, {"command": "ping"})["ok"]
    finally:
        for one in silent:
            one.close()


def test_a_request_has_to_come_within_its_time(namespace: Namespace, serve: Callable[..., NameSocket]) -> None:
    """However small the pieces in which it comes."""
    serve(PING)
    with connect(namespace) as slow:
        slow.settimeout(0.1)
        sent, ended = 0, False
        while not ended and sent < 1000:    # 2 s have room for 20
            try:
                slow.sendall(b" ")
                sent += 1
                ended = not slow.recv(1)
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended
    assert ask(namespace, {"command": "ping"})["ok"]


def test_another_user_is_not_answered(namespace: Namespace, serve: Callable[..., NameSocket]) -> None:
    calls: list[str] = []
    serve({"add_child": Command(lambda child: calls.append(child) or {}, {"child": "text"})})
    code = ("import socket; s = socket.socket(socket.AF_UNIX); s.connect(b'\\0muenfast/interface/net0')\n"
            "try:\n    s.sendall(b'{\"command\": \"add_child\", \"child\": \"x\"}\\n'); print(s.recv(100))\n"
            "except OSError as error: print(b'')")
    run = subprocess.run(namespace.words(*AS_NOBODY, sys.executable, "-c", code), capture_output=True, text=True,
                         timeout=30, check=False)
    assert run.stdout == "b''\n", run.stderr
    assert not calls
    assert ask(namespace, {"command": "add_child", "child": "y"})["ok"] and calls == ["y"]


def test_another_users_requests_are_few_lines(namespace: Namespace, serve: Callable[..., NameSocket],
                                              caplog: pytest.LogCaptureFixture) -> None:
    """Anybody in a namespace may connect; how often is not how much is logged."""
    serve({})
    asking = "import socket\nfor _ in range(300):\n with socket.socket(socket.AF_UNIX) as s:\n" \
             "  s.connect('\\0muenfast/interface/net0')\n  assert s.recv(1) == b''"
    subprocess.run(namespace.words(*AS_NOBODY, sys.executable, "-c", asking), check=True, timeout=60)
    lines = [record for record in caplog.records if "may not ask" in record.getMessage()]
    assert 0 < len(lines) < 100


def test_a_server_of_another_user_is_not_asked(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who took the name first sees no request, and its answer is not believed."""
    code = ("import socket; s = socket.socket(socket.AF_UNIX); s.bind(b'\\0muenfast/interface/net0'); s.listen()\n"
            "print('ready', flush=True); c, _ = s.accept(); print(c.recv(100))")
    squatter = subprocess.Popen(
        namespace.words(*AS_NOBODY, sys.executable, "-c", code), stdout=subprocess.PIPE, text=True)
    try:
        assert squatter.stdout is not None and squatter.stdout.readline() == "ready\n"
        run = program(namespace, "add_child", "net0", "x")
        assert run.returncode == 1 and run.stderr.endswith("\nCommand failed\n")
        assert "neither root's nor yours: it is not asked (where it should be, ask as that user" in run.stderr
        assert squatter.communicate(timeout=10)[0] == "b''\n"
    finally:
        squatter.kill()
        squatter.communicate()
    with namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ours:
        ours.bind(names.address("net0"))
        ours.listen()
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(MuenfastError, match="user 0, who answers only root and itself"):
            ask(namespace, {"command": "ping"})


@pytest.mark.parametrize(("answer", "message"), [
    (b"", "gave no answer"), (b"nonsense\n", "gave no answer"), (b"[1]\n", r"answered \[1\]"),
    (b"x" * (1 << 17), "gave no answer"), (None, r"gave no answer in 0.5 s: what was asked for may be done yet")])
def test_a_server_that_talks_nonsense(namespace: Namespace, answer: bytes | None, message: str) -> None:
    with namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(names.address("net0"))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                try:
                    if answer is not None:
                        connection.sendall(answer)
                        return
                    for _ in range(20):     # a byte now and then does not put off the end
                        connection.sendall(b" ")
                        time.sleep(0.1)
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(MuenfastError, match=f"process {os.getpid()}, which serves net0, {message}"):
            ask(namespace, {"command": "ping"}, timeout=0.5)
        thread.join()


def test_an_interface_that_ends_answers_who_ended_it(namespace: Namespace, serve: Callable[..., NameSocket]) -> None:
    """del_child comes over the very name that it ends, while others ask there, too."""
    lock, ended = threading.Lock(), threading.Event()
    asked = threading.Event()

    def end() -> dict[str, Any]:
        with lock:
            asked.wait(10)
            one.stop()
            ended.set()
        return {}

    def mark() -> dict[str, Any]:
        asked.set()
        with lock:
            raise UsageError("there is no such child")

    one = serve({"del_child": Command(end), "add_mark": Command(mark)})
    results: dict[str, dict[str, Any]] = {}
    threads = [threading.Thread(target=lambda name=name: results.update({name: ask(namespace, {"command": name})}))
               for name in ("del_child", "add_mark")]
    threads[0].start()
    time.sleep(0.1)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert ended.is_set() and results["del_child"]["ok"] and not results["add_mark"]["ok"]
    one.close()


def test_a_request_says_whom_it_is_for() -> None:
    assert names.request("add_child", "net0", "a") == ("net0", {"command": "add_child", "child": "a"})
    assert names.request("del_child", "a", None) == ("a", {"command": "del_child"})
    assert names.request("add_mark", "a", "0xFFFFFFFF") == ("a", {"command": "add_mark", "mark": 0xFFFFFFFF})
    for words in (("add_child", "a/b", "c"), ("add_child", "a", "c d"), ("del_child", "", None), ("del_mark", "a", "-1")):
        with pytest.raises(UsageError):
            names.request(*words)
