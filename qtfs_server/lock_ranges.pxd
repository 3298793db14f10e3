"""Ranges of a file that one owner has locked, as POSIX has them: sorted, disjoint, neighbours of one type merged."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.session cimport session

cdef enum:
    SHARED = 0                      # lock_request.type
    EXCLUSIVE = 1
    UNLOCKED = 2
    SPARES = 2                      # what one change may take: a range may be cut in two by a new one

cdef struct held_range:
    uint64_t start
    uint64_t end                    # inclusive
    uint32_t type
    held_range *next

cdef struct held_ranges:
    session *s                      # whose share they are of
    held_range *first
    held_range *spare
    uint32_t spares

cdef int ranges_reserve(held_ranges *ranges) noexcept nogil
cdef void ranges_change(held_ranges *ranges, uint64_t start, uint64_t end, uint32_t type) noexcept nogil
cdef bint ranges_conflict(const held_ranges *ranges, uint64_t start, uint64_t end, uint32_t type) noexcept nogil
cdef void ranges_free(held_ranges *ranges) noexcept nogil
