"""What all sessions share, and how no session takes so much of it that others would feel it.

There is one rule: a session may have as much of a thing as is left when it has it. So a single greedy one gets half, a
second one a quarter, and there is always something for who comes next. Descriptors go by the same rule (descriptors.pyx). Nodes and
open files have a limit of their own, too.
"""
from libc.stdint cimport int64_t, uint32_t

from qtfs_server.includes.linux cimport atomic_add_i64
from qtfs_server.session cimport MAX_HANDLES, MAX_NODES, MAX_SHARES

cdef int64_t[MAX_SHARES] _limits
cdef int64_t[MAX_SHARES] _taken         # atomic
_limits[<int>SHARE_LOCK_WAITS] = 1 << 16
_limits[<int>SHARE_LOCK_RANGES] = 1 << 20
_limits[<int>SHARE_OPENINGS] = 1 << 14
_limits[<int>SHARE_STREAM_WAITS] = 1 << 16
_limits[<int>SHARE_STREAM_BYTES] = 1 << 28

max_nodes = MAX_NODES
max_handles = MAX_HANDLES


cdef bint share_take(session *s, share what, int64_t amount) noexcept nogil:
    """Take so much more, to be given back; False: then the session would have more than it leaves."""
    cdef int64_t ours = atomic_add_i64(&s.shares[<int>what], amount)
    cdef int64_t taken = atomic_add_i64(&_taken[<int>what], amount)
    if ours <= _limits[<int>what] - taken:
        return True
    share_give(s, what, amount)
    return False


cdef void share_give(session *s, share what, int64_t amount) noexcept nogil:
    """Give back what share_take gave."""
    atomic_add_i64(&s.shares[<int>what], -amount)
    atomic_add_i64(&_taken[<int>what], -amount)


def set_limits(uint32_t nodes, uint32_t handles) -> None:
    """How many nodes and open files a session may have."""
    global max_nodes, max_handles
    max_nodes = nodes
    max_handles = handles
