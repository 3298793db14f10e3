"""The worker threads' loop, and what they share."""
from libc.stdint cimport int32_t, uint32_t, uint64_t

from qtfs_common.rings.memory cimport ring_memory
from qtfs_common.transport cimport message
from qtfs_server.connection cimport connection
from qtfs_server.worker cimport worker

cdef enum source_kind:              # what an epoll event comes from
    SOURCE_CONNECTION = 1
    SOURCE_LISTENER = 2
    SOURCE_STOP = 3

cdef enum:
    MAX_LISTENERS = 128             # 64 addresses, of two sockets each at most

cdef struct listener:
    int kind
    int fd
    bint needs_authentication
    ring_memory *memory             # what it is the bell of; NULL: its sockets carry the messages

cdef worker *all_workers            # that there ever were; of who has the GIL, and never shortened
cdef int32_t spinning_at_most       # workers that may look for their next request at the same time

cdef class Service:
    cdef int epoll_fd
    cdef int stop_fd
    cdef int32_t spare_fd           # given up to accept and refuse a connection when descriptors have run out
    cdef listener listeners[MAX_LISTENERS]     # those in use are of kind SOURCE_LISTENER
    cdef listener stop_source
    cdef list spare                 # workers that have ended, for the next: `worker *`
    cdef dict sessions              # by id: `session *`, each with a reference
    cdef int crew                   # workers that are to be free of what hangs
    cdef int running                # workers, also those that are being started
    cdef int blocked                # among them those that have been at one thing for long
    cdef bint watched_closely       # some were busy at the last look
    cdef bint stopping
    cdef int _new_errand(self, connection *c, const message *msg) except -2
    cdef int _join_errand(self, connection *c, const message *msg) except -2
    cdef int _begin_errand(self, connection *c) except -2
    cdef int _session_message(self, connection *c, const message *msg) except -2
    cdef worker *_new_worker(self) except NULL
    cdef int _retire(self, worker *w) except -1
    cdef int _look_at_workers(self) except -1
    cdef bint _judged(self, worker *w, uint64_t turn) except -1

cdef bint arm(Service service, connection *c, uint32_t events, int how) noexcept nogil
