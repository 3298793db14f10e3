"""Following the mount table."""
from libc.stdint cimport uint8_t

from qtfs_server.session cimport session

ctypedef void (*teller)(session *, const uint8_t *, size_t) noexcept nogil

cdef void set_teller(teller tell) noexcept
