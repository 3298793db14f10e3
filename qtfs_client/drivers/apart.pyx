"""Calls that may have to wait for our own mount, by processes that share our memory, but not our descriptors.

Who waits in the kernel for a reply that this process owes cannot be killed, and the descriptors of a killed process stay
open until its last thread has ended: with /dev/fuse among them the mount would not end either, and nobody who waits for
it. Such a process has none of them, and so the mount ends with us, and with the mount what the process waits for.

Names on the way are the server's users': a symbolic link among them would lead to another place of this machine, so none
is followed.

Sources: vfork(2), close_range(2), openat2(2), move_mount(2), open_by_handle_at(2), statx(2), umount(2).
"""
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from qtfs_client.includes.linux cimport O_CLOEXEC, O_PATH, close
from qtfs_common.includes.mounts cimport MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH, SYS_MOVE_MOUNT, SYS_OPENAT2, \
    open_how, syscall, umount2

import dataclasses
import os

from qtfs_client.mountpoint import PROC

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <signal.h>
    #include <unistd.h>

    /* In C, and out of line: the child must not return, nor touch what its parent goes on with. */
    static __attribute__((noinline)) pid_t qtfs_start_apart(void (*close_others)(int, int), int kept, int also,
                                                            void (*call)(void *), void *argument, volatile int *done)
    {
        pid_t pid = vfork();
        if (pid == 0) {
            close_others(kept, also);
            call(argument);
            *done = 1;
            _exit(0);
        }
        return pid;
    }
    """
    int qtfs_start_apart(void (*)(int, int) noexcept nogil, int, int, void (*)(void *) noexcept nogil, void *,
                         int *) noexcept nogil

cdef enum:
    MAX_HANDLE_BYTES = 128          # MAX_HANDLE_SZ
    HANDLE_WORDS = 34               # a file_handle: size, type, bytes
    FILEID_INO64_GEN = 0x81         # <linux/exportfs.h>: two words of the node, one of its generation
    MNT_DETACH = 2                  # <sys/mount.h>
    RESOLVE_NO_SYMLINKS = 4         # <linux/openat2.h>
    TEXT_ROOM = 32

cdef extern from "<fcntl.h>" nogil:
    struct file_handle:
        unsigned int handle_bytes
        int handle_type
    int name_to_handle_at(int, const char *, file_handle *, int *, int)
    enum:
        AT_EMPTY_PATH
        AT_FDCWD

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum:
        SIG_BLOCK
        SIG_SETMASK
    int sigfillset(sigset_t *)
    int pthread_sigmask(int, const sigset_t *, sigset_t *)

cdef extern from "<stdio.h>" nogil:
    int snprintf(char *, size_t, const char *, ...)

cdef extern from "<sys/stat.h>" nogil:
    enum:
        AT_STATX_DONT_SYNC
        STATX_TYPE
        S_IFMT
        S_IFDIR
    struct statx_t "statx":
        uint16_t stx_mode
        uint32_t stx_dev_major
        uint32_t stx_dev_minor
    int statx(int, const char *, int, unsigned int, statx_t *)

cdef extern from "<sys/syscall.h>" nogil:
    enum:
        SYS_close_range

cdef extern from "<sys/wait.h>" nogil:
    int waitpid(int, int *, int)

cdef extern from "<unistd.h>" nogil:
    enum:
        _SC_OPEN_MAX
    int fchdir(int)
    long sysconf(int)


cdef void _close_range(unsigned int first, unsigned int last) noexcept nogil:
    cdef unsigned int fd
    if first <= last and syscall(SYS_close_range, first, last, 0) < 0:     # before Linux 5.9
        for fd in range(first, min(last, <unsigned int>sysconf(_SC_OPEN_MAX)) + 1):
            close(<int>fd)


cdef void close_all_but(int kept, int also) noexcept nogil:
    """Close every descriptor of the calling process but two; -1: there is none."""
    cdef int first = min(kept, also), last = max(kept, also)
    if first > 0:
        _close_range(0, first - 1)
    if last > first + 1:
        _close_range(first + 1, last - 1)
    _close_range(last + 1, <unsigned int>0x7fffffff)


cdef int call_apart(apart_call call, void *argument, int kept, int also) noexcept nogil:
    """Return when a process that has none of our descriptors but `kept` and `also` has made a call. 0, or -errno.

    -EINTR: somebody killed it, and nobody knows how far it came. Else there was none. It uses our memory, and our stack:
    the call must not take locks, nor memory from malloc(3), which would stay locked if we are killed.
    """
    cdef sigset_t every, before
    cdef int pid, error, done = 0
    sigfillset(&every)
    pthread_sigmask(SIG_BLOCK, &every, &before)         # a handler would run in it, on what is ours
    pid = qtfs_start_apart(close_all_but, kept, also, call, argument, &done)
    error = errno
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if pid < 0:
        return -error
    while waitpid(pid, NULL, 0) < 0 and errno == EINTR:
        pass
    return 0 if done else -EINTR


# ---- paths -----------------------------------------------------------------------------------------------------------

cdef struct place:
    const char *path
    int error
    int is_directory
    int mount_id
    uint64_t node
    unsigned int major, minor


cdef int _open(const char *path) noexcept nogil:
    """An O_PATH descriptor of what a path leads to without symbolic links, or -errno. ENOSYS before Linux 5.6."""
    cdef open_how how
    cdef long fd
    how.flags = O_PATH | O_CLOEXEC
    how.mode = 0
    how.resolve = RESOLVE_NO_SYMLINKS
    fd = syscall(SYS_OPENAT2, AT_FDCWD, path, &how, sizeof(how))
    return <int>fd if fd >= 0 else -errno


cdef void _identify(int fd, place *at) noexcept nogil:
    """What the kernel knows about what an O_PATH descriptor stands for: no file system is asked."""
    cdef uint32_t room[HANDLE_WORDS]
    cdef file_handle *handle = <file_handle *>room
    cdef statx_t found
    handle.handle_bytes = MAX_HANDLE_BYTES
    at.mount_id = -1
    if name_to_handle_at(fd, b"", handle, &at.mount_id, AT_EMPTY_PATH) == 0 and handle.handle_type == FILEID_INO64_GEN:
        at.node = <uint64_t>room[2] << 32 | room[3]
    if statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &found) < 0:
        at.error = errno
        return
    at.is_directory = found.stx_mode & S_IFMT == S_IFDIR
    at.major, at.minor = found.stx_dev_major, found.stx_dev_minor


cdef void _look_up(void *argument) noexcept nogil:
    """Fill in a place by its path."""
    cdef place *at = <place *>argument
    cdef int fd = _open(at.path)
    if fd < 0:
        at.error = -fd
        return
    _identify(fd, at)
    close(fd)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a path leads, or a descriptor."""

    node: int  # the node id that the kernel has for it; 0: it is not on FUSE
    mount_id: int  # in our mountinfo; -1: the file system has no handles
    is_directory: bool
    device: str  # MAJOR:MINOR of the file system


cdef _found(const place *at):
    return Place(at.node, at.mount_id, at.is_directory != 0, f"{at.major}:{at.minor}")


def _check(int error, str path) -> None:
    if error != 0:
        raise OSError(error, os.strerror(error), path)


def place_of(str path) -> Place:
    """Look a path up. File systems are asked for the names on the way, and for no more. Raises OSError."""
    cdef bytes name = os.fsencode(path)
    cdef place at
    cdef int status
    memset(&at, 0, sizeof(at))
    at.path = name
    with nogil:
        status = call_apart(_look_up, &at, -1, -1)
    _check(-status or at.error, path)
    return _found(&at)


def place_of_fd(int fd) -> Place:
    """The same for an O_PATH descriptor, or one of fsmount(2). Raises OSError."""
    cdef place at
    memset(&at, 0, sizeof(at))
    with nogil:
        _identify(fd, &at)
    _check(at.error, f"descriptor {fd}")
    return _found(&at)


# ---- mounting and unmounting -----------------------------------------------------------------------------------------

cdef struct move:                   # of a mount that is nowhere yet
    const char *path
    int mounted
    int error


cdef void _attach(void *argument) noexcept nogil:
    cdef move *to = <move *>argument
    cdef int fd = _open(to.path)
    if fd < 0:
        to.error = -fd
        return
    if syscall(SYS_MOVE_MOUNT, to.mounted, b"", fd, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH) < 0:
        to.error = errno
    close(fd)


def attach(int mounted, str path) -> None:
    """Mount what fsmount(2) gave on a path. Raises OSError; EINTR: it may be there."""
    cdef bytes name = os.fsencode(path)
    cdef move to
    cdef int status
    to.path = name
    to.mounted = mounted
    to.error = 0
    with nogil:
        status = call_apart(_attach, &to, mounted, -1)
    _check(-status or to.error, path)


cdef struct leaving:                # a mount that is to go
    place at
    int mount_id
    int proc                        # descriptor of /proc


cdef void _take_away(void *argument) noexcept nogil:
    """Detach a mount from where it is, if it is the topmost one there."""
    cdef leaving *mount = <leaving *>argument
    cdef char text[TEXT_ROOM]
    cdef int fd = _open(mount.at.path)
    if fd < 0:
        return
    _identify(fd, &mount.at)
    if mount.at.mount_id == mount.mount_id and fchdir(mount.proc) == 0:
        snprintf(text, sizeof(text), b"self/fd/%d", fd)
        umount2(text, MNT_DETACH)
    close(fd)


def take_away(str path, int mount_id) -> None:
    """Unmount what is mounted on a path, as umount -l does, if it is that mount.

    Raises OSError if no process can be had.
    """
    cdef bytes name = os.fsencode(path)
    cdef leaving mount
    cdef int status
    memset(&mount, 0, sizeof(mount))
    mount.at.path = name
    mount.mount_id = mount_id
    mount.proc = PROC
    with nogil:
        status = call_apart(_take_away, &mount, mount.proc, -1)
    _check(-status, path)
