/* fuzz target: the server of inline events, whose client is anybody. core: _blk, on _ring
 *
 * Oracles: those of buffer.c. A write to memory that its client overwrites meanwhile is torn: it may fail, and what is in
 * the block then is the client's affair.
 */
#define FUZZ_PEER
#define FUZZ_CLOCK
#define FUZZ_FILES
#include "fuzz.h"

#include CORE_SOURCE
#undef memcpy

enum { BLOCKS = 4, REQUESTS = 4, ANSWERS = 4, HISTORY = 128, EVENT = sizeof(block_event) };
static fuzz_region requests, answers, disk;
static T_store_t store;
static T_server_t s;
static T_files_t files;
static uint8_t stage[(AIO_MOST + E_BATCH) * BLOCK_SIZE];
static T_writer_t w;
static void (*reader_init)(T_reader_t *, const uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_init)(T_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t);

static block_event_header history[HISTORY];
static uint8_t model[BLOCKS][BLOCK_SIZE];
static bool honest, followed, moved, restarted;
static bool torn[BLOCKS]; /* in this step: what is in there */
static uint64_t next_epoch, void_below;

void *store_function(const char *name) {
    (void)name;
    return NULL; /* none is called: there is no discard, and io_uring has no source */
}

ssize_t fuzz_pread(int fd, void *data, size_t n, off_t at) {
    EXPECT(at >= 0 && (uint64_t)at <= disk.length && n <= disk.length - (uint64_t)at, "%zu bytes at %lld of the file", n, (long long)at);
    memcpy(data, disk.ours + at, n);
    return (ssize_t)n;
}
ssize_t fuzz_pwrite(int fd, const void *data, size_t n, off_t at) {
    EXPECT(at >= 0 && (uint64_t)at <= disk.length && n <= disk.length - (uint64_t)at, "%zu bytes at %lld of the file", n, (long long)at);
    EXPECT(!store.read_only, "a read-only disk is written");
    memcpy(disk.ours + at, data, n);
    return (ssize_t)n;
}
int fuzz_discard(int fd, off_t at, off_t n) { fuzz_fail("a discard"); }

static uint8_t payload(uint64_t number) { return (uint8_t)(0x31 + number * 5); }

static block_event_header request(uint64_t number) {
    uint8_t what = fuzz_u8(), block = what >> 3 & 7;
    block_event_header h = {.kind = what & 1 ? EVENT_WRITE : EVENT_READ, .id = block % BLOCKS, .valid = 1, .priv = (uint32_t)number};
    switch (what & 7) {
    case 4:
        h.kind = EVENT_COMMAND;
        h.id = what >> 3 & 3;
        break;
    case 5:
        h.id = fuzz_odd();
        break;
    case 6:
        h.id = number != 0 ? history[(number - 1) % HISTORY].id + 1 : BLOCKS;
        h.kind = number != 0 ? history[(number - 1) % HISTORY].kind : 0;
        break;
    case 7:
        h.kind = (uint32_t)fuzz_odd();
        h.valid = what & 128 ? 1 : (uint32_t)fuzz_odd();
        h.id = fuzz_odd();
    }
    return h;
}
static void client_acts(void) {
    uint8_t what = fuzz_u8(), more = fuzz_u8();
    uint32_t was_armed = fuzz_countdown;
    uint64_t v;
    fuzz_countdown = 0;
    moved = true;
    switch (what % 8) {
    case 0:
        if (more & 128 && w.epoch != 0)
            F_writer_stop(&w);
        F_writer_start(&w, next_epoch++);
        restarted = honest = true;
        followed = false;
        break;
    case 1: case 2: case 3:
        if (w.epoch == 0 || !honest || w.wc >= HISTORY - 8)
            break;
        v = 1 + more % 3;
        v = v < w.elements ? v : w.elements;
        F_writer_reserve(&w, v);
        for (uint64_t k = 0; k < v; k++) {
            uint8_t *slot = F_writer_slot(&w, k);
            history[w.wc + k] = request(w.wc + k);
            memcpy(slot, &history[w.wc + k], sizeof(block_event_header));
            memset(slot + sizeof(block_event_header), payload(w.wc + k), BLOCK_SIZE);
        }
        F_writer_publish(&w, v);
        break;
    case 4:
        if (w.epoch != 0)
            F_writer_stop(&w);
        restarted = true;
        break;
    case 5:
        honest = false;
        v = fuzz_odd();
        if (more & 128)
            memcpy(requests.theirs + more % 8 * 8, &v, 8);
        else
            memcpy(requests.theirs + 64 + (more & 3) % w.elements * EVENT + (more >> 2 & 3) * 8, &v, 8);
        break;
    case 6:
        honest = false;
        restarted = true;
        v = fuzz_odd();
        if (more & 1)
            ((ring_header *)requests.theirs)->wc += v;
        if (more & 2)
            ((ring_header *)requests.theirs)->wsc += v;
        if (more & 4 && w.epoch != 0)
            F_writer_start(&w, w.epoch);
        break;
    default:
        fuzz_now += (uint64_t)more * 1000000;
    }
    if (!honest)
        fuzz_no_future(requests.theirs, next_epoch);
    fuzz_countdown = was_armed;
}

static bool sizes(const block_event_header *h) { return h->kind == EVENT_COMMAND && h->id == COMMAND_SIZE; }

static int32_t error_of(const block_event_header *h) {
    if (h->valid != 1 || h->kind > EVENT_COMMAND)
        return -EINVAL;
    if (h->kind == EVENT_COMMAND)
        return h->id < 2 ? 0 : -EINVAL;
    if (h->id >= BLOCKS)
        return -EINVAL;
    return h->kind == EVENT_WRITE && store.read_only ? -EROFS : 0;
}
FUZZ_QUIET static void compare(uint64_t number, const uint8_t *answer) {
    const block_event_header *q = &history[number];
    block_event_header a;
    static uint8_t want[BLOCK_SIZE];
    int32_t error = error_of(q);
    memcpy(&a, answer, sizeof a);
    EXPECT(a.kind == q->kind && a.id == q->id && a.valid == q->valid, "an answer to something else: kind %u, id %llu", a.kind,
           (unsigned long long)a.id);
    if (moved && error == 0 && a.error == -EIO && q->kind == EVENT_WRITE) { /* torn */
        torn[q->id] = true;
        return;
    }
    EXPECT(a.error == error, "kind %u id %llu: error %d, not %d", q->kind, (unsigned long long)q->id, a.error, error);
    if (q->kind == EVENT_WRITE) {
        if (error == 0 && store.kind != E_STORE_NULL)
            memset(model[q->id], payload(number), BLOCK_SIZE);
        return;
    }
    memset(want, 0, sizeof want);
    if (error == 0 && sizes(q))
        *(uint64_t *)want = BLOCKS * (BLOCK_SIZE / SECTOR_SIZE);
    if (error == 0 && q->kind == EVENT_READ && store.kind != E_STORE_NULL)
        memcpy(want, model[q->id], BLOCK_SIZE);
    EXPECT((q->kind == EVENT_READ && q->id < BLOCKS && torn[q->id]) || memcmp(want, answer + sizeof a, BLOCK_SIZE) == 0, "another payload: kind %u, id %llu", q->kind, (unsigned long long)q->id);
}

/* Requests of this life that were taken and have no answer: of a file's, they may come later, and in another order. */
static bool owed[HISTORY];
static uint32_t owing;
static void forget(void) {
    memset(owed, 0, sizeof owed);
    owing = 0;
    memcpy(model, disk.theirs, sizeof model);
}

static void step(void) {
    uint64_t rc = s.r.rc, wc = s.w.wc, delivered = s.r.delivered, voided = s.n.voided, epochs = s.r.epochs, lives = s.w.epochs;
    uint64_t number, count, taken, last = 0;
    bool exact = honest && followed, left = s.files != NULL && files.flights.leaving;
    int event;
    moved = restarted = false;
    memset(torn, 0, sizeof torn);
    event = F_server_step(&s);
    if (event == E_SERVER_CONNECTED) {
        followed = honest && !restarted && s.r.epoch == w.epoch;
        void_below = s.void_below;
    }
    if (s.w.epoch == 0 || event == E_SERVER_CONNECTED) {
        EXPECT(s.w.epoch == 0 || (s.w.wc == 0 && s.w.epochs > lives), "a new life begins with answers");
        forget();
        return;
    }
    if (s.w.epochs != lives) { /* after an overrun the answers begin anew, maybe with some */
        memset(owed, 0, sizeof owed);
        owing = 0;
        wc = 0;
    }
    count = s.w.wc - wc;
    taken = s.r.delivered - delivered;
    EXPECT(s.files != NULL || count <= taken, "%llu answers to %llu requests", (unsigned long long)count, (unsigned long long)taken);
    if (!exact || !honest || restarted || s.r.epochs != epochs || s.w.elements < count || left ||
        (s.files != NULL && files.flights.leaving)) {
        forget();
        followed = false; /* until the next life */
        return;
    }
    EXPECT(taken <= s.r.rc - rc, "%llu were taken, the counter went from %llu to %llu", (unsigned long long)taken,
           (unsigned long long)rc, (unsigned long long)s.r.rc);
    for (number = rc; number < rc + taken; number++)
        if (void_below <= number || sizes(&history[number])) {
            owed[number] = true;
            owing++;
        }
    for (uint64_t k = 0; k < count; k++) {
        const uint8_t *answer = answers.theirs + 64 + (wc + k) % s.w.elements * EVENT;
        uint32_t priv;
        memcpy(&priv, answer + 20, 4);
        EXPECT(priv < HISTORY && owed[priv], "an answer to %u, which has one or was never taken (%llu to %llu were)", priv,
               (unsigned long long)rc, (unsigned long long)(rc + taken));
        EXPECT(s.files != NULL || k == 0 || priv > last, "answers in another order: %u after %llu", priv, (unsigned long long)last);
        last = priv;
        owed[priv] = false;
        owing--;
        compare(priv, answer);
    }
    EXPECT(owing == 0 || s.files != NULL, "%u requests have no answer", owing);
    EXPECT(owing == 0 || files.flights.aio.nflying != 0, "%u requests have no answer, and nothing is under way", owing);
    for (int i = 0; i < BLOCKS; i++)
        if (torn[i])
            memcpy(model[i], disk.theirs + i * BLOCK_SIZE, BLOCK_SIZE);
    if (owing == 0)
        EXPECT(memcmp(model, disk.theirs, sizeof model) == 0, "the disk is not what was written");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const int kinds[] = {E_STORE_MEMORY, E_STORE_FILE, E_STORE_MEMORY, E_STORE_NULL};
    static bool made;
    if (!made) {
        CORE_CONSTANTS
        CORE_BINDINGS
        *(void **)&reader_init = ring_function("reader_init");
        *(void **)&writer_init = ring_function("writer_init");
        fuzz_region_make(&requests, 64 + REQUESTS * EVENT, PROT_READ);
        fuzz_region_make(&answers, 64 + ANSWERS * EVENT, PROT_READ | PROT_WRITE);
        fuzz_region_make(&disk, BLOCKS * BLOCK_SIZE, PROT_READ | PROT_WRITE);
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = client_acts;
    uint8_t kind = fuzz_u8(), more = fuzz_u8();
    fuzz_region_size(&requests, 64 + (1 + kind % REQUESTS) * EVENT);
    fuzz_region_size(&answers, 64 + (1 + more % ANSWERS) * EVENT);
    fuzz_region_size(&disk, BLOCKS * BLOCK_SIZE);
    for (int i = 0; i < BLOCKS; i++)
        memset(disk.theirs + i * BLOCK_SIZE, 0xd0 + i, BLOCK_SIZE);
    memcpy(model, disk.theirs, sizeof model);
    memset(&s, 0, sizeof s);
    store = (T_store_t){.kind = kinds[kind >> 2 & 3], .fd = 3, .direct_fd = -1, .memory = disk.ours, .size = BLOCKS * BLOCK_SIZE,
        .nblocks = BLOCKS, .most = UINT64_MAX, .block_size = 4096, .read_only = kind >> 4 & 1};
    s.store = &store;
    if (store.kind == E_STORE_FILE) {
        memset(&files, 0, sizeof files);
        files.stage = stage;
        aio_open(&files.flights.aio, 1, NULL, 0);
        aio_add(&files.flights.aio, 3, 0, (aio_source){0});
        files.flights.aio.idle = AIO_MOST; /* no thread is made: operations are done at once */
        s.files = &files;
    }
    s.knows_epoch = more >> 7;
    reader_init(&s.r, requests.ours, requests.length, EVENT, BLOCK_REQUEST_PROTOCOL);
    s.r.settle_ns = more & 64 ? 100000 : 0;
    s.r.patience = more & 64 ? 8 : 0;
    writer_init(&s.w, answers.ours, answers.length, EVENT, BLOCK_RESPONSE_PROTOCOL);
    writer_init(&w, requests.theirs, requests.length, EVENT, BLOCK_REQUEST_PROTOCOL);
    next_epoch = 1;
    honest = followed = false;
    forget();
    fuzz_serve(60, 128, 4, step);
    fuzz_region_check(&requests);
    fuzz_region_check(&answers);
    fuzz_region_check(&disk);
    return 0;
}
