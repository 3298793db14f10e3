"""The records of doc/protocol.md as tests see them: packed by `struct`, unpacked into named tuples.

Written from the specification, not from `qtfs_common.protocol`: a test of the wire must not share its mistakes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

ROOT = 1
EVENT_SLOT = 0xFFFFFFFF
END_OF_FILE = (1 << 63) - 1
HEADER_BYTES = 32

_HEADER = struct.Struct("<IHHiIQQ")
_CALLER = struct.Struct("<QIIIHH")
_ATTRIBUTES = struct.Struct("<QQQqqqIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQQ")
_OPENED = struct.Struct("<QII")
_DIRENT = struct.Struct("<QQII")


class Who(NamedTuple):
    """The caller that a request speaks for."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    umask: int = 0o022
    pid: int = 1


ADMIN = Who()
NOBODY = Who(65534, 65534)


class Attributes(NamedTuple):
    """struct fuse_attr."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


class Entry(NamedTuple):
    """What a name leads to."""

    node: int
    generation: int
    node_flags: int
    attr: Attributes


class Opened(NamedTuple):
    """A handle, and what the client may do with what it cached."""

    handle: int
    flags: int


class Dirent(NamedTuple):
    """One record of a directory; `entry` is None in plain listings and for names that carry none."""

    ino: int
    offset: int
    type: int
    name: bytes
    entry: Entry | None


class Lock(NamedTuple):
    """Reply of GETLK; type 2 is "nobody is in the way"."""

    start: int
    end: int
    type: int
    pid: int


class Reply(NamedTuple):
    """A message as it was received."""

    op: int
    flags: int
    error: int
    slot: int
    sequence: int
    tag: int
    body: bytes


def message(op: int, body: bytes = b"", *, flags: int = 0, slot: int = 0, sequence: int = 0, tag: int = 0) -> bytes:
    """A whole message with an honest length."""
    return _HEADER.pack(HEADER_BYTES + len(body), op, flags, 0, slot, sequence, tag) + body


def header(
    length: int, op: int, flags: int = 0, error: int = 0, slot: int = 0, sequence: int = 0, tag: int = 0
) -> bytes:
    """A header alone, honest or not."""
    return _HEADER.pack(length, op, flags, error, slot, sequence, tag)


def read_header(data: bytes) -> tuple[int, ...]:
    """length, op, flags, error, slot, sequence, tag."""
    return _HEADER.unpack_from(data)


def caller(node: int, who: Who = ADMIN) -> bytes:
    """What every file operation begins with."""
    groups = struct.pack(f"<{len(who.groups)}I", *who.groups)
    padding = -len(groups) % 8
    fixed = _CALLER.pack(node, who.uid, who.gid, who.pid, who.umask, len(who.groups))
    return fixed + groups + bytes(padding)


def attributes(data: bytes, offset: int = 0) -> Attributes:
    return Attributes._make(_ATTRIBUTES.unpack_from(data, offset))


def entry(data: bytes, offset: int = 0) -> Entry:
    node, generation, flags, _, _ = _ENTRY.unpack_from(data, offset)
    return Entry(node, generation, flags, attributes(data, offset + _ENTRY.size))


def opened(data: bytes, offset: int = 0) -> Opened:
    handle, flags, _ = _OPENED.unpack_from(data, offset)
    return Opened(handle, flags)


def dirents(data: bytes, plus: bool) -> Iterator[Dirent]:
    """The records of a READDIR reply."""
    at = 0
    while at < len(data):
        found = None
        start = at
        if plus:
            found = entry(data, at)
            at += 128
        ino, offset, length, kind = _DIRENT.unpack_from(data, at)
        at += _DIRENT.size
        name = data[at : at + length]
        at += length
        padding = -(at - start) % 8
        assert data[at : at + padding] == bytes(padding), "records are padded with zeros"
        at += padding
        yield Dirent(ino, offset, kind, name, found if found is not None and found.node else None)
