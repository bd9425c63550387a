from typing_extensions import Buffer

from muenfast._client import ClientEngine
from muenfast._ring import Watch

class BufferClient(ClientEngine):
    def __init__(self, request: Buffer, response: Buffer, buffer: Buffer, *, request_protocol: int = ...,
                 response_protocol: int = ..., request_bell: Buffer | None = None,
                 response_bell: Buffer | None = None, poll: int | None = None, fail_fast: bool = False,
                 watch: Watch | None = None, checksum: str = "off") -> None: ...
    @property
    def foreign(self) -> bool: ...
    @property
    def devices(self) -> int: ...
    def rebind(self, request: Buffer, response: Buffer, buffer: Buffer, request_bell: Buffer | None = None,
               response_bell: Buffer | None = None) -> None: ...
