"""File data on its way from the page cache to a socket, in a pipe instead of a buffer."""
from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    SPLICE_BYTES = 65536            # reads from this on are worth it

cdef struct splice_pipe:            # a worker's own
    int ends[2]                     # what to read from and to write to; 0: not made yet, -1: cannot be had
    size_t bytes                    # in it now

cdef bint pipe_make(splice_pipe *p) noexcept nogil
cdef bint pipe_fill(splice_pipe *p, int fd, size_t size, uint64_t offset) noexcept nogil
cdef ssize_t pipe_empty_into(splice_pipe *p, int fd, size_t size, uint64_t offset) noexcept nogil
cdef void pipe_drop(splice_pipe *p) noexcept nogil
