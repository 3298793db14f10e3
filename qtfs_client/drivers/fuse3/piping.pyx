"""Long replies to READ on their way from a socket to the kernel, in a pipe instead of a buffer.

The beginning of the reply comes into the channel's inbox, as any message does. It goes into the pipe behind the header that
the kernel wants, and what the socket brings then follows by reference. When all of it is there splice(2) hands it to
/dev/fuse, which takes a reply whole or not at all, and copies the data to where the caller wants it: the only copy.

Only from Unix sockets: TCP's many packets are split at other places than pages are, and taking them one by one takes longer
than to copy them. A pipe holds a number of pieces, however long each is. Should they be too many, the reply is read into the
inbox after all, and the worker pipes none that long any more.

Sources: splice(2), pipe(7), fuse_dev_splice_write in fs/fuse/dev.c.
"""
from libc.errno cimport EIO, ENOENT, ENOSPC, EPROTO, errno
from libc.stdint cimport int64_t, uint32_t

from qtfs_client.drivers.fuse3.device cimport reply_error
from qtfs_client.drivers.fuse3.state cimport worker
from qtfs_client.includes.fuse_abi cimport fuse_out_header, fuse_read_in
from qtfs_client.includes.linux cimport iovec, read, writev
from qtfs_common.includes.polling cimport POLLIN, poll, pollfd
from qtfs_common.pipes cimport PIPE_PAGE_BYTES, pipe_drop, pipe_make
from qtfs_common.protocol cimport OP_READ, header
from qtfs_common.transport cimport AF_UNIX, LONG_BYTES, channel, message, receive_from_pipe, receive_to_pipe, tell_begun

cdef extern from "<fcntl.h>" nogil:
    ssize_t splice(int, int64_t *, int, int64_t *, size_t, unsigned int)

cdef enum:
    # Of a reply, before it is known whether it is a long one: a page together with what the kernel wants in front of it.
    FIRST_BYTES = sizeof(header) + PIPE_PAGE_BYTES - sizeof(fuse_out_header)


# ---- before the reply ------------------------------------------------------------------------------------------------

cdef void expect_short_reply(worker *w) noexcept nogil:
    """Let the reply to the next request come into the inbox."""
    tell_begun(w.link.ch, 0, 0)


cdef void expect_data(worker *w, size_t size) noexcept nogil:
    """The reply to a READ of that size may be a long one."""
    if w.link.ch.family == AF_UNIX and size + sizeof(header) >= LONG_BYTES and \
            (w.most_piped == 0 or size < w.most_piped):
        tell_begun(w.link.ch, OP_READ, FIRST_BYTES)


# ---- from the socket into the pipe -----------------------------------------------------------------------------------

cdef bint _put_beginning(worker *w, const message *reply, size_t there) noexcept nogil:
    """The kernel's header and what has come of the body; True if both are in the pipe."""
    cdef fuse_out_header head
    cdef iovec parts[2]
    head.len = <uint32_t>(sizeof(head) + reply.body_bytes)
    head.error = 0
    head.unique = w.request.unique
    parts[0].iov_base = &head
    parts[0].iov_len = sizeof(head)
    parts[1].iov_base = reply.body
    parts[1].iov_len = there
    w.pipe.bytes = sizeof(head) + there
    return writev(w.pipe.ends[1], parts, 2) == <ssize_t>w.pipe.bytes


cdef int begin_piping(worker *w, message *reply) noexcept nogil:
    """Let a reply to READ that has begun go into the pipe, unless it is nothing for the kernel. As `receive` of the channel."""
    cdef channel *ch = w.link.ch
    if w.answered or reply.head.error != 0 or reply.body_bytes > (<fuse_read_in *>w.argument).size or \
            not pipe_make(&w.pipe):
        return ch.ops.receive(ch, reply)
    if not _put_beginning(w, reply, ch.end - ch.begin - sizeof(header)):
        pipe_drop(&w.pipe)
        return ch.ops.receive(ch, reply)
    w.piped_bytes = sizeof(fuse_out_header) + reply.body_bytes
    return receive_piped(w, reply)


cdef bint _has_input(int fd) noexcept nogil:
    cdef pollfd fds
    fds.fd = fd
    fds.events = POLLIN
    return poll(&fds, 1, 0) > 0


cdef ssize_t _receive_some(worker *w) noexcept nogil:
    """What the socket brings now, into the pipe: how many bytes; 0: none; -ENOSPC: there is no room for them; other -errno."""
    cdef channel *ch = w.link.ch
    cdef size_t wanted = w.piped_bytes - w.pipe.bytes
    cdef ssize_t got = receive_to_pipe(ch, w.pipe.ends[1], wanted)
    if got == 0 and _has_input(ch.fd):
        got = receive_to_pipe(ch, w.pipe.ends[1], wanted)   # it may have come in between
        if got == 0:
            return -ENOSPC
    w.pipe.bytes += max(got, 0)
    return got


cdef int _bring_back(worker *w) noexcept nogil:
    """Have in the inbox what is in the pipe. 0 or -errno."""
    cdef fuse_out_header head
    cdef int status = -EPROTO
    w.most_piped = w.pipe.bytes
    w.piped_bytes = 0
    if read(w.pipe.ends[0], &head, sizeof(head)) == sizeof(head):
        status = receive_from_pipe(w.link.ch, w.pipe.ends[0], w.pipe.bytes - sizeof(head))
    w.pipe.bytes = 0
    if status < 0:
        pipe_drop(&w.pipe)
    return status


cdef int receive_piped(worker *w, message *reply) noexcept nogil:
    """As `receive` of the channel, while a reply goes into the pipe; its body is not in `reply` then."""
    cdef ssize_t got = 1
    while got > 0 and w.pipe.bytes < w.piped_bytes:
        got = _receive_some(w)
    if got == -ENOSPC:
        got = _bring_back(w)
    elif got == 0:
        return 0
    return <int>got if got < 0 else w.link.ch.ops.receive(w.link.ch, reply)


# ---- from the pipe to the kernel -------------------------------------------------------------------------------------

cdef int reply_from_pipe(worker *w) noexcept nogil:
    """Answer the request in hand with what the pipe holds. 0 or -errno of the device."""
    cdef size_t size = w.piped_bytes
    cdef ssize_t done = splice(w.pipe.ends[0], NULL, w.device, NULL, size, 0)
    cdef int error = errno if done < 0 else EIO
    if done == <ssize_t>size:
        w.piped_bytes = w.pipe.bytes = 0
        w.data_piped += size - sizeof(fuse_out_header)
        return 0
    drop_piped(w)
    # Out of memory it may not have come to the request.
    return -ENOENT if error == ENOENT else reply_error(w, EIO)


cdef void drop_piped(worker *w) noexcept nogil:
    """Give up a reply that is in the pipe, or on its way there."""
    if w.piped_bytes > 0:
        w.piped_bytes = 0
        pipe_drop(&w.pipe)
