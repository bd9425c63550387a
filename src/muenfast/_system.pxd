"""The C library, as the front ends use it: memory, descriptors, waiting for them."""
cdef extern from "<sys/mman.h>" nogil:
    enum: PROT_READ
    enum: PROT_WRITE
    enum: MAP_PRIVATE
    enum: MAP_ANONYMOUS
    enum: MAP_NORESERVE
    enum: MADV_NOHUGEPAGE
    void *MAP_FAILED
    void *mmap(void *addr, size_t size, int prot, int flags, int fd, long off)
    int munmap(void *addr, size_t size)
    int madvise(void *addr, size_t size, int advice)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum: EFD_CLOEXEC
    enum: EFD_NONBLOCK

cdef extern from "<sys/uio.h>" nogil:
    ctypedef struct iovec_t "struct iovec":
        void *iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec_t *iov, int n)
    ssize_t writev(int fd, const iovec_t *iov, int n)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum: POLLIN
    int poll(pollfd *list, unsigned long n, int milliseconds)

cdef extern from *:
    """
    #include <poll.h>
    #include <time.h>

    /* poll(2) with nanoseconds. */
    static inline int poll_ns(struct pollfd *list, unsigned long n, unsigned long ns) {
        struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
        return ppoll(list, n, &t, 0);
    }
    """
    int poll_ns(pollfd *list, unsigned long n, unsigned long ns) nogil

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *buf, size_t n)
    ssize_t c_write "write"(int fd, const void *buf, size_t n)
    int c_close "close"(int fd)
