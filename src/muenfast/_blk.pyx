"""Block engines for the inline transport: Server (requests to a Store) and Client (io_t to requests).

Both run without the GIL and allocate nothing per request. Trust: of every foreign event the 24-byte header is
copied once, validated, and only the copy is used; payload is used in place and checked for being intact
afterwards (server, writes) or copied and checked before anybody sees it (client, reads).
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EFAULT, EINTR, EINVAL, EIO, EROFS, errno
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.types cimport off_t

from muenfast._ring cimport *
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
    ssize_t read(int fd, void *buf, size_t n)
    ssize_t write(int fd, const void *buf, size_t n)
    int close(int fd)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *m)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)

cdef extern from *:
    """
    #include <sys/prctl.h>

    /* An engine thread sleeps to the microsecond, not to the default 50. One that a block device waits for must not
     * wait, in reclaim, for that device's own dirty pages (PR_SET_IO_FLUSHER; refused without CAP_SYS_RESOURCE, where
     * no device can be made either). */
    static void prepare_thread(unsigned long slack_ns, int flusher) {
        prctl(PR_SET_TIMERSLACK, slack_ns, 0UL, 0UL, 0UL);
        if (flusher)
            prctl(PR_SET_IO_FLUSHER, 1UL, 0UL, 0UL, 0UL);
    }
    """
    void prepare_thread(unsigned long slack_ns, int flusher) noexcept nogil

cdef enum:
    BATCH = 64              # most requests of one round: one validation, one publish
    WINDOW = 1024           # most requests of a client in flight; also bounded by the rings
    LINUX_ERRNO_MAX = 4095  # linux/err.h MAX_ERRNO

# Pause before a new response epoch after an overrun, so that answers already published can be read.
cdef uint64_t GRACE_NS = 10_000_000
# A client without a bell may have restarted under its old epoch: its last request is looked at again this often.
cdef uint64_t SAME_EPOCH_NS = 20_000_000
# How long a client that (re)connects waits for a server to notice that it had gone: as long as a slow disk may take
# over the writes that it executes out of the request slots.
cdef uint64_t FAREWELL_NS = 5_000_000_000
# After this long without an answer to `size` from an active server the client starts over.
cdef uint64_t ANSWER_NS = 1_000_000_000
cdef unsigned long TIMER_SLACK_NS = 1000
# Blocking calls look for signals this often.
cdef uint64_t SIGNALS_NS = 50_000_000


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
    def in_file(int fd, size, *, read_only=False, identity=None):
        """A store in an open file or block device of `size` bytes; the descriptor stays the caller's."""
        cdef Store self = Store.__new__(Store)
        self.s.kind = STORE_FILE
        self.s.fd = fd
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
    cdef off_t at = <off_t>(block * BLOCK_SIZE)
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


cdef bint server_intact(const server_t *s, uint64_t k) noexcept nogil:
    """Whether slot k of the batch still holds what the client published, everything used of it included.

    As reader_intact: the use before the loads of WSC and epoch (acquire fence; pairs with writer_reserve and
    writer_start); WSC below the WC seen is a restart.
    """
    cdef uint64_t wsc
    fence_acquire()
    wsc = reader_settled(&s.r, &s.r.hdr.wsc)
    return (wsc - (s.r.rc + k) <= s.r.elements and <int64_t>(wsc - s.r.wc) >= 0
            and load_relaxed64(&s.r.hdr.epoch) == s.r.epoch)


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
    if load_relaxed64(&s.r.hdr.epoch) == s.r.epoch and <int64_t>(reader_settled(&s.r, &s.r.hdr.wsc) - s.r.wc) >= 0:
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
    cdef uint64_t n, k, run, skip = 0, published = 0, sectors
    cdef uint8_t *slot
    cdef block_event_header *h
    cdef int status
    n = available if available < BATCH else BATCH
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


cdef server_event server_loop(server_t *s, uint64_t ns) noexcept nogil:
    """Serves for at most ns nanoseconds, or until something happened that the caller logs."""
    cdef uint64_t available, start = now_ns(), passed
    cdef ring_status status
    cdef bint known
    while load_relaxed32(&s.stop) == 0:
        status = reader_peek(&s.r, &available)
        if (status == SUCCESS or status == NO_DATA) and server_forgotten(s):
            s.r.epoch = 0
            status = reader_peek(&s.r, &available)
        if status == SUCCESS:
            status = server_batch(s, available)
        if status != SUCCESS and status != NO_DATA:
            s.has_last = False
        if status == SUCCESS:
            if (s.r.batches & 0xff) == 0 and now_ns() - start >= ns:
                return SERVER_TICK
            continue
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
                continue
            sleep_ns(GRACE_NS)
            writer_start(&s.w, random_epoch())
            return SERVER_OVERRUN
        if status == INACTIVE:
            s.knows_epoch = True        # whatever epoch comes now began in this life
        if (status == INACTIVE or status == INCOMPATIBLE_INTERFACE) and s.w.epoch != 0:
            writer_stop(&s.w)
            if status == INACTIVE:
                return SERVER_DISCONNECTED
        if status == INCOMPATIBLE_INTERFACE and s.refused != s.r.refused:
            s.refused = s.r.refused
            return SERVER_INCOMPATIBLE
        passed = now_ns() - start
        if passed >= ns:
            return SERVER_TICK
        if s.has_last and (s.r.bell == NULL or load_relaxed64(&s.r.bell.ringer) != s.r.epoch):
            reader_wait(&s.r, min(ns - passed, SAME_EPOCH_NS), &s.stop)
        else:
            reader_wait(&s.r, ns - passed, &s.stop)
    return SERVER_STOPPED


cdef class Server:
    """Serves one Store over a pair of inline channels.

    request: the request channel's memory (read-only will do); response: the response channel's, writable, claimed
    by the caller. request_bell, response_bell: writable buffers or None. poll: microseconds, None: adaptive.

    run() belongs to one thread; stop(), counters and state may be used from others.
    """
    EVENTS = ("tick", "connected", "disconnected", "incompatible", "overrun", "stopped")

    cdef server_t *s
    cdef Mapping request, response, request_bell, response_bell
    cdef readonly Store store
    cdef uint32_t busy
    cdef readonly bint connected

    def __cinit__(self):
        self.s = <server_t *>calloc(1, sizeof(server_t))
        if self.s == NULL:
            raise MemoryError()

    def __init__(self, request, response, Store store not None, *, request_protocol=BLOCK_REQUEST_PROTOCOL,
                 response_protocol=BLOCK_RESPONSE_PROTOCOL, request_bell=None, response_bell=None, poll=None):
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
        if event == SERVER_CONNECTED:
            self.connected = True
        elif event == SERVER_DISCONNECTED or event == SERVER_INCOMPATIBLE:
            self.connected = False
        return self.EVENTS[<int>event]

    def stop(self):
        """Makes run() return "stopped" soon; from any thread."""
        store_release32(&self.s.stop, 1)
        if self.s.r.bell != NULL:
            bell_kick(self.s.r.bell)

    @property
    def broken(self):
        """Name of the channel whose memory was taken away ("request", "response"), or None."""
        if self.request is not None and self.request.held and load_acquire32(self.request.broken):
            return "request"
        if self.response is not None and self.response.held and load_acquire32(self.response.broken):
            return "response"
        return None

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


cdef Mapping hold(object memory, bint writable, uint64_t least):
    cdef Mapping m = Mapping.__new__(Mapping)
    m.hold(memory, writable, least)
    return m


cdef void announce(bell_page *bell, uint32_t state, Store store) noexcept:
    """Tells the other side, who may believe it or not, what stands behind the channel."""
    if bell == NULL:
        return
    if store is not None:
        memcpy(bell.store, PyBytes_AS_STRING(store.identity), 16)
        store_relaxed32(&bell.flags, STORE_READ_ONLY if store.s.read_only else 0)
    store_release32(&bell.state, state)


# ------------------------------------------------------------------ targets

cdef class Target:
    """Anything that executes block I/O in blocks of 4096 bytes; what a front end stands on."""


cdef void memory_submit(void *ctx, io_t *io) noexcept nogil:
    cdef store_t *s = <store_t *>ctx
    cdef uint64_t bytes = <uint64_t>io.nblocks * BLOCK_SIZE
    io.error = 0
    if io.kind != IO_SYNC:
        if io.block > s.nblocks or io.nblocks > s.nblocks - io.block:
            io.error = -EINVAL
        elif io.kind == IO_READ:
            memcpy(io.buf, s.memory + io.block * BLOCK_SIZE, bytes)
        else:
            memcpy(s.memory + io.block * BLOCK_SIZE, io.buf, bytes)
    io.done(io)


@cython.final
cdef class Memory(Target):
    """A disk in plain memory, executed inside submit(): the most a front end can reach, for tests and benchmarks."""
    cdef store_t store

    def __cinit__(self, uint64_t nblocks):
        self.store.memory = <uint8_t *>calloc(nblocks, BLOCK_SIZE)
        if self.store.memory == NULL:
            raise MemoryError()
        self.store.nblocks = self.nblocks = nblocks
        self.ctx = <void *>&self.store
        self.submit = memory_submit

    def __dealloc__(self):
        free(self.store.memory)


# ------------------------------------------------------------------ client

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

    Invariant: head - tail <= window <= elements of either ring, and tail counts answered requests only, so that
    neither the request ring (the server has read what it answered) nor the response ring can overrun.
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
        if room == 0 or load_relaxed64(&c.r.hdr.epoch) != c.server:
            return
        n = 0
        io = c.first
        while io != NULL and n < room and n < BATCH:
            n += io.nblocks - io.issued if io.kind != IO_SYNC else 1
            io = io.next
        n = min(n, min(room, <uint64_t>BATCH))
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
        writer_publish(&c.w, n)


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
    if c.state == CLIENT_READY:
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
        if status == NO_DATA:
            passed = now_ns() - start
            if passed >= ns:
                return status
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
    cdef uint64_t start = now_ns(), now, passed, available, epoch
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
    c.window = WINDOW
    while c.window > c.w.elements or c.window > c.r.elements:
        c.window //= 2
    c.n.lives += 1
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
    server is lost, new requests fail instead of waiting for it.

    One background thread calls run() over and over; any number of threads use the blocking calls or submit().
    """
    STATES = ("connecting", "ready", "lost", "failed", "closed")

    cdef client_t *c
    cdef Mapping request, response, request_bell, response_bell
    cdef tuple protocols
    cdef uint32_t busy

    def __cinit__(self):
        self.c = <client_t *>calloc(1, sizeof(client_t))
        if self.c == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.c.lock, NULL)

    def __init__(self, request, response, *, request_protocol=BLOCK_REQUEST_PROTOCOL,
                 response_protocol=BLOCK_RESPONSE_PROTOCOL, request_bell=None, response_bell=None, poll=None,
                 fail_fast=False):
        cdef client_t *c = self.c
        if self.request is not None:
            raise UsageError("a Client is initialised once")
        self.protocols = (request_protocol, response_protocol)
        self.bind(request, response, request_bell, response_bell, 0 if poll is None else poll * 1000)
        c.fail_fast = fail_fast
        c.window = 1
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
        if self.request is not None and self.request.held and load_acquire32(self.request.broken):
            return "request"
        if self.response is not None and self.response.held and load_acquire32(self.response.broken):
            return "response"
        return None

    @property
    def in_flight(self):
        """Requests written and not answered."""
        return load_acquire64(&self.c.head) - load_acquire64(&self.c.tail)

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
        if c.state == CLIENT_CLOSED:
            raise UsageError("this device is closed")
        fetch_add_acqrel32(&c.callers, 1)
        store_release32(&c.wanted, 1)
        try:
            with nogil:
                client_submit_list(c, &ios[0], &ios[n - 1])
                client_await(c, &b, SIGNALS_NS)
            while load_acquire32(&b.done) == 0:
                try:
                    PyErr_CheckSignals()
                except BaseException:
                    with nogil:
                        client_take(c)
                        client_forget(c, &b)
                        client_release(c)
                    raise
                with nogil:
                    client_await(c, &b, SIGNALS_NS)
        finally:
            fetch_add_acqrel32(&c.callers, <uint32_t>-1)
        if b.error != 0:
            raise OSError(-b.error, _os.strerror(-b.error))
        return 0

    cdef int blocks(self, uint32_t kind, object block, object buffer) except -1:
        cdef Py_buffer view
        cdef io_t io
        cdef object first = block
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE if kind == IO_READ else PyBUF_SIMPLE)
        try:
            if view.len % BLOCK_SIZE != 0 or view.len // BLOCK_SIZE > 0xffffffff:
                raise UsageError(f"{view.len} bytes are no whole number of blocks of {BLOCK_SIZE}")
            if first < 0 or first + view.len // BLOCK_SIZE > self.nblocks:
                raise UsageError(f"blocks {first} to {first + view.len // BLOCK_SIZE - 1} reach beyond the disk's "
                                 f"{self.nblocks}")
            if view.len == 0:
                return 0
            io.kind = kind
            io.block = first
            io.nblocks = <uint32_t>(<uint64_t>view.len // BLOCK_SIZE)
            io.buf = <uint8_t *>view.buf
            self.execute(&io, 1)
        finally:
            PyBuffer_Release(&view)
        return 0

    def read_blocks(self, block, buffer):
        """Fills a writable buffer (whole blocks) from block number `block` on; raises OSError, UsageError."""
        self.blocks(IO_READ, block, buffer)

    def write_blocks(self, block, buffer):
        """Writes a buffer (whole blocks) from block number `block` on; raises OSError, UsageError."""
        self.blocks(IO_WRITE, block, buffer)

    def scattered(self, bint write, offsets, buffer):
        """One request per byte offset in `offsets`, all in flight together; buffer holds len(offsets) equal pieces."""
        cdef Py_buffer view
        cdef io_t *ios = NULL
        cdef uint64_t n = len(offsets), k = 0, each, at
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if write else PyBUF_WRITABLE)
        try:
            if n == 0 and view.len == 0:
                return
            each = 0 if n == 0 else <uint64_t>view.len // n
            if n > 0xffffffff or each == 0 or each * n != <uint64_t>view.len or each % BLOCK_SIZE != 0:
                raise UsageError(f"{view.len} bytes are not {n} equal pieces of whole blocks of {BLOCK_SIZE}")
            each //= BLOCK_SIZE
            ios = <io_t *>calloc(n, sizeof(io_t))
            if ios == NULL:
                raise MemoryError()
            try:
                for offset in offsets:
                    if k == n:
                        break
                    at = offset
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


# ------------------------------------------------------------------ requests that nobody waits for in a thread

cdef struct waiting_t:
    io_t io
    completions_t *queue
    waiting_t *next


cdef struct completions_t:
    pthread_mutex_t lock
    waiting_t *done         # newest first
    uint64_t outstanding
    int event               # eventfd: readable while done is not empty


cdef void completions_done(io_t *io) noexcept nogil:
    cdef waiting_t *w = <waiting_t *>io.user
    cdef completions_t *q = w.queue
    cdef uint64_t one = 1
    cdef bint first
    pthread_mutex_lock(&q.lock)
    first = q.done == NULL
    w.next = q.done
    q.done = w
    if first:                           # under the lock: after it the queue may be collected and closed
        write(q.event, &one, sizeof(one))
    pthread_mutex_unlock(&q.lock)


cdef class Completions:
    """Requests to a Target whose ends are told through a descriptor (fileno), for event loops.

    submit() returns a key at once; collect() returns what has ended since. Buffers are held until then. One thread.
    """
    cdef completions_t *q
    cdef readonly Target target
    cdef dict buffers

    def __cinit__(self, Target target not None):
        self.target = target
        self.buffers = {}
        self.q = <completions_t *>calloc(1, sizeof(completions_t))
        if self.q == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.q.lock, NULL)
        self.q.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.q.event < 0:
            raise OSError(errno, "eventfd")

    def fileno(self):
        """Readable while collect() has something to return."""
        return self.q.event

    @property
    def outstanding(self):
        """Requests submitted and not collected."""
        return self.q.outstanding

    def submit(self, str kind, block, buffer=None):
        """Starts "read", "write" (a buffer of whole blocks) or "sync"; the request's key.

        Raises UsageError. The buffer must not be touched before collect() has returned the key.
        """
        cdef waiting_t *w
        cdef _Held held = None
        cdef uint32_t what = IO_READ if kind == "read" else (IO_WRITE if kind == "write" else IO_SYNC)
        if self.q.event < 0:
            raise UsageError("these completions are closed")
        if what != IO_SYNC:
            held = _Held(buffer, what == IO_READ)
            if held.view.len % BLOCK_SIZE != 0 or not 0 < held.view.len // BLOCK_SIZE <= 0xffffffff:
                raise UsageError(f"{held.view.len} bytes are no whole number of blocks of {BLOCK_SIZE}")
            if block < 0 or block + held.view.len // BLOCK_SIZE > self.target.nblocks:
                raise UsageError(f"block {block} and what follows reach beyond the disk's {self.target.nblocks}")
        w = <waiting_t *>calloc(1, sizeof(waiting_t))
        if w == NULL:
            raise MemoryError()
        w.queue = self.q
        w.io.kind = what
        w.io.done = completions_done
        w.io.user = w
        if what != IO_SYNC:
            w.io.block = block
            w.io.nblocks = <uint32_t>(<uint64_t>held.view.len // BLOCK_SIZE)
            w.io.buf = <uint8_t *>held.view.buf
        key = <uintptr_t>w
        self.buffers[key] = held
        self.q.outstanding += 1
        with nogil:
            self.target.submit(self.target.ctx, &w.io)
        return key

    def collect(self):
        """What has ended: a list of (key, 0 or a negative errno), oldest first."""
        cdef waiting_t *w
        cdef waiting_t *following
        cdef uint64_t count
        pthread_mutex_lock(&self.q.lock)
        w = self.q.done
        self.q.done = NULL
        read(self.q.event, &count, sizeof(count))
        pthread_mutex_unlock(&self.q.lock)
        ended = []
        while w != NULL:
            following = w.next
            key = <uintptr_t>w
            del self.buffers[key]
            ended.append((key, w.io.error))
            self.q.outstanding -= 1
            free(w)
            w = following
        ended.reverse()
        return ended

    def close(self):
        """Closes the descriptor. Raises UsageError while requests are outstanding."""
        if self.q.outstanding != 0:
            raise UsageError(f"{self.q.outstanding} requests are outstanding")
        if self.q.event >= 0:
            close(self.q.event)
            self.q.event = -1

    def __dealloc__(self):
        # What is outstanding still points here: leaked rather than written to after it was freed.
        if self.q != NULL and self.q.outstanding == 0:
            if self.q.event >= 0:
                close(self.q.event)
            pthread_mutex_destroy(&self.q.lock)
            free(self.q)
            self.q = NULL


cdef class _Held:
    """A buffer for as long as this object lives."""
    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, buffer, bint writable):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)
