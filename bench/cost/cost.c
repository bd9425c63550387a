/* What the programs of tools/cost.py share. */
#include "cost.h"

#include <gnu/libc-version.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

bool cost_counts;

void cost_fail(const char *file, int line, const char *format, ...) {
    va_list words;
    va_start(words, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, words);
    fputc('\n', stderr);
    va_end(words);
    exit(1);
}

/* In libc's place: time passes by looks at it. */
int clock_gettime(clockid_t clock, struct timespec *t) {
    static uint64_t now = 1000000000;
    bool was = cost_pause();
    (void)clock;
    now += COST_TICK;
    t->tv_sec = (time_t)(now / 1000000000);
    t->tv_nsec = (long)(now % 1000000000);
    cost_go_on(was);
    return 0;
}

void *cost_memory(size_t n) {
    void *p;
    EXPECT(posix_memalign(&p, 4096, (n + 4095) / 4096 * 4096) == 0, "no memory");
    memset(p, 0, n);
    return p;
}

void cost_row(void (*some)(unsigned n), unsigned batch, const char *format, ...) {
    char name[80];
    va_list words;
    unsigned k, turn;
    va_start(words, format);
    int n = vsnprintf(name, sizeof name - 20, format, words);
    va_end(words);
    EXPECT(n > 0 && n < (int)sizeof name - 20, "a row's name is too long");
    n += snprintf(name + n, 12, ", batch %u", batch);
    for (k = 0; k < COST_FIRST; k += batch)
        some(batch);
    CALLGRIND_DUMP_STATS_AT("before"); /* and not ZERO_STATS, which leaves two instructions of each call that was paused */
    for (turn = 1; turn <= 2; turn++) {
        for (k = 0; k < turn * COST_ELEMENTS; k += batch)
            some(batch);
        snprintf(name + n, sizeof name - (size_t)n, " /%u", turn);
        CALLGRIND_DUMP_STATS_AT(name);
    }
}

/* What decides which code is taken, by the CPU that this runs on; under valgrind that is valgrind's. */
static void __attribute__((constructor)) tell(void) {
    printf("libc %s\ncpu", gnu_get_libc_version());
#ifdef __x86_64__
    unsigned a, b = 0, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    printf("%s%s%s%s%s%s", __builtin_cpu_supports("sse4.2") ? " sse4.2" : "",
           __builtin_cpu_supports("pclmul") ? " pclmul" : "",
           __builtin_cpu_supports("avx2") ? " avx2" : "", __builtin_cpu_supports("avx512vl") ? " avx512vl" : "",
           b >> 9 & 1 ? " erms" : "", d >> 4 & 1 ? " fsrm" : "");
#endif
    printf("\nelements %d\n", COST_ELEMENTS);
    fflush(stdout);
}
