from qtfs_client.drivers.fuse3.state cimport mount_state

cdef void watch(mount_state *m) noexcept nogil
