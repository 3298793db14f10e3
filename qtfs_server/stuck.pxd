"""What hangs in the server's file systems."""
from libc.stdint cimport uint8_t, uint64_t

from qtfs_server.request cimport execution, request
from qtfs_server.session cimport node, session

cdef enum:
    MAX_WORKERS = 512

cdef void note_execution(request *r) noexcept nogil
cdef bint has_to_wait(session *s, const execution *at, const uint8_t *body, size_t body_bytes) noexcept nogil
cdef bint leads_to_stuck(session *s, const node *directory, const char *name) noexcept nogil
cdef bint is_stuck(uint64_t number) noexcept nogil
cdef bint close_hangs(uint64_t number) noexcept nogil

cdef uint64_t judge(session *s, const execution *at)
cdef void publish(list stuck)
