/* Packets as they stand in memory: IPv4, IPv6, TCP, UDP, ICMP, and the header of TUN devices before them; no Python.h.
 *
 * Offsets and numbers: RFC 791, 8200, 9293, 768, 792, 4443; linux/virtio_net.h. Fields may stand at any address.
 */
#ifndef MUENFAST_INET_H
#define MUENFAST_INET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_checksum.h"
#include "_wire.h"

enum { INET_HOP = 0, INET_ICMP = 1, INET_TCP = 6, INET_UDP = 17, INET_ROUTING = 43, INET_FRAGMENT = 44, INET_AUTH = 51,
       INET_ICMP6 = 58, INET_NONE = 59, INET_DESTINATION = 60 }; /* protocol, next header */
enum { INET_MOST = 65535 };                                    /* bytes of a packet */

enum { IP4_TOS = 1, IP4_LENGTH = 2, IP4_ID = 4, IP4_FRAGMENT = 6, IP4_TTL = 8, IP4_PROTOCOL = 9, IP4_CHECK = 10,
       IP4_SOURCE = 12, IP4_TARGET = 16, IP4_SIZE = 20, IP4_SIZE_MOST = 60 };
enum { IP4_DF = 0x4000, IP4_MF = 0x2000, IP4_OFFSET = 0x1fff }; /* of IP4_FRAGMENT */
enum { IP6_LENGTH = 4, IP6_NEXT = 6, IP6_HOPS = 7, IP6_SOURCE = 8, IP6_TARGET = 24, IP6_SIZE = 40 };
enum { TCP_SEQUENCE = 4, TCP_ACK = 8, TCP_OFFSET = 12, TCP_FLAGS = 13, TCP_WINDOW = 14, TCP_CHECK = 16, TCP_URGENT = 18,
       TCP_SIZE = 20, TCP_SIZE_MOST = 60 };
enum { TCP_FIN = 0x01, TCP_PSH = 0x08, TCP_IS_ACK = 0x10, TCP_CWR = 0x80 };
enum { UDP_LENGTH = 4, UDP_CHECK = 6, UDP_SIZE = 8 };

/* struct virtio_net_hdr, in the machine's order as a TUN device has it unless told otherwise. */
enum { VNET_NEEDS_CHECKSUM = 1 }; /* flags */
enum { VNET_NONE = 0, VNET_TCP4 = 1, VNET_TCP6 = 4, VNET_UDP = 5, VNET_ACCECN = 0x10, VNET_ECN = 0x80 }; /* kind */

typedef struct {
    uint8_t flags;
    uint8_t kind;
    uint16_t headers;      /* bytes; a hint only */
    uint16_t size;         /* of a segment's payload */
    uint16_t sum_start;    /* the checksum covers from here to the end ... */
    uint16_t sum_offset;   /* ... and stands so far behind that; it holds the pseudo-header's sum */
} vnet_header;
MF_SIZE(vnet_header, 10);
MF_OFFSET(vnet_header, size, 4);
MF_OFFSET(vnet_header, sum_offset, 8);

static inline uint16_t net16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }

static inline uint32_t net32(const uint8_t *p) { return (uint32_t)net16(p) << 16 | net16(p + 2); }

static inline void put_net16(uint8_t *p, uint32_t v) {
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static inline void put_net32(uint8_t *p, uint32_t v) {
    put_net16(p, v >> 16);
    put_net16(p + 2, v);
}

/* The sum of a number below 65536 as a packet holds it. */
static inline uint64_t sum_number(uint32_t v) {
    uint8_t p[2];
    put_net16(p, v);
    return sum_word(p);
}

static inline void put_checksum(uint8_t *p, uint64_t sum) {
    uint16_t v = sum_checksum(sum);
    memcpy(p, &v, 2);
}

/* UDP's, where 0 means that there is none. */
static inline void put_udp_checksum(uint8_t *p, uint64_t sum) {
    uint16_t v = sum_checksum(sum);
    v = v != 0 ? v : 0xffff;
    memcpy(p, &v, 2);
}

/* IPv4's own checksum, anew. header: bytes. */
static inline void put_ip4_checksum(uint8_t *packet, uint32_t header) {
    put_net16(packet + IP4_CHECK, 0);
    put_checksum(packet + IP4_CHECK, sum_header(packet, header));
}

/* Of addresses, protocol, and the length of what they carry. */
static inline uint64_t sum_pseudo4(const uint8_t *packet, uint32_t protocol, uint32_t length) {
    return sum_header(packet + IP4_SOURCE, 8) + sum_number(protocol) + sum_number(length);
}

static inline uint64_t sum_pseudo6(const uint8_t *packet, uint32_t protocol, uint32_t length) {
    return sum_header(packet + IP6_SOURCE, 32) + sum_number(protocol) + sum_number(length);
}

/* Where the extension headers of an IPv6 packet end, and with what: *next is the header there, *fragment the offset of a
 * fragment header, or 0. Stops before what is no such header, and behind the header of a fragment that is not the first
 * one. 0: cut short. length: bytes of the packet that there are. */
static inline uint32_t ip6_upper(const uint8_t *packet, uint32_t length, uint8_t *next, uint32_t *fragment) {
    uint32_t at = IP6_SIZE;
    *fragment = 0;
    *next = packet[IP6_NEXT];
    while (*next == INET_HOP || *next == INET_ROUTING || *next == INET_DESTINATION || *next == INET_FRAGMENT ||
           *next == INET_AUTH) {
        uint32_t size;
        if (length < at + 8)
            return 0;
        size = *next == INET_FRAGMENT ? 8 : *next == INET_AUTH ? (packet[at + 1] + 2u) * 4 : (packet[at + 1] + 1u) * 8;
        if (length < at + size)
            return 0;
        if (*next == INET_FRAGMENT)
            *fragment = at;
        *next = packet[at];
        at += size;
        if (*fragment == at - 8 && (net16(packet + *fragment + 2) & 0xfff8) != 0)
            break;
    }
    return at;
}

#endif
