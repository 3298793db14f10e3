"""Nodes that special rules make."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from qtfs_client.drivers.fuse3.special_state cimport special_state
from qtfs_client.drivers.fuse3.state cimport mount_state, worker

cdef bint is_made(uint64_t id) noexcept nogil
cdef void reply_made_entry(worker *w, uint32_t rule, const char *name, size_t length) noexcept nogil
cdef bint serve_made(worker *w) noexcept nogil
cdef bint take_production(special_state *s, uint64_t unique) noexcept nogil
cdef bint interrupt_open(mount_state *m, uint64_t target) noexcept nogil
cdef bint see_to_opens(mount_state *m) noexcept nogil

cdef class MadeNodes:               # of one mount
    cdef special_state s
    cdef object rules
    cdef object mount               # a weak reference
    cdef list names                 # by number: what {name} stands for, where that is no number itself
    cdef dict numbers               # the other way round
    cdef object _running
    cdef int64_t number_of(self, bytes name) noexcept
    cdef int _answer(self, int device, uint64_t unique, int error, bytes found) except -1
