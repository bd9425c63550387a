/* What the programs of tools/cost.py share: what is counted, on a clock of its own.
 *
 * A program is the very C that is built (what Cython made of a module, or a header), included behind this file, and calls the
 * engine's functions as their thread does, with the other side's work in between. Callgrind counts between cost_on() and
 * cost_off() only, and gives a row's sum away after `elements` of them and after twice as many; what is not checked to have
 * been done is not counted (EXPECT).
 */
#ifndef COST_H
#define COST_H

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <valgrind/callgrind.h>

enum {
    COST_ELEMENTS = 1024, /* of a row; 16 batches of 64, for one batch in so many is measured (SAMPLED of _count.pxd) */
    COST_FIRST = 4096,    /* not counted before that: by then copy_given() has tried every way (COPY_PROBED of _copy.h) */
    COST_BATCH = 64,      /* the largest */
    COST_TICK = 100       /* ns between any two looks at the clock: fast enough that nothing is found to be slow */
};

#define EXPECT(condition, ...)                                                                                              \
    do {                                                                                                                    \
        if (!(condition))                                                                                                   \
            cost_fail(__FILE__, __LINE__, __VA_ARGS__);                                                                     \
    } while (0)
_Noreturn void cost_fail(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4)));

extern bool cost_counts;
static inline void cost_on(void) {
    cost_counts = true;
    CALLGRIND_TOGGLE_COLLECT;
}
static inline void cost_off(void) {
    CALLGRIND_TOGGLE_COLLECT;
    cost_counts = false;
}
/* Around what stands for the kernel, whose instructions are none of ours. */
static inline bool cost_pause(void) {
    bool was = cost_counts;
    if (was)
        cost_off();
    return was;
}
static inline void cost_go_on(bool was) {
    if (was)
        cost_on();
}

void *cost_memory(size_t n); /* zeroed, at the beginning of a page; for good */

/* Counts a row: `some` does n elements, and calls cost_on() and cost_off() around what is counted of that. */
void cost_row(void (*some)(unsigned n), unsigned batch, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* The ring's functions, which no module of the engines has (unit.c). */
void *ring_function(const char *name);
void *client_function(const char *name);
void *store_function(const char *name);

#endif
