"""Requests that hang in the server's file systems: a dead NFS server, a stopped FUSE daemon, a frozen file system.

Who watches the workers (service.pyx) tells here which of them have been at one request for long, and this finds out which
file system that is. A few requests of each session may hang in one; what comes beyond them is not begun, but answered
ERROR_DELAYED. While nothing hangs, a request pays for a few stores and one look.

A request hangs where its node lies, or, if it looks a name up, in what is mounted there: the *crossing*.

A frozen file system can still be read. So a request that changes nothing is not kept waiting by those that would change
something.

Lock order: session.guard, _guard.
"""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset, strlen

from qtfs_common.protocol cimport *
from qtfs_server.attributes cimport stat_known
from qtfs_server.descriptors cimport fd_path
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_PATH, O_TRUNC, RESOLVE_CACHED, SYS_openat2, \
    atomic_load_int, atomic_store_int, close, makedev, open_how, pthread_mutex_init, pthread_mutex_lock, \
    pthread_mutex_t, pthread_mutex_unlock, statx_t, syscall
from qtfs_server.node_table cimport record_of_locked
from qtfs_server.session cimport HANDLE_IN_USE, NO_INDEX, RECORD_AWAKE, handle_at, record, record_at

import logging
import os

from qtfs_common import mountinfo

log = logging.getLogger(__name__)

cdef enum:
    MOST_OF_MOUNT = 8               # requests of a session that may hang in one file system
    MOST_OF_SESSION = 24            # in all of them that are known to hang
    MAX_CROSSINGS = 64

cdef enum:                          # _kinds: of an operation
    BY_HANDLE = 1                   # its body begins with a handle
    CHANGES = 2                     # it waits while the file system is frozen
    AT_ONCE = 4                     # never delayed: it cannot hang for long, or nobody would ask again

cdef struct stuck_request:
    uint64_t session
    uint64_t number                 # st_dev
    bint changes
    bint closes

cdef struct whereabouts:
    uint64_t number                 # st_dev
    uint64_t ino

cdef struct crossing:               # a name that leads into a file system that hangs
    whereabouts directory
    uint64_t number
    char name[MAX_NAME + 1]

cdef pthread_mutex_t _guard
cdef stuck_request _stuck[MAX_WORKERS]
cdef int32_t _stuck_count = 0       # atomic as a hint; else under _guard
cdef crossing _crossings[MAX_CROSSINGS]
cdef int32_t _crossing_count = 0
cdef uint8_t _kinds[OP_COUNT]
pthread_mutex_init(&_guard, NULL)


cdef void _fill_kinds() noexcept:
    cdef int op
    for op in (OP_READ, OP_WRITE, OP_RELEASE, OP_FSYNC, OP_FLUSH, OP_READDIR, OP_RELEASEDIR, OP_FSYNCDIR, OP_GETLK,
               OP_SETLK, OP_SETLKW, OP_IOCTL, OP_FALLOCATE, OP_LSEEK, OP_COPY_FILE_RANGE, OP_POLL):
        _kinds[op] |= BY_HANDLE
    for op in (OP_SETATTR, OP_SYMLINK, OP_MKNOD, OP_MKDIR, OP_UNLINK, OP_RMDIR, OP_RENAME, OP_LINK, OP_WRITE, OP_FSYNC,
               OP_SETXATTR, OP_REMOVEXATTR, OP_FLUSH, OP_FSYNCDIR, OP_CREATE, OP_TMPFILE, OP_FALLOCATE,
               OP_COPY_FILE_RANGE, OP_SYNCFS, OP_RELEASE):
        _kinds[op] |= CHANGES
    for op in (OP_FORGET, OP_RELEASE, OP_RELEASEDIR, OP_SYSMOUNT, OP_SYSUMOUNT, OP_KILL, OP_SETAFFINITY,
               OP_GETAFFINITY, OP_PROCESSES, OP_LIST_MOUNTS):
        _kinds[op] |= AT_ONCE


_fill_kinds()


# ---- for each request ------------------------------------------------------------------------------------------------

cdef bint _truncates(const request *r) noexcept nogil:
    return r.head.op == OP_OPEN and r.body_bytes == sizeof(open_request) and \
        (<const open_request *>r.body).flags & O_TRUNC != 0


cdef void note_execution(request *r) noexcept nogil:
    """Note what the worker is going to do."""
    cdef execution *at = r.at
    cdef uint8_t kind = _kinds[r.head.op]
    at.session = r.s.id
    at.node = r.who.node
    at.handle = 0
    at.name = NULL
    if kind & BY_HANDLE and r.body_bytes >= sizeof(uint64_t):
        memcpy(&at.handle, r.body, sizeof(uint64_t))
    at.changes = kind & CHANGES or _truncates(r)
    at.op = r.head.op


cdef bint has_to_wait(session *s, const execution *at, const uint8_t *body, size_t body_bytes) noexcept nogil:
    """Whether a request is not to be begun: enough of its session hang already where it would go to."""
    return atomic_load_int(&_stuck_count) > 0 and _has_to_wait(s, at, body, body_bytes)


cdef bint _has_to_wait(session *s, const execution *at, const uint8_t *body, size_t body_bytes) noexcept nogil:
    cdef whereabouts where
    cdef uint64_t number
    cdef bint wait
    if _kinds[at.op] & AT_ONCE or not _find(s, at, &where):
        return False
    pthread_mutex_lock(&_guard)
    number = _crossing_locked(&where, <const char *>body, body_bytes) if at.op == OP_LOOKUP else 0
    wait = _is_full_locked(s.id, number if number != 0 else where.number, at.changes)
    pthread_mutex_unlock(&_guard)
    return wait


cdef bint _is_full_locked(uint64_t session_id, uint64_t number, bint changes) noexcept nogil:
    cdef int32_t i
    cdef int here = 0, in_all = 0
    for i in range(_stuck_count):
        if _stuck[i].session == session_id:
            in_all += 1
            if _stuck[i].number == number and (changes or not _stuck[i].changes):
                here += 1
    return here >= MOST_OF_MOUNT or (here > 0 and in_all >= MOST_OF_SESSION)


cdef uint64_t _crossing_locked(const whereabouts *directory, const char *name, size_t name_bytes) noexcept nogil:
    """The st_dev of the file system that hangs where a name leads; 0: of none."""
    cdef int32_t i
    cdef crossing *c
    for i in range(_crossing_count):
        c = &_crossings[i]
        if c.directory.ino == directory.ino and c.directory.number == directory.number and \
                strlen(c.name) == name_bytes and memcmp(c.name, name, name_bytes) == 0:
            return c.number
    return 0


cdef bint leads_to_stuck(session *s, const node *directory, const char *name) noexcept nogil:
    """Whether a name in a pinned directory is better left alone: what is mounted there hangs."""
    cdef whereabouts where
    cdef bint leads
    if atomic_load_int(&_crossing_count) == 0:
        return False
    where.ino = directory.ino
    pthread_mutex_lock(&s.guard)
    where.number = s.devices[directory.device].number
    pthread_mutex_unlock(&s.guard)
    pthread_mutex_lock(&_guard)
    leads = _crossing_locked(&where, name, strlen(name)) != 0
    pthread_mutex_unlock(&_guard)
    return leads


cdef bint _hangs(uint64_t number, bint even_close) noexcept nogil:
    cdef int32_t i
    cdef bint found = False
    if atomic_load_int(&_stuck_count) == 0:
        return False
    pthread_mutex_lock(&_guard)
    for i in range(_stuck_count):
        if _stuck[i].number == number and (not even_close or _stuck[i].closes or not _stuck[i].changes):
            found = True
    pthread_mutex_unlock(&_guard)
    return found


cdef bint is_stuck(uint64_t number) noexcept nogil:
    """Whether requests hang in the file system with that st_dev."""
    return _hangs(number, False)


cdef bint close_hangs(uint64_t number) noexcept nogil:
    """Whether close(2) is likely to hang there, too: where a file system is only frozen, most do not."""
    return _hangs(number, True)


# ---- where a request is ----------------------------------------------------------------------------------------------

cdef bint _find(session *s, const execution *at, whereabouts *out) noexcept nogil:
    """Where the handle or, without one, the node of a request lies; False: there is none. RELEASE has ended its handle."""
    cdef uint32_t index
    cdef bint found
    pthread_mutex_lock(&s.guard)
    index = _record_of_handle_locked(s, at.handle) if at.handle != 0 else NO_INDEX
    if index == NO_INDEX:
        index = record_of_locked(s, at.node)
    found = index != NO_INDEX
    if found:
        _fill_locked(s, record_at(s, index), out)
    pthread_mutex_unlock(&s.guard)
    return found


cdef uint32_t _record_of_handle_locked(session *s, uint64_t id) noexcept nogil:
    """The index of the record of a handle's node, or NO_INDEX. An old handle's is as good."""
    cdef uint32_t index = <uint32_t>(id >> 2)
    if index == NO_INDEX or index >= s.handle_count or not handle_at(s, index).flags & HANDLE_IN_USE:
        return NO_INDEX
    return handle_at(s, index).node.index


cdef void _fill_locked(session *s, const record *r, whereabouts *out) noexcept nogil:
    cdef uint16_t device = r.body.awake.device if r.stamp & RECORD_AWAKE else s.shapes[r.shape].key.device
    out.number = s.devices[device].number
    out.ino = r.ino


# ---- for whoever watches the workers -----------------------------------------------------------------------------------

cdef uint64_t judge(session *s, const execution *at):
    """The st_dev of what a worker hangs in, at a request of that session; 0: nobody knows."""
    cdef whereabouts where
    cdef uint64_t number = 0
    if not _find(s, at, &where):
        return 0
    if at.name != NULL:
        number = _mounted_at(s, at.node, at.name)
    return number if number != 0 else where.number


cdef uint64_t _mounted_at(session *s, uint64_t id, const char *name):
    """The st_dev of what is mounted on a name in a directory that a worker has pinned; 0: nothing."""
    cdef char directory[MAX_PATH]
    cdef uint32_t index
    cdef int fd = -1
    cdef int length = 0
    pthread_mutex_lock(&s.guard)
    index = record_of_locked(s, id)
    if index != NO_INDEX and record_at(s, index).stamp & RECORD_AWAKE:
        fd = record_at(s, index).body.awake.fd
    if fd >= 0:
        length = fd_path(fd, directory, sizeof(directory))      # a readlink(2) that asks no file system
    pthread_mutex_unlock(&s.guard)
    if length <= 0:
        return 0
    path = directory[:length].rstrip(b"/") + b"/" + <bytes>name
    number = 0
    for mount in mountinfo.read().values():
        if mount.path == path:
            number = makedev(mount.major, mount.minor)          # the last one covers the others
    return number


cdef void _note_crossing(path: bytes, uint64_t number):
    """Note what leads into a file system that hangs: the name of one of its mount points."""
    global _crossing_count
    cdef whereabouts directory
    cdef crossing *c
    head, name = os.path.split(path)
    cdef const char *text = name
    if not name or not _find_directory(head, &directory):
        return
    pthread_mutex_lock(&_guard)
    if _crossing_count < MAX_CROSSINGS:
        c = &_crossings[_crossing_count]
        c.directory = directory
        c.number = number
        memcpy(c.name, text, len(name) + 1)
        atomic_store_int(&_crossing_count, _crossing_count + 1)
    pthread_mutex_unlock(&_guard)


cdef bint _find_directory(path: bytes, whereabouts *out):
    """Where a path leads, if the kernel can tell without asking a file system, which might hang, too."""
    cdef const char *text = path
    cdef open_how how
    cdef statx_t st
    cdef int fd, error
    memset(&how, 0, sizeof(how))
    how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC
    how.resolve = RESOLVE_CACHED
    fd = <int>syscall(SYS_openat2, AT_FDCWD, text, &how, sizeof(how))
    if fd < 0:
        return False
    error = stat_known(fd, &st)
    close(fd)
    out.number = makedev(st.stx_dev_major, st.stx_dev_minor)
    out.ino = st.stx_ino
    return error == 0


cdef void publish(list stuck):
    """Have these be the requests that hang: (session id, st_dev, whether it changes something, operation)."""
    global _stuck_count
    cdef int32_t count = 0
    before = {_stuck[i].number for i in range(_stuck_count)}
    pthread_mutex_lock(&_guard)
    for id, number, changes, op in stuck[:MAX_WORKERS]:
        _stuck[count].session = id
        _stuck[count].number = number
        _stuck[count].changes = changes
        _stuck[count].closes = op in (OP_RELEASE, OP_RELEASEDIR, OP_FLUSH)
        count += 1
    atomic_store_int(&_stuck_count, count)
    _drop_crossings_locked()
    pthread_mutex_unlock(&_guard)
    _note_changes(before, {number for _, number, _, _ in stuck})


cdef void _drop_crossings_locked() noexcept:
    """Forget the ways to what does not hang any more."""
    global _crossing_count
    cdef int32_t i, j, kept = 0
    for i in range(_crossing_count):
        for j in range(_stuck_count):
            if _stuck[j].number == _crossings[i].number:
                _crossings[kept] = _crossings[i]
                kept += 1
                break
    atomic_store_int(&_crossing_count, kept)


def _note_changes(before: set[int], now: set[int]) -> None:
    """Note the ways to what hangs since the last look, and tell who looks after the server."""
    table = mountinfo.read().values() if before != now else ()
    for number in sorted(before ^ now):
        paths = [mount.path for mount in table if makedev(mount.major, mount.minor) == number]
        what = paths[0].decode(errors="backslashreplace") if paths else f"device {number:#x}"
        if number not in now:
            log.warning("%s answers again", what)
            continue
        log.warning("%s does not answer: requests hang there", what)
        for path in paths:
            _note_crossing(path, number)


def stuck_requests() -> int:
    """How many requests hang."""
    return _stuck_count
