from qtfs_client.drivers.fuse3.state cimport worker

cdef enum:
    NEAR_DATA_BYTES = 16384         # of a WRITE, that come into the buffer

cdef void all_in_buffer(worker *w) noexcept nogil
cdef ssize_t read_placed(worker *w, int device) noexcept nogil
cdef void bring_home(worker *w) noexcept nogil
