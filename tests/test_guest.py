"""tools/guest around a machine that is played by a script: what comes through, and that nothing is left in any end.

That a real one boots, make test-guest shows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import eventually

TOOL = Path(__file__).resolve().parent.parent / "tools/guest"

# Plays the guest: PLAY is a Python statement with `say(pipe, bytes)`; `words` is QEMU's command line.
QEMU = """#!{python}
import os, re, sys, time
words = sys.argv[1:]
pipes = dict(re.fullmatch("file,id=(.*),path=(.*)", w).groups() for w in words if w.startswith("file,id="))
def say(pipe, data):
    with open(pipes[pipe], "wb", buffering=0) as file:
        file.write(data)
with open({pids!r}, "a") as file:
    print(os.getpid(), file=file)
exec(os.environ["PLAY"])
"""


class Stage:
    """A folder with a kernel and a PATH with a QEMU for the tool."""

    def __init__(self, place: Path) -> None:
        self.place, self.pids = place, place / "pids"
        self.kernels = place / "kernels"
        kernel = self.kernels / "bookworm-backports"
        modules = kernel / "lib/modules/6.12"
        modules.mkdir(parents=True)
        (kernel / "release").write_text("6.12\n")
        (kernel / "vmlinuz").touch()
        (modules / "modules.dep").write_text("kernel/9p.ko: kernel/net/9pnet.ko\nkernel/net/9pnet.ko:\n")
        (modules / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in (
            "virtio_pci", "virtio_console", "9pnet_virtio", "overlay")))
        (modules / "kernel/net").mkdir(parents=True)
        (modules / "kernel/9p.ko").write_bytes(b"module 9p")
        (modules / "kernel/net/9pnet.ko").write_bytes(b"module 9pnet")
        self.programs = place / "bin"
        self.program("qemu-system-x86_64", QEMU.format(python=sys.executable, pids=str(self.pids)))
        self.program("busybox", "#!/bin/sh\n")

    def program(self, name: str, text: str) -> None:
        self.programs.mkdir(exist_ok=True)
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def start(self, play: str, *words: str, command: tuple[str, ...] = ("true",)) -> subprocess.Popen[str]:
        path = f"{self.programs}:{os.environ['PATH']}"
        return subprocess.Popen([sys.executable, TOOL, "--no-kvm", "--kernels", self.kernels, *words, "--", *command],
                                env=os.environ | {"PATH": path, "PLAY": play, "TMPDIR": str(self.place)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.place)

    def run(self, play: str, *words: str, command: tuple[str, ...] = ("true",)) -> tuple[int, str, str]:
        """Status, standard output, standard error of the tool; the machine has ended with it."""
        with self.start(play, *words, command=command) as process:
            out, err = process.communicate(timeout=60)
        self.alone()
        return process.returncode, out, err

    def alone(self) -> None:
        """Soon no machine runs, and no file is there but those of the stage."""
        for pid in self.pids.read_text().split() if self.pids.exists() else ():
            eventually(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
        assert {path.name for path in self.place.iterdir()} <= {"pids", "kernels", "bin", "fetched", "shared", "run"}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def unpacked(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Name, mode and content of what is in a cpio archive of the form "newc"."""
    at = 0
    while True:
        assert archive[at:at + 6] == b"070701" and at % 4 == 0
        fields = [int(archive[at + 6 + 8 * i:at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110:at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return
        yield name, fields[1], archive[start:start + fields[6]]
        at = (start + fields[6] + 3) // 4 * 4


ANSWER = """
say("status", b"up\\n"); say("out", b"one\\n"); say("err", b"two\\n"); say("log", b"hidden\\n")
say("status", b"37\\n"); say("out", b"three\\n"); say("status", b"end\\n"); time.sleep(600)"""


def test_output_and_status(stage: Stage) -> None:
    """The command's output and status are the tool's; the machine is ended once both are complete."""
    assert stage.run(ANSWER) == (37, "one\nthree\n", "two\n")
    assert stage.run(ANSWER, "-v") == (37, "one\nthree\n", "two\nhidden\n")


def test_what_the_machine_is_given(stage: Stage) -> None:
    """The command, word by word, and its directory; modules in the order of loading; folders; the host read-only."""
    shared = stage.place / "shared"
    shared.mkdir()
    play = """
say("status", b"up\\n")
with open(words[words.index("-initrd") + 1], "rb") as file:
    say("out", file.read())
say("err", " ".join(words).encode())
say("status", b"0\\nend\\n")"""
    with stage.start(play, "--write", str(shared), command=("echo", "it's", "a b")) as process:
        assert process.stdout is not None and process.stderr is not None
        archive, words = process.stdout.buffer.read(), process.stderr.read()  # type: ignore[attr-defined]
    assert process.returncode == 0
    found = {name: (mode, data) for name, mode, data in unpacked(archive)}
    assert {name for name, (mode, _) in found.items() if mode == 0o040755} == {"bin", "job", "modules"}
    assert all(mode in (0o040755, 0o100755) for mode, _ in found.values())
    assert found["job/command"][1].decode() == f"cd {stage.place} || exit 125\nexec echo 'it'\"'\"'s' 'a b'\n"
    assert found["modules/order"][1] == b"9pnet.ko\n9p.ko\n"
    assert found["modules/9p.ko"][1] == b"module 9p"
    assert found["job/folders"][1].decode() == f"{shared}\n"
    assert "local,id=root,path=/,security_model=none,multidevs=remap,readonly=on" in words
    assert f"local,id=write0,path={shared},security_model=none,multidevs=remap " in words
    stage.alone()


def test_time_is_up(stage: Stage) -> None:
    """A command that does not end, and a machine that does not come up."""
    for play in ("say('status', b'up\\n'); time.sleep(600)", "time.sleep(600)"):
        status, _, err = stage.run(play, "--time", "1")
        assert status == 124 and "not done within 1 s" in err


def test_machine_ends_early(stage: Stage) -> None:
    """It says why: what stood on the console."""
    status, _, err = stage.run("say('log', b'Kernel panic\\r\\n')")
    assert status == 125 and "did not come up" in err and "Kernel panic" in err
    status, _, err = stage.run("say('status', b'up\\n'); say('out', b'x'); say('log', b'out of memory\\n')")
    assert status == 125 and "ended before the command" in err and "out of memory" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals(stage: Stage, number: signal.Signals) -> None:
    """However the tool ends, the machine ends, and nothing is left."""
    with stage.start("say('status', b'up\\n'); say('out', b'begun\\n'); time.sleep(600)") as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
    stage.alone()


@pytest.mark.parametrize("play", ["sys.exit(1)", "say('log', b'KVM internal error. Suberror: 1\\n'); time.sleep(600)"])
def test_kvm_that_does_not_work(stage: Stage, play: str) -> None:
    """Software emulation takes its place."""
    play = f"if 'kvm' in words:\n    {play}\n{ANSWER}"
    program = ("import sys; from pathlib import Path; from kernel import Kernel; from machine import Machine\n"
               "sys.exit(Machine(Kernel(Path(sys.argv[1])), 1, '1G', 60, True, [], False).run(['true']))")
    done = subprocess.run([sys.executable, "-c", program, stage.kernels / "bookworm-backports"], cwd=stage.place,
                          env=os.environ | {"PATH": f"{stage.programs}:{os.environ['PATH']}", "PLAY": play,
                                            "PYTHONPATH": str(TOOL), "PYTHONDONTWRITEBYTECODE": "1"},
                          capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (37, "one\nthree\n")
    assert "KVM does not work here" in done.stderr
    assert len(stage.pids.read_text().split()) == 2
    stage.alone()


def test_no_kernel(stage: Stage) -> None:
    """Nothing to be had from the archive: what apt says, for each place that was tried; nothing is left."""
    stage.kernels = stage.place / "fetched"
    stage.program("apt-get", "#!/bin/sh\necho 'E: no such mirror' >&2\nexit 100\n")
    stage.program("dpkg-deb", "#!/bin/sh\n")
    stage.program("depmod", "#!/bin/sh\n")
    keys = any(Path("/usr/share/keyrings").glob("debian-archive-keyring.[gp][pg][gp]"))
    status, _, err = stage.run("")
    assert status == 125
    for suite in ("bookworm-backports", "trixie", "stable"):
        assert f"{suite}: {'apt-get -qq: E: no such mirror' if keys else 'the archive'}" in err
    assert [path.name for path in stage.kernels.iterdir()] == ["lock"]


@pytest.mark.parametrize(("words", "complaint"), [
    (("--write", "/nonexistent"), "no folder"), (("--time", "0"), "a whole number"), (("--cpus", "x"), "a whole number")])
def test_wrong_calls(stage: Stage, words: tuple[str, ...], complaint: str) -> None:
    status, _, err = stage.run(ANSWER, *words)
    assert status == 2 and complaint in err
    assert not stage.pids.exists()
