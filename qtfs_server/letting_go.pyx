"""Gives up the descriptors by which nodes hold mounts of the server: of idle nodes, of one mount, of mounts that are gone.

Nodes that hold such a mount stand in session.holders. One whose file is open is left alone: the open file holds the
mount anyway. What a node needs to be opened again is kept as in an eviction (node_descriptors.pyx).

One thread at a time goes through the holders of a session: it sets session.walked. It asks file systems, and may hang in
one; then only this session keeps what it holds. So nobody waits for it but who unmounts, and not for long.
"""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.chores cimport chore_add
from qtfs_server.includes.linux cimport pthread_mutex_lock, pthread_mutex_unlock, usleep
from qtfs_server.mounts cimport close_idle_mounts, is_let_go, set_holding
from qtfs_server.node_table cimport awake_locked
from qtfs_server.node_descriptors cimport node_put_aside, node_unpin
from qtfs_server.session cimport NODE_WARM, RECORD_LISTED, device, node, record_at, session, session_after, session_hold, \
    session_unref
from qtfs_server.stuck cimport is_stuck

cdef enum:
    LOOK_US = 1000
    PATIENCE_US = 500000            # of who unmounts with who goes through a session's holders

cdef struct progress:               # of one walk through session.holders, which grows at its end meanwhile
    uint32_t at
    uint32_t kept


# ---- idle ones -------------------------------------------------------------------------------------------------------

cdef bint _holds_locked(session *s, node *n) noexcept nogil:
    return n != NULL and n.fd >= 0 and is_let_go(s, n.device)


cdef node *_next_idle_locked(session *s, progress *walk) noexcept nogil:
    """Pin the next node that was not used since the last walk; NULL at the end. Those that stay are kept in the list."""
    cdef uint32_t index
    cdef node *n = NULL
    while walk.at < s.holder_count:
        index = s.holders[walk.at]
        walk.at += 1
        n = awake_locked(s, index)
        if not _holds_locked(s, n):
            record_at(s, index).stamp &= ~<uint32_t>RECORD_LISTED
            continue
        s.holders[walk.kept] = index        # until the descriptor is really gone
        walk.kept += 1
        if n.flags & NODE_WARM and not s.devices[n.device].gone:
            n.flags &= ~NODE_WARM
        elif n.pins == 0 and n.handles == 0 and not is_stuck(s.devices[n.device].number):
            n.pins += 1
            return n
    s.holder_count = walk.kept
    return NULL


cdef bint _begin_walk(session *s) noexcept nogil:
    """Whether nobody else goes through the holders of a session just now."""
    cdef bint alone
    pthread_mutex_lock(&s.guard)
    alone = not s.walked
    s.walked = True
    pthread_mutex_unlock(&s.guard)
    return alone


cdef void _end_walk(session *s) noexcept nogil:
    pthread_mutex_lock(&s.guard)
    s.walked = False
    pthread_mutex_unlock(&s.guard)


cdef bint _holds_something(session *s) noexcept nogil:
    """Whether a session has descriptors on mounts that are to be let go."""
    cdef uint32_t i
    cdef bint holds
    pthread_mutex_lock(&s.guard)
    holds = s.holder_count > 0
    for i in range(s.device_count):
        holds = holds or (s.devices[i].mount_fd >= 0 and is_let_go(s, i))
    pthread_mutex_unlock(&s.guard)
    return holds


cdef void _let_session_go(session *s) noexcept nogil:
    """One walk, which the caller has begun."""
    cdef progress walk
    cdef node *n = NULL
    walk.at = walk.kept = 0
    while True:
        pthread_mutex_lock(&s.guard)
        n = _next_idle_locked(s, &walk)
        pthread_mutex_unlock(&s.guard)
        if n == NULL:
            break
        node_put_aside(s, n)
        node_unpin(s, n)
    close_idle_mounts(s)
    _end_walk(s)


cdef void _walk(void *subject) noexcept nogil:
    _let_session_go(<session *>subject)
    session_unref(<session *>subject)


cdef bint let_idle_go() noexcept nogil:
    """Have closed what was not used since the last call. Whether there may be something left afterwards."""
    cdef session *s
    cdef bint left = False
    set_holding(False)              # what comes from now on rings again
    s = session_after(NULL)
    while s != NULL:
        if _holds_something(s):
            left = True
            _begin_chore(s)
        s = session_after(s)
    return left


cdef void _begin_chore(session *s) noexcept nogil:
    if not _begin_walk(s):
        return                      # the last one is not over
    if session_hold(s):
        if chore_add(_walk, s):
            return
        session_unref(s)
    _end_walk(s)


# ---- one mount, gone ones --------------------------------------------------------------------------------------------

cdef bint _is_mount(const device *d, uint64_t mount_id) noexcept nogil:
    return d.mount_id == mount_id or d.listed_id == mount_id


cdef void _cool(session *s, uint64_t mount_id) noexcept nogil:
    """Make the nodes and the descriptor of a mount look idle."""
    cdef uint32_t i
    cdef node *n = NULL
    pthread_mutex_lock(&s.guard)
    for i in range(s.holder_count):
        n = awake_locked(s, s.holders[i])
        if n != NULL and _is_mount(&s.devices[n.device], mount_id):
            n.flags &= ~NODE_WARM
    for i in range(s.device_count):
        if _is_mount(&s.devices[i], mount_id):
            s.devices[i].warm = False
    pthread_mutex_unlock(&s.guard)


def release_mount(uint64_t mount_id) -> None:
    """Let a mount go that is about to be unmounted: by its id in the mount table, or by its unique one.

    What still holds it then are open files, requests under way, and sessions whose root is on it.
    """
    with nogil:
        _release_mount(mount_id)


cdef void _release_mount(uint64_t mount_id) noexcept nogil:
    cdef session *s = session_after(NULL)
    cdef int waited_us = 0
    cdef bint alone
    while s != NULL:
        alone = _begin_walk(s)
        while not alone and waited_us < PATIENCE_US:
            usleep(LOOK_US)
            waited_us += LOOK_US
            alone = _begin_walk(s)
        if alone:
            _cool(s, mount_id)
            _let_session_go(s)
        s = session_after(s)


def mount_gone(uint64_t mount_id) -> None:
    """Note that a mount was taken away, and not lazily: its number may be given out again before the table is read."""
    cdef session *s = session_after(NULL)
    cdef uint32_t i
    while s != NULL:
        pthread_mutex_lock(&s.guard)
        for i in range(s.device_count):
            if is_let_go(s, i) and _is_mount(&s.devices[i], mount_id):
                s.devices[i].gone = True
        pthread_mutex_unlock(&s.guard)
        s = session_after(s)


def note_known_mounts() -> None:
    """Before the mount table is read: which mounts may be missing there because they are gone."""
    cdef session *s = session_after(NULL)
    cdef uint32_t i
    while s != NULL:
        pthread_mutex_lock(&s.guard)
        for i in range(s.device_count):
            s.devices[i].known = True
        pthread_mutex_unlock(&s.guard)
        s = session_after(s)


def mark_gone_mounts(table: dict[int, object]) -> None:
    """Afterwards: what is not in the table is gone, and nodes there are lost. The root's mount stays for its session."""
    cdef session *s = session_after(NULL)
    cdef device *d
    cdef uint32_t i
    while s != NULL:
        pthread_mutex_lock(&s.guard)
        for i in range(s.device_count):
            d = &s.devices[i]
            if d.known and is_let_go(s, i) and d.listed_id != 0 and d.listed_id not in table:
                d.gone = True
        pthread_mutex_unlock(&s.guard)
        s = session_after(s)
