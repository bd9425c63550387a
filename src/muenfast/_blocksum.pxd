"""Cython's view of _blocksum.h, and what an end does about checksums."""
from libc.stdint cimport uint32_t, uint64_t

from muenfast._wire cimport block_event_header, block_offer, block_request, block_response

cdef extern from "_blocksum.h" nogil:
    const uint32_t CRC32C_FIRST
    uint32_t crc32c(uint32_t state, const void *p, size_t n) noexcept
    uint32_t event_sum(uint32_t state, const block_event_header *h, uint64_t number, uint64_t epoch) noexcept
    uint32_t offer_sum(const block_offer *o, const block_event_header *h, uint64_t number, uint64_t epoch) noexcept
    const int OFFER_NONE
    const int OFFER_GOOD
    const int OFFER_GARBLED
    int offer_look(const block_offer *o, const block_event_header *h, uint64_t number, uint64_t epoch) noexcept
    int answer_look(const block_offer *o, uint64_t nonce) noexcept
    uint32_t request_sum(uint32_t state, const block_request *r, uint64_t number, uint64_t epoch) noexcept
    uint32_t response_sum(uint32_t state, const block_response *r, uint64_t number, uint64_t epoch) noexcept
    void request_offer(block_request *r, uint64_t nonce, uint64_t epoch) noexcept
    int request_look(const block_request *r, uint64_t epoch) noexcept
    uint32_t accept_state(uint64_t nonce) noexcept
    int accept_look(const block_response *r, uint64_t nonce, uint64_t number, uint64_t epoch) noexcept


cdef enum:                  # what an end does about checksums
    CHECKSUM_OFF = 0        # none
    CHECKSUM_AUTO = 1       # where the other side has them, too
    CHECKSUM_REQUIRE = 2    # or nothing at all
