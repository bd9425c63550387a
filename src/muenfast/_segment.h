/* Super-packets, as a TUN device gives them, into packets that fit an element; no Python.h.
 *
 * Packet and header come from the local kernel, but nothing is read beyond them whatever they say. Segments are what the
 * kernel itself would have made (tcp_gso_segment, __udp_gso_segment, inet_gso_segment): sequence numbers go up, PSH and FIN
 * stand on the last one, CWR on the first, IPv4's identification counts; every checksum is complete. The pseudo-header's
 * sum is taken from where the kernel left it: with a routing header the addresses are not those of the packet.
 */
#ifndef MUENFAST_SEGMENT_H
#define MUENFAST_SEGMENT_H

#include "_inet.h"

enum segment_status {
    SEGMENT_NOT_IP = -1,   /* neither IPv4 nor IPv6 */
    SEGMENT_SHORT = -2,    /* ends before its headers do */
    SEGMENT_LENGTH = -3,   /* its own length is not that of what came */
    SEGMENT_LONG = -4,     /* longer than the MTU, and nothing to be split */
    SEGMENT_CHECKSUM = -5, /* where its checksum is to stand or begin is impossible, or it has none that is to be completed */
    SEGMENT_KIND = -6,     /* a kind of super-packet that was not asked for */
    SEGMENT_SIZE = -7,     /* segments of no bytes */
    SEGMENT_HEADERS = -8,  /* its headers are not those of its kind, or too long */
    SEGMENT_EMPTY = -9     /* carries nothing */
};

enum { SEGMENT_HEADER = 256 }; /* most bytes of all headers of a super-packet */

typedef struct segmenter {
    const uint8_t *packet;  /* the caller's, unchanged until the last segment */
    uint32_t length;
    uint32_t left;          /* segments to come */
    uint32_t header;        /* bytes that each segment has; 0: a packet that stays whole */
    uint32_t transport;     /* where the checksum begins, ... */
    uint32_t check;         /* ... and where it stands; 0: nothing is to be completed */
    uint32_t size;          /* payload of all segments but the last */
    uint32_t at;            /* the next one's payload */
    uint32_t sequence;
    uint16_t id;
    uint8_t flags;          /* TCP's, of the super-packet */
    bool ip4, tcp, every;   /* every: CWR stands on each (AccECN) */
    uint64_t ip_sum, sum;   /* of the header as it stands in `first`, and what does not change of the pseudo-header */
    uint8_t first[SEGMENT_HEADER]; /* the headers, with zeros for what each segment has of its own */
} segmenter;

/* The longest segment, bytes. */
static inline uint32_t segment_longest(const segmenter *s) {
    uint32_t whole = s->header + s->size;
    return s->header == 0 || whole > s->length ? s->length : whole;
}

static inline int segment_begin_whole(segmenter *s, const vnet_header *v, uint32_t ip, uint32_t mtu) {
    if (s->length > mtu)
        return SEGMENT_LONG;
    if (v->flags & VNET_NEEDS_CHECKSUM) {
        uint32_t start = v->sum_start, check = start + v->sum_offset;
        if (start < ip || v->sum_offset % 2 != 0 || check + 2 > s->length)
            return SEGMENT_CHECKSUM;
        s->transport = start;
        s->check = check;
    }
    return 1;
}

/* Takes a packet as a TUN device gave it: how many there will be, or a segment_status. mtu: most bytes of one of them; TCP's
 * segments become shorter where they have to, datagrams cannot. */
static inline int segment_begin(segmenter *s, const vnet_header *v, const uint8_t *packet, uint32_t length, uint32_t mtu) {
    uint8_t kind = v->kind & (uint8_t)~(VNET_ECN | VNET_ACCECN), protocol;
    uint32_t ip, upper, fragment = 0, payload, minimum;
    s->packet = packet;
    s->length = length;
    s->left = 1;
    s->header = s->check = s->at = s->size = 0;
    if (length == 0)
        return SEGMENT_SHORT;
    s->ip4 = packet[0] >> 4 == 4;
    if (!s->ip4 && packet[0] >> 4 != 6)
        return SEGMENT_NOT_IP;
    ip = s->ip4 ? (packet[0] & 15u) * 4 : IP6_SIZE;
    if (length < (s->ip4 ? IP4_SIZE : IP6_SIZE) || length < ip || ip < IP4_SIZE)
        return SEGMENT_SHORT;
    if (length != (s->ip4 ? net16(packet + IP4_LENGTH) : IP6_SIZE + (uint32_t)net16(packet + IP6_LENGTH)))
        return SEGMENT_LENGTH;
    if (v->kind == VNET_NONE)
        return segment_begin_whole(s, v, ip, mtu);
    if (kind != VNET_TCP4 && kind != VNET_TCP6 && kind != VNET_UDP)
        return SEGMENT_KIND;
    if (v->size == 0)
        return SEGMENT_SIZE;
    s->tcp = kind != VNET_UDP;
    if (s->ip4) {
        upper = ip;
        protocol = packet[IP4_PROTOCOL];
        if ((net16(packet + IP4_FRAGMENT) & (IP4_MF | IP4_OFFSET)) != 0)
            return SEGMENT_HEADERS;
    } else {
        upper = ip6_upper(packet, length, &protocol, &fragment);
        if (upper == 0)
            return SEGMENT_SHORT;
    }
    if (fragment != 0 || protocol != (s->tcp ? INET_TCP : INET_UDP) || (s->tcp && s->ip4 != (kind == VNET_TCP4)))
        return SEGMENT_HEADERS;
    minimum = s->tcp ? TCP_SIZE : UDP_SIZE;
    if (length < upper + minimum)
        return SEGMENT_SHORT;
    if (!(v->flags & VNET_NEEDS_CHECKSUM) || v->sum_start != upper || v->sum_offset != (s->tcp ? TCP_CHECK : UDP_CHECK))
        return SEGMENT_CHECKSUM;
    s->header = upper + minimum;
    if (s->tcp)
        s->header = upper + (packet[upper + TCP_OFFSET] >> 4) * 4u;
    else if (net16(packet + upper + UDP_LENGTH) != length - upper)
        return SEGMENT_LENGTH;
    if (s->header < upper + minimum || s->header > SEGMENT_HEADER)
        return SEGMENT_HEADERS;
    if (length < s->header)
        return SEGMENT_SHORT;
    payload = length - s->header;
    if (payload == 0)
        return SEGMENT_EMPTY;
    s->size = v->size;
    if (s->header + (s->size < payload ? s->size : payload) > mtu) {
        if (!s->tcp || mtu <= s->header)
            return SEGMENT_LONG;
        s->size = mtu - s->header;
    }
    s->transport = upper;
    s->check = upper + v->sum_offset;
    memcpy(s->first, packet, s->header);
    /* what the kernel left there is the pseudo-header's sum, with the super-packet's length */
    s->sum = sum_word(s->first + s->check) + (uint16_t)~sum_number(length - upper);
    put_net16(s->first + s->check, 0);
    if (s->ip4) {
        s->id = net16(packet + IP4_ID);
        put_net16(s->first + IP4_LENGTH, 0);
        put_net16(s->first + IP4_ID, 0);
        put_net16(s->first + IP4_CHECK, 0);
        s->ip_sum = sum_header(s->first, ip);
    }
    if (s->tcp) {
        s->sequence = net32(packet + upper + TCP_SEQUENCE);
        s->flags = packet[upper + TCP_FLAGS];
        s->every = (v->kind & VNET_ACCECN) != 0;
        put_net32(s->first + upper + TCP_SEQUENCE, 0);
        s->first[upper + TCP_FLAGS] = 0;
    } else
        put_net16(s->first + upper + UDP_LENGTH, 0);
    s->sum += sum_header(s->first + upper, s->header - upper);
    s->left = (payload + s->size - 1) / s->size;
    return (int)s->left;
}

/* Completes, where it stands, the checksum of a packet that stays whole, unless it has it: 0 or a segment_status. Others may
 * change the bytes meanwhile: none beyond `length` is touched. scratch: any segmenter, used up. */
static inline int segment_complete(segmenter *scratch, const vnet_header *v, uint8_t *packet, uint32_t length) {
    int status = segment_begin(scratch, v, packet, length, length);
    scratch->left = 0;
    if (status < 0)
        return status;
    if (scratch->check != 0)
        put_udp_checksum(packet + scratch->check, sum_bytes(packet + scratch->transport, length - scratch->transport));
    return 0;
}

/* The IP header of the last segment, but for its checksum, in private memory. */
static inline const uint8_t *segment_head(const segmenter *s) { return s->header == 0 ? s->packet : s->first; }

static inline uint32_t segment_next_whole(segmenter *s, uint8_t *to) {
    uint64_t sum;
    uint8_t check[2];
    if (s->check == 0) {
        copy_bytes(to, s->packet, s->length);
        return s->length;
    }
    copy_bytes(to, s->packet, s->transport);
    sum = sum_given(to + s->transport, s->packet + s->transport, s->length - s->transport);
    put_udp_checksum(check, sum); /* 0 and 65535 are one number to all others */
    memcpy(to + s->check, check, 2);
    return s->length;
}

/* Writes the next packet: its bytes, at most the MTU. Precondition: one is left. `to` may be others' to read and write:
 * nothing is read from there. */
static inline uint32_t segment_next(segmenter *s, uint8_t *to) {
    uint8_t *h = s->first;
    uint32_t done = s->at, n, whole, t = s->transport;
    uint64_t sum = s->sum;
    bool last;
    s->left--;
    if (s->header == 0)
        return segment_next_whole(s, to);
    n = s->length - s->header - done;
    n = n < s->size ? n : s->size;
    last = s->left == 0;
    whole = s->header + n;
    s->at += n;
    if (s->ip4) {
        put_net16(h + IP4_LENGTH, whole);
        put_net16(h + IP4_ID, s->id);
        put_checksum(h + IP4_CHECK, s->ip_sum + sum_number(whole) + sum_number(s->id));
        s->id++;
    } else
        put_net16(h + IP6_LENGTH, whole - IP6_SIZE);
    sum += sum_number(whole - t);
    if (s->tcp) {
        uint8_t flags = s->flags, word[2];
        if (!last)
            flags &= (uint8_t)~(TCP_FIN | TCP_PSH);
        if (done != 0 && !s->every)
            flags &= (uint8_t)~TCP_CWR;
        put_net32(h + t + TCP_SEQUENCE, s->sequence + done);
        h[t + TCP_FLAGS] = flags;
        word[0] = 0; /* the byte before the flags is summed already */
        word[1] = flags;
        sum += sum_number(net16(h + t + TCP_SEQUENCE)) + sum_number(net16(h + t + TCP_SEQUENCE + 2)) + sum_word(word);
    } else {
        put_net16(h + t + UDP_LENGTH, whole - t);
        sum += sum_number(whole - t);
    }
    sum += sum_given(to + s->header, s->packet + s->header + done, n);
    memcpy(to, h, s->header); /* now that what was stored there in pieces has long arrived */
    if (s->tcp)
        put_checksum(to + s->check, sum);
    else
        put_udp_checksum(to + s->check, sum);
    return whole;
}

#endif
