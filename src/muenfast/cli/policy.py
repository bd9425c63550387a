"""muenfast policy: who may talk to whom, checked, made so, drawn, and compared with the system."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from muenfast.cli._text import word
from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast.policy import Finding, Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """check, apply, graph, audit."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        sub.add_argument("file", metavar="FILE", help="a policy (docs/policy.md has every key)")
        sub.add_argument("--json", action="store_true", help="print everything as JSON")
        return sub

    sub = action("check", "say what is wrong with a policy; status 1 if anything is")
    sub.add_argument("--file-only", action="store_true", help="not whether this machine has its users and keeps them apart")
    sub = action("apply", "make every region the policy's, and touch none that is so already or in use; needs root")
    sub.add_argument("--dry-run", action="store_true", help="only say what would be done")
    sub = action("graph", "draw which subject's knowledge may come to which other one")
    sub.add_argument("--svg", metavar="FILE", help="as SVG, into a file (- is standard output)")
    action("audit", "compare the running system with the policy; status 1 if anything differs; needs root")


def loaded(path: str) -> Policy:
    """A policy without findings, as far as its file tells. Raises PolicyError, OSError."""
    from muenfast.policy import PolicyError, load

    policy, findings = load(path)
    if findings:
        raise PolicyError(path, findings)
    return policy


def run(arguments: argparse.Namespace) -> int:
    """Runs one action."""
    return int(globals()["_" + arguments.action](arguments))


def _told(arguments: argparse.Namespace, findings: list[Finding], fine: str) -> int:
    if arguments.json:
        print(json.dumps({"findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(finding)
        if not findings:
            print(fine)
    return 1 if findings else 0


def _check(arguments: argparse.Namespace) -> int:
    from muenfast.declared import refusals
    from muenfast.enforcement import accounts
    from muenfast.policy import PolicyError, load

    try:
        policy, findings = load(arguments.file)
    except PolicyError as error:
        return _told(arguments, error.findings, "")
    if not findings:
        findings += refusals(policy)
    if not arguments.file_only:
        findings += accounts(policy)[1]
    counts = {"subjects": policy.subjects, "regions": policy.regions, "connections": policy.connections,
              "interfaces": policy.interfaces, "flows": policy.flows()}
    told = ", ".join(f"{len(entries)} {what}" for what, entries in counts.items())
    return _told(arguments, findings, f"{word(arguments.file)}: {told}: nothing is wrong")


def _apply(arguments: argparse.Namespace) -> int:
    from muenfast.enforcement import apply

    left, steps = 0, []
    for step in apply(loaded(arguments.file), dry_run=arguments.dry_run):
        left += step.what == "left"
        steps.append(dataclasses.asdict(step))
        if not arguments.json:
            would = "would be " if arguments.dry_run and step.what in ("created", "changed") else ""
            print(f"{would}{step.what} {word(step.path)}: {step.text}")
    if arguments.json:
        print(json.dumps({"dry_run": arguments.dry_run, "steps": steps}, indent=2))
    return 1 if left else 0


def _graph(arguments: argparse.Namespace) -> int:
    from muenfast import flowgraph

    policy = loaded(arguments.file)
    if arguments.json:
        if arguments.svg is not None:
            raise UsageError("a graph is JSON or SVG", option="--svg", value=arguments.svg)
        found: dict[str, Any] = {"flows": [dataclasses.asdict(flow) for flow in policy.flows()],
                                 "reach": {name: policy.reach(name) for name in policy.subjects}}
        print(json.dumps(found, indent=2))
        return 0
    if arguments.svg is None or arguments.svg == "-":
        print(*([flowgraph.svg(policy)] if arguments.svg else flowgraph.text(policy)), sep="\n")
        return 0
    with open(arguments.svg, "w", encoding="utf-8") as file:
        file.write(flowgraph.svg(policy))
    print(f"{word(os.path.abspath(arguments.svg))}: {len(policy.flows())} flows")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from muenfast.enforcement import audit

    return _told(arguments, audit(loaded(arguments.file)),
                 f"{word(arguments.file)}: the system is as it says")
