"""Descriptors: how many there are, and what the kernel knows of one.

All that clients can make us hold is counted in `descriptors`, so that nodes give theirs up before anything else fails.
Nodes keep no more than a number of them in any case: one pins a file's inode and name in the kernel's memory.
"""
from libc.errno cimport ENAMETOOLONG, errno
from libc.stdint cimport int32_t, int64_t, uint32_t

from qtfs_server.includes.linux cimport AT_EMPTY_PATH, AT_FDCWD, AT_STATX_DONT_SYNC, O_CLOEXEC, O_DIRECTORY, \
    O_NOFOLLOW, O_PATH, RESOLVE_NO_SYMLINKS, STATX_BASIC_STATS, STATX_MNT_ID, SYS_openat2, atomic_add_int, \
    atomic_load_int, close, openat, open_how, readlinkat, snprintf, statx, statx_t, syscall

cdef enum:
    RESERVED_DESCRIPTORS = 64       # for the engine itself
    MOST_OF_NODES = 16384           # what nodes of all sessions keep together
    LEAST_OF_SESSION = 16           # files that a session may have open as long as there are descriptors at all

cdef int32_t descriptors = 0
cdef int32_t _of_nodes = 0
cdef int32_t _closing = 0
cdef int32_t descriptor_limit = 1024


cdef void descriptor_opened() noexcept nogil:
    """Count a descriptor that a client's doing keeps open."""
    atomic_add_int(&descriptors, 1)


cdef void close_counted(int fd) noexcept nogil:
    """Close a counted descriptor; -1 is none."""
    if fd >= 0:
        close(fd)
        atomic_add_int(&descriptors, -1)


cdef void node_opened() noexcept nogil:
    """Count a node's descriptor."""
    descriptor_opened()
    atomic_add_int(&_of_nodes, 1)


cdef void close_node(int fd) noexcept nogil:
    """Close a node's descriptor; -1 is none."""
    if fd >= 0:
        close_counted(fd)
        atomic_add_int(&_of_nodes, -1)


cdef void closing_later(int count) noexcept nogil:
    """Count descriptors of nodes that are about to be closed; negative: that have been."""
    atomic_add_int(&_closing, count)


cdef bint descriptors_short() noexcept nogil:
    """Whether nodes have to give descriptors up before more are opened.

    What is about to be closed is gone, as far as it fits into the reserve: no node is to go in its place, nor is a close(2)
    that hangs to be relied on.
    """
    cdef int32_t going = min(atomic_load_int(&_closing), <int32_t>RESERVED_DESCRIPTORS // 2)
    return atomic_load_int(&descriptors) - going > descriptor_limit - RESERVED_DESCRIPTORS or \
        atomic_load_int(&_of_nodes) - going > MOST_OF_NODES


cdef bint within_share(uint32_t held) noexcept nogil:
    """Whether a session that has so many files open may open another: then it leaves as much as it has.

    Each counts twice: once it is unlinked, its node keeps a descriptor, too. The others' nodes give theirs up.
    """
    cdef int32_t taken = atomic_load_int(&descriptors) - atomic_load_int(&_of_nodes)
    return held < LEAST_OF_SESSION or 2 * <int64_t>held < descriptor_limit - RESERVED_DESCRIPTORS - taken


cdef void proc_path(char *out, int fd) noexcept nogil:
    """The magic link that stands for an open descriptor: proc_pid_fd(5). `out` holds 32 bytes."""
    snprintf(out, 32, b"/proc/self/fd/%d", fd)


cdef int fd_path(int fd, char *out, size_t room) noexcept nogil:
    """The path the kernel knows for a descriptor, NUL-terminated. Its length, or -errno."""
    cdef char link[32]
    cdef ssize_t length
    proc_path(link, fd)
    length = readlinkat(AT_FDCWD, link, out, room - 1)
    if length < 0:
        return -errno
    out[length] = 0
    return <int>length


cdef bint is_at(int fd, const char *path) noexcept nogil:
    """Whether a path leads to the very file of a descriptor. That of a detached mount begins where the mount does."""
    cdef open_how how
    cdef statx_t here, there
    cdef int other
    cdef bint same = False
    how.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC
    how.mode = 0
    how.resolve = RESOLVE_NO_SYMLINKS
    other = <int>syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how))
    if other < 0:
        return False
    if statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_BASIC_STATS | STATX_MNT_ID, &here) == 0 and \
            statx(other, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_BASIC_STATS | STATX_MNT_ID, &there) == 0:
        same = here.stx_mnt_id == there.stx_mnt_id and here.stx_ino == there.stx_ino and \
            here.stx_dev_major == there.stx_dev_major and here.stx_dev_minor == there.stx_dev_minor
    close(other)
    return same


cdef int path_above(int directory, char *out, size_t room) noexcept nogil:
    """The path of the nearest directory above whose path is short enough for the kernel to tell. Its length, or -errno."""
    cdef int length = -ENAMETOOLONG, above, fd = -1
    while length == -ENAMETOOLONG:
        above = openat(fd if fd >= 0 else directory, b"..", O_PATH | O_DIRECTORY | O_CLOEXEC)
        length = fd_path(above, out, room) if above >= 0 else -errno
        if fd >= 0:
            close(fd)
        fd = above
    if fd >= 0:
        close(fd)
    return length
