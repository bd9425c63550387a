/* Whether a sender lets packets gather before it looks for the next ones. No Python.h.
 *
 * Who sends packets may share a CPU with who takes them off the device; then waking him for each costs more than its way, and
 * they are more in the same time where he looks less often. Parts of a dialogue would only come late. So both are tried, and
 * what brings more packets is done for a while. docs/decisions/017.
 */
#ifndef MUENFAST_GATHER_H
#define MUENFAST_GATHER_H

#include <stdbool.h>
#include <stdint.h>

#define GATHER_NS UINT64_C(150000)          /* how long they gather */
#define GATHER_FROM 40000                   /* packets/s, below which nothing is tried */
#define GATHER_WINDOW_NS UINT64_C(2000000)  /* in which they are counted, either way */
#define GATHER_HOLDS_NS UINT64_C(32000000)  /* how long what a trial showed holds, ... */
#define GATHER_MOST_NS UINT64_C(512000000)  /* ... at most: it doubles while a trial costs a quarter of the packets */

enum gather_phase { GATHER_PLAIN = 0, GATHER_TRIED, GATHER_CHOSEN };

/* Begins as zeros. */
typedef struct {
    enum gather_phase phase;
    uint64_t since;   /* when the window began, ... */
    uint64_t packets; /* ... and what came since */
    uint64_t plain;   /* packets/s before the last trial */
    uint64_t holds;   /* how long its result does ... */
    uint64_t until;   /* ... and when that ends */
} gather;

/* What a trial showed holds for a while. cost: that was packets. */
static inline void gather_holds(gather *g, uint64_t now, bool cost) {
    if (!cost || g->holds == 0)
        g->holds = GATHER_HOLDS_NS;
    else if (g->holds < GATHER_MOST_NS)
        g->holds *= 2;
    g->until = now + g->holds;
}

/* Whether packets are to gather now. packets: how many came since it was asked last; now: nanoseconds that never go back. */
static inline bool gather_now(gather *g, uint64_t packets, uint64_t now) {
    uint64_t passed = now - g->since, rate;
    g->packets += packets;
    if (g->phase != GATHER_PLAIN && packets == 0) { /* a trial that failed, or the load's end */
        if (g->phase == GATHER_TRIED)
            gather_holds(g, now, true);
        g->phase = GATHER_PLAIN;
    } else if (passed < GATHER_WINDOW_NS) {
        return g->phase != GATHER_PLAIN;
    } else if (passed >= 2 * GATHER_WINDOW_NS) { /* a window with a break tells nothing */
        g->phase = GATHER_PLAIN;
    } else {
        rate = g->packets * UINT64_C(1000000000) / passed;
        switch (g->phase) {
        case GATHER_PLAIN:
            if (rate >= GATHER_FROM && (now >= g->until || rate < g->plain - g->plain / 4)) {
                g->plain = rate;
                g->phase = GATHER_TRIED;
            }
            break;
        case GATHER_TRIED:
            g->phase = rate > g->plain + g->plain / 8 ? GATHER_CHOSEN : GATHER_PLAIN;
            gather_holds(g, now, rate < g->plain - g->plain / 4);
            break;
        case GATHER_CHOSEN:
            if (now >= g->until)
                g->phase = GATHER_PLAIN;
        }
    }
    g->packets = 0;
    g->since = now;
    return g->phase != GATHER_PLAIN;
}

#endif
