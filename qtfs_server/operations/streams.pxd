"""FIFOs and devices: open, read, write, poll, attributes."""
from libc.stdint cimport uint8_t, uint32_t

from qtfs_common.protocol cimport attributes_reply, open_reply, read_request, write_request
from qtfs_server.request cimport request
from qtfs_server.session cimport handle, node

cdef bint is_special(const node *n) noexcept nogil
cdef int open_special(request *r, node *n, uint32_t flags, open_reply *out) noexcept nogil
cdef int read_stream(request *r, handle *h, const read_request *body) noexcept nogil
cdef int write_stream(request *r, handle *h, const uint8_t *data, const write_request *body) noexcept nogil
cdef void show_as_stream(request *r, const node *n, attributes_reply *out) noexcept nogil
cdef int op_poll(request *r) noexcept nogil
