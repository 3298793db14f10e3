"""The output of event channels: from any thread, in order, and nothing lost when a connection breaks.

Replies and notices are numbered. They stay in the session's outbox until the client acknowledges their number, which
every message of its carries, and go out again over a fresh event channel. Nobody waits for a peer that does not read:
what its socket does not take is left for `flush_blocked`. A client that acknowledges nothing is cut off when its outbox
is full. Then nothing is begun that would say more, until there is room; with a second cut the client asks again.

Lock order: session.outbox_guard, _blocked_guard.
"""
from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from qtfs_common.includes.polling cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_write
from qtfs_common.protocol cimport EVENT_SLOT, MESSAGE_REPLY, OP_PING, header
from qtfs_server.connection cimport connection
from qtfs_server.includes.linux cimport atomic_add_int, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, \
    pthread_mutex_unlock
from qtfs_server.session cimport outgoing, session, session_unref

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SHUT_RDWR

cdef enum:
    MAX_OUTBOX_BYTES = 64 << 20     # of one session; a single answer may exceed it
    ROOM_AGAIN_BYTES = 32 << 20     # so much less that a fresh channel pays
    MAX_TOLD_BYTES = 1 << 20        # of what was not asked for, while there is no event channel

cdef pthread_mutex_t _blocked_guard
cdef session *_blocked = NULL       # sessions whose socket is full, each with a reference
cdef int _bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
pthread_mutex_init(&_blocked_guard, NULL)


cdef int event_bell() noexcept nogil:
    """An eventfd that rings when `flush_blocked` has something to do, and before long again."""
    return _bell


# ---- sending -----------------------------------------------------------------------------------------------------------

cdef inline uint8_t *_bytes(outgoing *message) noexcept nogil:
    return <uint8_t *>(message + 1)


cdef void _drop_first_locked(session *s) noexcept nogil:
    cdef outgoing *first = s.outbox
    s.outbox = first.next
    if s.outbox == NULL:
        s.outbox_end = &s.outbox
    s.outbox_bytes -= first.size
    free(first)


cdef void _drop_settled_locked(session *s, uint64_t acknowledged) noexcept nogil:
    """Free what is sent and need not be sent again, from the front on."""
    while s.outbox != NULL and s.outbox != s.unsent and s.outbox.number <= acknowledged:
        _drop_first_locked(s)


cdef void _list_blocked_locked(session *s) noexcept nogil:
    """Have the rest sent later."""
    global _blocked
    if s.outbox_blocked:
        return
    s.outbox_blocked = True
    atomic_add_int(&s.references, 1)
    pthread_mutex_lock(&_blocked_guard)
    s.next_blocked = _blocked
    _blocked = s
    pthread_mutex_unlock(&_blocked_guard)
    eventfd_write(_bell, 1)


cdef void _flush_locked(session *s) noexcept nogil:
    """Send what the socket takes. A broken one is left to its owner, who will notice."""
    cdef connection *c = <connection *>s.event
    cdef ssize_t sent
    while c != NULL and s.unsent != NULL:
        sent = c.ch.ops.put(&c.ch, _bytes(s.unsent) + s.unsent_at, s.unsent.size - s.unsent_at)
        if sent < 0:
            if sent == -EAGAIN:
                _list_blocked_locked(s)
            else:
                c.ch.ops.cut(&c.ch, SHUT_RDWR)
            return
        s.unsent_at += sent
        if s.unsent_at == s.unsent.size:
            s.unsent = s.unsent.next
            s.unsent_at = 0
    _drop_settled_locked(s, 0)


cdef void _append_locked(session *s, outgoing *message) noexcept nogil:
    cdef connection *c = <connection *>s.event
    cdef bint had_room = s.outbox_bytes <= MAX_OUTBOX_BYTES
    message.next = NULL
    s.outbox_end[0] = message
    s.outbox_end = &message.next
    s.outbox_bytes += message.size
    if s.unsent == NULL:
        s.unsent = message
        s.unsent_at = 0
    if had_room and s.outbox_bytes > MAX_OUTBOX_BYTES and c != NULL:
        c.ch.ops.cut(&c.ch, SHUT_RDWR)
    else:
        _flush_locked(s)


cdef void _send(session *s, uint16_t op, uint16_t flags, uint64_t tag, int error, const void *body, size_t body_bytes,
                bint must_arrive) noexcept nogil:
    cdef outgoing *message = <outgoing *>malloc(sizeof(outgoing) + sizeof(header) + body_bytes)
    cdef header *head
    if message == NULL:
        return                          # the client asks again when its timeout is over, or never: memory has run out
    head = <header *>_bytes(message)
    message.size = sizeof(header) + body_bytes
    memset(head, 0, sizeof(header))
    head.length = <uint32_t>message.size
    head.op = op
    head.flags = flags
    head.error = -error
    head.slot = EVENT_SLOT
    head.tag = tag
    if body_bytes > 0:
        memcpy(head + 1, body, body_bytes)
    pthread_mutex_lock(&s.outbox_guard)
    message.number = 0
    if must_arrive:
        s.event_number += 1
        message.number = head.sequence = s.event_number
    _append_locked(s, message)
    pthread_mutex_unlock(&s.outbox_guard)


cdef void event_restore(session *s, uint64_t number, const uint8_t *message, size_t size) noexcept nogil:
    """A message of the engine before us that the client has not confirmed."""
    cdef outgoing *copy = <outgoing *>malloc(sizeof(outgoing) + size)
    if copy == NULL:
        return
    memcpy(_bytes(copy), message, size)
    copy.size = size
    copy.number = number
    pthread_mutex_lock(&s.outbox_guard)
    _append_locked(s, copy)
    pthread_mutex_unlock(&s.outbox_guard)


cdef void event_reply(session *s, uint16_t op, uint64_t tag, int error, const void *body, size_t body_bytes) noexcept nogil:
    """Answer a request of the event channel, with 0 and a body or with -errno."""
    _send(s, op, MESSAGE_REPLY, tag, error, body, body_bytes if error == 0 else 0, True)


cdef void event_notify(session *s, uint16_t op, uint64_t tag) noexcept nogil:
    """Say something that was not asked for."""
    _send(s, op, 0, tag, 0, NULL, 0, True)


cdef void event_tell(session *s, uint16_t op, const void *body, size_t body_bytes) noexcept nogil:
    """The same with a body, which waits for an event channel; but not more than a reasonable client leaves waiting."""
    cdef bint has_room
    pthread_mutex_lock(&s.outbox_guard)
    has_room = s.outbox_bytes < MAX_TOLD_BYTES or s.event != NULL and _has_room_locked(s)
    pthread_mutex_unlock(&s.outbox_guard)
    if has_room:
        _send(s, op, 0, 0, 0, body, body_bytes, True)


cdef void event_pong(session *s, uint64_t tag) noexcept nogil:
    """Answer a PING, if the connection that brought it still stands."""
    _send(s, OP_PING, MESSAGE_REPLY, tag, 0, NULL, 0, False)


cdef bint flush_blocked() noexcept nogil:
    """Try again where a socket was full; whether one still is. A few milliseconds later is soon enough."""
    global _blocked
    cdef session *s
    cdef session *following
    pthread_mutex_lock(&_blocked_guard)
    s = _blocked
    _blocked = NULL
    pthread_mutex_unlock(&_blocked_guard)
    while s != NULL:
        following = s.next_blocked
        pthread_mutex_lock(&s.outbox_guard)
        s.outbox_blocked = False
        _flush_locked(s)
        pthread_mutex_unlock(&s.outbox_guard)
        session_unref(s)
        s = following
    return _blocked != NULL


# ---- what the client has ---------------------------------------------------------------------------------------------

cdef bint _has_room_locked(session *s) noexcept nogil:
    cdef bint has_room = s.outbox_bytes <= MAX_OUTBOX_BYTES
    if not has_room:
        s.event_overlooked = True
    return has_room


cdef bint event_has_room(session *s) noexcept nogil:
    """Whether something may be begun that says more. If not, and it is left, the client will ask for it again."""
    cdef bint has_room
    pthread_mutex_lock(&s.outbox_guard)
    has_room = _has_room_locked(s)
    pthread_mutex_unlock(&s.outbox_guard)
    return has_room


cdef void event_acknowledged(session *s, uint64_t number) noexcept nogil:
    """The client has all up to that number."""
    cdef connection *c
    pthread_mutex_lock(&s.outbox_guard)
    _drop_settled_locked(s, number)
    c = <connection *>s.event
    if s.event_overlooked and s.outbox_bytes <= ROOM_AGAIN_BYTES and c != NULL:
        s.event_overlooked = False
        c.ch.ops.cut(&c.ch, SHUT_RDWR)
    pthread_mutex_unlock(&s.outbox_guard)


cdef bint event_answered(session *s, uint16_t op, uint64_t tag) noexcept nogil:
    """Whether a request that comes again has its answer on the way."""
    cdef outgoing *message
    cdef header *head
    cdef bint found = False
    pthread_mutex_lock(&s.outbox_guard)
    message = s.outbox
    while message != NULL and not found:
        head = <header *>_bytes(message)
        found = head.tag == tag and head.op == op and head.flags & MESSAGE_REPLY
        message = message.next
    pthread_mutex_unlock(&s.outbox_guard)
    return found


cdef void event_attached(session *s) noexcept nogil:
    """Send all that is not acknowledged over the fresh event channel. Under outbox_guard."""
    cdef outgoing **at = &s.outbox
    cdef outgoing *message
    while at[0] != NULL:
        message = at[0]
        if message.number != 0:
            at = &message.next
            continue
        at[0] = message.next
        s.outbox_bytes -= message.size
        free(message)
    s.event_overlooked = False
    s.outbox_end = at
    s.unsent = s.outbox
    s.unsent_at = 0
    _flush_locked(s)
