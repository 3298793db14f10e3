from qtfs_client.drivers.fuse3.state cimport worker

cdef void work(worker *w) noexcept nogil
