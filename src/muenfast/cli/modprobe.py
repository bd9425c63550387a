"""muenfast modprobe: serves as the kernel module of that name would, called with the same parameters."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from muenfast import modules
from muenfast.cli import blk
from muenfast.cli._serving import Stop
from muenfast.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODULE KEY=VALUE..., and what the module has no parameters for."""
    parser.add_argument("module", metavar="MODULE", help="muenblock-client or muenblock-server")
    parser.add_argument("parameters", metavar="KEY=VALUE", nargs="*",
                        help="the module's own parameters; `muenfast modinfo MODULE` lists them")
    blk.add_client_options(parser)
    blk.add_waiting_options(parser)
    parser.epilog = "It stays in the foreground until SIGINT or SIGTERM, where `modprobe -r` would end the module."


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM."""
    call = modules.parse(modules.find(arguments.module), arguments.parameters)
    client = call.module.name == "muenblock_client"
    if not client:
        blk.refuse_options(arguments, blk.CLIENT_ONLY, "it goes with muenblock-client")
    if call.generation == 1:
        modules.connections_from_lists(call.values["connections"], call.values.get("device"),
                                       called=call.spelled.get("device", "device"))
        raise UsageError("the shared-buffer transport is not in this build", option="connections",
                         hint="without a buffer: req_shm_name=..., resp_shm_name=...")
    with Stop() as stop:
        lists = {**_inline(call.values), **blk.waiting(arguments)}
        if client:
            return blk.attach_disks(arguments, lists, stop)
        return blk.export_disks({**lists, "device": call.values["device_name"]}, stop)


def _inline(values: Mapping[str, str]) -> dict[str, object]:
    """The first generation's lists as those of `muenfast blk`."""
    from muenfast.connection import Options

    called = Options(req="req_shm_name", resp="resp_shm_name", req_protocol="req_shm_protocol",
                     resp_protocol="resp_shm_protocol", device="device_name")
    return {"req": values[called.req], "resp": values[called.resp], "req_protocol": values.get(called.req_protocol),
            "resp_protocol": values.get(called.resp_protocol), "options": called}
