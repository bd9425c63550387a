"""A policy on this machine: its subjects' users, its regions made theirs, and what is otherwise than it says.

The kernel enforces it: a channel belongs to its writer's user, its reader's group may read it, and nobody else may open it.
apply() makes that so, audit() tells where it is not. Both need root: nobody else may give files away, or see who has them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import grp
import logging
import os
import pwd
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from muenfast import shm
from muenfast._ring import layout
from muenfast.backing import Device
from muenfast.errors import UsageError
from muenfast.policy import Bell, Finding, Policy, Region

log = logging.getLogger("muenfast")

__all__ = ["Account", "Step", "accounts", "apply", "audit", "permit"]

_SHM = "/dev/shm"
_TRANSPORT: int = layout()["transport"]
_UNDECLARED = "a flow that no line declares"


@dataclass(frozen=True, slots=True)
class Account:
    """A subject's user here. gid: of the group that its readers' regions get. groups: all that its processes have."""

    name: str
    uid: int
    gid: int
    groups: frozenset[int]


@dataclass(frozen=True, slots=True)
class Step:
    """What apply() did, or would do, with a region. what: "created", "changed", "unchanged", or "left" where it is not as
    it has to be, and may not be touched. text: how and why."""

    where: str
    path: str
    what: str
    text: str


# ------------------------------------------------------------------ who is who

def _user(text: str) -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError, OverflowError):
        return pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    return None


def _group(text: str) -> grp.struct_group | None:
    with contextlib.suppress(KeyError, OverflowError):
        return grp.getgrgid(int(text)) if text.isdecimal() else grp.getgrnam(text)
    return None


def accounts(policy: Policy) -> tuple[dict[str, Account], list[Finding]]:
    """The subjects' users, as far as they are known here, and what keeps them from being apart."""
    found: dict[str, Account] = {}
    findings: list[Finding] = []
    for subject in policy.subjects.values():
        user = _user(subject.user)
        if user is None:
            findings.append(Finding(subject.where, f"there is no user {subject.user} here (useradd --system "
                                                   f"--user-group {subject.user} makes one)"))
            continue
        group = None if subject.group is None else _group(subject.group)
        if subject.group is not None and group is None:
            findings.append(Finding(subject.where, f"there is no group {subject.group} here"))
            continue
        gid = user.pw_gid if group is None else group.gr_gid
        groups = frozenset(os.getgrouplist(user.pw_name, gid))
        found[subject.name] = Account(user.pw_name, user.pw_uid, gid, groups)
    return found, [*findings, *_apart(policy, found)]


def _apart(policy: Policy, found: dict[str, Account]) -> Iterator[Finding]:
    """Where the users and groups of this machine let in more than the policy declares."""
    users = pwd.getpwall()
    for name, account in found.items():
        where = policy.subjects[name].where
        if account.uid == 0:
            yield Finding(where, "its user is root, whom no permission keeps out")
        if account.gid == 0:
            yield Finding(where, "its group is root's, which regions have that nobody shares")
        for other, theirs in found.items():
            if other < name and theirs.uid == account.uid:
                yield Finding(where, f"its user {account.name} is that of {policy.subjects[other].where}: the kernel "
                                     "cannot keep them apart")
            elif other != name and account.gid in theirs.groups:
                yield Finding(where, f"{_UNDECLARED}: {other}'s user {theirs.name} is in its group, and may read what "
                                     f"{name} may")
        if not any(region.shared_with == name for region in policy.regions.values()):
            continue
        subjects = {each.uid for each in found.values()}
        members = {user.pw_name for user in users if user.pw_uid not in subjects and user.pw_uid != 0
                   and account.gid in os.getgrouplist(user.pw_name, user.pw_gid)}
        for member in sorted(members):
            yield Finding(where, f"{_UNDECLARED}: the user {member}, of no subject, is in its group, and may read what "
                                 f"{name} may")


def permit(thing: Region | Bell, known: dict[str, Account], by: str) -> shm.Permit:
    """To whom a region has to belong. by: what says so."""
    owner, other = thing.owner, thing.shared_with
    return shm.Permit(0 if owner is None else known[owner].uid, 0 if other is None else known[other].gid, thing.mode, by)


# ------------------------------------------------------------------ as it is

def _difference(thing: Region | Bell, wanted: shm.Permit, seen: os.stat_result) -> tuple[str | None, bool]:
    """What is otherwise than declared, and whether that is more than owner, group, mode and access control list."""
    if not stat.S_ISREG(seen.st_mode):
        return "is no regular file", True
    if seen.st_size != thing.size:
        return f"has {seen.st_size} bytes, declared are {thing.size}", True
    difference = wanted.difference(seen)
    if difference is None and shm.has_acl(thing.locator.path):
        difference = "has an access control list"
    return difference, False


@dataclass(frozen=True, slots=True)
class _Holder:
    """A process that has a file open or mapped."""

    pid: int
    uid: int
    comm: str
    writes: bool


def _holders() -> dict[tuple[int, int], list[_Holder]]:
    """Who has what open or mapped, by device and inode; but ourselves."""
    found: dict[tuple[int, int], dict[int, _Holder]] = {}

    def note(key: tuple[int, int], pid: int, uid: int, comm: str, writes: bool) -> None:
        before = found.setdefault(key, {}).get(pid)
        found[key][pid] = _Holder(pid, uid, comm, writes or before is not None and before.writes)

    for place in glob.iglob("/proc/[0-9]*"):
        pid = int(place[6:])
        if pid == os.getpid():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):    # it has ended
            uid, comm = _who_is(place)
            try:
                for key, writes in _open_in(place):
                    note(key, pid, uid, comm, writes)
            except PermissionError:     # of another kind of sandbox, say, which even root may not look into
                log.warning("process %d (%s) lets nobody see what it has open", pid, comm)
    return {key: list(holders.values()) for key, holders in found.items()}


def _who_is(place: str) -> tuple[int, str]:
    """The effective user of a process, and its name."""
    with open(f"{place}/status", errors="replace") as file:
        fields = dict(line.rstrip("\n").partition(":")[::2] for line in file)
    return int(fields["Uid"].split()[1]), fields["Name"].strip()


def _open_in(place: str) -> Iterator[tuple[tuple[int, int], bool]]:
    """Device and inode of each file that a process has mapped or open, and whether for writing."""
    yield from shm.mapped_by(place)
    for name in os.listdir(f"{place}/fd"):
        with contextlib.suppress(FileNotFoundError):
            seen = os.stat(f"{place}/fd/{name}")
            if stat.S_ISREG(seen.st_mode):
                yield (seen.st_dev, seen.st_ino), _writes(f"{place}/fdinfo/{name}")


def _writes(fdinfo: str) -> bool:
    with open(fdinfo) as file:
        for line in file:
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


# ------------------------------------------------------------------ as it is to be

def _ready(policy: Policy, what: str) -> dict[str, Account]:
    """The subjects' users. Raises UsageError where they cannot be told apart, PermissionError without root."""
    known, findings = accounts(policy)
    if findings:
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise UsageError(f"{findings[0]}{more}", hint="`muenfast policy check` lists all of them")
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, f"{what} needs root")
    return known


def apply(policy: Policy, *, dry_run: bool = False) -> Iterator[Step]:
    """Makes every region what the policy says, one by one; what is so already, or in use, is not touched. dry_run: nothing
    is.

    Raises UsageError, PermissionError, OSError before anything was done, or where the system refuses.
    """
    known = _ready(policy, "to give regions to their users")
    for thing in policy.objects():
        wanted, path = permit(thing, known, policy.path), thing.locator.path
        try:
            seen = os.lstat(path)
        except FileNotFoundError:
            if not dry_run:
                shm.make_region(thing.locator, thing.size, thing.mode, (wanted.uid, wanted.gid))
            yield Step(thing.where, path, "created", f"{thing.size} bytes, {_whose(wanted)}")
            continue
        difference, deep = _difference(thing, wanted, seen)
        if difference is None:
            yield Step(thing.where, path, "unchanged", f"{thing.size} bytes, {_whose(wanted)}")
        elif holders := _holders().get((seen.st_dev, seen.st_ino)):     # who came since apply() began, too
            yield Step(thing.where, path, "left", f"{difference}; it is in use by {_who(holders[0])}")
        elif not stat.S_ISREG(seen.st_mode):
            yield Step(thing.where, path, "left", f"{difference}: remove it, or name another")
        elif deep and (thing.kind == "path MTUs" or not thing.locator.posix):
            yield Step(thing.where, path, "left", f"{difference}: what it holds would be lost: remove it first")
        else:
            if not dry_run:
                if deep:
                    shm.remove_region(thing.locator)
                    shm.make_region(thing.locator, thing.size, thing.mode, (wanted.uid, wanted.gid))
                else:
                    _give(path, seen, wanted)
            yield Step(thing.where, path, "changed", f"{difference}; now {thing.size} bytes, {_whose(wanted)}")


def _give(path: str, seen: os.stat_result, wanted: shm.Permit) -> None:
    """Owner, group, mode and nothing more, of the very file that was looked at."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino) != (seen.st_dev, seen.st_ino):
            raise OSError(errno.EBUSY, "the name means another file whenever we look", path)
        os.fchmod(fd, 0)        # nobody between two owners
        os.fchown(fd, wanted.uid, wanted.gid)
        if shm.has_acl(fd):
            os.removexattr(fd, "system.posix_acl_access")
        os.fchmod(fd, wanted.mode)
    finally:
        os.close(fd)


def _whose(wanted: shm.Permit) -> str:
    user, group = (str(number) for number in (wanted.uid, wanted.gid))
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(wanted.uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(wanted.gid).gr_name
    return f"{user}:{group} {wanted.mode:03o}"


def _who(holder: _Holder) -> str:
    user = str(holder.uid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(holder.uid).pw_name
    return f"process {holder.pid} ({holder.comm}, user {user})"


# ------------------------------------------------------------------ as it is not

def audit(policy: Policy) -> list[Finding]:
    """Where the running system differs from the policy: regions that are missing, others', of another mode; more regions
    than are declared; processes that hold what is not theirs. Raises UsageError, PermissionError, OSError."""
    known = _ready(policy, "to see who holds what")
    held = _holders()
    return [*_declared(policy, known, held), *_undeclared(policy, known, held)]


def _declared(policy: Policy, known: dict[str, Account],
              held: dict[tuple[int, int], list[_Holder]]) -> Iterator[Finding]:
    for thing in policy.objects():
        path = thing.locator.path
        try:
            seen = os.lstat(path)
        except FileNotFoundError:
            yield Finding(thing.where, f"{path} is missing (`muenfast policy apply` makes it)")
            continue
        difference, _ = _difference(thing, permit(thing, known, policy.path), seen)
        if difference is not None:
            yield Finding(thing.where, f"{path} {difference}")
        if not stat.S_ISREG(seen.st_mode):
            continue
        writers, users = ({known[name].uid for name in names} for names in (thing.writers, thing.users))
        for holder in held.get((seen.st_dev, seen.st_ino), ()):
            if holder.uid not in users:
                yield Finding(thing.where, f"{path} is held by {_who(holder)}, which is none of "
                                           f"{', '.join(thing.users)}")
            elif holder.writes and holder.uid not in writers:
                yield Finding(thing.where, f"{path} is held for writing by {_who(holder)}, of its reader")


def _undeclared(policy: Policy, known: dict[str, Account],
                held: dict[tuple[int, int], list[_Holder]]) -> Iterator[Finding]:
    """Regions in shared memory that no line declares: all but other users' own ones, which no subject can open."""
    declared = {os.path.realpath(thing.locator.path) for thing in policy.objects()}
    for connection in policy.connections.values():
        for device in map(Device.parse, connection.devices):
            if device.kind == "ram" and device.name is not None:
                declared.add(os.path.realpath(shm.Locator.parse(device.name).path))
    for name in sorted(os.listdir(_SHM)):
        path = os.path.join(_SHM, name)
        try:
            seen = os.lstat(path)
        except FileNotFoundError:
            continue
        if path in declared or not stat.S_ISREG(seen.st_mode):
            continue
        able = [f"{subject} may {'write' if mode & 2 else 'read'} it" for subject, account in known.items()
                if (mode := _rights(seen, account))]
        if shm.has_acl(path):
            able.append("it has an access control list")
        ours = seen.st_uid == 0 or seen.st_uid in {account.uid for account in known.values()}
        if not able and not ours and not _is_channel(path):
            continue
        holders = held.get((seen.st_dev, seen.st_ino), ())
        text = f"a region that no line declares, {_whose(shm.Permit(seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)))}"
        yield Finding(path, "; ".join([text, *able, *(f"held by {_who(holder)}" for holder in holders)]))


def _rights(seen: os.stat_result, account: Account) -> int:
    """What a file's mode allows a user: 4 to read, 2 to write, as the kernel picks the class."""
    mode = seen.st_mode
    shift = 6 if seen.st_uid == account.uid else 3 if seen.st_gid in account.groups else 0
    return mode >> shift & 6


def _is_channel(path: str) -> bool:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return int.from_bytes(file.read(8), sys.byteorder) == _TRANSPORT
    return False
