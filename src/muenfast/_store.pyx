"""What a block server exports: memory, a file or disk, or nothing; and what can be done to it besides copying."""
from libc.errno cimport EIO, EROFS
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from muenfast._aio cimport AIO_READ, AIO_SYNC, AIO_WRITE, aio_op, aio_source
from muenfast._jobs cimport FAULTS_MOST, fault, faults
from muenfast._ring cimport hold
from muenfast._wire cimport BLOCK_SIZE, SECTOR_SIZE, SMART_UNAVAILABLE, copy_bytes, load_relaxed64

import os as _os
import stat as _stat

from muenfast.errors import UsageError

cdef extern from "_smart.h" nogil:
    uint64_t smart_read(int fd, uint8_t *data)

cdef extern from *:
    """
    #include <sys/mman.h>

    static inline int give_back(void *start, size_t length) { return madvise(start, length, MADV_DONTNEED); }
    """
    int give_back(void *start, size_t length) nogil

cdef enum:
    PAGE = 4096             # madvise refuses what is no page of a kernel with larger ones, and zeros are written


# As fault_what and aio_kind count them.
FAULTS = ("error", "delay", "late", "corrupt")
KINDS = ("read", "write", "flush", "discard")


cdef class Store:
    """What a server exports: `size` bytes, a multiple of `block_size`.

    Made by in_memory(), in_file() or null(). identity: 16 bytes that name the data, stable for as long as they
    live; a client re-issues requests only to the identity it knew. block_size: 512 or 4096 bytes, the unit in which
    clients of a transport that has a choice address it; by default 4096 where the size is a multiple of that.
    """

    def __cinit__(self):
        self.s.fd = self.s.direct_fd = -1

    @property
    def size(self):
        """Bytes, a multiple of block_size."""
        return self.s.size

    @property
    def block_size(self):
        """512 or 4096: the block of transports that have a choice."""
        return self.s.block_size

    @property
    def nblocks(self):
        """Size in whole blocks of 4096 bytes."""
        return self.s.nblocks

    @property
    def read_only(self):
        """Whether writes are refused."""
        return self.s.read_only

    @property
    def waits(self):
        """Whether its operations may wait: for a file, a user's code, or a fault that was asked for."""
        return store_flies(&self.s)

    @property
    def zeroes(self):
        """Whether what was discarded reads as zeros."""
        return store_zeroes(&self.s)

    def inject(self, plan, *, timeout=30.0):
        """Makes operations go wrong, before any engine has the store. plan: up to 8 of (what, kinds, rate, error, delay),
        what and kinds as in FAULTS and KINDS, rate of 0 to 1, error a positive errno, delay seconds. timeout: seconds
        after which "late" is answered. Raises UsageError."""
        cdef faults *f
        cdef fault *each
        plan = list(plan)
        if not 1 <= len(plan) <= FAULTS_MOST:
            raise UsageError(f"a store has 1 to {FAULTS_MOST} faults", value=len(plan))
        if self.s.faults != NULL:
            raise UsageError("a store's faults are given once")
        f = <faults *>calloc(1, sizeof(faults))
        if f == NULL:
            raise MemoryError()
        self.s.faults = f
        f.random = int.from_bytes(_os.urandom(8), "little")
        f.timeout_ns = <uint64_t>(timeout * 1e9)
        for number, (what, kinds, rate, error, delay) in enumerate(plan):
            each = &f.each[number]
            each.what = FAULTS.index(what)
            for kind in kinds:
                each.kinds |= <uint32_t>1 << <uint32_t>KINDS.index(kind)
            each.threshold = min(int(rate * 2.0 ** 64), 0xffffffffffffffff)
            each.error = -error
            each.delay_ns = <uint64_t>(delay * 1e9)
        f.n = len(plan)

    def inherit(self, Store other not None):
        """Takes over what another store, in whose place this one is, was to show. No engine may use either."""
        if other is not self and self.s.faults == NULL:
            self.s.faults = other.s.faults
            other.s.faults = NULL

    @property
    def injected(self):
        """How often each of FAULTS was met; empty without inject()."""
        return {} if self.s.faults == NULL else {
            name: load_relaxed64(&self.s.faults.met[number]) for number, name in enumerate(FAULTS)}

    @staticmethod
    def in_memory(memory, *, read_only=False, identity=None, anonymous=False):
        """A store in a buffer (writable unless read_only), held until close(). Truncated shared memory gives EIO.

        anonymous: it is private and anonymous memory, of which a discard gives pages back.
        """
        cdef Store self = Store.__new__(Store)
        self.memory = hold(memory, not read_only, BLOCK_SIZE)
        self.s.kind = STORE_MEMORY
        self.s.memory = self.memory.base
        self.s.broken = self.memory.broken
        self.s.anonymous = anonymous
        return self.finish(self.memory.length, None, read_only, identity)

    @staticmethod
    def in_file(int fd, size, *, direct=None, offset=0, block_size=None, read_only=False, identity=None):
        """A store in `size` bytes from byte `offset` on of an open file or block device; the descriptor stays the
        caller's. direct: another one of it, opened with O_DIRECT, that takes aligned pieces of block_size bytes."""
        cdef Store self = Store.__new__(Store)
        if offset < 0 or offset + size >= 1 << 63:
            raise UsageError("a store ends below 2^63", value=offset + size)
        self.s.kind = STORE_FILE
        self.s.fd = fd
        self.s.direct_fd = -1 if direct is None else direct
        self.s.offset = offset
        self.s.device = _stat.S_ISBLK(_os.fstat(fd).st_mode)
        return self.finish(size, block_size, read_only, identity)

    @staticmethod
    def null(size, *, read_only=False, identity=None):
        """Reads zeros, forgets writes, or refuses them."""
        cdef Store self = Store.__new__(Store)
        self.s.kind = STORE_NULL
        return self.finish(size, None, read_only, identity)

    cdef Store finish(self, object size, object block_size, bint read_only, object identity):
        if identity is None:
            identity = _os.urandom(16)
        if len(identity) != 16:
            raise UsageError("a store's identity has 16 bytes", value=identity)
        if block_size is None:
            block_size = BLOCK_SIZE if size % BLOCK_SIZE == 0 else SECTOR_SIZE
        if block_size != BLOCK_SIZE and block_size != SECTOR_SIZE:
            raise UsageError("a block has 512 or 4096 bytes", value=block_size)
        self.identity = bytes(identity)
        self.s.most = self.s.most or <uint64_t>-1
        self.s.block_size = block_size
        self.s.size = size // block_size * block_size
        self.s.nblocks = size // BLOCK_SIZE
        self.s.read_only = read_only
        if self.s.nblocks == 0:
            raise UsageError("a disk has at least one block of 4096 bytes", value=size)
        return self

    def close(self):
        """Lets go of the buffer. No server may still use the store."""
        if self.memory is not None:
            self.s.nblocks = self.s.size = 0
            self.s.memory = NULL
            self.memory.drop()

    def __dealloc__(self):
        free(self.s.faults)


cdef int store_execute(const void *context, const aio_op *op) noexcept nogil:
    """Does an operation at once; 0 or a negative errno. Precondition: the store is memory or null."""
    cdef const store_t *s = <const store_t *>context
    if op.kind == AIO_SYNC:
        return store_flush(s)
    if op.kind == AIO_READ:
        if s.kind == STORE_MEMORY:
            copy_bytes(op.data, s.memory + op.start, op.length)
        else:
            memset(op.data, 0, op.length)
    elif op.kind == AIO_WRITE:
        if s.kind == STORE_MEMORY:
            copy_bytes(s.memory + op.start, op.data, op.length)
    else:
        return store_discard(s, op.start, op.length)
    return -EIO if store_broken(s) else 0


cdef aio_source store_source(const store_t *s) noexcept nogil:
    """What a store is for an engine that has operations under way."""
    cdef aio_source source
    source.execute = NULL
    if s.kind == STORE_MEMORY or s.kind == STORE_NULL:
        source.execute = store_execute
    source.context = s
    source.jobs = s.jobs
    source.faults = s.faults
    return source


cdef int store_discard(const store_t *s, uint64_t start, uint64_t length) noexcept nogil:
    """Frees what `length` bytes of memory from `start` on take; 0 or a negative errno. Precondition: they lie in the store,
    which is memory or null.

    They read as zeros afterwards. Memory that others share is zeroed and keeps its pages: to want them back later could
    fail.
    """
    cdef uint8_t *first
    cdef uint64_t head, whole
    if s.read_only:
        return -EROFS
    if s.kind == STORE_MEMORY:
        first = s.memory + start
        head = 0 - <uint64_t><uintptr_t>first & (PAGE - 1)
        whole = (length - head) & ~<uint64_t>(PAGE - 1) if length > head else 0
        if not s.anonymous or whole == 0 or give_back(first + head, whole) != 0:
            memset(first, 0, length)
        else:
            memset(first, 0, head)
            memset(first + head + whole, 0, length - head - whole)
        if store_broken(s):
            return -EIO
    return 0


cdef uint64_t store_smart(const store_t *s, uint8_t *data) noexcept nogil:
    """Fills data (SMART_SIZE bytes) with the disk's raw data where it has any; a status of REQUEST_SMART."""
    if s.kind == STORE_FILE and s.device:
        return smart_read(s.fd, data)
    return SMART_UNAVAILABLE
