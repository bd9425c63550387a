/* _crc32c.h. `crc32c sums` reads bytes and prints, for each number of them and each of some places in memory, a checksum by
 * each form, made in one piece and in two: one line, or several where they differ. `crc32c pace` prints GB/s of each form
 * for 4096 bytes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "_crc32c.h"

enum { ROOM = 20000 };

static uint8_t bytes[ROOM + 64];

typedef uint32_t (*form)(uint32_t, const uint8_t *, size_t);

static uint32_t whole(form f, const uint8_t *p, size_t n) {
    return ~f(CRC32C_FIRST, p, n);
}

static uint32_t halves(form f, const uint8_t *p, size_t n) {
    return ~f(f(CRC32C_FIRST, p, n / 3), p + n / 3, n - n / 3);
}

static uint32_t chosen(uint32_t state, const uint8_t *p, size_t n) {
    return crc32c(state, p, n);
}

static double pace(form f) {
    struct timespec a, b;
    uint32_t sum = 0;
    enum { TIMES = 100000 };
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int k = 0; k < TIMES; k++)
        sum ^= f(sum, bytes, 4096);
    clock_gettime(CLOCK_MONOTONIC, &b);
    bytes[0] = (uint8_t)sum;
    return 4096.0 * TIMES / ((double)(b.tv_sec - a.tv_sec) * 1e9 + (double)(b.tv_nsec - a.tv_nsec));
}

int main(int argc, char **argv) {
    form forms[] = {crc32c_tables, chosen,
#if CRC32C_VECTORS
                    crc32c_instruction
#endif
    };
    size_t n = sizeof forms / sizeof *forms, have;
    int wrong = 0;
    if (argc == 2 && strcmp(argv[1], "pace") == 0) {
        for (size_t k = 0; k < n; k++)
            printf("%.2f\n", pace(forms[k]));
        return 0;
    }
    have = fread(bytes + 16, 1, ROOM, stdin);
    for (size_t length = 0; length <= have; length += length < 1700 ? 1 : 997) {
        uint32_t first = whole(crc32c_tables, bytes + 16, length);
        for (size_t k = 0; k < n; k++)
            for (size_t at = 0; at < 9; at++) {
                memmove(bytes + at, bytes + 16, have);
                if (whole(forms[k], bytes + at, length) != first || halves(forms[k], bytes + at, length) != first)
                    wrong = printf("form %zu, %zu bytes at %zu\n", k, length, at);
                memmove(bytes + 16, bytes + at, have);
            }
        printf("%zu %08x\n", length, first);
    }
    return wrong != 0;
}
