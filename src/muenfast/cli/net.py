"""muenfast net: network interfaces over channels, and what they do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from muenfast import params
from muenfast.cli._declared import Role, Watched, add_policy_options, by_policy, declared
from muenfast.cli._serving import Stop, add_cpus, cpus, notify, patience, say_ready, sweep
from muenfast.cli._text import word
from muenfast.errors import MuenfastError, UsageError

if TYPE_CHECKING:
    from muenfast.broker import Broker
    from muenfast.declared import Declared
    from muenfast.net import Interface, InterfaceConfig
    from muenfast.ports import Makers
    from muenfast.sandbox import Files

LISTS = ("name", "inp", "out", "reader_protocol", "writer_protocol", "mtu", "pmtu", "flags", "netns", "size", "carrier",
         "mac", "addr")
_DECIDED = (*LISTS, "poll", "peer", "strict_oneway", "up", "no_offload", "marks", "checksum")


def _broker(part: Declared, only: list[str] | None) -> Broker:
    from muenfast.broker.net import of_interfaces

    return of_interfaces(part.interfaces(only), part.children())


def _bounds(part: Declared, only: list[str] | None) -> tuple[Files, bool]:
    return part.files_of_interfaces(only), False


_ROLE = Role(_DECIDED, ("muenfast.doctor", "muenfast.net", "muenfast.control", "muenfast.broker.net", "pyroute2",
                        "pyroute2.netlink.exceptions"), _bounds, _broker)
_SERVING = (*_DECIDED, "policy", "subject", "only", "no_sandbox", "quarantine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The interfaces' lists, and `show`."""
    add = parser.add_argument
    add("words", nargs="*", metavar="show [NAME] | pmtu show REGION | pmtu set REGION MARK BYTES",
        help="what the interfaces of this user's processes do, or that one (or that child's); the limits of a region of "
             "path MTUs; to set one, 0 for no limit")
    add("--name", metavar="L", help="interfaces to make, at most 32")
    add("--in", metavar="L", dest="inp", help="channels that they read, NAME (POSIX shared memory), /path or "
                                              "/path@OFFSET+SIZE; an empty entry: sends only (default: NAME_in)")
    add("--out", metavar="L", help="channels that they write; an empty entry: receives only (default: NAME_out)")
    add("--peer", action="store_true", default=None, help="the other end: the defaults of --in and --out are swapped")
    add("--reader-protocol", metavar="L", help="hexadecimal (default: 2)")
    add("--writer-protocol", metavar="L", help="hexadecimal (default: 2)")
    add("--mtu", metavar="L", help="bytes, the same at both ends (default: 1500)")
    add("--pmtu", metavar="L", help="regions of path MTUs, of net_hdr, made if they are missing; an empty entry: no "
                                    "limits")
    add("--flags", metavar="L", help="net_hdr: IP packets; eth_dev: an Ethernet device; several joined by +; an empty "
                                 "entry: raw, any payload of exactly mtu bytes (default: net_hdr)")
    add("--no-offload", action="store_true", default=None,
        help="one packet per system call: no super-packets between the kernel and us; what channels carry is the same")
    add("--marks", metavar="WAY", help="how netfilter marks go between packets and net_hdr: tcx, clsact or tap (auto, the "
                                       "default: the first that works; `muenfast doctor` tells what each lacks), or none: "
                                       "marks are 0")
    add("--checksum", metavar="WHEN", help="CRC-32C of each element, which is 4 bytes longer: auto: where its reader says, "
                                           "by the bell, that it takes them; require: in both directions, at both ends; "
                                           "off (default: off)")
    add("--netns", metavar="L", help="network namespaces, by name, path or process number; one entry is for all "
                                     "(default: the caller's)")
    add("--size", metavar="L", help="size of channels that are made because they are missing (default: 256 to 1024 "
                                    "elements)")
    add("--carrier", metavar="L", help="peer: there is one while the peer is there; up: always; one entry is for all "
                                       "(default: peer)")
    add("--mac", metavar="L", help="MAC addresses, of eth_dev (default: random)")
    add("--addr", metavar="L", help="addresses with the bits of their network, several of one interface joined by +: "
                                    "10.0.0.1/24+fd00::1/64")
    add("--up", action="store_true", default=None, help="set the interfaces up")
    add_policy_options(parser, "interfaces")
    add_waiting_options(parser)
    add("--json", action="store_true", default=None, help="show: print everything as JSON")
    add("-s", "--statistics", action="store_true", default=None, help="show: counters, too")


def add_waiting_options(parser: argparse.ArgumentParser) -> None:
    """How to wait for the other side, and -v."""
    add = parser.add_argument
    add("--poll", metavar="N", help="microseconds between polls of a channel without a bell (default: adaptive, at "
                                    "most 1000 while active, 10000 idle)")
    add("--quarantine", metavar="N", help="how many rules a peer may break in a second: with more, nothing is taken from "
                                          "it until it begins anew; 0: it may break any (default: 10000)")
    add_cpus(parser)
    add("--strict-oneway", action="store_true", default=None,
        help="no bell: nothing but the channels is shared, and the writers of such that exist by then see nothing of us "
             "that the kernel does not show (docs/security.md); waiting is polling, and a slow reader is overrun")
    add("-v", "--verbose", action="store_true", help="say when peers come and go")


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM, or shows."""
    if arguments.words:
        return _words(arguments)
    for name in ("json", "statistics"):
        if getattr(arguments, name):
            raise UsageError("goes with show", option="--" + name)
    if by_policy(arguments):
        with Stop() as stop, ExitStack() as stack:
            part, only, broker = declared(arguments, _ROLE, stack)
            return serve(part.interfaces(only), stop, broker, cpus(arguments))
    if arguments.name is None:
        raise UsageError("required: the interfaces to make", option="--name", hint="muenfast net --help tells more")
    with Stop() as stop:    # before modules are imported: an interrupt would be lost there
        from muenfast.net import Options, interfaces_from_lists

        poll = arguments.poll
        if poll is not None:
            from muenfast.connection import MOST_POLL

            poll = params.number("--poll", None, poll, least=1, most=MOST_POLL, what="a pause in microseconds")
        lists: dict[str, Any] = {name: getattr(arguments, name) for name in LISTS}
        return serve(interfaces_from_lists(**lists, options=Options(), poll=poll, bells=not arguments.strict_oneway,
                                           peer=bool(arguments.peer), up=bool(arguments.up),
                                           offload=not arguments.no_offload, marks=arguments.marks or "auto",
                                           patience=patience(arguments), checksum=arguments.checksum or "off"), stop,
                     pinned=cpus(arguments))


def serve(configs: Sequence[InterfaceConfig], stop: Stop, broker: Broker | None = None, pinned: Sequence[int] = ()) -> int:
    """Makes the interfaces, by the broker if there is one; until stop, or all were removed (status 1). pinned: CPUs."""
    from muenfast import __version__
    from muenfast.control import Command, ControlServer
    from muenfast.net import Interfaces

    with ExitStack() as stack:
        interfaces = stack.enter_context(Interfaces(configs, None if broker is None else _makers(broker),
                                                    cpus=pinned))
        if not all(config.unseen for config in configs):    # those have no books, and look at no directory
            sweep()
        watched = Watched(broker, "the marks of its interfaces went with it, so that this one ends, too: start it again")
        control = ControlServer({
            "status": Command(lambda: {"command": "net", "entries": [], "interfaces": interfaces.status(),
                                       **watched.status()}),
            "ping": Command(lambda: {"command": "net", "version": __version__, "interfaces": len(interfaces.interfaces)})})
        stack.callback(control.close)
        say_ready([_line(interface) for interface in interfaces.interfaces])
        stop.wait(lambda: interfaces.gone or watched.ended())
        notify("STOPPING=1")
        return 0 if stop.is_set() else 1


def _makers(broker: Broker) -> Makers:
    from muenfast.broker.net import Brokered

    return Brokered(broker)


def _line(interface: Interface) -> str:
    """`interface NAME IN OUT BYTES FRAMING MTU [netns NAMESPACE]`."""
    config = interface.config
    ends = ["-" if end is None else word(end.text) for end in (config.inp, config.out)]
    where = [] if config.netns is None else ["netns", word(config.netns)]
    return " ".join(["interface", interface.own.device.name, *ends, str(config.element_size), config.framing,
                     str(config.mtu), *where])


# ------------------------------------------------------------------ show

def _words(arguments: argparse.Namespace) -> int:
    what, *words = arguments.words
    if what not in ("show", "pmtu"):
        raise UsageError("the word is show or pmtu; options make interfaces", value=what,
                         hint="muenfast net --help tells more")
    for name in _SERVING:
        if getattr(arguments, name) is not None:
            raise UsageError(f"does not go with {what}", option="--" + name.replace("inp", "in").replace("_", "-"))
    return _show(arguments, words) if what == "show" else _pmtu(arguments, words)


def _pmtu(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """`pmtu show REGION`, `pmtu set REGION MARK BYTES`."""
    from muenfast import marks, pathmtu, shm

    if not words or len(words) != {"show": 2, "set": 4}.get(words[0]):
        raise UsageError("the words are: pmtu show REGION, or: pmtu set REGION MARK BYTES",
                         value=" ".join(("pmtu", *words)))
    if arguments.statistics:
        raise UsageError("goes with show", option="--statistics")
    change = words[0] == "set"
    if change and arguments.json:
        raise UsageError("goes with show", option="--json")
    locator = shm.Locator.parse(words[1], option="REGION")
    try:
        region = pathmtu.opened(locator, writable=change, make=False)
    except FileNotFoundError as error:
        raise MuenfastError(f"{words[1]}: there is no such region (`muenfast net --pmtu` makes it, and `muenfast chan "
                            f"create --size {pathmtu.BYTES}` one that stays)") from error
    try:
        if change:
            pathmtu.put(region, marks.check_mark(words[2]), pathmtu.check("BYTES", words[3]))
            return 0
        limits = pathmtu.get(region)
        if arguments.json:
            print(json.dumps({"region": words[1], "entries": pathmtu.entries(region),
                              "limits": {str(mark): limit for mark, limit in limits.items()}}, indent=2))
        else:
            print(f"{word(words[1])}: {len(limits)} of {pathmtu.entries(region)} marks have a limit")
            for mark, limit in limits.items():
                print(f"  mark {mark}: {limit}")
    finally:
        region.close(keep=True)     # who uses it may have been killed, and come back
    return 0


def _show(arguments: argparse.Namespace, names: Sequence[str]) -> int:
    if len(names) > 1:
        raise UsageError("show takes one name", value=names[1])
    from muenfast.control import ask_all

    answers = ask_all({"command": "status"})
    found = [{"pid": answer["pid"], **entry} for answer in answers for entry in answer.get("interfaces", ())
             if not names or names[0] in (entry["name"], *(child["name"] for child in entry["children"]))]
    silent = [answer for answer in answers if not answer["ok"]]
    if names and not found:
        raise MuenfastError(f"no process of this user serves an interface {names[0]}"
                            + ("" if not silent else f" ({len(silent)} did not answer)"))
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif not found and not silent:
        print("no process of this user serves an interface")
    else:
        for entry in found:
            print("\n".join(_lines(entry, bool(arguments.statistics))))
    for answer in silent:
        print(f"process {answer['pid']}: no answer: {answer.get('error')}", file=sys.stderr)
    return 1 if silent else 0


def _lines(entry: dict[str, Any], statistics: bool) -> list[str]:
    """An interface as text: the fields of the module's info file, then ours."""
    state = f"{entry['state']}, {'carrier' if entry['carrier'] else 'no carrier'}"
    lines = [f"{word(entry['name'])}: {state}, process {entry['pid']}" + ("" if entry["netns"] is None else
                                                                   f", netns {word(entry['netns'])}"),
             f"  in/out: {word(entry['in'] or '')}:{word(entry['out'] or '')}", f"  mtu: {entry['mtu']}",
             f"  flags: {entry['flags'] or '(none)'}",
             f"  poll: {'adaptive' if entry['poll'] is None else 'every {} µs'.format(entry['poll'])}"]
    if entry.get("cpus"):
        lines.append(f"  cpus: {','.join(map(str, entry['cpus']))}")
    for name in ("writer", "reader"):
        end = entry[name]
        lines.append(f"  {name} is {'enabled' if end['enabled'] else 'disabled'}")
        if end["enabled"]:
            lines.append(f"  {name}.element_size: {end['element_size']}")
            peer = ""
            if name == "reader" and end["active"]:
                peer = (f", process {entry['peer']} writes" if entry["peer"] is not None else
                        ", but no process that is known here writes: it was killed, or is none of this machine's")
            lines.append(f"  {name} is {'active' if end['active'] else 'inactive'}{peer}")
    lines.append(f"  marks: {entry['marks'] or 'none'}")
    lines.append(f"  offload: {'on' if entry['offload'] else 'off'}")
    if entry["pmtu"] is not None:
        lines.append(f"  pmtu: {word(entry['pmtu'])}")
    for child in entry["children"]:
        held = " ".join(map(str, child["marks"])) or "none"
        lines.append(f"  child {word(child['name'])}: marks {held}")
    if statistics:
        lines += [f"  stats.{name}: {value}" for name, value in entry["counters"].items()]
        for name in ("sent", "received", "interface"):
            lines += _flat(f"  {name}", entry[name])
        for child in entry["children"]:
            lines += _flat(f"  child {word(child['name'])}", {**child["counters"], "lost": child["lost"]})
    return lines


def _flat(prefix: str, values: dict[str, Any]) -> list[str]:
    """One line for each number."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{prefix}.{key}.{cause}: {number}" for cause, number in value.items()]
        elif isinstance(value, list):
            lines.append(f"{prefix}.{key}: {' '.join(map(str, value))}")
        else:
            lines.append(f"{prefix}.{key}: {value}")
    return lines
