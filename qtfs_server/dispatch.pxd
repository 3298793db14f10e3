"""From a received message to a reply: operation table, slots, exactly-once."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_common.pipes cimport splice_pipe
from qtfs_common.protocol cimport OP_COUNT, header
from qtfs_common.transport cimport message
from qtfs_server.identity cimport identity
from qtfs_server.request cimport early_write, execution, request
from qtfs_server.session cimport session

cdef struct counters:               # of one worker
    uint64_t requests[OP_COUNT]
    uint64_t errors[OP_COUNT]
    uint64_t repeated
    uint64_t continued              # begun by an engine that died meanwhile
    uint64_t malformed

cdef enum:
    SLOT_BUSY = -100002             # another worker still executes this very request, or another connection has the slot

cdef int execute(request *r, counters *count, const message *msg) noexcept nogil
cdef int execute_in_slot(session *s, uint32_t slot_index, const void *channel, identity *me, uint8_t *scratch,
                         counters *count, execution *at_work, const message *msg, const early_write *early,
                         uint8_t *out, size_t room, splice_pipe *pipe, size_t *out_bytes) noexcept nogil
cdef int unpack(request *r, const message *msg) noexcept nogil
cdef bint enter_slot_early(session *s, uint32_t slot_index, const header *head) noexcept nogil
cdef bint is_errand(uint16_t op) noexcept nogil
cdef void settle_in_slot(session *s, uint32_t slot_index, uint16_t op, const uint8_t *reply, size_t size) noexcept nogil
cdef void abandon_in_slot(session *s, uint32_t slot_index) noexcept nogil
