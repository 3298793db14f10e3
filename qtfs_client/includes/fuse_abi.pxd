"""The kernel's side of FUSE: messages on /dev/fuse, as of protocol 7.45 (Linux 6.18).

Source: include/uapi/linux/fuse.h and Documentation/filesystems/fuse. Declared here with explicit numbers rather than
taken from the system's header, because distributions that we serve ship headers as old as 7.31, while the kernel that
runs decides what is spoken: every structure has its layout of 7.31 or later, and INIT negotiates the rest.
"""
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

cdef enum:
    FUSE_MAJOR = 7
    FUSE_MINOR = 45
    FUSE_OLDEST_MINOR = 31
    FUSE_UNIQUE_INTERRUPT = 1       # FUSE_INT_REQ_BIT: set in the `unique` of an INTERRUPT

cdef enum:                          # opcodes
    FUSE_LOOKUP = 1
    FUSE_FORGET = 2
    FUSE_GETATTR = 3
    FUSE_SETATTR = 4
    FUSE_READLINK = 5
    FUSE_SYMLINK = 6
    FUSE_MKNOD = 8
    FUSE_MKDIR = 9
    FUSE_UNLINK = 10
    FUSE_RMDIR = 11
    FUSE_RENAME = 12
    FUSE_LINK = 13
    FUSE_OPEN = 14
    FUSE_READ = 15
    FUSE_WRITE = 16
    FUSE_STATFS = 17
    FUSE_RELEASE = 18
    FUSE_FSYNC = 20
    FUSE_SETXATTR = 21
    FUSE_GETXATTR = 22
    FUSE_LISTXATTR = 23
    FUSE_REMOVEXATTR = 24
    FUSE_FLUSH = 25
    FUSE_INIT = 26
    FUSE_OPENDIR = 27
    FUSE_READDIR = 28
    FUSE_RELEASEDIR = 29
    FUSE_FSYNCDIR = 30
    FUSE_GETLK = 31
    FUSE_SETLK = 32
    FUSE_SETLKW = 33
    FUSE_ACCESS = 34
    FUSE_CREATE = 35
    FUSE_INTERRUPT = 36
    FUSE_BMAP = 37
    FUSE_DESTROY = 38
    FUSE_IOCTL = 39
    FUSE_POLL = 40
    FUSE_NOTIFY_REPLY = 41
    FUSE_BATCH_FORGET = 42
    FUSE_FALLOCATE = 43
    FUSE_READDIRPLUS = 44
    FUSE_RENAME2 = 45
    FUSE_LSEEK = 46
    FUSE_COPY_FILE_RANGE = 47
    FUSE_SETUPMAPPING = 48
    FUSE_REMOVEMAPPING = 49
    FUSE_SYNCFS = 50
    FUSE_TMPFILE = 51
    FUSE_STATX = 52
    FUSE_COPY_FILE_RANGE_64 = 53
    FUSE_OPCODES = 64               # table size, not an opcode

cdef enum:                          # error field of a message that answers nothing
    FUSE_NOTIFY_POLL = 1
    FUSE_NOTIFY_INVAL_INODE = 2
    FUSE_NOTIFY_INVAL_ENTRY = 3
    FUSE_NOTIFY_STORE = 4
    FUSE_EXPIRE_ONLY = 1            # fuse_notify_inval_entry_out.flags

cdef enum:                          # INIT flags
    FUSE_ASYNC_READ = 1 << 0
    FUSE_POSIX_LOCKS = 1 << 1
    FUSE_ATOMIC_O_TRUNC = 1 << 3
    FUSE_BIG_WRITES = 1 << 5
    FUSE_DONT_MASK = 1 << 6
    FUSE_FLOCK_LOCKS = 1 << 10
    FUSE_HAS_IOCTL_DIR = 1 << 11
    FUSE_AUTO_INVAL_DATA = 1 << 12
    FUSE_DO_READDIRPLUS = 1 << 13
    FUSE_READDIRPLUS_AUTO = 1 << 14
    FUSE_ASYNC_DIO = 1 << 15
    FUSE_PARALLEL_DIROPS = 1 << 18
    FUSE_POSIX_ACL = 1 << 20
    FUSE_MAX_PAGES = 1 << 22
    FUSE_CACHE_SYMLINKS = 1 << 23
    FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
    FUSE_SETXATTR_EXT = 1 << 29
    FUSE_INIT_EXT = 1 << 30

cdef enum:                          # INIT flags2: bits 32 and up of the header's numbering
    FUSE_DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)

cdef enum:                          # fuse_open_out.open_flags
    FOPEN_DIRECT_IO = 1 << 0
    FOPEN_KEEP_CACHE = 1 << 1
    FOPEN_NONSEEKABLE = 1 << 2
    FOPEN_CACHE_DIR = 1 << 3
    FOPEN_STREAM = 1 << 4
    FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6

cdef enum:
    FUSE_GETATTR_FH = 1 << 0
    FUSE_LK_FLOCK = 1 << 0
    FUSE_OPEN_KILL_SUIDGID = 1 << 0
    FUSE_SETXATTR_ACL_KILL_SGID = 1 << 0
    FUSE_FSYNC_FDATASYNC = 1 << 0
    FUSE_RELEASE_FLOCK_UNLOCK = 1 << 1
    FUSE_POLL_SCHEDULE_NOTIFY = 1 << 0
    FUSE_WRITE_CACHE = 1 << 0
    FUSE_WRITE_KILL_SUIDGID = 1 << 2
    FUSE_IOCTL_COMPAT = 1 << 0
    FUSE_IOCTL_UNRESTRICTED = 1 << 1
    FUSE_IOCTL_COMPAT_X32 = 1 << 5

cdef struct fuse_in_header:         # 40 bytes
    uint32_t len
    uint32_t opcode
    uint64_t unique
    uint64_t nodeid
    uint32_t uid
    uint32_t gid
    uint32_t pid
    uint16_t total_extlen
    uint16_t padding

cdef struct fuse_out_header:        # 16 bytes
    uint32_t len
    int32_t error
    uint64_t unique

cdef struct fuse_init_in:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint32_t flags2                 # from here on only if FUSE_INIT_EXT is set
    uint32_t unused[11]

cdef struct fuse_init_out:          # 64 bytes
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint16_t max_background
    uint16_t congestion_threshold
    uint32_t max_write
    uint32_t time_gran
    uint16_t max_pages
    uint16_t map_alignment
    uint32_t flags2
    uint32_t unused[7]

cdef struct fuse_forget_in:
    uint64_t nlookup

cdef struct fuse_batch_forget_in:   # fuse_forget_one[count] follows: nodeid, nlookup
    uint32_t count
    uint32_t dummy

cdef struct fuse_interrupt_in:
    uint64_t unique

cdef struct fuse_getattr_in:
    uint32_t getattr_flags
    uint32_t dummy
    uint64_t fh

cdef struct fuse_setattr_in:
    uint32_t valid
    uint32_t padding
    uint64_t fh
    uint64_t size
    uint64_t lock_owner
    uint64_t atime
    uint64_t mtime
    uint64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t unused4
    uint32_t uid
    uint32_t gid
    uint32_t unused5

cdef struct fuse_mknod_in:
    uint32_t mode
    uint32_t rdev
    uint32_t umask
    uint32_t padding

cdef struct fuse_mkdir_in:
    uint32_t mode
    uint32_t umask

cdef struct fuse_rename_in:
    uint64_t newdir

cdef struct fuse_rename2_in:
    uint64_t newdir
    uint32_t flags
    uint32_t padding

cdef struct fuse_link_in:
    uint64_t oldnodeid

cdef struct fuse_open_in:
    uint32_t flags
    uint32_t open_flags

cdef struct fuse_create_in:
    uint32_t flags
    uint32_t mode
    uint32_t umask
    uint32_t open_flags

cdef struct fuse_open_out:
    uint64_t fh
    uint32_t open_flags
    uint32_t padding

cdef struct fuse_release_in:
    uint64_t fh
    uint32_t flags
    uint32_t release_flags
    uint64_t lock_owner

cdef struct fuse_flush_in:
    uint64_t fh
    uint32_t unused
    uint32_t padding
    uint64_t lock_owner

cdef struct fuse_read_in:           # READ, READDIR, READDIRPLUS
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t read_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef struct fuse_write_in:          # the data follows
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t write_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef struct fuse_write_out:
    uint32_t size
    uint32_t padding

cdef struct fuse_poll_in:
    uint64_t fh
    uint64_t kh                     # names the open file in a notification
    uint32_t flags
    uint32_t events

cdef struct fuse_poll_out:
    uint32_t revents
    uint32_t padding

cdef struct fuse_fsync_in:
    uint64_t fh
    uint32_t fsync_flags
    uint32_t padding

cdef struct fuse_setxattr_in:
    uint32_t size
    uint32_t flags
    uint32_t setxattr_flags         # from here on only with FUSE_SETXATTR_EXT
    uint32_t padding

cdef enum:
    SETXATTR_OLD_BYTES = 8          # fuse_setxattr_in without FUSE_SETXATTR_EXT

cdef struct fuse_getxattr_in:
    uint32_t size
    uint32_t padding

cdef struct fuse_lk_in:
    uint64_t fh
    uint64_t owner
    uint64_t start
    uint64_t end
    uint32_t type
    uint32_t pid
    uint32_t lk_flags
    uint32_t padding

cdef struct fuse_access_in:
    uint32_t mask
    uint32_t padding

cdef struct fuse_ioctl_in:          # in_size bytes follow
    uint64_t fh
    uint32_t flags
    uint32_t cmd
    uint64_t arg
    uint32_t in_size
    uint32_t out_size

cdef struct fuse_ioctl_out:         # the data follows
    int32_t result
    uint32_t flags
    uint32_t in_iovs
    uint32_t out_iovs

cdef struct fuse_fallocate_in:
    uint64_t fh
    uint64_t offset
    uint64_t length
    uint32_t mode
    uint32_t padding

cdef struct fuse_lseek_in:
    uint64_t fh
    uint64_t offset
    uint32_t whence
    uint32_t padding

cdef struct fuse_copy_file_range_in:
    uint64_t fh_in
    uint64_t off_in
    uint64_t nodeid_out
    uint64_t fh_out
    uint64_t off_out
    uint64_t len
    uint64_t flags

cdef struct fuse_statx_in:
    uint32_t getattr_flags
    uint32_t reserved
    uint64_t fh
    uint32_t sx_flags
    uint32_t sx_mask

cdef struct fuse_notify_inval_entry_out:    # the name and a NUL follow
    uint64_t parent
    uint32_t namelen
    uint32_t flags

cdef struct fuse_notify_inval_inode_out:
    uint64_t ino
    int64_t off                     # negative: attributes only
    int64_t len

cdef struct fuse_notify_store_out:  # the data follows
    uint64_t nodeid
    uint64_t offset
    uint32_t size
    uint32_t padding

# What a reply's first words mean to the kernel; on the wire they are node_flags and zeros (protocol.pxd).

cdef struct fuse_entry_validity:    # fuse_entry_out without its attributes
    uint64_t nodeid
    uint64_t generation
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec

cdef struct fuse_attr_validity:     # fuse_attr_out and fuse_statx_out without their attributes
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t dummy
