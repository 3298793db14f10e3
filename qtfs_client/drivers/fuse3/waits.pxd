"""Requests that the server answers on the event channel, when it can."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t

from qtfs_client.drivers.fuse3.state cimport builder, mount_state, worker
from qtfs_common.transport cimport message

cdef int wait_for_server(worker *w, builder build, uint16_t op, uint64_t done) noexcept nogil
cdef bint next_wait_message(mount_state *m, uint8_t **found, size_t *size) noexcept nogil
cdef void take_wait_reply(mount_state *m, const message *got) noexcept nogil
cdef void see_to_waits_locked(mount_state *m, int64_t now) noexcept nogil
cdef void ask_again(mount_state *m, bint same_session) noexcept nogil
cdef void free_waits(mount_state *m) noexcept nogil
