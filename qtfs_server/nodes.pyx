"""Nodes of a session, entered by name, forgotten, and what the whitelist allows on them."""
from libc.errno cimport EMFILE, ENFILE, ENOENT, EROFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp

from qtfs_common.protocol cimport MAX_PATH, ROOT_NODE, entry
from qtfs_server.attributes cimport device_index, fill_attributes, find_device_locked, node_flags_locked, signature, \
    stat_fd, stat_known, stat_name
from qtfs_server.descriptors cimport descriptors_short, fd_path, is_at, path_above
from qtfs_server.folding cimport drop_folded_locked, keep_handle, unfold_locked
from qtfs_server.includes.linux cimport O_CLOEXEC, O_NOFOLLOW, O_PATH, S_IFCHR, S_IFDIR, S_IFMT, close, file_handle, \
    openat, pthread_mutex_lock, pthread_mutex_unlock, statx_t
from qtfs_server.node_descriptors cimport file_handle_of, give_fd_locked, settle_locked
from qtfs_server.node_table cimport awake_locked, find_record_locked, node_id, record_new_locked, record_of_locked, \
    record_unlink_locked
from qtfs_server.policy cimport ALLOW_LOOK, OFF_TRIE, child_place, current_epoch, enter_file_system, far_below_place, \
    path_place, place, refusal
from qtfs_server.session cimport NODE_PATHLESS, NODE_REVIVE_BY_PATH, NODE_USED, NO_INDEX, node, node_free_locked, \
    node_new_locked, record, record_at, session
from qtfs_server.texts cimport text_free_locked, text_new_locked

from pathlib import Path

cdef enum:
    DAC_READ_SEARCH = 2             # CAP_DAC_READ_SEARCH of <linux/capability.h>

cdef enum knowledge:                # of a file that was looked up
    UNKNOWN
    PUT_ASIDE
    OPEN


def _may_open_by_handle() -> bool:
    """Whether open_by_handle_at(2) is allowed to us."""
    status = Path("/proc/self/status").read_text()
    [effective] = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    return bool(int(effective, 16) >> DAC_READ_SEARCH & 1)


cdef bint _handles_open = _may_open_by_handle()


cdef uint64_t known_node(session *s, const statx_t *st) noexcept nogil:
    """The id of the node that a stat is of, or 0: the session has not met it."""
    cdef uint32_t on_device = 0, index = NO_INDEX
    cdef uint64_t id = 0
    pthread_mutex_lock(&s.guard)
    if find_device_locked(s, st, &on_device):
        index = find_record_locked(s, on_device, st.stx_ino)
    if index != NO_INDEX:
        id = node_id(index, record_at(s, index))
    pthread_mutex_unlock(&s.guard)
    return id


cdef void _forget_locked(session *s, uint32_t index, uint64_t lookups) noexcept nogil:
    cdef record *r = record_at(s, index)
    cdef node *n = awake_locked(s, index)
    if n != NULL:
        n.lookups -= min(lookups, n.lookups)
        settle_locked(s, n)
    elif lookups < r.lookups:
        r.lookups -= <uint16_t>lookups
    else:
        drop_folded_locked(s, index)


cdef void node_forget(session *s, uint64_t id, uint64_t lookups) noexcept nogil:
    """The client's kernel returns lookup counts: FUSE_FORGET. More than were given out, or of unknown ids: ignored."""
    cdef uint32_t index
    pthread_mutex_lock(&s.guard)
    index = record_of_locked(s, id)
    if index > ROOT_NODE:
        _forget_locked(s, index, lookups)
    pthread_mutex_unlock(&s.guard)


# ---- entering names ------------------------------------------------------------------------------------------------

cdef void _fill_entry(session *s, const node *n, const statx_t *st, entry *out) noexcept nogil:
    out.node = node_id(n.index, record_at(s, n.index))
    out.generation = 0
    out.node_flags = node_flags_locked(s, n.device)
    out.reserved = out.reserved2 = 0
    fill_attributes(n.device, st, &out.attr)


cdef void _merge_place(node *n, const statx_t *st, place where) noexcept nogil:
    """A node with several paths is allowed what any of them is: who knows one can use it there."""
    if n.where.epoch == where.epoch and n.type != S_IFDIR and st.stx_nlink > 1:
        where.allowed |= n.where.allowed
    n.where = where


cdef void _count_locked(session *s, node *n, const statx_t *st, place where, entry *out) noexcept nogil:
    """One more lookup of a node, and what the client is told of it."""
    n.lookups += 1
    n.flags |= NODE_USED
    n.seen = signature(st)
    _merge_place(n, st, where)
    _fill_entry(s, n, st, out)


cdef bint _has_ended(const node *n) noexcept nogil:
    """Whether a node that has its descriptor is a terminal of the past: devpts uses their inode numbers again at once."""
    cdef statx_t st
    return n.type == S_IFCHR and stat_known(n.fd, &st) == 0 and st.stx_nlink == 0


cdef bint _count_known(session *s, const node *parent, const statx_t *st, place where, entry *out) noexcept nogil:
    """The common case: the node is known and has its descriptor, so that its inode cannot have been used again.

    Not where another file system begins: what protects that, `where` does not know yet.
    """
    cdef uint32_t on_device = 0
    cdef node *n = NULL
    cdef bint hit = False
    pthread_mutex_lock(&s.guard)
    if find_device_locked(s, st, &on_device) and on_device == parent.device:
        n = awake_locked(s, find_record_locked(s, on_device, st.stx_ino))
    if n != NULL and n.fd >= 0 and n.type == (st.stx_mode & S_IFMT) and not _has_ended(n):
        _count_locked(s, n, st, where, out)
        hit = True
    pthread_mutex_unlock(&s.guard)
    return hit


cdef bint _is_node_locked(node *n, const statx_t *st, const file_handle *current) noexcept nogil:
    """Whether the file of that stat and file handle (NULL: unknown) is a known node's, and not its inode's next life."""
    cdef file_handle *kept = <file_handle *>n.revive
    if n.type != (st.stx_mode & S_IFMT):
        return False
    if n.fd >= 0:
        return not _has_ended(n)
    if kept == NULL:
        return False                # unlinked before its descriptor went
    if n.flags & NODE_REVIVE_BY_PATH or current == NULL:
        return True
    return current.handle_bytes == kept.handle_bytes and memcmp(current, kept, sizeof(file_handle) +
                                                                 kept.handle_bytes) == 0


cdef node *_make_locked(session *s, uint32_t on_device, const statx_t *st, place where) noexcept nogil:
    """A new node without descriptor, or NULL."""
    cdef node *n = node_new_locked(s)
    if n == NULL:
        return NULL
    n.ino = st.stx_ino
    n.device = on_device
    n.type = st.stx_mode & S_IFMT
    n.fd = -1
    n.where = where
    if record_new_locked(s, n) == NO_INDEX:
        node_free_locked(s, n)
        n = NULL
    return n


cdef node *_find_or_make_locked(session *s, uint32_t on_device, const statx_t *st, place where,
                                const file_handle *current) noexcept nogil:
    """The node of an open file, or NULL.

    An inode number that lives again leaves its old node, which keeps its id and is found no more. The next engine does find
    it until then, and it may stand before the node that the number has now.
    """
    cdef uint32_t index = find_record_locked(s, on_device, st.stx_ino)
    cdef node *n = NULL
    while index != NO_INDEX:
        n = unfold_locked(s, index)
        if n == NULL or _is_node_locked(n, st, current):
            return n
        record_unlink_locked(s, index)
        settle_locked(s, n)
        index = find_record_locked(s, on_device, st.stx_ino)
    return _make_locked(s, on_device, st, where)


cdef knowledge _known(session *s, uint32_t on_device, uint64_t ino) noexcept nogil:
    cdef uint32_t index
    cdef node *n = NULL
    pthread_mutex_lock(&s.guard)
    index = find_record_locked(s, on_device, ino)
    n = awake_locked(s, index)
    pthread_mutex_unlock(&s.guard)
    if index == NO_INDEX:
        return UNKNOWN
    return PUT_ASIDE if n == NULL or n.fd < 0 else OPEN


cdef void _note_means_locked(session *s, node *n, const file_handle *current, const char *path) noexcept nogil:
    """Note how the next engine finds a new node again."""
    if n.by_handle.words > 0 or n.path != NO_INDEX:
        return
    if current != NULL and _handles_open:
        keep_handle(n, current)
    if n.by_handle.words == 0 and path[0] == b'/':
        n.path = text_new_locked(s, path)


cdef int _enter(session *s, int fd, uint32_t on_device, const statx_t *st, place where, file_handle *current, bint keep,
                entry *out) noexcept nogil:
    """Find or make the node of an O_PATH descriptor, which it may `keep`, and count a lookup. 0 or -ENFILE.

    Takes over the file handle, and unless it fails the descriptor.
    """
    cdef char path[MAX_PATH]
    cdef node *n = NULL
    path[0] = 0
    if current == NULL or current.handle_bytes > sizeof(n.by_handle.data) or not _handles_open:
        if _known(s, on_device, st.stx_ino) == UNKNOWN and fd_path(fd, path, sizeof(path)) <= 0:
            path[0] = 0
    pthread_mutex_lock(&s.guard)
    n = _find_or_make_locked(s, on_device, st, where, current)
    if n != NULL:
        _note_means_locked(s, n, current, path)
        if n.fd < 0 and keep:
            give_fd_locked(s, n, fd, 0)
            fd = -1
        elif n.fd < 0 and n.revive == NULL:
            n.revive = <uint8_t *>current
            current = NULL
        _count_locked(s, n, st, where, out)
        settle_locked(s, n)
    pthread_mutex_unlock(&s.guard)
    free(current)
    if n != NULL and fd >= 0:
        close(fd)
    return 0 if n != NULL else -ENFILE


cdef int node_enter_fd(session *s, int fd, const statx_t *st, place where, entry *out) noexcept nogil:
    """Find or make the node of an O_PATH descriptor, which is taken over, and count a lookup. 0 or -errno."""
    cdef uint32_t on_device = 0
    cdef int error = device_index(s, fd, st, &on_device)
    cdef file_handle *current = NULL
    if error == 0:
        if _known(s, on_device, st.stx_ino) != OPEN:
            current = file_handle_of(fd)
        error = _enter(s, fd, on_device, st, where, current, True, out)
    if error < 0:
        close(fd)
    return error


cdef int _correct_place(session *s, const node *parent, int fd, const statx_t *st, place *where) noexcept nogil:
    """See to what protects the file system that a name turned out to lie on. 0 or -errno."""
    cdef uint32_t on_device = 0
    cdef uint16_t shield
    cdef int error = device_index(s, fd, st, &on_device)
    if error < 0 or on_device == parent.device:
        return error
    pthread_mutex_lock(&s.guard)
    shield = s.devices[on_device].shield
    pthread_mutex_unlock(&s.guard)
    enter_file_system(where, shield)
    return 0 if where.allowed & ALLOW_LOOK else -ENOENT


cdef bint _reopens(session *s, uint32_t on_device) noexcept nogil:
    """Whether files of a mount have been opened by their file handles before."""
    cdef bint does
    pthread_mutex_lock(&s.guard)
    does = s.devices[on_device].reopens
    pthread_mutex_unlock(&s.guard)
    return does


cdef int _enter_put_aside(session *s, int fd, const statx_t *st, place where, entry *out) noexcept nogil:
    """node_enter_fd of a node that gets no descriptor, but is opened by its file handle; -EMFILE: it cannot be."""
    cdef uint32_t on_device = 0
    cdef file_handle *current = NULL
    cdef int error = device_index(s, fd, st, &on_device)
    if error == 0 and st.stx_nlink > 0 and _reopens(s, on_device):
        current = file_handle_of(fd)
    if error == 0:
        error = _enter(s, fd, on_device, st, where, current, False, out) if current != NULL else -EMFILE
    if error < 0:
        close(fd)
    return error


cdef int node_enter(session *s, node *parent, const char *name, size_t name_bytes, bint sparing,
                    entry *out) noexcept nogil:
    """Look a name up below a pinned directory and count it. 0 or -errno; -ENOENT for one that is hidden.

    `sparing`: without keeping a descriptor if they are short, else -EMFILE.
    """
    cdef statx_t st
    cdef int fd, error
    cdef bint spare = sparing and descriptors_short()
    cdef place where = _current_place(parent, parent.fd)
    where = child_place(&where, <const uint8_t *>name, name_bytes)
    if spare and not _reopens(s, parent.device):
        return -EMFILE
    error = stat_name(parent.fd, name, &st) if where.allowed & ALLOW_LOOK else -ENOENT
    if error < 0:
        return error
    if _count_known(s, parent, &st, where, out):
        return 0
    fd = openat(parent.fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC)
    if fd < 0:
        return -errno
    error = stat_fd(fd, &st)        # the name may mean another file by now
    if error == 0:
        error = _correct_place(s, parent, fd, &st, &where)
    if error < 0:
        close(fd)
        return error
    return _enter_put_aside(s, fd, &st, where, out) if spare else node_enter_fd(s, fd, &st, where, out)


cdef int root_enter(session *s, int fd, place where) noexcept nogil:
    """Make the root node of a new session from an O_PATH descriptor, which is taken over. 0 or -errno."""
    cdef statx_t st
    cdef entry root
    cdef uint32_t on_device = 0
    cdef int error = stat_fd(fd, &st)
    if error == 0:
        error = device_index(s, fd, &st, &on_device)
    if error < 0:
        close(fd)
        return error
    enter_file_system(&where, s.devices[on_device].shield)
    return node_enter_fd(s, fd, &st, where, &root)


cdef void node_renamed(session *s, node *directory, const char *name) noexcept nogil:
    """A name was moved here: a node that is found again by its path is to be found there from now on."""
    cdef char path[MAX_PATH]
    cdef statx_t st
    cdef uint32_t on_device = 0
    cdef node *n = NULL
    if s.text_count <= 1 or stat_name(directory.fd, name, &st) < 0:
        return
    pthread_mutex_lock(&s.guard)
    if find_device_locked(s, &st, &on_device):
        n = awake_locked(s, find_record_locked(s, on_device, st.stx_ino))
    if n != NULL and n.path != NO_INDEX and n.fd >= 0 and fd_path(n.fd, path, sizeof(path)) > 0:
        text_free_locked(s, n.path)
        n.path = text_new_locked(s, path)
    pthread_mutex_unlock(&s.guard)


# ---- what the whitelist says of a node -----------------------------------------------------------------------------

cdef place _current_place(node *n, int fd) noexcept nogil:
    """Where a node, of which `fd` is a descriptor, stands under the rules in force."""
    cdef char path[MAX_PATH]
    cdef place where = n.where
    cdef uint32_t epoch = current_epoch()
    if where.epoch == epoch:
        return where
    if fd_path(fd, path, sizeof(path)) > 0 and (n.type == S_IFDIR or not n.flags & NODE_PATHLESS or is_at(fd, path)):
        where = path_place(path, &n.where)
    elif n.type != S_IFDIR:
        where.trie = OFF_TRIE       # what it was allowed holds until its name is looked up again
        where.epoch = epoch
    elif path_above(fd, path, sizeof(path)) > 0:
        where = far_below_place(path, &n.where)
    else:
        where.trie = OFF_TRIE       # out of descriptors: to be found the next time
        where.allowed = ALLOW_LOOK
        return where
    n.where = where
    return where


cdef uint16_t node_allows(node *n, int fd) noexcept nogil:
    """What a node, of which `fd` is a descriptor, is allowed: ALLOW_* bits."""
    return _current_place(n, fd).allowed


cdef int node_allowed(node *n, int fd, uint16_t needed) noexcept nogil:
    """0 if a node, of which `fd` is a descriptor, is allowed all the needed types; -EACCES, -EROFS or -ENOENT: `refusal`."""
    cdef place where = _current_place(n, fd)
    return refusal(where.allowed, needed)


cdef int child_allowed(session *s, node *parent, const uint8_t *name, size_t length, uint16_t needed,
                       place *out) noexcept nogil:
    """The same for a name below a pinned directory; `out` gets its place. Always -EROFS on a read-only session."""
    cdef place where = _current_place(parent, parent.fd)
    where = child_place(&where, name, length)
    if out != NULL:
        out[0] = where
    return -EROFS if s.read_only else refusal(where.allowed, needed)
