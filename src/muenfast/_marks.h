/* Marks on their way between net_hdr and the kernel, and which interface of a parent an incoming one belongs to; no Python.h.
 *
 * Out, the eBPF program of bpf.py puts net_hdr in front of the packet that read(2) returns. Its length is stale where the
 * kernel cut the packet from a larger one: the reader makes it bytes read less 8. With struct virtio_net_hdr in front
 * marks_vnet_out is due, too. In, a prefix of as many bytes carries the mark; in a private copy of an element it takes
 * net_hdr's place. The prefix has a first byte by which the TUN device tells IPv4 from IPv6,
 * and cannot be the beginning of a packet that is written: an IPv4 header of length 0, or IPv6 with a payload of 65535 bytes,
 * which no element holds and a writer must refuse.
 *
 * | byte   | 0            | 1 | 2, 3              | 4, 5   | 6, 7               |
 * | prefix | 0x40 or 0x60 | 0 | mark, lower half  | 0xffff | mark, upper half   |   halves in machine order
 */
#ifndef MUENFAST_MARKS_H
#define MUENFAST_MARKS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_turns.h"

#define MARKS_HEADER 8u         /* bytes of net_hdr and of the prefix */

/* Offsets in struct virtio_net_hdr (linux/virtio_net.h), whose order is the machine's unless TUNSETVNETBE or -LE say other. */
enum { VNET_FLAGS = 0, VNET_GSO_TYPE = 1, VNET_HDR_LEN = 2, VNET_CSUM_START = 6, VNET_NEEDS_CSUM = 1 };

static inline void marks_vnet_move(uint8_t *vnet, int offset, int by) {
    uint16_t value;
    memcpy(&value, vnet + offset, sizeof value);
    int moved = value + by;
    value = (uint16_t)(moved < 0 ? 0 : moved > UINT16_MAX ? UINT16_MAX : moved);
    memcpy(vnet + offset, &value, sizeof value);
}

/* struct virtio_net_hdr that was read together with net_hdr: what it says counts from the packet's first byte on. */
static inline void marks_vnet_out(uint8_t *vnet) {
    if (vnet[VNET_FLAGS] & VNET_NEEDS_CSUM)
        marks_vnet_move(vnet, VNET_CSUM_START, -(int)MARKS_HEADER);
    if (vnet[VNET_GSO_TYPE])
        marks_vnet_move(vnet, VNET_HDR_LEN, -(int)MARKS_HEADER);
}

/* struct virtio_net_hdr of a packet that is going to be written behind a prefix. */
static inline void marks_vnet_in(uint8_t *vnet) {
    if (vnet[VNET_FLAGS] & VNET_NEEDS_CSUM)
        marks_vnet_move(vnet, VNET_CSUM_START, (int)MARKS_HEADER);
    if (vnet[VNET_GSO_TYPE])
        marks_vnet_move(vnet, VNET_HDR_LEN, (int)MARKS_HEADER);
}

/* The prefix of a packet that begins with `first`, which is one of IPv4 or IPv6. `to` has MARKS_HEADER bytes. */
static inline void marks_prefix(uint8_t *to, uint8_t first, uint32_t mark) {
    uint16_t low = (uint16_t)mark, high = (uint16_t)(mark >> 16);
    to[0] = first & 0xf0;
    to[1] = 0;
    memcpy(to + 2, &low, sizeof low);
    to[4] = to[5] = 0xff;
    memcpy(to + 6, &high, sizeof high);
}

/* Which child of one parent a mark belongs to. Two sides: one thread that receives, without the GIL, and who changes it.
 *
 * child[mark] is one word, 0 (the parent) or a child's number: a change is one store, and the receiver sees the mark with its old
 * or its new owner, nothing else; the array is never moved. What has to be waited for is the end of a child: a receiver may
 * just have taken its number. Around what it does with numbers the receiver calls marks_enter and marks_leave (`turn` is
 * odd in between); who took a child's marks away closes its interface only once marks_settled says so.
 */
typedef struct {
    uint32_t *child;        /* highest + 1 words */
    uint32_t highest;       /* mark */
    uint32_t turn;          /* the receiver's */
} mark_table_t;

static inline uint32_t marks_child(const mark_table_t *t, uint32_t mark) {
    return mark <= t->highest ? load_relaxed32(&t->child[mark]) : 0;
}

/* The receiver's turns (_turns.h). */
static inline void marks_enter(mark_table_t *t) { turn_enter(&t->turn); }
static inline void marks_leave(mark_table_t *t) { turn_leave(&t->turn); }
static inline uint32_t marks_turn(const mark_table_t *t) { return turn_now(&t->turn); }
static inline int marks_settled(const mark_table_t *t, uint32_t then) { return turn_over(&t->turn, then); }

#endif
