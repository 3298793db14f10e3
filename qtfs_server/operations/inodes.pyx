"""getattr, setattr, statx, readlink, access, statfs, syncfs and extended attributes.

O_PATH descriptors cannot do all of this; where they cannot, their magic link in /proc/self/fd stands for the very inode.
Sources: statx(2), chown(2), utimensat(2), truncate(2), xattr(7), path_resolution(7).
"""
from libc.errno cimport E2BIG, EACCES, EINVAL, ENODATA, EOPNOTSUPP, EPERM, ERANGE, EROFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen, strncmp

from qtfs_common.protocol cimport KILL_PRIVILEGES, MAX_NAME, MAX_PATH, MAX_XATTR, NODE_ALIAS, SET_ATIME, SET_ATIME_NOW, \
    SET_GID, SET_HANDLE, SET_KILL_PRIVILEGES, SET_MODE, SET_MTIME, SET_MTIME_NOW, SET_SIZE, SET_UID, access_request, \
    attributes_reply, count_reply, getattr_request, setattr_request, statfs_reply, statx_reply, statx_request, \
    timestamp, xattr_request
from qtfs_server.identity cimport act_as_root, drop_fsetid
from qtfs_server.includes.linux cimport AT_EACCESS, AT_EMPTY_PATH, AT_FDCWD, AT_NO_AUTOMOUNT, O_CLOEXEC, \
    O_DIRECTORY, O_RDONLY, S_IFLNK, STATX_BASIC_STATS, STATX_BTIME, SYS_faccessat2, UTIME_NOW, UTIME_OMIT, \
    XATTR_CREATE, close, fchmodat, fchownat, fstatfs, ftruncate, getxattr, listxattr, openat, readlinkat, \
    removexattr, setxattr, statfs_t, statx, statx_t, statx_timestamp, syncfs, syscall, timespec, truncate, utimensat
from qtfs_server.operations.ourselves cimport link_not_ours
from qtfs_server.operations.streams cimport is_special, show_as_stream
from qtfs_server.policy cimport ALLOW_SETATTR, ALLOW_SETXATTR, ALLOW_WRITE
from qtfs_server.operations.unfinished cimport may_be_done, note_attribute
from qtfs_server.request cimport MALFORMED, as_caller, copy_text, request
from qtfs_server.attributes cimport lies_on_proc, node_stat
from qtfs_server.descriptors cimport proc_path
from qtfs_server.handles cimport handle_pin, handle_unpin
from qtfs_server.node_descriptors cimport node_pin, node_unpin
from qtfs_server.nodes cimport node_allowed, node_allows
from qtfs_server.session cimport handle, node, session

cdef enum:
    SET_ANYTHING = SET_MODE | SET_UID | SET_GID | SET_SIZE | SET_ATIME | SET_MTIME
    USE_HANDLE = 1                  # getattr_request.flags, statx_request.flags


# ---- attributes --------------------------------------------------------------------------------------------------

cdef int _stat_reply(request *r, node *n, int fd) noexcept nogil:
    cdef int error = node_stat(r.s, n, fd, <attributes_reply *>r.reply)
    if error == 0 and r.who.node & NODE_ALIAS and is_special(n):
        show_as_stream(r, n, <attributes_reply *>r.reply)
    r.reply_bytes = sizeof(attributes_reply)
    return error


cdef int op_getattr(request *r) noexcept nogil:
    """GETATTR: getattr_request → attributes_reply."""
    cdef getattr_request *body = <getattr_request *>r.body
    cdef handle *h = NULL
    cdef node *n = NULL
    cdef int error
    if r.body_bytes != sizeof(getattr_request):
        return MALFORMED
    if body.flags & USE_HANDLE and handle_pin(r.s, body.handle, &h) == 0:
        error = _stat_reply(r, h.node, h.fd)
        handle_unpin(r.s, h)
        return error
    error = node_pin(r.s, r.who.node, &n)
    if error == 0:
        error = _stat_reply(r, n, n.fd)
        node_unpin(r.s, n)
    return error


cdef void _timestamp(const statx_timestamp *given, timestamp *out) noexcept nogil:
    out.seconds = given.tv_sec
    out.nanoseconds = given.tv_nsec
    out.reserved = 0


cdef void _fill_statx(const statx_t *st, const attributes_reply *plain, statx_reply *out) noexcept nogil:
    memset(out, 0, sizeof(statx_reply))
    out.node_flags = plain.node_flags
    out.mask = st.stx_mask & (STATX_BASIC_STATS | STATX_BTIME)
    out.blksize = st.stx_blksize
    out.attributes = st.stx_attributes
    out.attributes_mask = st.stx_attributes_mask
    out.nlink = st.stx_nlink
    out.uid = st.stx_uid
    out.gid = st.stx_gid
    out.mode = <uint16_t>plain.attr.mode
    out.ino = plain.attr.ino
    out.size = plain.attr.size
    out.blocks = st.stx_blocks
    _timestamp(&st.stx_atime, &out.atime)
    _timestamp(&st.stx_btime, &out.btime)
    _timestamp(&st.stx_ctime, &out.ctime)
    _timestamp(&st.stx_mtime, &out.mtime)
    if plain.attr.rdev != 0:
        out.rdev_major = st.stx_rdev_major
        out.rdev_minor = st.stx_rdev_minor


cdef int op_statx(request *r) noexcept nogil:
    """STATX: statx_request → statx_reply, with the time of birth where the file system keeps it."""
    cdef statx_request *body = <statx_request *>r.body
    cdef attributes_reply plain
    cdef statx_t st
    cdef node *n = NULL
    cdef int error
    if r.body_bytes != sizeof(statx_request):
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    error = node_stat(r.s, n, n.fd, &plain)
    if error == 0 and r.who.node & NODE_ALIAS and is_special(n):
        show_as_stream(r, n, &plain)
    if error == 0 and statx(n.fd, b"", AT_EMPTY_PATH | AT_NO_AUTOMOUNT | (body.statx_flags & 0x6000),
                            STATX_BASIC_STATS | STATX_BTIME, &st) < 0:
        error = -errno
    if error == 0:
        _fill_statx(&st, &plain, <statx_reply *>r.reply)
    node_unpin(r.s, n)
    r.reply_bytes = sizeof(statx_reply)
    return error


cdef handle *_pin_to_resize(session *s, const setattr_request *body) noexcept nogil:
    """The handle by which the size is to be set, or NULL. Only root can open every one of an engine before us again."""
    cdef handle *h = NULL
    if not body.valid & SET_SIZE or not body.valid & SET_HANDLE or handle_pin(s, body.handle, &h) < 0:
        return NULL
    return h


cdef int _set_size(request *r, handle *h, const setattr_request *body, const char *link) noexcept nogil:
    """Through the handle if the caller has the file open (it may be unlinked or read-only by now), else by permission."""
    if body.valid & SET_KILL_PRIVILEGES and r.who.uid == 0:
        drop_fsetid(r.me)
    if h != NULL:
        return -errno if ftruncate(h.fd, body.size) < 0 else 0
    return -errno if truncate(link, body.size) < 0 else 0


cdef void _set_time(timespec *out, const setattr_request *body, uint32_t bit, uint32_t now_bit, long seconds,
                    long nanoseconds) noexcept nogil:
    out.tv_sec = seconds
    out.tv_nsec = nanoseconds
    if not body.valid & bit:
        out.tv_nsec = UTIME_OMIT
    elif body.valid & now_bit:
        out.tv_nsec = UTIME_NOW


cdef int _set_times(node *n, const setattr_request *body) noexcept nogil:
    cdef timespec times[2]
    _set_time(&times[0], body, SET_ATIME, SET_ATIME_NOW, body.atime, body.atime_ns)
    _set_time(&times[1], body, SET_MTIME, SET_MTIME_NOW, body.mtime, body.mtime_ns)
    return -errno if utimensat(n.fd, b"", times, AT_EMPTY_PATH) < 0 else 0


cdef int _apply(request *r, node *n, handle *h, const setattr_request *body) noexcept nogil:
    """In the order in which one step cannot undo another: chown(2) clears mode bits, all of them touch ctime."""
    cdef char link[32]
    cdef int error
    proc_path(link, n.fd)
    if body.valid & SET_SIZE:
        error = _set_size(r, h, body, link)
        if error < 0:
            return error
    if not body.valid & SET_ANYTHING:
        # So arrives a chown(2) without owners, which takes suid away, and what a kernel asks before the write of somebody
        # who may not do that: the write itself will.
        return -errno if fchownat(n.fd, b"", <uint32_t>-1, <uint32_t>-1, AT_EMPTY_PATH) < 0 and errno != EPERM else 0
    if body.valid & (SET_UID | SET_GID):
        if fchownat(n.fd, b"", body.uid if body.valid & SET_UID else <uint32_t>-1,
                    body.gid if body.valid & SET_GID else <uint32_t>-1, AT_EMPTY_PATH) < 0:
            return -errno
    if body.valid & SET_MODE:
        if n.type == S_IFLNK:
            return -EOPNOTSUPP
        if fchmodat(AT_FDCWD, link, body.mode & 0o7777, 0) < 0:
            return -errno
    if body.valid & (SET_ATIME | SET_MTIME):
        return _set_times(n, body)
    return 0


cdef uint16_t _needed(node *n, const setattr_request *body) noexcept nogil:
    """What the whitelist must allow. A change of nothing takes suid away, as a write does and a change of owner."""
    cdef uint16_t needed = 0
    if not body.valid & SET_ANYTHING:
        return ALLOW_WRITE if node_allows(n, n.fd) & ALLOW_WRITE else ALLOW_SETATTR
    if body.valid & SET_SIZE:
        needed |= ALLOW_WRITE
    if body.valid & (SET_UID | SET_GID | SET_MODE) or (body.valid & (SET_ATIME | SET_MTIME) and
                                                       not body.valid & SET_SIZE):
        needed |= ALLOW_SETATTR
    return needed


cdef int op_setattr(request *r) noexcept nogil:
    """SETATTR: setattr_request → attributes_reply."""
    cdef setattr_request *body = <setattr_request *>r.body
    cdef handle *h = NULL
    cdef node *n = NULL
    cdef int error
    if r.body_bytes != sizeof(setattr_request):
        return MALFORMED
    if r.s.read_only:
        return -EROFS
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    error = node_allowed(n, n.fd, _needed(n, body))
    if error == 0:
        h = _pin_to_resize(r.s, body)
        as_caller(r)
        # The whitelist was asked for the node, not for the handle's.
        error = _apply(r, n, h, body) if h == NULL or h.node == n else -EINVAL
        act_as_root(r.me)
        if h != NULL:
            handle_unpin(r.s, h)
    if error == 0:
        error = _stat_reply(r, n, n.fd)
    node_unpin(r.s, n)
    return error


cdef int op_readlink(request *r) noexcept nogil:
    """READLINK: nothing → the target. Where it would be the engine's own process, see link_not_ours."""
    cdef node *n = NULL
    cdef ssize_t length
    cdef int error
    if r.body_bytes != 0:
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    if n.type != S_IFLNK:           # readlinkat(2) without a name would say ENOENT
        node_unpin(r.s, n)
        return -EINVAL
    as_caller(r)
    length = readlinkat(n.fd, b"", <char *>r.reply, MAX_PATH)
    error = -errno if length < 0 else 0
    if length > 0 and lies_on_proc(r.s, n):
        length = link_not_ours(<char *>r.reply, length)
    node_unpin(r.s, n)
    r.reply_bytes = max(length, 0)
    return error


cdef int op_access(request *r) noexcept nogil:
    """ACCESS: access_request → nothing; the caller's ids are those that access(2) checks."""
    cdef node *n = NULL
    cdef int error
    if r.body_bytes != sizeof(access_request):
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    as_caller(r)
    if syscall(SYS_faccessat2, n.fd, b"", (<access_request *>r.body).mask & 7, AT_EMPTY_PATH | AT_EACCESS) < 0:
        error = -errno
    node_unpin(r.s, n)
    return error


cdef int op_statfs(request *r) noexcept nogil:
    """STATFS: nothing → statfs_reply, of the file system the node lies on."""
    cdef statfs_reply *out = <statfs_reply *>r.reply
    cdef statfs_t fs
    cdef node *n = NULL
    cdef int error
    if r.body_bytes != 0:
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    error = -errno if fstatfs(n.fd, &fs) < 0 else 0
    node_unpin(r.s, n)
    memset(out, 0, sizeof(statfs_reply))
    out.blocks = fs.f_blocks
    out.bfree = fs.f_bfree
    out.bavail = fs.f_bavail
    out.files = fs.f_files
    out.ffree = fs.f_ffree
    out.bsize = fs.f_bsize
    out.namelen = fs.f_namelen
    out.frsize = fs.f_frsize
    r.reply_bytes = sizeof(statfs_reply)
    return error


cdef int op_syncfs(request *r) noexcept nogil:
    """SYNCFS: nothing → nothing; everything of the node's file system is on its disk."""
    cdef char link[32]
    cdef node *n = NULL
    cdef int fd, error
    if r.body_bytes != 0:
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    proc_path(link, n.fd)
    fd = openat(AT_FDCWD, link, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    error = -errno if fd < 0 or syncfs(fd) < 0 else 0
    if fd >= 0:
        close(fd)
    node_unpin(r.s, n)
    return error


# ---- extended attributes -------------------------------------------------------------------------------------------

cdef int _take_xattr_name(request *r, char *name) noexcept nogil:
    cdef xattr_request *body = <xattr_request *>r.body
    if r.body_bytes < sizeof(xattr_request):
        return MALFORMED
    if body.size > MAX_XATTR:
        return -E2BIG
    if body.name_bytes > MAX_NAME:
        return -ERANGE
    return copy_text(r, sizeof(xattr_request), body.name_bytes, MAX_NAME + 1, name)


cdef bint _is_for_administrators(const char *name) noexcept nogil:
    """xattr(7): trusted.* takes CAP_SYS_ADMIN, which no file system id switches off."""
    return strncmp(name, b"trusted.", 8) == 0


cdef int _xattr_reply(request *r, ssize_t length) noexcept nogil:
    """The value that was read into the reply's room, or its size if that was asked."""
    if length < 0:
        return -errno
    if (<xattr_request *>r.body).size == 0:
        (<count_reply *>r.reply).count = length
        r.reply_bytes = sizeof(count_reply)
    else:
        r.reply_bytes = length
    return 0


cdef int op_getxattr(request *r) noexcept nogil:
    """GETXATTR: xattr_request, name → the value, or count_reply if size is 0."""
    cdef char name[MAX_NAME + 1]
    cdef char link[32]
    cdef xattr_request *body = <xattr_request *>r.body
    cdef node *n = NULL
    cdef int error = _take_xattr_name(r, name)
    if error < 0:
        return error
    if r.body_bytes != sizeof(xattr_request) + body.name_bytes:
        return MALFORMED
    if r.who.uid != 0 and _is_for_administrators(name):
        return -ENODATA
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    proc_path(link, n.fd)
    as_caller(r)
    error = _xattr_reply(r, getxattr(link, name, r.reply, body.size))
    node_unpin(r.s, n)
    return error


cdef size_t _without_trusted(char *names, size_t length) noexcept nogil:
    """Drop the trusted.* names from a list as listxattr(2) fills it; the new length."""
    cdef size_t at = 0, kept = 0, size
    while at < length:
        size = strlen(names + at) + 1
        if not _is_for_administrators(names + at):
            memcpy(names + kept, names + at, size)
            kept += size
        at += size
    return kept


cdef int op_listxattr(request *r) noexcept nogil:
    """LISTXATTR: xattr_request without name → names, each with its NUL, or count_reply if size is 0."""
    cdef char link[32]
    cdef xattr_request *body = <xattr_request *>r.body
    cdef node *n = NULL
    cdef ssize_t length
    cdef int error
    if r.body_bytes != sizeof(xattr_request):
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    proc_path(link, n.fd)
    as_caller(r)
    length = listxattr(link, <char *>r.reply, MAX_XATTR)
    if length > 0 and r.who.uid != 0:
        length = _without_trusted(<char *>r.reply, length)
    if length >= 0 and 0 < body.size < <size_t>length:
        error = -ERANGE
    else:
        error = _xattr_reply(r, length)
    node_unpin(r.s, n)
    return error


cdef int _begin_change(request *r, const char *name, node **n) noexcept nogil:
    """Pin the node of SETXATTR or REMOVEXATTR, ask the whitelist, become the caller."""
    cdef int error
    if r.s.read_only:
        return -EROFS
    if r.who.uid != 0 and _is_for_administrators(name):
        return -EPERM
    error = node_pin(r.s, r.who.node, n)
    if error < 0:
        return error
    error = node_allowed(n[0], n[0].fd, ALLOW_SETXATTR)
    if error < 0:
        node_unpin(r.s, n[0])
        return error
    as_caller(r)
    return 0


cdef int op_setxattr(request *r) noexcept nogil:
    """SETXATTR: xattr_request, name, value → nothing."""
    cdef int flags
    cdef char name[MAX_NAME + 1]
    cdef char link[32]
    cdef xattr_request *body = <xattr_request *>r.body
    cdef node *n = NULL
    cdef int error = _take_xattr_name(r, name)
    if error < 0:
        return error
    if r.body_bytes != sizeof(xattr_request) + <size_t>body.name_bytes + body.size:
        return MALFORMED
    error = _begin_change(r, name, &n)
    if error < 0:
        return error
    if body.kill & KILL_PRIVILEGES and r.who.uid == 0:
        drop_fsetid(r.me)
    flags = <int>body.flags
    proc_path(link, n.fd)
    note_attribute(r, link, name)
    if may_be_done(r) and r.before.ino == 0:
        flags &= ~XATTR_CREATE          # it would find what was made
    if setxattr(link, name, r.body + sizeof(xattr_request) + body.name_bytes, body.size, flags) < 0:
        error = -errno
    node_unpin(r.s, n)
    return error


cdef int op_removexattr(request *r) noexcept nogil:
    """REMOVEXATTR: xattr_request, name → nothing."""
    cdef char name[MAX_NAME + 1]
    cdef char link[32]
    cdef node *n = NULL
    cdef int error = _take_xattr_name(r, name)
    if error < 0:
        return error
    if r.body_bytes != sizeof(xattr_request) + (<xattr_request *>r.body).name_bytes:
        return MALFORMED
    error = _begin_change(r, name, &n)
    if error < 0:
        return error
    proc_path(link, n.fd)
    note_attribute(r, link, name)
    if removexattr(link, name) < 0 and not (errno == ENODATA and may_be_done(r) and r.before.ino != 0):
        error = -errno
    node_unpin(r.s, n)
    return error
