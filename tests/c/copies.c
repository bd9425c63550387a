/* _copy.h. `copies bytes` compares what is copied, and what lies beside it, for many lengths and places. `copies choice
 * PLAIN STREAM PLAIN STREAM ...` gives blocks 20000 times for each pair of costs, in picoseconds for a byte, and prints how
 * many of the last 10000 of each went past the caches; `noisy`: every fifth that is timed seems to take 30 times as long. The
 * clock is ours. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t clock_ns, cost_plain, cost_stream, length, fences, seen, looks;
static int noisy;

static int fake_clock(clockid_t which, struct timespec *t) {
    (void)which;
    /* Between two looks lies a copy. */
    clock_ns += (fences != seen ? cost_stream : cost_plain) * length / 1000 * (noisy && looks++ % 10 == 9 ? 30 : 1);
    seen = fences;
    t->tv_sec = (time_t)(clock_ns / 1000000000u);
    t->tv_nsec = (long)(clock_ns % 1000000000u);
    return 0;
}
#define clock_gettime(which, t) fake_clock((which), (t))

#if defined(__x86_64__)
#include <immintrin.h>
#define _mm_sfence() (void)fences++
#endif
#include "_copy.h"

enum { BLOCK = 4096, ROOM = 80000, EDGE = 128 };

static unsigned char source[ROOM], target[ROOM], expected[ROOM];

static int check(const char *name, size_t n, size_t to, size_t from) {
    if (memcmp(target, expected, sizeof target) == 0)
        return 0;
    printf("%s: %zu bytes from %zu to %zu\n", name, n, from, to);
    return 1;
}

static int bytes(void) {
    static const size_t lengths[] = {0, 1, 31, 64, 127, 128, 1536, 4095, 4096, 4097, 4120, 4159, 4160, 4223, 4224, 8192, 65536, 65573};
    static const size_t places[] = {0, 1, 24, 31, 32, 63, 64, 100};
    size_t i, j, k, at;
    int wrong = 0;
    for (at = 0; at < ROOM; at++)
        source[at] = (unsigned char)(at * 7 + at / 251);
    for (i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (j = 0; j < sizeof places / sizeof *places; j++)
            for (k = 0; k < sizeof places / sizeof *places; k++) {
                size_t n = lengths[i], to = EDGE + places[j], from = places[k];
                copy_giver plain = {0}, streams = {0};
                streams.streams = true;
                memset(expected, 0xa5, sizeof expected);
                memcpy(expected + to, source + from, n);
                memset(target, 0xa5, sizeof target);
                copy_taken(target + to, source + from, n);
                wrong += check("taken", n, to, from);
                memset(target, 0xa5, sizeof target);
                copy_given(&plain, target + to, source + from, n);
                wrong += check("given", n, to, from);
                memset(target, 0xa5, sizeof target);
                copy_given(&streams, target + to, source + from, n);
                wrong += check("given past the caches", n, to, from);
                memset(target, 0xa5, sizeof target);
                copy_payload(target + to, source + from, n);
                wrong += check("payload", n, to, from);
            }
    memset(expected, 0xa5, sizeof expected);
    memset(target, 0xa5, sizeof target);
    for (i = 0; i <= COPY_FEW + 1; i++)
        for (j = 0; j <= 16; j++) {
            memset(expected, 0xa5, 1024);
            memcpy(expected + EDGE + j, source + 3 * j, i);
            memset(target, 0xa5, 1024);
            copy_few(target + EDGE + j, source + 3 * j, i);
            if (memcmp(target, expected, 1024) != 0)
                wrong += check("few", i, EDGE + j, 3 * j);
        }
    return wrong != 0;
}

int main(int argc, char **argv) {
    copy_giver giver = {0};
    int pair, k;
    if (argc == 2 && strcmp(argv[1], "bytes") == 0)
        return bytes();
    length = BLOCK;
    noisy = argc > 1 && strcmp(argv[1], "noisy") == 0;
    for (pair = 2; pair + 1 < argc; pair += 2) {
        cost_plain = strtoull(argv[pair], NULL, 10);
        cost_stream = strtoull(argv[pair + 1], NULL, 10);
        unsigned past = 0;
        for (k = 0; k < 20000; k++) {
            uint64_t before = fences;
            copy_given(&giver, target, source, BLOCK);
            past += k >= 10000 && fences != before;
        }
        printf("%u\n", past);
    }
    return 0;
}
