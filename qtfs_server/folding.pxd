"""Folded nodes."""
from libc.stdint cimport uint32_t

from qtfs_server.session cimport node, session

cdef bint fold_locked(session *s, node *n) noexcept nogil
cdef node *unfold_locked(session *s, uint32_t index) noexcept nogil
cdef void drop_folded_locked(session *s, uint32_t index) noexcept nogil
