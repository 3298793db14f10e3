from qtfs_client.drivers.fuse3.state cimport worker

cdef void serve(worker *w) noexcept nogil
cdef void send_forgets(worker *w) noexcept nogil
cdef void send_releases(worker *w) noexcept nogil
