"""Compile every .pyx to C with setup.py's own directives; exit 1 where Cython hints or warns.

Cython tells of a nogil call that re-takes the GIL in a "performance hint" on stderr only: not by
its exit status, not in the annotated HTML. C is generated from scratch, in a copy of the tree.
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


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="muenfast-hints-") as scratch:
        tree = Path(scratch)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        shutil.copytree(ROOT / "src", tree / "src",
                        ignore=shutil.ignore_patterns("*.c", "*.so", "*.egg-info", "__pycache__"))
        # A pkg-config that knows every package: _fuse.pyx is compiled to C without libfuse3, too.
        run = subprocess.run([sys.executable, "setup.py", "--quiet", "--name"], cwd=tree,
                             env=os.environ | {"PKG_CONFIG": "true"},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        modules = {path.relative_to(tree).with_suffix("") for path in tree.glob("src/**/*.pyx")}
        made = {path.relative_to(tree / "build/cython").with_suffix("") for path in tree.glob("build/cython/**/*.c")}
    if run.returncode or COMPLAINT.search(run.stdout):
        print(run.stdout)
        return 1
    if not modules or made != modules:
        print(f"not compiled by setup.py: {sorted(map(str, modules - made)) or 'there is no .pyx'}\n{run.stdout}")
        return 1
    print(f"{len(modules)} Cython modules: no performance hint, no warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
