"""The server's mounts as sessions hold them, and the mount table."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.session cimport node, session

cdef bint is_let_go(session *s, uint32_t on_device) noexcept nogil
cdef bint is_gone(session *s, uint32_t on_device) noexcept nogil
cdef void note_holder_locked(session *s, uint32_t index) noexcept nogil
cdef int open_mount(uint64_t mount_id, uint32_t listed_id) noexcept nogil
cdef int borrow_mount(session *s, uint32_t on_device) noexcept nogil
cdef void return_mount(session *s, uint32_t on_device, bint keep) noexcept nogil
cdef void close_idle_mounts(session *s) noexcept nogil
cdef void set_holding(bint holding) noexcept nogil
cdef int holding_fd() noexcept nogil
