"""A proxy between a client and an engine that knows where messages begin and end, and breaks what it is told to.

    with FaultProxy(area / "proxy.sock", engine).running() as proxy:
        proxy.fault = once("reply", "MKDIR", lambda message: Cut(at=0))

`fault` is asked about every message before it is handed on, in the thread of its connection and direction: while it
waits, the message is delayed. None lets the message through; otherwise it says what becomes of the message and of its
connection: `Cut`, `HalfClose`, `Garble`, `Stale`, `Pieces`. What went through whole is counted in `passed`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from harness.engine_process import EngineProcess
from harness.waiting import wait_until

from qtfs_client.connection import HEADER
from qtfs_common.addresses import Address, TcpAddress, UnixAddress, connect_socket
from qtfs_common.errors import QtfsError
from qtfs_common.protocol import EVENT, OPERATION_NAMES

_ATTACH = struct.Struct("<Q32sI")  # session, secret, slot
_JOIN_S = 10.0
_HELD_S = 60.0


@dataclass(frozen=True)
class Message:
    """One message on its way: a "request" or a "reply", and the slot that its connection is attached as."""

    where: str
    operation: str
    slot: int | None
    length: int
    #: Of a request and its reply: the kernel's number for what somebody asked, greater for what is asked later.
    tag: int
    pair: Pair


@dataclass(frozen=True)
class Cut:
    """End the connection after `at` bytes of the message; None: after all of it.

    `stopped` is a process that is stopped meanwhile, so that it finds the bytes and the end of the connection together.
    """

    at: int | None = 0
    stopped: int | None = None


@dataclass(frozen=True)
class HalfClose:
    """Hand the message on, and end this direction alone: who receives it sees the end, who sent it goes on."""


@dataclass(frozen=True)
class Garble:
    """Write `data` over the message from `at` on, hand it on, and end its direction if `ends`."""

    at: int
    data: bytes
    ends: bool = False


@dataclass(frozen=True)
class Stale:
    """For requests: end the client's side, and hand the message on once `messages` more have passed, or `seconds` have.

    The engine gets it, if it still wants it, when the client has come back by another connection.
    """

    messages: int
    seconds: float


@dataclass(frozen=True)
class Pieces:
    """Hand the message on in pieces of so many bytes: the first, and once `go` is set the others."""

    size: int
    go: threading.Event | None = None


Action: TypeAlias = Cut | HalfClose | Garble | Stale | Pieces
Fault: TypeAlias = Callable[[Message], Action | None]


def no_fault(message: Message) -> Action | None:
    return None


def once(where: str, operation: str, strike: Callable[[Message], Action | None]) -> Fault:
    """A fault that strikes the first such message only."""
    struck = threading.Event()

    def fault(message: Message) -> Action | None:
        if (message.where, message.operation) != (where, operation) or struck.is_set():
            return None
        struck.set()
        return strike(message)

    return fault


class Pair:
    """A client's connection and ours to the engine."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.slot: int | None = None
        #: The direction that has ended alone: the other one ends both.
        self.halves: str | None = None

    @property
    def is_event_channel(self) -> bool:
        return bool(self.slot == EVENT)

    def cut(self) -> None:
        for sock in (self.client, self.server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def end(self, where: str, destination: socket.socket) -> None:
        """End one direction."""
        self.halves = where
        destination.shutdown(socket.SHUT_WR)

    def note_slot(self, operation: str, message: bytes) -> None:
        if operation == "MOUNT":
            self.slot = 0
        elif operation == "ATTACH":
            self.slot = _ATTACH.unpack_from(message, HEADER.size)[2]


class FaultProxy:
    """Listens on a Unix socket at `path`, or on a TCP port if the engine does; `running()` bounds its life."""

    def __init__(self, path: Path, engine: EngineProcess) -> None:
        self.fault: Fault = no_fault
        self.passed: Counter[tuple[str, str]] = Counter()
        self.latest_tag = 0
        self._engine = engine
        self._refusing = False
        self._guard = threading.Lock()
        self._pairs: set[Pair] = set()
        self._threads: set[threading.Thread] = set()
        self._socket, self.address = _listening(path, over_tcp=engine.listen.startswith("tcp:"))

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultProxy]:
        self._start(self._accept)
        try:
            yield self
        finally:
            self._refusing = True
            self._socket.shutdown(socket.SHUT_RDWR)
            self.cut_all()
            for thread in list(self._threads):
                thread.join(_JOIN_S)
            self._socket.close()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """All connections are cut, and new ones refused."""
        with self._guard:
            self._refusing = True
        self.cut_all()
        try:
            yield
        finally:
            self._refusing = False

    def cut_all(self, wanted: Callable[[Pair], bool] = lambda pair: True) -> None:
        with self._guard:
            pairs = [pair for pair in self._pairs if wanted(pair)]
        for pair in pairs:
            pair.cut()

    def count(self, where: str, operation: str) -> int:
        """How many such messages went through whole."""
        return self.passed[where, operation]

    # ---- connections

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=self._run, args=(target, *arguments), daemon=True)
        self._threads.add(thread)
        thread.start()

    def _run(self, target: Callable[..., None], *arguments: object) -> None:
        try:
            target(*arguments)
        finally:
            self._threads.discard(threading.current_thread())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._socket.accept()[0]
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """Requests in this thread, replies in another; nothing is left open when both are done."""
        with contextlib.suppress(OSError, QtfsError), client, connect_socket(self._engine.address, _JOIN_S) as server:
            pair = Pair(client, server)
            with self._guard:
                if self._refusing:
                    return
                self._pairs.add(pair)
            replies = threading.Thread(target=self._relay, args=("reply", pair), daemon=True)
            replies.start()
            self._relay("request", pair)
            replies.join()
            with self._guard:
                self._pairs.discard(pair)

    def _relay(self, where: str, pair: Pair) -> None:
        ways = (pair.client, pair.server)
        source, destination = ways if where == "request" else ways[::-1]
        try:
            with contextlib.suppress(OSError):
                while data := _receive(source):
                    if not self._hand_on(where, pair, data, destination):
                        return
        finally:
            if pair.halves != where:
                pair.cut()

    def _hand_on(self, where: str, pair: Pair, data: bytes, destination: socket.socket) -> bool:
        """False: this direction is over."""
        _, number, _, _, _, _, tag = HEADER.unpack_from(data)
        operation = OPERATION_NAMES[number]
        if where == "request":
            with self._guard:
                self.latest_tag = max(self.latest_tag, tag)
            pair.note_slot(operation, data)
        action = self.fault(Message(where, operation, pair.slot, len(data), tag, pair))
        if isinstance(action, Cut):
            with _stopped(action.stopped):
                destination.sendall(data[: action.at])
                pair.cut()
            return False
        if isinstance(action, Garble):
            data = data[: action.at] + action.data + data[action.at + len(action.data) :]
        elif isinstance(action, Stale):
            self._outlive(pair, action)
        if action is None:
            self._pass(where, operation, data, destination)
        elif isinstance(action, Pieces):
            _in_pieces(action, data, destination)
        else:
            destination.sendall(data)
        if isinstance(action, HalfClose) or (isinstance(action, Garble) and action.ends):
            pair.end(where, destination)
            return False
        return not isinstance(action, Stale) or self._bury(pair)

    def _pass(self, where: str, operation: str, data: bytes, destination: socket.socket) -> None:
        """Counted first: who has got a message finds it counted."""
        with self._guard:
            self.passed[where, operation] += 1
        try:
            destination.sendall(data)
        except OSError:
            with self._guard:
                self.passed[where, operation] -= 1
            raise

    def _outlive(self, pair: Pair, stale: Stale) -> None:
        """End the client's side, and wait."""
        pair.client.shutdown(socket.SHUT_RDWR)
        deadline, until = time.monotonic() + stale.seconds, self.passed.total() + stale.messages
        while self.passed.total() < until and time.monotonic() < deadline:
            time.sleep(0.001)

    def _bury(self, pair: Pair) -> bool:
        """Let the engine answer whom it wants, or end the connection that it thinks is over. False, for `_hand_on`."""
        pair.end("request", pair.server)
        return False


def _listening(path: Path, over_tcp: bool) -> tuple[socket.socket, Address]:
    if over_tcp:
        sock = socket.create_server(("127.0.0.1", 0), backlog=128)
        return sock, TcpAddress("127.0.0.1", sock.getsockname()[1])
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(128)
    return sock, UnixAddress(str(path))


def _in_pieces(action: Pieces, data: bytes, destination: socket.socket) -> None:
    destination.sendall(data[: action.size])
    if action.go is not None:
        action.go.wait(_HELD_S)
    for at in range(action.size, len(data), action.size):
        destination.sendall(data[at : at + action.size])


def _receive(source: socket.socket) -> bytes:
    """A whole message, or nothing at the end."""
    head = source.recv(HEADER.size, socket.MSG_WAITALL)
    if len(head) < HEADER.size:
        return b""
    rest: int = HEADER.unpack(head)[0] - HEADER.size
    body = source.recv(rest, socket.MSG_WAITALL) if rest else b""
    return head + body if len(body) == rest else b""


@contextlib.contextmanager
def _stopped(pid: int | None) -> Iterator[None]:
    if pid is None:
        yield
        return
    with stopped(pid):
        yield


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP a process for the length of the body."""
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def stop(pid: int) -> None:
    """SIGSTOP, and wait until all its threads have stopped: one may be running still."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(_state(task) == "T" for task in Path(f"/proc/{pid}/task").iterdir()), f"{pid} to stop")


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(") ")[2][0]
