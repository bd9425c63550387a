"""The C that Cython makes of the compiled modules, for programs without Python: memory model, sanitizers, fuzzers.

Of a module its nogil functions are called from C. What its initialisation would have done is done by macros that are
generated here: globals get their values, and pointers to other modules' functions those functions.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVES = "boundscheck=False,wraparound=False,cdivision=True,initializedcheck=False"
_GLOBAL = re.compile(r"^cdef (?:uint64_t|uint32_t|int) ([A-Z]\w*) = ([^#\n]+)", re.MULTILINE)
_NAME = re.compile(r"\b__pyx_([tefv])_(8muenfast_\w+)\b")


def run(*command: str | Path) -> str:
    """What it printed. Raises AssertionError where it fails."""
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}"
    return done.stdout


def mangled(name: str) -> str:
    """As Cython puts a module into the names of what it has; "attach._nbd" for one of a package."""
    return "_".join(f"{len(part)}{part}" for part in ("muenfast", *name.split(".")))


def demangled(text: str) -> tuple[str, str] | None:
    """Module and name of what comes behind "__pyx_f_"; None: a method, or nobody's."""
    parts = []
    while (digits := re.match(r"\d+", text)) is not None:
        start, length = digits.end(), int(digits[0])
        parts.append(text[start:start + length])
        text = text[start + length:].removeprefix("_")
    if parts[:1] != ["muenfast"] or len(parts) < 2 or not text or parts[-1][0].isupper():
        return None
    return ".".join(parts[1:]), text


def python_includes() -> list[str]:
    return [f"-I{sysconfig.get_path('include')}", f"-I{sysconfig.get_path('platinclude')}"]


class Cores:
    """Translates modules into a place. package: the sources, src/muenfast of this tree or of a copy."""

    def __init__(self, place: Path, package: Path = ROOT / "src/muenfast") -> None:
        self.place, self.package = place, package

    def source(self, name: str, suffix: str = ".pyx") -> Path:
        return self.package / (name.replace(".", "/") + suffix)

    def translated(self, name: str) -> Path:
        """A module's C."""
        target = self.place / f"{name}.c"
        if not target.exists() and (made := self._made(name)) is not None:
            shutil.copyfile(made, target)
        if not target.exists():
            run(sys.executable, "-m", "cython", "-3", "-X", DIRECTIVES, "-I", self.package.parent, "-o", target,
                self.source(name))
        return target

    def _made(self, name: str) -> Path | None:
        """What setup.py made of it, where no source has changed since."""
        made = self.package.parents[1] / "build/cython/src/muenfast" / (name.replace(".", "/") + ".c")
        if not made.exists():
            return None
        sources = [path for kind in ("*.pyx", "*.pxd", "*.h") for path in self.package.rglob(kind)]
        return made if made.stat().st_mtime > max(path.stat().st_mtime for path in sources) else None

    def module(self, function: str) -> str:
        """The module whose .pyx defines that function."""
        found = [path.stem for path in sorted(self.package.glob("*.pyx"))
                 if re.search(rf"^cdef [^=\n]*\b{function}\([^)]*\)[^:\n]*nogil:", path.read_text(), re.MULTILINE)]
        assert len(found) == 1, f"{function} is in {found}"
        return found[0]

    def exported(self, name: str) -> list[str]:
        """The functions that other modules call without the GIL."""
        return re.findall(r"^cdef (?!inline)[^\n(]*?\b(\w+)\([^)]*\) noexcept nogil$",
                          self.source(name, ".pxd").read_text(), re.MULTILINE)

    def constants(self, name: str) -> str:
        """Statements of C: the values of the module's globals."""
        stores = []
        for variable, value in _GLOBAL.findall(self.source(name).read_text()):
            value = re.sub(r"(?<=\d)_(?=\d)", "", re.sub(r"<(\w+)>", r"(\1)", value.strip()))
            stores.append(f"__pyx_v_{mangled(name)}_{variable} = {value};")
        return " ".join(stores)

    def imported(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Pointers to other modules' functions: (its name in C, module, function)."""
        code = self.translated(name).read_text()
        for pointer in sorted(set(re.findall(r"^static [^=\n]*\(\*(__pyx_f_\w+)\)\(", code, re.MULTILINE))):
            found = demangled(pointer.removeprefix("__pyx_f_"))
            if found is not None and found[1] in self.exported(found[0]):
                yield pointer, *found

    def short_names(self, name: str) -> str:
        """Macros for what the module's C knows by long names: T_ types, E_ constants, F_ functions, V_ variables."""
        code = self.translated(name).read_text()
        lines = {}
        for kind, text in sorted(set(_NAME.findall(code))):
            found = demangled(text)
            if found is None:
                continue
            full = f"__pyx_{kind}_{text}"
            tag = re.search(rf"^(struct|enum) {full} \{{", code, re.MULTILINE) if kind == "t" else None
            # what the module has itself hides another one's of that name
            key = f"{kind.upper()}_{found[1]}"
            if key not in lines or found[0] == name:
                lines[key] = f"#define {key} {tag[1] + ' ' if tag else ''}{full}"
        return "\n".join(lines.values()) + "\n"
