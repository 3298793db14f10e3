"""Tables of locked files, owners and waits; the search for deadlocks. No system call is made here but close(2)."""
from libc.errno cimport ENOLCK
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from qtfs_common.protocol cimport LOCK_FLOCK, lock_request
from qtfs_server.descriptors cimport close_counted, descriptor_opened
from qtfs_server.includes.linux cimport EDEADLK, atomic_add_int, atomic_load_int, pthread_mutex_destroy, \
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from qtfs_server.lock_notes cimport drop_note, note_ranges
from qtfs_server.lock_ranges cimport held_range, ranges_change, ranges_conflict, ranges_free
from qtfs_server.session cimport handle, node, session
from qtfs_server.shares cimport SHARE_LOCK_WAITS, share_give, share_take

cdef enum:
    BUCKETS = 4096                  # a power of 2
    SEARCH_STEPS = 100000           # owners looked at for one deadlock; longer chains are not found
    SHORTEST_POLL_US = 200
    LONGEST_POLL_US = 20000
    MOST_TRIED = 16                 # file systems that may hang while waits in others are tried
    POLL_SHARE = 8                  # a lock that was waited for this many times as long may be granted so much late

cdef pthread_mutex_t _guard
cdef locked_file *_files[BUCKETS]
cdef lock_wait *_tagged[BUCKETS]    # waits by session and tag
cdef lock_wait *_waiting[BUCKETS]   # waits by session and owner
cdef locked_file *_polled = NULL
cdef locked_file *_tried[MOST_TRIED]
cdef int _tried_count = 0
cdef int32_t _file_count = 0
cdef uint32_t _wait_count = 0
cdef uint64_t _searches = 0
pthread_mutex_init(&_guard, NULL)


cdef uint32_t _bucket(uint64_t one, uint64_t other) noexcept nogil:
    cdef uint64_t mixed = (one * <uint64_t>0x9e3779b97f4a7c15) ^ (other * <uint64_t>0xc2b2ae3d27d4eb4f)
    return <uint32_t>((mixed ^ mixed >> 29) >> 13) & (BUCKETS - 1)


# ---- files -------------------------------------------------------------------------------------------------------

cdef bint nothing_locked() noexcept nogil:
    """Whether nobody holds or awaits a lock that these tables know."""
    return atomic_load_int(&_file_count) == 0


cdef locked_file *_new_file_locked(uint64_t device, uint64_t ino, locked_file **bucket) noexcept nogil:
    cdef locked_file *f = <locked_file *>calloc(1, sizeof(locked_file))
    if f == NULL:
        return NULL
    f.device = device
    f.ino = ino
    f.waits_end = &f.waits
    pthread_mutex_init(&f.turn, NULL)
    f.next = bucket[0]
    bucket[0] = f
    atomic_add_int(&_file_count, 1)
    return f


cdef locked_file *file_enter(session *s, node *n, bint make) noexcept nogil:
    """The record of a node's file, to be left with file_leave; its turn is ours. NULL: there is none, or no memory."""
    cdef locked_file **bucket
    cdef locked_file *f
    cdef uint64_t device
    pthread_mutex_lock(&s.guard)
    device = s.devices[n.device].number
    pthread_mutex_unlock(&s.guard)
    bucket = &_files[_bucket(device, n.ino)]
    pthread_mutex_lock(&_guard)
    f = bucket[0]
    while f != NULL and (f.ino != n.ino or f.device != device):
        f = f.next
    if f == NULL and make:
        f = _new_file_locked(device, n.ino, bucket)
    return _enter_locked(f)


cdef locked_file *_enter_locked(locked_file *f) noexcept nogil:
    """Take a file's turn, the guard being ours until then."""
    if f != NULL:
        f.references += 1
    pthread_mutex_unlock(&_guard)
    if f != NULL:
        pthread_mutex_lock(&f.turn)
    return f


cdef void file_hold(locked_file *f) noexcept nogil:
    """One more reference: whoever takes the turn of it by himself gives both back with file_leave."""
    pthread_mutex_lock(&_guard)
    f.references += 1
    pthread_mutex_unlock(&_guard)


cdef void file_leave(locked_file *f) noexcept nogil:
    """Give the turn back; a record that says nothing goes."""
    cdef locked_file **at
    pthread_mutex_unlock(&f.turn)
    pthread_mutex_lock(&_guard)
    f.references -= 1
    if f.references == 0 and f.owners == NULL and f.waits == NULL:      # then it is not polled either
        at = &_files[_bucket(f.device, f.ino)]
        while at[0] != f:
            at = &at[0].next
        at[0] = f.next
        pthread_mutex_destroy(&f.turn)
        free(f)
        atomic_add_int(&_file_count, -1)
    pthread_mutex_unlock(&_guard)


# ---- owners: the file's turn is the caller's ---------------------------------------------------------------------

cdef lock_owner *owner_find(locked_file *f, const session *s, uint64_t owner) noexcept nogil:
    """Who is known by that number among those who hold locks of the file; or NULL."""
    cdef lock_owner *o = f.owners
    while o != NULL and (o.owner != owner or o.s != s):
        o = o.next
    return o


cdef lock_owner *owner_new(locked_file *f, session *s, uint64_t owner, uint64_t handle, int fd) noexcept nogil:
    """One more owner, with a descriptor that is taken over. NULL: no memory, and the descriptor stays the caller's."""
    cdef lock_owner *o = <lock_owner *>calloc(1, sizeof(lock_owner))
    cdef lock_owner *first
    if o == NULL:
        return NULL
    o.s = s
    o.ranges.s = s
    o.owner = owner
    o.handle = handle
    o.fd = fd
    o.file = f
    descriptor_opened()
    pthread_mutex_lock(&_guard)
    o.next = f.owners
    f.owners = o
    first = <lock_owner *>s.lock_owners
    o.next_of_session = first
    o.of_session = <lock_owner **>&s.lock_owners
    if first != NULL:
        first.of_session = &o.next_of_session
    s.lock_owners = o
    s.lock_files += 1
    pthread_mutex_unlock(&_guard)
    return o


cdef void owner_drop(lock_owner *o) noexcept nogil:
    """Forget an owner; its descriptor is closed, and its locks end."""
    cdef lock_owner **at = &o.file.owners
    pthread_mutex_lock(&_guard)
    while at[0] != o:
        at = &at[0].next
    at[0] = o.next
    o.of_session[0] = o.next_of_session
    o.s.lock_files -= 1
    if o.next_of_session != NULL:
        o.next_of_session.of_session = o.of_session
    pthread_mutex_unlock(&_guard)
    drop_note(o.s, o.note)
    close_counted(o.fd)
    ranges_free(&o.ranges)
    free(o)


cdef void owner_note(lock_owner *o, const lock_request *what) noexcept nogil:
    """Note what the kernel has granted, after ranges_reserve."""
    pthread_mutex_lock(&_guard)
    ranges_change(&o.ranges, what.start, what.end, what.type)
    pthread_mutex_unlock(&_guard)
    note_ranges(o.s, &o.note, o.owner, o.handle, &o.ranges)


cdef locked_file *file_of_session(session *s, uint64_t *owner) noexcept nogil:
    """Enter a file of which somebody of a session holds locks, and who that is; NULL: there is none."""
    cdef lock_owner *o
    pthread_mutex_lock(&_guard)
    o = <lock_owner *>s.lock_owners
    if o != NULL:
        owner[0] = o.owner
    return _enter_locked(o.file if o != NULL else NULL)


cdef bint _excludes(const lock_owner *o, const session *s, const lock_request *what) noexcept nogil:
    """Whether what an owner holds is in the way of somebody's request."""
    return (o.owner != what.owner or o.s != s) and ranges_conflict(&o.ranges, what.start, what.end, what.type)


cdef bint is_held(locked_file *f, const session *s, const lock_request *what) noexcept nogil:
    """Whether another owner that we know is in the way."""
    cdef lock_owner *o = f.owners
    while o != NULL and not _excludes(o, s, what):
        o = o.next
    return o != NULL


# ---- waits -------------------------------------------------------------------------------------------------------

cdef lock_wait **_find_tagged_locked(const session *s, uint64_t tag) noexcept nogil:
    cdef lock_wait **at = &_tagged[_bucket(<uint64_t>s, tag)]
    while at[0] != NULL and (at[0].tag != tag or at[0].s != s):
        at = &at[0].next_tagged
    return at


cdef bint is_waiting(const session *s, uint64_t tag) noexcept nogil:
    """Whether there is such a wait."""
    cdef bint found
    pthread_mutex_lock(&_guard)
    found = _find_tagged_locked(s, tag)[0] != NULL
    pthread_mutex_unlock(&_guard)
    return found


cdef int _may_wait_locked(lock_wait *w) noexcept nogil:
    if not w.what.flags & LOCK_FLOCK and _waits_for_itself_locked(w):
        return -EDEADLK
    return 0 if share_take(w.s, SHARE_LOCK_WAITS, 1) else -ENOLCK


cdef int wait_add(lock_wait *w) noexcept nogil:
    """Put a wait behind all others of its file, whose turn is the caller's. 0; -ENOLCK: there are too many; -EDEADLK."""
    global _wait_count
    cdef lock_wait **tagged = &_tagged[_bucket(<uint64_t>w.s, w.tag)]
    cdef lock_wait **waiting = &_waiting[_bucket(<uint64_t>w.s, w.what.owner)]
    cdef int error
    pthread_mutex_lock(&_guard)
    error = _may_wait_locked(w)
    if error == 0:
        _wait_count += 1
        w.file.waits_end[0] = w
        w.file.waits_end = &w.next
        w.next_tagged = tagged[0]
        tagged[0] = w
        w.next_of_owner = waiting[0]
        waiting[0] = w
    pthread_mutex_unlock(&_guard)
    return error


cdef lock_wait *wait_take(lock_wait **at) noexcept nogil:
    """Take a wait out of its file, whose turn is the caller's."""
    global _wait_count
    cdef lock_wait *w = at[0]
    cdef lock_wait **chain
    pthread_mutex_lock(&_guard)
    _wait_count -= 1
    share_give(w.s, SHARE_LOCK_WAITS, 1)
    at[0] = w.next
    if w.next == NULL:
        w.file.waits_end = at
    _find_tagged_locked(w.s, w.tag)[0] = w.next_tagged
    chain = &_waiting[_bucket(<uint64_t>w.s, w.what.owner)]
    while chain[0] != w:
        chain = &chain[0].next_of_owner
    chain[0] = w.next_of_owner
    if w.file.polled and w.file.waits == NULL:
        _unpoll_locked(w.file)
    pthread_mutex_unlock(&_guard)
    w.next = NULL
    return w


cdef locked_file *file_of_wait(const session *s, uint64_t tag) noexcept nogil:
    """Enter the file of a wait, which may have ended meanwhile; NULL: there is no such wait."""
    cdef lock_wait *w
    pthread_mutex_lock(&_guard)
    w = _find_tagged_locked(s, tag)[0]
    return _enter_locked(w.file if w != NULL else NULL)


cdef locked_file *file_awaited(const session *s) noexcept nogil:
    """Enter a file that somebody of a session waits for; NULL: there is none."""
    cdef lock_wait *w = NULL
    cdef uint32_t i = 0
    pthread_mutex_lock(&_guard)
    while w == NULL and i < BUCKETS and _wait_count > 0:
        w = _tagged[i]
        while w != NULL and w.s != s:
            w = w.next_tagged
        i += 1
    return _enter_locked(w.file if w != NULL else NULL)


cdef void count_locks(const session *s, lock_count *out) noexcept nogil:
    """What a session holds and waits for."""
    cdef lock_owner *o
    cdef held_range *r
    cdef lock_wait *w
    cdef uint32_t i
    out.owners = out.ranges = out.waits = 0
    pthread_mutex_lock(&_guard)
    o = <lock_owner *>s.lock_owners
    while o != NULL:
        out.owners += 1
        r = o.ranges.first
        while r != NULL:
            out.ranges += 1
            r = r.next
        o = o.next_of_session
    for i in range(BUCKETS if _wait_count > 0 else 0):
        w = _tagged[i]
        while w != NULL:
            out.waits += w.s == s
            w = w.next_tagged
    pthread_mutex_unlock(&_guard)


# ---- deadlocks ---------------------------------------------------------------------------------------------------

cdef lock_wait *_visit_waits_locked(const lock_owner *o, lock_wait *to_visit) noexcept nogil:
    """Put what an owner waits for before what else is to be visited, each wait once in a search."""
    cdef lock_wait *w = _waiting[_bucket(<uint64_t>o.s, o.owner)]
    while w != NULL:
        if w.s == o.s and w.what.owner == o.owner and w.search != _searches and not w.what.flags & LOCK_FLOCK:
            w.search = _searches
            w.next_to_visit = to_visit
            to_visit = w
        w = w.next_of_owner
    return to_visit


cdef bint _leads_back_locked(const session *s, uint64_t owner, lock_wait *to_visit) noexcept nogil:
    cdef lock_wait *w
    cdef lock_owner *o
    cdef int steps = 0
    while to_visit != NULL and steps < SEARCH_STEPS:
        w = to_visit
        to_visit = w.next_to_visit
        o = w.file.owners
        while o != NULL:
            steps += 1
            if _excludes(o, w.s, &w.what):
                if o.owner == owner and o.s == s:
                    return True
                to_visit = _visit_waits_locked(o, to_visit)
            o = o.next
    return False


cdef bint _waits_for_itself_locked(lock_wait *w) noexcept nogil:
    """Whether those in the way of a wait (not yet added) wait in turn, perhaps through others, for its owner.

    As Linux does, an owner who waits in one thread is taken to do nothing in another: fcntl(2), EDEADLK.
    """
    global _searches
    _searches += 1
    w.search = _searches
    w.next_to_visit = NULL
    return _leads_back_locked(w.s, w.what.owner, w)


# ---- polling -----------------------------------------------------------------------------------------------------

cdef void _poll_locked(locked_file *f) noexcept nogil:
    global _polled
    f.polled = True
    f.next_polled = _polled
    f.in_polled = &_polled
    if _polled != NULL:
        _polled.in_polled = &f.next_polled
    _polled = f


cdef void _unpoll_locked(locked_file *f) noexcept nogil:
    f.polled = False
    f.in_polled[0] = f.next_polled
    if f.next_polled != NULL:
        f.next_polled.in_polled = f.in_polled


cdef void file_poll(locked_file *f, bint wanted, bint progress, int64_t now) noexcept nogil:
    """Have a file, whose turn is the caller's, tried again after a while, sooner if there was progress; or no more."""
    pthread_mutex_lock(&_guard)
    if progress or not f.polled:
        f.polled_since_us = now
    if wanted and not f.polled:
        _poll_locked(f)
    elif f.polled and not wanted:
        _unpoll_locked(f)
    f.due_us = now + min(max((now - f.polled_since_us) // POLL_SHARE, <int64_t>SHORTEST_POLL_US),
                         <int64_t>LONGEST_POLL_US)
    pthread_mutex_unlock(&_guard)


cdef bint _may_hang_locked(const locked_file *f) noexcept nogil:
    """Whether a thread that has been replaced is at this file, or at another one of its file system."""
    cdef int i
    for i in range(_tried_count):
        if _tried[i].device == f.device:
            return True
    return _tried_count == MOST_TRIED


cdef locked_file *file_due(int64_t now, int64_t *next_us) noexcept nogil:
    """A file that is to be tried now, to be given back with file_tried; its turn is still to be taken, which may hang.

    NULL: none is, and the first will be at `next_us` (0: none at all).
    """
    global _tried_count
    cdef locked_file *f
    next_us[0] = 0
    pthread_mutex_lock(&_guard)
    f = _polled
    while f != NULL and (f.due_us > now or _may_hang_locked(f)):
        if f.due_us > now:
            next_us[0] = f.due_us if next_us[0] == 0 else min(next_us[0], f.due_us)
        f = f.next_polled
    if f != NULL:
        f.references += 1
        _tried[_tried_count] = f
        _tried_count += 1
    pthread_mutex_unlock(&_guard)
    return f


cdef void file_tried(const locked_file *f) noexcept nogil:
    """A file that was due was tried; it is still to be left."""
    global _tried_count
    cdef int i = 0
    pthread_mutex_lock(&_guard)
    while _tried[i] != f:
        i += 1
    _tried_count -= 1
    _tried[i] = _tried[_tried_count]
    pthread_mutex_unlock(&_guard)
