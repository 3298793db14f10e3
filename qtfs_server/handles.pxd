"""Handles of a session."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_common.protocol cimport open_reply
from qtfs_server.session cimport handle, node, session

cdef uint64_t lost_handles

cdef int session_room(session *s, bint with_handle, int directory, const char *name) noexcept nogil
cdef int handle_new(session *s, node *n, int fd, uint32_t flags, uint32_t open_flags, uint64_t *id) noexcept nogil
cdef int handle_new_stream(session *s, node *n, int fd, uint32_t flags, open_reply *out) noexcept nogil
cdef int handle_hold(session *s, uint64_t id, handle **out) noexcept nogil
cdef int handle_pin(session *s, uint64_t id, handle **out) noexcept nogil
cdef void handle_unpin(session *s, handle *h) noexcept nogil
cdef int handle_end(session *s, uint64_t id) noexcept nogil
cdef void see_to_hung_closes() noexcept nogil

ctypedef void (*stream_function)(void *) noexcept nogil
cdef void set_stream_functions(stream_function released, stream_function closing) noexcept nogil
