"""Going to the background once the mount stands, so that every failure before that reaches the terminal.

Until the foreground process has said that it is content, the daemon ends with it: whoever interrupts or kills a mount
that does not come about leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

_FAILED = 4  # MountExit.INTERNAL, for a child that died without a word
_STANDS, _KEEP = b"r", b"k"
#: What may end the daemon early.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def detach(serve: Callable[[Callable[[], None]], int], confirm: Callable[[], None]) -> int:
    """Run ``serve(ready)`` in a child of a new session; its exit status if it ends before it calls ``ready``, else 0.

    Until then the child has our terminal, afterwards neither that nor our directory. If ``confirm``, which is called
    here after that, raises, or if we are killed before it is done, the child gets SIGTERM.
    """
    ours, theirs = socket.socketpair()
    if sys.stdout is not None:  # None: we were started without
        sys.stdout.flush()
    child = os.fork()
    if child == 0:
        ours.close()
        _be_child(serve, theirs)
    theirs.close()
    with ours:
        try:
            if ours.recv(1):
                confirm()
                ours.sendall(_KEEP)
                return 0
        except KeyboardInterrupt:
            ours.close()
            os.waitpid(child, 0)
            raise
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else _FAILED


def _be_child(serve: Callable[[Callable[[], None]], int], parent: socket.socket) -> None:
    """It never returns."""
    status = _FAILED
    try:
        os.setsid()
        _end_with(parent)
        status = serve(lambda: _leave_terminal(parent))
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        # Not sys.exit: what the parent registered to run at its exit is not ours to run.
        if sys.stderr is not None:
            sys.stderr.flush()
        os._exit(status)


def _end_with(parent: socket.socket) -> None:
    """SIGTERM to ourselves if the parent goes without having said that we may stay."""

    def watch() -> None:
        kept = False
        with parent, contextlib.suppress(OSError):  # ECONNRESET: it has not read that we stand
            kept = parent.recv(1) == _KEEP
        if not kept:
            os.kill(os.getpid(), signal.SIGTERM)

    # With the signals blocked from its first moment on: they are the main thread's to hold back.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    threading.Thread(target=watch, name="parent", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_terminal(parent: socket.socket) -> None:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    parent.sendall(_STANDS)
