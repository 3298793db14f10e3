"""Attaching a FUSE file system to the tree, through libfuse 3: mount(2) for root, fusermount3(1) for everybody else.

libfuse makes the mount and takes it down; the requests of /dev/fuse are read by the driver itself.
Sources: fuse_lowlevel.h, fuse_log.h, mount.fuse3(8), setns(2).
"""
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from qtfs_common.includes.polling cimport POLLERR, poll, pollfd

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

    enum:
        O_DIRECTORY
        O_RDONLY
    int open(const char *, int)

cdef extern from "<unistd.h>" nogil:
    enum:
        _SC_OPEN_MAX
    int close(int)
    int dup2(int, int)
    void _exit(int)
    int fork()
    int pipe2(int *, int)
    int syncfs(int)
    long syscall(long, ...)
    long sysconf(int)

cdef extern from "<sys/syscall.h>" nogil:
    enum:
        SYS_close_range

cdef extern from "<sys/stat.h>" nogil:
    enum:
        AT_STATX_DONT_SYNC
    struct statx_t "statx":
        uint32_t stx_dev_major
        uint32_t stx_dev_minor
    int statx(int, const char *, int, unsigned int, statx_t *)

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


cdef void _free_without_unmounting(fuse_session *session) noexcept nogil:
    """Destroy a session with all that it keeps. Its mount point may be another's by now.

    fuse_session_destroy() leaves the mount point's name to fuse_session_unmount(), which unmounts nothing if its device is
    in error: then the file system has ended. So it gets one that is: a pipe that nobody reads.
    """
    cdef int ends[2]
    if pipe2(ends, O_CLOEXEC) == 0:
        close(ends[0])
        if dup2(ends[1], fuse_session_fd(session)) >= 0:
            fuse_session_unmount(session)
        close(ends[1])
    fuse_session_destroy(session)


cdef class FuseMount:
    """One attached file system. Its device speaks the protocol of linux/fuse.h, beginning with INIT."""
    cdef fuse_session *session
    cdef object lock

    def __init__(self, str mountpoint, options):
        """Mount on a directory; `options` are words and key=value for mount.fuse3(8). Raises MountError."""
        cdef bytes path = os.fsencode(mountpoint)
        cdef const char *path_text = path
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

    def disconnect(self) -> None:
        """Close the device, while the mount point stays. If nobody else has it open, whatever is under way there fails."""
        cdef pollfd device
        with self.lock:
            if self.session == NULL:
                return
            device.fd = fuse_session_fd(self.session)
            device.events = 0
            if poll(&device, 1, 0) == 1 and device.revents & POLLERR:
                return                  # it has ended; libfuse has to see that, to leave the mount point alone
            close_under(device.fd)

    def unmount(self) -> None:
        """Take the file system away from the mount point if it is still there; more than once does no harm."""
        cdef fuse_session *session = self._take()
        if session != NULL:
            with nogil:
                fuse_session_unmount(session)
                fuse_session_destroy(session)

    def abandon(self) -> None:
        """End the file system where it still is, without looking for the mount point, which may be another's by now."""
        cdef fuse_session *session = self._take()
        if session != NULL:
            with nogil:
                _free_without_unmounting(session)

    cdef fuse_session *_take(self) except? NULL:
        """The session, once: nobody waits for who unmounts it, who may wait himself for what is under way there."""
        cdef fuse_session *session = NULL
        with self.lock:
            session, self.session = self.session, NULL
        return session

    def __dealloc__(self):
        if self.session != NULL:
            fuse_session_unmount(self.session)
            fuse_session_destroy(self.session)


def close_under(int fd) -> None:
    """Close what a descriptor stands for and keep its number, for threads that may still use it."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(null, fd, inheritable=False)
    finally:
        os.close(null)


cdef void _write_back(const char *path) noexcept nogil:
    """What a child does: with none of our descriptors, as one on /dev/fuse would keep everybody waiting when we are killed."""
    cdef int fd
    if syscall(SYS_close_range, 0, ~<unsigned int>0, 0) < 0:
        for fd in range(<int>sysconf(_SC_OPEN_MAX)):        # before Linux 5.9
            close(fd)
    fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    _exit(0 if fd >= 0 and syncfs(fd) == 0 else 1)


def start_writing_back(str mountpoint) -> int:
    """Write what programs changed in the memory of a file system: syncfs(2), by a child, whose pid it is. Raises OSError.

    No program is executed: after `enter_mount_namespace` it would be one of that namespace.
    """
    cdef bytes path = os.fsencode(mountpoint)
    cdef const char *text = path
    cdef int pid
    with nogil:
        pid = fork()
        if pid == 0:
            _write_back(text)
    if pid < 0:
        raise OSError(errno, os.strerror(errno))
    return pid


def device_number(str path) -> str:
    """MAJOR:MINOR of the file system that a path leads to, as the kernel knows it: nobody is asked. Raises OSError."""
    cdef bytes name = os.fsencode(path)
    cdef const char *text = name
    cdef statx_t found
    cdef int status
    with nogil:
        status = statx(AT_FDCWD, text, AT_STATX_DONT_SYNC, 0, &found)
    if status < 0:
        raise OSError(errno, os.strerror(errno), path)
    return f"{found.stx_dev_major}:{found.stx_dev_minor}"


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
