"""The requests of event channels: what may have to wait, what cancels it, what confirms the answers.

Their answers, which come from whatever thread has them, are in events.pyx.
"""
from libc.errno cimport EPROTO, ESTALE
from libc.stdint cimport uint64_t

from qtfs_common.protocol cimport OP_CANCEL, OP_OPEN, OP_PING, OP_READ, OP_RELEASE, OP_SETLKW, OP_WRITE
from qtfs_common.transport cimport message
from qtfs_server.chores cimport chore_add
from qtfs_server.connection cimport connection
from qtfs_server.dispatch cimport execute
from qtfs_server.events cimport event_acknowledged, event_answered, event_attached, event_has_room, event_pong, \
    event_reply
from qtfs_server.includes.linux cimport pthread_mutex_lock, pthread_mutex_unlock, usleep
from qtfs_server.openers cimport abandon_openings, cancel_opening
from qtfs_server.operations.locks cimport abandon_waits, cancel_wait
from qtfs_server.request cimport DEFERRED, MALFORMED, request
from qtfs_server.session cimport session, session_unref
from qtfs_server.streams cimport abandon_stream_waits, end_streams, stream_cancel
from qtfs_server.worker cimport BUFFER_BYTES, worker

cdef enum:
    EXECUTING_POLL_US = 1000


cdef void open_events(connection *c) noexcept:
    """From now on other threads send on this connection."""
    cdef session *s = c.s
    pthread_mutex_lock(&s.guard)
    pthread_mutex_lock(&s.outbox_guard)
    s.event = c
    event_attached(s)
    pthread_mutex_unlock(&s.outbox_guard)
    pthread_mutex_unlock(&s.guard)


cdef void answer_wait(session *s, uint64_t tag, int error) noexcept nogil:
    """Reply to a SETLKW, from whatever thread."""
    event_reply(s, OP_SETLKW, tag, error, NULL, 0)


cdef int _execute_event(worker *w, session *s, const message *msg) noexcept nogil:
    """A request that may have to wait. 0 or -EPROTO."""
    cdef request r
    cdef int result
    if event_answered(s, msg.head.op, msg.head.tag):
        return 0                        # it comes again over a fresh connection, and so does its answer
    r.s = s
    r.at = &w.at
    r.me = &w.me
    r.scratch = w.scratch
    r.reply = w.outbox
    r.reply_room = BUFFER_BYTES
    r.repeated = r.resumed = False
    r.early = NULL
    r.before = NULL
    r.pipe = NULL
    r.may_wait = True
    result = execute(&r, &w.count, msg)
    if result == MALFORMED:
        return -EPROTO
    if result != DEFERRED:
        event_reply(s, msg.head.op, msg.head.tag, result, w.outbox, r.reply_bytes)
    return 0


cdef bint _enter_event(session *s, connection *c) noexcept nogil:
    """Wait until no other message is being executed. False: the session has a fresh event channel.

    What was left unread on the old one has come again there, and may have been answered and confirmed: then nobody
    would know any more that it comes late.
    """
    cdef bint busy = True
    cdef bint current = True
    while busy and current:
        pthread_mutex_lock(&s.guard)
        current = s.event == c
        busy = s.event_busy
        if current and not busy:
            s.event_busy = True
        pthread_mutex_unlock(&s.guard)
        if busy and current:
            usleep(EXECUTING_POLL_US)
    return current


cdef void _leave_event(session *s) noexcept nogil:
    pthread_mutex_lock(&s.guard)
    s.event_busy = False
    pthread_mutex_unlock(&s.guard)


cdef int serve_event(worker *w, connection *c, const message *msg) noexcept nogil:
    """One message of an event channel. 0, or -errno to close it."""
    cdef int result
    if not _enter_event(c.s, c):
        return -ESTALE
    result = _execute_event_message(w, c, msg)
    _leave_event(c.s)
    return result


cdef int _execute_event_message(worker *w, connection *c, const message *msg) noexcept nogil:
    """0 or -EPROTO."""
    event_acknowledged(c.s, msg.head.sequence)
    if not event_has_room(c.s):
        return 0                        # it comes again over a fresh connection
    if msg.head.op == OP_PING and msg.body_bytes == 0:
        event_pong(c.s, msg.head.tag)
    elif msg.head.op == OP_CANCEL and msg.body_bytes == 0:
        if not stream_cancel(c.s, msg.head.tag) and not cancel_opening(c.s, msg.head.tag):
            cancel_wait(c.s, msg.head.tag)
    elif msg.head.op in (OP_SETLKW, OP_OPEN, OP_READ, OP_WRITE, OP_RELEASE):
        return _execute_event(w, c.s, msg)
    else:
        return -EPROTO
    return 0


cdef void let_all_go(session *s) noexcept nogil:
    """The session is about to be freed."""
    abandon_waits(s)
    end_streams(s)


cdef void abandon_all(session *s) noexcept nogil:
    """The session has ended: whatever waits in its name ends without an answer."""
    abandon_waits(s)
    abandon_openings(s)
    abandon_stream_waits(s)


cdef void _abandon(void *s) noexcept nogil:
    abandon_all(<session *>s)
    session_unref(<session *>s)


cdef void abandon_later(session *s) noexcept nogil:
    """The same by another thread, as locks are given back by close(2), which may hang. A reference is taken over."""
    if not chore_add(_abandon, s):
        _abandon(s)
