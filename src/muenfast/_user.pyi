from collections.abc import Callable, Collection
from typing import Any, final

from muenfast._store import Store

MOST_WORKERS: int
LARGEST: int

@final
class UserStore(Store):
    def __init__(self, size: int, *, pread: Callable[..., Any], pwrite: Callable[..., Any] | None,
                 flush: Callable[..., Any] | None, trim: Callable[..., Any] | None, zero: Callable[..., Any] | None,
                 bare: Collection[str], failed: Callable[[str, BaseException], int], most: int, timeout: float,
                 zeroes: bool = False, block_size: int | None = None, read_only: bool = False,
                 identity: bytes | None = None) -> None: ...
    def resize(self, size: int) -> None: ...
    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def abandoned(self) -> int: ...
    @property
    def last_late(self) -> tuple[int, tuple[str, int, int, bool]]: ...
    def work(self) -> None: ...
    def end(self) -> None: ...
