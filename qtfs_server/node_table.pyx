"""The table of a session's nodes: a record of each, by index and by (mount, inode).

A node id is (generation << 32 | index): stale and invented ones are refused by their generation. NODE_ALIAS bits in it
do not matter here.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from qtfs_common.protocol cimport NODE_ALIAS, ROOT_NODE
from qtfs_server.includes.linux cimport written
from qtfs_server.session cimport GENERATION_SHIFT, GENERATIONS, NO_INDEX, RECORD_AWAKE, RECORD_IN_USE, RECORD_LISTED, \
    node, record, record_at, session
from qtfs_server.shares cimport max_nodes
from qtfs_server.state_file cimport RECORDS, grow


cdef uint32_t _unused_locked(session *s) noexcept nogil:
    """An index for another record, or NO_INDEX."""
    cdef uint32_t index = s.record_free
    if s.nodes_used >= max_nodes:
        return NO_INDEX
    if index != NO_INDEX:
        s.record_free = record_at(s, index).next
        return index
    if grow(s.state_fd, s.state, RECORDS, s.record_count) < 0:
        return NO_INDEX
    index = s.record_count
    s.record_count += 1
    record_at(s, index).stamp = (s.salt & GENERATIONS) << GENERATION_SHIFT
    return index


cdef uint32_t _hash(uint32_t on_device, uint64_t ino) noexcept nogil:
    cdef uint64_t mixed = (ino ^ (<uint64_t>on_device << 40)) * <uint64_t>0x9E3779B97F4A7C15
    return <uint32_t>(mixed >> 32)


cdef uint32_t _device_locked(session *s, const record *r) noexcept nogil:
    return r.body.awake.device if r.stamp & RECORD_AWAKE else s.shapes[r.shape].key.device


cdef uint32_t *_chain_locked(session *s, const record *r) noexcept nogil:
    return &s.buckets[_hash(_device_locked(s, r), r.ino) & s.bucket_mask]


cdef void _link_locked(session *s, uint32_t index) noexcept nogil:
    cdef record *r = record_at(s, index)
    cdef uint32_t *chain = _chain_locked(s, r)
    r.next = chain[0]
    chain[0] = index


cdef void record_unlink_locked(session *s, uint32_t index) noexcept nogil:
    """Take a record out of its hash chain, if it still stands there: its inode number may have been used again."""
    cdef uint32_t *at = _chain_locked(s, record_at(s, index))
    while at[0] != NO_INDEX:
        if at[0] == index:
            at[0] = record_at(s, index).next
            return
        at = &record_at(s, at[0]).next


cdef void _rehash_locked(session *s) noexcept nogil:
    """Twice the buckets; without memory the chains just grow longer."""
    cdef uint32_t old = s.bucket_mask + 1, i, index, following
    cdef uint32_t *larger
    cdef uint32_t *smaller = s.buckets
    if s.nodes_used < old:
        return
    larger = <uint32_t *>calloc(old * 2, sizeof(uint32_t))
    if larger == NULL:
        return
    s.buckets = larger
    s.bucket_mask = old * 2 - 1
    for i in range(old):
        index = smaller[i]
        while index != NO_INDEX:
            following = record_at(s, index).next
            _link_locked(s, index)
            index = following
    free(smaller)


cdef uint32_t record_new_locked(session *s, node *n) noexcept nogil:
    """The record of a new node, which gets its index; or NO_INDEX."""
    cdef uint32_t index = _unused_locked(s)
    cdef record *r
    if index == NO_INDEX:
        return NO_INDEX
    r = record_at(s, index)
    r.ino = n.ino
    r.body.awake = n
    n.index = index
    written()                       # a record in use is whole, also for the next engine
    r.stamp |= RECORD_IN_USE | RECORD_AWAKE
    record_link_locked(s, index)
    return index


cdef void record_link_locked(session *s, uint32_t index) noexcept nogil:
    """Have a record that is in use found, and counted."""
    s.nodes_used += 1
    s.devices[_device_locked(s, record_at(s, index))].nodes += 1
    _link_locked(s, index)
    _rehash_locked(s)


cdef void record_free_locked(session *s, uint32_t index) noexcept nogil:
    """Take a record out of use; its next user gets another generation. Its node or shape is the caller's to free."""
    cdef record *r = record_at(s, index)
    cdef uint32_t generation = ((r.stamp >> GENERATION_SHIFT) + 1) & GENERATIONS
    record_unlink_locked(s, index)
    s.devices[_device_locked(s, r)].nodes -= 1
    r.stamp = generation << GENERATION_SHIFT | (r.stamp & RECORD_LISTED)
    r.next = s.record_free
    s.record_free = index
    s.nodes_used -= 1


cdef uint32_t find_record_locked(session *s, uint32_t on_device, uint64_t ino) noexcept nogil:
    """The index of a file's record, or NO_INDEX."""
    cdef uint32_t index = s.buckets[_hash(on_device, ino) & s.bucket_mask]
    cdef record *r
    while index != NO_INDEX:
        r = record_at(s, index)
        if r.ino == ino and _device_locked(s, r) == on_device:
            return index
        index = r.next
    return NO_INDEX


cdef uint64_t node_id(uint32_t index, const record *r) noexcept nogil:
    """What the client calls a node."""
    return ROOT_NODE if index == ROOT_NODE else <uint64_t>(r.stamp >> GENERATION_SHIFT) << 32 | index


cdef uint32_t record_of_locked(session *s, uint64_t id) noexcept nogil:
    """The index of a live node id, or NO_INDEX."""
    cdef uint32_t index = <uint32_t>id
    cdef record *r
    if index == NO_INDEX or index >= s.record_count:
        return NO_INDEX
    r = record_at(s, index)
    return index if r.stamp & RECORD_IN_USE and node_id(index, r) == id & ~NODE_ALIAS else NO_INDEX


cdef node *awake_locked(session *s, uint32_t index) noexcept nogil:
    """The node of an index, which may be NO_INDEX; NULL if there is none or it is folded."""
    if index == NO_INDEX or not record_at(s, index).stamp & RECORD_AWAKE:
        return NULL
    return record_at(s, index).body.awake
