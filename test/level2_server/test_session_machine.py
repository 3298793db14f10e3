"""The session's logic against a model of it: whatever a client does to its connections, in whatever order.

Slots are attached, cut, stolen; requests are sent again, half sent, or left without their reply being read; numbers are
skipped; headers are garbled; the event channel breaks with messages on their way. The model knows the last number
of each slot, which directories there must be, and which messages of the event channel are still to come.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import EngineProcess
from harness.session import Session, attach_stream, is_closed_by_peer, receive_exactly
from harness.waiting import wait_until
from harness.wire import EVENT_SLOT, HEADER_BYTES, ROOT
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qtfs_client.connection import HandshakeError, SessionLostError
from qtfs_common.protocol import OPERATIONS
from qtfs_common.transport import Connection

#: Slot 0 is the observer's, whose connection stays.
SLOTS = (1, 2, 3)
PATIENCE_S = 10.0
SETTINGS = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class Slot:
    """What is known of one slot."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sock: socket.socket | None = None
        self.sequence = 0
        self.last: bytes | None = None  # the request of that number
        self.reply: bytes | None = None  # its reply, once it was read
        self.doubtful: bytes | None = None  # a request that went out whole, and nobody looked what became of it


def receive(sock: socket.socket) -> bytes:
    """One whole message."""
    head = receive_exactly(sock, HEADER_BYTES)
    assert len(head) == HEADER_BYTES, "the engine closed the connection"
    return head + receive_exactly(sock, wire.read_header(head)[0] - HEADER_BYTES)


class SessionMachine(RuleBasedStateMachine):
    """One session; each example begins with a fresh one."""

    def __init__(self, engine: EngineProcess, share: Path) -> None:
        super().__init__()
        self.engine = engine
        self.share = share
        self.made = 0

    @initialize()
    def begin(self) -> None:
        for path in self.share.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        self.directories: set[str] = set()
        (self.share / "locked").touch()
        self.session = Session(self.engine.address, self.share, slots=4)
        self.handle = self.session.open(self.session.lookup(ROOT, b"locked").node, 2).handle
        self.by_number = {number: Slot(number) for number in SLOTS}
        self.event: Connection | None = None
        self.event_number = 0  # of the last message that the engine has given us or owes us
        self.seen = 0  # the last that was received
        self.confirmed = 0  # the last of which we know that the engine knows it
        self.owed: list[int] = []  # tags of replies from seen + 1 on
        self.tag = 0

    def teardown(self) -> None:
        for slot in self.by_number.values():
            self._close(slot)
        self._close_event()
        self.session.detach()
        wait_until(self.engine.is_idle, f"the engine to let everything go; it has {self.engine.figures()}")
        self.engine.check_log()

    # ---- slots

    def _close(self, slot: Slot) -> None:
        if slot.sock is not None:
            slot.sock.close()
            slot.sock = None

    def _attach(self, slot: Slot) -> socket.socket:
        """Join as a client does: what the engine says of the last number tells what became of a doubtful request."""
        connection, last = self.session.engine.attach(self.session.ticket, slot.number)
        sock = socket.socket(fileno=connection.detach())
        sock.settimeout(20)
        if slot.doubtful is None:
            assert last == slot.sequence
        else:
            assert last in (slot.sequence, slot.sequence + 1)
            sock.sendall(slot.doubtful)
            slot.sequence, slot.last, slot.reply = slot.sequence + 1, slot.doubtful, receive(sock)
            slot.doubtful = None
            assert wire.read_header(slot.reply)[3] == 0, "it took effect once: a second time would be EEXIST"
        slot.sock = sock
        return sock

    def _attached(self, number: int) -> tuple[Slot, socket.socket]:
        slot = self.by_number[number]
        return slot, slot.sock or self._attach(slot)

    def _mkdir(self, slot: Slot, sequence: int) -> bytes:
        """A request that cannot succeed twice."""
        self.made += 1
        body = wire.caller(ROOT) + struct.pack("<II", 0o755, 0) + b"%d" % self.made
        return wire.message(OPERATIONS["MKDIR"], body, slot=slot.number, sequence=sequence, tag=self.made)

    def _breach(self, slot: Slot, message: bytes) -> None:
        """Say something that ends the connection, and is counted."""
        before = self.engine.figures()["malformed"]
        assert slot.sock is not None
        slot.sock.sendall(message)
        assert is_closed_by_peer(slot.sock)
        self._close(slot)
        # Not "one more": what was left unread on a connection that was replaced may be found to come too late.
        wait_until(lambda: self.engine.figures()["malformed"] > before, "the breach to be counted")

    @rule(number=st.sampled_from(SLOTS))
    def request(self, number: int) -> None:
        slot, sock = self._attached(number)
        message = self._mkdir(slot, slot.sequence + 1)
        sock.sendall(message)
        slot.reply = receive(sock)
        slot.sequence, slot.last = slot.sequence + 1, message
        header = wire.read_header(slot.reply)
        assert header[1:] == (OPERATIONS["MKDIR"], 1, 0, number, slot.sequence, self.made)
        self.directories.add(str(self.made))

    @rule(number=st.sampled_from(SLOTS), times=st.integers(1, 3))
    def repeat(self, number: int, times: int) -> None:
        """Over the same connection or another: the same reply, byte for byte."""
        slot, sock = self._attached(number)
        for _ in range(times if slot.last else 0):
            assert slot.last is not None
            sock.sendall(slot.last)
            assert receive(sock) == slot.reply

    @rule(number=st.sampled_from(SLOTS), share=st.floats(0, 1))
    def cut_in_the_middle(self, number: int, share: float) -> None:
        """Some bytes of a request, or all, and the end; the reply is read by nobody."""
        slot, sock = self._attached(number)
        message = self._mkdir(slot, slot.sequence + 1)
        size = int(len(message) * share)
        sock.sendall(message[:size])
        self._close(slot)
        if size == len(message):
            slot.doubtful = message
            self.directories.add(str(self.made))

    @rule(number=st.sampled_from(SLOTS))
    def cut(self, number: int) -> None:
        self._close(self.by_number[number])

    @rule(number=st.sampled_from(SLOTS))
    def steal(self, number: int) -> None:
        """A second connection for a slot that is attached: the first is cut by the engine."""
        slot, sock = self._attached(number)
        self._attach(slot)
        assert is_closed_by_peer(sock)
        sock.close()

    @rule(number=st.sampled_from(SLOTS), jump=st.sampled_from([-2, -1, 2, 3, 1 << 32, 1 << 63]))
    def wrong_number(self, number: int, jump: int) -> None:
        slot, _ = self._attached(number)
        self._breach(slot, self._mkdir(slot, max(slot.sequence + jump, 0)))

    @rule(number=st.sampled_from(SLOTS), length=st.sampled_from([0, 31, 1056769, 0xFFFFFFFF]))
    def wrong_length(self, number: int, length: int) -> None:
        slot, _ = self._attached(number)
        self._breach(slot, struct.pack("<I", length) + self._mkdir(slot, slot.sequence + 1)[4:])

    @rule(number=st.sampled_from(SLOTS), op=st.sampled_from([0, 1, 3, 4, 7, 15, 45, 63, 0xFFFF]))
    def wrong_operation(self, number: int, op: int) -> None:
        slot, _ = self._attached(number)
        self._breach(slot, wire.message(op, wire.caller(ROOT), slot=number, sequence=slot.sequence + 1))
        # Of a file operation the number is taken before anybody looks what it is.
        counts = op >= 16 and op != OPERATIONS["SETLKW"]
        if counts:
            slot.sequence, slot.last, slot.reply = slot.sequence + 1, None, None

    @rule()
    def everything_is_cut(self) -> None:
        """All but the observer's: well within the grace time."""
        for slot in self.by_number.values():
            self._close(slot)
        self._close_event()

    @rule(secret=st.binary(min_size=32, max_size=32), number=st.sampled_from([*SLOTS, EVENT_SLOT]))
    def a_stranger_with_another_secret(self, secret: bytes, number: int) -> None:
        with pytest.raises(HandshakeError) as refused:
            attach_stream(self.engine.address, replace(self.session.ticket, secret=secret), number)
        assert refused.value.errno == errno.EACCES

    # ---- the event channel

    def _close_event(self) -> None:
        if self.event is not None:
            self.event.close()
            self.event = None

    def _lock(self, tag: int) -> None:
        """SETLKW of a lock that we have already: it is answered, with the next number."""
        self._send_event("SETLKW", wire.caller(ROOT) + self.session.lock_body(self.handle, 5, 0), tag)

    def _attach_event(self) -> None:
        """Join, and say again what has no reply: the engine may have seen it or not, and answers it once."""
        self.event, _ = self.session.engine.attach(self.session.ticket, EVENT_SLOT)
        for tag in self.owed:
            self._lock(tag)
        self._take_owed(len(self.owed))

    def _send_event(self, op: str, body: bytes, tag: int) -> None:
        assert self.event is not None
        self.event.send(wire.message(OPERATIONS[op], body, slot=EVENT_SLOT, sequence=self.seen, tag=tag), PATIENCE_S)

    def _receive_event(self) -> wire.Reply:
        """The next message that is news. What we did not confirm comes again over a fresh channel, and nothing else."""
        assert self.event is not None
        while True:
            reply = wire.Reply._make(self.event.receive(PATIENCE_S))
            if reply.sequence == 0 or reply.sequence > self.seen:
                return reply
            assert reply.sequence > self.confirmed

    def _take_owed(self, count: int) -> None:
        """Replies come in order of their numbers, each once as far as we have confirmed."""
        for tag in self.owed[:count]:
            assert self._receive_event()[:6] == (OPERATIONS["SETLKW"], 1, 0, EVENT_SLOT, self.seen + 1, tag)
            self.seen += 1
        del self.owed[:count]

    @rule(take=st.booleans())
    def ask_on_event(self, take: bool) -> None:
        if self.event is None:
            self._attach_event()
        self.tag += 1
        self._lock(self.tag)
        self.owed.append(self.tag)
        self.event_number += 1
        if take:
            self._take_owed(len(self.owed))

    @precondition(lambda self: self.event is not None)
    @rule()
    def ping_confirms(self) -> None:
        """Behind it nothing is kept any more."""
        self._take_owed(len(self.owed))
        self._send_event("PING", b"", 1 << 62)
        assert self._receive_event()[:6] == (OPERATIONS["PING"], 1, 0, EVENT_SLOT, 0, 1 << 62)
        self.confirmed = self.seen
        (figures,) = self.engine.figures()["sessions"]
        assert (figures["outbox_bytes"], figures["event_number"]) == (0, self.event_number)

    # ---- always

    @invariant()
    def what_is_there_is_what_was_made(self) -> None:
        if hasattr(self, "session"):
            doubtful = {slot.number for slot in self.by_number.values() if slot.doubtful}
            if not doubtful:
                assert {path.name for path in self.share.iterdir()} == self.directories | {"locked"}


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine whose counters nobody else moves."""
    with EngineProcess(tmp_path / "engine").running() as engine:
        yield engine


def test_a_session_is_as_its_model(own: EngineProcess) -> None:
    run_state_machine_as_test(lambda: SessionMachine(own, own.share), settings=SETTINGS)  # type: ignore[no-untyped-call]


def test_after_detach_nothing_can_be_attached(own: EngineProcess) -> None:
    session = Session(own.address, own.share)
    session.event()
    ticket = session.ticket
    session.detach()
    for slot in (0, 1, EVENT_SLOT):
        with pytest.raises(SessionLostError):
            session.engine.attach(ticket, slot)
