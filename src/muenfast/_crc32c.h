/* CRC-32C (Castagnoli; RFC 3720, B.4): by the CPU's instruction, three streams at once, or by tables; no Python.h.
 *
 * A state is the register itself: CRC32C_FIRST before the first byte, its complement after the last one is the checksum. So
 * checksums of pieces that follow each other are one.
 */
#ifndef MUENFAST_CRC32C_H
#define MUENFAST_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef CRC32C_VECTORS /* 0: tables only */
#if defined(__x86_64__) && defined(__GNUC__)
#define CRC32C_VECTORS 1
#else
#define CRC32C_VECTORS 0
#endif
#endif
#if CRC32C_VECTORS
#include <immintrin.h>
#endif

#define CRC32C_FIRST UINT32_C(0xffffffff)
#define CRC32C_POLYNOMIAL UINT32_C(0x82f63b78) /* reflected */

/* Table k: what a byte becomes with k zero bytes behind it ("slicing by 8", Kounavis and Berry 2005). Filled as the module
 * is loaded, before there is another thread. */
static uint32_t crc32c_table[8][256];

static void __attribute__((constructor)) crc32c_fill(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t v = byte;
        for (int bit = 0; bit < 8; bit++)
            v = (v >> 1) ^ (v & 1 ? CRC32C_POLYNOMIAL : 0);
        crc32c_table[0][byte] = v;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t v = crc32c_table[k - 1][byte];
            crc32c_table[k][byte] = (v >> 8) ^ crc32c_table[0][v & 0xff];
        }
}

static inline uint32_t crc32c_tables(uint32_t state, const uint8_t *p, size_t n) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t low, high;
        memcpy(&low, p, 4);
        memcpy(&high, p + 4, 4);
        low ^= state;
        state = crc32c_table[7][low & 0xff] ^ crc32c_table[6][low >> 8 & 0xff] ^ crc32c_table[5][low >> 16 & 0xff] ^
                crc32c_table[4][low >> 24] ^ crc32c_table[3][high & 0xff] ^ crc32c_table[2][high >> 8 & 0xff] ^
                crc32c_table[1][high >> 16 & 0xff] ^ crc32c_table[0][high >> 24];
    }
#endif
    for (; n != 0; n--, p++)
        state = (state >> 8) ^ crc32c_table[0][(state ^ *p) & 0xff];
    return state;
}

#if CRC32C_VECTORS
/* The instruction takes 8 bytes a cycle and three cycles for it: three streams keep it busy (Gopal et al., "Fast CRC
 * computation for iSCSI polynomial using CRC32 instruction", Intel 2011). Their ends are joined by a product each:
 * CRC32C_BY_N is x^(8N-33) mod P, reflected, for a stream with N bytes behind it. */
enum { CRC32C_LONG = 1360, CRC32C_SHORT = 128 }; /* bytes of a stream: three and 16 bytes are a block of 4096 */
#define CRC32C_BY_1360 0x3f70cc6f
#define CRC32C_BY_2720 0x5aa1f3cf
#define CRC32C_BY_128 0x0d3b6092
#define CRC32C_BY_256 0xb9e02b86

static inline uint64_t crc32c_word(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* Three streams of `each` bytes, a multiple of 8. behind1, behind2: of one and of two streams. */
static inline __attribute__((target("sse4.2,pclmul"), always_inline)) uint64_t crc32c_three(
    uint64_t state, const uint8_t *p, size_t each, uint32_t behind1, uint32_t behind2) {
    uint64_t a = state, b = 0, c = 0;
    const uint8_t *last = p + each - 8;
    __m128i joined;
    for (; p != last; p += 8) {
        a = _mm_crc32_u64(a, crc32c_word(p));
        b = _mm_crc32_u64(b, crc32c_word(p + each));
        c = _mm_crc32_u64(c, crc32c_word(p + 2 * each));
    }
    a = _mm_crc32_u64(a, crc32c_word(p));
    b = _mm_crc32_u64(b, crc32c_word(p + each));
    joined = _mm_xor_si128(_mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)a), _mm_cvtsi32_si128((int)behind2), 0),
                           _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)b), _mm_cvtsi32_si128((int)behind1), 0));
    return _mm_crc32_u64(c, crc32c_word(p + 2 * each) ^ (uint64_t)_mm_cvtsi128_si64(joined));
}

static inline __attribute__((target("sse4.2,pclmul"))) uint32_t crc32c_instruction(uint32_t state, const uint8_t *p,
                                                                                   size_t n) {
    uint64_t v = state;
    for (; n >= 3 * CRC32C_LONG; n -= 3 * CRC32C_LONG, p += 3 * CRC32C_LONG)
        v = crc32c_three(v, p, CRC32C_LONG, CRC32C_BY_1360, CRC32C_BY_2720);
    for (; n >= 3 * CRC32C_SHORT; n -= 3 * CRC32C_SHORT, p += 3 * CRC32C_SHORT)
        v = crc32c_three(v, p, CRC32C_SHORT, CRC32C_BY_128, CRC32C_BY_256);
    for (; n >= 8; n -= 8, p += 8)
        v = _mm_crc32_u64(v, crc32c_word(p));
    for (; n != 0; n--, p++)
        v = _mm_crc32_u8((uint32_t)v, *p);
    return (uint32_t)v;
}
#endif

/* The state behind n bytes more. */
static inline uint32_t crc32c(uint32_t state, const void *p, size_t n) {
#if CRC32C_VECTORS
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"))
        return crc32c_instruction(state, (const uint8_t *)p, n);
#endif
    return crc32c_tables(state, (const uint8_t *)p, n);
}

#endif
