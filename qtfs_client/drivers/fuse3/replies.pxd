from libc.stdint cimport uint32_t, uint64_t

from qtfs_client.drivers.fuse3.state cimport mount_state, replier, worker
from qtfs_client.includes.fuse_abi cimport fuse_in_header
from qtfs_common.protocol cimport open_reply
from qtfs_common.transport cimport message

cdef replier reply_handler(uint32_t opcode) noexcept nogil
cdef bint answer_from_memory_locked(mount_state *m, int device, const fuse_in_header *request) noexcept nogil
cdef bint is_fifo_or_device(uint32_t mode) noexcept nogil
cdef uint32_t open_flags(mount_state *m, const open_reply *opened, uint32_t asked) noexcept nogil
cdef void note_undo(worker *w, message *m) noexcept nogil
cdef void queue_forget(mount_state *m, uint64_t node, uint64_t lookups) noexcept nogil
cdef void take_forgets(mount_state *m, const fuse_in_header *request) noexcept nogil
