/* What fuzz.h declares. */
#include "fuzz.h"

static const uint8_t *at, *end;
uint32_t fuzz_countdown;
void (*fuzz_peer)(void);
uint64_t fuzz_now;
static uint64_t dice;

void fuzz_begin(const uint8_t *data, size_t size) {
    at = data;
    end = data + size;
    fuzz_countdown = 0;
    fuzz_now = 1000000000;
    dice = 0;
}
size_t fuzz_left(void) { return (size_t)(end - at); }

size_t fuzz_bytes(void *to, size_t most) {
    size_t n = fuzz_left() < most ? fuzz_left() : most;
    if (n != 0)
        memcpy(to, at, n);
    at += n;
    return n;
}
uint8_t fuzz_u8(void) { return at != end ? *at++ : 0; }
uint16_t fuzz_u16(void) {
    uint16_t v = 0;
    fuzz_bytes(&v, sizeof v);
    return v;
}
uint32_t fuzz_u32(void) {
    uint32_t v = 0;
    fuzz_bytes(&v, sizeof v);
    return v;
}
uint64_t fuzz_u64(void) {
    uint64_t v = 0;
    fuzz_bytes(&v, sizeof v);
    return v;
}

uint64_t fuzz_odd(void) {
    static const uint64_t edges[] = {
        0, 1, 7, 8, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 0x7fffffff, 0x80000000, 0xffffffff, UINT64_C(1) << 32,
        (UINT64_C(1) << 63) - 4096, (UINT64_C(1) << 63) - 512, (UINT64_C(1) << 63) - 1, UINT64_C(1) << 63,
        (UINT64_C(1) << 63) + 1, (UINT64_C(1) << 63) + 512, -UINT64_C(65536), -UINT64_C(8192), -UINT64_C(4096), -UINT64_C(1024),
        -UINT64_C(512), -UINT64_C(64), -UINT64_C(32), -UINT64_C(8), -UINT64_C(2), -UINT64_C(1)};
    uint8_t v = fuzz_u8();
    if (v < 128)
        return v;
    if (v < 160)
        return edges[v - 128];
    if (v < 224)
        return (uint64_t)(v - 160) * 512;
    if (v < 240)
        return edges[(v - 224) * 2] + fuzz_u8();
    return fuzz_u64();
}

void fuzz_fail(const char *format, ...) {
    va_list words;
    va_start(words, format);
    fputs("oracle: ", stderr);
    vfprintf(stderr, format, words);
    fputc('\n', stderr);
    va_end(words);
    abort();
}

enum { CANARY = 64, CANARY_BYTE = 0xa5 };

void fuzz_region_make(fuzz_region *r, size_t most, int protection) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (most + CANARY + page - 1) / page * page;
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    uint8_t *area = mmap(NULL, 2 * whole + 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *other;
    if (fd < 0 || area == MAP_FAILED || ftruncate(fd, (off_t)whole) != 0)
        fuzz_fail("no memory for a region: %s", strerror(errno));
    other = area + page + whole + page;
    if (mmap(area + page, whole, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED ||
        mmap(other, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
        fuzz_fail("no region: %s", strerror(errno));
    close(fd);
    r->most = most;
    r->our_end = area + page + whole;
    r->their_end = other + whole;
    fuzz_region_size(r, most);
}

void fuzz_region_size(fuzz_region *r, size_t length) {
    EXPECT(length <= r->most && length % 8 == 0, "a region of %zu bytes", length);
    r->length = length;
    r->ours = r->our_end - length;
    r->theirs = r->their_end - length;
    memset(r->theirs, 0, length);
    memset(r->theirs - CANARY, CANARY_BYTE, CANARY);
}

void fuzz_region_check(const fuzz_region *r) {
    static const uint64_t canary = UINT64_C(0x0101010101010101) * CANARY_BYTE;
    for (int i = 8; i <= CANARY; i += 8)
        EXPECT(memcmp(r->theirs - i, &canary, 8) == 0, "bytes %d before a region of %zu were written", i, r->length);
}

void fuzz_peer_acts(void) {
    fuzz_countdown = 0;
    if (fuzz_left() != 0)
        fuzz_peer();
}

void fuzz_serve(int most, uint8_t acts, int last, void (*step)(void)) {
    while (fuzz_left() != 0 && most-- > 0) {
        uint8_t what = fuzz_u8();
        if (what < acts)
            fuzz_peer();
        else if (what < 240)
            step();
        else
            fuzz_arm();
    }
    while (last-- > 0)
        step();
}

/* Long copies have a turn in the middle, and all have one behind. */
void *fuzz_copy(void *to, const void *from, size_t n) {
    if (fuzz_countdown == 0)
        return memcpy(to, from, n);
    if (n >= 128) {
        memcpy(to, from, n / 2);
        fuzz_turn();
        memcpy((uint8_t *)to + n / 2, (const uint8_t *)from + n / 2, n - n / 2);
    } else
        memcpy(to, from, n);
    fuzz_turn();
    return to;
}

long fuzz_syscall(long number, ...) {
    va_list words;
    const struct timespec *t;
    va_start(words, number);
    if (number == SYS_futex) {
        uint32_t *word = va_arg(words, uint32_t *);
        int what = va_arg(words, int);
        uint32_t seen = va_arg(words, uint32_t);
        t = va_arg(words, const struct timespec *);
        if (what == FUTEX_WAIT && *(volatile uint32_t *)word == seen && t != NULL)
            fuzz_now += (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec;
    }
    va_end(words);
    fuzz_turn();
    return 0;
}

int fuzz_clock(clockid_t clock, struct timespec *t) {
    (void)clock;
    fuzz_now += 1000;
    t->tv_sec = (time_t)(fuzz_now / 1000000000u);
    t->tv_nsec = (long)(fuzz_now % 1000000000u);
    return 0;
}

int fuzz_nanosleep(const struct timespec *t, struct timespec *left) {
    (void)left;
    fuzz_now += (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec;
    fuzz_turn();
    return 0;
}

ssize_t fuzz_random(void *to, size_t n) {
    uint8_t *p = to;
    dice++;
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(dice * (0x9d + 2 * i) + 0x51);
    return (ssize_t)n;
}
