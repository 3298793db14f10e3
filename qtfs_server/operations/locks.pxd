"""File locks: fcntl(2) and flock(2)."""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.request cimport request
from qtfs_server.session cimport handle, node, session

cdef int op_getlk(request *r) noexcept nogil
cdef int op_setlk(request *r) noexcept nogil
cdef int op_setlkw(request *r) noexcept nogil
cdef void drop_locks(session *s, node *n, uint64_t owner) noexcept nogil
cdef void end_handle_locks(session *s, handle *h, uint64_t id, bint flocked) noexcept nogil
cdef int lock_again(session *s, uint64_t id, uint64_t owner, uint64_t start, uint64_t end, uint32_t type) noexcept nogil
cdef int owner_again(session *s, uint64_t id, uint64_t owner, int fd) noexcept nogil
cdef int flock_again(session *s, uint64_t id) noexcept nogil
cdef void cancel_wait(session *s, uint64_t tag) noexcept nogil
cdef void abandon_waits(session *s) noexcept nogil

# How a granted, refused or cancelled wait is answered; server.pyx sets it. Called from any thread, under no lock.
ctypedef void (*answer_function)(session *s, uint64_t tag, int error) noexcept nogil
cdef void set_answer(answer_function answer) noexcept nogil
cdef void wait_for_locks() noexcept nogil
cdef void see_to_lock_polling() noexcept nogil
cdef bint lock_polling() noexcept nogil
cdef void queue_for_locks() noexcept nogil
cdef void stop_waiting_for_locks() noexcept nogil
cdef void go_on_waiting_for_locks() noexcept nogil
