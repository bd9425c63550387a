"""Cython's view of _jobs.h and _faults.h; the headers own meaning and ownership, this file only declares."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "_jobs.h" nogil:
    enum:
        JOBS_WORKERS
        JOBS_MOST
        JOB_BYTES
    ctypedef struct job:
        uint8_t *stage
        uint64_t start
        uint64_t length
        uint32_t place
        int kind
    ctypedef struct late_call:
        int kind
        bint begun
        uint64_t start
        uint64_t length
    ctypedef struct jobs:
        job all[1]          # JOBS_MOST
        uint64_t calls
        uint64_t late
        uint64_t returned
        uint32_t left
    const size_t JOBS_SIZE "sizeof(jobs)"
    void jobs_init(jobs *q, uint64_t timeout_ns) noexcept
    void jobs_destroy(jobs *q) noexcept
    void jobs_join(jobs *q) noexcept
    job *jobs_try(jobs *q) noexcept
    job *jobs_next(jobs *q) noexcept
    void jobs_done(jobs *q, job *j, int error) noexcept
    void jobs_end(jobs *q) noexcept
    uint64_t jobs_lateness(jobs *q, late_call *last) noexcept

cdef extern from "_faults.h" nogil:
    enum:
        FAULT_ERROR
        FAULT_DELAY
        FAULT_LATE
        FAULT_CORRUPT
        FAULTS_MOST
    ctypedef struct fault:
        int what
        uint32_t kinds
        uint64_t threshold
        int error
        uint64_t delay_ns
    ctypedef struct faults:
        uint64_t random
        uint64_t timeout_ns
        uint32_t n
        fault each[1]       # FAULTS_MOST
        uint64_t met[4]
