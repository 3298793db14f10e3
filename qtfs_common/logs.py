"""Logging for daemons and commands, and notices to systemd.

Modules log through ``logging.getLogger(__name__)``; only mains call :func:`setup`. Sources: sd-daemon(3) for the
``<N>`` prefixes, systemd.exec(5) for JOURNAL_STREAM, sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import sys
import syslog
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qtfs_common.errors import QtfsError

Target = Literal["auto", "stderr", "syslog"]

#: The original's names of levels, and what they let through.
LEVELS = {
    "NONE": logging.CRITICAL + 10,
    "ERROR": logging.ERROR,
    "WARN": logging.WARNING,
    "INFO": logging.INFO,
    "DEBUG": logging.DEBUG,
}

_PRIORITIES = (
    (logging.CRITICAL, syslog.LOG_CRIT),
    (logging.ERROR, syslog.LOG_ERR),
    (logging.WARNING, syslog.LOG_WARNING),
    (logging.INFO, syslog.LOG_INFO),
)
_NOTIFY_TIMEOUT_S = 5.0
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def setup(level: str = "INFO", target: Target = "auto", program: str | None = None) -> None:
    """Sends the log of this process to one place, in place of where an earlier call sent it.

    ``level`` is one of LEVELS in any case (QtfsError otherwise). ``auto`` is stderr, with sd-daemon prefixes if that
    is the journal, or syslog if stderr is closed or /dev/null, as in a daemon that went to the background. ``program``
    starts every line outside the journal.
    """
    number = level_number(level)
    name = program or Path(sys.argv[0]).name or "qtfs"
    if target == "auto":
        target = "stderr" if _stderr_usable() else "syslog"
    handler = _stderr_handler(name) if target == "stderr" else _syslog_handler(name)
    root = logging.getLogger()
    for old in [known for known in root.handlers if isinstance(known, (_StderrHandler, _SyslogHandler))]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(number)


def set_level(level: str) -> None:
    """Changes what is let through while running; raises QtfsError for a level that does not exist."""
    logging.getLogger().setLevel(level_number(level))


def level_number(level: str) -> int:
    """The number of a level's name in the logging module; raises QtfsError naming an unknown one."""
    try:
        return LEVELS[level.upper()]
    except KeyError:
        raise QtfsError(f"unknown log level '{level}': use {', '.join(LEVELS)}") from None


def notify(state: str, descriptors: Sequence[int] = ()) -> bool:
    """Tells systemd ``state`` (``READY=1``, ``STOPPING=1``, ``STATUS=...``, lines joined by newlines).

    ``descriptors`` go along with ``FDSTORE=1``. True if it was sent; False without $NOTIFY_SOCKET or if nobody listens
    there, which never stops a daemon.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return False
    # The one abstract name in the project: systemd chose it, not we.
    target = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_NOTIFY_TIMEOUT_S)
            sock.connect(os.fsencode(target))
            socket.send_fds(sock, [state.encode()], descriptors) if descriptors else sock.send(state.encode())
    except OSError:
        return False
    return True


class _Formatter(logging.Formatter):
    """One record, one line: names from a peer may hold line feeds that would forge records. Tracebacks stay whole."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _CONTROL.sub(_escape, record.message)
        return super().formatMessage(record)


class _JournalFormatter(_Formatter):
    """Every line starts with its priority, as the journal wants it."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_priority(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).split("\n"))


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic for type checkers only before 3.12
    """Ours, so that setup() can tell it from handlers of a test runner."""


class _SyslogHandler(logging.Handler):
    """libc's syslog(3), which waits out a syslog daemon that is absent or restarted."""

    def __init__(self, program: str) -> None:
        super().__init__()
        syslog.openlog(program, syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record).encode("utf-8", "backslashreplace").decode()
            for line in text.split("\n"):
                syslog.syslog(_priority(record.levelno), line)
        except Exception:
            self.handleError(record)


def _syslog_handler(program: str) -> logging.Handler:
    handler = _SyslogHandler(program)
    handler.setFormatter(_Formatter("%(message)s"))
    return handler


def _stderr_handler(program: str) -> logging.Handler:
    handler = _StderrHandler(sys.stderr)
    plain = f"{program.replace('%', '%%')}: %(levelname)s: %(message)s"
    handler.setFormatter(_JournalFormatter("%(message)s") if _stderr_is_journal() else _Formatter(plain))
    return handler


def _stderr_is_journal() -> bool:
    """Whether $JOURNAL_STREAM, a device and an inode, describes our stderr."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(2)
        return (found.st_dev, found.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


def _stderr_usable() -> bool:
    """False if stderr is closed or the null device."""
    if sys.stderr is None or sys.stderr.closed:
        return False
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return not (stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3))


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), syslog.LOG_DEBUG)


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode()
