"""Going to the background once the mount stands, so that every failure before that reaches the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

_FAILED = 4  # MountExit.INTERNAL, for a child that died without a word


def detach(serve: Callable[[Callable[[], None]], int]) -> int:
    """Run ``serve(ready)`` in a child of a new session; its exit status if it ends before it calls ``ready``, else 0.

    Until then the child has our terminal, afterwards neither that nor our directory. It never returns from here.
    """
    readable, writable = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(readable)
        _be_child(serve, writable)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        if pipe.read(1):
            return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else _FAILED


def _be_child(serve: Callable[[Callable[[], None]], int], writable: int) -> None:
    status = _FAILED
    try:
        os.setsid()
        status = serve(lambda: _leave_terminal(writable))
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        # Not sys.exit: what the parent registered to run at its exit is not ours to run.
        sys.stderr.flush()
        os._exit(status)


def _leave_terminal(writable: int) -> None:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(writable, b"r")
    os.close(writable)
