"""The parser of all commands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from muenfast.cli._text import describe
from muenfast.errors import MuenfastError, UsageError

# command -> what `muenfast --help` says of it; each is a module here (without dashes) with add_arguments(parser) and
# run(arguments).
COMMANDS = {
    "blk": "export disks over channels, or attach exported ones (--client)",
    "net": "network interfaces over channels, and what they do (show)",
    "modprobe": "serve as a kernel module of Muen's would: MODULE KEY=VALUE...",
    "modinfo": "the parameters of such a module",
    "chan": "list, show, create, remove and dump channels",
    "ctl": "create, destroy, list and resize exports of a running `muenfast blk`",
    "net-cfg": "children of a served network interface and their marks, as muennet_cfg",
    "policy": "who may talk to whom, in one file: check it, apply it, draw it, compare the system with it",
    "stat": "what the serving processes of this user do",
    "doctor": "what this machine offers, and what dead processes left (--fix removes that)",
    "demo": "the whole way once: export, attach, ext4, real files, checksums",
    "bench": "rings, block I/O and interfaces between two processes, beside the limits of the machine",
}


_JSON_ERRORS = "muenfast ctl"  # answers with --json are objects there, which say "ok"


def _formatter(prog: str) -> argparse.HelpFormatter:
    """As argparse makes one, which asks shutil for the width: to load that takes longer than to parse, and each option that
    is added has a formatter look at it."""
    try:
        columns = int(os.environ.get("COLUMNS", "0"))
    except ValueError:
        columns = 0
    if columns <= 0:
        try:
            columns = os.get_terminal_size(1).columns
        except OSError:
            columns = 0
    return argparse.HelpFormatter(prog, width=(columns or 80) - 2)


class Parser(argparse.ArgumentParser):
    """Says misuse in one line, and takes an option once: of two, one would be ignored without a word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_formatter, **options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.misused(message, self.prog)

    def misused(self, message: str, command: str) -> NoReturn:
        """Ends the process. command: whose --help tells more."""
        text = f"{message} ({command} --help tells more)"
        if command.startswith(_JSON_ERRORS) and "--json" in self._words:
            print(json.dumps({"ok": False, "error": text, "status": 2}, indent=2))
        self.exit(2, f"muenfast: {text}\n")


class _Once(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
                 option_string: str | None = None) -> None:
        if option_string is not None:
            given = namespace.__dict__.setdefault("_given", set())
            if self.dest in given:
                raise argparse.ArgumentError(self, "given twice; the entries of a list are separated by commas")
            given.add(self.dest)
        setattr(namespace, self.dest, values)


def parser(words: Collection[str] | None = None) -> Parser:
    """The parser of all commands. words: what it is to parse, if that is known: commands whose names are not among them get
    no arguments, for to load their modules takes longer than everything else."""
    top = Parser(
        prog="muenfast",
        description="Disks and networks across the one-way shared memory channels of the Muen separation kernel.",
        epilog="Lists are comma-separated and paired by position; messages count entries from 0.")
    top.add_argument("--version", action="version", version=f"muenfast {_version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        meant = words is None or name in words
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
                                  add_help=meant)
        if meant:
            _module(name).add_arguments(sub)
    return top


def _module(command: str) -> Any:
    return importlib.import_module(f"muenfast.cli.{command.replace('-', '')}")


def _version() -> str:
    from muenfast import __version__

    return __version__


def main(argv: Sequence[str] | None, interrupts: Callable[[], None]) -> int:
    """Runs one command; the exit status. interrupts() makes SIGINT a KeyboardInterrupt from there on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    top = parser(sys.argv[1:] if argv is None else argv)
    try:
        arguments, more = top.parse_known_args(argv)
        if more:
            # argparse takes no positionals behind an option that stands among them.
            words = {"modprobe": "parameters", "stat": "names", "net": "words"}.get(arguments.command)
            if words is None or any(word.startswith("-") for word in more):
                names = (arguments.command, getattr(arguments, "what", None), getattr(arguments, "action", None))
                top.misused(f"unrecognized arguments: {' '.join(more)}",
                            " ".join(["muenfast", *(name for name in names if name is not None)]))
            getattr(arguments, words).extend(more)
    except SystemExit as end:  # argparse: 0 after --help and --version, 2 for misuse
        return int(end.code or 0)
    if arguments.command is None:
        top.print_help(sys.stderr)
        return 2
    level = os.environ.get("MUENFAST_LOG", "WARNING").upper()
    logging.basicConfig(stream=sys.stderr, format="muenfast: %(message)s",
                        level=level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "WARNING")
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logging.getLogger("muenfast").warning("MUENFAST_LOG is %r: the levels are DEBUG, INFO, WARNING, ERROR", level)
    if getattr(arguments, "verbose", False):
        logging.getLogger("muenfast").setLevel(logging.INFO)
    command = _module(arguments.command)
    try:
        interrupts()
        return int(command.run(arguments))
    except UsageError as error:
        return _fail(error, 2)
    except MuenfastError as error:
        return _fail(error, 1)
    except BrokenPipeError:
        # The reader of our output has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(describe(error), 1)
    except ImportError as error:
        if not (error.name or "").startswith("muenfast."):
            raise
        return _fail(f"{error}: the compiled modules are missing; install with `pip install .` or `make build`", 1)
    except KeyboardInterrupt:
        return 130


def _fail(error: object, status: int) -> int:
    print(f"muenfast: {error}", file=sys.stderr)
    return status
