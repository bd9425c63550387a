"""The kernel of the guest, from Debian's archive by name, and the initial RAM disk that it starts with.

Nothing is installed: apt works on a configuration and lists of its own, with the mirrors' signatures checked.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Where Linux 6.12, which has ublk and nbd, is to be had, in the order in which they are tried: backports of Debian 12;
# Debian 13; whatever Debian is current.
SUITES = ("bookworm-backports", "trixie", "stable")
MIRROR = "http://deb.debian.org/debian/"
KEYRINGS = [Path("/usr/share/keyrings/debian-archive-keyring").with_suffix(suffix) for suffix in (".gpg", ".pgp")]
# What reaches the host's files and the tool's pipes; every other module is loaded from the host's side of the guest.
BOOT_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")


class Failed(Exception):
    """The guest cannot be had: what was wrong, and what helps."""


class Kernel:
    """A kernel and its modules, unpacked in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.release = (folder / "release").read_text().strip()
        self.image = folder / "vmlinuz"
        self.modules = folder / "lib/modules"

    def initrd(self, files: dict[str, bytes]) -> bytes:
        """An archive with init, busybox, the modules that reach everything else, and `files`."""
        busybox = shutil.which("busybox")
        if busybox is None or not _static(busybox):
            raise Failed("there is no busybox that stands on its own (Debian: apt-get install busybox-static)")
        modules = self._boot_modules()
        content = {"init": (HERE / "init").read_bytes(), "bin/busybox": Path(busybox).read_bytes(),
                   "modules/order": "".join(f"{path.name}\n" for path in modules).encode(), **files}
        for path in modules:
            content[f"modules/{path.name}"] = _uncompressed(path)
        return archive(content)

    def _boot_modules(self) -> list[Path]:
        """BOOT_MODULES and what they need, in the order of loading."""
        base = self.modules / self.release
        needs = {}
        for line in (base / "modules.dep").read_text().splitlines():
            path, _, needed = line.partition(":")
            needs[_name(path)] = [base / each for each in [path, *needed.split()]]
        builtin = {_name(line) for line in (base / "modules.builtin").read_text().splitlines()}
        order: dict[Path, None] = {}
        for name in BOOT_MODULES:
            if _name(name) not in builtin:
                try:
                    paths = needs[_name(name)]
                except KeyError:
                    raise Failed(f"{self.folder}: kernel {self.release} has no module {name}; "
                                 "--suite names another") from None
                order |= dict.fromkeys(reversed(paths))     # modules.dep: what is needed stands behind
        return list(order)


def _name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _static(program: str) -> bool:
    return subprocess.run(["ldd", program], capture_output=True, check=False).returncode != 0


def _uncompressed(path: Path) -> bytes:
    """A module as busybox loads it."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        return _run(["zstd", "-dcq", str(path)])
    return data


def archive(files: dict[str, bytes]) -> bytes:
    """A cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst), all files
    executable, with the folders they are in."""
    out = io.BytesIO()

    def add(name: str, mode: int, data: bytes) -> None:
        fields = [out.tell() + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        out.write(bytes(-out.tell() % 4))
        out.write(data)
        out.write(bytes(-out.tell() % 4))

    for folder in sorted({str(parent) for name in files for parent in Path(name).parents} - {"."}):
        add(folder, stat.S_IFDIR | 0o755, b"")
    for name, data in files.items():
        add(name, stat.S_IFREG | 0o755, data)
    add("TRAILER!!!", 0, b"")
    return out.getvalue()


def get(base: Path, suite: str | None, say: Callable[[str], None]) -> Kernel:
    """The kernel of that suite (default: the first of SUITES to be had); fetched if it is not below `base`."""
    base.mkdir(parents=True, exist_ok=True)
    suites = SUITES if suite is None else (suite,)
    with _locked(base / "lock"):
        for each in suites:
            if (base / each).is_dir():
                return Kernel(base / each)
        for stale in base.glob("new-*"):
            shutil.rmtree(stale)
        reasons = []
        for each in suites:
            say(f"fetching Debian's kernel for x86-64 from {each} into {base}")
            try:
                _fetch(base, each)
            except Failed as error:
                reasons.append(f"{each}: {error}")
            else:
                return Kernel(base / each)
    raise Failed("no kernel: " + "; ".join(reasons))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(base: Path, suite: str) -> None:
    """Downloads and unpacks the kernel into base/suite, which appears when it is complete."""
    for program in ("apt-get", "dpkg-deb", "depmod"):
        if shutil.which(program) is None:
            raise Failed(f"{program} is missing: it takes Debian or Ubuntu with the package kmod")
    keyring = next((path for path in KEYRINGS if path.exists()), None)
    if keyring is None:
        raise Failed("the archive's keys are missing (apt-get install debian-archive-keyring)")
    new = Path(tempfile.mkdtemp(prefix="new-", dir=base))
    try:
        (new / "sources").write_text(f"deb [arch=amd64 signed-by={keyring}] {_mirror()} {suite} main\n")
        for folder in ("lists/partial", "cache/archives/partial", "packages", "root", "kernel/lib"):
            (new / folder).mkdir(parents=True)
        (new / "conf").write_text(f"""
            Dir::Etc::sourcelist "{new}/sources";
            Dir::Etc::sourceparts "-";
            Dir::State::lists "{new}/lists";
            Dir::Cache "{new}/cache";
            Dir::State::status "{new}/status";
            APT::Architecture "amd64";
            APT::Architectures {{ "amd64"; }};
            APT::Sandbox::User "root";
            APT::Update::Error-Mode "any";
            Acquire::Languages "none";
            Acquire::Retries "2";
        """)
        (new / "status").touch()
        apt = os.environ | {"APT_CONFIG": str(new / "conf"), "LC_ALL": "C"}
        _run(["apt-get", "-qq", "update"], env=apt)
        names = _packages(apt)
        _run(["apt-get", "-qq", "download", *names], env=apt, cwd=new / "packages")
        for package in (new / "packages").iterdir():
            _run(["dpkg-deb", "-x", str(package), str(new / "root")])
        _arrange(new / "root", new / "kernel")
        os.rename(new / "kernel", base / suite)
    finally:
        shutil.rmtree(new)


def _mirror() -> str:
    """The mirror of Debian that this machine uses already, else the one for everybody."""
    found = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True,
                           check=False).stdout.split()
    return next((uri for uri in found if re.search("/debian/?$", uri)), MIRROR)


def _packages(apt: dict[str, str]) -> list[str]:
    """What linux-image-amd64 stands for: the image of one version, and what that is split into (from 7 on)."""
    found: dict[str, None] = {}
    todo = ["linux-image-amd64"]
    while todo:
        for line in _run(["apt-cache", "depends", todo.pop()], env=apt).decode().splitlines():
            needed = re.fullmatch(r"\s*\|?Depends: (linux-(?:image|binary|modules|base)-[0-9]\S*)", line)
            if needed and needed[1] not in found:
                found[needed[1]] = None
                todo.append(needed[1])
    if not found:
        raise Failed("linux-image-amd64 needs no package with a kernel")
    return list(found)


def _arrange(root: Path, kernel: Path) -> None:
    """vmlinuz, lib/modules/RELEASE with its indexes, release."""
    [modules] = [path for path in (*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")) if path.is_dir()]
    [image] = [*root.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")]
    os.rename(image, kernel / "vmlinuz")
    (kernel / "lib/modules").mkdir()
    os.rename(modules, kernel / "lib/modules" / modules.name)
    _run(["depmod", "-b", str(kernel), modules.name])
    (kernel / "release").write_text(modules.name + "\n")


def _run(words: list[str], **options: object) -> bytes:
    """What a program printed. Raises Failed with what it complained about."""
    try:
        done = subprocess.run(words, capture_output=True, check=False, **options)  # type: ignore[call-overload]
    except OSError as error:
        raise Failed(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        raise Failed(f"{' '.join(words[:2])}: {done.stderr.decode(errors='replace').strip()}")
    return bytes(done.stdout)
