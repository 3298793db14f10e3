"""Looks at the mount point before and after mounting."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess

from qtfs_client.drivers import MountError
from qtfs_client.options import MountOptions
from qtfs_common import mountinfo

_TYPE = b"fuse.qtfs"
# <sys/mount.h>
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)
#: Kept open, for mount.qtfs -N may enter a mount namespace whose /proc knows us by another pid, or not at all.
PROC = os.open("/proc", os.O_PATH | os.O_CLOEXEC)


def check_mountpoint(mountpoint: str) -> None:
    """See that a directory can be mounted on; what a dead daemon left there is unmounted first. Raises MountError.

    Nothing but a dead qtfs mount is taken away. Who works in it stays there, and gets ENOTCONN as before.
    """
    try:
        while _is_ours(mountpoint):
            if not _is_dead(mountpoint):
                raise MountError(f"mount point {mountpoint} is busy: a qtfs file system is mounted there already")
            if complaint := _unmount_lazily(mountpoint):
                reason = f"the mount of a dead daemon is in the way: {complaint}"
                raise MountError(f"mount point {mountpoint}: {reason}")
        os.stat(mountpoint)
    except OSError as error:
        raise MountError(f"mount point {mountpoint}: {error.strerror}") from error
    if not os.path.isdir(mountpoint):
        raise MountError(f"mount point {mountpoint}: not a directory")


def _is_dead(mountpoint: str) -> bool:
    """Whether nobody serves the file system there: not attributes, which may be cached."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        # While its daemon still dies, a mount says ECONNABORTED.
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def mount_id(path: str) -> int:
    """The number in our mountinfo of the mount that a path leads to, as only the kernel is asked: proc_pid_fdinfo(5).

    Raises OSError.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(os.open(f"self/fdinfo/{fd}", os.O_RDONLY, dir_fd=PROC)) as info:
            (line,) = (line for line in info if line.startswith("mnt_id:"))
        return int(line.split()[1])
    finally:
        os.close(fd)


def _mounted_on(mountpoint: str) -> mountinfo.Mount | None:
    """What is mounted on a path, and seen there. Raises OSError."""
    mount = mountinfo.read(PROC).get(mount_id(mountpoint))
    return mount if mount is not None and mount.path == os.fsencode(mountpoint) else None


def _is_ours(mountpoint: str) -> bool:
    """Whether a qtfs mount is seen on a path. Raises OSError."""
    return device_of(mountpoint) is not None


def device_of(mountpoint: str) -> str | None:
    """MAJOR:MINOR of the qtfs mount on a path; None if there is none. Raises OSError."""
    top = _mounted_on(mountpoint)
    return f"{top.major}:{top.minor}" if top is not None and top.type == _TYPE else None


def detach(mountpoint: str) -> None:
    """umount2(2) with MNT_DETACH of whatever is mounted there. Raises OSError.

    By no program: after mount.qtfs -N it would be one of that namespace.
    """
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), mountpoint)


def _unmount_lazily(mountpoint: str) -> str:
    """As umount -l; what it complained of, or nothing."""
    if os.geteuid() == 0:
        try:
            detach(mountpoint)
        except OSError as error:
            return error.strerror or str(error)
        return ""
    done = subprocess.run(["fusermount3", "-u", "-z", mountpoint], capture_output=True, text=True)
    return done.stderr.strip() or f"status {done.returncode}" if done.returncode != 0 else ""


def wait_for_answer(options: MountOptions) -> None:
    """Return once the server has answered through the mount. Raises MountError, and then nothing is mounted."""
    try:
        os.stat(options.mountpoint)
        os.statvfs(options.mountpoint)
        stands = _is_ours(options.mountpoint)
    except OSError as error:
        with contextlib.suppress(OSError):
            if _is_ours(options.mountpoint):
                _unmount_lazily(options.mountpoint)
        raise MountError(f"{options.mountpoint}: mounted, but it does not answer: {error.strerror}") from error
    if not stands:
        raise MountError(f"{options.mountpoint}: the daemon ended at once; the system's log may say why")
