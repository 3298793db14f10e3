"""File data on its way from the page cache to a socket, in a pipe instead of a buffer."""
from libc.stdint cimport uint64_t
from qtfs_common.pipes cimport splice_pipe

cdef enum:
    SPLICE_BYTES = 65536            # reads from this on are worth it

cdef bint pipe_fill(splice_pipe *p, int fd, size_t size, uint64_t offset) noexcept nogil
cdef ssize_t pipe_empty_into(splice_pipe *p, int fd, size_t size, uint64_t offset) noexcept nogil
