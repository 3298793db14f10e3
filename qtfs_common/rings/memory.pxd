"""A mapping of shared memory, and where its channels lie."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qtfs_common.rings.layout cimport RING_CHANNELS, ring_control, ring_line

cdef extern from "qtfs_common/rings/barriers.h" nogil:
    void ring_write_barrier()
    void ring_full_barrier()
    void ring_pause()
    uint64_t ring_load(const uint64_t *)
    void ring_publish(uint64_t *, uint64_t)
    uint32_t ring_load_32(const uint32_t *)
    void ring_store_32(uint32_t *, uint32_t)

cdef struct ring_memory:
    uint8_t *base
    size_t bytes
    bint has_pages                  # the kernel has pages of it, which /dev/fuse needs: not of a BAR
    int32_t lost                    # atomic: a bus error took it away, and zeros lie where it was met
    int32_t users                   # atomic: channels that work in it
    uint32_t channels
    uint64_t request_bytes
    uint64_t reply_bytes
    uint64_t areas_at
    uint64_t layouts                # as the control block says
    uint64_t instance               # of the engine
    int32_t served[RING_CHANNELS]   # atomic; the engine's: a connection has this channel

cdef ring_control *control(const ring_memory *m) noexcept nogil
cdef ring_line *client_line(const ring_memory *m, uint32_t channel) noexcept nogil
cdef ring_line *engine_line(const ring_memory *m, uint32_t channel) noexcept nogil
cdef uint8_t *request_area(const ring_memory *m, uint32_t channel) noexcept nogil
cdef uint8_t *reply_area(const ring_memory *m, uint32_t channel) noexcept nogil
cdef bint is_lost(const ring_memory *m) noexcept nogil
cdef bint is_laid_out(const ring_memory *m) noexcept nogil
cdef bint is_same_engine(const ring_memory *m) noexcept nogil

cdef class RingMemory:
    cdef ring_memory m
    cdef int region
    cdef object __weakref__
