"""The arrows between the rooms of muenfast point down, and importing the package opens nothing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"

# Bottom up: a room (a module, or a package with what is in it) and what it may import. A lazy import
# and one under TYPE_CHECKING are arrows, too. A new room has to be placed here, below what it imports.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "params": {"errors"},
    "partition": {"errors"},
    "stores": {"errors", "params"},
    "threads": set(),
    "netns": {"threads"},
    "marks": {"errors", "params"},
    "bpf": {"errors", "netns"},
    "counts": set(),
    "cpus": {"errors"},
    "_inodes": set(),
    "inodes": {"threads", "_inodes"},
    "shm": {"errors", "inodes"},
    "_guard": set(),
    "_wire": set(),
    "_thread": set(),
    "_blocksum": {"_wire"},
    "_marks": {"errors", "_wire"},
    "_system": set(),
    "_jobs": set(),
    "_packets": {"errors", "_wire"},
    "_ring": {"errors", "_wire", "_thread", "_guard"},
    "channel": {"errors", "shm", "_ring", "partition"},
    "_engine": {"errors", "_wire", "_thread", "_ring", "_blocksum"},
    "_aio": {"_wire", "_ring", "_jobs", "_engine"},
    "_store": {"errors", "_wire", "_ring", "_jobs", "_aio"},
    "_target": {"errors", "_wire", "_thread", "_system"},
    "_user": {"errors", "threads", "_wire", "_jobs", "_aio", "_store"},
    "_count": {"_wire"},
    "_blk": {"errors", "_wire", "_thread", "_guard", "_ring", "_store", "_engine", "_aio", "_count", "_blocksum"},
    "_buffer": {"errors", "_wire", "_ring", "_store", "_engine", "_aio", "_count", "_blocksum"},
    "_client": {"errors", "_wire", "_thread", "_guard", "_ring", "_engine", "_target", "_count", "_blocksum"},
    "_bufclient": {"errors", "_wire", "_thread", "_ring", "_engine", "_target", "_client", "_count", "_blocksum"},
    "backing": {"errors", "params", "partition", "shm", "threads", "_ring", "_store", "_user"},
    "attach._fuse": {"errors", "_wire", "_thread", "_system", "_target"},
    "attach._nbd": {"errors", "_wire", "_thread", "_system", "_target"},
    "attach": {"errors", "params", "partition", "shm", "threads", "_target", "attach._fuse", "attach._nbd"},
    "_net": {"errors", "_wire", "_thread", "_system", "_ring", "_marks", "_packets", "_blocksum", "_engine"},
    "tuntap": {"errors", "threads", "netns"},
    "pathmtu": {"errors", "params", "shm"},
    "control": {"errors", "shm", "threads"},
    "names": {"errors", "params", "marks", "netns", "control"},
    "ports": {"errors", "threads", "netns", "marks", "bpf", "control", "names", "_marks", "_net", "tuntap"},
    "connection": {"errors", "params", "shm", "_ring", "_engine", "channel"},
    "modules": {"errors", "params", "shm", "connection"},
    "lookout": {"shm", "threads", "_inodes", "_ring"},
    "export": {"errors", "params", "shm", "_ring", "channel", "_store", "_blk", "_buffer", "backing", "connection",
               "threads", "lookout", "cpus"},
    "disk": {"cpus", "errors", "params", "shm", "_ring", "channel", "_client", "_bufclient", "connection", "lookout"},
    "aio": {"errors", "_target", "_client", "_bufclient", "connection", "disk"},
    "blk": {"errors", "params", "shm", "_ring", "channel", "_store", "_blk", "_buffer", "backing", "attach._fuse",
            "attach", "control", "connection", "export", "disk", "threads", "lookout",
            "cpus"},
    "net": {"errors", "params", "shm", "threads", "netns", "marks", "bpf", "_ring", "channel", "_marks", "_net", "tuntap",
            "pathmtu", "control", "ports", "connection", "lookout", "cpus"},
    "policy": {"errors", "params", "marks", "shm", "_net", "_ring", "channel", "pathmtu", "backing", "connection",
               "export"},
    "enforcement": {"errors", "shm", "_ring", "backing", "policy"},
    "flowgraph": {"policy"},
    "privileges": set(),
    "sandbox": {"errors"},
    "serving": {"errors", "params", "shm", "_ring", "backing", "control", "connection", "export", "blk", "threads",
                "lookout"},
    "declared": {"errors", "shm", "backing", "connection", "export", "net", "serving", "policy", "enforcement",
                 "sandbox"},
    "broker": {"errors", "threads", "shm", "netns", "bpf", "attach._fuse", "attach", "tuntap", "ports", "net",
               "privileges"},
    "__init__": {"errors", "params", "shm", "_ring", "channel", "_store", "_blk", "_buffer", "backing", "connection",
                 "export", "disk", "aio", "blk", "net"},
    "_bench": {"errors", "_wire", "_ring"},
    "_netbench": {"errors", "_wire"},
    "benchreport": {"errors"},
    "measure": {"__init__", "errors", "threads", "shm", "_bench", "_target", "attach", "blk"},
    "ringpeers": {"__init__", "errors", "_bench", "measure"},
    "netmeasure": {"errors", "threads", "netns", "_bench", "_netbench", "measure"},
    "startmeasure": {"errors", "threads", "netns", "disk", "measure"},
    "wakemeasure": {"errors", "control", "disk", "_bench", "measure", "startmeasure"},
    "peermeasure": {"errors", "shm", "_bench", "_target", "attach", "blk", "measure"},
    "doctor": {"__init__", "errors", "params", "shm", "_ring", "_store", "_blk", "_buffer", "backing", "attach._fuse",
               "attach._nbd", "attach", "control", "bpf"},
    "cli": {"__init__", "cpus", "errors", "params", "shm", "_ring", "channel", "_store", "_blk", "_buffer", "backing",
            "attach._fuse", "attach._nbd", "attach", "control", "connection", "modules", "export", "disk", "blk",
            "serving", "_bench", "measure", "ringpeers", "netmeasure", "benchreport",
            "startmeasure", "wakemeasure", "peermeasure", "doctor", "counts", "threads", "marks", "names",
            "pathmtu", "net", "ports", "policy", "enforcement", "flowgraph", "privileges", "sandbox", "declared",
            "broker"},
    "__main__": {"cli"},
}


def room_of(module: str) -> str | None:
    """The room a module ("attach.nbd", "" for the package itself) is in, or None."""
    module = module or "__init__"
    while module and module not in ALLOWED:
        module = module.rpartition(".")[0]
    return module or None


def arrows(source: str, module: str, package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) for every import of muenfast's own: "blk" for muenfast.blk, "" for muenfast itself.

    known: the package's modules, to tell a module from a name in `from x import y`.
    """
    here = ["muenfast", *module.split(".")] if module else ["muenfast"]
    here = here if package else here[:-1]
    for node in ast.walk(ast.parse(source)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            targets = [name if name.removeprefix("muenfast.") in known else origin
                       for name in (f"{origin}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            match node.args:
                case [ast.Constant(str(name)), *_]:
                    dots = len(name) - len(name.lstrip("."))
                    targets = [".".join([*here[:len(here) - dots + 1], name[dots:]]) if dots else name]
        for target in dict.fromkeys(targets):
            if target == "muenfast" or target.startswith("muenfast."):
                yield node.lineno, target[len("muenfast."):]


def imports_of_cython(source: str) -> str:
    """Python source that has the imports and cimports of a .pyx or .pxd, at their lines, and nothing else."""
    def blank(match: re.Match[str]) -> str:
        return ("" if match[0].startswith("#") else '""') + "\n" * match[0].count("\n")

    # Strings and comments first: they may read like imports.
    source = re.sub(r'"""(?s:.*?)"""|\'\'\'(?s:.*?)\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*',
                    blank, source)
    lines = []
    statement = re.compile(r"(?:^|[;:])[ \t]*((?:from[ \t]+[\w.]+[ \t]+c?import|c?import)\b"
                           r"[ \t]*(?:\([^)]*\)|(?:\\\n|[^;\n])*))", re.MULTILINE)
    end = 0
    for match in statement.finditer(source):
        lines.append("\n" * source.count("\n", end, match.start(1)))
        lines.append(re.sub(r"\bcimport\b", "import", match[1]) + ";")     # another may follow on the line
        end = match.end(1)
    return "".join(lines)


def broken(source: str, name: str, known: set[str]) -> list[str]:
    """The arrows of a file (name: its path below src/muenfast) that the table does not allow."""
    path = Path(name)
    package = path.stem == "__init__"
    module = ".".join(path.parent.parts if package else (*path.parent.parts, path.stem))
    room = room_of(module)
    if room is None:
        return [f"{name}: not placed: give it a row in ALLOWED"]
    if path.suffix in (".pyx", ".pxd"):
        source = imports_of_cython(source)
    return [f"{name}:{line}: {room} imports {target or 'the package itself'}"
            for line, target in arrows(source, module, package, known)
            if room_of(target) not in (room, *ALLOWED[room])]


def sources() -> dict[str, str]:
    top = SRC / "muenfast"
    return {path.relative_to(top).as_posix(): path.read_text()
            for suffix in ("py", "pyx", "pxd") for path in sorted(top.glob(f"**/*.{suffix}"))}


def modules(names: dict[str, str]) -> set[str]:
    return {name.rpartition(".")[0].replace("/", ".").removesuffix(".__init__") for name in names}


def test_every_arrow_points_down() -> None:
    files = sources()
    assert files
    assert [line for name, source in files.items() for line in broken(source, name, modules(files))] == []


def test_the_table_has_no_circle() -> None:
    above: set[str] = set()
    for room, below in ALLOWED.items():
        assert below <= above, f"{room} imports from a row that does not stand above its own"
        above.add(room)


KNOWN = {*ALLOWED, "policy", "attach.nbd", "backing.ram", "cli.blk"}


@pytest.mark.parametrize(("name", "source"), [
    ("shm.py", "import muenfast.channel"),
    ("shm.py", "from muenfast import channel"),
    ("shm.py", "from . import errors, channel"),
    ("shm.py", "from .params import split"),
    ("shm.py", "def f():\n    from muenfast.blk import Export"),
    ("shm.py", "import importlib\nimportlib.import_module('muenfast.blk')"),
    ("shm.py", "from importlib import import_module\nimport_module('.blk', __package__)"),
    ("shm.py", "import muenfast"),
    ("shm.py", "from muenfast import Writer"),
    ("errors.py", "from . import params"),
    ("blk.py", "import muenfast.net"),
    ("blk.py", "from muenfast import net"),
    ("blk.py", "from .cli import main"),
    ("politics.py", ""),
    ("attach/nbd.py", "from ..blk import Client"),
    ("attach/nbd.py", "from muenfast import _blk"),
    ("attach/__init__.py", "from .. import control"),
    ("backing/ram.py", "from ..attach import nbd"),
    ("backing/__init__.py", "from ..channel import End"),
    ("_ring.pyx", "from muenfast._blk cimport io_t"),
    ("_ring.pyx", "cimport muenfast._blk"),
    ("_ring.pyx", "cimport cython, muenfast._blk as b"),
    ("_ring.pyx", "from muenfast cimport _blk"),
    ("_ring.pyx", "from . cimport _blk"),
    ("_ring.pyx", "from ._blk cimport (io_t,\n    Target)"),
    ("_ring.pyx", "from ._blk cimport io_t, \\\n    Target"),
    ("_ring.pyx", "cdef int f(char *p) except? -1:\n    import muenfast.channel"),
    ("_ring.pyx", "x = 'import'; import muenfast.channel"),
    ("_wire.pxd", "from muenfast._ring cimport ring_t"),
    ("_new.pyx", ""),
    ("attach/_fuse.pyx", "from .nbd cimport f"),
    ("attach/_fuse.pyx", "from .._ring cimport ring_t"),
])
def test_a_planted_arrow_is_caught(name: str, source: str) -> None:
    [line] = broken(source, name, KNOWN)
    assert line.startswith(name)


@pytest.mark.parametrize(("name", "source"), [
    ("shm.py", "import os, mmap\nfrom muenfast.errors import UsageError\nfrom . import errors"),
    ("shm.py", "import muenfastest\nfrom blk import x"),
    ("channel.py", "from ._ring import Writer\nimport muenfast.shm"),
    ("attach/__init__.py", "from . import nbd\ndef f():\n    from ._fuse import Mount"),
    ("attach/nbd.py", "from . import Front\nfrom ..params import split"),
    ("attach/_fuse.pyx", "from .._target cimport Target, io_t\nfrom muenfast.errors import UsageError"),
    ("blk.py", "from muenfast import attach, backing, control\nfrom .attach import _fuse"),
    ("cli/blk.py", "from . import common\nfrom .. import __version__\nfrom muenfast.blk import serve"),
    ("__main__.py", "from muenfast.cli import main"),
    ("__init__.py", "from .errors import UsageError\ndef __getattr__(name):\n    from . import blk"),
    ("_ring.pyx", '"""\nimport muenfast.blk\n"""\n# import muenfast.blk\nx = "\\"import muenfast.blk"\n'
                  'cdef extern from "muenfast.h":\n    """\n    from muenfast cimport blk\n    """\n    int important\n'),
    ("_ring.pyx", "from libc.stdint cimport uint64_t\nfrom muenfast._wire cimport header_t\ncimport cython\n"
                  "def f(x: int): import os; import sys"),
])
def test_a_permitted_arrow_passes(name: str, source: str) -> None:
    assert broken(source, name, KNOWN) == []


def test_a_caught_cimport_is_reported_with_its_line() -> None:
    source = '"""Two\nlines."""\n\nfrom libc cimport stdint\nx = 1\n\nfrom muenfast._blk cimport io_t\n'
    assert broken(source, "_ring.pyx", KNOWN) == ["_ring.pyx:7: _ring imports _blk"]


def test_importing_the_package_opens_nothing_and_loads_no_extension(tmp_path: Path) -> None:
    script = """if True:
        import json, os, sys, threading
        def state():
            return [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{fd}")]
        before, modules = state(), set(sys.modules)
        import muenfast
        compiled = [name for name in set(sys.modules) - modules
                    if (getattr(sys.modules[name], "__file__", None) or "").endswith(".so")]
        print(json.dumps([before, state(), compiled, threading.active_count()]))
    """
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after, compiled, threads = json.loads(run.stdout)
    assert after == before
    assert not [name for name in compiled if "muenfast" in name or "posix_ipc" in name]
    assert threads == 1


@pytest.mark.parametrize("command", [["-m", "muenfast"], [f"{sysconfig.get_path('scripts')}/muenfast"]],
                         ids=["python -m muenfast", "muenfast"])
def test_help_loads_no_extension(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-X", "importtime", *command, "--help"], cwd=tmp_path,
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "muenfast" in run.stdout
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded, "importtime's format has changed"
    assert not loaded & {"pyroute2", "muenfast._ring", "muenfast._blk", "muenfast._net",
                         "muenfast.attach._fuse", "muenfast.attach._nbd"}
