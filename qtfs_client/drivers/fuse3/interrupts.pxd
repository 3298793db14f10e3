from libc.stdint cimport int64_t, uint64_t

from qtfs_client.drivers.fuse3.state cimport mount_state

cdef void interrupt(mount_state *m, int device, uint64_t unique, uint64_t target) noexcept nogil
cdef void answer_pending_locked(mount_state *m, int64_t now) noexcept nogil
