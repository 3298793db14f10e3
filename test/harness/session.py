"""One mount's session spoken by hand: every operation of the protocol as a method, errors as OSError.

    with Session(address, "/srv") as session:
        made = session.mkdir(ROOT, b"d", who=Who(1000, 1000))
        assert made.attr.uid == 1000

Connections and handshakes are the client's own (`qtfs_client.connection`); everything behind them is written here from
doc/protocol.md. `stream()` gives a bare socket past the handshake for tests that cut or spoil it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from harness import wire
from harness.wire import ADMIN, EVENT_SLOT, ROOT, Attributes, Dirent, Entry, Lock, Opened, Reply, Who

from qtfs_client.connection import Engine, Ticket, detach
from qtfs_common.addresses import Address, parse_address
from qtfs_common.protocol import OPERATIONS
from qtfs_common.transport import Connection

REPLY_TIMEOUT_S = 20.0
MAX_PAYLOAD = 1 << 20


class Slot:
    """One slot channel and the number of its last request."""

    def __init__(self, index: int, connection: Connection, sequence: int = 0) -> None:
        self.index = index
        self.connection = connection
        self.sequence = sequence

    def send(self, op: str, body: bytes, tag: int = 0) -> bytes:
        """Send the next request; returns its bytes, so that it can be sent again."""
        self.sequence += 1
        data = wire.message(OPERATIONS[op], body, slot=self.index, sequence=self.sequence, tag=tag)
        self.connection.send(data, REPLY_TIMEOUT_S)
        return data

    def receive(self) -> Reply:
        return Reply._make(self.connection.receive(REPLY_TIMEOUT_S))


class EventChannel:
    """The session's event channel: requests by tag, replies in any order.

    Each message confirms all that was received before, unless `confirms` is False.
    """

    def __init__(self, connection: Connection, seen: int = 0) -> None:
        self.connection = connection
        self.seen = seen
        self.confirms = True

    def send(self, op: str, body: bytes = b"", tag: int = 0) -> None:
        confirmed = self.seen if self.confirms else 0
        data = wire.message(OPERATIONS[op], body, slot=EVENT_SLOT, sequence=confirmed, tag=tag)
        self.connection.send(data, REPLY_TIMEOUT_S)

    def receive(self, timeout_s: float = REPLY_TIMEOUT_S) -> Reply:
        reply = Reply._make(self.connection.receive(timeout_s))
        self.seen = max(self.seen, reply.sequence)
        return reply

    def ask(self, op: str, body: bytes = b"", tag: int = 0) -> int:
        """One request and its reply's errno."""
        self.send(op, body, tag)
        reply = self.receive()
        assert (reply.op, reply.tag, reply.flags) == (OPERATIONS[op], tag, 1)
        return reply.error


class Session:
    """A mount of `source`; `who` speaks where a call names nobody else."""

    def __init__(
        self,
        address: Address | str,
        source: str | os.PathLike[str],
        *,
        slots: int = 4,
        read_only: bool = False,
        watch: bool = False,
        let_go: bool = False,
        key: bytes | None = None,
        who: Who = ADMIN,
    ) -> None:
        self.address = parse_address(address) if isinstance(address, str) else address
        self.engine = Engine(self.address, key, REPLY_TIMEOUT_S)
        self.who = who
        connection, self.ticket = self.engine.mount(
            os.fspath(source), read_only=read_only, slots=slots, watch=watch, let_go=let_go
        )
        self.slots: dict[int, Slot] = {0: Slot(0, connection)}
        self._event: EventChannel | None = None
        self._seen = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    # ---- connections

    def slot(self, index: int = 0) -> Slot:
        """A slot, attached on first use."""
        if index not in self.slots:
            connection, last = self.engine.attach(self.ticket, index)
            self.slots[index] = Slot(index, connection, last)
        return self.slots[index]

    def event(self) -> EventChannel:
        if self._event is None:
            connection, _ = self.engine.attach(self.ticket, EVENT_SLOT)
            self._event = EventChannel(connection, self._seen)
        return self._event

    def reattach(self, index: int = 0) -> Slot:
        """Cut a slot's connection and join again, as a client does whose connection broke; numbering goes on."""
        old = self.slots.pop(index)
        old.connection.close()
        connection, last = self.engine.attach(self.ticket, index)
        self.slots[index] = Slot(index, connection, last)
        return self.slots[index]

    def lose_event(self) -> None:
        """Cut the event channel."""
        if self._event is not None:
            self._event.connection.close()
            self._seen = self._event.seen
            self._event = None

    def disconnect(self) -> None:
        """Cut every connection without a word: what a killed client does."""
        for slot in self.slots.values():
            slot.connection.close()
        self.slots.clear()
        self.lose_event()

    def detach(self) -> None:
        """End the session, if it is still there."""
        with contextlib.suppress(OSError):
            if self.slots:
                detach(next(iter(self.slots.values())).connection, REPLY_TIMEOUT_S)
        self.disconnect()

    # ---- requests

    def ask(self, op: str, body: bytes = b"", *, node: int = ROOT, who: Who | None = None, slot: int = 0) -> Reply:
        """One request and its reply, whatever that says."""
        channel = self.slot(slot)
        channel.send(op, wire.caller(node, self.who if who is None else who) + body)
        reply = channel.receive()
        assert (reply.op, reply.flags, reply.sequence) == (OPERATIONS[op], 1, channel.sequence)
        return reply

    def call(self, op: str, body: bytes = b"", **options: Any) -> bytes:
        """The body of the reply; raises OSError with the reply's errno."""
        reply = self.ask(op, body, **options)
        if reply.error:
            assert reply.body == b"", "an error carries nothing else"
            raise OSError(reply.error, os.strerror(reply.error), op)
        return reply.body

    # ---- names

    def lookup(self, parent: int, name: bytes, **options: Any) -> Entry:
        return wire.entry(self.call("LOOKUP", name, node=parent, **options))

    def walk(self, path: str, **options: Any) -> Entry:
        """Look up a relative path, component by component."""
        node, found = ROOT, None
        for name in path.split("/"):
            found = self.lookup(node, os.fsencode(name), **options)
            node = found.node
        assert found is not None
        return found

    def forget(self, *items: tuple[int, int]) -> None:
        self.call("FORGET", b"".join(struct.pack("<QQ", *item) for item in items))

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int = 0, **options: Any) -> Entry:
        return wire.entry(self.call("MKNOD", struct.pack("<II", mode, rdev) + name, node=parent, **options))

    def mkdir(self, parent: int, name: bytes, mode: int = 0o777, **options: Any) -> Entry:
        return wire.entry(self.call("MKDIR", struct.pack("<II", mode, 0) + name, node=parent, **options))

    def symlink(self, parent: int, name: bytes, target: bytes, **options: Any) -> Entry:
        body = struct.pack("<II", len(name), len(target)) + name + target
        return wire.entry(self.call("SYMLINK", body, node=parent, **options))

    def link(self, target: int, parent: int, name: bytes, **options: Any) -> Entry:
        return wire.entry(self.call("LINK", struct.pack("<Q", target) + name, node=parent, **options))

    def unlink(self, parent: int, name: bytes, **options: Any) -> None:
        self.call("UNLINK", name, node=parent, **options)

    def rmdir(self, parent: int, name: bytes, **options: Any) -> None:
        self.call("RMDIR", name, node=parent, **options)

    def rename(self, old: int, name: bytes, new: int, new_name: bytes, flags: int = 0, **options: Any) -> None:
        body = struct.pack("<QIIII", new, flags, len(name), len(new_name), 0) + name + new_name
        self.call("RENAME", body, node=old, **options)

    # ---- inodes

    def getattr(self, node: int, handle: int | None = None, **options: Any) -> Attributes:
        body = struct.pack("<QII", handle or 0, handle is not None, 0)
        return wire.attributes(self.call("GETATTR", body, node=node, **options), 16)

    def setattr(
        self,
        node: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        handle: int | None = None,
        atime: tuple[int, int] | None = None,
        mtime: tuple[int, int] | None = None,
        more: int = 0,
        **options: Any,
    ) -> Attributes:
        """Only what is given is set; times are (seconds, nanoseconds), `more` are further SET_* bits."""
        given = (mode, uid, gid, size, atime, mtime, handle)
        valid = more | sum(1 << bit for bit, value in enumerate(given) if value is not None)
        a, m = atime or (0, 0), mtime or (0, 0)
        body = struct.pack(
            "<IIQQqqIIIIII", valid, 0, handle or 0, size or 0, a[0], m[0], a[1], m[1], mode or 0, uid or 0, gid or 0, 0
        )
        return wire.attributes(self.call("SETATTR", body, node=node, **options), 16)

    def statx(self, node: int, flags: int = 0, mask: int = 0xFFF, **options: Any) -> bytes:
        return self.call("STATX", struct.pack("<QIIII", 0, 0, 0, flags, mask), node=node, **options)

    def readlink(self, node: int, **options: Any) -> bytes:
        return self.call("READLINK", node=node, **options)

    def access(self, node: int, mask: int, **options: Any) -> None:
        self.call("ACCESS", struct.pack("<II", mask, 0), node=node, **options)

    def statfs(self, node: int = ROOT, **options: Any) -> tuple[int, ...]:
        """blocks, bfree, bavail, files, ffree, bsize, namelen, frsize."""
        return struct.unpack_from("<QQQQQIII", self.call("STATFS", node=node, **options))

    def syncfs(self, node: int = ROOT, **options: Any) -> None:
        self.call("SYNCFS", node=node, **options)

    def _xattr(self, op: str, node: int, name: bytes, value: bytes, size: int, flags: int, **options: Any) -> bytes:
        body = struct.pack("<IIII", size, flags, len(name), options.pop("kill", 0)) + name + value
        return self.call(op, body, node=node, **options)

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int = 0, **options: Any) -> None:
        self._xattr("SETXATTR", node, name, value, len(value), flags, **options)

    def getxattr(self, node: int, name: bytes, size: int = 65536, **options: Any) -> bytes:
        return self._xattr("GETXATTR", node, name, b"", size, 0, **options)

    def listxattr(self, node: int, size: int = 65536, **options: Any) -> bytes:
        return self._xattr("LISTXATTR", node, b"", b"", size, 0, **options)

    def removexattr(self, node: int, name: bytes, **options: Any) -> None:
        self._xattr("REMOVEXATTR", node, name, b"", 0, 0, **options)

    # ---- files

    def open(self, node: int, flags: int = os.O_RDONLY, kill: int = 0, **options: Any) -> Opened:
        return wire.opened(self.call("OPEN", struct.pack("<II", flags, kill), node=node, **options))

    def create(
        self, parent: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o666, **options: Any
    ) -> tuple[Entry, Opened]:
        body = self.call("CREATE", struct.pack("<IIII", flags, mode, 0, 0) + name, node=parent, **options)
        return wire.entry(body), wire.opened(body, 128)

    def tmpfile(self, parent: int, flags: int = os.O_RDWR, mode: int = 0o600, **options: Any) -> tuple[Entry, Opened]:
        body = self.call("TMPFILE", struct.pack("<IIII", flags, mode, 0, 0), node=parent, **options)
        return wire.entry(body), wire.opened(body, 128)

    def read(self, handle: int, offset: int, size: int, flags: int = 0, **options: Any) -> bytes:
        return self.call("READ", struct.pack("<QQII", handle, offset, size, flags), **options)

    def write(self, handle: int, offset: int, data: bytes, flags: int = 0, **options: Any) -> int:
        body = self.call("WRITE", struct.pack("<QQII", handle, offset, len(data), flags) + data, **options)
        return int(struct.unpack("<Q", body)[0])

    def poll(self, handle: int, events: int, notify: int | None = None, **options: Any) -> int:
        """What of `events` is ready; `notify` is the tag of the READY to come."""
        return self.poll_and_count(handle, events, notify, **options)[0]

    def poll_and_count(self, handle: int, events: int, notify: int | None = None, **options: Any) -> tuple[int, int]:
        """What is ready, and how many bytes there are to read."""
        body = struct.pack("<QQII", handle, notify or 0, events, notify is not None)
        revents, available = struct.unpack("<II", self.call("POLL", body, **options))
        return revents, available

    def release(self, handle: int, flags: int = 0, op: str = "RELEASE", **options: Any) -> None:
        self.call(op, struct.pack("<QQII", handle, 0, flags, 0), **options)

    def flush(self, handle: int, lock_owner: int = 0, **options: Any) -> None:
        self.call("FLUSH", struct.pack("<QQII", handle, lock_owner, 0, 0), **options)

    def fsync(self, handle: int, datasync: int = 0, op: str = "FSYNC", **options: Any) -> None:
        self.call(op, struct.pack("<QII", handle, datasync, 0), **options)

    def fallocate(self, handle: int, offset: int, length: int, mode: int = 0, **options: Any) -> None:
        self.call("FALLOCATE", struct.pack("<QQQII", handle, offset, length, mode, 0), **options)

    def lseek(self, handle: int, offset: int, whence: int, **options: Any) -> int:
        body = self.call("LSEEK", struct.pack("<QQII", handle, offset, whence, 0), **options)
        return int(struct.unpack("<Q", body)[0])

    def copy(
        self, handle_in: int, offset_in: int, handle_out: int, offset_out: int, length: int, **options: Any
    ) -> int:
        body = struct.pack("<QQQQQII", handle_in, offset_in, handle_out, offset_out, length, 0, 0)
        return int(struct.unpack("<Q", self.call("COPY_FILE_RANGE", body, **options))[0])

    def ioctl(self, handle: int, command: int, data: bytes = b"", out_size: int = 0, **options: Any) -> bytes:
        """The output of an ioctl; its result must be 0."""
        body = struct.pack("<QIIII", handle, command, len(data), out_size, 0) + data
        reply = self.call("IOCTL", body, **options)
        assert struct.unpack_from("<iI", reply) == (0, 0)
        return reply[8:]

    # ---- directories

    def opendir(self, node: int, **options: Any) -> int:
        return wire.opened(self.call("OPENDIR", struct.pack("<II", 0, 0), node=node, **options)).handle

    def readdir(
        self, handle: int, offset: int = 0, size: int = 65536, plus: bool = False, **options: Any
    ) -> list[Dirent]:
        """One READDIR's records."""
        body = self.call("READDIR", struct.pack("<QQII", handle, offset, size, plus), **options)
        assert len(body) <= size
        return list(wire.dirents(body, plus))

    def entries(self, handle: int, size: int = 65536, plus: bool = False, **options: Any) -> Iterator[Dirent]:
        """The whole directory, in replies of at most `size` bytes."""
        offset = 0
        while found := self.readdir(handle, offset, size, plus, **options):
            yield from found
            offset = found[-1].offset

    # ---- locks

    @staticmethod
    def lock_body(
        handle: int, owner: int, kind: int, start: int = 0, end: int = wire.END_OF_FILE, flags: int = 0
    ) -> bytes:
        """kind: 0 read, 1 write, 2 unlock; flags 1: flock(2)."""
        return struct.pack("<QQQQIIII", handle, owner, start, end, kind, 1, flags, 0)

    def setlk(self, handle: int, owner: int, kind: int, *, lock: dict[str, int] | None = None, **options: Any) -> None:
        self.call("SETLK", self.lock_body(handle, owner, kind, **(lock or {})), **options)

    def getlk(self, handle: int, owner: int, kind: int, *, lock: dict[str, int] | None = None, **options: Any) -> Lock:
        body = self.call("GETLK", self.lock_body(handle, owner, kind, **(lock or {})), **options)
        return Lock._make(struct.unpack("<QQII", body))


def stream(address: Address, key: bytes | None = None) -> socket.socket:
    """A blocking socket past HELLO: it may send MOUNT, ATTACH, or rubbish."""
    connection = Engine(address, key, REPLY_TIMEOUT_S).connect()
    sock = socket.socket(fileno=connection.detach())
    sock.settimeout(REPLY_TIMEOUT_S)
    return sock


def attach_stream(address: Address, ticket: Ticket, slot: int) -> socket.socket:
    """A blocking socket that is a slot of a session."""
    connection, _ = Engine(address, None, REPLY_TIMEOUT_S).attach(ticket, slot)
    sock = socket.socket(fileno=connection.detach())
    sock.settimeout(REPLY_TIMEOUT_S)
    return sock


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes; fewer only if the peer has closed. (MSG_WAITALL does not wait on a socket with a timeout.)"""
    data = bytearray()
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return bytes(data)


def is_closed_by_peer(sock: socket.socket) -> bool:
    """Read until the peer closes; False if it still has not after REPLY_TIMEOUT_S."""
    sock.settimeout(REPLY_TIMEOUT_S)
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True
