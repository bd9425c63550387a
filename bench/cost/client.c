/* Rows: requests of a block client, from the caller's submission to his being told, inline (core: _client) and, with SHARED
 * (bufclient.c), over a buffer (core: _bufclient). The server is this file.
 */
#include "cost.h"

#include CORE_SOURCE

#ifdef SHARED
enum { REQUEST = sizeof(block_request), ANSWER = sizeof(block_response) };
#define KIND "buffer"
static T_shared_t shared;
static uint8_t *buffer;
static uint64_t used[64];
static uint32_t taken_away;
#else
enum { REQUEST = sizeof(block_event), ANSWER = sizeof(block_event) };
#define KIND "inline"
#endif
enum { SLOTS = 128, BLOCKS = 256, SPREAD = 37 };
static T_client_t c;
static T_queue_t queue;
static T_io_t io[COST_BATCH];
static T_writer_t w;
static T_reader_t r;
static bell_page *bells;
static uint8_t *requests, *answers, *pages;
static uint32_t number, ended;
static bool writes;
static void (*reader_init)(T_reader_t *, const uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_init)(T_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_start)(T_writer_t *, uint64_t);
static void (*submit)(void *, T_io_t *);

static void done(T_io_t *i) { ended += i->error == 0; }

static void make(void) {
    uint64_t n;
    memset(requests, 0, 64);
    memset(answers, 0, 64);
    memset(bells, 0, 2 * sizeof *bells);
    memset(&c, 0, sizeof c);
    memset(&queue, 0, sizeof queue);
    number = 0;
    writer_init(&c.w, requests, 64 + SLOTS * REQUEST, REQUEST, 7);
    reader_init(&c.r, answers, 64 + SLOTS * ANSWER, ANSWER, 8);
    reader_init(&r, requests, 64 + SLOTS * REQUEST, REQUEST, 7);
    writer_init(&w, answers, 64 + SLOTS * ANSWER, ANSWER, 8);
    c.w.bell = r.bell = &bells[0];
    w.bell = c.r.bell = &bells[1];
    writer_start(&c.w, 7);
    writer_start(&w, 9);
    c.window = SLOTS;
    c.allowed = SLOTS;
    c.depth = c.settled = COST_BATCH;
    c.nqueues = 1;
    c.queues = &queue;
    c.base = 1000;
    c.server = 9;
    queue.client = &c;
    queue.block_size = BLOCK_SIZE;
#ifdef SHARED
    memset(&shared, 0, sizeof shared);
    memset(used, 0, sizeof used);
    c.transport = &shared;
    c.issue = F_shared_issue;
    c.reap = F_shared_reap;
    c.renew = F_shared_renew;
#ifdef F_shared_free /* --against: not there before checksums were */
    c.free = F_shared_free;
#endif
    shared.base = buffer;
    shared.length = shared.most = SLOTS * BLOCK_SIZE;
    shared.broken = &taken_away;
    shared.used = used;
    queue.most = SLOTS;
    F_shared_renew(&c);
#else
    c.issue = F_client_issue;
    c.reap = F_client_reap;
#endif
    EXPECT(c.reap(&c) == E_EPOCH_CHANGED && F_reader_peek(&r, &n) == E_EPOCH_CHANGED, "not synchronised");
    c.state = E_CLIENT_READY;
}

/* What stands in its first word of a block that request n moves. */
static uint64_t word_of(uint32_t n) { return UINT64_C(0x123400000000) + n; }

static void answer(unsigned n) {
    uint64_t found, word;
    EXPECT(F_reader_peek(&r, &found) == E_SUCCESS && found == n, "another number of requests than %u", n);
    F_writer_reserve(&w, n);
    for (unsigned k = 0; k < n; k++) {
        const uint8_t *asked = F_reader_slot(&r, k);
        uint8_t *slot = F_writer_slot(&w, k), *data;
#ifdef SHARED
        block_request q;
        memcpy(&q, asked, sizeof q);
        block_response a = {.kind = q.kind, .device = q.device, .tag = q.tag};
        EXPECT(q.kind == (writes ? REQUEST_WRITE : REQUEST_READ) && q.length == BLOCK_SIZE, "another request");
        data = buffer + q.buffer_offset;
        if (writes)
            memcpy(&word, data, sizeof word);
#else
        block_event_header a;
        memcpy(&a, asked, sizeof a);
        EXPECT(a.kind == (writes ? EVENT_WRITE : EVENT_READ) && a.valid == 1, "another request");
        data = slot + sizeof a;
        if (writes)
            memcpy(&word, asked + sizeof a, sizeof word);
#endif
        memcpy(slot, &a, sizeof a);
        if (writes)
            EXPECT(word == word_of(number + k), "another block was written");
        word = word_of(number + k);
        memcpy(data, &word, sizeof word);
    }
    F_writer_publish(&w, n);
    F_reader_advance(&r, n);
}

static void ask(unsigned n) {
    uint64_t word;
    for (unsigned k = 0; k < n; k++) {
        io[k].kind = writes ? E_IO_WRITE : E_IO_READ;
        io[k].nblocks = 1;
        io[k].block = (number + k) * SPREAD % BLOCKS;
        io[k].buf = pages + k * BLOCK_SIZE;
        io[k].done = done;
        io[k].next = k + 1 < n ? &io[k + 1] : NULL;
        word = writes ? word_of(number + k) : 0;
        memcpy(io[k].buf, &word, sizeof word);
    }
    ended = 0;
    cost_on();
    submit(&queue, &io[0]);
    cost_off();
    answer(n);
    cost_on();
    while (c.reap(&c) == E_SUCCESS) {
    }
    cost_off();
    EXPECT(ended == n && c.head == c.tail, "of %u requests %u ended well", n, ended);
    for (unsigned k = 0; k < n; k++) {
        memcpy(&word, pages + k * BLOCK_SIZE, sizeof word);
        EXPECT(word == word_of(number + k), "another block was read");
    }
    number += n;
}

int main(void) {
    static const unsigned batches[] = {1, 8, COST_BATCH};
    CORE_CONSTANTS
    CORE_BINDINGS
    *(void **)&reader_init = ring_function("reader_init");
    *(void **)&writer_init = ring_function("writer_init");
    *(void **)&writer_start = ring_function("writer_start");
    requests = cost_memory(64 + SLOTS * REQUEST);
    answers = cost_memory(64 + SLOTS * ANSWER);
    pages = cost_memory(COST_BATCH * BLOCK_SIZE);
    bells = cost_memory(2 * sizeof *bells);
#ifdef SHARED
    buffer = cost_memory(SLOTS * BLOCK_SIZE);
    submit = client_function("client_submit");
#else
    submit = F_client_submit;
#endif
    for (int k = 0; k < 2; k++)
        for (int b = 0; b < 3; b++) {
            writes = k == 1;
            make();
            cost_row(ask, batches[b], "block " KIND " %s 4 KiB, client", writes ? "write" : "read");
        }
    return 0;
}
