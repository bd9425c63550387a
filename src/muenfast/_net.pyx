"""Network interfaces over channels: packets from a TUN or TAP device into a ring, and from a ring into the device.

Runs without the GIL and allocates nothing per packet. Trust: a packet that comes is copied out of the ring once, checked
in that copy, and only what passed goes to the device; of an outgoing one nothing is read back but what this side wrote.
"""
cimport cython
from libc.errno cimport EAGAIN, EFAULT, EINTR, EIO, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from muenfast._ring cimport *
from muenfast._system cimport *
from muenfast._thread cimport TIMER_SLACK_NS, prepare_thread
from muenfast._wire cimport *

from muenfast.errors import UsageError

cdef extern from "_frame.h" nogil:
    enum: FRAME_RAW
    enum: FRAME_NET
    enum: FRAME_ETH
    enum: FRAME_LEAST
    enum: FRAME_MOST
    enum: FRAME_LENGTH
    enum: FRAME_PROTOCOL
    enum: FRAME_OVERSIZE
    enum: ETH_HEADER
    uint32_t frame_size(int kind, uint32_t mtu) noexcept
    uint32_t frame_start(int kind) noexcept
    uint32_t frame_room(int kind, uint32_t size) noexcept
    int frame_finish(int kind, uint8_t *slot, uint32_t size, uint32_t n, uint32_t used, uint32_t mark, int marked) noexcept
    int32_t frame_take(int kind, uint8_t *to, const uint8_t *slot, uint32_t size, uint32_t *mark) noexcept

cdef extern from "<errno.h>" nogil:
    enum: EBADFD

FRAMINGS = {"raw": FRAME_RAW, "net_hdr": FRAME_NET, "eth_dev": FRAME_ETH}
LEAST_MTU, MOST_MTU = FRAME_LEAST, FRAME_MOST

cdef enum:
    BATCH = 64              # most packets of one round
    CLASSES = 7             # of batch sizes: 1, 2 and 3, 4 to 7, ..., BATCH
    # More than any packet of a device whose MTU somebody raised; the rest of it is of no use.
    SPILL = 65536
    PACKET_INFORMATION = 4  # struct tun_pi before each packet of a raw device: flags and ethertype
    HEADROOM = 16           # before a packet in private memory

# Bytes of a round: published together, or copied out together and looked at once (docs/decisions/003).
cdef uint64_t BATCH_BYTES = 16384
# Between looks at a reader that has the ring full, and how long one that takes nothing is waited for: it may be dead.
cdef uint64_t NAP_NS = 50_000
cdef uint64_t STUCK_NS = 300_000_000


def element_size(framing, mtu):
    """Bytes of an element. framing: one of FRAMINGS."""
    return frame_size(FRAMINGS[framing], mtu)


def packet_room(framing, mtu):
    """Bytes of the longest packet or frame in an element."""
    return frame_room(FRAMINGS[framing], frame_size(FRAMINGS[framing], mtu))


cdef inline void count_batch(uint64_t *classes, uint64_t n) noexcept nogil:
    cdef uint32_t k = 0
    while n > 1 and k < CLASSES - 1:
        n >>= 1
        k += 1
    count64(&classes[k], 1)


cdef inline uint64_t batch_of(uint64_t size) noexcept nogil:
    """Most elements of a round."""
    return min(<uint64_t>BATCH, max(<uint64_t>1, BATCH_BYTES // size))


# ------------------------------------------------------------------ device to ring

cdef struct sender_counters:
    uint64_t packets
    uint64_t bytes
    uint64_t oversize       # dropped, as the next three are: more than an element holds
    uint64_t not_ip         # of net_hdr, which has a protocol for IPv4 and IPv6 only
    uint64_t no_peer        # there is no channel to send on
    uint64_t down           # were on their way as the interface went down
    uint64_t waits          # times the ring was full of what its reader had not taken
    uint64_t given_up       # such a reader took nothing for STUCK_NS, and is overrun
    uint64_t batches[CLASSES]


cdef struct sender_t:
    writer_t w              # w.hdr NULL: no channel, what comes is dropped
    int fd
    int wake                # eventfd
    int kind
    bint marked             # the device's packets begin with their net_hdr
    bint pressed            # the ring's reader is waited for where it tells how far it is
    uint32_t size           # of an element
    uint64_t batch
    uint8_t *spill
    uint32_t *used          # of each element: bytes of its room that may be other than zero in this epoch
    uint8_t information[PACKET_INFORMATION]
    uint32_t stop
    uint32_t link           # how often the link changed: odd, it is up; others store it
    uint32_t linked         # what of that was done
    uint64_t full_rc        # the reader's progress when it was looked at last ...
    uint64_t full_since     # ... and since when that is so; 0: the ring is not full
    bint given_up           # full_rc is that of a reader that is waited for no longer
    sender_counters n


cdef enum sender_event:
    SENDER_TICK = 0
    SENDER_UP = 1
    SENDER_DOWN = 2
    SENDER_STOPPED = 3
    SENDER_BROKEN = 4
    SENDER_GONE = 5


cdef ssize_t sender_read(sender_t *s, uint8_t *slot) noexcept nogil:
    """One packet, into an element or (slot NULL) nowhere: its length, more than fits where it is cut short, or -errno."""
    cdef iovec_t parts[3]
    cdef int n = 0
    cdef size_t more = 0
    cdef ssize_t got
    if s.kind == FRAME_RAW:
        parts[0].iov_base = s.information
        parts[0].iov_len = more = PACKET_INFORMATION
        n = 1
    if slot != NULL:
        if not s.marked:
            slot += frame_start(s.kind)
        parts[n].iov_base = slot
        parts[n].iov_len = frame_room(s.kind, s.size) + (frame_start(s.kind) if s.marked else 0)
        n += 1
    parts[n].iov_base = s.spill
    parts[n].iov_len = SPILL
    while True:
        got = readv(s.fd, parts, n + 1)
        if got >= 0:
            return max(<ssize_t>0, got - <ssize_t>more)
        if errno != EINTR:
            return -errno


cdef ssize_t sender_discard(sender_t *s, uint64_t *cause) noexcept nogil:
    """Takes what the device holds, at most BATCH packets, and counts it as dropped; how many, or -errno."""
    cdef ssize_t n, taken = 0
    while taken < BATCH:
        n = sender_read(s, NULL)
        if n == -EAGAIN:
            break
        if n < 0:
            return n
        count64(cause, 1)
        taken += 1
    return taken


cdef uint64_t sender_room(sender_t *s) noexcept nogil:
    """How many elements may be written now: as many as a round has, fewer, or 0 where the reader is to be waited for.

    Trust: what the reader says of itself is advice. Nothing sensible, or nothing new for STUCK_NS, is as if it said nothing.
    """
    cdef writer_t *w = &s.w
    cdef uint64_t rc, used, spare, now
    if not s.pressed or w.bell == NULL or load_relaxed64(&w.bell.reader_epoch) != w.epoch:
        return s.batch
    rc = load_relaxed64(&w.bell.reader_rc)
    used = w.wc - rc
    if used > w.elements or s.given_up and rc == s.full_rc:
        return s.batch
    s.given_up = False
    spare = w.elements - used
    # One element stays free, for the one announced ahead; once full, a quarter of the ring is waited for.
    if spare > (w.elements // 4 if s.full_since != 0 else 1):
        s.full_since = 0
        return min(s.batch, spare - 1)
    now = now_ns()
    if s.full_since == 0:
        count64(&s.n.waits, 1)
    if s.full_since == 0 or rc != s.full_rc:
        s.full_rc = rc
        s.full_since = now
    elif now - s.full_since >= STUCK_NS:
        s.full_since = 0
        s.given_up = True
        count64(&s.n.given_up, 1)
        return s.batch
    return 0


cdef ssize_t sender_batch(sender_t *s, uint64_t most) noexcept nogil:
    """One round: packets straight into slots, published together; how many came, or -errno of what ended it."""
    cdef uint8_t *slot
    cdef ssize_t n = 0, taken = 0
    cdef uint64_t at, filled = 0
    cdef int wrong
    while filled < most and taken < BATCH:
        writer_reserve(&s.w, filled + 1)
        slot = writer_slot(&s.w, filled)
        at = s.w.index + filled if s.w.index + filled < s.w.elements else s.w.index + filled - s.w.elements
        n = sender_read(s, slot)
        if n < 0:
            if n != -EAGAIN:    # some of it may stand there
                s.used[at] = frame_room(s.kind, s.size)
            break
        taken += 1
        if s.marked:
            n = max(<ssize_t>0, n - <ssize_t>frame_start(s.kind))
        wrong = frame_finish(s.kind, slot, s.size, <uint32_t>n, s.used[at], 0, s.marked)
        s.used[at] = <uint32_t>n if wrong == 0 else frame_room(s.kind, s.size)
        if wrong != 0:
            count64(&s.n.oversize if wrong == FRAME_OVERSIZE else &s.n.not_ip, 1)
            continue
        filled += 1
        count64(&s.n.bytes, n)
    if filled != 0:
        writer_publish(&s.w, filled)
        count64(&s.n.packets, filled)
        count_batch(s.n.batches, filled)
    return n if n < 0 and n != -EAGAIN else taken


cdef void sender_wait(sender_t *s, bint packets, uint64_t ns) noexcept nogil:
    """Sleeps until there is a packet (if `packets`) or somebody wakes us, at most ns nanoseconds."""
    cdef pollfd list[2]
    cdef uint64_t value
    list[0].fd = s.wake
    list[1].fd = s.fd
    list[0].events = list[1].events = POLLIN
    list[0].revents = 0
    if poll_ns(list, 2 if packets else 1, ns) > 0 and list[0].revents != 0:
        c_read(s.wake, &value, sizeof(value))


cdef int sender_relink(sender_t *s, uint32_t link) noexcept nogil:
    """Does what the link's state asks for; SENDER_UP, SENDER_DOWN, or -errno."""
    cdef ssize_t n = BATCH
    s.linked = link
    s.full_since = 0
    s.given_up = False
    if link & 1:
        if s.w.hdr != NULL:
            writer_start(&s.w, random_epoch())
            memset(s.used, 0, s.w.elements * sizeof(uint32_t))
        return SENDER_UP
    if s.w.hdr != NULL:
        writer_stop(&s.w)
    while n == BATCH:
        n = sender_discard(s, &s.n.down)
    return SENDER_DOWN if n >= 0 else <int>n


cdef sender_event sender_failed(sender_t *s, int error) noexcept nogil:
    """What an error of the device means; SENDER_TICK where it will be tried again."""
    if error == EBADFD:
        return SENDER_GONE
    if error == EFAULT and s.w.hdr != NULL:
        # The ring's memory was taken away; that is marked as soon as we touch it ourselves.
        memset(writer_slot(&s.w, 0), 0, s.size)
    return SENDER_TICK


cdef sender_event sender_loop(sender_t *s, uint64_t ns) noexcept nogil:
    """Pumps for at most ns nanoseconds, or until something happened that the caller looks after."""
    cdef uint64_t start = now_ns(), passed = 0, room
    cdef uint32_t turns = 0, link
    cdef ssize_t n
    cdef int event
    while True:
        if load_relaxed32(&s.stop) != 0:
            return SENDER_STOPPED
        if s.w.hdr != NULL and load_acquire32(s.w.broken) != 0:
            return SENDER_BROKEN
        link = load_acquire32(&s.link)
        if link != s.linked:
            event = sender_relink(s, link)
            if event >= 0:
                return <sender_event>event
            if event == -EBADFD:
                return SENDER_GONE
        turns += 1
        if turns % 256 == 0:
            passed = now_ns() - start
            if passed >= ns:
                return SENDER_TICK
        if s.linked & 1 == 0:       # packets that come from here on are for the epoch to come
            n = 0
        elif s.w.hdr == NULL:
            n = sender_discard(s, &s.n.no_peer)
        else:
            room = sender_room(s)
            if room == 0:
                sender_wait(s, False, NAP_NS)
                continue
            n = sender_batch(s, room)
        if n > 0:
            continue
        if n < 0 and sender_failed(s, <int>-n) == SENDER_GONE:
            return SENDER_GONE
        passed = now_ns() - start
        if passed >= ns:
            return SENDER_TICK
        sender_wait(s, s.linked & 1, ns - passed)


# ------------------------------------------------------------------ ring to device

cdef struct receiver_counters:
    uint64_t packets
    uint64_t bytes
    uint64_t over           # times the ring was overrun; the elements that cost are the reader's `lost_total`
    uint64_t length         # dropped, as the rest is: a length that cannot be
    uint64_t protocol       # neither IPv4 nor IPv6, or not what net_hdr says
    uint64_t down           # the interface was down
    uint64_t refused        # by the kernel
    uint64_t batches[CLASSES]


cdef struct receiver_t:
    reader_t r
    int fd
    int kind
    uint32_t size
    uint64_t batch
    uint64_t stride         # of packets in private memory
    uint8_t *stage
    int32_t lengths[BATCH]
    uint32_t marks[BATCH]
    uint32_t stop
    bint connected
    uint64_t refused        # incompatible epoch that was reported
    receiver_counters n


cdef enum receiver_event:
    RECEIVER_TICK = 0
    RECEIVER_CONNECTED = 1
    RECEIVER_DISCONNECTED = 2
    RECEIVER_INCOMPATIBLE = 3
    RECEIVER_OVERRUN = 4
    RECEIVER_STOPPED = 5
    RECEIVER_BROKEN = 6
    RECEIVER_GONE = 7


cdef inline int receiver_port(const receiver_t *v, uint32_t mark) noexcept nogil:
    """The device that takes packets of that mark."""
    return v.fd


cdef int receiver_write(receiver_t *v, uint64_t k) noexcept nogil:
    """Gives packet k of the batch, which is private and was checked, to its device; -EBADFD where that is gone, else 0."""
    cdef uint8_t *packet = v.stage + k * v.stride + HEADROOM + frame_start(v.kind)
    cdef size_t n = v.lengths[k]
    cdef int fd = receiver_port(v, v.marks[k])
    cdef ssize_t done
    if v.kind == FRAME_RAW:     # what stands before it is zero: no flags, no ethertype
        packet -= PACKET_INFORMATION
        n += PACKET_INFORMATION
    while True:
        done = c_write(fd, packet, n)
        if done >= 0:
            count64(&v.n.packets, 1)
            count64(&v.n.bytes, v.lengths[k])
            return 0
        if errno != EINTR:
            break
    if errno == EBADFD:
        return -EBADFD
    count64(&v.n.down if errno == EIO else &v.n.refused, 1)
    return 0


cdef ring_status receiver_batch(receiver_t *v, bint *gone) noexcept nogil:
    """One round: packets out of the ring, looked at once whether they were left alone, then to the device."""
    cdef uint64_t n, k
    cdef ring_status status = reader_peek(&v.r, &n)
    if status != SUCCESS:
        return status
    n = min(n, v.batch)
    for k in range(n):
        v.lengths[k] = frame_take(v.kind, v.stage + k * v.stride + HEADROOM, reader_slot(&v.r, k), v.size, &v.marks[k])
    if not reader_intact(&v.r):
        return reader_recover(&v.r)
    reader_advance(&v.r, n)
    count_batch(v.n.batches, n)
    for k in range(n):
        if v.lengths[k] < 0:
            count64(&v.n.length if v.lengths[k] == FRAME_LENGTH else &v.n.protocol, 1)
        elif receiver_write(v, k) != 0:
            gone[0] = True
            break
    return SUCCESS


cdef receiver_event receiver_loop(receiver_t *v, uint64_t ns) noexcept nogil:
    """Pumps for at most ns nanoseconds, or until something happened that the caller looks after."""
    cdef uint64_t start = now_ns(), passed = 0
    cdef uint32_t turns = 0
    cdef ring_status status
    cdef bint gone = False
    while True:
        if load_relaxed32(&v.stop) != 0:
            return RECEIVER_STOPPED
        if load_acquire32(v.r.broken) != 0:
            return RECEIVER_BROKEN
        status = receiver_batch(v, &gone)
        if gone:
            return RECEIVER_GONE
        turns += 1
        if turns % 256 == 0 or status != SUCCESS:
            passed = now_ns() - start
        if status == EPOCH_CHANGED:
            v.connected = True
            v.refused = 0
            return RECEIVER_CONNECTED
        if status == OVERRUN_DETECTED:
            count64(&v.n.over, 1)
            return RECEIVER_OVERRUN
        if status == INACTIVE and v.connected:
            v.connected = False
            return RECEIVER_DISCONNECTED
        if status == INCOMPATIBLE_INTERFACE and v.r.refused != v.refused:
            v.connected = False
            v.refused = v.r.refused
            return RECEIVER_INCOMPATIBLE
        if passed >= ns:
            return RECEIVER_TICK
        if status != SUCCESS:
            reader_wait(&v.r, ns - passed, &v.stop)


# ------------------------------------------------------------------ Python

@cython.auto_pickle(False)
cdef class Pump:
    """What both directions share. run() belongs to one thread; stop(), counters and state may be used from others."""
    cdef Mapping ring, bell
    cdef uint32_t busy
    cdef bint closed
    cdef readonly str framing
    cdef readonly uint32_t size     # of an element

    cdef int check(self, str framing, uint32_t mtu) except -1:
        if framing not in FRAMINGS:
            raise UsageError(f"a framing is one of {', '.join(FRAMINGS)}", value=framing)
        if not FRAME_LEAST <= mtu <= FRAME_MOST:
            raise UsageError(f"an MTU is {FRAME_LEAST} to {FRAME_MOST} bytes", value=mtu)
        self.framing = framing
        self.size = frame_size(FRAMINGS[framing], mtu)
        return 0

    cdef int enter(self) except -1:
        if not busy_enter(&self.busy):
            raise UsageError(f"another thread runs this {type(self).__name__}")
        if self.closed:
            busy_leave(&self.busy)
            raise UsageError(f"this {type(self).__name__} is closed")
        return 0

    cdef void drop(self) noexcept:
        """Lets go of the channel's memory."""
        for m in (self.ring, self.bell):
            if m is not None:
                (<Mapping>m).drop()

    @property
    def broken(self):
        """Whether the owner of the channel's memory took it away."""
        return self.ring is not None and self.ring.held and load_acquire32(self.ring.broken) != 0


@cython.final
cdef class Sender(Pump):
    """Packets of a TUN or TAP device, into a ring while the link is up.

    fd: the device, non-blocking, open as long as this is. memory: the channel, claimed by the caller, or None: what comes
    is dropped. framing: one of FRAMINGS; a raw device gives packet information. pressed: whether a reader that tells how
    far it is, by the bell, is waited for. marked: packets begin with their net_hdr.
    """
    EVENTS = ("tick", "up", "down", "stopped", "broken", "gone")
    cdef sender_t s

    def __cinit__(self):
        self.s.wake = -1

    def __init__(self, int fd, memory, *, str framing, uint32_t mtu, protocol=0, bell=None, bint pressed=True,
                 bint marked=False):
        if self.s.wake != -1:
            raise UsageError("a Sender is initialised once")
        self.check(framing, mtu)
        if marked and framing != "net_hdr":
            raise UsageError("marks are of net_hdr", value=framing)
        self.s.fd, self.s.kind, self.s.size, self.s.marked = fd, FRAMINGS[framing], self.size, marked
        self.s.pressed = pressed
        self.s.spill = <uint8_t *>calloc(1, SPILL)
        if self.s.spill == NULL:
            raise MemoryError
        self.s.batch = BATCH
        if memory is not None:
            self.ring = hold(memory, True, SHMSTREAM_HEADER_SIZE + self.size)
            self.s.used = <uint32_t *>calloc((self.ring.length - SHMSTREAM_HEADER_SIZE) // self.size, sizeof(uint32_t))
            if self.s.used == NULL:
                raise MemoryError
            writer_init(&self.s.w, self.ring.base, self.ring.length, self.size, protocol)
            self.s.w.broken = self.ring.broken
            self.s.batch = min(batch_of(self.size), max(<uint64_t>1, self.s.w.elements // 4))
            self.s.pressed = pressed and self.s.w.elements >= 8
            if bell is not None:
                self.bell = hold(bell, True, sizeof(bell_page))
                self.s.w.bell = self.bell.as_bell()
            writer_stop(&self.s.w)      # a dead predecessor's epoch must not look alive
        self.s.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.s.wake < 0:
            raise OSError(errno, "eventfd")

    def __dealloc__(self):
        free(self.s.spill)
        free(self.s.used)
        if self.s.wake >= 0:
            c_close(self.s.wake)

    cdef void kick(self) noexcept:
        cdef uint64_t one = 1
        c_write(self.s.wake, &one, sizeof(one))     # fails only where it is full, and so wakes anyway

    def run(self, seconds=1.0):
        """Pumps for about `seconds` or until something happened; the event's name (one of EVENTS)."""
        cdef uint64_t ns = <uint64_t>(seconds * 1e9)
        cdef sender_event event
        self.enter()
        with nogil:
            prepare_thread(TIMER_SLACK_NS, 0)
            event = sender_loop(&self.s, ns)
        busy_leave(&self.busy)
        return self.EVENTS[<int>event]

    def link(self, bint up):
        """Tells of the interface's state: up begins a new epoch, down ends it. For one thread, which may be another one."""
        if bool(self.s.link & 1) != bool(up):
            store_release32(&self.s.link, self.s.link + 1)
            self.kick()

    def stop(self):
        """Makes run() return "stopped"; from any thread."""
        store_release32(&self.s.stop, 1)
        self.kick()

    @property
    def active(self):
        """Whether the channel has an epoch."""
        return self.s.w.hdr != NULL and self.s.w.epoch != 0

    @property
    def elements(self):
        """Elements of the channel, 0 without one."""
        return self.s.w.elements

    @property
    def counters(self):
        """By name; `batches`: rounds by their size, 1, 2 to 3, 4 to 7, ..."""
        cdef sender_counters *n = &self.s.n
        dropped = {"oversize": n.oversize, "not_ip": n.not_ip, "no_peer": n.no_peer, "down": n.down}
        return {"tx_packets": n.packets, "tx_bytes": n.bytes, "tx_dropped": sum(dropped.values()), "lost": dropped,
                "waits": n.waits, "given_up": n.given_up, "epochs": self.s.w.epochs, "wakes": self.s.w.wakes,
                "batches": [n.batches[k] for k in range(CLASSES)]}

    def inherit(self, Sender other):
        """Goes on where another (closed) one ended: its counters, and whether the link is up."""
        self.s.n = other.s.n
        self.s.w.epochs, self.s.w.wakes = other.s.w.epochs, other.s.w.wakes
        self.link(other.s.link & 1)

    def close(self):
        """Deactivates the channel and lets go of it; may be called twice. Precondition: no run() is under way."""
        if self.closed:
            return
        self.enter()
        self.closed = True
        if self.s.w.hdr != NULL:
            writer_stop(&self.s.w)
            self.s.w.bell = NULL
            self.s.w.hdr = NULL
        self.drop()
        busy_leave(&self.busy)


@cython.final
cdef class Receiver(Pump):
    """Packets of a ring, into a TUN or TAP device.

    fd: the device, non-blocking, open as long as this is. memory: the channel, read-only. framing: one of FRAMINGS. poll:
    microseconds between looks at a channel whose writer does not ring, None: adaptive.
    """
    EVENTS = ("tick", "connected", "disconnected", "incompatible", "overrun", "stopped", "broken", "gone")
    cdef receiver_t v

    def __init__(self, int fd, memory, *, str framing, uint32_t mtu, protocol, bell=None, poll=None):
        if self.ring is not None:
            raise UsageError("a Receiver is initialised once")
        self.check(framing, mtu)
        self.v.fd, self.v.kind, self.v.size = fd, FRAMINGS[framing], self.size
        self.v.batch = batch_of(self.size)
        self.v.stride = (HEADROOM + self.size + 63) & ~<uint64_t>63
        self.v.stage = <uint8_t *>calloc(self.v.batch, self.v.stride)
        if self.v.stage == NULL:
            raise MemoryError
        self.ring = hold(memory, False, SHMSTREAM_HEADER_SIZE + self.size)
        reader_init(&self.v.r, self.ring.base, self.ring.length, self.size, protocol)
        self.v.r.broken = self.ring.broken
        self.v.r.poll_ns = 0 if poll is None else poll * 1000
        if bell is not None:
            self.bell = hold(bell, True, sizeof(bell_page))
            self.v.r.bell = self.bell.as_bell()

    def __dealloc__(self):
        free(self.v.stage)

    def run(self, seconds=1.0):
        """Pumps for about `seconds` or until something happened; the event's name (one of EVENTS)."""
        cdef uint64_t ns = <uint64_t>(seconds * 1e9)
        cdef receiver_event event
        self.enter()
        with nogil:
            prepare_thread(TIMER_SLACK_NS, 0)
            event = receiver_loop(&self.v, ns)
        busy_leave(&self.busy)
        return self.EVENTS[<int>event]

    def stop(self):
        """Makes run() return "stopped"; from any thread."""
        store_release32(&self.v.stop, 1)
        if self.v.r.bell != NULL:
            bell_kick(self.v.r.bell)

    @property
    def connected(self):
        """Whether the channel has an epoch that was understood."""
        return bool(self.v.connected)

    @property
    def batches(self):
        """Rounds in which packets came."""
        return self.v.r.batches

    @property
    def fault(self):
        """What an incompatible channel's header holds: (protocol, size, elements), as read now."""
        if self.closed:
            return (0, 0, 0)
        return (load_relaxed64(&self.v.r.hdr.protocol), load_relaxed64(&self.v.r.hdr.size),
                load_relaxed64(&self.v.r.hdr.elements))

    @property
    def counters(self):
        """By name; `batches`: rounds by their size, 1, 2 to 3, 4 to 7, ..."""
        cdef receiver_counters *n = &self.v.n
        lost = {"overrun": self.v.r.lost_total, "length": n.length, "protocol": n.protocol, "down": n.down,
                "refused": n.refused}
        frame = n.length + n.protocol
        return {"rx_packets": n.packets, "rx_bytes": n.bytes, "rx_errors": n.over + frame, "rx_over_errors": n.over,
                "rx_frame_errors": frame, "rx_dropped": n.down + n.refused, "lost": lost, "epochs": self.v.r.epochs,
                "sleeps": self.v.r.sleeps, "batches": [n.batches[k] for k in range(CLASSES)]}

    def inherit(self, Receiver other):
        """Goes on with the counters of another (closed) one."""
        self.v.n = other.v.n
        self.v.r.lost_total, self.v.r.epochs, self.v.r.sleeps = other.v.r.lost_total, other.v.r.epochs, other.v.r.sleeps

    def close(self):
        """Lets go of the channel; may be called twice. Precondition: no run() is under way."""
        if self.closed:
            return
        self.enter()
        self.closed = True
        self.v.connected = False
        self.v.r.bell = NULL
        self.drop()
        busy_leave(&self.busy)
