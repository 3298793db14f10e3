"""Handles of a session: open files and directories.

A handle that an engine before us had open is opened again when it is first used: by its node, with the flags it had. A
FIFO is not, as what was in it is gone, nor is a file that nobody can find again: such a handle is lost, and EIO.

A released file whose close(2) would hang, as others do in its file system, stays open until they do not any more. Its
handle is in use as long, and counts for the session.

A handle id is (generation << 34 | index << 2 | pollable << 1 | writable): stale and invented ones are refused by their
generation.
"""
from libc.errno cimport EEXIST, EINTR, EIO, EMFILE, ENFILE, ENOMEM, ESTALE, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from qtfs_common.protocol cimport OPENED_STREAM, OPENED_UNCACHED, open_reply
from qtfs_server.attributes cimport stat_name
from qtfs_server.chores cimport chore_add
from qtfs_server.descriptors cimport close_counted, descriptor_opened, proc_path, within_share
from qtfs_server.fd_store cimport unstore_later
from qtfs_server.includes.linux cimport AT_FDCWD, F_SETFL, O_ACCMODE, O_APPEND, O_CLOEXEC, O_NOCTTY, O_NONBLOCK, O_RDONLY, \
    close, fcntl, openat, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, statx_t, written
from qtfs_server.node_descriptors cimport node_hold, node_let_go, node_unpin
from qtfs_server.session cimport HANDLE_ENDED, HANDLE_IN_USE, HANDLE_LOST, HANDLE_POLLABLE, HANDLE_STORED, \
    HANDLE_STREAM, HANDLE_WRITABLE, NO_INDEX, handle, handle_at, node, session, session_hold, session_unref
from qtfs_server.shares cimport max_handles, max_nodes
from qtfs_server.state_file cimport HANDLES, grow
from qtfs_server.stuck cimport close_hangs

cdef enum:
    GENERATIONS = 0x3fffffff

cdef struct hung_close:
    hung_close *next
    session *s                      # a reference
    handle *h                       # a pin
    uint64_t number                 # st_dev

cdef pthread_mutex_t _hung_guard
cdef hung_close *_hung = NULL
pthread_mutex_init(&_hung_guard, NULL)

cdef stream_function _released = NULL       # nobody uses the handle's stream any more, but those who wait on it
cdef stream_function _closing = NULL        # nor do they
cdef uint64_t lost_handles = 0              # that could not be opened again


cdef void set_stream_functions(stream_function released, stream_function closing) noexcept nogil:
    """Set who is told of the end of a handle's stream: `released` by RELEASE, `closing` before the descriptor goes."""
    global _released, _closing
    _released = released
    _closing = closing


cdef bint _room_for_handle_locked(const session *s) noexcept nogil:
    return s.handles_used < max_handles and within_share(s.handles_used + s.lock_files)


cdef int session_room(session *s, bint with_handle, int directory, const char *name) noexcept nogil:
    """See that a file which is about to be made can have its node, and its handle: 0, -EEXIST or -ENFILE.

    `name` may be NULL. Who comes at the same time may be quicker; then the file is there, and is refused all the same.
    """
    cdef bint room
    cdef statx_t st
    pthread_mutex_lock(&s.guard)
    room = s.nodes_used < max_nodes and (not with_handle or _room_for_handle_locked(s))
    pthread_mutex_unlock(&s.guard)
    if room:
        return 0
    return -EEXIST if name != NULL and stat_name(directory, name, &st) == 0 else -ENFILE


cdef uint32_t _new_handle_locked(session *s) noexcept nogil:
    cdef uint32_t index = s.handle_free
    if not _room_for_handle_locked(s):
        return NO_INDEX
    if index != NO_INDEX:
        s.handle_free = handle_at(s, index).next_free
    else:
        if grow(s.state_fd, s.state, HANDLES, s.handle_count) < 0:
            return NO_INDEX
        index = s.handle_count
        s.handle_count += 1
        handle_at(s, index).generation = s.salt & GENERATIONS
    s.handles_used += 1
    return index


cdef int handle_new(session *s, node *n, int fd, uint32_t flags, uint32_t open_flags, uint64_t *id) noexcept nogil:
    """A handle on a pinned node for a descriptor opened with these open(2) flags, which is taken over. 0 or -ENFILE."""
    cdef uint32_t index
    cdef handle *h
    pthread_mutex_lock(&s.guard)
    index = _new_handle_locked(s)
    if index == NO_INDEX:
        pthread_mutex_unlock(&s.guard)
        close(fd)
        return -ENFILE
    h = handle_at(s, index)
    h.fd = fd
    h.pins = 0
    h.open_flags = open_flags
    h.flocked = 0
    h.position = 0
    h.notify = 0
    h.stream = NULL
    h.index = index
    h.node = n
    h.node_index = n.index
    written()
    h.flags = HANDLE_IN_USE | flags
    n.handles += 1
    descriptor_opened()
    id[0] = <uint64_t>h.generation << 34 | <uint64_t>index << 2 | (2 if flags & HANDLE_POLLABLE else 0) | \
        (1 if flags & HANDLE_WRITABLE else 0)
    pthread_mutex_unlock(&s.guard)
    return 0


cdef int handle_new_stream(session *s, node *n, int fd, uint32_t flags, open_reply *out) noexcept nogil:
    """The handle of a FIFO or character device opened with these open(2) flags and O_NONBLOCK. 0 or -errno."""
    cdef uint64_t id = 0
    cdef uint32_t kind = HANDLE_STREAM | HANDLE_POLLABLE
    if (flags & O_ACCMODE) != O_RDONLY:
        kind |= HANDLE_WRITABLE
    cdef int error = handle_new(s, n, fd, kind, flags & O_ACCMODE | O_NONBLOCK, &id)
    out.handle = id
    out.flags = OPENED_UNCACHED | OPENED_STREAM
    out.reserved = 0
    return error


cdef handle *_handle_locked(session *s, uint64_t id) noexcept nogil:
    """The live handle of an id, or NULL."""
    cdef uint32_t index = <uint32_t>(id >> 2)
    cdef handle *h
    if index == NO_INDEX or index >= s.handle_count:
        return NULL
    h = handle_at(s, index)
    if not h.flags & HANDLE_IN_USE or h.flags & HANDLE_ENDED or h.generation != <uint32_t>(id >> 34):
        return NULL
    return h


cdef int handle_hold(session *s, uint64_t id, handle **out) noexcept nogil:
    """Hold the handle of an id, which may not have its descriptor. 0 or -ESTALE."""
    pthread_mutex_lock(&s.guard)
    out[0] = _handle_locked(s, id)
    if out[0] != NULL:
        out[0].pins += 1
    pthread_mutex_unlock(&s.guard)
    return 0 if out[0] != NULL else -ESTALE


cdef int handle_pin(session *s, uint64_t id, handle **out) noexcept nogil:
    """Hold the handle of an id, with its descriptor open. 0, -ESTALE; -EIO: it was lost with the engine before us."""
    cdef int error = handle_hold(s, id, out)
    if error == 0 and out[0].fd < 0:
        error = _reopen(s, out[0])
        if error < 0:
            handle_unpin(s, out[0])
    return error


cdef int _opened_again(session *s, handle *h) noexcept nogil:
    """A descriptor like the one that a handle had, or -errno."""
    cdef char link[32]
    cdef int fd, error
    error = node_hold(s, h.node)
    if error < 0:
        return error
    proc_path(link, h.node.fd)
    fd = openat(AT_FDCWD, link, <int>h.open_flags | O_CLOEXEC | O_NOCTTY)
    error = -errno if fd < 0 else 0
    node_unpin(s, h.node)
    if error == 0 and h.open_flags & O_APPEND:
        fcntl(fd, F_SETFL, <int>(h.open_flags & ~<uint32_t>(O_ACCMODE | O_APPEND)))     # as when it was opened first
    return fd if error == 0 else error


cdef int _reopen(session *s, handle *h) noexcept nogil:
    """Give a held handle its descriptor. 0, -EIO, or -EMFILE and the like: not now."""
    global lost_handles
    cdef int fd = -EIO
    if not h.flags & HANDLE_LOST:
        fd = _opened_again(s, h)
    if fd in (-EMFILE, -ENFILE, -ENOMEM, -EINTR):
        return fd
    pthread_mutex_lock(&s.guard)
    if fd < 0 and not h.flags & HANDLE_LOST:
        h.flags |= HANDLE_LOST
        lost_handles += 1
    elif fd >= 0 and h.fd < 0:
        h.fd = fd
        h.position = 0
        fd = 0
        descriptor_opened()
    pthread_mutex_unlock(&s.guard)
    if fd > 0:
        close(fd)                   # somebody else was quicker
    return 0 if fd >= 0 else -EIO


cdef node *_free_handle_locked(session *s, handle *h) noexcept nogil:
    """Take an ended handle out of use; the caller closes its descriptor and lets the node go that is returned."""
    h.flags = 0
    h.generation = (h.generation + 1) & GENERATIONS
    h.next_free = s.handle_free
    s.handle_free = h.index
    s.handles_used -= 1
    return h.node


cdef void _settle(session *s, handle *h) noexcept nogil:
    """Close an ended handle that nobody pins any more."""
    cdef node *n = NULL
    cdef void *stream = NULL
    cdef int fd = -1
    pthread_mutex_lock(&s.guard)
    if h.pins == 0 and h.flags & HANDLE_ENDED and not _would_hang_locked(s, h):
        fd = h.fd
        stream = h.stream
        if h.flags & HANDLE_STORED:
            unstore_later(s.id, h.index, h.generation)
        n = _free_handle_locked(s, h)
    pthread_mutex_unlock(&s.guard)
    if stream != NULL:
        _closing(stream)
    close_counted(fd)
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
    cdef void *stream = NULL
    pthread_mutex_lock(&s.guard)
    h = _handle_locked(s, id)
    if h != NULL:
        h.flags |= HANDLE_ENDED
        stream = h.stream
        if stream != NULL:
            h.pins += 1             # or its last waiter may take it, stream and all, before we come to that
    pthread_mutex_unlock(&s.guard)
    if h == NULL:
        return -ESTALE
    if stream == NULL:
        _settle(s, h)
    else:
        _released(stream)
        handle_unpin(s, h)
    return 0


# ---- files whose close(2) would hang ---------------------------------------------------------------------------------

cdef bint _would_hang_locked(session *s, handle *h) noexcept nogil:
    """Whether an ended handle that nobody pins stays open for now: then it is pinned. A FIFO's end asks no file system."""
    cdef uint64_t number = s.devices[h.node.device].number
    cdef hung_close *entry
    if h.fd < 0 or h.flags & HANDLE_STREAM or s.ended or not close_hangs(number):
        return False
    entry = <hung_close *>malloc(sizeof(hung_close))
    if entry == NULL or not session_hold(s):
        free(entry)
        return False
    h.pins = 1
    entry.s = s
    entry.h = h
    entry.number = number
    pthread_mutex_lock(&_hung_guard)
    entry.next = _hung
    _set_hung(entry)
    pthread_mutex_unlock(&_hung_guard)
    return True


cdef inline void _set_hung(hung_close *first) noexcept nogil:
    global _hung
    _hung = first


cdef bint _is_due(const hung_close *entry, const hung_close *batch) noexcept nogil:
    """Whether an entry can be seen to, together with the batch: one that hangs again is to hold up its like only."""
    if batch != NULL and batch.number != entry.number:
        return False
    return entry.s.ended or not close_hangs(entry.number)


cdef hung_close *_take_due_locked() noexcept nogil:
    """Take those of one file system that can be seen to."""
    cdef hung_close **at = &_hung
    cdef hung_close *entry
    cdef hung_close *batch = NULL
    while at[0] != NULL:
        entry = at[0]
        if _is_due(entry, batch):
            at[0] = entry.next
            entry.next = batch
            batch = entry
        else:
            at = &entry.next
    return batch


cdef void _see_to_batch(void *first) noexcept nogil:
    """Close them. Those of a session that has ended are closed with it."""
    cdef hung_close *entry = <hung_close *>first
    cdef hung_close *following
    while entry != NULL:
        following = entry.next
        if not entry.s.ended:
            handle_unpin(entry.s, entry.h)
        session_unref(entry.s)
        free(entry)
        entry = following


cdef void see_to_hung_closes() noexcept nogil:
    """Have closed what does not hang any more; to be called from time to time."""
    cdef hung_close *batch = NULL
    while True:
        pthread_mutex_lock(&_hung_guard)
        batch = _take_due_locked()
        pthread_mutex_unlock(&_hung_guard)
        if batch == NULL:
            return
        if not chore_add(_see_to_batch, batch):
            _see_to_batch(batch)
