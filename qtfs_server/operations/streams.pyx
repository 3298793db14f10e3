"""open, read, write, poll and attributes of FIFOs and devices; poll of pseudo files.

All reads and writes are tried without waiting. One that would wait says so with EINPROGRESS on a slot channel; the
client asks again on the event channel, where it may wait (streams.pyx, openers.pyx). EAGAIN is for callers that do not
want to wait.

Sources: fifo(7), pipe(7), poll(2), Documentation/ABI/stable/sysfs-block.
"""
from libc.errno cimport EACCES, EAGAIN, EINPROGRESS, EINTR, ENXIO, EPERM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_common.includes.polling cimport POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM, poll, pollfd
from qtfs_common.protocol cimport NODE_STREAM_WRITER, NODE_UNCACHED, OP_READ, OP_WRITE, OPENED_UNCACHED, POLL_NOTIFY, \
    READ_NONBLOCK, WRITE_NONBLOCK, attributes_reply, count_reply, open_reply, poll_reply, poll_request, read_request, \
    write_request
from qtfs_server.handles cimport handle_new, handle_new_stream, handle_pin, handle_unpin
from qtfs_server.descriptors cimport proc_path
from qtfs_server.identity cimport act_as_root
from qtfs_server.includes.linux cimport AT_FDCWD, O_ACCMODE, O_CLOEXEC, O_NOCTTY, O_NONBLOCK, O_RDONLY, O_RDWR, \
    O_WRONLY, S_IFBLK, S_IFCHR, S_IFIFO, S_IFMT, S_IFREG, S_IFSOCK, close, ioctl, openat, pread, snprintf
from qtfs_server.openers cimport wait_to_open
from qtfs_server.policy cimport device_refusal
from qtfs_server.request cimport DEFERRED, MALFORMED, as_caller, note_handle, request
from qtfs_server.session cimport HANDLE_POLLABLE, HANDLE_STREAM, HANDLE_WRITABLE, handle, node
from qtfs_server.streams cimport stream_arm, stream_take_news, stream_wait_for

cdef extern from "<stdlib.h>" nogil:
    unsigned long long strtoull(const char *, char **, int)

cdef extern from "<sys/ioctl.h>" nogil:
    enum:
        FIONREAD

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void *, size_t)
    ssize_t write(int, const void *, size_t)

cdef enum:
    ALWAYS_READY = POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM   # DEFAULT_POLLMASK of the kernel
    SECTOR_BYTES = 512

cdef int64_t ENDLESS = <int64_t>1 << 62     # a size that no write reaches


cdef bint is_special(const node *n) noexcept nogil:
    """Whether a node is a FIFO, a socket or a device."""
    return n.type in (S_IFIFO, S_IFCHR, S_IFBLK, S_IFSOCK)


# ---- attributes --------------------------------------------------------------------------------------------------------

cdef uint64_t _block_device_bytes(uint32_t rdev) noexcept nogil:
    """Size of a block device, without opening it: /sys/dev/block/MAJOR:MINOR/size. 0 if it is not known."""
    cdef char path[64]
    cdef char text[32]
    cdef ssize_t got = -1
    cdef int fd
    snprintf(path, sizeof(path), b"/sys/dev/block/%u:%u/size", rdev >> 8 & 0xfff, (rdev & 0xff) | (rdev >> 12 & 0xfff00))
    fd = openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return 0
    got = pread(fd, text, sizeof(text) - 1, 0)
    close(fd)
    text[max(got, 0)] = 0
    return strtoull(text, NULL, 10) * SECTOR_BYTES


cdef uint32_t _bytes_to_read(int fd) noexcept nogil:
    """FIONREAD of a stream; 0 if it cannot tell."""
    cdef int available = 0
    return <uint32_t>available if ioctl(fd, FIONREAD, &available) == 0 and available > 0 else 0


cdef void show_as_stream(request *r, const node *n, attributes_reply *out) noexcept nogil:
    """Attributes of a special file under the alias that is for reading and writing: a regular file's."""
    if n.type == S_IFBLK:
        out.attr.size = _block_device_bytes(out.attr.rdev)
    else:
        # A kernel lets only one write beyond the end of a file wait at a time, and the others not even be killed.
        # A reader that shows a size other than 0, wc(1) for one, is believed to have no more than that.
        out.attr.size = ENDLESS if r.who.node & NODE_STREAM_WRITER == NODE_STREAM_WRITER else 0
    out.attr.mode = (out.attr.mode & ~<uint32_t>S_IFMT) | S_IFREG
    out.attr.rdev = 0
    out.node_flags |= NODE_UNCACHED


# ---- opening -----------------------------------------------------------------------------------------------------------

cdef int _open_as_caller(request *r, node *n, uint32_t flags) noexcept nogil:
    """A descriptor or -errno."""
    cdef char link[32]
    cdef int fd
    proc_path(link, n.fd)
    as_caller(r)
    fd = openat(AT_FDCWD, link, flags | O_CLOEXEC | O_NOCTTY)
    fd = fd if fd >= 0 else -errno
    act_as_root(r.me)
    return fd


cdef int _open_block_device(request *r, node *n, uint32_t mode, open_reply *out) noexcept nogil:
    """Like a regular file that nobody caches."""
    cdef uint64_t id = 0
    cdef int error, fd = _open_as_caller(r, n, mode)
    if fd < 0:
        return fd
    error = handle_new(r.s, n, fd, HANDLE_WRITABLE if mode != O_RDONLY else 0, mode, &id)
    note_handle(r, error, id)
    out.handle = id
    out.flags = OPENED_UNCACHED
    out.reserved = 0
    return error


cdef int _open_fifo(request *r, node *n, uint32_t mode) noexcept nogil:
    """A caller that waits for the other end. A descriptor, -errno, or DEFERRED."""
    cdef int fd = -ENXIO
    if r.may_wait:
        return wait_to_open(r, n, mode)
    if mode == O_WRONLY:
        fd = _open_as_caller(r, n, mode | O_NONBLOCK)   # there may be a reader already
    # A reader cannot find out whether there is a writer without being seen by it.
    return fd if fd != -ENXIO else -EINPROGRESS


cdef int open_special(request *r, node *n, uint32_t flags, open_reply *out) noexcept nogil:
    """OPEN of a FIFO or device that the whitelist's Open, Read and Write allow. 0, -errno or DEFERRED."""
    cdef uint32_t mode = flags & O_ACCMODE
    cdef int fd, error
    if n.type == S_IFSOCK:
        return -ENXIO
    error = 0 if n.type == S_IFIFO else device_refusal(n.fd)
    if error < 0:
        return error
    if n.type == S_IFBLK:
        return _open_block_device(r, n, mode, out)
    if n.type == S_IFIFO and not flags & O_NONBLOCK and mode != O_RDWR:
        fd = _open_fifo(r, n, mode)
    else:
        fd = _open_as_caller(r, n, mode | O_NONBLOCK)
    return fd if fd < 0 else handle_new_stream(r.s, n, fd, mode, out)


# ---- data --------------------------------------------------------------------------------------------------------------

cdef int _wait(request *r, handle *h, uint16_t op, const uint8_t *data, uint32_t size) noexcept nogil:
    """Answer now or later. DEFERRED, which takes over the handle's pin; -EAGAIN: this file never lets anybody wait."""
    cdef int error = stream_wait_for(r.s, h, op, r.head.tag, data, size, r.reply)
    return DEFERRED if error == 0 else error


cdef int read_stream(request *r, handle *h, const read_request *body) noexcept nogil:
    """READ of a stream: what is there, at most size bytes. 0, -errno, or DEFERRED, which takes over the handle's pin."""
    cdef bint may_wait = r.may_wait and not body.flags & READ_NONBLOCK
    cdef int waits = _wait(r, h, OP_READ, NULL, body.size) if may_wait else -EAGAIN
    cdef ssize_t got
    if waits != -EAGAIN:
        return waits
    got = read(h.fd, r.reply, body.size)
    r.keep_reply = True                 # it is gone from there now
    r.reply_bytes = max(got, 0)
    if got >= 0:
        return 0
    if errno not in (EAGAIN, EINTR):
        return -errno
    return -EAGAIN if r.may_wait or body.flags & READ_NONBLOCK else -EINPROGRESS


cdef int write_stream(request *r, handle *h, const uint8_t *data, const write_request *body) noexcept nogil:
    """WRITE to a stream. On a slot channel it may write a part. 0, -errno, or DEFERRED, which takes over the pin."""
    cdef bint may_wait = r.may_wait and not body.flags & WRITE_NONBLOCK
    cdef int waits = _wait(r, h, OP_WRITE, data, body.size) if may_wait else -EAGAIN
    cdef ssize_t put
    if waits != -EAGAIN:
        return waits
    put = write(h.fd, data, body.size)
    (<count_reply *>r.reply).count = max(put, 0)
    r.reply_bytes = sizeof(count_reply)
    if put >= 0:
        return 0
    if errno not in (EAGAIN, EINTR):
        return -errno
    return -EAGAIN if r.may_wait or body.flags & WRITE_NONBLOCK else -EINPROGRESS


# ---- poll --------------------------------------------------------------------------------------------------------------

cdef int op_poll(request *r) noexcept nogil:
    """POLL: poll_request → poll_reply: what is ready now. With POLL_NOTIFY, READY follows when that may have changed."""
    cdef poll_request *body = <poll_request *>r.body
    cdef poll_reply *out = <poll_reply *>r.reply
    cdef pollfd fds
    cdef handle *h = NULL
    cdef int error
    if r.body_bytes != sizeof(poll_request):
        return MALFORMED
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    fds.fd = h.fd
    fds.events = <short>body.events
    fds.revents = <short>(ALWAYS_READY & body.events)
    if h.flags & HANDLE_POLLABLE:
        if body.flags & POLL_NOTIFY:
            error = stream_arm(r.s, h, body.notify, body.events)
        # After it is armed, so that a change is seen by the one or announced by the other.
        if error == 0 and poll(&fds, 1, 0) < 0:
            error = -errno
        out.revents = <uint16_t>fds.revents | stream_take_news(h)
    else:
        out.revents = <uint16_t>fds.revents
    out.available = _bytes_to_read(h.fd) if h.flags & HANDLE_STREAM and fds.revents & POLLIN else 0
    handle_unpin(r.s, h)
    r.reply_bytes = sizeof(poll_reply)
    return 0 if error == -EPERM else error
