"""Connections to the engine: the handshake, and the session that they belong to.

Every socket begins with HELLO and, if the engine asks for it, AUTHENTICATE. Then it either opens a session with MOUNT,
whose slot 0 it becomes, or joins one with ATTACH. doc/protocol.md specifies the messages; nothing here is per-request.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from dataclasses import dataclass
from typing import Any

from qtfs_common import auth
from qtfs_common.addresses import Address, PcieAddress, ShmAddress, connect_socket
from qtfs_common.errors import QtfsError
from qtfs_common.protocol import LIMITS, MAGIC, OPERATIONS, REPLY, VERSION
from qtfs_common.rings.shared import connect_ring
from qtfs_common.transport import Connection

#: qtfs_common.protocol's records, for struct.
HEADER = struct.Struct("<IHHiIQQ")
_HELLO = struct.Struct("<IHHII32s")
_WELCOME = struct.Struct("<HHIII32s")
_MOUNT_REQUEST = struct.Struct("<II")
_MOUNT_REPLY = struct.Struct("<Q32sII")
_ATTACH_REQUEST = struct.Struct("<Q32sII")
_ATTACH_REPLY = struct.Struct("<Q")

_MOUNT_READ_ONLY = 1
_MOUNT_WATCH = 2
_MOUNT_LET_GO = 4
#: An extended attribute of the largest size has to fit.
_MIN_PAYLOAD = 65536
_MOUNT_FAILURE = 32  # mount(8), section "EXIT STATUS"
#: Seconds for the handshake where the user said "wait for ever".
_FOR_EVER_S = 1e6


class HandshakeError(QtfsError):
    """The engine was reached but did not let us in; the text says why."""

    exit_code = _MOUNT_FAILURE

    def __init__(self, message: str, errno: int = 0) -> None:
        self.errno = errno
        super().__init__(message)


class SessionLostError(HandshakeError):
    """The engine does not know the session any more: it was restarted, or the session's grace ended."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What MOUNT granted: all that a connection needs to join the session.

    Slots from `slots` on, `control` of them, are for requests that may take long. `max_payload`: bytes of the longest
    READ or WRITE.
    """

    session: int
    secret: bytes
    slots: int
    grace_s: int
    control: int = 0
    max_payload: int = LIMITS["MAX_PAYLOAD"]


def encode(op: int, body: bytes = b"", *, slot: int = 0, sequence: int = 0, tag: int = 0) -> bytes:
    """One request message, whole."""
    return HEADER.pack(HEADER.size + len(body), op, 0, 0, slot, sequence, tag) + body


def detach(connection: Connection, timeout_s: float, *, slot: int = 0) -> None:
    """Tell the engine that the session of this connection is over, and wait until it is. Raises OSError.

    What it sent before, as an event channel does on its own, is not looked at.
    """
    deadline_s = time.monotonic() + timeout_s
    connection.send(encode(OPERATIONS["DETACH"], slot=slot), timeout_s)
    while (left_s := deadline_s - time.monotonic()) > 0:
        if connection.receive(left_s)[0] == OPERATIONS["DETACH"]:
            return
    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))  # whoever answers there says other things only


class Engine:
    """Where an engine is and how to prove who we are; opens connections that are past the handshake.

    `timeout_s` bounds each attempt as a whole: connecting, greeting, and what comes of it.
    """

    def __init__(self, address: Address, key: bytes | None = None, timeout_s: float = 30.0) -> None:
        self.address = address
        self._key = key
        self._timeout_s = timeout_s or _FOR_EVER_S

    def with_timeout(self, timeout_s: float) -> Engine:
        """The same engine, asked with another patience; 0 waits for ever."""
        return Engine(self.address, self._key, timeout_s)

    def mount(
        self,
        source: str,
        *,
        read_only: bool = False,
        slots: int = 16,
        control: int = 0,
        watch: bool = False,
        let_go: bool = False,
    ) -> tuple[Connection, Ticket]:
        """Open a session on a directory of the server; the connection is its slot 0. `control`: how many more slots.

        `watch`: its event channel tells when the server's mounts change. `let_go`: the session does not keep the
        server from unmounting what the directory lies on.
        Raises ConnectError if nobody answers, HandshakeError with the cause if the engine refuses.
        """
        deadline_s = time.monotonic() + self._timeout_s
        connection = self._connect(deadline_s)
        try:
            flags = read_only * _MOUNT_READ_ONLY | watch * _MOUNT_WATCH | let_go * _MOUNT_LET_GO
            wanted = min(slots + control, LIMITS["MAX_SLOTS"]) if control else slots
            body = _MOUNT_REQUEST.pack(flags, wanted) + os.fsencode(source)
            error, reply = self._exchange(connection, OPERATIONS["MOUNT"], body, deadline_s)
            if error:
                raise HandshakeError(self._mount_failure(source, error), error)
            session, secret, granted, grace_s = self._unpack(_MOUNT_REPLY, reply)
            control = min(control, granted - 1)
            return connection, Ticket(session, secret, granted - control, grace_s, control, connection.max_payload)
        except BaseException:
            connection.close()
            raise

    def attach(self, ticket: Ticket, slot: int) -> tuple[Connection, int]:
        """Join a session as a slot, or as its event channel; also the slot's last executed sequence number.

        Raises SessionLostError if the session has ended, ConnectError or HandshakeError for the rest.
        """
        deadline_s = time.monotonic() + self._timeout_s
        connection = self._connect(deadline_s)
        try:
            body = _ATTACH_REQUEST.pack(ticket.session, ticket.secret, slot, 0)
            error, reply = self._exchange(connection, OPERATIONS["ATTACH"], body, deadline_s)
            if error == errno.ESTALE:
                raise SessionLostError(f"{self.address}: the engine has forgotten this mount", error)
            if error:
                raise HandshakeError(f"{self.address}: cannot join the session: {os.strerror(error)}", error)
            (last_sequence,) = self._unpack(_ATTACH_REPLY, reply)
            self.check_payload(connection.max_payload, ticket)
            return connection, last_sequence
        except BaseException:
            connection.close()
            raise

    def check_payload(self, payload: int, ticket: Ticket) -> None:
        """Raises HandshakeError if the engine takes less at once than when a mount began: its kernel sends that."""
        if payload < ticket.max_payload:
            raise HandshakeError(f"{self.address}: the engine takes {payload} bytes at once now, where it took "
                                 f"{ticket.max_payload}: mount again", errno.EMSGSIZE)

    def connect(self) -> Connection:
        """A connection past HELLO and AUTHENTICATE, which belongs to no session. Raises as `attach`."""
        return self._connect(time.monotonic() + self._timeout_s)

    # ------------------------------------------------------------------------------------------------- handshake

    def _connect(self, deadline_s: float) -> Connection:
        """A connection past HELLO and AUTHENTICATE."""
        connection = self._reach()
        try:
            self._hello(connection, deadline_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def _reach(self) -> Connection:
        """A connection of whatever transport the address names."""
        if isinstance(self.address, PcieAddress | ShmAddress):
            return connect_ring(self.address, self._timeout_s)
        sock = connect_socket(self.address, self._timeout_s if self._timeout_s < _FOR_EVER_S else None)
        sock.setblocking(False)
        return Connection(sock.detach())

    def _hello(self, connection: Connection, deadline_s: float) -> None:
        nonce = auth.new_nonce()
        body = _HELLO.pack(MAGIC, VERSION, VERSION, 0, 0, nonce)
        error, reply = self._exchange(connection, OPERATIONS["HELLO"], body, deadline_s)
        if error == errno.EPROTONOSUPPORT:
            raise HandshakeError(f"{self.address}: version mismatch: the engine does not speak version "
                                 f"{VERSION} of the protocol", error)
        if error:
            raise HandshakeError(f"{self.address}: the engine refused us: {os.strerror(error)}", error)
        version, authentication, _features, payload, _slots, server_nonce = self._unpack(_WELCOME, reply)
        if version != VERSION:
            raise HandshakeError(f"{self.address}: version mismatch: the engine speaks version {version} of the "
                                 f"protocol, this client version {VERSION}", errno.EPROTONOSUPPORT)
        if payload < _MIN_PAYLOAD:
            raise HandshakeError(f"{self.address}: the engine takes {payload} bytes at once: too few", errno.EPROTO)
        connection.max_payload = min(payload, LIMITS["MAX_PAYLOAD"])
        if authentication:
            self._authenticate(connection, nonce, server_nonce, deadline_s)

    def _authenticate(self, connection: Connection, nonce: bytes, server_nonce: bytes, deadline_s: float) -> None:
        """Prove that we know the key, and see that the engine does."""
        if self._key is None:
            raise HandshakeError(f"{self.address}: the engine demands authentication: give key_file=FILE", errno.EACCES)
        binding = nonce + server_nonce
        ours = auth.proof(self._key, auth.CLIENT, nonce, server_nonce, binding)
        error, theirs = self._exchange(connection, OPERATIONS["AUTHENTICATE"], ours, deadline_s)
        if error:
            raise HandshakeError(f"{self.address}: authentication failed: the engine has another key", error)
        if not auth.verify(theirs, self._key, auth.SERVER, nonce, server_nonce, binding):
            raise HandshakeError(f"{self.address}: authentication failed: the engine could not prove that it has our "
                                 "key", errno.EACCES)

    # --------------------------------------------------------------------------------------------------- messages

    def _exchange(self, connection: Connection, op: int, body: bytes, deadline_s: float) -> tuple[int, bytes]:
        """One request and its reply: (errno, body)."""
        try:
            connection.send(encode(op, body), deadline_s - time.monotonic())
            reply_op, flags, error, _slot, _sequence, _tag, reply = connection.receive(deadline_s - time.monotonic())
        except TimeoutError as timeout:
            raise HandshakeError(f"{self.address}: the engine does not answer: timed out", errno.ETIMEDOUT) from timeout
        except OSError as failure:
            number = failure.errno or errno.EIO
            cause = "it is no qtfs engine" if number == errno.EPROTO else os.strerror(number)
            raise HandshakeError(f"{self.address}: the connection broke in the handshake: {cause}", number) from failure
        if reply_op != op or not flags & REPLY:
            raise HandshakeError(f"{self.address}: whoever answers there is no qtfs engine", errno.EPROTO)
        return error, reply

    def _unpack(self, record: struct.Struct, reply: bytes) -> tuple[Any, ...]:
        if len(reply) != record.size:
            raise HandshakeError(f"{self.address}: the engine sent a malformed reply", errno.EPROTO)
        return record.unpack(reply)

    def _mount_failure(self, source: str, error: int) -> str:
        causes = {
            errno.EPERM: "refused by the engine's whitelist ([Mount])",
            errno.ENOENT: "no such directory on the server",
            errno.ENOTDIR: "not a directory on the server",
            errno.EACCES: "the engine may not open it",
            errno.EPROTONOSUPPORT: "version mismatch",
        }
        return f"{self.address}: {source}: {causes.get(error, os.strerror(error))}"
