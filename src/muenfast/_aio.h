/* Several operations at a time on files and block devices: by io_uring, where that is refused by threads; no Python.h.
 * Also on memory and user-space stores, where those are to look like files to their engine.
 *
 * An aio belongs to one thread, which submits, waits and takes what is done; only the threads of the pool touch it beside
 * that, under its lock, and workers of user-space stores the words `finished` and `waiting`. Nothing is allocated per
 * operation: the caller owns each aio_op, and its memory, from aio_submit() until aio_take() returns it.
 *
 * With MUENFAST_NO_URING defined (no liburing at build time) there are threads only.
 */
#ifndef MUENFAST_AIO_H
#define MUENFAST_AIO_H

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_atomics.h"
#include "_faults.h"
#include "_jobs.h"
#include "_uring.h"

enum aio_kind { AIO_READ = 0, AIO_WRITE = 1, AIO_SYNC = 2, AIO_DISCARD = 3 };

enum {
    AIO_MOST = 256,   /* operations at a time */
    AIO_THREADS = 8,  /* of a pool, at work for one file */
    AIO_POOL = 64,    /* of a pool */
    AIO_SUBMIT = 2,   /* operations in one system call */
    AIO_FILES = 256,  /* per aio */
    AIO_NO_FILE = AIO_FILES /* of what is only about memory */
};
/* Where a kernel cannot wait for the bell and for operations at once: a look at the ring this often, while there are some. */
#define AIO_LOOK_NS UINT64_C(200000)
#define AIO_END_NS UINT64_C(4000000000) /* how long an engine's end waits for what can be left alone */
#define AIO_DISCARD_DEVICE _IO(0x12, 119) /* linux/fs.h: BLKDISCARD */
#define AIO_COMMAND_DISCARD _IO(0x12, 0)  /* linux/blkdev.h of Linux 6.12: BLOCK_URING_CMD_DISCARD */

typedef struct aio_op {
    struct aio_op *next;
    uint8_t *data;   /* of a read or write */
    uint64_t start;  /* byte of the file */
    uint64_t length; /* bytes */
    uint64_t moved;  /* bytes of them that are done */
    uint64_t user;   /* the caller's */
    uint64_t due;    /* now_ns() before which its end is not told, or 0 */
    job *work;       /* of a user-space store, or NULL */
    uint32_t file;   /* as aio_add() returned it */
    uint32_t place;  /* in aio.flying */
    int kind;
    int error;    /* 0 or a negative errno, once it is done */
    bool final;   /* the error holds for all of it: no part is to be tried again */
    bool late;    /* its time was over */
    bool corrupt; /* a bit of what it reads changes */
} aio_op;

/* What stands behind a number that is no plain file. */
typedef struct aio_source {
    int (*execute)(const void *context, const aio_op *op); /* does it at once: 0 or a negative errno; or NULL */
    const void *context;
    jobs *jobs;     /* of a user-space store, or NULL */
    faults *faults; /* or NULL */
} aio_source;

typedef struct aio {
    pid_t process; /* whose it is: a child of fork() has neither the threads nor a right to what completes */
    aio_op *flying[AIO_MOST]; /* submitted and not taken */
    uint32_t nflying;
    aio_op *done, **done_last; /* finished and not taken */
    aio_op *held, **held_last; /* submitted and not begun: the pool's next work */
    int fds[AIO_FILES];
    bool devices[AIO_FILES];
    aio_source sources[AIO_FILES];
    uint32_t nfiles;
    uint32_t njobs;    /* sources with jobs */
    bool special;      /* there is one with anything */
    uint64_t end_ns;   /* aio_hasten()'s: nothing is waited for longer; 0: the engine does not end */
    aio_op *withheld;  /* done, and not due yet; in no order */
    uint64_t next_ns;  /* nothing is due, nor too late, before that; 0: nothing will be */
    bool uring;
    /* io_uring */
    uint8_t *fixed; /* memory that is registered, or NULL */
    uint64_t fixed_length;
    bool waits_for_futex; /* the kernel has the operation for it */
    bool armed;           /* it is under way */
#ifndef MUENFAST_NO_URING
    struct io_uring ring;
#endif
    /* The pool; under lock, but for `finished`. */
    pthread_mutex_t lock;
    pthread_cond_t work;
    pthread_t threads[AIO_POOL];
    uint32_t nthreads, idle; /* idle: all that execute nothing, be they woken or new and yet to look at `todo` */
    uint32_t working[AIO_FILES]; /* threads at work for each file */
    aio_op *todo, **todo_last;
    uint32_t ntodo;
    aio_op *ready, **ready_last;
    bool ending;
    uint32_t finished; /* futex: goes up with each that is ready */
    uint32_t waiting;  /* whether somebody may sleep there: asked by workers of user-space stores */
    uint32_t collected; /* what it was when those were taken */
} aio;

static inline void aio_append(aio_op ***last, aio_op *op) {
    op->next = NULL;
    **last = op;
    *last = &op->next;
}

/* The negative errno of an operation that failed with that one. Memory that its owner took away (EFAULT) is no fault of the
 * file. A file that was cut short within a sector has no place from which direct I/O could go on (EINVAL). */
static inline int aio_error(const aio_op *op, int number) {
    return number == EFAULT || (number == EINVAL && op->moved != 0) ? -EIO : -number;
}

/* ---- one operation, synchronously */

static inline int aio_execute(const aio *a, aio_op *op) {
    int fd = a->fds[op->file];
    ssize_t n;
    for (;;) {
        if (op->kind == AIO_SYNC)
            n = fdatasync(fd);
        else if (op->kind == AIO_DISCARD && a->devices[op->file]) {
            uint64_t range[2] = {op->start, op->length};
            n = ioctl(fd, AIO_DISCARD_DEVICE, range);
        } else if (op->kind == AIO_DISCARD)
            n = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)op->start, (off_t)op->length);
        else if (op->kind == AIO_WRITE)
            n = pwrite(fd, op->data + op->moved, op->length - op->moved, (off_t)(op->start + op->moved));
        else
            n = pread(fd, op->data + op->moved, op->length - op->moved, (off_t)(op->start + op->moved));
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return aio_error(op, errno);
        }
        if (op->kind != AIO_READ && op->kind != AIO_WRITE)
            return 0;
        if (n == 0)
            return -EIO; /* cut short behind our back */
        op->moved += (uint64_t)n;
        if (op->moved == op->length)
            return 0;
    }
}

/* ---- the pool */

/* Takes the oldest operation that is to be begun, or NULL; a file that keeps its share of the threads waiting is passed over.
 * Precondition: lock held. */
static inline aio_op *aio_next(aio *a) {
    aio_op **link = &a->todo, *op;
    while ((op = *link) != NULL && a->working[op->file] == AIO_THREADS)
        link = &op->next;
    if (op == NULL)
        return NULL;
    *link = op->next;
    if (op->next == NULL)
        a->todo_last = link;
    a->ntodo--;
    a->working[op->file]++;
    return op;
}

static void *aio_work(void *argument) {
    aio *a = (aio *)argument;
    aio_op *op;
    pthread_mutex_lock(&a->lock);
    for (;;) {
        while ((op = aio_next(a)) == NULL && !a->ending)
            pthread_cond_wait(&a->work, &a->lock);
        if (op == NULL)
            break;
        a->idle--;
        pthread_mutex_unlock(&a->lock);
        op->error = aio_execute(a, op);
        pthread_mutex_lock(&a->lock);
        a->idle++;
        a->working[op->file]--;
        aio_append(&a->ready_last, op);
        fetch_add_acqrel32(&a->finished, 1);
        futex_wake_all(&a->finished);
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

/* One thread more, which takes no signals; whether there is one. Precondition: lock held. */
static inline bool aio_grow(aio *a) {
    sigset_t all, before;
    int status;
    if (a->nthreads == AIO_POOL || a->nthreads == AIO_THREADS * a->nfiles)
        return false;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    status = pthread_create(&a->threads[a->nthreads], NULL, aio_work, a);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status == 0) {
        a->nthreads++;
        a->idle++;
    }
    return status == 0;
}

static inline void aio_hand_out(aio *a) {
    aio_op *op;
    pthread_mutex_lock(&a->lock);
    for (op = a->held; op != NULL; op = op->next)
        a->ntodo++;
    *a->todo_last = a->held;
    if (a->held != NULL)
        a->todo_last = a->held_last;
    a->held = NULL;
    a->held_last = &a->held;
    while (a->ntodo > a->idle && aio_grow(a))
        ;
    if (a->nthreads != 0)
        pthread_cond_broadcast(&a->work);
    else /* no thread is to be had: one by one, then */
        while ((op = a->todo) != NULL) {
            a->todo = op->next;
            a->ntodo--;
            op->error = aio_execute(a, op);
            aio_append(&a->ready_last, op);
        }
    if (a->todo == NULL)
        a->todo_last = &a->todo;
    pthread_mutex_unlock(&a->lock);
}

static inline void aio_collect_jobs(aio *a) {
    uint32_t k;
    job *j, *next;
    for (k = 0; k < a->nfiles; k++) {
        if (a->sources[k].jobs == NULL)
            continue;
        for (j = jobs_collect(a->sources[k].jobs); j != NULL; j = next) {
            aio_op *op = (aio_op *)j->reader;
            next = j->next;
            op->error = j->error;
            aio_append(&a->done_last, op);
        }
    }
}

static inline void aio_collect(aio *a) {
    pthread_mutex_lock(&a->lock);
    a->collected = load_acquire32(&a->finished); /* workers of user-space stores have locks of their own */
    if (a->ready != NULL) {
        *a->done_last = a->ready;
        a->done_last = a->ready_last;
        a->ready = NULL;
        a->ready_last = &a->ready;
    }
    pthread_mutex_unlock(&a->lock);
    if (a->njobs != 0)
        aio_collect_jobs(a);
}

/* ---- io_uring */

#ifndef MUENFAST_NO_URING
static inline bool aio_prepare(aio *a, aio_op *op) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&a->ring);
    uint8_t *data = op->data + op->moved;
    uint64_t length = op->length - op->moved, at = op->start + op->moved;
    bool fixed = a->fixed != NULL && data >= a->fixed && data < a->fixed + a->fixed_length;
    int fd = a->fds[op->file];
    if (sqe == NULL)
        return false;
    if (length > 1 << 30)
        length = 1 << 30; /* an operation counts in 32 bits; the rest follows */
    if (op->kind == AIO_SYNC)
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    else if (op->kind == AIO_DISCARD && a->devices[op->file]) { /* fallocate would write zeros: not what was asked for */
        io_uring_prep_rw(URING_OP_COMMAND, sqe, fd, NULL, 0, 0);
        sqe->cmd_op = AIO_COMMAND_DISCARD;
        sqe->addr = op->start;
        sqe->addr3 = op->length;
    } else if (op->kind == AIO_DISCARD)
        io_uring_prep_fallocate(sqe, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)op->start,
                                (off_t)op->length);
    else if (op->kind == AIO_WRITE && fixed)
        io_uring_prep_write_fixed(sqe, fd, data, (unsigned)length, at, 0);
    else if (op->kind == AIO_WRITE)
        io_uring_prep_write(sqe, fd, data, (unsigned)length, at);
    else if (fixed)
        io_uring_prep_read_fixed(sqe, fd, data, (unsigned)length, at, 0);
    else
        io_uring_prep_read(sqe, fd, data, (unsigned)length, at);
    io_uring_sqe_set_data(sqe, op);
    return true;
}

/* A completion's result; whether the operation is done. */
static inline bool aio_completed(const aio *a, aio_op *op, int32_t result) {
    if (result == -EINTR || result == -EAGAIN)
        return false;
    if (op->kind == AIO_DISCARD && a->devices[op->file] && (result == -EOPNOTSUPP || result == -EINVAL)) {
        op->error = aio_execute(a, op); /* a kernel without that command, or a disk that cannot: as the ioctl says */
        return true;
    }
    if (result < 0) {
        op->error = aio_error(op, -result);
        return true;
    }
    if (op->kind != AIO_READ && op->kind != AIO_WRITE)
        return true;
    if (result == 0) {
        op->error = -EIO; /* cut short behind our back */
        return true;
    }
    op->moved += (uint32_t)result;
    return op->moved >= op->length;
}

static inline void aio_reap(aio *a) {
    struct io_uring_cqe *cqe;
    aio_op *op;
    while (io_uring_peek_cqe(&a->ring, &cqe) == 0) {
        op = (aio_op *)io_uring_cqe_get_data(cqe);
        if (op == NULL)
            a->armed = false; /* the bell */
        else if (aio_completed(a, op, cqe->res))
            aio_append(&a->done_last, op);
        else
            aio_append(&a->held_last, op);
        io_uring_cqe_seen(&a->ring, cqe);
    }
}

/* Asks for a completion when the word is no longer `seen`, or is woken. One that is under way will do: who changes the
 * word wakes those who wait. */
static inline void aio_arm(aio *a, const uint32_t *word, uint32_t seen) {
    struct io_uring_sqe *sqe = a->armed ? NULL : io_uring_get_sqe(&a->ring);
    if (sqe == NULL)
        return;
    uring_prep_futex_wait(sqe, word, seen);
    io_uring_sqe_set_data(sqe, NULL);
    a->armed = true;
}
#endif

/* ---- what is no plain file, and what a user wants to go wrong */

static inline void aio_due(aio *a, uint64_t when) {
    if (a->next_ns == 0 || when < a->next_ns)
        a->next_ns = when;
}

/* A time that is not beyond the engine's end. */
static inline uint64_t aio_bounded(const aio *a, uint64_t when) {
    return a->end_ns != 0 && when > a->end_ns ? a->end_ns : when;
}

static inline void aio_ended(aio *a, aio_op *op, int error, bool final) {
    op->error = error;
    op->final = final;
    aio_append(&a->done_last, op);
}

/* Begins, or does, an operation on a source; false where it is the file's, as any other. */
static inline bool aio_divert(aio *a, aio_op *op) {
    const aio_source *s = &a->sources[op->file];
    bool changes = op->kind == AIO_WRITE || op->kind == AIO_DISCARD;
    if (s->faults != NULL) {
        fault_plan plan = faults_plan(s->faults, op->kind);
        uint64_t delay = plan.late ? s->faults->timeout_ns : plan.delay_ns;
        op->due = delay != 0 ? aio_bounded(a, now_ns() + delay) : 0;
        op->corrupt = plan.corrupt;
        if (plan.error != 0 || plan.late) {
            op->late = plan.error == 0;
            aio_ended(a, op, plan.error != 0 ? plan.error : -EIO, true);
            return true;
        }
    }
    if (s->execute != NULL) {
        aio_ended(a, op, s->execute(s->context, op), false);
        return true;
    }
    if (s->jobs == NULL)
        return false;
    if (s->jobs->free == NULL)
        aio_collect_jobs(a);
    op->work = jobs_put(s->jobs, op, op->kind, changes, op->start, op->length, op->kind == AIO_WRITE ? op->data : NULL);
    if (op->work == NULL)
        aio_ended(a, op, -EIO, true);
    else {
        op->work->deadline = aio_bounded(a, op->work->deadline);
        aio_due(a, op->work->deadline);
    }
    return true;
}

/* What is due by now is done, and what a user-space store answers too late is answered without it. */
static inline void aio_tick(aio *a) {
    uint64_t now = now_ns();
    aio_op **link = &a->withheld, *op;
    uint32_t k;
    if (a->next_ns == 0 || now < a->next_ns)
        return;
    a->next_ns = 0;
    while ((op = *link) != NULL) {
        if (op->due > now) {
            aio_due(a, op->due);
            link = &op->next;
            continue;
        }
        *link = op->next;
        aio_append(&a->done_last, op);
    }
    if (a->njobs == 0)
        return;
    for (k = 0; k < a->nflying; k++) {
        op = a->flying[k];
        if (op->work == NULL)
            continue;
        if (op->work->deadline > now)
            aio_due(a, op->work->deadline);
        else if (jobs_forget(a->sources[op->file].jobs, op->work, true)) {
            op->work = NULL;
            op->late = true;
            aio_ended(a, op, -EIO, true);
        }
    }
}

/* The end of an operation that was on a source: its data is where it belongs, unless the end is not due yet: false. */
static inline bool aio_settle(aio *a, aio_op *op) {
    job *j = op->work;
    if (j != NULL) {
        op->work = NULL;
        if (op->kind == AIO_READ && op->error == 0)
            memcpy(op->data, j->stage, op->length);
        jobs_free(a->sources[op->file].jobs, j);
    }
    if (op->due != 0 && op->due > now_ns()) {
        op->next = a->withheld;
        a->withheld = op;
        aio_due(a, op->due);
        return false;
    }
    if (op->corrupt && op->kind == AIO_READ && op->error == 0) {
        uint64_t bit = faults_random(a->sources[op->file].faults) % (op->length * 8);
        op->data[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    return true;
}

/* ---- what the engine calls */

/* threads: do without io_uring, which a kernel may refuse, too, and which a source with jobs cannot wake. fixed: memory
 * that most operations are about, this process's own (of shared memory that another one truncates, operations would go on
 * with the pages that it had), or NULL. */
static inline void aio_open(aio *a, bool threads, uint8_t *fixed, uint64_t length) {
    memset(a, 0, sizeof *a);
    a->process = getpid();
    a->done_last = &a->done;
    a->held_last = &a->held;
    a->todo_last = &a->todo;
    a->ready_last = &a->ready;
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->work, NULL);
#ifndef MUENFAST_NO_URING
    if (!threads && io_uring_queue_init(AIO_MOST, &a->ring, 0) == 0) {
        struct io_uring_probe *probe = io_uring_get_probe_ring(&a->ring);
        struct iovec all = {fixed, length};
        a->uring = true;
        if (probe != NULL) {
            a->waits_for_futex = io_uring_opcode_supported(probe, URING_OP_FUTEX_WAIT);
            a->uring = io_uring_opcode_supported(probe, IORING_OP_READ) &&
                       io_uring_opcode_supported(probe, IORING_OP_FALLOCATE);
            io_uring_free_probe(probe);
        } else
            a->uring = false; /* before Linux 5.6 */
        if (!a->uring)
            io_uring_queue_exit(&a->ring);
        /* Without it (RLIMIT_MEMLOCK, more than 1 GiB) pages are pinned for each operation. */
        else if (fixed != NULL && io_uring_register_buffers(&a->ring, &all, 1) == 0) {
            a->fixed = fixed;
            a->fixed_length = length;
        }
    }
#else
    (void)threads;
    (void)fixed;
    (void)length;
#endif
}

/* Number of a file for aio_op.file, or a negative errno. The descriptor stays the caller's; of a source that executes or has
 * jobs there is none. */
static inline int aio_add(aio *a, int fd, bool device, aio_source source) {
    if (a->nfiles == AIO_FILES)
        return -EMFILE;
    a->fds[a->nfiles] = fd;
    a->devices[a->nfiles] = device;
    a->sources[a->nfiles] = source;
    a->special = a->special || source.execute != NULL || source.jobs != NULL || source.faults != NULL;
    if (source.jobs != NULL) {
        jobs_attach(source.jobs, &a->finished, &a->waiting);
        a->njobs++;
    }
#ifndef MUENFAST_NO_URING
    if (a->uring && a->nfiles == 1) {
        /* One file that hangs leaves the other's fdatasync a worker of the kernel's, which has four per CPU else; a kernel
         * before 5.15 knows no other number. */
        unsigned most[2] = {AIO_MOST, 0};
        io_uring_register_iowq_max_workers(&a->ring, most);
    }
#endif
    return (int)a->nfiles++;
}

/* Whether the operation has to wait for one that is under way: bytes of the file that both are about, or of the memory,
 * and one of them changes them. A sync waits for everything but syncs. */
static inline bool aio_conflicts(const aio *a, uint32_t file, int kind, uint64_t start, uint64_t length,
                                 const uint8_t *data) {
    uint32_t k;
    for (k = 0; k < a->nflying; k++) {
        const aio_op *op = a->flying[k];
        if (op->kind == AIO_SYNC)
            continue;
        if (op->file == file && (kind != AIO_READ || op->kind != AIO_READ) &&
            (kind == AIO_SYNC || (op->start < start + length && start < op->start + op->length)))
            return true;
        if (data != NULL && op->data != NULL && (kind == AIO_READ || op->kind == AIO_READ) &&
            op->data < data + length && data < op->data + op->length)
            return true;
    }
    return false;
}

/* Takes an operation over; begun by aio_begin(). Precondition: nflying < AIO_MOST. */
static inline void aio_submit(aio *a, aio_op *op) {
    op->moved = 0;
    op->error = 0;
    op->due = 0;
    op->work = NULL;
    op->final = op->late = op->corrupt = false;
    op->place = a->nflying;
    a->flying[a->nflying++] = op;
    if (a->special && aio_divert(a, op))
        return;
    aio_append(&a->held_last, op);
}

/* Begins all that was submitted. */
static inline void aio_begin(aio *a) {
    aio_op *op;
    if (a->held == NULL)
        return;
    if (!a->uring) {
        aio_hand_out(a);
        return;
    }
#ifndef MUENFAST_NO_URING
    while ((op = a->held) != NULL && aio_prepare(a, op)) { /* a full queue: after those in it */
        a->held = op->next;
        if (io_uring_sq_ready(&a->ring) >= AIO_SUBMIT)
            io_uring_submit(&a->ring);
    }
    if (a->held == NULL)
        a->held_last = &a->held;
    io_uring_submit(&a->ring); /* what it does not take stays in the queue: the next call, or the next wait */
#else
    (void)op;
#endif
}

/* One that is done, or NULL. */
static inline aio_op *aio_take(aio *a) {
    aio_op *op;
    if (a->nflying == 0)
        return NULL;
    if (a->next_ns != 0)
        aio_tick(a);
    do {
        if (a->done == NULL) {
            if (!a->uring)
                aio_collect(a);
#ifndef MUENFAST_NO_URING
            else
                aio_reap(a);
#endif
        }
        op = a->done;
        if (op == NULL)
            return NULL;
        a->done = op->next;
        if (a->done == NULL)
            a->done_last = &a->done;
    } while (a->special && !aio_settle(a, op));
    a->nflying--;
    a->flying[op->place] = a->flying[a->nflying];
    a->flying[op->place]->place = op->place;
    return op;
}

/* Whether there may be something for aio_take(). */
static inline bool aio_ready(const aio *a) {
    if (a->done != NULL || (a->next_ns != 0 && now_ns() >= a->next_ns))
        return true;
#ifndef MUENFAST_NO_URING
    if (a->uring)
        return io_uring_cq_ready(&a->ring) != 0;
#endif
    return load_acquire32(&a->finished) != a->collected;
}

static inline void aio_sleep(aio *a, uint32_t *word, uint32_t seen, uint64_t ns) {
    uint32_t finished = load_acquire32(&a->finished);
    aio_collect(a);
    if (a->done != NULL)
        return;
    if (word != NULL) {
        futex_entry both[2] = {futex_entry_of(&a->finished, finished), futex_entry_of(word, seen)};
        int woken = futex_wait_any_ns(both, 2, ns);
        if (woken != -ENOSYS && woken != -EPERM && woken != -EFAULT)
            return;
        ns = ns < AIO_LOOK_NS ? ns : AIO_LOOK_NS;
    }
    futex_wait_ns(&a->finished, finished, ns);
}

/* Waits until something is done, or the word is no longer `seen` (NULL: no word), at most ns nanoseconds. */
static inline void aio_wait(aio *a, uint32_t *word, uint32_t seen, uint64_t ns) {
    if (a->next_ns != 0) {
        uint64_t now = now_ns(), left = a->next_ns > now ? a->next_ns - now : 0;
        if (left == 0)
            return;
        ns = ns < left ? ns : left;
    }
    if (!a->uring) {
        store_relaxed32(&a->waiting, 1);
        fence_seq_cst(); /* pairs with jobs_done(): the announcement before the last look */
        aio_sleep(a, word, seen, ns);
        store_relaxed32(&a->waiting, 0);
        return;
    }
#ifndef MUENFAST_NO_URING
    struct io_uring_cqe *cqe;
    struct __kernel_timespec limit;
    aio_begin(a);
    if (a->done != NULL)
        return;
    if (word != NULL && a->waits_for_futex)
        aio_arm(a, word, seen);
    else if (word != NULL && ns > AIO_LOOK_NS)
        ns = AIO_LOOK_NS;
    limit.tv_sec = (long long)(ns / 1000000000);
    limit.tv_nsec = (long long)(ns % 1000000000);
    io_uring_submit_and_wait_timeout(&a->ring, &cqe, 1, &limit, NULL);
#endif
}

/* The engine ends: what user-space stores have not answered in AIO_END_NS, and what is withheld longer, is not waited for. */
static inline void aio_hasten(aio *a) {
    aio_op *op;
    uint32_t k;
    if (!a->special || a->end_ns != 0)
        return;
    a->end_ns = now_ns() + AIO_END_NS;
    for (op = a->withheld; op != NULL; op = op->next)
        op->due = aio_bounded(a, op->due);
    for (k = 0; k < a->nflying; k++) {
        op = a->flying[k];
        op->due = aio_bounded(a, op->due);
        if (op->work != NULL)
            op->work->deadline = aio_bounded(a, op->work->deadline);
    }
    aio_due(a, a->end_ns);
}

/* Whether there is anything that is to be waited for. */
static inline bool aio_flies(const aio *a) {
    return a->nflying != 0 && a->process == getpid();
}

/* Precondition: not aio_flies(). In a child of fork() nothing happens. */
static inline void aio_close(aio *a) {
    uint32_t k;
    if (a->process != getpid())
        return;
    pthread_mutex_lock(&a->lock);
    a->ending = true;
    pthread_cond_broadcast(&a->work);
    pthread_mutex_unlock(&a->lock);
    for (k = 0; k < a->nthreads; k++)
        pthread_join(a->threads[k], NULL);
    for (k = 0; k < a->nfiles; k++)
        if (a->sources[k].jobs != NULL)
            jobs_detach(a->sources[k].jobs);
#ifndef MUENFAST_NO_URING
    if (a->uring)
        io_uring_queue_exit(&a->ring);
#endif
    pthread_cond_destroy(&a->work);
    pthread_mutex_destroy(&a->lock);
}

#endif
