"""Counted descriptors, and their names in /proc/self/fd."""
from libc.stdint cimport int32_t, uint32_t

cdef int32_t descriptors            # nodes', handles', connections' and lock owners', of all sessions
cdef int32_t descriptor_limit       # RLIMIT_NOFILE

cdef void descriptor_opened() noexcept nogil
cdef void close_counted(int fd) noexcept nogil
cdef void node_opened() noexcept nogil
cdef void close_node(int fd) noexcept nogil
cdef void closing_later(int count) noexcept nogil
cdef bint descriptors_short() noexcept nogil
cdef bint within_share(uint32_t held) noexcept nogil
cdef void proc_path(char *out, int fd) noexcept nogil
cdef int fd_path(int fd, char *out, size_t room) noexcept nogil
cdef bint is_at(int fd, const char *path) noexcept nogil
cdef int path_above(int directory, char *out, size_t room) noexcept nogil
