"""One FUSE file that is a disk: libfuse3's low-level session in front of a block Target, without the GIL.

The mount has a root directory and one file, "disk", of nblocks * block_size bytes, opened with direct I/O;
a loop device on it makes the block device (attach/fuse.py). This module mounts by itself (mount(2),
no fusermount, no /etc/mtab) and hands the open /dev/fuse to libfuse.

Life of a request object: free list -> a receive thread (the kernel writes the request into its
buffer) -> the target, if there is something to do for it -> request_done() on any thread, which replies
and puts it back. It has one owner at a time; its buffer is never copied and never reused while the
target has it. Reads and writes are understood and answered here; the rest is libfuse's: what it finishes
inside process_buf (FORGET, GETATTR, ...) leaves the object with the receive thread.

One thread does everything where the kernel can wait for both sides at once (_pump.h): it takes what
requests there are, submits them together, takes the target's answers, and gives them to the kernel
together (docs/decisions/010). Elsewhere receive threads only receive.

Where the kernel offers FUSE over io_uring (docs/decisions/011), that thread takes requests and gives answers without a
system call for each. A request object then is an entry of the kernel's for good: it is received into by the kernel
(with as many as all CPUs may want at once), waits in the pump's `arrived` while the target has `depth` others, and goes
back by being committed, which only the pump does: what is answered on another thread is handed to it (`foreign`).

libfuse allocates its own small fuse_req for a request that it sees; nothing here allocates after construction.
"""
cimport cython
from cpython.exc cimport PyErr_SetFromErrno, PyErr_SetFromErrnoWithFilenameObject
from libc.errno cimport (
    EAGAIN, EFBIG, EINTR, EINVAL, EIO, ENOENT, ENOSYS, EOPNOTSUPP, ENOTCONN, EPERM, EPROTO, EROFS, errno,
)
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strcmp

import os

from muenfast._system cimport *
from muenfast._target cimport (
    COLLECT_OVER, COLLECT_SOME, IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE, IO_ZERO, Target, attendance_t, io_t, submit_fn,
)
from muenfast._thread cimport *
from muenfast._wire cimport (
    load_relaxed32, load_relaxed64, now_ns, online_cpus, spin_habit, spin_in_vain, spin_paid, spin_pays, store_relaxed64)

cdef extern from *:
    """
    #define FUSE_USE_VERSION 35
    #define _GNU_SOURCE 1
    #include <fcntl.h>
    #include <linux/fuse.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    #ifndef FOPEN_NOFLUSH                   /* uapi/linux/fuse.h, 7.35 */
    #define FOPEN_NOFLUSH (1 << 5)
    #endif
    #ifndef FOPEN_PARALLEL_DIRECT_WRITES    /* uapi/linux/fuse.h, 7.38 */
    #define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
    #endif
    #ifndef PR_SET_IO_FLUSHER               /* uapi/linux/prctl.h, Linux 5.6 */
    #define PR_SET_IO_FLUSHER 57
    #endif

    #include <fuse_lowlevel.h>
    #if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 14)
    typedef struct fuse_custom_io custom_io_t;
    static inline int session_over(struct fuse_session *se, const custom_io_t *io, int fd)
    {
        return fuse_session_custom_io(se, io, fd);
    }
    enum { CUSTOM_IO = 1 };
    #else
    typedef struct { ssize_t (*writev)(int, struct iovec *, int, void *); ssize_t (*read)(int, void *, size_t, void *); }
        custom_io_t;
    static inline int session_over(struct fuse_session *se, const custom_io_t *io, int fd)
    {
        (void)se, (void)io, (void)fd;
        return -ENOSYS;
    }
    enum { CUSTOM_IO = 0 };
    #endif

    /* Has the kernel ask for a file's attributes again; 0 or -1 with errno. Waits for nobody. */
    static int forget_attributes(int fd, uint64_t ino)
    {
        struct {
            struct fuse_out_header header;
            struct fuse_notify_inval_inode_out inode;
        } notice = {{sizeof(notice), FUSE_NOTIFY_INVAL_INODE, 0}, {ino, -1, 0}};   /* off -1: no page of it */
        return write(fd, &notice, sizeof(notice)) == (ssize_t)sizeof(notice) ? 0 : -1;
    }

    /* What the kernel puts before the payload of a FUSE_WRITE. */
    enum { WRITE_HEADER = sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in) };

    /* The request object this thread is receiving into; a callback that submits it sets NULL. */
    static __thread void *current_request;

    /* The disk whose pump this thread is. */
    static __thread void *pumping;

    static int fusectl_open(void)
    {
        /* A detached mount: no directory, no namespace, gone when the last descriptor in it is closed. */
        /* uapi/linux/mount.h, not included here: it and sys/mount.h exclude each other in some libcs */
        enum { OPEN_CLOEXEC = 1, CMD_CREATE = 6, MOUNT_CLOEXEC = 1 };
        int fd, fs = (int)syscall(SYS_fsopen, "fusectl", OPEN_CLOEXEC);
        if (fs < 0)
            return -1;
        fd = (int)syscall(SYS_fsconfig, fs, CMD_CREATE, NULL, NULL, 0);
        if (fd == 0)
            fd = (int)syscall(SYS_fsmount, fs, MOUNT_CLOEXEC, 0);
        close(fs);
        return fd;
    }

    /* The device number of a mount's root, without asking the file system (it may not answer yet). */
    static int root_device(const char *path, unsigned *major, unsigned *minor)
    {
        struct statx st;
        if (statx(AT_FDCWD, path, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, 0, &st))
            return -1;
        *major = st.stx_dev_major;
        *minor = st.stx_dev_minor;
        return 0;
    }
    """
    enum: CUSTOM_IO     # libfuse lets us carry what it says
    ctypedef struct custom_io_t:
        ssize_t (*writev)(int fd, iovec_t *parts, int n, void *userdata) noexcept nogil
        ssize_t (*read)(int fd, void *buf, size_t n, void *userdata) noexcept nogil
    int session_over(fuse_session *se, const custom_io_t *io, int fd)
    int forget_attributes(int fd, uint64_t ino)
    enum: WRITE_HEADER
    enum: FUSE_SET_ATTR_SIZE
    enum: FOPEN_DIRECT_IO
    enum: FOPEN_NOFLUSH
    enum: FOPEN_PARALLEL_DIRECT_WRITES
    enum: PR_SET_IO_FLUSHER
    enum: FUSE_READ
    enum: FUSE_WRITE
    enum: FUSE_INTERRUPT
    struct fuse_open_out:
        uint32_t open_flags
    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
    struct fuse_read_in:
        uint64_t offset
        uint32_t size
    struct fuse_write_in:
        uint64_t offset
        uint32_t size
    struct fuse_write_out:
        uint32_t size
    struct fuse_out_header:
        uint32_t len
        int error
        uint64_t unique
    void *current_request
    void *pumping
    int fusectl_open()
    int root_device(const char *path, unsigned *major, unsigned *minor) nogil

cdef extern from "<fuse_lowlevel.h>" nogil:
    ctypedef unsigned long fuse_ino_t
    ctypedef long off_t
    struct fuse_req
    ctypedef fuse_req *fuse_req_t
    struct fuse_session
    struct fuse_args:
        int argc
        char **argv
        int allocated
    struct fuse_buf:
        size_t size
        void *mem
    struct timespec:
        long tv_sec
        long tv_nsec
    struct stat_t "stat":
        fuse_ino_t st_ino
        unsigned st_mode
        unsigned st_nlink
        unsigned st_uid
        unsigned st_gid
        long st_size
        long st_blksize
        long st_blocks
    struct statvfs_t "statvfs":
        unsigned long f_bsize
        unsigned long f_frsize
        unsigned long f_blocks
        unsigned long f_files
        unsigned long f_namemax
    struct fuse_file_info:
        int flags
    struct fuse_entry_param:
        fuse_ino_t ino
        stat_t attr
        double attr_timeout
        double entry_timeout
    struct fuse_conn_info:
        unsigned max_write
        unsigned max_read
        unsigned want
        unsigned capable
        unsigned max_background
        unsigned congestion_threshold
    enum: FUSE_ROOT_ID
    enum: FUSE_CAP_ASYNC_DIO
    enum: FUSE_CAP_PARALLEL_DIROPS
    enum: FUSE_CAP_SPLICE_READ
    enum: FUSE_CAP_SPLICE_WRITE
    enum: FUSE_CAP_SPLICE_MOVE
    enum: FUSE_CAP_WRITEBACK_CACHE
    enum: S_IFDIR
    enum: S_IFREG
    struct fuse_lowlevel_ops:
        void (*init)(void *userdata, fuse_conn_info *conn) noexcept nogil
        void (*lookup)(fuse_req_t req, fuse_ino_t parent, const char *name) noexcept nogil
        void (*getattr)(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi) noexcept nogil
        void (*setattr)(fuse_req_t req, fuse_ino_t ino, stat_t *attr, int to_set, fuse_file_info *fi) noexcept nogil
        void (*open)(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi) noexcept nogil
        void (*flush)(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi) noexcept nogil
        void (*release)(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi) noexcept nogil
        void (*fsync)(fuse_req_t req, fuse_ino_t ino, int datasync, fuse_file_info *fi) noexcept nogil
        void (*readdir)(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, fuse_file_info *fi) noexcept nogil
        void (*statfs)(fuse_req_t req, fuse_ino_t ino) noexcept nogil
        void (*fallocate)(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
                          fuse_file_info *fi) noexcept nogil
    void fuse_opt_free_args(fuse_args *args)
    fuse_session *fuse_session_new(fuse_args *args, const fuse_lowlevel_ops *op, size_t op_size, void *userdata)
    int fuse_session_mount(fuse_session *se, const char *mountpoint)
    void fuse_session_destroy(fuse_session *se)
    void fuse_session_exit(fuse_session *se)
    int fuse_session_exited(fuse_session *se)
    int fuse_session_receive_buf(fuse_session *se, fuse_buf *buf)
    void fuse_session_process_buf(fuse_session *se, const fuse_buf *buf)
    void *fuse_req_userdata(fuse_req_t req)
    int fuse_reply_err(fuse_req_t req, int err)
    void fuse_reply_none(fuse_req_t req)
    int fuse_reply_entry(fuse_req_t req, const fuse_entry_param *e)
    int fuse_reply_attr(fuse_req_t req, const stat_t *attr, double attr_timeout)
    int fuse_reply_buf(fuse_req_t req, const char *buf, size_t size)
    int fuse_reply_statfs(fuse_req_t req, const statvfs_t *stbuf)
    size_t fuse_add_direntry(fuse_req_t req, char *buf, size_t bufsize, const char *name, const stat_t *stbuf,
                             off_t off)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_condattr_init(pthread_condattr_t *attr)
    int pthread_condattr_setclock(pthread_condattr_t *attr, int clock)
    int pthread_condattr_destroy(pthread_condattr_t *attr)
    int pthread_cond_init(pthread_cond_t *c, pthread_condattr_t *attr)
    int pthread_cond_destroy(pthread_cond_t *c)
    int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
    int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const timespec *until)
    int pthread_cond_broadcast(pthread_cond_t *c)

cdef extern from "<time.h>" nogil:
    enum: CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *t)

cdef extern from "<sys/mount.h>" nogil:
    enum: MS_RDONLY
    enum: MS_NOSUID
    enum: MS_NODEV
    enum: MS_NOEXEC
    enum: MNT_FORCE
    enum: MNT_DETACH
    int c_mount "mount"(const char *source, const char *target, const char *kind, unsigned long flags, const void *data)
    int umount2(const char *target, int flags)

cdef extern from "<errno.h>" nogil:
    enum: ECANCELED
    enum: ECONNABORTED

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "_pump.h" nogil:
    enum: PUMP_WRITES
    ctypedef struct pump_t "pump":
        bint watches
        bint awaits
    int pump_open(pump_t *p, unsigned entries)
    int pump_start(pump_t *p)
    void pump_close(pump_t *p)
    void pump_write(pump_t *p, int fd, const iovec_t *iov, unsigned n)
    uint32_t pump_flush(pump_t *p)
    void pump_forget(pump_t *p)
    void pump_sleep(pump_t *p, int fd, uint32_t *word, uint32_t seen, uint64_t ns)
    void pump_watch(pump_t *p, int fd)
    void pump_await(pump_t *p, int event)
    void pump_register(pump_t *p, int fd, const iovec_t *parts, unsigned queue, unsigned entry)
    void pump_commit(pump_t *p, int fd, uint64_t commit_id, unsigned queue, unsigned entry)
    bint pump_next(pump_t *p, unsigned *entry, int *result)

cdef extern from "_fuse_uring.h" nogil:
    enum: FUSE_URING_FIRST
    ctypedef struct fuse_uring_header:
        fuse_in_header in_ "in"
        fuse_out_header out
        char *first
        uint64_t commit_id
        uint32_t payload
    bint fuse_uring_offered(const void *request, size_t n)
    int fuse_uring_accept(void *answer, size_t n)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)

cdef extern from "<fcntl.h>" nogil:
    enum: O_ACCMODE
    enum: O_RDONLY
    enum: O_NONBLOCK
    enum: F_GETFL
    enum: F_SETFL
    int fcntl(int fd, int command, ...)

globals()["Target"] = Target    # for callers, which take the type from here: a cimport alone is no attribute


cdef extern from "<linux/falloc.h>" nogil:
    enum: FALLOC_FL_KEEP_SIZE
    enum: FALLOC_FL_PUNCH_HOLE
    enum: FALLOC_FL_ZERO_RANGE


cdef enum:
    BLOCK = 4096                # unit of buffers and of max_io; blocks have this many bytes or 512
    # max_write of the session. libfuse derives max_pages from it (256, the kernel's default limit), so that
    # the kernel never has to cut one of our at most 128 KiB requests, however scattered its pages, at a
    # place that is no block boundary. The bytes per request are bounded elsewhere: max_read, and the loop
    # device's max_sectors_kb.
    FUSE_MAX_WRITE = 256 * 4096
    FUSE_HEADER = 4096          # FUSE_BUFFER_HEADER_SIZE of libfuse's fuse_lowlevel.c
    STRIDE = BLOCK + FUSE_MAX_WRITE + FUSE_HEADER
    INO_DISK = 2
    MOST_ENTRIES = 1024         # of all CPUs together ...
    LEAST_SHARE = 16            # ... but so many for each
    MOST_BLOCKS = 0xffffffff    # of one io_t

cdef double FOREVER = 86400.0   # seconds the kernel may cache names and attributes: they never change


# A pump spins this long for the next request or answer, where that pays: as a reader of a ring does (_ring.pyx).
cdef uint64_t SPIN_NS = 50_000
# Answers go to the kernel together: once as many are there as are still out, or the first of them has waited so long. Each
# batch wakes a softirq thread, the load and the loop device's workers (docs/decisions/011).
cdef uint64_t GATHER_NS = 20_000
# It sleeps at most this long while it takes the target's answers, and stops taking them when nothing came for so long:
# the target's own thread waits at less cost.
cdef uint64_t ATTEND_NS = 100_000_000
cdef uint64_t IDLE_NS = 1_000_000_000
cdef uint64_t FOREVER_NS = 3600_000_000_000


cdef struct request_t:
    disk_t *disk
    int queue                   # of the kernel's whose entry it is for good (FUSE over io_uring), or -1
    fuse_uring_header *entry    # that entry's header
    fuse_req_t req              # libfuse's, or NULL: a read or write, and `unique` is whose answer it is
    uint64_t unique
    uint64_t covers             # of a flush: `changes` when it was submitted
    fuse_buf buf                # buf.mem: WRITE_HEADER bytes before a page, so that payloads are aligned
    io_t io
    fuse_out_header header      # of the answer to a read or write ...
    fuse_write_out written
    iovec_t parts[2]              # ... and what it consists of
    request_t *next             # in the free list, or in a list of what is done


cdef struct disk_t:
    submit_fn submit
    const attendance_t *attendance
    void *ctx
    uint64_t size               # bytes; atomic: resized()
    uint32_t block              # bytes of a block
    bint read_only
    bint discards               # the target takes IO_DISCARD and IO_ZERO ...
    bint zeroes                 # ... and what was discarded reads as zeros
    unsigned depth
    unsigned max_io
    bint plain                  # receive threads only receive, wherever we are
    bint pumped                 # a thread is the pump, or tried to be ...
    bint pumps                  # ... and could
    pump_t *ring                # FUSE over io_uring: the pump, from construction on; else NULL
    unsigned queues             # of the ring: CPUs the system may have ...
    unsigned share              # ... and entries of each
    fuse_uring_header *headers  # of the entries
    int wake                    # eventfd: the pump has to look at `foreign`
    int fuse_fd                 # libfuse's after construction
    fuse_session *session
    request_t *requests
    uint8_t *arena
    # all below: under lock
    pthread_mutex_t lock
    pthread_cond_t changed      # a request came back while somebody waits; a run() ended; stop was set
    request_t *free
    unsigned in_flight          # objects the target has
    unsigned runners
    unsigned waiters
    bint stop
    bint got_init
    bint attaching
    uint64_t reads
    uint64_t writes
    uint64_t syncs
    uint64_t discards_done
    uint64_t bytes
    uint64_t errors
    uint64_t waits
    request_t *done             # the pump's own: answered by the target and not by it ...
    unsigned n_done             # ... and how many
    request_t *arrived          # the pump's own: entries with requests that nobody has looked at, oldest first
    request_t *last_arrived
    request_t *foreign          # entries that the target answered on other threads, for the pump
    bint ring_over              # the pump has ended: nobody answers any more
    bint accepting              # construction: the kernel's INIT offered FUSE over io_uring, and is to be told yes
    size_t arena_size
    uint64_t unsent             # replies the kernel refused: the request was aborted meanwhile
    uint64_t changes            # writes, discards and zeros answered, well or not ...
    uint64_t flushed            # ... and how many of them the last good flush covers
    uint64_t changing           # writes, discards and zeros the target has, not yet counted in `changes`
    uint64_t *watched           # first block and end of each range, sorted and apart
    unsigned n_watched
    int event                   # eventfd, readable once a watched block was written


cdef bint is_watched(const disk_t *d, uint64_t block, uint64_t end) noexcept nogil:
    """Whether blocks up to `end` touch a watched range. Precondition: d.lock is held."""
    cdef unsigned low = 0, high = d.n_watched, middle
    while low < high:                   # the first range that ends after `block`
        middle = (low + high) // 2
        if d.watched[2 * middle + 1] > block:
            high = middle
        else:
            low = middle + 1
    return low < d.n_watched and d.watched[2 * low] < end


cdef request_t *take(disk_t *d) noexcept nogil:
    """An object for the calling receive thread; waits while the target has all; NULL once stopped."""
    cdef request_t *r = NULL
    pthread_mutex_lock(&d.lock)
    if d.free == NULL and not d.stop:
        d.waits += 1
        d.waiters += 1
        while d.free == NULL and not d.stop:
            pthread_cond_wait(&d.changed, &d.lock)
        d.waiters -= 1
    if not d.stop:
        r = d.free
        d.free = r.next
    pthread_mutex_unlock(&d.lock)
    return r


cdef void count(disk_t *d, const io_t *io) noexcept nogil:
    """Precondition: d.lock is held."""
    cdef uint64_t one = 1
    if io.kind == IO_READ:
        d.reads += 1
    elif io.kind == IO_WRITE:
        d.writes += 1
    elif io.kind == IO_SYNC:
        d.syncs += 1
    else:
        d.discards_done += 1
    if io.kind == IO_SYNC:
        if io.error == 0:
            d.flushed = max(d.flushed, (<const request_t *>io.user).covers)
    elif io.kind != IO_READ:
        d.changes += 1
        d.changing -= 1
    if io.error != 0:
        d.errors += 1
    elif io.kind == IO_READ or io.kind == IO_WRITE:
        d.bytes += <uint64_t>io.nblocks * d.block
    # A write that failed may have changed something all the same.
    if d.n_watched != 0 and io.kind != IO_READ and io.kind != IO_SYNC and is_watched(d, io.block, io.block + io.nblocks):
        c_write(d.event, &one, sizeof(one))


cdef inline uint8_t *payload(request_t *r) noexcept nogil:
    """Where the data of a request are, and those of its answer: a page's begin."""
    return <uint8_t *>r.buf.mem + WRITE_HEADER


cdef int compose(request_t *r, int error, size_t size) noexcept nogil:
    """The answer to a read or write of size bytes, in r.parts; how many of those. error: 0 or a negative errno."""
    cdef int n = 1
    r.header.unique = r.unique
    r.header.error = error
    r.header.len = sizeof(fuse_out_header)
    r.parts[0].iov_base = &r.header
    r.parts[0].iov_len = sizeof(fuse_out_header)
    if error == 0:
        n = 2
        if r.io.kind == IO_READ:
            r.parts[1].iov_base = r.io.buf
            r.parts[1].iov_len = size
        else:
            memset(&r.written, 0, sizeof(fuse_write_out))
            r.written.size = <uint32_t>size
            r.parts[1].iov_base = &r.written
            r.parts[1].iov_len = sizeof(fuse_write_out)
        r.header.len += <uint32_t>r.parts[1].iov_len
    return n


cdef int answer(request_t *r) noexcept nogil:
    """Composes the answer to a read or write that is done, as compose()."""
    cdef int error = r.io.error
    return compose(r, -EIO if error > 0 else error, <size_t>r.io.nblocks * r.disk.block)


cdef void commit(disk_t *d, request_t *r, int error, size_t size) noexcept nogil:
    """Answers an entry's request, whose answer of `size` bytes is its payload. Precondition: this thread is the pump."""
    r.entry.out.unique = r.unique
    r.entry.out.error = error
    r.entry.out.len = <uint32_t>(sizeof(fuse_out_header) + size)
    r.entry.payload = <uint32_t>size
    pump_commit(d.ring, d.fuse_fd, r.entry.commit_id, <unsigned>r.queue, <unsigned>(r - d.requests) - d.depth)


cdef void commit_move(disk_t *d, request_t *r, int error, size_t size) noexcept nogil:
    """As compose(), of an entry."""
    cdef fuse_write_out *written
    if error == 0 and r.io.kind == IO_WRITE:
        written = <fuse_write_out *>payload(r)
        memset(written, 0, sizeof(fuse_write_out))
        written.size = <uint32_t>size
        size = sizeof(fuse_write_out)
    commit(d, r, error, size if error == 0 else 0)


cdef void commit_done(request_t *r) noexcept nogil:
    """Answers an entry that the target is done with."""
    global current_request
    cdef int error = r.io.error
    if r.req != NULL:
        current_request = r
        fuse_reply_err(r.req, EIO if error > 0 else -error)     # by carry_out()
        current_request = NULL
    else:
        commit_move(r.disk, r, -EIO if error > 0 else error, <size_t>r.io.nblocks * r.disk.block)


cdef ssize_t carry_out(int fd, iovec_t *parts, int n, void *userdata) noexcept nogil:
    """What libfuse says to the kernel: INIT's answer, and those of entries (current_request) out of its own memory."""
    cdef disk_t *d = <disk_t *>userdata
    cdef request_t *r = <request_t *>current_request
    cdef const fuse_out_header *h = <const fuse_out_header *>parts[0].iov_base
    cdef size_t size = 0
    cdef int i
    if r == NULL or r.queue < 0:
        if d.accepting and n == 2 and h.error == 0:
            d.accepting = fuse_uring_accept(parts[1].iov_base, parts[1].iov_len) != 0
        return writev(fd, parts, n)
    for i in range(1, n):
        if parts[i].iov_len > FUSE_MAX_WRITE - size:
            commit(d, r, -EIO, 0)
            return sizeof(fuse_out_header)
        memcpy(payload(r) + size, parts[i].iov_base, parts[i].iov_len)
        size += parts[i].iov_len
    commit(d, r, h.error, size)
    return <ssize_t>(sizeof(fuse_out_header) + size)


cdef ssize_t carry_in(int fd, void *buf, size_t n, void *userdata) noexcept nogil:
    return c_read(fd, buf, n)


cdef custom_io_t CARRIER
memset(&CARRIER, 0, sizeof(CARRIER))
CARRIER.writev = carry_out
CARRIER.read = carry_in


cdef bint reply(request_t *r) noexcept nogil:
    """Answers what is done, of an object that is no entry; whether the kernel took it."""
    cdef int error = r.io.error
    if r.req != NULL:
        return fuse_reply_err(r.req, EIO if error > 0 else -error) == 0
    return writev(r.disk.fuse_fd, r.parts, answer(r)) >= 0


cdef void lose(disk_t *d, request_t *r) noexcept nogil:
    """An entry is answered when nobody listens any more. Precondition: d.lock is held."""
    count(d, &r.io)
    if r.req != NULL:
        fuse_reply_none(r.req)      # says nothing, frees it
    d.unsent += 1
    d.in_flight -= 1
    if d.waiters != 0:
        pthread_cond_broadcast(&d.changed)


cdef void request_done(io_t *io) noexcept nogil:
    """The target's answer, from any thread: reply, then give the object back; of the pump's own thread, with others. An
    entry is for the pump to answer, and counts as the target's until then.

    Ordering: the reply leaves before the object returns (a read is answered from its buffer), and the
    unlock is the last touch of the disk: after it close() may free everything.
    """
    cdef request_t *r = <request_t *>io.user
    cdef disk_t *d = r.disk
    cdef uint64_t one = 1
    cdef bint taken
    if pumping == <void *>d:
        r.next = d.done
        d.done = r
        d.n_done += 1
        return
    if r.queue >= 0:
        pthread_mutex_lock(&d.lock)
        if d.ring_over:
            lose(d, r)
        else:
            if d.foreign == NULL:       # else it was told, and has not looked yet
                c_write(d.wake, &one, sizeof(one))
            r.next = d.foreign
            d.foreign = r
        pthread_mutex_unlock(&d.lock)
        return
    pthread_mutex_lock(&d.lock)         # counted first: who has the reply finds it in the counters
    count(d, io)
    pthread_mutex_unlock(&d.lock)
    taken = reply(r)
    pthread_mutex_lock(&d.lock)
    if not taken:
        d.unsent += 1
    d.in_flight -= 1
    r.next = d.free
    d.free = r
    if d.waiters != 0:
        pthread_cond_broadcast(&d.changed)
    pthread_mutex_unlock(&d.lock)


cdef void take_foreign(disk_t *d) noexcept nogil:
    """Adds to d.done what the target answered on other threads."""
    cdef request_t *r
    pthread_mutex_lock(&d.lock)
    while d.foreign != NULL:
        r = d.foreign
        d.foreign = r.next
        r.next = d.done
        d.done = r
        d.n_done += 1
    pthread_mutex_unlock(&d.lock)


cdef void reply_all(disk_t *d, pump_t *p) noexcept nogil:
    """What request_done() does for all in d.done, whose answers go to the kernel together: its work after each then waits
    for the last, and finds all. Entries' answers go with the next pump_next()."""
    cdef request_t *first = d.done
    cdef request_t *last = NULL         # those that are no entries, in a list
    cdef request_t *back = NULL
    cdef request_t *r = first
    cdef request_t *after
    cdef unsigned n = 0, unsent = 0, queued = 0
    d.done = NULL
    d.n_done = 0
    pthread_mutex_lock(&d.lock)
    while r != NULL:
        count(d, &r.io)
        n += 1
        r = r.next
    pthread_mutex_unlock(&d.lock)
    r = first
    while r != NULL:
        after = r.next
        if r.queue >= 0:
            commit_done(r)
        else:
            if r.req != NULL or n == 1 or d.ring != NULL:
                unsent += not reply(r)
            else:
                pump_write(p, d.fuse_fd, r.parts, <unsigned>answer(r))
                queued += 1
                if queued == PUMP_WRITES:
                    unsent += pump_flush(p)
                    queued = 0
            r.next = back
            back = r
            if last == NULL:
                last = r
        r = after
    if queued != 0:
        unsent += pump_flush(p)
    pthread_mutex_lock(&d.lock)
    d.unsent += unsent
    d.in_flight -= n
    if last != NULL:
        last.next = d.free
        d.free = back
    if d.waiters != 0:
        pthread_cond_broadcast(&d.changed)
    pthread_mutex_unlock(&d.lock)


cdef void prepare(request_t *r, fuse_req_t req, uint32_t kind, uint64_t block, uint32_t nblocks) noexcept nogil:
    """Makes the io of a request."""
    r.req = req
    r.io.kind = kind
    r.io.nblocks = nblocks
    r.io.block = block
    r.io.buf = payload(r)
    r.io.done = request_done
    r.io.user = r
    r.io.error = 0
    r.io.next = NULL


cdef void hand_over(disk_t *d, io_t *first, unsigned n) noexcept nogil:
    """Gives n requests to the target; they may be done, and reused, before this returns."""
    cdef const io_t *io = first
    cdef unsigned i, changing = 0
    for i in range(n):
        changing += io.kind != IO_READ and io.kind != IO_SYNC
        io = io.next
    pthread_mutex_lock(&d.lock)
    d.in_flight += n
    d.changing += changing
    pthread_mutex_unlock(&d.lock)
    d.submit(d.ctx, first)


cdef void submit(disk_t *d, fuse_req_t req, uint32_t kind, uint64_t block, uint32_t nblocks) noexcept nogil:
    """Hands this thread's request object to the target, out of a callback of libfuse's.

    libfuse does not look at the buffer again after a callback (fuse_session_process_buf_int, 3.14 to 3.17).
    """
    global current_request
    cdef request_t *r = <request_t *>current_request
    current_request = NULL
    prepare(r, req, kind, block, nblocks)
    pthread_mutex_lock(&d.lock)
    r.covers = d.changes
    pthread_mutex_unlock(&d.lock)
    hand_over(d, &r.io, 1)


cdef int move(disk_t *d, request_t *r, uint32_t kind, uint64_t start, uint32_t size) noexcept nogil:
    """Makes the io of a read or write; 0, or the negative errno that answers it. Nothing to move: 1."""
    cdef uint64_t end = load_relaxed64(&d.size)
    if (start | size) % d.block != 0 or size > FUSE_MAX_WRITE:
        return -EINVAL
    if kind == IO_READ:
        if start >= end or size == 0:
            return 1
        size = <uint32_t>min(<uint64_t>size, end - start)
    elif d.read_only:
        return -EROFS
    elif start > end or size > end - start:
        return -EIO
    elif size == 0:
        return 1
    prepare(r, NULL, kind, start // d.block, size // d.block)
    return 0


cdef enum understood:
    FOR_LIBFUSE = 0
    FOR_TARGET = 1      # r.io is to be submitted
    FINISHED = 2        # answered, if it wants an answer


cdef understood understand(disk_t *d, request_t *r, const fuse_in_header *h, const void *first, size_t n) noexcept nogil:
    """Looks at a request from the kernel, which is no peer that is distrusted; its reads and writes are for us.

    first: its first argument. n: bytes of all arguments.
    """
    cdef const fuse_read_in *reads = <const fuse_read_in *>first
    cdef const fuse_write_in *writes = <const fuse_write_in *>first
    cdef int status
    if n < sizeof(fuse_read_in):
        # Nothing here is given up half-way: an interrupted request is answered as any other.
        return FINISHED if h.opcode == FUSE_INTERRUPT else FOR_LIBFUSE
    if h.nodeid != INO_DISK:
        return FOR_LIBFUSE
    r.unique = h.unique
    if h.opcode == FUSE_READ:
        r.io.kind = IO_READ
        status = move(d, r, IO_READ, reads.offset, reads.size)
    elif h.opcode == FUSE_WRITE:
        r.io.kind = IO_WRITE
        status = -EINVAL if n < sizeof(fuse_write_in) or n - sizeof(fuse_write_in) < writes.size else \
            move(d, r, IO_WRITE, writes.offset, writes.size)
    else:
        return FOR_LIBFUSE
    if status == 0:
        return FOR_TARGET
    if r.queue >= 0:
        commit_move(d, r, min(status, 0), 0)
    elif writev(d.fuse_fd, r.parts, compose(r, min(status, 0), 0)) < 0:
        pthread_mutex_lock(&d.lock)
        d.unsent += 1
        pthread_mutex_unlock(&d.lock)
    return FINISHED


cdef understood understand_read(disk_t *d, request_t *r, size_t n) noexcept nogil:
    """As understand(), of n bytes that were read; the kernel gives whole requests."""
    cdef const fuse_in_header *h = <const fuse_in_header *>r.buf.mem
    return FOR_LIBFUSE if n < sizeof(fuse_in_header) else understand(d, r, h, h + 1, n - sizeof(fuse_in_header))


cdef void fill_attr(disk_t *d, fuse_ino_t ino, stat_t *st) noexcept nogil:
    memset(st, 0, sizeof(stat_t))
    st.st_ino = ino
    st.st_blksize = BLOCK
    if ino == FUSE_ROOT_ID:
        st.st_mode = S_IFDIR | 0o500
        st.st_nlink = 2
    else:
        st.st_mode = S_IFREG | (0o400 if d.read_only else 0o600)
        st.st_nlink = 1
        st.st_size = <long>load_relaxed64(&d.size)
        st.st_blocks = st.st_size // 512


cdef void op_init(void *userdata, fuse_conn_info *conn) noexcept nogil:
    cdef disk_t *d = <disk_t *>userdata
    conn.max_write = FUSE_MAX_WRITE
    conn.max_read = d.max_io
    conn.max_background = d.depth
    conn.congestion_threshold = d.depth * 3 // 4
    conn.want |= conn.capable & <unsigned>(FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS)
    conn.want &= ~<unsigned>(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE
                             | FUSE_CAP_WRITEBACK_CACHE)
    d.got_init = True


cdef void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name) noexcept nogil:
    cdef fuse_entry_param entry
    if parent != FUSE_ROOT_ID or strcmp(name, "disk") != 0:
        fuse_reply_err(req, ENOENT)
        return
    memset(&entry, 0, sizeof(entry))
    entry.ino = INO_DISK
    entry.attr_timeout = FOREVER
    entry.entry_timeout = FOREVER
    fill_attr(<disk_t *>fuse_req_userdata(req), INO_DISK, &entry.attr)
    fuse_reply_entry(req, &entry)


cdef void op_getattr(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi) noexcept nogil:
    cdef stat_t st
    fill_attr(<disk_t *>fuse_req_userdata(req), ino, &st)
    fuse_reply_attr(req, &st, FOREVER)


cdef void op_setattr(fuse_req_t req, fuse_ino_t ino, stat_t *attr, int to_set, fuse_file_info *fi) noexcept nogil:
    """Only to the size that the disk has by now: so the kernel learns of it. What it merely asks for, attributes, it takes
    for old where a write ended meanwhile."""
    cdef stat_t st
    fill_attr(<disk_t *>fuse_req_userdata(req), ino, &st)
    if to_set & FUSE_SET_ATTR_SIZE and ino == INO_DISK and attr.st_size == st.st_size:
        fuse_reply_attr(req, &st, FOREVER)
    else:
        fuse_reply_err(req, EPERM)


cdef void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, fuse_file_info *fi) noexcept nogil:
    cdef disk_t *d = <disk_t *>fuse_req_userdata(req)
    cdef char buf[256]
    cdef stat_t st
    cdef size_t used
    if off != 0:
        fuse_reply_buf(req, NULL, 0)
        return
    fill_attr(d, FUSE_ROOT_ID, &st)
    used = fuse_add_direntry(req, buf, sizeof(buf), ".", &st, 1)
    used += fuse_add_direntry(req, buf + used, sizeof(buf) - used, "..", &st, 2)
    fill_attr(d, INO_DISK, &st)
    used += fuse_add_direntry(req, buf + used, sizeof(buf) - used, "disk", &st, 3)
    if used > size:
        fuse_reply_err(req, EINVAL)
    else:
        fuse_reply_buf(req, buf, used)


cdef void op_open(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi) noexcept nogil:
    """Answers with the kernel's own struct: libfuse 3.14 has no field for parallel direct writes."""
    cdef disk_t *d = <disk_t *>fuse_req_userdata(req)
    cdef fuse_open_out out
    if d.read_only and (fi.flags & O_ACCMODE) != O_RDONLY:
        fuse_reply_err(req, EROFS)
        return
    memset(&out, 0, sizeof(out))
    out.open_flags = FOPEN_DIRECT_IO | FOPEN_NOFLUSH | FOPEN_PARALLEL_DIRECT_WRITES
    fuse_reply_buf(req, <char *>&out, sizeof(out))


cdef void op_flush(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi) noexcept nogil:
    fuse_reply_err(req, 0)      # also release: nothing is kept per open file


cdef void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, fuse_file_info *fi) noexcept nogil:
    cdef disk_t *d = <disk_t *>fuse_req_userdata(req)
    cdef bint nothing
    pthread_mutex_lock(&d.lock)
    nothing = d.attaching and d.writes == 0
    pthread_mutex_unlock(&d.lock)
    if nothing:
        fuse_reply_err(req, 0)
    else:
        submit(d, req, IO_SYNC, 0, 0)


cdef void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t length,
                       fuse_file_info *fi) noexcept nogil:
    """Holes and zeros. A hole has to read as zeros: the loop device makes one for a discard, and also where zeros are
    asked for and the blocks may be freed (drivers/block/loop.c, REQ_OP_WRITE_ZEROES). So where what is discarded may read
    as anything there are none: else every discard, of which nobody wants the zeros, would write them."""
    cdef disk_t *d = <disk_t *>fuse_req_userdata(req)
    cdef uint64_t start = <uint64_t>off, size = <uint64_t>length, end = load_relaxed64(&d.size)
    if not d.discards:
        fuse_reply_err(req, ENOSYS)     # which the kernel remembers
    elif d.read_only:
        fuse_reply_err(req, EROFS)
    elif ((mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) or not d.zeroes)
            and mode != (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)):
        fuse_reply_err(req, EOPNOTSUPP)
    elif off < 0 or length <= 0 or (start | size) % d.block != 0:
        fuse_reply_err(req, EINVAL)
    elif start > end or size > end - start:
        fuse_reply_err(req, EIO)
    elif size // d.block > MOST_BLOCKS:
        fuse_reply_err(req, EFBIG)
    else:
        submit(d, req, IO_DISCARD if mode & FALLOC_FL_PUNCH_HOLE else IO_ZERO, start // d.block,
               <uint32_t>(size // d.block))


cdef void op_statfs(fuse_req_t req, fuse_ino_t ino) noexcept nogil:
    cdef disk_t *d = <disk_t *>fuse_req_userdata(req)
    cdef statvfs_t st
    memset(&st, 0, sizeof(st))
    st.f_bsize = st.f_frsize = BLOCK
    st.f_blocks = load_relaxed64(&d.size) // BLOCK
    st.f_files = 1
    st.f_namemax = 255
    fuse_reply_statfs(req, &st)


cdef fuse_lowlevel_ops OPS
memset(&OPS, 0, sizeof(OPS))
OPS.init = op_init
OPS.lookup = op_lookup
OPS.getattr = op_getattr
OPS.setattr = op_setattr
OPS.readdir = op_readdir
OPS.open = op_open
OPS.flush = op_flush
OPS.release = op_flush
OPS.fsync = op_fsync
OPS.statfs = op_statfs
OPS.fallocate = op_fallocate


cdef void give_back(disk_t *d, request_t *r) noexcept nogil:
    """What a receive thread does last. r: its object, or NULL."""
    pthread_mutex_lock(&d.lock)
    if r != NULL:
        r.next = d.free
        d.free = r
    d.runners -= 1
    pthread_cond_broadcast(&d.changed)
    pthread_mutex_unlock(&d.lock)


cdef request_t *process(disk_t *d, request_t *r) noexcept nogil:
    """Has libfuse deal with a request; the object if it is still this thread's. An entry is answered, or the target's."""
    global current_request
    cdef request_t *left
    cdef fuse_buf whole
    cdef size_t first
    current_request = r
    if r.queue < 0:
        fuse_session_process_buf(d.session, &r.buf)
    else:       # libfuse wants header, first argument and payload in one piece
        memset(&whole, 0, sizeof(whole))
        first = min(r.entry.in_.len - sizeof(fuse_in_header) - r.entry.payload, <size_t>FUSE_URING_FIRST)
        whole.size = sizeof(fuse_in_header) + first + r.entry.payload
        whole.mem = payload(r) - first - sizeof(fuse_in_header)
        memcpy(whole.mem, &r.entry.in_, sizeof(fuse_in_header))
        memcpy(payload(r) - first, r.entry.first, first)
        fuse_session_process_buf(d.session, &whole)
    left = <request_t *>current_request
    current_request = NULL
    return left


cdef int receive(disk_t *d) noexcept nogil:
    """One receive thread: 0 when the session ended (unmounted, aborted, exit()), else -errno."""
    cdef request_t *r = NULL
    cdef pollfd one
    cdef understood what
    cdef int n = 0
    while True:
        if r == NULL:
            r = take(d)
            if r == NULL:
                n = 0
                break
        n = fuse_session_receive_buf(d.session, &r.buf)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            one.fd = d.fuse_fd
            one.events = POLLIN
            poll(&one, 1, -1)
            continue
        if n <= 0:      # 0: the session ended, ENODEV included
            break
        what = understand_read(d, r, <size_t>n)
        if what == FOR_TARGET:
            hand_over(d, &r.io, 1)
            r = NULL
        elif what == FOR_LIBFUSE:
            r = process(d, r)
    give_back(d, r)
    return n


cdef request_t *take_now(disk_t *d) noexcept nogil:
    """An object for the pump; NULL while the target has all."""
    cdef request_t *r
    pthread_mutex_lock(&d.lock)
    r = d.free
    if r != NULL:
        d.free = r.next
    pthread_mutex_unlock(&d.lock)
    return r


cdef int receive_all(disk_t *d, request_t **spare, unsigned *moved) noexcept nogil:
    """Reads what requests there are and gives them to the target together; as fuse_session_receive_buf() says in the end.

    spare: the object to receive into next, or NULL while the target has all. moved: counts requests.
    """
    cdef io_t *first = NULL
    cdef io_t **last = &first
    cdef understood what
    cdef unsigned taken = 0
    cdef int n = -EAGAIN
    while taken < PUMP_WRITES:
        if spare[0] == NULL:
            spare[0] = take_now(d)
            if spare[0] == NULL:
                break
        n = fuse_session_receive_buf(d.session, &spare[0].buf)
        if n <= 0:
            break
        moved[0] += 1
        what = understand_read(d, spare[0], <size_t>n)
        if what == FOR_TARGET:
            last[0] = &spare[0].io
            last = &spare[0].io.next
            taken += 1
            spare[0] = NULL
        elif what == FOR_LIBFUSE:
            if first != NULL:       # in their order
                hand_over(d, first, taken)
                first = NULL
                last = &first
                taken = 0
            spare[0] = process(d, spare[0])
    if first != NULL:
        hand_over(d, first, taken)
    return n


cdef int arrive(disk_t *d, request_t **spare, unsigned *moved) noexcept nogil:
    """As receive_all(), of entries; what the target has no place for stays in d.arrived."""
    cdef io_t *first = NULL
    cdef io_t **last = &first
    cdef request_t *r
    cdef understood what
    cdef unsigned taken = 0, entry = 0
    cdef int n = -EAGAIN, result = 0
    while pump_next(d.ring, &entry, &result):
        if result < 0:      # for good: the connection has ended
            return 0 if result == -ENOTCONN or result == -ECONNABORTED or result == -ECANCELED else result
        r = &d.requests[d.depth + entry]
        r.unique = r.entry.in_.unique
        r.next = NULL
        if d.arrived == NULL:
            d.arrived = r
        else:
            d.last_arrived.next = r
        d.last_arrived = r
        moved[0] += 1
    while d.arrived != NULL and taken < PUMP_WRITES and load_relaxed32(&d.in_flight) + taken < d.depth:
        r = d.arrived
        d.arrived = r.next
        moved[0] += 1
        what = understand(d, r, &r.entry.in_, r.entry.first, r.entry.in_.len - sizeof(fuse_in_header))
        if what == FOR_TARGET:
            last[0] = &r.io
            last = &r.io.next
            taken += 1
        elif what == FOR_LIBFUSE:
            if first != NULL:       # in their order
                hand_over(d, first, taken)
                first = NULL
                last = &first
                taken = 0
            process(d, r)
    if first != NULL:
        hand_over(d, first, taken)
    if not d.ring.watches:          # something to read: FORGET, INTERRUPT, or the end
        n = receive_all(d, spare, moved)
        pump_watch(d.ring, d.fuse_fd)
    if not d.ring.awaits:
        pump_await(d.ring, d.wake)
        take_foreign(d)
    return n


cdef void register(disk_t *d) noexcept nogil:
    """Gives the kernel all entries: it sends requests from then on."""
    cdef request_t *r
    cdef unsigned i
    for i in range(d.queues * d.share):
        r = &d.requests[d.depth + i]
        r.parts[0].iov_base = r.entry
        r.parts[0].iov_len = sizeof(fuse_uring_header)
        r.parts[1].iov_base = payload(r)
        r.parts[1].iov_len = FUSE_MAX_WRITE
        pump_register(d.ring, d.fuse_fd, r.parts, <unsigned>r.queue, i)


cdef int pump(disk_t *d, pump_t *p, request_t **spare) noexcept nogil:
    """The only receive thread: takes requests and the target's answers in turn, each as many as there are; as receive(), but
    for what that does last: spare is the object to give back.

    While another thread takes the answers (attendance refused), that one replies, and this one only receives; of entries it
    replies all the same.
    """
    global pumping
    cdef request_t *r = NULL
    cdef uint64_t now, since = 0, first_done = 0
    cdef uint32_t seen = 0
    cdef uint32_t *word
    cdef unsigned moved
    cdef int n, got
    cdef spin_habit habit
    cdef bint attends = False, worked, full, spins = False, may_spin = online_cpus() > 1
    memset(&habit, 0, sizeof(habit))
    spin_paid(&habit)
    fcntl(d.fuse_fd, F_SETFL, fcntl(d.fuse_fd, F_GETFL) | O_NONBLOCK)
    pumping = d
    if d.ring != NULL:
        register(d)
    while True:
        moved = 0
        if d.ring != NULL:
            n = arrive(d, &r, &moved)
            full = load_relaxed32(&d.in_flight) >= d.depth
        else:
            n = receive_all(d, &r, &moved)
            full = r == NULL
        worked = moved != 0
        if n <= 0 and n != -EAGAIN and n != -EINTR or d.stop:
            break
        if d.attendance != NULL:
            if not attends and load_relaxed32(&d.in_flight) != 0:
                attends = d.attendance.enter(d.ctx)
            if attends:
                got = d.attendance.collect(d.ctx)
                attends = got != COLLECT_OVER
                if not attends:         # its bell may be another one next time
                    pump_forget(p)
                worked = worked or got == COLLECT_SOME
        if d.done != NULL:
            now = now_ns()
            if first_done == 0:
                first_done = now
            if not may_spin or 2 * d.n_done >= load_relaxed32(&d.in_flight) or now - first_done >= GATHER_NS:
                reply_all(d, p)
                first_done = 0
                worked = True
            elif not worked:
                sched_yield()
                continue
        if worked:
            if spins:
                spin_paid(&habit)
            spins = False
            since = 0
            continue
        now = now_ns()
        if since == 0:
            since = now
            spins = may_spin and spin_pays(&habit)
            if full and (attends or d.ring != NULL):    # else take() counts it
                pthread_mutex_lock(&d.lock)
                d.waits += 1
                pthread_mutex_unlock(&d.lock)
        if spins:
            if now - since < SPIN_NS:
                sched_yield()           # those whose requests we wait for have the CPU, or want it
                continue
            spins = False
            spin_in_vain(&habit)
        word = NULL
        if attends:
            if now - since >= IDLE_NS and load_relaxed32(&d.in_flight) == 0:
                d.attendance.leave(d.ctx)
                attends = False
                pump_forget(p)
            else:
                word = d.attendance.listen(d.ctx, &seen)
                if word == NULL:
                    continue
        if full and not attends and d.ring == NULL:
            r = take(d)
            if r == NULL:
                n = 0
                break
            continue
        pump_sleep(p, -1 if full and d.ring == NULL else d.fuse_fd, word, seen, ATTEND_NS if attends or load_relaxed32(&d.in_flight) != 0
                   else FOREVER_NS)
    if d.done != NULL:
        reply_all(d, p)
    if attends:
        d.attendance.leave(d.ctx)
    pumping = NULL
    if d.ring != NULL:
        pthread_mutex_lock(&d.lock)
        d.ring_over = True
        while d.foreign != NULL:
            lose(d, d.foreign)
            d.foreign = d.foreign.next
        pthread_mutex_unlock(&d.lock)
    spare[0] = r
    return n if n < 0 and n != -EAGAIN and n != -EINTR else 0


cdef bint drain(disk_t *d, double timeout) noexcept nogil:
    """Wait until no receive thread runs and the target has nothing; False when the time is up."""
    cdef timespec until
    cdef int status = 0
    cdef bint idle
    clock_gettime(CLOCK_MONOTONIC, &until)
    until.tv_sec += <long>timeout
    until.tv_nsec += <long>((timeout - <long>timeout) * 1e9)
    if until.tv_nsec >= 1000000000:
        until.tv_sec += 1
        until.tv_nsec -= 1000000000
    pthread_mutex_lock(&d.lock)
    d.waiters += 1
    while (d.runners != 0 or d.in_flight != 0) and status == 0:
        status = pthread_cond_timedwait(&d.changed, &d.lock, &until)
    d.waiters -= 1
    idle = d.runners == 0 and d.in_flight == 0
    pthread_mutex_unlock(&d.lock)
    return idle


cdef void destroy(disk_t *d) noexcept:
    """Free everything. Precondition: drained; no other thread knows the disk."""
    if d.session != NULL:
        fuse_session_destroy(d.session)     # closes fuse_fd
    elif d.fuse_fd >= 0:
        c_close(d.fuse_fd)
    if d.arena != NULL:
        munmap(d.arena, d.arena_size)
    if d.ring != NULL:
        if not d.pumped:
            pump_close(d.ring)
        free(d.ring)
    if d.wake >= 0:
        c_close(d.wake)
    free(d.headers)
    free(d.requests)
    free(d.watched)
    if d.event >= 0:
        c_close(d.event)
    pthread_cond_destroy(&d.changed)
    pthread_mutex_destroy(&d.lock)
    free(d)


def _possible_cpus():
    """CPUs the system may ever have: FUSE has a queue for each, by its number."""
    with open("/sys/devices/system/cpu/possible") as file:      # cpulist, as "0-1"
        return int(file.read().replace(",", "-").rpartition("-")[2]) + 1


def mount(str mountpoint not None, bint read_only, unsigned max_io):
    """Mounts a session that nobody serves yet: (/dev/fuse, the kernel's number of the connection, its fusectl "abort" or -1),
    two descriptors of the caller's. Raises OSError (filename set)."""
    cdef bytes path = os.fsencode(mountpoint)
    cdef unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | (MS_RDONLY if read_only else 0)
    cdef unsigned major = 0, minor = 0
    cdef int control, abort = -1, fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    cdef bytes options = (f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},"
                          f"max_read={max_io}").encode()
    try:
        if c_mount("muenfast", path, "fuse.muenfast", flags, <char *>options) != 0:
            PyErr_SetFromErrnoWithFilenameObject(OSError, mountpoint)
        try:
            if root_device(path, &major, &minor) != 0:
                PyErr_SetFromErrnoWithFilenameObject(OSError, mountpoint)
            # fc->dev = new_decode_dev(s_dev), fs/fuse/inode.c; an anonymous device's major is 0
            connection = (minor & 0xff) | (major << 8) | ((minor & ~0xffu) << 12)
            control = fusectl_open()
            if control >= 0:
                try:
                    abort = os.open(f"{connection}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
                finally:
                    os.close(control)
        except BaseException:
            umount2(path, MNT_FORCE | MNT_DETACH)
            raise
    except BaseException:
        os.close(fd)
        raise
    return fd, connection, abort


@cython.final
cdef class FuseDisk:
    """A mounted FUSE session whose file "disk" is *target*.

    target: executes the I/O; its submit() is called from every thread inside run(), its done from any.
    mountpoint: an existing directory of the caller's; only the caller's user may look into the mount.
    read_only: refuse writes, also where the target takes them.
    depth: request objects, and so the most I/Os the target ever has at a time (1 to 4096).
    max_io: bytes of one request, a multiple of 4096, at most 1 MiB; the caller holds the loop device to it
    (max_sectors_kb), so that resident memory stays near depth * (max_io + 4096).
    plain: no pump, as in a kernel that cannot have one.
    ring: FUSE over io_uring where the kernel offers it; it then sends requests through as many as `depth` entries for each
    CPU, fewer where there are more than 16, and resident memory stays near that number of max_io + 4096.
    mounted: what mount() returned for it, which is its own from here on, whatever becomes of this; unmount, resize: called in
    place of umount2(2), with whether to abort, and for the file to be told its size, with that and whether it is read only:
    where another process has mounted it.

    After construction the kernel's INIT has been answered and the file system waits for run().
    Raises ValueError for a bad depth, max_io or disk size, OSError (filename set) when the device, the
    mount or the session fails.
    """
    cdef disk_t *d
    cdef readonly Target target
    cdef readonly str mountpoint
    cdef readonly int connection    # the kernel's id: the directory below /sys/fs/fuse/connections
    cdef readonly int abort_fd      # that connection's fusectl "abort", or -1 where there is no fusectl
    cdef bytes path
    cdef object unmounting
    cdef object resizing

    def __cinit__(self, Target target not None, str mountpoint not None, *, bint read_only=False,
                  unsigned depth=64, unsigned max_io=131072, bint plain=False, bint ring=True, mounted=None,
                  unmount=None, resize=None):
        cdef disk_t *d
        self.abort_fd = -1
        self.unmounting, self.resizing = unmount, resize
        if mounted is not None:
            fuse_fd, self.connection, self.abort_fd = mounted
        try:
            self._allocate(target, mountpoint, depth, max_io)
        except BaseException:
            if mounted is not None:
                os.close(fuse_fd)
            raise
        d = self.d
        if mounted is not None:
            d.fuse_fd = fuse_fd
        d.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if d.event < 0:
            PyErr_SetFromErrno(OSError)
        d.submit, d.ctx, d.attendance = target.submit, target.ctx, target.attendance
        d.block = target.block_size
        d.plain = plain
        d.size, d.read_only = target.nblocks * target.block_size, read_only or target.read_only
        d.discards, d.zeroes = target.discards, target.zeroes
        d.depth, d.max_io = depth, max_io
        if ring and CUSTOM_IO and not plain:
            self._open_ring()
        self._make_requests()
        if mounted is None:
            d.fuse_fd, self.connection, self.abort_fd = mount(mountpoint, d.read_only, max_io)
        try:
            self._start()
        except BaseException:
            self._unmount(True)
            raise

    cdef _allocate(self, Target target, str mountpoint, unsigned depth, unsigned max_io):
        cdef pthread_condattr_t attr
        cdef disk_t *d
        if not 1 <= depth <= 4096:
            raise ValueError(f"depth is {depth}: 1 to 4096")
        if not BLOCK <= max_io <= FUSE_MAX_WRITE or max_io % BLOCK:
            raise ValueError(f"max_io is {max_io}: a multiple of {BLOCK}, at most {FUSE_MAX_WRITE}")
        if target.block_size != 512 and target.block_size != BLOCK:
            raise ValueError(f"the target has blocks of {target.block_size} bytes: 512 or {BLOCK}")
        if target.submit == NULL or not 1 <= target.nblocks <= (<uint64_t>1 << 63) // target.block_size - 1:
            raise ValueError(f"the target has {target.nblocks} blocks: a disk has at least one")
        self.target, self.mountpoint, self.path = target, mountpoint, os.fsencode(mountpoint)
        d = <disk_t *>calloc(1, sizeof(disk_t))
        if d == NULL:
            raise MemoryError()
        pthread_mutex_init(&d.lock, NULL)
        pthread_condattr_init(&attr)
        pthread_condattr_setclock(&attr, CLOCK_MONOTONIC)
        pthread_cond_init(&d.changed, &attr)
        pthread_condattr_destroy(&attr)
        self.d = d                      # from here on __dealloc__ frees it
        d.fuse_fd = d.event = d.wake = -1

    cdef _unmount(self, bint force):
        """Takes the mount out of the tree, lazily, aborting its connection or not; nothing where it is gone. Raises OSError.
        """
        cdef const char *path = self.path
        cdef int status, flags = MNT_FORCE | MNT_DETACH if force else MNT_DETACH
        if self.unmounting is not None:
            self.unmounting(force)
            return
        with nogil:
            status = umount2(path, flags)
        if status != 0 and errno != EINVAL and errno != ENOENT:
            PyErr_SetFromErrnoWithFilenameObject(OSError, self.mountpoint)

    cdef _open_ring(self):
        """Makes the pump that takes entries, where this kernel has all that it needs."""
        cdef disk_t *d = self.d
        cdef unsigned queues = _possible_cpus()
        d.wake = eventfd(0, EFD_CLOEXEC)
        if d.wake < 0:
            PyErr_SetFromErrno(OSError)
        d.ring = <pump_t *>calloc(1, sizeof(pump_t))
        if d.ring == NULL:
            raise MemoryError()
        d.queues, d.share = queues, min(d.depth, max(<unsigned>LEAST_SHARE, <unsigned>MOST_ENTRIES // queues))
        if pump_open(d.ring, d.queues * d.share) != 0:
            self._no_ring()

    cdef _no_ring(self):
        free(self.d.ring)
        self.d.ring = NULL
        self.d.queues = self.d.share = 0

    cdef _make_requests(self):
        cdef disk_t *d = self.d
        cdef unsigned i, n = d.depth + d.queues * d.share
        cdef request_t *r
        d.requests = <request_t *>calloc(n, sizeof(request_t))
        d.headers = <fuse_uring_header *>calloc(n, sizeof(fuse_uring_header))
        if d.requests == NULL or d.headers == NULL:
            raise MemoryError()
        # Only what a request really carried becomes resident; a huge page would make it all so.
        d.arena_size = <size_t>n * STRIDE
        d.arena = <uint8_t *>mmap(NULL, d.arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                  -1, 0)
        if d.arena == MAP_FAILED:
            d.arena = NULL
            raise MemoryError()
        madvise(d.arena, d.arena_size, MADV_NOHUGEPAGE)     # EINVAL: a kernel without huge pages
        for i in range(n):
            r = &d.requests[i]
            r.disk = d
            r.buf.mem = d.arena + <size_t>i * STRIDE + BLOCK - WRITE_HEADER
            if i < d.depth:
                r.queue = -1
                r.next = d.free
                d.free = r
            else:
                r.queue = <int>((i - d.depth) // d.share)
                r.entry = &d.headers[i]

    cdef _start(self):
        """Session and INIT."""
        cdef disk_t *d = self.d
        cdef fuse_buf first
        cdef fuse_args args
        cdef int n
        cdef bint offered = False
        cdef bytes option = f"-omax_read={d.max_io}".encode()   # must equal conn.max_read, else EPROTO
        cdef char *argv[3]
        argv[0], argv[1], argv[2] = "muenfast", option, NULL
        args.argc, args.argv, args.allocated = 2, argv, 0
        d.session = fuse_session_new(&args, &OPS, sizeof(OPS), d)
        fuse_opt_free_args(&args)
        if d.session == NULL:
            raise OSError(EINVAL, "libfuse made no session", self.mountpoint)
        if d.ring != NULL:
            refused = session_over(d.session, &CARRIER, d.fuse_fd) != 0
        else:       # "/dev/fd/N": libfuse takes the open device and leaves the mount to us
            refused = fuse_session_mount(d.session, f"/dev/fd/{d.fuse_fd}".encode()) != 0
        if refused:
            raise OSError(EINVAL, "libfuse refused the session's descriptor", self.mountpoint)
        # The first receive wants libfuse's own, larger buffer; INIT then sets the size to max_write + header.
        memset(&first, 0, sizeof(first))
        with nogil:
            n = fuse_session_receive_buf(d.session, &first)
            if n > 0:
                offered = d.accepting = d.ring != NULL and fuse_uring_offered(first.mem, <size_t>n)
                fuse_session_process_buf(d.session, &first)
            free(first.mem)
        if n <= 0 or not d.got_init or fuse_session_exited(d.session):
            raise OSError(-n if n < 0 else EPROTO, "FUSE INIT failed", self.mountpoint)
        if d.ring != NULL and (not offered or d.accepting):
            pump_close(d.ring)
            self._no_ring()

    def __dealloc__(self):
        if self.abort_fd >= 0:
            c_close(self.abort_fd)
        # A receive thread or the target still knows the disk: its memory is left to the process.
        if self.d != NULL and drain(self.d, 0):
            destroy(self.d)

    cdef disk_t *_open(self) except NULL:
        if self.d == NULL:
            raise ValueError("operation on a closed FuseDisk")
        return self.d

    def run(self):
        """Receive and dispatch on the calling thread until the session ends; several threads may.

        Returns 0 (unmounted, aborted, exit()) or a negative errno of the receive. The thread is marked as
        one that writeback depends on (PR_SET_IO_FLUSHER), where the kernel lets it be.
        """
        cdef disk_t *d = self._open()
        cdef pump_t own
        cdef pump_t *p
        cdef request_t *spare = NULL
        cdef bint first
        cdef int status
        with nogil:
            prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)    # EPERM or EINVAL: without it, as any FUSE server
            pthread_mutex_lock(&d.lock)
            first = not d.plain and not d.pumped
            d.pumped = True
            d.runners += 1
            p = NULL if not first else d.ring
            pthread_mutex_unlock(&d.lock)
            if first and p == NULL and pump_open(&own, 0) == 0:
                p = &own
            if p == NULL:
                status = receive(d)
            else:
                pthread_mutex_lock(&d.lock)
                d.pumps = True
                pthread_mutex_unlock(&d.lock)
                status = pump_start(p)
                if status == 0:
                    status = pump(d, p, &spare)
                pump_close(p)
                give_back(d, spare)     # last: close() then frees the pump, too
        return status

    @property
    def attaching(self):
        """Whether a flush is answered at once as long as nothing was written.

        LOOP_CONFIGURE flushes, uninterruptibly and with locks held that every other loop device needs sooner or later:
        it must not wait for a target that waits for somebody else.
        """
        return self._open().attaching

    @attaching.setter
    def attaching(self, bint value):
        cdef disk_t *d = self._open()
        pthread_mutex_lock(&d.lock)
        d.attaching = value
        pthread_mutex_unlock(&d.lock)

    @property
    def watch_fd(self):
        """Readable (an eventfd) once a block that watch() names was written; close() closes it."""
        return self._open().event

    def watch(self, ranges):
        """The (first block, end) of the blocks whose writes watch_fd tells, in place of those before."""
        cdef disk_t *d = self._open()
        cdef unsigned n = 0
        cdef uint64_t *new
        cdef uint64_t *old
        given = sorted((first, end) for first, end in ranges if first < end)
        new = <uint64_t *>calloc(len(given) + 1, 2 * sizeof(uint64_t))
        if new == NULL:
            raise MemoryError()
        try:
            for first, end in given:
                if n != 0 and <uint64_t>first <= new[2 * n - 1]:
                    new[2 * n - 1] = max(new[2 * n - 1], <uint64_t>end)
                else:
                    new[2 * n] = first
                    new[2 * n + 1] = end
                    n += 1
        except BaseException:
            free(new)
            raise
        pthread_mutex_lock(&d.lock)
        old = d.watched
        d.watched, d.n_watched = new, n
        pthread_mutex_unlock(&d.lock)
        free(old)

    def resized(self):
        """Takes over the target's size, and has the kernel take it over; not from a thread that is in run().

        What the kernel knows of a file that is written it takes from nobody but who sets it, which may wait for writes
        under way. Raises OSError (filename set).
        """
        cdef disk_t *d = self._open()
        cdef uint64_t size = self.target.nblocks * self.target.block_size
        path = os.path.join(self.mountpoint, "disk")
        store_relaxed64(&d.size, size)
        if d.read_only and forget_attributes(d.fuse_fd, INO_DISK) != 0:
            PyErr_SetFromErrnoWithFilenameObject(OSError, path)
        if self.resizing is not None:
            self.resizing(size, bool(d.read_only))
        elif d.read_only:
            os.stat(path)
        else:
            os.truncate(path, size)

    def exit(self):
        """End the session now: abort the connection, so that whoever waits for it gets an error.

        Idempotent. run() returns soon after; what the target still has is answered into the void.
        Raises OSError (filename set) when neither the abort file nor a forced unmount worked.
        """
        cdef disk_t *d = self._open()
        pthread_mutex_lock(&d.lock)
        d.stop = True
        pthread_cond_broadcast(&d.changed)
        pthread_mutex_unlock(&d.lock)
        fuse_session_exit(d.session)
        self.abort()

    def abort(self):
        """Abort the connection (as exit()), leaving run() to see it by itself."""
        cdef int control = self.abort_fd
        cdef bint aborted
        if control < 0:
            self._unmount(True)
            return
        with nogil:
            aborted = c_write(control, "1", 1) == 1
        if not aborted:
            PyErr_SetFromErrnoWithFilenameObject(OSError, self.mountpoint)

    def unmount(self):
        """Take the mount out of the tree (lazily); the session ends when its last user has gone.

        Nothing is to be done when it is not mounted any more. Raises OSError (filename set).
        """
        self._unmount(False)

    @property
    def pumps(self):
        """Whether one thread takes requests and answers (or did): once run() has begun, where the kernel can (Linux 6.7)."""
        return self._open().pumps

    @property
    def ring(self):
        """Whether requests come by FUSE over io_uring (Linux 6.14, where /sys/module/fuse/parameters/enable_uring says so)."""
        return self._open().ring != NULL

    @property
    def read_only(self):
        return self._open().read_only

    @property
    def in_flight(self):
        """I/Os the target has at this moment."""
        return 0 if self.d == NULL else self.d.in_flight

    @property
    def unflushed(self):
        """Whether something was written, or is being written, that no flush that went well covers."""
        cdef disk_t *d = self._open()
        pthread_mutex_lock(&d.lock)
        try:
            return d.changes != d.flushed or d.changing != 0
        finally:
            pthread_mutex_unlock(&d.lock)

    @property
    def counters(self):
        """reads, writes, syncs, discards (zeroed ranges, too), errors: I/Os answered; bytes: moved by the good ones;
        waits: times a receive thread found all `depth` objects in flight; unsent: replies to requests aborted meanwhile."""
        cdef disk_t *d = self._open()
        pthread_mutex_lock(&d.lock)
        try:
            return {"reads": d.reads, "writes": d.writes, "syncs": d.syncs, "discards": d.discards_done,
                    "bytes": d.bytes, "errors": d.errors, "waits": d.waits, "unsent": d.unsent}
        finally:
            pthread_mutex_unlock(&d.lock)

    def close(self, double timeout=5.0):
        """Free session and buffers, once run() has returned everywhere and the target has nothing left.

        Contract: the caller has ended the session (unmount() or exit()), and the target completes every io
        it has, with an error if it must, once it is told to. Idempotent. Raises TimeoutError after
        *timeout* seconds otherwise; the object then stays usable, and collecting it leaks its memory
        rather than freeing what a late done() will touch.
        """
        cdef bint idle
        cdef disk_t *d = self.d
        if d == NULL:
            return
        with nogil:
            idle = drain(d, timeout)
        if not idle:
            raise TimeoutError(f"{self.mountpoint}: {d.runners} receive threads and {d.in_flight} requests "
                               f"are still out after {timeout:.1f} s")
        self.d = NULL
        destroy(d)
        if self.abort_fd >= 0:
            os.close(self.abort_fd)
            self.abort_fd = -1
