"""One run of the guest: QEMU, the pipes to it, and its end in every case."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel import HERE, Failed, Kernel

QEMU = "qemu-system-x86_64"
TIME_IS_UP = 124                # as timeout(1) has it
PR_SET_PDEATHSIG = 1            # uapi/linux/prctl.h
MOST_LOG = 1 << 16              # bytes of the console that are kept
SECONDS_TO_START = 30           # with KVM, which where it works takes two
SECONDS_TO_END = 20             # for output to arrive once the command has ended
KVM_FAILED = b"KVM internal error"      # qemu, accel/kvm: the machine stands still from then on
# The guest is thrown away: nothing to mitigate, to audit, to test at boot.
KERNEL_OPTIONS = ("console=ttyS0 quiet panic=-1 rdinit=/init mitigations=off nokaslr no_timer_check tsc=reliable "
                  "audit=0 apparmor=0 cryptomgr.notests random.trust_cpu=on rcupdate.rcu_expedited=1 muenfast.guest")


class NotStarted(Failed):
    """The machine ended, or stood still, before the command was begun."""


@dataclass
class Machine:
    """What the guest is made of."""

    kernel: Kernel
    cpus: int
    memory: str
    seconds: float
    kvm: bool
    folders: Sequence[Path]
    verbose: bool

    def run(self, words: Sequence[str]) -> int:
        """Runs the command in the current directory; its exit status, TIME_IS_UP, or Failed is raised."""
        if shutil.which(QEMU) is None:
            raise Failed(f"there is no {QEMU} (Debian: apt-get install qemu-system-x86)")
        initrd = self.kernel.initrd(self._job(words))
        if self.kvm:
            try:
                return self._once(initrd, "kvm", SECONDS_TO_START)
            except NotStarted:
                print("guest: KVM does not work here (-v shows why): software emulation", file=sys.stderr)
        return self._once(initrd, "tcg,thread=multi", self.seconds)

    def _once(self, initrd: bytes, accelerator: str, start: float) -> int:
        """One machine from its beginning to its end. Raises NotStarted: the command was not begun within `start`."""
        with contextlib.ExitStack() as stack:
            archive = os.memfd_create("initrd")
            stack.callback(os.close, archive)
            with open(archive, "wb", closefd=False) as file:
                file.write(initrd)
            ends = {name: os.pipe() for name in ("out", "err", "status", "log")}
            for reader, _ in ends.values():
                stack.callback(os.close, reader)
            writers = {name: writer for name, (_, writer) in ends.items()}
            try:
                process = subprocess.Popen(self._command(archive, writers, accelerator), stdin=subprocess.DEVNULL,
                                           stdout=writers["log"], stderr=writers["log"],
                                           pass_fds=[archive, *writers.values()], preexec_fn=_die_with_parent())
            finally:
                for writer in writers.values():
                    os.close(writer)
            stack.callback(_kill, process)
            return Run({name: reader for name, (reader, _) in ends.items()}, self.verbose).serve(self.seconds, start)

    def _job(self, words: Sequence[str]) -> dict[str, bytes]:
        """What init reads below /job."""
        run = f"cd {shlex.quote(os.getcwd())} || exit 125\nexec {shlex.join(words)}\n"
        return {"job/command": os.fsencode(run), "job/second": (HERE / "second").read_bytes(),
                "job/modules": os.fsencode(self.kernel.modules.resolve()) + b"\n",
                "job/folders": b"".join(os.fsencode(folder) + b"\n" for folder in self.folders)}

    def _command(self, initrd: int, writers: dict[str, int], accelerator: str) -> list[str]:
        """QEMU's command line: the host's root read-only, no network, no disk, no display."""
        words = [QEMU, "-machine", "q35,usb=off,vmport=off", "-accel", accelerator, "-cpu", "max",
                 "-smp", str(self.cpus), "-m", self.memory, "-nodefaults", "-no-user-config", "-no-reboot",
                 "-display", "none", "-kernel", str(self.kernel.image), "-initrd", f"/proc/self/fd/{initrd}",
                 "-append", KERNEL_OPTIONS,
                 "-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random",
                 "-chardev", f"file,id=log,path=/proc/self/fd/{writers['log']}", "-serial", "chardev:log",
                 "-device", "virtio-serial-pci"]
        for name in ("out", "err", "status"):
            words += ["-chardev", f"file,id={name},path=/proc/self/fd/{writers[name]}",
                      "-device", f"virtserialport,chardev={name},name={name}"]
        shares = [("root", Path("/"), ",readonly=on")]
        shares += [(f"write{index}", folder, "") for index, folder in enumerate(self.folders)]
        for name, folder, more in shares:
            path = str(folder).replace(",", ",,")
            words += ["-fsdev", f"local,id={name},path={path},security_model=none,multidevs=remap{more}",
                      "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]
        return words


class Run:
    """The near end of a machine's pipes. On `status` come three lines: up, the command's status, end."""

    def __init__(self, readers: dict[str, int], verbose: bool) -> None:
        self.readers, self.verbose = readers, verbose
        self.log = self.said = b""

    @property
    def lines(self) -> list[bytes]:
        return self.said.split(b"\n")[:-1]

    def serve(self, seconds: float, start: float) -> int:
        """Passes on what the command writes, until it has ended or its time is up."""
        begun = time.monotonic()
        end = begun + min(seconds, start)
        with selectors.DefaultSelector() as selector:
            for name, reader in self.readers.items():
                selector.register(reader, selectors.EVENT_READ, name)
            while selector.get_map() and len(self.lines) < 3 and KVM_FAILED not in self.log:
                left = end - time.monotonic()
                if left <= 0:
                    break
                known = len(self.lines)
                for key, _ in selector.select(left):
                    data = os.read(key.fd, MOST_LOG)
                    if data:
                        self._take(key.data, data)
                    else:
                        selector.unregister(key.fd)
                if len(self.lines) > known:
                    end = begun + seconds if len(self.lines) == 1 else time.monotonic() + SECONDS_TO_END
        for name in ("out", "err", "log"):
            self._drain(name)
        return self._status(seconds, time.monotonic() - begun >= seconds)

    def _status(self, seconds: float, late: bool) -> int:
        lines = self.lines
        if len(lines) > 1:
            if len(lines) < 3:
                print("guest: what the command left behind cannot be killed; ended", file=sys.stderr)
            return int(lines[1])
        shown = "" if self.verbose else "".join(f"\n  {line}" for line in self._log_lines()[-25:])
        if late:
            print(f"guest: not done within {seconds:g} s (--time): ended{shown}", file=sys.stderr)
            return TIME_IS_UP
        if not lines:
            raise NotStarted("the machine did not come up" + shown)
        raise Failed("the machine ended before the command did" + shown)

    def _take(self, name: str, data: bytes) -> None:
        if name == "out":
            _write(1, data)
        elif name == "err" or name == "log" and self.verbose:
            _write(2, data)
        if name == "log":
            self.log = (self.log + data)[-MOST_LOG:]
        elif name == "status":
            self.said += data

    def _drain(self, name: str) -> None:
        """What is in the pipe; whoever writes to it has come to an end, or is not waited for."""
        os.set_blocking(self.readers[name], False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.readers[name], MOST_LOG):
                self._take(name, data)

    def _log_lines(self) -> list[str]:
        lines = self.log.decode(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()]


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data):]


def _die_with_parent() -> Callable[[], None]:
    """To be called in the child: it is killed when this process ends, however that comes about."""
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        if prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))    # a QEMU that aborts leaves no file
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextlib.contextmanager
def signals_end() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP leave by SystemExit, so that whatever was begun is undone; once."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def leave(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
