"""systemd's file descriptor store, where copies of descriptors survive an engine that dies.

A handle's descriptor has a name that tells session, index and generation. systemd hands all that it has to the next engine,
as listening sockets are handed over. How many it keeps it says in $FDSTORE, and the unit file does for an older one.

Sources: sd_notify(3) (FDSTORE, FDSTOREREMOVE, FDNAME), sd_listen_fds(3), systemd.service(5) (FileDescriptorStoreMax).
"""
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from qtfs_server.chores cimport chore_add
from qtfs_server.includes.linux cimport atomic_add_int

import logging
import os
import re

from qtfs_common import logs

log = logging.getLogger(__name__)

_NAME = re.compile(r"qtfs-([0-9a-f]{16})-([0-9a-f]{1,8})-([0-9a-f]{1,8})")
_FIRST = 3                          # SD_LISTEN_FDS_START

storing = False
cdef int32_t _stored = 0
cdef int32_t _most = 0
cdef bint _complained = False       # under the GIL

cdef struct removal:
    uint64_t session_id
    uint32_t index
    uint32_t generation


def use_store() -> None:
    """Have descriptors kept from now on, if systemd says that it does."""
    global storing, _most
    told = os.environ.get("FDSTORE", "")
    _most = min(int(told), 1 << 20) if told.isascii() and told.isdigit() else 0
    storing = _most > 0 and bool(os.environ.get("NOTIFY_SOCKET"))


def is_used() -> bool:
    """Whether descriptors are kept."""
    return storing


def handed_descriptors() -> dict[tuple[str, int, int], int]:
    """What was kept for us, by the name of a session's file, index and generation. Whatever else we were given is closed."""
    found = {}
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    if pid != str(os.getpid()) or not count.isdigit() or len(names) != int(count):
        return {}
    for fd, name in enumerate(names, _FIRST):
        match = _NAME.fullmatch(name)
        key = (match[1], int(match[2], 16), int(match[3], 16)) if match else None
        if key is None or key in found:
            os.close(fd)
            continue
        os.set_inheritable(fd, False)
        found[key] = fd
    return found


def forget(session: str, index: int, generation: int) -> None:
    """Have a descriptor kept no longer."""
    logs.notify(f"FDSTOREREMOVE=1\nFDNAME=qtfs-{session}-{index:x}-{generation:x}")


cdef void count_stored(int32_t more) noexcept nogil:
    """Count descriptors that are kept."""
    atomic_add_int(&_stored, more)


cdef bint store(uint64_t session_id, uint32_t index, uint32_t generation, int fd) noexcept nogil:
    """Have a copy of a handle's descriptor kept; whether it was sent. From a thread that may wait."""
    cdef bint sent
    if atomic_add_int(&_stored, 1) > _most:
        sent = False
        _complain()
    else:
        sent = _send(session_id, index, generation, fd)
    if not sent:
        atomic_add_int(&_stored, -1)
    return sent


cdef bint _send(uint64_t session_id, uint32_t index, uint32_t generation, int fd) noexcept with gil:
    return logs.notify(f"FDSTORE=1\nFDNAME=qtfs-{session_id:016x}-{index:x}-{generation:x}", [fd])


cdef void _complain() noexcept with gil:
    global _complained
    if not _complained:
        _complained = True
        log.warning("systemd keeps no more than %d descriptors (FileDescriptorStoreMax): what is unlinked now and open will "
                    "be lost if this engine dies", _most)


cdef void _unstore(void *subject) noexcept nogil:
    cdef removal gone = (<removal *>subject)[0]
    free(subject)
    with gil:
        forget(f"{gone.session_id:016x}", gone.index, gone.generation)
    atomic_add_int(&_stored, -1)


cdef void unstore_later(uint64_t session_id, uint32_t index, uint32_t generation) noexcept nogil:
    """A handle that is stored has ended."""
    cdef removal *gone = <removal *>malloc(sizeof(removal))
    if gone == NULL:
        return                      # the next engine will find nobody whose it is
    gone.session_id = session_id
    gone.index = index
    gone.generation = generation
    if not chore_add(_unstore, gone):
        free(gone)
