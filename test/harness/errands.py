"""Requests about the server's mounts and processes, from doc/protocol.md section 10; errors as OSError."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from harness.session import Session
from harness.wire import Who

NEW, BIND, MOVE, REMOUNT, PROPAGATE = range(5)
RECURSIVE, LAZY_CLEANUP, SOURCE_BELOW, BIND_ONLY = 1, 2, 4, 8
FLAG, TEXT, PATH_BELOW, PATH = range(4)
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 14, 1 << 18, 1 << 19, 1 << 20
MNT_FORCE, MNT_DETACH, MNT_EXPIRE = 1, 2, 4

Option = tuple[int, bytes, bytes]


class Listed(NamedTuple):
    """A mount_record."""

    id: int
    parent: int
    major: int
    minor: int
    path: bytes
    type: bytes
    source: bytes
    options: bytes
    super_options: bytes


class Process(NamedTuple):
    """A process_record."""

    pid: int
    parent: int
    uid: int
    state: str
    start: int
    started_s: int
    name: bytes


def mount_body(
    action: int,
    target: bytes,
    source: bytes = b"",
    type_: bytes = b"",
    *,
    flags: int = 0,
    wanted: int = 0,
    unwanted: int = 0,
    propagation: int = 0,
    options: Sequence[Option] = (),
) -> bytes:
    sizes = (len(type_), len(source), len(target), len(options), 0)
    head = struct.pack("<IIQQIIIIII", action, flags, wanted, unwanted, propagation, *sizes)
    rest = (struct.pack("<IIII", kind, len(name), len(value), 0) + name + value for kind, name, value in options)
    return b"".join((head, type_, source, target, *rest))


def mount(session: Session, *arguments: int | bytes, who: Who | None = None, slot: int = 0, **more: object) -> None:
    """SYSMOUNT, see mount_body."""
    body = mount_body(*arguments, **more)  # type: ignore[arg-type]
    assert session.call("SYSMOUNT", body, who=who, slot=slot) == b""


def tmpfs(session: Session, target: bytes, **more: object) -> None:
    mount(session, NEW, target, b"none", b"tmpfs", **more)


def umount(session: Session, target: bytes, flags: int = 0, who: Who | None = None) -> None:
    assert session.call("SYSUMOUNT", struct.pack("<II", flags, 0) + target, who=who) == b""


def _padded(size: int) -> int:
    return (size + 7) & ~7


def page(session: Session, token: int = 0, first: int = 0, size: int = 1 << 20) -> tuple[int, int, list[Listed]]:
    """One LIST_MOUNTS: (token, total, mounts)."""
    body = session.call("LIST_MOUNTS", struct.pack("<QII", token, first, size))
    assert len(body) <= size
    token, count, total = struct.unpack_from("<QII", body)
    at, found = 16, []
    for _ in range(count):
        *numbers, reserved = struct.unpack_from("<QQIIIIIIII", body, at)
        assert reserved == 0
        texts, end = [], at + 48
        for length in numbers[4:]:
            texts.append(body[end : end + length])
            end += length
        assert body[end : at + _padded(end - at)] == bytes(-(end - at) % 8)
        found.append(Listed(*numbers[:4], *texts))
        at += _padded(end - at)
    assert at == len(body)
    return token, total, found


def mounts(session: Session) -> list[Listed]:
    _, total, found = page(session)
    assert total == len(found)
    return found


def kill(session: Session, pid: int, number: int = 0, start: int = 0, who: Who | None = None) -> None:
    assert session.call("KILL", struct.pack("<iIQ", pid, number, start), who=who) == b""


def set_affinity(session: Session, pid: int, cpus: set[int], start: int = 0, who: Who | None = None) -> None:
    mask = sum(1 << cpu for cpu in cpus).to_bytes(8, "little")
    assert session.call("SETAFFINITY", struct.pack("<iIQ", pid, len(mask), start) + mask, who=who) == b""


def get_affinity(session: Session, pid: int, start: int = 0) -> set[int]:
    mask = int.from_bytes(session.call("GETAFFINITY", struct.pack("<iIQ", pid, 0, start)), "little")
    return {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}


def processes(session: Session, after: int = 0, size: int = 65536) -> list[Process]:
    """One PROCESSES."""
    body = session.call("PROCESSES", struct.pack("<II", after, size))
    at, found = 0, []
    while at < len(body):
        pid, parent, uid, state, start, started_s, length, _ = struct.unpack_from("<IIIIQqII", body, at)
        found.append(Process(pid, parent, uid, chr(state), start, started_s, body[at + 40 : at + 40 + length]))
        at += _padded(40 + length)
    assert at == len(body) <= size
    return found
