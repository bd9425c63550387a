"""Marks on their way between net_hdr and the kernel, and the table that says whose they are."""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from muenfast._wire cimport now_ns, sleep_ns, store_relaxed32

from muenfast.errors import UsageError

cdef enum:
    PAUSE_NS = 50000
    VNET_BYTES = 10     # struct virtio_net_hdr


@cython.final
cdef class MarkTable:
    """Which child of one parent each mark belongs to: number 0 is the parent.

    highest: the largest mark that can belong to a child, for life. An engine's receiving thread reads `t` without the
    GIL (_marks.h: marks_enter, marks_child, marks_leave) while set() changes it; settle() tells when the number of a
    child that has no marks any more is in no one's hands.
    """

    def __cinit__(self, uint32_t highest):
        if highest >= 1 << 24:
            raise UsageError("the highest mark of a table is below 2^24", value=highest)
        self.t.child = <uint32_t *>calloc(highest + 1, sizeof(uint32_t))
        if self.t.child == NULL:
            raise MemoryError
        self.t.highest = highest

    def __dealloc__(self):
        free(self.t.child)

    @property
    def highest(self):
        return self.t.highest

    def set(self, uint32_t mark, uint32_t child):
        """Gives a mark, 1 to highest, to a child. Raises UsageError."""
        if not 1 <= mark <= self.t.highest:
            raise UsageError(f"a mark here is 1 to {self.t.highest}", value=mark)
        store_relaxed32(&self.t.child[mark], child)

    def get(self, uint32_t mark):
        """Whose a mark of an incoming packet is, any 32 bits."""
        return marks_child(&self.t, mark)

    def settle(self, double seconds):
        """Waits until the receiver has nothing in hand that it looked up before this call; whether it has not, by then."""
        cdef uint32_t then = marks_turn(&self.t)
        cdef uint64_t end = now_ns() + <uint64_t>(seconds * 1e9)
        cdef bint settled
        with nogil:
            while True:
                settled = marks_settled(&self.t, then)
                if settled or now_ns() >= end:
                    break
                sleep_ns(PAUSE_NS)
        return settled

    def enter(self):
        """Begins a turn of the receiver, as an engine does without the GIL. One receiver at a time."""
        marks_enter(&self.t)

    def leave(self):
        """Ends it."""
        marks_leave(&self.t)


def prefix(uint8_t first, uint32_t mark):
    """What stands before a packet that begins with the byte `first` when it is written with a mark."""
    cdef uint8_t to[8]
    marks_prefix(to, first, mark)
    return to[:MARKS_HEADER]


def vnet_out(bytes header):
    """struct virtio_net_hdr that was read before net_hdr, with offsets that count from the packet on."""
    return _moved(header, False)


def vnet_in(bytes header):
    """The same of a packet that is written with a prefix: offsets count from that on."""
    return _moved(header, True)


cdef bytes _moved(bytes header, bint inward):
    cdef uint8_t vnet[VNET_BYTES]
    if len(header) != VNET_BYTES:
        raise UsageError(f"struct virtio_net_hdr has {VNET_BYTES} bytes", value=len(header))
    memcpy(vnet, PyBytes_AS_STRING(header), VNET_BYTES)
    if inward:
        marks_vnet_in(vnet)
    else:
        marks_vnet_out(vnet)
    return vnet[:VNET_BYTES]
