"""Where the kernel would take the engine, which does the work, for who wants it done: /proc/self, 0 in cgroup.procs.

Sources: proc(5), cgroups(7), cgroup_procs_write_start() of the kernel's kernel/cgroup/cgroup.c.
"""
from libc.stdint cimport uint8_t
from libc.string cimport memmove, strchr, strcmp, strcpy, strlen, strncmp, strrchr

from qtfs_common.protocol cimport MAX_PATH
from qtfs_server.attributes cimport lies_on_cgroup
from qtfs_server.descriptors cimport fd_path
from qtfs_server.session cimport handle, session

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char *, size_t)


cdef size_t link_not_ours(char *target, size_t length) noexcept nogil:
    """Correct a link of procfs that leads to the process that reads it: the new length. `target` has room.

    `self` and `thread-self` become the links of the same name on the client. What lies below `self` (mounts, net) is
    taken from the server's process 1. No other link of procfs begins with a digit or with "self/".
    """
    cdef const char *instead
    target[length] = 0
    if target[0] >= b'0' and target[0] <= b'9':
        instead = b"/proc/thread-self" if strchr(target, b'/') != NULL else b"/proc/self"
        strcpy(target, instead)
        return strlen(instead)
    if strncmp(target, b"self/", 5) == 0:
        target[0] = b'1'
        memmove(target + 1, target + 4, length - 4)
        return length - 3
    return length


cdef bint _is_space(uint8_t character) noexcept nogil:
    return character == b' ' or b'\t' <= character <= b'\r' or character == 0xa0  # the kernel's isspace()


cdef bint _says_zero(const uint8_t *data, size_t size) noexcept nogil:
    """Whether kstrtoint(), base 0, reads 0 once blanks around are gone: 0, 00, -0, 0x0."""
    cdef size_t at = 0, zeros = 0
    size = strnlen(<const char *>data, size)
    while size > 0 and _is_space(data[size - 1]):
        size -= 1
    while at < size and _is_space(data[at]):
        at += 1
    if at < size and data[at] in (b'+', b'-'):
        at += 1
    if at + 2 < size and data[at] == b'0' and data[at + 1] in (b'x', b'X'):
        at += 2
    while at < size and data[at] == b'0':
        at += 1
        zeros += 1
    return zeros > 0 and at == size


cdef bint moves_ourselves(session *s, const handle *h, const uint8_t *data, size_t size) noexcept nogil:
    """Whether a write would move the engine, as the process that writes, into a cgroup."""
    cdef char path[MAX_PATH]
    cdef const char *name
    if not _says_zero(data, size) or not lies_on_cgroup(s, h.node):
        return False
    if fd_path(h.fd, path, sizeof(path)) <= 0:
        return True                 # too long: it may be one of these
    name = strrchr(path, b'/')
    return name != NULL and (strcmp(name, b"/cgroup.procs") == 0 or strcmp(name, b"/cgroup.threads") == 0 or
                             strcmp(name, b"/tasks") == 0)
