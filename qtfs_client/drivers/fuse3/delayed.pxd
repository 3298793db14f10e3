"""Requests that the server has not begun, because the file system that they are for is stuck."""
from libc.stdint cimport int64_t

from qtfs_client.drivers.fuse3.state cimport mount_state, worker

cdef bint put_off(worker *w) noexcept nogil
cdef int64_t bring_back_locked(mount_state *m, int64_t now) noexcept nogil
cdef void see_to_crew(mount_state *m, int64_t now) noexcept nogil
