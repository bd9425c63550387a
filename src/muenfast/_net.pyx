"""Network interfaces over channels: packets from TUN or TAP devices into a ring, and from a ring into the devices.

Runs without the GIL and allocates nothing per packet. Trust: a packet that comes is copied out of the ring once, checked
in that copy, and only what passed goes to a device; of an outgoing one nothing is read back but what this side wrote.

With offloads a device gives and takes super-packets, each behind a virtio_net_hdr; the ring has ordinary packets only
(docs/decisions/015).
"""
cimport cython
from libc.errno cimport EAGAIN, EFAULT, EINTR, EIO, ENETDOWN, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from muenfast._blocksum cimport CHECKSUM_AUTO, CHECKSUM_OFF, CHECKSUM_REQUIRE
from muenfast._engine cimport checksum_mode, checksum_word
from muenfast._marks cimport *
from muenfast._packets cimport *
from muenfast._ring cimport *
from muenfast._system cimport *
from muenfast._thread cimport TIMER_SLACK_NS, prepare_thread
from muenfast._wire cimport *

from muenfast.errors import UsageError

cdef extern from "_frame.h" nogil:
    ctypedef struct net_hdr:
        uint32_t mark
        uint16_t length
        uint8_t protocol
        uint8_t qos
    enum: NET_IPV4
    enum: FRAME_RAW
    enum: FRAME_NET
    enum: FRAME_ETH
    enum: FRAME_LEAST
    enum: FRAME_MOST
    enum: FRAME_LENGTH
    enum: FRAME_PROTOCOL
    enum: FRAME_OVERSIZE
    enum: FRAME_NOT_IP
    enum: FRAME_CHECKSUM
    enum: FRAME_SUM
    enum: ETH_HEADER
    uint32_t frame_size(int kind, uint32_t mtu) noexcept
    uint32_t frame_start(int kind) noexcept
    uint32_t frame_room(int kind, uint32_t size) noexcept
    void frame_seal(int kind, uint8_t *slot, uint32_t size, uint32_t n, uint64_t number, uint64_t epoch) noexcept
    bint frame_right(int kind, const uint8_t *element, const uint8_t *slot, uint32_t size, uint32_t n, uint64_t number,
                     uint64_t epoch) noexcept
    int frame_finish(int kind, uint8_t *slot, uint32_t size, const uint8_t *head, uint32_t n, uint32_t used,
                     uint32_t mark) noexcept
    int frame_put(int kind, uint8_t *slot, uint32_t size, const uint8_t *packet, uint32_t n, uint32_t used,
                  uint32_t mark) noexcept
    net_hdr frame_header(const uint8_t *slot) noexcept
    bint frame_agrees(net_hdr h, uint32_t version) noexcept
    int32_t frame_take(int kind, uint8_t *to, const uint8_t *slot, uint32_t size, uint32_t *mark) noexcept

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<errno.h>" nogil:
    enum: EBADFD

FRAMINGS = {"raw": FRAME_RAW, "net_hdr": FRAME_NET, "eth_dev": FRAME_ETH}
LEAST_MTU, MOST_MTU = FRAME_LEAST, FRAME_MOST
MERGES = {"tcp4": COALESCE_TCP4, "tcp6": COALESCE_TCP6, "udp": COALESCE_UDP}
MOST_PORTS = PORTS      # devices of one interface: itself and its children

# Of FIELDS of Receiver.
cdef enum:
    FAULT_LENGTH = 0
    FAULT_PROTOCOL = 1
    FAULT_CHECKSUM = 2


cdef enum:
    PORTS = 256             # MOST_CHILDREN of marks.py, and the interface itself
    BATCH = 64              # most packets of one round
    CLASSES = 7             # of batch sizes: 1, 2 and 3, 4 to 7, ..., BATCH
    # More than any packet of a device; the rest of one whose MTU somebody raised is of no use.
    SPILL = 65536
    PACKET_INFORMATION = 4  # struct tun_pi before each packet of a raw device: flags and ethertype
    HEADROOM = 32           # before a packet in private memory
    ECHO_MOST = 2           # packets of a round that may be of a dialogue
    MERGE = 256             # most elements that are merged before all that is held goes to the devices
    TELL = 8                # elements of these after which the writer is told of the progress
    ANCILLARY = 64          # bytes for a message's mark
    QUEUE = 4096            # packets that the kernel holds for us (tuntap.py)

# Bytes of a round: published together, or copied out together and looked at once (docs/decisions/003).
cdef uint64_t BATCH_BYTES = 16384
# Between looks at a reader that has the ring full, and how long one that takes nothing is waited for: it may be dead.
cdef uint64_t NAP_NS = 50_000
cdef uint64_t STUCK_NS = 300_000_000
# An epoch with checksums, or without, lasts as long at least; and a reader that says that it takes them has as long to come.
cdef uint64_t AGREE_NS = 200_000_000
cdef uint64_t MISSING_NS = 1_000_000_000
# How long, at an epoch's end, a reader may take what is there.
cdef uint64_t LEAVE_NS = 20_000_000
# How long the next packet is looked for before an engine sleeps, where that paid lately: a round trip with two wake-ups from
# another CPU takes 140 us here, so that one that began with them comes to do without.
cdef uint64_t SPIN_NS = 200_000


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


# ------------------------------------------------------------------ devices

cdef enum port_way:
    PORT_PLAIN = 0          # packets have no mark
    PORT_FRONT = 1          # net_hdr stands before a packet that is read, a prefix before a marked one that is written
    PORT_TAP = 2            # packets are read, with their marks, from a packet socket

_WAYS = {"": PORT_PLAIN, "front": PORT_FRONT, "tap": PORT_TAP}


cdef struct port_t:
    # Others store it last when a port begins and first when it ends; both engines take it within their turns only.
    uint32_t fd             # 1 more than the device's descriptor, 0: there is no such port
    int32_t tap             # PORT_TAP: the packet socket
    port_way way
    bint ready              # the sender's: there may be something to read
    uint64_t tx_packets     # the sender's, as the next one: what the device gave
    uint64_t tx_bytes
    uint64_t rx_packets     # the receiver's, as the next one: what the device took
    uint64_t rx_bytes
    uint64_t news           # the sender's, as the next one: the same, of a path's MTU
    uint64_t news_bytes


cdef struct sender_t


# While a sender waits, the receiver of its interface may use it (docs/decisions/019).
cdef struct loan_t:
    uint32_t taken          # 0: the sender waits; it is used by who exchanges that for 1
    sender_t *sender        # stored before that


cdef inline int port_fd(const port_t *p) noexcept nogil:
    return <int>load_acquire32(&p.fd) - 1


@cython.final
cdef class Ports:
    """The devices of one interface, number 0 its own, the others its children's; and whose an incoming mark is.

    marks: the table that says so. offload: all devices are opened for virtio_net_hdr. Used by one Sender and one Receiver
    at a time; add() and remove() may be called meanwhile, by one thread at a time.
    """
    cdef port_t *ports
    cdef uint32_t count     # ports there may be: no number is as high
    cdef uint32_t turn      # the sender's (_turns.h), which lasts while it waits; the receiver's is the table's
    cdef loan_t loan        # of its sender to its receiver
    cdef int wake           # eventfd: ends the sender's wait
    cdef readonly MarkTable marks
    cdef readonly bint offload

    def __cinit__(self, MarkTable marks not None, bint offload=False):
        self.wake = -1
        self.loan.taken = 1
        self.ports = <port_t *>calloc(PORTS, sizeof(port_t))
        if self.ports == NULL:
            raise MemoryError
        self.marks, self.offload = marks, offload
        self.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.wake < 0:
            raise OSError(errno, "eventfd")

    def __dealloc__(self):
        free(self.ports)
        if self.wake >= 0:
            c_close(self.wake)

    cdef void kick(self) noexcept:
        """The sender looks again."""
        cdef uint64_t one = 1
        if self.wake < 0:
            return
        c_write(self.wake, &one, sizeof(one))   # fails only where it is full, and so wakes anyway

    def add(self, uint32_t number, int fd, str way="", int tap=-1):
        """Begins to use a device. fd: non-blocking, open until remove() has returned; way: "", "front" or "tap" (bpf.py), of
        which the last one takes `tap`, too. Raises UsageError."""
        cdef port_t *p
        if number >= PORTS or load_relaxed32(&self.ports[number].fd) != 0:
            raise UsageError(f"a port's number is below {PORTS} and not in use", value=number)
        if way not in _WAYS or (way == "tap") != (tap >= 0) or fd < 0:
            raise UsageError(f"a way is one of {', '.join(map(repr, _WAYS))}, and only a tap has a packet socket", value=way)
        p = &self.ports[number]
        memset(p, 0, sizeof(port_t))
        p.tap, p.way = tap, _WAYS[way]
        store_release32(&p.fd, <uint32_t>fd + 1)
        if number >= self.count:
            store_release32(&self.count, number + 1)
        self.kick()

    def remove(self, uint32_t number, double seconds=10):
        """Ends that; precondition: no mark is the port's. Whether nobody uses the device any more, so that it goes with its
        descriptor: else, after so many seconds, it is to be called again."""
        cdef uint32_t sender, receiver
        cdef uint64_t end = now_ns() + <uint64_t>(seconds * 1e9)
        cdef bint over
        store_release32(&self.ports[number].fd, 0)
        sender, receiver = turn_now(&self.turn), marks_turn(&self.marks.t)
        self.kick()
        with nogil:
            while True:
                over = turn_over(&self.turn, sender) and marks_settled(&self.marks.t, receiver)
                if over or now_ns() >= end:
                    break
                sleep_ns(NAP_NS)
        return over

    def close(self):
        """Lets go of what it has of the system; may be called twice. Precondition: its engines are closed."""
        cdef int fd = self.wake
        self.wake = -1
        if fd >= 0:
            c_close(fd)

    def counters(self, uint32_t number):
        """What the device gave and took; zeros where there never was one."""
        cdef port_t *p = &self.ports[number % PORTS]
        return {"rx_packets": p.rx_packets + p.news, "rx_bytes": p.rx_bytes + p.news_bytes, "tx_packets": p.tx_packets,
                "tx_bytes": p.tx_bytes}


# ------------------------------------------------------------------ devices to ring

cdef extern from *:
    """
    #include <string.h>
    #include <sys/socket.h>

    /* The mark that came with a message, 0: none (SO_RCVMARK). */
    static inline uint32_t message_mark(const struct msghdr *m) {
        uint32_t mark = 0;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c != NULL; c = CMSG_NXTHDR((struct msghdr *)m, c))
            if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_MARK && c->cmsg_len >= CMSG_LEN(sizeof mark))
                memcpy(&mark, CMSG_DATA(c), sizeof mark);
        return mark;
    }
    """
    ctypedef struct msghdr_t "struct msghdr":
        iovec_t *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
    uint32_t message_mark(const msghdr_t *m) noexcept nogil
    ssize_t recvmsg(int fd, msghdr_t *m, int flags) noexcept nogil


cdef struct sender_counters:
    uint64_t packets        # elements, as `bytes` is of what they hold
    uint64_t bytes
    uint64_t oversize       # dropped, as the next ones are: more than an element holds
    uint64_t not_ip         # of net_hdr, which has a protocol for IPv4 and IPv6 only
    uint64_t malformed      # its headers contradict its length, or each other
    uint64_t too_big        # longer than the path's MTU, and not to be fragmented
    uint64_t no_peer        # there is no channel to send on
    uint64_t down           # were on their way as the interface went down
    uint64_t untaken        # elements that their reader had not taken at the end of their epoch, as far as it tells
    uint64_t supers         # super-packets that were split ...
    uint64_t segments       # ... and the elements of that, fragments aside
    uint64_t fragmented     # packets of which the path took fragments only ...
    uint64_t fragments      # ... and the elements of that
    uint64_t gathers        # times packets were let come together
    uint64_t echoes         # rounds in which the receiver's thread sent what answered a packet
    uint64_t news           # senders who were told of the path's MTU
    uint64_t waits          # times the ring was full of what its reader had not taken
    uint64_t given_up       # such a reader took nothing for STUCK_NS, and is overrun
    uint64_t batches[CLASSES]


cdef struct sender_t:
    writer_t w              # w.hdr NULL: no channel, what comes is dropped
    port_t *ports
    const uint32_t *count   # of them
    uint32_t *turn
    uint32_t next           # port that is looked at next
    int wake                # the ports'
    int kind
    bint offload
    bint pressed            # the ring's reader is waited for where it tells how far it is
    uint32_t size           # of an element
    uint64_t batch
    const uint32_t *paths   # path MTUs: entry mark - 1; `marks` of them
    uint32_t marks
    uint8_t *spill          # SPILL bytes for what an element does not hold, behind as many
    uint32_t *used          # of each element: bytes of its room that may be other than zero in this epoch
    uint32_t checksums      # CHECKSUM_*
    bint sums               # elements of this epoch have checksums
    uint64_t room           # bytes of the channel behind its header
    uint64_t began_ns       # when the epoch began
    uint8_t information[PACKET_INFORMATION]
    uint8_t ancillary[ANCILLARY]
    vnet_header vnet        # of the packet that was read, counting from its first byte on
    uint32_t mark           # of the same
    # A packet in private memory of which elements are yet to be made.
    segmenter cut
    pmtu_fragments parts    # of the segment in `piece`
    uint32_t left           # fragments that are to come
    uint32_t limit          # of its path, where a segment may be longer; else 0
    bint super              # it is one that the kernel would have split
    bint told               # its sender was told
    uint32_t port           # where it came from
    uint8_t *piece          # SPILL bytes, as the next one
    uint8_t *news           # to a packet's sender
    pmtu_bucket bucket
    uint32_t stop
    uint32_t link           # how often the link changed: odd, it is up; others store it
    uint32_t linked         # what of that was done
    uint64_t full_rc        # the farthest that the reader was since the ring was full ...
    uint64_t full_since     # ... and since when it was; 0: the ring is not full, or nobody is waited for
    bint given_up           # who is not beyond full_rc is waited for no longer
    bint may_spin           # more than one CPU to run on
    loan_t *loan            # the ports'
    spin_habit spins
    uint64_t since          # when a spin began; 0: none is under way
    gather gathers
    uint32_t spell          # packets read since the last wait
    pollfd polled[PORTS + 1]
    uint32_t numbers[PORTS + 1]
    sender_counters n


cdef enum sender_event:
    SENDER_TICK = 0
    SENDER_UP = 1
    SENDER_DOWN = 2
    SENDER_STOPPED = 3
    SENDER_BROKEN = 4
    SENDER_GONE = 5
    SENDER_CHILD = 6


cdef ssize_t sender_read(sender_t *s, port_t *p, uint8_t *slot) noexcept nogil:
    """One packet of a port, into an element and what of it does not fit into s.spill, or (slot NULL) there: its length, or
    -errno. s.mark and s.vnet are the packet's."""
    cdef iovec_t parts[4]
    cdef msghdr_t message
    cdef int n = 0, fd = port_fd(p)
    cdef size_t before = 0
    cdef ssize_t got
    s.mark = 0
    if s.kind == FRAME_RAW:
        parts[0].iov_base = s.information
        parts[0].iov_len = before = PACKET_INFORMATION
        n = 1
    elif s.offload:
        parts[0].iov_base = &s.vnet
        parts[0].iov_len = before = sizeof(vnet_header)
        n = 1
    if slot != NULL:
        parts[n].iov_base = slot if p.way == PORT_FRONT else slot + frame_start(s.kind)
        parts[n].iov_len = frame_room(s.kind, s.size) + (MARKS_HEADER if p.way == PORT_FRONT else 0)
        n += 1
    parts[n].iov_base = s.spill
    parts[n].iov_len = SPILL
    n += 1
    while True:
        if p.way == PORT_TAP:
            memset(&message, 0, sizeof(message))
            message.msg_iov, message.msg_iovlen = parts, n
            message.msg_control, message.msg_controllen = s.ancillary, ANCILLARY
            got = recvmsg(p.tap, &message, 0)
        else:
            got = readv(fd, parts, n)
        if got >= 0:
            break
        if errno == ENETDOWN and p.way == PORT_TAP:     # told once, when it went down: packets wait behind that
            continue
        if errno != EINTR:
            return -errno
    got = max(<ssize_t>0, got - <ssize_t>before)
    if p.way == PORT_TAP:
        s.mark = message_mark(&message)
    elif p.way == PORT_FRONT:
        if slot != NULL and got >= <ssize_t>sizeof(s.mark):
            memcpy(&s.mark, slot, sizeof(s.mark))
        got = max(<ssize_t>0, got - <ssize_t>MARKS_HEADER)
        if s.offload:
            marks_vnet_out(<uint8_t *>&s.vnet)
    s.spell += 1
    count64(&p.tx_packets, 1)
    count64(&p.tx_bytes, got)
    return got


cdef int sender_drain(sender_t *s, port_t *p) noexcept nogil:
    """Throws away what a device holds whose packets come from its packet socket; 0, or -errno. What is left after BATCH
    packets is the next round's."""
    cdef int fd = port_fd(p), turns
    for turns in range(BATCH):
        if c_read(fd, s.news, SPILL) < 0:   # a packet that is pending stands in s.spill
            return 0 if errno == EAGAIN or errno == EINTR else -errno
    p.ready = True
    return 0


cdef ssize_t sender_discard(sender_t *s, port_t *p, uint64_t *cause) noexcept nogil:
    """Takes what a device holds, at most BATCH packets, and counts it as dropped; how many, or -errno."""
    cdef ssize_t n, taken = 0
    while taken < BATCH:
        n = sender_read(s, p, NULL)
        if n == -EAGAIN:
            break
        if n < 0:
            return n
        count64(cause, 1)
        taken += 1
    return taken


cdef uint64_t sender_room(sender_t *s) noexcept nogil:
    """How many elements may be written now: as many as a round has, fewer, or 0 where the reader is to be waited for.

    Trust: what the reader says of itself is advice. Nothing sensible, or nothing new for STUCK_NS, is as if it said nothing;
    new is what lies behind all that it said since the ring was full, so that going to and fro is standing still.
    """
    cdef writer_t *w = &s.w
    cdef uint64_t rc, used, spare, now
    if not s.pressed or w.bell == NULL:
        return s.batch
    if load_relaxed64(&w.bell.reader_epoch) != w.epoch:
        s.full_since = 0            # who comes next has his own time
        s.given_up = False
        return s.batch
    rc = load_relaxed64(&w.bell.reader_rc)
    used = w.wc - rc
    if used > w.elements or s.given_up and <int64_t>(rc - s.full_rc) <= 0:
        s.full_since = 0
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
    if s.full_since == 0 or <int64_t>(rc - s.full_rc) > 0:
        s.full_rc = rc
        s.full_since = now
    elif now - s.full_since >= STUCK_NS:
        s.full_since = 0
        s.given_up = True
        count64(&s.n.given_up, 1)
        return s.batch
    return 0


cdef inline uint64_t sender_index(const sender_t *s, uint64_t k) noexcept nogil:
    """Which element the k-th reserved slot is."""
    return s.w.index + k if s.w.index + k < s.w.elements else s.w.index + k - s.w.elements


cdef inline uint32_t sender_limit(const sender_t *s, uint8_t first) noexcept nogil:
    """The path's MTU for the packet that was read, 0: none."""
    if s.mark == 0 or s.mark > s.marks:
        return 0
    return pmtu_of(load_relaxed32(&s.paths[s.mark - 1]), first)


cdef void sender_refused(sender_t *s, int status) noexcept nogil:
    """Counts a packet that segment_begin() did not take."""
    if status == SEGMENT_LONG:
        count64(&s.n.oversize, 1)
    elif status == SEGMENT_NOT_IP:
        count64(&s.n.not_ip, 1)
    else:
        count64(&s.n.malformed, 1)


cdef void sender_tell(sender_t *s, const uint8_t *packet, uint32_t n) noexcept nogil:
    """Tells a packet's sender of its path's MTU, once for each packet that was read and not too often."""
    cdef uint8_t *begin = s.news
    cdef uint32_t length, news
    cdef port_t *p = &s.ports[s.port]
    cdef int fd = port_fd(p)
    if s.told or not pmtu_allowed(&s.bucket, now_ns()):
        return
    s.told = True
    length = news = pmtu_news(packet, n, s.limit, begin + sizeof(vnet_header))
    if s.offload:
        memset(begin, 0, sizeof(vnet_header))
        length += sizeof(vnet_header)
    else:
        begin += sizeof(vnet_header)
    if fd >= 0 and c_write(fd, begin, length) >= 0:     # else nobody is there to be told
        count64(&s.n.news, 1)
        count64(&p.news, 1)
        count64(&p.news_bytes, news)


cdef uint64_t sender_pieces(sender_t *s, uint64_t filled, uint64_t most) noexcept nogil:
    """Makes elements, from slot `filled` on, of the packet in private memory; the slot behind the last one. Stops before
    slot `most`; s.cut.left and s.left say what is yet to come."""
    cdef uint8_t *slot
    cdef uint32_t *used
    cdef uint32_t n
    cdef pmtu_verdict verdict
    while filled < most and (s.left != 0 or s.cut.left != 0):
        # Segments that no limit can refuse are announced together: the header's line is not asked for again for each.
        writer_reserve(&s.w, min(most, filled + s.cut.left) if s.left == 0 and s.limit == 0 else filled + 1)
        slot = writer_slot(&s.w, filled)
        used = &s.used[sender_index(s, filled)]
        if s.left != 0:
            n = pmtu_fragments_next(&s.parts, slot + frame_start(s.kind))
            frame_finish(s.kind, slot, s.size, pmtu_fragments_head(&s.parts), n, used[0], s.mark)
            s.left -= 1
            count64(&s.n.fragments, 1)
        elif s.limit == 0:
            n = segment_next(&s.cut, slot + frame_start(s.kind))
            frame_finish(s.kind, slot, s.size, segment_head(&s.cut), n, used[0], s.mark)
            count64(&s.n.segments, s.super)
        else:
            n = segment_next(&s.cut, s.piece)
            verdict = pmtu_look(s.piece, n, s.limit)
            if verdict == PMTU_FRAGMENTS:
                s.left = pmtu_fragments_begin(&s.parts, s.piece, n, s.limit)
                count64(&s.n.fragmented, 1)
                continue
            if verdict != PMTU_FITS:
                count64(&s.n.too_big, 1)
                if verdict == PMTU_NEWS:
                    sender_tell(s, s.piece, n)
                continue
            frame_put(s.kind, slot, s.size, s.piece, n, used[0], s.mark)
            count64(&s.n.segments, s.super)
        if s.sums:
            frame_seal(s.kind, slot, s.size, n, s.w.wc + filled, s.w.epoch)
        used[0] = n
        count64(&s.n.bytes, n)
        filled += 1
    return filled


cdef bint sender_whole(sender_t *s, uint64_t k, uint32_t n) noexcept nogil:
    """Completes slot k, into which a packet of n bytes was read, beginning with virtio_net_hdr's checksum; False where
    none is in it afterwards: it is dropped, or s.cut has it."""
    cdef uint8_t *slot = writer_slot(&s.w, k)
    cdef uint8_t *packet = slot + frame_start(s.kind)
    cdef uint64_t at = sender_index(s, k)
    cdef uint32_t room = frame_room(s.kind, s.size), limit = 0, used = max(s.used[at], min(n, room))
    cdef int status
    s.used[at] = used       # where none is in it afterwards
    if s.kind == FRAME_NET and n != 0:
        limit = sender_limit(s, packet[0])
    if s.offload and (s.vnet.kind != VNET_NONE or limit != 0 and n > limit) or not s.offload and limit != 0 and limit < n <= room:
        memcpy(s.spill - min(n, room), packet, min(n, room))
        if not s.offload:
            memset(&s.vnet, 0, sizeof(s.vnet))
        status = segment_begin(&s.cut, &s.vnet, s.spill - min(n, room), n, room)
        if status < 0:
            s.cut.left = 0
            sender_refused(s, status)
            return False
        s.limit = limit if segment_longest(&s.cut) > limit else 0
        s.told = False
        s.super = s.vnet.kind != VNET_NONE
        count64(&s.n.supers, s.super)
        return False
    if s.offload and s.vnet.flags & VNET_NEEDS_CHECKSUM and n <= room:
        status = segment_complete(&s.cut, &s.vnet, packet, n)
        if status < 0:
            sender_refused(s, status)
            return False
    status = frame_finish(s.kind, slot, s.size, packet, n, used, s.mark)
    if status == FRAME_OVERSIZE:
        count64(&s.n.oversize, 1)
    elif status == FRAME_NOT_IP:
        count64(&s.n.not_ip, 1)
    elif status != 0:
        count64(&s.n.malformed, 1)
    else:
        if s.sums:
            frame_seal(s.kind, slot, s.size, n, s.w.wc + k, s.w.epoch)
        s.used[at] = n
        count64(&s.n.bytes, n)
    return status == 0


cdef ssize_t sender_batch(sender_t *s, uint64_t most) noexcept nogil:
    """One round of s.port: packets straight into slots, published together; how many came, 0 where there are no more, or
    -errno of what ended it."""
    cdef port_t *p = &s.ports[s.port]
    cdef ssize_t n = 0, taken = 0
    cdef uint64_t filled = sender_pieces(s, 0, most)
    while filled < most and taken < BATCH and port_fd(p) >= 0:
        writer_reserve(&s.w, filled + 1)
        n = sender_read(s, p, writer_slot(&s.w, filled))
        if n < 0:
            if n != -EAGAIN:    # some of it may stand there
                s.used[sender_index(s, filled)] = frame_room(s.kind, s.size)
            break
        taken += 1
        if sender_whole(s, filled, <uint32_t>n):
            filled += 1
        else:
            filled = sender_pieces(s, filled, most)
    if filled != 0:
        writer_publish(&s.w, filled)
        count64(&s.n.packets, filled)
        count_batch(s.n.batches, filled)
    if n < 0:
        p.ready = False
        if n != -EAGAIN:
            return n
    return taken + <ssize_t>(filled != 0)


cdef inline bint sender_pending(const sender_t *s) noexcept nogil:
    return s.cut.left != 0 or s.left != 0


cdef bint sender_turn(sender_t *s) noexcept nogil:
    """Whether a port is ready; s.port is that one, in turns. One whose packet is pending goes on."""
    cdef uint32_t count = load_acquire32(s.count), k
    if sender_pending(s):
        return True
    for k in range(count):
        s.port = s.next if s.next < count else 0
        s.next = s.port + 1
        if s.ports[s.port].ready and port_fd(&s.ports[s.port]) >= 0:
            return True
    return False


cdef bint sender_poll(sender_t *s, bint packets, uint64_t ns) noexcept nogil:
    """Sleeps until a port has a packet (if `packets`) or somebody wakes us, at most ns nanoseconds; whether that is so. A
    turn: as long as it is waited for, a device does not go with its descriptor."""
    cdef uint32_t count, k, n = 1
    cdef uint64_t value
    cdef int fd, found
    turn_enter(s.turn)
    count = load_acquire32(s.count)
    s.polled[0].fd = s.wake
    s.polled[0].events = POLLIN
    s.polled[0].revents = 0
    if packets:
        for k in range(count):
            fd = port_fd(&s.ports[k])
            if fd < 0:
                continue
            s.polled[n].fd = s.ports[k].tap if s.ports[k].way == PORT_TAP else fd
            s.polled[n].events = POLLIN
            s.polled[n].revents = 0
            s.numbers[n] = k
            n += 1
    found = poll_ns(s.polled, n, ns)
    if found > 0:
        if s.polled[0].revents != 0:
            c_read(s.wake, &value, sizeof(value))
        for k in range(1, n):
            if s.polled[k].revents != 0:
                s.ports[s.numbers[k]].ready = True
    turn_leave(s.turn)
    return found > 0


cdef void sender_glance(sender_t *s) noexcept nogil:
    """Whether a port has a packet, without waiting. Where there is one port to read is cheaper than to ask."""
    if load_acquire32(s.count) == 1 and s.ports[0].way != PORT_TAP:
        s.ports[0].ready = True
    else:
        sender_poll(s, s.linked & 1, 0)


cdef void sender_lend(sender_t *s) noexcept nogil:
    """Lets the receiver's thread use all of it until sender_reclaim(), but what a poll uses."""
    s.loan.sender = s
    store_release32(&s.loan.taken, 0)


cdef void sender_reclaim(sender_t *s) noexcept nogil:
    """Ends that; waits for the end of the round that may be under way."""
    while exchange_acqrel32(&s.loan.taken, 1) != 0:
        sched_yield()


cdef void sender_wait(sender_t *s, uint64_t ns) noexcept nogil:
    """Waits for a packet, or somebody, at most ns nanoseconds; returns early to have a look itself, where spinning paid
    lately. Whoever else wants this CPU gets it: packets come from him, or from who he gets his from."""
    cdef uint64_t now = now_ns()
    if gather_now(&s.gathers, s.spell, now):
        s.spell = 0
        s.since = 0
        count64(&s.n.gathers, 1)
        sleep_ns(min(ns, GATHER_NS))
        sender_glance(s)
        return
    s.spell = 0
    if s.may_spin and s.linked & 1 != 0:
        if s.since == 0 and spin_pays(&s.spins):
            s.since = now
        if s.since != 0 and now - s.since < SPIN_NS:
            sender_lend(s)
            spin_once(SPIN_ALONE_NS)
            sender_reclaim(s)
            sender_glance(s)
            return
        if s.since != 0:
            spin_in_vain(&s.spins)
            s.since = 0
    sender_lend(s)
    sender_poll(s, s.linked & 1, ns)
    sender_reclaim(s)


cdef uint64_t sender_untaken(const sender_t *s, uint64_t epoch) noexcept nogil:
    """How many elements of that epoch the ring's reader has not taken, 0 where it does not tell.

    Trust: what it says is advice, and only counted.
    """
    cdef uint64_t n
    if not s.pressed or s.w.bell == NULL or epoch == 0 or load_relaxed64(&s.w.bell.reader_epoch) != epoch:
        return 0
    n = s.w.wc - load_relaxed64(&s.w.bell.reader_rc)
    return n if n <= s.w.elements else 0


cdef void sender_leave(sender_t *s) noexcept nogil:
    """Ends the epoch, whose elements nobody can take from then on: a reader is given a moment before that."""
    cdef uint64_t epoch = s.w.epoch, start = now_ns()
    while sender_untaken(s, epoch) != 0 and now_ns() - start < LEAVE_NS:
        sleep_ns(NAP_NS)
    writer_stop(&s.w)
    count64(&s.n.untaken, sender_untaken(s, epoch))


cdef void sender_start(sender_t *s, bint sums) noexcept nogil:
    """Begins an epoch, whose elements have checksums or none."""
    s.sums = sums
    s.w.size = s.size + (FRAME_SUM if sums else 0)
    s.w.elements = s.room // s.w.size
    s.w.rest = s.room % s.w.size
    s.w.reserved = ACCEPT_MAGIC if sums else 0
    s.full_since = 0
    s.given_up = False
    s.began_ns = now_ns()
    writer_start(&s.w, random_epoch())
    memset(s.used, 0, s.w.elements * sizeof(uint32_t))


cdef bint sender_asked(const sender_t *s) noexcept nogil:
    """Whether elements are to have checksums: that is required, or wanted, and the reader takes them."""
    if s.checksums != CHECKSUM_AUTO:
        return s.checksums == CHECKSUM_REQUIRE
    return s.w.bell != NULL and load_relaxed32(&s.w.bell.reader_sums) == 1 and s.room >= s.size + FRAME_SUM


cdef void sender_agree(sender_t *s) noexcept nogil:
    """Begins another epoch where the reader takes checksums by now, or no longer; at most every AGREE_NS. Precondition:
    checksums are CHECKSUM_AUTO, the link is up, no packet is pending.

    Trust: what the bell says is advice. A reader that has not come to an epoch with checksums in time may be one that has
    none, behind one that was killed: then there are none until one says so again.
    """
    cdef bint asked = sender_asked(s), missing = s.sums and load_relaxed64(&s.w.bell.reader_epoch) != s.w.epoch
    cdef uint64_t passed
    if asked == s.sums and not missing:
        return
    passed = now_ns() - s.began_ns
    if missing and passed >= MISSING_NS:
        store_relaxed32(&s.w.bell.reader_sums, 0)
        asked = False
    if asked != s.sums and passed >= AGREE_NS:
        sender_leave(s)
        sender_start(s, asked)


cdef int sender_relink(sender_t *s, uint32_t link) noexcept nogil:
    """Does what the link's state asks for; SENDER_UP, SENDER_DOWN, or -errno."""
    cdef uint32_t k
    cdef ssize_t n = BATCH, taken
    s.linked = link
    s.full_since = 0
    s.given_up = False
    if link & 1:
        if s.w.hdr != NULL:
            sender_start(s, sender_asked(s))
        return SENDER_UP
    if s.w.hdr != NULL:
        sender_leave(s)
    count64(&s.n.down, s.left + s.cut.left)
    s.left = s.cut.left = 0
    for k in range(load_acquire32(s.count)):
        n = BATCH
        taken = 0       # what comes meanwhile, to a child that is up, say, may never end
        while n == BATCH and taken < QUEUE and port_fd(&s.ports[k]) >= 0:
            n = sender_discard(s, &s.ports[k], &s.n.down)
            taken += n
        if n < 0 and k == 0:
            return <int>n
    return SENDER_DOWN


cdef sender_event sender_failed(sender_t *s, int error) noexcept nogil:
    """What an error of a device means; SENDER_TICK where it will be tried again."""
    if error == EBADFD:         # somebody removed it; children are looked after by others
        return SENDER_GONE if s.port == 0 else SENDER_CHILD
    if error == EFAULT and s.w.hdr != NULL:
        # The ring's memory was taken away; that is marked as soon as we touch it ourselves.
        memset(writer_slot(&s.w, 0), 0, s.size)
    return SENDER_TICK


cdef ssize_t sender_round(sender_t *s, uint64_t room) noexcept nogil:
    """One port's packets, as far as there is room; as sender_batch()."""
    cdef port_t *p = &s.ports[s.port]
    cdef ssize_t n
    cdef int error = 0
    if s.w.hdr == NULL:
        n = sender_discard(s, p, &s.n.no_peer)
        if n < BATCH:
            p.ready = False
    else:
        n = sender_batch(s, room)
    if p.way == PORT_TAP and port_fd(p) >= 0:
        error = sender_drain(s, p)
    return n if n < 0 or error == 0 else error


cdef sender_event sender_loop(sender_t *s, uint64_t ns) noexcept nogil:
    """Pumps for at most ns nanoseconds, or until something happened that the caller looks after."""
    cdef uint64_t start = now_ns(), passed = 0, room
    cdef uint32_t turns = 0, link
    cdef ssize_t n
    cdef int event
    cdef bint found
    s.ports[0].ready = True
    while True:
        if load_relaxed32(&s.stop) != 0:
            return SENDER_STOPPED
        if s.w.hdr != NULL and load_acquire32(s.w.broken) != 0:
            return SENDER_BROKEN
        link = load_acquire32(&s.link)
        if link != s.linked:
            turn_enter(s.turn)
            event = sender_relink(s, link)
            turn_leave(s.turn)
            if event >= 0:
                return <sender_event>event
            if event == -EBADFD:
                return SENDER_GONE
        if s.checksums == CHECKSUM_AUTO and s.linked & 1 != 0 and s.w.hdr != NULL and not sender_pending(s):
            sender_agree(s)
        turns += 1
        if turns % 256 == 0:
            passed = now_ns() - start
            if passed >= ns:
                return SENDER_TICK
        n = 0
        found = False
        if s.linked & 1 != 0:       # else packets that come from here on are for the epoch to come
            room = 1 if s.w.hdr == NULL else sender_room(s)
            if room == 0:
                sender_poll(s, False, NAP_NS)
                continue
            turn_enter(s.turn)
            found = sender_turn(s)
            if found:
                n = sender_round(s, room)
            turn_leave(s.turn)
        if n < 0:
            event = sender_failed(s, <int>-n)
            if event != SENDER_TICK:
                return <sender_event>event
        elif found:
            if n > 0 and s.since != 0:
                spin_paid(&s.spins)
                s.since = 0
            continue
        passed = now_ns() - start
        if passed >= ns:
            return SENDER_TICK
        sender_wait(s, ns - passed)


# ------------------------------------------------------------------ ring to devices

cdef struct receiver_counters:
    uint64_t packets        # elements, as `bytes` is of what they hold
    uint64_t bytes
    uint64_t over           # times the ring was overrun; the elements that cost are the reader's `lost_total`
    uint64_t length         # dropped, as the rest is: a length that cannot be
    uint64_t protocol       # neither IPv4 nor IPv6, or not what net_hdr says
    uint64_t checksum       # wrong
    uint64_t down           # the interface was down
    uint64_t refused        # by the kernel
    uint64_t batches[CLASSES]


cdef struct receiver_t:
    reader_t r
    port_t *ports
    mark_table_t *marks
    loan_t *loan            # the ports'
    spin_habit echoes       # whether a packet that comes is answered by one at once
    int kind
    bint offload
    bint merges             # what comes is merged: `c` instead of `stage`
    uint32_t size
    uint64_t batch
    uint32_t checksums      # CHECKSUM_*
    bint sums               # elements of this epoch have checksums
    uint64_t stride         # of packets in private memory
    uint8_t *stage
    coalescer c
    uint8_t *memory         # the coalescer's
    int32_t lengths[BATCH]
    uint32_t tags[BATCH]
    uint32_t stop
    bint connected
    bint joined             # it was connected once
    uint64_t left_epoch     # where a reader before this one was, as the bell tells ...
    uint64_t left_rc        # ... and how far
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
    RECEIVER_CHILD = 8


cdef int receiver_write(receiver_t *v, uint32_t number, uint32_t mark, uint8_t *packet, size_t n, vnet_header *vnet,
                        uint32_t segments) noexcept nogil:
    """Gives a packet, which is private and was checked, to a port; -EBADFD where that is gone, else 0.

    Before it HEADROOM bytes are ours. vnet: NULL where devices take none. segments: elements that it was.
    """
    cdef port_t *p = &v.ports[number]
    cdef int fd = port_fd(p)
    cdef uint64_t bytes = n
    cdef uint8_t *begin = packet
    cdef vnet_header moved
    cdef ssize_t done
    if segments > 1:
        bytes += (segments - 1) * <uint64_t>vnet.headers
    if v.kind == FRAME_RAW:     # what stands before it is zero: no flags, no ethertype
        begin -= PACKET_INFORMATION
    elif vnet != NULL:
        moved = vnet[0]
    if mark != 0 and p.way == PORT_FRONT:
        begin -= MARKS_HEADER
        marks_prefix(begin, packet[0], mark)
        if vnet != NULL:
            marks_vnet_in(<uint8_t *>&moved)
    if vnet != NULL:
        begin -= sizeof(moved)
        memcpy(begin, &moved, sizeof(moved))
    while True:
        done = c_write(fd, begin, packet - begin + n)
        if done >= 0:
            count64(&v.n.packets, segments)
            count64(&v.n.bytes, bytes)
            count64(&p.rx_packets, 1)
            count64(&p.rx_bytes, n)
            return 0
        if errno != EINTR:
            break
    count64(&v.n.down if errno == EIO else &v.n.refused, segments)
    return -EBADFD if errno == EBADFD else 0


cdef void receiver_malformed(receiver_t *v, int status) noexcept nogil:
    """Counts an element whose packet is dropped. status: FRAME_LENGTH, FRAME_PROTOCOL or FRAME_CHECKSUM."""
    if status == FRAME_LENGTH:
        count64(&v.n.length, 1)
        reader_blame(&v.r, FAULT_LENGTH, 1)
    elif status == FRAME_CHECKSUM:
        count64(&v.n.checksum, 1)
        reader_blame(&v.r, FAULT_CHECKSUM, 1)
    else:
        count64(&v.n.protocol, 1)
        reader_blame(&v.r, FAULT_PROTOCOL, 1)


cdef inline int32_t receiver_take(receiver_t *v, uint64_t k, uint8_t *to, uint32_t *mark) noexcept nogil:
    """As frame_take(), of element k, whose checksum is looked at, too, where there are such."""
    cdef const uint8_t *slot = reader_slot(&v.r, k)
    cdef int32_t n = frame_take(v.kind, to, slot, v.size, mark)
    if v.sums and n >= 0 and not frame_right(v.kind, to, slot, v.size, <uint32_t>n, v.r.rc + k, v.r.epoch):
        return FRAME_CHECKSUM
    return n


cdef ring_status receiver_batch(receiver_t *v, int *gone) noexcept nogil:
    """One round: packets out of the ring, looked at once whether they were left alone, then to the devices. gone: 1 more than
    the number of a port that is no more."""
    cdef uint64_t n, k
    cdef uint32_t mark, number
    cdef uint8_t *packet
    cdef vnet_header none
    cdef ring_status status = reader_peek(&v.r, &n)
    if status != SUCCESS:
        return status
    n = min(n, v.batch)
    for k in range(n):
        v.lengths[k] = receiver_take(v, k, v.stage + k * v.stride + HEADROOM, &v.tags[k])
    if not reader_intact(&v.r):
        return reader_recover(&v.r)
    reader_advance(&v.r, n)
    count_batch(v.n.batches, n)
    memset(&none, 0, sizeof(none))
    for k in range(n):
        if v.lengths[k] < 0:
            receiver_malformed(v, v.lengths[k])
            continue
        mark = v.tags[k]
        number = marks_child(v.marks, mark)
        packet = v.stage + k * v.stride + HEADROOM + frame_start(v.kind)
        if receiver_write(v, number, mark, packet, v.lengths[k], &none if v.offload else NULL, 1) != 0:
            gone[0] = <int>number + 1
    return SUCCESS


cdef void receiver_ready(receiver_t *v, int *gone) noexcept nogil:
    """Gives to the devices what the coalescer has ready."""
    cdef const coalesce_ready *r
    cdef vnet_header vnet
    while True:
        r = coalesce_take(&v.c)
        if r == NULL:
            return
        memcpy(&vnet, r.packet - sizeof(vnet), sizeof(vnet))
        if receiver_write(v, <uint32_t>(r.key >> 32), <uint32_t>r.key, r.packet, r.length, &vnet, r.segments) != 0:
            gone[0] = <int>(r.key >> 32) + 1


cdef bint receiver_place(receiver_t *v, uint64_t k, int *status) noexcept nogil:
    """Copies element k to where it is going to be; whether it was whole. status: 0, or what is wrong with it."""
    cdef const uint8_t *slot = reader_slot(&v.r, k)
    cdef net_hdr h
    cdef uint32_t mark
    cdef int32_t n
    if v.sums:                          # what is verified is what goes on
        n = receiver_take(v, k, v.stage + HEADROOM, &mark)
        slot = v.stage + HEADROOM
        if n < 0:
            status[0] = n
            return reader_intact(&v.r)
    h = frame_header(slot)
    status[0] = coalesce_place(&v.c, slot + sizeof(h), v.size - <uint32_t>sizeof(h),
                               <uint64_t>marks_child(v.marks, h.mark) << 32 | h.mark)
    if status[0] == COALESCE_FRAME:
        status[0] = FRAME_LENGTH
    elif status[0] != 0 or not frame_agrees(h, coalesce_version(&v.c)):
        status[0] = FRAME_PROTOCOL
    return reader_intact(&v.r)


cdef ring_status receiver_merge(receiver_t *v, int *gone) noexcept nogil:
    """One round: packets out of the ring to the end of their flow's super-packet, each looked at whether it was left alone;
    those to the devices once nothing more comes. gone: as receiver_batch()."""
    cdef uint64_t n, k = 0, taken = 0
    cdef int wrong
    cdef ring_status status = reader_peek(&v.r, &n)
    if status != SUCCESS:
        return status
    while status == SUCCESS and taken < MERGE:
        n = min(n, <uint64_t>TELL)
        k = 0
        while k < n:
            if not receiver_place(v, k, &wrong):
                # What was taken before is not asked for any more: it may be the only one that was not left alone.
                reader_advance(&v.r, k)
                taken += k
                n -= k
                k = 0
                if not reader_intact(&v.r):
                    status = reader_recover(&v.r)
                    break
            k += 1
            if wrong != 0:
                receiver_malformed(v, wrong)
            elif coalesce_commit(&v.c) != 0:
                receiver_ready(v, gone)
        if status != SUCCESS:
            break
        reader_advance(&v.r, k)
        taken += k
        status = reader_peek(&v.r, &n)
    if coalesce_flush(&v.c) != 0:
        receiver_ready(v, gone)
    if taken != 0:
        count_batch(v.n.batches, taken)
    return SUCCESS if status == NO_DATA else status


cdef void receiver_join(receiver_t *v) noexcept nogil:
    """Begins an epoch that had begun before we came: where the reader before us was, else with what is there. What was sent
    to nobody, or to another one, is no loss of ours.

    Trust: what the bell says is advice; any position up to WC is one.
    """
    cdef uint64_t wc = load_acquire64(&v.r.hdr.wc)
    if v.r.epoch == v.left_epoch and <int64_t>(wc - v.left_rc) >= 0:
        reader_goto(&v.r, v.left_rc)
    elif wc > v.r.elements:
        reader_goto(&v.r, wc)


cdef void receiver_echo(receiver_t *v) noexcept nogil:
    """Sends what stands in the interface's own device already, for its sender that waits: the kernel answers some packets
    (an echo, what TCP acknowledges) while they are written, and to wake another thread for that takes longer than to send it.

    Precondition: within the receiver's turn, which keeps the devices: the sender's is its thread's, even while that waits.
    What is wrong is left to that thread.
    """
    cdef sender_t *s
    cdef ssize_t n = 0
    cdef uint64_t room, one = 1
    if exchange_acqrel32(&v.loan.taken, 1) != 0:    # it works
        return
    s = v.loan.sender
    if (s.linked & 1 != 0 and load_acquire32(&s.link) == s.linked and s.w.hdr != NULL and load_relaxed32(&s.stop) == 0
            and load_acquire32(s.w.broken) == 0 and not sender_pending(s) and s.ports[0].way != PORT_TAP):
        room = sender_room(s)
        if room != 0:
            s.port = 0
            n = sender_batch(s, room)
            if n > 0:
                count64(&s.n.echoes, 1)
            # The rest of a super-packet is no packet that a device has: its sender may be about to sleep on that.
            if sender_pending(s):
                c_write(s.wake, &one, sizeof(one))
    store_release32(&v.loan.taken, 0)
    if n > 0:
        spin_paid(&v.echoes)
    else:
        spin_in_vain(&v.echoes)


cdef receiver_event receiver_loop(receiver_t *v, uint64_t ns) noexcept nogil:
    """Pumps for at most ns nanoseconds, or until something happened that the caller looks after."""
    cdef uint64_t start = now_ns(), passed = 0
    cdef uint32_t turns = 0
    cdef ring_status status
    cdef int gone = 0
    cdef uint64_t before
    while True:
        before = v.n.packets    # of a dialogue one or two come at a time
        if load_relaxed32(&v.stop) != 0:
            return RECEIVER_STOPPED
        if load_acquire32(v.r.broken) != 0:
            return RECEIVER_BROKEN
        marks_enter(v.marks)
        status = receiver_merge(v, &gone) if v.merges else receiver_batch(v, &gone)
        if v.n.packets - before - 1 < ECHO_MOST and spin_pays(&v.echoes):
            receiver_echo(v)
        marks_leave(v.marks)
        turns += 1
        if turns % 256 == 0 or status != SUCCESS:
            passed = now_ns() - start
        if status == EPOCH_CHANGED:
            v.connected = True
            v.sums = v.r.size != v.size
            if v.checksums != CHECKSUM_OFF and v.r.bell != NULL and not v.r.mute:   # the writer may have taken it back
                store_relaxed32(&v.r.bell.reader_sums, 1)
            if not v.joined:
                v.joined = True
                receiver_join(v)
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
        if gone == 1:
            return RECEIVER_GONE
        if gone != 0:
            return RECEIVER_CHILD
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
    cdef readonly Ports ports
    cdef readonly str framing
    cdef readonly uint32_t size     # of an element

    cdef int check(self, str framing, uint32_t mtu, Ports ports) except -1:
        if framing not in FRAMINGS:
            raise UsageError(f"a framing is one of {', '.join(FRAMINGS)}", value=framing)
        if not FRAME_LEAST <= mtu <= FRAME_MOST:
            raise UsageError(f"an MTU is {FRAME_LEAST} to {FRAME_MOST} bytes", value=mtu)
        if ports.offload and framing != "net_hdr":
            raise UsageError("only net_hdr has offloads", value=framing)
        self.framing, self.ports = framing, ports
        self.size = frame_size(FRAMINGS[framing], mtu)
        return 0

    cdef int enter(self) except -1:
        if not busy_enter(&self.busy):
            raise UsageError(f"another thread runs this {type(self).__name__}")
        if self.closed:
            busy_leave(&self.busy)
            raise UsageError(f"this {type(self).__name__} is closed")
        return 0

    cdef void drop(self, Mapping paths=None) noexcept:
        """Lets go of the channel's memory."""
        for m in (self.ring, self.bell, paths):
            if m is not None:
                (<Mapping>m).drop()

    @property
    def broken(self):
        """Whether the owner of the channel's memory took it away."""
        return self.ring is not None and self.ring.held and load_acquire32(self.ring.broken) != 0


@cython.final
cdef class Sender(Pump):
    """Packets of TUN or TAP devices, into a ring while the link is up.

    memory: the channel, claimed by the caller, or None: what comes is dropped. framing: one of FRAMINGS; a raw device gives
    packet information. pressed: whether a reader that tells how far it is, by the bell, is waited for. paths: the region of
    path MTUs, or None. checksum: "off", "auto" (where the reader says, by the bell, that it takes them) or "require".
    """
    EVENTS = ("tick", "up", "down", "stopped", "broken", "gone", "child")
    cdef sender_t s
    cdef Mapping paths
    cdef uint8_t *memory

    def __init__(self, Ports ports not None, memory, *, str framing, uint32_t mtu, protocol=0, bell=None,
                 bint pressed=True, paths=None, checksum="off"):
        cdef uint64_t least
        if self.ports is not None:
            raise UsageError("a Sender is initialised once")
        self.s.checksums = checksum_mode(checksum)
        self.check(framing, mtu, ports)
        self.s.ports, self.s.count, self.s.turn, self.s.wake = ports.ports, &ports.count, &ports.turn, ports.wake
        self.s.loan = &ports.loan
        self.s.kind, self.s.size, self.s.offload = FRAMINGS[framing], self.size, ports.offload
        self.s.pressed = pressed
        self.s.may_spin = online_cpus() > 1
        spin_paid(&self.s.spins)
        self.memory = <uint8_t *>malloc(4 * SPILL)
        if self.memory == NULL:
            raise MemoryError
        self.s.spill = self.memory + SPILL
        self.s.piece, self.s.news = self.s.spill + SPILL, self.s.spill + 2 * SPILL
        if paths is not None:
            self.paths = hold(paths, False, sizeof(uint32_t))
            self.s.paths = <const uint32_t *>self.paths.base
            self.s.marks = <uint32_t>min(self.paths.length // sizeof(uint32_t), <uint64_t>1 << 24)
        self.s.batch = BATCH
        if memory is not None:
            least = self.size + (FRAME_SUM if self.s.checksums == CHECKSUM_REQUIRE else 0)
            self.ring = hold(memory, True, SHMSTREAM_HEADER_SIZE + least)
            self.s.room = self.ring.length - SHMSTREAM_HEADER_SIZE
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

    def __dealloc__(self):
        free(self.memory)
        free(self.s.used)

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
            self.ports.kick()

    def stop(self):
        """Makes run() return "stopped"; from any thread."""
        store_release32(&self.s.stop, 1)
        self.ports.kick()

    @property
    def active(self):
        """Whether the channel has an epoch."""
        return self.s.w.hdr != NULL and self.s.w.epoch != 0

    @property
    def checksum(self):
        """Whether elements have checksums: CHECKSUM of _engine."""
        return checksum_word(self.s.checksums, self.active, self.s.sums, False)

    @property
    def elements(self):
        """Elements of the channel, 0 without one."""
        return self.s.w.elements

    @property
    def counters(self):
        """By name; `batches`: rounds by their size, 1, 2 to 3, 4 to 7, ..."""
        cdef sender_counters *n = &self.s.n
        dropped = {"oversize": n.oversize, "not_ip": n.not_ip, "malformed": n.malformed, "path_mtu": n.too_big,
                   "no_peer": n.no_peer, "down": n.down, "untaken": n.untaken}
        return {"tx_packets": n.packets, "tx_bytes": n.bytes, "tx_dropped": sum(dropped.values()), "lost": dropped,
                "split": {"supers": n.supers, "segments": n.segments},
                "path_mtu": {"fragmented": n.fragmented, "fragments": n.fragments, "news": n.news},
                "waits": n.waits, "given_up": n.given_up, "gathers": n.gathers, "echoes": n.echoes,
                "epochs": self.s.w.epochs, "wakes": self.s.w.wakes, "batches": [n.batches[k] for k in range(CLASSES)]}

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
            with nogil:
                sender_leave(&self.s)
            self.s.w.bell = NULL
            self.s.w.hdr = NULL
        self.s.marks = 0
        count64(&self.s.n.no_peer, self.s.left + self.s.cut.left)
        self.s.left = self.s.cut.left = 0
        self.drop(self.paths)
        busy_leave(&self.busy)


@cython.final
cdef class Receiver(Pump):
    """Packets of a ring, into TUN or TAP devices.

    memory: the channel, read-only. framing: one of FRAMINGS. poll: microseconds between looks at a channel whose writer does
    not ring, None: adaptive. merge: what the devices take as super-packets, of MERGES. tells: whether it is the one that tells
    the writer, by the bell, how far it is, and whether it takes checksums. checksum: "off", "auto" (where the writer makes them)
    or "require": elements without them are not taken. watch: polls for it while it is idle.
    """
    EVENTS = ("tick", "connected", "disconnected", "incompatible", "overrun", "stopped", "broken", "gone", "child")
    FIELDS = ("length", "protocol", "checksum")
    cdef receiver_t v
    cdef Watch watch

    def __init__(self, Ports ports not None, memory, *, str framing, uint32_t mtu, protocol, bell=None, poll=None,
                 merge=(), bint tells=True, checksum="off", Watch watch=None):
        if self.ring is not None:
            raise UsageError("a Receiver is initialised once")
        self.v.checksums = checksum_mode(checksum)
        self.check(framing, mtu, ports)
        self.v.ports, self.v.marks, self.v.loan = ports.ports, &ports.marks.t, &ports.loan
        self.v.kind, self.v.size, self.v.offload = FRAMINGS[framing], self.size, ports.offload
        if merge:
            if not ports.offload:
                raise UsageError("only a device with offloads takes what was merged", value=merge)
            self.v.memory = <uint8_t *>malloc(COALESCE_MEMORY)      # touched as far as it is used
            if self.v.memory == NULL:
                raise MemoryError
            coalesce_init(&self.v.c, self.v.memory, sum(MERGES[kind] for kind in merge))
            self.v.merges = True
        self.v.batch = batch_of(self.size)
        self.v.stride = (HEADROOM + self.size + 63) & ~<uint64_t>63
        self.v.stage = <uint8_t *>calloc(self.v.batch, self.v.stride)
        if self.v.stage == NULL:
            raise MemoryError
        self.ring = hold(memory, False, SHMSTREAM_HEADER_SIZE + self.size)
        reader_init(&self.v.r, self.ring.base, self.ring.length, self.size, protocol)
        if self.v.checksums != CHECKSUM_OFF:
            self.v.r.sums_size = self.size + FRAME_SUM
        if self.v.checksums == CHECKSUM_REQUIRE:
            self.v.r.want_size = <uint64_t>-1       # of no element
        self.v.r.broken = self.ring.broken
        self.v.r.spin_ns = SPIN_NS
        self.v.r.yields = True
        self.v.r.poll_ns = 0 if poll is None else poll * 1000
        if watch is not None:
            self.watch = watch
            self.v.r.watch = &watch.w
        if bell is not None:
            self.bell = hold(bell, True, sizeof(bell_page))
            self.v.r.bell = self.bell.as_bell()
            self.v.r.mute = not tells
            self.v.left_epoch = load_relaxed64(&self.v.r.bell.reader_epoch)
            self.v.left_rc = load_relaxed64(&self.v.r.bell.reader_rc)
            if tells:
                store_relaxed32(&self.v.r.bell.reader_sums, self.v.checksums != CHECKSUM_OFF)

    def __dealloc__(self):
        free(self.v.stage)
        free(self.v.memory)

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
    def checksum(self):
        """Whether elements have checksums: CHECKSUM of _engine; "refused": an epoch that has none, and is not taken."""
        cdef bint refused = self.v.checksums == CHECKSUM_REQUIRE and self.v.r.refused != 0
        return checksum_word(self.v.checksums, self.v.connected or refused, self.v.sums and not refused, refused)

    @property
    def batches(self):
        """Rounds in which packets came."""
        return self.v.r.batches

    @property
    def conduct(self):
        """Of the peer, by its elements: FIELDS."""
        return conduct_of(self, &self.v.r, self.FIELDS)

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
        lost = {"overrun": self.v.r.lost_total, "length": n.length, "protocol": n.protocol, "checksum": n.checksum,
                "down": n.down, "refused": n.refused}
        frame = n.length + n.protocol + n.checksum
        return {"rx_packets": n.packets, "rx_bytes": n.bytes, "rx_errors": n.over + frame, "rx_over_errors": n.over,
                "rx_frame_errors": frame, "rx_dropped": n.down + n.refused, "lost": lost,
                "merged": {"supers": self.v.c.supers, "segments": self.v.c.supers + self.v.c.merged,
                           "bad_checksums": self.v.c.rejected}, "epochs": self.v.r.epochs,
                "quarantines": self.v.r.quarantines, "sleeps": self.v.r.sleeps,
                "batches": [n.batches[k] for k in range(CLASSES)]}

    def inherit(self, Receiver other):
        """Goes on with the counters of another (closed) one."""
        self.v.n = other.v.n
        self.v.c.supers, self.v.c.merged, self.v.c.rejected = other.v.c.supers, other.v.c.merged, other.v.c.rejected
        self.v.r.lost_total, self.v.r.epochs, self.v.r.sleeps = other.v.r.lost_total, other.v.r.epochs, other.v.r.sleeps
        self.v.r.quarantines = other.v.r.quarantines
        memcpy(self.v.r.offences, other.v.r.offences, sizeof(self.v.r.offences))

    def close(self):
        """Lets go of the channel; may be called twice. Precondition: no run() is under way."""
        if self.closed:
            return
        self.enter()
        self.closed = True
        self.v.connected = False
        if self.v.r.bell != NULL and not self.v.r.mute:
            store_relaxed32(&self.v.r.bell.reader_sums, 0)
        self.v.r.bell = NULL
        self.drop()
        busy_leave(&self.busy)
