"""Special rules on the path of a request."""
from qtfs_client.drivers.fuse3.made_nodes cimport MadeNodes
from qtfs_client.drivers.fuse3.state cimport mount_state, worker

cdef bint serve_special(worker *w) noexcept nogil

cdef class SpecialRules(MadeNodes):
    cdef int _fill_rules(self) except -1
    cdef int _fill_vertices(self, list rows) except -1
    cdef void attach(self, mount_state *m, object mount)
