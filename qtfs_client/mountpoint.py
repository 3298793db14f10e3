"""Looks at the mount point before and after mounting."""

from __future__ import annotations

import errno
import os
import re
import subprocess

from qtfs_client.drivers import MountError
from qtfs_client.options import MountOptions

_TYPE = "fuse.qtfs"
#: Kept open, for mount.qtfs -N may enter a mount namespace whose /proc knows us by another pid, or not at all.
PROC = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
_OCTAL = re.compile(r"\\([0-7]{3})")


def check_mountpoint(mountpoint: str) -> None:
    """See that a directory can be mounted on; what a dead daemon left there is unmounted first. Raises MountError."""
    try:
        found = os.stat(mountpoint)
        if _is_ours(mountpoint):
            os.statvfs(mountpoint)  # attributes may still be cached
    except OSError as error:
        # While its daemon still dies, a mount says ECONNABORTED.
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED) or not _is_ours(mountpoint):
            raise MountError(f"mount point {mountpoint}: {error.strerror}") from error
        # Its processes get ENOTCONN already; nothing is lost.
        if complaint := _unmount_lazily(mountpoint):
            reason = f"the mount of a dead daemon is in the way: {complaint}"
            raise MountError(f"mount point {mountpoint}: {reason}") from error
        check_mountpoint(mountpoint)
        return
    if not os.path.isdir(mountpoint):
        raise MountError(f"mount point {mountpoint}: not a directory")
    if _is_ours(mountpoint) and os.stat(os.path.dirname(mountpoint)).st_dev != found.st_dev:
        raise MountError(f"mount point {mountpoint} is busy: a qtfs file system is mounted there already")


def _is_ours(mountpoint: str) -> bool:
    """Whether the topmost mount on a path is a qtfs one: proc_pid_mountinfo(5)."""
    top = ""
    with open(os.open("self/mountinfo", os.O_RDONLY, dir_fd=PROC), errors="surrogateescape") as file:
        mounts = file.read().splitlines()
    for line in mounts:
        fields, _, source = line.partition(" - ")
        if _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields.split(" ")[4]) == mountpoint:
            top = source.split(" ")[0]
    return top == _TYPE


def _unmount_lazily(mountpoint: str) -> str:
    """As umount -l; what it complained of, or nothing."""
    command = ["umount", "-l", mountpoint] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", mountpoint]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() or f"status {done.returncode}" if done.returncode != 0 else ""


def wait_for_answer(options: MountOptions) -> None:
    """Return once the server has answered through the mount. Raises MountError, and then nothing is mounted."""
    try:
        os.statvfs(options.mountpoint)
    except OSError as error:
        if _is_ours(options.mountpoint):
            _unmount_lazily(options.mountpoint)
        raise MountError(f"{options.mountpoint}: mounted, but it does not answer: {error.strerror}") from error
    if not _is_ours(options.mountpoint):
        raise MountError(f"{options.mountpoint}: the daemon ended at once; the system's log may say why")
