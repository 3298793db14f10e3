"""From the server's replies to the kernel's: one `_answer_*` function for each shape of reply.

The body lies in the channel's receive buffer and goes to the kernel from there; what the wire leaves free for us, such
as an entry's validity, is written over it first. Each function returns 0, or -errno of the device: then the kernel did
not take the reply, and what it granted has to be given back. A body of the wrong size is answered EIO.
"""
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from qtfs_client.drivers.fuse3.device cimport forget_cached_attributes, reply, reply_error, show_size, write_reply
from qtfs_client.drivers.fuse3.known_nodes cimport forget_known
from qtfs_client.drivers.fuse3.piping cimport reply_from_pipe
from qtfs_client.drivers.fuse3.special_state cimport special_state
from qtfs_client.drivers.fuse3.state cimport CACHE_ALWAYS, CACHE_AUTO, CACHE_NONE, HANDLE_POLLABLE, MAKES_ENTRIES, \
    MAKES_ENTRY, MAKES_HANDLE, MAX_FORGETS, mount_state, replier, worker
from qtfs_client.includes.fuse_abi cimport *
from qtfs_client.includes.linux cimport O_ACCMODE, O_APPEND, O_RDWR, pthread_mutex_lock, pthread_mutex_unlock
from qtfs_common.protocol cimport NODE_ALIAS, NODE_STREAM_READER, NODE_UNCACHED, OPENED_CHANGED, OPENED_STREAM, \
    OPENED_UNCACHED, ROOT_NODE, attributes_reply, create_reply, direntry_bytes, direntry_plus, entry, forget_item, ioctl_reply, open_reply, \
    poll_reply, statfs_reply
from qtfs_common.transport cimport message

cdef extern from "<sys/stat.h>" nogil:
    enum:
        S_IFMT
        S_IFBLK
        S_IFCHR
        S_IFIFO


# ---- how long the kernel may trust what it gets ----------------------------------------------------------------------

cdef bint is_fifo_or_device(uint32_t mode) noexcept nogil:
    """Whether a kernel would open such a file without asking us."""
    return mode & S_IFMT in (S_IFIFO, S_IFCHR, S_IFBLK)


cdef void _give_entry(worker *w, uint8_t *made) noexcept nogil:
    """Turn the wire's entry into struct fuse_entry_out, in place; the kernel gets a lookup with it."""
    cdef fuse_entry_validity *out = <fuse_entry_validity *>made
    # The next to look a special file up may want to open it, or may not.
    cdef bint uncached = (<entry *>made).node_flags & NODE_UNCACHED or (<entry *>made).node & NODE_ALIAS or \
        is_fifo_or_device((<entry *>made).attr.mode)
    cdef uint64_t valid_s = 0 if uncached else w.mount.name_valid_s
    w.lookups += 1
    out.entry_valid = valid_s
    out.attr_valid = valid_s
    out.entry_valid_nsec = 0
    out.attr_valid_nsec = 0


cdef void _set_attr_validity(mount_state *m, uint8_t *made) noexcept nogil:
    """Turn the wire's attributes_reply (or the head of statx_reply) into struct fuse_attr_out, in place."""
    cdef fuse_attr_validity *out = <fuse_attr_validity *>made
    out.attr_valid = 0 if (<uint64_t *>made)[0] & NODE_UNCACHED else m.name_valid_s
    out.attr_valid_nsec = 0


cdef bint _appends_to_a_mapping(mount_state *m, const open_reply *opened, uint32_t asked) noexcept nogil:
    """Whether a file that is opened O_APPEND, for reading too, might be mapped by a kernel that cannot map direct I/O.

    What is written then goes through the page cache at an offset that the kernel believes to be the end, and to the server's
    end all the same. After a write it asks for the attributes before it reads, and drops the pages if they differ.
    """
    return not m.direct_mmap and asked & O_APPEND and asked & O_ACCMODE == O_RDWR and not opened.handle & HANDLE_POLLABLE


cdef uint32_t open_flags(mount_state *m, const open_reply *opened, uint32_t asked) noexcept nogil:
    """FOPEN_* for an open file: how the kernel may cache it. `asked`: the flags of open(2)."""
    if opened.flags & OPENED_STREAM:
        return FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE | FOPEN_STREAM | FOPEN_PARALLEL_DIRECT_WRITES
    if opened.flags & OPENED_UNCACHED and not _appends_to_a_mapping(m, opened, asked):
        return FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
    if m.cache == CACHE_NONE:
        # Without FUSE_DIRECT_IO_ALLOW_MMAP (Linux 6.6) a program that maps the file would fail.
        return FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES if m.direct_mmap else 0
    if m.cache == CACHE_ALWAYS and not opened.flags & OPENED_CHANGED:
        return FOPEN_KEEP_CACHE
    return 0


# ---- answers -------------------------------------------------------------------------------------------------------

cdef int _answer_as_it_is(worker *w, message *m) noexcept nogil:
    """The body is what the kernel wants: of the size in the row, which may be none."""
    if m.body_bytes != w.row.reply_bytes:
        return reply_error(w, EIO)
    return reply(w, m.body, m.body_bytes)


cdef int _answer_entry(worker *w, message *m) noexcept nogil:
    if m.body_bytes != sizeof(entry):
        return reply_error(w, EIO)
    _give_entry(w, m.body)
    return reply(w, m.body, sizeof(entry))


cdef int _answer_attributes(worker *w, message *m) noexcept nogil:
    """GETATTR, SETATTR, STATX."""
    if m.body_bytes != w.row.reply_bytes:
        return reply_error(w, EIO)
    if w.request.nodeid == ROOT_NODE and (<uint64_t *>m.body)[0] & NODE_UNCACHED:
        w.mount.absent_valid_s = 0      # replies that say that a name is absent do not say where
    _set_attr_validity(w.mount, m.body)
    if w.request.nodeid == ROOT_NODE and m.body_bytes == sizeof(attributes_reply):
        pthread_mutex_lock(&w.mount.guard)
        w.mount.attributes = (<attributes_reply *>m.body)[0]
        w.mount.has_attributes = True
        pthread_mutex_unlock(&w.mount.guard)
    return reply(w, m.body, m.body_bytes)


cdef int _answer_statfs(worker *w, message *m) noexcept nogil:
    if m.body_bytes != sizeof(statfs_reply):
        return reply_error(w, EIO)
    if w.request.nodeid == ROOT_NODE:
        pthread_mutex_lock(&w.mount.guard)
        w.mount.statfs = (<statfs_reply *>m.body)[0]
        w.mount.has_statfs = True
        pthread_mutex_unlock(&w.mount.guard)
    return reply(w, m.body, sizeof(statfs_reply))


cdef bint answer_from_memory_locked(mount_state *m, int device, const fuse_in_header *request) noexcept nogil:
    """Answer GETATTR and STATFS of the root with what the server said last. False: it is something else, or not known.

    umount(8) asks both before it does anything.
    """
    cdef attributes_reply attributes = m.attributes
    if request.nodeid != ROOT_NODE:
        return False
    if request.opcode == FUSE_STATFS and m.has_statfs:
        write_reply(device, request.unique, 0, &m.statfs, sizeof(statfs_reply), NULL, 0)
        return True
    if request.opcode == FUSE_GETATTR and m.has_attributes:
        memset(&attributes, 0, sizeof(fuse_attr_validity))
        write_reply(device, request.unique, 0, &attributes, sizeof(attributes_reply), NULL, 0)
        return True
    return False


cdef int _answer_open(worker *w, message *m) noexcept nogil:
    cdef open_reply *opened = <open_reply *>m.body
    if m.body_bytes != sizeof(open_reply):
        return reply_error(w, EIO)
    if w.mount.cache == CACHE_AUTO and opened.flags & OPENED_CHANGED:
        forget_cached_attributes(w.mount, w.request.nodeid)
    (<fuse_open_out *>m.body).open_flags = open_flags(w.mount, opened, (<fuse_open_in *>w.argument).flags)
    (<fuse_open_out *>m.body).padding = 0
    return reply(w, m.body, sizeof(open_reply))


cdef int _answer_opendir(worker *w, message *m) noexcept nogil:
    cdef open_reply *opened = <open_reply *>m.body
    cdef uint32_t flags = 0
    if m.body_bytes != sizeof(open_reply):
        return reply_error(w, EIO)
    if w.mount.cache == CACHE_ALWAYS and not opened.flags & OPENED_UNCACHED:
        flags = FOPEN_CACHE_DIR
        if not opened.flags & OPENED_CHANGED:
            flags |= FOPEN_KEEP_CACHE
    (<fuse_open_out *>m.body).open_flags = flags
    (<fuse_open_out *>m.body).padding = 0
    return reply(w, m.body, sizeof(open_reply))


cdef int _answer_create(worker *w, message *m) noexcept nogil:
    cdef create_reply *made = <create_reply *>m.body
    cdef fuse_open_out *out
    if m.body_bytes != sizeof(create_reply):
        return reply_error(w, EIO)
    out = <fuse_open_out *>(m.body + sizeof(entry))
    out.open_flags = open_flags(w.mount, &made.opened, (<fuse_create_in *>w.argument).flags)
    out.padding = 0
    _give_entry(w, m.body)
    return reply(w, m.body, sizeof(create_reply))


cdef int _answer_data(worker *w, message *m) noexcept nogil:
    """READ, READDIR: at most what was asked for."""
    if m.body_bytes > (<fuse_read_in *>w.argument).size:
        return reply_error(w, EIO)
    if w.piped_bytes > 0:
        return reply_from_pipe(w)
    return reply(w, m.body, m.body_bytes)


cdef size_t _next_entry(message *m, size_t at) noexcept nogil:
    """Where the READDIRPLUS record at an offset ends; 0 if it does not fit."""
    cdef size_t size
    if m.body_bytes - at < sizeof(direntry_plus):
        return 0
    size = direntry_bytes(sizeof(direntry_plus), (<direntry_plus *>(m.body + at)).name.name_bytes)
    return at + size if size <= m.body_bytes - at else 0


cdef int _answer_readdirplus(worker *w, message *m) noexcept nogil:
    cdef size_t at = 0, end
    if m.body_bytes > (<fuse_read_in *>w.argument).size:
        return reply_error(w, EIO)
    while at < m.body_bytes:
        end = _next_entry(m, at)
        if end == 0:
            return reply_error(w, EIO)
        if (<entry *>(m.body + at)).node != 0:
            _give_entry(w, m.body + at)
        at = end
    return reply(w, m.body, m.body_bytes)


cdef int _answer_readlink(worker *w, message *m) noexcept nogil:
    """The kernel's buffer is a page, of which it wants one byte for itself."""
    if m.body_bytes >= 4096:
        return reply_error(w, EIO)
    return reply(w, m.body, m.body_bytes)


cdef int _answer_xattr(worker *w, message *m) noexcept nogil:
    """GETXATTR, LISTXATTR: the size, as a count whose upper half is zero, or the value."""
    cdef uint32_t asked = (<fuse_getxattr_in *>w.argument).size
    if m.body_bytes > asked if asked > 0 else m.body_bytes != sizeof(uint64_t):
        return reply_error(w, EIO)
    return reply(w, m.body, m.body_bytes)


cdef int _answer_poll(worker *w, message *m) noexcept nogil:
    cdef poll_reply *out = <poll_reply *>m.body
    if m.body_bytes != sizeof(poll_reply):
        return reply_error(w, EIO)
    if out.available > 0 and w.request.nodeid & NODE_ALIAS == NODE_STREAM_READER:
        show_size(w.mount, w.request.nodeid, out.available)
    out.available = 0
    return reply(w, out, sizeof(poll_reply))


cdef int _answer_ioctl(worker *w, message *m) noexcept nogil:
    cdef fuse_ioctl_out out
    if m.body_bytes < sizeof(ioctl_reply) or \
            m.body_bytes - sizeof(ioctl_reply) > (<fuse_ioctl_in *>w.argument).out_size:
        return reply_error(w, EIO)
    memset(&out, 0, sizeof(out))
    out.result = (<ioctl_reply *>m.body).result
    return write_reply(w.device, w.request.unique, 0, &out, sizeof(out), m.body + sizeof(ioctl_reply),
                       m.body_bytes - sizeof(ioctl_reply))


# ---- undoing what the kernel did not take ----------------------------------------------------------------------------

cdef bint _make_room_locked(mount_state *m) noexcept nogil:
    """Room for one more forget."""
    cdef size_t room = max(m.forget_room * 2, <size_t>256)
    cdef forget_item *larger
    if m.forget_count < m.forget_room:
        return True
    if room > MAX_FORGETS:
        return False
    larger = <forget_item *>realloc(m.forgets, room * sizeof(forget_item))
    if larger == NULL:
        return False
    m.forgets = larger
    m.forget_room = room
    return True


cdef void queue_forget(mount_state *m, uint64_t node, uint64_t lookups) noexcept nogil:
    """Give back lookups of a node, when a worker next finds the time."""
    pthread_mutex_lock(&m.guard)
    m.forgotten += lookups
    if _make_room_locked(m):
        m.forgets[m.forget_count].node = node
        m.forgets[m.forget_count].lookups = lookups
        m.forget_count += 1
    pthread_mutex_unlock(&m.guard)


cdef void _forget(mount_state *m, uint64_t node, uint64_t lookups) noexcept nogil:
    if m.rules != NULL:
        forget_known(<special_state *>m.rules, node, lookups)
    queue_forget(m, node, lookups)          # the server ignores what it does not know


cdef void take_forgets(mount_state *m, const fuse_in_header *request) noexcept nogil:
    """FORGET, BATCH_FORGET: the kernel gives lookups back."""
    cdef const uint8_t *argument = <const uint8_t *>(request + 1)
    cdef size_t have = request.len - sizeof(fuse_in_header)
    cdef const uint64_t *pairs = <const uint64_t *>(argument + sizeof(fuse_batch_forget_in))
    cdef size_t i, count
    if request.opcode == FUSE_FORGET:
        if have >= sizeof(fuse_forget_in):
            _forget(m, request.nodeid, (<const fuse_forget_in *>argument).nlookup)
    elif have >= sizeof(fuse_batch_forget_in):
        count = min(<size_t>(<const fuse_batch_forget_in *>argument).count, (have - sizeof(fuse_batch_forget_in)) // 16)
        for i in range(count):
            _forget(m, pairs[2 * i], pairs[2 * i + 1])


cdef void _undo_entries(worker *w, message *m) noexcept nogil:
    cdef size_t at = 0, end
    while at < m.body_bytes:
        end = _next_entry(m, at)
        if end == 0:
            return
        if (<entry *>(m.body + at)).node != 0:
            w.lookups += w.answered     # otherwise it was counted when it was to be handed on
            queue_forget(w.mount, (<entry *>(m.body + at)).node, 1)
        at = end


cdef void note_undo(worker *w, message *m) noexcept nogil:
    """Queue forgets for what a reply granted to nobody, and note its handle in undo_handle for build_undo_release."""
    cdef uint32_t flags = w.row.flags
    cdef size_t handle_at = 0
    w.undo_handle = 0
    if m.head.error != 0:
        return
    if flags & MAKES_ENTRIES:
        _undo_entries(w, m)
    if flags & MAKES_ENTRY and m.body_bytes >= sizeof(entry):
        w.lookups += w.answered
        queue_forget(w.mount, (<entry *>m.body).node, 1)
        handle_at = sizeof(entry)
    if flags & MAKES_HANDLE and m.body_bytes == handle_at + sizeof(open_reply):
        w.undo_handle = (<open_reply *>(m.body + handle_at)).handle
        w.undo_directory = w.request.opcode == FUSE_OPENDIR


# ---- table ---------------------------------------------------------------------------------------------------------

cdef replier _repliers[FUSE_OPCODES]
cdef uint32_t _opcode
for _opcode in range(<uint32_t>FUSE_OPCODES):
    _repliers[_opcode] = _answer_as_it_is


cdef replier reply_handler(uint32_t opcode) noexcept nogil:
    """The function that answers an opcode."""
    return _repliers[opcode] if opcode < FUSE_OPCODES else _answer_as_it_is


for _opcode in (FUSE_LOOKUP, FUSE_SYMLINK, FUSE_MKNOD, FUSE_MKDIR, FUSE_LINK):
    _repliers[_opcode] = _answer_entry
for _opcode in (FUSE_GETATTR, FUSE_SETATTR, FUSE_STATX):
    _repliers[_opcode] = _answer_attributes
for _opcode in (FUSE_CREATE, FUSE_TMPFILE):
    _repliers[_opcode] = _answer_create
for _opcode in (FUSE_GETXATTR, FUSE_LISTXATTR):
    _repliers[_opcode] = _answer_xattr
for _opcode in (FUSE_READ, FUSE_READDIR):
    _repliers[_opcode] = _answer_data
_repliers[FUSE_POLL] = _answer_poll
_repliers[FUSE_STATFS] = _answer_statfs
_repliers[FUSE_OPEN] = _answer_open
_repliers[FUSE_OPENDIR] = _answer_opendir
_repliers[FUSE_READDIRPLUS] = _answer_readdirplus
_repliers[FUSE_READLINK] = _answer_readlink
_repliers[FUSE_IOCTL] = _answer_ioctl
