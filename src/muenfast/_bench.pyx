"""Loops for `muenfast bench`: the ring's own core beside the limits of the machine, without Python in between.

Each pair of functions runs in two processes, one per CPU, on memory they share. All are flow-controlled by a word of
their own (a progress line), so that nothing is lost and every element is moved; the ring's protocol itself has no such
word. Waiting, on both sides: POLITE pauses between looks, but where a number of `pauses` is given.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport errno
from libc.stdint cimport int32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._ring cimport *
from muenfast._wire cimport *

import os as _os

from muenfast.errors import UsageError

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t n, int64_t offset)
    ssize_t pwrite(int fd, const void *buf, size_t n, int64_t offset)

cdef extern from "_frame.h" nogil:
    enum: FRAME_NET
    uint32_t frame_size(int kind, uint32_t mtu) noexcept
    int frame_put(int kind, uint8_t *slot, uint32_t size, const uint8_t *packet, uint32_t n, uint32_t used,
                  uint32_t mark) noexcept
    int32_t frame_take(int kind, uint8_t *to, const uint8_t *slot, uint32_t size, uint32_t *mark) noexcept

cdef extern from "_plain.h" nogil:
    ctypedef enum plain_status:
        PLAIN_INACTIVE, PLAIN_NO_DATA, PLAIN_EPOCH, PLAIN_OVERRUN, PLAIN_SUCCESS
    ctypedef struct plain_reader:
        uint64_t epoch, protocol, size, elements, rc
    void plain_start(ring_header *h, uint64_t epoch, uint64_t protocol, uint64_t size, uint64_t elements) noexcept
    void plain_write(ring_header *h, const void *element) noexcept
    plain_status plain_read(plain_reader *r, const ring_header *h, uint64_t capacity, void *element) noexcept

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    LINE = 64
    POLITE = 128
    # Bytes a producer may be ahead. A whole ring of megabytes in between leaves the caches, in one run and not in the
    # next: it depends on who is a little faster, and halves everything.
    AHEAD_BYTES = 256 << 10

cdef extern from *:
    """
    #ifndef MUENFAST_FLAGS
    #define MUENFAST_FLAGS "?"
    #endif
    """
    const char *MUENFAST_FLAGS
    const char *__VERSION__

# What compiled this module, and with what beside the interpreter's own options.
COMPILER = "gcc-compatible " + __VERSION__.decode()
FLAGS = MUENFAST_FLAGS.decode()
AHEAD = AHEAD_BYTES
HEADER = SHMSTREAM_HEADER_SIZE

# Words of the shared progress area, one cache line each.
cdef enum:
    GO = 0          # both sides have arrived
    DONE = 8        # elements the consumer has taken
    PUT = 16        # elements the producer has put (bare queue, copy)


cdef class _Held:
    """A writable buffer for the length of one call, every page of it mapped: faults are not what is measured."""
    cdef Py_buffer view
    cdef uint8_t *base
    cdef bint held

    def __cinit__(self, memory, uint64_t least):
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        self.held = True
        if <uint64_t>self.view.len < least:
            raise UsageError(f"{self.view.len} bytes of memory are too few, {least} are needed")
        self.base = <uint8_t *>self.view.buf
        cdef uint64_t page
        for page in range(<uint64_t>self.view.len // 4096):
            load_relaxed64(<uint64_t *>(self.base + page * 4096))

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef class _Private:
    """Page-aligned memory of our own, every page touched."""
    cdef uint8_t *base

    def __cinit__(self, uint64_t length):
        length = (length + 4095) // 4096 * 4096
        self.base = <uint8_t *>aligned_alloc(4096, length)
        if self.base == NULL:
            raise MemoryError()
        memset(self.base, 1, length)

    def __dealloc__(self):
        free(self.base)


cdef void rest(int pauses) noexcept nogil:
    cdef int i
    for i in range(pauses):
        cpu_pause()


cdef void polite() noexcept nogil:
    rest(POLITE)


cdef void meet(uint64_t *words, uint64_t side) noexcept nogil:
    """Both sides wait for each other; side is 1 or 2."""
    cdef uint64_t seen = fetch_add_relaxed64(&words[GO], side) + side
    while seen != 3:
        polite()
        seen = load_acquire64(&words[GO])


# ------------------------------------------------------------------ the ring

cdef uint64_t window(uint64_t slots, uint64_t size, uint64_t batch) noexcept nogil:
    """Most elements in between: AHEAD_BYTES, but two batches at least, and no more than there are slots."""
    return min(slots, max(<uint64_t>AHEAD_BYTES // size, 2 * batch))


def ring_write(region, progress, uint64_t size, uint64_t batch, uint64_t area, uint64_t count,
               int pauses=POLITE):
    """Writes `count` elements of `size` bytes, `batch` per call, never more than a window() ahead of the reader.

    area: elements of private memory that they come from, in turns, a multiple of batch; as in all these functions.
    pauses: between two looks at a full ring.
    """
    cdef _Held r = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef writer_t w
    cdef _Private own = _Private(size * area)
    cdef uint64_t n, most, taken = 0, at = 0
    writer_init(&w, r.base, r.view.len, size, 1)
    writer_start(&w, random_epoch())
    most = window(w.elements, size, batch)
    with nogil:
        meet(words, 1)
        while w.wc < count:
            n = min(batch, count - w.wc)
            while w.wc + n - taken > most:
                taken = load_acquire64(&words[DONE])
                if w.wc + n - taken > most:
                    rest(pauses)
            writer_copy(&w, own.base + at * size, n)
            at = at + batch if at + batch < area else 0
        while load_acquire64(&words[DONE]) < count:
            polite()
        writer_stop(&w)


def ring_read(region, progress, uint64_t size, uint64_t batch, uint64_t area, uint64_t count, int pauses=POLITE):
    """Reads `count` elements into private memory, up to `batch` per call, validated; (seconds, lost). pauses: between two
    looks at an empty ring."""
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef reader_t r
    cdef _Private own = _Private(size * area)
    cdef uint64_t done = 0, n = 0, at = 0, start
    cdef ring_status status
    reader_init(&r, m.base, m.view.len, size, 1)
    with nogil:
        while reader_copy(&r, own.base, batch, &n) != EPOCH_CHANGED:
            polite()
        meet(words, 2)
        start = now_ns()
        while done < count:
            status = reader_copy(&r, own.base + at * size, min(batch, area - at), &n)
            if status == SUCCESS:
                done += n
                at = at + n if at + n < area else 0
                store_release64(&words[DONE], done)
            elif status == NO_DATA:
                rest(pauses)
            else:
                break
        start = now_ns() - start
    return start / 1e9, r.lost_total + (count - done)


def ring_bounce(out, back, uint64_t size, uint64_t count, bint leads, laps, out_bell=None, back_bell=None):
    """Round trips over two rings, one element each way; seconds. laps: receives the nanoseconds of each (a u64), which
    costs a look at the clock; or None.

    Without bells both sides poll. With bells both sleep as soon as there is nothing to read.
    """
    cdef _Held o = _Held(out, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held b = _Held(back, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held times = None if laps is None else _Held(laps, 8 * count)
    cdef uint64_t *lap = NULL if laps is None else <uint64_t *>times.base
    cdef _Held ob = None if out_bell is None else _Held(out_bell, sizeof(bell_page))
    cdef _Held bb = None if back_bell is None else _Held(back_bell, sizeof(bell_page))
    cdef _Private own = _Private(size)
    cdef uint8_t *data = own.base
    cdef writer_t w
    cdef reader_t r
    cdef uint32_t stop = 0
    cdef uint64_t i, n, start, before, now
    cdef ring_status status
    writer_init(&w, o.base, o.view.len, size, 1)
    reader_init(&r, b.base, b.view.len, size, 1)
    r.may_spin = False
    if ob is not None:
        w.bell = <bell_page *>ob.base
    if bb is not None:
        r.bell = <bell_page *>bb.base
    writer_start(&w, random_epoch())
    with nogil:
        while reader_copy(&r, data, 1, &n) != EPOCH_CHANGED:
            polite()
        start = before = now_ns()
        for i in range(count):
            if leads:
                put(&w, data, size)
            status = reader_copy(&r, data, 1, &n)
            while status == NO_DATA:
                if r.bell == NULL:
                    cpu_pause()
                else:
                    reader_wait(&r, 100_000_000, &stop)
                status = reader_copy(&r, data, 1, &n)
            if not leads:
                put(&w, data, size)
            elif lap != NULL:
                now = now_ns()
                lap[i] = now - before
                before = now
        start = now_ns() - start
        if leads:                       # the other side has read our last element: it answered it
            writer_stop(&w)
    return start / 1e9


def ring_batches(out, back, uint64_t size, uint64_t batch, uint64_t count, bint leads, out_bell, back_bell):
    """`batch` elements out, published at once, and as many back, `count` times, both sides asleep in between; (seconds, batches
    published, system calls made to wake the other side) of this side."""
    cdef _Held o = _Held(out, SHMSTREAM_HEADER_SIZE + size * batch)
    cdef _Held b = _Held(back, SHMSTREAM_HEADER_SIZE + size * batch)
    cdef _Held ob = _Held(out_bell, sizeof(bell_page))
    cdef _Held bb = _Held(back_bell, sizeof(bell_page))
    cdef _Private own = _Private(size * batch)
    cdef writer_t w
    cdef reader_t r
    cdef uint32_t stop = 0
    cdef uint64_t i, n, taken = 0, start, wakes, batches
    cdef ring_status status
    writer_init(&w, o.base, o.view.len, size, 1)
    reader_init(&r, b.base, b.view.len, size, 1)
    r.may_spin = False
    w.bell = <bell_page *>ob.base
    r.bell = <bell_page *>bb.base
    writer_start(&w, random_epoch())
    with nogil:
        while reader_copy(&r, own.base, 1, &n) != EPOCH_CHANGED:
            polite()
        wakes, batches = w.wakes, w.batches
        start = now_ns()
        for i in range(count):
            if leads:
                put_many(&w, own.base, size, batch)
            taken = 0
            while taken < batch:
                status = reader_copy(&r, own.base, batch - taken, &n)
                if status == NO_DATA:
                    reader_wait(&r, 100_000_000, &stop)
                elif status == SUCCESS:
                    taken += n
                else:
                    break
            if taken < batch:
                break
            if not leads:
                put_many(&w, own.base, size, batch)
        start = now_ns() - start
        wakes, batches = w.wakes - wakes, w.batches - batches
        if leads:
            writer_stop(&w)
    if taken < batch:
        raise UsageError("elements were lost between two that wait for each other")
    return start / 1e9, batches, wakes


def publish(region, bell, uint64_t size, uint64_t count):
    """Writes `count` elements that nobody reads, one by one, with a bell that nobody sleeps on; seconds."""
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held b = _Held(bell, sizeof(bell_page))
    cdef _Private own = _Private(size)
    cdef writer_t w
    cdef uint64_t i, start
    writer_init(&w, m.base, m.view.len, size, 1)
    w.bell = <bell_page *>b.base
    writer_start(&w, random_epoch())
    with nogil:
        start = now_ns()
        for i in range(count):
            put(&w, own.base, size)
        start = now_ns() - start
    writer_stop(&w)
    return start / 1e9


def copy_slots(region, uint64_t size, uint64_t count):
    """What publish() does, without the ring: the copies alone, slot after slot; seconds."""
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Private own = _Private(size)
    cdef uint64_t i, start, slot = 0, elements = (<uint64_t>m.view.len - SHMSTREAM_HEADER_SIZE) // size
    with nogil:
        start = now_ns()
        for i in range(count):
            copy_bytes(m.base + SHMSTREAM_HEADER_SIZE + slot * size, own.base, size)
            slot = slot + 1 if slot + 1 < elements else 0
        start = now_ns() - start
    return start / 1e9


cdef inline void put(writer_t *w, const uint8_t *data, uint64_t size) noexcept nogil:
    writer_reserve(w, 1)
    copy_bytes(writer_slot(w, 0), data, size)
    writer_publish(w, 1)


cdef inline void put_many(writer_t *w, const uint8_t *data, uint64_t size, uint64_t n) noexcept nogil:
    """n slots, published once."""
    cdef uint64_t k
    writer_reserve(w, n)
    for k in range(n):
        copy_bytes(writer_slot(w, k), data + k * size, size)
    writer_publish(w, n)


# ------------------------------------------------------------------ packets

cdef enum:
    PACKET = 64             # bytes of one
    HEADROOM = 16           # as in _net.pyx, as are rounds
    ROUND = 64
    ROUND_BYTES = 16384


cdef uint64_t round_of(uint64_t size) noexcept nogil:
    """Most elements of a round."""
    return min(<uint64_t>ROUND, max(<uint64_t>1, <uint64_t>ROUND_BYTES // size))


def packets_write(region, bell, progress, uint32_t mtu, uint64_t count):
    """What a Sender does, but for its device: `count` IPv4 packets of PACKET bytes out of private memory, each into an
    element of mtu bytes behind its net_hdr, published in rounds; a full ring waits for the reader's progress, as the bell
    has it."""
    cdef uint32_t size = frame_size(FRAME_NET, mtu)
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held b = _Held(bell, sizeof(bell_page))
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef bell_page *said = <bell_page *>b.base
    cdef _Private own = _Private(PACKET * ROUND)
    cdef writer_t w
    cdef uint32_t *used
    cdef uint8_t *slot
    cdef uint64_t k, n, at, taken = 0, batch = round_of(size), wrong = 0
    writer_init(&w, m.base, m.view.len, size, 1)
    w.bell = said
    for k in range(<uint64_t>ROUND):
        own.base[k * PACKET] = 0x45
        own.base[k * PACKET + 2] = 0
        own.base[k * PACKET + 3] = PACKET
    used = <uint32_t *>calloc(w.elements, sizeof(uint32_t))
    if used == NULL:
        raise MemoryError()
    writer_start(&w, random_epoch())
    with nogil:
        meet(words, 1)
        while w.wc < count:
            n = min(batch, count - w.wc)
            while w.wc + n - taken > w.elements - 1:
                taken = load_acquire64(&said.reader_rc)
                if w.wc + n - taken > w.elements - 1:
                    polite()
            writer_reserve(&w, n)
            for k in range(n):
                slot = writer_slot(&w, k)
                at = w.index + k if w.index + k < w.elements else w.index + k - w.elements
                if frame_put(FRAME_NET, slot, size, own.base + k * PACKET, PACKET, used[at], 0) != 0:
                    wrong += 1
                used[at] = PACKET
            writer_publish(&w, n)
        while load_acquire64(&words[DONE]) < count:
            polite()
        writer_stop(&w)
    free(used)
    if wrong != 0:
        raise UsageError(f"{wrong} packets do not go into elements of that MTU", value=mtu)


def packets_read(region, bell, progress, uint32_t mtu, uint64_t count):
    """What a Receiver does, but for its device: each packet is checked and copied to private memory, and the round looked
    at once whether it was left alone; (seconds, how many were lost or wrong)."""
    cdef uint32_t size = frame_size(FRAME_NET, mtu)
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held b = _Held(bell, sizeof(bell_page))
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t batch = round_of(size), stride = (HEADROOM + size + 63) & ~<uint64_t>63
    cdef _Private stage = _Private(batch * stride)
    cdef int32_t lengths[ROUND]
    cdef uint32_t marks[ROUND]
    cdef reader_t r
    cdef uint64_t k, n, done = 0, good = 0, start
    cdef ring_status status
    reader_init(&r, m.base, m.view.len, size, 1)
    r.bell = <bell_page *>b.base
    with nogil:
        while reader_peek(&r, &n) != EPOCH_CHANGED:
            polite()
        meet(words, 2)
        start = now_ns()
        while done < count:
            status = reader_peek(&r, &n)
            if status == NO_DATA:
                polite()
                continue
            if status != SUCCESS:
                break
            n = min(n, batch)
            for k in range(n):
                lengths[k] = frame_take(FRAME_NET, stage.base + k * stride + HEADROOM, reader_slot(&r, k), size, &marks[k])
            if not reader_intact(&r):
                break
            reader_advance(&r, n)
            done += n
            for k in range(n):
                if lengths[k] == PACKET:
                    good += 1
        start = now_ns() - start
        store_release64(&words[DONE], count)
    return start / 1e9, count - good


def slots_write(memory, progress, uint64_t size, uint64_t part, uint64_t count):
    """The same bytes moved to the same places, and no more: `part` bytes into each slot of `size`, a flag per round."""
    cdef _Held m = _Held(memory, size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t slots = <uint64_t>m.view.len // size, batch = round_of(size), put = 0, taken = 0, slot = 0, k, n
    cdef _Private own = _Private(part * ROUND)
    with nogil:
        meet(words, 1)
        while put < count:
            n = min(batch, count - put)
            while put + n - taken > slots:
                taken = load_acquire64(&words[DONE])
                if put + n - taken > slots:
                    polite()
            for k in range(n):
                copy_bytes(m.base + slot * size, own.base + k * part, part)
                slot = slot + 1 if slot + 1 < slots else 0
            put += n
            store_release64(&words[PUT], put)


def slots_read(memory, progress, uint64_t size, uint64_t part, uint64_t count):
    """The other side of slots_write; seconds."""
    cdef _Held m = _Held(memory, size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t slots = <uint64_t>m.view.len // size, batch = round_of(size), put = 0, taken = 0, slot = 0, k, n, start
    cdef _Private own = _Private(part * ROUND)
    with nogil:
        meet(words, 2)
        start = now_ns()
        while taken < count:
            if put == taken:
                put = load_acquire64(&words[PUT])
                if put == taken:
                    polite()
                continue
            n = min(batch, put - taken)
            for k in range(n):
                copy_bytes(own.base + k * part, m.base + slot * size, part)
                slot = slot + 1 if slot + 1 < slots else 0
            taken += n
            store_release64(&words[DONE], taken)
        start = now_ns() - start
    return start / 1e9


# ------------------------------------------------------------------ the protocol as plain C does it

def plain_ring_write(region, progress, uint64_t size, uint64_t area, uint64_t count, int pauses):
    """ring_write() by _plain.h, one element per call."""
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef ring_header *h = <ring_header *>m.base
    cdef _Private own = _Private(size * area)
    cdef uint64_t elements = (<uint64_t>m.view.len - SHMSTREAM_HEADER_SIZE) // size
    cdef uint64_t put = 0, taken = 0, at = 0, most = window(elements, size, 1)
    plain_start(h, random_epoch(), 1, size, elements)
    with nogil:
        meet(words, 1)
        while put < count:
            while put - taken == most:
                taken = load_acquire64(&words[DONE])
                if put - taken == most:
                    rest(pauses)
            plain_write(h, own.base + at * size)
            put += 1
            at = at + 1 if at + 1 < area else 0
        while load_acquire64(&words[DONE]) < count:
            polite()
        store_release64(&h.epoch, 0)


def plain_ring_read(region, progress, uint64_t size, uint64_t area, uint64_t count, int pauses):
    """ring_read() by _plain.h, one element per call; (seconds, lost)."""
    cdef _Held m = _Held(region, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef const ring_header *h = <const ring_header *>m.base
    cdef _Private own = _Private(size * area)
    cdef plain_reader r
    cdef plain_status status
    cdef uint64_t done = 0, at = 0, start
    memset(&r, 0, sizeof(r))
    r.protocol, r.size = 1, size
    with nogil:
        while plain_read(&r, h, <uint64_t>m.view.len, own.base) != PLAIN_EPOCH:
            polite()
        meet(words, 2)
        start = now_ns()
        while done < count:
            status = plain_read(&r, h, <uint64_t>m.view.len, own.base + at * size)
            if status == PLAIN_SUCCESS:
                done += 1
                at = at + 1 if at + 1 < area else 0
                store_release64(&words[DONE], done)
            elif status == PLAIN_NO_DATA:
                rest(pauses)
            else:
                break
        start = now_ns() - start
        store_release64(&words[DONE], count)
    return start / 1e9, count - done


def plain_bounce(out, back, uint64_t size, uint64_t count, bint leads):
    """ring_bounce() by _plain.h, both sides looking after one pause; seconds."""
    cdef _Held o = _Held(out, SHMSTREAM_HEADER_SIZE + size)
    cdef _Held b = _Held(back, SHMSTREAM_HEADER_SIZE + size)
    cdef _Private own = _Private(size)
    cdef ring_header *mine = <ring_header *>o.base
    cdef const ring_header *other = <const ring_header *>b.base
    cdef plain_reader r
    cdef uint64_t i, start, elements = (<uint64_t>o.view.len - SHMSTREAM_HEADER_SIZE) // size
    memset(&r, 0, sizeof(r))
    r.protocol, r.size = 1, size
    plain_start(mine, random_epoch(), 1, size, elements)
    with nogil:
        while plain_read(&r, other, <uint64_t>b.view.len, own.base) != PLAIN_EPOCH:
            polite()
        start = now_ns()
        for i in range(count):
            if leads:
                plain_write(mine, own.base)
            while plain_read(&r, other, <uint64_t>b.view.len, own.base) != PLAIN_SUCCESS:
                cpu_pause()
            if not leads:
                plain_write(mine, own.base)
        start = now_ns() - start
    return start / 1e9


# ------------------------------------------------------------------ limits

def queue_write(memory, progress, uint64_t size, uint64_t elements, uint64_t area, uint64_t count):
    """A bare single-producer single-consumer queue, one element at a time: no header, no validation, no overrun."""
    cdef _Held m = _Held(memory, size * elements)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef _Private own = _Private(size * area)
    cdef uint64_t put = 0, taken = 0, slot = 0, at = 0, most = window(elements, size, 1)
    with nogil:
        meet(words, 1)
        while put < count:
            if put - taken == most:
                taken = load_acquire64(&words[DONE])
                if put - taken == most:
                    polite()
                continue
            copy_bytes(m.base + slot * size, own.base + at * size, size)
            at = at + 1 if at + 1 < area else 0
            slot = slot + 1 if slot + 1 < elements else 0
            put += 1
            store_release64(&words[PUT], put)
            prefetch_write(m.base + slot * size)


def queue_read(memory, progress, uint64_t size, uint64_t elements, uint64_t area, uint64_t count):
    """The other side of queue_write; seconds."""
    cdef _Held m = _Held(memory, size * elements)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef _Private own = _Private(size * area)
    cdef uint64_t put = 0, taken = 0, slot = 0, at = 0, start
    with nogil:
        meet(words, 2)
        start = now_ns()
        while taken < count:
            if taken == put:
                put = load_acquire64(&words[PUT])
                if taken == put:
                    polite()
                continue
            copy_bytes(own.base + at * size, m.base + slot * size, size)
            at = at + 1 if at + 1 < area else 0
            slot = slot + 1 if slot + 1 < elements else 0
            taken += 1
            store_release64(&words[DONE], taken)
        start = now_ns() - start
    return start / 1e9


def copy_write(memory, progress, uint64_t chunk, uint64_t area, uint64_t most, uint64_t count):
    """Copies into shared memory what the other CPU copies out, in chunks with one flag each: what two cores can do.

    area: chunks of private memory. most: chunks in between.
    """
    cdef _Held m = _Held(memory, chunk)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t chunks = <uint64_t>m.view.len // chunk, put = 0, taken = 0, slot = 0, at = 0
    cdef _Private own = _Private(chunk * area)
    with nogil:
        meet(words, 1)
        while put < count:
            while put - taken == most:
                taken = load_acquire64(&words[DONE])
                if put - taken == most:
                    polite()
            copy_bytes(m.base + slot * chunk, own.base + at * chunk, chunk)
            at = at + 1 if at + 1 < area else 0
            slot = slot + 1 if slot + 1 < chunks else 0
            put += 1
            store_release64(&words[PUT], put)
            prefetch_write(m.base + slot * chunk)


def copy_read(memory, progress, uint64_t chunk, uint64_t area, uint64_t count):
    """The other side of copy_write; seconds."""
    cdef _Held m = _Held(memory, chunk)
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t chunks = <uint64_t>m.view.len // chunk, taken = 0, put = 0, slot = 0, at = 0, start
    cdef _Private own = _Private(chunk * area)
    with nogil:
        meet(words, 2)
        start = now_ns()
        while taken < count:
            while put == taken:
                put = load_acquire64(&words[PUT])
                if put == taken:
                    polite()
            copy_bytes(own.base + at * chunk, m.base + slot * chunk, chunk)
            at = at + 1 if at + 1 < area else 0
            slot = slot + 1 if slot + 1 < chunks else 0
            taken += 1
            store_release64(&words[DONE], taken)
        start = now_ns() - start
    return start / 1e9


def bounce(progress, uint64_t size, uint64_t slots, uint64_t count, bint leads, laps):
    """Round trips of a cache line (size 0), or of `size` bytes, in one of `slots` places each way in turns, and a line
    that says that they are there, between two CPUs; seconds. laps: receives the nanoseconds of each (a u64), which
    costs a look at the clock; or None."""
    cdef uint64_t room = (size * slots + LINE - 1) // LINE * LINE
    cdef _Held p = _Held(progress, 4 * LINE + 2 * room)
    cdef _Held times = None if laps is None else _Held(laps, 8 * count)
    cdef uint64_t *lap = NULL if laps is None else <uint64_t *>times.base
    cdef _Private own = _Private(size + 1)
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint64_t *mine = &words[DONE] if leads else &words[PUT]
    cdef uint64_t *other = &words[PUT] if leads else &words[DONE]
    cdef uint8_t *out = p.base + 4 * LINE + (room if leads else 0)
    cdef const uint8_t *back = p.base + 4 * LINE + (0 if leads else room)
    cdef uint64_t i, at = 0, start, before, now
    with nogil:
        meet(words, 1 if leads else 2)
        start = before = now_ns()
        for i in range(1, count + 1):
            if leads:
                copy_bytes(out + at, own.base, size)
                store_release64(mine, i)
            while load_acquire64(other) != i:
                cpu_pause()
            copy_bytes(own.base, back + at, size)
            if not leads:
                copy_bytes(out + at, own.base, size)
                store_release64(mine, i)
            elif lap != NULL:
                now = now_ns()
                lap[i - 1] = now - before
                before = now
            at = at + size if at + size < slots * size else 0
            prefetch_write(out + at)
        start = now_ns() - start
    return start / 1e9


def wake_bounce(progress, uint64_t count, bint leads, laps):
    """Round trips in which each side sleeps on a futex until the other wakes it; seconds. laps as for bounce()."""
    cdef _Held p = _Held(progress, 4 * LINE)
    cdef _Held times = None if laps is None else _Held(laps, 8 * count)
    cdef uint64_t *lap = NULL if laps is None else <uint64_t *>times.base
    cdef uint64_t *words = <uint64_t *>p.base
    cdef uint32_t *mine = <uint32_t *>(&words[DONE] if leads else &words[PUT])
    cdef uint32_t *other = <uint32_t *>(&words[PUT] if leads else &words[DONE])
    cdef uint32_t i, seen
    cdef uint64_t start, before, now
    with nogil:
        meet(words, 1 if leads else 2)
        start = before = now_ns()
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
            elif lap != NULL:
                now = now_ns()
                lap[i - 1] = now - before
                before = now
        start = now_ns() - start
    return start / 1e9


def copy_blocks(memory, uint64_t size, blocks, uint64_t places, uint64_t times):
    """One thread's memcpy of `size` bytes from each block number of a list (array of u64) in memory into `places` pieces
    of private memory, in turns; seconds."""
    cdef _Held m = _Held(memory, size)
    cdef Py_buffer view
    cdef const uint64_t *at
    cdef uint64_t n, k, t, start
    cdef uint8_t *data
    cdef _Private own
    PyObject_GetBuffer(blocks, &view, PyBUF_SIMPLE)
    try:
        at = <const uint64_t *>view.buf
        n = <uint64_t>view.len // 8
        for k in range(n):
            if at[k] >= <uint64_t>m.view.len // size:
                raise UsageError("a block lies beyond the memory", value=at[k])
        own = _Private(size * places)
        data = own.base
        with nogil:
            start = now_ns()
            for t in range(times):
                for k in range(n):
                    memcpy(data + k % places * size, m.base + at[k] * size, size)
            start = now_ns() - start
    finally:
        PyBuffer_Release(&view)
    return start / 1e9


def device_loop(int fd, numbers, bint write, uint64_t count):
    """`count` reads or writes of 4096 bytes at the block numbers of a list (array of u64), one after the other, as one
    of several threads; raises OSError."""
    cdef _Held places = _Held(numbers, 8)
    cdef const uint64_t *at = <const uint64_t *>places.base
    cdef uint64_t k, n = <uint64_t>places.view.len // 8
    cdef _Private own = _Private(BLOCK_SIZE)
    cdef ssize_t moved = BLOCK_SIZE
    cdef int error = 0
    with nogil:
        for k in range(count):
            if write:
                moved = pwrite(fd, own.base, BLOCK_SIZE, <int64_t>(at[k % n] * BLOCK_SIZE))
            else:
                moved = pread(fd, own.base, BLOCK_SIZE, <int64_t>(at[k % n] * BLOCK_SIZE))
            if moved != BLOCK_SIZE:
                error = errno
                break
    if moved != BLOCK_SIZE:
        raise OSError(error, _os.strerror(error) if moved < 0 else "the device ended")
