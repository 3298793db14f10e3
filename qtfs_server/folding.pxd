"""Folded nodes."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from qtfs_server.includes.linux cimport file_handle
from qtfs_server.session cimport node, session

cdef bint fold_locked(session *s, node *n) noexcept nogil
cdef node *unfold_locked(session *s, uint32_t index) noexcept nogil
cdef void keep_handle(node *n, const file_handle *of) noexcept nogil
cdef uint8_t *kept_handle(const node *n) noexcept nogil
cdef void shape_restore_locked(session *s, uint16_t index) noexcept nogil
cdef void drop_folded_locked(session *s, uint32_t index) noexcept nogil
