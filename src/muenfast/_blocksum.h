/* Checksums of block messages between two muenfast peers: how they are agreed upon and what they cover; no Python.h.
 *
 * docs/protocol.md, "Checksums", has the bytes. A CRC-32C finds what went wrong, no forger: who may write a channel may
 * write checksums, too.
 */
#ifndef MUENFAST_BLOCKSUM_H
#define MUENFAST_BLOCKSUM_H

#include <stdbool.h>

#include "_crc32c.h"
#include "_wire.h"

/* What a checksum covers behind the block that the event carries, if it carries one: with it an element that is whole, but
 * another epoch's, or stood elsewhere or a round ago, is wrong. */
typedef struct {
    block_event_header header; /* valid: 0 */
    uint64_t number;           /* of the element, from 0 in each epoch */
    uint64_t epoch;            /* of its channel */
} block_event_cover;
MF_SIZE(block_event_cover, 40);

/* state: behind the block, or CRC32C_FIRST. */
static inline uint32_t event_sum(uint32_t state, const block_event_header *h, uint64_t number, uint64_t epoch) {
    block_event_cover cover = {*h, number, epoch};
    cover.header.valid = 0;
    return ~crc32c(state, &cover, sizeof cover);
}

static inline uint32_t offer_sum(const block_offer *o, const block_event_header *h, uint64_t number, uint64_t epoch) {
    block_offer cover = *o;
    cover.sum = 0;
    return event_sum(crc32c(CRC32C_FIRST, &cover, sizeof cover), h, number, epoch);
}

enum { OFFER_NONE = 0, OFFER_GOOD = 1, OFFER_GARBLED = -1 };

/* What stands in a request for the size, h and o copies of it. One that has any sign of an offer is one. */
static inline int offer_look(const block_offer *o, const block_event_header *h, uint64_t number, uint64_t epoch) {
    if (o->magic != OFFER_MAGIC && o->again != OFFER_AGAIN)
        return OFFER_NONE;
    return o->magic == OFFER_MAGIC && o->again == OFFER_AGAIN && o->sum == offer_sum(o, h, number, epoch) ? OFFER_GOOD
                                                                                                         : OFFER_GARBLED;
}

/* What stands in an answer to an offer with that nonce: OFFER_GARBLED where it is wrong by itself; its checksum is for the
 * caller to check. A server without checksums may have left there what it was sent. */
static inline int answer_look(const block_offer *o, uint64_t nonce) {
    bool magic = o->magic == ACCEPT_MAGIC, again = o->again == ACCEPT_AGAIN, mine = o->nonce == ~nonce;
    if (!magic && !again && !mine)
        return OFFER_NONE;
    return magic && again && mine && o->sum == 0 ? OFFER_GOOD : OFFER_GARBLED;
}

#endif
