"""A hostile peer against block server and block client, in short: tools/hostile.py does it for minutes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "hostile.py"


@pytest.mark.stress
@pytest.mark.parametrize(("role", "options"), [
    ("server", ["--seed", "4"]), ("client", ["--seed", "4"]),
    pytest.param("server", ["--seed", "4", "--shm"], id="server-buffer"),
    pytest.param("server", ["--seed", "5", "--shm"], id="server-buffer-file"),     # odd seeds: one disk is a file
    pytest.param("client", ["--seed", "4", "--shm"], id="client-buffer")])
def test_service_is_back_after_every_kind_of_attack(role: str, options: list[str]) -> None:
    """Each attack once: nothing ends or stands still, what is honest is executed, kept and counted, no memory leaks."""
    run = subprocess.run([sys.executable, str(PROGRAM), "--role", role, "--minutes", "0.05", "--phase", "0.3",
                          "--within", "20", *options], capture_output=True, text=True, timeout=170, check=False)
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    table = re.findall(rf"^{role}: (\w+) +(\d+) +([\d.]+) +([\d.]+)s", run.stdout, re.MULTILINE)
    assert {mode for mode, *_ in table} == {"header", "counters", "epochs", "elements", "bell", "ring", "flood", "truncate",
                                            "stop", "everything", *(["buffer"] if "--shm" in options else [])}
    assert all(int(phases) > 0 and float(hostile) > 0 for _, phases, hostile, _ in table)
