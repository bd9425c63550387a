from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import Buffer, disjoint_base

from muenfast._engine import ServerEngine
from muenfast._ring import Watch
from muenfast._store import Store

@disjoint_base
class BufferServer(ServerEngine):
    def __init__(self, request: Buffer, response: Buffer, buffer: Buffer, stores: Iterable[Store], *,
                 request_protocol: int = ..., response_protocol: int = ..., request_bell: Buffer | None = None,
                 response_bell: Buffer | None = None, poll: int | None = None, watch: Watch | None = None,
                 checksum: str = "off", threads: bool = False) -> None: ...
    @property
    def stores(self) -> tuple[Store, ...]: ...
    @property
    def checksum(self) -> str: ...
    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def directions(self) -> tuple[dict[str, Any], ...]: ...
    def inherit(self, other: BufferServer) -> None: ...

def identity_of(identities: Sequence[bytes]) -> bytes: ...
