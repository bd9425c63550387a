/* What a front end's only thread needs of io_uring: many answers in one system call, one sleep for a request of the kernel's
 * and an answer of the server's, and, where the kernel has it, FUSE's requests themselves; no Python.h.
 *
 * A pump belongs to the thread that started it; any may open it before, and close it after. With MUENFAST_NO_URING defined (no
 * liburing at build time), or in a kernel that cannot wait for a futex (before Linux 6.7) or refuses io_uring, there is none.
 *
 * One that takes commands leaves completions to pump_next(), and what the kernel has to do for them waits for a system call
 * (IORING_SETUP_COOP_TASKRUN): who waits for requests is not interrupted by them. Never IORING_SETUP_DEFER_TASKRUN: what it
 * defers only this thread does, or the last close of the ring. Where the process is killed while another thread of it waits for
 * the device (its partition table, its last flush), neither comes, for that thread keeps the ring open; requests that were
 * assigned to entries meanwhile are then beyond an abort, too, and the thread is there for good.
 */
#ifndef MUENFAST_PUMP_H
#define MUENFAST_PUMP_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "../_uring.h"
#include "_fuse_uring.h"

enum {
    PUMP_WRITES = 64,        /* in one system call */
    /* user_data; from bit 8 on, of the word which one of those that were asked for, of a command which entry */
    PUMP_WRITE = 1,
    PUMP_FD = 2,
    PUMP_WORD = 3,
    PUMP_OTHER = 4,
    PUMP_EVENT = 5,
    PUMP_COMMAND = 6
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
    bool commands;    /* takes FUSE's requests */
    bool awaits;      /* a completion will tell that the event came */
    uint64_t event;   /* where its count goes */
} pump;

#ifdef MUENFAST_NO_URING
static inline int pump_open(pump *p, unsigned entries) {
    (void)p, (void)entries;
    return -ENOSYS;
}
static inline int pump_start(pump *p) {
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
static inline void pump_watch(pump *p, int fd) { (void)p, (void)fd; }
static inline void pump_await(pump *p, int event) { (void)p, (void)event; }
static inline void pump_register(pump *p, int fd, const struct iovec *parts, unsigned queue, unsigned entry) {
    (void)p, (void)fd, (void)parts, (void)queue, (void)entry;
}
static inline void pump_commit(pump *p, int fd, uint64_t commit_id, unsigned queue, unsigned entry) {
    (void)p, (void)fd, (void)commit_id, (void)queue, (void)entry;
}
static inline bool pump_next(pump *p, unsigned *entry, int *result) {
    (void)p, (void)entry, (void)result;
    return false;
}
#else
/* 0 or a negative errno. entries: of FUSE's that will be registered, 0: the pump takes no commands. */
static inline int pump_open(pump *p, unsigned entries) {
    struct io_uring_params params;
    struct io_uring_probe *probe;
    bool able;
    int status;
    memset(p, 0, sizeof *p);
    memset(&params, 0, sizeof params);
    params.flags = IORING_SETUP_R_DISABLED;
    if (entries != 0) {
        params.flags |= URING_SETUP_SINGLE_ISSUER | URING_SETUP_COOP_TASKRUN | URING_SETUP_TASKRUN_FLAG | URING_SETUP_SQE128
                        | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;
        params.cq_entries = entries + 2 * PUMP_WRITES;
    }
    status = io_uring_queue_init_params(2 * PUMP_WRITES, &p->ring, &params);
    if (status < 0)
        return status;
    probe = io_uring_get_probe_ring(&p->ring);
    able = probe != NULL && io_uring_opcode_supported(probe, URING_OP_FUTEX_WAIT)
           && (entries == 0 || io_uring_opcode_supported(probe, URING_OP_COMMAND));
    if (probe != NULL)
        io_uring_free_probe(probe);
    if (!able) {
        io_uring_queue_exit(&p->ring);
        return -ENOSYS;
    }
    p->commands = entries != 0;
    return 0;
}

/* Makes it the calling thread's; 0 or a negative errno. */
static inline int pump_start(pump *p) { /* io_uring_enable_rings(), which liburing 2.3 does not export */
    return syscall(SYS_io_uring_register, p->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0 ? -errno : 0;
}

static inline void pump_close(pump *p) { io_uring_queue_exit(&p->ring); }

/* Whether a command is done, then of which entry and how; others are noted. Precondition: there is a completion. */
static inline bool pump_note(pump *p, const struct io_uring_cqe *cqe, unsigned *entry, int *result) {
    uint64_t what = cqe->user_data;
    if ((what & 0xff) == PUMP_COMMAND) {
        *entry = (unsigned)(what >> 8);
        *result = cqe->res;
        return true;
    }
    if (what == PUMP_WRITE) {
        p->writes--;
        if (cqe->res < 0)
            p->refused++;
    } else if (what == PUMP_FD)
        p->watches = false;
    else if (what == PUMP_EVENT)
        p->awaits = false;
    else if (what == (PUMP_WORD | p->asked << 8))
        p->word = NULL;
    return false;
}

/* Precondition: it takes no commands. */
static inline void pump_reap(pump *p) {
    struct io_uring_cqe *cqe;
    unsigned entry;
    int result;
    while (io_uring_peek_cqe(&p->ring, &cqe) == 0) {
        pump_note(p, cqe, &entry, &result);
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

/* From now on, until it happened, a completion tells that fd is readable. */
static inline void pump_watch(pump *p, int fd) {
    struct io_uring_sqe *sqe;
    if (p->watches)
        return;
    sqe = pump_sqe(p);
    io_uring_prep_poll_add(sqe, fd, POLLIN);
    sqe->user_data = PUMP_FD;
    p->watches = true;
}

/* Sleeps until fd (-1: none) is readable, or the word (NULL: none) is no longer `seen` or is woken, at most ns nanoseconds.
 * What was asked for by an earlier call and has not come counts, too: who changes the word wakes those who wait. */
static inline void pump_sleep(pump *p, int fd, uint32_t *word, uint32_t seen, uint64_t ns) {
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
    struct __kernel_timespec limit = {(long long)(ns / 1000000000), (long long)(ns % 1000000000)};
    if (fd >= 0)
        pump_watch(p, fd);
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
    if (!p->commands)
        pump_reap(p);
}

/* From now on an eventfd (blocking, so that io_uring waits for it) that was written ends a sleep, and is read. */
static inline void pump_await(pump *p, int event) {
    struct io_uring_sqe *sqe;
    if (p->awaits)
        return;
    sqe = pump_sqe(p);
    io_uring_prep_read(sqe, event, &p->event, sizeof p->event, 0);
    sqe->user_data = PUMP_EVENT;
    p->awaits = true;
}

static inline void pump_command(pump *p, int fd, uint32_t command, uint64_t commit_id, unsigned queue, unsigned entry,
                                const struct iovec *parts) {
    struct io_uring_sqe *sqe = pump_sqe(p);
    fuse_uring_command what = {0, commit_id, (uint16_t)queue, {0}};
    memset(sqe, 0, 2 * sizeof *sqe); /* IORING_SETUP_SQE128 */
    io_uring_prep_rw(URING_OP_COMMAND, sqe, fd, parts, parts == NULL ? 0 : 2, command);
    memcpy((char *)sqe + 48, &what, sizeof what); /* struct io_uring_sqe, cmd */
    sqe->user_data = PUMP_COMMAND | (uint64_t)entry << 8;
}

/* parts: header and payload of the entry; needed until the next pump_next(). */
static inline void pump_register(pump *p, int fd, const struct iovec *parts, unsigned queue, unsigned entry) {
    pump_command(p, fd, FUSE_URING_REGISTER, 0, queue, entry, parts);
}

static inline void pump_commit(pump *p, int fd, uint64_t commit_id, unsigned queue, unsigned entry) {
    pump_command(p, fd, FUSE_URING_COMMIT, commit_id, queue, entry, NULL);
}

/* The next command that is done: its entry, and 0 (there is a request) or a negative errno (there will be none). Never waits;
 * gives the kernel what was committed once there is nothing else to take. */
static inline bool pump_next(pump *p, unsigned *entry, int *result) {
    struct io_uring_cqe *cqe;
    bool entered = false, found;
    for (;;) {
        while (io_uring_peek_cqe(&p->ring, &cqe) != 0) {
            if (entered || io_uring_sq_ready(&p->ring) == 0)
                return false;
            io_uring_submit_and_get_events(&p->ring);
            entered = true;
        }
        found = pump_note(p, cqe, entry, result);
        io_uring_cqe_seen(&p->ring, cqe);
        if (found)
            return true;
    }
}
#endif
#endif
