"""One file operation on its way through the server, and what every operation does first with its body."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_common.pipes cimport splice_pipe
from qtfs_common.protocol cimport MAX_NAME, caller, header, name_is_valid, write_request
from qtfs_server.identity cimport act_as, identity
from qtfs_server.session cimport intent, session

cdef enum:
    MALFORMED = -100000             # not an errno: the message breaks the protocol, the connection ends
    DEFERRED = -100001              # the reply comes later, over the event channel
    HANDED_OVER = -100003           # a thread of its own carries the request out and answers on this channel

cdef struct execution:              # what a worker is at, for who looks whether it is stuck (stuck.pyx)
    uint64_t turn                   # atomic: another one with each thing it does; 0: it waits for work
    uint64_t session                # id
    uint64_t node
    uint64_t handle                 # 0: none
    const char *name                # that is looked up in the node; NULL: none. Memory of the worker's
    uint16_t op                     # 0: none
    bint changes                    # waits while the file system is frozen

cdef struct early_write:            # a long WRITE, begun before all of it had come (early.pyx)
    size_t done                     # bytes of its data that are in the file; 0: none
    write_request asked             # its fixed part then

cdef struct request:
    session *s
    execution *at
    identity *me
    header head
    caller who
    uint8_t *groups                 # uint32_t[who.ngroups], unaligned
    uint8_t *body
    size_t body_bytes
    uint8_t *reply                  # room for the reply's body
    size_t reply_room
    size_t reply_bytes              # set by the operation
    splice_pipe *pipe               # may take the end of the reply's body instead of `reply`, and tells; NULL: it may not
    uint8_t *scratch                # SCRATCH_BYTES of the worker, for directory blocks and the like
    const early_write *early        # what of a WRITE is done already; NULL: nothing
    bint repeated                   # it was executed before, and may be again
    bint resumed                    # the engine before us died while it executed this
    intent *before                  # what it had found; to be filled in for the engine behind us. NULL: an event channel's
    bint may_wait                   # it came on the event channel: DEFERRED is allowed
    bint keep_reply                 # set by the operation: executing it again would not give the same

cdef enum:
    SCRATCH_BYTES = 65536 + 4096

# An operation returns 0, -errno, MALFORMED or DEFERRED.
ctypedef int (*operation_function)(request *) noexcept nogil


cdef inline void as_caller(request *r) noexcept nogil:
    """From here to the end of the request the thread has the caller's ids, groups and capabilities."""
    act_as(r.me, r.who.uid, r.who.gid, <const uint32_t *>r.groups, r.who.ngroups)


cdef inline void note_node(request *r, int error, uint64_t node) noexcept nogil:
    """Should we die before the reply is kept: this lookup was counted for nothing."""
    if error == 0 and r.before != NULL:
        r.before.granted_node = node


cdef inline void note_handle(request *r, int error, uint64_t handle) noexcept nogil:
    """Should we die before the reply is kept: this handle was opened for nothing."""
    if error == 0 and r.before != NULL:
        r.before.granted_handle = handle


cdef int take_name(request *r, size_t offset, size_t length, char *out) noexcept nogil
cdef int copy_text(request *r, size_t offset, size_t length, size_t limit, char *out) noexcept nogil
