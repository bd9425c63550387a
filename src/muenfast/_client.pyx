"""The block client's engine for the inline transport: a Target whose requests a server across two channels executes.

Runs without the GIL and allocates nothing per request. Trust: of every answer the 24-byte header is copied once,
validated, and only the copy is used; payload is copied and checked before anybody sees it.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from libc.errno cimport EIO
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._engine cimport *
from muenfast._ring cimport *
from muenfast._thread cimport *
from muenfast._target cimport IO_READ, IO_SYNC, IO_WRITE, Target, io_t
from muenfast._wire cimport *

import os as _os

from muenfast.errors import UsageError

cdef enum:
    WINDOW = 1024           # most requests in flight; also bounded by the rings
    LINUX_ERRNO_MAX = 4095  # linux/err.h MAX_ERRNO
    WRITE_BATCH = 4         # writes published together, so that the server copies while we do (docs/decisions/003)

# How long a client that (re)connects waits for a server to notice that it had gone: as long as a slow disk may take
# over the writes that it executes out of the request slots.
cdef uint64_t FAREWELL_NS = 5_000_000_000
# After this long without an answer to `size` from an active server the client starts over.
cdef uint64_t ANSWER_NS = 1_000_000_000
# Blocking calls look for signals this often.
cdef uint64_t SIGNALS_NS = 50_000_000


# An automatic depth (docs/decisions/005): measured over windows of so many answers, while requests waited for room;
# in every eighth window the double or the half is tried.
cdef enum:
    DEPTH_FIRST = 32
    DEPTH_LEAST = 16
    DEPTH_ANSWERS = 1024
    DEPTH_WINDOWS = 8


cdef enum:
    ENTRY_FREE = 0
    ENTRY_ISSUED = 1        # by the issuer, with the lock
    ENTRY_MATCHED = 2       # by the reaper: an answer was seen, not yet validated


cdef enum client_state:
    CLIENT_CONNECTING = 0   # no answer to `size` yet; requests queue
    CLIENT_READY = 1
    CLIENT_LOST = 2         # the server restarted, vanished or overran us; requests queue or fail
    CLIENT_FAILED = 3       # for good: everything fails
    CLIENT_CLOSED = 4


cdef enum client_phase:
    PHASE_FAREWELL = 0      # inactive; waiting for the response channel to become so
    PHASE_SIZE = 1          # active; waiting for the answer to `size`
    PHASE_ANSWERED = 2


cdef struct entry_t:
    uint32_t state
    uint32_t priv
    uint32_t kind
    uint32_t index          # block within io
    uint64_t id
    io_t *io                # NULL: the caller has given up on it


cdef struct client_counters:
    uint64_t reads
    uint64_t writes
    uint64_t syncs
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t errors
    uint64_t stale          # answers that match no request in flight
    uint64_t reissued
    uint64_t lives          # connections made
    uint64_t batches


cdef struct client_t:
    writer_t w
    reader_t r
    # Issuers: everything up to the next group belongs to whoever holds `lock`.
    pthread_mutex_t lock
    uint64_t head           # requests issued in this epoch; entry = number mod window
    io_t *first             # not fully issued, oldest first
    io_t *last
    uint32_t base           # priv of request 0 of this epoch
    uint32_t window
    uint32_t depth          # most requests in flight, 1..WINDOW
    uint64_t flying         # requests written and not answered; under lock
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
    # The reaper: belongs to whoever set `reaping`.
    uint32_t reaping
    uint32_t takers         # threads that must have it next: resume, fail, forget, rebind, close
    uint64_t tail           # all requests below are answered; read by issuers
    uint32_t phase
    uint64_t phase_since
    uint64_t sectors        # as answered ...
    uint8_t store[16]       # ... and what the same server's bell said: its store, zero = none,
    uint32_t flags          # and STORE_READ_ONLY
    uint64_t answers        # progress, for the stuck detector
    # Threads that wait for an answer.
    uint32_t turn           # futex: somebody finished or stopped reaping
    uint32_t sleepers
    uint32_t callers        # threads inside a blocking call
    uint32_t wanted         # 1: a caller would rather reap itself
    uint32_t background     # 1: the background thread reaps always (a front end submits)
    uint32_t chore          # futex: the background thread is wanted
    uint32_t stop
    client_counters n
    entry_t entries[WINDOW]


cdef void client_issue(client_t *c) noexcept nogil:
    """Writes queued requests into the ring as far as the window allows. Precondition: lock held, state READY.

    At most `depth` are in flight; one that takes long does not count those answered after it. Invariant: head - tail <= window <= elements of either ring, and tail counts answered
    requests only, so that neither the request ring (the server has read what it answered) nor the response ring can
    overrun.
    Nothing is issued to a server other than the one whose store was checked: the reaper finds its epoch changed, too.
    """
    cdef uint64_t n, k, room
    cdef io_t *io
    cdef entry_t *e
    cdef block_event_header h
    cdef uint8_t *slot
    h.error = 0
    h.valid = 1
    while c.first != NULL:
        room = c.window - (c.head - load_acquire64(&c.tail))
        room = min(room, c.depth - c.flying if c.flying < c.depth else 0)
        if room == 0 or load_relaxed64(&c.r.hdr.epoch) != c.server:
            return
        n = 0
        io = c.first
        while io != NULL and n < room and n < BATCH:
            n += io.nblocks - io.issued if io.kind != IO_SYNC else 1
            io = io.next
        n = min(n, min(room, <uint64_t>(WRITE_BATCH if c.first.kind == IO_WRITE else BATCH)))
        writer_reserve(&c.w, n)
        for k in range(n):
            io = c.first
            e = &c.entries[c.head % c.window]
            h.kind = EVENT_COMMAND if io.kind == IO_SYNC else (EVENT_WRITE if io.kind == IO_WRITE else EVENT_READ)
            h.id = COMMAND_SYNC if io.kind == IO_SYNC else io.block + io.issued
            h.priv = c.base + <uint32_t>c.head
            slot = writer_slot(&c.w, k)
            memcpy(slot, &h, sizeof(h))
            if io.kind == IO_WRITE:
                memcpy(slot + sizeof(h), io.buf + <uint64_t>io.issued * BLOCK_SIZE, BLOCK_SIZE)
            e.priv = h.priv
            e.kind = h.kind
            e.id = h.id
            e.index = io.issued
            e.io = io
            io.issued += 1
            if io.kind == IO_SYNC or io.issued == io.nblocks:
                c.first = io.next
            # From here on io may be done and gone: a hostile server answers what it has not been sent yet.
            store_release32(&e.state, ENTRY_ISSUED)
            store_release64(&c.head, c.head + 1)
        c.flying += n
        writer_publish(&c.w, n)


cdef void client_adapt(client_t *c) noexcept nogil:
    """Finds the least depth that is as fast as any. Precondition: lock held, settled != 0, before client_issue.

    Where requests wait for room, more in flight can only make them wait in the ring instead, unless the server gets
    more done: the double is kept for an eighth more answers per second, the half for at most a 32nd less. Only time in
    which requests wait counts.
    """
    cdef uint64_t now, pace
    cdef bint waiting = c.first != NULL
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


cdef void client_submit_list(client_t *c, io_t *first, io_t *last) noexcept nogil:
    """Takes a list of requests (linked by next, last.next NULL)."""
    cdef io_t *io = first
    cdef io_t *following
    cdef bint refuse
    while io != NULL:
        io.error = 0
        io.issued = 0
        io.pending = io.nblocks if io.kind != IO_SYNC else 1
        io = io.next
    pthread_mutex_lock(&c.lock)
    refuse = c.state >= CLIENT_FAILED or (c.state == CLIENT_LOST and c.fail_fast)
    if not refuse:
        if c.first == NULL:
            c.first = first
        else:
            c.last.next = first
        c.last = last
        if c.state == CLIENT_READY:
            client_issue(c)
    pthread_mutex_unlock(&c.lock)
    if refuse:
        io = first
        while io != NULL:
            following = io.next
            io.error = -EIO
            fetch_add_relaxed64(&c.n.errors, 1)
            io.done(io)
            io = following


cdef void client_submit(void *ctx, io_t *io) noexcept nogil:
    io.next = NULL
    client_submit_list(<client_t *>ctx, io, io)


cdef void client_finish(client_t *c, io_t *finished) noexcept nogil:
    """Calls done of a list of finished requests, counting them."""
    cdef io_t *io
    while finished != NULL:
        io = finished
        finished = io.next
        if io.error != 0:
            fetch_add_relaxed64(&c.n.errors, 1)
        elif io.kind == IO_READ:
            count64(&c.n.reads, io.nblocks)
            count64(&c.n.bytes_read, <uint64_t>io.nblocks * BLOCK_SIZE)
        elif io.kind == IO_WRITE:
            count64(&c.n.writes, io.nblocks)
            count64(&c.n.bytes_written, <uint64_t>io.nblocks * BLOCK_SIZE)
        else:
            count64(&c.n.syncs, 1)
        io.done(io)


cdef ring_status client_reap(client_t *c) noexcept nogil:
    """Takes one batch of answers. Precondition: reaping is ours.

    Payload is copied to the callers' buffers before the batch is validated; nothing is finished before that, and
    an answer that turns out void leaves its request in flight.
    """
    cdef uint64_t available, n, k, tail, head
    cdef ring_status status = reader_peek(&c.r, &available)
    cdef block_event_header h
    cdef const uint8_t *slot
    cdef entry_t *e
    cdef entry_t *matched[BATCH]
    cdef int32_t errors[BATCH]
    cdef uint64_t matches = 0, stale = 0
    cdef io_t *io
    cdef io_t *finished = NULL
    cdef io_t **link = &finished
    if status != SUCCESS:
        return status
    n = available if available < BATCH else BATCH
    for k in range(n):
        slot = reader_slot(&c.r, k)
        memcpy(&h, slot, sizeof(h))
        e = &c.entries[<uint32_t>(h.priv - c.base) % c.window]
        if (load_acquire32(&e.state) != ENTRY_ISSUED or e.priv != h.priv or e.kind != h.kind or e.id != h.id):
            stale += 1
            continue
        e.state = ENTRY_MATCHED
        if h.kind == EVENT_READ and h.error == 0 and e.io != NULL:
            memcpy(e.io.buf + <uint64_t>e.index * BLOCK_SIZE, slot + sizeof(h), BLOCK_SIZE)
        matched[matches] = e
        errors[matches] = h.error
        matches += 1
    if not reader_intact(&c.r):
        for k in range(matches):
            matched[k].state = ENTRY_ISSUED
        return reader_recover(&c.r)
    reader_advance(&c.r, n)
    count64(&c.n.stale, stale)
    count64(&c.n.batches, 1)
    count64(&c.answers, matches)
    for k in range(matches):
        e = matched[k]
        io = e.io
        store_release32(&e.state, ENTRY_FREE)
        if io == NULL:
            continue
        if errors[k] != 0:
            io.error = errors[k] if -LINUX_ERRNO_MAX <= errors[k] < 0 else -EIO
        io.pending -= 1
        if io.pending == 0:
            io.next = NULL
            link[0] = io
            link = &io.next
    tail = c.tail
    head = load_acquire64(&c.head)
    while tail != head and load_acquire32(&c.entries[tail % c.window].state) == ENTRY_FREE:
        tail += 1
    store_release64(&c.tail, tail)
    pthread_mutex_lock(&c.lock)         # always: an issuer that found the window full has queued under it
    c.flying -= matches
    if c.state == CLIENT_READY:
        if c.settled != 0:
            client_adapt(c)
        client_issue(c)
    pthread_mutex_unlock(&c.lock)
    client_finish(c, finished)
    return SUCCESS


cdef void client_lost(client_t *c) noexcept nogil:
    """Stops issuing; the background thread will reconnect. Precondition: reaping is ours."""
    pthread_mutex_lock(&c.lock)
    if c.state == CLIENT_READY:
        store_release32(&c.state, CLIENT_LOST)
        c.phase = PHASE_FAREWELL
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
        status = client_reap(c)
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
            reader_wait(&c.r, ns - passed, until)


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
    pthread_mutex_lock(&c.lock)
    for k in range(c.window):
        if c.entries[k].state != ENTRY_FREE and c.entries[k].io != NULL and c.entries[k].io.user == <void *>b:
            c.entries[k].io = NULL
    link = &c.first
    c.last = NULL
    while link[0] != NULL:
        io = link[0]
        if io.user == <void *>b:
            link[0] = io.next
        else:
            c.last = io
            link = &io.next
    pthread_mutex_unlock(&c.lock)


cdef void client_fail(client_t *c, uint32_t state) noexcept nogil:
    """Answers everything outstanding with EIO. Precondition: reaping is ours. state: the new one."""
    cdef uint64_t k
    cdef entry_t *e
    cdef io_t *io
    cdef io_t *finished = NULL
    cdef io_t *following
    pthread_mutex_lock(&c.lock)
    store_release32(&c.state, state)
    c.phase = PHASE_FAREWELL            # what was given up is never answered in a later life's name
    c.phase_since = 0
    io = c.first
    c.first = c.last = NULL
    while io != NULL:                   # queued, perhaps partly issued: unissued blocks are answered here
        following = io.next
        io.error = -EIO
        io.pending -= (io.nblocks if io.kind != IO_SYNC else 1) - io.issued
        if io.pending == 0:
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
        io.pending -= 1
        if io.pending == 0:
            io.next = finished
            finished = io
    store_release64(&c.tail, c.head)
    c.flying = 0
    pthread_mutex_unlock(&c.lock)
    client_finish(c, finished)


cdef bint client_take_size(client_t *c, uint64_t available) noexcept nogil:
    """Looks through one batch of answers for the one to `size`; whether it was there and good.

    What the bell says counts only while the answering epoch stands in it: what a predecessor left there does not
    vouch for a server that has no bell.
    """
    cdef uint64_t n = available if available < BATCH else BATCH
    cdef uint64_t k, sectors = 0
    cdef block_event_header h
    cdef const uint8_t *slot
    cdef bint found = False
    for k in range(n):
        slot = reader_slot(&c.r, k)
        memcpy(&h, slot, sizeof(h))
        if h.kind == EVENT_COMMAND and h.id == COMMAND_SIZE and h.priv == c.base - 1 and h.error == 0:
            memcpy(&sectors, slot + sizeof(h), sizeof(sectors))
            found = True
    memset(c.store, 0, sizeof(c.store))
    c.flags = 0
    if c.r.bell != NULL and load_acquire64(&c.r.bell.ringer) == c.r.epoch:
        memcpy(c.store, c.r.bell.store, sizeof(c.store))
        c.flags = load_relaxed32(&c.r.bell.flags)
    if not reader_intact(&c.r):         # covers the bell: a server ends its predecessor's epoch before it speaks
        reader_recover(&c.r)
        return False
    reader_advance(&c.r, n)
    if found:
        c.sectors = sectors
    return found


cdef bint client_connect(client_t *c, uint64_t ns) noexcept nogil:
    """Goes on with connecting for at most ns nanoseconds; True once `size` was answered (sectors is set).

    First the request channel is made inactive and left untouched until the server, if there is one, has followed
    (bounded): it may still be executing writes out of the slots that a new epoch zeroes.
    Precondition: reaping is ours, state is CONNECTING or LOST.
    """
    cdef uint64_t start = now_ns(), now, passed, available
    cdef block_event_header h
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


cdef bint client_resume(client_t *c) noexcept nogil:
    """Becomes READY in the new epoch and issues again, in their order, all requests not answered.

    False: the server that answered is not there any more, nothing was done. Precondition: reaping is ours.
    """
    cdef entry_t again[WINDOW]
    cdef uint64_t n = 0, k, at, done
    cdef io_t *io
    cdef io_t *finished = NULL
    cdef entry_t *e
    cdef block_event_header h
    cdef uint8_t *slot
    if c.state >= CLIENT_FAILED or c.state == CLIENT_READY or c.phase != PHASE_ANSWERED:
        return False
    if load_acquire64(&c.r.hdr.epoch) != c.r.epoch:
        c.phase = PHASE_FAREWELL
        c.phase_since = 0
        return False
    pthread_mutex_lock(&c.lock)
    c.server = c.r.epoch
    while c.tail != c.head:
        e = &c.entries[c.tail % c.window]
        if e.state != ENTRY_FREE and e.io != NULL:
            again[n] = e[0]
            n += 1
        e.state = ENTRY_FREE
        store_release64(&c.tail, c.tail + 1)
    c.head = 0
    store_release64(&c.tail, 0)
    c.waiting_since = c.measured = c.measured_ns = 0
    c.window = WINDOW
    while c.window > c.w.elements or c.window > c.r.elements:
        c.window //= 2
    count64(&c.n.lives, 1)
    count64(&c.n.reissued, n)
    h.error = 0
    h.valid = 1
    done = 0
    while done < n:
        k = min(n - done, min(<uint64_t>BATCH, c.window - c.head))
        if k == 0:
            break
        writer_reserve(&c.w, k)
        for at in range(k):
            e = &c.entries[c.head % c.window]
            e[0] = again[done + at]
            e.priv = c.base + <uint32_t>c.head
            h.kind = e.kind
            h.id = e.id
            h.priv = e.priv
            slot = writer_slot(&c.w, at)
            memcpy(slot, &h, sizeof(h))
            if e.kind == EVENT_WRITE:
                memcpy(slot + sizeof(h), e.io.buf + <uint64_t>e.index * BLOCK_SIZE, BLOCK_SIZE)
            store_release32(&e.state, ENTRY_ISSUED)
            store_release64(&c.head, c.head + 1)
        writer_publish(&c.w, k)
        done += k
    c.flying = c.head
    while done < n:                     # the new response ring is smaller than what was in flight
        io = again[done].io
        io.error = -EIO
        io.pending -= 1
        if io.pending == 0:
            io.next = finished
            finished = io
        done += 1
    store_release32(&c.state, CLIENT_READY)
    client_issue(c)
    pthread_mutex_unlock(&c.lock)
    client_finish(c, finished)
    wake_callers(c)
    return True


cdef class Client(Target):
    """The client engine of one disk over a pair of inline channels.

    request: the request channel's memory, writable, claimed by the caller; response: the response channel's.
    request_bell, response_bell: writable buffers or None. poll: microseconds, None: adaptive. fail_fast: while the
    server is lost, new requests fail instead of waiting for it. watch: of all engines of this process, or None.

    One background thread calls run() over and over; any number of threads use the blocking calls or submit().
    """
    STATES = ("connecting", "ready", "lost", "failed", "closed")

    cdef client_t *c
    cdef Mapping request, response, request_bell, response_bell
    cdef tuple protocols
    cdef Watch watch
    cdef uint32_t busy

    def __cinit__(self):
        self.c = <client_t *>calloc(1, sizeof(client_t))
        if self.c == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.c.lock, NULL)

    def __init__(self, request, response, *, request_protocol=BLOCK_REQUEST_PROTOCOL,
                 response_protocol=BLOCK_RESPONSE_PROTOCOL, request_bell=None, response_bell=None, poll=None,
                 fail_fast=False, Watch watch=None):
        cdef client_t *c = self.c
        if self.request is not None:
            raise UsageError("a Client is initialised once")
        self.protocols = (request_protocol, response_protocol)
        self.watch = watch
        self.bind(request, response, request_bell, response_bell, 0 if poll is None else poll * 1000)
        c.fail_fast = fail_fast
        c.window = 1
        c.depth = c.settled = DEPTH_FIRST
        self.ctx = <void *>c
        self.submit = client_submit

    cdef int bind(self, object request, object response, object request_bell, object response_bell,
                  uint64_t poll_ns) except -1:
        """Takes the channels' memory; what was bound before stays bound when this raises."""
        cdef uint64_t least = SHMSTREAM_HEADER_SIZE + sizeof(block_event)
        cdef client_t *c = self.c
        cdef writer_t w
        cdef reader_t r
        cdef Mapping q = hold(request, True, least)
        cdef Mapping p = hold(response, False, least)
        cdef Mapping qb = None if request_bell is None else hold(request_bell, True, sizeof(bell_page))
        cdef Mapping pb = None if response_bell is None else hold(response_bell, True, sizeof(bell_page))
        writer_init(&w, q.base, q.length, sizeof(block_event), self.protocols[0])
        reader_init(&r, p.base, p.length, sizeof(block_event), self.protocols[1])
        w.broken = q.broken
        r.broken = p.broken
        w.bell = NULL if qb is None else qb.as_bell()
        r.bell = NULL if pb is None else pb.as_bell()
        r.poll_ns = poll_ns
        r.watch = NULL if self.watch is None else &self.watch.w
        r.overruns = c.r.overruns
        r.lost_total = c.r.lost_total
        r.sleeps = c.r.sleeps
        w.wakes = c.w.wakes
        c.w = w
        c.r = r
        self.request, self.response, self.request_bell, self.response_bell = q, p, qb, pb
        return 0

    def rebind(self, request, response, request_bell=None, response_bell=None):
        """Goes on in other memory, after the channels were made anew: as after a restart of the server.

        What is in flight stays so until resume() or fail(). The old memory may be unmapped afterwards.
        """
        cdef client_t *c = self.c
        old = (self.request, self.response, self.request_bell, self.response_bell)
        with nogil:
            client_take(c)
        pthread_mutex_lock(&c.lock)
        try:
            if c.state >= CLIENT_FAILED:
                raise UsageError("this device has failed or is closed")
            writer_stop(&c.w)           # a server that is still there learns that we have left
            self.bind(request, response, request_bell, response_bell, c.r.poll_ns)
            if c.state == CLIENT_READY:
                store_release32(&c.state, CLIENT_LOST)
            c.phase = PHASE_FAREWELL
            c.phase_since = 0
        finally:
            pthread_mutex_unlock(&c.lock)
            with nogil:
                client_release(c)
        for m in old:
            if m is not None:
                (<Mapping>m).drop()

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
            raise UsageError("another thread runs this Client")
        with nogil:
            prepare_thread(TIMER_SLACK_NS, load_relaxed32(&c.background) != 0)
            seen = load_acquire32(&c.chore)
            if load_relaxed32(&c.stop) != 0:
                pass
            elif c.state == CLIENT_CONNECTING or c.state == CLIENT_LOST:
                if client_take_turn(c, ns):
                    if c.state == CLIENT_CONNECTING or c.state == CLIENT_LOST:
                        answered = client_connect(c, ns)
                    client_release(c)
            elif c.state == CLIENT_READY:
                if load_relaxed32(&c.background) != 0:
                    if client_take_turn(c, ns):
                        if c.state == CLIENT_READY:
                            client_serve(c, ns, &c.stop)
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
        fetch_add_acqrel32(&self.c.chore, 1)
        futex_wake_all(&self.c.chore)
        if self.c.r.bell != NULL:
            bell_kick(self.c.r.bell)

    def resume(self):
        """After "answered": takes the geometry and (re-)issues everything not answered.

        False when the server that answered has gone meanwhile: run() again.
        """
        cdef bint resumed
        cdef uint64_t before = self.nblocks
        self.nblocks = self.c.sectors // (BLOCK_SIZE // SECTOR_SIZE)
        self.read_only = self.c.flags & STORE_READ_ONLY != 0
        with nogil:
            client_take(self.c)
            resumed = client_resume(self.c)
            client_release(self.c)
        if not resumed:
            self.nblocks = before
        return bool(resumed)

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

    # -------------------------------------------------------------- what the peer says

    @property
    def depth(self):
        """Most blocks in flight now. Set it to 1 to 1024 (the rings may hold fewer), or to None: it adapts."""
        return self.c.depth

    @depth.setter
    def depth(self, value):
        if value is not None and not (isinstance(value, int) and 1 <= value <= WINDOW):
            raise UsageError(f"a depth is a number of blocks, 1 to {WINDOW}, or None", option="depth", value=value)
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
    def answered_blocks(self):
        """Blocks of 4096 bytes of the disk, from the last answer to `size`."""
        return self.c.sectors // (BLOCK_SIZE // SECTOR_SIZE)

    @property
    def store(self):
        """The identity that the server of the last answer announced (16 bytes), None where it announced none."""
        identity = PyBytes_FromStringAndSize(<char *>self.c.store, 16)
        return identity if any(identity) else None

    @property
    def server_state(self):
        """What the server's endpoint says of itself: "none", "serving", "back later", "gone"."""
        cdef uint32_t state = 0
        if self.c.r.bell != NULL:
            state = load_acquire32(&self.c.r.bell.state)
        return ("none", "serving", "back later", "gone")[state] if state < 4 else "none"

    @property
    def server_active(self):
        """Whether the response channel is active now; False once closed."""
        return self.response is not None and self.response.held and load_acquire64(&self.c.r.hdr.epoch) != 0

    @property
    def incompatible(self):
        """(protocol, size, elements) of a response channel that was refused, or None."""
        if self.c.r.refused == 0 or self.response is None or not self.response.held:
            return None
        return (load_relaxed64(&self.c.r.hdr.protocol), load_relaxed64(&self.c.r.hdr.size),
                load_relaxed64(&self.c.r.hdr.elements))

    @property
    def broken(self):
        """Name of the channel whose memory was taken away, or None."""
        return "request" if was_taken(self.request) else "response" if was_taken(self.response) else None

    @property
    def in_flight(self):
        """Requests written and not answered."""
        return load_relaxed64(&self.c.flying)

    @property
    def progress(self):
        """Answers taken so far; what stands still while in_flight > 0 is stuck."""
        return load_relaxed64(&self.c.answers)

    @property
    def counters(self):
        """All counters of this client's life; readable while it runs."""
        cdef client_counters n = self.c.n
        return {"reads": n.reads, "writes": n.writes, "syncs": n.syncs, "bytes_read": n.bytes_read,
                "bytes_written": n.bytes_written, "errors": n.errors, "stale": n.stale, "reissued": n.reissued,
                "lives": n.lives, "batches": n.batches, "overruns": self.c.r.overruns,
                "lost": self.c.r.lost_total, "wakes": self.c.w.wakes, "sleeps": self.c.r.sleeps}

    # -------------------------------------------------------------- blocking calls

    cdef int execute(self, io_t *ios, uint64_t n) except -1:
        """Runs n requests (an array) to their end without the GIL; raises OSError with the first error."""
        cdef blocking_t b
        cdef client_t *c = self.c
        cdef uint64_t k
        b.c = c
        b.left = <uint32_t>n
        b.done = 0
        b.error = 0
        for k in range(n):
            ios[k].done = blocking_done
            ios[k].user = &b
            ios[k].next = &ios[k + 1] if k + 1 < n else NULL
        self.usable()
        fetch_add_acqrel32(&c.callers, 1)
        store_release32(&c.wanted, 1)
        try:
            with nogil:
                client_submit_list(c, &ios[0], &ios[n - 1])
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

    cdef int usable(self) except -1:
        if self.request is not None and self.request.forked:
            raise UsageError("this device belongs to the process that was forked; open one of your own")
        if self.c.state == CLIENT_CLOSED:
            raise UsageError("this device is closed")
        return 0

    cdef uint64_t place(self, object offset, uint64_t length) except? 1:
        """The byte offset, which lies on the disk with the `length` bytes behind it. Raises UsageError."""
        cdef uint64_t size = self.nblocks * BLOCK_SIZE, at
        self.usable()
        if size == 0:
            if load_acquire32(&self.c.state) == CLIENT_FAILED:
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

    def move(self, bint write, offset, buffer):
        """Moves a buffer's bytes to the disk, or from it, at byte `offset`; how many. Raises OSError, UsageError.

        -1, and nothing was moved, where offset or length are no whole blocks.
        """
        cdef Py_buffer view
        cdef uint64_t at
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if write else PyBUF_WRITABLE)
        try:
            at = self.place(offset, view.len)
            if view.len != 0 and (at | <uint64_t>view.len) % BLOCK_SIZE != 0:
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
        if length != 0 and (at | <uint64_t>length) % BLOCK_SIZE != 0:
            return None
        data = PyBytes_FromStringAndSize(NULL, length)
        self.whole(IO_READ, at, <uint8_t *>PyBytes_AS_STRING(data), length)
        return data

    cdef int whole(self, uint32_t kind, uint64_t at, uint8_t *buf, uint64_t length) except -1:
        cdef io_t io
        if length == 0:
            return 0
        if length // BLOCK_SIZE > 0xffffffff:
            raise UsageError(f"{length} bytes are too many for one call, which takes less than 2^32 blocks of {BLOCK_SIZE}")
        io.kind = kind
        io.block = at // BLOCK_SIZE
        io.nblocks = <uint32_t>(length // BLOCK_SIZE)
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
            if n > 0xffffffff or each == 0 or each * n != <uint64_t>view.len or each % BLOCK_SIZE != 0:
                raise UsageError(f"data of {view.len} bytes is not one piece for each of {n} offsets, all of the same "
                                 f"whole blocks of {BLOCK_SIZE} (offsets come first, then data)")
            each //= BLOCK_SIZE
            if each > 0xffffffff:
                raise UsageError(f"{each * BLOCK_SIZE} bytes are too many for one piece, which takes less than 2^32 blocks "
                                 f"of {BLOCK_SIZE}")
            ios = <io_t *>calloc(n, sizeof(io_t))
            if ios == NULL:
                raise MemoryError()
            try:
                for offset in offsets:
                    if k == n:
                        break
                    at = PyNumber_Index(offset)
                    if at % BLOCK_SIZE != 0:
                        raise UsageError(f"an offset is a multiple of {BLOCK_SIZE} here", value=offset)
                    at //= BLOCK_SIZE
                    if at > self.nblocks or each > self.nblocks - at:
                        raise OverflowError()
                    ios[k].kind = IO_WRITE if write else IO_READ
                    ios[k].block = at
                    ios[k].nblocks = <uint32_t>each
                    ios[k].buf = <uint8_t *>view.buf + k * each * BLOCK_SIZE
                    k += 1
            except OverflowError:       # also a number that is negative or no 64-bit one
                raise UsageError(f"{each * BLOCK_SIZE} bytes from {offset} on reach beyond the disk's "
                                 f"{self.nblocks * BLOCK_SIZE}") from None
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

    def close(self):
        """Fails what is outstanding and deactivates the request channel. No front end may still submit."""
        cdef client_t *c = self.c
        if self.request is None or not self.request.held:
            return
        self.stop()
        if not busy_enter(&self.busy):
            raise UsageError("end the background thread before closing a Client")
        if not self.request.held:       # another thread was faster
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
        for m in (self.request, self.response, self.request_bell, self.response_bell):
            if m is not None:
                (<Mapping>m).drop()
        busy_leave(&self.busy)

    def __dealloc__(self):
        if self.c != NULL:
            if self.request is not None and self.request.held:
                writer_stop(&self.c.w)
            pthread_mutex_destroy(&self.c.lock)
            free(self.c)
            self.c = NULL
