/* Rows: a ring's elements, by writer_copy() and reader_copy(), with a bell on which nobody sleeps. core: _ring */
#include "cost.h"

#include CORE_SOURCE

#if __has_include("_crc32c.h")
#include "_crc32c.h"
#define HAS_CHECKSUMS
#endif

enum { SLOTS = 256, LARGEST = 1522, CHECKED = 4096 };
static T_writer_t w;
static T_reader_t r;
static bell_page *bell;
static uint8_t *region, *own, *got;
static uint32_t size;

static void make(void) {
    uint64_t n;
    memset(region, 0, 64);
    memset(bell, 0, sizeof *bell);
    F_writer_init(&w, region, 64 + SLOTS * (uint64_t)size, size, 1);
    F_reader_init(&r, region, 64 + SLOTS * (uint64_t)size, size, 1);
    w.bell = r.bell = bell;
    F_writer_start(&w, 7);
    EXPECT(F_reader_copy(&r, got, 1, &n) == E_EPOCH_CHANGED, "not synchronised");
}
static void check(unsigned n, uint64_t taken) {
    EXPECT(taken == n && memcmp(own, got, n * size) == 0, "%u elements were written, %u were read", n, (unsigned)taken);
    own[n * size / 2]++;
}
static void write_some(unsigned n) {
    uint64_t taken;
    cost_on();
    F_writer_copy(&w, own, n);
    cost_off();
    F_reader_copy(&r, got, n, &taken);
    check(n, taken);
}
static void read_some(unsigned n) {
    uint64_t taken = 0;
    F_writer_copy(&w, own, n);
    cost_on();
    F_reader_copy(&r, got, n, &taken);
    cost_off();
    check(n, taken);
}
#ifdef HAS_CHECKSUMS
static void check_some(unsigned n) {
    static uint32_t before;
    uint32_t sum = CRC32C_FIRST;
    own[CHECKED / 2]++;
    cost_on();
    for (unsigned k = 0; k < n; k++)
        sum = crc32c(sum, own, size);
    cost_off();
    EXPECT(sum != before, "the same checksum of something else");
    before = sum;
}
#endif

int main(void) {
    static const unsigned sizes[] = {64, LARGEST}, batches[] = {1, 8, COST_BATCH};
    CORE_CONSTANTS
    CORE_BINDINGS
    region = cost_memory(64 + SLOTS * LARGEST);
    own = cost_memory(COST_BATCH * LARGEST);
    got = cost_memory(COST_BATCH * LARGEST);
    bell = cost_memory(sizeof *bell);
    for (int k = 0; k < 2; k++)
        for (int b = 0; b < 3; b++) {
            size = sizes[k];
            make();
            cost_row(write_some, batches[b], "ring write %u B", size);
            make();
            cost_row(read_some, batches[b], "ring read %u B", size);
        }
#ifdef HAS_CHECKSUMS
    size = CHECKED;
    cost_row(check_some, 1, "checksum of %u B", size);
#endif
    return 0;
}
