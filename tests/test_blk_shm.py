"""Exports over a shared buffer as their user meets them: `muenfast blk --shm`, `modprobe connections=`, and what becomes of
them while either side comes, goes, and pulls the memory away."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import stops
from conftest import Program, leftovers, run, unique
from helpers import block, eventually
from peer import (
    BUFFER_READ,
    BUFFER_WRITE,
    DISCARD,
    EPOCH,
    GET_SMART,
    MEDIA_BLOCKS,
    RESET,
    BufferClient,
    BufferDevice,
    BufferRequest,
    ChannelReader,
    InlineClient,
)

from muenfast import BlockDevice, BlockServer, PeerError, UsageError
from muenfast.blk import exports_from_lists

MIB = 1 << 20


class Link:
    """Names of a connection, and all that was opened on it."""

    def __init__(self, names: Callable[[str], str], program: Callable[..., Program]) -> None:
        self.req, self.resp, self.buffer = names("req"), names("resp"), names("buf")
        self.program = program
        self.stack = ExitStack()

    @property
    def words(self) -> list[str]:
        return ["--req", self.req, "--resp", self.resp, "--shm", self.buffer, "--poll", "100"]

    def make(self) -> None:
        """Makes the regions, which then stay whoever leaves: plain peers are in nobody's books."""
        for name, size in ((self.req, 0x8000), (self.resp, 0x4000), (self.buffer, MIB)):
            with open(f"/dev/shm/{name}", "xb") as file:
                file.truncate(size)

    def serve(self, device: str = "ram:1M", **lists: Any) -> BlockServer:
        """A server in this process."""
        server = BlockServer(exports_from_lists(self.req, self.resp, device=device,
                                                **{"poll": 100, "buffer": self.buffer, **lists}))
        self.stack.callback(server.close)
        return server

    def process(self, device: str = "ram:1M", *more: str) -> Program:
        """A server in a process of its own."""
        server = self.program("blk", *self.words, "--device", device, *more)
        self.stack.callback(server.end)
        return server

    def client(self, **more: Any) -> BufferClient:
        """Connected."""
        client = BufferClient(self.req, self.resp, self.buffer, **{"timeout": 20, **more})
        self.stack.callback(client.close)
        client.connect()
        return client

    def close(self) -> None:
        self.stack.close()
        for name in (self.req, self.resp, self.buffer):     # those that a plain peer made stay
            for path in (f"/dev/shm/{name}", f"/dev/shm/{name}.bell"):
                if os.path.exists(path):
                    os.unlink(path)


@pytest.fixture
def link(names: Callable[[str], str], program: Callable[..., Program]) -> Iterator[Link]:
    link = Link(names, program)
    yield link
    link.close()


def shm_size(name: str) -> int:
    return os.stat(f"/dev/shm/{name}").st_size


def reconnect(client: BufferClient) -> None:
    """Waits for a server that restarts, and begins a new life with it."""
    def gone() -> bool:
        try:
            client.poll()
        except ConnectionResetError:
            return True
        return False

    eventually(gone)
    client.connect()


# ------------------------------------------------------------------ serving


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_blk_serves_over_a_buffer(link: Link, tmp_path: Path, number: int) -> None:
    """The line names sizes, disk and buffer; regions have the sizes of Muen's peers; a plain client reads, writes,
    discards and synchronises; stat tells; nothing is left."""
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB + 512))
    before = leftovers(tmp_path)
    server = link.process(str(image))
    assert server.lines == [f"export {link.req} {link.resp} {MIB + 512} {image} shm {link.buffer}"]
    assert [shm_size(name) for name in (link.req, link.resp, link.buffer)] == [0x8000, 0x4000, 16 * MIB]
    client = link.client()
    assert client.devices == [BufferDevice(2049, 512, 32768)]
    client.write(0, 512, b"w" * 1024, at=4096)
    client.discard(0, 512, 512)
    client.sync(0)
    assert client.read(0, 0, 2048, at=8192) == bytes(1024) + b"w" * 512 + bytes(512)
    assert image.read_bytes()[:2048] == bytes(1024) + b"w" * 512 + bytes(512)
    (answer,) = [a for a in json.loads(run("stat", "--json").stdout) if a["pid"] == server.pid]
    (entry,) = answer["entries"]
    assert (entry["shm"], entry["state"], entry["size"]) == (link.buffer, "connected", MIB + 512)
    (disk,) = entry["devices"]
    assert (disk["device"], disk["size"], disk["block_size"]) == (str(image), MIB + 512, 512)
    assert (entry["counters"]["writes"], entry["counters"]["discards"], entry["counters"]["syncs"]) == (1, 1, 1)
    client.disconnect()
    assert server.end(number) == (0, "")
    left = leftovers(tmp_path)
    assert {kind: left[kind] for kind in left if kind != "nodes"} == {k: before[k] for k in before if k != "nodes"}


def test_inline_and_buffers_in_one_process(link: Link, names: Callable[[str], str]) -> None:
    """An empty entry of --shm stays inline; both are served, side by side, each in its own sizes and protocols."""
    req, resp = names("req"), names("resp")
    server = link.program("blk", "--req", f"{link.req},{req}", "--resp", f"{link.resp},{resp}", "--shm",
                          f"{link.buffer},", "--shm-size", "1M,", "--device", "ram:1M,ram:2M")
    assert server.lines == [f"export {link.req} {link.resp} {MIB} ram:1M shm {link.buffer}",
                            f"export {req} {resp} {2 * MIB} ram:2M"]
    assert [shm_size(name) for name in (link.buffer, req, resp)] == [MIB, MIB, MIB]
    client = link.client()
    client.write(0, 0, block(1))
    with BlockDevice(req, resp) as device:
        device.pwrite(block(2), 0)
        assert device.pread(4096, 0) == block(2)
    assert client.read(0, 0, 4096) == block(1)
    assert server.end() == (0, "")


def test_modprobe_serves_several_disks(link: Link, tmp_path: Path, names: Callable[[str], str]) -> None:
    """The second generation's parameters: device numbers follow the order of the list, connection by connection."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1" * MIB)
    two.write_bytes(b"2" * (MIB // 2 + 512))
    other = [names(word) for word in ("req", "resp", "buf")]
    server = link.program("modprobe", "muenblock-server", f"connections=7:{link.req}:{link.resp}:{link.buffer},"
                          f"8:{':'.join(other)}:aa:bb", f"devices={one}:7,ram:3M:8,{two}:7", "--poll", "100")
    assert server.lines == [
        f"export {link.req} {link.resp} {MIB} {one} {MIB // 2 + 512} {two} shm {link.buffer}",
        f"export {other[0]} {other[1]} {3 * MIB} ram:3M shm {other[2]}"]
    client = link.client()
    assert client.devices == [BufferDevice(256, 4096, 4096), BufferDevice(1025, 512, 32768)]
    assert client.read(0, 0, 4096) == b"1" * 4096
    assert client.read(1, MIB // 2, 512) == b"2" * 512
    second = BufferClient(*other, 0xAA, 0xBB, timeout=20)
    try:
        assert second.connect() == [BufferDevice(768, 4096, 4096)]
        second.disconnect()
    finally:
        second.close()
    assert server.end() == (0, "")


# ------------------------------------------------------------------ misuse

MISUSE = {
    "unequal": (["--shm", "{buffer},x"], ["--shm, entry 1", "1 in --req"]),
    "name": (["--shm", "x/y"], ["--shm, entry 0 'x/y'"]),
    "a channel": (["--shm", "{req}"], ["--shm, entry 0", "one channel or the buffer of one connection", "--req"]),
    "size of nothing": (["--shm", "", "--shm-size", "1M"], ["--shm-size, entry 0 '1M'", "names no buffer"]),
    "size without": (["--shm-size", "1M"], ["--shm-size, entry 0 '1M'", "names no buffer"]),
    "size": (["--shm", "{buffer}", "--shm-size", "5000"], ["--shm-size, entry 0 '5000'", "multiple of 4096"]),
    "no room": (["--shm", "{buffer}", "--size", "64"], ["--size, entry 0 '64'", "at least 96"]),
    "disk": (["--shm", "{buffer}", "--device", "ram:1M:{buffer}"], ["a disk is no channel", "--shm, entry 0"]),
    "small": (["--shm", "/{tmp}/small"], ["--shm, entry 0", "512 bytes, at least 4096"]),
    "client": (["--client", "--attach", "none", "--shm", "{req}"], ["--shm, entry 0", "the buffer of one connection"]),
    "client's size": (["--client", "--attach", "none", "--shm-size", "1M"], ["--shm-size, entry 0", "names no buffer"]),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told_in_one_line_and_undone(link: Link, tmp_path: Path, case: str) -> None:
    """Status 2; the line names option, entry, value and rule; nothing was made."""
    (tmp_path / "small").write_bytes(bytes(512))
    words, expected = MISUSE[case]
    before = leftovers(tmp_path)
    values = {"buffer": link.buffer, "req": link.req, "tmp": str(tmp_path)[1:]}
    done = run("blk", "--req", link.req, "--resp", link.resp, *(word.format(**values) for word in words))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert all(part.format(**values) in done.stderr for part in expected), done.stderr
    left = leftovers(tmp_path)
    assert {kind: left[kind] for kind in left if kind != "nodes"} == {k: before[k] for k in before if k != "nodes"}


def test_two_buffers_are_two_regions(link: Link, names: Callable[[str], str]) -> None:
    """One buffer cannot serve two connections; a disk one has, no other may have."""
    lists = {"req": f"{link.req},{names('req')}", "resp": f"{link.resp},{names('resp')}"}
    with pytest.raises(UsageError, match="the buffer of one connection"):
        exports_from_lists(**lists, buffer=f"{link.buffer},{link.buffer}")


# ------------------------------------------------------------------ lives


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_comes_back(link: Link, tmp_path: Path, number: int) -> None:
    """It begins a new response epoch; what was in the request ring is void but for queries and Reset; a client that begins
    anew goes on with the same bytes."""
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    link.make()
    server, client = link.process(str(image)), link.client()
    client.write(0, 0, block(1))
    epochs = {client.ring._words[EPOCH]}
    for life in range(3):
        server.end(number)
        client.send(BufferRequest(BUFFER_WRITE, 0, 77, 4096, 4096, 0), BufferRequest(RESET, 0, 78))
        server = link.process(str(image))
        answers = []
        while not answers or answers[-1].tag != 78:
            try:
                answers += client.answers(1)
            except ConnectionResetError:
                continue
        assert 77 not in {answer.tag for answer in answers}
        assert image.read_bytes()[4096:8192] == bytes(4096)
        client.connect()
        assert client.read(0, 0, 4096) == block(1 + life)
        client.write(0, 0, block(2 + life))
        epochs.add(client.ring._words[EPOCH])
    assert len(epochs) == 4


def test_clients_that_are_killed_are_followed_by_others(link: Link) -> None:
    """Half a hundred clients that die in the middle of their work: each next one is served, on one response epoch."""
    server = link.serve("ram:1M")
    reader = None
    for life in range(50):
        client = BufferClient(link.req, link.resp, link.buffer, timeout=20, epoch=1 if life % 2 else None)
        client.connect()
        reader = reader or ChannelReader(link.resp, 0x5155684453516F3D, 16)
        epoch = reader._words[EPOCH]
        client.write(0, 4096 * life, block(life))
        assert client.read(0, 4096 * life, 4096, at=8192) == block(life)
        client.send(*(BufferRequest(BUFFER_READ, 0, i, 4096, 0, 0) for i in range(100)))
        client.close()
        assert reader._words[EPOCH] == epoch
    assert reader is not None
    reader.close()
    counters = server.exports[0].server.counters
    assert (counters["connections"], counters["writes"], counters["rejected"]) == (50, 50, 0)


@pytest.mark.parametrize("which", ["req", "resp", "buffer"])
def test_a_region_that_was_made_anew_is_followed(link: Link, which: str) -> None:
    """A name that means another region by now: the server leaves the old one, and serves a client on the new."""
    server = link.serve("ram:1M")
    client = link.client()
    client.write(0, 0, block(9))
    client.disconnect()
    name = getattr(link, which)
    size = shm_size(name)
    os.unlink(f"/dev/shm/{name}")
    with open(f"/dev/shm/{name}", "xb") as file:
        file.truncate(size)
    eventually(lambda: not any(end.replaced() for end in server.exports[0]._ends))
    client = link.client()
    assert client.read(0, 0, 4096) == block(9)
    assert server.exports[0].server.counters["connections"] == 2


def test_a_buffer_that_is_truncated_breaks_that_connection_only(link: Link, names: Callable[[str], str],
                                                                caplog: pytest.LogCaptureFixture) -> None:
    """EIO, one line that names the region, and service again once it has its size back."""
    req, resp = names("req"), names("resp")
    lists = {"req": f"{link.req},{req}", "resp": f"{link.resp},{resp}", "device": "ram:1M,ram:1M",
             "buffer": f"{link.buffer},", "buffer_size": "1M,", "poll": 100}
    server = BlockServer(exports_from_lists(**lists))
    link.stack.callback(server.close)
    client = link.client()
    with caplog.at_level(logging.ERROR):
        os.truncate(f"/dev/shm/{link.buffer}", 4096)
        client.send(BufferRequest(BUFFER_READ, 0, 5, 8192, 0, 65536))
        assert client.answers(1)[0].status == errno.EIO
        eventually(lambda: link.buffer in caplog.text)
    other = InlineClient(req, resp, timeout=20)
    link.stack.callback(other.close)
    assert other.connect() == 2048
    os.truncate(f"/dev/shm/{link.buffer}", MIB)
    reconnect(client)
    assert client.read(0, 0, 8192, at=65536) == bytes(8192)


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_a_buffer_that_is_cut_and_grown_again(link: Link, tmp_path: Path, kind: str) -> None:
    """The server goes on with the memory that the clients have, not with pages that it knew before."""
    image = tmp_path / "image"
    data = random.Random(3).randbytes(MIB)
    image.write_bytes(data)
    link.make()
    link.serve(str(image) if kind == "file" else "ram:1M")
    client = link.client()
    if kind == "ram":
        client.write(0, 0, data)
    assert client.read(0, 0, 65536, at=65536) == data[:65536]
    os.truncate(f"/dev/shm/{link.buffer}", 0)
    os.truncate(f"/dev/shm/{link.buffer}", MIB)
    assert client.read(0, 65536, 65536, at=65536) == data[65536:131072]
    client.write(0, 0, data[-65536:], at=65536)
    client.sync(0)
    assert client.read(0, 0, 65536) == data[-65536:]
    if kind == "file":
        assert image.read_bytes() == data[-65536:] + data[65536:]


@pytest.mark.stress
@pytest.mark.skipif(stops.available() is not None, reason=str(stops.available()))
@pytest.mark.parametrize(("epoch", "more"), [(None, 40), (1, 1)], ids=["another epoch", "the same epoch"])
def test_a_life_that_ends_amid_a_batch_gets_no_answer(link: Link, names: Callable[[str], str], epoch: int | None,
                                                      more: int) -> None:
    """The server stands in the middle of a long read when the client begins anew, and writes as many requests as before or
    fewer: it finishes that read, begins nothing else of the old life, and answers the new one alone."""
    disk = names("disk")
    server = link.process(f"ram:1M:{disk}")
    try:
        client = link.client(epoch=epoch)
        client.write(0, 0, b"d" * 65536)
        place = stops.mapped(server.pid, f"/dev/shm/{link.buffer}")
        requests = [BufferRequest(BUFFER_READ, 0, 1, 65536, 0, 131072), BufferRequest(DISCARD, 0, 2, 4096, 0, 0),
                    BufferRequest(BUFFER_WRITE, 0, 3, 4096, 4096, 65536)]
        with stops.caught(server.pid, place + 131072 + 32768, 8, stops.WRITE, provoke=lambda: client.send(*requests)):
            client.ring.activate()
            client.send(*(BufferRequest(MEDIA_BLOCKS, 0, 100 + i) for i in range(more)), BufferRequest(GET_SMART, 0, 99))
        assert [answer.tag for answer in client.answers(more + 1)] == [*range(100, 100 + more), 99]
        assert client.poll() is None
        with open(f"/dev/shm/{disk}", "rb") as file:
            assert file.read(65536) == b"d" * 65536
        (entry,) = json.loads(run("stat", "--json").stdout)[0]["entries"]
        assert entry["counters"]["cancelled"] == 2
    finally:
        server.end()
        assert run("chan", "rm", disk).returncode == 0


def test_a_buffer_has_one_server(program: Callable[..., Program], tmp_path: Path) -> None:
    """Two connections in one buffer would spoil each other's payload: also of two processes, and of overlapping slices."""
    names = [unique(word) for word in ("a", "c", "b", "d")]
    bar = tmp_path / "bar"
    bar.write_bytes(bytes(4 << 20))
    server = program("blk", "--req", names[0], "--resp", names[1], "--shm", f"{bar}@0+2M", "--device", "ram:1M")
    ended = run("blk", "--req", names[2], "--resp", names[3], "--shm", f"{bar}@1M+2M", "--device", "ram:1M")
    assert ended.returncode == 1
    assert f"--shm, entry 0 '{bar}@1M+2M': the server's side of buffer {bar}@1M+2M is already held by" in ended.stderr
    other = program("blk", "--req", names[2], "--resp", names[3], "--shm", f"{bar}@2M+2M", "--device", "ram:1M")
    assert other.end() == (0, "") and server.end() == (0, "")


def test_the_two_generations_mixed(program: Callable[..., Program]) -> None:
    """An inline client of a server with a buffer is told what the other side has."""
    names = [unique(word) for word in ("a", "c", "b")]
    server = program("blk", "--req", names[0], "--resp", names[1], "--shm", names[2], "--device", "ram:1M")
    with pytest.raises(PeerError, match="the other side uses a shared buffer: name it"):
        BlockDevice(names[0], names[1], timeout=2)
    assert server.end()[0] == 0
