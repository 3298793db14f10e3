"""The whitelist in the form that requests are checked against: a trie of path components."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

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
    ALLOW_DEVICE = 1 << 15          # no type of its own: an Open line names this device, or a directory of /dev

cdef enum:
    OFF_TRIE = 0xffff               # below this path no rule can add anything

cdef struct place:                  # what the rules say of one path
    uint32_t epoch                  # of the rules it was found with
    uint16_t trie                   # index of its trie vertex, or OFF_TRIE
    uint16_t allowed                # ALLOW_* bits

cdef place path_place(const char *path) noexcept nogil
cdef place child_place(const place *parent, const uint8_t *name, size_t length) noexcept nogil
cdef uint32_t current_epoch() noexcept nogil
cdef void rules_moved() noexcept nogil
cdef void count_denial(uint16_t missing) noexcept nogil
