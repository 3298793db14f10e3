"""File locks, shared with the server's own processes.

A flock(2) lock belongs to an open file, and so does the client's: it is taken on the handle's descriptor. A POSIX lock
belongs to an owner (a client process) and a file, however often that process opened it: each (node, owner) has an open
file description of its own, on which the lock is an F_OFD_SETLK. Both conflict with local locks as they should.

Linux has no way to wait for a lock without a thread, so one thread for all waits tries them again: at once when a lock
is given back through this engine, else after 1 ms, growing to 20 ms, for those that local processes hold.

Lock order: _waiting_guard, session.lock_guard, session.guard. A lock is announced as given back, and a wait answered,
under none of them.
Sources: fcntl(2) "Open file description locks", flock(2), <linux/fuse.h> (struct fuse_lk_in).
"""
from libc.errno cimport EACCES, EAGAIN, EINTR, EINVAL, EMFILE, ENOLCK, ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_REALTIME, clock_gettime

from qtfs_common.protocol cimport LOCK_FLOCK, lock_reply, lock_request
from qtfs_server.includes.linux cimport AT_FDCWD, F_OFD_GETLK, F_OFD_SETLK, F_RDLCK, F_UNLCK, F_WRLCK, LOCK_EX, \
    LOCK_NB, LOCK_SH, LOCK_UN, O_CLOEXEC, O_NOCTTY, O_RDONLY, O_RDWR, atomic_add_int, close, dup, fcntl, flock, \
    flock_t, openat, pthread_cond_broadcast, pthread_cond_init, pthread_cond_signal, pthread_cond_t, \
    pthread_cond_timedwait, pthread_cond_wait, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, timespec
from qtfs_server.policy cimport ALLOW_OPEN
from qtfs_server.request cimport DEFERRED, MALFORMED, request
from qtfs_server.descriptors cimport close_counted, descriptor_opened, proc_path
from qtfs_server.handles cimport handle_pin, handle_unpin
from qtfs_server.nodes cimport node_keep, node_let_go
from qtfs_server.session cimport HANDLE_ENDED, handle, lock_owner, node, session

cdef extern from "<time.h>" nogil:
    int real_clock "clock_gettime"(int, timespec *)

cdef enum:
    SHORTEST_RETRY_US = 1000
    LONGEST_RETRY_US = 20000
    END_OF_FILE = 0x7fffffffffffffff    # OFFSET_MAX
    MAX_WAITS = 65536                   # of all sessions

cdef struct wait:                       # one SETLKW that could not be granted yet
    session *s
    handle *h                           # pinned
    lock_request what
    uint64_t tag
    wait *next

cdef pthread_mutex_t _waiting_guard
cdef pthread_cond_t _something_changed
cdef pthread_cond_t _answered
cdef wait *_waits = NULL
cdef uint32_t _wait_count = 0
cdef bint _stopping = False
cdef bint _given_back = False           # a lock was given back since the last round
cdef session *_answering = NULL         # it may not end now
cdef answer_function _answer = NULL
pthread_mutex_init(&_waiting_guard, NULL)
pthread_cond_init(&_something_changed, NULL)
pthread_cond_init(&_answered, NULL)


# ---- owners ------------------------------------------------------------------------------------------------------

cdef lock_owner **_find_owner(session *s, node *n, uint64_t owner) noexcept nogil:
    cdef lock_owner **at = &s.owners
    while at[0] != NULL and (at[0].node != n or at[0].owner != owner):
        at = &at[0].next
    return at


cdef int _owner_fd(session *s, handle *h, uint64_t owner) noexcept nogil:
    """The open file description that stands for an owner on the handle's node. Under lock_guard. A descriptor or -errno."""
    cdef lock_owner *known = _find_owner(s, h.node, owner)[0]
    cdef char link[32]
    cdef int fd
    if known != NULL:
        return known.fd
    proc_path(link, h.fd)
    fd = openat(AT_FDCWD, link, O_RDWR | O_CLOEXEC | O_NOCTTY)
    if fd < 0:
        fd = openat(AT_FDCWD, link, O_RDONLY | O_CLOEXEC | O_NOCTTY)
    return _keep_owner(s, h.node, owner, fd) if fd >= 0 else -errno


cdef int _keep_owner(session *s, node *n, uint64_t owner, int fd) noexcept nogil:
    cdef lock_owner *fresh = <lock_owner *>calloc(1, sizeof(lock_owner))
    if fresh == NULL:
        close(fd)
        return -ENOMEM
    fresh.owner = owner
    fresh.node = n
    fresh.fd = fd
    fresh.next = s.owners
    s.owners = fresh
    node_keep(s, n)
    descriptor_opened()
    return fd


cdef void drop_locks(session *s, node *n, uint64_t owner) noexcept nogil:
    """Give back all POSIX locks of an owner on a node: a close(2) of any of its descriptors does that."""
    cdef lock_owner **at
    cdef lock_owner *gone
    pthread_mutex_lock(&s.lock_guard)
    at = _find_owner(s, n, owner)
    gone = at[0]
    if gone != NULL:
        at[0] = gone.next
        close_counted(gone.fd)
    pthread_mutex_unlock(&s.lock_guard)
    _cancel_waits_of(s, n, owner)
    if gone != NULL:
        node_let_go(s, n)
        free(gone)
        lock_given_back()


# ---- operations --------------------------------------------------------------------------------------------------

cdef int _lock_range(const lock_request *body, flock_t *out) noexcept nogil:
    if body.type > 2 or body.start > <uint64_t>END_OF_FILE or body.end > <uint64_t>END_OF_FILE or body.end < body.start:
        return -EINVAL
    out.l_type = F_RDLCK if body.type == 0 else (F_WRLCK if body.type == 1 else F_UNLCK)
    out.l_whence = 0
    out.l_start = body.start
    out.l_len = 0 if body.end == <uint64_t>END_OF_FILE else <int64_t>(body.end - body.start + 1)
    out.l_pid = 0
    return 0


cdef int _try_flock(handle *h, const lock_request *body) noexcept nogil:
    cdef int operation = LOCK_SH if body.type == 0 else (LOCK_EX if body.type == 1 else LOCK_UN)
    if flock(h.fd, operation | LOCK_NB) < 0:
        return -errno
    if operation == LOCK_UN:
        lock_given_back()
    return 0


cdef bint _is_everything(const lock_request *body) noexcept nogil:
    return body.start == 0 and body.end == <uint64_t>END_OF_FILE


cdef int _set_lock(session *s, handle *h, uint64_t owner, flock_t *range) noexcept nogil:
    """fcntl(2) in the name of an owner; the lock guard keeps its descriptor from being closed meanwhile."""
    cdef int fd, error = 0
    pthread_mutex_lock(&s.lock_guard)
    fd = _owner_fd(s, h, owner)
    if fd < 0:
        error = -ENOLCK if fd == -EMFILE else fd
    elif fcntl(fd, F_OFD_SETLK, range) < 0:
        error = -EAGAIN if errno == EACCES else -errno      # fcntl(2) allows both for a lock in the way
    pthread_mutex_unlock(&s.lock_guard)
    return error


cdef int _try_lock(session *s, handle *h, const lock_request *body) noexcept nogil:
    """Lock or unlock without waiting. 0, -EAGAIN, or another -errno."""
    cdef flock_t range
    cdef int error
    if body.flags & LOCK_FLOCK:
        return _try_flock(h, body)
    error = _lock_range(body, &range)
    if error < 0:
        return error
    if body.type == 2 and _is_everything(body):
        drop_locks(s, h.node, body.owner)
        return 0
    error = _set_lock(s, h, body.owner, &range)
    if error == 0 and body.type == 2:
        lock_given_back()
    return error


cdef int _begin(request *r, handle **h) noexcept nogil:
    cdef int error
    if r.body_bytes != sizeof(lock_request) or (<lock_request *>r.body).type > 2:
        return MALFORMED
    error = handle_pin(r.s, (<lock_request *>r.body).handle, h)
    return error


cdef int op_setlk(request *r) noexcept nogil:
    """SETLK: lock_request → nothing; EAGAIN if somebody else holds it."""
    cdef handle *h = NULL
    cdef int error = _begin(r, &h)
    if error < 0:
        return error
    error = _try_lock(r.s, h, <lock_request *>r.body)
    handle_unpin(r.s, h)
    return error


cdef int op_getlk(request *r) noexcept nogil:
    """GETLK: lock_request → lock_reply: the first lock in the way, or F_UNLCK."""
    cdef lock_request *body = <lock_request *>r.body
    cdef lock_reply *out = <lock_reply *>r.reply
    cdef flock_t range
    cdef handle *h = NULL
    cdef int fd, error = _begin(r, &h)
    if error < 0:
        return error
    error = _lock_range(body, &range)
    pthread_mutex_lock(&r.s.lock_guard)
    fd = _owner_fd(r.s, h, body.owner) if error == 0 else error
    if fd < 0:
        error = fd
    elif fcntl(fd, F_OFD_GETLK, &range) < 0:
        error = -errno
    pthread_mutex_unlock(&r.s.lock_guard)
    handle_unpin(r.s, h)
    if error < 0:
        return error
    out.type = 0 if range.l_type == F_RDLCK else (1 if range.l_type == F_WRLCK else 2)
    out.start = range.l_start
    out.end = <uint64_t>END_OF_FILE if range.l_len == 0 else <uint64_t>(range.l_start + range.l_len - 1)
    out.pid = range.l_pid if range.l_pid > 0 else 0
    r.reply_bytes = sizeof(lock_reply)
    return 0


# ---- waiting -----------------------------------------------------------------------------------------------------

cdef void set_answer(answer_function answer) noexcept nogil:
    """Set who sends the replies of waits."""
    global _answer
    _answer = answer


cdef void lock_given_back() noexcept nogil:
    """Somebody who waits may be lucky now."""
    global _given_back
    if _wait_count > 0:
        pthread_mutex_lock(&_waiting_guard)
        _given_back = True
        pthread_cond_signal(&_something_changed)
        pthread_mutex_unlock(&_waiting_guard)


cdef wait **_find_wait_locked(session *s, uint64_t tag) noexcept nogil:
    cdef wait **at = &_waits
    while at[0] != NULL and (at[0].s != s or at[0].tag != tag):
        at = &at[0].next
    return at


cdef bint _queue(wait *w) noexcept nogil:
    """Put a wait into the list; False if it is there already: the client asked again over a fresh event channel."""
    global _waits, _wait_count
    cdef bint fresh
    pthread_mutex_lock(&_waiting_guard)
    fresh = _find_wait_locked(w.s, w.tag)[0] == NULL
    if fresh:
        w.next = _waits
        _waits = w
        _wait_count += 1
        pthread_cond_signal(&_something_changed)
    pthread_mutex_unlock(&_waiting_guard)
    return fresh


cdef int op_setlkw(request *r) noexcept nogil:
    """SETLKW, on the event channel: lock_request → nothing, once the lock is held; EINTR after a CANCEL."""
    cdef wait *w
    cdef handle *h = NULL
    cdef int error = _begin(r, &h)
    if error < 0:
        return error
    error = _try_lock(r.s, h, <lock_request *>r.body)
    if error != -EAGAIN:
        handle_unpin(r.s, h)
        return error
    w = <wait *>calloc(1, sizeof(wait)) if _wait_count < MAX_WAITS else NULL
    if w == NULL:
        handle_unpin(r.s, h)
        return -ENOLCK
    w.s = r.s
    w.h = h
    w.what = (<lock_request *>r.body)[0]
    w.tag = r.head.tag
    if not _queue(w):
        _drop(w)
    return DEFERRED


cdef wait *_take_locked(wait **at) noexcept nogil:
    global _wait_count
    cdef wait *taken = at[0]
    at[0] = taken.next
    _wait_count -= 1
    return taken


cdef void _drop(wait *w) noexcept nogil:
    handle_unpin(w.s, w.h)
    free(w)


cdef void cancel_wait(session *s, uint64_t tag) noexcept nogil:
    """CANCEL: the waiter was interrupted. A wait that has ended meanwhile was answered already."""
    cdef wait **at
    cdef wait *found = NULL
    pthread_mutex_lock(&_waiting_guard)
    at = _find_wait_locked(s, tag)
    if at[0] != NULL:
        found = _take_locked(at)
    pthread_mutex_unlock(&_waiting_guard)
    if found != NULL:
        _answer(s, tag, -EINTR)
        _drop(found)


cdef void _cancel_waits_of(session *s, node *n, uint64_t owner) noexcept nogil:
    """The owner closed the file: what it still waits for must not be granted to it later."""
    cdef wait **at
    if _wait_count == 0:
        return
    pthread_mutex_lock(&_waiting_guard)
    at = &_waits
    while at[0] != NULL:
        if at[0].s == s and at[0].h.node == n and at[0].what.owner == owner and not at[0].what.flags & LOCK_FLOCK:
            _drop(_take_locked(at))
        else:
            at = &at[0].next
    pthread_mutex_unlock(&_waiting_guard)


cdef void abandon_waits(session *s) noexcept nogil:
    """The session ends: its waits end without an answer."""
    cdef wait **at
    pthread_mutex_lock(&_waiting_guard)
    while _answering == s:
        pthread_cond_wait(&_answered, &_waiting_guard)
    at = &_waits
    while at[0] != NULL:
        if at[0].s == s:
            _drop(_take_locked(at))
        else:
            at = &at[0].next
    pthread_mutex_unlock(&_waiting_guard)


cdef int _try_wait(wait *w) noexcept nogil:
    return -EINTR if w.h.flags & HANDLE_ENDED else _try_lock(w.s, w.h, &w.what)


cdef wait **_next_ended_locked(int *error) noexcept nogil:
    """The first wait that is granted now, or has failed for good."""
    cdef wait **at = &_waits
    while at[0] != NULL:
        error[0] = _try_wait(at[0])
        if error[0] != -EAGAIN:
            break
        at = &at[0].next
    return at


cdef bint _try_all_locked() noexcept nogil:
    """Try all waits, answer those that end; whether there was any. The guard is let go meanwhile."""
    global _answering
    cdef wait **at
    cdef wait *ended
    cdef int error = 0
    cdef bint progress = False
    at = _next_ended_locked(&error)
    while at[0] != NULL:
        progress = True
        ended = _take_locked(at)
        _answering = ended.s
        pthread_mutex_unlock(&_waiting_guard)
        _answer(ended.s, ended.tag, error)      # a peer that does not read delays nobody who wants the guard
        _drop(ended)
        pthread_mutex_lock(&_waiting_guard)
        _answering = NULL
        pthread_cond_broadcast(&_answered)
        at = _next_ended_locked(&error)
    return progress


cdef void _pause_locked(int64_t delay_us) noexcept nogil:
    """Sleep until the delay has passed or a lock was given back; without waits, until there is one."""
    global _given_back
    cdef timespec until
    real_clock(CLOCK_REALTIME, &until)
    until.tv_nsec += (delay_us if _waits != NULL else 1000000) * 1000
    until.tv_sec += until.tv_nsec // 1000000000
    until.tv_nsec = until.tv_nsec % 1000000000
    if not _given_back:
        pthread_cond_timedwait(&_something_changed, &_waiting_guard, &until)
    _given_back = False


cdef void wait_for_locks() noexcept nogil:
    """The thread that tries waits again, until stop_waiting_for_locks."""
    cdef int64_t delay_us = SHORTEST_RETRY_US
    pthread_mutex_lock(&_waiting_guard)
    while not _stopping:
        _pause_locked(delay_us)
        if _try_all_locked():
            delay_us = SHORTEST_RETRY_US
        else:
            delay_us = min(delay_us * 2, <int64_t>LONGEST_RETRY_US)
    pthread_mutex_unlock(&_waiting_guard)


cdef void stop_waiting_for_locks() noexcept nogil:
    """End the thread."""
    global _stopping
    pthread_mutex_lock(&_waiting_guard)
    _stopping = True
    pthread_cond_signal(&_something_changed)
    pthread_mutex_unlock(&_waiting_guard)
