"""Descriptors: how many there are, and what the kernel knows of one.

All that clients can make us hold is counted in `descriptors`, so that nodes give theirs up before anything else fails.
Nodes keep no more than a number of them in any case: one pins a file's inode and name in the kernel's memory.
"""
from libc.errno cimport errno
from libc.stdint cimport int32_t

from qtfs_server.includes.linux cimport AT_FDCWD, atomic_add_int, atomic_load_int, close, readlinkat, snprintf

cdef enum:
    RESERVED_DESCRIPTORS = 64       # for the engine itself
    MOST_OF_NODES = 16384           # what nodes of all sessions keep together

cdef int32_t descriptors = 0
cdef int32_t _of_nodes = 0
cdef int32_t descriptor_limit = 1024


cdef void descriptor_opened() noexcept nogil:
    """Count a descriptor that a client's doing keeps open."""
    atomic_add_int(&descriptors, 1)


cdef void close_counted(int fd) noexcept nogil:
    """Close a counted descriptor; -1 is none."""
    if fd >= 0:
        close(fd)
        atomic_add_int(&descriptors, -1)


cdef void node_opened() noexcept nogil:
    """Count a node's descriptor."""
    descriptor_opened()
    atomic_add_int(&_of_nodes, 1)


cdef void close_node(int fd) noexcept nogil:
    """Close a node's descriptor; -1 is none."""
    if fd >= 0:
        close_counted(fd)
        atomic_add_int(&_of_nodes, -1)


cdef bint descriptors_short() noexcept nogil:
    """Whether nodes have to give descriptors up before more are opened."""
    return atomic_load_int(&descriptors) > descriptor_limit - RESERVED_DESCRIPTORS or \
        atomic_load_int(&_of_nodes) > MOST_OF_NODES


cdef void proc_path(char *out, int fd) noexcept nogil:
    """The magic link that stands for an open descriptor: proc_pid_fd(5). `out` holds 32 bytes."""
    snprintf(out, 32, b"/proc/self/fd/%d", fd)


cdef int fd_path(int fd, char *out, size_t room) noexcept nogil:
    """The path the kernel knows for a descriptor, NUL-terminated. Its length, or -errno."""
    cdef char link[32]
    cdef ssize_t length
    proc_path(link, fd)
    length = readlinkat(AT_FDCWD, link, out, room - 1)
    if length < 0:
        return -errno
    out[length] = 0
    return <int>length
