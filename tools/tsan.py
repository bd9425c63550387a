"""usage: tools/tsan.py [SECONDS [SEED]]

Builds tests/c/ring_tsan.c, with the C that Cython makes of _ring.pyx, under -fsanitize=thread and runs it, SECONDS
(2) for each of its scenarios. Exit status 1 where ThreadSanitizer or the harness has something to report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cores import Cores, python_includes  # noqa: E402

PLACE = ROOT / "build" / "thread"


def run(*command: str, **more: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | more, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")


def build() -> Path:
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    # "--name" keeps setup.py from building: what it does is Cython's part.
    run(sys.executable, "setup.py", "--quiet", "--name", MUENFAST_SANITIZE="", MUENFAST_COVERAGE="")
    (PLACE / "constants.h").write_text(
        "/* What the module's initialisation stores in the globals of _ring.pyx; to be used behind its C. */\n"
        f"#define core_constants() do {{ {Cores(PLACE).constants('_ring')} }} while (0)\n")
    program = PLACE / "ring_tsan"
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc").split()
    # What needs Python is not reached from main(), and leaves with its section. The hidden rest stays unresolved.
    run(*compiler, "-std=gnu11", "-O2", "-g", "-fsanitize=thread", "-ffunction-sections", "-fdata-sections", "-w",
        f"-I{PLACE}", "-Isrc/muenfast", "-Ibuild/cython/src/muenfast", *python_includes(),
        "-o", str(program), "tests/c/ring_tsan.c", "-pthread",
        "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all")
    return program


def main() -> int:
    program = str(build())
    words = sys.argv[1:] or ["2"]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=0:exitcode=66:second_deadlock_stack=1"}
    # Older runtimes give up where the addresses are randomised by more bits than they know.
    plain = subprocess.run([program, "0"], env=environment, capture_output=True, text=True, check=False)
    prefix = ["setarch", "-R"] if "unexpected memory mapping" in plain.stderr else []
    status = subprocess.run([*prefix, program, *words], env=environment, check=False).returncode
    print(f"thread: exit status {status}" + (" (66: ThreadSanitizer reports)" if status == 66 else ""))
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
