"""Connections, the shared epoll, worker threads."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from qtfs_common.protocol cimport header
from qtfs_common.rings.memory cimport ring_memory
from qtfs_common.transport cimport message
from qtfs_server.connection cimport connection
from qtfs_server.session cimport session

cdef enum source_kind:              # what an epoll event comes from
    SOURCE_CONNECTION = 1
    SOURCE_LISTENER = 2
    SOURCE_STOP = 3

cdef struct listener:
    int kind
    int fd
    bint needs_authentication
    ring_memory *memory             # what it is the bell of; NULL: its sockets carry the messages

cdef class Errand:                  # a request that a thread of its own carries out
    cdef Server server
    cdef connection *c              # where the reply goes; it is the errand's until then
    cdef session *s                 # a counted reference, until it is settled
    cdef readonly uint64_t session  # the session's id
    cdef uint32_t slot
    cdef header head
    cdef bint begun                 # the worker that brought it has let go of its connection
    cdef bytes reply                # once it is settled; empty: the connection ends
    cdef readonly bytes body        # of the request, behind its caller
    cdef readonly uint32_t uid
    cdef int _send(self, connection *c) except -1

cdef class Server:
    cdef int epoll_fd
    cdef int stop_fd
    cdef int spare_fd               # given up to accept and refuse a connection when descriptors have run out
    cdef listener listeners[64]     # those in use are of kind SOURCE_LISTENER
    cdef listener stop_source
    cdef list workers
    cdef dict sessions
    cdef object key
    cdef readonly double grace_s
    cdef bint stopping
    cdef object carrier             # carries errands out: errands.Errands
    cdef dict errands               # (session id, slot): the one under way
    cdef uint64_t malformed_errands
    cdef dict joining               # connection: the errand whose repetition came there
    cdef int _new_errand(self, connection *c, const message *msg) except -2
    cdef int _join_errand(self, connection *c, const message *msg) except -2
    cdef int _begin_errand(self, connection *c) except -2
    cdef int _session_message(self, connection *c, const message *msg) except -2
    cdef bytes _hello(self, connection *c, bytes body)
    cdef bytes _authenticate(self, connection *c, bytes body)
    cdef bytes _mount(self, connection *c, bytes body)
    cdef bytes _attach(self, connection *c, bytes body)
    cdef int _bind(self, connection *c, session *s, uint32_t slot) except -1
    cdef int _end_session(self, session *s, connection *asking) except -1
