"""System calls, constants and atomics that Cython's own libc and posix packages do not declare.

Sources: the man pages of sections 2 and 3; GCC manual, "Built-in Functions for Memory Model Aware Atomic Operations".
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    """

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_ACCMODE
        O_APPEND
        O_CLOEXEC
        O_DIRECT
        O_DIRECTORY
        O_NOFOLLOW
        O_NONBLOCK
        O_PATH
        O_RDONLY
        O_RDWR
        O_TRUNC
        O_WRONLY
    int open(const char *, int, ...)
    int openat(int, const char *, int, ...)

cdef extern from "<unistd.h>" nogil:
    enum:
        R_OK
        W_OK
    int close(int)
    ssize_t read(int, void *, size_t)
    ssize_t write(int, const void *, size_t)
    ssize_t pread(int, void *, size_t, int64_t)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t readv(int, const iovec *, int)
    ssize_t writev(int, const iovec *, int)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef extern from "<stdio.h>" nogil:
    int snprintf(char *, size_t, const char *, ...)

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **, size_t, size_t)
    unsigned long strtoul(const char *, char **, int)
    unsigned long long strtoull(const char *, char **, int)

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char *, size_t)
    char *strstr(const char *, const char *)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int, unsigned long, ...)

cdef extern from *:
    """
    #include <stdint.h>
    #define qtfs_load(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define qtfs_store(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define qtfs_add(p, n) __atomic_add_fetch((p), (n), __ATOMIC_SEQ_CST)
    /* _IOR(229, 0, uint32_t), linux/fuse.h since 4.2 */
    #define QTFS_FUSE_DEV_IOC_CLONE 0x8004e500UL
    """
    uint64_t load_u64 "qtfs_load"(const uint64_t *) nogil
    void store_u64 "qtfs_store"(uint64_t *, uint64_t) nogil
    int64_t load_i64 "qtfs_load"(const int64_t *) nogil
    void store_i64 "qtfs_store"(int64_t *, int64_t) nogil
    int32_t load_int "qtfs_load"(const int32_t *) nogil
    void store_int "qtfs_store"(int32_t *, int32_t) nogil
    int32_t add_int "qtfs_add"(int32_t *, int32_t) nogil
    uint64_t add_u64 "qtfs_add"(uint64_t *, uint64_t) nogil
    unsigned long FUSE_DEV_IOC_CLONE "QTFS_FUSE_DEV_IOC_CLONE"
