"""Opening FIFOs for callers that wait for the other end: fifo(7).

Linux has no open(2) of a FIFO that waits without a thread, and what a waiting one does to others (it counts as reader or
writer, it lets a waiting partner go on) cannot be had in another way. So these opens run in threads of their own, with
small stacks, which are made when there is none free and end when they have been idle for a while. They sleep in the
kernel and cost nothing but memory.

A cancelled open is woken by a signal, again and again until it has returned: one that comes just before the system call
begins is lost. `press_cancelled` does that, from the stream thread.

Lock order: _guard, then what events.pyx takes.
"""
from libc.errno cimport EALREADY, EINTR, ENFILE, ENOMEM, ESTALE, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_REALTIME

from qtfs_common.protocol cimport OP_OPEN, caller, groups_bytes, open_reply
from qtfs_server.descriptors cimport proc_path
from qtfs_server.events cimport event_answered, event_bell, event_reply
from qtfs_server.handles cimport handle_new_stream
from qtfs_server.identity cimport act_as, act_as_root, identity, identity_init
from qtfs_server.includes.linux cimport AT_FDCWD, F_SETFL, O_CLOEXEC, O_NOCTTY, O_NONBLOCK, close, fcntl, \
    openat, pthread_cond_broadcast, pthread_cond_init, pthread_cond_signal, pthread_cond_t, pthread_cond_timedwait, pthread_mutex_init, \
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, timespec
from qtfs_server.includes.threads cimport pthread_t, start_thread
from qtfs_server.node_descriptors cimport node_hold, node_unpin
from qtfs_server.request cimport DEFERRED, request
from qtfs_server.session cimport node, session, session_hold, session_unref
from qtfs_server.shares cimport SHARE_OPENINGS, share_give, share_take

cdef extern from "<time.h>" nogil:
    int real_clock "clock_gettime"(int, timespec *)

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/eventfd.h>

    enum { QTFS_WAKE_SIGNAL = SIGUSR2 };

    static void qtfs_do_nothing(int number) { (void)number; }

    /* Not Python's handler, which would write to the engine's wakeup descriptor; and no SA_RESTART: open(2) has to end. */
    static int qtfs_catch_wake_signal(void)
    {
        struct sigaction action;
        memset(&action, 0, sizeof(action));
        action.sa_handler = qtfs_do_nothing;
        return sigaction(QTFS_WAKE_SIGNAL, &action, NULL);
    }
    """
    enum:
        QTFS_WAKE_SIGNAL
    pthread_t pthread_self() nogil
    int pthread_kill(pthread_t, int) nogil
    int eventfd_write(int, uint64_t) nogil
    int catch_wake_signal "qtfs_catch_wake_signal"() nogil

cdef enum:
    IDLE_S = 5                          # until a thread that nobody needs ends

cdef struct opening:                    # one OPEN that waits; the supplementary groups follow
    opening *next
    session *s                          # a counted reference
    node *n                             # pinned
    uint64_t tag
    uint32_t flags
    caller who
    bint cancelled
    bint abandoned                      # nobody wants to know
    bint suspended                      # cancelled, to be begun again
    pthread_t thread                    # once it is among the running ones

cdef pthread_mutex_t _guard
cdef pthread_cond_t _work
cdef opening *_queued = NULL            # no thread has them yet
cdef opening *_running = NULL
cdef int _count = 0                     # of both
cdef int _queue_length = 0
cdef int _free_threads = 0              # that wait for work or are starting: at least as many as are queued
cdef int _cancelled = 0                 # of the running ones
cdef bint _suspended = False            # none begins
pthread_mutex_init(&_guard, NULL)
pthread_cond_init(&_work, NULL)
catch_wake_signal()


# ---- the threads -------------------------------------------------------------------------------------------------------

cdef opening *_next_locked() noexcept nogil:
    """Something to do, now among the running; NULL: a free thread has waited for long enough."""
    global _queued, _running, _queue_length, _free_threads
    cdef timespec until
    cdef opening *job
    cdef int waited = 0
    real_clock(CLOCK_REALTIME, &until)
    until.tv_sec += IDLE_S
    while (_queued == NULL or _suspended) and waited == 0:
        waited = pthread_cond_timedwait(&_work, &_guard, &until)
    _free_threads -= 1
    job = _queued
    if job == NULL or _suspended:
        return NULL
    _queued = job.next
    _queue_length -= 1
    job.next = _running
    _running = job
    job.thread = pthread_self()
    return job


cdef void _unlink_locked(opening **at, opening *job) noexcept nogil:
    while at[0] != job:
        at = &at[0].next
    at[0] = job.next


cdef void _free(opening *job) noexcept nogil:
    node_unpin(job.s, job.n)
    share_give(job.s, SHARE_OPENINGS, 1)
    session_unref(job.s)
    free(job)


cdef int _open(opening *job, identity *me) noexcept nogil:
    """open(2) as the caller, for as long as it takes. A descriptor or -errno."""
    cdef char link[32]
    cdef int fd
    proc_path(link, job.n.fd)
    act_as(me, job.who.uid, job.who.gid, <const uint32_t *>(job + 1), job.who.ngroups)
    fd = openat(AT_FDCWD, link, job.flags | O_CLOEXEC | O_NOCTTY)
    fd = fd if fd >= 0 else -errno
    act_as_root(me)
    return fd


cdef int _grant(opening *job, int fd, open_reply *out) noexcept nogil:
    """The handle of what was opened, which is taken over. 0 or -errno."""
    if job.abandoned:
        close(fd)
        return -EINTR
    fcntl(fd, F_SETFL, O_NONBLOCK)
    return handle_new_stream(job.s, job.n, fd, job.flags, out)


cdef void _put_back_locked(opening *job) noexcept nogil:
    """Queue a job again that was only suspended."""
    global _queued, _queue_length, _free_threads, _cancelled
    _unlink_locked(&_running, job)
    job.cancelled = job.suspended = False
    job.next = _queued
    _queued = job
    _queue_length += 1
    _free_threads += 1
    _cancelled -= 1


cdef void _run(opening *job, identity *me) noexcept nogil:
    """Open, and answer. Whoever merely tried to cancel gets what came of it."""
    global _count, _cancelled, _free_threads
    cdef open_reply out
    cdef int error = -EINTR if job.abandoned else _open(job, me)
    if error >= 0:
        error = _grant(job, error, &out)
    pthread_mutex_lock(&_guard)
    if error == -EINTR and job.suspended and not job.abandoned:
        _put_back_locked(job)
        pthread_mutex_unlock(&_guard)
        return
    # In one step: the same request, should it come again, finds itself either among the running ones or answered.
    _unlink_locked(&_running, job)
    event_reply(job.s, OP_OPEN, job.tag, error, &out, sizeof(out))
    _count -= 1
    _free_threads += 1
    if job.cancelled:
        _cancelled -= 1
    pthread_mutex_unlock(&_guard)
    _free(job)


cdef void *_opener(void *unused) noexcept nogil:
    """Body of a thread."""
    cdef identity me
    cdef opening *job
    identity_init(&me)
    while True:
        pthread_mutex_lock(&_guard)
        job = _next_locked()
        pthread_mutex_unlock(&_guard)
        if job == NULL:
            return NULL
        _run(job, &me)


# ---- for the workers ---------------------------------------------------------------------------------------------------

cdef opening *_find_locked(opening *job, session *s, uint64_t tag) noexcept nogil:
    while job != NULL and (job.s != s or job.tag != tag):
        job = job.next
    return job


cdef int _admit_locked(opening *job) noexcept nogil:
    """Whether a job may begin. 0; -EALREADY: it came before, over an event channel that broke; or another -errno."""
    if _find_locked(_queued, job.s, job.tag) != NULL or _find_locked(_running, job.s, job.tag) != NULL or \
            event_answered(job.s, OP_OPEN, job.tag):
        return -EALREADY
    if job.s.ended:
        return -ESTALE
    return 0


cdef opening *_new_opening(request *r, node *n, uint32_t flags) noexcept nogil:
    cdef size_t groups = groups_bytes(r.who.ngroups)
    cdef opening *job = <opening *>malloc(sizeof(opening) + groups)
    if job == NULL:
        share_give(r.s, SHARE_OPENINGS, 1)
        return NULL
    memcpy(job + 1, r.groups, groups)
    job.s = r.s
    job.n = n
    job.tag = r.head.tag
    job.flags = flags
    job.who = r.who
    job.cancelled = job.abandoned = job.suspended = False
    return job


cdef int _queue_locked(opening *job) noexcept nogil:
    """Give a job to a thread. 0 or -ENFILE."""
    global _queued, _count, _queue_length, _free_threads
    cdef pthread_t thread = 0
    if _free_threads <= _queue_length and start_thread(_opener, &thread) == 0:
        _free_threads += 1
    if _free_threads <= _queue_length:
        return -ENFILE
    job.next = _queued
    _queued = job
    _count += 1
    _queue_length += 1
    pthread_cond_signal(&_work)
    return 0


cdef int wait_to_open(request *r, node *n, uint32_t flags) noexcept nogil:
    """Open a pinned FIFO in a thread, and answer on the event channel. DEFERRED or -errno."""
    cdef opening *job
    cdef int error = node_hold(r.s, n)
    if error < 0:
        return error
    job = _new_opening(r, n, flags) if share_take(r.s, SHARE_OPENINGS, 1) else NULL
    if job == NULL:
        node_unpin(r.s, n)
        return -ENFILE
    session_hold(r.s)                   # the request has one of its own
    pthread_mutex_lock(&_guard)
    error = _admit_locked(job)
    if error == 0:
        error = _queue_locked(job)
    pthread_mutex_unlock(&_guard)
    if error < 0:
        _free(job)
    return DEFERRED if error in (0, -EALREADY) else error


# ---- ending them ---------------------------------------------------------------------------------------------------------

cdef void _cancel_locked(opening *job) noexcept nogil:
    global _cancelled
    if not job.cancelled:
        job.cancelled = True
        _cancelled += 1


cdef opening *_unqueue_locked(session *s, uint64_t tag) noexcept nogil:
    """Take a job away before any thread has it; NULL: it runs, or there is none."""
    global _count, _queue_length
    cdef opening *job = _find_locked(_queued, s, tag)
    if job != NULL:
        _unlink_locked(&_queued, job)
        _count -= 1
        _queue_length -= 1
    return job


cdef bint cancel_opening(session *s, uint64_t tag) noexcept nogil:
    """CANCEL: end an open with EINTR, unless it succeeds meanwhile. False: nobody waits under this tag."""
    cdef opening *job
    cdef opening *running = NULL
    pthread_mutex_lock(&_guard)
    job = _unqueue_locked(s, tag)
    if job == NULL:
        running = _find_locked(_running, s, tag)
        if running != NULL:
            _cancel_locked(running)
    pthread_mutex_unlock(&_guard)
    if running != NULL:
        eventfd_write(event_bell(), 1)
    if job != NULL:
        event_reply(s, OP_OPEN, tag, -EINTR, NULL, 0)
        _free(job)
    return job != NULL or running != NULL


cdef void abandon_openings(session *s) noexcept nogil:
    """The session ends: its opens end without an answer."""
    cdef opening *job
    pthread_mutex_lock(&_guard)
    job = _queued
    while job != NULL:
        job.abandoned = job.abandoned or job.s == s
        job = job.next
    job = _running
    while job != NULL:
        if job.s == s:
            job.abandoned = True
            _cancel_locked(job)
        job = job.next
    pthread_mutex_unlock(&_guard)
    eventfd_write(event_bell(), 1)


cdef bint press_cancelled() noexcept nogil:
    """Signal the threads whose open(2) is to end; whether there are any. To be called again within milliseconds."""
    cdef opening *job
    cdef bint any_left
    pthread_mutex_lock(&_guard)
    job = _running if _cancelled > 0 else NULL
    while job != NULL:
        if job.cancelled:
            pthread_kill(job.thread, QTFS_WAKE_SIGNAL)
        job = job.next
    any_left = _cancelled > 0
    pthread_mutex_unlock(&_guard)
    return any_left


# ---- handing over ------------------------------------------------------------------------------------------------------

cdef bint suspend_openings() noexcept nogil:
    """Begin no open any more, and end those that wait, without an answer; whether some still do: to be called again."""
    global _suspended
    cdef opening *job
    cdef bint any_left
    pthread_mutex_lock(&_guard)
    _suspended = True
    job = _running
    while job != NULL:
        if not job.cancelled:
            job.suspended = True
            _cancel_locked(job)
        job = job.next
    any_left = _running != NULL
    pthread_mutex_unlock(&_guard)
    press_cancelled()
    return any_left


cdef void go_on_opening() noexcept nogil:
    """Undo it: those that were suspended are begun again."""
    global _suspended, _free_threads
    cdef pthread_t thread = 0
    pthread_mutex_lock(&_guard)
    _suspended = False
    while _free_threads < _queue_length and start_thread(_opener, &thread) == 0:
        _free_threads += 1
    pthread_cond_broadcast(&_work)
    pthread_mutex_unlock(&_guard)
