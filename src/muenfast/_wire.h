/* Wire formats: SHMStream v2 header, block events, block requests with a shared buffer, muenfast's own bell page; no
 * Python.h.
 *
 * Byte order is the machine's: both sides run on one machine. All fields are naturally aligned within their
 * struct; a ring element may start at any address, so elements are only ever touched through memcpy.
 */
#ifndef MUENFAST_WIRE_H
#define MUENFAST_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define MF_OFFSET(type, field, at) _Static_assert(offsetof(type, field) == (at), #type "." #field " moved")
#define MF_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " changed size")

/* SHMStream v2, written by the channel's writer alone. `epoch`, `wsc` and `wc` change while readers look;
 * the others are valid while epoch is non-zero. */
#define SHMSTREAM_TRANSPORT UINT64_C(0x487312b6b79a9b6d)
#define SHMSTREAM_HEADER_SIZE 64

typedef struct {
    uint64_t transport; /* SHMSTREAM_TRANSPORT, may be 0 while inactive */
    uint64_t epoch;     /* 0 = inactive; atomic */
    uint64_t protocol;  /* non-zero */
    uint64_t size;      /* bytes of one element */
    uint64_t elements;  /* number of elements */
    uint64_t reserved;  /* zero, ignored; ACCEPT_MAGIC: elements end with checksums (_frame.h) */
    uint64_t wsc;       /* write start counter: raised before an element is touched; atomic */
    uint64_t wc;        /* write counter: raised after an element is complete; atomic */
} ring_header;
MF_SIZE(ring_header, SHMSTREAM_HEADER_SIZE);
_Static_assert(_Alignof(ring_header) == 8, "ring_header alignment");
MF_OFFSET(ring_header, transport, 0);
MF_OFFSET(ring_header, epoch, 8);
MF_OFFSET(ring_header, protocol, 16);
MF_OFFSET(ring_header, size, 24);
MF_OFFSET(ring_header, elements, 32);
MF_OFFSET(ring_header, reserved, 40);
MF_OFFSET(ring_header, wsc, 48);
MF_OFFSET(ring_header, wc, 56);

/* Inline block event (first generation of muenblock): request and response share the layout. The unit of `id`
 * is inferred from one public peer (Gneiss' Muen block session): BLOCK_SIZE is the one place that says so. */
#define BLOCK_SIZE 4096
#define SECTOR_SIZE 512 /* unit of the answer to `size` */
#define BLOCK_REQUEST_PROTOCOL UINT64_C(0x9570208dca77db19)
#define BLOCK_RESPONSE_PROTOCOL UINT64_C(0x9851be3282fef0dc)

enum { EVENT_READ = 0, EVENT_WRITE = 1, EVENT_COMMAND = 2 }; /* kind */
enum { COMMAND_SYNC = 0, COMMAND_SIZE = 1 };                 /* id of a command */

typedef struct {
    uint32_t kind;
    int32_t error; /* responses: 0 or a negative errno */
    uint64_t id;   /* block number, or the command */
    uint32_t valid; /* 1 */
    uint32_t priv; /* the client's, copied into the response */
} block_event_header;
MF_SIZE(block_event_header, 24);
_Static_assert(_Alignof(block_event_header) == 8, "block_event_header alignment");
MF_OFFSET(block_event_header, kind, 0);
MF_OFFSET(block_event_header, error, 4);
MF_OFFSET(block_event_header, id, 8);
MF_OFFSET(block_event_header, valid, 16);
MF_OFFSET(block_event_header, priv, 20);

typedef struct {
    block_event_header header;
    uint8_t data[BLOCK_SIZE];
} block_event;
MF_SIZE(block_event, 4120);
_Static_assert(_Alignof(block_event) == 8, "block_event alignment");
MF_OFFSET(block_event, header, 0);
MF_OFFSET(block_event, data, 24);

/* Checksums between two muenfast peers: what their first request, for the size, and its answer hold at the beginning of
 * `data`. From then on `valid` is a checksum (_blocksum.h). */
#define OFFER_MAGIC UINT64_C(0x3f435243426e754d)  /* "MunBCRC?" */
#define ACCEPT_MAGIC UINT64_C(0x21435243426e754d) /* "MunBCRC!" */
#define OFFER_AGAIN UINT32_C(0x5245464f)          /* "OFER" */
#define ACCEPT_AGAIN UINT32_C(0x53455941)         /* "AYES" */

typedef struct {
    uint64_t sectors; /* an answer's size; 0 */
    uint64_t magic;
    uint64_t nonce;   /* an offer's: random; the answer's: its complement */
    uint32_t sum;     /* an offer's checksum; 0 */
    uint32_t again;   /* another sign, for magic may be what is garbled */
} block_offer;
MF_SIZE(block_offer, 32);
MF_OFFSET(block_offer, sectors, 0);
MF_OFFSET(block_offer, magic, 8);
MF_OFFSET(block_offer, nonce, 16);
MF_OFFSET(block_offer, sum, 24);
MF_OFFSET(block_offer, again, 28);

/* Block transport with a shared buffer (second generation of muenblock, Muen's driver subject): short requests and
 * responses in two channels, payload in a plain region that both sides map writable. Muen's customary id serves both
 * channels. */
#define BUFFER_PROTOCOL UINT64_C(0x5155684453516f3d)

enum { /* kind */
    REQUEST_NONE = 0x00,
    REQUEST_READ = 0x01,
    REQUEST_WRITE = 0x02,
    REQUEST_DISCARD = 0x03,
    REQUEST_SYNC = 0x04,
    REQUEST_SMART = 0x05,
    REQUEST_MEDIA_BLOCKS = 0x10,
    REQUEST_BLOCK_LENGTH = 0x11,
    REQUEST_MAX_REQUESTS = 0x19,
    REQUEST_MAX_BLOCKS = 0x1a,
    REQUEST_MAX_DEVICES = 0x1b,
    REQUEST_RESET = 0x1f
};
enum { SMART_UNAVAILABLE = 0, SMART_OK = 1, SMART_EXCEEDED = 2, SMART_UNDEFINED = 3 }; /* status of REQUEST_SMART */
#define SMART_SIZE 512 /* bytes of raw data: ATA SMART READ DATA and the NVMe SMART log alike */

typedef struct {
    uint16_t kind;
    uint16_t device;        /* from 0 on */
    uint32_t tag;           /* the client's, copied into the response */
    uint64_t length;        /* bytes, a multiple of the block length */
    uint64_t device_offset; /* bytes, likewise */
    uint64_t buffer_offset; /* bytes, likewise */
} block_request;
MF_SIZE(block_request, 32);
_Static_assert(_Alignof(block_request) == 8, "block_request alignment");
MF_OFFSET(block_request, kind, 0);
MF_OFFSET(block_request, device, 2);
MF_OFFSET(block_request, tag, 4);
MF_OFFSET(block_request, length, 8);
MF_OFFSET(block_request, device_offset, 16);
MF_OFFSET(block_request, buffer_offset, 24);

typedef struct {
    uint16_t kind;
    uint16_t device;
    uint32_t tag;
    uint64_t status; /* 0 done, else an error; of a query its answer */
} block_response;
MF_SIZE(block_response, 16);
_Static_assert(_Alignof(block_response) == 8, "block_response alignment");
MF_OFFSET(block_response, kind, 0);
MF_OFFSET(block_response, device, 2);
MF_OFFSET(block_response, tag, 4);
MF_OFFSET(block_response, status, 8);

/* The bell: a page of its own beside a channel, writable by both sides, never part of a wire format that foreign
 * peers see. A hostile value costs a wake-up or one bounded pause. First line: the channel's writer (and `waiters`:
 * readers); second line: the reader. */
#define BELL_MAGIC UINT64_C(0x4c4c45426e65754d) /* "MuenBELL" */

enum { ENDPOINT_NONE = 0, ENDPOINT_SERVING = 1, ENDPOINT_BACK_LATER = 2, ENDPOINT_GONE = 3,
       ENDPOINT_RESIZING = 4 }; /* state */
enum { STORE_READ_ONLY = 1 }; /* flags: shifted left by the number of the device, below STORE_FLAGS */
enum { STORE_FLAGS = 32 };

typedef struct {
    uint64_t magic;
    uint32_t seq;         /* futex word */
    uint32_t waiters;     /* 1 = a reader may be asleep */
    uint64_t ringer;      /* epoch of the writer that rings */
    uint32_t state;       /* of the writer's endpoint */
    uint32_t flags;
    uint8_t store[16];    /* identity of what is behind the endpoint; zero = none */
    uint32_t zeroes;      /* bit n: what is discarded of device n, below STORE_FLAGS, reads as zeros */
    uint32_t unused[3];
    uint64_t reader_rc;   /* advice: the reader's RC ... */
    uint64_t reader_epoch; /* ... in this epoch */
    uint32_t reader_sums; /* 1: the reader takes elements with checksums */
    uint32_t unused2[11];
} bell_page;
MF_SIZE(bell_page, 128);
_Static_assert(_Alignof(bell_page) == 8, "bell_page alignment");
MF_OFFSET(bell_page, magic, 0);
MF_OFFSET(bell_page, seq, 8);
MF_OFFSET(bell_page, waiters, 12);
MF_OFFSET(bell_page, ringer, 16);
MF_OFFSET(bell_page, state, 24);
MF_OFFSET(bell_page, flags, 28);
MF_OFFSET(bell_page, store, 32);
MF_OFFSET(bell_page, zeroes, 48);
MF_OFFSET(bell_page, unused, 52);
MF_OFFSET(bell_page, reader_rc, 64);
MF_OFFSET(bell_page, reader_epoch, 72);
MF_OFFSET(bell_page, reader_sums, 80);
MF_OFFSET(bell_page, unused2, 84);

#endif
