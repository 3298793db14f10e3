"""Nodes of a session: by id and by (mount, inode), entered by name, with or without a descriptor.

A node id is (generation << 32 | index): stale and invented ones are refused by their generation. NODE_ALIAS bits in it
do not matter here. Descriptors of nodes are
a cache: when they run short the clock hand takes those not used lately and leaves a file handle (name_to_handle_at(2))
or, where the file system has none, a path to open them by.
"""
from libc.errno cimport EMFILE, ENFILE, ENOENT, ENOMEM, EROFS, ESTALE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strcpy, strrchr

from qtfs_common.protocol cimport MAX_PATH, NODE_ALIAS, ROOT_NODE, entry
from qtfs_server.attributes cimport device_index, fill_attributes, find_device_locked, node_flags_locked, signature, \
    stat_fd, stat_name
from qtfs_server.descriptors cimport close_counted, descriptor_opened, descriptors_short, fd_path, proc_path
from qtfs_server.includes.linux cimport AT_EMPTY_PATH, AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, \
    O_NONBLOCK, O_PATH, O_RDONLY, RESOLVE_NO_SYMLINKS, S_IFCHR, S_IFDIR, S_IFMT, S_IFREG, SYS_openat2, close, file_handle, \
    name_to_handle_at, open_by_handle_at, open_how, openat, pthread_mutex_lock, pthread_mutex_unlock, statx_t, syscall
from qtfs_server.mounts cimport borrow_mount, is_gone, is_let_go, note_holder_locked, return_mount
from qtfs_server.policy cimport ALLOW_LOOK, OFF_TRIE, child_place, current_epoch, enter_file_system, path_place, place, \
    refusal
from qtfs_server.session cimport CHUNK, MAX_NODES, NODE_IN_USE, NODE_LISTED, NODE_PATHLESS, NODE_RECENT, \
    NODE_REVIVE_BY_PATH, NODE_USED, NO_INDEX, grown_chunks, node, node_at, session, session_fullest, session_unref

cdef enum:
    GENERATIONS = 0x1fffffff        # the bits above are for aliases, and for clients to mark nodes of their own
    MAX_HANDLE_BYTES = 128          # MAX_HANDLE_SZ of <linux/exportfs.h>
    EVICTED_AT_ONCE = 64


# ---- table --------------------------------------------------------------------------------------------------------



cdef uint32_t _new_node_locked(session *s) noexcept nogil:
    """An index for a new node, or NO_INDEX."""
    cdef uint32_t index = s.node_free
    cdef node **chunks
    if index != NO_INDEX:
        s.node_free = node_at(s, index).next
    else:
        if s.node_count >= MAX_NODES:
            return NO_INDEX
        chunks = <node **>grown_chunks(<void **>s.node_chunks, s.node_count, sizeof(node))
        if chunks == NULL:
            return NO_INDEX
        s.node_chunks = chunks
        index = s.node_count
        s.node_count += 1
        node_at(s, index).generation = s.salt & GENERATIONS
    s.nodes_used += 1
    return index


cdef uint32_t _hash(uint32_t on_device, uint64_t ino) noexcept nogil:
    cdef uint64_t mixed = (ino ^ (<uint64_t>on_device << 40)) * <uint64_t>0x9E3779B97F4A7C15
    return <uint32_t>(mixed >> 32)


cdef uint32_t _find_locked(session *s, uint32_t on_device, uint64_t ino) noexcept nogil:
    cdef uint32_t index = s.buckets[_hash(on_device, ino) & s.bucket_mask]
    cdef node *n = NULL
    while index != NO_INDEX:
        n = node_at(s, index)
        if n.ino == ino and n.device == on_device:
            return index
        index = n.next
    return NO_INDEX


cdef void _link_locked(session *s, uint32_t index) noexcept nogil:
    cdef node *n = node_at(s, index)
    cdef uint32_t *bucket = &s.buckets[_hash(n.device, n.ino) & s.bucket_mask]
    n.next = bucket[0]
    bucket[0] = index


cdef void _unlink_locked(session *s, uint32_t index) noexcept nogil:
    cdef node *n = node_at(s, index)
    cdef uint32_t *at = &s.buckets[_hash(n.device, n.ino) & s.bucket_mask]
    while at[0] != NO_INDEX:
        if at[0] == index:
            at[0] = n.next
            return
        at = &node_at(s, at[0]).next


cdef void _rehash_locked(session *s) noexcept nogil:
    """Twice the buckets; without memory the chains just grow longer."""
    cdef uint32_t old = s.bucket_mask + 1, i, index, following
    cdef uint32_t *larger
    cdef uint32_t *smaller = s.buckets
    if s.nodes_used < old:
        return
    larger = <uint32_t *>calloc(old * 2, sizeof(uint32_t))
    if larger == NULL:
        return
    s.buckets = larger
    s.bucket_mask = old * 2 - 1
    for i in range(old):
        index = smaller[i]
        while index != NO_INDEX:
            following = node_at(s, index).next
            _link_locked(s, index)
            index = following
    free(smaller)


cdef inline uint64_t _node_id(uint32_t index, const node *n) noexcept nogil:
    return ROOT_NODE if index == ROOT_NODE else <uint64_t>n.generation << 32 | index


cdef uint32_t _index_locked(session *s, uint64_t id) noexcept nogil:
    """Index of a live node id, or NO_INDEX."""
    cdef uint32_t index = <uint32_t>id
    if index == NO_INDEX or index >= s.node_count:
        return NO_INDEX
    if not node_at(s, index).flags & NODE_IN_USE or _node_id(index, node_at(s, index)) != id & ~NODE_ALIAS:
        return NO_INDEX
    return index


cdef uint64_t known_node(session *s, const statx_t *st) noexcept nogil:
    """The id of the node that a stat is of, or 0: the session has not met it."""
    cdef uint32_t on_device = 0, index = NO_INDEX
    cdef uint64_t id = 0
    pthread_mutex_lock(&s.guard)
    if find_device_locked(s, st, &on_device):
        index = _find_locked(s, on_device, st.stx_ino)
    if index != NO_INDEX:
        id = _node_id(index, node_at(s, index))
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
        fd = n.fd
        n.fd = -1
        s.open_nodes -= 1
        n.revive = revive
        n.flags = (n.flags & ~NODE_REVIVE_BY_PATH) | by_path
        revive = NULL
    pthread_mutex_unlock(&s.guard)
    free(revive)
    close_counted(fd)
    return fd >= 0


cdef node *_next_victim(session *s) noexcept nogil:
    """Advance the clock hand to a node whose descriptor can go, and pin it; NULL if a whole round finds none."""
    cdef uint32_t steps = 2 * s.node_count
    cdef node *n = NULL
    cdef node *found = NULL
    pthread_mutex_lock(&s.guard)
    while steps > 0:
        steps -= 1
        s.hand = s.hand + 1 if s.hand + 1 < s.node_count else ROOT_NODE + 1
        if s.hand >= s.node_count:
            break
        n = node_at(s, s.hand)
        if not n.flags & NODE_IN_USE or n.fd < 0 or n.pins > 0:
            continue
        if n.flags & NODE_RECENT:
            n.flags &= ~NODE_RECENT
            continue
        n.pins += 1
        found = n
        break
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
        note_holder_locked(s, _own_index_locked(s, n))
    n.fd = fd
    s.open_nodes += 1
    n.flags = (n.flags & ~NODE_PATHLESS) | pathless
    free(n.revive)
    n.revive = NULL
    descriptor_opened()


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
    index = _index_locked(s, id)
    if index != NO_INDEX:
        out[0] = node_at(s, index)
        out[0].pins += 1
        out[0].flags |= NODE_USED
    pthread_mutex_unlock(&s.guard)
    return _opened(s, out[0]) if index != NO_INDEX else -ESTALE


cdef int node_hold(session *s, node *n) noexcept nogil:
    """Pin a node that a handle keeps, with its descriptor open. 0 or -errno."""
    pthread_mutex_lock(&s.guard)
    n.pins += 1
    n.flags |= NODE_USED
    pthread_mutex_unlock(&s.guard)
    return _opened(s, n)


cdef void _drop_locked(session *s, node *n) noexcept nogil:
    """Free a node that nobody knows or holds; its next user gets another generation."""
    cdef uint32_t index = _own_index_locked(s, n)
    if _find_locked(s, n.device, n.ino) == index:
        _unlink_locked(s, index)
    s.devices[n.device].nodes -= 1
    if n.fd >= 0:
        s.open_nodes -= 1
    close_counted(n.fd)
    free(n.revive)
    n.revive = NULL
    n.fd = -1
    n.flags &= NODE_LISTED
    n.generation = (n.generation + 1) & GENERATIONS
    n.next = s.node_free
    s.node_free = index
    s.nodes_used -= 1


cdef uint32_t _own_index_locked(session *s, node *n) noexcept nogil:
    """Index of a node, also if its hash chain no longer leads to it (its inode number was used again)."""
    cdef uint32_t chunk, index = _find_locked(s, n.device, n.ino)
    if index != NO_INDEX and node_at(s, index) == n:
        return index
    for chunk in range((s.node_count + CHUNK - 1) // CHUNK):
        if s.node_chunks[chunk] <= n < s.node_chunks[chunk] + CHUNK:
            return chunk * CHUNK + <uint32_t>(n - s.node_chunks[chunk])
    return NO_INDEX


cdef void _drop_unused_locked(session *s, node *n) noexcept nogil:
    if n.pins == 0 and n.lookups == 0 and n.handles == 0:
        _drop_locked(s, n)


cdef void node_unpin(session *s, node *n) noexcept nogil:
    """Let go of a pinned node."""
    pthread_mutex_lock(&s.guard)
    n.pins -= 1
    _drop_unused_locked(s, n)
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
    _drop_unused_locked(s, n)
    pthread_mutex_unlock(&s.guard)


cdef void node_forget(session *s, uint64_t id, uint64_t lookups) noexcept nogil:
    """The client's kernel returns lookup counts: FUSE_FORGET. More than were given out, or of unknown ids: ignored."""
    cdef uint32_t index
    cdef node *n = NULL
    pthread_mutex_lock(&s.guard)
    index = _index_locked(s, id)
    if index > ROOT_NODE:
        n = node_at(s, index)
        n.lookups -= min(lookups, n.lookups)
        _drop_unused_locked(s, n)
    pthread_mutex_unlock(&s.guard)


# ---- entering names ------------------------------------------------------------------------------------------------

cdef void _fill_entry(session *s, uint32_t index, const statx_t *st, entry *out) noexcept nogil:
    cdef node *n = node_at(s, index)
    out.node = _node_id(index, n)
    out.generation = 0
    out.node_flags = node_flags_locked(s, n.device)
    out.reserved = out.reserved2 = 0
    fill_attributes(n.device, st, &out.attr)


cdef void _merge_place(node *n, const statx_t *st, place where) noexcept nogil:
    """A node with several paths is allowed what any of them is: who knows one can use it there."""
    if n.where.epoch == where.epoch and n.type != S_IFDIR and st.stx_nlink > 1:
        where.allowed |= n.where.allowed
    n.where = where


cdef void _count_locked(session *s, uint32_t index, const statx_t *st, place where, entry *out) noexcept nogil:
    """One more lookup of a node, and what the client is told of it."""
    cdef node *n = node_at(s, index)
    n.lookups += 1
    n.flags |= NODE_USED
    n.seen = signature(st)
    _merge_place(n, st, where)
    _fill_entry(s, index, st, out)


cdef bint _has_ended(const node *n) noexcept nogil:
    """Whether a node that has its descriptor is a terminal of the past: devpts uses their inode numbers again at once."""
    cdef statx_t st
    return n.type == S_IFCHR and stat_fd(n.fd, &st) == 0 and st.stx_nlink == 0


cdef bint _count_known(session *s, const node *parent, const statx_t *st, place where, entry *out) noexcept nogil:
    """The common case: the node is known and has its descriptor, so that its inode cannot have been used again.

    Not where another file system begins: what protects that, `where` does not know yet.
    """
    cdef uint32_t on_device = 0, index = NO_INDEX
    cdef bint hit = False
    pthread_mutex_lock(&s.guard)
    if find_device_locked(s, st, &on_device):
        index = _find_locked(s, on_device, st.stx_ino)
    if index != NO_INDEX and on_device == parent.device and node_at(s, index).fd >= 0 and \
            node_at(s, index).type == (st.stx_mode & S_IFMT) and not _has_ended(node_at(s, index)):
        _count_locked(s, index, st, where, out)
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


cdef uint32_t _make_locked(session *s, uint32_t on_device, const statx_t *st, place where) noexcept nogil:
    """A new node without descriptor, or NO_INDEX."""
    cdef uint32_t index = _new_node_locked(s)
    cdef node *n = NULL
    if index == NO_INDEX:
        return NO_INDEX
    n = node_at(s, index)
    n.ino = st.stx_ino
    n.device = on_device
    n.type = st.stx_mode & S_IFMT
    n.lookups = n.handles = n.pins = 0
    n.fd = -1
    n.revive = NULL
    n.flags = NODE_IN_USE | (n.flags & NODE_LISTED)
    n.where = where
    s.devices[on_device].nodes += 1
    _link_locked(s, index)
    _rehash_locked(s)
    return index


cdef uint32_t _find_or_make_locked(session *s, uint32_t on_device, const statx_t *st, place where,
                                   const file_handle *current) noexcept nogil:
    """The node of an open file, or NO_INDEX."""
    cdef uint32_t index = _find_locked(s, on_device, st.stx_ino)
    if index != NO_INDEX and not _is_node_locked(node_at(s, index), st, current):
        _unlink_locked(s, index)    # the inode number lives again: the old node keeps its id and goes stale
        index = NO_INDEX
    return index if index != NO_INDEX else _make_locked(s, on_device, st, where)


cdef bint _is_put_aside(session *s, uint32_t on_device, uint64_t ino) noexcept nogil:
    cdef uint32_t index
    cdef bint result
    pthread_mutex_lock(&s.guard)
    index = _find_locked(s, on_device, ino)
    result = index != NO_INDEX and node_at(s, index).fd < 0
    pthread_mutex_unlock(&s.guard)
    return result


cdef int node_enter_fd(session *s, int fd, const statx_t *st, place where, entry *out) noexcept nogil:
    """Find or make the node of an O_PATH descriptor, which is taken over, and count a lookup. 0 or -errno."""
    cdef uint32_t on_device = 0, index
    cdef node *n = NULL
    cdef file_handle *current = NULL
    cdef int error = device_index(s, fd, st, &on_device)
    if error < 0:
        close(fd)
        return error
    if _is_put_aside(s, on_device, st.stx_ino):
        current = _file_handle(fd)
    pthread_mutex_lock(&s.guard)
    index = _find_or_make_locked(s, on_device, st, where, current)
    if index != NO_INDEX:
        n = node_at(s, index)
        if n.fd < 0:
            _give_fd_locked(s, n, fd, 0)
            fd = -1
        _count_locked(s, index, st, where, out)
    pthread_mutex_unlock(&s.guard)
    free(current)
    if fd >= 0:
        close(fd)
    return 0 if index != NO_INDEX else -ENFILE


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


cdef int node_enter(session *s, node *parent, const char *name, size_t name_bytes, entry *out) noexcept nogil:
    """Look a name up below a pinned directory and count it. 0 or -errno; -ENOENT for one that is hidden."""
    cdef statx_t st
    cdef int fd, error
    cdef place where = _current_place(parent, parent.fd)
    where = child_place(&where, <const uint8_t *>name, name_bytes)
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
    return node_enter_fd(s, fd, &st, where, out)


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
