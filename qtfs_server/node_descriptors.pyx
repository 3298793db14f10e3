"""Descriptors of nodes: who holds a node has it open, whatever became of its descriptor meanwhile.

They are a cache: when they run short the clock hand takes those not used lately and leaves a file handle
(name_to_handle_at(2)) or, where the file system has none, a path to open them by. With a file handle a node that nobody
uses is folded into its record (folding.pyx).
"""
from libc.errno cimport EMFILE, ENFILE, ENOMEM, ESTALE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcpy, strrchr

from qtfs_common.protocol cimport MAX_PATH, ROOT_NODE
from qtfs_server.attributes cimport device_index, find_device_locked, stat_fd, stat_known
from qtfs_server.chores cimport close_later
from qtfs_server.descriptors cimport close_node, descriptor_opened, descriptors_short, fd_path, node_opened, proc_path
from qtfs_server.folding cimport fold_locked, unfold_locked
from qtfs_server.includes.linux cimport AT_EMPTY_PATH, AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK, \
    O_PATH, O_RDONLY, RESOLVE_NO_SYMLINKS, S_IFDIR, S_IFMT, S_IFREG, SYS_openat2, close, file_handle, \
    name_to_handle_at, open_by_handle_at, open_how, openat, pthread_mutex_lock, pthread_mutex_unlock, statx_t, syscall
from qtfs_server.mounts cimport borrow_mount, is_gone, is_let_go, note_holder_locked, return_mount
from qtfs_server.node_table cimport record_free_locked, record_of_locked
from qtfs_server.session cimport NODE_PATHLESS, NODE_RECENT, NODE_REVIVE_BY_PATH, NODE_USED, NO_INDEX, node, \
    node_free_locked, session, session_fullest, session_unref
from qtfs_server.stuck cimport is_stuck

cdef enum:
    MAX_HANDLE_BYTES = 128          # MAX_HANDLE_SZ of <linux/exportfs.h>
    EVICTED_AT_ONCE = 64


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
    if stat_known(fd, &st) == 0:
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


cdef file_handle *file_handle_of(int fd) noexcept nogil:
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
    cdef file_handle *found = file_handle_of(n.fd) if mount_fd >= 0 else NULL
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


cdef bint _opened_meanwhile(session *s, const node *n) noexcept nogil:
    """Whether a node keeps its descriptor after all: its file is open, and its mount may be hidden by another later."""
    return n.handles > 0 and is_let_go(s, n.device) and not descriptors_short()


cdef bint node_put_aside(session *s, node *n) noexcept nogil:
    """Swap a node's descriptor for the means to open it again. The caller holds its only pin. False: it must stay."""
    cdef statx_t st
    cdef uint8_t *revive = NULL
    cdef uint16_t by_path = 0
    cdef int fd = -1
    if stat_known(n.fd, &st) == 0 and st.stx_nlink > 0 and not is_gone(s, n.device):
        revive = _means_to_revive(s, n, &by_path)
    if revive == NULL and (n.handles > 0 or not is_let_go(s, n.device)):
        return False                # unlinked: the descriptor is all that keeps it
    pthread_mutex_lock(&s.guard)
    if n.pins == 1 and n.fd >= 0 and not _opened_meanwhile(s, n):
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
        if n.index == ROOT_NODE or n.pins > 0 or is_stuck(s.devices[n.device].number):
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
        gone = node_put_aside(s, n) or (attempts == 0 and _give_up(s, n))
        node_unpin(s, n)
        if gone:
            return True
    return False


cdef bint _give_up(session *s, node *n) noexcept nogil:
    """Close the descriptor of an unlinked file that nobody has open: it is ESTALE from now on. The caller holds its pin.

    Who keeps so many of them that none of 64 nodes in a row can be put aside must not take all descriptors.
    """
    cdef int fd = -1
    pthread_mutex_lock(&s.guard)
    if n.pins == 1 and n.handles == 0:
        fd = _take_fd_locked(s, n)
    pthread_mutex_unlock(&s.guard)
    close_later(fd)
    return fd >= 0


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


cdef void give_fd_locked(session *s, node *n, int fd, uint16_t pathless) noexcept nogil:
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


cdef void node_adopt(session *s, node *n, int fd) noexcept nogil:
    """Give a node that has none the descriptor that it had in the engine before us."""
    pthread_mutex_lock(&s.guard)
    give_fd_locked(s, n, fd, n.flags & NODE_PATHLESS)
    pthread_mutex_unlock(&s.guard)


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
        give_fd_locked(s, n, fd, NODE_PATHLESS if by.by_handle != NULL else 0)
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
    close_later(_take_fd_locked(s, n))
    record_free_locked(s, n.index)
    node_free_locked(s, n)


cdef void settle_locked(session *s, node *n) noexcept nogil:
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
    settle_locked(s, n)
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
    settle_locked(s, n)
    pthread_mutex_unlock(&s.guard)


