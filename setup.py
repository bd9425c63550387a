"""The compiled parts of muenfast; everything static stands in pyproject.toml.

Switches (environment variables): MUENFAST_WERROR=1 makes C warnings fatal; MUENFAST_SANITIZE=address or =undefined
builds with that sanitizer (make asan, make ubsan); MUENFAST_COVERAGE=1 with line tracing and gcov (make coverage).
The FUSE front end is left out where pkg-config does not know fuse3.
"""
import os
import shutil
import subprocess

from Cython.Build import cythonize
from setuptools import Extension, setup

HEADERS = [f"src/muenfast/{name}.h" for name in ("_atomics", "_copy", "_wire", "_guard", "_smart", "_aio", "_faults",
                                                  "_jobs", "_uring", "_checksum", "_inet", "_segment", "_coalesce", "_pmtu",
                                                  "_turns", "_marks", "_frame", "_crc32c", "_blocksum", "_plain",
                                                  "attach/_pump", "attach/_fuse_uring")]
CFLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"]
if os.environ.get("MUENFAST_WERROR") == "1":
    CFLAGS.append("-Werror")
LDFLAGS = []
if sanitizer := os.environ.get("MUENFAST_SANITIZE"):
    LDFLAGS = [f"-fsanitize={sanitizer}"]
    CFLAGS += [*LDFLAGS, "-O1", "-g", "-fno-omit-frame-pointer"]
if COVERAGE := os.environ.get("MUENFAST_COVERAGE"):
    LDFLAGS = ["--coverage", "-Wl,--gc-sections", "-Wl,--wrap=__gcov_exit", "-Wl,-T,tools/counters.ld"]
    # An inline function that nobody calls has lines, too. gcov's fork would put all counters back to 0 in the child.
    CFLAGS += ["--coverage", "-fprofile-update=atomic", "-O0", "-fkeep-inline-functions", "-ffunction-sections",
               "-fdata-sections", "-fno-builtin-fork", "-D_GNU_SOURCE=1", "-include", "tools/counters.h"]


def pkg_config(package: str, option: str) -> list[str] | None:
    """The words pkg-config prints for *package*, or None where it or the package is missing."""
    tool = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if tool is None:
        return None
    run = subprocess.run([tool, option, package], capture_output=True, text=True, check=False)
    return run.stdout.split() if run.returncode == 0 else None


def extension(name: str, **more: list[str]) -> Extension:
    source = "src/" + name.replace(".", "/") + ".pyx"
    cflags = CFLAGS + more.pop("cflags", [])
    if name == "muenfast._bench":       # tells them with what it measured
        cflags = [*cflags, f'-DMUENFAST_FLAGS="{" ".join(CFLAGS)}"']
    if COVERAGE:
        cflags = [*cflags, f'-DMUENFAST_COUNTERS="{COVERAGE}"']
    ldflags = LDFLAGS + more.pop("ldflags", [])
    return Extension(name, [source], include_dirs=["src/muenfast"], depends=HEADERS,
                     extra_compile_args=cflags, extra_link_args=ldflags, **more)


# Without liburing a pool of threads does what io_uring would, and a front end has two: a kernel may refuse that, too.
uring = pkg_config("liburing", "--cflags"), pkg_config("liburing", "--libs")
URING = {"cflags": ["-DMUENFAST_NO_URING"], "ldflags": []} if None in uring else {"cflags": uring[0], "ldflags": uring[1]}
if None in uring:
    print("muenfast: pkg-config finds no liburing (Debian: liburing-dev): slower files and block devices")

extensions = [extension(f"muenfast.{name}", **(URING if name in ("_store", "_user", "_blk", "_buffer") else {}))
              for name in ("_inodes", "_ring", "_target", "_store", "_user", "_engine", "_blk", "_buffer", "_client",
                           "_bufclient", "_packets", "_marks", "_net", "_bench", "_netbench", "attach._nbd")]
fuse_cflags, fuse_libs = pkg_config("fuse3", "--cflags"), pkg_config("fuse3", "--libs")
if fuse_cflags is not None and fuse_libs is not None:
    extensions.append(extension("muenfast.attach._fuse", cflags=fuse_cflags + URING["cflags"],
                                ldflags=fuse_libs + URING["ldflags"]))
else:
    print("muenfast: pkg-config finds no fuse3 (Debian: libfuse3-dev): building without the FUSE front end")

# The C goes to build/, away from the sources, and the extensions are compiled side by side.
setup(ext_modules=cythonize(extensions, include_path=["src"], build_dir="build/cython", emit_linenums=bool(COVERAGE),
                            compiler_directives={
    "language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True,
    "initializedcheck": False, "embedsignature": True, "freethreading_compatible": True}),
    options={"build_ext": {"parallel": os.cpu_count() or 1}})
