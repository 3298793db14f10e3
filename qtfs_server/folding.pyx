"""Folds nodes that nobody uses and that a file handle opens again into their records, 32 bytes each.

Thousands of them share a shape: mount, type, place, and what their file handles are made of. Of the handles that file
systems make (<linux/exportfs.h>: ext4, XFS, tmpfs, Btrfs, F2FS …) all words but one are the inode's number, or the same
throughout the file system; that one is kept in the record. A node whose handle is made differently stays as it is, and
so does one that is opened by a path or that the client has looked up more often than a record can count.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcmp, memcpy, memset

from qtfs_server.includes.linux cimport file_handle, written
from qtfs_server.node_table cimport record_free_locked
from qtfs_server.policy cimport place
from qtfs_server.session cimport NODE_REVIVE_BY_PATH, NO_INDEX, RECORD_AWAKE, SHAPE_CHAINS, SHAPE_WORDS, \
    WORD_CONSTANT, WORD_INO_HIGH, WORD_INO_LOW, WORD_OWN, node, node_free_locked, node_new_locked, record, \
    record_at, session, shape, shape_key
from qtfs_server.state_file cimport SHAPES, grow

cdef enum:
    MOST_LOOKUPS = 0xffff


# ---- shapes --------------------------------------------------------------------------------------------------------

cdef uint16_t *_chain_locked(session *s, const shape_key *key) noexcept nogil:
    """FNV-1a over the key."""
    cdef const uint8_t *data = <const uint8_t *>key
    cdef uint32_t mixed = 2166136261
    cdef size_t i
    for i in range(sizeof(shape_key)):
        mixed = (mixed ^ data[i]) * 16777619
    return &s.shape_chains[(mixed ^ mixed >> 16) % SHAPE_CHAINS]


cdef uint16_t _unused_locked(session *s) noexcept nogil:
    """An index for another shape, or NO_INDEX."""
    cdef uint16_t index = s.shape_free
    if index != NO_INDEX:
        s.shape_free = s.shapes[index].next
        return index
    if grow(s.state_fd, s.state, SHAPES, s.shape_count) < 0:
        return NO_INDEX
    s.shape_count += 1
    return <uint16_t>(s.shape_count - 1)


cdef uint16_t _shape_locked(session *s, const shape_key *key) noexcept nogil:
    """Find or make a shape. Its index, or NO_INDEX."""
    cdef uint16_t *chain = _chain_locked(s, key)
    cdef uint16_t index = chain[0]
    while index != NO_INDEX:
        if memcmp(&s.shapes[index].key, key, sizeof(shape_key)) == 0:
            return index
        index = s.shapes[index].next
    index = _unused_locked(s)
    if index != NO_INDEX:
        s.shapes[index].key = key[0]
        s.shapes[index].users = 0
        s.shapes[index].next = chain[0]
        chain[0] = index
    return index


cdef void shape_restore_locked(session *s, uint16_t index) noexcept nogil:
    """Have a shape found again that a former engine's records have, with a user more."""
    cdef uint16_t *chain
    if s.shapes[index].users == 0:
        chain = _chain_locked(s, &s.shapes[index].key)
        s.shapes[index].next = chain[0]
        chain[0] = index
    s.shapes[index].users += 1


cdef void _leave_shape_locked(session *s, uint16_t index) noexcept nogil:
    """One user less; a shape without any is free for another."""
    cdef uint16_t *at
    s.shapes[index].users -= 1
    if s.shapes[index].users > 0:
        return
    at = _chain_locked(s, &s.shapes[index].key)
    while at[0] != index:
        at = &s.shapes[at[0]].next
    at[0] = s.shapes[index].next
    s.shapes[index].next = s.shape_free
    s.shape_free = index


# ---- file handles --------------------------------------------------------------------------------------------------

cdef uint32_t _word(const file_handle *of, uint32_t number) noexcept nogil:
    cdef uint32_t word = 0
    memcpy(&word, of.f_handle + 4 * number, 4)
    return word


cdef bint _take_apart(const file_handle *of, uint64_t ino, shape_key *key, uint32_t *own) noexcept nogil:
    """Tell what a file handle is made of. False: it is too long."""
    cdef uint32_t i, word, last = SHAPE_WORDS
    if of.handle_bytes > 4 * SHAPE_WORDS or of.handle_bytes % 4:
        return False
    key.handle_type = of.handle_type
    key.words = of.handle_bytes // 4
    for i in range(key.words):
        word = _word(of, i)
        if word != 0 and word == <uint32_t>ino:
            key.kinds[i] = WORD_INO_LOW
        elif word != 0 and word == <uint32_t>(ino >> 32):
            key.kinds[i] = WORD_INO_HIGH
        else:
            key.constants[i] = word
            last = i if word != 0 else last
    if last < SHAPE_WORDS:          # the inode's generation comes behind what the whole file system shares
        own[0] = key.constants[last]
        key.constants[last] = 0
        key.kinds[last] = WORD_OWN
    return True


cdef file_handle *_put_together(const shape_key *key, uint64_t ino, uint32_t own) noexcept nogil:
    """The file handle that was taken apart, or NULL."""
    cdef file_handle *made = <file_handle *>malloc(sizeof(file_handle) + 4 * key.words)
    cdef uint32_t words[4]
    cdef uint32_t i
    if made == NULL:
        return NULL
    made.handle_type = key.handle_type
    made.handle_bytes = 4 * key.words
    words[WORD_INO_LOW] = <uint32_t>ino
    words[WORD_INO_HIGH] = <uint32_t>(ino >> 32)
    words[WORD_OWN] = own
    for i in range(key.words):
        words[WORD_CONSTANT] = key.constants[i]
        memcpy(made.f_handle + 4 * i, &words[key.kinds[i]], 4)
    return made


cdef void keep_handle(node *n, const file_handle *of) noexcept nogil:
    """Note a node's file handle where the next engine finds it, if it is short."""
    n.by_handle.words = 0
    if of.handle_bytes <= sizeof(n.by_handle.data) and of.handle_bytes % 4 == 0:
        memcpy(n.by_handle.data, of.f_handle, of.handle_bytes)
        n.by_handle.type = of.handle_type
        n.by_handle.words = of.handle_bytes // 4


cdef uint8_t *kept_handle(const node *n) noexcept nogil:
    """The struct file_handle that was noted, to be freed by the caller; or NULL."""
    cdef uint32_t size = 4 * n.by_handle.words
    cdef file_handle *made = NULL
    if 0 < size <= sizeof(n.by_handle.data):
        made = <file_handle *>malloc(sizeof(file_handle) + size)
    if made != NULL:
        made.handle_type = n.by_handle.type
        made.handle_bytes = size
        memcpy(made.f_handle, n.by_handle.data, size)
    return <uint8_t *>made


# ---- nodes ---------------------------------------------------------------------------------------------------------

cdef void _put_place(shape_key *key, const place *where) noexcept nogil:
    """Member by member: keys are compared as bytes, and what lies between members is anything."""
    key.where.epoch = where.epoch
    key.where.trie = where.trie
    key.where.allowed = where.allowed
    key.where.shield = where.shield
    key.where.depth = where.depth
    key.where.taken = where.taken


cdef bint fold_locked(session *s, node *n) noexcept nogil:
    """Keep nothing but the record of a node without descriptor that nobody uses, and free it. False: it stays."""
    cdef record *r = record_at(s, n.index)
    cdef shape_key key
    cdef uint32_t own = 0
    cdef uint16_t index
    if n.revive == NULL or n.flags & NODE_REVIVE_BY_PATH or n.lookups > MOST_LOOKUPS:
        return False
    memset(&key, 0, sizeof(key))
    if not _take_apart(<file_handle *>n.revive, n.ino, &key, &own):
        return False
    key.device = n.device
    key.type = n.type
    _put_place(&key, &n.where)
    index = _shape_locked(s, &key)
    if index == NO_INDEX:
        return False
    s.shapes[index].users += 1
    r.shape = index
    r.own = own
    r.lookups = <uint16_t>n.lookups
    r.body.seen = n.seen
    written()
    r.stamp &= ~<uint32_t>RECORD_AWAKE
    node_free_locked(s, n)
    return True


cdef node *unfold_locked(session *s, uint32_t index) noexcept nogil:
    """The node of an index that is in use, made from its record if it was folded; NULL without memory."""
    cdef record *r = record_at(s, index)
    cdef const shape_key *key
    cdef node *n
    if r.stamp & RECORD_AWAKE:
        return r.body.awake
    key = &s.shapes[r.shape].key
    n = node_new_locked(s)
    if n == NULL:
        return NULL
    n.revive = <uint8_t *>_put_together(key, r.ino, r.own)
    if n.revive == NULL:
        node_free_locked(s, n)
        return NULL
    keep_handle(n, <file_handle *>n.revive)
    n.ino = r.ino
    n.index = index
    n.fd = -1
    n.lookups = r.lookups
    n.seen = r.body.seen
    n.device = key.device
    n.type = key.type
    n.where = key.where
    r.body.awake = n
    written()
    r.stamp |= RECORD_AWAKE
    _leave_shape_locked(s, r.shape)
    return n


cdef void drop_folded_locked(session *s, uint32_t index) noexcept nogil:
    """Free a folded node that nobody knows any more."""
    cdef uint16_t of = record_at(s, index).shape
    record_free_locked(s, index)
    _leave_shape_locked(s, of)
