"""The rare operations on the server's mounts and processes as records: packed and unpacked here for both sides.

doc/protocol.md, section 10, is the specification. What a peer sent is unpacked by the `parse` functions, which raise
ValueError for whatever does not fit; nothing is looked up or checked against the machine here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum, IntFlag
from typing import NamedTuple

_MOUNT = struct.Struct("<IIQQIIIIII")
_OPTION = struct.Struct("<IIII")
_UMOUNT = struct.Struct("<II")
_KILL = struct.Struct("<iIQ")
_AFFINITY = struct.Struct("<iIQ")
_PAGE = struct.Struct("<II")
_PROCESS = struct.Struct("<IIIIQqII")
_LIST = struct.Struct("<QII")
_LISTED = struct.Struct("<QQIIIIIIII")
_STALE_NAME = struct.Struct("<QII")

#: Bytes of a processor mask: 8192 processors, as many as Linux can be built for.
MOST_MASK_BYTES = 1024
MOST_OPTIONS = 256
_MOST_TEXT = 4095  # PATH_MAX of linux/limits.h, less the NUL


class Action(IntEnum):
    """What SYSMOUNT is to do."""

    NEW = 0
    BIND = 1
    MOVE = 2
    REMOUNT = 3
    PROPAGATE = 4


class MountFlag(IntFlag):
    """sysmount_request.flags."""

    #: BIND: with the mounts below it. REMOUNT with BIND_ONLY: the attributes of the mounts below too.
    RECURSIVE = 1
    #: Unmount it, lazily, when the session ends.
    LAZY_CLEANUP = 2
    #: `source` is a path below the session's root.
    SOURCE_BELOW = 4
    #: REMOUNT: the attributes of the mount, and not its file system.
    BIND_ONLY = 8


class OptionKind(IntEnum):
    """What the value of an option is."""

    FLAG = 0
    TEXT = 1
    #: A path below the session's root.
    PATH_BELOW = 2
    #: A path of the server.
    PATH = 3


class Option(NamedTuple):
    """One option of a file system; the kind says what `value` is."""

    kind: OptionKind
    name: bytes
    value: bytes = b""


class MountCall(NamedTuple):
    """A SYSMOUNT. `target` is a path below the session's root, empty for the root itself."""

    action: Action
    target: bytes
    source: bytes = b""
    type: bytes = b""
    flags: MountFlag = MountFlag(0)
    attributes_set: int = 0
    attributes_clear: int = 0
    propagation: int = 0
    options: tuple[Option, ...] = ()


class UmountCall(NamedTuple):
    """A SYSUMOUNT; `flags` are MNT_* of umount2(2)."""

    target: bytes
    flags: int = 0


class KillCall(NamedTuple):
    """A KILL; `start` is a ProcessRecord's, or 0."""

    pid: int
    signal: int
    start: int = 0


class AffinityCall(NamedTuple):
    """A SETAFFINITY, or a GETAFFINITY without a mask. Processor N is bit N of the mask, lowest first."""

    pid: int
    start: int = 0
    mask: bytes = b""


class ProcessRecord(NamedTuple):
    """A process of the server. `start`, in clock ticks since boot, tells it from later ones with its pid."""

    pid: int
    parent: int
    uid: int
    state: str
    start: int
    started_s: int
    name: bytes


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

    def end(self) -> None:
        if self.left != 0:
            raise ValueError("bytes are left over")


def _unpack(record: struct.Struct, data: bytes) -> tuple[int, ...]:
    try:
        return record.unpack(data)
    except struct.error as error:
        raise ValueError(str(error)) from None


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


# ---------------------------------------------------------------------------------------------------------- requests


def pack_mount(call: MountCall) -> bytes:
    """The body of a SYSMOUNT."""
    head = _MOUNT.pack(
        *(call.action, call.flags, call.attributes_set, call.attributes_clear, call.propagation),
        *(len(call.type), len(call.source), len(call.target), len(call.options), 0),
    )
    options = (_OPTION.pack(o.kind, len(o.name), len(o.value), 0) + o.name + o.value for o in call.options)
    return b"".join((head, call.type, call.source, call.target, *options))


def parse_mount(data: bytes) -> MountCall:
    """The body of a SYSMOUNT that a peer sent."""
    action, flags, wanted, unwanted, propagation, *sizes, count, _ = _unpack(_MOUNT, data[: _MOUNT.size])
    rest = _Texts(data, _MOUNT.size)
    type_, source, target = map(rest.take, sizes)
    if count > MOST_OPTIONS or flags & ~sum(MountFlag):
        raise ValueError("more options than there can be, or an unknown flag")
    options = tuple(_take_option(rest) for _ in range(count))
    rest.end()
    return MountCall(Action(action), target, source, type_, MountFlag(flags), wanted, unwanted, propagation, options)


def _take_option(rest: _Texts) -> Option:
    kind, name_bytes, value_bytes, _ = rest.record(_OPTION)
    return Option(OptionKind(kind), rest.take(name_bytes), rest.take(value_bytes))


def pack_umount(call: UmountCall) -> bytes:
    """The body of a SYSUMOUNT."""
    return _UMOUNT.pack(call.flags, 0) + call.target


def parse_umount(data: bytes) -> UmountCall:
    """The body of a SYSUMOUNT that a peer sent."""
    flags, _ = _unpack(_UMOUNT, data[: _UMOUNT.size])
    return UmountCall(_Texts(data, _UMOUNT.size).take(len(data) - _UMOUNT.size), flags)


def pack_kill(call: KillCall) -> bytes:
    """The body of a KILL."""
    return _KILL.pack(call.pid, call.signal, call.start)


def parse_kill(data: bytes) -> KillCall:
    """The body of a KILL that a peer sent."""
    return KillCall(*_unpack(_KILL, data))


def pack_affinity(call: AffinityCall) -> bytes:
    """The body of a SETAFFINITY or GETAFFINITY."""
    return _AFFINITY.pack(call.pid, len(call.mask), call.start) + call.mask


def parse_affinity(data: bytes) -> AffinityCall:
    """The body of a SETAFFINITY or GETAFFINITY that a peer sent."""
    pid, mask_bytes, start = _unpack(_AFFINITY, data[: _AFFINITY.size])
    mask = data[_AFFINITY.size :]
    if len(mask) != mask_bytes or mask_bytes > MOST_MASK_BYTES:
        raise ValueError("a mask of another size")
    return AffinityCall(pid, start, mask)


def mask_of(cpus: Iterable[int]) -> bytes:
    """The mask of processor numbers. ValueError: there are not that many anywhere."""
    number = 0
    for cpu in cpus:
        if not 0 <= cpu < MOST_MASK_BYTES * 8:
            raise ValueError(f"{cpu} is no processor")
        number |= 1 << cpu
    return number.to_bytes((number.bit_length() + 63) // 64 * 8, "little")


def cpus_of(mask: bytes) -> set[int]:
    """The processor numbers of a mask."""
    number = int.from_bytes(mask, "little")
    return {bit for bit in range(number.bit_length()) if number >> bit & 1}


# --------------------------------------------------------------------------------------------------------- processes


def pack_processes(after: int, size: int) -> bytes:
    """The body of a PROCESSES: pids above `after`, in a reply of at most `size` bytes."""
    return _PAGE.pack(after, size)


def parse_processes(data: bytes) -> tuple[int, int]:
    """(after, size) of a PROCESSES that a peer sent."""
    after, size = _unpack(_PAGE, data)
    return after, size


def pack_process(process: ProcessRecord) -> bytes:
    """One record of the reply."""
    head = (process.pid, process.parent, process.uid, ord(process.state), process.start, process.started_s)
    return _padded(_PROCESS.pack(*head, len(process.name), 0) + process.name)


def process_records(data: bytes) -> Iterator[ProcessRecord]:
    """The records of a PROCESSES reply."""
    rest = _Texts(data, 0)
    while rest.left:
        pid, parent, uid, state, start, started_s, name_bytes, _ = rest.record(_PROCESS)
        if state > 0x7F:
            raise ValueError("a state that is no letter")
        yield ProcessRecord(pid, parent, uid, chr(state), start, started_s, rest.take(name_bytes))
        rest.align()


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
