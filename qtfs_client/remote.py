"""`RemoteFS`: the files of one session for Python code, without a kernel in between.

Nodes and handles are the server's numbers, names and targets are bytes, times are nanoseconds since 1970. A node that
`lookup` or a making call returned is counted, and `forget` gives it back; a handle lives until `release`. Every method
raises OSError: with the server's errno, or EIO where sessions.py says so. Methods may be called from any thread.

Whoever calls on behalf of somebody passes a `Caller`; the server then checks and acts as that user. What each operation
means in detail is doc/protocol.md's.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple

from qtfs_client.connection import Engine, Ticket
from qtfs_client.sessions import Session
from qtfs_common.protocol import LIMITS, OPERATIONS, ROOT

ROOT_NODE: Final[int] = ROOT
#: Most bytes that one read or write carries; both may do less than asked, as read(2) and write(2) may.
MAX_PAYLOAD: Final[int] = LIMITS["MAX_PAYLOAD"]
MAX_XATTR: Final[int] = LIMITS["MAX_XATTR"]
MAX_GROUPS: Final[int] = LIMITS["MAX_GROUPS"]

#: Entry.flags, NODE_* of qtfs_common/protocol.pxd: trust neither names nor attributes nor pages; a mount point there.
UNCACHED: Final = 1
SUBMOUNT: Final = 2
#: Opened.flags, OPENED_*: every read and write must ask; not as this session last saw it.
OPENED_UNCACHED: Final = 1
OPENED_CHANGED: Final = 2
#: asm-generic/fcntl.h, the wire's numbers, of those O_* that some architectures number in their own way.
_WIRE_FLAGS = ((os.O_DIRECT, 0o40000), (os.O_DIRECTORY, 0o200000), (os.O_NOFOLLOW, 0o400000))
_O_LARGEFILE = 0o100000
_COMMON_FLAGS = ~(os.O_DIRECT | os.O_DIRECTORY | os.O_NOFOLLOW | 0o40000 | 0o200000 | 0o400000 | _O_LARGEFILE)
#: Last byte of a lock that reaches to the end of the file, however far that moves.
END_OF_FILE: Final = (1 << 63) - 1

# qtfs_common.protocol's records, for struct.
_CALLER = struct.Struct("<QIIIHH")
_ATTRIBUTES = "QQQqqqIIIIIIIIII"
_ATTRIBUTES_REPLY = struct.Struct("<QQ" + _ATTRIBUTES)
_ENTRY = struct.Struct("<QQQQQ" + _ATTRIBUTES)
_FORGET_ITEM = struct.Struct("<QQ")
_GETATTR = struct.Struct("<QII")
_SETATTR = struct.Struct("<IIQQqqIIIIII")
_PAIR = struct.Struct("<II")
_RENAME = struct.Struct("<QIIII")
_NUMBER = struct.Struct("<Q")
_OPENED = struct.Struct("<QII")
_CREATE = struct.Struct("<IIII")
_TRANSFER = struct.Struct("<QQII")
_STATFS = struct.Struct("<QQQQQIIII24x")
_RELEASE = struct.Struct("<QQII")
_FSYNC = struct.Struct("<QII")
_XATTR = struct.Struct("<IIII")
_DIRENT = struct.Struct("<QQII")
_LOCK = struct.Struct("<QQQQIIII")
_LOCK_REPLY = struct.Struct("<QQII")
_IOCTL = struct.Struct("<QIIII")
_IOCTL_REPLY = struct.Struct("<iI")
_FALLOCATE = struct.Struct("<QQQII")
_COPY = struct.Struct("<QQQQQII")

_USE_HANDLE = 1
_KILL_PRIVILEGES = 1
_RELEASE_FLOCK = 1
_LOCK_FLOCK = 1
_SET_MODE, _SET_UID, _SET_GID, _SET_SIZE, _SET_ATIME, _SET_MTIME, _SET_HANDLE, _SET_ATIME_NOW, _SET_MTIME_NOW = (
    1 << bit for bit in range(9)
)
_NS = 10**9
_FORGETS_AT_ONCE = 2048
_FIRST_LOCK_DELAY_S = 0.001
_LONGEST_LOCK_DELAY_S = 0.1

#: Operations that may be executed twice, as in drivers/fuse3/dispatch.pyx.
_REPEATABLE = frozenset(
    (
        *("LOOKUP", "GETATTR", "READLINK", "READ", "STATFS", "FSYNC", "GETXATTR", "LISTXATTR", "FLUSH", "READDIR"),
        *("FSYNCDIR", "GETLK", "SETLK", "ACCESS", "LSEEK", "SYNCFS"),
    )
)


class Caller(NamedTuple):
    """On whose behalf a request is made: file system ids, the thread's id for messages, and what new files get."""

    uid: int = 0
    gid: int = 0
    pid: int = 0
    groups: tuple[int, ...] = ()
    umask: int = 0


SUPERUSER: Final = Caller()


class Attributes(NamedTuple):
    """struct fuse_attr; each time is seconds and, apart from them, nanoseconds. `rdev` as the kernel encodes it."""

    ino: int
    size: int
    blocks: int
    atime_s: int
    mtime_s: int
    ctime_s: int
    atime_frac_ns: int
    mtime_frac_ns: int
    ctime_frac_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @property
    def atime_ns(self) -> int:
        return self.atime_s * _NS + self.atime_frac_ns

    @property
    def mtime_ns(self) -> int:
        return self.mtime_s * _NS + self.mtime_frac_ns

    @property
    def ctime_ns(self) -> int:
        return self.ctime_s * _NS + self.ctime_frac_ns


class Entry(NamedTuple):
    """A node that the server counted one more lookup of."""

    node: int
    generation: int
    flags: int
    attributes: Attributes


class Opened(NamedTuple):
    """A handle, and OPENED_* flags."""

    handle: int
    flags: int


class DirectoryEntry(NamedTuple):
    """One name in a directory. `type` is DT_* of readdir(3); `offset` is where to read on behind it."""

    name: bytes
    ino: int
    type: int
    offset: int


class FileSystemFigures(NamedTuple):
    """statfs(2); blocks are of `fragment_bytes`."""

    blocks: int
    blocks_free: int
    blocks_available: int
    files: int
    files_free: int
    block_bytes: int
    name_max: int
    fragment_bytes: int


class LockRange(NamedTuple):
    """A lock of fcntl(2): `type` F_RDLCK 0, F_WRLCK 1, F_UNLCK 2; `end` is its last byte."""

    start: int
    end: int
    type: int
    pid: int = 0


Time = int | Literal["now"] | None


def _wire_flags(flags: int) -> int:
    """This machine's O_* in the wire's numbering."""
    return flags & _COMMON_FLAGS | sum(wire for ours, wire in _WIRE_FLAGS if flags & ours)


def _unpack(record: struct.Struct, reply: bytes) -> tuple[int, ...]:
    if len(reply) != record.size:
        raise OSError(errno.EIO, "the server sent a malformed reply")
    return record.unpack(reply)


def _entry(reply: bytes) -> Entry:
    node, generation, flags, _, _, *attributes = _unpack(_ENTRY, reply)
    return Entry(node, generation, flags, Attributes._make(attributes))


def _opened(reply: bytes) -> Opened:
    handle, flags, _ = _unpack(_OPENED, reply)
    return Opened(handle, flags)


def _made(reply: bytes) -> tuple[Entry, Opened]:
    return _entry(reply[: _ENTRY.size]), _opened(reply[_ENTRY.size :])


def _time(value: Time, bit: int, now_bit: int) -> tuple[int, int, int]:
    """(bits of `valid`, seconds, nanoseconds)."""
    if value is None:
        return 0, 0, 0
    if value == "now":
        return bit | now_bit, 0, 0
    return bit, *divmod(value, _NS)


def _directory_entries(reply: bytes) -> Iterator[DirectoryEntry]:
    """The struct fuse_dirent records of a reply."""
    at = 0
    while at < len(reply):
        try:
            ino, offset, length, type_ = _DIRENT.unpack_from(reply, at)
        except struct.error as error:
            raise OSError(errno.EIO, "the server sent a malformed directory") from error
        at += _DIRENT.size
        yield DirectoryEntry(reply[at : at + length], ino, type_, offset)
        at = (at + length + 7) & ~7


class RemoteFS:
    """The operations of one session, which it owns."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    def mount(
        cls, engine: Engine, source: str, *, read_only: bool = False, slots: int = 16, timeout_s: float = 30.0
    ) -> RemoteFS:
        """Begin a session on a directory of the server. Raises QtfsError as Engine.mount does."""
        connection, ticket = engine.mount(source, read_only=read_only, slots=slots)
        return cls(Session(engine, connection, ticket, source=source, read_only=read_only, timeout_s=timeout_s))

    @property
    def ticket(self) -> Ticket:
        """What joins the session as it is now."""
        return self._session.ticket

    def figures(self) -> dict[str, int]:
        """Counters of the session."""
        return self._session.figures()

    def stop(self) -> None:
        """Let every call end with EIO, those under way within half a second."""
        self._session.stop()

    def close(self) -> None:
        """End the session; nodes and handles are gone. No call may be under way."""
        self._session.close()

    def __enter__(self) -> RemoteFS:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, operation: str, node: int, body: bytes = b"", caller: Caller = SUPERUSER) -> bytes:
        """One request about a node; the body of its reply."""
        groups = caller.groups[:MAX_GROUPS]
        count = len(groups)
        who = _CALLER.pack(node, caller.uid, caller.gid, caller.pid, caller.umask & 0o777, count)
        if count:
            who += struct.pack(f"<{count}I{count % 2 * 4}x", *groups)
        return self._session.call(OPERATIONS[operation], who + body, repeatable=operation in _REPEATABLE)

    # ------------------------------------------------------------------------------------------------------ names

    def lookup(self, directory: int, name: bytes, caller: Caller = SUPERUSER) -> Entry:
        """The node of a name, one component."""
        return _entry(self._ask("LOOKUP", directory, name, caller))

    def forget(self, lookups: Iterable[tuple[int, int]]) -> None:
        """Give back lookups: (node, how many)."""
        items = [_FORGET_ITEM.pack(node, count) for node, count in lookups]
        for first in range(0, len(items), _FORGETS_AT_ONCE):
            self._ask("FORGET", ROOT_NODE, b"".join(items[first : first + _FORGETS_AT_ONCE]))

    def mknod(self, directory: int, name: bytes, mode: int, rdev: int = 0, caller: Caller = SUPERUSER) -> Entry:
        """Make a file of any type that mknod(2) makes; `rdev` as the kernel encodes it."""
        return _entry(self._ask("MKNOD", directory, _PAIR.pack(mode, rdev) + name, caller))

    def mkdir(self, directory: int, name: bytes, mode: int, caller: Caller = SUPERUSER) -> Entry:
        """Make a directory."""
        return _entry(self._ask("MKDIR", directory, _PAIR.pack(mode, 0) + name, caller))

    def symlink(self, directory: int, name: bytes, target: bytes, caller: Caller = SUPERUSER) -> Entry:
        """Make a symbolic link."""
        return _entry(self._ask("SYMLINK", directory, _PAIR.pack(len(name), len(target)) + name + target, caller))

    def link(self, node: int, directory: int, name: bytes, caller: Caller = SUPERUSER) -> Entry:
        """Give a node one more name."""
        return _entry(self._ask("LINK", directory, _NUMBER.pack(node) + name, caller))

    def unlink(self, directory: int, name: bytes, caller: Caller = SUPERUSER) -> None:
        """Remove a name, other than a directory's."""
        self._ask("UNLINK", directory, name, caller)

    def rmdir(self, directory: int, name: bytes, caller: Caller = SUPERUSER) -> None:
        """Remove an empty directory."""
        self._ask("RMDIR", directory, name, caller)

    def rename(
        self,
        directory: int,
        name: bytes,
        new_directory: int,
        new_name: bytes,
        flags: int = 0,
        caller: Caller = SUPERUSER,
    ) -> None:
        """Rename; `flags` are RENAME_* of renameat2(2)."""
        body = _RENAME.pack(new_directory, flags, len(name), len(new_name), 0)
        self._ask("RENAME", directory, body + name + new_name, caller)

    def readlink(self, node: int, caller: Caller = SUPERUSER) -> bytes:
        """The target of a symbolic link."""
        return self._ask("READLINK", node, b"", caller)

    # ------------------------------------------------------------------------------------------------- attributes

    def getattr(self, node: int, handle: int | None = None) -> tuple[Attributes, int]:
        """Attributes, of the open file if a handle is given, and the node's flags."""
        reply = self._ask("GETATTR", node, _GETATTR.pack(handle or 0, 0 if handle is None else _USE_HANDLE, 0))
        flags, _, *attributes = _unpack(_ATTRIBUTES_REPLY, reply)
        return Attributes._make(attributes), flags

    def setattr(
        self,
        node: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: Time = None,
        mtime_ns: Time = None,
        handle: int | None = None,
        caller: Caller = SUPERUSER,
    ) -> tuple[Attributes, int]:
        """Change the attributes that are given; the result as getattr's."""
        atime_bits, atime_s, atime_frac_ns = _time(atime_ns, _SET_ATIME, _SET_ATIME_NOW)
        mtime_bits, mtime_s, mtime_frac_ns = _time(mtime_ns, _SET_MTIME, _SET_MTIME_NOW)
        given = ((mode, _SET_MODE), (uid, _SET_UID), (gid, _SET_GID), (size, _SET_SIZE), (handle, _SET_HANDLE))
        valid = sum(bit for value, bit in given if value is not None) | atime_bits | mtime_bits
        times = (atime_s, mtime_s, atime_frac_ns, mtime_frac_ns)
        body = _SETATTR.pack(valid, 0, handle or 0, size or 0, *times, mode or 0, uid or 0, gid or 0, 0)
        flags, _, *attributes = _unpack(_ATTRIBUTES_REPLY, self._ask("SETATTR", node, body, caller))
        return Attributes._make(attributes), flags

    def access(self, node: int, mask: int, caller: Caller = SUPERUSER) -> None:
        """access(2): OSError unless the caller may; `mask` of os.R_OK, W_OK, X_OK."""
        self._ask("ACCESS", node, _PAIR.pack(mask, 0), caller)

    def statfs(self, node: int = ROOT_NODE) -> FileSystemFigures:
        """Figures of the file system that a node lies on."""
        return FileSystemFigures._make(_unpack(_STATFS, self._ask("STATFS", node))[:8])

    def syncfs(self, node: int = ROOT_NODE) -> None:
        """See that everything of a node's file system is on its disk."""
        self._ask("SYNCFS", node)

    # ---------------------------------------------------------------------------------------- extended attributes

    def getxattr(self, node: int, name: bytes, caller: Caller = SUPERUSER) -> bytes:
        """The value of an extended attribute."""
        return self._ask("GETXATTR", node, _XATTR.pack(MAX_XATTR, 0, len(name), 0) + name, caller)

    def listxattr(self, node: int, caller: Caller = SUPERUSER) -> list[bytes]:
        """The names of all extended attributes."""
        names = self._ask("LISTXATTR", node, _XATTR.pack(MAX_XATTR, 0, 0, 0), caller)
        return names.split(b"\0")[:-1]

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int = 0, caller: Caller = SUPERUSER) -> None:
        """Set an extended attribute; `flags` os.XATTR_CREATE or os.XATTR_REPLACE."""
        if len(value) > MAX_XATTR:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        self._ask("SETXATTR", node, _XATTR.pack(len(value), flags, len(name), 0) + name + value, caller)

    def removexattr(self, node: int, name: bytes, caller: Caller = SUPERUSER) -> None:
        """Remove an extended attribute."""
        self._ask("REMOVEXATTR", node, _XATTR.pack(0, 0, len(name), 0) + name, caller)

    # ------------------------------------------------------------------------------------------------------ files

    def open(self, node: int, flags: int, caller: Caller = SUPERUSER) -> Opened:
        """Open a regular file; `flags` are O_* of open(2), O_TRUNC included."""
        return _opened(self._ask("OPEN", node, _PAIR.pack(_wire_flags(flags), 0), caller))

    def create(
        self, directory: int, name: bytes, flags: int, mode: int, caller: Caller = SUPERUSER
    ) -> tuple[Entry, Opened]:
        """Make a regular file and open it; without O_EXCL in `flags`, open the one that is there."""
        return _made(self._ask("CREATE", directory, _CREATE.pack(_wire_flags(flags), mode, 0, 0) + name, caller))

    def tmpfile(self, directory: int, flags: int, mode: int, caller: Caller = SUPERUSER) -> tuple[Entry, Opened]:
        """Make a file without a name, O_TMPFILE of open(2)."""
        return _made(self._ask("TMPFILE", directory, _CREATE.pack(_wire_flags(flags), mode, 0, 0), caller))

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Read at most `size` bytes and MAX_PAYLOAD; less than that only at the end of the file."""
        return self._ask("READ", 0, _TRANSFER.pack(handle, offset, min(size, self.ticket.max_payload), 0))

    def write(
        self, handle: int, offset: int, data: bytes, *, kill_privileges: bool = False, caller: Caller = SUPERUSER
    ) -> int:
        """Write the first MAX_PAYLOAD bytes of `data`: how many were written.

        `kill_privileges`: clear suid and sgid even for root; they are cleared for everybody else.
        """
        part = data[: self.ticket.max_payload]
        body = _TRANSFER.pack(handle, offset, len(part), _KILL_PRIVILEGES if kill_privileges else 0)
        return _unpack(_NUMBER, self._ask("WRITE", 0, body + part, caller))[0]

    def flush(self, handle: int, lock_owner: int = 0) -> None:
        """As close(2): late errors of writing, and the owner's POSIX locks on the file end."""
        self._ask("FLUSH", 0, _RELEASE.pack(handle, lock_owner, 0, 0))

    def release(self, handle: int, *, flock: bool = False) -> None:
        """End a handle; `flock`: it held a flock(2) lock."""
        self._ask("RELEASE", 0, _RELEASE.pack(handle, 0, _RELEASE_FLOCK if flock else 0, 0))

    def fsync(self, handle: int, *, datasync: bool = False) -> None:
        """See that a file is on the server's disk."""
        self._ask("FSYNC", 0, _FSYNC.pack(handle, datasync, 0))

    def fallocate(self, handle: int, mode: int, offset: int, length: int, caller: Caller = SUPERUSER) -> None:
        """fallocate(2)."""
        self._ask("FALLOCATE", 0, _FALLOCATE.pack(handle, offset, length, mode, 0), caller)

    def lseek(self, handle: int, offset: int, whence: int) -> int:
        """Where data or a hole begins: os.SEEK_DATA, os.SEEK_HOLE."""
        return _unpack(_NUMBER, self._ask("LSEEK", 0, _TRANSFER.pack(handle, offset, whence, 0)))[0]

    def copy_file_range(
        self,
        handle_in: int,
        offset_in: int,
        handle_out: int,
        offset_out: int,
        length: int,
        caller: Caller = SUPERUSER,
    ) -> int:
        """Copy within the server: how many bytes were copied."""
        body = _COPY.pack(handle_in, offset_in, handle_out, offset_out, length, 0, 0)
        return _unpack(_NUMBER, self._ask("COPY_FILE_RANGE", 0, body, caller))[0]

    def ioctl(
        self, handle: int, command: int, data: bytes = b"", out_size: int = 0, caller: Caller = SUPERUSER
    ) -> tuple[int, bytes]:
        """An ioctl(2) that the server allows: its result, and what it wrote."""
        body = _IOCTL.pack(handle, command, len(data), out_size, 0) + data
        reply = self._ask("IOCTL", 0, body, caller)
        return _unpack(_IOCTL_REPLY, reply[: _IOCTL_REPLY.size])[0], reply[_IOCTL_REPLY.size :]

    # ------------------------------------------------------------------------------------------------ directories

    def opendir(self, node: int, caller: Caller = SUPERUSER) -> Opened:
        """Open a directory for reading."""
        return _opened(self._ask("OPENDIR", node, _PAIR.pack(os.O_RDONLY, 0), caller))

    def read_directory(self, handle: int, offset: int = 0, size: int = 65536) -> list[DirectoryEntry]:
        """Entries behind an offset, "." and ".." included, in at most `size` bytes of the wire; none at the end."""
        return list(_directory_entries(self._ask("READDIR", 0, _TRANSFER.pack(handle, offset, size, 0))))

    def readdir(self, handle: int, offset: int = 0) -> Iterator[DirectoryEntry]:
        """All entries behind an offset."""
        while entries := self.read_directory(handle, offset):
            yield from entries
            offset = entries[-1].offset

    def releasedir(self, handle: int) -> None:
        """End a directory's handle."""
        self._ask("RELEASEDIR", 0, _RELEASE.pack(handle, 0, 0, 0))

    def fsyncdir(self, handle: int, *, datasync: bool = False) -> None:
        """See that a directory is on the server's disk."""
        self._ask("FSYNCDIR", 0, _FSYNC.pack(handle, datasync, 0))

    # ------------------------------------------------------------------------------------------------------ locks

    def getlk(self, handle: int, owner: int, lock: LockRange) -> LockRange | None:
        """The first POSIX lock that is in the way of this one."""
        found = LockRange._make(_unpack(_LOCK_REPLY, self._ask("GETLK", 0, self._lock(handle, owner, lock, False))))
        return None if found.type == 2 else found

    def setlk(self, handle: int, owner: int, lock: LockRange, *, flock: bool = False, wait: bool = False) -> None:
        """Lock or unlock, as fcntl(2) or flock(2): OSError EAGAIN if another holds it, unless `wait`.

        Waiting is asking again, at most every 100 ms: the event channel, where the server would wait, is not used here.
        """
        body = self._lock(handle, owner, lock, flock)
        delay_s = _FIRST_LOCK_DELAY_S
        while True:
            try:
                self._ask("SETLK", 0, body)
                return
            except BlockingIOError:
                if not wait:
                    raise
            time.sleep(delay_s)
            delay_s = min(delay_s * 2, _LONGEST_LOCK_DELAY_S)

    @staticmethod
    def _lock(handle: int, owner: int, lock: LockRange, flock: bool) -> bytes:
        flags = _LOCK_FLOCK if flock else 0
        return _LOCK.pack(handle, owner, lock.start, lock.end, lock.type, lock.pid, flags, 0)
