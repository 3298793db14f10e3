"""Life of a session, whose tables lie in a file that outlives the engine."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from qtfs_common.protocol cimport MOUNT_LET_GO, MOUNT_READ_ONLY, MOUNT_WATCH
from qtfs_common.transport cimport now_us
from qtfs_server.chores cimport chore_add
from qtfs_server.descriptors cimport close_counted, close_node
from qtfs_server.fd_store cimport unstore_later
from qtfs_server.includes.linux cimport atomic_add_int, atomic_load_int, atomic_set_int_if, pthread_mutex_destroy, \
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from qtfs_server.state_file cimport DEVICES, HANDLES, LOCK_NOTES, NODES, RECORDS, SHAPES, SLOTS, TEXTS, grow, \
    state_free, state_new, state_remove, table
from qtfs_server.texts cimport text_free_locked

cdef enum:
    LEAST_BUCKETS = 64

cdef pthread_mutex_t _all_guard
cdef session *_all = NULL
cdef session_function _farewell = NULL
pthread_mutex_init(&_all_guard, NULL)


# ---- nodes ---------------------------------------------------------------------------------------------------------

cdef node *node_new_locked(session *s) noexcept nogil:
    """A node of zeros, or NULL."""
    cdef node *n = s.spare_nodes
    if n == NULL:
        if grow(s.state_fd, s.state, NODES, s.node_count) < 0:
            return NULL
        n = &s.nodes[s.node_count]
        s.node_count += 1
    else:
        s.spare_nodes = n.next_open
    memset(n, 0, sizeof(node))
    return n


cdef void node_free_locked(session *s, node *n) noexcept nogil:
    """Give a node back, with what it keeps to be opened again; its descriptor is closed."""
    n.index = NO_INDEX
    text_free_locked(s, n.path)
    free(n.revive)
    n.next_open = s.spare_nodes
    s.spare_nodes = n


# ---- life --------------------------------------------------------------------------------------------------------

cdef session *_session_on(state_header *state, int fd) noexcept nogil:
    """A session whose tables lie in a file, which is taken over; or NULL."""
    cdef session *s = <session *>calloc(1, sizeof(session))
    if s != NULL:
        s.buckets = <uint32_t *>calloc(LEAST_BUCKETS, sizeof(uint32_t))
    if s == NULL or s.buckets == NULL:
        state_free(state, fd)
        free(s)
        return NULL
    s.state = state
    s.state_fd = fd
    s.slot_table = <slot *>table(state, SLOTS)
    s.devices = <device *>table(state, DEVICES)
    s.shapes = <shape *>table(state, SHAPES)
    s.records = <record *>table(state, RECORDS)
    s.nodes = <node *>table(state, NODES)
    s.handles = <handle *>table(state, HANDLES)
    s.texts = <text_cell *>table(state, TEXTS)
    s.lock_notes = <lock_note *>table(state, LOCK_NOTES)
    s.bucket_mask = LEAST_BUCKETS - 1
    s.id = state.id
    memcpy(s.secret, state.secret, sizeof(s.secret))
    s.salt = state.salt
    s.slots = state.slots
    s.read_only = state.mount_flags & MOUNT_READ_ONLY
    s.watches_mounts = state.mount_flags & MOUNT_WATCH
    s.lets_root_go = state.mount_flags & MOUNT_LET_GO
    s.references = 1
    s.outbox_end = &s.outbox
    pthread_mutex_init(&s.guard, NULL)
    pthread_mutex_init(&s.outbox_guard, NULL)
    return s


cdef session *session_new(uint64_t id, const uint8_t *secret, uint32_t salt, uint32_t slots, uint32_t mount_flags,
                          const char *root) noexcept nogil:
    """An empty session with one reference, or NULL."""
    cdef int fd = -1
    cdef state_header *state = state_new(id, secret, salt, slots, mount_flags, root, &fd)
    cdef session *s = _session_on(state, fd) if state != NULL else NULL
    if s != NULL:
        s.record_count = s.shape_count = s.handle_count = s.text_count = s.lock_note_count = 1
        _list(s)
    return s


cdef session *session_of_state(state_header *state, int fd) noexcept nogil:
    """The session that a former engine left, its tables still to be put in order (recovery.pyx); NULL without memory."""
    cdef session *s = _session_on(state, fd)
    if s != NULL:
        s.record_count = max(state.ready[<int>RECORDS], <uint32_t>1)
        s.shape_count = max(state.ready[<int>SHAPES], <uint32_t>1)
        s.handle_count = max(state.ready[<int>HANDLES], <uint32_t>1)
        s.text_count = max(state.ready[<int>TEXTS], <uint32_t>1)
        s.lock_note_count = max(state.ready[<int>LOCK_NOTES], <uint32_t>1)
        s.node_count = state.ready[<int>NODES]
        s.device_count = state.ready[<int>DEVICES]
        s.event_number = now_us()   # beyond what the engine before us may have sent: more than one in a microsecond
        _list(s)
    return s


cdef void _free_nodes(session *s) noexcept nogil:
    cdef uint32_t i
    cdef node *n
    for i in range(1, s.record_count):
        if record_at(s, i).stamp & RECORD_AWAKE:
            n = record_at(s, i).body.awake
            close_node(n.fd)
            free(n.revive)


cdef void _free_handles(session *s) noexcept nogil:
    cdef uint32_t i
    for i in range(1, s.handle_count):
        if handle_at(s, i).flags & HANDLE_IN_USE:
            close_counted(handle_at(s, i).fd)
            if handle_at(s, i).flags & HANDLE_STORED:
                unstore_later(s.id, i, handle_at(s, i).generation)


cdef void _session_free(session *s) noexcept nogil:
    """Close and free everything; nobody holds the session any more."""
    cdef outgoing *message
    cdef carried_write *write
    cdef uint32_t i
    _free_handles(s)
    _free_nodes(s)
    for i in range(s.device_count):
        close_counted(s.devices[i].mount_fd)
    for i in range(s.slots):
        free(s.slot_table[i].long_reply)
    state_remove(s.id)
    state_free(s.state, s.state_fd)
    free(s.holders)
    free(s.buckets)
    while s.outbox != NULL:
        message = s.outbox
        s.outbox = message.next
        free(message)
    while s.carried != NULL:
        write = s.carried
        s.carried = write.next
        free(write)
    pthread_mutex_destroy(&s.guard)
    pthread_mutex_destroy(&s.outbox_guard)
    free(s)


cdef void set_farewell(session_function farewell) noexcept nogil:
    """Set who lets go of what waits and of POSIX locks in a session's name before it is freed."""
    global _farewell
    _farewell = farewell


cdef bint session_hold(session *s) noexcept nogil:
    """Take a reference, unless the last one is gone and somebody is about to free the session."""
    cdef int32_t held = atomic_load_int(&s.references)
    while held > 0 and not atomic_set_int_if(&s.references, &held, held + 1):
        pass
    return held > 0


cdef void _bury(void *s) noexcept nogil:
    _farewell(<session *>s)
    _session_free(<session *>s)


cdef void session_unref(session *s) noexcept nogil:
    """Give a reference back; after the last one the session is freed, by a thread that may hang in close(2)."""
    if atomic_add_int(&s.references, -1) == 0:
        _unlist(s)
        if not chore_add(_bury, s):
            _bury(s)


# ---- all of them -------------------------------------------------------------------------------------------------

cdef void _list(session *s) noexcept nogil:
    global _all
    pthread_mutex_lock(&_all_guard)
    s.next = _all
    if _all != NULL:
        _all.previous = s
    _all = s
    pthread_mutex_unlock(&_all_guard)


cdef void _unlist(session *s) noexcept nogil:
    global _all
    pthread_mutex_lock(&_all_guard)
    if s.previous != NULL:
        s.previous.next = s.next
    else:
        _all = s.next
    if s.next != NULL:
        s.next.previous = s.previous
    pthread_mutex_unlock(&_all_guard)


cdef session *session_fullest() noexcept nogil:
    """The session whose nodes hold most descriptors, its root's aside, with a reference for the caller; or NULL."""
    cdef session *s
    cdef session *found = NULL
    cdef uint32_t most = 1
    pthread_mutex_lock(&_all_guard)
    s = _all
    while s != NULL:
        if s.open_nodes > most:
            most = s.open_nodes
            found = s
        s = s.next
    if found != NULL and not session_hold(found):
        found = NULL                    # it will be freed once we let go of the list
    pthread_mutex_unlock(&_all_guard)
    return found


cdef session *session_after(session *s) noexcept nogil:
    """Go through all sessions, the newest first: give back the reference to one and get one to the next. NULL: begin, end."""
    cdef session *found
    pthread_mutex_lock(&_all_guard)
    found = s.next if s != NULL else _all
    while found != NULL and not session_hold(found):
        found = found.next
    pthread_mutex_unlock(&_all_guard)
    if s != NULL:
        session_unref(s)
    return found
