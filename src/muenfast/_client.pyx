"""Engines of block clients: disks whose requests a server across two channels executes; and the inline transport.

Runs without the GIL and allocates nothing per request. Trust: of every answer the header is copied once, validated, and
only the copy is used; payload is copied and checked before anybody sees it.
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from libc.errno cimport ECOMM, EIO, EPROTONOSUPPORT
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._blocksum cimport *
from muenfast._count cimport *
from muenfast._engine cimport *
from muenfast._ring cimport *
from muenfast._thread cimport *
from muenfast._target cimport (
    COLLECT_NOTHING, COLLECT_OVER, COLLECT_SOME, IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE, IO_ZERO, Target, attendance_t, io_t,
)
from muenfast._wire cimport *

import os as _os

from muenfast.errors import UsageError

cdef enum:
    LINUX_ERRNO_MAX = 4095  # linux/err.h MAX_ERRNO
    GARBLED_MOST = 3        # times that a request is issued again because a checksum was wrong
    WRITE_BATCH = 4         # writes published together, so that the server copies while we do (docs/decisions/003)

# Of FIELDS.
cdef enum:
    FAULT_TAG = 0
    FAULT_CHECKSUM = 1

# How long a client that (re)connects waits for a server to notice that it had gone: as long as a slow disk may take
# over the writes that it executes out of the request slots.
cdef uint64_t FAREWELL_NS = 5_000_000_000
# After this long without an answer to `size` from an active server the client starts over.
cdef uint64_t ANSWER_NS = 1_000_000_000
# How long the background thread stays away for a thread of a front end to take its place.
cdef uint64_t RELIEF_NS = 1_000_000
# A spin for answers that are due lasts as long as a queue of 32 requests does on a disk with 16 000 of them a second, while that
# paid lately. A sleep costs such a queue 40 microseconds, and its server what it takes to wake us (docs/decisions/008).
cdef uint64_t FLYING_SPIN_NS = 2_000_000
# Blocking calls look for signals this often.
cdef uint64_t SIGNALS_NS = 50_000_000


# An automatic depth (docs/decisions/005): measured over windows of so many answers, while requests waited for room;
# in every eighth window the double or the half is tried.
cdef enum:
    DEPTH_FIRST = 32
    DEPTH_LEAST = 16
    DEPTH_ANSWERS = 1024
    DEPTH_WINDOWS = 8


cdef enum:                  # phases of an inline connection
    PHASE_FAREWELL = PHASE_START    # inactive; waiting for the response channel to become so
    PHASE_SIZE = 1          # active; waiting for the answer to `size`


cdef uint64_t client_room(const client_t *c) noexcept nogil:
    """How many requests may be issued now. Precondition: lock held.

    At most `depth` of each disk are in flight; one that takes long does not count those answered after it. Invariant:
    head - tail <= window <= elements of either ring, and tail counts answered requests only, so that neither the request
    ring (the server has read what it answered) nor the response ring can overrun.
    Nothing is issued to a server other than the one whose store was checked: the reaper finds its epoch changed, too. Nor
    while there are strays: what is in flight then comes to an end, and shows whose they were.
    """
    cdef uint64_t room = c.window - (c.head - load_acquire64(&c.tail)), most = <uint64_t>c.depth * c.nqueues
    room = min(room, most - c.flying if c.flying < most and c.strays == 0 else 0)
    return room if load_relaxed64(&c.r.hdr.epoch) == c.server else 0



cdef inline uint32_t io_flow(const io_t *io) noexcept nogil:
    """The direction: zeros are written."""
    if io.kind == IO_READ:
        return FLOW_READ
    if io.kind == IO_SYNC:
        return FLOW_FLUSH
    return FLOW_DISCARD if io.kind == IO_DISCARD else FLOW_WRITE


cdef void client_counts(queue_t *q, entry_t *e, uint32_t flow, uint64_t since) noexcept nogil:
    """A request is about to be issued. Precondition: lock held. since: of its batch, as sampler_begin has it; what is rare
    is measured in any case."""
    e.flow = flow
    e.since = now_ns() if since == 0 and flow >= FLOW_DISCARD else since
    flow_begun(&q.flows[flow], 1)


cdef void client_issue(client_t *c) noexcept nogil:
    """Writes queued requests into the ring as far as the window allows. Precondition: lock held, state READY."""
    cdef queue_t *q = &c.queues[0]
    cdef uint64_t n, k, room, since
    cdef io_t *io
    cdef entry_t *e
    cdef block_event_header h
    cdef uint8_t *slot
    cdef const uint8_t *data
    cdef uint32_t state
    h.error = 0
    h.valid = 1
    while q.first != NULL:
        room = client_room(c)
        if room == 0:
            return
        n = 0
        io = q.first
        while io != NULL and n < room and n < BATCH:
            n += units_of(io) - io.issued
            io = io.next
        n = min(n, min(room, <uint64_t>(WRITE_BATCH if q.first.kind == IO_WRITE else BATCH)))
        writer_reserve(&c.w, n)
        since = sampler_begin(&c.sampler, c.slept)
        c.sampler.requests += n
        for k in range(n):
            io = q.first
            e = &c.entries[c.head % c.window]
            h.kind = EVENT_COMMAND if io.kind == IO_SYNC else (EVENT_WRITE if io.kind == IO_WRITE else EVENT_READ)
            h.id = COMMAND_SYNC if io.kind == IO_SYNC else io.block + io.issued
            h.priv = c.base + <uint32_t>c.head
            slot = writer_slot(&c.w, k)
            data = io.buf + <uint64_t>io.issued * BLOCK_SIZE if io.kind == IO_WRITE else NULL
            if c.sums:
                state = CRC32C_FIRST if data == NULL else crc32c(CRC32C_FIRST, data, BLOCK_SIZE)
                h.valid = event_sum(state, &h, c.w.wc + k, c.w.epoch)
            memcpy(slot, &h, sizeof(h))
            if data != NULL:
                copy_given(&c.giver, slot + sizeof(h), data, BLOCK_SIZE)
            e.priv = h.priv
            e.kind = h.kind
            e.id = h.id
            e.index = io.issued
            e.nblocks = 1
            e.io = io
            client_counts(q, e, io_flow(io), since)
            io.issued += 1
            if io.issued == units_of(io):
                q.first = io.next
            # From here on io may be done and gone: a hostile server answers what it has not been sent yet.
            store_release32(&e.state, ENTRY_ISSUED)
            store_release64(&c.head, c.head + 1)
        q.flying += n
        c.flying += n
        writer_publish(&c.w, n)


cdef bint client_waiting(const client_t *c) noexcept nogil:
    """Whether a request waits for room. Precondition: lock held."""
    cdef uint32_t k
    for k in range(c.nqueues):
        if c.queues[k].first != NULL:
            return True
    return False


cdef void client_adapt(client_t *c) noexcept nogil:
    """Finds the least depth that is as fast as any. Precondition: lock held, settled != 0, before issuing.

    Where requests wait for room, more in flight can only make them wait in the ring instead, unless the server gets
    more done: the double is kept for an eighth more answers per second, the half for at most a 32nd less. Only time in
    which requests wait counts.
    """
    cdef uint64_t now, pace
    cdef bint waiting = client_waiting(c)
    if c.waiting_since == 0 or waiting and c.measured + (c.answers - c.waiting_from) < DEPTH_ANSWERS:
        if waiting and c.waiting_since == 0:
            c.waiting_since = now_ns()
            c.waiting_from = c.answers
        return
    now = now_ns()
    c.measured += c.answers - c.waiting_from
    c.measured_ns += now - c.waiting_since
    c.waiting_from = c.answers
    c.waiting_since = now if waiting else 0
    if c.measured < DEPTH_ANSWERS or c.measured_ns == 0:
        return
    pace = c.measured * 1_000_000_000 // c.measured_ns
    c.measured = c.measured_ns = 0
    c.windows += 1
    if c.depth != c.settled:
        if pace > c.pace + c.pace // 8 or c.depth < c.settled and pace >= c.pace - c.pace // 32:
            c.settled = c.depth
            c.pace = pace
        c.depth = c.settled
        return
    c.pace = pace if c.pace == 0 else (3 * c.pace + pace) // 4
    if c.windows % DEPTH_WINDOWS == 0:
        c.larger = not c.larger
        c.depth = min(2 * c.settled, c.window) if c.larger else max(c.settled // 2, <uint32_t>DEPTH_LEAST)


cdef void client_gave_up(queue_t *q, const io_t *io) noexcept nogil:
    """Counts what fails without an answer; any thread."""
    fetch_add_relaxed64(&q.n.errors, 1)
    fetch_add_relaxed64(&q.flows[io_flow(io)].errors[ERROR_LOST], 1)


cdef void client_submit(void *ctx, io_t *first) noexcept nogil:
    cdef queue_t *q = <queue_t *>ctx
    cdef client_t *c = q.client
    cdef io_t *io = first
    cdef io_t *last = first
    cdef io_t *following
    cdef bint refuse
    while io != NULL:
        io.error = 0
        io.issued = 0
        io.garbled = 0
        io.pending = units_of(io)
        last = io
        io = io.next
    pthread_mutex_lock(&c.lock)
    refuse = c.state >= CLIENT_FAILED or (c.state == CLIENT_LOST and c.fail_fast)
    if not refuse:
        if q.first == NULL:
            q.first = first
        else:
            q.last.next = first
        q.last = last
        if c.state == CLIENT_READY:
            c.issue(c)
    pthread_mutex_unlock(&c.lock)
    if refuse:
        io = first
        while io != NULL:
            following = io.next
            io.error = -EIO
            client_gave_up(q, io)
            io.done(io)
            io = following


cdef void client_finish(client_t *c, io_t *finished, bint given_up) noexcept nogil:
    """Calls done of a list of finished requests, counting them; `issued` of each is its device. given_up: without an
    answer."""
    cdef io_t *io
    cdef queue_t *q
    while finished != NULL:
        io = finished
        finished = io.next
        q = &c.queues[io.issued]
        if given_up:
            client_gave_up(q, io)
        elif io.error != 0:
            fetch_add_relaxed64(&q.n.errors, 1)
        elif io.kind == IO_READ:
            count64(&q.n.reads, io.nblocks)
            count64(&q.n.bytes_read, <uint64_t>io.nblocks * q.block_size)
        elif io.kind == IO_WRITE:
            count64(&q.n.writes, io.nblocks)
            count64(&q.n.bytes_written, <uint64_t>io.nblocks * q.block_size)
        elif io.kind == IO_SYNC:
            count64(&q.n.syncs, 1)
        else:
            count64(&q.n.discards, io.nblocks)
        io.done(io)


cdef ring_status client_reap(client_t *c) noexcept nogil:
    """Takes one batch of answers. Precondition: reaping is ours.

    Payload is copied to the callers' buffers before the batch is validated; nothing is finished before that, and
    an answer that turns out void leaves its request in flight.
    """
    cdef uint64_t available, n, k
    cdef ring_status status = reader_peek(&c.r, &available)
    cdef block_event_header h
    cdef const uint8_t *slot
    cdef const uint8_t *data
    cdef entry_t *e
    cdef entry_t *matched[BATCH]
    cdef int32_t errors[BATCH]
    cdef uint64_t matches = 0, stale = 0, wrong = 0, unread = 0
    cdef bint ours
    if status != SUCCESS:
        return status
    n = available if available < BATCH else BATCH
    for k in range(n):
        slot = reader_slot(&c.r, k)
        memcpy(&h, slot, sizeof(h))
        e = &c.entries[<uint32_t>(h.priv - c.base) % c.window]
        data = slot + sizeof(h)
        ours = load_acquire32(&e.state) == ENTRY_ISSUED and e.priv == h.priv and e.kind == h.kind and e.id == h.id
        if ours and h.kind == EVENT_READ and h.error == 0 and e.io != NULL:
            copy_taken(e.io.buf + <uint64_t>e.index * BLOCK_SIZE, data, BLOCK_SIZE)
            data = e.io.buf + <uint64_t>e.index * BLOCK_SIZE
        if c.sums:                      # of what is wrong, or was when the server read it, nothing is believed
            if not client_sum(c, &h, k, data):
                wrong += 1
                continue
            if h.error == -ECOMM:
                unread += 1
                continue
        if not ours:
            stale += 1
            continue
        e.state = ENTRY_MATCHED
        matched[matches] = e
        errors[matches] = h.error
        matches += 1
    if not reader_intact(&c.r):
        for k in range(matches):
            matched[k].state = ENTRY_ISSUED
        return reader_recover(&c.r)
    reader_advance(&c.r, n)
    client_stale(c, stale)
    client_settle(c, matched, errors, matches)
    if c.sums:
        client_stray(c, wrong, unread + stale)
    return SUCCESS


cdef bint client_sum(const client_t *c, const block_event_header *h, uint64_t k, const uint8_t *data) noexcept nogil:
    """Whether the checksum of the k-th answer is right, h a copy of its header. data: its block, where it has one."""
    cdef uint32_t state = CRC32C_FIRST
    if h.kind == EVENT_READ and h.error == 0:
        state = crc32c(state, data, BLOCK_SIZE)
    return event_sum(state, h, c.r.rc + k, c.r.epoch) == h.valid


cdef void client_stray(client_t *c, uint64_t wrong, uint64_t others) noexcept nogil:
    """So many answers more had a wrong checksum, or came to nobody knows which requests: the server could not read those, or
    they are not in flight. Every request has one answer: once there are no more in flight than strays, those have had theirs.
    Precondition: reaping is ours, there are checksums."""
    cdef entry_t *matched[BATCH]
    cdef int32_t errors[BATCH]
    cdef uint64_t at, flying, found = 1
    if wrong != 0:
        reader_blame(&c.r, FAULT_CHECKSUM, wrong)
    if wrong + others + c.strays == 0:
        return
    pthread_mutex_lock(&c.lock)
    c.strays += wrong + others
    flying = c.flying
    pthread_mutex_unlock(&c.lock)
    if flying > c.strays:
        return
    while found != 0:                   # nothing is issued meanwhile
        found = 0
        at = load_acquire64(&c.tail)
        while at != load_acquire64(&c.head) and found < BATCH:
            if load_acquire32(&c.entries[at % c.window].state) == ENTRY_ISSUED:
                matched[found] = &c.entries[at % c.window]
                matched[found].state = ENTRY_MATCHED
                errors[found] = -ECOMM
                found += 1
            at += 1
        if found != 0:
            if c.free != NULL:
                c.free(c, matched, found)
            client_settle(c, matched, errors, found)
    pthread_mutex_lock(&c.lock)
    c.strays = 0
    if c.state == CLIENT_READY:
        c.issue(c)
    pthread_mutex_unlock(&c.lock)


cdef void client_stale(client_t *c, uint64_t n) noexcept nogil:
    """n answers were to nothing that is in flight."""
    if n != 0:
        count64(&c.n.stale, n)
        reader_blame(&c.r, FAULT_TAG, n)


cdef void client_again(client_t *c, io_t *again) noexcept nogil:
    """Puts back requests that were answered, but with a wrong checksum; `issued` of each is its device. Precondition: lock
    held. Behind one that is partly issued: client_requeue() looks for that in the first place."""
    cdef io_t *io
    cdef io_t **link
    cdef queue_t *q
    while again != NULL:
        io = again
        again = io.next
        q = &c.queues[io.issued]
        link = &q.first
        while link[0] != NULL and (link[0].issued != 0 or link[0].garbled != 0):
            link = &link[0].next
        count64(&q.n.reissued, 1)
        io.issued = 0
        io.error = 0
        io.pending = units_of(io)
        io.garbled += 1
        io.next = link[0]
        if link[0] == NULL:
            q.last = io
        link[0] = io


cdef void client_settle(client_t *c, entry_t **matched, const int32_t *errors, uint64_t n) noexcept nogil:
    """Ends n requests (ENTRY_MATCHED) whose answers were validated, and issues what waited for their room.

    Precondition: reaping is ours. errors: 0 or what the server says; what is no negative errno becomes EIO. With checksums
    ECOMM is that a request or its answer came with a wrong one: it is issued again, whole, GARBLED_MOST times.
    """
    cdef uint64_t k, tail, head, now = 0
    cdef uint32_t devices[BATCH]
    cdef flow_t *flows[BATCH]
    cdef uint32_t device, nblocks
    cdef int32_t error
    cdef flow_t *f
    cdef io_t *io
    cdef io_t *finished = NULL
    cdef io_t **link = &finished
    cdef io_t *again = NULL
    cdef io_t **again_link = &again
    cdef bint sums = c.sums, garbled
    count64(&c.n.batches, 1)
    count64(&c.answers, n)
    for k in range(n):
        io = matched[k].io
        device = devices[k] = matched[k].device
        nblocks = matched[k].nblocks
        f = flows[k] = &c.queues[device].flows[matched[k].flow]
        count64(&f.requests, 1)
        error = errors[k] if -LINUX_ERRNO_MAX <= errors[k] <= 0 else -EIO
        garbled = sums and error == -ECOMM
        if garbled and io != NULL and io.garbled == GARBLED_MOST:
            error = -EIO
            garbled = False
        if error != 0:
            if not garbled:
                flow_failed(f, 1, error)
        elif matched[k].flow != FLOW_FLUSH:
            count64(&f.bytes, <uint64_t>nblocks * c.queues[device].block_size)
        if matched[k].since != 0:
            now = now_ns() if now == 0 else now
            flow_took(f, now - matched[k].since, 1)
        store_release32(&matched[k].state, ENTRY_FREE)
        if io == NULL:
            continue
        if error != 0 and not (garbled and io.error != 0):
            io.error = error
        io.pending -= nblocks
        if io.pending == 0:
            io.issued = device
            io.next = NULL
            if sums and io.error == -ECOMM:
                again_link[0] = io
                again_link = &io.next
            else:
                link[0] = io
                link = &io.next
    tail = c.tail
    head = load_acquire64(&c.head)
    while tail != head and load_acquire32(&c.entries[tail % c.window].state) == ENTRY_FREE:
        tail += 1
    store_release64(&c.tail, tail)
    pthread_mutex_lock(&c.lock)         # always: an issuer that found the window full has queued under it
    c.slept = c.r.sleeps
    c.flying -= n
    for k in range(n):
        c.queues[devices[k]].flying -= 1
        flow_ended(flows[k], 1)
    if again != NULL:
        client_again(c, again)
    if c.state == CLIENT_READY:
        if c.settled != 0:
            client_adapt(c)
        c.issue(c)
    pthread_mutex_unlock(&c.lock)
    client_finish(c, finished, False)


cdef void client_lost(client_t *c) noexcept nogil:
    """Stops issuing; the background thread will reconnect. Precondition: reaping is ours."""
    pthread_mutex_lock(&c.lock)
    if c.state == CLIENT_READY:
        store_release32(&c.state, CLIENT_LOST)
        c.phase = PHASE_START
        c.phase_since = 0
    pthread_mutex_unlock(&c.lock)
    fetch_add_acqrel32(&c.chore, 1)
    futex_wake_all(&c.chore)


cdef bint client_grab(client_t *c) noexcept nogil:
    """Whether reaping is ours now; never before a taker."""
    return load_relaxed32(&c.takers) == 0 and exchange_acqrel32(&c.reaping, 1) == 0


cdef void client_release(client_t *c) noexcept nogil:
    store_release32(&c.reaping, 0)
    wake_callers(c)


cdef void wake_callers(client_t *c) noexcept nogil:
    """Ordering: what the callers wait for was stored before; pairs with the fence in client_await."""
    fence_seq_cst()
    if load_relaxed32(&c.sleepers) != 0:
        fetch_add_acqrel32(&c.turn, 1)
        futex_wake_all(&c.turn)


cdef ring_status client_serve(client_t *c, uint64_t ns, const uint32_t *until) noexcept nogil:
    """Reaps for at most ns nanoseconds, until until[0] or a taker comes; the last status.

    Precondition: reaping is ours, state is READY.
    """
    cdef uint64_t start = now_ns(), passed
    cdef ring_status status
    while True:
        status = c.reap(c)
        if status != SUCCESS and status != NO_DATA:
            client_lost(c)
            return status
        if load_acquire32(until) != 0 or load_relaxed32(&c.takers) != 0:
            return status
        # Answers without an end, wanted or not, keep nobody from the policies of the background thread.
        if status == NO_DATA or (c.n.batches & 0xff) == 0:
            passed = now_ns() - start
            if passed >= ns:
                return status
        if status == NO_DATA:
            c.r.spin_ns = FLYING_SPIN_NS if load_relaxed64(&c.flying) != 0 else c.spin_ns
            reader_wait(&c.r, ns - passed, until)


# ------------------------------------------------------------------ a front end's thread that takes the answers itself

cdef bint client_rings(const client_t *c) noexcept nogil:
    """Whether the server wakes who sleeps on its bell. Precondition: reaping is ours, or lock held."""
    cdef uint64_t epoch = load_relaxed64(&c.r.hdr.epoch)
    return c.r.bell != NULL and epoch != 0 and load_relaxed64(&c.r.bell.ringer) == epoch


cdef bint client_enter(void *ctx) noexcept nogil:
    """From a server that does not ring the background thread takes answers: it knows how to poll, and is not asked away."""
    cdef client_t *c = (<queue_t *>ctx).client
    cdef bint ours = False
    if load_acquire32(&c.state) != CLIENT_READY or load_relaxed32(&c.attended) != 0:
        return False
    pthread_mutex_lock(&c.lock)         # under which state and bell are exchanged
    if c.state == CLIENT_READY and client_rings(c):
        ours = client_grab(c)
        if ours:
            store_release32(&c.attended, 1)
        elif load_relaxed32(&c.attended) == 0 and load_relaxed32(&c.relieve) == 0:
            store_release32(&c.relieve, 1)
            bell_kick(c.r.bell)
    pthread_mutex_unlock(&c.lock)
    return ours


cdef void client_leave(void *ctx) noexcept nogil:
    cdef client_t *c = (<queue_t *>ctx).client
    store_release32(&c.attended, 0)
    client_release(c)
    fetch_add_acqrel32(&c.chore, 1)
    futex_wake_all(&c.chore)


cdef int client_collect(void *ctx) noexcept nogil:
    cdef client_t *c = (<queue_t *>ctx).client
    cdef ring_status status
    if load_relaxed32(&c.takers) == 0 and load_acquire32(&c.state) == CLIENT_READY:
        status = c.reap(c)
        if status == SUCCESS:
            return COLLECT_SOME
        if status != NO_DATA:
            client_lost(c)
        elif client_rings(c):
            return COLLECT_NOTHING
    client_leave(ctx)
    return COLLECT_OVER


cdef uint32_t *client_listen(void *ctx, uint32_t *seen) noexcept nogil:
    cdef client_t *c = (<queue_t *>ctx).client
    seen[0] = load_acquire32(&c.r.bell.seq)
    store_relaxed32(&c.r.bell.waiters, 1)
    fence_seq_cst()                     # pairs with ring(): the announcement before the last look
    if reader_ready(&c.r) or load_relaxed32(&c.takers) != 0:
        return NULL
    count64(&c.r.sleeps, 1)
    return &c.r.bell.seq


cdef attendance_t ATTENDANCE
ATTENDANCE.enter = client_enter
ATTENDANCE.collect = client_collect
ATTENDANCE.listen = client_listen
ATTENDANCE.leave = client_leave


cdef struct blocking_t:
    client_t *c
    uint32_t left           # requests not done
    uint32_t done
    int32_t error           # of the first that failed


cdef void blocking_done(io_t *io) noexcept nogil:
    cdef blocking_t *b = <blocking_t *>io.user
    cdef client_t *c = b.c
    if io.error != 0 and b.error == 0:
        b.error = io.error
    # Requests of one call are finished by one thread at a time: the reaper, or the submitter when refused.
    b.left -= 1
    if b.left == 0:
        store_release32(&b.done, 1)     # b may be gone after this
        wake_callers(c)


cdef void client_await(client_t *c, blocking_t *b, uint64_t ns) noexcept nogil:
    """Waits until b is done, at most ns nanoseconds: reaps itself where nobody else does."""
    cdef uint64_t start = now_ns(), passed = 0
    cdef uint32_t seen
    while load_acquire32(&b.done) == 0 and passed < ns:
        if (load_relaxed32(&c.background) == 0 and load_acquire32(&c.state) == CLIENT_READY and client_grab(c)):
            if load_acquire32(&c.state) == CLIENT_READY:
                client_serve(c, ns - passed, &b.done)
            client_release(c)
        else:
            seen = load_acquire32(&c.turn)
            fetch_add_acqrel32(&c.sleepers, 1)
            fence_seq_cst()             # pairs with wake_callers
            if load_acquire32(&b.done) == 0:
                futex_wait_ns(&c.turn, seen, min(ns - passed, <uint64_t>5_000_000))
            fetch_add_acqrel32(&c.sleepers, <uint32_t>-1)
        passed = now_ns() - start


cdef void client_take(client_t *c) noexcept nogil:
    """Takes the right to reap from whoever has it, before all who merely wait for answers.

    Bounded by the longest client_serve or client_connect: those return once there is a taker.
    """
    fetch_add_acqrel32(&c.takers, 1)
    while exchange_acqrel32(&c.reaping, 1) != 0:
        sleep_ns(100_000)
    fetch_add_acqrel32(&c.takers, <uint32_t>-1)


cdef bint client_take_turn(client_t *c, uint64_t ns) noexcept nogil:
    """As client_take, but after all who use that, and for at most ns nanoseconds."""
    cdef uint64_t start = now_ns()
    while not client_grab(c):
        if now_ns() - start >= ns:
            return False
        sleep_ns(100_000)
    return True


cdef void client_forget(client_t *c, blocking_t *b) noexcept nogil:
    """Gives up on all requests of an interrupted call: nobody touches its memory afterwards.

    Precondition: reaping is ours.
    """
    cdef uint64_t k
    cdef io_t **link
    cdef io_t *io
    cdef queue_t *q
    pthread_mutex_lock(&c.lock)
    for k in range(c.window):
        if c.entries[k].state != ENTRY_FREE and c.entries[k].io != NULL and c.entries[k].io.user == <void *>b:
            c.entries[k].io = NULL
    for k in range(c.nqueues):
        q = &c.queues[k]
        link = &q.first
        q.last = NULL
        while link[0] != NULL:
            io = link[0]
            if io.user == <void *>b:
                link[0] = io.next
            else:
                q.last = io
                link = &io.next
    pthread_mutex_unlock(&c.lock)


cdef void client_landed(queue_t *q) noexcept nogil:
    """Nothing of this disk is in flight any more. Precondition: lock held."""
    cdef int flow
    q.flying = 0
    for flow in range(FLOWS):
        store_relaxed64(&q.flows[flow].depth, 0)


cdef void client_fail(client_t *c, uint32_t state) noexcept nogil:
    """Answers everything outstanding with EIO. Precondition: reaping is ours. state: the new one."""
    cdef uint64_t k
    cdef entry_t *e
    cdef io_t *io
    cdef io_t *finished = NULL
    cdef io_t *following
    pthread_mutex_lock(&c.lock)
    store_release32(&c.state, state)
    c.phase = PHASE_START               # what was given up is never answered in a later life's name
    c.phase_since = 0
    for k in range(c.nqueues):
        io = c.queues[k].first
        c.queues[k].first = c.queues[k].last = NULL
        client_landed(&c.queues[k])
        while io != NULL:               # queued, perhaps partly issued: unissued blocks are answered here
            following = io.next
            io.error = -EIO
            io.pending -= units_of(io) - io.issued
            if io.pending == 0:
                io.issued = <uint32_t>k
                io.next = finished
                finished = io
            io = following
    for k in range(c.window):
        e = &c.entries[k]
        if e.state == ENTRY_FREE:
            continue
        store_release32(&e.state, ENTRY_FREE)
        io = e.io
        if io == NULL:
            continue
        io.error = -EIO
        io.pending -= e.nblocks
        if io.pending == 0:
            io.issued = e.device
            io.next = finished
            finished = io
    store_release64(&c.tail, c.head)
    c.flying = c.strays = 0
    pthread_mutex_unlock(&c.lock)
    client_finish(c, finished, True)


cdef void client_requeue(client_t *c) noexcept nogil:
    """Puts back, before what is queued and in their order, all requests in flight. Precondition: lock held, reaping is
    ours.

    A request goes back whole: until all of it is answered its caller may count on none of it.
    """
    cdef entry_t *e
    cdef io_t *io
    cdef io_t *first
    cdef io_t *last
    cdef queue_t *q
    cdef uint64_t k, at
    for k in range(c.nqueues):
        q = &c.queues[k]
        client_landed(q)
        first = last = NULL
        at = c.tail
        while at != c.head:
            e = &c.entries[at % c.window]
            io = e.io
            at += 1
            if e.state == ENTRY_FREE or e.device != k:
                continue
            e.state = ENTRY_FREE
            if io == NULL:
                continue
            count64(&q.n.reissued, 1)
            if io.issued == 0:          # put back with an earlier part of it
                continue
            io.issued = 0
            io.error = 0
            io.pending = units_of(io)
            if io == q.first:           # partly issued: it stands there still
                continue
            if first == NULL:
                first = io
            else:
                last.next = io
            last = io
        if first != NULL:
            last.next = q.first
            if q.first == NULL:
                q.last = last
            q.first = first
    c.head = c.flying = c.strays = 0
    store_release64(&c.tail, 0)


cdef void client_introduced(client_t *c) noexcept nogil:
    """Takes what the bell says of the server that answers, to be validated afterwards.

    It counts only while the answering epoch stands in it: what a predecessor left there does not vouch for a server
    that has no bell.
    """
    memset(c.store, 0, sizeof(c.store))
    c.flags = c.zeroes = 0
    if c.r.bell != NULL and load_acquire64(&c.r.bell.ringer) == c.r.epoch:
        memcpy(c.store, c.r.bell.store, sizeof(c.store))
        c.flags = load_relaxed32(&c.r.bell.flags)
        c.zeroes = load_relaxed32(&c.r.bell.zeroes)


cdef bint client_take_size(client_t *c, uint64_t available) noexcept nogil:
    """Looks through one batch of answers for the one to `size`; whether it was there and good."""
    cdef uint64_t n = available if available < BATCH else BATCH
    cdef uint64_t k, sectors = 0
    cdef block_event_header h
    cdef block_offer answer
    cdef const uint8_t *slot
    cdef bint found = False, demanded = False
    cdef uint32_t state
    cdef int agreed = OFFER_NONE
    for k in range(n):
        slot = reader_slot(&c.r, k)
        memcpy(&h, slot, sizeof(h))
        if h.kind == EVENT_COMMAND and h.id == COMMAND_SIZE and h.priv == c.base - 1 and not found:
            memcpy(&answer, slot + sizeof(h), sizeof(answer))
            if c.checksums != CHECKSUM_OFF:
                agreed = answer_look(&answer, c.nonce)
                state = crc32c(CRC32C_FIRST, slot + sizeof(h), BLOCK_SIZE)
                if agreed == OFFER_GOOD and (h.error != 0 or event_sum(state, &h, c.r.rc + k, c.r.epoch) != h.valid):
                    agreed = OFFER_GARBLED
            sectors = answer.sectors
            found = h.error == 0
            demanded = h.error == -EPROTONOSUPPORT
    client_introduced(c)
    if not reader_intact(&c.r):         # covers the bell: a server ends its predecessor's epoch before it speaks
        reader_recover(&c.r)
        return False
    reader_advance(&c.r, n)
    if agreed == OFFER_GARBLED:         # asked anew, and until then nobody knows
        reader_blame(&c.r, FAULT_CHECKSUM, 1)
        return False
    c.demanded = demanded
    if found:
        c.sectors = sectors
        c.agreed = agreed == OFFER_GOOD
    return found


cdef bint client_connect(client_t *c, uint64_t ns) noexcept nogil:
    """Goes on with connecting for at most ns nanoseconds; True once `size` was answered (sectors is set).

    First the request channel is made inactive and left untouched until the server, if there is one, has followed
    (bounded): it may still be executing writes out of the slots that a new epoch zeroes.
    Precondition: reaping is ours, state is CONNECTING or LOST.
    """
    cdef uint64_t start = now_ns(), now, passed, available
    cdef block_event_header h
    cdef block_offer offer
    cdef uint8_t *slot
    cdef ring_status status
    while True:
        now = now_ns()
        passed = now - start
        if passed >= ns or load_relaxed32(&c.stop) != 0 or load_relaxed32(&c.takers) != 0:
            return False
        if c.phase == PHASE_FAREWELL:
            if c.phase_since == 0:
                c.phase_since = now
                writer_stop(&c.w)
            c.r.epoch = c.r.refused = 0
            status = reader_peek(&c.r, &available)
            # What is incompatible is no server of ours.
            if status != INACTIVE and status != INCOMPATIBLE_INTERFACE and now - c.phase_since < FAREWELL_NS:
                sleep_ns(50_000)
                continue
            c.base = <uint32_t>random_epoch()
            c.r.epoch = c.r.refused = 0
            writer_start(&c.w, random_epoch())
            memset(&h, 0, sizeof(h))
            h.kind = EVENT_COMMAND
            h.id = COMMAND_SIZE
            h.valid = 1
            h.priv = c.base - 1
            writer_reserve(&c.w, 1)
            slot = writer_slot(&c.w, 0)
            memcpy(slot, &h, sizeof(h))
            if c.checksums != CHECKSUM_OFF:
                memset(&offer, 0, sizeof(offer))
                offer.magic = OFFER_MAGIC
                offer.again = OFFER_AGAIN
                offer.nonce = c.nonce = random_epoch()
                offer.sum = offer_sum(&offer, &h, c.w.wc, c.w.epoch)
                memcpy(slot + sizeof(h), &offer, sizeof(offer))
            writer_publish(&c.w, 1)
            c.phase = PHASE_SIZE
            c.phase_since = now
        status = reader_peek(&c.r, &available)
        if status == SUCCESS:
            if client_take_size(c, available):
                c.phase = PHASE_ANSWERED
                return True
            sleep_ns(50_000)            # a foreign answer, or counters that contradict each other
        elif status == EPOCH_CHANGED or status == OVERRUN_DETECTED:
            sleep_ns(50_000)
        elif status == INACTIVE or status == INCOMPATIBLE_INTERFACE:
            c.phase_since = now         # nobody there: waiting costs nothing
            reader_wait(&c.r, ns - passed, &c.stop)
        elif status == NO_DATA:
            if now - c.phase_since > ANSWER_NS:
                c.phase = PHASE_FAREWELL
                c.phase_since = 0
                continue
            reader_wait(&c.r, min(ns - passed, ANSWER_NS), &c.stop)


cdef bint client_answered(client_t *c) noexcept nogil:
    """Whether a server answered that is still there; else it has to be asked again. Precondition: reaping is ours."""
    if c.state >= CLIENT_FAILED or c.state == CLIENT_READY or c.phase != PHASE_ANSWERED:
        return False
    if load_acquire64(&c.r.hdr.epoch) != c.r.epoch:
        c.phase = PHASE_START
        c.phase_since = 0
        return False
    return True


cdef void client_resume(client_t *c) noexcept nogil:
    """Becomes READY in the epoch of the server that answered, and issues again, in their order, all requests not answered.

    Precondition: reaping is ours since client_answered(). What takes that server's place meanwhile is found as any other.
    """
    pthread_mutex_lock(&c.lock)
    c.server = c.r.epoch
    c.sums = c.agreed
    client_requeue(c)
    c.waiting_since = c.measured = c.measured_ns = 0
    c.window = WINDOW
    while c.window > 1 and (c.window > c.w.elements or c.window > c.r.elements or c.window > c.allowed):
        c.window //= 2
    count64(&c.n.lives, 1)
    if c.renew != NULL:
        c.renew(c)
    store_release32(&c.state, CLIENT_READY)
    c.issue(c)
    pthread_mutex_unlock(&c.lock)
    wake_callers(c)


cdef class Disk(Target):
    """One disk of a client: a Target, and blocking calls for any number of threads.

    Made by its client, whose `disks` it is in.
    """

    cdef client_t *engine(self) except NULL:
        """Its client's. Raises UsageError where it has none."""
        if self.queue == NULL:
            raise UsageError("a Disk is made by its client")
        return self.queue.client

    cdef int execute(self, io_t *ios, uint64_t n) except -1:
        """Runs n requests (an array) to their end without the GIL; raises OSError with the first error."""
        cdef blocking_t b
        cdef client_t *c = self.usable()
        cdef uint64_t k
        b.c = c
        b.left = <uint32_t>n
        b.done = 0
        b.error = 0
        for k in range(n):
            ios[k].done = blocking_done
            ios[k].user = &b
            ios[k].next = &ios[k + 1] if k + 1 < n else NULL
        fetch_add_acqrel32(&c.callers, 1)
        store_release32(&c.wanted, 1)
        try:
            with nogil:
                client_submit(self.queue, ios)
                client_await(c, &b, SIGNALS_NS)
            while load_acquire32(&b.done) == 0:
                # A handler may close the device: that waits for those inside.
                fetch_add_acqrel32(&c.callers, <uint32_t>-1)
                try:
                    PyErr_CheckSignals()
                except BaseException:
                    fetch_add_acqrel32(&c.callers, 1)
                    with nogil:
                        client_take(c)
                        client_forget(c, &b)
                        client_release(c)
                    raise
                fetch_add_acqrel32(&c.callers, 1)
                with nogil:
                    client_await(c, &b, SIGNALS_NS)
        finally:
            fetch_add_acqrel32(&c.callers, <uint32_t>-1)
        if b.error != 0:
            raise OSError(-b.error, _os.strerror(-b.error))
        return 0

    cdef client_t *usable(self) except NULL:
        """The engine, where this process may still use it. Raises UsageError."""
        cdef client_t *c = self.engine()
        if self.client.request.forked:
            raise UsageError("this device belongs to the process that was forked; open one of your own")
        if c.state == CLIENT_CLOSED:
            raise UsageError("this device is closed")
        return c

    cdef uint64_t place(self, object offset, uint64_t length) except? 1:
        """The byte offset, which lies on the disk with the `length` bytes behind it. Raises UsageError."""
        cdef uint64_t size = self.nblocks * self.block_size, at
        cdef client_t *c = self.usable()
        if size == 0:
            if load_acquire32(&c.state) == CLIENT_FAILED:
                raise OSError(EIO, _os.strerror(EIO))
            raise UsageError("no server has answered yet: wait_ready() waits for one")
        offset = PyNumber_Index(offset)     # numpy's numbers wrap
        try:
            at = offset
        except OverflowError:               # negative, or no 64-bit number
            at = <uint64_t>-1
        if at > size or length > size - at:
            raise UsageError(f"bytes {offset} to {offset + length} reach beyond the disk's {size}")
        return at

    @property
    def counters(self):
        """What was asked of this disk in its client's life; readable while it runs. Raises UsageError without a client."""
        cdef disk_counters n
        self.engine()
        n = self.queue.n
        return {"reads": n.reads, "writes": n.writes, "discards": n.discards, "syncs": n.syncs,
                "bytes_read": n.bytes_read, "bytes_written": n.bytes_written, "errors": n.errors, "reissued": n.reissued}

    @property
    def directions(self):
        """What stands behind `directions` in the output of `muenfast stat --json`. Raises UsageError without a client."""
        return flows_words(self.queue.flows, &self.engine().sampler, False)

    @property
    def in_flight(self):
        """Requests written and not answered. Raises UsageError without a client."""
        self.engine()
        return load_relaxed64(&self.queue.flying)

    def move(self, bint write, offset, buffer):
        """Moves a buffer's bytes to the disk, or from it, at byte `offset`; how many. Raises OSError, UsageError.

        -1, and nothing was moved, where offset or length are no whole blocks.
        """
        cdef Py_buffer view
        cdef uint64_t at
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if write else PyBUF_WRITABLE)
        try:
            at = self.place(offset, view.len)
            if view.len != 0 and ((at | <uint64_t>view.len) & (self.block_size - 1)) != 0:
                return -1
            self.whole(IO_WRITE if write else IO_READ, at, <uint8_t *>view.buf, view.len)
            return view.len
        finally:
            PyBuffer_Release(&view)

    def read(self, length, offset):
        """`length` bytes from byte `offset` on; None where they are no whole blocks. Raises OSError, UsageError."""
        cdef uint64_t at
        cdef bytes data
        length = PyNumber_Index(length)
        if not 0 <= length < 1 << 63:
            raise UsageError("a length is a number of bytes, 0 to 2^63 - 1", value=length)
        at = self.place(offset, length)
        if length != 0 and ((at | <uint64_t>length) & (self.block_size - 1)) != 0:
            return None
        data = PyBytes_FromStringAndSize(NULL, length)
        self.whole(IO_READ, at, <uint8_t *>PyBytes_AS_STRING(data), length)
        return data

    cdef int whole(self, uint32_t kind, uint64_t at, uint8_t *buf, uint64_t length) except -1:
        """Whole blocks, buf NULL where the request has no payload. Precondition: place() took them."""
        cdef io_t io
        if length == 0:
            return 0
        if length // self.block_size > 0xffffffff:
            raise UsageError(f"{length} bytes are too many for one call, which takes less than 2^32 blocks of "
                             f"{self.block_size}")
        io.kind = kind
        io.block = at // self.block_size
        io.nblocks = <uint32_t>(length // self.block_size)
        io.buf = buf
        return self.execute(&io, 1)

    def scattered(self, bint write, offsets, buffer):
        """One request per byte offset in `offsets`, all in flight together; buffer holds len(offsets) equal pieces. Bytes
        moved. Raises OSError, UsageError."""
        cdef Py_buffer view
        cdef io_t *ios = NULL
        cdef uint64_t n = len(offsets), k = 0, each, at
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if write else PyBUF_WRITABLE)
        try:
            self.place(0, 0)
            if n == 0 and view.len == 0:
                return 0
            each = 0 if n == 0 else <uint64_t>view.len // n
            if n > 0xffffffff or each == 0 or each * n != <uint64_t>view.len or each % self.block_size != 0:
                raise UsageError(f"data of {view.len} bytes is not one piece for each of {n} offsets, all of the same "
                                 f"whole blocks of {self.block_size} (offsets come first, then data)")
            each //= self.block_size
            if each > 0xffffffff:
                raise UsageError(f"{each * self.block_size} bytes are too many for one piece, which takes less than 2^32 "
                                 f"blocks of {self.block_size}")
            ios = <io_t *>calloc(n, sizeof(io_t))
            if ios == NULL:
                raise MemoryError()
            try:
                for offset in offsets:
                    if k == n:
                        break
                    at = PyNumber_Index(offset)
                    if at % self.block_size != 0:
                        raise UsageError(f"an offset is a multiple of {self.block_size} here", value=offset)
                    at //= self.block_size
                    if at > self.nblocks or each > self.nblocks - at:
                        raise OverflowError()
                    ios[k].kind = IO_WRITE if write else IO_READ
                    ios[k].block = at
                    ios[k].nblocks = <uint32_t>each
                    ios[k].buf = <uint8_t *>view.buf + k * each * self.block_size
                    k += 1
            except OverflowError:       # also a number that is negative or no 64-bit one
                raise UsageError(f"{each * self.block_size} bytes from {offset} on reach beyond the disk's "
                                 f"{self.nblocks * self.block_size}") from None
            if k != n:
                raise UsageError("the list of offsets changed while it was read")
            self.execute(ios, n)
            return view.len
        finally:
            free(ios)
            PyBuffer_Release(&view)

    def sync(self):
        """Makes every write answered so far durable; raises OSError."""
        cdef io_t io
        io.kind = IO_SYNC
        io.block = 0
        io.nblocks = 0
        io.buf = NULL
        self.execute(&io, 1)

    def discard(self, length, offset, *, zero=False):
        """Frees what `length` bytes from byte `offset` on take, whole blocks, whose contents no longer matter; zero: and
        which read as zeros from then on. Raises OSError, UsageError."""
        cdef uint64_t at, most = <uint64_t>0xffffffff * self.block_size, piece
        cdef uint32_t kind = IO_ZERO if zero and not self.zeroes else IO_DISCARD
        length = PyNumber_Index(length)
        if not 0 <= length < 1 << 63:
            raise UsageError("a length is a number of bytes, 0 to 2^63 - 1", value=length)
        cdef uint64_t left = length
        at = self.place(offset, left)
        if not self.discards:
            raise UsageError("inline channels cannot express a discard",
                             hint="a connection with a shared buffer (shm) can")
        if left != 0 and ((at | left) & (self.block_size - 1)) != 0:
            raise UsageError(f"what is discarded is made of blocks of {self.block_size} bytes",
                             value=f"{length} bytes from {offset} on")
        while left != 0:
            piece = min(left, most)
            self.whole(kind, at, NULL, piece)
            at += piece
            left -= piece


@cython.no_gc_clear                     # disks and client refer to each other; the channels are needed to the end
cdef class ClientEngine:
    """The life of a block client's engine.

    One background thread calls run() over and over; any number of threads use the disks.
    """
    FIELDS = ()     # of an answer, that a server can get wrong
    STATES = ("connecting", "ready", "lost", "failed", "closed")

    def __cinit__(self):
        self.c = <client_t *>calloc(1, sizeof(client_t))
        if self.c == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.c.lock, NULL)
        self.disks = ()

    cdef int prepare(self, tuple memory, object poll, bint fail_fast, Watch watch) except -1:
        """Takes the channels: memory of request, response, and their bells or None. Precondition: sizes, protocols and
        the functions of the transport are set."""
        cdef client_t *c = self.c
        self.watch = watch
        self.bind(memory, 0 if poll is None else poll * 1000)
        c.fail_fast = fail_fast
        c.window = 1
        c.allowed = WINDOW
        c.depth = c.settled = DEPTH_FIRST
        return 0

    cdef int bind(self, tuple memory, uint64_t poll_ns) except -1:
        """Takes the channels' memory; what was bound before stays bound when this raises."""
        cdef client_t *c = self.c
        cdef writer_t w
        cdef reader_t r
        request, response, request_bell, response_bell = memory
        cdef Mapping q = hold(request, True, SHMSTREAM_HEADER_SIZE + self.sizes[0])
        cdef Mapping p = hold(response, False, SHMSTREAM_HEADER_SIZE + self.sizes[1])
        cdef Mapping qb = None if request_bell is None else hold(request_bell, True, sizeof(bell_page))
        cdef Mapping pb = None if response_bell is None else hold(response_bell, True, sizeof(bell_page))
        writer_init(&w, q.base, q.length, self.sizes[0], self.protocols[0])
        reader_init(&r, p.base, p.length, self.sizes[1], self.protocols[1])
        w.broken = q.broken
        r.broken = p.broken
        w.bell = NULL if qb is None else qb.as_bell()
        r.bell = NULL if pb is None else pb.as_bell()
        r.poll_ns = poll_ns
        c.spin_ns = r.spin_ns
        r.watch = NULL if self.watch is None else &self.watch.w
        r.overruns = c.r.overruns
        r.lost_total = c.r.lost_total
        r.sleeps = c.r.sleeps
        r.patience = c.r.patience
        r.quarantines = c.r.quarantines
        memcpy(r.offences, c.r.offences, sizeof(r.offences))
        w.wakes = c.w.wakes
        c.w = w
        c.r = r
        self.request, self.response, self.request_bell, self.response_bell = q, p, qb, pb
        return 0

    cdef bint held(self) noexcept:
        """Whether the channels' memory is still ours to touch."""
        return self.request is not None and self.request.held

    cdef int make_disks(self, uint64_t n) except -1:
        """Makes the disks, once and for all: their Targets point into the queues."""
        cdef Disk disk
        cdef queue_t *queues = <queue_t *>calloc(n, sizeof(queue_t))
        cdef uint64_t k
        if queues == NULL:
            raise MemoryError()
        self.c.queues = queues
        made = []
        for k in range(n):
            queues[k].client = self.c
            queues[k].device = <uint32_t>k
            queues[k].block_size = BLOCK_SIZE
            disk = Disk.__new__(Disk)
            disk.queue = &queues[k]
            disk.client = self
            disk.device = <uint32_t>k
            disk.ctx = <void *>&queues[k]
            disk.submit = client_submit
            disk.attendance = &ATTENDANCE
            made.append(disk)
        self.c.nqueues = <uint32_t>n
        self.disks = tuple(made)
        return 0

    cdef void more_taken(self) noexcept:
        """Points the transport to `more`."""

    cdef bint admit(self) except -1:
        """Gives the disks the geometry that was answered; False where that is not what they have had, or is none."""
        return False

    cdef int rebound(self, tuple memory, Mapping more) except -1:
        """What rebind() does: goes on in other memory, after the channels were made anew, as after a restart of the
        server.

        What is in flight stays so until resume() or fail(). The old memory may be unmapped afterwards.
        """
        cdef client_t *c = self.c
        old = (self.request, self.response, self.request_bell, self.response_bell, self.more)
        with nogil:
            client_take(c)
        pthread_mutex_lock(&c.lock)
        try:
            if c.state >= CLIENT_FAILED:
                raise UsageError("this device has failed or is closed")
            writer_stop(&c.w)           # a server that is still there learns that we have left
            self.bind(memory, c.r.poll_ns)
            self.more = more
            self.more_taken()
            if c.state == CLIENT_READY:
                store_release32(&c.state, CLIENT_LOST)
            c.phase = PHASE_START
            c.phase_since = 0
        finally:
            pthread_mutex_unlock(&c.lock)
            with nogil:
                client_release(c)
        for m in old:
            if m is not None:
                (<Mapping>m).drop()
        return 0

    # -------------------------------------------------------------- the background thread

    def run(self, seconds=0.1):
        """One step of the background thread, about `seconds` long; returns what stands now:

        "connecting", "answered" (call resume() or fail()), "ready", "lost", "failed", "closed", "stopped".
        """
        cdef uint64_t ns = <uint64_t>(seconds * 1e9)
        cdef client_t *c = self.c
        cdef bint answered = False
        cdef uint32_t seen
        if not busy_enter(&self.busy):
            raise UsageError(f"another thread runs this {type(self).__name__}")
        with nogil:
            prepare_thread(TIMER_SLACK_NS, load_relaxed32(&c.background) != 0)
            seen = load_acquire32(&c.chore)
            if load_relaxed32(&c.stop) != 0:
                pass
            elif c.state == CLIENT_CONNECTING or c.state == CLIENT_LOST:
                if client_take_turn(c, ns):
                    if c.state == CLIENT_CONNECTING or c.state == CLIENT_LOST:
                        answered = c.connect(c, ns)
                    client_release(c)
            elif c.state == CLIENT_READY:
                if load_relaxed32(&c.attended) != 0:
                    futex_wait_ns(&c.chore, seen, ns)
                elif load_relaxed32(&c.background) != 0:
                    if exchange_acqrel32(&c.relieve, 0) != 0:
                        futex_wait_ns(&c.chore, seen, RELIEF_NS)
                    elif client_take_turn(c, ns):
                        if c.state == CLIENT_READY:
                            client_serve(c, ns, &c.relieve)
                        client_release(c)
                else:
                    store_relaxed32(&c.wanted, 0)
                    fence_seq_cst()
                    if load_acquire32(&c.callers) == 0 and client_grab(c):
                        if c.state == CLIENT_READY:
                            client_serve(c, ns, &c.wanted)
                        client_release(c)
                    elif c.state == CLIENT_READY:
                        futex_wait_ns(&c.chore, seen, ns)
            else:
                futex_wait_ns(&c.chore, seen, ns)
        busy_leave(&self.busy)
        if load_relaxed32(&c.stop) != 0:
            return "stopped"
        return "answered" if answered else self.STATES[c.state]

    def stop(self):
        """Makes run() return "stopped" soon; from any thread."""
        store_release32(&self.c.stop, 1)
        store_release32(&self.c.wanted, 1)
        store_release32(&self.c.relieve, 1)
        fetch_add_acqrel32(&self.c.chore, 1)
        futex_wake_all(&self.c.chore)
        if self.c.r.bell != NULL:
            bell_kick(self.c.r.bell)

    def resume(self, *, resized=False):
        """After "answered": takes the geometry and (re-)issues everything not answered.

        resized: the disks may have more or fewer blocks than before, of the same length; what then reaches beyond the end
        is the server's to refuse.

        False when the server that answered has gone meanwhile: run() again. Raises UsageError for a geometry that cannot
        be, or another than the one taken before.
        """
        with nogil:
            client_take(self.c)
        try:
            if not client_answered(self.c):
                return False
            self.resizing = resized
            if not self.admit():
                raise UsageError("the disks have another geometry than before, or one that cannot be")
            with nogil:
                client_resume(self.c)
            return True
        finally:
            with nogil:
                client_release(self.c)

    def fail(self, *, forever=True):
        """Answers everything outstanding with EIO; forever: everything to come, too."""
        cdef uint32_t state = CLIENT_FAILED if forever else CLIENT_LOST
        with nogil:
            client_take(self.c)
            if self.c.state < CLIENT_FAILED:
                if state == CLIENT_LOST and self.c.state == CLIENT_CONNECTING:
                    state = CLIENT_CONNECTING
                client_fail(self.c, state)
                if state == CLIENT_FAILED:
                    writer_stop(&self.c.w)
            client_release(self.c)

    @property
    def background(self):
        """Whether the background thread takes all answers (a front end submits), not the blocking callers."""
        return self.c.background != 0

    @background.setter
    def background(self, value):
        store_release32(&self.c.background, 1 if value else 0)
        store_release32(&self.c.wanted, 1)
        fetch_add_acqrel32(&self.c.chore, 1)
        futex_wake_all(&self.c.chore)

    @property
    def attended(self):
        """Whether a thread of a front end takes the answers now, not the background thread."""
        return load_relaxed32(&self.c.attended) != 0

    # -------------------------------------------------------------- what the peer says

    @property
    def depth(self):
        """Most requests of each disk in flight now, of one block each on inline channels. Set it to 1 to 1024 (the rings may
        hold fewer), or to None: it adapts."""
        return self.c.depth

    @depth.setter
    def depth(self, value):
        if value is not None and not (isinstance(value, int) and 1 <= value <= WINDOW):
            raise UsageError(f"a depth is a number of requests, 1 to {WINDOW}, or None", option="depth", value=value)
        pthread_mutex_lock(&self.c.lock)
        self.c.depth = DEPTH_FIRST if value is None else value
        self.c.settled = DEPTH_FIRST if value is None else 0
        self.c.pace = self.c.measured = self.c.measured_ns = self.c.waiting_since = 0
        pthread_mutex_unlock(&self.c.lock)

    @property
    def state(self):
        """One of STATES."""
        return self.STATES[self.c.state]

    @property
    def geometry(self):
        """Of each device, (blocks, bytes of a block) as last answered; empty before."""
        return ()

    @property
    def store(self):
        """The identity that the server of the last answer announced (16 bytes), None where it announced none."""
        identity = PyBytes_FromStringAndSize(<char *>self.c.store, 16)
        return identity if any(identity) else None

    @property
    def server_state(self):
        """What the server's endpoint says of itself: "none", "serving", "back later", "gone", "resizing"."""
        cdef uint32_t state = 0
        if self.c.r.bell != NULL:
            state = load_acquire32(&self.c.r.bell.state)
        return ("none", "serving", "back later", "gone", "resizing")[state] if state < 5 else "none"

    @property
    def server_active(self):
        """Whether the response channel is active now; False once closed."""
        return self.held() and load_acquire64(&self.c.r.hdr.epoch) != 0

    @property
    def incompatible(self):
        """(protocol, size, elements) of a response channel that was refused, or None."""
        if self.c.r.refused == 0 or not self.held():
            return None
        return (load_relaxed64(&self.c.r.hdr.protocol), load_relaxed64(&self.c.r.hdr.size),
                load_relaxed64(&self.c.r.hdr.elements))

    @property
    def broken(self):
        """Name of what was taken away by its owner ("request", "response", "buffer"), or None."""
        for name, m in (("request", self.request), ("response", self.response), ("buffer", self.more)):
            if was_taken(m):
                return name
        return None

    @property
    def in_flight(self):
        """Requests written and not answered."""
        return load_relaxed64(&self.c.flying)

    @property
    def checksum(self):
        """Whether the answers of the server that answered last have checksums: CHECKSUM of _engine. "refused": it serves nobody
        without them; before there was one: "idle"."""
        if self.c.demanded:
            return "refused"
        return checksum_word(self.c.checksums, self.c.phase == PHASE_ANSWERED or self.c.state == CLIENT_READY,
                             self.c.agreed, False)

    @property
    def conduct(self):
        """Of the server, by its answers: FIELDS."""
        return conduct_of(self, &self.c.r, self.FIELDS)

    @property
    def progress(self):
        """Answers taken so far; what stands still while in_flight > 0 is stuck."""
        return load_relaxed64(&self.c.answers)

    @property
    def counters(self):
        """All counters of this client's life, of all disks; readable while it runs."""
        cdef client_counters n = self.c.n
        found = dict.fromkeys(("reads", "writes", "discards", "syncs", "bytes_read", "bytes_written", "errors",
                               "reissued"), 0)
        for disk in self.disks:
            for name, value in disk.counters.items():
                found[name] += value
        return found | {"stale": n.stale, "lives": n.lives, "batches": n.batches, "overruns": self.c.r.overruns,
                        "lost": self.c.r.lost_total, "quarantines": self.c.r.quarantines, "wakes": self.c.w.wakes,
                        "sleeps": self.c.r.sleeps}

    def close(self):
        """Fails what is outstanding and deactivates the request channel. No front end may still submit."""
        cdef client_t *c = self.c
        if not self.held():
            return
        self.stop()
        if not busy_enter(&self.busy):
            raise UsageError(f"end the background thread before closing a {type(self).__name__}")
        if not self.held():             # another thread was faster
            busy_leave(&self.busy)
            return
        with nogil:
            client_take(c)
            client_fail(c, CLIENT_CLOSED)
            writer_stop(&c.w)
            store_release32(&c.reaping, 0)
            wake_callers(c)
            while load_acquire32(&c.callers) != 0:
                sleep_ns(100_000)
        c.r.bell = NULL
        c.w.bell = NULL
        for m in (self.request, self.response, self.request_bell, self.response_bell, self.more):
            if m is not None:
                (<Mapping>m).drop()
        busy_leave(&self.busy)

    def __dealloc__(self):
        if self.c != NULL:
            if self.held():
                writer_stop(&self.c.w)
            pthread_mutex_destroy(&self.c.lock)
            free(self.c.queues)
            free(self.c)
            self.c = NULL


cdef class Client(ClientEngine):
    """The client engine of one disk over a pair of inline channels.

    request: the request channel's memory, writable, claimed by the caller; response: the response channel's.
    request_bell, response_bell: writable buffers or None. poll: microseconds, None: adaptive. fail_fast: while the
    server is lost, new requests fail instead of waiting for it. watch: of all engines of this process, or None. checksum:
    "off", "auto" (with a server that has them) or "require", which is for the caller of resume() to see to: `checksum`.
    """
    FIELDS = ("priv", "checksum")

    def __init__(self, request, response, *, request_protocol=BLOCK_REQUEST_PROTOCOL,
                 response_protocol=BLOCK_RESPONSE_PROTOCOL, request_bell=None, response_bell=None, poll=None,
                 fail_fast=False, Watch watch=None, checksum="off"):
        if self.request is not None:
            raise UsageError("a Client is initialised once")
        self.c.checksums = checksum_mode(checksum)
        self.c.issue = client_issue
        self.c.reap = client_reap
        self.c.connect = client_connect
        self.sizes = (sizeof(block_event), sizeof(block_event))
        self.protocols = (request_protocol, response_protocol)
        self.prepare((request, response, request_bell, response_bell), poll, fail_fast, watch)
        self.make_disks(1)

    def rebind(self, request, response, request_bell=None, response_bell=None):
        """Goes on in other memory, after the channels were made anew: as after a restart of the server.

        What is in flight stays so until resume() or fail(). The old memory may be unmapped afterwards.
        """
        self.rebound((request, response, request_bell, response_bell), None)

    cdef bint admit(self) except -1:
        cdef Disk disk = self.disks[0]
        cdef uint64_t nblocks = self.c.sectors // (BLOCK_SIZE // SECTOR_SIZE)
        if disk.nblocks != 0 and (disk.nblocks != nblocks and not self.resizing or nblocks == 0):
            return False
        disk.nblocks = nblocks
        disk.read_only = self.c.flags & STORE_READ_ONLY != 0
        return True

    @property
    def geometry(self):
        """As ClientEngine.geometry: blocks of 4096 bytes, from the last answer to `size`."""
        return ((self.c.sectors // (BLOCK_SIZE // SECTOR_SIZE), BLOCK_SIZE),)
