/* What an engine has a user-space store do: jobs, taken by the threads of a pool that is not C's; no Python.h.
 *
 * Who owns a job and its stage: the engine, but from jobs_put() on whoever gets it, a worker from jobs_next() or jobs_try()
 * until its jobs_done(). A worker that is too late loses its reader (jobs_forget), not its job: until its jobs_done() nobody
 * else has that memory, so a late store writes into its own stage and nowhere else. Nothing is allocated here.
 *
 * `free` is the engine's alone; everything that both touch is under lock.
 */
#ifndef MUENFAST_JOBS_H
#define MUENFAST_JOBS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "_atomics.h"

enum {
    JOBS_WORKERS = 64,        /* most threads of a pool */
    JOBS_MOST = 256 + JOBS_WORKERS, /* AIO_MOST, and one for each worker that is late */
    JOB_BYTES = 256 * 1024    /* of a stage: most bytes of one read or write */
};

/* Python runs one thread at a time: as long as calls end, one worker does them all, and another one only looks on, this
 * often, whether they do. That many looks at nothing to do, and it sleeps, too. A worker that has nothing to do spins first,
 * while that paid lately. docs/decisions/013. */
#define JOBS_STALL_NS UINT64_C(200000)
#define JOBS_SPIN_NS UINT64_C(50000)
enum { JOBS_LOOKS = 50 };

enum job_state { JOB_FREE = 0, JOB_QUEUED, JOB_RUNNING, JOB_READY };

typedef struct job {
    struct job *next;
    void *reader; /* the operation that gets the answer; NULL: nobody waits for it any more */
    uint8_t *stage;
    uint64_t start, length; /* bytes of the store */
    uint64_t deadline;      /* now_ns() */
    uint32_t place;         /* in jobs.all */
    int kind;               /* an aio_kind */
    bool changes;           /* what stands in the store */
    int state;
    int error;
} job;

/* What was answered without the store. */
typedef struct late_call {
    int kind;
    bool begun; /* else no worker had taken it */
    uint64_t start, length;
} late_call;

typedef struct jobs {
    uint64_t timeout_ns;
    job *free;
    pthread_mutex_t lock;
    pthread_cond_t work;
    job *todo, **todo_last;
    job *ready, **ready_last;
    uint32_t *finished; /* the engine's futex: goes up with each job that is ready. NULL: there is no engine */
    const uint32_t *waiting; /* whether it may sleep there */
    uint32_t queued;    /* jobs in todo; looked at without the lock */
    uint32_t idle;      /* workers that sleep until they are told */
    uint32_t awake;     /* workers that execute, or are about to look for a job */
    bool watched;       /* a worker looks on */
    uint32_t spin_score, spin_probe; /* of workers that spin, who agree on nothing better */
    uint32_t left;      /* jobs at work that nobody waits for; looked at without the lock */
    uint32_t adrift;    /* of those, the ones that change what stands in the store */
    bool ending;
    uint64_t calls, late, returned; /* executed; answered by the deadline; of those, ended since */
    late_call last;     /* the last one of them */
    job all[JOBS_MOST];
} jobs;

static inline void jobs_init(jobs *q, uint64_t timeout_ns) {
    uint32_t k;
    pthread_condattr_t monotonic;
    memset(q, 0, sizeof *q);
    q->timeout_ns = timeout_ns;
    q->todo_last = &q->todo;
    q->ready_last = &q->ready;
    pthread_mutex_init(&q->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&q->work, &monotonic);
    pthread_condattr_destroy(&monotonic);
    for (k = JOBS_MOST; k-- != 0;) { /* the last used is the first used again: few stages are ever touched */
        q->all[k].place = k;
        q->all[k].next = q->free;
        q->free = &q->all[k];
    }
}

static inline void jobs_destroy(jobs *q) {
    pthread_cond_destroy(&q->work);
    pthread_mutex_destroy(&q->lock);
}

static inline void jobs_append(job ***last, job *j) {
    j->next = NULL;
    **last = j;
    *last = &j->next;
}

/* Wakes a sleeper where nobody would see to what is queued. Precondition: lock held. */
static inline void jobs_call(jobs *q) {
    if (q->todo != NULL && q->idle != 0 && (q->awake == 0 || !q->watched))
        pthread_cond_signal(&q->work);
}

/* ---- the engine */

/* From here on answers go to the engine whose words these are. */
static inline void jobs_attach(jobs *q, uint32_t *finished, const uint32_t *waiting) {
    pthread_mutex_lock(&q->lock);
    q->finished = finished;
    q->waiting = waiting;
    pthread_mutex_unlock(&q->lock);
}

/* A job of the engine's is free again. */
static inline void jobs_free(jobs *q, job *j) {
    j->state = JOB_FREE;
    j->next = q->free;
    q->free = j;
}

/* Whether [start, start + length) meets what a late job may yet change. */
static inline bool jobs_meets_adrift(jobs *q, uint64_t start, uint64_t length) {
    uint32_t k, left;
    bool meets = false;
    pthread_mutex_lock(&q->lock);
    for (k = 0, left = q->adrift; left != 0 && k < JOBS_MOST; k++) {
        const job *j = &q->all[k];
        if (j->state == JOB_RUNNING && j->reader == NULL && j->changes) {
            left--;
            meets = meets || (j->start < start + length && start < j->start + j->length);
        }
    }
    pthread_mutex_unlock(&q->lock);
    return meets;
}

/* A job for a worker, or NULL where there is none free, or where it changes what a late one may yet change: that one could
 * then undo what was acknowledged. data: what a write writes. */
static inline job *jobs_put(jobs *q, void *reader, int kind, bool changes, uint64_t start, uint64_t length,
                            const uint8_t *data) {
    job *j = q->free;
    if (j == NULL || (changes && jobs_meets_adrift(q, start, length)))
        return NULL;
    q->free = j->next;
    j->reader = reader;
    j->kind = kind;
    j->changes = changes;
    j->start = start;
    j->length = length;
    j->error = 0;
    j->deadline = now_ns() + q->timeout_ns;
    if (data != NULL)
        memcpy(j->stage, data, length);
    pthread_mutex_lock(&q->lock);
    j->state = JOB_QUEUED;
    jobs_append(&q->todo_last, j);
    store_relaxed32(&q->queued, q->queued + 1);
    jobs_call(q);
    pthread_mutex_unlock(&q->lock);
    return j;
}

/* Takes what is ready, the oldest first; what nobody waits for is free again. */
static inline job *jobs_collect(jobs *q) {
    job *all, *j, *next, *mine = NULL, **last = &mine;
    pthread_mutex_lock(&q->lock);
    all = q->ready;
    q->ready = NULL;
    q->ready_last = &q->ready;
    pthread_mutex_unlock(&q->lock);
    for (j = all; j != NULL; j = next) {
        next = j->next;
        if (j->reader == NULL)
            jobs_free(q, j);
        else
            jobs_append(&last, j);
    }
    return mine;
}

/* The engine answers by itself what it waited for too long (late), or what it need not wait for; false where that is ready:
 * it is to be collected. */
static inline bool jobs_forget(jobs *q, job *j, bool late) {
    bool done = false, queued = false;
    job **link;
    pthread_mutex_lock(&q->lock);
    if (j->state == JOB_QUEUED) {
        for (link = &q->todo; *link != j; link = &(*link)->next)
            ;
        *link = j->next;
        if (j->next == NULL)
            q->todo_last = link;
        store_relaxed32(&q->queued, q->queued - 1);
        done = queued = true;
    } else if (j->state == JOB_RUNNING) {
        j->reader = NULL;
        store_relaxed32(&q->left, q->left + 1);
        q->adrift += j->changes;
        done = true;
    }
    if (done && late) {
        q->last = (late_call){j->kind, !queued, j->start, j->length};
        count64(&q->late, 1);
    }
    pthread_mutex_unlock(&q->lock);
    if (queued)
        jobs_free(q, j);
    return done;
}

/* No engine any more: what is ready or yet to be begun is nobody's. Precondition: the engine waits for nothing. */
static inline void jobs_detach(jobs *q) {
    job *j, *next;
    pthread_mutex_lock(&q->lock);
    q->finished = NULL;
    q->waiting = NULL;
    pthread_mutex_unlock(&q->lock);
    for (j = jobs_collect(q); j != NULL; j = next) {
        next = j->next;
        jobs_free(q, j);
    }
}

/* ---- workers */

/* A job that is to be done, or NULL. Precondition: lock held. */
static inline job *jobs_first(jobs *q) {
    job *j = q->todo;
    if (j == NULL)
        return NULL;
    q->todo = j->next;
    if (q->todo == NULL)
        q->todo_last = &q->todo;
    j->state = JOB_RUNNING;
    store_relaxed32(&q->queued, q->queued - 1);
    return j;
}

/* A worker begins: it is awake. */
static inline void jobs_join(jobs *q) {
    pthread_mutex_lock(&q->lock);
    q->awake++;
    pthread_mutex_unlock(&q->lock);
}

/* A job, or NULL at once where there is none. */
static inline job *jobs_try(jobs *q) {
    job *j;
    pthread_mutex_lock(&q->lock);
    j = q->ending ? NULL : jobs_first(q);
    pthread_mutex_unlock(&q->lock);
    return j;
}

/* Waits JOBS_STALL_NS, or until it is called. Precondition: lock held. */
static inline void jobs_look_on(jobs *q) {
    uint64_t until = now_ns() + JOBS_STALL_NS;
    struct timespec t = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    pthread_cond_timedwait(&q->work, &q->lock, &t);
}

static inline void jobs_spin(jobs *q) {
    uint32_t score = load_relaxed32(&q->spin_score), probe = load_relaxed32(&q->spin_probe) + 1;
    uint64_t start, passed = 0;
    store_relaxed32(&q->spin_probe, probe);
    if (score == 0 && probe % SPIN_PROBE != 0)
        return;
    for (start = now_ns(); passed < JOBS_SPIN_NS; passed = now_ns() - start) {
        if (load_relaxed32(&q->queued) != 0) {
            store_relaxed32(&q->spin_score, SPIN_SCORE);
            return;
        }
        spin_once(passed);
    }
    store_relaxed32(&q->spin_score, score > 4 ? score - 4 : 0);
}

/* A job, as soon as there is one and nobody else sees to it; NULL once jobs_end() was called. */
static inline job *jobs_next(jobs *q) {
    job *j = NULL;
    bool watching = false, stalled = false;
    uint32_t looks = 0;
    uint64_t calls;
    jobs_spin(q);
    pthread_mutex_lock(&q->lock);
    q->awake--;
    while (!q->ending) {
        if (q->todo != NULL && (q->awake == 0 || stalled)) {
            j = jobs_first(q);
            break;
        }
        if (!watching && q->awake != 0 && !q->watched) {
            watching = q->watched = true;
            looks = 0;
        }
        if (watching && looks < JOBS_LOOKS) {
            calls = q->calls;
            jobs_look_on(q);
            looks = q->calls == calls && q->todo == NULL ? looks + 1 : 0;
            stalled = q->calls == calls && q->todo != NULL;
            continue;
        }
        if (watching)
            watching = q->watched = false;
        q->idle++;
        pthread_cond_wait(&q->work, &q->lock);
        q->idle--;
    }
    if (watching)
        q->watched = false;
    if (j != NULL) {
        q->awake++;
        jobs_call(q);
    }
    pthread_mutex_unlock(&q->lock);
    return j;
}

/* A job is done, whose stage holds what was read. error: 0 or a negative errno. */
static inline void jobs_done(jobs *q, job *j, int error) {
    pthread_mutex_lock(&q->lock);
    count64(&q->calls, 1);
    if (j->reader == NULL) {
        store_relaxed32(&q->left, q->left - 1);
        q->adrift -= j->changes;
        count64(&q->returned, 1);
    }
    j->error = error;
    j->state = JOB_READY;
    jobs_append(&q->ready_last, j);
    if (q->finished != NULL) {
        fetch_add_acqrel32(q->finished, 1);
        fence_seq_cst(); /* pairs with aio_wait(): it announces itself before its last look */
        if (load_relaxed32(q->waiting) != 0)
            futex_wake_all(q->finished);
    }
    pthread_mutex_unlock(&q->lock);
}

/* The last call that was late, and how many there were. */
static inline uint64_t jobs_lateness(jobs *q, late_call *last) {
    uint64_t late;
    pthread_mutex_lock(&q->lock);
    *last = q->last;
    late = q->late;
    pthread_mutex_unlock(&q->lock);
    return late;
}

/* Workers get no more jobs. */
static inline void jobs_end(jobs *q) {
    pthread_mutex_lock(&q->lock);
    q->ending = true;
    pthread_cond_broadcast(&q->work);
    pthread_mutex_unlock(&q->lock);
}

#endif
