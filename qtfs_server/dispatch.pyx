"""The operation table, and slots: each request of a slot takes effect once, however often it arrives.

The model is NFSv4.1's session, RFC 8881 section 2.10.6. Replies of operations that must not run twice are kept (they are
short); the others are executed again when repeated. Slots lie in the session's state file, so that this holds across the
death of an engine: a request that it was executing is marked, and operations/unfinished.pyx tells what became of it.
"""
from libc.errno cimport EINVAL, EIO, ENOMEM, ENOSYS, EPROTO
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from qtfs_common.pipes cimport splice_pipe
from qtfs_common.protocol cimport *
from qtfs_common.transport cimport message
from qtfs_server.handles cimport handle_end
from qtfs_server.identity cimport NO_ID, act_as_root, identity
from qtfs_server.includes.linux cimport pthread_mutex_lock, pthread_mutex_unlock, written
from qtfs_server.operations cimport directories, files, inodes, locks, names, streams
from qtfs_server.request cimport DEFERRED, HANDED_OVER, MALFORMED, execution, operation_function, request
from qtfs_server.node_descriptors cimport evict
from qtfs_server.nodes cimport node_forget
from qtfs_server.session cimport MOST_LISTED, SAVED_REPLY_BYTES, intent, session, slot
from qtfs_server.stuck cimport has_to_wait, note_execution

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


cdef int unpack(request *r, const message *msg) noexcept nogil:
    """Split a message into caller, groups and body. 0, MALFORMED, or -EINVAL: its caller can be nobody."""
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
    return -EINVAL if r.who.uid == NO_ID or r.who.gid == NO_ID else 0


cdef int execute(request *r, counters *count, const message *msg) noexcept nogil:
    """Run one file operation: 0, -errno, MALFORMED or DEFERRED; the body of the reply is at r.reply.

    The caller has set s, at, me, scratch, reply, reply_room, repeated and may_wait.
    """
    cdef int result
    if msg.head.op >= OP_COUNT or _table[msg.head.op].run == NULL:
        return MALFORMED
    r.reply_bytes = 0
    result = unpack(r, msg)
    if result < 0:
        return result
    r.keep_reply = not _table[msg.head.op].repeatable
    count.requests[msg.head.op] += 1
    note_execution(r)
    if not r.may_wait and not r.resumed and has_to_wait(r.s, r.at, r.body, r.body_bytes):
        return -ERROR_DELAYED
    result = _table[msg.head.op].run(r)
    act_as_root(r.me)
    evict(r.s)
    if result < 0:
        r.reply_bytes = 0
        if result > MALFORMED:
            count.errors[msg.head.op] += 1
    return result


# ---- slots -------------------------------------------------------------------------------------------------------

cdef int _take_slot(session *s, slot *at, const void *channel, const header *head, bint *repeated) noexcept nogil:
    """Admit a request: the one after the last, or the last again. 0, MALFORMED or SLOT_BUSY.

    What was read from a connection whose place another has taken comes late: its client has been told how far we were.
    """
    cdef int result = 0
    pthread_mutex_lock(&s.guard)
    repeated[0] = head.sequence == at.sequence
    if head.sequence == 0 or not repeated[0] and head.sequence != at.sequence + 1:
        result = MALFORMED
    elif at.busy or at.connection != channel:
        result = SLOT_BUSY
    else:
        if not repeated[0]:
            at.saved_bytes = 0
            at.unfinished = False
            at.before.known = False
            at.before.granted_node = at.before.granted_handle = 0
            at.before.listed_count = 0
            written()
        at.sequence = head.sequence
        at.busy = 1
    pthread_mutex_unlock(&s.guard)
    return result


cdef void _save_reply(slot *at, const uint8_t *reply, size_t size) noexcept nogil:
    """Keep a reply until the slot's next request. Long ones are of reads that cannot be repeated, and end with us."""
    cdef uint8_t *room = at.saved
    if size > SAVED_REPLY_BYTES:
        free(at.long_reply)
        at.long_reply = room = <uint8_t *>malloc(size)
    if room != NULL:
        memcpy(room, reply, size)
        written()
        at.saved_bytes = <uint32_t>size


cdef void _say_again(slot *at, uint8_t *out, size_t room, size_t *out_bytes) noexcept nogil:
    """The reply that was kept; EIO if the connection before this one took longer ones."""
    cdef header *head = <header *>out
    cdef const uint8_t *kept = at.long_reply
    if at.saved_bytes <= SAVED_REPLY_BYTES:
        kept = at.saved
    out_bytes[0] = at.saved_bytes if at.saved_bytes <= room else sizeof(header)
    memcpy(out, kept, out_bytes[0])
    if out_bytes[0] < at.saved_bytes:
        head.length = sizeof(header)
        head.error = EIO


cdef void _take_back(session *s, intent *before) noexcept nogil:
    """Take back what an engine before us granted in a request that it did not answer; it is about to be granted again."""
    if before.granted_handle != 0:
        handle_end(s, before.granted_handle)
    if before.granted_node != 0:
        node_forget(s, before.granted_node, 1)
    before.granted_handle = before.granted_node = 0


cdef void _take_back_listing(session *s, intent *before) noexcept nogil:
    """Take back the lookups that a READDIR counted whose reply was lost; it is about to count them again."""
    cdef uint32_t i, count = min(before.listed_count, <uint32_t>MOST_LISTED)
    before.listed_count = 0
    for i in range(count):
        node_forget(s, before.listed[i], 1)


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
    if result == HANDED_OVER and r.resumed and not _table[msg.head.op].repeatable:
        result = -EIO               # a mount or a signal: nobody knows
    if result == HANDED_OVER:
        return HANDED_OVER
    if result <= MALFORMED:
        return MALFORMED
    _reply_header(msg, -result, r.reply_bytes, out)
    out_bytes[0] = sizeof(header) + r.reply_bytes - (r.pipe.bytes if r.pipe != NULL else 0)
    if r.keep_reply:
        _save_reply(at, out, out_bytes[0])
    return 0


cdef int execute_in_slot(session *s, uint32_t slot_index, const void *channel, identity *me, uint8_t *scratch,
                         counters *count, execution *at_work, const message *msg, const early_write *early,
                         uint8_t *out, size_t room, splice_pipe *pipe, size_t *out_bytes) noexcept nogil:
    """Execute a request of a slot, or find the reply it got before. 0 (the reply is at `out`), MALFORMED or SLOT_BUSY.

    `channel`: the connection that it came by. HANDED_OVER: the slot stays taken until settle_in_slot or abandon_in_slot.
    `pipe`: where the end of the body may be instead, which then holds some bytes; NULL: nowhere.
    """
    cdef slot *at = &s.slot_table[slot_index]
    cdef request r
    cdef int result = MALFORMED
    if msg.head.op != OP_SETLKW:        # what may wait belongs on the event channel
        result = _take_slot(s, at, channel, &msg.head, &r.repeated)
    if result < 0:
        return result
    if r.repeated and at.saved_bytes > 0:
        _say_again(at, out, room, out_bytes)
        count.repeated += 1
        result = 0
    else:
        r.s = s
        r.at = at_work
        r.me = me
        r.scratch = scratch
        r.reply = out + sizeof(header)
        r.reply_room = room - sizeof(header)
        r.pipe = pipe
        r.early = early
        r.may_wait = False
        r.before = &at.before
        _take_back_listing(s, &at.before)
        r.resumed = r.repeated and at.unfinished
        if r.resumed:
            count.continued += 1
            _take_back(s, &at.before)
        result = _execute_admitted(&r, at, count, msg, out, out_bytes)
        if result == HANDED_OVER:
            return HANDED_OVER
    _leave_slot(s, at)
    return result


cdef bint enter_slot_early(session *s, uint32_t slot_index, const header *head) noexcept nogil:
    """Take a slot for a new request that is not whole yet, until abandon_in_slot; it does not count as received.

    False: it has to be received whole first.
    """
    cdef slot *at = &s.slot_table[slot_index]
    cdef bint admitted
    pthread_mutex_lock(&s.guard)
    admitted = not at.busy and head.sequence == at.sequence + 1
    if admitted:
        at.busy = 1
    pthread_mutex_unlock(&s.guard)
    return admitted


cdef void settle_in_slot(session *s, uint32_t slot_index, uint16_t op, const uint8_t *reply, size_t size) noexcept nogil:
    """End a request that was handed over: keep its reply if it must not run twice, and free the slot."""
    cdef slot *at = &s.slot_table[slot_index]
    if not _table[op].repeatable:
        _save_reply(at, reply, size)
    _leave_slot(s, at)


cdef void abandon_in_slot(session *s, uint32_t slot_index) noexcept nogil:
    """End a request that was handed over and has had no effect."""
    _leave_slot(s, &s.slot_table[slot_index])
