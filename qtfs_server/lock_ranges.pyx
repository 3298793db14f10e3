"""Ranges of a file that one owner has locked. What fcntl(2) says of splitting and merging is done here.

Whoever changes ranges has reserved before: what the kernel has granted cannot fail to be noted.
"""
from libc.errno cimport ENOLCK, ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from qtfs_server.shares cimport SHARE_LOCK_RANGES, share_give, share_take


cdef int ranges_reserve(held_ranges *ranges) noexcept nogil:
    """Make the next change possible. 0, -ENOLCK or -ENOMEM."""
    cdef held_range *fresh
    while ranges.spares < SPARES:
        if not share_take(ranges.s, SHARE_LOCK_RANGES, 1):
            return -ENOLCK
        fresh = <held_range *>malloc(sizeof(held_range))
        if fresh == NULL:
            share_give(ranges.s, SHARE_LOCK_RANGES, 1)
            return -ENOMEM
        fresh.next = ranges.spare
        ranges.spare = fresh
        ranges.spares += 1
    return 0


cdef held_range *_insert(held_ranges *ranges, held_range **at, uint64_t start, uint64_t end,
                         uint32_t type) noexcept nogil:
    cdef held_range *fresh = ranges.spare
    ranges.spare = fresh.next
    ranges.spares -= 1
    fresh.start = start
    fresh.end = end
    fresh.type = type
    fresh.next = at[0]
    at[0] = fresh
    return fresh


cdef void _remove(held_ranges *ranges, held_range **at) noexcept nogil:
    cdef held_range *gone = at[0]
    at[0] = gone.next
    free(gone)
    share_give(ranges.s, SHARE_LOCK_RANGES, 1)


cdef held_range **_clear(held_ranges *ranges, uint64_t start, uint64_t end) noexcept nogil:
    """Take a range away from all there are; where a new one is to be inserted."""
    cdef held_range **at = &ranges.first
    while at[0] != NULL and at[0].end < start:
        at = &at[0].next
    if at[0] != NULL and at[0].start < start:
        if at[0].end > end:
            _insert(ranges, &at[0].next, end + 1, at[0].end, at[0].type)
        at[0].end = start - 1
        at = &at[0].next
    while at[0] != NULL and at[0].end <= end:
        _remove(ranges, at)
    if at[0] != NULL and at[0].start <= end:
        at[0].start = end + 1
    return at


cdef void _merge_next(held_ranges *ranges, held_range *r) noexcept nogil:
    if r.next != NULL and r.next.type == r.type and r.next.start == r.end + 1:
        r.end = r.next.end
        _remove(ranges, &r.next)


cdef void _merge(held_ranges *ranges, held_range *fresh) noexcept nogil:
    """Join a range with its neighbours on both sides."""
    cdef held_range *before = ranges.first
    _merge_next(ranges, fresh)
    while before != fresh and before.next != fresh:
        before = before.next
    if before != fresh:
        _merge_next(ranges, before)


cdef void ranges_change(held_ranges *ranges, uint64_t start, uint64_t end, uint32_t type) noexcept nogil:
    """Lock or unlock a range, after ranges_reserve."""
    cdef held_range **at = _clear(ranges, start, end)
    if type != UNLOCKED:
        _merge(ranges, _insert(ranges, at, start, end, type))


cdef bint ranges_conflict(const held_ranges *ranges, uint64_t start, uint64_t end, uint32_t type) noexcept nogil:
    """Whether some of it excludes a lock of another owner."""
    cdef const held_range *r = ranges.first
    while r != NULL and r.start <= end:
        if r.end >= start and (type == EXCLUSIVE or r.type == EXCLUSIVE):
            return True
        r = r.next
    return False


cdef void ranges_free(held_ranges *ranges) noexcept nogil:
    """Forget everything, spares too."""
    while ranges.first != NULL:
        _remove(ranges, &ranges.first)
    while ranges.spare != NULL:
        _remove(ranges, &ranges.spare)
    ranges.spares = 0
