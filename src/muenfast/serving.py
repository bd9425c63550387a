"""A block server whose exports have names, and come and go while others run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from muenfast import params, shm
from muenfast._ring import Watch
from muenfast.backing import BLOCK, DEFAULT_DEVICE, Device
from muenfast.blk import BlockServer
from muenfast.connection import Options, channels_from_lists, place
from muenfast.control import Command
from muenfast.errors import MuenfastError, UsageError
from muenfast.export import Export, ExportConfig, check_devices, of_store
from muenfast.lookout import Lookout, watching

log = logging.getLogger("muenfast")

MOST_NAME = 31  # characters: kmod-dblock's limit

_Regions = list[tuple[str, int, str, str, int, float]]  # as place() tells them

_TEXTS = ("req", "resp", "shm", "size", "shm_size", "req_protocol", "resp_protocol", "checksum")
_STORE = ("pool", "timeout", "inject")  # of which an export's disks have one each


def check_name(name: str, option: str = "NAME") -> str:
    """The name of an export. Raises UsageError."""
    if not 1 <= len(name) <= MOST_NAME:
        raise UsageError(f"an export's name has 1 to {MOST_NAME} characters, this has {len(name)}", option=option,
                         value=name)
    if not name.isprintable() or " " in name:
        raise UsageError("an export's name has no blanks or control characters", option=option, value=name)
    if name.isdecimal():
        raise UsageError("an export's name is no number, for that would be an ID", option=option, value=name)
    return name


def config_of(*, device: Sequence[str] | None = None, read_only: bool = False, poll: int | None = None,
              strict_oneway: bool = False, **lists: str | None) -> ExportConfig:
    """One export. device: its disks, several only over a buffer. lists: `req`, `resp`, and what channels_from_lists takes
    besides, one entry each. Raises UsageError."""
    called = Options()
    for name in (*_TEXTS, "pool", "timeout"):
        if (text := lists.get(name)) is not None and "," in text:
            raise UsageError("one export has one entry here", option="--" + name.replace("_", "-"), value=text)
    req, resp = lists.get("req"), lists.get("resp")
    assert req is not None and resp is not None
    [channels] = channels_from_lists(
        req, resp, buffer=lists.get("shm"), buffer_size=lists.get("shm_size"), size=lists.get("size"), poll=poll,
        req_protocol=lists.get("req_protocol"), resp_protocol=lists.get("resp_protocol"), bells=not strict_oneway,
        checksum=lists.get("checksum") or "off", options=called)
    texts = list(device or [DEFAULT_DEVICE])
    if len(texts) > 1 and channels.buffer is None:
        raise UsageError("inline channels carry one disk", option=called.device, index=1, value=texts[1],
                         hint=f"a connection with a shared buffer ({called.buffer}) has several")
    first, *further = (Device.parse(text, option=called.device, index=index) for index, text in enumerate(texts))
    pool, timeout, faults = of_store([first, *further], called, **{name: lists.get(name) for name in _STORE})
    config = ExportConfig(channels, first, read_only, further=tuple(further), entries=tuple(range(len(texts))), pool=pool,
                          timeout=timeout, faults=faults)
    check_devices([config])
    return config


class ControlledServer(BlockServer):
    """A BlockServer whose exports have a name and a number each; more of them may be created, and any destroyed.

    The exports of `configs` are named after their request channels where that is a name and free, else exportN. Numbers
    begin with 1 and are not used again. create(), destroy() and resize() may be called by any thread; one at a time is
    under way for each export, and none of them waits for another export's. close() waits for all.
    """

    def __init__(self, configs: Sequence[ExportConfig], *, threads: int | None = None,
                 cpus: Sequence[int] = ()) -> None:
        self._since = time.monotonic()
        self._books = threading.Condition(threading.Lock())     # of what follows, and `exports`; held for moments only
        self._named: dict[int, tuple[str, Export]] = {}
        self._regions: dict[int, _Regions] = {}
        self._coming: dict[str, _Regions] = {}      # names that are being created
        self._busy: set[int] = set()                # numbers of which an operation is under way
        self._last = 0
        self._over = False
        self._created: list[Export] = []
        self._poller: Watch | None = None
        self._names: Lookout | None = None
        super().__init__(configs, threads=threads, cpus=cpus)
        with ExitStack() as stack:
            stack.push(self._stack)         # entered last, left first: what was created goes before what was there
            self._own = stack.enter_context(ExitStack())
            stack.callback(self._end_created)
            self._stack = stack.pop_all()
        for export in self.exports:
            self._enter(self._free_name(export), export, _regions_of(export.config))

    # -------------------------------------------------------------- the books

    def _free_name(self, export: Export) -> str:
        taken = {name for name, _ in self._named.values()}
        text = export.config.channels.req.text
        try:
            if check_name(text) not in taken:
                return text
        except UsageError:
            pass
        number = self._last + 1
        while (name := f"export{number}") in taken:
            number += 1
        return name

    def _enter(self, name: str, export: Export, regions: _Regions) -> int:
        """Precondition: `_books` is held, or nobody else knows of them yet."""
        self._last += 1
        self._named[self._last] = (name, export)
        self._regions[self._last] = regions
        return self._last

    def _all(self) -> list[tuple[int, str, Export]]:
        with self._books:
            return self._entries()

    def _entries(self) -> list[tuple[int, str, Export]]:
        return [(number, name, export) for number, (name, export) in self._named.items()]

    def find(self, which: str) -> tuple[int, str, Export]:
        """An export by its name, or by its number. Raises UsageError."""
        return self._found(which, self._all())

    @staticmethod
    def _found(which: str, entries: list[tuple[int, str, Export]]) -> tuple[int, str, Export]:
        for entry in entries:
            if which in (entry[1], str(entry[0])):
                return entry
        there = ", ".join(name for _, name, _ in entries[:20]) + (", ..." if len(entries) > 20 else "")
        raise UsageError("there is no export of that name or number", option="NAME", value=which,
                         hint=f"there is {there}" if entries else "there is none at all")

    @staticmethod
    def entry(number: int, name: str, export: Export) -> dict[str, Any]:
        """What `ctl` shows of an export, its counters aside."""
        config, channels = export.config, export.config.channels
        disks = [{"device": device.text, "size": size} for device, size in zip(config.devices, export.sizes, strict=True)]
        return {"id": number, "name": name, "req": channels.req.text, "resp": channels.resp.text,
                "shm": None if channels.buffer is None else channels.buffer.text, "read_only": export.read_only,
                "size": sum(size for size in export.sizes), "device": ",".join(device.text for device in config.devices),
                "disks": disks, "state": export.state}

    def status(self) -> list[dict[str, Any]]:
        """One entry per export."""
        return [{"id": number, "name": name, **export.status()} for number, name, export in self._all()]

    # -------------------------------------------------------------- operations

    def _begin(self) -> None:
        """Precondition: `_books` is held. Raises UsageError."""
        if self._over:
            raise UsageError("the process is ending")

    @contextmanager
    def _alone(self, which: str | None, *, end: bool = False) -> Iterator[list[tuple[int, str, Export]]]:
        """The export of that name or number, None: all there are; within, no other operation on them is under way. end: one
        that is is made to end. Raises UsageError."""
        with self._books:
            while True:
                self._begin()
                chosen = self._entries() if which is None else [self._found(which, self._entries())]
                busy = [export for number, _, export in chosen if number in self._busy]
                if not busy:
                    break
                for export in busy if end else ():
                    export.stop()
                self._books.wait()
            numbers = {number for number, _, _ in chosen}
            self._busy |= numbers
        try:
            yield chosen
        finally:
            with self._books:
                self._busy -= numbers
                self._books.notify_all()

    def create(self, name: str, **options: Any) -> dict[str, Any]:
        """Serves one export more, or nothing is left of it; its entry. options: as config_of(); channels are by default
        NAME_req and NAME_resp. Raises UsageError, ClaimError, PeerError, OSError."""
        check_name(name)
        options["req"] = options.get("req") or f"{name}_req"
        options["resp"] = options.get("resp") or f"{name}_resp"
        config = config_of(**options)
        regions = _regions_of(config)
        with self._books:
            self._begin()
            if name in self._coming or any(name == other for _, other, _ in self._entries()):
                raise UsageError("there is an export of that name", option="NAME", value=name,
                                 hint=f"`muenfast ctl destroy {name}` ends it")
            self._check_regions(regions)
            watch, names = self._watching()
            self._coming[name] = regions
        try:
            export = Export(config, watch=watch, cpu=self._cpus.next())
            try:
                export.heed(names)
                export.start()
            except BaseException:
                export.close()
                raise
            with self._books:
                self._created.append(export)
                self.exports.append(export)
                number = self._enter(name, export, regions)
        finally:
            with self._books:
                del self._coming[name]
                self._books.notify_all()
        log.info("export %s: created as %s", export.name, name)
        return self.entry(number, name, export)

    def _check_regions(self, regions: _Regions) -> None:
        """Raises UsageError where another export has one of the regions. Other processes' are seen by their claims.
        Precondition: `_books` is held."""
        taken = [(self._named[number][0], each) for number, theirs in self._regions.items() for each in theirs]
        taken += [(name, each) for name, theirs in self._coming.items() for each in theirs]
        for option, index, text, path, start, end in regions:
            for name, (*_, other, first, last) in taken:
                if path == other and start < last and first < end:
                    raise UsageError(f"a region is one channel or the buffer of one connection; export {name} has it",
                                     option=option, index=index, value=text)

    def _watching(self) -> tuple[Watch, Lookout | None]:
        """One thread polls for all that were created, while they are idle, and one is told of their names. Precondition:
        `_books` is held."""
        if self._poller is None:
            if self._names is None:     # else there was no thread for the watch, the last time
                self._names = self._lookout(self._own, 2)
            self._poller = watching(self._own, "watch of created exports")
        return self._poller, self._names

    def destroy(self, which: str | None = None, *, force: bool = False) -> list[dict[str, Any]]:
        """Ends an export, None: all, for good: its client is told. Their entries. Raises UsageError where there is none, or
        (unless force) MuenfastError where a client is attached; then nothing was ended."""
        with self._alone(which, end=force) as chosen:
            for _, name, export in chosen:
                if not force and (client := _client_of(export)) is not None:
                    raise MuenfastError(f"export {name} has {client} attached (--force ends it all the same)")
            entries = [self.entry(*each) for each in chosen]
            for _, name, export in chosen:
                client = _client_of(export)
                if client is None:
                    log.info("export %s: %s is destroyed", export.name, name)
                else:
                    log.warning("export %s: %s is destroyed, though it has %s attached", export.name, name, client)
            for _, _, export in chosen:     # all, before the first is waited for
                export.stop()
            with ExitStack() as stack:
                for number, _, export in chosen:
                    stack.callback(self._forget, number, export)
                    stack.callback(export.close, gone=True)
            return entries

    def _forget(self, number: int, export: Export) -> None:
        with self._books:
            del self._named[number], self._regions[number]
            self.exports.remove(export)
            if export in self._created:
                self._created.remove(export)

    def resize(self, which: str, size: str | None = None, *, disk: int = 0, force: bool = False) -> dict[str, Any]:
        """Gives a disk of an export another size, or without one what is behind it has by now; its entry, with `changed`.
        Raises UsageError, OSError; the disk is as it was then."""
        with self._alone(which) as chosen:
            [(number, name, export)] = chosen
            if disk >= len(export.backings):
                raise UsageError(f"export {name} has no disk of that number: they are 0 to {len(export.backings) - 1}",
                                 option="--disk", value=disk)
            block = export.backings[disk].store.block_size
            wanted = None if size is None else params.size("SIZE", None, size, multiple=block, least=BLOCK)
            try:
                changed = export.resize(disk, wanted, force=force)
            except UsageError as error:
                if error.option is not None:
                    raise
                what, value = ("NAME", which) if size is None else ("SIZE", size)
                raise UsageError(error.rule, option=what, value=value, hint=error.hint) from error
            except OSError as error:
                what = f"NAME {which!r}" if size is None else f"SIZE {size!r}"
                raise OSError(error.errno, f"{what}: {error.strerror}", error.filename) from error
            return {**self.entry(number, name, export), "changed": changed}

    # -------------------------------------------------------------- what may be asked

    def commands(self) -> dict[str, Command]:
        """For a ControlServer."""
        create = {**dict.fromkeys(("name", *_TEXTS, *_STORE), "text"), "device": "texts", "read_only": "flag",
                  "poll": "number", "strict_oneway": "flag"}
        return {
            "list": Command(lambda: {"exports": [self.entry(*each) for each in self._all()]}),
            "show": Command(self._show, {"name": "text"}),
            "create": Command(lambda **fields: {"export": self.create(**fields)}, create, frozenset(("name",)),
                              quick=False),
            "destroy": Command(self._destroy, {"name": "text", "every": "flag", "force": "flag"}, quick=False),
            "resize": Command(lambda name, **fields: {"export": self.resize(name, **fields)},
                              {"name": "text", "size": "text", "disk": "number", "force": "flag"}, frozenset(("name",)),
                              quick=False)}

    def _show(self, name: str | None = None) -> dict[str, Any]:
        chosen = self._all() if name is None else [self.find(name)]
        return {"exports": [{**export.status(), **self.entry(number, name, export)} for number, name, export in chosen]}

    def _destroy(self, name: str | None = None, every: bool = False, force: bool = False) -> dict[str, Any]:
        if (name is None) != every:
            raise UsageError("either a name or number is destroyed, or all (--all)", option="NAME", value=name)
        return {"exports": self.destroy(name, force=force)}

    @property
    def uptime(self) -> float:
        """Seconds."""
        return time.monotonic() - self._since

    # -------------------------------------------------------------- the end

    def _end_created(self) -> None:
        with self._books:           # what is under way is finished first, and made to
            self._over = True
            for export in self.exports:
                export.stop()
            while self._coming or self._busy:
                self._books.wait()
        for export in self._created:
            export.stop()
        for export in self._created:
            export.close()


def _regions_of(config: ExportConfig) -> _Regions:
    return [place(option, 0, locator) for option, locator in config.channels.regions]


def _client_of(export: Export) -> str | None:
    """Who is attached, None: nobody. A muenfast client is from its claim on, also while it connects, or does so anew."""
    found = shm.writer_holder(export._ends[0].region)
    if found is not None:
        return f"its client, process {found['pid']},"
    return "a client" if export.server.attached else None
