"""usage: tools/sanitize.py address|undefined [pytest's options and tests]

Builds the extensions with that sanitizer into build/SANITIZER (what is there and newer than its sources is taken as it is),
which is where the tests then find muenfast (the installed package is not touched), and runs the tests that exercise the
cores. Exit status 1 where a test fails or a sanitizer, in whatever process, has something to report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = {"address": "libasan.so", "undefined": "libubsan.so"}
# What exercises a compiled core; tests/test_tools.py holds that each file of tests stands here or below.
NAMES = (
    "wire", "ring", "ring_hostile", "ring_model", "ring_stress", "ringers", "quarantine", "threads", "buffers", "marks",
    "lookout",
    "blk_server", "blk_client", "blk_group", "blk_life", "blk_shm", "aio", "blk_buffer", "buffer_client", "apart",
    "checksums", "checksums_buffer", "checksums_net", "files", "slow_disks", "user", "stores", "faults", "nbd", "attach",
    "pump", "fuse_uring", "fuse_session", "refusals",
    "buffer_device", "packets", "packets_kernel", "net_frames", "net_offload", "net_marks")
LEFT_OUT = {
    "nothing compiled, or nothing that the others do not do": (
        "benchreport", "cli", "cost", "cpus", "ctl", "ctl_device", "doctor", "guest", "imports", "messages", "model",
        "modprobe", "modules", "net_lists", "netcfg", "packaging", "params", "partition", "partitioned", "peer", "policy",
        "recovery", "security", "shm", "stat", "tools", "units"),
    "C of their own, built without": ("attack", "copies", "memory_model", "smart"),
    "counts, times, memory or system calls of a process as it is": (
        "bench", "broker", "broker_states", "crash", "device", "durable", "hostile", "netbench", "oneway", "ringpeers",
        "sandbox", "scaling", "soak", "stops", "torn"),
    "namespaces, tools and the kernel's programs; the engines are those of net_offload": ("bpf", "net"),
}
TESTS = [f"tests/test_{name}.py" for name in NAMES]
# Programs that are not ours: the address sanitizer, which each of them inherits, does not know qemu's coroutines, and finds
# fault with how dd asks for memory.
FOREIGN = [f"--deselect=tests/test_{test}" for test in (
    "nbd.py::test_nbdcopy_and_qemu_img", "nbd.py::test_qemu_io", "buffer_device.py::test_sectors_of_512_bytes")]
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


def current(base: Path) -> bool:
    """Whether what is there was built, to its end, from the sources as they are now."""
    stamp = base / "built"
    sources = [ROOT / "setup.py",
               *(path for kind in ("*.pyx", "*.pxd", "*.h", "*.py") for path in (ROOT / "src").rglob(kind))]
    return stamp.is_file() and stamp.read_text() == " ".join(compiler()) and all(
        path.stat().st_mtime < stamp.stat().st_mtime for path in sources)


def build(sanitizer: str) -> Path:
    """The folder that holds the package."""
    base = ROOT / "build" / sanitizer
    if not current(base):
        print(f"building with -fsanitize={sanitizer}", flush=True)
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        began = time.time()
        run = subprocess.run([sys.executable, "setup.py", "build", "--build-base", str(base)], cwd=ROOT,
                             env=os.environ | {"MUENFAST_SANITIZE": sanitizer}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if run.returncode:
            sys.exit(run.stdout)
        for module in base.glob("lib.*/muenfast/**/_*.so"):
            if f"__{'asan' if sanitizer == 'address' else 'ubsan'}_".encode() not in module.read_bytes():
                sys.exit(f"{module}: not instrumented")
        (base / "built").write_text(" ".join(compiler()))
        os.utime(base / "built", (began, began))    # a source that changed meanwhile is newer
    [package] = base.glob("lib.*/muenfast")
    return package.parent


def main() -> int:
    sanitizer, *words = sys.argv[1:]
    library = runtime(sanitizer)
    place = build(sanitizer)
    reports = place.parent / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    environment = os.environ | {
        name: f"{value}:log_path={reports / name[:4].lower()}" for name, value in OPTIONS.items()} | {
        "LD_PRELOAD": library, "PYTHONPATH": str(place), "PYTHONMALLOC": "malloc", "PYTHONDONTWRITEBYTECODE": "1"}
    where = subprocess.run([sys.executable, "-c", "import muenfast._ring as r; print(r.__file__)"], cwd=ROOT,
                           env=environment, capture_output=True, text=True, check=False)
    if not where.stdout.startswith(str(place)):
        sys.exit(f"not the instrumented package: {where.stdout}{where.stderr}")
    tests = [] if any(word.startswith("tests/") for word in words) else TESTS
    with tempfile.TemporaryDirectory(prefix="mf") as scratch:   # short: sockets lie below
        status = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600",
                                 "--basetemp", scratch, *FOREIGN, *tests, *words], cwd=ROOT, env=environment,
                                check=False).returncode
    found = sorted(reports.iterdir())
    for report in found:
        print(f"\n{report.name}:\n{report.read_text(errors='replace')}")
    print(f"{sanitizer}: exit status of the tests {status}, {len(found)} sanitizer reports")
    return 1 if status or found else 0


if __name__ == "__main__":
    sys.exit(main())
