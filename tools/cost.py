"""usage: tools/cost.py [--write] [--against COMMIT] [--json FILE] [ROW ...]

Instructions per element of the hot loops, counted by valgrind's callgrind in the C that is built, compiled as it is built
(bench/cost: the programs), and compared with those that are kept in bench/cost.json. They do not depend on how fast the
machine is or what else runs there: two runs come to the same.

Exit status 1 where a row takes more than 3 % more than is kept, or is not kept, or is gone; a row that takes more than 3 %
less is told. 2: nothing can be said: there is no valgrind, or nothing is kept of this compiler, libc, flags and CPU, whose
counts no other's can be compared with. Then and in any case --against COMMIT counts that commit's tree, too, built here by
the same compiler, and compares with that instead. --write keeps what was counted, as this compiler's record, after a second
run that must come to the same. ROW: only rows with that in their names.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cores import python_includes, run  # noqa: E402
from fuzzing import Builder  # noqa: E402

SOURCES = ROOT / "bench/cost"
RECORD = ROOT / "bench/cost.json"
PLACE = ROOT / "build/cost"
LIMIT = 0.03    # of a row's record
ACCEPT = "make check-cost ARGS=--write"

# Program: the module whose C it includes, and those that this one calls.
PROGRAMS = {
    "ring": ("_ring", ()),
    "server": ("_blk", ("_ring",)),
    "client": ("_client", ("_ring",)),
    "bufserver": ("_buffer", ("_ring",)),
    "bufclient": ("_bufclient", ("_ring", "_client")),
    "net": ("_net", ("_ring",)),
}
BATCHES = (1, 8, 64)


def every_row() -> list[str]:
    """The names of all rows, as the programs have them."""
    found = [f"ring {way} {size} B" for size in (64, 1522) for way in ("write", "read")]
    found += [f"block {kind} {way} 4 KiB, {side}" for kind in ("inline", "buffer") for side in ("server", "client")
              for way in ("read", "write")]
    found += [f"packet {framing} {size} B, {way}" for framing in ("raw", "net_hdr") for size in (64, 1522)
              for way in ("send", "receive")]
    return [*(f"{row}, batch {batch}" for row in found for batch in BATCHES), "checksum of 4096 B, batch 1",
            *(f"packet net_hdr 1500 B, {way}, batch 16" for way in ("split", "merge"))]


@dataclass(frozen=True)
class Environment:
    """What counts depend on besides the sources: those of another one are not comparable."""

    machine: str        # x86_64
    compiler: str       # and its version
    flags: str          # that decide about the code
    libc: str           # whose memcpy, memset and locks are counted with the rest
    cpu: str            # features for which there is other code, in the package or in libc

    def differs(self, other: Environment) -> list[str]:
        """Where, in words."""
        return [f"{name} {getattr(other, name) or 'none'}, kept {getattr(self, name) or 'none'}"
                for name in self.__dataclass_fields__ if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Counts:
    environment: Environment
    rows: dict[str, float]      # instructions per element
    tools: dict[str, str]       # versions of what made them, for who wonders


# ------------------------------------------------------------------ the record

def parse_record(text: str) -> list[Counts]:
    """Raises ValueError."""
    try:
        return [Counts(Environment(**each["environment"]),
                       {str(name): float(value) for name, value in each["rows"].items()}, each["tools"])
                for each in json.loads(text)["records"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no record of counts ({error})") from None


def read_record(path: Path = RECORD) -> list[Counts]:
    """Empty where there is none. Raises SystemExit."""
    if not path.exists():
        return []
    try:
        return parse_record(path.read_text())
    except ValueError as error:
        raise SystemExit(f"cost.py: {path}: {error}; it is written by: {ACCEPT}") from None


def format_record(records: Sequence[Counts]) -> str:
    kept = [{"environment": vars(each.environment), "tools": each.tools, "rows": each.rows} for each in records]
    return json.dumps({"unit": "instructions per element", "records": kept}, indent=1) + "\n"


def kept_of(records: Sequence[Counts], environment: Environment) -> Counts | None:
    return next((each for each in records if each.environment == environment), None)


def replaced(records: Sequence[Counts], counts: Counts) -> list[Counts]:
    """With that environment's record instead of the one before; others stay."""
    return [*(each for each in records if each.environment != counts.environment), counts]


# ------------------------------------------------------------------ what callgrind says

def parse_dumps(text: str, elements: int) -> dict[str, float]:
    """Instructions per element of each row: the difference of N and 2N elements, so that what is done once falls out.

    text: callgrind's file, whose parts a program named "ROW /1" and "ROW /2". Raises ValueError.
    """
    totals: dict[str, int] = {}
    name = None
    for line in text.splitlines():
        if line.startswith("desc: Trigger:"):
            request = line.partition("Client Request: ")[2]
            name = request if re.search(r" /[12]$", request) else None
        elif line.startswith("totals:") and name is not None:
            if name in totals:
                raise ValueError(f"{name} was counted twice")
            totals[name] = int(line.split()[1])
            name = None
    rows = {}
    for name in totals:
        row, turn = name[:-3], name[-1]
        if turn == "1":
            if totals.get(f"{row} /2", 0) <= totals[name]:
                raise ValueError(f"{row}: {totals[name]} instructions for {elements} elements, "
                                 f"{totals.get(f'{row} /2')} for twice as many")
            rows[row] = round((totals[f"{row} /2"] - totals[name]) / elements, 2)
    if not rows or len(totals) != 2 * len(rows):
        raise ValueError(f"{len(totals)} parts are no {len(rows)} rows")
    return rows


def parse_words(text: str) -> dict[str, str]:
    """What a program says of itself: "libc", "cpu", "elements"."""
    return {name: rest for name, _, rest in (line.partition(" ") for line in text.splitlines())}


def code_flags(words: Sequence[str]) -> str:
    """Those of a compiler's options that decide about the code: no warnings, paths or symbols."""
    return " ".join(word for word in words if re.match(r"-(O|f|m|std=|D)", word) and "prefix-map" not in word)


# ------------------------------------------------------------------ comparing

def compare(before: dict[str, float], after: dict[str, float]) -> tuple[list[str], list[str]]:
    """What is wrong, and what is better than is kept, a line for each row; both in the order of `after`."""
    worse, better = [], []
    for name, now in after.items():
        was = before.get(name)
        if was is None:
            worse.append(f"{name}: {now:.2f} instructions, of which nothing is kept")
        elif now > was * (1 + LIMIT):
            worse.append(f"{name}: {was:.2f} -> {now:.2f} instructions, {now / was - 1:+.1%}")
        elif now < was * (1 - LIMIT):
            better.append(f"{name}: {was:.2f} -> {now:.2f} instructions, {now / was - 1:+.1%}")
    worse += [f"{name}: {was:.2f} instructions are kept, and it was not counted" for name, was in before.items()
              if name not in after]
    return worse, better


def judge(kept: Counts | None, others: Sequence[Counts], counts: Counts) -> tuple[list[str], int]:
    """What is to be said, and the exit status. kept: with what it is compared. others: of other environments."""
    if kept is None:
        said = [f"nothing is kept that these counts could be compared with: {RECORD.relative_to(ROOT)} has none of "
                f"{counts.environment.compiler}, libc {counts.environment.libc}, {counts.environment.machine}"]
        said += [f"  unlike the record of {each.environment.compiler}: "
                 f"{'; '.join(each.environment.differs(counts.environment))}" for each in others]
        return [*said, "counts of another compiler, libc or CPU say nothing about these sources. Compare with a commit, "
                "built here: make check-cost ARGS='--against HEAD'; keep these, too, once they are right: " + ACCEPT], 2
    worse, better = compare(kept.rows, counts.rows)
    said = [f"MORE: {line}" for line in worse] + [f"less: {line}" for line in better]
    if worse:
        said.append(f"{len(worse)} of {len(counts.rows)} rows fail (more than {LIMIT:.0%}); if that is to be so: {ACCEPT}")
    elif better:
        said.append(f"{len(better)} of {len(counts.rows)} rows take less than is kept, so that as much could come back "
                    f"unseen; keep it: {ACCEPT}")
    else:
        said.append(f"{len(counts.rows)} rows, none differs by more than {LIMIT:.0%}")
    return said, 1 if worse else 0


# ------------------------------------------------------------------ counting

class Programs(Builder):
    """The programs of bench/cost over a tree's C, compiled as setup.py has the extensions compiled. tree: its root."""

    def __init__(self, place: Path, tree: Path = ROOT) -> None:
        setup = ast.parse((tree / "setup.py").read_text())
        flags = next(ast.literal_eval(node.value) for node in setup.body if isinstance(node, ast.Assign)
                     and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "CFLAGS")
        pkg_config = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
        if pkg_config is None or subprocess.run([pkg_config, "--exists", "liburing"], check=False).returncode != 0:
            flags.append("-DMUENFAST_NO_URING")
        # As distutils does: Python's own, those of the environment, setup.py's.
        before = [*shlex.split(sysconfig.get_config_var("CFLAGS") or ""), *shlex.split(os.environ.get("CFLAGS", "")),
                  *shlex.split(sysconfig.get_config_var("CCSHARED") or "")]
        super().__init__(place, tree / "src/muenfast",
                         command=shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc"),
                         flags=(*before, *flags))

    def _compile(self, target: Path, source: Path, *more: str) -> Path:
        # Without what is for debuggers, which decides nothing, and which valgrind does not know of every compiler.
        run(*self.command, *self.flags, "-g0", "-D_GNU_SOURCE", "-w", "-Werror=implicit-function-declaration",
            f"-I{self.place}", f"-I{SOURCES}", f"-I{self.cores.package}", *python_includes(), *more, "-c", "-o", target,
            source)
        return target

    def _unit(self, core: str) -> Path:
        target = self.place / f"unit{core}.o"
        if target.exists():
            return target
        return self._compile(target, SOURCES / "unit.c", "-include", str(self._names(core)),
                             f"-DUNIT_FUNCTION={core.removeprefix('_')}_function")

    def program(self, name: str) -> Path:
        """Raises AssertionError with the compiler's words."""
        core, units = PROGRAMS[name]
        program = self.place / name
        objects = [self._compile(self.place / f"{name}.o", SOURCES / f"{name}.c", "-include", str(self._names(core))),
                   self._compile(self.place / "cost.o", SOURCES / "cost.c"), *map(self._unit, units)]
        # What needs Python is not reached from main(): its names are there, with nothing behind them.
        names = sorted(set(re.findall(r" U (_?Py\w+|_*io_uring_\w+)$", run("nm", *objects), re.MULTILINE)))
        (absent := self.place / f"{name}.absent.c").write_text("".join(f"char {symbol}[8];\n" for symbol in names))
        run(*self.command, "-w", "-o", program, *objects, absent, "-pthread")
        return program

    def version(self) -> str:
        return run(*self.command, "--version").splitlines()[0]


def run_program(program: Path) -> tuple[str, str]:
    """What it said, and callgrind's file. Raises SystemExit."""
    file = program.with_suffix(".callgrind")
    file.unlink(missing_ok=True)
    # Nothing of the caller's environment: the stack begins below it.
    done = subprocess.run(["valgrind", "--tool=callgrind", "--quiet", "--collect-atstart=no", "--combine-dumps=yes",
                           "--dump-line=no", f"--callgrind-out-file={file.name}", f"./{program.name}"],
                          cwd=program.parent, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"cost.py: {program.name}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout, file.read_text()


def counted(programs: Programs, names: Sequence[str], *, twice: bool = False) -> Counts:
    """Builds and runs programs. twice: and sees to it that they come to the same. Raises SystemExit, AssertionError."""
    rows: dict[str, float] = {}
    environment: Environment | None = None
    for name in names:
        program = programs.program(name)
        said, text = run_program(program)
        words = parse_words(said)
        found = parse_dumps(text, int(words["elements"]))
        if twice and (again := parse_dumps(run_program(program)[1], int(words["elements"]))) != found:
            unlike = [f"{row}: {value}, {again.get(row)}" for row, value in found.items() if again.get(row) != value]
            raise SystemExit(f"cost.py: two runs of {name} differ: {'; '.join(unlike)}")
        rows |= found
        environment = Environment(platform.machine(), programs.version(), code_flags(programs.flags), words["libc"],
                                  words["cpu"])
    assert environment is not None
    cython = run(sys.executable, "-m", "cython", "--version").split()[-1]
    return Counts(environment, rows, {"cython": cython, "valgrind": run("valgrind", "--version").strip()})


def unpacked(commit: str, place: Path) -> Path:
    """A commit's tree, there. Raises SystemExit."""
    done = subprocess.run(["git", "archive", commit, "src", "setup.py"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"cost.py: --against {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(place)
    return place


def main() -> int:
    parser = argparse.ArgumentParser(prog="cost.py", description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep what was counted, in {RECORD.relative_to(ROOT)}")
    parser.add_argument("--against", metavar="COMMIT", help="compare with that commit, built here, instead of the record")
    parser.add_argument("--json", metavar="FILE", help="what was counted, for another program")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    arguments = parser.parse_args()
    if arguments.write and (arguments.rows or arguments.against):
        parser.error("--write keeps all rows, and of this tree: without ROW and --against")
    if shutil.which("valgrind") is None:
        print("cost.py: there is no valgrind (Debian: valgrind)", file=sys.stderr)
        return 2
    names = [name for name in every_row() if not arguments.rows or any(row in name for row in arguments.rows)]
    if not names:
        parser.error(f"no row has any of {', '.join(arguments.rows)} in its name")
    needed = sorted({program_of(name) for name in names}, key=list(PROGRAMS).index)

    def some(counts: Counts) -> Counts:
        return Counts(counts.environment, {name: counts.rows[name] for name in names if name in counts.rows}, counts.tools)

    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    counts = some(counted(Programs(PLACE), needed, twice=arguments.write))
    records = read_record()
    if arguments.against is not None:
        with tempfile.TemporaryDirectory(prefix="muenfast-cost-") as name:
            tree = unpacked(arguments.against, Path(name, "tree"))
            (place := Path(name, "build")).mkdir()
            kept: Counts | None = some(counted(Programs(place, tree), needed))
    else:
        kept = kept_of(records, counts.environment)
        kept = kept and some(kept)
    for row, value in counts.rows.items():
        was = kept.rows.get(row) if kept is not None else None
        print(f"{row:<45} {value:10.2f}" + ("" if was is None else f"  {was:10.2f}  {value / was - 1:+7.2%}"))
    if arguments.json is not None:
        Path(arguments.json).write_text(format_record([counts] if kept is None else [kept, counts]))
    if arguments.write:
        if missing := [name for name in names if name not in counts.rows]:
            raise SystemExit(f"cost.py: not counted: {', '.join(missing)}")
        RECORD.write_text(format_record(replaced(records, counts)))
        print(f"{RECORD.relative_to(ROOT)}: {len(counts.rows)} rows of {counts.environment.compiler}, two runs alike")
        return 0
    said, status = judge(kept, [each for each in records if each is not kept], counts)
    print("\n".join(said), file=sys.stderr if status else sys.stdout)
    return status


def program_of(row: str) -> str:
    """The program that counts a row."""
    if row.startswith("block"):
        _, kind, *_, side = row.partition(", batch")[0].replace(",", "").split()
        return side if kind == "inline" else f"buf{side}"
    return "net" if row.startswith("packet") else "ring"


if __name__ == "__main__":
    sys.exit(main())
