from libc.stdint cimport uint8_t, uint16_t, uint32_t

from qtfs_client.drivers.fuse3.state cimport builder, worker

cdef uint8_t *begin(worker *w, uint16_t op, size_t body_bytes, bint with_groups, uint32_t umask) noexcept nogil
cdef builder request_builder(uint32_t opcode) noexcept nogil
cdef int build_undo_release(worker *w) noexcept nogil
cdef int build_special_access(worker *w) noexcept nogil
cdef int build_forgets(worker *w) noexcept nogil
cdef int build_releases(worker *w) noexcept nogil
cdef int build_try_lock(worker *w) noexcept nogil
