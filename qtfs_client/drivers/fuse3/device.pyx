"""/dev/fuse: replies, notifications, and the INIT that begins every mount.

Sources: include/uapi/linux/fuse.h, Documentation/filesystems/fuse, fs/fuse/inode.c (process_init_reply).
"""
from libc.errno cimport EAGAIN, EINTR, EIO, ENOENT, EPROTO, EPROTONOSUPPORT, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from qtfs_client.drivers.fuse3.state cimport CACHE_ALWAYS, CACHE_NONE, mount_state, worker
from qtfs_client.includes.fuse_abi cimport FUSE_ASYNC_DIO, FUSE_ASYNC_READ, FUSE_ATOMIC_O_TRUNC, FUSE_AUTO_INVAL_DATA, \
    FUSE_BIG_WRITES, FUSE_CACHE_SYMLINKS, FUSE_DIRECT_IO_ALLOW_MMAP, FUSE_DO_READDIRPLUS, FUSE_DONT_MASK, \
    FUSE_FLOCK_LOCKS, FUSE_HANDLE_KILLPRIV_V2, FUSE_HAS_IOCTL_DIR, FUSE_INIT, FUSE_INIT_EXT, FUSE_MAJOR, FUSE_MAX_PAGES, \
    FUSE_MINOR, FUSE_EXPIRE_ONLY, FUSE_NOTIFY_INVAL_ENTRY, FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_STORE, \
    FUSE_OLDEST_MINOR, FUSE_PARALLEL_DIROPS, FUSE_POSIX_ACL, FUSE_POSIX_LOCKS, FUSE_READDIRPLUS_AUTO, \
    FUSE_SETXATTR_EXT, fuse_in_header, fuse_init_in, fuse_init_out, fuse_notify_inval_entry_out, \
    fuse_notify_inval_inode_out, fuse_notify_store_out, fuse_out_header
from qtfs_client.includes.linux cimport FUSE_DEV_IOC_CLONE, O_CLOEXEC, O_NONBLOCK, O_RDWR, add_u64, close, ioctl, iovec, open, \
    read, writev

cdef extern from "<unistd.h>" nogil:
    enum:
        _SC_PAGESIZE
    long sysconf(int)

cdef enum:
    OLD_INIT_BYTES = 16             # fuse_init_in of kernels without FUSE_INIT_EXT
    MAX_BACKGROUND = 64             # readahead and asynchronous requests the kernel has under way
    CONGESTION = 48
    PAGE_BYTES = 4096
    INIT_ROOM = 16384               # the kernel demands 8 KiB, FUSE_MIN_READ_BUFFER


# ---- replies -------------------------------------------------------------------------------------------------------

cdef int write_reply(int device, uint64_t unique, int error, const void *first, size_t first_bytes,
                     const void *second, size_t second_bytes) noexcept nogil:
    """Answer a request, straight out of the caller's memory. 0; -ENOENT: it was aborted; other -errno.

    -EFAULT: the memory, which is shared with the engine, was taken away. Then the kernel has ended the request with EIO
    (fuse_dev_do_write in fs/fuse/dev.c).
    """
    cdef fuse_out_header head
    cdef iovec parts[3]
    cdef int count = 1
    head.len = <uint32_t>(sizeof(head) + first_bytes + second_bytes)
    head.error = error
    head.unique = unique
    parts[0].iov_base = &head
    parts[0].iov_len = sizeof(head)
    if first_bytes > 0:
        parts[count].iov_base = <void *>first
        parts[count].iov_len = first_bytes
        count += 1
    if second_bytes > 0:
        parts[count].iov_base = <void *>second
        parts[count].iov_len = second_bytes
        count += 1
    return 0 if writev(device, parts, count) >= 0 else -errno


cdef int reply(worker *w, const void *body, size_t body_bytes) noexcept nogil:
    """Answer the request in hand with success. 0 or -errno of the device."""
    return write_reply(w.device, w.request.unique, 0, body, body_bytes, NULL, 0)


cdef int reply_error(worker *w, int error) noexcept nogil:
    """Answer the request in hand with an errno (positive). 0 or -errno of the device."""
    return write_reply(w.device, w.request.unique, -error, NULL, 0, NULL, 0)


cdef void forget_cached_attributes(mount_state *m, uint64_t node) noexcept nogil:
    """Make the kernel ask again for the attributes of a node; its pages stay."""
    cdef fuse_notify_inval_inode_out what
    what.ino = node
    what.off = -1
    what.len = 0
    add_u64(&m.invalidations, 1)
    write_reply(m.device, 0, FUSE_NOTIFY_INVAL_INODE, &what, sizeof(what), NULL, 0)


cdef void expire_name(mount_state *m, int device, uint64_t directory, const char *name, size_t name_bytes) noexcept nogil:
    """Make the kernel look a NUL-terminated name up again before it trusts it; what stands there stays usable.

    Kernels before 6.2 do not know the flag and drop the name. It waits for operations on the directory to end.
    """
    cdef fuse_notify_inval_entry_out what
    what.parent = directory
    what.namelen = <uint32_t>name_bytes
    what.flags = FUSE_EXPIRE_ONLY
    add_u64(&m.invalidations, 1)
    write_reply(device, 0, FUSE_NOTIFY_INVAL_ENTRY, &what, sizeof(what), name, name_bytes + 1)


cdef void show_size(mount_state *m, uint64_t node, uint64_t size) noexcept nogil:
    """Make the kernel believe that a node, which nobody caches, has at least that size.

    It answers FIONREAD of what looks like a regular file from its own idea of the size. The byte that goes with this is
    put into a page that direct I/O never looks at.
    """
    cdef fuse_notify_store_out what
    cdef uint8_t nothing = 0
    memset(&what, 0, sizeof(what))
    what.nodeid = node
    what.offset = size - 1
    what.size = 1
    write_reply(m.device, 0, FUSE_NOTIFY_STORE, &what, sizeof(what), &nothing, 1)


# ---- INIT ----------------------------------------------------------------------------------------------------------

cdef uint32_t _wanted_flags(mount_state *m) noexcept nogil:
    """What we can do in this mount's cache mode."""
    cdef uint32_t flags = (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ATOMIC_O_TRUNC | FUSE_POSIX_LOCKS |
                           FUSE_FLOCK_LOCKS | FUSE_DONT_MASK | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_ASYNC_DIO |
                           FUSE_HANDLE_KILLPRIV_V2 | FUSE_SETXATTR_EXT | FUSE_HAS_IOCTL_DIR | FUSE_INIT_EXT)
    if m.cache == CACHE_ALWAYS and m.rules == NULL:
        flags |= FUSE_CACHE_SYMLINKS        # special rules have links that lead each caller elsewhere
    if m.cache != CACHE_ALWAYS:
        flags |= FUSE_AUTO_INVAL_DATA
    if m.cache != CACHE_NONE:
        # Entries that expire at once are not worth looking up; and POSIX_ACL implies default_permissions.
        flags |= FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_POSIX_ACL
    return flags


cdef void _agree(mount_state *m, const fuse_init_in *asked, fuse_init_out *out) noexcept nogil:
    """Fill in what both sides can do, and note what the drivers' other parts depend on."""
    cdef uint32_t offered2 = asked.flags2 if asked.flags & FUSE_INIT_EXT else 0
    memset(out, 0, sizeof(fuse_init_out))
    out.major = FUSE_MAJOR
    out.minor = min(asked.minor, <uint32_t>FUSE_MINOR)
    out.max_readahead = asked.max_readahead
    out.flags = asked.flags & _wanted_flags(m)
    out.flags2 = offered2 & FUSE_DIRECT_IO_ALLOW_MMAP
    out.max_background = MAX_BACKGROUND
    out.congestion_threshold = CONGESTION
    out.max_write = m.max_payload if out.flags & FUSE_MAX_PAGES else 32 * PAGE_BYTES
    out.time_gran = 1
    out.max_pages = <uint16_t>(m.max_payload // sysconf(_SC_PAGESIZE))
    m.direct_mmap = out.flags2 & FUSE_DIRECT_IO_ALLOW_MMAP
    m.setxattr_ext = out.flags & FUSE_SETXATTR_EXT


cdef ssize_t _read_init(int device, fuse_in_header *head, fuse_init_in *asked) noexcept nogil:
    """Read the first request. Its size, or -errno; -EPROTO: it is no INIT."""
    cdef uint8_t buffer[INIT_ROOM]
    cdef ssize_t got = read(device, buffer, sizeof(buffer))
    while got < 0:
        if errno not in (EINTR, EAGAIN, ENOENT):
            return -errno
        got = read(device, buffer, sizeof(buffer))
    memset(asked, 0, sizeof(fuse_init_in))
    if <size_t>got < sizeof(fuse_in_header) + OLD_INIT_BYTES:
        return -EPROTO
    memcpy(head, buffer, sizeof(fuse_in_header))
    memcpy(asked, buffer + sizeof(fuse_in_header), min(got - sizeof(fuse_in_header), sizeof(fuse_init_in)))
    return got if head.opcode == FUSE_INIT else -EPROTO


cdef int negotiate(mount_state *m) noexcept nogil:
    """Answer the kernel's INIT. 0; -EPROTONOSUPPORT: the kernel is too old; other -errno of the device."""
    cdef fuse_in_header head
    cdef fuse_init_in asked
    cdef fuse_init_out out
    cdef ssize_t got
    while True:
        got = _read_init(m.device, &head, &asked)
        if got < 0:
            return <int>got
        if asked.major <= FUSE_MAJOR:
            break
        # A newer major number: say ours, and the kernel sends another INIT in our terms.
        memset(&out, 0, sizeof(out))
        out.major = FUSE_MAJOR
        out.minor = FUSE_MINOR
        write_reply(m.device, head.unique, 0, &out, sizeof(out), NULL, 0)
    if asked.major < FUSE_MAJOR or asked.minor < FUSE_OLDEST_MINOR:
        write_reply(m.device, head.unique, -EPROTO, NULL, 0, NULL, 0)
        return -EPROTONOSUPPORT
    _agree(m, &asked, &out)
    return write_reply(m.device, head.unique, 0, &out, sizeof(out), NULL, 0)


cdef int clone_device(int device) noexcept nogil:
    """A second, non-blocking descriptor for the same mount: FUSE_DEV_IOC_CLONE. -1 if that cannot be had."""
    cdef uint32_t source = <uint32_t>device
    cdef int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK)
    if fd < 0:
        return -1
    if ioctl(fd, FUSE_DEV_IOC_CLONE, &source) < 0:
        close(fd)
        return -1
    return fd
