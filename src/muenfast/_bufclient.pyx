"""The block client's engine for the shared-buffer transport: the disks of one connection, payload through the buffer.

Runs without the GIL and allocates nothing per request. Trust: of every answer the 16 bytes are copied once, validated,
and only the copy is used. What the server puts into the buffer, and when, spoils the data that it answers with, and
nothing else.

A part of the buffer belongs to one request from its issue to its answer, or to the answer to a Reset: before that a
server may still be at it. A server that takes another one's place has its claim, so the other one has left the kernel,
and with it the buffer.
"""
from libc.errno cimport ECOMM, EIO, EPROTONOSUPPORT
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._blocksum cimport *
from muenfast._client cimport *
from muenfast._count cimport *
from muenfast._engine cimport *
from muenfast._ring cimport *
from muenfast._target cimport IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE, IO_ZERO, io_t
from muenfast._thread cimport *
from muenfast._wire cimport *

from muenfast.errors import UsageError

cdef extern from *:
    """
    static inline uint64_t trailing_zeros(uint64_t word) { return word == 0 ? 64 : (uint64_t)__builtin_ctzll(word); }
    """
    uint64_t trailing_zeros(uint64_t word) noexcept nogil

cdef enum:
    FAULT_CHECKSUM = 1      # of FIELDS
    ASKS = 4                # most questions at a time while connecting
    SHARE = 16              # requests that one of many disks may have in flight, whatever its share
    MOST_DEVICES = 256      # of one connection; more are refused
    PHASE_RESET = 1         # active; waiting for the response channel to be so
    PHASE_ASKING = 2

# Bytes of one request: two sides copy at the same time, and the server joins neighbours again.
cdef uint64_t PIECE_BYTES = 65536
# Bytes of writes published together, for the same reason (docs/decisions/003).
cdef uint64_t PUBLISH_BYTES = 65536
# Bytes of answers to reads after which new requests are issued, for the server to go on.
cdef uint64_t REAP_BYTES = 65536
# Bytes of the buffer in use at least: more than the other side's own cache still holds, less than the common one does
# (docs/decisions/009). It doubles where that is not enough, and shrinks again.
cdef uint64_t AREA_BYTES = 1 << 22
# After this long without an answer from an active server the client starts over.
cdef uint64_t ANSWER_NS = 1_000_000_000
# A server whose answer came wrong, or that demands checksums, is asked again after this long.
cdef uint64_t ANEW_NS = 200_000_000
# As long as a disk may take to wake up: for the first read, see shared_probe.
cdef uint64_t PROBE_NS = 30_000_000_000
# What a server may know nothing of is waited for this long after everything else was answered.
cdef uint64_t OPTIONAL_NS = 20_000_000
cdef uint64_t NOWHERE = <uint64_t>-1


cdef struct ask_t:
    uint16_t kind
    uint16_t device
    uint32_t tag
    bint optional
    bint answered
    uint64_t status


cdef struct geometry_t:
    uint64_t blocks
    uint64_t length         # bytes of a block
    uint64_t most           # blocks of one request


cdef struct shared_t:
    uint8_t *base
    uint64_t length
    uint64_t most           # bytes that `used` has bits for
    const uint32_t *broken  # 1: the buffer was taken away and zeros stand there
    # The allocator: belongs to whoever holds the client's lock.
    uint64_t *used          # a bit per unit
    uint64_t unit           # bytes: the smallest block
    uint64_t units
    uint64_t area           # units in use so far
    uint64_t taken
    uint64_t cursor
    # Connecting: the reaper's.
    ask_t asks[ASKS]
    uint32_t nasks
    uint32_t asked          # questions of this life, for their tags
    uint64_t device         # whose geometry is asked, or that is read
    uint64_t ndevices       # as answered
    geometry_t geometry[MOST_DEVICES]
    uint64_t pattern        # what shared_probe left in the buffer begins with this
    uint64_t again_ns       # not before is anything asked anew
    bint garbled            # an answer came with a wrong checksum, or demands one
    bint foreign            # it was still there when the server had read into its buffer


# ------------------------------------------------------------------ places in the buffer

cdef inline uint64_t words_of(uint64_t bytes) noexcept nogil:
    """Words that hold a bit for each of the smallest units there may be."""
    return (bytes // SECTOR_SIZE + 63) // 64


cdef void shared_mark(shared_t *b, uint64_t first, uint64_t n, bint used) noexcept nogil:
    """Notes that n units are used, or free. Precondition: lock held; they were the opposite."""
    cdef uint64_t at = first, end = first + n, mask, bits
    while at < end:
        bits = min(64 - at % 64, end - at)
        mask = (~<uint64_t>0 if bits == 64 else ((<uint64_t>1 << bits) - 1)) << (at % 64)
        if used:
            b.used[at // 64] |= mask
        else:
            b.used[at // 64] &= ~mask
        at += bits
    b.taken += n if used else 0 - n


cdef uint64_t shared_find(const shared_t *b, uint64_t start, uint64_t end, uint64_t n, uint64_t align) noexcept nogil:
    """The first of n free units in a row from start on, all below end, that is a multiple of align (a power of two);
    NOWHERE. Precondition: lock held."""
    cdef uint64_t at = start, run = 0, word, bits, first
    while at < end:
        word = b.used[at // 64] >> (at % 64)
        bits = min(64 - at % 64, trailing_zeros(word))
        run += bits
        at += bits
        first = (at - run + align - 1) & ~(align - 1)
        if first + n <= at:
            return first if first + n <= end else NOWHERE
        if at % 64 != 0 or bits == 0:   # not the word's end: used ones
            run = 0
            at += min(64 - at % 64, trailing_zeros(~(word >> bits)))
    return NOWHERE


cdef uint64_t shared_place(shared_t *b, uint64_t bytes, uint64_t block_size) noexcept nogil:
    """A free part of the buffer that begins at a multiple of the block, right behind the last one where that is free, so
    that the server may join what is neighbours on the disk; its offset, or NOWHERE. Precondition: lock held."""
    cdef uint64_t n = bytes // b.unit, align = block_size // b.unit, at
    if n > b.units - b.taken:
        return NOWHERE
    at = shared_find(b, b.cursor, b.area, n, align)
    if at == NOWHERE:
        while b.area // 2 >= max(AREA_BYTES // b.unit, 2 * (b.taken + n)):
            b.area //= 2
        at = shared_find(b, 0, b.area, n, align)
        while at == NOWHERE and b.area != b.units:
            at = b.area
            b.area = min(2 * b.area, b.units)
            at = shared_find(b, at, b.area, n, align)
    if at == NOWHERE:
        return NOWHERE
    shared_mark(b, at, n, True)
    b.cursor = at + n
    return at * b.unit


cdef void shared_renew(client_t *c) noexcept nogil:
    """All of the buffer is free again, in units of the smallest block. Precondition: lock held, Reset was answered."""
    cdef shared_t *b = <shared_t *>c.transport
    cdef uint64_t k
    b.unit = BLOCK_SIZE
    for k in range(c.nqueues):
        c.queues[k].held = 0
        b.unit = min(b.unit, <uint64_t>c.queues[k].block_size)
    b.units = b.length // b.unit
    b.area = min(b.units, AREA_BYTES // b.unit)
    b.taken = b.cursor = 0
    memset(b.used, 0, words_of(b.most) * sizeof(uint64_t))


# ------------------------------------------------------------------ requests and answers

cdef uint32_t shared_kind(const queue_t *q, const io_t *io) noexcept nogil:
    """The request that does it: zeros are written."""
    if io.kind == IO_READ:
        return REQUEST_READ
    if io.kind == IO_WRITE or io.kind == IO_ZERO or io.kind == IO_DISCARD and q.clears:
        return REQUEST_WRITE
    return REQUEST_SYNC if io.kind == IO_SYNC else REQUEST_DISCARD


cdef inline uint32_t shared_flow(const entry_t *e) noexcept nogil:
    """The direction of a request."""
    return (FLOW_READ if e.kind == REQUEST_READ else FLOW_WRITE if e.kind == REQUEST_WRITE else
            FLOW_FLUSH if e.kind == REQUEST_SYNC else FLOW_DISCARD)


cdef bint shared_next(shared_t *b, queue_t *q, const io_t *io, entry_t *e) noexcept nogil:
    """Plans the next request of io; False where the buffer has no room for it. Precondition: lock held.

    Each disk has at most its share of the buffer, and the first piece of one that has none is made small enough: none
    waits for another one's answers.
    """
    cdef uint64_t share
    e.kind = shared_kind(q, io)
    e.device = q.device
    e.index = io.issued
    e.place = 0
    e.nblocks = 1
    e.id = 0
    if io.kind == IO_SYNC:
        return True
    e.id = io.block + io.issued
    e.nblocks = <uint32_t>min(<uint64_t>(io.nblocks - io.issued), q.most)
    if e.kind != REQUEST_DISCARD:
        share = max(b.units * b.unit // q.client.nqueues, <uint64_t>q.block_size)
        e.nblocks = <uint32_t>min(<uint64_t>e.nblocks, min(PIECE_BYTES, share) // q.block_size)
        if <uint64_t>e.nblocks * q.block_size > share - min(q.held, share):
            return False
        e.place = shared_place(b, <uint64_t>e.nblocks * q.block_size, q.block_size)
        while e.place == NOWHERE and q.held == 0 and e.nblocks > 1:
            e.nblocks = (e.nblocks + 1) // 2
            e.place = shared_place(b, <uint64_t>e.nblocks * q.block_size, q.block_size)
        if e.place != NOWHERE:
            q.held += <uint64_t>e.nblocks * q.block_size
    return e.place != NOWHERE


cdef uint32_t shared_write(const shared_t *b, const queue_t *q, const io_t *io, const entry_t *e,
                           block_request *r, copy_giver *giver) noexcept nogil:
    """Fills in a request, and puts its payload into the buffer; where there are checksums, the state behind that."""
    cdef const uint8_t *data
    cdef uint64_t length = 0 if io.kind == IO_SYNC else <uint64_t>e.nblocks * q.block_size
    r.kind = <uint16_t>e.kind
    r.device = <uint16_t>q.device
    r.tag = e.priv
    r.length = length
    r.device_offset = e.id * q.block_size
    r.buffer_offset = e.place
    if io.kind == IO_WRITE:
        data = io.buf + <uint64_t>e.index * q.block_size
        copy_given(giver, b.base + e.place, data, length)
        if q.client.sums:
            return crc32c(CRC32C_FIRST, data, length)
    elif e.kind == REQUEST_WRITE:
        memset(b.base + e.place, 0, length)
        if q.client.sums:
            return crc32c(CRC32C_FIRST, b.base + e.place, length)
    return CRC32C_FIRST


cdef void shared_issue(client_t *c) noexcept nogil:
    """Writes queued requests into the ring as far as the window and the buffer allow, by turns of the disks.

    One that is slow keeps neither all of the window nor, whatever the depth, all of what a server has under way at a time:
    of several disks each has half of its share. Precondition: lock held, state READY. While nothing is in flight all of
    the buffer is free: it always goes on.
    """
    cdef shared_t *b = <shared_t *>c.transport
    cdef uint64_t room, n, k, bytes, since = 0, most = c.depth
    cdef uint32_t idle = 0              # disks in a row that had nothing to issue
    cdef uint64_t sum
    cdef uint32_t states[BATCH]
    cdef block_request requests[BATCH]
    cdef queue_t *q
    cdef io_t *io
    cdef entry_t *e
    if c.nqueues > 1:
        most = min(most, max(<uint64_t>c.window // (2 * c.nqueues), min(<uint64_t>SHARE, <uint64_t>c.window // 4 + 1)))
    while idle < c.nqueues:
        room = min(client_room(c), <uint64_t>BATCH)
        if room == 0 or load_acquire32(b.broken) != 0:
            return
        q = &c.queues[c.turn_of]
        c.turn_of = (c.turn_of + 1) % c.nqueues
        idle += 1
        n = bytes = 0
        while n < room and bytes < PUBLISH_BYTES and q.first != NULL and q.flying < most:
            io = q.first
            e = &c.entries[c.head % c.window]
            if not shared_next(b, q, io, e):
                break
            e.priv = c.base + <uint32_t>c.head
            e.io = io
            if n == 0:
                since = sampler_begin(&c.sampler, c.slept)
            client_counts(q, e, shared_flow(e), since)
            states[n] = shared_write(b, q, io, e, &requests[n], &c.giver)
            if e.kind == REQUEST_WRITE:
                bytes += requests[n].length
            io.issued += e.nblocks
            if io.issued == units_of(io):
                q.first = io.next
            q.flying += 1
            n += 1
            # From here on io may be done and gone: a hostile server answers what it has not been sent yet.
            store_release32(&e.state, ENTRY_ISSUED)
            store_release64(&c.head, c.head + 1)
        c.flying += n
        c.sampler.requests += n
        if n == 0:
            continue
        # Payload that went into zero pages is not offered: it is issued again once the buffer is back.
        if load_acquire32(b.broken) != 0:
            return
        idle = 0
        writer_reserve(&c.w, n)
        for k in range(n):
            if c.sums:
                sum = request_sum(states[k], &requests[k], c.w.wc + k, c.w.epoch)
                requests[k].length |= sum << 32
            memcpy(writer_slot(&c.w, k), &requests[k], sizeof(block_request))
        writer_publish(&c.w, n)


cdef void shared_free(client_t *c, entry_t **matched, uint64_t n) noexcept nogil:
    """Frees the places of n answered requests in the buffer. Precondition: reaping is ours."""
    cdef shared_t *b = <shared_t *>c.transport
    cdef entry_t *e
    cdef uint64_t k, length
    pthread_mutex_lock(&c.lock)
    for k in range(n):
        e = matched[k]
        if e.kind == REQUEST_READ or e.kind == REQUEST_WRITE:
            length = <uint64_t>e.nblocks * c.queues[e.device].block_size
            shared_mark(b, e.place // b.unit, length // b.unit, False)
            c.queues[e.device].held -= length
    pthread_mutex_unlock(&c.lock)


cdef bint shared_sum(const client_t *c, block_response *a, uint64_t number, uint32_t state) noexcept nogil:
    """Whether the checksum of an answer is right, state behind its data; takes it out of the status."""
    cdef uint64_t sum = a.status >> 32
    a.status = <uint32_t>a.status
    return response_sum(state, a, number, c.r.epoch) == sum


cdef ring_status shared_reap(client_t *c) noexcept nogil:
    """Takes one batch of answers. Precondition: reaping is ours."""
    cdef shared_t *b = <shared_t *>c.transport
    cdef uint64_t available, n, k, matches = 0, length, copied = 0
    cdef ring_status status = reader_peek(&c.r, &available)
    cdef uint64_t stale = 0, wrong = 0, unread = 0
    cdef uint32_t state
    cdef block_response answers[BATCH]
    cdef block_response *a
    cdef const uint8_t *data
    cdef entry_t *e
    cdef entry_t *matched[BATCH]
    cdef int32_t errors[BATCH]
    cdef bint ours
    if status != SUCCESS:
        return status
    n = min(available, <uint64_t>BATCH)
    for k in range(n):
        memcpy(&answers[k], reader_slot(&c.r, k), sizeof(block_response))
    if not reader_intact(&c.r):
        return reader_recover(&c.r)
    k = 0
    while k < n and copied < REAP_BYTES:
        a = &answers[k]
        k += 1
        e = &c.entries[<uint32_t>(a.tag - c.base) % c.window]
        ours = load_acquire32(&e.state) == ENTRY_ISSUED and e.priv == a.tag and e.kind == a.kind and e.device == a.device
        state = CRC32C_FIRST
        if ours and e.kind == REQUEST_READ and (<uint32_t>a.status if c.sums else a.status) == 0 and (e.io != NULL or c.sums):
            length = c.queues[e.device].block_size
            data = b.base + e.place
            if e.io != NULL:
                copy_taken(e.io.buf + e.index * length, data, e.nblocks * length)
                data = e.io.buf + e.index * length
            copied += e.nblocks * length
            if c.sums:
                state = crc32c(CRC32C_FIRST, data, e.nblocks * length)
        if c.sums:                      # of what is wrong, or was when the server read it, nothing is believed
            if not shared_sum(c, a, c.r.rc + k - 1, state):
                wrong += 1
                continue
            if a.status == ECOMM:
                unread += 1
                continue
        if not ours:
            stale += 1
            continue
        e.state = ENTRY_MATCHED
        matched[matches] = e
        # 1 is what a plain server says of anything; other small numbers are a Linux errno.
        errors[matches] = 0 if a.status == 0 else (-<int32_t>a.status if 1 < a.status <= 4095 else -EIO)
        matches += 1
    reader_advance(&c.r, k)
    client_stale(c, stale)
    if load_acquire32(b.broken) != 0:
        for k in range(matches):        # zeros, perhaps: in flight until the buffer is back
            matched[k].state = ENTRY_ISSUED
        return INACTIVE
    shared_free(c, matched, matches)
    client_settle(c, matched, errors, matches)
    if c.sums:
        client_stray(c, wrong, unread + stale)
    return SUCCESS


# ------------------------------------------------------------------ connecting

cdef void shared_ask(client_t *c, uint16_t kind, uint16_t device, bint optional, uint64_t half=0) noexcept nogil:
    """Adds a question. half: with checksums, which one of the answer's 64 bits. Precondition: reaping is ours; ASKS are not
    exceeded."""
    cdef shared_t *b = <shared_t *>c.transport
    cdef ask_t *ask = &b.asks[b.nasks]
    cdef block_request r
    b.nasks += 1
    b.asked += 1
    ask.kind = kind
    ask.device = device
    ask.tag = c.base - b.asked          # the requests' tags begin at base
    ask.optional = optional
    ask.answered = False
    memset(&r, 0, sizeof(r))
    r.kind = kind
    r.device = device
    r.tag = ask.tag
    r.device_offset = half
    if kind == REQUEST_READ:            # of the first block into the first bytes of the buffer
        r.length = b.geometry[device].length
    if kind == REQUEST_RESET and c.checksums != CHECKSUM_OFF and c.w.wc == 0:
        c.nonce = random_epoch()
        request_offer(&r, c.nonce, c.w.epoch)
    elif c.agreed:
        r.length |= <uint64_t>request_sum(CRC32C_FIRST, &r, c.w.wc, c.w.epoch) << 32
    writer_reserve(&c.w, 1)
    memcpy(writer_slot(&c.w, 0), &r, sizeof(r))
    writer_publish(&c.w, 1)


cdef inline bint can_be(const geometry_t *g) noexcept nogil:
    """Whether a disk can have this geometry."""
    return (g.length == SECTOR_SIZE or g.length == BLOCK_SIZE) and 1 <= g.blocks < (<uint64_t>1 << 63) // g.length


cdef inline uint64_t probe_word(const shared_t *b, uint64_t k) noexcept nogil:
    return b.pattern * (2 * k + 1)      # odd times odd: none is zero, and no two are equal


cdef bint shared_probe(client_t *c) noexcept nogil:
    """Asks the next device that can be read for a block; False where there is none more.

    Two sides with different buffers could not tell otherwise: what is written would be lost, and what is read anything.
    No disk holds the random pattern that is overwritten.
    """
    cdef shared_t *b = <shared_t *>c.transport
    cdef uint64_t k, word
    while b.device < b.ndevices:
        if can_be(&b.geometry[b.device]):
            b.pattern = random_epoch() | 1
            for k in range(b.geometry[b.device].length // sizeof(uint64_t)):
                word = probe_word(b, k)
                memcpy(b.base + k * sizeof(word), &word, sizeof(word))
            b.nasks = 0
            shared_ask(c, REQUEST_READ, <uint16_t>b.device, False)
            return True
        b.device += 1
    return False


cdef bint shared_untouched(const shared_t *b) noexcept nogil:
    """Whether what shared_probe left is all there. Precondition: its read was answered with success."""
    cdef uint64_t k, word = 0
    if load_acquire32(b.broken) != 0:
        return False                    # zeros, and no buffer any more: another life will tell
    for k in range(b.geometry[b.device].length // sizeof(uint64_t)):
        memcpy(&word, b.base + k * sizeof(word), sizeof(word))
        if word != probe_word(b, k):
            return False
    return True


cdef void shared_ask_geometry(client_t *c) noexcept nogil:
    cdef shared_t *b = <shared_t *>c.transport
    b.nasks = 0
    shared_ask(c, REQUEST_MEDIA_BLOCKS, <uint16_t>b.device, False)
    shared_ask(c, REQUEST_BLOCK_LENGTH, <uint16_t>b.device, False)
    shared_ask(c, REQUEST_MAX_BLOCKS, <uint16_t>b.device, False)
    if c.agreed:
        shared_ask(c, REQUEST_MEDIA_BLOCKS, <uint16_t>b.device, False, 1)


cdef bint shared_took(client_t *c) noexcept nogil:
    """What follows from the answers: asks on. Whether everything is known. Precondition: all asks are answered."""
    cdef shared_t *b = <shared_t *>c.transport
    if b.asks[0].kind == REQUEST_RESET:
        b.nasks = 0
        shared_ask(c, REQUEST_MAX_REQUESTS, 0, True)
        shared_ask(c, REQUEST_MAX_DEVICES, 0, False)
        return False
    if b.asks[0].kind == REQUEST_MAX_REQUESTS:
        c.allowed = WINDOW
        if b.asks[0].answered and b.asks[0].status != 0:
            c.allowed = <uint32_t>min(b.asks[0].status, <uint64_t>WINDOW)
        b.ndevices = b.asks[1].status
        b.device = 0
        if b.ndevices == 0 or b.ndevices > MOST_DEVICES:
            return True
        shared_ask_geometry(c)
        return False
    if b.asks[0].kind == REQUEST_READ:
        if b.asks[0].status == 0:
            b.foreign = shared_untouched(b)
            return True
        b.device += 1                   # one that cannot be read tells nothing
        return not shared_probe(c)
    b.geometry[b.device].blocks = b.asks[0].status | (b.asks[3].status << 32 if c.agreed else 0)
    b.geometry[b.device].length = b.asks[1].status
    b.geometry[b.device].most = b.asks[2].status
    b.device += 1
    if b.device == b.ndevices:
        b.device = 0
        return not shared_probe(c)
    shared_ask_geometry(c)
    return False


cdef ring_status shared_listen(client_t *c, uint64_t available) noexcept nogil:
    """Looks through one batch of answers for those to our questions; others are an earlier life's."""
    cdef shared_t *b = <shared_t *>c.transport
    cdef uint64_t n = min(available, <uint64_t>BATCH), k
    cdef uint32_t i
    cdef block_response answers[BATCH]
    for k in range(n):
        memcpy(&answers[k], reader_slot(&c.r, k), sizeof(block_response))
    if not reader_intact(&c.r):
        return reader_recover(&c.r)
    reader_advance(&c.r, n)
    for k in range(n):
        for i in range(b.nasks):
            if (answers[k].tag == b.asks[i].tag and answers[k].kind == b.asks[i].kind
                    and answers[k].device == b.asks[i].device and not b.asks[i].answered):
                b.asks[i].answered = True
                if not shared_heard(c, &b.asks[i], &answers[k], c.r.rc - n + k):
                    if not c.demanded:
                        reader_blame(&c.r, FAULT_CHECKSUM, 1)
                    b.garbled = True
                    return SUCCESS
                b.asks[i].status = answers[k].status
    return SUCCESS


cdef bint shared_heard(client_t *c, const ask_t *ask, block_response *a, uint64_t number) noexcept nogil:
    """Whether the answer to a question is one to go on with: it is right, and a Reset's, which says what was agreed upon, does
    not demand what we have not. With checksums, takes them out."""
    cdef shared_t *b = <shared_t *>c.transport
    cdef uint32_t state = CRC32C_FIRST
    cdef int found
    if ask.kind == REQUEST_RESET:
        c.demanded = a.status == EPROTONOSUPPORT
        if c.demanded:
            return False
        if c.checksums == CHECKSUM_OFF:
            return True
        found = OFFER_GARBLED if a.status == ECOMM else accept_look(a, c.nonce, number, c.r.epoch)
        c.agreed = found == OFFER_GOOD
        return found != OFFER_GARBLED
    if not c.agreed:
        return True
    if ask.kind == REQUEST_READ and <uint32_t>a.status == 0:
        if load_acquire32(b.broken) != 0:
            return True                 # no buffer any more: another life will tell
        state = crc32c(state, b.base, b.geometry[ask.device].length)
    return shared_sum(c, a, number, state) and a.status != ECOMM


cdef bint shared_connect(client_t *c, uint64_t ns) noexcept nogil:
    """Goes on with connecting for at most ns nanoseconds; True once all is known that a client asks.

    No byte of the buffer is touched before Reset was answered. Precondition: reaping is ours, state is CONNECTING or
    LOST.
    """
    cdef shared_t *b = <shared_t *>c.transport
    cdef uint64_t start = now_ns(), now, passed, available
    cdef uint32_t i
    cdef bint waiting, hoping
    cdef ring_status status
    if c.phase == PHASE_ANSWERED:       # nobody resumed
        c.phase = PHASE_START
    while True:
        now = now_ns()
        passed = now - start
        if passed >= ns or load_relaxed32(&c.stop) != 0 or load_relaxed32(&c.takers) != 0:
            return False
        if load_acquire32(b.broken) != 0:
            sleep_ns(1_000_000)
            continue
        if c.phase == PHASE_START and now < b.again_ns:
            sleep_ns(min(ns - passed, <uint64_t>10_000_000))
            continue
        if c.phase == PHASE_START:
            c.base = <uint32_t>random_epoch()
            writer_start(&c.w, random_epoch())
            c.r.epoch = c.r.refused = 0
            reader_drain(&c.r)
            b.asked = b.nasks = 0
            b.foreign = c.agreed = False
            c.phase = PHASE_RESET
        if c.phase == PHASE_RESET:
            if c.r.epoch == 0 and reader_peek(&c.r, &available) != EPOCH_CHANGED:
                reader_wait(&c.r, ns - passed, &c.stop)     # nobody there: waiting costs nothing
                continue
            b.nasks = 0
            shared_ask(c, REQUEST_RESET, 0, False)
            c.phase = PHASE_ASKING
            c.phase_since = now
        status = reader_peek(&c.r, &available)
        if status == SUCCESS:
            status = shared_listen(c, available)
            if b.garbled:               # it is there, and would say so again
                b.again_ns = now + ANEW_NS
                b.garbled = False
                c.phase = PHASE_START
                continue
        if status == EPOCH_CHANGED or status == INACTIVE or status == INCOMPATIBLE_INTERFACE:
            c.phase = PHASE_START       # another server, or none any more
            continue
        waiting = hoping = False
        for i in range(b.nasks):
            if not b.asks[i].answered:
                if b.asks[i].optional:
                    hoping = True
                else:
                    waiting = True
        if not waiting and not (hoping and now - c.phase_since < OPTIONAL_NS):
            c.phase_since = now
            if shared_took(c):
                client_introduced(c)
                fence_acquire()
                if load_relaxed64(&c.r.hdr.epoch) != c.r.epoch:
                    c.phase = PHASE_START
                    continue
                c.phase = PHASE_ANSWERED
                return True
            continue
        if waiting and now - c.phase_since > (PROBE_NS if b.asks[0].kind == REQUEST_READ else ANSWER_NS):
            c.phase = PHASE_START
            continue
        if status == NO_DATA:
            reader_wait(&c.r, min(ns - passed, ANSWER_NS if waiting else OPTIONAL_NS), &c.stop)


cdef class BufferClient(ClientEngine):
    """The client engine of all disks of one connection over two channels and a buffer.

    request: the request channel's memory, writable, claimed by the caller; response: the response channel's; buffer:
    writable, at least 4096 bytes. request_bell, response_bell: writable buffers or None. poll: microseconds, None:
    adaptive. fail_fast: while the server is lost, new requests fail instead of waiting for it. watch: of all engines of
    this process, or None. checksum: as Client has it.

    disks is empty until the first resume().
    """
    FIELDS = ("tag", "checksum")

    def __init__(self, request, response, buffer, *, request_protocol=BUFFER_PROTOCOL,
                 response_protocol=BUFFER_PROTOCOL, request_bell=None, response_bell=None, poll=None, fail_fast=False,
                 Watch watch=None, checksum="off"):
        cdef shared_t *b
        if self.c.transport != NULL:
            raise UsageError("a BufferClient is initialised once")
        b = <shared_t *>calloc(1, sizeof(shared_t))
        if b == NULL:
            raise MemoryError()
        self.c.transport = b
        self.c.checksums = checksum_mode(checksum)
        self.c.free = shared_free
        self.c.issue = shared_issue
        self.c.reap = shared_reap
        self.c.connect = shared_connect
        self.c.renew = shared_renew
        self.more = hold(buffer, True, BLOCK_SIZE)
        b.most = self.more.length
        b.used = <uint64_t *>calloc(words_of(b.most), sizeof(uint64_t))
        if b.used == NULL:
            raise MemoryError()
        self.sizes = (sizeof(block_request), sizeof(block_response))
        self.protocols = (request_protocol, response_protocol)
        self.prepare((request, response, request_bell, response_bell), poll, fail_fast, watch)
        self.more_taken()

    cdef void more_taken(self) noexcept:
        cdef shared_t *b = <shared_t *>self.c.transport
        b.base = self.more.base
        b.length = min(self.more.length, b.most)
        b.broken = self.more.broken

    def rebind(self, request, response, buffer, request_bell=None, response_bell=None):
        """Goes on in other memory, after the channels or the buffer were made anew: as after a restart of the server.

        What is in flight stays so until resume() or fail(). The old memory may be unmapped afterwards.
        """
        self.rebound((request, response, request_bell, response_bell), hold(buffer, True, BLOCK_SIZE))

    cdef bint admit(self) except -1:
        cdef shared_t *b = <shared_t *>self.c.transport
        cdef Disk disk
        cdef bint first = not self.disks, zeroes
        cdef uint64_t k
        if not 1 <= b.ndevices <= MOST_DEVICES:
            return False
        if not first and tuple([one.block_size for one in self.disks]) != tuple([length for _, length in self.geometry]):
            return False
        if not first and not self.resizing and \
                tuple([one.nblocks for one in self.disks]) != tuple([blocks for blocks, _ in self.geometry]):
            return False
        for k in range(b.ndevices):
            if not can_be(&b.geometry[k]):
                return False
        if first:
            self.make_disks(b.ndevices)
        for k in range(b.ndevices):
            disk = self.disks[k]
            zeroes = k < STORE_FLAGS and self.c.zeroes >> k & 1 != 0
            disk.nblocks = b.geometry[k].blocks
            if first:
                disk.block_size = disk.queue.block_size = <uint32_t>b.geometry[k].length
                disk.discards = True
                disk.zeroes = zeroes
            disk.queue.clears = disk.zeroes and not zeroes
            disk.queue.most = max(b.geometry[k].most, <uint64_t>1)
            disk.read_only = k < STORE_FLAGS and self.c.flags >> k & STORE_READ_ONLY != 0
        return True

    @property
    def foreign(self):
        """Whether the server that answered last uses another buffer."""
        return (<shared_t *>self.c.transport).foreign

    @property
    def devices(self):
        """How many devices the server has, as it last said; this side takes up to 256."""
        return (<shared_t *>self.c.transport).ndevices

    @property
    def geometry(self):
        """As ClientEngine.geometry; empty where the number of devices is none that can be taken."""
        cdef shared_t *b = <shared_t *>self.c.transport
        if b.ndevices > MOST_DEVICES:
            return ()
        return tuple([(b.geometry[k].blocks, b.geometry[k].length) for k in range(b.ndevices)])

    def __dealloc__(self):
        if self.c != NULL and self.c.transport != NULL:
            free((<shared_t *>self.c.transport).used)
            free(self.c.transport)
            self.c.transport = NULL
