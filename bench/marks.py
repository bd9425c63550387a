"""What a packet's mark costs, by each way of muenfast.bpf: nanoseconds more than the same packet without any.

    python bench/marks.py [--rounds N]

One TUN device in a network namespace of its own; this process pinned to one CPU. out: send(2) of 64 bytes UDP, whose
packet goes into the device's queue. in: write(2) of 84 bytes IPv4 for another host, which the kernel drops right behind
ingress. All ways take turns within a round; of each the fastest batch of 100 packets in the round counts, since other
load only ever adds. Shown are the medians of the rounds' differences, and the quartiles. `tap` is what its sender pays;
that the engine takes the copy off the packet socket comes on top (`tap, taken`: recvmsg(2) less the read(2) of the
device that is thrown away, both through Python).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

from muenfast import bpf, netns
from muenfast._marks import prefix
from muenfast.bpf import Way

BATCH = 100  # packets; the device's queue holds 500


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def timed(batches: int, call: Callable[[], object], between: Callable[[], None] = lambda: None) -> float:
    """Nanoseconds of one call in the fastest batch; `between` batches, untimed, room is made."""
    least = 1 << 62
    for _ in range(batches):
        start = time.perf_counter_ns()
        for _ in range(BATCH):
            call()
        least = min(least, time.perf_counter_ns() - start)
        between()
    return least / BATCH


def taken(tap: socket.socket, tun: int, send: Callable[[], object]) -> float:
    """Nanoseconds that it takes longer to take a packet off the packet socket than off the device."""
    tap.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
    least_tap, least_tun = [], []
    for _ in range(20):
        try:
            while tap.recv(2048):
                pass
        except BlockingIOError:
            pass
        for _ in range(BATCH):
            send()
        least_tun.append(timed(1, lambda: os.read(tun, 2048)))
        least_tap.append(timed(1, lambda: tap.recvmsg(2048, 64)))
    return min(least_tap) - min(least_tun)


def measure(rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        stack.callback(os.close, tun)
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"marks0", 0x1001))     # TUNSETIFF: IFF_TUN, IFF_NO_PI
        subprocess.run("echo 1 >/proc/sys/net/ipv6/conf/marks0/disable_ipv6; ip addr add 10.9.0.1/24 dev marks0; "
                       "ip link set marks0 up", shell=True, check=True)
        index = socket.if_nametoindex("marks0")
        out = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        out.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 24)
        out.connect(("10.9.0.2", 9))
        head = struct.pack("!BBHHHBBH", 0x45, 0, 84, 1, 0, 64, 254, 0) + socket.inet_aton("10.9.0.2") + \
            socket.inet_aton("10.9.0.77")
        plain = head[:10] + struct.pack("!H", checksum(head)) + head[12:] + bytes(64)
        marked = prefix(plain[0], 24) + plain
        payload = bytes(64)

        def drain() -> None:
            try:
                while os.read(tun, 2048):
                    pass
            except BlockingIOError:
                pass

        def send() -> float:
            return timed(50, lambda: out.send(payload), drain)

        def write(data: bytes) -> float:
            return timed(50, lambda: os.write(tun, data))

        for _ in range(rounds):
            base_out, base_in = send(), write(plain)
            found.setdefault("out, no mark: send(2) itself", []).append(base_out)
            found.setdefault("in, no mark: write(2) itself", []).append(base_in)
            for way in Way:
                with bpf.attach(index, ways=(way,)) as attached:
                    found.setdefault(f"out, {way.value}", []).append(send() - base_out)
                    if attached.incoming:
                        found.setdefault(f"in, {way.value}, packet without mark", []).append(write(plain) - base_in)
                        found.setdefault(f"in, {way.value}, packet with mark", []).append(write(marked) - base_in)
                    if attached.tap is not None:
                        found.setdefault("out, tap, taken", []).append(taken(attached.tap, tun, lambda: out.send(payload)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="marks.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds

    def run() -> dict[str, list[float]]:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})     # of this thread
        return measure(rounds)

    for name, values in sorted(netns.inside_new(run).items()):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:<34} {middle:8.0f} ns   {low:.0f} to {high:.0f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
