"""The client's side of the protocol, with the kernel and the engine played by us: the kernel honest, the engine not.

/dev/fuse is one end of a SOCK_SEQPACKET pair: a read or write of the driver is one message of the kernel's protocol, as
with the device. An input is a sequence of records: a request of the kernel and what the engine answers, or what it says
on the event channel. After a wrong answer the request may end with EIO, or the channel may break and be replaced,
but the kernel gets an answer, and the next request is served.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from harness import wire
from harness.leaks import descriptors as descriptors_of
from harness.wire import EVENT_SLOT, HEADER_BYTES

from qtfs_client.drivers.fuse3.mount import EVENT_LINE, Mount
from qtfs_common.protocol import DELAYED, OPERATION_NAMES, OPERATIONS
from qtfs_common.transport import Connection

PATIENCE_S = 20.0
RUNS_OF_A_MOUNT = 400
_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
#: Which request, flags, errno, bytes of the body that follows.
RECORD = struct.Struct("<BBHH")
#: Bits of a record's flags.
ANOTHER_OP, ANOTHER_NUMBER, NO_REPLY, SHORTER, LONGER, HANG_UP = 1, 2, 4, 8, 16, 32
#: In place of a request: a message on the event channel, its operation and tag first.
EVENT = 255
_EVENT_HEAD = struct.Struct("<HQ")

_ATTRIBUTES = struct.pack("<QQQqqqIIIIIIIIII", 7, 10, 1, 0, 0, 0, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
_ENTRY = struct.pack("<QQQQQ", 2, 1, 0, 0, 0) + _ATTRIBUTES
_OPENED = struct.pack("<QII", 9, 0, 0)
_ATTR_REPLY = bytes(16) + _ATTRIBUTES
_DIRENT = struct.pack("<QQII", 7, 1, 3, 8) + b"abc" + bytes(5)
_LOCK = struct.pack("<QQQQIIII", 9, 1, 0, 99, 1, 4, 0, 0)
_READ = struct.pack("<QQIIQII", 9, 0, 4096, 0, 0, 0, 0)

#: Name, opcode, argument as the kernel sends it, and what an honest engine may answer.
REQUESTS: list[tuple[str, int, bytes, bytes]] = [
    ("LOOKUP", 1, b"name\0", _ENTRY),
    ("GETATTR", 3, bytes(16), _ATTR_REPLY),
    ("SETATTR", 4, struct.pack("<II", 8, 0) + bytes(80), _ATTR_REPLY),
    ("READLINK", 5, b"", b"target"),
    ("SYMLINK", 6, b"name\0target\0", _ENTRY),
    ("MKNOD", 8, struct.pack("<IIII", 0o100644, 0, 0, 0) + b"name\0", _ENTRY),
    ("MKDIR", 9, struct.pack("<II", 0o755, 0) + b"name\0", _ENTRY),
    ("UNLINK", 10, b"name\0", b""),
    ("RMDIR", 11, b"name\0", b""),
    ("LINK", 13, struct.pack("<Q", 2) + b"name\0", _ENTRY),
    ("OPEN", 14, struct.pack("<II", os.O_RDWR, 0), _OPENED),
    ("READ", 15, _READ, b"data"),
    ("WRITE", 16, struct.pack("<QQIIQII", 9, 0, 4, 0, 0, 0, 0) + b"data", struct.pack("<Q", 4)),
    ("STATFS", 17, b"", bytes(80)),
    ("RELEASE", 18, struct.pack("<QIIQ", 9, 0, 0, 0), b""),
    ("FSYNC", 20, struct.pack("<QII", 9, 0, 0), b""),
    ("SETXATTR", 21, struct.pack("<IIII", 1, 0, 0, 0) + b"user.x\0v", b""),
    ("GETXATTR", 22, struct.pack("<II", 100, 0) + b"user.x\0", b"value"),
    ("GETXATTR", 22, struct.pack("<II", 0, 0) + b"user.x\0", struct.pack("<Q", 5)),
    ("LISTXATTR", 23, struct.pack("<II", 100, 0), b"user.x\0"),
    ("REMOVEXATTR", 24, b"user.x\0", b""),
    ("FLUSH", 25, struct.pack("<QIIQ", 9, 0, 0, 1), b""),
    ("OPENDIR", 27, bytes(8), _OPENED),
    ("READDIR", 28, _READ, _DIRENT * 3),
    ("RELEASEDIR", 29, struct.pack("<QIIQ", 9, 0, 0, 0), b""),
    ("GETLK", 31, _LOCK, struct.pack("<QQII", 0, 99, 2, 0)),
    ("SETLK", 32, _LOCK, b""),
    ("SETLKW", 33, _LOCK, b""),
    ("ACCESS", 34, bytes(8), b""),
    ("CREATE", 35, struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"name\0", _ENTRY + _OPENED),
    ("IOCTL", 39, struct.pack("<QIIQII", 9, 0, 0x80086601, 0, 0, 8), bytes(8) + bytes(8)),
    ("POLL", 40, struct.pack("<QQII", 9 | 2, 1, 1, 0x145), struct.pack("<II", 1, 0)),
    ("FALLOCATE", 43, struct.pack("<QQQII", 9, 0, 99, 0, 0), b""),
    ("READDIRPLUS", 44, _READ, (_ENTRY + _DIRENT) * 3),
    ("RENAME2", 45, struct.pack("<QII", 1, 0, 0) + b"old\0new\0", b""),
    ("LSEEK", 46, struct.pack("<QQII", 9, 0, 3, 0), struct.pack("<Q", 4)),
    ("COPY_FILE_RANGE", 47, struct.pack("<QQQQQQQ", 9, 0, 2, 9, 0, 99, 0), struct.pack("<Q", 99)),
    ("SYNCFS", 50, bytes(8), b""),
    ("STATX", 52, bytes(24), bytes(288)),
]
_NAMES = [name for name, _, _, _ in REQUESTS]
#: What the driver asks of its own accord, to give back what was granted to nobody.
_ITS_OWN = ("FORGET", "RELEASE", "RELEASEDIR")


class _Line:
    """The engine's end of one channel."""

    def __init__(self, last: int = 0) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        ours.settimeout(None)  # else Python waits, MSG_DONTWAIT or not
        self.sock = ours
        self.connection = Connection(theirs.detach())
        self.last = last
        self._data = b""

    def take(self) -> tuple[int, int, int, int] | None:
        """The next request, if it is whole: op, slot, sequence, tag."""
        with contextlib.suppress(OSError):
            self._data += self.sock.recv(1 << 21, socket.MSG_DONTWAIT)
        if len(self._data) < HEADER_BYTES:
            return None
        length, op, _, _, slot, sequence, tag = wire.read_header(self._data)
        if len(self._data) < length:
            return None
        self._data = self._data[length:]
        if slot != EVENT_SLOT:
            self.last = sequence
        return op, slot, sequence, tag

    def close(self) -> None:
        self.sock.close()


class ClientTarget:
    """`one` is an execution. It raises AssertionError for whatever a client must not do."""

    def __init__(self) -> None:
        self.runs = 0
        self.breaks = 0
        self._unique = 0
        self._begin()
        self._descriptors: dict[int, str] | None = None
        self._resident = 0
        self.grown_descriptors = self.grown_bytes = 0

    # ---- a mount

    def _begin(self) -> None:
        self._kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
        self.mount = Mount(device.detach(), channels=1, timeout_s=0.0, special_remote=False)
        self._number = 0  # of the last message on the event channel
        self._line = _Line()
        self._event = _Line()
        self.mount.add_worker(self._line.connection, 1)
        self.mount.deliver(EVENT_LINE, self._event.connection, 1, 0)
        bodies: list[Callable[[], None]] = [lambda: self.mount.run_worker(0), self.mount.run_events]
        self._threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in self._threads:
            thread.start()

    def _end(self) -> None:
        self.mount.stop()
        self._kernel.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a thread of the driver does not end"
        self._line.connection.close()
        self._event.connection.close()
        self._line.close()
        self._event.close()
        del self.mount, self._threads

    def _weigh(self) -> None:
        descriptors = descriptors_of("self")
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if self._descriptors is None:
            self._descriptors, self._resident = descriptors, resident
        self.grown_descriptors = len(descriptors) - len(self._descriptors)
        self.grown_bytes = resident - self._resident
        # The sanitizer's symbolizer has two.
        assert self.grown_descriptors <= 4, f"first there were {self._descriptors}, now {descriptors}"

    @property
    def event_socket(self) -> socket.socket:
        """The engine's end of the event channel."""
        return self._event.sock

    def close(self) -> None:
        self._end()
        self._weigh()

    # ---- executions

    def one(self, data: bytes) -> None:
        self.runs += 1
        if self.runs % RUNS_OF_A_MOUNT == 0:
            self._end()
            self._weigh()
            self._begin()
        at = 0
        while at + RECORD.size <= len(data):
            which, flags, error, size = RECORD.unpack_from(data, at)
            at += RECORD.size
            body = data[at : at + size]
            at += size
            if which == EVENT:
                self._tell(flags, error, body)
            else:
                self._ask(which % len(REQUESTS), flags, error, body)
        self._ask(_NAMES.index("GETATTR"), 0, 0, _ATTR_REPLY, honest=True)

    def _ask(self, which: int, flags: int, error: int, body: bytes, honest: bool = False) -> None:
        """Send a request of the kernel, and play the engine until the kernel has its answer.

        `honest`: that is given as often as it is asked for, and has to reach the kernel.
        """
        name, opcode, argument, _ = REQUESTS[which]
        self._unique += 2
        head = _IN_HEADER.pack(_IN_HEADER.size + len(argument), opcode, self._unique, 1, 0, 0, os.getpid(), 0, 0)
        self._kernel.send(head + argument)
        answers = [(flags, error, body)] * (100 if honest else 1)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert time.monotonic() < deadline, f"the kernel gets no answer to {name}"
            readable, _, _ = select.select([self._kernel, self._line.sock, self._event.sock], [], [], 0.005)
            if self._kernel in readable and self._has_answer(honest):
                return
            self._play(name, answers)
            self._mend()

    def _has_answer(self, honest: bool) -> bool:
        """Take a message to the kernel; True if it is the answer. The others are notifications, or answers to waits."""
        message = self._kernel.recv(1 << 21)
        length, error, unique = _OUT_HEADER.unpack_from(message)
        assert length == len(message), "the kernel would refuse that reply"
        if unique == 0:
            return False
        assert -512 < error <= 0 and (error == 0 or length == _OUT_HEADER.size), f"the kernel would refuse {message!r}"
        if unique == self._unique:
            assert error == 0 or not honest, f"the request after the wrong answers failed with {error}"
        return unique == self._unique

    def _play(self, name: str, answers: list[tuple[int, int, bytes]]) -> None:
        """Answer what the driver asks: by the input once, then honestly."""
        while (asked := self._line.take()) is not None:
            op = OPERATION_NAMES[asked[0]]
            if (op in _ITS_OWN and op != name) or not answers:
                flags, error, body = 0, errno.EIO if op not in _ITS_OWN else 0, b""
            else:
                flags, error, body = answers.pop()
            self._reply(self._line, asked, flags, error, body)
        while (asked := self._event.take()) is not None:
            self._number += asked[0] != OPERATIONS["PING"]
            numbered = (asked[0], asked[1], 0 if asked[0] == OPERATIONS["PING"] else self._number, asked[3])
            self._reply(self._event, numbered, 0, 0 if asked[0] == OPERATIONS["PING"] else errno.EINTR, b"")

    def _reply(self, line: _Line, asked: tuple[int, int, int, int], flags: int, error: int, body: bytes) -> None:
        op, slot, sequence, tag = asked
        length = HEADER_BYTES + len(body) + (8 if flags & LONGER else -4 if flags & SHORTER else 0)
        op = op + (flags & ANOTHER_OP) & 0xFFFF
        sequence += 5 if flags & ANOTHER_NUMBER else 0
        head = wire.header(
            length, op, 0 if flags & NO_REPLY else 1, error if error < 1 << 15 else -error, slot, sequence, tag
        )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.sock.sendall(head + body)
            if flags & (HANG_UP | LONGER | SHORTER):  # what is left over may promise more, which is waited for
                line.sock.shutdown(socket.SHUT_RDWR)

    def _mend(self) -> None:
        """Replace channels that the driver gave up, as its manager does."""
        for slot in self.mount.lost():
            self.breaks += 1
            old = self._event if slot == EVENT_LINE else self._line
            fresh = _Line(old.last)
            if slot == EVENT_LINE:
                self._event = fresh
            else:
                self._line = fresh
            self.mount.deliver(slot, fresh.connection, 1, old.last)
            old.close()

    def _tell(self, flags: int, error: int, body: bytes) -> None:
        """Say something on the event channel, and wait until the driver has taken it."""
        op, tag = _EVENT_HEAD.unpack(body[: _EVENT_HEAD.size].ljust(_EVENT_HEAD.size, b"\0"))
        self._number += 1
        self._reply(self._event, (op, EVENT_SLOT, self._number, tag), flags, error, body[_EVENT_HEAD.size :])
        if flags & ANOTHER_NUMBER:
            self._number += 5  # whatever is below has been seen
        self.mount.take_changes()


# ---- seeds


def put_off_once() -> bytes:
    """A request that the engine answers "later"."""
    return RECORD.pack(_NAMES.index("REMOVEXATTR"), 0, DELAYED, 0)


def client_seeds() -> list[bytes]:
    """Honest answers to every request, and each way to spoil one."""

    def answer(index: int, flags: int = 0, error: int = 0, body: bytes | None = None) -> bytes:
        body = REQUESTS[index][3] if body is None else body
        return RECORD.pack(index, flags, error, len(body)) + body

    def told(op: str, tag: int, flags: int, body: bytes = b"") -> bytes:
        body = _EVENT_HEAD.pack(OPERATIONS[op], tag) + body
        return RECORD.pack(EVENT, flags, 0, len(body)) + body

    everything = range(len(REQUESTS))
    listing = _NAMES.index("READDIRPLUS")
    return [
        *(answer(index) for index in everything),
        *(answer(index, 0, errno.EACCES, b"") for index in (0, 10, 33)),
        put_off_once(),
        *(answer(index, 0, 0, REQUESTS[index][3] + b"12345678") for index in everything),
        *(answer(index, 0, 0, REQUESTS[index][3][:-1]) for index in everything if REQUESTS[index][3]),
        *(answer(11, flags) for flags in (ANOTHER_OP, ANOTHER_NUMBER, NO_REPLY, SHORTER, LONGER, HANG_UP)),
        answer(listing, 0, 0, (_ENTRY + struct.pack("<QQII", 7, 1, 0xFFFFFFFF, 8)) * 2),
        answer(_NAMES.index("SETLKW"), 0, errno.EAGAIN, b"") + told("SETLKW", 2, 0),
        answer(_NAMES.index("OPEN"), 0, errno.EINPROGRESS, b"") + told("OPEN", 2, 0, _OPENED),
        answer(_NAMES.index("READ"), 0, errno.EINPROGRESS, b"") + told("READ", 2, 0, b"data"),
        answer(_NAMES.index("POLL")) + told("READY", 1, NO_REPLY),
        told("MOUNTS_CHANGED", 0, NO_REPLY, struct.pack("<QII", 1, 4, 0) + b"name"),
        told("PING", 0, 0),
        b"".join(answer(index) for index in everything),
    ]
