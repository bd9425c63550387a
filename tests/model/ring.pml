/* An SHMStream channel: its writer's lives, and a reader or a block server that follows it. docs/memory-model.md.
 *
 * Each label and inline has the name of the function in src/muenfast that it stands for, each fence and ordering the
 * name that docs/memory-model.md gives it; -DNO_x removes it. tools/model.py runs all of that.
 *
 * The writer takes nothing from a reader, and what it stored can be missed by anybody: so all its lives come first, and
 * the reader's loads decide how much of them there is. -DTOGETHER has the two run side by side.
 *
 * -DSERVER: the reader is a block server with a disk in memory (server_batch). -DREACH_x: fails where x is reached.
 */
#ifndef SLOTS
#define SLOTS 2         /* elements that the ring holds */
#endif
#ifndef WORDS
#define WORDS 2         /* of an element */
#endif
#ifndef LIVES
#define LIVES 2
#endif
#ifndef PUTS
#define PUTS 3          /* elements published, in all lives */
#endif
#ifndef CALLS
#define CALLS 3         /* of the reader, before all stores are visible */
#endif

#define WRITER 0
#define READER 1
#define THREADS 2
#define STORERS 1
#if LIVES > 2
#define STORES 11
#else
#define STORES 8
#endif
#define EPOCH 0
#define SIZE 1
#define WSC 2
#define WC 3
#define SLOT(n, word) (4 + ((n) % SLOTS) * WORDS + (word))
#define LOCATIONS (4 + SLOTS * WORDS)
#include "memory.pml"

/* What is stored says whose life it is of. The protocol's steps look at EPOCH_OF() and at no more than equality with 0
 * otherwise; the rest is for the assertions. */
#define EPOCH_AS(life, epoch) ((life) * 4 + (epoch))
#define EPOCH_OF(value) ((value) & 3)
#define ELEMENT(life, n) ((life) * 16 + 1 + (n))
#define ZEROS(life) ((life) * 16)
#define LIFE_OF(value) ((value) >> 4)
#define NUMBER_OF(value) (((value) & 15) - 1)
#define UNKNOWN 255     /* nobody can tell what that is: see told_from() */

/* For the assertions: what the writer did. */
byte life;
byte epoch_of[LIVES + 1];
byte published[LIVES + 1];
byte announced[LIVES + 1];
bit twice;              /* an epoch was started anew */
bit over;               /* the writer's last life has ended, and all that it stored is visible */
bit written;
byte epoch_last;        /* that stands in the end */

/* ------------------------------------------------------------------ removals */
#ifdef NO_F1
#define F1 true
#else
#define F1 fence_release(WRITER)
#endif
#ifdef NO_F3
#define F3 true
#else
#define F3 fence_release(WRITER)
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
#ifdef NO_F2
#define F2 true
#else
#define F2 fence_acquire(READER)
#endif
#ifdef NO_F2_SERVER
#define F2_SERVER true
#else
#define F2_SERVER fence_acquire(READER)
#endif
#ifdef NO_F4
#define F4 true
#else
#define F4 fence_acquire(READER)
#endif
/* acquire, or not */
#ifdef NO_L1
#define L1 false
#else
#define L1 true
#endif
#ifdef NO_S1_ACQUIRE
#define A1 false
#else
#define A1 true
#endif
#ifdef NO_INTACT_ACQUIRE
#define A2 false
#else
#define A2 true
#endif
#ifdef NO_SERVER_ACQUIRE
#define A2_SERVER false
#else
#define A2_SERVER true
#endif
#ifdef NO_PEEK_ACQUIRE
#define A3 false
#else
#define A3 true
#endif
#ifdef NO_RECOVER_ACQUIRE
#define A4 false
#else
#define A4 true
#endif
#define load(x, acquire, to) load_(READER, x, acquire, over, to)

/* ------------------------------------------------------------------ writer */
active proctype writer() {
    byte wc, wsc, n, k, most, puts, epoch, lives;
    memory_begins();
    do
    :: lives < LIVES ->
        /* Starts after a clean end or, as after kill -9, where the last life just is: under the same epoch, or one that
         * was not there before (one that comes back is as the same for whoever did not look between). */
        if
        :: epoch = (life == 0 -> 1 : epoch_of[life])
        :: life > 0 -> epoch = epoch_of[life] + 1
        fi;
        lives++;
writer_start:
        true;
        d_step {
            life++;
            epoch_of[life] = epoch;
            twice = twice || (life > 1 && epoch_of[life - 1] == epoch);
            wc = 0; wsc = 0
        };
#ifndef NO_EPOCH_0
        store_relaxed(WRITER, EPOCH, 0);
#endif
        F3;
        for (k : 4 .. LOCATIONS - 1) {
            store_relaxed(WRITER, k, ZEROS(life))
        }
        store_relaxed(WRITER, SIZE, epoch);
        store_relaxed(WRITER, WSC, 0);
        store_relaxed(WRITER, WC, 0);
        store_S2(WRITER, EPOCH, EPOCH_AS(life, epoch));
        epoch_last = epoch; epoch = 0
    :: epoch_last != 0 && puts < PUTS ->
        /* Announces n, publishes `most` at a time; the last of them perhaps never. */
        if
        :: n = 1; most = 1
        :: puts + 1 < PUTS -> n = 2; most = 2
        :: puts + 1 < PUTS -> n = 2; most = 1
        fi;
        puts = puts + n;
writer_reserve:
        true;
        d_step {
            announced[life] = (announced[life] > wc + n -> announced[life] : wc + n)
        };
        if
#ifdef NO_WSC_KEPT
        :: true ->
#else
        :: wc + n > wsc ->
#endif
            wsc = wc + n;
#ifndef NO_WSC
            store_relaxed(WRITER, WSC, wsc)
#endif
#ifndef NO_WSC_KEPT
        :: else
#endif
        fi;
        F1;
        do
        :: n > 0 ->
            for (k : 0 .. most * WORDS - 1) {
                store_relaxed(WRITER, SLOT(wc + k / WORDS, k % WORDS), ELEMENT(life, wc + k / WORDS))
            }
            if
            :: true ->
writer_publish:
                wc = wc + most;
                d_step { published[life] = wc };
                store_S1(WRITER, WC, wc);
                n = n - most
            :: n = 0
            fi
        :: else -> break
        od;
        most = 0
    :: epoch_last != 0 ->
writer_stop:
        true;
        store_stop(WRITER, EPOCH, 0);
        epoch_last = 0
    :: life > 0 -> break
    od;
    true;
    d_step {
        written = true; wc = 0; wsc = 0; k = 0; puts = 0; lives = 0; n = 0;
        threads[WRITER].now[0] = 0; threads[WRITER].acquired[0] = 0; threads[WRITER].released[0] = 0;
        for (i_ : 0 .. LOCATIONS - 1) { threads[WRITER].seen[i_] = 0 }
        i_ = 0
    }
}

/* ------------------------------------------------------------------ reader */
mtype = { INACTIVE, EPOCH_CHANGED, NO_DATA, OVERRUN_DETECTED, SUCCESS, READ, READ_MANY, DRAIN };

#ifdef NO_SETTLED_EPOCH
#define SAME_LIFE true
#else
#define SAME_LIFE EPOCH_OF(e2) == r_epoch
#endif
/* A counter below the one known is looked at again for a while: here once more, or the while is over. */
inline reader_settled(x, to) {
    load(x, A1, to);
    if
    :: to < r_wc ->
        load(EPOCH, false, e2);
        if
        :: SAME_LIFE ->
            /* r.unsettled counts no restart that tells of itself */
            assert(twice);      /*: a counter of another epoch is believed to have gone back */
            if
            :: true ->
                load(EPOCH, false, e2);
                if
                :: EPOCH_OF(e2) == r_epoch -> load(x, A1, to)
                :: else
                fi
            :: true
            fi
        :: else
        fi;
        e2 = 0
    :: else
    fi
}

#ifdef SERVER
#ifdef NO_SERVER_GONE
#define FORGET seen = seen || is_over; is_over = 0
#else
#define FORGET true
#endif
/* is_over: whether the life that asks is; wsc. */
inline server_life() {
    FORGET;
    if
    :: !is_over ->
#ifdef SWAPPED
        reader_settled(WSC, wsc);
        reader_settled(WC, wc);
#endif
        atomic {
            load(EPOCH, A2_SERVER, e);
#ifndef NO_SERVER_LIFE_EPOCH
            is_over = (EPOCH_OF(e) != r_epoch);
#endif
            e = 0
        };
        if
        :: !is_over ->
            atomic {
#ifndef SWAPPED
                reader_settled(WSC, wsc);
#endif
#ifndef NO_SERVER_LIFE_RESTART
                is_over = (wsc < r_wc)
#endif
            };
            atomic {
#ifndef SWAPPED
                reader_settled(WC, wc);
#endif
#ifndef NO_SERVER_LIFE_WC
                is_over = is_over || (wc < r_wc);
#endif
                wc = 0
            }
        :: else -> wc = 0
        fi
    :: else
    fi
}
#endif

/* Whether that word is of element n of the life that this reader follows; or of a later one under the same epoch where
 * that, or one behind it, has published as much as the reader knew of the old one: that is not told
 * (docs/protocol.md). */
#define OWN(v, n) (LIFE_OF(v) == r_life && NUMBER_OF(v) == (n))
#define CAUGHT_UP(life_) (published[life_] >= r_wc)
#if LIVES > 2
#define UNTOLD(v) (LIFE_OF(v) > r_life && epoch_of[LIFE_OF(v)] == r_epoch && \
    (CAUGHT_UP(LIFE_OF(v)) || CAUGHT_UP(LIVES)))
#else
#define UNTOLD(v) (LIFE_OF(v) > r_life && epoch_of[LIFE_OF(v)] == r_epoch && CAUGHT_UP(LIFE_OF(v)))
#endif
#define MOST 2
#ifdef SERVER
#define LOOKED_AT (reads -> 1 : WORDS)
#else
#define LOOKED_AT WORDS
#endif

/* A step of this process is one load, with what follows from it. */
active proctype reader() {
    byte r_epoch, r_life, r_rc, r_wc, e, e2, size, wc, wsc, available, k, x, calls, most, attempt;
    byte got[MOST * WORDS];
    byte stage[MOST], at, end;
    byte told, due, final;
    short given;
    byte skipped_life, skipped;
    bit staging, draining, known;
    mtype call, status;
#ifdef SERVER
    bit intact[MOST], is_over, seen, reads;
#endif
#ifdef TOGETHER
    memory[LOCATIONS - 1].n > 0;
#else
    written;
#endif
again:
    atomic {
        d_step {
            e = 0; e2 = 0; size = 0; wc = 0; wsc = 0; available = 0; k = 0; x = 0; most = 0; attempt = 0;
            for (i_ : 0 .. MOST * WORDS - 1) { got[i_] = 0 }
            i_ = 0;
            staging = 0; draining = 0; known = 0; call = 0; status = 0;
#ifdef SERVER
            if
            :: is_over -> r_epoch = 0; r_life = 0; r_rc = 0; r_wc = 0      /* server_step */
            :: else
            fi;
            is_over = 0; seen = 0; reads = 0;
#endif
            if
            :: at == end -> at = 0; end = 0; stage[0] = 0; stage[1] = 0
            :: else
            fi
        };
        if
        :: calls < CALLS && !over ->
            calls++;
#ifdef SERVER
            call = READ; most = MOST
#else
            if
            :: call = READ; most = 1
            :: call = READ; most = MOST; staging = 1    /* Reader.take: what comes next is taken ahead */
            :: call = READ_MANY; most = MOST
            :: call = DRAIN
            fi
#endif
        :: written && !over -> over = true; calls = CALLS; call = READ_MANY; most = MOST
        :: over -> call = READ_MANY; most = MOST; final++
        fi;
        if
        :: call == DRAIN -> goto reader_drain
#ifdef NO_STAGE_FIRST
        :: at != end && r_epoch != 0 && r_wc != r_rc -> goto take
#else
        :: at != end -> goto take
#endif
        :: else
        fi
    };

reader_peek:
    if
    :: r_epoch == 0 || r_wc == r_rc ->
        atomic {
            load(EPOCH, A3, e);
            if
            :: r_epoch == 0 -> goto reader_sync
#ifndef NO_PEEK_EPOCH
            :: r_epoch != 0 && EPOCH_OF(e) != r_epoch -> goto reader_sync
#endif
            :: else
            fi
        };
        atomic {
            e = 0;
            reader_settled(WC, wc);
            if
            :: wc == r_rc -> status = NO_DATA; goto answer
#ifndef NO_PEEK_RESTART
            :: wc != r_rc && wc < r_wc -> goto reader_sync
#endif
            :: else
            fi;
#ifndef PEEK_FORGETS    /* reader_peek keeps WC only where it is no overrun */
            r_wc = wc;
#endif
            if
#ifndef NO_PEEK_OVERRUN
            :: wc < r_rc || wc > r_rc + SLOTS -> goto reader_overrun
#endif
            :: else -> r_wc = wc; wc = 0
            fi
        }
    :: else
    fi;
#ifdef NO_STAGE_FIRST
    if
    :: at != end -> goto take
    :: else
    fi;
#endif

reader_copy:        /* SERVER: server_batch, to which a request's header is its first word */
    atomic {
        assert(r_wc > r_rc && r_wc - r_rc <= SLOTS);    /*: more than the ring holds is copied */
        available = (r_wc - r_rc < most -> r_wc - r_rc : most)
    };
    do
    :: k < available * WORDS ->
        atomic {
            x = SLOT(r_rc + k / WORDS, k % WORDS);
            load(x, false, got[k]);
            x = 0;
#ifdef SERVER
            k = k + WORDS
#else
            k++
#endif
        }
    :: else -> k = 0; break
    od;

reader_intact:
#ifdef SWAPPED      /* as it once was: the counters before the epoch */
    atomic { F2; reader_settled(WSC, wsc) };
    reader_settled(WC, wc);
#endif
    atomic {
#ifndef SWAPPED
        F2;
#endif
        load(EPOCH, A2, e);
        if
#ifndef NO_INTACT_EPOCH
        :: EPOCH_OF(e) != r_epoch -> goto reader_recover
#endif
        :: else -> e = 0
        fi
    };
    atomic {
#ifndef SWAPPED
        reader_settled(WSC, wsc);
#endif
        if
#ifndef NO_INTACT_WSC
        :: wsc > r_rc + SLOTS -> goto reader_recover
#endif
#ifndef NO_INTACT_RESTART
        :: wsc < r_wc -> goto reader_recover
#endif
        :: wsc < r_rc -> goto reader_recover    /* unsigned: farther than the ring */
        :: else -> wsc = 0
        fi
    };
    atomic {
#ifndef SWAPPED
        reader_settled(WC, wc);
#endif
        if
#ifndef NO_INTACT_WC
        :: wc < r_wc -> goto reader_recover
#endif
        :: else -> wc = 0
        fi
    };
#ifdef SERVER
    atomic {
        if
        :: reads = 1            /* all of them, or */
        :: reads = 0            /* writes, whose slots are used, too */
        fi;
        if
        :: written && !over -> over = 1; calls = CALLS      /* all that the client did is visible by now, or not */
        :: true
        fi
    };
server_run_blocks:  /* the other words */
    do
    :: !reads && k < available ->
        atomic {
            x = SLOT(r_rc + k, 1);
            load(x, false, got[k * WORDS + 1]);
            x = 0; k++
        }
    :: else -> k = 0; break
    od;
server_intact:
    do
    :: !reads && k < available ->
        F2_SERVER;
        server_life();
        atomic {
            intact[k] = (!is_over && wsc >= r_rc + k);
#ifndef NO_SERVER_INTACT_WSC
            intact[k] = intact[k] && (wsc <= r_rc + k + SLOTS);
#endif
            wsc = 0;
            d_step {    /* and so goes into a file, were the store one (server_launch) */
                for (x : 0 .. WORDS - 1) {
                    /*: torn, stale or unpublished, and written */
                    assert(!intact[k] || OWN(got[k * WORDS + x], r_rc + k) || UNTOLD(got[k * WORDS + x]))
                };
                x = 0
            };
            k++
        }
    :: else -> k = 0; break
    od;
server_answer:
    server_life();
    wsc = 0;
    if
    :: is_over -> goto reader_advance
    :: else
    fi;
    d_step {
        /* Whoever is known to be gone gets no answer, nor who is gone for all to see. */
        assert(!seen);      /*: an answer to a life known to be over */
        /*: an answer to a life that is over */
        assert(!over || epoch_last == r_epoch && (r_life == life || published[life] >= r_wc))
    };
    if
    :: reads -> intact[0] = 1; intact[1] = 1
    :: else
    fi;
#endif
    status = SUCCESS;       /* SERVER: answered */

reader_advance:
    atomic {
        true;
        d_step {
            for (k : 0 .. available - 1) {
                stage[k] = UNKNOWN;
                if
#ifdef SERVER
                :: !(status == SUCCESS && intact[k]) ->         /* an error, or no answer */
#ifdef REACH_TORN
                    assert(reads || OWN(got[k * WORDS + 1], r_rc + k))
#endif
#endif
                :: else ->
                    stage[k] = got[k * WORDS];
                    for (x : 0 .. LOOKED_AT - 1) {
                        /* Whole, of its place and its life: neither torn, nor stale, nor yet to be published. */
                        /*: torn, stale or unpublished, and delivered */
                        assert(OWN(got[k * WORDS + x], r_rc + k) || UNTOLD(got[k * WORDS + x]));
                        if
                        :: !OWN(got[k * WORDS + x], r_rc + k) -> stage[k] = UNKNOWN
                        :: else
                        fi
                    }
#ifdef REACH_UNTOLD
                    assert(stage[k] != UNKNOWN);
#endif
                fi;
#ifdef REACH_BATCH
                assert(k == 0);
#endif
            };
            k = 0; x = 0;
            end = available;
            r_rc = r_rc + available;
#ifdef SERVER
            intact[0] = 0; intact[1] = 0;
#endif
        };
    }

take:               /* Reader.take: what was taken ahead, or copied just now */
    atomic {
        true;
        d_step {
#ifdef REACH_STAGE
            assert(at == 0 || LIFE_OF(stage[at]) == life);
#endif
            assert(told == r_epoch);        /*: an epoch that nobody was told of */
            do
            :: at < end ->
                /* In order, each once, of the epoch that was told, whatever has come since. */
                if
                :: stage[at] != UNKNOWN ->
                    /*: out of order */
                    assert(NUMBER_OF(stage[at]) == due && epoch_of[LIFE_OF(stage[at])] == told);
                    k = (LIFE_OF(stage[at]) - 1) * PUTS + due;
                    assert(!((given >> k) & 1));        /*: delivered twice */
                    given = given | (1 << k);
                    /* Nothing that was there when Reader.drain was called. */
                    assert(!(LIFE_OF(stage[at]) == skipped_life && due < skipped));     /*: drained, and delivered */
                    k = 0
                :: else
                fi;
                due++;
                at++;
                if
                :: staging || most == 1 -> break
                :: else
                fi
            :: else -> break
            od;
            true
        };
        goto again
    };

reader_recover:
    atomic {
#ifdef REACH_SPOILT
        assert(OWN(got[0], r_rc));
#endif
        wc = 0; wsc = 0; k = 0;
        for (i_ : 0 .. MOST * WORDS - 1) { got[i_] = 0 }
        i_ = 0;
        load(EPOCH, A4, e);
        if
#ifndef NO_RECOVER_EPOCH
        :: EPOCH_OF(e) != r_epoch -> goto reader_sync
#endif
        :: else -> e = 0
        fi
    };
    atomic {
        reader_settled(WSC, wsc);
        if
#ifndef NO_RECOVER_RESTART
        :: wsc < r_wc -> goto reader_sync
#endif
        :: else -> wsc = 0
        fi
    };

reader_overrun:
    atomic { wc = 0; reader_settled(WC, wc) };
    atomic {
        load(EPOCH, false, e);
        if
#ifndef NO_OVERRUN_EPOCH
        :: EPOCH_OF(e) != r_epoch -> goto reader_sync
#endif
#ifndef NO_OVERRUN_RESTART
        :: EPOCH_OF(e) == r_epoch && wc < r_wc -> goto reader_sync
#endif
        :: else
        fi;
        d_step {
            /* There is a loss, it is counted to the element, and the position is one that the writer had: in this life,
             * or in a later one under the same epoch that has come as far by now. */
            assert(at == end && due == r_rc && told == r_epoch);        /*: a loss in the wrong place */
            assert(wc > r_rc);      /*: an overrun that lost nothing */
            for (k : r_life .. life) {
                x = x || (epoch_of[k] == r_epoch && published[k] >= wc && (k > r_life || announced[k] > r_rc + SLOTS))
            };
            assert(x);      /*: a loss that was none */
            k = 0; x = 0;
            due = due + (wc - r_rc);
            r_rc = wc; r_wc = wc
        };
        status = OVERRUN_DETECTED;
        goto answer
    };

reader_sync:
    atomic {
        known = r_epoch != 0; e = 0; wc = 0; wsc = 0
#ifndef REACH_EPOCH
#ifndef REACH_RESTART
        ; r_epoch = 0
#endif
#endif
        ; r_life = 0; r_rc = 0; r_wc = 0
    };
sync:
    atomic {
        load(EPOCH, L1, e);
        if
        :: EPOCH_OF(e) == 0 -> goto nothing
        :: else
        fi
    };
    load(SIZE, false, size);
    atomic {
        F4;
#ifndef NO_SECOND_LOOK
        load(EPOCH, false, e2);
        if
        :: EPOCH_OF(e2) != EPOCH_OF(e) ->
#ifdef REACH_SECOND_LOOK
            assert(false);
#endif
            attempt++; size = 0; e = 0; e2 = 0;
            if
            :: attempt < 2 -> goto sync
            :: else -> goto nothing
            fi
        :: else
        fi;
#endif
        d_step {
            assert(size == EPOCH_OF(e));    /*: the geometry of another epoch */
#ifdef REACH_EPOCH
            assert(r_epoch == 0 || r_epoch == EPOCH_OF(e));
#endif
#ifdef REACH_RESTART
            assert(r_epoch != EPOCH_OF(e));
#endif
            if
            :: draining -> skipped_life = e / 4; skipped = 0
            :: else
            fi;
            r_epoch = EPOCH_OF(e); r_life = e / 4; r_rc = 0; r_wc = 0
        };
        e = 0; e2 = 0; size = 0; attempt = 0;
        status = EPOCH_CHANGED;
        if
        :: draining -> goto drain
        :: else -> goto answer
        fi
    };
nothing:
    atomic {
#ifdef REACH_STOP
        assert(!known);
#endif
        r_epoch = 0; status = INACTIVE;
        if
        :: draining -> told = 0; due = 0; goto again
        :: else
        fi
    };

answer:
    atomic {
        true;
        d_step {
            assert(at == end);      /*: told before what was taken ahead */
            if
            :: status == EPOCH_CHANGED -> told = r_epoch; due = 0
            :: status == INACTIVE -> told = 0; due = 0
            :: else
            fi;
#ifdef REACH_OVERRUN
            assert(status != OVERRUN_DETECTED);
#endif
            if
            :: over && (status == NO_DATA || status == INACTIVE) ->
                /* When everything is visible: the stop, or the last epoch and each element of it, has been told of. */
                if
                :: epoch_last == 0 -> assert(status == INACTIVE && told == 0)     /*: an end that was not told of */
                :: else -> /*: an epoch or elements not told of */
                    assert(status == NO_DATA && told == epoch_last && due == r_rc && due == published[life])
                fi
            :: else
            fi
        };
        if
        :: over && (status == NO_DATA || status == INACTIVE) -> goto end_
        :: else -> assert(final < PUTS + 3); goto again     /*: no end */
        fi
    };

reader_drain:
    atomic {
        at = 0; end = 0; stage[0] = 0; stage[1] = 0; draining = 1;
        if
        :: r_epoch == 0 -> goto reader_sync
        :: else
        fi;
        load(EPOCH, true, e);
        if
#ifndef NO_DRAIN_EPOCH
        :: EPOCH_OF(e) != r_epoch -> goto reader_sync
#endif
        :: else
        fi;
        skipped_life = e / 4; skipped = 0; e = 0
    };
    atomic {
        load(WC, true, wc);
        if
#ifndef NO_DRAIN_RESTART
        :: wc < r_wc -> goto reader_sync
#endif
        :: else
        fi;
#ifndef DRAIN_TWICE     /* reader_drain loads WC twice */
        goto skip_to
#endif
    };
drain:
    load(WC, true, wc);
skip_to:
    atomic {
        true;
        d_step {
            assert(wc >= r_wc);     /*: a position that went back without a word */
            r_rc = wc; r_wc = wc;
            told = r_epoch;
            due = wc;
            skipped = wc
        };
        goto again
    };
end_:
    true
}
