"""One object and several threads at once: each call is done whole or refused, in builds with and without the GIL.

Where there is a GIL, calls that move more than 16 KiB release it, and so does every wait; without one, any call may
meet another at any moment.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from muenfast import Reader, UsageError, Writer

PROTOCOL = 0x7EADB
THREADS = 4
SMALL, LARGE = 64, 40_000   # of the latter every copy releases the GIL
FREE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def test_a_process_that_is_started_is_written_down_before_an_interrupt_comes() -> None:
    """SIGINT and SIGTERM wait until then; the program that was started can be interrupted as ever."""
    script = """if True:
        import os, signal, subprocess
        from muenfast.threads import interrupts_held
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM):
            written = []
            try:
                with interrupts_held() as as_before:
                    os.kill(os.getpid(), number)
                    written.append(subprocess.run(["grep", "SigBlk", "/proc/self/status"], preexec_fn=as_before,
                                                  capture_output=True, text=True).stdout.split())
            except KeyboardInterrupt:
                written.append("interrupted")
            assert written == [["SigBlk:", "0" * 16], "interrupted"], written
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def element(who: int, serial: int, size: int) -> bytes:
    """Whose, which of his, bytes that depend on both, checksum."""
    body = struct.pack("=II", who, serial) * (size // 8)
    return body[:size - 4] + struct.pack("=I", zlib.crc32(body[:size - 4]))


def said(data: bytes | memoryview) -> tuple[int, int]:
    """Who wrote which, of an element that is whole."""
    assert struct.unpack_from("=I", data, len(data) - 4)[0] == zlib.crc32(data[:-4]), "a torn element"
    return struct.unpack_from("=II", data)


@contextmanager
def often() -> Iterator[None]:
    """Threads change as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Crowd:
    """Threads that call work(who) until it returns False; what they raise is raised by join(), refusals are counted."""

    def __init__(self, work: Callable[[int], bool]) -> None:
        self.refused = 0
        self._work, self._lock = work, threading.Lock()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(who,)) for who in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def _run(self, who: int) -> None:
        try:
            while True:
                try:
                    if not self._work(who):
                        return
                except UsageError as error:
                    assert "another thread" in str(error), error
                    with self._lock:
                        self.refused += 1
        except BaseException as error:
            self._errors.append(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a call hangs"
        assert self._errors == []


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_threads_that_share_a_writer(size: int) -> None:
    """A write is published whole and once, or refused and not published; the counters know of nothing else."""
    memory = bytearray(64 + 16 * size)
    done, seen = [0] * THREADS, [-1] * THREADS
    end = time.monotonic() + 0.5
    with often(), Writer(memory, size=size, protocol=PROTOCOL) as writer, Reader(memory) as reader:
        reader.read()

        def work(who: int) -> bool:
            if done[who] % 2:
                writer.write(element(who, done[who], size))
                done[who] += 1
            else:
                writer.write_many(element(who, done[who], size) + element(who, done[who] + 1, size))
                done[who] += 2
            return time.monotonic() < end or crowd.refused == 0 and size == LARGE and time.monotonic() < end + 30

        crowd = Crowd(work)
        try:
            delivered = 0
            while reader.wait(0.2):
                if (data := reader.read()) is not None:
                    who, serial = said(data)
                    assert serial > seen[who], "an element came twice, or out of order"
                    seen[who], delivered = serial, delivered + 1
        finally:
            crowd.join()
        assert writer.written == sum(done) == delivered + reader.counters["lost"]
        assert crowd.refused > 0 or size == SMALL and not FREE


@pytest.mark.parametrize("many", [False, True], ids=["read", "read_many_into"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_threads_that_share_a_reader(size: int, many: bool) -> None:
    """Every element goes to one of them, whole, or is counted as lost."""
    memory = bytearray(64 + 16 * size)
    taken: list[list[int]] = [[] for _ in range(THREADS)]
    room = [bytearray(4 * size) for _ in range(THREADS)]
    over = threading.Event()
    with often(), Writer(memory, size=size, protocol=PROTOCOL) as writer, Reader(memory) as reader:
        reader.read()

        def work(who: int) -> bool:
            finished = over.is_set()
            if many:
                count = reader.read_many_into(room[who])
                found = [memoryview(room[who])[k * size:(k + 1) * size] for k in range(count)]
            else:
                data = reader.read()
                found = [] if data is None else [memoryview(data)]
            taken[who] += [said(data)[1] for data in found]
            return bool(found) or not finished

        crowd = Crowd(work)
        try:
            serial, end = 0, time.monotonic() + 0.5
            while time.monotonic() < end or crowd.refused == 0 and size == LARGE and time.monotonic() < end + 30:
                writer.write(element(0, serial, size))
                serial += 1
        finally:
            over.set()
            crowd.join()
        everything = sorted(number for one in taken for number in one)
        assert len(set(everything)) == len(everything), "an element went to two"
        assert all(one == sorted(one) for one in taken)
        assert len(everything) + reader.counters["lost"] + reader.pending == writer.written == serial
        assert reader.counters["elements"] == len(everything)
        assert crowd.refused > 0 or size == SMALL and not FREE


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_an_object_that_is_closed_among_its_users(kind: str) -> None:
    """Each user learns that it is closed, or that another thread is inside; none uses memory that is gone."""
    for _ in range(20):
        memory = bytearray(64 + 4 * LARGE)
        writer = Writer(memory, size=LARGE, protocol=PROTOCOL)
        reader = Reader(memory)
        data, target = element(0, 0, LARGE), bytearray(LARGE)
        started = threading.Barrier(THREADS + 1)
        waiting = threading.local()

        def work(who: int) -> bool:
            if not hasattr(waiting, "no"):
                waiting.no = True
                started.wait(30)
            try:
                if kind == "writer":
                    writer.write(data)
                else:
                    reader.read_into(target)
                assert one.broken in (False, True)
            except UsageError as error:
                if "is closed" not in str(error):
                    raise
                return False
            return True

        one = writer if kind == "writer" else reader
        crowd = Crowd(work)
        started.wait(30)
        end = time.monotonic() + 30
        while not one.closed and time.monotonic() < end:
            try:
                one.close()
            except UsageError as error:
                assert "another thread" in str(error)
        crowd.join()
        writer.close()
        reader.close()
        memory.append(0)    # nobody holds a buffer of it any more


if FREE:
    @pytest.mark.parametrize("module", ["_ring", "_target", "_store", "_engine", "_blk", "_buffer", "_client",
                                        "_bufclient", "_bench", "_netbench"])
    def test_importing_leaves_the_gil_off(module: str) -> None:
        """The compiled modules declare that they do without."""
        code = f"import muenfast.{module}, sys; print(sys._is_gil_enabled())"
        result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60,
                                check=False, env={k: v for k, v in os.environ.items() if k != "PYTHON_GIL"})
        assert (result.stdout, result.stderr) == ("False\n", "")


_CLOSING = """
import mmap, sys, threading
from muenfast import UsageError
from muenfast._blk import Server
from muenfast._store import Store
from muenfast._client import Client
def close(one, start):
    start.wait()
    try:
        one.close()
    except UsageError:
        pass
for k in range(300):
    pages = [mmap.mmap(-1, 8192) for _ in range(2)]
    one = Server(*pages, Store.null(4096)) if sys.argv[1] == "server" else Client(*pages)
    start = threading.Barrier(3)
    threads = [threading.Thread(target=close, args=(one, start)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.close()
    for page in pages:
        page.close()    # BufferError while somebody holds it
"""


@pytest.mark.parametrize("kind", ["server", "client"])
def test_an_engine_that_several_threads_close(kind: str) -> None:
    """It is closed once, and none of them writes to memory that is gone."""
    run = subprocess.run([sys.executable, "-c", _CLOSING, kind], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
