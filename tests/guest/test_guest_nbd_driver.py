"""--attach nbd in Debian's kernel: all of tests/nbd_kernel.py."""

from __future__ import annotations

import pytest
from inside import command
from nbd_kernel import *  # noqa: F403


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    command("modprobe", "nbd", "nbds_max=4")    # one test has a disk more than that
