"""How blocks are copied between cores (_copy.h, docs/decisions/012): in plain C, with a clock of its own (copies.c)."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from helpers import compiled


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    return compiled("copies", tmp_path_factory.mktemp("copies"), "-O2", "-g", "-fsanitize=address,undefined")


def test_bytes(copies: Path) -> None:
    """Every byte arrives, and none beside it, whatever the length and wherever both ends lie."""
    run = subprocess.run([copies, "bytes"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def avx2() -> bool:
    return platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize(("costs", "past"), [
    pytest.param([(40, 40)], [False], id="one cache"),
    pytest.param([(90, 70)], [False], id="one cache, from memory"),
    pytest.param([(70, 15)], [False], id="one cache, one at a time"),
    pytest.param([(250, 40)], [True], id="apart"),
    pytest.param([(224, 119)], [True], id="apart, from memory"),
    pytest.param([(370, 100)], [True], id="apart, long"),
    pytest.param([(300, 290)], [False], id="slow either way"),
    pytest.param([(40, 40), (250, 40), (40, 40), (250, 60)], [False, True, False, True], id="moved about"),
    pytest.param([(90, 80), (224, 70), (90, 80)], [False, True, False], id="moved about, from memory"),
])
def test_choice(copies: Path, costs: list[tuple[int, int]], past: list[bool]) -> None:
    """Costs in picoseconds for a byte, as measured on one host: plainly, past the caches. All but a few blocks go the way
    that is right for them, soon after it has become right."""
    if not avx2():
        pytest.skip("there is one way only: needs x86-64 with AVX2")
    run = subprocess.run([copies, "choice", *(str(cost) for pair in costs for cost in pair)], capture_output=True,
                         text=True, check=True)
    counts = [int(line) for line in run.stdout.split()]
    assert [count > 9900 for count in counts] == past
    assert all(count > 9900 or count < 50 for count in counts)


def test_one_interruption_is_no_news(copies: Path) -> None:
    """A thread that loses its CPU in the middle of a block now and then keeps its way."""
    run = subprocess.run([copies, "noisy", "40", "40"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 50
