ctypedef void (*apart_call)(void *argument) noexcept nogil

cdef void close_all_but(int kept, int also) noexcept nogil
cdef int call_apart(apart_call call, void *argument, int kept, int also) noexcept nogil
