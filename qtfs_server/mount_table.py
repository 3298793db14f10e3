"""The mounts of this machine that a session can see: proc_pid_mountinfo(5) from the session's root downwards."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from qtfs_common.remote_calls import MountRecord

_MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-7]{3})")
_MOST_TEXT = 4095


class Mounted(NamedTuple):
    """A line of mountinfo; `path` is absolute."""

    id: int
    parent: int
    major: int
    minor: int
    path: bytes
    options: bytes
    type: bytes
    source: bytes
    super_options: bytes


def _plain(text: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text)


def _mounted(line: bytes) -> Mounted:
    left, _, right = line.partition(b" - ")
    mount_id, parent, device, _root, path, options, *_ = left.split(b" ")
    # A source may be empty, and then two blanks follow each other.
    type_, source, super_options = right.split(b" ", 2)
    major, _, minor = device.partition(b":")
    numbers = (int(mount_id), int(parent), int(major), int(minor))
    return Mounted(*numbers, _plain(path), options, _plain(type_), _plain(source), super_options)


def all_mounts() -> list[Mounted]:
    """Every mount of this mount namespace that the engine's root leads to."""
    return [_mounted(line) for line in _MOUNTINFO.read_bytes().splitlines()]


def _lies_below(path: bytes, directory: bytes) -> bool:
    return path.startswith(directory.rstrip(b"/") + b"/") and path != directory


def _uncovered(children: list[Mounted]) -> list[Mounted]:
    """Those of a mount's children that no other one of them hides."""
    found: list[Mounted] = []
    # What lies below a path follows it in this order.
    for child in sorted(children, key=lambda child: child.path + b"/"):
        if not (found and _lies_below(child.path, found[-1].path)):
            found.append(child)
    return found


def visible_mounts(root_mount: int, root: bytes, mounts: list[Mounted]) -> list[Mounted]:
    """The mounts that lookups meet which begin at the directory `root`, of the mount `root_mount`; parents come first.

    Where mounts are stacked on one directory, only the topmost is there.
    """
    children = defaultdict(list)
    for mount in mounts:
        children[mount.parent].append(mount)
    found: list[Mounted] = []
    below = deque(_uncovered([child for child in children[root_mount] if _lies_below(child.path, root)]))
    while below:
        mount = below.popleft()
        top = next((child for child in children[mount.id] if child.path == mount.path), None)
        if top is not None:
            below.appendleft(top)
            continue
        found.append(mount)
        below.extend(_uncovered(children[mount.id]))
    return found


def record(mount: Mounted, root: bytes, ids: Mapping[int, int]) -> MountRecord:
    """A mount as LIST_MOUNTS tells of it; `ids` are ids that are never used again, by the numbers of mountinfo."""
    path = mount.path[len(root.rstrip(b"/")) + 1 :]
    texts = (path, mount.type, mount.source, mount.options, mount.super_options)
    numbers = (ids[mount.id], ids.get(mount.parent, 0), mount.major, mount.minor)
    return MountRecord(*numbers, *(text[:_MOST_TEXT] for text in texts))
