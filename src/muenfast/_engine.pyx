"""What the block engines share: the life of an engine that serves."""
from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from muenfast._blocksum cimport CHECKSUM_AUTO, CHECKSUM_OFF, CHECKSUM_REQUIRE
from muenfast._ring cimport *
from muenfast._thread cimport TIMER_SLACK_NS, prepare_thread
from muenfast._wire cimport *

from muenfast.errors import UsageError

# What an end does about checksums, and what `muenfast stat` shows of that. "off": it has none; "idle": nobody is connected;
# "agreed"; "plain": the other side has none; "refused": and is not served for that.
CHECKSUM_MODES = ("off", "auto", "require")
CHECKSUM = ("off", "idle", "agreed", "plain", "refused")


cdef uint32_t checksum_mode(object text) except? 0:
    """CHECKSUM_OFF, ... of one of CHECKSUM_MODES. Raises UsageError."""
    modes = {"off": CHECKSUM_OFF, "auto": CHECKSUM_AUTO, "require": CHECKSUM_REQUIRE}
    if text not in modes:
        raise UsageError(f"checksums are one of {', '.join(CHECKSUM_MODES)}", option="checksum", value=text)
    return modes[text]


cdef str checksum_word(uint32_t mode, bint connected, bint agreed, bint refused):
    """One of CHECKSUM."""
    if mode == CHECKSUM_OFF:
        return "off"
    if not connected:
        return "idle"
    return "agreed" if agreed else "refused" if refused else "plain"


cdef class ServerEngine:
    """Two channels and their bells, and the life of the engine that serves over them.

    run() belongs to one thread; stop(), counters and state may be used from others.
    """
    EVENTS = ("tick", "connected", "disconnected", "incompatible", "overrun", "stopped", "unruly")
    FIELDS = ()     # of a request, that a client can get wrong

    cdef int bind(self, object request, object response, object request_bell, object response_bell, uint64_t request_size,
                  uint64_t response_size, uint64_t request_protocol, uint64_t response_protocol, object poll,
                  Watch watch) except -1:
        """Takes the memory of both channels, and of their bells or None. poll: microseconds or None."""
        self.request = hold(request, False, SHMSTREAM_HEADER_SIZE + request_size)
        self.response = hold(response, True, SHMSTREAM_HEADER_SIZE + response_size)
        reader_init(self.r, self.request.base, self.request.length, request_size, request_protocol)
        writer_init(self.w, self.response.base, self.response.length, response_size, response_protocol)
        self.r.broken = self.request.broken
        self.w.broken = self.response.broken
        self.r.poll_ns = 0 if poll is None else poll * 1000
        if watch is not None:
            self.watch = watch
            self.r.watch = &watch.w
        if request_bell is not None:
            self.request_bell = hold(request_bell, True, sizeof(bell_page))
            self.r.bell = self.request_bell.as_bell()
        if response_bell is not None:
            self.response_bell = hold(response_bell, True, sizeof(bell_page))
            self.w.bell = self.response_bell.as_bell()
        return 0

    cdef int introduce(self, bytes identity, uint32_t flags, uint32_t zeroes) except -1:
        """Ends what a dead predecessor left: its epoch must not look alive, for its answers are nobody's, and our store
        is not its. Then tells the other side, who may believe it or not, what stands behind the channel."""
        writer_stop(self.w)
        if self.w.bell != NULL:
            memcpy(self.w.bell.store, PyBytes_AS_STRING(identity), 16)
            store_relaxed32(&self.w.bell.flags, flags)
            store_relaxed32(&self.w.bell.zeroes, zeroes)
            store_release32(&self.w.bell.state, ENDPOINT_SERVING)
        return 0

    cdef bint held(self) noexcept:
        """Whether the channels' memory is still ours to touch."""
        return self.response is not None and self.response.held

    cdef str taken_away(self):
        """What `broken` says."""
        return "request" if was_taken(self.request) else "response" if was_taken(self.response) else None

    cdef void drop(self) noexcept:
        """Lets go of the channels' memory."""
        self.r.bell = NULL
        self.w.bell = NULL
        for m in (self.request, self.response, self.request_bell, self.response_bell):
            if m is not None:
                (<Mapping>m).drop()

    cdef int step(self) noexcept nogil:
        """One look at the requests: STEP_WORKED, STEP_IDLE, or a server_event; SERVER_STOPPED once `ending` says so, and
        SERVER_TICK after a nudge."""
        return SERVER_STOPPED

    cdef void wait(self, uint64_t ns) noexcept nogil:
        """Returns when there may be something to do, after ns nanoseconds at the latest."""

    cdef void land(self) noexcept nogil:
        """Waits until nothing is under way, answers it, and lets go of what that takes; before close(), and for good."""

    cdef server_event loop(self, uint64_t ns) noexcept nogil:
        """Serves for at most ns nanoseconds, or until something happened that the caller logs."""
        cdef uint64_t start = now_ns(), passed
        cdef int step
        while True:
            step = self.step()
            if step >= 0:
                return <server_event>step
            if step == STEP_WORKED and (self.r.batches & 0xff) != 0:
                continue
            passed = now_ns() - start
            if passed >= ns:
                return SERVER_TICK
            if step == STEP_WORKED:
                continue
            self.wait(ns - passed)

    def run(self, seconds=1.0):
        """Serves for about `seconds` or until something happened; the event's name (one of EVENTS)."""
        cdef uint64_t ns = <uint64_t>(seconds * 1e9)
        cdef server_event event
        if not busy_enter(&self.busy):
            raise UsageError(f"another thread runs this {type(self).__name__}")
        if not self.held():
            busy_leave(&self.busy)
            raise UsageError(f"this {type(self).__name__} is closed")
        with nogil:
            prepare_thread(TIMER_SLACK_NS, 1)
            event = self.loop(ns)
        busy_leave(&self.busy)
        return self.happened(event)

    cdef object happened(self, int event):
        if event == SERVER_CONNECTED:
            self.connected = True
        elif event == SERVER_DISCONNECTED or event == SERVER_INCOMPATIBLE:
            self.connected = False
        return self.EVENTS[event]

    def stop(self, *, now=False):
        """Makes run() return "stopped" once nothing is under way; from any thread. now: a user-space store's calls are
        waited for AIO_END_NS at most; what they were about gets no answer then."""
        if self.ending == NULL:         # no engine: of the base class
            return
        if now or not stopping(self.ending):
            store_release32(self.ending, STOP_NOW if now else STOP_SOON)
        self.kick()

    def nudge(self):
        """Makes run() return "tick" soon, once, though its time is not over; from any thread. Unless it is to stop."""
        if self.ending != NULL and compare_exchange_acqrel32(self.ending, 0, STOP_NUDGED):
            self.kick()

    cdef void kick(self) noexcept:
        """Wakes the thread that waits in run(), where it sleeps on a bell; elsewhere it looks by itself."""
        if self.r.bell != NULL:
            bell_kick(self.r.bell)

    @property
    def fault(self):
        """What an incompatible request channel's header holds: (protocol, size, elements), as read now."""
        if not self.held():
            return (0, 0, 0)
        return (load_relaxed64(&self.r.hdr.protocol), load_relaxed64(&self.r.hdr.size),
                load_relaxed64(&self.r.hdr.elements))

    @property
    def conduct(self):
        """Of the client, by its requests: FIELDS."""
        return conduct_of(self, self.r, self.FIELDS)

    @property
    def batches(self):
        """Rounds in which requests came."""
        return 0 if self.r == NULL else load_relaxed64(&self.r.batches)

    @property
    def waiting(self):
        """Requests that the client has written and this side has not taken yet; 0 while none is connected."""
        if not self.held() or self.r.epoch == 0:
            return 0
        return min(load_relaxed64(&self.r.hdr.wc) - load_relaxed64(&self.r.rc), self.r.elements)

    @property
    def attached(self):
        """Whether a client that run() has told of is there still: one that has left is seen at once here, by run() at its next
        look."""
        return bool(self.connected and self.held() and load_acquire64(&self.r.hdr.epoch) != 0)

    @property
    def broken(self):
        """Name of what was taken away by its owner ("request", "response", "buffer"), or None."""
        return self.taken_away()

    cdef void succeed(self, ServerEngine other) noexcept:
        """Goes on with the channels' counters of another (closed) engine."""
        self.r.overruns = other.r.overruns
        self.r.lost_total = other.r.lost_total
        self.r.quarantines = other.r.quarantines
        memcpy(self.r.offences, other.r.offences, sizeof(self.r.offences))

    def close(self, *, gone=False, resizing=False):
        """Deactivates the response channel. gone: for good, not "back later"; resizing: back at once, with another size."""
        if not self.held():
            return
        if not busy_enter(&self.busy):
            raise UsageError(f"stop this {type(self).__name__} before closing it")
        if not self.held():             # another thread was faster
            busy_leave(&self.busy)
            return
        with nogil:
            self.land()
        if self.w.bell != NULL:         # first: who sees the channel inactive sees why
            store_release32(&self.w.bell.state, ENDPOINT_GONE if gone else ENDPOINT_RESIZING if resizing
                            else ENDPOINT_BACK_LATER)
        writer_stop(self.w)
        if self.w.bell != NULL:
            bell_kick(self.w.bell)
        self.drop()
        self.connected = False
        busy_leave(&self.busy)
