"""Comma lists, sizes, protocols, flags and numbers (muenfast.params)."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muenfast import params
from muenfast.errors import UsageError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def refused(call: object, *arguments: object, **options: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return caught.value


# ---- lists


@pytest.mark.parametrize(("text", "entries"), [
    ("a", ["a"]), ("a,b,c", ["a", "b", "c"]), (" a ,\tb", ["a", "b"]), ("a b,c", ["a b", "c"]),
    ("/x@0+4K,y", ["/x@0+4K", "y"])])
def test_split(text: str, entries: list[str]) -> None:
    """A comma separates; white space around an entry is no part of it, white space within is."""
    assert params.split("--req", text) == entries


@pytest.mark.parametrize(("text", "index"), [("", 0), (",", 0), ("a,", 1), (",a", 0), ("a, ,b", 1), (" ", 0)])
def test_split_refuses_an_empty_entry(text: str, index: int) -> None:
    """The error names the option, the entry and the whole list."""
    error = refused(params.split, "--req", text)
    assert (error.option, error.index, error.value) == ("--req", index, "")
    assert repr(text) in error.rule


def test_split_lets_an_entry_be_empty_where_that_means_something() -> None:
    """An empty entry of --shm, for one, keeps its connection inline."""
    assert params.split("--shm", "a,,b,", empty=True) == ["a", "", "b", ""]


@given(st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1)
                .filter(lambda text: text == text.strip()), min_size=1))
def test_split_is_the_inverse_of_join(entries: list[str]) -> None:
    """Whatever stands between two commas comes out as it is."""
    assert params.split("--req", ",".join(entries)) == entries


def test_same_length() -> None:
    """Lists that were not given do not count."""
    assert params.same_length({"--req": ["a", "b"], "--size": None, "--resp": ["c", "d"]}) == 2


@pytest.mark.parametrize(("second", "index", "words"), [
    (["c"], 1, "is missing, there are 1 here and 2 in --req"),
    (["c", "d", "e"], 2, "has no partner in --req, there are 3 here and 2")])
def test_same_length_names_the_first_entry_without_a_partner(second: list[str], index: int, words: str) -> None:
    """Option, position and both lengths stand in the message."""
    error = refused(params.same_length, {"--req": ["a", "b"], "--resp": second})
    assert (error.option, error.index, error.value) == ("--resp", index, second[index] if index < len(second) else None)
    assert words in str(error)


def span(index: int, path: str, start: int = 0, end: float = math.inf) -> tuple[str, int, str, str, int, float]:
    return "--req", index, f"{path}@{start}", path, start, end


def test_apart_lets_neighbours_live() -> None:
    """Slices that touch share no byte, nor do those of different files."""
    params.apart([span(0, "/f", 0, 4096), span(1, "/f", 4096, 8192), span(2, "/g"), span(3, "/f", 8192)], "rule")


@pytest.mark.parametrize("second", [span(1, "/f"), span(1, "/f", 4095, 5000), span(1, "/f", 10, 20),
                                    span(1, "/f", 0, 1)])
def test_apart_refuses_any_common_byte(second: tuple[str, int, str, str, int, float]) -> None:
    """Equal, nested and partly overlapping: the later one is named, and the one it overlaps."""
    error = refused(params.apart, [span(0, "/f", 0, 4096), second], "the rule")
    assert (error.option, error.index, error.value) == ("--req", 1, second[2])
    assert "the rule; this overlaps --req, entry 0" in str(error)


# ---- sizes


@given(st.integers(1, (1 << 62) - 1), st.sampled_from("KMGT"), st.booleans(), st.sampled_from(["", "B", "iB"]))
def test_a_size_means_powers_of_1024(value: int, unit: str, small: bool, tail: str) -> None:
    """A number and a unit in either case; up to 2^62 bytes, the end excluded."""
    text = f"{value}{unit.lower() if small else unit}{tail}"
    nbytes = value * UNITS[unit]
    if nbytes < 1 << 62:
        assert params.size("--size", 0, text) == nbytes
    else:
        assert "below 2^62" in str(refused(params.size, "--size", 0, text))


@given(st.integers(1, (1 << 62) - 1))
def test_a_size_in_plain_bytes(value: int) -> None:
    """Decimal and hexadecimal, leading zeros included (never octal)."""
    assert params.size(None, None, str(value)) == value
    assert params.size(None, None, f"0{value}") == value
    assert params.size(None, None, f"{value:#x}") == params.size(None, None, f"0X{value:X}") == value


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 16), st.integers(0, 1 << 17))
def test_a_size_keeps_to_its_multiple_and_least(value: int, multiple: int, least: int) -> None:
    """Accepted exactly when both hold."""
    good = value >= max(1, least) and value % multiple == 0
    with contextlib.nullcontext() if good else pytest.raises(UsageError):
        assert params.size("--size", 1, str(value), multiple=multiple, least=max(1, least)) == value


@given(st.text())
def test_a_size_of_any_text_is_a_number_or_a_usage_error(text: str) -> None:
    """No text whatsoever gets through as something else, or out as another exception."""
    with contextlib.suppress(UsageError):
        assert 1 <= params.size("--size", 0, text) < 1 << 62


@pytest.mark.parametrize("text", [
    "", "0", "-1", "+1", "1.5M", "M", "64 M", " 64M", "64M\n", "64X", "64MM", "64iB", "64B", "0x", "0xG", "1e6", "1_000",
    "٣", "²", "9" * 5000, "0x" + "f" * 5000, str(1 << 62), "4194304T"])
def test_a_size_that_is_none(text: str) -> None:
    """Also digits of other scripts, and numbers so long that int() itself would refuse them."""
    error = refused(params.size, "--size", 3, text)
    assert (error.option, error.index, error.value) == ("--size", 3, text)


def test_a_size_tells_the_rule_that_was_broken() -> None:
    """Too small, no multiple, too large: each says what holds."""
    assert "at least 4096 bytes and a multiple of 4096" in str(refused(params.size, "s", None, "5000", multiple=4096,
                                                                       least=4096))
    assert "multiple" not in str(refused(params.size, "s", None, "5", least=4096))
    assert "below 2^62" in str(refused(params.size, "s", None, "8388608T"))


# ---- protocols, flags, numbers


@given(st.integers(1, (1 << 64) - 1))
def test_a_protocol_is_hexadecimal(value: int) -> None:
    """With or without 0x, in either case, up to 64 bits."""
    for text in (f"{value:x}", f"{value:X}", f"{value:#x}", f"0X{value:016x}"):
        assert params.protocol("--req-protocol", 0, text) == value


@pytest.mark.parametrize("text", ["", "0", "0x0", "0000000000000000", "xyz", "1" * 17, "0x" + "1" * 17, "-1", " 1",
                                  "1\n", "1_0", "٣", "f" * 5000])
def test_a_protocol_that_is_none(text: str) -> None:
    """Zero is none; 17 digits are too many even where the value would fit."""
    error = refused(params.protocol, "--req-protocol", 1, text)
    assert (error.option, error.index, error.value) == ("--req-protocol", 1, text)


@pytest.mark.parametrize(("texts", "value"), [(("yes", "Yes", "y", "1", "true", "on", "ON"), True),
                                              (("no", "NO", "n", "0", "false", "off"), False)])
def test_a_flag(texts: tuple[str, ...], value: bool) -> None:
    """The words that kernel modules take, in either case."""
    assert {params.flag("--read-only", 0, text) for text in texts} == {value}


@pytest.mark.parametrize("text", ["", "maybe", "2", "yess", " yes", "ja"])
def test_a_flag_that_is_none(text: str) -> None:
    """Anything else is refused rather than taken for no."""
    assert refused(params.flag, "--read-only", 2, text).index == 2


@given(st.integers(-10, 200))
def test_a_number_stands_between_its_bounds(value: int) -> None:
    """Both bounds included."""
    with contextlib.nullcontext() if 1 <= value <= 100 else pytest.raises(UsageError, match="from 1 to 100"):
        assert params.number("--poll", None, str(value), least=1, most=100, what="a pause") == value


@pytest.mark.parametrize("text", ["", "x", "1.5", "٣", "1_0", "1 ", "0x10", "9" * 5000])
def test_a_number_that_is_none(text: str) -> None:
    """Decimal digits of ASCII and nothing else."""
    assert refused(params.number, "--poll", None, text, least=1, most=10**30, what="a pause").value == text
