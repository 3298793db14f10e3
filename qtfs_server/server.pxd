"""Connections, the shared epoll, worker threads."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from qtfs_common.transport cimport message
from qtfs_server.connection cimport connection
from qtfs_server.dispatch cimport counters
from qtfs_server.identity cimport identity
from qtfs_server.session cimport session

cdef enum source_kind:              # what an epoll event comes from
    SOURCE_CONNECTION = 1
    SOURCE_LISTENER = 2
    SOURCE_STOP = 3

cdef struct listener:
    int kind
    int fd
    bint needs_authentication

cdef struct worker:
    identity me
    uint8_t *inbox
    uint8_t *outbox
    uint8_t *scratch
    counters count
    int spin_credit                 # positive while spinning pays

cdef class Server:
    cdef int epoll_fd
    cdef int stop_fd
    cdef int spare_fd               # given up to accept and refuse a connection when descriptors have run out
    cdef int listener_count
    cdef listener listeners[64]
    cdef listener stop_source
    cdef list workers
    cdef dict sessions
    cdef object key
    cdef readonly double grace_s
    cdef bint stopping
    cdef int _session_message(self, connection *c, const message *msg) except -2
    cdef bytes _hello(self, connection *c, bytes body)
    cdef bytes _authenticate(self, connection *c, bytes body)
    cdef bytes _mount(self, connection *c, bytes body)
    cdef bytes _attach(self, connection *c, bytes body)
    cdef int _bind(self, connection *c, session *s, uint32_t slot) except -1
    cdef int _end_session(self, session *s, connection *asking) except -1
