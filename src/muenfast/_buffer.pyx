"""The block server's engine for the shared-buffer transport: requests of one client, executed on several Stores.

Runs without the GIL and allocates nothing per request. Trust: of every request the 32 bytes are copied once, validated,
and only the copy is used. The buffer's contents may change at any time: that spoils the client's own data, and nothing
else, for no decision rests on them. With checksums data goes through memory of our own, which is verified.
"""
from libc.errno cimport ECOMM, EINVAL, EIO, EPROTONOSUPPORT, EROFS, ETIMEDOUT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._aio cimport *
from muenfast._blocksum cimport *
from muenfast._count cimport *
from muenfast._engine cimport *
from muenfast._ring cimport *
from muenfast._store cimport *
from muenfast._wire cimport *


from muenfast.errors import UsageError

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

# Bytes moved to or from memory before the answers so far are published: little, so that the client goes on while the
# next ones are copied (docs/decisions/003).
cdef uint64_t MEMORY_BYTES = 16384
# Longest of the waits for what is under way, one after the other.
cdef uint64_t LAND_NS = 100_000_000
# The status of a request that cannot be executed at all (docs/protocol.md); other errors are positive Linux errnos.
cdef uint64_t REFUSED = 1
cdef uint64_t MOST_DEVICES = 1 << 16    # numbers of devices are u16


# Of request_fault(), and FIELDS of BufferServer.
cdef enum:
    FAULT_KIND = 0
    FAULT_DEVICE = 1
    FAULT_LENGTH = 2
    FAULT_DEVICE_OFFSET = 3
    FAULT_BUFFER_OFFSET = 4
    FAULT_CHECKSUM = 5


cdef struct device_t:
    const store_t *store
    uint64_t block_size     # a power of two
    uint64_t size           # bytes
    uint64_t most           # bytes of one request
    bint flies              # operations on the store are under way for a time ...
    uint32_t file           # ... and this is its number in flights.aio


cdef struct buffer_counters:    # of what belongs to no direction of a device
    uint64_t queries        # everything that moves nothing: None, Get_SMART, geometry
    uint64_t resets
    uint64_t batches
    uint64_t rejected       # requests that broke a rule, answered with an error
    uint64_t failed         # requests the store answered with an error
    uint64_t voided         # requests of an earlier life, not answered
    uint64_t cancelled      # requests of a life that ended before their turn came, not answered
    uint64_t connections


cdef struct seal_t:         # of a request, whose length is the lower half of what stood there
    uint32_t sum            # the upper half
    uint64_t number         # in its epoch


cdef struct buffer_server_t:
    reader_t r
    writer_t w
    uint8_t *buffer
    uint64_t length
    const uint32_t *broken  # 1: the buffer was taken away and zeros stand there
    device_t *devices
    flow_t *flows           # FLOWS of each device
    uint64_t ndevices
    uint32_t stop
    bint connected          # a request epoch is synchronised with
    bint knows_epoch        # this life has seen a request epoch end or begin: none can be a predecessor's
    uint64_t void_below     # requests of this epoch with a number below are void
    uint64_t refused        # incompatible epoch that was reported
    starts_t starts
    uint64_t grace_until    # nothing is looked at before, or 0
    block_request last      # the newest request taken from the ring, as it was ...
    bint has_last           # ... in this epoch, if there was one
    buffer_counters n
    sampler_t sampler       # of a server without a file; with one every request is measured
    block_request heads[BATCH]
    block_response answers[BATCH]
    uint8_t smart[512]      # SMART_SIZE
    requests_t *files       # of a server with a store that has operations under way, else NULL
    copy_giver giver        # of blocks that are read
    uint32_t checksums      # CHECKSUM_*
    bint sums               # this epoch's requests and answers have checksums ...
    bint unsummed           # ... or have none, and are refused for that
    uint64_t nonce          # of the offer
    seal_t seals[BATCH]     # of `heads`
    uint32_t covers[BATCH]  # of `answers`: states of their checksums behind the data that they are about
    uint8_t *mirror         # with checksums: `length` bytes, through which goes what has one, at its place in the buffer


cdef struct requests_t:
    flights_t flights
    block_request heads[AIO_MOST]
    uint64_t since[AIO_MOST]    # when each was taken


cdef bint moves(const block_request *h) noexcept nogil:
    """Whether it is a read, a write or a discard."""
    return h.kind == REQUEST_READ or h.kind == REQUEST_WRITE or h.kind == REQUEST_DISCARD


cdef bint repeatable(const block_request *h) noexcept nogil:
    """Whether a request may be answered although a predecessor may have answered it: it changes nothing."""
    return (h.kind == REQUEST_MEDIA_BLOCKS or h.kind == REQUEST_BLOCK_LENGTH or h.kind == REQUEST_MAX_REQUESTS
            or h.kind == REQUEST_MAX_BLOCKS or h.kind == REQUEST_MAX_DEVICES or h.kind == REQUEST_RESET)


cdef uint64_t check_request(const buffer_server_t *s, const block_request *h) noexcept nogil:
    """0, or the status that answers a read, write or discard which breaks a rule. h is a private copy.

    No sum is made of two values of the client's: each is held against what the others leave.
    """
    cdef const device_t *d
    if h.device >= s.ndevices:
        return REFUSED
    d = &s.devices[h.device]
    if h.length == 0 or h.length > d.most or (h.length | h.device_offset) & (d.block_size - 1) != 0:
        return EINVAL
    if h.device_offset > d.size or h.length > d.size - h.device_offset:
        return EINVAL
    if h.kind != REQUEST_DISCARD:
        if h.buffer_offset & (d.block_size - 1) != 0:
            return EINVAL
        if h.buffer_offset > s.length or h.length > s.length - h.buffer_offset:
            return EINVAL
    if h.kind != REQUEST_READ and d.store.read_only:
        return EROFS
    return 0


cdef uint32_t request_fault(const buffer_server_t *s, const block_request *h) noexcept nogil:
    """The field that is wrong in a read, write or discard that check_request() refuses. h is a private copy."""
    cdef const device_t *d
    if h.device >= s.ndevices:
        return FAULT_DEVICE
    d = &s.devices[h.device]
    if h.length == 0 or h.length > d.most or h.length & (d.block_size - 1) != 0:
        return FAULT_LENGTH
    if h.device_offset & (d.block_size - 1) != 0 or h.device_offset > d.size or h.length > d.size - h.device_offset:
        return FAULT_DEVICE_OFFSET
    return FAULT_BUFFER_OFFSET


cdef void buffer_taken(buffer_server_t *s, uint64_t n) noexcept nogil:
    """Takes the checksums out of `heads`, n copies of what stands in the ring; with number 0 agrees upon them, or upon none.
    """
    cdef uint64_t k
    cdef int found
    for k in range(n):
        s.seals[k].number = s.r.rc + k
        s.seals[k].sum = 0
        if s.r.rc + k == 0:
            found = request_look(&s.heads[0], s.r.epoch)
            s.sums = found == OFFER_GOOD
            s.unsummed = s.checksums == CHECKSUM_REQUIRE and not s.sums
            s.nonce = s.heads[0].device_offset
            s.seals[0].sum = found == OFFER_GARBLED
        elif s.sums:
            s.seals[k].sum = <uint32_t>(s.heads[k].length >> 32)
            s.heads[k].length = <uint32_t>s.heads[k].length


cdef inline bint buffer_within(const buffer_server_t *s, const block_request *h) noexcept nogil:
    """Whether the payload of a request lies in the buffer."""
    return h.buffer_offset <= s.length and h.length <= s.length - h.buffer_offset


cdef bint buffer_right(const buffer_server_t *s, const block_request *h, const seal_t *seal) noexcept nogil:
    """Whether the checksum of a request is right, h a copy of it. A write's payload is in the mirror then. Precondition:
    nothing that is under way has that place there."""
    cdef uint32_t state = CRC32C_FIRST
    if h.kind == REQUEST_WRITE:
        if not buffer_within(s, h):
            return False
        copy_taken(s.mirror + h.buffer_offset, s.buffer + h.buffer_offset, h.length)
        state = crc32c(state, s.mirror + h.buffer_offset, h.length)
    return request_sum(state, h, seal.number, s.r.epoch) == seal.sum


cdef uint64_t buffer_judge(buffer_server_t *s, const block_request *h, const seal_t *seal) noexcept nogil:
    """0, or the status that answers a request as its checksum demands, which is counted: ECOMM: to be sent again.
    Precondition: as buffer_right(); checksums are not off."""
    if seal.number == 0:
        if seal.sum != 0:               # a sign of an offer, but none
            buffer_blamed(s, FAULT_CHECKSUM)
            return ECOMM
    elif s.sums and not buffer_right(s, h, seal):
        buffer_blamed(s, FAULT_CHECKSUM)
        return ECOMM
    if s.unsummed:
        count64(&s.n.rejected, 1)
        return (EPROTONOSUPPORT if moves(h) or h.kind == REQUEST_SYNC or h.kind == REQUEST_RESET or h.kind == REQUEST_NONE
                else 0)
    return 0


cdef inline bint buffer_over(const buffer_server_t *s, const block_request *h, uint64_t number) noexcept nogil:
    """Whether a request is of a predecessor's life and gets no answer. What that had agreed upon nobody knows: with checksums
    only the first one, which says it anew, gets one."""
    return <int64_t>(s.void_below - number) > 0 and (not repeatable(h) or s.sums and number != 0)


cdef inline bint buffer_refuses(const buffer_server_t *s, uint64_t status) noexcept nogil:
    """Whether what buffer_judge() says is the answer."""
    return status != 0 or s.unsummed


cdef inline uint8_t *buffer_data(const buffer_server_t *s, const block_request *h) noexcept nogil:
    """Where a store reads or writes the payload of a request, which was checked."""
    return (s.mirror if s.sums else s.buffer) + h.buffer_offset


cdef void buffer_give(buffer_server_t *s, const block_request *h, uint32_t *cover) noexcept nogil:
    """Puts what was read from the mirror into the buffer. cover: the state of a checksum behind it."""
    cover[0] = crc32c(CRC32C_FIRST, s.mirror + h.buffer_offset, h.length)
    copy_given(&s.giver, s.buffer + h.buffer_offset, s.mirror + h.buffer_offset, h.length)


cdef int buffer_summed(buffer_server_t *s, const block_request *h, uint32_t *cover) noexcept nogil:
    """As buffer_move(), of one read or write whose checksum was right, through the mirror. cover: as buffer_give()."""
    cdef const store_t *store = s.devices[h.device].store
    cdef uint8_t *data = s.mirror + h.buffer_offset
    if load_acquire32(s.broken) != 0:
        return -EIO
    if h.kind == REQUEST_WRITE:
        if store.kind == STORE_MEMORY:
            copy_payload(store.memory + h.device_offset, data, h.length)
    else:
        if store.kind == STORE_MEMORY:
            copy_payload(data, store.memory + h.device_offset, h.length)
        else:
            memset(data, 0, h.length)
        buffer_give(s, h, cover)
    return -EIO if load_acquire32(s.broken) != 0 or store_broken(store) else 0


cdef int buffer_move(buffer_server_t *s, const block_request *h, uint64_t length) noexcept nogil:
    """Executes a read, write or discard of `length` bytes that begins as *h, which was checked; 0 or a negative errno.

    Payload is moved once, between store and buffer. Precondition: the store is no file.
    """
    cdef const store_t *store = s.devices[h.device].store
    cdef uint8_t *data
    cdef int status = 0
    if h.kind == REQUEST_DISCARD:
        return store_discard(store, h.device_offset, length)
    if load_acquire32(s.broken) != 0:
        return -EIO
    data = s.buffer + h.buffer_offset   # checked for all but discards, which need none
    if store.kind == STORE_MEMORY:
        if h.kind == REQUEST_WRITE:
            copy_taken(store.memory + h.device_offset, data, length)
        else:
            copy_given(&s.giver, data, store.memory + h.device_offset, length)
        if store_broken(store):
            status = -EIO
    elif h.kind == REQUEST_READ:
        memset(data, 0, length)
    return -EIO if load_acquire32(s.broken) != 0 else status


cdef uint64_t buffer_joined(const buffer_server_t *s, const block_request *h, uint64_t n,
                            uint64_t *length) noexcept nogil:
    """How many of n requests, of which h[0] was checked, continue one device range and one buffer range; their bytes.

    What is copied from or to memory is answered every MEMORY_BYTES: an operation more costs nothing there.
    """
    cdef const block_request *next
    cdef const device_t *d = &s.devices[h.device]
    cdef uint64_t run = 1
    cdef bint copied = h.kind != REQUEST_DISCARD and d.store.kind == STORE_MEMORY and not d.flies
    cdef uint64_t most = MEMORY_BYTES if copied else <uint64_t>-1
    cdef uint64_t together = d.store.most if h.kind != REQUEST_DISCARD else <uint64_t>-1
    length[0] = h.length
    if s.sums and not d.flies:          # each by itself, for each has its own checksum
        return 1
    while run < n and length[0] < most:
        next = &h[run]
        if next.kind != h.kind or next.device != h.device or next.device_offset != h.device_offset + length[0]:
            break
        if h.kind != REQUEST_DISCARD and next.buffer_offset != h.buffer_offset + length[0]:
            break
        if check_request(s, next) != 0 or next.length > together - length[0]:
            break
        length[0] += next.length
        run += 1
    return run


cdef flow_t *checked_flow(const buffer_server_t *s, uint32_t kind, uint64_t device) noexcept nogil:
    """What counts such a request. Precondition: it is a read, write, discard or sync, and there is that device."""
    cdef uint32_t flow = (FLOW_READ if kind == REQUEST_READ else FLOW_WRITE if kind == REQUEST_WRITE else
                          FLOW_DISCARD if kind == REQUEST_DISCARD else FLOW_FLUSH)
    return &s.flows[device * FLOWS + flow]


cdef flow_t *buffer_flow(const buffer_server_t *s, uint32_t kind, uint64_t device) noexcept nogil:
    """What counts such a request; NULL of one that has no direction, or no device."""
    if device >= s.ndevices or (kind != REQUEST_READ and kind != REQUEST_WRITE and kind != REQUEST_DISCARD
                                and kind != REQUEST_SYNC):
        return NULL
    return checked_flow(s, kind, device)


cdef void buffer_failed(buffer_server_t *s, flow_t *flow, uint64_t n, int error) noexcept nogil:
    """The store answered n requests with that error."""
    count64(&s.n.failed, n)
    flow_failed(flow, n, error)


cdef void buffer_refused(buffer_server_t *s, const block_request *h, int error) noexcept nogil:
    """A request broke a rule. error: a negative errno, what stands for it on the wire."""
    cdef flow_t *flow = buffer_flow(s, h.kind, h.device)
    count64(&s.n.rejected, 1)
    if error != -EROFS:     # a disk that is read-only may not have been known to be
        reader_blame(&s.r, request_fault(s, h), 1)
    if flow != NULL:
        flow_refused(flow, error)


cdef inline void buffer_blamed(buffer_server_t *s, uint32_t field) noexcept nogil:
    """A request of no direction broke a rule."""
    count64(&s.n.rejected, 1)
    reader_blame(&s.r, field, 1)


cdef void buffer_measured(buffer_server_t *s, uint64_t n, uint64_t since) noexcept nogil:
    """Requests that were taken then have the first n answers."""
    cdef uint64_t k, ns = now_ns() - since
    cdef flow_t *flow
    for k in range(n):
        flow = buffer_flow(s, s.answers[k].kind, s.answers[k].device)
        if flow != NULL:
            flow_took(flow, ns, 1)


cdef uint64_t buffer_run(buffer_server_t *s, const block_request *h, uint64_t n, uint64_t *status,
                         uint32_t *cover) noexcept nogil:
    """Executes as one operation request h[0], which was checked, and those after it, n with it at most, that continue it;
    how many. status: one per request. cover: as buffer_give(), where there are checksums: then h[0] is done alone.

    What fails together is tried one by one: only the request that cannot be done gets the error.
    """
    cdef uint64_t length, k, run = buffer_joined(s, h, n, &length)
    cdef int together, error
    cdef flow_t *flow = buffer_flow(s, h.kind, h.device)
    if s.sums and h.kind != REQUEST_DISCARD:
        cover[0] = CRC32C_FIRST
        error = buffer_summed(s, h, cover)
        status[0] = <uint64_t>-error
        if error != 0:
            buffer_failed(s, flow, 1, error)
        flow_done(flow, 1, h.length if error == 0 else 0)
        return 1
    together = buffer_move(s, h, length)
    for k in range(run):
        error = together
        if together != 0 and run > 1:
            error = buffer_move(s, &h[k], h[k].length)
        status[k] = <uint64_t>-error
        if error != 0:
            buffer_failed(s, flow, 1, error)
            length -= h[k].length
    flow_done(flow, run, length)
    return run


cdef uint64_t buffer_smart(buffer_server_t *s, const block_request *h) noexcept nogil:
    """The disk's raw SMART data to the buffer; the status. Where it does not fit there is none.

    Public clients leave the length 0; one that is given bounds what is touched.
    """
    cdef const device_t *d = &s.devices[h.device]
    cdef uint64_t status
    if (0 < h.length < SMART_SIZE or h.buffer_offset & (d.block_size - 1) != 0 or h.buffer_offset > s.length
            or SMART_SIZE > s.length - h.buffer_offset):
        buffer_blamed(s, FAULT_LENGTH if 0 < h.length < SMART_SIZE else FAULT_BUFFER_OFFSET)
        return SMART_UNAVAILABLE
    status = store_smart(d.store, s.smart)
    if status != SMART_UNAVAILABLE:
        memcpy(s.buffer + h.buffer_offset, s.smart, SMART_SIZE)
    return status


cdef uint64_t buffer_query(buffer_server_t *s, const block_request *h) noexcept nogil:
    """The status that answers everything but reads, writes, discards and syncs."""
    cdef bint exists = h.device < s.ndevices
    if h.kind == REQUEST_RESET or h.kind == REQUEST_NONE:
        if h.kind == REQUEST_RESET:     # nothing is under way by now: buffer_take waits for that
            count64(&s.n.resets, 1)
        else:
            count64(&s.n.queries, 1)
        return 0 if exists else REFUSED
    if (h.kind != REQUEST_MEDIA_BLOCKS and h.kind != REQUEST_BLOCK_LENGTH and h.kind != REQUEST_MAX_REQUESTS
            and h.kind != REQUEST_MAX_BLOCKS and h.kind != REQUEST_MAX_DEVICES and h.kind != REQUEST_SMART):
        buffer_blamed(s, FAULT_KIND)
        return REFUSED
    count64(&s.n.queries, 1)
    if not exists:
        return 0
    if s.sums and h.kind != REQUEST_SMART:
        return <uint32_t>(buffer_known(s, h) >> (32 if h.device_offset == 1 else 0))
    return buffer_known(s, h)


cdef uint64_t buffer_known(buffer_server_t *s, const block_request *h) noexcept nogil:
    """The status that answers a query about a device that is there."""
    cdef const device_t *d = &s.devices[h.device]
    if h.kind == REQUEST_MEDIA_BLOCKS:
        return d.size // d.block_size
    if h.kind == REQUEST_BLOCK_LENGTH:
        return d.block_size
    if h.kind == REQUEST_MAX_REQUESTS:
        return min(s.r.elements, s.w.elements)
    if h.kind == REQUEST_MAX_BLOCKS:
        return d.most // d.block_size
    if h.kind == REQUEST_MAX_DEVICES:
        return s.ndevices
    return buffer_smart(s, h)


cdef bint buffer_answer(buffer_server_t *s, uint64_t n) noexcept nogil:
    """Publishes the first n answers; as buffer_answers."""
    return buffer_answers(s, 0, n)


cdef bint buffer_answers(buffer_server_t *s, uint64_t first, uint64_t n) noexcept nogil:
    """Publishes n answers, unless the life that asked has ended; whether it goes on.

    A client that has begun a new epoch, or the same one anew, gets no answer to the old one's requests.
    """
    cdef uint64_t k, sum
    if load_acquire64(&s.r.hdr.epoch) != s.r.epoch or <int64_t>(reader_settled(&s.r, &s.r.hdr.wsc) - s.r.wc) < 0:
        return False
    writer_reserve(&s.w, n)
    for k in range(n):
        if s.sums:
            sum = response_sum(s.covers[first + k], &s.answers[first + k], s.w.wc + k, s.w.epoch)
            s.answers[first + k].status = <uint32_t>s.answers[first + k].status | sum << 32
        memcpy(writer_slot(&s.w, k), &s.answers[first + k], sizeof(block_response))
    writer_publish(&s.w, n)
    return True


cdef uint64_t buffer_sync(buffer_server_t *s, const block_request *h) noexcept nogil:
    """The status that answers a sync: what was written before it is durable by then."""
    cdef flow_t *flow = buffer_flow(s, REQUEST_SYNC, h.device)
    cdef int error
    if flow == NULL:
        buffer_blamed(s, FAULT_DEVICE)
        return REFUSED
    error = store_flush(s.devices[h.device].store)
    flow_done(flow, 1, 0)
    if error != 0:
        buffer_failed(s, flow, 1, error)
        return REFUSED
    return 0


cdef ring_status buffer_batch(buffer_server_t *s, uint64_t available) noexcept nogil:
    """One round without files: copy the requests out, check the copies, execute them in their order, answer."""
    cdef uint64_t n = min(min(available, <uint64_t>BATCH), s.w.elements)
    cdef uint64_t k = 0, i, run, waiting = 0, moved = 0, since
    cdef uint64_t status[BATCH]
    cdef uint32_t cover
    cdef const block_request *h
    cdef bint alive = True, predecessors = <int64_t>(s.void_below - s.r.rc) > 0
    for i in range(n):
        memcpy(&s.heads[i], reader_slot(&s.r, i), sizeof(block_request))
    if not reader_intact(&s.r):
        return reader_recover(&s.r)
    if predecessors:
        n = min(n, s.void_below - s.r.rc)
    s.last = s.heads[n - 1]
    if s.checksums != CHECKSUM_OFF:
        buffer_taken(s, n)
    count64(&s.n.batches, 1)
    since = sampler_begin(&s.sampler, s.r.sleeps)
    s.sampler.requests += n
    while alive and k < n:
        h = &s.heads[k]
        if predecessors and buffer_over(s, h, s.r.rc + k):
            count64(&s.n.voided, 1)
            k += 1
            continue
        run = 1
        cover = CRC32C_FIRST
        status[0] = 0
        if s.checksums != CHECKSUM_OFF:
            status[0] = buffer_judge(s, h, &s.seals[k])
        if s.checksums != CHECKSUM_OFF and buffer_refuses(s, status[0]):
            pass
        elif moves(h):
            status[0] = check_request(s, h)
            if status[0] != 0:
                buffer_refused(s, h, -<int>status[0])
            else:
                run = buffer_run(s, h, n - k, status, &cover)
                for i in range(run):
                    moved += s.heads[k + i].length
        elif h.kind == REQUEST_SYNC:
            if waiting != 0:            # a slow flush holds nothing back
                alive = buffer_answer(s, waiting)
                if since != 0:
                    buffer_measured(s, waiting, since)
                waiting = moved = 0
                if not alive:
                    break
            status[0] = buffer_sync(s, h)
        else:
            status[0] = buffer_query(s, h)
            if s.sums and s.r.rc + k == 0:
                status[0] = ACCEPT_AGAIN
                cover = accept_state(s.nonce)
        for i in range(run):
            s.answers[waiting].kind = s.heads[k].kind
            s.answers[waiting].device = s.heads[k].device
            s.answers[waiting].tag = s.heads[k].tag
            s.answers[waiting].status = status[i]
            s.covers[waiting] = cover
            waiting += 1
            k += 1
        if moved >= MEMORY_BYTES:
            alive = buffer_answer(s, waiting) and not stopping(&s.stop)
            if since != 0:
                buffer_measured(s, waiting, since)
            waiting = moved = 0
    if waiting != 0:
        buffer_answer(s, waiting)
        if since != 0:
            buffer_measured(s, waiting, since)
    count64(&s.n.cancelled, n - k)
    s.has_last = True
    reader_advance(&s.r, n)
    return SUCCESS


# ------------------------------------------------------------------ files

cdef void buffer_reply(buffer_server_t *s, const block_request *h, uint64_t status, uint32_t cover) noexcept nogil:
    """Answers one request. cover: the state of its checksum behind what was read."""
    s.covers[0] = cover
    s.answers[0].kind = h.kind
    s.answers[0].device = h.device
    s.answers[0].tag = h.tag
    s.answers[0].status = status
    buffer_answer(s, 1)


cdef bint buffer_finish(buffer_server_t *s) noexcept nogil:
    """Answers what is done; whether there was anything."""
    cdef requests_t *f = s.files
    cdef flight_t *t
    cdef uint64_t k, n, first, length
    cdef const block_request *h
    cdef flow_t *flow
    cdef bint worked = False, final, late
    cdef int error, i
    for i in range(FINISH_MOST):
        t = flights_take(&f.flights)
        if t == NULL:
            break
        worked = True
        first, n, error, length = t.first, t.n, t.op.error, t.op.length
        final, late = t.op.final, t.op.late
        h = s.heads
        for k in range(n):
            s.heads[k] = f.heads[(first + k) % AIO_MOST]
        flights_free(&f.flights, t)
        if error != 0 and n > 1 and not final:  # one by one: only what cannot be done gets the error
            for k in range(n):
                buffer_fly(s, &h[k], first + k, 1, h[k].length)
            continue
        if h.kind != REQUEST_SYNC and load_acquire32(s.broken) != 0:
            error = -EIO
        flow = checked_flow(s, h.kind, h.device)
        flow_ended(flow, n)
        flow_done(flow, n, length if error == 0 else 0)
        if error != 0:
            buffer_failed(s, flow, n, -ETIMEDOUT if late else error)
        flow_took(flow, now_ns() - f.since[first % AIO_MOST], n)
        # They were executed, and counted as that; or are to be executed by a successor.
        if f.flights.leaving or late and load_relaxed32(&s.stop) == STOP_NOW:
            continue
        for k in range(n):
            s.answers[k].kind = h[k].kind
            s.answers[k].device = h[k].device
            s.answers[k].tag = h[k].tag
            s.answers[k].status = 0 if error == 0 else REFUSED if h.kind == REQUEST_SYNC else <uint64_t>-error
            s.covers[k] = CRC32C_FIRST
            if s.sums and error == 0 and h.kind == REQUEST_READ:
                buffer_give(s, &h[k], &s.covers[k])
        k = 0
        while k < n and buffer_answers(s, k, min(n - k, s.w.elements)):
            k += min(n - k, s.w.elements)
    aio_begin(&f.flights.aio)           # what was done in part
    return worked


cdef void buffer_fly(buffer_server_t *s, const block_request *h, uint64_t first, uint64_t n,
                     uint64_t length) noexcept nogil:
    """Begins the operation of n requests from number `first` on, which is *h; they were checked, and have `length` bytes
    together."""
    cdef const device_t *d = &s.devices[h.device]
    cdef int kind = (AIO_READ if h.kind == REQUEST_READ else AIO_WRITE if h.kind == REQUEST_WRITE else
                     AIO_DISCARD if h.kind == REQUEST_DISCARD else AIO_SYNC)
    flights_add(&s.files.flights, first, <uint32_t>n, kind, d.file, d.store.offset + h.device_offset, length,
                NULL if kind == AIO_DISCARD or kind == AIO_SYNC else buffer_data(s, h))


cdef uint64_t buffer_launch(buffer_server_t *s, const block_request *h, const seal_t *seal, uint64_t n) noexcept nogil:
    """Begins or executes request h[0] and what can be done together with it, of n; how many, 0 where it has to wait. seal:
    of each; h[0] was verified."""
    cdef requests_t *f = s.files
    cdef const device_t *d
    cdef uint64_t run, length, k
    cdef uint64_t status[BATCH]
    cdef const uint8_t *data
    cdef uint32_t cover = CRC32C_FIRST
    cdef int kind
    status[0] = check_request(s, h)
    if status[0] != 0:
        buffer_refused(s, h, -<int>status[0])
        buffer_reply(s, h, status[0], CRC32C_FIRST)
        buffer_measured(s, 1, f.since[f.flights.head % AIO_MOST])
        return 1
    d = &s.devices[h.device]
    run = buffer_joined(s, h, n, &length)
    kind = AIO_READ if h.kind == REQUEST_READ else AIO_WRITE
    data = NULL if h.kind == REQUEST_DISCARD else buffer_data(s, h)
    if not d.flies:
        if aio_conflicts(&f.flights.aio, AIO_NO_FILE, kind, 0, length, data):
            return 0
        buffer_run(s, h, run, status, &cover)
        for k in range(run):
            buffer_reply(s, &h[k], status[k], cover)
            buffer_measured(s, 1, f.since[f.flights.head % AIO_MOST])
        return run
    if aio_conflicts(&f.flights.aio, d.file, kind, d.store.offset + h.device_offset, length, data):
        return 0
    if s.sums:
        k = 1
        if kind == AIO_WRITE and aio_conflicts(&f.flights.aio, AIO_NO_FILE, AIO_READ, 0, length, data):
            run = k                     # another one's place in the mirror: not to be changed
            length = h.length
        while k < run and buffer_right(s, &h[k], &seal[k]):
            k += 1
        while run > k:                  # the first that is wrong comes by itself next
            run -= 1
            length -= h[run].length
    flow_begun(checked_flow(s, h.kind, h.device), run)
    buffer_fly(s, h, f.flights.head, run, length)
    return run


cdef ring_status buffer_take(buffer_server_t *s, uint64_t available) noexcept nogil:
    """Takes requests of a connection with a file: copies them out, checks the copies, begins what they ask for, in their
    order.

    One that overlaps what is under way stays in the ring until that is done, and so does a sync or reset until
    everything before it is.
    """
    cdef requests_t *f = s.files
    cdef uint64_t n = flights_room(&f.flights, min(available, <uint64_t>BATCH)), k = 0, i, run
    cdef uint64_t since = 0 if n == 0 else now_ns()
    cdef const block_request *h
    cdef const device_t *d
    cdef uint64_t status
    cdef bint over
    for i in range(n):
        memcpy(&s.heads[i], reader_slot(&s.r, i), sizeof(block_request))
        f.heads[(f.flights.head + i) % AIO_MOST] = s.heads[i]
        f.since[(f.flights.head + i) % AIO_MOST] = since
    if not reader_intact(&s.r):
        return reader_recover(&s.r)
    if s.checksums != CHECKSUM_OFF:
        buffer_taken(s, n)
        for i in range(n):
            f.heads[(f.flights.head + i) % AIO_MOST] = s.heads[i]
    while k < n:
        h = &s.heads[k]
        d = &s.devices[h.device] if h.device < s.ndevices else NULL
        run = 1
        over = buffer_over(s, h, s.r.rc)
        status = 0
        if (not over and s.sums and h.kind == REQUEST_WRITE and buffer_within(s, h)
                and aio_conflicts(&f.flights.aio, AIO_NO_FILE, AIO_READ, 0, h.length, s.mirror + h.buffer_offset)):
            f.flights.blocked = True    # its place in the mirror is in use
            break
        if s.checksums != CHECKSUM_OFF and not over:
            status = buffer_judge(s, h, &s.seals[k])
        if over:
            count64(&s.n.voided, 1)     # of a predecessor's life
        elif s.checksums != CHECKSUM_OFF and buffer_refuses(s, status):
            buffer_reply(s, h, status, CRC32C_FIRST)
        elif moves(h):
            run = buffer_launch(s, h, &s.seals[k], n - k)
        elif h.kind == REQUEST_RESET and f.flights.aio.nflying != 0:
            run = 0
        elif h.kind != REQUEST_SYNC:
            status = buffer_query(s, h)
            if s.sums and s.r.rc == 0:
                buffer_reply(s, h, ACCEPT_AGAIN, accept_state(s.nonce))
            else:
                buffer_reply(s, h, status, CRC32C_FIRST)
        elif d != NULL and d.flies and aio_conflicts(&f.flights.aio, d.file, AIO_SYNC, 0, 0, NULL):
            run = 0
        elif d == NULL or not d.flies or d.store.read_only:
            buffer_reply(s, h, buffer_sync(s, h), CRC32C_FIRST)
            buffer_measured(s, 1, since)
        else:
            flow_begun(checked_flow(s, REQUEST_SYNC, h.device), 1)
            buffer_fly(s, h, f.flights.head, 1, 0)
        if run == 0:
            f.flights.blocked = True
            break
        s.last = h[run - 1]
        if s.sums and s.seals[k + run - 1].number != 0:
            s.last.length |= <uint64_t>s.seals[k + run - 1].sum << 32
        s.has_last = True
        reader_advance(&s.r, run)
        f.flights.head += run
        k += run
    if k == 0:                          # waiting is no work: it is slept through
        return NO_DATA
    count64(&s.n.batches, 1)
    aio_begin(&f.flights.aio)
    return SUCCESS


cdef void buffer_land(buffer_server_t *s) noexcept nogil:
    """Waits until nothing is under way, however long: the kernel may yet read and write the buffer's part of what is."""
    while aio_flies(&s.files.flights.aio):
        if load_relaxed32(&s.stop) == STOP_NOW:
            aio_hasten(&s.files.flights.aio)
        if not buffer_finish(s):
            aio_wait(&s.files.flights.aio, NULL, 0, LAND_NS)


cdef void buffer_begin(buffer_server_t *s) noexcept nogil:
    """A request epoch was synchronised with: what of it is void.

    Nothing in the first one can be a reaction to our response epoch, which is not active yet. So of more requests than
    the ring holds none is missed that anybody still waits for.
    """
    s.void_below = 0 if s.knows_epoch else load_acquire64(&s.r.hdr.wc)
    s.knows_epoch = s.connected = True
    s.sums = False                      # until its first request says so
    s.unsummed = s.checksums == CHECKSUM_REQUIRE
    s.refused = 0
    count64(&s.n.connections, 1)
    if s.void_below > s.r.elements:
        count64(&s.n.voided, s.void_below)
        reader_goto(&s.r, s.void_below)


cdef int buffer_step(buffer_server_t *s) noexcept nogil:
    """One look at the requests: STEP_WORKED, STEP_IDLE, or a server_event.

    The response channel becomes active at the end of the first one, and keeps its epoch to the end of this server,
    whatever clients do.
    """
    cdef uint64_t available
    cdef ring_status status
    cdef int event = STEP_IDLE
    cdef flights_t *f = NULL if s.files == NULL else &s.files.flights
    if f != NULL and buffer_finish(s):
        event = STEP_WORKED
    if take_nudge(&s.stop):
        return SERVER_TICK
    if stopping(&s.stop):
        if f != NULL and load_relaxed32(&s.stop) == STOP_NOW:
            aio_hasten(&f.aio)
        return SERVER_STOPPED if f == NULL or f.aio.nflying == 0 else event
    if s.grace_until != 0:
        if now_ns() < s.grace_until:
            return event
        s.grace_until = 0
    if f != NULL and f.leaving:
        if f.aio.nflying != 0:
            return event
        f.leaving = False
        status = <ring_status>f.pending
    else:
        status = reader_peek(&s.r, &available)
        if (status == SUCCESS or status == NO_DATA) and s.has_last and rewritten(&s.r, &s.last, sizeof(s.last)):
            s.r.epoch = 0
            status = reader_peek(&s.r, &available)
        if status == SUCCESS:
            status = buffer_batch(s, available) if f == NULL else buffer_take(s, available)
        if status == SUCCESS:
            return STEP_WORKED
        if status == NO_DATA:
            return event
        # All work of the old life is done before the new one's is begun; an overrun ends none, and what was taken before it
        # is answered.
        if f != NULL and f.aio.nflying != 0 and status != OVERRUN_DETECTED:
            f.leaving = True
            f.pending = status
            return event
    event = STEP_IDLE
    s.has_last = False
    if status == EPOCH_CHANGED:
        buffer_begin(s)
        event = SERVER_CONNECTED
        if too_soon(&s.starts, s.r.epoch):
            s.grace_until = now_ns() + AGAIN_NS
    elif status == OVERRUN_DETECTED:
        if f != NULL:
            f.blocked = False           # what waited is among the lost
        # What a first synchronisation has missed was void anyway.
        if <int64_t>(s.void_below - s.r.rc) >= 0 and s.r.rc - s.r.lost == 0 and s.void_below != 0:
            count64(&s.n.voided, s.r.lost)
            reader_forgive(&s.r)
            event = STEP_WORKED
        else:
            event = SERVER_OVERRUN
    else:
        if status == INACTIVE:
            s.knows_epoch = True        # whatever epoch comes now began in this life
            if s.connected:
                event = SERVER_DISCONNECTED
        elif s.refused != s.r.refused:
            s.refused = s.r.refused
            event = SERVER_INCOMPATIBLE
        s.connected = False
    if s.w.epoch == 0:
        writer_start(&s.w, random_epoch())
    return event


cdef class BufferServer(ServerEngine):
    """Serves several Stores over one connection: two channels and a buffer.

    request: the request channel's memory (read-only will do); response: the response channel's, writable, claimed by
    the caller; buffer: writable, at least 4096 bytes. stores: device 0, 1, ... request_bell, response_bell: writable
    buffers or None. poll: microseconds, None: adaptive. watch: of all engines of this process, or None. checksum:
    as Server has it.

    The response channel becomes active with the first run() and keeps its epoch until close(). run() belongs to one
    thread; stop(), counters and state may be used from others.
    """
    FIELDS = ("kind", "device", "length", "device_offset", "buffer_offset", "checksum")
    cdef buffer_server_t *s
    cdef Mapping buffer
    cdef readonly tuple stores

    def __cinit__(self):
        self.s = <buffer_server_t *>calloc(1, sizeof(buffer_server_t))
        if self.s == NULL:
            raise MemoryError()
        self.r = &self.s.r
        self.w = &self.s.w
        self.ending = &self.s.stop

    def __init__(self, request, response, buffer, stores, *, request_protocol=BUFFER_PROTOCOL,
                 response_protocol=BUFFER_PROTOCOL, request_bell=None, response_bell=None, poll=None,
                 Watch watch=None, checksum="off", bint threads=False):
        cdef device_t *d
        cdef Store store
        cdef uint32_t flags = 0, zeroes = 0
        cdef uint64_t count
        cdef int file
        cdef bint direct
        if self.s.devices != NULL:
            raise UsageError("a BufferServer is initialised once")
        self.s.checksums = checksum_mode(checksum)
        stores = tuple(stores)
        count = len(stores)
        if not all([isinstance(each, Store) for each in stores]):
            raise TypeError("stores are Store objects")
        if not 1 <= count <= MOST_DEVICES:
            raise UsageError(f"a connection has 1 to {MOST_DEVICES} devices", value=count)
        self.s.devices = <device_t *>calloc(count, sizeof(device_t))
        self.s.flows = <flow_t *>calloc(count * FLOWS, sizeof(flow_t))
        if self.s.devices == NULL or self.s.flows == NULL:
            raise MemoryError()
        self.buffer = hold(buffer, True, BLOCK_SIZE)
        self.s.buffer = self.buffer.base
        self.s.length = self.buffer.length
        self.s.broken = self.buffer.broken
        for number, each in enumerate(stores):
            store = each
            d = &self.s.devices[number]
            d.store = &store.s
            d.block_size = store.s.block_size
            d.size = store.s.size
            d.most = min(self.s.length, store.s.most) // d.block_size * d.block_size
            d.flies = store_flies(&store.s)
            if number < STORE_FLAGS:
                flags |= (STORE_READ_ONLY if store.s.read_only else 0) << <uint32_t>number
                zeroes |= <uint32_t>store_zeroes(&store.s) << <uint32_t>number
        if self.s.checksums != CHECKSUM_OFF:
            self.s.mirror = <uint8_t *>aligned_alloc(BLOCK_SIZE, (self.s.length + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE)
            if self.s.mirror == NULL:
                raise MemoryError()
        if any([each.waits for each in stores]):
            self.s.files = <requests_t *>calloc(1, sizeof(requests_t))
            if self.s.files == NULL:
                raise MemoryError()
            # The buffer is not registered: pinned pages would be read and written after its owner gave it others.
            threads = threads or any([isinstance(each, Store) and (<Store>each).s.jobs != NULL for each in stores])
            aio_open(&self.s.files.flights.aio, threads, NULL, 0)
            for number, each in enumerate(stores):
                store = each
                if store_flies(&store.s):
                    # The smallest page is the strictest alignment that direct I/O asks for.
                    direct = store.s.direct_fd >= 0 and <uint64_t><uintptr_t>self.s.buffer % BLOCK_SIZE == 0
                    file = aio_add(&self.s.files.flights.aio, store.s.direct_fd if direct else store.s.fd, store.s.device,
                                   store_source(&store.s))
                    if file < 0:
                        raise UsageError(f"a connection has at most {AIO_FILES} disks that are not plain RAM", value=count)
                    self.s.devices[number].file = <uint32_t>file
        self.s.ndevices = count
        self.stores = stores
        self.bind(request, response, request_bell, response_bell, sizeof(block_request), sizeof(block_response),
                  request_protocol, response_protocol, poll, watch)
        self.introduce(identity_of([each.identity for each in stores]), flags, zeroes)

    cdef int step(self) noexcept nogil:
        return buffer_step(self.s)

    cdef void wait(self, uint64_t ns) noexcept nogil:
        flights_rest(NULL if self.s.files == NULL else &self.s.files.flights, self.r, self.s.grace_until,
                     min(ns, patience(self.r, self.s.has_last)), self.ending)

    cdef void land(self) noexcept nogil:
        cdef requests_t *f = self.s.files
        if f != NULL:
            buffer_land(self.s)
            aio_close(&f.flights.aio)
            self.s.files = NULL
            free(f)

    cdef str taken_away(self):
        return "buffer" if was_taken(self.buffer) else ServerEngine.taken_away(self)

    cdef void drop(self) noexcept:
        ServerEngine.drop(self)
        if self.buffer is not None:
            self.buffer.drop()

    @property
    def checksum(self):
        """Whether the client's requests have checksums: CHECKSUM of _engine."""
        return checksum_word(self.s.checksums, self.s.connected, self.s.sums, self.s.unsummed)

    @property
    def counters(self):
        """All counters of this server's life; readable while it runs."""
        cdef buffer_counters n = self.s.n
        cdef uint64_t requests[FLOWS]
        cdef uint64_t moved[FLOWS]
        cdef uint64_t merged = 0, k
        cdef const flow_t *flow
        memset(requests, 0, sizeof(requests))
        memset(moved, 0, sizeof(moved))
        for k in range(self.s.ndevices * FLOWS):
            flow = &self.s.flows[k]
            requests[k % FLOWS] += load_relaxed64(&flow.requests) - load_relaxed64(&flow.refused)
            moved[k % FLOWS] += load_relaxed64(&flow.bytes)
            merged += load_relaxed64(&flow.merged)
        return {"reads": requests[FLOW_READ], "writes": requests[FLOW_WRITE], "discards": requests[FLOW_DISCARD],
                "syncs": requests[FLOW_FLUSH], "queries": n.queries, "resets": n.resets,
                "bytes_read": moved[FLOW_READ], "bytes_written": moved[FLOW_WRITE],
                "bytes_discarded": moved[FLOW_DISCARD], "batches": n.batches, "merged": merged, "rejected": n.rejected,
                "failed": n.failed, "voided": n.voided, "quarantines": self.s.r.quarantines,
                "cancelled": n.cancelled, "connections": n.connections, "overruns": self.s.r.overruns,
                "lost": self.s.r.lost_total, "wakes": self.s.w.wakes, "sleeps": self.s.r.sleeps}

    @property
    def directions(self):
        """Of each disk what stands behind `directions` in the output of `muenfast stat --json`."""
        cdef const sampler_t *sampler = &self.s.sampler if self.s.files == NULL else NULL
        return tuple([flows_words(&self.s.flows[k * FLOWS], sampler, True) for k in range(self.s.ndevices)])

    def inherit(self, BufferServer other not None):
        """Goes on with another (closed) server's counters, after its channels were made anew. Both have the same devices."""
        self.s.n = other.s.n
        memcpy(self.s.flows, other.s.flows, min(self.s.ndevices, other.s.ndevices) * FLOWS * sizeof(flow_t))
        self.succeed(other)

    def __dealloc__(self):
        if self.s != NULL:
            if self.held():
                writer_stop(&self.s.w)
            self.s.stop = STOP_NOW
            if self.s.files != NULL:
                self.s.files.flights.leaving = True
            self.land()
            free(self.s.mirror)
            free(self.s.devices)
            free(self.s.flows)
            free(self.s)
            self.s = NULL


def identity_of(identities):
    """16 bytes for what one connection serves: the store's own where it is one, else made of all in their order."""
    if len(identities) == 1:
        return identities[0]
    from hashlib import blake2b     # which a server without buffers does not need, nor wait for

    return blake2b(b"".join(identities), digest_size=16).digest()
