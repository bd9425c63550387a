/* Elements that tell whether they are whole, for tools/torn.py: number, bytes that depend on it, checksum of all that.
 *
 * The checksum takes in every byte before it, in order, 8 at a time; each step is a bijection of the sum so far, so
 * that a difference in one word alone is always seen.
 */
#include <stdint.h>
#include <string.h>

static uint64_t word_of(uint64_t number, uint64_t at) {
    uint64_t x = number * 0x9E3779B97F4A7C15u + at * 0xD1B54A32D192ED03u;
    return x ^ x >> 29;
}

static uint64_t sum_of(const uint8_t *element, uint64_t bytes) {
    uint64_t sum = bytes, word;
    uint64_t at = 0;
    for (; at + 8 <= bytes; at += 8) {
        memcpy(&word, element + at, 8);
        sum = (sum ^ word) * 0xFF51AFD7ED558CCDu;
        sum ^= sum >> 32;
    }
    for (word = 0; at < bytes; at++)
        word = word << 8 | element[at];
    return (sum ^ word) * 0xFF51AFD7ED558CCDu;
}

/* Elements number first, first + 1, ...; size >= 16. */
void fill(uint8_t *out, uint64_t size, uint64_t first, uint64_t count) {
    for (uint64_t k = 0; k < count; k++, out += size) {
        uint64_t number = first + k, word, at = 8;
        memcpy(out, &number, 8);
        for (; at + 8 <= size - 8; at += 8) {
            word = word_of(number, at);
            memcpy(out + at, &word, 8);
        }
        word = word_of(number, at);
        memcpy(out + at, &word, size - 8 - at);
        word = sum_of(out, size - 8);
        memcpy(out + size - 8, &word, 8);
    }
}

/* How many of `count` elements are whole and bear the numbers first, first + 1, ...; counts up to the first that is not. */
uint64_t whole(const uint8_t *in, uint64_t size, uint64_t first, uint64_t count) {
    uint64_t k = 0;
    for (; k < count; k++, in += size) {
        uint64_t number, sum;
        memcpy(&number, in, 8);
        memcpy(&sum, in + size - 8, 8);
        if (number != first + k || sum != sum_of(in, size - 8))
            break;
    }
    return k;
}
