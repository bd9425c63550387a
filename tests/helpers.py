"""What several tests say in one word."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer import BLOCK_BYTES

_ROOT = Path(__file__).resolve().parent.parent


def eventually(true: Callable[[], Any], seconds: float = 20) -> Any:
    """What `true` returns once that is true."""
    end = time.monotonic() + seconds
    while True:
        value = true()
        if value:
            return value
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def block(value: int) -> bytes:
    """4096 bytes that say `value` over and over."""
    return struct.pack("<Q", value) * (BLOCK_BYTES // 8)


class TornWords:
    """Stands in for a peer's 64-bit view of its header: an assignment takes effect in pieces, as plain Python's
    struct.pack_into("<Q") does it: zero first, then byte by byte; now and then the CPU is given away in between."""

    def __init__(self, words: memoryview) -> None:
        self._words, self._raw = words, words.cast("B")
        self._dice = random.Random(5)

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        at = index * 8
        self._raw[at:at + 8] = bytes(8)
        if self._dice.random() < 0.05:
            time.sleep(0)
        for i, byte in enumerate(value.to_bytes(8, "little")):
            self._raw[at + i] = byte

    def release(self) -> None:
        self._raw.release()
        self._words.release()


def no_ring() -> str | None:
    """Why a block device's requests do not come by FUSE over io_uring here, or None."""
    from muenfast.attach import fuseuring

    if not os.path.exists(fuseuring.PARAMETER):
        return "needs a kernel with FUSE over io_uring (Linux 6.14)"
    if not fuseuring.tried():
        return f"needs Linux {'.'.join(map(str, fuseuring.TRIED))}, or {fuseuring.PARAMETER} to be Y"
    return None


def compiler() -> list[str]:
    """Of C, as setup.py finds it."""
    return (os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc").split()


def compiled(name: str, place: Path, *options: str) -> Path:
    """The program of tests/c/NAME.c, about headers of the package; made there. `make coverage` counts what it reaches of
    them (tools/coverage.py)."""
    counts = os.environ.get("MUENFAST_COVERAGE_PROGRAMS")
    if counts:
        options += ("-O0", "--coverage", "-fprofile-update=atomic", "-dumpdir", f"{counts}/{uuid.uuid4()}-")
    subprocess.run([*compiler(), "-std=gnu11", "-Wall", "-Wextra", "-Werror", *options, f"-I{_ROOT / 'src/muenfast'}", "-o",
                    place / name, _ROOT / "tests/c" / f"{name}.c", "-lpthread"], check=True)
    return place / name
