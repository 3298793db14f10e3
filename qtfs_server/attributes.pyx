"""statx(2) of the server's files as the client's kernel wants it, and the mounts they lie on.

Source: statx(2), <linux/fuse.h> (struct fuse_attr), <linux/magic.h>.
"""
from libc.errno cimport ENFILE, ENOMEM, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from qtfs_common.protocol cimport NODE_SUBMOUNT, NODE_UNCACHED, attributes, attributes_reply
from qtfs_server.includes.linux cimport AT_EMPTY_PATH, AT_NO_AUTOMOUNT, AT_STATX_DONT_SYNC, AT_SYMLINK_NOFOLLOW, \
    STATX_BASIC_STATS, STATX_BTIME, STATX_MNT_ID, STATX_MNT_ID_UNIQUE, fstatfs, makedev, pthread_mutex_lock, pthread_mutex_unlock, \
    statfs_t, statx, statx_t
from qtfs_server.policy cimport is_procfs, shield_of
from qtfs_server.session cimport MAX_DEVICES, device, node, session
from qtfs_server.state_file cimport DEVICES, grow

cdef enum:
    STATX_WANTED = STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID | STATX_MNT_ID_UNIQUE


# ---- mounts ------------------------------------------------------------------------------------------------------

cdef int64_t[21] _pseudo_file_systems      # f_type, <linux/magic.h>
_pseudo_file_systems[:] = [
    0x9fa0,         # PROC_SUPER_MAGIC
    0x62656572,     # SYSFS_MAGIC
    0x27e0eb,       # CGROUP_SUPER_MAGIC
    0x63677270,     # CGROUP2_SUPER_MAGIC
    0x64626720,     # DEBUGFS_MAGIC
    0x74726163,     # TRACEFS_MAGIC
    0x73636673,     # SECURITYFS_MAGIC
    0x6165676c,     # PSTOREFS_MAGIC
    0x62656570,     # CONFIGFS_MAGIC
    0xde5e81e4,     # EFIVARFS_MAGIC
    0xcafe4a11,     # BPF_FS_MAGIC
    0xf97cff8c,     # SELINUX_MAGIC
    0x43415d53,     # SMACK_MAGIC
    0x1cd1,         # DEVPTS_SUPER_MAGIC
    0x19800202,     # MQUEUE_MAGIC
    0x6e736673,     # NSFS_MAGIC
    0x42494e4d,     # BINFMTFS_MAGIC
    0x65735543,     # FUSE_CTL_SUPER_MAGIC
    0x67596969,     # RPCAUTH_GSSMAGIC, rpc_pipefs
    0x7655821,      # RDTGROUP_SUPER_MAGIC
    0x6b414653,     # AFS_FS_MAGIC
]


cdef bint _is_pseudo(int64_t f_type) noexcept nogil:
    """Whether the kernel makes the content up as it is read."""
    cdef int i
    for i in range(21):
        if _pseudo_file_systems[i] == f_type:
            return True
    return False


cdef uint64_t mount_id_of(const statx_t *st) noexcept nogil:
    """The id of the mount that `st` lies on; 0 where the kernel does not say."""
    return st.stx_mnt_id if st.stx_mask & (STATX_MNT_ID | STATX_MNT_ID_UNIQUE) else 0


cdef bint find_device_locked(session *s, const statx_t *st, uint32_t *out) noexcept nogil:
    """Find the mount that `st` lies on among those met before."""
    cdef uint64_t number = makedev(st.stx_dev_major, st.stx_dev_minor)
    cdef uint64_t mount_id = mount_id_of(st)
    cdef uint32_t i
    for i in range(s.device_count):
        if s.devices[i].mount_id == mount_id and s.devices[i].number == number and not s.devices[i].gone:
            out[0] = i
            return True
    return False


cdef uint32_t _free_device_locked(session *s) noexcept nogil:
    """The index for another mount: of one that is gone and forgotten, if there is any."""
    cdef uint32_t i
    for i in range(s.device_count):
        if s.devices[i].gone and s.devices[i].nodes == 0 and s.devices[i].mount_fd < 0:
            return i
    return s.device_count


cdef void _supersede_locked(session *s, uint64_t mount_id, uint32_t listed_id) noexcept nogil:
    """Whatever else had a mount's number in the mount table is gone."""
    cdef uint32_t i
    for i in range(s.device_count):
        if s.devices[i].listed_id == listed_id and s.devices[i].mount_id != mount_id:
            s.devices[i].gone = True


cdef int _device_room_locked(session *s, uint32_t index) noexcept nogil:
    """See that there is an entry of an index that _free_device_locked gave. 0 or -errno."""
    if index < s.device_count:
        return 0
    if index >= MAX_DEVICES:
        return -ENFILE
    if grow(s.state_fd, s.state, DEVICES, index) < 0:
        return -ENOMEM
    s.device_count = index + 1
    return 0


cdef int _add_device_locked(session *s, const statx_t *st, uint32_t listed_id, int64_t f_type, uint16_t shield,
                            uint32_t *out) noexcept nogil:
    cdef device *added
    cdef int error
    if find_device_locked(s, st, out):
        return 0
    _supersede_locked(s, mount_id_of(st), listed_id)
    out[0] = _free_device_locked(s)
    error = _device_room_locked(s, out[0])
    if error < 0:
        return error
    added = &s.devices[out[0]]
    memset(added, 0, sizeof(device))
    added.mount_id = mount_id_of(st)
    added.number = makedev(st.stx_dev_major, st.stx_dev_minor)
    added.listed_id = listed_id
    added.mount_fd = -1
    added.f_type = f_type
    added.uncached = _is_pseudo(f_type)
    added.shield = shield
    return 0


cdef int device_index(session *s, int fd, const statx_t *st, uint32_t *out) noexcept nogil:
    """Find or add the mount that `fd`, whose stat is `st`, lies on. 0 or -ENOMEM."""
    cdef statfs_t fs
    cdef uint16_t shield
    cdef statx_t listed
    cdef bint known
    cdef int error
    pthread_mutex_lock(&s.guard)
    known = find_device_locked(s, st, out)
    pthread_mutex_unlock(&s.guard)
    if known:
        return 0
    memset(&fs, 0, sizeof(fs))
    fstatfs(fd, &fs)
    listed.stx_mnt_id = 0
    statx(fd, b"", AT_EMPTY_PATH | AT_NO_AUTOMOUNT, STATX_MNT_ID, &listed)
    shield = shield_of(fs.f_type, fd)
    pthread_mutex_lock(&s.guard)
    error = _add_device_locked(s, st, <uint32_t>listed.stx_mnt_id, fs.f_type, shield, out)
    pthread_mutex_unlock(&s.guard)
    return error


# ---- attributes --------------------------------------------------------------------------------------------------

cdef int stat_fd(int fd, statx_t *st) noexcept nogil:
    """statx(2) of a descriptor, O_PATH too. 0 or -errno."""
    return -errno if statx(fd, b"", AT_EMPTY_PATH | AT_NO_AUTOMOUNT, STATX_WANTED, st) < 0 else 0


cdef int stat_known(int fd, statx_t *st) noexcept nogil:
    """The same as far as our kernel knows, which asks no server: a descriptor's mount, inode number and type are right."""
    return -errno if statx(fd, b"", AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC, STATX_WANTED, st) < 0 else 0


cdef int stat_name(int directory, const char *name, statx_t *st) noexcept nogil:
    """statx(2) of a name, which is not followed. 0 or -errno."""
    return -errno if statx(directory, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_WANTED, st) < 0 else 0


cdef uint64_t signature(const statx_t *st) noexcept nogil:
    """Changes whenever the content may have: ctime and size."""
    cdef uint64_t time = <uint64_t>st.stx_ctime.tv_sec * 1000000000 + st.stx_ctime.tv_nsec
    return time ^ (st.stx_size * <uint64_t>0x9E3779B97F4A7C15)


cdef void fill_attributes(uint32_t on_device, const statx_t *st, attributes *out) noexcept nogil:
    """struct fuse_attr of a statx. Inode numbers of mounts below the root get the mount's index in their top bits."""
    out.ino = st.stx_ino ^ (<uint64_t>on_device << 48)
    out.size = st.stx_size
    out.blocks = st.stx_blocks
    out.atime = st.stx_atime.tv_sec
    out.mtime = st.stx_mtime.tv_sec
    out.ctime = st.stx_ctime.tv_sec
    out.atime_ns = st.stx_atime.tv_nsec
    out.mtime_ns = st.stx_mtime.tv_nsec
    out.ctime_ns = st.stx_ctime.tv_nsec
    out.mode = st.stx_mode
    out.nlink = st.stx_nlink
    out.uid = st.stx_uid
    out.gid = st.stx_gid
    out.rdev = (st.stx_rdev_minor & 0xff) | st.stx_rdev_major << 8 | (st.stx_rdev_minor & ~<uint32_t>0xff) << 12
    out.blksize = st.stx_blksize
    out.flags = 0


cdef uint64_t node_flags_locked(session *s, uint32_t on_device) noexcept nogil:
    """NODE_* bits of what lies on a mount."""
    return (NODE_UNCACHED if s.devices[on_device].uncached else 0) | (NODE_SUBMOUNT if on_device != 0 else 0)


cdef bint lies_on_pseudo(session *s, const node *n) noexcept nogil:
    """Whether a node belongs to a pseudo file system."""
    cdef bint uncached
    pthread_mutex_lock(&s.guard)
    uncached = s.devices[n.device].uncached
    pthread_mutex_unlock(&s.guard)
    return uncached


cdef bint lies_on_proc(session *s, const node *n) noexcept nogil:
    """Whether a node belongs to a procfs."""
    cdef bint proc
    pthread_mutex_lock(&s.guard)
    proc = is_procfs(s.devices[n.device].f_type)
    pthread_mutex_unlock(&s.guard)
    return proc


cdef bint lies_on_cgroup(session *s, const node *n) noexcept nogil:
    """Whether a node belongs to a cgroup file system of either version."""
    cdef int64_t f_type
    pthread_mutex_lock(&s.guard)
    f_type = s.devices[n.device].f_type
    pthread_mutex_unlock(&s.guard)
    return f_type == 0x27e0eb or f_type == 0x63677270       # CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC


cdef int node_stat(session *s, node *n, int fd, attributes_reply *out) noexcept nogil:
    """Attributes of a pinned node, by its own descriptor or by one opened from it. 0 or -errno."""
    cdef statx_t st
    cdef int error = stat_fd(fd, &st)
    if error < 0:
        return error
    fill_attributes(n.device, &st, &out.attr)
    n.seen = signature(&st)
    out.reserved = 0
    pthread_mutex_lock(&s.guard)
    out.node_flags = node_flags_locked(s, n.device)
    pthread_mutex_unlock(&s.guard)
    return 0
