"""The life of connections: the list of them all, from the accepted socket to its end.

Others than its owner may only shutdown(2) a connection, under session.guard (attached ones) or connections_guard, which
the owner takes before it frees it.
"""
from libc.stdint cimport int32_t, uint64_t
from libc.stdlib cimport calloc, free

from qtfs_common.rings.channel cimport greeter_init, works_in
from qtfs_common.rings.memory cimport ring_memory
from qtfs_common.transport cimport now_us, socket_channel_init
from qtfs_server.includes.linux cimport atomic_add_int, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, \
    pthread_mutex_unlock
from qtfs_server.session cimport session, session_unref
from qtfs_server cimport descriptors as descriptors_module

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SHUT_RD
        SHUT_RDWR

cdef uint64_t _copied = 0           # by connections that have ended, under the guard
pthread_mutex_init(&connections_guard, NULL)


cdef connection *connection_new(int fd, int kind, bint needs_authentication, ring_memory *memory) noexcept nogil:
    """A connection for an accepted socket, listed; NULL without memory. `memory`: the socket is its bell."""
    global connections
    cdef connection *c = <connection *>calloc(1, sizeof(connection))
    if c == NULL:
        return NULL
    c.kind = kind
    c.needs_authentication = needs_authentication
    c.since_us = now_us()
    if memory != NULL:
        greeter_init(&c.ch, fd, memory)
    else:
        socket_channel_init(&c.ch, fd)
    pthread_mutex_lock(&connections_guard)
    c.next = connections
    if connections != NULL:
        connections.previous = c
    connections = c
    pthread_mutex_unlock(&connections_guard)
    atomic_add_int(&connection_count, 1)
    atomic_add_int(&descriptors_module.descriptors, 1)
    return c


cdef void _unlist(connection *c) noexcept nogil:
    global connections, _copied
    pthread_mutex_lock(&connections_guard)
    _copied += c.ch.copied
    if c.previous != NULL:
        c.previous.next = c.next
    else:
        connections = c.next
    if c.next != NULL:
        c.next.previous = c.previous
    pthread_mutex_unlock(&connections_guard)


cdef void _leave_session(connection *c) noexcept nogil:
    """Give up the slot or event channel, and the reference."""
    cdef session *s = c.s
    if s == NULL:
        return
    pthread_mutex_lock(&s.guard)
    if c.state == STATE_EVENT and s.event == c:
        pthread_mutex_lock(&s.outbox_guard)
        s.event = NULL
        pthread_mutex_unlock(&s.outbox_guard)
    elif c.state == STATE_SLOT and s.slot_table[c.slot].connection == c:
        s.slot_table[c.slot].connection = NULL
    s.connections -= 1
    s.idle_since_us = now_us()
    pthread_mutex_unlock(&s.guard)
    c.s = NULL
    session_unref(s)


cdef void connection_free(connection *c) noexcept nogil:
    _leave_session(c)
    _unlist(c)
    c.ch.ops.close(&c.ch)
    free(c)
    atomic_add_int(&connection_count, -1)
    atomic_add_int(&descriptors_module.descriptors, -1)


cdef void cut_all_locked(session *s, const connection *asking) noexcept nogil:
    """Cut a session's connections, `asking`, which has yet to get its reply, for reading only."""
    cdef connection *c
    cdef uint32_t slot
    for slot in range(s.slots + 1):
        c = <connection *>(s.event if slot == s.slots else s.slot_table[slot].connection)
        if c != NULL:
            c.ch.ops.cut(&c.ch, SHUT_RD if c == asking else SHUT_RDWR)


cdef uint64_t _requests_locked(const session *s) noexcept nogil:
    cdef uint64_t count = 0
    cdef uint32_t slot
    for slot in range(s.slots):
        count += s.slot_table[slot].sequence
    return count


cdef bint cut_if_silent(session *s, int64_t now, int64_t limit_us) noexcept nogil:
    """Cut the connections of a session by vsock whose client has sent neither a request nor a PING for so long.

    AF_VSOCK has no keepalive: that the other machine was started again learns only who sends something there. A client
    that lives comes back, within the grace time.
    """
    cdef connection *c
    cdef uint64_t count
    cdef bint silent = False
    pthread_mutex_lock(&s.guard)
    c = <connection *>s.event
    if c != NULL and c.dies_silently:
        count = _requests_locked(s)
        if count != s.progress:
            s.progress = count
            c.heard_us = now
        silent = now - c.heard_us > limit_us
        if silent:
            c.heard_us = now            # said once
            cut_all_locked(s, NULL)
    pthread_mutex_unlock(&s.guard)
    return silent


cdef void cut_those_in(ring_memory *memory) noexcept nogil:
    """Cut whoever is connected by way of a memory; NULL: everybody."""
    cdef connection *c
    pthread_mutex_lock(&connections_guard)
    c = connections
    while c != NULL:
        if memory == NULL or works_in(&c.ch, memory):
            c.ch.ops.cut(&c.ch, SHUT_RDWR)
        c = c.next
    pthread_mutex_unlock(&connections_guard)


cdef bint somebody_new() noexcept nogil:
    """Whether there is a connection that belongs to no session yet."""
    cdef connection *c
    pthread_mutex_lock(&connections_guard)
    c = connections
    while c != NULL and c.state >= STATE_SLOT:
        c = c.next
    pthread_mutex_unlock(&connections_guard)
    return c != NULL


cdef uint64_t bytes_copied() noexcept nogil:
    """Bytes of messages that went through buffers of ours, since the start."""
    cdef connection *c
    cdef uint64_t total
    pthread_mutex_lock(&connections_guard)
    total = _copied
    c = connections
    while c != NULL:
        total += c.ch.copied
        c = c.next
    pthread_mutex_unlock(&connections_guard)
    return total
