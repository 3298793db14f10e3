"""Rings as channels (qtfs_common.transport)."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_common.rings.layout cimport ring_line
from qtfs_common.rings.memory cimport RingMemory, ring_memory
from qtfs_common.transport cimport Connection, channel

cdef struct ring_end:               # one side of one channel
    ring_memory *memory
    ring_line *ours
    ring_line *theirs
    uint64_t epoch
    uint32_t number                 # of the channel
    bint serves                     # the engine's side
    uint32_t sleeping               # what ours.sleeping says besides for what
    int claim_fd                    # whose lock is the claim, a client's; -1: none
    int32_t cut                     # atomic
    bint hung_up                    # nobody is at the other end of the bell
    # what we write
    uint8_t *out
    uint64_t out_bytes
    uint64_t tail
    uint64_t seen_head              # what the other side had read when last looked
    uint64_t direct                 # of a message being built in the area: how much is skipped before it, plus 1
    uint64_t placed                 # the same of one whose data is there before it is built
    # what we read
    const uint8_t *area
    uint64_t area_bytes
    uint64_t head
    uint64_t shown_head             # what ours.head says
    uint64_t lent                   # bytes of the message that the owner works on in place
    uint16_t bulk_op                # whose long messages are lent in place, instead of being copied out

cdef void greeter_init(channel *ch, int fd, ring_memory *memory) noexcept nogil
cdef bint is_greeter(const channel *ch) noexcept nogil
cdef bint works_in(const channel *ch, const ring_memory *memory) noexcept nogil

cdef class RingConnection(Connection):
    cdef RingMemory memory
