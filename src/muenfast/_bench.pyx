"""Loops for `muenfast bench`: the ring's own core beside the limits of the machine, without Python in between.

Each pair of functions runs in two processes, one per CPU, on memory they share. All are flow-controlled by a word of
their own (a progress line), so that nothing is lost and every element is moved; the ring's protocol itself has no such
word. Waiting, on both sides: POLITE pauses between looks.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from muenfast._ring cimport *
from muenfast._wire cimport *

from muenfast.errors import UsageError

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    LINE = 64
    POLITE = 128

# Words of the shared progress area, one cache line each.
cdef enum:
    GO = 0          # both sides have arrived
    DONE = 8        # elements the consumer has taken
    PUT = 16        # elements the producer has put (bare queue, copy)


cdef class _Held:
    """A writable buffer for the length of one call."""
    cdef Py_buffer view
    cdef uint8_t *base
    cdef bint held

    def __cinit__(self, memory, uint64_t least):
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        self.held = True
        if <uint64_t>self.view.len < least:
            raise UsageError(f"{self.view.len} bytes of memory are too few, {least} are needed")
        self.base = <uint8_t *>self.view.buf

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef void polite() noexcept nogil:
    cdef int i
    for i in range(POLITE):
        cpu_pause()


cdef void meet(uint64_t *words, uint64_t side) noexcept nogil:
    """Both sides wait for each other; side is 1 or 2."""
    cdef uint64_t seen = fetch_add_relaxed64(&words[GO], side) + side
    while seen != 3:
        polite()
        seen = load_acquire64(&words[GO])


# ------------------------------------------------------------------ the ring

def ring_write(region, progress, uint64_t size, uint64_t batch, uint64_t count):
    """Writes `count` elements of `size` bytes, `batch` per publish, never more than the ring ahead of the reader."""
    cdef _Held r = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef writer_t w
    cdef uint8_t *data = <uint8_t *>aligned_alloc(4096, (size * batch + 4095) // 4096 * 4096)
    cdef uint64_t n, first, room
    if data == NULL:
        raise MemoryError()
    memset(data, 1, size * batch)
    writer_init(&w, r.base, r.view.len, size, 1)
    writer_start(&w, random_epoch())
    with nogil:
        meet(words, 1)
        while w.wc < count:
            n = min(batch, count - w.wc)
            while w.wc + n - load_acquire64(&words[DONE]) > w.elements:
                polite()
            writer_reserve(&w, n)
            first = min(n, w.elements - w.index)
            memcpy(w.slots + w.index * size, data, first * size)
            if n > first:
                memcpy(w.slots, data + first * size, (n - first) * size)
            writer_publish(&w, n)
        while load_acquire64(&words[DONE]) < count:
            polite()
        writer_stop(&w)
    free(data)


def ring_read(region, progress, uint64_t size, uint64_t batch, uint64_t count):
    """Reads `count` elements into private memory, each batch validated; (seconds, lost)."""
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef reader_t r
    cdef uint8_t *data = <uint8_t *>aligned_alloc(4096, (size * batch + 4095) // 4096 * 4096)
    cdef uint64_t done = 0, n = 0, start
    cdef ring_status status
    if data == NULL:
        raise MemoryError()
    memset(data, 0, size * batch)
    reader_init(&r, m.base, m.view.len, size, 1)
    with nogil:
        while reader_copy(&r, data, batch, &n) != EPOCH_CHANGED:
            polite()
        meet(words, 2)
        start = now_ns()
        while done < count:
            status = reader_copy(&r, data, batch, &n)
            if status == SUCCESS:
                done += n
                store_release64(&words[DONE], done)
            elif status == NO_DATA:
                polite()
            else:
                break
        start = now_ns() - start
    free(data)
    return start / 1e9, r.lost_total + (count - done)


def ring_bounce(out, back, uint64_t size, uint64_t count, bint leads):
    """Round trips over two rings, one element each way, both sides polling; seconds."""
    cdef _Held o = _Held(out, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held b = _Held(back, SHMSTREAM_HEADER_SIZE + size)
    cdef writer_t w
    cdef reader_t r
    cdef uint8_t *data = <uint8_t *>aligned_alloc(4096, (size + 4095) // 4096 * 4096)
    cdef uint64_t i, n, start
    cdef ring_status status
    if data == NULL:
        raise MemoryError()
    memset(data, 1, size)
    writer_init(&w, o.base, o.view.len, size, 1)
    reader_init(&r, b.base, b.view.len, size, 1)
    writer_start(&w, random_epoch())
    with nogil:
        while reader_copy(&r, data, 1, &n) != EPOCH_CHANGED:
            polite()
        start = now_ns()
        for i in range(count):
            if leads:
                put(&w, data, size)
            status = reader_copy(&r, data, 1, &n)
            while status == NO_DATA:
                cpu_pause()
                status = reader_copy(&r, data, 1, &n)
            if not leads:
                put(&w, data, size)
        start = now_ns() - start
        if leads:                       # the other side has read our last element: it answered it
            writer_stop(&w)
    free(data)
    return start / 1e9


cdef inline void put(writer_t *w, const uint8_t *data, uint64_t size) noexcept nogil:
    writer_reserve(w, 1)
    memcpy(writer_slot(w, 0), data, size)
    writer_publish(w, 1)


# ------------------------------------------------------------------ limits

def queue_write(memory, progress, uint64_t size, uint64_t elements, uint64_t count):
    """A bare single-producer single-consumer queue, one element at a time: no header, no validation, no overrun."""
    cdef _Held m = _Held(memory, size * elements)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint8_t *data = <uint8_t *>aligned_alloc(4096, (size + 4095) // 4096 * 4096)
    cdef uint64_t put = 0, taken = 0, slot = 0
    if data == NULL:
        raise MemoryError()
    memset(data, 1, size)
    with nogil:
        meet(words, 1)
        while put < count:
            if put - taken == elements:
                taken = load_acquire64(&words[DONE])
                if put - taken == elements:
                    polite()
                continue
            memcpy(m.base + slot * size, data, size)
            slot = slot + 1 if slot + 1 < elements else 0
            put += 1
            store_release64(&words[PUT], put)
            prefetch_write(m.base + slot * size)
    free(data)


def queue_read(memory, progress, uint64_t size, uint64_t elements, uint64_t count):
    """The other side of queue_write; seconds."""
    cdef _Held m = _Held(memory, size * elements)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint8_t *data = <uint8_t *>aligned_alloc(4096, (size + 4095) // 4096 * 4096)
    cdef uint64_t put = 0, taken = 0, slot = 0, start
    if data == NULL:
        raise MemoryError()
    memset(data, 0, size)
    with nogil:
        meet(words, 2)
        start = now_ns()
        while taken < count:
            if taken == put:
                put = load_acquire64(&words[PUT])
                if taken == put:
                    polite()
                continue
            memcpy(data, m.base + slot * size, size)
            slot = slot + 1 if slot + 1 < elements else 0
            taken += 1
            store_release64(&words[DONE], taken)
        start = now_ns() - start
    free(data)
    return start / 1e9


def copy_write(memory, progress, uint64_t chunk, uint64_t count):
    """Copies into shared memory what the other CPU copies out, in chunks with one flag each: what two cores can do."""
    cdef _Held m = _Held(memory, chunk)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t chunks = <uint64_t>m.view.len // chunk, put = 0
    cdef uint8_t *data = <uint8_t *>aligned_alloc(4096, (chunk + 4095) // 4096 * 4096)
    if data == NULL:
        raise MemoryError()
    memset(data, 1, chunk)
    with nogil:
        meet(words, 1)
        while put < count:
            while put - load_acquire64(&words[DONE]) == chunks:
                polite()
            memcpy(m.base + put % chunks * chunk, data, chunk)
            put += 1
            store_release64(&words[PUT], put)
    free(data)


def copy_read(memory, progress, uint64_t chunk, uint64_t count):
    """The other side of copy_write; seconds."""
    cdef _Held m = _Held(memory, chunk)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t chunks = <uint64_t>m.view.len // chunk, taken = 0, start
    cdef uint8_t *data = <uint8_t *>aligned_alloc(4096, (chunk + 4095) // 4096 * 4096)
    if data == NULL:
        raise MemoryError()
    memset(data, 0, chunk)
    with nogil:
        meet(words, 2)
        start = now_ns()
        while taken < count:
            while load_acquire64(&words[PUT]) == taken:
                polite()
            memcpy(data, m.base + taken % chunks * chunk, chunk)
            taken += 1
            store_release64(&words[DONE], taken)
        start = now_ns() - start
    free(data)
    return start / 1e9


def bounce(progress, uint64_t count, bint leads):
    """Round trips of two cache lines between two CPUs; seconds."""
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t *mine = &words[DONE] if leads else &words[PUT]
    cdef uint64_t *other = &words[PUT] if leads else &words[DONE]
    cdef uint64_t i, start
    with nogil:
        meet(words, 1 if leads else 2)
        start = now_ns()
        for i in range(1, count + 1):
            if leads:
                store_release64(mine, i)
            while load_acquire64(other) != i:
                cpu_pause()
            if not leads:
                store_release64(mine, i)
        start = now_ns() - start
    return start / 1e9


def wake_bounce(progress, uint64_t count, bint leads):
    """Round trips in which each side sleeps on a futex until the other wakes it; seconds."""
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint32_t *mine = <uint32_t *>(&words[DONE] if leads else &words[PUT])
    cdef uint32_t *other = <uint32_t *>(&words[PUT] if leads else &words[DONE])
    cdef uint32_t i, seen
    cdef uint64_t start
    with nogil:
        meet(words, 1 if leads else 2)
        start = now_ns()
        for i in range(1, <uint32_t>count + 1):
            if leads:
                store_release32(mine, i)
                futex_wake_all(mine)
            seen = load_acquire32(other)
            while seen != i:
                futex_wait_ns(other, seen, 100_000_000)
                seen = load_acquire32(other)
            if not leads:
                store_release32(mine, i)
                futex_wake_all(mine)
        start = now_ns() - start
    return start / 1e9


def copy_blocks(memory, uint64_t size, blocks, uint64_t times):
    """One thread's memcpy of `size` bytes from each block number of a list (array of u64) in memory; seconds."""
    cdef _Held m = _Held(memory, size)
    cdef Py_buffer view
    cdef const uint64_t *at
    cdef uint64_t n, k, t, start
    cdef uint8_t *data
    PyObject_GetBuffer(blocks, &view, PyBUF_SIMPLE)
    try:
        at = <const uint64_t *>view.buf
        n = <uint64_t>view.len // 8
        for k in range(n):
            if at[k] >= <uint64_t>m.view.len // size:
                raise UsageError("a block lies beyond the memory", value=at[k])
        data = <uint8_t *>aligned_alloc(4096, (size * n + 4095) // 4096 * 4096)
        if data == NULL:
            raise MemoryError()
        memset(data, 0, size * n)
        with nogil:
            start = now_ns()
            for t in range(times):
                for k in range(n):
                    memcpy(data + k * size, m.base + at[k] * size, size)
            start = now_ns() - start
        free(data)
    finally:
        PyBuffer_Release(&view)
    return start / 1e9
