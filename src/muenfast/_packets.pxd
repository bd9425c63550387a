"""Cython's view of _checksum.h, _inet.h, _segment.h, _coalesce.h, _pmtu.h and _gather.h; the headers own meaning and rules."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "_checksum.h" nogil:
    uint64_t sum_bytes(const void *p, size_t n) noexcept
    uint64_t sum_given(void *to, const void *source, size_t n) noexcept
    uint64_t sum_taken(void *to, const void *source, size_t n) noexcept
    uint16_t sum_checksum(uint64_t sum) noexcept


cdef extern from "_inet.h" nogil:
    const uint32_t INET_MOST
    const uint8_t VNET_NEEDS_CHECKSUM
    const uint8_t VNET_NONE
    const uint8_t VNET_TCP4
    const uint8_t VNET_TCP6
    const uint8_t VNET_UDP
    const uint8_t VNET_ECN

    ctypedef struct vnet_header:
        uint8_t flags
        uint8_t kind
        uint16_t headers
        uint16_t size
        uint16_t sum_start
        uint16_t sum_offset

    uint16_t net16(const uint8_t *p) noexcept
    uint32_t net32(const uint8_t *p) noexcept
    void put_net16(uint8_t *p, uint32_t v) noexcept
    void put_net32(uint8_t *p, uint32_t v) noexcept


cdef extern from "_segment.h" nogil:
    const int SEGMENT_NOT_IP
    const int SEGMENT_SHORT
    const int SEGMENT_LENGTH
    const int SEGMENT_LONG
    const int SEGMENT_CHECKSUM
    const int SEGMENT_KIND
    const int SEGMENT_SIZE
    const int SEGMENT_HEADERS
    const int SEGMENT_EMPTY

    ctypedef struct segmenter:
        uint32_t left

    int segment_begin(segmenter *s, const vnet_header *v, const uint8_t *packet, uint32_t length, uint32_t mtu) noexcept
    int segment_complete(segmenter *scratch, const vnet_header *v, uint8_t *packet, uint32_t length) noexcept
    uint32_t segment_longest(const segmenter *s) noexcept
    uint32_t segment_next(segmenter *s, uint8_t *to) noexcept
    const uint8_t *segment_head(const segmenter *s) noexcept


cdef extern from "_coalesce.h" nogil:
    const uint32_t COALESCE_FLOWS
    const uint32_t COALESCE_MEMORY
    const uint32_t COALESCE_TCP4
    const uint32_t COALESCE_TCP6
    const uint32_t COALESCE_UDP
    const uint32_t COALESCE_ALL
    const int COALESCE_NOT_IP
    const int COALESCE_FRAME
    const int COALESCE_FULL

    ctypedef struct coalesce_ready:
        uint8_t *packet
        uint32_t length
        uint64_t key
        uint32_t segments

    ctypedef struct coalescer:
        uint64_t merged
        uint64_t supers
        uint64_t rejected

    void coalesce_init(coalescer *c, uint8_t *memory, uint32_t kinds) noexcept
    int coalesce_place(coalescer *c, const uint8_t *element, uint32_t limit, uint64_t key) noexcept
    uint32_t coalesce_version(const coalescer *c) noexcept
    uint32_t coalesce_commit(coalescer *c) noexcept
    uint32_t coalesce_flush(coalescer *c) noexcept
    const coalesce_ready *coalesce_take(coalescer *c) noexcept


cdef extern from "_pmtu.h" nogil:
    const uint32_t PMTU_NEWS_MOST
    const uint32_t PMTU_RATE
    const uint32_t PMTU_BURST
    enum pmtu_verdict:
        PMTU_FITS
        PMTU_FRAGMENTS
        PMTU_NEWS
        PMTU_NOTHING

    ctypedef struct pmtu_bucket:
        uint64_t since
        uint32_t tokens

    ctypedef struct pmtu_fragments:
        pass

    bint pmtu_allowed(pmtu_bucket *b, uint64_t now) noexcept
    uint32_t pmtu_of(uint32_t entry, uint8_t first) noexcept
    pmtu_verdict pmtu_look(const uint8_t *packet, uint32_t length, uint32_t limit) noexcept
    uint32_t pmtu_fragments_begin(pmtu_fragments *f, const uint8_t *packet, uint32_t length, uint32_t limit) noexcept
    uint32_t pmtu_fragments_next(pmtu_fragments *f, uint8_t *to) noexcept
    const uint8_t *pmtu_fragments_head(const pmtu_fragments *f) noexcept
    uint32_t pmtu_news(const uint8_t *packet, uint32_t length, uint32_t limit, uint8_t *to) noexcept


cdef extern from "_gather.h" nogil:
    const uint64_t GATHER_NS
    ctypedef struct gather:
        pass

    bint gather_now(gather *g, uint64_t packets, uint64_t now) noexcept
