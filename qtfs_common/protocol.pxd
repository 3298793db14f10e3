"""The wire format, as C structures: doc/protocol.md is the specification, test/level0_codec holds both together.

Everything is little-endian and packed. Replies carry the records of <linux/fuse.h> (attributes, entries, directory
entries) in the kernel's own layout, so that a client may hand them on without touching them.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "qtfs overlays its little-endian wire structures on memory: this machine is big-endian"
    #endif
    /* No enumerator: those are int, and Python would see -1. */
    #define QTFS_EVENT_SLOT UINT32_C(0xffffffff)
    """
    const uint32_t EVENT_SLOT "QTFS_EVENT_SLOT"     # in ATTACH: the connection becomes the session's event channel

cdef enum:
    PROTOCOL_VERSION = 1
    HELLO_MAGIC = 0x53465451        # "QTFS"
    MAX_PAYLOAD = 1 << 20           # file data in one message, bytes
    MAX_MESSAGE = (1 << 20) + 8192  # whole message, bytes
    MAX_NAME = 255                  # one path component, bytes (NAME_MAX)
    MAX_PATH = 4096                 # symbolic link targets and mount sources, bytes (PATH_MAX)
    MAX_XATTR = 65536               # XATTR_SIZE_MAX, XATTR_LIST_MAX
    MAX_GROUPS = 1024               # supplementary groups that a request can carry
    MAX_RELEASES = 64               # handles that a RELEASE can end
    MAX_SLOTS = 64                  # slot channels of one session
    NONCE_BYTES = 32
    SECRET_BYTES = 32
    PROOF_BYTES = 32
    ROOT_NODE = 1                   # FUSE_ROOT_ID

cdef extern from *:
    """
    /* What is or-ed into the id of a FIFO's or device's node: the same file, as something to read and write. Two of them,
       since a kernel wants different sizes (doc/protocol.md). */
    #define QTFS_NODE_STREAM_READER (UINT64_C(1) << 63)
    #define QTFS_NODE_STREAM_WRITER (UINT64_C(5) << 61)
    #define QTFS_NODE_ALIAS (UINT64_C(5) << 61)
    """
    const uint64_t NODE_STREAM_READER "QTFS_NODE_STREAM_READER"
    const uint64_t NODE_STREAM_WRITER "QTFS_NODE_STREAM_WRITER"
    const uint64_t NODE_ALIAS "QTFS_NODE_ALIAS"

cdef enum:                          # header.flags
    MESSAGE_REPLY = 1

cdef enum:                          # header.error beyond what errno(3) knows
    ERROR_DELAYED = 528             # EJUKEBOX of Linux: not executed, its file system is stuck; ask again later

cdef enum operation:                # numbers are never reused
    OP_HELLO = 1
    OP_AUTHENTICATE = 2
    OP_MOUNT = 3
    OP_ATTACH = 4
    OP_DETACH = 5
    OP_PING = 6
    OP_CANCEL = 7
    OP_READY = 8
    OP_MOUNTS_CHANGED = 9
    OP_LOOKUP = 16
    OP_FORGET = 17
    OP_GETATTR = 18
    OP_SETATTR = 19
    OP_READLINK = 20
    OP_SYMLINK = 21
    OP_MKNOD = 22
    OP_MKDIR = 23
    OP_UNLINK = 24
    OP_RMDIR = 25
    OP_RENAME = 26
    OP_LINK = 27
    OP_OPEN = 28
    OP_READ = 29
    OP_WRITE = 30
    OP_STATFS = 31
    OP_RELEASE = 32
    OP_FSYNC = 33
    OP_SETXATTR = 34
    OP_GETXATTR = 35
    OP_LISTXATTR = 36
    OP_REMOVEXATTR = 37
    OP_FLUSH = 38
    OP_OPENDIR = 39
    OP_READDIR = 40
    OP_RELEASEDIR = 41
    OP_FSYNCDIR = 42
    OP_GETLK = 43
    OP_SETLK = 44
    OP_SETLKW = 45
    OP_ACCESS = 46
    OP_CREATE = 47
    OP_TMPFILE = 48
    OP_IOCTL = 49
    OP_FALLOCATE = 50
    OP_LSEEK = 51
    OP_COPY_FILE_RANGE = 52
    OP_STATX = 53
    OP_SYNCFS = 54
    OP_POLL = 55
    OP_SYSMOUNT = 56
    OP_SYSUMOUNT = 57
    OP_KILL = 58
    OP_SETAFFINITY = 59
    OP_GETAFFINITY = 60
    OP_PROCESSES = 61
    OP_LIST_MOUNTS = 62
    OP_COUNT = 64                   # table size, not an operation

cdef packed struct header:          # 32 bytes, before every message
    uint32_t length                 # of the whole message, this header included
    uint16_t op
    uint16_t flags
    int32_t error                   # replies: 0 or an errno of asm-generic/errno.h; requests: 0
    uint32_t slot
    uint64_t sequence               # counts the requests of one slot from 1; a repeated one is answered, not executed.
                                    # On the event channel: replies count, requests acknowledge
    uint64_t tag                    # chosen by the sender of a request, copied into its reply

# ---- sessions (no `caller` follows the header) ------------------------------------------------------------------

cdef packed struct hello:           # request; the reply is `welcome`
    uint32_t magic
    uint16_t oldest_version
    uint16_t newest_version
    uint32_t features
    uint32_t reserved
    uint8_t nonce[32]

cdef packed struct welcome:
    uint16_t version
    uint16_t authentication         # 1: AUTHENTICATE must follow
    uint32_t features
    uint32_t max_payload
    uint32_t max_slots
    uint8_t nonce[32]

# AUTHENTICATE: request PROOF_BYTES of the client, reply PROOF_BYTES of the server (auth.py)

cdef packed struct mount_request:   # the path follows, without NUL
    uint32_t flags                  # MOUNT_READ_ONLY, MOUNT_WATCH, MOUNT_LET_GO
    uint32_t slots                  # slot channels wanted

cdef enum:
    MOUNT_READ_ONLY = 1
    MOUNT_WATCH = 2                 # send MOUNTS_CHANGED over the event channel
    MOUNT_LET_GO = 4                # the mount of the root may be unmounted too, and the session is then of no use

cdef packed struct mount_reply:
    uint64_t session
    uint8_t secret[32]
    uint32_t slots                  # granted
    uint32_t grace_s                # how long the session outlives its last channel

cdef packed struct attach_request:
    uint64_t session
    uint8_t secret[32]
    uint32_t slot                   # or EVENT_SLOT
    uint32_t reserved

cdef packed struct attach_reply:
    uint64_t last_sequence          # the highest of this slot that was executed

# ---- file operations: header, caller, groups, body ---------------------------------------------------------------

cdef packed struct caller:          # 24 bytes; ngroups uint32 follow, then zeros up to a multiple of 8
    uint64_t node
    uint32_t uid
    uint32_t gid
    uint32_t pid                    # the caller's thread id on the client, for messages only
    uint16_t umask
    uint16_t ngroups

cdef packed struct attributes:      # struct fuse_attr, 88 bytes
    uint64_t ino
    uint64_t size
    uint64_t blocks                 # of 512 bytes
    int64_t atime
    int64_t mtime
    int64_t ctime
    uint32_t atime_ns
    uint32_t mtime_ns
    uint32_t ctime_ns
    uint32_t mode
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint32_t rdev                   # minor & 0xff | major << 8 | (minor & ~0xff) << 12
    uint32_t blksize
    uint32_t flags

cdef enum:                          # entry.node_flags, attributes_reply.node_flags
    NODE_UNCACHED = 1               # pseudo file system: trust neither names nor attributes nor pages
    NODE_SUBMOUNT = 2               # another file system of the server begins here

cdef packed struct entry:           # 128 bytes, struct fuse_entry_out; the client writes its timeouts over node_flags
    uint64_t node                   # 0 never occurs: a name that is not there is ENOENT
    uint64_t generation
    uint64_t node_flags
    uint64_t reserved
    uint64_t reserved2
    attributes attr

cdef packed struct attributes_reply:    # 104 bytes, struct fuse_attr_out
    uint64_t node_flags
    uint64_t reserved
    attributes attr

cdef packed struct forget_item:     # FORGET: as many as fit
    uint64_t node
    uint64_t lookups

cdef packed struct getattr_request:
    uint64_t handle
    uint32_t flags                  # 1: handle is valid
    uint32_t reserved

cdef enum:                          # setattr_request.valid = FATTR_* of <linux/fuse.h>
    SET_MODE = 1 << 0
    SET_UID = 1 << 1
    SET_GID = 1 << 2
    SET_SIZE = 1 << 3
    SET_ATIME = 1 << 4
    SET_MTIME = 1 << 5
    SET_HANDLE = 1 << 6
    SET_ATIME_NOW = 1 << 7
    SET_MTIME_NOW = 1 << 8
    SET_LOCK_OWNER = 1 << 9
    SET_CTIME = 1 << 10
    SET_KILL_PRIVILEGES = 1 << 11   # clear suid, sgid as for a caller without CAP_FSETID

cdef packed struct setattr_request:
    uint32_t valid
    uint32_t reserved
    uint64_t handle
    uint64_t size
    int64_t atime
    int64_t mtime
    uint32_t atime_ns
    uint32_t mtime_ns
    uint32_t mode
    uint32_t uid
    uint32_t gid
    uint32_t reserved2

cdef packed struct mknod_request:   # the name follows
    uint32_t mode
    uint32_t rdev

cdef packed struct mkdir_request:   # the name follows
    uint32_t mode
    uint32_t reserved

cdef packed struct symlink_request: # the name and the target follow
    uint32_t name_bytes
    uint32_t target_bytes

cdef packed struct rename_request:  # both names follow; caller.node is the old directory
    uint64_t new_directory
    uint32_t flags                  # RENAME_* of renameat2(2)
    uint32_t name_bytes
    uint32_t new_name_bytes
    uint32_t reserved

cdef packed struct link_request:    # the new name follows; caller.node is the directory
    uint64_t target

cdef enum:                          # open_request.kill, write_request.flags, release_request.flags
    KILL_PRIVILEGES = 1             # OPEN, CREATE, WRITE: as SET_KILL_PRIVILEGES
    WRITE_APPEND = 2                # WRITE: at the end of the file, whatever the handle was opened with
    WRITE_AT_OFFSET = 4             # WRITE: at the offset, even if the handle was opened with O_APPEND
    WRITE_NONBLOCK = 8              # WRITE to a stream: EAGAIN if it would have to wait
    RELEASE_FLOCK = 1               # RELEASE: drop this handle's flock(2) lock

cdef packed struct open_request:    # OPEN, OPENDIR; flags = O_* of asm-generic/fcntl.h
    uint32_t flags
    uint32_t kill

cdef enum:                          # open_reply.flags
    OPENED_UNCACHED = 1             # pseudo file system or O_APPEND: every read and write must ask
    OPENED_CHANGED = 2              # not as this session last saw it: drop what is cached
    OPENED_STREAM = 4               # a FIFO or character device: no offsets, reads and writes may have to wait

cdef packed struct open_reply:      # 16 bytes, struct fuse_open_out
    uint64_t handle                 # bit 0: opened for writing; bit 1: POLL has something to say
    uint32_t flags
    uint32_t reserved

cdef packed struct create_request:  # CREATE, TMPFILE; the name follows (none for TMPFILE)
    uint32_t flags
    uint32_t mode
    uint32_t kill
    uint32_t reserved

cdef packed struct create_reply:
    entry made
    open_reply opened

cdef enum:                          # read_request.flags
    READ_NONBLOCK = 1               # from a stream: EAGAIN if it would have to wait

cdef packed struct read_request:    # the reply is the data; shorter than size only at the end of the file
    uint64_t handle
    uint64_t offset
    uint32_t size
    uint32_t flags

cdef packed struct write_request:   # the data follows
    uint64_t handle
    uint64_t offset
    uint32_t size
    uint32_t flags

cdef packed struct count_reply:     # WRITE, COPY_FILE_RANGE: bytes done; GETXATTR, LISTXATTR with size 0: bytes needed
    uint64_t count

cdef packed struct statfs_reply:    # struct fuse_kstatfs, 80 bytes
    uint64_t blocks
    uint64_t bfree
    uint64_t bavail
    uint64_t files
    uint64_t ffree
    uint32_t bsize
    uint32_t namelen
    uint32_t frsize
    uint32_t reserved
    uint32_t spare[6]

cdef packed struct release_request: # RELEASE, RELEASEDIR (up to MAX_RELEASES of them), FLUSH
    uint64_t handle
    uint64_t lock_owner             # FLUSH: whose POSIX locks on the node end
    uint32_t flags
    uint32_t reserved

cdef packed struct fsync_request:   # FSYNC, FSYNCDIR
    uint64_t handle
    uint32_t datasync
    uint32_t reserved

cdef packed struct xattr_request:   # all four; the name follows, for SETXATTR then the value
    uint32_t size                   # SETXATTR: of the value; GETXATTR, LISTXATTR: room for the reply, 0 asks for the size
    uint32_t flags                  # XATTR_CREATE, XATTR_REPLACE
    uint32_t name_bytes
    uint32_t kill                   # SETXATTR of an access ACL: clear sgid as chmod(2) would

cdef packed struct readdir_request: # the reply is struct fuse_dirent[] or, with plus, struct fuse_direntplus[]
    uint64_t handle
    uint64_t offset                 # 0, or the `off` of the entry before
    uint32_t size
    uint32_t plus

cdef packed struct direntry:        # struct fuse_dirent; the name follows, then zeros up to a multiple of 8
    uint64_t ino
    uint64_t off
    uint32_t name_bytes
    uint32_t type                   # DT_*

cdef packed struct direntry_plus:   # struct fuse_direntplus; made.node == 0: name only, no lookup counted
    entry made
    direntry name

cdef enum:
    LOCK_FLOCK = 1                  # lock_request.flags: flock(2), not fcntl(2)

cdef packed struct lock_request:    # GETLK, SETLK, SETLKW
    uint64_t handle
    uint64_t owner
    uint64_t start
    uint64_t end                    # inclusive; 2^63-1: to the end of the file
    uint32_t type                   # F_RDLCK 0, F_WRLCK 1, F_UNLCK 2
    uint32_t pid
    uint32_t flags
    uint32_t reserved

cdef packed struct lock_reply:      # GETLK, struct fuse_lk_out
    uint64_t start
    uint64_t end
    uint32_t type
    uint32_t pid                    # of the holder if it is the server's own process, 0 if another client's

cdef packed struct access_request:
    uint32_t mask
    uint32_t reserved

cdef packed struct ioctl_request:   # in_size bytes follow
    uint64_t handle
    uint32_t command
    uint32_t in_size
    uint32_t out_size
    uint32_t argument               # of commands that take a number, not a pointer

cdef packed struct ioctl_reply:     # out data follows
    int32_t result
    uint32_t reserved

cdef packed struct fallocate_request:
    uint64_t handle
    uint64_t offset
    uint64_t length
    uint32_t mode
    uint32_t reserved

cdef packed struct lseek_request:
    uint64_t handle
    uint64_t offset
    uint32_t whence                 # SEEK_DATA, SEEK_HOLE
    uint32_t reserved

cdef packed struct lseek_reply:
    uint64_t offset

cdef packed struct copy_request:
    uint64_t handle_in
    uint64_t offset_in
    uint64_t handle_out
    uint64_t offset_out
    uint64_t length
    uint32_t flags
    uint32_t reserved

cdef packed struct statx_request:
    uint64_t handle
    uint32_t flags                  # 1: handle is valid
    uint32_t reserved
    uint32_t statx_flags
    uint32_t statx_mask

cdef packed struct timestamp:       # struct fuse_sx_time
    int64_t seconds
    uint32_t nanoseconds
    int32_t reserved

cdef packed struct statx_reply:     # struct fuse_statx after two u64 and u32 flags: struct fuse_statx_out, 288 bytes
    uint64_t node_flags
    uint32_t reserved
    uint32_t flags
    uint64_t spare[2]
    uint32_t mask
    uint32_t blksize
    uint64_t attributes
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint16_t mode
    uint16_t spare0
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t attributes_mask
    timestamp atime
    timestamp btime
    timestamp ctime
    timestamp mtime
    uint32_t rdev_major
    uint32_t rdev_minor
    uint32_t dev_major
    uint32_t dev_minor
    uint64_t spare2[14]

cdef enum:                          # poll_request.flags
    POLL_NOTIFY = 1                 # READY is to be sent once something changes

cdef packed struct poll_request:
    uint64_t handle
    uint64_t notify                 # READY's tag
    uint32_t events                 # POLL* that are of interest
    uint32_t flags

cdef packed struct poll_reply:      # struct fuse_poll_out; the client writes zero over `available`
    uint32_t revents
    uint32_t available              # bytes that a stream has to read: FIONREAD; 0 if it cannot tell

# READY (event channel, from the server, no reply): what a POLL asked for under that tag may have changed.
cdef packed struct stale_name:      # MOUNTS_CHANGED: the name follows, then zeros up to a multiple of 8
    uint64_t directory              # node
    uint32_t name_bytes
    uint32_t reserved

# CANCEL (event channel): header.tag names the request that is to end with EINTR. It has no reply of its own.
# PING: no body; the reply echoes the header.


cdef inline size_t groups_bytes(uint32_t ngroups) noexcept nogil:
    """Room that the supplementary groups take after `caller`: whole 8-byte words."""
    return (ngroups * 4 + 7) & ~<size_t>7


cdef inline size_t direntry_bytes(size_t fixed, size_t name_bytes) noexcept nogil:
    """Size of a directory record: its fixed part and its name, in whole 8-byte words."""
    return (fixed + name_bytes + 7) & ~<size_t>7


cdef inline bint name_is_valid(const uint8_t *name, size_t length) noexcept nogil:
    """One path component: 1 to 255 bytes, no slash, no NUL, not "." or ".."."""
    cdef size_t i
    if length == 0 or length > MAX_NAME:
        return False
    if name[0] == b'.' and (length == 1 or (length == 2 and name[1] == b'.')):
        return False
    for i in range(length):
        if name[i] == 0 or name[i] == b'/':
            return False
    return True

# ---- the server's mounts and processes: rare, packed and unpacked by qtfs_common/remote_calls.py -----------------------

cdef packed struct sysmount_request:    # type, source, target follow, then the options
    uint32_t action                 # remote_calls.Action
    uint32_t flags                  # remote_calls.MountFlag
    uint64_t attributes_set         # MOUNT_ATTR_* of <linux/mount.h>
    uint64_t attributes_clear
    uint32_t propagation            # 0, or MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED; with MS_REC for all below
    uint32_t type_bytes
    uint32_t source_bytes
    uint32_t target_bytes
    uint32_t options                # how many
    uint32_t reserved

cdef packed struct mount_option:    # the name and the value follow
    uint32_t kind                   # remote_calls.OptionKind
    uint32_t name_bytes
    uint32_t value_bytes
    uint32_t reserved

cdef packed struct sysumount_request:   # the target follows
    uint32_t flags                  # MNT_FORCE, MNT_DETACH, MNT_EXPIRE of umount2(2)
    uint32_t reserved

cdef packed struct kill_request:
    int32_t pid
    uint32_t signal                 # 0: only check
    uint64_t start                  # process_record.start of whom is meant; 0: whoever has that pid

cdef packed struct affinity_request:    # SETAFFINITY: the mask follows
    int32_t pid                     # or thread id
    uint32_t mask_bytes             # GETAFFINITY: 0
    uint64_t start

cdef packed struct processes_request:
    uint32_t after                  # only pids above
    uint32_t size                   # room for the reply, bytes

cdef packed struct process_record:  # the name follows, then zeros up to a multiple of 8
    uint32_t pid
    uint32_t parent
    uint32_t uid                    # effective
    uint32_t state                  # the letter of proc_pid_stat(5)
    uint64_t start                  # clock ticks since boot: with the pid, who it is
    int64_t started                 # seconds since 1970
    uint32_t name_bytes
    uint32_t reserved

cdef packed struct list_mounts_request:
    uint64_t token                  # of the listing that is being read on; 0: any
    uint32_t first                  # records to leave out
    uint32_t size                   # room for the reply, bytes

cdef packed struct list_mounts_reply:   # mount_record[count] follow
    uint64_t token                  # changes whenever the listing does
    uint32_t count
    uint32_t total

cdef packed struct mount_record:    # path, type, source, options, super options follow, zeros up to a multiple of 8
    uint64_t id
    uint64_t parent
    uint32_t major
    uint32_t minor
    uint32_t path_bytes
    uint32_t type_bytes
    uint32_t source_bytes
    uint32_t options_bytes
    uint32_t super_bytes
    uint32_t reserved
