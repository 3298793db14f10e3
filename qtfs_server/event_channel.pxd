"""Serving a session's event channel."""
from libc.stdint cimport uint64_t

from qtfs_common.transport cimport message
from qtfs_server.connection cimport connection
from qtfs_server.session cimport session
from qtfs_server.worker cimport worker

cdef void open_events(connection *c) noexcept
cdef void answer_wait(session *s, uint64_t tag, int error) noexcept nogil
cdef int serve_event(worker *w, connection *c, const message *msg) noexcept nogil
cdef void let_all_go(session *s) noexcept nogil
cdef void abandon_all(session *s) noexcept nogil
cdef void abandon_later(session *s) noexcept nogil
