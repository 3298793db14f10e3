from libc.stdint cimport uint32_t, uint64_t

cdef int caller_groups(uint32_t pid, uint32_t *groups, int room) noexcept nogil
cdef uint32_t caller_process(uint32_t pid) noexcept nogil
cdef bint process_is_called(uint64_t pid, const char *names) noexcept nogil
cdef int caller_opens(uint32_t pid) noexcept nogil
cdef uint64_t caller_alias(uint32_t pid) noexcept nogil
cdef bint callers_can_be_seen() noexcept nogil
cdef bint signal_wants_out(uint32_t pid) noexcept nogil
cdef void kill_by_broken_pipe(uint32_t pid) noexcept nogil
cdef bint caught_signal_pending(uint32_t pid) noexcept nogil
cdef bint fatal_signal_pending(uint32_t pid) noexcept nogil
cdef bint is_exiting(uint32_t pid) noexcept nogil
