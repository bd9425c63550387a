"""Cython's view of _marks.h, which owns layout and meaning; the table as an object, for engines."""
from libc.stdint cimport uint8_t, uint32_t


cdef extern from "_marks.h" nogil:
    const uint32_t MARKS_HEADER
    void marks_vnet_out(uint8_t *vnet) noexcept
    void marks_vnet_in(uint8_t *vnet) noexcept
    void marks_prefix(uint8_t *to, uint8_t first, uint32_t mark) noexcept
    ctypedef struct mark_table_t:
        uint32_t *child
        uint32_t highest
        uint32_t turn
    uint32_t marks_child(const mark_table_t *t, uint32_t mark) noexcept
    void marks_enter(mark_table_t *t) noexcept
    void marks_leave(mark_table_t *t) noexcept
    uint32_t marks_turn(const mark_table_t *t) noexcept
    bint marks_settled(const mark_table_t *t, uint32_t then) noexcept


cdef extern from "_turns.h" nogil:
    void turn_enter(uint32_t *turn) noexcept
    void turn_leave(uint32_t *turn) noexcept
    uint32_t turn_now(const uint32_t *turn) noexcept
    bint turn_over(const uint32_t *turn, uint32_t then) noexcept


cdef class MarkTable:
    cdef mark_table_t t
