"""The rare operations on the server's mounts as records: packed and unpacked here for both sides.

doc/protocol.md is the specification. What a peer sent is unpacked by the `parse` functions, which raise ValueError for
whatever does not fit; nothing is looked up or checked against the machine here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_LIST = struct.Struct("<QII")
_LISTED = struct.Struct("<QQIIIIIIII")
_STALE_NAME = struct.Struct("<QII")

_MOST_TEXT = 4095  # PATH_MAX of linux/limits.h, less the NUL


class ListCall(NamedTuple):
    """A LIST_MOUNTS: `size` bytes of the listing `token` (0: any), from record `first` on."""

    token: int
    first: int
    size: int


class MountRecord(NamedTuple):
    """A mount of the server as proc_pid_mountinfo(5) has it; `path` is relative to the session's root."""

    id: int
    parent: int
    major: int
    minor: int
    path: bytes
    type: bytes
    source: bytes
    options: bytes
    super_options: bytes


class MountPage(NamedTuple):
    """A part of a listing that has `total` records in all."""

    token: int
    total: int
    mounts: tuple[MountRecord, ...]


class _Texts:
    """Takes texts of stated lengths from the rest of a message, which must hold exactly them."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def take(self, size: int) -> bytes:
        text = self._data[self._at : self._at + size]
        if len(text) != size or size > _MOST_TEXT or b"\0" in text:
            raise ValueError("a text that is too short, too long, or holds a NUL")
        self._at += size
        return text

    def record(self, record: struct.Struct) -> tuple[int, ...]:
        values = _unpack(record, self._data[self._at : self._at + record.size])
        self._at += record.size
        return values

    def align(self) -> None:
        self._at = (self._at + 7) & ~7

    @property
    def left(self) -> int:
        return len(self._data) - self._at


def _unpack(record: struct.Struct, data: bytes) -> tuple[int, ...]:
    try:
        return record.unpack(data)
    except struct.error as error:
        raise ValueError(str(error)) from None


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


# ------------------------------------------------------------------------------------------------------------ mounts


def pack_list(call: ListCall) -> bytes:
    """The body of a LIST_MOUNTS."""
    return _LIST.pack(*call)


def parse_list(data: bytes) -> ListCall:
    """The body of a LIST_MOUNTS that a peer sent."""
    return ListCall(*_unpack(_LIST, data))


def pack_mount_record(mount: MountRecord) -> bytes:
    """One record of the reply."""
    texts = mount[4:]
    head = _LISTED.pack(mount.id, mount.parent, mount.major, mount.minor, *map(len, texts), 0)
    return _padded(head + b"".join(texts))


def pack_page(token: int, total: int, records: list[bytes]) -> bytes:
    """The reply of a LIST_MOUNTS."""
    return _LIST.pack(token, len(records), total) + b"".join(records)


def parse_page(data: bytes) -> MountPage:
    """The reply of a LIST_MOUNTS that a peer sent."""
    token, count, total = _unpack(_LIST, data[: _LIST.size])
    rest = _Texts(data, _LIST.size)
    mounts = []
    while rest.left:
        mount_id, parent, major, minor, *sizes, _ = rest.record(_LISTED)
        mounts.append(MountRecord(mount_id, parent, major, minor, *map(rest.take, sizes)))
        rest.align()
    if len(mounts) != count:
        raise ValueError("not as many mounts as it says")
    return MountPage(token, total, tuple(mounts))


def pack_stale_name(directory: int, name: bytes) -> bytes:
    """One record of MOUNTS_CHANGED."""
    return _padded(_STALE_NAME.pack(directory, len(name), 0) + name)


def stale_names(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (directory, name) pairs of a MOUNTS_CHANGED that a peer sent."""
    rest = _Texts(data, 0)
    while rest.left:
        directory, name_bytes, _ = rest.record(_STALE_NAME)
        yield directory, rest.take(name_bytes)
        rest.align()
