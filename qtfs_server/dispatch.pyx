"""The operation table, and slots: each request of a slot takes effect once, however often it arrives.

The model is NFSv4.1's session, RFC 8881 section 2.10.6. Replies of operations that must not run twice are kept (they are
short); the others are executed again when repeated.
"""
from libc.errno cimport EIO, ENOMEM, ENOSYS, EPROTO
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from qtfs_common.protocol cimport *
from qtfs_common.transport cimport message
from qtfs_server.identity cimport act_as_root, identity
from qtfs_server.includes.linux cimport pthread_mutex_lock, pthread_mutex_unlock
from qtfs_server.operations cimport directories, files, inodes, locks, names, streams
from qtfs_server.request cimport DEFERRED, HANDED_OVER, MALFORMED, operation_function, request
from qtfs_server.nodes cimport evict
from qtfs_server.session cimport SAVED_REPLY_BYTES, session, slot
from qtfs_server.splicing cimport splice_pipe

cdef struct table_entry:
    operation_function run
    bint repeatable                 # executing it twice has no other effect than once

cdef table_entry _table[OP_COUNT]


cdef void _define(int op, operation_function run, bint repeatable) noexcept:
    _table[op].run = run
    _table[op].repeatable = repeatable


cdef int _errand(request *r) noexcept nogil:
    """What a thread of its own does (errands.py): it may take long, or needs Python. The body is checked there."""
    return HANDED_OVER


cdef bint is_errand(uint16_t op) noexcept nogil:
    """Whether an operation is such a one."""
    return op < OP_COUNT and _table[op].run == _errand


_define(OP_LOOKUP, names.op_lookup, False)
_define(OP_FORGET, names.op_forget, False)
_define(OP_GETATTR, inodes.op_getattr, True)
_define(OP_SETATTR, inodes.op_setattr, False)
_define(OP_READLINK, inodes.op_readlink, True)
_define(OP_SYMLINK, names.op_symlink, False)
_define(OP_MKNOD, names.op_mknod, False)
_define(OP_MKDIR, names.op_mkdir, False)
_define(OP_UNLINK, names.op_unlink, False)
_define(OP_RMDIR, names.op_rmdir, False)
_define(OP_RENAME, names.op_rename, False)
_define(OP_LINK, names.op_link, False)
_define(OP_OPEN, files.op_open, False)
_define(OP_READ, files.op_read, True)
_define(OP_WRITE, files.op_write, False)
_define(OP_STATFS, inodes.op_statfs, True)
_define(OP_RELEASE, files.op_release, False)
_define(OP_FSYNC, files.op_fsync, False)
_define(OP_SETXATTR, inodes.op_setxattr, False)
_define(OP_GETXATTR, inodes.op_getxattr, True)
_define(OP_LISTXATTR, inodes.op_listxattr, True)
_define(OP_REMOVEXATTR, inodes.op_removexattr, False)
_define(OP_FLUSH, files.op_flush, False)
_define(OP_OPENDIR, directories.op_opendir, False)
_define(OP_READDIR, directories.op_readdir, True)
_define(OP_RELEASEDIR, files.op_release, False)
_define(OP_FSYNCDIR, files.op_fsync, False)
_define(OP_GETLK, locks.op_getlk, True)
_define(OP_SETLK, locks.op_setlk, False)
_define(OP_SETLKW, locks.op_setlkw, True)
_define(OP_ACCESS, inodes.op_access, True)
_define(OP_CREATE, files.op_create, False)
_define(OP_TMPFILE, files.op_tmpfile, False)
_define(OP_IOCTL, files.op_ioctl, False)
_define(OP_FALLOCATE, files.op_fallocate, False)
_define(OP_LSEEK, files.op_lseek, True)
_define(OP_COPY_FILE_RANGE, files.op_copy_file_range, False)
_define(OP_STATX, inodes.op_statx, True)
_define(OP_SYNCFS, inodes.op_syncfs, True)
_define(OP_POLL, streams.op_poll, True)
_define(OP_SYSMOUNT, _errand, False)
_define(OP_SYSUMOUNT, _errand, False)
_define(OP_KILL, _errand, False)
_define(OP_SETAFFINITY, _errand, False)
_define(OP_GETAFFINITY, _errand, True)
_define(OP_PROCESSES, _errand, True)
_define(OP_LIST_MOUNTS, _errand, True)


cdef int _unpack(request *r, const message *msg) noexcept nogil:
    """Split a message into caller, groups and body. 0 or MALFORMED."""
    cdef size_t groups
    if msg.body_bytes < sizeof(caller):
        return MALFORMED
    memcpy(&r.who, msg.body, sizeof(caller))
    groups = groups_bytes(r.who.ngroups)
    if r.who.ngroups > MAX_GROUPS or msg.body_bytes - sizeof(caller) < groups:
        return MALFORMED
    r.groups = msg.body + sizeof(caller)
    r.body = r.groups + groups
    r.body_bytes = msg.body_bytes - sizeof(caller) - groups
    r.head = msg.head
    return 0


cdef int execute(request *r, counters *count, const message *msg) noexcept nogil:
    """Run one file operation: 0, -errno, MALFORMED or DEFERRED; the body of the reply is at r.reply.

    The caller has set s, me, scratch, reply, reply_room, repeated and may_wait.
    """
    cdef int result
    if msg.head.op >= OP_COUNT or _table[msg.head.op].run == NULL:
        return MALFORMED
    result = _unpack(r, msg)
    if result < 0:
        return result
    r.reply_bytes = 0
    r.keep_reply = not _table[msg.head.op].repeatable
    count.requests[msg.head.op] += 1
    result = _table[msg.head.op].run(r)
    act_as_root(r.me)
    evict(r.s)
    if result < 0:
        r.reply_bytes = 0
        if result > MALFORMED:
            count.errors[msg.head.op] += 1
    return result


# ---- slots -------------------------------------------------------------------------------------------------------

cdef int _take_slot(session *s, slot *at, const header *head, bint *repeated) noexcept nogil:
    """Admit a request: the one after the last, or the last again. 0, MALFORMED or SLOT_BUSY."""
    cdef int result = 0
    pthread_mutex_lock(&s.guard)
    repeated[0] = head.sequence == at.sequence
    if head.sequence == 0 or not repeated[0] and head.sequence != at.sequence + 1:
        result = MALFORMED
    elif at.busy:
        result = SLOT_BUSY
    else:
        at.busy = 1
        at.sequence = head.sequence
        if not repeated[0]:
            at.saved_bytes = 0
    pthread_mutex_unlock(&s.guard)
    return result


cdef void _save_reply(slot *at, const uint8_t *reply, size_t size) noexcept nogil:
    """Keep a reply until the slot's next request. Long ones, of reads that cannot be repeated, give their room back."""
    cdef size_t room = max(size, <size_t>SAVED_REPLY_BYTES)
    if room != at.saved_room:
        free(at.saved)
        at.saved = <uint8_t *>malloc(room)
        at.saved_room = <uint32_t>room if at.saved != NULL else 0
    if at.saved != NULL:
        memcpy(at.saved, reply, size)
        at.saved_bytes = <uint32_t>size


cdef void _leave_slot(session *s, slot *at) noexcept nogil:
    pthread_mutex_lock(&s.guard)
    at.busy = 0
    pthread_mutex_unlock(&s.guard)


cdef void _reply_header(const message *msg, int error, size_t body_bytes, uint8_t *out) noexcept nogil:
    cdef header *head = <header *>out
    head.length = <uint32_t>(sizeof(header) + body_bytes)
    head.op = msg.head.op
    head.flags = MESSAGE_REPLY
    head.error = error
    head.slot = msg.head.slot
    head.sequence = msg.head.sequence
    head.tag = msg.head.tag


cdef int _execute_admitted(request *r, slot *at, counters *count, const message *msg, uint8_t *out,
                           size_t *out_bytes) noexcept nogil:
    """Execute what _take_slot admitted. 0, HANDED_OVER or MALFORMED."""
    cdef int result = execute(r, count, msg)
    if result == HANDED_OVER:
        return HANDED_OVER
    if result <= MALFORMED:
        return MALFORMED
    _reply_header(msg, -result, r.reply_bytes, out)
    out_bytes[0] = sizeof(header) + (r.reply_bytes if r.pipe == NULL or r.pipe.bytes == 0 else 0)
    if r.keep_reply:
        _save_reply(at, out, out_bytes[0])
    return 0


cdef int execute_in_slot(session *s, uint32_t slot_index, identity *me, uint8_t *scratch, counters *count,
                         const message *msg, uint8_t *out, size_t room, splice_pipe *pipe,
                         size_t *out_bytes) noexcept nogil:
    """Execute a request of a slot, or find the reply it got before. 0 (the reply is at `out`), MALFORMED or SLOT_BUSY.

    HANDED_OVER: the slot stays taken until settle_in_slot or abandon_in_slot. `pipe`: where the body may be instead, which
    then holds some bytes; NULL: nowhere.
    """
    cdef slot *at = &s.slot_table[slot_index]
    cdef request r
    cdef int result = MALFORMED
    if msg.head.op != OP_SETLKW:        # what may wait belongs on the event channel
        result = _take_slot(s, at, &msg.head, &r.repeated)
    if result < 0:
        return result
    if r.repeated and at.saved_bytes > 0:
        memcpy(out, at.saved, at.saved_bytes)
        out_bytes[0] = at.saved_bytes
        count.repeated += 1
        result = 0
    else:
        r.s = s
        r.me = me
        r.scratch = scratch
        r.reply = out + sizeof(header)
        r.reply_room = room - sizeof(header)
        r.pipe = pipe
        r.may_wait = False
        result = _execute_admitted(&r, at, count, msg, out, out_bytes)
        if result == HANDED_OVER:
            return HANDED_OVER
    _leave_slot(s, at)
    return result


cdef void settle_in_slot(session *s, uint32_t slot_index, uint16_t op, const uint8_t *reply, size_t size) noexcept nogil:
    """End a request that was handed over: keep its reply if it must not run twice, and free the slot."""
    cdef slot *at = &s.slot_table[slot_index]
    if not _table[op].repeatable:
        _save_reply(at, reply, size)
    _leave_slot(s, at)


cdef void abandon_in_slot(session *s, uint32_t slot_index) noexcept nogil:
    """End a request that was handed over and has had no effect."""
    _leave_slot(s, &s.slot_table[slot_index])
