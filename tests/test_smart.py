"""What a disk's SMART data and status become, with disks that are made up (tests/c/smart.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import compiled


@pytest.fixture(scope="module")
def smart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    return compiled("smart", tmp_path_factory.mktemp("smart"), "-O1")


@pytest.mark.parametrize(("disk", "status", "data"), [
    ("nvme", 1, "00 77"), ("nvme-warns", 2, "04 77"), ("ata", 1, "11 11"), ("ata-fails", 2, "11 11"),
    ("ata-odd", 3, "11 11"), ("ata-silent", 3, "11 11"), ("ata-fixed", 3, "11 11"), ("ata-short", 0, None),
    ("ata-lost", 0, None), ("nvme-refuses", 0, None), ("neither", 0, None)])
def test_status_and_data(smart: Path, disk: str, status: int, data: str | None) -> None:
    """1 well, 2 beyond a threshold, 3 where a disk has data and does not say, 0 where there is nothing."""
    printed = subprocess.run([smart, disk], check=True, capture_output=True, text=True).stdout.split(maxsplit=1)
    assert int(printed[0]) == status
    assert data is None or printed[1].strip() == data
