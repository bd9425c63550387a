"""What the block engines share."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from muenfast._ring cimport Mapping, Watch, reader_t, writer_t
from muenfast._wire cimport (bell_page, compare_exchange_acqrel32, fence_acquire, load_acquire32, load_relaxed32,
                             load_relaxed64, now_ns)


cdef enum:
    BATCH = 64              # most requests of one round: one validation, one publish
    LARGEST_MESSAGE = 32    # bytes of a ring element that `rewritten` looks at
    # A client without a bell may have restarted under its old epoch: its last request is looked at again this often.
    SAME_EPOCH_NS = 20000000
    # One that starts under the same epoch more often than this is left alone for as long.
    AGAIN_NS = 10000000


cdef struct starts_t:
    uint64_t epoch          # of the last start
    uint64_t since          # when it was


cdef inline bint too_soon(starts_t *s, uint64_t epoch) noexcept nogil:
    """Notes a client's start; whether the last one, less than AGAIN_NS ago, had the same epoch.

    Counters that contradict each other look like that at every look, without a client that does anything.
    """
    cdef uint64_t now = now_ns()
    cdef bint soon = s.epoch == epoch and now - s.since < AGAIN_NS
    s.epoch = epoch
    s.since = now
    return soon


cdef inline uint64_t patience(const reader_t *r, bint has_last) noexcept nogil:
    """Most nanoseconds between two looks: a client that does not ring may restart without a sign in its counters.

    has_last: whether there is a request that this would take away.
    """
    if has_last and (r.bell == NULL or load_relaxed64(&r.bell.ringer) != r.epoch):
        return SAME_EPOCH_NS
    return <uint64_t>-1


cdef inline bint rewritten(const reader_t *r, const void *last, size_t n) noexcept nogil:
    """Whether the newest element taken no longer begins with the n bytes at `last`, although the writer may not have
    touched it.

    Then the writer has restarted under the same epoch, and its counters alone, equal to the old ones or above, do not
    tell. A slot that it may overwrite by now (WSC, loaded after it) tells nothing. n: at most LARGEST_MESSAGE.
    """
    cdef uint8_t now[LARGEST_MESSAGE]
    cdef uint64_t at = r.index if r.index != 0 else r.elements
    if r.epoch == 0:
        return False
    memcpy(now, r.slots + (at - 1) * r.size, n)
    fence_acquire()
    if load_relaxed64(&r.hdr.wsc) - (r.rc - 1) > r.elements:
        return False
    return memcmp(now, last, n) != 0


cdef inline bint was_taken(Mapping m) noexcept:
    """Whether the owner of the memory took it away."""
    return m is not None and m.held and load_acquire32(m.broken) != 0


cdef uint32_t checksum_mode(object text) except? 0
cdef str checksum_word(uint32_t mode, bint connected, bint agreed, bint refused)


cdef enum server_event:
    SERVER_TICK = 0
    SERVER_CONNECTED = 1
    SERVER_DISCONNECTED = 2
    SERVER_INCOMPATIBLE = 3
    SERVER_OVERRUN = 4
    SERVER_STOPPED = 5
    SERVER_UNRULY = 6       # of a group: this one made the others wait; after another event or alone


cdef enum:
    STOP_SOON = 1
    STOP_NUDGED = 4         # run() is to return "tick" soon, and goes on: gives way to the two others, and is taken by step()
    STOP_NOW = 2            # what a user-space store does not end soon is left alone, and not answered: that is for its successor


cdef inline bint stopping(const uint32_t *ending) noexcept nogil:
    """Whether stop() was called."""
    cdef uint32_t seen = load_relaxed32(ending)
    return seen != 0 and seen != STOP_NUDGED


cdef inline bint take_nudge(uint32_t *ending) noexcept nogil:
    """Whether nudge() was called since this was asked last."""
    return load_relaxed32(ending) == STOP_NUDGED and compare_exchange_acqrel32(ending, STOP_NUDGED, 0)


cdef enum:                  # what step() returns when nothing happened that the caller logs
    STEP_WORKED = -1
    STEP_IDLE = -2


cdef class ServerEngine:
    """Two channels and their bells, and the life of the engine that serves over them; the subclass serves."""
    cdef reader_t *r        # all four: the subclass's, set by its __cinit__
    cdef writer_t *w
    cdef uint32_t *ending   # stop() was called: STOP_SOON, STOP_NOW
    cdef Mapping request, response, request_bell, response_bell
    cdef Watch watch
    cdef uint32_t busy
    cdef readonly bint connected

    cdef int bind(self, object request, object response, object request_bell, object response_bell, uint64_t request_size,
                  uint64_t response_size, uint64_t request_protocol, uint64_t response_protocol, object poll,
                  Watch watch) except -1
    cdef int introduce(self, bytes identity, uint32_t flags, uint32_t zeroes) except -1
    cdef int step(self) noexcept nogil
    cdef void wait(self, uint64_t ns) noexcept nogil
    cdef void land(self) noexcept nogil
    cdef server_event loop(self, uint64_t ns) noexcept nogil
    cdef object happened(self, int event)
    cdef bint held(self) noexcept
    cdef void succeed(self, ServerEngine other) noexcept
    cdef str taken_away(self)
    cdef void drop(self) noexcept
    cdef void kick(self) noexcept
