"""docs/security.md says what is so: its tests exist, its figures are those of the sources."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import foreign  # noqa: E402  (a tool, no package)

DOCUMENT = (ROOT / "docs/security.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", DOCUMENT)
# What the rings of others got wrong before us.
MISTAKES = ["fetched twice", "is believed", "read back", "unbounded work", "wake-up storms", "stale data",
            "without an answer", "a slot leaks", "a fence is missing", "an error is lost", "file is truncated",
            "offsets wrap", "division", "bad checksum"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_has_tests(mistake: str) -> None:
    [row] = [line for line in DOCUMENT.splitlines() if line.startswith("|") and mistake in line.split("|")[1]]
    assert re.search(r"`test_\w+\.py::test_\w+`", row)


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_the_tests_are_there(file: str, test: str) -> None:
    assert re.search(rf"^ *(?:async )?def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_the_lines_are_counted() -> None:
    """The table is what the tool counts now."""
    written = DOCUMENT.partition(foreign.BEGIN)[2].partition(foreign.END)[0]
    assert written == foreign.table(), "run tools/foreign.py --write"


def test_what_is_counted() -> None:
    """Lines with code, in the functions that are named; a name that is not there is an error."""
    source = ('def f(x):\n    """Text.\n\n    more"""\n\n    # why\n    y = (x +\n         1)\n    return y  # so\n\n\n'
              'def g():\n    pass\n')
    assert foreign._python_lines(source) == {1, 7, 8, 9, 12, 13}
    assert foreign._span(source.split("\n"), "f") == (1, 11)
    assert foreign._without_comments("a; /* b\nc */\nd; // e\n") == "a; \n\nd; \n"
    with pytest.raises(LookupError, match="no_such"):
        foreign.count("_ring.pyx", "no_such")
    assert foreign.count("_ring.pyx", "reader_ready") < foreign.count("_ring.pyx", "reader_ready reader_peek")


def test_it_is_a_program() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/foreign.py"], capture_output=True, text=True, check=True)
    assert done.stdout == foreign.table()
