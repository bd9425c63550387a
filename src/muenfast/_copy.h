/* Copies into and out of slots; no Python.h. */
#ifndef MUENFAST_COPY_H
#define MUENFAST_COPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_atomics.h"

#ifndef COPY_VECTORS /* 0: a copy is a call of memcpy, which tests put themselves in the place of */
#if defined(__x86_64__) && defined(__GNUC__)
#define COPY_VECTORS 1
#else
#define COPY_VECTORS 0
#endif
#endif
#if COPY_VECTORS
#include <immintrin.h>
#endif

/* On x86, gcc makes `rep movsq` of a copy of constant size up to 8 KiB, and glibc `rep movsb` of longer ones than about
 * 2 KiB. On Zen either is two to four times slower for some pairs of addresses, which ones differs from run to run
 * (docs/decisions/004). Pieces below that threshold, of a size that gcc does not know, are copied with vectors. */
enum { COPY_PIECE = 1536 };

static inline void copy_bytes(void *to, const void *from, size_t n) {
    unsigned char *d = (unsigned char *)to;
    const unsigned char *s = (const unsigned char *)from;
#if defined(__x86_64__)
    size_t piece = COPY_PIECE;
    __asm__("" : "+r"(piece), "+r"(n));
    while (n > piece) {
        memcpy(d, s, piece);
        d += piece;
        s += piece;
        n -= piece;
    }
#endif
    memcpy(d, s, n);
}

/* A packet of a few lines into a slot, from private memory, by stores of which none lies in two lines. One that does keeps those
 * behind it waiting for both: small packets go at half the rate then (docs/decisions/012). */
enum { COPY_FEW = 256 };

static inline void copy_part(unsigned char *to, const unsigned char *from, size_t n) {
    size_t at = 0;
    if (n & 8) {
        memcpy(to, from, 8);
        at = 8;
    }
    if (n & 4) {
        memcpy(to + at, from + at, 4);
        at += 4;
    }
    if (n & 2) {
        memcpy(to + at, from + at, 2);
        at += 2;
    }
    if (n & 1)
        to[at] = from[at];
}

static inline void copy_few(void *to, const void *from, size_t n) {
#if COPY_VECTORS
    if (n <= COPY_FEW) {
        unsigned char *d = (unsigned char *)to;
        const unsigned char *s = (const unsigned char *)from;
        size_t at = -(uintptr_t)d % 16;
        at = at < n ? at : n;
        copy_part(d, s, at);
        for (; at + 16 <= n; at += 16)
            _mm_store_si128((__m128i *)(d + at), _mm_loadu_si128((const __m128i *)(s + at)));
        copy_part(d + at, s + at, n - at);
        return;
    }
#endif
    copy_bytes(to, from, n);
}

/* Payload of any length between a shared buffer and memory: of whole blocks, lines that `rep movsb` does not read before
 * it writes them count for more (docs/decisions/004). */
enum { COPY_LONG = 4096 };

static inline void copy_payload(void *to, const void *from, size_t n) {
    if (n >= COPY_LONG)
        memcpy(to, from, n);
    else
        copy_bytes(to, from, n);
}

/* What follows is for payload that goes from one core to another (docs/decisions/012). */
enum {
    COPY_BETWEEN = 4096, /* bytes from which on it matters */
    COPY_TIMED = 256,    /* of so many pieces one is timed, the first of them streamed: a request waits for the clock ... */
    COPY_PROBED = 4096,  /* ... and longer for this: of so many one is streamed where they are not ... */
    COPY_SLOW = 1024,    /* ... and one is not where they are */
    /* Picoseconds for a byte. Cores that share a cache need 25 to 100, by where both ends lie; others 170 to 370. */
    COPY_FAR = 130,
    COPY_NEAR = 100
};

/* How one thread puts payload into shared memory. Zeroed at first. */
typedef struct copy_giver {
    bool streams;     /* past the caches ... */
    uint32_t turns;
    uint64_t cost[2]; /* ... which costs [1], and else [0]: picoseconds for a byte, 0: not measured */
} copy_giver;

#if COPY_VECTORS
/* Two cache lines a turn; the rest plainly. */
static inline __attribute__((target("avx2"))) void copy_lines(unsigned char *to, const unsigned char *from, size_t n) {
    for (; n >= 128; n -= 128, to += 128, from += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)from);
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + 96));
        _mm256_storeu_si256((__m256i *)to, a);
        _mm256_storeu_si256((__m256i *)(to + 32), b);
        _mm256_storeu_si256((__m256i *)(to + 64), c);
        _mm256_storeu_si256((__m256i *)(to + 96), d);
    }
    if (n != 0)
        memcpy(to, from, n);
}

/* As copy_lines(), past the caches but for lines that are not whole. Such stores are ordered with others by sfence only, be
 * they before (F1 of docs/memory-model.md) or after (S1). */
static inline __attribute__((target("avx2"))) void copy_stream(unsigned char *to, const unsigned char *from, size_t n) {
    size_t head = -(uintptr_t)to % 64;
    head = head < n ? head : n;
    _mm_sfence();
    if (head != 0) {
        memcpy(to, from, head);
        to += head, from += head, n -= head;
    }
    for (; n >= 128; n -= 128, to += 128, from += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)from);
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + 96));
        _mm256_stream_si256((__m256i *)to, a);
        _mm256_stream_si256((__m256i *)(to + 32), b);
        _mm256_stream_si256((__m256i *)(to + 64), c);
        _mm256_stream_si256((__m256i *)(to + 96), d);
    }
    _mm_sfence();
    if (n != 0)
        memcpy(to, from, n);
}
#endif

/* As copy_payload(), of what another core has just written: its lines come sooner where several loads wait for them at once
 * than where `rep movsb` does. */
static inline void copy_taken(void *to, const void *from, size_t n) {
#if COPY_VECTORS
    if (n >= COPY_BETWEEN && __builtin_cpu_supports("avx2")) {
        copy_lines((unsigned char *)to, (const unsigned char *)from, n);
        return;
    }
#endif
    copy_payload(to, from, n);
}

#if COPY_VECTORS
static inline void copy_timed(copy_giver *g, bool streams, unsigned char *to, const unsigned char *from, size_t n) {
    uint64_t old = g->cost[streams], start = now_ns(), cost;
    if (streams)
        copy_stream(to, from, n);
    else
        copy_payload(to, from, n);
    cost = (now_ns() - start) * 1000 / n + 1;
    if (old != 0) /* one interruption is no news */
        cost = (3 * old + (cost < 2 * old ? cost : 2 * old)) / 4;
    g->cost[streams] = cost;
    if (g->streams)
        g->streams = g->cost[0] > COPY_NEAR && 4 * g->cost[0] > 5 * g->cost[1];
    else
        g->streams = g->cost[0] > COPY_FAR && g->cost[1] != 0 && 4 * g->cost[0] > 7 * g->cost[1];
}
#endif

/* As copy_payload(), into memory that another core reads next and read before. Where both share a cache, that is the best
 * place for it. Where they do not, each line is asked back from the other's: many times as slow as a way past the caches. */
static inline void copy_given(copy_giver *g, void *to, const void *from, size_t n) {
#if COPY_VECTORS
    if (n >= COPY_BETWEEN && __builtin_cpu_supports("avx2")) {
        bool streams = g->streams;
        uint32_t turn = ++g->turns;
        if (turn % COPY_TIMED == 0) {
            bool doubt = !streams && (g->cost[1] == 0 || (g->cost[0] > COPY_FAR && turn / COPY_TIMED % 2 == 0));
            bool other = doubt || turn % (streams ? COPY_SLOW : COPY_PROBED) == 0;
            copy_timed(g, streams != other, (unsigned char *)to, (const unsigned char *)from, n);
        } else if (streams)
            copy_stream((unsigned char *)to, (const unsigned char *)from, n);
        else
            copy_payload(to, from, n);
        return;
    }
#else
    (void)g;
#endif
    copy_payload(to, from, n);
}

#endif
