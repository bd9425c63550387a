"""What all serving commands share: the ready line, signals, systemd, one way out."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import socket
from collections.abc import Callable
from types import FrameType

from muenfast import params
from muenfast.threads import ending

log = logging.getLogger("muenfast")


class Stop:
    """SIGINT, SIGTERM and SIGHUP (a closed terminal) as a flag one can wait on; install before anything is opened.

    SIGINT counts even where a shell's & had it ignored; SIGHUP does not under nohup. After one of them all are ignored: the
    process is ending, and a second one would only change its status. Context manager.
    """

    def __init__(self) -> None:
        # Not an Event: its lock may be held by the very code that the handler interrupts.
        self._set_by_signal = False
        self._read = self._write = -1
        self._old: dict[int, object] = {}

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._old[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if self._set_by_signal else handler)  # type: ignore[arg-type]
        os.close(self._read)
        os.close(self._write)
        ending.told = False

    def _set(self, number: int, frame: FrameType | None) -> None:
        if not self._set_by_signal:
            self._set_by_signal = ending.told = True
            os.write(self._write, b"s")

    def is_set(self) -> bool:
        return self._set_by_signal

    def wait(self, until: Callable[[], bool] | None = None) -> None:
        """Returns after a signal, or once until() is true (asked five times a second)."""
        # Never without a limit: the kernel may deliver a signal to another thread (right after SIGCONT it does), and
        # only the main thread runs Python's handler, once it wakes.
        while not self._set_by_signal:
            select.select([self._read], [], [], 0.2)
            if until is not None and until():
                return


def patience(arguments: argparse.Namespace) -> int:
    """--quarantine."""
    from muenfast.connection import PATIENCE

    if arguments.quarantine is None:
        return PATIENCE
    return params.number("--quarantine", None, arguments.quarantine, least=0, most=1 << 62, what="a number of broken rules")


def add_cpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpus", metavar="L", help="CPUs, N or N-M, that the engines' threads are pinned to, in turn "
                                                    "(default: they run anywhere)")


def cpus(arguments: argparse.Namespace) -> tuple[int, ...]:
    """--cpus."""
    if arguments.cpus is None:
        return ()
    from muenfast.cpus import cpus_from_list

    return cpus_from_list("--cpus", arguments.cpus)


def notify(state: str) -> None:
    """sd_notify(3): tells systemd, where it started us (NOTIFY_SOCKET). A socket that cannot be reached is only said:
    the variable may have been inherited, and disks do not depend on it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        try:
            s.connect(address)
            s.sendall(state.encode())
        except OSError as error:
            log.warning("NOTIFY_SOCKET %s: %s", os.environ["NOTIFY_SOCKET"], error.strerror or error)


def sweep() -> None:
    """Takes away what dead processes left, whatever its names; clients are served, or servers asked, meanwhile."""
    from muenfast import doctor  # late: to load it takes longer than to begin to serve

    doctor.sweep()


def say_ready(lines: list[str]) -> None:
    """One line per export, disk or interface, then `ready`, flushed."""
    for line in lines:
        print(line)
    print("ready", flush=True)
    notify("READY=1")
