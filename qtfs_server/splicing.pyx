"""splice(2): the pages of a file go into a pipe and from there to the socket, and are copied once, by whoever receives them.
And what a socket received goes into a pipe, and is copied once, into the page cache: early.pyx.

Beside pread(2) and send(2) the former halves the time of a read of 1 MiB; below 64 KiB the additional calls cost more. What a
program of the server writes into the file before the client has received the data may be seen by the read: it would be,
too, had the read come a moment later.
"""
from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport int64_t, uint64_t

from qtfs_common.pipes cimport PIPE_BYTES, PIPE_PAGE_BYTES, pipe_drop, pipe_make, splice_pipe

cdef extern from "<fcntl.h>" nogil:
    enum:
        SPLICE_F_MOVE
        SPLICE_F_NONBLOCK
    ssize_t splice(int, int64_t *, int, int64_t *, size_t, unsigned int)


cdef bint pipe_fill(splice_pipe *p, int fd, size_t size, uint64_t offset) noexcept nogil:
    """Take up to `size` bytes of a file, fewer only at its end. False: the pipe is empty, and pread(2) has to do it."""
    cdef int64_t at = <int64_t>offset
    cdef ssize_t got = 1
    if offset % PIPE_PAGE_BYTES + size > PIPE_BYTES or not pipe_make(p):
        return False
    p.bytes = 0
    while p.bytes < size and got > 0:
        got = splice(fd, &at, p.ends[1], NULL, size - p.bytes, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        if got < 0 and errno == EINTR:
            got = 1
        elif got > 0:
            p.bytes += got
    if got < 0 and p.bytes > 0:
        pipe_drop(p)
    return got >= 0


cdef ssize_t pipe_empty_into(splice_pipe *p, int fd, size_t size, uint64_t offset) noexcept nogil:
    """Write up to `size` bytes of what the pipe holds into a file. How many, or -errno."""
    cdef int64_t at = <int64_t>offset
    cdef ssize_t done = -1
    while done < 0:
        done = splice(p.ends[0], NULL, fd, &at, size, SPLICE_F_MOVE)
        if done < 0 and errno != EINTR:
            return -errno
    p.bytes -= done
    return done if done > 0 else -EIO
