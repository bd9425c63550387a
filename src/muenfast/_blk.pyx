"""Block engines (work in progress in another worktree: only the parts the front end needs)."""
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from libc.errno cimport EIO

cdef class Target:
    """Anything that executes block I/O in blocks of 4096 bytes."""

cdef struct memory_t:
    uint8_t *base
    uint64_t nblocks

cdef void memory_submit(void *ctx, io_t *io) noexcept nogil:
    cdef memory_t *m = <memory_t *>ctx
    io.error = 0
    if io.kind != IO_SYNC:
        if io.block > m.nblocks or io.nblocks > m.nblocks - io.block:
            io.error = -EIO
        elif io.kind == IO_READ:
            memcpy(io.buf, m.base + io.block * 4096, <size_t>io.nblocks * 4096)
        else:
            memcpy(m.base + io.block * 4096, io.buf, <size_t>io.nblocks * 4096)
    io.done(io)

cdef class Memory(Target):
    """A disk in plain memory, executed inside submit(): the limit a front end can reach."""
    cdef memory_t m
    def __cinit__(self, uint64_t nblocks):
        self.m.base = <uint8_t *>calloc(nblocks, 4096)
        if self.m.base == NULL:
            raise MemoryError()
        self.m.nblocks = nblocks
        self.nblocks = nblocks
        self.read_only = False
        self.ctx = <void *>&self.m
        self.submit = memory_submit
    def __dealloc__(self):
        free(self.m.base)
