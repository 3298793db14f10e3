"""File locks, shared with the server's own processes.

A flock(2) lock belongs to an open file, and so does the client's: it is taken on the handle's descriptor. A POSIX lock
belongs to an owner (a client process) and a file, however often that process opened it: each owner has an open file
description of its own for a file, on which its locks are F_OFD_SETLK. Both conflict with local locks as they should.
FUSE does not tell an F_OFD_SETLK from an F_SETLK: the open file is the owner, and no FLUSH ends its locks but RELEASE.

What our owners hold is noted (locked_files). A wait that one of them is in the way of is tried when a lock of the file
is given back, by whoever gives it back, in the order of coming. If it is a process of the server that is in the way,
and for flock(2), a thread polls: Linux has no way to wait for a lock without a thread. What was polled in vain for a
while, so that local processes do not pass it by for ever, one of a few threads queues for in the kernel: on a
descriptor of its own, which becomes the owner's, or is closed and the waits tried at once.

Lock order: locked_files. A wait is answered under no lock.
Sources: fcntl(2) "Open file description locks", flock(2), <linux/fuse.h> (struct fuse_lk_in).
"""
from libc.errno cimport EACCES, EAGAIN, EINTR, EINVAL, EMFILE, ENOLCK, ESTALE, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset
from posix.time cimport CLOCK_REALTIME

from qtfs_common.protocol cimport LOCK_FLOCK, lock_reply, lock_request
from qtfs_common.transport cimport now_us
from qtfs_server.includes.linux cimport AT_FDCWD, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW, F_RDLCK, F_UNLCK, F_WRLCK, LOCK_EX, \
    LOCK_NB, LOCK_SH, LOCK_UN, O_CLOEXEC, O_NOCTTY, O_RDONLY, O_RDWR, close, fcntl, flock, flock_t, openat, \
    pthread_cond_broadcast, pthread_cond_init, pthread_cond_signal, pthread_cond_t, pthread_cond_timedwait, \
    pthread_cond_wait, pthread_kill, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, \
    pthread_self, pthread_t, timespec, usleep
from qtfs_server.includes.threads cimport start_thread
from qtfs_server.request cimport DEFERRED, MALFORMED, request
from qtfs_server.descriptors cimport proc_path, within_share
from qtfs_server.handles cimport handle_pin, handle_unpin
from qtfs_server.lock_ranges cimport EXCLUSIVE, SHARED, UNLOCKED, ranges_reserve
from qtfs_server.locked_files cimport file_awaited, file_due, file_enter, file_hold, file_leave, file_of_session, file_of_wait, \
    file_poll, file_tried, is_held, is_waiting, lock_owner, lock_wait, locked_file, nothing_locked, owner_drop, owner_find, \
    owner_new, owner_note, wait_add, wait_take
from qtfs_server.session cimport HANDLE_ENDED, handle, node, session, session_hold, session_unref

cdef extern from "<time.h>" nogil:
    int real_clock "clock_gettime"(int, timespec *)

cdef extern from *:
    """
    #include <signal.h>
    #define QTFS_LOCK_SIGNAL (SIGRTMIN + 1)
    static void qtfs_nothing(int number) { (void)number; }
    /* No SA_RESTART: the signal is to end fcntl(2) and flock(2) with EINTR. */
    static void qtfs_catch_signal(int number) {
        struct sigaction action = { .sa_handler = qtfs_nothing };
        sigaction(number, &action, NULL);
    }
    """
    int SIGNAL "QTFS_LOCK_SIGNAL"
    void catch_signal "qtfs_catch_signal"(int) nogil

cdef enum:
    QUEUERS = 8                     # files that threads queue for at the same time; the others are polled only
    QUEUE_AFTER_US = 3000           # of polling in vain
    BLOCKED_US = 100000             # at one file: somebody else is to poll the others
    IDLE_US = 1000000               # the polling thread's sleep while there is nothing to poll
    END_OF_FILE = 0x7fffffffffffffff    # OFFSET_MAX

cdef pthread_mutex_t _bell_guard
cdef pthread_cond_t _bell
cdef bint _rung = False             # there is something new to poll
cdef bint _stopping = False
cdef answer_function _answer = NULL
pthread_mutex_init(&_bell_guard, NULL)
pthread_cond_init(&_bell, NULL)


# ---- one attempt: the file's turn is the caller's ----------------------------------------------------------------

cdef int _check(const lock_request *what) noexcept nogil:
    if what.flags & LOCK_FLOCK:
        return 0
    if what.start > <uint64_t>END_OF_FILE or what.end > <uint64_t>END_OF_FILE or what.end < what.start:
        return -EINVAL
    return 0


cdef flock_t _range(const lock_request *what) noexcept nogil:
    cdef flock_t range
    range.l_type = F_RDLCK if what.type == SHARED else (F_WRLCK if what.type == EXCLUSIVE else F_UNLCK)
    range.l_whence = 0
    range.l_start = what.start
    range.l_len = 0 if what.end == <uint64_t>END_OF_FILE else <int64_t>(what.end - what.start + 1)
    range.l_pid = 0
    return range


cdef int _reopen(handle *h) noexcept nogil:
    """Another open file description of a handle's file: a descriptor or -errno."""
    cdef char link[32]
    cdef int fd
    proc_path(link, h.fd)
    fd = openat(AT_FDCWD, link, O_RDWR | O_CLOEXEC | O_NOCTTY)
    if fd < 0:
        fd = openat(AT_FDCWD, link, O_RDONLY | O_CLOEXEC | O_NOCTTY)
    return fd if fd >= 0 else -errno


cdef int _new_owner(locked_file *f, session *s, handle *h, const lock_request *what, lock_owner **out) noexcept nogil:
    """An open file description for an owner that holds nothing yet. 0 or -errno."""
    cdef int fd = _reopen(h) if within_share(s.handles_used + s.lock_files) else -EMFILE
    if fd < 0:
        return -ENOLCK if fd == -EMFILE else fd
    out[0] = owner_new(f, s, what.owner, what.handle, fd)
    if out[0] == NULL:
        close(fd)
        return -ENOLCK
    return 0


cdef int _change(lock_owner *o, const lock_request *what) noexcept nogil:
    """Lock or unlock in the name of an owner. An owner that holds nothing any more goes."""
    cdef flock_t range = _range(what)
    cdef int error = ranges_reserve(&o.ranges)
    if error == 0 and fcntl(o.fd, F_OFD_SETLK, &range) < 0:
        error = -EAGAIN if errno == EACCES else -errno      # fcntl(2) allows both for a lock in the way
    if error == 0:
        owner_note(o, what)
    if o.ranges.first == NULL:
        owner_drop(o)
    return error


cdef int _try_posix(locked_file *f, session *s, handle *h, const lock_request *what) noexcept nogil:
    cdef lock_owner *o = owner_find(f, s, what.owner)
    cdef int error
    if o == NULL and what.type == UNLOCKED:
        return 0
    if what.type != UNLOCKED and is_held(f, s, what):
        return -EAGAIN
    if o == NULL:
        error = _new_owner(f, s, h, what, &o)
        if error < 0:
            return error
    return _change(o, what)


cdef int _try_flock(handle *h, const lock_request *what) noexcept nogil:
    cdef int operation = LOCK_SH if what.type == SHARED else (LOCK_EX if what.type == EXCLUSIVE else LOCK_UN)
    if flock(h.fd, operation | LOCK_NB) < 0:
        return -errno
    h.flocked = operation if operation != LOCK_UN else 0
    return 0


cdef int _try(locked_file *f, session *s, handle *h, const lock_request *what) noexcept nogil:
    """Lock or unlock without waiting. 0, -EAGAIN, or another -errno."""
    return _try_flock(h, what) if what.flags & LOCK_FLOCK else _try_posix(f, s, h, what)


# ---- waits -------------------------------------------------------------------------------------------------------

cdef void set_answer(answer_function answer) noexcept nogil:
    """Set who sends the replies of waits."""
    global _answer
    _answer = answer


cdef void _ring() noexcept nogil:
    global _rung
    pthread_mutex_lock(&_bell_guard)
    _rung = True
    pthread_cond_broadcast(&_bell)
    pthread_mutex_unlock(&_bell_guard)


cdef void _poll(locked_file *f, bint wanted, bint progress) noexcept nogil:
    """Have the thread try the waits of a file again, or no more."""
    cdef bint fresh = wanted and not f.polled
    file_poll(f, wanted, progress, now_us())
    if fresh:
        _ring()


cdef bint _is_covered(const lock_request *refused, const lock_request *what) noexcept nogil:
    """Whether what a process of the server refused to the one is refused to the other as well."""
    return refused != NULL and what.start <= refused.start and refused.end <= what.end and what.type >= refused.type


cdef int _try_wait(lock_wait *w, const lock_request **refused, bint *to_poll) noexcept nogil:
    """Try a wait. `refused` is the last POSIX lock in vain, so that the same for many is not tried for each."""
    cdef bint posix = not w.what.flags & LOCK_FLOCK
    cdef int error = -EAGAIN
    if w.h.flags & HANDLE_ENDED:
        return -EINTR
    if posix and is_held(w.file, w.s, &w.what):
        return -EAGAIN
    to_poll[0] = True
    if posix and _is_covered(refused[0], &w.what):
        return -EAGAIN
    error = _try(w.file, w.s, w.h, &w.what)
    if posix and error == -EAGAIN:
        refused[0] = &w.what
    return error


cdef lock_wait **_serve_once(locked_file *f, lock_wait **ended, bint *to_poll, bint *again) noexcept nogil:
    """Try each wait of a file; append those that have ended to a list, whose new end is returned."""
    cdef lock_wait **at = &f.waits
    cdef const lock_request *refused = NULL
    cdef int error
    to_poll[0] = again[0] = False
    while at[0] != NULL:
        error = _try_wait(at[0], &refused, to_poll)
        if error == -EAGAIN or not session_hold(at[0].s):
            at = &at[0].next
            continue
        ended[0] = wait_take(at)
        ended[0].error = error
        again[0] = again[0] or error == 0 and ended[0].what.type == SHARED     # may have been an exclusive one before
        ended = &ended[0].next
    return ended


cdef void _serve_waits(locked_file *f, lock_wait **ended) noexcept nogil:
    """Grant, in the order of their coming, what nobody is in the way of. Those waits are put behind others in a list,
    to be answered when the turn is given back.
    """
    cdef lock_wait **end
    cdef bint to_poll = False, again = f.waits != NULL
    if not again:
        return
    while ended[0] != NULL:
        ended = &ended[0].next
    end = ended
    while again:
        end = _serve_once(f, end, &to_poll, &again)
    if to_poll and f.waits != NULL or f.polled:
        _poll(f, to_poll and f.waits != NULL, ended[0] != NULL)


cdef void _drop(lock_wait *w) noexcept nogil:
    handle_unpin(w.s, w.h)
    free(w)


cdef void _leave(locked_file *f, lock_wait *ended) noexcept nogil:
    """Give the turn back and answer waits that have ended, each of which holds its session."""
    cdef lock_wait *w
    cdef session *s
    file_leave(f)
    while ended != NULL:
        w = ended
        ended = w.next
        s = w.s
        _answer(s, w.tag, w.error)
        _drop(w)
        session_unref(s)


cdef int _queue(request *r, locked_file *f, handle *h) noexcept nogil:
    """Let a request wait, which takes over the pin of its handle. DEFERRED, -EDEADLK or -ENOLCK."""
    cdef lock_wait *w = <lock_wait *>calloc(1, sizeof(lock_wait))
    cdef int error
    if w == NULL:
        return -ENOLCK
    w.s = r.s
    w.h = h
    w.what = (<lock_request *>r.body)[0]
    w.tag = r.head.tag
    w.file = f
    error = wait_add(w)
    if error < 0:
        free(w)
        return error
    if w.what.flags & LOCK_FLOCK or not is_held(f, w.s, &w.what):
        _poll(f, True, False)
    return DEFERRED


cdef void cancel_wait(session *s, uint64_t tag) noexcept nogil:
    """CANCEL: the waiter was interrupted. A wait that has ended meanwhile was answered already."""
    cdef locked_file *f = file_of_wait(s, tag)
    cdef lock_wait **at
    cdef lock_wait *found = NULL
    if f == NULL:
        return
    at = &f.waits
    while at[0] != NULL and (at[0].tag != tag or at[0].s != s):
        at = &at[0].next
    if at[0] != NULL:
        found = wait_take(at)
    file_leave(f)
    if found != NULL:
        _answer(s, tag, -EINTR)
        _drop(found)


# ---- operations --------------------------------------------------------------------------------------------------

cdef int _begin(request *r, handle **h) noexcept nogil:
    """Check a request and pin its handle. 0, -errno or MALFORMED."""
    cdef lock_request *body = <lock_request *>r.body
    cdef int error
    if r.body_bytes != sizeof(lock_request) or body.type > UNLOCKED:
        return MALFORMED
    error = _check(body)
    return error if error < 0 else handle_pin(r.s, body.handle, h)


cdef int _set(request *r, handle *h, bint patient) noexcept nogil:
    """SETLK and SETLKW with the handle pinned, and unpinned unless it is DEFERRED that is returned."""
    cdef lock_request *what = <lock_request *>r.body
    cdef locked_file *f = file_enter(r.s, h.node, True)
    cdef lock_wait *ended = NULL
    cdef int error
    if f == NULL:
        return -ENOLCK
    if patient and is_waiting(r.s, r.head.tag):
        file_leave(f)                   # the client asks again over a fresh event channel
        handle_unpin(r.s, h)            # the wait has a pin of its own
        return DEFERRED
    if f.polled:
        _serve_waits(f, &ended)         # they came first
    # A RELEASE that overtook us has ended the handle's locks already, and nobody would end this one.
    error = -ESTALE if h.flags & HANDLE_ENDED else _try(f, r.s, h, what)
    if patient and error == -EAGAIN:
        error = _queue(r, f, h)
    elif error == 0 and what.type != EXCLUSIVE:
        _serve_waits(f, &ended)
    _leave(f, ended)
    return error


cdef int op_setlk(request *r) noexcept nogil:
    """SETLK: lock_request → nothing; EAGAIN if somebody else holds it."""
    cdef handle *h = NULL
    cdef int error = _begin(r, &h)
    if error < 0:
        return error
    error = _set(r, h, False)
    handle_unpin(r.s, h)
    return error


cdef int op_setlkw(request *r) noexcept nogil:
    """SETLKW, on the event channel: lock_request → nothing, once the lock is held; EINTR after a CANCEL; EDEADLK."""
    cdef handle *h = NULL
    cdef int error = _begin(r, &h)
    if error < 0:
        return error
    error = _set(r, h, True)
    if error != DEFERRED:
        handle_unpin(r.s, h)
    return error


cdef int _look(session *s, handle *h, const lock_request *what, flock_t *range) noexcept nogil:
    """F_OFD_GETLK in the name of an owner. One that holds nothing is as good as any other."""
    cdef locked_file *f = file_enter(s, h.node, False)
    cdef lock_owner *o = owner_find(f, s, what.owner) if f != NULL else NULL
    cdef int error = 0
    range[0] = _range(what)
    if fcntl(o.fd if o != NULL else h.fd, F_OFD_GETLK, range) < 0:
        error = -errno
    if f != NULL:
        file_leave(f)
    return error


cdef int op_getlk(request *r) noexcept nogil:
    """GETLK: lock_request → lock_reply: the first lock in the way, or F_UNLCK."""
    cdef lock_reply *out = <lock_reply *>r.reply
    cdef flock_t range
    cdef handle *h = NULL
    cdef int error = _begin(r, &h)
    if error < 0:
        return error
    error = _look(r.s, h, <lock_request *>r.body, &range)
    handle_unpin(r.s, h)
    if error < 0:
        return error
    out.type = SHARED if range.l_type == F_RDLCK else (EXCLUSIVE if range.l_type == F_WRLCK else UNLOCKED)
    out.start = range.l_start
    out.end = <uint64_t>END_OF_FILE if range.l_len == 0 else <uint64_t>(range.l_start + range.l_len - 1)
    out.pid = range.l_pid if range.l_pid > 0 else 0
    r.reply_bytes = sizeof(lock_reply)
    return 0


# ---- ends --------------------------------------------------------------------------------------------------------

cdef void _drop_owner(locked_file *f, const session *s, uint64_t owner) noexcept nogil:
    """End the locks of an owner, if it holds any, and leave the file."""
    cdef lock_owner *o = owner_find(f, s, owner)
    cdef lock_wait *ended = NULL
    if o != NULL:
        owner_drop(o)
        _serve_waits(f, &ended)
    _leave(f, ended)


cdef void drop_locks(session *s, node *n, uint64_t owner) noexcept nogil:
    """Give back all POSIX locks of an owner on a node: a close(2) of any of its descriptors does that."""
    cdef locked_file *f = NULL if nothing_locked() else file_enter(s, n, False)
    if f != NULL:
        _drop_owner(f, s, owner)


cdef lock_owner *_by_handle(locked_file *f, const session *s, uint64_t id) noexcept nogil:
    cdef lock_owner *o = f.owners
    while o != NULL and (o.handle != id or o.s != s):
        o = o.next
    return o


cdef void end_handle_locks(session *s, handle *h, uint64_t id, bint flocked) noexcept nogil:
    """A handle has ended, is pinned still: so end its locks and waits.

    By now each process that had it has closed it, and a FLUSH ended that one's locks. What is left is the open file's own.
    """
    cdef locked_file *f = NULL
    cdef lock_wait *ended = NULL
    cdef lock_owner *o
    if flocked or not nothing_locked():
        f = file_enter(s, h.node, False)
    if flocked and h.fd >= 0:
        flock(h.fd, LOCK_UN)
    if f == NULL:
        return
    o = _by_handle(f, s, id)
    while o != NULL:
        owner_drop(o)
        o = _by_handle(f, s, id)
    _serve_waits(f, &ended)
    _leave(f, ended)


cdef int lock_again(session *s, uint64_t id, uint64_t owner, uint64_t start, uint64_t end, uint32_t type) noexcept nogil:
    """Take a POSIX lock that an owner held while the engine before us lived, `id` being its handle. 0 or -errno."""
    cdef lock_request what
    cdef locked_file *f
    cdef handle *h = NULL
    cdef int error = handle_pin(s, id, &h)
    if error < 0:
        return error
    memset(&what, 0, sizeof(what))
    what.handle = id
    what.owner = owner
    what.start = start
    what.end = end
    what.type = type
    f = file_enter(s, h.node, True)
    error = -ENOLCK
    if f != NULL:
        error = _try(f, s, h, &what)
        file_leave(f)
    handle_unpin(s, h)
    return error


cdef int owner_again(session *s, uint64_t id, uint64_t owner, int fd) noexcept nogil:
    """Make an owner again whose locks live on in a descriptor, which is taken over unless it fails. 0 or -errno.

    They are still to be noted: lock_again.
    """
    cdef locked_file *f
    cdef handle *h = NULL
    cdef int error = handle_pin(s, id, &h)
    if error < 0:
        return error
    f = file_enter(s, h.node, True)
    error = -ENOLCK
    if f != NULL:
        error = 0 if owner_new(f, s, owner, id, fd) != NULL else -ENOLCK
        file_leave(f)
    handle_unpin(s, h)
    return error


cdef int flock_again(session *s, uint64_t id) noexcept nogil:
    """The same for a handle's flock(2) lock."""
    cdef handle *h = NULL
    cdef int error = handle_pin(s, id, &h)
    if error < 0:
        return error
    if flock(h.fd, <int>h.flocked | LOCK_NB) < 0:
        error = -errno
    handle_unpin(s, h)
    return error


cdef lock_wait *_take_all(locked_file *f, const session *s) noexcept nogil:
    cdef lock_wait **at = &f.waits
    cdef lock_wait *taken = NULL
    cdef lock_wait *w
    while at[0] != NULL:
        if at[0].s != s:
            at = &at[0].next
            continue
        w = wait_take(at)
        w.next = taken
        taken = w
    return taken


cdef void _abandon_waits(session *s) noexcept nogil:
    cdef locked_file *f = file_awaited(s)
    cdef lock_wait *taken
    cdef lock_wait *w
    while f != NULL:
        taken = _take_all(f, s)
        file_leave(f)
        while taken != NULL:
            w = taken
            taken = w.next
            _drop(w)
        f = file_awaited(s)


cdef void abandon_waits(session *s) noexcept nogil:
    """The session ends: its waits end without an answer, and its POSIX locks."""
    cdef locked_file *f
    cdef uint64_t owner = 0
    _abandon_waits(s)
    f = file_of_session(s, &owner)
    while f != NULL:
        _drop_owner(f, s, owner)
        f = file_of_session(s, &owner)


# ---- threads that queue in the kernel ------------------------------------------------------------------------------

cdef struct queuer:                 # one of those threads, under _bell_guard
    pthread_t thread
    locked_file *file               # where it queues, a reference to it; NULL: nowhere
    const session *s                # for which wait: to be compared only
    uint64_t tag
    lock_request what
    int fd
    bint asleep                     # or about to be, or just awake: a signal does no harm

cdef queuer _queuers[QUEUERS]
cdef int _queuer_count = 0
cdef pthread_cond_t _work
pthread_cond_init(&_work, NULL)


cdef bint _is_queued_for(locked_file *f) noexcept nogil:
    cdef int i
    for i in range(_queuer_count):
        if _queuers[i].file == f:
            return True
    return False


cdef void _give_to_queuer(locked_file *f, const lock_wait *w, int fd) noexcept nogil:
    """Have a thread that is free queue for a wait; the descriptor is taken over."""
    cdef queuer *q = NULL
    cdef int i
    pthread_mutex_lock(&_bell_guard)
    for i in range(_queuer_count):
        if _queuers[i].file == NULL and not _stopping:
            q = &_queuers[i]
    if q != NULL and not _is_queued_for(f):
        file_hold(f)
        q.file = f
        q.s = w.s
        q.tag = w.tag
        q.what = w.what
        q.fd = fd
        q.asleep = True
        fd = -1
        pthread_cond_broadcast(&_work)
    pthread_mutex_unlock(&_bell_guard)
    if fd >= 0:
        close(fd)


cdef void _queue_for_first(locked_file *f) noexcept nogil:
    """Queue for the first wait that a process of the server is in the way of; the file's turn is ours."""
    cdef lock_wait *w = f.waits
    cdef int fd
    while w != NULL and not w.what.flags & LOCK_FLOCK and is_held(f, w.s, &w.what):
        w = w.next
    if w == NULL or _is_queued_for(f):
        return
    fd = _reopen(w.h)
    if fd >= 0:
        _give_to_queuer(f, w, fd)


cdef int _wait_in_kernel(const queuer *q) noexcept nogil:
    """Lock the queuer's own descriptor, however long that takes; negative once a signal has ended it."""
    cdef flock_t range
    if q.what.flags & LOCK_FLOCK:
        return flock(q.fd, LOCK_SH if q.what.type == SHARED else LOCK_EX)
    range = _range(&q.what)
    return fcntl(q.fd, F_OFD_SETLKW, &range)


cdef bint _adopt(locked_file *f, const queuer *q) noexcept nogil:
    """Give the locked descriptor to the owner who waits, if it can have one; then nobody comes in between."""
    cdef lock_wait *w = f.waits
    cdef lock_owner *o
    while w != NULL and (w.tag != q.tag or w.s != q.s or memcmp(&w.what, &q.what, sizeof(lock_request)) != 0):
        w = w.next
    if w == NULL or w.what.flags & LOCK_FLOCK or owner_find(f, w.s, w.what.owner) != NULL or \
            is_held(f, w.s, &w.what):
        return False
    o = owner_new(f, w.s, w.what.owner, w.what.handle, q.fd)
    if o == NULL:
        return False
    if ranges_reserve(&o.ranges) < 0:
        owner_drop(o)                   # with its descriptor
    else:
        owner_note(o, &q.what)
    return True


cdef void _queue_once(queuer *q) noexcept nogil:
    cdef locked_file *f = q.file
    cdef lock_wait *ended = NULL
    cdef int status = _wait_in_kernel(q)
    pthread_mutex_lock(&_bell_guard)
    q.asleep = False
    pthread_mutex_unlock(&_bell_guard)
    pthread_mutex_lock(&f.turn)
    if status < 0 or not _adopt(f, q):
        close(q.fd)
    _serve_waits(f, &ended)
    _leave(f, ended)


cdef void queue_for_locks() noexcept nogil:
    """A thread that queues in the kernel, until stop_waiting_for_locks. At most QUEUERS of them do anything."""
    global _queuer_count
    cdef queuer *q
    pthread_mutex_lock(&_bell_guard)
    if _queuer_count < QUEUERS:
        q = &_queuers[_queuer_count]
        q.thread = pthread_self()
        _queuer_count += 1
        while not _stopping:
            if q.file == NULL:
                pthread_cond_wait(&_work, &_bell_guard)
                continue
            pthread_mutex_unlock(&_bell_guard)
            _queue_once(q)
            pthread_mutex_lock(&_bell_guard)
            q.file = NULL
    pthread_mutex_unlock(&_bell_guard)


cdef bint _interrupt_queuers(bint all_of_them) noexcept nogil:
    """Wake those whose wait is gone. A signal that comes too early is lost: again, until none is left, which is False."""
    cdef bint found = False
    cdef int i
    pthread_mutex_lock(&_bell_guard)
    for i in range(_queuer_count):
        if _queuers[i].asleep and (all_of_them or not is_waiting(_queuers[i].s, _queuers[i].tag)):
            pthread_kill(_queuers[i].thread, SIGNAL)
            found = True
    pthread_mutex_unlock(&_bell_guard)
    return found


# ---- the thread that polls ---------------------------------------------------------------------------------------

cdef uint64_t _poller = 0           # its number; 0: there is none. Those before it hung at a file, and end after that
cdef uint64_t _last_poller = 0
cdef int64_t _at_file_us = 0        # since when it looks for a file and tries it; 0: it sleeps


cdef uint64_t _begin_polling() noexcept nogil:
    """Become the thread that polls, in the place of whoever was it: the number."""
    global _poller, _last_poller, _at_file_us
    cdef uint64_t number
    pthread_mutex_lock(&_bell_guard)
    _last_poller += 1
    _poller = number = _last_poller
    _at_file_us = 0
    pthread_mutex_unlock(&_bell_guard)
    return number


cdef bint _goes_on(uint64_t number, int64_t at_file_us) noexcept nogil:
    """Note since when a thread looks for a file and tries it; 0: it does not. Whether it is to go on polling."""
    global _poller, _at_file_us
    cdef bint goes_on
    pthread_mutex_lock(&_bell_guard)
    goes_on = _poller == number and not _stopping
    if _poller == number:
        _at_file_us = at_file_us
        _poller = number if goes_on else 0
    pthread_mutex_unlock(&_bell_guard)
    return goes_on


cdef bint lock_polling() noexcept nogil:
    """Whether there is a thread that polls."""
    cdef bint polling
    pthread_mutex_lock(&_bell_guard)
    polling = _poller != 0
    pthread_mutex_unlock(&_bell_guard)
    return polling


cdef void *_poller_body(void *unused) noexcept nogil:
    wait_for_locks()
    return NULL


cdef void see_to_lock_polling() noexcept nogil:
    """Have another thread poll if the one that does hangs; to be called from time to time."""
    cdef pthread_t thread = 0
    cdef bint hangs
    pthread_mutex_lock(&_bell_guard)
    hangs = _poller == 0 or (_at_file_us > 0 and now_us() - _at_file_us > BLOCKED_US)
    hangs = hangs and not _stopping
    pthread_mutex_unlock(&_bell_guard)
    if hangs:
        start_thread(_poller_body, &thread)


cdef void _sleep_until(uint64_t number, int64_t at_us) noexcept nogil:
    """Sleep until then, or until somebody rings."""
    global _rung
    cdef int64_t delay_us = max(at_us - now_us(), <int64_t>0)
    cdef timespec until
    real_clock(CLOCK_REALTIME, &until)
    until.tv_nsec += delay_us % 1000000 * 1000
    until.tv_sec += delay_us // 1000000 + until.tv_nsec // 1000000000
    until.tv_nsec = until.tv_nsec % 1000000000
    pthread_mutex_lock(&_bell_guard)
    if not _rung and not _stopping:
        pthread_cond_timedwait(&_bell, &_bell_guard, &until)
    if _poller == number:
        _rung = False
    pthread_mutex_unlock(&_bell_guard)


cdef void _poll_file(locked_file *f) noexcept nogil:
    """Try the waits of a file that is due; in vain for a while, have a thread queue as local processes do."""
    cdef lock_wait *ended = NULL
    pthread_mutex_lock(&f.turn)
    _serve_waits(f, &ended)
    if f.polled and now_us() - f.polled_since_us > QUEUE_AFTER_US:
        _queue_for_first(f)
    file_tried(f)
    _leave(f, ended)


cdef void wait_for_locks() noexcept nogil:
    """The thread that polls, until stop_waiting_for_locks, or until it has hung and another one is in its place."""
    cdef uint64_t number = _begin_polling()
    cdef locked_file *f
    cdef int64_t next_us = 0
    catch_signal(SIGNAL)
    while _goes_on(number, now_us()):
        f = file_due(now_us(), &next_us)
        if f != NULL:
            _poll_file(f)
        elif _goes_on(number, 0):
            _interrupt_queuers(False)
            _sleep_until(number, next_us if next_us > 0 else now_us() + IDLE_US)
    _ring()                             # if it had hung, other files there were left alone
    while _stopping and _interrupt_queuers(True):
        usleep(1000)


cdef void stop_waiting_for_locks() noexcept nogil:
    """End the threads."""
    global _stopping
    pthread_mutex_lock(&_bell_guard)
    _stopping = True
    pthread_cond_broadcast(&_work)
    pthread_cond_broadcast(&_bell)
    pthread_mutex_unlock(&_bell_guard)


cdef void go_on_waiting_for_locks() noexcept nogil:
    """Let there be such threads again. What one of them was given and had no time for is polled."""
    global _stopping, _queuer_count
    cdef int i
    for i in range(_queuer_count):
        if _queuers[i].file != NULL:
            close(_queuers[i].fd)
            pthread_mutex_lock(&_queuers[i].file.turn)
            file_leave(_queuers[i].file)
            _queuers[i].file = NULL
    _queuer_count = 0
    _stopping = False
