"""The wire formats as the C headers have them, against an independent description with struct.

The headers are compared twice: by what they assert (parsed as text) and by the bytes that come of them.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from muenfast import Reader, Result, Writer
from muenfast._ring import bell_state, layout

# Name, struct code. No padding anywhere: "=" keeps struct from adding any, the offsets below are sums.
CHANNEL = [("transport", "Q"), ("epoch", "Q"), ("protocol", "Q"), ("size", "Q"), ("elements", "Q"), ("reserved", "Q"),
           ("wsc", "Q"), ("wc", "Q")]
EVENT = [("kind", "I"), ("error", "i"), ("id", "Q"), ("valid", "I"), ("priv", "I")]
BELL = [("magic", "Q"), ("seq", "I"), ("waiters", "I"), ("ringer", "Q"), ("state", "I"), ("flags", "I"),
        ("store", "16s"), ("zeroes", "I"), ("unused", "12s"), ("reader_rc", "Q"), ("reader_epoch", "Q"),
        ("reader_sums", "I"), ("unused2", "44s")]
REQUEST = [("kind", "H"), ("device", "H"), ("tag", "I"), ("length", "Q"), ("device_offset", "Q"), ("buffer_offset", "Q")]
RESPONSE = [("kind", "H"), ("device", "H"), ("tag", "I"), ("status", "Q")]
STRUCTS = {"ring_header": CHANNEL, "block_event_header": EVENT, "bell_page": BELL,
           "block_event": [("header", "24s"), ("data", "4096s")], "block_request": REQUEST, "block_response": RESPONSE,
           "block_offer": [("sectors", "Q"), ("magic", "Q"), ("nonce", "Q"), ("sum", "I"), ("again", "I")]}

HEADER = Path(__file__).parents[1] / "src" / "muenfast" / "_wire.h"


def offsets(fields: list[tuple[str, str]]) -> dict[str, int]:
    """Where each field starts."""
    found, at = {}, 0
    for name, code in fields:
        found[name] = at
        at += struct.calcsize("=" + code)
    return found


def size(fields: list[tuple[str, str]]) -> int:
    return struct.calcsize("=" + "".join(code for _, code in fields))


def decoded(fields: list[tuple[str, str]], data: bytes | bytearray) -> dict[str, object]:
    values = struct.unpack_from("=" + "".join(code for _, code in fields), data)
    return {name: value for (name, _), value in zip(fields, values, strict=True)}


@pytest.mark.parametrize("name", STRUCTS)
def test_every_offset_and_size_is_asserted_as_described(name: str) -> None:
    """The C compiler itself refuses a layout other than the one described here, field by field."""
    source = HEADER.read_text(encoding="utf-8")
    asserted = {field: int(at) for struct_name, field, at
                in re.findall(r"^MF_OFFSET\((\w+), (\w+), (\d+)\);", source, re.MULTILINE) if struct_name == name}
    assert asserted == offsets(STRUCTS[name])
    sized = re.search(rf"^MF_SIZE\({name}, (\w+)\);", source, re.MULTILINE)
    assert sized is not None
    bytes_ = re.sub(r"^SHMSTREAM_HEADER_SIZE$", "64", sized[1])
    assert int(bytes_) == size(STRUCTS[name])


@pytest.mark.parametrize("name", STRUCTS)
def test_no_field_of_a_struct_is_without_an_assert(name: str) -> None:
    """A field added to a struct without its assert is noticed."""
    source = HEADER.read_text(encoding="utf-8")
    body = re.search(rf"^typedef struct \{{\n((?:(?!^\}}).*\n)*)\}} {name};", source, re.MULTILINE)
    assert body is not None
    members = re.findall(r"^\s+\w+ (\w+)(?:\[\w+\])?;", body[1], re.MULTILINE)
    assert members == [field for field, _ in STRUCTS[name]]


def test_layout_tells_what_is_described() -> None:
    """Python's view of the constants agrees with the protocol text."""
    assert layout() == {
        "transport": 0x487312B6B79A9B6D, "header_size": 64, "header_fields": offsets(CHANNEL), "block_size": 4096,
        "sector_size": 512, "event_size": 4120, "event_header_size": 24, "bell_size": 128,
        "request_protocol": 0x9570208DCA77DB19, "response_protocol": 0x9851BE3282FEF0DC,
        "buffer_protocol": 0x5155684453516F3D, "buffer_request_size": 32, "buffer_response_size": 16}


def test_a_writer_puts_the_header_of_the_specification() -> None:
    """The bytes of a freshly activated channel are those of the protocol text; so is the transport in memory order."""
    region = bytearray(b"\xff" * (64 + 3 * 5 + 2))
    with Writer(region, size=5, protocol=0x1122334455667788, epoch=0x99AABBCCDDEEFF01):
        assert bytes(region[:8]) == bytes.fromhex("6D9B9AB7B6127348")
        assert decoded(CHANNEL, region) == {
            "transport": 0x487312B6B79A9B6D, "epoch": 0x99AABBCCDDEEFF01, "protocol": 0x1122334455667788, "size": 5,
            "elements": 3, "reserved": 0, "wsc": 0, "wc": 0}
        assert not any(region[64:79])


def test_elements_stand_one_after_the_other_without_padding() -> None:
    """Slot k of elements of 3 bytes starts at 64 + 3k; the counters say how many there are."""
    region = bytearray(64 + 4 * 3)
    with Writer(region, size=3, protocol=1, epoch=1) as writer:
        for text in (b"abc", b"def", b"ghi", b"jkl", b"mno"):
            writer.write(text)
        assert bytes(region[64:]) == b"mnodefghijkl"
        header = decoded(CHANNEL, region)
        assert (header["wsc"], header["wc"]) == (5, 5)


def test_a_stopped_writer_leaves_epoch_zero_and_nothing_else_changed() -> None:
    """Stopping is epoch := 0."""
    region = bytearray(64 + 4 * 8)
    writer = Writer(region, size=8, protocol=1, epoch=7)
    writer.write(b"x")
    before = bytes(region)
    writer.close()
    assert bytes(region) == before[:8] + bytes(8) + before[16:]


def test_a_reader_takes_each_field_from_its_place() -> None:
    """A header packed by struct is read as it was meant, with no two fields confused."""
    size_, elements = 6, 7
    region = bytearray(64 + size_ * elements)
    struct.pack_into("=8Q", region, 0, 0x487312B6B79A9B6D, 0xE0C4, 0xABCD, size_, elements, 0xFFFF, 2, 2)
    region[64:76] = b"first!second"
    with Reader(bytes(region), protocol=0xABCD) as reader:
        assert reader.read() is None
        assert reader.result is Result.EPOCH_CHANGED
        assert (reader.epoch, reader.size, reader.elements) == (0xE0C4, size_, elements)
        assert [reader.read(), reader.read(), reader.read()] == [b"first!", b"second", None]


def test_a_block_event_in_a_channel_is_the_described_header_and_its_block() -> None:
    """4120 bytes from struct arrive as 24 bytes of header and 4096 of data."""
    event = struct.pack("=IiQII", 1, -5, 0x0102030405060708, 1, 0xCAFE) + bytes(range(256)) * 16
    assert len(event) == size(STRUCTS["block_event"]) == layout()["event_size"]
    region = bytearray(64 + 4 * 4120)
    with Writer(region, size=4120, protocol=1, epoch=1) as writer, Reader(region) as reader:
        reader.read()
        writer.write(event)
        got = reader.read()
        assert got == event
        assert decoded(EVENT, got) == {"kind": 1, "error": -5, "id": 0x0102030405060708, "valid": 1, "priv": 0xCAFE}


def test_a_bell_is_marked_and_names_the_ringing_writer() -> None:
    """Writer and reader leave their facts at the described places of the bell page, and only there."""
    bell, region = bytearray(4096), bytearray(64 + 4 * 8)
    writer = Writer(region, size=8, protocol=1, epoch=0x1234567890, bell=bell)
    reader = Reader(region, bell=bell)
    reader.read()
    writer.write_many(b"." * 24)
    reader.read()
    reader.read()
    found = decoded(BELL, bell)
    assert found["magic"] == int.from_bytes(b"MuenBELL", "little")
    assert bytes(bell[:8]) == b"MuenBELL"
    assert (found["ringer"], found["reader_epoch"], found["reader_rc"]) == (0x1234567890, 0x1234567890, 2)
    assert (found["zeroes"], found["unused"], found["reader_sums"], found["unused2"]) == (0, bytes(12), 0, bytes(44))
    assert not any(bell[128:])
    writer.close()
    reader.close()
    assert decoded(BELL, bell)["ringer"] == 0


def test_bell_state_reads_each_field_from_its_place() -> None:
    """What chan show prints of a bell is what struct put there."""
    page = bytearray(128)
    struct.pack_into("=Q", page, 0, int.from_bytes(b"MuenBELL", "little"))
    struct.pack_into("=IIQII16s", page, 8, 11, 12, 13, 14, 15, bytes(range(16)))
    struct.pack_into("=QQ", page, 64, 17, 18)
    assert bell_state(page) == {"sequence": 11, "waiters": 12, "ringer": 13, "state": 14, "flags": 15,
                                "store": bytes(range(16)).hex(), "reader_rc": 17, "reader_epoch": 18}
    assert bell_state(bytearray(128)) is None
