from qtfs_client.drivers.fuse3.state cimport mount_state, worker

cdef void work(worker *w) noexcept nogil
cdef void stop(mount_state *m) noexcept nogil
