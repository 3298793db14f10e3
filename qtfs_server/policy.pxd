"""The whitelist and the protections in the form that requests are checked against: tries of path components."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:                          # the order of qtfs_common.whitelist.Type
    ALLOW_OPEN = 1 << 0
    ALLOW_WRITE = 1 << 1
    ALLOW_READ = 1 << 2
    ALLOW_READDIR = 1 << 3
    ALLOW_MKDIR = 1 << 4
    ALLOW_RMDIR = 1 << 5
    ALLOW_CREATE = 1 << 6
    ALLOW_UNLINK = 1 << 7
    ALLOW_RENAME = 1 << 8
    ALLOW_SETATTR = 1 << 9
    ALLOW_SETXATTR = 1 << 10
    ALLOW_MOUNT = 1 << 11
    TYPES = 14
    # No types of the whitelist: everything has them but what is protected or ruled.
    ALLOW_CHANGE = 1 << 14          # it is not read-only
    ALLOW_LOOK = 1 << 15            # it is not hidden

cdef enum:
    OFF_TRIE = 0xffff               # below this path no rule can add anything

cdef struct place:                  # what the rules say of one path
    uint32_t epoch                  # of the rules it was found with
    uint16_t trie                   # index of its trie vertex, or OFF_TRIE
    uint16_t allowed                # ALLOW_* bits
    uint16_t shield                 # its vertex among the protections, which never change, or OFF_TRIE; the last that protects
    uint16_t depth                  # how many components it lies below a vertex that protects
    uint16_t taken                  # ALLOW_* bits that protections take away

cdef place path_place(const char *path, const place *known) noexcept nogil
cdef place far_below_place(const char *path, const place *known) noexcept nogil
cdef place child_place(const place *parent, const uint8_t *name, size_t length) noexcept nogil
cdef void enter_file_system(place *where, uint16_t shield) noexcept nogil
cdef uint16_t shield_of(int64_t f_type, int fd) noexcept nogil
cdef bint may_hide_names(const place *where) noexcept nogil
cdef bint is_procfs(int64_t f_type) noexcept nogil
cdef uint32_t current_epoch() noexcept nogil
cdef void rules_moved() noexcept nogil
cdef int device_refusal(int fd) noexcept nogil
cdef void count_denial(uint16_t missing) noexcept nogil
cdef int refusal(uint16_t allowed, uint16_t needed) noexcept nogil
