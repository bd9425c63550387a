/* fuzz target: the server with a shared buffer, whose client is anybody. core: _buffer, on _ring
 *
 * Oracles: guard pages around channels, buffer and disks; the request channel and a read-only disk are mapped read-only.
 * There are never more answers than requests that were taken. As long as requests come by the core's own writer, at any
 * turn: each that was taken is answered once, in order, with its own tag, with the status that docs/protocol.md has for it,
 * and disks and buffer are what a disk of our own comes to that executes them one by one.
 */
#define FUZZ_PEER
#define FUZZ_CLOCK
#define FUZZ_FILES
#include "fuzz.h"

#include CORE_SOURCE
#undef memcpy

enum { DISKS = 4, REQUESTS = 12, ANSWERS = 12, BUFFER = 12288, HISTORY = 512 };
static const struct { int kind; uint64_t size, block; bool read_only; } disks[DISKS] = {
    {E_STORE_MEMORY, 4096, 512, false}, {E_STORE_MEMORY, 8192, 4096, false}, {E_STORE_MEMORY, 2048, 512, true},
    {E_STORE_NULL, 1 << 20, 512, false}};
static fuzz_region requests, answers, buffer, disk[DISKS];
static T_store_t stores[DISKS];
static T_device_t devices[DISKS];
static T_flow_t flows[DISKS * E_FLOWS];
static T_buffer_server_t s;
static T_requests_t files;
static T_writer_t w; /* the client's */
static void (*reader_init)(T_reader_t *, const uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_init)(T_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t);
static uint32_t broken;

static block_request history[HISTORY]; /* of this life, by number */
static uint8_t model[DISKS][8192], model_buffer[BUFFER];
static bool honest;                    /* this life's requests came by the core's own writer alone */
static bool followed;                  /* ... and the server synchronised with it */
static bool muddled, restarted;        /* during this step: the buffer changed; the client began anew */
static uint64_t next_epoch, void_below;

int store_discard(const T_store_t *store, uint64_t start, uint64_t length) {
    EXPECT(start <= store->size && length <= store->size - start, "a discard of %llu bytes at %llu", (unsigned long long)length,
           (unsigned long long)start);
    if (store->kind == E_STORE_MEMORY)
        memset(store->memory + start, 0, length);
    EXPECT(store->kind != E_STORE_FILE, "a file's discard is an operation of its own");
    return 0;
}
static uint64_t store_smart(const T_store_t *store, uint8_t *data) {
    memset(data, 0x5a, SMART_SIZE);
    return store->kind != E_STORE_NULL ? SMART_OK : SMART_UNAVAILABLE;
}
static aio_source store_source(const T_store_t *store) {
    (void)store;
    return (aio_source){0};
}
void *store_function(const char *name) {
    return strcmp(name, "store_discard") == 0 ? (void *)store_discard
           : strcmp(name, "store_smart") == 0 ? (void *)store_smart : (void *)store_source;
}

/* ---- the client */
static uint64_t place(void) { return fuzz_odd(); }
static block_request request(uint64_t number) {
    static const uint16_t kinds[] = {REQUEST_READ, REQUEST_WRITE, REQUEST_WRITE, REQUEST_READ, REQUEST_DISCARD, REQUEST_SYNC,
        REQUEST_SMART, REQUEST_NONE, REQUEST_MEDIA_BLOCKS, REQUEST_BLOCK_LENGTH, REQUEST_MAX_REQUESTS, REQUEST_MAX_BLOCKS,
        REQUEST_MAX_DEVICES, REQUEST_RESET, 0x06, 0x7777};
    uint8_t what = fuzz_u8(), where = fuzz_u8();
    block_request q = {.kind = kinds[what % 16], .device = what >> 4 & 3, .tag = (uint32_t)number};
    if (what >> 6 == 3)
        q.device = fuzz_u8() & 1 ? 0xffff : (uint16_t)s.ndevices;
    if (where & 128) { /* what a disk is made for */
        uint64_t block = disks[q.device % DISKS].block, last = disks[q.device % DISKS].size / block;
        q.length = (1 + (where & 1)) * block;
        q.device_offset = (where >> 1 & 7) % last * block;
        q.buffer_offset = (where >> 4 & 7) * block;
    } else if (where & 64 && number != 0) { /* what goes on from the one before */
        q = history[(number - 1) % HISTORY];
        q.tag = (uint32_t)number;
        q.device_offset += q.length;
        q.buffer_offset += q.length;
        if (where & 1)
            q.length = place();
        if (where & 2)
            q.buffer_offset = place();
    } else {
        q.length = place();
        q.device_offset = place();
        q.buffer_offset = place();
    }
    return q;
}
static void client_acts(void) {
    uint8_t what = fuzz_u8(), more = fuzz_u8();
    uint32_t was_armed = fuzz_countdown;
    uint64_t v;
    block_request q;
    fuzz_countdown = 0;
    switch (what % 10) {
    case 0:
        if (more & 128 && w.epoch != 0)
            F_writer_stop(&w);
        F_writer_start(&w, next_epoch++);
        restarted = true;
        honest = true;
        followed = false;
        break;
    case 1: case 2: case 3: case 4: /* requests, some together */
        if (w.epoch == 0 || !honest || w.wc >= HISTORY - 16)
            break;
        v = 1 + more % 4;
        if (v > w.elements)
            v = w.elements;
        F_writer_reserve(&w, v);
        for (uint64_t k = 0; k < v; k++) {
            q = history[w.wc + k] = request(w.wc + k);
            memcpy(F_writer_slot(&w, k), &q, sizeof q);
        }
        F_writer_publish(&w, v);
        break;
    case 5: /* payload */
        for (uint64_t k = 0; k < buffer.length; k += 512)
            memset(buffer.theirs + k, (int)(more + k / 512), 512);
        memcpy(model_buffer, buffer.theirs, buffer.length);
        muddled = true;
        break;
    case 6:
        if (w.epoch != 0)
            F_writer_stop(&w);
        restarted = true;
        break;
    case 7: /* anything, anywhere */
        honest = false;
        v = fuzz_odd();
        memcpy(requests.theirs + more % (requests.length / 8) * 8, &v, 8);
        break;
    case 8: /* counters, and the same epoch anew */
        honest = false;
        v = fuzz_odd();
        if (more & 1)
            ((ring_header *)requests.theirs)->wc += v;
        if (more & 2)
            ((ring_header *)requests.theirs)->wsc += v;
        if (more & 4 && w.epoch != 0)
            F_writer_start(&w, w.epoch);
        restarted = true;
        break;
    default:
        if (more % 8 == 0) {
            broken = 1;
            muddled = true;
        } else
            fuzz_now += (uint64_t)more * 1000000;
    }
    if (!honest)
        fuzz_no_future(requests.theirs, next_epoch);
    fuzz_countdown = was_armed;
}

/* ---- what a disk of our own makes of it */
static bool repeats(const block_request *q) {
    return (q->kind >= REQUEST_MEDIA_BLOCKS && q->kind <= REQUEST_BLOCK_LENGTH) ||
           (q->kind >= REQUEST_MAX_REQUESTS && q->kind <= REQUEST_MAX_DEVICES) || q->kind == REQUEST_RESET;
}
static bool outside(uint64_t at, uint64_t n, uint64_t size) { return (unsigned __int128)at + n > size; }
static uint64_t status_of(const block_request *q) {
    bool there = q->device < s.ndevices;
    uint64_t size = there ? disks[q->device].size : 0, block = there ? disks[q->device].block : 1, most;
    uint8_t *d = model[q->device % DISKS];
    most = buffer.length / block * block;
    switch (q->kind) {
    case REQUEST_READ: case REQUEST_WRITE: case REQUEST_DISCARD:
        if (!there)
            return 1;
        if (q->length == 0 || q->length > most || q->length % block != 0 || q->device_offset % block != 0 ||
            outside(q->device_offset, q->length, size))
            return EINVAL;
        if (q->kind != REQUEST_DISCARD && (q->buffer_offset % block != 0 || outside(q->buffer_offset, q->length, buffer.length)))
            return EINVAL;
        if (q->kind != REQUEST_READ && disks[q->device].read_only)
            return EROFS;
        if (q->kind == REQUEST_DISCARD) {
            if (disks[q->device].kind == E_STORE_MEMORY)
                memset(d + q->device_offset, 0, q->length);
            return broken && s.files != NULL && devices[q->device].flies ? EIO : 0;
        }
        if (broken)
            return EIO;
        if (q->kind == REQUEST_READ && disks[q->device].kind == E_STORE_NULL)
            memset(model_buffer + q->buffer_offset, 0, q->length);
        else if (q->kind == REQUEST_READ)
            memcpy(model_buffer + q->buffer_offset, d + q->device_offset, q->length);
        else if (disks[q->device].kind == E_STORE_MEMORY)
            memcpy(d + q->device_offset, model_buffer + q->buffer_offset, q->length);
        return 0;
    case REQUEST_SMART:
        if (!there || (q->length != 0 && q->length < SMART_SIZE) || q->buffer_offset % block != 0 ||
            outside(q->buffer_offset, SMART_SIZE, buffer.length) || disks[q->device].kind != E_STORE_MEMORY)
            return SMART_UNAVAILABLE;
        memset(model_buffer + q->buffer_offset, 0x5a, SMART_SIZE);
        return SMART_OK;
    case REQUEST_SYNC: case REQUEST_NONE: case REQUEST_RESET: return there ? 0 : 1;
    case REQUEST_MEDIA_BLOCKS: return size / block;
    case REQUEST_BLOCK_LENGTH: return there ? block : 0;
    case REQUEST_MAX_REQUESTS: return !there ? 0 : s.r.elements < s.w.elements ? s.r.elements : s.w.elements;
    case REQUEST_MAX_BLOCKS: return there ? most / block : 0;
    case REQUEST_MAX_DEVICES: return there ? s.ndevices : 0;
    default: return 1;
    }
}

static void take_over(void) { /* what cannot be foretold is the beginning of what is */
    memcpy(model_buffer, buffer.theirs, buffer.length);
    for (int i = 0; i < DISKS; i++)
        memcpy(model[i], disk[i].theirs, disk[i].length);
}

static bool owed[HISTORY]; /* as in blk.c */
static uint32_t owing;
static void forget(void) {
    memset(owed, 0, sizeof owed);
    owing = 0;
    take_over();
}

static void step(void) {
    uint64_t rc = s.r.rc, wc = s.w.wc, delivered = s.r.delivered, cancelled = s.n.cancelled, epochs = s.r.epochs;
    uint64_t number, count, taken, last = 0, status;
    bool exact = honest && followed, left = s.files != NULL && files.flights.leaving;
    int event;
    if (owing == 0)
        muddled = false;
    restarted = false;
    event = F_buffer_step(&s);
    count = s.w.wc - wc;
    taken = s.r.delivered - delivered;
    if (event == E_SERVER_CONNECTED) {
        EXPECT(s.files != NULL || count == 0, "answers before the first request");
        followed = honest && !restarted && s.r.epoch == w.epoch;
        void_below = s.void_below;
        forget();
        return;
    }
    EXPECT(s.files != NULL || count <= taken, "%llu answers to %llu requests", (unsigned long long)count, (unsigned long long)taken);
    if (!exact || !honest || restarted || event == E_SERVER_DISCONNECTED || s.r.epochs != epochs || s.w.elements < count || left ||
        (s.files != NULL && files.flights.leaving)) {
        forget();
        followed = false; /* until the next life */
        return;
    }
    if (muddled) /* which part of it was too early cannot be told */
        take_over();
    EXPECT(s.n.cancelled == cancelled, "requests of a life that goes on were given up");
    EXPECT(taken <= s.r.rc - rc, "%llu were taken, the counter went from %llu to %llu", (unsigned long long)taken,
           (unsigned long long)rc, (unsigned long long)s.r.rc);
    for (number = rc; number < rc + taken; number++)
        if (void_below <= number || repeats(&history[number])) {
            owed[number] = true;
            owing++;
        }
    for (uint64_t k = 0; k < count; k++) {
        block_response a;
        memcpy(&a, answers.theirs + 64 + (wc + k) % s.w.elements * sizeof a, sizeof a);
        EXPECT(a.tag < HISTORY && owed[a.tag], "an answer to %u, which has one or was never taken (%llu to %llu were)", a.tag,
               (unsigned long long)rc, (unsigned long long)(rc + taken));
        EXPECT(s.files != NULL || k == 0 || a.tag > last, "answers in another order: %u after %llu", a.tag, (unsigned long long)last);
        last = a.tag;
        owed[a.tag] = false;
        owing--;
        block_request *q = &history[a.tag];
        EXPECT(a.kind == q->kind && a.device == q->device, "an answer of kind %u and device %u to %u and %u", a.kind, a.device,
               q->kind, q->device);
        status = status_of(q);
        /* Done and answered at once, while what files do before and behind it is answered later: in which order they had the
         * buffer cannot be told from that of the answers. */
        if (owing != 0 && ((q->kind == REQUEST_SMART && status == SMART_OK) || (q->kind == REQUEST_READ && q->device < s.ndevices &&
                                                                                status == 0 && !devices[q->device].flies)))
            muddled = true;
        EXPECT(a.status == status || (muddled && broken), "kind %u device %u length %llu at %llu and %llu: status %llu, not %llu",
               q->kind, q->device, (unsigned long long)q->length, (unsigned long long)q->device_offset,
               (unsigned long long)q->buffer_offset, (unsigned long long)a.status, (unsigned long long)status);
    }
    EXPECT(owing == 0 || s.files != NULL, "%u requests have no answer", owing);
    EXPECT(owing == 0 || files.flights.aio.nflying != 0, "%u requests have no answer, and nothing is under way", owing);
    if (muddled || (broken && s.files != NULL)) { /* files are read and written before the answer is an error */
        take_over();
        return;
    }
    if (owing != 0)
        return;
    for (int i = 0; i < DISKS; i++)
        EXPECT(memcmp(model[i], disk[i].theirs, disk[i].length) == 0, "disk %d is not what was written", i);
    EXPECT(memcmp(model_buffer, buffer.theirs, buffer.length) == 0, "the buffer is not what was read");
}

/* ---- disks 0 and 1 as files, one behind the other in one file each */
static fuzz_region *file(int fd, size_t n, off_t at) {
    fuzz_region *r = &disk[fd];
    EXPECT(at >= 0 && (uint64_t)at <= r->length && n <= r->length - (uint64_t)at, "%zu bytes at %lld of file %d", n, (long long)at, fd);
    return r;
}
ssize_t fuzz_pread(int fd, void *data, size_t n, off_t at) {
    memcpy(data, file(fd, n, at)->ours + at, n);
    return (ssize_t)n;
}
ssize_t fuzz_pwrite(int fd, const void *data, size_t n, off_t at) {
    memcpy(file(fd, n, at)->ours + at, data, n);
    return (ssize_t)n;
}
int fuzz_discard(int fd, off_t at, off_t n) {
    memset(file(fd, (size_t)n, at)->ours + at, 0, (size_t)n);
    return 0;
}

static void set_up(void) {
    CORE_CONSTANTS
    CORE_BINDINGS
    *(void **)&reader_init = ring_function("reader_init");
    *(void **)&writer_init = ring_function("writer_init");
    fuzz_region_make(&requests, 64 + REQUESTS * sizeof(block_request), PROT_READ);
    fuzz_region_make(&answers, 64 + ANSWERS * sizeof(block_response), PROT_READ | PROT_WRITE);
    fuzz_region_make(&buffer, BUFFER, PROT_READ | PROT_WRITE);
    for (int i = 0; i < DISKS; i++) {
        fuzz_region_make(&disk[i], disks[i].kind == E_STORE_MEMORY ? disks[i].size : 8,
                         disks[i].read_only ? PROT_READ : PROT_READ | PROT_WRITE);
        stores[i] = (T_store_t){.kind = disks[i].kind, .fd = -1, .direct_fd = -1, .memory = disk[i].ours, .size = disks[i].size,
            .nblocks = disks[i].size / 4096, .most = UINT64_MAX, .block_size = (uint32_t)disks[i].block,
            .read_only = disks[i].read_only, .anonymous = 1};
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool made;
    if (!made) {
        set_up();
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = client_acts;
    uint8_t kind = fuzz_u8(), more = fuzz_u8();
    fuzz_region_size(&requests, 64 + (1 + kind % REQUESTS) * sizeof(block_request));
    fuzz_region_size(&answers, 64 + (1 + more % ANSWERS) * sizeof(block_response));
    fuzz_region_size(&buffer, (size_t)(1 + kind / 64 % 3) * 4096);
    memset(&s, 0, sizeof s);
    memset(flows, 0, sizeof flows);
    for (int i = 0; i < DISKS; i++) {
        fuzz_region_size(&disk[i], disk[i].most);
        for (uint64_t k = 0; k < disk[i].length; k += 512)
            memset(disk[i].theirs + k, (int)(0x10 + i * 0x20 + k / 512), disk[i].length < 512 ? disk[i].length : 512);
        devices[i] = (T_device_t){.store = &stores[i], .block_size = disks[i].block, .size = disks[i].size,
                                  .most = buffer.length / disks[i].block * disks[i].block};
    }
    if (kind & 32) {
        memset(&files, 0, sizeof files);
        aio_open(&files.flights.aio, 1, NULL, 0);
        files.flights.aio.idle = AIO_MOST; /* no thread is made: operations are done at once */
        for (int i = 0; i < 2; i++) {
            aio_add(&files.flights.aio, i, 0, (aio_source){0});
            devices[i].flies = 1;
            devices[i].file = (uint32_t)i;
        }
        s.files = &files;
    }
    for (int i = 0; i < 2; i++)
        stores[i].kind = kind & 32 ? E_STORE_FILE : E_STORE_MEMORY;
    s.buffer = buffer.ours;
    s.length = buffer.length;
    s.broken = &broken;
    broken = 0;
    s.devices = devices;
    s.flows = flows;
    s.ndevices = 1 + (more >> 4 & 3);
    s.knows_epoch = more >> 7;
    reader_init(&s.r, requests.ours, requests.length, sizeof(block_request), BUFFER_PROTOCOL);
    s.r.settle_ns = more & 64 ? 100000 : 0;
    s.r.patience = more & 64 ? 8 : 0;
    writer_init(&s.w, answers.ours, answers.length, sizeof(block_response), BUFFER_PROTOCOL);
    writer_init(&w, requests.theirs, requests.length, sizeof(block_request), BUFFER_PROTOCOL);
    next_epoch = 1;
    honest = followed = false;
    forget();
    fuzz_serve(100, 160, 3, step);
    fuzz_region_check(&requests);
    fuzz_region_check(&answers);
    fuzz_region_check(&buffer);
    for (int i = 0; i < DISKS; i++)
        fuzz_region_check(&disk[i]);
    return 0;
}
