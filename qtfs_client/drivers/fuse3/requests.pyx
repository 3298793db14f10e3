"""From the kernel's requests to the server's: one `build_*` function for each operation.

Each reads worker.request and worker.argument (at least as long as its row in dispatch.pyx says; whatever lies beyond
is checked here), and leaves a message in the channel's reserved room. It returns 0, or -errno to answer the kernel at
once. It may be called again for the same request, on a fresh channel after the first one broke.
"""
from libc.errno cimport EINVAL, EIO, ENAMETOOLONG, ENOTTY
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from qtfs_client.drivers.fuse3.callers cimport caller_groups
from qtfs_client.drivers.fuse3.piping cimport expect_data
from qtfs_client.drivers.fuse3.placing cimport NEAR_DATA_BYTES, bring_home
from qtfs_client.drivers.fuse3.state cimport FORGETS_AT_ONCE, builder, mount_state, worker
from qtfs_client.includes.fuse_abi cimport *
from qtfs_client.includes.linux cimport O_APPEND, O_DIRECT, O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK, pthread_mutex_lock, \
    pthread_mutex_unlock, strnlen
from qtfs_common.protocol cimport *

cdef enum:                          # asm-generic/fcntl.h: the wire's numbers where an architecture has its own
    WIRE_O_DIRECT = 0o40000
    WIRE_O_LARGEFILE = 0o100000
    WIRE_O_DIRECTORY = 0o200000
    WIRE_O_NOFOLLOW = 0o400000


# ---- messages ------------------------------------------------------------------------------------------------------

cdef void _fill_header(worker *w, uint16_t op) noexcept nogil:
    cdef header *head = <header *>w.room
    head.length = <uint32_t>w.message_bytes
    head.op = w.asked_op = op
    head.flags = 0
    head.error = 0
    head.slot = w.slot
    head.sequence = w.sequence
    head.tag = w.request.unique


cdef uint8_t *begin(worker *w, uint16_t op, size_t body_bytes, bint with_groups, uint32_t umask) noexcept nogil:
    """Reserve a message for the request in hand and fill in who asks: the body's room, or NULL if it is too long.

    `body_bytes` does not include a payload, which _add_payload names afterwards.
    """
    cdef uint32_t groups[MAX_GROUPS]
    cdef fuse_in_header *request = w.request
    cdef int ngroups = 0
    cdef caller *who
    cdef uint8_t *room
    if with_groups and request.uid != 0:
        ngroups = caller_groups(request.pid, groups, MAX_GROUPS)
    w.payload = NULL
    w.payload_bytes = w.payload_placed = 0
    w.message_bytes = sizeof(header) + sizeof(caller) + groups_bytes(ngroups) + body_bytes
    w.room = w.link.ch.ops.reserve(w.link.ch, w.message_bytes, False)
    if w.room == NULL:
        return NULL
    _fill_header(w, op)
    who = <caller *>(w.room + sizeof(header))
    who.node = request.nodeid
    who.uid = request.uid
    who.gid = request.gid
    who.pid = request.pid
    who.umask = <uint16_t>(umask & 0o777)
    who.ngroups = <uint16_t>ngroups
    room = w.room + sizeof(header) + sizeof(caller)
    if ngroups > 0:
        memset(room + groups_bytes(ngroups) - 4, 0, 4)
        memcpy(room, groups, ngroups * 4)
    return room + groups_bytes(ngroups)


cdef void _add_payload(worker *w, const uint8_t *payload, size_t size) noexcept nogil:
    """Send bytes of the kernel's request behind the message, from where they are."""
    w.payload = payload
    w.payload_bytes = size
    (<header *>w.room).length = <uint32_t>(w.message_bytes + size)


cdef const char *_text(worker *w, size_t offset, size_t *length) noexcept nogil:
    """A NUL-terminated string of the argument; NULL if its end is missing."""
    cdef const char *text
    if offset >= w.argument_bytes:
        return NULL
    text = <const char *>w.argument + offset
    length[0] = strnlen(text, w.argument_bytes - offset)
    return text if offset + length[0] < w.argument_bytes else NULL


cdef int _name(worker *w, size_t offset, const char **name, size_t *length) noexcept nogil:
    """The name at an offset of the argument: 0 or -errno."""
    name[0] = _text(w, offset, length)
    if name[0] == NULL:
        return -EINVAL
    return -ENAMETOOLONG if length[0] > MAX_NAME else 0


cdef uint8_t *_begin_named(worker *w, uint16_t op, size_t fixed_bytes, size_t offset, uint32_t umask,
                           int *error) noexcept nogil:
    """Begin a message of a fixed record and the name at an offset of the argument; NULL and an errno on failure."""
    cdef const char *name = NULL
    cdef size_t length = 0
    cdef uint8_t *body
    error[0] = _name(w, offset, &name, &length)
    if error[0] < 0:
        return NULL
    body = begin(w, op, fixed_bytes + length, True, umask)
    if body == NULL:
        error[0] = -EIO
        return NULL
    memcpy(body + fixed_bytes, name, length)
    return body


cdef int _named_only(worker *w, uint16_t op) noexcept nogil:
    cdef int error = 0
    _begin_named(w, op, 0, 0, 0, &error)
    return error


cdef int _no_body(worker *w, uint16_t op) noexcept nogil:
    return 0 if begin(w, op, 0, False, 0) != NULL else -EIO


cdef inline uint32_t _wire_flags(uint32_t flags) noexcept nogil:
    """O_* in the wire's numbering; Arm, PowerPC and others have their own for four of them. O_LARGEFILE goes."""
    cdef uint32_t wire = flags & ~<uint32_t>(O_DIRECT | O_DIRECTORY | O_NOFOLLOW | WIRE_O_DIRECT | WIRE_O_LARGEFILE |
                                             WIRE_O_DIRECTORY | WIRE_O_NOFOLLOW)
    if flags & <uint32_t>O_DIRECT:
        wire |= WIRE_O_DIRECT
    if flags & <uint32_t>O_DIRECTORY:
        wire |= WIRE_O_DIRECTORY
    if flags & <uint32_t>O_NOFOLLOW:
        wire |= WIRE_O_NOFOLLOW
    return wire


# ---- names ---------------------------------------------------------------------------------------------------------

cdef int _build_lookup(worker *w) noexcept nogil:
    return _named_only(w, OP_LOOKUP)


cdef int _build_unlink(worker *w) noexcept nogil:
    return _named_only(w, OP_UNLINK)


cdef int _build_rmdir(worker *w) noexcept nogil:
    return _named_only(w, OP_RMDIR)


cdef int _build_mknod(worker *w) noexcept nogil:
    cdef fuse_mknod_in *asked = <fuse_mknod_in *>w.argument
    cdef int error = 0
    cdef mknod_request *made = <mknod_request *>_begin_named(w, OP_MKNOD, sizeof(mknod_request), sizeof(fuse_mknod_in),
                                                             asked.umask, &error)
    if made != NULL:
        made.mode = asked.mode
        made.rdev = asked.rdev
    return error


cdef int _build_mkdir(worker *w) noexcept nogil:
    cdef fuse_mkdir_in *asked = <fuse_mkdir_in *>w.argument
    cdef int error = 0
    cdef mkdir_request *made = <mkdir_request *>_begin_named(w, OP_MKDIR, sizeof(mkdir_request), sizeof(fuse_mkdir_in),
                                                             asked.umask, &error)
    if made != NULL:
        made.mode = asked.mode
        made.reserved = 0
    return error


cdef int _build_symlink(worker *w) noexcept nogil:
    cdef const char *name = NULL
    cdef const char *target = NULL
    cdef size_t name_bytes = 0, target_bytes = 0
    cdef symlink_request *made
    cdef int error = _name(w, 0, &name, &name_bytes)
    if error < 0:
        return error
    target = _text(w, name_bytes + 1, &target_bytes)
    if target == NULL:
        return -EINVAL
    if target_bytes >= MAX_PATH:
        return -ENAMETOOLONG
    made = <symlink_request *>begin(w, OP_SYMLINK, sizeof(symlink_request) + name_bytes + target_bytes, True, 0)
    if made == NULL:
        return -EIO
    made.name_bytes = <uint32_t>name_bytes
    made.target_bytes = <uint32_t>target_bytes
    memcpy(made + 1, name, name_bytes)
    memcpy(<uint8_t *>(made + 1) + name_bytes, target, target_bytes)
    return 0


cdef int _rename(worker *w, size_t offset, uint64_t new_directory, uint32_t flags) noexcept nogil:
    cdef const char *name = NULL
    cdef const char *new_name = NULL
    cdef size_t name_bytes = 0, new_name_bytes = 0
    cdef rename_request *made
    cdef int error = _name(w, offset, &name, &name_bytes)
    if error == 0:
        error = _name(w, offset + name_bytes + 1, &new_name, &new_name_bytes)
    if error < 0:
        return error
    made = <rename_request *>begin(w, OP_RENAME, sizeof(rename_request) + name_bytes + new_name_bytes, True, 0)
    if made == NULL:
        return -EIO
    made.new_directory = new_directory
    made.flags = flags
    made.name_bytes = <uint32_t>name_bytes
    made.new_name_bytes = <uint32_t>new_name_bytes
    made.reserved = 0
    memcpy(made + 1, name, name_bytes)
    memcpy(<uint8_t *>(made + 1) + name_bytes, new_name, new_name_bytes)
    return 0


cdef int _build_rename(worker *w) noexcept nogil:
    return _rename(w, sizeof(fuse_rename_in), (<fuse_rename_in *>w.argument).newdir, 0)


cdef int _build_rename2(worker *w) noexcept nogil:
    cdef fuse_rename2_in *asked = <fuse_rename2_in *>w.argument
    return _rename(w, sizeof(fuse_rename2_in), asked.newdir, asked.flags)


cdef int _build_link(worker *w) noexcept nogil:
    cdef int error = 0
    cdef link_request *made = <link_request *>_begin_named(w, OP_LINK, sizeof(link_request), sizeof(fuse_link_in), 0,
                                                           &error)
    if made != NULL:
        made.target = (<fuse_link_in *>w.argument).oldnodeid
    return error


cdef int _build_readlink(worker *w) noexcept nogil:
    return _no_body(w, OP_READLINK)


# ---- attributes ----------------------------------------------------------------------------------------------------

cdef int _build_getattr(worker *w) noexcept nogil:
    cdef fuse_getattr_in *asked = <fuse_getattr_in *>w.argument
    cdef getattr_request *made = <getattr_request *>begin(w, OP_GETATTR, sizeof(getattr_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.flags = asked.getattr_flags & FUSE_GETATTR_FH
    made.reserved = 0
    return 0


cdef int _build_setattr(worker *w) noexcept nogil:
    cdef fuse_setattr_in *asked = <fuse_setattr_in *>w.argument
    cdef setattr_request *made = <setattr_request *>begin(w, OP_SETATTR, sizeof(setattr_request), True, 0)
    if made == NULL:
        return -EIO
    memset(made, 0, sizeof(setattr_request))
    made.valid = asked.valid & ~<uint32_t>(SET_LOCK_OWNER | SET_CTIME)
    made.handle = asked.fh
    made.size = asked.size
    made.atime = <int64_t>asked.atime
    made.mtime = <int64_t>asked.mtime
    made.atime_ns = asked.atimensec
    made.mtime_ns = asked.mtimensec
    made.mode = asked.mode
    made.uid = asked.uid
    made.gid = asked.gid
    return 0


cdef int _build_statx(worker *w) noexcept nogil:
    cdef fuse_statx_in *asked = <fuse_statx_in *>w.argument
    cdef statx_request *made = <statx_request *>begin(w, OP_STATX, sizeof(statx_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.flags = asked.getattr_flags & FUSE_GETATTR_FH
    made.reserved = 0
    made.statx_flags = asked.sx_flags
    made.statx_mask = asked.sx_mask
    return 0


cdef int _build_access(worker *w) noexcept nogil:
    cdef access_request *made = <access_request *>begin(w, OP_ACCESS, sizeof(access_request), True, 0)
    if made == NULL:
        return -EIO
    made.mask = (<fuse_access_in *>w.argument).mask
    made.reserved = 0
    return 0


cdef int build_special_access(worker *w) noexcept nogil:
    """ACCESS to the node that a LOOKUP has just found."""
    cdef access_request *made = <access_request *>begin(w, OP_ACCESS, sizeof(access_request), True, 0)
    if made == NULL:
        return -EIO
    (<caller *>(w.room + sizeof(header))).node = w.asked_node
    made.mask = w.asked_mask
    made.reserved = 0
    return 0


cdef int _build_statfs(worker *w) noexcept nogil:
    return _no_body(w, OP_STATFS)


cdef int _build_syncfs(worker *w) noexcept nogil:
    return _no_body(w, OP_SYNCFS)


# ---- extended attributes -------------------------------------------------------------------------------------------

cdef int _xattr(worker *w, uint16_t op, size_t offset, uint32_t size) noexcept nogil:
    """GETXATTR, REMOVEXATTR: the name lies at the offset."""
    cdef size_t length = 0
    cdef const char *name = _text(w, offset, &length)
    cdef xattr_request *made
    if name == NULL:
        return -EINVAL
    made = <xattr_request *>begin(w, op, sizeof(xattr_request) + length, True, 0)
    if made == NULL:
        return -EIO
    memset(made, 0, sizeof(xattr_request))
    made.size = min(size, <uint32_t>MAX_XATTR)
    made.name_bytes = <uint32_t>length
    memcpy(made + 1, name, length)
    return 0


cdef int _build_getxattr(worker *w) noexcept nogil:
    return _xattr(w, OP_GETXATTR, sizeof(fuse_getxattr_in), (<fuse_getxattr_in *>w.argument).size)


cdef int _build_removexattr(worker *w) noexcept nogil:
    return _xattr(w, OP_REMOVEXATTR, 0, 0)


cdef int _build_listxattr(worker *w) noexcept nogil:
    cdef xattr_request *made = <xattr_request *>begin(w, OP_LISTXATTR, sizeof(xattr_request), True, 0)
    if made == NULL:
        return -EIO
    memset(made, 0, sizeof(xattr_request))
    made.size = min((<fuse_getxattr_in *>w.argument).size, <uint32_t>MAX_XATTR)
    return 0


cdef int _build_setxattr(worker *w) noexcept nogil:
    cdef fuse_setxattr_in *asked = <fuse_setxattr_in *>w.argument
    cdef size_t offset = sizeof(fuse_setxattr_in) if w.mount.setxattr_ext else SETXATTR_OLD_BYTES
    cdef size_t length = 0
    cdef const char *name = _text(w, offset, &length)
    cdef xattr_request *made
    if name == NULL or w.argument_bytes - offset - length - 1 < asked.size or asked.size > MAX_XATTR:
        return -EINVAL
    made = <xattr_request *>begin(w, OP_SETXATTR, sizeof(xattr_request) + length + asked.size, True, 0)
    if made == NULL:
        return -EIO
    made.size = asked.size
    made.flags = asked.flags
    made.name_bytes = <uint32_t>length
    made.kill = 1 if w.mount.setxattr_ext and asked.setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID else 0
    memcpy(made + 1, name, length)
    memcpy(<uint8_t *>(made + 1) + length, name + length + 1, asked.size)
    return 0


# ---- opening and closing -------------------------------------------------------------------------------------------

cdef int _open(worker *w, uint16_t op) noexcept nogil:
    cdef fuse_open_in *asked = <fuse_open_in *>w.argument
    cdef open_request *made = <open_request *>begin(w, op, sizeof(open_request), True, 0)
    if made == NULL:
        return -EIO
    made.flags = _wire_flags(asked.flags)
    made.kill = KILL_PRIVILEGES if asked.open_flags & FUSE_OPEN_KILL_SUIDGID else 0
    return 0


cdef int _build_open(worker *w) noexcept nogil:
    return _open(w, OP_OPEN)


cdef int _build_opendir(worker *w) noexcept nogil:
    return _open(w, OP_OPENDIR)


cdef void _fill_create(const fuse_create_in *asked, create_request *made) noexcept nogil:
    made.flags = _wire_flags(asked.flags)
    made.mode = asked.mode
    made.kill = KILL_PRIVILEGES if asked.open_flags & FUSE_OPEN_KILL_SUIDGID else 0
    made.reserved = 0


cdef int _build_create(worker *w) noexcept nogil:
    cdef fuse_create_in *asked = <fuse_create_in *>w.argument
    cdef int error = 0
    cdef create_request *made = <create_request *>_begin_named(w, OP_CREATE, sizeof(create_request),
                                                               sizeof(fuse_create_in), asked.umask, &error)
    if made != NULL:
        _fill_create(asked, made)
    return error


cdef int _build_tmpfile(worker *w) noexcept nogil:
    """The kernel sends a name too, which is "/" and means nothing."""
    cdef fuse_create_in *asked = <fuse_create_in *>w.argument
    cdef create_request *made = <create_request *>begin(w, OP_TMPFILE, sizeof(create_request), True, asked.umask)
    if made == NULL:
        return -EIO
    _fill_create(asked, made)
    return 0


cdef int _release(worker *w, uint16_t op, uint64_t handle, uint64_t lock_owner, uint32_t flags) noexcept nogil:
    cdef release_request *made = <release_request *>begin(w, op, sizeof(release_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = handle
    made.lock_owner = lock_owner
    made.flags = flags
    made.reserved = 0
    return 0


cdef int _build_release(worker *w) noexcept nogil:
    cdef fuse_release_in *asked = <fuse_release_in *>w.argument
    return _release(w, OP_RELEASE, asked.fh, asked.lock_owner,
                    RELEASE_FLOCK if asked.release_flags & FUSE_RELEASE_FLOCK_UNLOCK else 0)


cdef int _build_releasedir(worker *w) noexcept nogil:
    return _release(w, OP_RELEASEDIR, (<fuse_release_in *>w.argument).fh, 0, 0)


cdef int _build_flush(worker *w) noexcept nogil:
    cdef fuse_flush_in *asked = <fuse_flush_in *>w.argument
    return _release(w, OP_FLUSH, asked.fh, asked.lock_owner, 0)


cdef int build_undo_release(worker *w) noexcept nogil:
    """Close the handle of a reply that the kernel did not take."""
    return _release(w, OP_RELEASEDIR if w.undo_directory else OP_RELEASE, w.undo_handle, 0, 0)


# ---- data ----------------------------------------------------------------------------------------------------------

cdef int _build_read(worker *w) noexcept nogil:
    cdef fuse_read_in *asked = <fuse_read_in *>w.argument
    cdef read_request *made = <read_request *>begin(w, OP_READ, sizeof(read_request), False, 0)
    if made == NULL or asked.size > MAX_PAYLOAD:
        return -EIO
    made.handle = asked.fh
    made.offset = asked.offset
    made.size = asked.size
    made.flags = READ_NONBLOCK if asked.flags & O_NONBLOCK else 0
    expect_data(w, asked.size)
    return 0


cdef int _add_data(worker *w, const uint8_t *data, size_t size) noexcept nogil:
    """Send a WRITE's data, from where it is. 0 or -errno."""
    if w.placed_sent or size != NEAR_DATA_BYTES + w.placed_bytes:
        bring_home(w)
    if w.data_lost:
        return -EIO
    _add_payload(w, data, size)
    if w.placed != NULL:
        w.payload_bytes = NEAR_DATA_BYTES
        w.payload_placed = w.placed_bytes
    return 0


cdef int _build_write(worker *w) noexcept nogil:
    cdef fuse_write_in *asked = <fuse_write_in *>w.argument
    cdef write_request *made
    if asked.size > w.argument_bytes - sizeof(fuse_write_in) or asked.size > MAX_PAYLOAD:
        return -EINVAL
    made = <write_request *>begin(w, OP_WRITE, sizeof(write_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.offset = asked.offset
    made.size = asked.size
    # The flags of this write, not of the open: fcntl(2) may have changed O_APPEND, and pages of a mapping never append.
    made.flags = WRITE_APPEND if asked.flags & O_APPEND and not asked.write_flags & FUSE_WRITE_CACHE else WRITE_AT_OFFSET
    if asked.write_flags & FUSE_WRITE_KILL_SUIDGID:
        made.flags |= KILL_PRIVILEGES
    if asked.flags & O_NONBLOCK:
        made.flags |= WRITE_NONBLOCK
    return _add_data(w, w.argument + sizeof(fuse_write_in), asked.size)


cdef int _read_directory(worker *w, uint32_t plus) noexcept nogil:
    cdef fuse_read_in *asked = <fuse_read_in *>w.argument
    cdef readdir_request *made = <readdir_request *>begin(w, OP_READDIR, sizeof(readdir_request), plus != 0, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.offset = asked.offset
    made.size = min(asked.size, <uint32_t>MAX_PAYLOAD)
    made.plus = plus
    return 0


cdef int _build_readdir(worker *w) noexcept nogil:
    return _read_directory(w, 0)


cdef int _build_readdirplus(worker *w) noexcept nogil:
    return _read_directory(w, 1)


cdef int _sync(worker *w, uint16_t op) noexcept nogil:
    cdef fuse_fsync_in *asked = <fuse_fsync_in *>w.argument
    cdef fsync_request *made = <fsync_request *>begin(w, op, sizeof(fsync_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.datasync = asked.fsync_flags & FUSE_FSYNC_FDATASYNC
    made.reserved = 0
    return 0


cdef int _build_fsync(worker *w) noexcept nogil:
    return _sync(w, OP_FSYNC)


cdef int _build_fsyncdir(worker *w) noexcept nogil:
    return _sync(w, OP_FSYNCDIR)


cdef int _build_fallocate(worker *w) noexcept nogil:
    cdef fuse_fallocate_in *asked = <fuse_fallocate_in *>w.argument
    cdef fallocate_request *made = <fallocate_request *>begin(w, OP_FALLOCATE, sizeof(fallocate_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.offset = asked.offset
    made.length = asked.length
    made.mode = asked.mode
    made.reserved = 0
    return 0


cdef int _build_lseek(worker *w) noexcept nogil:
    cdef fuse_lseek_in *asked = <fuse_lseek_in *>w.argument
    cdef lseek_request *made = <lseek_request *>begin(w, OP_LSEEK, sizeof(lseek_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.offset = asked.offset
    made.whence = asked.whence
    made.reserved = 0
    return 0


cdef int _build_copy_file_range(worker *w) noexcept nogil:
    cdef fuse_copy_file_range_in *asked = <fuse_copy_file_range_in *>w.argument
    cdef copy_request *made = <copy_request *>begin(w, OP_COPY_FILE_RANGE, sizeof(copy_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle_in = asked.fh_in
    made.offset_in = asked.off_in
    made.handle_out = asked.fh_out
    made.offset_out = asked.off_out
    made.length = asked.len
    made.flags = <uint32_t>asked.flags
    made.reserved = 0
    return 0


cdef int _build_ioctl(worker *w) noexcept nogil:
    """Restricted ioctls only: the kernel copies in_size bytes in and out_size out, as the command's number says."""
    cdef fuse_ioctl_in *asked = <fuse_ioctl_in *>w.argument
    cdef ioctl_request *made
    if asked.flags & (FUSE_IOCTL_COMPAT | FUSE_IOCTL_COMPAT_X32 | FUSE_IOCTL_UNRESTRICTED):
        return -ENOTTY
    if asked.in_size > w.argument_bytes - sizeof(fuse_ioctl_in) or asked.out_size > MAX_PAYLOAD:
        return -EINVAL
    made = <ioctl_request *>begin(w, OP_IOCTL, sizeof(ioctl_request) + asked.in_size, True, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.command = asked.cmd
    made.in_size = asked.in_size
    made.out_size = asked.out_size
    made.argument = <uint32_t>asked.arg
    memcpy(made + 1, w.argument + sizeof(fuse_ioctl_in), asked.in_size)
    return 0


cdef int _build_poll(worker *w) noexcept nogil:
    cdef fuse_poll_in *asked = <fuse_poll_in *>w.argument
    cdef poll_request *made = <poll_request *>begin(w, OP_POLL, sizeof(poll_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.notify = asked.kh
    made.events = asked.events
    made.flags = POLL_NOTIFY if asked.flags & FUSE_POLL_SCHEDULE_NOTIFY else 0
    return 0


# ---- locks ---------------------------------------------------------------------------------------------------------

cdef int _lock(worker *w, uint16_t op) noexcept nogil:
    cdef fuse_lk_in *asked = <fuse_lk_in *>w.argument
    cdef lock_request *made = <lock_request *>begin(w, op, sizeof(lock_request), False, 0)
    if made == NULL:
        return -EIO
    made.handle = asked.fh
    made.owner = asked.owner
    made.start = asked.start
    made.end = asked.end
    made.type = asked.type
    made.pid = asked.pid
    made.flags = LOCK_FLOCK if asked.lk_flags & FUSE_LK_FLOCK else 0
    made.reserved = 0
    return 0


cdef int _build_getlk(worker *w) noexcept nogil:
    return _lock(w, OP_GETLK)


cdef int build_try_lock(worker *w) noexcept nogil:
    """SETLK, and the first attempt of SETLKW."""
    return _lock(w, OP_SETLK)


# ---- handles that were closed --------------------------------------------------------------------------------------

cdef int build_releases(worker *w) noexcept nogil:
    """A RELEASE of the handles that the worker has taken, the same ones on a fresh channel."""
    cdef release_request *made
    cdef size_t i
    made = <release_request *>begin(w, OP_RELEASE, w.released_count * sizeof(release_request), False, 0)
    if made == NULL:
        return -EIO
    memset(made, 0, w.released_count * sizeof(release_request))
    for i in range(w.released_count):
        made[i].handle = w.released[i]
    return 0


# ---- forgets -------------------------------------------------------------------------------------------------------

cdef void _take_forgets(worker *w) noexcept nogil:
    """Take up to FORGETS_AT_ONCE of the mount's forgets."""
    cdef mount_state *m = w.mount
    pthread_mutex_lock(&m.guard)
    w.forgotten_count = min(m.forget_count, <size_t>FORGETS_AT_ONCE)
    m.forget_count -= w.forgotten_count
    memcpy(w.forgotten, m.forgets + m.forget_count, w.forgotten_count * sizeof(forget_item))
    pthread_mutex_unlock(&m.guard)


cdef int build_forgets(worker *w) noexcept nogil:
    """A message of forgets, the same ones on a fresh channel. 0; -EINVAL: there are none; -EIO: it does not fit.

    Also if the server has accepted their number: it may have found the message malformed, and done nothing.
    """
    cdef uint8_t *body
    if w.forgotten_count == 0:
        _take_forgets(w)
    if w.forgotten_count == 0:
        return -EINVAL
    body = begin(w, OP_FORGET, w.forgotten_count * sizeof(forget_item), False, 0)
    if body == NULL:
        return -EIO
    memcpy(body, w.forgotten, w.forgotten_count * sizeof(forget_item))
    return 0


# ---- table ---------------------------------------------------------------------------------------------------------

cdef builder _builders[FUSE_OPCODES]


cdef builder request_builder(uint32_t opcode) noexcept nogil:
    """The function that translates an opcode; NULL if we do not know it, or answer it ourselves."""
    return _builders[opcode] if opcode < FUSE_OPCODES else NULL


_builders[FUSE_LOOKUP] = _build_lookup
_builders[FUSE_GETATTR] = _build_getattr
_builders[FUSE_SETATTR] = _build_setattr
_builders[FUSE_READLINK] = _build_readlink
_builders[FUSE_SYMLINK] = _build_symlink
_builders[FUSE_MKNOD] = _build_mknod
_builders[FUSE_MKDIR] = _build_mkdir
_builders[FUSE_UNLINK] = _build_unlink
_builders[FUSE_RMDIR] = _build_rmdir
_builders[FUSE_RENAME] = _build_rename
_builders[FUSE_LINK] = _build_link
_builders[FUSE_OPEN] = _build_open
_builders[FUSE_READ] = _build_read
_builders[FUSE_WRITE] = _build_write
_builders[FUSE_STATFS] = _build_statfs
_builders[FUSE_RELEASE] = _build_release
_builders[FUSE_FSYNC] = _build_fsync
_builders[FUSE_SETXATTR] = _build_setxattr
_builders[FUSE_GETXATTR] = _build_getxattr
_builders[FUSE_LISTXATTR] = _build_listxattr
_builders[FUSE_REMOVEXATTR] = _build_removexattr
_builders[FUSE_FLUSH] = _build_flush
_builders[FUSE_OPENDIR] = _build_opendir
_builders[FUSE_READDIR] = _build_readdir
_builders[FUSE_RELEASEDIR] = _build_releasedir
_builders[FUSE_FSYNCDIR] = _build_fsyncdir
_builders[FUSE_GETLK] = _build_getlk
_builders[FUSE_SETLK] = build_try_lock
_builders[FUSE_SETLKW] = build_try_lock
_builders[FUSE_ACCESS] = _build_access
_builders[FUSE_CREATE] = _build_create
_builders[FUSE_IOCTL] = _build_ioctl
_builders[FUSE_POLL] = _build_poll
_builders[FUSE_FALLOCATE] = _build_fallocate
_builders[FUSE_READDIRPLUS] = _build_readdirplus
_builders[FUSE_RENAME2] = _build_rename2
_builders[FUSE_LSEEK] = _build_lseek
_builders[FUSE_COPY_FILE_RANGE] = _build_copy_file_range
_builders[FUSE_SYNCFS] = _build_syncfs
_builders[FUSE_TMPFILE] = _build_tmpfile
_builders[FUSE_STATX] = _build_statx
_builders[FUSE_COPY_FILE_RANGE_64] = _build_copy_file_range
