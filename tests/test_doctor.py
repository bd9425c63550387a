"""muenfast doctor: what it says of the machine, and that --fix removes what the dead left, that and nothing else.

Several runs share a machine: of left-overs outside our runtime directory only our own are looked at, and nodes are
made in a directory of ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Program, run, unique
from helpers import eventually

from muenfast import cli, control, doctor, shm
from muenfast.attach import block, fuse, loop
from muenfast.bpf import Way

Start = Callable[..., Program]

Test = Callable[..., None]


def needs_fuse(test: Test) -> Test:
    reason = fuse.available()
    return pytest.mark.root(pytest.mark.fuse(pytest.mark.skipif(
        reason is not None, reason=f"no front end: {reason}")(test)))


def needs_root(test: Test) -> Test:
    return pytest.mark.root(pytest.mark.skipif(os.geteuid() != 0, reason="needs root")(test))


def look(*words: str) -> tuple[int, dict[str, Any]]:
    """Status and object of `muenfast doctor --json`."""
    done = run("doctor", "--json", *words)
    assert done.stderr == "" and done.returncode in (0, 1)
    return done.returncode, json.loads(done.stdout)


def ours(said: dict[str, Any], *marks: str) -> list[tuple[str, str]]:
    """(kind, path) of the left-overs whose path or text has one of the marks."""
    return [(left["kind"], left["path"]) for left in said["leftovers"]
            if any(mark in left["path"] or mark in left["text"] for mark in marks)]


@pytest.fixture
def pair() -> list[str]:
    return ["--req", unique("req"), "--resp", unique("resp")]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev in this process."""
    path = tmp_path / "dev"
    path.mkdir()
    monkeypatch.setattr(doctor, "DEV", str(path))
    return path


# ---- checks


def test_shape(runtime: Path) -> None:
    """One object; each lack says what is lost and what to do; status as the needed ones are; and nothing is made."""
    status, said = look()
    assert list(said) == ["checks", "leftovers"]
    names = [check["name"] for check in said["checks"]]
    assert len(set(names)) == len(names)
    assert {"kernel", "python", "muenfast", "/dev/shm", "runtime directory", "FUSE", "fusectl", "loop", "TUN", "nbd",
            "ublk", "io_uring", "transparent huge pages", "hugetlbfs", "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "CPUs",
            "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_RESOURCE"} <= set(names)
    for check in said["checks"]:
        assert list(check) == ["name", "state", "text", "lost", "next", "needed"]
        assert check["state"] in ("ok", "limited", "missing") and check["text"]
        if check["state"] == "ok":
            assert check["lost"] == check["next"] == ""
        else:
            assert check["lost"].endswith(".") and check["next"] and "\n" not in check["lost"] + check["next"]
    missing = [check for check in said["checks"] if check["needed"] and check["state"] == "missing"]
    assert status == bool(missing or said["leftovers"])
    assert not runtime.exists()


@needs_fuse
def test_where_devices_work_nothing_needed_is_missing() -> None:
    """What the front end says of itself and what the checks say agree."""
    assert [check for check in doctor.checks() if check.needed and check.state == doctor.MISSING] == []


def test_text(program: Start, pair: list[str]) -> None:
    """One line per check, lacks with two more; the words of the JSON."""
    done = run("doctor")
    assert done.stderr == ""
    checks = look()[1]["checks"]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line[:8].strip()][:len(checks)] == \
        ["OK" if check["state"] == "ok" else check["state"] for check in checks]
    lacks = sum(check["state"] != "ok" for check in checks)
    assert sum(line.lstrip().startswith("lost: ") for line in lines) == lacks
    assert sum(line.lstrip().startswith("next: ") for line in lines) == lacks


def test_help_loads_no_extension() -> None:
    done = subprocess.run([sys.executable, "-c", "import sys, muenfast.cli as cli\n"
                           "cli.main(['doctor', '--help'])\nprint(*sys.modules, sep='\\n')"],
                          capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines())
    assert "muenfast.cli.doctor" in loaded
    assert not loaded & {"muenfast._ring", "muenfast._blk", "muenfast.attach._fuse", "posix_ipc", "muenfast.doctor"}


def found(name: str) -> doctor.Check:
    (check,) = [check for check in doctor.checks() if check.name == name]
    return check


def test_a_node_that_a_container_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is there and its node is not: the command that makes it; neither is there: the module, the option."""
    texts = {"/proc/misc": " 77 fuse\n"}
    real = doctor._text
    monkeypatch.setattr(doctor, "_text", lambda path: texts.get(path, real(path)))
    monkeypatch.setattr(doctor, "_opens", lambda path: FileNotFoundError(errno.ENOENT, "No such file", path))
    monkeypatch.setattr(fuse, "unbuilt", lambda: None)
    assert found("FUSE").next == "mkdir -p /dev && mknod -m 600 /dev/fuse c 10 77"
    assert found("FUSE").state == "missing" and found("FUSE").needed
    texts[f"/lib/modules/{os.uname().release}/modules.dep"] = "kernel/drivers/block/loop.ko.zst:\n"
    assert found("loop").next == "modprobe loop"
    assert found("ublk").next == "boot a kernel with CONFIG_BLK_DEV_UBLK (y or m)"


def test_built_without_the_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "unbuilt", lambda: "muenfast was built without it")
    assert found("FUSE").state == "missing" and "libfuse3-dev" in found("FUSE").next


@pytest.mark.parametrize(("number", "disabled", "state", "step"), [
    (errno.ENOSYS, "", "missing", "boot a kernel with CONFIG_IO_URING"),
    (errno.EPERM, "2", "limited", "sysctl kernel.io_uring_disabled=0"),
    (errno.EPERM, "0", "limited", "start the container with a seccomp profile that allows it"),
    (errno.EFAULT, "0", "ok", "")])
def test_io_uring(monkeypatch: pytest.MonkeyPatch, number: int, disabled: str, state: str, step: str) -> None:
    real = doctor._text
    monkeypatch.setattr(doctor.ctypes, "get_errno", lambda: number)
    monkeypatch.setattr(doctor, "_text", lambda path: disabled if path.endswith("io_uring_disabled") else real(path))
    assert (found("io_uring").state, found("io_uring").next) == (state, step)


@pytest.mark.parametrize(("problems", "capable", "state", "words"), [
    ({Way.TCX: None}, True, "ok", ["tcx: the kernel takes"]),
    ({Way.TCX: "the kernel has no tcx", Way.CLSACT: None}, True, "limited",
     ["clsact; no tcx: the kernel has no tcx", "takes its marks, too,", "boot Linux 6.6 or later"]),
    ({Way.TCX: "bpf: Operation not permitted", Way.CLSACT: "x", Way.TAP: None}, True, "limited",
     ["tap; no tcx: bpf: Operation not permitted; no clsact: x", "incoming packets get no mark", "--cap-add BPF"]),
    ({Way.TCX: "a", Way.CLSACT: "b", Way.TAP: "c"}, False, "missing",
     ["no tcx: a; no clsact: b; no tap: c", "network interfaces send mark 0, and set none.", "NET_ADMIN"])])
def test_netfilter_marks(monkeypatch: pytest.MonkeyPatch, problems: dict[Way, str | None], capable: bool, state: str,
                         words: list[str]) -> None:
    """Which way marks go, why no better one, what that costs."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(doctor.bpf, "problems", lambda: problems)
    monkeypatch.setattr(doctor, "_capable", lambda number: capable)
    check = found("netfilter marks")
    assert check.state == state and not check.needed
    said = f"{check.text} | {check.lost} | {check.next}"
    assert all(word in said for word in words), said


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few descriptors: how many connections that makes, and a command that works with this hard limit."""
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 4096))
    assert found("RLIMIT_NOFILE").state == "limited" and "16 connections" in found("RLIMIT_NOFILE").lost
    assert found("RLIMIT_NOFILE").next == "ulimit -n 1024"
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 256))
    assert found("RLIMIT_NOFILE").next.startswith("sudo prlimit --nofile=1024:1024")
    assert found("RLIMIT_MEMLOCK").state == "limited"


def test_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    assert (found("CPUs").state, found("CPUs").next) == ("limited", "taskset -pc 0-3 $$")


@pytest.mark.parametrize("kind", ["open to others", "file"])
def test_a_runtime_directory_that_is_none(runtime: Path, kind: str) -> None:
    """Said as a check, with a command; nothing is searched for left-overs there."""
    if kind == "file":
        runtime.write_text("")
    else:
        runtime.mkdir()
        runtime.chmod(0o777)
    status, said = look("--fix")
    (check,) = [check for check in said["checks"] if check["name"] == "runtime directory"]
    assert (status, check["state"], said["leftovers"]) == (1, "missing", [])
    assert check["next"] == (f"chmod 700 {runtime}" if kind != "file" else
                             "export MUENFAST_RUNTIME_DIR=$HOME/.muenfast")
    if kind == "file":
        runtime.unlink()
    else:
        runtime.chmod(0o700)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
@pytest.mark.parametrize("own", [True, False], ids=["own directory", "root's directory"])
def test_without_privileges(tmp_path: Path, own: bool) -> None:
    """What a user may not do is said, with who may; no left-over of others is claimed to be theirs."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    if own:
        os.chown(home, 65534, 65534)
    # The interpreter and the sources may lie where that user may not look: reading is all that is added.
    done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                           "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
                           "--bounding-set=-all,+dac_read_search", sys.executable, "-m", "muenfast", "doctor",
                           "--json", "--fix"], env={**os.environ, "MUENFAST_RUNTIME_DIR": str(home),
                                                    "PYTHONDONTWRITEBYTECODE": "1"},
                          capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    said = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in said["checks"]}
    assert states["CAP_SYS_ADMIN"] == states["CAP_NET_ADMIN"] == "missing"
    assert states["runtime directory"] == ("ok" if own else "missing")
    assert states["/dev/shm"] == "ok" or not os.path.exists("/dev/shm")
    (admin,) = [check for check in said["checks"] if check["name"] == "CAP_SYS_ADMIN"]
    assert admin["next"] == "sudo muenfast doctor" and "65534" in admin["text"]
    assert [left for left in said["leftovers"] if left["removed"] or left["kind"] != "node"] == []


@contextlib.contextmanager
def loop_on(image: Path, *options: str) -> Iterator[str]:
    """A loop device, as the kernel names it, with another scheduler than none."""
    device = subprocess.run(["losetup", *options, "--find", "--show", str(image)], check=True, capture_output=True,
                            text=True).stdout.strip()
    try:
        queue = Path(f"/sys/block/{Path(device).name}/queue/scheduler")
        before = doctor._chosen(str(queue))
        queue.write_text(next(word for word in queue.read_text().replace("[", "").replace("]", "").split()
                              if word != "none"))
        yield Path(device).name
        queue.write_text(before)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@needs_root
@pytest.mark.parametrize("shared", [False, True])
def test_schedulers(program: Start, pair: list[str], tmp_path: Path, shared: bool) -> None:
    """`none` is advised for a disk, also one of several of a connection of which a partition is exported; not any
    more once it is chosen."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    subprocess.run(["sfdisk", "--quiet", str(image)], input="label: gpt\n,4M\n,4M\n", text=True, check=True)
    with loop_on(image) as name:
        if shared:
            other = tmp_path / "other"
            other.write_bytes(bytes(1 << 20))
            words = ["modprobe", "muenblock-server", f"connections=a:{pair[1]}:{pair[3]}:{unique('buf')}",
                     f"device={other}:a,/dev/{name}#2:a"]
        else:
            words = ["blk", *pair, "--device", f"/dev/{name}"]
        server = program(*words)
        (check,) = [each for each in doctor._schedulers() if f"on {name}," in each.text]
        assert (check.state, check.next.partition(" (")[0]) == ("limited", f"echo none > /sys/block/{name}/queue/scheduler")
        turns = Path(f"/sys/block/{name}/queue/rotational").read_text() == "1\n"
        assert ("really turns" in check.next) == turns
        Path(f"/sys/block/{name}/queue/scheduler").write_text("none")
        (check,) = [each for each in doctor._schedulers() if f"on {name}," in each.text]
        assert (check.state, check.next) == ("ok", "")
        assert server.end() == (0, "")
    assert [each for each in doctor._schedulers() if name in each.text] == []


# ---- left-overs


def test_everybody_killed(program: Start, pair: list[str], runtime: Path) -> None:
    """Regions, bells, claims, records and sockets of the dead: named, not touched by a look, removed by --fix, once."""
    server = program("blk", *pair, "--device", "ram:1M")
    client = program("blk", "--client", "--attach", "none", *pair)
    for each in (client, server):
        each.end(signal.SIGKILL)
    status, said = look()
    mine = ours(said, str(runtime), pair[1], pair[3])
    assert status == 1
    assert sorted(kind for kind, _ in mine) == sorted(
        ["bell"] * 2 + ["region"] * 2 + ["socket"] * 2 + ["claim"] * 2 + ["user"] * 8)
    assert {path for kind, path in mine if kind in ("region", "bell")} == \
        {f"/dev/shm/{name}{end}" for name in (pair[1], pair[3]) for end in ("", ".bell")}
    assert all(not left["removed"] and left["problem"] is None for left in said["leftovers"])
    assert ours(look()[1], str(runtime), pair[1], pair[3]) == mine
    text = run("doctor").stdout
    assert f"left over: region /dev/shm/{pair[1]} (" in text and "doctor --fix" in text
    _, said = look("--fix")
    assert ours(said, str(runtime), pair[1], pair[3]) == mine
    assert all(left["removed"] for left in said["leftovers"] if (left["kind"], left["path"]) in mine)
    assert ours(look("--fix")[1], str(runtime), pair[1], pair[3]) == []
    assert [path for path in runtime.rglob("*") if not path.is_dir()] == []


def test_fix_says_what_it_did(program: Start, pair: list[str]) -> None:
    """In text, too; the second time there is nothing."""
    program("blk", *pair, "--device", "ram:1M").end(signal.SIGKILL)
    text = run("doctor", "--fix").stdout
    for name in (pair[1], pair[3]):
        assert f"removed: region /dev/shm/{name} (" in text and f"removed: bell /dev/shm/{name}.bell (" in text
    assert "removed: region" not in run("doctor", "--fix").stdout


def test_what_was_made_on_purpose_stays(program: Start, pair: list[str]) -> None:
    """Regions of `chan create` and named RAM disks are somebody's, whoever dies; a bell beside them goes."""
    disk = unique("disk")
    assert run("chan", "create", pair[1], pair[3]).returncode == 0
    program("blk", *pair, "--device", f"ram:1M:{disk}").end(signal.SIGKILL)
    _, said = look("--fix")
    assert {path for kind, path in ours(said, pair[1], pair[3], disk) if kind in ("region", "bell")} == \
        {f"/dev/shm/{pair[1]}.bell", f"/dev/shm/{pair[3]}.bell"}
    assert run("chan", "rm", pair[1], pair[3], disk).returncode == 0


def test_one_side_lives(program: Start, pair: list[str], tmp_path: Path) -> None:
    """A server was killed and its client waits for the next one: only the server's own records go."""
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    words = ["blk", *pair, "--device", str(tmp_path / "image")]
    server = program(*words)
    client = program("blk", "--client", "--attach", "none", *pair)
    server.end(signal.SIGKILL)
    _, said = look("--fix")
    mine = ours(said, str(tmp_path), pair[1], pair[3])
    assert {kind for kind, _ in mine} == {"claim", "user", "socket"}
    assert all(f"~{client.pid}-" not in path and f"/{client.pid}.sock" not in path for _, path in mine)
    server = program(*words)
    eventually(lambda: any(entry["entries"][0]["state"] == "ready" for entry in control.ask_all({"command": "status"})
                           if entry["command"] == "blk --client"))
    assert client.end()[0] == 0
    assert server.end() == (0, "")


def test_a_plain_peer_keeps_its_region(program: Start, pair: list[str]) -> None:
    """A peer without books has the channel mapped: in use, until it ends."""
    server = program("blk", *pair, "--device", "ram:1M")
    peer = subprocess.Popen([sys.executable, "-c", "import mmap, sys, time\nfile = open(sys.argv[1], 'rb')\n"
                             "view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\nprint(flush=True)\n"
                             "time.sleep(600)", f"/dev/shm/{pair[1]}"], stdout=subprocess.PIPE)
    with peer:
        assert peer.stdout is not None and peer.stdout.readline()
        server.end(signal.SIGKILL)
        _, said = look("--fix")
        assert {path for kind, path in ours(said, pair[1], pair[3]) if kind == "region"} == {f"/dev/shm/{pair[3]}"}
        peer.kill()
    _, said = look("--fix")
    assert ours(said, pair[1]) == [("region", f"/dev/shm/{pair[1]}")]


def test_temporaries() -> None:
    """One whose maker is dead goes, one that is being made stays."""
    shm.runtime_dir()
    dead, alive = (f"/dev/shm/.muenfast-{unique(word)}" for word in ("dead", "alive"))
    with open(alive, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)

            def said() -> bool:     # any serving command that starts at this moment sweeps it
                Path(dead).touch()
                return ours(look()[1], dead, alive) == [("temporary", dead)]

            assert eventually(said)
            look("--fix")
            assert not os.path.exists(dead) and os.path.exists(alive)
        finally:
            os.unlink(alive)


@needs_root
def test_nodes(nodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a free loop or nbd device, or a partition of one: goes. Of a bound one, a claimed name, another device, a file:
    stays."""
    unused = next(number for number in range(220, 256) if not loop.is_bound(number))

    def make(name: str, major: int, minor: int) -> None:
        os.mknod(nodes / f"muendisk{name}", stat.S_IFBLK | 0o600, os.makedev(major, minor))

    make("a", loop.LOOP_MAJOR, unused)
    make("b", loop.LOOP_MAJOR, unused)
    make("c", 259, 77)
    nbd = 240 << 5      # of a device that no kernel makes by itself
    make("g", block.NBD_MAJOR, nbd)
    make("g1", block.NBD_MAJOR, nbd + 1)
    (nodes / "muendiskd").write_text("mine")
    (nodes / "muendiske").symlink_to("muendiska")
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    used = subprocess.run(["losetup", "--find", "--show", tmp_path / "backing"], capture_output=True, text=True,
                          check=True).stdout.strip()
    try:
        make("f", loop.LOOP_MAJOR, os.minor(os.stat(used).st_rdev))
        make("f1", 259, 78)     # its disk is attached: whoever did that looks after it, in whatever books
        with shm.claim("name-muendiskb", "/dev/muendiskb"):
            cli.main(["doctor", "--fix", "--json"])
            said = json.loads(capsys.readouterr().out)
            assert ours(said, str(nodes)) == [("node", f"{nodes}/muendisk{name}") for name in ("a", "g", "g1")]
            texts = {left["path"]: left["text"] for left in said["leftovers"]}
            assert texts[f"{nodes}/muendiskg"] == f"its nbd device {block.NBD_MAJOR}:{nbd} is free"
            assert texts[f"{nodes}/muendiskg1"] == "its partition is gone"
            assert sorted(os.listdir(nodes)) == [f"muendisk{name}" for name in ("b", "c", "d", "e", "f", "f1")]
    finally:
        subprocess.run(["losetup", "--detach", used], check=True)


def test_a_removal_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                      nodes: Path) -> None:
    """Status 1, what stands in the way, and the others go all the same."""
    left = [doctor.Leftover("node", "/dev/x", "its loop device 7 is free", lambda: "in use again"),
            doctor.Leftover("region", "/dev/shm/y", "made automatically", lambda: os.unlink("/nowhere/y")),
            doctor.Leftover("claim", "/z", "of nobody", lambda: None)]
    monkeypatch.setattr(doctor, "leftovers", lambda: left)
    assert cli.main(["doctor", "--fix"]) == 1
    out = capsys.readouterr().out
    assert "not removed: node /dev/x (in use again)" in out
    assert "not removed: region /dev/shm/y (/nowhere/y: No such file or directory)" in out
    assert "removed: claim /z (of nobody)" in out


# ---- devices


def device(client: Program) -> str:
    return client.lines[0].split()[-1]


def kill_with_its_watchdog(client: Program) -> None:
    """Nobody is left to clean up."""
    children = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split()
    dogs = [int(pid) for pid in children if "watchdog" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(dogs) == 1
    os.kill(dogs[0], signal.SIGKILL)
    client.end(signal.SIGKILL)


@needs_fuse
def test_the_living_are_left_alone(program: Start, pair: list[str], runtime: Path) -> None:
    """--fix beside a server and a client at work: no left-over, and the device goes on."""
    server = program("blk", *pair, "--device", "ram:4M")
    client = program("blk", "--client", *pair)
    path = device(client)
    before = loop.loop_of(path)
    for _ in range(2):
        _, said = look("--fix")
        assert ours(said, str(runtime), path, pair[1], pair[3]) == []
    assert loop.loop_of(path) == before and before is not None and loop.is_bound(before)
    data = os.urandom(4096)
    with open(path, "r+b", buffering=0) as file:
        file.write(data)
        os.fsync(file)
        file.seek(0)
        assert file.read(4096) == data
    assert client.end() == (0, "")
    assert server.end() == (0, "")


@needs_fuse
def test_a_dead_attachment(program: Start, pair: list[str], runtime: Path) -> None:
    """Client and watchdog killed: mount, loop device and node are named as one left-over, and go."""
    server = program("blk", *pair, "--device", "ram:4M")
    client = program("blk", "--client", *pair)
    path = device(client)
    number = loop.loop_of(path)
    assert number is not None
    kill_with_its_watchdog(client)
    assert loop.backing_file(number) == f"{runtime}/mnt/{os.path.basename(path)}-{client.pid}/disk"
    _, said = look()
    (left,) = [left for left in said["leftovers"] if left["kind"] == "mount" and str(runtime) in left["path"]]
    assert left["path"] == f"{runtime}/mnt/{os.path.basename(path)}-{client.pid}"
    assert f"/dev/loop{number} on it" in left["text"]
    _, said = look("--fix")
    assert all(each["removed"] for each in said["leftovers"] if str(runtime) in each["path"])
    eventually(lambda: not loop.is_bound(number))
    assert loop.loop_of(path) != number
    assert ours(look("--fix")[1], str(runtime)) == []
    assert server.end() == (0, "")


@needs_fuse
def test_a_loop_device_without_its_mount(program: Start, pair: list[str], runtime: Path) -> None:
    """As before, and somebody took the mount away: the loop device stands on "/disk" and nobody would free it."""
    server = program("blk", *pair, "--device", "ram:4M")
    client = program("blk", "--client", *pair)
    path = device(client)
    number = loop.loop_of(path)
    assert number is not None
    kill_with_its_watchdog(client)
    subprocess.run(["umount", "-l", f"{runtime}/mnt/{os.path.basename(path)}-{client.pid}"], check=True)
    assert loop.backing_file(number) == "/disk"
    _, said = look()
    assert ("loop", f"/dev/loop{number}") in ours(said, "/dev/loop") and ("node", path) in ours(said, path)
    _, said = look("--fix")
    assert all(each["removed"] for each in said["leftovers"]
               if each["path"] in (path, f"/dev/loop{number}") or str(runtime) in each["path"])
    assert not loop.is_bound(number) or loop.backing_file(number) != "/disk"
    assert loop.loop_of(path) != number
    assert server.end() == (0, "")


@needs_fuse
def test_an_orphan_in_use(program: Start, pair: list[str], runtime: Path) -> None:
    """Somebody has the dead device open: who, and status 1; with its last close the kernel frees it."""
    server = program("blk", *pair, "--device", "ram:4M")
    client = program("blk", "--client", *pair)
    path = device(client)
    number = loop.loop_of(path)
    assert number is not None
    with open(path, "rb", buffering=0):
        kill_with_its_watchdog(client)
        subprocess.run(["umount", "-l", f"{runtime}/mnt/{os.path.basename(path)}-{client.pid}"], check=True)
        status, said = look("--fix")
        (left,) = [each for each in said["leftovers"] if each["path"] == f"/dev/loop{number}"]
        assert status == 1 and left["problem"].startswith("still open, goes with its last user: ")
        assert loop.loop_of(path) != number
    eventually(lambda: not loop.is_bound(number))
    assert server.end() == (0, "")


@needs_root
def test_a_foreign_loop_device_on_a_file_called_disk(tmp_path: Path, runtime: Path) -> None:
    """A mount that somebody else took away, alive: its loop device is not ours."""
    runtime.mkdir(mode=0o700)
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "doctor", place], check=True)
    used = ""
    try:
        (place / "disk").write_bytes(bytes(1 << 20))
        made = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", place / "disk"],
                              capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"losetup: {made.stderr}")
        used = made.stdout.strip()
        subprocess.run(["umount", "-l", place], check=True)
        assert loop.backing_file(int(used.removeprefix("/dev/loop"))) == "/disk"
        _, said = look("--fix")
        assert ours(said, used) == []
        assert loop.is_bound(int(used.removeprefix("/dev/loop")))
    finally:
        if used:
            subprocess.run(["losetup", "--detach", used], check=True)
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", place], check=True, stderr=subprocess.DEVNULL)
