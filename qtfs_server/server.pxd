"""Sessions and errands of all clients."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from qtfs_common.protocol cimport header
from qtfs_common.transport cimport message
from qtfs_server.connection cimport connection
from qtfs_server.passing cimport Passed
from qtfs_server.service cimport Service
from qtfs_server.session cimport session
from qtfs_server.state_file cimport state_header

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

cdef class Server(Service):
    cdef object key
    cdef readonly double grace_s
    cdef object carrier             # carries errands out: errands.Errands
    cdef dict errands               # (session id, slot): the one under way
    cdef uint64_t malformed_errands
    cdef uint64_t resumed           # sessions that had lost every connection and got one again
    cdef int64_t probed_us          # when clients by vsock were last looked after
    cdef dict joining               # connection: the errand whose repetition came there
    cdef list _sessions_figures(self)
    cdef bytes _hello(self, connection *c, bytes body)
    cdef bytes _authenticate(self, connection *c, bytes body)
    cdef bytes _mount(self, connection *c, bytes body)
    cdef state_header *_state_of(self, bytes name, Passed given, int *fd, const char **why) except? NULL
    cdef session *_recover_one(self, bytes name, Passed given) except? NULL
    cdef int _remember(self, session *s, int memory) except -1
    cdef bytes _attach(self, connection *c, bytes body)
    cdef int _bind(self, connection *c, session *s, uint32_t slot) except -1
    cdef int _end_session(self, session *s, connection *asking) except -1
