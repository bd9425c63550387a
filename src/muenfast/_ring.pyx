"""SHMStream version 2: one writer, any number of independent readers, one-way shared memory.

The core is the `writer_*` and `reader_*` functions (nogil, no allocation); Writer and Reader give them to
Python. The protocol never blocks the writer: a slow reader is overrun and told so. Ordering is that of
docs/memory-model.md. Trust: a reader copies each header field once, checks the copy and uses the copy; it
reads nothing outside the memory it was given whatever the region holds.
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EFAULT, EINTR, ETIMEDOUT
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from muenfast._thread cimport *
from muenfast._wire cimport *

import os as _os
from enum import IntEnum
from weakref import WeakSet as _WeakSet

from muenfast.errors import BrokenChannelError, UsageError

cdef extern from "_guard.h" nogil:
    uint32_t *guard_add(const void *start, size_t length)
    void guard_remove(uint32_t *word)

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void *buf, size_t n, unsigned int flags)

# Waiting, in nanoseconds. A spin pays for itself only below the price of a wake-up from another CPU (measured:
# about 50 us); a sleep on the bell is bounded so that a bell that stops ringing costs a pause, not a stall.
cdef uint64_t SPIN_NS = 50_000
cdef uint64_t SLEEP_NS = 100_000_000
cdef uint64_t POLL_FIRST_NS = 20_000
cdef uint64_t POLL_ACTIVE_NS = 1_000_000
cdef uint64_t POLL_IDLE_NS = 10_000_000
cdef uint64_t IDLE_AFTER_NS = 1_000_000_000
# A bell that woke its sleeper in vain this many times more than there were batches, since VAIN_NS ago at most, is not slept on
# until that time is over (docs/decisions/023). An honest peer rings once for what it publishes, and in vain only where that
# was found without.
cdef uint64_t VAIN_NS = 100_000_000
cdef uint64_t VAIN_MOST = 100
# A counter below what it was is looked at again for this long before it means a restart: a plain peer may store it in
# pieces (Python's struct.pack_into("<Q") zeroes the eight bytes first) and lose its CPU between two of them.
cdef uint64_t SETTLE_NS = 10_000_000
# Of a Reader, which holds the GIL meanwhile.
cdef uint64_t SETTLE_READER_NS = 2_000_000
# An epoch is looked at twice this far apart before it is believed, for the same reason.
cdef int SETTLE_PAUSES = 64
# Python calls that move no more than this keep the GIL: releasing costs 13-24 ns, a copy of 16 KiB about 500.
cdef uint64_t GIL_BYTES = 16384
# A reader that took this many elements one by one without a pause takes the next ones ahead, at most STAGE_BYTES of
# them and at most a quarter of the ring: one validation, and one look at the header, for all.
cdef uint64_t STAGE_AFTER = 64
cdef uint64_t STAGE_ELEMENTS = 64
cdef uint64_t STAGE_BYTES = 16384
# Of a long write_many, published together (docs/decisions/003).
cdef uint64_t BATCH_BYTES = 12288
cdef uint64_t SIGNAL_SLICE_NS = 50_000_000
# In which offences of a writer are counted together.
cdef uint64_t BLAME_NS = 1_000_000_000


# ------------------------------------------------------------------ writer

cdef uint64_t random_epoch() noexcept nogil:
    """A random non-zero epoch; the clock where the system has no entropy to give."""
    cdef uint64_t value = 0
    if getrandom(&value, sizeof(value), 0) != sizeof(value):
        value = now_ns()
    return value if value != 0 else 1


cdef void writer_init(writer_t *w, uint8_t *base, uint64_t length, uint64_t size, uint64_t protocol) noexcept nogil:
    """Binds a writer to mapped memory. Precondition: the caller claimed the channel; size > 0, length >= 64 + size."""
    memset(w, 0, sizeof(writer_t))
    w.hdr = <ring_header *>base
    w.slots = base + SHMSTREAM_HEADER_SIZE
    w.protocol = protocol
    w.size = size
    w.elements = (length - SHMSTREAM_HEADER_SIZE) // size
    w.rest = (length - SHMSTREAM_HEADER_SIZE) % size


cdef void writer_start(writer_t *w, uint64_t epoch) noexcept nogil:
    """Starts epoch `epoch` (non-zero) on a zeroed region.

    Ordering: epoch 0 is visible before any other change (release fence, pairs with reader_intact: whoever saw a
    byte of the new life sees the epoch move); the new epoch after all of them (release store, pairs with
    reader_sync's acquire load).
    """
    store_relaxed64(&w.hdr.epoch, 0)
    fence_release()
    memset(w.slots, 0, w.elements * w.size + w.rest)
    store_relaxed64(&w.hdr.transport, SHMSTREAM_TRANSPORT)
    store_relaxed64(&w.hdr.protocol, w.protocol)
    store_relaxed64(&w.hdr.size, w.size)
    store_relaxed64(&w.hdr.elements, w.elements)
    store_relaxed64(&w.hdr.reserved, w.reserved)
    store_relaxed64(&w.hdr.wsc, 0)
    store_relaxed64(&w.hdr.wc, 0)
    w.wc = w.wsc = w.index = 0
    w.epoch = epoch
    count64(&w.epochs, 1)
    if w.bell != NULL:
        store_relaxed64(&w.bell.ringer, epoch)
    store_release64(&w.hdr.epoch, epoch)
    ring(w)


cdef void writer_stop(writer_t *w) noexcept nogil:
    """Ends the epoch: readers see the channel inactive."""
    w.epoch = 0
    store_release64(&w.hdr.epoch, 0)
    ring(w)
    if w.bell != NULL:
        store_relaxed64(&w.bell.ringer, 0)


cdef void writer_reserve(writer_t *w, uint64_t n) noexcept nogil:
    """Announces that the next n slots change. Precondition: active, 1 <= n <= elements.

    Ordering: WSC before any byte of the slots (release fence; pairs with the acquire fence of reader_intact).
    A smaller reservation after a larger one never lowers WSC: the slots announced before may have been touched.
    """
    cdef uint64_t wsc = w.wc + n
    if <int64_t>(wsc - w.wsc) > 0:
        w.wsc = wsc
        store_relaxed64(&w.hdr.wsc, wsc)
    fence_release()


cdef uint8_t *writer_slot(const writer_t *w, uint64_t k) noexcept nogil:
    """The k-th reserved slot, k < elements."""
    cdef uint64_t at = w.index + k
    if at >= w.elements:
        at -= w.elements
    return w.slots + at * w.size


cdef void writer_publish(writer_t *w, uint64_t n) noexcept nogil:
    """Makes n complete slots readable and wakes a sleeping reader. Precondition: n <= what was reserved.

    Ordering: all bytes before WC (release store; pairs with reader_peek's acquire load).
    """
    w.wc += n
    w.index += n
    if w.index >= w.elements:
        w.index -= w.elements
    if w.wc < n:                        # 2^64 elements: the slot is WC mod elements, not the next one
        w.index = w.wc % w.elements
    store_release64(&w.hdr.wc, w.wc)
    count64(&w.batches, 1)
    prefetch_write(w.slots + w.index * w.size)
    ring(w)


cdef void writer_copy(writer_t *w, const uint8_t *data, uint64_t n) noexcept nogil:
    """Publishes n elements that stand one after the other in data. Precondition: active.

    Published every BATCH_BYTES, so that a reader copies while we do; announced every quarter of the ring, which leaves
    a reader three quarters of head start and takes the header's line from it half as often.
    """
    cdef uint64_t announced, batch, first
    cdef uint64_t most = max(<uint64_t>1, BATCH_BYTES // w.size)
    while n > 0:
        announced = min(n, max(<uint64_t>1, w.elements // 4))
        n -= announced
        writer_reserve(w, announced)
        while announced > 0:
            batch = min(announced, most)
            first = min(batch, w.elements - w.index)
            copy_bytes(w.slots + w.index * w.size, data, first * w.size)
            if batch > first:
                copy_bytes(w.slots, data + first * w.size, (batch - first) * w.size)
            writer_publish(w, batch)
            data += batch * w.size
            announced -= batch


cdef inline void ring(writer_t *w) noexcept nogil:
    """Wakes readers that announced a sleep.

    Ordering: the store to WC or epoch before the load of `waiters` (full fence; pairs with the one in reader_wait:
    either we see the waiter or it sees our store).
    """
    if w.bell == NULL:
        return
    fence_seq_cst()
    if load_relaxed32(&w.bell.waiters) != 0:
        bell_kick(w.bell)
        count64(&w.wakes, 1)


cdef void bell_kick(bell_page *bell) noexcept nogil:
    """Wakes all sleepers of a bell, whether there are any or not."""
    exchange_acqrel32(&bell.waiters, 0)
    fetch_add_acqrel32(&bell.seq, 1)
    futex_wake_all(&bell.seq)


# ------------------------------------------------------------------ reader

cdef void reader_init(reader_t *r, const uint8_t *base, uint64_t length, uint64_t size, uint64_t protocol) noexcept nogil:
    """Binds a reader to mapped memory (length >= 64); size and protocol 0 accept any."""
    memset(r, 0, sizeof(reader_t))
    r.hdr = <const ring_header *>base
    r.slots = base + SHMSTREAM_HEADER_SIZE
    r.capacity = length - SHMSTREAM_HEADER_SIZE
    r.want_size = size
    r.want_protocol = protocol
    r.settle_ns = SETTLE_NS
    r.may_spin = online_cpus() > 1
    r.spin_ns = SPIN_NS
    spin_paid(&r.spins)


cdef inline bint acceptable(const reader_t *r, uint64_t transport, uint64_t protocol, uint64_t size,
                            uint64_t elements, uint64_t reserved) noexcept nogil:
    """Whether a header (copies of its fields) is one that this reader takes and whose elements all lie in the region."""
    return (transport == SHMSTREAM_TRANSPORT and protocol != 0 and size != 0 and elements != 0
            and (r.want_protocol == 0 or protocol == r.want_protocol)
            and (r.want_size == 0 or size == r.want_size or size == r.sums_size and reserved == ACCEPT_MAGIC)
            and elements <= r.capacity // size)


cdef ring_status reader_sync(reader_t *r) noexcept nogil:
    """Takes the channel's geometry anew: EPOCH_CHANGED (synchronised, RC = 0), INACTIVE or INCOMPATIBLE_INTERFACE.

    Trust: transport, protocol, size and elements are loaded once each; the check that 64 + size * elements fits
    divides by the checked, non-zero size and cannot overflow.
    """
    cdef uint64_t epoch = 0, transport, protocol, size, elements, reserved
    cdef int attempt, pause
    for attempt in range(4):
        epoch = load_acquire64(&r.hdr.epoch)
        if epoch == 0 or epoch == r.shut:
            break
        transport = load_relaxed64(&r.hdr.transport)
        protocol = load_relaxed64(&r.hdr.protocol)
        size = load_relaxed64(&r.hdr.size)
        elements = load_relaxed64(&r.hdr.elements)
        reserved = load_relaxed64(&r.hdr.reserved)
        for pause in range(SETTLE_PAUSES):
            cpu_pause()
        fence_acquire()
        if load_relaxed64(&r.hdr.epoch) != epoch:
            continue                    # the writer restarts right now
        if not acceptable(r, transport, protocol, size, elements, reserved):
            r.epoch = 0
            r.refused = epoch
            return INCOMPATIBLE_INTERFACE
        r.protocol = protocol
        r.size = size
        r.elements = elements
        r.rc = r.wc = r.index = 0
        r.epoch = epoch
        r.refused = r.lately = 0
        store_relaxed64(&r.shut, 0)
        count64(&r.epochs, 1)
        if r.bell != NULL and not r.mute:
            store_relaxed64(&r.bell.reader_rc, 0)
            store_relaxed64(&r.bell.reader_epoch, epoch)
        return EPOCH_CHANGED
    r.epoch = 0
    r.refused = 0
    return INACTIVE


cdef inline bint went_back(uint64_t now, uint64_t before) noexcept nogil:
    """Whether a write counter is below what it was: the writer restarted under the same epoch.

    Counters are unsigned in all 64 bits; one that passes 2^64 moves less than half of that, and has not gone back.
    """
    return now < before and <int64_t>(now - before) < 0


cdef uint64_t reader_settled(reader_t *r, const uint64_t *counter) noexcept nogil:
    """One of the channel's write counters (acquire); one that seems to have gone back is given settle_ns.

    Whoever has waited in vain does not wait again as soon: half of the time is the most that a writer can take.
    """
    cdef uint64_t start, passed = 0, now = load_acquire64(counter)
    if not went_back(now, r.wc):
        return now
    if load_relaxed64(&r.hdr.epoch) != r.epoch:     # a restart that tells of itself: F3 and the load above
        return now
    start = now_ns()
    count64(&r.unsettled, 1)
    if r.given_up_ns != 0 and start - r.given_up_ns < r.settle_ns:
        return now
    while passed < r.settle_ns and went_back(now, r.wc) and load_relaxed64(&r.hdr.epoch) == r.epoch:
        if passed < POLL_FIRST_NS:
            cpu_pause()
        else:
            sleep_ns(POLL_FIRST_NS)     # the peer may need this very CPU
        now = load_acquire64(counter)
        passed = now_ns() - start
    if passed >= r.settle_ns:
        r.given_up_ns = start + passed
    return now


cdef ring_status reader_overrun(reader_t *r) noexcept nogil:
    """Gives up what the writer has overwritten: RC goes on at WC, `lost` says how many elements that skipped.

    Ordering: WC before the epoch (acquire): a WC of another life comes with its epoch, or the 0 before that.
    """
    cdef uint64_t wc = reader_settled(r, &r.hdr.wc)
    if went_back(wc, r.wc) or load_acquire64(&r.hdr.epoch) != r.epoch:
        return reader_sync(r)
    r.lost = wc - r.rc
    count64(&r.lost_total, r.lost)
    count64(&r.overruns, 1)
    reader_goto(r, wc)
    return OVERRUN_DETECTED


cdef void reader_blame(reader_t *r, uint32_t field, uint64_t n) noexcept nogil:
    """Notes n > 0 offences of the writer. More than `patience` of them in a second end its epoch for this reader, once all that
    was seen of it is taken: then another one is waited for."""
    cdef uint64_t now
    count64(&r.offences[field], n)
    if r.patience == 0:
        return
    now = now_ns()
    if now - r.blamed_ns > BLAME_NS:
        r.blamed_ns = now
        r.lately = 0
    r.lately += n


cdef inline bint out_of_patience(reader_t *r) noexcept nogil:
    """Whether the writer went beyond: then its epoch is shut."""
    if r.patience == 0 or r.lately <= r.patience:
        return False
    store_relaxed64(&r.shut, r.epoch)
    count64(&r.quarantines, 1)
    r.lately = 0
    return True


@cython.final
@cython.auto_pickle(False)
cdef class Conduct:
    """How a channel's writer keeps to the rules of what its elements mean, as its reader has it; an engine's `conduct`."""

    def __init__(self):
        raise TypeError("a Conduct is an engine's")

    @property
    def offences(self):
        """How many elements broke the rule of each field, by its name."""
        return {field: self.r.offences[k] for k, field in enumerate(self.fields)}

    @property
    def quarantines(self):
        """How many times those of a second were too many."""
        return self.r.quarantines

    @property
    def quarantined(self):
        """Whether the writer's epoch is taken for ended, for that reason."""
        return load_relaxed64(&self.r.shut) != 0

    @property
    def patience(self):
        """How many rules the writer may break in a second, 0: any number. Set while nobody runs the engine."""
        return self.r.patience

    @patience.setter
    def patience(self, uint64_t value):
        self.r.patience = value


cdef Conduct conduct_of(object owner, reader_t *r, tuple fields):
    """owner: whose memory *r is in."""
    cdef Conduct c
    if r == NULL:
        raise UsageError(f"a {type(owner).__name__} has no reader")
    c = Conduct.__new__(Conduct)
    c.owner, c.r, c.fields = owner, r, fields
    return c


cdef void reader_forgive(reader_t *r) noexcept nogil:
    """Takes the last overrun back: what it skipped was nobody's."""
    count64(&r.lost_total, 0 - r.lost)
    count64(&r.overruns, 0 - <uint64_t>1)


cdef void reader_goto(reader_t *r, uint64_t wc) noexcept nogil:
    """Goes on at element wc, which is the WC of a moment ago."""
    r.rc = r.wc = wc
    r.index = wc % r.elements
    if r.bell != NULL and not r.mute:
        store_relaxed64(&r.bell.reader_rc, wc)


cdef ring_status reader_peek(reader_t *r, uint64_t *available) noexcept nogil:
    """SUCCESS and how many elements can be read from slot 0 on, or one of the other five results.

    The elements are not yet known to be intact: copy out, then ask reader_intact, then use the copy.
    """
    cdef uint64_t wc, behind
    available[0] = 0
    behind = r.wc - r.rc
    if r.epoch == 0 or behind == 0:
        wc = load_acquire64(&r.hdr.epoch)
        if r.epoch == 0 or wc != r.epoch or out_of_patience(r):
            return reader_sync(r)
        wc = reader_settled(r, &r.hdr.wc)   # pairs with writer_publish
        behind = wc - r.rc
        if behind == 0:
            return NO_DATA
        if went_back(wc, r.wc):
            return reader_sync(r)
        r.wc = wc                       # first: an overrun loads WC anew, and what is below this one is another life's
        if behind > r.elements:
            return reader_overrun(r)
    if r.rc + behind < r.rc and r.rc + behind != 0:
        behind = 0 - r.rc               # a batch ends where the counter wraps: slots are RC mod elements
    available[0] = behind
    return SUCCESS


cdef const uint8_t *reader_slot(const reader_t *r, uint64_t k) noexcept nogil:
    """The k-th readable slot, k < elements."""
    cdef uint64_t at = r.index + k
    if at >= r.elements:
        at -= r.elements
    return r.slots + at * r.size


cdef bint reader_intact(reader_t *r) noexcept nogil:
    """Whether everything copied since reader_peek, from slot 0 on, is what the writer published.

    Slot k is stable iff WSC <= RC + k + elements after the copy; asking for slot 0 covers the batch. WSC or WC below the
    WC that peek saw: the writer has restarted, under the same epoch if that is unchanged, and zeroed the slots. WSC alone
    would not do: it comes as far while the new life's elements are still being written. Nor would WC, which may still be
    the old life's while a WSC of 0 says nothing of what that had overwritten.
    Ordering: the copy before the loads of epoch and counters (acquire fence; pairs with writer_reserve and writer_start);
    the epoch before the counters (acquire): whoever finds the same epoch started anew finds them below, too.
    """
    cdef uint64_t ahead
    fence_acquire()
    if load_acquire64(&r.hdr.epoch) != r.epoch:
        return False
    ahead = reader_settled(r, &r.hdr.wsc) - r.rc
    return r.wc - r.rc <= ahead <= r.elements and not went_back(reader_settled(r, &r.hdr.wc), r.wc)


cdef ring_status reader_recover(reader_t *r) noexcept nogil:
    """After a copy that was not intact: EPOCH_CHANGED, INACTIVE, INCOMPATIBLE_INTERFACE or OVERRUN_DETECTED."""
    if load_acquire64(&r.hdr.epoch) != r.epoch or went_back(reader_settled(r, &r.hdr.wsc), r.wc):
        return reader_sync(r)
    return reader_overrun(r)


cdef void reader_advance(reader_t *r, uint64_t n) noexcept nogil:
    """Consumes n elements, n <= what reader_peek granted."""
    r.rc += n
    r.index += n
    if r.index >= r.elements:
        r.index -= r.elements
    if r.rc < n:
        r.index = r.rc % r.elements
    count64(&r.batches, 1)
    count64(&r.delivered, n)
    if r.bell != NULL and not r.mute:
        store_relaxed64(&r.bell.reader_rc, r.rc)


cdef ring_status reader_copy(reader_t *r, uint8_t *dst, uint64_t most, uint64_t *n) noexcept nogil:
    """Reads up to `most` elements into dst (most * size bytes) with one validation; n = how many on SUCCESS."""
    cdef uint64_t available, first
    cdef ring_status status = reader_peek(r, &available)
    n[0] = 0
    if status != SUCCESS:
        return status
    if available > most:
        available = most
    first = r.elements - r.index
    if first > available:
        first = available
    copy_bytes(dst, r.slots + r.index * r.size, first * r.size)
    if available > first:
        copy_bytes(dst + first * r.size, r.slots, (available - first) * r.size)
    if not reader_intact(r):
        return reader_recover(r)
    reader_advance(r, available)
    n[0] = available
    return SUCCESS


cdef void reader_drain(reader_t *r) noexcept nogil:
    """Skips to WC, the one that was found not to have gone back; synchronises first where that is due."""
    cdef uint64_t wc = 0
    cdef bint due = r.epoch == 0 or load_acquire64(&r.hdr.epoch) != r.epoch
    if not due:
        wc = load_acquire64(&r.hdr.wc)
        due = went_back(wc, r.wc)
    if due:
        if reader_sync(r) != EPOCH_CHANGED:
            return
        wc = load_acquire64(&r.hdr.wc)
    reader_goto(r, wc)


cdef bint reader_ready(const reader_t *r) noexcept nogil:
    """Whether a read would tell something new: data, another epoch, or that the channel went inactive."""
    cdef uint64_t epoch
    if r.epoch != 0 and r.wc != r.rc:
        return True
    epoch = load_acquire64(&r.hdr.epoch)
    if epoch == 0:
        return r.epoch != 0 or r.refused != 0
    if epoch == r.shut:
        return r.epoch != 0
    if epoch == r.refused:
        # By now there may be another header under the same epoch: a hint, reader_sync looks properly.
        return acceptable(r, load_relaxed64(&r.hdr.transport), load_relaxed64(&r.hdr.protocol),
                          load_relaxed64(&r.hdr.size), load_relaxed64(&r.hdr.elements),
                          load_relaxed64(&r.hdr.reserved))
    return epoch != r.epoch or load_acquire64(&r.hdr.wc) != r.rc


cdef bint reader_deaf(reader_t *r, uint64_t now) noexcept nogil:
    """Whether the bell rang in vain too often lately: then it is not slept on, and the channel polled as one without.

    Trust: a bell's words and wake-ups are anybody's who has the bell. This bounds what they cost who sleeps there, and the
    neighbours that it serves in the same thread.
    """
    if now - r.vain_ns >= VAIN_NS:
        r.vain_ns = now
        r.vain = 0
        r.vain_from = r.batches
    return r.vain >= VAIN_MOST + (r.batches - r.vain_from)


cdef void watch_add(watch_t *watch, reader_t *r) noexcept nogil:
    """Precondition: watch.lock is held; watch_stop and watch_futex are set."""
    if watch.first == NULL:
        fetch_add_acqrel32(&watch.wanted, 1)
        futex_wake_all(&watch.wanted)
    else:
        watch.first.watch_link = &r.watch_next
    r.watch_next = watch.first
    r.watch_link = &watch.first
    watch.first = r


cdef void watch_drop(reader_t *r) noexcept nogil:
    """Precondition: watch.lock is held."""
    r.watch_link[0] = r.watch_next
    if r.watch_next != NULL:
        r.watch_next.watch_link = r.watch_link


cdef void watched_sleep(reader_t *r, uint64_t ns, const uint32_t *stop, bint deaf) noexcept nogil:
    """Sleeps until the bell rings (unless it is deaf to it) or the watch finds that there is something new or that stop[0] is
    set; at most ns.

    While r is in the watch's list its owner is in here and changes none of its fields.
    """
    cdef watch_t *watch = r.watch
    cdef uint32_t seen
    cdef bint listens = r.bell != NULL and not deaf
    r.watch_stop = stop
    r.watch_futex = &r.bell.seq if listens else &r.nap
    seen = load_acquire32(r.watch_futex)
    if listens:
        store_relaxed32(&r.bell.waiters, 1)
        fence_seq_cst()                 # pairs with ring()
    pthread_mutex_lock(&watch.lock)
    watch_add(watch, r)
    pthread_mutex_unlock(&watch.lock)
    # A wake-up that comes before the sleep is repeated with the watch's next look.
    if not reader_ready(r) and load_relaxed32(stop) == 0:
        futex_wait_ns(r.watch_futex, seen, ns)
    pthread_mutex_lock(&watch.lock)
    watch_drop(r)
    pthread_mutex_unlock(&watch.lock)


cdef void watch_run(watch_t *watch) noexcept nogil:
    """Looks at all readers under watch, POLL_IDLE_NS apart, until watch.stop."""
    cdef reader_t *r
    cdef uint32_t seen
    while load_relaxed32(&watch.stop) == 0:
        seen = load_acquire32(&watch.wanted)
        pthread_mutex_lock(&watch.lock)
        r = watch.first
        if r == NULL:
            pthread_mutex_unlock(&watch.lock)
            futex_wait_ns(&watch.wanted, seen, SLEEP_NS * 10)
            continue
        while r != NULL:
            if reader_ready(r) or load_relaxed32(r.watch_stop) != 0:
                futex_wake_all(r.watch_futex)
            r = r.watch_next
        pthread_mutex_unlock(&watch.lock)
        sleep_ns(POLL_IDLE_NS)


cdef bint reader_wait(reader_t *r, uint64_t ns, const uint32_t *stop) noexcept nogil:
    """Waits until reader_ready, at most ns nanoseconds or until stop[0]; whether it is ready.

    Spins only while spinning paid lately; then sleeps on the bell while the writer's current epoch stands in it,
    else polls: at most 1 ms apart while there was data within a second, 10 ms otherwise. An idle reader with a watch
    leaves polling to that.
    """
    cdef uint64_t start, now, limit, epoch, before, step = POLL_FIRST_NS
    cdef uint32_t seen
    cdef bint idle, rings, deaf
    if reader_ready(r):
        r.idle_since_ns = 0
        return True
    if load_relaxed32(stop) != 0 or ns == 0:
        return False
    start = now = now_ns()
    if r.idle_since_ns == 0:
        r.idle_since_ns = start
    if r.may_spin and r.epoch != 0 and spin_pays(&r.spins):
        while True:
            spin_once(SPIN_ALONE_NS if r.yields else now - start)
            if reader_ready(r):
                spin_paid(&r.spins)
                r.idle_since_ns = 0
                return True
            now = now_ns()
            if now - start >= r.spin_ns or now - start >= ns or load_relaxed32(stop) != 0:
                break
        spin_in_vain(&r.spins)
    while not reader_ready(r):
        if load_relaxed32(stop) != 0 or now - start >= ns:
            return False
        epoch = load_relaxed64(&r.hdr.epoch)
        deaf = r.bell != NULL and reader_deaf(r, now)
        rings = r.bell != NULL and not deaf and epoch != 0 and load_relaxed64(&r.bell.ringer) == epoch
        idle = now - r.idle_since_ns >= IDLE_AFTER_NS or r.epoch == 0
        if idle and r.watch != NULL and (rings or r.poll_ns == 0):
            count64(&r.sleeps, 1)
            before, limit = now, ns - (now - start)
            watched_sleep(r, limit, stop, deaf)
            now = now_ns()
            # The watch wakes for what is new and for stop; whatever else woke us is the bell, whose words the peer may forge.
            if r.bell != NULL and not deaf and now - before < limit and not reader_ready(r) and load_relaxed32(stop) == 0:
                r.vain += 1
            continue
        if rings:
            limit = SLEEP_NS
        elif r.poll_ns != 0:
            limit = r.poll_ns
        elif not idle and not deaf:
            limit = step
            step = step * 2 if step * 2 < POLL_ACTIVE_NS else POLL_ACTIVE_NS
        else:
            limit = POLL_IDLE_NS if idle else POLL_ACTIVE_NS
        if limit > ns - (now - start):
            limit = ns - (now - start)
        count64(&r.sleeps, 1)
        if r.bell != NULL and not deaf:
            seen = load_acquire32(&r.bell.seq)
            store_relaxed32(&r.bell.waiters, 1)
            fence_seq_cst()             # pairs with ring(): the announcement before the last look
            if reader_ready(r):
                break
            futex_wait_ns(&r.bell.seq, seen, limit)
            before = now
            now = now_ns()
            if now - before < limit and not reader_ready(r):
                r.vain += 1
        else:
            sleep_ns(limit)
            now = now_ns()
    r.idle_since_ns = 0
    return True


cdef bint any_ready(const waitset_t *set) noexcept nogil:
    cdef uint64_t k
    for k in range(set.n):
        if reader_ready(set.readers[k]) or load_relaxed32(set.readers[k].watch_stop) != 0:
            return True
    return False


cdef watch_t *common_watch(const waitset_t *set, bint idle) noexcept nogil:
    """The watch that all readers of a set leave polling to; NULL: they do not, or not all are idle. idle: whether they are,
    as those are anyway that nobody writes to."""
    cdef watch_t *watch = NULL if set.n == 0 or set.polls else set.readers[0].watch
    cdef const reader_t *r
    cdef uint64_t k
    for k in range(set.n):
        r = set.readers[k]
        if r.watch != watch or r.poll_ns != 0 or not idle and r.epoch != 0:
            return NULL
    return watch


cdef bint readers_wait(waitset_t *set, uint64_t ns) noexcept nogil:
    """As reader_wait, for all readers of one thread together: waits until one is ready or its watch_stop is set, at most
    ns nanoseconds; whether one is.

    Sleeps on all bells at once. Readers whose writer does not ring are polled, as all are where the system has no
    futex_waitv(2), or once all are idle left to their watch.
    """
    cdef watch_t *watch
    cdef futex_entry bells[128]         # FUTEX_LIST_MOST
    cdef reader_t *heard[128]           # whose they are; NULL: of one that the watch wakes
    cdef reader_t *r
    cdef uint64_t start, now, limit, epoch, k, pause, step = POLL_FIRST_NS
    cdef unsigned int asleep
    cdef int woken
    cdef bint idle, deaf, listens
    if any_ready(set):
        set.idle_since_ns = 0
        return True
    if ns == 0:
        return False
    start = now = now_ns()
    if set.idle_since_ns == 0:
        set.idle_since_ns = start
    if set.n != 0 and set.readers[0].may_spin and spin_pays(&set.spins):
        while now - start < SPIN_NS and now - start < ns:
            spin_once(now - start)
            if any_ready(set):
                spin_paid(&set.spins)
                set.idle_since_ns = 0
                return True
            now = now_ns()
        spin_in_vain(&set.spins)
    while True:
        now = now_ns()
        if now - start >= ns:
            return False
        idle = now - set.idle_since_ns >= IDLE_AFTER_NS
        watch = common_watch(set, idle)
        limit = ns - (now - start)
        if watch == NULL:
            limit = min(SLEEP_NS, limit)
        asleep = 0
        for k in range(set.n):
            r = set.readers[k]
            epoch = load_relaxed64(&r.hdr.epoch)
            deaf = r.bell != NULL and reader_deaf(r, now)
            listens = r.bell != NULL and not deaf
            if listens:
                bells[asleep] = futex_entry_of(&r.bell.seq, load_acquire32(&r.bell.seq))
                heard[asleep] = r
                asleep += 1
                store_relaxed32(&r.bell.waiters, 1)
            if watch != NULL:
                r.watch_futex = &r.bell.seq if listens else &r.nap
                if not listens:
                    bells[asleep] = futex_entry_of(&r.nap, load_acquire32(&r.nap))
                    heard[asleep] = NULL
                    asleep += 1
            elif r.bell == NULL or deaf or set.polls or epoch == 0 or load_relaxed64(&r.bell.ringer) != epoch:
                pause = POLL_IDLE_NS if idle or r.epoch == 0 else POLL_ACTIVE_NS if deaf else step
                limit = min(limit, pause if r.poll_ns == 0 else r.poll_ns)
        fence_seq_cst()                 # pairs with ring(): the announcements before the last look
        if any_ready(set):
            set.idle_since_ns = 0
            return True
        count64(&set.sleeps, 1)
        for k in range(set.n):
            count64(&set.readers[k].sleeps, 1)
        if watch != NULL:               # a wake-up that comes before the sleep is repeated with the watch's next look
            pthread_mutex_lock(&watch.lock)
            for k in range(set.n):
                watch_add(watch, set.readers[k])
            pthread_mutex_unlock(&watch.lock)
        if asleep == 0 or set.polls:
            sleep_ns(limit)
        else:
            woken = futex_wait_any_ns(bells, asleep, limit)
            # EFAULT: a bell that was truncated, until the next load of its sequence puts private memory there. Whatever
            # else it is (ENOSYS, or what a system-call filter says) will be so again.
            if woken == -EFAULT:
                sleep_ns(min(limit, POLL_ACTIVE_NS))
            elif woken < 0 and woken != -EAGAIN and woken != -EINTR and woken != -ETIMEDOUT:
                set.polls = True
            elif (woken >= 0 or woken == -EAGAIN) and not any_ready(set):
                for k in range(asleep):
                    if heard[k] != NULL and (<int>k == woken or load_relaxed32(&heard[k].bell.seq) != bells[k].seen):
                        heard[k].vain += 1
        if watch != NULL:
            pthread_mutex_lock(&watch.lock)
            for k in range(set.n):
                watch_drop(set.readers[k])
            pthread_mutex_unlock(&watch.lock)
        if not idle:
            step = min(step * 2, POLL_ACTIVE_NS)
        if any_ready(set):
            set.idle_since_ns = 0
            return True


# ------------------------------------------------------------------ Python

class Result(IntEnum):
    """What a read of a channel came to; the names are those of the SHMStream specification."""

    INACTIVE = 0
    INCOMPATIBLE_INTERFACE = 1
    EPOCH_CHANGED = 2
    NO_DATA = 3
    OVERRUN_DETECTED = 4
    SUCCESS = 5


cdef tuple RESULTS = tuple(Result)


cdef class Mapping:
    cdef int hold(self, object memory, bint writable, uint64_t least) except -1:
        """Takes `memory` (at least `least` bytes) until drop(); raises UsageError or BufferError."""
        PyObject_GetBuffer(memory, &self.buffer, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True
        self.base = <uint8_t *>self.buffer.buf
        self.length = self.buffer.len
        if self.length < least:
            self.drop()
            raise UsageError(f"a region of {self.length} bytes is too small, at least {least} are needed")
        if <uintptr_t>self.base % 8 != 0:
            self.drop()
            raise UsageError("a region must start at a multiple of 8 bytes")
        self.broken = guard_add(self.base, self.length)
        if self.broken == NULL:
            self.drop()
            raise UsageError("too many mapped regions in one process")
        _held.add(self)
        return 0

    cdef void drop(self) noexcept:
        if self.held:
            guard_remove(self.broken)
            self.broken = NULL
            PyBuffer_Release(&self.buffer)
            self.held = False
            self.base = NULL

    cdef bell_page *as_bell(self) except? NULL:
        """The mapping as a bell; a fresh (zero) page is made one. None of ours: NULL."""
        cdef bell_page *bell = <bell_page *>self.base
        cdef uint64_t magic = load_relaxed64(&bell.magic)
        if magic == 0:
            store_relaxed64(&bell.magic, BELL_MAGIC)
        elif magic != BELL_MAGIC:
            return NULL
        return bell

    def __dealloc__(self):
        self.drop()


cdef Mapping hold(object memory, bint writable, uint64_t least):
    """A Mapping of a buffer of at least `least` bytes; raises UsageError."""
    cdef Mapping m = Mapping.__new__(Mapping)
    m.hold(memory, writable, least)
    return m


_held = _WeakSet()


def _leave_to_parent():
    """In a child of fork(): what the parent has open is the parent's. Two processes that count for one end of a channel
    would take each other's answers, and overwrite each other's requests."""
    cdef Mapping m
    for each in list(_held):
        m = each
        m.forked = m.held
        m.held = False


_os.register_at_fork(after_in_child=_leave_to_parent)


cdef class Endpoint:
    """What Writer and Reader share: the mappings, the claim of one thread at a time, context management."""
    cdef Mapping region
    cdef Mapping bell_region
    cdef bell_page *bell
    cdef uint32_t busy
    cdef str name
    cdef public object owner    # closed after this: the region behind `memory`

    cdef int attach(self, object memory, object bell, str name, bint writable, uint64_t least) except -1:
        """Takes both buffers or none; an object that took none is a closed one."""
        cdef Mapping region = Mapping.__new__(Mapping)
        cdef Mapping bell_region = None
        region.hold(memory, writable, least)
        if bell is not None:
            bell_region = Mapping.__new__(Mapping)
            bell_region.hold(bell, True, sizeof(bell_page))
            self.bell = bell_region.as_bell()
        self.name, self.region, self.bell_region = name, region, bell_region
        return 0

    cdef int enter(self) except -1:
        """Keeps a second thread out while the first is inside; raises UsageError."""
        if self.region is not None and self.region.forked:
            raise UsageError(f"channel {self.name}: this {type(self).__name__} belongs to the process that was forked; "
                             "open one of your own")
        if not busy_enter(&self.busy):
            raise UsageError(f"channel {self.name}: another thread is using this {type(self).__name__}; "
                             "give each thread one of its own or take a lock")
        if self.region is None or not self.region.held:
            busy_leave(&self.busy)
            raise UsageError(f"channel {self.name}: this {type(self).__name__} is closed")
        return 0

    cdef void detach(self) noexcept:
        if self.region is not None:
            self.region.drop()
        self.bell = NULL
        if self.bell_region is not None:
            self.bell_region.drop()

    @property
    def closed(self):
        """Whether close() was called."""
        return self.region is None or not self.region.held

    @property
    def broken(self):
        """Whether the region's owner took its memory away (truncated it) while it was mapped here."""
        cdef const uint32_t *word = NULL if self.region is None else self.region.broken
        return word != NULL and load_acquire32(word) != 0

    @property
    def ringing(self):
        """Whether the channel has a bell."""
        return self.bell != NULL

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


cdef class Watch:
    """Polls for all readers that are idle, so that each of them need not.

    Give it to block engines (watch=) and have one thread in run(); without such a thread engines wake up late, as
    seldom as their own time limits say.
    """
    def __cinit__(self):
        pthread_mutex_init(&self.w.lock, NULL)

    def run(self):
        """Watches until stop(); for one thread. Raises UsageError for a second one."""
        if not busy_enter(&self.busy):
            raise UsageError("another thread runs this Watch")
        with nogil:
            prepare_thread(TIMER_SLACK_NS, 0)
            watch_run(&self.w)
        busy_leave(&self.busy)

    def stop(self):
        """Ends run() soon; from any thread."""
        store_release32(&self.w.stop, 1)
        fetch_add_acqrel32(&self.w.wanted, 1)
        futex_wake_all(&self.w.wanted)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.w.lock)


@cython.final
cdef class Writer(Endpoint):
    """The writing side of one channel.

    memory: a writable buffer (a Region's view), at least 64 + size bytes; the caller has claimed the channel.
    size: bytes of an element. protocol: non-zero u64. epoch: non-zero u64, by default random.
    bell: a writable buffer of at least 128 bytes, or None: readers poll. name: for messages.

    Activates the channel at once; close() deactivates it. One thread at a time: a second one gets UsageError.

        with Writer(region.view, size=64, protocol=0x1234) as w:
            w.write(b"hello")
    """
    cdef writer_t w

    def __init__(self, memory, *, size, protocol, epoch=None, bell=None, name="(memory)"):
        if not 0 < size < 1 << 62:
            raise UsageError("the element size must be a positive number of bytes", value=size)
        if not 0 < protocol < 1 << 64:
            raise UsageError("a protocol is a non-zero 64-bit number", value=protocol)
        if epoch is not None and not 0 < epoch < 1 << 64:
            raise UsageError("an epoch is a non-zero 64-bit number", value=epoch)
        if self.region is not None:
            raise UsageError("a Writer is initialised once")
        self.attach(memory, bell, name, True, SHMSTREAM_HEADER_SIZE + size)
        writer_init(&self.w, self.region.base, self.region.length, size, protocol)
        self.w.bell = self.bell
        self.w.broken = self.region.broken
        writer_start(&self.w, random_epoch() if epoch is None else epoch)

    def __dealloc__(self):
        if self.region is not None and self.region.held and self.w.hdr != NULL:
            writer_stop(&self.w)

    @property
    def size(self):
        """Bytes of one element."""
        return self.w.size

    @property
    def elements(self):
        """Elements the region holds."""
        return self.w.elements

    @property
    def epoch(self):
        """The current epoch, 0 while inactive."""
        return self.w.epoch

    @property
    def written(self):
        """Elements published in this epoch (WC)."""
        return self.w.wc

    @property
    def counters(self):
        """batches, wakes (system calls made to wake a reader), epochs, elements (of this epoch)."""
        return {"elements": self.w.wc, "batches": self.w.batches, "wakes": self.w.wakes, "epochs": self.w.epochs}

    def activate(self, epoch=None):
        """Starts a new epoch (random unless given): readers resynchronise, what they had not read is gone.

        Raises UsageError, BrokenChannelError.
        """
        if epoch is not None and not 0 < epoch < 1 << 64:
            raise UsageError("an epoch is a non-zero 64-bit number", value=epoch)
        cdef uint64_t new = random_epoch() if epoch is None else epoch
        cdef bint broken
        self.enter()
        writer_start(&self.w, new)
        broken = load_relaxed32(self.region.broken) != 0
        if broken:                          # under these very stores, or long before
            writer_stop(&self.w)
        busy_leave(&self.busy)
        if broken:
            raise BrokenChannelError(self.name)

    def deactivate(self):
        """Ends the epoch: readers see INACTIVE. Writing needs activate() first."""
        self.enter()
        writer_stop(&self.w)
        busy_leave(&self.busy)

    cdef int enter_active(self) except -1:
        self.enter()
        if load_relaxed32(self.region.broken) != 0:
            busy_leave(&self.busy)
            raise BrokenChannelError(self.name)
        if self.w.epoch == 0:
            busy_leave(&self.busy)
            raise UsageError(f"channel {self.name}: the writer is inactive; call activate() first")
        return 0

    def write(self, data):
        """Publishes one element. data: a buffer of at most `size` bytes; a shorter one is padded with zeros.

        Raises UsageError (too long, inactive, used by two threads), BrokenChannelError.
        """
        cdef Py_buffer view
        cdef bint broken
        self.enter_active()
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except BaseException:
            busy_leave(&self.busy)
            raise
        if <uint64_t>view.len > self.w.size:
            length = view.len
            PyBuffer_Release(&view)
            busy_leave(&self.busy)
            raise UsageError(f"channel {self.name}: {length} bytes do not fit an element of {self.w.size}")
        if <uint64_t>view.len > GIL_BYTES:
            with nogil:
                put_one(&self.w, <const uint8_t *>view.buf, view.len)
        else:
            put_one(&self.w, <const uint8_t *>view.buf, view.len)
        broken = load_relaxed32(self.region.broken) != 0
        PyBuffer_Release(&view)
        busy_leave(&self.busy)
        if broken:
            raise BrokenChannelError(self.name)

    def write_many(self, data):
        """Publishes many elements, in batches of about 12 KiB and at most a quarter of the ring; returns how many.

        data: one contiguous buffer of whole elements (fast), or an iterable of buffers, one element each.
        A batch is reserved, copied and published once.
        """
        cdef Py_buffer view
        cdef uint64_t n
        cdef bint broken
        if not PyObject_CheckBuffer(data):
            n = 0
            for item in data:
                self.write(item)
                n += 1
            return n
        self.enter_active()
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except BaseException:
            busy_leave(&self.busy)
            raise
        n = <uint64_t>view.len // self.w.size
        if n * self.w.size != <uint64_t>view.len:
            length = view.len
            PyBuffer_Release(&view)
            busy_leave(&self.busy)
            raise UsageError(f"channel {self.name}: {length} bytes are no whole number of elements of {self.w.size}")
        if <uint64_t>view.len > GIL_BYTES:
            with nogil:
                writer_copy(&self.w, <const uint8_t *>view.buf, n)
        else:
            writer_copy(&self.w, <const uint8_t *>view.buf, n)
        broken = load_relaxed32(self.region.broken) != 0
        PyBuffer_Release(&view)
        busy_leave(&self.busy)
        if broken:
            raise BrokenChannelError(self.name)
        return n

    def close(self):
        """Deactivates the channel and lets go of its memory; may be called twice."""
        if self.closed:
            return
        self.enter()
        writer_stop(&self.w)
        self.detach()
        busy_leave(&self.busy)
        if self.owner is not None:
            self.owner.close()


cdef void put_one(writer_t *w, const uint8_t *data, uint64_t length) noexcept nogil:
    cdef uint8_t *slot
    writer_reserve(w, 1)
    slot = writer_slot(w, 0)
    copy_bytes(slot, data, length)
    if length < w.size:
        memset(slot + length, 0, w.size - length)
    writer_publish(w, 1)


@cython.final
cdef class Reader(Endpoint):
    """The reading side of one channel; invisible to the writer, one of any number.

    memory: a buffer (a Region's view, read-only) of at least 64 bytes. protocol, size: what must stand in the
    header; None accepts any. bell: a writable buffer of at least 128 bytes, or None: wait() polls.
    poll: pause between polls in microseconds, None: adaptive. name: for messages.

    The first read after the writer (re)started says EPOCH_CHANGED and delivers nothing. A reader that streams one by
    one takes up to 16 KiB ahead of what it has delivered: those elements are not lost by an overrun or a restart.

        with Reader(region.view, protocol=0x1234) as r:
            while r.wait(timeout=1.0):
                if (element := r.read()) is None:
                    print(r.result.name, r.lost)
    """
    cdef reader_t r
    cdef ring_status status
    cdef uint32_t stop
    # Elements read ahead: validated, consumed from the ring, not yet asked for. None of them: at == end.
    cdef uint8_t *stage
    cdef uint64_t stage_bytes, stage_at, stage_end
    cdef uint64_t streak        # elements delivered one by one since one was missing

    def __init__(self, memory, *, protocol=None, size=None, bell=None, poll=None, name="(memory)"):
        if size is not None and not 0 < size < 1 << 64:
            raise UsageError("the element size must be a positive number of bytes", value=size)
        if protocol is not None and not 0 < protocol < 1 << 64:
            raise UsageError("a protocol is a non-zero 64-bit number", value=protocol)
        if poll is not None and not 0 < poll <= 10_000_000:
            raise UsageError("the pause between polls is 1 to 10000000 microseconds", value=poll)
        if self.region is not None:
            raise UsageError("a Reader is initialised once")
        self.attach(memory, bell, name, False, SHMSTREAM_HEADER_SIZE)
        reader_init(&self.r, self.region.base, self.region.length, size or 0, protocol or 0)
        self.r.bell = self.bell
        self.r.broken = self.region.broken
        self.r.poll_ns = 0 if poll is None else poll * 1000
        self.r.settle_ns = SETTLE_READER_NS
        self.status = INACTIVE

    @property
    def result(self):
        """Result of the last read."""
        return RESULTS[<int>self.status]

    @property
    def lost(self):
        """Elements lost by the last overrun."""
        return self.r.lost

    @property
    def size(self):
        """Bytes of one element in the current epoch, 0 before the first."""
        return self.r.size

    @property
    def elements(self):
        """Elements the channel holds in the current epoch, 0 before the first."""
        return self.r.elements

    @property
    def epoch(self):
        """The epoch this reader is synchronised with, 0: none."""
        return self.r.epoch

    @property
    def position(self):
        """The read counter RC: elements of this epoch before the next one to be delivered."""
        return self.r.rc - (self.stage_end - self.stage_at)

    @property
    def pending(self):
        """Elements published but not read, as far as the header tells now; 0 while the epoch is another one."""
        cdef uint64_t n = 0, wc
        self.enter()
        if self.r.epoch != 0 and load_acquire64(&self.r.hdr.epoch) == self.r.epoch:
            wc = load_acquire64(&self.r.hdr.wc)
            if not went_back(wc, self.r.wc):
                n = wc - self.r.rc
        n += self.stage_end - self.stage_at
        busy_leave(&self.busy)
        return n

    @property
    def counters(self):
        """elements and batches delivered, overruns, lost (elements), epochs, sleeps."""
        return {"elements": self.r.delivered - (self.stage_end - self.stage_at), "batches": self.r.batches, "overruns": self.r.overruns,
                "lost": self.r.lost_total, "epochs": self.r.epochs, "sleeps": self.r.sleeps}

    def read(self):
        """The next element as bytes, or None: then `result` says why (and `lost` how many an overrun cost)."""
        cdef uint64_t n
        cdef bint got
        self.enter()
        if self.stage_at == self.stage_end and (self.r.epoch == 0 or self.r.wc == self.r.rc):
            self.status = reader_peek(&self.r, &n)
            if self.status != SUCCESS:
                self.streak = 0
                busy_leave(&self.busy)
                return None
        try:
            data = PyBytes_FromStringAndSize(NULL, self.r.size)
        except BaseException:
            busy_leave(&self.busy)
            raise
        self.take(<uint8_t *>PyBytes_AS_STRING(data), 1, &n)
        got = self.status == SUCCESS    # afterwards the object may be another thread's
        busy_leave(&self.busy)
        return data if got else None

    cdef void take(self, uint8_t *dst, uint64_t most, uint64_t *n) noexcept:
        """Delivers up to `most` elements. Precondition: some are staged, or reader_peek granted some."""
        cdef uint64_t ahead
        if self.stage_at == self.stage_end and most == 1 and self.streak >= STAGE_AFTER:
            ahead = min(min(STAGE_ELEMENTS, STAGE_BYTES // self.r.size), self.r.elements // 4)
            if ahead > 1 and self.stage_room(ahead * self.r.size):
                self.status = reader_copy(&self.r, self.stage, ahead, n)
                self.stage_at = 0
                self.stage_end = n[0]
                if self.status != SUCCESS:
                    self.streak = 0
                    return
        if self.stage_at != self.stage_end:
            n[0] = min(most, self.stage_end - self.stage_at)
            memcpy(dst, self.stage + self.stage_at * self.r.size, n[0] * self.r.size)
            self.stage_at += n[0]
            self.status = SUCCESS
            return
        if most * self.r.size > GIL_BYTES:
            with nogil:
                self.status = reader_copy(&self.r, dst, most, n)
        else:
            self.status = reader_copy(&self.r, dst, most, n)
        self.streak = self.streak + 1 if most == 1 and self.status == SUCCESS else 0

    cdef bint stage_room(self, uint64_t length) noexcept:
        """Whether the (empty) stage holds `length` bytes by now."""
        if length > self.stage_bytes:
            free(self.stage)
            self.stage = <uint8_t *>malloc(length)
            self.stage_bytes = 0 if self.stage == NULL else length
        return self.stage != NULL

    def read_into(self, buffer):
        """Reads the next element into a writable buffer of at least `size` bytes; returns the Result."""
        cdef ring_status status
        self.fill(buffer, 1, &status)
        return RESULTS[<int>status]

    def read_many_into(self, buffer):
        """Reads as many elements as there are and as fit, validated together; returns how many.

        0: `result` says why, and what the buffer holds means nothing. Elements stand in it one after the other, `size`
        bytes each. What one-element reads had taken ahead is delivered first, and by itself.
        """
        cdef ring_status status
        return self.fill(buffer, 0, &status)

    cdef uint64_t fill(self, object buffer, uint64_t most, ring_status *status) except? 0:
        cdef Py_buffer view
        cdef uint64_t n = 0, room, available
        self.enter()
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        except BaseException:
            busy_leave(&self.busy)
            raise
        # The element size is known only after synchronising, which peek does and the copy below relies on.
        self.status = SUCCESS if self.stage_at != self.stage_end else reader_peek(&self.r, &available)
        if self.status != SUCCESS:
            self.streak = 0
        else:
            room = <uint64_t>view.len // self.r.size
            if room == 0:
                length = view.len
                PyBuffer_Release(&view)
                busy_leave(&self.busy)
                raise UsageError(f"channel {self.name}: a buffer of {length} bytes holds no element of {self.r.size}")
            self.take(<uint8_t *>view.buf, most if most != 0 else room, &n)
        PyBuffer_Release(&view)
        status[0] = self.status
        busy_leave(&self.busy)
        return n

    def drain(self):
        """Skips everything published so far."""
        self.enter()
        self.stage_at = self.stage_end = self.streak = 0
        reader_drain(&self.r)
        busy_leave(&self.busy)

    def wait(self, timeout=None):
        """Waits until a read would tell something new (data, another epoch, the end of one); whether it would.

        timeout: seconds, None: without end. Signals are handled while waiting.
        """
        cdef uint64_t left, slice_ns, start
        cdef bint forever = timeout is None
        cdef bint ready = False
        if not forever and not timeout >= 0:
            raise UsageError("a timeout is a number of seconds, not negative", value=timeout)
        left = 0 if forever else <uint64_t>(min(timeout, 1e9) * 1e9)
        self.enter()
        try:
            while True:
                slice_ns = SIGNAL_SLICE_NS if forever or left > SIGNAL_SLICE_NS else left
                start = now_ns()
                if self.stage_at != self.stage_end:
                    return True
                with nogil:
                    ready = reader_wait(&self.r, slice_ns, &self.stop)
                PyErr_CheckSignals()
                if ready:
                    return True
                if not forever:
                    start = now_ns() - start
                    left = left - start if left > start else 0
                    if left == 0:
                        return False
        finally:
            busy_leave(&self.busy)

    def close(self):
        """Lets go of the channel's memory; may be called twice."""
        if self.closed:
            return
        self.enter()
        self.detach()
        busy_leave(&self.busy)
        if self.owner is not None:
            self.owner.close()

    def __dealloc__(self):
        free(self.stage)


def layout():
    """Constants, sizes and offsets as the C headers have them, for tests and for `chan dump`."""
    return {"transport": SHMSTREAM_TRANSPORT, "header_size": SHMSTREAM_HEADER_SIZE,
            "header_fields": {"transport": 0, "epoch": 8, "protocol": 16, "size": 24, "elements": 32, "reserved": 40,
                              "wsc": 48, "wc": 56},
            "block_size": BLOCK_SIZE, "sector_size": SECTOR_SIZE, "event_size": sizeof(block_event),
            "event_header_size": sizeof(block_event_header), "bell_size": sizeof(bell_page),
            "request_protocol": BLOCK_REQUEST_PROTOCOL, "response_protocol": BLOCK_RESPONSE_PROTOCOL,
            "buffer_protocol": BUFFER_PROTOCOL, "buffer_request_size": sizeof(block_request),
            "buffer_response_size": sizeof(block_response)}


def newest(memory, most):
    """The last elements of a channel, oldest first, as (number, bytes), and the channel's state in a word.

    For looking at a channel: reads elements that other readers may have consumed. Raises UsageError.
    """
    cdef Mapping m = Mapping.__new__(Mapping)
    cdef reader_t r
    cdef ring_status status
    cdef uint64_t wc, n, k, got
    found = []
    m.hold(memory, False, SHMSTREAM_HEADER_SIZE)
    try:
        reader_init(&r, m.base, m.length, 0, 0)
        status = reader_sync(&r)
        if status != EPOCH_CHANGED:
            return found, "inactive" if status == INACTIVE else "incompatible"
        wc = load_acquire64(&r.hdr.wc)
        n = min(most, min(wc, r.elements))
        for k in range(n):
            reader_goto(&r, wc - n + k)
            r.wc = wc
            data = PyBytes_FromStringAndSize(NULL, r.size)
            status = reader_copy(&r, <uint8_t *>PyBytes_AS_STRING(data), 1, &got)
            if status == SUCCESS and got == 1:
                found.append((wc - n + k, data))
        return found, "active"
    finally:
        m.drop()


def bell_state(memory):
    """What stands in a bell: a dict, or None when the buffer holds none. Values are a peer's claims, not facts."""
    cdef Mapping m = Mapping.__new__(Mapping)
    cdef const bell_page *b
    cdef bell_page copy
    m.hold(memory, False, sizeof(bell_page))
    try:
        b = <const bell_page *>m.base
        if load_relaxed64(&b.magic) != BELL_MAGIC:
            return None
        memcpy(&copy, b, sizeof(bell_page))
        return {"sequence": copy.seq, "waiters": copy.waiters, "ringer": copy.ringer, "state": copy.state,
                "flags": copy.flags, "store": bytes(copy.store[:16]).hex(), "reader_rc": copy.reader_rc,
                "reader_epoch": copy.reader_epoch}
    finally:
        m.drop()
