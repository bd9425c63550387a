"""What block clients share: requests of several disks in flight over one connection, and the threads that wait."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from muenfast._count cimport FLOWS, flow_t, sampler_t
from muenfast._ring cimport Mapping, Watch, reader_t, ring_status, writer_t
from muenfast._target cimport IO_SYNC, Target, io_t
from muenfast._thread cimport pthread_mutex_t
from muenfast._wire cimport copy_giver


cdef enum:
    WINDOW = 1024           # most requests in flight; also bounded by the rings


cdef enum:
    ENTRY_FREE = 0
    ENTRY_ISSUED = 1        # by the issuer, with the lock
    ENTRY_MATCHED = 2       # by the reaper: an answer was seen, not yet validated


cdef enum client_state:
    CLIENT_CONNECTING = 0   # not connected yet; requests queue
    CLIENT_READY = 1
    CLIENT_LOST = 2         # the server restarted, vanished or overran us; requests queue or fail
    CLIENT_FAILED = 3       # for good: everything fails
    CLIENT_CLOSED = 4


cdef enum:
    PHASE_START = 0         # of connecting: anew; what comes between is the transport's
    PHASE_ANSWERED = 255    # connected: resume() or fail()


cdef struct entry_t:
    uint32_t state
    uint32_t priv           # the tag
    uint32_t kind           # as on the wire
    uint32_t index          # first block within io
    uint32_t nblocks        # 1 for a sync
    uint32_t device
    uint64_t id             # block of the device, or the command
    uint64_t place          # byte in the shared buffer
    io_t *io                # NULL: the caller has given up on it
    uint64_t since          # when it was issued, where that is measured, else 0
    uint32_t flow           # its direction


cdef struct disk_counters:
    uint64_t reads          # blocks
    uint64_t writes         # blocks
    uint64_t discards       # blocks
    uint64_t syncs
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t errors
    uint64_t reissued


cdef struct queue_t:        # of one disk; `ctx` of its Target
    client_t *client
    io_t *first             # not fully issued, oldest first
    io_t *last
    uint64_t flying         # requests written and not answered ...
    uint64_t held           # ... and bytes of the shared buffer that are theirs
    uint64_t most           # blocks of one request; 0: not known yet
    uint32_t block_size
    uint32_t device
    bint clears             # what was discarded was to read as zeros, and no longer does: zeros are written instead
    disk_counters n
    flow_t flows[FLOWS]


cdef struct client_counters:    # of the connection
    uint64_t stale          # answers that match no request in flight
    uint64_t lives          # connections made
    uint64_t batches


# What differs between transports. Each is called without the GIL.
ctypedef void (*issue_fn)(client_t *c) noexcept nogil           # lock held, state READY
ctypedef ring_status (*reap_fn)(client_t *c) noexcept nogil     # reaping is ours
ctypedef bint (*connect_fn)(client_t *c, uint64_t ns) noexcept nogil    # likewise; state CONNECTING or LOST
ctypedef void (*renew_fn)(client_t *c) noexcept nogil           # lock held; nothing is in flight any more
ctypedef void (*free_fn)(client_t *c, entry_t **matched, uint64_t n) noexcept nogil     # reaping is ours; they are answered


cdef struct client_t:
    writer_t w
    reader_t r
    issue_fn issue
    reap_fn reap
    connect_fn connect
    renew_fn renew
    free_fn free
    void *transport         # the transport's own
    # Issuers: everything up to the next group belongs to whoever holds `lock`.
    pthread_mutex_t lock
    uint64_t head           # requests issued in this epoch; entry = number mod window
    queue_t *queues
    uint32_t nqueues
    uint32_t turn_of        # whose requests are issued next
    uint32_t base           # priv of request 0 of this epoch
    uint32_t window
    uint32_t allowed        # most requests in flight that the server names
    uint32_t depth          # most requests of one disk in flight, 1..WINDOW
    uint64_t flying         # requests written and not answered, of all
    copy_giver giver        # of written blocks
    sampler_t sampler       # of what is issued ...
    uint64_t slept          # ... and how often the reaper had slept by the last answer
    uint32_t settled        # the automatic depth, which `depth` is unless it is being probed; 0: depth is fixed
    uint64_t pace           # answers per second at the settled depth, smoothed
    uint64_t measured       # answers of the current window while requests waited for room ...
    uint64_t measured_ns    # ... and how long that took
    uint64_t waiting_from   # answers when the wait began, or the window
    uint64_t waiting_since  # the time then; 0: no request waits
    uint32_t windows
    bint larger             # what the last probe tried
    uint32_t state
    uint64_t server         # response epoch of the server that was resumed with
    bint fail_fast          # while lost, new requests fail
    uint32_t checksums      # CHECKSUM_*
    bint sums               # that server and we have agreed upon them
    uint64_t strays         # answers of which nobody knows to which requests they were
    # The reaper: belongs to whoever set `reaping`.
    uint32_t reaping
    uint32_t takers         # threads that must have it next: resume, fail, forget, rebind, close
    uint64_t tail           # all requests below are answered; read by issuers
    uint32_t phase
    uint64_t phase_since
    uint64_t nonce          # of the offer in this epoch ...
    bint agreed             # ... and whether it was taken,
    bint demanded           # or the server serves nobody without one
    uint64_t sectors        # of the only disk, as answered ...
    uint8_t store[16]       # ... and what the same server's bell said: its store, zero = none,
    uint32_t flags          # ... STORE_READ_ONLY for each device
    uint32_t zeroes         # and, likewise, whether what was discarded reads as zeros
    uint64_t answers        # progress, for the stuck detector
    uint64_t spin_ns        # of `r` while nothing is in flight
    # Threads that wait for an answer.
    uint32_t turn           # futex: somebody finished or stopped reaping
    uint32_t sleepers
    uint32_t callers        # threads inside a blocking call
    uint32_t wanted         # 1: a caller would rather reap itself
    uint32_t background     # 1: the background thread reaps always (a front end submits) ...
    uint32_t attended       # ... but while this is 1: a thread of the front end does
    uint32_t relieve        # 1: one would
    uint32_t chore          # futex: the background thread is wanted
    uint32_t stop
    client_counters n
    entry_t entries[WINDOW]


cdef inline uint32_t units_of(const io_t *io) noexcept nogil:
    """What `issued` and `pending` of a request count up to."""
    return io.nblocks if io.kind != IO_SYNC else 1


cdef uint64_t client_room(const client_t *c) noexcept nogil
cdef void client_counts(queue_t *q, entry_t *e, uint32_t flow, uint64_t since) noexcept nogil
cdef void client_stale(client_t *c, uint64_t n) noexcept nogil
cdef void client_stray(client_t *c, uint64_t wrong, uint64_t others) noexcept nogil
cdef void client_settle(client_t *c, entry_t **matched, const int32_t *errors, uint64_t n) noexcept nogil
cdef void client_introduced(client_t *c) noexcept nogil
cdef void client_submit(void *ctx, io_t *io) noexcept nogil


cdef class Disk(Target):
    """One disk of a client."""
    cdef queue_t *queue
    cdef ClientEngine client
    cdef readonly uint32_t device

    cdef client_t *engine(self) except NULL
    cdef client_t *usable(self) except NULL
    cdef int execute(self, io_t *ios, uint64_t n) except -1
    cdef uint64_t place(self, object offset, uint64_t length) except? 1
    cdef int whole(self, uint32_t kind, uint64_t at, uint8_t *buf, uint64_t length) except -1


cdef class ClientEngine:
    """The life of a block client's engine; the subclass speaks the transport."""
    cdef client_t *c
    cdef Mapping request, response, request_bell, response_bell
    cdef Mapping more       # what the transport needs besides the channels, or None
    cdef Watch watch
    cdef tuple sizes        # bytes of an element of the request and of the response channel ...
    cdef tuple protocols    # ... and their protocols
    cdef uint32_t busy
    cdef bint resizing      # resume() takes other numbers of blocks than before
    cdef readonly tuple disks

    cdef int prepare(self, tuple memory, object poll, bint fail_fast, Watch watch) except -1
    cdef int bind(self, tuple memory, uint64_t poll_ns) except -1
    cdef bint held(self) noexcept
    cdef int make_disks(self, uint64_t n) except -1
    cdef void more_taken(self) noexcept
    cdef bint admit(self) except -1
    cdef int rebound(self, tuple memory, Mapping more) except -1
