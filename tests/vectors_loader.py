"""Loads the hand-written vectors below vectors/ (format: vectors/README.md)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIRECTORY = Path(__file__).with_name("vectors")
DATA_BYTES = 4096


@dataclass(frozen=True)
class Read:
    """One read by a reader at `rc` (None: one that never synchronised) and its outcome."""

    rc: int | None
    result: str
    data: bytes | None
    lost: int
    rc_after: int | None


@dataclass(frozen=True)
class ChannelVector:
    name: str
    rule: str
    region: bytes
    header: dict[str, int]
    reader_protocol: int
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class EventVector:
    """A request, the disk it meets (`blocks` of 4096 bytes, each byte `fill`) and its response."""

    name: str
    rule: str
    blocks: int
    fill: int
    request: bytes
    request_fields: dict[str, int]
    response: bytes
    response_fields: dict[str, int]


@dataclass(frozen=True)
class Effect:
    """`bytes` bytes from `offset` on of the buffer or a device that are `fill` afterwards."""

    where: str
    offset: int
    bytes: int
    fill: int


@dataclass(frozen=True)
class BufferVector:
    """A request with a shared buffer, what it meets, its response, and all that changes."""

    name: str
    rule: str
    devices: tuple[bytes, ...]
    buffer: bytes
    request: bytes
    request_fields: dict[str, int]
    response: bytes
    response_fields: dict[str, int]
    effects: tuple[Effect, ...]


def _number(value: str | int) -> int:
    return value if isinstance(value, int) else int(value, 0)


def _hex(lines: list[str]) -> bytes:
    return bytes.fromhex(" ".join(lines))


def _read(table: dict[str, Any]) -> Read:
    return Read(
        rc=_number(table["rc"]) if "rc" in table else None,
        result=table["result"],
        data=bytes.fromhex(table["data"]) if "data" in table else None,
        lost=_number(table.get("lost", 0)),
        rc_after=_number(table["rc_after"]) if "rc_after" in table else None,
    )


def _channel(document: dict[str, Any]) -> ChannelVector:
    region = _hex(document["region"]["hex"])
    if len(region) != document["region"]["bytes"]:
        raise ValueError(f"{document['name']}: the region has {len(region)} bytes")
    return ChannelVector(
        name=document["name"],
        rule=document["rule"],
        region=region,
        header={field: _number(value) for field, value in document["header"].items()},
        reader_protocol=_number(document["reader"]["protocol"]),
        reads=tuple(_read(table) for table in document["reads"]),
    )


def _event(table: dict[str, Any]) -> tuple[bytes, dict[str, int]]:
    head = _hex(table["hex"])
    if len(head) != 24:
        raise ValueError(f"an event header of {len(head)} bytes")
    data = bytes.fromhex(table.get("data", ""))
    data += bytes([_number(table["data_fill"])]) * (DATA_BYTES - len(data))
    fields = {name: _number(table[name]) for name in ("kind", "error", "id", "valid", "priv")}
    return head + data, fields


def _load(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def channel_vectors() -> list[ChannelVector]:
    """All vectors of a channel region, in the order of their file names."""
    documents = (_load(path) for path in sorted(DIRECTORY.glob("*.toml")))
    return [_channel(document) for document in documents if "region" in document]


def event_vectors() -> list[EventVector]:
    """All vectors of an inline block event, in the order of their file names."""
    vectors = []
    for path in sorted(DIRECTORY.glob("*.toml")):
        document = _load(path)
        if "request" not in document:
            continue
        request, request_fields = _event(document["request"])
        response, response_fields = _event(document["response"])
        vectors.append(
            EventVector(
                name=document["name"],
                rule=document["rule"],
                blocks=document["disk"]["blocks"],
                fill=_number(document["disk"]["fill"]),
                request=request,
                request_fields=request_fields,
                response=response,
                response_fields=response_fields,
            )
        )
    return vectors


def _message(table: dict[str, Any], size: int) -> tuple[bytes, dict[str, int]]:
    raw = _hex(table["hex"])
    if len(raw) != size:
        raise ValueError(f"a message of {len(raw)} bytes, not {size}")
    return raw, {name: _number(value) for name, value in table.items() if name != "hex"}


def _effect(table: dict[str, Any]) -> Effect:
    return Effect(table["where"], table["offset"], table["bytes"], _number(table["fill"]))


def buffer_vectors() -> list[BufferVector]:
    """All vectors of a request with a shared buffer, in the order of their file names."""
    vectors = []
    for path in sorted(DIRECTORY.glob("*.toml")):
        document = _load(path)
        if "buffer_request" not in document:
            continue
        request, request_fields = _message(document["buffer_request"], 32)
        response, response_fields = _message(document["buffer_response"], 16)
        devices = document["devices"]
        vectors.append(
            BufferVector(
                name=document["name"],
                rule=document["rule"],
                devices=tuple(
                    bytes([_number(fill)]) * size
                    for size, fill in zip(devices["bytes"], devices["fill"], strict=True)
                ),
                buffer=bytes([_number(document["buffer"]["fill"])]) * document["buffer"]["bytes"],
                request=request,
                request_fields=request_fields,
                response=response,
                response_fields=response_fields,
                effects=tuple(_effect(table) for table in document.get("effects", ())),
            )
        )
    return vectors
