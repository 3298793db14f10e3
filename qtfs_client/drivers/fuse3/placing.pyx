"""Long WRITEs whose data the kernel puts where the engine reads it, in shared memory.

What is read from /dev/fuse begins in the worker's buffer: all of most requests, and of a WRITE as much data as the engine
copies out in any case. The rest of the data comes behind the place that the message will have in the ring, if the channel
has one, and is not copied any more. It is brought into the buffer when the request is to go another way: over another
channel after this one broke, to the event thread, or later.
"""
from libc.errno cimport EAGAIN, EFAULT, EIO, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from qtfs_client.drivers.fuse3.device cimport reply_error
from qtfs_client.drivers.fuse3.state cimport BUFFER_BYTES, LINK_UP, worker
from qtfs_client.includes.fuse_abi cimport FUSE_BATCH_FORGET, FUSE_WRITE, fuse_in_header, fuse_write_in
from qtfs_client.includes.linux cimport iovec, load_int, readv
from qtfs_common.transport cimport WRITE_FIXED_BYTES, channel

cdef enum:
    WRITE_HEAD_BYTES = sizeof(fuse_in_header) + sizeof(fuse_write_in)
    NEAR_BYTES = WRITE_HEAD_BYTES + NEAR_DATA_BYTES
    DATA_BEFORE_BYTES = WRITE_FIXED_BYTES + NEAR_DATA_BYTES     # of a message, before what is placed
    OTHER_BYTES = 4096              # enough for what a request has besides data


cdef uint8_t *_place(worker *w) noexcept nogil:
    """Where what does not come into the buffer may go; NULL: nowhere. The kernel demands room for the longest request
    (fuse_dev_do_read in fs/fuse/dev.c).
    """
    cdef channel *ch = w.link.ch
    if w.keeps_data or load_int(&w.link.link) != LINK_UP or ch.largest < w.mount.max_payload + OTHER_BYTES:
        return NULL
    return ch.ops.place(ch, DATA_BEFORE_BYTES)


cdef void all_in_buffer(worker *w) noexcept nogil:
    """What is read next does not lie anywhere else."""
    w.placed = NULL
    w.data_lost = False


cdef void _end_what_is_lost(worker *w) noexcept nogil:
    """Of FORGETs, which the kernel waits for no answer to, the server keeps the lookups."""
    if w.request.opcode != FUSE_BATCH_FORGET:
        reply_error(w, EIO)


cdef ssize_t read_placed(worker *w, int device) noexcept nogil:
    """Read a request from a device that does not let wait, as the place may be somebody else's soon. Its size or -errno."""
    cdef iovec parts[2]
    cdef uint8_t *place = _place(w)
    cdef ssize_t got
    all_in_buffer(w)
    parts[0].iov_base = w.buffer
    parts[0].iov_len = NEAR_BYTES
    parts[1].iov_base = place if place != NULL else w.buffer + NEAR_BYTES
    parts[1].iov_len = BUFFER_BYTES - NEAR_BYTES            # to which it may have to be brought
    if place != NULL:
        parts[1].iov_len = min(parts[1].iov_len, <size_t>w.link.ch.largest - DATA_BEFORE_BYTES)
    got = readv(device, parts, 2)
    w.device = device
    if got < 0 and errno == EFAULT and place != NULL:
        w.keeps_data = True             # the memory is gone, or none that the kernel can write; it has answered EIO
        return -EAGAIN
    if got > <ssize_t>NEAR_BYTES and place != NULL:
        w.placed = place
        w.placed_bytes = got - NEAR_BYTES
        w.placed_sent = False
        if w.request.opcode == FUSE_WRITE:
            w.data_placed += w.placed_bytes
            return got
        bring_home(w)
        if w.data_lost:
            _end_what_is_lost(w)
            return -EAGAIN
    return got if got >= 0 else -errno


cdef void bring_home(worker *w) noexcept nogil:
    """Have all of the request in the buffer, while the channel is still there."""
    if w.placed == NULL:
        return
    memcpy(w.buffer + NEAR_BYTES, w.placed, w.placed_bytes)
    w.placed = NULL
    w.data_lost = not w.link.ch.ops.owns_place(w.link.ch)
