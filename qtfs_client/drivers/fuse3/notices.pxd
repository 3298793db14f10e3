from libc.stdint cimport uint64_t

from qtfs_client.drivers.fuse3.state cimport mount_state

cdef void expire_name_apart(mount_state *m, uint64_t directory, const char *name, size_t name_bytes) noexcept nogil
