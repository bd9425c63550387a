/* What a front end's only thread needs of io_uring: many answers in one system call, and one sleep for a request of the
 * kernel's and an answer of the server's; no Python.h.
 *
 * A pump belongs to the thread that opened it. With MUENFAST_NO_URING defined (no liburing at build time), or in a kernel
 * that cannot wait for a futex (before Linux 6.7) or refuses io_uring, there is none.
 */
#ifndef MUENFAST_PUMP_H
#define MUENFAST_PUMP_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "../_uring.h"

enum {
    PUMP_WRITES = 64,        /* in one system call */
    /* user_data; of the word also which one of those that were asked for, from bit 8 on */
    PUMP_WRITE = 1,
    PUMP_FD = 2,
    PUMP_WORD = 3,
    PUMP_OTHER = 4
};

typedef struct pump {
#ifndef MUENFAST_NO_URING
    struct io_uring ring;
#endif
    uint32_t *word;   /* whose change a completion will tell, or NULL */
    uint64_t asked;   /* how often one was asked for */
    uint32_t writes;  /* prepared, or under way */
    uint32_t refused; /* of those: the kernel did not take them */
    bool watches;     /* a completion will tell that the descriptor is readable */
} pump;

#ifdef MUENFAST_NO_URING
static inline int pump_open(pump *p) {
    (void)p;
    return -ENOSYS;
}
static inline void pump_close(pump *p) { (void)p; }
static inline void pump_write(pump *p, int fd, const struct iovec *iov, unsigned n) {
    (void)p, (void)fd, (void)iov, (void)n;
}
static inline uint32_t pump_flush(pump *p) {
    (void)p;
    return 0;
}
static inline void pump_forget(pump *p) { (void)p; }
static inline void pump_sleep(pump *p, int fd, uint32_t *word, uint32_t seen, uint64_t ns) {
    (void)p, (void)fd, (void)word, (void)seen, (void)ns;
}
#else
/* 0 or a negative errno. */
static inline int pump_open(pump *p) {
    struct io_uring_probe *probe;
    bool able;
    int status;
    memset(p, 0, sizeof *p);
    status = io_uring_queue_init(2 * PUMP_WRITES, &p->ring, 0);
    if (status < 0)
        return status;
    probe = io_uring_get_probe_ring(&p->ring);
    able = probe != NULL && io_uring_opcode_supported(probe, URING_OP_FUTEX_WAIT);
    if (probe != NULL)
        io_uring_free_probe(probe);
    if (!able) {
        io_uring_queue_exit(&p->ring);
        return -ENOSYS;
    }
    return 0;
}

static inline void pump_close(pump *p) { io_uring_queue_exit(&p->ring); }

static inline void pump_reap(pump *p) {
    struct io_uring_cqe *cqe;
    while (io_uring_peek_cqe(&p->ring, &cqe) == 0) {
        uint64_t what = cqe->user_data;
        if (what == PUMP_WRITE) {
            p->writes--;
            if (cqe->res < 0)
                p->refused++;
        } else if (what == PUMP_FD)
            p->watches = false;
        else if (what == (PUMP_WORD | p->asked << 8))
            p->word = NULL;
        io_uring_cqe_seen(&p->ring, cqe);
    }
}

static inline struct io_uring_sqe *pump_sqe(pump *p) {
    struct io_uring_sqe *sqe;
    while ((sqe = io_uring_get_sqe(&p->ring)) == NULL)
        io_uring_submit(&p->ring); /* it was short of memory, and took nothing */
    return sqe;
}

/* Precondition: fewer than PUMP_WRITES since the last pump_flush(). */
static inline void pump_write(pump *p, int fd, const struct iovec *iov, unsigned n) {
    struct io_uring_sqe *sqe = pump_sqe(p);
    io_uring_prep_writev(sqe, fd, iov, n, 0);
    sqe->user_data = PUMP_WRITE;
    p->writes++;
}

/* Returns once all writes are done: how many the kernel refused. */
static inline uint32_t pump_flush(pump *p) {
    uint32_t refused;
    while (p->writes != 0) {
        io_uring_submit_and_wait(&p->ring, p->writes);
        pump_reap(p);
    }
    refused = p->refused;
    p->refused = 0;
    return refused;
}

/* Waits for the word no longer. To be called where its memory may be exchanged from then on: the kernel waits for the memory,
 * not for the address, at which other memory may stand next. */
static inline void pump_forget(pump *p) {
    struct io_uring_sqe *sqe;
    if (p->word == NULL)
        return;
    sqe = pump_sqe(p);
    io_uring_prep_cancel64(sqe, PUMP_WORD | p->asked << 8, 0);
    sqe->user_data = PUMP_OTHER;
    p->word = NULL;
}

/* Sleeps until fd (-1: none) is readable, or the word (NULL: none) is no longer `seen` or is woken, at most ns nanoseconds.
 * What was asked for by an earlier call and has not come counts, too: who changes the word wakes those who wait. */
static inline void pump_sleep(pump *p, int fd, uint32_t *word, uint32_t seen, uint64_t ns) {
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
    struct __kernel_timespec limit = {(long long)(ns / 1000000000), (long long)(ns % 1000000000)};
    if (fd >= 0 && !p->watches) {
        sqe = pump_sqe(p);
        io_uring_prep_poll_add(sqe, fd, POLLIN);
        sqe->user_data = PUMP_FD;
        p->watches = true;
    }
    if (word != NULL && p->word != word)
        pump_forget(p);
    if (word != NULL && p->word == NULL) {
        sqe = pump_sqe(p);
        uring_prep_futex_wait(sqe, word, seen);
        p->asked++;
        sqe->user_data = PUMP_WORD | p->asked << 8;
        p->word = word;
    }
    io_uring_submit_and_wait_timeout(&p->ring, &cqe, 1, &limit, NULL);
    pump_reap(p);
}
#endif
#endif
