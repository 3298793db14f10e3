"""What no thread that others wait for may do itself."""

ctypedef void (*chore_function)(void *) noexcept nogil

cdef bint chore_add(chore_function run, void *subject) noexcept nogil
cdef void close_later(int fd) noexcept nogil
cdef void see_to_chores() noexcept nogil
cdef bint chores_done() noexcept nogil
