"""Pipes as places where data lies that splice(2) takes from one descriptor to another."""
cdef enum:
    PIPE_BYTES = 1 << 20            # what anybody may have, /proc/sys/fs/pipe-max-size
    PIPE_PAGE_BYTES = 4096          # a pipe holds 256 pieces, of a page at most if a file's; fewer of larger pages

cdef struct splice_pipe:            # a worker's own
    int ends[2]                     # what to read from and to write to; 0: not made yet, -1: cannot be had
    size_t bytes                    # in it now
    bint onward                     # what goes through it comes into another one, at the other end of a connection

cdef bint pipe_make(splice_pipe *p) noexcept nogil
cdef void pipe_drop(splice_pipe *p) noexcept nogil
