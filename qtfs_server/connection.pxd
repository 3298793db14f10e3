"""One connection of a client, whatever it is for."""
from libc.stdint cimport int64_t, uint8_t, uint32_t

from qtfs_common.transport cimport channel
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
    int64_t partial_since_us        # when a worker first saw the message that is not whole yet; 0: none
    connection *next
    connection *previous
