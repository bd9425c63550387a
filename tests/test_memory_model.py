"""The cores under a weak memory model: every execution that C11 allows, of a few calls each.

docs/memory-model.md says which fence and which re-check forbids what. Here the very C that is built runs, with its
atomics, fences and copies done by a machine (tests/c/weak.c) that gives each load every value it may see, old ones
included, and tries all of them. x86 shows next to none of these executions; arm64 may show many.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cores import ROOT, Cores, mangled, python_includes, run
from helpers import compiler

SOURCES = ROOT / "src/muenfast"
HARNESS = ROOT / "tests/c"
SCENARIOS = re.compile(r'^    \{"([\w-]+)", begin_', re.MULTILINE)
pytestmark = pytest.mark.timeout(600)   # one scenario takes 40 s of CPU time
NAMES = {part: SCENARIOS.findall((HARNESS / f"weak_{part}.c").read_text())
         for part in ("ring", "server", "client", "marks")}


def names_of(part: str, cores: Cores, name: str) -> str:
    """Macros for weak_server.c or weak_client.c: where their part of the core is, and how Cython calls it there."""
    code = cores.translated(name).read_text()
    bindings = " ".join(f'*(void **)&{pointer} = ring_function("{function}");'
                        for pointer, where, function in cores.imported(name) if where == "_ring")
    types = re.findall(r"^struct (__pyx_t_8muenfast_\d+_[a-z]+_(\w+_t)) \{", code, re.MULTILINE)
    lines = [f'#define {part}_SOURCE "{name}.c"', f"#define {part}_FUNCTION(name) __pyx_f_{mangled(name)}_##name",
             f"#define {part}_CONSTANT(name) {part}_CONSTANT_##name", f"#define {part}_BINDINGS {bindings}",
             f"#define {part}_TYPE(name) {part}_TYPE_##name"]
    constants = sorted(set(re.findall(r"\b(__pyx_e_8muenfast_\d+_[a-z]+_([A-Z]\w*))\b", code)))
    lines += [f"#define {part}_CONSTANT_{short} {full}" for full, short in constants]
    lines += [f"#define {part}_TYPE_{short} struct {full}" for full, short in types]
    return "\n".join(lines) + "\n"


class Builder:
    """Makes a program with the scenarios of one part, of the sources as they are in this tree."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.cores = Cores(place)
        self.compiler = compiler()

    def compiled(self, part: str, *more: str) -> str:
        """An object of the harness; more: flags."""
        target = self.place / f"weak{part}.o"
        if not target.exists():
            # Each function in a section of its own: what needs Python is not reached from main(), and is dropped.
            run(*self.compiler, "-std=gnu11", "-O1" if part else "-O2", "-ftree-vectorize", "-ffunction-sections",
                "-fdata-sections", "-w", "-DMUENFAST_NO_URING", f"-I{self.place}", f"-I{HARNESS}", f"-I{SOURCES}",
                *python_includes(), *more, "-c", "-o", target, HARNESS / f"weak{part}.c")
        return str(target)

    def ring(self) -> str:
        self.cores.translated("_ring")
        exports = " ".join(f"EXPORT({name})" for name in self.cores.exported("_ring"))
        (self.place / "ring.h").write_text(
            f'#define RING_SOURCE "_ring.c"\n#define core_constants() do {{ {self.cores.constants("_ring")} }} while (0)\n'
            f"#define RING_EXPORTS {exports}\n")
        return self.compiled("_ring", "-include", str(self.place / "ring.h"))

    def engine(self, part: str, function: str, *more: str) -> str:
        """weak_server.c or weak_client.c, with the module that defines the function."""
        name = self.cores.module(function)
        (self.place / f"{part}.h").write_text(names_of(part.upper(), self.cores, name))
        return self.compiled(f"_{part}", "-include", str(self.place / f"{part}.h"), *more)

    def program(self, part: str) -> Path:
        target = self.place / f"weak-{part}"
        if not target.exists():
            objects = [self.compiled(""), self.ring()]
            if part == "server":
                objects.append(self.engine(part, "server_batch"))
            elif part == "client":
                objects.append(self.engine(part, "client_await", "-fsanitize=thread"))
            elif part == "marks":       # a header, which no .pyx has to be translated for
                objects.append(self.compiled(f"_{part}", "-fsanitize=thread"))
            run(*self.compiler, "-o", target, *objects, "-pthread", "-Wl,--gc-sections",
                "-Wl,--unresolved-symbols=ignore-all")
        return target


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("weak"))


@pytest.mark.parametrize(("part", "name"), [pytest.param(part, name, id=name)
                                            for part, names in NAMES.items() for name in names])
def test_no_execution_does_what_must_not_be(builder: Builder, part: str, name: str) -> None:
    """Nothing is delivered, written or answered that was not published; nobody sleeps on what he was not told of."""
    done = subprocess.run([builder.program(part), name], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
