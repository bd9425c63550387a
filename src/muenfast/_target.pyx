"""Targets of block I/O, and requests to them whose ends an event loop collects."""
cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._system cimport *
from muenfast._thread cimport *
from muenfast._wire cimport BLOCK_SIZE

from muenfast.errors import UsageError

cdef class Target:
    """Anything that executes block I/O in blocks of `block_size` bytes; what a front end stands on."""

    def __cinit__(self):
        self.block_size = BLOCK_SIZE


cdef struct memory_t:
    uint8_t *base
    uint64_t nblocks
    uint32_t block_size


cdef void memory_submit(void *ctx, io_t *io) noexcept nogil:
    cdef memory_t *m = <memory_t *>ctx
    cdef uint64_t bytes
    cdef uint8_t *at
    cdef io_t *following
    while io != NULL:
        following = io.next
        bytes = <uint64_t>io.nblocks * m.block_size
        at = m.base + io.block * m.block_size
        io.error = 0
        if io.kind != IO_SYNC:
            if io.block > m.nblocks or io.nblocks > m.nblocks - io.block:
                io.error = -EINVAL
            elif io.kind == IO_READ:
                memcpy(io.buf, at, bytes)
            elif io.kind == IO_WRITE:
                memcpy(at, io.buf, bytes)
            else:
                memset(at, 0, bytes)
        io.done(io)
        io = following


@cython.final
cdef class Memory(Target):
    """A disk in plain memory, executed inside submit(): the most a front end can reach, for tests and benchmarks.

    block_size: 512 or 4096. discards: whether it takes discards and zeroes; after either it reads as zeros.
    zeroes: whether it says so of discards (default: as discards).
    """
    cdef memory_t m

    def __cinit__(self, uint64_t nblocks, *, uint32_t block_size=BLOCK_SIZE, bint discards=False,
                  zeroes=None):
        if block_size != 512 and block_size != 4096:
            raise UsageError("a block has 512 or 4096 bytes", value=block_size)
        self.m.base = <uint8_t *>calloc(nblocks, block_size)
        if self.m.base == NULL:
            raise MemoryError()
        self.m.nblocks = self.nblocks = nblocks
        self.m.block_size = self.block_size = block_size
        self.discards = discards
        self.zeroes = discards if zeroes is None else zeroes
        self.ctx = <void *>&self.m
        self.submit = memory_submit

    def __dealloc__(self):
        free(self.m.base)


# ------------------------------------------------------------------ requests that nobody waits for in a thread

cdef struct waiting_t:
    io_t io
    completions_t *queue
    waiting_t *next


cdef struct completions_t:
    pthread_mutex_t lock
    waiting_t *done         # newest first
    uint64_t outstanding
    int event               # eventfd: readable while done is not empty


cdef void completions_done(io_t *io) noexcept nogil:
    cdef waiting_t *w = <waiting_t *>io.user
    cdef completions_t *q = w.queue
    cdef uint64_t one = 1
    cdef bint first
    pthread_mutex_lock(&q.lock)
    first = q.done == NULL
    w.next = q.done
    q.done = w
    if first:                           # under the lock: after it the queue may be collected and closed
        c_write(q.event, &one, sizeof(one))
    pthread_mutex_unlock(&q.lock)


_KINDS = {"read": IO_READ, "write": IO_WRITE, "sync": IO_SYNC, "discard": IO_DISCARD, "zero": IO_ZERO}


cdef class Completions:
    """Requests to a Target whose ends are told through a descriptor (fileno), for event loops.

    submit() returns a key at once; collect() returns what has ended since. Buffers are held until then. One thread.
    """
    cdef completions_t *q
    cdef readonly Target target
    cdef dict buffers

    def __cinit__(self, Target target not None):
        self.target = target
        self.buffers = {}
        self.q = <completions_t *>calloc(1, sizeof(completions_t))
        if self.q == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.q.lock, NULL)
        self.q.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.q.event < 0:
            raise OSError(errno, "eventfd")

    def fileno(self):
        """Readable while collect() has something to return."""
        return self.q.event

    @property
    def outstanding(self):
        """Requests submitted and not collected."""
        return self.q.outstanding

    def submit(self, str kind, block, buffer=None, *, nblocks=0):
        """Starts "read", "write" (a buffer of whole blocks), "discard", "zero" (of nblocks blocks) or "sync"; the request's
        key.

        Raises UsageError. The buffer must not be touched before collect() has returned the key.
        """
        cdef waiting_t *w
        cdef _Held held = None
        cdef uint64_t size = self.target.block_size, n = 0
        cdef uint32_t what
        if self.q.event < 0:
            raise UsageError("these completions are closed")
        if kind not in _KINDS:
            raise UsageError(f"a request is one of {', '.join(_KINDS)}", value=kind)
        what = _KINDS[kind]
        if what == IO_READ or what == IO_WRITE:
            held = _Held(buffer, what == IO_READ)
            if <uint64_t>held.view.len % size != 0:
                raise UsageError(f"{held.view.len} bytes are no whole number of blocks of {size}")
            nblocks = <uint64_t>held.view.len // size
        elif what != IO_SYNC and not self.target.discards:
            raise UsageError("this disk takes no discards")
        if what != IO_SYNC:
            if not 0 < nblocks <= 0xffffffff:
                raise UsageError("a request is of 1 to 2^32 - 1 blocks", value=nblocks)
            n = nblocks
            if block < 0 or block + n > self.target.nblocks:
                raise UsageError(f"block {block} and what follows reach beyond the disk's {self.target.nblocks}")
        w = <waiting_t *>calloc(1, sizeof(waiting_t))
        if w == NULL:
            raise MemoryError()
        w.queue = self.q
        w.io.kind = what
        w.io.done = completions_done
        w.io.user = w
        if what != IO_SYNC:
            w.io.block = block
            w.io.nblocks = <uint32_t>n
        if held is not None:
            w.io.buf = <uint8_t *>held.view.buf
        key = <uintptr_t>w
        self.buffers[key] = held
        self.q.outstanding += 1
        with nogil:
            self.target.submit(self.target.ctx, &w.io)
        return key

    def collect(self):
        """What has ended: a list of (key, 0 or a negative errno), oldest first."""
        cdef waiting_t *w
        cdef waiting_t *following
        cdef uint64_t count
        pthread_mutex_lock(&self.q.lock)
        w = self.q.done
        self.q.done = NULL
        c_read(self.q.event, &count, sizeof(count))
        pthread_mutex_unlock(&self.q.lock)
        ended = []
        while w != NULL:
            following = w.next
            key = <uintptr_t>w
            del self.buffers[key]
            ended.append((key, w.io.error))
            self.q.outstanding -= 1
            free(w)
            w = following
        ended.reverse()
        return ended

    def close(self):
        """Closes the descriptor. Raises UsageError while requests are outstanding."""
        if self.q.outstanding != 0:
            raise UsageError(f"{self.q.outstanding} requests are outstanding")
        if self.q.event >= 0:
            c_close(self.q.event)
            self.q.event = -1

    def __dealloc__(self):
        # What is outstanding still points here: leaked rather than written to after it was freed.
        if self.q != NULL and self.q.outstanding == 0:
            if self.q.event >= 0:
                c_close(self.q.event)
            pthread_mutex_destroy(&self.q.lock)
            free(self.q)
            self.q = NULL


cdef class _Held:
    """A buffer for as long as this object lives."""
    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, buffer, bint writable):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)
