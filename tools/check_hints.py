"""Compile every .pyx to C with setup.py's own directives; exit 1 where Cython hints or warns, or where a core
function touches Python.

Cython tells of a nogil call that re-takes the GIL in a "performance hint" on stderr only: not by
its exit status, not in the annotated HTML. That HTML tells which lines make use of Python's C API
(a score above 0), and names them by line: in a nogil function there must be none.
C is generated from scratch, in a copy of the tree; or in the tree that is named, and stays in its build/cython.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPLAINT = re.compile(r"performance hint|warning", re.IGNORECASE)
# setup.py, with `cython --annotate` for everything it compiles; "--name" keeps it from building.
ANNOTATED = """
import runpy, sys
import Cython.Compiler.Options
Cython.Compiler.Options.annotate = True
sys.argv = ["setup.py", "--quiet", "--name"]
runpy.run_path("setup.py", run_name="__main__")
"""
SCORE = re.compile(r'<pre class="cython line score-(\d+)"[^>]*>(?:\+|&#xA0;| )<span class="">0*(\d+)</span>')
# Functions that may be called without the GIL, methods too: from `cdef` to the colon that ends the signature.
CORE = re.compile(r"^([ \t]*)cdef [^=\n#]*?(\w+)\([^)]*\)[^:\n]*\bnogil[ \t]*:[ \t]*(?:#.*)?$", re.MULTILINE)


def bodies(source: str) -> dict[str, range]:
    """The lines (from 1) of each nogil function, its signature's included."""
    lines = source.splitlines()
    found = {}
    for match in CORE.finditer(source):
        first = source.count("\n", 0, match.start()) + 1
        last = source.count("\n", 0, match.end()) + 1
        indent = len(match[1].expandtabs())
        end = last
        for number in range(last, len(lines)):
            line = lines[number]
            if line.strip() and not line.lstrip().startswith("#"):
                if len(line) - len(line.lstrip()) <= indent:
                    break
                end = number + 1
        found[match[2]] = range(first, end + 1)
    return found


def touching(name: str, source: str, html: str) -> tuple[int, list[str]]:
    """How many nogil functions a module has, and a complaint for each of their lines whose score is not 0."""
    scores = {int(line): int(score) for score, line in SCORE.findall(html)}
    lines = source.splitlines()
    if set(scores) != set(range(1, len(lines) + 1)):
        return 0, [f"{name}: Cython's annotation has changed its form: {len(scores)} of {len(lines)} lines found"]
    functions = bodies(source)
    missed = set(re.findall(r"^cdef [^=\n#]*?\b((?:writer|reader|server|client)_\w+)\(", source, re.MULTILINE))
    complaints = [f"{name}: {function}: a core function that is not nogil" for function in sorted(missed - set(functions))]
    complaints += [f"{name}:{line}: {function}: score {scores[line]}: {lines[line - 1].strip()}"
                   for function, body in functions.items() for line in body if scores[line]]
    return len(functions), complaints


def check(tree: Path) -> int:
    """Compiles what is in a tree that was not built yet, and says what is wrong with it; the exit status."""
    # A pkg-config that knows every package: _fuse.pyx is compiled to C without libfuse3, too.
    # The switches of other builds put lines of their own into the C.
    run = subprocess.run([sys.executable, "-c", ANNOTATED], cwd=tree,
                         env=os.environ | {"PKG_CONFIG": "true", "MUENFAST_COVERAGE": "", "MUENFAST_SANITIZE": ""},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    modules = {path.relative_to(tree).with_suffix("") for path in tree.glob("src/**/*.pyx")}
    made = {path.relative_to(tree / "build/cython").with_suffix("") for path in tree.glob("build/cython/**/*.c")}
    if run.returncode or COMPLAINT.search(run.stdout):
        print(run.stdout)
        return 1
    if not modules or made != modules:
        print(f"not compiled by setup.py: {sorted(map(str, modules - made)) or 'there is no .pyx'}\n{run.stdout}")
        return 1
    functions, complaints = 0, []
    for module in sorted(modules):
        html = (tree / "build/cython" / module).with_suffix(".html")
        count, more = touching(f"{module}.pyx", (tree / f"{module}.pyx").read_text(), html.read_text())
        functions += count
        complaints += more
    if complaints or not functions:
        print("\n".join(complaints) or "no nogil function found")
        return 1
    print(f"{len(modules)} Cython modules: no performance hint, no warning; {functions} nogil functions: all scores 0")
    return 0


def main() -> int:
    if len(sys.argv) > 1:
        return check(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="muenfast-hints-") as scratch:
        tree = Path(scratch)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        shutil.copytree(ROOT / "src", tree / "src",
                        ignore=shutil.ignore_patterns("*.c", "*.so", "*.egg-info", "__pycache__"))
        return check(tree)


if __name__ == "__main__":
    sys.exit(main())
