"""A static policy: which subjects there are, and who may talk to whom, through which regions.

One TOML file says it all; nothing is opened here but that file. docs/policy.md has every table and key. What the file
declares is checked as a whole: each Finding names a table, a key and the rule; `enforcement` gives the regions of a policy
without findings to their users, and compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from muenfast import params, pathmtu, shm
from muenfast._net import FRAMINGS, LEAST_MTU, MOST_MTU, element_size
from muenfast._ring import layout
from muenfast.backing import BLOCK, DEFAULT_DEVICE, Device
from muenfast.channel import BELL, NETWORK_PROTOCOL, network_region_size
from muenfast.connection import (
    BUFFER_PROTOCOL,
    BUFFER_REQUEST_SIZE,
    BUFFER_RESPONSE_SIZE,
    BUFFER_SIZE,
    CHECKSUM_MODES,
    MOST_POLL,
    REGION_SIZE,
    REQUEST_PROTOCOL,
    RESPONSE_PROTOCOL,
)
from muenfast.errors import UsageError
from muenfast.export import LEAST_TIMEOUT, MOST_POOL, MOST_TIMEOUT
from muenfast.marks import MOST_CHILDREN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Bell", "Connection", "Finding", "Flow", "Interface", "Policy", "PolicyError", "Region", "Subject", "load"]

_LAYOUT = layout()
_HEADER: int = _LAYOUT["header_size"]
_NAME = 64              # characters of a table's name
MOST_BYTES = 16 << 20   # of a policy file


@dataclass(frozen=True, slots=True)
class Finding:
    """What a policy, or the system that should be as it says, gets wrong. where: the table ("channels.disk_req"), or a
    region's path. rule: what holds, and what is there instead."""

    where: str
    rule: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}"


class PolicyError(UsageError):
    """A policy with findings. path: its file."""

    def __init__(self, path: str, findings: Sequence[Finding]) -> None:
        self.path, self.findings = path, list(findings)
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        super().__init__(f"{findings[0]}{more}", option="--policy", value=path,
                         hint="`muenfast policy check` lists all of them")


@dataclass(frozen=True, slots=True)
class Subject:
    """user, group: names or numbers; group None: the user's own."""

    name: str
    user: str
    group: str | None = None

    @property
    def where(self) -> str:
        return f"subjects.{self.name}"


@dataclass(frozen=True, slots=True)
class Region:
    """A region that the policy declares.

    kind: "channel", "buffer" or "path MTUs". writers, readers: names of subjects; who may write may read, too. A region of
    path MTUs has no writer among the subjects: root writes it. size: bytes. protocol, element: of a channel, None: not
    said. bell: whether a channel has one, through which its reader wakes, and is told to, its writer.
    """

    name: str
    kind: str
    locator: shm.Locator
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    size: int
    protocol: int | None = None
    element: int | None = None
    bell: bool = True

    @property
    def where(self) -> str:
        return {"channel": "channels", "buffer": "buffers", "path MTUs": "path_mtus"}[self.kind] + f".{self.name}"

    @property
    def users(self) -> tuple[str, ...]:
        """All subjects that have to do with it."""
        return tuple(dict.fromkeys((*self.writers, *self.readers)))

    @property
    def owner(self) -> str | None:
        """The subject whose user owns it: its first writer; None: root."""
        return self.writers[0] if self.writers else None

    @property
    def shared_with(self) -> str | None:
        """The subject whose group has it: the one that is not its owner; None: nobody."""
        others = [user for user in self.users if user != self.owner]
        return others[0] if others else None

    @property
    def mode(self) -> int:
        """Permissions: the owner writes, the group reads or, of a buffer, writes."""
        if self.shared_with is None:
            return 0o600
        return 0o660 if len(self.writers) > 1 else 0o640


@dataclass(frozen=True, slots=True)
class Bell:
    """The bell beside a channel, which both of its sides write."""

    channel: Region
    locator: shm.Locator

    kind = "bell"
    size = BELL
    mode = 0o660
    readers: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.channel.where}, its bell"

    @property
    def writers(self) -> tuple[str, ...]:
        return self.channel.users

    @property
    def users(self) -> tuple[str, ...]:
        return self.channel.users

    @property
    def owner(self) -> str | None:
        return self.channel.owner

    @property
    def shared_with(self) -> str | None:
        return self.channel.shared_with


@dataclass(frozen=True, slots=True)
class Connection:
    """A block connection. devices: of the server, as `--device` takes them. paths: what else disks in Python reach. The
    rest as the lists of `muenfast blk`."""

    name: str
    client: str
    server: str
    request: str
    response: str
    buffer: str | None = None
    devices: tuple[str, ...] = (DEFAULT_DEVICE,)
    read_only: bool = False
    poll: int | None = None
    pool: int | None = None
    timeout: int | None = None
    paths: tuple[str, ...] = ()
    checksum: str = "off"

    @property
    def where(self) -> str:
        return f"connections.{self.name}"


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of a subject, named as its table. inp, out: channels. children: names of those that it may be
    given. The rest as the lists of `muenfast net`."""

    name: str
    subject: str
    inp: str | None = None
    out: str | None = None
    mtu: int = 1500
    flags: str = "net_hdr"
    pmtu: str | None = None
    netns: str | None = None
    carrier: str | None = None
    mac: str | None = None
    addr: str | None = None
    marks: str | None = None
    up: bool = False
    offload: bool = True
    poll: int | None = None
    children: tuple[str, ...] = ()
    checksum: str = "off"

    @property
    def where(self) -> str:
        return f"interfaces.{self.name}"

    @property
    def framing(self) -> str:
        return self.flags or "raw"


@dataclass(frozen=True, slots=True)
class Flow:
    """That what `source` knows may come to `target`, through a region (its key). kind: "channel", "bell", "buffer", or
    "path MTUs", whose source is the operator."""

    source: str
    target: str
    through: str
    kind: str


OPERATOR = "(root)"


@dataclass(frozen=True, slots=True)
class Policy:
    """What a file declares. All but `path` keyed by the name of their table."""

    path: str
    subjects: Mapping[str, Subject]
    regions: Mapping[str, Region]
    connections: Mapping[str, Connection]
    interfaces: Mapping[str, Interface]

    def objects(self) -> Iterator[Region | Bell]:
        """Everything that stands in shared memory, bells behind their channels."""
        for region in self.regions.values():
            yield region
            if region.kind == "channel" and region.bell and (place := region.locator.bell) is not None:
                yield Bell(region, place)

    def flows(self) -> list[Flow]:
        """Which subject's knowledge reaches which other one directly, as the file declares it."""
        found: list[Flow] = []
        for region in self.regions.values():
            if region.kind == "path MTUs":
                found += [Flow(OPERATOR, reader, region.name, region.kind) for reader in region.readers]
                continue
            for writer in region.writers:
                found += [Flow(writer, user, region.name, region.kind) for user in region.users if user != writer]
            if region.kind == "channel" and region.bell:
                found += [Flow(reader, writer, region.name, "bell") for reader in region.readers
                          for writer in region.writers if reader != writer]
        return found

    def reach(self, subject: str) -> list[str]:
        """The subjects that what one knows may come to, if all of those on the way pass it on."""
        edges: dict[str, list[str]] = {}
        for flow in self.flows():
            edges.setdefault(flow.source, []).append(flow.target)
        seen, ahead = [], list(edges.get(subject, ()))
        while ahead:
            name = ahead.pop(0)
            if name != subject and name not in seen:
                seen.append(name)
                ahead += edges.get(name, ())
        return sorted(seen)


# ------------------------------------------------------------------ reading a file

class _Table:
    """One table of the file: its keys are taken one by one, what is wrong with them noted, what is left is unknown."""

    def __init__(self, where: str, values: Any, findings: list[Finding]) -> None:
        self.where, self._findings = where, findings
        self._values: dict[str, Any] = {}
        if isinstance(values, dict):
            self._values = dict(values)
        else:
            self.wrong(f"is a table, [{where}]")

    def wrong(self, rule: str) -> None:
        self._findings.append(Finding(self.where, rule))

    def take(self, key: str, kind: type, what: str, default: Any = None, *, needed: bool = False) -> Any:
        """The value of a key, the default where it is missing or wrong, which is noted."""
        if key not in self._values:
            if needed:
                self.wrong(f"{key} is missing: {what}")
            return default
        value = self._values.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.wrong(f"{key} = {value!r}: {what}")
            return default
        return value

    def text(self, key: str, what: str, *, needed: bool = False) -> str | None:
        value = self.take(key, str, what, needed=needed)
        if value == "":
            self.wrong(f"{key} is empty: {what}")
            return None
        if value is not None and "\0" in value:     # no name that the system knows has one
            self.wrong(f"{key} = {value!r}: holds a NUL")
            return None
        return None if value is None else str(value)

    def texts(self, key: str, what: str) -> tuple[str, ...]:
        """A text, or a list of them."""
        value = self._values.pop(key, [])
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str) and entry for entry in entries):
            self.wrong(f"{key} = {value!r}: {what}")
            return ()
        if any("\0" in entry for entry in entries):
            self.wrong(f"{key} = {value!r}: holds a NUL")
            return ()
        return tuple(entries)

    def parsed(self, key: str, parse: Callable[[str], Any], what: str, default: Any = None) -> Any:
        """A value as a module's parameter would be parsed, from a text or a number."""
        value = self._values.pop(key, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            self.wrong(f"{key} = {value!r}: {what}")
            return default
        try:
            return parse(str(value))
        except UsageError as error:
            self.wrong(f"{key} = {value!r}: {error.rule}")
            return default

    def end(self, known: str) -> None:
        for key in self._values:
            self.wrong(f"{key} is no key of it: {known}")


def load(path: str) -> tuple[Policy, list[Finding]]:
    """A policy's file, and what is wrong with it as far as the file alone tells: only one without findings may be used.

    Raises OSError, and PolicyError where it is no TOML.
    """
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise PolicyError(path, [Finding("the file", f"has at most {MOST_BYTES} bytes")])
    try:
        content = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError(path, [Finding("the file", f"is no TOML: {error}")]) from error
    findings: list[Finding] = []
    policy = _policy(path, content, findings)
    if not findings:    # else what is missing would be told again, in other words
        findings += _validated(policy)
    return policy, findings


_SECTIONS = ("version", "subjects", "channels", "buffers", "path_mtus", "connections", "interfaces")


def _policy(path: str, content: dict[str, Any], findings: list[Finding]) -> Policy:
    top = _Table("the file", content, findings)
    version = top.take("version", int, "1, of this format", needed=True)
    if version not in (None, 1):
        top.wrong(f"version {version}: this muenfast reads version 1")

    def tables(section: str) -> Iterator[tuple[str, _Table]]:
        entries = top.take(section, dict, f"tables [{section}.NAME]", {})
        for name, values in entries.items():
            table = _Table(f"{section}.{name}", values, findings)
            if not 1 <= len(name) <= _NAME or not name.isprintable() or set(name) & set(" ,/()"):
                table.wrong(f"a name has 1 to {_NAME} characters, without blanks, commas, slashes and parentheses")
            yield name, table

    subjects = {name: _subject(name, table) for name, table in tables("subjects")}
    regions: dict[str, Region] = {}
    for section, make in (("channels", _channel), ("buffers", _buffer), ("path_mtus", _path_mtus)):
        for name, table in tables(section):
            if name in regions:
                table.wrong(f"the name is used twice: {regions[name].where} has it, too")
            elif (region := make(name, table)) is not None:
                regions[name] = region
    connections = {name: connection for name, table in tables("connections")
                   if (connection := _connection(name, table)) is not None}
    interfaces = {name: interface for name, table in tables("interfaces")
                  if (interface := _interface(name, table)) is not None}
    top.end(", ".join(_SECTIONS))
    policy = Policy(path, subjects, regions, connections, interfaces)
    return policy if findings else _completed(policy)


def _subject(name: str, table: _Table) -> Subject:
    user = table.text("user", "the user that it runs as, a name or a number in quotes", needed=True)
    group = table.text("group", "its group, a name or a number in quotes")
    table.end("user, group")
    return Subject(name, user or "", group)


def _locator(name: str, table: _Table) -> shm.Locator | None:
    text = table.text("region", "what names it: NAME (POSIX shared memory) or /path") or name
    try:
        locator = shm.Locator.parse(text)
    except UsageError as error:
        table.wrong(f"region {text!r}: {error.rule}")
        return None
    if locator.size is not None:
        table.wrong(f"region {text!r}: is a part of a file, which has the permissions of the whole: name a file of its own")
        return None
    return locator


def _size(text: str) -> int:
    return params.size(None, None, text)


def _protocol(text: str) -> int:
    return params.protocol(None, None, text)


def _number(least: int, most: int, what: str) -> Callable[[str], int]:
    return lambda text: params.number(None, None, text, least=least, most=most, what=what)


_POLL = _number(1, MOST_POLL, "a pause in microseconds")


def _channel(name: str, table: _Table) -> Region | None:
    writers = table.texts("writer", "the subject that writes it")
    readers = table.texts("reader", "the subject that reads it")
    if len(writers) > 1:
        table.wrong(f"two writers, {' and '.join(writers)}: a channel has one")
    if len(readers) > 1:
        table.wrong(f"several readers, {' and '.join(readers)}: the permissions of a file tell one reader from all others")
    if not writers:
        table.wrong("writer is missing: the subject that writes it")
    if not readers:
        table.wrong("reader is missing: the subject that reads it")
    locator = _locator(name, table)
    size = table.parsed("size", _size, "a size like \"1M\"", 0)
    protocol = table.parsed("protocol", _protocol, "a hexadecimal number in quotes")
    element = table.parsed("element", _size, "the bytes of an element")
    bell = table.take("bell", bool, "true, or false: strict one-way", True)
    table.end("writer, reader, region, size, protocol, element, bell")
    if locator is None or len(writers) != 1 or len(readers) != 1:
        return None
    return Region(name, "channel", locator, writers, readers, size, protocol, element, bell)


def _buffer(name: str, table: _Table) -> Region | None:
    users = table.texts("users", "the two subjects that share it")
    locator = _locator(name, table)
    size = table.parsed("size", _size, "a size like \"16M\"", BUFFER_SIZE)
    table.end("users, region, size")
    if len(users) != 2 or users[0] == users[1]:
        table.wrong("users: a buffer is shared by two subjects, the client and the server of one connection")
        return None
    return None if locator is None else Region(name, "buffer", locator, users, (), size)


def _path_mtus(name: str, table: _Table) -> Region | None:
    readers = table.texts("reader", "the subject whose interfaces it is for")
    locator = _locator(name, table)
    size = table.parsed("size", _size, "a size like \"4096\"", pathmtu.BYTES)
    table.end("reader, region, size")
    if len(readers) != 1:
        table.wrong("reader: the subject whose interfaces it is for, one")
        return None
    return None if locator is None else Region(name, "path MTUs", locator, (), readers, size)


def _connection(name: str, table: _Table) -> Connection | None:
    client = table.text("client", "the subject that has the disks", needed=True)
    server = table.text("server", "the subject that serves them", needed=True)
    request, response = (table.text(key, f"the channel of {key}s; a connection needs both directions", needed=True)
                         for key in ("request", "response"))
    buffer = table.text("buffer", "the buffer of a connection of the second generation")
    devices = table.texts("device", "what is served, as --device takes it; several over a buffer") or (DEFAULT_DEVICE,)
    read_only = table.take("read_only", bool, "true or false", False)
    poll = table.parsed("poll", _POLL, "microseconds")
    pool = table.parsed("pool", _number(1, MOST_POOL, "a number of threads"), "threads of a disk written in Python")
    timeout = table.parsed("timeout", _number(LEAST_TIMEOUT, MOST_TIMEOUT, "a time in seconds"),
                           "seconds that such a disk has for an answer")
    paths = table.texts("paths", "files and folders that its disks in Python read and write")
    for path in paths:
        if not path.startswith("/") or os.path.realpath(path) == "/":
            table.wrong(f"paths, {path}: is a path from / on, and not / itself")
    checksum = _checksum(table)
    table.end("client, server, request, response, buffer, device, read_only, poll, pool, timeout, paths, checksum")
    if client is None or server is None or request is None or response is None:
        return None
    return Connection(name, client, server, request, response, buffer, devices, read_only, poll, pool, timeout, paths,
                      checksum)


def _checksum(table: _Table) -> str:
    checksum = str(table.take("checksum", str, ", ".join(CHECKSUM_MODES), "off"))
    if checksum not in CHECKSUM_MODES:
        table.wrong(f"checksum = {checksum!r}: {', '.join(CHECKSUM_MODES)}")
        return "off"
    return checksum


def _interface(name: str, table: _Table) -> Interface | None:
    subject = table.text("subject", "the subject whose interface it is", needed=True)
    inp, out = (table.text(key, f"the channel that packets {way}") for key, way in (("in", "come by"), ("out", "go by")))
    flags = table.take("flags", str, "net_hdr, eth_dev or \"\" (raw)", "net_hdr")
    if (flags or "raw") not in FRAMINGS:
        table.wrong(f"flags = {flags!r}: net_hdr, eth_dev or \"\" (raw)")
        flags = "net_hdr"
    mtu = table.parsed("mtu", _number(LEAST_MTU, MOST_MTU - (14 if flags == "eth_dev" else 0), "an MTU"), "bytes", 1500)
    texts = {key: table.text(key, f"as --{key} takes it") for key in ("pmtu", "netns", "carrier", "mac", "addr", "marks")}
    up = table.take("up", bool, "true or false", False)
    offload = table.take("offload", bool, "true or false", True)
    poll = table.parsed("poll", _POLL, "microseconds")
    children = table.texts("children", "names of interfaces that `muennet_cfg add_child` may make")
    checksum = _checksum(table)
    table.end("subject, in, out, mtu, flags, pmtu, netns, carrier, mac, addr, marks, up, offload, poll, children, checksum")
    if inp is None and out is None:
        table.wrong("has neither in nor out")
    if subject is None:
        return None
    return Interface(name, subject, inp, out, mtu, flags, up=up, offload=offload, poll=poll,
                     children=children, checksum=checksum, **texts)


# ------------------------------------------------------------------ what follows from the rest

def _block_elements(connection: Connection) -> tuple[int, int]:
    """Bytes of an element of its request and of its response channel."""
    if connection.buffer is None:
        return _LAYOUT["event_size"], _LAYOUT["event_size"]
    return _LAYOUT["buffer_request_size"], _LAYOUT["buffer_response_size"]


def _completed(policy: Policy) -> Policy:
    """With the size, protocol and element of each channel that has none of its own, by what it is used for."""
    regions = dict(policy.regions)

    def complete(name: str | None, protocol: int, element: int, size: int) -> None:
        region = regions.get(name or "")
        if region is not None and region.kind == "channel":
            regions[region.name] = replace(region, size=region.size or size, element=region.element or element,
                                           protocol=protocol if region.protocol is None else region.protocol)

    for connection in policy.connections.values():
        shared = connection.buffer is not None
        elements = _block_elements(connection)
        complete(connection.request, BUFFER_PROTOCOL if shared else REQUEST_PROTOCOL, elements[0],
                 BUFFER_REQUEST_SIZE if shared else REGION_SIZE)
        complete(connection.response, BUFFER_PROTOCOL if shared else RESPONSE_PROTOCOL, elements[1],
                 BUFFER_RESPONSE_SIZE if shared else REGION_SIZE)
    for interface in policy.interfaces.values():
        element = element_size(interface.framing, interface.mtu)
        for channel in (interface.inp, interface.out):
            complete(channel, NETWORK_PROTOCOL, element, network_region_size(element))
    return replace(policy, regions={name: replace(region, size=region.size or REGION_SIZE)
                                    for name, region in regions.items()})


# ------------------------------------------------------------------ what a validator sees

def _validated(policy: Policy) -> list[Finding]:
    """What is wrong with a policy whose tables are all right one by one."""
    return [*_subjects(policy), *_regions(policy), *_connections(policy), *_interfaces(policy), *_devices(policy)]


def _subjects(policy: Policy) -> Iterator[Finding]:
    users: dict[str, str] = {}
    for subject in policy.subjects.values():
        first = users.setdefault(subject.user, subject.name)
        if first != subject.name:
            yield Finding(subject.where, f"has the user {subject.user} as subjects.{first} does: the kernel could not keep "
                                         "them apart, so that each would have the other's flows, which no line declares")
        if subject.user in ("root", "0"):
            yield Finding(subject.where, "runs as root, whom no permission keeps out: it would have every flow, which no "
                                         "line declares")


def _regions(policy: Policy) -> Iterator[Finding]:
    spans: list[tuple[str, str]] = []
    for region in policy.regions.values():
        for role, names in (("writer", region.writers), ("reader", region.readers)):
            for name in names:
                if name not in policy.subjects:
                    yield Finding(region.where, f"its {role} {name} is no subject of this policy")
        if region.kind == "channel" and region.writers == region.readers:
            yield Finding(region.where, f"its reader can write: {region.readers[0]} is both ends of a one-way channel")
        if region.kind == "channel" and region.protocol is not None and region.element is None:
            yield Finding(region.where, "has a protocol, but no element: say how many bytes one has")
        if region.kind == "channel" and region.size < _HEADER + (region.element or 1):
            yield Finding(region.where, f"size {region.size} holds no element: the header has {_HEADER} bytes, "
                                        f"an element {region.element or 1}")
        if region.kind == "buffer" and (region.size < BLOCK or region.size % BLOCK):
            yield Finding(region.where, f"size {region.size} is no multiple of {BLOCK}, the bytes of a block")
        if region.kind == "path MTUs" and region.size % 4:
            yield Finding(region.where, f"size {region.size} is no multiple of 4, the bytes of each mark")
        for path in _paths(region):
            for where, other in spans:
                if path == other:
                    yield Finding(region.where, f"the region is used twice: {where} means {path}, too")
            spans.append((region.where, path))


def _paths(region: Region) -> Iterator[str]:
    yield os.path.realpath(region.locator.path)
    if region.kind == "channel" and (bell := region.locator.bell) is not None:
        yield os.path.realpath(bell.path)


def _ends(policy: Policy, where: str, key: str, name: str, kind: str, *, writer: str | None, reader: str | None,
          protocol: int | None = None, element: int | None = None) -> Iterator[Finding]:
    """What is wrong with the region that an entry names: there, of that kind, written and read by whom it must be."""
    region = policy.regions.get(name)
    if region is None or region.kind != kind:
        yield Finding(where, f"{key} {name} is no {kind} of this policy")
        return
    for role, subject, declared in (("writer", writer, region.writers), ("reader", reader, region.readers)):
        if subject is not None and subject not in declared:
            yield Finding(where, f"a flow that no line declares: {subject} would be the {role} of {name}, which is "
                                 f"{' and '.join(declared) or 'nobody'}")
    if protocol is not None and region.protocol != protocol:
        yield Finding(region.where, f"protocol {region.protocol or 0:x}: {where} needs {protocol:x}")
    if element is not None and region.element != element:
        yield Finding(region.where, f"element {region.element}: {where} has {element} bytes in each")


def _known(policy: Policy, where: str, roles: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    for role, name in roles:
        if name not in policy.subjects:
            yield Finding(where, f"its {role} {name} is no subject of this policy")


def _both_ring(policy: Policy, where: str, *names: str | None) -> Iterator[Finding]:
    channels = [policy.regions[name] for name in names if name is not None and name in policy.regions]
    if len({channel.bell for channel in channels if channel.kind == "channel"}) > 1:
        yield Finding(where, f"of {' and '.join(channel.name for channel in channels)} one has a bell and one has none: "
                             "strict one-way are both, or neither")


def _used(name: str, where: str) -> str:
    return f"{name} is in use by {where}: a region serves one direction of one of them"


def _used_once(entries: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """entries: (where, region's name)."""
    first: dict[str, str] = {}
    for where, name in entries:
        if name in first:
            yield Finding(where, _used(name, first[name]))
        first.setdefault(name, where)


def _connections(policy: Policy) -> Iterator[Finding]:
    for each in policy.connections.values():
        yield from _known(policy, each.where, (("client", each.client), ("server", each.server)))
        if each.client == each.server:
            yield Finding(each.where, f"{each.client} is its own server: a connection has two sides")
        elements = _block_elements(each)
        yield from _ends(policy, each.where, "request", each.request, "channel", writer=each.client, reader=each.server,
                         element=elements[0])
        yield from _ends(policy, each.where, "response", each.response, "channel", writer=each.server, reader=each.client,
                         element=elements[1])
        if each.buffer is not None:
            yield from _ends(policy, each.where, "buffer", each.buffer, "buffer", writer=each.client, reader=None)
            yield from _ends(policy, each.where, "buffer", each.buffer, "buffer", writer=each.server, reader=None)
        yield from _both_ring(policy, each.where, each.request, each.response)
        if each.buffer is None and len(each.devices) > 1:
            yield Finding(each.where, f"has {len(each.devices)} devices: inline channels carry one disk, a connection with "
                                      "a buffer several")
        for text in each.devices:
            try:
                Device.parse(text)
            except UsageError as error:
                yield Finding(each.where, f"device {text!r}: {error.rule}")


def _interfaces(policy: Policy) -> Iterator[Finding]:
    for each in policy.interfaces.values():
        yield from _known(policy, each.where, (("subject", each.subject),))
        for called in (each.name, *each.children):
            try:
                params.interface(None, None, called)
            except UsageError as error:
                yield Finding(each.where, error.rule if called == each.name else f"children, {called}: {error.rule}")
        yield from _family(policy, each)
        element = element_size(each.framing, each.mtu)
        if each.inp is not None:
            yield from _ends(policy, each.where, "in", each.inp, "channel", writer=None, reader=each.subject,
                             element=element)
        if each.out is not None:
            yield from _ends(policy, each.where, "out", each.out, "channel", writer=each.subject, reader=None,
                             element=element)
        yield from _both_ring(policy, each.where, each.inp, each.out)
        if each.pmtu is not None:
            yield from _ends(policy, each.where, "pmtu", each.pmtu, "path MTUs", writer=None, reader=each.subject)
    # The two ends of a channel are entries of their own, of two subjects.
    yield from _used_once((each.where, name) for each in policy.connections.values()
                          for name in (each.request, each.response, each.buffer) if name is not None)
    yield from _used_once((each.where, each.inp) for each in policy.interfaces.values() if each.inp is not None)
    yield from _used_once((each.where, each.out) for each in policy.interfaces.values() if each.out is not None)
    of_disks = {name: each.where for each in policy.connections.values()
                for name in (each.request, each.response, each.buffer) if name is not None}
    for interface in policy.interfaces.values():
        for name in (interface.inp, interface.out):
            if name in of_disks:
                yield Finding(interface.where, _used(name, of_disks[name]))


def _family(policy: Policy, each: Interface) -> Iterator[Finding]:
    if each.children and each.framing != "net_hdr":
        yield Finding(each.where, "has children: only packets of net_hdr carry the marks that tell whose they are")
    if len(each.children) > MOST_CHILDREN:
        yield Finding(each.where, f"has {len(each.children)} children: an interface has at most {MOST_CHILDREN}")
    taken = [name for other in policy.interfaces.values() if other.subject == each.subject
             for name in (other.name, *(other.children if other.name < each.name else ()))]
    for at, name in enumerate(each.children):
        if name in taken or name in each.children[:at]:
            yield Finding(each.where, f"children: {name} is an interface of {each.subject} already")


def _devices(policy: Policy) -> Iterator[Finding]:
    """Disks that carry what one client writes to another one, or are a subject's region."""
    regions = {os.path.realpath(region.locator.path): region.where for region in policy.regions.values()}
    seen: list[tuple[Connection, str, str, int]] = []
    for each in policy.connections.values():
        for text in each.devices:
            try:
                device = Device.parse(text)
            except UsageError:
                continue    # _connections() says so
            path = device.path if device.kind == "file" else shm.Locator.parse(device.name).path if device.name else None
            if path is None:    # nobody else can have it
                continue
            path = os.path.realpath(path)
            if path in regions:
                yield Finding(each.where, f"device {text!r} is a region: {regions[path]}")
            for other, first, place, partition in seen:
                if path == place and (partition == device.partition or 0 in (partition, device.partition)) and \
                        not (each.read_only and other.read_only):
                    yield Finding(each.where, "a flow that no line declares: what is written through this connection or "
                                              f"{other.where} is read through the other: {text!r} and {first!r} are one "
                                              "disk")
            seen.append((each, text, path, device.partition))
