/* Packets of one flow, as they come from a peer, into super-packets for a TUN device; no Python.h.
 *
 * Elements may change while they are read: what decides about a packet, and what goes on, is loaded once, into memory of our
 * own. A packet that becomes part of a super-packet has had its IP header's checksum and its own verified; any other
 * leaves as it came, and the kernel looks at its checksum itself. Nobody's bad checksum becomes a good one.
 *
 * The rules are those of the kernel's GRO (tcp_gro_receive, udp_gro_receive_segment, inet_gro_flush, ipv6_gro_flush), or
 * narrower: neither CWR, ECE, FIN nor anything else but ACK and PSH, and no extension header. Packets of one flow leave in
 * the order in which they came; so do those between two addresses where a flow cannot be told.
 *
 * Who calls has taken every packet that was ready before more is placed. Nothing is allocated here.
 */
#ifndef MUENFAST_COALESCE_H
#define MUENFAST_COALESCE_H

#include "_inet.h"

enum {
    COALESCE_FLOWS = 8,                    /* held at once (the kernel's MAX_GRO_SKBS) */
    COALESCE_BUFFERS = COALESCE_FLOWS + 1, /* and one for what comes next */
    COALESCE_HEAD = 128,                   /* bytes that are looked at: more than the headers of what is merged */
    COALESCE_FRONT = 32,                   /* before a packet: its vnet_header, behind room for what else goes before it */
    COALESCE_STRIDE = COALESCE_FRONT + INET_MOST + 1 + 96,
    COALESCE_MEMORY = COALESCE_BUFFERS * COALESCE_STRIDE,
    COALESCE_SEGMENTS = 128,               /* of TCP: 65535 bytes at an MTU of 576 */
    COALESCE_DATAGRAMS = 64                /* the kernel's UDP_GRO_CNT_MAX; UDP_MAX_SEGMENTS of older ones */
};

enum { COALESCE_TCP4 = 1, COALESCE_TCP6 = 2, COALESCE_UDP = 4, COALESCE_ALL = 7 }; /* what the TUN device takes */

enum coalesce_status {
    COALESCE_NOT_IP = -1, /* neither IPv4 nor IPv6 */
    COALESCE_FRAME = -2,  /* its own length is impossible, or more than there is */
    COALESCE_FULL = -3    /* what was ready was not taken */
};

/* What packets of one flow have in common. */
typedef struct {
    uint64_t key;
    uint8_t addresses[32]; /* of IPv4 8 bytes, and zeros */
    uint32_t ports;        /* as they stand there */
    uint8_t version, protocol;
} coalesce_name;

typedef struct {
    uint8_t *packet; /* COALESCE_FRONT bytes behind its buffer */
    uint32_t length;
    uint64_t key;
    uint32_t segments;
} coalesce_ready;

typedef struct {
    coalesce_name name;
    uint64_t since; /* order of creation */
    uint8_t *packet;
    uint32_t length, header, transport, size, segments;
    uint16_t id;
    bool fixed; /* every packet has the same identification */
    bool held;
} coalesce_flow;

typedef struct {
    coalesce_name name;
    uint32_t length;
    uint32_t header;    /* bytes before the payload; where it is not fit, all that stand in `head` */
    uint32_t transport;
    uint32_t payload;
    bool named;         /* its flow can be told: ports and all */
    bool fit;           /* its headers may be a super-packet's */
    bool last;          /* of one: PSH */
    bool good;          /* fit, and its checksums are right */
    coalesce_flow *flow;   /* the one it goes to the end of, ... */
    coalesce_flow *before; /* ... or that has to leave before it */
    uint8_t *packet;       /* a spare buffer, where it stands unless it is at the end of a flow */
} coalesce_packet;

typedef struct coalescer {
    uint32_t kinds;
    uint32_t spare, ready, taken;
    uint64_t turns;
    uint64_t merged;   /* packets that were added to another */
    uint64_t supers;   /* super-packets made of them */
    uint64_t rejected; /* packets that could have been merged but for their checksums */
    coalesce_packet p; /* placed, not committed */
    uint8_t head[COALESCE_HEAD];
    coalesce_flow flows[COALESCE_FLOWS];
    uint8_t *spares[COALESCE_BUFFERS];
    coalesce_ready list[COALESCE_BUFFERS];
} coalescer;

/* memory: COALESCE_MEMORY bytes, the coalescer's as long as it is used. */
static inline void coalesce_init(coalescer *c, uint8_t *memory, uint32_t kinds) {
    uint32_t k;
    memset(c, 0, sizeof *c);
    c->kinds = kinds;
    for (k = COALESCE_BUFFERS; k-- != 0;) /* the last used is the first used again: it is in the caches */
        c->spares[c->spare++] = memory + (size_t)k * COALESCE_STRIDE + COALESCE_FRONT;
}

/* ---- what comes out */

static inline void coalesce_put(coalescer *c, uint8_t *packet, uint32_t length, uint64_t key, uint32_t segments) {
    coalesce_ready *r = &c->list[c->ready++];
    r->packet = packet;
    r->length = length;
    r->key = key;
    r->segments = segments;
}

/* A flow's packet is ready. */
static inline void coalesce_end(coalescer *c, coalesce_flow *f) {
    uint8_t *packet = f->packet, *upper = packet + f->transport;
    vnet_header v = {0};
    f->held = false;
    if (f->segments > 1) {
        bool ip4 = f->name.version == 4, tcp = f->name.protocol == INET_TCP;
        uint32_t rest = f->length - f->transport, check = tcp ? TCP_CHECK : UDP_CHECK;
        uint16_t sum;
        if (ip4) {
            put_net16(packet + IP4_LENGTH, f->length);
            put_ip4_checksum(packet, f->transport);
        } else
            put_net16(packet + IP6_LENGTH, f->length - IP6_SIZE);
        if (!tcp)
            put_net16(upper + UDP_LENGTH, rest);
        sum = sum_fold(ip4 ? sum_pseudo4(packet, f->name.protocol, rest) : sum_pseudo6(packet, f->name.protocol, rest));
        memcpy(upper + check, &sum, 2);
        v.flags = VNET_NEEDS_CHECKSUM;
        v.kind = !tcp ? VNET_UDP : ip4 ? VNET_TCP4 : VNET_TCP6;
        v.headers = (uint16_t)f->header;
        v.size = (uint16_t)f->size;
        v.sum_start = (uint16_t)f->transport;
        v.sum_offset = (uint16_t)check;
        count64(&c->supers, 1);
    }
    memcpy(packet - sizeof v, &v, sizeof v);
    coalesce_put(c, packet, f->length, f->name.key, f->segments);
}

static inline coalesce_flow *coalesce_oldest(coalescer *c) {
    coalesce_flow *f, *oldest = NULL;
    for (f = c->flows; f < c->flows + COALESCE_FLOWS; f++)
        if (f->held && (oldest == NULL || f->since < oldest->since))
            oldest = f;
    return oldest;
}

/* All that is held is ready, the oldest first; at the end of a batch. */
static inline uint32_t coalesce_flush(coalescer *c) {
    coalesce_flow *f;
    while ((f = coalesce_oldest(c)) != NULL)
        coalesce_end(c, f);
    return c->ready - c->taken;
}

/* The next packet that is ready, or NULL: written to the device from sizeof(vnet_header) bytes before it on, valid until
 * more is placed. */
static inline const coalesce_ready *coalesce_take(coalescer *c) {
    const coalesce_ready *r;
    if (c->taken == c->ready) {
        c->taken = c->ready = 0;
        return NULL;
    }
    r = &c->list[c->taken++];
    c->spares[c->spare++] = r->packet;
    return r;
}

/* ---- what goes in */

/* Reads the headers in c->head, of which there are n bytes: 0 or a coalesce_status. */
static inline int coalesce_parse(coalescer *c, uint32_t n, uint32_t limit, uint64_t key) {
    coalesce_packet *p = &c->p;
    const uint8_t *h = c->head, *upper;
    uint32_t rest;
    memset(&p->name, 0, sizeof p->name);
    p->name.key = key;
    p->named = p->fit = p->last = p->good = false;
    p->flow = p->before = NULL;
    p->packet = NULL;
    if (n == 0)
        return COALESCE_FRAME;
    p->name.version = h[0] >> 4;
    if (p->name.version == 4) {
        uint32_t size = (h[0] & 15u) * 4;
        if (n < IP4_SIZE || size < IP4_SIZE)
            return COALESCE_FRAME;
        p->length = net16(h + IP4_LENGTH);
        if (p->length < size || p->length > limit)
            return COALESCE_FRAME;
        memcpy(p->name.addresses, h + IP4_SOURCE, 8);
        p->name.protocol = h[IP4_PROTOCOL];
        p->transport = IP4_SIZE;
        /* of the fragment word DF alone; with options the ports stand elsewhere, and it is no flow that is held */
        p->named = size == IP4_SIZE && (net16(h + IP4_FRAGMENT) & ~(uint32_t)IP4_DF) == 0;
        p->fit = p->named && sum_fold(sum_header(h, IP4_SIZE)) == 0xffff;
    } else if (p->name.version == 6) {
        if (n < IP6_SIZE)
            return COALESCE_FRAME;
        p->length = IP6_SIZE + net16(h + IP6_LENGTH);
        if (p->length > limit || p->length > INET_MOST)
            return COALESCE_FRAME;
        memcpy(p->name.addresses, h + IP6_SOURCE, 32);
        p->name.protocol = h[IP6_NEXT];
        p->transport = IP6_SIZE;
        p->named = p->fit = true;
    } else
        return COALESCE_NOT_IP;
    n = n < p->length ? n : p->length;
    p->header = n;
    upper = h + p->transport;
    rest = p->length - p->transport;
    if (p->named && p->name.protocol == INET_TCP && rest >= TCP_SIZE) {
        uint32_t size = (upper[TCP_OFFSET] >> 4) * 4u;
        memcpy(&p->name.ports, upper, 4);
        p->fit = p->fit && size >= TCP_SIZE && size < rest && (upper[TCP_OFFSET] & 15) == 0 &&
                 (upper[TCP_FLAGS] & ~(uint32_t)TCP_PSH) == TCP_IS_ACK &&
                 (c->kinds & (p->name.version == 4 ? COALESCE_TCP4 : COALESCE_TCP6)) != 0;
        p->last = (upper[TCP_FLAGS] & TCP_PSH) != 0;
        if (p->fit)
            p->header = p->transport + size;
    } else if (p->named && p->name.protocol == INET_UDP && rest >= UDP_SIZE) {
        memcpy(&p->name.ports, upper, 4);
        p->fit = p->fit && rest > UDP_SIZE && net16(upper + UDP_LENGTH) == rest && sum_word(upper + UDP_CHECK) != 0 &&
                 (c->kinds & COALESCE_UDP) != 0;
        if (p->fit)
            p->header = p->transport + UDP_SIZE;
    } else
        p->named = p->fit = false;
    p->payload = p->fit ? p->length - p->header : 0;
    return 0;
}

/* n: a multiple of 4. */
static inline bool coalesce_alike(const uint8_t *a, const uint8_t *b, uint32_t n) {
    uint32_t at, v, w;
    for (at = 0; at < n; at += 4) {
        memcpy(&v, a + at, 4);
        memcpy(&w, b + at, 4);
        if (v != w)
            return false;
    }
    return true;
}

/* Whether the packet in c->head goes to the end of a flow, but for its checksum. */
static inline bool coalesce_continues(const coalescer *c, coalesce_flow *f) {
    const coalesce_packet *p = &c->p;
    const uint8_t *a = f->packet, *b = c->head, *ua = a + f->transport, *ub = b + p->transport;
    uint32_t done = f->length - f->header;
    if (!p->fit || p->header != f->header || p->payload > f->size || f->length + p->payload > INET_MOST)
        return false;
    if (f->name.version == 4) {
        uint16_t id = net16(b + IP4_ID);
        bool counts = id == (uint16_t)(f->id + f->segments);
        bool same = id == f->id && (net16(a + IP4_FRAGMENT) & IP4_DF) != 0; /* then it says nothing (RFC 6864) */
        if (a[IP4_TOS] != b[IP4_TOS] || a[IP4_TTL] != b[IP4_TTL] || memcmp(a + IP4_FRAGMENT, b + IP4_FRAGMENT, 2) != 0)
            return false;
        if (f->segments == 1 ? !counts && !same : f->fixed ? !same : !counts)
            return false;
    } else if (memcmp(a, b, 4) != 0 || a[IP6_HOPS] != b[IP6_HOPS]) /* traffic class, flow label */
        return false;
    if (f->name.protocol == INET_UDP)
        return f->segments < COALESCE_DATAGRAMS;
    return f->segments < COALESCE_SEGMENTS && net32(ub + TCP_SEQUENCE) == net32(ua + TCP_SEQUENCE) + done &&
           memcmp(ua + TCP_ACK, ub + TCP_ACK, 4) == 0 && memcmp(ua + TCP_WINDOW, ub + TCP_WINDOW, 2) == 0 &&
           memcmp(ua + TCP_URGENT, ub + TCP_URGENT, 2) == 0 &&
           coalesce_alike(ua + TCP_SIZE, ub + TCP_SIZE, p->header - p->transport - TCP_SIZE);
}

static inline coalesce_flow *coalesce_find(coalescer *c) {
    const coalesce_name *a = &c->p.name;
    coalesce_flow *f;
    for (f = c->flows; f < c->flows + COALESCE_FLOWS; f++)
        if (f->held && f->name.ports == a->ports && f->name.protocol == a->protocol && f->name.version == a->version &&
            f->name.key == a->key && coalesce_alike(f->name.addresses, a->addresses, sizeof a->addresses))
            return f;
    return NULL;
}

/* Copies one packet out of an element, at most `limit` bytes: 0 or a coalesce_status. Nothing that was placed before is
 * touched; before coalesce_commit() it is to be known that the element was whole. key: packets with different ones have
 * nothing to do with each other. */
static inline int coalesce_place(coalescer *c, const uint8_t *element, uint32_t limit, uint64_t key) {
    coalesce_packet *p = &c->p;
    uint32_t n = limit < COALESCE_HEAD ? limit : COALESCE_HEAD;
    uint8_t *to;
    uint64_t sum;
    int status;
    if (c->taken != c->ready)
        return COALESCE_FULL;
    c->taken = c->ready = 0;
    memcpy(c->head, element, n);
    __asm__("" : : : "memory"); /* what follows reads no element but behind that */
    status = coalesce_parse(c, n, limit, key);
    if (status != 0)
        return status;
    if (p->named) {
        coalesce_flow *f = coalesce_find(c);
        if (f != NULL && coalesce_continues(c, f))
            p->flow = f;
        else
            p->before = f;
    }
    to = c->spares[c->spare - 1];
    p->packet = to;
    if (p->flow != NULL)
        to = p->flow->packet + p->flow->length;
    else {
        memcpy(to, c->head, p->header);
        to += p->header;
    }
    if (!p->fit) {
        copy_taken(to, element + p->header, p->length - p->header);
        return 0;
    }
    sum = p->name.version == 4 ? sum_pseudo4(c->head, p->name.protocol, p->length - p->transport)
                               : sum_pseudo6(c->head, p->name.protocol, p->length - p->transport);
    sum += sum_header(c->head + p->transport, p->header - p->transport) + sum_taken(to, element + p->header, p->payload);
    p->good = sum_fold(sum) == 0xffff;
    return 0;
}

/* Of the packet that was placed: 4 or 6. */
static inline uint32_t coalesce_version(const coalescer *c) { return c->p.name.version; }

/* Packets between the same addresses leave before one whose flow cannot be told: it may be a fragment of theirs. */
static inline void coalesce_part(coalescer *c) {
    coalesce_flow *f, *oldest;
    do {
        oldest = NULL;
        for (f = c->flows; f < c->flows + COALESCE_FLOWS; f++)
            if (f->held && f->name.key == c->p.name.key && f->name.version == c->p.name.version &&
                memcmp(f->name.addresses, c->p.name.addresses, sizeof f->name.addresses) == 0 &&
                (oldest == NULL || f->since < oldest->since))
                oldest = f;
        if (oldest != NULL)
            coalesce_end(c, oldest);
    } while (oldest != NULL);
}

/* A packet in a spare buffer begins a flow. */
static inline void coalesce_start(coalescer *c) {
    const coalesce_packet *p = &c->p;
    coalesce_flow *f;
    for (f = c->flows; f < c->flows + COALESCE_FLOWS && f->held; f++)
        ;
    if (f == c->flows + COALESCE_FLOWS) {
        f = coalesce_oldest(c);
        coalesce_end(c, f);
    }
    f->name = p->name;
    f->since = c->turns++;
    f->packet = p->packet;
    f->length = p->length;
    f->header = p->header;
    f->transport = p->transport;
    f->size = p->payload;
    f->segments = 1;
    f->id = net16(c->head + IP4_ID);
    f->fixed = false;
    f->held = true;
}

/* What was placed counts; how many packets are ready: all to be taken before more is placed. Precondition: it was placed,
 * with status 0, and not committed yet. */
static inline uint32_t coalesce_commit(coalescer *c) {
    coalesce_packet *p = &c->p;
    vnet_header none = {0};
    if (p->flow != NULL) {
        coalesce_flow *f = p->flow;
        if (p->good) {
            if (f->segments == 1 && f->name.version == 4)
                f->fixed = net16(c->head + IP4_ID) == f->id;
            f->length += p->payload;
            f->segments++;
            if (p->last)
                f->packet[f->transport + TCP_FLAGS] |= TCP_PSH;
            count64(&c->merged, 1);
            if (p->last || p->payload < f->size)
                coalesce_end(c, f);
            return c->ready;
        }
        /* as any other that does not fit: with its own headers, from where it is now */
        p->before = f;
        memcpy(p->packet, c->head, p->header);
        memcpy(p->packet + p->header, f->packet + f->length, p->payload);
    }
    if (p->before != NULL)
        coalesce_end(c, p->before);
    else if (!p->named)
        coalesce_part(c);
    c->spare--;
    if (p->good && !p->last) {
        coalesce_start(c);
        return c->ready;
    }
    if (p->fit && !p->good)
        count64(&c->rejected, 1);
    memcpy(p->packet - sizeof none, &none, sizeof none);
    coalesce_put(c, p->packet, p->length, p->name.key, 1);
    return c->ready;
}

#endif
