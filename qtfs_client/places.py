"""The qtfs mounts of this machine, and which paths lie on them: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

TYPE = b"fuse.qtfs"
_MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-7]{3})")


class QtfsMount(NamedTuple):
    """A mount here. `device` is MAJOR:MINOR; `root` is the part of the server's directory `source` that is mounted."""

    point: bytes
    device: str
    root: bytes
    source: bytes


class Place(NamedTuple):
    """A path on a qtfs mount, and as the server knows it: below the root of the mount's session."""

    mount: QtfsMount
    below: bytes


def _plain(text: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text)


def _read(mountinfo: Path) -> list[tuple[bytes, bytes, QtfsMount]]:
    """(mount point, type, the mount) of all mounts, later ones above earlier ones."""
    found = []
    for line in mountinfo.read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        _id, _parent, device, root, point, *_ = left.split(b" ")
        kind, source, _options = right.split(b" ", 2)
        plain = _plain(point)
        found.append((plain, kind, QtfsMount(plain, device.decode(), _plain(root), _plain(source))))
    return found


def qtfs_mounts(mountinfo: Path = _MOUNTINFO) -> list[QtfsMount]:
    """All qtfs mounts."""
    return [mount for _, kind, mount in _read(mountinfo) if kind == TYPE]


def _covers(point: bytes, path: bytes) -> bool:
    return path == point or path.startswith(point.rstrip(b"/") + b"/")


def _covering(path: bytes, mounts: list[tuple[bytes, bytes, QtfsMount]]) -> QtfsMount | None:
    """The mount that a path lies on, if that is a qtfs one."""
    on: tuple[bytes, bytes, QtfsMount | None] = (b"", b"", None)
    for point, kind, mount in mounts:
        if _covers(point, path) and len(point) >= len(on[0]):
            on = point, kind, mount
    return on[2] if on[1] == TYPE else None


def _main_mount(mount: QtfsMount, mounts: list[tuple[bytes, bytes, QtfsMount]]) -> QtfsMount:
    """The mount whose daemon serves this one: mounts made by -o propagate lie on it, and show what it would show."""
    above = _covering(os.path.dirname(mount.point), mounts)
    if above is None or above == mount or (above.root, mount.root) != (b"/", b"/"):
        return mount
    if mount.source != os.path.join(above.source, os.path.relpath(mount.point, above.point)):
        return mount
    return _main_mount(above, mounts)


def place_of(path: bytes, mountinfo: Path = _MOUNTINFO) -> Place | None:
    """Where a path, absolute and without symbolic links, lies on a qtfs mount; None if it does not."""
    mounts = _read(mountinfo)
    found = _covering(path, mounts)
    if found is None:
        return None
    found = _main_mount(found, mounts)
    below = found.root.strip(b"/") + b"/" + path[len(found.point.rstrip(b"/")) :].strip(b"/")
    return Place(found, below.strip(b"/"))


def real_path(path: str | bytes) -> bytes:
    """A path as place_of wants it; what does not exist is taken as it stands."""
    return os.path.realpath(os.fsencode(path))
