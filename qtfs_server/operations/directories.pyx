"""opendir and readdir. Offsets are the backing file system's own cookies, so that seekdir(3) works across all sizes.

Sources: getdents64(2), telldir(3), <linux/fuse.h> (struct fuse_dirent, struct fuse_direntplus).
"""
from libc.errno cimport EINVAL, EMSGSIZE, ENOTDIR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

from qtfs_common.protocol cimport MAX_PAYLOAD, OPENED_UNCACHED, direntry, direntry_bytes, direntry_plus, entry, \
    open_reply, open_request, readdir_request
from qtfs_server.identity cimport act_as_root
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_NONBLOCK, O_RDONLY, S_IFDIR, \
    SYS_getdents64, linux_dirent64, lseek, openat, syscall, written
from qtfs_server.policy cimport ALLOW_LOOK, ALLOW_READDIR, child_place, may_hide_names, place
from qtfs_server.request cimport MALFORMED, SCRATCH_BYTES, as_caller, note_handle, request
from qtfs_server.attributes cimport lies_on_pseudo
from qtfs_server.descriptors cimport proc_path
from qtfs_server.handles cimport handle_new, handle_pin, handle_unpin
from qtfs_server.node_descriptors cimport node_hold, node_pin, node_unpin
from qtfs_server.nodes cimport node_allowed, node_enter
from qtfs_server.session cimport HANDLE_DIRECTORY, HANDLE_NAMES_ONLY, MOST_LISTED, handle, node
from qtfs_server.stuck cimport leads_to_stuck

cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_SET

cdef enum:
    LEAST_BLOCK = 1024              # getdents64(2) refuses a buffer that does not hold the next name


cdef int op_opendir(request *r) noexcept nogil:
    """OPENDIR: open_request → open_reply."""
    cdef open_reply *out = <open_reply *>r.reply
    cdef char link[32]
    cdef node *n = NULL
    cdef uint64_t id = 0
    cdef bint pseudo
    cdef int fd, error
    if r.body_bytes != sizeof(open_request):
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    error = node_allowed(n, n.fd, ALLOW_READDIR) if n.type == S_IFDIR else -ENOTDIR
    pseudo = lies_on_pseudo(r.s, n)
    if error == 0:
        proc_path(link, n.fd)
        as_caller(r)
        fd = openat(AT_FDCWD, link, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        error = -errno if fd < 0 else handle_new(r.s, n, fd, HANDLE_DIRECTORY | (HANDLE_NAMES_ONLY if pseudo else 0),
                                                 O_RDONLY | O_DIRECTORY, &id)
        note_handle(r, error, id)
        out.flags = OPENED_UNCACHED if pseudo else 0
    node_unpin(r.s, n)
    if error == 0:
        out.handle = id
        out.reserved = 0
        r.reply_bytes = sizeof(open_reply)
    return error


cdef bint _is_dot(const char *name) noexcept nogil:
    return name[0] == b'.' and (name[1] == 0 or (name[1] == b'.' and name[2] == 0))


cdef void _put_name(void *at, const linux_dirent64 *d, const char *name, size_t name_bytes, uint64_t ino_bits) noexcept nogil:
    cdef direntry *out = <direntry *>at
    out.ino = d.d_ino ^ ino_bits
    out.off = d.d_off
    out.name_bytes = <uint32_t>name_bytes
    out.type = d.d_type
    memcpy(<char *>at + sizeof(direntry), name, name_bytes)


cdef void _note_listed(request *r, uint64_t node) noexcept nogil:
    """Should the reply be lost: this lookup was counted for nothing."""
    cdef uint32_t count = r.before.listed_count
    r.before.listed[count] = node
    written()
    r.before.listed_count = count + 1


cdef size_t _put(request *r, handle *h, bint plus, const linux_dirent64 *d, size_t room) noexcept nogil:
    """Append one record to the reply: its size, or 0 if it does not fit, or no more lookups can be noted."""
    cdef const char *name = <const char *>d + sizeof(linux_dirent64)
    cdef size_t name_bytes = strlen(name)
    cdef size_t fixed = sizeof(direntry_plus) if plus else sizeof(direntry)
    cdef size_t size = direntry_bytes(fixed, name_bytes)
    cdef char *at = <char *>r.reply + r.reply_bytes
    if size > room or plus and r.before.listed_count == MOST_LISTED:
        return 0
    memset(at, 0, fixed)
    memset(at + size - 8, 0, 8)
    # On a pseudo file system, without a descriptor to spare where one is needed, without search permission, or where a
    # stuck one is mounted an entry is its name only: the client looks it up.
    if plus and not h.flags & HANDLE_NAMES_ONLY and not _is_dot(name) and not leads_to_stuck(r.s, h.node, name):
        r.at.name = name
        if node_enter(r.s, h.node, name, name_bytes, True, <entry *>at) < 0:
            memset(at, 0, sizeof(entry))
        else:
            _note_listed(r, (<entry *>at).node)
    _put_name(at + fixed - sizeof(direntry), d, name, name_bytes, <uint64_t>h.node.device << 48)
    return size


cdef bint _is_hidden(const place *directory, const char *name) noexcept nogil:
    cdef place where
    if not may_hide_names(directory) or _is_dot(name):
        return False
    where = child_place(directory, <const uint8_t *>name, strlen(name))
    return not where.allowed & ALLOW_LOOK


cdef bint _put_block(request *r, handle *h, const readdir_request *body, size_t length) noexcept nogil:
    """Turn a block of getdents64(2) into records. False: the reply is full, and the rest of the block is dropped."""
    cdef size_t at = 0, size
    cdef linux_dirent64 *d
    while at < length:
        d = <linux_dirent64 *>(r.scratch + at)
        if _is_hidden(&h.node.where, <const char *>d + sizeof(linux_dirent64)):
            h.position = d.d_off
            at += d.d_reclen
            continue
        size = _put(r, h, body.plus != 0, d, body.size - r.reply_bytes)
        if size == 0:
            return False
        r.reply_bytes += size
        h.position = d.d_off
        at += d.d_reclen
    return True


cdef int _fill(request *r, handle *h, const readdir_request *body) noexcept nogil:
    """Read on from the offset asked for until the reply is full or the directory ends."""
    cdef size_t smallest = sizeof(direntry_plus) if body.plus else sizeof(direntry)
    cdef size_t block
    cdef long got
    if body.size < smallest:
        return -EINVAL              # an empty reply would mean the end
    if (body.offset == 0 or <uint64_t>h.position != body.offset) and lseek(h.fd, body.offset, SEEK_SET) < 0:
        return -errno
    h.position = body.offset
    while body.size - r.reply_bytes >= smallest:
        block = (body.size - r.reply_bytes) // (4 if body.plus else 1)
        block = min(max(block, <size_t>LEAST_BLOCK), <size_t>65536)
        got = syscall(SYS_getdents64, h.fd, r.scratch, block)
        if got < 0:
            return -errno if r.reply_bytes == 0 else 0
        if got == 0:
            return 0
        if not _put_block(r, h, body, got):
            h.position = -1         # the descriptor stands behind what was handed out
            return 0 if r.reply_bytes > 0 else -EINVAL
    return 0


cdef int op_readdir(request *r) noexcept nogil:
    """READDIR: readdir_request → records of whole 8-byte words; none at the end. With plus, lookups are counted."""
    cdef readdir_request *body = <readdir_request *>r.body
    cdef handle *h = NULL
    cdef int error
    if r.body_bytes != sizeof(readdir_request) or body.size > MAX_PAYLOAD:
        return MALFORMED
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    error = node_allowed(h.node, h.fd, ALLOW_READDIR) if h.flags & HANDLE_DIRECTORY else -ENOTDIR
    if error == 0 and body.size > r.reply_room:
        error = -EMSGSIZE
    if error == 0:
        error = node_hold(r.s, h.node)
    if error == 0:
        as_caller(r)
        error = _fill(r, h, body)
        node_unpin(r.s, h.node)
    handle_unpin(r.s, h)
    return error
