"""Handles of a session: open files and directories.

A handle id is (generation << 33 | index << 1 | writable): stale and invented ones are refused by their generation.
"""
from libc.errno cimport ENFILE, ESTALE
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.descriptors cimport close_counted, descriptor_opened
from qtfs_server.includes.linux cimport close, pthread_mutex_lock, pthread_mutex_unlock
from qtfs_server.nodes cimport node_let_go
from qtfs_server.session cimport HANDLE_ENDED, HANDLE_IN_USE, HANDLE_WRITABLE, MAX_HANDLES, NO_INDEX, grown_chunks, \
    handle, handle_at, node, session


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
        handle_at(s, index).generation = s.salt & 0x7fffffff
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
    h.index = index
    h.node = n
    n.handles += 1
    descriptor_opened()
    id[0] = <uint64_t>h.generation << 33 | <uint64_t>index << 1 | (1 if flags & HANDLE_WRITABLE else 0)
    pthread_mutex_unlock(&s.guard)
    return 0


cdef handle *_handle_locked(session *s, uint64_t id) noexcept nogil:
    """The live handle of an id, or NULL."""
    cdef uint32_t index = <uint32_t>(id >> 1)
    cdef handle *h
    if index == NO_INDEX or index >= s.handle_count:
        return NULL
    h = handle_at(s, index)
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
    pthread_mutex_lock(&s.guard)
    h = _handle_locked(s, id)
    if h != NULL:
        h.flags |= HANDLE_ENDED
    pthread_mutex_unlock(&s.guard)
    if h == NULL:
        return -ESTALE
    _settle(s, h)
    return 0
