from libc.stdint cimport uint64_t

ctypedef void (*apart_call)(void *argument) noexcept nogil

cdef struct place:                  # where a path leads, as the kernel knows it
    const char *path
    int error
    int is_directory
    int mount_id                    # in our mountinfo; -1: its file system tells none
    uint64_t node                   # 0: it is not one of FUSE
    unsigned int major, minor

cdef void close_all_but(int kept) noexcept nogil
cdef int call_apart(apart_call call, void *argument, int kept) noexcept nogil
cdef void look_up(void *argument) noexcept nogil
