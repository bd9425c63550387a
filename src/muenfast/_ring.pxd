"""The SHMStream v2 core for other compiled modules: free functions on plain structs.

Everything here is `noexcept nogil`. A writer_t or reader_t belongs to one thread at a time.
"""
from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

from muenfast._thread cimport pthread_mutex_t
from muenfast._wire cimport bell_page, ring_header, spin_habit


cpdef enum ring_status:
    INACTIVE = 0
    INCOMPATIBLE_INTERFACE = 1
    EPOCH_CHANGED = 2
    NO_DATA = 3
    OVERRUN_DETECTED = 4
    SUCCESS = 5


cdef enum:
    OFFENCES = 6            # fields of an element that a peer can get wrong, at most


cdef struct writer_t:
    ring_header *hdr
    uint8_t *slots
    uint64_t protocol
    uint64_t size           # bytes of an element
    uint64_t elements
    uint64_t rest           # bytes behind the last element, zero
    uint64_t reserved       # what stands there in the header
    uint64_t epoch          # 0 while inactive
    uint64_t wc             # private: the shared copy is only ever stored
    uint64_t wsc            # private, never lowered within an epoch
    uint64_t index          # wc mod elements
    bell_page *bell         # NULL: nobody can be woken
    const uint32_t *broken  # 1: the mapping was taken away (private zero pages stand there)
    uint64_t batches
    uint64_t wakes
    uint64_t epochs


cdef struct watch_t:
    pthread_mutex_t lock
    reader_t *first         # readers that sleep under watch
    uint32_t wanted         # futex: the list is no longer empty
    uint32_t stop


cdef struct reader_t:
    const ring_header *hdr
    const uint8_t *slots
    uint64_t capacity       # bytes mapped behind the header
    uint64_t want_protocol  # 0: any
    uint64_t want_size      # 0: any
    uint64_t sums_size      # of elements with checksums that are taken, too; 0: none are
    uint64_t protocol       # of the synchronised epoch, checked copies
    uint64_t size
    uint64_t elements
    uint64_t epoch          # 0: not synchronised
    uint64_t refused        # epoch that was found incompatible, 0: none
    uint64_t offences[OFFENCES]     # against the rules of what elements mean, by field (whose names are the engine's)
    uint64_t lately         # of them in this epoch, since `blamed_ns`, which is a second ago at most
    uint64_t blamed_ns
    uint64_t patience       # how many of them the writer may commit in a second, 0: any number
    uint64_t shut           # epoch that went beyond, and is as if it had ended, 0: none
    uint64_t quarantines    # times that happened
    uint64_t rc
    uint64_t wc             # last seen, <= the shared one
    uint64_t index          # rc mod elements
    uint64_t lost           # by the last overrun
    bell_page *bell
    bint mute               # another reader tells the writer how far it is
    const uint32_t *broken
    uint64_t poll_ns        # 0: adaptive, else the pause between polls
    uint64_t idle_since_ns  # start of the current empty spell, 0: none
    bint may_spin           # more than one CPU to run on
    uint64_t spin_ns        # how long before it sleeps
    bint yields             # gives its CPU away between any two looks, not after SPIN_ALONE_NS only
    spin_habit spins
    uint64_t batches
    uint64_t delivered
    uint64_t overruns
    uint64_t lost_total
    uint64_t epochs
    uint64_t sleeps
    uint64_t settle_ns      # how long a counter that seems to have gone back is waited for
    uint64_t unsettled      # times that happened within an epoch
    uint64_t given_up_ns    # the end of the last wait that was in vain
    uint64_t vain_ns        # since when wake-ups in vain are counted
    uint64_t vain           # how many there were since then
    uint64_t vain_from      # `batches` at that time
    watch_t *watch          # polls for this reader while it is idle; NULL: it polls itself
    reader_t *watch_next    # under watch.lock, from here on
    reader_t **watch_link
    const uint32_t *watch_stop  # ends a wait that somebody else, or readers_wait, wakes from
    uint32_t *watch_futex   # what the reader sleeps on
    uint32_t nap            # that is this one where there is no bell


cdef struct waitset_t:
    reader_t **readers      # of one thread, at most FUTEX_LIST_MOST, each with a watch_stop
    uint64_t n
    uint64_t idle_since_ns  # start of the current empty spell of all, 0: none
    spin_habit spins
    bint polls              # the system has no futex_waitv
    uint64_t sleeps


cdef void writer_init(writer_t *w, uint8_t *base, uint64_t length, uint64_t size, uint64_t protocol) noexcept nogil
cdef void writer_start(writer_t *w, uint64_t epoch) noexcept nogil
cdef void writer_stop(writer_t *w) noexcept nogil
cdef void writer_reserve(writer_t *w, uint64_t n) noexcept nogil
cdef uint8_t *writer_slot(const writer_t *w, uint64_t k) noexcept nogil
cdef void writer_publish(writer_t *w, uint64_t n) noexcept nogil
cdef void writer_copy(writer_t *w, const uint8_t *data, uint64_t n) noexcept nogil
cdef uint64_t random_epoch() noexcept nogil

cdef void reader_init(reader_t *r, const uint8_t *base, uint64_t length, uint64_t size, uint64_t protocol) noexcept nogil
cdef ring_status reader_peek(reader_t *r, uint64_t *available) noexcept nogil
cdef const uint8_t *reader_slot(const reader_t *r, uint64_t k) noexcept nogil
cdef bint reader_intact(reader_t *r) noexcept nogil
cdef ring_status reader_recover(reader_t *r) noexcept nogil
cdef uint64_t reader_settled(reader_t *r, const uint64_t *counter) noexcept nogil
cdef void reader_advance(reader_t *r, uint64_t n) noexcept nogil
cdef ring_status reader_copy(reader_t *r, uint8_t *dst, uint64_t most, uint64_t *n) noexcept nogil
cdef void reader_blame(reader_t *r, uint32_t field, uint64_t n) noexcept nogil
cdef void reader_forgive(reader_t *r) noexcept nogil
cdef void reader_goto(reader_t *r, uint64_t wc) noexcept nogil
cdef void reader_drain(reader_t *r) noexcept nogil
cdef bint reader_ready(const reader_t *r) noexcept nogil
cdef bint reader_deaf(reader_t *r, uint64_t now) noexcept nogil
cdef bint reader_wait(reader_t *r, uint64_t ns, const uint32_t *stop) noexcept nogil
cdef bint readers_wait(waitset_t *set, uint64_t ns) noexcept nogil
cdef void bell_kick(bell_page *bell) noexcept nogil


cdef void watch_run(watch_t *watch) noexcept nogil


cdef class Watch:
    """Polls for all readers that are idle, so that each of them need not."""
    cdef watch_t w
    cdef uint32_t busy


cdef class Conduct:
    """How a channel's writer keeps to the rules of what its elements mean, as its reader has it."""
    cdef object owner       # of the reader
    cdef reader_t *r
    cdef tuple fields


cdef Conduct conduct_of(object owner, reader_t *r, tuple fields)


cdef class Mapping:
    """A buffer held for the life of a ring object, guarded against truncation."""
    cdef Py_buffer buffer
    cdef uint8_t *base
    cdef uint64_t length
    cdef uint32_t *broken
    cdef bint held
    cdef bint forked        # the parent process holds it: we are a fork()ed child
    cdef object __weakref__

    cdef int hold(self, object memory, bint writable, uint64_t least) except -1
    cdef void drop(self) noexcept
    cdef bell_page *as_bell(self) except? NULL


cdef Mapping hold(object memory, bint writable, uint64_t least)
