"""What one session holds, counted for the control socket. Nothing is counted where requests are served: we go and look."""
from libc.stdint cimport int32_t, uint32_t, uint64_t

from qtfs_server.includes.linux cimport pthread_mutex_lock, pthread_mutex_unlock
from qtfs_server.locked_files cimport count_locks, lock_count
from qtfs_server.node_table cimport awake_locked
from qtfs_server.session cimport RECORD_IN_USE, node, record, record_at, session


cdef enum:
    AT_ONCE = 1024                  # records that are looked at while nobody else may


cdef uint64_t _lookups_from(session *s, uint32_t first) noexcept nogil:
    """Lookups that the client's kernel has still to forget, of some records."""
    cdef uint64_t found = 0
    cdef uint32_t i
    cdef node *n
    pthread_mutex_lock(&s.guard)
    for i in range(first, min(first + AT_ONCE, s.record_count)):
        n = awake_locked(s, i)
        if n != NULL:
            found += n.lookups
        elif record_at(s, i).stamp & RECORD_IN_USE:
            found += record_at(s, i).lookups
    pthread_mutex_unlock(&s.guard)
    return found


cdef uint64_t _lookups(session *s) noexcept nogil:
    """Of all nodes. Some at a time: whoever serves requests does not wait for a million of them."""
    cdef uint64_t found = 0
    cdef uint32_t first = 0
    while first < s.record_count:
        found += _lookups_from(s, first)
        first += AT_ONCE
    return found


cdef struct holding:                # of one session
    int32_t connections
    bint event_channel
    uint32_t nodes
    uint32_t open_nodes
    uint32_t handles
    uint64_t lookups
    size_t outbox_bytes
    uint64_t event_number
    lock_count locks


cdef void _look(session *s, holding *out) noexcept nogil:
    """Without the GIL: whoever holds it may wait for the session's guard."""
    out.lookups = _lookups(s)
    count_locks(s, &out.locks)
    pthread_mutex_lock(&s.guard)
    out.connections = s.connections
    out.event_channel = s.event != NULL
    out.nodes = s.nodes_used
    out.open_nodes = s.open_nodes
    out.handles = s.handles_used
    pthread_mutex_lock(&s.outbox_guard)
    out.outbox_bytes = s.outbox_bytes
    out.event_number = s.event_number
    pthread_mutex_unlock(&s.outbox_guard)
    pthread_mutex_unlock(&s.guard)


cdef dict session_figures(session *s):
    """What a session holds; the caller has a reference to it."""
    cdef holding held
    with nogil:
        _look(s, &held)
    return {
        "id": f"{s.id:016x}", "slots": s.slots, "connections": held.connections, "event_channel": held.event_channel,
        "nodes": held.nodes, "open_nodes": held.open_nodes, "lookups": held.lookups, "handles": held.handles,
        "locks": held.locks.ranges, "lock_owners": held.locks.owners, "waiting_locks": held.locks.waits,
        "outbox_bytes": held.outbox_bytes, "event_number": held.event_number,
    }
