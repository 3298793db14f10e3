from libc.stdint cimport uint32_t, uint64_t

from qtfs_client.drivers.fuse3.state cimport mount_state, replier, worker
from qtfs_common.protocol cimport open_reply
from qtfs_common.transport cimport message

cdef replier reply_handler(uint32_t opcode) noexcept nogil
cdef bint is_fifo_or_device(uint32_t mode) noexcept nogil
cdef uint32_t open_flags(mount_state *m, const open_reply *opened) noexcept nogil
cdef void note_undo(worker *w, message *m) noexcept nogil
cdef void queue_forget(mount_state *m, uint64_t node, uint64_t lookups) noexcept nogil
