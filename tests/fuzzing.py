"""The fuzz targets of tests/fuzz: what they stand on, how they are built and run; for tests, tools/attack.py.

A target of C is LLVMFuzzerTestOneInput() over a core: with libFuzzer and sanitizers (clang) it explores, with
tests/fuzz/replay.c (any compiler) it replays its corpus and mutations of that, the same ones each time.
"""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cores import ROOT, Cores, python_includes, run
from helpers import compiler

FUZZ = ROOT / "tests/fuzz"
sys.path.append(str(FUZZ))
CORPORA = FUZZ / "corpus"
_FUNCTION = re.compile(r"^cdef (?!inline)[^=\n(]*?\b(\w+)\([^)]*\) noexcept nogil:", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Target:
    """parses: whose bytes. core: the module whose C it includes, None: headers only. units: modules that this one calls.
    python: it is a function of tests/fuzz/parsers.py instead."""

    parses: str
    core: str | None = None
    units: tuple[str, ...] = ()
    python: bool = False


TARGETS = {
    "ring": Target("a channel's header, counters and elements, at its reader", "_ring"),
    "bell": Target("a channel's bell, under who sleeps on it", "_ring"),
    "buffer": Target("a client's requests over a shared buffer", "_buffer", ("_ring",)),
    "blk": Target("a client's requests, inline", "_blk", ("_ring",)),
    "client": Target("a server's answers, inline", "_client", ("_ring",)),
    "bufclient": Target("a server's answers over a shared buffer", "_bufclient", ("_ring", "_client")),
    "nbd": Target("an NBD client's requests", "attach._nbd"),
    "paths": Target("a region of path MTUs, and a bell's advice to a sender", "_net", ("_ring",)),
    "segment": Target("super-packets that are split, and packets too long for their path"),
    "frame": Target("packets in elements, three framings"),
    "coalesce": Target("packets that are merged"),
    "net": Target("a channel's elements, on their way to the devices", "_net", ("_ring",)),
    "partitions": Target("a disk's partition tables", python=True),
    "policies": Target("a policy's file", python=True),
    "control": Target("requests to a control socket", python=True),
    "broker": Target("requests to a broker", python=True),
    "pathmtus": Target("a region of path MTUs, as it is opened", python=True),
    "negotiation": Target("an NBD client's choice of its export", python=True),
}


class Builder:
    """Builds targets of a tree. command, flags: the compiler and what it is told; replay: whether by replay.c."""

    def __init__(
        self,
        place: Path,
        package: Path = ROOT / "src/muenfast",
        *,
        command: list[str] | None = None,
        flags: tuple[str, ...] = ("-O1",),
        link: tuple[str, ...] = (),
        replay: bool = True,
    ) -> None:
        self.place, self.cores = place, Cores(place, package)
        self.command, self.flags, self.link, self.replay = command or compiler(), flags, link, replay

    def _compile(self, target: Path, source: Path, *more: str) -> Path:
        if not target.exists():
            # What needs Python is not reached from main(), and leaves with its section. The hidden rest stays unresolved.
            run(
                *self.command,
                "-std=gnu11",
                "-D_GNU_SOURCE",
                "-w",
                "-Werror=implicit-function-declaration",
                "-ffunction-sections",
                "-fdata-sections",
                "-DMUENFAST_NO_URING",
                *self.flags,
                f"-I{self.place}",
                f"-I{FUZZ}",
                f"-I{self.cores.package}",
                *python_includes(),
                *more,
                "-c",
                "-o",
                target,
                source,
            )
        return target

    def _names(self, core: str) -> Path:
        """A header: where a module's C is, and how Cython calls what is in it."""
        target = self.place / f"{core}.names.h"
        if not target.exists():
            bindings = " ".join(
                f'*(void **)&{pointer} = {where.removeprefix("_")}_function("{function}");'
                for pointer, where, function in self.cores.imported(core)
            )
            exports = " ".join(f"EXPORT({name})" for name in _FUNCTION.findall(self.cores.source(core).read_text()))
            target.write_text(
                f'#define CORE_SOURCE "{core}.c"\n#define CORE_CONSTANTS {self.cores.constants(core)}\n'
                f"#define CORE_BINDINGS {bindings}\n#define CORE_EXPORTS {exports}\n" + self.cores.short_names(core)
            )
        return target

    def _unit(self, core: str) -> Path:
        names = self._names(core)
        return self._compile(
            self.place / f"unit{core}.o",
            FUZZ / "unit.c",
            "-include",
            str(names),
            f"-DUNIT_FUNCTION={core.removeprefix('_')}_function",
        )

    def program(self, name: str) -> Path:
        """A target's program. Raises AssertionError with the compiler's words."""
        program = self.place / f"fuzz-{name}"
        if not program.exists():
            target = TARGETS[name]
            more = [] if target.core is None else ["-include", str(self._names(target.core))]
            objects = [
                self._compile(self.place / f"{name}.o", FUZZ / f"{name}.c", *more),
                self._compile(self.place / "fuzz.o", FUZZ / "fuzz.c"),
                *(self._unit(unit) for unit in target.units),
            ]
            if self.replay:
                objects.append(self._compile(self.place / "replay.o", FUZZ / "replay.c"))
            run(
                *self.command,
                *self.flags,
                *self.link,
                "-o",
                program,
                *objects,
                "-pthread",
                "-Wl,--gc-sections",
                "-Wl,--unresolved-symbols=ignore-all",
            )
        return program


def mutated(inputs: Sequence[bytes], dice: random.Random) -> bytes:
    """One of them, changed in some places."""
    data = bytearray(dice.choice(inputs) if inputs else b"")
    for _ in range(dice.randint(1, 5)):
        at = dice.randrange(len(data) + 1)
        what = dice.randrange(4)
        if what == 0:
            data[at:at] = dice.randbytes(dice.randint(1, 6))
        elif what == 1:
            del data[at : at + dice.randint(1, 6)]
        elif what == 2 and inputs:
            data[at:] = dice.choice(inputs)[at:]
        elif at < len(data):
            data[at] = dice.randrange(256)
    return bytes(data)


def pack(inputs: Iterable[bytes]) -> bytes:
    """A corpus as one file: each input behind its length, a little-endian u16."""
    return b"".join(len(data).to_bytes(2, "little") + data for data in inputs)


def unpack(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "little")
        found.append(data[at + 2 : end])
        at = end
    return found


def corpus(name: str) -> Path:
    """Where a target's kept inputs are."""
    return CORPORA / f"{name}.corpus"


def replay(program: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that has replay.c on the target's corpus; words: its options."""
    kept = [corpus(name)] if corpus(name).exists() else []
    return subprocess.run(
        [program, *words, "-o", program.with_suffix(".failed"), *kept],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def replay_python(name: str, executions: int, seed: int, seconds: float) -> str:
    """Runs a target in Python on its corpus, and on mutations of that for a while; what is wrong, or ""."""
    import parsers  # of tests/fuzz

    target, dice, end = parsers.TARGETS[name], random.Random(seed), time.monotonic() + seconds
    kept = unpack(corpus(name).read_bytes()) if corpus(name).exists() else []
    inputs = itertools.chain(kept, (mutated(kept, dice) for _ in range(executions)))
    for number, data in enumerate(inputs):
        if number >= len(kept) and time.monotonic() > end:
            break
        try:
            target(data)
        except Exception as error:
            return f"{name}: {data.hex()}: {type(error).__name__}: {error}"
    return ""
