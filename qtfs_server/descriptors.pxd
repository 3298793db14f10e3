"""Counted descriptors, and their names in /proc/self/fd."""
from libc.stdint cimport int32_t

cdef int32_t descriptors            # nodes', handles', connections' and lock owners', of all sessions
cdef int32_t descriptor_limit       # RLIMIT_NOFILE

cdef void descriptor_opened() noexcept nogil
cdef void close_counted(int fd) noexcept nogil
cdef void node_opened() noexcept nogil
cdef void close_node(int fd) noexcept nogil
cdef bint descriptors_short() noexcept nogil
cdef void proc_path(char *out, int fd) noexcept nogil
cdef int fd_path(int fd, char *out, size_t room) noexcept nogil
