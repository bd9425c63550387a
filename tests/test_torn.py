"""Torn reads: 10^9 bytes delivered by a reader that is overrun all the time, each element checked to its last byte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "torn.py"
BYTES = 10**9


@pytest.mark.stress
def test_no_torn_element_among_a_thousand_million_bytes() -> None:
    """Each element is whole and in its place, lost ones are counted; the same copies without a check are torn."""
    run = subprocess.run([sys.executable, str(PROGRAM), "--bytes", str(BYTES)], capture_output=True, text=True,
                         timeout=170, check=False)
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    table = [list(map(int, row)) for row in re.findall(r"^ *(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) ", run.stdout,
                                                       re.MULTILINE)]
    assert {row[0] for row in table} == {64, 1522, 4120}
    assert sum(size * delivered for size, _, delivered, *_ in table) >= BYTES
    assert all(lost > 0 and overruns > 0 and control > 0 for *_, lost, overruns, control in table)
