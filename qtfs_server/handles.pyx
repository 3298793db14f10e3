"""Handles of a session: open files and directories.

A handle id is (generation << 34 | index << 2 | pollable << 1 | writable): stale and invented ones are refused by their
generation.
"""
from libc.errno cimport ENFILE, ESTALE
from libc.stdint cimport uint32_t, uint64_t

from qtfs_common.protocol cimport OPENED_STREAM, OPENED_UNCACHED, open_reply
from qtfs_server.descriptors cimport close_counted, descriptor_opened
from qtfs_server.includes.linux cimport O_ACCMODE, O_RDONLY, close, pthread_mutex_lock, pthread_mutex_unlock
from qtfs_server.nodes cimport node_let_go
from qtfs_server.session cimport HANDLE_ENDED, HANDLE_IN_USE, HANDLE_POLLABLE, HANDLE_STREAM, HANDLE_WRITABLE, \
    MAX_HANDLES, NO_INDEX, grown_chunks, handle, handle_at, node, session

cdef enum:
    GENERATIONS = 0x3fffffff

cdef stream_function _released = NULL       # nobody uses the handle's stream any more, but those who wait on it
cdef stream_function _closing = NULL        # nor do they


cdef void set_stream_functions(stream_function released, stream_function closing) noexcept nogil:
    """Set who is told of the end of a handle's stream: `released` by RELEASE, `closing` before the descriptor goes."""
    global _released, _closing
    _released = released
    _closing = closing


cdef uint32_t _new_handle_locked(session *s) noexcept nogil:
    cdef uint32_t index = s.handle_free
    cdef handle **chunks
    if index != NO_INDEX:
        s.handle_free = handle_at(s, index).next_free
    else:
        if s.handle_count >= MAX_HANDLES:
            return NO_INDEX
        chunks = <handle **>grown_chunks(<void **>s.handle_chunks, s.handle_count, sizeof(handle))
        if chunks == NULL:
            return NO_INDEX
        s.handle_chunks = chunks
        index = s.handle_count
        s.handle_count += 1
        handle_at(s, index).generation = s.salt & GENERATIONS
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
    h = handle_at(s, index)
    h.fd = fd
    h.pins = 0
    h.flags = HANDLE_IN_USE | flags
    h.position = 0
    h.stream = NULL
    h.index = index
    h.node = n
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
    cdef int error = handle_new(s, n, fd, kind, &id)
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
    if h.pins == 0 and h.flags & HANDLE_ENDED:
        fd = h.fd
        stream = h.stream
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
