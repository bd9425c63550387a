/* fuzz target: a region of path MTUs, and the bell's advice, under a sender that goes by both. core: _net, on _ring
 *
 * The device is the target's; the words of the region and of the bell change at any turn. Oracles: no word outside the region is
 * read, and none written (guard pages, a read-only mapping). What goes out is a packet that was read: whole, where it fits into
 * one of the limits that its mark had meanwhile; as fragments none of which is longer than the largest of these, and which come
 * together to it, by one limit; or not at all, and in one counter. Who is told of a limit is told of one that there was, once a
 * packet, in a packet that is right. A reader that claims not to go on is waited for 300 ms at most, and overrun only where it
 * says nothing sensible, or nothing new for so long.
 */
#define FUZZ_PEER
#define FUZZ_CLOCK
#include "packets_common.h"

#include <poll.h>
static ssize_t device_gives(int fd, const struct iovec *parts, int n);
static ssize_t device_told(int fd, const void *data, size_t n);
static int waits(struct pollfd *list, unsigned long n, const struct timespec *t);
#define readv(fd, parts, n) device_gives((fd), (parts), (n))
#define write(fd, data, n) device_told((fd), (data), (n))
#define read(fd, data, n) ((ssize_t)(n))
#define ppoll(list, n, t, mask) waits((list), (n), (t))
#include CORE_SOURCE
#undef read
#undef write
#undef readv
#undef ppoll
#undef memcpy

enum { MARKS = 4, MTU = 1500, SIZE = MTU + 8, ELEMENTS = 12, MOST = 1 << 12, PROTOCOL = 2, QUEUED = 24, VALUES = 64, OUT = 400, FD = 101, STUCK = 300000000 };
static fuzz_region region, page, table, private;
static T_sender_t s;
static T_port_t ports[1];
static uint32_t count, turn, used[ELEMENTS];
static T_loan_t loan;
static bell_page *bell;
static struct packet { uint32_t length, mark; bool over; uint8_t bytes[MTU]; uint32_t limits[VALUES], nlimits, news; } queue[QUEUED];
static uint32_t nqueue, at;        /* at: the next one that is read */
static uint32_t cut, cut_most, last; /* of packet `last`: payload that went out in fragments, and the longest of these */
static uint64_t advised;             /* when the reader's words changed last */
static bool stirred, jumped, wild;   /* the peer acted since the last round; it moved the clock; its advice went back */

static uint32_t limit_of(uint32_t word, uint8_t first) { /* by docs/protocol.md */
    return word == 0 ? 0 : first >> 4 == 4 ? word < 68 ? 68 : word : word < 1280 ? 1280 : word;
}
static void now_is_limit(uint32_t mark, uint32_t value) {
    for (uint32_t k = at == 0 ? 0 : at - 1; k < at; k++)
        if (queue[k].mark == mark && queue[k].nlimits < VALUES)
            queue[k].limits[queue[k].nlimits++] = value;
}
static void peer_acts(void) {
    static const uint32_t values[] = {0, 1, 67, 68, 69, 576, 1279, 1280, 1281, 1499, 1500, 1501, 65535, UINT32_MAX, 76, 1000};
    uint8_t what = fuzz_u8(), more = fuzz_u8();
    uint32_t was_armed = fuzz_countdown, mark, value;
    uint64_t v;
    fuzz_countdown = 0;
    uint64_t epoch = bell->reader_epoch, rc = bell->reader_rc;
    stirred = true;
    switch (what % 6) {
    default:
        mark = 1 + more % MARKS;
        value = more & 128 ? fuzz_u16() % 1600 : values[more >> 3 & 15];
        ((uint32_t *)table.theirs)[mark - 1] = value;
        now_is_limit(mark, value);
        break;
    case 3: /* advice that is one */
        bell->reader_epoch = s.w.epoch;
        bell->reader_rc = s.w.wc - more % (ELEMENTS + 2);
        break;
    case 4:
        v = fuzz_odd();
        memcpy((uint8_t *)bell + more % 16 * 8, &v, 8);
        break;
    case 5:
        fuzz_now += (uint64_t)more * 1000000;
        jumped = true;
    }
    if (bell->reader_epoch != epoch || bell->reader_rc != rc) {
        advised = fuzz_now;
        wild = wild || bell->reader_epoch != s.w.epoch || (epoch == s.w.epoch && bell->reader_rc - rc > ELEMENTS) || s.w.wc - bell->reader_rc > ELEMENTS;
    }
    fuzz_countdown = was_armed;
}

/* ---- the device */
static ssize_t device_gives(int fd, const struct iovec *parts, int n) {
    EXPECT(fd == FD - 1, "descriptor %d is read", fd);
    if (at == nqueue) {
        errno = EAGAIN;
        return -1;
    }
    struct packet *p = &queue[at++];
    uint8_t all[8 + MTU + 64];
    uint32_t length = p->length, done = 0;
    uint64_t limit = p->mark >= 1 && p->mark <= MARKS ? ((uint32_t *)table.theirs)[p->mark - 1] : 0;
    p->limits[0] = (uint32_t)limit;
    p->nlimits = 1;
    memcpy(all, &p->mark, 4); /* net_hdr, as the kernel's program puts it there */
    memset(all + 4, 0, 4);
    memcpy(all + 8, p->bytes, length);
    length += 8;
    for (int k = 0; k < n; k++) {
        uint32_t m = (uint32_t)parts[k].iov_len < length - done ? (uint32_t)parts[k].iov_len : length - done;
        memcpy(parts[k].iov_base, all + done, m);
        done += m;
    }
    return done;
}
static bool had(const struct packet *p, uint32_t limit) {
    for (uint32_t k = 0; k < p->nlimits; k++)
        if (limit_of(p->limits[k], p->bytes[0]) == limit)
            return true;
    return false;
}
static ssize_t device_told(int fd, const void *data, size_t n) {
    const uint8_t *q = data;
    if (fd != FD - 1) /* somebody is woken */
        return (ssize_t)n;
    EXPECT(at != 0, "news of nothing");
    struct packet *p = &queue[at - 1];
    bool ip4 = p->bytes[0] >> 4 == 4;
    uint32_t h = ip4 ? 20 : 40;
    p->news++;
    EXPECT(p->news == 1, "%u news of one packet", p->news);
    EXPECT(n >= h + 8 && n <= (ip4 ? 576u : 1280u) && n - h - 8 <= p->length && memcmp(q + h + 8, p->bytes, n - h - 8) == 0, "%zu bytes of news quote another packet", n);
    EXPECT(q[0] >> 4 == p->bytes[0] >> 4 && (ip4 ? net16(q + 2) : 40u + net16(q + 4)) == n, "news of another length");
    EXPECT(ip4 ? right4(q) && folded(words(q + 20, n - 20)) == 0xffff : upper_sum(q, 40, (uint32_t)n, INET_ICMP6) == 0xffff, "news with a wrong checksum");
    EXPECT(had(p, ip4 ? net16(q + h + 6) : net32(q + h + 4)), "news of a limit of %u, which there never was", ip4 ? net16(q + h + 6) : net32(q + h + 4));
    EXPECT(!ip4 || p->bytes[6] & 0x40, "news of what may be fragmented");
    return (ssize_t)n;
}
static int waits(struct pollfd *list, unsigned long n, const struct timespec *t) {
    uint64_t ns = (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec;
    fuzz_now += ns < 5000000 ? ns + 5000000 : ns; /* a sleep may take longer */
    fuzz_turn();
    return 0;
}

/* ---- what went out */
FUZZ_QUIET static void element(const uint8_t *e) {
    uint32_t mark, n, header;
    const uint8_t *q = e + 8;
    memcpy(&mark, e, 4);
    EXPECT(at != 0, "an element of nothing");
    n = q[0] >> 4 == 4 ? net16(q + 2) : 40u + net16(q + 4);
    EXPECT(n <= MTU && (e[4] | e[5] << 8) >= (int)n && e[6] == (q[0] >> 4 == 4 ? 4 : 41), "net_hdr of a packet of %u", n);
    for (uint32_t k = last; k < at; k++) { /* those of a round are looked at together */
        struct packet *p = &queue[k];
        uint32_t own = p->bytes[0] >> 4 == 4 ? net16(p->bytes + 2) : 40u + net16(p->bytes + 4), most = 0;
        bool unlimited = p->mark == 0 || p->mark > MARKS;
        if (p->over || p->mark != mark)
            continue;
        for (uint32_t j = 0; j < p->nlimits; j++) {
            uint32_t limit = limit_of(p->limits[j], p->bytes[0]);
            unlimited = unlimited || limit == 0;
            most = limit > most ? limit : most;
        }
        if (n == own && memcmp(q, p->bytes, own) == 0) {
            EXPECT(unlimited || p->length <= most, "a packet of %u bytes goes out, the limit was %u", p->length, most);
            EXPECT(cut == 0, "a packet amid the fragments of another one");
            p->over = true;
            last = k;
            return;
        }
        header = (p->bytes[0] & 15) * 4u;
        if (p->bytes[0] >> 4 != 4 || p->bytes[6] & 0x40 || q[0] != p->bytes[0] || n <= header)
            continue;
        uint32_t offset = ((uint32_t)net16(q + 6) & 0x1fff) * 8 - ((uint32_t)net16(p->bytes + 6) & 0x1fff) * 8;
        if (offset != (k == last ? cut : 0) || offset + n - header > p->length - header || memcmp(q + header, p->bytes + header + offset, n - header) != 0 ||
            net16(q + 4) != net16(p->bytes + 4))
            continue;
        bool end = offset + n - header == p->length - header;
        EXPECT(right4(q), "a fragment's checksum");
        EXPECT(n <= most, "a fragment of %u bytes, the limit was %u", n, most);
        EXPECT(((q[6] & 0x20) != 0) == (!end || (p->bytes[6] & 0x20)), "more fragments");
        EXPECT(cut == 0 || n <= cut_most + (end ? 7 : 0), "fragments of one packet by two limits");
        if (cut == 0) {
            cut_most = n;
            bool is = false; /* as long as one of the limits lets it be */
            for (uint32_t j = 0; j < p->nlimits; j++) {
                uint32_t limit = limit_of(p->limits[j], p->bytes[0]);
                is = is || (limit != 0 && limit < p->length && n == header + ((limit - header) & ~7u)) || (end && n <= limit);
            }
            EXPECT(is, "a first fragment of %u bytes, by none of the limits", n);
        }
        cut += n - header;
        last = k;
        if (end) {
            p->over = true;
            cut = 0;
        }
        return;
    }
    fuzz_fail("an element of %u bytes with mark %u that no packet became", n, mark);
}

static void give(uint8_t what) {
    uint8_t more = fuzz_u8();
    shape sh;
    if (nqueue == QUEUED)
        return;
    struct packet *p = &queue[nqueue];
    uint32_t payload = 8 + (uint32_t)(more >> 2 & 15) * 90;
    memset(p, 0, offsetof(struct packet, bytes));
    p->nlimits = p->news = 0;
    p->mark = more & 3;
    if (what & 16)
        p->mark = fuzz_u8() % (MARKS + 3);
    if (payload > 1400)
        payload = 1400;
    p->length = make_packet(p->bytes, payload, what & 3, &sh);
    spell(p->bytes + sh.header, payload, nqueue * 5 + 1);
    if (sh.ip4) {
        put16(p->bytes + 4, 1000 + nqueue);
        if (more & 64)
            p->bytes[6] = 0x40;
        else if (more & 128)
            put16(p->bytes + 6, 0x2000 | (what >> 2 & 3));
    }
    complete(p->bytes, p->length, &sh);
    nqueue++;
}

static void (*publish)(T_writer_t *, uint64_t);
static uint8_t *(*slot_of)(const T_writer_t *, uint64_t);
static void published(T_writer_t *w, uint64_t n) {
    uint64_t taken = w->wc - bell->reader_rc;
    for (uint64_t k = 0; k < n; k++)
        element(slot_of(w, k));
    EXPECT(n != 0 && n <= ELEMENTS, "a round of %llu", (unsigned long long)n);
    if (w->bell != NULL && s.pressed && !stirred && !wild && bell->reader_epoch == w->epoch && taken <= w->elements)
        EXPECT(taken + n <= w->elements || fuzz_now - advised >= STUCK, "a reader that took nothing for %llu ns is overrun", (unsigned long long)(fuzz_now - advised));
    stirred = false;
    publish(w, n);
}
static void pumps(uint64_t ns) {
    uint64_t start = fuzz_now;
    jumped = false;
    enum __pyx_t_8muenfast_4_net_sender_event event = F_sender_loop(&s, ns);
    EXPECT(event == E_SENDER_TICK || event == E_SENDER_UP || event == E_SENDER_DOWN, "event %d", event);
    EXPECT(jumped || fuzz_now - start <= ns + 2 * STUCK, "%llu ns, not %llu", (unsigned long long)(fuzz_now - start), (unsigned long long)ns);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool made;
    if (!made) {
        CORE_CONSTANTS
        CORE_BINDINGS
        publish = F_writer_publish;
        slot_of = F_writer_slot;
        F_writer_publish = published;
        fuzz_region_make(&region, 64 + ELEMENTS * SIZE, PROT_READ | PROT_WRITE);
        fuzz_region_make(&page, sizeof(bell_page), PROT_READ | PROT_WRITE);
        fuzz_region_make(&table, MARKS * sizeof(uint32_t), PROT_READ);
        fuzz_region_make(&private, 4 * E_SPILL, PROT_READ | PROT_WRITE);
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = peer_acts;
    uint8_t kind = fuzz_u8();
    fuzz_region_size(&table, MARKS * sizeof(uint32_t));
    fuzz_region_size(&page, sizeof(bell_page));
    bell = (bell_page *)page.theirs;
    bell->magic = BELL_MAGIC;
    memset(&s, 0, sizeof s);
    memset(ports, 0, sizeof ports);
    memset(used, 0, sizeof used);
    ports[0].fd = FD;
    ports[0].way = E_PORT_FRONT;
    count = 1;
    s.ports = ports;
    s.count = &count;
    s.turn = &turn;
    s.wake = 55;
    s.loan = &loan;
    loan.taken = 1;
    s.kind = FRAME_NET;
    s.size = SIZE;
    s.pressed = kind >> 1 & 1;
    s.spill = private.ours + E_SPILL;
    s.piece = s.spill + E_SPILL;
    s.news = s.piece + E_SPILL;
    s.paths = (const uint32_t *)table.ours;
    s.marks = MARKS;
    s.used = used;
    s.room = region.length - 64;
    F_writer_init(&s.w, region.ours, region.length, SIZE, PROTOCOL);
    static const uint32_t never;
    s.w.broken = &never;
    s.w.bell = kind & 1 ? (bell_page *)page.ours : NULL;
    s.batch = 1 + (kind >> 2 & 3) * 2;
    s.link = 1;
    nqueue = at = last = cut = 0;
    advised = 0;
    stirred = true;
    wild = false;
    for (int turns = 0; fuzz_left() != 0 && turns < 80; turns++) {
        uint8_t what = fuzz_u8();
        if (what < 100)
            give(what);
        else if (what < 150)
            peer_acts();
        else if (what < 220)
            pumps(100000 * (uint64_t)(what - 149));
        else
            fuzz_arm();
        fuzz_region_check(&page);
        fuzz_region_check(&table);
    }
    fuzz_countdown = 0;
    for (uint8_t rest[256]; fuzz_left() != 0;) /* nobody acts any more, and who stands still is waited for no longer */
        fuzz_bytes(rest, sizeof rest);
    uint64_t end = fuzz_now + STUCK + 200000000;
    while ((at != nqueue || s.left != 0 || s.cut.left != 0) && fuzz_now < end)
        pumps(20000000);
    EXPECT(at == nqueue && s.left == 0 && s.cut.left == 0, "%u packets wait for nobody", nqueue - at);
    uint64_t none = 0, whole = s.n.packets - s.n.fragments;
    for (uint32_t k = 0; k < nqueue; k++) {
        struct packet *p = &queue[k];
        bool may = false;
        for (uint32_t j = 0; j < p->nlimits && !p->over; j++) {
            uint32_t limit = limit_of(p->limits[j], p->bytes[0]);
            may = may || (limit != 0 && p->length > limit && (p->bytes[0] >> 4 == 6 || p->bytes[6] & 0x40));
        }
        EXPECT(p->over || may, "packet %u of %u bytes went nowhere, and no limit says so", k, p->length);
        none += !p->over;
    }
    EXPECT(s.n.too_big == none && whole + s.n.fragmented + none == nqueue, "of %u packets %llu went out, %llu in fragments, %llu did not; %llu are counted",
           nqueue, (unsigned long long)whole, (unsigned long long)s.n.fragmented, (unsigned long long)none, (unsigned long long)s.n.too_big);
    EXPECT(s.n.oversize + s.n.not_ip + s.n.malformed + s.n.no_peer == 0, "what is right is dropped");
    return 0;
}
