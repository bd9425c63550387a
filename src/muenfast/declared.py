"""What a policy declares for one subject, as the configurations that are served: that and nothing beyond it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from muenfast import sandbox, shm
from muenfast.backing import Device
from muenfast.connection import PATIENCE, Channels, Options
from muenfast.enforcement import Account, accounts, permit
from muenfast.errors import UsageError
from muenfast.export import ExportConfig, check_devices
from muenfast.net import MOST_INTERFACES, InterfaceConfig, interfaces_from_lists
from muenfast.net import Options as NetOptions
from muenfast.policy import Connection, Finding, Interface, Policy, PolicyError, Region, load
from muenfast.serving import config_of

__all__ = ["Declared", "refusals"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Declared:
    """What `subject` of a policy has to do here. known: the users of all subjects. patience: as Channels has it."""

    policy: Policy
    subject: str
    known: Mapping[str, Account]
    patience: int = PATIENCE

    @classmethod
    def load(cls, path: str, subject: str) -> Declared:
        """Raises PolicyError, UsageError, OSError; and PermissionError where this process is another user's."""
        policy, findings = load(path)
        if not findings:
            known, findings = accounts(policy)
        if findings:
            raise PolicyError(path, findings)
        if subject not in policy.subjects:
            raise UsageError(f"is no subject of {path}, whose are {', '.join(policy.subjects) or 'none'}",
                             option="--subject", value=subject)
        account = known[subject]
        if os.geteuid() not in (0, account.uid):
            raise UsageError(f"runs as {account.name}, and this process is user {os.geteuid()}'s", option="--subject",
                             value=subject, hint="start it as that user, or as root")
        return cls(policy, subject, known)

    @property
    def account(self) -> Account:
        """Its user here."""
        return self.known[self.subject]

    def _permit(self, name: str) -> shm.Permit:
        return permit(self.policy.regions[name], dict(self.known), self.policy.path)

    def config(self, index: int, each: Connection | Interface) -> ExportConfig | InterfaceConfig:
        """An entry of the policy as lists would have it, without its permits. Raises UsageError."""
        return self._connection(index, each) if isinstance(each, Connection) else self._network(index, each)

    def _channels(self, index: int, each: Connection) -> ExportConfig:
        config = self._connection(index, each)
        names = [each.request, each.response, *([] if each.buffer is None else [each.buffer])]
        return replace(config, channels=replace(config.channels, permits=tuple(map(self._permit, names)),
                                                patience=self.patience))

    def _connection(self, index: int, each: Connection) -> ExportConfig:
        regions = self.policy.regions
        request, response = regions[each.request], regions[each.response]
        buffer = None if each.buffer is None else regions[each.buffer]
        assert request.protocol is not None and response.protocol is not None   # _completed() of policy.py
        config = config_of(
            req=request.locator.text, resp=response.locator.text, shm=None if buffer is None else buffer.locator.text,
            req_protocol=f"{request.protocol:x}", resp_protocol=f"{response.protocol:x}", device=list(each.devices),
            read_only=each.read_only, poll=each.poll, pool=None if each.pool is None else str(each.pool),
            timeout=None if each.timeout is None else str(each.timeout), strict_oneway=not request.bell,
            checksum=each.checksum)
        where = each.where
        called = Options(req=f"{where}: request", resp=f"{where}: response", buffer=f"{where}: buffer",
                         device=f"{where}: device", read_only=f"{where}: read_only")
        return replace(config, channels=replace(config.channels, index=index, options=called))

    def exports(self, only: Iterable[str] | None = None) -> list[ExportConfig]:
        """The connections that it serves. only: their names. Raises UsageError."""
        configs = [self._channels(index, each) for index, each in enumerate(self._servers(only))]
        check_devices(configs)
        return configs

    def _servers(self, only: Iterable[str] | None) -> list[Connection]:
        return self._chosen("connection", {name: each for name, each in self.policy.connections.items()
                                           if each.server == self.subject}, "serves", only)

    def channels(self, only: Iterable[str] | None = None) -> list[Channels]:
        """The connections whose disks it has. only: their names. Raises UsageError."""
        return [self._channels(index, each).channels for index, each in enumerate(self._clients(only))]

    def _clients(self, only: Iterable[str] | None) -> list[Connection]:
        return self._chosen("connection", {name: each for name, each in self.policy.connections.items()
                                           if each.client == self.subject}, "has the disks of", only)

    def files_of_exports(self, only: Iterable[str] | None = None) -> sandbox.Files:
        """What exports() reach. Raises UsageError."""
        found = sandbox.Files()
        for each in self._servers(only):
            self._reach(found, each.request, each.response, each.buffer)
            for text in each.devices:
                device = Device.parse(text)
                if device.kind == "file":
                    (found.read if each.read_only else found.write).append(device.path)
                elif device.name:       # a region that is made, under a name that comes last
                    found.change.append("/dev/shm")
                elif device.kind == "py":
                    found.read += [place for place in map(os.path.realpath, sys.path) if place != "/"]
                    if "/" in device.module:
                        found.read.append(os.path.dirname(os.path.realpath(device.module)))
                    found.change += each.paths
        return found

    def files_of_clients(self, only: Iterable[str] | None = None) -> sandbox.Files:
        """What channels() reach. Raises UsageError."""
        found = sandbox.Files()
        for each in self._clients(only):
            self._reach(found, each.request, each.response, each.buffer)
        return found

    def files_of_interfaces(self, only: Iterable[str] | None = None) -> sandbox.Files:
        """What interfaces() reach. Raises UsageError."""
        found = sandbox.Files()
        for each in self._own_interfaces(only):
            self._reach(found, each.inp, each.out, each.pmtu)
        return found

    def _reach(self, found: sandbox.Files, *names: str | None) -> None:
        """Adds regions, and their bells."""
        for name in names:
            if name is None:
                continue
            region = self.policy.regions[name]
            (found.write if self.subject in region.writers else found.read).append(region.locator.path)
            if region.kind == "channel" and region.bell and (bell := region.locator.bell) is not None:
                found.write.append(bell.path)

    def disks(self, only: Iterable[str] | None = None) -> int:
        """How many disks channels() has. Raises UsageError."""
        return sum(len(each.devices) for each in self._clients(only))

    def children(self) -> dict[str, str]:
        """The names that children of its interfaces may have, and whose they are then."""
        return {child: each.name for each in self.policy.interfaces.values() if each.subject == self.subject
                for child in each.children}

    def interfaces(self, only: Iterable[str] | None = None) -> list[InterfaceConfig]:
        """Its network interfaces. only: their names. Raises UsageError."""
        chosen = self._own_interfaces(only)
        if len(chosen) > MOST_INTERFACES:
            raise UsageError(f"{self.subject} has {len(chosen)} interfaces, one process has at most {MOST_INTERFACES}",
                             option="--subject", value=self.subject, hint="choose some by --only")
        return [self._interface(index, each) for index, each in enumerate(chosen)]

    def _own_interfaces(self, only: Iterable[str] | None) -> list[Interface]:
        return self._chosen("interface", {name: each for name, each in self.policy.interfaces.items()
                                          if each.subject == self.subject}, "has", only)

    def _interface(self, index: int, each: Interface) -> InterfaceConfig:
        permits = [None if name is None else self._permit(name) for name in (each.inp, each.out, each.pmtu)]
        return replace(self._network(index, each), permits=(permits[0], permits[1], permits[2]), patience=self.patience)

    def _network(self, index: int, each: Interface) -> InterfaceConfig:
        regions = self.policy.regions
        inp, out, pmtu = (None if name is None else regions[name] for name in (each.inp, each.out, each.pmtu))
        where = each.where
        called = NetOptions(**{name: f"{where}: {'in' if name == 'inp' else name}" for name in NetOptions.__slots__})

        def text(region: Region | None) -> str:
            return "" if region is None else region.locator.text

        [config] = interfaces_from_lists(
            each.name, inp=text(inp), out=text(out),
            reader_protocol=None if inp is None else f"{inp.protocol:x}",
            writer_protocol=None if out is None else f"{out.protocol:x}", mtu=str(each.mtu), flags=each.flags,
            pmtu=None if pmtu is None else pmtu.locator.text, netns=each.netns, carrier=each.carrier, mac=each.mac,
            addr=each.addr, marks=each.marks or "auto", up=each.up, offload=each.offload, poll=each.poll,
            bells=all(region.bell for region in (inp, out) if region is not None), checksum=each.checksum, options=called)
        return replace(config, index=index)

    def _chosen(self, kind: str, all_of_it: Mapping[str, _T], verb: str, only: Iterable[str] | None) -> list[_T]:
        """Its entries of a kind, in the file's order, or those that `only` names, in that order."""
        if not all_of_it:
            raise UsageError(f"{self.policy.path} has no {kind} that this subject {verb}", option="--subject",
                             value=self.subject)
        if only is None:
            return list(all_of_it.values())
        names = list(only)
        for index, name in enumerate(names):
            if name not in all_of_it:
                raise UsageError(f"{self.policy.path} has no such {kind} of {self.subject}, but {', '.join(all_of_it)}",
                                 option="--only", index=index, value=name)
            if name in names[:index]:
                raise UsageError("is named twice", option="--only", index=index, value=name)
        return [all_of_it[name] for name in names]


def refusals(policy: Policy) -> list[Finding]:
    """What serving would refuse of each connection and interface by itself, as the texts of devices, addresses and names.
    Precondition: load() found nothing."""
    found = []
    entries: list[Connection | Interface] = [*policy.connections.values(), *policy.interfaces.values()]
    for each in entries:
        try:
            Declared(policy, each.server if isinstance(each, Connection) else each.subject, {}).config(0, each)
        except UsageError as error:
            at = (error.option or "").removeprefix(each.where).lstrip(": ")
            given = "" if error.value is None else f" {str(error.value)!r}"
            hint = f" ({error.hint})" if error.hint else ""
            found.append(Finding(each.where, f"{at}{given}: {error.rule}{hint}"))
    return found
