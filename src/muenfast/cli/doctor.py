"""muenfast doctor: what this machine offers, and what dead processes left."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from muenfast.cli._text import word

if TYPE_CHECKING:
    from muenfast.doctor import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--fix, --json."""
    parser.add_argument("--fix", action="store_true", help="remove what dead processes left; nothing in use, nothing "
                                                           "that is not muenfast's")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.epilog = ("Status 0: nothing that block devices need is missing, and no left-over remains; else 1. "
                     "Only left-overs in this user's runtime directory, its regions and dead nodes are seen.")


def run(arguments: argparse.Namespace) -> int:
    """Prints one entry per check and per left-over."""
    from muenfast import doctor

    checks = doctor.checks()
    if not arguments.json:
        width = max(len(check.name) for check in checks)
        for check in checks:
            _show(check, width)
    left: list[dict[str, Any]] = []
    for found in doctor.leftovers():
        problem = doctor.remove(found) if arguments.fix else None
        left.append({"kind": found.kind, "path": found.path, "text": found.text,
                     "removed": arguments.fix and problem is None, "problem": problem})
    remaining = sum(not entry["removed"] for entry in left)
    missing = [check.name for check in checks if check.needed and check.state == doctor.MISSING]
    if arguments.json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "leftovers": left}, indent=2))
    else:
        for entry in left:
            done = "removed" if entry["removed"] else "not removed" if arguments.fix else "left over"
            print(f"{done}: {entry['kind']} {word(entry['path'])} ({entry['problem'] or entry['text']})")
        if missing:
            print(f"no block devices without: {', '.join(missing)}")
        if remaining and not arguments.fix:
            print("`muenfast doctor --fix` removes what is left over")
        elif not left:
            print("no left-overs")
    return 1 if missing or remaining else 0


def _show(check: Check, width: int) -> None:
    state = "OK" if check.state == "ok" else check.state
    print(f"{state:<8}{check.name:<{width}}  {check.text}")
    if check.state != "ok":
        print(f"{'':<8}{'':<{width}}  lost: {check.lost}")
        print(f"{'':<8}{'':<{width}}  next: {check.next}")
