"""FIFOs, devices and pseudo files: reads and writes that wait, and readiness for poll(2) on the client.

One thread watches them all through an edge-triggered epoll. An edge lets the waiting reads and writes of the stream try
again, and sends READY if the client's poll(2) or epoll(7) is waiting for it. A READY uses that up: the client's kernel
polls again, which arms the stream anew, so a busy stream costs one message for each look that somebody takes.

The first edge that epoll reports of a stream only says how it stood when it was added. Who polls was told that already
and must not hear it twice (EPOLLET), so the thread adds streams itself and swallows it.

Lock order: _all_guard, stream.guard, then what events.pyx and handles.pyx take. _post_guard alone.
Sources: epoll(7), pipe(7), fifo(7), poll(2).
"""
from libc.errno cimport EAGAIN, EINTR, EPERM, EIO, ENOMEM, ESTALE, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from qtfs_common.includes.polling cimport EFD_CLOEXEC, EFD_NONBLOCK, EPOLLET, EPOLLIN, EPOLLOUT, \
    EPOLLPRI, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, POLLERR, POLLPRI, epoll_create1, epoll_ctl, \
    epoll_event, epoll_wait, eventfd, eventfd_read, eventfd_write, poll, pollfd
from qtfs_common.protocol cimport MAX_PAYLOAD, OP_READ, OP_READY, OP_WRITE, count_reply
from qtfs_server.events cimport event_answered, event_bell, event_has_room, event_notify, event_reply, flush_blocked
from qtfs_server.handles cimport handle_unpin, set_stream_functions
from qtfs_server.includes.linux cimport F_GETFL, O_ACCMODE, O_RDWR, fcntl, pthread_cond_broadcast, pthread_cond_init, \
    pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, \
    pthread_mutex_unlock
from qtfs_server.openers cimport press_cancelled
from qtfs_server.session cimport HANDLE_STREAM, carried_write, handle, session, session_hold, session_unref
from qtfs_server.shares cimport SHARE_STREAM_BYTES, SHARE_STREAM_WAITS, share_give, share_take

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void *, size_t)
    ssize_t write(int, const void *, size_t)

cdef enum:
    EVENTS_AT_ONCE = 64
    NEWS = POLLPRI | POLLERR
    LOOKS = 3                           # at news that stay until they are read
    POLLABLE_EVENTS = 0x27df            # what poll(2) and epoll(7) can ask for, EPOLLEXCLUSIVE and the like apart
    WRITING_EVENTS = 0x304              # OUT, WRNORM, WRBAND
    READING_EVENTS = 0x24db             # all the others
    AGAIN_MS = 10                       # until the next try where a peer's socket was full or an open(2) does not end

cdef pthread_mutex_t _all_guard
cdef stream *_all = NULL
cdef stream *_graveyard = NULL          # closed; the thread may still hold an event of theirs
cdef pthread_mutex_t _post_guard
cdef pthread_cond_t _delivered
cdef stream *_post = NULL               # streams whose interest has grown
cdef bint _stopping = False
cdef int _epoll_fd = epoll_create1(EPOLL_CLOEXEC)
cdef int _bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
pthread_mutex_init(&_all_guard, NULL)
pthread_mutex_init(&_post_guard, NULL)
pthread_cond_init(&_delivered, NULL)


# ---- life ------------------------------------------------------------------------------------------------------------

cdef stream *_new_stream(session *s, handle *h) noexcept nogil:
    global _all
    cdef stream *st = <stream *>calloc(1, sizeof(stream))
    if st == NULL:
        return NULL
    pthread_mutex_init(&st.guard, NULL)
    st.s = s
    st.h = h
    st.fd = h.fd
    st.next = _all
    if _all != NULL:
        _all.previous = st
    _all = st
    h.stream = st
    return st


cdef stream *_stream_of(session *s, handle *h) noexcept nogil:
    """The stream of a pinned handle, made when first needed; NULL without memory."""
    cdef stream *st
    pthread_mutex_lock(&_all_guard)
    st = <stream *>h.stream
    if st == NULL:
        st = _new_stream(s, h)
    pthread_mutex_unlock(&_all_guard)
    return st


cdef void _end_waits(stream *st, bint somebody_listens) noexcept nogil:
    """End all waits, as cancelled ones if somebody listens to the answers."""
    cdef stream_wait *wait
    cdef stream_wait *first
    pthread_mutex_lock(&st.guard)
    wait = first = st.waits
    st.waits = NULL
    while wait != NULL and somebody_listens:
        _answer_cancelled(st, wait)
        wait = wait.next
    pthread_mutex_unlock(&st.guard)
    _release_answered(st.s, st.h, first)


cdef void _stream_released(void *ended) noexcept nogil:
    """RELEASE: nobody can be waiting any more, but for callers that were killed, whose client keeps their requests until
    it has an answer. The releaser has a pin of its own.
    """
    _end_waits(<stream *>ended, True)


cdef void _close_locked(stream *st) noexcept nogil:
    """Watch a stream no longer, and leave it to be freed. Under _all_guard."""
    global _all, _graveyard
    cdef epoll_event unused
    pthread_mutex_lock(&st.guard)
    if st.interest != 0:
        epoll_ctl(_epoll_fd, EPOLL_CTL_DEL, st.fd, &unused)
    st.fd = -1
    pthread_mutex_unlock(&st.guard)
    if st.previous != NULL:
        st.previous.next = st.next
    else:
        _all = st.next
    if st.next != NULL:
        st.next.previous = st.previous
    st.next = _graveyard
    _graveyard = st


cdef void _stream_closing(void *ended) noexcept nogil:
    """The descriptor is about to be closed, and nobody waits."""
    pthread_mutex_lock(&_all_guard)
    _close_locked(<stream *>ended)
    pthread_mutex_unlock(&_all_guard)


set_stream_functions(_stream_released, _stream_closing)


cdef void _bury() noexcept nogil:
    """Free closed streams. Only the thread does, between two looks at the epoll: it holds no event of theirs then."""
    global _graveyard
    cdef stream *st
    cdef stream *following
    pthread_mutex_lock(&_all_guard)
    st = _graveyard
    _graveyard = NULL
    pthread_mutex_unlock(&_all_guard)
    while st != NULL:
        following = st.next
        pthread_mutex_destroy(&st.guard)
        free(st)
        st = following


# ---- waits ---------------------------------------------------------------------------------------------------------

cdef bint _try_read_locked(stream *st, const stream_wait *wait, uint8_t *buffer) noexcept nogil:
    """Read for one who waits; False: go on waiting."""
    cdef ssize_t got
    if not event_has_room(st.s):
        return False                    # until it is asked again
    got = read(st.fd, buffer, min(wait.size, <uint32_t>MAX_PAYLOAD))
    if got < 0 and errno in (EAGAIN, EINTR):
        return False
    event_reply(st.s, OP_READ, wait.tag, -errno if got < 0 else 0, buffer, max(got, 0))
    return True


cdef void _answer_write(stream *st, const stream_wait *wait, int error) noexcept nogil:
    """What was written counts, write(2); an error without it is reported."""
    cdef count_reply out
    out.count = wait.done
    event_reply(st.s, OP_WRITE, wait.tag, 0 if wait.done > 0 else error, &out, sizeof(out))


cdef void _answer_cancelled(stream *st, const stream_wait *wait) noexcept nogil:
    if wait.op == OP_WRITE:
        _answer_write(st, wait, -EINTR)
    else:
        event_reply(st.s, OP_READ, wait.tag, -EINTR, NULL, 0)


cdef bint _try_write_locked(stream *st, stream_wait *wait) noexcept nogil:
    """Write for one who waits; False: go on waiting."""
    cdef const uint8_t *data = <const uint8_t *>(wait + 1)
    cdef ssize_t put
    while wait.done < wait.size:
        put = write(st.fd, data + wait.done, wait.size - wait.done)
        if put < 0 and errno in (EAGAIN, EINTR):
            return False
        if put <= 0:
            _answer_write(st, wait, -errno if put < 0 else -EIO)
            return True
        wait.done += <uint32_t>put
    _answer_write(st, wait, 0)
    return True


cdef stream_wait *_serve_waits_locked(stream *st, uint8_t *buffer) noexcept nogil:
    """Let those who wait try again, readers and writers each in their order. Returns those that were answered."""
    cdef stream_wait **at = &st.waits
    cdef stream_wait *wait
    cdef stream_wait *answered = NULL
    cdef bint reads_wait = False, writes_wait = False, done
    while at[0] != NULL and not (reads_wait and writes_wait):
        wait = at[0]
        if wait.op == OP_READ:
            done = not reads_wait and _try_read_locked(st, wait, buffer)
            reads_wait = reads_wait or not done
        else:
            done = not writes_wait and _try_write_locked(st, wait)
            writes_wait = writes_wait or not done
        if done:
            at[0] = wait.next
            wait.next = answered
            answered = wait
        else:
            at = &wait.next
    return answered


cdef bint _has_share(session *s, uint16_t op, uint32_t size) noexcept nogil:
    """Whether one more of the session may wait; then that is counted."""
    if not share_take(s, SHARE_STREAM_WAITS, 1):
        return False
    if op != OP_WRITE or share_take(s, SHARE_STREAM_BYTES, size):
        return True
    share_give(s, SHARE_STREAM_WAITS, 1)
    return False


cdef void _free_wait(session *s, stream_wait *wait, uint16_t op, uint32_t size) noexcept nogil:
    """The opposite of _has_share and _new_wait, which may have failed."""
    free(wait)
    share_give(s, SHARE_STREAM_WAITS, 1)
    if op == OP_WRITE:
        share_give(s, SHARE_STREAM_BYTES, size)


cdef void _release_answered(session *s, handle *h, stream_wait *wait) noexcept nogil:
    """Let go of waits that have ended; the last pin takes handle and stream along."""
    cdef stream_wait *following
    while wait != NULL:
        following = wait.next
        _free_wait(s, wait, wait.op, wait.size)
        handle_unpin(s, h)
        wait = following


cdef stream_wait **_find_wait_locked(stream *st, uint64_t tag) noexcept nogil:
    cdef stream_wait **at = &st.waits
    while at[0] != NULL and at[0].tag != tag:
        at = &at[0].next
    return at


cdef uint32_t _widened(const stream *st, uint32_t events) noexcept nogil:
    """Events to watch for so that there will hardly ever be more: adding some makes the epoll report how the file stands."""
    cdef uint32_t wide = events & POLLABLE_EVENTS | <uint32_t>EPOLLPRI
    if (fcntl(st.fd, F_GETFL) & O_ACCMODE) != O_RDWR:
        return POLLABLE_EVENTS          # it can do nothing in the other direction
    if wide & WRITING_EVENTS:
        wide |= WRITING_EVENTS
    return wide | READING_EVENTS


cdef int _watch_locked(stream *st, uint32_t events) noexcept nogil:
    """Add events to what the epoll watches for. 0 or -errno; -EPERM: it cannot be polled."""
    cdef epoll_event event
    cdef int how = EPOLL_CTL_ADD if st.interest == 0 else EPOLL_CTL_MOD
    if st.interest != 0 and events & ~st.interest == 0:
        return 0
    event.events = st.interest | events | EPOLLET
    event.data.ptr = st
    if epoll_ctl(_epoll_fd, how, st.fd, &event) < 0:
        return -errno
    st.interest |= events | <uint32_t>EPOLLET
    return 0


cdef stream_wait *_new_wait(uint16_t op, uint64_t tag, const uint8_t *data, uint32_t size) noexcept nogil:
    cdef stream_wait *wait = <stream_wait *>malloc(sizeof(stream_wait) + (size if op == OP_WRITE else 0))
    if wait == NULL:
        return NULL
    wait.next = NULL
    wait.op = op
    wait.tag = tag
    wait.size = size
    wait.done = 0
    if op == OP_WRITE:
        memcpy(wait + 1, data, size)
    return wait


cdef list writes_begun(session *s):
    """(tag, bytes done) of the writes of a session that wait and have done something. No thread serves streams."""
    cdef stream *st = _all
    cdef stream_wait *wait
    found = []
    while st != NULL:
        wait = st.waits if st.s == s else NULL
        while wait != NULL:
            if wait.done > 0:
                found.append((wait.tag, wait.done))
            wait = wait.next
        st = st.next
    return found


cdef int carry_write(session *s, uint64_t tag, uint32_t done) except -1:
    """When that WRITE comes again, so many bytes of it are done."""
    cdef carried_write *write = <carried_write *>malloc(sizeof(carried_write))
    if write == NULL:
        raise MemoryError
    write.tag = tag
    write.done = done
    write.next = s.carried
    s.carried = write
    return 0


cdef uint32_t _take_carried(session *s, uint64_t tag) noexcept nogil:
    """How much of a WRITE an engine before us has done."""
    cdef carried_write **at
    cdef carried_write *found
    cdef uint32_t done = 0
    pthread_mutex_lock(&_all_guard)
    at = &s.carried
    while at[0] != NULL and at[0].tag != tag:
        at = &at[0].next
    found = at[0]
    if found != NULL:
        done = found.done
        at[0] = found.next
    pthread_mutex_unlock(&_all_guard)
    free(found)
    return done


cdef int stream_wait_for(session *s, handle *h, uint16_t op, uint64_t tag, const uint8_t *data, uint32_t size,
                         uint8_t *buffer) noexcept nogil:
    """Answer a READ or WRITE of the event channel once it can be done. The handle's pin is taken over unless it fails.

    0; -EAGAIN: there is no way to wait for this file, or too many wait already; -ENOMEM. A tag that waits already, or
    has just been answered, is the same request once more. `buffer`: MAX_PAYLOAD bytes to work in.
    """
    cdef stream *st = _stream_of(s, h)
    cdef stream_wait *wait
    cdef stream_wait *answered
    cdef stream_wait **at
    cdef int error
    if not _has_share(s, op, size):
        return -EAGAIN
    wait = _new_wait(op, tag, data, size)
    if st == NULL or wait == NULL:
        _free_wait(s, wait, op, size)
        return -ENOMEM
    if op == OP_WRITE and s.carried != NULL:
        wait.done = min(_take_carried(s, tag), size)
    pthread_mutex_lock(&st.guard)
    error = _watch_locked(st, _widened(st, <uint32_t>EPOLLIN if op == OP_READ else <uint32_t>EPOLLOUT))
    if error < 0:
        pthread_mutex_unlock(&st.guard)
        _free_wait(s, wait, op, size)
        return -EAGAIN if error == -EPERM else error
    at = _find_wait_locked(st, tag)
    # Under the guard, which whoever answers holds: otherwise it could be answered between the two looks, and run twice.
    if at[0] == NULL and not event_answered(s, op, tag):
        at[0] = wait
        wait = NULL
    answered = _serve_waits_locked(st, buffer)      # its edge may have come already, and found no room for the answer
    pthread_mutex_unlock(&st.guard)
    _release_answered(s, h, answered)
    _release_answered(s, h, wait)
    return 0


cdef stream *_pinned_stream(session *s, uint64_t tag, bint any_tag) noexcept nogil:
    """A stream of the session on which that request (or any at all) waits, its handle pinned; NULL: there is none."""
    cdef stream *st
    cdef stream *found = NULL
    pthread_mutex_lock(&_all_guard)
    st = _all
    while st != NULL and found == NULL:
        if st.s == s:
            pthread_mutex_lock(&st.guard)
            if st.waits != NULL and (any_tag or _find_wait_locked(st, tag)[0] != NULL):
                found = st
                pthread_mutex_lock(&s.guard)
                st.h.pins += 1
                pthread_mutex_unlock(&s.guard)
            pthread_mutex_unlock(&st.guard)
        st = st.next
    pthread_mutex_unlock(&_all_guard)
    return found


cdef bint stream_cancel(session *s, uint64_t tag) noexcept nogil:
    """CANCEL: answer one who waits with EINTR, or with what it has written. False: nobody waits under this tag."""
    cdef stream *st = _pinned_stream(s, tag, False)
    cdef stream_wait **at
    cdef stream_wait *wait
    if st == NULL:
        return False
    pthread_mutex_lock(&st.guard)
    at = _find_wait_locked(st, tag)
    wait = at[0]
    if wait != NULL:
        at[0] = wait.next
        wait.next = NULL
        _answer_cancelled(st, wait)
    pthread_mutex_unlock(&st.guard)
    _release_answered(s, st.h, wait)
    handle_unpin(s, st.h)
    return True


cdef void abandon_stream_waits(session *s) noexcept nogil:
    """The session ends: its waits end without an answer."""
    cdef stream *st = _pinned_stream(s, 0, True)
    while st != NULL:
        _end_waits(st, False)
        handle_unpin(s, st.h)
        st = _pinned_stream(s, 0, True)


cdef void end_streams(session *s) noexcept nogil:
    """The session is about to be freed, and nobody else uses it."""
    cdef stream *st
    cdef stream *following
    abandon_stream_waits(s)
    pthread_mutex_lock(&_all_guard)
    st = _all
    while st != NULL:
        following = st.next
        if st.s == s:
            st.h.stream = NULL
            _close_locked(st)
        st = following
    pthread_mutex_unlock(&_all_guard)


# ---- readiness -------------------------------------------------------------------------------------------------------

cdef int _grow_interest(stream *st, uint32_t events) noexcept nogil:
    """Have the thread add events to a stream of a pinned handle, and swallow the edge that only says how it stands."""
    global _post
    cdef int error
    pthread_mutex_lock(&_post_guard)
    while st.posted and not _stopping:
        pthread_cond_wait(&_delivered, &_post_guard)
    st.posted = True
    st.wanted = events
    st.next_posted = _post
    _post = st
    eventfd_write(_bell, 1)
    while st.posted and not _stopping:
        pthread_cond_wait(&_delivered, &_post_guard)
    error = st.error
    pthread_mutex_unlock(&_post_guard)
    return error


cdef void _latch_locked(stream *st, uint32_t events) noexcept nogil:
    """Remember news that a look takes away: /proc/self/mounts shows POLLPRI once, and the epoll has had it. In sysfs and
    cgroups it stays until the file is read.
    """
    cdef pollfd fds
    cdef int left = LOOKS
    cdef uint32_t seen = events & NEWS
    fds.fd = st.fd
    fds.events = POLLPRI
    while left > 0:
        left -= 1
        fds.revents = 0
        if st.h.flags & HANDLE_STREAM or poll(&fds, 1, 0) < 0:
            return
        if fds.revents & NEWS == 0:
            st.latched |= seen
            return
        seen |= fds.revents & NEWS


cdef uint32_t stream_take_news(handle *h) noexcept nogil:
    """POLLPRI and POLLERR that came since the last POLL and cannot be seen any more, of a pinned handle."""
    cdef stream *st = <stream *>h.stream
    cdef uint32_t latched = 0
    if st != NULL:
        pthread_mutex_lock(&st.guard)
        latched = st.latched
        st.latched = 0
        pthread_mutex_unlock(&st.guard)
    return latched


cdef int stream_arm(session *s, handle *h, uint64_t notify, uint32_t events) noexcept nogil:
    """Send READY with the tag `notify` at the next change of a pinned handle's file. 0 or -errno; -EPERM: it has none."""
    cdef stream *st = _stream_of(s, h)
    cdef uint32_t missing
    cdef int error = 0
    if st == NULL or not event_has_room(s):
        return -ENOMEM
    pthread_mutex_lock(&st.guard)
    # Without any event asked for, errors and hang-ups are still of interest.
    missing = _widened(st, events) & ~st.interest
    if missing != 0:
        _latch_locked(st, 0)            # adding it to the epoll is a look, too
    pthread_mutex_unlock(&st.guard)
    if missing != 0:
        error = _grow_interest(st, missing)
    if error < 0:
        return error
    pthread_mutex_lock(&st.guard)
    st.notify = h.notify = notify
    st.armed = True
    pthread_mutex_unlock(&st.guard)
    return 0


cdef void _notify_locked(stream *st) noexcept nogil:
    st.armed = False
    st.h.notify = 0
    event_notify(st.s, OP_READY, st.notify)


# ---- the thread --------------------------------------------------------------------------------------------------------

cdef void _on_edge(stream *st, uint32_t events, uint8_t *buffer) noexcept nogil:
    cdef session *s = st.s
    cdef handle *h = st.h
    cdef stream_wait *answered = NULL
    pthread_mutex_lock(&st.guard)
    if st.fd < 0 or not session_hold(s):
        pthread_mutex_unlock(&st.guard)
        return
    answered = _serve_waits_locked(st, buffer)
    _latch_locked(st, events)
    if st.armed:
        _notify_locked(st)
    pthread_mutex_unlock(&st.guard)
    _release_answered(s, h, answered)
    session_unref(s)


cdef int _look(int timeout_ms, uint8_t *buffer) noexcept nogil:
    """Serve what the epoll has; whether there may be more at once."""
    cdef epoll_event events[EVENTS_AT_ONCE]
    cdef uint64_t ignored = 0
    cdef int i, count = epoll_wait(_epoll_fd, events, EVENTS_AT_ONCE, timeout_ms)
    for i in range(count):
        if events[i].data.ptr == NULL:
            eventfd_read(_bell, &ignored)
            eventfd_read(event_bell(), &ignored)
        else:
            _on_edge(<stream *>events[i].data.ptr, events[i].events, buffer)
    return count == EVENTS_AT_ONCE


cdef stream *_take_post() noexcept nogil:
    global _post
    cdef stream *st
    pthread_mutex_lock(&_post_guard)
    st = _post
    _post = NULL
    pthread_mutex_unlock(&_post_guard)
    return st


cdef void _deliver(stream *post, uint8_t *buffer) noexcept nogil:
    """Watch more closely what _grow_interest asked for. Those who did so hold the streams."""
    cdef stream *st = post
    while st != NULL:
        pthread_mutex_lock(&st.guard)
        st.armed_before = st.armed
        st.armed = False
        st.error = _watch_locked(st, st.wanted)
        pthread_mutex_unlock(&st.guard)
        st = st.next_posted
    while _look(0, buffer):
        pass
    st = post
    while st != NULL:
        pthread_mutex_lock(&st.guard)
        if st.armed_before:
            _notify_locked(st)          # somebody else polls it too, and may just have missed an edge
        pthread_mutex_unlock(&st.guard)
        st = st.next_posted
    pthread_mutex_lock(&_post_guard)
    while post != NULL:
        st = post.next_posted
        post.posted = False
        post = st
    pthread_cond_broadcast(&_delivered)
    pthread_mutex_unlock(&_post_guard)


cdef void _listen(int fd) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.ptr = NULL
    epoll_ctl(_epoll_fd, EPOLL_CTL_ADD, fd, &event)


cdef void watch_streams() noexcept nogil:
    """The thread, until stop_watching_streams."""
    cdef uint8_t *buffer = <uint8_t *>malloc(MAX_PAYLOAD)
    cdef stream *post
    cdef bint again = False
    if buffer == NULL:
        return
    _listen(_bell)
    _listen(event_bell())
    while not _stopping:
        _bury()
        _look(AGAIN_MS if again else -1, buffer)
        post = _take_post()
        if post != NULL:
            _deliver(post, buffer)
        again = flush_blocked()
        again = press_cancelled() or again
    free(buffer)


cdef void stop_watching_streams() noexcept nogil:
    """End the thread."""
    global _stopping
    pthread_mutex_lock(&_post_guard)
    _stopping = True
    pthread_cond_broadcast(&_delivered)
    pthread_mutex_unlock(&_post_guard)
    eventfd_write(_bell, 1)


cdef void go_on_watching_streams() noexcept nogil:
    """Let there be such a thread again."""
    global _stopping
    _stopping = False
