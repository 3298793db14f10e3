"""Processes that lock a file as they are told."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from calling import Caller
from harness.waiting import wait_until

KINDS = ("posix", "ofd", "flock")
#: Python may name it EDEADLOCK.
DEADLOCK = errno.errorcode[errno.EDEADLK]


class Locker:
    """A process that has a file open and locks it; ranges are those of fcntl(2), 0 0 the whole file."""

    def __init__(self, path: Path, kind: str = "posix", within: Sequence[str] = ()) -> None:
        self.kind = kind
        self.caller = Caller("locks", path, within=within)
        assert self.caller.says() == "ready"

    def ask(self, what: str, waits: str, start: int = 0, length: int = 0) -> str:
        self.order(what, waits, start, length)
        return self.caller.says()

    def lock(self, start: int = 0, length: int = 0) -> str:
        return self.ask("w", "try", start, length)

    def unlock(self) -> str:
        return self.ask("u", "try")

    def wait(self, what: str = "w", start: int = 0, length: int = 0) -> None:
        """Begin to wait, and sleep in the kernel."""
        self.order(what, "wait", start, length)
        wchan = Path(f"/proc/{self.pid}/wchan")
        # Not in the pipe that it reads its orders from, and not running. A FUSE request, a lock of the local kernel.
        wait_until(lambda: wchan.read_text() not in ("0", "anon_pipe_read", "pipe_read"), "the process to wait")

    def says(self) -> str:
        return self.caller.says()

    @property
    def pid(self) -> int:
        return self.caller.process.pid

    def close(self) -> None:
        assert self.caller.tell("").says() == "closed"

    def order(self, what: str, waits: str, start: int, length: int) -> None:
        self.caller.tell(f"{self.kind} {what} {waits} {start} {length}")


@contextmanager
def lockers(*paths: Path, kind: str = "posix") -> Iterator[list[Locker]]:
    with ExitStack() as stack:
        made = []
        for path in paths:
            made.append(Locker(path, kind))
            stack.callback(made[-1].caller.end)
        yield made


def says_first(*those: Locker) -> Locker:
    return wait_until(lambda: next((each for each in those if each.caller.has_said()), None), "one of them to be told")
