"""Nodes made on this side of a mount by special rules: symbolic links, and files with a content of our own.

Their ids have MADE set, which the server's never have. The rule and a number stand in the id: the number that the name is,
or that of a name met before. Nobody has to remember them. Files that are open have handles of their own and keep the
content they had when they were opened.
"""
from cpython.ref cimport PyObject
from libc.errno cimport EINVAL, EINTR, EIO, ENAMETOOLONG, ENFILE, ENODATA, ENOENT, ENOLCK, ENOMEM, ENOSYS, ENOTTY, ENXIO, \
    EPERM, EROFS, EXDEV
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset, strncmp

from qtfs_client.drivers.fuse3.callers cimport caller_process, caught_signal_pending, fatal_signal_pending
from qtfs_client.drivers.fuse3.device cimport reply, reply_error, write_reply
from qtfs_client.drivers.fuse3.special_state cimport DO_LINK, DO_REPLACE, made_file, production, special_state
from qtfs_client.drivers.fuse3.state cimport mount_state, worker
from qtfs_client.includes.fuse_abi cimport *
from qtfs_client.includes.linux cimport O_ACCMODE, O_RDONLY, O_TRUNC, W_OK, load_u64, pthread_mutex_lock, \
    pthread_mutex_unlock, snprintf, store_u64
from qtfs_common.includes.polling cimport eventfd_write
from qtfs_common.protocol cimport MAX_PATH, ROOT_NODE, attributes, attributes_reply, entry, statx_reply

import logging
import threading

from qtfs_client.replacements import content

cdef extern from "<sys/stat.h>" nogil:
    enum:
        S_IFLNK
        S_IFREG

cdef extern from "<time.h>" nogil:
    long time(void *)

cdef enum:
    NUMBER_BITS = 40                # of a made node's id; the rule's index is above it. Ten digits are less
    MAX_NAMES = 65536               # that {name} stands for, numbers aside
    MAX_FILES = 65536               # made files that are open
    MAX_PRODUCTIONS = 32            # at the same time; the others wait for their turn
    ALWAYS_READY = 0x145            # POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM
    SEEK_DATA = 3
    SEEK_HOLE = 4

cdef uint64_t MADE = <uint64_t>1 << 62
cdef uint64_t TOP_BIT = <uint64_t>1 << 63

log = logging.getLogger(__name__)

cdef struct poll_out:               # fuse_poll_out
    uint32_t revents
    uint32_t padding

cdef struct lseek_out:              # fuse_lseek_out
    uint64_t offset


cdef bint is_made(uint64_t id) noexcept nogil:
    """Whether a node is one of ours."""
    return id & MADE != 0


# ---- nodes -----------------------------------------------------------------------------------------------------------

cdef int64_t _number_of(worker *w, uint32_t rule, const char *name, size_t length) noexcept nogil:
    """What stands for a name in the id of its node; -1 if there are too many names."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef int64_t found
    if not s.rules[rule].named:
        return 0
    with gil:
        found = (<MadeNodes><PyObject *>s.owner).number_of(name[:length])
    return found


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


cdef void reply_made_entry(worker *w, uint32_t rule, const char *name, size_t length) noexcept nogil:
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
        name = (<MadeNodes><PyObject *>(<special_state *>w.mount.rules).owner).names[number // 2]
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


# ---- files -----------------------------------------------------------------------------------------------------------

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


cdef bint take_production(special_state *s, uint64_t unique) noexcept nogil:
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


cdef bint interrupt_open(mount_state *m, uint64_t target) noexcept nogil:
    """INTERRUPT of an OPEN that waits for its content. True: it was one; the event thread sees to it from now on."""
    cdef special_state *s = <special_state *>m.rules
    cdef production *p
    pthread_mutex_lock(&s.guard)
    p = s.productions
    while p != NULL and p.unique != target:
        p = p.next
    if p != NULL:
        p.interrupted = True
    pthread_mutex_unlock(&s.guard)
    if p != NULL:
        eventfd_write(m.event_fd, 1)
    return p != NULL


cdef bint see_to_opens(mount_state *m) noexcept nogil:
    """Answer EINTR to interrupted callers that will see a signal. Whether there are others, who may yet get one."""
    cdef special_state *s = <special_state *>m.rules
    cdef production **at
    cdef production *p
    cdef bint some = False
    if s == NULL:
        return False
    pthread_mutex_lock(&s.guard)
    at = &s.productions
    while at[0] != NULL:
        p = at[0]
        if p.interrupted and (fatal_signal_pending(p.pid) or caught_signal_pending(p.pid)):
            write_reply(p.device, p.unique, -EINTR, NULL, 0, NULL, 0)
            at[0] = p.next
            free(p)
            continue
        some = some or p.interrupted
        at = &p.next
    pthread_mutex_unlock(&s.guard)
    return some


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
    p.interrupted = False
    pthread_mutex_lock(&s.guard)
    p.next = s.productions
    s.productions = p
    pthread_mutex_unlock(&s.guard)
    # An INTERRUPT from now on finds it in the list; one that found the worker first is passed on.
    pthread_mutex_lock(&w.mount.guard)
    store_u64(&w.current, 0)
    pthread_mutex_unlock(&w.mount.guard)
    if load_u64(&w.interrupted) == w.request.unique:
        interrupt_open(w.mount, w.request.unique)
    with gil:
        (<MadeNodes><PyObject *>s.owner).produce(w.request.nodeid, w.device, w.request.unique, w.request.pid)


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
    """Why what is not served below cannot be done. ENOSYS the kernel takes for all files: only POLL with -o nopoll."""
    if opcode == FUSE_POLL:
        return ENOSYS
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


cdef bint serve_made(worker *w) noexcept nogil:
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
    elif opcode == FUSE_POLL and w.mount.polls:
        ready.revents = ALWAYS_READY
        ready.padding = 0
        reply(w, &ready, sizeof(ready))
    elif opcode == FUSE_STATFS:
        w.request.nodeid = ROOT_NODE
        return False
    else:
        reply_error(w, EROFS if opcode == FUSE_ACCESS else _made_error(opcode))
    return True


# ---- for Python ------------------------------------------------------------------------------------------------------

cdef class MadeNodes:
    """What the nodes that rules make stand for, and the contents of files; a SpecialRules is this and more."""

    def __cinit__(self):
        memset(&self.s, 0, sizeof(self.s))

    def __init__(self, rules) -> None:
        self.rules = rules
        self.s.owner = <void *>self
        self.names = []
        self.numbers = {}
        self._running = threading.BoundedSemaphore(MAX_PRODUCTIONS)

    cdef int64_t number_of(self, bytes name) noexcept:
        """The number of a name, a new one if need be. Even numbers are numbers themselves."""
        if name.isdigit() and len(name) <= 10 and (name == b"0" or name[0] != b'0'):
            return 2 * <int64_t>int(name)
        number = self.numbers.get(name)
        if number is None:
            if len(self.names) >= MAX_NAMES:
                return -1
            number = self.numbers[name] = len(self.names)
            self.names.append(name)
        return 2 * <int64_t>number + 1

    def produce(self, uint64_t node, int device, uint64_t unique, uint32_t pid) -> None:
        """Get the content of a file and answer its OPEN, in a thread of its own."""
        args = (self.mount(), node, device, unique, pid)
        try:
            threading.Thread(target=self._produce, args=args, daemon=True).start()
        except RuntimeError as error:
            log.error("no thread for a replaced file: %s", error)
            self._answer(device, unique, ENOMEM, b"")

    def _produce(self, mount, uint64_t node, int device, uint64_t unique, uint32_t pid) -> None:
        """`mount`: held so long, since the descriptor is its own."""
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
        if not take_production(&self.s, unique):
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
