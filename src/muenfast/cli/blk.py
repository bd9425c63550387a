"""muenfast blk: the block server, and with --client the block client."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from muenfast import params
from muenfast.cli._serving import Stop, notify, say_ready
from muenfast.cli._text import word
from muenfast.errors import UsageError

_SERVER_ONLY = ("device", "read_only")
_CLIENT_ONLY = ("attach", "nbd", "on_peer_loss", "same_store")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both roles."""
    add = parser.add_argument
    add("--req", metavar="L", required=True, help="request channels: NAME (POSIX shared memory), /path, "
                                                  "/path@OFFSET+SIZE; client to server")
    add("--resp", metavar="L", required=True, help="response channels, server to client")
    add("--client", action="store_true", help="attach the disks as /dev/muendiska, /dev/muendiskb, ...")
    add("--device", metavar="L", help="server: what to export: ram:SIZE[:NAME], null:SIZE, or the PATH of a file, "
                                      "disk or partition (default: ram:64M each)")
    add("--read-only", metavar="L", nargs="?", const="yes",
        help="server: refuse writes; yes or no for each export, alone: for all")
    add("--req-protocol", metavar="L", help="hexadecimal (default: 9570208dca77db19)")
    add("--resp-protocol", metavar="L", help="hexadecimal (default: 9851be3282fef0dc)")
    add("--size", metavar="L", help="size of channels that are made because they are missing (default: 1M; foreign "
                                    "peers accept no other)")
    add("--poll", metavar="N", help="microseconds between polls of a channel without a bell (default: adaptive, at "
                                    "most 1000 while active, 10000 idle)")
    add("--strict-oneway", action="store_true", help="no bell: nothing but the channels is shared; waiting is polling")
    add("--attach", metavar="HOW", help="client: what makes the block devices: fuse, nbd (the kernel's driver), auto: "
                                        "the first of them to be had, or none (default: auto; with --nbd: none)")
    add("--nbd", metavar="L", help="client: serve the disks as NBD exports on these Unix sockets, for nbd-client, "
                                   "libnbd, qemu, fio: nbd+unix:///?socket=PATH; together with block devices: "
                                   "--attach auto --nbd L")
    add("--on-peer-loss", metavar="WHAT", help="client: queue requests until the server is back, fail them, or "
                                               "timeout:SECONDS (default: queue)")
    add("--same-store", action="store_true", default=None,
        help="client: trust that a server that returns has the same data even where it does not prove it")
    add("-v", "--verbose", action="store_true", help="say each connection and disconnection")


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM."""
    wrong, role = (_SERVER_ONLY, "server") if arguments.client else (_CLIENT_ONLY, "client")
    for name in wrong:
        if getattr(arguments, name) is not None:
            hint = "leave out --client, or give it to the server" if arguments.client else "it goes with --client"
            raise UsageError(f"is an option of the {role}", option="--" + name.replace("_", "-"), hint=hint)
    with Stop() as stop, ExitStack() as stack:
        return _client(arguments, stop, stack) if arguments.client else _server(arguments, stop, stack)


def _lists(arguments: argparse.Namespace) -> dict[str, object]:
    """What server and client have in common."""
    from muenfast.blk import MOST_POLL

    poll = arguments.poll
    if poll is not None:
        poll = params.number("--poll", None, poll, least=1, most=MOST_POLL, what="a pause in microseconds")
    return {"req_protocol": arguments.req_protocol, "resp_protocol": arguments.resp_protocol,
            "size": arguments.size, "poll": poll, "bells": not arguments.strict_oneway}


def _server(arguments: argparse.Namespace, stop: Stop, stack: ExitStack) -> int:
    from muenfast.blk import BlockServer, exports_from_lists
    from muenfast.control import ControlServer

    configs = exports_from_lists(arguments.req, arguments.resp, device=arguments.device,
                                 read_only=arguments.read_only, **_lists(arguments))
    server = stack.enter_context(BlockServer(configs))
    control = ControlServer(lambda: {"command": "blk", "entries": server.status()})
    stack.callback(control.close)
    say_ready([f"export {word(e.config.channels.req.text)} {word(e.config.channels.resp.text)} {e.size} "
               f"{word(e.config.device.text)}{' read-only' if e.config.read_only else ''}"
               for e in server.exports])
    stop.wait()
    notify("STOPPING=1")
    return 0


def _client(arguments: argparse.Namespace, stop: Stop, stack: ExitStack) -> int:
    from muenfast.blk import BlockClients, OnPeerLoss, channels_from_lists
    from muenfast.control import ControlServer

    sockets = None
    if arguments.nbd is not None:
        from muenfast.attach.sockets import paths_from_list

        sockets = paths_from_list("--nbd", arguments.nbd)
    channels = channels_from_lists(arguments.req, arguments.resp, more={"--nbd": sockets},
                                   **_lists(arguments))  # type: ignore[arg-type]
    policy = OnPeerLoss.parse(arguments.on_peer_loss or "queue")
    attach = arguments.attach or ("auto" if sockets is None else "none")
    clients = stack.enter_context(BlockClients(channels, attach=attach, nbd=sockets, on_peer_loss=policy,
                                               same_store=bool(arguments.same_store)))
    control = ControlServer(lambda: {"command": "blk --client", "entries": clients.status()})
    stack.callback(control.close)
    if clients.ready(lambda: not stop.is_set()) and not stop.is_set():
        say_ready([f"disk {word(d.device.channels.req.text)} {word(d.device.channels.resp.text)} {d.device.size} "
                   f"{d.path}{'' if d.socket is None else f' {word(d.socket)}'}" for d in clients.disks])
        stop.wait(clients.finished)
    notify("STOPPING=1")
    return 0
