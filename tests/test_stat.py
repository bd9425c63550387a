"""What is counted of each disk and direction, on both sides, and how `muenfast stat` shows it."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, run
from helpers import block, eventually
from peer import READ, WRITE, Event, InlineClient
from test_blk_server import Raw
from test_buffer_client import Link, link

from muenfast import BlockDevice, BlockServer, counts
from muenfast._client import Client
from muenfast.blk import Connection, channels_from_lists, exports_from_lists

__all__ = ["link"]     # fixture

BLOCK = 4096
DIRECTIONS = {"read", "write", "discard", "flush"}
ERRORS = {"EIO", "EINVAL", "EROFS", "ENOSPC", "EOPNOTSUPP", "ETIMEDOUT", "torn", "lost", "other"}


class Pair:
    """A server in this process, and the names of its inline channels."""

    def __init__(self, names: Callable[[str], str]) -> None:
        self.req, self.resp = names("req"), names("resp")
        self.stack = ExitStack()

    def serve(self, device: str, **options: Any) -> BlockServer:
        return self.stack.enter_context(BlockServer(exports_from_lists(self.req, self.resp, device=device, poll=100,
                                                                       **options)))

    def device(self, **options: Any) -> BlockDevice:
        return self.stack.enter_context(BlockDevice(self.req, self.resp, poll=100, **{"timeout": 20, **options}))

    def raw(self) -> Raw:
        raw = Raw(self.req, self.resp)
        self.stack.callback(raw.close)
        return raw


@pytest.fixture
def pair(names: Callable[[str], str]) -> Iterator[Pair]:
    one = Pair(names)
    with one.stack:
        yield one


def way(status: Any, direction: str, number: int = 0) -> Any:
    """A direction of disk `number` in what status() returned; of a server's list, in its first entry."""
    entry = status[0] if isinstance(status, list) else status
    return entry["devices"][number]["directions"][direction]


def errors(direction: Any) -> dict[str, int]:
    """The kinds that there were."""
    return {kind: count for kind, count in direction["errors"].items() if count}


def measured(direction: Any) -> int:
    return sum(direction["latency"]["counts"])


# ---- what is counted


@pytest.mark.parametrize("kind", ["ram", "null", "file"])
@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_both_sides_count_what_was_asked(kind: str, shared: bool, pair: Pair, names: Callable[[str], str],
                                         tmp_path: Path) -> None:
    """Requests and bytes to the last one; each stands in a class of latencies, once they come slowly enough."""
    buffer = names("buf") if shared else None
    (tmp_path / "disk").write_bytes(bytes(64 * BLOCK))
    server = pair.serve(str(tmp_path / "disk") if kind == "file" else f"{kind}:256K", buffer=buffer)
    device = pair.device(shm=buffer)
    probes = 1 if shared else 0     # the client's read of the first block, to see that the buffer is the same
    asked = {"write": 0, "read": 0, "flush": 0}
    calls: dict[str, Callable[[], Any]] = {"write": lambda: device.pwrite(block(7), 5 * BLOCK),
                                           "read": lambda: device.pread(BLOCK, 5 * BLOCK), "flush": device.flush}
    for direction, call in calls.items():
        for _ in range(5):
            call()
            asked[direction] += 1

        def complete(direction: str = direction, call: Callable[[], Any] = call) -> bool:
            time.sleep(0.001)
            call()
            asked[direction] += 1
            found = [way(status(), direction) for status in (server.status, device.status)]
            return all(measured(each) == each["requests"] for each in found)

        eventually(complete)
    for status, more in ((server.status(), probes), (device.status(), 0)):
        assert way(status, "write")["requests"] == asked["write"]
        assert way(status, "write")["bytes"] == asked["write"] * BLOCK
        assert way(status, "read")["requests"] == asked["read"] + more
        assert way(status, "read")["bytes"] == (asked["read"] + more) * BLOCK
        assert (way(status, "flush")["requests"], way(status, "flush")["bytes"]) == (asked["flush"], 0)
        assert way(status, "discard")["requests"] == 0
        for direction in DIRECTIONS:
            one = way(status, direction)
            assert errors(one) == {} and one["depth"] == 0
            assert one["deepest"] == (1 if one["requests"] else 0)
            assert len(one["latency"]["counts"]) == 32 and one["latency"]["least_ns"] == 256
            assert one["latency"]["sampled"] in (1, 16)
    counters = server.status()[0]["counters"]
    assert (counters["reads"], counters["writes"], counters["syncs"]) == (asked["read"] + probes, asked["write"],
                                                                         asked["flush"])
    if kind == "file":      # every one, however they come
        assert all(way(server.status(), each)["latency"]["sampled"] == 1 for each in DIRECTIONS)


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_dense_requests_are_sampled(shared: bool, pair: Pair, names: Callable[[str], str]) -> None:
    """What is measured stands for the rest, and for no more than that; neighbours are one operation."""
    buffer = names("buf") if shared else None
    server, device = pair.serve("ram:1M", buffer=buffer), pair.device(shm=buffer)
    data = bytearray(128 * BLOCK)
    for _ in range(50):
        device.pread_many(range(0, 128 * BLOCK, BLOCK), data)
    device.flush()          # what the server counts after an answer is counted before the next one
    mine, its = way(device.status(), "read"), way(server.status(), "read")
    assert mine["requests"] == 50 * 128 and mine["bytes"] == 50 * 128 * BLOCK
    assert its["requests"] == 50 * 128 + (1 if shared else 0)
    for one in (mine, its):
        assert 0 < measured(one) <= one["requests"]
    assert 1 < mine["deepest"] <= 1024
    assert its["merged"] == server.status()[0]["counters"]["merged"] > 0
    assert "merged" not in mine
    assert its["deepest"] > 1


def test_discards_are_counted_apart(link: Link) -> None:
    """Their bytes, too; zeros are writes where the server cannot promise them."""
    server = link.serve("ram:256K")
    device = link.device()
    device.discard(0, 8 * BLOCK)
    device.discard(0, 2 * BLOCK, zero=True)
    for status in (server.status(), device.status()):
        assert (way(status, "discard")["requests"], way(status, "discard")["bytes"]) == (2, 10 * BLOCK)
        assert way(status, "write")["requests"] == 0
    assert measured(way(device.status(), "discard")) == 2       # rare: each is measured


def test_disks_of_one_connection_are_counted_apart(link: Link, tmp_path: Path) -> None:
    """On both sides, counters and directions; what belongs to the connection is the same for both."""
    (tmp_path / "disk").write_bytes(bytes(64 * BLOCK))
    server = link.serve("ram:256K", str(tmp_path / "disk"), "ram:64K")
    connection = Connection(channels_from_lists(link.req, link.resp, buffer=link.shm, poll=100)[0], timeout=20)
    link.stack.callback(connection.close)
    disks = [BlockDevice(connection=connection, device=number) for number in range(3)]
    for _ in range(7):
        disks[0].pwrite(block(1), 0)
    for _ in range(3):
        disks[1].pread(2 * BLOCK, 0)
    disks[1].flush()
    states = [disk.status() for disk in disks]
    assert [each["counters"]["writes"] for each in states] == [7, 0, 0]
    assert [each["counters"]["reads"] for each in states] == [0, 6, 0]
    assert [each["counters"]["syncs"] for each in states] == [0, 1, 0]
    assert [each["counters"]["lives"] for each in states] == [1, 1, 1]
    assert [each["devices"][0]["number"] for each in states] == [0, 1, 2]
    assert connection.client.counters["writes"] == 7 and connection.client.counters["reads"] == 6
    (entry,) = server.status()
    for number, (writes, reads, flushes) in enumerate([(7, 1, 0), (0, 3, 1), (0, 0, 0)]):   # 1: see above
        ways = entry["devices"][number]["directions"]
        assert [ways[each]["requests"] for each in ("write", "read", "flush")] == [writes, reads, flushes]
        ways = states[number]["devices"][0]["directions"]
        assert [ways[each]["requests"] for each in ("write", "flush")] == [writes, flushes]
    assert (entry["counters"]["writes"], entry["counters"]["reads"], entry["counters"]["syncs"]) == (7, 4, 1)
    for device in entry["devices"]:     # with a file on the connection all are measured
        assert all(measured(one) == one["requests"] for one in device["directions"].values())


def test_errors_by_kind(pair: Pair, tmp_path: Path) -> None:
    """Beyond the end; on a disk that is read-only; of a file that was cut short. They are requests, too, with no bytes."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(16 * BLOCK))
    server, raw = pair.serve(str(path), read_only="yes"), pair.raw()
    raw.connect()
    raw.send(*(Event(READ, 0, 16 + i, 1, i) for i in range(3)), Event(WRITE, 0, 16, 1, 3), Event(WRITE, 0, 0, 1, 4))
    assert [event.error for event in raw.answers(5)] == [-errno.EINVAL] * 4 + [-errno.EROFS]
    os.truncate(path, 8 * BLOCK)
    raw.send(*(Event(READ, 0, i, 1, i) for i in range(6, 10)))
    assert [event.error for event in sorted(raw.answers(4), key=lambda event: event.priv)] == [0, 0, -errno.EIO, -errno.EIO]
    eventually(lambda: measured(way(server.status(), "read")) == 7)
    read, write = (way(server.status(), each) for each in ("read", "write"))
    assert (read["requests"], read["bytes"], errors(read)) == (7, 2 * BLOCK, {"EINVAL": 3, "EIO": 2})
    assert (write["requests"], write["bytes"], errors(write)) == (2, 0, {"EINVAL": 1, "EROFS": 1})
    counters = server.status()[0]["counters"]
    assert (counters["reads"], counters["writes"], counters["rejected"], counters["failed"]) == (4, 0, 5, 2)


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "buffer"])
def test_errors_of_both_sides_agree(shared: bool, pair: Pair, names: Callable[[str], str], tmp_path: Path) -> None:
    buffer = names("buf") if shared else None
    path = tmp_path / "disk"
    path.write_bytes(bytes(16 * BLOCK))
    server, device = pair.serve(str(path), read_only="yes", buffer=buffer), pair.device(shm=buffer)
    with pytest.raises(OSError) as caught:
        device.pwrite(block(1), 0)
    assert caught.value.errno == errno.EROFS
    os.truncate(path, 0)
    with pytest.raises(OSError):
        device.pread(BLOCK, 8 * BLOCK)
    for status in (server.status, device.status):
        eventually(lambda status=status: errors(way(status(), "read")) == {"EIO": 1})
        assert errors(way(status(), "write")) == {"EROFS": 1} and way(status(), "write")["requests"] == 1
    assert device.status()["counters"]["errors"] == 2


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system that is full")
def test_a_full_file_system(pair: Pair, tmp_path: Path) -> None:
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64K", "none", place], check=True)
    try:
        with open(place / "disk", "wb") as file:
            file.truncate(1 << 20)
        server, device = pair.serve(str(place / "disk")), pair.device()
        with pytest.raises(OSError):
            for at in range(0, 1 << 20, BLOCK):
                device.pwrite(block(9), at)
        for status in (server.status, device.status):
            eventually(lambda status=status: errors(way(status(), "write")) == {"ENOSPC": 1})
            assert way(status(), "write")["bytes"] == (way(status(), "write")["requests"] - 1) * BLOCK
    finally:
        pair.stack.close()
        subprocess.run(["umount", place], check=True)


def test_depth_and_reissues(link: Link) -> None:
    """Of the disk that had requests in flight when its server came back, not of the other one; then none is left."""
    server = link.running(bytearray(64 * BLOCK), bytearray(64 * BLOCK))
    first = link.device(same_store=True)
    second = BlockDevice(connection=first.connection, device=1)
    server.hold = True
    writes = [link.start(lambda n=n: first.pwrite(block(n + 1), n * BLOCK)) for n in range(10)]
    eventually(lambda: way(first.status(), "write")["depth"] == first.status()["in_flight"] == 10)
    assert second.status()["in_flight"] == 0
    server.hold = False
    server.restart()
    for call in writes:
        call.result()
    one, other = first.status(), second.status()
    assert (one["counters"]["lives"], other["counters"]["lives"]) == (2, 2)
    assert 1 <= one["counters"]["reissued"] <= 10 and other["counters"]["reissued"] == 0
    write = way(one, "write")
    assert (write["requests"], write["bytes"], write["depth"], write["deepest"]) == (10, 10 * BLOCK, 0, 10)
    assert measured(write) <= 10 and one["in_flight"] == 0


def test_reissues_after_the_restart_of_a_server(link: Link, tmp_path: Path) -> None:
    """muenfast's own, killed while it was stopped with requests in its ring."""
    (tmp_path / "disk").write_bytes(bytes(64 * BLOCK))
    server = link.program(str(tmp_path / "disk"))
    device = link.device()
    server.process.send_signal(signal.SIGSTOP)
    writes = [link.start(lambda n=n: device.pwrite(block(n + 1), n * BLOCK)) for n in range(5)]
    eventually(lambda: device.status()["in_flight"] == 5)
    server.process.kill()
    server.process.wait()
    link.program(str(tmp_path / "disk"))
    for call in writes:
        call.result()
    status = device.status()
    assert (status["counters"]["reissued"], status["counters"]["lives"]) == (5, 2)
    assert way(status, "write")["requests"] == 5


def test_what_is_given_up_is_lost(link: Link) -> None:
    """Without an answer: in flight when the disk failed, and refused afterwards; both are errors of its counters."""
    server = link.running(bytearray(64 * BLOCK))
    device = link.device()
    server.hold = True
    writing = link.start(lambda: device.pwrite(block(1), 0))
    eventually(lambda: device.status()["in_flight"] == 1)
    device.fail("that is enough")
    with pytest.raises(OSError):
        writing.result()
    with pytest.raises(OSError):
        device.pread(BLOCK, 0)
    status = device.status()
    assert (errors(way(status, "write")), errors(way(status, "read"))) == ({"lost": 1}, {"lost": 1})
    assert (way(status, "write")["requests"], way(status, "write")["depth"], status["counters"]["errors"]) == (0, 0, 2)


def test_a_server_knows_what_waits(pair: Pair) -> None:
    """Requests in its ring are in flight, too; those of nobody are not."""
    server, raw = pair.serve("ram:256K"), pair.raw()
    assert server.status()[0]["in_flight"] == server.status()[0]["waiting"] == 0
    raw.connect()
    eventually(lambda: server.status()[0]["waiting"] == 0)
    raw.send(*(Event(READ, 0, i, 1, i) for i in range(4)))
    raw.answers(4)
    eventually(lambda: server.status()[0]["in_flight"] == 0)


def test_counters_outlive_new_channels(pair: Pair) -> None:
    """A client that makes the regions anew finds a server that goes on counting."""
    server = pair.serve("ram:256K")
    with BlockDevice(pair.req, pair.resp, poll=100, timeout=20) as device:
        device.pwrite(block(1), 0)
    for name in (pair.req, pair.resp):
        with suppress(FileNotFoundError):
            os.unlink(f"/dev/shm/{name}")
    with BlockDevice(pair.req, pair.resp, poll=100, timeout=20) as device:
        device.pwrite(block(1), 0)
    eventually(lambda: way(server.status(), "write")["requests"] == 2)


# ---- what they say


def test_percentiles() -> None:
    """Within a class evenly spread; the last has no end."""
    def of(*found: tuple[int, int], share: float = 0.5) -> float | None:
        classes = [0] * 32
        for k, count in found:
            classes[k] = count
        return counts.percentile({"least_ns": 256, "sampled": 1, "counts": classes}, share)

    assert of() is None
    assert of((0, 2)) == pytest.approx(0.128)
    assert of((2, 4), share=0.25) == pytest.approx((512 + 128) / 1e3)
    assert of((2, 99), (10, 1), share=0.99) == pytest.approx(1.024)
    assert of((2, 98), (10, 2), share=0.99) == pytest.approx((128 << 10) * 1.5 / 1e3)
    assert of((31, 5)) == of((31, 5), share=0.99) == pytest.approx((128 << 31) / 1e3)


def test_rates() -> None:
    """Of the time between two looks; of another life all."""
    def look(requests: int, slow: int) -> dict[str, Any]:
        return {"requests": requests, "bytes": requests * BLOCK, "merged": 0, "depth": 3, "deepest": 9,
                "errors": {"EIO": requests // 10, "other": 0},
                "latency": {"least_ns": 256, "sampled": 16, "counts": [requests - slow, *[0] * 30, slow]}}

    found = counts.rates(counts.since(look(300, 200), look(100, 0)), 2.0)
    assert found == {"requests_per_second": 100, "bytes_per_second": 100 * BLOCK, "merged_per_second": 0,
                     "errors_per_second": 10, "errors": {"EIO": 20}, "depth": 3,
                     "p50_us": pytest.approx((128 << 31) / 1e3), "p99_us": pytest.approx((128 << 31) / 1e3)}
    assert counts.since(look(5, 0), look(300, 0)) == counts.since(look(5, 0), None) == look(5, 0)
    idle = counts.rates(counts.since(look(300, 0), look(300, 0)), 1.0)
    assert (idle["requests_per_second"], idle["p50_us"], idle["errors"]) == (0, None, {})


# ---- muenfast stat


class Served:
    """A server process with two disks, one of them used from here."""

    def __init__(self, start: Callable[..., Program], names: Callable[[str], str]) -> None:
        self.req, self.resp = [names("req"), names("req")], [names("resp"), names("resp")]
        self.server = start("blk", "--req", ",".join(self.req), "--resp", ",".join(self.resp), "--device", "ram:1M,ram:2M")

    def use(self) -> BlockDevice:
        return BlockDevice(self.req[0], self.resp[0], timeout=20)


@pytest.fixture
def served(program: Callable[..., Program], names: Callable[[str], str]) -> Iterator[Served]:
    one = Served(program, names)
    yield one
    status, said = one.server.end()
    assert status == 0 and all("break its rule" in line for line in said.splitlines()), said


@pytest.fixture
def watch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `muenfast stat --watch ...`; gone at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        started.append(subprocess.Popen([sys.executable, "-m", "muenfast", "stat", *words], stdout=stdout,
                                        stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for one in started:
        if one.poll() is None:
            one.kill()
        one.communicate()


def test_stat_shows_directions(served: Served) -> None:
    """A line for each in which something went on, and no other; errors by kind."""
    with served.use() as disk:
        disk.pwrite(block(1) * 3, 0)
        disk.flush()
        lines = run("stat").stdout.splitlines()
    at = lines.index(f"  export {served.req[0]} {served.resp[0]} ram:1M 1048576 bytes: connected")
    assert lines[at + 1].startswith("    write: 3 requests, 0.0 MB, ")
    assert ", at most " in lines[at + 1]
    assert lines[at + 2].startswith("    flush: 1 requests, ")
    assert lines[at + 3].startswith("    sizes 1, batches ")
    assert lines[at + 4] == f"  export {served.req[1]} {served.resp[1]} ram:2M 2097152 bytes: waiting"
    client = InlineClient(served.req[1], served.resp[1])
    try:
        client.connect()
        with pytest.raises(OSError):
            client.read(1 << 40)
    finally:
        client.close()
    assert any(line.startswith("    read: 1 requests, ") and line.endswith(", EINVAL 1")
               for line in run("stat", served.req[1]).stdout.splitlines())


def test_stat_of_names(served: Served) -> None:
    """Entries by channel, disk or process, the others left out; a name that nothing has is misuse."""
    for word in (served.req[1], served.resp[1], "ram:2M"):
        (answer,) = json.loads(run("stat", "--json", word).stdout)
        assert [entry["req"] for entry in answer["entries"]] == [served.req[1]], word
    (answer,) = json.loads(run("stat", str(served.server.pid), "--json").stdout)
    assert len(answer["entries"]) == 2
    done = run("stat", served.req[0], "--json", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("muenfast: NAME, entry 1 'nonsense': ") and done.stderr.count("\n") == 1


def test_stat_json(served: Served) -> None:
    """Every field that docs/operations.md promises."""
    with served.use() as disk:
        disk.pread(BLOCK, 0)
        (answer,) = json.loads(run("stat", "--json").stdout)
        mine = disk.status()
    assert set(answer) == {"ok", "pid", "command", "monotonic", "entries"}
    entry, other = answer["entries"]
    assert {"id", "name", "role", "req", "resp", "device", "size", "disks", "read_only", "state", "checksum", "counters",
            "cpu", "offences", "waiting", "in_flight", "devices"} == set(entry) == set(other)
    for each, merged in ((entry, {"merged"}), (mine, set())):
        (device,) = each["devices"]
        assert (device["size"], device["block_size"]) == (1 << 20, BLOCK)
        assert set(device["directions"]) == DIRECTIONS
        for one in device["directions"].values():
            assert set(one) == {"requests", "bytes", "errors", "depth", "deepest", "latency"} | merged
            assert set(one["errors"]) == ERRORS and set(one["latency"]) == {"least_ns", "sampled", "counts"}
    text = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    for word in (*ERRORS, *DIRECTIONS, "checksum", "offences", "quarantines", "least_ns", "sampled", "deepest", "merged",
                 "waiting", "in_flight", "monotonic"):
        assert f"`{word}`" in text, word


def test_states_are_those_of_the_reference() -> None:
    """docs/operations.md lists in both of its tables what the code may say, and nothing else."""
    from muenfast import disk, export

    text = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| `state`, `failure` |"))
    of_export, of_client = re.fullmatch(r"\|.*\| export: (.*?); client: (.*?)\. .*\|", row).groups()  # type: ignore[union-attr]
    assert tuple(re.findall("`(.+?)`", of_export)) == export.STATES
    assert tuple(re.findall("`(.+?)`", of_client)) == disk.STATES
    table = text[text.index("| of | state | meaning | line |"):].partition("\n\n")[0].splitlines()[2:]
    found: dict[str, list[str]] = {"client": [], "server": []}
    side = ""
    for line in table:
        of, state = (cell.strip() for cell in line.split("|")[1:3])
        side = of or side
        found[side].append(state)
    assert found == {"client": list(disk.STATES), "server": list(export.STATES)}
    assert set(Client.STATES) <= set(disk.STATES)


STORE = """
import time

class Disk:
    def get_size(self):
        return 1 << 20

    def pread(self, buf, offset):
        if offset:
            time.sleep(1.5)
        buf[:] = bytes(len(buf))

    def pwrite(self, buf, offset):
        pass

    def flush(self):
        pass
"""


def test_stat_shows_late_calls_and_faults(program: Callable[..., Program], names: Callable[[str], str],
                                          tmp_path: Path) -> None:
    """What docs/operations.md says of disks written in Python; and faults that were injected."""
    (tmp_path / "disk.py").write_text(STORE)
    req, resp = names("req"), names("resp")
    server = program("blk", "--req", req, "--resp", resp, "--device", f"py:{tmp_path}/disk.py:Disk", "--timeout", "1",
                     "--inject", "error,on=flush")
    with BlockDevice(req, resp) as disk:
        disk.pread(BLOCK, 0)
        with pytest.raises(OSError):
            disk.pread(BLOCK, BLOCK)
        with pytest.raises(OSError):
            disk.flush()
        eventually(lambda: re.search("    its calls: calls [2-9], late 1, returned 1\n", run("stat").stdout))
        assert "    injected: error 1, " in run("stat").stdout
        assert "its calls: " in run("ctl", "status").stdout
    assert server.end()[0] == 0


def test_a_failure_stands_beside_the_state(pair: Pair, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    from muenfast.cli import stat

    pair.serve("ram:1M")
    disk = pair.device()
    disk.fail("no luck")
    status = disk.status()
    assert (status["state"], status["failure"]) == ("failed", "no luck")
    stat._show(status | {"device": "-"})
    assert ": failed: no luck\n" in capsys.readouterr().out


def test_watch_in_a_pipe(served: Served, watch: Callable[..., subprocess.Popen[str]]) -> None:
    """A head, then lines, one at least for each disk and interval; users come and go; Ctrl-C ends it with 0."""
    seen = watch("--watch", "0.05")
    assert seen.stdout is not None
    assert seen.stdout.readline().split() == ["TIME", "DIRECTION", "REQUESTS/s", "MB/s", "ERRORS/s", "DEPTH", "p50", "us",
                                              "p99", "us", "DISK"]
    idle = seen.stdout.readline().split()
    assert idle[1:9] == ["-", "0.0", "0.0", "0.0", "0", "-", "-", "export"]
    with served.use() as disk:
        end = time.monotonic() + 20
        while True:     # the server's disk, for we are no serving process
            disk.pwrite(block(1), 0)
            if select.select([seen.stdout], [], [], 0)[0]:
                words = seen.stdout.readline().split()
                if words[1] == "write" and words[9:] == [served.req[0], served.resp[0], "ram:1M"]:
                    break
            assert time.monotonic() < end
    assert float(words[2]) > 0 and float(words[6]) > 0
    eventually(lambda: seen.stdout is not None and seen.stdout.readline().split()[1] == "-")
    seen.send_signal(signal.SIGINT)
    assert (seen.wait(timeout=20), seen.stderr and seen.stderr.read()) == (0, "")


def test_watch_json(served: Served, watch: Callable[..., subprocess.Popen[str]]) -> None:
    """An object per line and interval; it ends by itself, with 0, when nobody reads any more, within however long an
    interval."""
    seen = watch("--json", "--watch", "0.05", served.req[0])
    assert seen.stdout is not None
    with served.use() as disk:
        for _ in range(3):
            disk.pread(BLOCK, 0)
            found = json.loads(seen.stdout.readline())
            assert set(found) == {"time", "disks", "silent"} and found["silent"] == []
            (one,) = found["disks"]
            assert set(one) == {"pid", "role", "req", "resp", "device", "number", "state", "failure", "in_flight",
                                "seconds", "directions"}
            assert (one["pid"], one["req"], one["device"]) == (served.server.pid, served.req[0], "ram:1M")
            assert set(one["directions"]) == DIRECTIONS and one["seconds"] > 0
            for rate in one["directions"].values():
                assert set(rate) == {"requests_per_second", "bytes_per_second", "merged_per_second", "errors_per_second",
                                     "errors", "depth", "p50_us", "p99_us"}
    seen.stdout.close()
    assert (seen.wait(timeout=20), seen.stderr and seen.stderr.read()) == (0, "")
    reading, writing = os.pipe()
    slow = watch("--watch", "3600", stdout=writing)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.readline().startswith("TIME")
    assert slow.wait(timeout=20) == 0


def test_watch_while_servers_come_and_go(program: Callable[..., Program], names: Callable[[str], str],
                                         watch: Callable[..., subprocess.Popen[str]]) -> None:
    """None at first, one, none, one that was killed: no error, and each is shown while it is there."""
    seen = watch("--watch", "0.05", "--json")
    assert seen.stdout is not None
    req, resp = names("req"), names("resp")

    def shown() -> list[int]:
        assert seen.stdout is not None
        return [disk["pid"] for disk in json.loads(seen.stdout.readline())["disks"]]

    assert shown() == []
    for number in (signal.SIGTERM, signal.SIGKILL):
        server = program("blk", "--req", req, "--resp", resp, "--device", "ram:64K")
        eventually(lambda server=server: shown() == [server.pid])
        server.end(number)
        eventually(lambda: shown() == [])
    program("blk", "--req", req, "--resp", resp, "--device", "ram:64K").end()   # takes what the killed one left
    seen.send_signal(signal.SIGINT)
    assert (seen.wait(timeout=20), seen.stderr and seen.stderr.read()) == (0, "")


def test_watch_on_a_terminal(served: Served, watch: Callable[..., subprocess.Popen[str]]) -> None:
    """Drawn anew from the first line, never scrolled; Ctrl-C ends it with 0."""
    terminal, inside = pty.openpty()
    try:
        seen = watch("--watch", "0.05", stdout=inside)
        os.close(inside)
        said = b""
        end = time.monotonic() + 20
        while said.count(b"\x1b[H") < 3:
            assert time.monotonic() < end
            if select.select([terminal], [], [], 0.1)[0]:
                said += os.read(terminal, 65536)
        screens = said.split(b"\x1b[H")
        assert screens[0] == b"" and screens[1].startswith(b"TIME ") and screens[1].endswith(b"\x1b[J")
        assert screens[1].count(b"\r\n") == 3       # a head and two disks
        seen.send_signal(signal.SIGINT)
        assert (seen.wait(timeout=20), seen.stderr and seen.stderr.read()) == (0, "")
    finally:
        os.close(terminal)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9"])
def test_an_interval_that_cannot_be(seconds: str) -> None:
    done = run("stat", f"--watch={seconds}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"muenfast: --watch '{seconds}': ") and done.stderr.count("\n") == 1
