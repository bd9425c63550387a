"""The units of packaging/systemd: what systemd says of them, and that their commands are ones that muenfast has."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from muenfast.cli._main import parser
from muenfast.privileges import CAPABILITIES

UNITS = Path(__file__).resolve().parent.parent / "packaging" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
SET = {"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"}


def read(path: Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(path.read_text())
    return found


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_commands_and_capabilities(path: Path) -> None:
    """The options are known; a serving unit tells when it is ready, has its subject from outside, and gains nothing."""
    unit = read(path)
    program, *words = shlex.split(unit["Service"]["ExecStart"].replace("${SUBJECT}", "subject").replace("%i", "name"))
    assert program == "/usr/bin/muenfast"
    parser().parse_args(words)
    assert unit["Service"]["NoNewPrivileges"] == "yes"
    assert set(unit["Service"]["CapabilityBoundingSet"].split()) <= {*CAPABILITIES, *SET}
    if "@" in path.name:
        assert unit["Service"]["Type"] == "notify"
        # The watchdogs of block devices are to live longer than a client that is killed.
        assert unit["Service"]["KillMode"] == ("process" if "--client" in words else "mixed")
        assert {"--policy", "--subject", "--only"} <= set(words)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_systemd_takes_them(path: Path, tmp_path: Path) -> None:
    """No line of them is unknown to it."""
    scripts = sysconfig.get_path("scripts")
    for each in SERVICES:
        (tmp_path / each.name).write_text(each.read_text().replace("/usr/bin/muenfast", f"{scripts}/muenfast"))
    name = path.name.replace("@", "@disk")
    (tmp_path / path.name).rename(tmp_path / name)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True,
                          check=False)
    ours = [line for line in done.stderr.splitlines() if "muenfast" in line]
    assert ours == [] and done.returncode == 0, done.stderr


def test_rules_and_tmpfiles() -> None:
    lines = [line for line in (UNITS / "70-muenfast.rules").read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r'(\w+(\{[\w/]+\})?(==|=)"[^"]*")(, \w+(\{[\w/]+\})?(==|=)"[^"]*")*', line)
                         for line in lines)
    assert "d /run/muenfast 0700 root root -" in (UNITS / "muenfast.tmpfiles.conf").read_text()
