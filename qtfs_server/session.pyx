"""Tables of one session: nodes by id and by (mount, inode), handles by id.

A node id is (generation << 32 | index), a handle id (generation << 33 | index << 1 | writable): stale and invented ids
are refused by their generation. Descriptors of nodes are a cache: when they run short the clock hand takes those not
used lately and leaves a file handle (name_to_handle_at(2)) or, where the file system has none, a path to open them by.
"""
from libc.errno cimport EACCES, EMFILE, ENFILE, ENOMEM, EROFS, ESTALE, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from qtfs_common.protocol cimport NODE_SUBMOUNT, NODE_UNCACHED, ROOT_NODE, attributes, attributes_reply, entry
from qtfs_server.includes.linux cimport AT_EMPTY_PATH, AT_FDCWD, AT_NO_AUTOMOUNT, AT_SYMLINK_NOFOLLOW, O_CLOEXEC, \
    O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDONLY, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, S_IFDIR, \
    S_IFMT, S_IFREG, STATX_BASIC_STATS, STATX_BTIME, STATX_MNT_ID, SYS_openat2, atomic_add_int, atomic_load_int, close, file_handle, \
    fstatfs, makedev, name_to_handle_at, open_by_handle_at, open_how, openat, pthread_mutex_destroy, \
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, readlinkat, snprintf, statfs_t, statx, statx_t, \
    syscall
from qtfs_server.policy cimport OFF_TRIE, child_place, count_denial, current_epoch, path_place, place

cdef enum:
    MAX_HANDLE_BYTES = 128          # MAX_HANDLE_SZ of <linux/exportfs.h>
    RESERVED_DESCRIPTORS = 64       # for the engine itself
    LEAST_BUCKETS = 64
    EVICTED_AT_ONCE = 64
    STATX_WANTED = STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID

cdef int32_t descriptors = 0
cdef int32_t descriptor_limit = 1024


# ---- life of a session -------------------------------------------------------------------------------------------

cdef session *session_new(uint64_t id, const uint8_t *secret, uint32_t salt, uint32_t slots) noexcept nogil:
    """An empty session with one reference, or NULL."""
    cdef session *s = <session *>calloc(1, sizeof(session))
    if s == NULL:
        return NULL
    s.slot_table = <slot *>calloc(slots, sizeof(slot))
    s.buckets = <uint32_t *>calloc(LEAST_BUCKETS, sizeof(uint32_t))
    if s.slot_table == NULL or s.buckets == NULL:
        free(s.slot_table)
        free(s.buckets)
        free(s)
        return NULL
    s.bucket_mask = LEAST_BUCKETS - 1
    s.id = id
    memcpy(s.secret, secret, sizeof(s.secret))
    s.salt = salt
    s.slots = slots
    s.node_count = s.handle_count = 1
    s.references = 1
    pthread_mutex_init(&s.guard, NULL)
    pthread_mutex_init(&s.lock_guard, NULL)
    return s


cdef void _close_counted(int fd) noexcept nogil:
    if fd >= 0:
        close(fd)
        atomic_add_int(&descriptors, -1)


cdef void _free_nodes(session *s) noexcept nogil:
    cdef uint32_t i
    cdef node *n
    for i in range(1, s.node_count):
        n = node_at(s, i)
        if n.flags & NODE_IN_USE:
            _close_counted(n.fd)
            free(n.revive)
    for i in range((s.node_count + CHUNK - 1) // CHUNK):
        if s.node_chunks != NULL:
            free(s.node_chunks[i])
    free(s.node_chunks)


cdef void _free_handles(session *s) noexcept nogil:
    cdef uint32_t i
    for i in range(1, s.handle_count):
        if _handle_at(s, i).flags & HANDLE_IN_USE:
            _close_counted(_handle_at(s, i).fd)
    for i in range((s.handle_count + CHUNK - 1) // CHUNK):
        if s.handle_chunks != NULL:
            free(s.handle_chunks[i])
    free(s.handle_chunks)


cdef void session_free(session *s) noexcept nogil:
    """Close and free everything; nobody may hold the session any more."""
    cdef lock_owner *owner = s.owners
    cdef lock_owner *following
    cdef uint32_t i
    while owner != NULL:
        following = owner.next
        _close_counted(owner.fd)
        free(owner)
        owner = following
    _free_handles(s)
    _free_nodes(s)
    for i in range(s.device_count):
        _close_counted(s.devices[i].mount_fd)
    for i in range(s.slots):
        free(s.slot_table[i].saved)
    free(s.devices)
    free(s.slot_table)
    free(s.buckets)
    pthread_mutex_destroy(&s.guard)
    pthread_mutex_destroy(&s.lock_guard)
    free(s)


# ---- tables ------------------------------------------------------------------------------------------------------

cdef node *node_at(session *s, uint32_t index) noexcept nogil:
    """The node of an index below node_count."""
    return &s.node_chunks[index // CHUNK][index % CHUNK]


cdef handle *_handle_at(session *s, uint32_t index) noexcept nogil:
    return &s.handle_chunks[index // CHUNK][index % CHUNK]


cdef void **_grown_chunks(void **chunks, uint32_t count, size_t item_bytes) noexcept nogil:
    """Make room for item `count` of a chunked table. The table, moved perhaps, or NULL: then the old one is good."""
    cdef uint32_t chunk = count // CHUNK
    cdef void **larger
    cdef void *fresh
    if chunks != NULL and count % CHUNK != 0:
        return chunks
    fresh = calloc(CHUNK, item_bytes)
    larger = <void **>realloc(chunks, (chunk + 1) * sizeof(void *)) if fresh != NULL else NULL
    if larger == NULL:
        free(fresh)
        return NULL
    larger[chunk] = fresh
    return larger


cdef uint32_t _new_node_locked(session *s) noexcept nogil:
    """An index for a new node, or NO_INDEX."""
    cdef uint32_t index = s.node_free
    cdef node **chunks
    if index != NO_INDEX:
        s.node_free = node_at(s, index).next
    else:
        if s.node_count >= MAX_NODES:
            return NO_INDEX
        chunks = <node **>_grown_chunks(<void **>s.node_chunks, s.node_count, sizeof(node))
        if chunks == NULL:
            return NO_INDEX
        s.node_chunks = chunks
        index = s.node_count
        s.node_count += 1
        node_at(s, index).generation = s.salt
    s.nodes_used += 1
    return index


cdef uint32_t _hash(uint32_t device_index, uint64_t ino) noexcept nogil:
    cdef uint64_t mixed = (ino ^ (<uint64_t>device_index << 40)) * <uint64_t>0x9E3779B97F4A7C15
    return <uint32_t>(mixed >> 32)


cdef uint32_t _find_locked(session *s, uint32_t device_index, uint64_t ino) noexcept nogil:
    cdef uint32_t index = s.buckets[_hash(device_index, ino) & s.bucket_mask]
    cdef node *n
    while index != NO_INDEX:
        n = node_at(s, index)
        if n.ino == ino and n.device == device_index:
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
    if not node_at(s, index).flags & NODE_IN_USE or _node_id(index, node_at(s, index)) != id:
        return NO_INDEX
    return index


# ---- devices -----------------------------------------------------------------------------------------------------

cdef int64_t[21] _pseudo_file_systems      # f_type, <linux/magic.h>
_pseudo_file_systems[:] = [
    0x9fa0,         # PROC_SUPER_MAGIC
    0x62656572,     # SYSFS_MAGIC
    0x27e0eb,       # CGROUP_SUPER_MAGIC
    0x63677270,     # CGROUP2_SUPER_MAGIC
    0x64626720,     # DEBUGFS_MAGIC
    0x74726163,     # TRACEFS_MAGIC
    0x73636673,     # SECURITYFS_MAGIC
    0x6165676c,     # PSTOREFS_MAGIC
    0x62656570,     # CONFIGFS_MAGIC
    0xde5e81e4,     # EFIVARFS_MAGIC
    0xcafe4a11,     # BPF_FS_MAGIC
    0xf97cff8c,     # SELINUX_MAGIC
    0x43415d53,     # SMACK_MAGIC
    0x1cd1,         # DEVPTS_SUPER_MAGIC
    0x19800202,     # MQUEUE_MAGIC
    0x6e736673,     # NSFS_MAGIC
    0x42494e4d,     # BINFMTFS_MAGIC
    0x65735543,     # FUSE_CTL_SUPER_MAGIC
    0x67596969,     # RPCAUTH_GSSMAGIC, rpc_pipefs
    0x7655821,      # RDTGROUP_SUPER_MAGIC
    0x6b414653,     # AFS_FS_MAGIC
]


cdef bint _is_pseudo(int64_t f_type) noexcept nogil:
    """Whether the kernel makes the content up as it is read."""
    cdef int i
    for i in range(21):
        if _pseudo_file_systems[i] == f_type:
            return True
    return False


cdef bint _find_device_locked(session *s, const statx_t *st, uint32_t *out) noexcept nogil:
    """Find the mount that `st` lies on among those met before."""
    cdef uint64_t number = makedev(st.stx_dev_major, st.stx_dev_minor)
    cdef uint64_t mount_id = st.stx_mnt_id if st.stx_mask & STATX_MNT_ID else 0
    cdef uint32_t i
    for i in range(s.device_count):
        if s.devices[i].mount_id == mount_id and s.devices[i].number == number:
            out[0] = i
            return True
    return False


cdef int _add_device_locked(session *s, const statx_t *st, bint uncached, uint32_t *out) noexcept nogil:
    cdef device *larger
    if _find_device_locked(s, st, out):
        return 0
    if s.device_count >= MAX_DEVICES:
        return -ENFILE
    larger = <device *>realloc(s.devices, (s.device_count + 1) * sizeof(device))
    if larger == NULL:
        return -ENOMEM
    s.devices = larger
    larger += s.device_count
    larger.mount_id = st.stx_mnt_id if st.stx_mask & STATX_MNT_ID else 0
    larger.number = makedev(st.stx_dev_major, st.stx_dev_minor)
    larger.mount_fd = -1
    larger.uncached = uncached
    out[0] = s.device_count
    s.device_count += 1
    return 0


cdef int _device_index(session *s, int fd, const statx_t *st, uint32_t *out) noexcept nogil:
    """Find or add the mount that `fd`, whose stat is `st`, lies on. 0 or -ENOMEM."""
    cdef statfs_t fs
    cdef bint known
    cdef int error
    pthread_mutex_lock(&s.guard)
    known = _find_device_locked(s, st, out)
    pthread_mutex_unlock(&s.guard)
    if known:
        return 0
    memset(&fs, 0, sizeof(fs))
    fstatfs(fd, &fs)
    pthread_mutex_lock(&s.guard)
    error = _add_device_locked(s, st, _is_pseudo(fs.f_type), out)
    pthread_mutex_unlock(&s.guard)
    return error


# ---- stat --------------------------------------------------------------------------------------------------------

cdef int stat_fd(int fd, statx_t *st) noexcept nogil:
    """statx(2) of a descriptor, O_PATH too. 0 or -errno."""
    return -errno if statx(fd, b"", AT_EMPTY_PATH | AT_NO_AUTOMOUNT, STATX_WANTED, st) < 0 else 0


cdef uint64_t signature(const statx_t *st) noexcept nogil:
    """Changes whenever the content may have: ctime and size."""
    cdef uint64_t time = <uint64_t>st.stx_ctime.tv_sec * 1000000000 + st.stx_ctime.tv_nsec
    return time ^ (st.stx_size * <uint64_t>0x9E3779B97F4A7C15)


cdef void _fill_attributes(uint32_t device_index, const statx_t *st, attributes *out) noexcept nogil:
    """struct fuse_attr of a statx. Inode numbers of mounts below the root get the mount's index in their top bits."""
    out.ino = st.stx_ino ^ (<uint64_t>device_index << 48)
    out.size = st.stx_size
    out.blocks = st.stx_blocks
    out.atime = st.stx_atime.tv_sec
    out.mtime = st.stx_mtime.tv_sec
    out.ctime = st.stx_ctime.tv_sec
    out.atime_ns = st.stx_atime.tv_nsec
    out.mtime_ns = st.stx_mtime.tv_nsec
    out.ctime_ns = st.stx_ctime.tv_nsec
    out.mode = st.stx_mode
    out.nlink = st.stx_nlink
    out.uid = st.stx_uid
    out.gid = st.stx_gid
    out.rdev = (st.stx_rdev_minor & 0xff) | st.stx_rdev_major << 8 | (st.stx_rdev_minor & ~<uint32_t>0xff) << 12
    out.blksize = st.stx_blksize
    out.flags = 0


cdef uint64_t _node_flags(session *s, uint32_t device_index) noexcept nogil:
    return (NODE_UNCACHED if s.devices[device_index].uncached else 0) | (NODE_SUBMOUNT if device_index != 0 else 0)


cdef int node_stat(session *s, node *n, int fd, attributes_reply *out) noexcept nogil:
    """Attributes of a pinned node, by its own descriptor or by one opened from it. 0 or -errno."""
    cdef statx_t st
    cdef int error = stat_fd(fd, &st)
    if error < 0:
        return error
    _fill_attributes(n.device, &st, &out.attr)
    n.seen = signature(&st)
    out.reserved = 0
    pthread_mutex_lock(&s.guard)
    out.node_flags = _node_flags(s, n.device)
    pthread_mutex_unlock(&s.guard)
    return 0


# ---- descriptors of nodes ------------------------------------------------------------------------------------------

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


cdef int _mount_fd(session *s, node *n) noexcept nogil:
    """A descriptor on the node's mount for open_by_handle_at(2), opened from a file or directory at hand; or -1."""
    cdef char link[32]
    cdef int fd, known
    pthread_mutex_lock(&s.guard)
    known = s.devices[n.device].mount_fd
    pthread_mutex_unlock(&s.guard)
    if known >= 0:
        return known
    if n.type != S_IFDIR and n.type != S_IFREG:
        return -1
    proc_path(link, n.fd)
    fd = openat(AT_FDCWD, link, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    if fd < 0:
        return -1
    pthread_mutex_lock(&s.guard)
    known = s.devices[n.device].mount_fd
    if known < 0:
        s.devices[n.device].mount_fd = fd
        atomic_add_int(&descriptors, 1)
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
    cdef int mount_id
    found.handle_bytes = MAX_HANDLE_BYTES
    if name_to_handle_at(fd, b"", found, &mount_id, AT_EMPTY_PATH) < 0:
        return NULL
    copy = <file_handle *>malloc(sizeof(file_handle) + found.handle_bytes)
    if copy != NULL:
        memcpy(copy, found, sizeof(file_handle) + found.handle_bytes)
    return copy


cdef uint8_t *_revive_by_path(node *n) noexcept nogil:
    cdef char path[4096]
    cdef uint8_t *copy
    cdef int length = fd_path(n.fd, path, sizeof(path))
    if length <= 0 or path[0] != b'/':
        return NULL
    copy = <uint8_t *>malloc(length + 1)
    if copy != NULL:
        memcpy(copy, path, length + 1)
    return copy


cdef bint _put_aside(session *s, node *n) noexcept nogil:
    """Swap a node's descriptor for the means to open it again. The caller holds its only pin. False: it must stay."""
    cdef statx_t st
    cdef uint8_t *revive = NULL
    cdef uint16_t by_path = 0
    cdef int fd = -1
    if stat_fd(n.fd, &st) < 0 or st.stx_nlink == 0:
        return False                # unlinked: the descriptor is all that keeps it
    if _mount_fd(s, n) >= 0:
        revive = <uint8_t *>_file_handle(n.fd)
    if revive == NULL:
        revive = _revive_by_path(n)
        by_path = NODE_REVIVE_BY_PATH
    if revive == NULL:
        return False
    pthread_mutex_lock(&s.guard)
    if n.pins == 1 and n.fd >= 0:
        fd = n.fd
        n.fd = -1
        n.revive = revive
        n.flags = (n.flags & ~NODE_REVIVE_BY_PATH) | by_path
        revive = NULL
    pthread_mutex_unlock(&s.guard)
    free(revive)
    _close_counted(fd)
    return fd >= 0


cdef node *_next_victim(session *s) noexcept nogil:
    """Advance the clock hand to a node whose descriptor can go, and pin it; NULL if a whole round finds none."""
    cdef uint32_t step
    cdef node *n
    cdef node *found = NULL
    pthread_mutex_lock(&s.guard)
    for step in range(2 * s.node_count):
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
    cdef node *n
    cdef int attempt
    cdef bint gone
    for attempt in range(64):
        n = _next_victim(s)
        if n == NULL:
            return False
        gone = _put_aside(s, n)
        node_unpin(s, n)
        if gone:
            return True
    return False


cdef bint descriptors_short() noexcept nogil:
    """Whether nodes have to give descriptors up before more are opened."""
    return atomic_load_int(&descriptors) > descriptor_limit - RESERVED_DESCRIPTORS


cdef void evict(session *s) noexcept nogil:
    """Close descriptors of nodes not used lately until there is room again. As root, between requests."""
    cdef int i
    for i in range(EVICTED_AT_ONCE):
        if not descriptors_short() or not _evict_one(s):
            return


cdef int _revived_fd(session *s, node *n) noexcept nogil:
    """Open a put-aside node again. A descriptor, or -ESTALE when it is not there any more."""
    cdef open_how how
    cdef statx_t st
    cdef int fd
    cdef uint32_t device_index
    if n.flags & NODE_REVIVE_BY_PATH:
        memset(&how, 0, sizeof(how))
        how.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC
        how.resolve = RESOLVE_NO_SYMLINKS if n.type == S_IFDIR else RESOLVE_NO_MAGICLINKS
        fd = <int>syscall(SYS_openat2, AT_FDCWD, n.revive, &how, sizeof(how))
    else:
        fd = open_by_handle_at(s.devices[n.device].mount_fd, <file_handle *>n.revive, O_PATH | O_NOFOLLOW | O_CLOEXEC)
    if fd < 0:
        return -errno if errno in (EMFILE, ENFILE, ENOMEM) else -ESTALE
    if stat_fd(fd, &st) < 0 or st.stx_ino != n.ino or (st.stx_mode & S_IFMT) != n.type:
        close(fd)
        return -ESTALE
    if n.flags & NODE_REVIVE_BY_PATH and (_device_index(s, fd, &st, &device_index) < 0 or device_index != n.device):
        close(fd)
        return -ESTALE
    return fd


cdef int _revive(session *s, node *n) noexcept nogil:
    """Give a pinned node a descriptor again. 0 or -errno."""
    cdef int fd
    evict(s)
    fd = _revived_fd(s, n)
    if fd < 0:
        return fd
    pthread_mutex_lock(&s.guard)
    if n.fd < 0:
        n.fd = fd
        if not n.flags & NODE_REVIVE_BY_PATH:
            n.flags |= NODE_PATHLESS
        free(n.revive)
        n.revive = NULL
        atomic_add_int(&descriptors, 1)
        fd = -1
    pthread_mutex_unlock(&s.guard)
    if fd >= 0:
        close(fd)
    return 0


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
        out[0].flags |= NODE_RECENT
    pthread_mutex_unlock(&s.guard)
    return _opened(s, out[0]) if index != NO_INDEX else -ESTALE


cdef int node_hold(session *s, node *n) noexcept nogil:
    """Pin a node that a handle keeps, with its descriptor open. 0 or -errno."""
    pthread_mutex_lock(&s.guard)
    n.pins += 1
    n.flags |= NODE_RECENT
    pthread_mutex_unlock(&s.guard)
    return _opened(s, n)


cdef void _drop_locked(session *s, node *n) noexcept nogil:
    """Free a node that nobody knows or holds; its next user gets another generation."""
    cdef uint32_t index
    index = _find_locked(s, n.device, n.ino)
    if index != NO_INDEX and node_at(s, index) == n:
        _unlink_locked(s, index)
    else:
        index = _index_of(s, n)
    _close_counted(n.fd)
    free(n.revive)
    n.revive = NULL
    n.fd = -1
    n.flags = 0
    n.generation += 1
    n.next = s.node_free
    s.node_free = index
    s.nodes_used -= 1


cdef uint32_t _index_of(session *s, node *n) noexcept nogil:
    """Index of a node that its hash chain no longer leads to (its inode number was used again)."""
    cdef uint32_t chunk
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
    cdef node *n
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
    out.node_flags = _node_flags(s, n.device)
    out.reserved = out.reserved2 = 0
    _fill_attributes(n.device, st, &out.attr)


cdef void _merge_place(node *n, place where) noexcept nogil:
    """A node with several paths is allowed what any of them is: who knows one can use it there."""
    if n.where.epoch == where.epoch and n.type != S_IFDIR:
        where.allowed |= n.where.allowed
    n.where = where


cdef void _count_locked(session *s, uint32_t index, const statx_t *st, place where, entry *out) noexcept nogil:
    """One more lookup of a node, and what the client is told of it."""
    cdef node *n = node_at(s, index)
    n.lookups += 1
    n.flags |= NODE_RECENT
    n.seen = signature(st)
    _merge_place(n, where)
    _fill_entry(s, index, st, out)


cdef bint _count_known(session *s, const statx_t *st, place where, entry *out) noexcept nogil:
    """The common case: the node is known and has its descriptor, so that its inode cannot have been used again."""
    cdef uint32_t device_index, index = NO_INDEX
    cdef bint hit = False
    pthread_mutex_lock(&s.guard)
    if _find_device_locked(s, st, &device_index):
        index = _find_locked(s, device_index, st.stx_ino)
    if index != NO_INDEX and node_at(s, index).fd >= 0 and node_at(s, index).type == (st.stx_mode & S_IFMT):
        _count_locked(s, index, st, where, out)
        hit = True
    pthread_mutex_unlock(&s.guard)
    return hit


cdef bint _is_node_locked(node *n, const statx_t *st, const file_handle *current) noexcept nogil:
    """Whether the file of that stat and file handle (NULL: unknown) is a known node's, and not its inode's next life."""
    cdef file_handle *kept = <file_handle *>n.revive
    if n.type != (st.stx_mode & S_IFMT):
        return False
    if n.fd >= 0 or n.flags & NODE_REVIVE_BY_PATH or current == NULL:
        return True
    return current.handle_bytes == kept.handle_bytes and memcmp(current, kept, sizeof(file_handle) +
                                                                 kept.handle_bytes) == 0


cdef uint32_t _make_locked(session *s, uint32_t device_index, const statx_t *st, place where) noexcept nogil:
    """A new node without descriptor, or NO_INDEX."""
    cdef uint32_t index = _new_node_locked(s)
    cdef node *n
    if index == NO_INDEX:
        return NO_INDEX
    n = node_at(s, index)
    n.ino = st.stx_ino
    n.device = device_index
    n.type = st.stx_mode & S_IFMT
    n.lookups = n.handles = n.pins = 0
    n.fd = -1
    n.revive = NULL
    n.flags = NODE_IN_USE
    n.where = where
    _link_locked(s, index)
    _rehash_locked(s)
    return index


cdef uint32_t _find_or_make_locked(session *s, uint32_t device_index, const statx_t *st, place where,
                                   const file_handle *current) noexcept nogil:
    """The node of an open file, or NO_INDEX."""
    cdef uint32_t index = _find_locked(s, device_index, st.stx_ino)
    if index != NO_INDEX and not _is_node_locked(node_at(s, index), st, current):
        _unlink_locked(s, index)    # the inode number lives again: the old node keeps its id and goes stale
        index = NO_INDEX
    return index if index != NO_INDEX else _make_locked(s, device_index, st, where)


cdef bint _is_put_aside(session *s, uint32_t device_index, uint64_t ino) noexcept nogil:
    cdef uint32_t index
    cdef bint result
    pthread_mutex_lock(&s.guard)
    index = _find_locked(s, device_index, ino)
    result = index != NO_INDEX and node_at(s, index).fd < 0
    pthread_mutex_unlock(&s.guard)
    return result


cdef int node_enter_fd(session *s, int fd, const statx_t *st, place where, entry *out) noexcept nogil:
    """Find or make the node of an O_PATH descriptor, which is taken over, and count a lookup. 0 or -errno."""
    cdef uint32_t device_index, index
    cdef node *n
    cdef file_handle *current = NULL
    cdef int error = _device_index(s, fd, st, &device_index)
    if error < 0:
        close(fd)
        return error
    if _is_put_aside(s, device_index, st.stx_ino):
        current = _file_handle(fd)
    pthread_mutex_lock(&s.guard)
    index = _find_or_make_locked(s, device_index, st, where, current)
    if index != NO_INDEX:
        n = node_at(s, index)
        if n.fd < 0:
            n.fd = fd
            n.flags &= ~NODE_PATHLESS
            free(n.revive)
            n.revive = NULL
            atomic_add_int(&descriptors, 1)
            fd = -1
        _count_locked(s, index, st, where, out)
    pthread_mutex_unlock(&s.guard)
    free(current)
    if fd >= 0:
        close(fd)
    return 0 if index != NO_INDEX else -ENFILE


cdef int node_enter(session *s, node *parent, const char *name, size_t name_bytes, entry *out) noexcept nogil:
    """Look a name up below a pinned directory and count it. 0 or -errno."""
    cdef statx_t st
    cdef int fd, error
    cdef place where = _current_place(parent, parent.fd)
    where = child_place(&where, <const uint8_t *>name, name_bytes)
    if statx(parent.fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_WANTED, &st) < 0:
        return -errno
    if _count_known(s, &st, where, out):
        return 0
    fd = openat(parent.fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC)
    if fd < 0:
        return -errno
    error = stat_fd(fd, &st)        # the name may mean another file by now
    if error < 0:
        close(fd)
        return error
    return node_enter_fd(s, fd, &st, where, out)


cdef int root_enter(session *s, int fd, place where) noexcept nogil:
    """Make the root node of a new session from an O_PATH descriptor, which is taken over. 0 or -errno."""
    cdef statx_t st
    cdef entry root
    cdef int error = stat_fd(fd, &st)
    if error < 0:
        close(fd)
        return error
    return node_enter_fd(s, fd, &st, where, &root)


# ---- what the whitelist says of a node -------------------------------------------------------------------------------

cdef place _current_place(node *n, int fd) noexcept nogil:
    """Where a node, of which `fd` is a descriptor, stands under the rules in force."""
    cdef char path[4096]
    cdef place where = n.where
    if where.epoch == current_epoch():
        return where
    if n.flags & NODE_PATHLESS and n.type != S_IFDIR:
        where.trie = OFF_TRIE       # what it was allowed holds until its name is looked up again
        where.epoch = current_epoch()
    elif fd_path(fd, path, sizeof(path)) > 0:
        where = path_place(path)
    n.where = where
    return where


cdef int node_allowed(node *n, int fd, uint16_t needed) noexcept nogil:
    """0, or -EACCES if the whitelist lacks one of the needed types for a node; `fd` is a descriptor of it."""
    cdef place where = _current_place(n, fd)
    cdef uint16_t missing = needed & ~where.allowed
    if missing:
        count_denial(missing)
        return -EACCES
    return 0


cdef int child_allowed(session *s, node *parent, const uint8_t *name, size_t length, uint16_t needed,
                       place *out) noexcept nogil:
    """The same for a name below a pinned directory; `out` gets its place. Always -EROFS on a read-only session."""
    cdef place where = _current_place(parent, parent.fd)
    cdef uint16_t missing
    where = child_place(&where, name, length)
    missing = needed & ~where.allowed
    if out != NULL:
        out[0] = where
    if s.read_only:
        return -EROFS
    if missing:
        count_denial(missing)
        return -EACCES
    return 0


# ---- handles -----------------------------------------------------------------------------------------------------

cdef uint32_t _new_handle_locked(session *s) noexcept nogil:
    cdef uint32_t index = s.handle_free
    cdef handle **chunks
    if index != NO_INDEX:
        s.handle_free = _handle_at(s, index).next_free
    else:
        if s.handle_count >= MAX_HANDLES:
            return NO_INDEX
        chunks = <handle **>_grown_chunks(<void **>s.handle_chunks, s.handle_count, sizeof(handle))
        if chunks == NULL:
            return NO_INDEX
        s.handle_chunks = chunks
        index = s.handle_count
        s.handle_count += 1
        _handle_at(s, index).generation = s.salt & 0x7fffffff
    s.handles_used += 1
    return index


cdef int handle_new(session *s, node *n, int fd, uint32_t flags, uint64_t *id) noexcept nogil:
    """A handle on a pinned node for an open descriptor, which is taken over. 0 or -ENFILE."""
    cdef uint32_t index
    cdef handle *h
    pthread_mutex_lock(&s.guard)
    index = _new_handle_locked(s)
    if index == NO_INDEX:
        pthread_mutex_unlock(&s.guard)
        close(fd)
        return -ENFILE
    h = _handle_at(s, index)
    h.fd = fd
    h.pins = 0
    h.flags = HANDLE_IN_USE | flags
    h.position = 0
    h.index = index
    h.node = n
    n.handles += 1
    atomic_add_int(&descriptors, 1)
    id[0] = <uint64_t>h.generation << 33 | <uint64_t>index << 1 | (1 if flags & HANDLE_WRITABLE else 0)
    pthread_mutex_unlock(&s.guard)
    return 0


cdef handle *_handle_locked(session *s, uint64_t id) noexcept nogil:
    """The live handle of an id, or NULL."""
    cdef uint32_t index = <uint32_t>(id >> 1)
    cdef handle *h
    if index == NO_INDEX or index >= s.handle_count:
        return NULL
    h = _handle_at(s, index)
    if not h.flags & HANDLE_IN_USE or h.flags & HANDLE_ENDED or h.generation != <uint32_t>(id >> 33):
        return NULL
    return h


cdef int handle_pin(session *s, uint64_t id, handle **out) noexcept nogil:
    """Hold the handle of an id. 0 or -ESTALE."""
    pthread_mutex_lock(&s.guard)
    out[0] = _handle_locked(s, id)
    if out[0] != NULL:
        out[0].pins += 1
    pthread_mutex_unlock(&s.guard)
    return 0 if out[0] != NULL else -ESTALE


cdef node *_free_handle_locked(session *s, handle *h) noexcept nogil:
    """Take an ended handle out of use; the caller closes its descriptor and lets the node go that is returned."""
    h.flags = 0
    h.generation = (h.generation + 1) & 0x7fffffff
    h.next_free = s.handle_free
    s.handle_free = h.index
    s.handles_used -= 1
    return h.node


cdef void _settle(session *s, handle *h) noexcept nogil:
    """Close an ended handle that nobody pins any more."""
    cdef node *n = NULL
    cdef int fd = -1
    pthread_mutex_lock(&s.guard)
    if h.pins == 0 and h.flags & HANDLE_ENDED:
        fd = h.fd
        n = _free_handle_locked(s, h)
    pthread_mutex_unlock(&s.guard)
    _close_counted(fd)
    if n != NULL:
        node_let_go(s, n)


cdef void handle_unpin(session *s, handle *h) noexcept nogil:
    """Let go of a pinned handle."""
    cdef bint ended
    pthread_mutex_lock(&s.guard)
    h.pins -= 1
    ended = h.flags & HANDLE_ENDED
    pthread_mutex_unlock(&s.guard)
    if ended:
        _settle(s, h)


cdef int handle_end(session *s, uint64_t id) noexcept nogil:
    """Release a handle: closed at once, or with its last pin. 0 or -ESTALE."""
    cdef handle *h
    pthread_mutex_lock(&s.guard)
    h = _handle_locked(s, id)
    if h != NULL:
        h.flags |= HANDLE_ENDED
    pthread_mutex_unlock(&s.guard)
    if h == NULL:
        return -ESTALE
    _settle(s, h)
    return 0
