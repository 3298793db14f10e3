"""Nodes of a session."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_common.protocol cimport entry
from qtfs_server.includes.linux cimport statx_t
from qtfs_server.policy cimport place
from qtfs_server.session cimport node, session

cdef uint64_t known_node(session *s, const statx_t *st) noexcept nogil
cdef void node_forget(session *s, uint64_t id, uint64_t lookups) noexcept nogil
cdef int node_enter(session *s, node *parent, const char *name, size_t name_bytes, bint sparing,
                    entry *out) noexcept nogil
cdef int node_enter_fd(session *s, int fd, const statx_t *st, place where, entry *out) noexcept nogil
cdef void node_renamed(session *s, node *directory, const char *name) noexcept nogil
cdef int root_enter(session *s, int fd, place where) noexcept nogil
cdef uint16_t node_allows(node *n, int fd) noexcept nogil
cdef int node_allowed(node *n, int fd, uint16_t needed) noexcept nogil
cdef int child_allowed(session *s, node *parent, const uint8_t *name, size_t length, uint16_t needed,
                       place *out) noexcept nogil
