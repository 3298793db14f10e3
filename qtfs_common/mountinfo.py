"""/proc/self/mountinfo, proc_pid_mountinfo(5), and which of its mounts one sees from a directory."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MOUNTINFO = "/proc/self/mountinfo"
_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """A line of the table. Paths are absolute; `root` is the part of the file system that is mounted."""

    id: int
    parent: int
    major: int
    minor: int
    root: bytes
    path: bytes
    options: bytes
    type: bytes
    source: bytes
    super_options: bytes


def _plain(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field) if b"\\" in field else field


def parse(line: bytes) -> Mount:
    """One line."""
    left, _, right = line.partition(b" - ")
    id_, parent, device, root, path, options = left.split(b" ")[:6]
    kind, source, super_options = right.split(b" ", 2)  # the source may be empty
    major, _, minor = device.partition(b":")
    return Mount(
        int(id_), int(parent), int(major), int(minor), _plain(root), _plain(path), options, kind, _plain(source),
        super_options,
    )


def read(proc: int | None = None) -> dict[int, Mount]:
    """The mount table as it is now, by id, in its order. `proc`: a descriptor of another /proc than our own."""
    with open(MOUNTINFO if proc is None else os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc), "rb") as table:
        # Not splitlines(): a path may hold a carriage return.
        return {mount.id: mount for mount in map(parse, table.read().split(b"\n")[:-1])}


def is_below(path: bytes, directory: bytes) -> bool:
    """Whether a path lies below a directory and is not that directory. Both are absolute and normalised."""
    return path.startswith(directory.rstrip(b"/") + b"/") and path != directory


def visible_below(mounts: Iterable[Mount], mount_id: int, directory: bytes) -> Iterator[Mount]:
    """Mounts that a walk down from a directory on mount `mount_id` comes to, parents first.

    Of mounts stacked on one directory that is the topmost. What covers the directory itself does not count.
    """
    on: dict[int, list[Mount]] = defaultdict(list)
    for mount in mounts:
        on[mount.parent].append(mount)
    waiting = [(mount_id, directory)]
    while waiting:
        parent, place = waiting.pop()
        for mount in on[parent]:
            if is_below(mount.path, place):
                top = _topmost(mount, on)
                yield top
                waiting.append((top.id, top.path))


def _topmost(mount: Mount, on: dict[int, list[Mount]]) -> Mount:
    """What is stacked on a mount's root, or the mount itself."""
    while above := next((m for m in on[mount.id] if m.path == mount.path), None):
        mount = above
    return mount


def changed_paths(old: dict[int, Mount], new: dict[int, Mount]) -> list[bytes]:
    """Where something was mounted, unmounted or moved between two tables."""
    before, after = ({(m.id, m.path) for m in table.values()} for table in (old, new))
    return sorted({os.path.normpath(path) for _, path in before ^ after})
