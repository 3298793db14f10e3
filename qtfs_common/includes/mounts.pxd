"""The mount API and what goes with it. Sources: open_tree(2), move_mount(2), fsopen(2), mount_setattr(2), openat2(2).

The numbers are those of <linux/mount.h> and asm-generic/unistd.h, spelt out: older headers lack some, and system calls
from 424 on have the same number on every architecture.
"""
from libc.stdint cimport uint64_t

cdef enum:
    SYS_OPEN_TREE = 428
    SYS_MOVE_MOUNT = 429
    SYS_FSOPEN = 430
    SYS_FSCONFIG = 431
    SYS_FSMOUNT = 432
    SYS_FSPICK = 433
    SYS_OPENAT2 = 437
    SYS_MOUNT_SETATTR = 442

cdef enum:
    MOVE_MOUNT_F_EMPTY_PATH = 0x4
    MOVE_MOUNT_T_EMPTY_PATH = 0x40

cdef struct open_how:
    uint64_t flags
    uint64_t mode
    uint64_t resolve

cdef struct mount_attr:
    uint64_t attr_set
    uint64_t attr_clr
    uint64_t propagation
    uint64_t userns_fd

cdef extern from "<sys/mount.h>" nogil:
    int mount(const char *, const char *, const char *, unsigned long, const void *)
    int umount2(const char *, int)

cdef extern from "<sys/stat.h>" nogil:
    struct statx_t "statx":
        unsigned int stx_mask
        uint64_t stx_mnt_id
    int statx(int, const char *, int, unsigned int, statx_t *)

cdef extern from "<unistd.h>" nogil:
    long syscall(long, ...)
