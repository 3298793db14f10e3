"""Who holds which POSIX locks of which files, and who waits for locks: of all sessions.

A file is found by device and inode number, whichever session, mount or node it is reached by. Its record exists while
somebody holds, waits or just looks; the descriptors of those keep its inode number from being used again.

Lock order: locked_file.turn, the guard of all tables, session.guard. The turn is held over fcntl(2), which does not
wait, so that the tables tell what the kernel has granted; the guard over look-ups in memory only. Owners, their ranges
and waits change under both, so either is enough to read them.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from qtfs_common.protocol cimport lock_request
from qtfs_server.includes.linux cimport pthread_mutex_t
from qtfs_server.lock_ranges cimport held_ranges
from qtfs_server.session cimport handle, node, session

cdef struct lock_owner:             # one owner's POSIX locks of one file: an open file description (F_OFD_SETLK)
    session *s
    uint64_t owner
    uint64_t handle                 # the one its first lock came by; what is left of its locks goes with it
    int32_t fd
    held_ranges ranges
    uint32_t note                   # what the next engine is told of them: lock_notes.pxd
    locked_file *file
    lock_owner *next                # of the file
    lock_owner *next_of_session
    lock_owner **of_session         # what points to it in that list

cdef struct lock_wait:              # one SETLKW that could not be granted yet
    session *s
    handle *h                       # pinned
    lock_request what
    uint64_t tag
    locked_file *file
    lock_wait *next                 # of the file, in the order of their coming; then of those that have ended
    lock_wait *next_tagged          # in its hash chain
    lock_wait *next_of_owner        # in its hash chain
    lock_wait *next_to_visit        # in a search for a deadlock
    uint64_t search                 # the last one that came by
    int error                       # once it has ended: its answer

cdef struct locked_file:
    uint64_t device                 # st_dev
    uint64_t ino
    int references
    pthread_mutex_t turn
    lock_owner *owners
    lock_wait *waits
    lock_wait **waits_end
    locked_file *next               # in its hash chain
    bint polled                     # somebody waits for what a process of the server holds
    int64_t polled_since_us
    int64_t due_us                  # when to try again
    locked_file *next_polled
    locked_file **in_polled         # what points to it in that list

cdef struct lock_count:             # of one session
    uint64_t owners                 # of POSIX locks, each counted once for each file
    uint64_t ranges                 # that they hold
    uint64_t waits                  # SETLKW that wait, of either kind

cdef bint nothing_locked() noexcept nogil
cdef void count_locks(const session *s, lock_count *out) noexcept nogil
cdef locked_file *file_enter(session *s, node *n, bint make) noexcept nogil
cdef void file_hold(locked_file *f) noexcept nogil
cdef void file_leave(locked_file *f) noexcept nogil
cdef lock_owner *owner_find(locked_file *f, const session *s, uint64_t owner) noexcept nogil
cdef lock_owner *owner_new(locked_file *f, session *s, uint64_t owner, uint64_t handle, int fd) noexcept nogil
cdef void owner_drop(lock_owner *o) noexcept nogil
cdef void owner_note(lock_owner *o, const lock_request *what) noexcept nogil
cdef locked_file *file_of_session(session *s, uint64_t *owner) noexcept nogil
cdef bint is_held(locked_file *f, const session *s, const lock_request *what) noexcept nogil

cdef bint is_waiting(const session *s, uint64_t tag) noexcept nogil
cdef int wait_add(lock_wait *w) noexcept nogil
cdef lock_wait *wait_take(lock_wait **at) noexcept nogil
cdef locked_file *file_of_wait(const session *s, uint64_t tag) noexcept nogil
cdef locked_file *file_awaited(const session *s) noexcept nogil

cdef void file_poll(locked_file *f, bint wanted, bint progress, int64_t now) noexcept nogil
cdef locked_file *file_due(int64_t now, int64_t *next_us) noexcept nogil
cdef void file_tried(const locked_file *f) noexcept nogil
