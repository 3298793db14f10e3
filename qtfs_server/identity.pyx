"""Acting for a caller: credentials(7), setresuid(2), capabilities(7), umask(2). All of it is per thread.

A worker is root between requests. For another user it takes that user's effective ids, which those of file systems
follow, and groups and gives up all of its effective capabilities, so that the kernel checks and marks everything as if
the caller were here: sysctls and cgroups go by the effective uid. The real and the saved uid stay root's; they let it
return, and keep the caller's processes from sending it signals. The system calls are bare, since those of libc change
all threads.
"""
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from qtfs_server.includes.linux cimport CAP_FSETID, CLONE_FS, SYS_capget, SYS_capset, SYS_setgroups, \
    SYS_setresgid, SYS_setresuid, _LINUX_CAPABILITY_VERSION_3, __user_cap_data_struct, __user_cap_header_struct, \
    syscall, umask, unshare

cdef enum:
    SAME = -1                       # an id that is not to change


cdef void _set_effective(identity *me, uint64_t effective) noexcept nogil:
    cdef __user_cap_header_struct head
    cdef __user_cap_data_struct data[2]
    cdef int word
    head.version = _LINUX_CAPABILITY_VERSION_3
    head.pid = 0
    for word in range(2):
        data[word].permitted = <uint32_t>(me.permitted >> 32 * word)
        data[word].effective = <uint32_t>(effective >> 32 * word)
        data[word].inheritable = 0
    syscall(SYS_capset, &head, data)


cdef int identity_init(identity *me) noexcept nogil:
    """Prepare the calling thread: an umask of its own, no supplementary groups. 0 or -errno."""
    cdef __user_cap_header_struct head
    cdef __user_cap_data_struct data[2]
    memset(me, 0, sizeof(identity))
    head.version = _LINUX_CAPABILITY_VERSION_3
    head.pid = 0
    if syscall(SYS_capget, &head, data) < 0:
        return -errno
    me.permitted = data[0].permitted | <uint64_t>data[1].permitted << 32
    me.is_root = me.capable = me.keeps_fsetid = True
    if unshare(CLONE_FS) < 0:
        return -errno
    umask(0)
    syscall(SYS_setgroups, 0, NULL)     # an engine that is not root keeps its groups
    return 0


cdef void act_as(identity *me, uint32_t uid, uint32_t gid, const uint32_t *groups, uint32_t ngroups) noexcept nogil:
    """Take over the caller's ids, which are ids (NO_ID is none); uid 0 keeps the capabilities."""
    if uid == 0 and gid == 0 and ngroups == 0:
        return
    me.is_root = False
    syscall(SYS_setgroups, <size_t>ngroups, groups)
    syscall(SYS_setresgid, SAME, gid, SAME)
    if uid != 0:
        syscall(SYS_setresuid, SAME, uid, SAME)
        _set_effective(me, 0)
        me.capable = False


cdef void act_as_root(identity *me) noexcept nogil:
    """Undo act_as and drop_fsetid."""
    if me.is_root and me.keeps_fsetid:
        return
    if not me.is_root:
        syscall(SYS_setresuid, SAME, 0, SAME)
        syscall(SYS_setresgid, SAME, 0, SAME)
    _set_effective(me, me.permitted)
    if not me.is_root:
        syscall(SYS_setgroups, 0, NULL)
    me.is_root = me.capable = me.keeps_fsetid = True


cdef void drop_fsetid(identity *me) noexcept nogil:
    """Let the kernel clear suid and sgid on writes and truncations as it does for callers without CAP_FSETID."""
    if me.capable:
        _set_effective(me, me.permitted & ~(<uint64_t>1 << CAP_FSETID))
        me.keeps_fsetid = False
