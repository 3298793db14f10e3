"""`RemoteHost`: mounts and processes of the server, for Python code and for qtctl(8).

    with RemoteHost.of_mount("/root/mnt") as host:          # through the daemon of a mount, in its session
        host.kill(4711, signal.SIGTERM)
    with RemoteHost.connect(engine, "/home") as host:       # in a session of its own
        host.mount(MountCall(Action.NEW, b"x", b"none", b"tmpfs"))

Paths in calls are below the session's root: `places.place_of` tells which that is. Every method raises OSError with the
server's errno; what each means is doc/protocol.md's, section 10. Methods may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from qtfs_client.connection import Engine
from qtfs_client.places import QtfsMount, Served, place_of, real_path
from qtfs_client.sessions import Session
from qtfs_common import remote_calls, rundir
from qtfs_common.errors import ConnectError
from qtfs_common.protocol import LIMITS, OPERATIONS, ROOT
from qtfs_common.remote_calls import (
    AffinityCall,
    KillCall,
    ListCall,
    MountCall,
    MountPage,
    MountRecord,
    ProcessRecord,
    UmountCall,
)

#: What doc/protocol.md calls repeatable.
REPEATABLE = frozenset(("GETAFFINITY", "PROCESSES", "LIST_MOUNTS"))
#: All that goes this way.
CALLS = frozenset(("SYSMOUNT", "SYSUMOUNT", "KILL", "SETAFFINITY", *REPEATABLE))

_CALLER = struct.Struct("<QIIIHH")
_PAGE_BYTES = LIMITS["MAX_PAYLOAD"]
_LISTINGS = 100


class Way(Protocol):
    """How calls get to the server."""

    def call(self, operation: str, body: bytes) -> bytes:
        """The reply's body. Raises OSError."""

    def close(self) -> None:
        """Give back what is open."""


def ask(session: Session, operation: str, body: bytes, uid: int, gid: int, node: int = ROOT) -> bytes:
    """One call in a session, for a user."""
    who = _CALLER.pack(node, uid, gid, os.getpid(), 0, 0)
    return session.call(OPERATIONS[operation], who + body, repeatable=operation in REPEATABLE)


class _OwnSession:
    """A session for this alone."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def call(self, operation: str, body: bytes) -> bytes:
        return ask(self._session, operation, body, os.geteuid(), os.getegid())

    def close(self) -> None:
        self._session.close()


class _Daemon:
    """The control socket of a mount's daemon: a line of JSON each way, see control.py."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def call(self, operation: str, body: bytes) -> bytes:
        return bytes.fromhex(self._ask({"operation": operation, "body": body.hex()})["body"])

    def figures(self) -> dict[str, Any]:
        """The daemon's own counters."""
        figures: dict[str, Any] = self._ask({"operation": "FIGURES"})["figures"]
        return figures

    def _ask(self, question: dict[str, str]) -> dict[str, Any]:
        request = json.dumps(question).encode() + b"\n"
        with self._connected() as sock, sock.makefile("rb") as replies:
            sock.sendall(request)
            line = replies.readline()
        if not line:
            raise OSError(errno.EIO, "the daemon of the mount has ended")
        reply: dict[str, Any] = json.loads(line)
        if reply["error"]:
            raise OSError(reply["error"], os.strerror(reply["error"]))
        return reply

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(self._path))
        except OSError as error:
            sock.close()
            raise ConnectError(f"control socket {self._path}: {error.strerror}", error.errno or 0) from error
        return sock

    def close(self) -> None:
        pass


def _malformed(reason: object) -> OSError:
    return OSError(errno.EIO, f"the server sent a malformed listing: {reason}")


def control_socket(directory: Path, device: str) -> Path:
    """Where the daemon of the mount MAJOR:MINOR listens; no two mounts of one kernel have the same numbers."""
    return directory / f"mount-{device}.sock"


def served_from(run_dir: str | None) -> Served:
    """Tells the mounts that have their control socket in a run directory. Raises QtfsError."""
    directory = rundir.run_directory(run_dir)
    return lambda mount: os.path.exists(control_socket(directory, mount.device))


def _daemon_of(mount: QtfsMount | str, run_dir: str | None) -> _Daemon:
    if isinstance(mount, str):
        place = place_of(real_path(mount), served_from(run_dir))
        if place is None:
            raise OSError(errno.EINVAL, f"{mount} is not on a qtfs mount")
        mount = place.mount
    return _Daemon(control_socket(rundir.run_directory(run_dir), mount.device))


def mount_figures(mount: QtfsMount | str, run_dir: str | None = None) -> dict[str, Any]:
    """The counters of a mount's daemon, doc/control.md; the mount as for RemoteHost.of_mount. The server is not asked,
    but of a path the kernel may ask for its attributes.

    Raises QtfsError, OSError.
    """
    return _daemon_of(mount, run_dir).figures()


class RemoteHost:
    """The server, as far as its whitelist lets us change it."""

    def __init__(self, way: Way) -> None:
        self._way = way

    @classmethod
    def connect(cls, engine: Engine, root: str, *, timeout_s: float = 30.0) -> RemoteHost:
        """Begin a session on a directory of the server. Raises QtfsError as Engine.mount does."""
        connection, ticket = engine.mount(root, slots=1)
        return cls(_OwnSession(Session(engine, connection, ticket, source=root, timeout_s=timeout_s)))

    @classmethod
    def of_mount(cls, mount: QtfsMount | str, run_dir: str | None = None) -> RemoteHost:
        """Speak through the daemon of a mount here, given as such or by any path on it. Raises QtfsError, OSError."""
        return cls(_daemon_of(mount, run_dir))

    def close(self) -> None:
        """Give back what is open; mounts stay, but for those with LAZY_CLEANUP of a session of our own."""
        self._way.close()

    def __enter__(self) -> RemoteHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- mounts

    def mount(self, call: MountCall) -> None:
        """Mount, bind, move, remount, or change the propagation, as the call says."""
        self._way.call("SYSMOUNT", remote_calls.pack_mount(call))

    def umount(self, target: bytes, flags: int = 0) -> None:
        """Unmount what is mounted there; `flags` are MNT_* of umount2(2)."""
        self._way.call("SYSUMOUNT", remote_calls.pack_umount(UmountCall(target, flags)))

    def mounts(self) -> list[MountRecord]:
        """The mounts below the session's root, parents first."""
        for _ in range(_LISTINGS):
            with contextlib.suppress(BlockingIOError):  # it changed while it was read
                return list(self._listing())
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _listing(self) -> Iterator[MountRecord]:
        page = self.mount_page()
        found = len(page.mounts)
        yield from page.mounts
        while found < page.total:
            page = self.mount_page(page.token, found)
            if not page.mounts:
                raise _malformed("a page without a mount")
            found += len(page.mounts)
            yield from page.mounts

    def mount_page(self, token: int = 0, first: int = 0) -> MountPage:
        """One LIST_MOUNTS. BlockingIOError (EAGAIN): the listing of that token is no more."""
        body = self._way.call("LIST_MOUNTS", remote_calls.pack_list(ListCall(token, first, _PAGE_BYTES)))
        try:
            return remote_calls.parse_page(body)
        except ValueError as error:
            raise _malformed(error) from error

    # ---- processes

    def kill(self, pid: int, number: int, start: int = 0) -> None:
        """Send a signal; 0 only checks. `start`: of whom is meant, a ProcessRecord's, or 0."""
        self._way.call("KILL", remote_calls.pack_kill(KillCall(pid, number, start)))

    def sched_setaffinity(self, pid: int, cpus: Iterable[int], start: int = 0) -> None:
        """Bind a process, or the thread with that id, to processors of the server."""
        call = AffinityCall(pid, start, remote_calls.mask_of(cpus))
        self._way.call("SETAFFINITY", remote_calls.pack_affinity(call))

    def sched_getaffinity(self, pid: int, start: int = 0) -> set[int]:
        """The processors that a process, or the thread with that id, is bound to."""
        reply = self._way.call("GETAFFINITY", remote_calls.pack_affinity(AffinityCall(pid, start)))
        return remote_calls.cpus_of(reply)

    def processes(self) -> Iterator[ProcessRecord]:
        """The server's processes that the whitelist lets us reach, by pid."""
        after = 0
        while True:
            body = self._way.call("PROCESSES", remote_calls.pack_processes(after, _PAGE_BYTES))
            try:
                page = list(remote_calls.process_records(body))
            except ValueError as error:
                raise _malformed(error) from error
            if not page:
                return
            if page[0].pid <= after:
                raise _malformed("a page that was there before")
            yield from page
            after = page[-1].pid
