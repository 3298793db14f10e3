"""Descriptors of nodes, and who holds them."""
from libc.stdint cimport uint16_t, uint64_t

from qtfs_server.includes.linux cimport file_handle
from qtfs_server.session cimport node, session

cdef int node_pin(session *s, uint64_t id, node **out) noexcept nogil
cdef int node_hold(session *s, node *n) noexcept nogil
cdef void node_unpin(session *s, node *n) noexcept nogil
cdef void node_keep(session *s, node *n) noexcept nogil
cdef void node_let_go(session *s, node *n) noexcept nogil
cdef void node_adopt(session *s, node *n, int fd) noexcept nogil
cdef void evict(session *s) noexcept nogil
cdef bint node_put_aside(session *s, node *n) noexcept nogil
cdef file_handle *file_handle_of(int fd) noexcept nogil
cdef void give_fd_locked(session *s, node *n, int fd, uint16_t pathless) noexcept nogil
cdef void settle_locked(session *s, node *n) noexcept nogil
