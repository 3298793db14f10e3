"""Attaching a FUSE file system to the tree, through libfuse 3: mount(2) for root, fusermount3(1) for everybody else.

libfuse makes the mount and takes it down; the requests of /dev/fuse are read by the driver itself.
Sources: fuse_lowlevel.h, fuse_log.h, mount.fuse3(8), setns(2).
"""
from libc.errno cimport EMFILE, errno
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset

from qtfs_client.drivers.apart cimport call_apart, close_all_but, look_up, place
from qtfs_client.includes.linux cimport iovec
from qtfs_common.includes.polling cimport POLLERR, poll, pollfd

import os
import socket
import threading

from qtfs_client.drivers import MountError
from qtfs_client.drivers.apart import take_away

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

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_CLOEXEC
        O_DIRECTORY
        O_RDONLY
    int open(const char *, int)

cdef extern from "<unistd.h>" nogil:
    int close(int)
    int dup2(int, int)
    void _exit(int)
    int fork()
    int pipe2(int *, int)
    int syncfs(int)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SCM_RIGHTS
        SOL_SOCKET
    ctypedef unsigned int socklen_t
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
    size_t CMSG_LEN(size_t)
    void *CMSG_DATA(cmsghdr *)
    ssize_t sendmsg(int, const msghdr *, int)

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


cdef fuse_session *_prepare(options) except NULL:
    """A session with words and key=value for mount.fuse3(8); what libfuse complains of from now on is noted."""
    fuse_set_log_func(_note_complaint)
    _complaint[0] = 0
    text = ",".join([escape_option(option) for option in options])
    return _new_session([b"mount.qtfs", b"-o", os.fsencode(text)])


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
        self.session = _prepare(options)
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


# ---- a mount below another one of ours -------------------------------------------------------------------------------

cdef struct attachment:             # what `_attach_apart` does, and what came of it
    fuse_session *session
    const char *mountpoint
    int socket                      # what the device goes out through
    int status
    place at


cdef int _send_descriptor(int socket, int fd) noexcept nogil:
    """unix(7), SCM_RIGHTS. 0, or below."""
    cdef uint64_t room[8]
    cdef cmsghdr *head = <cmsghdr *>room
    cdef msghdr message
    cdef iovec part
    memset(&message, 0, sizeof(message))
    part.iov_base = <void *>b"d"
    part.iov_len = 1
    message.msg_iov = &part
    message.msg_iovlen = 1
    message.msg_control = room
    message.msg_controllen = CMSG_LEN(sizeof(int))
    head.cmsg_len = CMSG_LEN(sizeof(int))
    head.cmsg_level = SOL_SOCKET
    head.cmsg_type = SCM_RIGHTS
    memcpy(CMSG_DATA(head), &fd, sizeof(int))
    return 0 if sendmsg(socket, &message, 0) == 1 else -1


cdef void _attach_apart(void *argument) noexcept nogil:
    """Mount, and send the device. After success nothing is left of libfuse's session, whose descriptor is not ours."""
    cdef attachment *mount = <attachment *>argument
    mount.status = fuse_session_mount(mount.session, mount.mountpoint)
    if mount.status != 0:
        return
    mount.at.path = mount.mountpoint
    look_up(&mount.at)
    mount.status = _send_descriptor(mount.socket, fuse_session_fd(mount.session))
    if mount.status == 0:
        _free_without_unmounting(mount.session)
        mount.session = NULL
    else:
        fuse_session_unmount(mount.session)


def mount_apart(str mountpoint, options) -> tuple[int, int]:
    """FuseMount for a mount point to which the way may lead through mounts of ours: the device, which is the caller's,
    and the number of the mount in our mountinfo. Raises MountError, OSError."""
    cdef bytes path = os.fsencode(mountpoint)
    cdef attachment mount
    cdef int status
    memset(&mount, 0, sizeof(mount))
    mount.mountpoint = path
    mount.session = _prepare(options)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mount.socket = theirs.fileno()
        with nogil:
            status = call_apart(_attach_apart, &mount, mount.socket)
        if mount.session != NULL:
            fuse_session_destroy(mount.session)
            if status < 0:
                raise OSError(-status, os.strerror(-status), mountpoint)
            raise MountError(f"{mountpoint}: cannot mount: {_take_complaint()}")
        fds = socket.recv_fds(ours, 1, 1)[1]
        if not fds:
            take_away(mountpoint, mount.at.mount_id)
            raise OSError(EMFILE, os.strerror(EMFILE), mountpoint)
        os.set_inheritable(fds[0], False)
        return fds[0], mount.at.mount_id


# ---- descriptors, and what is dirty ----------------------------------------------------------------------------------

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
    close_all_but(-1)
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
