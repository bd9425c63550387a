"""The Linux kernel modules whose work muenfast does, and their parameters, as modprobe(8) takes them.

Two generations of muenblock have different parameters; a command line belongs to one of them. Nothing here opens
anything. Another module is one entry more in MODULES, and one in cli/modprobe.py that serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from muenfast import params
from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast import shm

SHARED_PROTOCOL = 0x5155684453516F3D  # docs/protocol.md: of both channels beside a shared buffer

_FIELDS = ("ID", "REQ", "RESP", "BUFFER", "REQ_PROTOCOL", "RESP_PROTOCOL")
_CONNECTION = "a connection is ID:REQ:RESP:BUFFER, or ID:REQ:RESP:BUFFER:REQ_PROTOCOL:RESP_PROTOCOL"
_DEVICE = "a device is PATH:ID, the ID that of its connection"
_INEXPRESSIBLE = "name it through a symbolic link, or use `muenfast blk`"
_OWN_KINDS = ("ram", "null")  # backing/: kinds of disk that hold ':' themselves

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. type: as modinfo names it. aliases: other spellings that are in use."""

    name: str
    meaning: str
    type: str = "array of charp"
    required: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Module:
    """One module. name: with underscores, as the kernel has it. generations: the parameters of each, oldest first."""

    name: str
    description: str
    generations: tuple[tuple[Parameter, ...], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A checked command line. generation: index into module.generations. values: by the parameter's name. spelled: how
    each was spelled.
    """

    module: Module
    generation: int
    values: Mapping[str, str]
    spelled: Mapping[str, str]


_CHANNELS = (
    Parameter("req_shm_name", "names of the request channels, client to server"),
    Parameter("resp_shm_name", "names of the response channels, server to client"),
    Parameter("req_shm_protocol", "protocols of the request channels, hexadecimal (default 9570208dca77db19)",
              required=False),
    Parameter("resp_shm_protocol", "protocols of the response channels, hexadecimal (default 9851be3282fef0dc)",
              required=False))
_CONNECTIONS = Parameter("connections", "connections with a shared buffer (second generation); ID: any word; each "
                                        "ID:REQ:RESP:BUFFER[:REQ_PROTOCOL:RESP_PROTOCOL]")

_INTERFACES = (
    Parameter("name", "names of the interfaces, at most 32, each of at most 15 bytes"),
    Parameter("in", "channels that they read; an empty entry: the interface only sends", required=False),
    Parameter("out", "channels that they write; an empty entry: the interface only receives", required=False),
    Parameter("pmtu", "regions of path MTUs, of net_hdr (empty: no limits)", required=False),
    Parameter("mtu", "MTUs, decimal (default 1500)", required=False),
    Parameter("writer_protocol", "protocols of the channels in out, hexadecimal, required for each", required=False),
    Parameter("reader_protocol", "protocols of the channels in in, hexadecimal, required for each", required=False),
    Parameter("flags", "net_hdr: IP packets; eth_dev: an Ethernet device; several joined by +; none: raw", required=False),
    Parameter("poll", "milliseconds between polls of a channel without a bell, as the module waits, whose own text says "
                      "microseconds", "uint", required=False))

MODULES = {module.name: module for module in (
    Module("muenblock_client", "block devices /dev/muendiska, /dev/muendiskb, ... over channels: the client",
           (_CHANNELS, (_CONNECTIONS,))),
    Module("muenblock_server", "exports block devices over channels: the server",
           ((*_CHANNELS, Parameter("device_name", "disks, one for each pair of channels")),
            (_CONNECTIONS, Parameter("device", "disks of the connections (second generation), each PATH:ID; also "
                                               "spelled devices", aliases=("devices",))))),
    Module("muennet", "network interfaces over channels", (_INTERFACES,)))}


def command_name(module: Module) -> str:
    """The module's name as users write it."""
    return module.name.replace("_", "-")


def find(name: str) -> Module:
    """The module of that name; dashes and underscores are equal. Raises UsageError."""
    module = MODULES.get(name.replace("-", "_"))
    if module is None:
        raise UsageError(f"Module {name} not found: the modules are {', '.join(map(command_name, MODULES.values()))}",
                         hint="`muenfast modinfo MODULE` tells its parameters")
    return module


def parse(module: Module, words: Sequence[str]) -> Call:
    """The parameters of a command line: KEY=VALUE each, dashes and underscores equal in KEY, VALUE or the whole perhaps
    in double quotes, as the kernel takes them. Raises UsageError, in the kernel's words where it has some.
    """
    known = {spelling: (generation, parameter)
             for generation, group in enumerate(module.generations) for parameter in group
             for spelling in (parameter.name, *parameter.aliases)}
    tells = f"`muenfast modinfo {command_name(module)}` tells more"
    given: dict[str, tuple[str, int]] = {}  # parameter: as it was spelled, generation
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = _unquote(module, word).partition("=")
        spelled = key.replace("-", "_")
        if spelled not in known:
            raise UsageError(f"the module has {_names(known)}", option=f"{module.name}: unknown parameter", value=key,
                             hint=tells)
        if not equals:
            raise UsageError(f"{module.name}: `' invalid for parameter `{key}': a parameter is KEY=VALUE", hint=tells)
        generation, parameter = known[spelled]
        if parameter.name in given:
            first = given[parameter.name][0]
            twice = "twice" if first == spelled else f"twice, first as {first}"
            raise UsageError(f"given {twice}; the entries of a list are separated by commas", option=key, value=value)
        given[parameter.name] = (spelled, generation)
        values[parameter.name] = _unquote(module, value)
    generations = sorted({generation for _, generation in given.values()})
    if len(generations) > 1:
        one, other = (next(key for key, (_, generation) in given.items() if generation == each)
                      for each in generations[:2])
        raise UsageError(f"{module.name}: {one} and {other} belong to different generations of the module: "
                         "give one's parameters only", hint=tells)
    wanted = [[parameter.name for parameter in group if parameter.required and parameter.name not in given]
              for group in module.generations]
    if not generations:
        raise UsageError(f"{module.name}: no parameter is given; required are {', or '.join(map(_names, wanted))}",
                         hint=tells)
    [generation] = generations
    if wanted[generation]:
        raise UsageError(f"{module.name}: required and not given: {_names(wanted[generation])}", hint=tells)
    return Call(module, generation, values, {name: spelled for name, (spelled, _) in given.items()})


def _names(names: Sequence[str] | Mapping[str, object]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _unquote(module: Module, text: str) -> str:
    """Without the quotes around it, which reach us where a shell did not take them."""
    if not text.startswith('"'):
        return text
    if len(text) < 2 or not text.endswith('"'):
        raise UsageError("the quote has no end", option=module.name, value=text)
    return text[1:-1]


# ---- the second generation's lists


@dataclass(frozen=True, slots=True)
class Connection:
    """One entry of connections=: two channels and the buffer between them, entry `index` of the list.

    devices: server: the paths of its disks, in the order of the list, which is that of their numbers on the wire.
    entries: where each of them stands in the list.
    """

    id: str
    req: shm.Locator
    resp: shm.Locator
    buffer: shm.Locator
    index: int = 0
    req_protocol: int = SHARED_PROTOCOL
    resp_protocol: int = SHARED_PROTOCOL
    devices: tuple[str, ...] = ()
    entries: tuple[int, ...] = ()


def connections_from_lists(connections: str, device: str | None = None, *, called: str = "device") -> list[Connection]:
    """The connections of `connections=`, with their disks where `device=` is given (the server). called: what that one
    is called in messages. Raises UsageError.
    """
    from muenfast.connection import place

    option = "connections"
    found: list[Connection] = []
    for index, entry in enumerate(params.split(option, connections)):
        new = _connection(option, index, entry)
        for other in found:
            if other.id == new.id:
                raise UsageError(f"the ID {new.id!r} is that of entry {other.index}, too; each connection has its own",
                                 option=option, index=index, value=entry)
        found.append(new)
        params.apart([place(option, each.index, locator) for each in found
                      for locator in (each.req, each.resp, each.buffer)],
                     "a region is one channel or the buffer of one connection")
    return found if device is None else _with_devices(found, device, called)


def _connection(option: str, index: int, entry: str) -> Connection:
    from muenfast import shm

    fields = [field.strip() for field in entry.split(":")]
    if len(fields) > len(_FIELDS):
        raise UsageError(f"{_CONNECTION}; this has {len(fields)} fields: a path that holds ':' or ',' cannot be "
                         "expressed here", option=option, index=index, value=entry, hint=_INEXPRESSIBLE)
    if len(fields) not in (4, len(_FIELDS)):
        raise UsageError(f"{_CONNECTION}; {_FIELDS[len(fields)]} is missing", option=option, index=index, value=entry)
    for name, field in zip(_FIELDS, fields, strict=False):
        if not field:
            raise UsageError(f"{_CONNECTION}; {name} is empty", option=option, index=index, value=entry)

    def part(position: int, parse: Callable[[str], _T]) -> _T:
        try:
            return parse(fields[position])
        except UsageError as error:
            # With a path in it, its own ':' may be the reason, wherever that put the fields.
            hint = f"a path that holds ':' cannot be expressed here: {_INEXPRESSIBLE}" if "/" in entry else None
            raise UsageError(f"{_FIELDS[position]} is {fields[position]!r}: {error.rule}", option=option, index=index,
                             value=entry, hint=hint) from None

    req, resp, buffer = (part(position, shm.Locator.parse) for position in (1, 2, 3))
    protocols = [part(position, lambda text: params.protocol(None, None, text)) for position in range(4, len(fields))]
    req_protocol, resp_protocol = protocols or (SHARED_PROTOCOL, SHARED_PROTOCOL)
    return Connection(fields[0], req, resp, buffer, index, req_protocol, resp_protocol)


def _with_devices(connections: list[Connection], device: str, option: str) -> list[Connection]:
    disks: dict[str, list[tuple[int, str]]] = {each.id: [] for each in connections}
    for index, entry in enumerate(params.split(option, device)):
        path, colon, identifier = (part.strip() for part in entry.rpartition(":"))
        if not colon:
            raise UsageError(f"{_DEVICE}; this has none: a path that holds ',' cannot be expressed here",
                             option=option, index=index, value=entry, hint=_INEXPRESSIBLE)
        for name, part in (("PATH", path), ("ID", identifier)):
            if not part:
                raise UsageError(f"{_DEVICE}; {name} is empty", option=option, index=index, value=entry)
        if ":" in path and path.partition(":")[0] not in _OWN_KINDS:
            raise UsageError(f"{_DEVICE}; a path that holds ':' cannot be expressed here", option=option, index=index,
                             value=entry, hint=_INEXPRESSIBLE)
        if identifier not in disks:
            raise UsageError(f"no connection has the ID {identifier!r}; there is {_names(disks)}", option=option,
                             index=index, value=entry)
        disks[identifier].append((index, path))
    for each in connections:
        if not disks[each.id]:
            raise UsageError(f"the connection {each.id!r} has no device", option="connections", index=each.index,
                             value=each.id, hint=f"{option}=PATH:{each.id} gives it one")
    return [replace(each, devices=tuple(path for _, path in disks[each.id]),
                    entries=tuple(index for index, _ in disks[each.id])) for each in connections]
