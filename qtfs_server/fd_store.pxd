"""What systemd keeps for the next engine."""
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef bint storing                   # systemd keeps descriptors for us; never changes while requests are served

cdef bint store(uint64_t session_id, uint32_t index, uint32_t generation, int fd) noexcept nogil
cdef void unstore_later(uint64_t session_id, uint32_t index, uint32_t generation) noexcept nogil
cdef void count_stored(int32_t more) noexcept nogil
