/* Packets in elements: the three framings of network channels (docs/protocol.md); no Python.h.
 *
 * Trust: of an element every byte is copied once; what follows looks at the copy only. An element may start at any
 * address and is only ever touched through memcpy.
 */
#ifndef MUENFAST_FRAME_H
#define MUENFAST_FRAME_H

#include <stdint.h>
#include <string.h>

#include "_copy.h"
#include "_crc32c.h"
#include "_wire.h"

enum { FRAME_RAW = 0, FRAME_NET = 1, FRAME_ETH = 2 };

/* Before an IP packet (FRAME_NET). */
typedef struct {
    uint32_t mark;    /* netfilter mark */
    uint16_t length;  /* of the packet; a receiver goes by the packet's own header */
    uint8_t protocol; /* NET_IPV4, NET_IPV6 */
    uint8_t qos;      /* DSCP: traffic class >> 2 */
} net_hdr;
MF_SIZE(net_hdr, 8);
MF_OFFSET(net_hdr, mark, 0);
MF_OFFSET(net_hdr, length, 4);
MF_OFFSET(net_hdr, protocol, 6);
MF_OFFSET(net_hdr, qos, 7);

enum { NET_IPV4 = 4, NET_IPV6 = 41 };           /* IPPROTO_IPIP, IPPROTO_IPV6 */
enum { IPV4_HEADER = 20, IPV6_HEADER = 40 };    /* bytes, options and extensions aside */
enum { ETH_HEADER = 14, ETH_LENGTH = 2 };       /* FRAME_ETH: bytes of the header; of the length at the element's end */
enum { FRAME_LEAST = 68, FRAME_MOST = 65535 };  /* the MTU of a TUN device */

/* What is wrong with a packet; negative, so that a length is none of them. */
enum {
    FRAME_LENGTH = -1,   /* a length that cannot be: beyond the element, or shorter than its own header */
    FRAME_PROTOCOL = -2, /* net_hdr and packet disagree which IP it is, or it is none */
    FRAME_OVERSIZE = -3, /* more than an element holds */
    FRAME_NOT_IP = -4,
    FRAME_CHECKSUM = -5  /* not that of what the element holds */
};

enum { FRAME_SUM = 4 }; /* bytes of a checksum, behind an element of an epoch that has them */

/* What a checksum covers behind the packet and what stands before it. */
typedef struct {
    uint64_t covered; /* bytes of that */
    uint64_t number;  /* of the element, from 0 in each epoch */
    uint64_t epoch;
} frame_place;
MF_SIZE(frame_place, 24);

/* Bytes of an element. mtu: FRAME_LEAST to FRAME_MOST. */
static inline uint32_t frame_size(int kind, uint32_t mtu) {
    return mtu + (kind == FRAME_NET ? sizeof(net_hdr) : kind == FRAME_ETH ? ETH_HEADER + ETH_LENGTH : 0);
}

/* Where the packet stands in an element of that size, and how much of it fits. */
static inline uint32_t frame_start(int kind) { return kind == FRAME_NET ? sizeof(net_hdr) : 0; }
static inline uint32_t frame_room(int kind, uint32_t size) {
    return size - (kind == FRAME_NET ? sizeof(net_hdr) : kind == FRAME_ETH ? ETH_LENGTH : 0);
}

/* Bytes of an IP packet by its own header, or FRAME_LENGTH, FRAME_NOT_IP. p: IPV4_HEADER bytes, private. */
static inline int32_t ip_length(const uint8_t *p) {
    uint32_t header, total;
    if (p[0] >> 4 == 6)
        return IPV6_HEADER + (p[4] << 8 | p[5]);
    if (p[0] >> 4 != 4)
        return FRAME_NOT_IP;
    header = (p[0] & 15) * 4u;
    total = (uint32_t)p[2] << 8 | p[3];
    return header < IPV4_HEADER || total < header ? FRAME_LENGTH : (int32_t)total;
}

/* Completes an element into whose room n bytes of a packet were put: what stands beside the packet, and zeros, so that
 * no byte of an earlier element goes out. head: the packet's first IPV4_HEADER bytes; elsewhere than in the slot where they
 * were stored there just now, for a load that several stores make up waits until the other CPU has given the line up. used:
 * bytes of the room that are not zero behind the packet, at most. mark: for net_hdr. 0, or why the packet is none to send. */
static inline int frame_finish(int kind, uint8_t *slot, uint32_t size, const uint8_t *head, uint32_t n, uint32_t used,
                               uint32_t mark) {
    uint32_t start = frame_start(kind);
    uint16_t length = (uint16_t)n;
    if (n > frame_room(kind, size))
        return FRAME_OVERSIZE;
    if (kind == FRAME_NET) {
        uint8_t first[IPV4_HEADER];
        int32_t own;
        net_hdr h;
        if (n < IPV4_HEADER)
            return FRAME_NOT_IP;
        memcpy(first, head, sizeof(first));
        if (first[0] >> 4 == 4) {
            h.protocol = NET_IPV4;
            h.qos = first[1] >> 2;
        } else if (first[0] >> 4 == 6 && n >= IPV6_HEADER) {
            h.protocol = NET_IPV6;
            h.qos = (uint8_t)((first[0] & 15) << 2 | first[1] >> 6);
        } else
            return FRAME_NOT_IP;
        own = ip_length(first);
        if (own < 0 || (uint32_t)own > n)
            return FRAME_LENGTH;
        h.mark = mark;
        h.length = length;
        memcpy(slot, &h, sizeof(h));
    }
    if (used > n)
        memset(slot + start + n, 0, used - n);
    if (kind == FRAME_ETH)
        memcpy(slot + size - ETH_LENGTH, &length, sizeof(length));
    return 0;
}

/* Of a function for those who have checksums: apart, so that the loops of those who have none stay small (decision 022). */
#define FRAME_APART static __attribute__((noinline, unused))

/* The checksum of an element in private memory, or our own channel's, that holds a packet of n bytes: of net_hdr as many as
 * its own header says. */
static inline uint32_t frame_sum(int kind, const uint8_t *element, uint32_t size, uint32_t n, uint64_t number,
                                 uint64_t epoch) {
    frame_place place = {kind == FRAME_RAW ? size : frame_start(kind) + n, number, epoch};
    return ~crc32c(crc32c(CRC32C_FIRST, element, place.covered), &place, sizeof place);
}

/* Completes an element, which frame_finish() has, with its checksum. n: bytes that were put there, of which the packet's own
 * header may count fewer. That is read from the slot, which by now others may have changed: it is believed up to n. */
FRAME_APART void frame_seal(int kind, uint8_t *slot, uint32_t size, uint32_t n, uint64_t number, uint64_t epoch) {
    uint32_t sum;
    if (kind == FRAME_NET) {
        uint8_t first[IPV4_HEADER];
        int32_t own;
        memcpy(first, slot + frame_start(kind), sizeof(first));
        own = ip_length(first);
        if (own >= 0 && (uint32_t)own < n)
            n = (uint32_t)own;
    }
    sum = frame_sum(kind, slot, size, n, number, epoch);
    memcpy(slot + size, &sum, sizeof sum);
}

/* Whether a packet of n bytes, that frame_take() copied to `element`, has the checksum that stands in its slot. */
FRAME_APART int frame_right(int kind, const uint8_t *element, const uint8_t *slot, uint32_t size, uint32_t n,
                            uint64_t number, uint64_t epoch) {
    uint32_t sum;
    memcpy(&sum, slot + size, sizeof sum);
    return frame_sum(kind, element, size, n, number, epoch) == sum;
}

/* As frame_finish(), and copies the packet, n bytes of private memory, into the element: what stands before it first. */
static inline int frame_put(int kind, uint8_t *slot, uint32_t size, const uint8_t *packet, uint32_t n, uint32_t used,
                            uint32_t mark) {
    int status = frame_finish(kind, slot, size, packet, n, used, mark);
    if (status == 0)
        copy_few(slot + frame_start(kind), packet, n);
    return status;
}

/* The header of an element, loaded once. */
static inline net_hdr frame_header(const uint8_t *slot) {
    net_hdr h;
    memcpy(&h, slot, sizeof(h));
    __asm__("" : : : "memory"); /* from here on the copy is what counts */
    return h;
}

/* Whether net_hdr says which IP it is. version: of the packet. */
static inline int frame_agrees(net_hdr h, uint32_t version) { return h.protocol == (version == 4 ? NET_IPV4 : NET_IPV6); }

/* Copies an element's packet, and not much more, to `to` (size bytes), where it stands as in the element; its length, or
 * FRAME_LENGTH, FRAME_PROTOCOL. mark: of net_hdr, else 0. What is copied may be torn: the caller looks afterwards
 * whether the element was left alone, and uses nothing of it until then. */
static inline int32_t frame_take(int kind, uint8_t *to, const uint8_t *slot, uint32_t size, uint32_t *mark) {
    enum { HEAD = sizeof(net_hdr) + IPV6_HEADER }; /* FRAME_LEAST: every element has that much */
    uint16_t length;
    int32_t n;
    net_hdr h;
    *mark = 0;
    if (kind == FRAME_RAW) {
        copy_bytes(to, slot, size);
        return (int32_t)size;
    }
    if (kind == FRAME_ETH) {
        memcpy(&length, slot + size - ETH_LENGTH, sizeof(length));
        if (length < ETH_HEADER || length > size - ETH_LENGTH)
            return FRAME_LENGTH;
        copy_bytes(to, slot, length);
        return length;
    }
    memcpy(to, slot, HEAD);
    memcpy(&h, to, sizeof(h));
    n = ip_length(to + sizeof(h));
    if (n == FRAME_NOT_IP || !frame_agrees(h, to[sizeof(h)] >> 4))
        return FRAME_PROTOCOL;
    if (n < 0 || (uint32_t)n > size - sizeof(h))
        return FRAME_LENGTH;
    if (n > IPV6_HEADER)
        copy_bytes(to + HEAD, slot + HEAD, (uint32_t)n - IPV6_HEADER);
    *mark = h.mark;
    return n;
}

#endif
