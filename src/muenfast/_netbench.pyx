"""Load for `muenfast bench net`, without the GIL: streams, datagrams and echoes on sockets that the caller made, in
whatever network namespace.

Every call ends by itself: at a time (`until`, nanoseconds of CLOCK_MONOTONIC), or after a number of echoes. A socket to
receive on has SO_RCVTIMEO set, so that nothing waits for good.
"""
from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, ENOBUFS, EPIPE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from muenfast._wire cimport load_relaxed64, now_ns, sleep_ns

import os as _os

from muenfast.errors import UsageError

cdef extern from "<sys/uio.h>" nogil:
    ctypedef struct iovec_t "struct iovec":
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    ctypedef struct msghdr_t "struct msghdr":
        iovec_t *msg_iov
        size_t msg_iovlen
    ctypedef struct mmsghdr_t "struct mmsghdr":
        msghdr_t msg_hdr
        unsigned int msg_len
    enum: MSG_NOSIGNAL
    enum: MSG_DONTWAIT
    ssize_t send(int fd, const void *data, size_t n, int flags)
    ssize_t recv(int fd, void *data, size_t n, int flags)
    int sendmmsg(int fd, mmsghdr_t *list, unsigned int n, int flags)
    int recvmmsg(int fd, mmsghdr_t *list, unsigned int n, int flags, void *timeout)

cdef enum:
    BATCH = 64              # datagrams of one call
    MOST = 65536            # bytes of one
    PIECE = 128 << 10       # of a stream, one call
    ECHO_HEADER = 8         # RFC 792: type, code, checksum, identifier, number
    ECHO_SIZE = 64          # with as much payload as ping has
    ECHO_REQUEST = 8
    IP_LEAST = 20
    NAP_NS = 50_000         # between looks at an empty socket: 50 datagrams at a million a second


cdef class _Memory:
    """Zeros of our own."""
    cdef uint8_t *base

    def __cinit__(self, size_t length):
        self.base = <uint8_t *>calloc(1, length)
        if self.base == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.base)


cdef class _Words:
    """A writable buffer of at least one u64, for the length of one call."""
    cdef Py_buffer view
    cdef uint64_t *base
    cdef uint64_t count
    cdef bint held

    def __cinit__(self, memory):
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        self.held = True
        self.base = <uint64_t *>self.view.buf
        self.count = <uint64_t>self.view.len // 8
        if self.count == 0:
            raise UsageError(f"{self.view.len} bytes of memory are too few, 8 are needed")

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef class _Datagrams:
    """BATCH datagrams of `size` bytes, each with memory of its own."""
    cdef _Memory data
    cdef iovec_t parts[BATCH]
    cdef mmsghdr_t list[BATCH]

    def __cinit__(self, uint32_t size):
        cdef int k
        if not 1 <= size <= MOST:
            raise UsageError(f"a datagram has 1 to {MOST} bytes", value=size)
        self.data = _Memory(BATCH * size)
        for k in range(BATCH):
            self.parts[k].iov_base = self.data.base + k * size
            self.parts[k].iov_len = size
            self.list[k].msg_hdr.msg_iov = &self.parts[k]
            self.list[k].msg_hdr.msg_iovlen = 1


def tcp_send(int fd, uint64_t until):
    """Sends until the other end is closed, or `until`; bytes. Raises OSError."""
    cdef _Memory own = _Memory(PIECE)
    cdef uint64_t sent = 0
    cdef ssize_t n
    cdef int error = 0
    with nogil:
        while now_ns() < until:
            n = send(fd, own.base, PIECE, MSG_NOSIGNAL)
            if n >= 0:
                sent += n
            elif errno not in (EINTR, EAGAIN):
                error = errno
                break
    if error not in (0, EPIPE, ECONNRESET):
        raise OSError(error, _os.strerror(error))
    return sent


def tcp_receive(int fd, uint64_t until):
    """Receives until then; bytes. Raises OSError, EOFError."""
    cdef _Memory own = _Memory(PIECE)
    cdef uint64_t received = 0
    cdef ssize_t n = 1
    cdef int error = 0
    with nogil:
        while now_ns() < until:
            n = recv(fd, own.base, PIECE, 0)
            if n > 0:
                received += n
            elif n == 0:
                break
            elif errno not in (EINTR, EAGAIN):
                error = errno
                break
    if error != 0:
        raise OSError(error, _os.strerror(error))
    if n == 0:
        raise EOFError("the sender ended")
    return received


def udp_send(int fd, uint32_t size, stop, uint64_t until):
    """Datagrams at full speed until the first word of `stop` is not 0, or `until`; how many the kernel took. Raises
    OSError."""
    cdef _Datagrams own = _Datagrams(size)
    cdef _Words words = _Words(stop)
    cdef const uint64_t *word = words.base
    cdef uint64_t sent = 0
    cdef int n, error = 0
    with nogil:
        while load_relaxed64(word) == 0 and now_ns() < until:
            n = sendmmsg(fd, own.list, BATCH, 0)
            if n >= 0:
                sent += n
            elif errno not in (EINTR, EAGAIN, ENOBUFS):     # ENOBUFS: dropped on the way out, as others are
                error = errno
                break
    if error != 0:
        raise OSError(error, _os.strerror(error))
    return sent


def udp_receive(int fd, uint32_t size, uint64_t until):
    """How many datagrams of that size came until then. Raises OSError.

    It does not sleep in the socket: the sender of each datagram would pay for waking it.
    """
    cdef _Datagrams own = _Datagrams(size)
    cdef uint64_t received = 0
    cdef int n, k, error = 0
    with nogil:
        while now_ns() < until:
            n = recvmmsg(fd, own.list, BATCH, MSG_DONTWAIT, NULL)
            if n < 0:
                if errno not in (EINTR, EAGAIN):
                    error = errno
                    break
                sleep_ns(NAP_NS)
            for k in range(n):
                if own.list[k].msg_len == size:
                    received += 1
    if error != 0:
        raise OSError(error, _os.strerror(error))
    return received


cdef uint16_t inet_sum(const uint8_t *data, int n) noexcept nogil:
    """RFC 1071, of an even number of bytes."""
    cdef uint32_t total = 0
    cdef int k
    for k in range(0, n, 2):
        total += <uint32_t>data[k] << 8 | data[k + 1]
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return <uint16_t>~total


cdef inline bint answers(const uint8_t *packet, ssize_t n, const uint8_t *echo) noexcept nogil:
    """Whether an IP packet is the reply to that request: type 0, the same identifier and number."""
    cdef ssize_t start
    if n < IP_LEAST:
        return False
    start = (packet[0] & 15) * 4
    return (n >= start + ECHO_HEADER and packet[start] == 0 and packet[start + 4] == echo[4]
            and packet[start + 5] == echo[5] and packet[start + 6] == echo[6] and packet[start + 7] == echo[7])


def ping(int fd, uint16_t identifier, uint64_t pause, uint64_t patience, laps):
    """ICMP echoes on a raw socket that is connected, the next one `pause` nanoseconds after an answer; laps (an array of
    u64) receives the nanoseconds of each. Raises OSError; TimeoutError where one is not answered in `patience`
    nanoseconds.
    """
    cdef _Words times = _Words(laps)
    cdef uint64_t *lap = times.base
    cdef uint64_t k, start, now, count = times.count
    cdef uint8_t echo[ECHO_SIZE]
    cdef uint8_t packet[256]
    cdef uint16_t total
    cdef ssize_t n = 0
    cdef bint late = False
    cdef int error = 0
    for k in range(<uint64_t>ECHO_SIZE):
        echo[k] = <uint8_t>k
    with nogil:
        for k in range(count):
            echo[0], echo[1], echo[2], echo[3] = ECHO_REQUEST, 0, 0, 0
            echo[4], echo[5] = identifier >> 8, identifier & 255
            echo[6], echo[7] = (k >> 8) & 255, k & 255
            total = inet_sum(echo, ECHO_SIZE)
            echo[2], echo[3] = total >> 8, total & 255
            if k != 0 and pause != 0:
                sleep_ns(pause)
            start = now = now_ns()
            n = send(fd, echo, ECHO_SIZE, 0)
            while n >= 0 or errno in (EINTR, EAGAIN):
                n = recv(fd, packet, sizeof(packet), 0)
                now = now_ns()
                if n >= 0 and answers(packet, n, echo):
                    break
                late = now - start > patience
                if late:
                    break
            else:
                error = errno
            if late or error != 0:
                break
            lap[k] = now - start
    if late:
        raise TimeoutError(f"echo {k} was not answered within {patience / 1e9:g} s")
    if error != 0:
        raise OSError(error, _os.strerror(error))
