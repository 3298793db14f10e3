"""Attaching a FUSE file system to the tree, through libfuse 3: mount(2) for root, fusermount3(1) for everybody else.

libfuse makes the mount and takes it down; the requests of /dev/fuse are read by the driver itself. What is to be mounted
below another mount of ours is made by the mount API instead (`new_mount`), for its way there is apart.pyx's business.
Sources: fuse_lowlevel.h, fuse_log.h, mount.fuse3(8), fsopen(2), setns(2).
"""
from libc.errno cimport errno
from libc.string cimport memset

from qtfs_client.drivers.apart cimport close_all_but
from qtfs_common.includes.polling cimport POLLERR, poll, pollfd

import contextlib
import os
import threading

from qtfs_client.drivers import MountError
from qtfs_common import mount_calls

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
    void _exit(int)
    int fork()
    int syncfs(int)

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


# ---- a mount that is nowhere yet -------------------------------------------------------------------------------------

#: <linux/mount.h>, MOUNT_ATTR_*; the file system itself is told of "ro", too.
_ATTRIBUTES = {"ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "noatime": 0x10, "nodiratime": 0x80}
_DEFAULTS = ("rw", "suid", "dev")


def new_mount(options) -> tuple[int, int]:
    """A FUSE file system that is mounted nowhere, with words and key=value for mount.fuse3(8): its device, and its mount
    for move_mount(2), with which it goes unless it is moved before. Both are the caller's. For root; raises OSError."""
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as stack:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, device)
        context = mount_calls.fsopen(b"fuse")
        stack.callback(os.close, context)
        own = (f"fd={device}", "rootmode=40000", f"user_id={os.geteuid()}", f"group_id={os.getegid()}")
        attributes = 0
        for option in (*options, *own):
            name, equals, value = option.partition("=")
            attributes |= _ATTRIBUTES.get(name, 0)
            if equals:
                name = "source" if name == "fsname" else name
                mount_calls.fsconfig(context, mount_calls.SET_STRING, name.encode(), os.fsencode(value))
            elif name == "ro" or name not in _ATTRIBUTES and name not in _DEFAULTS:
                mount_calls.fsconfig(context, mount_calls.SET_FLAG, name.encode(), None)
        mount_calls.fsconfig(context, mount_calls.CMD_CREATE, None, None)
        made = device, mount_calls.fsmount(context, attributes)
        opened.pop_all()
        return made


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
    close_all_but(-1, -1)
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
