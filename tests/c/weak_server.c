/* The server's engine on the machine of weak.h: what it takes out of request slots that change. */
#include "weak.h"

#include SERVER_SOURCE

#define RING(name) __pyx_f_8muenfast_5_ring_##name
#define STATUS(name) __pyx_e_8muenfast_5_ring_##name

enum { WRITER = 0, SERVER = 2, BLOCKS = 2, WORDS = 8 + 515 };
static uint64_t requests[WORDS], answers[WORDS], disk[BLOCKS * 512], stage[2 * 512];
static SERVER_TYPE(server_t) s, s_kept;
static SERVER_TYPE(files_t) files, files_kept;
static SERVER_TYPE(store_t) store;
static struct __pyx_t_8muenfast_5_ring_writer_t w;
/* Called by the room below the server's, not by its own C. */
static void (*reader_init)(struct __pyx_t_8muenfast_5_ring_reader_t *, const uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_init)(struct __pyx_t_8muenfast_5_ring_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t);
static int written, restarts; /* restarts: in this scene nothing else spoils a request */

static uint64_t payload(uint64_t number) { return 0xda7a000 + number; }

/* The client's request number n: its payload says which it is. Block 0, always. */
static void ask(uint32_t kind, uint32_t n) {
    uint64_t event[515] = {0};
    block_event_header h = {kind, 0, 0, 1, n};
    memcpy(event, &h, sizeof h);
    event[3] = payload(n);
    RING(writer_reserve)(&w, 1);
    memcpy(RING(writer_slot)(&w, 0), event, sizeof event);
    RING(writer_publish)(&w, 1);
}
static ssize_t to_file(const void *data, size_t n, off_t offset) {
    uint64_t first;
    memcpy(&first, data, 8);
    if (n != BLOCK_SIZE || offset != 0 || first != payload(s.heads[0].priv))
        weak_fail("what goes into the file is not what was asked for: word, request", first, s.heads[0].priv);
    written++;
    return (ssize_t)n;
}
static void scene(int kind) {
    SERVER_BINDINGS
    *(void **)&reader_init = ring_function("reader_init");
    *(void **)&writer_init = ring_function("writer_init");
    restarts = 0;
    weak_shared_memory(requests, sizeof requests);
    memset(answers, 0, sizeof answers);
    memset(&s, 0, sizeof s);
    memset(&store, 0, sizeof store);
    store.kind = kind;
    store.fd = -1;
    store.memory = (uint8_t *)disk;
    store.nblocks = BLOCKS;
    store.most = (uint64_t)-1;
    s.store = &store;
    if (kind == SERVER_CONSTANT(STORE_FILE)) {
        memset(&files, 0, sizeof files);
        files.stage = (uint8_t *)stage;
        aio_open(&files.flights.aio, 1, NULL, 0);
        aio_add(&files.flights.aio, -1, 0, (aio_source){0});
        files.flights.aio.idle = AIO_MOST; /* no thread is made: operations are done at once */
        s.files = &files;
    }
    s.knows_epoch = 1;
    reader_init(&s.r, (const uint8_t *)requests, sizeof requests, sizeof(block_event), 7);
    writer_init(&s.w, (uint8_t *)answers, sizeof answers, sizeof(block_event), 8);
    RING(writer_start)(&s.w, 99);
    weak_on_write = to_file;
    weak_thread(WRITER);
    writer_init(&w, (uint8_t *)requests, sizeof requests, sizeof(block_event), 7);
    RING(writer_start)(&w, 11);
}
static void follow(void) {
    uint64_t n;
    weak_thread(SERVER);
    if (RING(reader_peek)(&s.r, &n) != STATUS(EPOCH_CHANGED))
        weak_fail("not synchronised", s.r.epoch, 0);
    weak_thread(WRITER);
}
static void explore(void (*body)(void)) {
    void (*const bodies[])(void) = {body, NULL};
    s_kept = s;
    files_kept = files;
    weak_explore(bodies, 1);
}
static enum __pyx_t_8muenfast_5_ring_ring_status one_round(uint64_t n) {
    enum __pyx_t_8muenfast_5_ring_ring_status status;
    if (s.files == NULL)
        return SERVER_FUNCTION(server_batch)(&s, n);
    status = SERVER_FUNCTION(server_take)(&s, n);
    SERVER_FUNCTION(server_finish)(&s);
    return status;
}

/* One round. What is answered with success was what the client published under that number. */
static void serve(void) {
    uint64_t n, before;
    block_event_header h;
    s = s_kept;
    files = files_kept;
    disk[0] = 0;
    written = 0;
    if (RING(reader_peek)(&s.r, &n) != STATUS(SUCCESS))
        return;
    before = s.w.wc;
    if (one_round(n) != STATUS(SUCCESS)) {
        weak_count("recovered");
        return;
    }
    if (s.w.wc == before) {
        weak_count("withheld");
        return;
    }
    memcpy(&h, answers + 8, sizeof h);
    if (h.error == -EINVAL && h.valid == 0) { /* the new life's slot: no request at all */
        weak_count("refused");
        return;
    }
    if (h.error != 0) {
        weak_count("torn");
        if (restarts)
            weak_fail("a life that was over got an answer: error", (uint64_t)-h.error, 0);
        if (s.n.torn != 1)
            weak_fail("another error", (uint64_t)-h.error, s.n.torn);
        return;
    }
    weak_count("answered");
    if (store.kind == SERVER_CONSTANT(STORE_MEMORY) && disk[0] != payload(h.priv))
        weak_fail("answered a write whose data is not there: word, request", disk[0], h.priv);
    if (store.kind == SERVER_CONSTANT(STORE_FILE) && written != 1)
        weak_fail("answered a write that was not made", (uint64_t)written, 0);
}
static void overwritten(int kind) {
    scene(kind);
    follow();
    ask(EVENT_WRITE, 5);
    ask(EVENT_WRITE, 6);
    explore(serve);
}
/* And then the same epoch is started anew: a WSC of 0 says nothing of how much was overwritten before that. */
static void begin_overwritten_again(void) {
    scene(SERVER_CONSTANT(STORE_FILE));
    follow();
    ask(EVENT_WRITE, 5);
    ask(EVENT_WRITE, 6);
    RING(writer_start)(&w, 11);
    explore(serve);
}
static void restarted(int kind, uint64_t epoch) {
    scene(kind);
    follow();
    ask(EVENT_WRITE, 5);
    RING(writer_start)(&w, epoch);
    restarts = 1;
    explore(serve);
}
static void begin_memory(void) { overwritten(SERVER_CONSTANT(STORE_MEMORY)); }
static void begin_file(void) { overwritten(SERVER_CONSTANT(STORE_FILE)); }
static void begin_memory_restart(void) { restarted(SERVER_CONSTANT(STORE_MEMORY), 22); }
static void begin_file_restart(void) { restarted(SERVER_CONSTANT(STORE_FILE), 22); }
static void begin_memory_again(void) { restarted(SERVER_CONSTANT(STORE_MEMORY), 11); }
static void begin_file_again(void) { restarted(SERVER_CONSTANT(STORE_FILE), 11); }
/* The new life has announced and written a request, and not published it. */
static void announced(int kind) {
    uint64_t event[515] = {0};
    block_event_header h = {EVENT_WRITE, 0, 0, 1, 6};
    scene(kind);
    follow();
    ask(EVENT_WRITE, 5);
    RING(writer_start)(&w, 11);
    memcpy(event, &h, sizeof h);
    event[3] = payload(6);
    RING(writer_reserve)(&w, 1);
    memcpy(RING(writer_slot)(&w, 0), event, sizeof event);
    restarts = 1;
    explore(serve);
}
static void begin_memory_announced(void) { announced(SERVER_CONSTANT(STORE_MEMORY)); }
static void begin_file_announced(void) { announced(SERVER_CONSTANT(STORE_FILE)); }
/* The new life has come as far as the old one by the second look at it: an answer, if any, is no error, for that says
 * that the first look has seen it. */
static void serve_any(void) {
    int step;
    uint64_t n, before;
    block_event_header h;
    s = s_kept;
    if (RING(reader_peek)(&s.r, &n) != STATUS(SUCCESS))
        return;
    before = s.w.wc;
    if (SERVER_FUNCTION(server_batch)(&s, n) != STATUS(SUCCESS))
        return;
    memcpy(&h, answers + 8, sizeof h);
    if (s.w.wc == before) {
        weak_count("withheld");
        step = SERVER_FUNCTION(server_step)(&s);
        if (step != SERVER_CONSTANT(SERVER_CONNECTED) && step != SERVER_CONSTANT(SERVER_DISCONNECTED))
            weak_fail("a life that was seen to be over goes on", s.r.epoch, s.r.rc);
    } else if (h.error != 0 && h.valid != 0)
        weak_fail("a life that was over got an answer: error", (uint64_t)-h.error, 0);
    else
        weak_count("answered");
}
static void begin_memory_caught_up(void) {
    scene(SERVER_CONSTANT(STORE_MEMORY));
    follow();
    ask(EVENT_WRITE, 5);
    RING(writer_start)(&w, 11);
    ask(EVENT_WRITE, 5); /* the very same, so that nothing else tells (server_forgotten) */
    explore(serve_any);
}
/* A client that starts over without an epoch 0 between: its counters, then its slots. These alone tell. */
static void begin_file_lowered(void) {
    ring_header *h = (ring_header *)requests;
    uint64_t nothing[515] = {0};
    scene(SERVER_CONSTANT(STORE_FILE));
    follow();
    ask(EVENT_WRITE, 5);
    store_relaxed64(&h->wsc, 0);
    store_relaxed64(&h->wc, 0);
    fence_release();
    memcpy(requests + 8, nothing, sizeof nothing);
    restarts = 1;
    explore(serve);
}

/* A slot that an honest client uses again is no sign of a restart. */
static void remember(void) {
    s = s_kept;
    if (SERVER_FUNCTION(server_forgotten)(&s))
        weak_fail("a request that was overwritten in its turn counts as a restart", 0, 0);
    weak_count("remembered");
}
static void begin_forgotten(void) {
    uint64_t n;
    scene(SERVER_CONSTANT(STORE_NULL));
    follow();
    ask(EVENT_WRITE, 5);
    weak_thread(SERVER);
    if (RING(reader_peek)(&s.r, &n) != STATUS(SUCCESS) || SERVER_FUNCTION(server_batch)(&s, n) != STATUS(SUCCESS))
        weak_fail("not served", 0, 0);
    weak_thread(WRITER);
    ask(EVENT_READ, 6);
    explore(remember);
}

const scenario server_scenarios[] = {
    {"server-memory", begin_memory, {"answered", "torn", "recovered"}},
    {"server-file", begin_file, {"answered", "torn", "recovered"}},
    {"server-memory-restart", begin_memory_restart, {"answered", "withheld", "recovered"}},
    {"server-file-restart", begin_file_restart, {"answered", "withheld", "recovered"}},
    {"server-memory-again", begin_memory_again, {"answered", "withheld", "recovered"}},
    {"server-file-again", begin_file_again, {"answered", "withheld", "recovered"}},
    {"server-memory-announced", begin_memory_announced, {"answered", "withheld", "recovered"}},
    {"server-file-announced", begin_file_announced, {"answered", "withheld", "recovered"}},
    {"server-caught-up", begin_memory_caught_up, {"answered", "withheld"}},
    {"server-overwritten", begin_overwritten_again, {"answered", "torn", "withheld", "recovered"}},
    {"server-file-lowered", begin_file_lowered, {"answered", "withheld", "recovered"}},
    {"server-forgotten", begin_forgotten, {"remembered"}},
    {NULL, NULL, {NULL}},
};
