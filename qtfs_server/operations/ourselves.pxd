"""Where the kernel would take the engine, which does the work, for who wants it done."""
from libc.stdint cimport uint8_t

from qtfs_server.session cimport handle, session

cdef size_t link_not_ours(char *target, size_t length) noexcept nogil
cdef bint moves_ourselves(session *s, const handle *h, const uint8_t *data, size_t size) noexcept nogil
