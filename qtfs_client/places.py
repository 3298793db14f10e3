"""The qtfs mounts of this machine, and which paths lie on them: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from qtfs_common import mountinfo
from qtfs_common.mountinfo import Mount

TYPE = b"fuse.qtfs"


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


#: Whether a mount has a control socket. Those that stand for the server's mounts (`-o propagate`) have none.
Served = Callable[[QtfsMount], bool]


def _qtfs_mount(mount: Mount) -> QtfsMount:
    return QtfsMount(mount.path, f"{mount.major}:{mount.minor}", mount.root, mount.source)


def _below(path: bytes, mount: Mount) -> bytes:
    """A path on a mount, below the root of the session."""
    return (mount.root.strip(b"/") + b"/" + path[len(mount.path.rstrip(b"/")) :].strip(b"/")).strip(b"/")


def _shown_by(mount: Mount, table: dict[int, Mount], served: Served) -> Mount:
    """The mount whose daemon shows one of the server's mounts as `mount`, or that itself.

    That is the one it stands on, if it has no control socket and shows what would be seen there without it.
    """
    while not served(_qtfs_mount(mount)):
        outer = table.get(mount.parent)
        if outer is None or outer.type != TYPE:
            break
        if outer.source.rstrip(b"/") + b"/" + _below(mount.path, outer) != mount.source:
            break
        mount = outer
    return mount


def qtfs_mounts(served: Served, table: dict[int, Mount] | None = None) -> list[QtfsMount]:
    """All qtfs mounts, but for those that stand for a mount of the server."""
    table = mountinfo.read() if table is None else table
    ours = [mount for mount in table.values() if mount.type == TYPE]
    return [_qtfs_mount(mount) for mount in ours if _shown_by(mount, table, served) is mount]


def _covers(point: bytes, path: bytes) -> bool:
    return path == point or mountinfo.is_below(path, point)


def place_of(path: bytes, served: Served, table: dict[int, Mount] | None = None) -> Place | None:
    """Where a path, absolute and without symbolic links, lies on a qtfs mount; None if it does not."""
    table = mountinfo.read() if table is None else table
    on = None
    for mount in table.values():  # later ones above earlier ones
        if _covers(mount.path, path) and (on is None or len(mount.path) >= len(on.path)):
            on = mount
    if on is None or on.type != TYPE:
        return None
    shown = _shown_by(on, table, served)
    return Place(_qtfs_mount(shown), _below(path, shown))


def real_path(path: str | bytes) -> bytes:
    """A path as place_of wants it; what does not exist is taken as it stands."""
    return os.path.realpath(os.fsencode(path))
