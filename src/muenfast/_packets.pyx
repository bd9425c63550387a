"""Packets, memory to memory: super-packets split and made, checksums, the path's MTU. What Python sees of _packets.pxd."""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from muenfast._wire cimport busy_enter, busy_leave

from muenfast.errors import UsageError

FLOWS = COALESCE_FLOWS      # that a Coalescer holds at once
RATE, BURST = PMTU_RATE, PMTU_BURST     # news a second, and at once

_REFUSED = {
    SEGMENT_NOT_IP: "it is neither IPv4 nor IPv6",
    SEGMENT_SHORT: "it ends before its headers do",
    SEGMENT_LENGTH: "its headers tell another length",
    SEGMENT_LONG: "it is longer than the MTU and cannot be split",
    SEGMENT_CHECKSUM: "its header asks for no checksum that it could have",
    SEGMENT_KIND: "its kind is neither TCP over IPv4 or IPv6 nor UDP",
    SEGMENT_SIZE: "its segments are to have no bytes",
    SEGMENT_HEADERS: "its headers are not those of its kind",
    SEGMENT_EMPTY: "it carries nothing",
}
_KINDS = {"tcp4": COALESCE_TCP4, "tcp6": COALESCE_TCP6, "udp": COALESCE_UDP}


cdef class _View:
    """The bytes of an object, while this one is alive."""
    cdef Py_buffer view
    cdef const uint8_t *base
    cdef uint32_t length

    def __cinit__(self, data, str what):
        PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)
        if self.view.len > INET_MOST:
            PyBuffer_Release(&self.view)
            raise UsageError(f"a packet has at most {INET_MOST} bytes", option=what, value=len(data))
        self.base = <const uint8_t *>self.view.buf
        self.length = <uint32_t>self.view.len

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


def checksum(data):
    """The Internet checksum of any bytes (RFC 1071), as a packet holds it in its first two bytes."""
    cdef Py_buffer view
    cdef uint16_t found
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    with nogil:
        found = sum_checksum(sum_bytes(view.buf, <size_t>view.len))
    PyBuffer_Release(&view)
    return PyBytes_FromStringAndSize(<char *>&found, 2)


def copy_checksum(data, *, foreign=False):
    """A copy of data, and its checksum, made in one pass. foreign: by the pass that loads each byte once."""
    cdef _View v = _View(data, "data")
    cdef bytes copy = PyBytes_FromStringAndSize(NULL, v.length)
    cdef uint16_t found
    cdef uint64_t sum
    if foreign:
        sum = sum_taken(PyBytes_AS_STRING(copy), v.base, v.length)
    else:
        sum = sum_given(PyBytes_AS_STRING(copy), v.base, v.length)
    found = sum_checksum(sum)
    return copy, PyBytes_FromStringAndSize(<char *>&found, 2)


def split(packet, header, mtu):
    """The packets, each with all its checksums, that a packet of a TUN device becomes; header: its virtio_net_hdr, 10 bytes.

    mtu: most bytes of one. UsageError where the packet is not what its header says.
    """
    cdef _View p = _View(packet, "packet"), h = _View(header, "header")
    cdef vnet_header v
    cdef segmenter s
    cdef int count
    cdef uint32_t most
    cdef bytes one
    if h.length != sizeof(v):
        raise UsageError(f"a virtio_net_hdr has {sizeof(v)} bytes", option="header", value=h.length)
    if not 1 <= mtu <= INET_MOST:
        raise UsageError(f"1 .. {INET_MOST}", option="mtu", value=mtu)
    memcpy(&v, h.base, sizeof(v))
    count = segment_begin(&s, &v, p.base, p.length, mtu)
    if count < 0:
        raise UsageError(_REFUSED[count], option="packet")
    most = segment_longest(&s)
    found = []
    while s.left:
        one = PyBytes_FromStringAndSize(NULL, most)
        found.append(one[:segment_next(&s, <uint8_t *>PyBytes_AS_STRING(one))])
    return found


@cython.final
cdef class Coalescer:
    """Packets of one flow become super-packets; for one thread.

    kinds: what may be merged, of "tcp4", "tcp6", "udp"; default: all.
    """
    cdef coalescer c
    cdef uint8_t *memory
    cdef uint32_t busy

    def __cinit__(self, kinds=("tcp4", "tcp6", "udp")):
        cdef uint32_t bits = 0
        for kind in kinds:
            if kind not in _KINDS:
                raise UsageError(f"one of {', '.join(_KINDS)}", option="kinds", value=kind)
            bits |= <uint32_t>_KINDS[kind]
        self.memory = <uint8_t *>malloc(COALESCE_MEMORY)    # touched as far as it is used
        if self.memory == NULL:
            raise MemoryError()
        coalesce_init(&self.c, self.memory, bits)

    def __dealloc__(self):
        free(self.memory)

    cdef int enter(self) except -1:
        if not busy_enter(&self.busy):
            raise UsageError("another thread uses this Coalescer")
        return 0

    cdef list taken(self):
        """Copies of what is ready."""
        cdef const coalesce_ready *r
        found = []
        while True:
            r = coalesce_take(&self.c)
            if r == NULL:
                return found
            found.append((r.key, PyBytes_FromStringAndSize(<char *>r.packet - sizeof(vnet_header), sizeof(vnet_header)),
                          PyBytes_FromStringAndSize(<char *>r.packet, r.length)))

    def add(self, element, key=0):
        """Takes the packet at the beginning of element, whose own length counts; what is ready by that, of any flow:
        (key, virtio_net_hdr, packet).

        key: packets with different ones are never merged. UsageError where it is no packet.
        """
        cdef _View v = _View(element, "element")
        cdef int status
        if not 0 <= key <= UINT64_MAX:
            raise UsageError("a key is a number of 64 bits", option="key", value=key)
        self.enter()
        status = coalesce_place(&self.c, v.base, v.length, key)
        if status != 0:
            busy_leave(&self.busy)
            raise UsageError("its length is not what its headers tell" if status == COALESCE_FRAME
                             else "it is neither IPv4 nor IPv6", option="element")
        coalesce_commit(&self.c)
        found = self.taken()
        busy_leave(&self.busy)
        return found

    def flush(self):
        """What is held, ready or not, the oldest first; as add()."""
        self.enter()
        coalesce_flush(&self.c)
        found = self.taken()
        busy_leave(&self.busy)
        return found

    @property
    def merged(self):
        """Packets that were added to another one."""
        return self.c.merged

    @property
    def supers(self):
        """Super-packets that were made."""
        return self.c.supers

    @property
    def rejected(self):
        """Packets that were not merged for their checksums alone."""
        return self.c.rejected


def pmtu(packet, entry):
    """What becomes of a packet where its mark's path MTU is entry: ("fits", []), ("fragments", [fragment, ...]),
    ("news", [ICMP packet to its sender]), ("nothing", []).

    entry: as it stands in the region: 0 is no limit, and too small a one counts as the smallest.
    """
    cdef _View p = _View(packet, "packet")
    cdef pmtu_fragments f
    cdef pmtu_verdict verdict
    cdef uint32_t limit, left
    cdef bytes one
    if not 0 <= entry <= UINT32_MAX:
        raise UsageError("an entry is a number of 32 bits", option="entry", value=entry)
    if p.length == 0:
        return "nothing", []
    limit = pmtu_of(entry, p.base[0])
    verdict = pmtu_look(p.base, p.length, limit)
    if verdict == PMTU_FITS:
        return "fits", []
    if verdict == PMTU_NOTHING:
        return "nothing", []
    found = []
    if verdict == PMTU_NEWS:
        one = PyBytes_FromStringAndSize(NULL, PMTU_NEWS_MOST)
        found.append(one[:pmtu_news(p.base, p.length, limit, <uint8_t *>PyBytes_AS_STRING(one))])
        return "news", found
    left = pmtu_fragments_begin(&f, p.base, p.length, limit)
    while left:
        one = PyBytes_FromStringAndSize(NULL, limit)
        found.append(one[:pmtu_fragments_next(&f, <uint8_t *>PyBytes_AS_STRING(one))])
        left -= 1
    return "fragments", found


@cython.final
cdef class Bucket:
    """RATE news a second, BURST at once."""
    cdef pmtu_bucket b

    def allowed(self, now):
        """Whether one more may be sent; now: nanoseconds that never go back."""
        return pmtu_allowed(&self.b, now)


@cython.final
cdef class Gather:
    """Whether a sender's packets are to gather, by what came."""
    cdef gather g

    def now(self, packets, now):
        """packets: since it was asked last; now: nanoseconds that never go back."""
        return gather_now(&self.g, packets, now)
