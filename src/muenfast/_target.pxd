"""Targets, as other compiled modules see them.

A Target is anything that executes block I/O: submit() takes ownership of an io_t until its `done`
is called, exactly once, from any thread, with no lock held.
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t


cdef enum:
    IO_READ = 0
    IO_WRITE = 1
    IO_SYNC = 2


cdef struct io_t:
    uint32_t kind           # IO_READ, IO_WRITE, IO_SYNC
    uint32_t nblocks        # blocks of 4096 bytes; 0 for IO_SYNC
    uint64_t block          # first block
    uint8_t *buf            # nblocks * 4096 bytes, the caller's, untouched by him until done
    void (*done)(io_t *io) noexcept nogil
    void *user              # the caller's
    int32_t error           # result: 0 or a negative errno
    uint32_t issued         # the target's own: requests written to the ring
    uint32_t pending        # the target's own: requests not answered
    io_t *next              # the target's own


ctypedef void (*submit_fn)(void *ctx, io_t *io) noexcept nogil


cdef class Target:
    cdef submit_fn submit
    cdef void *ctx
    cdef readonly uint64_t nblocks
    cdef readonly bint read_only
