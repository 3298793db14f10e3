"""Puts the tables that a former engine left in order: what was memory of its own is made anew.

The tables were left at any moment. An entry counts if it is marked as used, which is written last when it is made and
first when it goes; lists, hash chains and counts are made from the entries. Whatever does not fit is left out: its id
is then ESTALE. Nodes come without descriptors, as after an eviction, and handles are opened when they are used, unless
the descriptors that they had were passed on (passing.pyx).
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from qtfs_common.protocol cimport MAX_PATH, OP_READY, ROOT_NODE
from qtfs_common.transport cimport now_us
from qtfs_server.attributes cimport mount_id_of, stat_fd
from qtfs_server.descriptors cimport close_counted, descriptor_opened
from qtfs_server.events cimport event_notify
from qtfs_server.folding cimport kept_handle, shape_restore_locked
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_RDONLY, RESOLVE_NO_SYMLINKS, S_IFIFO, SYS_openat2, \
    close, makedev, open_how, statx_t, syscall
from qtfs_server.lock_notes cimport drop_note
from qtfs_server.mounts cimport open_mount
from qtfs_server.node_table cimport record_link_locked
from qtfs_server.node_descriptors cimport node_pin, node_unpin, settle_locked
from qtfs_server.operations.locks cimport flock_again, lock_again
from qtfs_server.passing cimport adopt_mounts, adopt_open_files, passed
from qtfs_server.policy cimport OFF_TRIE, place
from qtfs_server.session cimport GENERATION_SHIFT, GENERATIONS, HANDLE_ENDED, HANDLE_IN_USE, HANDLE_LOST, HANDLE_STORED, \
    HANDLE_STREAM, NODE_PATHLESS, NODE_REVIVE_BY_PATH, NO_INDEX, RECORD_AWAKE, RECORD_FLAGS, RECORD_IN_USE, RECORD_LISTED, SAVED_REPLY_BYTES, device, \
    handle, handle_at, lock_note, node, node_free_locked, record, record_at, session, session_of_state, session_unref, slot
from qtfs_server.state_file cimport state_header
from qtfs_server.texts cimport text_copy

cdef enum:
    HANDLE_GENERATIONS = 0x3fffffff     # as handles.pyx has them


cdef void _forget_place(place *where) noexcept nogil:
    """It was found with rules that are gone; what it allowed stays for files whose path nobody knows."""
    where.epoch = 0
    where.trie = OFF_TRIE


# ---- slots, mounts -----------------------------------------------------------------------------------------------------

cdef void _put_slots_right(session *s) noexcept nogil:
    cdef slot *at
    cdef uint32_t i
    for i in range(s.slots):
        at = &s.slot_table[i]
        at.connection = NULL
        at.long_reply = NULL
        if at.saved_bytes > SAVED_REPLY_BYTES:
            at.saved_bytes = 0
            at.busy = 1
        at.unfinished = at.saved_bytes == 0 and (at.busy or at.unfinished)
        at.busy = 0


cdef void _put_devices_right(session *s) noexcept nogil:
    cdef device *d
    cdef uint32_t i
    while s.device_count > 0 and s.devices[s.device_count - 1].number == 0:
        s.device_count -= 1
    for i in range(s.device_count):
        d = &s.devices[i]
        d.mount_fd = -1
        d.mount_users = d.nodes = 0
        d.warm = d.known = False


# ---- nodes -------------------------------------------------------------------------------------------------------------

cdef uint8_t *_kept_path(const session *s, const node *n) noexcept nogil:
    cdef char path[MAX_PATH]
    cdef size_t length = text_copy(s, n.path, path, sizeof(path))
    cdef uint8_t *copy = <uint8_t *>malloc(length + 1) if length > 0 else NULL
    if copy != NULL:
        memcpy(copy, path, length + 1)
    return copy


cdef void _claim_record(session *s, node *n) noexcept nogil:
    """Give a record its node back. A node without record is spare."""
    cdef record *r = NULL
    if NO_INDEX < n.index < s.record_count:
        r = record_at(s, n.index)
    n.revive = NULL
    if r == NULL or not r.stamp & RECORD_IN_USE or not r.stamp & RECORD_AWAKE or r.body.awake != NULL or \
            n.device >= s.device_count or r.ino != n.ino:
        n.path = NO_INDEX
        node_free_locked(s, n)
        return
    r.body.awake = n
    n.fd = -1
    n.pins = n.handles = 0
    n.flags &= NODE_PATHLESS            # counts if its descriptor comes
    n.next_open = n.previous_open = NULL
    _forget_place(&n.where)
    n.revive = kept_handle(n)
    if n.revive == NULL:
        n.revive = _kept_path(s, n)
        n.flags |= NODE_REVIVE_BY_PATH


cdef bint _is_whole(session *s, const record *r) noexcept nogil:
    """Whether a record has its node or its shape."""
    if not r.stamp & RECORD_IN_USE:
        return False
    if r.stamp & RECORD_AWAKE:
        return r.body.awake != NULL
    return r.shape < s.shape_count and s.shapes[r.shape].key.device < s.device_count


cdef void _put_record_right(session *s, uint32_t index) noexcept nogil:
    cdef record *r = record_at(s, index)
    r.stamp &= ~<uint32_t>RECORD_LISTED
    if _is_whole(s, r):
        if not r.stamp & RECORD_AWAKE:
            shape_restore_locked(s, r.shape)
        record_link_locked(s, index)
        return
    if r.stamp == 0:                    # it was never in use
        r.stamp = (s.salt & GENERATIONS) << GENERATION_SHIFT
    elif r.stamp & RECORD_IN_USE:
        r.stamp = ((r.stamp >> GENERATION_SHIFT) + 1 & GENERATIONS) << GENERATION_SHIFT
    r.stamp &= ~<uint32_t>RECORD_FLAGS
    r.next = s.record_free
    s.record_free = index


cdef void _put_nodes_right(session *s) noexcept nogil:
    cdef uint32_t i
    for i in range(1, s.record_count):
        if record_at(s, i).stamp & RECORD_AWAKE:
            record_at(s, i).body.awake = NULL
    for i in range(s.node_count):
        _claim_record(s, &s.nodes[i])
    for i in range(1, s.shape_count):
        s.shapes[i].users = 0
        _forget_place(&s.shapes[i].key.where)
    for i in range(s.record_count - 1, 0, -1):
        _put_record_right(s, i)
    for i in range(1, s.shape_count):
        if s.shapes[i].users == 0:
            s.shapes[i].next = s.shape_free
            s.shape_free = <uint16_t>i


cdef void _settle_nodes(session *s) noexcept nogil:
    """Let nodes go that only a request held, whose descriptor may have been passed on; fold those that nobody has open."""
    cdef uint32_t i
    for i in range(ROOT_NODE + 1, s.record_count):
        if record_at(s, i).stamp & RECORD_AWAKE:
            settle_locked(s, record_at(s, i).body.awake)


# ---- handles -----------------------------------------------------------------------------------------------------------

cdef bint _has_node(session *s, const handle *h) noexcept nogil:
    return NO_INDEX < h.node_index < s.record_count and record_at(s, h.node_index).stamp & RECORD_AWAKE


cdef void _put_handle_right(session *s, uint32_t index) noexcept nogil:
    cdef handle *h = handle_at(s, index)
    h.index = index
    h.fd = -1
    h.pins = 0
    h.flags &= ~<uint32_t>HANDLE_STORED
    h.stream = NULL
    if h.flags & HANDLE_IN_USE and not h.flags & HANDLE_ENDED and _has_node(s, h):
        h.node = record_at(s, h.node_index).body.awake
        h.node.handles += 1
        s.handles_used += 1
        if h.flags & HANDLE_STREAM and h.node.type == S_IFIFO:
            h.flags |= HANDLE_LOST      # with what had been written to it and not been read
        return
    if h.generation == 0:
        h.generation = s.salt & HANDLE_GENERATIONS
    else:                               # also if it is not in use: the engine before us may have died before it did this
        h.generation = (h.generation + 1) & HANDLE_GENERATIONS
    h.flags = 0
    h.next_free = s.handle_free
    s.handle_free = index


cdef void wake_pollers(session *s) noexcept nogil:
    """Have the client's kernel ask again where it was to be told of a change: once events are numbered as before."""
    cdef uint32_t i
    for i in range(1, s.handle_count):
        if handle_at(s, i).flags & HANDLE_IN_USE and handle_at(s, i).notify != 0:
            event_notify(s, OP_READY, handle_at(s, i).notify)
            handle_at(s, i).notify = 0


# ---- texts, lock notes -------------------------------------------------------------------------------------------------

cdef int _put_texts_right(session *s) noexcept nogil:
    """List the cells that no node has. 0, or -1 without memory."""
    cdef uint8_t *used = <uint8_t *>calloc(s.text_count, 1)
    cdef uint32_t i, at
    if used == NULL:
        return -1
    for i in range(s.node_count):
        at = s.nodes[i].path if s.nodes[i].index != NO_INDEX else NO_INDEX
        while NO_INDEX < at < s.text_count and not used[at]:
            used[at] = 1
            at = s.texts[at].next
    for i in range(s.text_count - 1, 0, -1):
        if not used[i]:
            s.texts[i].next = s.text_free
            s.text_free = i
    free(used)
    return 0


cdef bint _counts(const session *s, const lock_note *n) noexcept nogil:
    """Whether a note is of an owner, or of a range that its owner holds."""
    cdef const lock_note *owner
    if not n.used or n.of == NO_INDEX:
        return n.used
    if n.of >= s.lock_note_count:
        return False
    owner = &s.lock_notes[n.of]
    return owner.used and owner.of == NO_INDEX and owner.serial == n.serial


cdef void _put_lock_notes_right(session *s) noexcept nogil:
    """Make the list of each owner's ranges anew, and that of unused notes."""
    cdef uint32_t i
    cdef lock_note *n
    for i in range(1, s.lock_note_count):
        n = &s.lock_notes[i]
        n.used = _counts(s, n)
        s.lock_serial = max(s.lock_serial, n.serial)
        if n.used and n.of == NO_INDEX:
            n.next = NO_INDEX
    for i in range(s.lock_note_count - 1, 0, -1):
        n = &s.lock_notes[i]
        if n.used and n.of == NO_INDEX:
            continue
        n.next = s.lock_notes[n.of].next if n.used else s.lock_note_free
        if n.used:
            s.lock_notes[n.of].next = i
        else:
            s.lock_note_free = i


cdef void _lose(session *s, uint64_t id) noexcept nogil:
    """Somebody else got a lock meanwhile: whoever relied on it must not go on as if he had it."""
    cdef uint32_t index = <uint32_t>(id >> 2)
    cdef handle *h
    if NO_INDEX < index < s.handle_count:
        h = handle_at(s, index)
        h.flags |= HANDLE_LOST
        close_counted(h.fd)
        h.fd = -1


cdef bint _lock_owner_again(session *s, uint32_t note) noexcept nogil:
    """Take what an owner held, under a note of its own; the old one goes."""
    cdef const lock_note *owner = &s.lock_notes[note]
    cdef uint32_t i = owner.next
    cdef int error = 0
    while i != NO_INDEX and error == 0:
        error = lock_again(s, owner.handle, owner.owner, s.lock_notes[i].start, s.lock_notes[i].end, s.lock_notes[i].type)
        i = s.lock_notes[i].next
    if error < 0:
        _lose(s, owner.handle)
    drop_note(s, note)
    return error == 0


cdef uint32_t _lock_owners_again(session *s) noexcept nogil:
    cdef uint32_t *owners = <uint32_t *>malloc(s.lock_note_count * sizeof(uint32_t))
    cdef uint32_t count = 0, lost = 0, i
    if owners == NULL:
        return 1
    for i in range(1, s.lock_note_count):
        if s.lock_notes[i].used and s.lock_notes[i].of == NO_INDEX:
            owners[count] = i
            count += 1
    for i in range(count):
        if not _lock_owner_again(s, owners[i]):
            lost += 1
    free(owners)
    return lost


cdef uint32_t lock_all_again(session *s) noexcept nogil:
    """Take all locks that the session's owners held. How many of them have lost one."""
    cdef uint32_t lost = _lock_owners_again(s)
    cdef uint32_t i
    cdef handle *h
    for i in range(1, s.handle_count):
        h = handle_at(s, i)
        if h.flags & HANDLE_IN_USE and h.flocked != 0 and \
                flock_again(s, <uint64_t>h.generation << 34 | <uint64_t>i << 2) < 0:
            _lose(s, <uint64_t>i << 2)
            lost += 1
    return lost


# ---- all of it ---------------------------------------------------------------------------------------------------------

cdef int _open_root(session *s) noexcept nogil:
    """See that the root is there; its mount is then held as it was. A root that is let go may be folded. 0 or -errno."""
    cdef node *root = NULL
    cdef int error
    if s.record_count <= ROOT_NODE or not record_at(s, ROOT_NODE).stamp & (RECORD_IN_USE if s.lets_root_go else RECORD_AWAKE):
        return -1
    if s.lets_root_go:
        return 0
    root = record_at(s, ROOT_NODE).body.awake
    if s.devices[0].mount_fd < 0:
        s.devices[0].mount_fd = _open_root_mount(s, root)
        if s.devices[0].mount_fd >= 0:
            descriptor_opened()
    error = node_pin(s, ROOT_NODE, &root)
    if error == 0:
        node_unpin(s, root)
    return error


cdef int _open_root_mount(session *s, const node *root) noexcept nogil:
    """A directory on the mount of the root: the root itself, if its path leads there still. A descriptor or -1."""
    cdef open_how how
    cdef statx_t st
    cdef int fd
    how.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC
    how.mode = 0
    how.resolve = RESOLVE_NO_SYMLINKS
    fd = <int>syscall(SYS_openat2, AT_FDCWD, s.state.root, &how, sizeof(how))
    if fd >= 0 and stat_fd(fd, &st) == 0 and mount_id_of(&st) == s.devices[0].mount_id and \
            makedev(st.stx_dev_major, st.stx_dev_minor) == s.devices[0].number:
        return fd
    if fd >= 0:
        close(fd)
    return open_mount(s.devices[0].mount_id, s.devices[0].listed_id)


cdef session *recover(state_header *state, int fd, passed *given, uint32_t count) noexcept nogil:
    """The session whose tables lie in a mapped file, which is taken over; NULL: its root is gone, or there is no memory.

    `given`: descriptors that were passed on; those that find their place are taken over.
    Its locks are still to be taken again: lock_all_again, once all sessions are there. So is what wake_pollers does.
    """
    cdef session *s
    cdef uint32_t i
    state.root[sizeof(state.root) - 1] = 0
    s = session_of_state(state, fd)
    if s == NULL:
        return NULL
    _put_slots_right(s)
    _put_devices_right(s)
    adopt_mounts(s, given, count)
    _put_nodes_right(s)
    for i in range(s.handle_count - 1, 0, -1):
        _put_handle_right(s, i)
    adopt_open_files(s, given, count)
    _put_lock_notes_right(s)
    s.idle_since_us = now_us()
    if _put_texts_right(s) < 0:
        session_unref(s)
        return NULL
    _settle_nodes(s)                    # who goes gives back his text
    if _open_root(s) < 0:
        session_unref(s)
        return NULL
    return s
