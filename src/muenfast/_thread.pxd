"""Threads of the cores: their preparation, and locks."""

cdef enum:
    TIMER_SLACK_NS = 1000


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *m)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)


cdef extern from *:
    """
    #include <sys/prctl.h>

    /* An engine thread sleeps to the microsecond, not to the default 50. One that a block device waits for must not
     * wait, in reclaim, for that device's own dirty pages (PR_SET_IO_FLUSHER; refused without CAP_SYS_RESOURCE: a process
     * that gave that up before has it from the thread that started this one). */
    static inline void prepare_thread(unsigned long slack_ns, int flusher) {
        prctl(PR_SET_TIMERSLACK, slack_ns, 0UL, 0UL, 0UL);
        if (flusher)
            prctl(PR_SET_IO_FLUSHER, 1UL, 0UL, 0UL, 0UL);
    }
    """
    void prepare_thread(unsigned long slack_ns, int flusher) noexcept nogil
