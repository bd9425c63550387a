/* Rows: packets between a device and a ring, framed as they are (raw: an element is a packet) and as muennet does
 * (net_hdr). core: _net
 *
 * In the kernel's place, which is not counted, readv() and write() are this file's: a device that has a packet, and then
 * none. "send" and "receive" are the loops that handle packets one by one (no offloads); "split" and "merge" make segments of a
 * super-packet of TCP, and one of them again.
 */
#include "cost.h"

#include CORE_SOURCE

enum { SLOTS = 256, MTU = 1522, DEVICE = 5, SEGMENTS = 16, HEADERS = 52, SEGMENT = 1448 };
enum { SUPER = HEADERS + SEGMENTS * SEGMENT };
static T_sender_t s;
static T_receiver_t v;
static T_writer_t w;
static T_reader_t r;
static T_port_t ports[1];
static T_loan_t loan;
static mark_table_t marks;
static uint32_t child, count = 1, turn, nobody;
static bell_page *bell;
static uint8_t *region, *spill, *stage, *memory, *segments, packet[SUPER], last[SUPER];
static vnet_header vnet;   /* of a super-packet; all zero: of none */
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
        size_t first = parts[n - 2].iov_len < length ? parts[n - 2].iov_len : length;
        has--;
        if (kind == FRAME_RAW)
            memset(parts[0].iov_base, 0, parts[0].iov_len);
        else if (s.offload)
            memcpy(parts[0].iov_base, &vnet, sizeof vnet);
        memcpy(parts[n - 2].iov_base, packet, first);
        memcpy(parts[n - 1].iov_base, packet + first, length - first);
        got = (ssize_t)length + (n > 2 ? (ssize_t)parts[0].iov_len : 0);
    } else
        errno = EAGAIN;
    cost_go_on(was);
    return got;
}
ssize_t write(int fd, const void *data, size_t n) {
    bool was = cost_pause();
    size_t before = kind == FRAME_RAW ? 4 : v.offload ? sizeof vnet : 0, most = kind == FRAME_RAW ? MTU : length;
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
    s.offload = v.offload = v.merges = vnet.kind != VNET_NONE;
    coalesce_init(&v.c, memory, COALESCE_ALL);
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
        EXPECT(frame_put(kind, F_writer_slot(&w, k), s.size, packet, length, frame_room(kind, s.size), 0) == 0,
               "no packet");
    F_writer_publish(&w, n);
    took = 0;
    cost_on();
    while (v.r.rc != w.wc && F_receiver_loop(&v, 0) == E_RECEIVER_TICK) {
    }
    cost_off();
    EXPECT(took == n && memcmp(last, packet, length) == 0, "of %u packets %u were received", n, took);
}

/* A super-packet of the kernel's, of TCP over IPv4 with timestamps, its checksum begun. */
static void make_super(void) {
    uint16_t sum;
    length = SUPER;
    vnet = (vnet_header){VNET_NEEDS_CHECKSUM, VNET_TCP4, HEADERS, SEGMENT, IP4_SIZE, TCP_CHECK};
    make();
    for (uint32_t k = HEADERS; k < SUPER; k++)
        packet[k] = (uint8_t)(k * 2654435761u >> 16);
    memset(packet, 0, HEADERS);
    packet[0] = 0x45;
    put_net16(packet + IP4_LENGTH, SUPER);
    put_net16(packet + IP4_FRAGMENT, IP4_DF);
    packet[IP4_TTL] = 64;
    packet[IP4_PROTOCOL] = INET_TCP;
    put_net32(packet + IP4_SOURCE, 0x0a000001);
    put_net32(packet + IP4_TARGET, 0x0a000002);
    packet[IP4_SIZE + TCP_OFFSET] = 0x80;
    packet[IP4_SIZE + TCP_FLAGS] = TCP_IS_ACK;
    sum = sum_fold(sum_pseudo4(packet, INET_TCP, SUPER - IP4_SIZE));
    memcpy(packet + IP4_SIZE + TCP_CHECK, &sum, sizeof sum);
}
/* One super-packet; its elements stay in `segments`. */
static void split_some(unsigned n) {
    uint64_t found, taken = 0;
    has = 1;
    cost_on();
    F_sender_loop(&s, 0);
    cost_off();
    while (F_reader_peek(&r, &found) == E_SUCCESS) {
        for (uint64_t k = 0; k < found && taken + k < n; k++)
            memcpy(segments + (taken + k) * s.size, F_reader_slot(&r, k), s.size);
        F_reader_advance(&r, found);
        taken += found;
    }
    EXPECT(taken == n, "a super-packet of %u segments became %u", n, (unsigned)taken);
    for (unsigned k = 0; k < n; k++)
        EXPECT(memcmp(segments + k * s.size + sizeof(net_hdr) + HEADERS, packet + HEADERS + k * SEGMENT, SEGMENT) == 0,
               "segment %u is another one", k);
}
static void merge_some(unsigned n) {
    F_writer_reserve(&w, n);
    for (unsigned k = 0; k < n; k++)
        memcpy(F_writer_slot(&w, k), segments + k * s.size, s.size);
    F_writer_publish(&w, n);
    took = 0;
    cost_on();
    while (v.r.rc != w.wc && F_receiver_loop(&v, 0) == E_RECEIVER_TICK) {
    }
    cost_off();
    EXPECT(took == 1 && memcmp(last + HEADERS, packet + HEADERS, SUPER - HEADERS) == 0, "%u segments became %u packets", n,
           took);
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
    memory = cost_memory(COALESCE_MEMORY);
    segments = cost_memory(SEGMENTS * 2048);
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
    make_super();
    cost_row(split_some, SEGMENTS, "packet net_hdr %u B, split", HEADERS + SEGMENT);
    make_super();
    cost_row(merge_some, SEGMENTS, "packet net_hdr %u B, merge", HEADERS + SEGMENT);
    return 0;
}
