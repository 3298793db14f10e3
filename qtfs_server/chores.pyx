"""What may hang in a file system of the server, and no thread may do that others wait for: closing files under a lock,
freeing sessions, putting nodes aside.

Chores are done in the order of their coming by as many threads as are needed: a further one when those that there are
have not finished anything for BLOCKED_US. A thread without work ends after IDLE_S. They hold no lock meanwhile.

Who adds a chore wakes a thread only if none looks by itself soon: to wake one takes longer than most chores, and takes the
processor from those that somebody waits for. So a thread that has finished naps for NAP_US before it sleeps.
"""
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_REALTIME

from qtfs_common.transport cimport now_us
from qtfs_server.descriptors cimport close_node, closing_later
from qtfs_server.includes.linux cimport pthread_cond_init, pthread_cond_signal, pthread_cond_t, pthread_cond_timedwait, \
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, timespec, usleep
from qtfs_server.includes.threads cimport pthread_t, start_thread

cdef extern from "<time.h>" nogil:
    int real_clock "clock_gettime"(int, timespec *)

cdef enum:
    MAX_THREADS = 64
    IDLE_S = 5
    BLOCKED_US = 100000
    NAP_US = 5000

cdef struct chore:
    chore *next
    chore_function run
    void *subject

cdef pthread_mutex_t _guard
cdef pthread_cond_t _work
cdef chore *_first = NULL
cdef chore **_end = &_first
cdef int _threads = 0
cdef int _idle = 0                      # of them, waiting for work or starting
cdef int _napping = 0                   # of those, who will look without being woken
cdef int64_t _progress_us = 0           # when one of them last finished, or began with none under way
pthread_mutex_init(&_guard, NULL)
pthread_cond_init(&_work, NULL)


# ---- the threads -----------------------------------------------------------------------------------------------------

cdef chore *_next_locked() noexcept nogil:
    """The chore that has waited longest; NULL: there was none for long enough."""
    global _first, _end
    cdef timespec until
    cdef chore *found
    cdef int waited = 0
    real_clock(CLOCK_REALTIME, &until)
    until.tv_sec += IDLE_S
    while _first == NULL and waited == 0:
        waited = pthread_cond_timedwait(&_work, &_guard, &until)
    found = _first
    if found != NULL:
        _first = found.next
        if _first == NULL:
            _end = &_first
    return found


cdef void _nap_locked() noexcept nogil:
    """Let some work gather."""
    global _napping
    _napping += 1
    pthread_mutex_unlock(&_guard)
    usleep(NAP_US)
    pthread_mutex_lock(&_guard)
    _napping -= 1


cdef void *_body(void *unused) noexcept nogil:
    global _threads, _idle, _progress_us
    cdef chore *job
    pthread_mutex_lock(&_guard)
    while True:
        job = _next_locked()
        _idle -= 1
        if job == NULL:
            break
        pthread_mutex_unlock(&_guard)
        job.run(job.subject)
        free(job)
        pthread_mutex_lock(&_guard)
        _idle += 1
        _progress_us = now_us()
        if _first == NULL:
            _nap_locked()
    _threads -= 1
    pthread_mutex_unlock(&_guard)
    return NULL


cdef void _see_to_threads_locked(int64_t now) noexcept nogil:
    """Have somebody do what there is to do."""
    global _threads, _idle, _progress_us
    cdef pthread_t thread = 0
    if _first == NULL or _napping > 0:
        return
    if _idle > 0:
        pthread_cond_signal(&_work)
    elif _threads == 0 or (_threads < MAX_THREADS and now - _progress_us > BLOCKED_US):
        if start_thread(_body, &thread) == 0:
            _threads += 1
            _idle += 1
            _progress_us = now


# ---- for everybody ---------------------------------------------------------------------------------------------------

cdef bint chore_add(chore_function run, void *subject) noexcept nogil:
    """Have something done; False without memory."""
    global _end
    cdef chore *job = <chore *>malloc(sizeof(chore))
    if job == NULL:
        return False
    job.next = NULL
    job.run = run
    job.subject = subject
    pthread_mutex_lock(&_guard)
    _end[0] = job
    _end = &job.next
    _see_to_threads_locked(now_us())
    pthread_mutex_unlock(&_guard)
    return True


cdef void _close(void *fd) noexcept nogil:
    close_node(<int><ssize_t>fd)
    closing_later(-1)


cdef void close_later(int fd) noexcept nogil:
    """Close a node's descriptor; -1 is none. What it was the last to keep of an unlinked file goes with it."""
    if fd < 0:
        return
    closing_later(1)
    if not chore_add(_close, <void *><ssize_t>fd):
        _close(<void *><ssize_t>fd)


cdef void see_to_chores() noexcept nogil:
    """See to chores that wait while those before them hang; to be called from time to time."""
    pthread_mutex_lock(&_guard)
    _see_to_threads_locked(now_us())
    pthread_mutex_unlock(&_guard)


cdef bint chores_done() noexcept nogil:
    """Whether nothing is left to do, and nothing under way."""
    cdef bint done
    pthread_mutex_lock(&_guard)
    done = _first == NULL and _idle == _threads
    pthread_mutex_unlock(&_guard)
    return done
