/* Turns of one thread that takes things from a table which others change: when is what was taken out no longer in use? No
 * Python.h.
 *
 * The thread that takes calls turn_enter before, turn_leave after it has used what it took; the word is odd in between. Who
 * took something out of the table asks turn_now, and lets go of it once turn_over says so. Taking never waits.
 */
#ifndef MUENFAST_TURNS_H
#define MUENFAST_TURNS_H

#include <stdint.h>

#include "_atomics.h"

/* The fence pairs with that of turn_now: either the taker sees the table as it is after the change, or the other one its turn.
 * Release: who sees this turn, and not the end of the last one, knows of that end all the same (turn_over). */
static inline void turn_enter(uint32_t *turn) {
    store_release32(turn, *turn + 1);
    fence_seq_cst();
}

static inline void turn_leave(uint32_t *turn) {
    store_release32(turn, *turn + 1);
}

/* What the taker's turn was behind a change; pairs with: turn_enter. */
static inline uint32_t turn_now(const uint32_t *turn) {
    fence_seq_cst();
    return load_acquire32(turn);
}

/* Whether nothing that was taken before turn_now() gave `then` is in use any more; pairs with: turn_leave, turn_enter. */
static inline int turn_over(const uint32_t *turn, uint32_t then) {
    return !(then & 1) || load_acquire32(turn) != then;
}

#endif
