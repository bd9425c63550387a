"""muenfast ctl: exports of a running `muenfast blk` created, destroyed, resized and listed, while others go on."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from muenfast import params
from muenfast.cli._text import describe, export_line, user_lines, word
from muenfast.errors import MuenfastError, UsageError

if TYPE_CHECKING:
    from muenfast.backing import Device

_PATIENCE = 5.0  # seconds for what a process answers at once
log = logging.getLogger("muenfast")

_TEXTS = ("req", "resp", "shm", "size", "shm_size", "req_protocol", "resp_protocol", "pool", "timeout", "inject",
          "checksum")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands and their options."""
    parser.epilog = ("NAME has 1 to 31 characters, no blanks, and is no number; ID is what `ctl list` shows first. Without "
                     "--pid the only `muenfast blk` of this user is asked, for an export by NAME the one that has "
                     "it. Status: 0 done, 1 it failed, 2 a wrong call.")
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        sub.add_argument("--pid", metavar="PID", help="of the serving process")
        sub.add_argument("--json", action="store_true", help="print the answer as JSON, an error too")
        return sub

    create = command("create", "serve one export more; prints its line once it serves")
    create.add_argument("name", metavar="NAME", help="of the export")
    add = create.add_argument
    add("--req", metavar="CHANNEL", help="request channel (default: NAME_req)")
    add("--resp", metavar="CHANNEL", help="response channel (default: NAME_resp)")
    add("--device", metavar="L", help="what to export, as `muenfast blk --device`: one, or over a buffer (--shm) several, "
                                      "separated by commas (default: ram:64M). A PATH is meant from here; a Python "
                                      "MODULE is found by the process")
    add("--shm", metavar="BUFFER", help="a region that both sides write: a connection of the second generation")
    add("--read-only", metavar="YES", nargs="?", const="yes", help="refuse writes")
    for option, text in (("--size", "of the channels where they are made"), ("--shm-size", "of the buffer likewise"),
                         ("--req-protocol", "hexadecimal"), ("--resp-protocol", "hexadecimal")):
        add(option, metavar="N" if "size" in option else "HEX", help=f"{text}, as for `muenfast blk`")
    add("--pool", metavar="N", help="threads that call a disk written in Python (default: 4)")
    add("--timeout", metavar="SECONDS", help="1 to 1200, that such a disk, or one with --inject late, has for an answer "
                                             "(default: 30)")
    add("--inject", metavar="FAULTS", help="faults, as for `muenfast blk`, of all its disks")
    add("--poll", metavar="N", help="microseconds between polls of a channel without a bell")
    add("--checksum", metavar="WHEN", help="off, auto or require, as for `muenfast blk`")
    add("--strict-oneway", action="store_true", help="no bell: nothing but the channels is shared")

    destroy = command("destroy", "end an export for good: its client fails what is outstanding, and its device goes")
    destroy.add_argument("which", metavar="NAME|ID", nargs="?", help="the export")
    destroy.add_argument("--all", action="store_true", help="all exports of the process")
    destroy.add_argument("--force", action="store_true", help="also where a client is attached")

    command("list", "the exports, one a line: ID NAME REQ RESP SIZE DEVICE STATE [read-only] [shm BUFFER]")
    status = command("status", "the exports with their counters, or one of them")
    status.add_argument("which", metavar="NAME|ID", nargs="?", help="the export")
    command("ping", "ask the process for an answer")

    resize = command("resize", "give a disk another size; its client keeps it")
    resize.add_argument("which", metavar="NAME|ID", help="the export")
    resize.add_argument("size", metavar="SIZE", nargs="?",
                        help="its new size, like 128M; without it what is behind the disk (a file, a device, a Python "
                             "disk's get_size) is measured again, and the disk becomes as long as that is by now")
    resize.add_argument("--disk", metavar="N", default="0", help="its number on the connection (default: 0)")
    resize.add_argument("--force", action="store_true",
                        help="also where the disk becomes smaller: what is beyond its new end is lost to the client, and "
                             "with SIZE it is cut off")


def run(arguments: argparse.Namespace) -> int:
    """Asks one process; the status that it answers with."""
    try:
        request = _request(arguments)
        answer = _ask(_process(arguments), request)
    except (MuenfastError, OSError) as error:
        if not arguments.json:
            raise
        answer = {"ok": False, "error": describe(error), "status": 2 if isinstance(error, UsageError) else 1}
    if arguments.json:
        print(json.dumps(answer, indent=2))
    if not answer.get("ok"):
        print(f"muenfast: {answer.get('error')}", file=sys.stderr)
        return 2 if answer.get("status") == 2 else 1
    if not arguments.json:
        for line in _lines(arguments.what, answer):
            print(line)
    return 0


# -------------------------------------------------------------- what is asked

def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    """The request of a subcommand. Raises UsageError."""
    what = arguments.what
    if what == "create":
        found = {"name": arguments.name, **{name: getattr(arguments, name) for name in _TEXTS}}
        if arguments.device is not None:
            found["device"] = [_from_here(text, index) for index, text in
                               enumerate(params.split("--device", arguments.device))]
        if arguments.read_only is not None:
            found["read_only"] = params.flag("--read-only", None, arguments.read_only)
        if arguments.poll is not None:
            found["poll"] = params.number("--poll", None, arguments.poll, least=1, most=10_000_000,
                                          what="a pause in microseconds")
        return {"command": what, **found, "strict_oneway": arguments.strict_oneway}
    if what == "destroy":
        if (arguments.which is None) != arguments.all:
            raise UsageError("either the export's name or --all", option="NAME|ID",
                             value=arguments.which)
        return {"command": what, "name": arguments.which, "every": arguments.all, "force": arguments.force}
    if what == "resize":
        disk = params.number("--disk", None, arguments.disk, least=0, most=65535, what="a disk's number")
        return {"command": what, "name": arguments.which, "size": arguments.size, "disk": disk,
                "force": arguments.force}
    return {"command": "show" if what == "status" else what,
            **({"name": arguments.which} if what == "status" else {})}


def _from_here(text: str, index: int) -> str:
    """An entry of --device as the serving process, which may stand in another directory, understands it."""
    from muenfast.backing import Device

    device: Device = Device.parse(text, option="--device", index=index)
    if device.kind == "py" and "/" in device.module:
        argument = "" if device.argument is None else f":{device.argument}"
        return f"py:{os.path.abspath(device.module)}:{device.attribute}{argument}"
    if device.kind != "file":
        return text
    return os.path.abspath(device.path) + (f"#{device.partition}" if device.partition else "")


# -------------------------------------------------------------- who is asked

def _ask(pid: int, request: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
    """One question, however long the answer takes. Raises MuenfastError."""
    from muenfast.control import ask

    try:
        return ask(pid, request, timeout=timeout)
    except (ConnectionRefusedError, FileNotFoundError):
        raise MuenfastError(f"process {pid} serves nothing, or is another user's") from None
    except (OSError, ValueError) as error:
        raise MuenfastError(f"process {pid} gave no answer: {describe(error)}") from error


def _process(arguments: argparse.Namespace) -> int:
    """Whom to ask. Raises UsageError, MuenfastError."""
    from muenfast.control import ask_all

    if arguments.pid is not None:
        return _server(params.number("--pid", None, arguments.pid, least=1, most=1 << 30, what="a process' number"),
                       client=arguments.what == "ping")
    answers = [answer for answer in ask_all({"command": "list"}) if answer.get("ok") or answer.get("status") != 2]
    servers = [answer for answer in answers if answer.get("ok")]
    silent = [f"process {each['pid']} gave no answer: {each.get('error')}" for each in answers if not each.get("ok")]
    if not servers and silent:
        raise MuenfastError("; ".join(silent))
    for text in silent:
        log.warning("%s", text)
    if not servers:
        raise MuenfastError("no `muenfast blk` of this user is serving (muenfast blk --control begins without exports)")
    which = getattr(arguments, "which", None)
    if len(servers) > 1 and which is not None:
        having = [answer for answer in servers if any(export["name"] == which for export in answer["exports"])]
        servers = having or servers
    if len(servers) > 1:
        verb = " ".join([arguments.what, *(["NAME"] if arguments.what == "create" else [which] if which else [])])
        raise UsageError("several processes serve, of which one is meant", option="--pid",
                         hint=f"type `muenfast ctl {verb} --pid PID`, where PID is "
                              + " or ".join(f"{answer['pid']} ({_names(answer['exports'])})" for answer in servers))
    return int(servers[0]["pid"])


def _server(pid: int, *, client: bool) -> int:
    """pid, where it is that of a server, or (client) of a client. Raises UsageError, MuenfastError."""
    ping = _ask(pid, {"command": "ping"}, timeout=_PATIENCE)
    if ping.get("command") == "blk --client" and not client:
        raise UsageError("that process is a client (`muenfast blk --client`), and exports nothing", option="--pid",
                         value=pid, hint=f"`muenfast stat {pid}` shows its disks; PID is that of a `muenfast blk`")
    return pid


def _names(exports: list[dict[str, Any]]) -> str:
    names = [export["name"] for export in exports]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "no export"


# -------------------------------------------------------------- what is printed

def _lines(what: str, answer: dict[str, Any]) -> list[str]:
    if what == "ping" and "disks" in answer:
        return [f"process {answer['pid']}: muenfast {answer['version']}, a client, disks: {answer['disks']}"]
    if what == "ping":
        return [f"process {answer['pid']}: muenfast {answer['version']}, up {answer['uptime']:.0f} s, exports: "
                f"{answer['exports']}"]
    if what == "create":
        return [_export(answer["export"])]
    if what == "resize":
        return [_export(answer["export"]) + ("" if answer["export"]["changed"] else " unchanged")]
    lines = []
    for export in answer["exports"]:
        if what == "destroy":
            lines.append(f"destroyed {export['id']} {word(export['name'])}")
            continue
        lines.append(" ".join([
            str(export["id"]), word(export["name"]), word(export["req"]), word(export["resp"]), str(export["size"]),
            word(export["device"]), export["state"], *(["read-only"] if export["read_only"] else []),
            *(["shm", word(export["shm"])] if export["shm"] is not None else [])]))
        if what == "status":
            counters = ", ".join(f"{name} {value}" for name, value in export["counters"].items()
                                 if value and isinstance(value, int))
            lines += [f"    {counters or 'no traffic'}", *user_lines(export)]
    return lines


def _export(entry: dict[str, Any]) -> str:
    """As `muenfast blk` prints it."""
    return export_line(entry["req"], entry["resp"], [(disk["size"], disk["device"]) for disk in entry["disks"]],
                       read_only=entry["read_only"], buffer=entry["shm"])
