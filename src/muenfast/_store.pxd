"""What a block server exports, as the engines see it."""
from libc.errno cimport EFAULT, EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.types cimport off_t

from muenfast._ring cimport Mapping
from muenfast._wire cimport load_acquire32


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv(int fd, const iovec *iov, int n, off_t offset)
    ssize_t pwritev(int fd, const iovec *iov, int n, off_t offset)

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)


cdef enum:
    STORE_MEMORY = 0
    STORE_FILE = 1
    STORE_NULL = 2


cdef struct store_t:
    int kind
    int fd
    uint8_t *memory
    const uint32_t *broken  # memory: 1 when it was taken away and zeros stand there
    uint64_t offset         # file: bytes before the store; with `size` it is below 2^63
    uint64_t size           # bytes, a multiple of block_size
    uint64_t nblocks        # of 4096 bytes
    uint32_t block_size     # 512 or 4096, where the transport has a choice
    bint read_only
    bint anonymous          # memory: private to this process, pages that are given back read as zeros
    bint device             # file: a block device


cdef inline int transfer(const store_t *s, bint write, iovec *iov, int n, uint64_t start) noexcept nogil:
    """Moves n pieces, consecutive from byte `start` on, to or from a file; 0 or a negative errno.

    EFAULT (the channel's memory was taken away) becomes EIO: it is no fault of the store.
    """
    cdef off_t at = <off_t>(s.offset + start)
    cdef ssize_t moved
    cdef size_t left
    while n > 0:
        moved = pwritev(s.fd, iov, n, at) if write else preadv(s.fd, iov, n, at)
        if moved < 0:
            if errno == EINTR:
                continue
            return -EIO if errno == EFAULT else -errno
        if moved == 0:
            return -EIO                 # the file was cut short behind our back
        at += moved
        left = <size_t>moved
        while n > 0 and left >= iov[0].iov_len:
            left -= iov[0].iov_len
            iov += 1
            n -= 1
        if left:
            iov[0].iov_base = <uint8_t *>iov[0].iov_base + left
            iov[0].iov_len -= left
    return 0


cdef inline bint store_broken(const store_t *s) noexcept nogil:
    """Whether the store's memory was taken away."""
    return s.broken != NULL and load_acquire32(s.broken) != 0


cdef inline int store_flush(const store_t *s) noexcept nogil:
    """Makes what was written durable; 0 or a negative errno."""
    if s.kind == STORE_FILE and not s.read_only and fdatasync(s.fd) != 0:
        return -errno
    return -EIO if store_broken(s) else 0


cdef inline bint store_zeroes(const store_t *s) noexcept nogil:
    """Whether what store_discard() freed reads as zeros."""
    return s.kind != STORE_FILE or not s.device


cdef int store_discard(const store_t *s, uint64_t start, uint64_t length) noexcept nogil
cdef uint64_t store_smart(const store_t *s, uint8_t *data) noexcept nogil


cdef class Store:
    cdef store_t s
    cdef Mapping memory
    cdef readonly bytes identity

    cdef Store finish(self, object size, object block_size, bint read_only, object identity)
