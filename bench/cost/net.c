/* Rows: packets between a device and a ring, framed as they are (raw: an element is a packet) and as muennet does (net_hdr).
 * core: _net
 *
 * In the kernel's place, which is not counted, readv() and write() are this file's: a device that has a packet, and then none.
 * No offloads: these are the loops that handle packets one by one.
 */
#include "cost.h"

#include CORE_SOURCE

enum { SLOTS = 256, MTU = 1522, DEVICE = 5 };
static T_sender_t s;
static T_receiver_t v;
static T_writer_t w;
static T_reader_t r;
static T_port_t ports[1];
static T_loan_t loan;
static mark_table_t marks;
static uint32_t child, count = 1, turn, nobody;
static bell_page *bell;
static uint8_t *region, *spill, *stage, packet[MTU], last[2048];
static uint32_t *used;
static uint32_t length;    /* of a packet */
static unsigned has, took; /* packets that the device has, and has taken */
static int kind;
static void (*reader_init)(T_reader_t *, const uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_init)(T_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t);

/* ---- the device: struct tun_pi before each packet where it is raw */
ssize_t readv(int fd, const struct iovec *parts, int n) {
    bool was = cost_pause();
    ssize_t got = -1;
    EXPECT(fd == DEVICE && n >= 2, "not the device");
    if (has != 0) {
        has--;
        if (kind == FRAME_RAW)
            memset(parts[0].iov_base, 0, parts[0].iov_len);
        EXPECT(parts[n - 2].iov_len >= length, "no room");
        memcpy(parts[n - 2].iov_base, packet, length);
        got = (ssize_t)length + (kind == FRAME_RAW ? (ssize_t)parts[0].iov_len : 0);
    } else
        errno = EAGAIN;
    cost_go_on(was);
    return got;
}
ssize_t write(int fd, const void *data, size_t n) {
    bool was = cost_pause();
    size_t before = kind == FRAME_RAW ? 4 : 0, most = kind == FRAME_RAW ? MTU : length;
    if (fd != DEVICE) /* standard output */
        return writev(fd, &(struct iovec){(void *)(uintptr_t)data, n}, 1);
    EXPECT(n == before + most, "a packet of %zu bytes", n);
    memcpy(last, (const uint8_t *)data + before, most);
    took++;
    cost_go_on(was);
    return (ssize_t)n;
}

static void make(void) {
    uint64_t n, size = frame_size(kind, MTU);
    memset(region, 0, 64);
    memset(bell, 0, sizeof *bell);
    memset(packet, 0x5a, sizeof packet);
    memset(packet, 0, 20);
    packet[0] = 0x45;
    packet[2] = (uint8_t)(length >> 8);
    packet[3] = (uint8_t)length;
    memset(ports, 0, sizeof ports);
    ports[0].fd = DEVICE + 1;
    writer_init(&w, region, 64 + SLOTS * size, size, 1);
    reader_init(&r, region, 64 + SLOTS * size, size, 1);
    w.bell = r.bell = bell;
    F_writer_start(&w, 7);
    EXPECT(F_reader_peek(&r, &n) == E_EPOCH_CHANGED, "not synchronised");

    memset(&s, 0, sizeof s);
    memset(used, 0, SLOTS * sizeof *used);
    s.ports = ports;
    s.count = &count;
    s.turn = &turn;
    s.loan = &loan;
    s.kind = kind;
    s.size = (uint32_t)size;
    s.pressed = 1;
    s.spill = spill;
    s.used = used;
    s.link = s.linked = 1;
    s.w = w;
    s.w.broken = &nobody;
    s.batch = F_batch_of(size);
    loan.taken = 1; /* the sender works */

    memset(&v, 0, sizeof v);
    v.ports = ports;
    v.marks = &marks;
    marks.child = &child;
    v.loan = &loan;
    v.kind = kind;
    v.size = (uint32_t)size;
    v.batch = F_batch_of(size);
    v.stride = (E_HEADROOM + size + 63) & ~UINT64_C(63);
    v.stage = stage;
    v.joined = 1;
    reader_init(&v.r, region, 64 + SLOTS * size, size, 1);
    v.r.broken = &nobody;
    v.r.bell = bell;
    EXPECT(F_receiver_loop(&v, 0) == E_RECEIVER_CONNECTED, "not connected");
}

static void send_some(unsigned n) {
    uint64_t found;
    uint8_t got[2048];
    uint32_t mark;
    unsigned taken = 0;
    has = n;
    cost_on();
    F_sender_loop(&s, 0);
    cost_off();
    while (F_reader_peek(&r, &found) == E_SUCCESS) {
        EXPECT(frame_take(kind, got, F_reader_slot(&r, found - 1), s.size, &mark) >= (int32_t)length, "no packet");
        EXPECT(memcmp(got + frame_start(kind), packet, length) == 0, "another packet");
        F_reader_advance(&r, found);
        taken += (unsigned)found;
    }
    EXPECT(has == 0 && taken == n, "of %u packets %u were sent", n, taken);
}
static void receive_some(unsigned n) {
    F_writer_reserve(&w, n);
    for (unsigned k = 0; k < n; k++)
        EXPECT(frame_put(kind, F_writer_slot(&w, k), s.size, packet, length, frame_room(kind, s.size), 0) == 0, "no packet");
    F_writer_publish(&w, n);
    took = 0;
    cost_on();
    while (v.r.rc != w.wc && F_receiver_loop(&v, 0) == E_RECEIVER_TICK) {
    }
    cost_off();
    EXPECT(took == n && memcmp(last, packet, length) == 0, "of %u packets %u were received", n, took);
}

int main(void) {
    static const unsigned lengths[] = {64, MTU}, batches[] = {1, 8, COST_BATCH};
    static const char *const framings[] = {"raw", "net_hdr"};
    CORE_CONSTANTS
    CORE_BINDINGS
    *(void **)&reader_init = ring_function("reader_init");
    *(void **)&writer_init = ring_function("writer_init");
    region = cost_memory(64 + SLOTS * 2048);
    stage = cost_memory(E_BATCH * 2048);
    spill = (uint8_t *)cost_memory(2 * E_SPILL) + E_SPILL;
    used = cost_memory(SLOTS * sizeof *used);
    bell = cost_memory(sizeof *bell);
    for (int f = 0; f < 2; f++)
        for (int k = 0; k < 2; k++)
            for (int b = 0; b < 3; b++) {
                kind = f;
                length = lengths[k];
                make();
                cost_row(send_some, batches[b], "packet %s %u B, send", framings[f], length);
                make();
                cost_row(receive_some, batches[b], "packet %s %u B, receive", framings[f], length);
            }
    return 0;
}
