"""What a block server exports, as the engines see it."""
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from muenfast._aio cimport aio_source
from muenfast._jobs cimport faults, jobs
from muenfast._ring cimport Mapping
from muenfast._wire cimport load_acquire32


cdef enum:
    STORE_MEMORY = 0
    STORE_FILE = 1
    STORE_NULL = 2
    STORE_USER = 3          # Python's: engines see its jobs


cdef struct store_t:
    int kind
    int fd
    int direct_fd           # file: the same past the page cache, for aligned pieces of block_size bytes, or -1
    uint8_t *memory
    const uint32_t *broken  # memory: 1 when it was taken away and zeros stand there
    uint64_t offset         # file: bytes before the store; with `size` it is below 2^63
    uint64_t size           # bytes, a multiple of block_size
    uint64_t nblocks        # of 4096 bytes
    uint64_t most           # bytes of one read or write, a multiple of 4096; 2^64 - 1: any
    uint32_t block_size     # 512 or 4096, where the transport has a choice
    bint read_only
    bint anonymous          # memory: private to this process, pages that are given back read as zeros
    bint device             # file: a block device
    bint zeroes             # user: what is discarded reads as zeros
    jobs *jobs              # user: who executes
    faults *faults          # what is to go wrong, or NULL


cdef inline bint store_broken(const store_t *s) noexcept nogil:
    """Whether the store's memory was taken away."""
    return s.broken != NULL and load_acquire32(s.broken) != 0


cdef inline int store_flush(const store_t *s) noexcept nogil:
    """Makes what was written durable; 0 or a negative errno. Precondition: the store is no file that can be written."""
    return -EIO if store_broken(s) else 0


cdef inline bint store_zeroes(const store_t *s) noexcept nogil:
    """Whether what store_discard() freed reads as zeros."""
    if s.kind == STORE_USER:
        return s.zeroes
    return s.kind != STORE_FILE or not s.device


cdef inline bint store_flies(const store_t *s) noexcept nogil:
    """Whether an engine has operations on it under way, instead of executing them at once: they may wait."""
    return s.kind == STORE_FILE or s.kind == STORE_USER or s.faults != NULL


cdef aio_source store_source(const store_t *s) noexcept nogil
cdef int store_discard(const store_t *s, uint64_t start, uint64_t length) noexcept nogil
cdef uint64_t store_smart(const store_t *s, uint8_t *data) noexcept nogil


cdef class Store:
    cdef store_t s
    cdef Mapping memory
    cdef readonly bytes identity

    cdef Store finish(self, object size, object block_size, bint read_only, object identity)
