/* fuzz target: what a channel's elements become at the devices: the receiver of an interface, whole. core: _net, on _ring
 *
 * The devices are the target's: what is written to one is looked at as the kernel would, by the way the device is used
 * (virtio_net_hdr, the prefix of marks, packet information). Oracles: no byte is read outside the region or written outside the
 * receiver's own memory (guard pages). Whatever comes, a packet is as long as its own header says and as an element holds, and
 * goes to the device whose mark it has, with that mark; every element that was taken is a packet of a device or in the counter
 * of its fault. What an honest writer sent comes out as it was sent, each once, in order, what cannot be is dropped for the
 * reason that it has, and what is missing was counted as lost; merged, it is the sum of what was sent, of one mark. With
 * checksums that holds whatever becomes of the elements meanwhile. Of the bell only the reader's words are written.
 */
#define FUZZ_PEER
#define FUZZ_CLOCK
#include "packets_common.h"

static ssize_t device_takes(int fd, const void *data, size_t n);
#define write(fd, data, n) device_takes((fd), (data), (n))
#include CORE_SOURCE
#undef write
#undef memcpy

enum { PORTS = 4, GONE = 3, MARKS = 16, HISTORY = 512, MOST_MTU = 400, MOST_REGION = 64 + 16 * (MOST_MTU + 20), PROTOCOL = 2, STAGE = 1 << 15 };
static fuzz_region region, page, stage, memory;
static T_receiver_t v;
static T_port_t ports[PORTS];
static mark_table_t marks;
static uint32_t child[MARKS + 1];
static T_loan_t loan;
static T_writer_t w;
static bell_page *bell, mirror;
static uint32_t mtu, size;
static uint64_t next_epoch, base; /* base: where this epoch's elements are in `sent` */
static bool sums, moved, spoilt; /* spoilt: something came not by the core's own writer */
static enum { CLEAN, ELEMENTS, FORGED } epochs[HISTORY]; /* by epoch: what was done to it */
static uint8_t mood;              /* of the devices */
static struct sent {
    uint64_t epoch, number;
    uint32_t mark, length; /* length: of what comes out, 0: it is dropped */
    int fault;
    bool out;
    uint8_t bytes[MOST_MTU + 20];
} sent[HISTORY];
static uint32_t nsent, first_left; /* all before it have left */
static uint64_t skipped, excuses, calls; /* skipped: good ones of this epoch that nothing came of; excuses: what was counted before it */

static void (*writer_init)(T_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t), (*writer_start)(T_writer_t *, uint64_t),
    (*writer_stop)(T_writer_t *), (*writer_reserve)(T_writer_t *, uint64_t), (*writer_publish)(T_writer_t *, uint64_t);
static uint8_t *(*writer_slot)(const T_writer_t *, uint64_t);

/* ---- what may come out */
static int fault_of(const uint8_t *e, uint32_t *length) { /* by docs/protocol.md */
    const uint8_t *p = e + 8;
    uint32_t version, n;
    if (v.kind == FRAME_RAW) {
        *length = size;
        return 0;
    }
    if (v.kind == FRAME_ETH) {
        *length = e[size - 2] | e[size - 1] << 8;
        return *length < 14 || *length > size - 2 ? FRAME_LENGTH : 0;
    }
    version = p[0] >> 4;
    if (version != 4 && version != 6)
        return FRAME_PROTOCOL;
    n = version == 4 ? net16(p + 2) : 40u + net16(p + 4);
    *length = n;
    bool bad = n > size - 8 || (version == 4 && ((p[0] & 15) < 5 || n < (p[0] & 15) * 4u)), strange = e[6] != (version == 4 ? 4 : 41);
    return bad && strange ? -99 : bad ? FRAME_LENGTH : strange ? FRAME_PROTOCOL : 0; /* -99: one of both */
}
static uint32_t port_of(uint32_t mark) { return mark > MARKS ? 0 : child[mark]; }

/* Whether of the epoch that is received is known what comes out. */
static uint64_t before; /* the epoch in which it was called: what it held may be that one's */
static bool known(uint64_t epoch) { return epoch < next_epoch && (epochs[epoch] == CLEAN || (epochs[epoch] == ELEMENTS && v.sums)); }
static bool current(const struct sent *s) { return s->epoch == v.r.epoch || s->epoch == before; }
static bool foretold(void) { return v.r.epoch != 0 && known(v.r.epoch) && (before == 0 || known(before)); }

/* Takes what was sent as number k, by a device; it is the oldest that is the same. */
FUZZ_QUIET static bool leaves(uint32_t mark, const uint8_t *p, uint32_t n, bool merged) {
    uint32_t start = v.kind == FRAME_NET ? 8 : 0;
    for (uint32_t k = first_left; k < nsent; k++) {
        struct sent *s = &sent[k];
        if (s->out || !current(s) || s->fault != 0 || s->mark != mark || s->length != n || memcmp(s->bytes + start, p, n) != 0)
            continue;
        if (!merged) /* in order: what stands before it was dropped, lost, or left */
            for (uint32_t other = first_left; other < k; other++) {
                skipped += !sent[other].out && sent[other].fault == 0 && sent[other].epoch == s->epoch;
                sent[other].out = true;
            }
        s->out = true;
        while (first_left < nsent && sent[first_left].out)
            first_left++;
        return true;
    }
    return false;
}

/* Whether what is left of a super-packet begins with a packet that was sent: its payload, and headers but for what segments change. */
FUZZ_QUIET static uint32_t begins(uint32_t mark, const uint8_t *p, uint32_t header, const uint8_t *at, uint32_t left, bool udp) {
    uint32_t u = p[0] >> 4 == 4 ? 20 : 40;
    for (uint32_t k = first_left; k < nsent; k++) {
        struct sent *s = &sent[k];
        const uint8_t *q = s->bytes + 8;
        uint32_t n = s->length - header;
        if (s->out || !current(s) || s->fault != 0 || s->mark != mark || s->length <= header || n > left || q[0] != p[0] ||
            memcmp(q + header, at, n) != 0 || memcmp(q + u, p + u, 4) != 0 || memcmp(q + (u == 20 ? 12 : 8), p + (u == 20 ? 12 : 8), u == 20 ? 8 : 32) != 0)
            continue;
        EXPECT(upper_sum(q, u, s->length, udp ? 17 : 6) == 0xffff, "what had a wrong checksum is part of a super-packet");
        s->out = true;
        return n;
    }
    return 0;
}

FUZZ_QUIET static ssize_t device_takes(int fd, const void *data, size_t n) {
    const uint8_t *p = data;
    vnet_header vnet = {0};
    uint32_t mark = 0, port = (uint32_t)fd - 100, own;
    EXPECT(port < PORTS && port != GONE, "written to descriptor %d", fd);
    T_port_t *to = &ports[port];
    EXPECT((p >= stage.ours && p + n <= stage.our_end) || (v.merges && p >= memory.ours && p + n <= memory.our_end), "memory that is not the receiver's");
    static const int errors[] = {EINTR, EIO, EINVAL, EINTR, EAGAIN};
    int fails = (mood & 3) == 3 && ++calls % 3 == 0 ? errors[calls / 3 % 5] : 0;
    errno = fails;
    if (fails == EINTR)
        return -1; /* and comes again */
    if (v.offload) {
        EXPECT(n >= sizeof vnet, "no virtio_net_hdr");
        memcpy(&vnet, p, sizeof vnet);
        p += sizeof vnet;
        n -= sizeof vnet;
    }
    if (v.kind == FRAME_RAW) {
        EXPECT(n == size + 4 && p[0] + p[1] + p[2] + p[3] == 0, "packet information");
        p += 4;
        n -= 4;
    }
    if (to->way == E_PORT_FRONT && n >= 8 && p[4] == 0xff && p[5] == 0xff && p[1] == 0 && (p[0] == 0x40 || p[0] == 0x60)) {
        mark = (uint32_t)p[2] | (uint32_t)p[3] << 8 | (uint32_t)p[6] << 16 | (uint32_t)p[7] << 24;
        EXPECT(mark != 0 && n > 8 && (p[8] & 0xf0) == p[0], "a prefix of mark %u", mark);
        p += 8;
        n -= 8;
        if (v.offload && vnet.flags & VNET_NEEDS_CHECKSUM)
            vnet.sum_start -= 8;
        if (v.offload && vnet.kind != VNET_NONE)
            vnet.headers -= 8;
    }
    if (to->way == E_PORT_FRONT || mark != 0) {
        EXPECT(port_of(mark) == port, "mark %u at port %u, it is port %u's", mark, port, port_of(mark));
    }
    own = (uint32_t)n;
    if (v.kind == FRAME_NET) {
        EXPECT(n >= 20 && (p[0] >> 4 == 4 || p[0] >> 4 == 6), "%zu bytes that are no IP", n);
        own = p[0] >> 4 == 4 ? net16(p + 2) : 40u + net16(p + 4);
        EXPECT(p[0] >> 4 == 6 || ((p[0] & 15) >= 5 && (p[0] & 15) * 4u <= own), "an IPv4 header beyond its packet");
    }
    EXPECT(own == n, "a packet of %u comes as %zu bytes", own, n);
    if (vnet.kind == VNET_NONE) {
        EXPECT(n <= frame_room(v.kind, size), "%zu bytes, an element holds %u", n, frame_room(v.kind, size));
        EXPECT(vnet.flags == 0 && vnet.size == 0 && vnet.headers == 0 && vnet.sum_start == 0, "a virtio_net_hdr that asks for something");
    } else
        EXPECT(v.merges && n <= 65535 && vnet.headers < n && vnet.size != 0, "a super-packet of %zu bytes in pieces of %u", n, vnet.size);
    if (fails != 0)
        errno = fails;
    if (!foretold())
        return fails != 0 ? -1 : (ssize_t)n;
    if (to->way != E_PORT_FRONT) { /* the mark is not told: any that goes there */
        bool found = false;
        for (uint32_t k = first_left; k < nsent && !found; k++)
            if (!sent[k].out && current(&sent[k]) && sent[k].fault == 0 && port_of(sent[k].mark) == port &&
                (vnet.kind == VNET_NONE ? sent[k].length == n && memcmp(sent[k].bytes + (v.kind == FRAME_NET ? 8 : 0), p, n) == 0
                                        : sent[k].length > vnet.headers && memcmp(sent[k].bytes + 8 + vnet.headers, p + vnet.headers, sent[k].length - vnet.headers) == 0)) {
                mark = sent[k].mark;
                found = true;
            }
        EXPECT(found, "port %u gets what was not sent there", port);
    }
    if (vnet.kind == VNET_NONE)
        EXPECT(leaves(mark, p, (uint32_t)n, v.merges), "a packet of %zu bytes with mark %u was not sent, or not now", n, mark);
    else {
        uint32_t at = vnet.headers, piece, count = 0;
        for (; at < n; at += piece, count++) {
            piece = begins(mark, p, vnet.headers, p + at, (uint32_t)n - at, vnet.kind == VNET_UDP);
            EXPECT(piece != 0, "byte %u of a super-packet with mark %u is no packet's that was sent", at, mark);
        }
        EXPECT(count >= 2, "a super-packet of one");
        while (first_left < nsent && sent[first_left].out)
            first_left++;
    }
    return fails != 0 ? -1 : (ssize_t)n;
}

/* ---- the writer */
static void begins_epoch(uint8_t more) {
    sums = more & 1 && v.r.sums_size != 0;
    writer_init(&w, region.theirs, region.length, size + (sums ? FRAME_SUM : 0), more & 32 ? PROTOCOL + 1 : PROTOCOL);
    w.reserved = sums ? ACCEPT_MAGIC : 0;
    w.bell = more & 64 ? bell : NULL;
    if (w.elements == 0)
        return;
    writer_start(&w, next_epoch);
    base = nsent;
    epochs[next_epoch++] = CLEAN;
}
static void sends(uint8_t what, uint8_t more) {
    struct sent *s;
    shape sh;
    uint8_t *slot;
    uint32_t payload, n;
    if (w.epoch == 0 || w.elements == 0 || w.epoch != next_epoch - 1 || nsent == HISTORY || w.wc != nsent - base)
        return;
    s = &sent[nsent];
    memset(s, 0, offsetof(struct sent, bytes));
    memset(s->bytes, 0, size);
    s->epoch = w.epoch;
    s->number = w.wc;
    if (v.kind == FRAME_NET) {
        s->mark = more & 3 ? 0 : fuzz_u8() % (MARKS + 4);
        uint8_t form = mtu < 80 ? what & 3 : what & 15;
        n = (form & 1 ? IP4_SIZE : IP6_SIZE) + (form & 2 ? TCP_SIZE + (form >> 2) * 4u : UDP_SIZE);
        payload = 8 + (more >> 4) * 20u;
        payload = payload < mtu - n ? payload : mtu - n;
        n = make_packet(s->bytes + 8, payload, form, &sh);
        spell(s->bytes + 8 + sh.header, payload, nsent * 3);
        memcpy(s->bytes + 8 + sh.header, &nsent, 4);
        if (sh.tcp) /* one flow for each kind, whose packets follow each other now and then */
            put16(s->bytes + 8 + sh.upper + TCP_SEQUENCE + 2, (uint32_t)(w.wc * payload));
        if (what & 32 && sh.ip4)
            s->bytes[8 + 6] = 0x40;
        complete(s->bytes + 8, n, &sh);
        memcpy(s->bytes, &s->mark, 4);
        s->bytes[4] = (uint8_t)n;
        s->bytes[5] = (uint8_t)(n >> 8);
        s->bytes[6] = sh.ip4 ? 4 : 41;
        if (what & 16)
            s->bytes[(uint32_t)fuzz_u8() % (8 + n)] ^= (uint8_t)(1 << (more & 7)); /* and it is what is sent */
    } else {
        spell(s->bytes, size, nsent * 3);
        memcpy(s->bytes, &nsent, 4);
        n = 14 + (more & 7) * 10;
        if (what & 16)
            n = fuzz_u16();
        if (v.kind == FRAME_ETH)
            put16(s->bytes + size - 2, (n & 0xff) << 8 | n >> 8);
    }
    s->fault = fault_of(s->bytes, &s->length);
    memcpy(&s->mark, s->bytes, v.kind == FRAME_NET ? 4 : 0);
    writer_reserve(&w, 1);
    slot = writer_slot(&w, 0);
    memcpy(slot, s->bytes, size);
    if (sums) {
        n = s->fault == 0 ? s->length : 0;
        uint32_t sum = frame_sum(v.kind, s->bytes, size, n, w.wc, w.epoch);
        memcpy(slot + size, &sum, sizeof sum);
    }
    nsent++;
    writer_publish(&w, 1);
}
static void spoils(int how) {
    spoilt = true;
    for (uint64_t e = how == FORGED ? 0 : next_epoch - 1; e < next_epoch; e++)
        epochs[e] = how == FORGED || epochs[e] == FORGED ? FORGED : ELEMENTS;
}
static void writer_acts(void) {
    uint8_t what = fuzz_u8(), more = fuzz_u8();
    uint32_t was_armed = fuzz_countdown;
    uint64_t x;
    fuzz_countdown = 0;
    moved = true;
    switch (what >> 4) {
    case 0:
        if (next_epoch < HISTORY)
            begins_epoch(more);
        break;
    default:
        for (int n = (what >> 4) > 7 ? 1 + more % 4 : 1; n != 0; n--)
            sends(what, more);
        break;
    case 9:
        if (w.epoch != 0)
            writer_stop(&w);
        break;
    case 10: case 11: /* elements change, read or not; counters stay */
        spoils(ELEMENTS);
        x = fuzz_odd();
        region.theirs[64 + fuzz_u16() % (region.length - 64)] ^= (uint8_t)(x | 1);
        break;
    case 12: /* the header */
        spoils(FORGED);
        x = fuzz_odd();
        memcpy(region.theirs + more % 8 * 8, &x, 8);
        break;
    case 13:
        spoils(FORGED);
        ((ring_header *)region.theirs)->wc += more & 128 ? fuzz_odd() : more % 8;
        if (more & 64)
            ((ring_header *)region.theirs)->wsc = ((ring_header *)region.theirs)->wc;
        break;
    case 14: /* the bell */
        x = fuzz_odd();
        memcpy((uint8_t *)bell + more % 16 * 8, &x, 8);
        break;
    case 15:
        fuzz_now += (uint64_t)more * more * 100000;
    }
    if (spoilt)
        fuzz_no_future(region.theirs, next_epoch);
    memcpy(&mirror, bell, sizeof mirror);
    fuzz_countdown = was_armed;
}

static void runs(uint64_t ns) {
    T_receiver_counters n;
    uint64_t start = fuzz_now;
    bool joins = !v.joined;
    before = v.r.epoch;
    moved = false;
    enum __pyx_t_8muenfast_4_net_receiver_event event = F_receiver_loop(&v, ns);
    n = v.n;
    EXPECT(n.packets + n.length + n.protocol + n.checksum + n.down + n.refused == v.r.delivered,
           "of %llu elements %llu are packets, %llu + %llu + %llu wrong, %llu + %llu not taken by their device", (unsigned long long)v.r.delivered,
           (unsigned long long)n.packets, (unsigned long long)n.length, (unsigned long long)n.protocol, (unsigned long long)n.checksum,
           (unsigned long long)n.down, (unsigned long long)n.refused);
    EXPECT(v.r.offences[E_FAULT_LENGTH] == n.length && v.r.offences[E_FAULT_PROTOCOL] == n.protocol && v.r.offences[E_FAULT_CHECKSUM] == n.checksum,
           "offences are not what was dropped");
    if (event == E_RECEIVER_TICK && !moved)
        EXPECT(fuzz_now - start >= ns && fuzz_now - start <= ns + 40000000, "%llu ns, not %llu", (unsigned long long)(fuzz_now - start), (unsigned long long)ns);
    EXPECT(event != E_RECEIVER_STOPPED && event != E_RECEIVER_BROKEN, "event %d", event);
    EXPECT(event != E_RECEIVER_CHILD && event != E_RECEIVER_GONE, "no device is gone, event %d", event);
    if (!moved) {
        EXPECT(bell->magic == mirror.magic && bell->seq == mirror.seq && bell->ringer == mirror.ringer &&
               memcmp(&bell->state, &mirror.state, offsetof(bell_page, reader_rc) - offsetof(bell_page, state)) == 0, "the receiver wrote the writer's words");
        EXPECT(!v.r.mute || (bell->reader_rc == mirror.reader_rc && bell->reader_epoch == mirror.reader_epoch && bell->reader_sums == mirror.reader_sums),
               "it tells, and is not the one");
    }
    if (joins && v.joined) /* what stood there before is nobody's loss */
        for (uint64_t k = base; k < nsent && k - base < v.r.rc; k++)
            sent[k].out = true;
    uint64_t left = skipped, excused = v.r.lost_total + n.checksum + (spoilt ? n.length + n.protocol : 0) - excuses;
    if (event == E_RECEIVER_CONNECTED) {
        excuses += excused;
        left = skipped = excused = 0;
    }
    if (foretold() && v.r.epoch == w.epoch && v.r.rc == w.wc) {
        for (uint64_t k = base; k < nsent; k++)
            left += !sent[k].out && sent[k].fault == 0;
        EXPECT(left <= excused, "nothing came of %llu elements, of which %llu are in a counter", (unsigned long long)left, (unsigned long long)excused);
    }
    memcpy(&mirror, bell, sizeof mirror);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_) {
    static const uint16_t mtus[] = {68, 100, 200, 400};
    static bool made;
    if (!made) {
        CORE_CONSTANTS
        CORE_BINDINGS
        *(void **)&writer_init = ring_function("writer_init");
        *(void **)&writer_start = ring_function("writer_start");
        *(void **)&writer_stop = ring_function("writer_stop");
        *(void **)&writer_reserve = ring_function("writer_reserve");
        *(void **)&writer_publish = ring_function("writer_publish");
        *(void **)&writer_slot = ring_function("writer_slot");
        fuzz_region_make(&region, MOST_REGION, PROT_READ);
        fuzz_region_make(&page, sizeof(bell_page), PROT_READ | PROT_WRITE);
        fuzz_region_make(&stage, STAGE, PROT_READ | PROT_WRITE);
        fuzz_region_make(&memory, (COALESCE_MEMORY + 7) / 8 * 8, PROT_READ | PROT_WRITE);
        made = true;
    }
    fuzz_begin(data, size_);
    fuzz_peer = writer_acts;
    uint8_t kind = fuzz_u8(), more = fuzz_u8();
    memset(&w, 0, sizeof w);
    memset(ports, 0, sizeof ports);
    memset(child, 0, sizeof child);
    memset(&v, 0, sizeof v);
    v.kind = kind % 3;
    mtu = mtus[kind >> 2 & 3];
    size = frame_size(v.kind, mtu);
    v.size = size;
    v.offload = v.kind == FRAME_NET && kind & 16;
    v.merges = v.offload && kind & 32;
    if (v.merges)
        coalesce_init(&v.c, memory.ours, more & 7 ? more & 7 : 7);
    v.checksums = kind >> 6 == 3 ? 2 : kind >> 6 & 1; /* CHECKSUM_OFF, _AUTO, _REQUIRE */
    fuzz_region_size(&region, 64 + ((size + 4) * (1 + (more >> 3 & 7) * 2) + 7) / 8 * 8);
    fuzz_region_size(&page, sizeof(bell_page));
    bell = (bell_page *)page.theirs;
    bell->magic = BELL_MAGIC;
    v.batch = 1 + (more >> 6) * 5;
    v.stride = (E_HEADROOM + size + 63) & ~63u;
    v.stage = stage.ours + (stage.length - v.batch * v.stride); /* which ends where it ends */
    memset(v.stage, 0, v.batch * v.stride);
    F_reader_init(&v.r, region.ours, region.length, size, PROTOCOL);
    v.r.settle_ns = 0;
    v.r.may_spin = 0;
    v.r.yields = 1;
    static const uint32_t never;
    v.r.broken = &never;
    if (v.checksums != 0)
        v.r.sums_size = size + FRAME_SUM;
    if (v.checksums == 2)
        v.r.want_size = UINT64_MAX;
    kind = fuzz_u8();
    v.r.bell = kind & 1 ? (bell_page *)page.ours : NULL;
    v.r.mute = kind >> 1 & 1;
    v.r.patience = kind & 4 ? 3 : 0;
    mood = kind >> 3 & 3;
    v.ports = ports;
    v.marks = &marks;
    v.loan = &loan;
    loan.taken = 1;
    marks = (mark_table_t){.child = child, .highest = MARKS};
    for (uint32_t k = 0; k < PORTS; k++) {
        ports[k].fd = k == GONE ? 0 : 101 + k;
        ports[k].way = kind >> (5 + k) & 1 && v.kind == FRAME_NET ? E_PORT_FRONT : E_PORT_PLAIN;
    }
    for (uint32_t k = 1; k <= MARKS; k++)
        child[k] = k % GONE;
    skipped = excuses = calls = 0;
    next_epoch = 1;
    nsent = first_left = 0;
    base = 0;
    spoilt = sums = false;
    epochs[0] = FORGED;
    memcpy(&mirror, bell, sizeof mirror);
    for (int turns = 0; fuzz_left() != 0 && turns < 100; turns++) {
        uint8_t what = fuzz_u8();
        if (what < 150)
            writer_acts();
        else if (what < 230)
            runs(1000 * (uint64_t)(what - 149));
        else
            fuzz_arm();
        fuzz_region_check(&page);
    }
    fuzz_countdown = 0;
    if (v.merges)
        fuzz_region_check(&memory);
    return 0;
}
