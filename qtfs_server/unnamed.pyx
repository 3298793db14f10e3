"""Open files that have no name (any more): nobody could open them again, so systemd keeps their descriptors (fd_store.pyx).

Requests only say what may be such a file; a chore looks, and sends. A file that loses its last name in another way, by a
process of the server, is not noticed. Nor are FIFOs kept while we live: the copy would be another reader or writer, and
whoever waits for the end of file would have to wait for systemd, too.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from qtfs_server.attributes cimport stat_fd
from qtfs_server.chores cimport chore_add
from qtfs_server.fd_store cimport store
from qtfs_server.handles cimport handle_hold, handle_unpin
from qtfs_server.includes.linux cimport S_IFIFO, S_IFMT, pthread_mutex_lock, pthread_mutex_unlock, statx_t
from qtfs_server.node_table cimport awake_locked, find_record_locked
from qtfs_server.session cimport HANDLE_ENDED, HANDLE_IN_USE, HANDLE_STORED, NO_INDEX, handle, handle_at, node, session, \
    session_after, session_hold, session_unref

cdef enum:
    AT_ONCE = 1024                  # handles that are looked at while nobody else may

cdef struct suspicion:
    session *s                      # a counted reference; NULL: any session
    uint64_t id                     # of the handle; of a file, if there is no session:
    uint64_t device                 # st_dev
    uint64_t ino


# ---- chores ------------------------------------------------------------------------------------------------------------

cdef void _store_held(session *s, handle *h, bint leaving) noexcept nogil:
    """Have a held handle's descriptor kept if its file has no name; or, as the engine ends, if it is a FIFO."""
    cdef statx_t st
    cdef bint stored
    if h.fd < 0 or h.flags & HANDLE_STORED or stat_fd(h.fd, &st) < 0:
        return
    if st.stx_nlink > 0 and not (leaving and (st.stx_mode & S_IFMT) == S_IFIFO):
        return
    stored = store(s.id, h.index, h.generation, h.fd)
    if stored:
        pthread_mutex_lock(&s.guard)
        h.flags |= HANDLE_STORED    # whoever unpins it last has the copy removed
        pthread_mutex_unlock(&s.guard)


cdef void _store_handle(session *s, uint64_t id, bint leaving) noexcept nogil:
    cdef handle *h = NULL
    if handle_hold(s, id, &h) == 0:
        _store_held(s, h, leaving)
        handle_unpin(s, h)


cdef uint64_t _next_handle(session *s, uint32_t *at, const node *of) noexcept nogil:
    """The id of the first handle from an index on, of one node or of any; 0: there is none. Some at a time."""
    cdef handle *h
    cdef uint64_t id = 0
    cdef uint32_t end
    while id == 0 and at[0] < s.handle_count:
        pthread_mutex_lock(&s.guard)
        end = min(at[0] + AT_ONCE, s.handle_count)
        while id == 0 and at[0] < end:
            h = handle_at(s, at[0])
            if h.flags & HANDLE_IN_USE and not h.flags & HANDLE_ENDED and (of == NULL or h.node == of):
                id = <uint64_t>h.generation << 34 | <uint64_t>at[0] << 2
            at[0] += 1
        pthread_mutex_unlock(&s.guard)
    return id


cdef void _store_handles(session *s, const node *of, bint leaving) noexcept nogil:
    """Those of a node, which is only compared, or all."""
    cdef uint32_t at = 1
    cdef uint64_t id = _next_handle(s, &at, of)
    while id != 0:
        _store_handle(s, id, leaving)
        id = _next_handle(s, &at, of)


cdef const node *_open_node(session *s, uint64_t device, uint64_t ino) noexcept nogil:
    """The node of a file that a session has open, to be compared only; or NULL."""
    cdef const node *found = NULL
    cdef const node *n
    cdef uint32_t i
    pthread_mutex_lock(&s.guard)
    for i in range(s.device_count):
        if s.devices[i].number == device and found == NULL:
            n = awake_locked(s, find_record_locked(s, i, ino))
            if n != NULL and n.handles > 0:
                found = n
    pthread_mutex_unlock(&s.guard)
    return found


cdef void _look_everywhere(uint64_t device, uint64_t ino) noexcept nogil:
    """Several sessions may have the file open."""
    cdef session *s = session_after(NULL)
    cdef const node *n
    while s != NULL:
        n = _open_node(s, device, ino)
        if n != NULL:
            _store_handles(s, n, False)
        s = session_after(s)


cdef void _look(void *subject) noexcept nogil:
    cdef suspicion what = (<suspicion *>subject)[0]
    free(subject)
    if what.s == NULL:
        _look_everywhere(what.device, what.ino)
        return
    _store_handle(what.s, what.id, False)
    session_unref(what.s)


cdef void _suspect(session *s, uint64_t id, uint64_t device, uint64_t ino) noexcept nogil:
    """Have somebody look. Without memory nobody does."""
    cdef suspicion *what = <suspicion *>malloc(sizeof(suspicion))
    if what == NULL or (s != NULL and not session_hold(s)):
        free(what)
        return
    what.s = s
    what.id = id
    what.device = device
    what.ino = ino
    if not chore_add(_look, what):
        if s != NULL:
            session_unref(s)
        free(what)


# ---- for requests: if `storing` ------------------------------------------------------------------------------------------

cdef void opened_unnamed(session *s, uint64_t id) noexcept nogil:
    """A handle is of a file without a name."""
    _suspect(s, id, 0, 0)


cdef void name_removed(session *s, const node *directory, uint64_t ino) noexcept nogil:
    """A name in a directory led to that file, and was removed."""
    cdef uint64_t device
    cdef bint others
    pthread_mutex_lock(&s.guard)
    device = s.devices[directory.device].number
    pthread_mutex_unlock(&s.guard)
    others = s.next != NULL or s.previous != NULL       # the chore looks what they have open
    if ino != 0 and (others or _open_node(s, device, ino) != NULL):
        _suspect(NULL, 0, device, ino)


cdef void store_all(session *s) noexcept nogil:
    """The engine ends, but not for good: keep what the next one could not open."""
    _store_handles(s, NULL, True)
