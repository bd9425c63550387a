"""What several tests of blocks say in one word."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

from peer import BLOCK_BYTES


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
