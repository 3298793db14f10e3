"""Records of a session's nodes."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.session cimport node, record, session

cdef uint32_t record_new_locked(session *s, node *n) noexcept nogil
cdef void record_link_locked(session *s, uint32_t index) noexcept nogil
cdef void record_free_locked(session *s, uint32_t index) noexcept nogil
cdef void record_unlink_locked(session *s, uint32_t index) noexcept nogil
cdef uint32_t find_record_locked(session *s, uint32_t on_device, uint64_t ino) noexcept nogil
cdef uint32_t record_of_locked(session *s, uint64_t id) noexcept nogil
cdef uint64_t node_id(uint32_t index, const record *r) noexcept nogil
cdef node *awake_locked(session *s, uint32_t index) noexcept nogil
