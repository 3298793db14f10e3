"""Long WRITEs, begun before all of them has come.

What a socket brings of a long WRITE goes by splice(2) into a pipe and from there into the file, while the client still
sends the rest: so it is copied once, into the page cache, and not into a buffer before. The message is carried out as any
other when it is whole: then what is in the file already is left out. Until then nothing was promised: a WRITE that never
becomes whole is as a write(2) whose process is killed in the middle, and its repetition goes to the same place.

Nothing is written before the slot has admitted the request, nor while another worker executes it. Its fixed part is copied
and checked first, and has to be the same in the end. A peer that stops in the middle holds the worker no longer than with
any other message that is not whole.
"""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy

from qtfs_common.pipes cimport PIPE_PAGE_BYTES, pipe_drop, pipe_make, splice_pipe
from qtfs_common.protocol cimport write_request
from qtfs_common.transport cimport WAIT_READABLE, begun, channel, message, now_us, receive_from_pipe, receive_part, \
    receive_to_pipe
from qtfs_server.connection cimport connection
from qtfs_server.dispatch cimport abandon_in_slot, enter_slot_early, unpack
from qtfs_server.handles cimport handle_unpin
from qtfs_server.identity cimport act_as_root
from qtfs_server.includes.linux cimport pwrite
from qtfs_server.operations.files cimport hold_for_early_write
from qtfs_server.request cimport early_write, request
from qtfs_server.session cimport handle
from qtfs_server.splicing cimport pipe_empty_into
from qtfs_server.stuck cimport has_to_wait, note_execution
from qtfs_server.worker cimport worker

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    PIECE_BYTES = 65536             # written at a time, at least: each call costs something
    LOOKS = 64                      # for more, until the worker sleeps


cdef size_t _whole_pages(uint64_t offset, size_t size) noexcept nogil:
    """So much of `size` bytes that a write there ends with a page: no page is touched twice, or read to be filled up."""
    cdef uint64_t over = (offset + size) % PIPE_PAGE_BYTES
    return 0 if over > size else <size_t>(size - over)


cdef bint _await(connection *c, int *looks, int64_t until_us) noexcept nogil:
    """Wait a little for more to come; False: it has been long enough."""
    looks[0] += 1
    if looks[0] % LOOKS:
        sched_yield()
        return True
    return now_us() < until_us and c.ch.ops.wait(&c.ch, WAIT_READABLE, -1, -1, until_us - now_us()) != 0


# ---- from the socket into the file -----------------------------------------------------------------------------------

cdef bint _receive_up_to(connection *c, size_t size, int64_t until_us) noexcept nogil:
    """Let just that much of the message lie in the inbox."""
    cdef channel *ch = &c.ch
    cdef int looks = 0, got = 1
    while ch.end - ch.begin < size and got >= 0:
        got = receive_part(ch, size - (ch.end - ch.begin))
        if got == 0 and not _await(c, &looks, until_us):
            return False
    return got >= 0


cdef void _splice(connection *c, const handle *h, splice_pipe *p, int64_t until_us) noexcept nogil:
    """Write the data as it comes, until all of it is there. What cannot be written goes into the inbox after all."""
    cdef early_write *early = &c.early
    cdef size_t size = early.asked.size
    cdef size_t come = early.done   # of which p.bytes are in the pipe
    cdef size_t usable = 0
    cdef ssize_t got = 1
    cdef int looks = 0
    while early.done < size and got >= 0:
        got = receive_to_pipe(&c.ch, p.ends[1], size - come) if come < size else 0
        come += max(got, 0)
        p.bytes += max(got, 0)
        usable = p.bytes if come == size else _whole_pages(early.asked.offset + early.done, p.bytes)
        if usable >= PIECE_BYTES or come == size:
            got = pipe_empty_into(p, h.fd, usable, early.asked.offset + early.done)
            early.done += max(got, 0)
        elif got == 0 and not _await(c, &looks, until_us):
            break
    if p.bytes > 0 and receive_from_pipe(&c.ch, p.ends[0], p.bytes) < 0:
        pipe_drop(p)                # the message never becomes whole
    p.bytes = 0


cdef void _write(worker *w, connection *c, const handle *h, message *msg, size_t data_at,
                 int64_t until_us) noexcept nogil:
    """What the inbox has, up to the end of a page, and then the rest past it."""
    cdef early_write *early = &c.early
    cdef size_t before = msg.body - (c.ch.inbox + c.ch.begin) + data_at
    cdef size_t there = c.ch.end - c.ch.begin - before
    cdef size_t first = there + (PIPE_PAGE_BYTES - (early.asked.offset + there) % PIPE_PAGE_BYTES) % PIPE_PAGE_BYTES
    if first >= early.asked.size or not pipe_make(&w.pipe) or not _receive_up_to(c, before + first, until_us):
        return
    early.done = max(pwrite(h.fd, msg.body + data_at, first, early.asked.offset), 0)
    if early.done == first:
        w.pipe.bytes = 0
        _splice(c, h, &w.pipe, until_us)


# ---- what may be begun -----------------------------------------------------------------------------------------------

cdef bint _unpack_begun(request *r, connection *c, const message *msg, size_t there) noexcept nogil:
    """Copy and check the fixed part, if it is there."""
    cdef write_request *asked = &c.early.asked
    if unpack(r, msg) < 0 or r.body_bytes < sizeof(write_request) or \
            r.body - msg.body + sizeof(write_request) > there:
        return False
    memcpy(asked, r.body, sizeof(write_request))
    return r.body_bytes == sizeof(write_request) + <size_t>asked.size and asked.size > 0 and \
        asked.offset < (<uint64_t>1 << 62)


cdef void _write_admitted(worker *w, connection *c, request *r, message *msg, int64_t until_us) noexcept nogil:
    cdef size_t data_at = r.body - msg.body + sizeof(write_request)
    cdef handle *h = NULL
    note_execution(r)
    if has_to_wait(r.s, r.at, r.body, r.body_bytes) or hold_for_early_write(r, &c.early.asked, &h) < 0:
        return
    _write(w, c, h, msg, data_at, until_us)
    act_as_root(r.me)
    handle_unpin(r.s, h)


cdef void write_early(worker *w, connection *c, message *msg, int64_t until_us) noexcept nogil:
    """Write what is there of the message that `begun` shows, and what else comes, but do not wait longer than that."""
    cdef request r
    cdef size_t there = begun(&c.ch, msg)
    if c.early.done > 0 or not _unpack_begun(&r, c, msg, there) or not enter_slot_early(c.s, c.slot, &msg.head):
        return
    r.s = c.s
    r.at = &w.at
    r.me = &w.me
    if c.s.slot_table[c.slot].connection == c:      # else its client has gone on by another one
        _write_admitted(w, c, &r, msg, until_us)
    abandon_in_slot(c.s, c.slot)
