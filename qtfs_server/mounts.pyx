"""What sessions hold of the server's mounts: as little as can be, since a mount that is held cannot be unmounted.

An O_PATH descriptor holds its mount. So nodes that do not lie on the mount of their session's root give theirs up soon
after their last use (letting_go.pyx), and so does the descriptor that open_by_handle_at(2) needs. What stays is the
mount's id; when a node there is used again, the mount is found by it in /proc/self/mountinfo, and opened by its path.
An open file does hold its mount, as one of a process of the server would.

Sources: mount_namespaces(7), proc_pid_mountinfo(5), statx(2), open_by_handle_at(2).
"""
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from qtfs_common.includes.polling cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_write
from qtfs_server.attributes cimport mount_id_of, stat_known
from qtfs_server.descriptors cimport close_counted, descriptor_opened, proc_path
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_PATH, O_RDONLY, \
    RESOLVE_NO_SYMLINKS, SYS_openat2, atomic_load_int, atomic_store_int, close, open_how, openat, pthread_mutex_lock, \
    pthread_mutex_unlock, statx_t, syscall
from qtfs_server.session cimport RECORD_LISTED, device, record, record_at, session

import logging
import threading
from collections.abc import Iterable

from qtfs_common import mountinfo

log = logging.getLogger(__name__)

cdef enum:
    FIRST_HOLDERS = 256

# Whether anything may have to be let go, and what wakes whoever sees to that.
cdef int32_t _holding = 0
cdef int _holding_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)


# ---- who holds a mount -----------------------------------------------------------------------------------------------

cdef bint is_let_go(session *s, uint32_t on_device) noexcept nogil:
    """Whether descriptors on a mount are not to be kept. That of the root is kept: the client counts on it."""
    return on_device != 0 or s.lets_root_go


cdef bint is_gone(session *s, uint32_t on_device) noexcept nogil:
    """Whether a mount was found to be unmounted."""
    cdef bint gone
    pthread_mutex_lock(&s.guard)
    gone = s.devices[on_device].gone
    pthread_mutex_unlock(&s.guard)
    return gone


cdef int holding_fd() noexcept nogil:
    """An eventfd that is written to when there begins to be something to let go."""
    return _holding_fd


cdef void set_holding(bint holding) noexcept nogil:
    """Note whether there is something to let go."""
    if not holding:
        atomic_store_int(&_holding, 0)
    elif not atomic_load_int(&_holding):
        atomic_store_int(&_holding, 1)
        eventfd_write(_holding_fd, 1)


cdef void note_holder_locked(session *s, uint32_t index) noexcept nogil:
    """A node has got a descriptor on a mount that is to be let go. Without memory for the note, it is held for longer."""
    cdef record *r = record_at(s, index)
    cdef uint32_t room
    cdef uint32_t *larger
    if not r.stamp & RECORD_LISTED:
        if s.holder_count == s.holder_room:
            room = max(s.holder_room * 2, <uint32_t>FIRST_HOLDERS)
            larger = <uint32_t *>realloc(s.holders, room * sizeof(uint32_t))
            if larger == NULL:
                return
            s.holders = larger
            s.holder_room = room
        s.holders[s.holder_count] = index
        s.holder_count += 1
        r.stamp |= RECORD_LISTED
    set_holding(True)


# ---- descriptors on mounts -------------------------------------------------------------------------------------------

cdef int borrow_mount(session *s, uint32_t on_device) noexcept nogil:
    """A descriptor on a mount that is let go, for open_by_handle_at(2); it stays open until return_mount.

    -1: the mount cannot be reached by its path, or its root is no directory.
    """
    cdef uint64_t mount_id
    cdef uint32_t listed_id
    cdef int known, fd
    pthread_mutex_lock(&s.guard)
    known = _borrow_locked(s, on_device, -1)
    mount_id = s.devices[on_device].mount_id
    listed_id = s.devices[on_device].listed_id
    pthread_mutex_unlock(&s.guard)
    if known >= 0:
        return known
    fd = open_mount(mount_id, listed_id)
    if fd < 0:
        return -1
    pthread_mutex_lock(&s.guard)
    known = _borrow_locked(s, on_device, fd)
    pthread_mutex_unlock(&s.guard)
    if known != fd:
        close(fd)
    set_holding(True)
    return known


cdef int _borrow_locked(session *s, uint32_t on_device, int fresh) noexcept nogil:
    """One more user of a mount's descriptor, which `fresh` becomes if there is none. -1: there is none."""
    cdef device *d = &s.devices[on_device]
    if d.mount_fd < 0 and fresh >= 0:
        d.mount_fd = fresh
        descriptor_opened()
    if d.mount_fd >= 0:
        d.mount_users += 1
    return d.mount_fd


cdef void return_mount(session *s, uint32_t on_device, bint keep) noexcept nogil:
    """Give back what borrow_mount gave; `keep` it open for a while, for who comes next."""
    pthread_mutex_lock(&s.guard)
    s.devices[on_device].mount_users -= 1
    if keep:
        s.devices[on_device].warm = True
    pthread_mutex_unlock(&s.guard)


cdef int _take_idle_locked(session *s, uint32_t *at) noexcept nogil:
    """The next descriptor on a mount that was not used since the last look, which is the caller's now; -1: no more."""
    cdef device *d
    cdef int fd
    while at[0] < s.device_count:
        d = &s.devices[at[0]]
        at[0] += 1
        if d.mount_fd < 0 or not is_let_go(s, at[0] - 1):
            continue
        if d.mount_users > 0 or (d.warm and not d.gone):
            d.warm = False
            continue
        fd = d.mount_fd
        d.mount_fd = -1
        return fd
    return -1


cdef void close_idle_mounts(session *s) noexcept nogil:
    """Close descriptors on mounts that were not used since the last call. After a lazy umount that may unmount, and hang."""
    cdef uint32_t at = 0
    cdef int fd = 0
    while fd >= 0:
        pthread_mutex_lock(&s.guard)
        fd = _take_idle_locked(s, &at)
        pthread_mutex_unlock(&s.guard)
        close_counted(fd)


cdef int open_mount(uint64_t mount_id, uint32_t listed_id) noexcept nogil:
    """Open the root directory of a mount by its path in the mount table. A descriptor or -1."""
    with gil:
        try:
            return _reach(mount_id, listed_id)
        except Exception as error:  # out of descriptors or memory: what leaves here as one would count as descriptor 0
            log.debug("a mount cannot be reached: %s", error)
            return -1


cdef int _reach(uint64_t mount_id, uint32_t listed_id) except -2:
    """The same with the table as it was last read, and if that does not lead there, with that of now."""
    cdef int fd
    for table in (_table.known, _table.read):
        mount = table().get(listed_id)
        if mount is not None:
            fd = _open_if(mount.path, mount_id)
            if fd >= 0:
                return fd
    return -1


cdef int _open_if(bytes path, uint64_t mount_id) noexcept:
    """Open a directory if a path leads to it, not through symbolic links, and it lies on that mount."""
    cdef const char *text = path
    cdef char link[32]
    cdef open_how how
    cdef statx_t st
    cdef int fd, opened = -1
    memset(&how, 0, sizeof(how))
    how.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC
    how.resolve = RESOLVE_NO_SYMLINKS
    with nogil:
        fd = <int>syscall(SYS_openat2, AT_FDCWD, text, &how, sizeof(how))
        if fd >= 0:
            if stat_known(fd, &st) == 0 and mount_id_of(&st) == mount_id:
                proc_path(link, fd)
                opened = openat(AT_FDCWD, link, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
            close(fd)
    return opened


# ---- the table -------------------------------------------------------------------------------------------------------

class _Table:
    """The mount table as it was last read. Any thread may read it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._mounts: dict[int, mountinfo.Mount] = {}

    def known(self) -> dict[int, mountinfo.Mount]:
        return self._mounts

    def read(self) -> dict[int, mountinfo.Mount]:
        with self._guard:
            self._mounts = mountinfo.read()
            return self._mounts


_table = _Table()


def read_table() -> dict[int, mountinfo.Mount]:
    """The mounts of the engine's namespace, by their numbers in /proc/self/mountinfo. Not to be changed."""
    return _table.read()


# ---- ids that are never used again -----------------------------------------------------------------------------------

cdef extern from *:
    """
    #define QTFS_LSMT_ROOT UINT64_MAX
    """
    const uint64_t LSMT_ROOT "QTFS_LSMT_ROOT"       # listmount(2): of the whole namespace

cdef enum:
    SYS_STATMOUNT = 457             # statmount(2) has one number everywhere
    STATMOUNT_MNT_BASIC = 2
    SYS_LISTMOUNT = 458
    LISTED_AT_ONCE = 512

cdef struct mnt_id_req:             # <linux/mount.h>, Linux 6.8
    uint32_t size
    uint32_t spare
    uint64_t mnt_id
    uint64_t param

cdef struct statmount_t:            # the same, as far as it is needed
    uint32_t size
    uint32_t spare
    uint64_t mask
    uint32_t sb_dev_major
    uint32_t sb_dev_minor
    uint64_t sb_magic
    uint32_t sb_flags
    uint32_t fs_type
    uint64_t mnt_id
    uint64_t mnt_parent_id
    uint32_t mnt_id_old
    uint32_t mnt_parent_id_old
    uint64_t room[57]

cdef dict _unique_ids():
    """Unique ids by numbers of the mount table; empty before Linux 6.8."""
    cdef uint64_t ids[LISTED_AT_ONCE]
    cdef mnt_id_req asked
    cdef statmount_t found
    cdef long count = LISTED_AT_ONCE, i
    cdef dict result = {}
    memset(&asked, 0, sizeof(asked))
    asked.size = sizeof(asked)
    while count == LISTED_AT_ONCE:
        asked.mnt_id = LSMT_ROOT
        count = syscall(SYS_LISTMOUNT, &asked, ids, <size_t>LISTED_AT_ONCE, 0)
        for i in range(count):
            asked.mnt_id = ids[i]
            asked.param = STATMOUNT_MNT_BASIC
            if syscall(SYS_STATMOUNT, &asked, &found, sizeof(found), 0) == 0:
                result[found.mnt_id_old] = found.mnt_id
        if count > 0:
            asked.param = ids[count - 1]    # where the next call goes on
    return result


def unique_ids(numbers: Iterable[int]) -> dict[int, int]:
    """For each number of the mount table an id that no later mount gets; before Linux 6.8 the number itself."""
    return {number: number for number in numbers} | _unique_ids()
