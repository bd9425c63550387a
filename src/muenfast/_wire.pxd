"""Cython's view of _wire.h, _atomics.h and _copy.h; the headers own layout and meaning, this file only declares."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "_atomics.h" nogil:
    uint64_t load_relaxed64(const uint64_t *p) noexcept
    uint64_t load_acquire64(const uint64_t *p) noexcept
    void store_relaxed64(uint64_t *p, uint64_t v) noexcept
    void store_release64(uint64_t *p, uint64_t v) noexcept
    uint32_t load_relaxed32(const uint32_t *p) noexcept
    uint32_t load_acquire32(const uint32_t *p) noexcept
    void store_relaxed32(uint32_t *p, uint32_t v) noexcept
    void store_release32(uint32_t *p, uint32_t v) noexcept
    uint32_t exchange_acqrel32(uint32_t *p, uint32_t v) noexcept
    bint compare_exchange_acqrel32(uint32_t *p, uint32_t seen, uint32_t v) noexcept
    uint32_t fetch_add_acqrel32(uint32_t *p, uint32_t v) noexcept
    uint64_t fetch_add_relaxed64(uint64_t *p, uint64_t v) noexcept
    void count64(uint64_t *p, uint64_t n) noexcept
    void fence_acquire() noexcept
    void fence_release() noexcept
    void fence_seq_cst() noexcept
    void cpu_pause() noexcept
    const uint64_t SPIN_ALONE_NS
    void spin_once(uint64_t passed) noexcept
    ctypedef struct spin_habit:
        pass
    bint spin_pays(spin_habit *h) noexcept
    void spin_paid(spin_habit *h) noexcept
    void spin_in_vain(spin_habit *h) noexcept
    void prefetch_write(const void *p) noexcept
    uint64_t now_ns() noexcept
    void sleep_ns(uint64_t ns) noexcept
    int futex_wait_ns(uint32_t *word, uint32_t seen, uint64_t ns) noexcept
    int futex_wake_all(uint32_t *word) noexcept
    ctypedef struct futex_entry:
        uint64_t seen
        uint64_t word
    futex_entry futex_entry_of(uint32_t *word, uint32_t seen) noexcept
    int futex_wait_any_ns(futex_entry *list, unsigned int n, uint64_t ns) noexcept
    const int FUTEX_LIST_MOST
    int online_cpus() noexcept
    bint busy_enter(uint32_t *flag) noexcept
    void busy_leave(uint32_t *flag) noexcept


cdef extern from "_copy.h" nogil:
    void copy_bytes(void *to, const void *source, size_t n) noexcept
    void copy_payload(void *to, const void *source, size_t n) noexcept
    void copy_taken(void *to, const void *source, size_t n) noexcept
    ctypedef struct copy_giver:
        pass
    void copy_given(copy_giver *g, void *to, const void *source, size_t n) noexcept


cdef extern from "_wire.h" nogil:
    const uint64_t SHMSTREAM_TRANSPORT
    const uint64_t SHMSTREAM_HEADER_SIZE
    const uint64_t BLOCK_SIZE
    const uint64_t SECTOR_SIZE
    const uint64_t BLOCK_REQUEST_PROTOCOL
    const uint64_t BLOCK_RESPONSE_PROTOCOL
    const uint64_t BUFFER_PROTOCOL
    const uint64_t BELL_MAGIC
    const uint32_t EVENT_READ
    const uint32_t EVENT_WRITE
    const uint32_t EVENT_COMMAND
    const uint64_t COMMAND_SYNC
    const uint64_t COMMAND_SIZE
    const uint16_t REQUEST_NONE
    const uint16_t REQUEST_READ
    const uint16_t REQUEST_WRITE
    const uint16_t REQUEST_DISCARD
    const uint16_t REQUEST_SYNC
    const uint16_t REQUEST_SMART
    const uint16_t REQUEST_MEDIA_BLOCKS
    const uint16_t REQUEST_BLOCK_LENGTH
    const uint16_t REQUEST_MAX_REQUESTS
    const uint16_t REQUEST_MAX_BLOCKS
    const uint16_t REQUEST_MAX_DEVICES
    const uint16_t REQUEST_RESET
    const uint64_t SMART_UNAVAILABLE
    const uint64_t SMART_OK
    const uint64_t SMART_EXCEEDED
    const uint64_t SMART_UNDEFINED
    const uint64_t SMART_SIZE
    const uint32_t ENDPOINT_NONE
    const uint32_t ENDPOINT_SERVING
    const uint32_t ENDPOINT_BACK_LATER
    const uint32_t ENDPOINT_GONE
    const uint32_t ENDPOINT_RESIZING
    const uint32_t STORE_READ_ONLY
    const uint32_t STORE_FLAGS

    ctypedef struct ring_header:
        uint64_t transport
        uint64_t epoch
        uint64_t protocol
        uint64_t size
        uint64_t elements
        uint64_t reserved
        uint64_t wsc
        uint64_t wc

    ctypedef struct block_event_header:
        uint32_t kind
        int32_t error
        uint64_t id
        uint32_t valid
        uint32_t priv

    ctypedef struct block_event:
        block_event_header header
        uint8_t data[4096]

    const uint64_t OFFER_MAGIC
    const uint64_t ACCEPT_MAGIC
    const uint32_t OFFER_AGAIN
    const uint32_t ACCEPT_AGAIN

    ctypedef struct block_offer:
        uint64_t sectors
        uint64_t magic
        uint64_t nonce
        uint32_t sum
        uint32_t again

    ctypedef struct block_request:
        uint16_t kind
        uint16_t device
        uint32_t tag
        uint64_t length
        uint64_t device_offset
        uint64_t buffer_offset

    ctypedef struct block_response:
        uint16_t kind
        uint16_t device
        uint32_t tag
        uint64_t status

    ctypedef struct bell_page:
        uint64_t magic
        uint32_t seq
        uint32_t waiters
        uint64_t ringer
        uint32_t state
        uint32_t flags
        uint8_t store[16]
        uint32_t zeroes
        uint64_t reader_rc
        uint64_t reader_epoch
        uint32_t reader_sums
