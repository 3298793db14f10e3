"""What a file is to contain that a special rule replaces: another file, or what a command prints."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import subprocess
import time
from typing import IO

from qtfs_common.files import open_input
from qtfs_common.special import Rule, fill_in

#: Bytes; more is EFBIG.
MAX_CONTENT = 4 << 20
#: For a command to print all it has to say and end; then it is killed, and opening the file fails with ETIMEDOUT.
COMMAND_TIMEOUT_S = 5.0
_PIECE = 65536


def content(rule: Rule, *, pid: int, tid: int, name: str) -> bytes:
    """The content for a caller, as it is now. Raises OSError; the command runs as we do, not as the caller."""
    texts = [fill_in(text, pid=pid, tid=tid, name=name) for text in rule.texts]
    return _output(texts) if rule.command else _read(texts[0])


def _too_large(what: str) -> OSError:
    return OSError(errno.EFBIG, f"more than {MAX_CONTENT} bytes", what)


def _read(path: str) -> bytes:
    with open_input(path) as file:
        found = file.read(MAX_CONTENT + 1) or b""
    if len(found) > MAX_CONTENT:
        raise _too_large(path)
    return found


def _output(command: list[str]) -> bytes:
    """What a command prints; its own session is killed with all its processes when it takes too long."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            deadline = time.monotonic() + COMMAND_TIMEOUT_S
            found = _read_all(process.stdout, command[0], deadline)
            status = process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired as error:
            _kill(process)
            raise _timed_out(command[0]) from error
        except BaseException:
            _kill(process)
            raise
    if status != 0:
        raise OSError(errno.EIO, f"ended with {status}", command[0])
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it began. It has not been waited for, so the number is still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _timed_out(command: str) -> OSError:
    return OSError(errno.ETIMEDOUT, f"did not end within {COMMAND_TIMEOUT_S:g} s", command)


def _read_all(pipe: IO[bytes], command: str, deadline: float) -> bytes:
    found = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            piece = os.read(pipe.fileno(), _PIECE)
            if not piece:
                return bytes(found)
            found += piece
            if len(found) > MAX_CONTENT:
                raise _too_large(command)
    raise _timed_out(command)
