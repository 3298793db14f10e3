"""Attaching a FUSE file system to the tree, through libfuse 3: mount(2) for root, fusermount3(1) for everybody else.

libfuse makes the mount and takes it down; the requests of /dev/fuse are read by the driver itself.
Sources: fuse_lowlevel.h, fuse_log.h, mount.fuse3(8), setns(2).
"""
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

import os
import threading

from qtfs_client.drivers import MountError

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #define FUSE_USE_VERSION 34
    """

cdef extern from "<stdarg.h>" nogil:
    ctypedef struct va_list:
        pass

cdef extern from "<stdio.h>" nogil:
    int vsnprintf(char *, size_t, const char *, va_list)

cdef enum:
    MAX_HANDLE_BYTES = 128          # MAX_HANDLE_SZ
    FILEID_INO64_GEN = 0x81

cdef extern from "<fcntl.h>" nogil:
    struct file_handle:
        unsigned int handle_bytes
        int handle_type
    int name_to_handle_at(int, const char *, file_handle *, int *, int)
    enum:
        AT_FDCWD
        O_CLOEXEC
        O_DIRECTORY
        O_RDONLY
    int open(const char *, int, ...)

cdef extern from "<unistd.h>" nogil:
    int close(int)
    int syncfs(int)

cdef extern from "<sys/mount.h>" nogil:
    enum:
        MNT_DETACH
        UMOUNT_NOFOLLOW
    int umount2(const char *, int)

cdef extern from "<sched.h>" nogil:
    enum:
        CLONE_NEWNS
    int setns(int, int)

cdef extern from "fuse_log.h" nogil:
    enum fuse_log_level:
        pass
    ctypedef void (*fuse_log_func_t)(fuse_log_level, const char *, va_list) noexcept
    void fuse_set_log_func(fuse_log_func_t)

cdef extern from "fuse_lowlevel.h" nogil:
    struct fuse_args:
        int argc
        char **argv
        int allocated
    int fuse_opt_add_arg(fuse_args *, const char *)
    void fuse_opt_free_args(fuse_args *)
    struct fuse_lowlevel_ops:
        pass
    struct fuse_session:
        pass
    fuse_session *fuse_session_new(fuse_args *, const fuse_lowlevel_ops *, size_t, void *)
    int fuse_session_mount(fuse_session *, const char *)
    int fuse_session_fd(fuse_session *)
    void fuse_session_unmount(fuse_session *)
    void fuse_session_destroy(fuse_session *)

# What libfuse complained of last: it returns no errno.
cdef char _complaint[512]


cdef void _note_complaint(fuse_log_level level, const char *format, va_list arguments) noexcept nogil:
    """libfuse's log: the first line of a failure says most."""
    if _complaint[0] == 0:
        vsnprintf(_complaint, sizeof(_complaint), format, arguments)


def _take_complaint() -> str:
    text = (<bytes>_complaint).decode(errors="replace").strip()
    _complaint[0] = 0
    return text.removeprefix("fuse: ").removeprefix("fusermount3: ") or "libfuse gives no reason"


def escape_option(option: str) -> str:
    """An option for libfuse's -o list, where a comma and a backslash stand for themselves only after a backslash."""
    return option.replace("\\", "\\\\").replace(",", "\\,")


cdef fuse_session *_new_session(list arguments) except NULL:
    cdef fuse_args args
    cdef fuse_lowlevel_ops nothing
    cdef fuse_session *session
    memset(&args, 0, sizeof(args))
    memset(&nothing, 0, sizeof(nothing))
    try:
        for argument in arguments:
            if fuse_opt_add_arg(&args, <bytes>argument) < 0:
                raise MemoryError
        session = fuse_session_new(&args, &nothing, sizeof(nothing), NULL)
    finally:
        fuse_opt_free_args(&args)
    if session == NULL:
        raise MountError(f"libfuse refuses the mount options: {_take_complaint()}")
    return session


cdef class FuseMount:
    """One attached file system. Its device speaks the protocol of linux/fuse.h, beginning with INIT."""
    cdef fuse_session *session
    cdef object lock
    cdef bytes path

    def __init__(self, str mountpoint, options):
        """Mount on a directory; `options` are words and key=value for mount.fuse3(8). Raises MountError."""
        self.path = os.fsencode(mountpoint)
        cdef const char *path_text = self.path
        cdef int status
        self.lock = threading.Lock()
        fuse_set_log_func(_note_complaint)
        _complaint[0] = 0
        text = ",".join([escape_option(option) for option in options])
        self.session = _new_session([b"mount.qtfs", b"-o", os.fsencode(text)])
        with nogil:
            status = fuse_session_mount(self.session, path_text)
        if status != 0:
            fuse_session_destroy(self.session)
            self.session = NULL
            raise MountError(f"{mountpoint}: cannot mount: {_take_complaint()}")

    def device(self) -> int:
        """A descriptor of /dev/fuse for this mount; it belongs to the caller."""
        return os.dup(fuse_session_fd(self.session))

    def write_back(self) -> None:
        """syncfs(2): whatever pages of shared mappings wait to be written. Errors are the business of msync(2)."""
        cdef int fd = open(self.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        if fd >= 0:
            with nogil:
                syncfs(fd)
                close(fd)

    def unmount(self) -> None:
        """Take the file system away from the mount point if it is still there; more than once does no harm."""
        cdef fuse_session *session
        with self.lock:
            session, self.session = self.session, NULL
            if session == NULL:
                return
            with nogil:
                fuse_session_unmount(session)
                fuse_session_destroy(session)


    def abandon(self) -> None:
        """End the file system where it still is, without looking for the mount point, which may be another's by now."""
        cdef fuse_session *session
        with self.lock:
            session, self.session = self.session, NULL
            if session != NULL:
                with nogil:
                    fuse_session_destroy(session)


def detach(str mountpoint) -> None:
    """umount2(2) with MNT_DETACH of whatever is mounted there. Raises OSError."""
    cdef bytes path = os.fsencode(mountpoint)
    cdef const char *text = path
    cdef int status
    with nogil:
        status = umount2(text, MNT_DETACH | UMOUNT_NOFOLLOW)
    if status < 0:
        raise OSError(errno, os.strerror(errno), mountpoint)


def node_of(str directory) -> int:
    """The node id that the kernel has for a directory of a FUSE file system; 0: there is none.

    It is in the file handle, FILEID_INO64_GEN of <linux/exportfs.h>: two words of the node, one of its generation.
    """
    cdef bytes path = os.fsencode(directory)
    cdef const char *text = path
    cdef uint32_t room[34]          # header and MAX_HANDLE_BYTES
    cdef file_handle *found = <file_handle *>room
    cdef int mount_id = 0, status
    found.handle_bytes = MAX_HANDLE_BYTES
    with nogil:
        status = name_to_handle_at(AT_FDCWD, text, found, &mount_id, 0)
    if status < 0 or found.handle_type != FILEID_INO64_GEN:
        return 0
    return <uint64_t>room[2] << 32 | room[3]


def enter_mount_namespace(str namespace) -> None:
    """setns(2) into the mount namespace of a pid, or of a path that such a namespace is bound to. Raises MountError.

    Only for a process with a single thread.
    """
    path = f"/proc/{namespace}/ns/mnt" if namespace.isdigit() else namespace
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if setns(fd, CLONE_NEWNS) < 0:
                raise OSError(errno, os.strerror(errno))
        finally:
            os.close(fd)
    except OSError as error:
        raise MountError(f"mount namespace {namespace}: {error.strerror}") from error
