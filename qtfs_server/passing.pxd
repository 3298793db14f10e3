"""Descriptors of a session that come from the engine before this one."""
from libc.stdint cimport uint32_t

from qtfs_server.session cimport session

cdef enum passed_kind:              # what a descriptor is, and what its index and generation are of
    PASSED_STATE = 1                # the file of its tables
    PASSED_MEMORY = 2               # a file of what lies in no table: memory_of
    PASSED_MOUNT = 3                # on a mount: session.devices
    PASSED_NODE = 4                 # a node's, O_PATH: records
    PASSED_HANDLE = 5               # a handle's, which stands where it stood: handles
    PASSED_STORED = 6               # the same from systemd: who had it is dead, and it stands anywhere
    PASSED_LOCKS = 7                # of an owner of POSIX locks: lock_notes
    PASSED_KEPT = 8                 # a handle's that systemd has a copy of

cdef struct passed:
    uint32_t kind
    uint32_t index
    uint32_t generation
    int fd                          # -1: somebody has taken it over

cdef class Passed:
    cdef passed *items
    cdef uint32_t count

cdef void adopt_mounts(session *s, passed *items, uint32_t count) noexcept nogil
cdef void adopt_open_files(session *s, passed *items, uint32_t count) noexcept nogil
cdef void adopt_lock_owners(session *s, passed *items, uint32_t count) noexcept nogil
cdef list descriptors_of(session *s)
cdef bytes memory_of(session *s)
cdef int restore_memory(session *s, bytes memory) except -1
