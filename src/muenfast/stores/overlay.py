"""Copy on write: a disk that reads as another file until it is written, and keeps what is written in a file of its own.

The overlay file (docs/stores.md has it to the byte) is a header, the id of the boot that writes it, a map with a byte
for each block of 4096 bytes, and a place for each block; what is not written is a hole. A block's byte is

    BASE     the base has it; whatever stands in its place is left over from a boot that ended too early
    WRITTEN  its place has it, in the page cache at least
    DURABLE  its place has it, and had it on the disk before this byte was written there

so, whatever becomes of the file:
- A process that is killed loses nothing: data goes to the page cache, then its byte, then the answer.
- After a crash of the machine (another boot) WRITTEN counts as BASE. DURABLE was written between two fdatasync, of the data
  and of the map, and never becomes anything else: every mixture of old and new parts of the map is a right one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import shlex
import stat
import struct
import threading
import zlib

from muenfast.errors import UsageError
from muenfast.stores._files import File

MAGIC = b"muenfcow"
VERSION = 1
BLOCK = 4096
BASE, WRITTEN, DURABLE = 0, 1, 2

_SHIFT = 12  # of BLOCK
_HEADER = struct.Struct("<8s I I Q Q Q 16s q 16s")  # up to its checksum, the last four of HEADER_SIZE bytes: docs/stores.md
_HEADER_SIZE = 4096
_SESSION = 4096  # offset of the boot's id and its checksum
_MAP = 8192  # offset of the map
_PIECE = 1 << 20  # of the map, in memory at a time
_SAMPLES = 64  # blocks of the base that its mark is made of
_RUNS = re.compile(rb"\x00+|[^\x00]+")
_WRITTEN_RUNS = re.compile(rb"\x01+")


class Overlay:
    """py:muenfast.stores:Overlay:BASE+OVERLAY. The last + separates; OVERLAY is made where there is none.

    BASE, a file or block device, is only read, and must stay as it is; its size is the disk's. The lock `_lock` guards the
    map, in memory and in the file, and `_dirty`: pages of it with WRITTEN in them. `_copying` is for blocks that come from
    the base in part. Locks are taken in the order _flushing or _copying, _lock.
    """

    def __init__(self, arg: str = "") -> None:
        """Raises UsageError."""
        self._base_path, plus, self._path = arg.rpartition("+")
        if not (plus and self._base_path and self._path):
            raise UsageError("an overlay is BASE+OVERLAY, two paths", value=arg)
        self._lock, self._copying, self._flushing = threading.Lock(), threading.Lock(), threading.Lock()
        self._dirty: set[int] = set()
        self._failed: OSError | None = None

    def open(self, readonly: bool) -> None:
        """Raises UsageError, ClaimError, OSError."""
        self._readonly = readonly
        base = os.stat(self._base_path)
        if not (stat.S_ISREG(base.st_mode) or stat.S_ISBLK(base.st_mode)):
            raise UsageError("a base is a file or block device", value=self._base_path)
        with contextlib.suppress(FileNotFoundError):
            overlay = os.stat(self._path)
            if not stat.S_ISREG(overlay.st_mode):
                raise UsageError("an overlay is a file", value=self._path)
            if os.path.samestat(base, overlay):
                raise UsageError("base and overlay are the same file", value=self._path)
        with contextlib.ExitStack() as stack:
            self._base = File(self._base_path, os.O_RDONLY, alone=False)
            stack.callback(self._base.close)
            self._size = os.lseek(self._base.fd, 0, os.SEEK_END)
            if self._size < BLOCK or self._size % 512:
                raise UsageError(f"a base has at least {BLOCK} bytes and a multiple of 512, this has {self._size}",
                                 value=self._base_path)
            self._blocks = -(-self._size // BLOCK)
            self._data = _MAP + -(-self._blocks // BLOCK) * BLOCK
            self._file = File(self._path, os.O_RDONLY if readonly else os.O_RDWR | os.O_CREAT, alone=not readonly)
            stack.callback(self._file.close)
            info = os.fstat(self._base.fd)
            self._identity = self._check_header(0 if stat.S_ISBLK(info.st_mode) else info.st_mtime_ns)
            # Zeros that take no memory.
            self._map = mmap.mmap(-1, self._blocks, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            stack.callback(self._map.close)
            self._load_map()
            self._stack = stack.pop_all()

    def _check_header(self, modified: int) -> bytes:
        """The identity, of an overlay that was made here for this base; modified: the base's time, in ns."""
        size = os.fstat(self._file.fd).st_size
        if size == 0 and not self._readonly:
            self._make_header(modified)
            size = _HEADER_SIZE
        header = bytearray(_HEADER_SIZE)
        if size >= _HEADER_SIZE:
            self._file.read(header, 0)
        if header[:len(MAGIC)] != MAGIC:
            raise UsageError("this is no overlay (a new one is made where there is no file, or an empty one)",
                             value=self._path)
        _, version, block, disk, where, data, identity, time, mark = _HEADER.unpack_from(header)
        if version != VERSION:
            raise UsageError(f"this overlay has version {version} of the format, not {VERSION}", value=self._path)
        if zlib.crc32(header[:-4]) != int.from_bytes(header[-4:], "little"):
            raise UsageError("the header of this overlay is damaged: its checksum is wrong", value=self._path)
        if disk != self._size:
            raise UsageError(f"this overlay belongs to a base of {disk} bytes, {self._base_path} has {self._size}",
                             value=self._path)
        if (block, where, data) != (BLOCK, _MAP, self._data):
            raise UsageError(f"this overlay's layout is not that of version {VERSION}", value=self._path)
        if mark != self._mark():
            raise UsageError(f"this overlay belongs to another base: {self._base_path} has other contents",
                             value=self._path)
        if time != modified:
            seconds, rest = divmod(time, 10 ** 9)
            raise UsageError(f"{self._base_path} was written since this overlay was made of it", value=self._path,
                             hint=f"where its contents are the same, touch -d @{seconds}.{rest:09} "
                                  f"{shlex.quote(self._base_path)}")
        if size == _HEADER_SIZE and not self._readonly:     # new, or killed here: nothing else was ever written
            self._file.sync()       # the header before the size: a crash here must not leave a file that is all hole
            os.ftruncate(self._file.fd, self._data + self._size)
            os.fsync(self._file.fd)
            self._sync_folder()
        elif size < self._data + self._size:
            raise UsageError(f"this overlay was cut short: it has {size} of {self._data + self._size} bytes",
                             value=self._path)
        return bytes(identity)

    def _make_header(self, modified: int) -> None:
        header = bytearray(_HEADER_SIZE)
        _HEADER.pack_into(header, 0, MAGIC, VERSION, BLOCK, self._size, _MAP, self._data, os.urandom(16), modified,
                          self._mark())
        header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
        self._file.write(header, 0)

    def _mark(self) -> bytes:
        """16 bytes that tell the base from others: of its size and 64 of its blocks, first and last among them."""
        mark = hashlib.blake2b(self._size.to_bytes(8, "little"), digest_size=16)
        last = self._blocks - 1
        for block in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
            mark.update(self._of_base(block))
        return mark.digest()

    def _sync_folder(self) -> None:
        fd = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _load_map(self) -> None:
        """The map, as far as it counts; in the file, too, before this boot becomes the one that writes it."""
        session = bytearray(20)
        self._file.read(session, _SESSION)
        boot = _boot()
        here = session == boot + zlib.crc32(boot).to_bytes(4, "little")
        at = 0
        while (at := self._file.data_from(_MAP + at, _MAP + self._blocks) - _MAP) < self._blocks:
            at -= at % BLOCK
            piece = bytearray(min(_PIECE, self._blocks - at))
            self._file.read(piece, _MAP + at)
            if wrong := piece.translate(None, bytes((BASE, WRITTEN, DURABLE))):
                raise UsageError(f"the map of this overlay is damaged: {wrong[0]} stands for block "
                                 f"{at + piece.index(wrong[0])}", value=self._path)
            if WRITTEN in piece:
                if here:
                    self._dirty.update((at + start) // BLOCK for start in range(0, len(piece), BLOCK)
                                       if WRITTEN in piece[start:start + BLOCK])
                else:
                    piece = piece.replace(bytes((WRITTEN,)), bytes((BASE,)))
                    if not self._readonly:
                        self._file.write(piece, _MAP + at)
            self._map[at:at + len(piece)] = bytes(piece)
            at += len(piece)
        if not here and not self._readonly:
            self._file.write(boot + zlib.crc32(boot).to_bytes(4, "little"), _SESSION)

    def get_size(self) -> int:
        return self._size

    def block_size(self) -> tuple[int, int, int]:
        """Any, but what is no whole block is copied from the base first."""
        return 1, BLOCK, 1 << 25

    def identity(self) -> bytes:
        return self._identity

    def can_write(self) -> bool:
        return not self._readonly

    def trims_to_zero(self) -> bool:
        return True

    def pread(self, buf: memoryview, offset: int) -> None:
        end = offset + len(buf)
        first = offset >> _SHIFT
        known = self._map[first:(end + BLOCK - 1) >> _SHIFT]
        if BASE not in known:
            self._file.read(buf, self._data + offset)
        elif not known.strip(b"\0"):
            self._base.read(buf, offset)
        else:
            for run in _RUNS.finditer(known):
                start, stop = max(offset, (first + run.start()) * BLOCK), min(end, (first + run.end()) * BLOCK)
                with buf[start - offset:stop - offset] as piece:
                    if known[run.start()] == BASE:
                        self._base.read(piece, start)
                    else:
                        self._file.read(piece, self._data + start)

    def pwrite(self, buf: memoryview, offset: int) -> None:
        if BASE not in self._map[offset >> _SHIFT:(offset + len(buf) + BLOCK - 1) >> _SHIFT]:
            self._file.write(buf, self._data + offset)
            return
        first, last = self._whole(offset, len(buf))
        for start, stop in (offset, first), (last, offset + len(buf)):
            if start < stop:
                with buf[start - offset:stop - offset] as piece:
                    self._write_part(piece, start)
        if first < last:
            with buf[first - offset:last - offset] as piece:
                self._file.write(piece, self._data + first)
            self._written(first, last)

    def zero(self, count: int, offset: int) -> None:
        first, last = self._whole(offset, count)
        for start, stop in (offset, first), (last, offset + count):
            if start < stop:
                self._write_part(bytes(stop - start), start)
        if first < last:
            self._file.clear(self._data + first, last - first)
            self._written(first, last)

    trim = zero

    def _whole(self, offset: int, count: int) -> tuple[int, int]:
        """Start and end of the whole blocks in there, the disk's last among them even if it is shorter; equal: none.

        What is left is before the start or behind the end, in one block each.
        """
        end = offset + count
        start = min(end, -(-offset // BLOCK) * BLOCK)
        return start, end if end == self._size else max(start, end // BLOCK * BLOCK)

    def _write_part(self, data: bytes | memoryview, offset: int) -> None:
        """Writes a piece of one block, the rest of which others may be writing at the same time."""
        block = offset >> _SHIFT
        if self._map[block] == BASE:
            with self._copying:
                if self._map[block] == BASE:
                    whole = self._of_base(block)
                    whole[offset % BLOCK:offset % BLOCK + len(data)] = data
                    self._file.write(whole, self._data + block * BLOCK)
                    self._written(block * BLOCK, block * BLOCK + len(whole))
                    return
        self._file.write(data, self._data + offset)

    def _of_base(self, block: int) -> bytearray:
        whole = bytearray(min(BLOCK, self._size - block * BLOCK))
        self._base.read(whole, block * BLOCK)
        return whole

    def _written(self, start: int, end: int) -> None:
        """Whole blocks have their data in place now."""
        first, last = start >> _SHIFT, (end + BLOCK - 1) >> _SHIFT
        for at in range(first, last, _PIECE):
            stop = min(last, at + _PIECE)
            with self._lock:
                known = self._map[at:stop]
                if BASE in known:
                    known = known.replace(bytes((BASE,)), bytes((WRITTEN,)))
                    self._file.write(known, _MAP + at)
                    self._map[at:stop] = known
                    self._dirty.update(range(at // BLOCK, (stop - 1) // BLOCK + 1))

    def flush(self) -> None:
        """Data, then the map, so that a block is DURABLE only after it is.

        After a failure there is no telling what the disk has (the kernel forgets what it could not write): every later
        flush fails as that one did.
        """
        if self._readonly:
            return
        with self._flushing:
            if self._failed is not None:
                raise OSError(self._failed.errno, "an earlier flush failed", self._path)
            with self._lock:
                dirty, self._dirty = self._dirty, set()
                pages = [(page * BLOCK, self._map[page * BLOCK:(page + 1) * BLOCK]) for page in sorted(dirty)]
            try:
                self._file.sync()
                for at, known in pages:
                    self._durable(at, known)
                if pages:
                    self._file.sync()
            except OSError as error:
                self._failed = error
                raise

    def _durable(self, at: int, known: bytes) -> None:
        """Of a page of the map, what was WRITTEN before the data was flushed; more may be since."""
        with self._lock:
            page = bytearray(self._map[at:at + len(known)])
            for run in _WRITTEN_RUNS.finditer(known):
                page[run.start():run.end()] = bytes((DURABLE,)) * (run.end() - run.start())
            self._file.write(page, _MAP + at)
            self._map[at:at + len(page)] = bytes(page)

    def close(self) -> None:
        """Flushes. Raises OSError of that, closed all the same."""
        try:
            self.flush()
        finally:
            self._stack.close()


def _boot() -> bytes:
    """16 bytes that are the same as long as this kernel, and with it what is in the page cache, lives. Raises OSError."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        text = file.read().strip()
    if not re.fullmatch("[0-9a-f-]{36}", text):
        raise OSError(errno.EINVAL, f"this is no boot's id: {text!r}", "/proc/sys/kernel/random/boot_id")
    return bytes.fromhex(text.replace("-", ""))
