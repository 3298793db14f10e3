"""One connection of a client, whatever it is for."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from qtfs_common.rings.memory cimport ring_memory
from qtfs_common.transport cimport channel
from qtfs_server.includes.linux cimport pthread_mutex_t
from qtfs_server.request cimport early_write
from qtfs_server.session cimport session

cdef enum connection_state:
    STATE_NEW = 0                   # HELLO must come
    STATE_GREETED = 1               # AUTHENTICATE must come
    STATE_TRUSTED = 2               # MOUNT or ATTACH must come
    STATE_SLOT = 3
    STATE_EVENT = 4

cdef struct connection:
    int kind
    channel ch
    int state
    bint needs_authentication
    uint8_t client_nonce[32]
    uint8_t server_nonce[32]
    session *s                      # a counted reference
    uint32_t slot
    int64_t since_us
    early_write early               # of the message that is not whole yet
    int64_t partial_since_us        # when a worker first saw the message that is not whole yet; 0: none
    bint is_vsock
    uint32_t probes                 # of its peer's machine
    connection *next
    connection *previous

cdef pthread_mutex_t connections_guard
cdef connection *connections        # all of them, under the guard
cdef int32_t connection_count

cdef connection *connection_new(int fd, int kind, bint needs_authentication, ring_memory *memory) noexcept nogil
cdef void connection_free(connection *c) noexcept nogil
cdef void cut_unattached(int64_t now) noexcept nogil
cdef void probe_vsock_peers() noexcept nogil
cdef void cut_those_in(ring_memory *memory) noexcept nogil
cdef bint somebody_new() noexcept nogil
cdef uint64_t bytes_copied() noexcept nogil
