"""One file operation on its way through the server, and what every operation does first with its body."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_common.protocol cimport MAX_NAME, caller, header, name_is_valid
from qtfs_server.identity cimport act_as, identity
from qtfs_server.session cimport session
from qtfs_server.splicing cimport splice_pipe

cdef enum:
    MALFORMED = -100000             # not an errno: the message breaks the protocol, the connection ends
    DEFERRED = -100001              # the reply comes later, over the event channel
    HANDED_OVER = -100003           # a thread of its own carries the request out and answers on this channel

cdef struct request:
    session *s
    identity *me
    header head
    caller who
    uint8_t *groups                 # uint32_t[who.ngroups], unaligned
    uint8_t *body
    size_t body_bytes
    uint8_t *reply                  # room for the reply's body
    size_t reply_room
    size_t reply_bytes              # set by the operation
    splice_pipe *pipe               # may take the reply's body instead of `reply`, and tells; NULL: it may not
    uint8_t *scratch                # SCRATCH_BYTES of the worker, for directory blocks and the like
    bint repeated                   # an idempotent request that was executed before
    bint may_wait                   # it came on the event channel: DEFERRED is allowed
    bint keep_reply                 # set by the operation: executing it again would not give the same

cdef enum:
    SCRATCH_BYTES = 65536 + 4096

# An operation returns 0, -errno, MALFORMED or DEFERRED.
ctypedef int (*operation_function)(request *) noexcept nogil


cdef inline void as_caller(request *r) noexcept nogil:
    """From here to the end of the request the thread has the caller's ids, groups and capabilities."""
    act_as(r.me, r.who.uid, r.who.gid, <const uint32_t *>r.groups, r.who.ngroups)


cdef int take_name(request *r, size_t offset, size_t length, char *out) noexcept nogil
cdef int copy_text(request *r, size_t offset, size_t length, size_t limit, char *out) noexcept nogil
