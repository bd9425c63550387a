"""The rules of children and marks, and the table that a receiver reads while they change."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from muenfast._marks import MarkTable
from muenfast.errors import UsageError
from muenfast.marks import MOST_CHILDREN, Child, Family, check_mark
from muenfast.params import interface


@pytest.fixture
def family() -> Family:
    made = Family()
    made.add_parent("net0", net_hdr=True)
    return made


def test_the_public_integration_test(family: Family) -> None:
    assert family.add_child("net0", "child1") == Child("child1", "net0", 1, set())
    family.add_mark("child1", 24)
    assert family.children["child1"].marks == {24}
    family.del_mark("child1", 24)
    family.del_child("child1")
    assert not family.children and not family.parents["net0"].children


@pytest.mark.parametrize(("path_mtus", "good", "bad"), [
    (0, [1, 100], [0, 101, 0xFFFFFFFF]), (50, [1, 100], [0, 101]), (100, [100], [101]), (4096, [1, 101, 4096], [0, 4097]),
])
def test_marks_of_a_child(path_mtus: int, good: list[int], bad: list[int]) -> None:
    family = Family()
    family.add_parent("net0", net_hdr=True, path_mtus=path_mtus)
    family.add_child("net0", "child1")
    for mark in good:
        family.add_mark("child1", mark)
    for mark in bad:
        with pytest.raises(UsageError, match=f"MARK '{mark}': a mark for a child of net0 is 1 to {max(100, path_mtus)}"):
            family.add_mark("child1", mark)
    assert family.children["child1"].marks == set(good)


@pytest.mark.parametrize(("call", "message"), [
    (lambda f: f.add_child("net1", "x"), "PARENT 'net1': there is no such interface"),
    (lambda f: f.add_child("child1", "x"), "PARENT 'child1': it is a child itself, of net0"),
    (lambda f: f.add_child("eth0", "x"), "PARENT 'eth0': only an interface with net_hdr can have children"),
    (lambda f: f.add_child("net0", "child1"), "CHILD 'child1': there is an interface of that name"),
    (lambda f: f.add_child("net0", "eth0"), "CHILD 'eth0': there is an interface of that name"),
    (lambda f: f.add_child("net0", "net0"), "CHILD 'net0': there is an interface of that name"),
    (lambda f: f.add_child("net0", "sixteen-bytes-xx"), "CHILD 'sixteen-bytes-xx': interface name too long"),
    (lambda f: f.add_child("net0", ""), "CHILD '': an interface's name has no blanks"),
    (lambda f: f.del_child("child9"), "CHILD 'child9': there is no such child"),
    (lambda f: f.del_child("net0"), "CHILD 'net0': it is no child, but has channels"),
    (lambda f: f.add_mark("child9", 1), "CHILD 'child9': there is no such child"),
    (lambda f: f.add_mark("child1", 24), "MARK '24': child1 has it already"),
    (lambda f: f.add_mark("child2", 24), "MARK '24': child1 has it already"),
    (lambda f: f.del_mark("child2", 24), "MARK '24': child2 does not have it"),
    (lambda f: f.del_mark("child9", 24), "CHILD 'child9': there is no such child"),
    (lambda f: f.add_parent("child1", net_hdr=True), "--name 'child1': there is an interface of that name"),
    (lambda f: f.remove_parent("child1"), "PARENT 'child1': there is no such interface"),
])
def test_what_is_refused_changes_nothing(family: Family, call: Any, message: str) -> None:
    family.add_parent("eth0", net_hdr=False)
    for name in ("child1", "child2"):
        family.add_child("net0", name)
    family.add_mark("child1", 24)
    before = repr((family.parents, family.children))
    with pytest.raises(UsageError) as caught:
        call(family)
    assert str(caught.value).startswith(message)
    assert repr((family.parents, family.children)) == before


@pytest.mark.parametrize("name", [".", "..", "a b", "a/b", "a:b", "a\tb", "a\0b", "x" * 16, "ü" * 8, "net%d", ""])
def test_names_that_the_kernel_does_not_take(name: str) -> None:
    with pytest.raises(UsageError, match="interface's name has no blanks|interface name too long"):
        interface("CHILD", None, name)


@pytest.mark.parametrize("name", ["a", "...", "x" * 15, "ü" * 7, "net0.5", "-", "a-b_c@d"])
def test_names_that_it_takes(name: str) -> None:
    assert interface("CHILD", None, name) == name


def test_marks_as_text() -> None:
    assert [check_mark(text) for text in ("0", "24", "0x18", "0XFFFFFFFF", "4294967295", "010")] == \
        [0, 24, 24, 0xFFFFFFFF, 0xFFFFFFFF, 10]
    for text in ("", "-1", "+1", "x", "0x", "1.0", " 1", "1 ", "4294967296", "0x100000000", "٣", "1_0"):
        with pytest.raises(UsageError, match="a mark is a number of 32 bits"):
            check_mark(text)


def test_a_parent_goes_with_its_children(family: Family) -> None:
    family.add_parent("net1", net_hdr=True)
    for parent, child in (("net0", "a"), ("net0", "b"), ("net1", "c")):
        family.add_child(parent, child)
        family.add_mark(child, 5 if child != "b" else 6)
    assert [child.name for child in family.remove_parent("net0")] == ["a", "b"]
    assert set(family.children) == {"c"} and set(family.parents) == {"net1"}


def test_a_number_is_given_to_as_many_children_as_there_may_be(family: Family) -> None:
    for number in range(MOST_CHILDREN):
        assert family.add_child("net0", f"c{number}").number == number + 1
    with pytest.raises(UsageError, match="at most 255 children"):
        family.add_child("net0", "one-more")
    family.del_child("c7")
    assert family.add_child("net0", "one-more").number == 8


NAMES = st.sampled_from(["net0", "net1", "eth0", "a", "b", "c", "d", "", "x" * 16, "nobody"])
SOME_MARKS = st.one_of(st.integers(1, 6), st.sampled_from([0, 99, 100, 101, 150, 151, 0xFFFFFFFF]))
HIGHEST = {"net0": 100, "net1": 150, "eth0": 0}


class Model(RuleBasedStateMachine):
    """Families beside a plain model: child -> (parent, marks), and the tables beside both."""

    def __init__(self) -> None:
        super().__init__()
        self.family = Family()
        self.model: dict[str, tuple[str, set[int]]] = {}
        self.tables = {name: MarkTable(HIGHEST[name]) for name in ("net0", "net1")}
        for name, highest in HIGHEST.items():
            table = self.tables.get(name)
            options = {} if table is None else {"set_mark": table.set}
            self.family.add_parent(name, net_hdr=bool(highest), path_mtus=highest, **options)  # type: ignore[arg-type]

    @rule(parent=NAMES, child=NAMES)
    def add_child(self, parent: str, child: str) -> None:
        good = bool(HIGHEST.get(parent)) and child not in HIGHEST and child not in self.model and 0 < len(child) < 16
        with contextlib.nullcontext() if good else pytest.raises(UsageError):
            self.family.add_child(parent, child)
        if good:
            self.model[child] = (parent, set())

    @rule(child=NAMES)
    def del_child(self, child: str) -> None:
        with contextlib.nullcontext() if child in self.model else pytest.raises(UsageError):
            self.family.del_child(child)
        self.model.pop(child, None)

    @rule(child=NAMES, mark=SOME_MARKS)
    def add_mark(self, child: str, mark: int) -> None:
        parent, marks = self.model.get(child, ("eth0", set()))
        taken = any(mark in others for above, others in self.model.values() if above == parent)
        good = 1 <= mark <= HIGHEST[parent] and not taken
        with contextlib.nullcontext() if good else pytest.raises(UsageError):
            self.family.add_mark(child, mark)
        if good:
            marks.add(mark)

    @rule(child=NAMES, mark=SOME_MARKS)
    def del_mark(self, child: str, mark: int) -> None:
        good = mark in self.model.get(child, ("", set()))[1]
        with contextlib.nullcontext() if good else pytest.raises(UsageError):
            self.family.del_mark(child, mark)
        if good:
            self.model[child][1].remove(mark)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def a_mark_that_is_held(self, data: st.DataObject) -> None:
        child = data.draw(st.sampled_from(sorted(self.model)))
        self.add_mark(child, data.draw(st.integers(1, 150)))

    @invariant()
    def the_same(self) -> None:
        assert {name: (child.parent, child.marks) for name, child in self.family.children.items()} == self.model
        for name, table in self.tables.items():
            numbers = {child.number: child for child in self.family.parents[name].children.values()}
            assert len(numbers) == len(self.family.parents[name].children) and 0 not in numbers
            for mark in [*range(HIGHEST[name] + 3), 0x80000000, 0xFFFFFFFF]:
                owner = table.get(mark)
                assert owner == 0 or mark in numbers[owner].marks
            assert all(table.get(mark) == number for number, child in numbers.items() for mark in child.marks)


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


# ---- the table

def test_a_table_knows_every_mark() -> None:
    table = MarkTable(100)
    assert table.highest == 100
    table.set(1, 7)
    table.set(100, 255)
    assert [table.get(mark) for mark in (0, 1, 2, 100, 101, 0xFFFFFFFF)] == [0, 7, 0, 255, 0, 0]
    for mark in (0, 101, 0xFFFFFFFF):
        with pytest.raises(UsageError, match="1 to 100"):
            table.set(mark, 1)
    with pytest.raises(UsageError, match="below 2"):
        MarkTable(1 << 24)


def test_a_change_settles_at_once_while_nobody_looks() -> None:
    table = MarkTable(100)
    table.set(5, 1)
    assert table.settle(0)
    table.enter()
    table.leave()
    assert table.settle(0)


def test_a_change_settles_with_the_turn_that_may_have_missed_it() -> None:
    table = MarkTable(100)
    table.set(5, 1)
    table.enter()
    held = table.get(5)
    table.set(5, 0)
    assert held == 1 and not table.settle(0.01)
    settled: list[bool] = []
    waiting = threading.Thread(target=lambda: settled.append(table.settle(10)))
    waiting.start()
    time.sleep(0.02)
    assert not settled
    table.leave()
    table.enter()       # the next turn does not hold it up
    waiting.join()
    assert settled == [True] and table.get(5) == 0


def test_no_number_is_in_use_once_a_change_has_settled() -> None:
    """A receiver that looks up and uses numbers as fast as it can, beside one who makes and ends children."""
    table, over = MarkTable(100), threading.Event()
    alive: set[int] = set()
    wrong: list[int] = []

    def receive() -> None:
        while not over.is_set():
            table.enter()
            for mark in range(1, 9):
                number = table.get(mark)
                time.sleep(0)       # the other one's turn, while this one has the number in hand
                if number and number not in alive:
                    wrong.append(number)
            table.leave()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    receiver = threading.Thread(target=receive)
    receiver.start()
    try:
        for number in range(1, 400):
            alive.add(number)
            for mark in range(1, 9):
                table.set(mark, number)
            time.sleep(0)
            for mark in range(1, 9):
                table.set(mark, 0)
            assert table.settle(10)
            alive.remove(number)
    finally:
        over.set()
        receiver.join()
        sys.setswitchinterval(interval)
    assert not wrong


def test_children_are_renamed() -> None:
    """Also into each other's names; where two would be called alike, or as their parent, they are called as before."""
    told: dict[int, int] = {}
    family = Family()
    family.add_parent("net0", net_hdr=True, set_mark=told.__setitem__)
    one, two = family.add_child("net0", "c1"), family.add_child("net0", "c2")
    family.add_mark("c1", 5)
    family.rename({"c1": "c2", "c2": "c1"})
    assert (one.name, two.name) == ("c2", "c1") and family.children == {"c2": one, "c1": two}
    for wrong in ({"c1": "c2"}, {"c1": "net0"}, {"c1": "x", "c2": "x"}):
        family.rename(wrong)
        assert (one.name, two.name) == ("c2", "c1")
    family.rename({"c2": "c3"})
    family.add_mark("c3", 6)
    assert family.del_child("c3") is one and told == {5: 0, 6: 0} and list(family.children) == ["c1"]
