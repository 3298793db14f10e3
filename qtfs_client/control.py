"""The control socket of a mount's daemon: other programs of this machine ask for mounts and processes of the server.

A Unix socket with mode 0600 in the run directory, for root and the daemon's own user. A connection carries one call:
a line of JSON, {"operation": NAME, "body": HEX}, answered by {"error": ERRNO, "body": HEX}. The daemon adds who asks,
as the kernel tells it (SO_PEERCRED), and `lazy_cleanup` of its mount. Calls may take as long as the server takes, so
each has a thread; they go over slots of the mount's session that its driver does not use. What was mounted or unmounted
is looked up anew by the kernel before the call returns, whatever it has cached.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from qtfs_client.connection import Engine, Ticket
from qtfs_client.remote_host import CALLS, ask
from qtfs_client.sessions import Session
from qtfs_common import remote_calls
from qtfs_common.addresses import UnixAddress, listen_socket
from qtfs_common.errors import ConnectError
from qtfs_common.protocol import ROOT
from qtfs_common.remote_calls import Action, MountFlag

log = logging.getLogger(__name__)

#: Slots of a session for this. Mounting may hold all of them but one.
CONTROL_SLOTS = 4
_SLOW = frozenset(("SYSMOUNT", "SYSUMOUNT"))
_MOST_CALLS = 64
_MOST_REQUEST_BYTES = 1 << 21
#: For whoever has connected, to ask and to take the answer.
_PATIENCE_S = 30.0
_PEER = struct.Struct("3i")
_NODE = struct.Struct("<Q")
_FORGET_ITEM = struct.Struct("<QQ")


def _changed_names(operation: str, body: bytes) -> list[bytes]:
    """Paths below the root where something else is after a call."""
    if operation == "SYSUMOUNT":
        return [remote_calls.parse_umount(body).target]
    if operation != "SYSMOUNT":
        return []
    call = remote_calls.parse_mount(body)
    moved = call.action == Action.MOVE and call.flags & MountFlag.SOURCE_BELOW
    return [call.target, call.source] if moved else [call.target]


class ControlSession(Session):
    """The slots of a mount's session that its driver leaves to others; the driver begins and ends that session."""

    def __init__(self, engine: Engine, current: Callable[[], Ticket], timeout_s: float) -> None:
        """`current` tells what joins the session as it is now."""
        self._current = current
        super().__init__(engine, None, current(), source="", timeout_s=timeout_s)

    def _slots(self, ticket: Ticket) -> range:
        return range(ticket.slots, ticket.slots + ticket.control)

    def _renew(self, lost_epoch: int) -> None:
        """Follow the driver into the session that it began in place of the lost one."""
        with self._renewing:
            if self._epoch != lost_epoch:
                return
            ticket = self._current()
            if ticket == self._ticket:
                raise ConnectError("the mount has not begun a new session yet")
            with self._guard:
                self._ticket, self._epoch = ticket, lost_epoch + 1

    def close(self) -> None:
        """Close the connections; the session is the driver's to end."""
        self.stop()
        for connection in self._take_connections():
            connection.close()


class ControlServer:
    """Serves the control socket until it is closed."""

    def __init__(
        self, path: Path, session: Session, forget_name: Callable[[int, bytes], None], *, lazy_cleanup: bool
    ) -> None:
        """Listen at `path`. Raises QtfsError. `forget_name` is the driver's."""
        self._forget_name = forget_name
        self._path = path
        self._session = session
        self._lazy_cleanup = lazy_cleanup
        self._calls = threading.BoundedSemaphore(_MOST_CALLS)
        self._slow = threading.BoundedSemaphore(CONTROL_SLOTS - 1)
        self._listening = listen_socket(UnixAddress(str(path)))
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Listen no more; calls under way get EIO."""
        self._session.stop()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            self._calls.acquire()
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="control", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as requests, contextlib.suppress(OSError):
                connection.settimeout(_PATIENCE_S)
                error, body = self._answer(connection, requests.readline(_MOST_REQUEST_BYTES))
                connection.sendall(json.dumps({"error": error, "body": body.hex()}).encode() + b"\n")
        finally:
            self._calls.release()

    def _answer(self, connection: socket.socket, line: bytes) -> tuple[int, bytes]:
        _pid, uid, gid = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid not in (0, os.geteuid()):
            return errno.EPERM, b""
        try:
            request = json.loads(line)
            operation, body = str(request["operation"]), bytes.fromhex(request["body"])
            if operation not in CALLS:
                return errno.EINVAL, b""
            if operation == "SYSMOUNT" and self._lazy_cleanup:
                call = remote_calls.parse_mount(body)
                body = remote_calls.pack_mount(call._replace(flags=call.flags | MountFlag.LAZY_CLEANUP))
            reply = self._call(operation, body, uid, gid)
            for path in _changed_names(operation, body):
                self._renew_name(path)
            return 0, reply
        except OSError as failed:
            return failed.errno or errno.EIO, b""
        except (ValueError, KeyError, TypeError) as malformed:
            log.warning("a malformed request on the control socket: %s", malformed)
            return errno.EINVAL, b""

    def _renew_name(self, path: bytes) -> None:
        """Have the kernel look up what is at a path now. Nodes in this session are those that the kernel knows."""
        directory, _, name = path.rpartition(b"/")
        node, seen = ROOT, []
        try:
            for component in filter(None, directory.split(b"/")):
                (node,) = _NODE.unpack_from(ask(self._session, "LOOKUP", component, 0, 0, node))
                seen.append(_FORGET_ITEM.pack(node, 1))
            self._forget_name(node, name)
        except OSError as error:
            log.debug("%s: %s", os.fsdecode(path), error)  # then nobody else finds it either
        finally:
            if seen:
                ask(self._session, "FORGET", b"".join(seen), 0, 0)

    def _call(self, operation: str, body: bytes, uid: int, gid: int) -> bytes:
        if operation not in _SLOW:
            return ask(self._session, operation, body, uid, gid)
        if not self._slow.acquire(blocking=False):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        try:
            return ask(self._session, operation, body, uid, gid)
        finally:
            self._slow.release()
