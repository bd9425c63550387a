/* Sleeping on a bell and being woken: `ring` on one side, `reader_wait` and `readers_wait` on the other.
 *
 * A sleep has no end but a wake-up: what bounds it to 100 ms in the code is not here. Elements are counted and have no
 * contents (ring.pml has). Each label and inline has the name of the function in src/muenfast that it stands for;
 * -DNO_x removes a fence, an ordering or a look. -DREACH_x: fails where x is reached.
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
/* A queue for each word under a lock, which orders whoever has it: one that goes to sleep and looks, and a wake-up. */
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

/* Whether a sleeper could read something new. */
byte r_epoch[READERS * CHANNELS], r_rc[READERS * CHANNELS];
#define AT(r, c) ((r) * CHANNELS + (c))
#define SOMETHING(r, c) (NEWEST(EPOCH(c)) != r_epoch[AT(r, c)] || \
    r_epoch[AT(r, c)] != 0 && NEWEST(WC(c)) != r_rc[AT(r, c)])
#if CHANNELS > 1
#define ANYTHING(r) (SOMETHING(r, 0) && over[0] || SOMETHING(r, 1) && over[1])
#else
#define ANYTHING(r) (SOMETHING(r, 0) && over[0])
#endif
#define NOBODY_SLEEPS_ON_IT(r) assert(!(asleep[r] && ANYTHING(r)))

/* ------------------------------------------------------------------ writer */
inline bell_kick(who) {
#ifndef NO_EXCHANGE
#ifndef KICK_SWAPPED
    update_(who, WAITERS(who), 0);
#endif
#endif
#ifndef NO_SEQ
    add_(who, SEQ(who), 1);
#endif
#ifdef KICK_SWAPPED     /* what a processor may make of the two if they are relaxed */
    update_(who, WAITERS(who), 0);
#endif
    atomic {
        kicked++;
        assert(kicked <= announced);    /*: more wake-ups than announcements */
#ifndef NO_WAKE
        futex_wake_all(who, who)
#endif
    }
}
/* Wakes readers that announced a sleep. The load of WAITERS may come later, and then finds no less. */
inline ring(who) {
#ifdef PLAIN
    true
#else
    F5(who);
    load_relaxed(who, WAITERS(who), seen);
    if
    :: seen != 0 -> seen = 0; bell_kick(who)
    :: else
    fi
#endif
}

proctype writer(byte self) {
    byte epoch, wc, ops, seen;
    epoch = NEWEST(EPOCH(self));
    do
    :: ops < OPS && epoch != 0 ->
writer_publish:
        atomic { ops++; wc++; store_S1(self, WC(self), wc) };
#ifndef NO_RING_PUBLISH
        ring(self)
#endif
#ifndef PLAIN
#if CHANNELS == 1
    :: ops < OPS ->
writer_start:
        atomic {
            ops++; wc = 0; epoch = (epoch == 1 -> 2 : 1);
            store_relaxed(self, EPOCH(self), 0);
            fence_release(self)     /* F3 */
        };
        store_relaxed(self, WC(self), 0);
        store_relaxed(self, RINGER(self), epoch);
        store_S2(self, EPOCH(self), epoch);
#ifndef NO_RING_START
        ring(self)
#endif
    :: ops < OPS && epoch != 0 ->
writer_stop:
        atomic { ops++; epoch = 0; store_stop(self, EPOCH(self), 0) };
#ifndef NO_RING_STOP
        ring(self);
#endif
        store_relaxed(self, RINGER(self), 0)
#endif
#endif
    :: true -> break
    od;
    atomic {
        over[self] = 1;
        NOBODY_SLEEPS_ON_IT(0);     /*: asleep on something new: a lost wake-up */
#if READERS > 1
        NOBODY_SLEEPS_ON_IT(1);     /*: asleep on something new: a lost wake-up */
#endif
        true
    }
}

/* ------------------------------------------------------------------ reader */
inline reader_ready(me, r, c, result) {
    atomic {
        load_(me, EPOCH(c), A6, false, e);
        if
#ifndef NO_READY_EPOCH
        :: e != r_epoch[AT(r, c)] -> result = 1; e = 0
#endif
        :: else
        fi
    };
    if
    :: e != 0 ->
        atomic {
            load_(me, WC(c), A6, false, v);
            if
#ifndef NO_READY_WC
            :: v != r_rc[AT(r, c)] -> result = 1
#endif
            :: else
            fi;
            e = 0; v = 0
        }
    :: else
    fi
}
inline any_ready(me, r, result) {
    reader_ready(me, r, 0, result);
#if CHANNELS > 1
    reader_ready(me, r, 1, result)
#endif
}
/* What follows is read: another epoch, or everything that is there. */
inline reader_copy(me, r, c) {
    atomic {
        load_acquire(me, EPOCH(c), e);
        if
        :: e != r_epoch[AT(r, c)] -> r_epoch[AT(r, c)] = e; r_rc[AT(r, c)] = 0; e = 0
        :: else
        fi
    };
    if
    :: e != 0 -> atomic { load_acquire(me, WC(c), v); r_rc[AT(r, c)] = v; e = 0; v = 0 }
    :: else
    fi
}
inline announce(me, c) {
    atomic {
        announced++;
#ifndef NO_ANNOUNCE
        store_relaxed(me, WAITERS(c), 1)
#endif
    }
}
inline look_whether_it_rings(me) {
    load_relaxed(me, EPOCH(0), e);
#ifdef NO_RINGER
    atomic { rings = e != 0; e = 0 }
#else
    atomic { load_relaxed(me, RINGER(0), v); rings = e != 0 && v == e; e = 0; v = 0 }
#endif
}

proctype reader(byte self) {
    byte e, v, seq, seq_, waits;
    bit ready, rings;
    do
    :: true ->
        any_ready(self, self - CHANNELS, ready);
        if
        :: ready ->
            ready = 0;
            reader_copy(self, self - CHANNELS, 0);
#if CHANNELS > 1
            reader_copy(self, self - CHANNELS, 1)
#endif
        :: else ->
            if
            :: waits == WAITS -> break
            :: else -> waits++
            fi;
#if CHANNELS > 1
readers_wait:
            rings = 1;
            load_(self, SEQ(0), A5, false, seq);
            announce(self, 0);
            load_(self, SEQ(1), A5, false, seq_);
            announce(self, 1);
#else
reader_wait:
            /* A relaxed load may take place after stores that follow, up to the full fence: who rings, in any case. */
            if
            :: true -> look_whether_it_rings(self)
            :: rings = 0
            fi;
#ifdef NO_SEQ_ACQUIRE   /* and so may this */
            if
            :: true -> announce(self, 0); load_(self, SEQ(0), A5, false, seq)
            :: true -> load_(self, SEQ(0), A5, false, seq); announce(self, 0)
            fi;
#else
            load_(self, SEQ(0), A5, false, seq);
            announce(self, 0);
#endif
            if
            :: !rings -> look_whether_it_rings(self)
            :: else
            fi;
#endif
            F6(self);
#ifndef NO_LAST_LOOK
            any_ready(self, self - CHANNELS, ready);
#endif
            if
            :: ready ->
#ifdef REACH_LAST_LOOK
                assert(false);
#endif
                ready = 0
            :: else ->
#ifdef LATE_SEQ
                load_(self, SEQ(0), A5, false, seq);
#endif
                futex_queue(self, 0, seq, v);
#if CHANNELS > 1
                if
                :: queues[0].waits[self - CHANNELS] ->
                    futex_queue(self, 1, seq_, v);
                    d_step {
                        if
                        :: queues[0].waits[self - CHANNELS] && queues[1].waits[self - CHANNELS] ->
                            asleep[self - CHANNELS] = 1
                        :: else -> queues[0].waits[self - CHANNELS] = 0; queues[1].waits[self - CHANNELS] = 0
                        fi
                    }
                :: else
                fi;
#else
                atomic {
                    if
                    :: queues[0].waits[self - CHANNELS] && rings -> asleep[self - CHANNELS] = 1
                    :: else -> queues[0].waits[self - CHANNELS] = 0       /* time is over */
                    fi;
                    rings = 0; seq = 0
                };
#endif
                atomic {
                    NOBODY_SLEEPS_ON_IT(self - CHANNELS);       /*: asleep on something new: a lost wake-up */
#ifdef REACH_SLEEP
                    assert(!asleep[self - CHANNELS]);
#endif
                    true
                };
end_asleep:
                !asleep[self - CHANNELS];
                d_step {
                    queues[0].waits[self - CHANNELS] = 0;
#if CHANNELS > 1
                    queues[1].waits[self - CHANNELS] = 0;
#endif
                    true
                }
            fi;
            seq = 0; seq_ = 0; rings = 0
        fi
    od
}

init {
    atomic {
        memory_begins();
#ifdef PLAIN
        memory[RINGER(0)].at[0].value = 2;
        memory[EPOCH(0)].at[0].value = 1;
#elif CHANNELS > 1
        memory[EPOCH(0)].at[0].value = 1; memory[RINGER(0)].at[0].value = 1;
        memory[EPOCH(1)].at[0].value = 1; memory[RINGER(1)].at[0].value = 1;
#endif
        run writer(0);
#if CHANNELS > 1
        run writer(1);
#endif
        run reader(CHANNELS);
#if READERS > 1
        run reader(CHANNELS + 1)
#endif
    }
}
