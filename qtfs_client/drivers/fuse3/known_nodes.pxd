"""Nodes that special rules are about, and those that the kernel forgot."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_client.drivers.fuse3.special_state cimport special_state

cdef struct standing:               # what is known of a node
    uint32_t vertex
    bint read_only

cdef bint find_known(special_state *s, uint64_t id, standing *out) noexcept nogil
cdef void note_known(special_state *s, uint64_t id, uint32_t vertex, bint read_only) noexcept nogil
cdef void forget_known(special_state *s, uint64_t id, uint64_t lookups) noexcept nogil
