"""Errors that a user can cause and can mend.

A command catches :class:`QtfsError`, prints its text on one line and leaves with ``exit_code``. Everything else that
escapes is a defect of ours and deserves its traceback.
"""

from __future__ import annotations

import os


class QtfsError(Exception):
    """A mistake or condition the user can mend; ``str()`` is a short message, ``exit_code`` the command's status."""

    exit_code: int = 1

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(QtfsError):
    """A file the user wrote cannot be used; the message starts with ``FILE:LINE:`` (or ``FILE:`` without a line)."""

    def __init__(self, path: str | os.PathLike[str], reason: str, line: int | None = None) -> None:
        self.path = os.fspath(path)
        self.line = line
        self.reason = reason
        place = self.path if line is None else f"{self.path}:{line}"
        super().__init__(f"{place}: {reason}")


class AddressError(QtfsError, ValueError):
    """Text that is no address, or an address that cannot be used in this way."""

    def __init__(self, address: object, reason: str) -> None:
        self.address = str(address)
        self.reason = reason
        super().__init__(f"address '{self.address}': {reason}")


class SocketError(QtfsError):
    """A socket could not be connected or opened; ``errno`` is the kernel's number, 0 when there is none."""

    def __init__(self, message: str, errno: int = 0) -> None:
        self.errno = errno
        super().__init__(message)


class ConnectError(SocketError):
    """Nobody could be reached at an address."""


class ListenError(SocketError):
    """An address cannot be listened on."""


class AddressInUseError(ListenError):
    """Somebody else listens on that address already."""


class RunDirError(QtfsError):
    """The run directory, or a file in it, cannot be created or trusted."""


class LockedError(QtfsError):
    """Another process holds a lock; ``pid`` is that process, or None if it has not written itself down yet."""

    def __init__(self, path: str | os.PathLike[str], pid: int | None) -> None:
        self.path = os.fspath(path)
        self.pid = pid
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(f"{self.path} is locked by {holder}: it is already running")
