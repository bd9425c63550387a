"""What the block engines share."""
from muenfast._ring cimport Mapping
from muenfast._wire cimport load_acquire32


cdef enum:
    BATCH = 64              # most requests of one round: one validation, one publish


cdef inline str taken_away(Mapping request, Mapping response):
    """Name of the channel whose memory was taken away ("request", "response"), or None."""
    if request is not None and request.held and load_acquire32(request.broken):
        return "request"
    if response is not None and response.held and load_acquire32(response.broken):
        return "response"
    return None
