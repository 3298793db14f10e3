"""What the engine says on the event channels of its sessions."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t

from qtfs_server.session cimport session

cdef void event_restore(session *s, uint64_t number, const uint8_t *message, size_t size) noexcept nogil
cdef void event_reply(session *s, uint16_t op, uint64_t tag, int error, const void *body, size_t body_bytes) noexcept nogil
cdef void event_notify(session *s, uint16_t op, uint64_t tag) noexcept nogil
cdef void event_tell(session *s, uint16_t op, const void *body, size_t body_bytes) noexcept nogil
cdef void event_pong(session *s, uint64_t tag) noexcept nogil
cdef void event_acknowledged(session *s, uint64_t number) noexcept nogil
cdef bint event_has_room(session *s) noexcept nogil
cdef bint event_answered(session *s, uint16_t op, uint64_t tag) noexcept nogil
cdef void event_attached(session *s) noexcept nogil
cdef int event_bell() noexcept nogil
cdef bint flush_blocked() noexcept nogil
