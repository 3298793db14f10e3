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


def place_of(path: bytes, mountinfo: Path = _MOUNTINFO) -> Place | None:
    """Where a path, absolute and without symbolic links, lies on a qtfs mount; None if it does not."""
    on = (b"", b"", None)
    for point, kind, mount in _read(mountinfo):
        if _covers(point, path) and len(point) >= len(on[0]):
            on = point, kind, mount  # type: ignore[assignment]
    point, kind, found = on
    if found is None or kind != TYPE:
        return None
    below = found.root.strip(b"/") + b"/" + path[len(point.rstrip(b"/")) :].strip(b"/")
    return Place(found, below.strip(b"/"))


def real_path(path: str | bytes) -> bytes:
    """A path as place_of wants it; what does not exist is taken as it stands."""
    return os.path.realpath(os.fsencode(path))
