"""A RAM disk that holds memory for what was written only."""

from __future__ import annotations

import contextlib
import mmap

from muenfast import params

_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; the mmap module names it from Python 3.13 on
_PAGE = mmap.PAGESIZE


class Ram:
    """py:muenfast.stores:Ram:SIZE, a multiple of 512 bytes from 4096 on: "64M".

    It lives as long as its server: no identity(), and nothing that a flush could do. Threads need no lock: requests that
    are executed together touch different bytes, and pages are given back only where one of them has all of the page.
    """

    def __init__(self, arg: str = "64M") -> None:
        """Raises UsageError, and OSError where there is no address space for it."""
        size = params.size(None, None, arg, multiple=512, least=4096)
        # Private and not reserved: pages come with the first write to them, reads before that find zeros.
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        with contextlib.suppress(OSError):      # EINVAL: a kernel without huge pages, each of which would fill 511 holes
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._view = memoryview(self._memory)

    def get_size(self) -> int:
        return len(self._view)

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = self._view[offset:offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int) -> None:
        self._view[offset:offset + len(buf)] = buf

    def trim(self, count: int, offset: int) -> None:
        """Gives whole pages back to the system and zeroes the rest."""
        end = offset + count
        first = min(end, -(-offset // _PAGE) * _PAGE)
        last = max(first, end // _PAGE * _PAGE) if end < len(self._view) else end
        if first < last:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
        for start, stop in (offset, first), (last, end):
            # Writing zeros over a hole would make a page of it.
            if start < stop and self._view[start:stop].tobytes().strip(b"\0"):
                self._view[start:stop] = bytes(stop - start)

    zero = trim

    def trims_to_zero(self) -> bool:
        return True

    def close(self) -> None:
        self._view.release()
        self._memory.close()
