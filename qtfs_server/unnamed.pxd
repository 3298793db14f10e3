"""Open files that have no name (any more)."""
from libc.stdint cimport uint64_t

from qtfs_server.session cimport node, session

cdef void opened_unnamed(session *s, uint64_t id) noexcept nogil
cdef void name_removed(session *s, const node *directory, uint64_t ino) noexcept nogil
cdef void store_all(session *s) noexcept nogil
