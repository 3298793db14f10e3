from libc.stdint cimport uint64_t

from qtfs_client.drivers.fuse3.state cimport mount_state, worker

cdef int write_reply(int device, uint64_t unique, int error, const void *first, size_t first_bytes,
                     const void *second, size_t second_bytes) noexcept nogil
cdef int reply(worker *w, const void *body, size_t body_bytes) noexcept nogil
cdef int reply_error(worker *w, int error) noexcept nogil
cdef void expire_name(mount_state *m, int device, uint64_t directory, const char *name, size_t name_bytes) noexcept nogil
cdef void forget_cached_attributes(mount_state *m, uint64_t node) noexcept nogil
cdef void show_size(mount_state *m, uint64_t node, uint64_t size) noexcept nogil
cdef int negotiate(mount_state *m) noexcept nogil
cdef int clone_device(int device) noexcept nogil
