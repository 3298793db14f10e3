"""Requests that the engine before us may have carried out."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qtfs_server.request cimport request

cdef bint may_be_done(const request *r) noexcept nogil
cdef void note_name(request *r, int directory, const char *name) noexcept nogil
cdef void note_names(request *r, int directory, const char *name, int new_directory, const char *new_name) noexcept nogil
cdef void note_size(request *r, int fd) noexcept nogil
cdef void note_attribute(request *r, const char *path, const char *name) noexcept nogil
cdef bint was_made(const request *r, int directory, const char *name, uint32_t type, uint64_t ino) noexcept nogil
cdef bint was_removed(const request *r, int directory, const char *name) noexcept nogil
cdef bint was_renamed(const request *r, int directory, const char *name, int new_directory, const char *new_name,
                      bint exchanged) noexcept nogil
cdef size_t was_appended(const request *r, int fd, const uint8_t *data, size_t size) noexcept nogil
