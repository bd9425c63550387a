"""muenfast demo: the whole way once, on real files."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import NoReturn

from muenfast import params
from muenfast.errors import MuenfastError, UsageError
from muenfast.threads import interrupts_held

_CHUNK = 1 << 20
_PATIENCE = 60.0  # seconds for a child to say ready, or to leave
_SKIPPED = frozenset(("site-packages", "dist-packages", "__pycache__"))


class DemoError(MuenfastError):
    """A step of the demo did not come out as it must."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--tree, --size."""
    parser.add_argument("--tree", metavar="DIR", help="what to copy (default: the running Python's standard library)")
    parser.add_argument("--size", metavar="SIZE", help="of the disk (default: what the tree needs)")


def run(arguments: argparse.Namespace) -> int:
    """Export, attach, ext4, copy, remount, compare checksums, fsck; all cleaned up in any case."""
    tree = Path(arguments.tree or sysconfig.get_paths()["stdlib"])
    if not tree.is_dir():
        raise UsageError("the tree to copy is a directory", option="--tree", value=arguments.tree)
    files = list(_files(tree))
    if not files:
        raise DemoError(f"{tree} holds no file")
    total = sum(tree.joinpath(name).stat().st_size for name in files)
    need = total + 4096 * len(files) + (64 << 20)
    size = params.size("--size", None, arguments.size, multiple=4096, least=16 << 20) if arguments.size else \
        (need + need // 8) // 4096 * 4096
    if size < total:
        raise UsageError(f"the tree has {total} bytes and needs about {need}", option="--size", value=arguments.size)
    say(f"tree: {tree}, {len(files)} files, {total / 1e6:.1f} MB")
    for tool in ("mkfs.ext4", "fsck.ext4"):
        if _tool(tool) is None:
            raise DemoError(f"{tool} is missing: install e2fsprogs")
    old = signal.signal(signal.SIGTERM, _terminated)
    try:
        reason = _no_device()
        with ExitStack() as stack:
            demo = _Demo(stack, tree, files, total, size)
            if reason is None:
                demo.with_device()
            else:
                say(f"no block device here ({reason}): the same through the Python API")
                demo.with_api()
    finally:
        signal.signal(signal.SIGTERM, old)
    say("demo: everything came back as it was; nothing is left behind")
    return 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _no_device() -> str | None:
    from muenfast.attach import fuse

    return fuse.available()


def _files(tree: Path) -> Iterator[str]:
    """Regular files below tree, relative, without what is not the library itself."""
    for directory, names, files in os.walk(tree):
        names[:] = sorted(name for name in names if name not in _SKIPPED)
        for name in sorted(files):
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield os.path.relpath(path, tree)


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def say(text: str) -> None:
    """One line of the report."""
    print(text, flush=True)


class Progress:
    """Bytes of a step, drawn on a terminal, and the rate at its end."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = self._drawn = time.monotonic()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._drawn > 0.1:
            self._drawn = now
            part = self._done / max(1, self._total)
            print(f"\r{self._what} {part:4.0%} [{'#' * int(part * 40):<40}]", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        seconds = time.monotonic() - self._start
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        say(f"{self._what}: {self._done / 1e6:.1f} MB in {seconds:.2f} s, {self._done / 1e6 / seconds:.0f} MB/s")


def _digest(path: Path, progress: Progress) -> str:
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            progress.add(len(chunk))
    return sha.hexdigest()


def _command(*words: str | os.PathLike[str], fine: tuple[int, ...] = (0,)) -> str:
    """Runs a program quietly; what it printed. Raises DemoError with its output when it fails."""
    done = subprocess.run(list(words), capture_output=True, text=True, check=False)
    if done.returncode not in fine:
        raise DemoError(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


class _Demo:
    def __init__(self, stack: ExitStack, tree: Path, files: list[str], total: int, size: int) -> None:
        self.stack, self.tree, self.files, self.total, self.size = stack, tree, files, total, size
        self.work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muenfast-demo-")))
        self.req, self.resp = f"muenfast-demo-{os.getpid()}-req", f"muenfast-demo-{os.getpid()}-resp"

    def child(self, *words: str) -> list[str]:
        """Starts `muenfast blk ...`, waits for its ready line; the lines before. It is stopped at the end."""
        with interrupts_held() as as_before:
            process = subprocess.Popen([sys.executable, "-m", "muenfast", "blk", "--req", self.req, "--resp", self.resp,
                                        *words], stdout=subprocess.PIPE, start_new_session=True, preexec_fn=as_before)
            self.stack.callback(self._stop, process)
        assert process.stdout is not None
        said = b""
        end = time.monotonic() + _PATIENCE
        while not said.endswith(b"ready\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(process.stdout.fileno(), 4096) if ready else b""
            if not part:
                raise DemoError(f"muenfast blk {' '.join(words)} did not become ready")
            said += part
        return said.decode().splitlines()[:-1]

    @staticmethod
    def _stop(process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            status = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = -9
        assert process.stdout is not None
        process.stdout.close()
        if status != 0:
            raise DemoError(f"{' '.join(map(str, process.args))} ended with {status}")  # type: ignore[arg-type]

    def with_device(self) -> None:
        """As root: a real block device, a mounted ext4."""
        for line in self.child("--device", f"ram:{self.size}"):
            say(f"server: {line}")
        (line,) = self.child("--client")
        say(f"client: {line}")
        device = line.split()[-1]
        mkfs, fsck = _tool("mkfs.ext4"), _tool("fsck.ext4")
        assert mkfs and fsck
        _command(mkfs, "-q", device)
        say(f"mkfs.ext4 {device}")
        directory = self.work / "mnt"
        directory.mkdir()
        with self.mounted(device, directory):
            progress = Progress("copy, with fsync", self.total)
            digests = {name: self._copy(self.tree / name, directory / name, progress) for name in self.files}
            fd = os.open(directory, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            os.sync()
            progress.end()
        with self.mounted(device, directory):
            self.verify("verify, after umount and mount", directory, digests)
        _command(fsck, "-f", "-n", device)
        say("fsck.ext4 -f -n: clean")
        progress = Progress(f"read {device} directly, 1 MiB at a time", self.size)
        self._read_all(device, progress)
        progress.end()

    def verify(self, what: str, directory: Path, digests: dict[str, str]) -> None:
        """Compares every file below directory with what was copied. Raises DemoError."""
        progress = Progress(what, self.total)
        bad = [name for name in self.files if _digest(directory / name, progress) != digests[name]]
        progress.end()
        if bad:
            raise DemoError(f"{len(bad)} files differ, the first is {bad[0]}")
        say(f"sha256: {len(self.files)} files equal")

    @staticmethod
    def _copy(source: Path, target: Path, progress: Progress) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        sha = hashlib.sha256()
        with open(source, "rb", buffering=0) as reading, open(target, "wb", buffering=0) as writing:
            while chunk := reading.read(_CHUNK):
                sha.update(chunk)
                writing.write(chunk)
                progress.add(len(chunk))
        return sha.hexdigest()

    def _read_all(self, device: str, progress: Progress) -> None:
        import mmap

        # O_DIRECT wants an aligned buffer: anonymous memory is page-aligned.
        with mmap.mmap(-1, _CHUNK) as buffer:
            fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
            try:
                while n := os.readv(fd, [buffer]):
                    progress.add(n)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def mounted(self, device: str, directory: Path) -> Iterator[None]:
        """The device mounted on directory; unmounted in any case."""
        _command("mount", "-t", "ext4", device, directory)
        try:
            yield
        finally:
            _command("umount", directory)

    def with_api(self) -> None:
        """Without root: an ext4 image made by mke2fs -d crosses the channels and comes back."""
        from muenfast import BlockDevice

        for line in self.child("--device", f"ram:{self.size}"):
            say(f"server: {line}")
        mkfs, fsck, debugfs = _tool("mkfs.ext4"), _tool("fsck.ext4"), _tool("debugfs")
        if not (mkfs and fsck and debugfs):
            raise DemoError("debugfs is missing: install e2fsprogs")
        image, back, copy = self.work / "image", self.work / "back", self.work / "copy"
        with open(image, "wb") as file:
            file.truncate(self.size)
        staging = self.work / "tree"
        digests = {}
        progress = Progress("copy the tree", self.total)
        for name in self.files:
            digests[name] = self._copy(self.tree / name, staging / name, progress)
        progress.end()
        _command(mkfs, "-q", "-F", "-b", "4096", "-d", staging, image)
        say("mkfs.ext4 -d: an image holding the tree")
        shutil.rmtree(staging)
        with BlockDevice(req=self.req, resp=self.resp) as disk:
            say(f"disk: {disk.size} bytes in blocks of {disk.block_size}")
            buffer = memoryview(bytearray(_CHUNK))
            progress = Progress("write through the channels", self.size)
            with open(image, "rb", buffering=0) as file:
                at = 0
                while n := file.readinto(buffer):
                    disk.pwrite(buffer[:n], at)
                    at += n
                    progress.add(n)
            disk.flush()
            progress.end()
            image.unlink()
            progress = Progress("read through the channels", self.size)
            with open(back, "wb", buffering=0) as file:
                for at in range(0, self.size, _CHUNK):
                    piece = buffer[:min(_CHUNK, self.size - at)]
                    disk.pread_into(piece, at)
                    file.write(piece)
                    progress.add(len(piece))
            progress.end()
        _command(fsck, "-f", "-n", back)
        say("fsck.ext4 -f -n: clean")
        copy.mkdir()
        _command(debugfs, "-R", f"rdump / {copy}", back)
        self.verify("verify", copy, digests)
