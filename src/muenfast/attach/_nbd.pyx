"""NBD transmission in front of a block Target, without the GIL: many connections, one thread that receives.

The sockets come here after negotiation (attach/nbd.py). Names and numbers are those of the NBD protocol
(NetworkBlockDevice/nbd, doc/proto.md).

Life of a request object: its connection's free list -> the receiving thread (header, payload) -> the target, piece
by piece, in one or more phases -> whoever ends the last piece of the last phase answers -> free list. A request has
one owner at a time; its buffers are never reused while the target has one of them, nor before the answer has left.

Who may wait for whom: the receiving thread never waits for a client or the target. A target's thread that ends a
request sends the answer at once, as far as the socket takes it without waiting; the rest is sent by the receiving
thread. A connection whose client reads no answers runs out of its own requests and buffers, and then nothing more is
received from it: nobody else notices.

Locks: disk.lock guards free lists, ranges and counters; conn.tx_lock what is sent and what epoll is asked for. Neither
is held while the target is called, and nobody who holds tx_lock takes disk.lock.
"""
cimport cython
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOSPC, EOPNOTSUPP, EPERM, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset, strlen

import os

from muenfast._system cimport *
from muenfast._target cimport IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE, Target, io_t, submit_fn
from muenfast._thread cimport *
from muenfast._wire cimport (
    fetch_add_acqrel32, load_acquire32, load_relaxed32, load_relaxed64, store_relaxed32, store_relaxed64, store_release32,
)

from muenfast.errors import UsageError

cdef extern from *:
    """
    #include <endian.h>
    #include <errno.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    /* A request as it comes over the socket: NBD_REQUEST_SIZE bytes, big-endian. */
    struct nbd_request {
        uint32_t magic;
        uint16_t flags;
        uint16_t type;
        uint64_t cookie;
        uint64_t offset;
        uint32_t length;
    };
    enum { NBD_REQUEST_SIZE = 28 };
    _Static_assert(offsetof(struct nbd_request, flags) == 4, "flags");
    _Static_assert(offsetof(struct nbd_request, type) == 6, "type");
    _Static_assert(offsetof(struct nbd_request, cookie) == 8, "cookie");
    _Static_assert(offsetof(struct nbd_request, offset) == 16, "offset");
    _Static_assert(offsetof(struct nbd_request, length) == 24, "length");

    static inline void nbd_request_from(struct nbd_request *q, const uint8_t *bytes) {
        memcpy(q, bytes, NBD_REQUEST_SIZE);
        q->magic = be32toh(q->magic);
        q->flags = be16toh(q->flags);
        q->type = be16toh(q->type);
        q->cookie = be64toh(q->cookie);     /* the client's: given back as it came */
        q->offset = be64toh(q->offset);
        q->length = be32toh(q->length);
    }
    static inline uint8_t *put16(uint8_t *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, 2); return p + 2; }
    static inline uint8_t *put32(uint8_t *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); return p + 4; }
    static inline uint8_t *put64(uint8_t *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); return p + 8; }

    /* The errors that the protocol knows, by Linux errno; what it does not know is an I/O error. */
    static inline uint32_t nbd_errno(int32_t error) {
        switch (-error) {
        case EPERM: case EROFS: case EACCES: return 1;      /* NBD_EPERM */
        case ENOMEM: return 12;
        case EINVAL: return 22;
        case ENOSPC: case EDQUOT: case EFBIG: return 28;
        case EOPNOTSUPP: return 95;
        case ESHUTDOWN: return 108;
        default: return 5;                                  /* NBD_EIO */
        }
    }
    """
    struct nbd_request:
        uint32_t magic
        uint16_t flags
        uint16_t type
        uint64_t cookie
        uint64_t offset
        uint32_t length
    enum: NBD_REQUEST_SIZE
    void nbd_request_from(nbd_request *q, const uint8_t *data) noexcept nogil
    uint8_t *put16(uint8_t *p, uint16_t v) noexcept nogil
    uint8_t *put32(uint8_t *p, uint32_t v) noexcept nogil
    uint8_t *put64(uint8_t *p, uint64_t v) noexcept nogil
    uint32_t nbd_errno(int error) noexcept nogil

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec_t *msg_iov
        size_t msg_iovlen
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    enum: SHUT_RDWR
    ssize_t sendmsg(int fd, const msghdr *m, int flags)
    ssize_t recvmsg(int fd, msghdr *m, int flags)
    ssize_t recv(int fd, void *buf, size_t n, int flags)
    int shutdown(int fd, int how)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    enum: EPOLLIN
    enum: EPOLLOUT
    enum: EPOLLHUP
    enum: EPOLLERR
    enum: EPOLL_CTL_ADD
    enum: EPOLL_CTL_MOD
    enum: EPOLL_CTL_DEL
    enum: EPOLL_CLOEXEC
    int epoll_create1(int flags)
    int epoll_ctl(int ep, int op, int fd, epoll_event *e)
    int epoll_wait(int ep, epoll_event *events, int n, int timeout)

globals()["Target"] = Target    # for callers, which take the type from here: a cimport alone is no attribute


cdef enum:
    # doc/proto.md, "Transmission phase"
    REQUEST_MAGIC = 0x25609513
    SIMPLE_REPLY_MAGIC = 0x67446698
    STRUCTURED_REPLY_MAGIC = 0x668e33ef
    CMD_READ = 0
    CMD_WRITE = 1
    CMD_DISC = 2
    CMD_FLUSH = 3
    CMD_TRIM = 4
    CMD_WRITE_ZEROES = 6
    CMD_FLAG_FUA = 1
    CMD_FLAG_NO_HOLE = 2
    CMD_FLAG_DF = 4
    CMD_FLAG_FAST_ZERO = 16
    REPLY_FLAG_DONE = 1
    REPLY_TYPE_NONE = 0
    REPLY_TYPE_OFFSET_DATA = 1
    REPLY_TYPE_ERROR = 0x8001

    MAX_LENGTH = 32 << 20       # of a read or write: what the protocol asks every server to take
    PIECE = 128 << 10           # most bytes the target is given at a time
    STRIDE = PIECE + 4096       # buffers do not all begin in the same cache sets
    PIECES = 320                # of a connection: one longest request (257, and one for its edges) and 62 shorter ones
    REQUESTS = 256              # of a connection; the kernel's client has at most 128 in flight
    LANES = 8                   # pieces of zeros that one WRITE_ZEROES has in flight
    STAGING = 64 << 10          # bytes received ahead: many small requests come with one call
    ARENA = STAGING + PIECES * STRIDE
    IOVS = 64                   # of one sendmsg or recvmsg
    TURNS = 16                  # calls of recv before other connections have their turn
    EVENTS = 64
    HEAD = 96                   # bytes of a reply before its data, an error's text included
    TEXT = 60                   # most bytes of such a text
    NOTED = 64                  # violations kept for violations()


cdef enum:                      # what was done last of a request
    DONE_NOTHING = 0
    DONE_EDGES = 1              # blocks that it covers in part were read
    DONE_EDGE_WRITES = 2        # and, for zeros, written
    DONE_MAIN = 3
    DONE_ALL = 4


cdef enum:                      # what a connection's bytes are taken for
    STATE_HEADER = 0
    STATE_PAYLOAD = 1
    STATE_SKIP = 2              # of a write that is refused
    STATE_ENDED = 3             # nothing more is received


cdef enum:                      # why a connection was ended
    ENDED_WELL = 0
    ENDED_MAGIC = 1
    ENDED_CUT = 2               # in the middle of a request


cdef struct piece_t:
    io_t io
    request_t *request
    uint8_t *mem
    piece_t *next


cdef struct request_t:
    conn_t *conn
    request_t *next             # free list, ready list, list of what was sent
    uint64_t cookie
    uint64_t offset             # bytes
    uint32_t length
    uint16_t type
    uint16_t flags
    uint32_t phase
    uint32_t pending            # parts of the current phase not done, and one more while they are submitted
    uint32_t error              # negative errno of the first part that failed
    const char *text            # what is wrong, for people
    uint64_t first              # blocks that it touches: [first, last)
    uint64_t last
    uint32_t gap                # bytes of block `first` before `offset`
    bint rejected               # by a rule; the target never saw it
    bint unsent                 # nobody is there to take the answer
    # Blocks covered in part: the first, and the last if it is another one. `edge` holds their old contents.
    uint32_t edges
    io_t part[2]                # reads and writes of edges; [0] also syncs and discards
    piece_t *edge
    piece_t *pieces             # payload: block `first` + PIECE * k stands in piece k
    # Zeros that are written. Under disk.lock.
    piece_t *lanes              # idle
    uint64_t at                 # blocks [at, end) are not submitted yet
    uint64_t end
    uint32_t flying
    bint pumping
    # Writes: in the list of active or waiting ranges. Under disk.lock.
    request_t *before
    request_t *after
    bint partial
    bint ranged
    # The answer. Under conn.tx_lock.
    request_t *following
    uint64_t size               # bytes, head and data
    uint64_t sent
    piece_t *out                # where the next byte of data is, or before ...
    uint64_t out_base           # ... and how many bytes of pieces stand before that one
    uint32_t head_size
    uint8_t head[HEAD]


cdef struct conn_t:
    disk_t *disk
    int fd
    bint used                   # under disk.lock
    bint structured
    uint8_t *arena
    # The receiving thread's.
    uint32_t state
    uint32_t why
    request_t *receiving
    uint64_t left               # bytes of payload, or to skip
    piece_t *into
    uint32_t into_at
    uint32_t staged
    uint32_t staging_end
    uint8_t *staging
    # Under disk.lock.
    request_t *requests
    piece_t *pieces
    request_t *free_requests
    piece_t *free_pieces
    uint32_t fresh_requests     # those from here on were never used, and their memory never touched
    uint32_t fresh_pieces
    uint32_t spare_pieces       # in free_pieces
    uint32_t active             # requests not in the free list
    bint starved                # the receiving thread found none, and waits to be told
    bint kicked
    conn_t *next_kicked
    # Under tx_lock.
    pthread_mutex_t tx_lock
    request_t *out_first
    request_t *out_last
    bint reading
    bint blocked                # the socket takes no more; epoll will tell
    bint hup
    bint broken                 # nobody will read an answer
    bint listed                 # epoll knows fd
    uint32_t mask


cdef struct noted_t:
    uint32_t why
    uint32_t value


cdef struct disk_t:
    submit_fn submit
    void *ctx
    uint64_t size               # bytes; atomic: resized()
    uint32_t block              # bytes
    bint read_only
    bint discards
    bint clears                 # what is discarded reads as zeros
    uint8_t *zeros              # PIECE bytes, only ever read
    uint32_t limit
    conn_t *conns
    int epoll
    int wake                    # eventfd: the receiving thread is wanted
    int noted_event             # eventfd: violations() has something
    uint32_t stop               # 1: receive no more; 2: and send no more
    # All below: under lock.
    pthread_mutex_t lock
    bint woken
    conn_t *kicked
    uint32_t connections
    uint32_t runners
    request_t *active           # writes that the target has
    request_t *waiting          # writes that overlap one of which either covers a block in part; oldest first
    request_t *waiting_last
    uint32_t partials           # in either list
    request_t *ready            # out of `waiting`
    request_t *ready_last
    bint running                # somebody takes them from there
    noted_t noted[NOTED]
    uint32_t notes
    uint64_t accepted
    uint64_t reads
    uint64_t writes
    uint64_t syncs
    uint64_t trims
    uint64_t zeroes
    uint64_t bytes
    uint64_t errors
    uint64_t rejected
    uint64_t violations
    uint64_t cut
    uint64_t unsent
    uint64_t waits


# ------------------------------------------------------------------ who wakes the receiving thread

cdef void wake(disk_t *d) noexcept nogil:
    """Precondition: lock held. After its release the disk may be closed: so not later."""
    cdef uint64_t one = 1
    if not d.woken:
        d.woken = True
        c_write(d.wake, &one, sizeof(one))


cdef void kick(conn_t *c) noexcept nogil:
    """Has the receiving thread look at a connection. Precondition: disk.lock held."""
    if not c.kicked:
        c.kicked = True
        c.next_kicked = c.disk.kicked
        c.disk.kicked = c
    wake(c.disk)


cdef void interest(conn_t *c) noexcept nogil:
    """Asks epoll for what this connection waits for. Precondition: tx_lock held.

    What has hung up is reported for ever: it leaves epoll as long as nothing is to be done about that.
    """
    cdef epoll_event e
    cdef uint32_t mask = (<uint32_t>EPOLLIN if c.reading else 0) | (<uint32_t>EPOLLOUT if c.blocked else 0)
    e.events = mask
    e.data.ptr = c
    if c.hup and mask == 0:
        if c.listed:
            epoll_ctl(c.disk.epoll, EPOLL_CTL_DEL, c.fd, &e)
            c.listed = False
    elif not c.listed:
        c.listed = epoll_ctl(c.disk.epoll, EPOLL_CTL_ADD, c.fd, &e) == 0
    elif mask != c.mask:
        epoll_ctl(c.disk.epoll, EPOLL_CTL_MOD, c.fd, &e)
    c.mask = mask


# ------------------------------------------------------------------ request objects

cdef request_t *take_request(conn_t *c, uint32_t pieces) noexcept nogil:
    """A request with that many pieces, or NULL: then the connection is starved, and kicked when some came back."""
    cdef disk_t *d = c.disk
    cdef request_t *r = NULL
    cdef piece_t *p
    cdef uint32_t k
    pthread_mutex_lock(&d.lock)
    if (c.free_requests == NULL and c.fresh_requests == REQUESTS
            or c.spare_pieces + (PIECES - c.fresh_pieces) < pieces):
        c.starved = True
        d.waits += 1
    else:
        r = c.free_requests
        if r != NULL:
            c.free_requests = r.next
        else:
            r = &c.requests[c.fresh_requests]
            c.fresh_requests += 1
        memset(r, 0, sizeof(request_t))
        r.conn = c
        for k in range(pieces):
            p = c.free_pieces
            if p != NULL:
                c.free_pieces = p.next
                c.spare_pieces -= 1
            else:
                p = &c.pieces[c.fresh_pieces]
                p.mem = c.arena + STAGING + <size_t>c.fresh_pieces * STRIDE
                c.fresh_pieces += 1
            p.request = r
            p.next = r.pieces
            r.pieces = p
        c.active += 1
    pthread_mutex_unlock(&d.lock)
    return r


cdef void put_back(conn_t *c, piece_t *p) noexcept nogil:
    """Precondition: disk.lock held. A list of pieces."""
    cdef piece_t *following
    while p != NULL:
        following = p.next
        p.next = c.free_pieces
        c.free_pieces = p
        c.spare_pieces += 1
        p = following


cdef void release(request_t *r) noexcept nogil:
    """Gives a list of requests, of one connection, back; the last touch of it and of the disk."""
    cdef conn_t *c
    cdef disk_t *d
    cdef request_t *following
    if r == NULL:
        return
    c = r.conn
    d = c.disk
    pthread_mutex_lock(&d.lock)
    while r != NULL:
        following = r.next
        put_back(c, r.pieces)
        put_back(c, r.lanes)
        put_back(c, r.edge)
        r.next = c.free_requests
        c.free_requests = r
        c.active -= 1
        d.unsent += r.unsent
        r = following
    if c.starved:
        c.starved = False
        kick(c)
    elif c.active == 0 and c.state == STATE_ENDED:
        kick(c)
    pthread_mutex_unlock(&d.lock)


# ------------------------------------------------------------------ answers

cdef uint32_t gather(request_t *r, iovec_t *iov, uint32_t room) noexcept nogil:
    """What is left of one answer, as far as `room` goes; the number of vectors used."""
    cdef uint32_t n = 0
    cdef uint64_t at, end, data
    cdef piece_t *p
    cdef uint64_t base
    if r.sent < r.head_size:
        iov[0].iov_base = r.head + r.sent
        iov[0].iov_len = r.head_size - r.sent
        n = 1
    if r.size == r.head_size:
        return n
    data = r.sent - r.head_size if r.sent > r.head_size else 0
    at = r.gap + data
    end = r.gap + (r.size - r.head_size)
    while at - r.out_base >= PIECE:
        r.out_base += PIECE
        r.out = r.out.next
    p = r.out
    base = r.out_base
    while at < end and n < room:
        iov[n].iov_base = p.mem + (at - base)
        iov[n].iov_len = min(end, base + PIECE) - at
        n += 1
        base += PIECE
        at = base
        p = p.next
    return n


cdef request_t *transmit(conn_t *c) noexcept nogil:
    """Sends answers until none is left or the socket is full; those that are done with. Precondition: tx_lock held."""
    cdef iovec_t iov[IOVS]
    cdef msghdr m
    cdef request_t *r
    cdef request_t *sent = NULL
    cdef uint32_t n
    cdef ssize_t bytes
    cdef uint64_t left
    memset(&m, 0, sizeof(m))
    m.msg_iov = iov
    while c.out_first != NULL and not c.broken:
        n = 0
        r = c.out_first
        while r != NULL and n + 2 <= IOVS:
            n += gather(r, iov + n, IOVS - n)
            r = r.following
        m.msg_iovlen = n
        bytes = sendmsg(c.fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL)
        if bytes < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                c.blocked = True
                interest(c)
                return sent
            c.broken = True
            shutdown(c.fd, SHUT_RDWR)           # the receiving thread sees its end
            break
        while bytes > 0:
            r = c.out_first
            left = r.size - r.sent
            if <uint64_t>bytes < left:
                r.sent += bytes
                break
            bytes -= left
            c.out_first = r.following
            r.next = sent
            sent = r
    while c.out_first != NULL:                  # broken
        r = c.out_first
        c.out_first = r.following
        r.unsent = True
        r.next = sent
        sent = r
    c.out_last = NULL
    if c.blocked:
        c.blocked = False
        interest(c)
    return sent


cdef void answer(request_t *r) noexcept nogil:
    """Sends the reply of a request that is through, or leaves that to the receiving thread."""
    cdef conn_t *c = r.conn
    cdef disk_t *d = c.disk
    cdef request_t *sent
    cdef uint8_t *p = r.head
    cdef uint16_t length
    cdef int error = <int>r.error
    pthread_mutex_lock(&d.lock)                 # counted first: who has the reply finds it in the counters
    if r.rejected:
        d.rejected += 1
    elif error != 0:
        d.errors += 1
    if r.type == CMD_READ:
        d.reads += 1
    elif r.type == CMD_WRITE:
        d.writes += 1
    elif r.type == CMD_FLUSH:
        d.syncs += 1
    elif r.type == CMD_TRIM:
        d.trims += 1
    elif r.type == CMD_WRITE_ZEROES:
        d.zeroes += 1
    if error == 0 and (r.type == CMD_READ or r.type == CMD_WRITE):
        d.bytes += r.length
    pthread_mutex_unlock(&d.lock)
    if c.structured and error != 0:
        length = <uint16_t>strlen(r.text) if r.text != NULL else 0
        p = put32(p, STRUCTURED_REPLY_MAGIC)
        p = put16(p, REPLY_FLAG_DONE)
        p = put16(p, REPLY_TYPE_ERROR)
        p = put64(p, r.cookie)
        p = put32(p, 6 + <uint32_t>length)
        p = put32(p, nbd_errno(error))
        p = put16(p, length)
        if length != 0:
            memcpy(p, r.text, length)
        p += length
    elif c.structured and r.type == CMD_READ:
        p = put32(p, STRUCTURED_REPLY_MAGIC)
        p = put16(p, REPLY_FLAG_DONE)
        p = put16(p, REPLY_TYPE_OFFSET_DATA if r.length != 0 else REPLY_TYPE_NONE)
        p = put64(p, r.cookie)
        if r.length != 0:
            p = put32(p, r.length + 8)
            p = put64(p, r.offset)
        else:
            p = put32(p, 0)
    else:
        p = put32(p, SIMPLE_REPLY_MAGIC)
        p = put32(p, nbd_errno(error) if error != 0 else 0)
        p = put64(p, r.cookie)
    r.head_size = <uint32_t>(p - r.head)
    r.size = r.head_size
    if r.type == CMD_READ and error == 0:
        r.size += r.length
    r.out = r.pieces
    pthread_mutex_lock(&c.tx_lock)
    if c.out_first == NULL:
        c.out_first = r
    else:
        c.out_last.following = r
    c.out_last = r
    sent = transmit(c) if not c.blocked or c.broken else NULL
    pthread_mutex_unlock(&c.tx_lock)
    release(sent)


# ------------------------------------------------------------------ writes to parts of blocks

cdef bint conflict(request_t *r, request_t *others, request_t *until) noexcept nogil:
    """Whether r has to wait for one of a list, up to `until`: both touch a block, and one of the two only a part of it.

    Precondition: disk.lock held. Writes of whole blocks are in nobody's way: what two of them leave is the client's
    affair. One that covers a part reads the rest first and writes it back, and must not undo another's.
    """
    while others != until:
        if (r.partial or others.partial) and r.first < others.last and others.first < r.last:
            return True
        others = others.after
    return False


cdef void activate(disk_t *d, request_t *r) noexcept nogil:
    """Precondition: lock held, in no list."""
    r.before = NULL
    r.after = d.active
    if d.active != NULL:
        d.active.before = r
    d.active = r


cdef bint enter_range(request_t *r) noexcept nogil:
    """Whether a write may begin; else it does when those that it waits for have ended, in order."""
    cdef disk_t *d = r.conn.disk
    cdef bint free_to_go
    pthread_mutex_lock(&d.lock)
    r.ranged = True
    free_to_go = not (r.partial or d.partials != 0) or not (conflict(r, d.active, NULL)
                                                            or conflict(r, d.waiting, NULL))
    if r.partial:
        d.partials += 1
    if free_to_go:
        activate(d, r)
    else:
        r.before = d.waiting_last
        r.after = NULL
        if d.waiting_last != NULL:
            d.waiting_last.after = r
        else:
            d.waiting = r
        d.waiting_last = r
    pthread_mutex_unlock(&d.lock)
    return free_to_go


cdef void leave_range(request_t *r) noexcept nogil:
    """A write has ended: whoever waited for it alone may begin."""
    cdef disk_t *d = r.conn.disk
    cdef request_t *w
    cdef request_t *following
    pthread_mutex_lock(&d.lock)
    r.ranged = False
    if r.before != NULL:
        r.before.after = r.after
    else:
        d.active = r.after
    if r.after != NULL:
        r.after.before = r.before
    if r.partial:
        d.partials -= 1
    w = d.waiting
    while w != NULL:
        following = w.after
        if not conflict(w, d.active, NULL) and not conflict(w, d.waiting, w):
            if w.before != NULL:
                w.before.after = following
            else:
                d.waiting = following
            if following != NULL:
                following.before = w.before
            else:
                d.waiting_last = w.before
            activate(d, w)
            w.next = NULL
            if d.ready == NULL:
                d.ready = w
            else:
                d.ready_last.next = w
            d.ready_last = w
        w = following
    pthread_mutex_unlock(&d.lock)


cdef void run_ready(disk_t *d) noexcept nogil:
    """Begins what leave_range() made ready. One thread at a time, and no recursion: a target may end a request inside
    submit(), which makes the next one ready.

    Precondition: the caller holds a request, so that the disk cannot be closed.
    """
    cdef request_t *r
    pthread_mutex_lock(&d.lock)
    if not d.running:
        d.running = True
        while d.ready != NULL:
            r = d.ready
            d.ready = r.next
            pthread_mutex_unlock(&d.lock)
            proceed(r)
            pthread_mutex_lock(&d.lock)
        d.running = False
    pthread_mutex_unlock(&d.lock)


# ------------------------------------------------------------------ execution

cdef bint landed(request_t *r) noexcept nogil:
    """One part of the current phase has ended; whether it was the last. Pairs with itself: who ends the last part
    sees what the others stored."""
    return fetch_add_acqrel32(&r.pending, <uint32_t>-1) == 1


cdef void part_done(io_t *io) noexcept nogil:
    """The target's, from any thread."""
    cdef request_t *r = <request_t *>io.user
    if io.error != 0:
        store_relaxed32(&r.error, <uint32_t>(io.error if io.error < 0 else -EIO))
    if landed(r):
        proceed(r)


cdef void submit(request_t *r, io_t *io, uint32_t kind, uint64_t block, uint64_t nblocks, uint8_t *buf) noexcept nogil:
    cdef disk_t *d = r.conn.disk
    memset(io, 0, sizeof(io_t))
    io.kind = kind
    io.block = block
    io.nblocks = <uint32_t>nblocks
    io.buf = buf
    io.done = part_done
    io.user = r
    fetch_add_acqrel32(&r.pending, 1)
    d.submit(d.ctx, io)


cdef uint64_t edge_block(request_t *r, uint32_t k) noexcept nogil:
    """Block number of edge k: the first block if that is covered in part, else the last."""
    return r.first if k == 0 and r.gap != 0 else r.last - 1


cdef void overlay(request_t *r) noexcept nogil:
    """Puts together what was in the edges and what the client wrote; of zeros: in the edges themselves."""
    cdef uint32_t block = r.conn.disk.block, k, start, end
    cdef uint64_t number, base, finish = r.offset + r.length
    cdef piece_t *p
    cdef uint8_t *old
    cdef uint8_t *new
    for k in range(r.edges):
        number = edge_block(r, k)
        old = r.edge.mem + k * block
        # [start, end) of this block is the client's
        start = <uint32_t>(r.offset - number * block) if number == r.first else 0
        end = block if number + 1 < r.last else <uint32_t>(finish - number * block)
        if r.type == CMD_WRITE_ZEROES:
            memset(old + start, 0, end - start)
            continue
        p = r.pieces
        base = r.first * block
        while number * block - base >= PIECE:
            base += PIECE
            p = p.next
        new = p.mem + (number * block - base)
        memcpy(new, old, start)
        memcpy(new + end, old + end, block - end)


cdef bint pump_zeros(request_t *r) noexcept nogil:
    """Submits zeros as long as a lane is idle; whether all is done. Precondition: disk.lock held, nobody else pumps."""
    cdef disk_t *d = r.conn.disk
    cdef piece_t *p
    cdef uint64_t n
    r.pumping = True
    while r.lanes != NULL and r.error == 0 and r.at < r.end:
        p = r.lanes
        r.lanes = p.next
        n = min(<uint64_t>PIECE // d.block, r.end - r.at)
        memset(&p.io, 0, sizeof(io_t))
        p.io.kind = IO_WRITE
        p.io.block = r.at
        p.io.nblocks = <uint32_t>n
        p.io.buf = d.zeros
        p.io.done = lane_done
        p.io.user = p
        r.at += n
        r.flying += 1
        pthread_mutex_unlock(&d.lock)
        d.submit(d.ctx, &p.io)
        pthread_mutex_lock(&d.lock)
    r.pumping = False
    return r.flying == 0 and (r.error != 0 or r.at == r.end)


cdef void lane_done(io_t *io) noexcept nogil:
    cdef piece_t *p = <piece_t *>io.user
    cdef request_t *r = p.request
    cdef disk_t *d = r.conn.disk
    cdef bint finished = False
    pthread_mutex_lock(&d.lock)
    if io.error != 0:
        r.error = <uint32_t>(io.error if io.error < 0 else -EIO)
    r.flying -= 1
    p.next = r.lanes
    r.lanes = p
    if not r.pumping:
        finished = pump_zeros(r)
    pthread_mutex_unlock(&d.lock)
    if finished:
        proceed(r)


cdef void proceed(request_t *r) noexcept nogil:
    """Goes on with a request whose last phase has ended; returns once a phase is under way or the answer sent."""
    cdef disk_t *d = r.conn.disk
    cdef piece_t *p
    cdef uint64_t at, n
    cdef uint32_t k
    cdef bint finished, written
    while True:
        if r.error != 0 and r.phase < DONE_MAIN:
            r.phase = DONE_MAIN
        if r.phase == DONE_ALL:
            answer(r)
            return
        r.pending = 1                           # ours, until everything is submitted
        if r.phase == DONE_NOTHING:
            r.phase = DONE_EDGES
            for k in range(r.edges):
                submit(r, &r.part[k], IO_READ, edge_block(r, k), 1, r.edge.mem + k * d.block)
        elif r.phase == DONE_EDGES:
            r.phase = DONE_EDGE_WRITES
            overlay(r)
            if r.type == CMD_WRITE_ZEROES:
                for k in range(r.edges):
                    submit(r, &r.part[k], IO_WRITE, edge_block(r, k), 1, r.edge.mem + k * d.block)
        elif r.phase == DONE_EDGE_WRITES:
            r.phase = DONE_MAIN
            if r.type == CMD_READ or r.type == CMD_WRITE:
                p = r.pieces
                at = r.first
                while p != NULL:
                    n = min(<uint64_t>PIECE // d.block, r.last - at)
                    submit(r, &p.io, IO_READ if r.type == CMD_READ else IO_WRITE, at, n, p.mem)
                    at += n
                    p = p.next
            elif r.lanes != NULL:
                pthread_mutex_lock(&d.lock)
                finished = pump_zeros(r)
                pthread_mutex_unlock(&d.lock)
                if not finished:
                    return
            elif r.end > r.at:
                submit(r, &r.part[0], IO_DISCARD, r.at, r.end - r.at, NULL)
        else:
            r.phase = DONE_ALL
            written = r.type == CMD_WRITE or r.type == CMD_WRITE_ZEROES or r.type == CMD_TRIM
            if r.ranged:
                leave_range(r)
                run_ready(d)
            if r.error == 0 and (r.type == CMD_FLUSH or written and r.flags & CMD_FLAG_FUA):
                submit(r, &r.part[0], IO_SYNC, 0, 0, NULL)
        if not landed(r):
            return


cdef void begin(request_t *r) noexcept nogil:
    """A request that was received in full: execute it, or answer what is wrong with it."""
    if r.error != 0 or r.length == 0 and r.type != CMD_FLUSH:
        r.phase = DONE_ALL
    elif r.type == CMD_READ:
        r.phase = DONE_EDGE_WRITES
    elif r.type == CMD_FLUSH:
        r.phase = DONE_MAIN
    elif not enter_range(r):
        return
    proceed(r)


# ------------------------------------------------------------------ reception

cdef const char *refuse(conn_t *c, nbd_request *q, int *error) noexcept nogil:
    """What is wrong with a request, NULL if nothing is: a text, and the errno that goes with it."""
    cdef disk_t *d = c.disk
    cdef uint32_t allowed = CMD_FLAG_FUA
    cdef uint64_t size
    error[0] = -EINVAL
    if q.type == CMD_READ:
        if c.structured:
            allowed |= CMD_FLAG_DF
    elif q.type == CMD_WRITE_ZEROES:
        allowed |= CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO
    elif q.type != CMD_WRITE and q.type != CMD_FLUSH and q.type != CMD_TRIM:
        return "this server does not know the command"
    if q.flags & ~allowed:
        return "a flag does not go with the command"
    if q.type == CMD_FLUSH:
        if q.offset != 0 or q.length != 0:
            return "a flush has neither offset nor length"
        return NULL
    if q.type != CMD_READ and d.read_only:
        error[0] = -EPERM
        return "the disk is read-only"
    if q.type == CMD_TRIM and not d.discards:
        return "this disk does not take trims"
    if (q.type == CMD_READ or q.type == CMD_WRITE) and q.length > MAX_LENGTH:
        return "longer than the maximum block size"
    size = load_relaxed64(&d.size)
    if q.offset > size or q.length > size - q.offset:
        if q.type == CMD_WRITE or q.type == CMD_WRITE_ZEROES:
            error[0] = -ENOSPC
        return "beyond the end of the disk"
    if q.flags & CMD_FLAG_FAST_ZERO and (not d.clears or q.flags & CMD_FLAG_NO_HOLE):
        error[0] = -EOPNOTSUPP
        return "zeros would be as slow as a write"
    return NULL


cdef bint accept_request(conn_t *c, nbd_request *q) noexcept nogil:
    """Makes a request object of a header and begins it, or waits for its payload; False when starved."""
    cdef disk_t *d = c.disk
    cdef request_t *r
    cdef piece_t *p
    cdef uint64_t end = q.offset + q.length
    cdef uint64_t first = 0, last = 0, at = 0, finish = 0
    cdef uint32_t edges = 0, pieces = 0, lanes = 0, k
    cdef int error = 0
    cdef const char *wrong = refuse(c, q, &error)
    if wrong == NULL and q.length != 0:
        first = q.offset // d.block
        last = (end + d.block - 1) // d.block
        if q.type == CMD_READ or q.type == CMD_WRITE:
            pieces = <uint32_t>(((last - first) * d.block + PIECE - 1) // PIECE)
        if q.type == CMD_WRITE or q.type == CMD_WRITE_ZEROES:
            edges = (1 if q.offset % d.block != 0 else 0) + (1 if end % d.block != 0 else 0)
            if edges == 2 and last - first == 1:
                edges = 1
        if q.type == CMD_WRITE_ZEROES or q.type == CMD_TRIM:
            at = (q.offset + d.block - 1) // d.block        # whole blocks: [at, finish)
            finish = max(at, end // d.block)
            if q.type == CMD_WRITE_ZEROES and (not d.clears or q.flags & CMD_FLAG_NO_HOLE):
                lanes = <uint32_t>min(<uint64_t>LANES, ((finish - at) * d.block + PIECE - 1) // PIECE)
    r = take_request(c, pieces + lanes + (1 if edges != 0 else 0))
    if r == NULL:
        return False
    r.cookie, r.type, r.flags, r.offset, r.length = q.cookie, q.type, q.flags, q.offset, q.length
    r.first, r.last, r.edges, r.partial = first, last, edges, edges != 0
    r.gap = <uint32_t>(q.offset % d.block)
    r.at, r.end = at, finish
    if wrong != NULL:
        r.rejected = True
        r.error = <uint32_t>error
        r.text = wrong
    if edges != 0:
        r.edge = r.pieces
        r.pieces = r.edge.next
        r.edge.next = NULL
    for k in range(lanes):
        p = r.pieces
        r.pieces = p.next
        p.next = r.lanes
        r.lanes = p
    if q.type != CMD_WRITE or q.length == 0:
        begin(r)
        return True
    c.receiving = r
    c.left = q.length
    if wrong != NULL:
        c.state = STATE_SKIP
    else:
        c.state = STATE_PAYLOAD
        c.into = r.pieces
        c.into_at = r.gap
    return True


cdef void advance_payload(conn_t *c, uint64_t n) noexcept nogil:
    """n bytes of payload have arrived in the pieces."""
    cdef uint64_t room
    c.left -= n
    while n != 0:
        room = PIECE - c.into_at
        if n < room:
            c.into_at += <uint32_t>n
            return
        n -= room
        c.into = c.into.next
        c.into_at = 0


cdef void end_reception(conn_t *c, uint32_t why, uint32_t value) noexcept nogil:
    """Nothing more is received; what was begun is answered, then the connection is closed."""
    cdef disk_t *d = c.disk
    cdef request_t *r = c.receiving
    cdef uint64_t one = 1
    c.receiving = NULL
    pthread_mutex_lock(&c.tx_lock)
    c.reading = False
    interest(c)
    pthread_mutex_unlock(&c.tx_lock)
    pthread_mutex_lock(&d.lock)
    c.state = STATE_ENDED
    c.starved = False
    if why != ENDED_WELL:
        if why == ENDED_CUT:
            d.cut += 1
        else:
            d.violations += 1
        if d.notes < NOTED:
            d.noted[d.notes].why = why
            d.noted[d.notes].value = value
            d.notes += 1
        c_write(d.noted_event, &one, sizeof(one))
    kick(c)
    pthread_mutex_unlock(&d.lock)
    if r != NULL:
        r.next = NULL
        release(r)


cdef bint consume(conn_t *c) noexcept nogil:
    """Takes what stands in the staging buffer as far as it goes; False when starved or ended."""
    cdef uint64_t n, k
    cdef nbd_request q
    cdef request_t *r
    while True:
        n = c.staging_end - c.staged
        if c.state == STATE_HEADER:
            if n < NBD_REQUEST_SIZE:
                return True
            nbd_request_from(&q, c.staging + c.staged)
            if q.magic != REQUEST_MAGIC:
                end_reception(c, ENDED_MAGIC, q.magic)
                return False
            if q.type == CMD_DISC:
                end_reception(c, ENDED_WELL, 0)
                return False
            if not accept_request(c, &q):
                return False
            c.staged += NBD_REQUEST_SIZE
            continue
        n = min(n, c.left)
        if c.state == STATE_SKIP:
            c.staged += <uint32_t>n
            c.left -= n
        else:
            while n != 0:
                k = min(n, <uint64_t>PIECE - c.into_at)
                memcpy(c.into.mem + c.into_at, c.staging + c.staged, k)
                c.staged += <uint32_t>k
                advance_payload(c, k)
                n -= k
        if c.left != 0:
            return True
        r = c.receiving
        c.receiving = NULL
        c.state = STATE_HEADER
        begin(r)


cdef ssize_t receive(conn_t *c) noexcept nogil:
    """One call of recvmsg: the rest of a payload goes where it belongs, what follows into the staging buffer.

    Precondition: consume() returned True, so less than a header stands in the staging buffer, or nothing.
    """
    cdef iovec_t iov[IOVS]
    cdef msghdr m
    cdef uint32_t n = 0, at
    cdef uint64_t left = c.left, direct = 0
    cdef piece_t *p
    cdef ssize_t bytes
    memmove(c.staging, c.staging + c.staged, c.staging_end - c.staged)
    c.staging_end -= c.staged
    c.staged = 0
    if c.state == STATE_PAYLOAD:
        p = c.into
        at = c.into_at
        while left != 0 and n < IOVS - 1:
            iov[n].iov_base = p.mem + at
            iov[n].iov_len = min(left, <uint64_t>PIECE - at)
            left -= iov[n].iov_len
            direct += iov[n].iov_len
            p = p.next
            at = 0
            n += 1
    if c.state != STATE_PAYLOAD or left == 0:
        iov[n].iov_base = c.staging + c.staging_end
        iov[n].iov_len = STAGING - c.staging_end
        n += 1
    memset(&m, 0, sizeof(m))
    m.msg_iov = iov
    m.msg_iovlen = n
    bytes = recvmsg(c.fd, &m, MSG_DONTWAIT)
    if bytes > 0:
        direct = min(direct, <uint64_t>bytes)
        if direct != 0:
            advance_payload(c, direct)
        c.staging_end += <uint32_t>(<uint64_t>bytes - direct)
    return bytes


cdef bint feed(conn_t *c) noexcept nogil:
    """Begins what was received; whether more may be. A starved connection leaves epoll alone until it is kicked, which
    release() may have done already: that is looked at after this."""
    cdef bint more = consume(c)
    if c.state != STATE_ENDED and c.reading != more:
        pthread_mutex_lock(&c.tx_lock)
        c.reading = more
        interest(c)
        pthread_mutex_unlock(&c.tx_lock)
    return more


cdef void serve(conn_t *c) noexcept nogil:
    """Receives and begins requests, for a bounded while; what was received is begun, for epoll does not know of it."""
    cdef ssize_t n
    cdef int turn
    for turn in range(TURNS):
        if not feed(c):
            return
        n = receive(c)
        if n < 0 and errno == EINTR:
            continue
        if n < 0 and errno == EAGAIN:
            return
        if n <= 0:
            # An error (a reset) is an end like any other; in the middle of a request it is said.
            end_reception(c, ENDED_CUT if c.state != STATE_HEADER or c.staging_end != c.staged else ENDED_WELL, 0)
            return
    feed(c)


cdef void close_connection(conn_t *c) noexcept nogil:
    """Precondition: ended, and no request is out: so nobody else knows the connection."""
    cdef disk_t *d = c.disk
    cdef epoll_event e
    if c.listed:
        epoll_ctl(d.epoll, EPOLL_CTL_DEL, c.fd, &e)
    c_close(c.fd)
    munmap(c.arena, ARENA)
    pthread_mutex_destroy(&c.tx_lock)
    pthread_mutex_lock(&d.lock)
    c.used = False
    d.connections -= 1
    pthread_mutex_unlock(&d.lock)


cdef void look_at_kicked(disk_t *d) noexcept nogil:
    """Connections that got requests back, or may be closed; and the end of all of them."""
    cdef conn_t *c
    cdef conn_t *todo
    cdef uint64_t count
    cdef uint32_t k, stop
    cdef bint idle, used
    pthread_mutex_lock(&d.lock)
    c_read(d.wake, &count, sizeof(count))
    d.woken = False
    stop = d.stop
    todo = d.kicked                 # who is kicked from here on has its turn after the others' events
    d.kicked = NULL
    while todo != NULL:
        c = todo
        todo = c.next_kicked
        c.kicked = False
        idle = c.state == STATE_ENDED and c.active == 0
        pthread_mutex_unlock(&d.lock)
        if idle:
            close_connection(c)
        elif c.state != STATE_ENDED:
            serve(c)
        pthread_mutex_lock(&d.lock)
    pthread_mutex_unlock(&d.lock)
    if stop != 0:
        for k in range(d.limit):
            c = &d.conns[k]
            pthread_mutex_lock(&d.lock)
            used = c.used
            pthread_mutex_unlock(&d.lock)
            if not used:
                continue
            if stop == 2:
                shutdown(c.fd, SHUT_RDWR)
            if c.state != STATE_ENDED:
                end_reception(c, ENDED_WELL, 0)


cdef int receive_all(disk_t *d) noexcept nogil:
    """The receiving thread: 0 when stopped and all connections are closed, else a negative errno."""
    cdef epoll_event events[EVENTS]
    cdef conn_t *c
    cdef request_t *sent
    cdef int n, k
    cdef bint woken, over
    while True:
        n = epoll_wait(d.epoll, events, EVENTS, -1)
        if n < 0:
            if errno == EINTR:
                continue
            return -errno
        woken = False
        for k in range(n):
            c = <conn_t *>events[k].data.ptr
            if c == NULL:
                woken = True
                continue
            sent = NULL
            pthread_mutex_lock(&c.tx_lock)
            if events[k].events & <uint32_t>(EPOLLHUP | EPOLLERR):
                c.hup = True
            if c.blocked:
                sent = transmit(c)
            interest(c)
            pthread_mutex_unlock(&c.tx_lock)
            release(sent)
            if c.reading:
                serve(c)
        if woken:                   # last: a connection that is closed here has no event left above
            look_at_kicked(d)
            pthread_mutex_lock(&d.lock)
            over = d.stop != 0 and d.connections == 0
            pthread_mutex_unlock(&d.lock)
            if over:
                return 0


cdef void destroy(disk_t *d) noexcept:
    """Free everything. Precondition: no connection, no receiving thread."""
    cdef uint32_t k
    if d.epoll >= 0:
        c_close(d.epoll)
    if d.wake >= 0:
        c_close(d.wake)
    if d.noted_event >= 0:
        c_close(d.noted_event)
    if d.zeros != NULL:
        munmap(d.zeros, PIECE)
    if d.conns != NULL:
        for k in range(d.limit):
            free(d.conns[k].requests)
            free(d.conns[k].pieces)
        free(d.conns)
    pthread_mutex_destroy(&d.lock)
    free(d)


@cython.final
cdef class NbdDisk:
    """Connected sockets in NBD's transmission phase, in front of one *target*.

    target: executes the I/O; its submit() is called from the thread inside run() and, for requests of several steps,
    from the target's own done(). read_only: refuse writes, also where the target takes them. connections: most at a
    time (1 to 1024); one has up to 256 requests and 40 MiB of buffers, of which memory is taken as far as they were ever
    in use, and given back when it closes.

    Requests need not be aligned: blocks written in part are read first, and no other write of this NbdDisk comes
    between. Raises ValueError for a bad limit or disk size, OSError, MemoryError.
    """
    cdef disk_t *d
    cdef readonly Target target

    max_length = MAX_LENGTH

    def __cinit__(self, Target target not None, *, bint read_only=False, uint32_t connections=64):
        cdef disk_t *d
        cdef epoll_event e
        if not 1 <= connections <= 1024:
            raise ValueError(f"connections is {connections}: 1 to 1024")
        if target.block_size != 512 and target.block_size != 4096:
            raise ValueError(f"the target's blocks have {target.block_size} bytes: 512 or 4096")
        if target.submit == NULL or not 1 <= target.nblocks <= (<uint64_t>1 << 62) // target.block_size:
            raise ValueError(f"the target has {target.nblocks} blocks: a disk has at least one")
        self.target = target
        d = <disk_t *>calloc(1, sizeof(disk_t))
        if d == NULL:
            raise MemoryError()
        pthread_mutex_init(&d.lock, NULL)
        d.epoll = d.wake = d.noted_event = -1
        self.d = d                      # from here on __dealloc__ frees it
        d.submit, d.ctx = target.submit, target.ctx
        d.block, d.size = target.block_size, target.nblocks * target.block_size
        d.read_only, d.discards = read_only or target.read_only, target.discards
        d.clears = target.discards and target.zeroes
        d.limit = connections
        d.conns = <conn_t *>calloc(connections, sizeof(conn_t))
        d.zeros = <uint8_t *>mmap(NULL, PIECE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if d.zeros == MAP_FAILED:
            d.zeros = NULL
        if d.conns == NULL or d.zeros == NULL:
            raise MemoryError()
        d.epoll = epoll_create1(EPOLL_CLOEXEC)
        d.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        d.noted_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        e.events = EPOLLIN
        e.data.ptr = NULL
        if d.epoll < 0 or d.wake < 0 or d.noted_event < 0 or epoll_ctl(d.epoll, EPOLL_CTL_ADD, d.wake, &e) != 0:
            PyErr_SetFromErrno(OSError)

    def __dealloc__(self):
        # The receiving thread or the target still knows the disk: its memory is left to the process.
        if self.d != NULL and self.d.runners == 0 and self.d.connections == 0:
            destroy(self.d)

    cdef disk_t *_open(self) except NULL:
        if self.d == NULL:
            raise ValueError("operation on a closed NbdDisk")
        return self.d

    def resized(self):
        """Takes over the target's size: what reaches beyond it is refused from now on."""
        store_relaxed64(&self._open().size, self.target.nblocks * self.target.block_size)

    def add(self, int fd, bint structured):
        """Serve a connected stream socket whose negotiation has ended; it is ours from then on, and closed by us.

        structured: whether structured replies were negotiated. Raises UsageError (too many connections, or stopped),
        OSError, MemoryError; then the socket is still the caller's.
        """
        cdef disk_t *d = self._open()
        cdef conn_t *c = NULL
        cdef request_t *requests = NULL
        cdef piece_t *pieces = NULL
        cdef uint8_t *arena
        cdef uint32_t k
        cdef int error
        cdef bint listed = False, stopped
        arena = <uint8_t *>mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if arena == MAP_FAILED:
            raise MemoryError()
        madvise(arena, ARENA, MADV_NOHUGEPAGE)      # EINVAL: a kernel without huge pages
        pthread_mutex_lock(&d.lock)
        if d.stop == 0:
            for k in range(d.limit):
                if not d.conns[k].used:
                    c = &d.conns[k]
                    break
        if c != NULL:
            requests, pieces = c.requests, c.pieces
            if requests == NULL:
                requests = <request_t *>calloc(REQUESTS, sizeof(request_t))
            if pieces == NULL:
                pieces = <piece_t *>calloc(PIECES, sizeof(piece_t))
            memset(c, 0, sizeof(conn_t))
            c.requests, c.pieces = requests, pieces
            if requests != NULL and pieces != NULL:
                c.disk, c.fd, c.structured = d, fd, structured
                c.arena = c.staging = arena
                c.reading = True
                pthread_mutex_init(&c.tx_lock, NULL)
                pthread_mutex_lock(&c.tx_lock)      # once listed, the receiving thread may be in it
                interest(c)
                listed = c.listed
                pthread_mutex_unlock(&c.tx_lock)
                if listed:
                    c.used = True
                    d.connections += 1
                    d.accepted += 1
        error = errno
        stopped = d.stop != 0
        pthread_mutex_unlock(&d.lock)
        if listed:
            return
        munmap(arena, ARENA)
        if stopped:
            raise UsageError("this disk is closing")
        if c == NULL:
            raise UsageError(f"{d.limit} connections are open")
        if requests == NULL or pieces == NULL:
            raise MemoryError()
        raise OSError(error, os.strerror(error))

    def run(self):
        """Receive on the calling thread, the only one, until stop() and the last connection's end; 0 or -errno.

        The thread is marked as one that writeback depends on (PR_SET_IO_FLUSHER), where the kernel lets it be: a
        client may be this machine's own block device.
        """
        cdef disk_t *d = self._open()
        cdef int status
        cdef bint alone
        pthread_mutex_lock(&d.lock)
        alone = d.runners == 0
        d.runners += 1 if alone else 0
        pthread_mutex_unlock(&d.lock)
        if not alone:
            raise UsageError("another thread runs this NbdDisk")
        with nogil:
            prepare_thread(TIMER_SLACK_NS, 1)
            status = receive_all(d)
            pthread_mutex_lock(&d.lock)
            d.runners -= 1
            pthread_mutex_unlock(&d.lock)
        return status

    def stop(self, *, now=False):
        """Receive nothing more: what was begun is answered, then all connections are closed. now: nothing more is sent
        either, so that no client is waited for; the target still is."""
        cdef disk_t *d = self._open()
        pthread_mutex_lock(&d.lock)
        d.stop = max(d.stop, <uint32_t>2 if now else <uint32_t>1)
        wake(d)
        pthread_mutex_unlock(&d.lock)

    def fileno(self):
        """Readable while violations() has something to return."""
        return self._open().noted_event

    def violations(self):
        """Why connections were ended since the last call: a list of sentences, the first 64."""
        cdef disk_t *d = self._open()
        cdef uint64_t count
        cdef uint32_t k
        cdef noted_t noted[NOTED]
        cdef uint32_t notes
        pthread_mutex_lock(&d.lock)
        notes = d.notes
        memcpy(noted, d.noted, sizeof(noted))
        d.notes = 0
        c_read(d.noted_event, &count, sizeof(count))
        pthread_mutex_unlock(&d.lock)
        return [f"a request begins with {noted[k].value:#010x} instead of {REQUEST_MAGIC:#010x}"
                if noted[k].why == ENDED_MAGIC else "it ended in the middle of a request" for k in range(notes)]

    @property
    def read_only(self):
        return self._open().read_only

    @property
    def connections(self):
        """Sockets open now."""
        return 0 if self.d == NULL else self.d.connections

    @property
    def in_flight(self):
        """Requests received and not answered."""
        cdef disk_t *d = self._open()
        cdef uint32_t k, n = 0
        pthread_mutex_lock(&d.lock)
        for k in range(d.limit):
            if d.conns[k].used:
                n += d.conns[k].active
        pthread_mutex_unlock(&d.lock)
        return n

    @property
    def counters(self):
        """reads, writes, syncs, trims, zeroes: requests answered; bytes: read and written; errors: that the target
        answered with an error; rejected: that broke a rule; connections: accepted so far; violations: connections
        closed because what came was no request; cut: that ended in the middle of one; unsent: answers that nobody was
        there to take; waits: times a connection had all its requests or buffers in use."""
        cdef disk_t *d = self._open()
        pthread_mutex_lock(&d.lock)
        try:
            return {"reads": d.reads, "writes": d.writes, "syncs": d.syncs, "trims": d.trims, "zeroes": d.zeroes,
                    "bytes": d.bytes, "errors": d.errors, "rejected": d.rejected, "connections": d.accepted,
                    "violations": d.violations, "cut": d.cut, "unsent": d.unsent, "waits": d.waits}
        finally:
            pthread_mutex_unlock(&d.lock)

    def close(self):
        """Free everything once run() has returned. Raises UsageError while it has not; idempotent."""
        cdef disk_t *d = self.d
        cdef bint idle
        if d == NULL:
            return
        pthread_mutex_lock(&d.lock)
        idle = d.runners == 0 and d.connections == 0
        pthread_mutex_unlock(&d.lock)
        if not idle:
            raise UsageError(f"{d.connections} connections with {self.in_flight} requests are still open")
        self.d = NULL
        destroy(d)
