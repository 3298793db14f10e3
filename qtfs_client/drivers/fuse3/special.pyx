"""Special rules: names that this side of the mount answers for itself, leaves out, or keeps from being changed.

A rule is for a path below the mount's source, so what has to be known of a directory is which vertex of the rules' trie
it is: the root's is the first, others are noted (known_node) when a LOOKUP leads to them, until the kernel forgets them.
So are files and directories that are read-only. All other nodes cost one search in that table, and only in requests that
rules can have a part in; on a mount without rules, nothing.

Nodes made here, symbolic links and files, have ids with MADE set, which the server's never have. The rule and a number
stand in the id: the number that the name is, or that of a name met before. Nobody has to remember them. Files that are
open have handles of their own and keep the content they had when they were opened.

The kernel never caches ruled names, or attributes of what rules are about. Everything else is relayed as ever: a `detour`
puts a function of this module before the one that answers, or serves.
"""
from cpython.ref cimport PyObject
from libc.errno cimport EACCES, EEXIST, EINVAL, EINTR, EIO, ENAMETOOLONG, ENFILE, ENODATA, ENOENT, ENOLCK, ENOMEM, \
    ENOTTY, ENXIO, EPERM, EROFS, EXDEV
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset, strlen, strncmp

from qtfs_client.drivers.fuse3.callers cimport caller_process, caught_signal_pending, fatal_signal_pending, \
    process_is_called
from qtfs_client.drivers.fuse3.device cimport reply, reply_error, write_reply
from qtfs_client.drivers.fuse3.known_nodes cimport find_known, forget_known, note_known, standing
from qtfs_client.drivers.fuse3.replies cimport queue_forget
from qtfs_client.drivers.fuse3.state cimport mount_state, worker
from qtfs_client.includes.fuse_abi cimport *
from qtfs_client.includes.linux cimport O_ACCMODE, O_RDONLY, O_TRUNC, W_OK, pthread_mutex_destroy, pthread_mutex_init, \
    pthread_mutex_lock, pthread_mutex_unlock, snprintf, strnlen
from qtfs_common.protocol cimport MAX_NAME, MAX_PATH, NODE_UNCACHED, ROOT_NODE, attributes, attributes_reply, direntry, \
    direntry_bytes, direntry_plus, entry, statx_reply, timestamp
from qtfs_common.transport cimport message
from qtfs_common.tries cimport trie_child, trie_free, trie_new

import logging
import threading

from qtfs_client.replacements import content
from qtfs_common.errors import QtfsError
from qtfs_common.pathtree import NUMBER, PathTree
from qtfs_common.special import Action

cdef extern from "<sys/stat.h>" nogil:
    enum:
        S_IFLNK
        S_IFREG

cdef extern from "<time.h>" nogil:
    long time(void *)

cdef enum:
    DO_RELAY
    DO_LINK
    DO_HIDE
    DO_PROTECT
    DO_REPLACE

cdef enum:
    NO_RULE = -1
    NOWHERE = 0xffffffff            # a node that only is read-only: no rule is for what lies below it
    NUMBER_BITS = 40                # of a made node's id; the rule's index is above it. Ten digits are less
    MAX_NAMES = 65536               # that {name} stands for, numbers aside
    MAX_FILES = 65536               # made files that are open
    MAX_PRODUCTIONS = 32            # at the same time; the others wait for their turn
    FEWEST_BUCKETS = 256
    DIGIT_ZERO = 48
    DT_REG = 8
    DT_LNK = 10
    ALWAYS_READY = 0x145            # POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM
    SEEK_DATA = 3
    SEEK_HOLE = 4
    SET_FLAGS = 0x40086602          # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR: <linux/fs.h>
    SET_FSXATTR = 0x401c5820

cdef uint64_t MADE = <uint64_t>1 << 62
cdef uint64_t TOP_BIT = <uint64_t>1 << 63

log = logging.getLogger(__name__)

cdef struct poll_out:               # fuse_poll_out
    uint32_t revents
    uint32_t padding

cdef struct lseek_out:              # fuse_lseek_out
    uint64_t offset

# ---- forgetting ----------------------------------------------------------------------------------------------------

cdef void _forget_all(worker *w) noexcept nogil:
    """FORGET, BATCH_FORGET: they go to the server too, which ignores what it does not know."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef uint64_t *pairs = <uint64_t *>(w.argument + sizeof(fuse_batch_forget_in))
    cdef size_t count, i
    if w.request.opcode == FUSE_FORGET:
        forget_known(s, w.request.nodeid, (<fuse_forget_in *>w.argument).nlookup)
        return
    count = min(<size_t>(<fuse_batch_forget_in *>w.argument).count,
                (w.argument_bytes - sizeof(fuse_batch_forget_in)) // 16)
    for i in range(count):
        forget_known(s, pairs[2 * i], pairs[2 * i + 1])


# ---- which rule ------------------------------------------------------------------------------------------------------

cdef uint64_t _as_number(const char *name, size_t length) noexcept nogil:
    cdef uint64_t value = 0
    cdef size_t i
    for i in range(length):
        value = value * 10 + <uint64_t>(name[i] - DIGIT_ZERO)
    return value


cdef int _rule_of(special_state *s, uint32_t vertex, const char *name, size_t length) noexcept nogil:
    """The rule that decides about a name at a vertex, 0 being none; or NO_RULE."""
    cdef special_vertex *v = &s.vertices[vertex]
    cdef uint32_t i
    cdef special_rule *rule
    if vertex == 0:
        return NO_RULE
    for i in range(v.first_rule, v.first_rule + v.rule_count):
        rule = &s.rules[s.order[i]]
        if rule.commands == NULL or process_is_called(_as_number(name, length), rule.commands):
            return <int>s.order[i]
    return NO_RULE


cdef uint32_t _step(special_state *s, const standing *at, const char *name, size_t length) noexcept nogil:
    """The vertex of a name in a directory; 0: none."""
    return trie_child(s.paths, at.vertex, <const uint8_t *>name, length) if at.vertex != NOWHERE else 0


cdef const char *_name(worker *w, size_t offset, size_t *length) noexcept nogil:
    """The name at an offset of the argument; NULL if there is none that could be ruled."""
    cdef const char *name = <const char *>w.argument + offset
    if offset >= w.argument_bytes:
        return NULL
    length[0] = strnlen(name, w.argument_bytes - offset)
    return name if offset + length[0] < w.argument_bytes and 0 < length[0] <= MAX_NAME else NULL


cdef int64_t _number_of(worker *w, uint32_t rule, const char *name, size_t length) noexcept nogil:
    """What stands for a name in the id of its node; -1 if there are too many names."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef int64_t found
    if not s.rules[rule].named:
        return 0
    with gil:
        found = _intern(<SpecialRules><PyObject *>s.owner, name[:length])
    return found


cdef int64_t _intern(SpecialRules owner, bytes name) noexcept:
    """The number of a name, a new one if need be. Even numbers are numbers themselves."""
    if name.isdigit() and len(name) <= 10 and (name == b"0" or name[0] != b'0'):
        return 2 * <int64_t>int(name)
    number = owner.numbers.get(name)
    if number is None:
        if len(owner.names) >= MAX_NAMES:
            return -1
        number = owner.numbers[name] = len(owner.names)
        owner.names.append(name)
    return 2 * <int64_t>number + 1


# ---- nodes made here ---------------------------------------------------------------------------------------------------

cdef inline uint64_t _made_id(uint32_t rule, uint64_t number) noexcept nogil:
    return MADE | <uint64_t>rule << NUMBER_BITS | number


cdef inline uint32_t _rule_index(uint64_t id) noexcept nogil:
    return <uint32_t>((id & ~(MADE | TOP_BIT)) >> NUMBER_BITS)


cdef void _fill_attributes(special_state *s, uint64_t id, attributes *out) noexcept nogil:
    memset(out, 0, sizeof(attributes))
    out.ino = id
    out.atime = out.mtime = out.ctime = time(NULL)
    out.mode = S_IFLNK | 0o777 if s.rules[_rule_index(id)].action == DO_LINK else S_IFREG | 0o444
    out.nlink = 1
    out.blksize = 4096


cdef void _reply_made_entry(worker *w, uint32_t rule, const char *name, size_t length) noexcept nogil:
    """Answer a LOOKUP with a node of ours."""
    cdef int64_t number = _number_of(w, rule, name, length)
    cdef entry out
    if number < 0:
        reply_error(w, ENFILE)
        return
    memset(&out, 0, sizeof(out))
    out.node = _made_id(rule, number)
    _fill_attributes(<special_state *>w.mount.rules, out.node, &out.attr)
    reply(w, &out, sizeof(out))


cdef void _reply_made_attributes(worker *w) noexcept nogil:
    cdef attributes_reply out
    memset(&out, 0, sizeof(out))
    _fill_attributes(<special_state *>w.mount.rules, w.request.nodeid, &out.attr)
    reply(w, &out, sizeof(out))


cdef void _reply_made_statx(worker *w) noexcept nogil:
    cdef attributes plain
    cdef statx_reply out
    _fill_attributes(<special_state *>w.mount.rules, w.request.nodeid, &plain)
    memset(&out, 0, sizeof(out))
    out.mask = 0x7ff                    # STATX_BASIC_STATS
    out.blksize = plain.blksize
    out.nlink = plain.nlink
    out.mode = <unsigned short>plain.mode
    out.ino = plain.ino
    out.atime.seconds = out.ctime.seconds = out.mtime.seconds = plain.mtime
    reply(w, &out, sizeof(out))


cdef int _put_name(worker *w, uint64_t number, char *out, size_t room) noexcept nogil:
    """What {name} stands for: its length, as snprintf(3) has it."""
    cdef int length = 0
    if number % 2 == 0:
        return snprintf(out, room, b"%llu", <unsigned long long>(number // 2))
    with gil:
        name = (<SpecialRules><PyObject *>(<special_state *>w.mount.rules).owner).names[number // 2]
        length = snprintf(out, room, b"%s", <const char *>name)
    return length


cdef void _reply_target(worker *w) noexcept nogil:
    """READLINK: the rule's target, for the process that asks."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef char out[MAX_PATH]
    cdef const char *at = s.rules[_rule_index(w.request.nodeid)].target
    cdef uint32_t process = caller_process(w.request.pid)
    cdef size_t length = 0
    cdef int more
    while at[0] and length < sizeof(out) - 1:
        if strncmp(at, b"{pid}", 5) == 0 or strncmp(at, b"{tid}", 5) == 0:
            if process == 0:
                reply_error(w, ENOENT)  # of another pid namespace: it has no number here
                return
            more = snprintf(out + length, sizeof(out) - length, b"%u", process if at[1] == b'p' else w.request.pid)
            at += 5
        elif strncmp(at, b"{name}", 6) == 0:
            more = _put_name(w, w.request.nodeid & ((<uint64_t>1 << NUMBER_BITS) - 1), out + length, sizeof(out) - length)
            at += 6
        else:
            out[length] = at[0]
            more = 1
            at += 1
        length += more
    if length >= sizeof(out) - 1:
        reply_error(w, ENAMETOOLONG)
        return
    reply(w, out, length)


# ---- files made here ---------------------------------------------------------------------------------------------------

cdef int64_t _keep_file(special_state *s, const uint8_t *data, size_t size) noexcept nogil:
    """A handle of an open file with a copy of that content, or -errno."""
    cdef uint8_t *copy = <uint8_t *>malloc(max(size, <size_t>1))
    cdef made_file *larger
    cdef uint32_t index = 0
    if copy == NULL:
        return -ENOMEM
    memcpy(copy, data, size)
    pthread_mutex_lock(&s.guard)
    while index < s.file_room and s.files[index].data != NULL:
        index += 1
    if index == s.file_room and s.file_room < MAX_FILES:
        larger = <made_file *>realloc(s.files, (s.file_room + 64) * sizeof(made_file))
        if larger != NULL:
            memset(larger + s.file_room, 0, 64 * sizeof(made_file))
            s.files = larger
            s.file_room += 64
    if index < s.file_room:
        s.files[index].data = copy
        s.files[index].size = size
    pthread_mutex_unlock(&s.guard)
    if index < s.file_room:
        return index
    free(copy)
    return -ENFILE


cdef made_file _file_of(special_state *s, uint64_t handle) noexcept nogil:
    """An open file; the kernel closes it after all else that it asks of it."""
    cdef made_file found
    cdef uint64_t index = (handle & ~MADE) >> 1     # bit 0 would say that it is writable
    memset(&found, 0, sizeof(found))
    pthread_mutex_lock(&s.guard)
    if handle & MADE and index < s.file_room:
        found = s.files[index]
    pthread_mutex_unlock(&s.guard)
    return found


cdef void _drop_file(special_state *s, uint64_t handle) noexcept nogil:
    cdef uint64_t index = (handle & ~MADE) >> 1
    cdef uint8_t *data = NULL
    pthread_mutex_lock(&s.guard)
    if handle & MADE and index < s.file_room:
        data = s.files[index].data
        s.files[index].data = NULL
    pthread_mutex_unlock(&s.guard)
    free(data)


cdef bint _take_production(special_state *s, uint64_t unique) noexcept nogil:
    """Take an OPEN off the list of those that wait; False if it is not there any more."""
    cdef production **at = &s.productions
    cdef production *found
    pthread_mutex_lock(&s.guard)
    while at[0] != NULL and at[0].unique != unique:
        at = &at[0].next
    found = at[0]
    if found != NULL:
        at[0] = found.next
    pthread_mutex_unlock(&s.guard)
    free(found)
    return found != NULL


cdef bint interrupt_special(mount_state *m, uint64_t target) noexcept nogil:
    """INTERRUPT of an OPEN that waits for its content: a caller that will see a signal gets EINTR. True: it was one."""
    cdef special_state *s = <special_state *>m.rules
    cdef production *p
    cdef uint32_t pid = 0
    cdef int device = -1
    pthread_mutex_lock(&s.guard)
    p = s.productions
    while p != NULL and p.unique != target:
        p = p.next
    if p != NULL:
        pid = p.pid
        device = p.device
    pthread_mutex_unlock(&s.guard)
    if device < 0:
        return False
    if (fatal_signal_pending(pid) or caught_signal_pending(pid)) and _take_production(s, target):
        write_reply(device, target, -EINTR, NULL, 0, NULL, 0)
    return True


cdef void _open_made(worker *w) noexcept nogil:
    """OPEN of a file: a thread of its own gets the content and answers, so that no worker waits for it."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef uint32_t flags = (<fuse_open_in *>w.argument).flags
    cdef production *p
    if s.rules[_rule_index(w.request.nodeid)].action != DO_REPLACE:
        reply_error(w, EINVAL)
        return
    if flags & O_ACCMODE != O_RDONLY or flags & O_TRUNC:
        reply_error(w, EROFS)
        return
    p = <production *>malloc(sizeof(production))
    if p == NULL:
        reply_error(w, ENOMEM)
        return
    p.unique = w.request.unique
    p.device = w.device
    p.pid = w.request.pid
    pthread_mutex_lock(&s.guard)
    p.next = s.productions
    s.productions = p
    pthread_mutex_unlock(&s.guard)
    with gil:
        (<SpecialRules><PyObject *>s.owner).produce(w.request.nodeid, w.device, w.request.unique, w.request.pid)


cdef void _read_made(worker *w) noexcept nogil:
    cdef fuse_read_in *asked = <fuse_read_in *>w.argument
    cdef made_file file = _file_of(<special_state *>w.mount.rules, asked.fh)
    cdef size_t begin = min(asked.offset, <uint64_t>file.size)
    reply(w, file.data + begin, min(<size_t>asked.size, file.size - begin))


cdef void _seek_made(worker *w) noexcept nogil:
    """LSEEK: the content has no holes."""
    cdef fuse_lseek_in *asked = <fuse_lseek_in *>w.argument
    cdef made_file file = _file_of(<special_state *>w.mount.rules, asked.fh)
    cdef lseek_out out
    if asked.whence not in (SEEK_DATA, SEEK_HOLE):
        reply_error(w, EINVAL)
    elif asked.offset >= file.size:
        reply_error(w, ENXIO)
    else:
        out.offset = asked.offset if asked.whence == SEEK_DATA else file.size
        reply(w, &out, sizeof(out))


cdef int _made_error(uint32_t opcode) noexcept nogil:
    """Why what has no function below cannot be done. Never ENOSYS: the kernel would take it for all files."""
    if opcode in (FUSE_SETATTR, FUSE_SETXATTR, FUSE_REMOVEXATTR, FUSE_FALLOCATE, FUSE_WRITE):
        return EROFS
    if opcode in (FUSE_GETLK, FUSE_SETLK, FUSE_SETLKW):
        return ENOLCK
    if opcode == FUSE_GETXATTR:
        return ENODATA
    if opcode == FUSE_IOCTL:
        return ENOTTY
    if opcode in (FUSE_COPY_FILE_RANGE, FUSE_COPY_FILE_RANGE_64):
        return EXDEV                    # the kernel then copies by reading
    return EPERM if opcode == FUSE_LINK else EINVAL


cdef bint _serve_made(worker *w) noexcept nogil:
    """A request for a node of ours. True: it is answered, or will be."""
    cdef uint32_t opcode = w.request.opcode
    cdef uint64_t nothing = 0
    cdef poll_out ready
    if _rule_index(w.request.nodeid) >= (<special_state *>w.mount.rules).rules_count:
        reply_error(w, EIO)
    elif opcode == FUSE_GETATTR:
        _reply_made_attributes(w)
    elif opcode == FUSE_STATX:
        _reply_made_statx(w)
    elif opcode == FUSE_READLINK:
        _reply_target(w)
    elif opcode == FUSE_OPEN:
        _open_made(w)
    elif opcode == FUSE_READ:
        _read_made(w)
    elif opcode == FUSE_LSEEK:
        _seek_made(w)
    elif opcode == FUSE_RELEASE:
        _drop_file(<special_state *>w.mount.rules, (<fuse_release_in *>w.argument).fh)
        reply(w, NULL, 0)
    elif opcode in (FUSE_FLUSH, FUSE_FSYNC, FUSE_SYNCFS) or \
            opcode == FUSE_ACCESS and not (<fuse_access_in *>w.argument).mask & W_OK:
        reply(w, NULL, 0)
    elif opcode == FUSE_LISTXATTR:
        reply(w, &nothing, 0 if (<fuse_getxattr_in *>w.argument).size else sizeof(nothing))
    elif opcode == FUSE_POLL:
        ready.revents = ALWAYS_READY
        ready.padding = 0
        reply(w, &ready, sizeof(ready))
    elif opcode == FUSE_STATFS:
        w.request.nodeid = ROOT_NODE
        return False
    else:
        reply_error(w, EROFS if opcode == FUSE_ACCESS else _made_error(opcode))
    return True


# ---- names -------------------------------------------------------------------------------------------------------------

cdef int _answer_known(worker *w, message *m) noexcept nogil:
    """A reply with an entry that rules are about: note it, and let the kernel not trust it."""
    cdef uint64_t id = 0
    cdef int status
    if m.body_bytes >= sizeof(entry):
        id = (<entry *>m.body).node
        (<entry *>m.body).node_flags |= NODE_UNCACHED
        note_known(<special_state *>w.mount.rules, id, w.detour.vertex, w.detour.read_only)
    status = w.detour.answer(w, m)
    if status == -ENOENT and id != 0:   # the kernel did not take it
        forget_known(<special_state *>w.mount.rules, id, 1)
    return status


cdef void _begin_detour(worker *w, uint32_t vertex, bint read_only) noexcept nogil:
    w.detour.row = w.row[0]
    w.detour.serve = w.row.serve
    w.detour.answer = w.row.answer
    w.detour.vertex = vertex
    w.detour.read_only = read_only
    w.row = &w.detour.row


cdef void _expect_known(worker *w, uint32_t vertex, bint read_only) noexcept nogil:
    """The reply's entry is of a node that has to be noted, if there is anything to note."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef bint leads = vertex != 0 and s.vertices[vertex].leads
    cdef bint ruled = vertex != 0 and s.vertices[vertex].rule_count > 0
    if leads or ruled or read_only:     # ruled: tomorrow the process of that number may have another name
        _begin_detour(w, vertex if leads else <uint32_t>NOWHERE, read_only)
        w.detour.row.answer = _answer_known


cdef bint _serve_lookup(worker *w, const standing *at) noexcept nogil:
    cdef special_state *s = <special_state *>w.mount.rules
    cdef size_t length = 0
    cdef const char *name = _name(w, 0, &length)
    cdef uint32_t vertex = _step(s, at, name, length) if name != NULL else 0
    cdef int rule = _rule_of(s, vertex, name, length)
    cdef int action = s.rules[rule].action if rule != NO_RULE else NO_RULE
    if action == DO_HIDE:
        reply_error(w, ENOENT)
    elif action in (DO_LINK, DO_REPLACE):
        _reply_made_entry(w, rule, name, length)
    else:
        _expect_known(w, vertex, (at.read_only or action == DO_PROTECT) and action != DO_RELAY)
        return False
    return True


cdef int _change_error(worker *w, const standing *at, size_t offset, bint makes) noexcept nogil:
    """Why the name at an offset of the argument cannot be made, or removed or renamed; 0 if rules do not mind."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef size_t length = 0
    cdef const char *name = _name(w, offset, &length)
    cdef uint32_t vertex
    cdef int rule, action
    if at.read_only:
        return EROFS
    if name == NULL:
        return 0
    vertex = _step(s, at, name, length)
    rule = _rule_of(s, vertex, name, length)
    if rule == NO_RULE:
        return 0
    action = s.rules[rule].action
    if action == DO_HIDE:
        return EACCES if makes else ENOENT
    if action in (DO_LINK, DO_REPLACE):
        return EEXIST if makes else EPERM
    return EROFS if action == DO_PROTECT else 0


cdef size_t _name_offset(uint32_t opcode) noexcept nogil:
    """Where the name lies in the argument of requests that make, remove or rename one."""
    if opcode == FUSE_MKNOD:
        return sizeof(fuse_mknod_in)
    if opcode == FUSE_MKDIR:
        return sizeof(fuse_mkdir_in)
    if opcode == FUSE_CREATE:
        return sizeof(fuse_create_in)
    if opcode == FUSE_LINK:
        return sizeof(fuse_link_in)
    if opcode == FUSE_RENAME:
        return sizeof(fuse_rename_in)
    return sizeof(fuse_rename2_in) if opcode == FUSE_RENAME2 else 0


cdef bint _makes(uint32_t opcode) noexcept nogil:
    return opcode in (FUSE_MKNOD, FUSE_MKDIR, FUSE_SYMLINK, FUSE_LINK, FUSE_CREATE)


cdef bint _serve_change(worker *w, const standing *at) noexcept nogil:
    """Making or removing a name in a directory that rules are about, or a rename out of it."""
    cdef size_t offset = _name_offset(w.request.opcode), length = 0
    cdef const char *name
    cdef int error = _change_error(w, at, offset, _makes(w.request.opcode))
    if error != 0:
        reply_error(w, error)
        return True
    name = _name(w, offset, &length)
    if name != NULL and _makes(w.request.opcode):
        _expect_known(w, _step(<special_state *>w.mount.rules, at, name, length), False)
    return False


cdef bint _serve_other_end(worker *w) noexcept nogil:
    """The second node of a rename or link."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef size_t offset = _name_offset(w.request.opcode), length = 0
    cdef uint64_t node = (<uint64_t *>w.argument)[0]     # fuse_rename_in, fuse_rename2_in, fuse_link_in begin with it
    cdef standing at
    cdef int error = 0
    if node & MADE:
        error = EPERM
    elif find_known(s, node, &at):
        if w.request.opcode == FUSE_LINK:
            error = EROFS if at.read_only else 0
        elif _name(w, offset, &length) != NULL:
            error = _change_error(w, &at, offset + length + 1, False)
    if error != 0:
        reply_error(w, error)
    return error != 0


# ---- directories -------------------------------------------------------------------------------------------------------

cdef bint _keep_record(worker *w, uint8_t *record, direntry *d) noexcept nogil:
    """Correct a directory's record by the rule of its name; False if it is hidden. `record`: direntry_plus, or NULL."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef const char *name = <const char *>(d + 1)
    cdef standing at
    cdef uint32_t vertex
    cdef int rule, action
    if name[0] == b'.' and (d.name_bytes == 1 or d.name_bytes == 2 and name[1] == b'.'):
        return True
    at.vertex = w.detour.vertex
    vertex = _step(s, &at, name, d.name_bytes)
    if vertex == 0 and not w.detour.read_only:
        return True
    # Names that are ruled, or lead there, have to be looked up.
    if record != NULL and (<entry *>record).node != 0:
        queue_forget(w.mount, (<entry *>record).node, 1)
        memset(record, 0, sizeof(entry))
    rule = _rule_of(s, vertex, name, d.name_bytes)
    action = s.rules[rule].action if rule != NO_RULE else NO_RULE
    if action == DO_LINK or action == DO_REPLACE:
        d.type = DT_LNK if action == DO_LINK else DT_REG
    return action != DO_HIDE


cdef bint _filter(worker *w, message *m, bint plus, uint64_t *last) noexcept nogil:
    """Leave hidden names out of a reply; False if it is malformed. `last` gets the offset behind its last record."""
    cdef size_t fixed = sizeof(direntry_plus) if plus else sizeof(direntry)
    cdef size_t at = 0, kept = 0, size
    cdef direntry *d
    cdef uint8_t *record
    while at < m.body_bytes:
        record = m.body + at
        d = <direntry *>(record + fixed - sizeof(direntry))
        if m.body_bytes - at < fixed or m.body_bytes - at < direntry_bytes(fixed, d.name_bytes):
            return False
        size = direntry_bytes(fixed, d.name_bytes)
        last[0] = d.off
        if _keep_record(w, record if plus else NULL, d):
            if kept != at:
                memmove(m.body + kept, record, size)
            kept += size
        at += size
    m.body_bytes = kept
    return True


cdef int _answer_listing(worker *w, message *m) noexcept nogil:
    """READDIR, READDIRPLUS. If nothing is left of a reply, the next is asked for: an empty one means the end."""
    cdef fuse_read_in *asked = <fuse_read_in *>w.argument
    cdef uint64_t last = 0
    cdef bint had_any = m.body_bytes > 0
    if m.body_bytes > asked.size or not _filter(w, m, w.request.opcode == FUSE_READDIRPLUS, &last):
        return reply_error(w, EIO)
    if had_any and m.body_bytes == 0:
        asked.offset = last
        w.detour.again = True
        return 0
    return w.detour.answer(w, m)


cdef void _serve_listing(worker *w) noexcept nogil:
    w.detour.again = True
    while w.detour.again:
        w.detour.again = False
        w.detour.serve(w)


cdef bint _prepare_listing(worker *w, const standing *at) noexcept nogil:
    if at.vertex == NOWHERE and not (at.read_only and w.request.opcode == FUSE_READDIRPLUS):
        return False
    _begin_detour(w, at.vertex, at.read_only)
    w.detour.row.serve = _serve_listing
    w.detour.row.answer = _answer_listing
    return False


# ---- all requests --------------------------------------------------------------------------------------------------------

cdef bint _changes(worker *w) noexcept nogil:
    """Whether a request wants to change the node it is for."""
    cdef uint32_t opcode = w.request.opcode
    cdef uint32_t flags
    if opcode == FUSE_OPEN:
        flags = (<fuse_open_in *>w.argument).flags
        return flags & O_ACCMODE != O_RDONLY or flags & O_TRUNC != 0
    if opcode == FUSE_ACCESS:
        return (<fuse_access_in *>w.argument).mask & W_OK != 0
    if opcode == FUSE_IOCTL:
        return (<fuse_ioctl_in *>w.argument).cmd in (SET_FLAGS, SET_FSXATTR)
    return True


cdef bint serve_special(worker *w) noexcept nogil:
    """Answer a request that rules decide about; or prepare it, and let it be served by its row: False."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef uint32_t opcode = w.request.opcode
    cdef standing at
    if opcode in (FUSE_FORGET, FUSE_BATCH_FORGET):
        _forget_all(w)
        return False
    if w.request.nodeid & MADE:
        return _serve_made(w)
    if opcode in (FUSE_RENAME, FUSE_RENAME2, FUSE_LINK) and _serve_other_end(w):
        return True
    if opcode == FUSE_LOOKUP:
        return find_known(s, w.request.nodeid, &at) and _serve_lookup(w, &at)
    if opcode in (FUSE_READDIR, FUSE_READDIRPLUS):
        return find_known(s, w.request.nodeid, &at) and _prepare_listing(w, &at)
    if _makes(opcode) or opcode in (FUSE_UNLINK, FUSE_RMDIR, FUSE_RENAME, FUSE_RENAME2):
        return find_known(s, w.request.nodeid, &at) and _serve_change(w, &at)
    if opcode in (FUSE_OPEN, FUSE_SETATTR, FUSE_SETXATTR, FUSE_REMOVEXATTR, FUSE_ACCESS, FUSE_IOCTL, FUSE_TMPFILE) and \
            _changes(w) and find_known(s, w.request.nodeid, &at) and at.read_only:
        reply_error(w, EROFS)
        return True
    return False


# ---- rules -----------------------------------------------------------------------------------------------------------

_NUMBERS = {
    Action.REMOTE: DO_RELAY,
    Action.LOCAL: DO_LINK,
    Action.HIDE: DO_HIDE,
    Action.READONLY: DO_PROTECT,
    Action.REPLACE: DO_REPLACE,
}


cdef char *_copy(bytes text) except NULL:
    cdef char *copy = <char *>malloc(len(text) + 1)
    if copy == NULL:
        raise MemoryError
    memcpy(copy, <const char *>text, len(text) + 1)
    return copy


cdef class SpecialRules:
    """The rules for what lies below a mount's source, and what is made by them. Of one mount."""

    def __cinit__(self):
        memset(&self.s, 0, sizeof(self.s))
        pthread_mutex_init(&self.s.guard, NULL)

    def __init__(self, rules, tree: PathTree, read_only_root: bool) -> None:
        """`tree` has the indexes of rules as marks."""
        rows = tree.rows()
        self.rules = rules
        self.names = []
        self.numbers = {}
        self._running = threading.BoundedSemaphore(MAX_PRODUCTIONS)
        self.s.owner = <void *>self
        self.s.read_only_root = read_only_root
        self.s.paths = trie_new(rows)
        self.s.rules_count = <uint32_t>len(rules)
        self.s.rules = <special_rule *>calloc(max(1, len(rules)), sizeof(special_rule))
        self.s.vertices = <special_vertex *>calloc(len(rows), sizeof(special_vertex))
        self.s.order = <uint32_t *>calloc(1 + sum([len(row.branch.marks) for row in rows]), sizeof(uint32_t))
        self.s.buckets = <known_node **>calloc(FEWEST_BUCKETS, sizeof(known_node *))
        self.s.bucket_mask = FEWEST_BUCKETS - 1
        if self.s.rules == NULL or self.s.vertices == NULL or self.s.order == NULL or self.s.buckets == NULL:
            raise MemoryError
        self._fill_rules()
        self._fill_vertices(rows)

    def __dealloc__(self):
        cdef uint32_t i
        cdef known_node *n
        for i in range(self.s.bucket_mask + 1 if self.s.buckets != NULL else 0):
            while self.s.buckets[i] != NULL:
                n = self.s.buckets[i]
                self.s.buckets[i] = n.next
                free(n)
        for i in range(self.s.file_room):
            free(self.s.files[i].data)
        for i in range(self.s.rules_count if self.s.rules != NULL else 0):
            free(self.s.rules[i].target)
            free(self.s.rules[i].commands)
        while self.s.productions != NULL:
            _take_production(&self.s, self.s.productions.unique)
        free(self.s.buckets)
        free(self.s.files)
        free(self.s.rules)
        free(self.s.vertices)
        free(self.s.order)
        trie_free(self.s.paths)
        pthread_mutex_destroy(&self.s.guard)

    cdef int _fill_rules(self) except -1:
        cdef special_rule *out
        for index, rule in enumerate(self.rules):
            out = &self.s.rules[<uint32_t>index]
            out.action = _NUMBERS[rule.action]
            out.named = any(["{name}" in text for text in rule.texts])
            out.target = _copy(rule.target.encode("utf-8", "surrogateescape"))
            if rule.commands:
                out.commands = _copy(b"".join([name + b"\0" for name in rule.commands]))
        return 0

    cdef int _fill_vertices(self, list rows) except -1:
        cdef uint32_t at = 0
        cdef special_vertex *v
        for index, row in enumerate(rows):
            v = &self.s.vertices[<uint32_t>index]
            v.leads = bool(row.branch.children)
            v.first_rule = at
            for mark in sorted(set(row.branch.marks), reverse=True):
                self.s.order[at] = <uint32_t>mark
                at += 1
                if not self.rules[mark].is_conditional:
                    break
            v.rule_count = at - v.first_rule
        return 0

    cdef void attach(self, mount_state *m) noexcept:
        """Put the rules into force on a mount, which keeps this object."""
        m.rules = &self.s

    def produce(self, uint64_t node, int device, uint64_t unique, uint32_t pid) -> None:
        """Get the content of a file and answer its OPEN, in a thread of its own."""
        try:
            threading.Thread(target=self._produce, args=(node, device, unique, pid), daemon=True).start()
        except RuntimeError as error:
            log.error("no thread for a replaced file: %s", error)
            self._answer(device, unique, ENOMEM, b"")

    def _produce(self, uint64_t node, int device, uint64_t unique, uint32_t pid) -> None:
        cdef uint64_t number = node & ((<uint64_t>1 << NUMBER_BITS) - 1)
        rule = self.rules[_rule_index(node)]
        name = str(number // 2) if number % 2 == 0 else self.names[number // 2].decode("utf-8", "surrogateescape")
        found, error = b"", 0
        with self._running:
            try:
                found = content(rule, pid=caller_process(pid), tid=pid, name=name)
            except OSError as failed:
                log.warning("%s: %s", "/" + b"/".join(rule.pattern).decode("utf-8", "backslashreplace"), failed)
                error = failed.errno or EIO
            except Exception:
                log.exception("the content of a replaced file could not be had")
                error = EIO
        self._answer(device, unique, error, found)

    cdef int _answer(self, int device, uint64_t unique, int error, bytes found) except -1:
        cdef fuse_open_out out
        cdef int64_t handle = 0
        if not _take_production(&self.s, unique):
            return 0                    # its caller was interrupted
        if error == 0:
            handle = _keep_file(&self.s, <const uint8_t *><const char *>found, len(found))
            error = <int>-handle if handle < 0 else 0
        out.fh = MADE | <uint64_t>handle << 1
        out.open_flags = FOPEN_DIRECT_IO
        out.padding = 0
        if error != 0:
            write_reply(device, unique, -error, NULL, 0, NULL, 0)
        elif write_reply(device, unique, 0, &out, sizeof(out), NULL, 0) < 0:
            _drop_file(&self.s, out.fh)
        return 0


def special_rules(rules, source: str) -> SpecialRules | None:
    """What has to be done on a mount of `source`; None if no rule is about anything in it. Raises QtfsError."""
    tree = PathTree()
    concerned = read_only_root = False
    for index, rule in enumerate(rules):
        below = rule.below(source.encode("utf-8", "surrogateescape"))
        if below:
            tree.add(below, index)
            concerned = True
        elif below is not None and rule.action in (Action.READONLY, Action.REMOTE):
            read_only_root = rule.action is Action.READONLY
    try:
        return SpecialRules(rules, tree, read_only_root) if concerned or read_only_root else None
    except ValueError as error:
        raise QtfsError(f"special rules: {error}") from error
