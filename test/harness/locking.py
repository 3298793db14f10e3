"""Locks by hand: a session's handle on a file, with GETLK, SETLK and SETLKW as methods.

one.lock(WRITE, 0, 99)          # errno of SETLK
two.wait(WRITE, tag=7)          # SETLKW is sent
two.outcome()                   # (7, 0) once it is granted
"""

from __future__ import annotations

import os

from harness import wire
from harness.session import Session
from harness.wire import END_OF_FILE, ROOT, Lock

READ, WRITE, UNLOCK = 0, 1, 2
FLOCK = 1
NOBODY_IN_THE_WAY = 2


class Opened:
    """A session's handle on a file that all lock."""

    def __init__(self, session: Session, path: str = "file") -> None:
        self.session = session
        self.node = session.walk(path).node
        self.handle = session.open(self.node, os.O_RDWR).handle

    def lock(self, kind: int, start: int = 0, end: int = END_OF_FILE, owner: int = 1, flags: int = 0) -> int:
        """SETLK's errno."""
        body = self.session.lock_body(self.handle, owner, kind, start, end, flags)
        return self.session.ask("SETLK", body).error

    def look(self, kind: int, start: int = 0, end: int = END_OF_FILE, owner: int = 1) -> Lock:
        return self.session.getlk(self.handle, owner, kind, lock={"start": start, "end": end})

    def wait(self, kind: int, tag: int, start: int = 0, end: int = END_OF_FILE, owner: int = 1, flags: int = 0) -> None:
        """Send SETLKW; the reply comes over the event channel."""
        self.session.event().send("SETLKW", self.wait_body(kind, start, end, owner, flags), tag)

    def wait_body(self, kind: int, start: int = 0, end: int = END_OF_FILE, owner: int = 1, flags: int = 0) -> bytes:
        return wire.caller(ROOT) + self.session.lock_body(self.handle, owner, kind, start, end, flags)

    def outcome(self, timeout_s: float = 10.0) -> tuple[int, int]:
        """Tag and errno of the next SETLKW that ends."""
        reply = self.session.event().receive(timeout_s)
        assert reply.body == b""
        return reply.tag, reply.error

    def is_waiting(self) -> bool:
        """Nothing has come yet, and the engine has seen all that was sent before."""
        self.session.event().send("PING", tag=999)
        return self.outcome() == (999, 0)
