/* The memory of ring.pml and bell.pml: that of C11 without consume and seq_cst accesses (RC11), by views.
 *
 * A word keeps all stores that were made to it, in their order. Each thread counts its stores; a view says how many
 * of each thread's one can no longer miss. A load takes any store of its word but those older than one that the view
 * has or that this thread has taken there before: so stores become visible late and in any order, and loads happen
 * early, unless an ordering forbids that. A store carries what its thread had released (a release store: all that its
 * thread knows); an acquire load takes that over at once, a relaxed one with the next acquire fence. Full fences
 * exchange views through one that is everybody's. An update (exchange, add) takes the newest, and hands on what that
 * carried.
 *
 * What the views do not say, the models do by themselves: a relaxed load that comes after a store that follows it (only
 * bell.pml has such a pair, and lets the two change places). That one thread has taken a store without order is not
 * handed to a third thread: the third may do more here than C11 allows.
 *
 * The models define LOCATIONS, THREADS, STORERS (threads below that store) and STORES (to one word, the first value
 * included).
 */
typedef stored {
    byte value;
#if STORERS > 1
    byte by;            /* whose store */
#endif
    byte clock;         /* the how-many-eth of his */
    byte knows[STORERS]
};
typedef word {
    byte n;
    stored at[STORES]
};
typedef thread {
    byte now[STORERS];
    byte acquired[STORERS];     /* now, after an acquire fence */
    byte released[STORERS];     /* what relaxed stores carry */
    byte seen[LOCATIONS]        /* the store that was taken last */
};
word memory[LOCATIONS];
thread threads[THREADS];
byte everybody[STORERS];        /* of full fences */
byte low, high, taken;                /* of the load that is under way, else 0 */
hidden byte i_, j_;

inline memory_begins() {
    d_step {
        for (i_ : 0 .. LOCATIONS - 1) { memory[i_].n = 1 }
        i_ = 0
    }
}

#if STORERS > 1
#define BY_(x, k) memory[x].at[k].by
#else
#define BY_(x, k) 0
#endif
#define join_(to, from) \
    j_ = 0; \
    do \
    :: j_ < STORERS -> to[j_] = (to[j_] > from[j_] -> to[j_] : from[j_]); j_++ \
    :: else -> j_ = 0; break \
    od
#define copy_(to, from) \
    j_ = 0; \
    do \
    :: j_ < STORERS -> to[j_] = from[j_]; j_++ \
    :: else -> j_ = 0; break \
    od

/* Of two neighbours with one value, of which the older carries no more, it is enough: whoever takes that may do all
 * that he might after the other. */
#if STORERS == 1
#define TWIN_(x, k) (k > low && memory[x].at[k].value == memory[x].at[k - 1].value && \
    memory[x].at[k].knows[0] >= memory[x].at[k - 1].knows[0])
#else
#define TWIN_(x, k) false
#endif
/* low: the newest store that this thread may not miss; `newest`: none may be missed any more. high: the newest that is
 * to be tried. */
inline oldest_(me, x, newest) {
    low = threads[me].seen[x];
    i_ = low + 1;
    do
    :: i_ < memory[x].n ->
        if
        :: newest || memory[x].at[i_].clock <= threads[me].now[BY_(x, i_)] -> low = i_
        :: else
        fi;
        i_++
    :: else -> break
    od;
    high = memory[x].n - 1;
    do
    :: TWIN_(x, high) -> high--
    :: else -> break
    od;
    taken = low; i_ = 0
}

inline load_(me, x, acquire, newest, to) {
    atomic {
        d_step { oldest_(me, x, newest) };
        do
        :: taken < high -> taken++
        :: !TWIN_(x, taken) -> break
        od;
        true;
        d_step {
            threads[me].seen[x] = taken;
            join_(threads[me].acquired, memory[x].at[taken].knows);
            if
            :: acquire -> join_(threads[me].now, memory[x].at[taken].knows)
            :: else
            fi;
            to = memory[x].at[taken].value;
            printf("%d loads word %d: %d, %d behind\n", me, x, to, memory[x].n - 1 - taken);
            low = 0; high = 0; taken = 0
        }
    }
}

inline append_(me, x, what) {
    assert(memory[x].n < STORES);
    i_ = memory[x].n;
    threads[me].now[me]++;
    threads[me].acquired[me] = threads[me].now[me];
    threads[me].seen[x] = i_;
    memory[x].at[i_].value = what;
#if STORERS > 1
    memory[x].at[i_].by = me;
#endif
    memory[x].at[i_].clock = threads[me].now[me];
    memory[x].n++;
    printf("%d stores word %d: %d\n", me, x, what)
}
inline store_(me, x, what, release) {
    d_step {
        append_(me, x, what);
        if
        :: release -> copy_(memory[x].at[i_].knows, threads[me].now)
        :: else -> copy_(memory[x].at[i_].knows, threads[me].released)
        fi;
        true
    }
}
/* exchange and add, acq_rel. */
inline update_(me, x, what) {
    d_step {
        join_(threads[me].now, memory[x].at[memory[x].n - 1].knows);
        join_(threads[me].acquired, threads[me].now);
        append_(me, x, what);
        copy_(memory[x].at[i_].knows, threads[me].now);
        join_(memory[x].at[i_].knows, memory[x].at[i_ - 1].knows);
        true
    }
}
#define add_(me, x, more) update_(me, x, memory[x].at[memory[x].n - 1].value + (more))

inline fence_acquire(me) { d_step { copy_(threads[me].now, threads[me].acquired); true } }
inline fence_release(me) { d_step { copy_(threads[me].released, threads[me].now); true } }
inline fence_seq_cst(me) {
    d_step {
        copy_(threads[me].now, threads[me].acquired);
        join_(everybody, threads[me].now);
        copy_(threads[me].now, everybody);
        copy_(threads[me].acquired, everybody);
        copy_(threads[me].released, everybody);
        true
    }
}

#define load_relaxed(me, x, to) load_(me, x, false, false, to)
#define load_acquire(me, x, to) load_(me, x, true, false, to)
#define store_relaxed(me, x, what) store_(me, x, what, false)
#define store_release(me, x, what) store_(me, x, what, true)
