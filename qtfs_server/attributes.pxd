"""Attributes and mounts of the server's files."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_common.protocol cimport attributes, attributes_reply
from qtfs_server.includes.linux cimport statx_t
from qtfs_server.session cimport node, session

cdef int stat_fd(int fd, statx_t *st) noexcept nogil
cdef int stat_known(int fd, statx_t *st) noexcept nogil
cdef int stat_name(int directory, const char *name, statx_t *st) noexcept nogil
cdef uint64_t signature(const statx_t *st) noexcept nogil
cdef uint64_t mount_id_of(const statx_t *st) noexcept nogil
cdef bint find_device_locked(session *s, const statx_t *st, uint32_t *out) noexcept nogil
cdef int device_index(session *s, int fd, const statx_t *st, uint32_t *out) noexcept nogil
cdef void fill_attributes(uint32_t on_device, const statx_t *st, attributes *out) noexcept nogil
cdef uint64_t node_flags_locked(session *s, uint32_t on_device) noexcept nogil
cdef bint lies_on_pseudo(session *s, const node *n) noexcept nogil
cdef bint lies_on_cgroup(session *s, const node *n) noexcept nogil
cdef bint lies_on_proc(session *s, const node *n) noexcept nogil
cdef int node_stat(session *s, node *n, int fd, attributes_reply *out) noexcept nogil
