"""Letting the server's mounts go."""
from libc.stdint cimport uint64_t

cdef bint let_idle_go() noexcept nogil
cdef void release_mount(uint64_t mount_id) noexcept nogil
