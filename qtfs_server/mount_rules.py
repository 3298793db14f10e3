"""What the whitelist says of mounts that clients ask for.

A mount makes files appear under another path, and the path is what the whitelist judges. So, besides [Mount] for the
place and for what is mounted there, one rule runs through all of this: what is mounted must itself be allowed every
type of operation that the place is allowed. Otherwise a bind mount of /etc below a writable directory would make /etc
writable. The same for pseudo file systems, which are judged by where they usually are: proc by /proc.
"""

from __future__ import annotations

import errno
import logging
import os
import re

from qtfs_common import mountinfo
from qtfs_common.remote_calls import Option, OptionKind
from qtfs_common.whitelist import Type
from qtfs_server.policy import deny, granted, leads_to_rule, names_device

log = logging.getLogger(__name__)

_MOUNT = 1 << Type.MOUNT
_ON_FILES = sum(1 << kind for kind in Type if kind not in (Type.MOUNT, Type.KILL, Type.UDSCONNECT))

#: Types that hold only what is put there, or what their options name.
_PLAIN = frozenset((b"tmpfs", b"ramfs", b"overlay"))
#: Types whose files another machine has; their source is its name, and their options are as that machine needs them.
_NETWORK = frozenset((b"nfs", b"nfs4", b"cifs", b"smb3", b"ceph"))
#: Types by which the kernel shows itself, and the place whose rules hold for them.
_PSEUDO = {
    b"proc": b"/proc",
    b"sysfs": b"/sys",
    b"cgroup": b"/sys/fs/cgroup",
    b"cgroup2": b"/sys/fs/cgroup",
    b"bpf": b"/sys/fs/bpf",
    b"pstore": b"/sys/fs/pstore",
    b"fusectl": b"/sys/fs/fuse/connections",
    b"debugfs": b"/sys/kernel/debug",
    b"tracefs": b"/sys/kernel/tracing",
    b"securityfs": b"/sys/kernel/security",
    b"configfs": b"/sys/kernel/config",
    b"efivarfs": b"/sys/firmware/efi/efivars",
    b"binfmt_misc": b"/proc/sys/fs/binfmt_misc",
    b"devtmpfs": b"/dev",
    b"devpts": b"/dev/pts",
    b"mqueue": b"/dev/mqueue",
    b"hugetlbfs": b"/dev/hugepages",
}
#: Options that are paths: overlayfs, and devices beside the source.
_PATHS = frozenset(
    (b"lowerdir", b"lowerdir+", b"datadir+", b"upperdir", b"workdir", b"journal_path", b"logdev", b"rtdev", b"device")
)
#: A path inside of the file system.
_INNER_PATHS = frozenset((b"subvol",))
#: `source` is not an option here, and release_agent= names a program that the kernel runs.
_FORBIDDEN = frozenset((b"source", b"release_agent"))
_NAME = re.compile(rb"[A-Za-z0-9_.:+-]{1,64}")


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def path_of(fd: int) -> bytes:
    """The path that the kernel knows for a descriptor."""
    return os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))


def _refuse(path: bytes) -> OSError:
    deny(Type.MOUNT)
    log.info("whitelist: %s: a mount was denied", os.fsdecode(path))
    return _error(errno.EPERM)


def check_place(path: bytes) -> None:
    """EPERM unless something may be mounted or unmounted there."""
    if not granted(path) & _MOUNT:
        raise _refuse(path)


def check_source(source: bytes, target: bytes) -> None:
    """EPERM unless `source` may be mounted, and what is allowed at `target` is allowed there and everywhere below."""
    of_source = granted(source)
    if not of_source & _MOUNT or granted(target) & ~of_source & _ON_FILES or leads_to_rule(source):
        raise _refuse(source)


def check_type(type_: bytes, target: bytes) -> None:
    """EINVAL for what is no name of a file system, EPERM for a pseudo file system whose own place is allowed less."""
    if not _NAME.fullmatch(type_):
        raise _error(errno.EINVAL)
    if type_ in _PSEUDO:
        check_source(_PSEUDO[type_], target)


def keeps_devices(source: bytes) -> bool:
    """Whether device nodes of what is mounted may be opened there: elsewhere a client may have made them."""
    return source.startswith(b"/dev/") and names_device(source)


def takes_device(type_: bytes) -> bool:
    """Whether a file system, whose module is loaded, is on a block device. EPERM: one that clients may not mount."""
    if type_ in _PLAIN or type_ in _NETWORK or type_ in _PSEUDO:
        return False
    with open("/proc/filesystems", "rb") as file:
        with_device = {line.strip() for line in file if not line.startswith(b"nodev")}
    if type_ not in with_device:
        # fuse, autofs, 9p and their like take descriptors of ours for options.
        raise _refuse(type_)
    return True


def check_options(type_: bytes, options: tuple[Option, ...]) -> None:
    """EINVAL for names that cannot be; EPERM for an option that leads somewhere else than the rules know."""
    for option in options:
        if not _NAME.fullmatch(option.name):
            raise _error(errno.EINVAL)
        is_path = option.kind in (OptionKind.PATH, OptionKind.PATH_BELOW)
        hides_path = b"/" in option.value and type_ not in _NETWORK and option.name not in _INNER_PATHS
        if option.name in _FORBIDDEN or is_path != (option.name in _PATHS) or (hides_path and not is_path):
            raise _refuse(option.name)


def check_sharers(mount_id: int) -> None:
    """EPERM if a mount's file system is also where clients may not mount: what is changed in it would change there."""
    mounts = mountinfo.read()
    devices = {(mount.major, mount.minor) for mount in mounts.values() if mount.id == mount_id}
    for mount in mounts.values():
        if (mount.major, mount.minor) in devices:
            check_place(mount.path)
