"""usage: tools/sanitize.py address|undefined [pytest's options and tests]

Builds the extensions with that sanitizer into build/SANITIZER, which is where the tests then find muenfast (the
installed package is not touched), and runs the tests of ring, block engines and packets. Exit status 1 where a test fails
or a sanitizer, in whatever process, has something to report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = {"address": "libasan.so", "undefined": "libubsan.so"}
TESTS = [f"tests/test_{name}.py" for name in (
    "wire", "ring", "ring_hostile", "ring_model", "blk_server", "blk_client", "blk_group", "blk_life", "aio",
    "blk_buffer", "buffer_client", "files", "user", "faults", "nbd", "attach", "pump", "packets",
    "packets_kernel")]
# The address sanitizer, which every program of a test inherits, does not know qemu's coroutines.
FOREIGN = [f"--deselect=tests/test_nbd.py::{name}" for name in ("test_nbdcopy_and_qemu_img", "test_qemu_io")]
OPTIONS = {
    # CPython keeps what it allocated once until it ends: no leak check. SIGBUS is _guard.h's, SIGSEGV that of the
    # tests' guard pages (a stray access still ends the process, and with it the run).
    "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:handle_segv=0:allow_user_segv_handler=1:"
                    "detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def compiler() -> list[str]:
    return (os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc").split()


def runtime(sanitizer: str) -> str:
    """The sanitizer's library, which has to be there before Python is: Python itself is not instrumented."""
    found = subprocess.run([*compiler(), f"-print-file-name={RUNTIME[sanitizer]}"], capture_output=True, text=True,
                           check=True).stdout.strip()
    path = Path(found).resolve()
    if not path.is_file() or path.read_bytes()[:4] != b"\x7fELF":
        sys.exit(f"{' '.join(compiler())} has no {RUNTIME[sanitizer]} to preload (Debian: a part of gcc)")
    return str(path)


def build(sanitizer: str) -> Path:
    """The folder that holds the package."""
    base = ROOT / "build" / sanitizer
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    run = subprocess.run([sys.executable, "setup.py", "build", "--build-base", str(base)], cwd=ROOT,
                         env=os.environ | {"MUENFAST_SANITIZE": sanitizer}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if run.returncode:
        sys.exit(run.stdout)
    [package] = base.glob("lib.*/muenfast")
    for module in package.rglob("_*.so"):
        if f"__{'asan' if sanitizer == 'address' else 'ubsan'}_".encode() not in module.read_bytes():
            sys.exit(f"{module}: not instrumented")
    return package.parent


def main() -> int:
    sanitizer, *words = sys.argv[1:]
    library = runtime(sanitizer)
    print(f"building with -fsanitize={sanitizer}", flush=True)
    place = build(sanitizer)
    reports = place.parent / "reports"
    reports.mkdir()
    environment = os.environ | {
        name: f"{value}:log_path={reports / name[:4].lower()}" for name, value in OPTIONS.items()} | {
        "LD_PRELOAD": library, "PYTHONPATH": str(place), "PYTHONMALLOC": "malloc", "PYTHONDONTWRITEBYTECODE": "1"}
    where = subprocess.run([sys.executable, "-c", "import muenfast._ring as r; print(r.__file__)"], cwd=ROOT,
                           env=environment, capture_output=True, text=True, check=False)
    if not where.stdout.startswith(str(place)):
        sys.exit(f"not the instrumented package: {where.stdout}{where.stderr}")
    tests = [] if any(word.startswith("tests/") for word in words) else TESTS
    status = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600",
                             *FOREIGN, *tests, *words], cwd=ROOT, env=environment, check=False).returncode
    found = sorted(reports.iterdir())
    for report in found:
        print(f"\n{report.name}:\n{report.read_text(errors='replace')}")
    print(f"{sanitizer}: exit status of the tests {status}, {len(found)} sanitizer reports")
    return 1 if status or found else 0


if __name__ == "__main__":
    sys.exit(main())
