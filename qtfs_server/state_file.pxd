"""The file that a session's tables lie in."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef enum region:                   # tables, in the order in which they lie in the file
    SLOTS
    DEVICES
    SHAPES
    RECORDS
    NODES
    HANDLES
    TEXTS
    LOCK_NOTES
    REGIONS

cdef enum:
    TEXT_BYTES = 60

cdef struct text_cell:              # a piece of a path (texts.pyx)
    uint32_t next                   # the piece behind it, or in the free list; 0: none
    char text[TEXT_BYTES]

cdef struct state_header:           # at the beginning of the file
    uint64_t magic                  # written last: the file is whole
    uint64_t layout                 # what the tables look like; another engine's may differ
    char boot_id[40]                # the file is of no use after a boot
    char listening[512]             # the addresses of the engine, a blank between each
    char root[4096]                 # path of the session's root
    uint64_t id
    uint8_t secret[32]
    uint32_t salt
    uint32_t slots
    uint32_t mount_flags            # MOUNT_*
    int64_t alive_us                # when the engine was last seen alive, CLOCK_MONOTONIC
    uint32_t ready[REGIONS]         # items of each table that there is memory for

cdef void *table(state_header *state, region which) noexcept nogil
cdef int grow(int fd, state_header *state, region which, uint32_t index) noexcept nogil
cdef state_header *state_new(uint64_t id, const uint8_t *secret, uint32_t salt, uint32_t slots, uint32_t mount_flags,
                             const char *root, int *fd) noexcept nogil
cdef void state_remove(uint64_t id) noexcept nogil
cdef void state_free(state_header *state, int fd) noexcept nogil
cdef state_header *state_take(int fd, const char **why) noexcept nogil
cdef state_header *state_open(const char *name, int *fd, const char **why) noexcept nogil
