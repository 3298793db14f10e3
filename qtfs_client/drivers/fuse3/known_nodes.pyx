"""Nodes that special rules are about, noted by id for as long as the kernel holds lookups of them."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from qtfs_client.drivers.fuse3.special_state cimport known_node, special_state
from qtfs_client.includes.linux cimport pthread_mutex_lock, pthread_mutex_unlock
from qtfs_common.protocol cimport ROOT_NODE

cdef uint64_t TOP_BIT = <uint64_t>1 << 63      # of another purpose: the node without it is what rules know


cdef inline known_node **_bucket(special_state *s, uint64_t id) noexcept nogil:
    return &s.buckets[((id * <uint64_t>0x9E3779B97F4A7C15) >> 40) & s.bucket_mask]


cdef bint find_known(special_state *s, uint64_t id, standing *out) noexcept nogil:
    """What is known of a node; False if no rule is about it or what lies below it."""
    cdef known_node *n
    cdef bint found = False
    id &= ~TOP_BIT
    if id == ROOT_NODE:
        out.vertex = 0
        out.read_only = s.read_only_root
        return True
    pthread_mutex_lock(&s.guard)
    n = _bucket(s, id)[0]
    while n != NULL and n.id != id:
        n = n.next
    if n != NULL:
        out.vertex = n.vertex
        out.read_only = n.read_only
        found = True
    pthread_mutex_unlock(&s.guard)
    return found


cdef void _grow_locked(special_state *s) noexcept nogil:
    """Twice the buckets; without memory the chains just grow longer."""
    cdef uint32_t old = s.bucket_mask + 1, i
    cdef known_node **smaller = s.buckets
    cdef known_node **larger = <known_node **>calloc(2 * <size_t>old, sizeof(known_node *))
    cdef known_node *n
    cdef known_node *following
    if larger == NULL:
        return
    s.buckets = larger
    s.bucket_mask = 2 * old - 1
    for i in range(old):
        n = smaller[i]
        while n != NULL:
            following = n.next
            n.next = _bucket(s, n.id)[0]
            _bucket(s, n.id)[0] = n
            n = following
    free(smaller)


cdef void _note_locked(special_state *s, uint64_t id, uint32_t vertex, bint read_only) noexcept nogil:
    cdef known_node **at = _bucket(s, id)
    cdef known_node *n = at[0]
    while n != NULL and n.id != id:
        n = n.next
    if n == NULL:
        n = <known_node *>calloc(1, sizeof(known_node))
        if n == NULL:
            return
        n.id = id
        n.next = at[0]
        at[0] = n
        s.known_count += 1
    n.lookups += 1
    n.vertex = vertex
    n.read_only = read_only


cdef void note_known(special_state *s, uint64_t id, uint32_t vertex, bint read_only) noexcept nogil:
    """The kernel gets a lookup of a node that rules are about."""
    pthread_mutex_lock(&s.guard)
    if s.known_count > s.bucket_mask:
        _grow_locked(s)
    _note_locked(s, id & ~TOP_BIT, vertex, read_only)
    pthread_mutex_unlock(&s.guard)


cdef void forget_known(special_state *s, uint64_t id, uint64_t lookups) noexcept nogil:
    """The kernel gives lookups back."""
    cdef known_node **at
    cdef known_node *n
    id &= ~TOP_BIT
    pthread_mutex_lock(&s.guard)
    at = _bucket(s, id)
    while at[0] != NULL and at[0].id != id:
        at = &at[0].next
    n = at[0]
    if n != NULL and n.lookups > lookups:
        n.lookups -= lookups
    elif n != NULL:
        at[0] = n.next
        s.known_count -= 1
        free(n)
    pthread_mutex_unlock(&s.guard)
