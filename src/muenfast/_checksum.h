/* The Internet checksum (RFC 1071), by itself and while bytes are copied; no Python.h.
 *
 * A sum is one of 16-bit words in the machine's order, whatever that is: as long as checksums are loaded and stored in it,
 * too, they come out right (RFC 1071, 2(B)). It stands in 64 bits, unfolded: below 2^34 for one call, so that thousands
 * are added plainly. Each call's bytes are taken to begin at an even offset of what the checksum covers.
 */
#ifndef MUENFAST_CHECKSUM_H
#define MUENFAST_CHECKSUM_H

#include <stdint.h>
#include <string.h>

#include "_copy.h"

static inline uint16_t sum_fold(uint64_t sum) {
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static inline uint64_t sum_word(const void *p) { /* 2 bytes */
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

/* Of headers: n is a multiple of 4. They have just been written, in pieces that a wider load would have to wait for. */
static inline uint64_t sum_header(const uint8_t *p, size_t n) {
    uint64_t sum = 0;
    uint32_t v;
    for (; n != 0; n -= 4, p += 4) {
        memcpy(&v, p, 4);
        sum += v;
    }
    return sum;
}

/* Eight bytes a step, as two words each: no carry to wait for. An odd last byte is the first one of its word, which holds
 * in either order. */
static inline uint64_t sum_plain(const uint8_t *p, size_t n) {
    uint64_t even = 0, odd = 0, v, w;
    uint32_t half;
    uint8_t last[2] = {0, 0};
    for (; n >= 16; n -= 16, p += 16) {
        memcpy(&v, p, 8);
        memcpy(&w, p + 8, 8);
        even += (v & 0xffffffff) + (w & 0xffffffff);
        odd += (v >> 32) + (w >> 32);
    }
    if (n & 8) {
        memcpy(&v, p, 8);
        even += v & 0xffffffff;
        odd += v >> 32;
        p += 8;
    }
    if (n & 4) {
        memcpy(&half, p, 4);
        even += half;
        p += 4;
    }
    if (n & 2) {
        even += sum_word(p);
        p += 2;
    }
    if (n & 1) {
        last[0] = *p;
        odd += sum_word(last);
    }
    return even + odd;
}

#if COPY_VECTORS
/* The 32-bit words of 128 bytes, each added to one of four 64-bit sums of its vector. */
#define SUM_STEP(vector)                                                     \
    do {                                                                     \
        low = _mm256_add_epi64(low, _mm256_and_si256(vector, mask));         \
        high = _mm256_add_epi64(high, _mm256_srli_epi64(vector, 32));        \
    } while (0)

static inline __attribute__((target("avx2"))) uint64_t sum_of_vectors(__m256i low, __m256i high) {
    uint64_t v[4];
    low = _mm256_add_epi64(low, high);
    low = _mm256_add_epi64(_mm256_and_si256(low, _mm256_set1_epi64x(0xffffffff)), _mm256_srli_epi64(low, 32));
    _mm256_storeu_si256((__m256i *)v, low);
    return v[0] + v[1] + v[2] + v[3];
}

static inline __attribute__((target("avx2"))) uint64_t sum_lines(const uint8_t *p, size_t n) {
    const __m256i mask = _mm256_set1_epi64x(0xffffffff);
    __m256i low = _mm256_setzero_si256(), high = low, a, b, c, d;
    for (; n >= 128; n -= 128, p += 128) {
        a = _mm256_loadu_si256((const __m256i *)p);
        b = _mm256_loadu_si256((const __m256i *)(p + 32));
        c = _mm256_loadu_si256((const __m256i *)(p + 64));
        d = _mm256_loadu_si256((const __m256i *)(p + 96));
        SUM_STEP(a);
        SUM_STEP(b);
        SUM_STEP(c);
        SUM_STEP(d);
    }
    for (; n >= 32; n -= 32, p += 32) {
        a = _mm256_loadu_si256((const __m256i *)p);
        SUM_STEP(a);
    }
    return sum_of_vectors(low, high) + sum_plain(p, n);
}

/* As copy_lines(). What is summed is what is stored: the asm keeps the compiler from loading it again. */
static inline __attribute__((target("avx2"))) uint64_t sum_copy_lines(uint8_t *to, const uint8_t *from, size_t n) {
    const __m256i mask = _mm256_set1_epi64x(0xffffffff);
    __m256i low = _mm256_setzero_si256(), high = low, a, b, c, d;
    uint8_t tail[32];
    for (; n >= 128; n -= 128, to += 128, from += 128) {
        a = _mm256_loadu_si256((const __m256i *)from);
        b = _mm256_loadu_si256((const __m256i *)(from + 32));
        c = _mm256_loadu_si256((const __m256i *)(from + 64));
        d = _mm256_loadu_si256((const __m256i *)(from + 96));
        __asm__("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d));
        _mm256_storeu_si256((__m256i *)to, a);
        _mm256_storeu_si256((__m256i *)(to + 32), b);
        _mm256_storeu_si256((__m256i *)(to + 64), c);
        _mm256_storeu_si256((__m256i *)(to + 96), d);
        SUM_STEP(a);
        SUM_STEP(b);
        SUM_STEP(c);
        SUM_STEP(d);
    }
    for (; n >= 32; n -= 32, to += 32, from += 32) {
        a = _mm256_loadu_si256((const __m256i *)from);
        __asm__("" : "+x"(a));
        _mm256_storeu_si256((__m256i *)to, a);
        SUM_STEP(a);
    }
    memcpy(tail, from, n);
    __asm__("" : : "r"(tail) : "memory");
    memcpy(to, tail, n);
    return sum_of_vectors(low, high) + sum_plain(tail, n);
}
#undef SUM_STEP
#endif

static inline uint64_t sum_bytes(const void *p, size_t n) {
#if COPY_VECTORS
    if (n >= 128 && __builtin_cpu_supports("avx2"))
        return sum_lines((const uint8_t *)p, n);
#endif
    return sum_plain((const uint8_t *)p, n);
}

/* Copies into memory that others may write, and sums what it copies from private memory. */
static inline uint64_t sum_given(void *to, const void *from, size_t n) {
#if COPY_VECTORS
    if (n >= 128 && __builtin_cpu_supports("avx2"))
        return sum_copy_lines((uint8_t *)to, (const uint8_t *)from, n);
#endif
    copy_bytes(to, from, n);
    return sum_plain((const uint8_t *)from, n);
}

/* Copies from memory that others may write, each byte loaded once, and sums what now stands in private memory. */
static inline uint64_t sum_taken(void *to, const void *from, size_t n) {
#if COPY_VECTORS
    if (n >= 128 && __builtin_cpu_supports("avx2"))
        return sum_copy_lines((uint8_t *)to, (const uint8_t *)from, n);
#endif
    copy_bytes(to, from, n);
    __asm__("" : : : "memory");
    return sum_plain((const uint8_t *)to, n);
}

/* What a checksum field holds where everything else of it sums up to this. */
static inline uint16_t sum_checksum(uint64_t sum) { return (uint16_t)~sum_fold(sum); }

#endif
