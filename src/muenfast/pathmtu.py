"""Regions of path MTUs: 32-bit words in the machine's order, that of mark m being word m - 1 (docs/protocol.md).

0 is no limit; a limit that no path may have (below 68 bytes of IPv4, 1280 of IPv6) counts as that one. Who sends reads the
words, packet by packet; anybody who may write the region changes them, each in one store.
"""

from __future__ import annotations

from muenfast import params, shm
from muenfast.errors import ClaimError, UsageError

__all__ = ["BYTES", "MOST", "MOST_MARKS", "check", "entries", "get", "opened", "put"]

BYTES = 4096    # of a region that is made: 1024 marks
MOST = 65535    # a limit above no packet's length is none
MOST_MARKS = (1 << 24) - 1  # of a MarkTable
_WORD = 4
_UNLIMITED = 0xFFFFFFFF  # as others may write it
_START = 8      # as every region (_ring.Mapping)


def opened(locator: shm.Locator, *, writable: bool, make: bool, permit: shm.Permit | None = None) -> shm.Region:
    """The region; make: of BYTES zeros where a POSIX name is missing. permit: as it has to be; then it is not made. Raises
    UsageError, PeerError, OSError."""
    if locator.offset % _START:
        raise UsageError(f"a region of path MTUs starts at a multiple of {_START} bytes", value=locator.text)
    make = make and permit is None
    region = shm.Region.open(locator, writable=writable, create=BYTES if make and locator.posix else None, permit=permit)
    try:
        with shm.apart(locator, disk=False):
            _check(region)
    except BaseException:
        region.close(keep=not make)
        raise
    return region


def _check(region: shm.Region) -> None:
    """Raises UsageError, ClaimError where it is something else: no mark of its own tells such a region."""
    if region.size < _WORD:
        raise UsageError(f"a region of path MTUs has {_WORD} bytes for each mark", value=region.locator.text)
    if (writer := shm.writer_holder(region)) is not None:
        raise ClaimError(f"{region.locator.text}, a channel,", f"process {writer['pid']}", hint="name another region")
    if entries(region) > MOST_MARKS:
        raise UsageError(f"a region of path MTUs has words for at most {MOST_MARKS} marks, this one has {entries(region)}",
                         value=region.locator.text)
    with _words(region) as words:
        largest = max((word for word in words if word != _UNLIMITED), default=0)
        if largest > MOST:
            raise UsageError(f"is no region of path MTUs: it holds the word {largest:#x}, and a limit is at most {MOST} "
                             f"(or {_UNLIMITED:#x}: none)", value=region.locator.text,
                             hint=f"`muenfast chan create --size {BYTES} NAME` makes one")


def entries(region: shm.Region) -> int:
    """Marks that the region has words for."""
    return region.size // _WORD


def check(option: str, text: str) -> int:
    """A path MTU as it stands on a command line. Raises UsageError."""
    return params.number(option, None, text, least=0, most=MOST, what="a path MTU in bytes, 0 for no limit,")


def _words(region: shm.Region) -> memoryview:
    return region.view[:entries(region) * _WORD].cast("I")


def get(region: shm.Region) -> dict[int, int]:
    """The limits by their mark, without those that are none."""
    with _words(region) as words:
        return {mark: limit for mark, limit in enumerate(words, 1) if limit}


def put(region: shm.Region, mark: int, limit: int) -> None:
    """One limit. Raises UsageError where the region has no such mark."""
    with _words(region) as words:
        if not 1 <= mark <= len(words):
            raise UsageError(f"the region has words for the marks 1 to {len(words)}", option="MARK", value=mark)
        words[mark - 1] = limit
