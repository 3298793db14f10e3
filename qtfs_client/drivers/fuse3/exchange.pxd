from libc.stdint cimport int64_t, uint32_t

from qtfs_client.drivers.fuse3.state cimport builder, line, mount_state, worker
from qtfs_common.transport cimport message

cdef int ask(worker *w, builder build, bint repeatable, message *reply) noexcept nogil
cdef int ask_for_ourselves(worker *w, builder build) noexcept nogil
cdef void lose(int manager_fd, line *link) noexcept nogil
cdef void stop(mount_state *m) noexcept nogil
cdef void drain(int fd) noexcept nogil
cdef void wake_another_locked(mount_state *m) noexcept nogil
cdef void hand_over(worker *w) noexcept nogil
cdef bint is_quiet(int device) noexcept nogil
cdef bint is_given_up(mount_state *m, int64_t since_us, int64_t now) noexcept nogil
cdef bint ends_without(mount_state *m, uint32_t pid, int64_t since_us, int64_t now) noexcept nogil
