"""What a test wants done in a network namespace: a program, for a thread of the test's own cannot go there and back.

    serve ADDRESS PORT             one TCP connection: the SHA-256 of what came, as hexadecimal
    send ADDRESS PORT BYTES SEED   TCP: so many random bytes; their SHA-256
    hear ADDRESS PORT              one UDP datagram: SHA-256 and length
    say ADDRESS PORT BYTES SEED    the same, sent
    sniff INTERFACE HEX            the first packet that came in there and begins so, as hexadecimal (AF_PACKET)
    raw INTERFACE HEX              sent as it is (AF_PACKET)

Each prints "ready" once the other side may begin.
"""

from __future__ import annotations

import hashlib
import random
import socket
import sys


def main(what: str, where: str, *words: str) -> None:
    if what in ("sniff", "raw"):
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        s.bind((where, 3))
        print("ready", flush=True)
        if what == "raw":
            s.send(bytes.fromhex(words[0]))
            return
        while True:
            data, (_, _, direction, *_) = s.recvfrom(1 << 17)
            if direction != socket.PACKET_OUTGOING and data.startswith(bytes.fromhex(words[0])):
                print(data.hex())
                return
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    kind = socket.SOCK_STREAM if what in ("serve", "send") else socket.SOCK_DGRAM
    with socket.socket(family, kind) as s:
        s.settimeout(60)
        if what in ("serve", "hear"):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((where, int(words[0])))
            if what == "hear":
                print("ready", flush=True)
                data = s.recv(1 << 17)
                print(hashlib.sha256(data).hexdigest(), len(data))
                return
            s.listen(1)
            print("ready", flush=True)
            connection, _ = s.accept()
            with connection:
                connection.settimeout(60)
                digest = hashlib.sha256()
                while data := connection.recv(1 << 20):
                    digest.update(data)
            print(digest.hexdigest())
            return
        print("ready", flush=True)
        data = random.Random(int(words[2])).randbytes(int(words[1]))
        s.connect((where, int(words[0])))
        s.sendall(data)
        print(hashlib.sha256(data).hexdigest(), *([len(data)] if what == "say" else []))


main(*sys.argv[1:])
