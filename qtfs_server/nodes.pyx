"""Nodes of a session, entered by name, with or without a descriptor.

Descriptors of nodes are a cache: when they run short the clock hand takes those not used lately and leaves a file handle
(name_to_handle_at(2)) or, where the file system has none, a path to open them by. With a file handle a node that nobody
uses is folded into its record (folding.pyx).
"""
from libc.errno cimport EMFILE, ENFILE, ENOENT, ENOMEM, EROFS, ESTALE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strcpy, strrchr

from qtfs_common.protocol cimport MAX_PATH, NODE_ALIAS, ROOT_NODE, entry
from qtfs_server.attributes cimport device_index, fill_attributes, find_device_locked, node_flags_locked, signature, \
    stat_fd, stat_name
from qtfs_server.descriptors cimport close_node, descriptor_opened, descriptors_short, fd_path, node_opened, proc_path
from qtfs_server.folding cimport drop_folded_locked, fold_locked, unfold_locked
from qtfs_server.includes.linux cimport AT_EMPTY_PATH, AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, \
    O_NONBLOCK, O_PATH, O_RDONLY, RESOLVE_NO_SYMLINKS, S_IFCHR, S_IFDIR, S_IFMT, S_IFREG, SYS_openat2, close, file_handle, \
    name_to_handle_at, open_by_handle_at, open_how, openat, pthread_mutex_lock, pthread_mutex_unlock, statx_t, syscall
from qtfs_server.mounts cimport borrow_mount, is_gone, is_let_go, note_holder_locked, return_mount
from qtfs_server.policy cimport ALLOW_LOOK, OFF_TRIE, child_place, current_epoch, enter_file_system, path_place, place, \
    refusal
from qtfs_server.node_table cimport awake_locked, find_record_locked, node_id, record_free_locked, record_new_locked, \
    record_of_locked, record_unlink_locked
from qtfs_server.session cimport NODE_PATHLESS, NODE_RECENT, NODE_REVIVE_BY_PATH, NODE_USED, NO_INDEX, node, \
    node_free_locked, node_new_locked, record, record_at, session, session_fullest, session_unref

cdef enum:
    MAX_HANDLE_BYTES = 128          # MAX_HANDLE_SZ of <linux/exportfs.h>
    EVICTED_AT_ONCE = 64


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


# ---- descriptors -------------------------------------------------------------------------------------------------

cdef int _open_directory_of(session *s, node *n) noexcept nogil:
    """The directory that a node lies in, if it is on the same mount: a descriptor or -1."""
    cdef char path[MAX_PATH]
    cdef char *slash
    cdef statx_t st
    cdef uint32_t on_device = 0
    cdef bint same = False
    cdef int fd
    if fd_path(n.fd, path, sizeof(path)) <= 0 or path[0] != b'/':
        return -1
    slash = strrchr(path, b'/')
    slash[1 if slash == path else 0] = 0
    fd = openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if fd < 0:
        return -1
    if stat_fd(fd, &st) == 0:
        pthread_mutex_lock(&s.guard)
        same = find_device_locked(s, &st, &on_device) and on_device == n.device
        pthread_mutex_unlock(&s.guard)
    if same:
        return fd
    close(fd)
    return -1


cdef int _open_on_mount(session *s, node *n) noexcept nogil:
    """Open something on a node's mount, rather a directory: an open file would keep its blocks once it is unlinked."""
    cdef char link[32]
    cdef int fd = -1
    proc_path(link, n.fd)
    if n.type == S_IFDIR:
        return openat(AT_FDCWD, link, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    fd = _open_directory_of(s, n)
    if fd < 0 and n.type == S_IFREG:
        fd = openat(AT_FDCWD, link, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    return fd


cdef int _mount_fd(session *s, node *n) noexcept nogil:
    """A descriptor on the node's mount for open_by_handle_at(2), opened when first needed; or -1."""
    cdef int fd, known
    pthread_mutex_lock(&s.guard)
    known = s.devices[n.device].mount_fd
    pthread_mutex_unlock(&s.guard)
    if known >= 0:
        return known
    fd = _open_on_mount(s, n)
    if fd < 0:
        return -1
    pthread_mutex_lock(&s.guard)
    known = s.devices[n.device].mount_fd
    if known < 0:
        s.devices[n.device].mount_fd = fd
        descriptor_opened()
        known = fd
        fd = -1
    pthread_mutex_unlock(&s.guard)
    if fd >= 0:
        close(fd)
    return known


cdef file_handle *_file_handle(int fd) noexcept nogil:
    """The file handle of a descriptor, to be freed by the caller; NULL where the file system has none."""
    cdef uint64_t room[17]          # header and MAX_HANDLE_BYTES, aligned
    cdef file_handle *found = <file_handle *>room
    cdef file_handle *copy
    cdef int mount_id = 0
    found.handle_bytes = MAX_HANDLE_BYTES
    if name_to_handle_at(fd, b"", found, &mount_id, AT_EMPTY_PATH) < 0:
        return NULL
    copy = <file_handle *>malloc(sizeof(file_handle) + found.handle_bytes)
    if copy != NULL:
        memcpy(copy, found, sizeof(file_handle) + found.handle_bytes)
    return copy


cdef uint8_t *_revive_by_path(node *n) noexcept nogil:
    cdef char path[MAX_PATH]
    cdef uint8_t *copy
    cdef int length = fd_path(n.fd, path, sizeof(path))
    if length <= 0 or path[0] != b'/':
        return NULL
    copy = <uint8_t *>malloc(length + 1)
    if copy != NULL:
        memcpy(copy, path, length + 1)
    return copy


cdef bint _opens_by_handle(int mount_fd, file_handle *found) noexcept nogil:
    """Whether we may: that takes CAP_DAC_READ_SEARCH."""
    cdef int fd = open_by_handle_at(mount_fd, found, O_PATH | O_CLOEXEC)
    if fd >= 0:
        close(fd)
    return fd >= 0


cdef uint8_t *_usable_handle(node *n, int mount_fd) noexcept nogil:
    """The file handle of a node, if there is a descriptor of its mount and it can be opened again; or NULL."""
    cdef file_handle *found = _file_handle(n.fd) if mount_fd >= 0 else NULL
    if found != NULL and not _opens_by_handle(mount_fd, found):
        free(found)
        found = NULL
    return <uint8_t *>found


cdef uint8_t *_means_to_revive(session *s, node *n, uint16_t *by_path) noexcept nogil:
    """What opens a node again: a file handle, or with NODE_REVIVE_BY_PATH a path; NULL: nothing does."""
    cdef uint8_t *revive = NULL
    cdef int mount_fd
    by_path[0] = 0
    if is_let_go(s, n.device):
        mount_fd = borrow_mount(s, n.device)
        revive = _usable_handle(n, mount_fd)
        if mount_fd >= 0:
            return_mount(s, n.device, False)
    else:
        revive = _usable_handle(n, _mount_fd(s, n))
    if revive == NULL:
        revive = _revive_by_path(n)
        by_path[0] = NODE_REVIVE_BY_PATH
    return revive


cdef bint node_put_aside(session *s, node *n) noexcept nogil:
    """Swap a node's descriptor for the means to open it again. The caller holds its only pin. False: it must stay."""
    cdef statx_t st
    cdef uint8_t *revive = NULL
    cdef uint16_t by_path = 0
    cdef int fd = -1
    if stat_fd(n.fd, &st) == 0 and st.stx_nlink > 0 and not is_gone(s, n.device):
        revive = _means_to_revive(s, n, &by_path)
    if revive == NULL and (n.handles > 0 or not is_let_go(s, n.device)):
        return False                # unlinked: the descriptor is all that keeps it
    pthread_mutex_lock(&s.guard)
    if n.pins == 1 and n.fd >= 0:
        fd = _take_fd_locked(s, n)
        n.revive = revive
        n.flags = (n.flags & ~NODE_REVIVE_BY_PATH) | by_path
        if revive != NULL and not by_path:
            s.devices[n.device].reopens = True
        revive = NULL
    pthread_mutex_unlock(&s.guard)
    free(revive)
    close_node(fd)
    return fd >= 0


cdef node *_next_victim(session *s) noexcept nogil:
    """Advance the clock hand to a node whose descriptor can go, and pin it; NULL if a whole round finds none."""
    cdef uint32_t steps
    cdef node *n = NULL
    cdef node *found = NULL
    pthread_mutex_lock(&s.guard)
    steps = 2 * s.open_nodes
    while steps > 0 and found == NULL:
        steps -= 1
        n = s.hand
        s.hand = n.next_open
        if n.index == ROOT_NODE or n.pins > 0:
            continue
        if n.flags & NODE_RECENT:
            n.flags &= ~NODE_RECENT
            continue
        n.pins += 1
        found = n
    pthread_mutex_unlock(&s.guard)
    return found


cdef bint _evict_one(session *s) noexcept nogil:
    cdef node *n = NULL
    cdef int attempts = 64
    cdef bint gone
    while attempts > 0:
        attempts -= 1
        n = _next_victim(s)
        if n == NULL:
            return False
        gone = node_put_aside(s, n)
        node_unpin(s, n)
        if gone:
            return True
    return False


cdef bint _evict_fullest() noexcept nogil:
    """Take from the session whose nodes hold most: one that is idle must not starve one that works."""
    cdef session *fullest = session_fullest()
    cdef bint gone
    if fullest == NULL:
        return False
    gone = _evict_one(fullest)
    session_unref(fullest)
    return gone


cdef void evict(session *s) noexcept nogil:
    """Close descriptors of nodes not used lately until there is room again. As root, between requests."""
    cdef int left = EVICTED_AT_ONCE
    while left > 0 and descriptors_short() and (_evict_fullest() or _evict_one(s)):
        left -= 1


cdef struct revival:                # a copy of what opens a put-aside node again: others may revive it meanwhile
    int mount_fd                    # -1: by path, or borrowed
    bint borrowed
    char path[MAX_PATH]
    file_handle *by_handle


cdef int _revival_locked(session *s, node *n, revival *out) noexcept nogil:
    cdef size_t size
    out.by_handle = NULL
    out.mount_fd = -1
    out.borrowed = False
    if n.revive == NULL:
        return -ESTALE              # unlinked, or its mount is gone
    if n.flags & NODE_REVIVE_BY_PATH:
        strcpy(out.path, <char *>n.revive)
        return 0
    size = sizeof(file_handle) + (<file_handle *>n.revive).handle_bytes
    out.borrowed = is_let_go(s, n.device)
    if not out.borrowed:
        out.mount_fd = s.devices[n.device].mount_fd
    out.by_handle = <file_handle *>malloc(size)
    if out.by_handle == NULL:
        return -ENOMEM
    memcpy(out.by_handle, n.revive, size)
    return 0


cdef int _revived_fd(session *s, node *n, const revival *by) noexcept nogil:
    """Open a put-aside node again. A descriptor, or -ESTALE when it is not there any more."""
    cdef open_how how
    cdef statx_t st
    cdef int fd
    cdef uint32_t on_device = 0
    if by.by_handle == NULL:
        memset(&how, 0, sizeof(how))
        how.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC
        how.resolve = RESOLVE_NO_SYMLINKS
        fd = <int>syscall(SYS_openat2, AT_FDCWD, by.path, &how, sizeof(how))
    else:
        fd = open_by_handle_at(by.mount_fd, by.by_handle, O_PATH | O_NOFOLLOW | O_CLOEXEC)
    if fd < 0:
        # ENOMEM too: so iget_locked() says that the inode number is just being used again.
        return -errno if errno in (EMFILE, ENFILE) else -ESTALE
    if stat_fd(fd, &st) < 0 or st.stx_ino != n.ino or (st.stx_mode & S_IFMT) != n.type:
        close(fd)
        return -ESTALE
    if by.by_handle == NULL and (device_index(s, fd, &st, &on_device) < 0 or on_device != n.device):
        close(fd)
        return -ESTALE
    return fd


cdef int _revived(session *s, node *n, revival *by) noexcept nogil:
    """_revived_fd, once there is a descriptor on the mount."""
    cdef int fd
    if not by.borrowed:
        return _revived_fd(s, n, by)
    by.mount_fd = borrow_mount(s, n.device)
    if by.mount_fd < 0:
        return -ESTALE
    fd = _revived_fd(s, n, by)
    return_mount(s, n.device, True)
    return fd


cdef void _give_fd_locked(session *s, node *n, int fd, uint16_t pathless) noexcept nogil:
    if is_let_go(s, n.device):
        note_holder_locked(s, n.index)
    n.fd = fd
    n.flags = (n.flags & ~NODE_PATHLESS) | pathless
    free(n.revive)
    n.revive = NULL
    if s.hand == NULL:
        s.hand = n.next_open = n.previous_open = n
    n.next_open = s.hand            # the hand comes by last
    n.previous_open = s.hand.previous_open
    n.previous_open.next_open = n
    s.hand.previous_open = n
    s.open_nodes += 1
    node_opened()


cdef int _take_fd_locked(session *s, node *n) noexcept nogil:
    """The descriptor of a node, which has it no longer, to be closed with close_node; -1: it had none."""
    cdef int fd = n.fd
    if fd < 0:
        return -1
    if s.hand == n:
        s.hand = n.next_open if n.next_open != n else NULL
    n.next_open.previous_open = n.previous_open
    n.previous_open.next_open = n.next_open
    s.open_nodes -= 1
    n.fd = -1
    return fd


cdef int _revive(session *s, node *n) noexcept nogil:
    """Give a pinned node a descriptor again. 0 or -errno."""
    cdef revival by
    cdef int fd, error
    evict(s)
    pthread_mutex_lock(&s.guard)
    error = _revival_locked(s, n, &by) if n.fd < 0 else 1
    pthread_mutex_unlock(&s.guard)
    if error != 0:
        return min(error, 0)
    fd = _revived(s, n, &by)
    pthread_mutex_lock(&s.guard)
    if fd >= 0 and n.fd < 0:
        _give_fd_locked(s, n, fd, NODE_PATHLESS if by.by_handle != NULL else 0)
        fd = 0
    elif fd >= 0:
        close(fd)
        fd = 0
    pthread_mutex_unlock(&s.guard)
    free(by.by_handle)
    return fd


cdef int _opened(session *s, node *n) noexcept nogil:
    """Make sure that a node just pinned has its descriptor. 0, or -errno and it is unpinned."""
    cdef int error = 0
    if n.fd < 0:
        error = _revive(s, n)
    if error < 0:
        node_unpin(s, n)
    return error


cdef int node_pin(session *s, uint64_t id, node **out) noexcept nogil:
    """Hold the node of an id, with its descriptor open. 0 or -errno; -ESTALE: no such node."""
    cdef uint32_t index
    pthread_mutex_lock(&s.guard)
    index = record_of_locked(s, id)
    out[0] = unfold_locked(s, index) if index != NO_INDEX else NULL
    if out[0] != NULL:
        out[0].pins += 1
        out[0].flags |= NODE_USED
    pthread_mutex_unlock(&s.guard)
    if out[0] == NULL:
        return -ESTALE if index == NO_INDEX else -ENOMEM
    return _opened(s, out[0])


cdef int node_hold(session *s, node *n) noexcept nogil:
    """Pin a node that a handle keeps, with its descriptor open. 0 or -errno."""
    pthread_mutex_lock(&s.guard)
    n.pins += 1
    n.flags |= NODE_USED
    pthread_mutex_unlock(&s.guard)
    return _opened(s, n)


cdef void _drop_locked(session *s, node *n) noexcept nogil:
    """Free a node that nobody knows or holds."""
    close_node(_take_fd_locked(s, n))
    record_free_locked(s, n.index)
    node_free_locked(s, n)


cdef void _settle_locked(session *s, node *n) noexcept nogil:
    """See to a node that may have lost its last user: it is freed, or folded if it has no descriptor."""
    if n.pins > 0 or n.handles > 0:
        return
    if n.lookups == 0:
        _drop_locked(s, n)
    elif n.fd < 0:
        fold_locked(s, n)


cdef void node_unpin(session *s, node *n) noexcept nogil:
    """Let go of a pinned node."""
    pthread_mutex_lock(&s.guard)
    n.pins -= 1
    _settle_locked(s, n)
    pthread_mutex_unlock(&s.guard)


cdef void node_keep(session *s, node *n) noexcept nogil:
    """Keep a pinned node alive, though not its descriptor."""
    pthread_mutex_lock(&s.guard)
    n.handles += 1
    pthread_mutex_unlock(&s.guard)


cdef void node_let_go(session *s, node *n) noexcept nogil:
    """Undo node_keep."""
    pthread_mutex_lock(&s.guard)
    n.handles -= 1
    _settle_locked(s, n)
    pthread_mutex_unlock(&s.guard)


cdef void _forget_locked(session *s, uint32_t index, uint64_t lookups) noexcept nogil:
    cdef record *r = record_at(s, index)
    cdef node *n = awake_locked(s, index)
    if n != NULL:
        n.lookups -= min(lookups, n.lookups)
        _settle_locked(s, n)
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
    return n.type == S_IFCHR and stat_fd(n.fd, &st) == 0 and st.stx_nlink == 0


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
    """The node of an open file, or NULL."""
    cdef uint32_t index = find_record_locked(s, on_device, st.stx_ino)
    cdef node *n = NULL
    if index == NO_INDEX:
        return _make_locked(s, on_device, st, where)
    n = unfold_locked(s, index)
    if n == NULL or _is_node_locked(n, st, current):
        return n
    record_unlink_locked(s, index)  # the inode number lives again: the old node keeps its id and goes stale
    _settle_locked(s, n)
    return _make_locked(s, on_device, st, where)


cdef bint _is_put_aside(session *s, uint32_t on_device, uint64_t ino) noexcept nogil:
    cdef uint32_t index
    cdef node *n = NULL
    pthread_mutex_lock(&s.guard)
    index = find_record_locked(s, on_device, ino)
    n = awake_locked(s, index)
    pthread_mutex_unlock(&s.guard)
    return index != NO_INDEX and (n == NULL or n.fd < 0)


cdef int _enter(session *s, int fd, uint32_t on_device, const statx_t *st, place where, file_handle *current, bint keep,
                entry *out) noexcept nogil:
    """Find or make the node of an O_PATH descriptor, which it may `keep`, and count a lookup. 0 or -ENFILE.

    Takes over the file handle, and unless it fails the descriptor.
    """
    cdef node *n = NULL
    pthread_mutex_lock(&s.guard)
    n = _find_or_make_locked(s, on_device, st, where, current)
    if n != NULL:
        if n.fd < 0 and keep:
            _give_fd_locked(s, n, fd, 0)
            fd = -1
        elif n.fd < 0 and n.revive == NULL:
            n.revive = <uint8_t *>current
            current = NULL
        _count_locked(s, n, st, where, out)
        _settle_locked(s, n)
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
        if _is_put_aside(s, on_device, st.stx_ino):
            current = _file_handle(fd)
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
        current = _file_handle(fd)
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


# ---- what the whitelist says of a node -----------------------------------------------------------------------------

cdef place _current_place(node *n, int fd) noexcept nogil:
    """Where a node, of which `fd` is a descriptor, stands under the rules in force."""
    cdef char path[MAX_PATH]
    cdef place where = n.where
    if where.epoch == current_epoch():
        return where
    if n.flags & NODE_PATHLESS and n.type != S_IFDIR:
        where.trie = OFF_TRIE       # what it was allowed holds until its name is looked up again
        where.epoch = current_epoch()
    elif fd_path(fd, path, sizeof(path)) > 0:
        where = path_place(path, &n.where)
    n.where = where
    return where


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
