"""Stores that are Python objects: a pool of Python's threads takes jobs off the engine, which knows nothing of them."""
cimport cython
from cpython.buffer cimport Py_buffer, PyBuffer_FillInfo
from libc.errno cimport EIO, EOPNOTSUPP
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from muenfast._aio cimport AIO_DISCARD, AIO_READ, AIO_SYNC, AIO_WRITE
from muenfast._jobs cimport *
from muenfast._store cimport STORE_USER, Store
from muenfast._wire cimport BLOCK_SIZE, fetch_add_acqrel32, load_acquire32, load_relaxed32, load_relaxed64

from muenfast.errors import UsageError
from muenfast.threads import leave_child

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<unistd.h>" nogil:
    int getpid()

MOST_WORKERS = JOBS_WORKERS
LARGEST = JOB_BYTES         # bytes of one read or write


@cython.final
cdef class _Stage:
    """The private memory of one job, as Python sees it: the first `length` bytes, by views that move() made only. A view's
    obj, which a call may keep, gives nobody another one."""
    cdef uint8_t *base
    cdef Py_ssize_t length
    cdef bint read_only
    cdef bint lent          # to move()
    cdef uint32_t views     # that are not released; by any thread

    def __cinit__(self):
        self.base = <uint8_t *>aligned_alloc(BLOCK_SIZE, JOB_BYTES)     # touched as far as it is used
        if self.base == NULL:
            raise MemoryError()

    def __getbuffer__(self, Py_buffer *view, int flags):
        if not self.lent:
            raise BufferError("a store's buffer is no buffer beyond its call")
        PyBuffer_FillInfo(view, self, self.base, self.length, self.read_only, flags)
        fetch_add_acqrel32(&self.views, 1)

    def __releasebuffer__(self, Py_buffer *view):
        fetch_add_acqrel32(&self.views, <uint32_t>-1)

    def __dealloc__(self):
        free(self.base)


cdef int understood(str name, found, uint64_t length) except -1:
    """Raises where what a store's method returned says that it has not done what it was called for."""
    if isinstance(found, (bytes, bytearray, memoryview)) and name == "pread":
        raise TypeError(f"pread() returned {type(found).__name__}: it is to fill buf instead (buf[:] = ...)")
    if isinstance(found, int) and (found is False or found < 0 or
                                   name in ("pread", "pwrite") and found is not True and found != length):
        raise OSError(EIO, f"{name}() returned {found!r}, of {length} bytes: it is to do all of them, and return nothing "
                           "(os.pwrite and os.preadv may do less: call them again), or to raise")
    if isinstance(found, str) or hasattr(found, "__await__") or hasattr(found, "gi_frame") or hasattr(found, "ag_frame"):
        raise TypeError(f"{name}() returned {type(found).__name__}: it is to do the work and return nothing")
    return 0


@cython.final
cdef class UserStore(Store):
    """A store whose data Python code keeps.

    pread(buf, offset), pwrite(buf, offset), flush(), trim(count, offset), zero(count, offset): what executes, None: not
    to be had; bare: those of them by name that take no flags behind that. failed(name, error): told of each exception; the
    positive errno that answers. most: bytes of one read or write. timeout: seconds. zeroes: whether what was trimmed reads
    as zeros. The rest: as Store.

    Threads that serve it call work(), until end(). Whatever they do, nothing but their own job's memory is written to.
    """
    cdef jobs *q
    cdef list stages
    cdef object pread, pwrite, flush, trim, zero, failed
    cdef bint read_flags, write_flags, flush_flags, trim_flags, zero_flags
    cdef int process        # whose it is

    def __init__(self, size, *, pread, pwrite, flush, trim, zero, bare, failed, most, timeout, zeroes=False, block_size=None,
                 read_only=False, identity=None):
        cdef _Stage stage
        cdef int k
        if self.q != NULL:
            raise UsageError("a UserStore is initialised once")
        if not BLOCK_SIZE <= most:
            raise UsageError(f"one read or write has at least {BLOCK_SIZE} bytes", value=most)
        self.process = getpid()
        self.q = <jobs *>calloc(1, JOBS_SIZE)
        if self.q == NULL:
            raise MemoryError()
        jobs_init(self.q, <uint64_t>(timeout * 1e9))
        self.stages = [_Stage() for _ in range(JOBS_MOST)]
        for k, stage in enumerate(self.stages):
            self.q.all[k].stage = stage.base
        self.pread, self.pwrite, self.flush, self.trim, self.zero, self.failed = pread, pwrite, flush, trim, zero, failed
        self.read_flags, self.write_flags = "pread" not in bare, "pwrite" not in bare
        self.flush_flags, self.trim_flags, self.zero_flags = "flush" not in bare, "trim" not in bare, "zero" not in bare
        self.s.kind = STORE_USER
        self.s.jobs = self.q
        self.s.most = min(most, JOB_BYTES) // BLOCK_SIZE * BLOCK_SIZE
        self.s.zeroes = zeroes
        self.finish(size, block_size, read_only, identity)

    def resize(self, size):
        """Gives the disk another size, of at least a block. No engine may use it."""
        self.finish(size, self.s.block_size, self.s.read_only, self.identity)

    @property
    def counters(self):
        """calls: executed; late: answered with EIO at the end of their time; returned: of those, what has ended since."""
        return {"calls": load_relaxed64(&self.q.calls), "late": load_relaxed64(&self.q.late),
                "returned": load_relaxed64(&self.q.returned)}

    @property
    def abandoned(self):
        """Calls that still run, though nobody waits for them any more."""
        return load_relaxed32(&self.q.left)

    @property
    def last_late(self):
        """late, as in counters, and of the last of them (method, byte of the disk, bytes, whether it had begun)."""
        cdef late_call last
        cdef uint64_t late = jobs_lateness(self.q, &last)
        cdef str name = "flush"
        if last.kind == AIO_READ:
            name = "pread"
        elif last.kind == AIO_WRITE:
            name = "pwrite"
        elif last.kind == AIO_DISCARD:
            name = "trim" if self.trim is not None else "zero"
        return late, (name, last.start, last.length, last.begun)

    def work(self):
        """Executes jobs, until end(). For any number of threads up to MOST_WORKERS."""
        cdef job *j
        cdef int error
        jobs_join(self.q)
        while True:
            j = jobs_try(self.q)        # who has the GIL goes on with it: to hand it over costs more than a job
            if j == NULL:
                with nogil:
                    j = jobs_next(self.q)
                if j == NULL:
                    return
            error = self.execute(j)
            if self.stage_is_free(j):   # else it stays with whoever kept a view, and the job with it: late for ever
                jobs_done(self.q, j, error)

    def end(self):
        """No more jobs: each work() returns once its call has."""
        jobs_end(self.q)

    cdef int execute(self, job *j) noexcept:
        """0 or a negative errno."""
        cdef str name = "flush"
        cdef object found = None
        try:
            if j.kind == AIO_READ:
                name = "pread"
                self.move(j, self.pread, self.read_flags, False)
            elif j.kind == AIO_WRITE:
                name = "pwrite"
                self.move(j, self.pwrite, self.write_flags, True)
            elif j.kind == AIO_DISCARD and self.trim is not None:
                name = "trim"
                found = self.trim(j.length, j.start, 0) if self.trim_flags else self.trim(j.length, j.start)
            elif j.kind == AIO_DISCARD:
                name = "zero"
                if self.zero is None:
                    return -EOPNOTSUPP
                found = self.zero(j.length, j.start, 0) if self.zero_flags else self.zero(j.length, j.start)
            elif self.flush is not None:
                found = self.flush(0) if self.flush_flags else self.flush()
            if found is not None:
                understood(name, found, j.length)
        except BaseException as error:      # SystemExit, too: it ends no thread of a server's
            if getpid() != self.process:
                leave_child(error)
            try:
                return -<int>self.failed(name, error)
            except BaseException:           # a log handler of the program's: the request has failed all the same
                return -EIO
        if getpid() != self.process:        # the call came back in a child of fork(), too, which has no server
            leave_child(None)
        return 0

    cdef int move(self, job *j, object call, bint flags, bint read_only) except -1:
        """Calls with a view of the job's stage, which is released then."""
        cdef _Stage stage = self.stages[j.place]
        stage.length = j.length
        stage.read_only = read_only
        if not read_only:           # what a store leaves out is zeros, and nothing of an earlier request's
            memset(stage.base, 0, j.length)
        stage.lent = True
        try:
            view = memoryview(stage)
        finally:
            stage.lent = False
        try:
            found = call(view, j.start, 0) if flags else call(view, j.start)
            if found is not None:
                understood("pwrite" if read_only else "pread", found, j.length)
        finally:
            try:
                view.release()
            except BufferError:     # it was exported, to numpy perhaps: stage_is_free() sees that
                pass
        return 0

    cdef bint stage_is_free(self, job *j) noexcept:
        """Whether the job's memory is nobody else's: of a stage of which a view was kept it gets another one."""
        cdef _Stage stage = self.stages[j.place], fresh
        if load_acquire32(&stage.views) == 0:
            return True
        try:
            fresh = _Stage()
        except MemoryError:
            return False
        memcpy(fresh.base, stage.base, stage.length)
        self.stages[j.place] = fresh
        j.stage = fresh.base
        return True

    def __dealloc__(self):
        # No work() is running: it would hold a reference.
        if self.q != NULL:
            jobs_destroy(self.q)
            free(self.q)
            self.q = NULL
