"""open, create, tmpfile, read, write, release, flush, fsync, fallocate, lseek, copy_file_range, ioctl.

FIFOs and devices branch off to streams.pyx.

Sources: open(2), openat(2), pread(2), copy_file_range(2), fallocate(2), ioctl_iflags(2), <linux/fs.h>.
"""
from libc.errno cimport EACCES, EAGAIN, EBADF, EEXIST, EFAULT, EINVAL, EIO, EISDIR, ELOOP, EMSGSIZE, ENOENT, \
    ENOTTY, EOPNOTSUPP, EROFS, ESPIPE, ESRCH, ESTALE, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from qtfs_common.pipes cimport PIPE_BYTES, PIPE_PAGE_BYTES, pipe_make
from qtfs_common.protocol cimport KILL_PRIVILEGES, MAX_NAME, MAX_PAYLOAD, MAX_RELEASES, OPENED_CHANGED, OPENED_UNCACHED, \
    RELEASE_FLOCK, WRITE_APPEND, WRITE_AT_OFFSET, copy_request, count_reply, create_reply, create_request, entry, fallocate_request, \
    fsync_request, ioctl_reply, ioctl_request, lseek_reply, lseek_request, open_reply, open_request, read_request, \
    release_request, write_request
from qtfs_server.identity cimport act_as, act_as_root, drop_fsetid
from qtfs_server.includes.linux cimport AT_EACCESS, AT_EMPTY_PATH, AT_FDCWD, F_SETFL, O_ACCMODE, O_APPEND, O_CLOEXEC, \
    O_CREAT, O_DSYNC, O_EXCL, O_NOATIME, O_NOCTTY, O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDONLY, O_SYNC, O_TMPFILE, O_TRUNC, \
    RWF_APPEND, S_IFDIR, S_IFLNK, S_IFREG, SYS_faccessat2, close, copy_file_range, dup, fallocate, fcntl, fdatasync, \
    fsync, ioctl, iovec, lseek, openat, pread, pthread_mutex_lock, pthread_mutex_unlock, pwrite, pwritev2, read, statx_t, \
    syscall, umask, write
from qtfs_server.operations.locks cimport drop_locks, end_handle_locks
from qtfs_server.operations.ourselves cimport moves_ourselves
from qtfs_server.operations.streams cimport is_special, open_special, read_stream, write_stream
from qtfs_server.operations.unfinished cimport note_name, note_size, was_appended, was_made
from qtfs_server.policy cimport ALLOW_CREATE, ALLOW_OPEN, ALLOW_READ, ALLOW_SETATTR, ALLOW_WRITE, place
from qtfs_server.request cimport DEFERRED, MALFORMED, as_caller, note_handle, note_node, request, take_name
from qtfs_server.attributes cimport lies_on_pseudo, signature, stat_fd
from qtfs_server.descriptors cimport proc_path
from qtfs_server.fd_store cimport storing
from qtfs_server.handles cimport handle_end, handle_hold, handle_new, handle_pin, handle_unpin, session_room
from qtfs_server.node_descriptors cimport node_pin, node_unpin
from qtfs_server.nodes cimport child_allowed, node_allowed, node_enter, node_enter_fd, node_forget
from qtfs_server.node_table cimport node_id
from qtfs_server.session cimport HANDLE_APPEND, HANDLE_POLLABLE, HANDLE_STREAM, HANDLE_WRITABLE, NO_INDEX, \
    handle, node, record_at, session
from qtfs_server.splicing cimport SPLICE_BYTES, pipe_fill
from qtfs_server.unnamed cimport opened_unnamed

cdef extern from "<linux/falloc.h>" nogil:
    enum:
        FALLOC_FL_COLLAPSE_RANGE
        FALLOC_FL_INSERT_RANGE

cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_DATA
        SEEK_HOLE

cdef enum:
    FOR_EXECUTION = 0x20            # __FMODE_EXEC of <linux/fs.h>: execve(2) opens what the caller may only execute
    # What a client may ask for. O_DIRECT would demand alignment of our buffers; the client's own pages are not here.
    PASSED_FLAGS = O_ACCMODE | O_APPEND | O_DSYNC | O_SYNC | O_NOATIME
    COPIED_BYTES = 32768            # of a READ whose reply may have too many pages for a pipe
    LONGEST_COPY = 128 << 20        # of one COPY_FILE_RANGE, bytes: a worker is not to be busy for minutes
    FS_IOC_GETFLAGS = 0x80086601
    FS_IOC_SETFLAGS = 0x40086602
    FS_IOC_FSGETXATTR = 0x801c581f
    FS_IOC_FSSETXATTR = 0x401c5820
    TCGETS2 = 0x802c542a
    TCSETS2 = 0x402c542b
    TCSETSF2 = 0x402c542d
    TCXONC = 0x540a
    TCFLSH = 0x540b
    TIOCEXCL = 0x540c
    TIOCNXCL = 0x540d
    TIOCGPTN = 0x80045430
    TIOCSPTLCK = 0x40045431
    TIOCGDEV = 0x80045432
    TIOCGPKT = 0x80045438
    TIOCGPTLCK = 0x80045439
    RNDGETENTCNT = 0x80045200
    BLKGETSIZE64 = 0x80081272


# ---- opening -----------------------------------------------------------------------------------------------------

cdef uint16_t _needed(uint32_t flags) noexcept nogil:
    """Whitelist types that these open(2) flags call for."""
    cdef uint32_t mode = flags & O_ACCMODE
    cdef uint16_t needed = ALLOW_OPEN
    if mode != 1:                   # O_WRONLY
        needed |= ALLOW_READ
    if mode != O_RDONLY or flags & O_TRUNC:
        needed |= ALLOW_WRITE
    return needed


cdef bint _writes(uint32_t flags) noexcept nogil:
    return (flags & O_ACCMODE) != O_RDONLY or (flags & O_TRUNC) != 0


cdef uint32_t _handle_flags(uint32_t flags) noexcept nogil:
    return (HANDLE_WRITABLE if (flags & O_ACCMODE) != O_RDONLY else 0) | (HANDLE_APPEND if flags & O_APPEND else 0)


cdef int _grant(request *r, node *n, int fd, uint32_t flags, open_reply *out) noexcept nogil:
    """Make the handle of an opened file, which is taken over. 0 or -errno."""
    cdef statx_t st
    cdef uint64_t id = 0
    cdef int error = stat_fd(fd, &st)
    if error < 0:
        close(fd)
        return error
    cdef bint on_pseudo = lies_on_pseudo(r.s, n)
    out.flags = OPENED_UNCACHED if flags & O_APPEND or on_pseudo else 0
    if n.seen != signature(&st):
        out.flags |= OPENED_CHANGED
    if flags & O_APPEND:
        # Each WRITE says where it goes: pages of a mapping belong where they are, through this handle too. Files with
        # chattr +a insist on the flag, and keep it.
        fcntl(fd, F_SETFL, <int>(flags & (PASSED_FLAGS & ~(O_ACCMODE | O_APPEND))))
    error = handle_new(r.s, n, fd, _handle_flags(flags) | (HANDLE_POLLABLE if on_pseudo else 0),
                       flags & PASSED_FLAGS | (O_NONBLOCK if on_pseudo else 0), &id)
    note_handle(r, error, id)
    if storing and st.stx_nlink == 0 and error == 0:
        opened_unnamed(r.s, id)
    out.handle = id
    out.reserved = 0
    return error


cdef int _open_fd(request *r, node *n, uint32_t flags, uint32_t kill) noexcept nogil:
    """Open a regular file by its node, as the caller. A descriptor or -errno."""
    cdef char link[32]
    cdef int fd
    if n.type != S_IFREG:           # a FIFO, device or socket must never be opened here
        return -EISDIR if n.type == S_IFDIR else -ELOOP
    proc_path(link, n.fd)
    as_caller(r)
    if flags & FOR_EXECUTION and (flags & O_ACCMODE) == O_RDONLY and r.who.uid != 0:
        if syscall(SYS_faccessat2, n.fd, b"", 1, AT_EMPTY_PATH | AT_EACCESS) < 0:
            return -errno
        act_as_root(r.me)           # to execute, a file need not be readable
        flags &= ~<uint32_t>O_TRUNC     # root would cut it
    if kill & KILL_PRIVILEGES and r.who.uid == 0:
        drop_fsetid(r.me)
    # Files that the kernel makes up may wait for something to tell (trace_pipe); a worker must not.
    fd = openat(AT_FDCWD, link, (flags & (PASSED_FLAGS | O_TRUNC)) | O_CLOEXEC | O_NOCTTY |
                (O_NONBLOCK if lies_on_pseudo(r.s, n) else 0))
    return fd if fd >= 0 else -errno


cdef int _open_node(request *r, node *n, uint32_t flags, uint32_t kill, open_reply *out) noexcept nogil:
    cdef int fd, error = node_allowed(n, n.fd, _needed(flags))
    if error == 0 and is_special(n):
        return open_special(r, n, flags, out)       # which a read-only mount lets pass, as mount(2) does
    if error == 0 and r.s.read_only and _writes(flags):
        error = -EROFS
    if error < 0:
        return error
    fd = _open_fd(r, n, flags, kill)
    act_as_root(r.me)
    return fd if fd < 0 else _grant(r, n, fd, flags, out)


cdef int op_open(request *r) noexcept nogil:
    """OPEN: open_request → open_reply. A FIFO may have to wait."""
    cdef open_request *body = <open_request *>r.body
    cdef node *n = NULL
    cdef int error
    if r.body_bytes != sizeof(open_request):
        return MALFORMED
    error = node_pin(r.s, r.who.node, &n)
    if error < 0:
        return error
    error = _open_node(r, n, body.flags, body.kill, <open_reply *>r.reply)
    node_unpin(r.s, n)
    r.reply_bytes = sizeof(open_reply)
    return error


cdef int _enter_opened(request *r, int fd, place where, entry *out) noexcept nogil:
    """Count a lookup of a file just made, by its own descriptor: its name may mean another by now. 0 or -errno."""
    cdef char link[32]
    cdef statx_t st
    cdef int path_fd, error
    proc_path(link, fd)
    path_fd = openat(AT_FDCWD, link, O_PATH | O_CLOEXEC)
    if path_fd < 0:
        return -errno
    error = stat_fd(path_fd, &st)
    if error < 0:
        close(path_fd)
        return error
    return node_enter_fd(r.s, path_fd, &st, where, out)


cdef void _take_entry_back(request *r, uint64_t node) noexcept nogil:
    """Undo a lookup that the client is never told of."""
    note_node(r, 0, 0)
    node_forget(r.s, node, 1)


cdef int _grant_made(request *r, int fd, place where, uint32_t flags, create_reply *out) noexcept nogil:
    """Entry and handle of a file just made, whose descriptor is taken over. 0 or -errno."""
    cdef node *n = NULL
    cdef int error
    act_as_root(r.me)
    error = _enter_opened(r, fd, where, &out.made)
    if error < 0:
        close(fd)
        return error
    note_node(r, 0, out.made.node)
    error = node_pin(r.s, out.made.node, &n)
    if error < 0:
        close(fd)
    else:
        error = _grant(r, n, fd, flags, &out.opened)
        node_unpin(r.s, n)
    if error < 0:
        _take_entry_back(r, out.made.node)
    r.reply_bytes = sizeof(create_reply)
    return error


cdef int _open_existing(request *r, node *parent, const char *name, size_t name_bytes, create_reply *out) noexcept nogil:
    """CREATE of a name that another machine made first: open what is there, if it is a regular file."""
    cdef create_request *body = <create_request *>r.body
    cdef node *n = NULL
    cdef int error = node_enter(r.s, parent, name, name_bytes, False, &out.made)
    act_as_root(r.me)
    if error < 0:
        return error
    note_node(r, 0, out.made.node)
    error = node_pin(r.s, out.made.node, &n)
    if error == 0:
        # ESTALE: the client's kernel looks the name up again and then does the right thing.
        error = _open_node(r, n, body.flags, body.kill, &out.opened) if n.type == S_IFREG else -ESTALE
        node_unpin(r.s, n)
    if error < 0:
        _take_entry_back(r, out.made.node)
    r.reply_bytes = sizeof(create_reply)
    return error


cdef int _open_made(request *r, int directory, const char *name) noexcept nogil:
    """Make a file for the caller and open it. A descriptor or -errno."""
    cdef create_request *body = <create_request *>r.body
    cdef int error, fd, flags = (body.flags & PASSED_FLAGS) | O_NOFOLLOW | O_NOCTTY | O_CLOEXEC
    if was_made(r, directory, name, S_IFREG, 0):
        act_as_root(r.me)           # its mode binds others than its maker
        fd = openat(directory, name, flags)
        return fd if fd >= 0 else -errno
    error = session_room(r.s, True, directory, name)
    if error < 0:
        return error
    umask(r.who.umask)
    fd = openat(directory, name, flags | O_CREAT | O_EXCL, body.mode & 0o7777)
    error = -errno if fd < 0 else 0
    umask(0)
    return fd if error == 0 else error


cdef int _create(request *r, node *parent, const char *name, size_t name_bytes) noexcept nogil:
    cdef create_request *body = <create_request *>r.body
    cdef place where
    cdef int error, fd = -1
    cdef int denied = child_allowed(r.s, parent, <const uint8_t *>name, name_bytes,
                                    ALLOW_CREATE | _needed(body.flags), &where)
    as_caller(r)
    if denied == 0:
        note_name(r, parent.fd, name)
        fd = _open_made(r, parent.fd, name)
        denied = min(fd, 0)
    if fd >= 0:
        return _grant_made(r, fd, where, body.flags, <create_reply *>r.reply)
    if body.flags & O_EXCL or denied not in (-EEXIST, -EACCES, -EROFS):
        return denied
    # Why it failed is what opening the existing file says, or, if there is none, what creating it said.
    error = _open_existing(r, parent, name, name_bytes, <create_reply *>r.reply)
    return denied if error == -ENOENT and denied != -EEXIST else error


cdef int op_create(request *r) noexcept nogil:
    """CREATE: create_request, name → create_reply. Exclusive with O_EXCL, whoever else is at it."""
    cdef char name[MAX_NAME + 1]
    cdef size_t name_bytes = r.body_bytes - sizeof(create_request)
    cdef node *parent = NULL
    cdef int error
    if r.body_bytes < sizeof(create_request):
        return MALFORMED
    error = take_name(r, sizeof(create_request), name_bytes, name)
    if error == 0:
        error = node_pin(r.s, r.who.node, &parent)
    if error < 0:
        return error
    error = _create(r, parent, name, name_bytes)
    node_unpin(r.s, parent)
    return error


cdef int op_tmpfile(request *r) noexcept nogil:
    """TMPFILE: create_request → create_reply, of a file without a name (O_TMPFILE)."""
    cdef create_request *body = <create_request *>r.body
    cdef node *parent = NULL
    cdef int fd, error
    if r.body_bytes != sizeof(create_request):
        return MALFORMED
    if r.s.read_only:
        return -EROFS
    error = node_pin(r.s, r.who.node, &parent)
    if error < 0:
        return error
    error = node_allowed(parent, parent.fd, ALLOW_CREATE | _needed(body.flags))
    if error == 0:
        error = session_room(r.s, True, -1, NULL)
    if error == 0:
        as_caller(r)
        umask(r.who.umask)
        fd = openat(parent.fd, b".", O_TMPFILE | (body.flags & (PASSED_FLAGS | O_EXCL)) | O_CLOEXEC, body.mode & 0o7777)
        error = -errno if fd < 0 else 0
        umask(0)
        if error == 0:
            error = _grant_made(r, fd, parent.where, body.flags, <create_reply *>r.reply)
    node_unpin(r.s, parent)
    return error


# ---- data --------------------------------------------------------------------------------------------------------

cdef int _transfer_error(int error) noexcept nogil:
    """Only memory that is shared with the client fails, when it is taken away: that is no mistake of the caller's."""
    return -EIO if error == -EFAULT else error


cdef ssize_t _read(const handle *h, uint8_t *data, size_t size, uint64_t offset) noexcept nogil:
    """pread(2); of a file that knows no offsets, what comes next."""
    cdef ssize_t got = pread(h.fd, data, size, offset)
    return read(h.fd, data, size) if got < 0 and errno == ESPIPE else got


cdef size_t _beginning(const request *r, const read_request *body) noexcept nogil:
    """How much of a READ is to be copied, so that the rest begins with a page: 28 to 32 KiB, or nothing.

    The client's pipe holds 256 pieces, of which one is a header. What is copied comes there in a few, the rest page by page.
    """
    if not r.pipe.onward or body.size <= PIPE_BYTES - COPIED_BYTES:
        return 0
    return COPIED_BYTES - body.offset % PIPE_PAGE_BYTES


cdef bint _read_by_reference(request *r, const handle *h, const read_request *body) noexcept nogil:
    """Have the data in the pipe, but for the beginning of the longest reads. False: all of it is to be copied."""
    cdef size_t size = _beginning(r, body)
    cdef ssize_t got = 0
    if not pipe_make(r.pipe):
        return False
    if size > 0:
        got = pread(h.fd, r.reply, size, body.offset)
    if got == <ssize_t>size and not pipe_fill(r.pipe, h.fd, body.size - size, body.offset + size):
        return False
    r.reply_bytes = max(got, 0) + r.pipe.bytes
    return got >= 0


cdef int op_read(request *r) noexcept nogil:
    """READ: read_request → data; fewer bytes than asked only at the end of the file."""
    cdef read_request *body = <read_request *>r.body
    cdef handle *h = NULL
    cdef ssize_t got
    cdef int error
    if r.body_bytes != sizeof(read_request) or body.size > MAX_PAYLOAD:
        return MALFORMED
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    error = node_allowed(h.node, h.fd, ALLOW_READ)
    if error == 0 and body.size > r.reply_room:
        error = -EMSGSIZE
    elif error == 0 and h.flags & HANDLE_STREAM:
        error = read_stream(r, h, body)
    elif error == 0 and r.pipe != NULL and body.size >= SPLICE_BYTES and not h.flags & HANDLE_POLLABLE and \
            _read_by_reference(r, h, body):
        pass
    elif error == 0:
        got = _read(h, r.reply, body.size, body.offset)
        error = _transfer_error(-errno) if got < 0 else 0
        r.reply_bytes = max(got, 0)
        if r.reply_bytes < body.size:
            r.reply[r.reply_bytes] = 0      # if it was no end of file but a bus error, the memory is marked lost now
        if error == -EAGAIN and h.flags & HANDLE_POLLABLE:
            error = read_stream(r, h, body)     # trace_pipe and the like: what comes next, when it comes
    if error != DEFERRED:
        handle_unpin(r.s, h)
    return error


cdef void _as_writer(request *r, uint32_t kill) noexcept nogil:
    """Writes are the caller's: suid and sgid go, and the blocks kept for root stay kept."""
    if r.who.uid != 0:
        act_as(r.me, r.who.uid, r.who.gid, NULL, 0)
    elif kill & KILL_PRIVILEGES:
        drop_fsetid(r.me)


cdef bint _appends(const handle *h, const write_request *body) noexcept nogil:
    return body.flags & WRITE_APPEND != 0 or (h.flags & HANDLE_APPEND != 0 and body.flags & WRITE_AT_OFFSET == 0)


cdef ssize_t _write(const handle *h, uint8_t *data, const write_request *body) noexcept nogil:
    """write(2) at the offset or, atomically, at the end of the file, wherever that is by now. As pwrite(2)."""
    cdef iovec part
    cdef ssize_t done
    if not _appends(h, body):
        done = pwrite(h.fd, data, body.size, body.offset)
    else:
        part.iov_base = data
        part.iov_len = body.size
        done = pwritev2(h.fd, &part, 1, 0, RWF_APPEND)
    return write(h.fd, data, body.size) if done < 0 and errno == ESPIPE else done   # as in _read


cdef ssize_t _append(request *r, const handle *h, uint8_t *data, write_request *body) noexcept nogil:
    """_write of what goes to the end of a file, less what the engine before us has written there."""
    cdef size_t size = body.size, done
    cdef ssize_t rest = 0
    note_size(r, h.fd)
    done = was_appended(r, h.fd, data, size)
    body.size -= <uint32_t>done
    if body.size > 0 or size == 0:
        rest = _write(h, data + done, body)
    body.size = <uint32_t>size
    return rest if rest < 0 and done == 0 else <ssize_t>done + max(rest, 0)


cdef int hold_for_early_write(request *r, const write_request *body, handle **out) noexcept nogil:
    """Pin the file of a WRITE of which only a part is there, and act as its caller, if it may be begun. 0 or -errno.

    Not where it counts how many writes there are: at the end of a file, in streams and pseudo files, with O_DSYNC.
    """
    cdef handle *h = NULL
    cdef int error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    error = node_allowed(h.node, h.fd, ALLOW_WRITE)
    if error == 0 and (h.flags & (HANDLE_STREAM | HANDLE_POLLABLE | HANDLE_APPEND) or h.open_flags & O_DSYNC or
                       _appends(h, body)):
        error = -EAGAIN
    if error < 0:
        handle_unpin(r.s, h)
        return error
    _as_writer(r, body.flags)
    out[0] = h
    return 0


cdef int _write_rest(request *r, const handle *h, const write_request *body) noexcept nogil:
    """The rest of a WRITE that was begun before all of it had come, as long as it is still the same. 0, -errno, MALFORMED."""
    cdef size_t done = r.early.done
    cdef ssize_t more = 0
    if memcmp(body, &r.early.asked, sizeof(write_request)) != 0:
        return MALFORMED
    if done < body.size:
        _as_writer(r, body.flags)
        more = pwrite(h.fd, r.body + sizeof(write_request) + done, body.size - done, body.offset + done)
    # As in write(2): who has written a part hears of that, and of what is wrong the next time.
    (<count_reply *>r.reply).count = done + max(more, 0)
    r.reply_bytes = sizeof(count_reply)
    return 0


cdef int op_write(request *r) noexcept nogil:
    """WRITE: write_request, data → count_reply."""
    cdef write_request copy         # the message may lie in memory that the peer can still write to
    cdef write_request *body = &copy
    cdef handle *h = NULL
    cdef ssize_t done
    cdef int error
    if r.body_bytes < sizeof(write_request):
        return MALFORMED
    memcpy(body, r.body, sizeof(write_request))
    if r.body_bytes != sizeof(write_request) + <size_t>body.size:
        return MALFORMED
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    error = node_allowed(h.node, h.fd, ALLOW_WRITE)
    if error == 0 and r.early != NULL and r.early.done > 0:
        error = _write_rest(r, h, body)
        handle_unpin(r.s, h)
        return error
    if error == 0 and moves_ourselves(r.s, h, r.body + sizeof(write_request), body.size):
        error = -ESRCH              # who is meant is not a process of this machine
    if error == 0 and h.flags & HANDLE_STREAM:
        error = write_stream(r, h, r.body + sizeof(write_request), body)
    elif error == 0:
        _as_writer(r, body.flags)
        if _appends(h, body):
            done = _append(r, h, r.body + sizeof(write_request), body)
        else:
            done = _write(h, r.body + sizeof(write_request), body)
        error = _transfer_error(-errno) if done < 0 else 0
        (<count_reply *>r.reply).count = max(done, 0)
        r.reply_bytes = sizeof(count_reply)
    if error != DEFERRED:
        handle_unpin(r.s, h)
    return error


cdef void _note_closing(request *r, const handle *h) noexcept nogil:
    """Should close(2) hang, this is where: the request itself tells only where one of its handles is."""
    pthread_mutex_lock(&r.s.guard)
    if h.node.index != NO_INDEX:
        r.at.node = node_id(h.node.index, record_at(r.s, h.node.index))
    pthread_mutex_unlock(&r.s.guard)
    r.at.handle = 0


cdef int _release_one(request *r, const release_request *asked) noexcept nogil:
    cdef handle *h = NULL
    cdef int error = handle_hold(r.s, asked.handle, &h)
    if error < 0:
        return 0 if r.resumed else error
    _note_closing(r, h)
    error = handle_end(r.s, asked.handle)
    end_handle_locks(r.s, h, asked.handle, asked.flags & RELEASE_FLOCK)
    handle_unpin(r.s, h)
    return error


cdef int op_release(request *r) noexcept nogil:
    """RELEASE, RELEASEDIR: release_request, some → nothing. What locks and waits are left of it end too.

    All are ended, whatever becomes of the others; the first error is the answer.
    """
    cdef const release_request *asked = <const release_request *>r.body
    cdef size_t i, count = r.body_bytes // sizeof(release_request)
    cdef int error, first = 0
    if r.body_bytes != count * sizeof(release_request) or not 1 <= count <= MAX_RELEASES:
        return MALFORMED
    for i in range(count):
        error = _release_one(r, &asked[i])
        if first == 0:
            first = error
    return first


cdef int op_flush(request *r) noexcept nogil:
    """FLUSH: release_request → nothing. A close(2): the owner's POSIX locks end, late write errors show."""
    cdef release_request *body = <release_request *>r.body
    cdef handle *h = NULL
    cdef node *n = NULL
    cdef int fd, error
    if r.body_bytes != sizeof(release_request):
        return MALFORMED
    error = handle_hold(r.s, body.handle, &h)
    if error == 0:
        drop_locks(r.s, h.node, body.lock_owner)
    elif node_pin(r.s, r.who.node, &n) == 0:
        # Held up by a broken connection, a FLUSH may come after the RELEASE.
        drop_locks(r.s, n, body.lock_owner)
        node_unpin(r.s, n)
    if error < 0:
        return error
    if h.flags & HANDLE_WRITABLE and not h.flags & HANDLE_STREAM and h.fd >= 0:
        fd = dup(h.fd)
        if fd < 0 or close(fd) < 0:
            error = -errno
    handle_unpin(r.s, h)
    return error


cdef int op_fsync(request *r) noexcept nogil:
    """FSYNC, FSYNCDIR: fsync_request → nothing; the data (and attributes) are on the server's disk."""
    cdef fsync_request *body = <fsync_request *>r.body
    cdef handle *h = NULL
    cdef int error
    if r.body_bytes != sizeof(fsync_request):
        return MALFORMED
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    if (fdatasync(h.fd) if body.datasync else fsync(h.fd)) < 0:
        error = -errno
    handle_unpin(r.s, h)
    return error


cdef int op_fallocate(request *r) noexcept nogil:
    """FALLOCATE: fallocate_request → nothing. Modes as the backing file system knows them, if they can be repeated."""
    cdef fallocate_request *body = <fallocate_request *>r.body
    cdef handle *h = NULL
    cdef int error
    if r.body_bytes != sizeof(fallocate_request):
        return MALFORMED
    if body.mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE):
        return -EOPNOTSUPP              # FUSE passes neither on
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    error = node_allowed(h.node, h.fd, ALLOW_WRITE)
    if error == 0:
        _as_writer(r, 0)
        if fallocate(h.fd, body.mode, body.offset, body.length) < 0:
            error = -errno
    handle_unpin(r.s, h)
    return error


cdef int op_lseek(request *r) noexcept nogil:
    """LSEEK: lseek_request → lseek_reply, for SEEK_DATA and SEEK_HOLE."""
    cdef lseek_request *body = <lseek_request *>r.body
    cdef handle *h = NULL
    cdef int64_t found
    cdef int error
    if r.body_bytes != sizeof(lseek_request):
        return MALFORMED
    if body.whence != SEEK_DATA and body.whence != SEEK_HOLE:
        return -EINVAL              # the others would move a position that READDIR relies on
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    found = lseek(h.fd, body.offset, body.whence)
    error = -errno if found < 0 else 0
    (<lseek_reply *>r.reply).offset = found
    r.reply_bytes = sizeof(lseek_reply)
    handle_unpin(r.s, h)
    return error


cdef int _copy(request *r, handle *source, handle *destination, const copy_request *body) noexcept nogil:
    cdef int64_t from_offset = body.offset_in, to_offset = body.offset_out
    cdef ssize_t done
    cdef int error = node_allowed(source.node, source.fd, ALLOW_READ)
    if error == 0:
        error = node_allowed(destination.node, destination.fd, ALLOW_WRITE)
    if error < 0:
        return error
    _as_writer(r, KILL_PRIVILEGES)
    done = copy_file_range(source.fd, &from_offset, destination.fd, &to_offset, min(body.length, <uint64_t>LONGEST_COPY),
                           body.flags)
    if done < 0:
        return -errno
    (<count_reply *>r.reply).count = done
    r.reply_bytes = sizeof(count_reply)
    return 0


cdef int op_copy_file_range(request *r) noexcept nogil:
    """COPY_FILE_RANGE: copy_request → count_reply. The data does not leave the server."""
    cdef copy_request *body = <copy_request *>r.body
    cdef handle *source = NULL
    cdef handle *destination = NULL
    cdef int error
    if r.body_bytes != sizeof(copy_request):
        return MALFORMED
    error = handle_pin(r.s, body.handle_in, &source)
    if error < 0:
        return error
    error = handle_pin(r.s, body.handle_out, &destination)
    if error == 0:
        error = _copy(r, source, destination, body)
        handle_unpin(r.s, destination)
    handle_unpin(r.s, source)
    return error


# ---- ioctl -------------------------------------------------------------------------------------------------------

cdef struct ioctl_row:
    uint32_t command
    uint16_t in_bytes
    uint16_t out_bytes
    bint of_device                  # only of a FIFO or device, which is named if it is open
    bint changes                    # needs Setattr
    bint with_argument              # its argument is a number, not a pointer

# What the numbers of <linux/fs.h>, <asm-generic/ioctls.h> and <linux/random.h> say of their arguments is all that a FUSE
# client can carry: commands like TCGETS or BLKGETSIZE do not tell their sizes, and those with pointers inside cannot cross.
cdef ioctl_row[18] _ioctls
_ioctls[0] = ioctl_row(FS_IOC_GETFLAGS, 0, sizeof(int32_t), False, False, False)
_ioctls[1] = ioctl_row(FS_IOC_SETFLAGS, sizeof(int32_t), 0, False, True, False)
_ioctls[2] = ioctl_row(FS_IOC_FSGETXATTR, 0, 28, False, False, False)              # struct fsxattr
_ioctls[3] = ioctl_row(FS_IOC_FSSETXATTR, 28, 0, False, True, False)
_ioctls[4] = ioctl_row(TCGETS2, 0, 44, True, False, False)             # struct termios2
_ioctls[5] = ioctl_row(TCSETS2, 44, 0, True, False, False)
_ioctls[6] = ioctl_row(TCSETSF2, 44, 0, True, False, False)
_ioctls[7] = ioctl_row(TCXONC, 0, 0, True, False, True)
_ioctls[8] = ioctl_row(TCFLSH, 0, 0, True, False, True)
_ioctls[9] = ioctl_row(TIOCEXCL, 0, 0, True, False, False)
_ioctls[10] = ioctl_row(TIOCNXCL, 0, 0, True, False, False)
_ioctls[11] = ioctl_row(TIOCGPTN, 0, 4, True, False, False)
_ioctls[12] = ioctl_row(TIOCSPTLCK, 4, 0, True, False, False)
_ioctls[13] = ioctl_row(TIOCGPTLCK, 0, 4, True, False, False)
_ioctls[14] = ioctl_row(TIOCGPKT, 0, 4, True, False, False)
_ioctls[15] = ioctl_row(TIOCGDEV, 0, 4, True, False, False)
_ioctls[16] = ioctl_row(RNDGETENTCNT, 0, 4, True, False, False)
_ioctls[17] = ioctl_row(BLKGETSIZE64, 0, 8, True, False, False)


cdef const ioctl_row *_find_ioctl(uint32_t command) noexcept nogil:
    """The row of a command; NULL: it is not served."""
    cdef int i
    for i in range(18):
        if _ioctls[i].command == command:
            return &_ioctls[i]
    return NULL


cdef int _ioctl(request *r, handle *h, const ioctl_row *row) noexcept nogil:
    cdef ioctl_request *body = <ioctl_request *>r.body
    cdef ioctl_reply *out = <ioctl_reply *>r.reply
    cdef uint64_t room[8]
    cdef size_t size
    cdef int error = node_allowed(h.node, h.fd, ALLOW_SETATTR) if row.changes else 0
    if row.of_device and not is_special(h.node):
        return -ENOTTY
    if error == 0 and row.changes and r.s.read_only:
        error = -EROFS
    if error < 0:
        return error
    memset(room, 0, sizeof(room))
    memcpy(room, r.body + sizeof(ioctl_request), row.in_bytes)
    as_caller(r)
    if row.with_argument:
        out.result = ioctl(h.fd, row.command, <unsigned long>body.argument)
    else:
        out.result = ioctl(h.fd, row.command, room)
    if out.result < 0:
        return -errno
    out.reserved = 0
    r.reply_bytes = sizeof(ioctl_reply)
    if row.out_bytes > 0:
        # FS_IOC_GETFLAGS says long and transfers an int: the caller's kernel wants what it says.
        size = min(sizeof(room), <size_t>body.out_size)
        memcpy(r.reply + sizeof(ioctl_reply), room, size)
        r.reply_bytes += size
    return 0


cdef int op_ioctl(request *r) noexcept nogil:
    """IOCTL: ioctl_request, in data → ioctl_reply, out data. Those of the table; every other is ENOTTY."""
    cdef ioctl_request *body = <ioctl_request *>r.body
    cdef const ioctl_row *row
    cdef handle *h = NULL
    cdef int error
    if r.body_bytes < sizeof(ioctl_request) or r.body_bytes != sizeof(ioctl_request) + <size_t>body.in_size:
        return MALFORMED
    row = _find_ioctl(body.command)
    if row == NULL:
        return -ENOTTY
    if body.in_size < row.in_bytes or body.out_size < row.out_bytes:
        return -EINVAL
    error = handle_pin(r.s, body.handle, &h)
    if error < 0:
        return error
    error = _ioctl(r, h, row)
    handle_unpin(r.s, h)
    return error
