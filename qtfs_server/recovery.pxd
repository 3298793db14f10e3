"""Sessions that a former engine left."""
from libc.stdint cimport uint32_t

from qtfs_server.passing cimport passed
from qtfs_server.session cimport session
from qtfs_server.state_file cimport state_header

cdef session *recover(state_header *state, int fd, passed *given, uint32_t count) noexcept nogil
cdef void wake_pollers(session *s) noexcept nogil
cdef uint32_t lock_all_again(session *s) noexcept nogil
