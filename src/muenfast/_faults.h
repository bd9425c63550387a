/* Faults that a user asked for, decided operation by operation; no Python.h. One thread at a time. */
#ifndef MUENFAST_FAULTS_H
#define MUENFAST_FAULTS_H

#include <stdbool.h>
#include <stdint.h>

#include "_atomics.h"

enum fault_what { FAULT_ERROR = 0, FAULT_DELAY, FAULT_LATE, FAULT_CORRUPT };

enum { FAULTS_MOST = 8 };

typedef struct fault {
    int what;
    uint32_t kinds;     /* bit k: of operations of aio_kind k */
    uint64_t threshold; /* of 2^64 - 1: how often */
    int error;          /* FAULT_ERROR: a negative errno */
    uint64_t delay_ns;  /* FAULT_DELAY */
} fault;

typedef struct faults {
    uint64_t random; /* the state of its generator */
    uint64_t timeout_ns;
    uint32_t n;
    fault each[FAULTS_MOST];
    uint64_t met[4]; /* how often each fault_what */
} faults;

/* What happens to one operation. */
typedef struct fault_plan {
    int error;         /* it fails with that, and is not executed */
    uint64_t delay_ns; /* its answer is withheld that long */
    bool late;         /* it is answered when its time is over, and not executed */
    bool corrupt;      /* a bit of what it reads changes */
} fault_plan;

/* SplitMix64 (Steele, Lea and Flood, 2014). */
static inline uint64_t faults_random(faults *f) {
    uint64_t z = (f->random += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static inline fault_plan faults_plan(faults *f, int kind) {
    fault_plan plan = {0, 0, false, false};
    uint32_t k;
    for (k = 0; k < f->n; k++) {
        const fault *each = &f->each[k];
        if ((each->kinds >> kind & 1) == 0 || faults_random(f) > each->threshold)
            continue;
        count64(&f->met[each->what], 1);
        if (each->what == FAULT_ERROR)
            plan.error = each->error;
        else if (each->what == FAULT_DELAY)
            plan.delay_ns += each->delay_ns;
        else if (each->what == FAULT_LATE)
            plan.late = true;
        else
            plan.corrupt = true;
    }
    return plan;
}

#endif
