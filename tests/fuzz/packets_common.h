/* For targets about packets: checksums by the definition (RFC 1071), and packets made of the input. */
#ifndef PACKETS_COMMON_H
#define PACKETS_COMMON_H

#include "fuzz.h"
#include "_inet.h"

static uint32_t words(const uint8_t *p, size_t n) { /* unfolded */
    uint32_t high = 0, low = 0;
    size_t i;
    for (i = 0; i + 1 < n; i += 2) {
        high += p[i];
        low += p[i + 1];
    }
    return (high + (i < n ? p[i] : 0u)) * 256 + low;
}
static uint16_t folded(uint32_t sum) {
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}
static bool right4(const uint8_t *p) { return folded(words(p, (p[0] & 15) * 4u)) == 0xffff; }
/* Of what the pseudo-header and everything from `upper` on add up to: 0xffff where a checksum is right. */
static uint16_t upper_sum(const uint8_t *p, uint32_t upper, uint32_t length, uint8_t protocol) {
    uint32_t sum = p[0] >> 4 == 4 ? words(p + IP4_SOURCE, 8) : words(p + IP6_SOURCE, 32);
    return folded(sum + protocol + (length - upper) + words(p + upper, length - upper));
}
static void put16(uint8_t *p, uint32_t v) {
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

/* A packet of TCP or UDP, mostly well-formed; its bytes. what: kind and sizes. */
typedef struct { bool ip4, tcp; uint32_t upper, header; uint8_t protocol; } shape;
static uint32_t make_packet(uint8_t *p, uint32_t payload, uint8_t kind, shape *s) {
    uint32_t length;
    s->ip4 = kind & 1;
    s->tcp = kind & 2;
    s->upper = s->ip4 ? IP4_SIZE : IP6_SIZE;
    s->protocol = s->tcp ? INET_TCP : INET_UDP;
    s->header = s->upper + (s->tcp ? TCP_SIZE + (kind >> 2 & 3) * 4u : UDP_SIZE);
    length = s->header + payload;
    memset(p, 0, s->header);
    if (s->ip4) {
        p[0] = 0x45;
        put16(p + IP4_LENGTH, length);
        p[IP4_TTL] = 64;
        p[IP4_PROTOCOL] = s->protocol;
        memcpy(p + IP4_SOURCE, "\x0a\0\0\1\x0a\0\0\2", 8);
    } else {
        p[0] = 0x60;
        put16(p + IP6_LENGTH, length - IP6_SIZE);
        p[IP6_NEXT] = s->protocol;
        p[IP6_HOPS] = 64;
        p[IP6_SOURCE] = p[IP6_TARGET] = 0xfd;
        p[IP6_SOURCE + 15] = 1;
        p[IP6_TARGET + 15] = 2;
    }
    put16(p + s->upper, 1000);
    put16(p + s->upper + 2, 2000);
    if (s->tcp) {
        p[s->upper + TCP_OFFSET] = (uint8_t)((s->header - s->upper) / 4 << 4);
        p[s->upper + TCP_FLAGS] = TCP_IS_ACK;
    } else
        put16(p + s->upper + UDP_LENGTH, length - s->upper);
    return length;
}
static void complete(uint8_t *p, uint32_t length, const shape *s) {
    uint8_t *check = p + s->upper + (s->tcp ? TCP_CHECK : UDP_CHECK);
    uint16_t sum;
    if (s->ip4) {
        put16(p + IP4_CHECK, 0);
        put16(p + IP4_CHECK, (uint16_t)~folded(words(p, IP4_SIZE)));
    }
    put16(check, 0);
    sum = (uint16_t)~upper_sum(p, s->upper, length, s->protocol);
    put16(check, sum != 0 ? sum : 0xffff);
}

#endif
