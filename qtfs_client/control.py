"""The control socket of a mount's daemon: other programs of this machine ask for mounts and processes of the server.

A Unix socket with mode 0600 in the run directory, for root and the daemon's own user. A connection carries one call:
a line of JSON, {"operation": NAME, "body": HEX}, answered by {"error": ERRNO, "body": HEX}. FIGURES, which has no body,
is answered by {"error": 0, "figures": {…}} (doc/control.md) and asks nobody else. The daemon adds who asks,
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
import time
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
#: Before the next try, when descriptors or threads have run out.
_BREATH_S = 0.1
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
        self,
        path: Path,
        session: Session,
        forget_name: Callable[[int, bytes], None],
        figures: Callable[[], dict[str, object]],
        *,
        lazy_cleanup: bool,
    ) -> None:
        """Listen at `path`. Raises QtfsError. `forget_name` and `figures` are the driver's."""
        self._forget_name = forget_name
        self._figures = figures
        self._path = path
        self._session = session
        self._lazy_cleanup = lazy_cleanup
        self._calls = threading.BoundedSemaphore(_MOST_CALLS)
        self._slow = threading.BoundedSemaphore(CONTROL_SLOTS - 1)
        # The number of the device is ours: a daemon that still listens there has lost its mount, and is about to end.
        path.unlink(missing_ok=True)
        self._listening = listen_socket(UnixAddress(str(path)))
        self._inode = path.lstat().st_ino
        self._closed = False
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Listen no more; calls under way get EIO."""
        self._session.stop()
        self._closed = True
        with contextlib.suppress(OSError):
            if self._path.lstat().st_ino == self._inode:  # not that of the next mount with our number
                self._path.unlink()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while not self._closed:
            self._calls.acquire()
            try:
                self._accept_one()
            except (OSError, RuntimeError) as error:
                self._calls.release()
                if not self._closed:
                    log.warning("control socket: %s", error)  # descriptors or threads have run out
                    time.sleep(_BREATH_S)

    def _accept_one(self) -> None:
        connection, _ = self._listening.accept()
        try:
            threading.Thread(target=self._serve, args=(connection,), name="control", daemon=True).start()
        except RuntimeError:
            connection.close()
            raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as requests, contextlib.suppress(OSError):
                connection.settimeout(_PATIENCE_S)
                reply = self._answer(connection, requests.readline(_MOST_REQUEST_BYTES))
                connection.sendall(json.dumps(reply).encode() + b"\n")
        finally:
            self._calls.release()

    def _answer(self, connection: socket.socket, line: bytes) -> dict[str, object]:
        _pid, uid, gid = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        try:
            if uid not in (0, os.geteuid()):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            request = json.loads(line)
            operation = str(request["operation"])
            if operation == "FIGURES":
                return {"error": 0, "figures": self._figures()}
            return {"error": 0, "body": self._carry_out(operation, bytes.fromhex(request["body"]), uid, gid).hex()}
        except OSError as failed:
            return {"error": failed.errno or errno.EIO, "body": ""}
        except (ValueError, KeyError, TypeError) as malformed:
            log.warning("a malformed request on the control socket: %s", malformed)
            return {"error": errno.EINVAL, "body": ""}

    def _carry_out(self, operation: str, body: bytes, uid: int, gid: int) -> bytes:
        """Have the server carry a call out; the body of its reply."""
        if operation not in CALLS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if operation == "SYSMOUNT" and self._lazy_cleanup:
            call = remote_calls.parse_mount(body)
            body = remote_calls.pack_mount(call._replace(flags=call.flags | MountFlag.LAZY_CLEANUP))
        reply = self._call(operation, body, uid, gid)
        for path in _changed_names(operation, body):
            self._renew_name(path)
        return reply

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
