"""What each FUSE opcode needs: a row of a table, and a function that serves it.

Most requests are relayed: translated, sent, and the reply handed on. Some need no server, or more than one exchange.
"""
from libc.errno cimport EACCES, EAGAIN, EFAULT, EINPROGRESS, EINVAL, EIO, ENODATA, ENOENT, ENOSYS, ENOTTY, EOPNOTSUPP, EPIPE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from qtfs_client.drivers.fuse3.callers cimport caller_alias, caller_opens, kill_by_broken_pipe
from qtfs_client.drivers.fuse3.device cimport reply, reply_error
from qtfs_client.drivers.fuse3.exchange cimport ask, ask_for_ourselves, hand_over
from qtfs_client.drivers.fuse3.interrupts cimport interrupt
from qtfs_client.drivers.fuse3.replies cimport is_fifo_or_device, note_undo, queue_forget, reply_handler, take_forgets
from qtfs_client.drivers.fuse3.requests cimport build_forgets, build_releases, build_special_access, build_undo_release, \
    request_builder
from qtfs_client.drivers.fuse3.special cimport serve_special
from qtfs_client.drivers.fuse3.state cimport BY_HANDLE, CACHE_NONE, ENOSYS_MEANT, HANDLE_POLLABLE, HANDLE_WRITABLE, \
    MAKES_ENTRIES, MAKES_ENTRY, MAKES_HANDLE, MUST_ARRIVE, REPEATABLE, mount_state, operation_row, server, worker
from qtfs_client.drivers.fuse3.waits cimport wait_for_server
from qtfs_client.includes.fuse_abi cimport *
from qtfs_client.includes.linux cimport O_ACCMODE, O_NONBLOCK, O_RDONLY, add_int, load_int, load_u64, pthread_mutex_lock, \
    pthread_mutex_unlock, store_int, store_u64
from qtfs_common.protocol cimport MAX_RELEASES, NODE_ALIAS, NODE_STREAM_WRITER, OP_OPEN, OP_READ, OP_SETLKW, OP_WRITE, \
    attributes_reply, count_reply, entry, lock_reply, lseek_reply, poll_reply, statfs_reply, statx_reply
from qtfs_common.transport cimport message

cdef extern from "<sys/stat.h>" nogil:
    enum:
        S_IFMT
        S_IFBLK
        S_IFREG

cdef extern from *:
    """
    #define ACL_PREFIX "system.posix_acl_"
    """
    const char ACL_PREFIX[18]

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int)

cdef enum:
    LARGEST_ERRNO = 511             # the kernel refuses replies with more
    RELEASE_POLL_US = 100
    RELEASE_POLLS = 1000
    ALWAYS_READY = 0x145            # POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM: DEFAULT_POLLMASK of the kernel

cdef uint64_t ENDLESS = <uint64_t>1 << 62   # a size that no write reaches: operations/streams.pyx says why


# ---- relaying ------------------------------------------------------------------------------------------------------

cdef bint _asks_for_acl(worker *w) noexcept nogil:
    cdef size_t name_at = sizeof(fuse_getxattr_in), name_bytes = sizeof(ACL_PREFIX) - 1
    return w.argument_bytes - name_at > name_bytes and memcmp(w.argument + name_at, ACL_PREFIX, name_bytes) == 0


cdef int _kernel_error(worker *w, int error) noexcept nogil:
    """The server's errno, unless the kernel would refuse it or, for ENOSYS, give up the operation for good."""
    if error <= 0 or error > LARGEST_ERRNO:
        return EIO
    if error == EOPNOTSUPP and w.request.opcode == FUSE_GETXATTR and _asks_for_acl(w):
        return ENODATA                  # the kernel's permission check would fail with EOPNOTSUPP: fuse_get_acl()
    if error == ENOSYS and not w.row.flags & ENOSYS_MEANT:
        return ENOTTY if w.request.opcode == FUSE_IOCTL else EOPNOTSUPP
    return error


cdef void _undo(worker *w, message *given) noexcept nogil:
    """Give back what a reply granted that the kernel did not take."""
    note_undo(w, given)
    if w.undo_handle != 0:
        ask_for_ourselves(w, build_undo_release)


cdef void _conclude(worker *w, int status, message *given) noexcept nogil:
    """Tell the kernel what came of `ask`, or undo it if the kernel was told something else before."""
    if status < 0:
        if not w.answered:
            reply_error(w, -status)
    elif w.answered:
        _undo(w, given)
    elif given.head.error != 0:
        reply_error(w, _kernel_error(w, given.head.error))
    elif w.row.answer(w, given) in (-ENOENT, -EFAULT):
        _undo(w, given)


cdef int _ask(worker *w, message *given) noexcept nogil:
    return ask(w, w.row.build, w.row.flags & REPEATABLE, given)


cdef void _relay(worker *w) noexcept nogil:
    cdef message given
    _conclude(w, _ask(w, &given), &given)


cdef void _serve_lookup(worker *w) noexcept nogil:
    """LOOKUP: where absence may be cached, it is an entry without a node."""
    cdef fuse_entry_validity absent[2]
    cdef message given
    cdef int status = _ask(w, &given)
    if status == 1 and not w.answered and given.head.error == ENOENT and w.mount.absent_valid_s > 0:
        memset(absent, 0, sizeof(absent))
        absent[0].entry_valid = w.mount.absent_valid_s
        _reply_absent(w, &absent[0])
    elif status == 1 and w.mount.special_remote and _is_special(&given):
        _lookup_special(w, &given)
    elif status == 1 and w.mount.cache == CACHE_NONE and w.request.uid != 0 and _is_special(&given):
        _lookup_local_special(w, &given)
    else:
        _conclude(w, status, &given)


cdef bint _is_special(const message *given) noexcept nogil:
    """Whether a LOOKUP found a FIFO or a device."""
    return given.head.error == 0 and given.body_bytes == sizeof(entry) and \
        is_fifo_or_device((<entry *>given.body).attr.mode)


cdef void _lookup_special(worker *w, message *given) noexcept nogil:
    """LOOKUP of a FIFO or device. The kernel would open it itself, here. So whoever looks it up in order to open it gets
    another node, of a regular-looking file whose requests come to us; everybody else gets the true one.
    """
    cdef entry *found = <entry *>given.body
    cdef uint64_t alias
    hand_over(w)
    alias = 0 if w.answered else caller_alias(w.request.pid)
    if alias != 0:
        found.node |= alias
        found.attr.size = ENDLESS if alias == NODE_STREAM_WRITER and found.attr.mode & S_IFMT != S_IFBLK else 0
        found.attr.mode = (found.attr.mode & ~<uint32_t>S_IFMT) | S_IFREG
        found.attr.rdev = 0
    _conclude(w, 1, given)


cdef void _lookup_local_special(worker *w, message *given) noexcept nogil:
    """The same where the kernel is to open it itself: without default_permissions it asks nobody whether the caller may.
    So the server is asked now, if the lookup is part of an open.
    """
    cdef entry found = (<entry *>given.body)[0]
    cdef int status
    hand_over(w)
    w.asked_node = found.node
    w.asked_mask = 0 if w.answered else caller_opens(w.request.pid)
    if w.asked_mask != 0:
        status = ask(w, build_special_access, True, given)
        if status < 0 or given.head.error != 0:
            w.lookups += 1
            queue_forget(w.mount, found.node, 1)
            if not w.answered:
                reply_error(w, -status if status < 0 else _kernel_error(w, given.head.error))
            return
    given.head.error = 0
    given.body = <uint8_t *>&found
    given.body_bytes = sizeof(entry)
    _conclude(w, 1, given)


cdef void _reply_absent(worker *w, const fuse_entry_validity *absent) noexcept nogil:
    cdef uint8_t body[128]
    memset(body, 0, sizeof(body))
    (<fuse_entry_validity *>body)[0] = absent[0]
    reply(w, body, sizeof(body))


cdef void _serve_flush(worker *w) noexcept nogil:
    """FLUSH: the server need not know if there is nothing it could report and no lock that close(2) would drop."""
    cdef fuse_flush_in *asked = <fuse_flush_in *>w.argument
    if not asked.fh & HANDLE_WRITABLE and not load_int(&w.mount.posix_locks):
        reply(w, NULL, 0)
        return
    _relay(w)


cdef bint _may_end_later(worker *w) noexcept nogil:
    """Whether nobody can tell that a handle ends some microseconds later: it was for reading, of what is not a FIFO or
    device, and nothing was locked by it.
    """
    cdef fuse_release_in *asked = <fuse_release_in *>w.argument
    return asked.flags & O_ACCMODE == O_RDONLY and not asked.fh & (HANDLE_WRITABLE | HANDLE_POLLABLE) and \
        not asked.release_flags & FUSE_RELEASE_FLOCK_UNLOCK and not load_int(&w.mount.posix_locks) and \
        not w.request.nodeid & NODE_ALIAS


cdef bint _end_later(worker *w) noexcept nogil:
    """Put a handle with those that are to be ended; False if there is no more room."""
    cdef mount_state *m = w.mount
    cdef bint has_room
    pthread_mutex_lock(&m.guard)
    has_room = m.closed_count < MAX_RELEASES
    if has_room:
        m.closed[m.closed_count] = (<fuse_release_in *>w.argument).fh
        m.closed_count += 1
    pthread_mutex_unlock(&m.guard)
    return has_room


cdef void _serve_release(worker *w) noexcept nogil:
    """RELEASE, RELEASEDIR. The next request is often here sooner than the server's reply to this one would be."""
    if _may_end_later(w) and _end_later(w):
        if not w.answered:
            reply(w, NULL, 0)
        return
    add_int(&w.mount.releases, 1)
    _relay(w)
    add_int(&w.mount.releases, -1)


cdef void _take_closed(worker *w) noexcept nogil:
    """Take what is to be ended, unless somebody else is at it."""
    cdef mount_state *m = w.mount
    w.released_count = 0
    pthread_mutex_lock(&m.guard)
    if not m.ending and m.closed_count > 0:
        w.released_count = m.closed_count
        memcpy(w.released, m.closed, m.closed_count * sizeof(uint64_t))
        m.closed_count = 0
        m.ending = True
    pthread_mutex_unlock(&m.guard)


cdef void send_releases(worker *w) noexcept nogil:
    """Have the server end the handles that are to be ended. One worker does, and in an outage it waits with them: if all
    did, nobody would read the device.
    """
    cdef mount_state *m = w.mount
    _take_closed(w)
    if w.released_count == 0:
        return
    # Over connections that break, again and again: a server that does not know a handle any more only says so.
    while ask_for_ourselves(w, build_releases) < 0 and w.attempts > 0 and not load_int(&m.stopping):
        pass
    pthread_mutex_lock(&m.guard)
    m.ending = False
    pthread_mutex_unlock(&m.guard)


# ---- locks ---------------------------------------------------------------------------------------------------------

cdef void _note_lock(worker *w) noexcept nogil:
    """From the first POSIX lock on, every close has to be told to the server."""
    if not (<fuse_lk_in *>w.argument).lk_flags & FUSE_LK_FLOCK:
        store_int(&w.mount.posix_locks, 1)


cdef bint _releases_ended(worker *w) noexcept nogil:
    """Wait a moment for the RELEASEs under way; True if there were some and they ended."""
    cdef mount_state *m = w.mount
    cdef int polls = 0
    if load_int(&m.releases) == 0:
        return False
    hand_over(w)
    while load_int(&m.releases) > 0 and polls < RELEASE_POLLS:
        usleep(RELEASE_POLL_US)
        polls += 1
    return polls < RELEASE_POLLS


cdef void _serve_setlk(worker *w) noexcept nogil:
    """SETLK. close(2) returns before its RELEASE, so what comes next may find the old lock still held: one of flock(2),
    or of an open file description.
    """
    cdef message given
    cdef int status
    _note_lock(w)
    status = _ask(w, &given)
    if status == 1 and not w.answered and given.head.error == EAGAIN and _releases_ended(w):
        status = _ask(w, &given)
    _conclude(w, status, &given)


cdef void _serve_setlkw(worker *w) noexcept nogil:
    """SETLKW: tried at once, since most locks are free; if it is taken, the event thread waits for it."""
    cdef message given
    cdef int status
    _note_lock(w)
    status = _ask(w, &given)
    if status == 1 and not w.answered and given.head.error in (EAGAIN, EACCES):
        _let_wait(w, OP_SETLKW, 0)
    else:
        _conclude(w, status, &given)


# ---- FIFOs and devices -------------------------------------------------------------------------------------------------

cdef void _let_wait(worker *w, uint16_t op, uint64_t done) noexcept nogil:
    """Leave a request to the event thread."""
    cdef int error = wait_for_server(w, w.row.build, op, done)
    if error < 0:
        reply_error(w, -error)


cdef void _serve_open(worker *w) noexcept nogil:
    """OPEN: a FIFO's may have to wait for the other end. An end that was closed before must be seen to be closed."""
    cdef message given
    cdef int status
    if w.request.nodeid & NODE_ALIAS:
        _releases_ended(w)
    status = _ask(w, &given)
    if status == 1 and not w.answered and given.head.error == EINPROGRESS:
        _let_wait(w, OP_OPEN, 0)
    else:
        _conclude(w, status, &given)


cdef void _serve_read(worker *w) noexcept nogil:
    cdef message given
    cdef int status = _ask(w, &given)
    if status == 1 and not w.answered and given.head.error == EINPROGRESS:
        _let_wait(w, OP_READ, 0)
    else:
        _conclude(w, status, &given)


cdef bint _wants_all_written(worker *w) noexcept nogil:
    """write(2) to a FIFO or terminal takes everything, unless it is not to wait."""
    return w.request.nodeid & NODE_ALIAS != 0 and not (<fuse_write_in *>w.argument).flags & O_NONBLOCK


cdef void _serve_write(worker *w) noexcept nogil:
    cdef message given
    cdef uint64_t done = 0
    cdef int status = _ask(w, &given)
    if status == 1 and given.head.error == 0 and given.body_bytes == sizeof(count_reply):
        done = (<count_reply *>given.body).count
    if status == 1 and not w.answered and _wants_all_written(w) and \
            (given.head.error == EINPROGRESS or 0 < done < (<fuse_write_in *>w.argument).size):
        _let_wait(w, OP_WRITE, done)
        return
    if status == 1 and not w.answered and given.head.error == EPIPE:
        kill_by_broken_pipe(w.request.pid)
    _conclude(w, status, &given)


cdef void _note_polled(mount_state *m, uint64_t kh) noexcept nogil:
    pthread_mutex_lock(&m.guard)
    if kh > m.last_polled:
        store_u64(&m.last_polled, kh)
    pthread_mutex_unlock(&m.guard)


cdef void _serve_poll(worker *w) noexcept nogil:
    """POLL: ordinary files are always ready; -o nopoll: all files are, and the kernel does not ask again."""
    cdef fuse_poll_in *asked = <fuse_poll_in *>w.argument
    cdef fuse_poll_out out
    if not w.mount.polls:
        reply_error(w, ENOSYS)
        return
    if asked.fh & HANDLE_POLLABLE:
        if asked.kh > load_u64(&w.mount.last_polled):
            _note_polled(w.mount, asked.kh)
        _relay(w)
        return
    out.revents = ALWAYS_READY
    out.padding = 0
    reply(w, &out, sizeof(out))


# ---- what needs no server --------------------------------------------------------------------------------------------

cdef void _serve_forget(worker *w) noexcept nogil:
    take_forgets(w.mount, w.request)


cdef void send_forgets(worker *w) noexcept nogil:
    """Send one message of the forgets that are queued."""
    w.forgotten_count = 0
    ask_for_ourselves(w, build_forgets)


cdef void _serve_interrupt(worker *w) noexcept nogil:
    hand_over(w)                        # callers.pyx says why
    interrupt(w.mount, w.device, w.request.unique, (<fuse_interrupt_in *>w.argument).unique)


cdef void _serve_done(worker *w) noexcept nogil:
    """DESTROY: the end comes with ENODEV."""
    reply(w, NULL, 0)


cdef void _serve_silence(worker *w) noexcept nogil:
    """NOTIFY_REPLY, which we never ask for."""


cdef void _serve_unknown(worker *w) noexcept nogil:
    """Operations that we leave to the kernel's defaults, and those of kernels to come."""
    reply_error(w, ENOSYS)


cdef void _serve_refused(worker *w) noexcept nogil:
    reply_error(w, EIO)


# ---- table ---------------------------------------------------------------------------------------------------------

cdef operation_row _rows[FUSE_OPCODES]
cdef operation_row _unknown_row


cdef void _row(uint32_t opcode, size_t least_bytes, size_t reply_bytes, uint32_t flags) noexcept:
    """A request that is relayed: its argument's least size, the reply's size where it is fixed, what it makes."""
    _rows[opcode].serve = _relay
    _rows[opcode].build = request_builder(opcode)
    _rows[opcode].answer = reply_handler(opcode)
    _rows[opcode].least_bytes = <uint32_t>least_bytes
    _rows[opcode].reply_bytes = <uint32_t>reply_bytes
    _rows[opcode].flags = flags


cdef void _local_row(uint32_t opcode, server serve, size_t least_bytes) noexcept:
    """A request that is answered here."""
    _rows[opcode].serve = serve
    _rows[opcode].least_bytes = <uint32_t>least_bytes
    _rows[opcode].flags = BY_HANDLE


cdef void _fill_rows() noexcept:
    cdef uint32_t opcode
    _unknown_row.serve = _serve_unknown
    for opcode in range(<uint32_t>FUSE_OPCODES):
        _rows[opcode] = _unknown_row
    _row(FUSE_LOOKUP, 2, 0, REPEATABLE | MAKES_ENTRY)
    _row(FUSE_GETATTR, sizeof(fuse_getattr_in), sizeof(attributes_reply), REPEATABLE)
    _row(FUSE_SETATTR, sizeof(fuse_setattr_in), sizeof(attributes_reply), 0)
    _row(FUSE_READLINK, 0, 0, REPEATABLE)
    _row(FUSE_SYMLINK, 4, 0, MAKES_ENTRY)
    _row(FUSE_MKNOD, sizeof(fuse_mknod_in) + 2, 0, MAKES_ENTRY)
    _row(FUSE_MKDIR, sizeof(fuse_mkdir_in) + 2, 0, MAKES_ENTRY)
    _row(FUSE_UNLINK, 2, 0, 0)
    _row(FUSE_RMDIR, 2, 0, 0)
    _row(FUSE_RENAME, sizeof(fuse_rename_in) + 4, 0, 0)
    _row(FUSE_RENAME2, sizeof(fuse_rename2_in) + 4, 0, 0)
    _row(FUSE_LINK, sizeof(fuse_link_in) + 2, 0, MAKES_ENTRY)
    _row(FUSE_OPEN, sizeof(fuse_open_in), 0, MAKES_HANDLE)
    _row(FUSE_READ, sizeof(fuse_read_in), 0, REPEATABLE | BY_HANDLE)
    _row(FUSE_WRITE, sizeof(fuse_write_in), sizeof(count_reply), BY_HANDLE)
    _row(FUSE_STATFS, 0, sizeof(statfs_reply), REPEATABLE)
    _row(FUSE_RELEASE, sizeof(fuse_release_in), 0, BY_HANDLE | MUST_ARRIVE)
    _row(FUSE_FSYNC, sizeof(fuse_fsync_in), 0, REPEATABLE | BY_HANDLE)
    _row(FUSE_SETXATTR, SETXATTR_OLD_BYTES + 2, 0, 0)
    _row(FUSE_GETXATTR, sizeof(fuse_getxattr_in) + 2, 0, REPEATABLE)
    _row(FUSE_LISTXATTR, sizeof(fuse_getxattr_in), 0, REPEATABLE)
    _row(FUSE_REMOVEXATTR, 2, 0, 0)
    _row(FUSE_FLUSH, sizeof(fuse_flush_in), 0, REPEATABLE | BY_HANDLE | MUST_ARRIVE)
    _row(FUSE_OPENDIR, sizeof(fuse_open_in), 0, MAKES_HANDLE)
    _row(FUSE_READDIR, sizeof(fuse_read_in), 0, REPEATABLE | BY_HANDLE)
    _row(FUSE_READDIRPLUS, sizeof(fuse_read_in), 0, REPEATABLE | MAKES_ENTRIES | BY_HANDLE)
    _row(FUSE_RELEASEDIR, sizeof(fuse_release_in), 0, BY_HANDLE | MUST_ARRIVE)
    _row(FUSE_FSYNCDIR, sizeof(fuse_fsync_in), 0, REPEATABLE | BY_HANDLE)
    _row(FUSE_GETLK, sizeof(fuse_lk_in), sizeof(lock_reply), REPEATABLE)
    _row(FUSE_SETLK, sizeof(fuse_lk_in), 0, REPEATABLE)
    _row(FUSE_SETLKW, sizeof(fuse_lk_in), 0, REPEATABLE)
    _row(FUSE_ACCESS, sizeof(fuse_access_in), 0, REPEATABLE)
    _row(FUSE_CREATE, sizeof(fuse_create_in) + 2, 0, MAKES_ENTRY | MAKES_HANDLE)
    _row(FUSE_TMPFILE, sizeof(fuse_create_in), 0, MAKES_ENTRY | MAKES_HANDLE)
    _row(FUSE_IOCTL, sizeof(fuse_ioctl_in), 0, 0)
    _row(FUSE_POLL, sizeof(fuse_poll_in), sizeof(poll_reply), REPEATABLE | BY_HANDLE)
    _row(FUSE_FALLOCATE, sizeof(fuse_fallocate_in), 0, 0)
    _row(FUSE_LSEEK, sizeof(fuse_lseek_in), sizeof(lseek_reply), REPEATABLE)
    _row(FUSE_COPY_FILE_RANGE, sizeof(fuse_copy_file_range_in), sizeof(count_reply), ENOSYS_MEANT)
    _row(FUSE_COPY_FILE_RANGE_64, sizeof(fuse_copy_file_range_in), sizeof(count_reply), ENOSYS_MEANT)
    _row(FUSE_STATX, sizeof(fuse_statx_in), sizeof(statx_reply), REPEATABLE | ENOSYS_MEANT)
    _row(FUSE_SYNCFS, 0, 0, REPEATABLE | ENOSYS_MEANT)


cdef void _fill_special_rows() noexcept:
    _rows[FUSE_LOOKUP].serve = _serve_lookup
    _rows[FUSE_OPEN].serve = _serve_open
    _rows[FUSE_READ].serve = _serve_read
    _rows[FUSE_WRITE].serve = _serve_write
    _rows[FUSE_POLL].serve = _serve_poll
    _rows[FUSE_FLUSH].serve = _serve_flush
    _rows[FUSE_RELEASE].serve = _rows[FUSE_RELEASEDIR].serve = _serve_release
    _rows[FUSE_SETLK].serve = _serve_setlk
    _rows[FUSE_SETLKW].serve = _serve_setlkw
    _local_row(FUSE_FORGET, _serve_forget, sizeof(fuse_forget_in))
    _local_row(FUSE_BATCH_FORGET, _serve_forget, sizeof(fuse_batch_forget_in))
    _local_row(FUSE_INTERRUPT, _serve_interrupt, sizeof(fuse_interrupt_in))
    _local_row(FUSE_DESTROY, _serve_done, 0)
    _local_row(FUSE_NOTIFY_REPLY, _serve_silence, 0)
    _local_row(FUSE_INIT, _serve_refused, 0)


_fill_rows()
_fill_special_rows()


# ---- serving -------------------------------------------------------------------------------------------------------

cdef bint _is_denied(worker *w) noexcept nogil:
    """allow_root: the kernel lets everybody through, and we only the owner and root."""
    return w.mount.deny_others and w.request.uid != w.mount.owner and w.request.uid != 0 and \
        not w.row.flags & BY_HANDLE


cdef void serve(worker *w) noexcept nogil:
    """Do all that the request in hand needs. It has a whole header; its argument may be too short."""
    cdef uint32_t opcode = w.request.opcode
    w.requests += 1
    w.row = &_rows[opcode] if opcode < FUSE_OPCODES else &_unknown_row
    if w.argument_bytes < w.row.least_bytes:
        reply_error(w, EINVAL)
    elif _is_denied(w):
        reply_error(w, EACCES)
    elif w.mount.rules == NULL or not serve_special(w):
        w.row.serve(w)
