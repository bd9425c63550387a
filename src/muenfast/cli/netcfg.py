"""muenfast net-cfg, and the program muennet_cfg: children of a served network interface, and their marks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from muenfast import marks
from muenfast.errors import MuenfastError, UsageError

# What each operation takes, in this order.
_WORDS = {"add_child": ("PARENT", "CHILD"), "del_child": ("CHILD",), "add_mark": ("CHILD", "MARK"),
          "del_mark": ("CHILD", "MARK")}
_TEXTS = {
    "add_child": "make an interface CHILD below PARENT, on the same channels",
    "del_child": "take it away; its marks are the parent's again",
    "add_mark": "incoming packets with that netfilter mark are CHILD's from now on",
    "del_mark": "they are the parent's again",
}
_REFUSED = "Command failed"  # what scripts that call muennet_cfg know


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The operation and its words."""
    parser.epilog = ("It asks the process that serves the interface of that name in this network namespace. Outgoing "
                     "packets carry the mark that netfilter gave them, whatever interface they leave by. Status: 0 done, "
                     "1 refused or failed, 2 a wrong call.")
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, text in _TEXTS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        for word in _WORDS[name]:
            sub.add_argument(word.lower(), metavar=word, help={
                "MARK": f"1 to {marks.LEAST_MARKS}, or to the number of path-MTU entries where that is larger"}.get(word))


def run(arguments: argparse.Namespace) -> int:
    """Asks the process that serves the interface."""
    try:
        _perform(arguments.what, [getattr(arguments, word.lower()) for word in _WORDS[arguments.what]])
    except MuenfastError as error:
        return _refuse("muenfast", error, 2 if isinstance(error, UsageError) else 1)
    return 0


def program(argv: Sequence[str] | None = None) -> int:
    """`muennet_cfg`: the same by the module's tool's name and arguments; the exit status, 1 for whatever is not done."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if not words or len(words) - 1 != len(_WORDS.get(words[0], words)):
        print(_usage(), file=sys.stderr)
        return 1
    try:
        _perform(words[0], words[1:])
    except MuenfastError as error:
        return _refuse("muennet_cfg", error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _usage() -> str:
    lines = [f"muennet_cfg {name} {' '.join(words)}" for name, words in _WORDS.items()]
    return "usage: " + "\n       ".join(lines)


def _refuse(who: str, error: MuenfastError, status: int) -> int:
    print(f"{who}: {error}", file=sys.stderr)
    print(_REFUSED, file=sys.stderr)
    return status


def _perform(operation: str, words: Sequence[str]) -> None:
    """Raises MuenfastError."""
    from muenfast import names

    interface, request = names.request(operation, words[0], words[1] if len(words) > 1 else None)
    answer = names.ask(interface, request)
    if not answer.get("ok"):
        raise MuenfastError(str(answer.get("error")))
