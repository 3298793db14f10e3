"""The slots of one session for Python code: requests that take effect once, whatever becomes of their connections.

A slot carries one request at a time and numbers them; the server answers a repeated number without executing it twice
(doc/protocol.md). So when a connection breaks, its slot is attached to a fresh one, and the same request goes out again
under the same number. If the server has forgotten the whole session, a new one is begun: then a request that may have
been executed is repeated only if that does no harm, and node ids and handles of the old session are ESTALE.

Threads: any number may call. A slot, with its connection, belongs to the thread that took it from the pool. `_renewing`
is held while a new session is begun, I/O included; `_guard` never over I/O. Lock order: _renewing, _guard.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass

from qtfs_client.connection import Engine, SessionLostError, Ticket, detach, encode
from qtfs_common.errors import QtfsError
from qtfs_common.protocol import DELAYED, REPLY
from qtfs_common.transport import Connection

log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
#: Connections that may break in a row under one request before it takes its time, and is given up at its timeout.
_QUICK_BREAKS = 8
#: How soon a waiting thread notices that the session is being closed.
_SLICE_S = 0.5
#: For one attempt to connect, so that the end of the session is noticed between two.
_ATTEMPT_S = 5.0
_DETACH_TIMEOUT_S = 2.0
_FOR_EVER_S = 1e6


@dataclass(slots=True)
class _Slot:
    """One slot. `executed` is the last number that the server is known to have executed, in session `epoch`."""

    index: int
    connection: Connection | None = None
    executed: int = 0
    epoch: int = -1

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


@dataclass(slots=True)
class _Request:
    """A request and what is known of it: its number in session `epoch` (0: none yet), whether it went out whole."""

    op: int
    body: bytes
    repeatable: bool
    patience_s: float
    number: int = 0
    epoch: int = -1
    sent: bool = False
    breaks: int = 0


def _io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


class Session:
    """A mount's session, which outlives its connections.

    `timeout_s` is how long the server may be out of reach, 0 for ever. Takes over `connection`, which is the session's
    slot 0. Other slots are attached when they are first needed.
    """

    def __init__(
        self,
        engine: Engine,
        connection: Connection | None,
        ticket: Ticket,
        *,
        source: str,
        read_only: bool = False,
        timeout_s: float = 30.0,
    ) -> None:
        self._timeout_s = timeout_s or _FOR_EVER_S
        # After half of the time without an answer the other half is for finding out whether the server lives.
        self._patience_s = self._timeout_s / 2
        self._engine = engine.with_timeout(min(self._patience_s, _ATTEMPT_S))
        self._ticket = ticket
        self._source = source
        self._read_only = read_only
        self._epoch = 0
        self._reconnects = 0  # under _guard
        self._first: Connection | None = connection  # slot 0 of this epoch, until that slot takes it
        self._down_since_s: float | None = None
        self._guard = threading.Lock()
        self._renewing = threading.Lock()
        self._closing = threading.Event()
        self._pool: queue.LifoQueue[_Slot] = queue.LifoQueue()
        for index in reversed(self._slots(ticket)):
            self._pool.put(_Slot(index))

    @property
    def ticket(self) -> Ticket:
        """What joins the session as it is now."""
        return self._ticket

    def figures(self) -> dict[str, int]:
        """How often a slot was attached again, and how often the session was begun anew."""
        with self._guard:
            return {"reconnects": self._reconnects, "begun_anew": self._epoch}

    def _slots(self, ticket: Ticket) -> range:
        """Those that are ours."""
        return range(ticket.slots)

    def call(self, op: int, body: bytes, *, repeatable: bool) -> bytes:
        """Have a request executed once; its reply's body. `repeatable`: executing it twice does no harm.

        Raises OSError with the server's errno; EIO if the server stays out of reach, or if it cannot be known whether
        the request was executed.
        """
        request = _Request(op, body, repeatable, self._patience_s)
        delay_s = _FIRST_DELAY_S
        error, reply = self._call_once(request)
        while error == DELAYED:
            # Its file system is stuck, and nothing was done. Others have the slot meanwhile.
            if self._closing.wait(delay_s):
                raise _io_error()
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
            error, reply = self._call_once(_Request(op, body, repeatable, self._patience_s))
        if error:
            raise OSError(error, os.strerror(error))
        return reply

    def _call_once(self, request: _Request) -> tuple[int, bytes]:
        """Have it answered: (errno, body)."""
        slot = self._pool.get()
        try:
            return self._carry_through(slot, request)
        except BaseException:
            slot.disconnect()  # a reply may still be on its way there
            raise
        finally:
            self._pool.put(slot)

    def stop(self) -> None:
        """Let every call end with EIO, those under way within half a second."""
        self._closing.set()

    def close(self) -> None:
        """End the session on the server and close all connections. No call may be under way."""
        self.stop()
        connections = self._take_connections()
        if not any(_detach(connection) for connection in connections) and self._down_since_s is None:
            with contextlib.suppress(QtfsError):
                connections.append(self._engine.attach(self._ticket, 0)[0])
                _detach(connections[-1])
        # Where all this fails, the server ends the session once its grace time is over.
        for connection in connections:
            connection.close()

    def _take_connections(self) -> list[Connection]:
        """Those of the present session, out of the pool."""
        connections = [self._first] if self._first is not None else []
        with contextlib.suppress(queue.Empty):
            while True:
                slot = self._pool.get_nowait()
                if slot.epoch != self._epoch:
                    slot.disconnect()
                elif slot.connection is not None:
                    connections.append(slot.connection)
        return connections

    # --------------------------------------------------------------------------------------------------- requests

    def _carry_through(self, slot: _Slot, request: _Request) -> tuple[int, bytes]:
        """Send a request until it is answered: (errno, body)."""
        begun_s = since_s = time.monotonic()
        delay_s = _FIRST_DELAY_S
        while True:
            if slot.connection is None:
                self._connect(slot, since_s)
            self._number(slot, request)
            since_s = time.monotonic()
            try:
                return self._exchange(slot, request)
            except TimeoutError:
                # Slow, or gone without a word? Attaching again tells, and the request goes on under its number;
                # with more patience, or what always takes this long would never be done.
                slot.disconnect()
                request.patience_s *= 2
            except OSError as failure:
                log.debug("slot %d: %s", slot.index, failure)
                slot.disconnect()
                request.breaks += 1
                if request.breaks > _QUICK_BREAKS:
                    if time.monotonic() - begun_s > self._timeout_s or self._closing.wait(delay_s):
                        raise _io_error() from failure
                    delay_s = min(delay_s * 2, _LONGEST_DELAY_S)

    def _number(self, slot: _Slot, request: _Request) -> None:
        """Give a request its number, or see that it may go out again under the one it has; else EIO."""
        if request.epoch == slot.epoch:
            if slot.executed not in (request.number - 1, request.number):
                raise _io_error()
            return
        if request.sent and not request.repeatable:
            raise _io_error()
        request.number, request.epoch, request.sent = slot.executed + 1, slot.epoch, False

    def _exchange(self, slot: _Slot, request: _Request) -> tuple[int, bytes]:
        """One attempt over a slot's connection. OSError: it broke; TimeoutError: the server is silent."""
        assert slot.connection is not None
        message = encode(request.op, request.body, slot=slot.index, sequence=request.number, tag=request.number)
        slot.connection.send(message, request.patience_s)
        request.sent = True
        op, flags, error, _slot, sequence, _tag, body = self._receive(slot.connection, request.patience_s)
        if op != request.op or not flags & REPLY or sequence != request.number:
            raise OSError(errno.EPROTO, "the server answered something else")
        slot.executed = request.number
        return error, body

    def _receive(self, connection: Connection, patience_s: float) -> tuple[int, int, int, int, int, int, bytes]:
        deadline = time.monotonic() + patience_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                reply: tuple[int, int, int, int, int, int, bytes] = connection.receive(max(0.0, min(left_s, _SLICE_S)))
                return reply
            except TimeoutError:
                if left_s <= _SLICE_S or self._closing.is_set():
                    raise

    # ------------------------------------------------------------------------------------------------ connections

    def _connect(self, slot: _Slot, since_s: float) -> None:
        """Attach a slot, however many attempts it takes; EIO once the server was out of reach for `timeout_s`.

        `since_s`: when it was last known to be there.
        """
        delay_s = _FIRST_DELAY_S
        while not self._closing.is_set():
            try:
                self._attach(slot)
                return
            except SessionLostError:
                continue
            except QtfsError as failure:
                if self._is_hopeless(failure, since_s):
                    break
            self._closing.wait(delay_s)
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
        raise _io_error()

    def _attach(self, slot: _Slot) -> None:
        """One attempt. QtfsError: it failed; SessionLostError: try again in the session that was begun meanwhile."""
        with self._guard:
            ticket, epoch = self._ticket, self._epoch
            first, executed = (self._first if slot.index == 0 else None), 0
            if first is not None:
                self._first = None
        if first is None:
            try:
                first, executed = self._engine.attach(ticket, slot.index)
            except SessionLostError:
                self._renew(epoch)
                raise
        with self._guard:
            self._reconnects += slot.epoch >= 0
        slot.connection, slot.executed, slot.epoch = first, executed, epoch
        if self._down_since_s is not None:
            self._down_since_s = None
            log.warning("the server is back")

    def _renew(self, lost_epoch: int) -> None:
        """Begin a new session in place of the lost one, unless another thread just did."""
        with self._renewing:
            if self._epoch != lost_epoch:
                return
            connection, ticket = self._engine.mount(
                self._source, read_only=self._read_only, slots=self._ticket.slots, control=self._ticket.control
            )
            with self._guard:
                stale = self._first
                self._ticket, self._epoch, self._first = ticket, lost_epoch + 1, connection
            log.warning("%s has forgotten this mount: it was begun anew", self._engine.address)
        if stale is not None:
            stale.close()

    def _is_hopeless(self, failure: QtfsError, since_s: float) -> bool:
        """Note that the server is out of reach, and whether it has been for too long."""
        with self._guard:
            if self._down_since_s is None:
                self._down_since_s = since_s
                log.warning("the server is out of reach: %s", failure)
            return time.monotonic() - self._down_since_s >= self._timeout_s


def _detach(connection: Connection) -> bool:
    """Tell the server that the session is over; False if this connection does not reach it."""
    try:
        detach(connection, _DETACH_TIMEOUT_S)
    except OSError:
        return False
    return True
