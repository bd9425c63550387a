"""muenfast stat: what the serving processes of this user do."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints one block per export or disk; status 1 when a process does not answer."""
    from muenfast.control import ask_all

    answers = ask_all({"command": "status"})
    if arguments.json:
        print(json.dumps(answers, indent=2))
    elif not answers:
        print("nothing of this user is serving")
    else:
        for answer in answers:
            print(f"process {answer['pid']}: " + (f"muenfast {answer.get('command')}" if answer["ok"]
                                                  else f"no answer: {answer.get('error')}"))
            for entry in answer.get("entries", ()):
                _show(entry)
    return 0 if all(answer["ok"] for answer in answers) else 1


def _show(entry: dict[str, Any]) -> None:
    flags = " read-only" if entry.get("read_only") else ""
    print(f"  {entry['role']} {entry['req']} {entry['resp']} {entry.get('device', '-')} {entry['size']} bytes{flags}: "
          f"{entry.get('failure') or entry['state']}")
    waiting = {"in flight": entry["in_flight"]} if entry.get("in_flight") else {}
    print(f"    {_words(waiting | entry['counters'])}")
    nbd = entry.get("nbd")
    if isinstance(nbd, dict):
        print(f"    NBD {nbd['socket']}: {_words(nbd['counters'])}")


def _words(counters: object) -> str:
    assert isinstance(counters, dict)
    return ", ".join(f"{name} {value}" for name, value in counters.items() if value) or "no traffic"
