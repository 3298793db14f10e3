"""One interface over every transport: borrowed receive buffers, reserve-then-commit sends, explicit waiting.

A channel carries whole messages in both directions. It owns its descriptor (or its ring) and its buffers; it belongs
to one thread at a time. No function blocks but `wait`. Errors are negative errno values.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from qtfs_common.protocol cimport MAX_MESSAGE, caller, header, write_request

cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_UNIX

cdef struct message:                # a received message; `body` is lent until the next `receive` on the channel
    header head                     # copied out and checked
    uint8_t *body                   # what follows the header; the receiver may write into it
    size_t body_bytes

cdef struct channel_operations:
    # 1: a message; RECEIVE_BEGUN: a part of a long one, if wanted (tell_begun); 0: none yet; -EPROTO: malformed;
    # -ECONNRESET: the peer is gone; other -errno
    int (*receive)(channel *, message *) noexcept nogil
    # room for a message of at most that many bytes (header included); NULL: too large. `bulk`: it will be mostly file
    # data, so where the transport has shared memory it is built in there, and not read again
    uint8_t *(*reserve)(channel *, size_t, bint) noexcept nogil
    # send the first bytes of the reserved room, then `payload`, which stays the caller's and must outlive the send;
    # 0: gone; -EAGAIN: call flush when writable, with the same buffers still in place
    int (*commit)(channel *, size_t, const void *, size_t) noexcept nogil
    int (*flush)(channel *) noexcept nogil
    # where the bytes of the next message from the given one on will lie, up to the longest message's, for the owner to
    # have filled in what will not be read again; they stay there until it sends something. NULL: nowhere, or not now
    uint8_t *(*place)(channel *, size_t) noexcept nogil
    # as commit, of a message whose last bytes, so many, `place` has found a place for, and nothing was sent since
    int (*commit_placed)(channel *, size_t, const void *, size_t, size_t) noexcept nogil
    # whether nobody else can have written what was found in that place
    bint (*owns_place)(channel *) noexcept nogil
    # send an encoded message, or what is left of it, without the owner's buffers: how many bytes went, or -errno. Other
    # threads may, if they see to it that one does at a time and the owner does not commit
    ssize_t (*put)(channel *, const uint8_t *, size_t) noexcept nogil
    # the owner is done with the last message: its room may be used again
    void (*release)(channel *) noexcept nogil
    # before its owner leaves it to epoll(7), until a message comes (WAIT_READABLE) or there is room: whether that is
    # already so, and after it was woken
    bint (*doze)(channel *, int) noexcept nogil
    void (*wake)(channel *) noexcept nogil
    # from any thread: let the owner find the channel broken (SHUT_RDWR) or at its end (SHUT_RD)
    void (*cut)(channel *, int) noexcept nogil
    # wait for room to read or write, for wake_fd or other_fd (-1: none) to become readable, or for the time to pass;
    # returns WAIT_* bits, 0 on time-out; timeout_us -1: for ever
    int (*wait)(channel *, int, int, int, int64_t) noexcept nogil
    void (*close)(channel *) noexcept nogil

cdef enum:
    INBOX_BYTES = MAX_MESSAGE + 8192    # one message and the beginning of the next
    UNTRUSTED_LIMIT = 8192              # longest message from a peer that has not been let in yet
    LONG_BYTES = 128 << 10              # WRITEs and replies to READ from this on may be begun before they are whole
    # But for groups; of any long message, so much is waited for before it is looked at.
    WRITE_FIXED_BYTES = sizeof(header) + sizeof(caller) + sizeof(write_request)

cdef enum:
    RECEIVE_BEGUN = 2

cdef enum:
    WAIT_READABLE = 1
    WAIT_WRITABLE = 2
    WAIT_WOKEN = 4
    WAIT_OTHER = 8

cdef struct channel:
    const channel_operations *ops
    int fd                          # the socket, or what rings if the messages go by shared memory
    int family                      # AF_* of the socket, if the messages go by it
    void *ring                      # ring_end of rings/channel.pxd; NULL: the messages go by the socket
    uint64_t copied                 # bytes that went through a buffer of ours, in both directions
    uint32_t largest                # the longest message that can be sent, bytes
    uint32_t limit                  # longest message accepted, bytes; raised once the peer is known
    uint16_t begun_op               # `receive` says RECEIVE_BEGUN, once, of a long message that is not whole: of this op
    size_t first_bytes              # which is found out when so many bytes have come, at most
    bint told_begun                 # it has
    uint8_t *inbox                  # received bytes [begin, end); NULL while nothing is lent and nothing is kept
    size_t inbox_bytes
    size_t begin
    size_t end
    bint inbox_lent                 # the inbox belongs to the caller (lend_inbox)
    uint8_t *outbox
    size_t outbox_bytes
    bint outbox_lent
    const uint8_t *unsent[2]        # what flush still has to send
    size_t unsent_bytes[2]
    uint8_t *kept_output            # unsent bytes that outlived the caller's buffers (park)

cdef void socket_channel_init(channel *ch, int fd) noexcept nogil
cdef int own_buffers(channel *ch) noexcept nogil
cdef void lend_buffers(channel *ch, uint8_t *inbox, size_t inbox_bytes, uint8_t *outbox, size_t outbox_bytes) noexcept nogil
cdef int park(channel *ch) noexcept nogil
cdef void tell_begun(channel *ch, uint16_t op, size_t first_bytes) noexcept nogil
cdef int commit_from_pipe(channel *ch, size_t size, int pipe, size_t pipe_bytes) noexcept nogil
cdef size_t begun(channel *ch, message *out) noexcept nogil
cdef int receive_part(channel *ch, size_t size) noexcept nogil
cdef ssize_t receive_to_pipe(channel *ch, int pipe, size_t size) noexcept nogil
cdef int receive_from_pipe(channel *ch, int pipe, size_t size) noexcept nogil
cdef void release_buffers(channel *ch) noexcept nogil
cdef int poll_socket(channel *ch, short events, int wake_fd, int other_fd, int64_t timeout_us,
                     int *others) noexcept nogil
cdef int64_t now_us() noexcept nogil

cdef class Connection:
    cdef channel ch
    cdef bint open
    cdef public uint32_t max_payload    # of READ and WRITE, as the handshake found; 0: not known yet
    cdef int _begin(self) except -1
    cdef int _wait(self, int want, int64_t deadline) except -1
