"""What an engine counts of each disk and direction, and how long requests took: nothing in here is shared memory.

A flow_t has one writing thread at a time (of a client's, `depth` and `deepest` belong to who holds the lock,
errors[ERROR_LOST] to everybody); others read whole words meanwhile. docs/operations.md says what each number means.
"""
from libc.errno cimport EINVAL, EIO, ENOSPC, EOPNOTSUPP, EROFS, ETIMEDOUT
from libc.stdint cimport int32_t, uint32_t, uint64_t

from muenfast._wire cimport count64, fetch_add_relaxed64, load_relaxed64, now_ns, store_relaxed64

cdef extern from *:
    """
    static inline uint32_t highest_bit(uint64_t word) { return 63 - (uint32_t)__builtin_clzll(word | 1); }
    """
    uint32_t highest_bit(uint64_t word) noexcept nogil


cdef enum:                  # directions
    FLOW_READ = 0
    FLOW_WRITE = 1
    FLOW_DISCARD = 2
    FLOW_FLUSH = 3
    FLOWS = 4               # also: of a request that is none of these


cdef enum:                  # kinds of errors
    ERROR_EIO = 0
    ERROR_EINVAL = 1        # breaks a rule: beyond the end, no whole blocks, ...
    ERROR_EROFS = 2
    ERROR_ENOSPC = 3
    ERROR_EOPNOTSUPP = 4
    ERROR_ETIMEDOUT = 5
    ERROR_TORN = 6          # a server's: payload that its client overwrote
    ERROR_LOST = 7          # a client's: given up without an answer
    ERROR_OTHER = 8
    ERRORS = 9


cdef enum:
    LATENCIES = 32          # classes: the first below LATENCY_LEAST ns, each reaches twice as far, the last without end
    LATENCY_BITS = 8
    LATENCY_LEAST = 256     # 1 << LATENCY_BITS
    # Where requests follow each other faster than this, one batch of SAMPLED is measured: a look at the clock costs 25 to
    # 60 ns, and a batch takes two, or one for each four requests.
    DENSE_NS = 10000
    SAMPLED = 16


cdef struct flow_t:         # one direction of one disk
    uint64_t requests       # answered, also with an error
    uint64_t bytes          # of those without one
    uint64_t merged         # a server's: requests that joined their neighbour's operation
    uint64_t depth          # requests under way: of a client from issue to answer, of a server in the store
    uint64_t deepest        # the most there were
    uint64_t refused        # a server's: of the requests, those that the store never saw
    uint64_t measured       # the sum of `latency`
    uint64_t errors[ERRORS]
    uint64_t latency[LATENCIES]


cdef struct sampler_t:      # which batches are measured
    uint64_t since          # when the last one was
    uint64_t sleeps         # what the thread's sleeps were then
    uint64_t requests       # those of batches that began since
    uint32_t passed         # batches since
    uint32_t every          # one in so many is


cdef inline uint64_t sampler_begin(sampler_t *s, uint64_t sleeps) noexcept nogil:
    """The time where the batch that begins is measured, else 0; its requests are to be added to s.requests. sleeps: how
    often its thread has slept: after a sleep the clock costs nothing that matters. Nothing of the batch itself decides: none
    is measured because it is slow."""
    cdef uint64_t now
    s.passed += 1
    if s.passed < s.every and sleeps == s.sleeps:
        return 0
    now = now_ns()
    s.every = SAMPLED if now - s.since < s.requests * DENSE_NS else 1
    s.passed = 0
    s.requests = 0
    s.since = now
    s.sleeps = sleeps
    return now


cdef inline uint32_t error_class(int32_t error) noexcept nogil:
    """Of a negative errno."""
    if error == -EIO:
        return ERROR_EIO
    if error == -EINVAL:
        return ERROR_EINVAL
    if error == -EROFS:
        return ERROR_EROFS
    if error == -ENOSPC:
        return ERROR_ENOSPC
    if error == -EOPNOTSUPP:
        return ERROR_EOPNOTSUPP
    return ERROR_ETIMEDOUT if error == -ETIMEDOUT else ERROR_OTHER


cdef inline void flow_deep(flow_t *f) noexcept nogil:
    if f.depth > f.deepest:
        store_relaxed64(&f.deepest, f.depth)


cdef inline void flow_begun(flow_t *f, uint64_t n) noexcept nogil:
    """n requests are under way, until flow_ended()."""
    count64(&f.depth, n)
    flow_deep(f)


cdef inline void flow_ended(flow_t *f, uint64_t n) noexcept nogil:
    count64(&f.depth, 0 - n)


cdef inline void flow_done(flow_t *f, uint64_t n, uint64_t bytes) noexcept nogil:
    """n requests were one operation, which moved so many bytes."""
    count64(&f.requests, n)
    count64(&f.bytes, bytes)
    count64(&f.merged, n - 1)
    if n > f.deepest:
        store_relaxed64(&f.deepest, n)


cdef inline void flow_failed(flow_t *f, uint64_t n, int32_t error) noexcept nogil:
    """n of the requests have that error, a negative errno."""
    count64(&f.errors[error_class(error)], n)


cdef inline void flow_refused(flow_t *f, int32_t error) noexcept nogil:
    """One request was answered with that error, without a look at the store."""
    count64(&f.requests, 1)
    count64(&f.refused, 1)
    flow_failed(f, 1, error)


cdef inline void flow_took(flow_t *f, uint64_t ns, uint64_t n) noexcept nogil:
    """n requests, counted already, were measured; each stands for up to SAMPLED of those that were not."""
    cdef uint64_t weight = min(f.requests - f.measured, n * SAMPLED)
    f.measured += weight
    count64(&f.latency[min(highest_bit(ns >> (LATENCY_BITS - 1)), <uint32_t>LATENCIES - 1)], weight)


cdef inline dict flow_words(const flow_t *f, const sampler_t *s, bint server):
    """A direction as `muenfast stat --json` shows it. s: NULL where every request is measured."""
    cdef int k
    found = {"requests": load_relaxed64(&f.requests), "bytes": load_relaxed64(&f.bytes)}
    if server:
        found["merged"] = load_relaxed64(&f.merged)
    found["errors"] = {
        "EIO": load_relaxed64(&f.errors[ERROR_EIO]), "EINVAL": load_relaxed64(&f.errors[ERROR_EINVAL]),
        "EROFS": load_relaxed64(&f.errors[ERROR_EROFS]), "ENOSPC": load_relaxed64(&f.errors[ERROR_ENOSPC]),
        "EOPNOTSUPP": load_relaxed64(&f.errors[ERROR_EOPNOTSUPP]),
        "ETIMEDOUT": load_relaxed64(&f.errors[ERROR_ETIMEDOUT]), "torn": load_relaxed64(&f.errors[ERROR_TORN]),
        "lost": load_relaxed64(&f.errors[ERROR_LOST]), "other": load_relaxed64(&f.errors[ERROR_OTHER])}
    found["depth"] = load_relaxed64(&f.depth)
    found["deepest"] = load_relaxed64(&f.deepest)
    found["latency"] = {"least_ns": LATENCY_LEAST, "sampled": SAMPLED if s != NULL and s.every == SAMPLED else 1,
                        "counts": [load_relaxed64(&f.latency[k]) for k in range(LATENCIES)]}
    return found


cdef inline dict flows_words(const flow_t *flows, const sampler_t *s, bint server):
    """The directions of one disk."""
    return {"read": flow_words(&flows[FLOW_READ], s, server), "write": flow_words(&flows[FLOW_WRITE], s, server),
            "discard": flow_words(&flows[FLOW_DISCARD], s, server), "flush": flow_words(&flows[FLOW_FLUSH], s, server)}
