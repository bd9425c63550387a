/* The ring's core under ThreadSanitizer: one writer and two readers, threads of one process, on one buffer.
 *
 * usage: ring_tsan SECONDS-PER-SCENARIO [SEED]; tools/tsan.py builds and runs it (make tsan).
 *
 * It is the core itself that runs, not a copy: the C that Cython made of _ring.pyx is included below and its nogil
 * functions are called; nothing of Python is started (the linker drops what would need it). core_constants() comes
 * from tools/tsan.py: what module initialisation would have stored.
 *
 * Every scenario runs with and without a bell. Each reader checks each byte of each element that it is given (an
 * element's contents follow from epoch and position), and the books: in every epoch, delivered + lost = position,
 * in the last one = written.
 *
 * flow:  the writer waits until both readers are done with the slots that it writes next. No access is exempt: that
 *        a reader sees complete elements follows from the release store and the acquire load of WC alone, as TSan
 *        sees it, too.
 * overrun: the writer waits for nobody, and restarts now and then. Readers copy what is being written: the intended
 *        race, whose outcome reader_intact throws away. The accesses to slots, and only those (copying and filling
 *        elements, zeroing at a restart), bypass TSan here: see slot_copy and slot_set. That they are thrown away
 *        rightly is seen by the comparison of contents.
 *
 * gcc's TSan does not model atomic_thread_fence (-Wtsan): fences F1..F6 are executed here, but their absence would
 * not be reported by it.
 */
#include "constants.h"

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int overrun; /* which scenario; constant while threads run */

/* The untracked accesses. volatile: else the compiler makes a call of memcpy of the loop, which TSan intercepts. */
__attribute__((noinline, no_sanitize("thread"))) static void untracked_copy(void *dst, const void *src, size_t n) {
    volatile uint8_t *d = dst;
    const volatile uint8_t *s = src;
    for (; n >= 8 && (((uintptr_t)d | (uintptr_t)s) & 7) == 0; n -= 8, d += 8, s += 8)
        *(volatile uint64_t *)d = *(const volatile uint64_t *)s;
    while (n--)
        *d++ = *s++;
}
__attribute__((noinline, no_sanitize("thread"))) static void untracked_set(void *dst, int value, size_t n) {
    volatile uint8_t *d = dst;
    while (n--)
        *d++ = (uint8_t)value;
}

static uint8_t *region;
static size_t region_length;

static int in_slots(const void *p) { /* behind the header of the shared buffer */
    return region != NULL && (uintptr_t)p - (uintptr_t)region - 64 < region_length - 64;
}
static void *slot_copy(void *dst, const void *src, size_t n) {
    if (overrun && (in_slots(dst) || in_slots(src)))
        untracked_copy(dst, src, n);
    else
        memcpy(dst, src, n);
    return dst;
}
static void *slot_set(void *dst, int value, size_t n) {
    if (overrun && in_slots(dst))
        untracked_set(dst, value, n);
    else
        memset(dst, value, n);
    return dst;
}

#define memcpy slot_copy
#define memset slot_set
#include "_ring.c"
#undef memcpy
#undef memset

#define CORE(name) __pyx_f_8muenfast_5_ring_##name
#define TYPE(name) struct __pyx_t_8muenfast_5_ring_##name
#define STATUS(name) __pyx_e_8muenfast_5_ring_##name

#define READERS 2
#define EPOCHS 100000
#define MOST 8 /* elements of a batch */

typedef struct {
    TYPE(reader_t) r;
    uint64_t done;   /* elements consumed in this life of the channel, for the writer in `flow`; atomic */
    uint64_t number; /* how many elements were checked */
    uint64_t overruns, epochs;
    pthread_t thread;
} peer_t;

static TYPE(writer_t) writer;
static peer_t readers[READERS];
static uint64_t written[EPOCHS]; /* per epoch; a reader looks only after it knows that the epoch is over */
static uint64_t last_epoch;      /* non-zero when the writer has ended; atomic */
static uint32_t stop;            /* for reader_wait; atomic */
static size_t elements, size;
static uint64_t start = 1; /* of the random numbers */

static void fail(const char *what, uint64_t a, uint64_t b) {
    fprintf(stderr, "ring_tsan: %s: %llu, %llu\n", what, (unsigned long long)a, (unsigned long long)b);
    exit(1);
}

static uint64_t next(uint64_t *x) { /* splitmix64 */
    uint64_t z = *x += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}
static void fill(uint8_t *element, uint64_t epoch, uint64_t at) {
    uint64_t seed = epoch << 40 ^ at, word;
    for (size_t i = 0; i < size; i += 8) {
        word = next(&seed);
        memcpy(element + i, &word, size - i < 8 ? size - i : 8);
    }
}

static void *write_all(void *argument) {
    uint64_t seed = start, epoch = 1, n, end = now_ns() + *(uint64_t *)argument * 1000000000u;
    uint8_t element[8192];
    CORE(writer_start)(&writer, epoch);
    for (uint64_t batch = 0; now_ns() < end; batch++) {
        n = 1 + next(&seed) % MOST;
        if (!overrun)
            for (int i = 0; i < READERS; i++)
                while (writer.wc + n - load_acquire64(&readers[i].done) > elements)
                    sched_yield();
        CORE(writer_reserve)(&writer, n);
        for (uint64_t k = 0; k < n; k++) {
            fill(element, epoch, writer.wc + k);
            slot_copy(CORE(writer_slot)(&writer, k), element, size);
        }
        CORE(writer_publish)(&writer, n);
        if (next(&seed) % 64 == 0)
            sleep_ns(next(&seed) % 200000); /* readers catch up, and fall asleep */
        if (overrun && next(&seed) % 4096 == 0 && epoch + 1 < EPOCHS) {
            store_release64(&written[epoch], writer.wc);
            if (next(&seed) % 2)
                CORE(writer_stop)(&writer);
            CORE(writer_start)(&writer, ++epoch);
        }
    }
    store_release64(&written[epoch], writer.wc);
    store_release64(&last_epoch, epoch);
    return NULL;
}

static void *read_all(void *argument) {
    peer_t *me = argument;
    TYPE(reader_t) *r = &me->r;
    uint8_t got[MOST * 8192], want[8192];
    uint64_t epoch = 0, delivered = 0, lost = 0, n, last;
    for (;;) {
        uint64_t before = r->rc;
        last = load_acquire64(&last_epoch); /* before the look that may find nothing more */
        switch (CORE(reader_copy)(r, got, MOST, &n)) {
        case STATUS(SUCCESS):
            for (uint64_t k = 0; k < n; k++) {
                fill(want, epoch, before + k);
                if (memcmp(want, got + k * size, size) != 0)
                    fail("an element is not what was written", epoch, before + k);
            }
            delivered += n;
            me->number += n;
            store_release64(&me->done, r->rc);
            break;
        case STATUS(OVERRUN_DETECTED):
            if (!overrun)
                fail("overrun in spite of flow control", before, r->rc);
            lost += r->lost;
            me->overruns++;
            break;
        case STATUS(EPOCH_CHANGED):
            if (epoch != 0 && (r->epoch <= epoch || delivered + lost > load_acquire64(&written[epoch])))
                fail("more was read of an epoch than written", epoch, delivered + lost);
            epoch = r->epoch;
            delivered = lost = 0;
            me->epochs++;
            break;
        case STATUS(NO_DATA):
            if (last != 0 && epoch == last) {
                if (delivered + lost != load_acquire64(&written[last]))
                    fail("delivered + lost is not what was written", delivered + lost, written[last]);
                return NULL;
            }
            /* fall through */
        case STATUS(INACTIVE):
            CORE(reader_wait)(r, 20000000, &stop);
            break;
        default:
            fail("an incompatible channel", 0, 0);
        }
        if (epoch != 0 && delivered + lost != r->rc)
            fail("delivered + lost is not the position", delivered + lost, r->rc);
    }
}

/* A waiter without data leaves when it is told to. */
static void *wait_for_nothing(void *argument) {
    peer_t *me = argument;
    if (CORE(reader_wait)(&me->r, UINT64_C(60000000000), &stop))
        fail("data from nobody", 0, 0);
    return NULL;
}

static void run(const char *name, uint64_t *seconds, size_t element_size, size_t count, int with_bell) {
    static bell_page bell;
    pthread_t thread;
    uint64_t number = 0, overruns = 0, epochs = 0, sleeps = 0;
    size = element_size;
    elements = count;
    region_length = 64 + size * elements + 3;
    region = aligned_alloc(64, (region_length + 63) / 64 * 64);
    memset(region, 0, region_length);
    memset(&bell, 0, sizeof bell);
    memset(written, 0, sizeof written);
    memset(readers, 0, sizeof readers);
    bell.magic = BELL_MAGIC;
    last_epoch = stop = 0;
    CORE(writer_init)(&writer, region, region_length, size, 7);
    writer.bell = with_bell ? &bell : NULL;
    for (int i = 0; i < READERS; i++) {
        CORE(reader_init)(&readers[i].r, region, region_length, i ? size : 0, i ? 0 : 7);
        readers[i].r.bell = writer.bell;
        pthread_create(&readers[i].thread, NULL, read_all, &readers[i]);
    }
    pthread_create(&thread, NULL, write_all, seconds);
    pthread_join(thread, NULL);
    for (int i = 0; i < READERS; i++) {
        pthread_join(readers[i].thread, NULL);
        if (readers[i].number != readers[i].r.delivered || readers[i].overruns != readers[i].r.overruns)
            fail("the core's own counters differ", readers[i].number, readers[i].r.delivered);
        number += readers[i].number;
        overruns += readers[i].overruns;
        epochs += readers[i].epochs;
        sleeps += readers[i].r.sleeps;
        pthread_create(&readers[i].thread, NULL, wait_for_nothing, &readers[i]);
    }
    sleep_ns(10000000);
    store_release32(&stop, 1);
    if (with_bell)
        CORE(bell_kick)(&bell);
    for (int i = 0; i < READERS; i++)
        pthread_join(readers[i].thread, NULL);
    printf("%-8s %-7s %4zu bytes x %2zu: %9llu delivered, %7llu overruns, %5llu epochs, %6llu sleeps, %6llu wakes\n",
           name, with_bell ? "bell" : "no bell", size, elements, (unsigned long long)number,
           (unsigned long long)overruns, (unsigned long long)epochs, (unsigned long long)sleeps,
           (unsigned long long)writer.wakes);
    fflush(stdout);
    if (number == 0 || sleeps == 0 || (overrun && (overruns == 0 || epochs <= READERS)) ||
        (with_bell && writer.wakes == 0))
        fail("the scenario did not show what it is for", number, overruns);
    free(region);
    region = NULL;
}

int main(int argc, char **argv) {
    uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 2;
    if (argc > 2)
        start = strtoull(argv[2], NULL, 10);
    core_constants();
    for (overrun = 0; overrun < 2; overrun++)
        for (int bell = 0; bell < 2; bell++) {
            run(overrun ? "overrun" : "flow", &seconds, 64, 16, bell);
            run(overrun ? "overrun" : "flow", &seconds, 1522, 11, bell);
        }
    return 0;
}
