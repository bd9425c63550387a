"""Children of network interfaces and their marks: the rules, without any I/O.

A child stands below a parent, never below a child, and only where packets have marks (net_hdr). A mark belongs to at most
one child of its parent; an incoming packet with that mark is the child's, every other one the parent's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from muenfast import params
from muenfast.errors import UsageError

LEAST_MARKS = 100   # marks there are where the path-MTU region has no more entries
MOST_CHILDREN = 255  # of one parent


def check_mark(text: str) -> int:
    """A mark as it stands on a command line, decimal or hexadecimal with 0x, 32 bits. Raises UsageError."""
    found = re.fullmatch(r"0[xX](?P<hex>[0-9a-fA-F]{1,16})|(?P<decimal>[0-9]{1,20})", text)
    mark = None if found is None else int(found["hex"], 16) if found["hex"] else int(found["decimal"])
    if mark is None or mark >> 32:
        raise UsageError("a mark is a number of 32 bits, decimal or hexadecimal with 0x", option="MARK", value=text)
    return mark


@dataclass(slots=True)
class Child:
    """One child. number: what stands for it in its parent's table, 1 to MOST_CHILDREN, lowest first."""

    name: str
    parent: str
    number: int
    marks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Parent:
    """An interface that has channels. highest: largest mark that a child may hold, 0 where there are no marks. set_mark:
    told of each change, mark and number of the child (0: the parent itself); MarkTable.set."""

    name: str
    highest: int
    set_mark: Callable[[int, int], object]
    children: dict[str, Child] = field(default_factory=dict)


class Family:
    """The interfaces of one process in one network namespace, with their children and marks.

    Every change is checked first and then made, or nothing is. For one thread at a time. What a change means for real
    interfaces is up to the caller, who takes it back where that fails.
    """

    def __init__(self) -> None:
        self._parents: dict[str, Parent] = {}
        self._children: dict[str, Child] = {}

    @property
    def parents(self) -> Mapping[str, Parent]:
        return self._parents

    @property
    def children(self) -> Mapping[str, Child]:
        return self._children

    # -------------------------------------------------------------- parents

    def add_parent(self, name: str, *, net_hdr: bool, path_mtus: int = 0,
                   set_mark: Callable[[int, int], object] = lambda mark, number: None) -> Parent:
        """path_mtus: entries of its path-MTU region. Raises UsageError."""
        self._free(name, "--name")
        parent = Parent(name, max(LEAST_MARKS, path_mtus) if net_hdr else 0, set_mark)
        self._parents[name] = parent
        return parent

    def remove_parent(self, name: str) -> list[Child]:
        """With its children, which are returned. Raises UsageError."""
        parent = self._parents.get(name)
        if parent is None:
            raise UsageError("there is no such interface", option="PARENT", value=name)
        gone = list(parent.children.values())
        for child in gone:
            self.del_child(child.name)
        del self._parents[name]
        return gone

    # -------------------------------------------------------------- what muennet_cfg may ask for

    def add_child(self, parent: str, child: str) -> Child:
        """A child without marks. Raises UsageError."""
        above = self._parents.get(parent)
        if above is None:
            if parent in self._children:
                raise UsageError(f"it is a child itself, of {self._children[parent].parent}; children have none",
                                 option="PARENT", value=parent)
            raise UsageError("there is no such interface", option="PARENT", value=parent)
        if not above.highest:
            raise UsageError("only an interface with net_hdr can have children: packets of others carry no marks",
                             option="PARENT", value=parent)
        self._free(child, "CHILD")
        number = _lowest_free({each.number for each in above.children.values()})
        if number > MOST_CHILDREN:
            raise UsageError(f"an interface has at most {MOST_CHILDREN} children", option="PARENT", value=parent)
        new = Child(child, parent, number)
        self._children[child] = above.children[child] = new
        return new

    def rename(self, names: Mapping[str, str]) -> None:
        """Children that are called otherwise by now. names: new ones by old ones; where two would be called alike (in two
        network namespaces), or as a parent, all keep those that they have here."""
        found = {old: names.get(old, old) for old in self._children}
        if len({*found.values(), *self._parents}) < len(found) + len(self._parents):
            return
        for parent in self._parents.values():
            parent.children = {found[old]: child for old, child in parent.children.items()}
        self._children = {found[old]: child for old, child in self._children.items()}
        for name, child in self._children.items():
            child.name = name

    def del_child(self, child: str) -> Child:
        """Takes it away; its marks are the parent's again. Its number may be the next child's: first MarkTable.settle().
        Raises UsageError."""
        gone = self._child(child)
        parent = self._parents[gone.parent]
        for mark in gone.marks:
            parent.set_mark(mark, 0)
        del parent.children[child], self._children[child]
        return gone

    def add_mark(self, child: str, mark: int) -> Child:
        """Raises UsageError."""
        owner = self._child(child)
        parent = self._parents[owner.parent]
        if not 1 <= mark <= parent.highest:
            raise UsageError(f"a mark for a child of {parent.name} is 1 to {parent.highest}", option="MARK", value=mark)
        for each in parent.children.values():
            if mark in each.marks:
                raise UsageError(f"{each.name} has it already", option="MARK", value=mark)
        parent.set_mark(mark, owner.number)
        owner.marks.add(mark)
        return owner

    def del_mark(self, child: str, mark: int) -> Child:
        """Raises UsageError."""
        owner = self._child(child)
        if mark not in owner.marks:
            raise UsageError(f"{child} does not have it", option="MARK", value=mark)
        self._parents[owner.parent].set_mark(mark, 0)
        owner.marks.remove(mark)
        return owner

    # -------------------------------------------------------------- checks

    def _child(self, name: str) -> Child:
        child = self._children.get(name)
        if child is None:
            what = "it is no child, but has channels" if name in self._parents else "there is no such child"
            raise UsageError(what, option="CHILD", value=name)
        return child

    def _free(self, name: str, option: str) -> None:
        params.interface(option, None, name)
        if name in self._parents or name in self._children:
            raise UsageError("there is an interface of that name", option=option, value=name)


def _lowest_free(numbers: set[int]) -> int:
    number = 1
    while number in numbers:
        number += 1
    return number
