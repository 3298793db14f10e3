"""open(2) of FIFOs that waits for the other end."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.request cimport request
from qtfs_server.session cimport node, session

cdef int wait_to_open(request *r, node *n, uint32_t flags) noexcept nogil
cdef bint cancel_opening(session *s, uint64_t tag) noexcept nogil
cdef void abandon_openings(session *s) noexcept nogil
cdef bint press_cancelled() noexcept nogil
cdef bint suspend_openings() noexcept nogil
cdef void go_on_opening() noexcept nogil
