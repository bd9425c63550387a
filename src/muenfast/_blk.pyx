"""The block server's engine for the inline transport: requests of one client, executed on a Store.

Runs without the GIL and allocates nothing per request. Trust: of every request the 24-byte header is copied once,
validated, and only the copy is used; payload is used in place and checked for being intact afterwards. Where checksums were
agreed upon, payload is copied once, too: what is verified is what is used.
"""
cimport cython
from libc.errno cimport ECOMM, EINVAL, EIO, EPROTONOSUPPORT, EROFS, ETIMEDOUT
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._aio cimport *
from muenfast._blocksum cimport *
from muenfast._count cimport *
from muenfast._engine cimport *
from muenfast._ring cimport *
from muenfast._store cimport *
from muenfast._thread cimport TIMER_SLACK_NS, prepare_thread
from muenfast._wire cimport *

from muenfast.errors import UsageError

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    # Requests of one round to a store without system calls: the client takes these answers while the next ones are
    # copied. With 64, and 32 in flight, the two took turns (docs/decisions/003).
    MEMORY_BATCH = 4
    # Rounds of one server of a group before the next one's turn.
    TURN_ROUNDS = 8

# Of event_fault(), and FIELDS of Server.
cdef enum:
    FAULT_VALID = 0
    FAULT_KIND = 1
    FAULT_ID = 2
    FAULT_CHECKSUM = 3

# What the slow turns of one server of a group, of page faults on its client's memory or the zeroing of a large ring, may
# take of the others' time, by the clock. Turns are microseconds long; a thread that lost its CPU looks slow, too.
cdef uint64_t SLOW_TURN_NS = 2_000_000
cdef uint64_t BUDGET_NS = 50_000_000
cdef uint64_t BUDGET_PERIOD_NS = 2_000_000_000
# Longest of the waits for what is under way, one after the other.
cdef uint64_t LAND_NS = 100_000_000
# Pause before a new response epoch after an overrun, so that answers already published can be read.
cdef uint64_t GRACE_NS = 10_000_000


cdef struct server_counters:    # of what belongs to no direction
    uint64_t sizes
    uint64_t batches
    uint64_t rejected       # requests that broke a rule, answered with an error
    uint64_t failed         # requests the store answered with an error
    uint64_t torn           # writes overwritten by the client while they were executed
    uint64_t voided         # requests of an earlier life, not answered
    uint64_t connections


cdef struct server_t:
    reader_t r
    writer_t w
    const store_t *store
    uint32_t stop
    uint64_t grace_until    # nothing is looked at before, or 0
    bint renew              # then a new response epoch is due: after an overrun the old answers can be read until then
    starts_t starts
    bint knows_epoch        # this life has seen a request epoch end or begin: none can be a predecessor's
    uint64_t void_below     # requests of this epoch with a number below are void
    uint64_t refused        # incompatible epoch that was reported
    block_event_header last # the newest request taken from the ring, as it was ...
    bint has_last           # ... in this epoch, if there was one
    uint64_t over           # r.epochs of the life that was seen to be over
    server_counters n
    flow_t flows[FLOWS]
    sampler_t sampler       # of a server without a file; with one every request is measured
    block_event_header heads[BATCH]
    copy_giver giver        # of blocks that are read
    int32_t errors[BATCH]
    files_t *files          # of a server whose store has operations under way, else NULL
    uint32_t checksums      # CHECKSUM_*
    bint sums               # this epoch's requests and answers have checksums ...
    bint unsummed           # ... or have none, and are refused for that
    uint64_t nonce          # of the offer
    uint8_t *blocks         # with checksums, without a file: a block for each place of a batch
    int32_t verdicts[BATCH] # what the checksums of a batch's requests come to: 0 or a negative errno
    uint32_t covers[BATCH]  # of its answers: states of their checksums behind the blocks that they carry


cdef struct files_t:
    flights_t flights
    # A block for each place, page-aligned: a slot may be overwritten while a file waits. An operation's are side by side:
    # those of one that begins before the last place and ends behind the first follow the last.
    uint8_t *stage
    block_event_header heads[AIO_MOST]
    uint64_t since[AIO_MOST]    # when each was taken


cdef int32_t check_event(const server_t *s, const block_event_header *h) noexcept nogil:
    """0, or the errno that answers a request which breaks a rule. h is a private copy; its checksum, if it has one, is
    right."""
    if h.valid != 1 and not s.sums:
        return -EINVAL
    if h.kind == EVENT_COMMAND:
        return 0 if h.id == COMMAND_SYNC or h.id == COMMAND_SIZE else -EINVAL
    if h.kind != EVENT_READ and h.kind != EVENT_WRITE:
        return -EINVAL
    if h.id >= s.store.nblocks:
        return -EINVAL
    if h.kind == EVENT_WRITE and s.store.read_only:
        return -EROFS
    return 0


cdef uint32_t event_fault(const server_t *s, const block_event_header *h) noexcept nogil:
    """The field that is wrong in a header that check_event() refuses. h is a private copy."""
    if h.valid != 1 and not s.sums:
        return FAULT_VALID
    if h.kind == EVENT_READ or h.kind == EVENT_WRITE or h.kind == EVENT_COMMAND:
        return FAULT_ID
    return FAULT_KIND


cdef int32_t server_offered(server_t *s, const block_event_header *h, uint64_t k) noexcept nogil:
    """Agrees with a client upon checksums in this epoch, or upon none, by its first request, which stands in slot k; 0, or the
    errno that answers it. h: a copy of its header."""
    cdef block_offer offer
    cdef int found = OFFER_NONE
    if h.kind == EVENT_COMMAND and h.id == COMMAND_SIZE and h.valid == 1:
        memcpy(&offer, reader_slot(&s.r, k) + sizeof(block_event_header), sizeof(offer))
        found = offer_look(&offer, h, 0, s.r.epoch)
    s.sums = found == OFFER_GOOD
    s.unsummed = s.checksums == CHECKSUM_REQUIRE and not s.sums
    s.nonce = offer.nonce if s.sums else 0
    return -ECOMM if found == OFFER_GARBLED else 0


cdef bint server_verify(server_t *s, const block_event_header *h, uint64_t k, uint8_t *block) noexcept nogil:
    """Whether the checksum of the request in slot k is right. h: a copy of its header. block: where a write's is put first.
    """
    cdef uint32_t state = CRC32C_FIRST
    if h.kind == EVENT_WRITE:
        copy_taken(block, reader_slot(&s.r, k) + sizeof(block_event_header), BLOCK_SIZE)
        state = crc32c(state, block, BLOCK_SIZE)
    return event_sum(state, h, s.r.rc + k, s.r.epoch) == h.valid


cdef int32_t server_judge(server_t *s, const block_event_header *h, uint64_t k, uint8_t *block) noexcept nogil:
    """0, or the errno that answers the request in slot k as its checksum demands: ECOMM: to be sent again; EIO: the client has
    overwritten it meanwhile. h, block: as server_verify(). Precondition: checksums are not off; in the order of the requests.
    """
    cdef int32_t error = 0
    if s.r.rc + k == 0:
        error = server_offered(s, h, k)
    elif s.sums and not server_verify(s, h, k, block):
        error = -ECOMM
    if error != 0 and not server_intact(s, k):
        server_torn(s, 1)
        return -EIO
    return -EPROTONOSUPPORT if error == 0 and s.unsummed else error


cdef inline int32_t server_check(const server_t *s, uint64_t k) noexcept nogil:
    """0, or the errno that answers request k of a batch on memory."""
    if s.checksums != CHECKSUM_OFF and s.verdicts[k] != 0:
        return s.verdicts[k]
    return check_event(s, &s.heads[k])


cdef void server_size(const server_t *s, uint8_t *data) noexcept nogil:
    """Makes the block that answers a request for the size."""
    cdef block_offer answer
    memset(data, 0, BLOCK_SIZE)
    memset(&answer, 0, sizeof(answer))
    answer.sectors = s.store.nblocks * (BLOCK_SIZE // SECTOR_SIZE)
    if s.sums:
        answer.magic = ACCEPT_MAGIC
        answer.nonce = ~s.nonce
        answer.again = ACCEPT_AGAIN
    memcpy(data, &answer, sizeof(answer))


cdef bint server_intact(server_t *s, uint64_t k) noexcept nogil:
    """Whether slot k of the batch still holds what the client published, everything used of it included.

    As reader_intact: the use before the loads of epoch and WSC (acquire fence; pairs with writer_reserve and
    writer_start), the epoch before the counters (acquire); counters below the WC seen are a restart.
    """
    cdef uint64_t wsc
    fence_acquire()
    return server_life(s, &wsc) and wsc - (s.r.rc + k) <= s.r.elements


cdef int32_t server_move(server_t *s, uint64_t first, uint64_t n, uint64_t out) noexcept nogil:
    """Moves the payload of n reads or writes with consecutive blocks, straight between memory and slots; 0 or a negative
    errno for all of them."""
    cdef uint64_t k, block = s.heads[first].id
    cdef bint write = s.heads[first].kind == EVENT_WRITE
    cdef uint8_t *data
    cdef uint8_t *source
    for k in range(n):
        if write:
            data = <uint8_t *>reader_slot(&s.r, first + k) + sizeof(block_event_header)
            if s.sums:
                data = s.blocks + (first + k) * BLOCK_SIZE
            if s.store.kind == STORE_MEMORY:
                copy_taken(s.store.memory + (block + k) * BLOCK_SIZE, data, BLOCK_SIZE)
        else:
            data = writer_slot(&s.w, out + k) + sizeof(block_event_header)
            if s.sums:      # of one copy: somebody else may write this memory
                source = s.blocks + (first + k) * BLOCK_SIZE
                if s.store.kind == STORE_MEMORY:
                    copy_bytes(source, s.store.memory + (block + k) * BLOCK_SIZE, BLOCK_SIZE)
                else:
                    memset(source, 0, BLOCK_SIZE)
                s.covers[first + k] = crc32c(CRC32C_FIRST, source, BLOCK_SIZE)
                copy_given(&s.giver, data, source, BLOCK_SIZE)
            elif s.store.kind == STORE_MEMORY:
                copy_given(&s.giver, data, s.store.memory + (block + k) * BLOCK_SIZE, BLOCK_SIZE)
            else:
                memset(data, 0, BLOCK_SIZE)
    return -EIO if store_broken(s.store) else 0


cdef uint32_t event_flow(const block_event_header *h) noexcept nogil:
    """The direction, FLOWS where it has none. h is a private copy."""
    if h.kind == EVENT_READ:
        return FLOW_READ
    if h.kind == EVENT_WRITE:
        return FLOW_WRITE
    return FLOW_FLUSH if h.kind == EVENT_COMMAND and h.id == COMMAND_SYNC else FLOWS


cdef void server_count(server_t *s, uint32_t flow, uint64_t n, int32_t error) noexcept nogil:
    """n requests of that direction were one operation of the store."""
    flow_done(&s.flows[flow], n, n * BLOCK_SIZE if error == 0 and flow != FLOW_FLUSH else 0)
    if error != 0:
        count64(&s.n.failed, n)
        flow_failed(&s.flows[flow], n, error)


cdef void server_refused(server_t *s, const block_event_header *h, int32_t error) noexcept nogil:
    """A request broke a rule."""
    cdef uint32_t flow = event_flow(h)
    count64(&s.n.rejected, 1)
    if error == -EINVAL:    # a disk that is read-only may not have been known to be, nor that checksums are required
        reader_blame(&s.r, event_fault(s, h), 1)
    elif error == -ECOMM:
        reader_blame(&s.r, FAULT_CHECKSUM, 1)
    if flow != FLOWS:
        flow_refused(&s.flows[flow], error)


cdef void server_torn(server_t *s, uint64_t n) noexcept nogil:
    """n writes were overwritten before the store had them."""
    count64(&s.n.torn, n)
    count64(&s.flows[FLOW_WRITE].errors[ERROR_TORN], n)


cdef void server_measured(server_t *s, uint64_t n, uint64_t since) noexcept nogil:
    """The batch's first n requests, which were taken then, are answered."""
    cdef uint64_t k, ns = now_ns() - since
    cdef uint32_t flow
    for k in range(n):
        flow = event_flow(&s.heads[k])
        if flow != FLOWS:
            flow_took(&s.flows[flow], ns, 1)


cdef void server_run_blocks(server_t *s, uint64_t first, uint64_t n, uint64_t out) noexcept nogil:
    """Executes the reads or writes first..first+n-1 of the batch, whose blocks are consecutive.

    Answers to reads stand in the response slots from `out` on.
    """
    cdef uint64_t k
    cdef int32_t error = server_move(s, first, n, out)
    if error != 0:
        for k in range(n):
            s.errors[first + k] = error
            if s.heads[first].kind == EVENT_READ:   # no byte of an earlier answer goes out under an error
                memset(writer_slot(&s.w, out + k) + sizeof(block_event_header), 0, BLOCK_SIZE)
    server_count(s, event_flow(&s.heads[first]), n, error)


cdef bint server_life(server_t *s, uint64_t *wsc) noexcept nogil:
    """Whether the life that asks goes on, and its WSC: a client that has begun a new epoch, or the same one anew, gets
    no answer to the old one's requests. One that was seen to be over stays so: by the next look another may have come as
    far.
    """
    if s.over != s.r.epochs and load_acquire64(&s.r.hdr.epoch) == s.r.epoch:
        wsc[0] = reader_settled(&s.r, &s.r.hdr.wsc)
        if <int64_t>(wsc[0] - s.r.wc) >= 0 and <int64_t>(reader_settled(&s.r, &s.r.hdr.wc) - s.r.wc) >= 0:
            return True
    s.over = s.r.epochs
    return False


cdef void server_answer(server_t *s, uint64_t first, uint64_t n) noexcept nogil:
    """Completes the headers of the batch's answers first..first+n-1 in the first n reserved slots; publishes them.

    A write to memory whose slot the client overwrote meanwhile is torn: it is looked at again after the data was used.
    """
    cdef uint64_t k, wsc
    cdef block_event_header h
    for k in range(n):
        h = s.heads[first + k]
        if h.kind == EVENT_WRITE and s.errors[first + k] == 0 and s.store.kind == STORE_MEMORY:
            if not server_intact(s, first + k):
                s.errors[first + k] = -EIO
                server_torn(s, 1)
        h.error = s.errors[first + k]
        if s.sums:
            h.valid = event_sum(s.covers[first + k] if h.error == 0 else CRC32C_FIRST, &h, s.w.wc + k, s.w.epoch)
        memcpy(writer_slot(&s.w, k), &h, sizeof(block_event_header))
    if server_life(s, &wsc):
        writer_publish(&s.w, n)


cdef void server_took(server_t *s, const block_event_header *h, uint64_t n) noexcept nogil:
    """Consumes n requests, of which *h is a copy of the last header."""
    s.last = h[0]
    s.has_last = True
    reader_advance(&s.r, n)


cdef bint server_forgotten(const server_t *s) noexcept nogil:
    """Whether the client has restarted under the same epoch although its counters do not tell."""
    return s.has_last and rewritten(&s.r, &s.last, sizeof(s.last))


cdef ring_status server_batch(server_t *s, uint64_t available) noexcept nogil:
    """One round on memory: copy the headers out, check the copies, execute, answer with one publish."""
    cdef uint64_t n, k, run, since
    cdef uint8_t *slot
    cdef block_event_header *h
    n = min(available, <uint64_t>MEMORY_BATCH)
    if n > s.w.elements:
        n = s.w.elements
    for k in range(n):
        memcpy(&s.heads[k], reader_slot(&s.r, k), sizeof(block_event_header))
    if not reader_intact(&s.r):
        return reader_recover(&s.r)
    if <int64_t>(s.void_below - s.r.rc) > 0:
        # Requests of a predecessor's life: only `size` may be answered, one by one and in order.
        h = &s.heads[0]
        if h.kind != EVENT_COMMAND or h.id != COMMAND_SIZE:
            count64(&s.n.voided, 1)
            server_took(s, h, 1)
            return SUCCESS
        n = 1
    if s.checksums != CHECKSUM_OFF:
        for k in range(n):
            s.verdicts[k] = server_judge(s, &s.heads[k], k, s.blocks + k * BLOCK_SIZE)
            s.covers[k] = CRC32C_FIRST
    count64(&s.n.batches, 1)
    since = sampler_begin(&s.sampler, s.r.sleeps)
    s.sampler.requests += n
    writer_reserve(&s.w, n)
    k = 0
    while k < n:
        h = &s.heads[k]
        s.errors[k] = server_check(s, k)
        if s.errors[k] != 0:
            server_refused(s, h, s.errors[k])
            memset(writer_slot(&s.w, k) + sizeof(block_event_header), 0, BLOCK_SIZE)
            k += 1
        elif h.kind == EVENT_COMMAND:
            slot = writer_slot(&s.w, k) + sizeof(block_event_header)
            if h.id == COMMAND_SIZE:
                server_size(s, slot)
                if s.sums:
                    s.covers[k] = crc32c(CRC32C_FIRST, slot, BLOCK_SIZE)
                count64(&s.n.sizes, 1)
            else:
                memset(slot, 0, BLOCK_SIZE)
                s.errors[k] = store_flush(s.store)
                server_count(s, FLOW_FLUSH, 1, s.errors[k])
            k += 1
        else:
            run = 1
            s.errors[k] = 0
            while (k + run < n and s.heads[k + run].kind == h.kind and s.heads[k + run].id == h.id + run
                    and server_check(s, k + run) == 0):
                s.errors[k + run] = 0
                run += 1
            server_run_blocks(s, k, run, k)
            k += run
    server_answer(s, 0, n)
    if since != 0:
        server_measured(s, n, since)
    server_took(s, &s.heads[n - 1], n)
    return SUCCESS


# ------------------------------------------------------------------ files, and what is like them

cdef void server_reply(server_t *s, const block_event_header *heads, uint64_t n, int32_t error,
                       const uint8_t *data) noexcept nogil:
    """Answers n requests. data: their blocks, or NULL: zeros."""
    cdef uint64_t k, wsc, done = 0, most
    cdef uint32_t state
    cdef uint8_t *slot
    cdef block_event_header h
    while done < n:
        most = min(n - done, s.w.elements)
        writer_reserve(&s.w, most)
        for k in range(done, done + most):
            slot = writer_slot(&s.w, k - done)
            h = heads[k]
            h.error = error
            if s.sums:
                state = CRC32C_FIRST
                if data != NULL:
                    state = crc32c(state, data + k * BLOCK_SIZE, BLOCK_SIZE)
                h.valid = event_sum(state, &h, s.w.wc + k - done, s.w.epoch)
            memcpy(slot, &h, sizeof(block_event_header))
            if data != NULL:
                copy_given(&s.giver, slot + sizeof(block_event_header), data + k * BLOCK_SIZE, BLOCK_SIZE)
            elif h.kind != EVENT_WRITE:     # no byte of an earlier answer goes out
                memset(slot + sizeof(block_event_header), 0, BLOCK_SIZE)
        if not server_life(s, &wsc):
            return
        writer_publish(&s.w, most)
        done += most


cdef bint server_finish(server_t *s) noexcept nogil:
    """Answers what is done; whether there was anything."""
    cdef files_t *f = s.files
    cdef flight_t *t
    cdef aio_op op
    cdef uint64_t first, n, k
    cdef uint32_t flow
    cdef bint worked = False
    cdef int i
    for i in range(FINISH_MOST):
        t = flights_take(&f.flights)
        if t == NULL:
            break
        worked = True
        first, n, op = t.first, t.n, t.op
        for k in range(n):
            s.heads[k] = f.heads[(first + k) % AIO_MOST]
        if op.error != 0 and n > 1 and not op.final:    # one by one: only what cannot be done gets the error
            flights_free(&f.flights, t)
            for k in range(n):
                flights_add(&f.flights, first + k, 1, op.kind, op.file, op.start + k * BLOCK_SIZE, BLOCK_SIZE,
                            op.data + k * BLOCK_SIZE)
            continue
        flow = event_flow(&s.heads[0])
        flow_ended(&s.flows[flow], n)
        server_count(s, flow, n, -ETIMEDOUT if op.late else op.error)
        if not f.flights.leaving and not (op.late and load_relaxed32(&s.stop) == STOP_NOW):
            server_reply(s, s.heads, n, op.error, op.data if op.kind == AIO_READ and op.error == 0 else NULL)
        flow_took(&s.flows[flow], now_ns() - f.since[first % AIO_MOST], n)
        flights_free(&f.flights, t)
    aio_begin(&f.flights.aio)           # what was done in part
    return worked


cdef uint64_t server_launch(server_t *s, const block_event_header *h, uint64_t n) noexcept nogil:
    """Begins the read or write h[0], which was checked, and those behind it, n with it at most, whose blocks follow; how
    many, 0 where it has to wait. Writes are staged, and checked to be what the client published. With checksums h[0] was
    verified, and a write staged already; what follows is as far as it is right."""
    cdef files_t *f = s.files
    cdef uint64_t run = 1, k, start = s.store.offset + h.id * BLOCK_SIZE
    cdef int kind = AIO_WRITE if h.kind == EVENT_WRITE else AIO_READ
    cdef uint8_t *stage = f.stage + f.flights.head % AIO_MOST * BLOCK_SIZE
    while (run < n and h[run].kind == h.kind and h[run].id == h.id + run and (run + 1) * BLOCK_SIZE <= s.store.most
            and check_event(s, &h[run]) == 0):
        if s.sums and not server_verify(s, &h[run], run, stage + run * BLOCK_SIZE):
            break
        run += 1
    if aio_conflicts(&f.flights.aio, 0, kind, start, run * BLOCK_SIZE, NULL):
        return 0
    if kind == AIO_WRITE:
        for k in range(0 if s.sums else run):
            copy_taken(stage + k * BLOCK_SIZE, <uint8_t *>reader_slot(&s.r, k) + sizeof(block_event_header), BLOCK_SIZE)
        if not server_intact(s, 0):
            server_torn(s, run)
            count64(&s.n.failed, run)
            flow_done(&s.flows[FLOW_WRITE], run, 0)
            server_reply(s, h, run, -EIO, NULL)
            flow_took(&s.flows[FLOW_WRITE], now_ns() - f.since[f.flights.head % AIO_MOST], run)
            return run
    flow_begun(&s.flows[event_flow(h)], run)
    flights_add(&f.flights, f.flights.head, <uint32_t>run, kind, 0, start, run * BLOCK_SIZE, stage)
    return run


cdef ring_status server_take(server_t *s, uint64_t available) noexcept nogil:
    """Takes requests for a file: copies their headers out, checks the copies, begins what they ask for, in their order.

    One that overlaps what is under way stays in the ring until that is done, and a sync until everything before it is.
    """
    cdef files_t *f = s.files
    cdef uint64_t n = flights_room(&f.flights, min(available, <uint64_t>BATCH)), k = 0, i, run
    cdef uint64_t since = 0 if n == 0 else now_ns()
    cdef uint8_t data[BLOCK_SIZE]
    cdef const block_event_header *h
    cdef int32_t error
    cdef bint over
    for i in range(n):
        memcpy(&s.heads[i], reader_slot(&s.r, i), sizeof(block_event_header))
        f.heads[(f.flights.head + i) % AIO_MOST] = s.heads[i]
        f.since[(f.flights.head + i) % AIO_MOST] = since
    if not reader_intact(&s.r):
        return reader_recover(&s.r)
    while k < n:
        h = &s.heads[k]
        run = 1
        error = 0
        over = <int64_t>(s.void_below - s.r.rc) > 0 and (h.kind != EVENT_COMMAND or h.id != COMMAND_SIZE)
        if not over and s.checksums != CHECKSUM_OFF:
            error = server_judge(s, h, 0, f.stage + f.flights.head % AIO_MOST * BLOCK_SIZE)
        if error == 0:
            error = check_event(s, h)
        if over:
            count64(&s.n.voided, 1)     # of a predecessor's life
        elif error != 0:
            server_refused(s, h, error)
            server_reply(s, h, 1, error, NULL)
            if event_flow(h) != FLOWS:
                flow_took(&s.flows[event_flow(h)], now_ns() - since, 1)
        elif h.kind != EVENT_COMMAND:
            run = server_launch(s, h, n - k)
        elif h.id == COMMAND_SIZE:
            server_size(s, data)
            count64(&s.n.sizes, 1)
            server_reply(s, h, 1, 0, data)
        elif aio_conflicts(&f.flights.aio, 0, AIO_SYNC, 0, 0, NULL):
            run = 0
        elif s.store.read_only:
            server_count(s, FLOW_FLUSH, 1, 0)
            server_reply(s, h, 1, 0, NULL)
            flow_took(&s.flows[FLOW_FLUSH], now_ns() - since, 1)
        else:
            flow_begun(&s.flows[FLOW_FLUSH], 1)
            flights_add(&f.flights, f.flights.head, 1, AIO_SYNC, 0, 0, 0, NULL)
        if run == 0:
            f.flights.blocked = True
            break
        server_took(s, &h[run - 1], run)
        f.flights.head += run
        k += run
    if k == 0:                          # waiting is no work: it is slept through
        return NO_DATA
    count64(&s.n.batches, 1)
    aio_begin(&f.flights.aio)
    return SUCCESS


cdef void server_land(server_t *s) noexcept nogil:
    """Waits until nothing is under way, however long: the kernel may yet read and write the memory of what is."""
    while aio_flies(&s.files.flights.aio):
        if load_relaxed32(&s.stop) == STOP_NOW:
            aio_hasten(&s.files.flights.aio)
        if not server_finish(s):
            aio_wait(&s.files.flights.aio, NULL, 0, LAND_NS)


cdef int server_step(server_t *s) noexcept nogil:
    """One look at the requests: STEP_WORKED, STEP_IDLE, or a server_event.

    Waits only where a store or a client makes it: for up to 10 ms while counters settle, counted in r.unsettled. Idle
    during the grace after an overrun.
    """
    cdef uint64_t available
    cdef ring_status status
    cdef flights_t *f = NULL if s.files == NULL else &s.files.flights
    cdef int idle = STEP_IDLE
    if f != NULL and server_finish(s):
        idle = STEP_WORKED
    if take_nudge(&s.stop):
        return SERVER_TICK
    if stopping(&s.stop):
        if f != NULL and load_relaxed32(&s.stop) == STOP_NOW:
            aio_hasten(&f.aio)
        return SERVER_STOPPED if f == NULL or f.aio.nflying == 0 else idle
    if s.grace_until != 0:
        if now_ns() < s.grace_until:
            return idle
        s.grace_until = 0
        if s.renew:
            s.renew = False
            writer_start(&s.w, random_epoch())
    if f != NULL and f.leaving:
        if f.aio.nflying != 0:
            return idle
        f.leaving = False
        status = <ring_status>f.pending
    else:
        if s.over == s.r.epochs:
            s.r.epoch = 0               # to synchronise anew, whatever stands there by now
        status = reader_peek(&s.r, &available)
        if (status == SUCCESS or status == NO_DATA) and server_forgotten(s):
            s.r.epoch = 0
            status = reader_peek(&s.r, &available)
        if status == SUCCESS:
            status = server_batch(s, available) if f == NULL else server_take(s, available)
        if status == SUCCESS:
            return STEP_WORKED
        if status == NO_DATA:
            return idle
        if f != NULL and f.aio.nflying != 0:    # all work of the old epoch is done before the new one's answers begin
            f.leaving = True
            f.pending = status
            return idle
    s.has_last = False
    if status == EPOCH_CHANGED:
        s.void_below = 0 if s.knows_epoch else load_acquire64(&s.r.hdr.wc)
        s.knows_epoch = True
        s.sums = False                      # until its first request says so
        s.unsummed = s.checksums == CHECKSUM_REQUIRE
        if s.void_below > s.r.elements:     # a ring gone round: what is missed of it is void, and no loss
            count64(&s.n.voided, s.void_below)
            reader_goto(&s.r, s.void_below)
        s.refused = 0
        writer_start(&s.w, random_epoch())
        if too_soon(&s.starts, s.r.epoch):
            s.grace_until = now_ns() + AGAIN_NS
        count64(&s.n.connections, 1)
        return SERVER_CONNECTED
    if status == OVERRUN_DETECTED:
        # What a first synchronisation has missed was void anyway.
        if <int64_t>(s.void_below - s.r.rc) >= 0 and s.r.rc - s.r.lost == 0 and s.void_below != 0:
            count64(&s.n.voided, s.r.lost)
            reader_forgive(&s.r)
            return STEP_WORKED
        s.grace_until = now_ns() + GRACE_NS
        s.renew = True
        return SERVER_OVERRUN
    if status == INACTIVE:
        s.knows_epoch = True            # whatever epoch comes now began in this life
    if s.w.epoch != 0:
        writer_stop(&s.w)
        if status == INACTIVE:
            return SERVER_DISCONNECTED
    if status == INCOMPATIBLE_INTERFACE and s.refused != s.r.refused:
        s.refused = s.r.refused
        return SERVER_INCOMPATIBLE
    return STEP_IDLE


cdef uint64_t server_patience(const server_t *s) noexcept nogil:
    """Most nanoseconds between two looks."""
    return GRACE_NS if s.grace_until != 0 else patience(&s.r, s.has_last)


cdef struct group_t:
    server_t **servers
    int *events             # of each: -1, or a server_event and whether it was ...
    bint *unruly
    uint64_t n
    uint64_t *slow_ns       # of each: what its slow turns took in this budget period
    uint64_t period_ns      # when that began
    uint64_t first          # whose turn comes first
    waitset_t set


cdef int group_turn(group_t *g) noexcept nogil:
    """Every server works for at most TURN_ROUNDS rounds: STEP_WORKED, STEP_IDLE, or 0 when something happened."""
    cdef uint64_t k, at, unsettled, before, now = now_ns()
    cdef server_t *s
    cdef int step, result = STEP_IDLE, rounds
    if now - g.period_ns >= BUDGET_PERIOD_NS:
        g.period_ns = now
        memset(g.slow_ns, 0, g.n * sizeof(uint64_t))
    for k in range(g.n):
        at = (g.first + k) % g.n
        s = g.servers[at]
        unsettled = s.r.unsettled
        step = STEP_WORKED
        rounds = 0
        while step == STEP_WORKED and rounds < TURN_ROUNDS and s.r.unsettled == unsettled:
            step = server_step(s)
            rounds += 1
        before = now
        now = now_ns()
        if now - before >= SLOW_TURN_NS:
            g.slow_ns[at] += now - before
        g.events[at] = step if step >= 0 else -1
        g.unruly[at] = s.r.unsettled != unsettled or g.slow_ns[at] >= BUDGET_NS
        if step >= 0 or g.unruly[at]:
            result = 0
        elif step == STEP_WORKED and result == STEP_IDLE:
            result = STEP_WORKED
    g.first += 1
    return result


cdef void group_loop(group_t *g, uint64_t ns) noexcept nogil:
    """Serves all for at most ns nanoseconds, or until something happened to one: then events and unruly say what."""
    cdef uint64_t start = now_ns(), passed, patience, k, turns = 0
    cdef int result
    while True:
        result = group_turn(g)
        if result == 0:
            return
        turns += 1
        if result == STEP_WORKED and turns % 64 != 0:
            continue
        passed = now_ns() - start
        if passed >= ns:
            return
        if result == STEP_IDLE:
            patience = ns - passed
            for k in range(g.n):
                patience = min(patience, server_patience(g.servers[k]))
            readers_wait(&g.set, patience)


cdef class Server(ServerEngine):
    """Serves one Store over a pair of inline channels.

    request: the request channel's memory (read-only will do); response: the response channel's, writable, claimed
    by the caller. request_bell, response_bell: writable buffers or None. poll: microseconds, None: adaptive. watch: of
    all engines of this process, or None. checksum: "off", "auto" (with a client that has them) or "require".
    """
    FIELDS = ("valid", "kind", "id", "checksum")
    cdef server_t *s
    cdef readonly Store store

    def __cinit__(self):
        self.s = <server_t *>calloc(1, sizeof(server_t))
        if self.s == NULL:
            raise MemoryError()
        self.r = &self.s.r
        self.w = &self.s.w
        self.ending = &self.s.stop

    def __init__(self, request, response, Store store not None, *, request_protocol=BLOCK_REQUEST_PROTOCOL,
                 response_protocol=BLOCK_RESPONSE_PROTOCOL, request_bell=None, response_bell=None, poll=None,
                 Watch watch=None, checksum="off", bint threads=False):
        if self.store is not None:
            raise UsageError("a Server is initialised once")
        self.s.checksums = checksum_mode(checksum)
        self.store = store
        self.s.store = &store.s
        if self.s.checksums != CHECKSUM_OFF and not store_flies(&store.s):
            self.s.blocks = <uint8_t *>aligned_alloc(BLOCK_SIZE, MEMORY_BATCH * BLOCK_SIZE)
            if self.s.blocks == NULL:
                raise MemoryError()
        if store_flies(&store.s):
            self.s.files = <files_t *>calloc(1, sizeof(files_t))
            if self.s.files == NULL:
                raise MemoryError()
            self.s.files.stage = <uint8_t *>aligned_alloc(BLOCK_SIZE, (AIO_MOST + BATCH) * BLOCK_SIZE)
            if self.s.files.stage == NULL:
                raise MemoryError()
            aio_open(&self.s.files.flights.aio, threads or store.s.jobs != NULL, self.s.files.stage,
                     (AIO_MOST + BATCH) * BLOCK_SIZE)
            aio_add(&self.s.files.flights.aio, store.s.fd if store.s.direct_fd < 0 else store.s.direct_fd, store.s.device,
                    store_source(&store.s))
        self.bind(request, response, request_bell, response_bell, sizeof(block_event), sizeof(block_event),
                  request_protocol, response_protocol, poll, watch)
        self.introduce(store.identity, STORE_READ_ONLY if store.s.read_only else 0, 0)

    cdef int step(self) noexcept nogil:
        return server_step(self.s)

    cdef void wait(self, uint64_t ns) noexcept nogil:
        flights_rest(NULL if self.s.files == NULL else &self.s.files.flights, self.r, self.s.grace_until,
                     min(ns, server_patience(self.s)), self.ending)

    cdef void land(self) noexcept nogil:
        cdef files_t *f = self.s.files
        if f != NULL:
            server_land(self.s)
            aio_close(&f.flights.aio)
            self.s.files = NULL
            free(f.stage)
            free(f)

    @property
    def checksum(self):
        """Whether the client's requests have checksums: CHECKSUM of _engine."""
        return checksum_word(self.s.checksums, self.s.r.epoch != 0, self.s.sums, self.s.unsummed)

    @property
    def counters(self):
        """All counters of this server's life; readable while it runs."""
        cdef server_counters n = self.s.n
        cdef const flow_t *read = &self.s.flows[FLOW_READ]
        cdef const flow_t *write = &self.s.flows[FLOW_WRITE]
        cdef const flow_t *flush = &self.s.flows[FLOW_FLUSH]
        return {"reads": read.requests - read.refused, "writes": write.requests - write.refused,
                "syncs": flush.requests - flush.refused, "sizes": n.sizes,
                "bytes_read": read.bytes, "bytes_written": write.bytes, "batches": n.batches,
                "merged": read.merged + write.merged, "rejected": n.rejected, "failed": n.failed, "torn": n.torn,
                "voided": n.voided, "connections": n.connections, "overruns": self.s.r.overruns,
                "lost": self.s.r.lost_total, "quarantines": self.s.r.quarantines, "wakes": self.s.w.wakes,
                "sleeps": self.s.r.sleeps}

    @property
    def directions(self):
        """Of each disk, that is of the only one, what stands behind `directions` in the output of `muenfast stat --json`."""
        return (flows_words(self.s.flows, &self.s.sampler if self.s.files == NULL else NULL, True),)

    def inherit(self, Server other not None):
        """Goes on with another (closed) server's counters, after its channels were made anew."""
        self.s.n = other.s.n
        memcpy(self.s.flows, other.s.flows, sizeof(self.s.flows))
        self.succeed(other)

    def __dealloc__(self):
        if self.s != NULL:
            if self.held():
                writer_stop(&self.s.w)
            self.s.stop = STOP_NOW
            if self.s.files != NULL:
                self.s.files.flights.leaving = True
            self.land()
            free(self.s.blocks)
            free(self.s)
            self.s = NULL


@cython.final
cdef class Group:
    """Servers that one thread serves by turns: at most 128, each with a store that makes no system calls (`waits`).

    add(), remove() and run() belong to that thread.
    """
    cdef group_t g
    cdef list members

    def __cinit__(self):
        self.members = []
        self.g.servers = <server_t **>calloc(FUTEX_LIST_MOST, sizeof(server_t *))
        self.g.events = <int *>calloc(FUTEX_LIST_MOST, sizeof(int))
        self.g.unruly = <bint *>calloc(FUTEX_LIST_MOST, sizeof(bint))
        self.g.slow_ns = <uint64_t *>calloc(FUTEX_LIST_MOST, sizeof(uint64_t))
        self.g.set.readers = <reader_t **>calloc(FUTEX_LIST_MOST, sizeof(reader_t *))
        if (self.g.servers == NULL or self.g.events == NULL or self.g.unruly == NULL or self.g.slow_ns == NULL
                or self.g.set.readers == NULL):
            raise MemoryError()

    def __len__(self):
        return len(self.members)

    @property
    def servers(self):
        """Those that it serves."""
        return tuple(self.members)

    def add(self, Server server not None):
        """Takes a server that nobody runs. Raises UsageError."""
        if len(self.members) == FUTEX_LIST_MOST:
            raise UsageError(f"one thread serves at most {FUTEX_LIST_MOST} connections")
        if server.store.waits:
            raise UsageError("a store that may wait has a thread of its own")
        if not busy_enter(&server.busy):
            raise UsageError("another thread runs this Server")
        if not server.held():
            busy_leave(&server.busy)
            raise UsageError("this Server is closed")
        server.s.r.watch_stop = &server.s.stop
        self.members.append(server)
        self.arrange()

    def remove(self, Server server not None):
        """Lets go of a server, which another thread may run then. Raises ValueError."""
        self.members.remove(server)
        self.arrange()
        busy_leave(&server.busy)

    cdef void arrange(self):
        cdef Server server
        self.g.n = self.g.period_ns = 0
        for server in self.members:
            self.g.servers[self.g.n] = server.s
            self.g.set.readers[self.g.n] = &server.s.r
            self.g.n += 1
        self.g.set.n = self.g.n

    def run(self, seconds=1.0):
        """Serves all for about `seconds`, or until something happened: a list of (server, event), as Server.run() has them,
        and "unruly" where a client made the others wait: its counters went back, or its turns took too long.

        Nothing happens to a group without servers.
        """
        cdef uint64_t k, ns = <uint64_t>(seconds * 1e9)
        if self.g.n == 0:
            return []
        with nogil:
            prepare_thread(TIMER_SLACK_NS, 1)
            group_loop(&self.g, ns)
        found = []
        for k, member in enumerate(self.members):
            if self.g.events[k] >= 0:
                found.append((member, (<Server>member).happened(self.g.events[k])))
            if self.g.unruly[k]:
                found.append((member, Server.EVENTS[<int>SERVER_UNRULY]))
        return found

    @property
    def sleeps(self):
        """Times this thread went to sleep."""
        return self.g.set.sleeps

    @property
    def polls(self):
        """Whether it polls all its servers, for want of futex_waitv(2)."""
        return self.g.set.polls

    def __dealloc__(self):
        for server in self.members:
            busy_leave(&(<Server>server).busy)
        free(self.g.servers)
        free(self.g.events)
        free(self.g.unruly)
        free(self.g.slow_ns)
        free(self.g.set.readers)
