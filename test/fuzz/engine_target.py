"""The whole engine, in this process, behind a Unix socket or a ring, and a peer that says whatever it is given.

An input is a byte that chooses the state of doc/protocol.md which the peer begins in, and what it says there: bytes as
they are, or records of an operation, flags, the length of a body, and that body. TOKENS in a body stand for nodes and
handles that exist, whose numbers are different each time.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from harness import wire
from harness.engine_process import everything_below, whitelist_text
from harness.leaks import descriptors as descriptors_of
from harness.ring_file import BELL, EPOCH, HEAD, LINE_BEAT, LINE_INSTANCE, SLEEPING, TAIL, RingFile
from harness.session import Session, attach_stream, is_closed_by_peer, stream
from harness.waiting import wait_until
from harness.wire import EVENT_SLOT, HEADER_BYTES, ROOT

from qtfs_client.connection import Engine
from qtfs_common.addresses import ShmAddress, UnixAddress, listen_socket
from qtfs_common.protocol import OPERATIONS
from qtfs_common.rings.geometry import Layout
from qtfs_common.transport import Connection
from qtfs_common.whitelist import parse_whitelist
from qtfs_server.errands import Errands
from qtfs_server.policy import install
from qtfs_server.rings import RingListener
from qtfs_server.server import Server

#: Longer than anything that an engine may wait for on a slot: who waits for that long has found a hang.
PATIENCE_S = 20.0
LOOK_S = 0.2
FILE_BYTES = 16 << 20
RUNS_OF_A_SESSION = 200
LARGEST_GROWTH_BYTES = 64 << 20
RECORD = struct.Struct("<BBH")
STORE = struct.Struct("<BQ")
#: First byte of an input, modulo their number.
STATES = ("raw", "greeted", "slot", "event", "spoil")
#: Bits of a record's flags.
REPEAT, SKIP, AS_REPLY, LIE = 1, 2, 4, 8
#: What stands for a node, and for a handle, of each kind.
NODES = ("root", "file", "directory", "link", "fifo", "gone")
HANDLES = ("file", "append", "directory", "fifo", "gone")
TOKENS = {
    **{("node", kind): b"QTNODE%02d" % number for number, kind in enumerate(NODES)},
    **{("handle", kind): b"QTHAND%02d" % number for number, kind in enumerate(HANDLES)},
}


def records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Operation, flags, body; the last body may be shorter than it says."""
    at = 0
    while at + RECORD.size <= len(data):
        op, flags, size = RECORD.unpack_from(data, at)
        at += RECORD.size
        yield op, flags, data[at : at + size]
        at += size


def record(op: str, body: bytes, flags: int = 0) -> bytes:
    return RECORD.pack(OPERATIONS[op], flags, len(body)) + body


def state(name: str) -> bytes:
    return bytes([STATES.index(name)])


class EngineTarget:
    """`one` is an execution. It raises AssertionError for whatever an engine must not do."""

    def __init__(self, area: Path, transport: str) -> None:
        self.area = area
        self.runs = 0
        self.share = area / "share"
        self.share.mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        install(parse_whitelist(whitelist_text(everything_below(self.share)).encode(), "fuzz"))
        self._stack = contextlib.ExitStack()
        self._errands = Errands()
        self._server = Server(carrier=self._errands, grace_s=1000.0, descriptor_limit=4096)
        self._ring: RingFile | None = None
        if transport == "shm":
            self._listen_on_ring(area)
        else:
            self.address: UnixAddress | ShmAddress = UnixAddress(str(area / "engine.sock"))
            listening = self._stack.enter_context(listen_socket(self.address))
            listening.setblocking(False)
            self._server.listen(listening.fileno(), False)
        self._threads = self._start_threads()
        self._tokens: dict[bytes, bytes] = {}
        self._begin()
        self._descriptors: dict[int, str] | None = None
        self._resident = 0
        self.grown_descriptors = self.grown_bytes = 0

    def _listen_on_ring(self, area: Path) -> None:
        self.address = ShmAddress(str(area / "engine.bar"))
        layout = Layout(channels=8, request_bytes=1 << 18, reply_bytes=1 << 18)
        listener = RingListener(self.address, layout, area)
        self._stack.callback(listener.close)
        self._stack.enter_context(listener.serving(self._server, False))
        self._ring = self._stack.enter_context(RingFile(area / "engine.bar"))

    def _start_threads(self) -> list[threading.Thread]:
        server = self._server
        bodies = [server.work, server.work, server.wait_for_locks, server.watch_streams, server.watch_mounts]
        threads = [threading.Thread(target=body, daemon=True) for body in (*bodies, server.queue_for_locks)]
        for thread in threads:
            thread.start()
        return threads

    # ---- a session and its files

    def _begin(self) -> None:
        """A fresh, small file system, and a session on it with one of each kind of node and handle."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=20000", "none", self.share], check=True)
        (self.share / "file").write_bytes(bytes(range(256)) * 64)
        os.setxattr(self.share / "file", "trusted.x", b"value")
        (self.share / "directory").mkdir()
        for number in range(20):
            (self.share / "directory" / f"name-{number}").touch()
        (self.share / "link").symlink_to("directory/name-1")
        os.mkfifo(self.share / "fifo")
        (self.share / "gone").touch()
        self.session = Session(self.address, self.share, slots=4)
        found = {"root": ROOT, **{kind: self.session.lookup(ROOT, kind.encode()).node for kind in NODES[1:]}}
        handles = {
            "file": self.session.open(found["file"], os.O_RDWR).handle,
            "append": self.session.open(found["file"], os.O_WRONLY | os.O_APPEND).handle,
            "directory": self.session.opendir(found["directory"]),
            "fifo": self.session.open(found["fifo"], os.O_RDWR | os.O_NONBLOCK).handle,
            "gone": self.session.open(found["gone"], os.O_RDWR).handle,
        }
        self.session.unlink(ROOT, b"gone")
        for sort, numbers in (("node", found), ("handle", handles)):
            for kind, number in numbers.items():
                self._tokens[TOKENS[sort, kind]] = struct.pack("<Q", number)

    def _end(self) -> None:
        """The session ends; the engine must have let go of all that it held for it."""
        self.session.detach()
        # One that a DETACH of the fuzzer's ended is over already, or about to be.
        wait_until(self._is_idle, f"the engine to let everything go: {self._server.figures()}", PATIENCE_S)
        # Mounts that the peer made, of its own file system, are the errands' to take away.
        wait_until(self._unmounted, "the file system to be free", PATIENCE_S)

    def _is_idle(self) -> bool:
        figures = self._server.figures()
        return not figures["connections"] and not figures["sessions"] and not figures["descriptors"]

    def _unmounted(self) -> bool:
        return subprocess.run(["umount", "-R", self.share], capture_output=True, check=False).returncode == 0

    def _weigh(self) -> None:
        """Compare descriptors and memory with what they were after the first session."""
        descriptors = descriptors_of("self")
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if self._descriptors is None:
            self._descriptors, self._resident = descriptors, resident
        self.grown_descriptors = len(descriptors) - len(self._descriptors)
        self.grown_bytes = resident - self._resident
        assert self.grown_descriptors <= 4, f"first there were {self._descriptors}, now {descriptors}"

    def close(self) -> None:
        self._end()
        self._weigh()
        self._server.stop()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a thread does not end"
        self._errands.close(PATIENCE_S)
        self._stack.close()

    @property
    def malformed(self) -> int:
        return int(self._server.figures()["malformed"])

    # ---- executions

    def one(self, data: bytes) -> None:
        if not data:
            return
        self.runs += 1
        if self.runs % RUNS_OF_A_SESSION == 0:
            self._end()
            self._weigh()
            self._begin()
        getattr(self, "_say_" + STATES[data[0] % len(STATES)])(data[1:])
        assert self.session.getattr(ROOT).nlink, "others are served"

    def _made_real(self, body: bytes) -> bytes:
        if b"QT" in body:
            for token, number in self._tokens.items():
                body = body.replace(token, number)
        return body

    def _say_raw(self, data: bytes) -> None:
        """Bytes, from the first one of a connection."""
        if isinstance(self.address, ShmAddress):
            return self._say_greeted(data)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.address.path)
            self._say_bytes(sock, data)

    def _say_greeted(self, data: bytes) -> None:
        """Bytes behind HELLO, or in a ring: messages, whole, whatever their headers say."""
        if isinstance(self.address, UnixAddress):
            with stream(self.address) as sock:
                return self._say_bytes(sock, data)
        connection = Engine(self.address).connect()
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            for op, flags, body in records(data):
                self._send(connection, wire.message(op, self._made_real(body), tag=7), flags)
            self._finish(connection)

    def _say_bytes(self, sock: socket.socket, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(self._made_real(data))
            sock.shutdown(socket.SHUT_WR)
        assert is_closed_by_peer(sock), "the engine keeps a connection whose peer says nothing more"

    def _send(self, connection: Connection, message: bytes, flags: int) -> None:
        if flags & AS_REPLY:
            message = message[:6] + b"\1\0" + message[8:]
        if flags & LIE:
            message = struct.pack("<I", len(message) + (flags >> 4) - 8 & 0xFFFFFFFF) + message[4:]
        connection.send(message, PATIENCE_S)

    def _finish(self, connection: Connection) -> None:
        """What is said to the end is answered, or ended by the engine."""
        with contextlib.suppress(ConnectionError, OSError):
            connection.send(wire.message(OPERATIONS["PING"], tag=1 << 60), PATIENCE_S)
            while self._receive(connection).tag != 1 << 60:
                pass

    def _receive(self, connection: Connection) -> wire.Reply:
        """The next reply. Patience is counted in looks: a virtual machine may stand still for long, engine and all."""
        for _ in range(int(PATIENCE_S / LOOK_S)):
            with contextlib.suppress(TimeoutError):
                return wire.Reply._make(connection.receive(LOOK_S))
        raise AssertionError("the engine neither answers nor ends the connection")

    def _say_slot(self, data: bytes) -> None:
        """Requests, one by one, each with its reply."""
        try:
            slot = self.session.slot(1)
            said = list(records(data))
            for op, flags, body in said:
                slot.sequence += 0 if flags & REPEAT else 2 if flags & SKIP else 1
                message = wire.message(op, self._made_real(body), slot=1, sequence=slot.sequence, tag=slot.sequence)
                self._send(slot.connection, message, flags)
                if flags & LIE:
                    break  # what is answered to that, and whether anything is, depends on the rest
                reply = self._receive(slot.connection)
                # Another request under a number that was answered gets that answer.
                assert reply.op == op or flags & REPEAT, reply
                assert reply.flags == 1 and 0 <= reply.error < 4096, reply
            else:
                if all(op != OPERATIONS["DETACH"] for op, _, _ in said):
                    return  # else the session ended after its reply
        except OSError:  # the engine has ended the connection, which is an answer
            pass
        self._rejoin()

    def _rejoin(self) -> None:
        """Come back to slot 1; or begin anew, if what was said ended the session."""
        with contextlib.suppress(KeyError):
            self.session.slots.pop(1).connection.close()
        try:
            self.session.slot(1)
            assert self.session.getattr(ROOT).nlink
        except (OSError, Exception) as lost:
            if isinstance(lost, AssertionError):
                raise
            self._end()
            self._begin()

    def _say_event(self, data: bytes) -> None:
        """Requests on the event channel."""
        try:
            channel = self.session.event()
            said = list(records(data))
            for op, flags, body in said:
                message = wire.message(op, self._made_real(body), slot=EVENT_SLOT, sequence=flags >> 4, tag=op)
                self._send(channel.connection, message, flags & AS_REPLY)
            channel.connection.send(wire.message(OPERATIONS["PING"], tag=1 << 60), PATIENCE_S)
            while self._receive(channel.connection).tag != 1 << 60:
                pass
            if all(op != OPERATIONS["DETACH"] for op, _, _ in said):
                return  # else the PING was there already when the session ended
        except OSError:
            pass
        self.session.lose_event()
        self._rejoin()

    def _say_spoil(self, data: bytes) -> None:
        """Words of a channel's line or area, overwritten while it is open; over a socket: bytes, and the end."""
        if self._ring is None:
            with attach_stream(self.address, self.session.ticket, 2) as sock:
                return self._say_bytes(sock, data)
        ring, places = self._ring, (EPOCH, TAIL, HEAD, SLEEPING, BELL, LINE_INSTANCE, LINE_BEAT)
        fresh: set[int] = set()
        with contextlib.ExitStack() as stack:
            while not fresh:  # a channel that was still being closed may have been taken again: which, nobody tells
                before = set(ring.served())
                connection = stack.enter_context(contextlib.closing(Engine(self.address).connect()))
                fresh = set(ring.served()) - before
            channel = min(fresh)
            for at in range(0, len(data) - STORE.size + 1, STORE.size):
                where, value = STORE.unpack_from(data, at)
                if where < 128:
                    place = places[where % len(places)]
                    # A tail that stays as far behind as it was is more likely to be believed.
                    now = ring.get(ring.client_line(channel) + place)
                    ring.set(ring.client_line(channel) + place, value if where < 64 else now + value & (1 << 64) - 1)
                else:
                    ring.set(ring.request_area(channel) + where % 64 * 8, value)
            with contextlib.suppress(OSError):
                connection.send(wire.message(OPERATIONS["PING"]), 0.05)
                connection.receive(0.01)


# ---- seeds

HELLO = wire.message(OPERATIONS["HELLO"], struct.pack("<IHHII32s", 0x53465451, 1, 1, 0, 0, bytes(32)))


def _caller(kind: str = "root", groups: tuple[int, ...] = (), uid: int = 0) -> bytes:
    return TOKENS["node", kind] + wire.caller(ROOT, wire.Who(uid, uid, groups))[8:]


def _requests() -> list[bytes]:
    """A record of each operation that a slot takes, as real clients send them."""
    handle = {kind: TOKENS["handle", kind] for kind in HANDLES}
    file, root, directory = _caller("file"), _caller(), _caller("directory", (4, 24))
    number = struct.pack
    lock = number("<QQQIIII", 7, 0, 99, 1, 1, 0, 0)
    return [
        record("LOOKUP", root + b"file"),
        record("LOOKUP", _caller("directory", (), 1000) + b"name-3"),
        record("FORGET", root + TOKENS["node", "file"] + number("<Q", 1)),
        record("GETATTR", file + handle["file"] + number("<II", 1, 0)),
        record("SETATTR", file + number("<IIQQqqIIIIII", 9, 0, 0, 100, 0, 0, 0, 0, 0o600, 0, 0, 0)),
        record("READLINK", _caller("link")),
        record("SYMLINK", root + number("<II", 1, 6) + b"starget"),
        record("MKNOD", root + number("<II", stat.S_IFIFO | 0o600, 0) + b"made"),
        record("MKDIR", root + number("<II", 0o755, 0) + b"dir"),
        record("UNLINK", directory + b"name-0"),
        record("RMDIR", root + b"dir"),
        record("RENAME", root + TOKENS["node", "directory"] + number("<IIII", 0, 4, 3, 0) + b"filenew"),
        record("LINK", root + TOKENS["node", "file"] + b"hard"),
        record("OPEN", file + number("<II", os.O_RDWR, 0)),
        record("OPEN", _caller("fifo") + number("<II", os.O_RDONLY, 0)),
        record("READ", file + handle["file"] + number("<QII", 0, 4096, 0)),
        record("READ", _caller("fifo") + handle["fifo"] + number("<QII", 0, 64, 0)),
        record("WRITE", file + handle["file"] + number("<QII", 100, 4, 0) + b"data"),
        record("WRITE", file + handle["append"] + number("<QII", 0, 4, 0) + b"data"),
        record("WRITE", _caller("fifo") + handle["fifo"] + number("<QII", 0, 4, 0) + b"data"),
        record("STATFS", root),
        record("FSYNC", file + handle["file"] + number("<II", 1, 0)),
        record("SETXATTR", file + number("<IIII", 1, 0, 9, 0) + b"trusted.yv"),
        record("GETXATTR", file + number("<IIII", 99, 0, 9, 0) + b"trusted.x"),
        record("LISTXATTR", file + number("<IIII", 99, 0, 0, 0)),
        record("REMOVEXATTR", file + number("<IIII", 0, 0, 9, 0) + b"trusted.x"),
        record("FLUSH", file + handle["file"] + number("<QII", 7, 0, 0)),
        record("OPENDIR", directory + number("<II", 0, 0)),
        record("READDIR", directory + handle["directory"] + number("<QII", 0, 4096, 1)),
        record("READDIR", directory + handle["directory"] + number("<QII", 0, 500, 0)),
        record("FSYNCDIR", directory + handle["directory"] + number("<II", 0, 0)),
        record("GETLK", file + handle["file"] + lock),
        record("SETLK", file + handle["file"] + lock),
        record("ACCESS", file + number("<II", 7, 0)),
        record("CREATE", root + number("<IIII", os.O_RDWR, 0o644, 0, 0) + b"new"),
        record("TMPFILE", root + number("<IIII", os.O_RDWR, 0o644, 0, 0)),
        record("IOCTL", file + handle["file"] + number("<IIII", 0x80086601, 0, 8, 0)),
        record("FALLOCATE", file + handle["file"] + number("<QQII", 0, 65536, 0, 0)),
        record("LSEEK", file + handle["file"] + number("<QII", 0, 3, 0)),
        record(
            "COPY_FILE_RANGE", file + handle["file"] + number("<Q", 0) + handle["gone"] + number("<QQII", 0, 99, 0, 0)
        ),
        record("STATX", file + number("<QIIII", 0, 0, 0, 0, 0xFFF)),
        record("SYNCFS", root),
        record("POLL", _caller("fifo") + handle["fifo"] + number("<QII", 5, 0x145, 1)),
        record("SYSUMOUNT", root + number("<II", 0, 0) + b"directory"),
        record("KILL", root + number("<iIQ", 1, 0, 0)),
        record("GETAFFINITY", root + number("<iIQ", 1, 0, 0)),
        record("PROCESSES", root + number("<II", 0, 4096)),
        record("LIST_MOUNTS", root + number("<QII", 0, 0, 4096)),
        record("SYSMOUNT", root + number("<IIQQIIIIII", 0, 0, 0, 0, 0, 5, 4, 9, 0, 0) + b"tmpfsnonedirectory"),
        record("RELEASE", file + handle["gone"] + number("<QII", 0, 0, 0)),
        record("RELEASEDIR", directory + handle["directory"] + number("<QII", 0, 0, 0)),
    ]


def engine_seeds() -> list[bytes]:
    """Inputs of real messages, and of each way to spoil them."""
    requests = _requests()
    handle = TOKENS["handle", "fifo"]
    lock = _caller("file") + TOKENS["handle", "file"] + struct.pack("<QQQIIII", 9, 0, 99, 1, 1, 0, 0)
    attach = wire.message(OPERATIONS["ATTACH"], struct.pack("<Q32sII", 1, bytes(32), 0, 0))
    mount = wire.message(OPERATIONS["MOUNT"], struct.pack("<II", 0, 1) + b"/nowhere")
    event = [
        record("SETLKW", lock),
        record("READ", _caller("fifo") + handle + struct.pack("<QII", 0, 64, 0), 0x10),
        record("WRITE", _caller("fifo") + handle + struct.pack("<QII", 0, 4, 0) + b"data"),
        record("OPEN", _caller("fifo") + struct.pack("<II", os.O_RDONLY, 0)),
        record("CANCEL", b""),
        record("PING", b""),
    ]
    stores = [STORE.pack(where, value) for where in (0, 1, 2, 3, 4, 5, 65, 66, 128, 129) for value in (1, 1 << 40)]
    return [
        *(state("slot") + one for one in requests),
        state("slot") + b"".join(requests[:24]),
        state("slot") + b"".join(requests[24:]),
        *(
            state("slot") + requests[0] + record("MKDIR", _caller() + bytes(8) + b"x", flags)
            for flags in (1, 2, 4, 0x78)
        ),
        *(state("event") + one for one in event),
        state("event") + b"".join(event),
        state("raw") + HELLO,
        state("raw") + HELLO + mount,
        state("raw") + HELLO[:40],
        state("raw") + b"GET / HTTP/1.0\r\n\r\n",
        state("greeted") + attach,
        state("greeted") + mount + attach,
        state("greeted") + record("ATTACH", attach[HEADER_BYTES:]) + record("PING", b""),
        state("greeted") + record("MOUNT", mount[HEADER_BYTES:]),
        *(state("spoil") + one for one in stores),
        state("spoil") + wire.message(OPERATIONS["STATFS"], wire.caller(ROOT), slot=2, sequence=1),
    ]
