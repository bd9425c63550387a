/* What `muenfast bench` holds the ring against: SHMStream v2 as plain C does it, one element at a time, in the steps of the
 * reader and writer that Muen publishes; written for this, no Python.h, nothing of _ring.pyx.
 *
 * Every call looks the header up where it lies and divides for the slot; one memcpy; the reader's counters are checked
 * after every copy. On x86 its atomics are plain loads and stores, as there. Not inlined: it is a library's function.
 */
#ifndef MUENFAST_PLAIN_H
#define MUENFAST_PLAIN_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "_atomics.h"
#include "_wire.h"

typedef enum { PLAIN_INACTIVE, PLAIN_NO_DATA, PLAIN_EPOCH, PLAIN_OVERRUN, PLAIN_SUCCESS } plain_status;

typedef struct {
    uint64_t epoch, protocol, size, elements, rc;
} plain_reader;

static void __attribute__((noinline)) plain_start(ring_header *h, uint64_t epoch, uint64_t protocol, uint64_t size,
                                                  uint64_t elements) {
    store_release64(&h->epoch, 0);
    fence_release();
    h->transport = SHMSTREAM_TRANSPORT;
    h->protocol = protocol;
    h->size = size;
    h->elements = elements;
    h->reserved = 0;
    store_relaxed64(&h->wsc, 0);
    store_relaxed64(&h->wc, 0);
    store_release64(&h->epoch, epoch);
}

static void __attribute__((noinline)) plain_write(ring_header *h, const void *element) {
    uint64_t wc = load_relaxed64(&h->wc), size = h->size;

    store_relaxed64(&h->wsc, wc + 1);
    fence_release();
    memcpy((uint8_t *)h + SHMSTREAM_HEADER_SIZE + wc % h->elements * size, element, size);
    store_release64(&h->wc, wc + 1);
}

/* Reads the oldest unread element; capacity: bytes of the channel. */
static plain_status __attribute__((noinline)) plain_read(plain_reader *r, const ring_header *h, uint64_t capacity,
                                                         void *element) {
    uint64_t epoch = load_acquire64(&h->epoch);
    plain_status result;

    if (epoch == 0) {
        r->epoch = 0;
        return PLAIN_INACTIVE;
    }
    if (epoch != r->epoch) {
        if (h->transport != SHMSTREAM_TRANSPORT || h->protocol != r->protocol || h->size != r->size || h->elements == 0 ||
            h->elements > (capacity - SHMSTREAM_HEADER_SIZE) / r->size)
            return PLAIN_INACTIVE;
        r->elements = h->elements;
        r->rc = 0;
        r->epoch = epoch;
        return PLAIN_EPOCH;
    }
    if (r->rc >= load_acquire64(&h->wc))
        return PLAIN_NO_DATA;
    memcpy(element, (const uint8_t *)h + SHMSTREAM_HEADER_SIZE + r->rc % r->elements * r->size, r->size);
    fence_acquire();
    if (load_relaxed64(&h->wsc) > r->rc + r->elements) {
        r->rc = load_acquire64(&h->wc);
        result = PLAIN_OVERRUN;
    } else {
        r->rc++;
        result = PLAIN_SUCCESS;
    }
    if (load_acquire64(&h->epoch) != r->epoch)
        return PLAIN_EPOCH;
    return result;
}

#endif
