/* Rows: requests that a block server with a RAM disk answers, inline (core: _blk) and, with SHARED (bufserver.c), over a
 * buffer (core: _buffer). The client is this file. One look that finds nothing ends each batch.
 */
#include "cost.h"

#include CORE_SOURCE

#ifdef SHARED
enum { REQUEST = sizeof(block_request), ANSWER = sizeof(block_response) };
#define ENGINE T_buffer_server_t
#define STEP F_buffer_step
#define KIND "buffer"
static T_device_t device;
static T_flow_t flows[E_FLOWS];
static uint8_t *buffer;
static uint32_t taken_away;
#else
enum { REQUEST = sizeof(block_event), ANSWER = sizeof(block_event) };
#define ENGINE T_server_t
#define STEP F_server_step
#define KIND "inline"
#endif
enum { SLOTS = 128, BLOCKS = 256, SPREAD = 37 }; /* coprime to BLOCKS: neighbours are not joined */
static T_store_t store;
static ENGINE s;
static T_writer_t w;
static T_reader_t r;
static bell_page *bells;
static uint8_t *requests, *answers, *disk;
static uint32_t number;
static bool writes;
static void (*reader_init)(T_reader_t *, const uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_init)(T_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t);

/* None is called: a RAM disk's requests move data, at once. */
void *store_function(const char *name) {
    (void)name;
    return NULL;
}

static uint64_t block_of(uint32_t n) { return n * SPREAD % BLOCKS; }

static void make(void) {
    uint64_t n;
    memset(requests, 0, 64);
    memset(answers, 0, 64);
    memset(bells, 0, 2 * sizeof *bells);
    memset(&s, 0, sizeof s);
    memset(&store, 0, sizeof store);
    number = 0;
    store.kind = E_STORE_MEMORY;
    store.fd = store.direct_fd = -1;
    store.memory = disk;
    store.size = BLOCKS * BLOCK_SIZE;
    store.nblocks = BLOCKS;
    store.most = UINT64_MAX;
    store.block_size = BLOCK_SIZE;
    store.anonymous = 1;
#ifdef SHARED
    memset(flows, 0, sizeof flows);
    device = (T_device_t){.store = &store, .block_size = BLOCK_SIZE, .size = store.size, .most = SLOTS * BLOCK_SIZE};
    s.devices = &device;
    s.flows = flows;
    s.ndevices = 1;
    s.buffer = buffer;
    s.length = SLOTS * BLOCK_SIZE;
    s.broken = &taken_away;
#else
    s.store = &store;
#endif
    reader_init(&s.r, requests, 64 + SLOTS * REQUEST, REQUEST, 7);
    writer_init(&s.w, answers, 64 + SLOTS * ANSWER, ANSWER, 8);
    writer_init(&w, requests, 64 + SLOTS * REQUEST, REQUEST, 7);
    reader_init(&r, answers, 64 + SLOTS * ANSWER, ANSWER, 8);
    w.bell = s.r.bell = &bells[0];
    r.bell = s.w.bell = &bells[1];
    F_writer_start(&w, 7);
    EXPECT(STEP(&s) == E_SERVER_CONNECTED, "not connected");
    EXPECT(F_reader_peek(&r, &n) == E_EPOCH_CHANGED, "not synchronised");
}

static void serve(unsigned n) {
    uint64_t found, word;
    F_writer_reserve(&w, n);
    for (unsigned k = 0; k < n; k++) {
        uint8_t *slot = F_writer_slot(&w, k), *data;
        uint64_t block = block_of(number + k);
#ifdef SHARED
        block_request q = {.kind = writes ? REQUEST_WRITE : REQUEST_READ, .tag = number + k, .length = BLOCK_SIZE,
                           .device_offset = block * BLOCK_SIZE, .buffer_offset = (number + k) % SLOTS * BLOCK_SIZE};
        data = buffer + q.buffer_offset;
#else
        block_event_header q = {.kind = writes ? EVENT_WRITE : EVENT_READ, .id = block, .valid = 1, .priv = number + k};
        data = slot + sizeof q;
#endif
        memcpy(slot, &q, sizeof q);
        word = number + k + 1;
        memcpy((writes ? data : disk + block * BLOCK_SIZE) + 2048, &word, sizeof word);
    }
    F_writer_publish(&w, n);
    cost_on();
    while (STEP(&s) == E_STEP_WORKED) {
    }
    cost_off();
    EXPECT(F_reader_peek(&r, &found) == E_SUCCESS && found == n, "%u requests have another number of answers", n);
    for (unsigned k = 0; k < n; k++) {
        const uint8_t *slot = F_reader_slot(&r, k), *data;
#ifdef SHARED
        block_response a;
        memcpy(&a, slot, sizeof a);
        EXPECT(a.status == 0 && a.tag == number + k, "answer %u: status %u", a.tag, (unsigned)a.status);
        data = buffer + (number + k) % SLOTS * BLOCK_SIZE;
#else
        block_event_header a;
        memcpy(&a, slot, sizeof a);
        EXPECT(a.error == 0 && a.priv == number + k, "answer %u: error %d", a.priv, a.error);
        data = slot + sizeof a;
#endif
        memcpy(&word, (writes ? disk + block_of(number + k) * BLOCK_SIZE : data) + 2048, sizeof word);
        EXPECT(word == number + k + 1, "request %u moved something else", number + k);
    }
    F_reader_advance(&r, n);
    number += n;
}

int main(void) {
    static const unsigned batches[] = {1, 8, COST_BATCH};
    CORE_CONSTANTS
    CORE_BINDINGS
    *(void **)&reader_init = ring_function("reader_init");
    *(void **)&writer_init = ring_function("writer_init");
    requests = cost_memory(64 + SLOTS * REQUEST);
    answers = cost_memory(64 + SLOTS * ANSWER);
    disk = cost_memory(BLOCKS * BLOCK_SIZE);
    bells = cost_memory(2 * sizeof *bells);
#ifdef SHARED
    buffer = cost_memory(SLOTS * BLOCK_SIZE);
#endif
    for (int k = 0; k < 2; k++)
        for (int b = 0; b < 3; b++) {
            writes = k == 1;
            make();
            cost_row(serve, batches[b], "block " KIND " %s 4 KiB, server", writes ? "write" : "read");
        }
    return 0;
}
