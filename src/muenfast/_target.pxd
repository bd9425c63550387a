"""Targets, as other compiled modules see them.

A Target is anything that executes block I/O: submit() takes ownership of a list of io_t, linked by `next`, each until
its `done` is called, exactly once, from any thread, with no lock held. done() may submit further requests.
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t


cdef enum:
    IO_READ = 0
    IO_WRITE = 1
    IO_SYNC = 2
    IO_DISCARD = 3          # the contents no longer matter; submitted only where Target.discards
    IO_ZERO = 4             # zeros from now on, without a payload; likewise


cdef struct io_t:
    uint32_t kind           # IO_READ, ...
    uint32_t nblocks        # of Target.block_size bytes each; 0 for IO_SYNC
    uint64_t block          # first block
    uint8_t *buf            # read and write: nblocks blocks, the caller's, untouched by him until done
    void (*done)(io_t *io) noexcept nogil
    void *user              # the caller's
    int32_t error           # result: 0 or a negative errno
    uint32_t issued         # the target's own: requests written to the ring
    uint32_t pending        # the target's own: requests not answered
    uint32_t garbled        # the target's own: times that it was issued again for a wrong checksum
    io_t *next              # the next one submitted together, or NULL; then the target's own


ctypedef void (*submit_fn)(void *ctx, io_t *io) noexcept nogil


cdef enum:                  # what collect() says
    COLLECT_OVER = -1       # the thread attends no more
    COLLECT_NOTHING = 0
    COLLECT_SOME = 1


# What a target offers a thread that would take the answers itself, beside submitting. One at a time attends.
cdef struct attendance_t:
    # Whether the calling thread attends from now on, until leave() or COLLECT_OVER. May be refused; ask again.
    bint (*enter)(void *ctx) noexcept nogil
    # Takes what was answered, calling `done` of each; never waits. To be called every 100 ms at least.
    int (*collect)(void *ctx) noexcept nogil
    # A word to sleep on (futex) while it holds seen[0]; NULL: there is something for collect(). Ask again for each sleep.
    uint32_t *(*listen)(void *ctx, uint32_t *seen) noexcept nogil
    void (*leave)(void *ctx) noexcept nogil


cdef class Target:
    cdef submit_fn submit
    cdef const attendance_t *attendance     # NULL: only the target's own threads take answers
    cdef void *ctx
    cdef readonly uint64_t nblocks
    cdef readonly uint32_t block_size   # 512 or 4096 bytes: unit and alignment of all I/O
    cdef readonly bint discards         # takes IO_DISCARD and IO_ZERO ...
    cdef readonly bint zeroes           # ... and what was discarded reads as zeros
    cdef readonly bint read_only
