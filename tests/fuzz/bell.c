/* fuzz target: what others write into the bells of channels, at any moment of who sleeps on them. core: _ring
 *
 * The channels are an honest writer's, their bells anybody's: their words are overwritten at any turn, rung without a reason,
 * frozen, while one reader waits, or two do together. The kernel's futexes are the target's; in a sleep the peer may act, too.
 * Oracles: no byte outside a bell is touched (guard pages), and in it only what docs/protocol.md gives the reader. Who waits
 * is awake as soon as there is something new, where nobody meddled, else within 100 ms; and never longer than he was told to
 * be. A sleep that ends early was ended by somebody, so that a ring costs at most one, and so often in vain only as a bell is
 * listened to; the writer makes one system call for an announcement at most, none without. All that was published is read, once
 * and in order, or counted as lost.
 */
#define FUZZ_PEER
#define FUZZ_CLOCK
#include "fuzz.h"

#include <linux/futex.h>
#undef syscall
#undef nanosleep
static long kernel(long number, ...);
static int dozes(const struct timespec *t, struct timespec *left);
#define syscall(...) kernel(__VA_ARGS__)
#define nanosleep(t, l) dozes((t), (l))

#include CORE_SOURCE
#undef memcpy

enum { CHANNELS = 2, SIZE = 16, ELEMENTS = 6, PROTOCOL = 0x77, BELL = sizeof(bell_page), AT_ONCE = 100000, PAUSE = 101000000 };
static struct channel {
    fuzz_region region, page;
    bell_page *bell;     /* the peer's mapping */
    bell_page mirror;    /* as it was left by all but the reader */
    T_reader_t r;
    T_writer_t w;
    bool meddled;        /* with its bell, since its writer's epoch began */
    bool rings;          /* its writer has the bell */
    uint64_t ready_at;   /* 0: there is nothing new */
    uint64_t taken, lost, epoch;
} channels[CHANNELS];
static uint32_t stop;
static uint64_t next_epoch, acts, wakes, vain, stopped_at;
static bool no_waitv, together, at_once; /* at_once: nobody has meddled in this wait, and its writers ring */
static uint32_t *sleeping[CHANNELS];
static unsigned nsleeping;
static bool woken;

static void wake(const void *word) {
    for (unsigned k = 0; k < nsleeping; k++)
        for (int c = 0; c < CHANNELS; c++) /* the same word by either mapping */
            woken = woken || (word == &channels[c].bell->seq && sleeping[k] == &((bell_page *)channels[c].page.ours)->seq) ||
                    word == sleeping[k];
}

/* ---- the writers, and whoever writes to bells */
static void told(struct channel *c) { memcpy(&c->mirror, c->bell, BELL); }
static uint64_t patience(const T_reader_t *r) { /* rings in vain that are listened to */
    return V_VAIN_MOST + (r->batches - r->vain_from);
}
static void ready(void) {
    for (int k = 0; k < (together ? CHANNELS : 1); k++)
        at_once = at_once && channels[k].r.bell != NULL && !channels[k].meddled && channels[k].rings &&
                  channels[k].r.vain < patience(&channels[k].r);
    for (int k = 0; k < CHANNELS; k++)
        if (!F_reader_ready(&channels[k].r)) /* what came is gone again */
            channels[k].ready_at = 0;
        else if (channels[k].ready_at == 0)
            channels[k].ready_at = fuzz_now;
}
static void writes(struct channel *c, uint8_t more) {
    uint32_t waiters = c->bell->waiters;
    uint64_t before = wakes;
    if (c->w.epoch == 0 || more & 64) {
        c->w.bell = more & 128 ? NULL : c->bell;
        c->rings = c->w.bell != NULL;
        c->meddled = false;
        F_writer_start(&c->w, next_epoch++);
        if (c->w.bell == NULL)
            c->meddled = true; /* there may be an epoch in it that is none */
    } else if ((more & 63) == 63)
        F_writer_stop(&c->w);
    else {
        for (int n = 1 + more % 3; n != 0; n--) {
            uint64_t number = c->w.wc;
            F_writer_reserve(&c->w, 1);
            memcpy(F_writer_slot(&c->w, 0), &number, 8);
            memcpy(F_writer_slot(&c->w, 0) + 8, &c->w.epoch, 8);
            F_writer_publish(&c->w, 1);
        }
    }
    EXPECT(wakes - before <= (waiters != 0 && c->w.bell != NULL), "%llu system calls for %u announcements", (unsigned long long)(wakes - before),
           waiters);
    EXPECT(c->w.bell == NULL || c->bell->waiters == 0, "the announcement stands there yet");
}
static void peer_acts(void) {
    uint8_t what = fuzz_u8(), more = fuzz_u8();
    struct channel *c = &channels[what & 1];
    uint32_t was_armed = fuzz_countdown;
    uint64_t v;
    fuzz_countdown = 0;
    acts++;
    switch (what >> 1 & 7) {
    case 0: case 1: case 2:
        writes(c, more);
        break;
    case 3: /* a word of the bell, */
        c->meddled = true;
        v = fuzz_odd();
        memcpy((uint8_t *)c->bell + more % 16 * 8, &v, more & 128 ? 4 : 8);
        break;
    case 4: /* one that means something, */
        c->meddled = true;
        if (more & 1)
            c->bell->ringer = more & 2 ? c->w.epoch : c->w.epoch - 1;
        if (more & 4)
            c->bell->waiters = more >> 3 & 1;
        if (more & 16)
            c->bell->seq += (more & 32) ? 1 : -1u;
        if (more & 64)
            memset(c->bell, more & 128 ? 0xff : 0, BELL);
        break;
    case 5: case 6: /* a ring for nothing */
        c->bell->seq++;
        if (more & 1)
            c->bell->waiters = 0;
        else if (more & 2)
            c->bell->waiters = 1;
        c->meddled = c->meddled || (more & 1);
        wake(&c->bell->seq);
        break;
    default: /* our own side ends the wait */
        stop = 1;
        if (c->r.bell != NULL)
            F_bell_kick(c->r.bell);
        if (stopped_at == 0)
            stopped_at = fuzz_now;
    }
    told(&channels[0]);
    told(&channels[1]);
    ready();
    fuzz_countdown = was_armed;
}

/* ---- the kernel */
static void passes(uint64_t end) { /* the time of a sleep, in which others act */
    while (!woken && fuzz_now < end && fuzz_left() != 0) {
        uint8_t b = fuzz_u8();
        if (b >= 96)
            break;
        fuzz_now += (end - fuzz_now) / 96 * b;
        peer_acts();
    }
    if (!woken)
        fuzz_now = end;
    nsleeping = 0;
}
static long kernel(long number, ...) {
    va_list words;
    va_start(words, number);
    long result = 0;
    if (number == SYS_futex) {
        uint32_t *word = va_arg(words, uint32_t *);
        int what = va_arg(words, int);
        uint32_t seen = va_arg(words, uint32_t);
        const struct timespec *t = va_arg(words, const struct timespec *);
        if (what == FUTEX_WAKE) {
            wakes++;
            wake(word);
        } else if (*(volatile uint32_t *)word != seen) {
            vain++;
            errno = EAGAIN;
            result = -1;
        } else {
            sleeping[0] = word;
            nsleeping = 1;
            woken = false;
            passes(fuzz_now + (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec);
            vain += woken;
        }
    } else if (number == SYS_futex_waitv) {
        const futex_entry *list = va_arg(words, const futex_entry *);
        unsigned n = va_arg(words, unsigned);
        (void)va_arg(words, int);
        const struct timespec *t = va_arg(words, const struct timespec *);
        EXPECT(n >= 1 && n <= CHANNELS, "%u bells", n);
        if (no_waitv) {
            errno = ENOSYS;
            result = -1;
        }
        for (unsigned k = 0; k < n && result == 0; k++) {
            sleeping[k] = (uint32_t *)(uintptr_t)list[k].word;
            if (*(volatile uint32_t *)sleeping[k] != (uint32_t)list[k].seen) {
                vain++;
                errno = EAGAIN;
                result = -1;
            }
        }
        if (result == 0) {
            nsleeping = n;
            woken = false;
            passes((uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec);
            vain += woken;
            if (!woken) {
                errno = ETIMEDOUT;
                result = -1;
            }
        }
    } else
        fuzz_fail("system call %ld", number);
    va_end(words);
    fuzz_turn();
    return result;
}
static int dozes(const struct timespec *t, struct timespec *left) {
    (void)left;
    woken = false;
    passes(fuzz_now + (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec);
    fuzz_turn();
    return 0;
}

/* ---- the reader */
static void untouched(const struct channel *c) {
    const bell_page *b = c->bell, *m = &c->mirror;
    EXPECT(b->magic == m->magic && b->seq == m->seq && b->ringer == m->ringer && memcmp(&b->state, &m->state, offsetof(bell_page, reader_rc) - offsetof(bell_page, state)) == 0 &&
           memcmp(&b->reader_sums, &m->reader_sums, BELL - offsetof(bell_page, reader_sums)) == 0, "a reader wrote what is not its own");
    EXPECT(b->waiters == m->waiters || (b->waiters == 1 && c->r.bell != NULL), "waiters are %u, not %u", b->waiters, m->waiters);
    if (c->r.bell == NULL || c->r.mute)
        EXPECT(b->reader_rc == m->reader_rc && b->reader_epoch == m->reader_epoch, "a reader that is not asked tells how far it is");
}
static void takes(struct channel *c) {
    uint8_t got[SIZE * 4];
    uint64_t n = 0, v, before = acts;
    enum __pyx_t_8muenfast_5_ring_ring_status status = F_reader_copy(&c->r, got, 4, &n);
    if (status == E_EPOCH_CHANGED) {
        c->taken = c->lost = 0;
        c->epoch = c->r.epoch;
    } else if (status == E_OVERRUN_DETECTED)
        c->lost += c->r.lost;
    else if (status == E_SUCCESS)
        for (uint64_t k = 0; k < n; k++) {
            memcpy(&v, got + k * SIZE, 8);
            EXPECT(v == c->taken + c->lost, "element %llu comes as number %llu", (unsigned long long)v, (unsigned long long)(c->taken + c->lost));
            memcpy(&v, got + k * SIZE + 8, 8);
            EXPECT(v == c->epoch, "an element of epoch %llu in %llu", (unsigned long long)v, (unsigned long long)c->epoch);
            c->taken++;
        }
    if (c->r.epoch != 0 && status != E_EPOCH_CHANGED)
        EXPECT(c->r.rc == c->taken + c->lost, "%llu were taken and %llu lost of %llu", (unsigned long long)c->taken, (unsigned long long)c->lost,
               (unsigned long long)c->r.rc);
    untouched(c);
    if (c->r.bell != NULL && !c->r.mute && acts == before && (status == E_SUCCESS || status == E_EPOCH_CHANGED || status == E_OVERRUN_DETECTED))
        EXPECT(c->bell->reader_rc == c->r.rc && (status != E_EPOCH_CHANGED || c->bell->reader_epoch == c->r.epoch), "it tells another place than it is at");
    told(c);
    c->ready_at = 0;
    ready();
}
static void waits(bool all, uint64_t ns) {
    T_reader_t *list[CHANNELS] = {&channels[0].r, &channels[1].r};
    T_waitset_t set = {.readers = list, .n = CHANNELS, .polls = false};
    uint64_t start = fuzz_now, before = acts, slept, since = 0, heard = 1;
    bool found;
    together = all;
    at_once = !all || !no_waitv;
    stop = 0;
    stopped_at = vain = 0;
    for (int k = 0; k < CHANNELS; k++) {
        struct channel *c = &channels[k];
        c->r.watch_stop = &stop;
        c->ready_at = 0;
        if (c->r.bell != NULL && k < (all ? CHANNELS : 1))
            heard += patience(&c->r);
    }
    ready();
    slept = channels[0].r.sleeps;
    found = all ? F_readers_wait(&set, ns) : F_reader_wait(&channels[0].r, ns, &stop);
    slept = channels[0].r.sleeps - slept;
    for (int k = 0; k < (all ? CHANNELS : 1); k++) {
        struct channel *c = &channels[k];
        if (c->ready_at != 0 && (since == 0 || c->ready_at < since))
            since = c->ready_at;
        untouched(c);
    }
    EXPECT(found || fuzz_now - start >= ns || stop, "it gives up after %llu ns of %llu", (unsigned long long)(fuzz_now - start), (unsigned long long)ns);
    EXPECT(fuzz_now - start <= ns + AT_ONCE, "it waits for %llu ns, not %llu", (unsigned long long)(fuzz_now - start), (unsigned long long)ns);
    EXPECT(since == 0 || fuzz_now - since <= (at_once ? AT_ONCE : PAUSE), "something new is found after %llu ns", (unsigned long long)(fuzz_now - since));
    if (stopped_at != 0 && stopped_at >= start)
        EXPECT(fuzz_now - stopped_at <= PAUSE, "it goes on for %llu ns after its end", (unsigned long long)(fuzz_now - stopped_at));
    EXPECT(vain <= acts - before, "%llu of %llu sleeps ended early, of which somebody ended %llu at most", (unsigned long long)vain,
           (unsigned long long)slept, (unsigned long long)(acts - before));
    heard += (fuzz_now - start + V_VAIN_NS) / V_VAIN_NS * V_VAIN_MOST * (all ? CHANNELS : 1);
    EXPECT(vain <= heard, "%llu sleeps ended early, of which %llu at most should have been listened to", (unsigned long long)vain,
           (unsigned long long)heard);
    if (found && !stop)
        EXPECT(since != 0 || acts != before, "it is awake, and nothing is new");
    told(&channels[0]);
    told(&channels[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint64_t times[] = {100000, 50000, 1000000, 30000000, 150000000, 2000000000};
    static bool made;
    if (!made) {
        CORE_CONSTANTS
        V_SETTLE_PAUSES = 0;
        for (int k = 0; k < CHANNELS; k++) {
            fuzz_region_make(&channels[k].region, 64 + SIZE * ELEMENTS, PROT_READ | PROT_WRITE);
            fuzz_region_make(&channels[k].page, BELL, PROT_READ | PROT_WRITE);
        }
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = peer_acts;
    next_epoch = 1;
    acts = wakes = 0;
    nsleeping = 0;
    uint8_t kind = fuzz_u8(), more = fuzz_u8();
    no_waitv = kind & 1;
    for (int k = 0; k < CHANNELS; k++) {
        struct channel *c = &channels[k];
        fuzz_region_size(&c->region, c->region.most);
        fuzz_region_size(&c->page, BELL);
        c->bell = (bell_page *)c->page.theirs;
        c->bell->magic = BELL_MAGIC;
        F_reader_init(&c->r, c->region.ours, c->region.length, SIZE, PROTOCOL);
        F_writer_init(&c->w, c->region.theirs, c->region.length, SIZE, PROTOCOL);
        memset(&c->w.epochs, 0, sizeof c->w.epochs);
        c->w.epoch = 0;
        c->w.bell = NULL;
        c->r.bell = kind >> (1 + k) & 1 ? (bell_page *)c->page.ours : NULL;
        c->r.mute = kind >> (3 + k) & 1;
        c->r.may_spin = kind >> 5 & 1;
        c->r.settle_ns = 0;
        c->r.poll_ns = kind >> (6 + k) & 1 ? 2000000 : 0;
        c->taken = c->lost = c->epoch = c->ready_at = 0;
        c->rings = false;
        c->meddled = true;
        told(c);
    }
    V_VAIN_MOST = more & 1 ? 2 : 100;
    for (int turns = 0; fuzz_left() != 0 && turns < 100; turns++) {
        uint8_t what = fuzz_u8();
        if (what < 90)
            peer_acts();
        else if (what < 130)
            takes(&channels[what & 1]);
        else if (what < 230)
            waits(what & 1, times[(what >> 1) % 6]);
        else
            fuzz_arm();
        for (int k = 0; k < CHANNELS; k++)
            fuzz_region_check(&channels[k].page);
    }
    return 0;
}
