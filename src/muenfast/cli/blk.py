"""muenfast blk: the block server, and with --client the block client."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from muenfast import params
from muenfast.cli._declared import Role, Watched, add_policy_options, by_policy, declared
from muenfast.cli._serving import Stop, add_cpus, cpus, notify, patience, say_ready, sweep
from muenfast.cli._text import export_line, word
from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast.attach.root import Root
    from muenfast.blk import Channels, Export, ExportConfig
    from muenfast.broker import Broker
    from muenfast.control import Command
    from muenfast.declared import Declared
    from muenfast.sandbox import Files

SERVER_ONLY = ("device", "read_only", "pool", "timeout", "inject", "threads", "control")
LISTS = ("req", "resp", "device", "shm", "shm_size", "read_only", "req_protocol", "resp_protocol", "size", "pool",
         "timeout", "inject")
_DECIDED = ("req", "resp", "device", "shm", "shm_size", "read_only", "req_protocol", "resp_protocol", "size", "poll",
            "strict_oneway", "checksum", "pool", "timeout", "inject", "control")
_SERVER_MODULES = ("muenfast.doctor", "muenfast.serving", "muenfast.control", "muenfast.backing.ram",
                   "muenfast.backing.null", "muenfast.backing.file", "muenfast.backing.user")
_CLIENT_MODULES = ("muenfast.doctor", "muenfast.blk", "muenfast.control", "muenfast.attach.nbd",
                   "muenfast.attach.sockets", "muenfast.broker.disks", "concurrent.futures.thread")
CLIENT_ONLY = ("attach", "nbd", "on_peer_loss", "same_store", "fuse_uring")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both roles."""
    add = parser.add_argument
    add("--req", metavar="L", help="request channels: NAME (POSIX shared memory), /path, "
                                                  "/path@OFFSET+SIZE; client to server")
    add("--resp", metavar="L", help="response channels, server to client")
    add("--control", action="store_true", default=None,
        help="server: without --req and --resp begin with no export and serve what `muenfast ctl create` makes, until "
             "SIGINT or SIGTERM; with them it changes nothing, since every server takes `muenfast ctl`")
    add("--client", action="store_true", help="attach the disks as /dev/muendiska, /dev/muendiskb, ...")
    add("--device", metavar="L", help="server: what to export: ram:SIZE[:NAME], null:SIZE, the PATH of a file, disk or "
                                      "partition, PATH#N: partition N of PATH, by its MBR or GPT, unless a file has "
                                      "that very name, or py:MODULE:CLASS[:ARG]: a disk written in Python "
                                      "(default: ram:64M each)")
    add("--pool", metavar="L", help="server: threads that call a disk written in Python (default: 4)")
    add("--timeout", metavar="L", help="server: seconds, 1 to 1200, that such a disk has for an answer; a later one is an "
                                       "I/O error for its request; also of any disk with --inject late (default: 30)")
    add("--inject", metavar="L", help="server: faults, to test what stands on the disk: error[=ERRNO], delay=10ms, late "
                                      "(after --timeout), corrupt (of what is read), each perhaps with ,rate=0.01 and "
                                      ",on=read/write/flush/discard; several for one export are joined by +")
    add("--shm", metavar="L", help="buffers, regions that both sides write: an entry that names one makes its "
                                   "connection one of the second generation, an empty one leaves it inline")
    add("--shm-size", metavar="L", help="size of buffers that are made because they are missing (default: 16M)")
    add("--read-only", metavar="L", nargs="?", const="yes",
        help="server: refuse writes; yes or no for each export, alone: for all")
    add("--threads", metavar="N", help="server: most threads for exports in RAM, which share them where they are more "
                                       "(default: four for each CPU); other disks have one each")
    add("--req-protocol", metavar="L", help="hexadecimal (default: 9570208dca77db19; beside a buffer 5155684453516f3d)")
    add("--resp-protocol", metavar="L", help="hexadecimal (default: 9851be3282fef0dc; beside a buffer 5155684453516f3d)")
    add("--size", metavar="L", help="size of channels that are made because they are missing (default: 1M; beside a "
                                    "buffer 0x8000 for requests, 0x4000 for responses; foreign peers accept no other)")
    add_policy_options(parser, "connections")
    add_client_options(parser)
    add_waiting_options(parser)
    add("--checksum", metavar="WHEN", help="CRC-32C of each message and its block: auto: with a peer that has them, too; "
                                           "require: with no other; off (default: off)")


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """CLIENT_ONLY."""
    add = parser.add_argument
    add("--attach", metavar="HOW", help="client: what makes the block devices: fuse, nbd (the kernel's driver), auto: "
                                        "the first of them to be had, or none (default: auto; with --nbd: none)")
    add("--nbd", metavar="L", help="client: serve the disks as NBD exports on these Unix sockets, for nbd-client, "
                                   "libnbd, qemu, fio: nbd+unix:///?socket=PATH; together with block devices: "
                                   "--attach auto --nbd L")
    add("--on-peer-loss", metavar="WHAT", help="client: queue requests until the server is back, fail them, or "
                                               "timeout:SECONDS (default: queue)")
    add("--same-store", action="store_true", default=None,
        help="client: trust that a server that returns has the same data even where it does not prove it")
    add("--fuse-uring", metavar="WHEN",
        help="client: when a device's requests come by FUSE over io_uring, which is faster: kernel: where fuse's parameter "
             "enable_uring says so; auto: from Linux 6.18 on that is switched on while the device is made, and back; off "
             "(default: auto)")


def add_waiting_options(parser: argparse.ArgumentParser) -> None:
    """What waiting() reads, and -v."""
    add = parser.add_argument
    add("--poll", metavar="N", help="microseconds between polls of a channel without a bell (default: adaptive, at "
                                    "most 1000 while active, 10000 idle)")
    add("--quarantine", metavar="N", help="how many rules a peer may break in a second: with more, nothing is taken from "
                                          "it until it begins anew; 0: it may break any (default: 10000)")
    add_cpus(parser)
    add("--strict-oneway", action="store_true", help="no bell: nothing but the channels is shared; "
         "waiting is polling, and a server that returns is trusted with --same-store only")
    add("-v", "--verbose", action="store_true", help="say each connection and disconnection")


def refuse_options(arguments: argparse.Namespace, wrong: tuple[str, ...], hint: str) -> None:
    """Raises UsageError where an option of the other role is given."""
    role = "client" if wrong is CLIENT_ONLY else "server"
    for name in wrong:
        if getattr(arguments, name) is not None:
            raise UsageError(f"is an option of the {role}", option="--" + name.replace("_", "-"), hint=hint)


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM."""
    if arguments.client:
        refuse_options(arguments, SERVER_ONLY, "leave out --client, or give it to the server")
    else:
        refuse_options(arguments, CLIENT_ONLY, "it goes with --client")
    if by_policy(arguments):
        with Stop() as stop, ExitStack() as stack:
            return _as_declared(arguments, stop, stack)
    lists_given = [name for name in LISTS if getattr(arguments, name) is not None]
    missing = [f"--{name}" for name in ("req", "resp") if getattr(arguments, name) is None]
    if arguments.control and len(missing) == 2 and lists_given:
        option = "--" + lists_given[0].replace("_", "-")
        raise UsageError("belongs to an export, and with --control, but without --req and --resp, there is none to begin "
                         "with", option=option,
                         hint=f"give --req and --resp, too, or later `muenfast ctl create NAME {option} ...`")
    if missing and (lists_given or not arguments.control):
        without = "" if arguments.client or arguments.control else "muenfast blk --control begins without channels, "
        raise UsageError("required: the channels of each connection", option=", ".join(missing),
                         hint=f"{without}muenfast blk --help tells more")
    with Stop() as stop:    # before modules are imported: an interrupt would be lost there
        from muenfast.blk import channels_from_lists, exports_from_lists
        from muenfast.connection import Options

        lists = {**{name: getattr(arguments, name) for name in ("req", "resp", "req_protocol", "resp_protocol",
                                                                 "size")},
                 "buffer": arguments.shm, "buffer_size": arguments.shm_size, "options": Options(),
                 "checksum": "off" if arguments.checksum is None else arguments.checksum, **waiting(arguments)}
        if arguments.client:
            # Over a buffer one connection has several disks: how many sockets there are to be is known later.
            sockets = {"--nbd": _sockets(arguments)} if arguments.shm is None else None
            return attach_disks(arguments, channels_from_lists(**lists, more=sockets), stop)
        threads = _threads(arguments)
        if not lists_given:
            waiting(arguments)
            return export_disks([], stop, threads, pinned=cpus(arguments))
        lists |= {name: getattr(arguments, name) for name in ("device", "read_only", "pool", "timeout", "inject")}
        return export_disks(exports_from_lists(**lists), stop, threads, pinned=cpus(arguments))


def _as_declared(arguments: argparse.Namespace, stop: Stop, stack: ExitStack) -> int:
    """As a policy says; until stop."""
    if arguments.client:
        if arguments.attach == "nbd":
            raise UsageError("a subject's block devices are made by FUSE: its broker does not speak to the kernel's NBD "
                             "driver, and the subject has no CAP_SYS_ADMIN, which that asks for",
                             option="--attach", value=arguments.attach,
                             hint="leave it out; or serve the disks on Unix sockets, --attach none --nbd SOCKET,..., and "
                                  "run `nbd-client -unix SOCKET /dev/nbdN` as root beside it")
        devices = arguments.attach != "none" and not (arguments.attach is None and arguments.nbd is not None)
        sockets = [os.path.dirname(os.path.realpath(path)) for path in _sockets(arguments) or ()]

        def bounds(part: Declared, only: list[str] | None) -> tuple[Files, bool]:
            files = part.files_of_clients(only)
            files.sockets += sockets
            return files, devices

        role = Role(_DECIDED, _CLIENT_MODULES, bounds, _disk_broker if devices else None)
        part, only, broker = declared(arguments, role, stack)
        return attach_disks(arguments, part.channels(only), stop, broker)
    part, only, _ = declared(arguments, Role(_DECIDED, _SERVER_MODULES, _bounds), stack)
    return export_disks(part.exports(only), stop, _threads(arguments), closed=True, pinned=cpus(arguments))


def _bounds(part: Declared, only: list[str] | None) -> tuple[Files, bool]:
    """Of the server: io_uring is for files."""
    return part.files_of_exports(only), any(device.kind == "file" for each in part.exports(only) for device in each.devices)


def _disk_broker(part: Declared, only: list[str] | None) -> Broker:
    from muenfast.broker.disks import of_disks
    from muenfast.privileges import flusher

    broker = of_disks(part.disks(only))
    flusher()       # later it would be refused; without it the client is what any FUSE server is
    return broker


def _threads(arguments: argparse.Namespace) -> int | None:
    if arguments.threads is None:
        return None
    return params.number("--threads", None, arguments.threads, least=1, most=1024, what="a number of threads")


def waiting(arguments: argparse.Namespace) -> dict[str, Any]:
    """How to wait for the other side, as channels_from_lists takes it."""
    from muenfast.blk import MOST_POLL

    poll = arguments.poll
    if poll is not None:
        poll = params.number("--poll", None, poll, least=1, most=MOST_POLL, what="a pause in microseconds")
    return {"poll": poll, "bells": not arguments.strict_oneway, "patience": patience(arguments)}


def export_disks(configs: Sequence[ExportConfig], stop: Stop, threads: int | None = None, *, closed: bool = False,
                 pinned: Sequence[int] = ()) -> int:
    """The server; until stop. threads, pinned (cpus): see BlockServer. closed: there are to be no other exports:
    `muenfast ctl` creates none."""
    from muenfast import __version__
    from muenfast.control import Command, ControlServer
    from muenfast.serving import ControlledServer

    with ExitStack() as stack:
        server = stack.enter_context(ControlledServer(configs, threads=threads, cpus=pinned))
        control = ControlServer({
            "status": Command(lambda: {"command": "blk", "entries": server.status()}),
            "ping": Command(lambda: {"command": "blk", "version": __version__, "uptime": round(server.uptime, 3),
                                     "exports": len(server.exports)}),
            **server.commands(), **({"create": _refusing(server.commands()["create"])} if closed else {})})
        stack.callback(control.close)
        say_ready([_line(export) for export in server.exports])
        sweep()     # which takes longer than all the rest, and nobody waits for it here
        stop.wait()
        notify("STOPPING=1")
        return 0


def _refusing(create: Command) -> Command:
    """In place of `create`, where a policy says which exports there are."""
    def refuse(**fields: object) -> dict[str, Any]:
        raise UsageError("this server has the exports that its policy declares, and no others", value=fields["name"],
                         hint="declare a connection there, apply the policy, and start the server again")

    return replace(create, run=refuse)


def _line(export: Export) -> str:
    channels = export.config.channels
    return export_line(channels.req.text, channels.resp.text,
                       [(size, device.text) for size, device in zip(export.sizes, export.config.devices, strict=True)],
                       read_only=export.read_only, buffer=None if channels.buffer is None else channels.buffer.text)


def _root(broker: Broker) -> Root:
    from muenfast.broker.disks import Brokered

    return Brokered(broker)


def _buffer(channels: Channels) -> str:
    """` shm BUFFER` for a line, "" of an inline connection."""
    return "" if channels.buffer is None else f" shm {word(channels.buffer.text)}"


def _sockets(arguments: argparse.Namespace) -> list[str] | None:
    """The paths of --nbd."""
    if arguments.nbd is None:
        return None
    from muenfast.attach.sockets import paths_from_list

    return paths_from_list("--nbd", arguments.nbd)


def attach_disks(arguments: argparse.Namespace, channels: Sequence[Channels], stop: Stop,
                 broker: Broker | None = None) -> int:
    """The client, with the options CLIENT_ONLY, block devices by the broker if there is one; until stop, or all servers
    ended."""
    from muenfast import __version__
    from muenfast.blk import BlockClients, OnPeerLoss
    from muenfast.control import Command, ControlServer

    policy = OnPeerLoss.parse(arguments.on_peer_loss or "queue")
    sockets = _sockets(arguments)
    attach = arguments.attach or ("auto" if sockets is None else "none")
    with ExitStack() as stack:
        clients = stack.enter_context(BlockClients(channels, attach=attach, nbd=sockets, on_peer_loss=policy,
                                                   same_store=bool(arguments.same_store),
                                                   fuse_uring=arguments.fuse_uring or "auto",
                                                   root=None if broker is None else _root(broker),
                                                   cpus=cpus(arguments)))
        watched = Watched(broker, "the disks go on; their partitions and sizes are not followed, and their watchdogs take "
                                  "them away as this process ends: start it again when they are out of use")
        control = ControlServer({
            "status": Command(lambda: {"command": "blk --client", "entries": clients.status(), **watched.status()}),
            "ping": Command(lambda: {"command": "blk --client", "version": __version__, "disks": len(clients.disks)})})
        stack.callback(control.close)

        def finished() -> bool:
            watched.ended()
            return bool(clients.finished())

        sweep()
        if clients.ready(lambda: not stop.is_set()) and not stop.is_set():
            say_ready([f"disk {word(d.device.channels.req.text)} {word(d.device.channels.resp.text)} {d.device.size} "
                       f"{d.path}{'' if d.socket is None else f' {word(d.socket)}'}{_buffer(d.device.channels)}"
                       for d in clients.disks])
            stop.wait(finished)
        notify("STOPPING=1")
        return 0
