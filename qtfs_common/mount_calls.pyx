"""The system calls of mounting, for Python. Each lets go of the GIL: a network file system may take minutes.

Descriptors are ints of the caller's; those that are returned are closed on exec. All raise OSError.
Sources: fsopen(2), fsconfig(2), fsmount(2), fspick(2), open_tree(2), move_mount(2), mount_setattr(2), openat2(2),
umount2(2), statx(2).
"""
from libc.errno cimport errno
from libc.stdint cimport uint64_t

from qtfs_common.includes.mounts cimport MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH, SYS_FSCONFIG, SYS_FSMOUNT, \
    SYS_FSOPEN, SYS_FSPICK, SYS_MOUNT_SETATTR, SYS_MOVE_MOUNT, SYS_OPENAT2, SYS_OPEN_TREE, mount, mount_attr, open_how, \
    statx, statx_t, syscall, umount2

import os

_CLOEXEC = 1                            # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC, FSPICK_CLOEXEC
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_AT_NO_AUTOMOUNT = 0x800
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_STATX_DONT_SYNC = 0x4000            # a server that does not answer is not asked
_OPEN_TREE_CLONE = 1
_FSPICK_NO_AUTOMOUNT = 4
_FSPICK_EMPTY_PATH = 8
_STATX_MNT_ID = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000

# enum fsconfig_command
SET_FLAG = 0
SET_STRING = 1
SET_FD = 5
CMD_CREATE = 6
CMD_RECONFIGURE = 7

# openat2(2)
NO_MAGICLINKS = 0x02
BENEATH = 0x08


cdef long _checked(long result) except -1:
    if result < 0:
        raise OSError(errno, os.strerror(errno))
    return result


def openat2(int directory, bytes path not None, uint64_t flags, uint64_t resolve) -> int:
    """openat2(2); `path` must not be empty."""
    cdef open_how how
    cdef const char *name = path
    cdef long result
    how.flags = flags | os.O_CLOEXEC
    how.mode = 0
    how.resolve = resolve
    with nogil:
        result = syscall(SYS_OPENAT2, directory, name, &how, sizeof(how))
    return _checked(result)


def open_tree(int fd, bint recursive) -> int:
    """A detached copy of the mount tree at a descriptor, as a bind mount has it."""
    cdef unsigned int flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    cdef long result
    with nogil:
        result = syscall(SYS_OPEN_TREE, fd, b"", flags)
    return _checked(result)


def move_mount(int mounted, int target) -> None:
    """Attach the mount of one descriptor, detached or not, where the other is."""
    cdef long result
    with nogil:
        result = syscall(SYS_MOVE_MOUNT, mounted, b"", target, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
    _checked(result)


def fsopen(bytes type not None) -> int:
    """A context to configure a new file system in."""
    cdef const char *name = type
    cdef long result
    cdef unsigned int flags = _CLOEXEC
    with nogil:
        result = syscall(SYS_FSOPEN, name, flags)
    return _checked(result)


def fspick(int fd) -> int:
    """A context to configure the file system of a mount's root anew in."""
    cdef long result
    cdef unsigned int flags = _CLOEXEC | _FSPICK_NO_AUTOMOUNT | _FSPICK_EMPTY_PATH
    with nogil:
        result = syscall(SYS_FSPICK, fd, b"", flags)
    return _checked(result)


def fsconfig(int context, unsigned int command, bytes name, bytes value, int auxiliary=0) -> None:
    """Set something in a context, or have it carried out (CMD_CREATE, CMD_RECONFIGURE)."""
    cdef const char *key = NULL
    cdef const char *text = NULL
    cdef long result
    if name is not None:
        key = name
    if value is not None:
        text = value
    with nogil:
        result = syscall(SYS_FSCONFIG, context, command, key, text, auxiliary)
    _checked(result)


def fsmount(int context, unsigned int attributes) -> int:
    """A detached mount of a context's file system; `attributes` are MOUNT_ATTR_*."""
    cdef long result
    cdef unsigned int flags = _CLOEXEC
    with nogil:
        result = syscall(SYS_FSMOUNT, context, flags, attributes)
    return _checked(result)


def mount_setattr(int fd, bint recursive, uint64_t wanted, uint64_t unwanted) -> None:
    """Change the attributes of a mount. ENOSYS before Linux 5.12."""
    cdef mount_attr attr
    cdef unsigned int flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    cdef long result
    attr.attr_set = wanted
    attr.attr_clr = unwanted
    attr.propagation = attr.userns_fd = 0
    with nogil:
        result = syscall(SYS_MOUNT_SETATTR, fd, b"", flags, &attr, sizeof(attr))
    _checked(result)


def change_mount(bytes path not None, unsigned long flags) -> None:
    """mount(2) with nothing but flags: a mount's propagation, or its attributes."""
    cdef const char *target = path
    cdef int result
    with nogil:
        result = mount(NULL, target, NULL, flags, NULL)
    _checked(result)


def umount(bytes path not None, int flags) -> None:
    """umount2(2)."""
    cdef const char *target = path
    cdef int result
    with nogil:
        result = umount2(target, flags)
    _checked(result)


cdef uint64_t _mount_id(int directory, bytes name, unsigned int wanted) except? 0:
    cdef statx_t st
    cdef const char *path = name
    cdef int flags = _AT_NO_AUTOMOUNT | _AT_SYMLINK_NOFOLLOW | _AT_STATX_DONT_SYNC | (0 if name else _AT_EMPTY_PATH)
    cdef int result
    with nogil:
        result = statx(directory, path, flags, wanted, &st)
    _checked(result)
    return st.stx_mnt_id if st.stx_mask & wanted else 0


def mount_id(int directory, bytes name=b"") -> int:
    """The mount that a descriptor, or a name in it, is on: as in mountinfo. 0: the kernel does not tell (before 5.8)."""
    return _mount_id(directory, name, _STATX_MNT_ID)


def unique_mount_id(int directory, bytes name=b"") -> int:
    """The same as a number that is never given out again; 0 before Linux 6.8."""
    return _mount_id(directory, name, _STATX_MNT_ID_UNIQUE)
