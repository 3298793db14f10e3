"""What passes from an engine to the next besides the file of a session's tables: descriptors, and what lies in memory only.

A descriptor is told by kind, index and generation: those of the table entry that it belongs to. It finds that entry again
in the next engine, or nobody, and is closed. In memory only are messages that the client has not confirmed, replies that
are too long for the slot, and how much of a write to a FIFO is done.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from qtfs_server.attributes cimport stat_fd
from qtfs_server.descriptors cimport descriptor_opened, proc_path
from qtfs_server.events cimport event_restore
from qtfs_server.fd_store cimport count_stored
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_PATH, close, openat, statx_t
from qtfs_server.locked_files cimport lock_owner
from qtfs_server.mounts cimport is_let_go
from qtfs_server.node_descriptors cimport node_adopt
from qtfs_server.operations.locks cimport owner_again
from qtfs_server.session cimport GENERATION_SHIFT, HANDLE_ENDED, HANDLE_IN_USE, HANDLE_LOST, HANDLE_STORED, HANDLE_STREAM, \
    NO_INDEX, RECORD_AWAKE, SAVED_REPLY_BYTES, handle, handle_at, lock_note, node, outgoing, record_at, session, slot
from qtfs_server.streams cimport carry_write, writes_begun

import struct

#: Of what lies in memory: what it is, its slot, its number, how many bytes follow.
_ITEM = struct.Struct("<IIQQ")
_NUMBERING, _MESSAGE, _REPLY, _WRITE = range(4)


#: The kind of a descriptor of what memory_of tells.
MEMORY = int(PASSED_MEMORY)
#: Of one that systemd has kept.
STORED = int(PASSED_STORED)


cdef class Passed:
    """Descriptors for one session, which are ours until somebody takes them over."""

    def __cinit__(self, items: list[tuple[int, int, int, int]]):
        """`items`: (kind, index, generation, descriptor)."""
        cdef uint32_t i
        self.items = <passed *>calloc(len(items) + 1, sizeof(passed))
        if self.items == NULL:
            raise MemoryError
        self.count = len(items)
        for i in range(self.count):
            self.items[i].kind, self.items[i].index, self.items[i].generation, self.items[i].fd = items[i]

    def take(self, uint32_t kind) -> int:
        """The descriptor of a kind that there is one of, which is the caller's from now on; -1: there is none."""
        cdef uint32_t i
        cdef int fd = -1
        for i in range(self.count):
            if self.items[i].kind == kind and fd < 0:
                fd = self.items[i].fd
                self.items[i].fd = -1
        return fd

    def __dealloc__(self):
        cdef uint32_t i
        if self.items == NULL:
            return
        for i in range(self.count):
            if self.items[i].fd >= 0:
                close(self.items[i].fd)
        free(self.items)


# ---- the engine that has them: nothing runs any more -------------------------------------------------------------------

cdef list _nodes_of(session *s):
    cdef uint32_t i
    found = []
    for i in range(1, s.record_count):
        if record_at(s, i).stamp & RECORD_AWAKE and record_at(s, i).body.awake.fd >= 0:
            found.append((PASSED_NODE, i, record_at(s, i).stamp >> GENERATION_SHIFT, record_at(s, i).body.awake.fd))
    return found


cdef list _handles_of(session *s):
    cdef uint32_t i
    cdef handle *h
    found = []
    for i in range(1, s.handle_count):
        h = handle_at(s, i)
        if h.flags & HANDLE_IN_USE and not h.flags & HANDLE_ENDED and h.fd >= 0:
            found.append((PASSED_KEPT if h.flags & HANDLE_STORED else PASSED_HANDLE, i, h.generation, h.fd))
    return found


cdef list _lock_owners_of(session *s):
    cdef lock_owner *o = <lock_owner *>s.lock_owners
    found = []
    while o != NULL:
        if o.note != NO_INDEX:      # else there was no room for it, and its locks end with us
            found.append((PASSED_LOCKS, o.note, 0, o.fd))
        o = o.next_of_session
    return found


cdef list descriptors_of(session *s):
    """(kind, index, generation, descriptor) of all that a session has open. The descriptors stay ours."""
    mounts = [(PASSED_MOUNT, i, 0, s.devices[i].mount_fd) for i in range(s.device_count) if s.devices[i].mount_fd >= 0]
    state = [(PASSED_STATE, 0, 0, s.state_fd)]
    return state + mounts + _nodes_of(s) + _handles_of(s) + _lock_owners_of(s)


cdef bytes memory_of(session *s):
    """What a session has in memory only."""
    cdef outgoing *message = s.outbox
    cdef slot *at
    cdef uint32_t i
    parts = [_ITEM.pack(_NUMBERING, 0, s.event_number, 0)]
    while message != NULL:
        if message.number != 0:
            parts += [_ITEM.pack(_MESSAGE, 0, message.number, message.size), (<char *>(message + 1))[:message.size]]
        message = message.next
    for i in range(s.slots):
        at = &s.slot_table[i]
        if at.saved_bytes > SAVED_REPLY_BYTES and at.long_reply != NULL:
            parts += [_ITEM.pack(_REPLY, i, at.sequence, at.saved_bytes), (<char *>at.long_reply)[:at.saved_bytes]]
    for tag, done in writes_begun(s):
        parts.append(_ITEM.pack(_WRITE, done, tag, 0))
    return b"".join(parts)


# ---- the next engine: the tables are in order, nobody uses them yet ----------------------------------------------------

cdef int _restore_reply(session *s, uint32_t index, uint64_t sequence, bytes reply) except -1:
    """A reply is kept on for the slot's last request."""
    cdef slot *at = &s.slot_table[index]
    if index >= s.slots or at.sequence != sequence:
        return 0
    at.long_reply = <uint8_t *>malloc(len(reply))
    if at.long_reply == NULL:
        raise MemoryError
    memcpy(at.long_reply, <const char *>reply, len(reply))
    at.saved_bytes = len(reply)
    at.unfinished = False
    return 0


cdef int restore_memory(session *s, bytes memory) except -1:
    """The opposite of memory_of."""
    cdef bytes body
    at = 0
    while at < len(memory):
        what, index, number, size = _ITEM.unpack_from(memory, at)
        at += _ITEM.size
        body = memory[at:at + size]
        at += size
        if what == _NUMBERING:
            s.event_number = number
        elif what == _MESSAGE:
            event_restore(s, number, <const uint8_t *><const char *>body, len(body))
        elif what == _REPLY:
            _restore_reply(s, index, number, body)
        else:
            carry_write(s, number, index)
    return 0


cdef void adopt_mounts(session *s, passed *items, uint32_t count) noexcept nogil:
    """Take over descriptors on mounts, but for those that are let go when nobody uses them."""
    cdef passed *item
    cdef uint32_t i
    for i in range(count):
        item = &items[i]
        if item.kind == PASSED_MOUNT and item.index < s.device_count and not is_let_go(s, item.index):
            s.devices[item.index].mount_fd = item.fd
            item.fd = -1
            descriptor_opened()


cdef void _adopt_node(session *s, passed *item) noexcept nogil:
    cdef uint32_t index = item.index
    if NO_INDEX < index < s.record_count and record_at(s, index).stamp & RECORD_AWAKE and \
            record_at(s, index).stamp >> GENERATION_SHIFT == item.generation and record_at(s, index).body.awake.fd < 0:
        node_adopt(s, record_at(s, index).body.awake, item.fd)
        item.fd = -1


cdef void _adopt_node_of(session *s, const handle *h) noexcept nogil:
    """A node that has no descriptor gets one by way of its open file: it may not have a name."""
    cdef char link[32]
    cdef statx_t st
    cdef int fd
    proc_path(link, h.fd)
    fd = openat(AT_FDCWD, link, O_PATH | O_CLOEXEC) if h.node.fd < 0 else -1
    if fd < 0:
        return
    if stat_fd(fd, &st) == 0 and st.stx_ino == h.node.ino:
        node_adopt(s, h.node, fd)
    else:
        close(fd)


cdef void _adopt_handle(session *s, passed *item) noexcept nogil:
    cdef handle *h
    if not NO_INDEX < item.index < s.handle_count:
        return
    h = handle_at(s, item.index)
    if not h.flags & HANDLE_IN_USE or h.generation != item.generation or h.fd >= 0:
        return
    h.fd = item.fd
    h.flags &= ~<uint32_t>HANDLE_LOST
    item.fd = -1
    descriptor_opened()
    if item.kind != PASSED_HANDLE and not h.flags & HANDLE_STREAM:
        h.flags |= HANDLE_STORED
        count_stored(1)
    if item.kind == PASSED_STORED:
        h.position = -1             # the engine before us may have read on
        _adopt_node_of(s, h)


cdef void adopt_open_files(session *s, passed *items, uint32_t count) noexcept nogil:
    """Take over descriptors of nodes and handles."""
    cdef uint32_t i
    for i in range(count):
        if items[i].fd < 0:
            continue
        if items[i].kind == PASSED_NODE:
            _adopt_node(s, &items[i])
        elif items[i].kind in (PASSED_HANDLE, PASSED_STORED, PASSED_KEPT):
            _adopt_handle(s, &items[i])


cdef void adopt_lock_owners(session *s, passed *items, uint32_t count) noexcept nogil:
    """Take over descriptors with POSIX locks, for lock_all_again."""
    cdef const lock_note *note
    cdef passed *item
    cdef uint32_t i
    for i in range(count):
        item = &items[i]
        if item.kind != PASSED_LOCKS or not NO_INDEX < item.index < s.lock_note_count:
            continue
        note = &s.lock_notes[item.index]
        if note.used and note.of == NO_INDEX and owner_again(s, note.handle, note.owner, item.fd) == 0:
            item.fd = -1
