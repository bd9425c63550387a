"""What is shipped: the sdist holds git's files, the wheel built from it holds what runs, both build cleanly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import distribution
from pathlib import Path

import pytest

import muenfast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FUSE = "muenfast/attach/_fuse"
SUFFIX = EXTENSION_SUFFIXES[0]

pytestmark = pytest.mark.timeout(600)   # of which the compiler takes most


def git_files() -> list[str] | None:
    """The files git has or would add, or None where this is no checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    # safe.directory: root may test somebody else's checkout.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:      # a copied worktree, whose repository is elsewhere
        return None
    return sorted(name for name in run.stdout.split("\0") if name and (ROOT / name).exists())


def outcome(*command: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Exit status of a Python program, and what it printed."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=os.environ | environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.returncode, done.stdout


def run(*command: str, cwd: Path, **environment: str) -> str:
    status, printed = outcome(*command, cwd=cwd, **environment)
    if status:
        pytest.fail(f"{' '.join(command)}: exit status {status}\n{printed}", pytrace=False)
    return printed


@dataclass
class Sources:
    hints: tuple[int, str]      # status and output of tools/check_hints.py
    sdist: set[str]             # file names below the archive's top folder
    unpacked: Path


@dataclass
class Shipped:
    wheel: set[str]
    source: Path        # the unpacked sdist that it was built in


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A clean copy of the tree: Cython's hints, then, with the C that this left there, its sdist."""
    scratch = tmp_path_factory.mktemp("packaging")
    tree = scratch / "tree"
    files = git_files()
    if files is None:
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(
            ".*cache", ".venv", ".hypothesis", ".benchmarks", "build", "dist", "*.egg-info", "__pycache__", "*.so"))
    else:
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    hints = outcome("tools/check_hints.py", str(tree), cwd=ROOT)
    # What lies about in a working tree must not get into the archive.
    (tree / "src/muenfast/_left_over.c").touch()
    (tree / ("src/muenfast/_left_over" + SUFFIX)).touch()
    run("-m", "build", "--no-isolation", "--sdist", "--outdir", str(scratch), str(tree), cwd=scratch)
    [sdist] = scratch.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        if sys.version_info >= (3, 12):
            archive.extractall(scratch, filter="data")
        else:
            archive.extractall(scratch)
    return Sources(hints, names, scratch / sdist.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def shipped(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """The wheel built from the sdist with C warnings fatal."""
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(sources.unpacked), cwd=out,
        MUENFAST_WERROR="1",    # -g0 takes a quarter less of the compiler's time
        CFLAGS=f"{os.environ.get('CFLAGS') or sysconfig.get_config_var('CFLAGS')} -g0")
    return Shipped(contents(out), sources.unpacked)


def contents(place: Path) -> set[str]:
    """Names in the one wheel that is there."""
    [wheel] = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def extensions(names: set[str]) -> set[str]:
    return {name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}


def in_source(pattern: str) -> set[str]:
    src = ROOT / "src"
    return {path.relative_to(src).as_posix() for path in src.glob(f"muenfast/**/{pattern}")}


def pkg_config_knows_fuse() -> bool:
    tool = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    return tool is not None and subprocess.run([tool, "--exists", "fuse3"], check=False).returncode == 0


@pytest.mark.skipif(git_files() is None, reason="not a git checkout: nothing to compare with")
def test_sdist_holds_exactly_what_git_has(sources: Sources) -> None:
    generated = {"PKG-INFO", "setup.cfg"} | {name for name in sources.sdist if ".egg-info/" in name}
    expected = {name for name in git_files() or () if not name.startswith(".git")}
    assert sources.sdist - generated == expected


def test_wheel_from_the_sdist_holds_what_runs(shipped: Shipped) -> None:
    expected = {name.removesuffix(".pyx") for name in in_source("*.pyx")}
    if not pkg_config_knows_fuse():
        expected.discard(FUSE)
    assert extensions(shipped.wheel) == expected

    modules = in_source("*.py") | in_source("*.pyi") | in_source("py.typed")
    rest = {name for name in shipped.wheel if ".dist-info/" not in name and not name.endswith(SUFFIX)}
    assert rest == modules, "neither sources of the compiled parts nor anything else but Python and its stubs"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in shipped.wheel)


def test_without_libfuse3_only_the_fuse_front_end_is_left_out(shipped: Shipped, tmp_path: Path) -> None:
    """From the C that the wheel was built of, and compiled in a hurry: what is left out, not what the compiler says."""
    tree, compiler, out = tmp_path / "tree", tmp_path / "cc", tmp_path / "out"
    shutil.copytree(shipped.source, tree, ignore=shutil.ignore_patterns("lib.*", "temp.*", "bdist.*"))
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"} "$@" -O0 -g0\n')
    compiler.chmod(0o755)
    output = run("-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(tree), cwd=tmp_path,
                 PKG_CONFIG="/nonexistent", CC=str(compiler))
    assert "building without the FUSE front end" in output
    names = contents(out)
    assert extensions(names) == {name.removesuffix(".pyx") for name in in_source("*.pyx")} - {FUSE}
    assert shipped.wheel - names <= {FUSE + SUFFIX}


def test_cython_has_no_performance_hint_and_no_warning(sources: Sources) -> None:
    status, printed = sources.hints
    assert status == 0, printed


def test_the_installed_package_is_what_is_tested() -> None:
    assert not Path(muenfast.__file__).is_relative_to(ROOT / "src")


def test_installed_metadata() -> None:
    installed = distribution("muenfast")
    scripts = {entry.name: entry for entry in installed.entry_points if entry.group == "console_scripts"}
    assert set(scripts) == {"muenfast", "muennet_cfg"}
    assert all(callable(script.load()) for script in scripts.values())
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    assert installed.version == PYPROJECT["project"]["version"], "the venv holds an older build: make build"


def test_version_is_the_newest_of_the_changelog() -> None:
    versions = re.findall(r"^## \[?v?(\d[^\s\]]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions, "CHANGELOG.md has no '## VERSION' heading"
    assert versions[0] == PYPROJECT["project"]["version"]


def test_build_group_is_what_the_build_system_requires() -> None:
    assert PYPROJECT["dependency-groups"]["build"] == PYPROJECT["build-system"]["requires"]
