/* fuzz target: super-packets split into segments, and longer packets for their path. core: _segment.h, _pmtu.h
 *
 * Oracles: no byte is read beyond the packet or written beyond the MTU (guard pages). Segments are at most the MTU, their
 * payloads one after the other are the super-packet's, their lengths, sequence numbers, identifications and flags those of
 * RFC 9293 and 791, their checksums right by the definition (a sum of ours). Fragments come together to the packet; news
 * quote it and have right checksums.
 */
#include "packets_common.h"

#include "_pmtu.h"
#include "_segment.h"

enum { MOST = 8192 };
static fuzz_region in, out;

static void split(const uint8_t *packet, uint32_t length, const vnet_header *v, uint32_t mtu) {
    static segmenter s;
    static uint8_t whole[MOST];
    uint8_t kind = v->kind & (uint8_t)~(VNET_ECN | VNET_ACCECN);
    int count = segment_begin(&s, v, packet, length, mtu);
    uint32_t done = 0, upper, header, n, at;
    if (count < 0) {
        EXPECT(count >= SEGMENT_EMPTY, "status %d", count);
        return;
    }
    EXPECT(count > 0 && (uint32_t)count == s.left, "%d segments", count);
    EXPECT(segment_longest(&s) <= mtu, "the longest segment has %u bytes of %u", segment_longest(&s), mtu);
    EXPECT(kind != VNET_NONE || count == 1, "a packet without a kind is split");
    for (int k = 0; k < count; k++) {
        uint8_t *to = out.ours + out.length - mtu; /* no byte more */
        memset(to, 0xcc, mtu);
        n = segment_next(&s, to);
        EXPECT(n <= mtu && n != 0, "a segment of %u bytes, the MTU is %u", n, mtu);
        for (at = n; at < mtu && at < n + 64; at++)
            EXPECT(to[at] == 0xcc, "byte %u behind a segment of %u was written", at, n);
        EXPECT(to[0] == packet[0], "another version");
        if (kind == VNET_NONE) {
            EXPECT(n == length, "a packet of %u became one of %u", length, n);
            if (!(v->flags & VNET_NEEDS_CHECKSUM))
                EXPECT(memcmp(to, packet, n) == 0, "a packet that needs nothing was changed");
            else {
                uint32_t check = v->sum_start + v->sum_offset;
                for (at = 0; at < n; at++)
                    EXPECT(at == check || at == check + 1 || to[at] == packet[at], "byte %u was changed", at);
                uint16_t field = (uint16_t)~folded(words(packet + v->sum_start, length - v->sum_start)), got = (uint16_t)(to[check] << 8 | to[check + 1]);
                EXPECT(got == field || (got == 0xffff && field == 0), "checksum %04x, not %04x", got, field);
            }
            continue;
        }
        upper = v->sum_start;
        header = upper + (kind == VNET_UDP ? UDP_SIZE : (packet[upper + TCP_OFFSET] >> 4) * 4u);
        EXPECT(n > header, "a segment without payload");
        memcpy(whole + done, to + header, n - header);
        if (s.ip4) {
            EXPECT((uint32_t)(to[2] << 8 | to[3]) == n, "IPv4's length %u of %u", to[2] << 8 | to[3], n);
            EXPECT(right4(to), "IPv4's checksum is wrong");
            EXPECT((uint16_t)((to[4] << 8 | to[5]) - (packet[4] << 8 | packet[5])) == k, "the identification does not count");
        } else
            EXPECT((uint32_t)(to[4] << 8 | to[5]) + 40 == n, "IPv6's length");
        /* The pseudo-header's sum stands where the checksum comes, with the super-packet's length: what stays of it. */
        uint32_t check = upper + v->sum_offset;
        uint32_t sum = (uint32_t)(packet[check] << 8 | packet[check + 1]) + (uint16_t)~(length - upper) + (n - upper);
        uint32_t body = words(to + upper, n - upper);
        EXPECT(folded(sum + body) == 0xffff, "segment %d of %d: its checksum is wrong", k, count);
        if (kind == VNET_UDP)
            EXPECT((uint32_t)(to[upper + 4] << 8 | to[upper + 5]) == n - upper && (to[check] | to[check + 1]) != 0, "UDP's length");
        else {
            uint8_t flags = packet[upper + TCP_FLAGS];
            EXPECT(net32(to + upper + TCP_SEQUENCE) == net32(packet + upper + TCP_SEQUENCE) + done, "the sequence number");
            if (k + 1 != count)
                flags &= (uint8_t)~(TCP_FIN | TCP_PSH);
            if (k != 0 && !(v->kind & VNET_ACCECN))
                flags &= (uint8_t)~TCP_CWR;
            EXPECT(to[upper + TCP_FLAGS] == flags, "flags %02x of segment %d, not %02x", to[upper + TCP_FLAGS], k, flags);
        }
        done += n - header;
    }
    EXPECT(s.left == 0, "segments are left");
    if (kind != VNET_NONE) {
        EXPECT(done == length - header, "%u bytes of payload of %u", done, length - header);
        EXPECT(memcmp(whole, packet + header, done) == 0, "another payload");
    }
}

static void path(const uint8_t *packet, uint32_t length, uint32_t entry) {
    static uint8_t whole[MOST], news[PMTU_NEWS_MOST];
    uint32_t limit = length == 0 ? 0 : pmtu_of(entry, packet[0]), n, header, done = 0;
    enum pmtu_verdict verdict;
    if (length == 0)
        return;
    EXPECT(limit == 0 || limit >= (packet[0] >> 4 == 4 ? 68u : 1280u), "a limit of %u", limit);
    verdict = pmtu_look(packet, length, limit);
    EXPECT(verdict != PMTU_FITS || limit == 0 || length <= limit, "%u bytes fit into %u", length, limit);
    if (verdict == PMTU_FRAGMENTS) {
        pmtu_fragments f;
        uint32_t count = pmtu_fragments_begin(&f, packet, length, limit), own = (packet[6] << 8 | packet[7]) & 0x1fff;
        header = (packet[0] & 15) * 4u;
        for (uint32_t k = 0; k < count; k++) {
            uint8_t *to = out.ours + out.length - limit % 8192;
            if (limit > MOST - 64)
                return;
            n = pmtu_fragments_next(&f, to);
            EXPECT(n <= limit && n > header && (uint32_t)(to[2] << 8 | to[3]) == n, "a fragment of %u bytes", n);
            EXPECT(right4(to) && to[0] == packet[0], "a fragment's header");
            EXPECT(((uint32_t)(to[6] << 8 | to[7]) & 0x1fff) == own + done / 8, "a fragment's offset");
            EXPECT(((to[6] & 0x20) != 0) == (k + 1 != count || (packet[6] & 0x20) != 0), "more fragments");
            EXPECT(k + 1 == count || (n - header) % 8 == 0, "a fragment of %u bytes", n);
            memcpy(whole + done, to + header, n - header);
            done += n - header;
        }
        EXPECT(done == length - header && memcmp(whole, packet + header, done) == 0, "fragments that are not the packet");
    } else if (verdict == PMTU_NEWS) {
        n = pmtu_news(packet, length, limit, news);
        EXPECT(n <= (packet[0] >> 4 == 4 ? 576u : 1280u), "news of %u bytes", n);
        header = packet[0] >> 4 == 4 ? 20 : 40;
        EXPECT(memcmp(news + header + 8, packet, n - header - 8) == 0, "news quote another packet");
        if (header == 20)
            EXPECT(right4(news) && folded(words(news + 20, n - 20)) == 0xffff, "news with a wrong checksum");
        else
            EXPECT(upper_sum(news, 40, n, INET_ICMP6) == 0xffff, "news with a wrong checksum");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool made;
    vnet_header v = {0};
    shape s;
    uint32_t length, mtu, payload;
    uint8_t *p, what, kind;
    if (!made) {
        fuzz_region_make(&in, MOST, PROT_READ | PROT_WRITE);
        fuzz_region_make(&out, MOST, PROT_READ | PROT_WRITE);
        made = true;
    }
    fuzz_begin(data, size);
    what = fuzz_u8();
    kind = fuzz_u8();
    mtu = 68 + fuzz_u16() % 2000;
    if (what & 1) { /* anything */
        length = (uint32_t)fuzz_left() < 14 ? 0 : (uint32_t)fuzz_left() - 12;
        length = length < MOST ? length : MOST;
        fuzz_bytes(&v, sizeof v);
        p = in.ours + in.length - length;
        length = (uint32_t)fuzz_bytes(p, length);
        p = in.ours + in.length - length;
        memmove(p, in.ours + in.length - (length < MOST ? length : MOST), length);
    } else { /* what a kernel gives, but for what the input changes */
        payload = (uint32_t)(what >> 1 & 7) * 300 + fuzz_u8();
        p = in.ours;
        length = make_packet(p, payload, kind, &s);
        memmove(in.ours + in.length - length, p, length);
        p = in.ours + in.length - length;
        for (uint32_t k = 0; k < payload; k++)
            p[s.header + k] = (uint8_t)(k * 7 + (k >> 8));
        if (!s.ip4 && what & 64) { /* extension headers: one, of up to 320 bytes */
            uint32_t more = 8 * (1 + fuzz_u8() % 40);
            p -= more;
            memmove(p, p + more, IP6_SIZE);
            memset(p + IP6_SIZE, 0, more);
            p[IP6_SIZE] = s.protocol;
            p[IP6_SIZE + 1] = (uint8_t)(more / 8 - 1);
            p[IP6_NEXT] = INET_DESTINATION;
            length += more;
            put16(p + IP6_LENGTH, length - IP6_SIZE);
            s.upper += more;
            s.header += more;
        }
        v.kind = !s.tcp ? VNET_UDP : s.ip4 ? VNET_TCP4 : VNET_TCP6;
        v.flags = VNET_NEEDS_CHECKSUM;
        v.size = (uint16_t)(payload / 24 + 1 + fuzz_u16() % 2048); /* few enough segments for many inputs */
        v.sum_start = (uint16_t)s.upper;
        v.sum_offset = s.tcp ? TCP_CHECK : UDP_CHECK;
        if (kind & 64)
            v.kind |= kind & 128 ? VNET_ACCECN : VNET_ECN;
        if (kind & 32 && length <= 4096)
            v.kind = VNET_NONE;
        uint8_t *check = p + s.upper + v.sum_offset;
        put16(check, 0);
        put16(check, folded((s.ip4 ? words(p + IP4_SOURCE, 8) : words(p + IP6_SOURCE, 32)) + s.protocol + (length - s.upper)));
        for (int changes = fuzz_u8() % 4; changes != 0 && fuzz_left() != 0; changes--) {
            uint32_t at = fuzz_u16();
            if (at & 0x8000)
                ((uint8_t *)&v)[at % sizeof v] = fuzz_u8();
            else
                p[at % (length < 80 ? length : s.upper + 40 < length ? s.upper + 40 : length)] = fuzz_u8();
        }
    }
    split(p, length, &v, mtu);
    if (v.kind == VNET_NONE && length != 0) {
        static segmenter scratch;
        static uint8_t copy[MOST];
        memcpy(copy, p, length);
        segment_complete(&scratch, &v, p, length);
        memcpy(p, copy, length);
    }
    path(p, length, (uint32_t)fuzz_u16() * (what & 128 ? 70000 : 1));
    return 0;
}
