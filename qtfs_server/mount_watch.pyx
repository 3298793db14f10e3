"""The thread that follows the server's mount table, and lets mounts go that nobody uses.

When the table changes, nodes on mounts that are gone are given up, and each session that watches is told which of the
names it knows lead elsewhere now. Who has nothing on a mount below its root costs nothing: then the thread sleeps.
Sources: proc_pid_mountinfo(5), "poll(2)" there.
"""
from libc.stdint cimport uint8_t, uint64_t

from qtfs_common.protocol cimport MAX_PATH, OP_MOUNTS_CHANGED, ROOT_NODE
from qtfs_server.attributes cimport stat_known
from qtfs_server.descriptors cimport fd_path
from qtfs_server.events cimport event_tell
from qtfs_server.includes.linux cimport statx_t
from qtfs_server.letting_go cimport let_idle_go
from qtfs_server.mounts cimport holding_fd
from qtfs_server.node_descriptors cimport node_pin, node_unpin
from qtfs_server.nodes cimport known_node
from qtfs_server.session cimport node, session, session_after

import logging
import os
import select
import time

from qtfs_common.mountinfo import MOUNTINFO, changed_paths, is_below
from qtfs_common.remote_calls import pack_stale_name
from qtfs_server.letting_go import mark_gone_mounts, note_known_mounts
from qtfs_server.mounts import read_table

log = logging.getLogger(__name__)

#: What was not used for one to two periods is let go.
_PERIOD_S = 0.2
#: After a change the next ones come together: to look at them is to take no more than half of a processor.
_SETTLE_S = (0.01, 0.1)
#: Of one message; more names go in further ones.
_MOST_BYTES = 65536


# ---- the thread ------------------------------------------------------------------------------------------------------

def watch_mounts(stop_fd: int) -> None:
    """Follow the mount table until `stop_fd` becomes readable."""
    cdef int holding = holding_fd()
    cdef bint left = False
    table = read_table()
    due_s = 0.0
    with open(MOUNTINFO) as info:
        poller = select.poll()
        poller.register(info, select.POLLPRI | select.POLLERR)
        poller.register(stop_fd, select.POLLIN)
        poller.register(holding, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll(max(0.0, due_s - time.monotonic()) * 1000 if left else None)]
            if stop_fd in ready:
                return
            if holding in ready:
                os.eventfd_read(holding)
                if not left:
                    left = True
                    due_s = time.monotonic() + _PERIOD_S
            if info.fileno() in ready:
                began_s = time.monotonic()
                table = _take_change(table)
                least_s, most_s = _SETTLE_S
                time.sleep(min(max(least_s, time.monotonic() - began_s), most_s))
            if left and time.monotonic() >= due_s:
                with nogil:
                    left = let_idle_go()    # by other threads: it may hang
                due_s = time.monotonic() + _PERIOD_S


def _take_change(old: dict[int, object]) -> dict[int, object]:
    """Act on whatever has changed; the new table."""
    note_known_mounts()
    try:
        new = read_table()
    except OSError as error:
        log.error("the mount table cannot be read: %s", error)
        return old
    mark_gone_mounts(new)
    with nogil:
        let_idle_go()
    changed = changed_paths(old, new)
    if changed:
        _tell_all(changed)
    return new


# ---- telling ---------------------------------------------------------------------------------------------------------

cdef void _tell_all(list changed):
    """Tell every session that watches. The newest first: a client's older mounts rely on what its newer ones know."""
    cdef list names = [found for found in map(_directory_and_name, changed) if found is not None]
    cdef session *s = session_after(NULL)
    cdef bytes body
    while s != NULL:
        if s.watches_mounts:
            bodies = _stale_names(s, names)
            if not bodies and _sees_one(s, changed):
                bodies = [b""]
            for body in bodies:
                _send(s, body)
        s = session_after(s)


cdef void _send(session *s, bytes body):
    cdef const uint8_t *data = <const uint8_t *><const char *>body
    cdef size_t size = len(body)
    with nogil:
        event_tell(s, OP_MOUNTS_CHANGED, data, size)


def _directory_and_name(path: bytes) -> tuple[bytes, bytes] | None:
    """The statx of the directory that a mount point lies in, and its name there; None if there is none."""
    cdef statx_t st
    cdef int error
    directory, name = os.path.split(path)
    if not name:
        return None
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None                 # gone with what it was mounted on
    error = stat_known(fd, &st)
    os.close(fd)
    return ((<char *>&st)[:sizeof(st)], name) if error == 0 else None


cdef list _stale_names(session *s, list names):
    """Bodies of messages with those names whose directories the session knows."""
    cdef list bodies = []
    cdef const statx_t *st
    cdef uint64_t id
    body = b""
    for directory, name in names:
        st = <const statx_t *><const char *>directory
        id = known_node(s, st)
        if id == 0:
            continue
        if len(body) > _MOST_BYTES:
            bodies.append(body)
            body = b""
        body += pack_stale_name(id, name)
    return [*bodies, body] if body else bodies


cdef bint _sees_one(session *s, list paths):
    """Whether a path is below the session's root. A session that does not hold that is not asked."""
    cdef char root[MAX_PATH]
    cdef node *n = NULL
    cdef int length
    if s.lets_root_go or node_pin(s, ROOT_NODE, &n) < 0:
        return False
    length = fd_path(n.fd, root, sizeof(root))
    node_unpin(s, n)
    if length <= 0:
        return False
    directory = <bytes>root
    for path in paths:
        if is_below(path, directory):
            return True
    return False
