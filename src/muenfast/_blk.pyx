"""The block server's engine for the inline transport: requests of one client, executed on a Store.

Runs without the GIL and allocates nothing per request. Trust: of every request the 24-byte header is copied once,
validated, and only the copy is used; payload is used in place and checked for being intact afterwards.
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport EFAULT, EINTR, EINVAL, EIO, EROFS, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.types cimport off_t

from muenfast._engine cimport *
from muenfast._ring cimport *
from muenfast._thread cimport TIMER_SLACK_NS, prepare_thread
from muenfast._wire cimport *

import os as _os

from muenfast.errors import UsageError

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv(int fd, const iovec *iov, int n, off_t offset)
    ssize_t pwritev(int fd, const iovec *iov, int n, off_t offset)

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    # Requests of one round to a store without system calls: the client takes these answers while the next ones are
    # copied. With 64, and 32 in flight, the two took turns (docs/decisions/003).
    MEMORY_BATCH = 4
    # Rounds of one server of a group before the next one's turn.
    TURN_ROUNDS = 8

# What the slow turns of one server of a group, of page faults on its client's memory or the zeroing of a large ring, may
# take of the others' time, by the clock. Turns are microseconds long; a thread that lost its CPU looks slow, too.
cdef uint64_t SLOW_TURN_NS = 2_000_000
cdef uint64_t BUDGET_NS = 50_000_000
cdef uint64_t BUDGET_PERIOD_NS = 2_000_000_000
# Pause before a new response epoch after an overrun, so that answers already published can be read.
cdef uint64_t GRACE_NS = 10_000_000
# A client without a bell may have restarted under its old epoch: its last request is looked at again this often.
cdef uint64_t SAME_EPOCH_NS = 20_000_000


# ------------------------------------------------------------------ stores

cdef enum:
    STORE_MEMORY = 0
    STORE_FILE = 1
    STORE_NULL = 2


cdef struct store_t:
    int kind
    int fd
    uint8_t *memory
    const uint32_t *broken  # memory: 1 when it was taken away and zeros stand there
    uint64_t offset         # file: bytes before block 0; with all blocks it is below 2^63
    uint64_t nblocks
    bint read_only


cdef class Store:
    """What a server exports: nblocks blocks of 4096 bytes.

    Made by in_memory(), in_file() or null(). identity: 16 bytes that name the data, stable for as long as they
    live; a client re-issues requests only to the identity it knew.
    """
    cdef store_t s
    cdef Mapping memory
    cdef readonly bytes identity

    @property
    def nblocks(self):
        """Size in blocks of 4096 bytes."""
        return self.s.nblocks

    @property
    def read_only(self):
        """Whether writes are refused."""
        return self.s.read_only

    @property
    def waits(self):
        """Whether it makes system calls, which may wait."""
        return self.s.kind == STORE_FILE

    @staticmethod
    def in_memory(memory, *, read_only=False, identity=None):
        """A store in a buffer (writable unless read_only), held until close(). Truncated shared memory gives EIO."""
        cdef Store self = Store.__new__(Store)
        self.memory = hold(memory, not read_only, BLOCK_SIZE)
        self.s.kind = STORE_MEMORY
        self.s.memory = self.memory.base
        self.s.broken = self.memory.broken
        return self.finish(self.memory.length, read_only, identity)

    @staticmethod
    def in_file(int fd, size, *, offset=0, read_only=False, identity=None):
        """A store in `size` bytes from byte `offset` on of an open file or block device; the descriptor stays the
        caller's."""
        cdef Store self = Store.__new__(Store)
        if offset < 0 or offset + size >= 1 << 63:
            raise UsageError("a store ends below 2^63", value=offset + size)
        self.s.kind = STORE_FILE
        self.s.fd = fd
        self.s.offset = offset
        return self.finish(size, read_only, identity)

    @staticmethod
    def null(size, *, identity=None):
        """Reads zeros, forgets writes."""
        cdef Store self = Store.__new__(Store)
        self.s.kind = STORE_NULL
        return self.finish(size, False, identity)

    cdef Store finish(self, object size, bint read_only, object identity):
        if identity is None:
            identity = _os.urandom(16)
        if len(identity) != 16:
            raise UsageError("a store's identity has 16 bytes", value=identity)
        self.identity = bytes(identity)
        self.s.nblocks = size // BLOCK_SIZE
        self.s.read_only = read_only
        if self.s.nblocks == 0:
            raise UsageError("a disk has at least one block of 4096 bytes", value=size)
        return self

    def close(self):
        """Lets go of the buffer. No server may still use the store."""
        if self.memory is not None:
            self.s.nblocks = 0
            self.s.memory = NULL
            self.memory.drop()


cdef int transfer(const store_t *s, bint write, iovec *iov, int n, uint64_t block) noexcept nogil:
    """Moves n pieces, consecutive from `block` on, to or from a file; 0 or a negative errno.

    EFAULT (the ring's memory was taken away) becomes EIO: it is no fault of the store.
    """
    cdef off_t at = <off_t>(s.offset + block * BLOCK_SIZE)
    cdef ssize_t moved
    cdef size_t left
    while n > 0:
        moved = pwritev(s.fd, iov, n, at) if write else preadv(s.fd, iov, n, at)
        if moved < 0:
            if errno == EINTR:
                continue
            return -EIO if errno == EFAULT else -errno
        if moved == 0:
            return -EIO                 # the file was cut short behind our back
        at += moved
        left = <size_t>moved
        while n > 0 and left >= iov[0].iov_len:
            left -= iov[0].iov_len
            iov += 1
            n -= 1
        if left:
            iov[0].iov_base = <uint8_t *>iov[0].iov_base + left
            iov[0].iov_len -= left
    return 0


# ------------------------------------------------------------------ server

cdef enum server_event:
    SERVER_TICK = 0
    SERVER_CONNECTED = 1
    SERVER_DISCONNECTED = 2
    SERVER_INCOMPATIBLE = 3
    SERVER_OVERRUN = 4
    SERVER_STOPPED = 5
    SERVER_UNRULY = 6       # of a group: this one made the others wait; after another event or alone


cdef struct server_counters:
    uint64_t reads
    uint64_t writes
    uint64_t syncs
    uint64_t sizes
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t batches
    uint64_t merged
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
    bint overrun            # a new response epoch is due, once the answers published had GRACE_NS to be read
    bint knows_epoch        # this life has seen a request epoch end or begin: none can be a predecessor's
    uint64_t void_below     # requests of this epoch with a number below are void
    uint64_t refused        # incompatible epoch that was reported
    block_event_header last # the newest request taken from the ring, as it was ...
    bint has_last           # ... in this epoch, if there was one
    server_counters n
    block_event_header heads[BATCH]
    int32_t errors[BATCH]
    iovec iov[BATCH]
    uint8_t *stage          # BATCH blocks, for writes to a file; page-aligned


cdef int32_t check_event(const server_t *s, const block_event_header *h) noexcept nogil:
    """0, or the errno that answers a request which breaks a rule. h is a private copy."""
    if h.valid != 1:
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


cdef bint server_intact(server_t *s, uint64_t k) noexcept nogil:
    """Whether slot k of the batch still holds what the client published, everything used of it included.

    As reader_intact: the use before the loads of epoch and WSC (acquire fence; pairs with writer_reserve and
    writer_start), the epoch before WSC (acquire); WSC below the WC seen is a restart.
    """
    cdef uint64_t wsc
    fence_acquire()
    if load_acquire64(&s.r.hdr.epoch) != s.r.epoch:
        return False
    wsc = reader_settled(&s.r, &s.r.hdr.wsc)
    return wsc - (s.r.rc + k) <= s.r.elements and <int64_t>(wsc - s.r.wc) >= 0


cdef int32_t server_move(server_t *s, uint64_t first, uint64_t n, uint64_t out) noexcept nogil:
    """Moves the payload of n reads or writes with consecutive blocks; 0 or a negative errno for all of them.

    Memory: straight between store and slot. File: reads land in the response slots; writes are staged and checked
    first, because a file write may wait, and a client that starts anew meanwhile zeroes its slots.
    """
    cdef uint64_t k, block = s.heads[first].id
    cdef bint write = s.heads[first].kind == EVENT_WRITE
    cdef uint8_t *data
    for k in range(n):
        if write:
            data = <uint8_t *>reader_slot(&s.r, first + k) + sizeof(block_event_header)
            if s.store.kind == STORE_MEMORY:
                memcpy(s.store.memory + (block + k) * BLOCK_SIZE, data, BLOCK_SIZE)
            elif s.store.kind == STORE_FILE:
                memcpy(s.stage + k * BLOCK_SIZE, data, BLOCK_SIZE)
        else:
            data = writer_slot(&s.w, out + k) + sizeof(block_event_header)
            if s.store.kind == STORE_MEMORY:
                memcpy(data, s.store.memory + (block + k) * BLOCK_SIZE, BLOCK_SIZE)
            elif s.store.kind == STORE_FILE:
                s.iov[k].iov_base = data
                s.iov[k].iov_len = BLOCK_SIZE
            else:
                memset(data, 0, BLOCK_SIZE)
    if s.store.kind == STORE_MEMORY:
        return -EIO if s.store.broken != NULL and load_acquire32(s.store.broken) != 0 else 0
    if s.store.kind != STORE_FILE:
        return 0
    if not write:
        return transfer(s.store, False, s.iov, <int>n, block)
    if not server_intact(s, first):
        count64(&s.n.torn, n)
        return -EIO
    s.iov[0].iov_base = s.stage
    s.iov[0].iov_len = n * BLOCK_SIZE
    return transfer(s.store, True, s.iov, 1, block)


cdef void server_run_blocks(server_t *s, uint64_t first, uint64_t n, uint64_t out) noexcept nogil:
    """Executes the reads or writes first..first+n-1 of the batch, whose blocks are consecutive.

    Answers to reads stand in the response slots from `out` on.
    """
    cdef uint64_t k
    cdef int32_t error = server_move(s, first, n, out)
    if error != 0:
        count64(&s.n.failed, n)
        for k in range(n):
            s.errors[first + k] = error
            if s.heads[first].kind == EVENT_READ:   # no byte of an earlier answer goes out under an error
                memset(writer_slot(&s.w, out + k) + sizeof(block_event_header), 0, BLOCK_SIZE)
    count64(&s.n.merged, n - 1)
    if s.heads[first].kind == EVENT_WRITE:
        count64(&s.n.writes, n)
        count64(&s.n.bytes_written, n * BLOCK_SIZE)
    else:
        count64(&s.n.reads, n)
        count64(&s.n.bytes_read, n * BLOCK_SIZE)


cdef void server_answer(server_t *s, uint64_t first, uint64_t n) noexcept nogil:
    """Completes the headers of the batch's answers first..first+n-1 in the first n reserved slots; publishes them.

    A write to memory whose slot the client overwrote meanwhile is torn: it is looked at again after the data was used.
    A client that has begun a new epoch, or the same one anew, gets no answer to the old one's requests.
    """
    cdef uint64_t k
    cdef block_event_header *h
    for k in range(n):
        h = &s.heads[first + k]
        if h.kind == EVENT_WRITE and s.errors[first + k] == 0 and s.store.kind == STORE_MEMORY:
            if not server_intact(s, first + k):
                s.errors[first + k] = -EIO
                count64(&s.n.torn, 1)
        h.error = s.errors[first + k]
        memcpy(writer_slot(&s.w, k), h, sizeof(block_event_header))
    if load_acquire64(&s.r.hdr.epoch) == s.r.epoch and <int64_t>(reader_settled(&s.r, &s.r.hdr.wsc) - s.r.wc) >= 0:
        writer_publish(&s.w, n)


cdef void server_took(server_t *s, const block_event_header *h, uint64_t n) noexcept nogil:
    """Consumes n requests, of which *h is a copy of the last header."""
    s.last = h[0]
    s.has_last = True
    reader_advance(&s.r, n)


cdef bint server_forgotten(const server_t *s) noexcept nogil:
    """Whether the newest request taken no longer stands in its slot, although the client may not have touched it.

    Then the client has restarted under the same epoch, and its counters alone, equal to the old ones or above, do not
    tell. A slot that the client may overwrite by now (WSC, loaded after it) tells nothing.
    """
    cdef block_event_header h
    cdef uint64_t at = s.r.index if s.r.index != 0 else s.r.elements
    if not s.has_last or s.r.epoch == 0:
        return False
    memcpy(&h, s.r.slots + (at - 1) * s.r.size, sizeof(h))
    fence_acquire()
    if load_relaxed64(&s.r.hdr.wsc) - (s.r.rc - 1) > s.r.elements:
        return False
    return h.kind != s.last.kind or h.id != s.last.id or h.valid != s.last.valid or h.priv != s.last.priv


cdef ring_status server_batch(server_t *s, uint64_t available) noexcept nogil:
    """One round: copy the headers out, check the copies, execute, answer with one publish."""
    cdef uint64_t n, k, run, published = 0, sectors
    cdef uint8_t *slot
    cdef block_event_header *h
    cdef int status
    n = min(available, <uint64_t>(BATCH if s.store.kind == STORE_FILE else MEMORY_BATCH))
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
    count64(&s.n.batches, 1)
    writer_reserve(&s.w, n)
    k = 0
    while k < n:
        h = &s.heads[k]
        s.errors[k] = check_event(s, h)
        if s.errors[k] != 0:
            count64(&s.n.rejected, 1)
            memset(writer_slot(&s.w, k - published) + sizeof(block_event_header), 0, BLOCK_SIZE)
            k += 1
        elif h.kind == EVENT_COMMAND:
            slot = writer_slot(&s.w, k - published) + sizeof(block_event_header)
            memset(slot, 0, BLOCK_SIZE)
            if h.id == COMMAND_SIZE:
                sectors = s.store.nblocks * (BLOCK_SIZE // SECTOR_SIZE)
                memcpy(slot, &sectors, sizeof(sectors))
                count64(&s.n.sizes, 1)
            else:
                if k > published and s.store.kind == STORE_FILE:
                    server_answer(s, published, k - published)   # a slow flush holds nothing back
                    published = k
                count64(&s.n.syncs, 1)
                if s.store.kind == STORE_FILE and not s.store.read_only:
                    status = fdatasync(s.store.fd)
                    if status != 0:
                        s.errors[k] = -errno
                        count64(&s.n.failed, 1)
            k += 1
        else:
            run = 1
            s.errors[k] = 0
            while (k + run < n and s.heads[k + run].kind == h.kind and s.heads[k + run].id == h.id + run
                    and check_event(s, &s.heads[k + run]) == 0):
                s.errors[k + run] = 0
                run += 1
            server_run_blocks(s, k, run, k - published)
            k += run
    server_answer(s, published, n - published)
    server_took(s, &s.heads[n - 1], n)
    return SUCCESS


cdef enum:
    STEP_WORKED = -1
    STEP_IDLE = -2


cdef int server_step(server_t *s) noexcept nogil:
    """One look at the requests: STEP_WORKED, STEP_IDLE, or a server_event.

    Sleeps only where a store or a client makes it: for up to 10 ms while counters settle, counted in r.unsettled, and
    after an overrun.
    """
    cdef uint64_t available
    cdef ring_status status
    if load_relaxed32(&s.stop) != 0:
        return SERVER_STOPPED
    if s.overrun:
        s.overrun = False
        sleep_ns(GRACE_NS)
        writer_start(&s.w, random_epoch())
    status = reader_peek(&s.r, &available)
    if (status == SUCCESS or status == NO_DATA) and server_forgotten(s):
        s.r.epoch = 0
        status = reader_peek(&s.r, &available)
    if status == SUCCESS:
        status = server_batch(s, available)
    if status == SUCCESS:
        return STEP_WORKED
    if status == NO_DATA:
        return STEP_IDLE
    s.has_last = False
    if status == EPOCH_CHANGED:
        s.void_below = 0 if s.knows_epoch else load_acquire64(&s.r.hdr.wc)
        s.knows_epoch = True
        s.refused = 0
        writer_start(&s.w, random_epoch())
        count64(&s.n.connections, 1)
        return SERVER_CONNECTED
    if status == OVERRUN_DETECTED:
        # What a first synchronisation has missed was void anyway.
        if <int64_t>(s.void_below - s.r.rc) >= 0 and s.r.rc - s.r.lost == 0 and s.void_below != 0:
            return STEP_WORKED
        s.overrun = True
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
    """Most nanoseconds between two looks: a client that does not ring may restart without a sign in its counters."""
    if s.has_last and (s.r.bell == NULL or load_relaxed64(&s.r.bell.ringer) != s.r.epoch):
        return SAME_EPOCH_NS
    return <uint64_t>-1


cdef server_event server_loop(server_t *s, uint64_t ns) noexcept nogil:
    """Serves for at most ns nanoseconds, or until something happened that the caller logs."""
    cdef uint64_t start = now_ns(), passed
    cdef int step
    while True:
        step = server_step(s)
        if step >= 0:
            return <server_event>step
        if step == STEP_WORKED and (s.r.batches & 0xff) != 0:
            continue
        passed = now_ns() - start
        if passed >= ns:
            return SERVER_TICK
        if step == STEP_WORKED:
            continue
        reader_wait(&s.r, min(ns - passed, server_patience(s)), &s.stop)


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


cdef class Server:
    """Serves one Store over a pair of inline channels.

    request: the request channel's memory (read-only will do); response: the response channel's, writable, claimed
    by the caller. request_bell, response_bell: writable buffers or None. poll: microseconds, None: adaptive. watch: of
    all engines of this process, or None.

    run() belongs to one thread; stop(), counters and state may be used from others.
    """
    EVENTS = ("tick", "connected", "disconnected", "incompatible", "overrun", "stopped", "unruly")

    cdef server_t *s
    cdef Mapping request, response, request_bell, response_bell
    cdef readonly Store store
    cdef Watch watch
    cdef uint32_t busy
    cdef readonly bint connected

    def __cinit__(self):
        self.s = <server_t *>calloc(1, sizeof(server_t))
        if self.s == NULL:
            raise MemoryError()

    def __init__(self, request, response, Store store not None, *, request_protocol=BLOCK_REQUEST_PROTOCOL,
                 response_protocol=BLOCK_RESPONSE_PROTOCOL, request_bell=None, response_bell=None, poll=None,
                 Watch watch=None):
        cdef uint64_t least = SHMSTREAM_HEADER_SIZE + sizeof(block_event)
        if self.store is not None:
            raise UsageError("a Server is initialised once")
        self.store = store
        self.s.store = &store.s
        if store.s.kind == STORE_FILE:
            self.s.stage = <uint8_t *>aligned_alloc(BLOCK_SIZE, BATCH * BLOCK_SIZE)
            if self.s.stage == NULL:
                raise MemoryError()
        self.request = hold(request, False, least)
        self.response = hold(response, True, least)
        reader_init(&self.s.r, self.request.base, self.request.length, sizeof(block_event), request_protocol)
        writer_init(&self.s.w, self.response.base, self.response.length, sizeof(block_event), response_protocol)
        self.s.r.broken = self.request.broken
        self.s.w.broken = self.response.broken
        self.s.r.poll_ns = 0 if poll is None else poll * 1000
        if watch is not None:
            self.watch = watch
            self.s.r.watch = &watch.w
        if request_bell is not None:
            self.request_bell = hold(request_bell, True, sizeof(bell_page))
            self.s.r.bell = self.request_bell.as_bell()
        if response_bell is not None:
            self.response_bell = hold(response_bell, True, sizeof(bell_page))
            self.s.w.bell = self.response_bell.as_bell()
        # A dead predecessor's epoch must not look alive: its answers are nobody's, and our store is not its.
        writer_stop(&self.s.w)
        announce(self.s.w.bell, ENDPOINT_SERVING, store)

    def run(self, seconds=1.0):
        """Serves for about `seconds` or until something happened; the event's name (one of EVENTS)."""
        cdef uint64_t ns = <uint64_t>(seconds * 1e9)
        cdef server_event event
        if not busy_enter(&self.busy):
            raise UsageError("another thread runs this Server")
        if self.response is None or not self.response.held:
            busy_leave(&self.busy)
            raise UsageError("this Server is closed")
        with nogil:
            prepare_thread(TIMER_SLACK_NS, 1)
            event = server_loop(self.s, ns)
        busy_leave(&self.busy)
        return self.happened(event)

    cdef object happened(self, int event):
        if event == SERVER_CONNECTED:
            self.connected = True
        elif event == SERVER_DISCONNECTED or event == SERVER_INCOMPATIBLE:
            self.connected = False
        return self.EVENTS[event]

    def stop(self):
        """Makes run() return "stopped" soon; from any thread."""
        store_release32(&self.s.stop, 1)
        if self.s.r.bell != NULL:
            bell_kick(self.s.r.bell)

    @property
    def broken(self):
        """Name of the channel whose memory was taken away ("request", "response"), or None."""
        return taken_away(self.request, self.response)

    @property
    def fault(self):
        """What an incompatible request channel's header holds: (protocol, size, elements), as read now."""
        if self.request is None or not self.request.held:
            return (0, 0, 0)
        return (load_relaxed64(&self.s.r.hdr.protocol), load_relaxed64(&self.s.r.hdr.size),
                load_relaxed64(&self.s.r.hdr.elements))

    @property
    def counters(self):
        """All counters of this server's life; readable while it runs."""
        cdef server_counters n = self.s.n
        return {"reads": n.reads, "writes": n.writes, "syncs": n.syncs, "sizes": n.sizes,
                "bytes_read": n.bytes_read, "bytes_written": n.bytes_written, "batches": n.batches,
                "merged": n.merged, "rejected": n.rejected, "failed": n.failed, "torn": n.torn,
                "voided": n.voided, "connections": n.connections, "overruns": self.s.r.overruns,
                "lost": self.s.r.lost_total, "wakes": self.s.w.wakes, "sleeps": self.s.r.sleeps}

    def inherit(self, Server other not None):
        """Goes on with another (closed) server's counters, after its channels were made anew."""
        self.s.n = other.s.n
        self.s.r.overruns = other.s.r.overruns
        self.s.r.lost_total = other.s.r.lost_total

    def close(self, *, gone=False):
        """Deactivates the response channel. gone: for good, not "back later"."""
        if self.response is None or not self.response.held:
            return
        if not busy_enter(&self.busy):
            raise UsageError("stop this Server before closing it")
        if not self.response.held:      # another thread was faster
            busy_leave(&self.busy)
            return
        writer_stop(&self.s.w)
        announce(self.s.w.bell, ENDPOINT_GONE if gone else ENDPOINT_BACK_LATER, None)
        if self.s.w.bell != NULL:
            bell_kick(self.s.w.bell)
        self.s.r.bell = NULL
        self.s.w.bell = NULL
        for m in (self.request, self.response, self.request_bell, self.response_bell):
            if m is not None:
                (<Mapping>m).drop()
        self.connected = False
        busy_leave(&self.busy)

    def __dealloc__(self):
        if self.s != NULL:
            if self.response is not None and self.response.held:
                writer_stop(&self.s.w)
            free(self.s.stage)
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
        if server.response is None or not server.response.held:
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


cdef void announce(bell_page *bell, uint32_t state, Store store) noexcept:
    """Tells the other side, who may believe it or not, what stands behind the channel."""
    if bell == NULL:
        return
    if store is not None:
        memcpy(bell.store, PyBytes_AS_STRING(store.identity), 16)
        store_relaxed32(&bell.flags, STORE_READ_ONLY if store.s.read_only else 0)
    store_release32(&bell.state, state)
