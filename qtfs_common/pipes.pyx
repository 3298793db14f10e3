"""Pipes as places where data lies that splice(2) takes from one descriptor to another.

Sources: pipe(7), fcntl(2), splice(2).
"""
from posix.unistd cimport close

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    """

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_SETPIPE_SZ
        O_CLOEXEC
        O_NONBLOCK
    int fcntl(int, int, ...)

cdef extern from "<unistd.h>" nogil:
    int pipe2(int *, int)


cdef bint pipe_make(splice_pipe *p) noexcept nogil:
    """Whether there is a pipe of PIPE_BYTES, made now if need be."""
    if p.ends[0] == 0:
        if pipe2(p.ends, O_CLOEXEC | O_NONBLOCK) < 0:
            p.ends[0] = -1
            return False
        if fcntl(p.ends[1], F_SETPIPE_SZ, <int>PIPE_BYTES) < PIPE_BYTES:
            pipe_drop(p)            # it would not hold a whole read
            p.ends[0] = -1
    return p.ends[0] > 0


cdef void pipe_drop(splice_pipe *p) noexcept nogil:
    """Give up the pipe with what is in it, if there is one; the next use makes another."""
    if p.ends[0] > 0:
        close(p.ends[0])
        close(p.ends[1])
    p.ends[0] = p.ends[1] = 0
    p.bytes = 0
