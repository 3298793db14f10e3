from qtfs_client.drivers.fuse3.state cimport mount_state, worker

cdef int wait_for_lock(worker *w) noexcept nogil
cdef void watch(mount_state *m) noexcept nogil
