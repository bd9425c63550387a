"""--policy, --subject and --only of the serving commands: everything from the file, and nothing beyond it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from muenfast import params
from muenfast.cli._serving import patience
from muenfast.errors import UsageError

if TYPE_CHECKING:
    from muenfast.broker import Broker
    from muenfast.declared import Declared
    from muenfast.sandbox import Files, Landlock

log = logging.getLogger("muenfast")

# Of every process: the interpreter, libraries, what the kernel tells of itself; devices without contents.
_READ = ("/usr", "/lib", "/lib64", "/proc", "/sys", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf",
         "/etc/ld.so.cache", "/dev/urandom")
_WRITE = ("/dev/null",)
_NAMES = ("/dev", "/run/muenfast")
_LATE = ("hashlib", "urllib.parse", "glob")  # that any room loads when it needs them


@dataclass(frozen=True, slots=True)
class Role:
    """decided: options that are the policy's. modules: all that are loaded later: the interpreter's files may be root's
    only. bounds: what the process may reach, and whether it may use io_uring, of the subject's part and what --only names.
    broker: likewise, what makes the process that does what takes privileges."""

    decided: Collection[str]
    modules: Collection[str]
    bounds: Callable[[Declared, list[str] | None], tuple[Files, bool]]
    broker: Callable[[Declared, list[str] | None], Broker] | None = None


def add_policy_options(parser: argparse.ArgumentParser, what: str) -> None:
    """what: that a subject has several of."""
    add = parser.add_argument
    add("--policy", metavar="FILE", help="everything as this policy says, for the subject; what it decides cannot be given "
                                         "besides (docs/policy.md)")
    add("--subject", metavar="NAME", help="whose part of the policy; as root the process becomes its user")
    add("--only", metavar="L", help=f"of the subject's {what} these (default: all)")
    add("--no-sandbox", action="store_true", default=None,
        help="to debug: no filter of system calls, and no Landlock (strace, gdb, stores that start programs)")


def by_policy(arguments: argparse.Namespace) -> bool:
    """Whether a policy says what is served. Raises UsageError for options that go with one, and there is none."""
    if arguments.policy is not None:
        return True
    for name in ("subject", "only"):
        if getattr(arguments, name) is not None:
            raise UsageError("goes with --policy", option=f"--{name}", value=getattr(arguments, name))
    if arguments.no_sandbox is not None:
        raise UsageError("goes with --policy", option="--no-sandbox")
    return False


def declared(arguments: argparse.Namespace, role: Role,
             stack: ExitStack) -> tuple[Declared, list[str] | None, Broker | None]:
    """The subject's part of the policy, and what --only names; this process is the subject's user's from then on, and where
    it was root has a broker, if the role has one, until `stack` ends, and is held within the role's bounds. Raises
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
    from muenfast.privileges import become, no_new
    from muenfast.shm import give_runtime_dir, runtime_dir

    found = replace(Declared.load(arguments.policy, arguments.subject), patience=patience(arguments))
    broker: Broker | None = None
    files, io_uring = role.bounds(found, only)
    confined = not arguments.no_sandbox and (os.geteuid() == 0 or role.broker is None)
    if os.geteuid() == 0:
        for name in (*role.modules, *_LATE):
            import_module(name)
        account = found.account
        if not os.environ.get("MUENFAST_RUNTIME_DIR"):
            give_runtime_dir(account.uid, account.gid)
        broker = None if role.broker is None else stack.enter_context(role.broker(found, only))
        landlock = _landlock(files, account.uid) if confined else None      # while all paths can be looked up
        become(account.uid, account.gid, account.groups)
    else:
        no_new()
        runtime_dir()
        landlock = _landlock(files, os.geteuid()) if confined else None
    os.umask(0o077)     # chmod(2) is refused from here on
    if landlock is not None:
        from muenfast import sandbox

        landlock.restrict()
        sandbox.install(sandbox.CALLS | sandbox.IO_URING if io_uring else sandbox.CALLS)
    return found, only, broker


class Watched:
    """Says it, once, where the broker has ended before this process. consequence: what that means."""

    def __init__(self, broker: Broker | None, consequence: str) -> None:
        self._broker, self._consequence, self._said = broker, consequence, False

    def ended(self) -> bool:
        if self._broker is None or not self._broker.ended:
            return False
        if not self._said:
            self._said = True
            log.error("the process that kept privileges for this one (broker, %d) has ended: %s", self._broker.pid,
                      self._consequence)
        return True

    def status(self) -> dict[str, Any]:
        """For the answer to `status`."""
        return {} if self._broker is None else {"broker": self._broker.counts()}


def _landlock(files: Files, uid: int) -> Landlock:
    """What a role reaches, and what each process does."""
    from muenfast.sandbox import Landlock
    from muenfast.shm import runtime_dir_of

    files.read += [*_READ, sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(__file__))]
    files.write += _WRITE
    files.names += _NAMES
    files.change.append(runtime_dir_of(uid))
    return Landlock(files)
