"""Long replies to READ on their way from a socket to the kernel, in a pipe instead of a buffer."""
from qtfs_client.drivers.fuse3.state cimport worker
from qtfs_common.transport cimport message

cdef void expect_short_reply(worker *w) noexcept nogil
cdef void expect_data(worker *w, size_t size) noexcept nogil
cdef int begin_piping(worker *w, message *reply) noexcept nogil
cdef int receive_piped(worker *w, message *reply) noexcept nogil
cdef int reply_from_pipe(worker *w) noexcept nogil
cdef void drop_piped(worker *w) noexcept nogil
