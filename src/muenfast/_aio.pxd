"""What an engine has under way on files: operations of the client's requests, out of order, by io_uring or threads."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from muenfast._engine cimport STOP_NUDGED, stopping
from muenfast._jobs cimport faults, jobs
from muenfast._ring cimport reader_deaf, reader_ready, reader_t, reader_wait
from muenfast._wire cimport (
    fence_seq_cst, load_acquire32, load_relaxed32, load_relaxed64, now_ns, sleep_ns, spin_habit, spin_in_vain,
    spin_once, spin_paid, spin_pays, store_relaxed32,
)

cdef extern from "_aio.h" nogil:
    enum:
        AIO_READ
        AIO_WRITE
        AIO_SYNC
        AIO_DISCARD
        AIO_MOST
        AIO_FILES
        AIO_NO_FILE
    const uint64_t AIO_LOOK_NS
    ctypedef struct aio_op:
        uint8_t *data
        uint64_t start
        uint64_t length
        uint32_t file
        int kind
        int error
        bint final
        bint late
    ctypedef struct aio_source:
        int (*execute)(const void *context, const aio_op *op) noexcept nogil
        const void *context
        jobs *jobs
        faults *faults
    ctypedef struct aio_t "aio":
        uint32_t nflying
        bint uring
        uint8_t *fixed
        uint32_t nfiles
    void aio_open(aio_t *a, bint threads, uint8_t *fixed, uint64_t length) noexcept
    int aio_add(aio_t *a, int fd, bint device, aio_source source) noexcept
    bint aio_conflicts(const aio_t *a, uint32_t file, int kind, uint64_t start, uint64_t length,
                       const uint8_t *data) noexcept
    void aio_submit(aio_t *a, aio_op *op) noexcept
    void aio_begin(aio_t *a) noexcept
    aio_op *aio_take(aio_t *a) noexcept
    bint aio_ready(const aio_t *a) noexcept
    void aio_wait(aio_t *a, uint32_t *word, uint32_t seen, uint64_t ns) noexcept
    bint aio_flies(const aio_t *a) noexcept
    void aio_hasten(aio_t *a) noexcept
    void aio_close(aio_t *a) noexcept


cdef enum:
    FLIGHT_SPIN_NS = 400000     # as long as a disk that is fast takes for a queue of requests
    FINISH_MOST = 4         # answered before new requests are looked for: a disk that has nothing to do loses most


cdef struct flight_t:       # one operation for n requests, which are neighbours
    aio_op op               # first: an aio_op * of ours is a flight_t *
    uint64_t first          # number of the first one
    uint32_t n


cdef struct flights_t:
    aio_t aio
    uint64_t head           # number of the next request; number k has the place k % AIO_MOST until it is answered
    bint busy[AIO_MOST]
    flight_t flights[AIO_MOST]  # at the place of the first request
    spin_habit spins
    bint blocked            # the next request waits for one that is under way
    bint leaving            # of a life that has ended: nobody gets their answers ...
    int pending             # ... and this status is dealt with once they are done


cdef inline uint64_t flights_room(flights_t *f, uint64_t most) noexcept nogil:
    """How many requests can be taken next, at most `most`. Numbers whose places are taken are left out: what takes long
    holds up its own place only."""
    cdef uint64_t n = 0, taken = 0
    while taken < AIO_MOST and f.busy[f.head % AIO_MOST]:
        f.head += 1
        taken += 1
    while n < most and not f.busy[(f.head + n) % AIO_MOST]:
        n += 1
    f.blocked = n == 0
    return n


cdef inline void flights_add(flights_t *f, uint64_t first, uint32_t n, int kind, uint32_t file, uint64_t start,
                             uint64_t length, uint8_t *data) noexcept nogil:
    """One operation for the requests first..first+n-1. Precondition: nothing under way conflicts with it."""
    cdef flight_t *t = &f.flights[first % AIO_MOST]
    cdef uint64_t k
    t.first = first
    t.n = n
    t.op.kind = kind
    t.op.file = file
    t.op.start = start
    t.op.length = length
    t.op.data = data
    for k in range(first, first + n):
        f.busy[k % AIO_MOST] = True
    aio_submit(&f.aio, &t.op)


cdef inline flight_t *flights_take(flights_t *f) noexcept nogil:
    """One that is done, or NULL. Its requests' places are the caller's until he calls flights_free."""
    return <flight_t *>aio_take(&f.aio)


cdef inline void flights_free(flights_t *f, const flight_t *t) noexcept nogil:
    cdef uint64_t k
    for k in range(t.first, t.first + t.n):
        f.busy[k % AIO_MOST] = False
    f.blocked = False


cdef inline void flights_wait(flights_t *f, reader_t *r, uint64_t ns, const uint32_t *stop) noexcept nogil:
    """Returns when something is done, or a request has come that could be taken, after ns nanoseconds at the latest.

    stop: nothing is taken any more once stop() was called; a nudge ends the wait. Precondition: something is under way.
    """
    cdef uint64_t epoch, start, passed
    cdef uint32_t seen
    cdef bint takes = not f.blocked and not f.leaving and not stopping(stop)
    if r.may_spin and spin_pays(&f.spins):
        start = now_ns()
        passed = 0
        while passed < FLIGHT_SPIN_NS:
            spin_once(passed)
            if aio_ready(&f.aio) or takes and reader_ready(r):
                spin_paid(&f.spins)
                return
            passed = now_ns() - start
        spin_in_vain(&f.spins)
    if load_relaxed32(stop) == STOP_NUDGED:
        return
    if not takes or stopping(stop):
        aio_wait(&f.aio, NULL, 0, ns)
        return
    epoch = load_relaxed64(&r.hdr.epoch)
    if r.bell == NULL or reader_deaf(r, now_ns()):
        if not reader_ready(r):
            aio_wait(&f.aio, NULL, 0, min(ns, AIO_LOOK_NS))
        return
    if epoch == 0 or load_relaxed64(&r.bell.ringer) != epoch:
        ns = min(ns, AIO_LOOK_NS)
    seen = load_acquire32(&r.bell.seq)
    store_relaxed32(&r.bell.waiters, 1)
    fence_seq_cst()                     # pairs with ring(), and with nudge(): the announcement before the last look
    if not reader_ready(r) and load_relaxed32(stop) != STOP_NUDGED:
        aio_wait(&f.aio, &r.bell.seq, seen, ns)
        if load_relaxed32(&r.bell.seq) != seen and not reader_ready(r):
            r.vain += 1


cdef inline void flights_rest(flights_t *f, reader_t *r, uint64_t grace_until, uint64_t ns,
                              const uint32_t *stop) noexcept nogil:
    """An engine's wait: until there may be something to do, ns nanoseconds at most. f: NULL of one without files.
    grace_until: nothing is looked at before, or 0."""
    cdef int64_t left = <int64_t>(grace_until - now_ns()) if grace_until != 0 else 0
    if grace_until != 0:
        if left > 0:
            sleep_ns(min(ns, <uint64_t>left))
    elif f != NULL and f.aio.nflying != 0:
        flights_wait(f, r, ns, stop)
    else:
        reader_wait(r, ns, stop)
