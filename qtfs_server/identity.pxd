"""Whom a worker thread acts for: effective uid and gid, groups, capabilities and umask, each per thread."""
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    NO_ID = 0xffffffff              # as uid or gid: setresuid(2) takes it for no change

cdef struct identity:
    bint is_root                    # everything as at the start of the thread
    bint capable                    # its capabilities are effective
    bint keeps_fsetid               # CAP_FSETID among them
    uint64_t permitted              # capabilities of the thread

cdef int identity_init(identity *me) noexcept nogil
cdef void act_as(identity *me, uint32_t uid, uint32_t gid, const uint32_t *groups, uint32_t ngroups) noexcept nogil
cdef void act_as_root(identity *me) noexcept nogil
cdef void drop_fsetid(identity *me) noexcept nogil
