"""Disks written in Python: classes with the callbacks of nbdkit's Python plugins (docs/stores.md)."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

from muenfast._user import LARGEST, MOST_WORKERS, UserStore
from muenfast.backing import BLOCK, SECTOR, Backing, Device, check_shrink
from muenfast.errors import StoreError, UsageError
from muenfast.threads import Ending, ending, leave_child, spawn

log = logging.getLogger("muenfast")

_CALLBACKS = {"pread": 2, "pwrite": 2, "flush": 0, "trim": 2, "zero": 2}  # arguments, without nbdkit's flags
_CLOSE_PATIENCE = 4.0  # seconds for calls that still run when the export ends
_QUIET = 1.0  # seconds between two lines about late calls
_MOST_KINDS = 256  # of exceptions that are told apart
_EIO = 5
_MOST_ERRNO = 4095  # linux/err.h: MAX_ERRNO
_LOOK = 0.1  # seconds between two looks at whether the process is to end
_OTHERS = ("open", "block_size", "can_write", "can_flush", "can_trim", "can_zero", "trims_to_zero", "resize", "identity",
           "close")
_ELSEWHERE = {"read": "pread", "write": "pwrite", "size": "get_size", "sync": "flush", "fsync": "flush",
              "discard": "trim"}  # what other interfaces call them
_files: dict[str, ModuleType] = {}


class UserBacking(Backing):
    """An object with callbacks, and the threads that call them. pool: how many. timeout: seconds for one answer.

    Raises UsageError where the device names no such thing, StoreError where its own code fails.
    """

    store: UserStore

    def __init__(self, device: Device, *, read_only: bool, pool: int, timeout: float) -> None:
        self._device, self._timeout = device, timeout
        self._said: set[tuple[str, type[BaseException], object]] = set()
        self._late, self._told = 0, -math.inf   # calls that were told of, and when
        self._object: Any = device.made
        if self._object is None:
            self._object = _make(device, timeout)
        if isinstance(self._object, type):
            raise UsageError("a store is an object, not its class", value=device.text, hint="call it first")
        for name in ("get_size", "pread"):
            if not callable(getattr(self._object, name, None)):
                raise UsageError(f"{type(self._object).__name__} has no method {name}, which a disk needs",
                                 value=device.text)
        if not 1 <= pool <= MOST_WORKERS:
            raise UsageError(f"a store has 1 to {MOST_WORKERS} threads", value=pool)
        self._check()
        self._warn()
        self._threads: list[threading.Thread] = []
        self._asked: list[threading.Thread] = []    # calls of _ask() that have not returned in time
        self._over = Ending()
        self._claim = _Claim(self._object, not read_only and callable(getattr(self._object, "pwrite", None)), device.text)
        try:
            if callable(getattr(self._object, "open", None)):
                self._ask("open", *([read_only] if _takes(self._object.open, 1) else []))
        except BaseException:
            self._claim.end(self._asked)
            raise
        try:
            self.store = self._opened(read_only, timeout)
            for number in range(pool):
                self._threads.append(spawn(self.store.work, f"{device.text} {number}"))
        except BaseException:
            self._end()
            raise

    def _check(self) -> None:
        """Raises UsageError for methods whose call would only make something that nobody runs."""
        for name in (*_CALLBACKS, "get_size", *_OTHERS):
            call = getattr(self._object, name, None)
            for kind, is_one in (("a coroutine function", inspect.iscoroutinefunction),
                                 ("a generator", inspect.isgeneratorfunction),
                                 ("an asynchronous generator", inspect.isasyncgenfunction)):
                if is_one(call):
                    raise UsageError(f"its method {name}() is {kind}, of which a call runs nothing",
                                     value=self._device.text, hint="plain methods are called, by several threads at a time")

    def _warn(self) -> None:
        """Tells of methods that look like misspelt callbacks: nothing ever calls them."""
        known = [*_CALLBACKS, "get_size", *_OTHERS]
        missing = [name for name in known if not callable(getattr(self._object, name, None))]
        for name in dir(type(self._object)):
            if name.startswith("_") or name in known or not callable(getattr(type(self._object), name, None)):
                continue
            meant = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, 1, 0.8)
            if meant and meant[0] in missing:
                log.warning("store %s: nothing calls its method %s(); is it meant to be %s()?", self._device.text, name,
                            meant[0])

    def _size(self) -> int:
        size = self._ask("get_size")
        if not isinstance(size, int) or not 0 <= size < 1 << 63:
            raise StoreError(self._device.text, "get_size()", f"returned {size!r}, no number of bytes below 2^63")
        if size < BLOCK:
            raise UsageError(f"a disk has at least {BLOCK} bytes, this has {size}", value=self._device.text)
        return size

    def _opened(self, read_only: bool, timeout: float) -> UserStore:
        size = self._size()
        least, most = self._blocks()
        can = {name: self._can(name) for name in _CALLBACKS}
        calls: dict[str, Any] = {name: getattr(self._object, name) if can[name] else None for name in _CALLBACKS}
        bare = [name for name, call in calls.items() if call is not None and not _takes(call, _CALLBACKS[name] + 1)]
        zeroes = can["zero"] if not can["trim"] else bool(self._ask("trims_to_zero", missing=False))
        read_only = read_only or not can["pwrite"]
        store = UserStore(size, **calls, bare=bare, failed=self._failed, most=most, timeout=timeout, zeroes=zeroes,
                          block_size=BLOCK if size % BLOCK == 0 or least > SECTOR else SECTOR, read_only=read_only,
                          identity=self._identity())
        self.left_over = size - store.size
        return store

    def _ask(self, name: str, *arguments: object, missing: object = None) -> Any:
        """What the callback returns; `missing` where there is none."""
        call = getattr(self._object, name, None)
        return missing if call is None else _within(self._timeout, self._device.text, name, call, *arguments,
                                                    left=self._asked, over=self._over)

    def _can(self, name: str) -> bool:
        there = callable(getattr(self._object, name, None))
        return there and bool(self._ask("can_" + {"pread": "read", "pwrite": "write"}.get(name, name), missing=True))

    def _blocks(self) -> tuple[int, int]:
        """Least and most bytes of one call."""
        found = self._ask("block_size", missing=(1, BLOCK, LARGEST))
        try:
            least, preferred, most = (int(each) for each in found)
        except (TypeError, ValueError):
            raise StoreError(self._device.text, "block_size()",
                             f"returned {found!r}, not (minimum, preferred, maximum)") from None
        if least < 1 or least & least - 1 or least > BLOCK:
            raise StoreError(self._device.text, "block_size()", f"returned the minimum {least}: requests are multiples of "
                                                                f"{BLOCK} bytes, so it is a power of two up to that")
        if most < BLOCK:
            raise StoreError(self._device.text, "block_size()", f"returned the maximum {most}: a block has {BLOCK} bytes")
        return least, min(most, LARGEST)

    def _identity(self) -> bytes | None:
        found = self._ask("identity")
        if found is None:
            return None
        if isinstance(found, str):
            found = found.encode()
        if not isinstance(found, bytes) or not found:
            raise StoreError(self._device.text, "identity()", f"returned {found!r}, neither str nor bytes")
        return hashlib.blake2b(b"py:" + found, digest_size=16).digest()

    def _failed(self, name: str, error: BaseException) -> int:
        """The errno that answers a call that raised; tells each kind once."""
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        kind = (name, type(error), place and (place.tb_frame.f_code, place.tb_lineno))
        if kind not in self._said and len(self._said) < _MOST_KINDS:
            self._said.add(kind)
            log.error("store %s: %s() raised, which is told once of each kind", self._device.text, name, exc_info=error)
        number = error.errno if isinstance(error, OSError) else None
        return number if isinstance(number, int) and 0 < number <= _MOST_ERRNO else _EIO

    def _end(self) -> None:
        """Ends the threads, and then the object, if they have left it."""
        until = time.monotonic() + _CLOSE_PATIENCE
        if self._threads:
            self.store.end()
        threads = self._threads + self._asked
        for thread in threads if self._over.told else self._threads:
            if thread is not threading.current_thread():    # a call that ends its own server
                thread.join(max(0.0, until - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in threads)
        if stuck:
            log.warning("store %s: %d calls have not returned, so its close() is not called", self._device.text, stuck)
        elif callable(close := getattr(self._object, "close", None)):
            try:
                _within(min(self._timeout, _CLOSE_PATIENCE), self._device.text, "close", close, left=threads, ended=True)
            except StoreError as error:
                log.error("%s", error, exc_info=error.__cause__)
        self._claim.end(threads)

    def tell(self) -> None:
        late, (name, start, length, begun) = self.store.last_late
        now = time.monotonic()
        if late == self._late or now - self._told < _QUIET:
            return
        more = f" ({late - self._late - 1} more were late)" if late - self._late > 1 else ""
        self._late, self._told = late, now
        what = f"{name}()" if name == "flush" else f"{name}() of {length} bytes at {start}"
        if not begun:
            log.warning("store %s: no thread of its pool was free for %s within %g s: I/O error%s", self._device.text, what,
                        self._timeout, more)
        else:
            log.warning("store %s: %s has not answered within %g s: I/O error%s%s", self._device.text, what, self._timeout,
                        "" if name in ("pread", "flush") else "; writes there fail until it returns", more)

    def _whole(self, size: int) -> int:
        """Bytes of it in whole blocks."""
        return size // self.store.block_size * self.store.block_size

    def check_resize(self, size: int | None, force: bool) -> bool:
        if size is None:
            whole = self._whole(self._size())
            check_shrink(self.store.size, whole, force, found=True)
            return whole != self.store.size
        if not callable(getattr(self._object, "resize", None)):
            raise UsageError("its class has no method resize", value=self._device.text,
                             hint="without a SIZE the export takes over what get_size() returns by now")
        check_shrink(self.store.size, size, force)
        return size != self.store.size

    def resize(self, size: int | None, force: bool) -> None:
        self._asked[:] = [thread for thread in self._asked if thread.is_alive()]
        if size is not None and (left := self.store.abandoned + len(self._asked)):
            raise UsageError(f"{left} of its calls were late and have not returned: resize() runs beside no other",
                             value=self._device.text, hint="try again once they have, see `muenfast stat`")
        if size is not None:
            self._ask("resize", size)
        now = self._size()
        if size is not None and now < size:     # what a smaller one cuts off, nobody has agreed to; it may round up
            raise StoreError(self._device.text, "get_size()", f"returned {now} after resize({size}); without a SIZE the "
                                                              "export takes that over")
        if size is None:    # it may be another one than a moment ago
            check_shrink(self.store.size, self._whole(now), force, found=True)
        self.store.resize(now)
        self.left_over = now - self.store.size

    def hasten(self) -> None:
        self._over.told = True

    def close(self) -> None:
        self._end()
        self.store.close()


class _Claim:
    """An object that is served: once, unless nothing writes to it; until its calls have returned."""

    _all: ClassVar[list[_Claim]] = []
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, store: object, writes: bool, text: str) -> None:
        """Raises UsageError."""
        self._store, self._writes = store, writes
        self._threads: list[threading.Thread] | None = None     # after its end, those that may still be in a call
        with self._lock:
            self._all[:] = [each for each in self._all if each._threads is None or any(
                thread.is_alive() for thread in each._threads)]
            for each in self._all:
                if each._store is not store or not (each._writes or writes):
                    continue
                if each._threads is None:
                    raise UsageError("this object is served already, and one disk has one server", value=text,
                                     hint="give each server an object of its own, or all of them read_only")
                raise UsageError("calls of an earlier server have not returned from this object, and could undo what a new "
                                 "one acknowledges", value=text, hint="serve another object")
            self._all.append(self)

    def end(self, threads: Sequence[threading.Thread]) -> None:
        """threads: that may still be in a call of the object's."""
        with self._lock:
            self._threads = [thread for thread in threads if thread.is_alive()]
            if not self._threads:
                self._all.remove(self)


def _within(timeout: float, store: str, name: str, call: Callable[..., Any], *arguments: object,
            left: list[threading.Thread] | None = None, ended: bool = False, over: Ending = ending) -> Any:
    """What a user's code returns, in a thread of its own: what hangs keeps no server from ending.

    left: gets that thread where it was not waited for any longer. ended: wait for it though the process is to end. over:
    whether the server is. Raises StoreError.
    """
    ends: list[tuple[Any, BaseException | None]] = []
    process, until = os.getpid(), time.monotonic() + timeout

    def run() -> None:
        try:
            ends.append((call(*arguments), None))
        except BaseException as error:
            ends.append((None, error))
        if os.getpid() != process:
            leave_child(ends[0][1])

    thread = spawn(run, f"{store} {name}")
    while not ends and (rest := until - time.monotonic()) > 0 and (ended or not (ending.told or over.told)):
        thread.join(min(rest, _LOOK))
        if not thread.is_alive():
            break
    if not ends:
        if left is not None:
            left.append(thread)
        raise StoreError(store, _called(name), f"did not return within {timeout:g} s" if time.monotonic() >= until else
                         f"had not returned when the {'process' if ending.told else 'server'} was told to end")
    found, error = ends[0]
    if isinstance(error, (UsageError, StoreError)):
        raise error
    if error is not None:
        log.info("store %s", store, exc_info=error)
        raise StoreError(store, _called(name), f"raised {type(error).__name__}: {error}{_place(error)}") from error
    return found


def _place(error: BaseException) -> str:
    """Where it was raised, for messages."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno}; all of it with -v)" if frames else ""


def _called(name: str) -> str:
    return name if " " in name else f"{name}()"


def _make(device: Device, timeout: float) -> Any:
    """The object that py:MODULE:CLASS[:ARG] names."""
    found: Any = _within(timeout, device.text, "its module", _module, device)
    for name in device.attribute.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        module = sys.modules.get(device.module)
        where = getattr(module, "__file__", None) or "built in"
        hint = f"yours is ./{device.module}.py" if os.path.isfile(f"{device.module}.py") else None
        raise UsageError(f"module {device.module} has no class {device.attribute}"
                         + ("" if module is None else f" ({where})"), value=device.text, hint=hint)
    arguments = [] if device.argument is None else [device.argument]
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError:
        wants = "wants an argument: py:MODULE:CLASS:ARG" if device.argument is None else "takes no argument"
        raise UsageError(f"{device.attribute} {wants}", value=device.text) from None
    except ValueError:  # of what is written in C, nothing may be known
        pass
    return _within(timeout, device.text, device.attribute, found, *arguments)


def _module(device: Device) -> ModuleType:
    try:
        if device.module.endswith(".py") or "/" in device.module:
            return _file(device)
        here = os.getcwd()
        if here not in sys.path and not getattr(sys.flags, "safe_path", False):
            sys.path.append(here)   # at the end: what is there hides no module of the system's
        return importlib.import_module(device.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{device.module}.".startswith(f"{error.name}."):
            raise StoreError(device.text, "its module", f"could not be imported: {error}{_place(error)}") from error
        raise UsageError(f"there is no module {device.module}", value=device.text,
                         hint="modules are looked for in PYTHONPATH and the current directory; or give a path that ends in "
                              ".py") from None
    except UsageError:
        raise
    except Exception as error:
        log.info("store %s", device.text, exc_info=error)
        raise StoreError(device.text, "its module", f"could not be imported: {type(error).__name__}: {error}{_place(error)}"
                         ) from error


def _file(device: Device) -> ModuleType:
    """The module in a file; the same one for all stores of it."""
    path = os.path.realpath(device.module)
    if path in _files:
        return _files[path]
    name = "muenfast_store_" + hashlib.blake2b(path.encode(), digest_size=6).hexdigest()
    spec = importlib.util.spec_from_file_location(name, path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise UsageError(f"there is no file {device.module} that ends in .py", value=device.text)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _files[path] = module
    return module


def _takes(call: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many arguments."""
    try:
        inspect.signature(call).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # of what is written in C, nothing may be known
        return False
    return True
