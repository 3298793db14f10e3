"""Paths of a session's nodes, kept where the next engine finds them."""
from libc.stdint cimport uint32_t

from qtfs_server.session cimport session

cdef uint32_t text_new_locked(session *s, const char *text) noexcept nogil
cdef void text_free_locked(session *s, uint32_t text) noexcept nogil
cdef size_t text_copy(const session *s, uint32_t text, char *out, size_t room) noexcept nogil
