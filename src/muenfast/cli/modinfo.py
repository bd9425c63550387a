"""muenfast modinfo: the parameters of a kernel module that `muenfast modprobe` stands in for."""

from __future__ import annotations

import argparse
import json

from muenfast import modules
from muenfast.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODULE, --json."""
    parser.add_argument("module", metavar="MODULE", nargs="?",
                        help=", ".join(map(modules.command_name, modules.MODULES.values())) + " (default: name them)")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object, which also says what is "
                                                            "required, and by which generation of the module")


def run(arguments: argparse.Namespace) -> int:
    """Prints the module as modinfo(8) does."""
    from muenfast import __version__

    if arguments.module is None:
        if arguments.json:
            raise UsageError("goes with a MODULE", option="--json")
        for module in modules.MODULES.values():
            print(f"{modules.command_name(module):<18}{module.description}")
        return 0
    module = modules.find(arguments.module)
    if arguments.json:
        print(json.dumps({"name": module.name, "description": module.description, "version": __version__,
                          "parameters": [{"name": parameter.name, "description": parameter.meaning,
                                          "type": parameter.type, "required": parameter.required,
                                          "generation": generation, "aliases": parameter.aliases}
                                         for generation, group in enumerate(module.generations, 1)
                                         for parameter in group]}, indent=2))
        return 0
    lines = [("name", module.name), ("description", module.description), ("version", __version__)]
    lines += [("parm", f"{parameter.name}:{parameter.meaning} ({parameter.type})")
              for group in module.generations for parameter in group]
    for key, value in lines:
        print(f"{key + ':':<16}{value}")  # kmod's columns
    return 0
