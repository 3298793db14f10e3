"""Stream sockets (unix, tcp, vsock) as channels, and `Connection`, the same channel for Python code.

Sources: socket(7), unix(7), vsock(7), tcp(7); the framing is doc/protocol.md's.
"""
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EMSGSIZE, ENOMEM, EPROTO, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close, read

from qtfs_common.includes.polling cimport POLLIN, POLLOUT, pollfd
from qtfs_common.protocol cimport MAX_MESSAGE, header

import os

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    """

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    enum:
        MSG_DONTWAIT
        MSG_MORE
        MSG_NOSIGNAL
        SOL_SOCKET
        SO_DOMAIN
        AF_INET
        AF_INET6
    ctypedef unsigned int socklen_t
    int getsockopt(int, int, int, void *, socklen_t *)
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)
    int shutdown(int, int)
    ssize_t sendmsg(int, const msghdr *, int)

cdef extern from "<fcntl.h>" nogil:
    enum:
        SPLICE_F_MOVE
        SPLICE_F_NONBLOCK
    ssize_t splice(int, int64_t *, int, int64_t *, size_t, unsigned int)

cdef extern from "<poll.h>" nogil:
    int ppoll(pollfd *, unsigned long, const timespec *, const void *)

cdef int64_t now_us() noexcept nogil:
    """CLOCK_MONOTONIC in microseconds."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000 + now.tv_nsec // 1000


# ---- receiving ---------------------------------------------------------------------------------------------------

cdef int _next_message(channel *ch, message *out) noexcept nogil:
    """Take one whole message from the inbox: 1, or 0 if it is incomplete, or -EPROTO."""
    cdef size_t have = ch.end - ch.begin
    if have < sizeof(header):
        return 0
    memcpy(&out.head, ch.inbox + ch.begin, sizeof(header))
    if out.head.length < sizeof(header) or out.head.length > ch.limit:
        return -EPROTO
    if have < out.head.length:
        return 0
    out.body = ch.inbox + ch.begin + sizeof(header)
    out.body_bytes = out.head.length - sizeof(header)
    ch.begin += out.head.length
    return 1


cdef void _make_room(channel *ch) noexcept nogil:
    """Move what is left to the front if the message it begins might not fit behind it."""
    if ch.begin == ch.end:
        ch.begin = ch.end = 0
    elif ch.begin > 0 and ch.begin + ch.limit > ch.inbox_bytes:
        memmove(ch.inbox, ch.inbox + ch.begin, ch.end - ch.begin)
        ch.end -= ch.begin
        ch.begin = 0


cdef size_t begun(channel *ch, message *out) noexcept nogil:
    """Of a long message that is not whole: its header, where its body lies, and how much of that has come.

    0: there is none of the op that is wanted, or its fixed part has not come yet.
    """
    cdef size_t have = ch.end - ch.begin
    if ch.begun_op == 0 or have < WRITE_FIXED_BYTES:
        return 0
    memcpy(&out.head, ch.inbox + ch.begin, sizeof(header))
    if out.head.op != ch.begun_op or out.head.length < LONG_BYTES or out.head.length > ch.limit or \
            out.head.length > ch.inbox_bytes - ch.begin:
        return 0
    out.body = ch.inbox + ch.begin + sizeof(header)
    out.body_bytes = out.head.length - sizeof(header)
    return min(have, <size_t>out.head.length) - sizeof(header)


cdef int receive_part(channel *ch, size_t size) noexcept nogil:
    """Let up to `size` bytes come into the inbox, of a message that `begun` shows: 1; 0: none now; or -errno."""
    cdef ssize_t got = -1
    while got < 0:
        got = recv(ch.fd, ch.inbox + ch.end, size, MSG_DONTWAIT)
        if got < 0 and errno != EINTR:
            return 0 if errno == EAGAIN else -errno
    ch.end += got
    ch.copied += got
    return 1 if got > 0 else -ECONNRESET


cdef ssize_t receive_to_pipe(channel *ch, int pipe, size_t size) noexcept nogil:
    """Let up to `size` bytes of a message that `begun` shows go into a pipe, by reference; on a socket only.

    In the inbox they are counted, but not there. How many; 0: none now; or -errno.
    """
    cdef ssize_t got = splice(ch.fd, NULL, pipe, NULL, size, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    if got < 0:
        return 0 if errno in (EAGAIN, EINTR) else -errno
    ch.end += got
    return got if got > 0 else -ECONNRESET


cdef int receive_from_pipe(channel *ch, int pipe, size_t size) noexcept nogil:
    """Put the last `size` bytes that were received, still in the pipe, into the inbox after all. 0 or -errno."""
    cdef ssize_t got
    while size > 0:
        got = read(pipe, ch.inbox + ch.end - size, size)
        if got > 0:
            size -= got
            ch.copied += got
        elif got == 0 or errno != EINTR:
            return -EPROTO
    return 0


cdef size_t _first_part(const channel *ch) noexcept nogil:
    """How much to receive at most, while it is not known whether a long message comes (`begun`)."""
    cdef size_t have = ch.end - ch.begin
    return ch.first_bytes - have if ch.begun_op and have < WRITE_FIXED_BYTES else INBOX_BYTES


cdef int _socket_receive(channel *ch, message *out) noexcept nogil:
    cdef int found
    while True:
        found = _next_message(ch, out)
        if found == 0 and not ch.told_begun and begun(ch, out) > 0:
            ch.told_begun = True
            return RECEIVE_BEGUN
        if found != 0:
            ch.told_begun = False
            return found
        _make_room(ch)
        found = receive_part(ch, min(_first_part(ch), ch.inbox_bytes - ch.end))
        if found <= 0:
            return found


# ---- sending -----------------------------------------------------------------------------------------------------

cdef uint8_t *_socket_reserve(channel *ch, size_t size, bint bulk) noexcept nogil:
    return ch.outbox if size <= ch.outbox_bytes else NULL


cdef void _advance(channel *ch, size_t sent) noexcept nogil:
    cdef size_t part
    cdef int i
    for i in range(2):
        part = min(sent, ch.unsent_bytes[i])
        ch.unsent[i] += part
        ch.unsent_bytes[i] -= part
        sent -= part


cdef int _socket_flush(channel *ch) noexcept nogil:
    cdef iovec parts[2]
    cdef msghdr msg
    cdef ssize_t sent
    memset(&msg, 0, sizeof(msg))
    msg.msg_iov = parts
    while ch.unsent_bytes[0] + ch.unsent_bytes[1] > 0:
        parts[0].iov_base = <void *>ch.unsent[0]
        parts[0].iov_len = ch.unsent_bytes[0]
        parts[1].iov_base = <void *>ch.unsent[1]
        parts[1].iov_len = ch.unsent_bytes[1]
        msg.msg_iovlen = 2 if ch.unsent_bytes[1] > 0 else 1
        sent = sendmsg(ch.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent >= 0:
            ch.copied += sent
            _advance(ch, sent)
        elif errno == EAGAIN:
            return -EAGAIN
        elif errno != EINTR:
            return -errno
    if ch.kept_output != NULL:
        free(ch.kept_output)
        ch.kept_output = NULL
    return 0


cdef int _socket_commit(channel *ch, size_t size, const void *payload, size_t payload_bytes) noexcept nogil:
    ch.unsent[0] = ch.outbox
    ch.unsent_bytes[0] = size
    ch.unsent[1] = <const uint8_t *>payload
    ch.unsent_bytes[1] = payload_bytes
    return _socket_flush(ch)


cdef uint8_t *_socket_place(channel *ch, size_t before) noexcept nogil:
    return NULL


cdef int _take_from_pipe(channel *ch, size_t at, int pipe, size_t pipe_bytes) noexcept nogil:
    """Let flush send what a pipe still holds, behind `at` bytes of the outbox. 0 or -errno."""
    cdef ssize_t got
    while pipe_bytes > 0:
        got = read(pipe, ch.outbox + at, pipe_bytes)
        if got > 0:
            at += got
            pipe_bytes -= got
        elif got == 0 or errno != EINTR:
            return -EPROTO
    ch.unsent[0] = ch.outbox
    ch.unsent_bytes[0] = at
    ch.unsent_bytes[1] = 0
    return 0


cdef int commit_from_pipe(channel *ch, size_t size, int pipe, size_t pipe_bytes) noexcept nogil:
    """As commit, with a payload that a pipe holds; on a socket only. After another error than EAGAIN some may be left."""
    cdef ssize_t sent = send(ch.fd, ch.outbox, size, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE)
    cdef int status
    if sent != <ssize_t>size:
        status = _take_from_pipe(ch, size, pipe, pipe_bytes)
        ch.unsent[0] += max(sent, 0)
        ch.unsent_bytes[0] -= max(sent, 0)
        return status if status < 0 else _socket_flush(ch)
    while pipe_bytes > 0:
        sent = splice(pipe, NULL, ch.fd, NULL, pipe_bytes, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        if sent > 0:
            pipe_bytes -= sent
        elif sent == 0 or errno != EINTR:
            status = _take_from_pipe(ch, 0, pipe, pipe_bytes)
            return status if status < 0 else _socket_flush(ch)
    return 0


cdef ssize_t _socket_put(channel *ch, const uint8_t *data, size_t size) noexcept nogil:
    cdef ssize_t sent = send(ch.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    while sent < 0 and errno == EINTR:
        sent = send(ch.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    return sent if sent >= 0 else -errno


cdef void _socket_release(channel *ch) noexcept nogil:
    """The inbox is used again by the next `receive`."""


# ---- waiting, closing --------------------------------------------------------------------------------------------

cdef int poll_socket(channel *ch, short events, int wake_fd, int other_fd, int64_t timeout_us,
                     int *others) noexcept nogil:
    """ppoll(2) on the channel's descriptor, whose events are returned, and on two more (-1: none), see WAIT_WOKEN."""
    cdef pollfd fds[3]
    cdef timespec limit
    fds[0].fd = ch.fd
    fds[0].events = events
    fds[1].fd = wake_fd
    fds[2].fd = other_fd
    fds[1].events = fds[2].events = POLLIN
    fds[0].revents = fds[1].revents = fds[2].revents = 0
    others[0] = 0
    limit.tv_sec = timeout_us // 1000000
    limit.tv_nsec = (timeout_us % 1000000) * 1000
    if ppoll(fds, 3, NULL if timeout_us < 0 else &limit, NULL) <= 0:
        return 0
    others[0] = (WAIT_WOKEN if fds[1].revents != 0 else 0) | (WAIT_OTHER if fds[2].revents != 0 else 0)
    return fds[0].revents


cdef int _socket_wait(channel *ch, int want, int wake_fd, int other_fd, int64_t timeout_us) noexcept nogil:
    cdef int result = 0
    cdef int events = (POLLIN if want & WAIT_READABLE else 0) | (POLLOUT if want & WAIT_WRITABLE else 0)
    cdef int seen = poll_socket(ch, <short>events, wake_fd, other_fd, timeout_us, &result)
    if seen & POLLOUT and want & WAIT_WRITABLE:
        result |= WAIT_WRITABLE
    if seen & ~POLLOUT:             # errors and hang-ups show themselves when reading
        result |= WAIT_READABLE
    return result


cdef bint _socket_doze(channel *ch, int want) noexcept nogil:
    """epoll(7) sees for itself."""
    return False


cdef void _socket_wake(channel *ch) noexcept nogil:
    """Nothing was said."""


cdef void _socket_cut(channel *ch, int how) noexcept nogil:
    shutdown(ch.fd, how)


cdef void _release_inbox(channel *ch) noexcept nogil:
    if not ch.inbox_lent:
        free(ch.inbox)
    ch.inbox = NULL
    ch.inbox_bytes = ch.begin = ch.end = 0


cdef void _release_outbox(channel *ch) noexcept nogil:
    if not ch.outbox_lent:
        free(ch.outbox)
    ch.outbox = NULL
    ch.outbox_bytes = 0


cdef void release_buffers(channel *ch) noexcept nogil:
    """What `close` begins with."""
    _release_inbox(ch)
    _release_outbox(ch)
    free(ch.kept_output)
    ch.kept_output = NULL
    ch.unsent_bytes[0] = ch.unsent_bytes[1] = 0


cdef void _socket_close(channel *ch) noexcept nogil:
    release_buffers(ch)
    if ch.fd >= 0:
        close(ch.fd)
    ch.fd = -1


cdef channel_operations _socket_operations
_socket_operations.receive = _socket_receive
_socket_operations.reserve = _socket_reserve
_socket_operations.commit = _socket_commit
_socket_operations.flush = _socket_flush
_socket_operations.place = _socket_place
_socket_operations.put = _socket_put
_socket_operations.release = _socket_release
_socket_operations.wait = _socket_wait
_socket_operations.doze = _socket_doze
_socket_operations.wake = _socket_wake
_socket_operations.cut = _socket_cut
_socket_operations.close = _socket_close


cdef void socket_channel_init(channel *ch, int fd) noexcept nogil:
    """Make `ch` a channel over the connected stream socket `fd`, which it owns from now on; it has no buffers yet."""
    cdef socklen_t size = sizeof(ch.family)
    memset(ch, 0, sizeof(channel))
    ch.ops = &_socket_operations
    ch.fd = fd
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &ch.family, &size)
    ch.limit = UNTRUSTED_LIMIT
    ch.largest = INBOX_BYTES


cdef void tell_begun(channel *ch, uint16_t op, size_t first_bytes) noexcept nogil:
    """Let `receive` tell of long messages of an op (0: of none) that are not whole.

    `first_bytes`: taken of a message, at most, before it is known whether it is such a one; more than WRITE_FIXED_BYTES.
    Only where splice(2) moves pages out of the socket: other families than these copy them, and allocate some for that.
    """
    ch.begun_op = op if ch.family in (AF_UNIX, AF_INET, AF_INET6) else 0
    ch.first_bytes = first_bytes


# ---- buffers: a client's channel owns its own, the server's workers lend theirs ------------------------------------

cdef int own_buffers(channel *ch) noexcept nogil:
    """Allocate buffers that stay with the channel until it is closed: 0 or -ENOMEM. Untouched pages cost nothing."""
    ch.inbox = <uint8_t *>malloc(INBOX_BYTES)
    ch.outbox = <uint8_t *>malloc(INBOX_BYTES)
    if ch.inbox == NULL or ch.outbox == NULL:
        return -ENOMEM
    ch.inbox_bytes = ch.outbox_bytes = INBOX_BYTES
    return 0


cdef void lend_buffers(channel *ch, uint8_t *inbox, size_t inbox_bytes, uint8_t *outbox,
                       size_t outbox_bytes) noexcept nogil:
    """Let the channel work in the caller's buffers (each INBOX_BYTES at least) until `park`."""
    cdef size_t kept = ch.end - ch.begin
    if kept > 0:
        memcpy(inbox, ch.inbox + ch.begin, kept)
    _release_inbox(ch)
    ch.inbox = inbox
    ch.inbox_bytes = inbox_bytes
    ch.inbox_lent = True
    ch.end = kept
    ch.outbox = outbox
    ch.outbox_bytes = outbox_bytes
    ch.outbox_lent = True


cdef int park(channel *ch) noexcept nogil:
    """Give lent buffers back; the channel keeps a copy of what it had not finished with. 0 or -ENOMEM."""
    cdef size_t kept = ch.end - ch.begin, unsent = ch.unsent_bytes[0] + ch.unsent_bytes[1]
    cdef uint8_t *copy = NULL
    cdef uint8_t *output
    if kept > 0:
        copy = <uint8_t *>malloc(kept)
        if copy == NULL:
            return -ENOMEM
        memcpy(copy, ch.inbox + ch.begin, kept)
    if unsent > 0 and ch.kept_output == NULL:
        output = <uint8_t *>malloc(unsent)
        if output == NULL:
            free(copy)
            return -ENOMEM
        memcpy(output, ch.unsent[0], ch.unsent_bytes[0])
        if ch.unsent_bytes[1] > 0:      # the payload is NULL if there is none
            memcpy(output + ch.unsent_bytes[0], ch.unsent[1], ch.unsent_bytes[1])
        ch.kept_output = output
        ch.unsent[0] = output
        ch.unsent_bytes[0] = unsent
        ch.unsent_bytes[1] = 0
    ch.inbox = copy
    ch.inbox_bytes = kept
    ch.inbox_lent = False
    ch.begin = 0
    ch.end = kept
    ch.outbox = NULL
    ch.outbox_bytes = 0
    ch.outbox_lent = False
    return 0


# ---- for Python ----------------------------------------------------------------------------------------------------

cdef class Connection:
    """A channel for Python code: handshakes, tests, and drivers that are not per-request nogil code."""

    def __init__(self, int fd) -> None:
        """Take over the connected stream socket `fd`."""
        socket_channel_init(&self.ch, fd)
        self._begin()

    cdef int _begin(self) except -1:
        self.open = True
        self.ch.limit = MAX_MESSAGE
        if own_buffers(&self.ch) < 0:
            raise MemoryError
        return 0

    def __dealloc__(self):
        self.close()

    def close(self) -> None:
        """Close the channel and free its buffers; more than once does no harm."""
        if self.open:
            self.open = False
            self.ch.ops.close(&self.ch)

    def fileno(self) -> int:
        """The descriptor, still owned by the connection; -1 once closed."""
        return self.ch.fd

    def detach(self) -> int:
        """Give the descriptor away and close the rest. Received bytes that were not taken are lost."""
        cdef int fd = self.ch.fd
        self.ch.fd = -1
        self.close()
        return fd

    def send(self, bytes data not None, double timeout_s=30.0) -> None:
        """Send one encoded message whole. Raises OSError, or TimeoutError."""
        cdef size_t size = len(data)
        cdef uint8_t *room = self.ch.ops.reserve(&self.ch, size, False) if self.open else NULL
        if room == NULL:
            raise OSError(EMSGSIZE, os.strerror(EMSGSIZE))
        memcpy(room, <const uint8_t *>data, size)
        cdef int64_t deadline = now_us() + <int64_t>(timeout_s * 1e6)
        cdef int done = self.ch.ops.commit(&self.ch, size, NULL, 0)
        while done == -EAGAIN:
            self._wait(WAIT_WRITABLE, deadline)
            done = self.ch.ops.flush(&self.ch)
        if done < 0:
            raise OSError(-done, os.strerror(-done))

    def receive(self, double timeout_s=30.0) -> tuple[int, int, int, int, int, int, bytes]:
        """The next message: (op, flags, error, slot, sequence, tag, body). Raises OSError, or TimeoutError."""
        cdef message msg
        cdef int found = 0
        cdef int64_t deadline = now_us() + <int64_t>(timeout_s * 1e6)
        while self.open:
            found = self.ch.ops.receive(&self.ch, &msg)
            if found != 0:
                break
            self._wait(WAIT_READABLE, deadline)
        if found <= 0:
            found = found or -ECONNRESET
            raise OSError(-found, os.strerror(-found))
        return (msg.head.op, msg.head.flags, msg.head.error, msg.head.slot, msg.head.sequence, msg.head.tag,
                (<char *>msg.body)[:msg.body_bytes])

    cdef int _wait(self, int want, int64_t deadline) except -1:
        """Wait until the deadline, in slices: a Python signal handler runs between them."""
        cdef int64_t left = deadline - now_us()
        if left <= 0:
            raise TimeoutError("the peer does not answer")
        with nogil:
            self.ch.ops.wait(&self.ch, want, -1, -1, min(left, 200000))
        return 0
