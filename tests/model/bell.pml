/* Sleeping on a bell and being woken: `ring` on one side, `reader_wait` and `readers_wait` on the other.
 *
 * A sleep has no end but a wake-up: what bounds it to 100 ms in the code is not here. Elements are counted and have no
 * contents (ring.pml has). Each label and inline has the name of the function in src/muenfast that it stands for; -DNO_x
 * removes a fence, an ordering or a look. -DREACH_x: fails where x is reached.
 *
 * -DREADERS=2: two readers of one channel and bell. -DCHANNELS=2: one thread waits for two channels (readers_wait).
 * -DPLAIN: the writer is one without a bell, behind one that had it.
 */
#ifndef READERS
#define READERS 1
#endif
#ifndef CHANNELS
#define CHANNELS 1
#endif
#ifndef OPS
#define OPS 3           /* of a writer: starts, stops, elements */
#endif
#ifndef WAITS
#define WAITS 3         /* of a reader, after which it goes elsewhere */
#endif

#define STORERS (CHANNELS + READERS)
#define THREADS STORERS
#define STORES 12
#define EPOCH(c) ((c) * 5)
#define WC(c) ((c) * 5 + 1)
#define RINGER(c) ((c) * 5 + 2)
#define WAITERS(c) ((c) * 5 + 3)
#define SEQ(c) ((c) * 5 + 4)
#define LOCATIONS (CHANNELS * 5)
#include "memory.pml"

/* Removals. */
#ifdef NO_F5
#define F5(me) true
#else
#define F5(me) fence_seq_cst(me)
#endif
#ifdef NO_F6
#define F6(me) true
#else
#define F6(me) fence_seq_cst(me)
#endif
#ifdef NO_SEQ_ACQUIRE
#define A5 false
#else
#define A5 true
#endif
#ifdef NO_READY_ACQUIRE
#define A6 false
#else
#define A6 true
#endif
#ifdef NO_S1
#define store_S1 store_relaxed
#else
#define store_S1 store_release
#endif
#ifdef NO_S2
#define store_S2 store_relaxed
#else
#define store_S2 store_release
#endif
#ifdef NO_STOP_RELEASE
#define store_stop store_relaxed
#else
#define store_stop store_release
#endif
#define NEWEST(x) memory[x].at[memory[x].n - 1].value

/* ------------------------------------------------------------------ futex(2) */
/* A queue for each word under a lock, which orders whoever has it: the look of one that goes to sleep, and a wake-up. */
typedef queue {
    byte order[STORERS];
    bit waits[READERS]
};
queue queues[CHANNELS];
bit over[CHANNELS];         /* that writer does nothing any more */
bit asleep[READERS];
byte announced, kicked;

inline locked(me, c) {
    join_(queues[c].order, threads[me].now);
    copy_(threads[me].now, queues[c].order);
    join_(threads[me].acquired, threads[me].now)
}
inline futex_wake_all(me, c) {
    d_step {
        locked(me, c);
        for (i_ : 0 .. READERS - 1) {
            if
            :: queues[c].waits[i_] -> queues[c].waits[i_] = 0; asleep[i_] = 0
#ifdef REACH_WAKE
                ; assert(false)
#endif
            :: else
            fi
        };
        i_ = 0
    }
}
/* The word's value as the kernel sees it under the lock; the same: the reader is in the queue. */
inline futex_queue(me, c, seen, value) {
    atomic {
        d_step { locked(me, c); true };
        load_relaxed(me, SEQ(c), value);
        if
#ifdef NO_COMPARE
        :: true ->
#else
        :: value == seen ->
#endif
            queues[c].waits[me - CHANNELS] = 1
#ifndef NO_COMPARE
        :: else
#ifdef REACH_COMPARE
            -> assert(false)
#endif
#endif
        fi;
        value = 0
    }
}

/* ------------------------------------------------------------------ writer */
/* Wakes readers that announced a sleep. */
inline ring(me, c) {
    F5(me);
    load_relaxed(me, WAITERS(c), seen);
    if
    :: seen != 0 ->
bell_kick:
        seen = 0;
#ifndef NO_EXCHANGE
#ifndef KICK_SWAPPED
        update_(me, WAITERS(c), 0, before);
#endif
#endif
#ifndef NO_SEQ
        update_(me, SEQ(c), before_ + 1, before_);
        before_ = 0;
#endif
#ifdef KICK_SWAPPED     /* what a processor may make of the two if they are relaxed */
        update_(me, WAITERS(c), 0, before);
#endif
        before = 0;
        d_step { kicked++; assert(kicked <= announced) };       /* one system call for an announcement at most */
#ifndef NO_WAKE
        futex_wake_all(me, c)
#endif
    :: else
    fi
}

/* Whether a sleeper could read something new. */
#define SOMETHING(r, c) (NEWEST(EPOCH(c)) != at_epoch[r] || at_epoch[r] != 0 && NEWEST(WC(c)) != at_rc[(r) * CHANNELS + (c)])
byte at_epoch[READERS];
byte at_rc[READERS * CHANNELS];
