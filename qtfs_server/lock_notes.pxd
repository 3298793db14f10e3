"""Locks of a session, noted for the next engine."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.lock_ranges cimport held_ranges
from qtfs_server.session cimport session

cdef void note_ranges(session *s, uint32_t *note, uint64_t owner, uint64_t handle, const held_ranges *ranges) noexcept nogil
cdef void drop_note(session *s, uint32_t note) noexcept nogil
