"""System calls and constants that Cython's own libc and posix packages do not declare.

Sources: the man pages of section 2, <linux/stat.h>, <linux/fs.h>, <linux/magic.h>, <linux/capability.h>.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    """

cdef extern from "<errno.h>" nogil:
    enum:
        EDEADLK

cdef extern from "<fcntl.h>" nogil:
    enum:
        AT_FDCWD
        AT_EMPTY_PATH
        AT_SYMLINK_NOFOLLOW
        AT_SYMLINK_FOLLOW
        AT_REMOVEDIR
        AT_EACCESS
        AT_NO_AUTOMOUNT
        AT_STATX_DONT_SYNC
        O_ACCMODE
        F_GETFL
        F_SETFL
        O_APPEND
        O_CLOEXEC
        O_CREAT
        O_DIRECTORY
        O_DSYNC
        O_EXCL
        O_NOATIME
        O_NOCTTY
        O_NOFOLLOW
        O_NONBLOCK
        O_PATH
        O_RDONLY
        O_RDWR
        O_SYNC
        O_TMPFILE
        O_TRUNC
        O_WRONLY
        F_OFD_GETLK
        F_OFD_SETLK
        F_OFD_SETLKW
        F_RDLCK
        F_WRLCK
        F_UNLCK
    struct flock_t "flock":
        short l_type
        short l_whence
        int64_t l_start
        int64_t l_len
        int l_pid
    struct file_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char f_handle[0]
    int openat(int, const char *, int, ...)
    int fcntl(int, int, ...)
    int fallocate(int, int, int64_t, int64_t)
    int name_to_handle_at(int, const char *, file_handle *, int *, int)
    int open_by_handle_at(int, file_handle *, int)

cdef extern from "<sys/file.h>" nogil:
    enum:
        LOCK_SH
        LOCK_EX
        LOCK_UN
        LOCK_NB
    int flock(int, int)

cdef extern from "<sys/stat.h>" nogil:
    enum:
        S_IFMT
        S_IFREG
        S_IFDIR
        S_IFLNK
        S_IFIFO
        S_IFCHR
        S_IFBLK
        S_IFSOCK
        S_ISGID
        S_ISUID
        STATX_BASIC_STATS
        STATX_BTIME
        UTIME_NOW
        UTIME_OMIT
    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec
    struct statx_t "statx":
        uint32_t stx_mask
        uint32_t stx_blksize
        uint64_t stx_attributes
        uint32_t stx_nlink
        uint32_t stx_uid
        uint32_t stx_gid
        uint16_t stx_mode
        uint64_t stx_ino
        uint64_t stx_size
        uint64_t stx_blocks
        uint64_t stx_attributes_mask
        statx_timestamp stx_atime
        statx_timestamp stx_btime
        statx_timestamp stx_ctime
        statx_timestamp stx_mtime
        uint32_t stx_rdev_major
        uint32_t stx_rdev_minor
        uint32_t stx_dev_major
        uint32_t stx_dev_minor
        uint64_t stx_mnt_id
    struct timespec:
        int64_t tv_sec
        long tv_nsec
    int statx(int, const char *, int, unsigned int, statx_t *)
    int fchmodat(int, const char *, uint32_t, int)
    int fchmod(int, uint32_t)
    int mkdirat(int, const char *, uint32_t)
    int mknodat(int, const char *, uint32_t, uint64_t)
    int utimensat(int, const char *, const timespec *, int)
    uint32_t umask(uint32_t)

cdef extern from "<sys/sysmacros.h>" nogil:
    uint64_t makedev(unsigned int, unsigned int)

cdef extern from "<sys/uio.h>" nogil:
    enum:
        RWF_APPEND
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev2(int, const iovec *, int, int64_t, int)

cdef extern from "<unistd.h>" nogil:
    int close(int)
    int dup(int)
    int fchownat(int, const char *, uint32_t, uint32_t, int)
    int fsync(int)
    int fdatasync(int)
    int ftruncate(int, int64_t)
    int truncate(const char *, int64_t)
    int linkat(int, const char *, int, const char *, int)
    int symlinkat(const char *, int, const char *)
    int unlinkat(int, const char *, int)
    int64_t lseek(int, int64_t, int)
    ssize_t read(int, void *, size_t)
    ssize_t write(int, const void *, size_t)
    ssize_t pread(int, void *, size_t, int64_t)
    ssize_t pwrite(int, const void *, size_t, int64_t)
    ssize_t readlinkat(int, const char *, char *, size_t)
    ssize_t copy_file_range(int, int64_t *, int, int64_t *, size_t, unsigned int)
    int syncfs(int)
    int usleep(unsigned int)
    long syscall(long, ...)

cdef extern from "<stdio.h>" nogil:
    int renameat2(int, const char *, int, const char *, unsigned int)
    int snprintf(char *, size_t, const char *, ...)

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        int64_t f_type
        int64_t f_bsize
        uint64_t f_blocks
        uint64_t f_bfree
        uint64_t f_bavail
        uint64_t f_files
        uint64_t f_ffree
        int64_t f_namelen
        int64_t f_frsize
    int fstatfs(int, statfs_t *)

cdef extern from "<sys/xattr.h>" nogil:
    enum:
        XATTR_CREATE
    ssize_t getxattr(const char *, const char *, void *, size_t)
    ssize_t listxattr(const char *, char *, size_t)
    int setxattr(const char *, const char *, const void *, size_t, int)
    int removexattr(const char *, const char *)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int, unsigned long, ...)

cdef extern from "<sys/syscall.h>" nogil:
    enum:
        SYS_capget
        SYS_capset
        SYS_faccessat2
        SYS_getdents64
        SYS_openat2
        SYS_setgroups
        SYS_setresgid
        SYS_setresuid

cdef extern from "<linux/capability.h>" nogil:
    enum:
        CAP_FSETID
        _LINUX_CAPABILITY_VERSION_3
    struct __user_cap_header_struct:
        uint32_t version
        int pid
    struct __user_cap_data_struct:
        uint32_t effective
        uint32_t permitted
        uint32_t inheritable

cdef extern from "<linux/openat2.h>" nogil:
    enum:
        RESOLVE_NO_SYMLINKS
        RESOLVE_NO_MAGICLINKS
    struct open_how:
        uint64_t flags
        uint64_t mode
        uint64_t resolve

cdef extern from "<linux/stat.h>" nogil:
    pass

cdef extern from "<sched.h>" nogil:
    enum:
        CLONE_FS
    int unshare(int)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)

cdef extern from "<signal.h>" nogil:
    int pthread_kill(pthread_t, int)

cdef packed struct linux_dirent64:  # getdents64(2); the name follows, NUL-terminated
    uint64_t d_ino
    int64_t d_off
    uint16_t d_reclen
    uint8_t d_type

cdef extern from *:
    """
    #ifndef STATX_MNT_ID
    #define STATX_MNT_ID 0x00001000U
    #endif
    #ifndef RESOLVE_CACHED
    #define RESOLVE_CACHED 0x20     /* Linux 5.12; before, EINVAL */
    #endif
    #ifndef STATX_MNT_ID_UNIQUE
    #define STATX_MNT_ID_UNIQUE 0x00004000U
    #endif
    #define qtfs_atomic_add(p, n) __atomic_add_fetch((p), (n), __ATOMIC_RELAXED)
    #define qtfs_atomic_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define qtfs_atomic_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define qtfs_atomic_swap(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
    /* Set *p to v if it is *was, else *was to what it is; whether it was set. */
    #define qtfs_atomic_set_if(p, was, v) \
        __atomic_compare_exchange_n((p), (was), (v), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
    /* What was written before is in memory before what comes, for whoever maps it once we are dead. */
    #define qtfs_written() __atomic_signal_fence(__ATOMIC_SEQ_CST)
    """
    enum:
        STATX_MNT_ID
        STATX_MNT_ID_UNIQUE
        RESOLVE_CACHED
    int32_t atomic_add_int "qtfs_atomic_add"(int32_t *, int32_t) nogil
    uint64_t atomic_load_u64 "qtfs_atomic_load"(uint64_t *) nogil
    void atomic_store_u64 "qtfs_atomic_store"(uint64_t *, uint64_t) nogil
    int64_t atomic_add_i64 "qtfs_atomic_add"(int64_t *, int64_t) nogil
    uint64_t atomic_add_u64 "qtfs_atomic_add"(uint64_t *, uint64_t) nogil
    int32_t atomic_load_int "qtfs_atomic_load"(int32_t *) nogil
    void atomic_store_int "qtfs_atomic_store"(int32_t *, int32_t) nogil
    int32_t atomic_swap_int "qtfs_atomic_swap"(int32_t *, int32_t) nogil
    bint atomic_set_int_if "qtfs_atomic_set_if"(int32_t *, int32_t *, int32_t) nogil
    void *atomic_load_pointer "qtfs_atomic_load"(void **) nogil
    void atomic_store_pointer "qtfs_atomic_store"(void **, void *) nogil
    void written "qtfs_written"() nogil
