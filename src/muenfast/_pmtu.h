/* Packets that are longer than the path's MTU: fragments of them, or the news to their sender; no Python.h.
 *
 * Fragments are the kernel's (ip_fragment): RFC 791, options that are not copied become no-operations. News are ICMP
 * "fragmentation needed" (RFC 1191) and ICMPv6 "packet too big" (RFC 4443), for whom RFC 1122, 1812 and 4443 allow them. They
 * come from whom the packet was for: there is no other address that is known to be on that side. Packets come from the
 * local kernel, one of those that segment_next() writes: each with its checksum complete, and no super-packet.
 */
#ifndef MUENFAST_PMTU_H
#define MUENFAST_PMTU_H

#include "_inet.h"

enum pmtu_verdict {
    PMTU_FITS = 0,
    PMTU_FRAGMENTS, /* pmtu_fragments_begin() */
    PMTU_NEWS,      /* pmtu_news() tells its sender, and the packet goes nowhere */
    PMTU_NOTHING    /* it goes nowhere, and nobody may be told */
};

enum {
    PMTU_LEAST4 = 68, PMTU_LEAST6 = 1280,   /* what every path takes: RFC 791, RFC 8200 */
    PMTU_NEWS_MOST = 1280,                  /* bytes of news: ICMPv6's; ICMP's are 576 */
    PMTU_NEWS_MOST4 = 576,
    PMTU_RATE = 1000, PMTU_BURST = 50       /* news a second, and at once: icmp_msgs_per_sec, icmp_msgs_burst */
};

/* News that may yet be sent. Zeroed at first. */
typedef struct {
    uint64_t since; /* now_ns() up to which tokens are counted; 0: never */
    uint32_t tokens;
} pmtu_bucket;

/* Whether one more may be sent now. */
static inline bool pmtu_allowed(pmtu_bucket *b, uint64_t now) {
    const uint64_t each = UINT64_C(1000000000) / PMTU_RATE;
    uint64_t more;
    if (b->since == 0 || now < b->since || now - b->since >= each * PMTU_BURST) {
        b->tokens = PMTU_BURST;
        b->since = now;
    } else {
        more = (now - b->since) / each;
        b->tokens = b->tokens + more < PMTU_BURST ? b->tokens + (uint32_t)more : PMTU_BURST;
        b->since += more * each;
    }
    if (b->tokens == 0)
        return false;
    b->tokens--;
    return true;
}

/* What an entry of the region comes to for a packet whose first byte this is; 0: no limit. */
static inline uint32_t pmtu_of(uint32_t entry, uint8_t first) {
    uint32_t least = first >> 4 == 4 ? PMTU_LEAST4 : PMTU_LEAST6;
    return entry == 0 || entry >= least ? entry : least;
}

/* Whether an IPv4 sender may be told: one host, about something that was for one host, and no error. */
static inline bool pmtu_tells4(const uint8_t *packet, uint32_t length, uint32_t header) {
    const uint8_t *source = packet + IP4_SOURCE, *target = packet + IP4_TARGET;
    uint8_t type;
    if (source[0] == 0 || source[0] == 127 || source[0] >= 224 || target[0] >= 224)
        return false;
    if ((net16(packet + IP4_FRAGMENT) & IP4_OFFSET) != 0)
        return false;
    if (packet[IP4_PROTOCOL] != INET_ICMP)
        return true;
    if (length <= header)
        return false;
    type = packet[header];
    return type == 0 || type == 8 || (type >= 13 && type <= 18); /* the queries and their answers */
}

static inline bool pmtu_tells6(const uint8_t *packet, uint32_t length) {
    static const uint8_t unspecified[16];
    const uint8_t *source = packet + IP6_SOURCE, *target = packet + IP6_TARGET;
    uint32_t upper, fragment;
    uint8_t next;
    if (source[0] == 0xff || memcmp(source, unspecified, 16) == 0 || target[0] == 0xff ||
        memcmp(target, unspecified, 16) == 0)
        return false;
    upper = ip6_upper(packet, length, &next, &fragment);
    if (upper == 0 || (fragment != 0 && (net16(packet + fragment + 2) & 0xfff8) != 0))
        return false;
    return next != INET_ICMP6 || (length > upper && packet[upper] >= 128 && packet[upper] != 137); /* redirect */
}

/* What becomes of a packet where its path takes `limit` bytes, one of pmtu_of(). Malformed: PMTU_NOTHING. */
static inline enum pmtu_verdict pmtu_look(const uint8_t *packet, uint32_t length, uint32_t limit) {
    uint32_t header;
    if (limit == 0 || length <= limit)
        return PMTU_FITS;
    if (packet[0] >> 4 == 6)
        return length >= IP6_SIZE && pmtu_tells6(packet, length) ? PMTU_NEWS : PMTU_NOTHING;
    header = (packet[0] & 15u) * 4;
    if (packet[0] >> 4 != 4 || header < IP4_SIZE || length < IP4_SIZE || length < header ||
        net16(packet + IP4_LENGTH) != length ||
        (net16(packet + IP4_FRAGMENT) & IP4_OFFSET) * 8 + length - header > INET_MOST)
        return PMTU_NOTHING;
    if ((net16(packet + IP4_FRAGMENT) & IP4_DF) == 0)
        return PMTU_FRAGMENTS;
    return pmtu_tells4(packet, length, header) ? PMTU_NEWS : PMTU_NOTHING;
}

/* ---- fragments */

typedef struct pmtu_fragments {
    const uint8_t *packet; /* the caller's, unchanged until the last one */
    uint32_t length, header, room, at, offset; /* room: payload of one fragment, at most */
    uint8_t first[IP4_SIZE_MOST];
} pmtu_fragments;

/* How many fragments a packet becomes. Precondition: pmtu_look() said so. */
static inline uint32_t pmtu_fragments_begin(pmtu_fragments *f, const uint8_t *packet, uint32_t length, uint32_t limit) {
    uint32_t payload, size;
    f->packet = packet;
    f->length = length;
    f->header = (packet[0] & 15u) * 4;
    f->room = limit - f->header; /* 8 at least: PMTU_LEAST4 */
    f->at = 0;
    f->offset = net16(packet + IP4_FRAGMENT) & IP4_OFFSET;
    memcpy(f->first, packet, f->header);
    payload = length - f->header;
    size = f->room & ~7u; /* of all but the last */
    return payload <= f->room ? 1 : 1 + (payload - f->room + size - 1) / size;
}

/* What only the first fragment has becomes no-operation. */
static inline void pmtu_options(uint8_t *header, uint32_t size) {
    uint32_t at = IP4_SIZE, n;
    while (at < size && header[at] != 0) { /* 0: the last option */
        if (header[at] == 1) {             /* no-operation */
            at++;
            continue;
        }
        if (at + 1 >= size)
            return;
        n = header[at + 1];
        if (n < 2 || at + n > size)
            return;
        if ((header[at] & 0x80) == 0) /* not copied */
            memset(header + at, 1, n);
        at += n;
    }
}

/* Writes the next fragment: its bytes. Precondition: one is left. */
static inline uint32_t pmtu_fragments_next(pmtu_fragments *f, uint8_t *to) {
    uint32_t left = f->length - f->header - f->at, n = left <= f->room ? left : f->room & ~7u, word;
    bool more = n < left || (net16(f->packet + IP4_FRAGMENT) & IP4_MF) != 0; /* of a fragment, its own */
    if (f->at != 0)
        pmtu_options(f->first, f->header);
    word = (net16(f->packet + IP4_FRAGMENT) & ~(uint32_t)(IP4_OFFSET | IP4_MF)) | (f->offset + f->at / 8) | (more ? IP4_MF : 0);
    put_net16(f->first + IP4_FRAGMENT, word);
    put_net16(f->first + IP4_LENGTH, f->header + n);
    put_ip4_checksum(f->first, f->header);
    memcpy(to, f->first, f->header);
    copy_bytes(to + f->header, f->packet + f->header + f->at, n);
    f->at += n;
    return f->header + n;
}

/* The header of the last fragment, in private memory. */
static inline const uint8_t *pmtu_fragments_head(const pmtu_fragments *f) { return f->first; }

/* ---- news */

/* Writes what tells a packet's sender of the path's limit: its bytes, at most PMTU_NEWS_MOST. Precondition: pmtu_look()
 * said so, and pmtu_allowed(). `to` is private. */
static inline uint32_t pmtu_news(const uint8_t *packet, uint32_t length, uint32_t limit, uint8_t *to) {
    uint32_t header = packet[0] >> 4 == 4 ? IP4_SIZE : IP6_SIZE, most = header == IP4_SIZE ? PMTU_NEWS_MOST4 : PMTU_NEWS_MOST;
    uint32_t quoted = length < most - header - 8 ? length : most - header - 8, whole = header + 8 + quoted;
    uint8_t *icmp = to + header;
    uint64_t sum;
    memset(to, 0, header + 8);
    memcpy(icmp + 8, packet, quoted);
    if (header == IP4_SIZE) {
        to[0] = 0x45;
        to[IP4_TOS] = 0xc0; /* internetwork control: RFC 1812, 4.3.2.5 */
        put_net16(to + IP4_LENGTH, whole);
        put_net16(to + IP4_FRAGMENT, IP4_DF);
        to[IP4_TTL] = 64;
        to[IP4_PROTOCOL] = INET_ICMP;
        memcpy(to + IP4_SOURCE, packet + IP4_TARGET, 4);
        memcpy(to + IP4_TARGET, packet + IP4_SOURCE, 4);
        put_ip4_checksum(to, header);
        icmp[0] = 3;
        icmp[1] = 4;
        put_net16(icmp + 6, limit < INET_MOST ? limit : INET_MOST);
        sum = 0;
    } else {
        to[0] = 0x60;
        put_net16(to + IP6_LENGTH, 8 + quoted);
        to[IP6_NEXT] = INET_ICMP6;
        to[IP6_HOPS] = 64;
        memcpy(to + IP6_SOURCE, packet + IP6_TARGET, 16);
        memcpy(to + IP6_TARGET, packet + IP6_SOURCE, 16);
        icmp[0] = 2;
        put_net32(icmp + 4, limit);
        sum = sum_pseudo6(to, INET_ICMP6, 8 + quoted);
    }
    put_checksum(icmp + 2, sum + sum_bytes(icmp, 8 + quoted));
    return whole;
}

#endif
