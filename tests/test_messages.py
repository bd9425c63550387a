"""What Python code is told: in its own words, with the parameter's name, value, rule and next step."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import block, eventually

import muenfast
from muenfast import BlockDevice, BlockServer, ClaimError, PeerError, UsageError, exports_from_lists
from muenfast.cli._main import parser


class Store:
    def get_size(self) -> int:
        return 1 << 20

    def pread(self, buf: Any, offset: int) -> None:
        buf[:] = bytes(len(buf))


@pytest.mark.parametrize(("store", "text"), [
    (None, r"store 'None': a store is an object with the methods get_size and pread: there is no method get_size and no "),
    (5, "store '5': .* there is no method get_size"),
    (object(), "store '<object object at .*>': .* there is no method get_size"),
    (Store, "store 'Store': a store is an object, not its class \\(call it first\\)"),
    ([Store(), 7], "store, entry 1 '7': .* there is no method")])
def test_what_is_no_store(store: object, text: str) -> None:
    """Said before anything is made."""
    with pytest.raises(UsageError, match=text):
        muenfast.serve(store, unique(), unique(), shm=unique())


def test_unknown_parameters_are_those_of_the_function_called() -> None:
    for call in (lambda: muenfast.serve(Store(), "a", "b", polls=1),  # type: ignore[call-arg]
                 lambda: exports_from_lists("a", "b", polls=1)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"(serve|exports_from_lists)\(\) got an unexpected keyword argument 'polls'"):
            call()


def test_errors_name_parameters() -> None:
    """No option of the command line, for there is none."""
    req, resp, buffer = unique("a"), unique("c"), unique("e")
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: BlockDevice(req, resp), ClaimError, f"req, entry 0 '{req}': the writer's side of channel {req} is"),
        (lambda: muenfast.serve(Store(), req, resp), ClaimError, f"resp, entry 0 '{resp}': "),
        (lambda: BlockServer(exports_from_lists(req, resp)), ClaimError, f"resp, entry 0 '{resp}': "),
        (lambda: BlockDevice("x/y", resp), UsageError, "req, entry 0 'x/y'"),
        (lambda: BlockDevice(req, resp, shm="x/y"), UsageError, "shm, entry 0 'x/y'"),
        (lambda: BlockDevice(req, resp, shm=buffer, shm_size="1"), UsageError, "shm_size, entry 0 '1'"),
        (lambda: BlockDevice(req, resp, poll=0), UsageError, "poll '0'"),
        (lambda: BlockDevice(req, resp, on_peer_loss="x"), UsageError, "on_peer_loss 'x'"),
        (lambda: muenfast.serve(Store(), req, resp, timeout=0), UsageError, "timeout '0': a timeout has 1 to 1200 seconds"),
        (lambda: muenfast.serve(Store(), req, resp, inject="x"), UsageError, "inject, entry 0 'x'"),
        (lambda: exports_from_lists(req, resp, device="rom:1M"), UsageError, "device, entry 0 'rom:1M'"),
        (lambda: exports_from_lists(req, resp, timeout="2"), UsageError,
         "timeout, entry 0 '2': only a disk .* or one with inject")]
    with BlockServer(exports_from_lists(req, resp, device="ram:1M")), BlockDevice(req, resp):
        for call, kind, text in calls:
            with pytest.raises(kind, match=text) as caught:
                call()
            assert "--" not in str(caught.value)


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_a_wait_for_nobody(shared: bool) -> None:
    with pytest.raises(TimeoutError) as caught:
        BlockDevice(req := unique(), resp := unique(), shm=unique() if shared else None, timeout=0.1)
    assert caught.value.strerror == (f"disk {req}/{resp}: no server answered within 0.1 s: is `muenfast blk` running "
                                     f"there, {'with the same' if shared else 'without'} shm?")


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_a_buffer_that_one_side_has(program: Callable[..., Program], shared: bool) -> None:
    """The client says so as well, on the command line and in Python."""
    req, resp, buffer = unique("a"), unique("c"), unique("e")
    lists = ["--req", req, "--resp", resp]
    server = program("blk", *lists, "--device", "ram:1M", *(["--shm", buffer] if shared else []))
    said = ("the other side uses a shared buffer: name it ({})" if shared else
            f"process {server.pid} serves there without a shared buffer: leave it out ({{}}), or give the server one")
    with pytest.raises((TimeoutError, PeerError)) as caught:
        BlockDevice(req, resp, shm=None if shared else buffer, timeout=0.5)
    assert str(caught.value).endswith(said.format("shm"))
    client = program("blk", "--client", "--attach", "none", *lists, *([] if shared else ["--shm", buffer]), ready=False)
    assert client.process.stderr is not None
    line = client.process.stderr.readline()
    assert line.startswith(f"muenfast: disk {req}/{resp}: waiting: ") and line.endswith(said.format("--shm") + "\n")
    assert client.end() == (0, "") and server.end()[0] == 0


def test_what_a_server_shows_of_itself() -> None:
    """repr(): its exports, their disks and states."""
    names = [(unique(), unique()) for _ in range(5)]
    req, resp = names[0]
    with BlockServer(exports_from_lists(req, resp, device="ram:1M")) as server:
        assert repr(server) == f"<BlockServer {req}/{resp} ram:1M waiting>"
        with BlockDevice(req, resp) as disk:
            disk.pwrite(block(1), 0)
            eventually(lambda: repr(server) == f"<BlockServer {req}/{resp} ram:1M connected>")
    assert repr(server) == "<BlockServer closed>"
    with BlockServer(exports_from_lists(*(",".join(pair[k] for pair in names) for k in (0, 1)),
                                        device=",".join(["null:1M"] * 5))) as several:
        assert re.fullmatch(rf"<BlockServer {req}/{resp} null:1M waiting; .*; 2 more>", repr(several))
    with BlockServer([]) as none:
        assert repr(none) == "<BlockServer no exports>"
    with muenfast.serve(Store(), req, resp) as own:
        assert repr(own) == f"<BlockServer {req}/{resp} py:test_messages:Store waiting>"


def test_help_of_methods_says_what_they_do() -> None:
    """help() shows a method's own docstring, not a way to another one's."""
    for method in (BlockDevice.wait_ready, BlockDevice.fail):
        assert method.__doc__ and not method.__doc__.startswith("As ")


def test_every_subcommand_describes_itself() -> None:
    top = parser()
    (commands,) = (action for action in top._actions if action.dest == "command")
    for name in ("chan", "ctl"):
        (subs,) = (action for action in commands.choices[name]._actions if action.dest in ("what", "action"))  # type: ignore
        for sub in subs.choices.values():  # type: ignore[union-attr]
            assert sub.description and all(action.help for action in sub._actions), sub.prog


@pytest.mark.parametrize("words", [["--timeout", "1"], ["--inject", "error", "--timeout", "1"]])
def test_who_has_a_timeout(words: list[str]) -> None:
    """A disk written in Python, and one with --inject late, which is what message and help say."""
    lists = ["blk", "--req", unique(), "--resp", unique(), "--device", "ram:1M"]
    done = run(*lists, *words)
    assert (done.returncode, done.stderr) == (
        2, "muenfast: --timeout, entry 0 '1': only a disk written in Python (py:MODULE:CLASS), or one with --inject late, "
           "has one\n")
    for zero in (["--timeout", "0"], ["--inject", "late", "--timeout", "0"]):
        assert "--timeout, entry 0 '0': a timeout has 1 to 1200 seconds" in run(*lists, *zero).stderr
    assert len(exports_from_lists("a", "c", inject="late", timeout="1")) == 1
    assert "with --inject late" in " ".join(run("blk", "--help").stdout.split())


def test_no_process_is_left_waiting() -> None:
    """What control says of a process that is gone is no answer of a stopped one."""
    from muenfast import control

    assert not control.stopped(os.getpid()) and not control.stopped(1 << 22 | 1)
    assert control.silence(os.getpid()) == "it lives, and is busy or hangs"
