"""muenfast modprobe: serves as the kernel module of that name would, called with the same parameters."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from muenfast import modules, params
from muenfast.cli import blk, net
from muenfast.cli._serving import Stop, cpus, patience
from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast.connection import Channels
    from muenfast.export import ExportConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODULE KEY=VALUE..., and what the module has no parameters for."""
    parser.add_argument("module", metavar="MODULE", help="muenblock-client, muenblock-server or muennet")
    parser.add_argument("parameters", metavar="KEY=VALUE", nargs="*",
                        help="the module's own parameters; `muenfast modinfo MODULE` lists them")
    blk.add_client_options(parser)
    blk.add_waiting_options(parser)
    parser.epilog = "It stays in the foreground until SIGINT or SIGTERM, where `modprobe -r` would end the module."


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM."""
    call = modules.parse(modules.find(arguments.module), arguments.parameters)
    client = call.module.name == "muenblock_client"
    if call.module.name == "muennet":
        blk.refuse_options(arguments, blk.CLIENT_ONLY, "it goes with muenblock-client")
        return _interfaces(arguments, call.values)
    if not client:
        blk.refuse_options(arguments, blk.CLIENT_ONLY, "it goes with muenblock-client")
    if call.generation == 1:
        connections = modules.connections_from_lists(call.values["connections"], call.values.get("device"),
                                                     called=call.spelled.get("device", "device"))
    from muenfast.blk import channels_from_lists, exports_from_lists

    with Stop() as stop:
        waiting = blk.waiting(arguments)
        if call.generation == 1:
            if client:
                return blk.attach_disks(arguments, [_channels(each, **waiting) for each in connections], stop)
            return blk.export_disks(_exports(connections, call.spelled["device"], **waiting), stop, pinned=cpus(arguments))
        lists = {**_inline(call.values), **waiting}
        if client:
            return blk.attach_disks(arguments, channels_from_lists(**lists), stop)
        return blk.export_disks(exports_from_lists(**lists, device=call.values["device_name"]), stop,
                                pinned=cpus(arguments))


def _interfaces(arguments: argparse.Namespace, values: Mapping[str, str]) -> int:
    """muennet, with its own defaults."""
    if arguments.poll is not None:
        raise UsageError("muennet has a parameter for it", option="--poll", value=arguments.poll, hint="poll=MILLISECONDS")
    with Stop() as stop:
        from muenfast.net import Options, interfaces_from_lists

        called = Options("name", "in", "out", "reader_protocol", "writer_protocol", "mtu", "pmtu", "flags", "poll")
        poll = None
        if "poll" in values:    # 0: no wait at all, or as good as none
            milliseconds = params.number("poll", None, values["poll"], least=0, most=10_000, what="a pause in milliseconds")
            poll = max(1, milliseconds * 1000)
        return net.serve(interfaces_from_lists(
            values["name"], inp=values.get("in"), out=values.get("out"), reader_protocol=values.get("reader_protocol"),
            writer_protocol=values.get("writer_protocol"), mtu=values.get("mtu"), pmtu=values.get("pmtu"),
            flags=values.get("flags"), poll=poll, bells=not arguments.strict_oneway,
            patience=patience(arguments), module=True, options=called), stop, pinned=cpus(arguments))


def _exports(connections: Sequence[modules.Connection], called: str, **waiting: Any) -> list[ExportConfig]:
    """The second generation's connections as exports. called: the list of disks. Raises UsageError."""
    from muenfast.backing import Device
    from muenfast.export import ExportConfig, check_devices

    configs = []
    for each in connections:
        channels = _channels(each, called, **waiting)
        first, *further = (Device.parse(path, option=called, index=index)
                           for path, index in zip(each.devices, each.entries, strict=True))
        configs.append(ExportConfig(channels, first, further=tuple(further), entries=each.entries))
    check_devices(configs)
    return configs


def _channels(each: modules.Connection, device: str = "device", **waiting: Any) -> Channels:
    """A connection of the second generation. device: what the list of disks is called."""
    from muenfast.connection import BUFFER_REQUEST_SIZE, BUFFER_RESPONSE_SIZE, Channels, Options

    names = Options(**dict.fromkeys(("req", "resp", "buffer"), "connections"), device=device)
    return Channels(each.req, each.resp, each.index, each.req_protocol, each.resp_protocol,
                    (BUFFER_REQUEST_SIZE, BUFFER_RESPONSE_SIZE), options=names, buffer=each.buffer, **waiting)


def _inline(values: Mapping[str, str]) -> dict[str, object]:
    """The first generation's lists as those of `muenfast blk`."""
    from muenfast.connection import Options

    called = Options(req="req_shm_name", resp="resp_shm_name", req_protocol="req_shm_protocol",
                     resp_protocol="resp_shm_protocol", device="device_name")
    return {"req": values[called.req], "resp": values[called.resp], "req_protocol": values.get(called.req_protocol),
            "resp_protocol": values.get(called.resp_protocol), "options": called}
