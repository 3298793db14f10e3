"""Errands: requests on the server's mounts and processes, which are rare, need Python, and may take long.

A worker that receives one gives it to `Errands.start`, together with its connection, and serves others. Whatever may
wait for another machine or a dead disk (mounting, unmounting) gets a thread to itself; the rest is quick and shares a
few. A request that breaks the protocol is settled with -1, which closes its connection.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from qtfs_common.protocol import OPERATION_NAMES
from qtfs_server import processes, remote_mounts
from qtfs_server.mount_records import MountRecords

log = logging.getLogger(__name__)

#: Mounts and unmounts under way at a time; what is beyond gets EAGAIN.
_MOST_SLOW = 64
_MOST_SLOW_OF_A_SESSION = 8
_QUICK_THREADS = 2


class Errand(Protocol):
    """A request, as server.Errand has it."""

    op: int
    session: int
    session_lives: bool
    read_only: bool
    uid: int
    body: bytes

    def root(self) -> int:
        """A descriptor of the session's root, O_PATH, which is the caller's."""

    def settle(self, error: int, body: bytes) -> None:
        """Answer, once."""


Handler = Callable[[Errand], bytes]


class Errands:
    """Carries errands out. `start` and `session_ended` are called by workers and do not wait."""

    def __init__(self) -> None:
        self.mounts = remote_mounts.RemoteMounts()
        self._slow: dict[str, Handler] = {"SYSMOUNT": self.mounts.mount, "SYSUMOUNT": self.mounts.umount}
        self._quick: dict[str, Handler] = {
            "LIST_MOUNTS": self.mounts.list_mounts,
            "KILL": processes.kill,
            "SETAFFINITY": processes.set_affinity,
            "GETAFFINITY": processes.get_affinity,
            "PROCESSES": processes.list_processes,
        }
        self._waiting: queue.SimpleQueue[Errand] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._sessions_of_slow: list[int] = []
        self._quick_threads = 0

    def start(self, errand: Errand) -> None:
        """Take over a request and its connection."""
        if not (self._start_quick(errand) if OPERATION_NAMES[errand.op] in self._quick else self._start_slow(errand)):
            errand.settle(errno.EAGAIN, b"")

    def session_ended(self, session: int) -> None:
        """Unmount what is to go with a session."""
        if self.mounts.has_any(session):
            self._spawn(self.mounts.clean_up, session)  # if it fails, the mounts stay until the engine ends

    def keep_mounts(self, records: MountRecords, ours: set[str]) -> None:
        """Go on with what sessions mounted before; unmount what is to go with those that have ended since."""
        for session in self.mounts.keep_in(records, ours):
            self.session_ended(session)

    def mounts_of(self, session: int) -> list[int]:
        """Ids of the mounts that a session made."""
        return self.mounts.of_session(session)

    def close(self, timeout_s: float) -> bool:
        """End all sessions' mounts, and wait for what is under way; False if something still is."""
        deadline = time.monotonic() + timeout_s
        last = threading.Thread(target=self.mounts.clean_up_all, daemon=True)
        last.start()
        last.join(timeout_s)
        while self._sessions_of_slow and time.monotonic() < deadline:
            time.sleep(0.05)
        return not last.is_alive() and not self._sessions_of_slow

    # ---- threads

    def _spawn(self, target: Callable[..., None], *args: object) -> bool:
        """Begin a thread; False if the system has none left."""
        try:
            threading.Thread(target=target, args=args, name="errand", daemon=True).start()
        except RuntimeError as error:
            log.error("%s", error)
            return False
        return True

    def _start_slow(self, errand: Errand) -> bool:
        if not self._admit(errand.session):
            log.warning("session %016x: too many mounts are under way", errand.session)
            return False
        if self._spawn(self._be_slow, errand):
            return True
        self._dismiss(errand.session)
        return False

    def _admit(self, session: int) -> bool:
        with self._guard:
            slow = self._sessions_of_slow
            if len(slow) >= _MOST_SLOW or slow.count(session) >= _MOST_SLOW_OF_A_SESSION:
                return False
            slow.append(session)
            return True

    def _be_slow(self, errand: Errand) -> None:
        try:
            _carry_out(errand, self._slow[OPERATION_NAMES[errand.op]])
        finally:
            self._dismiss(errand.session)

    def _dismiss(self, session: int) -> None:
        with self._guard:
            self._sessions_of_slow.remove(session)

    def _start_quick(self, errand: Errand) -> bool:
        with self._guard:
            if self._quick_threads < _QUICK_THREADS and self._spawn(self._be_quick):
                self._quick_threads += 1
            if self._quick_threads == 0:
                return False
        self._waiting.put(errand)
        return True

    def _be_quick(self) -> None:
        while True:
            errand = self._waiting.get()
            _carry_out(errand, self._quick[OPERATION_NAMES[errand.op]])


def _carry_out(errand: Errand, handler: Handler) -> None:
    """Run a handler, whose exceptions are the answer: OSError an errno, ValueError a broken protocol."""
    error, body = 0, b""
    try:
        body = handler(errand)
    except OSError as failed:
        error = failed.errno or errno.EIO
    except ValueError as broken:
        log.warning("session %016x: a malformed %s: %s", errand.session, OPERATION_NAMES[errand.op], broken)
        error = -1
    except Exception:
        log.exception("session %016x: %s", errand.session, OPERATION_NAMES[errand.op])
        error = errno.EIO
    errand.settle(error, body)
