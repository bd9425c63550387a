/* fuzz target: packets of a peer that are merged into super-packets. core: _coalesce.h
 *
 * Oracles: no byte beyond an element or a buffer is touched (guard pages). Every packet that was committed leaves exactly
 * once, those of one flow in their order, each as it came, or as the segment of a super-packet that has its headers, its
 * payload and its place in the sequence. What became part of a super-packet had right checksums, by the definition. Of a
 * packet that changed while it was placed, and was given up for that, nothing remains.
 */
#define FUZZ_PEER
#include "packets_common.h"

#include "_coalesce.h"
#undef memcpy

enum { MOST_PACKETS = 256, MOST_ELEMENT = 1600 };
static fuzz_region element, memory;
static coalescer c;
static struct { uint8_t bytes[MOST_ELEMENT]; uint32_t length, header, upper; uint64_t key; int flow; bool out, good; } sent[MOST_PACKETS];
static uint32_t count, last_out[16], supers, merged;
static bool moved;
static uint32_t room;

static void writer_acts(void) {
    uint16_t at = fuzz_u16();
    moved = true;
    element.theirs[at % (at & 0x8000 ? room : room < 64 ? room : 64)] ^= (uint8_t)(1 | fuzz_u8());
}

static void leaves(uint32_t index, const char *how) {
    EXPECT(index < count && !sent[index].out, "packet %u leaves %s, and has left or was never there", index, how);
    sent[index].out = true;
    if (sent[index].flow >= 0) {
        EXPECT(last_out[sent[index].flow] <= index, "packet %u leaves behind %u of its flow", index, last_out[sent[index].flow]);
        last_out[sent[index].flow] = index;
    }
}
static bool same(const uint8_t *a, const uint8_t *b, uint32_t from, uint32_t to) { return memcmp(a + from, b + from, to - from) == 0; }

/* Whether a super-packet's headers p are those of packet q, which is its segment number k at `done` of its payload. */
static bool is_segment(const uint8_t *p, const uint8_t *q, uint32_t header, uint32_t k, bool last, uint32_t done) {
    bool ip4 = p[0] >> 4 == 4, tcp = p[ip4 ? 9 : 6] == INET_TCP;
    uint32_t u = ip4 ? 20 : 40;
    if (ip4 ? !same(p, q, 0, 2) || !same(p, q, 6, 10) || !same(p, q, 12, 20) : !same(p, q, 0, 4) || !same(p, q, 6, 40))
        return false;
    if (ip4 && net16(q + 4) != (uint16_t)(net16(p + 4) + k) && !((q[6] & 0x40) && net16(q + 4) == net16(p + 4)))
        return false;
    if (!same(p, q, u, u + 4))
        return false;
    return !tcp || (net32(q + u + 4) == net32(p + u + 4) + done && same(p, q, u + 8, u + 13) && same(p, q, u + 14, u + 16) &&
                    same(p, q, u + 18, header) && q[u + 13] == (last ? p[u + 13] : TCP_IS_ACK));
}

static void one(const coalesce_ready *r) {
    const uint8_t *p = r->packet;
    vnet_header v;
    uint32_t at, n, index, k, u, header;
    memcpy(&v, p - sizeof v, sizeof v);
    if (r->segments == 1) {
        static const vnet_header none;
        EXPECT(memcmp(&v, &none, sizeof v) == 0, "a single packet with a vnet_header");
        for (k = 0; k < count; k++) /* the oldest that is the same */
            if (!sent[k].out && sent[k].key == r->key && sent[k].length == r->length && memcmp(sent[k].bytes, p, r->length) == 0)
                break;
        leaves(k, "alone");
        return;
    }
    supers++;
    merged += r->segments - 1;
    header = v.headers;
    u = v.sum_start;
    bool ip4 = p[0] >> 4 == 4, tcp = v.kind != VNET_UDP;
    uint32_t check = u + (tcp ? TCP_CHECK : UDP_CHECK);
    EXPECT(v.flags == VNET_NEEDS_CHECKSUM && v.size != 0 && v.sum_offset == check - u && u == (ip4 ? 20 : 40), "its vnet_header");
    EXPECT(v.kind == (tcp ? ip4 ? VNET_TCP4 : VNET_TCP6 : VNET_UDP) && (c.kinds & (tcp ? ip4 ? COALESCE_TCP4 : COALESCE_TCP6 : COALESCE_UDP)), "its kind");
    EXPECT((ip4 ? net16(p + 2) : net16(p + 4) + 40u) == r->length && r->length <= 65535, "its length");
    EXPECT(!ip4 || right4(p), "its own checksum is wrong");
    EXPECT(folded((ip4 ? words(p + 12, 8) : words(p + 8, 32)) + (tcp ? 6 : 17) + r->length - u) == net16(p + check), "its pseudo-header's sum");
    for (at = header, k = 0; k < r->segments; k++, at += n) {
        EXPECT(at + 2 <= r->length, "segment %u of %u is not there", k, r->segments);
        n = r->length - at < v.size ? r->length - at : v.size;
        EXPECT(k + 1 == r->segments || n == v.size, "a short segment in the middle");
        for (index = 0; index < count; index++) /* the oldest that it can be */
            if (!sent[index].out && sent[index].key == r->key && sent[index].header == header &&
                sent[index].length - header == n && memcmp(sent[index].bytes + header, p + at, n) == 0 &&
                is_segment(p, sent[index].bytes, header, k, k + 1 == r->segments, at - header))
                break;
        EXPECT(index < count, "segment %u of %u in a super-packet of %u bytes is no packet that came", k, r->segments, r->length);
        leaves(index, "in a super-packet");
        EXPECT(sent[index].good, "packet %u had a wrong checksum, and is part of a super-packet", index);
        EXPECT(ip4 || tcp || k + 1 != r->segments || net16(p + u + 4) == r->length - u, "UDP's length");
    }
    EXPECT(at == r->length, "more payload than segments");
}
static void drain(void) {
    const coalesce_ready *r;
    while ((r = coalesce_take(&c)) != NULL)
        one(r);
}

/* Status by the packet's own words; its length. */
static int parsed(const uint8_t *p, uint32_t limit, uint32_t *length) {
    uint32_t version;
    if (limit == 0)
        return COALESCE_FRAME;
    version = p[0] >> 4;
    if (version != 4 && version != 6)
        return COALESCE_NOT_IP;
    if (limit < (version == 4 ? 20u : 40u) || (version == 4 && (p[0] & 15) < 5))
        return COALESCE_FRAME;
    *length = version == 4 ? net16(p + 2) : 40u + net16(p + 4);
    return *length > limit || *length > 65535 || (version == 4 && *length < (p[0] & 15) * 4u) ? COALESCE_FRAME : 0;
}

static void place(const uint8_t *bytes, uint32_t limit, uint64_t key, int flow, bool armed) {
    uint32_t length = 0;
    int status, want;
    if (count == MOST_PACKETS)
        return;
    room = limit;
    uint8_t *e = element.theirs + element.length - limit;
    memcpy(e, bytes, limit);
    want = parsed(bytes, limit, &length);
    moved = false;
    fuzz_region_check(&element);
    uint8_t *real = element.theirs;
    element.theirs = e;
    if (armed)
        fuzz_arm();
    status = coalesce_place(&c, element.ours + element.length - limit, limit, key);
    fuzz_countdown = 0;
    element.theirs = real;
    EXPECT(status != COALESCE_FULL, "full, and all was taken");
    if (moved)
        return; /* not whole: it is given up */
    EXPECT(status == want, "status %d, not %d", status, want);
    if (status != 0)
        return;
    memcpy(sent[count].bytes, bytes, length);
    sent[count].length = length;
    sent[count].key = key;
    sent[count].flow = flow;
    sent[count].out = sent[count].good = false;
    sent[count].upper = bytes[0] >> 4 == 4 ? 20 : 40;
    sent[count].header = 0;
    uint32_t u = sent[count].upper;
    uint8_t protocol = bytes[u == 20 ? 9 : 6];
    if ((u == 40 || bytes[0] == 0x45) && length >= u + 8 && (protocol == 17 || (protocol == 6 && length >= u + 20))) {
        sent[count].header = u + (protocol == 17 ? 8 : (bytes[u + 12] >> 4) * 4u);
        sent[count].good = (u == 40 || right4(bytes)) && upper_sum(bytes, u, length, protocol) == 0xffff;
    }
    count++;
    coalesce_commit(&c);
    drain();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool made;
    static uint8_t bytes[MOST_ELEMENT];
    static const uint16_t payloads[] = {2, 3, 10, 16, 17, 64, 100, 1400};
    uint32_t sequence[8] = {0}, length, changes;
    uint16_t id[8] = {0};
    if (!made) {
        fuzz_region_make(&element, MOST_ELEMENT, PROT_READ);
        fuzz_region_make(&memory, (COALESCE_MEMORY + 7) / 8 * 8, PROT_READ | PROT_WRITE);
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = writer_acts;
    coalesce_init(&c, memory.ours, fuzz_u8() & 7);
    count = supers = merged = 0;
    memset(last_out, 0, sizeof last_out);
    for (int turns = 0; fuzz_left() != 0 && turns < 64; turns++) {
        uint8_t what = fuzz_u8(), kind = fuzz_u8(), flags = fuzz_u8();
        uint64_t key = what >> 3 & 1;
        int flow = (kind & 3) + (what >> 3 & 1) * 4; /* one flow for each kind and key: the ports are the same */
        shape s;
        if ((what & 7) == 7) { /* anything */
            length = fuzz_u8() % 100;
            memset(bytes, 0, sizeof bytes);
            fuzz_bytes(bytes, length);
            place(bytes, length, key, -1, false);
            continue;
        }
        if ((what & 7) == 6) {
            coalesce_flush(&c);
            drain();
            continue;
        }
        int times = (what & 7) == 5 ? 1 + flags % (kind & 64 ? 60 : 4) : 1;
        changes = (what & 7) == 4 ? 1 + (flags & 1) : 0;
        for (; times != 0 && count < MOST_PACKETS; times--) {
            uint32_t payload = payloads[(flags >> 4 & 7)];
            if (changes == 0 && (flags & 128) && times == 1)
                payload = payload > 4 ? payload / 2 : payload;
            length = make_packet(bytes, payload, kind & 15, &s);
            for (uint32_t k = 0; k < payload; k++)
                bytes[s.header + k] = (uint8_t)(count * 3 + k);
            bytes[s.header] = (uint8_t)(count >> 8);
            bytes[s.header + 1] = (uint8_t)count;
            if (s.ip4) {
                put16(bytes + 4, id[flow]);
                if (kind & 16)
                    bytes[6] = 0x40;
                id[flow] = (uint16_t)(id[flow] + (kind >> 5 & 1));
            }
            if (s.tcp) {
                bytes[s.upper + 4] = (uint8_t)(sequence[flow] >> 24);
                bytes[s.upper + 5] = (uint8_t)(sequence[flow] >> 16);
                put16(bytes + s.upper + 6, sequence[flow]);
                sequence[flow] += payload;
                if (flags & 8)
                    bytes[s.upper + 13] |= TCP_PSH;
                if ((flags & 6) == 6)
                    sequence[flow] += 1;
            }
            complete(bytes, length, &s);
            for (uint32_t k = 0; k < changes; k++) { /* then its checksums are wrong, or it is another packet */
                uint8_t at = fuzz_u8();
                bytes[at % (length < 100 ? length : 100)] ^= (uint8_t)(1 << (fuzz_u8() & 7));
                if (flags & 4 && s.upper + 20 <= length && length == (s.ip4 ? net16(bytes + 2) : net16(bytes + 4) + 40u) && bytes[0] == (s.ip4 ? 0x45 : 0x60))
                    complete(bytes, length, &s);
            }
            if (changes != 0)
                flow = -1;
            uint32_t limit = length + (flags & 1) * 8;
            if (limit > MOST_ELEMENT)
                limit = MOST_ELEMENT;
            if (flags & 2 && (flags & 6) != 6)
                limit = length - 1;
            place(bytes, limit, key, flow, kind & 128);
            if (flow < 0)
                break;
        }
    }
    coalesce_flush(&c);
    drain();
    for (uint32_t k = 0; k < count; k++)
        EXPECT(sent[k].out, "packet %u was swallowed", k);
    EXPECT(c.spare == COALESCE_BUFFERS, "%u of %u buffers are back", c.spare, COALESCE_BUFFERS);
    EXPECT(c.supers == supers && c.merged == merged, "counted are %llu supers and %llu merged, there were %u and %u",
           (unsigned long long)c.supers, (unsigned long long)c.merged, supers, merged);
    fuzz_region_check(&memory);
    return 0;
}
