"""The life of connections: the list of them all, from the accepted socket to its end.

Others than its owner may only shutdown(2) a connection, under session.guard (attached ones) or connections_guard, which
the owner takes before it frees it.
"""
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport calloc, free

from qtfs_common.rings.channel cimport greeter_init, is_greeter, works_in
from qtfs_common.rings.memory cimport ring_memory
from qtfs_common.transport cimport now_us, socket_channel_init
from qtfs_server.includes.linux cimport atomic_add_int, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, \
    pthread_mutex_unlock
from qtfs_server.session cimport session, session_unref
from qtfs_server cimport descriptors as descriptors_module

from qtfs_common import addresses

cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_VSOCK
        SHUT_RDWR
    int setsockopt(int, int, int, const void *, unsigned int)

cdef extern from "<linux/vm_sockets.h>" nogil:
    enum:
        SO_VM_SOCKETS_BUFFER_SIZE

cdef enum:
    UNATTACHED_TIMEOUT_US = 60000000
    UNGREETED_TIMEOUT_US = 10000000     # on a bell, which strangers may reach

cdef uint64_t _vsock_buffer_bytes = addresses.SOCKET_BUFFER_BYTES
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


cdef void cut_unattached(int64_t now) noexcept nogil:
    """Cut connections that have not said for long who they are."""
    cdef connection *c
    pthread_mutex_lock(&connections_guard)
    c = connections
    while c != NULL:
        if c.state < STATE_SLOT and now - c.since_us > (UNGREETED_TIMEOUT_US if is_greeter(&c.ch) else
                                                        UNATTACHED_TIMEOUT_US):
            c.ch.ops.cut(&c.ch, SHUT_RDWR)
        c = c.next
    pthread_mutex_unlock(&connections_guard)


cdef void probe_vsock_peers() noexcept nogil:
    """Say something to the machine of each client by vsock: one that was started again answers that it has no such socket.

    AF_VSOCK has no keepalive, but tells the peer whenever the size of our buffer is changed. It grows by a byte each time, as a
    smaller one could be too small for what is on its way (net/vmw_vsock/virtio_transport_common.c).
    """
    cdef connection *c
    cdef uint64_t size
    pthread_mutex_lock(&connections_guard)
    c = connections
    while c != NULL:
        if c.is_vsock:
            c.probes += 1
            size = _vsock_buffer_bytes + c.probes
            setsockopt(c.ch.fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &size, sizeof(size))
        c = c.next
    pthread_mutex_unlock(&connections_guard)


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
