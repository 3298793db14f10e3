"""Functions in processes of their own that may block in a system call, be looked at there, signalled and killed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness.waiting import wait_until
from kit import outcome

_libc = ctypes.CDLL(None, use_errno=True)
#: System calls to be blocked in, <asm/unistd.h>: x86-64, or the generic numbers.
_NUMBERS = (
    {"open": 257, "read": 0, "write": 1, "poll": 7, "epoll_wait": 232, "select": 270}
    if os.uname().machine == "x86_64"
    else {"open": 56, "read": 63, "write": 64, "poll": 73, "epoll_wait": 22, "select": 72}
)


class Child:
    """A function in a child; killed at the end of `children`."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._readable, writable = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._readable)
                signal.alarm(60)
                answer = outcome(function)
                with os.fdopen(writable, "wb") as pipe:
                    pickle.dump(answer, pipe)
            finally:
                os._exit(0)
        os.close(writable)
        self._status: int | None = None

    def blocks_in(self, call: str) -> Child:
        """Wait until it sleeps in a system call."""
        wait_until(lambda: self._call() == _NUMBERS[call], f"{self.pid} to block in {call}")
        return self

    def _call(self) -> int | None:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{self.pid}/syscall") as file:
            return int(file.read().split()[0])
        return None

    def state(self) -> str:
        with open(f"/proc/{self.pid}/stat") as file:
            return file.read().rpartition(") ")[2][0]

    def signal(self, number: int) -> Child:
        os.kill(self.pid, number)
        return self

    def result(self) -> Any:
        """What the function returned, its errno's name, or "SIG..." if a signal ended it."""
        with os.fdopen(self._readable, "rb") as pipe:
            data = pipe.read()
        self._readable = -1
        _, status = os.waitpid(self.pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        return pickle.loads(data) if data else signal.Signals(-self._status).name

    def dies_of(self, number: int) -> bool:
        """Whether a signal ends it at once."""
        begun = time.monotonic()
        self.signal(number)
        _, status = os.waitpid(self.pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        return self._status == -number and time.monotonic() - begun < 5

    def end(self) -> None:
        if self._readable >= 0:
            os.close(self._readable)
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def children(*functions: Callable[[], Any]) -> Iterator[list[Child]]:
    made: list[Child] = []
    try:
        for function in functions:
            made.append(Child(function))
        yield made
    finally:
        for child in made:
            child.end()


def has_reader(path: str | os.PathLike[str]) -> bool:
    """Whether anybody has a FIFO open for reading."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


def catch(number: int = signal.SIGUSR1) -> None:
    """A handler that does nothing, and system calls that are not restarted after it."""
    signal.signal(number, lambda signum, frame: None)
    signal.siginterrupt(number, True)


# ---- system calls that Python would repeat after EINTR


def _made(result: int) -> int | str:
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]


def plain_open(path: str, flags: int) -> int | str:
    return _made(_libc.open(os.fsencode(path), flags))


def plain_read(fd: int, size: int = 65536) -> bytes | str:
    buffer = ctypes.create_string_buffer(size)
    got = _made(_libc.read(fd, buffer, size))
    return buffer.raw[:got] if isinstance(got, int) else got


def plain_write(fd: int, data: bytes) -> int | str:
    return _made(_libc.write(fd, data, len(data)))
