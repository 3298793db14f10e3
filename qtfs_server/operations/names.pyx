"""lookup, forget, symlink, mknod, mkdir, unlink, rmdir, rename, link: one component below a held descriptor each.

Sources: openat(2), mknodat(2), renameat(2), linkat(2), path_resolution(7).
"""
from libc.errno cimport EACCES, EINVAL, ENAMETOOLONG, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from qtfs_common.protocol cimport MAX_NAME, MAX_PATH, entry, forget_item, link_request, mkdir_request, \
    mknod_request, rename_request, symlink_request
from qtfs_server.includes.linux cimport AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_FOLLOW, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, \
    linkat, makedev, mkdirat, mknodat, renameat2, symlinkat, umask, unlinkat, written
from qtfs_server.operations.unfinished cimport may_be_done, note_name, note_names, was_made, was_removed, was_renamed
from qtfs_server.policy cimport ALLOW_CREATE, ALLOW_MKDIR, ALLOW_OPEN, ALLOW_READ, ALLOW_RENAME, ALLOW_RMDIR, \
    ALLOW_SETATTR, ALLOW_SETXATTR, ALLOW_UNLINK, ALLOW_WRITE, OFF_TRIE, count_denial, place, rules_moved
from qtfs_server.request cimport MALFORMED, as_caller, note_node, request, take_name, copy_text
from qtfs_server.descriptors cimport proc_path
from qtfs_server.fd_store cimport storing
from qtfs_server.handles cimport session_room
from qtfs_server.node_descriptors cimport node_pin, node_unpin
from qtfs_server.nodes cimport child_allowed, node_allowed, node_enter, node_forget, node_renamed
from qtfs_server.session cimport node
from qtfs_server.unnamed cimport name_removed

cdef extern from "<linux/fs.h>" nogil:
    enum:
        RENAME_EXCHANGE

cdef enum:
    ON_CONTENT = ALLOW_OPEN | ALLOW_READ | ALLOW_WRITE | ALLOW_SETATTR | ALLOW_SETXATTR


cdef int op_lookup(request *r) noexcept nogil:
    """LOOKUP: name → entry; one lookup is counted."""
    cdef char name[MAX_NAME + 1]
    cdef node *parent = NULL
    cdef int error = take_name(r, 0, r.body_bytes, name)
    if error < 0:
        return error
    error = node_pin(r.s, r.who.node, &parent)
    if error < 0:
        return error
    as_caller(r)
    r.at.name = name
    error = node_enter(r.s, parent, name, r.body_bytes, False, <entry *>r.reply)
    note_node(r, error, (<entry *>r.reply).node)
    node_unpin(r.s, parent)
    r.reply_bytes = sizeof(entry)
    return error


cdef int op_forget(request *r) noexcept nogil:
    """FORGET: forget_item[] → nothing. None is done twice: the client's kernel may have met the node again since."""
    cdef forget_item item
    cdef size_t i, first = 0
    if r.body_bytes % sizeof(forget_item) != 0:
        return MALFORMED
    if may_be_done(r):
        first = r.before.size
    for i in range(first, r.body_bytes // sizeof(forget_item)):
        if r.before != NULL:
            r.before.size = i + 1
            written()
            r.before.known = True
        memcpy(&item, r.body + i * sizeof(item), sizeof(item))
        node_forget(r.s, item.node, item.lookups)
    return 0


# ---- making names ------------------------------------------------------------------------------------------------

cdef int _begin(request *r, size_t fixed, uint16_t needed, char *name, node **parent) noexcept nogil:
    """Take the name behind the fixed part, pin its directory, ask the whitelist, become the caller."""
    cdef int error
    if r.body_bytes < fixed:
        return MALFORMED
    error = take_name(r, fixed, r.body_bytes - fixed, name)
    return error if error < 0 else _begin_named(r, name, r.body_bytes - fixed, needed, parent)


cdef int _begin_named(request *r, const char *name, size_t length, uint16_t needed, node **parent) noexcept nogil:
    cdef int error = node_pin(r.s, r.who.node, parent)
    if error < 0:
        return error
    error = child_allowed(r.s, parent[0], <const uint8_t *>name, length, needed, NULL)
    if error < 0:
        node_unpin(r.s, parent[0])
        return error
    as_caller(r)
    return 0


cdef int _finish_made(request *r, int error, node *parent, const char *name, size_t name_bytes) noexcept nogil:
    """Reply with the entry of what was just made, or why it was not."""
    umask(0)
    if error == 0:
        error = node_enter(r.s, parent, name, name_bytes, False, <entry *>r.reply)
        note_node(r, error, (<entry *>r.reply).node)
    node_unpin(r.s, parent)
    r.reply_bytes = sizeof(entry)
    return error


cdef int op_mknod(request *r) noexcept nogil:
    """MKNOD: mknod_request, name → entry. Any file type that mknod(2) makes."""
    cdef char name[MAX_NAME + 1]
    cdef mknod_request *body = <mknod_request *>r.body
    cdef node *parent = NULL
    cdef uint64_t device
    cdef int error = _begin(r, sizeof(mknod_request), ALLOW_CREATE, name, &parent)
    if error < 0:
        return error
    device = makedev(body.rdev >> 8 & 0xfff, (body.rdev & 0xff) | (body.rdev >> 12 & 0xfff00))
    note_name(r, parent.fd, name)
    umask(r.who.umask)
    if not was_made(r, parent.fd, name, body.mode & S_IFMT or S_IFREG, 0):
        error = session_room(r.s, False, parent.fd, name)
        if error == 0 and mknodat(parent.fd, name, body.mode, device) < 0:
            error = -errno
    return _finish_made(r, error, parent, name, r.body_bytes - sizeof(mknod_request))


cdef int op_mkdir(request *r) noexcept nogil:
    """MKDIR: mkdir_request, name → entry."""
    cdef char name[MAX_NAME + 1]
    cdef node *parent = NULL
    cdef int error = _begin(r, sizeof(mkdir_request), ALLOW_MKDIR, name, &parent)
    if error < 0:
        return error
    note_name(r, parent.fd, name)
    umask(r.who.umask)
    if not was_made(r, parent.fd, name, S_IFDIR, 0):
        error = session_room(r.s, False, parent.fd, name)
        if error == 0 and mkdirat(parent.fd, name, (<mkdir_request *>r.body).mode) < 0:
            error = -errno
    return _finish_made(r, error, parent, name, r.body_bytes - sizeof(mkdir_request))


cdef int op_symlink(request *r) noexcept nogil:
    """SYMLINK: symlink_request, name, target → entry."""
    cdef char name[MAX_NAME + 1]
    cdef char target[MAX_PATH]
    cdef symlink_request *body = <symlink_request *>r.body
    cdef node *parent = NULL
    cdef int error
    if r.body_bytes < sizeof(symlink_request) or \
            r.body_bytes != sizeof(symlink_request) + <size_t>body.name_bytes + body.target_bytes:
        return MALFORMED
    error = take_name(r, sizeof(symlink_request), body.name_bytes, name)
    if error == 0:
        error = copy_text(r, sizeof(symlink_request) + body.name_bytes, body.target_bytes, MAX_PATH, target)
    if error == 0:
        error = _begin_named(r, name, body.name_bytes, ALLOW_CREATE, &parent)
    if error < 0:
        return error
    note_name(r, parent.fd, name)
    if not was_made(r, parent.fd, name, S_IFLNK, 0):
        error = session_room(r.s, False, parent.fd, name)
        if error == 0 and symlinkat(target, parent.fd, name) < 0:
            error = -errno
    return _finish_made(r, error, parent, name, body.name_bytes)


cdef int _link_must_not_widen(node *target, place where) noexcept nogil:
    """A second name must not allow on a file what its first ones forbid."""
    cdef uint16_t gained = where.allowed & ~target.where.allowed & ON_CONTENT
    if gained:
        count_denial(gained)
        return -EACCES
    return 0


cdef int op_link(request *r) noexcept nogil:
    """LINK: link_request, name → entry of the target."""
    cdef char name[MAX_NAME + 1]
    cdef char source[32]
    cdef node *parent = NULL
    cdef node *target = NULL
    cdef place where
    cdef size_t name_bytes = r.body_bytes - sizeof(link_request)
    cdef int error
    if r.body_bytes < sizeof(link_request):
        return MALFORMED
    error = node_pin(r.s, (<link_request *>r.body).target, &target)
    if error < 0:
        return error
    error = _begin(r, sizeof(link_request), ALLOW_CREATE, name, &parent)
    if error == 0:
        child_allowed(r.s, parent, <const uint8_t *>name, name_bytes, 0, &where)
        node_allowed(target, target.fd, 0)
        error = _link_must_not_widen(target, where)
        if error < 0:
            node_unpin(r.s, parent)
    if error < 0:
        node_unpin(r.s, target)
        return error
    proc_path(source, target.fd)        # AT_EMPTY_PATH would demand CAP_DAC_READ_SEARCH of the caller
    note_name(r, parent.fd, name)
    if not was_made(r, parent.fd, name, target.type, target.ino) and \
            linkat(AT_FDCWD, source, parent.fd, name, AT_SYMLINK_FOLLOW) < 0:
        error = -errno
    error = _finish_made(r, error, parent, name, name_bytes)
    node_unpin(r.s, target)
    return error


# ---- removing and moving names -------------------------------------------------------------------------------------

cdef int _remove(request *r, uint16_t needed, int flags) noexcept nogil:
    cdef char name[MAX_NAME + 1]
    cdef node *parent = NULL
    cdef int error = _begin(r, 0, needed, name, &parent)
    if error < 0:
        return error
    note_name(r, parent.fd, name)
    if not was_removed(r, parent.fd, name):
        error = -errno if unlinkat(parent.fd, name, flags) < 0 else 0
    if storing and error == 0 and r.before != NULL:
        name_removed(r.s, parent, r.before.ino)
    node_unpin(r.s, parent)
    return error


cdef int op_unlink(request *r) noexcept nogil:
    """UNLINK: name → nothing."""
    return _remove(r, ALLOW_UNLINK, 0)


cdef int op_rmdir(request *r) noexcept nogil:
    """RMDIR: name → nothing."""
    return _remove(r, ALLOW_RMDIR, AT_REMOVEDIR)


cdef struct rename_names:
    char old[MAX_NAME + 1]
    char new[MAX_NAME + 1]


cdef int _take_rename_names(request *r, rename_names *names) noexcept nogil:
    cdef rename_request *body = <rename_request *>r.body
    cdef int error
    if r.body_bytes < sizeof(rename_request) or \
            r.body_bytes != sizeof(rename_request) + <size_t>body.name_bytes + body.new_name_bytes:
        return MALFORMED
    error = take_name(r, sizeof(rename_request), body.name_bytes, names.old)
    if error == 0:
        error = take_name(r, sizeof(rename_request) + body.name_bytes, body.new_name_bytes, names.new)
    return error


cdef int _rename(request *r, node *old, node *new, rename_names *names) noexcept nogil:
    cdef rename_request *body = <rename_request *>r.body
    cdef place source, destination
    cdef int error = child_allowed(r.s, old, <uint8_t *>names.old, body.name_bytes, ALLOW_RENAME, &source)
    if error == 0:
        error = child_allowed(r.s, new, <uint8_t *>names.new, body.new_name_bytes, ALLOW_RENAME, &destination)
    if error < 0:
        return error
    as_caller(r)
    note_names(r, old.fd, names.old, new.fd, names.new)
    if not was_renamed(r, old.fd, names.old, new.fd, names.new, body.flags & RENAME_EXCHANGE) and \
            renameat2(old.fd, names.old, new.fd, names.new, body.flags) < 0:
        return -errno
    if storing and r.before != NULL:
        name_removed(r.s, new, r.before.other_ino)
    node_renamed(r.s, new, names.new)
    # What lies below a moved directory may have come under other rules.
    if source.allowed != destination.allowed or source.trie != OFF_TRIE or destination.trie != OFF_TRIE:
        rules_moved()
    return 0


cdef int op_rename(request *r) noexcept nogil:
    """RENAME: rename_request, name, new name → nothing. Flags of renameat2(2)."""
    cdef rename_names names
    cdef node *old = NULL
    cdef node *new = NULL
    cdef int error = _take_rename_names(r, &names)
    if error < 0:
        return error
    error = node_pin(r.s, r.who.node, &old)
    if error < 0:
        return error
    error = node_pin(r.s, (<rename_request *>r.body).new_directory, &new)
    if error == 0:
        error = _rename(r, old, new, &names)
        node_unpin(r.s, new)
    node_unpin(r.s, old)
    return error
