"""--policy, --subject and --only of the serving commands: everything from the file, and nothing beyond it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from muenfast import params
from muenfast.cli._serving import patience
from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast.declared import Declared

@dataclass(frozen=True, slots=True)
class Role:
    """decided: options that are the policy's. modules: all that are loaded later: the interpreter's files may be root's
    only. capabilities: those of root that set-up still needs."""

    decided: Collection[str]
    modules: Collection[str]
    capabilities: Collection[str] = ()


def add_policy_options(parser: argparse.ArgumentParser, what: str) -> None:
    """what: that a subject has several of."""
    add = parser.add_argument
    add("--policy", metavar="FILE", help="everything as this policy says, for the subject; what it decides cannot be given "
                                         "besides (docs/policy.md)")
    add("--subject", metavar="NAME", help="whose part of the policy; as root the process becomes its user")
    add("--only", metavar="L", help=f"of the subject's {what} these (default: all)")


def by_policy(arguments: argparse.Namespace) -> bool:
    """Whether a policy says what is served. Raises UsageError for options that go with one, and there is none."""
    if arguments.policy is not None:
        return True
    for name in ("subject", "only"):
        if getattr(arguments, name) is not None:
            raise UsageError("goes with --policy", option=f"--{name}", value=getattr(arguments, name))
    return False


def declared(arguments: argparse.Namespace, role: Role) -> tuple[Declared, list[str] | None]:
    """The subject's part of the policy, and what --only names; this process is the subject's user's from then on. Raises
    UsageError, OSError."""
    if arguments.subject is None:
        raise UsageError("required beside --policy: whose part of it", option="--subject")
    for name in role.decided:
        if getattr(arguments, name) not in (None, False):
            option = "--" + name.replace("inp", "in").replace("_", "-")
            raise UsageError("is the policy's to say, and cannot be given besides", option=option,
                             hint=f"change {arguments.policy}, or leave out --policy")
    only = None if arguments.only is None else params.split("--only", arguments.only)
    from muenfast.declared import Declared
    from muenfast.privileges import become
    from muenfast.shm import give_runtime_dir

    found = replace(Declared.load(arguments.policy, arguments.subject), patience=patience(arguments))
    if os.geteuid() == 0:
        for name in role.modules:
            import_module(name)
        account = found.account
        if not os.environ.get("MUENFAST_RUNTIME_DIR"):
            give_runtime_dir(account.uid, account.gid)
        become(account.uid, account.gid, account.groups, role.capabilities)
    return found, only
