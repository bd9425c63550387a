"""The units of packaging/systemd: what systemd says of them, that their commands are ones that muenfast has, and that a
systemd runs them: the first process of namespaces of the test's own, whose /run, /dev/shm, /srv and network go with it.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import unique
from helpers import eventually

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


POLICY = """
version = 1
[subjects.storage]
user = "backup"
[subjects.linux]
user = "list"
[channels.req]
writer = "linux"
reader = "storage"
[channels.resp]
writer = "storage"
reader = "linux"
[connections.disk]
client = "linux"
server = "storage"
request = "req"
response = "resp"
device = "/srv/disk.img"
[channels.in]
writer = "storage"
reader = "linux"
[channels.out]
writer = "linux"
reader = "storage"
[interfaces.net7]
subject = "linux"
in = "in"
out = "out"
addr = "10.9.0.1/24"
up = true
"""
# What others have mounted stays mounted for them as long as it is here, too.
# The first process of the namespaces makes a machine's folders, and becomes systemd. Interpreter and packages are at /mnt,
# too, for ProtectHome= and PrivateTmp= hide them from units where they are below /root or /tmp.
MACHINE = """set -e
mount --make-rprivate /
while read -r source place kind _; do
    case $source:$kind in /dev/loop*|/dev/muendisk*|*:fuse*) umount "$place" 2>/dev/null || :;; esac
done </proc/mounts
mount -t proc proc /proc
for place in /run /dev/shm /mnt /srv; do mount -t tmpfs tmpfs $place; done
while umount /sys/fs/cgroup 2>/dev/null || umount -R /sys/fs/cgroup 2>/dev/null; do :; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /mnt/bin /mnt/bin.work /mnt/etc /mnt/etc.work /mnt/out /mnt/python /mnt/packages
mount --bind "$OUT" /mnt/out
mount --bind "$BASE" /mnt/python
mount --bind "$PACKAGES" /mnt/packages
mount -t overlay overlay -o lowerdir=/usr/bin,upperdir=/mnt/bin,workdir=/mnt/bin.work /usr/bin
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/etc,workdir=/mnt/etc.work /etc
run="PYTHONHOME=$HOME_OF PYTHONPATH=/mnt/packages exec $HOME_OF/bin/$NAME"
printf '#!/bin/sh\n%s -m muenfast "$@"\n' "$run" >/usr/bin/muenfast
sed 's/ -m muenfast//' /usr/bin/muenfast >/usr/bin/mfpython
chmod 755 /usr/bin/muenfast /usr/bin/mfpython
mkdir -p /etc/muenfast
cp "$OUT/policy.toml" /etc/muenfast/
echo SUBJECT=storage >/etc/muenfast/disk.env
echo SUBJECT=linux >/etc/muenfast/net7.env
truncate -s 1M /srv/disk.img
chown backup /srv/disk.img
ip link set lo up
printf '[Manager]\nDefaultStandardOutput=inherit\n' >/etc/systemd/system.conf
export container=namespaces SYSTEMD_UNIT_PATH="$OUT/units" SYSTEMD_LOG_TARGET=null
exec "$SYSTEMD" --system --unit=all.target --show-status=no
"""


UNSHARE = ("unshare", "--fork", "--kill-child", "--pid", "--mount", "--cgroup", "--ipc", "--uts", "--net")


def cgroups() -> Path | None:
    """Where version 2 of the control groups is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[words.index("-") + 1] == "cgroup2":
            return Path(words[4])
    return None


def systemd() -> str | None:
    return next((path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.path.exists(path)), None)


@contextmanager
def booted(place: Path, *units: str) -> Iterator[tuple[int, Path]]:
    """A systemd that runs these units: its process number, and what they say. Nothing of it is left, whatever it does."""
    groups, program = cgroups(), systemd()
    assert groups is not None and program is not None
    group = groups / unique("units")
    (place / "units").mkdir()
    for each in SERVICES:
        shutil.copy(each, place / "units")
    for name in ("sysinit", "basic", "shutdown", "network", "umount"):     # this machine's would set it up again
        (place / f"units/{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    wanted = " ".join(units)
    (place / "units/all.target").write_text(f"[Unit]\nRequires={wanted}\nAfter={wanted}\nAllowIsolate=yes\n")
    (place / "policy.toml").write_text(POLICY)
    (place / "machine.sh").write_text(MACHINE)
    base = Path(sys.base_prefix)
    environment = os.environ | {
        "OUT": str(place), "BASE": str(base), "PACKAGES": sysconfig.get_path("purelib"), "SYSTEMD": program,
        "HOME_OF": str(base) if base == Path("/usr") else "/mnt/python", "NAME": f"python3.{sys.version_info[1]}"}
    environment.pop("MUENFAST_RUNTIME_DIR", None)
    said = place / "said"
    group.mkdir()
    with open(said, "wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(group), *UNSHARE, "sh", str(place / "machine.sh")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    try:
        yield eventually(lambda: first_child(process)), said
    finally:
        process.kill()      # the first of its process namespace with it, and so all of that
        process.wait()

        def removed() -> bool:
            try:
                for path in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
                    path.rmdir()
                group.rmdir()
            except OSError:     # processes are ending yet
                return False
            return True

        eventually(removed)


def first_child(process: subprocess.Popen[bytes]) -> int | None:
    assert process.poll() is None, "no systemd"
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(found[0]) if found else None


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(systemd() is None, reason="systemd is not installed")
def test_systemd_runs_them(tmp_path: Path) -> None:
    """Regions, a disk and an interface are there when their units are; a server that is killed is started again, behind the
    same data; and each ends as its unit would have it, having cleaned up."""
    groups = cgroups()
    if groups is None or not os.access(groups, os.W_OK) or subprocess.run([*UNSHARE, "true"], check=False).returncode != 0:
        pytest.skip("no namespaces, or no control groups of version 2, that a systemd could have")
    disk, net = "muenfast-blk@disk.service", "muenfast-net@net7.service"
    with booted(tmp_path, disk, net) as (pid, said):

        def within(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(["nsenter", f"--target={pid}", "--all", *words], capture_output=True, text=True,
                                  check=False, timeout=60)

        def shows(unit: str, name: str) -> str:
            return within("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

        def state(unit: str) -> str:
            return f"{shows(unit, 'ActiveState')} {shows(unit, 'SubState')} {shows(unit, 'Result')}"

        def reads(code: str) -> str:
            begin = "from muenfast import BlockDevice\nwith BlockDevice('req', 'resp') as disk:\n    "
            done = within("mfpython", "-c", begin + code)
            assert done.returncode == 0, (done.stderr, said.read_text())
            return done.stdout

        eventually(lambda: within("systemctl", "is-system-running").stdout in ("running\n", "degraded\n"), 60)
        assert (state(disk), state(net)) == ("active running success",) * 2, said.read_text()
        assert state("muenfast-policy.service") == "active exited success"
        assert "10.9.0.1/24" in within("ip", "-o", "address", "show", "net7").stdout
        assert reads("print(disk.size); disk.pwrite(b'x' * 4096, 8192); disk.flush()") == f"{1 << 20}\n"
        server = shows(disk, "MainPID")
        assert within("kill", "-9", server).returncode == 0
        eventually(lambda: shows(disk, "NRestarts") == "1" and state(disk) == "active running success")
        assert shows(disk, "MainPID") != server and reads("print(disk.pread(4096, 8192) == b'x' * 4096)") == "True\n"
        assert within("systemctl", "stop", disk, net).returncode == 0
        assert (state(disk), state(net)) == ("inactive dead success",) * 2, said.read_text()
        assert within("ip", "link", "show", "net7").returncode != 0
