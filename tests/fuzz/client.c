/* fuzz target: the client of inline events, whose server is anybody. core: _client, on _ring
 *
 * With SHARED (bufclient.c) the one over a shared buffer. Oracles: guard pages; the response channel is mapped read-only. Every
 * request of a caller ends exactly once, with 0 or an errno, and touches no memory but its own. Requests are well-formed, carry
 * the caller's data, and never overwrite one that is not answered; their places in a buffer are inside it, aligned, and nobody
 * else's. As long as answers come by the core's own writer, at any turn, forged ones included: one ends what it names, if that
 * is in flight, with its error and its data, and any other is counted as stale.
 */
#define FUZZ_PEER
#define FUZZ_CLOCK
#include "fuzz.h"

#include CORE_SOURCE
#undef memcpy

#ifdef SHARED
enum { ANSWER = sizeof(block_response), REQUEST = sizeof(block_request), DEVICES = 2, BUFFER = 16384 };
typedef block_request request;
#else
enum { ANSWER = sizeof(block_event), REQUEST = sizeof(block_event), DEVICES = 1 };
typedef block_event_header request;
#endif
enum { RING = 8, CALLS = 12, MOST_BLOCKS = 3, HISTORY = 256, AHEAD = 16, BLOCK = 4096 };
static const uint32_t block_sizes[] = {BLOCK, 512};
static const uint64_t block_counts[] = {16, 64};

static fuzz_region requests, answers, pages;
#ifdef SHARED
static fuzz_region buffer;
static T_shared_t shared;
static uint64_t used[64];
static uint32_t broken;
static uint64_t filled, filled_end; /* what the server put into the buffer while the client was at work lies between these */
#endif
static T_client_t c;
static T_queue_t queues[DEVICES];
static T_writer_t w; /* the server's */
static bell_page bell;
static void (*reader_init)(T_reader_t *, const uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_init)(T_writer_t *, uint8_t *, uint64_t, uint64_t, uint64_t);
static void (*writer_stop)(T_writer_t *);
static void (*do_resume)(T_client_t *), (*do_lost)(T_client_t *), (*do_fail)(T_client_t *, uint32_t), (*do_submit)(void *, T_io_t *);
static bool (*was_answered)(T_client_t *);

static T_io_t io[CALLS];
static struct call { bool given, done; uint32_t left, device, fill; int32_t error; int16_t want[MOST_BLOCKS]; } calls[CALLS];
/* What the client asked for in this life, by its number in the ring. */
static struct asked { request q; bool live, served; int call; uint32_t index, nblocks; } asked[HISTORY];
static uint64_t seen, life;
/* What the server answered in this life. */
static struct { request q; int64_t error; uint8_t pattern; bool served; } answered[HISTORY];
static bool honest, strict, server_new; /* strict: answers of this life are foretold */
static uint64_t next_epoch;

static uint8_t *page(int k) { return pages.theirs + (size_t)k * MOST_BLOCKS * BLOCK; }
static uint64_t tag_of(const request *q) {
#ifdef SHARED
    return q->tag;
#else
    return q->priv;
#endif
}
static bool names(const request *a, const request *q) {
#ifdef SHARED
    return a->tag == q->tag && a->kind == q->kind && a->device == q->device;
#else
    return a->priv == q->priv && a->kind == q->kind && a->id == q->id;
#endif
}
static int kind_of(const request *q) { /* an IO_ kind, or -1: a question */
#ifdef SHARED
    return q->kind == REQUEST_READ ? E_IO_READ : q->kind == REQUEST_WRITE ? E_IO_WRITE : q->kind == REQUEST_DISCARD ? E_IO_DISCARD
           : q->kind == REQUEST_SYNC ? E_IO_SYNC : -1;
#else
    return q->kind == EVENT_READ ? E_IO_READ : q->kind == EVENT_WRITE ? E_IO_WRITE : q->id == COMMAND_SYNC ? E_IO_SYNC : -1;
#endif
}
static int32_t errno_of(int64_t said) {
#ifdef SHARED
    return said == 0 ? 0 : said > 1 && said <= 4095 ? (int32_t)-said : -EIO;
#else
    int32_t error = (int32_t)said;
    return error <= 0 && error >= -4095 ? error : -EIO;
#endif
}

/* Whether it has no answer: as foretold, or as the client has it. */
static bool still(const struct asked *a) {
    const T_entry_t *e = &c.entries[(uint32_t)(tag_of(&a->q) - c.base) % c.window];
    return a->live && a->call >= 0 && (strict || (e->state != E_ENTRY_FREE && e->priv == tag_of(&a->q)));
}

/* What the client has written into its ring since. */
FUZZ_QUIET static void scan(void) {
    if (c.w.epochs != life) {
        memset(asked, 0, sizeof asked);
        seen = 0;
        life = c.w.epochs;
    }
    for (; seen < c.w.wc && seen < HISTORY; seen++) {
        struct asked *a = &asked[seen];
        const uint8_t *slot = requests.theirs + 64 + seen % c.w.elements * REQUEST;
        T_entry_t *e;
        uint64_t number = 0;
        memcpy(&a->q, slot, sizeof a->q);
        a->live = true;
        a->call = -1;
        for (uint64_t k = 0; k < seen; k++)
            EXPECT(!still(&asked[k]) || seen - k < c.w.elements,
                   "request %llu overwrites %llu, which has no answer", (unsigned long long)seen, (unsigned long long)k);
        if (c.state != E_CLIENT_READY || kind_of(&a->q) < 0)
            continue;
        number = (uint32_t)(tag_of(&a->q) - c.base);
        e = &c.entries[number % c.window];
        if (number >= c.head || e->io == NULL || e->priv != tag_of(&a->q))
            continue; /* a question while connecting */
        a->call = (int)(e->io - io);
        a->index = e->index;
        a->nblocks = e->nblocks;
        struct call *call = &calls[a->call];
        T_io_t *i = &io[a->call];
        uint64_t size = block_sizes[call->device];
        EXPECT(call->given && !call->done, "a request for a call that is none");
        EXPECT(i->kind == E_IO_SYNC || (a->nblocks >= 1 && a->index + a->nblocks <= i->nblocks), "blocks %u to %u of %u", a->index,
               a->index + a->nblocks, i->nblocks);
        bool payload = i->kind == E_IO_WRITE;
#ifdef SHARED
        request *q = &a->q;
        EXPECT(q->device == call->device, "another device");
        if (i->kind == E_IO_SYNC)
            continue;
        EXPECT(q->length == a->nblocks * size && q->device_offset == (i->block + a->index) * size, "another range");
        if (q->kind == REQUEST_DISCARD)
            continue;
        EXPECT(q->buffer_offset % size == 0 && q->buffer_offset <= buffer.length && q->length <= buffer.length - q->buffer_offset,
               "a place of %llu at %llu of the buffer", (unsigned long long)q->length, (unsigned long long)q->buffer_offset);
        for (uint64_t k = 0; k < seen; k++)
            EXPECT(!still(&asked[k]) || kind_of(&asked[k].q) > E_IO_WRITE ||
                   asked[k].q.buffer_offset + asked[k].q.length <= q->buffer_offset ||
                   q->buffer_offset + q->length <= asked[k].q.buffer_offset, "two requests have one place in the buffer");
        const uint8_t *data = buffer.theirs + q->buffer_offset;
        payload = payload && !broken; /* a place that a forged answer freed may be the next one's before it is filled */
        payload = payload && (filled_end <= q->buffer_offset || q->buffer_offset + q->length <= filled);
#else
        EXPECT(a->q.valid == 1 && a->q.error == 0, "an event that is not valid");
        if (i->kind == E_IO_SYNC)
            continue;
        EXPECT(a->q.id == i->block + a->index && a->nblocks == 1, "another block");
        const uint8_t *data = slot + sizeof a->q;
#endif
        if (payload)
            EXPECT(memcmp(data, i->buf + a->index * size, a->nblocks * size) == 0, "another payload");
    }
}

FUZZ_QUIET static void finished(T_io_t *i) {
    int k = (int)(i - io);
    struct call *call = &calls[k];
    uint32_t size = block_sizes[call->device];
    EXPECT(call->given && !call->done, "call %d ends twice", k);
    EXPECT(i->error <= 0 && i->error >= -4095, "call %d ends with %d", k, i->error);
    call->done = true;
    call->error = i->error;
    if (i->kind == E_IO_WRITE)
        for (uint32_t at = 0; at < i->nblocks * size; at += 64)
            EXPECT(page(k)[at] == (uint8_t)call->fill, "a caller's data changed");
    for (uint32_t at = i->kind == E_IO_READ || i->kind == E_IO_WRITE ? i->nblocks * size : 0; at < MOST_BLOCKS * BLOCK; at += 64)
        EXPECT(page(k)[at] == (i->kind == E_IO_READ || i->kind == E_IO_WRITE ? 0x99 : 0x99), "memory beyond a caller's was written");
}

static void submit(void) {
    static const uint32_t kinds[] = {E_IO_READ, E_IO_READ, E_IO_WRITE, E_IO_WRITE, E_IO_SYNC, E_IO_DISCARD, E_IO_ZERO, E_IO_READ};
    uint8_t what = fuzz_u8(), where = fuzz_u8();
    int k = 0;
    while (k < CALLS && calls[k].given && !calls[k].done)
        k++;
    if (k == CALLS || seen > HISTORY - 64)
        return;
    struct call *call = &calls[k];
    memset(&io[k], 0, sizeof io[k]);
    memset(call, 0, sizeof *call);
    call->given = true;
    call->device = (what >> 3 & 1) % DEVICES;
    io[k].kind = kinds[what & 7];
#ifndef SHARED
    if (io[k].kind > E_IO_SYNC)
        io[k].kind = E_IO_SYNC;
#endif
    io[k].nblocks = io[k].kind == E_IO_SYNC ? 0 : 1 + (what >> 4) % MOST_BLOCKS;
    io[k].block = io[k].kind == E_IO_SYNC ? 0 : where % (block_counts[call->device] - io[k].nblocks + 1);
    io[k].buf = page(k);
    io[k].done = finished;
    call->left = io[k].kind == E_IO_SYNC ? 1 : io[k].nblocks;
    call->fill = what ^ where;
    memset(page(k), 0x99, MOST_BLOCKS * BLOCK);
    if (io[k].kind == E_IO_WRITE)
        memset(page(k), (int)call->fill, io[k].nblocks * block_sizes[call->device]);
    for (int b = 0; b < MOST_BLOCKS; b++)
        call->want[b] = -1;
    do_submit(&queues[call->device], &io[k]);
    scan();
}

/* ---- the server */
static void answer(const request *q, int64_t error, uint8_t pattern, uint64_t value, bool served) {
    uint64_t number = w.wc;
    uint8_t *slot;
    if (w.epoch == 0 || !honest || number >= HISTORY)
        return;
    answered[number].q = *q;
    answered[number].error = error;
    answered[number].pattern = pattern;
    answered[number].served = served;
    F_writer_reserve(&w, 1);
    slot = F_writer_slot(&w, 0);
#ifdef SHARED
    block_response a = {.kind = q->kind, .device = q->device, .tag = q->tag, .status = kind_of(q) < 0 ? value : (uint64_t)error};
    memcpy(slot, &a, sizeof a);
#else
    block_event_header a = *q;
    a.error = (int32_t)error;
    memcpy(slot, &a, sizeof a);
    memset(slot + sizeof a, pattern, BLOCK);
    if (kind_of(q) < 0)
        memcpy(slot + sizeof a, &value, 8);
#endif
    F_writer_publish(&w, 1);
}
static void serve(struct asked *a, uint8_t how) {
    static const int64_t errors[] = {0, 0, 0, 0, 0, 1, -5, 5, -28, 28, 4095, -4095, 4096, -4096, INT32_MIN, INT64_MIN};
    int64_t error = errors[how & 15];
    uint8_t pattern = (uint8_t)(0x21 + w.wc * 3);
    uint64_t value = 0;
    a->served = true;
#ifdef SHARED
    uint64_t device = a->q.device % DEVICES;
    switch (a->q.kind) {
    case REQUEST_MEDIA_BLOCKS: value = block_counts[device]; break;
    case REQUEST_BLOCK_LENGTH: value = block_sizes[device]; break;
    case REQUEST_MAX_BLOCKS: value = 1 + (how >> 4); break;
    case REQUEST_MAX_DEVICES: value = DEVICES; break;
    case REQUEST_MAX_REQUESTS: value = how >> 4; break;
    }
    if (a->q.kind == REQUEST_READ && error == 0 && a->q.buffer_offset <= buffer.length && a->q.length <= buffer.length - a->q.buffer_offset)
    {
        memset(buffer.theirs + a->q.buffer_offset, pattern, a->q.length);
        filled = a->q.buffer_offset < filled ? a->q.buffer_offset : filled;
        filled_end = a->q.buffer_offset + a->q.length > filled_end ? a->q.buffer_offset + a->q.length : filled_end;
    }
#else
    value = block_counts[0] * (BLOCK / SECTOR_SIZE);
    if (kind_of(&a->q) < 0 && (how & 15) > 4)
        value = fuzz_odd();
#endif
    answer(&a->q, kind_of(&a->q) < 0 ? 0 : error, pattern, value, true);
}
static void server_acts(void) {
    uint8_t what = fuzz_u8(), more = fuzz_u8();
    uint32_t was_armed = fuzz_countdown;
    uint64_t v;
    request q;
    fuzz_countdown = 0;
    switch (what % 10) {
    case 0:
        if (more & 128 && w.epoch != 0)
            writer_stop(&w);
        w.bell = more & 64 ? &bell : NULL;
        F_writer_start(&w, next_epoch++);
        honest = server_new = true;
        break;
    case 1: case 2: case 3: /* some of what was asked, in whatever order */
        for (uint64_t k = 0, n = 1 + (what >> 4) % 4; k < seen && n != 0; k++) {
            struct asked *a = &asked[more & 128 ? seen - 1 - k : k];
            if (a->live && !a->served) {
                serve(a, more & 64 ? 0 : more);
                n--;
            }
        }
        break;
    case 4: /* once more, or half of it */
        if (seen == 0)
            break;
        q = asked[more % seen].q;
        if (more & 128)
            ((uint8_t *)&q)[fuzz_u8() % sizeof q] ^= (uint8_t)(1 + fuzz_u8() % 4);
        answer(&q, more & 64 ? -5 : 0, 0x77, fuzz_odd(), false);
        break;
    case 5: /* to what may come */
        if (seen == 0)
            break;
        q = asked[seen - 1].q;
#ifdef SHARED
        q.tag += 1 + more % 3;
#else
        q.priv += 1 + more % 3;
        q.id += more >> 4;
#endif
        answer(&q, 0, 0x55, 0, false);
        break;
    case 6:
        if (w.epoch != 0)
            writer_stop(&w);
        break;
    case 7:
        honest = strict = false;
        v = fuzz_odd();
        memcpy(answers.theirs + more % (answers.length / 8 < 32 ? answers.length / 8 : 32) * 8, &v, 8);
        break;
    case 8:
        honest = strict = false;
        v = fuzz_odd();
        if (more & 1)
            ((ring_header *)answers.theirs)->wc += v;
        if (more & 2)
            ((ring_header *)answers.theirs)->wsc += v;
        if (more & 4 && w.epoch != 0)
            F_writer_start(&w, w.epoch);
        break;
    default:
        fuzz_now += (uint64_t)more * more * 1000000;
#ifdef SHARED
        if (more == 255)
            broken = 1;
#endif
    }
    if (!honest)
        fuzz_no_future(answers.theirs, next_epoch);
    fuzz_countdown = was_armed;
}

/* ---- the client's thread */
static void connect_some(void) {
    bool all = true;
    if (!c.connect(&c, 3000000)) {
        scan();
        return;
    }
    scan();
    if (!was_answered(&c))
        return;
#ifdef SHARED
    all = shared.ndevices == DEVICES;
    for (uint64_t k = 0; k < DEVICES && all; k++)
        all = shared.geometry[k].blocks == block_counts[k] && shared.geometry[k].length == block_sizes[k];
    for (uint64_t k = 0; k < DEVICES && all; k++)
        queues[k].most = shared.geometry[k].most > 1 ? shared.geometry[k].most : 1;
#else
    all = c.sectors == block_counts[0] * (BLOCK / SECTOR_SIZE);
#endif
    if (!all)
        return; /* admit() */
    for (int k = 0; k < CALLS; k++) {
        bool whole = false; /* what is in flight begins anew, from its first block on; what was answered so far stays so */
        if (calls[k].done)
            continue;
        for (uint64_t n = c.tail; n != c.head; n++)
            whole = whole || (c.entries[n % c.window].state != E_ENTRY_FREE && c.entries[n % c.window].io == &io[k]);
        calls[k].left = whole ? io[k].kind == E_IO_SYNC ? 1 : io[k].nblocks : io[k].pending;
        calls[k].error = 0;
        for (int b = 0; b < MOST_BLOCKS; b++)
            calls[k].want[b] = whole ? -1 : -2;
    }
    for (uint64_t k = 0; k < seen; k++)
        asked[k].live = false;
    strict = honest && c.r.epoch == w.epoch;
    server_new = false;
    do_resume(&c);
    scan();
}
static void reap_some(void) {
    uint64_t rc = c.r.rc, stale = c.n.stale, forged = 0;
    bool exact = strict;
    int status;
    server_new = false;
    status = c.reap(&c);
    EXPECT(status == E_SUCCESS || c.r.rc == rc || status != E_NO_DATA, "skipped without a word");
    if (status != E_SUCCESS) {
        if (status != E_NO_DATA) {
            do_lost(&c);
            strict = false;
        }
        scan();
        return;
    }
    if (!exact || !strict || server_new) {
        strict = false;
        for (int k = 0; k < CALLS; k++)
            if (calls[k].done)
                calls[k].left = 0;
        scan();
        return;
    }
    for (uint64_t n = rc; n < c.r.rc; n++) {
        struct asked *a = NULL;
        for (uint64_t k = 0; k < seen && a == NULL; k++)
            if (asked[k].live && asked[k].call >= 0 && names(&answered[n].q, &asked[k].q))
                a = &asked[k];
        if (a == NULL) {
            forged++;
            continue;
        }
        struct call *call = &calls[a->call];
        int32_t error = errno_of(answered[n].error);
        a->live = false;
        call->left -= a->nblocks;
        if (error != 0)
            call->error = error;
        for (uint32_t b = 0; b < a->nblocks && io[a->call].kind == E_IO_READ && error == 0; b++)
#ifdef SHARED
            call->want[a->index + b] = answered[n].served ? answered[n].pattern : -2; /* nobody has put anything there */
#else
            call->want[a->index + b] = answered[n].pattern;
#endif
        if (call->left != 0) {
            continue;
        }
        EXPECT(call->done, "call %d has all its answers, and does not end", a->call);
        EXPECT(io[a->call].error == error || io[a->call].error != 0, "call %d ends with %d, not %d", a->call, io[a->call].error, error);
        if (io[a->call].kind == E_IO_READ && io[a->call].error == 0)
            for (uint32_t b = 0; b < io[a->call].nblocks; b++)
                for (uint32_t at = 0; at < block_sizes[call->device]; at += 32)
                    EXPECT(call->want[b] == -2 || (page(a->call)[b * block_sizes[call->device] + at] == (uint8_t)call->want[b] && call->want[b] >= 0),
                           "block %u of call %d is not what was answered", b, a->call);
    }
    EXPECT(c.n.stale - stale == forged, "%llu stale answers are counted, there were %llu", (unsigned long long)(c.n.stale - stale),
           (unsigned long long)forged);
    for (int k = 0; k < CALLS; k++)
        EXPECT(!calls[k].given || !calls[k].done || calls[k].left == 0 || io[k].error != 0, "call %d ends before its last answer", k);
    scan();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool made;
    if (!made) {
        CORE_CONSTANTS
        CORE_BINDINGS
        *(void **)&reader_init = ring_function("reader_init");
        *(void **)&writer_init = ring_function("writer_init");
        *(void **)&writer_stop = ring_function("writer_stop");
        fuzz_region_make(&requests, 64 + RING * REQUEST, PROT_READ | PROT_WRITE);
        fuzz_region_make(&answers, 64 + RING * ANSWER, PROT_READ);
        fuzz_region_make(&pages, CALLS * MOST_BLOCKS * BLOCK, PROT_READ | PROT_WRITE);
#ifdef SHARED
        fuzz_region_make(&buffer, BUFFER, PROT_READ | PROT_WRITE);
        do_resume = client_function("client_resume");
        do_lost = client_function("client_lost");
        do_fail = client_function("client_fail");
        do_submit = client_function("client_submit");
        was_answered = client_function("client_answered");
#else
        do_resume = F_client_resume;
        do_lost = F_client_lost;
        do_fail = F_client_fail;
        do_submit = F_client_submit;
        was_answered = (void *)F_client_answered;
#endif
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = server_acts;
    uint8_t kind = fuzz_u8(), more = fuzz_u8();
    fuzz_region_size(&requests, 64 + (1 + kind % RING) * REQUEST);
    fuzz_region_size(&answers, 64 + (1 + more % RING) * ANSWER);
    memset(&c, 0, offsetof(T_client_t, entries));
    memset(c.entries, 0, 2 * RING * sizeof c.entries[0]);
    memset(queues, 0, sizeof queues);
    memset(&bell, 0, sizeof bell);
    memset(io, 0, sizeof io);
    memset(calls, 0, sizeof calls);
    c.window = 1;
    c.allowed = E_WINDOW;
    c.depth = 1 + (kind >> 3 & 7) * 4;
    c.settled = kind & 64 ? 16 : 0;
    c.fail_fast = kind >> 7;
    c.nqueues = DEVICES;
    c.queues = queues;
    for (uint32_t k = 0; k < DEVICES; k++) {
        queues[k].client = &c;
        queues[k].device = k;
        queues[k].block_size = block_sizes[k];
        queues[k].clears = more >> 6 & 1;
    }
#ifdef SHARED
    fuzz_region_size(&buffer, (size_t)(1 + (more >> 4 & 3)) * 4096);
    memset(&shared, 0, sizeof shared);
    memset(used, 0, sizeof used);
    broken = 0;
    c.transport = &shared;
    c.issue = F_shared_issue;
    c.reap = F_shared_reap;
    c.connect = (void *)F_shared_connect;
    c.renew = F_shared_renew;
    shared.base = buffer.ours;
    shared.length = shared.most = buffer.length;
    shared.broken = &broken;
    shared.used = used;
    writer_init(&c.w, requests.ours, requests.length, REQUEST, BUFFER_PROTOCOL);
    reader_init(&c.r, answers.ours, answers.length, ANSWER, BUFFER_PROTOCOL);
    writer_init(&w, answers.theirs, answers.length, ANSWER, BUFFER_PROTOCOL);
#else
    c.issue = F_client_issue;
    c.reap = F_client_reap;
    c.connect = (void *)F_client_connect;
    writer_init(&c.w, requests.ours, requests.length, REQUEST, BLOCK_REQUEST_PROTOCOL);
    reader_init(&c.r, answers.ours, answers.length, ANSWER, BLOCK_RESPONSE_PROTOCOL);
    writer_init(&w, answers.theirs, answers.length, ANSWER, BLOCK_RESPONSE_PROTOCOL);
#endif
    c.spin_ns = c.r.spin_ns;
    c.r.may_spin = 0;
    c.r.settle_ns = 0;
    c.r.bell = more & 128 ? &bell : NULL;
    next_epoch = 1;
    honest = strict = false;
    seen = life = 0;
    memset(asked, 0, sizeof asked);
    for (int turns = 0; fuzz_left() != 0 && turns < 120; turns++) {
        uint8_t what = fuzz_u8();
#ifdef SHARED
        filled = UINT64_MAX;
        filled_end = 0;
#endif
        if (what < 100)
            server_acts();
        else if (what < 140)
            submit();
        else if (what >= 230)
            fuzz_arm();
        else if (c.state == E_CLIENT_READY)
            reap_some();
        else
            connect_some();
#ifdef SHARED
        if (c.state == E_CLIENT_READY && c.flying == 0)
            EXPECT(shared.taken == 0, "%llu units of the buffer are taken by nobody", (unsigned long long)shared.taken);
#endif
        EXPECT(c.head - c.tail <= c.window, "%llu in flight, the window is %u", (unsigned long long)(c.head - c.tail), c.window);
    }
    fuzz_countdown = 0;
    do_fail(&c, E_CLIENT_FAILED);
    for (int k = 0; k < CALLS; k++)
        EXPECT(!calls[k].given || calls[k].done, "call %d does not end", k);
    fuzz_region_check(&requests);
    fuzz_region_check(&pages);
#ifdef SHARED
    fuzz_region_check(&buffer);
#endif
    return 0;
}
