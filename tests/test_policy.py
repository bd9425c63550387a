"""Policies: what is wrong with one, whom the kernel keeps out by it, what audit finds, and who serves as it says.

The subjects' users are ones that Debian has: three that own nothing and run nothing.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nbd_client
import pytest
from conftest import Program, run, unique
from helpers import block
from test_cli import one_line

from muenfast import enforcement, flowgraph, shm
from muenfast.declared import Declared
from muenfast.policy import Policy, PolicyError, load

USERS = {"storage": "backup", "linux": "list", "guest": "irc"}
TEXT = """
version = 1

[subjects.storage]
user = "backup"
[subjects.linux]
user = "list"
[subjects.guest]
user = "irc"

[channels.req]
writer = "linux"
reader = "storage"
region = "NAMEreq"
[channels.resp]
writer = "storage"
reader = "linux"
region = "NAMEresp"
[channels.greq]
writer = "guest"
reader = "storage"
region = "NAMEgreq"
[channels.gresp]
writer = "storage"
reader = "guest"
region = "NAMEgresp"
[channels.ab]
writer = "linux"
reader = "guest"
region = "NAMEab"
bell = false
size = "1M"
[channels.ba]
writer = "guest"
reader = "linux"
region = "NAMEba"
bell = false
[buffers.buf]
users = ["storage", "guest"]
region = "NAMEbuf"
size = "1M"
[path_mtus.limits]
reader = "linux"
region = "NAMElimits"

[connections.disk]
client = "linux"
server = "storage"
request = "req"
response = "resp"
device = "ram:1M"
[connections.gdisk]
client = "guest"
server = "storage"
request = "greq"
response = "gresp"
buffer = "buf"
device = ["ram:1M", "ram:2M"]

[interfaces.net0]
subject = "linux"
in = "ba"
out = "ab"
pmtu = "limits"
[interfaces.net1]
subject = "guest"
in = "ab"
out = "ba"
"""
# Who may do what with a region: its writer reads, too.
CHANNELS = {"req": ("linux", "storage"), "resp": ("storage", "linux"), "greq": ("guest", "storage"),
            "gresp": ("storage", "guest"), "ab": ("linux", "guest"), "ba": ("guest", "linux")}
RUNG = ("req", "resp", "greq", "gresp")
root = pytest.mark.root


@pytest.fixture
def prefix() -> Iterator[str]:
    """What the names of this test's regions begin with; they go with it: no command takes away what a policy declares."""
    name = unique("policy-")
    yield name
    for path in Path("/dev/shm").glob(f"{name}*"):
        path.unlink()


@pytest.fixture
def file(tmp_path: Path, prefix: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT.replace("NAME", prefix))
    return path


def good(path: Path) -> Policy:
    policy, findings = load(str(path))
    assert findings == []
    return policy


def applied(path: Path) -> dict[str, str]:
    """What each step was, by region."""
    return {os.path.basename(step.path): step.what for step in enforcement.apply(good(path))}


# ------------------------------------------------------------------ what is wrong with a file

# (what is replaced, by what, the table that is named, what is said)
WRONG = {
    "no version": ("version = 1", "", "the file", "version is missing"),
    "another version": ("version = 1", "version = 2", "the file", "version 2: this muenfast reads version 1"),
    "no TOML": ("version = 1", "version = ", "the file", "is no TOML"),
    "unknown key": ("bell = false\nsize", "ring = false\nsize", "channels.ab", "ring is no key of it"),
    "unknown table": ("[buffers.buf]", "[buffer.buf]", "the file", "buffer is no key of it"),
    "a number for a text": ('user = "irc"', "user = 39", "subjects.guest", "user = 39"),
    "two writers": ('writer = "linux"\nreader = "storage"', 'writer = ["linux", "guest"]\nreader = "storage"',
                    "channels.req", "two writers, linux and guest"),
    "two readers": ('writer = "linux"\nreader = "storage"', 'writer = "linux"\nreader = ["storage", "guest"]',
                    "channels.req", "several readers"),
    "no reader": ('writer = "linux"\nreader = "storage"', 'writer = "linux"', "channels.req", "reader is missing"),
    "a reader that can write": ('writer = "linux"\nreader = "guest"', 'writer = "linux"\nreader = "linux"', "channels.ab",
                                "its reader can write"),
    "one region twice": ("NAMEgreq", "NAMEreq", "channels.greq", "the region is used twice: channels.req means"),
    "a bell is a region": ("NAMEgreq", "NAMEreq.bell", "channels.greq", "the ending .bell is reserved"),
    "a name twice": ("[buffers.buf]", "[buffers.req]", "buffers.req", "the name is used twice: channels.req"),
    "a slice": ('region = "NAMEgreq"', 'region = "/tmp/x@0+4096"', "channels.greq", "is a part of a file"),
    "no element fits": ('size = "1M"\n[channels.ba]', 'size = 1571\n[channels.ba]', "channels.ab", "holds no element"),
    "no size": ('size = "1M"\n[channels.ba]', 'size = "big"\n[channels.ba]', "channels.ab", "a size is a number of bytes"),
    "a buffer of no blocks": ('size = "1M"\n[path', 'size = 1000\n[path', "buffers.buf", "no multiple of 4096"),
    "one user twice": ('user = "irc"', 'user = "list"', "subjects.guest", "has the user list as subjects.linux does"),
    "root": ('user = "irc"', 'user = "root"', "subjects.guest", "runs as root"),
    "an unknown subject": ('users = ["storage", "guest"]', 'users = ["storage", "nobody"]', "buffers.buf",
                           "its writer nobody is no subject"),
    "one direction": ('request = "req"\nresponse = "resp"', 'request = "req"', "connections.disk",
                      "a connection needs both directions"),
    "the other direction": ('request = "req"\nresponse = "resp"', 'request = "resp"\nresponse = "req"', "connections.disk",
                            "linux would be the writer of resp, which is storage"),
    "somebody else's channel": ('request = "req"\nresponse = "resp"', 'request = "greq"\nresponse = "resp"',
                                "connections.disk", "a flow that no line declares: linux would be the writer of greq"),
    "a channel used twice": ('in = "ab"\nout = "ba"', 'in = "greq"\nout = "ba"', "interfaces.net1", "greq is in use by"),
    "no such channel": ('response = "resp"', 'response = "none"', "connections.disk", "response none is no channel"),
    "a buffer as a channel": ('response = "gresp"', 'response = "buf"', "connections.gdisk", "response buf is no channel"),
    "its own server": ('client = "linux"', 'client = "storage"', "connections.disk", "is its own server"),
    "several disks inline": ('device = "ram:1M"', 'device = ["ram:1M", "ram:1M"]', "connections.disk",
                             "inline channels carry one disk"),
    "no such device": ('device = "ram:1M"', 'device = "ram:x"', "connections.disk", "a size is a number of bytes"),
    "a NUL in a path": ('device = "ram:1M"', 'device = "/srv/\\u0000"', "connections.disk", "holds a NUL"),
    "a NUL in a name": ('user = "irc"', 'user = "irc\\u0000"', "subjects.guest", "holds a NUL"),
    "a shared disk": ('device = "ram:1M"', 'device = "/srv/image"', "connections.gdisk", "a flow that no line declares"),
    "a region as a disk": ('device = "ram:1M"', 'device = "/dev/shm/NAMEbuf"', "connections.disk",
                           "is a region: buffers.buf"),
    "other elements": ('region = "NAMEab"\n', 'region = "NAMEab"\nelement = 1500\n', "channels.ab",
                       "interfaces.net0 has 1508 bytes in each"),
    "a protocol alone": ("[channels.ab]", '[channels.more]\nwriter = "linux"\nreader = "guest"\nregion = "NAMEmore"\n'
                         'protocol = "5"\n[channels.ab]', "channels.more", "has a protocol, but no element"),
    "one bell of two": ('region = "NAMEab"\nbell = false', 'region = "NAMEab"', "interfaces.net0",
                        "one has a bell and one has none"),
    "an interface's name": ("[interfaces.net1]", '[interfaces."net1234567890123"]', "interfaces.net1234567890123",
                            "interface name too long"),
    "no channel at all": ('in = "ab"\nout = "ba"', "", "interfaces.net1", "has neither in nor out"),
    "limits of somebody else": ('reader = "linux"\nregion = "NAMElimits"', 'reader = "guest"\nregion = "NAMElimits"',
                                "interfaces.net0", "linux would be the reader of limits, which is guest"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(case: str, tmp_path: Path) -> None:
    before, after, where, said = WRONG[case]
    path = tmp_path / "policy.toml"
    text = TEXT.replace(before, after, 1)
    assert text != TEXT
    if case == "a shared disk":
        text = text.replace('["ram:1M", "ram:2M"]', '["ram:1M", "/srv/../srv/image#1"]')
    path.write_text(text.replace("NAME", "x-"))
    try:
        findings = load(str(path))[1]
    except PolicyError as error:
        findings = error.findings
    assert any(finding.where == where and said in finding.rule for finding in findings), findings
    done = run("policy", "check", str(path))
    assert done.returncode == 1 and said in done.stdout and done.stderr == ""
    assert run("policy", "apply", "--dry-run", str(path)).returncode == 2


@pytest.mark.parametrize("text", [
    b"\xff", b"a = " + b"[" * 100_000, b"version = 1\n" + b"#" * (17 << 20), b"[subjects]\nx = 1", b"version = true",
    b"subjects = 3", b"channels = [1]", b"[subjects.'a b']\nuser = ''",
    b"version = 1\n[subjects.x]\nuser = ['a']\n[channels]\ny = {writer = 3, reader = {}}"])
def test_any_bytes_are_answered(text: bytes, tmp_path: Path) -> None:
    """Whatever the file holds: findings, and one status."""
    path = tmp_path / "policy"
    path.write_bytes(text)
    done = run("policy", "check", str(path))
    assert done.returncode == 1 and done.stdout and done.stderr == ""


def test_a_good_one(file: Path) -> None:
    """What is not said follows from what a channel is used for."""
    policy = good(file)
    done = run("policy", "check", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 subjects, 8 regions, 2 connections, 2 interfaces, 13 flows: nothing is wrong" in done.stdout
    regions = policy.regions
    assert (regions["req"].size, regions["req"].element, regions["req"].protocol) == (0x100000, 4120, 0x9570208DCA77DB19)
    assert (regions["greq"].size, regions["greq"].element) == (0x8000, 32)
    assert (regions["gresp"].size, regions["gresp"].element) == (0x4000, 16)
    assert (regions["ab"].size, regions["ab"].element, regions["ab"].protocol) == (1 << 20, 1508, 2)
    assert json.loads(run("policy", "check", "--json", str(file)).stdout) == {"findings": []}


@pytest.mark.parametrize(("key", "value", "said"), [
    ("addr", "10.0.0.1/99", "addr '10.0.0.1/99': an address is IPv4 or IPv6"),
    ("mac", "02:00:00:00:00:01", "mac '02:00:00:00:00:01': only an Ethernet device"),
    ("marks", "quick", "marks 'quick': marks go one of these ways"),
    ("carrier", "often", "carrier 'often': ")])
def test_what_serving_would_refuse_is_found(file: Path, key: str, value: str, said: str) -> None:
    """An entry is looked at as serving looks at it, in the same words."""
    file.write_text(file.read_text().replace("[interfaces.net1]", f'[interfaces.net1]\n{key} = "{value}"'))
    done = run("policy", "check", str(file))
    assert done.returncode == 1 and done.stdout.startswith(f"interfaces.net1: {said}"), done.stdout
    refused = run("net", "--policy", str(file), "--subject", "guest")
    assert refused.returncode == 2 and f"interfaces.net1: {key}" in refused.stderr, refused.stderr
    assert said.partition(": ")[2] in refused.stderr


def test_users_that_are_not_there(file: Path) -> None:
    """Only where the file is meant for this machine."""
    file.write_text(file.read_text().replace('"irc"', '"nobody-of-that-name"'))
    done = run("policy", "check", str(file))
    assert done.returncode == 1 and "subjects.guest: there is no user nobody-of-that-name here" in done.stdout
    assert run("policy", "check", "--file-only", str(file)).returncode == 0


def test_a_group_that_lets_others_in(file: Path) -> None:
    """A group is a flow to everybody in it: those of another subject, and those of none."""
    file.write_text(file.read_text().replace('user = "irc"', 'user = "irc"\ngroup = "list"'))
    findings = enforcement.accounts(good(file))[1]
    assert any(finding.where == "subjects.guest" and "linux's user list is in its group" in finding.rule
               for finding in findings)
    file.write_text(file.read_text().replace('group = "list"', 'group = "nogroup"'))
    assert any("the user nobody, of no subject, is in its group" in finding.rule
               for finding in enforcement.accounts(good(file))[1])


# ------------------------------------------------------------------ the graph

def flows() -> set[tuple[str, str, str, str]]:
    """What TEXT declares, by hand."""
    found = {(writer, reader, name, "channel") for name, (writer, reader) in CHANNELS.items()}
    found |= {(reader, writer, name, "bell") for name, (writer, reader) in CHANNELS.items() if name in RUNG}
    return found | {("storage", "guest", "buf", "buffer"), ("guest", "storage", "buf", "buffer"),
                    ("(root)", "linux", "limits", "path MTUs")}


def test_the_graph_has_the_declared_flows(file: Path, tmp_path: Path) -> None:
    """Exactly those, in each form."""
    policy = good(file)
    assert {(flow.source, flow.target, flow.through, flow.kind) for flow in policy.flows()} == flows()
    done = json.loads(run("policy", "graph", "--json", str(file)).stdout)
    assert {tuple(flow.values()) for flow in done["flows"]} == flows()
    assert done["reach"] == {"storage": ["guest", "linux"], "linux": ["guest", "storage"], "guest": ["linux", "storage"]}
    lines = run("policy", "graph", str(file)).stdout.splitlines()
    arrows = [line.split()[:4] for line in lines if "may reach" not in line]
    kinds = {"-->": {"channel", "path MTUs"}, "..>": {"bell"}, "==>": {"buffer"}}
    assert len(arrows) == len(flows())
    assert all(any((source, target, through.strip(","), kind) in flows() for kind in kinds[arrow])
               for source, arrow, target, through in arrows)
    drawn = tmp_path / "graph.svg"
    assert run("policy", "graph", "--svg", str(drawn), str(file)).returncode == 0
    titles = [each.text for each in ElementTree.parse(drawn).iter("{http://www.w3.org/2000/svg}title")][1:]
    assert sorted(title.partition(":")[0] for title in titles if title) == sorted(f"{a} to {b}" for a, b, *_ in flows())
    assert run("policy", "graph", "--svg", "-", str(file)).stdout.startswith(drawn.read_text())


def test_one_way_is_drawn_one_way(file: Path) -> None:
    """Who has only strictly one-way channels towards him reaches nobody."""
    text = file.read_text()
    text = text[:text.index("[channels.greq]")] + text[text.index("[channels.ab]"):text.index("[channels.ba]")]
    file.write_text(text)
    policy = good(file)
    assert policy.reach("guest") == [] and policy.reach("linux") == ["guest", "storage"]
    assert "guest may reach nobody" in flowgraph.text(policy)


# ------------------------------------------------------------------ the kernel enforces it

def opens(user: str, path: str, how: str) -> bool:
    """Whether a process of that user opens a file to read ("<") or to write (">>", without making one)."""
    done = subprocess.run(["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "sh", "-c",
                           f'exec 3{how}"$1"', "sh", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "ermission denied" in done.stderr, done.stderr
    return done.returncode == 0


@root
def test_every_declared_flow_and_no_other(file: Path, prefix: str) -> None:
    """Every region and bell by every subject, and by a user of none, to read and to write."""
    assert set(applied(file).values()) == {"created"}
    for name, (writer, reader) in CHANNELS.items():
        paths = {f"/dev/shm/{prefix}{name}": {"<": {writer, reader}, ">>": {writer}}}
        bell = f"/dev/shm/{prefix}{name}.bell"
        assert os.path.exists(bell) == (name in RUNG)
        if name in RUNG:
            paths[bell] = {"<": {writer, reader}, ">>": {writer, reader}}
        for path, may in paths.items():
            for how, who in may.items():
                assert {subject for subject, user in USERS.items() if opens(user, path, how)} == who, (path, how)
                assert not opens("games", path, how)
    for how in ("<", ">>"):
        assert {name for name, user in USERS.items() if opens(user, f"/dev/shm/{prefix}buf", how)} == {"storage", "guest"}
    assert {name for name, user in USERS.items() if opens(user, f"/dev/shm/{prefix}limits", "<")} == {"linux"}
    assert not any(opens(user, f"/dev/shm/{prefix}limits", ">>") for user in USERS.values())


@root
def test_apply_again_touches_nothing(file: Path, prefix: str) -> None:
    """Nor does --dry-run, before or after."""
    done = run("policy", "apply", "--dry-run", str(file))
    assert done.returncode == 0 and done.stdout.count("would be created") == 12
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))
    assert run("policy", "apply", str(file)).returncode == 0
    before = {path: path.stat() for path in Path("/dev/shm").glob(f"{prefix}*")}
    assert len(before) == 12
    done = run("policy", "apply", str(file))
    assert done.returncode == 0 and done.stdout.count("unchanged") == 12
    assert {path: path.stat()[:] for path in before} == {path: seen[:] for path, seen in before.items()}
    assert {path: path.stat().st_ctime_ns for path in before} == {path: seen.st_ctime_ns for path, seen in before.items()}


@root
def test_apply_mends_what_nobody_uses(file: Path, prefix: str) -> None:
    """Owner, group, mode, size and access control list; a region of path MTUs keeps what it holds."""
    applied(file)
    path = Path("/dev/shm", f"{prefix}req")
    path.chmod(0o666)
    os.chown(f"{path}.bell", 0, 0)
    os.truncate(f"/dev/shm/{prefix}ab", 4096)
    acl(f"/dev/shm/{prefix}ba")
    os.truncate(f"/dev/shm/{prefix}limits", 8192)
    steps = {os.path.basename(step.path).removeprefix(prefix): step for step in enforcement.apply(good(file))}
    changed = {name: step.text for name, step in steps.items() if step.what != "unchanged"}
    assert changed.keys() == {"req", "req.bell", "ab", "ba", "limits"}
    assert "mode 666" in changed["req"] and "has 4096 bytes" in changed["ab"] and "access control list" in changed["ba"]
    assert steps["limits"].what == "left" and "what it holds would be lost" in changed["limits"]
    Path(f"/dev/shm/{prefix}limits").unlink()
    assert applied(file)[f"{prefix}limits"] == "created"
    assert [finding for finding in enforcement.audit(good(file)) if prefix in finding.rule + finding.where] == []


def acl(path: str) -> None:
    """Lets user 5 in, by an access control list (linux/posix_acl_xattr.h: version 2, then tag, permissions, id)."""
    entries = [(1, 6, 0xFFFFFFFF), (2, 4, 5), (4, 4, 0xFFFFFFFF), (0x10, 4, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries))


@root
def test_apply_leaves_what_is_in_use(file: Path, prefix: str) -> None:
    applied(file)
    path = Path("/dev/shm", f"{prefix}req")
    with subprocess.Popen([sys.executable, "-c", "import sys; f = open(sys.argv[1]); print(flush=True); input()", path],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        path.chmod(0o600)
        done = run("policy", "apply", str(file))
        assert done.returncode == 1
        line = next(line for line in done.stdout.splitlines() if line.startswith("left"))
        assert str(path) in line and f"in use by process {holder.pid} (python" in line
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        holder.communicate(b"\n")
    assert run("policy", "apply", str(file)).returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@root
def test_apply_and_a_name_that_is_no_region(file: Path, prefix: str) -> None:
    """What is something else is neither followed nor removed."""
    path = Path("/dev/shm", f"{prefix}req")
    target = Path("/dev/shm", f"{prefix}target")
    target.write_text("precious")
    path.symlink_to(target)
    assert applied(file)[path.name] == "left"
    assert path.is_symlink() and target.read_text() == "precious" and target.stat().st_uid == 0


def test_without_root_it_is_said(file: Path) -> None:
    if os.geteuid() == 0:
        policy = good(file)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setresuid(5, 5, 5)
                list(enforcement.apply(policy))
            except PermissionError as error:
                status = 0 if error.errno == errno.EPERM and "needs root" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        return
    with pytest.raises(PermissionError, match="needs root"):
        list(enforcement.apply(good(file)))


# ------------------------------------------------------------------ audit

def found(file: Path, prefix: str) -> list[str]:
    """What audit says of this test's regions."""
    done = run("policy", "audit", "--json", str(file))
    findings = [f"{each['where']}: {each['rule']}" for each in json.loads(done.stdout)["findings"]]
    assert done.returncode == (1 if findings else 0)
    return [each for each in findings if prefix in each]


@root
def test_audit(file: Path, prefix: str) -> None:
    """A region added by hand, a mode changed by hand, an owner, a list, one that is missing."""
    assert len(found(file, prefix)) == 12
    applied(file)
    assert found(file, prefix) == []
    extra = Path("/dev/shm", f"{prefix}extra")
    assert run("chan", "create", extra.name, "--size", "64K").returncode == 0
    assert found(file, prefix)[0].startswith(f"{extra}: a region that no line declares, root:root 600")
    os.chown(extra, pwd.getpwnam("list").pw_uid, pwd.getpwnam("irc").pw_gid)
    extra.chmod(0o640)
    [said] = found(file, prefix)
    assert "linux may write it" in said and "guest may read it" in said
    extra.unlink()
    for name, change, expected in (
            ("req", lambda path: path.chmod(0o644), "mode 644, instead of user"),
            ("buf", lambda path: path.chmod(0o666), "mode 666"),
            ("gresp.bell", lambda path: os.chown(path, 0, 0), "has user 0, group 0"),
            ("ab", lambda path: acl(str(path)), "access control list"),
            ("limits", lambda path: os.truncate(path, 4), "has 4 bytes, declared are 4096"),
            ("ba", lambda path: path.unlink(), "is missing")):
        change(Path("/dev/shm", prefix + name))
        [said] = found(file, prefix)
        assert expected in said and f"{prefix}{name}" in said
        if name == "limits":
            Path("/dev/shm", prefix + name).unlink()
        applied(file)
        assert found(file, prefix) == []


@root
def test_audit_finds_who_holds_what_is_not_his(file: Path, prefix: str) -> None:
    """A process that opened it as root and is another user's now; a reader's that may write."""
    applied(file)
    code = """if True:
        import mmap, os, sys
        fd = os.open(sys.argv[1], os.O_RDWR)
        kept = mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        if sys.argv[3] == "mapped":
            os.close(fd)
        os.setresuid(*[int(sys.argv[2])] * 3)
        print(flush=True)
        input()"""
    for user, how, expected in (("games", "mapped", "user games), which is none of linux, storage"),
                                ("root", "open", "user root), which is none of"),
                                ("backup", "mapped", "for writing by process"),
                                ("backup", "open", "for writing by process"), ("list", "mapped", None)):
        with subprocess.Popen([sys.executable, "-c", code, f"/dev/shm/{prefix}req", str(pwd.getpwnam(user).pw_uid), how],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            said = found(file, prefix)
            holder.communicate(b"\n")
        if expected is None:
            assert said == []
        else:
            assert len(said) == 1 and expected in said[0] and str(holder.pid) in said[0]


# ------------------------------------------------------------------ served as it says

@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each user with its own runtime directory, in a place that all may enter."""
    monkeypatch.delenv("MUENFAST_RUNTIME_DIR")
    paths = [Path(f"/run/muenfast-{pwd.getpwnam(user).pw_uid}") for user in USERS.values()]
    assert not any(path.exists() for path in paths)
    yield
    left = []
    for path in paths:
        if path.exists():
            left += [each for each in path.rglob("*") if not each.is_dir()]
            shutil.rmtree(path)
    assert left == []


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@root
def test_a_disk_between_two_users(program: Callable[..., Program], file: Path, prefix: str, alone: None) -> None:
    """Server and client are their subjects' users, without any capability; every block comes back; what either holds is its
    own; a killed server's successor goes on."""
    applied(file)
    place = Path(tempfile.mkdtemp(prefix="muenfast-"))
    try:
        os.chown(place, pwd.getpwnam("list").pw_uid, -1)
        words = ("blk", "--policy", str(file), "--subject", "storage")
        server = program(*words)
        assert server.lines == [f"export {prefix}req {prefix}resp {1 << 20} ram:1M",
                                f"export {prefix}greq {prefix}gresp {1 << 20} ram:1M {2 << 20} ram:2M shm {prefix}buf"]
        socket = place / "nbd"
        client = program("blk", "--client", "--policy", str(file), "--subject", "linux", "--attach", "none", "--nbd",
                         str(socket), "--same-store")
        for process, user in ((server, "backup"), (client, "list")):
            seen, entry = status_of(process.pid), pwd.getpwnam(user)
            assert seen["Uid"].split() == [str(entry.pw_uid)] * 4 and seen["Gid"].split() == [str(entry.pw_gid)] * 4
            assert seen["Groups"].split() == [str(entry.pw_gid)] and seen["NoNewPrivs"] == "1"
            assert {seen[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
        assert found(file, prefix) == []
        with nbd_client.connect(str(socket)) as connection:
            for offset in range(0, 1 << 20, 4096):
                connection.write(offset, block(offset))
            assert all(connection.read(offset, 4096) == block(offset) for offset in range(0, 1 << 20, 4096))
            server.process.kill()
            server.process.communicate()
            server = program(*words)
            connection.write(0, block(7))
            assert connection.read(0, 4096) == block(7)
        assert client.end()[0] == 0 and server.end()[0] == 0
        assert found(file, prefix) == []
    finally:
        shutil.rmtree(place)


@root
def test_only_what_is_declared(program: Callable[..., Program], file: Path, prefix: str, alone: None) -> None:
    """Of several connections some; none beyond them, now or later; regions as declared or none."""
    done = run("blk", "--policy", str(file), "--subject", "storage")
    assert done.returncode == 1 and "`muenfast policy apply` makes it" in one_line(done.stderr)
    applied(file)
    Path("/dev/shm", f"{prefix}greq").chmod(0o666)
    done = run("blk", "--policy", str(file), "--subject", "storage")
    assert done.returncode == 1 and "mode 666, instead of" in one_line(done.stderr)
    applied(file)
    server = program("blk", "--policy", str(file), "--subject", "storage", "--only", "gdisk")
    assert len(server.lines) == 1 and f"{prefix}greq" in server.lines[0]
    done = subprocess.run([sys.executable, "-c", ASK, str(pwd.getpwnam("backup").pw_uid), str(server.pid)], text=True,
                          capture_output=True, check=False)
    assert "the exports that its policy declares" in done.stdout, done.stderr
    assert server.end()[0] == 0


@root
def test_a_disk_that_its_user_may_not_open(file: Path, alone: None) -> None:
    """The message says whom to let in: not who gave the command."""
    applied(file)
    with tempfile.TemporaryDirectory(prefix="muenfast-") as place:
        Path(place).chmod(0o755)
        image = Path(place, "image")
        image.write_bytes(bytes(1 << 20))
        image.chmod(0o600)
        file.write_text(file.read_text().replace('device = "ram:1M"', f'device = "{image}"'))
        done = run("blk", "--policy", str(file), "--subject", "storage", "--only", "disk")
    assert done.returncode == 2 and one_line(done.stderr).endswith(
        "Permission denied (it, and each folder before it, has to let in backup, as whom this process runs)")


# Asks a server, as its user, for an export more. Modules first: only root may be able to read them.
ASK = """if True:
    import os, sys
    from muenfast import control
    os.setresuid(*[int(sys.argv[1])] * 3)
    print(control.ask(int(sys.argv[2]), {"command": "create", "name": "more", "req": "x", "resp": "y"}))
"""


@pytest.mark.parametrize(("words", "expected"), [
    (("--req", ""), "--req: is the policy's to say"), (("--device", "ram:1M"), "--device: is the policy's to say"),
    (("--strict-oneway",), "--strict-oneway: is the policy's to say"),
    (("--inject", "late"), "--inject: is the policy's to say"), (("--quarantine", "x"), "--quarantine 'x': "),
    (("--only", "none"), "--only, entry 0 'none': "), (("--only", "disk,disk"), "--only, entry 1 'disk': is named twice"),
    (("--client", "--attach", "nbd"), "--attach 'nbd': a subject's block devices are made by FUSE")])
def test_nothing_beside_a_policy(file: Path, words: tuple[str, ...], expected: str) -> None:
    done = run("blk", "--policy", str(file), "--subject", "storage", *words)
    assert done.returncode == 2 and expected in one_line(done.stderr)


def test_options_that_need_each_other(file: Path) -> None:
    for words, expected in ((("--subject", "storage"), "--subject 'storage': goes with --policy"),
                            (("--policy", str(file)), "--subject: required beside --policy"),
                            (("--policy", str(file), "--subject", "none"), "--subject 'none': is no subject of"),
                            (("--policy", str(file), "--subject", "none", "--only", "a,"), "--only, entry 1")):
        for command in ("blk", "net"):
            done = run(command, *words)
            assert done.returncode == 2 and expected in one_line(done.stderr)


@root
def test_a_region_made_anew_by_its_owner(file: Path, prefix: str) -> None:
    """A writer may remove its own region's name and make another: one that lets others in is not taken for it."""
    applied(file)
    policy = good(file)
    known = enforcement.accounts(policy)[0]
    region = policy.regions["req"]
    wanted = enforcement.permit(region, known, "the policy")
    shm.Region.open(region.locator, writable=False, permit=wanted).close(keep=True)
    path = Path(region.locator.path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        shm.Region.open(region.locator, writable=False, permit=wanted)
    path.write_bytes(bytes(4096))
    os.chown(path, wanted.uid, wanted.gid)
    path.chmod(0o666)
    with pytest.raises(PermissionError, match="mode 666"):
        shm.Region.open(region.locator, writable=False, permit=wanted)
    path.chmod(0o640)
    acl(str(path))
    with pytest.raises(PermissionError, match="access control list"):
        shm.Region.open(region.locator, writable=False, permit=wanted)


@root
def test_what_a_peer_may_do_wrong_is_the_operators(file: Path) -> None:
    """--quarantine goes beside a policy."""
    serves = replace(Declared.load(str(file), "storage"), patience=7)
    assert [each.channels.patience for each in serves.exports()] == [7, 7]
    assert [each.patience for each in replace(Declared.load(str(file), "linux"), patience=7).interfaces()] == [7]
