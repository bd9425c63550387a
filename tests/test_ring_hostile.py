"""Ring ends against peers that do what no protocol allows: see hostile.py, which runs in processes of its own."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from muenfast import BrokenChannelError, Reader, Result, Writer

PROGRAM = Path(__file__).with_name("hostile.py")
PROTOCOL = 0x1234


def hostile(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(PROGRAM), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def ended(*running: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each; all are gone afterwards."""
    try:
        return [(process.wait(90), *process.communicate()) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("mode", ["overread", "overwrite"])
def test_a_byte_too_far_would_be_noticed(mode: str) -> None:
    """The fences of the tests below end a process that crosses them."""
    [(status, _, _)] = ended(hostile(mode, "0", "0"))
    assert status == -signal.SIGSEGV


def test_a_reader_survives_a_writer_that_rewrites_everything_at_full_speed() -> None:
    """No crash, no hang, no byte outside the region or the target, nothing impossible reported; data does come through.

    Two readers with different attacks, each in its own process, for five seconds.
    """
    results = ended(*(hostile("reader", "5", str(seed)) for seed in (1, 2)))
    for status, output, errors in results:
        assert (status, errors) == (0, "")
        counts = dict(word.split("=") for word in output.split())
        assert all(int(count) > 0 for count in counts.values()), f"the attack never led to all results: {output}"


def test_a_writer_survives_readers_that_rewrite_everything_at_full_speed() -> None:
    """A writer takes no value from the region: its counters and its slots are its own."""
    results = ended(*(hostile("writer", "3", str(seed)) for seed in (3, 4)))
    assert [(status, errors) for status, _, errors in results] == [(0, "")] * 2


SIZE, ELEMENTS = 20_000, 8
REGION = 64 + SIZE * ELEMENTS


def under_load(truncate: Callable[[], None], work: Callable[[], bool]) -> None:
    """Calls work until it is done, while another thread calls truncate somewhere in the middle."""
    chance = random.Random()
    started = threading.Event()

    def cut() -> None:
        started.wait()
        for _ in range(chance.randrange(3000)):
            pass
        truncate()

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        for k in range(1_000_000):
            if k == 3:
                started.set()
            if work():
                return
        raise AssertionError("nobody noticed that the memory is gone")
    finally:
        started.set()
        thread.join()


@pytest.mark.parametrize("keep", [0, mmap.PAGESIZE, 5 * mmap.PAGESIZE], ids=["nothing", "header", "some elements"])
def test_truncation_of_the_region_under_load(tmp_path: Path, keep: int) -> None:
    """Writer and reader live on, both are broken, writing raises and reading finds the channel inactive."""
    path = tmp_path / "region"
    for _ in range(15):
        path.write_bytes(bytes(REGION))
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as ours, \
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as theirs, \
                Writer(ours, size=SIZE, protocol=PROTOCOL) as writer, Reader(theirs) as reader:
            data, target = bytes(SIZE), bytearray(SIZE * ELEMENTS)
            raised: list[BrokenChannelError] = []

            def work(writer: Writer = writer, reader: Reader = reader, data: bytes = data, target: bytearray = target,
                     raised: list[BrokenChannelError] = raised) -> bool:
                try:
                    writer.write(data)
                    assert not raised
                except BrokenChannelError as error:
                    raised.append(error)
                if reader.read_many_into(target) == 0 and reader.result is Result.OVERRUN_DETECTED:
                    raise AssertionError("a reader that follows each write is not overrun")
                if raised and not reader.broken:    # nothing more comes: look at what is gone until the page is hit
                    reader.drain()
                    assert reader.position <= writer.written
                    return keep > 0
                return bool(raised) and reader.broken

            under_load(lambda: os.truncate(path, keep), work)
            assert writer.broken
            with pytest.raises(BrokenChannelError):
                writer.write_many(data)
            if keep == 0:
                assert reader.broken
                reader.read()
                assert (reader.read(), reader.result, reader.wait(0)) == (None, Result.INACTIVE, False)


def test_truncation_of_the_bell_under_load(tmp_path: Path) -> None:
    """The channel does not break with its bell: every element goes on arriving, woken or polled."""
    path = tmp_path / "bell"
    for _ in range(15):
        path.write_bytes(bytes(mmap.PAGESIZE))
        region = bytearray(64 + 8 * 8)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as ours, mmap.mmap(file.fileno(), 0) as theirs, \
                Writer(region, size=8, protocol=PROTOCOL, bell=ours) as writer, Reader(region, bell=theirs) as reader:
            gone = threading.Event()
            reader.read()
            left = 50

            def work(writer: Writer = writer, reader: Reader = reader, gone: threading.Event = gone) -> bool:
                nonlocal left
                number = writer.written.to_bytes(8, "little")
                if left % 5 == 0:
                    assert reader.wait(0.0005) is False     # asleep on the bell, maybe just when it goes
                writer.write(number)
                assert reader.wait() is True
                assert reader.read() == number
                left -= gone.is_set()
                return left == 0

            def cut(gone: threading.Event = gone) -> None:
                os.truncate(path, 0)
                gone.set()

            under_load(cut, work)
            assert not writer.broken and not reader.broken


BEFORE = "faulthandler.enable()\na = Reader(bytearray(128))\n"
AFTER = "a = Reader(bytearray(128))\nfaulthandler.enable()\n"
BETWEEN = AFTER + "b = Reader(bytearray(128))\n"
FAULT = ("with open(sys.argv[1], 'r+b') as file:\n"
         "    other = mmap.mmap(file.fileno(), 0)\n"
         "os.truncate(sys.argv[1], 0)\n"
         "other[0]\n")
SENT = "os.kill(os.getpid(), signal.SIGBUS)\n"


@pytest.mark.parametrize("cause", [FAULT, SENT], ids=["fault", "sent"])
@pytest.mark.parametrize("order", ["a = Reader(bytearray(128))\n", BEFORE, AFTER, BETWEEN],
                         ids=["alone", "handler first", "handler last", "handler between"])
def test_a_bus_error_elsewhere_still_ends_the_process(tmp_path: Path, order: str, cause: str) -> None:
    """SIGBUS that is not about a channel goes where it went before, once: the report, if there is one, and the end."""
    path = tmp_path / "other"
    path.write_bytes(bytes(mmap.PAGESIZE))
    code = "import faulthandler, mmap, os, signal, sys\nfrom muenfast import Reader\n" + order + cause
    with open(tmp_path / "report", "w+b") as report:
        result = subprocess.run([sys.executable, "-c", code, str(path)], stderr=report, timeout=60, check=False)
        report.seek(0)
        told = report.read(1 << 20).count(b"Fatal Python error: Bus error")
    assert (result.returncode, told) == (-signal.SIGBUS, int("faulthandler" in order))


@pytest.mark.parametrize("handler", ["signal.SIG_IGN", "lambda number, frame: print(number, flush=True)"],
                         ids=["ignored", "handled"])
def test_a_bus_error_that_is_sent_goes_to_who_handles_it(handler: str) -> None:
    """A program that ignores or handles what others send it goes on doing so, any number of times."""
    code = ("import os, signal\nfrom muenfast import Reader\n"
            f"signal.signal(signal.SIGBUS, {handler})\n"
            "a = Reader(bytearray(128))\n"
            "for _ in range(3):\n"
            "    os.kill(os.getpid(), signal.SIGBUS)\n")
    result = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ("" if "IGN" in handler else f"{int(signal.SIGBUS)}\n" * 3)
