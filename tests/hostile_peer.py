"""A program: rewrites a channel's header and slots at full speed. Usage: hostile_peer.py PATH PROTOCOL SECONDS SEED

Nearly everything it writes is nonsense; some of it looks right enough to be believed for a moment.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys
import time

TRANSPORT = 0x487312B6B79A9B6D
EVENT = struct.Struct("<IiQII")
EVENT_BYTES = 4120
U64 = (1 << 64) - 1


def main(path: str, protocol: int, seconds: float, seed: int) -> None:
    """Ends with the channel inactive."""
    dice = random.Random(seed)
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, 0)
    os.close(fd)
    elements = (len(memory) - 64) // EVENT_BYTES
    words = memoryview(memory)[:64].cast("Q")
    odd = [0, 1, 2, 253, 254, 255, 4119, 4121, 1 << 31, 1 << 32, 1 << 52, 1 << 63, U64 - 1, U64]
    fields = {0: [TRANSPORT] * 8 + odd, 1: odd, 2: [protocol] * 8 + odd, 3: [EVENT_BYTES] * 8 + odd,
              4: [elements] * 4 + odd, 5: odd, 6: odd, 7: odd}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(200):
            act = dice.random()
            if act < 0.3:
                field = dice.randrange(8)
                words[field] = dice.choice(fields[field])
            elif act < 0.4:  # as if nothing were wrong, with a counter that runs
                for field, value in enumerate((TRANSPORT, dice.randrange(1, 4), protocol, EVENT_BYTES, elements, 0)):
                    words[field] = value
                words[6] = words[7] = dice.randrange(2 * elements)
            elif act < 0.6:
                words[6] = words[7] = (words[7] + dice.randrange(elements)) & U64
            else:
                event = EVENT.pack(dice.choice([0, 1, 2, 2, 3, 0xFFFFFFFF]), dice.choice([0, 0, -5, 5, -(1 << 31)]),
                                   dice.choice([0, 1, 7, dice.getrandbits(8), 1 << 62, U64]), dice.choice([1, 1, 0, 2]),
                                   dice.getrandbits(32) if dice.random() < 0.5 else dice.getrandbits(4))
                at = 64 + dice.randrange(elements) * EVENT_BYTES
                memory[at:at + EVENT.size] = event
                if dice.random() < 0.1:
                    memory[at + 24:at + 32] = dice.getrandbits(64).to_bytes(8, "little")
    words[1] = 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2], 16), float(sys.argv[3]), int(sys.argv[4]))
