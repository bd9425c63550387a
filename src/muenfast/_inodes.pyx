"""What of directories Python has no calls for: files without a name, allocated in full, many in one call, for the kernel
clears their memory while others run; and who is told when names change."""
from libc.errno cimport EINTR, errno
from libc.stdlib cimport free, malloc
from posix.fcntl cimport O_CLOEXEC, O_RDWR, open as open_file
from posix.unistd cimport close

cdef extern from "<fcntl.h>" nogil:
    int O_TMPFILE
    int posix_fallocate(int fd, long long offset, long long length)


cdef int allocated(const char *directory, long long size) noexcept nogil:
    """The descriptor of such a file, open to read and write, mode 0600 less the umask; -1: there is none."""
    cdef int status = EINTR, fd = open_file(directory, O_RDWR | O_CLOEXEC | O_TMPFILE, 0o600)
    if fd < 0:
        return -1
    while status == EINTR:
        status = posix_fallocate(fd, 0, size)
    if status != 0:
        close(fd)
        return -1
    return fd


def allocate(bytes directory, list sizes):
    """Descriptors of new files in `directory` of so many bytes each, in that order, up to the first that cannot be had: who
    tries that one again by itself hears why. Raises MemoryError."""
    cdef Py_ssize_t k, done = 0, n = len(sizes)
    cdef const char *where = directory
    cdef long long *lengths = <long long *>malloc((n + 1) * sizeof(long long))
    cdef int *fds = <int *>malloc((n + 1) * sizeof(int))
    try:
        if lengths == NULL or fds == NULL:
            raise MemoryError
        for k in range(n):
            lengths[k] = sizes[k]
        with nogil:
            while done < n:
                fds[done] = allocated(where, lengths[done])
                if fds[done] < 0:
                    break
                done += 1
        return [fds[k] for k in range(done)]
    finally:
        free(lengths)
        free(fds)


cdef extern from "<sys/inotify.h>" nogil:
    int inotify_init1(int flags)
    int inotify_add_watch(int fd, const char *path, unsigned int mask)
    int inotify_rm_watch(int fd, int watch)
    int IN_CLOEXEC, IN_ATTRIB, IN_CREATE, IN_DELETE, IN_MODIFY, IN_MOVED_FROM, IN_MOVED_TO, IN_ONLYDIR


def watch_names(bytes directory):
    """(descriptor, watch) of an inotify(7) queue that tells whose name in `directory` was made, removed or moved, or who was
    written to by write(2), or truncated. Raises OSError."""
    cdef int fd = inotify_init1(IN_CLOEXEC), watch, error
    if fd < 0:
        raise OSError(errno, "inotify_init1")
    watch = inotify_add_watch(fd, directory, IN_ATTRIB | IN_CREATE | IN_DELETE | IN_MODIFY | IN_MOVED_FROM | IN_MOVED_TO
                              | IN_ONLYDIR)
    if watch < 0:
        error = errno
        close(fd)
        raise OSError(error, "inotify_add_watch")
    return fd, watch


def end_watch(int fd, int watch):
    """Makes who reads the queue see a last event. Raises OSError."""
    if inotify_rm_watch(fd, watch) < 0:
        raise OSError(errno, "inotify_rm_watch")
