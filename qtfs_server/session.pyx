"""Life of a session, and the chunked tables its nodes and handles are kept in."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from qtfs_server.descriptors cimport close_counted, close_node
from qtfs_server.includes.linux cimport atomic_add_int, pthread_mutex_destroy, pthread_mutex_init, \
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock

cdef enum:
    LEAST_BUCKETS = 64

cdef pthread_mutex_t _all_guard
cdef session *_all = NULL
cdef session_function _farewell = NULL
pthread_mutex_init(&_all_guard, NULL)


# ---- tables ------------------------------------------------------------------------------------------------------

cdef record *record_at(session *s, uint32_t index) noexcept nogil:
    """The record of an index below record_count."""
    return &s.record_chunks[index // CHUNK][index % CHUNK]


cdef handle *handle_at(session *s, uint32_t index) noexcept nogil:
    """The handle of an index below handle_count."""
    return &s.handle_chunks[index // CHUNK][index % CHUNK]


cdef void **grown_chunks(void **chunks, uint32_t count, size_t item_bytes) noexcept nogil:
    """Make room for item `count` of a chunked table. The table, moved perhaps, or NULL: then the old one is good.

    Chunks are mapped, not malloc'ed: all of a large table goes back to the system when its session ends.
    """
    cdef uint32_t chunk = count // CHUNK
    cdef void **larger
    cdef void *fresh
    if chunks != NULL and count % CHUNK != 0:
        return chunks
    fresh = mmap(NULL, CHUNK * item_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if fresh == MAP_FAILED:
        return NULL
    larger = <void **>realloc(chunks, (chunk + 1) * sizeof(void *))
    if larger == NULL:
        munmap(fresh, CHUNK * item_bytes)
        return NULL
    larger[chunk] = fresh
    return larger


cdef void _free_chunks(void **chunks, uint32_t count, size_t item_bytes) noexcept nogil:
    cdef uint32_t i
    for i in range((count + CHUNK - 1) // CHUNK):
        if chunks != NULL:
            munmap(chunks[i], CHUNK * item_bytes)
    free(chunks)


cdef node *node_new_locked(session *s) noexcept nogil:
    """A node of zeros, or NULL. Not malloc's: nodes come and go in all threads, and would leave holes in its arenas."""
    cdef node *n = s.spare_nodes
    cdef node **chunks
    if n == NULL:
        chunks = <node **>grown_chunks(<void **>s.node_chunks, s.node_count, sizeof(node))
        if chunks == NULL:
            return NULL
        s.node_chunks = chunks
        n = &chunks[s.node_count // CHUNK][s.node_count % CHUNK]
        s.node_count += 1
    else:
        s.spare_nodes = n.next_open
    memset(n, 0, sizeof(node))
    return n


cdef void node_free_locked(session *s, node *n) noexcept nogil:
    """Give a node back, with what it keeps to be opened again; its descriptor is closed."""
    free(n.revive)
    n.next_open = s.spare_nodes
    s.spare_nodes = n


# ---- life --------------------------------------------------------------------------------------------------------

cdef session *session_new(uint64_t id, const uint8_t *secret, uint32_t salt, uint32_t slots) noexcept nogil:
    """An empty session with one reference, or NULL."""
    cdef session *s = <session *>calloc(1, sizeof(session))
    if s == NULL:
        return NULL
    s.slot_table = <slot *>calloc(slots, sizeof(slot))
    s.buckets = <uint32_t *>calloc(LEAST_BUCKETS, sizeof(uint32_t))
    if s.slot_table == NULL or s.buckets == NULL:
        free(s.slot_table)
        free(s.buckets)
        free(s)
        return NULL
    s.bucket_mask = LEAST_BUCKETS - 1
    s.id = id
    memcpy(s.secret, secret, sizeof(s.secret))
    s.salt = salt
    s.slots = slots
    s.record_count = s.shape_count = s.handle_count = 1
    s.references = 1
    s.outbox_end = &s.outbox
    pthread_mutex_init(&s.guard, NULL)
    pthread_mutex_init(&s.outbox_guard, NULL)
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
    _free_chunks(<void **>s.node_chunks, s.node_count, sizeof(node))
    _free_chunks(<void **>s.record_chunks, s.record_count, sizeof(record))
    free(s.shapes)


cdef void _free_handles(session *s) noexcept nogil:
    cdef uint32_t i
    for i in range(1, s.handle_count):
        if handle_at(s, i).flags & HANDLE_IN_USE:
            close_counted(handle_at(s, i).fd)
    _free_chunks(<void **>s.handle_chunks, s.handle_count, sizeof(handle))


cdef void _session_free(session *s) noexcept nogil:
    """Close and free everything; nobody holds the session any more."""
    cdef outgoing *message
    cdef uint32_t i
    _free_handles(s)
    _free_nodes(s)
    for i in range(s.device_count):
        close_counted(s.devices[i].mount_fd)
    for i in range(s.slots):
        free(s.slot_table[i].saved)
    free(s.devices)
    free(s.holders)
    free(s.slot_table)
    free(s.buckets)
    while s.outbox != NULL:
        message = s.outbox
        s.outbox = message.next
        free(message)
    pthread_mutex_destroy(&s.guard)
    pthread_mutex_destroy(&s.outbox_guard)
    free(s)


cdef void set_farewell(session_function farewell) noexcept nogil:
    """Set who lets go of what waits and of POSIX locks in a session's name before it is freed."""
    global _farewell
    _farewell = farewell


cdef bint session_hold(session *s) noexcept nogil:
    """Take a reference, unless the last one is gone and somebody is about to free the session."""
    if atomic_add_int(&s.references, 1) > 1:
        return True
    atomic_add_int(&s.references, -1)
    return False


cdef void session_unref(session *s) noexcept nogil:
    """Give a reference back; the last one frees the session."""
    if atomic_add_int(&s.references, -1) == 0:
        _unlist(s)
        _farewell(s)
        _session_free(s)


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
    while found != NULL and atomic_add_int(&found.references, 1) == 1:
        atomic_add_int(&found.references, -1)   # as above
        found = found.next
    pthread_mutex_unlock(&_all_guard)
    if s != NULL:
        session_unref(s)
    return found
