/* Checksums of block messages between two muenfast peers: how they are agreed upon and what they cover; no Python.h.
 *
 * docs/protocol.md, "Checksums", has the bytes. A CRC-32C finds what went wrong, no forger: who may write a channel may
 * write checksums, too.
 */
#ifndef MUENFAST_BLOCKSUM_H
#define MUENFAST_BLOCKSUM_H

#include <stdbool.h>
#include <string.h>

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

/* Beside a shared buffer. What a checksum covers behind the data of the request in the buffer, where it moved some. */
typedef struct {
    block_request request; /* the upper half of length: 0 */
    uint64_t number;
    uint64_t epoch;
} block_request_cover;
MF_SIZE(block_request_cover, 48);

typedef struct {
    block_response response; /* the upper half of status: 0 */
    uint64_t number;
    uint64_t epoch;
} block_response_cover;
MF_SIZE(block_response_cover, 32);

static inline uint32_t request_sum(uint32_t state, const block_request *r, uint64_t number, uint64_t epoch) {
    block_request_cover cover = {*r, number, epoch};
    cover.request.length = (uint32_t)r->length;
    return ~crc32c(state, &cover, sizeof cover);
}

static inline uint32_t response_sum(uint32_t state, const block_response *r, uint64_t number, uint64_t epoch) {
    block_response_cover cover = {*r, number, epoch};
    cover.response.status = (uint32_t)r->status;
    return ~crc32c(state, &cover, sizeof cover);
}

/* Makes an offer of a Reset; that of number 0 in its epoch. */
static inline void request_offer(block_request *r, uint64_t nonce, uint64_t epoch) {
    block_request_cover cover;
    r->length = OFFER_MAGIC;
    r->device_offset = nonce;
    r->buffer_offset = (uint64_t)OFFER_AGAIN << 32;
    cover = (block_request_cover){*r, 0, epoch};
    r->buffer_offset |= (uint32_t)~crc32c(CRC32C_FIRST, &cover, sizeof cover);
}

/* What the first request of an epoch is, r a copy of it: as offer_look(). */
static inline int request_look(const block_request *r, uint64_t epoch) {
    block_request offer = *r;
    if (r->kind != REQUEST_RESET || (r->length != OFFER_MAGIC && r->buffer_offset >> 32 != OFFER_AGAIN))
        return OFFER_NONE;
    request_offer(&offer, r->device_offset, epoch);
    return memcmp(&offer, r, sizeof offer) == 0 ? OFFER_GOOD : OFFER_GARBLED;
}

/* The state before a response that accepts an offer; its status is ACCEPT_AGAIN. */
static inline uint32_t accept_state(uint64_t nonce) {
    return crc32c(CRC32C_FIRST, &nonce, sizeof nonce);
}

/* What answers a Reset that offers: as answer_look(). A plain server says that it is done, or an error's small number. */
static inline int accept_look(const block_response *r, uint64_t nonce, uint64_t number, uint64_t epoch) {
    if (r->status <= 4095)
        return OFFER_NONE;
    return (uint32_t)r->status == ACCEPT_AGAIN && r->status >> 32 == response_sum(accept_state(nonce), r, number, epoch)
               ? OFFER_GOOD : OFFER_GARBLED;
}

#endif
